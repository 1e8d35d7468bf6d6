"""
Which bytes are alive when: a recorder of every tensor's storage, the record of a deep model out of a shallow one's, and
CUDA's caching allocator in numbers alone, to replay a record through.

    with LiveBytes() as live: ...            # live.now, live.peak: bytes of the storages made inside, real or fake
    with Record() as record: ...             # the same, and a list of what was made and dropped, layer by layer
    deeper(record.chunks, 40)                # of 4 layers -> of 40, storage by storage
    replay(record.chunks)                    # -> Peak: live, allocated, reserved, and who was there
"""

import bisect
import weakref
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MB = 1 << 20


# ---- the allocator -----------------------------------------------------------------------------------------------


class Block:
    """A piece of a segment; neighbours in it are linked, so that free ones can be joined."""

    __slots__ = ('after', 'before', 'free', 'serial', 'size', 'small')

    def __init__(self, size, small, serial):
        self.size, self.small, self.serial = size, small, serial
        self.before = self.after = None
        self.free = False


class Allocator:
    """torch's caching allocator for CUDA (c10/cuda/CUDACachingAllocator.cpp, default settings), in numbers alone.

    Sizes are rounded to 512 bytes. Up to 1 MB a block comes from a segment of 2 MB, up to 10 MB from one of 20 MB, a
    larger one gets a segment of its own, rounded to 2 MB. The smallest free block that is large enough is taken, split
    where enough is left, and joined with free neighbours when it is given back. With a `limit`, the card's bytes, whole
    free segments go back to the card when a new one would not fit, as torch does it; without one they never do.

    allocated, reserved: bytes now, as torch.cuda.memory_allocated and memory_reserved count them (what could not be
    split off is allocated). peak_allocated, peak_reserved: the most so far. full: a segment did not fit the limit."""

    def __init__(self, limit=None):
        self.limit, self.full = limit, False
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = self.serial = 0
        self.free_blocks = {True: [], False: []}  # small pool, large pool: sorted (size, serial, block)

    def malloc(self, nbytes):
        size = max(-(-nbytes // 512), 1) * 512
        small = size <= MB
        pool = self.free_blocks[small]
        i = bisect.bisect_left(pool, (size, 0))
        if i < len(pool):
            block = pool.pop(i)[2]
        else:
            segment = 2 * MB if small else 20 * MB if size < 10 * MB else -(-size // (2 * MB)) * 2 * MB
            if self.limit and self.reserved + segment > self.limit:
                self.give_back()
                self.full |= self.reserved + segment > self.limit
            self.reserved += segment
            self.peak_reserved = max(self.peak_reserved, self.reserved)
            block = self.new_block(segment, small)
        left = block.size - size
        if left >= (512 if small else MB + 1):
            rest = self.new_block(left, small)
            rest.before, rest.after, block.after, block.size = block, block.after, rest, size
            if rest.after:
                rest.after.before = rest
            self.put_back(rest)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def new_block(self, size, small):
        self.serial += 1
        return Block(size, small, self.serial)

    def put_back(self, block):
        block.free = True
        bisect.insort(self.free_blocks[block.small], (block.size, block.serial, block))

    def give_back(self):
        for pool in self.free_blocks.values():
            whole = [entry for entry in pool if entry[2].before is None and entry[2].after is None]
            self.reserved -= sum(size for size, _, _ in whole)
            pool[:] = [entry for entry in pool if entry not in whole]

    def free(self, block):
        self.allocated -= block.size
        for left, right in ((block.before, block), (block, block.after)):
            other = left if right is block else right
            if other is not None and other.free:
                pool = self.free_blocks[block.small]
                pool.pop(bisect.bisect_left(pool, (other.size, other.serial)))
                block.size += other.size
                if other is left:
                    block.before = other.before
                    if block.before:
                        block.before.after = block
                else:
                    block.after = other.after
                    if block.after:
                        block.after.before = block
        self.put_back(block)


# ---- the recorder ------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """While active: how many bytes the storages made so far and still alive take, and the most they took at once.

    Given an Allocator, each storage also takes and gives back its block there."""

    def __init__(self, allocator=None):
        super().__init__()
        self.allocator = allocator
        self.now = self.peak = 0
        self.seen = weakref.WeakKeyDictionary()  # storages; each once, however many views

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != 'meta':  # a trace keeps main memory there
                self.add(tensor.untyped_storage(), tensor, function)
        return out

    def add(self, storage, tensor=None, function=None):
        if storage in self.seen:
            return
        size = storage.nbytes()
        self.seen[storage] = size
        weakref.finalize(storage, self.drop, self.made(size, tensor, function), size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def made(self, size, tensor, function):
        return self.allocator and self.allocator.malloc(size)

    def drop(self, block, size):
        self.now -= size
        if block:
            self.allocator.free(block)


@dataclass
class Chunk:
    """A stretch of the record that belongs to one layer; layer None: to none.

    events: ('+', bytes, phase, operation, shape), or ('-', chunk, i): what that chunk made as its i-th is dropped."""

    layer: int | None
    events: list = field(default_factory=list)
    made: int = 0


class Record(LiveBytes):
    """LiveBytes that also keeps, in `chunks`, what was made and dropped in which layer, phase and operation.

    `at(layer)` and `phase` say where one is; whoever drives the step sets them."""

    def __init__(self):
        super().__init__()
        self.chunks, self.phase = [Chunk(None)], ''
        self.place = weakref.WeakKeyDictionary()  # storage -> (chunk, i)

    def at(self, layer):
        if layer != self.chunks[-1].layer:
            self.chunks.append(Chunk(layer))

    def add(self, storage, tensor=None, function=None):
        new = storage not in self.seen
        super().add(storage, tensor, function)
        if new:
            self.place[storage] = len(self.chunks) - 1, self.chunks[-1].made - 1

    def call(self, storages, phase):
        """Note these storages down as made in another phase."""
        places = {self.place[storage] for storage in storages if storage in self.place}  # else: in main memory
        for c in {c for c, _ in places}:
            births = (e for e, event in enumerate(self.chunks[c].events) if event[0] == '+')
            for i, e in enumerate(births):
                if (c, i) in places:
                    sign, size, _, *rest = self.chunks[c].events[e]
                    self.chunks[c].events[e] = (sign, size, phase, *rest)

    def made(self, size, tensor, function):
        chunk = self.chunks[-1]
        operation = function.overloadpacket.__name__ if function is not None else ''
        chunk.events.append(('+', size, self.phase, operation, tuple(tensor.shape) if tensor is not None else ()))
        chunk.made += 1
        return len(self.chunks) - 1, chunk.made - 1

    def drop(self, block, size):
        self.now -= size
        self.chunks[-1].events.append(('-', *block))


# ---- depth -------------------------------------------------------------------------------------------------------


class NotUniform(Exception):
    """The layers in the middle of a record differ, so that none can stand for more of them."""


def deeper(chunks, n_layer):
    """The record of a model of n_layer layers from one of 4, exactly: what layer 2 does is done n_layer - 3 times.

    Forward, backward and each walk of the optimizer pass through the layers in a row, up or down: a sweep. Within one,
    layers 1 and 2 must do the same to the byte; then a storage is known by its sweep, its layer and its place there,
    and dropped by the same layer of a later sweep, by a neighbour, or by what comes after all layers. Raises NotUniform
    where that does not hold."""
    first, last = 0, 3
    sweeps, sweep_of, expected = [], {}, None  # sweeps: dicts layer -> chunk's index
    for i, chunk in enumerate(chunks):
        if chunk.layer is None:
            expected = None
            continue
        if chunk.layer != expected:
            if chunk.layer not in (first, last):
                raise NotUniform(f'a sweep begins in layer {chunk.layer}')
            sweeps.append({})
            step = 1 if chunk.layer == first else -1
        sweeps[-1][chunk.layer] = i
        sweep_of[i] = len(sweeps) - 1
        expected = chunk.layer + step if first <= chunk.layer + step <= last else None
    if any(len(sweep) not in (1, 4) for sweep in sweeps):  # 1: something is done with the first or last layer alone
        raise NotUniform('a sweep leaves layers out')

    def place(event, layer):  # of a dropped storage, seen from a layer
        _, i, at = event
        if i not in sweep_of:
            raise NotUniform('a layer drops what no layer made')
        distance = chunks[i].layer - layer
        if abs(distance) > 1:
            raise NotUniform('a layer drops what a distant one made')
        return sweep_of[i], distance, at

    for sweep in (sweep for sweep in sweeps if len(sweep) == 4):
        one, two = (chunks[sweep[layer]].events for layer in (1, 2))
        if len(one) != len(two):
            raise NotUniform('layers 1 and 2 differ')
        for a, b in zip(one, two):
            if (a[:4] if a[0] == '+' else place(a, 1)[:2]) != (b[:4] if b[0] == '+' else place(b, 2)[:2]):
                raise NotUniform('layers 1 and 2 differ')

    new, where = [], {}  # where: (sweep, new layer) or the index of a chunk of no layer -> index among the new ones

    def layer_chunk(s, j):
        old = j if j < 2 else last if j == n_layer - 1 else 2
        nearer, events = chunks[sweeps[s].get(1, sweeps[s].get(old))].events, []
        where[s, j] = len(new)
        new.append(Chunk(j, events))
        for k, event in enumerate(chunks[sweeps[s][old]].events):
            if event[0] == '+':
                events.append(event)
                continue
            if event[1] not in sweep_of:  # of no layer, dropped by the first or the last one
                events.append(('-', where[event[1]], event[2]))
                continue
            # a copy's upper neighbour is another copy, not the last layer: so it was for layer 1
            repeated = old == 2 and j < n_layer - 2 and place(nearer[k], 1)[1] == 1
            sweep, distance, at = place(nearer[k], 1) if repeated else place(event, old)
            events.append(('-', where[sweep, j + distance], at))

    for i, chunk in enumerate(chunks):
        if chunk.layer is not None:
            s = sweep_of[i]
            copies = range(2, n_layer - 1) if chunk.layer == 2 else [chunk.layer if chunk.layer < 2 else n_layer - 1]
            for j in copies if sweeps[s].get(first, 0) <= sweeps[s].get(last, 0) else reversed(copies):
                layer_chunk(s, j)
            continue
        events = []
        where[i] = len(new)
        new.append(Chunk(None, events))
        for event in chunk.events:
            if event[0] == '+' or event[1] not in sweep_of:
                events.append(event if event[0] == '+' else ('-', where[event[1]], event[2]))
                continue
            s, layer = sweep_of[event[1]], chunks[event[1]].layer
            copies = range(2, n_layer - 1) if layer == 2 else [layer if layer < 2 else n_layer - 1]
            events += [('-', where[s, j], event[2]) for j in copies]
    return new


# ---- replay ------------------------------------------------------------------------------------------------------


@dataclass
class Peak:
    """Bytes at the moment when most are alive, and what holds them.

    kinds: bytes by the phase in which they were made; largest: (bytes, shape, operation, layer) of the five largest
    tensors alive; timeline: (bytes alive, phase) event by event."""

    live: int = 0
    allocated: int = 0
    reserved: int = 0
    phase: str = ''
    operation: str = ''
    layer: int | None = None
    kinds: Counter = field(default_factory=Counter)
    largest: list = field(default_factory=list)
    timeline: list = field(default_factory=list)
    full: bool = False


def replay(chunks, limit=None):
    """Walk through a record, real sizes on one side, the allocator's blocks on the other."""
    allocator, alive, now = Allocator(limit), {}, 0  # alive: (chunk, i) -> (block, event)
    peak, moment = Peak(), None
    for c, chunk in enumerate(chunks):
        i = 0
        for event in chunk.events:
            if event[0] == '-':
                block, undone = alive.pop(event[1:])
                allocator.free(block)
                now -= undone[1]
                continue
            alive[c, i] = allocator.malloc(event[1]), event
            now += event[1]
            if now > peak.live:
                peak.live, moment = now, (c, i)
            peak.timeline.append((now, event[2]))
            i += 1
    peak.allocated, peak.reserved, peak.full = allocator.peak_allocated, allocator.peak_reserved, allocator.full
    if moment is None:
        return peak
    peak.layer = chunks[moment[0]].layer
    for size, phase, operation, shape, layer in alive_at(chunks, *moment):
        peak.kinds[phase] += size
        peak.largest.append((size, shape, operation, layer))
        peak.phase, peak.operation = phase, operation  # the last one made is the peak's own
    peak.largest = sorted(peak.largest, key=lambda row: row[0], reverse=True)[:5]
    return peak


def alive_at(chunks, c, i):
    """(bytes, phase, operation, shape, layer) of all that is alive when chunk c has made its i-th, by age."""
    alive = {}
    for at, chunk in enumerate(chunks[: c + 1]):
        made = 0
        for event in chunk.events:
            if event[0] == '-':
                del alive[event[1:]]
                continue
            alive[at, made] = (*event[1:], chunk.layer)
            made += 1
            if (at, made) == (c, i + 1):
                return alive.values()
    return alive.values()
