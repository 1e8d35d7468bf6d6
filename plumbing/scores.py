"""
What eval.py counts and how it is shown: a Tally for each source of a data set under a checkpoint, totals, and tables.

    tally = Tally('out/run', 'test.jsonl', 'algebra')       # its counts are added to; tally.summary() -> dict
    lines = table([tally.summary()], LOSSES)                # or ANSWERS
"""

import math
from itertools import groupby

import torch

from data.agreement import METRICS
from data.tasks import wilson
from plumbing.classify import judged


class Tally:
    """What is counted of one source of one data set under one checkpoint."""

    def __init__(self, checkpoint, data, source):
        self.checkpoint, self.data, self.source = checkpoint, data, source
        self.examples = self.tokens = self.bytes = self.questions = self.cut = self.no_answer = 0
        self.nats, self.right = 0.0, {}  # right: of each rule

    def summary(self):
        """What it comes to, as a dict; what was not scored is left out."""
        found = {'checkpoint': self.checkpoint, 'data': self.data, 'source': self.source}
        if self.tokens:
            loss = self.nats / self.tokens
            found |= {'examples': self.examples, 'tokens': self.tokens, 'bytes': self.bytes, 'loss': loss}
            found |= {'perplexity': math.exp(min(loss, 700)), 'bits_per_byte': None}
            if self.bytes:
                found['bits_per_byte'] = self.nats / math.log(2) / self.bytes
        if n := self.questions:
            low, high = wilson(self.right['exact'], n)
            found |= {'questions': n, 'right': self.right['exact'], 'low': low, 'high': high}
            found |= {rule: k / n for rule, k in self.right.items()}
            found |= {'cut': self.cut / n, 'no_answer': self.no_answer / n}
        return found

    def add(self, some):
        """Take in what these Tallies counted."""
        for name in ('examples', 'tokens', 'bytes', 'questions', 'cut', 'no_answer', 'nats'):
            setattr(self, name, sum(getattr(tally, name) for tally in some))
        rules = [rule for rule in RULES if all(rule in tally.right for tally in some if tally.questions)]
        self.right = {rule: sum(tally.right.get(rule, 0) for tally in some) for rule in rules}


class LabelTally(Tally):
    """What a classifier said of the examples of one source of a Labelled `of`: logits (n, labels), targets (n,)."""

    def __init__(self, checkpoint, data, source, of=None, logits=None, targets=None):
        super().__init__(checkpoint, data, source)
        self.of, self.logits, self.targets = of, logits, targets

    def add(self, some):
        self.of = some[0].of
        self.logits, self.targets = (torch.cat([getattr(one, name) for one in some]) for name in ('logits', 'targets'))

    def summary(self):
        found = {'checkpoint': self.checkpoint, 'data': self.data, 'source': self.source, 'labelled': len(self.targets)}
        scores, self.notes = judged(self.of, self.logits, self.targets)
        if 'accuracy' in scores:
            low, high = wilson(round(scores['accuracy'] * len(self.targets)), len(self.targets))
            found |= {'low': low, 'high': high}
        return found | scores


def shortened(text, width):
    return text if len(text) <= width else '\u2026' + text[1 - width :]


RULES = ('exact', 'strict', 'flexible')
LOSSES = {
    'examples': ('examples', '{:,}'),
    'tokens': ('tokens', '{:,}'),
    'loss': ('loss', '{:.4f}'),
    'perplexity': ('perplexity', '{:.4g}'),
    'bits_per_byte': ('bits/byte', '{:.4f}'),
}
ANSWERS = {
    'questions': ('questions', '{:,}'),
    'exact': ('exact', '{:.1%}'),
    'interval': ('95 % interval', '{}'),
    'strict': ('strict', '{:.1%}'),
    'flexible': ('flexible', '{:.1%}'),
    'cut': ('cut', '{:.1%}'),
    'no_answer': ('none', '{:.1%}'),
}


LABELS = {
    'labelled': ('examples', '{:,}'),
    'loss': ('loss', '{:.4f}'),
    'accuracy': ('accuracy', '{:.1%}'),
    'interval': ANSWERS['interval'],
    **{name: (name, '{:.4f}') for name in METRICS if name != 'accuracy'},
}


def table(found, columns):
    """Lines of a table of at most 100 columns, a line for each dict that has the first of the columns."""
    found = [one for one in found if next(iter(columns)) in one]
    if not found:
        return []
    if columns is LABELS:  # of which each task has some
        has = {name for one in found for name in one} | ({'interval'} if any('low' in one for one in found) else set())
        columns = {name: column for name, column in columns.items() if name in has}
    names = ('checkpoint', 'data', 'source')
    lines = [[*names, *(title for title, _ in columns.values())]]
    for one in found:
        if 'low' in one:
            one = one | {'interval': f'{one["low"]:.1%} to {one["high"]:.1%}'}
        shown = [form.format(one[key]) if one.get(key) is not None else '-' for key, (_, form) in columns.items()]
        lines.append([*(one[name] for name in names), *shown])
    widths = [max(map(len, column)) for column in zip(*lines)]
    room = 100 - sum(widths[3:]) - 2 * (len(widths) - 1)
    while sum(widths[:3]) > room:
        widths[widths.index(max(widths[:3]))] -= 1
    lines = [[*map(shortened, line[:3], widths), *line[3:]] for line in lines]
    aligned = ([f'{t:<{w}}' if i < 3 else f'{t:>{w}}' for i, (t, w) in enumerate(zip(line, widths))] for line in lines)
    return ['  '.join(line).rstrip() for line in aligned]


def with_totals(tallies):
    """The tallies, and behind those of several sources of one data set their sum."""
    for _, some in groupby(tallies, key=lambda tally: (tally.checkpoint, tally.data)):
        some = list(some)
        yield from some
        if len(some) > 1:
            total = type(some[0])(some[0].checkpoint, some[0].data, 'all sources')
            total.add(some)
            yield total
