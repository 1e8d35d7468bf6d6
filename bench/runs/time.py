"""
Seconds of a step as memest plans them against measured ones, every method at three shapes: makes time.md.

    OMP_NUM_THREADS=1 taskset -c 1 python -m bench.runs.time     # ten minutes of a CPU core; finished ones are kept

The device is measured anew beside each method, since what else runs on a machine changes its rates from minute to
minute. On one thread all seconds are the processor's. A step is the median of some, after two that make states and warm
up; of BAdam the mean over its blocks, each active once. Where a method makes new bases or merges now and then, one step
in which all of its matrices are due is planned and measured, too, and the mean step has its share of that.
"""

from bench import parser

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('--methods', default='', help='some of them alone, a comma between two')
    asked.add_argument('--shapes', default='', help='the same of shapes, a semicolon between two')
    asked.add_argument('--anew', action='store_true', help='compare again what is finished')
    args = asked.parse_args()

import json
import os
import statistics
import time

import torch

import adam
import configurator
import quant
import train
from bench.measure import clear, interleaved, table, timed
from memory import rates
from model import LLaMA
from plumbing.build import ROOT, layers_of, new_shape

KEPT = os.path.join(ROOT, 'out', 'time')
METHODS = 'adamw galore qgalore fira apollo sumo loqt lora sltrain muon scale badam grass adalomo ldadam adarankgrad'
SHAPES = {
    '3M': '--model=9m --n_embd=192 --n_head=6 --n_inner=512 --vocab_size=4096 --batch_size=8 --rank=48',
    '9m': '--model=9m --batch_size=2 --gradient_accumulation_steps=2 --rank=32',
    '60m, 2 blocks': '--model=60m --n_layer=2 --batch_size=1 --rank=128',
}
STEPS, SECONDS = 3, 1.0  # of a step's median; of each calibration


def config_of(method, words):
    known = vars(configurator.load(train.__file__, [f'--method={method}']))
    words = [word for word in words.split() if word[2:].partition('=')[0] in known]
    flags = [f'--method={method}', '--device=cpu', '--dtype=float32', *words, '--update_proj_gap=100']
    flags = [flag for flag in flags if flag[2:].partition('=')[0] in known]
    return configurator.load(train.__file__, flags)


def measured(config, shape, clock):
    """-> seconds of an ordinary step, and of one in which all matrices are due."""
    torch.manual_seed(0)
    model = LLaMA(shape, dtype=torch.float32, linear=layers_of(config))
    optimizer = train.setup(model, config)
    tokens = torch.randint(shape.vocab_size, (config.gradient_accumulation_steps, config.batch_size, 257))
    batches = [(part[:, :-1].contiguous(), part[:, 1:].contiguous(), None) for part in tokens]

    def step():
        train.training_step(model, optimizer, batches, 1e-4, 'cpu')

    def turned(block):
        optimizer.turn |= dict(active=block, taken=1)
        optimizer.freeze()
        return timed(step, clock)

    step()
    step()
    if hasattr(optimizer, 'blocks'):
        ordinary = statistics.mean(turned(block) for block in optimizer.blocks)
    else:
        ordinary = interleaved({'': step}, STEPS, clock=clock)['']
    optimizer.make_due([*adam.targeted(model, config, (torch.nn.Linear, quant.Packed)).values()])
    return ordinary, timed(step, clock)


def compared(method, words):
    """-> planned and measured seconds of an ordinary step, of one in which all is due, and the share of that."""
    config = config_of(method, words)
    shape = new_shape(config, config.vocab_size or 32000)
    work = train.plan_memory(config, shape, 'cpu', torch.float32).work
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    known = rates.load('cpu', torch.float32, bits=True, anew=True, seconds=SECONDS)
    real = measured(config, shape, clock)
    again = rates.load('cpu', torch.float32, bits=True, anew=True, seconds=SECONDS)
    due = work.ordinary.copy()
    due.update(work.renewal)
    planned = [
        statistics.mean(sum(some.seconds(counted).values()) for some in (known, again))
        for counted in (work.ordinary, due)
    ]
    return dict(planned=planned, measured=real, share=work.share)


def finished(shape, method):
    """What was compared in an earlier call, or None."""
    try:
        with open(os.path.join(KEPT, f'{shape} {method}.json')) as f:
            return json.load(f)
    except OSError:
        return None


def rows_of_table():
    """-> rows, and all errors in per cent."""
    rows, errors = [], []
    for shape in SHAPES:
        for method in METHODS.split():
            if one := finished(shape, method):
                means = [a + one['share'] * (b - a) for a, b in (one['planned'], one['measured'])]
                errors.append(100 * (means[0] / means[1] - 1))
                due = [f'{1000 * one[who][1]:.0f}' if one['share'] else '' for who in ('planned', 'measured')]
                rows.append([shape, method, *(f'{1000 * mean:.0f}' for mean in means), f'{errors[-1]:+.1f} %', *due])
    return rows, errors


def main(args):
    os.makedirs(KEPT, exist_ok=True)
    for shape in args.shapes.split(';') if args.shapes else SHAPES:
        for method in (args.methods or METHODS.replace(' ', ',')).split(','):
            if args.anew or not finished(shape, method):
                found = compared(method, SHAPES[shape])
                print(shape, method, found, flush=True)
                with open(os.path.join(KEPT, f'{shape} {method}.json'), 'w') as f:
                    json.dump(found, f)
                clear()
    rows, errors = rows_of_table()
    off = [abs(error) for error in errors]
    shapes = '; '.join(f'{name} `{words}`' for name, words in SHAPES.items())
    lines = [
        '# Seconds of a step, planned and measured',
        '',
        f'Made by `python -m bench.runs.time` on {rates.cpu_name()}, {torch.get_num_threads()} thread(s), torch '
        f'{torch.__version__}.',
        'Milliseconds of the processor; a step on average, with its share of new bases or merges (T 100), and one in',
        f'which all matrices are due. 256 tokens in a window; {shapes}.',
        '',
        f'Off by {statistics.mean(off):.1f} % on average, {max(off):.1f} % at most; '
        f'{sum(error <= 15 for error in off)} of {len(off)} within 15 %.',
        '',
        *table(['shape', 'method', 'planned', 'measured', 'error', 'all due: planned', 'measured'], rows),
        '',
    ]
    with open(os.path.join(ROOT, 'results', 'time.md'), 'w') as f:
        f.write('\n'.join(lines))
    print('\n'.join(lines))


if __name__ == '__main__':
    main(args)
