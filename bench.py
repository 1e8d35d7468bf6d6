"""
What every method costs and keeps, measured side by side in one run: tables in results/bench.md, a picture beside them.

    python bench.py                                          # all of it, about 25 minutes on two CPU cores
    python bench.py --only=training --training_sizes=60m:2   # one part, printed; files are written when all is measured
    python bench.py --only=refresh --refresh_sizes=350m:2

Methods take turns, one step each, and a number is the median over the rounds: what slows the machine for a while slows
all of them, so the ratios stand. Beside ours are torch's AdamW, bitsandbytes, transformers and, where it is installed,
the authors' own package (pip install --no-deps galore-torch).
"""

import functools
import importlib.util
import itertools
import math
import os
import shlex
import statistics
import sys
import time

import torch

import adam
import bench_loqt
import configurator
import galore
import train
from batches import Tokens
from build import ROOT, build_model, data_folder
from measure import (
    NEVER,
    WINDOW,
    block_matrices,
    clear,
    interleaved,
    keep_freed_memory,
    made_in,
    matmul_rate,
    named,
    on_meta,
    rank_of,
    run_config,
    sizes,
    state_bytes,
    state_tensors,
    table,
    timed,
    unhook,
)
from memory.trace import trace_step
from model import SIZES, ModelConfig

# ---- config ----------------------------------------------------------------------------------------------------------
only = (
    'all'  # 'all' | 'optimizers' | 'training' | 'stall' | 'states' | 'refresh' | 'memory' | 'merge' | 'nf4' | 'peaks'
)
out = 'results/bench.md'  # file for the tables when all is measured, with the picture beside it; '': none
amortised_over = 200  # T: steps between two refreshes of a basis, over which the cost of one is spread

# Sizes are names of model.SIZES with the number of blocks to take, as in 130m:12; without a number it is all of them.
# optimizers: steps on given gradients, without a model
optimizer_sizes = '60m:1 130m:1 350m:1 1b:1'  # whose blocks' matrices
repeats = 15  # timed steps of each method
seconds = 3.0  # a method that has used so many sits out the later rounds; each has 3 steps and one refresh at least

# training, stall: whole training steps on random tokens
training_sizes = '130m:12 1b:6'  # models for whole steps
rounds = 3  # timed steps of each method
batch_size = 8  # windows of 256 tokens in a step
memory_gb = 20  # methods that take more than this together are measured in groups, each with torch's AdamW in it
stall_sizes = '130m:1 1b:1'  # models for the stall: few blocks, since whole periods of steps are timed
periods = 2  # periods of refreshes to time; of each step in them the faster time counts

# states: bytes of whole models, nothing is timed
state_sizes = '60m 130m 350m 1b'  # models whose states at two bytes a number are counted
claim_sizes = '1b 7b'  # models for the paper's percentages: 8-bit states, all memory of training
real_sizes = '60m 130m 350m 1b'  # those that take real steps on real tensors; others are traced on fake ones

# refresh, memory: the gradients of a real run
refresh_sizes = '350m:2 1b:1'  # models that give the gradients
rank = 0  # of the bases; 0: the paper's for the size
steps = 120  # training steps at most; it ends as soon as every shape of gradient has its refreshes
refreshes = 12  # refreshes to compare with the SVD, for each shape
minutes = 2.0  # for each model; a shape that has no two refreshes by then gets them
update_proj_gap = 50  # T
memory_sizes = '350m:2'  # models whose gradients in memory are counted

# merge: LoQT
merge_sizes = '130m 1b'  # whose layers merge
# ---- end of config ---------------------------------------------------------------------------------------------------

BASELINE, AUTHORS = 'torch AdamW, fused', 'galore-torch 1.0'  # what the others are divided by


# ---- measuring -------------------------------------------------------------------------------------------------------


def problems(config):
    """Sizes that are none, before anything is measured."""
    found = []
    for key, text in vars(config).items():
        for word in text.split() if key.endswith('_sizes') else ():
            name, colon, blocks = word.partition(':')
            whole = key in ('state_sizes', 'claim_sizes', 'real_sizes', 'merge_sizes')
            if name not in SIZES or (colon and (whole or not blocks.isdigit() or blocks == '0')):
                shape = 'a NAME' if whole else 'NAME or NAME:BLOCKS, with a NAME'
                found.append(f'{key}: {word} is not {shape} of {" ".join(SIZES)}')
    return found


# ---- the authors' package --------------------------------------------------------------------------------------------


@functools.cache
def galore_torch():
    """The package, or None: no requirement of ours, since nothing but these tables needs it."""
    try:
        import galore_torch.galore_projector
    except ImportError as error:  # it also imports helpers of transformers, which may move
        print(f'galore-torch: {error}; its rows are left out, pip install --no-deps galore-torch', flush=True)
        return None
    return galore_torch


def galore_torch_adamw(projected, others, rank):
    """Its AdamW, with bases of the layout that its SVD leaves, slices of square matrices: steps between two refreshes
    cost the same with any basis, and the SVDs of the first step, minutes at 1b, are spared."""
    options = dict(rank=rank, update_proj_gap=NEVER, scale=0.25, proj_type='std')
    groups = [{'params': projected, **options}] + [{'params': others}] * bool(others)
    optimizer = galore_torch().GaLoreAdamW(groups, lr=1e-3, no_deprecation_warning=True)
    square = {m: torch.linalg.qr(torch.randn(m, m))[0] for m in {min(p.shape) for p in projected}}
    for p in projected:
        Q, tall = square[min(p.shape)].clone(), p.shape[0] >= p.shape[1]
        projector = galore_torch().galore_projector.GaLoreProjector(**options)
        projector.ortho_matrix = Q[:rank] if tall else Q[:, :rank]
        optimizer.state[p].update(step=1, projector=projector)
    return optimizer


# ---- optimizers ------------------------------------------------------------------------------------------------------


def bitsandbytes_adamw(parameters):
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3)


def galore_adamw(parameters, rank, **options):
    return galore.GaLoreAdamW(parameters, lr=1e-3, rank=rank, update_proj_gap=NEVER, stagger=False, **options)


OPTIMIZERS = {  # name -> (list of matrices, rank) -> optimizer
    BASELINE: lambda matrices, rank: torch.optim.AdamW(matrices, lr=1e-3, fused=True),
    'torch AdamW': lambda matrices, rank: torch.optim.AdamW(matrices, lr=1e-3),
    'bitsandbytes AdamW8bit': lambda matrices, rank: bitsandbytes_adamw(matrices),
    AUTHORS: lambda matrices, rank: galore_torch_adamw(matrices, [], rank),
    'AdamW': lambda matrices, rank: adam.AdamW(matrices, lr=1e-3),
    'AdamW, 8-bit states': lambda matrices, rank: adam.AdamW(matrices, lr=1e-3, state_bits=8),
    'GaLore': galore_adamw,
    'GaLore, 8-bit states': functools.partial(galore_adamw, state_bits=8),
    'GaLore, 8-bit states, 4-bit basis': functools.partial(galore_adamw, state_bits=8, basis_bits=4),
    'GaLore, Fira': functools.partial(galore_adamw, residual='fira'),
    'APOLLO': lambda matrices, rank: galore.ApolloAdamW(matrices, lr=1e-3, rank=rank),
}


def has_bases(name):
    return name.startswith('GaLore') or name == AUTHORS


def set_due(optimizer, parameters):
    """The next step gives these parameters new bases."""
    for p in parameters:
        state = optimizer.state[p]
        if 'projector' in state:
            state['projector'].ortho_matrix = None
        else:
            state['next'] = state['step']


def given_steps(name, gradients, rank):
    """-> optimizer, and functions: a step of it on these gradients, one with all bases due, one with the last alone."""
    matrices = [torch.nn.Parameter(0.02 * torch.randn_like(G)) for G in gradients]
    optimizer = OPTIMIZERS[name](matrices, rank)

    def step(due=()):
        set_due(optimizer, due)
        for p, G in zip(matrices, gradients):
            p.grad = G
        optimizer.step()

    return optimizer, step, functools.partial(step, matrices), functools.partial(step, matrices[-1:])


def measure_optimizers(config):
    rows, T = [], config.amortised_over
    names = [name for name in OPTIMIZERS if name != AUTHORS or galore_torch()]
    for size, blocks in sizes(config.optimizer_sizes):
        wide, narrow, depth = (SIZES[size][key] for key in ('n_inner', 'n_embd', 'n_layer'))
        shapes = [*[(narrow, narrow)] * 4, (wide, narrow), (wide, narrow), (narrow, wide)]
        gradients = [0.01 * torch.randn(shape) for shape in shapes * blocks]
        plain, all_due, last_due, made, kept = {}, {}, {}, {}, {}
        for name in names:
            optimizer, plain[name], all_due[name], last_due[name] = given_steps(name, gradients, rank_of(size))
            plain[name]()  # makes states and bases
            plain[name]()
            made[name], kept[name] = made_in(plain[name]), state_bytes(optimizer)
            unhook(optimizer)
        plain = interleaved(plain, config.repeats, config.seconds)
        print(f'optimizers: {size}: {BASELINE} takes {1000 * plain[BASELINE]:.1f} ms; now refreshes', flush=True)
        all_due = interleaved(
            {name: step for name, step in all_due.items() if has_bases(name)}, config.repeats, config.seconds, least=1
        )
        last_due = interleaved(
            {name: step for name, step in last_due.items() if has_bases(name) and name != AUTHORS},
            config.repeats,
            config.seconds,
        )
        refresh = {name: max(all_due.get(name, 0) - plain[name], 0) for name in names}
        mean = {name: plain[name] + refresh[name] / T for name in names}
        for name in names:
            # The stall is a whole model's, `copies` of ours: galore-torch refreshes all layers at once, ours in turns.
            copies, at_once = depth / blocks, math.ceil(7 * depth / T)
            extra = copies * refresh[name]
            if name in last_due:
                extra = at_once * max(last_due[name] - plain[name], 0)
            row = [size, name, 1000 * plain[name], 1000 * refresh[name] if name in all_due else None]
            row += [1000 * mean[name], mean[name] / mean[BASELINE], mean[name] / mean.get(AUTHORS, math.nan)]
            stall = (copies * plain[name] + extra) / (copies * mean[name]) if name in all_due else None
            rows.append([*row, made[name] / 1e6, kept[name] / 1e6, stall])
        del optimizer
        clear()
    return rows


# ---- training --------------------------------------------------------------------------------------------------------

TRAINERS = {  # name -> train.py's flags where the method is ours
    BASELINE: None,
    'AdamW': ['--method=adamw'],
    'GaLore': ['--method=galore'],
    'GaLore, per_layer': ['--method=galore', '--per_layer=True'],
    'GaLore, drop-in': ['--method=galore', '--compile=True'],  # with this, setup attaches nothing; nothing is compiled
    AUTHORS: None,
    'transformers, torch AdamW, fused': None,
}


def transformers_llama(size, blocks):
    from transformers import LlamaConfig, LlamaForCausalLM

    c = ModelConfig(**SIZES[size] | {'n_layer': blocks})
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=c.n_inner,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head,
            max_position_embeddings=WINDOW,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation='sdpa',
        )
    )


def trainer(name, size, blocks, *flags):
    """-> model, optimizer, a function that takes one training step on (x, y)."""
    run = run_config(size, blocks, *(TRAINERS[name] or []), *flags)
    if name.startswith('transformers'):
        model = transformers_llama(size, blocks)
        forward = lambda x, y: model(input_ids=x, labels=x).loss  # noqa: E731, it shifts the labels itself
    else:
        model = forward = build_model(run, '', SIZES[size]['vocab_size'], torch.float32, 'cpu')
    if TRAINERS[name]:
        optimizer = train.METHODS[run.method].setup(model, run)
    elif name == AUTHORS:
        projected = block_matrices(model)
        chosen = set(projected)
        optimizer = galore_torch_adamw(projected, [p for p in model.parameters() if p not in chosen], run.rank)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(x, y):
        train.training_step(forward, optimizer, [(x, y)], 1e-3, 'cpu')
        optimizer.zero_grad()  # ours has none left

    return model, optimizer, step


def kept_bytes(name, size, blocks):
    """Weights and states before anything is built; of GaLore's at most, with square bases."""
    model = on_meta(size, blocks)
    n, projected = model.n_params(), block_matrices(model)
    if 'AdamW' in name:
        return 12 * n
    small = sum(min(p.shape) ** 2 + 2 * rank_of(size) * max(p.shape) for p in projected)
    return 4 * (n + 2 * (n - sum(p.numel() for p in projected)) + small)


def groups(names, size, blocks, limit):
    """The methods in groups that fit into `limit` bytes, the baseline in each."""
    baseline = kept_bytes(BASELINE, size, blocks)
    room = limit - baseline - baseline / 3 - 3e9  # all gradients; activations
    found, held = [[BASELINE]], 0
    for name in names[1:]:
        held += kept_bytes(name, size, blocks)
        if held > room and len(found[-1]) > 1:
            found.append([BASELINE])
            held = kept_bytes(name, size, blocks)
        found[-1].append(name)
    return found


def refresh_seconds(size, x, y):
    """Seconds to refresh the bases of one block, on its own gradients: by one step of our iteration, by their SVD."""
    rank, ours, svd = rank_of(size), 0.0, {}
    model, _, step = trainer(BASELINE, size, 1)
    step(x, y)
    model(x, y).backward()
    matrices = block_matrices(model)
    for p in matrices:
        G = galore.wide(p.grad)
        again = functools.partial(galore.orthonormal_basis, G, rank, previous=galore.orthonormal_basis(G, rank))
        ours += interleaved({'': again}, 3)['']
        if galore_torch() and p.shape not in svd:  # one of each shape, since it takes long
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
            methods, made, kept, used = {}, {}, {}, []
            for name in group:
                model, optimizer, step = trainer(name, size, blocks, f'--update_proj_gap={NEVER}', '--stagger=False')
                methods[name] = functools.partial(step, x, y)
                step(x[:1], y[:1])  # makes states and bases
                made[name] = made_in(methods[name])
                kept[name] = sum(p.nbytes for p in model.parameters()) + state_bytes(optimizer)
                used.append(optimizer)
            plain = interleaved(methods, config.rounds)
            for optimizer in used:
                unhook(optimizer)
            del methods, used, model, optimizer, step
            clear()
            for name in group:
                refresh = theirs if name == AUTHORS else ours if has_bases(name) else 0.0
                mean = plain[name] + refresh / T
                stall = (plain[name] + refresh) / mean if name == AUTHORS else None
                found[name] = plain[name], refresh / T, mean, mean / plain[BASELINE], made[name], kept[name], stall
        authors = found[AUTHORS][3] if AUTHORS in found else math.nan  # over the baseline, as all ratios, of its group
        for name, (plain, refresh, mean, ratio, made, kept, stall) in found.items():
            speed = x.numel() / mean
            row = [named(size, blocks), name, 1000 * plain, 1000 * refresh, 1000 * mean, round(speed)]
            row += [ratio, ratio / authors, made / 1e6, kept / 1e6]
            rows.append([*row, f'{100 * flops * speed / matmul_rate():.0f} %', stall])
    return rows


def measure_stall(config):
    """Layers take turns to refresh, as many a step as in the whole model at T: with few blocks the period is short."""
    rows = []
    for size, blocks in sizes(config.stall_sizes):
        T = max(round(config.amortised_over * blocks / SIZES[size]['n_layer']), 1)
        model, optimizer, step = trainer('GaLore', size, blocks, f'--update_proj_gap={T}')
        tokens = torch.randint(SIZES[size]['vocab_size'], (config.batch_size, WINDOW))
        step(tokens[:1], tokens[:1])  # makes the bases; from now on step t is like step t + T
        times = []
        for period in range(config.periods):
            print(f'stall: {size}: period {period + 1} of {config.periods}, {T} steps', flush=True)
            times.append([timed(functools.partial(step, tokens, tokens)) for _ in range(T)])
        best = [min(same) for same in zip(*times)]
        mean, slowest = statistics.mean(best), max(best)
        rows.append([named(size, blocks), T, f'{7 * blocks / T:.2f}', 1000 * mean, 1000 * slowest])
        rows[-1].append(slowest / mean)
        unhook(optimizer)
        del model, optimizer, step
        clear()
    return rows


# ---- states ----------------------------------------------------------------------------------------------------------

SMALL = ['--state_bits=8', '--basis_bits=4']


def real_states(size, *flags):
    """-> the states of a whole bf16 model that GaLore has trained for two steps, as (name, tensor)."""
    run = run_config(size, SIZES[size]['n_layer'], '--dtype=bfloat16', '--per_layer=True', *flags)
    model = build_model(run, '', SIZES[size]['vocab_size'], torch.bfloat16, 'cpu')
    optimizer = galore.setup(model, run)
    for _ in range(2):
        tokens = torch.randint(model.config.vocab_size, (1, 32))
        train.training_step(model, optimizer, [(tokens, tokens)], 1e-3, 'cpu')
    kept = list(state_tensors(optimizer))
    unhook(optimizer)
    return kept


def planned(size, *flags, dtype='bfloat16'):
    """The plan of a whole model's training: 2,048 tokens a step, blocks computed again in backward."""
    flags = [f'--dtype={dtype}', '--checkpointing=True', '--batch_size=1', '--block_size=2048', *flags]
    run = run_config(size, SIZES[size]['n_layer'], *flags)
    model_config = ModelConfig(**SIZES[size] | {'block_size': run.block_size})
    dtype, setup = getattr(torch, dtype), train.METHODS[run.method].setup
    return trace_step(model_config, dtype, run, setup, train.training_step, dtype)


def measure_states(config):
    rows, real = [], config.real_sizes.split()

    def compare(what, size, how, ours, theirs, claim=''):
        rows.append([what, size, how, ours, theirs, f'{100 * (1 - ours / theirs):.1f} %', claim])
        print(f'states: {what}, {size}, {how}: {ours:,} bytes', flush=True)
        clear()

    for size in config.state_sizes.split():
        if size in real:
            numbers = sum(t.numel() for name, t in real_states(size) if name in ('M', 'V', 'P'))
        else:
            numbers = planned(size, dtype='float32').states // 4  # all of them are fp32 then
        n = on_meta(size, SIZES[size]['n_layer']).n_params()
        how = 'real' if size in real else 'fake'
        compare('states of GaLore at 2 bytes a number', size, how, 2 * numbers, 4 * n)
    for size in config.claim_sizes.split():
        n = on_meta(size, SIZES[size]['n_layer']).n_params()
        plan = planned(size, *SMALL, '--per_layer=True')
        ours = sum(t.nbytes for _, t in real_states(size, *SMALL)) if size in real else plan.states
        how = 'real' if size in real else 'fake'
        compare('states of GaLore in 8 bits, bases in 4', size, how, ours, 4 * n, '82.5 %' if size == '7b' else '')
        adamw = planned(size, '--method=adamw')
        adamw = adamw.total - adamw.states + 4 * n  # its moments at two bytes each, as the paper counts
        compare('all memory of training', size, 'fake', plan.total, adamw, '63.3 %' if size == '7b' else '')
    return rows


# ---- real gradients --------------------------------------------------------------------------------------------------


def real_run(config, size, blocks, *flags):
    """-> a function of t that takes step t of a run on pystdlib, and its optimizer."""
    base = ['--batch_size=4', f'--update_proj_gap={config.update_proj_gap}', f'--max_iters={config.steps}']
    base += ['--learning_rate=5e-3', '--warmup_iters=20', f'--rank={config.rank or rank_of(size)}']
    run = run_config(size, blocks, *base, *flags)
    folder = data_folder(run)
    tokens = Tokens(folder, 'train', run.block_size)
    model = build_model(run, folder, tokens.vocab_size, torch.float32, 'cpu')
    optimizer = train.METHODS[run.method].setup(model, run)

    def step(t):
        n = run.gradient_accumulation_steps
        batches = [tokens.batch(run.seed, t * n + i, run.batch_size)[:2] for i in range(n)]
        return train.training_step(model, optimizer, batches, train.learning_rate_at(t, run), 'cpu').item()

    return step, model, optimizer


def measure_refresh(config):
    """Each new P of a run against the SVD's of the same gradient, and both timed."""
    rows = []
    for size, blocks in sizes(config.refresh_sizes):
        # (m, n) -> list of (energy kept by the new P, by the old one, by the SVD's, seconds, seconds of the SVD)
        seen = {tuple(galore.wide(p).shape): [] for p in block_matrices(on_meta(size, 1))}
        ours = galore.orthonormal_basis

        def measured(G, rank, refresh, previous=None, seen=seen, ours=ours):
            if previous is None or len(seen[tuple(G.shape)]) >= config.refreshes:
                return ours(G, rank, refresh, previous)
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
        unhook(optimizer)
        del model, optimizer, step
        clear()
    return rows


def watch(model, optimizer):
    """-> [most bytes of full gradients, of projected ones], kept up whenever a gradient is complete, before and after
    the optimizer has had it."""
    kinds, most = (list(model.parameters()), list(getattr(optimizer, 'R', {}).values())), [0, 0]

    def count():
        for i, tensors in enumerate(kinds):
            most[i] = max(most[i], sum(t.grad.nbytes for t in tensors if t.grad is not None))

    def counted(ready, p):
        count()
        ready(p)
        count()

    for p in kinds[0]:
        p._post_accumulate_grad_hooks.clear()
        p.register_post_accumulate_grad_hook(functools.partial(counted, optimizer.gradient_ready))
    if kinds[1]:
        optimizer.R_ready = functools.partial(counted, optimizer.R_ready)
    return most


def measure_memory(config):
    rows, micro = [], '--gradient_accumulation_steps=4'
    modes = {
        'AdamW': ['--method=adamw'],
        'AdamW, per_layer': ['--method=adamw', '--per_layer=True'],
        'GaLore, drop-in': ['--compile=True'],
        'GaLore': [],
        'GaLore, per_layer': ['--per_layer=True'],
        'AdamW, 4 micro-batches': ['--method=adamw', micro],
        'GaLore, 4 micro-batches': [micro],
        'GaLore, per_layer, 4 micro-batches': ['--per_layer=True', micro],
    }
    for (size, blocks), (name, flags) in itertools.product(sizes(config.memory_sizes), modes.items()):
        step, model, optimizer = real_run(config, size, blocks, '--batch_size=1', *flags)
        step(0)  # every P is made here, from one layer's gradient at a time
        most = watch(model, optimizer)
        made = made_in(functools.partial(step, 1))
        largest = max(p.nbytes for p in model.parameters())
        row = [named(size, blocks), name, most[0] / 1e6, most[0] / largest, most[1] / 1e6, made / 1e6]
        rows.append(row)
        print(f'memory: {size}: {name}: {most[0] / 1e6:.1f} MB of full gradients', flush=True)
        unhook(optimizer)
        del model, optimizer, step
        clear()
    return rows


# ---- tables and picture ----------------------------------------------------------------------------------------------

# name -> function that gives the rows, heading, what is measured (keys of the config in braces), head of the table
PARTS = {
    'optimizers': (
        measure_optimizers,
        'The optimizer alone, on given gradients',
        "The blocks' matrices alone ({optimizer_sizes}), fp32, the paper's ranks: a step without a refresh, a refresh "
        'of all bases, a step with its share of one at T {amortised_over}. The last column is of a model with all its '
        'blocks: galore-torch refreshes all of them in one step, ours take turns. galore-torch keeps its bases as '
        'slices of square matrices, which stay whole.',
        ['size', 'optimizer', 'ms', 'ms a refresh', 'ms amortised', f'over {BASELINE}', 'over galore-torch',
         'MB made in a step', 'MB of states', 'slowest step over mean'],
    ),
    'training': (
        measure_training,
        'Whole training steps',
        'Forward, backward and update on {batch_size} x 256 random tokens, fp32, vocabulary 32,000: a step without a '
        'refresh, and the share of one at T {amortised_over}, timed on gradients of the model. MB made in a step: '
        'gradients, activations and temporaries. Matmul: the share of the rate above that is reached by the FLOPs of '
        "forward and backward that AdamW needs (GaLore's backward needs fewer). Ratios are taken within groups of "
        'models that fit {memory_gb} GB together, each with the first row in it.',
        ['model', 'method', 'ms', 'ms of refreshes', 'ms amortised', 'tokens/s', f'over {BASELINE}',
         'over galore-torch', 'MB made in a step', 'MB of weights and states', 'matmul', 'slowest step over mean'],
    ),
    'stall': (
        measure_stall,
        'The slowest step of a training run',
        'Whole steps of GaLore with layers that refresh in turns, as many a step as in the whole model at T '
        '{amortised_over}; in a model of few blocks a step is short, and a refresh stands out more than in the whole '
        'one. Each step of a period is timed {periods} times, and the least time counts.',
        ['model', 'steps in a period', 'refreshes a step', 'ms, mean', 'ms, slowest', 'slowest over mean'],
    ),
    'states': (
        measure_states,
        'Bytes',
        'Against AdamW in bf16, whose two moments take 4 bytes a parameter. All memory of training is the planned peak '
        'at 1 x 2,048 tokens, bf16, blocks computed again in backward: ours with per_layer, 8-bit states and 4-bit '
        "bases, AdamW's with all gradients, 2 bytes a parameter, and the moments above. Counted: weights, gradients, "
        'states, activations, temporaries; what is not, memest.py says. Real: after two steps; fake: planned.',
        ['what', 'model', 'tensors', 'bytes', "AdamW's", 'below it', "the paper's claim"],
    ),
    'refresh': (
        measure_refresh,
        'A new P on real gradients',
        'Training on pystdlib, T {update_proj_gap}: how much of the gradient energy that the SVD would keep a new P '
        'keeps, and the old one would have; both are timed on the same gradient.',
        ['model', 'gradient', 'rank', 'refreshes', "energy kept, of the SVD's: mean", 'least', 'by the old P', 'ms',
         'ms of the SVD', 'time'],
    ),
    'memory': (
        measure_memory,
        'Gradients alive at once',
        'Training on pystdlib, fp32, batch 1 x 256, a step without a refresh: the most there are whenever one of them '
        'is complete.',
        ['model', 'method', 'most MB of full gradients', 'in largest matrices', 'MB of projected ones',
         'MB made in a step'],
    ),
    **bench_loqt.PARTS,
}  # fmt: skip


def draw(rows, png):
    """Two panels: what a training step and an optimizer's step take, over torch's fused AdamW."""
    try:
        import matplotlib
    except ImportError:
        print('no picture: matplotlib is not installed (pip install -r requirements-extra.txt)')
        return False
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(14, 6), layout='constrained')
    for axes, part, column, title in zip(
        panels, ('training', 'optimizers'), (6, 5), ('whole training step', "the optimizer's step alone, log scale")
    ):
        names = list(dict.fromkeys(row[1] for row in rows[part]))
        models = list(dict.fromkeys(row[0] for row in rows[part]))
        for i, model in enumerate(models):
            ratios = {row[1]: row[column] for row in rows[part] if row[0] == model}
            where = [names.index(name) + 0.8 * ((i + 0.5) / len(models) - 0.5) for name in ratios]
            bars = axes.barh(where, list(ratios.values()), 0.75 / len(models), label=model)
            axes.bar_label(bars, fmt='%.2f', fontsize=7, padding=2)
        axes.margins(x=0.1)  # for the labels
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.axvline(1, color='black', lw=0.8)
        axes.set(title=title, xlabel=f'time over {BASELINE}, refreshes included')
        axes.legend(loc='lower right')
    panels[1].set_xscale('log')
    figure.savefig(png, dpi=120)
    plt.close(figure)
    return True


def main(config):
    keep_freed_memory()
    torch.manual_seed(0)
    lines = [
        '# Measured side by side',
        '',
        f'Made by `python {shlex.join(["bench.py", *sys.argv[1:]])}` with torch {torch.__version__} on '
        f'{torch.get_num_threads()} CPU threads that multiply fp32 matrices at {matmul_rate() / 1e9:.0f} GFLOP/s. '
        'Methods take turns, times are medians. For all of them alike, glibc keeps freed memory (mallopt): otherwise '
        'the page faults of every large tensor are measured, too. MB made in a step are storages made in it and alive '
        'at once; '
        'weights and states that were there before do not count.',
        '',
    ]
    print(lines[2], flush=True)
    rows, write = {}, config.out and config.only == 'all'
    path = os.path.join(ROOT, config.out)
    if write:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    for name, (measure, heading, text, head) in PARTS.items():
        if config.only not in ('all', name):
            continue
        started = time.perf_counter()
        rows[name] = measure(config)
        part = [f'## {heading}', '', text.format(**vars(config)), '', *table(head, rows[name]), '']
        print('\n'.join(part), f'{name}: {(time.perf_counter() - started) / 60:.1f} minutes', sep='\n', flush=True)
        lines += part
        if write:  # after each part: what is measured is not lost
            with open(path, 'w') as f:
                f.write('\n'.join(lines))
    png = os.path.splitext(path)[0] + '.png'
    if write and draw(rows, png):
        with open(path, 'a') as f:
            f.write(f'\n![time over {BASELINE}]({os.path.basename(png)})\n')


if __name__ == '__main__':
    main(configurator.load_or_exit(__file__, sys.argv[1:], problems))
