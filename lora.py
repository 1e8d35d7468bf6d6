"""
LoRA: frozen weights and a trained low-rank product beside them (2106.09685); with NF4 weights, QLoRA (2305.14314).

    y = x @ W.T + (alpha / r) (x @ A.T) @ B.T                                # W (out, in), A (r, in), B (out, r)

A starts random, B at zero: the layer begins as W alone. Both are fp32, W is as it came, or in 4 bits. What is learnt
stays within r dimensions of W: enough to fine-tune, not to learn from scratch (GaLore's table 2: at 1b its perplexity
is 19.2, full training's 15.6), for which loqt.py merges and starts over in other dimensions.

    python train.py --method=lora --init_from=path/to/folder --rank=16 --scale=2 --learning_rate=2e-4     # QLoRA
    python train.py --method=lora --init_from=path/to/folder --rank=16 --scale=2 --learning_rate=2e-4 --quantize=none
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from adam import AdamW, Packed, split_decay


class FrozenLinear(torch.autograd.Function):
    """y = x @ W.T with W as it is kept: decoded in forward and again in backward, never in between."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.read('W', x.dtype))  # (..., out)

    @staticmethod
    def backward(ctx, delta):
        return delta @ ctx.layer.read('W', delta.dtype), None  # (..., in)


class LoRALinear(Packed):
    """y = x @ (W + alpha / r B @ A).T in the place of an nn.Linear without bias, whose weight W is (out, in).

    Parameters: A (r, in), uniform as in Kaiming's initialisation, and B (out, r), zero; fp32 whatever W's dtype.
    quantize: 'none', or 'nf4' for a W in 4 bits; double_quant: with its scales in 8. Raises ValueError else."""

    def __init__(self, n_in, n_out, rank=16, alpha=32.0, quantize='none', double_quant=False, device=None, dtype=None):
        super().__init__()
        if quantize not in ('nf4', 'none') or rank < 1:
            raise ValueError(f"quantize={quantize!r}, rank={rank} cannot be: use 'nf4' or 'none', and at least 1")
        self.in_features, self.out_features, self.dtype = n_in, n_out, dtype or torch.get_default_dtype()
        self.scale, self.how, self.shapes = alpha / rank, (quantize, double_quant), {'W': (n_out, n_in)}
        self.A = nn.Parameter(torch.empty(rank, n_in, device=device))
        self.B = nn.Parameter(torch.empty(n_out, rank, device=device))
        if not self.A.is_meta:
            self.reset_parameters()

    def reset_parameters(self, generator=None):
        """A new weight, N(0, 0.02), and factors whose product is zero."""
        W = torch.empty(self.out_features, self.in_features, device=self.A.device, dtype=self.dtype)
        self.set_weight(nn.init.normal_(W, std=0.02, generator=generator), generator)

    @torch.no_grad()
    def set_weight(self, W, generator=None):
        """Freeze the weight W (out, in) and start over beside it."""
        self.keep('W', W.to(self.dtype))
        if W.is_meta:  # a dry run
            return
        generator = generator or torch.Generator(W.device).manual_seed(W.shape[1])  # not the global one: runs repeat
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.B)

    @torch.no_grad()
    def dense_weight(self):
        """W + alpha / r B @ A (out, in), in W's dtype."""
        return torch.addmm(self.read('W', torch.float32), self.B, self.A, alpha=self.scale).to(self.dtype)

    def forward(self, x):
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        return FrozenLinear.apply(x, self) + self.scale * ((x @ A.T) @ B.T)  # (..., out)


class LoRAAdamW(AdamW):
    """AdamW, whose checkpoints hold the frozen weights as they are kept and the factors beside them."""

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


def linear(config):
    """What train.py makes the blocks' layers with for method='lora'; alpha is `scale` times r, as LoQT counts it."""
    return partial(
        LoRALinear,
        rank=config.rank,
        alpha=config.scale * config.rank,
        quantize=config.quantize,
        double_quant=config.double_quant,
    )


def setup(model, config):
    """What train.py calls for method='lora': the factors, the embeddings, the head and the norms are trained."""
    layers = [module for module in model.layers.modules() if isinstance(module, LoRALinear)]
    if not layers:
        raise ValueError(
            "method='lora' trains LoRALinears: build the model with LLaMA(config, linear=lora.linear(...))"
        )
    return LoRAAdamW(
        split_decay(model.parameters()),
        layers,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        state_bits=config.state_bits,
        grad_clip=config.grad_clip,
        per_layer=config.per_layer,
        offload=config.offload,
        seed=config.seed,
    )
