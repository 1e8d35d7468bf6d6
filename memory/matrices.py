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

    def state(self, bits):
        return self.extra_state + sum(adam_moments(numbers, bits) for numbers in self.trained)


# ---- tensors in few bits, and Adam -------------------------------------------------------------------------------


def nf4(numbers, double_quant=False):
    """4 bits a number, and a scale a block: 4 bytes, or with double_quant 1 byte and 4 for every 256 of them."""
    blocks = -(-numbers // BLOCK_4BIT)
    return -(-numbers // 2) + (blocks + 4 * -(-blocks // BLOCK) + 4 if double_quant else 4 * blocks)


def adam_moments(numbers, bits):
    """Adam's M and V: 4 bytes each, or 1 and a 4-byte scale for every 256."""
    return 8 * numbers if bits == 32 or numbers < SMALLEST_8BIT else 2 * (numbers + 4 * -(-numbers // BLOCK))


def update_of(numbers, row, bits, w):
    """Adam's temporaries for one tensor, in pieces of whole rows of at most PIECE numbers.

    bf16: the step N, W in fp32 and the random bits for its rounding are alive together: 12 bytes a number. fp32: the
    kernel works in place. 8 bits: M, V and N decoded, the distances of V's codes, noise, and the new codes."""
    rows = max(PIECE // max(row, 1) // BLOCK, 1) * BLOCK
    n = numbers if numbers <= PIECE else min(rows * row, numbers)
    if bits == 8 and numbers >= SMALLEST_8BIT:
        return (22 if w == 2 else 18) * n
    return 12 * n if w == 2 else 0


# ---- the methods -------------------------------------------------------------------------------------------------


def adamw(run, name, out, into):
    m, n = sorted((out, into))
    whole, update = run.w * m * n, update_of(m * n, m * n, run.config.state_bits, run.w)
    return Matrix(m, n, m, weight=whole, trained=[m * n], grad=whole, backward=whole, update=update)


def galore(run, name, out, into):
    c, a, w = run.config, run.a, run.w
    m, n = sorted((out, into))
    r = min(c.rank, m)
    one_step_or_svd = 4 * (m * m + 2 * m * n) if c.refresh == 'svd' else 4 * n * r
    some_rows = (12 if w == 2 else 0) * min(m * n, 1 << 22)
    return Matrix(
        m, n, r,
        weight=w * m * n + w,  # with R's placeholder, one number that is seen r n times
        trained=[r * n],
        grad=w * r * n,
        backward=a * run.N * r + a * r * n,  # delta P, R
        update=max(update_of(r * n, n, c.state_bits, 2) * 2 // 3, 4 * r * n + some_rows),
        basis={16: w * m * r, 8: m * r + 4 * -(-m * r // BLOCK), 4: nf4(m * r)}[c.basis_bits],
        due=w * m * n - w * r * n,
        renewal=(w + 4 * (w < 4)) * m * n + one_step_or_svd + 8 * m * r,
    )  # fmt: skip


def qgalore(run, name, out, into):
    x, numbers = galore(run, name, out, into), out * into
    if run.config.weight_bits == 8:
        x.weight = numbers + 4 * out * blocks_of(into) + 2 * run.w  # and two placeholders, the weight's and R's
        x.decoded = run.a * numbers
    return x


def fira(run, name, out, into):
    x, numbers = galore(run, name, out, into), out * into
    x.grad = x.backward = run.w * numbers  # the residual needs the full gradient
    x.extra_state = run.w  # the norm of the last update
    x.update, x.due, x.renewal = 16 * numbers, 0, 0  # four fp32 matrices
    return x


def apollo(run, name, out, into):
    m, n = sorted((out, into))
    r, whole = min(run.config.rank, m), run.w * m * n
    update, norm = 16 * m * n, 4  # four fp32 matrices; the norm of the last update
    return Matrix(m, n, r, weight=whole, trained=[r * n], grad=whole, backward=whole, update=update, extra_state=norm)


def loqt(run, name, out, into):
    c, a, w = run.config, run.a, run.w
    m, n = sorted((out, into))
    r = min(c.rank, m)
    frozen = sum(nf4(k, c.double_quant) if c.quantize == 'nf4' else w * k for k in (m * n, m * r))  # W_q, P
    return Matrix(
        m, n, r,
        weight=frozen + w * r * n,  # and B
        trained=[r * n],
        grad=w * r * n,
        backward=a * run.N * r + a * r * n,  # delta P, R
        update=update_of(r * n, r * n, c.state_bits, w),
        decoded=2 * a * m * n if c.quantize == 'nf4' else 0,  # W_q, and W_q + s P B
        due=a * m * n,
        renewal=12 * m * n + 8 * r * n,  # a merge, in fp32
    )  # fmt: skip


def lora(run, name, out, into):
    c, a = run.config, run.a
    m, n = sorted((out, into))
    adapted = c.lora_targets == 'all' or name + '_proj' in c.lora_targets.split(',')
    r, trained = (c.rank, [c.rank * into, out * c.rank]) if adapted else (0, [0])  # A and B, fp32
    packed = c.quantize == 'nf4'
    return Matrix(
        m, n, r,
        weight=(nf4(m * n, c.double_quant) if packed else run.w * m * n) + 4 * sum(trained),
        trained=trained,
        grad=4 * sum(trained),
        backward=a * run.N * r + a * r * n,
        update=max(update_of(k, k, c.state_bits, 4) for k in trained),
        decoded=a * m * n if packed else 0,
    )  # fmt: skip


METHODS = dict(adamw=adamw, galore=galore, qgalore=qgalore, fira=fira, apollo=apollo, loqt=loqt, lora=lora)
