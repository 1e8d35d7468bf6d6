"""
The peak memory of a run as a formula: instant, where a trace takes seconds, and within a per cent of it.

    plan = estimate(config)                      # config: a namespace with train.py's keys -> Plan
    for name, value in plan.parts.items(): ...   # bytes at the peak, part by part

Letters: N = batch_size block_size tokens, D n_embd, F n_inner, V vocab_size, L n_layer, Q and K widths of all query and
of all key heads, H query heads; a and w are bytes of an activation and of a weight, 2 on a card. Everything is counted
as on a card: its attention's kernels, fused norms, fused Adam.

The peak is the largest of a step's moments, each of them a sum of parts. Left out, because they are small: gradients of
norms, the number a row that attention and norms keep in backward, scalars. What a method makes of one matrix of a block
is in matrices.py; a method that is not there is refused.
"""

from dataclasses import dataclass, field

from head import ROWS, Int8Matrix
from memory.activations import activations, activations_of_a_block, activations_of_mlp, chunk, in_attention
from memory.cuda import CONTEXT, workspace
from memory.matrices import METHODS, PIECE, adam_moments, turns, update_of
from memory.record import MB
from model import SIZES, ModelConfig

SLACK, SLACK_BYTES = 0.06, 60 * MB  # reserved beyond what is alive: about the mean of random configurations


class UnknownMethod(ValueError):
    """matrices.py has no function for the method; a trace needs none."""


@dataclass
class Plan:
    """Bytes. weights, states (bases among them): what stays between two steps. total: the most that is alive at once;
    parts: what it is made of; moment: when that is.

    allocated, reserved: what CUDA's allocator makes of it, as torch.cuda.max_memory_allocated and max_memory_reserved
    would say, cuBLAS's workspaces included; context: CUDA's own; card: nvidia-smi's figure. peak: of a traced plan,
    the record's (record.Peak). pieces: of a formula's, what llmem.several_gpus distributes. work: of a traced plan,
    what a run does (work.Work), of which rates.py makes seconds."""

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
    work: object = None

    @property
    def card(self):
        return self.reserved + self.context

    def __str__(self):
        rest = self.total - self.weights - self.states
        return (
            f'{self.total / 1e9:.2f} GB = weights {self.weights / 1e9:.2f} + states {self.states / 1e9:.2f} + '
            f'gradients, activations and temporaries {rest / 1e9:.2f}'
        )


def estimate(config, shape=None):
    """The Plan of a configuration on a card; shape: the ModelConfig, where the config's keys do not tell (a folder's
    model, a data set's vocabulary). Raises UnknownMethod, and KeyError where the model is not in SIZES."""
    run = Run(config, shape or shape_of(config))
    stays = what_stays(run)
    moments = while_building(run) | during_the_first_bases(run) | during_backward(run)
    moments |= during_the_update(run) | during_the_choice(run)
    moment = max(moments, key=lambda name: sum((stays | moments[name]).values()))
    parts = stays | moments[moment]
    total, states = sum(parts.values()), stays['states'] + stays['bases']
    reserved = int(total * (1 + SLACK)) + SLACK_BYTES + 2 * workspace()
    pieces = for_several_gpus(run, stays)
    return Plan(stays['weights'], states, total, total + 2 * workspace(), reserved, parts, moment, pieces=pieces)


# ---- the letters -------------------------------------------------------------------------------------------------


def shape_of(config):
    """The shape of a new model: what SIZES says, unless the config says otherwise."""
    names = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner', 'vocab_size')
    return ModelConfig(**SIZES[config.model] | {name: getattr(config, name) for name in names if getattr(config, name)})


class Run:
    """A configuration in letters: its sizes, the matrices of a block by name, and the bytes of gradients."""

    def __init__(self, config, shape):
        c, s = config, shape
        if c.method not in METHODS:
            raise UnknownMethod(f"no formula knows method='{c.method}', only a trace does: leave out --instant, --gpus")
        if not isinstance(s, ModelConfig):
            raise UnknownMethod(f'no formula knows {s.family}, only a trace does')
        if c.method == 'loqt' and c.train_rest == 'no':
            raise UnknownMethod("no formula knows train_rest='no' of loqt, only a trace: leave out --instant, --gpus")
        if c.targets != 'all' and c.method != 'lora':
            raise UnknownMethod(f"no formula knows targets='{c.targets}', only a trace: leave out --instant, --gpus")
        if getattr(c, 'project_tables', False):
            raise UnknownMethod('no formula knows project_tables, only a trace: leave out --instant, --gpus')
        self.config, self.shape = c, s
        self.a = self.w = 4 if c.dtype == 'float32' else 2
        self.a_logit = 4 if self.a == 4 else 4 + self.a  # in fp32, and in the activations' dtype
        self.N = c.batch_size * c.block_size
        self.D, self.F, self.V, self.L, self.H = s.n_embd, s.n_inner, s.vocab_size, s.n_layer, s.n_head
        self.Q, self.K = s.n_head * s.head_dim, s.n_kv_head * s.head_dim
        self.math_attention = self.a == 4 and self.Q != self.K  # flash attention alone shares heads; it takes 16 bits
        Q, K, D, F = self.Q, self.K, self.D, self.F
        sides = {'q': (Q, D), 'k': (K, D), 'v': (K, D), 'o': (D, Q), 'gate': (F, D), 'up': (F, D), 'down': (D, F)}
        self.block = {name: METHODS[c.method](self, name, *side) for name, side in sides.items()}

        self.table, self.tables = self.V * D, 1 if s.tie_embeddings else 2  # embedding and head
        self.vectors, self.last_norm = vectors(s)
        self.norms = self.L * sum(self.vectors) + sum(self.last_norm)  # and biases
        self.outside = self.w * (self.tables * self.table + self.norms)  # bytes of these weights
        self.outside -= self.w * self.table * c.offload_embedding
        self.outside -= ((self.w - 1) * self.table - 4 * self.V) * (c.head_bits == 8)
        self.trains_outside = self.trains_vectors = True
        if c.method == 'lora':
            self.trains_vectors = c.train_rest == 'yes' or (c.train_rest == 'auto' and c.init_from == 'scratch')
            self.trains_outside = self.trains_vectors or c.train_rest == 'tables'

        self.accumulates = c.gradient_accumulation_steps > 1
        self.piles_up = not c.per_layer or c.grad_clip > 0  # gradients wait for the end of the step
        self.block_grads = sum(x.grad for x in self.block.values())
        self.table_grad = self.w * self.table * self.trains_outside
        self.all_grads = self.L * self.block_grads + self.outside * self.trains_outside


def vectors(s):
    """-> sizes of the vectors of a block, norms and biases, and of the last norm; s: a ModelConfig."""
    D, F, Q, K, norm = s.n_embd, s.n_inner, s.n_head * s.head_dim, s.n_kv_head * s.head_dim, 1 + s.layer_norm
    biases = [Q, K, K] * s.qkv_bias + [D] * s.o_bias + [F, F, D] * s.mlp_bias
    return [D] * 2 * norm + biases + [s.head_dim] * 2 * s.qk_norm, [D] * norm


# ---- what is alive when ------------------------------------------------------------------------------------------


def what_stays(run):
    """{part: bytes} of what is there all the time."""
    c, L, block = run.config, run.L, run.block.values()
    outside = run.tables * adam_moments(run.table, c.state_bits) * run.trains_outside
    every_vector = run.vectors * L + run.last_norm
    outside += sum(adam_moments(n, c.state_bits) for n in every_vector) * run.trains_vectors
    states = L * sum(x.state(c.state_bits) for x in block) + outside
    positions = 4 * c.block_size * run.shape.rotary_dim  # cosines and sines, fp32
    adam = c.coreset != 'none' and c.coreset_norm == 'adam'
    history = {'history of the choice': 8 * compared(run)} if adam else {}  # M and V
    return history | {
        'weights': L * sum(x.weight for x in block) + run.outside + positions,
        'states': 0 if c.offload else states,
        'bases': L * sum(x.basis for x in block),
        'tokens': 8 * run.N * (1 + run.accumulates),
    }


def due(run):
    """The matrices that get a new basis, or merge, in one step: all; or in turns those whose gradients are largest."""
    c, block = run.config, list(run.block.values())
    if not block[0].renewal:
        return []
    every = block * run.L
    if not c.stagger:
        return every
    parts = [[every[i] for i in part] for part in turns(len(every), c.update_proj_gap)]
    return max(parts, key=lambda some: sum(x.due for x in some))


def logits(run):
    """ROWS rows of them in fp32, and in the activations' dtype. Of a head in 8 bits fewer, a piece of it decoded, and
    the rows' gradient in fp32, with the piece's part of it."""
    if run.config.head_bits == 16:
        return min(ROWS, run.N) * run.V * run.a_logit
    rows = min(Int8Matrix.ROWS, run.N)
    return rows * run.V * run.a_logit + (run.a * min(Int8Matrix.PIECE, run.V) + (4 + run.a) * rows) * run.D


def waiting(run):
    """Full gradients that wait: earlier micro-batches left them, or a merge waits for the norm to clip by."""
    waits = run.accumulates or (run.config.method == 'loqt' and run.config.grad_clip > 0)
    return sum(x.due for x in due(run)) * waits


def in_the_block(run):
    """-> bytes of the backward of a block's first matrix, `down`, whose input has the gradient a N F beside the
    residual stream a N D; and of making its basis, or merging it, there."""
    down, stream, inner = run.block['down'], run.a * run.N * run.D, run.a * chunk(run) * run.F
    stream *= 1 + (chunk(run) < run.N)  # the other chunks' gradients
    one_matrix = max(down.decoded, down.backward + (0 if run.piles_up else down.update))
    return stream + inner + max(inner, one_matrix), (stream + inner + down.renewal) * bool(down.renewal)


def during_backward(run):
    """{moment: {part: bytes}} from the loss to the embedding's gradient."""
    a, N, D = run.a, run.N, run.D
    all_activations, saved, again = activations(run)
    if run.accumulates:  # earlier micro-batches left all gradients; per layer each goes when its weight has moved
        at_the_last_block = run.all_grads - run.table_grad * (not run.piles_up)
        at_the_first_block = run.all_grads if run.piles_up else run.block_grads + run.table_grad
    else:  # they come one by one, the head's first, and pile up or go at once
        at_the_last_block = run.table_grad * run.piles_up
        at_the_first_block = (run.table_grad + (run.L - 1) * run.block_grads) * run.piles_up
    full_gradients, (backward, renewal) = waiting(run) * run.accumulates, in_the_block(run)
    return {
        'loss': {
            'activations': all_activations,
            'earlier gradients': run.all_grads * run.accumulates + full_gradients,
            'what was given, until the first merge': given(run),
            'gradient of the head': run.table_grad,
            'logits': logits(run),
            'last norm and its gradient': 3 * a * N * D + 4 * N,
        },
        'backward of the last block': {
            'activations': all_activations + again,
            'gradients': at_the_last_block,
            'in the block': backward,
        },
        'backward of attention': {
            'activations': all_activations + again - activations_of_mlp(run, chunk(run)) - a * N * D,
            'gradients': at_the_last_block,
            'in the block': in_attention(run),
        },
        'a new basis or a merge': {
            'activations': all_activations + again,
            'gradients': at_the_last_block + full_gradients,
            'in the block': renewal,
        },
        'backward of the first block': {
            'activations': saved + again,
            'gradients': at_the_first_block,
            'in the block': backward,
        },
        "the embedding's gradient": {
            'activations': a * N * D,
            'gradients': (run.all_grads - run.table_grad * (not run.accumulates)) * run.piles_up + run.table_grad,
            'update': 0,
        },
    }


def during_the_first_bases(run):
    """{moment: {part: bytes}} of the first step, in which every matrix gets a basis, or merges, from the gradient of
    the first micro-batch; those gradients come one by one."""
    all_activations, saved, again = activations(run)
    kept, (_, renewal) = run.piles_up or run.accumulates, in_the_block(run)
    return {
        'the first basis of the last block': {
            'activations': all_activations + again,
            'gradients': run.table_grad * kept,
            'what was given, until the first merge': given(run),
            'in the block': renewal,
        },
        'the first basis of the first block': {
            'activations': saved + again,
            'gradients': (run.table_grad + (run.L - 1) * run.block_grads) * kept,
            'in the block': renewal,
        },
    }


def given(run):
    """What LoQT keeps of weights that it was given, until a first merge compensates for what 4 bits lose."""
    return run.L * sum(x.at_first for x in run.block.values())


def update_of_the_table(run):
    """Temporaries of the largest update outside of the blocks, and its moments where they live in main memory."""
    bits = run.config.state_bits
    moments = adam_moments(run.table, bits) * run.config.offload
    return (update_of(run.table, run.D, bits, run.w) + moments) * run.trains_outside


def while_building(run):
    """{moment: {part: bytes}}: a layer's weight in full, before there are states."""
    one_layer = max(x.building for x in run.block.values()) - run.w * run.table * (
        run.tables - 1
    )  # the head comes last
    more = given(run) + run.L * sum(x.until_setup for x in run.block.values())
    nothing = {'states': 0, 'bases': 0, 'tokens': 0}
    return {'building the model': nothing | {'one layer in full': max(one_layer, 0), 'what does not stay': more}}


def updates_of_a_block(run):
    """Most bytes of gradients that are left and of temporaries, as the matrices of a block move one after another."""
    left = most = 0
    for x in run.block.values():
        moments = x.state(run.config.state_bits) * run.config.offload
        most = max(most, x.update + moments - left)
        left += x.grad
    return most


def during_the_update(run):
    """{moment: {part: bytes}} of the optimizer's walk through its groups, which under AdamW and LoRA begins with the
    embedding and under the others with the blocks. Per layer, the head moves as backward begins."""
    c, blocks_first = run.config, run.config.method not in ('adamw', 'lora')
    at_the_embedding = run.all_grads - run.L * run.block_grads * blocks_first
    at_the_blocks = run.all_grads - run.table_grad * (not blocks_first)
    at_the_head = run.all_grads if run.accumulates else run.table_grad
    merging = [x for x in due(run) if x.renewal] if c.method == 'loqt' and c.grad_clip else []
    return {
        "the embedding's update": {
            'gradients': at_the_embedding if run.piles_up else run.table_grad,
            'update': update_of_the_table(run),
        },
        "the head's update": {
            'activations': (activations(run)[0] + 2 * run.a * run.N * run.D) * (not run.piles_up),
            'gradients': (at_the_head + waiting(run)) * (not run.piles_up),
            'update': update_of_the_table(run),
        },
        "a matrix's update": {'gradients': at_the_blocks * run.piles_up, 'update': updates_of_a_block(run)},
        'a merge that waited for the norm': {
            'gradients': (at_the_blocks + sum(x.due for x in merging[1:])) * bool(merging),
            'update': max((x.renewal for x in merging), default=0),
        },
    }


def compared(run):
    """Numbers in what `coreset` compares of a window: its derivatives, or its gradient by what the V projection trains,
    with LoRA B."""
    c = run.config
    return c.zo_directions if c.coreset == 'zo' else run.K * (c.rank if c.method == 'lora' else run.D)


def during_the_choice(run):
    """{moment: {part: bytes}} of coreset's choice among a pool. Of each window it holds the hidden states in fp32, and
    for 'grad' the factors X and D of its gradient. Then comes one micro-batch through the last block: for 'zo' in fp32,
    one weight after another and at last the head, for 'grad' with its backward; or the Gram matrix, from some columns
    of all gradients at a time. Norm 'adam' then takes Adam's step of each window, as if all were of one source."""
    c, a, N, D, F, K = run.config, run.a, run.N, run.D, run.F, run.K
    if c.coreset not in ('zo', 'grad', 'hidden'):
        return {}
    pool, rows = c.batch_size * c.gradient_accumulation_steps * c.coreset_from, min(ROWS, N)
    into = c.rank if c.method == 'lora' else D  # of what the V projection trains
    wide = 4 * (a < 4)  # bytes of a number that was not in fp32
    if c.coreset == 'zo':
        down = run.block['down']
        weight = wide * D * F + (down.decoded if down.decoded else 0)
        inside = 4 * N * (2 * D + 3 * F) + weight
        at_the_end = 4 * N * 2 * D + wide * run.table + 4 * rows * run.V
        seen = 4 * pool * c.zo_directions
        busy = (a + wide + 4) * N * D + 8 * N * K + 4 * K * into + max(inside, at_the_end)
    elif c.coreset == 'hidden':
        seen, busy = 0, max(a * N * (4 * D + 3 * F), 8 * pool * pool)
    else:
        tail = activations_of_a_block(run) + rows * run.V * run.a_logit + 3 * a * N * D
        # the weight of a frozen layer, decoded, and with what was added to it
        tail += max(x.decoded + a * x.m * x.n * (c.method in ('lora', 'loqt')) for x in run.block.values())
        columns = min(max(PIECE // (pool * K), 1), into)
        product = pool * K * columns * run.a_logit + 4 * pool * pool
        seen, busy = a * pool * c.block_size * (into + K), max(tail, product)
    if c.coreset_norm == 'adam':
        # Adam's step of one window: g, the terms of M and of V, and the mean step; of each window its largest parts
        largest, numbers = min(c.coreset_sparsity or compared(run), compared(run)), compared(run)
        steps = max(24 * numbers + 4 * pool * largest, 4 * numbers + 8 * pool * largest) + 8 * largest  # int64
        busy = max(busy, 8 * pool * pool + steps)
    hidden_states = 32 * pool * c.block_size + 4 * pool * D  # with tokens and targets, those of the pool and a copy
    return {'the choice of the batch': {'seen of the pool': hidden_states + seen, 'activations': busy}}


def for_several_gpus(run, stays):
    """The parts that llmem.several_gpus distributes."""
    c, L, kept = run.config, run.L, activations_of_a_block(run)
    whole = run.a * run.N * 4 * run.D + 8 * run.N  # of kept, what tensor parallelism repeats: norms, residual stream
    return dict(
        weights=stays['weights'],
        gradients=run.all_grads if run.piles_up else run.table_grad,
        states=stays['states'] + stays['bases'],
        layer=sum(x.weight for x in run.block.values()),
        root=run.w * (run.tables * run.table + run.D),
        head=run.w * run.table,
        norms=run.w * run.norms,
        temporaries=max(update_of_the_table(run), *(x.update for x in run.block.values())),
        activations=kept - whole if c.checkpointing else L * (kept - whole),
        residual=activations(run)[0] + whole if c.checkpointing else L * whole,
        logits=logits(run),
    )
