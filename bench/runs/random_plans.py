"""
memest's plans of random configurations: the trace against the bytes of real steps on a CPU, the formula against the
trace. Makes random_plans.md.

    python -m bench.runs.random_plans --jobs=2       # 40 of either kind, some minutes; --seed=2 for 40 others
"""

from bench import parser

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('--seed', type=int, default=1, help='of the configurations (1)')
    asked.add_argument('--n', type=int, default=40, choices=range(1, 10**6), metavar='N', help='of either kind (40)')
    asked.add_argument('--jobs', type=int, default=1, choices=range(1, 1000), metavar='N', help='at a time (1)')
    args = asked.parse_args()

import multiprocessing
import random
import time
from types import SimpleNamespace

import torch

import configurator
import coreset as colm
import memest
import train
from data.batches import Tokens
from memory import trace
from memory.record import LiveBytes
from model import LLaMA
from plumbing.build import ROOT, layers_of, new_shape

METHODS = {  # method: its options to choose among
    'adamw': {},
    'galore': dict(
        refresh=['subspace', 'svd'], stagger=[True, False], basis_bits=[16, 8, 4], moments=['keep', 'rotate', 'reset'],
        update_proj_gap=[1, 2, 3, 50, 200],
    ),
    'qgalore': dict(
        refresh=['subspace', 'svd'], weight_bits=[8, 16], basis_bits=[16, 8, 4], lazy=[0.0, 0.5],
        update_proj_gap=[1, 2, 3, 50, 200],
    ),
    'fira': dict(refresh=['subspace', 'svd'], stagger=[True, False], basis_bits=[16, 8, 4], update_proj_gap=[2, 50]),
    'apollo': dict(tensorwise=[True, False], update_proj_gap=[1, 50]),
    'loqt': dict(
        quantize=['nf4', 'nf4', 'none'], double_quant=[True, False], compensation=[0, 1, 2, 5],
        refresh=['subspace', 'svd'], stagger=[True, False], moments=['keep', 'rotate', 'reset'],
        update_proj_gap=[1, 3, 50],
    ),
    'lora': dict(
        quantize=['nf4', 'none'], double_quant=[True, False], dropout=[0.0, 0.1], merge_every=[0, 2, 50],
        train_rest=['yes', 'no'], targets=['all', 'q_proj,v_proj', 'down_proj'],
    ),
}  # fmt: skip
TRACED = METHODS | {  # and those that the formula does not know
    'muon': dict(row_norm=[True, False]),
    'scale': dict(momentum=[0.0, 0.9]),
    'sumo': dict(
        refresh=['subspace', 'sara'], stagger=[True, False], basis_bits=[16, 8, 4], moments=['keep', 'rotate', 'reset'],
        orthogonal=['exact', 'newton'], update_proj_gap=[1, 3, 50],
    ),
    'grass': dict(choose=['top', 'norm'], stagger=[True, False], update_proj_gap=[1, 3, 50]),
    'ldadam': dict(feedback=[True, False], rho=[0.0, 0.9]),
    'adalomo': dict(adaptive=[True, False]),
    'sltrain': dict(density=[0.03, 1.0]),
}  # fmt: skip
NO_RANK = ('adamw', 'muon', 'scale', 'adalomo')
SHARED = dict(
    batch_size=[1, 2, 3, 4], gradient_accumulation_steps=[1, 2, 3, 5], state_bits=[32, 8], per_layer=[True, False],
    checkpointing=[True, False], offload=[False, False, True], grad_clip=[0.0, 1.0], dtype=['float32', 'bfloat16'],
    coreset=['none', 'none', 'none', 'random', 'zo', 'grad'],
)  # fmt: skip
CORESET = dict(
    coreset_from=[2, 4], zo_directions=[1, 16], coreset_norm=['unit', 'adam'], coreset_sparsity=[2560, 0, 50]
)
SMALL = dict(block_size=[16, 32, 48], n_layer=[1, 2, 3, 5, 6], heads=[2, 4, 6], width=[16, 24], inner=[81, 96, 176])
SMALL |= dict(vocab_size=[101, 301, 1000], rank=[1, 4, 8, 300])
LARGER = dict(block_size=[64, 256], n_layer=[2, 5, 8, 12], heads=[4, 8, 12], width=[32, 64, 128], inner=[1.5, 2.7, 3.3])
LARGER |= dict(vocab_size=[5000, 32000, 49152], rank=[1, 16, 128])


def flags_of(pick, sizes, methods):
    """The flags of one random configuration that train.py accepts. pick: random.Random, sizes: SMALL or LARGER."""
    while True:
        method = pick.choice(list(methods))
        chosen = {'method': method} | {name: pick.choice(values) for name, values in SHARED.items()}
        chosen |= {name: pick.choice(values) for name, values in methods[method].items()}
        if chosen['coreset'] != 'none':
            chosen |= {name: pick.choice(values) for name, values in CORESET.items()}
        size = {name: pick.choice(values) for name, values in sizes.items()}
        heads, width = size.pop('heads'), size.pop('heads', 0) or size.pop('width')
        inner, rank = size.pop('inner'), size.pop('rank')
        size |= dict(n_head=heads, n_embd=heads * width, n_kv_head=pick.choice([0, heads, heads // 2]))
        size['n_inner'] = inner if isinstance(inner, int) else int(inner * heads * width)
        chosen |= size | ({} if method in NO_RANK else {'rank': rank})
        try:
            config = load(flags := ' '.join(f'--{name}={value}' for name, value in chosen.items()))
        except configurator.ConfigError:
            continue
        if not train.problems(config):
            return flags


def load(flags):
    return configurator.load(train.__file__, ['--model=9m', *flags.split()])


class Data:
    """As much of data.batches.Tokens as a choice of batches asks for."""

    sources, source_ends = ('one',), (4,)  # all of a pool is compared, as a plan has it

    def __init__(self, config, vocab_size):
        self.config, self.vocab_size = config, vocab_size

    def batch(self, seed, t, batch_size, rank=0, world=1):
        return self.read(self.pool(seed, t, batch_size))

    def pool(self, seed, t, n):
        return list(torch.randint(self.vocab_size, (n, self.config.block_size + 1)))

    def read(self, rows):
        rows = torch.stack(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.zeros(len(rows), dtype=torch.int64)

    micro_batches = Tokens.micro_batches


def real_steps(config, shape, dtype, live):
    """Build as train.py does and take the steps that a trace takes, on real tensors."""
    with torch.device('meta'):
        model = LLaMA(shape, dtype=dtype, linear=layers_of(config))
    model.materialise('cpu', 1)
    model.checkpointing = config.checkpointing
    gap = getattr(config, 'update_proj_gap', 200)
    soon = gap <= 3  # then every layer is due by itself within a few steps, else only when asked for
    optimizer = train.setup(
        model, config if soon else SimpleNamespace(**vars(config) | {'update_proj_gap': trace.NEVER})
    )
    data = Data(config, shape.vocab_size)
    selection = colm.setup(config, data)
    due = [None] * (3 + gap) if soon else [None, None, *trace.renewals(model, config, shape.n_layer)]
    for i, matrices in enumerate(due):
        if matrices:
            optimizer.make_due(matrices)
        if selection:
            batches = colm.chosen_batches(selection, model, data, config, i, 'cpu')
        else:
            n = config.gradient_accumulation_steps
            batches = [data.batch(1, i, config.batch_size)[:2] for _ in range(n)]
        train.training_step(model, optimizer, batches, 1e-3, 'cpu')
    return model


def trace_and_real(flags):
    """-> bytes planned for this CPU, bytes alive in real steps, and when the plan's peak is."""
    config = load(flags)
    shape, dtype = new_shape(config, config.vocab_size), getattr(torch, config.dtype)
    compute = (
        dtype if dtype == torch.float32 else LLaMA(new_shape(load('--n_layer=1'), 64), dtype=dtype).activation_dtype
    )
    plan = train.plan_memory(config, shape, 'cpu', dtype, compute)
    with LiveBytes() as live:
        real_steps(config, shape, dtype, live)
    return (plan.total,), (live.peak,), plan.moment


def formula_and_trace(flags):
    """-> (total, reserved) by the formula, the same by the trace, and when its peak is; both of a card."""
    config = load(flags + ' --dry_run')
    shape = new_shape(config, config.vocab_size)
    plan = train.plan_memory(config, shape, 'cuda', getattr(torch, config.dtype))
    instant = memest.estimate(config, shape)
    moments = f'{plan.moment}; by the formula {instant.moment}'
    return (instant.total, instant.reserved), (plan.total, plan.reserved), moments


def compare(task):
    """-> errors in per cent, the true bytes, seconds, when the plan's peak is, flags."""
    kind, flags = task
    began = time.perf_counter()
    guess, truth, moment = (trace_and_real if kind == 'real' else formula_and_trace)(flags)
    errors = [100 * (a / b - 1) for a, b in zip(guess, truth)]
    return errors, truth, time.perf_counter() - began, moment, flags


def table(kind, sizes, n, seed, jobs):
    """Lines of the table of n random configurations, the worst first."""
    pick = random.Random(seed)
    methods = TRACED if kind == 'real' else METHODS
    tasks, rows = [(kind, flags_of(pick, sizes, methods)) for _ in range(n)], []
    with multiprocessing.get_context('spawn').Pool(jobs) as pool:
        for row in pool.imap(compare, tasks):
            errors, truth, seconds, moment, flags = row
            shown = ' '.join(f'{error:+.2f}' for error in errors)
            print(f'{shown} %  {truth[0] / 1e6:.2f} MB  {seconds:.1f} s  {moment} | {flags}', flush=True)
            rows.append(row)
    lines = []
    for i, what in enumerate(HEADS[kind]):
        found = sorted(row[0][i] for row in rows)
        within = sum(abs(error) <= (0.1 if kind == 'real' else 1) for error in found)
        limit = '0.1 %' if kind == 'real' else '1 %'
        lines.append(f'{what}: {found[0]:+.2f} to {found[-1]:+.2f} %, {within} of {n} within {limit}.')
    lines += ['', '| error | MB | peak | flags |', '|---|---|---|---|']
    for errors, truth, _, moment, flags in sorted(rows, key=lambda row: -abs(row[0][0])):
        shown = ', '.join(f'{error:+.2f} %' for error in errors)
        lines.append(f'| {shown} | {truth[0] / 1e6:.2f} | {moment} | `{flags}` |')
    return lines


HEADS = {
    'real': ['The trace against real live bytes on a CPU'],
    'formula': ["The formula's live bytes against the trace's", 'its reserved bytes'],
}


def main(seed, n, jobs):
    lines = [
        '# Plans of random configurations',
        '',
        f'Made by `python -m bench.runs.random_plans --seed={seed}`.',
    ]
    for kind, sizes in (('real', SMALL), ('formula', LARGER)):
        lines += ['', f'## {HEADS[kind][0]}', '', *table(kind, sizes, n, seed, jobs)]
    with open(f'{ROOT}/results/random_plans.md', 'w') as f:
        f.write('\n'.join([*lines, '']))
    print('\n'.join(line for line in lines if '`' not in line))


if __name__ == '__main__':
    main(args.seed, args.n, args.jobs)
