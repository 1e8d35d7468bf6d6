"""
Loss curves of several runs in one picture, from their metrics.csv (pip install -r requirements-extra.txt).

    python -m bench.plot out/galore_laptop out/adamw_laptop                # writes loss.png
    python -m bench.plot out/* --png=results/laptop.png --x=seconds --y=val_loss
"""

import csv
import os
import re
import sys

from bench import parser

COLUMNS = ['step', 'tokens', 'seconds', 'train_loss', 'val_loss', 'learning_rate', 'grad_norm', 'tokens_per_second']
if __name__ == '__main__':
    asked = parser()
    asked.add_argument('runs', nargs='+', help='folders of runs, or metrics.csv files')
    asked.add_argument('--png', default='loss.png', help='the file to write (default: loss.png)')
    asked.add_argument('--x', default='step', choices=COLUMNS[:3], help='column of the x axis (default: step)')
    asked.add_argument('--y', default='val_loss', choices=COLUMNS[3:], help='column of the y axis (default: val_loss)')
    asked.add_argument(
        '--mean', type=int, default=1, choices=range(1, 10**6), metavar='N', help='draw means of N points'
    )
    args = asked.parse_args()


def read(run, x, y):
    """[(x, y)] of two columns of run/metrics.csv, without rows that lack one of them."""
    path = os.path.join(run, 'metrics.csv') if os.path.isdir(run) else run
    with open(path, newline='') as f:
        return [(float(row[x]), float(row[y])) for row in csv.DictReader(f) if row[x] and row[y]]


def table_in(path, heading):
    """Rows (dicts) of the first table under `## heading` of a file in results/, from which pictures are drawn anew."""
    with open(path, encoding='utf-8') as f:
        part = re.split(rf'^## {re.escape(heading)}.*$', f.read(), maxsplit=1, flags=re.M)
    lines = part[1].split('\n## ')[0].splitlines() if part[1:] else []
    rows = [[cell.strip() for cell in line.strip().strip('|').split('|')] for line in lines if line.startswith('|')]
    return [dict(zip(rows[0], row)) for row in rows[2:]]


def means(points, n):
    """The mean of each n points that follow one another."""
    return [tuple(sum(values) / n for values in zip(*points[i : i + n])) for i in range(len(points) - n + 1)]


def draw(runs, png, x='step', y='val_loss', labels=None, title=None, mean=1):
    """One line per run: y over x, both columns of metrics.csv, each point the mean of so many."""
    import matplotlib

    matplotlib.use('Agg')  # a file, no window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout='constrained')
    for run, label in zip(runs, labels or runs):
        points = means(read(run, x, y), mean)
        axes.plot(*zip(*points), label=f'{label}: {points[-1][1]:.3f}', marker='o' if len(points) < 20 else None, ms=3)
    axes.set(xlabel=x.replace('_', ' '), ylabel=y.replace('_', ' '), title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower left', fontsize=8)  # never over a curve
    figure.savefig(png, dpi=120)
    plt.close(figure)


if __name__ == '__main__':
    try:
        draw(args.runs, args.png, args.x, args.y, mean=args.mean)
        print(f'written: {args.png}')
    except ModuleNotFoundError:
        sys.exit('error: bench.plot needs matplotlib: pip install -r requirements-extra.txt')
    except OSError as error:
        sys.exit(
            f'error: {error.filename}: {error.strerror}: name folders of runs of train.py, and a --png to write to'
        )
    except (KeyError, ValueError, IndexError, TypeError) as error:
        sys.exit(f'error: {error!r}: name folders of runs of train.py, each with a metrics.csv that has {args.y}')
