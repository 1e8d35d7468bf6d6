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
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from attention import attend_packed, paired, positions_of, rotary_tables, rotate_both, turn
from head import HeadLoss, Int8Head, Int8Matrix


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
    return F.silu(gate) * up if torch.compiler.is_compiling() else Gated.apply(gate, up)


class Gated(torch.autograd.Function):
    """silu(gate) * up, of which the two alone are kept: autograd would keep silu(gate), too, as wide as they are."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, delta):
        gate, up = ctx.saved_tensors
        d = delta * up
        torch.ops.aten.silu_backward.grad_input(d, gate, grad_input=d)  # in place
        return d, F.silu(gate).mul_(delta)


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
            for module in layer.mlp.modules():
                module.in_parts = chunk > 0

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
