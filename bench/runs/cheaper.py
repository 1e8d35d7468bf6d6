"""
What CoLM's choice loses if the pool runs through fewer blocks, or if hidden states stand for gradients: cheaper.md.

    python -m bench.runs.cheaper                                    # ten minutes of a CPU core; finished runs are kept
    python -m bench.runs.cheaper --model=path/to/SmolLM2-135M       # beside it the errors of a pretrained model

Pools hold near-duplicates, since nowhere else does a choice by gradients help (results/coreset.md). The error is of the
gradient by the last V projection, whatever was compared to choose.
"""

from bench import parser

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('--model', default='', help='a Hugging Face folder whose errors are measured, too (none)')
    asked.add_argument('--seeds', type=int, default=5, choices=range(1, 6), help='of pools and of runs (5)')
    args = asked.parse_args()

import glob
import os
import sysconfig
import time

os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import torch

import coreset
from bench.measure import table
from bench.runs import coreset as base
from bench.runs.coreset_data import BATCH, POOL, ROOT, Windows, prepare

LOOKS = {  # name: options of Coreset
    'grad': dict(feature='grad'),
    'grad, half of the blocks': dict(feature='grad', depth=0.5),
    'grad, a quarter': dict(feature='grad', depth=0.25),
    'hidden': dict(feature='hidden'),
    'hidden, half of the blocks': dict(feature='hidden', depth=0.5),
    'hidden, a quarter': dict(feature='hidden', depth=0.25),
}
TRAINED = ['random 64', 'full 256', 'grad, unit, no sources', 'grad, a quarter', 'hidden', 'hidden, a quarter']
base.METHODS |= {name: (BATCH, 'none', options) for name, options in LOOKS.items() if name in TRAINED}


def chosen_by(options, model, x, y, k, batch_size, seed):
    """-> indices (k,), their cluster weights, and CPU seconds of choosing. x, y (n, T)."""
    chooser = coreset.Coreset(**options, weights='cluster', seed=seed)
    began = time.process_time()
    chosen, weights = chooser.choose(model, x, y, [0] * len(x), k, 0, batch_size)
    return chosen, weights, time.process_time() - began


def errors(model, pools, k, batch_size):
    """Rows: each look's errors of the gradient by the last V projection, and its time over that of 'grad'."""
    found = {name: [] for name in LOOKS}
    for seed, (x, y) in enumerate(pools):
        seen = coreset.features(model, x, y, 'grad', batch_size)
        K = coreset.gram(seen['X'], seen['D'])  # (n, n): of the whole gradients
        for name, options in LOOKS.items():
            chosen, weights, seconds = chosen_by(options, model, x, y, k, batch_size, seed)
            plain, at_random = coreset.matching_error(K, chosen).tolist()
            weighted = coreset.matching_error(K, chosen, weights)[0].item()
            found[name].append((plain, weighted, at_random, seconds))
    means = {name: np.mean(rows, 0) for name, rows in found.items()}
    for name, (plain, weighted, at_random, seconds) in means.items():
        over = [f'{mean / max(means["grad"][i], 1e-9):.2f}' for i, mean in ((0, plain), (1, weighted), (3, seconds))]
        yield [name, f'{plain:.3f}', f'{weighted:.3f}', f'{at_random:.3f}', *over]


def copies(ids, vocabulary, seed, n=64, T=128):
    """A pool x, y (n, T): n / 4 texts, repeated unevenly, and a twentieth of the tokens replaced at random."""
    rng = np.random.default_rng(seed)
    at = rng.choice(len(ids) - T - 1, n // 4, replace=False)
    which = np.repeat(at, rng.multinomial(n - len(at), rng.dirichlet(np.full(len(at), 0.7))) + 1)
    rows = np.stack([ids[a : a + T + 1] for a in which])
    rows = np.where(rng.random(rows.shape) < 0.05, rng.integers(vocabulary, size=rows.shape), rows)
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())


def pretrained(folder, seeds):
    """Rows of `errors` for a Hugging Face model on the source of Python's standard library."""
    from tokenizers import Tokenizer

    from plumbing import hf

    tokenizer = Tokenizer.from_file(os.path.join(folder, 'tokenizer.json'))
    paths, ids = sorted(glob.glob(os.path.join(sysconfig.get_paths()['stdlib'], '*.py')))[:80], []
    for path in paths:
        with open(path, encoding='utf-8', errors='replace') as f:
            ids += tokenizer.encode(f.read(20_000)).ids
    model = hf.load(folder).eval()
    pools = [copies(np.array(ids), model.config.vocab_size, seed) for seed in range(seeds)]
    return list(errors(model, pools, 16, 16))


def losses(windows, seeds):
    """Rows: the loss after 32 steps on such pools, over that of 64 random windows, and the share of choosing."""
    runs = {name: [base.run('redundant', name, seed, windows) for seed in range(seeds)] for name in TRAINED}
    for name, rs in runs.items():
        over = base.mean([r['mixture'] - plain['mixture'] for r, plain in zip(rs, runs['random 64'])])
        spent, chosen = (np.mean([r[key] for r in rs]) for key in ('seconds', 'selecting'))
        yield [name, base.mean([r['mixture'] for r in rs]), over, f'{1000 * spent / base.STEPS:.0f}',
               f'{100 * chosen / spent:.0f} %']  # fmt: skip


def main(args):
    windows = Windows(prepare('pystdlib', None))
    model = base.new_model(windows, 0)
    model.load_state_dict(base.warm_start('pystdlib', windows))
    pools = [windows.pool(seed, 0, True)[:2] for seed in range(args.seeds)]
    head = ['compared', 'error', 'with cluster weights', 'of a random batch', 'error over grad', 'weighted', 'time']
    what = "the tiny model of results/coreset.md, 64 of 256 windows of 24 tokens, 3 blocks"
    lines = [
        '# Cheaper choices',
        '',
        f'Made by `python -m bench.runs.cheaper{" --model=FOLDER" * bool(args.model)}` on one CPU core, torch '
        f'{torch.__version__}.',
        'A choice compares gradients of the V projection of the last of so many blocks, as if there were no more, or',
        'means of the hidden states that this block reads; a quarter of three blocks is one, which reads embeddings.',
        'The error is always that of the gradient by the V projection of the last block of all. Pools of',
        'near-duplicates.',
        '',
        f'## Errors: {what}',
        '',
        *table(head, list(errors(model, pools, BATCH, BATCH))),
        '',
    ]
    if args.model:
        shape = os.path.basename(os.path.abspath(args.model))
        lines += [f'## Errors: {shape}, 16 of 64 windows of 128 tokens', '']
        lines += [*table(head, pretrained(args.model, args.seeds)), '']
    head = ['chosen by', 'loss', 'over random 64', 'ms a step', 'of it choosing']
    lines += [f'## Loss after {base.STEPS} steps of {BATCH} of {POOL} windows, the tiny model', '']
    lines += [*table(head, list(losses(windows, args.seeds))), '']
    with open(os.path.join(ROOT, 'results', 'cheaper.md'), 'w') as f:
        f.write('\n'.join(lines))
    print('\n'.join(lines))


if __name__ == '__main__':
    main(args)
