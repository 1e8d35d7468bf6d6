"""
What a method keeps for one matrix of a block, and what the matrix's backward and update take: a function a method.

    x = METHODS['galore'](run, 'down', 4096, 11008)     # a Matrix; run: formula.Run, the configuration in letters

Letters: the matrix is (out, in), m x n with m <= n; r = min(rank, m); N tokens; a and w are bytes of an activation and
of a weight. A new method needs a function here before formula.py plans it: until then it is refused, and traced.
"""

from dataclasses import dataclass

from adam import BLOCK, PIECE, SMALLEST_8BIT
from methods.qgalore import blocks_of
from quant import BLOCK_4BIT


@dataclass
class Matrix:
    """Bytes, but for m, n, r and `trained`."""

    m: int
    n: int
    r: int
    weight: int
    trained: list  # numbers in each tensor that Adam moves
    grad: int  # what waits for the update
    backward: int  # temporaries of the gradient in backward
    update: int  # temporaries of the update
    basis: int = 0
    extra_state: int = 0  # beside Adam's moments and the basis
    decoded: int = 0  # the weight in the activations' dtype, while it multiplies
    due: int = 0  # in a step that renews the basis or merges: the full gradient, less what it replaces
    renewal: int = 0  # temporaries of that
    building: int = 0  # temporaries while the layer gets its weight
    at_first: int = 0  # what it keeps until its first basis
    until_setup: int = 0  # what it is built with, and `setup` drops

    def state(self, bits):
        return self.extra_state + sum(adam_moments(numbers, bits) for numbers in self.trained)


# ---- tensors in few bits, and Adam -------------------------------------------------------------------------------


def turns(n, gap):
    """Of n matrices that take turns within `gap` steps those of each turn, as ranges: the i-th's is i gap // n."""
    if gap >= n:
        return [range(i, i + 1) for i in range(n)]
    return [range(-(-k * n // gap), -(-(k + 1) * n // gap)) for k in range(gap)]


def nf4(numbers, double_quant=False):
    """4 bits a number, and a scale a block: 4 bytes, or with double_quant 1 byte and 4 for every 256 of them."""
    blocks = -(-numbers // BLOCK_4BIT)
    return -(-numbers // 2) + (blocks + 4 * -(-blocks // BLOCK) + 4 if double_quant else 4 * blocks)


def adam_moments(numbers, bits):
    """Adam's M and V: 4 bytes each, or 1 and a 4-byte scale for every 256."""
    return 8 * numbers if bits == 32 or numbers < SMALLEST_8BIT else 2 * (numbers + 4 * -(-numbers // BLOCK))


def direction_of(numbers, bits, w):
    """adam_direction's tensors: the step N in fp32, and the gradient in it; with 8 bits M, V and N, then N, the noise,
    the distances of V's codes, and new codes beside M and V."""
    return (22 if bits == 8 and numbers >= SMALLEST_8BIT else 4 + 4 * (w == 2)) * numbers


def update_of(numbers, row, bits, w):
    """Adam's temporaries for one tensor, in pieces of whole rows of at most PIECE numbers.

    bf16: the step N, W in fp32 and the random bits for its rounding are alive together: 12 bytes a number. fp32: the
    kernel works in place; 8 bits are decoded all the same."""
    rows = max(PIECE // max(row, 1) // BLOCK, 1) * BLOCK
    n = numbers if numbers <= PIECE else min(rows * row, numbers)
    if w == 4:
        return direction_of(n, bits, w) - 4 * n  # no N
    return max(direction_of(n, bits, w), 12 * n)


# ---- the methods -------------------------------------------------------------------------------------------------


def adamw(run, name, out, into):
    m, n = sorted((out, into))
    whole, update = run.w * m * n, update_of(m * n, into, run.config.state_bits, run.w)
    return Matrix(m, n, m, weight=whole, trained=[m * n], grad=whole, backward=whole, update=update)


def galore(run, name, out, into, int8=False):
    c, a, w = run.config, run.a, run.w
    m, n = (into, out) if c.proj_type == 'right' else sorted((out, into))  # P is (m, r)
    r = min(c.rank, m, n)
    basis = {16: w * m * r, 8: m * r + 4 * -(-m * r // BLOCK), 4: nf4(m * r)}[c.basis_bits]
    decoded = {16: 0, 8: (4 + 2 * (w == 2)) * m * r, 4: w * m * r}[c.basis_bits]
    new_P = 4 * (m * m + m * n) if c.refresh != 'subspace' else 4 * n * r
    # W moves some rows at a time: a part of P N, and W in fp32 with the random bits for its rounding; or int8 decoded,
    # in steps of its scale, these rounded down, the difference, and random numbers to compare it with.
    some_rows = min(m * n, max((1 << 22) // into, 1) * into) * (20 + w if int8 else 10 if w == 2 else 0)
    N = 4 * r * n
    return Matrix(
        m, n, r,
        weight=w * m * n + w,  # with R's placeholder, one number that is seen r n times
        trained=[r * n],
        grad=w * r * n,
        backward=decoded + a * run.N * r + a * r * n,  # P, delta P, R
        update=max(direction_of(r * n, c.state_bits, w), decoded + N + w * r * n * (w == 2) + some_rows),
        basis=basis,
        due=w * m * n - w * r * n,
        renewal=(w + 4 * (w < 4)) * m * n + new_P + 8 * m * r,
    )  # fmt: skip


def qgalore(run, name, out, into):
    int8, numbers = run.config.weight_bits == 8, out * into
    x = galore(run, name, out, into, int8)
    x.extra_state = 4 * (run.config.lazy > 0)  # what the old basis kept of the last gradient, one number
    if int8:
        x.weight = numbers + 4 * out * blocks_of(into) + 2 * run.w  # and two placeholders, the weight's and R's
        x.decoded = run.a * numbers
        x.building = run.w * numbers + 2 * numbers + 13 * min(numbers, 1 << 22)
    return x


def fira(run, name, out, into):
    x, w, numbers = galore(run, name, out, into), run.w, out * into
    x.grad = x.backward = w * numbers  # the residual needs the full gradient
    x.extra_state = w  # the norm of the last update
    # U, and in bf16 W in fp32 and its random bits; P, R and N
    x.update = (10 if w == 2 else 4) * numbers + (4 + 2 * w) * x.r * x.n + w * x.m * x.r * (run.config.basis_bits < 16)
    x.due, x.renewal = 0, 0
    return x


def apollo(run, name, out, into):
    m, n = sorted((out, into))
    r, whole = min(run.config.rank, m), run.w * m * n
    # the step, and in bf16 G in fp32, W in fp32 and its random bits; P, R and N
    update = (16 if run.w == 2 else 4) * m * n + 4 * m * r + 8 * r * n
    direction = 4 * m * n * (run.w == 2) + 4 * m * r + 4 * r * n + direction_of(r * n, run.config.state_bits, 4)
    update, norm = max(update, direction), 4  # the norm of the last update
    return Matrix(m, n, r, weight=whole, trained=[r * n], grad=whole, backward=whole, update=update, extra_state=norm)


def muon(run, name, out, into):
    m, n = sorted((out, into))
    x, w, bits, gathers = adamw(run, name, out, into), run.w, run.config.state_bits, run.config.per_layer
    x.trained, x.extra_state = [], adam_moments(m * n, bits) // 2  # M alone
    x.grad *= not (gathers and run.config.gradient_accumulation_steps > 1)
    # M decoded and its new codes; X, the next one, and A, its square and their sum; O, and W moves in pieces.
    M = 5 * m * n * (bits == 8)
    x.update = max(M + w * m * n, 2 * w * m * n + 2 * w * m * m, w * m * n + 12 * min(m * n, PIECE) * (w < 4))
    return x


def sumo(run, name, out, into):
    x, w = galore(run, name, out, into), run.w
    x.trained, x.extra_state = [], adam_moments(x.r * x.n, run.config.state_bits) // 2  # M alone
    decoded = {16: 0, 8: 4 + 2 * (w == 2), 4: w}[run.config.basis_bits] * x.m * x.r
    moves = min(out * into, max((1 << 22) // into, 1) * into) * (10 if w == 2 else 0)
    x.update = max(12 * x.r * x.n + 12 * x.r * x.r, decoded + (4 + w) * x.r * x.n + moves)
    return x


def loqt(run, name, out, into):
    c, a, w = run.config, run.a, run.w
    m, n = sorted((out, into))
    r, packed = min(c.rank, m), c.quantize == 'nf4'
    W_q, P = (nf4(k, c.double_quant) if packed else w * k for k in (m * n, m * r))
    many = run.N * (out + into) > out * into  # s P B is added to W, and not multiplied by itself
    # A merge: G and its fp32 copy make P; then W, what was packed and the difference, in W's dtype where that is
    # packed, else in fp32; beside the packed tensors of up to three rounds.
    rounds = min(max(c.compensation, 1), 3) if packed else 1
    in_rounds = 3 * w if packed else 12 if w == 2 else 8
    new_P = (a + 4 * (a < 4)) * m * n + (4 * (m * m + m * n) if c.refresh != 'subspace' else 4 * n * r) + 8 * m * r
    merge = in_rounds * m * n + rounds * (W_q if packed else w * m * n * (w == 2) // 2) + 8 * m * r + 2 * w * r * n
    return Matrix(
        m, n, r,
        weight=W_q + P + w * r * n,  # and B
        trained=[r * n],
        grad=w * r * n,
        backward=a * run.N * r + a * r * n + (a * m * r if packed else 0),
        update=update_of(r * n, n, c.state_bits, w),
        decoded=a * m * n * (packed or many) + a * m * r * packed,
        due=a * m * n,
        renewal=max(merge, new_P),
        building=w * m * n,
        at_first=nf4(m * n, c.double_quant) if packed and c.init_from not in ('scratch', 'resume') else 0,
    )  # fmt: skip


def lora(run, name, out, into):
    c, a = run.config, run.a
    m, n = sorted((out, into))
    adapted = c.targets == 'all' or name + '_proj' in c.targets.split(',')
    r, trained = (c.rank, [c.rank * into, out * c.rank]) if adapted else (0, [0])  # A and B, fp32
    packed = c.quantize == 'nf4'
    return Matrix(
        m, n, r,
        weight=(nf4(m * n, c.double_quant) if packed else run.w * m * n) + 4 * sum(trained),
        trained=trained,
        grad=4 * sum(trained),
        backward=a * run.N * r + a * r * n,
        update=max(update_of(k, row, c.state_bits, 4) for k, row in zip(trained, (into, c.rank))),
        decoded=a * m * n if packed else 0,
        building=run.w * m * n,
        until_setup=0 if adapted else 4 * c.rank * (out + into),
    )  # fmt: skip


METHODS = dict(adamw=adamw, galore=galore, qgalore=qgalore, fira=fira, apollo=apollo, loqt=loqt, lora=lora)
METHODS |= dict(muon=muon, sumo=sumo)
