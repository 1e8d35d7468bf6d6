"""
Time and memory of every method, measured side by side in one run: tables in results/bench.md, a picture beside them.

    python -m bench                                          # all of it, about 25 minutes on two CPU cores
    python -m bench --only=training --training_sizes=60m:2   # one part, printed; files are written only by a full run
    python -m bench --only=refresh --refresh_sizes=350m:2

Methods take turns, one step each, and a number is the median over the rounds: whatever slows the machine for a while
slows all of them, so the ratios stay valid. Ours are compared with torch's AdamW, bitsandbytes, transformers and, if it
is installed, the authors' own package (pip install --no-deps galore-torch).
"""

import os
import shlex
import sys
import time

import torch

import configurator
from bench import gradients, merges, optimizers, states
from bench import steps as whole_steps  # `steps` is a key
from bench.measure import keep_freed_memory, matmul_rate, table
from bench.optimizers import BASELINE
from model import SIZES
from plumbing.build import ROOT

# ---- config ----------------------------------------------------------------------------------------------------------
only = 'all'  # 'all' | 'optimizers' | 'training' | 'stall' | 'states' | 'refresh' | 'memory' | 'merge' | 'nf4' |
#                'peaks': the part to measure
out = 'results/bench.md'  # file for the tables of a full run, with the picture beside it; '': none
amortised_over = 200  # T: steps between two refreshes of a basis, over which the cost of one is spread

# A size is a name in model.SIZES and a number of blocks, as in 130m:12; without a number, all blocks.
# optimizers: steps on given gradients, without a model
optimizer_sizes = '60m:1 130m:1 350m:1 1b:1'  # models whose block matrices are updated
repeats = 15  # timed steps of each method
seconds = 3.0  # a method that has used this many skips further rounds; each has at least 3 steps and one refresh

# training, stall: whole training steps on random tokens
training_sizes = '130m:12 1b:6'  # models for whole steps
rounds = 3  # timed steps of each method
batch_size = 8  # windows of 256 tokens in a step
memory_gb = 20  # methods are measured in groups that take at most this together, each with torch's AdamW in it
stall_sizes = '130m:1 1b:1'  # models for the stall: few blocks, since whole periods of steps are timed
periods = 2  # refresh periods to time; each step counts with its fastest time

# states: bytes of whole models, nothing is timed
state_sizes = '60m 130m 350m 1b'  # models whose states are counted, at two bytes per number
claim_sizes = '1b 7b'  # models for the paper's percentages: 8-bit states, total training memory
real_sizes = '60m 130m 350m 1b'  # models that take real steps; the others are traced on fake tensors

# refresh, memory: the gradients of a real run
refresh_sizes = '350m:2 1b:1'  # models that give the gradients
rank = 0  # of the bases; 0: the paper's for the size
steps = 120  # maximum training steps; a run ends once every shape of gradient has its refreshes
refreshes = 12  # refreshes to compare with the SVD, for each shape
minutes = 2.0  # time limit of each model, but every shape gets at least two refreshes
update_proj_gap = 50  # T
memory_sizes = '350m:2'  # models whose live gradients are counted

# merge: LoQT
merge_sizes = '130m 1b'  # models whose layers are merged
# ---- end of config ---------------------------------------------------------------------------------------------------


def problems(config):
    """One sentence for each mistyped size."""
    found = []
    for key, text in vars(config).items():
        for word in text.split() if key.endswith('_sizes') else ():
            name, colon, blocks = word.partition(':')
            whole = key in ('state_sizes', 'claim_sizes', 'real_sizes', 'merge_sizes')
            if name not in SIZES or (colon and (whole or not blocks.isdigit() or blocks == '0')):
                shape = 'a NAME' if whole else 'NAME or NAME:BLOCKS, with a NAME'
                found.append(f'{key}: {word} is not {shape} of {" ".join(SIZES)}')
    return found


# {name: (function that returns the rows, heading, description with keys of the config in braces, head of the table)}
PARTS = optimizers.PARTS | whole_steps.PARTS | states.PARTS | gradients.PARTS | merges.PARTS


def draw(rows, png):
    """Two panels: the time of a training step and of an optimizer's step, relative to torch's fused AdamW."""
    try:
        import matplotlib
    except ImportError:
        print('no picture: matplotlib is not installed (pip install -r requirements-extra.txt)')
        return False
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(14, 6), layout='constrained')
    for axes, part, column, title in zip(
        panels, ('training', 'optimizers'), (6, 5), ('whole training step', "the optimizer's step alone, log scale")
    ):
        names = list(dict.fromkeys(row[1] for row in rows[part]))
        models = list(dict.fromkeys(row[0] for row in rows[part]))
        for i, model in enumerate(models):
            ratios = {row[1]: row[column] for row in rows[part] if row[0] == model}
            where = [names.index(name) + 0.8 * ((i + 0.5) / len(models) - 0.5) for name in ratios]
            bars = axes.barh(where, list(ratios.values()), 0.75 / len(models), label=model)
            axes.bar_label(bars, fmt='%.2f', fontsize=7, padding=2)
        axes.margins(x=0.1)  # for the labels
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.axvline(1, color='black', lw=0.8)
        axes.set(title=title, xlabel=f'time over {BASELINE}, refreshes included')
        axes.legend(loc='lower right')
    panels[1].set_xscale('log')
    figure.savefig(png, dpi=120)
    plt.close(figure)
    return True


def main(config):
    keep_freed_memory()
    torch.manual_seed(0)
    lines = [
        '# Measured side by side',
        '',
        f'Made by `python {shlex.join(["-m", "bench", *sys.argv[1:]])}` with torch {torch.__version__} on '
        f'{torch.get_num_threads()} CPU threads that multiply fp32 matrices at {matmul_rate() / 1e9:.0f} GFLOP/s. '
        'Methods take turns, times are medians. For all methods alike, glibc keeps freed memory (mallopt): otherwise '
        'the page faults of every large tensor would be measured, too. MB made in a step: the peak of the storages '
        'that a step creates; weights and states that existed before do not count.',
        '',
    ]
    print(lines[2], flush=True)
    rows, write = {}, config.out and config.only == 'all'
    path = os.path.join(ROOT, config.out)
    if write:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    for name, (measure, heading, text, head) in PARTS.items():
        if config.only not in ('all', name):
            continue
        started = time.perf_counter()
        rows[name] = measure(config)
        part = [f'## {heading}', '', text.format(**vars(config)), '', *table(head, rows[name]), '']
        print('\n'.join(part), f'{name}: {(time.perf_counter() - started) / 60:.1f} minutes', sep='\n', flush=True)
        lines += part
        if write:  # after each part, so that an interrupted run keeps its tables
            with open(path, 'w') as f:
                f.write('\n'.join(lines))
    png = os.path.splitext(path)[0] + '.png'
    if write and draw(rows, png):
        with open(path, 'a') as f:
            f.write(f'\n![time over {BASELINE}]({os.path.basename(png)})\n')


if __name__ == '__main__':
    main(configurator.load_or_exit(__file__, sys.argv[1:], problems))
