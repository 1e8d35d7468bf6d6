"""
What fits a card: every method by the formula, with the largest batch; and the flags that save most.
"""

import bisect
import math
from dataclasses import dataclass
from types import SimpleNamespace

import configurator
from memory import llmem
from memory.cuda import CONTEXT
from memory.formula import Plan, UnknownMethod, estimate

# What a run can be turned into; a way says all options that it stands for, whatever the run had. Learning rates are not
# touched, since each method wants its own (see its config files).
LORA = dict(method='lora', rank=16, scale=2.0, dropout=0.0, merge_every=0, train_rest='auto')
LOQT = dict(method='loqt', scale=0.5, train_rest='yes', quantize='nf4', double_quant=False)
LONG = dict(offload_activations=True, mlp_chunk=8192)
WAYS = {
    'AdamW': dict(method='adamw'),
    'AdamW, 8-bit': dict(method='adamw', state_bits=8),
    'AdamW, 8-bit, per layer': dict(method='adamw', state_bits=8, per_layer=True, grad_clip=0.0),
    'GaLore': dict(method='galore', scale=0.25, basis_bits=16),
    'GaLore, 8-bit, per layer': dict(method='galore', scale=0.25, basis_bits=16, state_bits=8, per_layer=True),
    'GaLore, 8-bit, offloaded': dict(
        method='galore', scale=0.25, basis_bits=4, state_bits=8, per_layer=True, offload=True
    ),
    'GaLore, 8-bit, offloaded, long windows': dict(
        method='galore', scale=0.25, basis_bits=4, state_bits=8, per_layer=True, offload=True
    ) | LONG,
    'Q-GaLore': dict(
        method='qgalore', scale=0.25, basis_bits=4, weight_bits=8, lazy=0.0, state_bits=8, per_layer=True
    ),
    'APOLLO-Mini, per layer': dict(
        method='apollo', tensorwise=True, rank=1, scale=11.3, per_layer=True, grad_clip=0.0
    ),
    'LoQT': LOQT,
    'LoQT, 8-bit, per layer': LOQT | dict(state_bits=8, per_layer=True),
    'LoRA': LORA | dict(quantize='none', double_quant=False),
    'QLoRA': LORA | dict(quantize='nf4', double_quant=True),
    'QLoRA, long windows': LORA | LONG | dict(quantize='nf4', double_quant=True),
}  # fmt: skip
WAYS = {name: way | dict(targets='all') for name, way in WAYS.items()}

# From scratch these leave the blocks' random weights as they are, but for rank r.
NO_PRETRAINING = (
    'LoRA',
    'QLoRA',
    'QLoRA, long windows',
)  # from scratch these leave the blocks' random weights as they are, but for rank r

CARRIED = ('rank', 'update_proj_gap', 'stagger')  # how large a subspace is and how often it turns: to any other method

MARGIN = 0.03  # of a plan, kept free: an allocator's gaps differ from run to run

TERAFLOPS, GB_PER_SECOND = 165e12, 1008e9  # an RTX 4090's, from its data sheet: only the order of the rows rests on it

PCI_EXPRESS = 25e9  # bytes a second between two of them, PCIe 4.0 x16 less its overhead: a guess

DATA_SHEET = (TERAFLOPS, GB_PER_SECOND, PCI_EXPRESS)  # where no card is here to be measured (rates.Rates.peak)


# ---- how fast ----------------------------------------------------------------------------------------------------


def seconds_per_token(config, shape, peak=DATA_SHEET):
    """Predicted, at best: of arithmetic and memory the slower, micro-batch by micro-batch, and the update's passes.
    peak: operations, bytes of the card and bytes to main memory, all a second."""
    c, (arithmetic, memory, pci) = config, peak
    D, F, L, V = shape.n_embd, shape.n_inner, shape.n_layer, shape.vocab_size
    Q, K = shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim
    N = c.batch_size * c.block_size
    matrices = [(Q, D), (K, D), (K, D), (D, Q), (F, D), (F, D), (F, D)]
    size = L * sum(m * n for m, n in matrices)
    r = [min(getattr(c, 'rank', 0), m, n) for m, n in matrices]
    both = L * sum(k * (m + n) for k, (m, n) in zip(r, matrices))  # r (m + n)
    product = L * sum(k * m * n for k, (m, n) in zip(r, matrices))  # r m n
    forward = 2 * size * (2 if c.checkpointing else 1) + 2 * L * D * c.block_size
    backward = 2 * size + 4 * L * D * c.block_size
    low_rank = c.method in ('galore', 'qgalore', 'loqt', 'lora')  # backward forms R, never G
    flops = forward + backward + (2 * both if low_rank else 2 * size) + 8 * V * D  # a token
    flops += 4 * both * (c.method == 'lora')
    flops += 2 * 3 * L * D * F * (c.mlp_chunk > 0 and not c.offload_activations)  # chunks are computed once more
    per_batch = 2 * 2 * product * (c.method == 'loqt')  # s P B into W, forward and backward
    read = 3 * 2 * size * (1.5 if c.method in ('loqt', 'lora') and c.quantize == 'nf4' else 1)
    moved = 2 * 2 * L * N * D * c.offload_activations  # beside the arithmetic
    micro = max((flops * N + per_batch) / arithmetic, read / memory, moved / pci)
    states = estimate(SimpleNamespace(**vars(c) | {'offload': False}), shape).states
    update = (
        (2 * states + 4 * size) / memory
        + 2 * states / pci * c.offload
        + 2 * product / arithmetic * (c.method in ('galore', 'qgalore', 'fira'))
    )
    micro *= 1.03 if 8 in (c.state_bits, getattr(c, 'weight_bits', 16)) else 1  # coding and decoding
    return (micro + update / c.gradient_accumulation_steps) / N


# ---- what fits ---------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A way to run a model. batch: windows in a micro-batch, the largest that fits; bytes: of a card; seconds: a token,
    on all cards; flags: what to type after the command line that gave the config; way: to use several cards; context:
    the longest block_size that fits with one window in a micro-batch, 0 where that was not asked."""

    name: str
    checkpointing: bool
    batch: int
    plan: Plan
    bytes: float
    seconds: float
    flags: str
    way: str = ''
    context: int = 0


def turned_ways(config):
    """Yield (name, config) of every way, without and with checkpointing."""
    for name, way in WAYS.items():
        turned = turn(config, way)
        for checkpointing in (False, True):
            yield name, SimpleNamespace(**vars(turned) | dict(checkpointing=checkpointing))


def fit(config, gpu_bytes, shape, problems, peak=DATA_SHEET):
    """Rows of every way to run this model that fits a card of gpu_bytes by the formula, with the largest batch that
    does and divides the windows of a step, fastest first: on one card, what LLMem's algorithm 1 is for. problems:
    train.problems, which knows what does not go together."""
    total, rows = config.batch_size * config.gradient_accumulation_steps, []
    alone = dict(batch_size=1, gradient_accumulation_steps=total)
    small = [batch for batch in range(1, math.isqrt(total) + 1) if total % batch == 0]
    batches = sorted({*small, *(total // batch for batch in small)}, reverse=True)
    for name, turned in turned_ways(config):
        for batch in batches:
            micro_batches = dict(batch_size=batch, gradient_accumulation_steps=total // batch)
            c = SimpleNamespace(**vars(turned) | micro_batches)
            try:
                plan = estimate(c, shape)
            except UnknownMethod:  # a way that somebody added
                break
            if plan.card * (1 + MARGIN) <= gpu_bytes and not problems(c):
                seconds = seconds_per_token(c, shape, peak)
                rows.append(Row(name, c.checkpointing, batch, plan, plan.card, seconds, flags(config, c)))
                rows[-1].context = longest_context(SimpleNamespace(**vars(c) | alone), gpu_bytes, shape)
                break
    return sorted(rows, key=lambda row: row.seconds)


LONGEST, STEP = 2**20, 64  # tokens in a window, the most that train.py takes; contexts are multiples of STEP


def longest_context(config, gpu_bytes, shape):
    """The largest block_size with which this config fits a card by the formula."""

    def too_long(steps):
        c = SimpleNamespace(**vars(config) | {'block_size': steps * STEP})
        return estimate(c, shape).card * (1 + MARGIN) > gpu_bytes

    return STEP * bisect.bisect_left(range(1, LONGEST // STEP + 1), True, key=too_long)


def fit_several(config, gpu_bytes, n, shape, problems, peak=DATA_SHEET):
    """The same on n cards: of each way of `fit` the fastest way of llmem.WAYS to use them, with micro-batches that
    divide a card's share of the windows of a step."""
    rows, total = [], config.batch_size * config.gradient_accumulation_steps
    for name, turned in turned_ways(config):
        c = SimpleNamespace(**vars(turned) | dict(batch_size=1, gradient_accumulation_steps=total))
        if problems(c):
            continue
        try:
            parts = estimate(c, shape).pieces
        except UnknownMethod:
            continue
        packed = getattr(c, 'quantize', 'none') != 'none' or getattr(c, 'weight_bits', 16) == 8
        ways = [way for way in llmem.WAYS if not packed or way in ('ddp', 'ddp_copy', 'zero1')]  # buffers are not cut
        exchanged = (6 if c.checkpointing else 4) * shape.n_layer * c.block_size * shape.n_embd * 2
        room = gpu_bytes / (1 + MARGIN) - CONTEXT
        one = seconds_per_token(c, shape, peak) * c.block_size
        found = llmem.choose(parts, room, n, one, PCI_EXPRESS, exchanged, ways)
        for row in found[:1]:
            share = max(total // (row['samples'] // row['batch']), 1)  # of the windows of a step, for each group
            batch = max(b for b in range(1, share + 1) if share % b == 0 and b <= row['batch'])
            c.batch_size, c.gradient_accumulation_steps = batch, max(total // batch, 1)
            plan, size = estimate(c, shape), llmem.several_gpus(estimate(c, shape).pieces, n, row['way'])['total']
            seconds = 1 / (row['samples_per_second'] * c.block_size)
            rows.append(Row(name, c.checkpointing, batch, plan, size + CONTEXT, seconds, flags(config, c), row['way']))
    return sorted(rows, key=lambda row: row.seconds)


def turn(config, way):
    """The config with one of WAYS in the place of its method, and nothing else that saves memory."""
    plain = configurator.switch(config, way['method'])
    carried = {key: getattr(config, key) for key in CARRIED if hasattr(config, key) and hasattr(plain, key)}
    trunk = dict(state_bits=32, per_layer=False, compile=False, save_merged=True)
    trunk |= dict(offload=False, offload_activations=False, mlp_chunk=0)
    return configurator.switch(config, **trunk | carried | way)


def flags(config, c):
    """What makes `c` of `config` when it is typed after the command line that gave `config`; in brackets, what must be
    left out there, since c's method has no such option."""
    before = vars(configurator.switch(config, c.method)) | {'method': config.method}
    typed = [key for key, where in getattr(config, '_given', {}).items() if where == 'command line']
    before |= {key: getattr(config, key) for key in typed}
    left_out = getattr(config, '_left_out', {})  # in a file whose method is another one: with c's it may count again
    changed = [key for key in vars(c) if key[0] != '_' and (getattr(c, key) != before[key] or key in left_out)]
    words = ' '.join(f'--{key}={getattr(c, key)}' for key in changed)
    foreign = [f'--{key}' for key in typed if not hasattr(c, key)]
    return words + f' (and leave out {", ".join(foreign)})' * bool(foreign)


# ---- what to turn ------------------------------------------------------------------------------------------------


def memory_advice(config, shape=None, problems=None, kept=()):
    """The three flags that save most by the formula, of those that are not turned yet, with what each saves.

    problems: train.problems, which knows what does not go together; kept: keys that a resumed run cannot change."""
    c = config
    try:
        now = estimate(c, shape).total
    except UnknownMethod:
        return f"--checkpointing=True, a smaller --batch_size, or --state_bits=8 (method='{c.method}' has no formula)"
    turns = {
        '--checkpointing=True': ({'checkpointing': True}, 'a quarter slower'),
        '--per_layer=True': ({'per_layer': True}, 'same result'),
        '--per_layer=True --grad_clip=0': ({'per_layer': True, 'grad_clip': 0.0}, 'no clipping'),
        '--state_bits=8': ({'state_bits': 8}, 'nearly the same result'),
        '--method=galore': ({'method': 'galore'}, 'another method'),
        '--method=loqt': ({'method': 'loqt'}, 'weights in 4 bits'),
    }
    if hasattr(c, 'rank'):
        turns[f'--rank={max(c.rank // 2, 1)}'] = {'rank': max(c.rank // 2, 1)}, 'half the subspace'
    if c.batch_size % 2 == 0:
        half, twice = c.batch_size // 2, 2 * c.gradient_accumulation_steps
        changes = {'batch_size': half, 'gradient_accumulation_steps': twice}
        turns[f'--batch_size={half} --gradient_accumulation_steps={twice}'] = changes, 'same total batch'
    saved = []
    for words, (changes, why) in turns.items():
        useless = all(getattr(c, key) == value for key, value in changes.items())
        if useless or set(changes) & set(kept) or ('grad_clip' in changes and not c.grad_clip):
            continue
        if 'method' in changes and c.method != 'adamw':
            continue
        turned = configurator.switch(c, **changes)
        if problems and problems(turned):
            continue
        less = now - estimate(turned, shape).total
        if less > 0.01 * now:
            saved.append((less, f'{words} (saves about {less / 1e9:.2f} GB; {why})'))
    return '; '.join(words for _, words in sorted(saved, reverse=True)[:3]) or 'a smaller model, or a larger card'


def cannot_fit(config, shape, dtype, room):
    """A sentence if this run needs far more than `room` bytes, else None: by the formula, which no run waits for and
    which is at most a fifth too high (results/memest.md). dtype: 'float32' or 'bfloat16'."""
    c = SimpleNamespace(**vars(config) | {'dtype': dtype})
    windows = c.batch_size * c.gradient_accumulation_steps * (c.coreset_from if c.coreset != 'none' else 1)
    try:
        parts = estimate(c, shape).parts
    except UnknownMethod:
        parts = {}
    parts = parts | {'tokens': 16 * windows * c.block_size}  # of the whole step, and what each is to predict
    if (total := sum(parts.values())) <= 1.25 * room:
        return None
    return (
        f'this run needs about {total / 1e9:,.0f} GB by the formula, most of it {max(parts, key=parts.get)}, and there '
        f'are {room / 1e9:,.0f} GB: use a smaller --model, --batch_size or --block_size, or see memest.py --fit'
    )


def explain_out_of_memory(config, error, problems=None, kept=()):
    """What went wrong, and three flags to turn, those that save most first."""
    advice = memory_advice(config, None, problems, kept)
    return f'out of memory ({(str(error) or "no details").splitlines()[0]}); try {advice}'
