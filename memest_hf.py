"""
The peak memory of fine-tuning any Hugging Face model on one GPU, known without a GPU: its own code on fake tensors.

    python memest_hf.py --hf=path/to/folder                                # plain fine-tuning, bf16, AdamW
    python memest_hf.py --hf=config.json --method=qlora --batch=1 --seq=1024 --optimizer=paged_adamw8bit
    plan = trace_hf('config.json', method='lora', seq=2048, checkpointing=True)

transformers builds the model and runs two training steps of it, LoRA and NF4 layers stand in its linear layers as peft
and bitsandbytes would put them, and every storage that appears takes its block from a simulated allocator. What CUDA
does otherwise than a CPU is told here by hand: attention's kernels, dropout's masks, cuBLAS' workspaces. Neither
peft, bitsandbytes nor weights are needed; a 7B takes about 10 seconds. Not known to it: several GPUs, torch.compile,
packages that put kernels of their own in (Liger, Unsloth), padding masks, a card so full that the allocator gives
cached segments back.
"""

import contextlib
import inspect
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from memest import MB, Allocator, LiveBytes

aten = torch.ops.aten
# One for each pair of cuBLAS handle and stream, and backward runs in a thread with a handle of its own: 2 x 4096 KiB +
# 8 x 16 KiB (ATen/cuda/CUDABlas.cpp, getChosenWorkspaceSize, ':4096:2:16:8'); on Hopper and later 32 MiB.
WORKSPACE, WORKSPACE_HOPPER = 8_519_680, 32 * MB
# What a product with a bias gives cuBLASLt while it runs (CUDABlas.cpp, _getWorkspaceSize: 1024 KiB).
WORKSPACE_LT = MB
# CUDA's context, code and handles of libraries, which the allocator never sees: 300 to 500 MB on cards since 2018.
CONTEXT = 500 * MB

# What a plan is raised by before it is held against a card (results/memest_points.md): for a block that fits no gap;
# and where lengths vary, for blocks cached for shorter batches than the longest.
MARGIN, MARGIN_VARYING = 0.05, 0.20

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
METHODS, ATTENTION = ('full', 'lora', 'qlora'), ('sdpa', 'noflash', 'flash', 'eager')
# On CUDA torch's own optimizers take the foreach path where none is chosen (torch/optim/optimizer.py,
# _default_to_fused_or_foreach), with a copy of all second moments at once.
TORCH_OPTIMIZERS = {
    'adamw': (torch.optim.AdamW, dict(foreach=True)),
    'adamw_foreach': (torch.optim.AdamW, dict(foreach=True)),
    'adamw_loop': (torch.optim.AdamW, dict(foreach=False)),
    'adamw_fused': (torch.optim.AdamW, dict(fused=True)),
    'adam': (torch.optim.Adam, dict(foreach=True)),
    'sgd': (torch.optim.SGD, dict(foreach=True)),
    'sgd_momentum': (torch.optim.SGD, dict(foreach=True, momentum=0.9)),
    'rmsprop': (torch.optim.RMSprop, dict(foreach=True)),
    'adagrad': (torch.optim.Adagrad, dict(foreach=True)),
}
BNB_OPTIMIZERS = ('adamw8bit', 'paged_adamw8bit', 'paged_adamw32bit')
OPTIMIZERS = (*TORCH_OPTIMIZERS, *BNB_OPTIMIZERS, 'lomo')


@dataclass
class HFPlan:
    """Bytes. `allocated` and `reserved` are what torch.cuda.max_memory_allocated and max_memory_reserved would say,
    `total` what nvidia-smi would: reserved, CUDA's context, and optimizer states in unified memory (`paged`).

    weights: with LoRA's factors; states: the optimizer's on the card; workspaces: cuBLAS'; phase, operation: where
    `allocated` is first reached."""

    weights: int = 0
    states: int = 0
    workspaces: int = 0
    allocated: int = 0
    reserved: int = 0
    paged: int = 0
    context: int = CONTEXT
    live: int = 0  # the peak of the storages' bytes, neither rounded nor with workspaces
    parameters: int = 0
    trained: int = 0
    phase: str = ''
    operation: str = ''

    @property
    def total(self):
        return self.reserved + self.paged + self.context


class Recorder(LiveBytes):
    """LiveBytes that knows the phase, and what CUDA's kernels take beside their results."""

    def __init__(self, cuda, workspace=WORKSPACE):
        super().__init__(Allocator())
        self.cuda, self.workspace, self.workspaces = cuda, workspace, {}
        self.phase, self.running, self.most, self.where = 'load', '', 0, ('', '')

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
        if storage.nbytes() and storage not in self.seen:  # CUDA gives nothing for nothing
            super().add(storage, tensor, function)
            self.note()

    def note(self):
        if self.allocator.allocated > self.most:
            self.most, self.where = self.allocator.allocated, (self.phase, self.running)


def hidden(function, args, out):
    """The bytes that CUDA's kernel of an operation takes while it runs, beside what it returns."""
    if function is aten.addmm.default and args[0].ndim == 1:
        return [WORKSPACE_LT]
    if function is aten.embedding_dense_backward.default and args[1].numel() > 3072:  # sorts (cuda/Embedding.cu)
        return [args[1].nbytes] * 4
    return []


class FusedAttention(torch.autograd.Function):
    """The tensors of CUDA's flash and memory-efficient attention, forward and backward; it computes nothing.

    Flash (flash_attn/flash_api.cpp): out, logsumexp; backward with dq in fp32, and dk, dv for every head of q.
    Memory-efficient (attention.cu): the same without copies for heads, dq in fp32 only where it is not."""

    @staticmethod
    def forward(ctx, q, k, v, flash):
        B, H, T, D = q.shape
        out = q.new_empty(B, T, H, D).transpose(1, 2)  # (B, H, T, D), in memory by token
        lse = q.new_empty(B, H, T if flash else -(-T // 32) * 32, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.flash = flash
        return out

    @staticmethod
    def backward(ctx, delta):
        q, k, v, _, _ = ctx.saved_tensors
        B, H, T, D = q.shape
        dq, dk, dv = (x.new_empty(B, T, x.shape[1], D).transpose(1, 2) for x in (q, k, v))
        rounded = -(-T // 128) * 128 if ctx.flash else T
        row = q.new_empty(B, H, rounded, dtype=torch.float32)  # sum of out * delta in each row
        inner = [row]
        if ctx.flash or q.dtype != torch.float32:
            inner.append(q.new_empty(B, rounded, H, -(-D // 32) * 32, dtype=torch.float32))
        if ctx.flash and k.shape[1] != H:
            inner += [q.new_empty(B, T, H, D) for _ in range(2)]
        return dq, dk, dv, None


class SafeSoftmax(torch.autograd.Function):
    """aten's _safe_softmax in the steps that it takes inside, seen in torch.profiler's memory events: softmax, one byte
    a score for those of -inf, one a row, and zeros put into rows of -inf alone in place."""

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

    q (B, H, T, D); k, v (B, H or fewer, T, D); where they are fewer they are repeated. 16 bits are computed in 32."""
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
    """F.scaled_dot_product_attention as CUDA chooses (ATen/native/transformers/cuda/sdp_utils.cpp): flash for 16 bits
    without a mask, where it is built in; else memory-efficient, which cannot repeat heads; else step by step."""
    if torch.is_autocast_enabled('cpu'):
        q, k, v = (x.to(torch.get_autocast_dtype('cpu')) for x in (q, k, v))
    if flash and attn_mask is None and q.dtype != torch.float32 and q.shape[-1] <= 256:
        return FusedAttention.apply(q, k, v, True)
    if not (enable_gqa and q.shape[1] != k.shape[1]):
        return FusedAttention.apply(q, k, v, False)
    return math_attention(q, k, v, attn_mask, dropout_p, is_causal, scale)


def cuda_dropout(x, p=0.5, training=True, inplace=False):
    """CUDA's dropout keeps a mask of one byte, a CPU's one of x's dtype."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


class NF4Product(torch.autograd.Function):
    """x @ W.T with the packed W decoded in forward and again in backward (bitsandbytes/autograd/_functions.py,
    MatMul4Bit); of x nothing is kept."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.decode(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx, delta):
        return delta @ ctx.layer.decode(delta.dtype), None  # (..., in)


class NF4Linear(nn.Module):
    """The memory of bitsandbytes' Linear4bit: two weights a byte, a scale for 64 of them; the numbers mean nothing.

    linear: the layer it replaces, weight (out, in). dtype: of the products. double_quant: scales in 8 bits, with a
    scale in fp32 for 256 of those, an offset, and a table of 256 of its own (bitsandbytes' quantize_4bit)."""

    def __init__(self, linear, dtype=torch.bfloat16, double_quant=True):
        super().__init__()
        W = linear.weight
        self.out_features, self.in_features = W.shape if isinstance(linear, nn.Linear) else W.shape[::-1]
        self.weight_dtype, self.dtype, self.bias, self.double_quant = W.dtype, dtype, linear.bias, double_quant
        new, blocks = W.new_empty, -(-W.numel() // 64)
        packed = new(-(-W.numel() // 2), 1, dtype=torch.uint8)
        scale = new(blocks, dtype=torch.float32)
        self.parts = [packed, new(16, dtype=torch.float32)]  # with the table of NF4's 16 numbers
        if double_quant:
            # alive as in the original
            offset, centred = new(1, dtype=torch.float32), torch.empty_like(scale)  # noqa: F841
            self.parts += [new(blocks, dtype=torch.uint8), new(-(-blocks // 256), dtype=torch.float32), offset]
            self.parts.append(new(256, dtype=torch.float32))
        else:
            self.parts.append(scale)

    def decode(self, dtype):
        """The weight (out, in); with double_quant its scales are decoded first."""
        scale = self.parts[2]
        if self.double_quant:
            scale = torch.empty(scale.shape, dtype=torch.float32, device=scale.device)
        W = scale.new_empty(self.out_features, self.in_features, dtype=self.weight_dtype)
        return W.to(dtype)

    def forward(self, x):
        return NF4Product.apply(x.to(self.dtype), self).to(x.dtype)


class LoRA(nn.Module):
    """base(x) + scale * B A x as peft computes it (tuners/lora/layer.py and bnb.py): x in the factors' dtype, the sum
    back in the base's. Frozen base: nn.Linear, Conv1D (weight in x out) or NF4Linear."""

    def __init__(self, base, rank, dropout, dtype):
        super().__init__()
        self.base, self.dropout, self.dtype = base, dropout, dtype
        if hasattr(base, 'out_features'):
            n_in, n_out = base.in_features, base.out_features
        else:
            n_in, n_out = base.weight.shape
        self.A = nn.Linear(n_in, rank, bias=False, dtype=dtype)
        self.B = nn.Linear(rank, n_out, bias=False, dtype=dtype)

    def forward(self, x):
        y = self.base(x)
        if isinstance(self.base, NF4Linear):
            y = y.clone()
            if not torch.is_autocast_enabled('cpu'):
                x = x.to(self.dtype)
            low = self.B(self.A(F.dropout(x, self.dropout, self.training))) * 2.0
            return y + (low if torch.is_autocast_enabled('cpu') else low.to(y.dtype))
        x = x.to(self.dtype)
        return (y + self.B(self.A(F.dropout(x, self.dropout, self.training))) * 2.0).to(y.dtype)


class CudaAutocast(torch.overrides.TorchFunctionMode):
    """What CUDA's autocast computes in fp32 and a CPU's does not (ATen/autocast_mode.h)."""

    IN_FP32 = ('layer_norm', 'group_norm', 'softmax', 'log_softmax', 'pow', '__pow__', 'rsqrt', 'exp', 'log', 'sum')

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, '__name__', '') in self.IN_FP32 and torch.is_autocast_enabled('cpu'):
            half = (torch.bfloat16, torch.float16)
            args = [a.float() if isinstance(a, torch.Tensor) and a.dtype in half else a for a in args]
        return function(*args, **(kwargs or {}))


class BnbStates:
    """The states of bitsandbytes' AdamW, made in its first step as bitsandbytes/optim/optimizer.py makes them.

    Below 4,096 numbers they are fp32. Paged ones of at least 1e5 numbers lie in unified memory: torch does not count
    them, the card holds them while they are updated."""

    def __init__(self, params, bits, paged):
        self.params, self.bits, self.paged, self.state, self.unified = params, bits, paged, {}, 0

    def step(self):
        for p in self.params:
            if p.grad is None or p in self.state:
                continue
            few = self.bits == 32 or p.numel() < 4096
            dtype = torch.float32 if few else torch.uint8
            made = []
            for _ in range(2):
                if self.paged and p.numel() >= 1e5:
                    self.unified += p.numel() * dtype.itemsize
                else:
                    made.append(torch.zeros_like(p, dtype=dtype))
                if not few:
                    made.append(p.new_zeros(-(-p.numel() // 256), dtype=torch.float32))
            self.state[p] = {str(i): t for i, t in enumerate(made)}

    def zero_grad(self):
        for p in self.params:
            p.grad = None


class Lomo(BnbStates):
    """LOMO (2306.09782): each gradient changes its weight in backward, both copied to fp32, and is dropped."""

    def __init__(self, params):
        super().__init__(params, 32, False)
        for p in params:
            p.register_post_accumulate_grad_hook(self.update)

    @staticmethod
    @torch.no_grad()
    def update(p):
        p.copy_(p.float().add_(p.grad.float(), alpha=-1e-3))
        p.grad = None

    def step(self):
        pass


def read_config(path):
    """The transformers config in a folder or a config.json; ValueError in one sentence where there is none."""
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ValueError('--hf builds the model with transformers: pip install transformers') from None
    file = os.path.join(path, 'config.json') if os.path.isdir(path) else path
    if not os.path.exists(file):
        raise ValueError(f'{file} does not exist: give --hf a folder with a config.json, or such a file')
    try:
        with open(file) as f:
            given = json.load(f)
        return AutoConfig.for_model(**given)
    except Exception as e:
        reason = str(e).split('\n')[0][:200]
        raise ValueError(f'{file} is not a config that this transformers knows: {reason}') from None


ALIASES = {'adamw_torch': 'adamw', 'adamw_torch_fused': 'adamw_fused', 'adamw_bnb_8bit': 'adamw8bit'}
ALIASES |= {'adamw_8bit': 'adamw8bit', 'paged_adamw_8bit': 'paged_adamw8bit', 'paged_adamw_32bit': 'paged_adamw32bit'}
TARGETS = {'attention': ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'out_proj', 'c_attn', 'query_key_value', 'qkv_proj')}


def trace_hf(config, method='full', batch=1, seq=512, dtype='bf16', optimizer='adamw', checkpointing=False,
             attention='sdpa', autocast='', lora_rank=16, lora_targets='attention', lora_dropout=0.0, lora_dtype='fp32',
             double_quant=True, kbit_fp32=True, loss='transformers5', warmup=True, keep_outputs=True, reentrant=True,
             hopper=False, cuda=True, context=CONTEXT, steps=3):  # fmt: skip
    """The HFPlan of a few steps on `batch` rows of `seq` tokens; ValueError, in one sentence, for what cannot be.

    config: a folder with a config.json, such a file, or a transformers config. method: 'full', 'lora' or 'qlora'.
    dtype: of the weights; where NF4 takes their place, of its products. optimizer: one of OPTIMIZERS; 'adamw' is
    torch's default on CUDA, foreach. attention: 'sdpa'; 'noflash', SDPA of a torch built without flash (wheels
    for Windows); 'flash', the package flash-attn, 16 bits only; 'eager'. autocast: '', 'bf16' or 'fp16', as in
    Trainer(bf16=True).
    lora_targets: 'attention', 'all' linear layers but the head, or the last parts of names with commas between.
    lora_dtype: peft makes the factors fp32 over 16-bit weights. kbit_fp32: peft's prepare_model_for_kbit_training,
    which puts norms, embeddings and head in fp32. loss: 'transformers5', or 'shifted', as before 4.50, with a copy of
    the logits. warmup: transformers 5 takes the room for all weights in one piece before it loads them
    (caching_allocator_warmup), where NF4 is loaded. keep_outputs: a step's logits live until the next step's are made,
    as in a loop of one's own; Trainer drops them. reentrant: the kind of checkpoints. cuda=False: this CPU's kernels,
    no workspaces. steps: reserved bytes can still grow in the second and third."""
    optimizer = ALIASES.get(optimizer, optimizer)
    for name, value, known in (
        ('method', method, METHODS),
        ('dtype', dtype, DTYPES),
        ('lora_dtype', lora_dtype, DTYPES),
        ('autocast', autocast, ('', 'bf16', 'fp16')),
        ('optimizer', optimizer, OPTIMIZERS),
        ('attention', attention, ATTENTION),
        ('loss', loss, ('transformers5', 'shifted')),
    ):
        if value not in known:
            raise ValueError(f'{name}={value!r} is unknown: use {", ".join(repr(k) for k in known)}')
    for name, value in (('batch', batch), ('seq', seq), ('lora_rank', lora_rank), ('steps', steps)):
        if value < 1:
            raise ValueError(f'{name}={value} cannot be: use at least 1')
    if attention == 'flash' and 'fp32' in (autocast or dtype,):
        raise ValueError("attention='flash' takes 16 bits: use dtype='bf16', or attention='sdpa'")
    config = read_config(config) if isinstance(config, (str, os.PathLike)) else config
    recorder = Recorder(cuda, WORKSPACE_HOPPER if hopper else WORKSPACE)
    half = DTYPES[dtype]
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # transformers looks into the positions for packed sequences, and takes fake ones for such: with a mask
        stack.enter_context(
            patch('transformers.masking_utils.find_packed_sequence_indices', lambda _: None, create=True)
        )
        model = build(config, half, attention)
        if cuda:
            kernels = partial(cuda_attention, flash=attention != 'noflash')
            stack.enter_context(patch.object(F, 'scaled_dot_product_attention', kernels))
            stack.enter_context(patch.object(F, 'dropout', cuda_dropout))
            stack.enter_context(CudaAutocast())
        stack.enter_context(recorder)
        load(model, method, recorder, half, double_quant, kbit_fp32, warmup and cuda)
        if method != 'full':
            model.requires_grad_(False)
            add_lora(model, lora_targets, lora_rank, lora_dropout, DTYPES[lora_dtype])
        model.train()
        if checkpointing:
            name = 'activation_checkpointing_enable'  # since 5.20 or so
            getattr(model, name, model.gradient_checkpointing_enable)({'use_reentrant': reentrant})
            if method != 'full':  # peft does so: a checkpoint whose inputs need no gradient has none at all
                model.enable_input_require_grads()
        if loss == 'shifted':
            model.loss_function = shifted_loss
        plan = HFPlan(weights=recorder.now, context=context if cuda else 0)
        plan.parameters, params = count(model), [p for p in model.parameters() if p.requires_grad]
        plan.trained = sum(p.numel() for p in params)
        update = make_optimizer(optimizer, params)
        try:
            train(model, update, recorder, batch, seq, DTYPES.get(autocast), steps, keep_outputs)
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as e:
            reason = ' '.join(str(e).split())[:200]
            raise ValueError(
                f'a step of {type(model).__name__} with method={method!r} does not run on fake tensors: {reason}'
            ) from e
        kept = [t for state in update.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.ndim]
        plan.states, plan.paged = sum(t.nbytes for t in kept), getattr(update, 'unified', 0)
        card = recorder.allocator
        plan.live, plan.allocated, plan.reserved = recorder.peak, card.peak_allocated, card.peak_reserved
        plan.workspaces = recorder.workspace * len(recorder.workspaces)
        plan.phase, plan.operation = recorder.where
        del model, update, params, kept
    return plan


def train(model, update, recorder, batch, seq, autocast, steps, keep_outputs):
    """A plain loop of training; the mask of attention is full, for which transformers passes none on."""
    outputs = None
    for _ in range(steps):
        recorder.phase = 'forward'
        tokens = torch.zeros(batch, seq, dtype=torch.int64)
        labels, mask = torch.zeros_like(tokens), torch.ones_like(tokens)  # noqa: F841, a batch has one
        with torch.autocast('cpu', autocast) if autocast else contextlib.nullcontext():
            outputs = model(input_ids=tokens, labels=labels)
        value = outputs.loss
        if not keep_outputs:
            outputs = None
        recorder.phase = 'backward'
        value.backward()
        recorder.phase = 'optimizer'
        update.step()
        update.zero_grad()


def build(config, dtype, attention):
    """The model on fake tensors, in its final dtype; ValueError where transformers cannot make one of it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:  # flash-attn itself need not be there: with a full mask it keeps what torch's flash keeps
        how = 'eager' if attention == 'eager' else 'sdpa'
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=how)
        except ValueError as e:
            if 'scaled_dot_product_attention' not in str(e):
                raise
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation='eager')
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
        reason = str(e).split('\n')[0][:200]
        raise ValueError(f'transformers cannot build a causal language model of this config: {reason}') from None


def load(model, method, recorder, dtype, double_quant, kbit_fp32, warmup):
    """Put each weight on the card: in the model's order as .to('cuda') does; NF4 by name as from_pretrained does."""
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    packed = {
        id(m.weight): m
        for m in modules.values()
        if method == 'qlora' and m is not head and (isinstance(m, nn.Linear) or type(m).__name__ == 'Conv1D')
    }
    names = [(name, p) for name, p in model.named_parameters()]  # tied ones once
    if method == 'qlora':
        names.sort(key=lambda item: [(x.isalpha(), int(x) if x.isdigit() else 0, x) for x in item[0].split('.')])
        if warmup:
            room = sum(p.numel() * (0.5 if id(p) in packed else p.element_size()) for _, p in names)
            recorder.allocator.free(recorder.allocator.malloc(int(room)))
    new = {}
    with torch.no_grad():
        for name, p in names:
            owner, _, last = name.rpartition('.')
            module = modules[owner]
            module._parameters[last] = q = nn.Parameter(torch.empty_like(p))
            if id(p) in packed:
                replace_module(model, owner, NF4Linear(module, dtype, double_quant))
                module._parameters.clear()
            else:
                new[id(p)] = q
            del q
        for module in model.modules():  # those tied to others
            for name, p in module._parameters.items():
                if p is not None and id(p) in new:
                    module._parameters[name] = new[id(p)]
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = torch.empty_like(b)
        if method == 'qlora' and kbit_fp32:
            for p in model.parameters():
                if p.dtype in (torch.bfloat16, torch.float16):
                    p.data = p.data.to(torch.float32)


def replace_module(model, name, module):
    parent, _, last = name.rpartition('.')
    setattr(model.get_submodule(parent), last, module)


def add_lora(model, targets, rank, dropout, dtype):
    """Wrap the linear layers that `targets` names; ValueError where it names none."""
    head = model.get_output_embeddings()
    kinds = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, (nn.Linear, NF4Linear)) or type(module).__name__ == 'Conv1D') and module is not head
    }
    known = sorted({name.split('.')[-1] for name in kinds})
    wanted = known if targets == 'all' else TARGETS.get(targets) or [t.strip() for t in targets.split(',')]
    chosen = [name for name in kinds if name.split('.')[-1] in wanted]
    if not chosen:
        raise ValueError(f"lora_targets={targets!r} names no layer of this model: use 'all', or some of {known}")
    for name in chosen:
        replace_module(model, name, LoRA(kinds[name], rank, dropout, dtype))


def count(model):
    """Parameters as published: packed weights in full, LoRA's and tied ones once."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
    return packed + sum(p.numel() for p in model.parameters())


def shifted_loss(logits, labels, vocab_size, **_):
    """The loss of transformers before 4.50: a copy of the logits without the last token's."""
    logits = logits.float()
    shifted = logits[..., :-1, :].contiguous()  # (B, T - 1, V)
    return F.cross_entropy(shifted.view(-1, vocab_size), labels[..., 1:].contiguous().view(-1))


def make_optimizer(name, params):
    if name in TORCH_OPTIMIZERS:
        make, how = TORCH_OPTIMIZERS[name]
        return make(params, lr=1e-3, **how)
    if name == 'lomo':
        return Lomo(params)
    return BnbStates(params, 32 if '32bit' in name else 8, name.startswith('paged'))


def table(plan, gpu_gb):
    """The plan as lines that a person reads."""
    rest = plan.allocated - plan.weights - plan.states - plan.workspaces
    rows = [
        ('weights', plan.weights, f'{plan.parameters:,} parameters, {plan.trained:,} of them trained'),
        ('optimizer states', plan.states, ''),
        ('workspaces', plan.workspaces, 'of cuBLAS'),
        ('all else at the peak', rest, f'gradients, activations; peak in {plan.phase}, {plan.operation}'),
        ('allocated', plan.allocated, 'torch.cuda.max_memory_allocated()'),
        ('reserved', plan.reserved, 'torch.cuda.max_memory_reserved()'),
        ('paged states', plan.paged, 'in unified memory'),
        ('CUDA context', plan.context, 'assumed; not seen by any trace'),
        ('nvidia-smi', plan.total, 'reserved + paged + context'),
    ]
    lines = [f'{name:<22}{size / 2**30:9.3f} GiB  {note}'.rstrip() for name, size, note in rows if size]
    if gpu_gb:
        for margin, lengths in ((MARGIN, 'of equal length'), (MARGIN_VARYING, 'padded each to its longest row')):
            need = plan.total * (1 + margin) / 2**30
            fits = 'fits' if need <= gpu_gb else 'does not fit'
            lines.append(f'{fits} on {gpu_gb:g} GiB, with {margin:.0%} to spare for batches {lengths}: {need:.2f} GiB')
    return '\n'.join(lines)


def main(argv):
    """python memest_hf.py --hf=... with trace_hf's arguments as flags, --gpu_gb=24, --json; 0, or 1 and a sentence."""
    known = {name: p.default for name, p in inspect.signature(trace_hf).parameters.items() if name != 'config'}
    given, path, gpu_gb, as_json = {}, None, 0.0, False
    try:
        for word in argv:
            name, _, value = word.removeprefix('--').partition('=')
            if name == 'hf':
                path = value
            elif name == 'gpu_gb':
                gpu_gb = number(name, value, float)
                if gpu_gb <= 0:
                    raise ValueError(f'--gpu_gb={value} cannot be: use the size of the card, as in --gpu_gb=24')
            elif name == 'json':
                as_json = True
            elif name not in known:
                raise ValueError(f'--{name} does not go with --hf: use --hf, --gpu_gb, --json, --{", --".join(known)}')
            elif isinstance(known[name], bool):
                if value not in ('', 'True', 'False', '1', '0'):
                    raise ValueError(f'--{name}={value} is neither: use True or False')
                given[name] = value in ('', 'True', '1')
            else:
                given[name] = number(name, value, int) if isinstance(known[name], int) else value
        if not path:
            raise ValueError('--hf is missing: give a folder with a config.json, or such a file')
        plan = trace_hf(path, **given)
    except ValueError as e:
        print(f'error: {e}', file=sys.stderr)
        return 1
    print(json.dumps(vars(plan) | {'total': plan.total}) if as_json else table(plan, gpu_gb))
    return 0


def number(name, value, kind):
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f'--{name}={value} is no number: use one, as in --{name}=8') from None


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
