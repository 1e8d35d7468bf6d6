"""
Batch t as a pure function of (seed, t, rank, world size): nothing to save, and resuming is exact.

    data = load('data/pystdlib', 'train', block_size=256)       # Tokens, or Examples where the folder holds such
    x, y, sources = data.batch(seed=1, t=0, batch_size=8)       # x, y: (8, 256) int64; y is x one token later
    x, y, sources, pieces = data.batch(seed=1, t=0, batch_size=8)           # of packed rows, see attention.positions_of

Text: an epoch is a random permutation of all windows of block_size tokens. Each epoch shifts their grid by a new random
offset, so that it cuts the text in other places. prepare.py writes train.bin and val.bin, token ids as uint16 or
uint32 with documents grouped by source, and meta.json, which holds the counts.

Examples: an epoch is a random permutation of windows that are filled with whole examples, or of examples, padded to the
longest of their batch. Beside the tokens lie SPLIT_ends.bin, int64, the position one past each example's last token,
and SPLIT_trained.bin, uint8, 1 where a token is trained as a target. A target that is not is -100.

    x, y, sources, lengths, types = data.batch(seed=1, t=0, batch_size=8)      # of examples with a label each

Labelled examples: x (8, T) are sentences, or pairs of them, behind whose lengths (8,) stands the pad id; y (8,) their
labels, and types (8, T) 1 from where the second sentence begins, which SPLIT_pairs.bin, int64, says of each example.
SPLIT_labels.bin: int64 of a class, float32 of a number.
"""

import bisect
import hashlib
import os

import numpy as np
import torch
import torch.nn.functional as F

from data import DataError, agreement, fields

COUNT = fields.whole(0, 2**48)
META = {
    'dtype': fields.one_of('uint16', 'uint32'),
    'vocab_size': fields.whole(1, fields.ROWS),
    'train_tokens': fields.whole(1, 2**48),
    'val_tokens': fields.whole(1, 2**48),
    'sources': fields.several(fields.table()),
}
SOURCE = {'name': fields.text(), 'train_tokens': COUNT, 'val_tokens': COUNT}
EXAMPLES = {'examples': fields.switch(False), 'task': fields.one_of('lm', 'classify', default='lm')}
CLASSES = {  # of a task of labels; labels: their names, none where the label is a number
    'labels': fields.several(fields.text()),
    'metrics': fields.several(fields.one_of(*agreement.METRICS)),
    'pad': fields.whole(0, fields.ROWS),
}
KINDS = {'lm': ('', '_trained', '_ends'), 'classify': ('', '_ends', '_labels', '_pairs')}  # files of examples
COUNTS = {'train_examples': fields.whole(1, 2**48), 'val_examples': fields.whole(1, 2**48)}
COUNTS |= {'train_trained': COUNT, 'val_trained': COUNT}


def of_task(folder):
    """Whether it is one of the folders that a prepare.py above makes, one for each task: data/glue/cola."""
    above = os.path.dirname(os.path.normpath(folder))
    return os.path.basename(above) in ('glue', 'superglue') and os.path.exists(os.path.join(above, 'prepare.py'))


def prepare_command(folder):
    """What fills a folder in data/."""
    above, task = os.path.split(os.path.normpath(folder))
    if of_task(folder):
        return f'python {os.path.join(above, "prepare.py")} --task={task}'
    return f'python {os.path.join(folder, "prepare.py")}'


def read_meta(folder):
    """meta.json of a prepared folder, as a dict. Raises DataError if it is missing or broken."""
    path, advice = os.path.join(folder, 'meta.json'), 'run its prepare.py again'
    try:
        meta = fields.read(path, META, DataError, advice)
    except FileNotFoundError:
        raise DataError(f'{path} does not exist: run {prepare_command(folder)} first') from None
    for i, source in enumerate(meta['sources']):
        fields.check(source, SOURCE, f'{path}, source {i}', DataError, advice)
    meta = fields.check(meta, EXAMPLES, path, DataError, advice)
    counts = ['train_tokens', 'val_tokens']
    if meta['examples']:
        fields.check(meta, COUNTS | (CLASSES if meta['task'] == 'classify' else {}), path, DataError, advice)
        counts += ['train_examples', 'val_examples']
        for i, source in enumerate(meta['sources']):
            fields.check(source, dict.fromkeys(counts[2:], COUNT), f'{path}, source {i}', DataError, advice)
    for count in counts:
        if (total := sum(source[count] for source in meta['sources'])) != meta[count]:
            raise DataError(f'{path}: {count} is {meta[count]}, its sources have {total}: {advice}')
    return meta


def fingerprint(folder):
    """16 hex digits that tell the data of a prepared folder from any other, in milliseconds however large it is.

    Of what batches are made of: the order of the sources, the tokens at places spread over the files (a file of up to
    4 MB wholly), and the checksum of all of them that prepare.py left in meta.json. Times and places do not count, so
    the same data prepared again is the same. Raises DataError if the folder is not prepared."""
    meta = read_meta(folder)
    sources = [(source['name'], source['train_tokens'], source['val_tokens']) for source in meta['sources']]
    identity = hashlib.blake2b(repr((meta.get('checksum'), meta['dtype'], sources)).encode(), digest_size=8)
    kinds = KINDS[meta['task']] if meta['examples'] else ('',)
    for name in (split + kind for split in ('train', 'val') for kind in kinds):
        path = os.path.join(folder, f'{name}.bin')
        try:
            with open(path, 'rb') as f:
                size, block = os.path.getsize(path), 2**16
                for i in range(64):
                    f.seek(i * block if size <= 64 * block else i * (size - block) // 63)
                    identity.update(f.read(block))
        except OSError as error:
            raise DataError(f'{path} cannot be read ({error.strerror}): run its prepare.py again') from None
    return identity.hexdigest()


def longest_of(folder, split='train'):
    """Places that the longest example takes."""
    longest = np.diff(np.fromfile(os.path.join(folder, f'{split}_ends.bin'), 'int64'), prepend=0).max()
    return int(longest) - (read_meta(folder)['task'] == 'lm')


def trained_tokens(micro_batches):
    """How many targets of a step are trained, those that are not -100, each counted as its weight says: a 0-dim fp32
    tensor. micro_batches: (x, y), (x, y, weights), or with more behind; weights (B,), (B, T) or None. A label is a
    target."""
    count = torch.zeros(())
    for _, y, *weights in micro_batches:
        keep = (y != -100).view(len(y), -1)  # (B, T), or of labels (B, 1)
        count = count + (keep if not weights or weights[0] is None else keep * weights[0].view(len(y), -1)).sum()
    return count


def keywords(y, more):
    """What stands behind x and y in a micro-batch, by the names that a model's forward has for it; None is left out."""
    names = ('weights', 'pieces') if y.dim() > 1 else ('weights', 'lengths', 'types')
    return {name: part for name, part in zip(names, more) if part is not None}


def open_array(path, dtype, n):
    """A file of n numbers. Raises DataError if it is missing or has another length."""
    try:
        found = os.path.getsize(path) // np.dtype(dtype).itemsize
    except OSError as error:
        raise DataError(f'{path} cannot be read ({error.strerror}): run its prepare.py again') from None
    if found != n:
        raise DataError(f'{path} holds {found} tokens, meta.json says {n}: run its prepare.py again')
    return np.memmap(path, dtype=dtype, mode='r')


def check_ids(data, largest, where):
    if largest >= data.vocab_size:
        reason = f'token id {largest} near position {where} is beyond the vocabulary of {data.vocab_size}'
        raise DataError(f'{data.path}: {reason}: the file is broken, run its prepare.py again')


def load(folder, split, block_size, packing=True):
    """The Tokens, Examples or Labelled of a split of a prepared folder. Raises DataError if they cannot be used."""
    meta = read_meta(folder)
    if meta['task'] == 'classify':
        return Labelled(folder, split, block_size)
    if meta['examples']:
        return Examples(folder, split, block_size, packing)
    return Tokens(folder, split, block_size)


class Tokens:
    """The token file of one split. Raises DataError if it is missing, truncated or too short."""

    def __init__(self, folder, split, block_size):
        self.block_size, meta = block_size, read_meta(folder)
        self.path, self.vocab_size = os.path.join(folder, f'{split}.bin'), meta['vocab_size']
        n = meta[f'{split}_tokens']
        self.tokens = open_array(self.path, meta['dtype'], n)
        if n <= block_size:
            raise DataError(f'{self.path} holds {n} tokens, too few for a window of {block_size}: lower block_size')
        self.sources = [source['name'] for source in meta['sources']]
        self.source_ends = np.cumsum([source[f'{split}_tokens'] for source in meta['sources']])
        # A window with its targets takes block_size + 1 tokens. One window is given up, so that the offset of the grid
        # can vary by up to block_size.
        self.windows = max((n - 1) // block_size - 1, 1)
        self.shifts = min(block_size, n - self.windows * block_size)
        self.skip = 0  # windows that a run read with another batch size, more or fewer than batch t supposes
        self.order = {}  # {(seed, epoch): (permutation, offset)} of the last epoch used; a cache, not saved

    def tokens_a_row(self, choosing=False):
        return self.block_size

    def epoch(self, seed, epoch):
        if (seed, epoch) not in self.order:
            rng = np.random.default_rng((seed, epoch))
            self.order = {(seed, epoch): (rng.permutation(self.windows), int(rng.integers(self.shifts)))}
        return self.order[seed, epoch]

    def batch(self, seed, t, batch_size, rank=0, world=1):
        """Batch t -> x, y (batch_size, block_size) int64 and the source index of each window, (batch_size,) int64.

        Processes share one stream: at t, rank r of W reads what a single process reads at t W + r."""
        return self.read(self.pool(seed, t * world + rank, batch_size))

    def pool(self, seed, t, batch_size):
        """Where the windows of batch t begin, for `read`."""
        first, starts = self.skip + t * batch_size, []
        for i in range(first, first + batch_size):  # a batch may span two epochs
            order, offset = self.epoch(seed, i // self.windows)
            starts.append(int(order[i % self.windows]) * self.block_size + offset)
        return starts

    def micro_batches(self, starts, weights, batch_size, rank=0, world=1):
        """A process's share of windows chosen from a pool, with (n,) weights or None: a list of (x, y), or with the
        weights behind."""
        parts = [slice(a, a + batch_size) for a in range(rank * batch_size, len(starts), world * batch_size)]
        return [(*self.read(starts[part])[:2], *([] if weights is None else [weights[part]])) for part in parts]

    def evaluation(self, n_tokens, batch_size):
        """Yield (x, y, sources) of fixed windows spread evenly over the file, n_tokens in total or the whole file."""
        available = (len(self.tokens) - 1) // self.block_size
        n = max(min(n_tokens // self.block_size, available), 1)
        for i in range(0, n, batch_size):
            yield self.read([j * available // n * self.block_size for j in range(i, min(i + batch_size, n))])

    def read(self, starts):
        rows = np.stack([self.tokens[s : s + self.block_size + 1] for s in starts]).astype(np.int64)  # (B, T + 1)
        check_ids(self, rows.max(), starts[int(rows.max(axis=1).argmax())])
        middles = np.array(starts) + self.block_size // 2  # a window belongs to the source of its middle token
        sources = torch.from_numpy(np.searchsorted(self.source_ends, middles, side='right'))
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), sources


def best_fit(lengths, size):
    """Windows of `size`, each a list of indices into `lengths`, filled best-fit, the longest first: each goes where it
    leaves least room. How many there are follows from the lengths alone, whatever their order."""
    windows, room, rooms = [], {}, []  # room: what is left -> the windows; rooms: its keys, ascending
    for i in np.argsort(-np.asarray(lengths), kind='stable').tolist():
        n = int(lengths[i])
        at = bisect.bisect_left(rooms, n)
        if at == len(rooms):
            window, left = len(windows), size - n
            windows.append([])
        else:
            window, left = room[rooms[at]].pop(), rooms[at] - n
            if not room[rooms[at]]:
                del room[rooms.pop(at)]
        windows[window].append(i)
        if left:
            if left not in room:
                bisect.insort(rooms, left)
            room.setdefault(left, []).append(window)
    return windows


class Examples:
    """The examples of one split. Raises DataError if a file is missing or broken, if one is longer than block_size, or
    if none has a trained token.

    packing: rows are windows of block_size with as many examples as fit; an example of n tokens takes n - 1 places.
    Else a row is an example, and what stands behind the end of a shorter one is never a target. Neighbours of an epoch
    are then of like lengths: of each GROUP examples in a random order, sorted, RUN after RUN in a random order."""

    GROUP, RUN = 1024, 32
    ahead = 1  # tokens of an example that are only ever targets

    def __init__(self, folder, split, block_size, packing=True):
        self.block_size, self.packing, meta = block_size, packing, read_meta(folder)
        self.path, self.vocab_size = os.path.join(folder, f'{split}.bin'), meta['vocab_size']
        n, count = meta[f'{split}_tokens'], meta[f'{split}_examples']
        self.tokens = open_array(self.path, meta['dtype'], n)
        path = os.path.join(folder, f'{split}_ends.bin')
        self.ends = np.asarray(open_array(path, 'int64', count))
        self.starts = np.append(0, self.ends[:-1])
        self.lengths = self.ends - self.starts - self.ahead  # places that they take
        if self.lengths.min() < 1 or self.ends[-1] != n:
            least = f'of {1 + self.ahead} or more'
            raise DataError(f'{path} does not cut {n} tokens into examples {least}: run its prepare.py again')
        if (longest := int(self.lengths.max())) > block_size:
            many = int((self.lengths > block_size).sum())
            raise DataError(
                f'{self.path}: {many} of {count} examples do not fit block_size={block_size}: '
                f'use --block_size={longest}, or prepare the data again without those that are longer'
            )
        if not meta[f'{split}_trained']:
            raise DataError(f'{self.path}: no token of any example is trained: prepare the data with answers')
        self.open_targets(folder, split, meta)
        self.sources = [source['name'] for source in meta['sources']]
        self.source_ends = np.cumsum([source[f'{split}_examples'] for source in meta['sources']])  # in examples
        self.plan = best_fit(np.sort(self.lengths)[::-1], block_size) if packing else None  # windows of ranks by length
        self.windows = len(self.plan) if packing else count
        self.skip = 0  # as of Tokens, in rows
        self.order = {}  # {(seed, epoch): ...} of the last epoch used; a cache, not saved

    def open_targets(self, folder, split, meta):
        self.trained = open_array(os.path.join(folder, f'{split}_trained.bin'), 'uint8', meta[f'{split}_tokens'])

    def tokens_a_row(self, choosing=False):
        """On average, without what only fills a row. choosing: rows are examples whether packed or not."""
        return self.lengths.sum() / (len(self.lengths) if choosing else self.windows)

    def epoch(self, seed, epoch):
        """-> the order of this epoch's examples, and of its windows."""
        if (seed, epoch) not in self.order:
            rng = np.random.default_rng((seed, epoch))
            order = rng.permutation(len(self.lengths))
            self.order = {(seed, epoch): (order, *self.rows(order, rng))}
        return self.order[seed, epoch]

    def rows(self, order, rng):
        """-> what the rows of an epoch are made of: packed, the examples by length, equal ones at random, and the order
        of the windows of their ranks; else the order of the examples."""
        by_length = lambda some: some[np.argsort(-self.lengths[some], kind='stable')]  # noqa: E731
        if self.packing:
            return by_length(order), rng.permutation(self.windows)
        groups = [by_length(order[a : a + self.GROUP]) for a in range(0, len(order), self.GROUP)]
        run = max(min(self.RUN, len(order) // self.RUN), 1)  # few examples would else come in the order of length
        runs = [group[a : a + run] for group in groups for a in range(0, len(group), run)]
        return (np.concatenate([runs[i] for i in rng.permutation(len(runs))]),)

    def batch(self, seed, t, batch_size, rank=0, world=1):
        """Batch t -> x, y (batch_size, T) int64, the source index of each example, and, packed, the pieces: T is
        block_size, else the longest example's length. Processes share one stream, as they do of Tokens."""
        first, rows = self.skip + (t * world + rank) * batch_size, []
        for i in range(first, first + batch_size):
            _, examples, *windows = self.epoch(seed, i // self.windows)
            at = i % self.windows
            rows.append(examples[self.plan[windows[0][at]]] if self.packing else examples[at : at + 1])
        return self.pack(rows) if self.packing else self.read([int(row[0]) for row in rows])

    def pool(self, seed, t, n):
        """n examples to choose from in step t, by length, for `read`: the next ones of a random permutation."""
        first, count = self.skip + t * n, len(self.lengths)
        found = [int(self.epoch(seed, i // count)[0][i % count]) for i in range(first, first + n)]
        return sorted(found, key=lambda i: -self.lengths[i])

    def micro_batches(self, examples, weights, batch_size, rank=0, world=1):
        """A process's share of examples chosen from a pool, with (n,) weights or None: as Tokens does it, or packed
        (x, y, weights (B, T) or None, pieces). All processes have equally many."""
        if not self.packing:
            return Tokens.micro_batches(self, examples, weights, batch_size, rank, world)
        windows, found = best_fit(self.lengths[examples], self.block_size), []  # of places in `examples`
        mine = (windows + [[] for _ in range(-len(windows) % world)])[rank::world]
        for some in (mine[a : a + batch_size] for a in range(0, len(mine), batch_size)):
            x, y, _, pieces = self.pack([[examples[i] for i in window] for window in some])
            if weights is not None:  # what only fills a window has none
                lengths = [torch.tensor(self.lengths[[examples[i] for i in window]]) for window in some]
                rows = [weights[window].repeat_interleave(n) for window, n in zip(some, lengths)]
                found.append((x, y, torch.stack([F.pad(row, (0, x.shape[1] - len(row))) for row in rows]), pieces))
            else:
                found.append((x, y, None, pieces))
        return found

    def evaluation(self, n_tokens, batch_size):
        """Yield batches of examples spread evenly over the file, n_tokens in total or all of them."""
        count = len(self.lengths)
        n = max(min(n_tokens * count // int(self.lengths.sum()), count), 1)
        some = np.arange(n) * count // n
        if self.packing:
            rows = [some[window] for window in best_fit(self.lengths[some], self.block_size)]
        else:
            rows = some[np.argsort(-self.lengths[some], kind='stable')]
        for a in range(0, len(rows), batch_size):
            yield (self.pack if self.packing else self.read)(rows[a : a + batch_size])

    def read(self, examples):
        """A row for each -> x, y (B, T) int64, T being the longest's length, and their sources (B,)."""
        return self.pack([[i] for i in examples], int(self.lengths[examples].max()))[:3]

    def pack(self, rows, T=0):
        """Rows of T places, or of block_size, with these examples in turn -> x, y (B, T) int64, the source of each
        example, and the pieces: what is left of a row is one, too."""
        T = T or self.block_size
        x, y, ends = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), -100), [0]
        for b, row in enumerate(rows):
            at = 0
            for i in row:
                ids = self.tokens[self.starts[i] : self.ends[i]].astype(np.int64)
                check_ids(self, ids.max(), self.starts[i])
                end = at + len(ids) - 1
                x[b, at:end] = ids[:-1]
                y[b, at:end] = np.where(self.trained[self.starts[i] + 1 : self.ends[i]], ids[1:], -100)
                ends.append(b * T + end)
                at = end
            if at < T:
                ends.append((b + 1) * T)
        sources = np.searchsorted(self.source_ends, [i for row in rows for i in row], side='right')
        pieces = torch.tensor(ends, dtype=torch.int32)
        return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(sources), pieces


class Labelled(Examples):
    """The examples of one split that have a label each: rows of one example, padded as Examples are without packing.

    labels: of the classes, their names, [] where a label is a number; metrics: how predictions are judged."""

    ahead = 0

    def __init__(self, folder, split, block_size):
        super().__init__(folder, split, block_size, packing=False)

    def open_targets(self, folder, split, meta):
        self.labels, self.metrics, self.pad, n = meta['labels'], meta['metrics'], meta['pad'], len(self.ends)
        path = os.path.join(folder, f'{split}_labels.bin')
        self.targets = np.asarray(open_array(path, 'int64' if self.labels else 'float32', n))
        low, high = (0, len(self.labels) - 1) if self.labels else (-np.inf, np.inf)
        if not ((low <= self.targets) & (self.targets <= high)).all():
            raise DataError(f'{path} holds labels that meta.json does not name: run its prepare.py again')
        path = os.path.join(folder, f'{split}_pairs.bin')
        self.seconds = np.asarray(open_array(path, 'int64', n))  # where the second sentence begins
        if not ((self.seconds >= 0) & (self.seconds <= self.lengths)).all():
            raise DataError(f'{path} has places beyond the ends of the examples: run its prepare.py again')

    def read(self, examples):
        """-> x (B, T) int64, T being the longest's length, y (B,) int64 or float32, sources (B,), lengths (B,), and
        types (B, T): 0 or 1, of padding 0."""
        lengths = self.lengths[examples]
        x, types = (np.full((len(examples), lengths.max()), filler) for filler in (self.pad, 0))
        for b, (i, n) in enumerate(zip(examples, lengths)):
            x[b, :n] = self.tokens[self.starts[i] : self.ends[i]]
            check_ids(self, x[b, :n].max(), self.starts[i])
            types[b, self.seconds[i] : n] = 1
        sources = np.searchsorted(self.source_ends, examples, side='right')
        return tuple(map(torch.from_numpy, (x, self.targets[examples], sources, lengths, types)))
