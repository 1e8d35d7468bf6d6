"""
AdaLomo: steps of Adafactor's size, taken inside backward, with no first moment (2310.10195).

    b = 1 - t^-0.8                                                           # t: steps so far, with this one
    r = b r + (1 - b) mean of G * G over each row                            # (m,)
    c = b c + (1 - b) mean of G * G over each column                         # (n,)
    U = G / sqrt(r c.T / mean(r))                                            # (m, n); a vector has its own whole V
    W = W - lr (max(RMS(W), 0.001) U / max(RMS(U), 1) + weight_decay W)

The last line is the paper's grouped normalisation: of each tensor by itself, so no step waits for a global norm. With
adaptive=False it is LOMO (2306.09782), SGD: W = W - lr (G + weight_decay W).

Memory: m + n numbers a matrix, LOMO none; and, with per_layer, the gradient of one layer, unless micro-batches
accumulate: both need all of G. Time: a few passes over G. The rate is a share of a weight's size, some 30 times Adam's.
Not for: small batches from scratch, where a first moment averages the noise out.

    python train.py config/adalomo_laptop.py
    python train.py config/adalomo_laptop.py --adaptive=False --learning_rate=0.5                          # LOMO
"""

import torch

import adam
from adam import AdamW, at_least_fp32, split_decay


class AdaLomo(AdamW):
    """Arguments as in adam.AdamW, of which it has no use for those of moments: betas, eps, state_bits, offload.
    adaptive: False for LOMO."""

    def __init__(self, params, lr=1e-2, adaptive=True, **adam):
        self.adaptive = adaptive
        super().__init__(params, lr, **adam)

    def update(self, p, G):
        self.move(p, p, self.normalised(p, G) if self.adaptive else G)

    def normalised(self, p, G):
        """max(RMS(W), 0.001) U / max(RMS(U), 1), in fp32 and G's shape; G's squares go into p's state."""
        state, U = self.state[p], G.to(at_least_fp32(G))
        state['fill'] = state.get('fill', 0) + 1
        squares = U.square()
        if G.dim() == 2:
            rows = self.mean(state, 'V_rows', squares.mean(1))  # (m,)
            columns = self.mean(state, 'V_columns', squares.mean(0))  # (n,)
            del squares
            U = U * (rows / rows.mean().clamp_min(1e-30)).clamp_min(1e-30).rsqrt()[:, None]  # (m, n)
            U *= columns.clamp_min(1e-30).rsqrt()
        else:
            U = U * self.mean(state, 'V', squares).clamp_min(1e-30).rsqrt()
        size = torch.linalg.vector_norm(p, dtype=U.dtype) / p.numel() ** 0.5  # RMS(W)
        return U.mul_(size.clamp_min(1e-3) / (U.norm() / U.numel() ** 0.5).clamp_min(1.0))

    def mean(self, state, name, now):
        """The running mean of this name, with `now` in it."""
        old = state.get(name, torch.zeros_like(now))
        new = torch.lerp(old, now, state['fill'] ** -0.8)
        state[name] = torch.where(state['skip'] > 0, old, new) if 'skip' in state else new
        return state[name]


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options:
    """What --method=adalomo adds to train.py's keys."""

    adaptive = True  # False: LOMO, plain SGD inside backward


FIXED = ('adaptive',)


def problems(config):
    """What does not go together, a sentence each."""
    from configurator import typed

    keys = typed(config, 'state_bits', 'offload', 'beta1', 'beta2')
    return adam.problems(config) + [f"{key} is of Adam's moments, and adalomo keeps none: leave it out" for key in keys]


def setup(model, config):
    """What train.py calls for method='adalomo'."""
    return AdaLomo(split_decay(model.parameters()), adaptive=config.adaptive, **adam.common(config))
