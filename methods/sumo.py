"""
SUMO: Muon inside GaLore's subspace, one orthogonalised momentum in the place of Adam's two moments (2505.24749).

    every T steps:  P as in GaLore,  M = P.T @ P_old @ M                     # (m, r); (r, n): it turns with P
    R = P.T @ G,  M = mu M + R                                               # (r, n)
    O = U @ V.T of M = U S V.T                                               # (r, n): all r directions equally far
    W = (1 - lr weight_decay) W - lr scale 0.2 sqrt(max(m, n)) P @ O         # (m, n)

P.T @ (U S V.T) has the same S, so with r = m and scale 1 this is Muon, whatever P and T are; with r < m it is Muon
within P, whose learning rate carries over. The exact O is (M @ M.T)^(-1/2) @ M, an r x r eigenvalue problem a step:
little on a CPU; on a card hundreds of small kernels a matrix, of which orthogonal='newton' has none.
Memory: m r + n r numbers instead of m r + 2 n r. G is never formed, and only R is accumulated.
Not for: full fine-tuning of what Adam has pretrained (2605.10468); a rank near m, where Muon itself keeps less.

    python train.py config/sumo_laptop.py
    optimizer = SumoAdamW([{'params': matrices}, {'params': others, 'rank': 0}], rank=128)         # in any other loop
"""

import torch

import galore
from adam import heavy_ball, is_finite, product_dtype, zero_unless_
from galore import GaLoreAdamW, linears_of
from methods.muon import orthogonalise


def polar(M):
    """U @ V.T of M (r, n) = U S V.T, r <= n, in fp32. Directions in which M is a thousandth or less of its largest
    singular value, and noise, are left out."""
    A = M @ M.T  # (r, r)
    L, Q = torch.linalg.eigh(zero_unless_(is_finite(A), A))  # (r,), (r, r): L is S^2, rising; of NaN it would not end
    least = 1e-6 * L[-1]
    return (Q * torch.where(least < L, L, torch.inf).rsqrt()) @ (Q.T @ M)  # (r, n)


class SumoAdamW(GaLoreAdamW):
    """GaLoreAdamW with one momentum; arguments as there, and

    momentum: mu. orthogonal: 'exact', or 'newton', Muon's five products, which wait for nothing on a card."""

    def __init__(self, params, lr=2e-3, momentum=0.9, orthogonal='exact', scale=1.0, moments='rotate', **galore):
        if orthogonal not in ('exact', 'newton'):
            raise ValueError(f"orthogonal={orthogonal!r} is not known: use 'exact' or 'newton'")
        self.momentum, self.orthogonal = momentum, orthogonal
        super().__init__(params, lr, scale=scale, moments=moments, **galore)

    def update(self, p, R):
        """One step on p; R (r, n)."""
        if not self.is_projected(p):
            return super().update(p, R)
        state, dtype = self.state[p], product_dtype(p)
        M = heavy_ball(state, R, self.momentum, self.state_bits)  # (r, n)
        O = polar(M) if self.orthogonal == 'exact' else orthogonalise(M.to(dtype))  # (r, n)
        self.add_projected(p, self.basis(p).to(dtype), O * (0.2 * max(p.shape) ** 0.5) * (1 - state.get('skip', 0)))


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options(galore.Options):
    """What --method=sumo adds to train.py's keys."""

    scale = 1.0  # factor on the update that comes back from the subspace; 1 makes it Muon's
    moments = 'rotate'  # 'keep' | 'rotate' | 'reset': what becomes of the momentum when the subspace turns
    momentum = 0.9  # mu: share of the momentum that stays in each step; Nesterov's 0.95 does the same
    orthogonal = 'exact'  # 'exact' | 'newton': by eigenvalues, or nearly, by five products as in Muon


FIXED = galore.FIXED


def problems(config):
    """What does not go together, a sentence each."""
    from configurator import between

    return galore.problems(config) + between(config, 0, 0.9999, 'momentum')


def setup(model, config):
    """What train.py calls for method='sumo'."""
    linears = linears_of(model, config)
    optimizer = SumoAdamW(
        galore.groups(model, linears, config),
        momentum=config.momentum,
        orthogonal=config.orthogonal,
        **galore.arguments(config),
    )
    optimizer.attach(linears)
    return optimizer
