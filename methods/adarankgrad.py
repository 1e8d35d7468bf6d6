"""
AdaRankGrad: GaLore whose rank follows, layer by layer, how many directions hold the gradient's energy (2410.17881).

    at a refresh:  P from the old P and random columns, r in all; e_i = |P_i.T @ G|^2   # (m, r); (r,)
                   k = the fewest columns, largest e first, that hold energy |G|^2, or r
                   P = its k' best columns, k' being the last refresh's k               # (m, k')
    before the next refresh of the layer: P, M, V get k columns and rows, fewer or more than they had

The paper looks for k by SVDs of a growing size; here the columns that a step of subspace iteration has put in order are
asked, and the answer counts one refresh later, so that nothing waits for the device. The moments turn with P.

Memory: GaLore's, m k + 2 k n, with a k that falls and rises; its peak, at the start, is GaLore's. Time: GaLore's.
Not for: small batches, whose gradients are mostly noise of full rank: then nothing is cut.

    python train.py config/adarankgrad_laptop.py                             # the log's mean_rank shows what is left
"""

import torch

import adam
import galore
from adam import MOMENTS, at_least_fp32, exactly, make_moments, read_state, write_state
from galore import GaLoreAdamW, linears_of, orthonormal_basis, project, seeded


class AdaRankGradAdamW(GaLoreAdamW):
    """Arguments as in galore.GaLoreAdamW, and energy: the share of |G|^2 that a layer's columns must hold."""

    def __init__(self, params, lr=1e-2, rank=None, energy=0.98, moments='rotate', **options):
        if not 0 < energy <= 1:
            raise ValueError(f'energy={energy} is not a share: use more than 0 and at most 1')
        self.energy, self.wanted = energy, {}
        super().__init__(params, lr, rank, moments=moments, refresh='subspace', **options)

    def look_for_basis(self, p, G, old, seed):
        """Of a basis as large as may be the columns (m, k') that hold most of G (m, n)."""
        r, k = min(self.group_of[p]['rank'], *G.shape), len(self.placeholder[p])
        if old is None:
            return orthonormal_basis(G, r)  # (m, r)
        if k < r:
            more = torch.randn(G.shape[1], r - k, generator=seeded(G, seed), device=G.device)
            old = torch.cat([old, G.float() @ more], 1)  # (m, r)
        P = orthonormal_basis(G, r, 'subspace', old)  # (m, r)
        energies = project(P, G).to(at_least_fp32(G)).square().sum(1)  # (r,)
        whole = torch.linalg.vector_norm(G, dtype=energies.dtype).square()
        held, order = energies.sort(descending=True)
        enough = ((held.cumsum(0) < self.energy * whole).sum() + 1).clamp_max(r)
        kept = order[:k].sort().values
        self.wanted[p] = torch.where(whole.isfinite() & (whole > 0), enough, k), energies[kept].argsort(descending=True)
        return P[:, kept].contiguous()

    def basis_turned(self, p, new, old, P, G):
        super().basis_turned(p, new, old, P, G)
        room = torch.tensor(P.shape[1], device=P.device), torch.arange(P.shape[1], device=P.device)
        new['dims'], new['order'] = self.wanted.pop(p, room)  # of the process that made P, which hands them out, too

    def advance(self, p, G=None):
        super().advance(p, G)
        state = self.state[p]
        if 'dims' in state and self.is_due(p):
            k, order = state.pop('dims'), state.pop('order')
            if type(k) is torch.Tensor and k.item() != len(order):  # a plan's tensors have no value
                self.resize(p, k.item(), order)

    def resize(self, p, k, order):
        """The first k of this order stay of p's P, M and V; or random columns come to P, which the refresh that follows
        replaces, with no momentum and the others' mean V."""
        state, kept, more = self.state[p], order[:k].sort().values, max(k - len(order), 0)
        P, *moments = (read_state(state, name) if name != 'P' else self.decoded(p, state) for name in 'PMV')
        P, (M, V) = P[:, kept], (t[kept.to(t.device)] for t in moments)  # (m, k), (k, n)
        if more:
            generator = seeded(P, self.random_seed(p, state['step']))
            noise = torch.randn(len(P), more, generator=generator, device=P.device)
            P = torch.cat([P, torch.linalg.qr(torch.cat([P.float(), noise], 1))[0][:, -more:].to(P.dtype)], 1)  # (m, k)
            M, V = torch.cat([M, 0 * M[:1].expand(more, -1)]), torch.cat([V, V.mean(0).expand(more, -1)])  # (k, n)
        for name in MOMENTS:
            state.pop(name, None)
        make_moments(state, M, self.state_bits)
        for name, moment in (('M', M), ('V', V)):
            write_state(state, name, moment) if name + '_absmax' in state else state.update({name: moment})
        state['rank'] = k
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

    rank = 128  # r: dimensions of the subspace at the start, and at most
    update_proj_gap = 200  # T: steps between two refreshes of a layer's subspace
    scale = 0.25  # factor on the update that comes back from the subspace
    energy = 0.98  # share of |G|^2 that a layer's columns must hold; so many there are, up to r
    proj_type = 'std'  # 'std' | 'paper' | 'right': P stands on the shorter side, of square matrices on that of the
    #                    inputs; or on that of the outputs; or of all matrices on the inputs' side
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
