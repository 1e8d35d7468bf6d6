"""
Which bytes are alive when: a recorder of every tensor's storage, and a simulation of CUDA's caching allocator, through
which a record is replayed.

    with LiveBytes() as live: ...            # live.now, live.peak: bytes of the storages made inside, real or fake
    with Record() as record: ...             # the same, and a list of what was made and dropped, layer by layer
    replay(record.chunks)                    # -> Peak: live, allocated, reserved, and who was there
"""

import bisect
import weakref
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MB = 1 << 20


# ---- the allocator -----------------------------------------------------------------------------------------------


class Block:
    """A piece of a segment; neighbours are linked, so that free ones can be joined."""

    __slots__ = ('after', 'before', 'free', 'serial', 'size', 'small')

    def __init__(self, size, small, serial):
        self.size, self.small, self.serial = size, small, serial
        self.before = self.after = None
        self.free = False


class Allocator:
    """torch's caching allocator for CUDA (c10/cuda/CUDACachingAllocator.cpp, default settings), without the memory.

    Sizes are rounded up to 512 bytes. A block of up to 1 MB comes from a segment of 2 MB, one of up to 10 MB from a
    segment of 20 MB, and a larger one gets a segment of its own, rounded up to 2 MB. malloc takes the smallest free
    block that is large enough, and splits it if enough is left; free joins it with its free neighbours. With a `limit`,
    the card's bytes, free segments go back to the card when a new one would not fit, as in torch; without one, never.

    allocated, reserved: bytes now, as torch.cuda.memory_allocated and memory_reserved count them: what could not be
    split off counts as allocated. peak_allocated, peak_reserved: the most so far. full: a segment did not fit."""

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


def device_of(tensor):
    """A fake tensor's without asking its mode, which takes longer than the rest of the record."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of all storages that were made since and are still alive: now, and at the peak.

    Given an Allocator, each storage also takes its block there, and gives it back."""

    def __init__(self, allocator=None):
        super().__init__()
        self.allocator = allocator
        self.now = self.peak = 0
        self.seen = weakref.WeakKeyDictionary()  # storages; each once, however many views

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # nearly half of a trace's calls
            return device_of(args[0])
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and device_of(tensor).type != 'meta':  # what a trace has offloaded
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


class Resizing(LiveBytes):
    """LiveBytes of a model that fully_shard cut: it gathers weights into storages that it makes larger and smaller, of
    which no operation tells. So all sizes are read after each operation, which is for small runs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                self.add(getattr(tensor, '_local_tensor', tensor).untyped_storage())
        self.now = sum(storage.nbytes() for storage in list(self.seen))
        self.peak = max(self.peak, self.now)
        return out

    def add(self, storage, tensor=None, function=None):
        self.seen[storage] = True


@dataclass
class Chunk:
    """A stretch of the record in one layer; layer None: outside of the layers.

    events: ('+', bytes, what, operation, shape, phase): a storage is made; ('-', chunk, i): the i-th that this chunk
    made is dropped. `what` is the phase in which it was made until somebody knows better (`Record.relabel`). made: how
    many it made."""

    layer: int | None
    events: list = field(default_factory=list)
    made: int = 0


class Record(LiveBytes):
    """LiveBytes that also keeps, in `chunks`, what was made and dropped in which layer, phase and operation.

    Whoever drives the step says where it is, by `at(layer)` and `phase`."""

    def __init__(self):
        super().__init__()
        self.chunks, self.phase = [Chunk(None)], ''
        self.place = weakref.WeakKeyDictionary()  # storage -> [chunk, i], the list that its finalizer holds
        self.births = {}  # (chunk, i) -> index of the event
        self.leaving = False

    def at(self, layer):
        self.leaving = False
        if layer != self.chunks[-1].layer:
            self.chunks.append(Chunk(layer))

    def add(self, storage, tensor=None, function=None):
        new = storage not in self.seen
        super().add(storage, tensor, function)
        if new:
            self.place[storage] = self.latest

    def leave(self):
        """What is made next is of no layer; what is dropped before that still is of this one."""
        self.leaving = True

    def relabel(self, storages, what):
        """Write into the record what these storages are."""
        for place in {tuple(self.place[storage]) for storage in storages if storage in self.place}:  # else offloaded
            events, e = self.chunks[place[0]].events, self.births[place]
            sign, size, _, *rest = events[e]
            events[e] = (sign, size, what, *rest)

    def give_to_layers(self, located):
        """What was made outside of the layers and belongs to one is dropped there and made anew in its layer, so that
        the record of more layers has more of it. located: (layer or None, tensor)."""
        storages = {tensor.untyped_storage(): layer for layer, tensor in located if layer is not None}
        outside = [s for s in storages if s in self.place and self.chunks[self.place[s][0]].layer is None]
        self.at(None)
        births = []
        for storage in outside:
            place = self.place[storage]
            births.append(self.chunks[place[0]].events[self.births[tuple(place)]])
            self.chunks[-1].events.append(('-', *place))
        for storage, birth in zip(outside, births):
            self.at(storages[storage])
            self.place[storage][:] = self.born(birth)

    def made(self, size, tensor, function):
        if self.leaving:
            self.at(None)
        operation = function.overloadpacket.__name__ if function is not None else ''
        shape = tuple(tensor.shape) if tensor is not None else ()
        self.latest = self.born(('+', size, self.phase, operation, shape, self.phase))
        return self.latest

    def born(self, event):
        chunk, place = self.chunks[-1], [len(self.chunks) - 1, self.chunks[-1].made]
        self.births[tuple(place)] = len(chunk.events)
        chunk.events.append(event)
        chunk.made += 1
        return place

    def drop(self, place, size):
        self.now -= size
        self.chunks[-1].events.append(('-', *place))


# ---- replay ------------------------------------------------------------------------------------------------------


@dataclass
class Peak:
    """The moment when most bytes are alive, and what holds them.

    live: those bytes; allocated, reserved: the allocator's peaks; phase, operation, layer: of the storage made last;
    kinds: bytes by what they are; largest: (bytes, shape, operation, layer, what) of the five largest storages; chunks:
    the record; full: see Allocator."""

    live: int = 0
    allocated: int = 0
    reserved: int = 0
    phase: str = ''
    operation: str = ''
    layer: int | None = None
    kinds: Counter = field(default_factory=Counter)
    largest: list = field(default_factory=list)
    chunks: list = field(default_factory=list, repr=False)
    full: bool = False


def replay(chunks, limit=None):
    """Walk through a record, counting real sizes, and the blocks of an Allocator. -> Peak"""
    allocator, alive, now = Allocator(limit), {}, 0  # alive: (chunk, i) -> (block, event)
    peak, moment = Peak(chunks=chunks), None
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
            i += 1
    peak.allocated, peak.reserved, peak.full = allocator.peak_allocated, allocator.peak_reserved, allocator.full
    if moment is None:
        return peak
    peak.layer = chunks[moment[0]].layer
    for (size, what, operation, shape, phase), layer in alive_at(chunks, *moment):
        peak.kinds[what] += size
        peak.largest.append((size, shape, operation, layer, what))
        peak.phase, peak.operation = phase, operation  # in the end those of the storage that made the peak
    peak.largest = sorted(peak.largest, key=lambda row: row[0], reverse=True)[:5]
    return peak


def alive_at(chunks, c, i):
    """((bytes, what, operation, shape, phase), layer) of all that is alive when chunk c has made its i-th, oldest
    first."""
    alive = {}
    for at, chunk in enumerate(chunks[: c + 1]):
        made = 0
        for event in chunk.events:
            if event[0] == '-':
                del alive[event[1:]]
                continue
            alive[at, made] = event[1:], chunk.layer
            made += 1
            if (at, made) == (c, i + 1):
                return alive.values()
    return alive.values()
