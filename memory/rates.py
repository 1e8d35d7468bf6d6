"""
How fast a device does what a step consists of: measured, in about a second, and kept in a file.

    rates = load('cpu', torch.float32)       # measured before, or now; python memest.py --calibrate takes ten seconds
    rates.seconds(counted)                   # of a Counter of work.py's (phase, task) -> {phase: seconds}

Each sort of task has a curve: seconds a unit of work, at several sizes. In between it is interpolated, beyond its ends
it stays. So a curve holds what caches do, and no data sheet is needed. Work and size are, of

    products         operations; the smallest side, on which it depends how near they get to the peak
    attention        operations; the length, and apart the dimension of a head
    factorizations   m n^2; the smaller side n
    all else         bytes read and written, twice. Operations with a rate of their own (exp, random numbers, Adam in
                     one kernel, 8 and 4 bits) go by name. Of a CPU new memory of 32 MB and more is apart, since its
                     system hands that out page by page
    calls            an operation's own cost; measured on a small model, since most of it is autograd's and Python's

On one thread the clock is the processor's, which is deaf to other programs; else it is the wall's.
On a card, a phase takes what its kernels take or what calling them takes, and copies to main memory run beside them,
but for the moments' in the update.
"""

import bisect
import collections
import contextlib
import functools
import json
import math
import os
import platform
import statistics
import time
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import adam
import quant
from memory.record import MB
from memory.work import FEW_BITS, PAGES, PHASES
from model import LLaMA, ModelConfig

QUICK, THOROUGH = 1.0, 10.0  # seconds that a calibration takes, about
ALIKE = dict(exp='exp_', log='exp_', pow_='exp_', randn='rand', uniform_='rand', normal_='rand', randint='rand')
ALIKE |= dict(bernoulli_='rand', random_='rand', log_='exp_')

# ---- the file ----------------------------------------------------------------------------------------------------


def cache_file():
    """Where rates are kept: in $NANO24_CACHE, or in the user's folder of caches."""
    base = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return os.path.join(os.environ.get('NANO24_CACHE') or os.path.join(base, 'nano24'), 'rates.json')


def name_of(device, dtype):
    """What rates are of: another device, torch, number of threads or dtype has others."""
    what = torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else cpu_name()
    return f'{what}, torch {torch.__version__}, {torch.get_num_threads()} threads, {dtype}'.replace('torch.', '')


def cpu_name():
    try:
        with open('/proc/cpuinfo') as f:
            found = {line.partition(':')[2].strip() for line in f if line.startswith('model name')}
    except OSError:
        found = set()
    return ', '.join(sorted(found)) or platform.processor() or platform.machine()


def read_file():
    """{name: curves} of all devices; of a file that is not there or damaged, nothing."""
    try:
        with open(cache_file()) as f:
            found = json.load(f)
        return {name: checked(curves) for name, curves in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}


def checked(curves):
    """Raises ValueError or TypeError if these are no curves."""
    for points in curves.values():
        if not points or not all(size > 0 and 0 < seconds < math.inf for size, seconds in points):
            raise ValueError('no curve')
    return curves


def load(device='cpu', dtype=torch.float32, bits=False, anew=False, seconds=QUICK):
    """The Rates of a device, from the file, or measured now, in about so many seconds, and written there. bits: those
    of tensors in few bits, too, for which bitsandbytes is imported."""
    name, known = name_of(device, dtype), read_file()
    if anew or name not in known:
        known[name] = measure(common_tasks(device, dtype), device, seconds)
    elif not bits or 'nf4' in known[name]:
        return Rates(known[name], torch.device(device).type == 'cuda')
    if bits:
        known[name] |= measure(bit_tasks(device), device, seconds / 3)
    with contextlib.suppress(OSError):  # else it is measured again next time
        os.makedirs(os.path.dirname(cache_file()), exist_ok=True)
        part = f'{cache_file()}.{os.getpid()}'
        with open(part, 'w') as f:
            json.dump(known, f)
        os.replace(part, cache_file())
    return Rates(known[name], torch.device(device).type == 'cuda')


# ---- measuring ---------------------------------------------------------------------------------------------------


def measure(tasks, device, seconds=QUICK):
    """{sort: [(size, seconds a unit)]}, medians of as many rounds through all of them as there is time for, at least
    four after one that warms up; the lower one of two, since what disturbs a round makes it longer."""
    cuda = torch.device(device).type == 'cuda'
    clock = time.process_time if torch.get_num_threads() == 1 and not cuda else time.perf_counter
    wait = functools.partial(torch.cuda.synchronize, device) if cuda else lambda: None
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high' if cuda else precision)  # as in a run
    tried = list(tasks)
    spent, started = [[] for _ in tried], time.perf_counter()
    while len(spent[0]) < 5 or time.perf_counter() - started < seconds:
        for (_, _, _, run, times), seen in zip(tried, spent):
            wait()
            begin = clock()
            for _ in range(times):
                run()
            wait()
            seen.append((clock() - begin) / times)
    torch.set_float32_matmul_precision(precision)
    curves = {}
    for (sort, x, units, _, _), seen in zip(tried, spent):
        curves.setdefault(sort, []).append([x, max(statistics.median_low(seen[1:]), 1e-9) / units])
    for sort, points in curves.items():
        if sort.startswith('attention back'):  # it was measured with its forward
            for point, (_, forward) in zip(points, curves[sort.replace(' back', '')]):
                point[1] = max(point[1] - forward, forward)
    return curves


def common_tasks(device, dtype):
    """(sort, size, units of work, function, times in a round) of all but few bits."""
    return [*matrix_tasks(device, dtype), *byte_tasks(device), *attention_tasks(device, dtype), *call_tasks(device)]


def is_card(device):
    """A card is idle at sizes that fill a CPU core, so its tasks are larger, and several of them are under way at once,
    as in a step: one alone would be as slow as its call."""
    return torch.device(device).type == 'cuda'


def matrix_tasks(device, dtype):
    """Of products and factorizations."""
    sides, m, n, times = (16, 64, 192, 512), 512, 1024, 1
    if is_card(device):
        sides, m, n, times = (64, 256, 1024, 4096), 4096, 4096, 8

    def random(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    for kind in {dtype, torch.float32}:
        for side in sides:
            A, B, C = (random(*shape).to(kind) for shape in ((m, n), (n, side), (side, m)))
            units = 2 * m * n * side
            yield f'{kind}', side, units, functools.partial(torch.mm, A, B), times
            yield f'{kind} of short rows', side, units, functools.partial(torch.mm, B, C), times
    for n, m in ((48, 192), (256, 512)):
        A, square = torch.randn(m, n, device=device), torch.randn(n, n, device=device)
        yield 'qr', n, m * n * n, functools.partial(torch.linalg.qr, A), 1
        yield 'svd', n, m * n * n, functools.partial(torch.linalg.svd, A, full_matrices=False), 1
        yield 'eigh', n, n**3, functools.partial(torch.linalg.eigh, square @ square.T), 1


def attention_tasks(device, dtype):
    """The same of attention, forward and with its backward, at 256 tokens for several widths of a head, and at width 64
    for several lengths."""
    for sort, sizes in (('', ((32, 256), (64, 256), (128, 256))), (' by length', ((64, 64), (64, 256), (64, 1024)))):
        for d, T in sizes:
            heads, times = 16 if T <= 256 else 2, 1
            if is_card(device):
                heads, times = 32 * heads, 8
            q, k, v = (torch.randn(1, heads, T, d, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
            attend = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
            size, units = T if sort else d, 4 * heads * T * T * d
            yield f'attention{sort}', size, units, torch.no_grad()(attend), times
            back = functools.partial(back_and_forth, attend, (q, k, v), torch.ones_like(q))
            yield f'attention back{sort}', size, units, back, times


def back_and_forth(function, inputs, delta):
    torch.autograd.grad(function(), inputs, delta)


def into_turns(function, A, rooms):
    """function(A, A) into the next of the rooms, which no cache knows any more: a step keeps what it makes."""
    function(A, A, out=rooms[0])
    rooms.rotate()


def byte_tasks(device):
    """Of operations by the bytes that they read and write."""
    grown, room, least = (3, 64 << 20, 8) if is_card(device) else (0, 16 << 20, 1)
    for n in (1 << 13, 1 << 15, 1 << 18, 1 << 20, 1 << 22):  # numbers of 4 bytes
        n, times = n << grown, max((1 << 18) // n, least)
        A = torch.rand(n, device=device)
        rooms = collections.deque(torch.rand(n, device=device) for _ in range(room // n))
        yield 'made', 12 * n, 12 * n, functools.partial(into_turns, torch.mul, A, rooms), times
        yield 'moved', 12 * n, 12 * n, functools.partial(torch.ones_like(A).mul_, torch.ones_like(A)), times
        if n <= 1 << 20 << grown:
            yield 'exp_', 8 * n, 8 * n, functools.partial(torch.exp, A, out=torch.empty_like(A)), times
            norm = functools.partial(torch.linalg.vector_norm, A.view(-1, 64), dim=-1)
            yield 'linalg_vector_norm', 4 * n, 4 * n, norm, times
            yield '_fused_adamw_', 28 * n, 28 * n, functools.partial(adam_once, *(A.clone() for _ in range(4))), times
        if n == 1 << 18 << grown:
            for d in (16, 32, 64):
                half, factor = torch.rand(n // d, 2 * d, device=device)[:, :d], torch.rand(d, device=device)
                yield 'narrow', d, 12 * n, functools.partial(torch.mul, half, factor, out=torch.empty_like(half)), times
        if n in (1 << 15 << grown, 1 << 18 << grown):
            draw = functools.partial(torch.rand, n, generator=torch.Generator(device), device=device)
            yield 'rand', 4 * n, 4 * n, draw, least
    if torch.device(device).type == 'cpu':
        yield 'pages', 2 * PAGES, 2 * PAGES, lambda: torch.empty(2 * PAGES, dtype=torch.uint8).fill_(1), 1
    else:
        home = torch.empty(64 * MB, dtype=torch.uint8, pin_memory=True)
        yield 'copied', 64 * MB, 64 * MB, functools.partial(home.to, device), 1


def bit_tasks(device):
    """Of tensors in few bits, by numbers."""
    kernels, code = adam.kernels(), adam.code_of('M', torch.device(device))
    sizes, times = ((1 << 19, 1 << 24), 8) if is_card(device) else ((1 << 15, 1 << 18), 1)
    for n in sizes:
        A = torch.rand(n, device=device)
        coded, how = kernels.quantize_blockwise(A, code=code, blocksize=adam.BLOCK)
        parts, options = quant.encode(A), dict(code=code, blocksize=adam.BLOCK)
        yield 'quantize_blockwise', n, n, functools.partial(kernels.quantize_blockwise, A, **options), times
        decode = functools.partial(kernels.dequantize_blockwise, coded, absmax=how.absmax, **options)
        yield 'dequantize_blockwise', n, n, decode, times
        yield 'nf4', n, n, functools.partial(quant.encode, A), times
        yield 'dequantize_4bit', n, n, functools.partial(quant.decode, parts, (n // 64, 64), torch.float32), times


def adam_once(W, G, M, V):
    adam.adam_(W, G, {'fill': 1, 'M': M, 'V': V}, 1e-3, (0.9, 0.999), 1e-8)


class Calls(TorchDispatchMode):
    """How many operations there were."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def call_tasks(device):
    """Of a model so small that its operations cost nothing but their calls: a backward, and an update."""
    with torch.device(device):
        model = LLaMA(ModelConfig(n_layer=1, n_head=2, n_embd=16, n_inner=32, vocab_size=32, block_size=8))
        tokens = torch.zeros(1, 8, dtype=torch.int64)
    optimizer = adam.AdamW(model.parameters())

    def learn():
        model(tokens, tokens).backward()

    gradients = {}

    def update():
        for p, G in gradients.items():
            p.grad = G
        optimizer.step()

    for sort, run in (('call', learn), ('call in update', update)):
        learn()
        gradients.update((p, p.grad) for p in model.parameters())
        with Calls() as counted:
            run()
        for p in model.parameters():
            p.grad = None
        yield sort, 1, counted.calls, run, 1


# ---- seconds -----------------------------------------------------------------------------------------------------


class Rates:
    """Curves of a device, and what tasks take by them."""

    def __init__(self, curves, on_cuda=False):
        self.curves, self.on_cuda = curves, on_cuda

    def at(self, sort, x):
        """Seconds a unit of work at size x, interpolated in the logarithms of both."""
        points = self.curves[sort]
        i = bisect.bisect_left(points, x, key=lambda point: point[0])
        if i in (0, len(points)):
            return points[min(i, len(points) - 1)][1]
        (a, low), (b, high) = points[i - 1], points[i]
        return low * (high / low) ** (math.log(x / a) / math.log(b / a))

    def of(self, task, phase=''):
        """Seconds of a task of work.py."""
        sort, *of = task
        if sort == 'call':
            return self.at('call in update' if phase == 'update' else 'call', 1)
        if sort == 'product':
            dtype, b, m, n, k = of
            side, known = min(m, n, k), f'{dtype}' in self.curves
            curve = f'{dtype if known else torch.float32}{" of short rows" if k < min(m, n) else ""}'
            moved = b * (m * k + k * n + m * n) * dtype.itemsize
            return 2 * b * m * n * k * self.at(curve, side) + moved * self.at('made', moved)
        if sort.startswith('attention'):
            heads, T, S, d, causal = of
            longer = self.at(f'{sort} by length', T) / self.at(f'{sort} by length', 256)
            return heads * 4 * T * S * d * self.at(sort, d) * longer * (1 if causal else 2)
        if sort in ('qr', 'svd', 'eigh'):
            b, m, n = of
            return b * m * n * min(m, n) * self.at(sort, min(m, n))
        if sort == 'narrow':
            return of[1] * self.at('narrow', of[0])
        name, units = of if len(of) == 2 else (sort, of[0])
        curve = ALIKE.get(name, name)
        curve = curve if curve in self.curves else sort if sort in self.curves else 'moved'
        return units * self.at(curve, units)

    def peak(self, dtype):
        """Operations, bytes of the device and bytes to main memory, a second, of the largest that were measured."""
        return tuple(1 / self.curves[sort][-1][1] for sort in (f'{dtype}', 'moved', 'copied'))

    def seconds(self, counted):
        """{phase: seconds} of a Counter of (phase, task)."""
        kernels, calls, copies = Counter(), Counter(), Counter()
        for (phase, task), times in counted.items():
            where = calls if task[0] == 'call' else copies if task[0] == 'copied' else kernels
            where[phase] += times * self.of(task, phase)
        found = {}
        for phase in kernels | calls:
            if self.on_cuda:
                found[phase] = max(kernels[phase], calls[phase], copies[phase] * (phase != 'update'))
                found[phase] += copies[phase] * (phase == 'update')
            else:
                found[phase] = kernels[phase] + calls[phase]
        return found


# ---- a plan's time -----------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of a run: its first step, a step on average, with its share of new bases and merges; the phases of that;
    a token's in an evaluation."""

    first: float
    step: float
    phases: dict
    token: float

    def run(self, steps, eval_tokens=0):
        return self.first * (steps > 0) + self.step * max(steps - 1, 0) + self.token * eval_tokens

    def __str__(self):
        shares = {PHASES[phase]: 100 * seconds / self.step for phase, seconds in self.phases.items()}
        parts = [f'{phase} {share:.0f} %' for phase, share in shares.items() if share >= 0.5]
        return f'{self.step:.3g} s a step by what this device was measured to do: {", ".join(parts)}'


def why_not(plan, config, device, world=1, known=None):
    """Why no time is planned: a sentence, or None. known: of this dtype a card's rates must be known, since to measure
    them takes memory of it."""
    if plan.work is None:
        return 'no time is planned of a formula: leave out --instant'
    if config.compile:
        return 'no time is planned of compiled code, whose operations a trace does not see'
    if world > 1:
        return 'no time is planned of several processes, which wait for each other'
    if (device.startswith('cuda') or plan.context) and not torch.cuda.is_available():
        return 'no time is planned, since the plan is of a card and there is none here to be measured'
    if known is not None and device.startswith('cuda') and name_of(device, known) not in read_file():
        return 'no time is planned of a card that was not measured: python memest.py CONFIG --calibrate does that, once'
    return None


def planned(plan, config, device, dtype, anew=False):
    """The Times of a traced plan on this device (not `why_not`), by rates that are known or measured now."""
    works = [plan.work.first, plan.work.step()]
    bits = any(task[0] in ('nf4', *FEW_BITS) for work in works for _, task in work)
    rates = load(device, dtype, bits, anew, THOROUGH if anew else QUICK)
    first, phases = (rates.seconds(work) for work in works)
    forward = phases.get('forward', 0) + phases.get('loss', 0) / 3  # of the head without its gradients
    tokens = config.batch_size * config.block_size * config.gradient_accumulation_steps
    return Times(sum(first.values()), sum(phases.values()), phases, forward / tokens)
