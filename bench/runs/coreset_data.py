"""The data of bench/runs/coreset.py: texts, tokens, pools of windows."""

import json
import os
import sysconfig
from pathlib import Path

import numpy as np
import torch

from data import common
from data.batches import Tokens, read_meta
from data.pystdlib import prepare as pystdlib
from plumbing.build import ROOT

OUT = os.path.join(ROOT, 'out', 'coreset')
T, VOCABULARY, POOL, BATCH = 24, 512, 256, 64  # tokens in a window, token ids, windows in a pool and in a batch


def texts_unlike():
    """[(source, text)] of files that come with Python: its modules, and a little of five other kinds of text."""
    root, found = Path(sysconfig.get_paths()['stdlib']), []
    kinds = {
        'python': sorted(root.glob('*.py')),
        'english': [root / 'pydoc_data' / 'topics.py'],
        'tables': sorted(root.glob('encodings/cp*.py')),
        'headers': sorted(Path(sysconfig.get_paths()['include']).rglob('*.h')),
        'news': sorted(root.glob('idlelib/*.txt')) + sorted(root.glob('LICENSE.txt')),
        'html': sorted(root.rglob('*.html')),
    }
    for kind, paths in kinds.items():
        text = '\n'.join(path.read_text(encoding='utf-8', errors='replace') for path in paths if path.exists())
        text = text if kind == 'python' else text[:200_000]
        found += [(kind, text[a : a + 10_000]) for a in range(0, len(text), 10_000)]
    return found


def prepare(name, math):
    """The folder of a data set with a vocabulary of 512, or None if its source is missing."""
    folder = os.path.join(OUT, 'data', name)
    if os.path.exists(os.path.join(folder, 'meta.json')):
        return folder
    if name == 'pystdlib':
        pystdlib.prepare(folder, 'bpe', VOCABULARY)
        return folder
    if name == 'unlike':
        texts = texts_unlike()
    else:
        path = os.path.join(math or '', 'train.jsonl')
        if not os.path.exists(path):
            print(f'math is left out: {path} does not exist; name a folder that holds it with --math=')
            return None
        with open(path, encoding='utf-8') as f:
            rows = sorted(map(json.loads, f), key=lambda row: row['source'])
        texts = [(row['source'], f'{row["instruction"]}\n{row["output"]}') for row in rows]
    tok = common.choose_tokenizer('bpe', (text for _, text in texts), VOCABULARY)
    with common.Writer(folder, tok, 'python -m bench.runs.coreset') as out:
        for i, (source, text) in enumerate(texts):
            out.add(source, 'val' if i == 0 else 'train', text)
    return folder


class Windows:
    """All windows of a data set by source; every tenth is held out for evaluation. Sources of fewer than 40 windows are
    left out; small sources are those below average size."""

    def __init__(self, folder):
        tokens = Tokens(folder, 'train', T)
        self.vocabulary = read_meta(folder)['vocab_size']
        ends = tokens.source_ends
        self.train, self.held_out, self.names = [], [], []
        for name, a, b in zip(tokens.sources, [0, *ends[:-1]], ends):
            starts = np.arange(a, b - T - 1, T)
            if len(starts) >= 40:
                rows = np.stack([tokens.tokens[s : s + T + 1] for s in starts]).astype(np.int64)
                self.names.append(name)
                self.train.append(np.delete(rows, np.s_[::10], axis=0))
                self.held_out.append(rows[::10][:: max(len(rows[::10]) // 60, 1)])
        sizes = np.array([len(rows) for rows in self.train])
        self.share, self.small = sizes / sizes.sum(), np.flatnonzero(sizes < sizes.mean()).tolist()
        self.sources = np.repeat(np.arange(len(sizes)), sizes)
        self.rows = np.concatenate(self.train)

    def pool(self, seed, step, redundant=False):
        """x, y (256, T) and sources (256,) of a step, the same for all methods. redundant: 64 windows, repeated
        unevenly to make 256, with 3 % of the tokens replaced at random."""
        rng = np.random.default_rng((seed, step))
        chosen = rng.choice(len(self.rows), POOL, replace=False)
        rows = self.rows[chosen]
        if redundant:
            copies = rng.multinomial(POOL - BATCH, rng.dirichlet(np.full(BATCH, 0.7))) + 1
            chosen = rng.permutation(np.repeat(chosen[:BATCH], copies))
            rows = self.rows[chosen]
            noise = rng.random(rows.shape) < 0.03
            rows = np.where(noise, rng.integers(self.vocabulary, size=rows.shape), rows)
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), self.sources[chosen]
