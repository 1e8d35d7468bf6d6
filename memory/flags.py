"""
memest.py's command line: its own flags, and those of train.py beside them. Nothing here needs torch.
"""

import math
import sys
from pathlib import Path

import configurator

TRAIN = str(Path(__file__).resolve().parent.parent / 'train.py')

FLAGS = {
    'gpu_gb': (float, 24, 'the card, as it is sold: 24 x 2^30 bytes; the plan is then of bf16 on it'),
    'fit': (bool, '', 'every method, the largest batch that fits, and the flags to type; with --gpus on all of them'),
    'gpus': (int, 4, 'what each of several GPUs holds'),
    'tp': (int, 2, 'with --gpus: size of the tensor-parallel groups'),
    'instant': (bool, '', 'by the formula, without a trace'),
    'json': (bool, '', 'numbers instead of a table'),
    'calibrate': (bool, '', 'how fast this device is, measured anew in ten seconds, for the seconds of a step'),
    'plot': (str, 'plan.png', 'what lives there while the model is built and takes three steps, as a picture'),
    'hf': (str, 'path/to/config.json', "transformers' own model instead: see python memest.py --hf --help"),
    'script': (str, "'train_mine.py --lr=1e-4'", "somebody else's training script, run on fake tensors"),
}


def read(argv, moved):
    """-> memest.py's own flags as a dict, and the config that the other words make of train.py's keys; None with
    --hf, which has keys of its own. Prints the help, or what is wrong, and exits. moved: as in configurator.load."""
    if any(word.partition('=')[0] == '--hf' for word in argv):
        return {}, None
    if not argv or '--help' in argv or '-h' in argv:
        print(help_text())
        sys.exit(0)
    try:
        own, rest = split(argv)
    except ValueError as error:
        sys.exit(f'error: {error}')
    if 'script' in own:
        return own, None
    return own, configurator.load_or_exit(TRAIN, [*rest, '--dry_run'], moved=moved)


def for_a_card(own, config):
    """Where one is given, or only a formula for cards is asked for, the plan is of a card: bf16 unless dtype says else.
    Raises ValueError where --device=cpu says the opposite."""
    asked = [name for name in ('gpu_gb', 'gpus', 'fit', 'instant') if name in own]
    if asked and config.device == 'cpu':
        raise ValueError(f'--{asked[0]} plans for a card, and --device=cpu is none: leave out one of them')
    if asked:
        config.device = 'cuda'


def help_text():
    lines = ['python memest.py CONFIG [--key=value ...], keys as train.py has them, and of its own:\n']
    for name, (kind, example, meaning) in FLAGS.items():
        lines.append(f'  {f"--{name}" if kind is bool else f"--{name}={example}":28} {meaning}')
    return '\n'.join([*lines, f"  {'--model=llmem':28} LLMem's published equations instead"])


def split(argv):
    """-> (memest.py's own flags as a dict, the other words). Raises ValueError for a bad one."""
    own, rest = {}, []
    for word in argv:
        name, equals, value = word.removeprefix('--').partition('=')
        name = name.replace('-', '_')
        if word == '--model=llmem':
            own['llmem'] = True
            continue
        if word.startswith('--gpu') and name not in FLAGS:
            raise ValueError(f'--{name} is unknown: use --gpu_gb=24, the size of the card, or --gpus=4, how many')
        if not word.startswith('--') or name not in FLAGS:
            rest.append(word)
            continue
        kind, example, _ = FLAGS[name]
        try:
            own[name] = True if kind is bool else kind(value)
        except ValueError:
            raise ValueError(f'--{name}={value} is not a number: use for example --{name}={example}') from None
        if kind in (int, float) and not 0 < own[name] < math.inf:
            raise ValueError(f'--{name}={value} is not a size: use more than 0, for example --{name}={example}')
        if bool(equals) == (kind is bool) or (kind is str and not value):
            raise ValueError(f'{word} is not how it is typed: use --{name}{f"={example}" if example else ""}')
    if 'script' in own and (beside := [*(set(own) - {'script', 'gpu_gb', 'json'}), *rest]):
        raise ValueError(f'--script plans what its own words say, beside --gpu_gb and --json: leave out {beside[0]}')
    tables = [name for name in ('fit', 'gpus', 'llmem') if name in own]
    if tables and {'json', 'plot', 'instant'} & set(own):
        raise ValueError(f'--{tables[0]} prints a table of its own: leave out --json, --plot and --instant')
    if 'plot' in own and 'instant' in own:
        raise ValueError('--plot draws a trace, and --instant makes none: leave out one of them')
    if 'tp' in own and ('gpus' not in own or 'fit' in own):
        raise ValueError('--tp cuts each group of --gpus: type --gpus=4 --tp=2, without --fit')
    if 'calibrate' in own and (formula := [name for name in ('instant', 'gpus', 'llmem') if name in own]):
        raise ValueError(f'--calibrate is of the seconds of a trace, and --{formula[0]} makes none: leave out one')
    if {'fit', 'llmem'} <= set(own):
        raise ValueError("--model=llmem prints LLMem's equations alone: leave out --fit")
    return own, rest
