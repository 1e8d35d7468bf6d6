"""
GaLore: full-parameter training with Adam's moments in a low-rank subspace of the gradient (2403.03507).

A weight W (m x n, m <= n; a tall one is handled as its transpose) has the gradient G. Every T steps P becomes the r
directions of R^m in which G is largest; between those steps Adam runs on R, the r x n shadow of G, and its step is
carried back and added to the full W:

    every T steps:  P = top r left singular vectors of G                     # (m, r)
    R = P.T @ G                                                              # (r, n)
    N = Adam(R)                                                              # (r, n), moments too
    W = W - lr scale P @ N                                                   # (m, n)

Memory: P (m r) and two moments (2 n r) instead of 2 m n. For LLaMA-7B and r = 1024 that is 65 % less optimizer state.
Speed: G = delta.T @ x, a product of a layer's output gradients and inputs, so R = (delta @ P).T @ x, which is fewer
operations than G alone. In layers that were handed to `attach` G never exists between two refreshes of P: a step takes
0.94 of AdamW's at 130m and 0.91 at 1b (results/bench.md). A new P improves the old one by one step of subspace
iteration (`refresh='subspace'`; 'svd' is the paper's), and the layers take turns, so that no step stalls.
Not for: models whose embeddings are most of the weights (60m: 56 %), since those are trained by plain Adam.

Its descendants are options: bases in 8 or 4 bits, weights in 8, refreshes only where the subspace still turns
(Q-GaLore), the residual outside the subspace (Fira), Adam in a random subspace that only scales G (APOLLO).

    python train.py config/galore_laptop.py                                                      # ours
    optimizer = GaLoreAdamW([{'params': matrices}, {'params': others, 'rank': 0}], rank=128)     # in any other loop
    optimizer.attach(linears)                                                # there, too: never form G in these modules
"""

import math
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from adam import (
    BLOCK,
    AdamW,
    adam_direction,
    add_,
    average_,
    decode,
    encode,
    load,
    product_dtype,
    several_processes,
    split_decay,
    store,
    weakly,
)

GROWTH = 1.01  # the most by which a limited update's norm may grow from one step to the next (Fira, APOLLO)

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


def projected_gradient(delta, x, P, tall):
    """R (r, n) = P.T @ G without G (m, n): by associativity, P.T @ (delta.T @ x) = (delta @ P).T @ x, exactly.

    delta (N, out): output gradients of a linear layer, x (N, in): its inputs, N tokens. A tall weight, out > in, is
    projected from the other side: P.T @ G.T = (x @ P).T @ delta."""
    P = P.to(delta.dtype)  # (m, r)
    return (x @ P).T @ delta if tall else (delta @ P).T @ x  # (r, n)


class Projected(torch.autograd.Function):
    """y = x @ W.T, whose backward gives R to R's placeholder, or, handed the weight in its place, G to the weight.

    The optimizer is asked for W and P when they are needed, so that one kept in few bits is whole only here."""

    @staticmethod
    def forward(ctx, x, placeholder, module, optimizer, needs_G):
        ctx.save_for_backward(x)
        ctx.module, ctx.optimizer, ctx.needs_G, ctx.dtype = module, optimizer, needs_G, placeholder.dtype
        return F.linear(x, optimizer.weight(module.weight).to(x.dtype))  # (..., out)

    @staticmethod
    def backward(ctx, delta):
        (x,), p = ctx.saved_tensors, ctx.module.weight
        dx = delta @ ctx.optimizer.weight(p).to(delta.dtype) if ctx.needs_input_grad[0] else None  # (..., in)
        delta, x = delta.flatten(0, -2), x.flatten(0, -2)  # (N, out), (N, in)
        if ctx.needs_G:
            return dx, (delta.T @ x).to(ctx.dtype), None, None, None
        R = projected_gradient(delta, x, ctx.optimizer.basis(p), p.shape[0] > p.shape[1])  # (r, n)
        return dx, R.to(ctx.dtype), None, None, None


def turned(M, V, Q, betas, t):
    """Adam's moments M, V (r, n) after t steps, in the coordinates of a new basis: Q (r, r) = P_new.T @ P_old.

    M turns like a gradient. V has no such rule; LDAdam (2410.16103, algorithm 2) takes what is known of the old
    coordinates, mean M and variance V - M^2, as uncorrelated, turns the two, and puts them together again."""
    fill_M, fill_V = 1 - betas[0] ** t, 1 - betas[1] ** t  # of Adam's bias correction
    mean, square = M / fill_M, V / fill_V
    mean_now = Q @ mean  # (r, n)
    square_now = (Q.square() @ (square - mean.square()) + mean_now.square()).abs_()  # (r, n)
    return mean_now * fill_M, square_now * fill_V


def limited(update, state):
    """The update, scaled down where its norm exceeds the last one's by more than GROWTH (Fira, 2410.01623, section 4.3;
    APOLLO): without a second moment of its own, one odd batch could throw the weights far off."""
    norm = update.norm()
    last = state.get('norm', norm)
    keep = torch.where((last > 0) & (norm > GROWTH * last), GROWTH * last / norm, 1.0)
    state['norm'] = norm * keep
    return update.mul_(keep)


def encode_int8(W, seed=None, scale=None):
    """W (numel divisible by `block_of`) as int8 and a scale a block. Given a seed: rounded up or down at random, right
    on average; given the scales it had: those stay, but where W outgrew them or shrank far below.

    Q-GaLore (2407.08296, section 3.3) takes new scales at every step. Then the grid moves under all weights, and each
    is thrown about by random rounding even where its update is zero; on a grid that stays, it is not."""
    blocks = W.float().reshape(-1, block_of(W))  # (numel / block, block)
    largest = blocks.abs().amax(1)
    # Room to grow; and in bf16's few bits, so that a whole number times it is exact and divides back to itself.
    fresh = (largest * 1.25 / 127).clamp_min(1e-12).bfloat16().float()
    if scale is None:
        scale = fresh
    else:
        scale = torch.where((largest > 127 * scale) | (largest < 127 / 4 * scale), fresh, scale)
    steps = blocks / scale[:, None]
    if seed is None:
        steps.round_()
    else:
        generator = torch.Generator(W.device).manual_seed(seed)
        low = steps.floor()
        steps = low + (torch.rand(steps.shape, generator=generator, device=W.device) < steps - low)
    return steps.clamp_(-127, 127).to(torch.int8).view(W.shape), scale


def decode_int8(q, scale, dtype=torch.float32):
    return (q.reshape(-1, block_of(q)).to(dtype) * scale.to(dtype)[:, None]).view(q.shape)


def block_of(W):
    """Numbers of W that share a scale: 256, or what divides its columns' number."""
    return math.gcd(W.shape[-1], BLOCK)


# ---- the optimizer -----------------------------------------------------------------------------------------------


class GaLoreAdamW(AdamW):
    """AdamW whose moments live in the subspace of P. Arguments as in adam.AdamW, and

    rank: r; a group with 'rank': 0, and any tensor that is not a matrix, is trained by plain Adam. update_proj_gap: T.
    scale: factor on the update that comes back from the subspace. refresh: 'subspace' or 'svd'. stagger: layer i of L
    has its first refresh at step i T / L; False is the paper's: all layers at steps 0, T, 2 T.
    basis_bits: 16 (P in the weight's own dtype), 8 or 4 (blockwise, as in Q-GaLore).
    lazy: a layer whose new P overlaps the old by more than this, ||P_old.T P_new||^2 / r, waits twice as long for its
    next one; one that overlaps less is back at T after that; 0: never. moments: when P turns they 'keep' their numbers
    (the paper), 'rotate' with it, or 'reset': Adam starts anew. residual: 'fira' adds the part of G outside the
    subspace, which needs the whole G of the step; 'none' leaves it out.

    Without a residual the very first P of a weight comes from the first gradient it meets, a later one from the mean
    over the whole step: otherwise the first step with accumulation would hold the full gradients of all layers."""

    def __init__(self, params, lr=1e-2, rank=128, update_proj_gap=200, scale=0.25, refresh='subspace', stagger=True,
                 basis_bits=16, lazy=0.0, moments='keep', residual='none', **adam):  # fmt: skip
        for name, value, allowed in (
            ('refresh', refresh, ('subspace', 'svd')),
            ('basis_bits', basis_bits, (16, 8, 4)),
            ('moments', moments, ('keep', 'rotate', 'reset')),
            ('residual', residual, ('none', 'fira')),
        ):
            if value not in allowed:
                choices = ', '.join(map(repr, allowed[:-1]))
                raise ValueError(f'{name}={value!r} is not known: use {choices} or {allowed[-1]!r}')
        if update_proj_gap < 1:
            raise ValueError(f'update_proj_gap={update_proj_gap} is not a number of steps: use 1 or more')
        self.T, self.refresh, self.stagger = update_proj_gap, refresh, stagger
        self.small_gradients = residual == 'none'
        self.basis_bits, self.lazy, self.moments, self.residual = basis_bits, lazy, moments, residual
        self.R = {}  # p -> a placeholder of shape (r, n) that takes no memory; its .grad is R while a step is under way
        self.attached, self.owner = set(), {}
        super().__init__(params, lr, group_defaults=dict(rank=rank, scale=scale), **adam)

    def add_param_group(self, group):
        super().add_param_group(group)
        # Layers are numbered as they come, and spread evenly over the T steps between two refreshes.
        projected = [p for group in self.param_groups for p in group['params'] if self.is_projected(p)]
        self.turn = {p: i * self.T // len(projected) if self.stagger else 0 for i, p in enumerate(projected)}
        for p in projected:
            if p not in self.R:
                r = min(self.group_of[p]['rank'], *p.shape)
                self.R[p] = torch.zeros((), dtype=p.dtype, device=p.device).expand(r, max(p.shape)).requires_grad_()

    def is_projected(self, p):
        return p.dim() == 2 and self.group_of[p]['rank'] > 0

    # ---- backward that never forms G

    def attach(self, linears):
        """From now on these nn.Linear modules, whose weights are in this optimizer, give R instead of G in backward.

        The result is that of the ordinary backward, up to rounding. With a residual, which is made from G, G stays."""
        for module in linears:
            p = module.weight
            self.attached.add(p)
            self.R[p].register_post_accumulate_grad_hook(weakly(self.R_ready))
            self.owner[self.R[p]] = p
            module.forward = partial(self.linear, module)

    def linear(self, module, x):
        """What an attached module computes: y = x @ W.T + bias."""
        p = module.weight
        if not torch.is_grad_enabled():
            y = F.linear(x, self.weight(p).to(x.dtype))
        else:
            needs_G = self.residual != 'none' or 'P' not in self.state[p] or self.is_due(p)
            y = Projected.apply(x, p if needs_G else self.R[p], module, self, needs_G)
        return y if module.bias is None else y + module.bias

    @torch.no_grad()
    def R_ready(self, R):
        """Autograd calls this when R has taken in a micro-batch."""
        if self.per_layer and self.last_micro_batch:
            self.finish(self.owner[R])

    # ---- P

    def is_due(self, p):
        """Does this step give p a new P? Known before backward."""
        return self.age(p) >= self.state[p].get('next', math.inf)

    def age(self, p):
        """Steps that p has taken; 'step' alone counts those since its moments were reset."""
        return self.state[p].get('step', 0) + self.state[p].get('before', 0)

    def basis(self, p):
        """P (m, r) as kept, or decoded."""
        state = self.state[p]
        if self.basis_bits != 4:
            return load(state, 'P')
        return decode({'': state['P'], '_absmax': state['P_absmax']}, (min(p.shape), len(self.R[p])), p.dtype)

    def keep_basis(self, p, P):
        state = self.state[p]
        if self.basis_bits == 16:
            state['P'] = P.to(p.dtype)
        elif self.basis_bits == 8:
            state['P'] = torch.empty(P.shape, dtype=torch.uint8, device=P.device)
            state['P_absmax'] = torch.empty(-(-P.numel() // BLOCK), device=P.device)
            store(state, 'P', P)
        else:
            for part, tensor in encode(P).items():
                state['P' + part] = tensor

    def new_basis(self, p, G):
        """P from G (m, n), computed once and handed to all processes, so that rounding cannot set them apart."""
        state, group = self.state[p], self.group_of[p]
        old, step = self.basis(p).float() if 'P' in state else None, self.age(p)
        P = orthonormal_basis(G, group['rank'], self.refresh, old)  # (m, r)
        if several_processes():
            dist.broadcast(P, 0)
        self.keep_basis(p, P)
        if old is None:
            state['next'] = step + (self.turn[p] or self.T)
            return
        state['next'] = step + state.get('gap', self.T)
        Q = P.T @ old  # (r, r)
        if self.moments == 'reset':  # Adam starts anew, with its bias correction
            state['before'], state['step'] = step, 0
        if self.lazy:
            state['overlap'] = Q.square().sum() / len(Q)  # 1: the same subspace, r / m: a random one
        if 'M' in state and self.moments != 'keep':
            with self.moments_at_hand(p):
                M, V = load(state, 'M'), load(state, 'V')
                new_M, new_V = turned(M, V, Q, group['betas'], step) if self.moments == 'rotate' else (0 * M, 0 * V)
                for name, old, new in (('M', M, new_M), ('V', V, new_V)):
                    store(state, name, old.copy_(new))

    def be_lazy(self, p):
        """When p's next refresh has come: put it off where the last one found the subspace hardly turned. The one place
        where a number is read from the device, long after it was computed."""
        state = self.state[p]
        if self.age(p) == state['next'] and 'overlap' in state:
            gap, calm = state.get('gap', self.T), float(state.pop('overlap')) > self.lazy
            state['next'] += gap if calm else 0
            state['gap'] = 2 * gap if calm else self.T

    # ---- from gradient to R

    def fold(self, p):
        """R += P.T @ G, and G is dropped. Exact under accumulation, since P stays the same between refreshes."""
        if p.grad is None:
            return
        if 'P' not in self.state[p] or self.is_due(p):
            self.new_basis(p, wide(average_(p.grad)))
        G, P, placeholder = wide(p.grad), self.basis(p), self.R[p]
        dtype = product_dtype(G)
        R = (P.T.to(dtype) @ G.to(dtype)).to(p.dtype)  # (r, n)
        placeholder.grad = R if placeholder.grad is None else placeholder.grad + R
        p.grad = None

    @torch.no_grad()
    def gradient_ready(self, p):
        if not self.is_projected(p) or self.residual != 'none':
            return super().gradient_ready(p)
        if 'P' not in self.state[p]:
            self.new_basis(p, wide(p.grad))
        # A layer that is due keeps its full gradient until the step's last micro-batch; no other one ever does.
        if (self.per_layer or p in self.attached) and (self.last_micro_batch or not self.is_due(p)):
            self.fold(p)
        if self.per_layer and self.last_micro_batch:
            self.finish(p)

    def has_gradient(self, p):
        return p.grad is not None or (p in self.R and self.R[p].grad is not None)

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for placeholder in self.R.values():
            placeholder.grad = None

    def take(self, p):
        if not self.is_projected(p) or self.residual != 'none':
            return super().take(p)
        self.fold(p)
        R, self.R[p].grad = self.R[p].grad, None
        return self.count(average_(R))

    # ---- the step

    def update(self, p, R):
        """One step of algorithm 2 on p; R (r, n), or G (m, n) where there is a residual."""
        if not self.is_projected(p):
            return super().update(p, R)
        group, state = self.group_of[p], self.state[p]
        dtype = product_dtype(p)
        if self.residual == 'fira':
            G = wide(R).to(dtype)  # (m, n)
            if 'P' not in state or self.is_due(p):
                self.new_basis(p, G)
            R = self.basis(p).T.to(dtype) @ G  # (r, n)
        seed = self.random_seed(p, self.age(p))
        N = adam_direction(R, state, group['betas'], group['eps'], self.state_bits, seed)  # (r, n)
        P = self.basis(p).to(dtype)  # (m, r)
        if self.residual == 'fira':  # Adam would turn column R_j into N_j: let it lengthen the rest of column j as much
            S = G - P @ R  # (m, n)
            phi = N.norm(dim=0) / R.norm(dim=0).clamp_min(1e-12)  # (n,)
            U = P @ N.to(dtype) + limited(S * phi.to(dtype), state)  # (m, n)
            self.move(p, p, group['scale'] * (U if p is wide(p) else U.T), self.age(p))
        elif p.dtype == torch.float32 and 'W' not in state:  # in one product, without the m x n update
            lr = group['lr']
            wide(p).addmm_(P, N.mul_(group['scale']), beta=1 - lr * group['weight_decay'], alpha=-lr)
        else:  # some rows at a time
            left, right = (P, N.to(dtype)) if p is wide(p) else (N.T.to(dtype), P.T)
            rows = max((1 << 22) // p.shape[1], 1)
            for row in range(0, len(p), rows):
                part = group['scale'] * (left[row : row + rows] @ right)  # (rows, p's columns)
                self.move(p, p[row : row + rows], part, self.age(p), row)
        self.be_lazy(p)

    # ---- weights in 8 bits

    def weight(self, p):
        """W, decoded where it is kept in 8 bits: then the parameter itself is a placeholder that takes no memory."""
        state = self.state[p]
        return decode_int8(state['W'], state['W_scale'], p.dtype) if 'W' in state else p

    def move(self, p, W, N, step, row=0):
        state, group = self.state[p], self.group_of[p]
        if 'W' not in state:
            return super().move(p, W, N, step, row)
        per_row = state['W_scale'].numel() // len(p)
        q, scale = state['W'][row : row + len(W)], state['W_scale'][row * per_row : (row + len(W)) * per_row]
        exact = decode_int8(q, scale)
        add_(exact, N, group['lr'], group['weight_decay'], 0)
        new_q, new_scale = encode_int8(exact, self.random_seed(p, step, row), scale)
        q.copy_(new_q)
        scale.copy_(new_scale)


class ApolloAdamW(AdamW):
    """APOLLO (2412.05270): Adam in a random subspace tells only how long each column of the full gradient should be.

        P = random, N(0, 1/r), another one every T steps                         # (m, r), made from a seed, never kept
        R = P.T @ G,  N = Adam(R)                                                # (r, n)
        s_j = |N_j| / |R_j| for each column j                                    # (n,); Mini: one s for the tensor
        W = W - lr scale limited(G s)                                            # (m, n)

    No SVD and no P in memory, but the full G of each weight: per_layer keeps one at a time, unless micro-batches
    accumulate. Arguments as in adam.AdamW; rank, update_proj_gap, scale as in GaLoreAdamW; tensorwise: APOLLO-Mini,
    which is meant for rank 1 and scale sqrt(128)."""

    def __init__(self, params, lr=1e-2, rank=128, update_proj_gap=200, scale=1.0, tensorwise=False, **adam):
        if update_proj_gap < 1:
            raise ValueError(f'update_proj_gap={update_proj_gap} is not a number of steps: use 1 or more')
        self.T, self.tensorwise = update_proj_gap, tensorwise
        super().__init__(params, lr, group_defaults=dict(rank=rank, scale=scale), **adam)

    def update(self, p, G):
        group, state = self.group_of[p], self.state[p]
        if p.dim() != 2 or not group['rank']:
            return super().update(p, G)
        G = wide(G).float()  # (m, n)
        m, r = len(G), min(group['rank'], len(G))
        generator = torch.Generator(G.device).manual_seed(self.random_seed(p, state.get('step', 0) // self.T))
        P = torch.randn(m, r, generator=generator, device=G.device) / r**0.5  # (m, r)
        R = P.T @ G  # (r, n)
        seed = self.random_seed(p, state.get('step', 0))
        N = adam_direction(R, state, group['betas'], group['eps'], self.state_bits, seed)  # (r, n)
        dim = None if self.tensorwise else 0
        s = torch.linalg.vector_norm(N, dim=dim) / torch.linalg.vector_norm(R, dim=dim).clamp_min(1e-12)  # (n,) or ()
        U = limited(G * s, state).mul_(group['scale'])  # (m, n)
        self.move(p, p, U if p is wide(p) else U.T, state['step'])


def setup(model, config):
    """What train.py calls for method='galore', 'apollo' and 'apollo_mini': the blocks' Linear layers in the subspace,
    all else by plain Adam."""
    linears = [module for module in model.layers.modules() if isinstance(module, torch.nn.Linear)]
    chosen = {id(module.weight) for module in linears}
    others = split_decay(p for p in model.parameters() if id(p) not in chosen)
    int8 = []
    if config.weight_bits == 8 and (config.method != 'galore' or config.compile):
        raise ValueError("weight_bits=8 is built into method='galore' without compile: use weight_bits=16")
    if config.weight_bits == 8:  # one after another, so that no second copy of the model exists
        for module in linears:
            W = module.weight
            int8.append(dict(zip(('W', 'W_scale'), encode_int8(W.detach()))))
            module.weight = torch.nn.Parameter(torch.zeros((), dtype=W.dtype, device=W.device).expand(W.shape))
    common = dict(
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        rank=config.rank,
        update_proj_gap=config.update_proj_gap,
        scale=config.scale,
        state_bits=config.state_bits,
        grad_clip=config.grad_clip,
        per_layer=config.per_layer,
        offload=config.offload,
        seed=config.seed,
    )
    groups = [{'params': [module.weight for module in linears]}, *({**group, 'rank': 0} for group in others)]
    if config.method != 'galore':
        return ApolloAdamW(groups, tensorwise=config.method == 'apollo_mini', **common)
    optimizer = GaLoreAdamW(
        groups,
        refresh=config.refresh,
        stagger=config.stagger,
        basis_bits=config.basis_bits,
        lazy=config.lazy,
        moments=config.moments,
        residual=config.residual,
        **common,
    )
    for module, state in zip(linears, int8):
        optimizer.state[module.weight].update(state)
        module.dense_weight = partial(optimizer.weight, module.weight)
    # torch.compile has its own backward, in which layers cannot change from R to G and back without compiling anew.
    if not config.compile:
        optimizer.attach(linears)
    return optimizer
