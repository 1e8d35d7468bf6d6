"""
What a training step does, operation by operation: products, attention, factorizations, bytes that move. No seconds yet:
rates.py measures how fast a device does each of these.

    count = Count(record, model, optimizer)
    with count.step(): ...                      # a step, on fake tensors or real ones
    whole(count.steps[0], 28, 6)                # with 28 layers and 6 micro-batches more: {(phase, task): times}

A task is a tuple, its sort first:
    ('product', dtype, b, m, n, k)              b products of (m, k) and (k, n): 2 b m n k operations
    ('attention', heads, T, S, d, causal)       softmax(q k^T) v of so many heads in all; 'attention back': backward
    ('qr', b, m, n), 'svd', 'eigh'              of b matrices, m >= n
    ('made', name, bytes)                       all else: bytes read and written by what returns a new tensor
    ('moved', name, bytes)                      and by what works in place
    ('narrow', numbers, bytes)                  and by what walks over so few numbers at a time
    ('pages', bytes)                            of new memory that a CPU's system hands out page by page
    ('nf4', numbers)                            and other ways from few bits and into them
    ('copied', bytes)                           between main memory and a card
    ('call',)                                   an operation's own cost; of views there is no other
"""

import contextlib
import functools
import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from memory.record import MB, device_of

PHASES = {  # when
    'setup': 'building the model',
    'data': 'tokens, and the choice among them',
    'forward': 'forward',
    'loss': 'head and loss',
    'forward again': 'recomputed block and its backward',
    'backward': 'backward',
    'update': 'the update',
}
PAGES = 32 * MB  # what glibc takes from the system at least, anew each time (the most that M_MMAP_THRESHOLD becomes)
FACTORIZATIONS = {'linalg_qr': 'qr', '_linalg_svd': 'svd', '_linalg_eigh': 'eigh'}
VIEWS = ('_unsafe_view', 'detach', 'alias', 'lift_fresh', '_reshape_alias')
NOTHING = ('empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', 'resize_', 'set_')
FEW_BITS = ('quantize_blockwise', 'dequantize_blockwise', 'dequantize_4bit', 'quantize_4bit')


# ---- one operation -----------------------------------------------------------------------------------------------


def size(tensor):
    """Bytes that an operation reads or writes of it; of an expanded one, what is there."""
    return math.prod(n for n, stride in zip(tensor.shape, tensor.stride()) if stride) * tensor.element_size()


def product(name, args):
    """The task of a product of matrices, or None for another operation."""
    if name not in ('mm', 'bmm', 'addmm', 'addmm_', 'baddbmm', 'baddbmm_'):
        return None
    A, B = args[:2] if name in ('mm', 'bmm') else args[1:3]
    return 'product', A.dtype, math.prod(A.shape[:-2]), A.shape[-2], B.shape[-1], A.shape[-1]


def attention(name, args, kwargs):
    """The task of an attention kernel, or None: of torch's, q (B, H, T, d), or of ours for packed rows, q (N, H, d)."""
    back = 'backward' in name
    sort = 'attention back' if back else 'attention'
    if name in ('attend', 'attend_backward'):
        q, pieces = args[back], args[6 if back else 3]
        T = max(len(q) // max(len(pieces) - 1, 1), 1)  # on average
        return sort, q.shape[1] * len(q) // T, T, T, q.shape[2], True
    if not name.startswith('_scaled_dot_product'):
        return None
    q, k = args[back], args[back + 1]
    causal = any(a is True for a in (*args, *kwargs.values()))
    return sort, q.shape[0] * q.shape[1], q.shape[2], k.shape[2], q.shape[3], causal


@functools.cache
def known(function):
    return function.overloadpacket.__name__, function.is_view, function._schema.is_mutable


def tensors(values):
    """Those among arguments or results, in lists too."""
    for A in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(A, torch.Tensor):
            yield A
        elif isinstance(A, (tuple, list)):
            yield from tensors(A)


def tasks(function, args, kwargs, out):
    """Yield what an operation does."""
    yield ('call',)
    name, is_view, changes = known(function)
    made = () if is_view else tuple(tensors(out))
    if not made and not changes:
        return
    new = 0 if changes or name in VIEWS or device_of(made[0]).type != 'cpu' else sum(map(size, made))
    if new >= PAGES:
        yield 'pages', new
    if name in VIEWS or name in NOTHING:
        return
    if found := product(name, args) or attention(name, args, kwargs or {}):
        yield found
        return
    read = (*tensors(args), *tensors(tuple(kwargs.values()) if kwargs else ()))
    if name in FACTORIZATIONS:
        *b, m, n = args[0].shape
        yield FACTORIZATIONS[name], math.prod(b), max(m, n), min(m, n)
    elif name in FEW_BITS:
        yield name, max(A.numel() for A in (*read, *made))
    elif len({device_of(A).type for A in (*read, *made) if A.dim()}) > 1:
        yield 'copied', max(map(size, (*read, *made)))
    else:
        moved = sum(map(size, read)) + sum(map(size, made[:1] if changes else made))
        narrow = [A.shape[-1] for A in read if A.dim() > 1 and A.shape[-1] <= 64 and not A.is_contiguous()]
        yield ('narrow', narrow[0], moved) if narrow else ('moved' if changes else 'made', name, moved)


# ---- a step ------------------------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """While active, notes what operations do, with the layer and the phase that `record` says, and of which part of a
    step they are: 0 before the first micro-batch, then 1, 2, ..., and -1 in optimizer.step().

    steps: of each `with count.step()` a Counter of (layer, part, phase, task). times: how often a task counts."""

    def __init__(self, record, model, optimizer):
        super().__init__()
        self.record, self.noted, self.part, self.times, self.steps = record, Counter(), 0, 1, []
        model.register_forward_pre_hook(self.next_micro_batch)
        step = optimizer.step

        def counted_step():
            self.part = -1
            return step()

        optimizer.step = counted_step

    def next_micro_batch(self, *_):
        self.part += torch.is_grad_enabled()  # else it is the choice of a batch

    @contextlib.contextmanager
    def step(self):
        self.noted, self.part = Counter(), 0
        with self:
            yield
        self.steps.append(self.noted)

    def note(self, task):
        self.noted[self.record.chunks[-1].layer, self.part, self.record.phase, task] += self.times

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is not torch.ops.prim.device.default and self.times:
            for task in tasks(function, args, kwargs, out):
                self.note(task)
        return out


def active():
    return [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Count)]


def tell(task):
    """Somebody stands in for a kernel and does nothing himself: this is what the kernel does."""
    for mode in active():
        mode.note(task)


@contextlib.contextmanager
def counted(times):
    """What runs in here counts so many times, where anybody counts."""
    modes = active()
    before = [mode.times for mode in modes]
    for mode in modes:
        mode.times *= times
    yield
    for mode, earlier in zip(modes, before):
        mode.times = earlier


def whole(noted, extra_layers=0, extra_batches=0):
    """A step's Counter (phase, task) -> times, of a model with so many more layers like the third, and so many more
    micro-batches like the second."""
    found = Counter()
    for (layer, part, phase, task), times in noted.items():
        times *= 1 + extra_layers * (layer == 2)
        found[phase, task] += times * (1 + extra_batches * (part == 2))
    return found


@dataclass
class Work:
    """What a run does, as Counters of (phase, task): its first step, an ordinary one, and all that its layers do now
    and then (new bases, merges), of which `share` falls to a step on average."""

    first: Counter
    ordinary: Counter
    renewal: Counter
    share: float

    def step(self):
        """A step on average."""
        mean = Counter(self.ordinary)
        for key, times in self.renewal.items():
            mean[key] += times * self.share
        return mean
