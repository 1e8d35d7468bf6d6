"""
Batch t as a pure function of (seed, t, rank, world size): nothing to save, and resuming is exact.

    data = Tokens('data/pystdlib', 'train', block_size=256)
    x, y, sources = data.batch(seed=1, t=0, batch_size=8)       # x, y: (8, 256) int64; y is x one token later

An epoch is a random permutation of all windows of block_size tokens. Each epoch shifts their grid by a new random
offset, so that it cuts the text in other places. prepare.py writes train.bin and val.bin, token ids as uint16 or
uint32 with documents grouped by source, and meta.json, which holds the counts.
"""

import hashlib
import os

import numpy as np
import torch

from data import DataError, fields

COUNT = fields.whole(0, 2**48)
META = {
    'dtype': fields.one_of('uint16', 'uint32'),
    'vocab_size': fields.whole(1, fields.ROWS),
    'train_tokens': fields.whole(1, 2**48),
    'val_tokens': fields.whole(1, 2**48),
    'sources': fields.several(fields.table()),
}
SOURCE = {'name': fields.text(), 'train_tokens': COUNT, 'val_tokens': COUNT}


def read_meta(folder):
    """meta.json of a prepared folder, as a dict. Raises DataError if it is missing or broken."""
    path, advice = os.path.join(folder, 'meta.json'), 'run its prepare.py again'
    try:
        meta = fields.read(path, META, DataError, advice)
    except FileNotFoundError:
        raise DataError(f'{path} does not exist: run python {os.path.join(folder, "prepare.py")} first') from None
    for i, source in enumerate(meta['sources']):
        fields.check(source, SOURCE, f'{path}, source {i}', DataError, advice)
    for count in ('train_tokens', 'val_tokens'):
        if (total := sum(source[count] for source in meta['sources'])) != meta[count]:
            raise DataError(f'{path}: {count} is {meta[count]}, its sources have {total}: {advice}')
    return meta


def fingerprint(folder):
    """16 hex digits that tell the data of a prepared folder from any other, in milliseconds however large it is.

    Of what batches are made of: the order of the sources, the tokens at places spread over both files (a file of up to
    4 MB wholly), and the checksum of all of them that prepare.py left in meta.json. Times and places do not count, so
    the same data prepared again is the same. Raises DataError if the folder is not prepared."""
    meta = read_meta(folder)
    sources = [(source['name'], source['train_tokens'], source['val_tokens']) for source in meta['sources']]
    identity = hashlib.blake2b(repr((meta.get('checksum'), meta['dtype'], sources)).encode(), digest_size=8)
    for split in ('train', 'val'):
        path = os.path.join(folder, f'{split}.bin')
        try:
            with open(path, 'rb') as f:
                size, block = os.path.getsize(path), 2**16
                for i in range(64):
                    f.seek(i * block if size <= 64 * block else i * (size - block) // 63)
                    identity.update(f.read(block))
        except OSError as error:
            raise DataError(f'{path} cannot be read ({error.strerror}): run its prepare.py again') from None
    return identity.hexdigest()


def trained_tokens(micro_batches):
    """How many targets of a step are trained, those that are not -100, each counted as its weight says: a 0-dim fp32
    tensor. micro_batches: (x, y), (x, y, weights), or with more behind; weights (B,), (B, T) or None."""
    count = torch.zeros(())
    for _, y, *weights in micro_batches:
        keep = y != -100  # (B, T)
        count = count + (keep if not weights or weights[0] is None else keep * weights[0].view(len(y), -1)).sum()
    return count


class Tokens:
    """The token file of one split. Raises DataError if it is missing, truncated or too short."""

    def __init__(self, folder, split, block_size):
        self.path, self.block_size = os.path.join(folder, f'{split}.bin'), block_size
        meta = read_meta(folder)
        self.vocab_size, n = meta['vocab_size'], meta[f'{split}_tokens']
        try:
            found = os.path.getsize(self.path) // np.dtype(meta['dtype']).itemsize
        except OSError as error:
            raise DataError(f'{self.path} cannot be read ({error.strerror}): run its prepare.py again') from None
        if found != n:
            raise DataError(f'{self.path} holds {found} tokens, meta.json says {n}: run its prepare.py again')
        if n <= block_size:
            raise DataError(f'{self.path} holds {n} tokens, too few for a window of {block_size}: lower block_size')
        self.tokens = np.memmap(self.path, dtype=meta['dtype'], mode='r')
        self.sources = [source['name'] for source in meta['sources']]
        self.source_ends = np.cumsum([source[f'{split}_tokens'] for source in meta['sources']])
        # A window with its targets takes block_size + 1 tokens. One window is given up, so that the offset of the grid
        # can vary by up to block_size.
        self.windows = max((n - 1) // block_size - 1, 1)
        self.shifts = min(block_size, n - self.windows * block_size)
        self.skip = 0  # windows that a run read with another batch size, more or fewer than batch t supposes
        self.order = {}  # {(seed, epoch): (permutation, offset)} of the last epoch used; a cache, not saved

    def epoch(self, seed, epoch):
        if (seed, epoch) not in self.order:
            rng = np.random.default_rng((seed, epoch))
            self.order = {(seed, epoch): (rng.permutation(self.windows), int(rng.integers(self.shifts)))}
        return self.order[seed, epoch]

    def batch(self, seed, t, batch_size, rank=0, world=1):
        """Batch t -> x, y (batch_size, block_size) int64 and the source index of each window, (batch_size,) int64.

        Processes share one stream: at t, rank r of W reads what a single process reads at t W + r."""
        first = self.skip + (t * world + rank) * batch_size
        starts = []
        for i in range(first, first + batch_size):  # a batch may span two epochs
            order, offset = self.epoch(seed, i // self.windows)
            starts.append(int(order[i % self.windows]) * self.block_size + offset)
        return self.read(starts)

    def evaluation(self, n_tokens, batch_size):
        """Yield (x, y, sources) of fixed windows spread evenly over the file, n_tokens in total or the whole file."""
        available = (len(self.tokens) - 1) // self.block_size
        n = max(min(n_tokens // self.block_size, available), 1)
        for i in range(0, n, batch_size):
            yield self.read([j * available // n * self.block_size for j in range(i, min(i + batch_size, n))])

    def read(self, starts):
        rows = np.stack([self.tokens[s : s + self.block_size + 1] for s in starts]).astype(np.int64)  # (B, T + 1)
        if rows.max() >= self.vocab_size:
            where = starts[int(rows.max(axis=1).argmax())]
            reason = f'token id {rows.max()} near position {where} is beyond the vocabulary of {self.vocab_size}'
            raise DataError(f'{self.path}: {reason}: the file is broken, run its prepare.py again')
        middles = np.array(starts) + self.block_size // 2  # a window belongs to the source of its middle token
        sources = torch.from_numpy(np.searchsorted(self.source_ends, middles, side='right'))
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), sources
