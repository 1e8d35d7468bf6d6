"""The optimizers alone, on given gradients."""

import functools
import math
from types import SimpleNamespace

import torch

import adam
from bench.measure import NEVER, clear, interleaved, made_in, rank_of, sizes, state_bytes
from bench.others import bitsandbytes_adamw, galore_torch, galore_torch_adamw
from galore import GaLoreAdamW
from methods.apollo import ApolloAdamW
from methods.fira import FiraAdamW
from model import SIZES

BASELINE, AUTHORS = 'torch AdamW, fused', 'galore-torch 1.0'  # the others are divided by these


def galore_adamw(parameters, rank, kind=GaLoreAdamW, **options):
    return kind(parameters, lr=1e-3, rank=rank, update_proj_gap=NEVER, stagger=False, **options)


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
    'GaLore, Fira': functools.partial(galore_adamw, kind=FiraAdamW),
    'APOLLO': lambda matrices, rank: ApolloAdamW(matrices, lr=1e-3, rank=rank),
}


def has_bases(name):
    return name.startswith('GaLore') or name == AUTHORS


def set_due(optimizer, parameters):
    """Make the next step refresh the bases of these parameters."""
    for p in parameters:
        if 'projector' in optimizer.state[p]:  # galore-torch's
            optimizer.state[p]['projector'].ortho_matrix = None
        else:
            optimizer.make_due([SimpleNamespace(weight=p)])


def given_steps(name, gradients, rank):
    """-> optimizer, and three functions: a step on these gradients, one that refreshes all bases, one that refreshes
    only the last."""
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
            # The stall of a whole model, `copies` times these blocks: galore-torch refreshes all layers in one step,
            # ours take turns.
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


PARTS = {
    'optimizers': (
        measure_optimizers,
        'The optimizer alone, on given gradients',
        "The blocks' matrices alone ({optimizer_sizes}), fp32, the paper's ranks: a step without a refresh, a refresh "
        'of all bases, a step with its share of a refresh at T {amortised_over}. The last column is for a model with '
        'all its blocks: galore-torch refreshes all of them in one step, ours take turns. galore-torch keeps its bases '
        'as slices of square matrices, which stay in memory as a whole.',
        ['size', 'optimizer', 'ms', 'ms a refresh', 'ms amortised', f'over {BASELINE}', 'over galore-torch',
         'MB made in a step', 'MB of states', 'slowest step over mean'],
    ),
}  # fmt: skip
