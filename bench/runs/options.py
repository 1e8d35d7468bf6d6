"""
GaLore's options and descendants on the laptop config, at equal steps: makes options.md and options.png.

    python -m bench.runs.options    # 15 runs, 40 minutes on two CPU cores; finished ones are kept
"""

from bench import parser

if __name__ == '__main__':
    parser().parse_args()

import os
import re

from bench import plot
from bench.runs import laptop

RATES = ['5e-3', '1e-2']
APOLLO = ['--method=apollo', '--rank=48', '--update_proj_gap=50']
QGALORE = ['--method=qgalore', '--weight_bits=16', '--basis_bits=16', '--lazy=0']  # all off; runs turn on one
SHORT = ['--max_iters=300', '--warmup_iters=30', '--eval_interval=100']
# heading, then (name, learning rates, flags); each name counts with its best rate
PARTS = [
    (
        'Descendants, each at its best rate',
        [
            ('galore', ['1e-2'], []),  # the best of three, see laptop.md
            ('fira', RATES, ['--method=fira']),
            ('apollo', RATES, APOLLO),
            ('apollo-mini, rank 1', RATES, [*APOLLO, '--tensorwise', '--scale=11.3', '--rank=1']),
        ],
    ),
    (
        'Moments, bits and lazy refreshes, after 300 steps',
        [
            ('galore', ['1e-2'], SHORT),
            ('8-bit states', ['1e-2'], [*SHORT, '--state_bits=8']),
            ('moments reset', ['1e-2'], [*SHORT, '--moments=reset']),
            ('moments rotate', ['1e-2'], [*SHORT, '--moments=rotate']),
            ('4-bit basis', ['1e-2'], [*SHORT, '--basis_bits=4']),
            ('8-bit weights', ['1e-2'], [*SHORT, *QGALORE, '--weight_bits=8']),
            ('lazy refresh', ['1e-2'], [*SHORT, *QGALORE, '--lazy=0.6']),
            (
                '8-bit states and weights, 4-bit basis and lazy refresh together',
                ['1e-2'],
                [*SHORT, '--method=qgalore', '--state_bits=8', '--lazy=0.6'],
            ),
        ],
    ),
]


def main():
    lines = [
        "# GaLore's options and descendants on the laptop config",
        '',
        'Made by `python -m bench.runs.options` (two CPU cores): 3.3M parameters, 750 steps of 2,048 tokens',
        "of Python's standard library, rank 48 of 192, T 50.",
        '',
    ]
    curves = {}
    for heading, rows in PARTS:
        lines += [
            f'## {heading}',
            '',
            '| | learning rate | tried | val loss | over the first row |',
            '|---|---|---|---|---|',
        ]
        first = None
        for name, rates, flags in rows:
            runs = {rate: laptop.run('galore', rate, *laptop.PLAIN, *flags) for rate in rates}
            rate = min(runs, key=lambda rate: float(runs[rate]['val_loss']))
            loss = float(runs[rate]['val_loss'])
            first = first or loss
            tried = ', '.join(f'{r}: {found["val_loss"]}' for r, found in runs.items() if len(rates) > 1)
            lines.append(f'| {name} | {rate} | {tried if len(rates) > 1 else ""} | {loss:.4f} | {loss / first:.4f} |')
            if len(rates) > 1:
                curves[f'{name}, lr {rate}'] = runs[rate]['folder']
        lines.append('')
    lines += ['![val loss](options.png)', '']
    with open(os.path.join(laptop.ROOT, 'results', 'options.md'), 'w') as f:
        f.write('\n'.join(lines))
    plot.draw(curves.values(), os.path.join(laptop.ROOT, 'results', 'options.png'), labels=list(curves))
    print(re.sub(r'\n\n+', '\n', '\n'.join(lines)))


if __name__ == '__main__':
    main()
