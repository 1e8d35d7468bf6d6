"""
Q-GaLore: GaLore with int8 weights and 4-bit bases, refreshed only where the subspace still turns (2407.08296).

    W is int8, a scale for each 256 numbers; W = round(W - lr scale P @ N), up or down at random (section 3.3)
    P is in 4 bits                                                                              (section 3.4)
    where the old P holds as much of G as the new one, the layer's next T is twice as long      (section 3.2)

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
from adam import BLOCK, add_, at_least_fp32
from galore import GaLoreAdamW, linears_of, project


def blocks_of(columns):
    """Scales in a row of so many numbers: one for each 256, or for each 64 or 128 where these divide the row and 256
    does not. Elsewhere all blocks of a row are of one size, but for the last, which may be shorter."""
    size = math.gcd(columns, BLOCK)
    return columns // size if size >= 64 else -(-columns // BLOCK)


def encode_int8(W, seed=None, scale=None):
    """W (rows, columns) as int8, and its scales (rows * blocks of a row,), fp32.

    seed: of the stochastic rounding; None: round to the nearest. scale: the old scales, kept unless W has outgrown them
    or shrunk far below. The paper takes new scales at every step. Then the grid moves under all weights, and
    stochastic rounding changes each of them even where its update is zero; on a grid that stays it does not.
    A number that is not finite has no int8: its block's scale becomes NaN or infinite, for the run to stop at."""
    rows, columns = W.shape
    per_row = blocks_of(columns) if scale is None else len(scale) // rows
    size = -(-columns // per_row)
    steps = torch.zeros(rows, per_row * size, device=W.device)
    steps[:, :columns] = W
    blocks = steps.view(-1, size)  # (rows * per_row, size)
    largest = torch.maximum(blocks.amax(1), -blocks.amin(1))
    # Room to grow; and in bf16's few bits, so that a whole number times it is exact and divides back to itself.
    fresh = (largest * 1.25 / 127).clamp_min(1e-12).bfloat16().float()
    if scale is None:
        scale = fresh
    else:
        scale = torch.where((largest <= 127 * scale) & (largest >= 127 / 4 * scale), scale, fresh)
    blocks /= scale[:, None]
    if seed is None:
        blocks.round_()
    else:
        generator = torch.Generator(W.device).manual_seed(seed)
        up = torch.rand(blocks.shape, generator=generator, device=W.device) < blocks - blocks.floor()
        blocks.floor_().add_(up)
    return steps[:, :columns].clamp_(-127, 127).to(torch.int8, memory_format=torch.contiguous_format), scale


def decode_int8(q, scale, dtype=torch.float32):
    """The matrix that `encode_int8` made q (rows, columns) and scale of."""
    W, scale = q.to(dtype), scale.to(dtype).view(len(q), -1)  # (rows, columns), (rows, blocks of a row)
    size = -(-W.shape[1] // scale.shape[1])
    whole = W.shape[1] // size
    W[:, : whole * size].unflatten(1, (whole, size)).mul_(scale[:, :whole, None])
    W[:, whole * size :].mul_(scale[:, whole:])
    return W


def share_kept(old, P, G):
    """Of what the basis P (m, r) holds of G (m, n) beyond a random one, the share that the old basis holds: 1 where
    G's subspace has not turned, 0 where the old basis is no better than a random one, which holds r / m. 0-dim.

    The overlap of the two bases does not tell: a P that came from the old one by a step of subspace iteration leans
    towards it whatever G is (.76 to .93 for independent random G, where two random bases overlap by .25)."""
    whole, dtype = torch.linalg.vector_norm(G, dtype=at_least_fp32(G)).clamp_min(1e-30), at_least_fp32(G)
    before, now = ((torch.linalg.vector_norm(project(A, G), dtype=dtype) / whole) ** 2 for A in (old, P))
    # A new basis that gains less than a thousandth of G is no other, even where neither is better than a random one.
    return 1 - (now - before) / (now - P.shape[1] / P.shape[0]).clamp_min(1e-3)


class QGaLoreAdamW(GaLoreAdamW):
    """GaLoreAdamW, arguments as there, and

    lazy: a layer of whose new P the old one kept more than this share (`share_kept`) waits twice as long for its next
    one; one that turned further is back at T after that. 0: every T steps. The paper compares the bases instead, and
    doubles where their columns' cosines are above .4.
    To keep a weight in 8 bits, put its 'W' and 'W_scale' (of `encode_int8`) into the optimizer's state; the parameter
    itself is then a placeholder that takes no memory (`pack`)."""

    def __init__(self, params, lr=1e-2, lazy=0.4, **options):
        self.lazy = lazy
        super().__init__(params, lr, **options)

    def update(self, p, R):
        super().update(p, R)
        if self.is_projected(p):
            self.maybe_skip_refresh(p)

    def basis_turned(self, p, new, old, P, G):
        state = self.state[p]
        new['next'] += state.get('gap', self.group_of[p]['update_proj_gap']) - self.group_of[p]['update_proj_gap']
        if self.lazy:
            new['kept'] = share_kept(old, self.basis(p), G)  # of the new basis as it is in few bits, as the old one
        super().basis_turned(p, new, old, P, G)

    def maybe_skip_refresh(self, p):
        """If the last refresh gained little over the old basis, skip the one that is due in the next step and double
        the interval. Reads one scalar from the device; it was computed T steps ago, so nothing waits."""
        state, T = self.state[p], self.group_of[p]['update_proj_gap']
        if state['step'] + 1 == state['next'] and 'kept' in state:
            kept, gap = state.pop('kept'), state.get('gap', T)
            calm = type(kept) is torch.Tensor and kept.item() > self.lazy  # a plan's tensors have no value: refresh
            state['next'] += gap if calm else 0
            state['gap'] = 2 * gap if calm else T

    # ---- weights in 8 bits

    def weight(self, p):
        state = self.state[p]
        return decode_int8(state['W'], state['W_scale'], p.dtype) if 'W' in state else p

    def move(self, p, W, N, row=0):
        state, decay = self.state[p], self.decay(p)
        if 'W' not in state:
            return super().move(p, W, N, row)
        per_row = state['W_scale'].numel() // len(p)
        q, scale = state['W'][row : row + len(W)], state['W_scale'][row * per_row : (row + len(W)) * per_row]
        exact = decode_int8(q, scale)
        add_(exact, N, self.rate(p), decay, 0)
        new_q, new_scale = encode_int8(exact, self.random_seed(p, state['step'] + 1, row), scale)
        q.copy_(new_q)
        scale.copy_(new_scale)


class Int8Linear(torch.nn.Linear):
    """A linear layer that packs a weight the moment it gets one: of a model that is built or loaded, one layer at a
    time is whole. `packed` holds the int8 tensors until an optimizer takes them into its state."""

    packed = None

    def __init__(self, n_in, n_out, bias=False, **kw):
        super().__init__(n_in, n_out, bias=bias, **kw)

    def reset_parameters(self, generator=None):
        """A new weight, N(0, 0.02), which exists in full only here, and a bias of zero."""
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)
        if not self.weight.is_meta:
            self.set_weight(torch.nn.init.normal_(self.weight.detach().contiguous(), std=0.02, generator=generator))

    @torch.no_grad()
    def set_weight(self, W):
        """Start from the weight W (out, in)."""
        self.weight = torch.nn.Parameter(W)
        self.packed = None if W.is_meta else pack(self)

    def _apply(self, fn, recurse=True):
        """`.to(device)` takes the packed weight along."""
        if not self.packed:
            return super()._apply(fn, recurse)
        shape, nothing = self.weight.shape, self.weight.detach()[0, 0].clone()
        self.weight = None
        super()._apply(fn, recurse)
        self.weight = torch.nn.Parameter(fn(nothing).expand(shape))
        self.packed = {name: A.to(self.weight.device) for name, A in self.packed.items()}
        return self

    def dense_weight(self):
        """W (out, in), decoded."""
        return decode_int8(self.packed['W'], self.packed['W_scale'], self.weight.dtype)


def pack(module):
    """Take a module's weight out of it: -> the int8 tensors for the optimizer's state."""
    W = module.weight.detach()
    rows = max((1 << 22) // W.shape[1] // BLOCK, 1) * BLOCK  # at a time: whole blocks, and few fp32 temporaries
    parts = zip(*(encode_int8(W[a : a + rows]) for a in range(0, len(W), rows)))
    module.weight = torch.nn.Parameter(torch.zeros((), dtype=W.dtype, device=W.device).expand(W.shape))
    return {name: torch.cat(part) for name, part in zip(('W', 'W_scale'), parts)}


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options(galore.Options):
    """What --method=qgalore adds to train.py's keys."""

    weight_bits = 8  # 8 | 16: of the blocks' weights; 16 stands for what dtype says
    basis_bits = 4  # 16 | 8 | 4: of the bases
    lazy = 0.4  # a layer's T doubles where its old basis held more than this share of what the new one holds; 0: never


FIXED = (*galore.FIXED, 'weight_bits')


def problems(config):
    """What does not go together, a sentence each."""
    from configurator import between

    found = galore.problems(config) + between(config, 0, 1, 'lazy')
    if config.weight_bits == 8 and not config.save_merged:
        found.append('save_merged=False leaves out the int8 weights, which only a run that resumes could read: drop it')
    return found


def linear(config):
    """What train.py makes the blocks' layers with for method='qgalore': born packed."""
    from model import Linear

    return Int8Linear if config.weight_bits == 8 else Linear


def setup(model, config):
    """What train.py calls for method='qgalore'."""
    linears = linears_of(model, config)
    # One after another, so that no second copy of the model exists.
    packed = [getattr(m, 'packed', None) or pack(m) for m in linears] if config.weight_bits == 8 else []
    optimizer = QGaLoreAdamW(galore.groups(model, linears, config), lazy=config.lazy, **galore.arguments(config))
    for module, parts in zip(linears, packed):
        optimizer.state[module.weight].update(parts)
        module.packed = None  # they are the optimizer's now
        module.dense_weight = partial(optimizer.weight, module.weight)
    optimizer.attach(linears)
    return optimizer
