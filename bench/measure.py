"""What the parts of the bench measure with: sizes by name, clocks, bytes, tables. Nothing here is timed by itself."""

import ctypes
import functools
import gc
import math
import platform
import statistics
import time

import torch

import configurator
import train
from memory.record import LiveBytes
from model import SIZES, LLaMA, ModelConfig

RANKS = {'60m': 128, '130m': 256, '350m': 256, '1b': 512, '7b': 1024}  # the paper's; of others a quarter of the width
WINDOW = 256  # tokens
NEVER = 10**9  # steps to the next refresh, where a part makes refreshes itself or leaves them out


def sizes(text):
    """'130m:12 1b' -> [('130m', 12), ('1b', 24)]."""
    words = [word.partition(':') for word in text.split()]
    return [(name, int(blocks or SIZES[name]['n_layer'])) for name, _, blocks in words]


def named(size, blocks):
    all_of_them = SIZES[size]['n_layer']
    return size if blocks == all_of_them else f'{size}, {blocks} of {all_of_them} blocks'


def rank_of(size):
    return RANKS.get(size, SIZES[size]['n_embd'] // 4)


def keep_freed_memory():
    """glibc hands every large freed tensor back to the system, which maps and zeroes the next one page by page: most of
    all the embedding's 98 MB gradient, in all a seventh of a step of 130m:1 on 512 tokens. Freed memory stays here
    instead, for all methods alike."""
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def clear():
    """Between two models it does go back, since pieces of all sizes would add up."""
    gc.collect()
    if platform.libc_ver()[0] == 'glibc':
        ctypes.CDLL(None).malloc_trim(0)


def unhook(optimizer):
    """A parameter holds our optimizer in its hook, where gc does not see it, and is held by it: neither would go."""
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    for p in (*parameters, *getattr(optimizer, 'placeholder', {}).values()):
        if p._post_accumulate_grad_hooks:
            p._post_accumulate_grad_hooks.clear()


def timed(step):
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def interleaved(methods, repeats, seconds=math.inf, least=3):
    """{name: median seconds of methods[name]()}, one step each in every round."""
    spent = {name: [] for name in methods}
    for i in range(repeats):
        for name, step in methods.items():
            if i < least or sum(spent[name]) < seconds:
                spent[name].append(timed(step))
    return {name: statistics.median(times) for name, times in spent.items()}


def made_in(step):
    """Bytes of what step() makes, at their most; what was there before does not count, though it changes in place."""
    with LiveBytes() as live:
        for t in gc.get_objects():
            if type(t) in (torch.Tensor, torch.nn.Parameter):  # isinstance would wake lazy objects of all kinds
                live.seen[t.untyped_storage()] = 0
        t = None
        step()
    return live.peak


@functools.cache
def matmul_rate():
    """FLOP/s of a large fp32 product, the best of several: what this machine can do for anybody."""
    a, b = torch.randn(4096, 4096), torch.randn(4096, 4096)
    return 2 * 4096**3 / min(timed(lambda: a @ b) for _ in range(6))


def state_tensors(optimizer):
    """Each tensor that an optimizer keeps, as (name, tensor)."""
    for state in optimizer.state.values():
        yield from ((name, t) for name, t in state.items() if torch.is_tensor(t))
        if 'projector' in state:  # galore-torch's
            yield 'P', state['projector'].ortho_matrix


def state_bytes(optimizer):
    """Of the storages, each once: a slice of a matrix keeps all of the matrix."""
    storages = [t.untyped_storage() for _, t in state_tensors(optimizer)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def run_config(size, blocks, *flags):
    """train.py's configuration of a model of some blocks. Flags that the method among them does not know are left out,
    so that one list serves all methods."""
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
    """Numbers with three digits or more, whatever their size; what is not there is empty."""
    if value is None or value != value:
        return ''
    if isinstance(value, float):
        return f'{value:,.0f}' if abs(value) >= 100 else f'{value:.1f}' if abs(value) >= 10 else f'{value:.2f}'
    return f'{value:,}' if isinstance(value, int) else value


def table(head, rows):
    return [f'| {" | ".join(map(cell, row))} |' for row in (head, ['---'] * len(head), *rows)]
