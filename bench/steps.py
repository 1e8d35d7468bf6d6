"""Whole training steps: their mean time, and the slowest of them."""

import functools
import importlib.util
import math
import statistics

import torch

import galore
import train
from bench.measure import (
    NEVER,
    WINDOW,
    block_matrices,
    clear,
    interleaved,
    made_in,
    matmul_rate,
    named,
    nothing_attached,
    on_meta,
    rank_of,
    run_config,
    sizes,
    state_bytes,
    timed,
)
from bench.optimizers import AUTHORS, BASELINE, has_bases
from bench.others import galore_torch, galore_torch_adamw, transformers_llama
from configurator import method_of
from model import SIZES
from plumbing.build import build_model

TRAINERS = {  # name -> train.py's flags if the method is ours
    BASELINE: None,
    'AdamW': ['--method=adamw'],
    'GaLore': ['--method=galore'],
    'GaLore, per_layer': ['--method=galore', '--per_layer=True'],
    'GaLore, drop-in': ['--method=galore'],  # in a loop that attaches nothing
    AUTHORS: None,
    'transformers, torch AdamW, fused': None,
}


def trainer(name, size, blocks, *flags):
    """-> model, optimizer, a function that takes one training step on (x, y)."""
    run = run_config(size, blocks, *(TRAINERS[name] or []), *flags)
    if name.startswith('transformers'):
        model = transformers_llama(size, blocks)
        forward = lambda x, y, divisor: model(input_ids=x, labels=x).loss  # noqa: E731, it shifts and divides itself
    else:
        model = forward = build_model(run, '', SIZES[size]['vocab_size'], torch.float32, 'cpu')
    if TRAINERS[name]:
        with nothing_attached('drop-in' in name):
            optimizer = method_of(run).setup(model, run)
    elif name == AUTHORS:
        projected = block_matrices(model)
        chosen = set(projected)
        optimizer = galore_torch_adamw(projected, [p for p in model.parameters() if p not in chosen], run.rank)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(x, y):
        train.training_step(forward, optimizer, [(x, y)], 1e-3, 'cpu')
        optimizer.zero_grad()  # ours has dropped its gradients already

    return model, optimizer, step


def kept_bytes(name, size, blocks):
    """Bytes of weights and states, before anything is built; an upper bound for GaLore, with square bases."""
    model = on_meta(size, blocks)
    n, projected = model.n_params(), block_matrices(model)
    if 'AdamW' in name:
        return 12 * n
    small = sum(min(p.shape) ** 2 + 2 * rank_of(size) * max(p.shape) for p in projected)
    return 4 * (n + 2 * (n - sum(p.numel() for p in projected)) + small)


def groups(names, size, blocks, limit):
    """The methods in groups that fit into `limit` bytes, the baseline in each."""
    baseline = kept_bytes(BASELINE, size, blocks)
    free = limit - baseline - baseline / 3 - 3e9  # less the baseline, all gradients and the activations
    found, held = [[BASELINE]], 0
    for name in names[1:]:
        held += kept_bytes(name, size, blocks)
        if held > free and len(found[-1]) > 1:
            found.append([BASELINE])
            held = kept_bytes(name, size, blocks)
        found[-1].append(name)
    return found


def refresh_seconds(size, x, y):
    """Seconds to refresh the bases of one block on its own gradients: by our subspace iteration, by galore-torch's
    SVD."""
    rank, ours, svd = rank_of(size), 0.0, {}
    model, _, step = trainer(BASELINE, size, 1)
    step(x, y)
    model(x, y).backward()
    matrices = block_matrices(model)
    for p in matrices:
        G = galore.short_side_first(p.grad)
        again = functools.partial(galore.orthonormal_basis, G, rank, previous=galore.orthonormal_basis(G, rank))
        ours += interleaved({'': again}, 3)['']
        if galore_torch() and p.shape not in svd:  # one per shape, since it takes long
            projector = galore_torch().galore_projector.GaLoreProjector(rank)
            side = 'right' if p.shape[0] >= p.shape[1] else 'left'
            svd[p.shape] = timed(functools.partial(projector.get_orthogonal_matrix, p.grad, rank, side))
            print(f'training: {size}: the SVD of a {tuple(p.shape)} gradient took {svd[p.shape]:.2f} s', flush=True)
    return ours, sum(svd.get(p.shape, 0) for p in matrices)


def measure_training(config):
    rows, T = [], config.amortised_over
    names = [name for name in TRAINERS if name != AUTHORS or galore_torch()]
    if not importlib.util.find_spec('transformers'):
        print('transformers is not installed: its row is left out', flush=True)
        names.pop()
    for size, blocks in sizes(config.training_sizes):
        tokens = torch.randint(SIZES[size]['vocab_size'], (config.batch_size, WINDOW + 1))
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        flops = on_meta(size, blocks).flops_per_token(WINDOW)
        ours, theirs = (blocks * taken for taken in refresh_seconds(size, x[:2], y[:2]))
        found = {}
        for group in groups(names, size, blocks, config.memory_gb * 1e9):
            print(f'training: {named(size, blocks)}: {"; ".join(group)}', flush=True)
            methods, made, kept = {}, {}, {}
            for name in group:
                model, optimizer, step = trainer(name, size, blocks, f'--update_proj_gap={NEVER}', '--stagger=False')
                methods[name] = functools.partial(step, x, y)
                step(x[:1], y[:1])  # makes states and bases
                made[name] = made_in(methods[name])
                kept[name] = sum(p.nbytes for p in model.parameters()) + state_bytes(optimizer)
            plain = interleaved(methods, config.rounds)
            del methods, model, optimizer, step
            clear()
            for name in group:
                refresh = theirs if name == AUTHORS else ours if has_bases(name) else 0.0
                mean = plain[name] + refresh / T
                stall = (plain[name] + refresh) / mean if name == AUTHORS else None
                found[name] = plain[name], refresh / T, mean, mean / plain[BASELINE], made[name], kept[name], stall
        authors = found[AUTHORS][3] if AUTHORS in found else math.nan  # over its group's baseline, as all ratios
        for name, (plain, refresh, mean, ratio, made, kept, stall) in found.items():
            speed = x.numel() / mean
            row = [named(size, blocks), name, 1000 * plain, 1000 * refresh, 1000 * mean, round(speed)]
            row += [ratio, ratio / authors, made / 1e6, kept / 1e6]
            rows.append([*row, f'{100 * flops * speed / matmul_rate():.0f} %', stall])
    return rows


def measure_stall(config):
    """Time each step of whole refresh periods. As many layers refresh in a step as in the whole model at T, so with few
    blocks the period is short."""
    rows = []
    for size, blocks in sizes(config.stall_sizes):
        T = max(round(config.amortised_over * blocks / SIZES[size]['n_layer']), 1)
        model, optimizer, step = trainer('GaLore', size, blocks, f'--update_proj_gap={T}')
        tokens = torch.randint(SIZES[size]['vocab_size'], (config.batch_size, WINDOW))
        step(tokens[:1], tokens[:1])  # makes the bases; after it, steps t and t + T refresh the same layers
        times = []
        for period in range(config.periods):
            print(f'stall: {size}: period {period + 1} of {config.periods}, {T} steps', flush=True)
            times.append([timed(functools.partial(step, tokens, tokens)) for _ in range(T)])
        best = [min(same) for same in zip(*times)]
        mean, slowest = statistics.mean(best), max(best)
        rows.append([named(size, blocks), T, f'{7 * blocks / T:.2f}', 1000 * mean, 1000 * slowest])
        rows[-1].append(slowest / mean)
        del model, optimizer, step
        clear()
    return rows


PARTS = {
    'training': (
        measure_training,
        'Whole training steps',
        'Forward, backward and update on {batch_size} x 256 random tokens, fp32, vocabulary 32,000: a step without a '
        'refresh, and its share of a refresh at T {amortised_over}, timed on gradients of the model. MB made in a '
        "step: gradients, activations and temporaries. Matmul: FLOP/s, as a share of the rate above, if AdamW's "
        "forward and backward are counted (GaLore's backward needs fewer). Ratios are taken within groups of models "
        'that fit {memory_gb} GB together, each with the first row in it.',
        ['model', 'method', 'ms', 'ms of refreshes', 'ms amortised', 'tokens/s', f'over {BASELINE}',
         'over galore-torch', 'MB made in a step', 'MB of weights and states', 'matmul', 'slowest step over mean'],
    ),
    'stall': (
        measure_stall,
        'The slowest step of a training run',
        'Whole steps of GaLore with layers that take turns to refresh, as many per step as in the whole model at T '
        '{amortised_over}. In a model of few blocks a step is short, so a refresh stands out more than in the whole '
        'model. Each step of a period is timed {periods} times, and the fastest time counts.',
        ['model', 'steps in a period', 'refreshes a step', 'ms, mean', 'ms, slowest', 'slowest over mean'],
    ),
}  # fmt: skip
