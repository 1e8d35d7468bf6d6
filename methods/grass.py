"""
Grass: GaLore whose subspace is a choice of rows of the gradient (2406.17660).

    every T steps:  S = the r rows of G (m, n) that are longest              # P (m, r) has a single 1 in each column
    R = G[S]                                                                 # (r, n) = P.T @ G
    N = Adam(R)                                                              # (r, n), its moments new where S is
    W[S] = W[S] - lr (scale N + weight_decay W[S])                           # the other rows of W stay as they are

choose='norm' draws the rows without replacement, the odds in proportion to their lengths: 'top' may never leave some
of them a turn. A tall W is handled as its transpose, so its columns are chosen. The moments start anew with S, as the
paper has them, unless S is all rows; its factor 1 / sqrt(r odds) of drawn rows is left out, which Adam would undo.

Memory: 2 r n numbers and r row numbers, where GaLore has 2 r n + m r. Time: G[S] = delta[:, S].T @ x, r / m of the
product for G, and no product with P anywhere. In attached layers G never exists between two choices.
Not for: a small r. In a step r / m of the rows move, GaLore's move all.

    python train.py config/grass_laptop.py
"""

import torch

import adam
import galore
from adam import at_least_fp32, is_finite
from galore import GaLoreAdamW, linears_of


class Rows:
    """P (m, r) with a 1 in row rows[j] of column j, as r numbers. It takes part in the two products that GaLore makes
    of a gradient, A @ P and P.T @ A, where T is Rows itself."""

    def __init__(self, rows):
        self.rows, self.T = rows, self

    def to(self, dtype):
        return self

    def __rmatmul__(self, A):
        return A.index_select(-1, self.rows)  # (..., r)

    def __matmul__(self, A):
        return A.index_select(0, self.rows)  # (r, n)


class GrassAdamW(GaLoreAdamW):
    """Arguments as in galore.GaLoreAdamW, but for what is of a dense P; choose: 'top' or 'norm'."""

    def __init__(self, params, lr=1e-3, rank=None, update_proj_gap=200, scale=1.0, proj_type='std', choose='top',
                 stagger=True, **adam):  # fmt: skip
        if choose not in ('top', 'norm'):
            raise ValueError(f"choose={choose!r} is not known: use 'top' or 'norm'")
        self.choose = choose
        super().__init__(params, lr, rank, update_proj_gap, scale, proj_type, 'subspace', stagger, 16, 'reset', **adam)

    def new_basis(self, p, G, mine=True):
        """New rows for p, by its gradient G (m, n), pending until the step is taken. They cost little: all make them,
        and the one whose G it is hands its own out."""
        state, T, earlier = self.state[p], self.group_of[p]['update_proj_gap'], self.pending.get(p)
        good, step = is_finite(G), state.get('step', 0)
        score = torch.linalg.vector_norm(G, dim=1, dtype=at_least_fp32(G)).nan_to_num(0.0, 0.0)  # (m,)
        if self.choose == 'norm':  # the r largest of length / exponential noise are drawn one after another
            generator = torch.Generator(G.device).manual_seed(self.random_seed(p, step, 'rows'))
            noise = torch.rand(score.shape, generator=generator, dtype=score.dtype, device=score.device)
            score /= -noise.clamp_min_(1e-30).log_()
        S = score.topk(len(self.placeholder[p])).indices.sort().values  # (r,)
        S = torch.where(good, S, state['P']) if 'P' in state else S
        if earlier:  # of this step, in a loop without the flag, or of one that was not taken
            S = torch.where(self.sound.pop(p), earlier['P'], S)
        self.pending[p] = {'P': S, 'next': step + (T if 'P' in state else self.offset[p] or T)}
        if 'P' in state and len(S) < len(G):
            self.pending[p]['Q'] = S  # the moments are reset

    def decoded(self, p, state):
        return Rows(state['P'])

    def add_projected(self, p, P, N):
        side = int(self.right[p])
        W = p.index_select(side, P.rows)  # (r, n), or its transpose
        self.move(p, W, self.group_of[p]['scale'] * (N.T if side else N))
        p.index_copy_(side, P.rows, W)


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options:
    """What --method=grass adds to train.py's keys."""

    rank = 128  # r: rows of each matrix that are trained at a time, or columns where these are fewer
    update_proj_gap = 200  # T: steps between two choices of a layer's rows
    scale = 1.0  # factor on the update of these rows
    choose = 'top'  # 'top' | 'norm': the rows of the longest gradient, or rows at random by its length
    proj_type = 'std'  # 'std' | 'paper' | 'right': of square matrices choose columns, each an input; or rows; or of all
    #                    matrices columns
    stagger = True  # layers choose in turns, so that no step has all full gradients; False: all in the same step


FIXED = ('rank', 'proj_type')
problems = galore.problems


def setup(model, config):
    """What train.py calls for method='grass'."""
    linears = linears_of(model, config)
    own = {name: getattr(config, name) for name in vars(Options) if not name.startswith('_')}
    optimizer = GrassAdamW(galore.groups(model, linears), **own, **adam.common(config))
    optimizer.attach(linears)
    return optimizer
