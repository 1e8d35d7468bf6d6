"""
Muon: the momentum of a matrix, orthogonalised, for the blocks; AdamW for embedding, head and vectors (Jordan, 2024).

    M = mu M + G                                                             # (m, n): heavy ball, without Nesterov
    O = U @ V.T of M = U S V.T, by Newton-Schulz, 5 times from X = M / |M|:  # all singular values become about 1
        A = X @ X.T,  X = a X + (b A + c A @ A) @ X                          # (m, m), (m, n), m <= n
    W = (1 - lr weight_decay) W - lr 0.2 sqrt(n) O                           # (m, n)

The factor makes the root mean square of a step 0.2, which is AdamW's (2502.16982), so that its learning rate and decay
carry over. row_norm: first each row of O to one length (Muon+). Memory: 4 bytes a weight instead of 8, or 1 with
state_bits=8. Time: 10 m m n + 5 m^3 multiplications a matrix, which more tokens a step make cheap.
M is linear in G, so under per_layer it takes in each micro-batch inside backward: accumulation keeps no gradient beside
it. What it took in of a step that is then dropped, or of one with a NaN, stays in M; W does not move. The log's
grad_norm is then the root of the micro-batches' summed squares. 8 bits round M once a micro-batch there.
Not for: full fine-tuning of what Adam has pretrained, where Muon loses quality (2605.10468). From scratch, or on the
factors of LoRA, it takes fewer steps than a tuned AdamW.

    python train.py config/muon_laptop.py
    optimizer = MuonAdamW([{'params': matrices}, {'params': others, 'use_muon': False}], lr=2e-3)  # in any other loop
"""

import adam
from adam import AdamW, heavy_ball, is_finite, pieces, product_dtype, split_decay, zero_unless_
from galore import linears_of

QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c: steep at 0, and all within 0.7 to 1.2 after five times


def orthogonalise(M, times=5):
    """Nearly U @ V.T of M (m, n) = U S V.T, in the dtype that matrices like M multiply in; of zeros, zeros."""
    (a, b, c), tall = QUINTIC, len(M) > M.shape[1]
    X = M.T if tall else M  # (m, n), m <= n
    X = X / X.norm().clamp_min(1e-7)
    for _ in range(times):
        A = X @ X.T  # (m, m)
        X = (A.mul(b).addmm_(A, A, alpha=c) @ X).add_(X, alpha=a)  # (m, n)
    return X.T if tall else X


class MuonAdamW(AdamW):
    """Arguments as in adam.AdamW, and

    momentum: mu. use_muon: False for matrices that AdamW is to train, as it does all that is no matrix. Both are keys
    of a group. row_norm: Muon+."""

    def __init__(self, params, lr=2e-3, momentum=0.95, row_norm=False, **adam):
        self.row_norm = row_norm
        self.begun = {}  # p -> summed squares of the micro-batches of this step that are in its M already
        super().__init__(params, lr, group_defaults=dict(momentum=momentum, use_muon=True), **adam)

    def is_orthogonal(self, p):
        return p.dim() == 2 and self.group_of[p]['use_muon']

    def gather(self, p, G):
        """M takes in a gradient of p, the first of a step or one more. -> M, fp32."""
        keep = 1.0 if p in self.begun else self.group_of[p]['momentum']
        return heavy_ball(self.state[p], G, keep, self.state_bits)

    def gradient_ready(self, p):
        """p has its gradient of one more micro-batch, which under per_layer M takes in at once."""
        if self.per_layer and not self.last_micro_batch and self.is_orthogonal(p):
            G = self.take_gradient(p)
            zero_unless_(is_finite(G), G)
            with self.moments_at_hand(p):
                self.gather(p, G)
            self.begun[p] = self.squares.pop(p)  # of this micro-batch and of those before
        super().gradient_ready(p)

    def take_gradient(self, p):
        G = super().take_gradient(p)
        if p in self.begun:  # if one of them was not finite, neither is this sum, and W stays where it is
            self.squares[p] = self.squares[p] + self.begun[p]
        return G

    def update(self, p, G):
        """The equations at the top of this file, for p and its gradient G, or the last micro-batch's."""
        if not self.is_orthogonal(p):
            return super().update(p, G)
        O, state = orthogonalise(self.gather(p, G).to(product_dtype(p))), self.state[p]  # (rows, columns)
        self.begun.pop(p, None)
        if self.row_norm:
            O = O / O.norm(dim=1, keepdim=True).clamp_min(1e-7)  # |O|^2 is p's rows now, not its shorter side
        O = O * (0.2 * (p.shape[1] if self.row_norm else max(p.shape)) ** 0.5) * (1 - state.get('skip', 0))
        for row, W, part, _ in pieces(p, O, {}):
            self.move(p, W, part, row)

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        self.begun = {}


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options:
    """What --method=muon adds to train.py's keys."""

    momentum = 0.95  # mu: share of the momentum that stays in each step
    row_norm = False  # each row of the orthogonalised momentum to one length (Muon+)


FIXED = ()


def problems(config):
    """What does not go together, a sentence each."""
    from configurator import between

    return between(config, 0, 0.9999, 'momentum') + adam.no_clip_per_layer(config)


def setup(model, config):
    """What train.py calls for method='muon': Muon for the blocks' matrices, AdamW for all else."""
    matrices = [module.weight for module in linears_of(model, config)]
    chosen = {id(p) for p in matrices}
    others = split_decay(p for p in model.parameters() if id(p) not in chosen)
    groups = [{'params': matrices}, *({**group, 'use_muon': False} for group in others)]
    return MuonAdamW(groups, momentum=config.momentum, row_norm=config.row_norm, **adam.common(config))
