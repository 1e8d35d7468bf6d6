"""
LoQT on the laptop config, against AdamW, GaLore and LoRA, and with single parts changed: makes loqt.md and loqt.png.

    python -m bench.runs.loqt    # 22 runs, two at a time, 80 minutes on two CPU cores; finished ones are kept
"""

from bench import parser

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('--clock', help='only clock the merges of the laptop run, seconds to this file')
    args = asked.parse_args()

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

if len(sys.argv) == 1:
    os.environ['OMP_NUM_THREADS'] = '1'  # two runs at a time, each on a core of its own
from bench import plot
from bench.runs import laptop

RATES = ['5e-3', '1e-2', '2e-2']
LORA = ['--method=lora', '--rank=48', '--scale=0.667']  # alpha 32, as in the papers' baseline
# (name, config, learning rates, flags); each name counts with its best rate
METHODS = [
    ('AdamW, full', 'adamw', ['1e-3', '2e-3', '4e-3'], laptop.PLAIN),
    ('AdamW in a rotated basis, two rates', 'galore', RATES, [*laptop.PLAIN, '--rank=192']),
    ('GaLore', 'galore', RATES, laptop.PLAIN),
    ('LoQT-nq', 'loqt', RATES, ['--quantize=none']),
    ('LoQT', 'loqt', RATES, []),
    ('LoRA', 'loqt', ['1e-3', '2e-3', '5e-3'], [*LORA, '--quantize=none']),
]
PARTS = [
    ('as above', []),
    ('no compensation', ['--compensation=0']),
    ('no growing distances', ['--psi=0']),
    ('moments reset', ['--moments=reset']),
    ('moments rotate', ['--moments=rotate']),
]


def share_of_merges():
    """(seconds of all steps of the laptop run, seconds of its merges), measured in a process of its own."""
    path = os.path.join(laptop.ROOT, 'out', 'laptop', 'share.json')
    if not os.path.exists(path):
        environment = {key: value for key, value in os.environ.items() if key != 'OMP_NUM_THREADS'}
        words = [sys.executable, '-m', 'bench.runs.loqt', f'--clock={path}']
        subprocess.run(words, cwd=laptop.ROOT, check=True, env=environment)
    with open(path) as f:
        return json.load(f)


def clock_merges(path):
    import configurator
    import loqt
    import train

    seconds = {'steps': 0.0, 'merges': 0.0}

    def clocked(name, function):
        def call(*words):
            started = time.perf_counter()
            out = function(*words)
            seconds[name] += time.perf_counter() - started
            return out

        return call

    loqt.merge, train.training_step = clocked('merges', loqt.merge), clocked('steps', train.training_step)
    with tempfile.TemporaryDirectory() as folder:
        config = os.path.join(laptop.ROOT, 'config', 'loqt_laptop.py')
        flags = [f'--out_dir={folder}/run', '--eval_interval=750', '--eval_tokens=4096', '--sample_tokens=0']
        train.cli(configurator.load(train.__file__, [config, *flags]))
    with open(path, 'w') as f:
        json.dump([seconds['steps'], seconds['merges']], f)


def main():
    jobs = [(config, rate, *flags) for _, config, rates, flags in METHODS for rate in rates]
    with ThreadPoolExecutor(2) as pool:
        runs = dict(zip(jobs, pool.map(lambda job: laptop.run(*job), jobs)))
        loss = {job: float(found['val_loss']) for job, found in runs.items()}
        best_rate = min(RATES, key=lambda rate: loss['loqt', rate])
        parts = [('loqt', best_rate, *flags) for _, flags in PARTS]
        runs |= dict(zip(parts, pool.map(lambda job: laptop.run(*job), parts)))
    loss = {job: float(found['val_loss']) for job, found in runs.items()}
    lines = [
        '# LoQT on the laptop config',
        '',
        'Made by `python -m bench.runs.loqt` (two CPU cores): 3.3M parameters, 750 steps of 2,048 tokens of',
        "Python's standard library, rank 48 of 192, tau 50, psi 1.2, five rounds of compensation.",
        'Each method at the best of three learning rates.',
        '',
        '| method | learning rate | tried | val loss | over AdamW | over AdamW with two rates |',
        '|---|---|---|---|---|---|',
    ]
    best = {}
    for name, config, rates, flags in METHODS:
        rate = min(rates, key=lambda rate: loss[(config, rate, *flags)])
        best[name] = (config, rate, *flags)
        tried = ', '.join(f'{rate}: {loss[(config, rate, *flags)]:.4f}' for rate in rates)
        ratios = [f'{loss[best[name]] / loss[best[other]]:.4f}' for other in list(best)[:2]] + [''] * (len(best) == 1)
        lines.append(f'| {name} | {rate} | {tried} | **{loss[best[name]]:.4f}** | {" | ".join(ratios)} |')
    lines += [
        '',
        'All methods train embedding, head and norms by plain Adam. All but AdamW give them a larger rate than the',
        'blocks, which helps in this run; the second row has such rates and no low rank: a harder comparison.',
        '',
        f'## Single parts changed, at learning rate {best_rate}',
        '',
        '| | val loss | over the first row |',
        '|---|---|---|',
    ]
    for (name, flags), job in zip(PARTS, parts):
        shown = f' (`{" ".join(flags)}`)' if flags else ''
        lines.append(f'| {name}{shown} | {loss[job]:.4f} | {loss[job] / loss[parts[0]]:.4f} |')
    steps, merges = share_of_merges()
    lines += ['', f'All merges of that run, on two threads: {merges:.1f} s of {steps:.0f} s of training steps, '
              f'{100 * merges / steps:.1f} %.']  # fmt: skip
    lines += ['', '![val loss](loqt.png)', '']
    with open(os.path.join(laptop.ROOT, 'results', 'loqt.md'), 'w') as f:
        f.write('\n'.join(lines))
    labels = [f'{name}, lr {job[1]}' for name, job in best.items()]
    folders = [runs[job]['folder'] for job in best.values()]
    plot.draw(folders, os.path.join(laptop.ROOT, 'results', 'loqt.png'), labels=labels)
    print('\n'.join(lines))


if __name__ == '__main__':
    clock_merges(args.clock) if args.clock else main()
