"""
GaLore: full-parameter training with Adam's moments in a low-rank subspace of the gradient (2403.03507).

A weight W (m x n, m <= n; a tall one is handled as its transpose) has the gradient G. Every T steps P becomes the r
directions of R^m in which G is largest; between those steps Adam runs on R, the r x n shadow of G, and its step is
carried back and added to the full W:

    every T steps:  P = top r left singular vectors of G                     # (m, r)
    R = P.T @ G                                                              # (r, n)
    N = Adam(R)                                                              # (r, n), moments too
    W = W - lr scale P @ N                                                   # (m, n)

Memory: P (m r) and two moments (2 n r) instead of 2 m n. For LLaMA-7B and r = 1024 that is 65 % less optimizer state,
and with per_layer=True the gradients, as large as the weights, never exist together.
Cost: two thin products a step, and the new P. `refresh='svd'` is the paper's; `refresh='subspace'` improves the old P
by one step of subspace iteration, many times cheaper, and the layers take turns, so that no step stalls.
Not for: models whose embeddings are most of the weights (60m: 56 %), since those are trained by plain Adam.

    python train.py config/galore_laptop.py                                                      # ours
    optimizer = GaLoreAdamW([{'params': matrices}, {'params': others, 'rank': 0}], rank=128)     # in any other loop
"""

import torch
import torch.distributed as dist

from adam import AdamW, adam_direction, average_, several_processes, split_decay

# ---- pure functions of tensors -----------------------------------------------------------------------------------


def orthonormal_basis(G, rank, refresh='subspace', previous=None):
    """P (m, r) with orthonormal columns, spanning (nearly) the top r left singular directions of G (m, n). fp32.

    'svd': exactly those (GaLore, algorithm 2). 'subspace': one step of subspace iteration from `previous`, the old P,
    which alone holds half of the SVD's share of G on real gradients, and after the step 99.9 % (results/bench.md).
    Without a previous P, from a random sketch of G's columns (Halko et al., 0909.4061, algorithm 4.4 with one
    iteration). r is at most min(m, n)."""
    G = G.float()
    m, n = G.shape
    r = min(rank, m, n)
    if refresh == 'svd':
        U, _, _ = torch.linalg.svd(G, full_matrices=False)
        return U[:, :r].contiguous()  # a copy: a view would keep all of U alive
    if previous is None:
        generator = torch.Generator(G.device).manual_seed(0)
        previous = torch.linalg.qr(G @ torch.randn(n, r, generator=generator, device=G.device))[0]  # (m, r)
    P, R = torch.linalg.qr(G @ (G.T @ previous.float()))  # (m, r), (r, r)
    # QR leaves each column's sign open. A positive diagonal makes it that of the old column, on which the moments rest.
    return (P * torch.where(R.diagonal() < 0, -1.0, 1.0)).contiguous()  # (m, r)


def wide(G):
    """A view of G with at most as many rows as columns, so that P always stands on the left and on the smaller side."""
    return G if G.shape[0] <= G.shape[1] else G.T


# ---- the optimizer -----------------------------------------------------------------------------------------------


class GaLoreAdamW(AdamW):
    """AdamW whose moments live in the subspace of P. Arguments as in adam.AdamW, and

    rank: r; a group with 'rank': 0, and any tensor that is not a matrix, is trained by plain Adam. update_proj_gap: T.
    scale: factor on the update that comes back from the subspace. refresh: 'subspace' or 'svd'. stagger: refresh layer
    i of L at steps i T / L + k T; False is the paper's: all layers at steps 0, T, 2 T.

    The very first P of a weight comes from the first gradient it meets, a later one from the mean over the whole step:
    otherwise the first step with accumulation would hold the full gradients of all layers."""

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, rank=128, update_proj_gap=200,
                 scale=0.25, refresh='subspace', stagger=True, state_bits=32, grad_clip=0.0, per_layer=False,
                 seed=0):  # fmt: skip
        if refresh not in ('subspace', 'svd'):
            raise ValueError(f"refresh='{refresh}' is not a way to make P: use 'subspace' or 'svd'")
        if update_proj_gap < 1:
            raise ValueError(f'update_proj_gap={update_proj_gap} is not a number of steps: use 1 or more')
        self.T, self.refresh, self.stagger = update_proj_gap, refresh, stagger
        self.R = {}  # p -> its projected gradient, while a step is under way
        super().__init__(
            params, lr, betas, eps, weight_decay, state_bits, grad_clip, per_layer, seed, rank=rank, scale=scale
        )

    def add_param_group(self, group):
        super().add_param_group(group)
        # Layers are numbered as they come, and spread evenly over the T steps between two refreshes.
        projected = [p for group in self.param_groups for p in group['params'] if self.is_projected(p)]
        self.turn = {p: i * self.T // len(projected) if self.stagger else 0 for i, p in enumerate(projected)}

    def is_projected(self, p):
        return p.dim() == 2 and self.group_of[p]['rank'] > 0

    def is_due(self, p):
        """Does this step give p a new P? Known before backward."""
        step = self.state[p].get('step', 0)
        return step > 0 and (step - self.turn[p]) % self.T == 0

    def new_basis(self, p, G):
        """P from G (m, n), computed once and handed to all processes, so that rounding cannot set them apart."""
        P = orthonormal_basis(G, self.group_of[p]['rank'], self.refresh, self.state[p].get('P')).to(p.dtype)
        if several_processes():
            dist.broadcast(P, 0)
        self.state[p]['P'] = P

    def project(self, p):
        """R += P.T @ G, and G is dropped. Exact under accumulation, since P stays the same between refreshes."""
        P, G = self.state[p]['P'], wide(p.grad)
        dtype = torch.float32 if G.device.type == 'cpu' else G.dtype
        R = (P.T.to(dtype) @ G.to(dtype)).float()  # (r, n)
        if p in self.R:
            R += self.R[p]
        # Between micro-batches the sum takes the gradient's own dtype: at 7B that is 3 GB instead of 6.
        self.R[p] = R if self.last_micro_batch else R.to(G.dtype)
        p.grad = None

    @torch.no_grad()
    def gradient_ready(self, p):
        if not self.is_projected(p):
            return super().gradient_ready(p)
        if 'P' not in self.state[p]:
            self.new_basis(p, wide(p.grad))
        if self.per_layer:
            if not self.is_due(p):
                self.project(p)  # a layer that is due keeps its full gradient until the step's last micro-batch
            if self.last_micro_batch:
                self.finish(p)

    def has_gradient(self, p):
        return p.grad is not None or p in self.R

    def take(self, p):
        if not self.is_projected(p):
            return super().take(p)
        if self.is_due(p):
            self.new_basis(p, wide(average_(p.grad)))
            self.project(p)
            return self.count(self.R.pop(p))
        if p.grad is not None:
            self.project(p)
        return self.count(average_(self.R.pop(p)))

    def update(self, p, R):
        if not self.is_projected(p):
            return super().update(p, R)
        group, state = self.group_of[p], self.state[p]
        N = adam_direction(R, state, group['betas'], group['eps'], self.state_bits)  # (r, n)
        dtype = torch.float32 if p.device.type == 'cpu' else p.dtype
        update = group['scale'] * (state['P'].to(dtype) @ N.to(dtype))  # (m, n)
        self.move(p, p, update if update.shape == p.shape else update.T, state['step'])


def setup(model, config):
    """What train.py calls for method='galore': the blocks' Linear layers in the subspace, all else by plain Adam."""
    linears = [module.weight for module in model.layers.modules() if isinstance(module, torch.nn.Linear)]
    chosen = set(linears)
    others = split_decay(p for p in model.parameters() if p not in chosen)
    return GaLoreAdamW(
        [{'params': linears}, *({**group, 'rank': 0} for group in others)],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        rank=config.rank,
        update_proj_gap=config.update_proj_gap,
        scale=config.scale,
        refresh=config.refresh,
        stagger=config.stagger,
        state_bits=config.state_bits,
        grad_clip=config.grad_clip,
        per_layer=config.per_layer,
        seed=config.seed,
    )
