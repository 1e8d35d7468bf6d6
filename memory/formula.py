"""
The peak memory of a run as a formula: instant, where a trace takes seconds, and within a per cent of it.

    plan = estimate(config)                      # config: a namespace with train.py's keys -> Plan
    for name, value in plan.parts.items(): ...   # bytes at the peak, part by part

Letters: N = batch_size block_size tokens, D n_embd, F n_inner, V vocab_size, L n_layer, Q and K widths of all query and
of all key heads, H query heads; a and w are bytes of an activation and of a weight, 2 on a card. A matrix is m x n with
m <= n; r = min(rank, m). Everything is counted on a card: flash attention, fused norms, fused Adam.

The peak is that of the fullest of a step's moments, each of them a sum of lines (`moments` below). What is small there
on purpose: norms' gradients, the numbers a row of attention and norms, scalars.
"""

import math
from dataclasses import dataclass, field

from adam import BLOCK, BLOCK_4BIT, PIECE, SMALLEST_8BIT
from memory.cuda import CONTEXT, WORKSPACE
from memory.record import MB
from model import SIZES, HeadLoss, ModelConfig

SLACK, SLACK_BYTES = 0.04, 200 * MB  # what the allocator reserves beyond it: about the mean of results/memest.md's


@dataclass
class Plan:
    """Bytes. weights, states (bases among them): what stays between two steps. total: the most that is alive at once;
    parts: what it is made of; moment: when that is.

    allocated, reserved: what CUDA's allocator makes of it, as torch.cuda.max_memory_allocated and max_memory_reserved
    would say, cuBLAS's workspaces included; context: CUDA's own; card: nvidia-smi's figure. peak: of a traced plan,
    the record's (record.Peak). pieces: of a formula's, what llmem.several_gpus distributes."""

    weights: int
    states: int
    total: int
    allocated: int = 0
    reserved: int = 0
    parts: dict = field(default_factory=dict)
    moment: str = ''
    context: int = CONTEXT
    peak: object = None
    pieces: dict = field(default_factory=dict)

    @property
    def card(self):
        return self.reserved + self.context

    def __str__(self):
        rest = self.total - self.weights - self.states
        return (
            f'{self.total / 1e9:.2f} GB = weights {self.weights / 1e9:.2f} + states {self.states / 1e9:.2f} + '
            f'gradients, activations and temporaries {rest / 1e9:.2f}'
        )


def shape_of(config):
    """The shape of a new model: what SIZES says, and what the config says instead."""
    names = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner', 'vocab_size')
    return ModelConfig(**SIZES[config.model] | {name: getattr(config, name) for name in names if getattr(config, name)})


def nf4(numbers, double_quant):
    """4 bits a number, and a scale a block: 4 bytes, or with double_quant 1 byte and 4 for every 256 of them."""
    blocks = -(-numbers // BLOCK_4BIT)
    return -(-numbers // 2) + (blocks + 4 * -(-blocks // BLOCK) + 4 if double_quant else 4 * blocks)


def moments_of(numbers, bits):
    """Adam's M and V: 4 bytes each, or 1 and a 4-byte scale for every 256."""
    return 8 * numbers if bits == 32 or numbers < SMALLEST_8BIT else 2 * (numbers + 4 * -(-numbers // BLOCK))


def update_of(numbers, row, bits, w, decays=True):
    """Adam's temporaries for one tensor, in pieces of whole rows of at most PIECE numbers.

    bf16: the step N, W in fp32 and the random bits for its rounding are alive together: 12 bytes a number. fp32: the
    kernel works in place. 8 bits: M, V and N decoded, the distances of V's codes, noise, and the new codes."""
    rows = max(PIECE // max(row, 1) // BLOCK, 1) * BLOCK
    n = numbers if numbers <= PIECE else min(rows * row, numbers)
    if bits == 8 and numbers >= SMALLEST_8BIT:
        return (22 if w == 2 else 18) * n
    return 12 * n if w == 2 else 0


class Matrix:
    """Bytes that a method keeps for one matrix of a block, (out, in)."""

    def __init__(self, config, name, out, into, w):
        c = config
        m, n = sorted((out, into))
        r = min(c.rank, m)
        self.m, self.n, self.r, self.numbers = m, n, r, m * n
        self.weight, self.state, self.basis, self.grad, trained = w * m * n, 0, 0, w * m * n, [m * n]
        self.dense_grad = True  # backward forms G
        if c.method == 'galore':
            trained = [r * n]
            self.basis = {16: w * m * r, 8: m * r + 4 * -(-m * r // BLOCK), 4: nf4(m * r, False)}[c.basis_bits]
            self.dense_grad = c.residual == 'fira'
            self.grad = w * (m if self.dense_grad else r) * n
            self.weight += w  # R's placeholder, one number seen r n times
            if c.weight_bits == 8:
                self.weight = 2 * w + m * n + 4 * (m * n // math.gcd(into, BLOCK))
        elif c.method in ('apollo', 'apollo_mini'):
            trained = [r * n]
        elif c.method == 'loqt':
            packed = [m * n, m * r]
            self.weight = sum(nf4(k, c.double_quant) if c.quantize == 'nf4' else w * k for k in packed) + w * r * n
            trained, self.grad, self.dense_grad = [r * n], w * r * n, False
        elif c.method == 'lora':
            frozen = nf4(m * n, c.double_quant) if c.quantize == 'nf4' else w * m * n
            has = getattr(c, 'lora_targets', 'all') == 'all' or name + '_proj' in c.lora_targets.split(',')
            trained, r = ([c.rank * into, out * c.rank], c.rank) if has else ([0], 0)
            self.weight, self.grad, self.dense_grad = frozen + 4 * sum(trained), 4 * sum(trained), False
            self.r = r
        self.state = sum(moments_of(k, c.state_bits) for k in trained)
        self.state += {'fira': w}.get(c.residual, 4 * c.method.startswith('apollo'))  # the last update's norm
        self.trained = trained


def estimate(config, shape=None):
    """The Plan of a configuration on a card; shape: the ModelConfig, where the config's keys do not tell (a folder's
    model, a data set's vocabulary). Raises KeyError where the model is not in SIZES."""
    c, s = config, shape or shape_of(config)
    w = {'float32': 4, 'bfloat16': 2}.get(c.dtype, 2)
    a = w
    D, F, V, L = s.n_embd, s.n_inner, s.vocab_size, s.n_layer
    Q, K, H = s.n_head * s.head_dim, s.n_kv_head * s.head_dim, s.n_head
    N = c.batch_size * c.block_size
    several = c.gradient_accumulation_steps > 1
    each = {name: Matrix(c, name, out, into, w) for name, (out, into) in {
        'q': (Q, D), 'k': (K, D), 'v': (K, D), 'o': (D, Q), 'gate': (F, D), 'up': (F, D), 'down': (D, F),
    }.items()}  # fmt: skip
    block, down = list(each.values()), each['down']
    table = V * D  # embedding, head
    tables = 1 if s.tie_embeddings else 2
    others = {'embedding': table, 'head': table * (tables - 1), 'norms': (2 * L + 1) * D}
    rest = c.method != 'lora' or c.train_rest == 'yes' or (c.train_rest == 'auto' and c.init_from == 'scratch')

    # ---- what stays ----
    weights = L * sum(x.weight for x in block) + w * sum(others.values()) + 4 * c.block_size * s.head_dim
    norm_state = moments_of(D, c.state_bits) * (2 * L + 1)
    states = L * sum(x.state for x in block) + (tables * moments_of(table, c.state_bits) + norm_state) * rest
    bases = L * sum(x.basis for x in block)
    on_the_card = 0 if c.offload else states
    stays = {'weights': weights, 'states': on_the_card, 'bases': bases, 'tokens': 8 * N * (1 + several)}

    # ---- activations: what a block keeps for its backward ----
    # x and its norm, q and k turned, v, attention's result; x again and its norm; gate, silu, up and their product
    kept = a * N * (4 * D + 2 * Q + 2 * K + 4 * F) + N * (4 * H + 8)
    if c.method == 'lora':  # frozen layers keep no input; those with factors x A^T, too, and both in a's dtype
        has = {name for name, x in each.items() if x.r and not c.dropout}
        kept -= a * N * (D * (not has & {'q', 'k', 'v'}) + D * (not has & {'gate', 'up'}) + F * ('down' not in has))
        kept += sum(a * N * x.r + (a * sum(x.trained) if a != 4 else 0) for x in block)
        if c.dropout:  # each has inputs of its own, and a mask
            kept += sum((a + 1) * N * x.trained[0] // x.r for x in block if x.r)
    saved = a * N * D if c.checkpointing else kept  # a block's
    again = kept - saved  # of the block that is run again
    acts = L * saved + 2 * a * c.block_size * s.head_dim // 2

    # ---- gradients ----
    block_grads = sum(x.grad for x in block)
    all_grads = L * block_grads + w * sum(others.values()) * rest
    table_grad = w * table * rest
    before = all_grads if several else 0  # of earlier micro-batches
    piled = not c.per_layer or (c.grad_clip > 0)  # gradients wait for the step's end

    # ---- layers that are due a new basis or a merge in this step: they have a G ----
    renews = c.method == 'loqt' or (c.method == 'galore' and not down.dense_grad)
    together = min(-(-len(block) * L // c.update_proj_gap), len(block))
    due = (block[-together:] if c.stagger else L * block) if renews else []
    gathered = sum(a * x.numbers if c.method == 'loqt' else w * x.numbers - x.grad for x in due)  # G in R's place

    def renewed(x):  # temporaries of a merge, or of a new basis: fp32 copies
        if c.method == 'loqt':
            return 12 * x.numbers + 8 * x.r * x.n
        svd = 4 * (x.m * x.m + 2 * x.numbers) if c.refresh == 'svd' else 4 * x.n * x.r
        return (w + 4 * (w < 4)) * x.numbers + svd + 8 * x.m * x.r

    # ---- loss, HeadLoss.ROWS rows at a time ----
    rows = min(HeadLoss.ROWS, N)
    logits = rows * V * (4 + (a if a < 4 else 0))
    loss = {'gradient of the head': table_grad, 'logits': logits, 'last norm and its gradient': 3 * a * N * D + 4 * N}

    # ---- one matrix's gradient in backward, and what its method makes of it ----
    def given(x):  # temporaries of a matrix's backward
        if x.dense_grad:
            return x.grad
        return a * N * x.r + a * x.r * x.n  # delta P, R

    def decoded(x):  # W in the activations' dtype for as long as it multiplies
        packed = (c.method in ('loqt', 'lora') and c.quantize == 'nf4') or c.weight_bits == 8
        return a * x.numbers * (2 if packed and c.method == 'loqt' else 1) if packed else 0

    def moved(x):  # temporaries of a matrix's update
        if c.method == 'galore' and not x.dense_grad:
            part = min(x.numbers, 1 << 22)
            small = update_of(x.trained[0], x.n, c.state_bits, 2) * 2 // 3
            return max(small, 4 * x.r * x.n + (12 if w == 2 else 0) * part)
        if c.method in ('apollo', 'apollo_mini') or (x.dense_grad and c.method == 'galore'):
            return 4 * 4 * x.numbers
        return max(update_of(k, k, c.state_bits, w if c.method != 'lora' else 4) for k in x.trained)

    largest = max(block, key=lambda x: x.numbers)
    waiting = table_grad if piled and not several else 0  # the head's, which comes first
    used = 0 if piled or not several else table_grad  # the head's earlier gradients: per layer it has moved by then
    residual = a * N * D  # the gradient of the stream
    visiting = moments_of(table, c.state_bits) * c.offload  # moments that come from main memory
    head_moves = rest * (update_of(table, D, c.state_bits, w) + visiting)
    moments = {
        'loss': {'activations': acts, 'earlier gradients': before + gathered * several, **loss},
        'backward of the last block': {
            'activations': acts + again,
            'gradients': before - used + waiting,
            'in the block': max(
                2 * a * N * F + residual,
                a * N * F + residual + given(down) + decoded(down) + (0 if piled else moved(down)),
            ),
        },
        'a new basis or a merge': {
            'activations': acts + again,
            'gradients': before - used + waiting + gathered * several,
            'in the block': a * N * F + residual + renewed(down) if renews else 0,
        },
        'backward of the first block': {
            'activations': saved + again,
            'gradients': (before if piled else block_grads + table_grad)
            if several
            else waiting + (L - 1) * block_grads * piled,
            'in the block': max(
                2 * a * N * F + residual,
                a * N * F + residual + given(down) + decoded(down) + (0 if piled else moved(down)),
            ),
        },
        "the embedding's gradient": {
            'activations': a * N * D,
            'gradients': (all_grads if several else all_grads - table_grad) * piled + table_grad,
            'update': 0,
        },
        "the embedding's update": {  # after the blocks', but under AdamW, which goes from the bottom up
            'gradients': (all_grads - L * block_grads * (c.method not in ('adamw', 'lora'))) if piled else table_grad,
            'update': head_moves,
        },
        "the head's update": {
            'activations': (acts + 2 * a * N * D) * (not piled),
            'gradients': (all_grads if several else table_grad) * (not piled),
            'update': head_moves,
        },
        "a matrix's update": {'gradients': all_grads if piled else 0, 'update': moved(largest)},
    }
    if getattr(c, 'coreset', 'none') in ('zo', 'grad'):
        # hidden states of a pool in fp32, for grad X and D of its windows; then one micro-batch through the last block
        # and its backward, or the Gram matrix, PIECE numbers of all G at a time and in fp32
        pool = c.batch_size * c.gradient_accumulation_steps * c.coreset_from
        into = c.rank if c.method == 'lora' else D  # of what the V projection trains
        seen = a * pool * c.block_size * (into + K) if c.coreset == 'grad' else 4 * pool * c.zo_directions
        tail = kept + rows * V * (4 + a) + 3 * a * N * D if c.coreset == 'grad' else 4 * N * (6 * D + 3 * F + K)
        columns = max((1 << 25) // (pool * K), 1) * pool * K
        product = min(columns, pool * K * into) * (4 + a if a < 4 else 4) + 4 * pool * pool
        moments['the choice of the batch'] = {
            'seen of the pool': 16 * pool * c.block_size + 4 * pool * D + seen,
            'activations': max(tail, product if c.coreset == 'grad' else 0),
        }
    name = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {**stays, **moments[name]}
    whole = a * N * 4 * D + 8 * N  # of what a block keeps: norms and residual stream, which tensor parallelism repeats
    pieces = dict(
        weights=weights,
        gradients=all_grads if piled else table_grad,
        states=on_the_card + bases,
        layer=sum(x.weight for x in block),
        root=w * (tables * table + D),
        head=w * table,
        norms=w * others['norms'],
        temporaries=max(head_moves, moved(largest)),
        activations=kept - whole if c.checkpointing else L * (kept - whole),
        residual=acts + whole if c.checkpointing else L * whole,
        logits=logits,
    )
    total = sum(parts.values())
    reserved = int(total * (1 + SLACK)) + SLACK_BYTES + 2 * WORKSPACE
    states = on_the_card + bases
    return Plan(weights, states, total, total + 2 * WORKSPACE, reserved, parts, name, pieces=pieces)
