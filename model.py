"""
LLaMA in one file: RMSNorm, rotary embeddings, SwiGLU, grouped-query attention; loads and saves Hugging Face folders.
By switches of ModelConfig it is Mistral, Qwen2 and 2.5, Qwen3, Phi-3 to 4, SmolLM3, Granite, or StableLM.

    model = LLaMA(ModelConfig(**SIZES['60m']))            # random weights, N(0, 0.02)
    loss = model(tokens, targets)                         # tokens, targets: (B, T) int64 -> mean loss in nats per token
    logits = model(tokens)                                # (B, T, vocab)
    model = LLaMA.from_pretrained('path/to/folder')       # config.json + model.safetensors (or its sharded index)
    model.save_pretrained('path/to/folder')

What trainer, methods, checkpoints and plans ask of a model, whoever computes it (plumbing/hf_modules.py does, too):
    parts       layers, embed_tokens, head (V, D), head_bias, head_modules(), head_begins
    forward     model(...), hidden, logits, before_last and last (the last block alone, for CoLM), new_cache
    weights     dense_weights(), n_params(), flops_per_token(T), save_pretrained(folder, merged)
    a run       checkpointing, home, activation_dtype, at_step(step), set_block_size(n), config.n_layer and .block_size

Letters: B batch, T tokens in a window, D n_embd, H heads, K key/value heads, d head_dim, V vocab_size.
Linear weights are (out, in). Modules have Hugging Face's names; state dicts differ only in the prefix `model.`.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


class ModelError(Exception):
    """A model that cannot be built or a folder that cannot be read; the message says what to do."""


@dataclass
class ModelConfig:
    n_layer: int = 8
    n_head: int = 8
    n_kv_head: int = 0  # 0: n_head; fewer: grouped-query attention
    n_embd: int = 512
    n_inner: int = 1376  # width of the SwiGLU layer
    vocab_size: int = 32000
    block_size: int = 256  # longest window; only the length of the rotary tables depends on it
    head_dim: int = 0  # 0: n_embd / n_head
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # how frequencies change for long windows, as ROPE says; None: not at all
    tie_embeddings: bool = False  # head and embedding share one matrix
    family: str = 'llama'  # model_type of the folder it is saved to; what differs in the arithmetic is said below
    qkv_bias: bool = False  # q, k and v projections add a vector
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before they are rotated
    layer_norm: bool = False  # norms are LayerNorm with bias
    rotary_dim: int = 0  # dimensions of a head that rotate, the first ones; 0: head_dim
    no_rope: tuple = ()  # layers that do not rotate at all
    embedding_scale: float = 1.0  # factor on the embedding's rows
    residual_scale: float = 1.0  # factor on what attention and MLP add
    attention_scale: float = 0.0  # factor on q k^T; 0: 1 / sqrt(head_dim)
    logit_divisor: float = 1.0
    max_positions: int = 0  # longest window the weights support, kept when training on shorter ones; 0: block_size
    bos_token_id: int | None = None  # these two are unused here, only saved for other readers of the folder
    eos_token_id: int | list | None = None
    kept: dict | None = None  # other fields of the config.json it came from, which go back into the one it is saved to

    def __post_init__(self):
        for key in ('n_layer', 'n_head', 'n_embd', 'n_inner', 'vocab_size', 'block_size'):
            if getattr(self, key) < 1:
                raise ModelError(f'{key}={getattr(self, key)} is too small: use 1 or more')
        if not self.head_dim and self.n_embd % self.n_head:
            raise ModelError(f'n_embd={self.n_embd} does not divide into n_head={self.n_head} heads: change one')
        self.max_positions = self.max_positions or self.block_size
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ModelError(f'n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}: change one')
        if self.head_dim % 2:
            raise ModelError(f'head_dim={self.head_dim} is odd, but rotary embeddings turn pairs: change n_embd')
        self.attention_scale = self.attention_scale or self.head_dim**-0.5
        self.rope_scaling = self.rope_scaling and {'rope_type': 'llama3', **self.rope_scaling}
        self.rotary_dim = self.rotary_dim or self.head_dim
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            what = f'rotary_dim={self.rotary_dim} is odd, or more than head_dim={self.head_dim}'
            raise ModelError(f'{what}: use an even number up to that')


def _size(n_embd, n_inner, n_head, n_layer, vocab_size=32000):
    return dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_inner=n_inner, vocab_size=vocab_size)


# The models of the GaLore and LoQT papers.
SIZES = {
    '9m': _size(128, 352, 4, 4),
    '20m': _size(256, 688, 4, 4),
    '35m': _size(384, 1024, 8, 6),
    '40m': _size(416, 1024, 8, 8),
    '60m': _size(512, 1376, 8, 8),
    '71m': _size(512, 1368, 8, 12),
    '100m': _size(640, 1708, 10, 12, vocab_size=32100),
    '130m': _size(768, 2048, 12, 12),
    '250m': _size(768, 2560, 16, 24),
    '350m': _size(1024, 2736, 16, 24),
    '1b': _size(2048, 5461, 32, 24),
    '3b': _size(2560, 6848, 32, 32),
    '7b': _size(4096, 11008, 32, 32),
    '13b': _size(5120, 13824, 40, 40),
}


class Linear(nn.Linear):
    """y = x W^T + b, or no b. W is cast to the activations' dtype, so that a CPU can store bf16 and compute in fp32."""

    def __init__(self, n_in, n_out, bias=False, **kw):
        super().__init__(n_in, n_out, bias=bias, **kw)

    def reset_parameters(self, generator=None):
        nn.init.normal_(self.weight, std=0.02, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Embedding):
    def __init__(self, n, n_embd, scale=1.0, **kw):
        super().__init__(n, n_embd, **kw)
        self.scale = scale

    def reset_parameters(self, generator=None):
        nn.init.normal_(self.weight, std=0.02, generator=generator)

    def forward(self, tokens):
        x = super().forward(tokens.to(self.weight.device)).to(tokens.device)  # (B, T, D)
        return x if self.scale == 1 else x * self.scale


# ---- what lies between the products: functions of tensors alone, each the attribute of a module under one of these
# names, where compile=True puts the compiled one, the same for all layers (plumbing.build.compile_between). The
# products stay outside, so that a method's own backward, its hooks and its packed weights are as without it.

BETWEEN = 'norm', 'rotated', 'gated'


def rms_norm(x, w, eps):
    return F.rms_norm(x, w.shape, w.to(x.dtype), eps)


def layer_norm(x, w, eps, b):
    return F.layer_norm(x, w.shape, w.to(x.dtype), b.to(x.dtype), eps)


def gated(gate, up):
    return F.silu(gate) * up


class RMSNorm(nn.Module):
    """x / rms(x) * w, over the last dimension. divisor: of what comes out."""

    norm = staticmethod(rms_norm)

    def __init__(self, n, eps, divisor=1.0, **kw):
        super().__init__()
        self.eps, self.divisor = eps, divisor
        self.weight = nn.Parameter(torch.ones(n, **kw))

    def reset_parameters(self, generator=None):
        nn.init.ones_(self.weight)

    def forward(self, x):
        x = self.norm(x, self.weight, self.eps)
        return x if self.divisor == 1 else x / self.divisor


class LayerNorm(RMSNorm):
    """(x - mean(x)) / std(x) * w + b, over the last dimension."""

    norm = staticmethod(layer_norm)

    def __init__(self, n, eps, divisor=1.0, **kw):
        super().__init__(n, eps, divisor, **kw)
        self.bias = nn.Parameter(torch.zeros(n, **kw))

    def reset_parameters(self, generator=None):
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        x = self.norm(x, self.weight, self.eps, self.bias)
        return x if self.divisor == 1 else x / self.divisor


# rope_scaling is {'rope_type': one of these, ...} with these keys; those behind None may be missing.
ROPE = {
    'linear': ('factor',),
    'dynamic': ('factor', 'original_max_position_embeddings'),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
    'yarn': ('factor', 'original_max_position_embeddings', None, 'attention_factor', 'beta_fast', 'beta_slow', 'mscale',
             'mscale_all_dim', 'truncate'),
    'longrope': ('factor', 'original_max_position_embeddings', 'short_factor', 'long_factor', None, 'attention_factor'),
}  # fmt: skip


def rotary_frequencies(config, T=0, device=None):
    """-> radians a position (d/2,) fp32, d being rotary_dim, and a factor on cosines and sines. T: length of the window
    they are for; it counts where that is longer than the model was made for, under 'dynamic' and 'longrope'."""
    d, theta, s = config.rotary_dim, config.rope_theta, config.rope_scaling or {'rope_type': 'default'}
    kind, f, old = s['rope_type'], s.get('factor'), s.get('original_max_position_embeddings')
    if kind == 'dynamic' and old < T:  # all are stretched so that the lowest is divided by f T / old - (f - 1)
        theta *= (f * T / old - (f - 1)) ** (d / (d - 2))
    frequency = theta ** (-torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)  # (d/2,)
    if kind == 'linear':  # 2306.15595
        return frequency / f, 1.0
    if kind == 'llama3':
        # Low frequencies, whose period exceeds the old context, are divided by `factor`; high ones stay; those in
        # between are interpolated.
        turns = old * frequency / (2 * math.pi)  # full turns within the old context
        keep = (turns - s['low_freq_factor']) / (s['high_freq_factor'] - s['low_freq_factor'])
        keep = keep.clamp(0, 1)
        return keep * frequency + (1 - keep) * frequency / f, 1.0
    if kind == 'yarn':  # 2309.00071: much the same, interpolated by numbers of dimensions
        bounds = [  # the dimension that makes so many full turns within the old context
            d * math.log(old / (2 * math.pi * turns)) / (2 * math.log(theta))
            for turns in (s.get('beta_fast') or 32, s.get('beta_slow') or 1)
        ]
        if s.get('truncate', True):  # to whole numbers
            bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
        low, high = max(bounds[0], 0), min(bounds[1], d - 1)
        low_ones = (torch.arange(d // 2, device=device) - low) / (high - low if high != low else 0.001)
        low_ones = low_ones.clamp(0, 1)
        return (1 - low_ones) * frequency + low_ones * frequency / f, yarn_factor(s)
    if kind == 'longrope':  # 2402.13753: a divisor for each frequency, found by a search
        divisors = torch.tensor(s['long_factor' if old < T else 'short_factor'], dtype=torch.float32, device=device)
        usual = math.sqrt(1 + math.log(f) / math.log(old)) if f > 1 else 1.0
        return frequency / divisors, s.get('attention_factor') or usual
    return frequency, 1.0


def yarn_factor(s):
    """The factor on cosines and sines: its square sharpens attention over longer windows (2309.00071, section 3.4)."""

    def factor(mscale):
        return 0.1 * mscale * math.log(s['factor']) + 1 if s['factor'] > 1 else 1.0

    both = s.get('mscale') and s.get('mscale_all_dim')
    return s.get('attention_factor') or (factor(s['mscale']) / factor(s['mscale_all_dim']) if both else factor(1))


def rotary_tables(config, device=None, T=0, at=None):
    """cos and sin of position times frequency, each (T, d/2), fp32 (RoFormer, 2104.09864, section 3.4), for a window of
    T tokens; 0: (block_size, d/2), for all that are no longer than the model was made for. at (...): these positions
    alone, (..., d/2)."""
    frequency, factor = rotary_frequencies(config, T, device)
    if at is None:
        at = torch.arange(T or config.block_size, dtype=torch.float32, device=device)
    angle = at[..., None] * frequency  # (T, d/2)
    cos, sin = angle.cos().float(), angle.sin().float()
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rotate(x, cos, sin):
    """Rotate each pair (x_i, x_{i + d/2}), Hugging Face's half-split layout, by its position's angle.

    x: (B, T, H, d or more); cos, sin: (T, d/2), or (B, T, d/2) if rows have positions of their own."""
    half, rest = cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]  # where only part of a head rotates, the rest passes
    a, b, *rest = x.split([half, half] + [rest] * (rest > 0), dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, *rest], dim=-1)


def rotate_both(q, k, cos, sin):
    return rotate(q, cos, sin), rotate(k, cos, sin)


def paired(cos, sin):
    """cos and sin (..., d/2) as `turn` takes them: (..., 1, d) each."""
    return torch.cat([cos, cos], -1)[..., None, :], torch.cat([-sin, sin], -1)[..., None, :]


def turn(x, cos, sin):
    """`rotate` in three operations, for a token at a time, where what an operation costs is to call it."""
    if (n := cos.shape[-1]) < x.shape[-1]:
        return torch.cat([turn(x[..., :n], cos, sin), x[..., n:]], -1)
    return torch.addcmul(x * cos, x.roll(n // 2, -1), sin)


# ---- packed rows: pieces (P + 1,) int32 = 0, ..., B T, where the pieces of B rows of T tokens end, rows one after
# another. An end may stand there more than once, so that P can be the same in all batches.


def positions_of(pieces, B, T):
    """(B, T) int64: the place of each token in its own piece."""
    at = torch.arange(B * T, device=pieces.device)
    return (at - pieces[torch.searchsorted(pieces, at, right=True) - 1]).view(B, T)


def attend_masked(q, k, v, pieces, scale=None):
    """Causal attention within each piece, by a mask: for whatever has no kernel for it. q (B, T, H, d), k and v
    (B, T, K, d) -> (B, T, H, d)."""
    B, T, H, _ = q.shape
    piece = torch.searchsorted(pieces, torch.arange(B * T, device=q.device), right=True).view(B, 1, T)
    mask = (piece[..., None] == piece[..., None, :]).tril()  # (B, 1, T, T)
    q, k, v = (A.transpose(1, 2) for A in (q, k, v))  # (B, H, T, d)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=k.shape[1] != H).transpose(1, 2)


def slices_of(pieces):
    ends = pieces.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends) if a < b]


# On a CPU piece after piece, with torch's own kernel; forward and backward are an operation each, so that a trace sees
# results whose size does not depend on the pieces, and torch.compile does not look inside.
OPERATIONS = torch.library.Library('nano24', 'FRAGMENT')
OPERATIONS.define('attend(Tensor q, Tensor k, Tensor v, Tensor pieces, float? scale) -> (Tensor, Tensor)')
OPERATIONS.define(
    'attend_backward(Tensor delta, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor pieces, float? scale)'
    ' -> (Tensor, Tensor, Tensor)'
)


def room_for_attention(q, k, v, pieces, scale):
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


def room_for_gradients(delta, q, k, v, y, lse, pieces, scale):
    return tuple(torch.empty_like(A) for A in (q, k, v))


def attend_on_cpu(q, k, v, pieces, scale):
    """q (N, H, d), k and v (N, K, d), pieces (P + 1,) -> y (N, H, d), and the logarithms of softmax's sums (N, H)."""
    y, lse = room_for_attention(q, k, v, pieces, scale)
    for s in slices_of(pieces):
        piece = (A[s].transpose(0, 1)[None] for A in (q, k, v))  # (1, H, t, d), K heads
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*piece, 0.0, True, scale=scale)
        y[s], lse[s] = out[0].transpose(0, 1), sums[0].T
    return y, lse


def attend_backward_on_cpu(delta, q, k, v, y, lse, pieces, scale):
    """The gradients of q, k and v, given y's."""
    gradients = room_for_gradients(delta, q, k, v, y, lse, pieces, scale)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for s in slices_of(pieces):
        piece = (A[s].transpose(0, 1)[None] for A in (delta, q, k, v, y))
        for G, g in zip(gradients, backward(*piece, lse[s].T[None], 0.0, True, scale=scale)):
            G[s] = g[0].transpose(0, 1)
    return gradients


for name, on_cpu, room in (
    ('attend', attend_on_cpu, room_for_attention),
    ('attend_backward', attend_backward_on_cpu, room_for_gradients),
):
    OPERATIONS.impl(name, on_cpu, 'CPU')
    torch.library.register_fake(f'nano24::{name}', room)


class PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pieces, scale):
        y, lse = torch.ops.nano24.attend(q, k, v, pieces, scale)
        ctx.save_for_backward(q, k, v, y, lse, pieces)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, delta):
        return *torch.ops.nano24.attend_backward(delta, *ctx.saved_tensors, ctx.scale), None, None


def flash_takes(q):
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0


def attend_packed(q, k, v, pieces, scale=None):
    """`attend_masked` by the fastest way that this device and dtype have."""
    T, flat = q.shape[1], [A.flatten(0, 1) for A in (q, k, v)]  # (B T, H, d), K heads
    if q.device.type == 'cpu':
        return PackedAttention.apply(*flat, pieces, scale).view(q.shape)
    if q.device.type == 'cuda' and flash_takes(q) and torch.cuda.get_device_capability(q.device) >= (8, 0):
        from torch.nn.attention.varlen import varlen_attn  # flash attention; imports torch's compiler, so late

        fewer = {} if torch.__version__ < '2.12' else {'enable_gqa': True}  # torch 2.11 allows fewer heads unasked
        return varlen_attn(*flat, pieces, pieces, T, T, scale=scale, window_size=(-1, 0), **fewer).view(q.shape)
    return attend_masked(q, k, v, pieces, scale)


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


class Attention(nn.Module):
    rotated = staticmethod(rotate_both)

    def __init__(self, c, linear, rotates=True, **kw):
        super().__init__()
        self.d, self.scale, self.rotates, self.qk_norm = c.head_dim, c.attention_scale, rotates, c.qk_norm
        self.q_proj = linear(c.n_embd, c.n_head * c.head_dim, bias=c.qkv_bias, **kw)
        self.k_proj = linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias, **kw)
        self.v_proj = linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias, **kw)
        self.o_proj = linear(c.n_head * c.head_dim, c.n_embd, bias=c.o_bias, **kw)
        if c.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.norm_eps, **kw) for _ in range(2))

    def project(self, x):
        """x (B, T, D) -> q (B, T, H, d), k and v (B, T, K, d)."""
        return [f(x).view(*x.shape[:2], -1, self.d) for f in (self.q_proj, self.k_proj, self.v_proj)]

    def forward(self, x, cos, sin, cache=None, i=0, pieces=None):
        B, T, _ = x.shape
        q, k, v = self.project(x)  # (B, T, H, d), K heads
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates:
            q, k = self.rotated(q, k, cos, sin) if cache is None else (turn(q, cos, sin), turn(k, cos, sin))
        if pieces is not None:
            y = attend_packed(q, k, v, pieces, self.scale)  # (B, T, H, d)
            return self.o_proj(y.reshape(B, T, -1))  # (B, T, D)
        if cache is not None:
            return self.o_proj(self.attend_cached(q, *cache.extend(i, k, v)))  # (B, T, D)
        # Transposed last: q stays in memory by token, cuDNN lays out y as q, and o_proj's input is no second copy of y.
        q, k, v = (A.transpose(1, 2) for A in (q, k, v))  # (B, H, T, d), K heads
        y = attend(q, k, v, self.scale, causal=T > 1)  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def attend_cached(self, q, k, v, mask):
        """q (B, T, H, d); k, v (B, K, keys, d); mask as of KVCache -> (B, T, H d)."""
        B, T, _, d = q.shape
        if T > 1:
            y = attend(q.transpose(1, 2), k, v, self.scale, mask, causal=mask is None)  # (B, H, T, d)
            return y.transpose(1, 2).reshape(B, T, -1)
        # The heads that share a key head are so many queries of it: a CPU takes a fifth of the time in bf16.
        y = attend(q.view(B, k.shape[1], -1, d), k, v, self.scale, mask)  # (B, K, H / K, d)
        return y.view(B, 1, -1)


def attend(q, k, v, scale, mask=None, causal=False):
    """torch's attention. enable_gqa lets several query heads share a key head (H > K). Some kernels refuse it, so only
    where needed."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )  # fmt: skip


class MLP(nn.Module):
    gated = staticmethod(gated)

    def __init__(self, c, linear, **kw):
        super().__init__()
        self.gate_proj = linear(c.n_embd, c.n_inner, bias=c.mlp_bias, **kw)
        self.up_proj = linear(c.n_embd, c.n_inner, bias=c.mlp_bias, **kw)
        self.down_proj = linear(c.n_inner, c.n_embd, bias=c.mlp_bias, **kw)

    def inner(self, x):
        return self.gated(self.gate_proj(x), self.up_proj(x))  # (B, T, n_inner)

    def forward(self, x):
        return self.down_proj(self.inner(x))  # (B, T, D)


class Block(nn.Module):
    def __init__(self, c, linear, rotates=True, **kw):
        super().__init__()
        Norm = LayerNorm if c.layer_norm else RMSNorm
        self.scale, self.chunk, self.again = c.residual_scale, 0, False
        self.input_layernorm = Norm(c.n_embd, c.norm_eps, **kw)
        self.self_attn = Attention(c, linear, rotates, **kw)
        self.post_attention_layernorm = Norm(c.n_embd, c.norm_eps, **kw)
        self.mlp = MLP(c, linear, **kw)

    def forward(self, x, cos, sin, cache=None, i=0, pieces=None):
        x = self.add(x, self.self_attn(self.input_layernorm(x), cos, sin, cache, i, pieces))
        rows = x.flatten(0, -2)  # (B T, D)
        if not self.chunk or len(rows) <= self.chunk:
            return self.feed_forward(x)
        # Each part is computed again in its own backward, so that what is n_inner wide exists for one part alone. When
        # a block is computed again for what attention keeps, nobody asks for the parts: they are passed over.
        f, how = (torch.Tensor.detach if self.again else self.feed_forward), dict(use_reentrant=False)
        parts = [checkpoint(f, part, **how, preserve_rng_state=False) for part in rows.split(self.chunk)]
        return torch.cat(parts).view(x.shape)

    def feed_forward(self, x):
        return self.add(x, self.mlp(self.post_attention_layernorm(x)))  # (..., D)

    def add(self, x, branch):
        return x + branch if self.scale == 1 else x + self.scale * branch


def arithmetic(device, dtype):
    """The dtype to compute in. A CPU without bf16 instructions multiplies bf16 hundreds of times slower than fp32."""
    if torch.device(device).type == 'cpu' and dtype == torch.bfloat16:
        # Both names are x86's. Where torch reports neither, fp32 is correct, if not the fastest.
        cpu = torch.cpu.get_capabilities()
        return dtype if cpu.get('amx_bf16') or cpu.get('avx512_bf16') else torch.float32
    return dtype


@functools.cache
def side_stream(device):
    """Where copies from and to main memory run beside the arithmetic; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == 'cuda' else None


class Waiting:
    """The input x of a block under checkpointing, which waits in main memory from the block's forward to its backward.

    home: the device that is main memory. before: the Waiting of the block before, or None. x leaves while its block is
    computed, and comes back while the block after it is computed again. The copies run in a stream of their own; no
    memory of x is given up before they are done, since the arithmetic, which may take it next, waits for them."""

    def __init__(self, x, home, before=None):
        self.x, self.back, self.before = x, None, before
        self.device, self.needs_grad, self.side = x.device, x.requires_grad, side_stream(x.device)
        self.kept = torch.empty_like(x, device=home, pin_memory=x.is_cuda, requires_grad=False)
        self.copied = self.copy(self.kept, x.detach())

    def copy(self, to, x):
        """Copy x into `to`. -> what the arithmetic waits for, or None where there is no stream beside it."""
        if self.side is None:
            to.copy_(x)
            return None
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            to.copy_(x, non_blocking=True)
        return self.side.record_event()

    def wait(self):
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)

    def leave(self):
        """The block's forward is done: x is in main memory alone."""
        if self.x is not None:
            self.wait()
            self.x = None

    def fetch(self):
        if self.back is None:
            self.back = torch.empty_like(self.kept, device=self.device)
            self.copied = self.copy(self.back, self.kept)

    def run(self, block, *rest, **named):
        """What checkpointing computes, and computes again."""
        if (x := self.x) is None:
            self.fetch()
            self.wait()
            x, self.back = self.back.requires_grad_(self.needs_grad), None
            if self.before is not None:
                self.before.fetch()
            block.again = True
        try:
            return block(x, *rest, **named)
        finally:
            block.again = False


class LLaMA(nn.Module):
    """The model. `device` and `dtype` apply to the weights. Built under `torch.device('meta')` it allocates nothing
    until `materialise`, which creates the weights module by module, so that a 7B needs no more than its own 13 GB.

    linear: the class of the blocks' linear layers, called like Linear. A method that packs its weights passes its own,
    which returns the dense W (out, in) from `dense_weight()` and takes one with `set_weight(W)`; `bias` is as it is."""

    def __init__(self, config, device=None, dtype=None, linear=Linear):
        super().__init__()
        kw = dict(device=device, dtype=dtype)
        self.config = config
        self.checkpointing = False  # True: keep only each block's input and recompute the block in backward
        self.home = None  # a device: under checkpointing those inputs wait there
        self.compute_dtype = None  # None: `arithmetic` chooses
        self.embed_tokens = Embedding(config.vocab_size, config.n_embd, config.embedding_scale, **kw)
        blocks = (Block(config, linear, i not in config.no_rope, **kw) for i in range(config.n_layer))
        self.layers = nn.ModuleList(blocks)
        Norm = LayerNorm if config.layer_norm else RMSNorm
        self.norm = Norm(config.n_embd, config.norm_eps, config.logit_divisor, **kw)  # so that the head divides, too
        if not config.tie_embeddings:
            self.lm_head = Linear(config.n_embd, config.vocab_size, **kw)
        self.set_block_size(config.block_size, device)

    def set_block_size(self, block_size, device=None):
        """Change the longest window. Only the rotary tables depend on it."""
        self.config.block_size = block_size
        cos, sin = rotary_tables(self.config, device)
        self.register_buffer('cos', cos, persistent=False)
        self.register_buffer('sin', sin, persistent=False)

    def set_chunk(self, chunk):
        """Let the blocks' MLPs take so many tokens at a time, forward and backward; 0: all."""
        for layer in self.layers:
            layer.chunk = chunk

    def rotary(self, T, packed=False):
        """cos and sin (T or more, d/2) of a window of T tokens. Under 'dynamic' and 'longrope' a window that is longer
        than the model was made for has its own; a cache's older keys keep the rotation that they have."""
        s = self.config.rope_scaling or {}
        kind, old = s.get('rope_type'), s.get('original_max_position_embeddings')
        if kind not in ('dynamic', 'longrope') or old >= T:
            return self.cos, self.sin
        if packed:  # its pieces may be short ones, which rotate otherwise
            raise ModelError(f'under {kind} no window of over {old} tokens is packed: use a smaller block_size')
        return rotary_tables(self.config, self.cos.device, T)

    @property
    def head_begins(self):
        return self.norm

    @property
    def head(self):
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight  # (V, D)

    def materialise(self, device='cpu', seed=0):
        """Allocate and initialise a model built on the meta device, module by module. Same seed, same weights."""
        generator = torch.Generator(device).manual_seed(seed)
        for module in tqdm(list(self.modules()), 'making weights', delay=3, leave=False, disable=None):
            if module is not self:
                module.to_empty(device=device, recurse=False)
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters(generator)
        self.set_block_size(self.config.block_size, device)
        return self

    @property
    def head_bias(self):
        return None  # (V,) in some of transformers' models

    def head_modules(self):
        """{name: module} of what a task adds to the model; of a classifier, in transformers' models, its head."""
        return {}

    def at_step(self, step):
        """The next forward is the first of this step. Nothing here depends on it."""

    def new_cache(self, **kw):
        from plumbing.cache import KVCache  # imports this file

        return KVCache(self.config, device=self.head.device, dtype=self.activation_dtype, **kw)

    @property
    def activation_dtype(self):
        return self.compute_dtype or arithmetic(self.head.device, self.head.dtype)

    def n_params(self, embeddings=True):
        """Number of parameters. embeddings=False, for FLOP counts: without the embedding table, but with the head."""
        n = sum(math.prod(shape) for _, shape, _ in self.dense_weights())
        return n if embeddings or self.config.tie_embeddings else n - self.embed_tokens.weight.numel()

    def dense_weights(self):
        """Yield (name, shape, function that returns the dense tensor) for each weight of a plain LLaMA."""
        for prefix, module in self.named_modules():
            if hasattr(module, 'dense_weight'):  # packed, or with low-rank factors
                yield prefix + '.weight', (module.out_features, module.in_features), module.dense_weight
                if module.bias is not None:
                    yield prefix + '.bias', tuple(module.bias.shape), module.bias.detach
            else:
                for name, p in module.named_parameters(prefix, recurse=False):
                    yield name, tuple(p.shape), p.detach

    def flops_per_token(self, T):
        """FLOPs per token, forward and backward: 6 per weight, 12 D T per layer for attention (PaLM, 2204.02311)."""
        c = self.config
        return 6 * self.n_params(embeddings=False) + 12 * c.n_layer * c.n_head * c.head_dim * T

    def embed(self, tokens, cache=None, pieces=None):
        """tokens (B, T), which follow those in `cache` -> the blocks' inputs: x (B, T, D), cos and sin (T, d/2), or
        (B, T, d/2) if each piece of a packed row has positions of its own. With a cache they are as `turn` takes them,
        (T, 1, d), or (B, T, 1, d) if its rows differ in length."""
        T, dtype = tokens.shape[1], self.activation_dtype
        end, window = T + (cache.length if cache is not None else 0), self.config.block_size
        if end > window and (cache is None or T > 1):
            raise ModelError(f'{end} tokens do not fit the window of {window}: raise block_size')
        x = self.embed_tokens(tokens).to(dtype)
        if cache is None:
            at = slice(T) if pieces is None else positions_of(pieces, *tokens.shape)
            cos, sin = self.rotary(end, pieces is not None)
            return x, cos[at].to(dtype), sin[at].to(dtype)
        at, (cos, sin) = cache.begin(T), self.rotary(min(end, window))
        if end > window:  # it slides: positions go on where the tables end
            if isinstance(at, slice):
                at = torch.tensor([[at.start]], device=tokens.device)  # (1, 1)
            cos, sin = rotary_tables(self.config, cos.device, window, at.double())  # (B, T, d/2)
            return x, *(A.to(dtype) for A in paired(cos, sin))
        return x, *(A.to(dtype) for A in paired(cos[at], sin[at]))

    def hidden(self, tokens, cache=None, pieces=None):
        """tokens (B, T) -> what the head reads, (B, T, D)."""
        x, cos, sin = self.embed(tokens, cache, pieces)
        waiting = None
        for i, layer in enumerate(self.layers):
            if not (self.checkpointing and torch.is_grad_enabled()):
                x = layer(x, cos, sin, cache, i, pieces)
                continue
            if self.home is not None:
                waiting = Waiting(x, self.home, waiting)
            # LoRA's dropout, the only random operation in a block, has its own seed: no generator state to save
            first = (layer, x) if waiting is None else (waiting.run, layer)
            x = checkpoint(*first, cos, sin, None, i, pieces, use_reentrant=False, preserve_rng_state=False)
            del first
            if waiting is not None:
                waiting.leave()
        return self.norm(x)

    def before_last(self, tokens, blocks=None):
        """tokens (B, T) -> what the last of the first `blocks` (all) reads: x (B, T, D), and the rest, for `last`."""
        x, *rest = self.embed(tokens)
        for layer in self.layers[: (blocks or len(self.layers)) - 1]:
            x = layer(x, *rest)
        return x, rest

    def last(self, x, rest, blocks=None):
        """-> what the head reads, (B, T, D), as if there were no more blocks than these."""
        return self.norm(self.layers[(blocks or len(self.layers)) - 1](x, *rest))

    def shrink_tables(self, head_bits=16, home=None):
        """Keep a frozen head in 8 bits, and a frozen embedding on the device `home`, main memory, where its rows are
        looked up; done again it does nothing. Raises ModelError for one table that is both."""
        if self.config.tie_embeddings and (head_bits == 8 or home is not None):
            raise ModelError(
                'head_bits=8 and offload_embedding need two tables, and this model has one: leave them out'
            )
        if head_bits == 8 and not isinstance(self.lm_head, Int8Head):
            self.lm_head = Int8Head(self.lm_head.weight)
        if home is not None:
            self.embed_tokens.reads_on, W = home, self.embed_tokens.weight
            if W.device != home and not W.is_meta:
                self.embed_tokens.weight = nn.Parameter(W.detach().to(home), requires_grad=False)

    def logits(self, x):
        W = self.head.to(x.dtype)
        if isinstance(W, Int8Matrix) and not x.requires_grad:
            return W.logits(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], len(W))  # (..., V)
        return F.linear(x, W.dense() if isinstance(W, Int8Matrix) else W)  # (..., V)

    def forward(self, tokens, targets=None, cache=None, weights=None, divisor=None, pieces=None, trained=None):
        """tokens (B, T) -> logits (B, T, V); with targets (B, T) -> the loss: its sum over targets that are not -100 by
        `divisor` (a number or a 0-dim tensor), or, without one, the mean over them.

        weights (B,) or (B, T), if given, multiply the loss of each row or token. pieces (P + 1,) int32: the rows are
        packed, and no piece sees another (`positions_of`). trained (n,) int64: where in the flat targets (B T) those
        stand that are not -100: the others need no logits."""
        x = self.hidden(tokens, cache, pieces)
        if targets is None:
            return self.logits(x)
        if weights is not None:
            weights = weights.float().view(len(tokens), -1).expand(tokens.shape).reshape(-1)  # (B T,)
        x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)  # (B T, D), (B T,)
        return HeadLoss.apply(x, self.head, targets, torch.is_grad_enabled(), weights, divisor, trained)

    # ---- Hugging Face folders: plumbing/hf.py, imported late because it imports this file ----

    @classmethod
    def from_pretrained(cls, folder, *options, **more):
        from plumbing import hf

        return hf.load(folder, *options, **more)

    def save_pretrained(self, folder, *options, **more):
        from plumbing import hf

        hf.save(self, folder, *options, **more)
