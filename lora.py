"""
LoRA: frozen weights and a trained low-rank product beside them (2106.09685); with NF4 weights, QLoRA (2305.14314).

    y = x @ W.T + (alpha / r) (dropout(x) @ A.T) @ B.T                       # W (out, in), A (r, in), B (out, r)

rsLoRA (2312.03732) takes alpha / sqrt(r) instead, so that a higher rank is no smaller step; LoRA+ (2402.12354) gives B
a higher learning rate than A.

A starts random, B at zero: the layer begins as W alone. Both are fp32, W is as it came, or in 4 bits. What is learnt
stays within r dimensions of W: enough to fine-tune, not to learn from scratch (GaLore's table 2: at 1b its perplexity
is 19.2, full training's 15.6). ReLoRA (2307.05695) leaves those dimensions: every `merge_every` steps

    W <- W + (alpha / r) B @ A,   A and B start anew, and so do their moments and a short warm-up

Not for: NF4 weights with few steps between merges. What moves a weight by less than half the distance between two of
its 16 values is rounded away; loqt.py makes that good.

    python train.py --method=lora --init_from=path/to/folder --learning_rate=2e-4     # QLoRA, rank 16, alpha 32
    python sample.py out/run --save_adapter=out/adapter     # A and B alone, in a folder that `peft` reads
    python sample.py out/run --save_to=out/merged           # W + (alpha / r) B @ A, as a plain Hugging Face folder
"""

import math
import zlib
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import adam
from adam import AdamW, add_, exactly, several_processes, split_decay
from quant import Packed


def processes():
    """How many share the micro-batches of a step."""
    return dist.get_world_size() if several_processes() else 1


class FrozenLinear(torch.autograd.Function):
    """y = x @ W.T + b with W as it is kept: decoded in forward and again in backward, never in between.

    And + low @ B.T, where low (..., r) is scale * x_A @ A.T: added within the product, so that no second tensor of y's
    size is made, or in backward, where x_A is x, of x's."""

    @staticmethod
    def forward(ctx, x, bias, layer, A=None, B=None, x_A=None, scale=1.0):
        y = F.linear(x, layer.read('W', x.dtype), None if bias is None else bias.to(x.dtype))  # (..., out)
        ctx.layer, ctx.scale, ctx.dropped = layer, scale, x_A is not None
        if A is not None:
            x_A = x if x_A is None else x_A
            low = (x_A @ A.T).mul_(scale)  # (..., r)
            y.view(-1, y.shape[-1]).addmm_(low.flatten(0, -2), B.T)  # a view, or an error: never a copy
            ctx.save_for_backward(x_A, low, A, B)
        return y

    @staticmethod
    def backward(ctx, delta):
        needs_dx, needs_db, *_ = ctx.needs_input_grad
        db = delta.flatten(0, -2).sum(0).to(ctx.layer.bias.dtype) if needs_db else None  # (out,)
        dx = delta @ ctx.layer.read('W', delta.dtype) if needs_dx else None  # (..., in)
        saved = ctx.saved_tensors  # once: under checkpointing each look computes the block again
        if not saved:
            return dx, db, None
        x_A, low, A, B = saved
        rows = delta.flatten(0, -2)  # (n, out)
        dB = rows.T @ low.flatten(0, -2)  # (out, r)
        d_low = (rows @ B).mul_(ctx.scale)  # (n, r)
        dA = d_low.T @ x_A.flatten(0, -2)  # (r, in)
        dx_A = (d_low @ A).view(x_A.shape) if ctx.dropped and needs_dx else None  # (..., in)
        if needs_dx and not ctx.dropped:
            dx.view(-1, dx.shape[-1]).addmm_(d_low, A)
        return dx, db, None, dA, dB, dx_A, None


class LoRALinear(Packed):
    """y = x @ (W + alpha / r B @ A).T, plus b, in the place of an nn.Linear whose weight W is (out, in).

    Parameters: A (r, in), uniform as in Kaiming's initialisation, and B (out, r), zero; fp32 whatever W's dtype. And
    with bias=True b (out,), which is no part of the adapter and has W's dtype.
    rslora: alpha / sqrt(r) in the place of alpha / r. quantize: 'none', or 'nf4' for a W in 4 bits; double_quant: with
    its scales in 8. dropout: share of the inputs of A that are zero in training. Raises ValueError for values that
    cannot be."""

    def __init__(self, n_in, n_out, rank=16, alpha=32.0, quantize='none', double_quant=False, dropout=0.0, bias=False,
                 rslora=False, device=None, dtype=None):  # fmt: skip
        super().__init__()
        if quantize not in ('nf4', 'none') or rank < 1:
            raise ValueError(f"quantize={quantize!r}, rank={rank} cannot be: use 'nf4' or 'none', and at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f'dropout={dropout} is not a share of the inputs: use at least 0 and less than 1')
        self.in_features, self.out_features, self.dtype = n_in, n_out, dtype or torch.get_default_dtype()
        self.scale, self.rslora = alpha / (math.sqrt(rank) if rslora else rank), rslora
        self.how, self.shapes = (quantize, double_quant), {'W': (n_out, n_in)}
        self.dropout, self.seed = dropout, ''
        self.drawn, self.ahead = 0, 0  # micro-batches of the steps so far, and of this one; LoRAAdamW counts them
        self.A = nn.Parameter(torch.empty(rank, n_in, device=device))
        self.B = nn.Parameter(torch.empty(n_out, rank, device=device))
        self.bias = nn.Parameter(torch.zeros(n_out, device=device, dtype=dtype)) if bias else None
        if not self.A.is_meta:
            self.reset_parameters()

    def reset_parameters(self, generator=None):
        """A new weight, N(0, 0.02), a bias of zero, and factors whose product is zero."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        W = torch.empty(self.out_features, self.in_features, device=self.A.device, dtype=self.dtype)
        self.set_weight(nn.init.normal_(W, std=0.02, generator=generator), generator)

    @torch.no_grad()
    def set_weight(self, W, generator=None):
        """Freeze the weight W (out, in) and start over beside it."""
        self.keep('W', W.to(self.dtype))
        if not W.is_meta:  # else a dry run
            self.new_factors(generator or torch.Generator(W.device).manual_seed(W.shape[1]))  # not the global one

    def new_factors(self, generator):
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.B)

    @torch.no_grad()
    def merge(self, seed):
        """W <- W + alpha / r B @ A, and new factors (ReLoRA, algorithm 1). seed: of A, and of the random rounding of a
        bf16 W, which would lose small changes; to the nearest of 16 values in 4 bits."""
        W = self.read('W', self.dtype)
        add_(W, self.B @ self.A, -self.scale, 0.0, seed)  # (out, in)
        self.set_weight(W, torch.Generator(W.device).manual_seed(seed))

    @torch.no_grad()
    def dense_weight(self):
        """W + alpha / r B @ A (out, in), in W's dtype."""
        return torch.addmm(self.read('W', torch.float32), self.B, self.A, alpha=self.scale).to(self.dtype)

    def dropped(self, x):
        """x (..., in) with a share of it at zero, the rest as it was; all of it in evaluation.

        The mask is a function of (seed, layer, micro-batch): the same when checkpointing computes the block again, and
        when a run resumes. Processes share the micro-batches, so more of them change no mask."""
        if not (self.dropout and self.training and torch.is_grad_enabled()):
            return x
        world, rank = processes(), dist.get_rank() if several_processes() else 0
        drawn = self.drawn + (self.ahead if self.B.grad is not None else 0)  # what a loop dropped does not count
        seed = zlib.crc32(f'{self.seed} {drawn * world + rank}'.encode())
        generator = torch.Generator(x.device).manual_seed(seed)
        drop = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(self.dropout, generator=generator)
        return x.masked_fill(drop, 0.0)

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):  # as torch's own layer: x is cast, and its cast is what stays
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not len(self.A):  # no adapter here
            return FrozenLinear.apply(x, self.bias, self)
        A, B, x_A = self.A.to(x.dtype), self.B.to(x.dtype), self.dropped(x)
        x_A, scale = (None, self.scale) if x_A is x else (x_A, self.scale / (1 - self.dropout))
        return FrozenLinear.apply(x, self.bias, self, A, B, x_A, scale)  # (..., out)


class LoRAAdamW(AdamW):
    """AdamW, whose checkpoints hold the frozen weights as they are kept and the factors beside them.

    layers: the LoRALinears. merge_every: steps between two merges (ReLoRA), 0 for none. A merge comes at the end of
    `step()`, one layer after another, whatever the mode. Moments are then reset: the paper prunes 99 % of them, but a V
    pruned to zero with a bias correction long over makes steps three times too large, (1 - b1) / sqrt(1 - b2). After a
    merge the learning rate rises again for a tenth of merge_every, at most 100 steps."""

    small_gradients = True

    def __init__(self, params, layers, merge_every=0, **adam):
        self.layers, self.layer_of = layers, {layer.B: layer for layer in layers}
        self.merge_every = merge_every
        super().__init__(params, **adam)
        for i, layer in enumerate(layers):
            layer.seed = f'{self.seed} {i}'

    def rate(self, p):
        return super().rate(p) * self.rise(self.state[p].get('step', 0))

    def rise(self, step):
        """The share of the learning rate that the warm-up after a merge leaves."""
        if not self.merge_every or step < self.merge_every:
            return 1.0
        return min((step % self.merge_every + 1) / (min(self.merge_every // 10, 100) + 1), 1.0)

    def begin(self, p):
        super().begin(p)
        if p in self.layer_of:
            self.layer_of[p].ahead = 0

    def gradient_ready(self, p):
        if p in self.layer_of:
            self.layer_of[p].ahead += 1
        super().gradient_ready(p)

    def update(self, p, G):
        super().update(p, G)
        if p in self.layer_of:
            layer = self.layer_of[p]
            layer.drawn, layer.ahead = layer.drawn + layer.ahead, 0

    @exactly
    def take_step(self):
        super().take_step()
        for i, layer in enumerate(self.layers if self.merge_every else ()):
            if layer.A not in self.index_of:  # no adapter here
                continue
            step = self.state[layer.A].get('step', 0)
            self.metrics['rise'] = torch.tensor(self.rise(max(step - 1, 0)))  # of this step's learning rate
            if step and step % self.merge_every == 0:
                layer.merge(zlib.crc32(f'{self.seed} {step} {i}'.encode()))
                for state in (self.state[layer.A], self.state[layer.B]):
                    state.update({name: 0 * value for name, value in state.items() if name != 'step'})

    def state_dict(self):
        layers = [dict(layer.state_dict()) for layer in self.layers]
        drawn = [layer.drawn * processes() for layer in self.layers]  # by all, who share them evenly
        return super().state_dict() | {'layers': layers, 'drawn': drawn}

    def load_state_dict(self, state_dict):
        states = state_dict['state']
        if 'steps' in state_dict:  # written before there was one clock: 'step' was counted since the last merge
            clock = state_dict['steps']
            states = {i: s | {'fill': s['step'], 'step': clock} if 'step' in s else s for i, s in states.items()}
        super().load_state_dict({'state': states, 'param_groups': state_dict['param_groups']})
        for layer, saved, drawn in zip(self.layers, state_dict['layers'], state_dict['drawn']):
            layer.restore(saved)
            layer.drawn, layer.ahead = drawn // processes(), 0


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options:
    """What --method=lora adds to train.py's keys."""

    rank = 16  # r: dimensions of the change
    scale = 2.0  # alpha / r: factor on B A
    rslora = False  # the factor is alpha / sqrt(r) instead: with a high rank, try a scale well below 1
    lora_plus = 1.0  # factor on B's learning rate (LoRA+, whose authors take 16)
    quantize = 'nf4'  # 'nf4' | 'none': the frozen weights in 4 bits (QLoRA), or as dtype says
    double_quant = False  # the scales of nf4 in 8 bits, too: 0.37 bits a weight less
    dropout = 0.0  # share of the adapters' inputs that is zero in training; 0.05 is usual for small data
    merge_every = 0  # steps between two merges of B A into the weights (ReLoRA); 0: never
    train_rest = 'auto'  # 'auto' | 'yes' | 'no' | 'tables': all else, too, or embedding and head; auto: in a new model


FIXED = ('rank', 'scale', 'rslora', 'quantize', 'double_quant', 'train_rest', 'merge_every')
FIXED += ('lora_plus',)  # B's in a group of their own


def problems(config):
    """What does not go together, a sentence each."""
    from configurator import at_least, between, typed

    c, found = config, between(config, 1, 10**9, 'rank') + at_least(config, 0, 'merge_every')
    found += between(c, 1e-6, 1e4, 'scale', 'lora_plus')
    if c.quantize == 'none' and c.double_quant and typed(c, 'double_quant'):
        found.append("double_quant is of weights in 4 bits: leave it out with quantize='none'")
    if not 0 <= c.dropout < 1:
        found.append(f'dropout={c.dropout} is not a share of the inputs: use at least 0 and less than 1')
    return found


def linear(config):
    """What train.py makes the blocks' layers with for method='lora'; alpha is `scale` times r, as LoQT counts it."""
    names = ('rank', 'quantize', 'double_quant', 'dropout', 'rslora')
    options = {name: getattr(config, name) for name in names if hasattr(config, name)}  # of an older run, too
    return partial(LoRALinear, alpha=config.scale * config.rank, **options)


def described(config):
    """What the first lines of a run say."""
    r, alpha = config.rank, config.scale * config.rank
    how = f'sqrt(r) = {alpha / math.sqrt(r):g}' if config.rslora else f'r = {alpha / r:g}'
    return f'lora_alpha {alpha:g}, r {r}, factor on B A: lora_alpha / {how}'


def setup(model, config):
    """What train.py calls for method='lora': A and B are trained, and what else train_rest says."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not layers:
        how = 'build the model with LLaMA(config, linear=lora.linear(...))'
        raise ValueError(f"method='lora' trains LoRALinears: {how}")
    scratch = config.init_from == 'scratch'
    if config.train_rest == 'auto':  # decided here, for those who resume this run
        config.train_rest = 'yes' if scratch else 'no'
    if config.train_rest in ('no', 'tables'):
        model.requires_grad_(False)
        for head in model.head_modules().values():  # of a classifier, which nobody has trained yet
            head.requires_grad_(True)
    if config.train_rest == 'tables':
        if hasattr(model, 'inner'):
            raise ValueError("train_rest='tables' is of our own families: use yes or no with transformers' models")
        for name, p in model.named_parameters():
            p.requires_grad_(name in ('embed_tokens.weight', 'lm_head.weight'))
    adapted = {id(layer) for layer in adam.targeted(model, config, LoRALinear).values()}
    for i, layer in enumerate(layers.values()):
        if id(layer) not in adapted:
            layer.A.data, layer.B.data = layer.A.data[:0].clone(), layer.B.data[:, :0].clone()  # rank 0: W alone
        elif not scratch and not layer.A.is_meta:  # a weight that was given made each A from its shape alone
            layer.new_factors(torch.Generator(layer.A.device).manual_seed(zlib.crc32(f'{config.seed} 0 {i}'.encode())))
        layer.A.requires_grad_(len(layer.A) > 0), layer.B.requires_grad_(len(layer.A) > 0)
    B = {id(layer.B): layer.B for layer in layers.values() if len(layer.A)} if config.lora_plus != 1 else {}
    groups = split_decay(p for p in model.parameters() if p.requires_grad and id(p) not in B)
    if B:
        groups.append({'params': list(B.values()), 'lr_scale': config.lora_plus})
    return LoRAAdamW(groups, list(layers.values()), merge_every=config.merge_every, **adam.common(config))
