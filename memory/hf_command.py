"""
`python memest.py --hf=...`: the plan of a Hugging Face model as text, what fits a card, what each of several holds.

    main(['--hf=config.json', '--method=lora', '--gpu_gb=24'])   # trace_hf's arguments as flags -> 0, or 1
"""

import inspect
import json
import re
import sys
import textwrap

from memory import hf, llmem
from memory.fit import GB_PER_SECOND, TERAFLOPS
from memory.hf import MARGIN, MARGIN_VARYING, trace_hf

OWN = {
    'gpu_gb': (24, 'the card, as it is sold: 24 x 2^30 bytes, 25.8 GB'),
    'json': ('', 'as JSON'),
    'fit': ('', 'which ways fit --gpu_gb, with the largest batch, and the flags to type; a minute or more'),
    'gpus': (4, 'what each of several GPUs holds'),
    'recipe': ('litgpt_lora', 'the settings of another tool; what is typed beside it wins'),
}
# What other tools do where nothing else is said, so far as their code is known: of litgpt its finetune/lora.py in bf16,
# with bnb.nf4; of LLaMA-Factory LoRA on all linear layers, with bf16 by autocast and flash-attn. How near these come to
# published peaks: results/memest_points.md. torchtune has models of its own and a loss in chunks, which no trace of
# transformers' code shows.
LITGPT = dict(lora_rank=8, lora_dropout=0.05, lora_dtype='bf16', lora_targets='q_proj,v_proj', kbit_fp32=False)
FACTORY = dict(lora_rank=8, lora_targets='all', attention='flash', autocast='bf16', checkpointing=True)
FACTORY |= dict(keep_outputs=False, kbit_fp32=False)
RECIPES = {
    'litgpt_lora': dict(method='lora', optimizer='adamw', **LITGPT),
    'litgpt_qlora': dict(method='qlora', double_quant=False, optimizer='adamw', **LITGPT),
    'llamafactory_lora': dict(method='lora', **FACTORY),
    'llamafactory_qlora': dict(method='qlora', **FACTORY),
}
# What --fit tries, so that none of it is typed beside it.
WAYS = {
    'AdamW': dict(method='full', optimizer='adamw'),
    'AdamW, 8-bit': dict(method='full', optimizer='adamw8bit'),
    'LoRA': dict(method='lora', optimizer='adamw'),
    'QLoRA': dict(method='qlora', optimizer='paged_adamw8bit'),
}
LARGEST = 4096  # rows in a batch

# Flags of memest.py that name what is counted only for the models of model.py: what to type instead.
FOREIGN = {
    'tp': 'which activations tensor parallelism would cut is not known of code that is not ours: leave it out',
    'instant': 'the formula knows the models of model.py alone: leave it out, and a trace answers',
    'plot': 'a picture is drawn of the models of model.py alone: leave it out',
}


# ---- one plan ------------------------------------------------------------------------------------------------------


def table(plan, gpu_gb):
    """The plan as text, and with a card's size whether it fits."""
    rest = plan.allocated - plan.weights - plan.states - plan.workspaces
    rows = [
        ('weights', plan.weights, f'{plan.parameters:,} parameters, {plan.trained:,} of them trained'),
        ('optimizer states', plan.states, ''),
        ('workspaces', plan.workspaces, 'of cuBLAS'),
        ('all else at the peak', rest, f'gradients, activations; peak in {plan.phase}, {plan.operation}'),
        ('allocated', plan.allocated, 'torch.cuda.max_memory_allocated()'),
        ('reserved', plan.reserved, 'torch.cuda.max_memory_reserved()'),
        ('paged states', plan.paged, 'in unified memory'),
        ('CUDA context', plan.context, 'assumed; not seen by any trace'),
        ('nvidia-smi', plan.total, 'reserved + paged + context'),
    ]
    lines = [f'{name:<22}{size / 1e9:9.3f} GB  {note}'.rstrip() for name, size, note in rows if size]
    if gpu_gb:
        card = gpu_gb * 2**30
        lines.append(f'a card of {gpu_gb:g} GB, {card / 1e9:.2f}e9 bytes:')
        for margin, lengths in ((MARGIN, 'of equal length'), (MARGIN_VARYING, 'padded each to its longest row')):
            room = card - plan.total * (1 + margin)
            says = f'fits, {room / 1e9:.2f} GB to spare' if room >= 0 else f'is {-room / 1e9:.2f} GB too much'
            lines.append(f'  {says}, with {margin:.0%} kept free for batches {lengths}')
    return '\n'.join(line[:100] for line in lines)


# ---- several GPUs --------------------------------------------------------------------------------------------------


def print_gpus(plan, given, n, gpu_gb):
    """What each of n GPUs holds, way by way, from the pieces of one GPU's plan."""
    batch, seq = (given.get(name, default(name)) for name in ('batch', 'seq'))
    print(f'{n} GPUs, each with {batch} x {seq} tokens: planned, not measured')
    print(f'{"":10} {"GB a GPU":>9}  fits {gpu_gb:g} GB     what torch calls it')
    packed = given.get('method') == 'qlora'
    for how, words in llmem.WAYS.items():
        if how == 'tp' or (packed and how in ('zero2', 'zero3')):
            continue
        need = llmem.several_gpus(plan.pieces, n, how)['total'] + plan.context
        fits = 'yes' if need * (1 + MARGIN) <= gpu_gb * 2**30 else 'no'
        print(textwrap.fill(f'{how:10} {need / 1e9:9.2f}  {fits:14} {words}', 100, subsequent_indent=' ' * 37))
    if packed:
        print('(zero2, zero3: fully_shard does not cut packed weights as they are; --method=lora has these rows)')
    print('(tp: which activations it would cut is not known of code that is not ours)')


# ---- what fits -----------------------------------------------------------------------------------------------------


def largest_batch(trace, room):
    """-> (batch, plan) of the largest batch whose plan takes `room` bytes at most, with its margin; (0, None) where
    none does. Bytes are the largest of several sums of which each grows evenly with the batch, so they bend upwards
    only: a line through two traces, drawn on, promises too much, and one between two traces too little."""
    plans = {}

    def need(batch):
        if batch not in plans:
            plans[batch] = trace(batch)
        return plans[batch].total * (1 + MARGIN)

    low, high, guess = 0, LARGEST + 1, 1  # the largest known to fit, the smallest known not to
    while low < guess < high:
        low, high = (guess, high) if need(guess) <= room else (low, guess)
        if guess == 1:
            guess = 2
            continue
        one, other = (low, high) if high <= LARGEST else sorted(plans)[-2:]
        slope = (need(other) - need(one)) / (other - one)
        guess = one + int((room - need(one)) / slope) if slope > 0 else LARGEST
        guess = min(max(guess, low + 1), high - 1)
    return low, plans.get(low)


def fit(config, gpu_bytes, given):
    """-> [(name, checkpointing, batch, plan, seconds a token)], the fastest first. given: trace_hf's other arguments;
    two steps unless it says else, since a third changes bytes by a percent."""
    rows = []
    for name, way in WAYS.items():
        for checkpointing in (True, False):  # where the first fits none, the second does not

            def trace(batch, way=way, checkpointing=checkpointing):
                return trace_hf(config, batch=batch, checkpointing=checkpointing, **dict(steps=2) | given | way)

            batch, plan = largest_batch(trace, gpu_bytes)
            if not batch:
                break
            tokens = batch * given.get('seq', default('seq'))
            rows.append((name, checkpointing, batch, plan, seconds_per_token(plan, way, checkpointing, tokens)))
    return sorted(rows, key=lambda row: row[-1])


def seconds_per_token(plan, way, checkpointing, tokens):
    """At best, as memory/fit.py has it: of arithmetic and memory the slower. Frozen weights need no gradient."""
    passes = 2 + checkpointing + (way['method'] == 'full')  # each 2 operations a parameter and token
    read = 2 * plan.parameters * passes * (1.5 if way['method'] == 'qlora' else 1)
    return max(2 * plan.parameters * passes * tokens / TERAFLOPS, read / GB_PER_SECOND) / tokens


def print_fit(config, given, gpu_gb):
    rows = fit(config, gpu_gb * 2**30, given)
    if not rows:
        seq = given.get('seq', default('seq'))
        print(f'nothing fits {gpu_gb:g} GB: use a --seq below {seq}, a smaller model or a larger card')
        return
    count = min(row[3].parameters - row[3].trained * (row[3].trained < row[3].parameters) for row in rows)
    print(f'{count:,} parameters: what fits {gpu_gb:g} GB, by traces, fastest first, with the largest')
    print(f'batch that leaves {MARGIN:.0%} free; where lengths vary, plan {MARGIN_VARYING:.0%}. Planned, not measured.')
    print(f'{"":14} {"checkpoints":>11} {"batch":>6} {"GB":>6} {"speed":>6}')
    for name, checkpointing, batch, plan, seconds in rows:
        yes, speed = 'yes' if checkpointing else 'no', rows[0][-1] / seconds
        print(f'{name:14} {yes:>11} {batch:6d} {plan.total / 1e9:6.2f} {speed:6.2f}')
        words = WAYS[name] | dict(batch=batch, checkpointing=checkpointing)
        print('    ' + ' '.join(f'--{key}={value}' for key, value in words.items()))


# ---- the command ---------------------------------------------------------------------------------------------------


def default(name):
    return inspect.signature(trace_hf).parameters[name].default


def help_text():
    """The head of hf.py, the flags of OWN, and trace_hf's arguments as flags, from the comments in its source."""
    comments = dict(re.findall(r'^    (\w+)=.*,  # (.*)$', inspect.getsource(trace_hf).split('"""')[0], re.MULTILINE))
    lines = [hf.__doc__.strip(), '']
    lines += [f'  {f"--{name}={example}".rstrip("="):28} {words}' for name, (example, words) in OWN.items()]
    for name, parameter in list(inspect.signature(trace_hf).parameters.items())[1:]:
        lines.append(f'  {f"--{name}={parameter.default}":28} {comments[name]}')
    return '\n'.join(lines)


def read(argv):
    """-> path, trace_hf's arguments, the flags of OWN. Raises ValueError."""
    known = {name: p.default for name, p in inspect.signature(trace_hf).parameters.items() if name != 'config'}
    given, own, path = {}, {}, None
    for word in argv:
        name, _, value = word.removeprefix('--').partition('=')
        if name == 'hf':
            path = value
        elif name == 'recipe':
            if value not in RECIPES:
                raise ValueError(f'{word} is not known: use one of {", ".join(RECIPES)}')
            own[name] = RECIPES[value]
        elif name in ('gpu_gb', 'gpus'):
            own[name] = number(name, value, int if name == 'gpus' else float)
            if not 0 < own[name] < 1e6:
                raise ValueError(f'{word} cannot be: use a size as in --{name}={OWN[name][0]}')
        elif name in ('json', 'fit'):
            if value:
                raise ValueError(f'{word} is not how it is typed: use --{name}')
            own[name] = True
        elif name in FOREIGN:
            raise ValueError(f'{word} does not go with --hf: {FOREIGN[name]}')
        elif name not in known:
            raise ValueError(f'--{name} does not go with --hf: use --hf, --{", --".join([*OWN, *known])}')
        elif isinstance(known[name], bool):
            if value not in ('', 'True', 'False', '1', '0'):
                raise ValueError(f'--{name}={value} is neither: use True or False')
            given[name] = value in ('', 'True', '1')
        else:
            given[name] = number(name, value, type(known[name])) if not isinstance(known[name], str) else value
    if not path:
        raise ValueError('--hf is missing: give a folder with a config.json, or such a file')
    check(own, given)
    return path, own.pop('recipe', {}) | given, own


def check(own, given):
    if 'fit' in own and 'gpus' in own:
        raise ValueError('--fit tries one card with --hf: use --gpus with a --method and --batch of what it prints')
    if {'fit', 'gpus'} & set(own) and 'json' in own:
        raise ValueError(f'--{"fit" if "fit" in own else "gpus"} prints a table of its own: leave out --json')
    if tried := [name for name in ('method', 'optimizer', 'batch', 'checkpointing') if name in given and 'fit' in own]:
        raise ValueError(f'--fit tries each way and batch by itself: leave out --{" and --".join(tried)}')
    if 'recipe' in own and 'fit' in own:
        raise ValueError('--fit tries its own ways: leave out --recipe')
    if 'gpus' in own and given.get('optimizer') == 'lomo':
        raise ValueError('--optimizer=lomo leaves no gradients to exchange: use another one with --gpus')


def number(name, value, kind):
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f'--{name}={value} is no number: use one, as in --{name}=8') from None


def main(argv):
    """What `python memest.py ARGV` does where --hf is among its words. -> 0, or 1 and a sentence."""
    if '--help' in argv or '-h' in argv:
        print(help_text())
        return 0
    try:
        path, given, own = read(argv)
        if 'fit' in own:
            print_fit(hf.read_config(path), given, own.get('gpu_gb', 24.0))
            return 0
        plan = trace_hf(path, **given)
        if 'gpus' in own:
            print_gpus(plan, given, own['gpus'], own.get('gpu_gb', 24.0))
            return 0
    except ValueError as e:
        print(f'error: {e}', file=sys.stderr)
        return 1
    print(json.dumps(vars(plan) | {'total': plan.total}) if 'json' in own else table(plan, own.get('gpu_gb')))
    return 0
