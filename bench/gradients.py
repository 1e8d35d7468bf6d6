"""The gradients of a real run: how good a new basis is, and how many gradients are alive at once."""

import functools
import itertools
import time

import torch

import galore
import train
from bench.measure import block_matrices, clear, made_in, named, nothing_attached, on_meta, rank_of, run_config, sizes
from configurator import method_of
from data.batches import Tokens
from plumbing.build import build_model, data_folder


def real_run(config, size, blocks, *flags):
    """-> a function that takes step t of a run on pystdlib, its model and its optimizer."""
    base = ['--batch_size=4', f'--update_proj_gap={config.update_proj_gap}', f'--max_iters={config.steps}']
    base += ['--learning_rate=5e-3', '--warmup_iters=20', f'--rank={config.rank or rank_of(size)}']
    run = run_config(size, blocks, *base, *flags)
    folder = data_folder(run)
    tokens = Tokens(folder, 'train', run.block_size)
    model = build_model(run, folder, tokens.vocab_size, torch.float32, 'cpu')
    optimizer = method_of(run).setup(model, run)

    def step(t):
        n = run.gradient_accumulation_steps
        batches = [tokens.batch(run.seed, t * n + i, run.batch_size)[:2] for i in range(n)]
        return train.training_step(model, optimizer, batches, train.learning_rate_at(t, run), 'cpu').item()

    return step, model, optimizer


def measure_refresh(config):
    """Compare each new P of a run with the SVD's P for the same gradient, and time both."""
    rows = []
    for size, blocks in sizes(config.refresh_sizes):
        # (m, n) -> list of (energy kept by the new P, by the old one, by the SVD's, seconds, seconds of the SVD)
        seen = {tuple(galore.short_side_first(p).shape): [] for p in block_matrices(on_meta(size, 1))}
        ours = galore.orthonormal_basis

        def measured(G, rank, refresh, previous=None, seed=0, seen=seen, ours=ours):
            if previous is None or len(seen[tuple(G.shape)]) >= config.refreshes:
                return ours(G, rank, refresh, previous, seed)
            started = time.perf_counter()
            P = ours(G, rank, 'subspace', previous)
            between = time.perf_counter()
            best = ours(G, rank, 'svd')
            ended = time.perf_counter()
            kept = [(basis.T @ G).square().sum().item() for basis in (P, previous, best)]
            seen[tuple(G.shape)].append((*kept, between - started, ended - between))
            return P

        step, model, optimizer = real_run(config, size, blocks)
        started = time.perf_counter()
        galore.orthonormal_basis = measured
        try:
            for t in range(config.steps):
                loss = step(t)
                if t % 10 == 0:
                    count = ', '.join(f'{m} x {n}: {len(found)}' for (m, n), found in seen.items())
                    print(f'refresh: {size}: step {t}/{config.steps}, loss {loss:.3f}, refreshes {count}', flush=True)
                late = time.perf_counter() - started > 60 * config.minutes
                if min(map(len, seen.values())) >= (min(2, config.refreshes) if late else config.refreshes):
                    break
        finally:
            galore.orthonormal_basis = ours
        for (m, n), found in seen.items():
            if not found:
                continue
            found = torch.tensor(found, dtype=torch.float64)
            new, stale = found[:, 0] / found[:, 2], found[:, 1] / found[:, 2]
            taken, svd = found[:, 3].median().item(), found[:, 4].median().item()
            row = [named(size, blocks), f'{m} x {n}', config.rank or rank_of(size), len(found)]
            row += [f'{new.mean():.4f}', f'{new.min():.4f}', f'{stale.mean():.4f}']
            rows.append([*row, 1000 * taken, 1000 * svd, f'1/{svd / taken:.0f}'])
        del model, optimizer, step
        clear()
    return rows


def watch(model, optimizer):
    """-> [peak bytes of full gradients, of projected ones], updated whenever a gradient is complete, before and after
    the optimizer takes it."""
    kinds, most = (list(model.parameters()), list(getattr(optimizer, 'placeholder', {}).values())), [0, 0]

    def count():
        for i, tensors in enumerate(kinds):
            most[i] = max(
                most[i], sum(t.grad.nbytes for t in tensors if t.grad is not None and type(t.grad) is torch.Tensor)
            )

    def counted(ready, p):
        count()
        ready(p)
        count()

    for p in (*kinds[0], *kinds[1]):
        if p._post_accumulate_grad_hooks:
            p._post_accumulate_grad_hooks.clear()
            p.register_post_accumulate_grad_hook(functools.partial(counted, optimizer.gradient_came))
    return most


def measure_memory(config):
    rows, micro = [], '--gradient_accumulation_steps=4'
    modes = {
        'AdamW': ['--method=adamw'],
        'AdamW, per_layer': ['--method=adamw', '--per_layer=True'],
        'GaLore, drop-in': [],
        'GaLore': [],
        'GaLore, per_layer': ['--per_layer=True'],
        'AdamW, 4 micro-batches': ['--method=adamw', micro],
        'GaLore, 4 micro-batches': [micro],
        'GaLore, per_layer, 4 micro-batches': ['--per_layer=True', micro],
    }
    for (size, blocks), (name, flags) in itertools.product(sizes(config.memory_sizes), modes.items()):
        with nothing_attached('drop-in' in name):
            step, model, optimizer = real_run(config, size, blocks, '--batch_size=1', *flags)
        step(0)  # every P is made here, from one layer's gradient at a time
        most = watch(model, optimizer)
        made = made_in(functools.partial(step, 1))
        largest = max(p.nbytes for p in model.parameters())
        row = [named(size, blocks), name, most[0] / 1e6, most[0] / largest, most[1] / 1e6, made / 1e6]
        rows.append(row)
        print(f'memory: {size}: {name}: {most[0] / 1e6:.1f} MB of full gradients', flush=True)
        del model, optimizer, step
        clear()
    return rows


PARTS = {
    'refresh': (
        measure_refresh,
        'A new P on real gradients',
        'Training on pystdlib, T {update_proj_gap}: the gradient energy that a new P keeps, and that the old P would '
        "have kept, as a share of the SVD's. The new P and the SVD are timed on the same gradient.",
        ['model', 'gradient', 'rank', 'refreshes', "energy kept, of the SVD's: mean", 'least', 'by the old P', 'ms',
         'ms of the SVD', 'time'],
    ),
    'memory': (
        measure_memory,
        'Gradients alive at once',
        'Training on pystdlib, fp32, batch 1 x 256, a step without a refresh: the peak over all moments at which a '
        'gradient is complete.',
        ['model', 'method', 'most MB of full gradients', 'in largest matrices', 'MB of projected ones',
         'MB made in a step'],
    ),
}  # fmt: skip
