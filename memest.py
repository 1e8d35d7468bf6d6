"""
The peak memory of a run and its time, known before it starts: a step is run on fake tensors: shapes without bytes.

    python memest.py config/galore_7b_4090.py                   # a table: what takes how much, and what holds the peak
    python memest.py config/galore_7b_4090.py --instant --json  # by the formula, for scripts
    python memest.py config/galore_7b_4090.py --fit --gpus=4    # every method on four cards of --gpu_gb=24
    python train.py config/galore_7b_4090.py --dry_run          # its first line is the same plan
    plan = trace(config)                                        # a Plan; config: a namespace with train.py's keys

The step is train.py's own, with the method's own optimizer, so the plan cannot drift from the code (LLMem, 2404.10933,
fits formulas to a loaded model). A few layers are traced, and the record of the rest is written by repetition, storage
by storage (memory/record.py). The model is built, and takes a few steps: the first, which makes moments and bases, an
ordinary one, and those in which layers are due for a new basis or a merge. What no trace sees, CUDA's context and the
workspaces of libraries, has lines of its own. No data and no weights are needed: of a folder its config.json is enough.
The same trace counts what the step does, and how fast this device does it is measured once (memory/rates.py): seconds a
step, on the device that is here. --calibrate measures it anew.

GB are 1e9 bytes. A card is given as it is sold: --gpu_gb=24 are 24 x 2^30 bytes, 25.8 GB.
"""

import sys

from memory import flags
from plumbing import MOVED, Stop, terminal

if __name__ == '__main__':  # before the imports that take seconds: --help and mistyped keys are answered at once
    terminal.prepare()
    asked = flags.read(sys.argv[1:], MOVED)

import json
import textwrap
import time
from types import SimpleNamespace

import torch

import configurator
import model as models
import train
from data import DataError
from memory import llmem, rates
from memory.cuda import CONTEXT
from memory.fit import DATA_SHEET, MARGIN, NO_PRETRAINING, PCI_EXPRESS, fit, fit_several, seconds_per_token
from memory.formula import Plan, UnknownMethod, estimate
from memory.trace import WHAT
from model import ModelError
from plumbing.build import shape_of
from plumbing.parallel import device_and_dtype

__all__ = ['Plan', 'estimate', 'fit', 'trace']


def trace(config, device=None, world=None):
    """The Plan of a configuration (a namespace with train.py's keys): of a run on a card, or, where the weights are
    fp32 and there is none, on this CPU; device: 'cuda' plans for a card all the same. world: of how many processes it
    plans one. Raises what train.py raises."""
    here, dtype = device_and_dtype(config)
    return train.plan_memory(config, shape_of(config), device or here, dtype, world=world)


def main(argv):
    """What `python memest.py ARGV` does."""
    return answer(argv, *flags.read(argv, MOVED))


def answer(argv, own, config):
    """Print what memest.py's own flags ask for. config: None with --hf and --script."""
    if 'script' in own:
        from memory import script

        return script.main(own)
    if config is None:
        with terminal.patience("planning transformers' model"):
            from memory import hf_command

            return hf_command.main(argv)
    flags.for_a_card(own, config)
    configurator.check_or_exit(config, train.__file__, train.problems)
    shape = native_shape(config)
    if not isinstance(shape, models.ModelConfig) and (
        asked := [n for n in ('fit', 'llmem', 'gpus', 'instant') if n in own]
    ):
        what = (
            f"--{asked[0]} is of formulas, which know our own families: leave it out for a trace of transformers' model"
        )
        raise ModelError(f'{what}, or use python memest.py --hf={config.init_from} --{asked[0]}')
    if 'fit' in own:
        print_fit(config, shape, own)
    elif 'llmem' in own:
        print_llmem(config, shape, own)
    elif 'gpus' in own and config.parallel in ('dp', 'auto'):
        print_gpus(config, shape, own)
    else:
        print_plan(config, shape, own)


def native_shape(config):
    """shape_of, and where train.py has no such model, the command that plans transformers' own."""
    try:
        return shape_of(config)
    except ModelError as error:
        if 'computes' not in str(error) and 'supported' not in str(error):
            raise
        raise ModelError(f"{error}; python memest.py --hf={config.init_from} plans transformers' own model") from None


# ---- one plan ------------------------------------------------------------------------------------------------------


def print_plan(config, shape, own):
    started, instant = time.perf_counter(), None
    try:
        instant = estimate(config, shape) if 'gpus' not in own else None
    except UnknownMethod:
        if 'instant' in own:
            raise
        print(f"no formula knows method='{config.method}': this is a trace alone", file=sys.stderr)
    if 'json' not in own:
        print(described(config, shape), flush=True)
    plan = instant if 'instant' in own else trace(config, world=own.get('gpus'))
    seconds = time.perf_counter() - started
    compared = instant if plan.context and instant else None  # the formula is a card's
    card = own.get('gpu_gb', 0) * 2**30
    no_time, times = rates.why_not(plan, config, device_and_dtype(config)[0], own.get('gpus', 1)), None
    if not no_time:
        with terminal.patience('measuring this device'):
            times = rates.planned(plan, config, *device_and_dtype(config), anew='calibrate' in own)
    if 'json' in own:
        found = {key: getattr(plan, key) for key in ('weights', 'states', 'total', 'allocated', 'reserved', 'context')}
        found |= {'card': plan.card, 'moment': plan.moment, 'parts': plan.parts}
        found |= dict(zip(('device', 'dtype'), place(config)))
        found |= {'seconds': times and times.step, 'seconds_of': times and times.phases, 'no_seconds': no_time}
        print(json.dumps(found | ({'formula': compared.total} if compared else {})))
    else:
        print(table(plan))
        if compared:
            error = 100 * (compared.total / plan.total - 1)
            print(f'by the formula {compared.total / 1e9:.3f} GB ({error:+.2f} %); {seconds:.1f} s')
        print(no_time or f'time: {times}')
        if card:
            print(verdict(plan.card, card) + '; --fit shows what else does')
    if 'plot' in own and plan.peak:
        from memory.picture import draw

        draw(plan, own['plot'], described(config, shape), card)
        print(f'written: {own["plot"]}', file=sys.stderr if 'json' in own else sys.stdout)


def place(config):
    """-> where a plan is of, 'a card' or 'this CPU', and the weights' dtype there."""
    device, dtype = device_and_dtype(config)
    dtype = str(dtype).removeprefix('torch.')
    return 'a card' if device.startswith('cuda') or dtype == 'bfloat16' else 'this CPU', dtype


def described(config, shape):
    where, dtype = place(config)
    name = config.model if config.init_from in ('scratch', 'resume') else config.init_from
    return (
        f'{name}, {shape.n_layer} layers, method {config.method}, {config.batch_size} x {config.block_size} tokens, '
        f'{dtype} on {where}: planned, not measured'
    )


def verdict(need, card):
    room = card - need * (1 + MARGIN)
    says = f'fits, {room / 1e9:.2f} GB to spare' if room >= 0 else f'is {-room / 1e9:.2f} GB too much'
    return f'a card of {card / 2**30:g} GB, {card / 1e9:.2f}e9 bytes: {says} (with {100 * MARGIN:g} % kept free)'


def table(plan, width=40):
    """A plan as text: a line and a bar for each part."""
    lines = []
    for name, size in sorted(plan.parts.items(), key=lambda part: -part[1]):
        lines.append(f'{name:52} {size / 1e9:9.3f} GB  {"█" * round(width * size / plan.total)}')
    lines.append(f'{"= alive at the peak":52} {plan.total / 1e9:9.3f} GB  {plan.moment}')
    if plan.context:
        lines += [
            f"{'with what the allocator rounds up, and cuBLAS':52} {plan.allocated / 1e9:9.3f} GB  allocated",
            f'{"with what it cannot use":52} {plan.reserved / 1e9:9.3f} GB  reserved',
            f"{'with CUDA itself':52} {plan.card / 1e9:9.3f} GB  as nvidia-smi would show",
        ]
    if plan.peak:
        lines.append('largest at the peak:')
        for size, shape, operation, layer, what in plan.peak.largest:
            of = f', layer {layer}' if layer is not None else ''
            lines.append(f'  {size / 1e6:10.1f} MB  {" x ".join(map(str, shape))}, {WHAT[what]}{of} ({operation})')
    return '\n'.join(lines)


# ---- tables of many ------------------------------------------------------------------------------------------------


def print_gpus(config, shape, own):
    """What each of several GPUs holds, way by way (llmem.py has the derivations)."""
    n, gb, tp = own['gpus'], own.get('gpu_gb', 24.0), own.get('tp', 1)
    plan = estimate(config, shape)
    if n % tp:
        raise ValueError(f'--gpus={n} cannot be cut into groups of --tp={tp}: use a tp that divides them')
    print(described(config, shape))
    print(f'{n} GPUs; each, or with tp each group, has {config.batch_size} x {config.block_size} tokens')
    print(f'{"":10} {"GB a GPU":>9}  fits {gb:g} GB     what torch calls it')
    for how, words in llmem.WAYS.items():
        need = llmem.several_gpus(plan.pieces, n, how, tp if how == 'zero3' else 1)['total'] + CONTEXT
        fits = 'yes' if need * (1 + MARGIN) <= gb * 2**30 else 'no'
        print(textwrap.fill(f'{how:10} {need / 1e9:9.2f}  {fits:14} {words}', 100, subsequent_indent=' ' * 37))
    parts = estimate(SimpleNamespace(**vars(config) | {'batch_size': 1}), shape).pieces
    seconds = seconds_per_token(config, shape) * config.block_size
    exchanged = (6 if config.checkpointing else 4) * shape.n_layer * config.block_size * shape.n_embd * 2
    ways = llmem.choose(parts, gb * 2**30 / (1 + MARGIN) - CONTEXT, n, seconds, PCI_EXPRESS, exchanged,
                        tps=(tp,) if tp > 1 else ())  # fmt: skip
    print('(in train.py ddp is --parallel=dp, zero3 fsdp, tp tp, and zero3 with --tp dp+tp)')
    print(f'(a trace of what train.py does, instead of formulas: --gpus={n} --parallel=fsdp)')
    if config.method in ('loqt', 'lora') or getattr(config, 'weight_bits', 16) == 8:
        print('(packed weights are buffers, which fully_shard does not cut: zero2 and zero3 are too low here)')
    print(
        'with the largest batches that fit, fastest first:' if ways else 'none of these fits: try --fit, or more GPUs'
    )
    for row in ways:
        says = f'{row["way"]:10} batch {row["batch"]} a group; {row["reason"]}'
        print(textwrap.fill(says, 100, subsequent_indent=' ' * 11))


def print_llmem(config, shape, own):
    """LLMem's equations for this model, whatever the config's method: they know mixed-precision Adam alone."""
    table, n, gb = shape.vocab_size * shape.n_embd, own.get('gpus', 1), own.get('gpu_gb', 24.0)
    size = models.LLaMA(shape, device='meta').n_params()
    norms = (2 * shape.n_layer + 1) * shape.n_embd
    counts = llmem.Model(table, size - table, size - norms, table, shape.vocab_size, shape.n_layer, shape.n_embd)
    print(
        f"LLMem's equations, {config.batch_size} x {config.block_size} tokens, fp16 with checkpointing, a GPU of {n}:"
    )
    tp = own.get('tp') or next(k for k in range(max(n // 2, 1), 0, -1) if n % k == 0)
    for how in llmem.METHODS if n > 1 else ('CDP',):
        need = llmem.peak(counts, how, config.batch_size, config.block_size, n, tp if how == 'DP+TP' else 1)
        print(f'{how:6} {need / 1e9:9.2f} GB')
    choice, _ = llmem.decide(counts, gb * 2**30, n, tp=tp, sequence=config.block_size)
    print(f'its choice for cards of {gb:g} GB: {choice}')


def print_fit(config, shape, own):
    gb, n = own.get('gpu_gb', 24.0), own.get('gpus', 1)
    several = f' each of {n} GPUs of' if n > 1 else ''
    peak, whose = DATA_SHEET, "an RTX 4090's data sheet, at best"
    if torch.cuda.is_available():
        dtype = device_and_dtype(config)[1]
        peak = rates.load('cuda', dtype, anew='calibrate' in own).peak(dtype)
        whose = 'the rates of the card that is here'
    ways = (config, gb * 2**30, n, shape) if n > 1 else (config, gb * 2**30, shape)
    rows = (fit_several if n > 1 else fit)(*ways, train.problems, peak)
    if not rows:
        print(f'nothing fits {gb:g} GB: use a smaller --model or --block_size, or more cards (--gpus=N)')
        return
    windows = config.batch_size * config.gradient_accumulation_steps
    where = described(config, shape).partition(', method')[0]
    print(f'{where} in {place(config)[1]}: what fits{several} {gb:g} GB by the formula, fastest first,')
    print(f'with the largest batch of at most the {windows} windows of a step (more: --gradient_accumulation_steps).')
    print("Planned, not measured; it knows an allocator's gaps on average: trace what you choose (--gpu_gb).")
    print(f's/step: seconds of a step of all windows, by {whose}.')
    if n == 1:
        print('context: the longest --block_size that fits at batch 1.')
    last = '  way' if n > 1 else f' {"context":>9}'
    print(f'{"":38} {"checkpoints":>11} {"batch":>6} {"GB":>6} {"speed":>6} {"s/step":>7}{last}')
    scratch, best, marked = config.init_from == 'scratch', rows[0].seconds, False
    tokens = windows * config.block_size
    for row in rows:
        star = '*' * (scratch and row.name in NO_PRETRAINING)
        marked |= bool(star)
        print(
            f'{row.name + star:38} {"yes" if row.checkpointing else "no":>11} {row.batch:6d} '
            f'{row.bytes / 1e9:6.2f} {best / row.seconds:6.2f} {row.seconds * tokens:7.3g}'
            f'{f"  {row.way}" if n > 1 else f" {row.context:9,}"}'
        )
        print('    ' + ' \\\n    '.join(textwrap.wrap(row.flags, 92, break_on_hyphens=False)))
    if marked:
        print('* trains little beside frozen random weights: no substitute for pretraining from scratch')
    if n > 1:
        print('way: ddp is --parallel=dp, zero3 fsdp, tp tp; the others want a loop of your own (--gpus)')


if __name__ == '__main__':
    try:
        sys.exit(answer(sys.argv[1:], *asked))
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error.name} is not installed: pip install -r requirements-extra.txt')
    except (ValueError, OSError, Stop, DataError, ModelError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit(130)
