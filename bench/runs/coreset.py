"""
Batches of 64 chosen from 256 against batches of 64, 128 and 256, five seeds each: makes coreset.md and coreset.png.

    python -m bench.runs.coreset    # an hour or less on one CPU core; finished runs are kept
    python -m bench.runs.coreset --math=path/to/folder      # with train.jsonl, lines of {source, instruction, output}
    python -m bench.runs.coreset --report                   # only the tables, from the finished runs
"""

from bench import parser

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('--math', default='', help='folder with a train.jsonl of {source, instruction, output}')
    asked.add_argument('--report', action='store_true', help='only the tables, from the finished runs')
    asked.add_argument('--draw', action='store_true', help='only the picture, from the tables in results/coreset.md')
    asked.add_argument('--seeds', type=int, default=5, choices=range(1, 6), help='runs of each method')
    args = asked.parse_args()

import json
import os
import re
import time

os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import torch

import adam
import coreset
from bench.plot import table_in
from bench.runs.coreset_data import BATCH, OUT, POOL, ROOT, T, Windows, prepare
from memory.record import LiveBytes
from model import LLaMA, ModelConfig

STEPS, WARM, RATE, CAP = 32, 400, 1e-3, 1.0
SHAPE = dict(n_layer=3, n_head=4, n_embd=64, n_inner=176, block_size=T)
KEPT = dict(keep_small=CAP)
# name: (batch size, use of sources: 'kept' | 'shares' | 'none', options of Coreset or the name of a rule in other_rule)
METHODS = {
    'random 64': (64, 'none', dict(feature='random')),
    'stratified 64': (64, 'shares', dict(feature='random')),
    'keep small + random': (64, 'kept', dict(feature='random')),
    'random 128': (128, 'none', dict(feature='random')),
    'full 256': (256, 'none', dict(feature='random')),
    'top loss': (64, 'none', 'loss'),
    'top norm': (64, 'none', 'norm'),
    'zo m=1 (the paper)': (64, 'kept', dict(feature='zo', norm='adam', directions=1)),
    'zo m=16': (64, 'kept', dict(feature='zo', norm='adam', directions=16)),
    'grad, Adam + l1': (64, 'kept', dict(feature='grad', norm='adam')),
    'grad, unit': (64, 'kept', dict(feature='grad')),
    'grad, unit, cluster weights': (64, 'none', dict(feature='grad', weights='cluster')),
    'grad, unit, stratified': (64, 'shares', dict(feature='grad')),
    'grad, unit, no sources': (64, 'none', dict(feature='grad')),
    'gradient clusters, one at random each': (64, 'none', 'clusters'),
    'grad over sqrt(V), stratified': (64, 'shares', 'moment'),
}
DATA = {  # data set -> methods
    'redundant': ['random 64', 'full 256', 'grad, unit, no sources', 'grad, Adam + l1', 'zo m=1 (the paper)',
                  'zo m=16', 'random 128', 'grad, unit, cluster weights'],
    'unlike': ['random 64', 'keep small + random', 'full 256', 'grad, unit', 'zo m=1 (the paper)', 'stratified 64'],
    'pystdlib': [name for name in METHODS if name not in ('grad, unit, cluster weights', 'zo m=16')],
    'math': ['random 64', 'keep small + random', 'full 256', 'grad, unit, stratified', 'grad, unit', 'stratified 64'],
}  # fmt: skip


HEADINGS = {
    'pystdlib': "Python's standard library, its packages as sources",
    'redundant': 'pools of 64 windows copied to 256 with 3 % noise',
    'unlike': 'Python and five other kinds of text',
    'math': 'mathematical questions and answers, 8 sources',
}
INTRODUCTION = [
    'Made by `python -m bench.runs.coreset --math=FOLDER` on one CPU core, torch 2.13.0: a LLaMA of 3 blocks, 64 wide,',
    '512 token ids, windows of 24 tokens. All methods start from the same weights, after 400 steps on random batches',
    'of 64, and take 32 steps of AdamW at 1e-3 on the same pools of 256 windows; each seed has pools of its own.',
    'Losses are in nats per token of held-out windows: the mixture weighs sources by their share of the training data.',
    '+- is the standard error over seeds. Gradient error: the error of the chosen mean gradient of the last V',
    'projection, relative to the mean over all windows that were compared, and in parentheses the error of a random',
    'batch. mixture*: on an eighth of the held-out windows, at the CPU time that random 64 takes for all its steps.',
    'MB made: the peak that a step creates, with choosing, without weights and moments. Times are CPU time on a shared',
    'machine.',
    '',
    'Decided along the way: which runs come first and which are left out, after pilots and a look at the first seed.',
    'The data set `unlike` was added after a pilot on pystdlib had shown less than was hoped for. Seeds differ only in',
    "their pools, not in the initial weights. Small sources may fill the whole batch here (keep_small 1; train.py's",
    'default is 0.5), and 32 steps are few: treat differences of one or two standard errors as none.',
]
CONCLUSIONS = [
    '## What the gain comes from',
    '',
    '**Repetition.** If the pool holds near-duplicates, 64 windows chosen by gradients at unit length reach a lower',
    'loss than all 256, per step, per second and with a quarter of the bytes: one copy of each text serves better than',
    'four noisy ones. Weights by cluster size reduce the gradient error to a third and lose half of the gain, since',
    "they bring the repetition back. The paper's one direction is hardly better than a random batch; sixteen help, but",
    'cost several times as much as a step on all 256.',
    '',
    '**Re-weighting.** Every other apparent gain in the mean over sources comes from the rule that keeps small sources',
    'whole. If these are unlike the rest, 64 windows get ahead of the full 256 in the mean over sources, and fall',
    'behind a random 64 on the mixture. Random windows with the same budgets do the same, within the error; no feature',
    'adds anything. If sources are alike, as the packages of one library or the subjects of one exam are, re-weighting',
    'does not make up for the smaller batch: the full 256 stays ahead in the mean over sources, too. (At a ratio of',
    'four, the small sources of pystdlib and math fill the batch nearly or completely, so that little or nothing is',
    'left to choose.)',
    '',
    '**Ordinary data, the mixture.** Tried against a random batch of the same size: budgets in proportion to the',
    'sources, gradients at unit length within them and across all sources, the same divided by the square root of',
    "Adam's second moment, and one random member of each gradient cluster, weighted by the clipped cluster size.",
    "Gradients reduce the error of the last V projection's gradient by a tenth, and the loss not at all. What may help",
    'is the budgets alone, which need no gradients: a gain of twice its standard error on sources that are unlike each',
    'other, none elsewhere. Per second, every method that looks at gradients falls behind plain random batches, since',
    'that takes two thirds of a step.',
    '',
    'So: `--coreset=random` where small sources matter; `grad` where the log line shows a gradient error by cluster',
    'size well below the random one; else nothing.',
]


@torch.no_grad()
def losses_of(model, x, y):
    """(n,): each window's mean loss."""
    h, cos, sin = model.embed(x)
    for layer in model.layers:
        h = layer(h, cos, sin)
    return coreset.example_losses(model.norm(h), model.head, y)[0]


def evaluate(model, windows, every=1):
    """{mixture, macro, small, large}: held-out losses, weighted by the sources' shares or averaged over sources."""
    parts = [rows[::every] for rows in windows.held_out]
    of = np.repeat(np.arange(len(parts)), [len(rows) for rows in parts])
    rows = torch.from_numpy(np.concatenate(parts))
    found = np.concatenate([losses_of(model, part[:, :-1], part[:, 1:]).numpy() for part in rows.split(POOL)])
    losses = np.bincount(of, found) / np.bincount(of)
    small = np.isin(np.arange(len(losses)), windows.small)
    groups = {'macro': small | True, 'small': small, 'large': ~small}
    return {'mixture': float(losses @ windows.share)} | {name: float(losses[on].mean()) for name, on in groups.items()}


def new_model(windows, seed):
    return LLaMA(ModelConfig(vocab_size=windows.vocabulary, **SHAPE)).materialise(seed=seed)


def warm_start(name, windows):
    """Weights after 400 steps of random 64, from which all methods and seeds start."""
    path = os.path.join(OUT, f'warm_{name}.pt')
    if not os.path.exists(path):
        model = new_model(windows, 0)
        optimizer = adam.AdamW(model.parameters(), lr=3e-3)
        for step in range(WARM):
            optimizer.lr = 3e-3 * min(1, (step + 1) / 40)
            x, y, _ = windows.pool(1000, step)
            model(x[:BATCH], y[:BATCH]).backward()
            optimizer.step()
        torch.save(model.state_dict(), path)
    return torch.load(path, weights_only=True)


def other_rule(rule, model, optimizer, x, y, sources, k, rng):
    """Rules that coreset.py does not have. -> indices, and weights or None."""
    if rule == 'loss':
        return losses_of(model, x, y).topk(k).indices, None
    found = coreset.features(model, x, y, 'grad', BATCH)
    if rule == 'moment':  # scaled as in Adam's step
        W = model.layers[-1].self_attn.v_proj.weight
        V = optimizer.state[W].get('V', torch.ones_like(W))
        G = torch.einsum('bto,bti->boi', found['D'], found['X']) / (V.sqrt() + 1e-8)  # (n, out, in)
        return coreset.select(G.flatten(1), sources, k), None
    K = coreset.gram(found['X'], found['D'])
    if rule == 'norm':
        return K.diagonal().topk(k).indices, None
    # Clusters around the medoids: one random member of each, weighted by the cluster's size. Without the clipping at
    # twice the mean size, this would be an unbiased estimate of the pool's gradient.
    distance = coreset.unit_distance(K)
    medoids = coreset.facility_location(distance.max() - distance, k)
    nearest = distance[:, medoids].argmin(1)  # (n,)
    nearest[medoids] = torch.arange(k)  # also if a duplicate is equally near
    members = [np.flatnonzero(nearest.numpy() == c) for c in range(k)]
    weights = torch.tensor([min(len(m), 2 * POOL / k) for m in members]).float()
    return torch.tensor([rng.choice(m) for m in members]), weights / weights.mean()


def path_of(name, method, seed):
    return os.path.join(OUT, re.sub(r'[^a-z0-9]+', '_', f'{name} {method}'.lower()).strip('_') + f'_{seed}.json')


def run(name, method, seed, windows):
    """One run as a dict of numbers, read from its file if it is finished."""
    path = path_of(name, method, seed)
    if os.path.exists(path):
        with open(path) as f:
            return json.load(f)
    k, how, options = METHODS[method]
    model = new_model(windows, seed)
    model.load_state_dict(warm_start('pystdlib' if name == 'redundant' else name, windows))
    optimizer = adam.AdamW(model.parameters(), lr=RATE)
    chooser, small = None, windows.small if how == 'kept' and name != 'redundant' else []
    if isinstance(options, dict) and k < POOL:
        chooser = coreset.Coreset(**options, small=small, keep_small=CAP, seed=seed)
    curve, errors, selecting, spent = [], [], 0.0, 0.0

    def one_step(step):
        nonlocal selecting, spent
        x, y, sources = windows.pool(seed, step, name == 'redundant')
        if how == 'none' or name == 'redundant':
            sources = np.zeros(POOL, dtype=np.int64)
        started, weights = time.process_time(), None
        if k == POOL:
            chosen = torch.arange(POOL)
        elif chooser:
            chosen, weights = chooser.choose(model, x, y, sources, k, step, BATCH)
            if chooser.errors is not None:
                errors.append(chooser.errors.tolist())
        else:
            rng = np.random.default_rng((seed, step, 1))
            chosen, weights = other_rule(options, model, optimizer, x, y, sources, k, rng)
        selected = time.process_time()
        optimizer.lr = RATE * min(1, (step + 1) / 10)
        model(x[chosen], y[chosen], weights=weights).backward()
        optimizer.step()
        selecting, spent = selecting + selected - started, spent + time.process_time() - started

    for step in range(STEPS):
        if step % 8 == 0:
            curve.append([step, spent, evaluate(model, windows, 8)['mixture']])
        one_step(step)
    found = evaluate(model, windows)
    curve.append([STEPS, spent, evaluate(model, windows, 8)['mixture']])
    found |= {'seconds': spent, 'selecting': selecting, 'curve': curve, 'kept': chooser.kept_share if chooser else 0.0}
    found['errors'] = np.mean(errors, 0).tolist() if errors else None
    with LiveBytes() as live:  # what one more step creates, without weights and moments
        one_step(STEPS)
    found['made'] = live.peak
    with open(path + '.part', 'w') as f:
        json.dump(found, f)
    os.rename(path + '.part', path)
    return found


def mean(values):
    """'mean +- standard error' of a list of numbers, one a seed."""
    if len(values) == 1:
        return f'{values[0]:.4f}'
    return f'{np.mean(values):.4f} +- {np.std(values, ddof=1) / len(values) ** 0.5:.4f}'


def at_seconds(runs, seconds):
    """The mixture loss of each run after this many seconds, interpolated."""
    return [np.interp(seconds, [t for _, t, _ in r['curve']], [loss for *_, loss in r['curve']]) for r in runs]


def finished(name):
    """{method: {seed: run}} of the finished runs."""
    found = {}
    for method in DATA[name]:
        for seed in range(100):
            if os.path.exists(path_of(name, method, seed)):
                with open(path_of(name, method, seed)) as f:
                    found.setdefault(method, {})[seed] = json.load(f)
    return found


def table_of(runs):
    base = runs['random 64']
    seconds = np.mean([r['seconds'] for r in base.values()])
    head = [
        'method',
        'seeds',
        'mixture',
        'mean over sources',
        'small sources',
        'large sources',
        'mixture, over random 64',
        'gradient error (random)',
        'ms a step',
        'share of choosing',
        "mixture* at random 64's seconds",
        'MB made',
    ]
    lines = [f'| {" | ".join(head)} |', '|' + '---|' * len(head)]
    for method, by_seed in runs.items():
        rs = list(by_seed.values())
        errors = np.mean([r['errors'] for r in rs], 0) if rs[0]['errors'] else None
        spent, chosen = (np.mean([r[key] for r in rs]) for key in ('seconds', 'selecting'))
        cells = [method, str(len(rs)), *(mean([r[key] for r in rs]) for key in ('mixture', 'macro', 'small', 'large'))]
        cells.append(mean([r['mixture'] - base[seed]['mixture'] for seed, r in by_seed.items() if seed in base]))
        cells.append(f'{errors[0]:.2f} ({errors[1]:.2f})' if errors is not None else '')
        cells += [f'{1000 * spent / STEPS:.0f}', f'{100 * chosen / spent:.0f}%']
        cells += [f'{np.mean(at_seconds(rs, seconds)):.4f}', f'{np.mean([r["made"] for r in rs]) / 1e6:.0f}']
        lines.append(f'| {" | ".join(cells)} |')
    return lines


PAIRS = [  # data, method, against
    ('redundant', 'grad, unit, no sources', 'full 256'),
    ('redundant', 'grad, unit, no sources', 'random 64'),
    ('redundant', 'grad, Adam + l1', 'full 256'),
    ('redundant', 'zo m=1 (the paper)', 'random 64'),
    ('unlike', 'keep small + random', 'full 256'),
    ('unlike', 'grad, unit', 'full 256'),
    ('unlike', 'grad, unit', 'keep small + random'),
    ('unlike', 'stratified 64', 'random 64'),
    ('pystdlib', 'keep small + random', 'full 256'),
    ('pystdlib', 'zo m=1 (the paper)', 'keep small + random'),
    ('pystdlib', 'grad, Adam + l1', 'keep small + random'),
    ('pystdlib', 'grad, unit', 'keep small + random'),
    ('pystdlib', 'stratified 64', 'random 64'),
    ('pystdlib', 'grad, unit, stratified', 'stratified 64'),
    ('pystdlib', 'grad over sqrt(V), stratified', 'stratified 64'),
    ('pystdlib', 'grad, unit, no sources', 'random 64'),
    ('pystdlib', 'gradient clusters, one at random each', 'random 64'),
    ('math', 'keep small + random', 'full 256'),
    ('math', 'grad, unit, stratified', 'random 64'),
]


def pairs(found):
    """Lines of a table of differences between runs that share seed, initial weights and pools."""
    lines = ['| data | method | minus | seeds | mixture | mean over sources |', '|---|---|---|---|---|---|']
    for name, a, b in PAIRS:
        runs = found.get(name, {})
        seeds = sorted(set(runs.get(a, {})) & set(runs.get(b, {})))
        if seeds:
            both = (mean([runs[a][s][key] - runs[b][s][key] for s in seeds]) for key in ('mixture', 'macro'))
            lines.append(f'| {name} | {a} | {b} | {len(seeds)} | {" | ".join(both)} |')
    return lines


def draw(md, png):
    """A panel for each data set, of the tables in coreset.md, and one of the loss over the time of a step."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    tables = {name: rows for name in DATA if (rows := table_in(md, f'{name}:'))}
    figure, panels = plt.subplots(1, len(tables) + 1, figsize=(4 * len(tables) + 4, 6.5), layout='constrained')
    marks = [f'{colour}{mark}' for mark in 'os^D' for colour in ('C0', 'C1', 'C2', 'C3', 'C4', 'C5')]
    marks = dict(zip(METHODS, marks))  # the same in all panels
    name = 'redundant' if 'redundant' in tables else next(iter(tables))
    for axes, (title, rows) in zip(panels, [*tables.items(), (f'{name}, over time', tables[name])]):
        timed = axes is panels[-1]
        for row in rows:
            (x, dx), (y, dy) = ([float(n) for n in row[key].split('+-')] for key in ('mixture', 'mean over sources'))
            if timed:
                x, dx, y, dy = float(row['ms a step']), None, x, dx
            mark = marks[row['method']]
            axes.errorbar(x, y, xerr=dx, yerr=dy, fmt=mark[2:], color=mark[:2], ms=6, label=row['method'])
        axes.set(title=f'{title}, {STEPS} steps', xlabel='mixture loss', ylabel='mean over sources')
        if timed:
            axes.set(title=title, xlabel='CPU ms a step, log scale', ylabel='mixture loss', xscale='log')
    named = {}  # one legend for all panels, below, never over a point
    for axes in panels:
        named |= {label: mark for mark, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(named.values(), named, loc='outside lower center', ncols=5, fontsize=9)
    figure.savefig(png, dpi=110)
    plt.close(figure)


def report():
    """Make coreset.md and coreset.png from the finished runs."""
    found = {name: runs for name in DATA if (runs := finished(name))}
    lines = ['# Batches chosen from larger ones', '', *INTRODUCTION, '']
    for name, runs in found.items():
        lines += [f'## {name}: {HEADINGS[name]}', '', *table_of(runs), '']
    lines += ['## Differences, seed by seed', '', *pairs(found), '', *CONCLUSIONS, '', '![losses](coreset.png)', '']
    with open(os.path.join(ROOT, 'results', 'coreset.md'), 'w') as f:
        f.write('\n'.join(lines))
    draw(*(os.path.join(ROOT, 'results', f'coreset.{kind}') for kind in ('md', 'png')))


def main(args):
    if args.draw:
        return draw(*(os.path.join(ROOT, 'results', f'coreset.{kind}') for kind in ('md', 'png')))
    if args.report:
        return report()
    os.makedirs(OUT, exist_ok=True)
    torch.manual_seed(0)
    folders = {name: prepare(name, args.math) for name in ('pystdlib', 'unlike', 'math')}
    windows = {name: Windows(folder) for name, folder in folders.items() if folder}
    windows = {name: windows.get(name, windows['pystdlib']) for name in DATA if name in windows or name == 'redundant'}
    for name, w in windows.items():
        print(name, len(w.names), 'sources', f'small: {[w.names[q] for q in w.small]} {w.share[w.small].sum():.3f}',
              'held out', sum(map(len, w.held_out)))  # fmt: skip
    jobs = [(seed, name, method) for seed in range(args.seeds) for name in windows for method in DATA[name]]
    later = ('top loss', 'top norm', 'grad, unit, no sources', 'gradient clusters, one at random each')
    later = {
        'pystdlib': later,
        'redundant': DATA['redundant'][3:],
        'unlike': DATA['unlike'][4:],
        'math': DATA['math'][4:],
    }
    # The decisive runs of all seeds first, the slowest last.
    for seed, name, method in sorted(jobs, key=lambda job: (job[2] == 'zo m=16', job[2] in later[job[1]], job[0])):
        started = time.time()
        r = run(name, method, seed, windows[name])
        print(f'{seed} {name:10} {method:40} mixture {r["mixture"]:.4f} macro {r["macro"]:.4f} '
              f'{r["seconds"]:.1f} s {time.time() - started:.0f}', flush=True)  # fmt: skip
    report()


if __name__ == '__main__':
    main(args)
