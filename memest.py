"""
The peak memory of a run, known before it starts: a step of it is run on fake tensors, which have shapes and no bytes.

    python memest.py config/galore_7b_4090.py                   # a table: what takes how much, and what holds the peak
    python memest.py config/galore_7b_4090.py --instant --json  # by the formula, for scripts
    python train.py config/galore_7b_4090.py --dry_run          # its first line is the same plan
    plan = trace(config)                                        # a Plan; config: a namespace with train.py's keys

The step is train.py's own, with the method's own optimizer, so the plan cannot drift from the code (LLMem, 2404.10933,
fits formulas to a loaded model). A few layers are traced, and the record of the rest is written by repetition, storage
by storage (memory/record.py). Three steps: the first, which makes moments and bases, an ordinary one, and one in which
layers are due for a new basis or a merge. What no trace sees, CUDA's context and the workspaces of libraries, has lines
of its own.
"""

import sys

from memory import flags
from plumbing import MOVED, Stop, terminal

if __name__ == '__main__':  # before the imports that take seconds: --help and mistyped keys are answered at once
    terminal.prepare()
    asked = flags.read(sys.argv[1:], MOVED)

import json
import time
from types import SimpleNamespace

import configurator
import model as models
import train
from data import DataError
from memory import llmem
from memory.cuda import CONTEXT
from memory.fit import MARGIN, PCI_EXPRESS, fit, seconds_per_token
from memory.formula import Plan, UnknownMethod, estimate
from model import ModelError
from plumbing.build import build_on_meta, shape_of
from plumbing.parallel import device_and_dtype

__all__ = ['Plan', 'estimate', 'fit', 'trace']


def trace(config, device=None):
    """The Plan of a configuration (a namespace with train.py's keys): of a run on a card, or, where the weights are
    fp32 and there is none, on this CPU; device: 'cuda' plans for a card all the same. Raises what train.py raises."""
    here, dtype = device_and_dtype(config)
    model, _, _ = build_on_meta(config)
    return train.plan_memory(config, model.config, device or here, dtype)


def main(argv):
    """What `python memest.py ARGV` does."""
    return answer(argv, *flags.read(argv, MOVED))


def answer(argv, own, config):
    """Print what memest.py's own flags ask for. config: None with --hf."""
    if config is None:
        from memory import hf

        return hf.main(argv)
    configurator.check_or_exit(config, train.__file__, train.problems)
    shape = shape_of(config)
    if 'fit' in own:
        print_fit(config, shape, own)
    elif 'llmem' in own:
        print_llmem(config, shape, own)
    elif 'gpus' in own:
        print_gpus(config, shape, own)
    else:
        print_plan(config, shape, own)


# ---- one plan ------------------------------------------------------------------------------------------------------


def print_plan(config, shape, own):
    started, instant = time.perf_counter(), None
    try:
        instant = estimate(config, shape)
    except UnknownMethod:
        if 'instant' in own:
            raise
        print(f"no formula knows method='{config.method}': this is a trace alone", file=sys.stderr)
    plan = instant if 'instant' in own else trace(config)
    seconds = time.perf_counter() - started
    compared = instant if plan.context else None  # the formula is a card's
    if 'json' in own:
        found = {key: getattr(plan, key) for key in ('weights', 'states', 'total', 'allocated', 'reserved', 'context')}
        found |= {'card': plan.card, 'moment': plan.moment, 'parts': plan.parts}
        print(json.dumps(found | ({'formula': compared.total} if compared else {})))
    else:
        print(
            f'{shape.n_layer} layers, method {config.method}, {config.batch_size} x {config.block_size} tokens; '
            'planned, not measured'
        )
        print(table(plan))
        if compared:
            error = 100 * (compared.total / plan.total - 1)
            print(f'by the formula {compared.total / 1e9:.3f} GB ({error:+.2f} %); {seconds:.1f} s')
        if 'gpu_gb' in own:
            room = own['gpu_gb'] * 2**30 - plan.card * (1 + MARGIN)
            says = f'fits, {room / 2**30:.2f} GiB to spare' if room >= 0 else f'is {-room / 2**30:.2f} GiB too much'
            print(
                f'a card of {own["gpu_gb"]:g} GiB: {says} (with {100 * MARGIN:g} % kept free); '
                '--fit shows what else does'
            )
    if 'plot' in own and plan.peak:
        draw(plan, own['plot'])
        print(f'written: {own["plot"]}', file=sys.stderr if 'json' in own else sys.stdout)


def table(plan, width=40):
    """A plan as text: a line and a bar for each part."""
    lines = []
    for name, size in sorted(plan.parts.items(), key=lambda part: -part[1]):
        lines.append(f'{name:52} {size / 1e9:9.3f} GB  {"█" * round(width * size / plan.total)}')
    lines.append(f'{"= alive at the peak":52} {plan.total / 1e9:9.3f} GB  {plan.moment}')
    if plan.context:
        gib = f'{plan.card / 2**30:.2f} GiB'
        lines += [
            f"{'with what the allocator rounds up, and cuBLAS':52} {plan.allocated / 1e9:9.3f} GB  allocated",
            f'{"with what it cannot use":52} {plan.reserved / 1e9:9.3f} GB  reserved',
            f"{'with CUDA itself':52} {plan.card / 1e9:9.3f} GB  = {gib}, as nvidia-smi would show",
        ]
    if plan.peak:
        lines.append('largest at the peak:')
        for size, shape, operation, layer in plan.peak.largest:
            of = f', layer {layer}' if layer is not None else ''
            lines.append(f'  {size / 1e6:10.1f} MB  {" x ".join(map(str, shape))}  {operation or "weights"}{of}')
    return '\n'.join(lines)


def draw(plan, png):
    """Memory over three steps, phases in colours."""
    import matplotlib

    matplotlib.use('Agg')  # a file, no window
    import matplotlib.pyplot as plt

    from memory.trace import PHASES

    points = plan.peak.timeline
    every = max(len(points) // 20_000, 1)
    fullest = [max(points[i : i + every]) for i in range(0, len(points), every)]
    figure, axes = plt.subplots(figsize=(10, 5), layout='constrained')
    for phase, name in PHASES.items():
        of_phase = [alive / 1e9 if kind == phase else 0 for alive, kind in fullest]
        if any(of_phase):
            axes.fill_between(range(len(fullest)), of_phase, step='mid', label=name, alpha=0.8)
    axes.axhline(plan.total / 1e9, color='black', lw=0.8, ls='--')
    axes.set(
        ylabel='GB alive', xlabel='the first step, an ordinary one, one with a refresh: tensors made', title=plan.moment
    )
    axes.set_xticks([])
    axes.legend(loc='lower right')
    figure.savefig(png, dpi=120)
    plt.close(figure)


# ---- tables of many ------------------------------------------------------------------------------------------------


def print_gpus(config, shape, own):
    """What each of several GPUs holds, way by way (llmem.py has the derivations)."""
    n, gb, tp = own['gpus'], own.get('gpu_gb', 24.0), own.get('tp', 1)
    plan = estimate(config, shape)
    if n % tp:
        raise ValueError(f'--gpus={n} cannot be cut into groups of --tp={tp}: use a tp that divides them')
    print(f'{n} GPUs, planned; each, or with tp each group, has {config.batch_size} x {config.block_size} tokens')
    print(f'{"":10} {"GiB a GPU":>9}  fits {gb:g} GiB   what torch calls it')
    for how, words in llmem.WAYS.items():
        need = llmem.several_gpus(plan.pieces, n, how, tp if how == 'zero3' else 1)['total'] + CONTEXT
        print(f'{how:10} {need / 2**30:9.2f}  {"yes" if need * (1 + MARGIN) <= gb * 2**30 else "no":11} {words}')
    parts = estimate(SimpleNamespace(**vars(config) | {'batch_size': 1}), shape).pieces
    seconds = seconds_per_token(config, shape) * config.block_size
    exchanged = (6 if config.checkpointing else 4) * shape.n_layer * config.block_size * shape.n_embd * 2
    ways = llmem.choose(parts, gb * 2**30 / (1 + MARGIN) - CONTEXT, n, seconds, PCI_EXPRESS, exchanged,
                        tps=(tp,) if tp > 1 else ())  # fmt: skip
    print('(train.py itself averages over processes, as ddp does; the others want torch around a loop of your own)')
    if config.method in ('loqt', 'lora') or getattr(config, 'weight_bits', 16) == 8:
        print('(packed weights are buffers, which fully_shard does not cut: zero2 and zero3 are too low here)')
    print(
        'with the largest batches that fit, fastest first:' if ways else 'none of these fits: try --fit, or more GPUs'
    )
    for row in ways:
        print(f'{row["way"]:10} batch {row["batch"]} a group; {row["reason"]}')


def print_llmem(config, shape, own):
    """LLMem's equations for this model, whatever the config's method: they know mixed-precision Adam alone."""
    table, n, gb = shape.vocab_size * shape.n_embd, own.get('gpus', 1), own.get('gpu_gb', 24.0)
    size = models.LLaMA(shape, device='meta').n_params()
    norms = (2 * shape.n_layer + 1) * shape.n_embd
    counts = llmem.Model(table, size - table, size - norms, table, shape.vocab_size, shape.n_layer, shape.n_embd)
    print(
        f"LLMem's equations, {config.batch_size} x {config.block_size} tokens, fp16 with checkpointing, on {n} GPU(s):"
    )
    tp = own.get('tp') or next(k for k in range(max(n // 2, 1), 0, -1) if n % k == 0)
    for how in llmem.METHODS if n > 1 else ('CDP',):
        need = llmem.peak(counts, how, config.batch_size, config.block_size, n, tp if how == 'DP+TP' else 1)
        print(f'{how:6} {need / 2**30:9.2f} GiB a GPU')
    choice, _ = llmem.decide(counts, gb * 2**30, n, tp=tp, sequence=config.block_size)
    print(f'its choice for cards of {gb:g} GiB: {choice}')


def print_fit(config, shape, own):
    gb = own.get('gpu_gb', 24.0)
    rows = fit(config, gb * 2**30, shape, train.problems)
    if not rows:
        print(f'nothing fits {gb:g} GiB: use a smaller --model or --block_size, or more cards (--gpus=N)')
        return
    print(
        f'what fits {gb:g} GiB by the formula, with the largest batch, fastest first; planned, not measured on a card.'
    )
    print('It knows the gaps of an allocator on average alone: trace what you choose, with --gpu_gb.')
    print(f'{"":26} {"checkpointing":>13} {"batch":>6} {"GiB":>6} {"speed":>6}   flags')
    best = rows[0][4]
    for name, checkpointing, batch, plan, seconds, words in rows:
        print(
            f'{name:26} {"yes" if checkpointing else "no":>13} {batch:6d} {plan.card / 2**30:6.2f} '
            f'{best / seconds:6.2f}   {words}'
        )


if __name__ == '__main__':
    try:
        sys.exit(answer(sys.argv[1:], *asked))
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error.name} is not installed: pip install -r requirements-extra.txt')
    except (ValueError, OSError, Stop, DataError, ModelError) as error:
        sys.exit(f'error: {error}')
