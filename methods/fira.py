"""
Fira: GaLore, and beside it what the subspace leaves out of the gradient, at Adam's step size (2410.01623).

    R = P.T @ G,  N = Adam(R)                                                # (r, n)
    S = G - P @ R                                                            # (m, n): the residual
    phi_j = |N_j| / |R_j| for each column j                                  # (n,): how much Adam scaled that column
    W = W - lr (scale P @ N + limit(S phi))                                  # (m, n)

`scale` is of what comes back from the subspace, as in GaLore; the residual has Adam's size already.
Memory: GaLore's states, and the full gradient of each layer: per_layer keeps one at a time, unless micro-batches
accumulate. Never forming G is not possible here.

    python train.py config/galore_laptop.py --method=fira
"""

import torch

import adam
import galore
from adam import adam_direction, limit_growth, product_dtype
from galore import GaLoreAdamW, linears_of, project, project_back


class FiraAdamW(GaLoreAdamW):
    """GaLoreAdamW with the residual; arguments as there. Layers that were attached still give the full gradient."""

    small_gradients, full_gradient = False, True

    def update(self, p, G):
        """One step on p; G (m, n), or its transpose."""
        if not self.is_projected(p):
            return super().update(p, G)
        group, state, dtype = self.group_of[p], self.state[p], product_dtype(p)
        G = self.p_first(p, G).to(dtype)  # (m, n)
        if 'P' not in state or self.is_due(p):
            self.first_basis(p, G)
            self.settle(p)
        R = project(self.basis(p), G)  # (r, n)
        seed = self.random_seed(p, state['step'])
        N = adam_direction(R, state, group['betas'], group['eps'], self.state_bits, seed)  # (r, n)
        P = self.basis(p).to(dtype)  # (m, r)
        S = torch.addmm(G, P, R, alpha=-1)  # (m, n)
        phi = N.norm(dim=0) / R.norm(dim=0).clamp_min(1e-12)  # (n,)
        U = limit_growth(S.mul_(phi), state)  # (m, n)
        project_back(P, N.to(dtype), into=U, times=group['scale'])
        self.move(p, p, self.p_first(p, U))  # its transpose is its own inverse


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options(galore.Options):
    """What --method=fira adds to train.py's keys."""


FIXED = galore.FIXED


def problems(config):
    """What does not go together, a sentence each."""
    return galore.problems(config) + adam.no_clip_per_layer(config)


def setup(model, config):
    """What train.py calls for method='fira'."""
    linears = linears_of(model, config)
    optimizer = FiraAdamW(galore.groups(model, linears, config), **galore.arguments(config))
    optimizer.attach(linears)
    return optimizer
