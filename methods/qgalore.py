"""
Q-GaLore: GaLore with int8 weights and 4-bit bases, refreshed only where the subspace still turns (2407.08296).

    W is int8, a scale for each 256 numbers; W = round(W - lr scale P @ N), up or down at random (section 3.3)
    P is in 4 bits                                                                              (section 3.4)
    where |P_new.T @ P_old|^2 / r > lazy, the layer's next T is twice as long                   (section 3.2)

Memory: one byte a weight instead of two, half a byte a number of P. Time: a layer's weight is decoded in forward and
again in backward.
Not for: few steps at a small rate. A step much smaller than a 127th of a block's largest weight is mostly noise.

    python train.py config/galore_laptop.py --method=qgalore
    python train.py config/galore_7b_4090.py --method=qgalore --lazy=0 --out_dir=out/qgalore_7b       # 7B on 16 GB
"""

import math
from functools import partial

import torch

import galore
from adam import BLOCK, add_
from galore import GaLoreAdamW, linears_of


def encode_int8(W, seed=None, scale=None):
    """W (numel divisible by `block_of`) as int8 and a scale for each block.

    seed: of the stochastic rounding; None: round to the nearest. scale: the old scales, kept unless W has outgrown them
    or shrunk far below. The paper takes new scales at every step. Then the grid moves under all weights, and
    stochastic rounding changes each of them even where its update is zero; on a grid that stays it does not."""
    blocks = W.float().reshape(-1, block_of(W))  # (numel / block, block)
    largest = blocks.abs().amax(1)
    # Room to grow; and in bf16's few bits, so that a whole number times it is exact and divides back to itself.
    fresh = (largest * 1.25 / 127).clamp_min(1e-12).bfloat16().float()
    if scale is None:
        scale = fresh
    else:
        scale = torch.where((largest > 127 * scale) | (largest < 127 / 4 * scale), fresh, scale)
    steps = blocks / scale[:, None]
    if seed is None:
        steps.round_()
    else:
        generator = torch.Generator(W.device).manual_seed(seed)
        low = steps.floor()
        steps = low + (torch.rand(steps.shape, generator=generator, device=W.device) < steps - low)
    return steps.clamp_(-127, 127).to(torch.int8).view(W.shape), scale


def decode_int8(q, scale, dtype=torch.float32):
    return (q.reshape(-1, block_of(q)).to(dtype) * scale.to(dtype)[:, None]).view(q.shape)


def block_of(W):
    """Numbers of W that share a scale: 256, or what divides the number of its columns."""
    return math.gcd(W.shape[-1], BLOCK)


class QGaLoreAdamW(GaLoreAdamW):
    """GaLoreAdamW, arguments as there, and

    lazy: a layer whose new P overlaps the old one by more than this waits twice as long for its next one; one that
    overlaps less is back at T after that. 0: every T steps.
    To keep a weight in 8 bits, put its 'W' and 'W_scale' (of `encode_int8`) into the optimizer's state; the parameter
    itself is then a placeholder that takes no memory (`pack`)."""

    def __init__(self, params, lr=1e-2, lazy=0.4, **options):
        self.lazy = lazy
        super().__init__(params, lr, **options)

    def update(self, p, R):
        super().update(p, R)
        if self.is_projected(p):
            self.maybe_skip_refresh(p)

    def basis_turned(self, p, Q):
        state = self.state[p]
        state['next'] += state.get('gap', self.group_of[p]['update_proj_gap']) - self.group_of[p]['update_proj_gap']
        if self.lazy:
            state['overlap'] = Q.square().sum() / len(Q)  # 1: the same subspace, r / m: a random one
        super().basis_turned(p, Q)

    def maybe_skip_refresh(self, p):
        """If the last refresh barely turned the subspace, skip the one that is due in the next step and double the
        interval. Reads one scalar from the device; it was computed T steps ago, so nothing waits."""
        state, T = self.state[p], self.group_of[p]['update_proj_gap']
        if state['step'] + 1 == state['next'] and 'overlap' in state:
            gap, calm = state.get('gap', T), float(state.pop('overlap')) > self.lazy
            state['next'] += gap if calm else 0
            state['gap'] = 2 * gap if calm else T

    # ---- weights in 8 bits

    def weight(self, p):
        state = self.state[p]
        return decode_int8(state['W'], state['W_scale'], p.dtype) if 'W' in state else p

    def move(self, p, W, N, row=0):
        state, decay = self.state[p], self.group_of[p]['weight_decay']
        if 'W' not in state:
            return super().move(p, W, N, row)
        per_row = state['W_scale'].numel() // len(p)
        q, scale = state['W'][row : row + len(W)], state['W_scale'][row * per_row : (row + len(W)) * per_row]
        exact = decode_int8(q, scale)
        add_(exact, N, self.rate(p), decay, 0)
        new_q, new_scale = encode_int8(exact, self.random_seed(p, state['step'] + 1, row), scale)
        q.copy_(new_q)
        scale.copy_(new_scale)


def pack(module):
    """Take a module's weight out of it: -> the int8 tensors for the optimizer's state."""
    W = module.weight
    parts = dict(zip(('W', 'W_scale'), encode_int8(W.detach())))
    module.weight = torch.nn.Parameter(torch.zeros((), dtype=W.dtype, device=W.device).expand(W.shape))
    return parts


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options(galore.Options):
    """What --method=qgalore adds to train.py's keys."""

    weight_bits = 8  # 8 | 16: of the blocks' weights; 16 stands for what dtype says
    basis_bits = 4  # 16 | 8 | 4: of the bases
    lazy = 0.4  # a layer's T doubles where its new basis overlaps the old by more than this share; 0: never


FIXED = (*galore.FIXED, 'weight_bits')


def problems(config):
    """What does not go together, a sentence each."""
    found = galore.problems(config)
    if config.weight_bits == 8 and config.compile:
        found.append('weight_bits=8 keeps weights where compile=True does not find them: set --compile=False')
    return found


def setup(model, config):
    """What train.py calls for method='qgalore'."""
    linears = linears_of(model)
    # One after another, so that no second copy of the model exists.
    packed = [pack(module) for module in linears] if config.weight_bits == 8 else []
    optimizer = QGaLoreAdamW(galore.groups(model, linears), lazy=config.lazy, **galore.arguments(config))
    for module, parts in zip(linears, packed):
        optimizer.state[module.weight].update(parts)
        module.dense_weight = partial(optimizer.weight, module.weight)
    if not config.compile:
        optimizer.attach(linears)
    return optimizer
