"""
GaLore against a tuned AdamW on the laptop configs, each at its best learning rate: makes laptop.md and laptop.png.

    python -m bench.runs.laptop    # some fourteen runs of three minutes on two CPU cores; finished ones are kept

Where the best rate is the lowest or the highest tried, the next one is tried, too.
"""

from bench import parser

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('--finished', action='store_true', help='start nothing: the table of what is finished')
    args = asked.parse_args()

import math
import os

from bench import plot
from bench.measure import table
from bench.runs.jobs import do
from plumbing.build import ROOT

OUT = os.path.join('out', 'laptop')

# Embedding and head learn at a rate of their own under every method, so that the others' rate is of the blocks alone.
TABLE_RATE = 1.6e-2
PLAIN = ['--table_lr_scale=1', '--beta2=0.999', '--weight_decay=0', '--grad_clip=0']
# Name: (config, the middle rate, flags, the tables' rate; None: the blocks'). At full rank GaLore is AdamW in a rotated
# basis, and what it loses against GaLore, or gains, comes from the rank.
ROWS = {
    'AdamW': ('adamw', 1e-3, [], TABLE_RATE),
    'GaLore, rank 48 of 192': ('galore', 1e-2, [], TABLE_RATE),
    'GaLore, full rank': ('galore', 5e-3, ['--rank=192'], TABLE_RATE),
    'AdamW, tables at half that rate': ('adamw', 1e-3, [], TABLE_RATE / 2),
    'AdamW, tables at twice that rate': ('adamw', 1e-3, [], TABLE_RATE * 2),
    'AdamW, one rate, betas and decay as of Adam': ('adamw', 2e-3, PLAIN, None),
}


def run(config, rate, *flags, finished=False):
    """The final lines of one run of config/CONFIG_laptop.py as a dict, read from its log if it is finished; None if it
    is not, and only the `finished` are asked for."""
    folder = os.path.join(OUT, '_'.join([config, f'{float(rate):g}', *flags]).replace('--', ''))
    words = ['train.py', f'config/{config}_laptop.py', f'--learning_rate={rate}', f'--out_dir={folder}', '--overwrite']
    printed = do([*words, *flags], os.path.join(folder, 'log.txt'), finished)
    if printed is None:
        return None
    lines = printed.splitlines()
    found = dict(line.split(': ', 1) for line in lines[-12:])
    found['sample'] = [line for line in lines if line.startswith('sample: ')][-1].removeprefix('sample: ')
    return found | {'folder': os.path.join(ROOT, folder), 'loss': float(found['val_loss'])}


def tuned(name, finished):
    """{rate: its run}: three rates, each twice the one before, and more while the best is the last on its side; one
    where the tables' rate is what is varied."""
    config, middle, flags, tables = ROWS[name]
    tried = {}

    def once(step):
        rate = middle * 2.0**step
        more = [f'--table_lr_scale={tables / rate:g}'] if tables else []
        return run(config, f'{rate:g}', *flags, *more, finished=finished)

    asked = [0] if 'that rate' in name else [-1, 0, 1]
    while asked:
        tried |= {step: found for step in asked if (found := once(step))}
        best = min(tried, key=lambda step: tried[step]['loss'], default=None)
        asked = [] if len(tried) < 3 or finished else [s for s in (best - 1, best + 1) if s not in tried]
    return {middle * 2.0**step: tried[step] for step in sorted(tried)}


def main(args):
    runs = {name: tuned(name, args.finished) for name in ROWS}
    best = {name: min(tried, key=lambda rate: tried[rate]['loss']) for name, tried in runs.items() if tried}
    losses = {name: runs[name][rate]['loss'] for name, rate in best.items()}
    head = ['method', 'rate', 'val loss', 'over AdamW', 'rates tried']
    rows = [
        [name, f'{rate:g}', f'{losses[name]:.4f}', f'{losses[name] / losses.get("AdamW", math.nan):.4f}',
         ', '.join(f'{rate:g}: {found["loss"]:.4f}' for rate, found in runs[name].items())]
        for name, rate in best.items()
    ]  # fmt: skip
    lines = [
        '# GaLore and AdamW on the laptop configs',
        '',
        'Made by `python -m bench.runs.laptop` (two CPU cores): 3.3M parameters, 750 steps of 2,048 tokens',
        "of Python's standard library, one seed. Each method at its best learning rate: three, and more while the best",
        'was the last on its side; where one alone is told, it was the best in shelf.md. Embedding and head learn at',
        f'{TABLE_RATE:g} by AdamW, betas are .9 and .95, gradients are clipped to 1, weights decay by 0.1.',
        '',
        *table(head, rows),
        '',
    ]
    shown = [name for name in best if 'that rate' not in name]
    for name in shown[:2]:
        lines += [f'A sample of {name} at the end: `{runs[name][best[name]]["sample"]}`', '']
    lines += ['![val loss](laptop.png)', '']
    with open(os.path.join(ROOT, 'results', 'laptop.md'), 'w') as f:
        f.write('\n'.join(lines))
    labels = [f'{name}, {best[name]:g}' for name in shown]
    folders = [runs[name][best[name]]['folder'] for name in shown]
    plot.draw(folders, os.path.join(ROOT, 'results', 'laptop.png'), labels=labels)
    print('\n'.join(lines))


if __name__ == '__main__':
    main(args)
