"""
What every method costs and keeps, measured side by side in one run: tables in results/bench.md, a picture beside them.

    python -m bench                                          # all of it, about 25 minutes on two CPU cores
    python -m bench --only=training --training_sizes=60m:2   # one part, printed; files are written when all is measured
    python -m bench --only=refresh --refresh_sizes=350m:2

Methods take turns, one step each, and a number is the median over the rounds: what slows the machine for a while slows
all of them, so the ratios stand. Beside ours are torch's AdamW, bitsandbytes, transformers and, where it is installed,
the authors' own package (pip install --no-deps galore-torch).
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
only = (
    'all'  # 'all' | 'optimizers' | 'training' | 'stall' | 'states' | 'refresh' | 'memory' | 'merge' | 'nf4' | 'peaks'
)
out = 'results/bench.md'  # file for the tables when all is measured, with the picture beside it; '': none
amortised_over = 200  # T: steps between two refreshes of a basis, over which the cost of one is spread

# Sizes are names of model.SIZES with the number of blocks to take, as in 130m:12; without a number it is all of them.
# optimizers: steps on given gradients, without a model
optimizer_sizes = '60m:1 130m:1 350m:1 1b:1'  # whose blocks' matrices
repeats = 15  # timed steps of each method
seconds = 3.0  # a method that has used so many sits out the later rounds; each has 3 steps and one refresh at least

# training, stall: whole training steps on random tokens
training_sizes = '130m:12 1b:6'  # models for whole steps
rounds = 3  # timed steps of each method
batch_size = 8  # windows of 256 tokens in a step
memory_gb = 20  # methods that take more than this together are measured in groups, each with torch's AdamW in it
stall_sizes = '130m:1 1b:1'  # models for the stall: few blocks, since whole periods of steps are timed
periods = 2  # periods of refreshes to time; of each step in them the faster time counts

# states: bytes of whole models, nothing is timed
state_sizes = '60m 130m 350m 1b'  # models whose states at two bytes a number are counted
claim_sizes = '1b 7b'  # models for the paper's percentages: 8-bit states, all memory of training
real_sizes = '60m 130m 350m 1b'  # those that take real steps on real tensors; others are traced on fake ones

# refresh, memory: the gradients of a real run
refresh_sizes = '350m:2 1b:1'  # models that give the gradients
rank = 0  # of the bases; 0: the paper's for the size
steps = 120  # training steps at most; it ends as soon as every shape of gradient has its refreshes
refreshes = 12  # refreshes to compare with the SVD, for each shape
minutes = 2.0  # for each model; a shape that has no two refreshes by then gets them
update_proj_gap = 50  # T
memory_sizes = '350m:2'  # models whose gradients in memory are counted

# merge: LoQT
merge_sizes = '130m 1b'  # whose layers merge
# ---- end of config ---------------------------------------------------------------------------------------------------


# ---- measuring -------------------------------------------------------------------------------------------------------


def problems(config):
    """Sizes that are none, before anything is measured."""
    found = []
    for key, text in vars(config).items():
        for word in text.split() if key.endswith('_sizes') else ():
            name, colon, blocks = word.partition(':')
            whole = key in ('state_sizes', 'claim_sizes', 'real_sizes', 'merge_sizes')
            if name not in SIZES or (colon and (whole or not blocks.isdigit() or blocks == '0')):
                shape = 'a NAME' if whole else 'NAME or NAME:BLOCKS, with a NAME'
                found.append(f'{key}: {word} is not {shape} of {" ".join(SIZES)}')
    return found


# ---- the authors' package --------------------------------------------------------------------------------------------


# ---- optimizers ------------------------------------------------------------------------------------------------------


# ---- training --------------------------------------------------------------------------------------------------------


# ---- states ----------------------------------------------------------------------------------------------------------


# ---- real gradients --------------------------------------------------------------------------------------------------


# ---- tables and picture ----------------------------------------------------------------------------------------------

# name -> function that gives the rows, heading, what is measured (keys of the config in braces), head of the table
PARTS = optimizers.PARTS | whole_steps.PARTS | states.PARTS | gradients.PARTS | merges.PARTS


def draw(rows, png):
    """Two panels: what a training step and an optimizer's step take, over torch's fused AdamW."""
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
        'Methods take turns, times are medians. For all of them alike, glibc keeps freed memory (mallopt): otherwise '
        'the page faults of every large tensor are measured, too. MB made in a step are storages made in it and alive '
        'at once; '
        'weights and states that were there before do not count.',
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
        if write:  # after each part: what is measured is not lost
            with open(path, 'w') as f:
                f.write('\n'.join(lines))
    png = os.path.splitext(path)[0] + '.png'
    if write and draw(rows, png):
        with open(path, 'a') as f:
            f.write(f'\n![time over {BASELINE}]({os.path.basename(png)})\n')


if __name__ == '__main__':
    main(configurator.load_or_exit(__file__, sys.argv[1:], problems))
