"""
What CUDA's kernels allocate and keep that a CPU's do not, for traces that run on a CPU.

Most of what stands here allocates the tensors of the kernel that its docstring names, and computes nothing.
"""

from collections import Counter

import torch
import torch.nn.functional as F

from attention import attend_masked, flash_takes
from memory.record import MB, Allocator, LiveBytes
from memory.work import tell

aten = torch.ops.aten

# One for each pair of cuBLAS handle and stream, and backward runs in a thread with a handle of its own: 2 x 4096 KiB +
# 8 x 16 KiB (ATen/cuda/CUDABlas.cpp, getChosenWorkspaceSize, ':4096:2:16:8'); on Hopper and later 32 MiB.
WORKSPACE, WORKSPACE_HOPPER = 8_519_680, 32 * MB


def workspace():
    """Bytes of one, on this machine's card, or on one of no more than 24 GB where there is none."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return WORKSPACE_HOPPER if hopper else WORKSPACE


# What a product with a bias gives cuBLASLt while it runs (CUDABlas.cpp, _getWorkspaceSize: 1024 KiB).
WORKSPACE_LT = MB

# CUDA's context, code and handles of libraries, which the allocator never sees: 300 to 500 MB on cards since 2018.
CONTEXT = 500 * MB


# ---- norms and attention -----------------------------------------------------------------------------------------


class FusedRMSNorm(torch.autograd.Function):
    """The tensors of CUDA's fused RMSNorm. It keeps x and one number a row; a CPU's operations keep four matrices."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        tell(('made', 'rms_norm', 2 * x.nbytes))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, delta):
        x, weight, _ = ctx.saved_tensors
        tell(('made', 'rms_norm', 3 * x.nbytes))
        return torch.empty_like(x), torch.empty_like(weight)


class FusedAttention(torch.autograd.Function):
    """The tensors of CUDA's flash and memory-efficient attention, forward and backward.

    Flash (flash_attn/flash_api.cpp): out, logsumexp; backward with dq in fp32, and dk, dv for every head of q.
    Memory-efficient (attention.cu): the same without copies for heads, and no second dq where q is fp32 itself."""

    @staticmethod
    def forward(ctx, q, k, v, flash):  # flash: True, False, or of packed rows how many more it makes room for
        B, H, T, D = q.shape
        out = q.new_empty(B, T, H, D).transpose(1, 2)  # (B, H, T, D), in memory by token
        lse = q.new_empty(B, H, T if flash else -(-T // 32) * 32, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.flash = flash
        tell(('attention', *attended(q, k, flash)))
        return out

    @staticmethod
    def backward(ctx, delta):
        q, k, v, out, lse = ctx.saved_tensors
        B, H, T, D = q.shape
        tell(('attention back', *attended(q, k, ctx.flash)))
        dq, dk, dv = (x.new_empty(B, T, x.shape[1], D).transpose(1, 2) for x in (q, k, v))
        rounded = -(-T // 128) * 128 if ctx.flash is True else T + ctx.flash
        row = q.new_empty(B, H, rounded, dtype=torch.float32)  # sum of out * delta in each row
        inner = [row]
        if ctx.flash or q.dtype != torch.float32:
            inner.append(q.new_empty(B, rounded, H, -(-D // 32) * 32, dtype=torch.float32))
        if ctx.flash and k.shape[1] != H:
            inner += [q.new_empty(B, T, H, D) for _ in range(2)]
        del inner, out, lse  # the kernel reads them until here, though checkpointing has let go of them
        return dq, dk, dv, None


def attended(q, k, flash):
    """The work of a kernel by work.py: heads in all, T, S, d, causal. Packed rows, of some pieces, have as many heads
    more."""
    B, H, T, d = q.shape
    pieces = flash // 128 - 1 if type(flash) is int else 1
    return B * H * pieces, T // pieces, k.shape[2] // pieces, d, True


class SafeSoftmax(torch.autograd.Function):
    """aten's _safe_softmax in its inner steps, as torch.profiler's memory events show them: softmax; a byte a score,
    where it is -inf; a byte a row, where all are; and zeros written into those rows in place."""

    @staticmethod
    def forward(ctx, scores):
        result = scores.softmax(-1)
        masked = scores == float('-inf')
        empty = masked.all(-1, keepdim=True)
        result.masked_fill_(empty, 0.0)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, delta):
        (result,) = ctx.saved_tensors
        return aten._softmax_backward_data(delta, result, -1, result.dtype)


def math_attention(q, k, v, mask=None, dropout=0.0, causal=False, scale=None):
    """softmax(q k^T) v in separate steps, as ATen/native/transformers/attention.cpp takes them on CUDA.

    q (B, H, T, D); k, v (B, H or fewer, T, D), repeated where they have fewer heads. 16 bits are computed in 32."""
    dtype, T, S = q.dtype, q.shape[-2], k.shape[-2]
    q, k, v = (x.float() for x in (q, k, v))
    root = (scale or q.shape[-1] ** -0.5) ** 0.5
    scaled = q * root
    if causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, torch.zeros((), dtype=q.dtype, device=q.device), float('-inf'))  # (T, S)
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], -3) for x in (k, v))
    scores = scaled @ (k.transpose(-2, -1) * root)  # (B, H, T, S)
    if mask is not None:
        scores = scores.add_(mask)
    scores = SafeSoftmax.apply(scores)
    if dropout:
        scores = F.dropout(scores, dropout)
    return (scores @ v).to(dtype)  # (B, H, T, D)


def cuda_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
                   flash=True):  # fmt: skip
    """F.scaled_dot_product_attention by the kernel that CUDA chooses (ATen/native/transformers/cuda/sdp_utils.cpp):
    flash for 16 bits without a mask, if it is built in; else memory-efficient, which cannot repeat heads; else math."""
    if torch.is_autocast_enabled('cpu'):
        q, k, v = (x.to(torch.get_autocast_dtype('cpu')) for x in (q, k, v))
    if flash and attn_mask is None and q.dtype != torch.float32 and q.shape[-1] <= 256:
        return FusedAttention.apply(q, k, v, True)
    if not (enable_gqa and q.shape[1] != k.shape[1]):
        return FusedAttention.apply(q, k, v, False)
    return math_attention(q, k, v, attn_mask, dropout_p, is_causal, scale)


def cuda_packed_attention(q, k, v, pieces, scale=None):
    """attention.attend_packed on a card: flash attention's variable lengths for 16 bits, else by a mask."""
    if not flash_takes(q):
        return attend_masked(q, k, v, pieces, scale)
    flat = (A.flatten(0, 1)[None].transpose(1, 2) for A in (q, k, v))  # (1, H, B T, d), K heads
    y = FusedAttention.apply(*flat, 128 * len(pieces))  # (1, H, B T, d); backward has room for 128 rows more a piece
    return y.transpose(1, 2).view(q.shape)


def cuda_dropout(x, p=0.5, training=True, inplace=False):
    """CUDA's dropout keeps a mask of one byte a number, a CPU's has x's dtype."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


class CudaAutocast(torch.overrides.TorchFunctionMode):
    """Computes in fp32 what CUDA's autocast does and a CPU's does not (ATen/autocast_mode.h)."""

    IN_FP32 = ('layer_norm', 'group_norm', 'softmax', 'log_softmax', 'pow', '__pow__', 'rsqrt', 'exp', 'log', 'sum')

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, '__name__', '') in self.IN_FP32 and torch.is_autocast_enabled('cpu'):
            half = (torch.bfloat16, torch.float16)
            args = [a.float() if isinstance(a, torch.Tensor) and a.dtype in half else a for a in args]
        return function(*args, **(kwargs or {}))


# ---- an allocator with workspaces --------------------------------------------------------------------------------


class Recorder(LiveBytes):
    """LiveBytes through an Allocator, with the phase of the step and what CUDA's kernels take beside their results.

    phase: set by whoever drives the step. most: peak of allocated bytes; where: its phase and operation. workspaces:
    cuBLAS's, a block for each thread that multiplied. beside_gradients: by phase, the most that is allocated beside the
    gradients that wait (`watch`)."""

    def __init__(self, cuda, workspace=WORKSPACE):
        super().__init__(Allocator())
        self.cuda, self.workspace, self.workspaces = cuda, workspace, {}
        self.phase, self.running, self.most, self.where = 'load', '', 0, ('', '')
        self.gradients, self.beside_gradients = {}, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        card, self.running = self.allocator, function.overloadpacket.__name__
        if self.cuda and function in (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default):
            thread = 'backward' if self.phase == 'backward' else 'forward'
            if thread not in self.workspaces:
                self.workspaces[thread] = card.malloc(self.workspace)
        out = super().__torch_dispatch__(function, types, args, kwargs)
        if self.cuda:
            blocks = [card.malloc(n) for n in hidden(function, args, out)]
            self.note()
            for block in blocks:
                card.free(block)
        return out

    def add(self, storage, tensor=None, function=None):
        if storage.nbytes() and storage not in self.seen:  # CUDA allocates no block for 0 bytes
            super().add(storage, tensor, function)
            self.note()

    def watch(self, params):
        """From here on know which gradients wait; whoever drops them clears `gradients`."""

        def waits(p):
            if p.grad is not None:  # else it has moved its weight already
                self.gradients[id(p)] = p.grad.nbytes

        for p in params:
            p.register_post_accumulate_grad_hook(waits)

    def note(self):
        beside = self.allocator.allocated - sum(self.gradients.values())
        self.beside_gradients[self.phase] = max(self.beside_gradients[self.phase], beside)
        if self.allocator.allocated > self.most:
            self.most, self.where = self.allocator.allocated, (self.phase, self.running)


def hidden(function, args, out):
    """The blocks that CUDA's kernel of an operation takes while it runs, beside what it returns: a list of bytes."""
    if function is aten.addmm.default and args[0].ndim == 1:
        return [WORKSPACE_LT]
    if function is aten.embedding_dense_backward.default and args[1].numel() > 3072:  # sorts (cuda/Embedding.cu)
        return [args[1].nbytes] * 4
    return []
