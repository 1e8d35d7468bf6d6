"""
Our methods beside their authors' own packages: the same weights, batches and rates, both losses. Makes controls.md.

    pip install --no-deps galore-torch apollo-torch badam lomo-optim pytorch-optimizer
    python -m bench.runs.controls --data=sitepackages       # some 25 minutes of a CPU core

Where a method does not reach on the shelf what its paper says, this tells whether the fault is ours. A package that is
not installed is left out by name. Fira's authors have none: its row is pytorch-optimizer's.
"""

from bench import parser

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('--data', default='sitepackages', help='folder in data/, or a path (sitepackages)')
    asked.add_argument('--steps', type=int, default=200, choices=range(10, 10**6), metavar='N', help='of a run (200)')
    asked.add_argument('--only', default='', help='methods by their names, with semicolons (all)')
    args = asked.parse_args()

import contextlib
import importlib
import io
import math
import os
import sys

import torch

import configurator
import train
from adam import split_decay
from bench.measure import table
from bench.runs.shelf import SHAPE, TABLE_RATE
from data import batches
from galore import GaLoreAdamW
from methods.adalomo import AdaLomo
from methods.apollo import ApolloAdamW
from methods.badam import BAdamW
from methods.fira import FiraAdamW
from plumbing.build import ROOT, build_model

RANK, T, EVAL = 48, 50, 16  # of 192; steps between two bases; batches of a val loss
ALIKE = dict(rank=RANK, update_proj_gap=T)


def parts(model):
    """The blocks' matrices, and all the rest, which AdamW trains at the tables' rate."""
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]


def ours_low_rank(kind, **options):
    def make(model, rate):
        matrices, rest = parts(model)
        groups = [dict(params=matrices), dict(params=rest, rank=0, lr=TABLE_RATE)]
        return stepping(kind(groups, lr=rate, eps=1e-6, **options))

    return make


def theirs_low_rank(package, kind, **options):
    def make(model, rate):
        matrices, rest = parts(model)
        groups = [dict(params=matrices, update_proj_gap=T, **options), dict(params=rest, lr=TABLE_RATE)]
        return stepping(getattr(importlib.import_module(package), kind)(groups, lr=rate, eps=1e-6))

    return make


def stepping(optimizer):
    """A function of a loss and a share of all rates that takes one step."""
    rates = [group['lr'] for group in optimizer.param_groups]

    def step(loss, share):
        for group, rate in zip(optimizer.param_groups, rates):
            group['lr'] = rate * share
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def ours_badam(model, rate):
    number = {id(p): i for i, block in enumerate([model.embed_tokens, *model.layers]) for p in block.parameters()}
    groups = {i: [] for i in range(len(model.layers) + 2)}  # the last one: norm and head
    for p in model.parameters():
        groups[number.get(id(p), len(groups) - 1)].append(p)
    return stepping(BAdamW([dict(params=some, block=i) for i, some in groups.items()], lr=rate, block_steps=10))


def theirs_badam(model, rate):
    """From the last block on, as ours, whose first is the largest: norm and head."""
    badam, named = importlib.import_module('badam'), list(model.named_parameters())
    plain = torch.optim.AdamW([dict(params=[p for _, p in named])], lr=rate, weight_decay=0.0)
    how = dict(switch_block_every=10, switch_mode='ascending', start_block=len(model.layers) + 1, verbose=0)
    return stepping(badam.BlockOptimizer(plain, named, include_embedding=True, include_lm_head=True, **how))


def ours_adalomo(model, rate):
    return stepping(AdaLomo(split_decay(model.parameters()), lr=rate, per_layer=True))


def theirs_adalomo(model, rate):
    with here():
        optimizer = importlib.import_module('lomo_optim').AdaLomo(model, lr=rate, loss_scale=None)
    return lambda loss, share: optimizer.fused_backward(loss, rate * share)


@contextlib.contextmanager
def here():
    """`.cuda()` of a tensor is the tensor, where there is no card: a package asks without looking."""
    cuda = torch.Tensor.cuda
    torch.Tensor.cuda = cuda if torch.cuda.is_available() else lambda A: A
    try:
        yield
    finally:
        torch.Tensor.cuda = cuda


STD, SVD = dict(scale=0.25, proj_type='std'), dict(scale=0.25, refresh='svd', stagger=False)
RANDOM = dict(proj='random', proj_type='std')
galore_torch = theirs_low_rank('galore_torch', 'GaLoreAdamW', rank=RANK, **STD)
# Name: (rate, as on the shelf; ours; theirs; its package).
CONTROLS = {
    'GaLore': (1e-2, ours_low_rank(GaLoreAdamW, **ALIKE, **SVD), galore_torch, 'galore-torch'),
    'GaLore, P on the left of square matrices': (
        1e-2, ours_low_rank(GaLoreAdamW, **ALIKE, **SVD, proj_type='paper'), galore_torch, 'galore-torch'),
    'GaLore, P on the right of all': (
        1e-2, ours_low_rank(GaLoreAdamW, **ALIKE, **SVD, proj_type='right'), galore_torch, 'galore-torch'),
    'GaLore, our defaults: subspace iteration, in turns': (
        1e-2, ours_low_rank(GaLoreAdamW, **ALIKE, scale=0.25), galore_torch, 'galore-torch'),
    'Fira': (1e-2, ours_low_rank(FiraAdamW, **ALIKE, **SVD),
             theirs_low_rank('pytorch_optimizer', 'Fira', rank=RANK, scale=0.25, projection_type='std'),
             'pytorch-optimizer'),
    'APOLLO': (5e-3, ours_low_rank(ApolloAdamW, **ALIKE),
               theirs_low_rank('apollo_torch', 'APOLLOAdamW', rank=RANK, scale=1, scale_type='channel', **RANDOM),
               'apollo-torch'),
    'APOLLO-Mini': (2.5e-3, ours_low_rank(ApolloAdamW, rank=1, update_proj_gap=T, tensorwise=True, scale=128**0.5),
                    theirs_low_rank('apollo_torch', 'APOLLOAdamW', rank=1, scale=128, scale_type='tensor', **RANDOM),
                    'apollo-torch'),
    'BAdam': (4e-3, ours_badam, theirs_badam, 'badam'),
    'AdaLomo': (5e-2, ours_adalomo, theirs_adalomo, 'lomo-optim'),
}  # fmt: skip


def run(args, make, rate):
    """-> the val loss after the run."""
    words = [f'--dataset={args.data}', *SHAPE, '--dtype=float32', '--device=cpu']
    config = configurator.load(train.__file__, words)
    folder = args.data if os.path.isdir(args.data) else os.path.join(ROOT, 'data', args.data)
    text, held_out = (batches.load(folder, split, config.block_size) for split in ('train', 'val'))
    model = build_model(config, '', 4096, torch.float32, 'cpu', '')
    step = make(model, rate)
    for t in range(args.steps):
        warm, done = (t + 1) / max(args.steps // 10, 1), t / args.steps
        x, y, *_ = text.batch(1, t, config.batch_size)
        step(model(x, y), min(warm, 0.1 + 0.45 * (1 + math.cos(math.pi * done))))
    with torch.no_grad():
        some = [model(*held_out.batch(1, t, config.batch_size)[:2]).item() for t in range(EVAL)]
    return sum(some) / EVAL


def main(args):
    names = [name.strip() for name in args.only.split(';')] if args.only else list(CONTROLS)
    if wrong := [name for name in names if name not in CONTROLS]:
        sys.exit(f'error: --only={args.only}: {wrong[0]!r} is none of: {"; ".join(CONTROLS)}')
    rows, made = [], {}
    for name in names:
        rate, ours, theirs, package = CONTROLS[name]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = made[theirs] = made.get(theirs) or run(args, theirs, rate)
        except ModuleNotFoundError as error:
            print(f'note: {name} is left out: {error}: pip install --no-deps {package}', file=sys.stderr)
            continue
        mine = run(args, ours, rate)
        rows.append([name, package, f'{rate:g}', f'{mine:.4f}', f'{found:.4f}', f'{mine - found:+.4f}'])
        print(*rows[-1], flush=True)
    lines = [
        "# Our methods beside other people's packages",
        '',
        f'Made by `python -m bench.runs.controls --steps={args.steps}`: the model and the text of shelf.md, the same',
        f'first weights, batches and rates (a warm-up, then a cosine), fp32, val loss on {EVAL} batches. GaLore',
        'and Fira with SVDs for all layers at once, unless it says so, and moments kept, as the packages have it; P of',
        'APOLLO is random, and not the same here and there. BAdam and AdaLomo train all tensors, the others matrices',
        'of the blocks, the rest by AdamW.',
        '',
        *table(['method', 'package', 'rate', 'ours', 'theirs', 'ours over theirs'], rows),
        '',
    ]
    with open(os.path.join(ROOT, 'results', 'controls.md'), 'w') as f:
        f.write('\n'.join(lines))
    print('\n'.join(lines))


if __name__ == '__main__':
    main(args)
