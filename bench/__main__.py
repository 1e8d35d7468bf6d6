"""
Time and memory of every method, measured side by side in one run: tables in results/bench.md, a picture beside them.

    python -m bench                                          # all of it, 25 to 60 minutes on two CPU cores
    python -m bench --only=training --training_sizes=60m:2   # one part, printed; files are written only by a full run
    python -m bench --only=refresh --refresh_sizes=350m:2

Methods take turns, one step each, and a number is the median over the rounds: whatever slows the machine for a while
slows all of them, so the ratios stay valid. Ours are compared with torch's AdamW, bitsandbytes, transformers and, if it
is installed, the authors' own package (pip install --no-deps galore-torch).
"""

import sys

import configurator
from configurator import between

if __name__ == '__main__':  # before the imports that take seconds
    config = configurator.load_or_exit(__file__, sys.argv[1:])

import os
import shlex
import time

import torch

from bench import compiled, examples, gradients, merges, optimizers, states
from bench import steps as whole_steps  # `steps` is a key
from bench.measure import keep_freed_memory, matmul_rate, table
from bench.optimizers import BASELINE
from bench.plot import table_in
from model import SIZES
from plumbing.build import ROOT

# ---- config ----------------------------------------------------------------------------------------------------------
only = 'all'  # 'all' | 'optimizers' | 'training' | 'stall' | 'examples' | 'states' | 'refresh' | 'memory' | 'merge' |
#                'nf4' | 'peaks' | 'compiled' | 'picture': the part to measure, or the picture anew of the tables in out
out = 'results/bench.md'  # file for the tables of a full run, with the picture beside it; '': none

# optimizers, training, stall: time. A size is a name in model.SIZES and a number of blocks, as in 130m:12
amortised_over = 200  # T: steps between two refreshes of a basis, over which the cost of one is spread

# optimizers: steps on given gradients, without a model
optimizer_sizes = '60m:1 130m:1 350m:1 1b:1'  # models whose block matrices are updated; without a number, all blocks

# optimizers, merge: rounds
repeats = 15  # timed steps of each method
seconds = 3.0  # a method that has used this many skips further rounds; each has at least 3 steps and one refresh

# training: whole training steps on random tokens
training_sizes = '130m:12 1b:6'  # models for whole steps
rounds = 3  # timed steps of each method
memory_gb = 20.0  # methods are measured in groups that take at most this together, each with torch's AdamW in it

# training, stall: the batch
batch_size = 8  # windows of 256 tokens in a step

# stall: every step of a refresh period
stall_sizes = '130m:1 1b:1'  # few blocks, since whole periods of steps are timed
periods = 2  # refresh periods to time; each step counts with its fastest time

# examples: rows of many lengths
example_sizes = '60m:2'  # models
examples_a_step = 64  # the same ones for all
examples_at_once = 64  # in a padded micro-batch; packed ones have a quarter as many windows

# states: bytes of whole models, nothing is timed
claim_sizes = '1b 7b'  # models for the paper's percentages: 8-bit states, total training memory

# states, nf4: which models
state_sizes = '60m 130m 350m 1b'  # models whose states are counted, at two bytes per number
real_sizes = '60m 130m 350m 1b'  # models that take real steps; the others are traced on fake tensors

# refresh: bases of real gradients
refresh_sizes = '350m:2 1b:1'  # models that give the gradients
refreshes = 12  # refreshes to compare with the SVD, for each shape
minutes = 2.0  # time limit of each model, but every shape gets at least two refreshes

# refresh, memory: a real run
rank = 0  # of the bases; 0: the paper's for the size
steps = 120  # maximum training steps; a run ends once every shape of gradient has its refreshes
update_proj_gap = 50  # T

# memory, peaks: which models
memory_sizes = '350m:2'  # models whose live gradients and peaks are counted

# merge: LoQT
merge_sizes = '130m 1b'  # models whose layers are merged

# compiled: whole steps with and without compile=True
compiled_sizes = '60m:2 130m:2'  # models
compiled_windows = 4  # of 256 tokens in a step
compiled_rounds = 7  # timed steps of each
# ---- end of config ---------------------------------------------------------------------------------------------------


def problems(config):
    """One sentence for each mistyped size, number out of range, and key that `only` leaves unread."""
    c, found = config, []
    found += between(c, 1, 10**6, 'repeats', 'rounds', 'batch_size', 'periods', 'refreshes', 'steps', 'amortised_over')
    found += between(c, 1, 10**4, 'examples_a_step', 'examples_at_once')
    found += between(c, 1, 10**9, 'update_proj_gap') + between(c, 0, 2**20, 'rank')
    found += between(c, 0.001, 10**6, 'seconds', 'minutes', 'memory_gb')
    for key, text in vars(c).items():
        for word in text.split() if key.endswith('_sizes') else ():
            name, colon, blocks = word.partition(':')
            whole = key in ('state_sizes', 'claim_sizes', 'real_sizes', 'merge_sizes')
            if name not in SIZES or (colon and (whole or not blocks.isdecimal() or not 0 < int(blocks[:9]) <= 1000)):
                shape = 'a NAME' if whole else 'NAME or NAME:BLOCKS, with a NAME'
                found.append(f'{key}: {word} is not {shape} of {" ".join(SIZES)}')
    known = configurator.keys(__file__)
    for name in configurator.typed(c, *known):
        parts = known[name].section.partition(':')[0].split(', ')  # a section's heading names those that read its keys
        if known[name].section and c.only not in ('all', *parts):
            found.append(f'{name} is of {" and ".join(parts)}: leave it out with only={c.only!r}')
    if c.only not in ('all', 'picture') and configurator.typed(c, 'out'):
        found.append(f'out is of full runs: leave it out with only={c.only!r}')
    if c.only == 'picture' and not os.path.isfile(os.path.join(ROOT, c.out)):
        found.append(f'out={c.out!r} is no file with tables: run python -m bench first')
    return found


# {name: (function that returns the rows, heading, description with keys of the config in braces, head of the table)}
PARTS = optimizers.PARTS | whole_steps.PARTS | examples.PARTS | states.PARTS | gradients.PARTS | merges.PARTS
PARTS |= compiled.PARTS


def draw(path):
    """Two panels beside the tables in `path`, made of them: the time of a training step and of an optimizer's step,
    relative to torch's fused AdamW. -> whether there is a picture"""
    try:
        import matplotlib
    except ImportError:
        print('no picture: matplotlib is not installed (pip install -r requirements-extra.txt)')
        return False
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(14, 7), layout='constrained')
    titles = {'training': 'whole training step', 'optimizers': "the optimizer's step alone, log scale"}
    for axes, (part, title) in zip(panels, titles.items()):
        _, heading, _, (model, method, *_) = PARTS[part]
        rows = table_in(path, heading)
        names, models = (list(dict.fromkeys(row[key] for row in rows)) for key in (method, model))
        for i, size in enumerate(models):
            ratios = {
                row[method]: float(row[f'over {BASELINE}'].replace(',', '')) for row in rows if row[model] == size
            }
            where = [names.index(name) + 0.8 * ((i + 0.5) / len(models) - 0.5) for name in ratios]
            bars = axes.barh(where, list(ratios.values()), 0.75 / len(models), label=size)
            behind = dict(fc='white', ec='none', pad=0.3) if len(models) < 3 else None  # not over a neighbour's bar
            axes.bar_label(bars, fmt='%g', fontsize=7, padding=2, bbox=behind)
        axes.axvline(1, color='black', lw=0.8, zorder=0.5)  # behind the bars and what is written beside them
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(title=title, xlabel=f'time over {BASELINE}, refreshes included')
        axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.1), ncols=4)  # below, never over a bar
    panels[1].set_xscale('log')
    for axes, more in zip(panels, (1.1, 1.4)):
        axes.set_xlim(right=axes.get_xlim()[1] * more)  # room for the last label
    figure.savefig(os.path.splitext(path)[0] + '.png', dpi=120)
    plt.close(figure)
    return True


def main(config):
    path = os.path.join(ROOT, config.out)
    if config.only == 'picture':
        return draw(path)
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
    if write and draw(path):
        with open(path, 'a') as f:
            f.write(f'\n![time over {BASELINE}]({os.path.splitext(os.path.basename(path))[0]}.png)\n')


if __name__ == '__main__':
    configurator.check_or_exit(config, __file__, problems)
    main(config)
