"""
What GaLore's parts cost and keep, measured here, as ratios within one run; the tables go to results/bench.md.

    python bench.py                              # all of it, about ten minutes on two CPU cores
    python bench.py --only=memory --n_layer=8    # gradients held: normal against per-layer

refresh: on the real gradients of a real run at the 350m model's shapes, how much of the gradient energy that the SVD's
basis keeps the warm-started subspace iteration keeps too, and in what share of the time; both are timed on the same
gradient, one after the other.
memory: the most bytes of gradient that exist at once, counted over the parameters whenever one of them gets its own.
"""

import os
import sys
import time

import torch

import configurator
import galore
import train
from batches import Tokens
from build import ROOT, build_model, data_folder
from memest import LiveBytes

# ---- config ----------------------------------------------------------------------------------------------------------
only = 'all'  # 'all' | 'refresh' | 'memory': which part to measure
n_layer = 2  # blocks of the model that gives the gradients; its widths are the 350m model's
steps = 160  # training steps of the refresh part
update_proj_gap = 60  # T of the refresh part: each layer refreshes two or three times within the steps
rank = 256  # of the basis
out = 'results/bench.md'  # file to write the tables to, when all is measured; '': none
# ---- end of config ---------------------------------------------------------------------------------------------------


def build(config, **changes):
    """Model, optimizer and batches of a real run on pystdlib with one block's widths of the 350m model."""
    flags = ['--model=350m', f'--n_layer={config.n_layer}', f'--rank={config.rank}', '--batch_size=4']
    flags += [f'--update_proj_gap={config.update_proj_gap}', '--learning_rate=5e-3', '--warmup_iters=20']
    run = configurator.load(train.__file__, [*flags, *(f'--{k}={v}' for k, v in changes.items())], train.problems)
    folder = data_folder(run)
    tokens = Tokens(folder, 'train', run.block_size)
    model = build_model(run, folder, tokens.vocab_size, torch.float32, 'cpu')
    return run, model, train.METHODS[run.method].setup(model, run), tokens


def step(run, model, optimizer, tokens, t):
    n = run.gradient_accumulation_steps
    batches = [tokens.batch(run.seed, t * n + i, run.batch_size)[:2] for i in range(n)]
    return train.training_step(model, optimizer, batches, train.learning_rate_at(t, run), 'cpu').item()


def measure_refresh(config):
    """-> rows (shape, refreshes, energy of subspace / of svd: mean and least, of the stale P, seconds of each)."""
    run, model, optimizer, tokens = build(config, max_iters=config.steps)
    seen = {}  # (m, n) -> list of (energy kept by the new P, by the old one, by the SVD's, seconds, seconds of the SVD)
    ours = galore.orthonormal_basis

    def measured(G, rank, refresh, previous=None):
        if previous is None:
            return ours(G, rank, refresh)
        started = time.perf_counter()
        P = ours(G, rank, 'subspace', previous)
        between = time.perf_counter()
        best = ours(G, rank, 'svd')
        ended = time.perf_counter()
        kept = [(basis.T @ G).square().sum().item() for basis in (P, previous, best)]
        seen.setdefault(tuple(G.shape), []).append((*kept, between - started, ended - between))
        return P

    galore.orthonormal_basis = measured
    try:
        for t in range(config.steps):
            loss = step(run, model, optimizer, tokens, t)
            if t % 20 == 0:
                print(f'refresh: step {t}/{config.steps}, loss {loss:.3f}', flush=True)
    finally:
        galore.orthonormal_basis = ours
    rows = []
    for (m, n), found in sorted(seen.items()):
        found = torch.tensor(found, dtype=torch.float64)
        new, stale = found[:, 0] / found[:, 2], found[:, 1] / found[:, 2]
        seconds, svd_seconds = found[:, 3].median().item(), found[:, 4].median().item()
        row = [f'{m} x {n}', len(found), f'{new.mean():.4f}', f'{new.min():.4f}', f'{stale.mean():.4f}']
        rows.append([*row, f'{1000 * seconds:.0f}', f'{1000 * svd_seconds:.0f}', f'1/{svd_seconds / seconds:.0f}'])
    return rows


def measure_memory(config):
    """-> rows (mode, most MB of gradients at once, in blocks of the model's largest matrix)."""
    rows = []
    for name, changes in {
        'normal': {},
        'per_layer': {'per_layer': True},
        'normal, 4 micro-batches': {'gradient_accumulation_steps': 4},
        'per_layer, 4 micro-batches': {'per_layer': True, 'gradient_accumulation_steps': 4},
    }.items():
        run, model, optimizer, tokens = build(config, batch_size=1, **changes)
        parameters, most = list(model.parameters()), [0, 0]
        step(run, model, optimizer, tokens, 0)  # every P is made here, from one layer's gradient at a time
        ready = galore.GaLoreAdamW.gradient_ready

        def counted(optimizer, p, ready=ready, parameters=parameters, most=most):
            full = sum(q.grad.nbytes for q in parameters if q.grad is not None)
            most[0] = max(most[0], full)
            ready(optimizer, p)
            most[1] = max(most[1], sum(R.nbytes for R in optimizer.R.values()))

        for p in parameters:  # in place of the optimizer's own hooks, which drop the gradient
            p._post_accumulate_grad_hooks.clear()
            p.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: counted(optimizer, p))
        with LiveBytes() as live:
            step(run, model, optimizer, tokens, 1)
        largest = max(p.nbytes for p in parameters)
        rows.append((name, f'{most[0] / 1e6:.1f}', f'{most[0] / largest:.2f}', f'{most[1] / 1e6:.1f}',
                     f'{live.peak / 1e6:.0f}'))  # fmt: skip
        print(f'memory: {name}: {rows[-1][1]} MB of gradients', flush=True)
    return rows


def table(head, rows):
    return [f'| {" | ".join(map(str, row))} |' for row in (head, ['---'] * len(head), *rows)]


def main(config):
    torch.manual_seed(0)
    command = f'`python {" ".join(["bench.py", *sys.argv[1:]])}`'
    lines = [
        '# Measured parts',
        '',
        f'Made by {command}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads.',
        '',
    ]
    shape = f'{config.n_layer} blocks of the 350m shape, rank {config.rank}'
    if config.only in ('all', 'refresh'):
        head = [
            'gradient',
            'refreshes',
            'energy kept, of the SVD\'s: mean',
            'least',
            'by the old P',
            'ms',
            'ms of the SVD',
            'time',
        ]
        lines += [
            f'## A new P on real gradients ({shape}, T {config.update_proj_gap}, {config.steps} steps of training)',
            '',
        ]
        lines += [*table(head, measure_refresh(config)), '']
    if config.only in ('all', 'memory'):
        head = [
            'mode',
            'most MB of full gradients',
            'in largest matrices',
            'MB of projected ones beside them',
            'peak MB made in the step',
        ]
        lines += [f'## Gradients alive at once ({shape}, fp32, batch 1)', '', *table(head, measure_memory(config)), '']
    print('\n'.join(lines))
    if config.out and config.only == 'all':
        with open(os.path.join(ROOT, config.out), 'w') as f:
            f.write('\n'.join(lines))


if __name__ == '__main__':
    main(configurator.load_or_exit(__file__, sys.argv[1:]))
