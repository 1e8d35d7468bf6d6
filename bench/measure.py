"""The tools of the bench: sizes by name, clocks, bytes, tables."""

import contextlib
import ctypes
import functools
import gc
import math
import platform
import statistics
import time
from unittest import mock

import torch

import configurator
import galore
import train
from memory.record import LiveBytes
from model import SIZES, LLaMA, ModelConfig

RANKS = {'60m': 128, '130m': 256, '350m': 256, '1b': 512, '7b': 1024}  # the paper's; else a quarter of the width
WINDOW = 256  # tokens
NEVER = 10**9  # update_proj_gap for parts that trigger refreshes themselves or leave them out


def sizes(text):
    """'130m:12 1b' -> [('130m', 12), ('1b', 24)]."""
    words = [word.partition(':') for word in text.split()]
    return [(name, int(blocks or SIZES[name]['n_layer'])) for name, _, blocks in words]


def named(size, blocks):
    total = SIZES[size]['n_layer']
    return size if blocks == total else f'{size}, {blocks} of {total} blocks'


def rank_of(size):
    return RANKS.get(size, SIZES[size]['n_embd'] // 4)


def keep_freed_memory():
    """Make glibc keep freed memory, for all methods alike. By default it returns every large freed tensor to the
    system, which maps and zeroes the next one page by page: a seventh of the time of a step of 130m:1 on 512 tokens,
    most of it for the embedding's 98 MB gradient."""
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def clear():
    """Return freed memory to the system: between two models, since pieces of all sizes would add up."""
    gc.collect()
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).malloc_trim(0)


def timed(step, clock=time.perf_counter):
    started = clock()
    step()
    return clock() - started


def interleaved(methods, repeats, seconds=math.inf, least=3, clock=time.perf_counter):
    """{name: median seconds of methods[name]()}. Each method takes one step per round; after `least` rounds, those that
    have used up `seconds` are skipped. clock: process_time is deaf to other programs, and counts all threads."""
    spent = {name: [] for name in methods}
    for i in range(repeats):
        for name, step in methods.items():
            if i < least or sum(spent[name]) < seconds:
                spent[name].append(timed(step, clock))
    return {name: statistics.median(times) for name, times in spent.items()}


def made_in(step):
    """Peak bytes of the storages that step() creates. Existing ones do not count, even if they change in place."""
    with LiveBytes() as live:
        for t in gc.get_objects():
            if type(t) in (torch.Tensor, torch.nn.Parameter):  # isinstance would load lazy objects
                live.seen[t.untyped_storage()] = 0
        t = None
        step()
    return live.peak


@functools.cache
def matmul_rate():
    """FLOP/s of a large fp32 product, the best of several: the practical peak of this machine."""
    a, b = torch.randn(4096, 4096), torch.randn(4096, 4096)
    return 2 * 4096**3 / min(timed(lambda: a @ b) for _ in range(6))


def state_tensors(optimizer):
    """Yield (name, tensor) for each tensor in an optimizer's state."""
    for state in optimizer.state.values():
        yield from ((name, t) for name, t in state.items() if torch.is_tensor(t))
        if 'projector' in state:  # galore-torch's
            yield 'P', state['projector'].ortho_matrix


def state_bytes(optimizer):
    """Bytes of an optimizer's state, each storage counted once: a slice keeps its whole matrix in memory."""
    storages = [t.untyped_storage() for _, t in state_tensors(optimizer)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def run_config(size, blocks, *flags):
    """train.py's configuration for a model with this many blocks. Flags that the method does not have are left out, so
    that one list serves all methods."""
    flags = [f'--model={size}', f'--n_layer={blocks}', f'--rank={rank_of(size)}', f'--block_size={WINDOW}', *flags]
    known = vars(configurator.load(train.__file__, [flag for flag in flags if flag.startswith('--method=')]))
    flags = [flag for flag in flags if flag.removeprefix('--').partition('=')[0] in known]
    return configurator.load(train.__file__, flags, train.problems)


def on_meta(size, blocks):
    with torch.device('meta'):
        return LLaMA(ModelConfig(**SIZES[size] | {'n_layer': blocks}))


def block_matrices(model):
    return [module.weight for module in model.layers.modules() if isinstance(module, torch.nn.Linear)]


def cell(value):
    """A table cell: floats with about three digits, empty for None and NaN."""
    if value is None or value != value:
        return ''
    if isinstance(value, float):
        return f'{value:,.0f}' if abs(value) >= 100 else f'{value:.1f}' if abs(value) >= 10 else f'{value:.2f}'
    return f'{value:,}' if isinstance(value, int) else value


def table(head, rows):
    return [f'| {" | ".join(map(cell, row))} |' for row in (head, ['---'] * len(head), *rows)]


def nothing_attached(so=True):
    """While active, if `so`: train.py's setup leaves the layers as they are, as in a loop that knows an optimizer
    alone, and torch makes the gradients."""
    unchanged = mock.patch.object(galore.GaLoreAdamW, 'attach', lambda self, linears: None)
    return unchanged if so else contextlib.nullcontext()
