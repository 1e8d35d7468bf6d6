"""
LoQT: weights in 4 bits, trained through low-rank factors that are merged into them now and then (2405.16528).

A layer keeps its weight W (m x n, m <= n; a tall or square one is its transpose here) in NF4 and adds a product to it:

    W = W_q + s P_q @ B                                                      # (m, n): s is `scale`
    dL/dB = s P_q.T @ dL/dW                                                  # (r, n): GaLore's R

Only B is trained. W_q and P_q stay as they are until a step of `update_steps`, whose distances grow; then

    W = W_q + s P_q @ B,  G = dL/dW                                          # one layer at a time
    P_q = q(top r left singular vectors of G)                                # (m, r)
    W_q, B = q(W), 0, and C times:                                           # error compensation (algorithm 2)
        W_q = q(W - s P_q @ B'),  B = P_q^+ @ (W - W_q) / s                  # B holds what 4 bits lost
    where B' goes half a step further than B went in the last round: three such rounds do what five did

GaLore is the same identity with B merged at every step. Memory: half a byte a weight, and B with two moments.
Speed: W is decoded in forward and in backward, and s P_q @ B is added to it there, which for more than m n / (m + n)
tokens is cheaper than x going through the factors.
Not for: what depends on the last digits of the weights. Every merge rounds them to 16 values, to within 9 %, and
B makes good only the part of that error that lies in the span of P. A pretrained model's loss jumps in the first step,
whatever its rate: SmolLM2-135M's from 2.082 to 2.136 with rank 128, and to 2.340 with compensation=0. The log's
`rounded` is what is lost of the weights; `quantize='none'` loses nothing.

    python train.py config/loqt_laptop.py                                                         # in train.py
    layers = replace_linears(model, rank=128)                                                     # in any other loop
    optimizer = LoQTAdamW(split_decay(trainable), layers, total_steps=1000)
"""

from functools import partial

import torch
import torch.nn as nn

import adam
from adam import (
    AdamW,
    add_up_,
    average_,
    exactly,
    fast_bf16,
    hand_out_,
    is_finite,
    several_processes,
    split_decay,
    zero_unless_,
)
from galore import on_the_right, orthonormal_basis, project_factors, reset_or_rotate, short_side_first
from quant import Packed, decode, encode

# ---- pure functions ----------------------------------------------------------------------------------------------


def update_steps(total, tau=100, psi=1.2):
    """The steps below `total` at which W_q, P and B are made anew: 0, tau, then tau + int(psi^k) further, k = 1, 2, ...

    LoQT, section 3.4: late in training W moves little, and each merge costs it some precision. psi 0: always tau.
    Raises ValueError where tau is not a number of steps."""
    if tau < 1 or psi < 0:
        raise ValueError(f'tau={tau}, psi={psi} are no intervals: use 1 or more steps, and a psi of 0 or more')
    steps, step, k = [0], tau, 1
    while step < total:
        steps.append(step)
        step, k = step + tau + int(psi**k), k + 1
    return steps[: max(total, 0)]


# ---- the layer ---------------------------------------------------------------------------------------------------


class LowRank(torch.autograd.Function):
    """y = x @ W.T. The whole W exists in forward, and again in backward, decoded from the same bytes, and not in
    between. Where a layer collects, its G is formed here, too."""

    @staticmethod
    def forward(ctx, x, B, layer):
        if torch.is_autocast_enabled(x.device.type):  # as torch's own layer: x is cast, and its cast is what stays
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer.times(x, transposed=True)  # (..., out)

    @staticmethod
    def backward(ctx, delta):
        (x,), layer = ctx.saved_tensors, ctx.layer
        dx = layer.times(delta) if ctx.needs_input_grad[0] else None  # (..., in)
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        delta, x = delta.flatten(0, -2), x.flatten(0, -2)  # (N, out), (N, in)
        if layer.wants_gradient():
            layer.add_gradient(delta.T @ x)  # (out, in)
            if not layer.started and layer.in_parts and layer.in_step:
                return dx, torch.zeros_like(layer.B), None  # see LoQTAdamW.first_of_parts
            if not layer.started:  # the very first P comes from the first gradient there is
                turn(layer) if layer.in_step else merge(layer)
        R = project_factors(layer.read('P', delta.dtype), delta, x, layer.tall)  # (r, n)
        return dx, R.mul_(layer.scale).to(layer.B.dtype), None


class LoQTLinear(Packed):
    """y = x @ (W_q + s P_q @ B).T, in the place of an nn.Linear whose weight is (out, in).

    B (r, n) is its one parameter, beside a bias: n = max(in, out), m = min(in, out), r = min(rank, m); P is (m, r).
    A tall layer, out >= in, has (P_q @ B).T; with proj_type='paper' a square one has not. scale: s. quantize: 'nf4', or
    'none' for LoQT-nq, with W and P in the dtype of B. double_quant: the scales in 8 bits, too. compensation: C, rounds
    of it in a merge, four times as many in the first one of a weight that was given; 0: none.
    refresh: how P comes from G, as in galore.orthonormal_basis. Raises ValueError for values that are not known.

    A layer is born with B = 0 and without a P: its first backward makes them. Until then a weight that was given to it
    is kept in 8 bits, as NF4 of itself and NF4 of the rest, so that compensation has something to compensate.
    To merge later on, set `collect` before a backward and call `merge(layer)` after it. LoQTAdamW does both, and makes
    the first W_q and B in its own step (`in_step`): until then P alone is there, which changes nothing while B is 0."""

    in_full = ('P',)  # small, read more often than W, and by one process alone when it makes the next one
    in_parts = False  # a backward comes in parts of the tokens, as LLaMA.set_chunk has it

    def __init__(self, n_in, n_out, rank=128, scale=0.5, quantize='nf4', double_quant=False, compensation=3,
                 refresh='subspace', proj_type='std', bias=False, device=None, dtype=None):  # fmt: skip
        super().__init__()
        for name, value, allowed in (
            ('quantize', quantize, ('nf4', 'none')),
            ('refresh', refresh, ('subspace', 'svd', 'sara', 'random')),
            ('proj_type', proj_type, ('std', 'paper')),
        ):
            if value not in allowed:
                choices = ', '.join(map(repr, allowed[:-1]))
                raise ValueError(f'{name}={value!r} is not known: use {choices} or {allowed[-1]!r}')
        if rank < 1 or scale <= 0 or compensation < 0:
            wrong = f'rank={rank}, scale={scale}, compensation={compensation}'
            raise ValueError(f'{wrong} cannot be: use at least 1, more than 0, and at least 0')
        self.in_features, self.out_features, self.proj_type = n_in, n_out, proj_type
        self.tall = on_the_right((n_out, n_in), proj_type)
        self.scale, self.quantize, self.how = scale, quantize, (quantize, double_quant)
        self.compensation, self.refresh = compensation, refresh
        m, n = sorted((n_in, n_out))
        self.shapes = {'W': (n_out, n_in), 'rest': (n_out, n_in), 'P': (m, min(rank, m))}
        self.B = nn.Parameter(torch.zeros(min(rank, m), n, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(n_out, device=device, dtype=dtype)) if bias else None
        self.in_step = self.ended = self.complete = False  # of the backward that made what follows, and of its step
        self.forget_gradient(started=False)
        self.lost = None  # of W in the last merge, as a share of its norm; LoQTAdamW shows it
        if not self.B.is_meta:
            self.reset_parameters()

    def reset_parameters(self, generator=None):
        """A new weight, N(0, 0.02), which exists in full only here, and a bias of zero."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        W = torch.empty(self.shapes['W'], device=self.B.device, dtype=self.B.dtype)
        self.set_weight(nn.init.normal_(W, std=0.02, generator=generator), precious=False)

    @torch.no_grad()
    def set_weight(self, W, precious=True):
        """Start from the weight W (out, in); precious: what 4 bits lose of it is to be kept until the first merge."""
        self.B.zero_()
        self.forget('rest')
        self.keep('W', W.to(self.B.dtype))
        self.keep('P', torch.zeros(self.shapes['P'], device=W.device, dtype=self.B.dtype))
        if precious and self.quantize != 'none':
            rest = self.read('W', torch.float32)
            self.keep('rest', torch.sub(W, rest, out=rest))
        self.forget_gradient(started=False)

    @classmethod
    def from_linear(cls, linear, **options):
        """The LoQTLinear that computes, up to quantisation, what this nn.Linear does. Options as for the class."""
        W = linear.weight.detach()
        layer = cls(W.shape[1], W.shape[0], bias=linear.bias is not None, device=W.device, dtype=W.dtype, **options)
        layer.set_weight(W)
        if linear.bias is not None:
            layer.bias = linear.bias
        return layer

    # ---- the whole weight

    def dense_weight(self, dtype=None):
        """W_q + s P_q @ B as a matrix of its own, (out, in), in B's dtype or another."""
        return self.frozen(dtype or self.B.dtype, with_factors=True)

    @torch.no_grad()
    def frozen(self, dtype, with_factors):
        W = self.read('W', dtype)  # (out, in)
        if 'rest' in self._buffers:
            W = torch.add(W, self.read('rest', dtype), out=None if W is self.W else W)
        if with_factors:
            left, right = self.factors(dtype)
            W = torch.addmm(W, left, right, alpha=self.scale, out=None if W is self.W else W)
        return W

    def factors(self, dtype):
        """Matrices (out, r) and (r, in) whose product, times s, is added to W_q."""
        P, B = self.read('P', dtype), self.B.detach().to(dtype)
        return (B.T, P.T) if self.tall else (P, B)

    def times(self, x, transposed=False):
        """x @ W.T for (..., in), or x @ W for (..., out). With many rows s P B is added to W first, 2 m n r operations;
        with few they go through the factors, 2 N r (m + n)."""
        out, n = self.shapes['W']
        many = x.numel() // x.shape[-1] * (out + n) > out * n
        W = self.frozen(x.dtype, with_factors=many)
        y = x @ (W.T if transposed else W)  # (..., out) or (..., in)
        if not many:
            left, right = self.factors(x.dtype)
            y += self.scale * ((x @ right.T) @ left.T if transposed else (x @ left) @ right)
        return y

    def forget_gradient(self, started):
        self.started, self.collect = started, self.collect if started else True
        self.G, self.added, self.next, self.has_P = None, 0, None, False

    def wants_gradient(self):
        """Is G to be formed in this backward?"""
        if self.ended and self.B.grad is None:  # the step before this one was not taken
            self.forget_gradient(self.started)
        self.ended = False
        return self.collect and (self.started or not self.has_P or self.complete)

    def add_gradient(self, G):
        self.added += 1
        self.G = G if self.G is None else add_up_(self.G, G, self.added)

    def forward(self, x):
        y = LowRank.apply(x, self.B, self)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self):
        return f'{self.in_features}, {self.out_features}, rank={len(self.B)}, quantize={self.quantize!r}'


@exactly
def turn(layer, seed=0, shared=False):
    """Make a new P (m, r) of the gradient that the layer collected: `next`, for its next merge; the first one, which
    replaces no other, at once. seed: of one that is drawn (refresh='sara' or 'random'). shared: the gradient is the
    mean over processes already, and who calls this hands P out.

    Raises ValueError where no gradient was collected."""
    if layer.G is None:
        raise ValueError('the layer collected no gradient: set layer.collect = True before a backward, then merge')
    # The first one comes from the first process's first micro-batch, so that more processes change nothing.
    G, layer.G, layer.added = average_(layer.G) if layer.started and not shared else layer.G, None, 0
    good = is_finite(G)
    if layer.refresh != 'subspace':  # of NaN it would not come to its end
        zero_unless_(good, G)
    old = layer.read('P', torch.float32)  # (m, r); zeros, where there is none yet
    earlier = old if layer.started else None
    P = orthonormal_basis(short_side_first(G, layer.proj_type), len(layer.B), layer.refresh, earlier, seed)  # (m, r)
    del G
    # In the place of one that no finite gradient made: that of the same step or the old one, or any at all.
    fallback = old if layer.started else torch.eye(*P.shape, device=P.device)
    P = torch.where(good, P, fallback if layer.next is None else layer.next)
    if layer.has_P:  # from an earlier micro-batch of this step, or of one that was not taken
        P = torch.where(is_finite(layer.B.grad), old, P)
    if not shared:
        hand_out_(P)
    if layer.started:
        layer.next = P
    else:
        layer.keep('P', P.to(layer.B.dtype))
        layer.has_P = True


@exactly
def merge(layer):
    """W <- W_q + s P_q @ B, a new P from the gradient that the layer collected, and W_q and B that make up W again
    (LoQT, algorithms 1 and 2). -> P_new.T @ P_old (r, r), which takes coordinates of the old basis to the new one; None
    if there was none. What it makes at the most, in matrices of W's size: results/merges.md.

    Raises ValueError where no gradient was collected."""
    if layer.next is None and not layer.has_P:
        turn(layer)
    # As forward sees it: to three digits, where the device multiplies bf16, of which 4 bits keep one.
    low = layer.B.dtype if layer.quantize == 'nf4' and fast_bf16(layer.B.device) else torch.float32
    W, Q = [layer.frozen(low, with_factors=layer.started)], None  # (out, in); handed over, so that it can be freed
    # A weight that was given is coded this once, and worth more rounds: they leave a fifth less of the jump that a
    # pretrained model's loss makes here.
    rounds = layer.compensation * (4 if 'rest' in layer._buffers else 1)
    layer.forget('rest')
    if layer.started:
        Q = layer.next.T @ layer.read('P', torch.float32)  # (r, r)
        layer.keep('P', layer.next.to(layer.B.dtype))
    layer.forget_gradient(started=True)
    B, parts, layer.lost = compensate(W.pop(), layer.read('P', torch.float32), layer, rounds)
    layer.B.copy_(B)
    for part, tensor in parts.items():
        layer.put('W' + part, tensor)
    layer.collect = False
    return Q


def compensate(W, P, layer, rounds):
    """-> B (r, n) and the parts of W_q (quant.encode's) that make up W (out, in) best, W_q + s P @ B (LoQT, algorithm
    2): in each of its rounds W_q takes what B cannot say, and B takes from what W_q lacks all that lies in the span of
    P (m, r). And what is lost all the same, as a share of W's norm, 0-dim; None without quantisation.

    W_q is not made for the B of the round before, but for one half a step further: three rounds then lose as much as
    five of the paper's do, within 1 %. `layer` gives its options, shapes and dtype; nothing of it changes."""
    scale, dtype, few_bits = layer.scale, layer.B.dtype, layer.quantize == 'nf4'
    gram = P.T @ P  # (r, r)
    # The pseudo-inverse (r, m), since in 4 bits P is not quite orthonormal; `_ex` does not wait for the device.
    P_plus = torch.linalg.solve_ex(gram, P.T)[0]
    P, P_plus = P.to(W.dtype), P_plus.to(W.dtype)
    B, best = torch.zeros_like(layer.B), {}  # (r, n)
    before = B
    for c in range(max(rounds if few_bits else 1, 1)):  # rounding to bf16 leaves little to compensate
        ahead = torch.lerp(before, B, 1.5).to(W.dtype)  # (r, n): B and half a step further
        left, right = (ahead.T, P.T) if layer.tall else (P, ahead)  # (out, r), (r, in)
        target = torch.addmm(W, left, right, alpha=-scale) if c else W  # (out, in): what W_q is to hold
        parts = encode(target.to(dtype), *layer.how)
        del target
        E = W - decode(parts, layer.shapes['W'], W.dtype)  # (out, in): what it lacks
        before = B
        if layer.compensation:
            B = (P_plus @ short_side_first(E, layer.proj_type) / scale).to(dtype)  # (r, n)
        found = {'B': B, **parts}
        if few_bits:  # |E - s P B|^2, since what B takes is a projection of E
            found['error'] = squared_norm(E) - (gram @ B.float()).mul_(B).sum() * scale**2
        del E
        better = best and found['error'] < best['error']  # the best is kept, without asking the device which one it is
        best = {name: torch.where(better, new, best[name]) for name, new in found.items()} if best else found
    lost = (best['error'].clamp_min(0) / squared_norm(W).clamp_min(1e-30)).sqrt() if few_bits else None
    return best['B'], {part: best[part] for part in parts}, lost


def squared_norm(A):
    """|A|^2 of a matrix in fp32, row by row: a bf16 A is not copied, and the rounding of the rows evens out."""
    return torch.linalg.vector_norm(A, dim=1).float().square().sum()


# ---- the optimizer -----------------------------------------------------------------------------------------------


class LoQTAdamW(AdamW):
    """AdamW on the parameters, B among them, and a merge of each layer at its update steps. Arguments as in adam.AdamW,

    and layers: the LoQTLinears. total_steps, tau, psi: of `update_steps`, counted from a layer's first gradient, which
    gives the first P. stagger: layer i of L merges i tau / L steps later, so that no step waits for all the layers and,
    with accumulation, the gradients of one or two of them exist at a time; False is the paper's: all at once. moments:
    when P turns, B's moments 'keep' their numbers, which was best for GaLore (results/options.md), are 'reset', or
    'rotate' with it.

    A merge comes right after its step's own move of B. Its P is made inside backward, so that the gradients of layers
    that merge together do not pile up. Give B no weight decay: it would draw W to what it was at its last merge."""

    small_gradients = True

    def __init__(self, params, layers, total_steps, lr=1e-2, tau=100, psi=1.2, stagger=True, moments='keep', **adam):
        if moments not in ('reset', 'keep', 'rotate'):
            raise ValueError(f"moments={moments!r} is not known: use 'reset', 'keep' or 'rotate'")
        self.layers = {layer.B: layer for layer in layers}
        self.updates, self.moments = set(update_steps(total_steps, tau, psi)[1:]), moments
        self.offset = {B: i * tau // len(self.layers) if stagger else 0 for i, B in enumerate(self.layers)}
        for layer in layers:
            layer.in_step = True
        super().__init__(params, lr, **adam)

    def update(self, p, R):
        """p takes its step of Adam. Then, if p is the B of a layer that is due, the layer merges."""
        if p not in self.layers:
            return super().update(p, R)
        layer, state = self.layers[p], self.state[p]
        if layer.has_P:
            merge(layer)
        super().update(p, R)
        if layer.next is not None:
            reset_or_rotate(state, merge(layer), self.group_of[p]['betas'], self.moments)
        layer.collect = state['step'] + 1 - self.offset[p] in self.updates

    @exactly
    def take_step(self):
        """As in adam.AdamW; after merges `metrics` holds `rounded`, the share of the weights' norm that they lost."""
        super().take_step()
        if lost := [layer.lost for layer in self.layers.values() if layer.lost is not None]:
            self.metrics['rounded'] = torch.stack(lost).mean()
        for layer in self.layers.values():
            layer.lost = None

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for layer in self.layers.values():
            layer.forget_gradient(layer.started)

    def gradient_ready(self, p):
        """p has its gradient of one more micro-batch; so has p's layer, if it is due."""
        if p in self.layers:
            layer = self.layers[p]
            if layer.in_parts and layer.G is not None and not layer.started:
                self.first_of_parts(layer)
            layer.ended, layer.complete = True, self.last_micro_batch
            if layer.G is not None and self.last_micro_batch and not several_processes():
                turn(layer, self.random_seed(p, self.state[p].get('step', 0)))
        super().gradient_ready(p)

    @exactly
    def first_of_parts(self, layer):
        """The first P and B's gradient by it, of a G that has come in parts: P is made of all of them."""
        G = short_side_first(layer.G, layer.proj_type)  # (m, n)
        turn(layer)
        layer.B.grad.add_(layer.read('P', G.dtype).T @ G, alpha=layer.scale)  # (r, n)

    # ---- several processes: B's gradient travels, and G to the one process that makes P of it

    def exchange(self, p):
        if p in self.layers and self.layers[p].G is not None:
            return self.share(p, self.layers[p].G)
        super().exchange(p)

    def make(self, p, G, mine):
        """-> [P (m, r)] of a layer's next merge, by its mean gradient G, or room for it."""
        layer = self.layers[p]
        layer.G, layer.added = G, 0
        if mine:
            turn(layer, self.random_seed(p, self.state[p].get('step', 0)), True)
        else:
            layer.G, layer.next = None, torch.empty(layer.shapes['P'], device=G.device)
        return [layer.next]

    def made(self, p, P):
        super().exchange(p)

    def is_due(self, p):
        return p in self.layers and self.layers[p].collect

    def make_due(self, modules):
        for module in modules:
            module.collect = True

    # ---- checkpoints: the layers' packed tensors travel with the states

    def state_dict(self):
        flags = [(layer.started, layer.collect) for layer in self.layers.values()]
        packed = [dict(layer.state_dict()) for layer in self.layers.values()]
        return super().state_dict() | {'layers': packed, 'flags': flags}

    def load_state_dict(self, state_dict):
        super().load_state_dict({name: state_dict[name] for name in ('state', 'param_groups')})
        for layer, packed, flags in zip(self.layers.values(), state_dict['layers'], state_dict['flags']):
            layer.restore(packed)
            layer.forget_gradient(flags[0])
            layer.collect = flags[1]


def replace_linears(model, some=None, **options):
    """Put a LoQTLinear in the place of each nn.Linear inside `model`, one after another, and return them as a list.
    some: of these modules alone."""
    layers, some = [], None if some is None else {id(module) for module in some}
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear) and (some is None or id(module) in some):
                setattr(parent, name, LoQTLinear.from_linear(module, **options))
                layers.append(getattr(parent, name))
    return layers


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options:
    """What --method=loqt adds to train.py's keys."""

    rank = 128  # r: dimensions of the subspace that B moves in between two merges
    scale = 0.5  # s: factor on P B; the paper's runs have 0.25 to 0.5
    update_proj_gap = 100  # tau: steps to the first merge, and the least between two
    psi = 1.2  # the k-th distance between two merges is tau + psi^k; 0: always tau
    compensation = 3  # rounds in a merge in which B makes good what 4 bits lose; 0: none
    refresh = 'subspace'  # 'subspace' | 'svd' | 'sara' | 'random': a step from the old basis, a slow SVD, some vectors
    #                       drawn of it, or any subspace at all, blind to the gradient: a control
    proj_type = 'std'  # 'std' | 'paper': where P stands of a square matrix, on the side of its inputs or its outputs
    stagger = True  # layers merge in turns, so that no step stalls; False: all in the same step, as in the paper
    moments = 'keep'  # 'keep' | 'rotate' | 'reset': what becomes of Adam's moments when the subspace turns
    train_rest = 'yes'  # 'yes' | 'no': all that is not in these layers, too, or of it a classifier's head alone
    quantize = 'nf4'  # 'nf4' | 'none': the blocks' weights and bases in 4 bits, or as dtype says
    double_quant = False  # the scales of nf4 in 8 bits, too: 0.37 bits a weight less


FIXED = ('rank', 'scale', 'quantize', 'double_quant', 'train_rest', 'proj_type')


def problems(config):
    """What does not go together, a sentence each."""
    from configurator import between, typed

    found = between(config, 1, 10**9, 'rank', 'update_proj_gap') + between(config, 1e-6, 1e4, 'scale')
    found += between(config, 0, 10, 'psi') + between(config, 0, 100, 'compensation')
    if config.max_iters / max(config.update_proj_gap, 1) > 1e6:
        found.append(f'update_proj_gap={config.update_proj_gap} is over a million merges in max_iters: raise it')
    if config.quantize == 'none':
        useless = [name for name in typed(config, 'compensation', 'double_quant') if getattr(config, name)]
        found += [f"{name} is of weights in 4 bits: leave it out with quantize='none'" for name in useless]
    return found


def layer_options(config):
    """The options of a LoQTLinear."""
    names = ('rank', 'scale', 'quantize', 'double_quant', 'compensation', 'refresh', 'proj_type')
    return {name: getattr(config, name) for name in names}


def linear(config):
    """What train.py makes the blocks' layers with for method='loqt': born packed, so that a model whose full weights
    do not fit can be built."""
    return partial(LoQTLinear, **layer_options(config))


def setup(model, config):
    """What train.py calls for method='loqt': the blocks' layers become LoQTLinears, where they are not yet."""
    named = adam.targeted(model, config, (LoQTLinear, nn.Linear))
    replace_linears(model.layers, named.values(), **layer_options(config))
    layers = [*adam.targeted(model, config, LoQTLinear).values()]
    factors = {id(layer.B): layer.B for layer in layers}
    if config.train_rest == 'no':
        model.requires_grad_(False)
        for part in (*factors.values(), *(p for head in model.head_modules().values() for p in head.parameters())):
            part.requires_grad_(True)
    others = split_decay(p for p in model.parameters() if id(p) not in factors and p.requires_grad)
    return LoQTAdamW(
        [{'params': list(factors.values()), 'weight_decay': 0.0}, *others],
        layers,
        total_steps=config.max_iters,
        tau=config.update_proj_gap,
        psi=config.psi,
        stagger=config.stagger,
        moments=config.moments,
        **adam.common(config),
    )
