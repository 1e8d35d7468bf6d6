"""
The head and its loss, some rows of logits at a time: of 4,096 tokens and 128,000 ids all of them would be 2 GB in fp32.

    loss = HeadLoss.apply(x, W, targets, True)            # x (N, D), W (V, D), targets (N,): -100 is not counted
    losses, delta = cross_entropy_rows(x, W, targets, scale)      # of each row, and the gradient by the logits
    lm_head = Int8Head(lm_head.weight)                    # a frozen head in 8 bits

Letters are model.py's: N rows (tokens), D n_embd, V vocab_size.
"""

import torch
import torch.nn as nn


class Int8Matrix:
    """A frozen head W (V, D) in 8 bits: whole numbers q (V, D) times a power of two for each row, scale (V, 1).

    A power of two costs up to one bit of eight, and makes W exact in bf16: what a checkpoint holds is coded to the same
    q again. It multiplies PIECE rows at a time, so that no more of it is ever whole. dtype: what it computes in."""

    requires_grad, PIECE, ROWS = False, 8192, 256  # of W at once, and of logits

    def __init__(self, q, scale, dtype):
        self.q, self.scale, self.dtype, self.device, self.shape = q, scale, dtype, q.device, q.shape

    def take(self, W):
        """Become W (V, D), wherever that lies."""
        for a in range(0, len(W), self.PIECE):
            rows = W[a : a + self.PIECE].float()  # (PIECE, D)
            part, power = torch.frexp(rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127)  # (PIECE, 1)
            scale = torch.ldexp(torch.ones_like(part), power - (part == 0.5).int())  # the power of two above
            self.scale[a : a + self.PIECE] = scale
            self.q[a : a + self.PIECE] = (rows / scale).round_()

    def __len__(self):
        return len(self.q)

    def to(self, dtype):
        return Int8Matrix(self.q, self.scale, dtype)

    def new_empty(self, *size, dtype=None):
        return self.q.new_empty(*size, dtype=dtype or self.dtype)

    def element_size(self):
        return self.dtype.itemsize

    def pieces(self):
        """Yield (rows, W's rows in its dtype), all in the same memory."""
        room = self.new_empty(min(self.PIECE, len(self)), self.shape[1])  # (PIECE, D)
        for a in range(0, len(self), self.PIECE):
            rows = slice(a, min(a + self.PIECE, len(self)))
            yield rows, room[: rows.stop - a].copy_(self.q[rows]).mul_(self.scale[rows].to(self.dtype))

    def dense(self):
        W = self.new_empty(*self.shape)  # (V, D)
        for rows, part in self.pieces():
            W[rows] = part
        return W

    def logits(self, x, out=None):
        """x W^T (n, V) for x (n, D)."""
        out = self.new_empty(len(x), len(self)) if out is None else out
        for rows, W in self.pieces():
            torch.mm(x, W.T, out=out[:, rows])
        return out

    def back(self, delta):
        """delta W (n, D) for delta (n, V), summed over pieces in fp32."""
        total = torch.zeros(len(delta), self.shape[1], dtype=torch.float32, device=self.device)
        for rows, W in self.pieces():
            total += delta[:, rows] @ W
        return total.to(self.dtype)


class Int8Head(nn.Module):
    """An Int8Matrix in the place of LLaMA's lm_head, for `weight`."""

    bias, reads_on = None, 'cpu'  # a file's bf16 never gets to the card

    def __init__(self, W):
        super().__init__()
        self.register_buffer('q', torch.empty_like(W, dtype=torch.int8))
        self.register_buffer('scale', W.new_empty(len(W), 1, dtype=torch.float32))
        self.dtype, (self.out_features, self.in_features) = W.dtype, W.shape
        if not W.is_meta:
            self.weight.take(W.detach())

    @property
    def weight(self):
        return Int8Matrix(self.q, self.scale, self.dtype)

    def dense_weight(self):
        return self.weight.dense()


ROWS = 512  # of logits, at once


def room_for_logits(n, W):
    """For n rows of x W^T in W's dtype, and of what is made of them in fp32; one tensor if that is W's dtype."""
    product = W.new_empty(n, len(W))  # (n, V)
    return product, product if W.dtype == torch.float32 else torch.empty_like(product, dtype=torch.float32)


def cross_entropy_rows(x, W, targets, scale=None, room=None, bias=None):
    """Cross-entropy of x W^T in nats, one number a row, with nothing kept for autograd: -> losses (n,), delta (n, V).

    delta is the gradient of sum(scale * losses) by the logits, in x's dtype; None without a scale. x (n, D), W (V, D),
    targets and scale (n,). A row whose target is -100 wants scale 0, and its loss means nothing. All but the products
    is fp32. room: `room_for_logits` of n rows or more, which delta lies in. bias (V,): added to the logits."""
    product, logits = (part[: len(x)] for part in room or room_for_logits(len(x), W))  # (n, V)
    W.logits(x, product) if isinstance(W, Int8Matrix) else torch.mm(x, W.T, out=product)
    if logits.dtype != product.dtype:
        logits.copy_(product)
    if bias is not None:
        logits += bias
    logits -= logits.amax(1, keepdim=True)
    losses = -logits.gather(1, targets.clamp_min(0)[:, None])[:, 0]  # (n,)
    total = logits.exp_().sum(1)  # (n,)
    losses += total.log()
    if scale is None:
        return losses, None
    logits *= (scale / total)[:, None]  # scale (softmax - one at the target)
    logits.scatter_add_(1, targets.clamp_min(0)[:, None], -scale[:, None])
    return losses, logits if logits.dtype == product.dtype else product.copy_(logits)


# A trace, whose targets have no values, takes all for trained.
OPERATIONS = torch.library.Library('nano24', 'FRAGMENT')
OPERATIONS.define('trained_rows(Tensor targets) -> Tensor')
OPERATIONS.impl('trained_rows', lambda y: (y.flatten() != -100).nonzero()[:, 0], 'CompositeExplicitAutograd')
torch.library.register_fake('nano24::trained_rows', lambda targets: targets.new_empty(targets.numel()))


def trained_rows(targets):
    """Where in the flat targets (B T) those stand that are not -100: (n,) int64; None if all do. On a card it waits, so
    a step asks before its targets get there."""
    rows = torch.ops.nano24.trained_rows(targets)
    return rows if len(rows) < targets.numel() else None


def blocks_of_rows(n, trained=None, size=ROWS):
    """Yield indices of the n rows, or of those that are trained, `size` at a time; of none, one block without any."""
    for a in range(0, max(n if trained is None else len(trained), 1), size):
        yield slice(a, a + size) if trained is None else trained[a : a + size]


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of x W^T in nats, its sum over targets that are not -100 divided by `divisor`, a number or a 0-dim
    tensor; None: by how many these are, the mean. Never the (N, V) logits. weights (N,): a factor on each row's.
    trained (n,) int64: which rows have such a target, where that is known; the others have no logits then. bias (V,):
    added to the logits, where a head has one.

    Forward and backward together, ROWS rows of logits at a time. torch's F.linear_cross_entropy does this too, but in
    bf16 either adds losses up in bf16, 0.2 nats off at 16,384 rows, or, on a CPU, makes two fp32 tensors of the
    head's size: 1 GB at 7B."""

    @staticmethod
    def forward(ctx, x, W, targets, needs_grad, weights=None, divisor=None, trained=None, bias=None):
        count = (targets != -100).sum() if divisor is None else divisor
        loss = torch.zeros((), device=x.device)
        W_here = W.to(x.dtype)  # (V, D)
        if needs_grad:
            dx = torch.empty_like(x) if trained is None else torch.zeros_like(x)  # (N, D)
            dW = torch.empty_like(W_here) if ctx.needs_input_grad[1] else None  # (V, D); none of a frozen head
            db = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[7] else None  # (V,)
        size = W.ROWS if isinstance(W, Int8Matrix) else ROWS
        room = room_for_logits(min(len(x), size), W_here)  # however many are trained
        for i, rows in enumerate(blocks_of_rows(len(x), trained, size)):
            x_here, ids = x[rows], targets[rows]  # (n, D), (n,)
            keep = ids != -100
            factor = 1.0 if weights is None else weights[rows]
            scale = keep * factor / count if needs_grad else None  # (n,)
            losses, delta = cross_entropy_rows(x_here, W_here, ids, scale, room, bias)  # (n,), (n, V)
            loss += torch.where(keep, losses * factor, 0).sum()
            if needs_grad:
                dx[rows] = W_here.back(delta) if isinstance(W_here, Int8Matrix) else delta @ W_here
                if dW is not None:
                    dW.addmm_(delta.T, x_here, beta=float(i > 0))  # the first begins the sum
                if db is not None:
                    db += delta.sum(0)
        if needs_grad:
            ctx.save_for_backward(dx, dW if dW is None else dW.to(W.dtype), db)
        return loss / count

    @staticmethod
    def backward(ctx, scale):
        dx, dW, db = ctx.saved_tensors
        dW, db = (d if d is None else d.mul_(scale) for d in (dW, db))
        return dx.mul_(scale), dW, None, None, None, None, None, db
