"""
The cost of choosing a batch: facility location alone, its share of a training step, the memory of 64 out of 256.

    python -m bench.choosing                     # about five minutes on one CPU core; writes results/choosing.md
"""

from bench import parser

if __name__ == '__main__':
    parser().parse_args()

import os
import statistics
import time

import torch

import adam
import train
from bench.measure import clear, keep_freed_memory, made_in, run_config, table
from coreset import Coreset, facility_location, features
from plumbing.build import ROOT, build_model

POOL, BATCH, T = 256, 64, 32


def distances(n, seed=0):
    x = torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))
    return torch.cdist(x, x)


def measure_greedy():
    """Milliseconds of facility location on a given similarity matrix."""
    rows = []
    for n, k, asked in ((128, 64, 5), (256, 64, None), (1024, 256, 100)):
        similarity = distances(n).max() - distances(n)
        ms = []
        for _ in range(15):
            started = time.process_time()
            facility_location(similarity, k)
            ms.append(1000 * (time.process_time() - started))
        rows.append([f'{n}, {k}', statistics.median(ms), min(ms), asked])
    return rows


def measure_agreement():
    """Our objective over submodlib's on 100 random problems, if that is installed."""
    try:
        from submodlib import FacilityLocationFunction
    except ImportError:
        return [['submodlib-py is not installed', None, None]]
    worst, same = 0.0, 0
    for seed in range(100):
        n, k = 40 + seed, 8 + seed // 4
        A = (distances(n, seed).max() - distances(n, seed)).double()
        theirs = FacilityLocationFunction(n=n, mode='dense', sijs=A.numpy(), separate_rep=False).maximize(
            budget=k, optimizer='LazyGreedy', stopIfZeroGain=False, stopIfNegativeGain=False, show_progress=False
        )
        theirs, ours = [i for i, _ in theirs], facility_location(A, k).tolist()
        values = [A[:, chosen].amax(1).sum().item() for chosen in (ours, theirs)]
        worst, same = max(worst, abs(values[0] / values[1] - 1)), same + (sorted(ours) == sorted(theirs))
    return [['100 random problems, n 40 to 139', f'{worst:.1e}', same]]


def measure_share():
    """Seconds of a step that chooses 64 of 256 windows, and the share of choosing."""
    rows = []
    for layers in (4, 12):
        config = run_config('20m', layers, '--method=adamw', f'--block_size={T}', '--batch_size=16')
        model = build_model(config, '', 4096, torch.float32, 'cpu')
        optimizer = adam.setup(model, config)
        x = torch.randint(0, 4096, (POOL, T))
        for name, options in (
            ('grad, unit', dict(feature='grad')),
            ('grad, unit, a quarter of the blocks', dict(feature='grad', depth=0.25)),
            ('hidden, a quarter of the blocks', dict(feature='hidden', depth=0.25)),
            ('grad, Adam + l1', dict(feature='grad', norm='adam')),
            ('zo, m=1', dict(feature='zo', norm='adam', directions=1)),
            ('zo, m=16', dict(feature='zo')),
        ):
            chooser, spent = Coreset(**options), {'choose': [], 'forward': [], 'train': []}
            for step in range(1 if name == 'zo, m=16' else 3):
                started = time.process_time()
                chosen, _ = chooser.choose(model, x, x, [0] * POOL, BATCH, step, 16)
                chosen_at = time.process_time()
                batches = [(x[i], x[i]) for i in chosen.split(16)]
                train.training_step(model, optimizer, batches, 1e-3, 'cpu')
                trained_at = time.process_time()
                features(model, x, x, 'random', 16)
                spent['forward'].append(time.process_time() - trained_at)
                spent['train'].append(trained_at - chosen_at)
                spent['choose'].append(chosen_at - started)
            choose, forward, step = (statistics.median(spent[key]) for key in ('choose', 'forward', 'train'))
            whole = choose + step
            shares = [f'{100 * part / whole:.0f}%' for part in (choose, choose - forward)]
            rows.append([f'20m, {layers} blocks', name, choose, forward, step, *shares])
    return rows


def measure_memory():
    """Peak bytes of a step, weights and moments included: 64 chosen of 256 windows against all 256."""
    rows = []
    for name, accumulate in (('in one micro-batch', 1), ('in micro-batches of 16', 0)):
        for layers in (4, 12):
            found = {}
            for size in (BATCH, POOL):
                micro = size if accumulate else 16
                config = run_config('20m', layers, '--method=adamw', f'--block_size={T}', f'--batch_size={micro}')
                model = build_model(config, '', 4096, torch.float32, 'cpu')
                optimizer = adam.setup(model, config)
                x = torch.randint(0, 4096, (POOL, T))
                chooser = Coreset('grad')

                def step(size=size, micro=micro, model=model, optimizer=optimizer, chooser=chooser, x=x):
                    chosen = torch.arange(POOL)
                    if size < POOL:
                        chosen, _ = chooser.choose(model, x, x, [0] * POOL, size, 0, micro)
                    train.training_step(model, optimizer, [(x[i], x[i]) for i in chosen.split(micro)], 1e-3, 'cpu')

                step()  # makes the moments
                stays = 3 * sum(p.nbytes for p in model.parameters())
                found[size] = (stays + made_in(step)) / 1e6
                del model, optimizer, step
                clear()
            rows.append([f'20m, {layers} blocks', name, found[BATCH], found[POOL], f'{found[BATCH] / found[POOL]:.2f}'])
    return rows


PARTS = (
    (
        measure_greedy,
        'Facility location',
        'CPU time on a given matrix of distances between random points. Asked: an upper limit in ms.',
        ['n, k', 'ms, median', 'ms, best', 'asked'],
    ),
    (
        measure_agreement,
        'Against submodlib-py',
        "Our greedy objective over submodlib's (LazyGreedy); where two gains are equal, the sets may differ.",
        ['problems', 'largest relative difference', 'equal sets'],
    ),
    (
        measure_share,
        'Choosing 64 of 256 windows, as a share of the step',
        f'CPU seconds, windows of {T} tokens, vocabulary 4,096, micro-batches of 16, AdamW. Forward: the pool through '
        'all blocks but the last, which every comparison needs: at a ratio of four it alone takes 4 x 2 of the '
        '4 x 2 + 6 operations per weight and token of such a step, 57 %.',
        ['model', 'feature', 'choosing', 'its forward', 'training', 'share of choosing', 'share without its forward'],
    ),
    (
        measure_memory,
        'Memory of a step with 64 of 256 windows',
        'MB of weights, moments, gradients and everything that a step creates; the choice uses micro-batches of the '
        'same size. Asked: at most 0.50 of the memory of 256 at once.',
        ['model', 'trained', '64 of 256', '256', 'ratio'],
    ),
)  # fmt: skip


def main():
    keep_freed_memory()
    torch.manual_seed(0)
    lines = [
        '# What choosing a batch costs',
        '',
        f'Made by `python -m bench.choosing` with torch {torch.__version__} on {torch.get_num_threads()} CPU threads.',
        '',
    ]
    for measure, heading, text, head in PARTS:
        part = [f'## {heading}', '', text, '', *table(head, measure()), '']
        print('\n'.join(part), flush=True)
        lines += part
    with open(os.path.join(ROOT, 'results', 'choosing.md'), 'w') as f:
        f.write('\n'.join(lines))


if __name__ == '__main__':
    main()
