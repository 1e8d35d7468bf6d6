"""
GLUE: eight tasks of sentences, or pairs of them, with a label each (arXiv 1804.07461).

    python data/glue/prepare.py --task=cola --tokenizer=MODEL_FOLDER                  # fetches nyu-mll/glue, on the hub
    python data/glue/prepare.py --task=cola --tokenizer=MODEL_FOLDER --input=my/glue  # GLUE's own folders of .tsv files
    python data/glue/prepare.py --task=mnli --tokenizer=MODEL_FOLDER --input=my/glue/MNLI --block_size=256

Then train with --task=classify --dataset=glue/cola. Train is GLUE's train, val its dev split, since the labels of test
are not published. MNLI has two dev splits, whose examples are of the sources matched (to which train belongs) and
mismatched. Rows hold what the model's own tokenizer makes of them, its special tokens with it.

| task | examples (train, dev) | labels, by number | metrics |
|---|---|---|---|
| cola | 8,551 / 1,043 | unacceptable, acceptable | matthews |
| sst2 | 67,349 / 872 | negative, positive | accuracy |
| mrpc | 3,668 / 408 | not_equivalent, equivalent | f1, accuracy |
| stsb | 5,749 / 1,500 | a number from 0 to 5 | pearson, spearman |
| qqp | 363,846 / 40,430 | not_duplicate, duplicate | f1, accuracy |
| mnli | 392,702 / 9,815 and 9,832 | entailment, neutral, contradiction | accuracy |
| qnli | 104,743 / 5,463 | entailment, not_entailment | accuracy |
| rte | 2,490 / 277 | entailment, not_entailment | accuracy |

GLUE's files know no quotes: what looks like one is part of the sentence. Lines with too few or too many columns are
left out and counted.
"""

import os
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from data import DataError, common, examples, fields, files, labelled  # noqa: E402

HUB = 'nyu-mll/glue'
BATCH = 2000  # examples tokenised at a time
MOST_BROKEN = 0.05  # of the lines of a file


@dataclass(frozen=True)
class Task:
    """folder: its name in GLUE; texts, label: columns of its .tsv files, by name, or by number where they have no
    header; hub: columns of its texts on the hub; names: of the labels; words: what a file has for each of them."""

    folder: str
    texts: tuple
    label: str
    hub: tuple
    names: tuple
    metrics: tuple
    words: tuple = ()
    columns: int = 0  # of a file without a header

    def number(self, word, place):
        """The label that a word in a file stands for. Raises DataError."""
        words = self.words or self.names
        if words:
            if word in words:
                return words.index(word)
            may = ' or '.join(words)
        else:
            try:
                if 0 <= float(word) <= 5:
                    return float(word)
            except ValueError:
                pass
            may = 'a number from 0 to 5'
        raise DataError(f'{place}: the label is {fields.shown(word)}, not {may}: is this a file of {self.folder}?')


DIGITS = ('0', '1')
TASKS = {
    'cola': Task('CoLA', (3,), 1, ('sentence',), ('unacceptable', 'acceptable'), ('matthews',), DIGITS, 4),
    'sst2': Task('SST-2', ('sentence',), 'label', ('sentence',), ('negative', 'positive'), ('accuracy',), DIGITS),
    'mrpc': Task(
        'MRPC', ('#1 String', '#2 String'), 'Quality', ('sentence1', 'sentence2'),
        ('not_equivalent', 'equivalent'), ('f1', 'accuracy'), DIGITS,
    ),
    'stsb': Task(
        'STS-B', ('sentence1', 'sentence2'), 'score', ('sentence1', 'sentence2'), (), ('pearson', 'spearman')
    ),
    'qqp': Task(
        'QQP', ('question1', 'question2'), 'is_duplicate', ('question1', 'question2'),
        ('not_duplicate', 'duplicate'), ('f1', 'accuracy'), DIGITS,
    ),
    'mnli': Task(
        'MNLI', ('sentence1', 'sentence2'), 'gold_label', ('premise', 'hypothesis'),
        ('entailment', 'neutral', 'contradiction'), ('accuracy',),
    ),
    'qnli': Task(
        'QNLI', ('question', 'sentence'), 'label', ('question', 'sentence'), ('entailment', 'not_entailment'),
        ('accuracy',),
    ),
    'rte': Task(
        'RTE', ('sentence1', 'sentence2'), 'label', ('sentence1', 'sentence2'), ('entailment', 'not_entailment'),
        ('accuracy',),
    ),
}  # fmt: skip
# (our split, source, GLUE's file, the hub's split), '' for the task's own name as the source
SPLITS = [('train', '', 'train.tsv', 'train'), ('val', '', 'dev.tsv', 'validation')]
MNLI = [('train', 'matched', 'train.tsv', 'train')]
MNLI += [('val', kind, f'dev_{kind}.tsv', f'validation_{kind}') for kind in ('matched', 'mismatched')]
MSR = ('msr_paraphrase_train.txt', ('mrpc_dev_ids.tsv', 'dev_ids.tsv'))  # MRPC as Microsoft has it


# ---- files -----------------------------------------------------------------------------------------------------------


def lines_of(path):
    """The lines of a .tsv file, each a list of its columns. No quoting; only a newline ends a line."""
    text = files.decoded(path, files.unpacked(path, Path(path).read_bytes()))
    return [line.removesuffix('\r').split('\t') for line in text.removesuffix('\n').split('\n')]


def table(task, path, drops):
    """Yield (place, texts, label, the row's columns by name) of a file. Raises DataError if it is of another task."""
    lines, first = lines_of(path), 1
    if task.columns:
        names, width = {i: i for i in range(task.columns)}, task.columns
    else:
        head, first = lines[0], 2
        names, width = {name: i for i, name in enumerate(head)}, len(head)
        if missing := [name for name in (*task.texts, task.label) if name not in names]:
            raise DataError(
                f'{path} is no file of {task.folder} with labels: its first line has no column {missing[0]!r}, it is '
                f'{" ".join(head)[:80]!r}: name the folder of {task.folder} as GLUE has it, header included'
            )
    broken = 0
    for n, line in enumerate(lines[first - 1 :], first):
        if len(line) != width:
            broken += 1
            drops.add('a line with too few columns' if len(line) < width else 'a line with too many', f'{path}:{n}')
            continue
        if line[names[task.label]] == '-' and not task.words:
            drops.add('no label (-)', f'{path}:{n}')
            continue
        label = task.number(line[names[task.label]], f'{path}:{n}')
        yield f'{path}:{n}', [line[names[name]] for name in task.texts], label, line
    if broken > MOST_BROKEN * len(lines):
        raise DataError(
            f'{path}: {broken:,} of {len(lines):,} lines have not the {width} columns of {task.folder}: fetch it '
            f'again, or name the folder of {task.folder}'
        )


def folder_of(task, given):
    """The task's own folder: --input names it, or the one that holds it."""
    for path in (Path(given) / task.folder, Path(given)):
        if (path / 'train.tsv').exists() or (path / MSR[0]).exists():
            return path
    what = 'is no folder' if not os.path.isdir(given) else f'holds neither {task.folder}/train.tsv nor train.tsv'
    raise DataError(f"--input={given} {what}: name GLUE's folder, or that of the task")


def local(name, given, drops):
    """Yield (place, split, source, texts, label) of GLUE's own files."""
    task = TASKS[name]
    folder = folder_of(task, given)
    if name == 'mrpc' and not (folder / 'train.tsv').exists():
        yield from paraphrases(task, folder, drops)
        return
    for split, source, file, _ in MNLI if name == 'mnli' else SPLITS:
        if not (folder / file).exists():
            raise DataError(f'{folder / file} does not exist: the dev split of {task.folder} belongs to it, fetch it')
        for place, texts, label, _ in table(task, folder / file, drops):
            yield place, split, source or name, texts, label


def paraphrases(task, folder, drops):
    """MRPC from Microsoft's file of training pairs, of which GLUE's list of ids says which are dev."""
    path, lists = folder / MSR[0], [folder / one for one in MSR[1] if (folder / one).exists()]
    if not lists:
        raise DataError(f'{path} is without {MSR[1][0]}, which says which pairs are dev: fetch it from GLUE')
    dev = {tuple(line) for line in lines_of(lists[0])}
    for place, texts, label, line in table(task, path, drops):
        yield place, 'val' if tuple(line[1:3]) in dev else 'train', 'mrpc', texts, label


def from_hub(name):
    """The same of the hub."""
    task = TASKS[name]
    for split, source, _, theirs in MNLI if name == 'mnli' else SPLITS:
        for n, row in enumerate(examples.from_hub('glue', HUB, name, theirs), 1):
            place = f'{HUB} {name} {theirs} {n}'
            if missing := {*task.hub, 'label'} - row.keys():
                raise DataError(f'{place} is not in the format of GLUE: it lacks {min(missing)}')
            label = row['label']
            if not (0 <= label < len(task.names) if task.names else 0 <= label <= 5):
                raise DataError(f'{place}: the label is {label}, which is none of {name}')
            yield place, split, source or name, [row[column] for column in task.hub], label


# ---- the folder ------------------------------------------------------------------------------------------------------


def prepare(name, rows, out_dir, model, block_size, made_by, drops):
    """Write the folder of a task. rows: (place, split, source, texts, label). -> its meta.json, the Report."""
    model = common.model_folder(model)
    task, tok = TASKS[name], common.choose_tokenizer(model, None, None)
    folder = model if os.path.isdir(model) else None
    if folder and os.path.realpath(folder) == os.path.realpath(out_dir):
        raise DataError(f'--out_dir={out_dir} is the folder of the model, whose files it would replace: name another')
    longest, report = block_size or labelled.room(folder), Report(task, tok)
    if longest > labelled.room(folder, longest):
        raise DataError(f'--block_size={longest} is more than the model reads: use {labelled.room(folder, longest)}')
    extra = {'glue': name, 'block_size': longest}
    with labelled.LabelledWriter(out_dir, tok, task.names, task.metrics, made_by, folder, **extra) as out:
        while batch := list(islice(rows, BATCH)):
            pairs = [(texts[0], texts[1] if len(texts) > 1 else None) for _, _, _, texts, _ in batch]
            for one, coded in zip(batch, labelled.encode(tok, pairs, longest)):
                (place, split, source, texts, label), (ids, second, cut) = one, coded
                if not ids:
                    drops.add('no text', place)
                    continue
                out.add_labelled(source, split, ids, label, second, len(''.join(texts).encode('utf-8', 'replace')))
                report.add(split, source, ids, label, cut)
        for split in common.SPLITS:
            if not out.examples[split]:
                raise DataError(f'no example is left for the {split} split: {"; ".join(drops.lines()) or "no rows"}')
        out.extra |= {'dropped': sum(drops.counts.values()), 'truncated': report.cut}
    return out.meta, report


class Report:
    """What became of the examples: their lengths and labels in each split, and one of them."""

    def __init__(self, task, tok):
        self.task, self.tok, self.cut, self.shown, self.found = task, tok, 0, None, {}

    def add(self, split, source, ids, label, cut):
        self.shown = self.shown or (ids, label)
        lengths, labels = self.found.setdefault((split, source), ([], []))
        lengths.append(len(ids))
        labels.append(label)
        self.cut += cut

    def shares(self, labels):
        """'acceptable 70 %', or of numbers their mean."""
        if not self.task.names:
            return f'mean {np.mean(labels):.2f}'
        return ', '.join(f'{name} {np.mean(np.equal(labels, i)):.0%}' for i, name in enumerate(self.task.names))

    def print(self, meta, folder, drops, seconds):
        ids, label = self.shown
        print('the first example, and its label:\n')
        print(examples.printable(self.tok.decode(ids)))
        print(f'-> {self.task.names[label] if self.task.names else label}\n')
        names = [f'{split}, {source}' for split, source in self.found]
        width = max(map(len, names))
        print(f'{"split, source":<{width}}  examples      tokens    p50    p90    p99    max  labels')
        for name, (lengths, labels) in zip(names, self.found.values()):
            p = [int(np.percentile(lengths, q, method='inverted_cdf')) for q in (50, 90, 99, 100)]
            row = f'{len(lengths):>8,}  {sum(lengths):>10,}' + ''.join(f'  {one:>5,}' for one in p)
            print(f'{name:<{width}}  {row}  {self.shares(labels)}')
        for line in drops.lines():
            print(line)
        if self.cut:
            print(f'{self.cut:,} cut to {meta["block_size"]:,} tokens')
        known = ('glue', 'tokenizer', 'vocab_size', 'train_examples', 'val_examples', 'dropped', 'truncated', 'longest')
        for name in (*known, 'train_tokens', 'val_tokens'):
            print(f'{name}: {meta[name]}')
        print(f'metrics: {" ".join(meta["metrics"])}')
        print(f'seconds: {seconds:.1f}')
        print(f'written: {folder}')


def main():
    parser = common.parser(__doc__)
    parser.add_argument('--task', required=True, choices=[*TASKS], help='of GLUE')
    parser.add_argument('--tokenizer', required=True, help="the model's folder, or its name on the hub")
    parser.add_argument('--input', default=None, help="GLUE's folder of .tsv files, or the task's own in it")
    parser.add_argument(
        '--block_size', type=examples.positive, default=None, help='longest example; 512 or what the model reads'
    )
    parser.add_argument(
        '--out_dir', type=common.folder, default=None, help='where it goes; data/glue/TASK if not given'
    )
    args, start = parser.parse_args(), time.time()
    drops, out_dir = examples.Drops(), args.out_dir or str(HERE / args.task)
    rows = local(args.task, args.input, drops) if args.input else from_hub(args.task)
    made_by = common.made_by('glue')
    meta, report = prepare(args.task, rows, out_dir, args.tokenizer, args.block_size, made_by, drops)
    report.print(meta, out_dir, drops, time.time() - start)


if __name__ == '__main__':
    common.run(main)
