"""
GaLore against AdamW on the laptop configs, each with its own best learning rate: makes laptop.md and laptop.png.

    python -m bench.runs.laptop    # nine runs of about three minutes on two CPU cores; finished ones are kept
"""

from bench import parser

if __name__ == '__main__':
    parser().parse_args()

import os
import subprocess
import sys

from bench import plot
from plumbing.build import ROOT

TRIED = {'adamw': ['1e-3', '2e-3', '4e-3'], 'galore': ['5e-3', '1e-2', '2e-2']}
# Embedding and head take GaLore's larger learning rate without its scale. At full rank GaLore is AdamW with these two
# rates: the control's gain over AdamW comes from the rates, and its lead over GaLore from the rank.
CONTROL = '--rank=192'


def run(method, rate, *flags):
    """The final lines of one run as a dict, read from its log if it is finished."""
    out_dir = os.path.join('out', 'laptop', '_'.join([method, rate, *flags]).replace('--', ''))
    log = os.path.join(ROOT, out_dir, 'log.txt')
    if not os.path.exists(log):
        os.makedirs(os.path.dirname(log), exist_ok=True)
        words = [f'config/{method}_laptop.py', f'--learning_rate={rate}', f'--out_dir={out_dir}', '--overwrite', *flags]
        print('python train.py', *words, flush=True)
        with open(log + '.part', 'w') as f:
            subprocess.run([sys.executable, 'train.py', *words], cwd=ROOT, stdout=f, check=True)
        os.rename(log + '.part', log)  # an interrupted run starts again
    lines = read_lines(log)
    found = dict(line.split(': ', 1) for line in lines[-12:])
    found['sample'] = [line for line in lines if line.startswith('sample: ')][-1].removeprefix('sample: ')
    return found | {'folder': os.path.join(ROOT, out_dir)}


def read_lines(path):
    with open(path) as f:
        return f.read().splitlines()


def main():
    runs = {(method, rate): run(method, rate) for method, rates in TRIED.items() for rate in rates}
    losses = {key: float(r['val_loss']) for key, r in runs.items()}
    best = {method: min((key for key in runs if key[0] == method), key=losses.get) for method in TRIED}
    lines = [
        '# GaLore and AdamW on the laptop configs',
        '',
        'Made by `python -m bench.runs.laptop` (two CPU cores): 3.3M parameters, 750 steps of 2,048 tokens',
        "of Python's standard library, GaLore with rank 48 of 192.",
        '',
        '| method | learning rate | val loss | train loss |',
        '|---|---|---|---|',
    ]
    for key, r in runs.items():
        val = f'**{r["val_loss"]}**' if key in best.values() else r['val_loss']
        lines.append(f'| {key[0]} | {key[1]} | {val} | {r["train_loss"]} |')
    controls = {rate: run('galore', rate, CONTROL) for rate in TRIED['galore']}
    best_control = min(float(r['val_loss']) for r in controls.values())
    for rate, r in controls.items():
        val = f'**{r["val_loss"]}**' if float(r['val_loss']) == best_control else r['val_loss']
        lines.append(f'| galore, {CONTROL.removeprefix("--")} | {rate} | {val} | {r["train_loss"]} |')
    ratio = losses[best['galore']] / losses[best['adamw']]
    lines += ['', f"GaLore's best val loss over AdamW's best: {ratio:.4f} (required: below 1.03).", '']
    lines += [
        "GaLore updates embedding and head with its full rate, five times AdamW's best, and the blocks with a quarter",
        'of that. The last rows have the same two rates at full rank, so they are AdamW in a rotated basis: they show',
        'which part of the difference comes from the rates, and which from the subspace.',
        '',
    ]
    for method, key in best.items():
        lines += [f'A sample of {method} at the end: `{runs[key]["sample"]}`', '']
    lines += ['![val loss](laptop.png)', '']
    with open(os.path.join(ROOT, 'results', 'laptop.md'), 'w') as f:
        f.write('\n'.join(lines))
    labels = [f'{method}, lr {rate}' for method, rate in runs]
    plot.draw([r['folder'] for r in runs.values()], os.path.join(ROOT, 'results', 'laptop.png'), labels=labels)
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
