"""
APOLLO: Adam in a random subspace only tells how long each column of the full gradient should be (2412.05270).

    P = random, N(0, 1/r), another one every T steps                         # (m, r), made from a seed, never kept
    R = P.T @ G,  N = Adam(R)                                                # (r, n)
    s_j = |N_j| / |R_j| for each column j                                    # (n,); APOLLO-Mini: one s for the tensor
    W = W - lr scale limit(G s)                                              # (m, n)

Memory: moments of r n numbers, no SVD and no P; but the full G of each weight, of which per_layer keeps one at a time,
unless micro-batches accumulate.

    python train.py config/galore_laptop.py --method=apollo
    python train.py config/galore_laptop.py --method=apollo --tensorwise --rank=1 --scale=11.3         # APOLLO-Mini
"""

import torch

import adam
from adam import AdamW, adam_direction, limit_growth
from galore import check_group, default_rank, groups, linears_of, on_the_right, project


class ApolloAdamW(AdamW):
    """Arguments as in adam.AdamW, and as in galore.GaLoreAdamW rank, update_proj_gap (T), scale and proj_type, keys of
    a group. tensorwise: APOLLO-Mini, which is meant for rank 1 and scale sqrt(128)."""

    def __init__(self, params, lr=1e-2, rank=None, update_proj_gap=200, scale=1.0, tensorwise=False, proj_type='std',
                 **adam):  # fmt: skip
        self.tensorwise, params = tensorwise, list(params)
        rank = default_rank(params) if rank is None else rank
        own = dict(rank=rank, update_proj_gap=update_proj_gap, scale=scale, proj_type=proj_type)
        super().__init__(params, lr, group_defaults=own, **adam)

    def add_param_group(self, group):
        check_group(self.defaults | group)
        super().add_param_group(group)

    def update(self, p, G):
        group, state = self.group_of[p], self.state[p]
        if p.dim() != 2 or not group['rank']:
            return super().update(p, G)
        turned = on_the_right(p.shape, group['proj_type'])
        G = (G.T if turned else G).float()  # (m, n)
        m, r = len(G), min(group['rank'], len(G))
        generator = torch.Generator(G.device)
        generator.manual_seed(self.random_seed(p, state['step'] // group['update_proj_gap']))
        P = torch.randn(m, r, generator=generator, device=G.device) / r**0.5  # (m, r)
        R = project(P, G)  # (r, n)
        seed = self.random_seed(p, state['step'])
        N = adam_direction(R, state, group['betas'], group['eps'], self.state_bits, seed)  # (r, n)
        dim = None if self.tensorwise else 0
        s = torch.linalg.vector_norm(N, dim=dim) / torch.linalg.vector_norm(R, dim=dim).clamp_min(1e-12)  # (n,) or ()
        U = limit_growth(G * s, state).mul_(group['scale'])  # (m, n)
        self.move(p, p, U.T if turned else U)


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options:
    """What --method=apollo adds to train.py's keys."""

    rank = 128  # r: dimensions of the random subspace
    update_proj_gap = 200  # T: steps between two random subspaces
    scale = 1.0  # factor on the update; with --tensorwise --rank=1 the paper's is sqrt(128), 11.3
    tensorwise = False  # one scaling factor for a tensor instead of one for each column: APOLLO-Mini
    proj_type = 'std'  # 'std' | 'paper': where P stands of a square matrix, on the side of its inputs or its outputs


FIXED = ('rank', 'tensorwise', 'proj_type')


def problems(config):
    """What does not go together, a sentence each."""
    from configurator import between

    found = between(config, 1, 10**9, 'rank', 'update_proj_gap') + between(config, 1e-6, 1e4, 'scale')
    return found + adam.no_clip_per_layer(config)


def setup(model, config):
    """What train.py calls for method='apollo'."""
    own = {name: getattr(config, name) for name in vars(Options) if not name.startswith('_')}
    return ApolloAdamW(groups(model, linears_of(model, config)), **adam.common(config), **own)
