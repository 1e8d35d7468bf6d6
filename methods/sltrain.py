"""
SLTrain: weights that are a low-rank product and a sparse matrix, from scratch (2406.02214).

    W = scale B A + S          # (out, in): B (out, r), A (r, in), and S, not zero in a share `density` of places
    y = x W.T                  # W is made for the product and dropped, again in backward
    dW = dy.T x,  dB = scale dW A.T,  dA = scale B.T dW,  dS = dW at those places            # dW is dropped, too

The places are random, drawn once, one in each of equal stretches of W, so that none is drawn twice. B starts at zero, A
as in LoRA, S uniform within 1 / sqrt(in); Adam trains all three.

Memory: r (m + n) + density m n trained numbers a matrix, with moments and gradients of as many, and 4 bytes for each
place; W and dW of one layer while it works. Time: W is made twice a step, 4 r m n operations.
Not for: a pretrained folder, which is no such sum; nor GaLore or APOLLO on top: of factored weights these collapse
(perplexity 958 and 1,027 against 238), so the layers have no `weight` that could be attached.

    python train.py config/sltrain_laptop.py
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import adam
from adam import AdamW, split_decay


class Product(torch.autograd.Function):
    """y = x @ W.T + b of an SLLinear."""

    @staticmethod
    def forward(ctx, x, A, B, S, bias, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return F.linear(x, layer.whole(x.dtype), None if bias is None else bias.to(x.dtype))  # (..., out)

    @staticmethod
    def backward(ctx, delta):
        (x,), layer, needs_db = ctx.saved_tensors, ctx.layer, ctx.needs_input_grad[4]
        dx = delta @ layer.whole(delta.dtype) if ctx.needs_input_grad[0] else None  # (..., in)
        rows = delta.flatten(0, -2)  # (N, out)
        dW, A, B = rows.T @ x.flatten(0, -2), layer.A.to(delta.dtype), layer.B.to(delta.dtype)  # (out, in)
        dA, dB = layer.scale * (B.T @ dW), layer.scale * (dW @ A.T)  # (r, in), (out, r)
        dS = dW.view(-1).index_select(0, layer.places)
        found = (gradient.to(p.dtype) for gradient, p in zip((dA, dB, dS), (layer.A, layer.B, layer.S)))
        return dx, *found, rows.sum(0).to(layer.bias.dtype) if needs_db else None, None


class SLLinear(nn.Module):
    """y = x @ (scale B A + S).T, plus b, in the place of an nn.Linear (out, in). Parameters: A (r, in), B (out, r), S
    (k,), the numbers at the flat `places` (k,) int32 of W, and with bias=True b (out,)."""

    def __init__(self, n_in, n_out, rank=128, scale=0.25, density=0.03, bias=False, device=None, dtype=None):
        super().__init__()
        if rank < 1 or not 0 < density <= 1:
            raise ValueError(f'rank={rank}, density={density} cannot be: use at least 1, and a share of the places')
        self.in_features, self.out_features, self.scale, new = n_in, n_out, scale, dict(device=device, dtype=dtype)
        k = max(round(density * n_in * n_out), 1)
        self.A, self.B = nn.Parameter(torch.empty(rank, n_in, **new)), nn.Parameter(torch.empty(n_out, rank, **new))
        self.S = nn.Parameter(torch.empty(k, **new))
        self.bias = nn.Parameter(torch.zeros(n_out, **new)) if bias else None
        self.register_buffer('places', torch.empty(k, dtype=torch.int32, device=device))
        if not self.A.is_meta:
            self.reset_parameters()

    def __getattr__(self, name):
        if name == 'weight':
            raise AttributeError('an SLLinear has factors and no weight: GaLore on top of them collapses, use AdamW')
        return super().__getattr__(name)

    @torch.no_grad()
    def reset_parameters(self, generator=None):
        """New places and numbers; a bias of zero."""
        k, numbers = len(self.S), self.in_features * self.out_features
        begins = torch.arange(k + 1, device=self.S.device) * numbers // k
        u = torch.rand(k, dtype=torch.float64, generator=generator, device=self.S.device)
        self.places.copy_(begins[:-1] + (u * begins.diff()).long())
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.B)
        nn.init.uniform_(self.S, -(self.in_features**-0.5), self.in_features**-0.5, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def set_weight(self, W):
        """Start anew with what W (out, in) has at the places; all of it, if they are all."""
        if not W.is_meta:
            self.reset_parameters(torch.Generator(W.device).manual_seed(W.shape[1]))
        self.S.copy_(W.reshape(-1).index_select(0, self.places))

    def whole(self, dtype):
        W = (self.B.detach().to(dtype) @ self.A.detach().to(dtype)).mul_(self.scale)  # (out, in)
        W.view(-1).index_add_(0, self.places, self.S.detach().to(dtype))
        return W

    def dense_weight(self):
        return self.whole(self.S.dtype)

    restore = nn.Module.load_state_dict  # as packed layers have it

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):  # as torch's own layer: x is cast, and its cast is what stays
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return Product.apply(x, self.A, self.B, self.S, self.bias, self)


class SLTrainAdamW(AdamW):
    """AdamW whose checkpoints hold the factors, the numbers and their places of these SLLinears."""

    small_gradients = True

    def __init__(self, params, layers, **adam):
        self.layers = layers
        super().__init__(params, **adam)

    def state_dict(self):
        return super().state_dict() | {'layers': [dict(layer.state_dict()) for layer in self.layers]}

    def load_state_dict(self, state_dict):
        super().load_state_dict({name: state_dict[name] for name in ('state', 'param_groups')})
        for layer, saved in zip(self.layers, state_dict['layers']):
            layer.restore(saved)


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options:
    """What --method=sltrain adds to train.py's keys."""

    rank = 128  # r: dimensions of the product
    scale = 0.25  # alpha / r: factor on B A
    density = 0.03  # share of the places of a weight that the sparse matrix has


FIXED = ('rank', 'scale', 'density')


def problems(config):
    """What does not go together, a sentence each."""
    from configurator import between

    what = 'sltrain makes new weights, and init_from brings others: use --init_from=scratch, or --method=lora'
    found = adam.no_targets(config) if config.init_from in ('scratch', 'resume') else [what, *adam.no_targets(config)]
    for key, least, most in (('rank', 1, 10**9), ('scale', 1e-6, 1e4), ('density', 1e-6, 1)):
        found += between(config, least, most, key)
    return found


def linear(config):
    """What train.py makes the blocks' layers with for method='sltrain'."""
    return partial(SLLinear, **{name: getattr(config, name) for name in ('rank', 'scale', 'density')})


def setup(model, config):
    """What train.py calls for method='sltrain'."""
    layers = [module for module in model.modules() if isinstance(module, SLLinear)]
    if not layers:
        raise ValueError("method='sltrain' trains SLLinears: build with LLaMA(config, linear=sltrain.linear(...))")
    numbers = {id(layer.S): layer.S for layer in layers}  # these are parts of matrices, and decay
    matrices, vectors = split_decay(p for p in model.parameters() if id(p) not in numbers)
    matrices['params'] += numbers.values()
    return SLTrainAdamW([matrices, vectors], layers, **adam.common(config))
