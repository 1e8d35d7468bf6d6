"""
GaLore: full-parameter training with Adam's moments in a low-rank subspace of the gradient (2403.03507).

A weight W (m x n, m <= n; a tall or square one is its transpose here) has the gradient G. Every T steps P becomes the r
directions of R^m in which G is largest; between those steps Adam runs on R, the r x n shadow of G, and its step is
carried back and added to the full W:

    every T steps:  P = top r left singular vectors of G                     # (m, r)
    R = P.T @ G                                                              # (r, n)
    N = Adam(R)                                                              # (r, n), moments too
    W = W - lr scale P @ N                                                   # (m, n)

Memory: P (m r) and two moments (2 n r) instead of 2 m n. For LLaMA-7B and r = 1024 that is 65 % less optimizer state.
Speed: G = delta.T @ x, a product of a layer's output gradients and inputs, so R = (delta @ P).T @ x, which takes fewer
operations than G alone. In layers that were handed to `attach`, G never exists between two refreshes of P: a step takes
0.94 of AdamW's at 130m and 0.91 at 1b (results/bench.md). A refresh improves the old P by one step of subspace
iteration (`refresh='subspace'`; 'svd' is the paper's), and the layers take turns, so that no step stalls.
Not for: models whose embeddings are most of the weights (60m: 56 %), since those are trained by plain Adam.

    python train.py config/galore_laptop.py                                                      # in train.py
    optimizer = GaLoreAdamW([{'params': matrices}, {'params': others, 'rank': 0}], rank=128)     # in any other loop
    optimizer.attach(linears)                                                # there, too: never form G in these modules
"""

import math
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

import adam
from adam import (
    BLOCK,
    AdamW,
    adam_direction,
    hand_out_,
    is_finite,
    product_dtype,
    read_state,
    several_processes,
    write_state,
    zero_unless_,
)

# ---- pure functions of tensors -----------------------------------------------------------------------------------


def project(P, G):
    """R (r, n) = P.T @ G, the shadow of G (m, n) in the subspace that the columns of P (m, r) span."""
    dtype = product_dtype(G)
    return P.T.to(dtype) @ G.to(dtype)  # (r, n)


def project_back(P, N, into=None, keep=1.0, times=1.0):
    """P @ N (m, n) from P (m, r), N (r, n); or, given a matrix (m, n): into <- keep * into + times * P @ N, in place
    and without a second m x n matrix."""
    if into is None:
        return P @ N  # (m, n)
    return into.addmm_(P, N, beta=keep, alpha=times)


def project_factors(P, delta, x, right=False):
    """R (r, n) = P.T @ G without G (m, n): by associativity, P.T @ (delta.T @ x) = (delta @ P).T @ x, exactly.

    delta (N, out): output gradients of a linear layer, x (N, in): its inputs, N tokens. right: P stands on the side of
    the inputs, P.T @ G.T = (x @ P).T @ delta."""
    P = P.to(delta.dtype)  # (m, r)
    return (x @ P).T @ delta if right else (delta @ P).T @ x  # (r, n)


def orthonormal_basis(G, rank, refresh='subspace', previous=None, seed=0):
    """P (m, r) with orthonormal columns, spanning (nearly) the top r left singular directions of G (m, n). fp32.

    'svd': exactly those (GaLore, algorithm 2). 'subspace': one step of subspace iteration from `previous`, the old P.
    The old P alone holds half of what the SVD holds of G on real gradients, after the step it is 99.9 %
    (results/bench.md). Without a previous P, from a random sketch of G's columns (Halko et al., 0909.4061, algorithm
    4.4 with one iteration). 'sara': r of all singular directions, drawn without replacement with odds as their singular
    values, the largest first, so that no direction stays out for good (2502.05790). 'random': any r dimensions, blind
    to G: what the others have to beat. r is at most min(m, n)."""
    G = G.float()
    m, n = G.shape
    r = min(rank, m, n)
    if refresh in ('svd', 'sara'):
        U, S, _ = torch.linalg.svd(G, full_matrices=False)
        if refresh == 'sara':  # the first r to arrive, if i arrives at a random time whose mean is 1 / S_i
            times = torch.rand(len(S), generator=seeded(G, seed), device=S.device).log_() / -S.clamp_min(1e-12)
            U = U[:, times.topk(r, largest=False).indices.sort().values]
        # A copy: a view would keep all of U alive, and contiguous() makes none of a single column.
        return U[:, :r].clone(memory_format=torch.contiguous_format)  # (m, r)
    if refresh == 'random':
        return torch.linalg.qr(torch.randn(m, r, generator=seeded(G, seed), device=G.device))[0]  # (m, r)
    if previous is None:
        previous = torch.linalg.qr(G @ torch.randn(n, r, generator=seeded(G, 0), device=G.device))[0]  # (m, r)
    P, R = torch.linalg.qr(G @ (G.T @ previous.float()))  # (m, r), (r, r)
    # QR leaves each column's sign open. A positive diagonal makes it that of the old column, on which the moments rest.
    return (P * torch.where(R.diagonal() < 0, -1.0, 1.0)).contiguous()  # (m, r)


def seeded(G, seed):
    return torch.Generator(G.device).manual_seed(seed)


def on_the_right(shape, proj_type='std'):
    """Does P stand on the side of W's columns, a layer's inputs? 'std': where that is the shorter side, or as short;
    'paper': where it is the shorter one; 'reverse_std': where it is the longer one.

    A square matrix has it there as in the authors' package, and not on the left as in the paper: val loss 4.80 for 4.93
    after 200 steps, and 4.78 with 'right' (results/controls.md). Why was not measured; perhaps inputs lie in the same
    few directions for longer than output gradients do, so that an old P holds more of G."""
    rows, columns = shape
    wide = {'std': rows >= columns, 'paper': rows > columns, 'reverse_std': rows < columns}
    return wide.get(proj_type, proj_type == 'right')


def short_side_first(G, proj_type='std'):
    """A view of G with at most as many rows as columns, so that P stands on the left. proj_type: 'std' or 'paper'."""
    return G.T if on_the_right(G.shape, proj_type) else G


def rotate_moments(M, V, Q, betas, t):
    """Adam's moments M, V (r, n) of t gradients, in the coordinates of a new basis: Q (r, r) = P_new.T @ P_old.

    M rotates like a gradient. V has no such rule; LDAdam (2410.16103, algorithm 2) takes the old coordinates, of mean M
    and variance V - M^2, as uncorrelated, rotates both, and puts them together again."""
    fill_M, fill_V = 1 - betas[0] ** t, 1 - betas[1] ** t  # of Adam's bias correction
    mean, square = M / fill_M, V / fill_V
    mean_now = Q @ mean  # (r, n)
    square_now = (Q.square() @ (square - mean.square()) + mean_now.square()).abs_()  # (r, n)
    return mean_now * fill_M, square_now * fill_V


def reset_or_rotate(state, Q, betas, moments):
    """What becomes of the moments in `state` when P turns, Q (r, r) = P_new.T @ P_old. moments: 'keep' leaves them as
    they are (the paper), 'rotate' turns them with P, 'reset' lets Adam start anew, with its bias correction."""
    if moments == 'keep':
        return
    if 'M' in state and 'V' not in state:  # a momentum alone
        M = read_state(state, 'M')  # (r, n)
        write_state(state, 'M', M.copy_(Q.to(M.dtype) @ M if moments == 'rotate' else 0 * M))
    elif 'M' in state:
        M, V = read_state(state, 'M'), read_state(state, 'V')  # (r, n)
        new_M, new_V = rotate_moments(M, V, Q, betas, state['fill']) if moments == 'rotate' else (0 * M, 0 * V)
        write_state(state, 'M', M.copy_(new_M))
        write_state(state, 'V', V.copy_(new_V))
    if moments == 'reset':
        state['fill'] = 0


def default_rank(groups):
    """r of a group that does not say its own: 128, or 0 where other groups say theirs, as in the authors' package."""
    return 0 if any('rank' in group for group in groups if isinstance(group, dict)) else 128


def check_group(group):
    """Raise ValueError for what a group cannot say."""
    if group.get('proj_type', 'std') not in ('std', 'paper', 'reverse_std', 'left', 'right'):
        choices = "'std', 'paper', 'reverse_std', 'left' or 'right'"
        raise ValueError(f"proj_type={group['proj_type']!r} is not known: use {choices}")
    if group['update_proj_gap'] < 1:
        raise ValueError(f'update_proj_gap={group["update_proj_gap"]} is not a number of steps: use 1 or more')


class Projected(torch.autograd.Function):
    """y = x @ W.T. In backward the second argument receives its gradient: R, if it is the placeholder; G, if it is the
    weight (the first step, and steps that refresh P).

    The optimizer is asked for W and P when they are needed, so that one kept in few bits is whole only here."""

    @staticmethod
    def forward(ctx, x, receiver, module, optimizer, needs_G):
        if torch.is_autocast_enabled(x.device.type):  # as torch's own layer: x is cast, and its cast is what stays
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ctx.save_for_backward(x)
        ctx.module, ctx.optimizer, ctx.needs_G, ctx.dtype = module, optimizer, needs_G, receiver.dtype
        return F.linear(x, optimizer.weight(module.weight).detach().to(x.dtype))  # (..., out)

    @staticmethod
    def backward(ctx, delta):
        (x,), p, optimizer = ctx.saved_tensors, ctx.module.weight, ctx.optimizer
        dx = delta @ optimizer.weight(p).to(delta.dtype) if ctx.needs_input_grad[0] else None  # (..., in)
        delta, x = delta.flatten(0, -2), x.flatten(0, -2)  # (N, out), (N, in)
        if ctx.needs_G:
            return dx, (delta.T @ x).to(ctx.dtype), None, None, None  # (out, in)
        if optimizer.needs_first(p):  # P was forgotten since forward, together with the gradient it was for
            optimizer.receive(p, (delta.T @ x).to(ctx.dtype))  # (out, in)
            return dx, None, None, None, None
        R = project_factors(optimizer.basis(p), delta, x, optimizer.right[p])  # (r, n)
        return dx, R.to(ctx.dtype), None, None, None


class Shadow(torch.Tensor):
    """What stands in W.grad while the gradient exists as R alone: of W's shape, without memory, with the norm of P @ R,
    which is R's. It can be scaled, unscaled, set to zero and asked whether it is finite; all else is refused.

    So clip_grad_norm_ and GradScaler work, and model.zero_grad() takes it away, which says that R is not wanted."""

    KNOWN = ('linalg_vector_norm', '_foreach_norm', 'mul_', '_foreach_mul_', 'div_', '_foreach_div_', 'zero_')
    KNOWN += ('_foreach_zero_', 'detach', '_amp_foreach_non_finite_check_and_unscale_')

    @staticmethod
    def __new__(cls, R, W):
        shadow = torch.Tensor._make_wrapper_subclass(cls, W.shape, dtype=W.dtype, device=W.device)
        shadow.R = R
        return shadow

    def __init__(self, R, W):
        pass

    def __repr__(self):
        return f'Shadow({tuple(self.shape)}, R={self.R!r})'

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        if function.__name__ in ('isfinite', 'isnan', 'isinf'):
            return function(arguments[0].R)
        with torch._C.DisableTorchFunctionSubclass():  # what comes out is no Shadow
            return function(*arguments, **(named or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        name, named = function.overloadpacket.__name__, named or {}
        order = named.get('ord', arguments[1] if len(arguments) > 1 and name.endswith('norm') else 2)
        if name not in cls.KNOWN or (name.endswith('norm') and order != 2):
            raise NotImplementedError(
                f'{name}: of a weight that was attached there is no gradient, only its projection, which has a 2-norm '
                'and takes factors, and no more: use grad_clip=, or do without attach()'
            )
        found = function(*map(cls.of, arguments), **named)
        if name == 'detach':
            return cls(arguments[0].R, arguments[0])
        return arguments[0] if found is not None and function._schema.is_mutable else found

    @classmethod
    def of(cls, argument):
        if isinstance(argument, (list, tuple)):
            return [cls.of(a) for a in argument]
        return argument.R if isinstance(argument, cls) else argument


# ---- the optimizer -----------------------------------------------------------------------------------------------


class GaLoreAdamW(AdamW):
    """AdamW whose moments live in the subspace of P. Arguments as in adam.AdamW, and

    rank: r of groups that do not say their own; None: 128, or, where some groups say theirs, 0 for the others, as in
    the authors' package. With rank 0, and for any tensor that is not a matrix, this is plain Adam.
    update_proj_gap: T. scale: factor on the update that comes back from the subspace. proj_type: see `on_the_right`;
    'left' is the rows, 'right' the columns. These four are keys of a group.
    refresh: see `orthonormal_basis`. stagger: layer i of L has its first refresh at step i T / L; False is the paper's:
    all layers at steps 0, T, 2 T. basis_bits: 16 (P in the weight's own dtype), 8 or 4 (blockwise, as in Q-GaLore).
    moments: when P turns they 'keep' their numbers (the paper), 'rotate' with it, or 'reset'.

    The first P of a weight comes from the first micro-batch's gradient, later ones from the mean over the whole step:
    otherwise the first step with accumulation would hold the full gradients of all layers. Either is `pending` until
    the step is taken, and never made of a gradient that is not finite."""

    small_gradients = True
    full_gradient = False  # True, in a subclass: `update` is given G instead of R

    def __init__(self, params, lr=1e-2, rank=None, update_proj_gap=200, scale=0.25, proj_type='std',
                 refresh='subspace', stagger=True, basis_bits=16, moments='keep', **adam):  # fmt: skip
        for name, value, allowed in (
            ('refresh', refresh, ('subspace', 'svd', 'sara', 'random')),
            ('basis_bits', basis_bits, (16, 8, 4)),
            ('moments', moments, ('keep', 'rotate', 'reset')),
        ):
            if value not in allowed:
                choices = ', '.join(map(repr, allowed[:-1]))
                raise ValueError(f'{name}={value!r} is not known: use {choices} or {allowed[-1]!r}')
        self.refresh, self.stagger, self.basis_bits, self.moments = refresh, stagger, basis_bits, moments
        self.placeholder = {}  # p -> a tensor of shape (r, n) that takes no memory; its .grad is R during a step
        self.pending = {}  # p -> what its state becomes when the step is taken
        self.attached, self.right, self.offset = set(), {}, {}
        params = list(params)
        own = dict(
            rank=default_rank(params) if rank is None else rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
        )
        super().__init__(params, lr, group_defaults=own, **adam)

    def update(self, p, R):
        """One step of algorithm 2 on p. R (r, n); of a parameter that is not projected, its gradient."""
        if not self.is_projected(p):
            return super().update(p, R)
        group, state = self.group_of[p], self.state[p]
        seed = self.random_seed(p, state['step'])
        N = adam_direction(R, state, group['betas'], group['eps'], self.state_bits, seed)  # (r, n)
        self.add_projected(p, self.basis(p).to(product_dtype(p)), N)

    def add_projected(self, p, P, N):
        """W <- (1 - lr decay) W - lr scale P @ N, in one product where W is fp32, else some rows at a time."""
        scale, lr, keep = self.group_of[p]['scale'], self.rate(p), 1 - self.rate(p) * self.decay(p)
        if p.dtype == P.dtype == N.dtype and self.weight(p) is p:
            if torch.is_tensor(keep):
                p.mul_(keep)
                keep = 1.0
            project_back(P, N.mul_(scale), into=p.T if self.right[p] else p, keep=keep, times=-lr)
            return
        N = N.to(P.dtype)
        left, right = (N.T, P.T) if self.right[p] else (P, N)  # what W takes is left @ right
        rows = max((1 << 22) // p.shape[1], 1)
        for row in range(0, len(p), rows):
            part = scale * project_back(left[row : row + rows], right)  # (rows, p's columns)
            self.move(p, p[row : row + rows], part, row)

    # ---- groups

    def add_param_group(self, group):
        check_group(self.defaults | group)
        super().add_param_group(group)
        # Layers are numbered as they come, and their refreshes are spread evenly over the T steps between two of them.
        projected = [p for group in self.param_groups for p in group['params'] if self.is_projected(p)]
        for i, p in enumerate(projected):
            self.offset[p] = i * self.group_of[p]['update_proj_gap'] // len(projected) if self.stagger else 0
            if p not in self.placeholder:
                whole = p.part.shape if hasattr(p, 'part') else p.shape  # P is of the whole weight, R of this part
                self.right[p] = on_the_right(whole, self.group_of[p]['proj_type'])
                r, n = min(self.group_of[p]['rank'], *whole), p.shape[0] if self.right[p] else p.shape[1]
                self.placeholder[p] = torch.zeros((), dtype=p.dtype, device=p.device).expand(r, n).requires_grad_()

    def is_projected(self, p):
        return p.dim() == 2 and self.group_of[p]['rank'] > 0

    def p_first(self, p, A):
        """A, which has p's shape, as a view (m, n) on whose left P stands."""
        return A.T if self.right[p] else A

    # ---- P

    def is_due(self, p):
        """Will this step give p a new P? Known before backward."""
        return self.state[p].get('step', 0) >= self.state[p].get('next', math.inf)

    def make_due(self, modules):
        for module in modules:
            if 'next' in self.state[module.weight]:
                self.state[module.weight]['next'] = self.state[module.weight]['step']

    def basis(self, p):
        """P (m, r) as kept, or decoded: the one that p's next step uses."""
        return self.decoded(p, self.pending.get(p, self.state[p]))

    def decoded(self, p, state):
        if self.basis_bits != 4:
            return read_state(state, 'P')
        from quant import decode

        shape = p.shape[1] if self.right[p] else p.shape[0], len(self.placeholder[p])
        return decode({'': state['P'], '_absmax': state['P_absmax']}, shape, p.dtype)

    def encoded(self, p, P):
        """P as it is kept: tensors for a state."""
        if self.basis_bits == 16:
            return {'P': P.to(p.dtype)}
        if self.basis_bits == 4:
            from quant import encode

            return {'P' + part: tensor for part, tensor in encode(P).items()}
        state = {'P': torch.empty(P.shape, dtype=torch.uint8, device=P.device)}
        state['P_absmax'] = torch.empty(-(-P.numel() // BLOCK), device=P.device)
        write_state(state, 'P', P)
        return state

    def new_basis(self, p, G, mine=True):
        """A new P for p, from G (m, n), pending until the step is taken. mine: False where another process makes it,
        and this one only room for it."""
        state, earlier = self.state[p], self.pending.get(p)
        G = p.part.whole(G, 1) if hasattr(p, 'part') else G  # (m, n)
        step, T, good = state.get('step', 0), self.group_of[p]['update_proj_gap'], is_finite(G)
        if mine and self.refresh != 'subspace':  # of NaN it would not come to its end
            G = zero_unless_(good, G.to(torch.float32, copy=True))  # (m, n)
        old = self.decoded(p, state).float() if 'P' in state else None
        P = any_P = torch.eye(len(G), len(self.placeholder[p]), device=G.device) if old is None else old  # (m, r)
        if mine:
            P = self.look_for_basis(p, G, old, self.random_seed(p, step))  # (m, r)
        P = torch.where(good, P, any_P)
        if earlier:  # of this step, in a loop without the flag, or of one that was not taken
            P = torch.where(self.sound.pop(p), self.decoded(p, earlier).float(), P)
        self.pending[p] = {**self.encoded(p, P), 'next': step + (T if old is not None else self.offset[p] or T)}
        if old is not None:
            self.basis_turned(p, self.pending[p], old, P, G)

    def look_for_basis(self, p, G, old, seed):
        return orthonormal_basis(G, self.group_of[p]['rank'], self.refresh, old, seed)  # (m, r)

    def first_basis(self, p, G):
        """A new P for p from the first process's G (m, n), on all processes."""
        self.new_basis(p, G, mine=not several_processes() or dist.get_rank() == 0)
        for tensor in self.parts(p):
            hand_out_(tensor)

    def parts(self, p):
        """The tensors of p's pending basis."""
        return [part for part in self.pending[p].values() if torch.is_tensor(part)]

    def basis_turned(self, p, new, old, P, G):
        """p has a new basis P (m, r) in the place of the old one, by its gradient G (m, n); `new` is for its state."""
        if self.moments != 'keep':
            new['Q'] = torch.where((old == P).all(), torch.eye(P.shape[1], device=P.device), P.T @ old)  # (r, r)

    def settle(self, p):
        """The step is taken: what was pending is p's state."""
        state, new = self.state[p], self.pending.pop(p, {})
        self.sound.pop(p, None)
        Q = new.pop('Q', None)
        state.update(new)
        if Q is not None and 'M' in state:
            with self.moments_at_hand(p):
                reset_or_rotate(state, Q, self.group_of[p]['betas'], self.moments)

    # ---- from gradient to R: never form G

    def attach(self, linears):
        """From now on these nn.Linear modules, whose weights are in this optimizer, give R instead of G in backward.

        The result is that of the ordinary backward, up to rounding."""
        for module in (module for module in linears if self.is_projected(module.weight)):
            p = module.weight
            self.attached.add(p)
            self.weight_of[self.placeholder[p]] = p
            self.watch(self.placeholder[p])
            module.forward = partial(self.linear, module)

    def linear(self, module, x):
        """What an attached module computes: y = x @ W.T + bias."""
        p = module.weight
        if not (torch.is_grad_enabled() and p.requires_grad):
            y = F.linear(x, self.weight(p).to(x.dtype))
        else:
            needs_G = self.full_gradient or self.needs_first(p) or self.is_due(p)
            y = Projected.apply(x, p if needs_G else self.placeholder[p], module, self, needs_G)
        return y if module.bias is None else y + module.bias.to(y.dtype)

    def weight(self, p):
        """W as it multiplies; a subclass may keep it in few bits."""
        return p

    @property
    def keeps_gradients_back(self):
        return self.per_layer or (bool(self.attached) and not self.full_gradient)

    def needs_first(self, p):
        """Has p no P, or one of a step that was perhaps not taken?"""
        return 'P' not in self.state[p] and (p.grad is None or p not in self.pending or p in self.complete)

    def receive(self, p, G):
        """G goes to p as if autograd had brought it."""
        self.gradient_comes(p)
        p.grad = G
        self.gradient_came(p)

    def begin(self, p):
        super().begin(p)
        self.pending.pop(p, None)
        if p in self.placeholder:
            self.placeholder[p].grad = None

    def gradient_comes(self, q):
        if not isinstance(q.grad, Shadow):
            return super().gradient_comes(q)
        if q in self.complete:  # G comes where R is, which may be of a step that was not taken
            self.drop_if_not_finite(q, q.grad.R)
            self.counts[q] += self.is_due(q)  # G is summed by itself, and this R comes to it last
        q.grad = None

    def gradient_ready(self, p):
        """p has G or R of one more micro-batch."""
        if not self.is_projected(p) or self.full_gradient:
            return super().gradient_ready(p)
        if p.grad is None or isinstance(p.grad, Shadow):
            p.grad = Shadow(self.placeholder[p].grad, p)
            return super().gradient_ready(p)
        if 'P' not in self.state[p] and (p not in self.pending or p in self.sound):
            self.first_basis(p, self.p_first(p, p.grad))
        # A layer that is due keeps its full gradient until the step's last micro-batch; no other one ever does.
        if self.per_layer or p in self.attached:
            if not self.is_due(p) or (self.last_micro_batch and not self.in_common(p)):
                self.fold(p)
            super().gradient_ready(p)

    def needs_basis(self, p):
        """Is P to be made of the gradient of this step, which is complete?"""
        return ('P' not in self.state[p] or self.is_due(p)) and (p not in self.pending or p in self.sound)

    def fold(self, p):
        """R += P.T @ G, and G is dropped. Exact under accumulation, since P stays the same between refreshes."""
        if isinstance(p.grad, Shadow):
            return
        G = self.p_first(p, p.grad)  # (m, n)
        if self.needs_basis(p):
            self.first_basis(p, G)
        self.take_in(p, project(self.basis(p), G).to(p.dtype))

    def take_in(self, p, R):
        q = self.placeholder[p]
        q.grad = R if q.grad is None else self.sum_up(p, q.grad, R)  # (r, n)
        p.grad = Shadow(q.grad, p)

    def take_gradient(self, p):
        if not self.is_projected(p) or self.full_gradient:
            return super().take_gradient(p)
        self.fold(p)
        self.settle(p)
        R, self.placeholder[p].grad, p.grad = self.placeholder[p].grad, None, None
        return self.add_to_norm(p, self.averaged(p, R))

    # ---- several processes: R travels, and G only where P is due, to the one process that makes it

    def exchange(self, p):
        if not self.is_projected(p) or self.full_gradient:
            return super().exchange(p)
        if not isinstance(p.grad, Shadow) and self.needs_basis(p):
            return self.share(p, p.grad)
        self.fold(p)
        super().exchange(p)

    def own_gradient(self, p):
        return p.grad.R if isinstance(p.grad, Shadow) else p.grad

    def make(self, p, G, mine):
        """-> R (r, n) and the parts of a new basis by the mean gradient G, or room for them."""
        G = self.p_first(p, G)  # (m, n)
        self.new_basis(p, G, mine)
        R = project(self.basis(p), G).to(p.dtype) if mine else self.placeholder[p].detach().clone()  # (r, n)
        return [R.contiguous(), *self.parts(p)]

    def made(self, p, R, *parts):
        self.take_in(p, R)
        self.arrived(p)


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options:
    """What --method=galore adds to train.py's keys."""

    rank = 128  # r: dimensions of the subspace; fewer take less memory and leave less freedom
    update_proj_gap = 200  # T: steps between two refreshes of a layer's subspace
    scale = 0.25  # factor on the update that comes back from the subspace (the paper's alpha)
    refresh = 'subspace'  # 'subspace' | 'svd' | 'sara' | 'random': a step from the old basis, a slow SVD, some vectors
    #                       drawn of it, or any subspace at all, blind to the gradient: a control
    proj_type = 'std'  # 'std' | 'paper' | 'right': P stands on the shorter side, of square matrices on that of the
    #                    inputs; or on that of the outputs; or of all matrices on the inputs' side
    stagger = True  # layers refresh in turns, so that no step stalls; False: all in the same step, as in the paper
    moments = 'keep'  # 'keep' | 'rotate' | 'reset': what becomes of Adam's moments when the subspace turns
    basis_bits = 16  # 16 | 8 | 4: of the bases; 16 stands for the weights' own dtype
    project_tables = False  # embedding and head, too, along n_embd: for large vocabularies; else plain Adam moves them


FIXED = ('rank', 'basis_bits', 'project_tables', 'proj_type')


def problems(config):
    """What does not go together, a sentence each."""
    from configurator import between

    return between(config, 1, 10**9, 'rank', 'update_proj_gap') + between(config, 1e-6, 1e4, 'scale')


def linears_of(model, config):
    """What the papers project: the nn.Linear modules of the blocks, or those that config.targets says."""
    return [*adam.targeted(model, config, torch.nn.Linear).values()]


def groups(model, linears, config=None):
    """The weights of these modules in one group, all else in groups of rank 0: plain Adam. Embedding and head have one
    of their own where config.project_tables says so, with P (n_embd, r): rows of tokens that were not seen stay."""
    asked = config is not None and config.project_tables
    tables = list({id(W): W for W in (model.embed_tokens.weight, model.head)}.values()) if asked else []
    chosen = {id(module.weight) for module in linears} | {id(W) for W in tables}
    others = adam.split_decay(p for p in model.parameters() if id(p) not in chosen)
    found = [{'params': [module.weight for module in linears]}, *({**group, 'rank': 0} for group in others)]
    return [*found, {'params': tables, 'proj_type': 'right'}] if tables else found


def arguments(config):
    """Of GaLoreAdamW, and of its descendants."""
    own = {name: getattr(config, name) for name in vars(Options) if not name.startswith('_')}
    del own['project_tables']  # of `groups`
    return adam.common(config) | own


def setup(model, config):
    """What train.py calls for method='galore'."""
    linears = linears_of(model, config)
    optimizer = GaLoreAdamW(groups(model, linears, config), **arguments(config))
    optimizer.attach(linears)
    return optimizer
