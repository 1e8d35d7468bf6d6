"""
Every method of this house in one harness, each at its best learning rate: makes shelf.md and shelf.png.

    python data/sitepackages/prepare.py
    python -m bench.runs.shelf --jobs=2       # a run takes three minutes of a CPU core, a method five or six
    python -m bench.runs.shelf --only='AdamW; Muon' --steps=1000 --device=cuda --jobs=8
    python -m bench.runs.shelf --finished                   # the table and the picture of what is there
    python -m bench.runs.shelf --known=results/shelf.csv    # go on from the runs behind the table, made elsewhere

The rates of a method stand apart by a factor of two. Where the best is the lowest or the highest tried, the next one is
tried, too; the best then runs under further seeds. Finished runs are kept in out/shelf/, so that it can be stopped at
any time and go on; with the table, results/shelf.csv gets a line for each.
"""

from bench import parser

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('--data', default='sitepackages', help='folder in data/, or a path (sitepackages)')
    asked.add_argument('--steps', type=int, default=300, choices=range(10, 10**6), metavar='N', help='of a run (300)')
    asked.add_argument('--seeds', type=int, default=3, choices=range(1, 100), metavar='N', help='of the best rate (3)')
    asked.add_argument('--only', default='', help='methods by their names, with semicolons (all)')
    asked.add_argument('--device', default='auto', choices=['auto', 'cpu', 'cuda'], help='of train.py (auto)')
    asked.add_argument('--jobs', type=int, default=1, choices=range(1, 65), metavar='N', help='runs at a time (1)')
    asked.add_argument('--finished', action='store_true', help='start nothing: the table of what is finished')
    asked.add_argument('--known', default='', metavar='FILE', help='a shelf.csv whose runs are not made again')
    args = asked.parse_args()

import csv
import math
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

import configurator
import train
from bench.measure import interleaved, state_tensors, table
from bench.runs.jobs import do
from plumbing.build import ROOT, build_model, layers_of

OUT = os.path.join('out', 'shelf')
SHAPE = ['--model=9m', '--n_embd=192', '--n_head=6', '--n_inner=512', '--block_size=256', '--batch_size=8']
MOST = 6  # rates of a method
FEW = ['--rank=48', '--update_proj_gap=50']  # a quarter of the width, and a short run's period
# Embedding and head learn at this rate under every method, by the same AdamW, so that its rate is of the blocks alone:
# one rate for all favours what makes small steps of it in the blocks (GaLore, Muon) by more than the methods differ.
TABLE_RATE = 1.6e-2
USUAL = ['--beta2=0.95', '--grad_clip=1', '--weight_decay=0.1']  # for all, too
TABLES = '--table_lr_scale='
GALORE = ['--method=galore', *FEW]
# Name: (the middle rate, flags, perplexity at 60M in its paper's own table, in the table of a tuned AdamW). The first
# figures (A) stand beside an AdamW at 34.06, the second (B) beside a tuned one at 30.05; None: not published there.
METHODS = {
    'AdamW, one rate': (2e-3, ['--method=adamw', f'{TABLES}1'], 34.06, None),
    'AdamW': (1e-3, ['--method=adamw'], None, 30.05),
    'AdamW, on a CPU': (1e-3, ['--method=adamw', '--device=cpu'], None, None),  # beside what a card is too slow for
    'AdamW, no clip, no decay': (1e-3, ['--method=adamw', '--grad_clip=0', '--weight_decay=0'], None, None),
    'AdamW, 8 bits': (1e-3, ['--method=adamw', '--state_bits=8'], None, None),
    'GaLore': (1e-2, GALORE, 34.88, 34.58),
    'GaLore, SARA': (1e-2, [*GALORE, '--refresh=sara'], None, None),
    'GaLore, right': (1e-2, [*GALORE, '--proj_type=right'], None, None),
    'GaLore, full rank': (5e-3, [*GALORE, '--rank=192'], None, None),
    'GaLore, random P': (1e-2, [*GALORE, '--refresh=random'], None, None),
    'Q-GaLore': (1e-2, ['--method=qgalore', *FEW, '--state_bits=8'], 34.88, None),
    'LoQT': (1e-2, ['--method=loqt', *FEW, '--scale=0.25', '--psi=1.2'], 33.98, None),
    'Fira': (1e-2, ['--method=fira', *FEW], 31.06, 30.34),
    'APOLLO': (5e-3, ['--method=apollo', *FEW], 31.55, None),
    'APOLLO-Mini': (5e-3, ['--method=apollo', '--rank=1', FEW[1], '--tensorwise', '--scale=11.3'], 30.95, 31.85),
    'Muon': (4e-3, ['--method=muon', '--momentum=0.9'], None, 28.86),
    'Muon+': (4e-3, ['--method=muon', '--momentum=0.9', '--row_norm'], None, None),
    'SCALE': (1e-3, ['--method=scale', f'{TABLES}1'], None, 30.81),
    'SUMO': (4e-3, ['--method=sumo', *FEW, '--momentum=0.9'], 34.26, None),
    'BAdam': (4e-3, ['--method=badam', '--block_steps=10'], None, None),
    'BlockLLM': (4e-3, ['--method=badam', '--block_steps=10', '--choose=norm'], None, None),
    'Grass': (4e-3, ['--method=grass', *FEW], None, None),
    'AdaLomo': (5e-2, ['--method=adalomo', '--per_layer', f'{TABLES}1'], None, None),
    'LDAdam': (2e-3, ['--method=ldadam', FEW[0]], None, None),
    'LDAdam, no feedback': (2e-3, ['--method=ldadam', FEW[0], '--feedback=False'], None, None),
    'AdaRankGrad': (1e-2, ['--method=adarankgrad', '--rank=96', FEW[1]], 34.24, None),
    'SLTrain': (3e-3, ['--method=sltrain', '--rank=48', '--scale=0.5'], 34.15, None),
    'ReLoRA': (2e-3, ['--method=lora', '--rank=48', '--quantize=none', '--merge_every=100'], 37.04, None),
}  # fmt: skip
PLAIN = 'AdamW'  # what the others are compared with
COLUMNS = ['method', 'rate', 'seed', 'steps', 'loss', 'bytes', 'device']  # of shelf.csv
made = {}  # a line's first four -> its last three


def read(path):
    """The runs of a shelf.csv."""
    with open(path, newline='') as f:
        for line in csv.DictReader(f):
            loss, peak = float(line['loss']), int(line['bytes'])
            made[tuple(line[name] for name in COLUMNS[:4])] = {'loss': loss, 'bytes': peak, 'device': line['device']}


def write(path):
    with open(path, 'w', newline='') as f:
        lines = csv.writer(f, lineterminator='\n')
        lines.writerow(COLUMNS)
        lines.writerows([*key, *made[key].values()] for key in sorted(made))


def rate_at(name, step):
    """The learning rate so many factors of two above the middle one."""
    return float(f'{METHODS[name][0] * 2.0**step:.2g}')


def words_of(args, name, rate, seed):
    warmup = max(args.steps // 10, 1)
    words = ['train.py', f'--dataset={args.data}', *SHAPE, *METHODS[name][1], f'--learning_rate={rate:g}']
    if not any(word.startswith(TABLES) for word in words):
        own = {word.partition('=')[0] for word in words}
        words += [f'{TABLES}{TABLE_RATE / rate:g}', *(word for word in USUAL if word.partition('=')[0] not in own)]
    words += [f'--seed={seed}', f'--max_iters={args.steps}', f'--warmup_iters={warmup}']
    words += [f'--device={args.device}'] * ('--device=cpu' not in words)
    return [*words, '--dtype=float32', f'--eval_interval={args.steps}', '--eval_tokens=65536', '--sample_tokens=0']


def run(args, name, step, seed):
    """-> {'loss', 'bytes': of the peak, 'device'} of one run; None if only the finished are asked for, and it is not.
    A run that came to nothing (its loss was not finite) counts as infinitely bad."""
    rate = rate_at(name, step)
    key = name, f'{rate:g}', f'{seed}', f'{args.steps}'
    if key in made:
        return made[key]
    folder = os.path.join(OUT, f'{name}_{rate:g}_{seed}_{args.steps}'.replace(' ', '_').replace(',', ''))
    words = [*words_of(args, name, rate, seed), f'--out_dir={folder}', '--save_best=weights', '--overwrite']
    try:
        printed = do(words, os.path.join(folder, 'log.txt'), args.finished)
    except Exception as error:
        print(f'note: {name} at {rate:g}: {error}', file=sys.stderr, flush=True)
        return {'loss': math.inf, 'bytes': 0, 'device': args.device}
    if printed is None:
        return None
    found = dict(line.split(': ', 1) for line in printed.splitlines() if ': ' in line)
    loss = float(found['val_loss'])
    loss, peak = loss if math.isfinite(loss) else math.inf, int(found['peak_bytes_measured'])
    made[key] = {'loss': loss, 'bytes': peak, 'device': found['device']}
    return made[key]


def tuned(args, name, pool):
    """-> {step of the rate: its run under the first seed}: three, and more while the best is the last on its side."""
    tried, asked = {}, [-1, 0, 1]
    while asked:
        made = pool.map(lambda step: run(args, name, step, 1), asked)
        tried |= {step: found for step, found in zip(asked, made) if found}
        if not tried or len(tried) >= MOST or (len(tried) < 3 and not args.finished):
            break
        best = best_of(tried)
        asked = [step for step in (best - 1, best + 1) if step not in tried]
        if args.finished and not all(step in tried for step in asked):
            asked = [step for step in asked if run(args, name, step, 1)]
    return tried


def best_of(tried):
    return min(tried, key=lambda step: tried[step]['loss'])


def build(args, name):
    """-> the step of a real model on random tokens, and a function that counts the bytes that it keeps."""
    config = configurator.load(train.__file__, [*words_of(args, name, METHODS[name][0], 1)[1:], '--device=cpu'])
    vocabulary = 4096
    model = build_model(config, '', vocabulary, torch.float32, 'cpu', '', layers_of(config))
    optimizer = train.setup(model, config)
    tokens = torch.randint(vocabulary, (config.batch_size, config.block_size))

    def step():
        train.training_step(model, optimizer, [(tokens, tokens)], 1e-4, 'cpu')

    def kept():
        tensors = [*model.parameters(), *model.buffers(), *(t for _, t in state_tensors(optimizer))]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    return step, kept


def costs(args, names):
    """-> {name: (bytes of weights and states, seconds of a step)}, on this CPU, the methods in turns."""
    built = {name: build(args, name) for name in names}
    for step, _ in built.values():
        step()  # makes states and bases
    seconds = interleaved({name: step for name, (step, _) in built.items()}, 5)
    return {name: (kept(), seconds[name]) for name, (_, kept) in built.items()}


def frontier(points):
    """Of {name: (bytes, loss)} the names that no other beats in both, by bytes."""
    found, lowest = [], math.inf
    for name in sorted(points, key=points.get):
        if points[name][1] < lowest:
            found.append(name)
            lowest = points[name][1]
    return found


def draw(points, spread, png, title):
    """Loss against bytes, every method a point, with a line from its lowest to its highest seed."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout='constrained')
    edge, most = frontier(points), min(loss for _, loss in points.values()) + 0.4  # the rest at the upper edge
    axes.plot(*zip(*(points[name] for name in edge)), color='tab:green', lw=1, alpha=0.6, label='nothing is below it')
    for name, (megabytes, loss) in points.items():
        color = 'tab:green' if name in edge else 'tab:gray' if 'full rank' in name or 'random' in name else 'tab:blue'
        beyond, place = loss > most, (megabytes, min(loss, most))
        if beyond:
            most -= 0.02  # the next one's label is to be read, too
        axes.plot(*place, '^' if beyond else 'o', ms=5, color=color)
        if not beyond:
            axes.vlines(megabytes, *spread[name], color=color, lw=1)
        label = f'{name} {loss:.2f}' if beyond else name
        axes.annotate(label, place, (4, 3), textcoords='offset points', fontsize=7, rotation=20)
    axes.margins(0.08)
    axes.set(xlabel='MB of weights and optimizer states', ylabel='val loss', title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(png, dpi=120)
    plt.close(figure)


def row(name, tried, losses, cost, plain):
    """One line of the table."""
    best = best_of(tried)
    rates = ', '.join(f'{rate_at(name, step):g}: {tried[step]["loss"]:.3f}' for step in sorted(tried))
    spread = f'{min(losses):.3f} to {max(losses):.3f}' if len(losses) > 1 else ''
    kept, seconds = cost
    rate = f'{rate_at(name, best):g}'
    some = [one for key, one in made.items() if key[:2] == (name, rate)]
    devices = sorted({one['device'] for one in some})
    alike = {one['device'] for key, one in made.items() if key[0] == PLAIN}  # a card's peak is another than a CPU's
    peak = max((one['bytes'] for one in some if one['device'] in alike), default=0)
    return [name, rate, f'{statistics.median(losses):.3f}', spread, len(losses), ', '.join(devices),
            f'{kept / 1e6:.1f}', f'{peak / 1e6:.0f}' if peak else '', f'{seconds / plain:.2f}', rates]  # fmt: skip


def order(found):
    """Lines: the order here beside the published perplexities, in both families of tables."""
    for column, what in ((2, "A, the papers' own"), (3, 'B, beside a tuned AdamW')):
        published = {name: METHODS[name][column] for name in found if METHODS[name][column]}
        theirs = sorted(published, key=published.get)
        for place, name in enumerate(sorted(published, key=lambda name: found[name][0]), 1):
            yield [what, name, f'{found[name][0]:.3f}', place, published[name], theirs.index(name) + 1]


def written(args, runs, measured):
    """The lines of shelf.md. runs: {name: (tried, [loss of each seed])}."""
    losses = {name: (statistics.median(some), some) for name, (_, some) in runs.items()}
    plain = measured[PLAIN if PLAIN in runs else next(iter(runs))][1]
    rows = [row(name, *runs[name], measured[name], plain) for name in sorted(runs, key=lambda name: losses[name][0])]
    head = ['method', 'rate', 'val loss', 'seeds, from to', 'seeds', 'on', 'MB kept', 'MB peak', 'time', 'rates tried']
    return [
        '# The shelf: every method in one harness',
        '',
        f'Made by `python -m bench.runs.shelf --steps={args.steps} --seeds={args.seeds}`: 3.3M parameters,',
        f'{args.steps} steps of 2,048 tokens of the source of installed packages, fp32, a warm-up of a tenth, cosine',
        'decay to a tenth. Each method at its best learning rate: three, and more while the best was the last on its',
        'side, as far as they are finished. Val loss: the median of the seeds. On: the device, which draws its own',
        'first weights, so that rows of a CPU are to be compared with AdamW on a CPU. MB kept: weights and optimizer',
        'states. MB peak: all tensors at the peak of a step of 8 x 256 tokens, of those that ran on the device of',
        f'{PLAIN}. Time: seconds of a step over those of {PLAIN}, in turns in one process on a CPU,',
        'without the refresh of a basis (of BAdam and BlockLLM: while they train the first block). Embedding and head',
        f'learn at {TABLE_RATE:g} under all methods, by AdamW with betas of .9 and .95, gradients are clipped to 1,',
        'weights decay by 0.1. In AdamW, one rate, and in SCALE and AdaLomo, which have no AdamW, they learn at the',
        'rate of the blocks, the rest is as by default. GaLore at full rank and with a random P are the controls: of',
        'what the subspace costs, and of what its choice is worth.',
        '',
        '![loss against bytes](shelf.png)',
        '',
        *table(head, rows),
        '',
        '## Beside what is published',
        '',
        'Perplexities of a 60M model on C4 after 1.1B tokens and more, as published. The two families are never to be',
        'mixed: in A, AdamW has 34.06, and tuned, in B, 30.05. Places count within a family.',
        '',
        *table(['family', 'method', 'val loss here', 'place here', 'perplexity', 'place there'], list(order(losses))),
        '',
        f'What it cannot say: a model of 3.3M parameters is far from trained by {args.steps * 2048 / 1e6:.1f}M tokens.',
        'Methods that move fast at first look better here than at the end of a long run, and those that save memory',
        'save little where embedding and head are half of all weights.',
        '',
    ]  # fmt: skip


def main(args):
    names = args.only.split(';') if args.only else list(METHODS)
    names = [name.strip() for name in names]
    if wrong := [name for name in names if name not in METHODS]:
        sys.exit(f'error: --only={args.only}: {wrong[0]!r} is none of: {"; ".join(METHODS)}')
    if args.known:
        read(args.known)
    with ThreadPoolExecutor(args.jobs) as pool, ThreadPoolExecutor(args.jobs) as several:
        tried = dict(zip(names, several.map(lambda name: tuned(args, name, pool), names)))
        tried = {name: some for name, some in tried.items() if some}
        best = {name: best_of(some) for name, some in tried.items()}
        again = [(name, step, seed) for seed in range(2, args.seeds + 1) for name, step in best.items()]
        more = list(zip(again, pool.map(lambda one: run(args, *one), again)))
    runs = {}
    for name, some in tried.items():
        losses = [found['loss'] for (its, _, _), found in more if its == name and found]
        runs[name] = some, [some[best[name]]['loss'], *losses]
    if not runs:
        sys.exit(f'error: nothing is finished in {OUT} yet: leave out --finished')
    measured = costs(args, runs)
    lines = written(args, runs, measured)
    with open(os.path.join(ROOT, 'results', 'shelf.md'), 'w') as f:
        f.write('\n'.join(lines))
    write(os.path.join(ROOT, 'results', 'shelf.csv'))
    points = {name: (measured[name][0] / 1e6, statistics.median(some)) for name, (_, some) in runs.items()}
    title = f'{args.steps} steps of 2,048 tokens, 3.3M parameters, each method at its best rate'
    spread = {name: (min(some), max(some)) for name, (_, some) in runs.items()}
    draw(points, spread, os.path.join(ROOT, 'results', 'shelf.png'), title)
    print('\n'.join(lines))


if __name__ == '__main__':
    main(args)
