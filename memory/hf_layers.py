"""
Layers and optimizers that take the memory of peft's, bitsandbytes' and LOMO's, and do none of their arithmetic.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

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


class NF4Product(torch.autograd.Function):
    """x @ W.T with the packed W decoded in forward and again in backward (bitsandbytes/autograd/_functions.py,
    MatMul4Bit). x is not kept."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.decode(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx, delta):
        return delta @ ctx.layer.decode(delta.dtype), None  # (..., in)


class NF4Linear(nn.Module):
    """The memory of bitsandbytes' Linear4bit: two weights a byte, a scale for 64 of them. The numbers mean nothing.

    linear: the layer it replaces, weight (out, in). dtype: of the products. double_quant: the scales in 8 bits, with an
    fp32 scale for 256 of them, an offset, and a table of 256 values (bitsandbytes' quantize_4bit)."""

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
            # needed for a moment, as in the original
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
    in the base's. The frozen base is an nn.Linear, a Conv1D, whose weight is (in, out), or an NF4Linear."""

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


class BnbStates:
    """The states of bitsandbytes' AdamW, made in its first step as in bitsandbytes/optim/optimizer.py.

    Below 4,096 numbers they are fp32. Paged ones of at least 1e5 numbers live in unified memory: torch does not count
    them, and the card holds them while they are updated."""

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
    """LOMO (2306.09782): in backward each gradient moves its weight, by way of fp32 copies of both, and is dropped."""

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


def make_optimizer(name, params):
    if name in TORCH_OPTIMIZERS:
        make, how = TORCH_OPTIMIZERS[name]
        return make(params, lr=1e-3, **how)
    if name == 'lomo':
        return Lomo(params)
    return BnbStates(params, 32 if '32bit' in name else 8, name.startswith('paged'))
