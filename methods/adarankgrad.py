"""
AdaRankGrad: GaLore whose rank falls, layer by layer, as the gradient's energy gathers in few directions (2410.17881).

    at a refresh:  e_i = |P_i.T @ G|^2 for each column of the new P          # (r,), largest first
                   k = the fewest columns with e_1 + ... + e_k >= energy |G|^2
    before the next refresh of the layer, if k < r:
                   P, M, V keep these k columns and rows; from then on r = k

The moments turn with P (galore.rotate_moments). The paper looks for k by SVDs of a growing size and lets it rise again;
here it only falls, and the norms of columns that a step of subspace iteration has put in order cost nothing. Where r
columns hold less than that share of G, r stays.

Memory: GaLore's, m r + 2 r n, with an r that falls; the peak, at the start, is GaLore's. Time: GaLore's and less.
Not for: small batches, whose gradients are mostly noise of full rank: then nothing is cut.

    python train.py config/adarankgrad_laptop.py                             # the log's mean_rank shows what is left
"""

import torch

import adam
import galore
from adam import MOMENTS, at_least_fp32, exactly, make_moments, read_state, write_state
from galore import GaLoreAdamW, linears_of, project


class AdaRankGradAdamW(GaLoreAdamW):
    """Arguments as in galore.GaLoreAdamW, and energy: the share of |G|^2 that a layer's columns must hold."""

    def __init__(self, params, lr=1e-2, rank=None, energy=0.8, moments='rotate', **options):
        if not 0 < energy <= 1:
            raise ValueError(f'energy={energy} is not a share: use more than 0 and at most 1')
        self.energy = energy
        super().__init__(params, lr, rank, moments=moments, refresh='subspace', **options)

    def basis_turned(self, p, new, old, P, G):
        super().basis_turned(p, new, old, P, G)
        energies = project(P, G).to(at_least_fp32(G)).square().sum(1)  # (r,)
        whole = torch.linalg.vector_norm(G, dtype=energies.dtype).square()
        held, new['order'] = energies.sort(descending=True)
        k = (held.cumsum(0) < self.energy * whole).sum() + 1
        new['dims'] = torch.where(whole.isfinite() & (whole > 0), k, len(held))

    def advance(self, p, G=None):
        super().advance(p, G)
        state = self.state[p]
        if 'dims' in state and self.is_due(p):
            k = state.pop('dims')  # of T steps ago, so nothing waits for the device
            if type(k) is torch.Tensor and k.item() < len(self.placeholder[p]):  # a plan's tensors have no value
                self.cut(p, state['order'][: k.item()].sort().values)

    def cut(self, p, kept):
        """Of p's basis and moments these columns and rows stay."""
        state = self.state[p]
        P = self.decoded(p, state)[:, kept]  # (m, k)
        moments = {name: read_state(state, name)[kept.to(state[name].device)] for name in 'MV'}  # (k, n)
        for name in MOMENTS:
            state.pop(name, None)
        make_moments(state, moments['M'], self.state_bits)
        for name, moment in moments.items():
            write_state(state, name, moment) if name + '_absmax' in state else state.update({name: moment})
        state['rank'] = len(kept)
        self.fit_placeholder(p)
        state.update(self.encoded(p, P))

    def fit_placeholder(self, p):
        """What receives R has as many rows as P has columns."""
        old, r = self.placeholder[p], self.state[p].get('rank', min(self.group_of[p]['rank'], *p.shape))
        self.placeholder[p] = new = old.detach()[:1].expand(r, -1).requires_grad_() if r != len(old) else old
        if p in self.attached and new is not old:
            self.watched = [q for q in self.watched if q is not old]
            self.weight_of[new] = self.weight_of.pop(old)
            self.watch(new)

    @exactly
    def take_step(self):
        super().take_step()
        if ranks := [len(q) for q in self.placeholder.values()]:
            self.metrics['mean_rank'] = torch.tensor(sum(ranks) / len(ranks))

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for p in self.placeholder:
            self.fit_placeholder(p)


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options:
    """What --method=adarankgrad adds to train.py's keys."""

    rank = 128  # r: dimensions of the subspace at the start
    update_proj_gap = 200  # T: steps between two refreshes of a layer's subspace
    scale = 0.25  # factor on the update that comes back from the subspace
    energy = 0.8  # share of |G|^2 that a layer's columns must hold; columns beyond that are cut
    stagger = True  # layers refresh in turns, so that no step stalls
    moments = 'rotate'  # 'keep' | 'rotate' | 'reset': what becomes of Adam's moments when the subspace turns
    basis_bits = 16  # 16 | 8 | 4: of the bases; 16 stands for the weights' own dtype


FIXED = galore.FIXED


def problems(config):
    """What does not go together, a sentence each."""
    from configurator import between

    return galore.problems(config) + between(config, 1e-6, 1, 'energy')


def setup(model, config):
    """What train.py calls for method='adarankgrad'."""
    linears = linears_of(model, config)
    own = {name: getattr(config, name) for name in vars(Options) if name[0] != '_'} | adam.common(config)
    optimizer = AdaRankGradAdamW(galore.groups(model, linears), **own)
    optimizer.attach(linears)
    return optimizer
