"""
What attention needs beside its products: where a token stands (rotary embeddings), which others it sees (packed rows).

    cos, sin = rotary_tables(config)                      # (block_size, d/2) each
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)       # (B, T, H, d)
    y = attend_packed(q, k, v, pieces)                    # no piece of a row sees another

Letters are model.py's: B batch, T tokens in a window, H heads, K key/value heads, d head_dim, P pieces.
"""

import itertools
import math

import torch
import torch.nn.functional as F


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
