"""
LDAdam: GaLore whose subspace turns a little in every step, and loses nothing for good (2410.16103).

    A = G + E                                                                # (m, n): E is what earlier steps left out
    B = rho P M / (1 - b1^t) + (1 - rho) A                                   # (m, n): the mean gradient, and this one
    P' = QR(B B.T P)                                                         # (m, r): one power iteration from P
    M, V <- rotated by Q = P'.T P                                            # (r, n): galore.rotate_moments
    R = P'.T A,  N = Adam(R)                                                 # (r, n)
    E = A - P' R + b1 / (1 - b1) (P M - P' Q M)                              # of the gradient, and of the old momentum
    W = W - lr (P' N + weight_decay W)                                       # (m, n)

Memory: P and the moments, m r + 2 r n numbers, and E, m n in W's dtype; and the full G, one at a time under per_layer,
unless micro-batches accumulate. E may well be left out (--feedback=False): then it is GaLore with T = 1 and a P
that follows the mean gradient, and on results/shelf.md's small model still below AdamW. Time: a QR and some six
products with an m x r matrix, each step.
Not for: the least memory. E takes as much as half of Adam's moments where the weights are bf16.

    python train.py config/ldadam_laptop.py
"""

import torch

import adam
import galore
from adam import adam_direction, at_least_fp32, hand_out_, read_state, write_state
from galore import GaLoreAdamW, linears_of, orthonormal_basis, rotate_moments


class LDAdamW(GaLoreAdamW):
    """Arguments as in adam.AdamW, and rank: r, a key of groups as in galore.GaLoreAdamW; rho: how much of the mean
    gradient there is in what P follows; feedback: with E. Attached layers still give the full gradient."""

    small_gradients, full_gradient = False, True

    def __init__(self, params, lr=1e-3, rank=None, rho=0.908, feedback=True, proj_type='std', **adam):
        if not 0 <= rho < 1:
            raise ValueError(f'rho={rho} is not a share: use at least 0 and less than 1')
        self.rho, self.feedback = rho, feedback
        super().__init__(params, lr, rank, scale=1.0, proj_type=proj_type, **adam)

    def update(self, p, G):
        """One step on p; G (m, n), or its transpose."""
        if not self.is_projected(p):
            return super().update(p, G)
        state, (b1, b2), eps = self.state[p], self.group_of[p]['betas'], self.group_of[p]['eps']
        A, old = self.p_first(p, G).to(at_least_fp32(G)), None  # (m, n)
        if 'P' in state:
            old = self.decoded(p, state).to(A.dtype)  # (m, r)
        if 'E' in state:
            A = A + state['E']  # (m, n)
        B = A if old is None else torch.lerp(A, old @ read_state(state, 'M') / (1 - b1 ** state['fill']), self.rho)
        P = orthonormal_basis(B, len(self.placeholder[p]), 'subspace', old).to(A.dtype)  # (m, r)
        del B
        hand_out_(P)
        R = P.T @ A  # (r, n)
        E = torch.addmm(A, P, R, alpha=-1) if self.feedback else None  # (m, n)
        if old is not None:
            Q, M, V = P.T @ old, read_state(state, 'M'), read_state(state, 'V')  # (r, r), (r, n)
            if self.feedback:
                E += b1 / (1 - b1) * (old @ M - P @ (Q @ M))
            for name, moment, turned in zip('MV', (M, V), rotate_moments(M, V, Q, (b1, b2), state['fill'])):
                write_state(state, name, moment.copy_(self.unless_skipped(state, moment, turned)))
        N = adam_direction(R, state, (b1, b2), eps, self.state_bits, self.random_seed(p, state['step']))  # (r, n)
        for name, new in (('P', P), ('E', E)) if self.feedback else (('P', P),):
            if name not in state:  # of a first step that is skipped, too: from P = 0 no iteration would get anywhere
                state[name] = torch.empty_like(new, dtype=p.dtype).copy_(new)
            state[name].copy_(self.unless_skipped(state, state[name], new))
        self.add_projected(p, P, N)

    def unless_skipped(self, state, old, new):
        return torch.where(state['skip'] > 0, old, new) if 'skip' in state else new


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options:
    """What --method=ldadam adds to train.py's keys."""

    rank = 128  # r: dimensions of the subspace
    rho = 0.908  # how much of the mean gradient there is in what the subspace follows; 0: this step's gradient alone
    feedback = True  # what a step leaves out is added to the next gradient; False saves its memory, a full gradient's
    proj_type = 'std'  # 'std' | 'paper': where P stands of a square matrix, on the side of its inputs or its outputs


FIXED = ('rank', 'feedback', 'proj_type')


def problems(config):
    """What does not go together, a sentence each."""
    from configurator import between

    return between(config, 1, 10**9, 'rank') + between(config, 0, 0.9999, 'rho') + adam.no_clip_per_layer(config)


def setup(model, config):
    """What train.py calls for method='ldadam'."""
    own = {name: getattr(config, name) for name in vars(Options) if not name.startswith('_')}
    return LDAdamW(galore.groups(model, linears_of(model, config)), **own, **adam.common(config))
