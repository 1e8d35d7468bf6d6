"""What sampling keeps of the tokens that it has seen."""

import copy

import torch

from attention import paired, rotary_tables, turn


class KVCache:
    """Keys and values of the positions seen so far, so that sampling runs each token through the model once.

    lengths: of each row in use, how many positions it has seen; rows may differ. Row b's position p stands in slot p,
    and what stands behind its last one is never looked at.

    When all slots are taken, the window slides, a token at a time: what was seen earliest makes room, but for the first
    SINKS positions, on which attention rests whatever they say (StreamingLLM, 2309.17453). Keys keep the rotation that
    they have, but those of the sinks, which follow, so that no distance is longer than the window. No token is read
    again; keys and values of deeper layers still know of tokens that have left, as those of Mistral's do."""

    SINKS, slides = 4, True

    def __init__(self, config, batch_size=1, device=None, dtype=None, slots=0):
        self.config, self.slots = config, slots or config.block_size
        shape = (config.n_layer, batch_size, config.n_kv_head, self.slots, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # masked slots count 0 times, which NaN would survive
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.first = None  # the sinks' keys (n_layer, B, K, SINKS, d) as they were when their row was full
        self.lengths = [0] * batch_size
        self.ids = []  # what a cache of one row holds, where that is kept from one text to the next

    @property
    def length(self):
        return max(self.lengths)

    def row(self, b, length=0):
        """A cache of row b alone, in the same memory, of which `length` positions count."""
        row = copy.copy(self)
        row.k, row.v, row.lengths, row.first = self.k[:, b : b + 1], self.v[:, b : b + 1], [length], None
        return row

    def drop(self, b):
        """Give up row b: the last row in use moves to its place."""
        for A in filter(torch.is_tensor, (self.k, self.v, self.first)):
            A[:, b] = A[:, len(self.lengths) - 1]
        self.lengths[b] = self.lengths[-1]
        self.lengths.pop()

    def begin(self, T):
        """Make room for T more tokens in each row. -> where they stand: a slice if all rows agree, else (B, T)."""
        start, device = self.lengths, self.k.device
        self.lengths, rows = [length + T for length in start], slice(len(start))
        if self.length > self.slots:
            self.slide(start)
        keys, sinks = slice(min(self.length, self.slots)), min(self.SINKS, self.slots // 2)
        slots = [p if p < self.slots else sinks + (p - sinks) % (self.slots - sinks) for p in start]
        if len(set(start)) == 1:
            at, self.mask = slice(start[0], start[0] + T), None
            here = slice(None), slice(slots[0], slots[0] + T)
            if start[0] and T > 1:  # query t sees all cached keys and the new keys 0 to t
                self.mask = torch.ones(T, self.length, dtype=torch.bool, device=device).tril(start[0])  # (T, keys)
        else:
            at, slots = (
                torch.tensor(A, device=device)[:, None] + torch.arange(T, device=device) for A in (start, slots)
            )
            here = torch.arange(len(start), device=device)[:, None], slots  # (B, 1), (B, T)
            self.mask = (torch.arange(keys.stop, device=device) <= at[..., None])[:, None]  # (B, 1, T, keys)
        self.here = here
        # Views of all layers at once: what a layer would do for itself costs more than its copies.
        self.into = [[*A[:, rows].transpose(2, 3)] for A in (self.k, self.v)]  # (B, slots, K, d) each
        self.seen = [[*A[:, rows, :, keys]] for A in (self.k, self.v)]  # (B, K, keys, d) each
        return at

    def slide(self, start):
        """Before a token for which some rows have no empty slot: the sinks follow them."""
        sinks = min(self.SINKS, self.slots // 2)
        if self.first is None:
            self.first = self.k[:, :, :, :sinks].clone()
        for b, p in enumerate(start):
            if p == self.slots:
                self.first[:, b] = self.k[:, b, :, :sinks]
        rows = [b for b, p in enumerate(start) if p >= self.slots]
        layers = [[i] for i in range(self.config.n_layer) if i not in self.config.no_rope]
        by = torch.tensor([[start[b] + 1 - self.slots] for b in rows], dtype=torch.float64, device=self.k.device)
        cos, sin = rotary_tables(self.config, by.device, self.slots, by)  # (rows, 1, d/2)
        size = (cos**2 + sin**2).sqrt()  # where rotating makes keys longer, it did so when they came
        cos, sin = (A.to(self.k.dtype) for A in paired(cos / size, sin / size))  # (rows, 1, 1, d)
        self.k[layers, rows, :, :sinks] = turn(self.first[layers, rows], cos, sin)

    def extend(self, i, k, v):
        """Append k, v (B, T, K, d) to layer i's keys and values. -> all of them, (B, K, keys, d), and the mask."""
        for A, new in zip(self.into, (k, v)):
            A[i][self.here] = new
        return self.seen[0][i], self.seen[1][i], self.mask
