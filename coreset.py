"""
CoLM (2407.19580): each step trains on a small batch, chosen from a larger pool so that their gradients are alike.

Of a pool of n examples k are trained on. Small sources, those below average size, are kept whole. Every other source
gets a budget in proportion to its size, which is spent on the subset S that best represents all of its examples V
(facility location):

    max_S sum_{i in V} max_{s in S} (C - |f_i - f_s|),  |S| = budget,  C = max_ij |f_i - f_j|      # solved greedily

The feature f_i stands for G_i, the gradient of example i (of its mean loss over its own target tokens) with respect to
the last block's V projection v = W x. All blocks before run once without gradients; then, for each example,

    'zo':    p_i = (L_i(v + eps z x) - L_i(v - eps z x)) / (2 eps),  m fixed random z      # (m,): p_i ~ <G_i, z>
    'grad':  G_i = D_i.T @ X_i,  D_i = dL_i / dv: one backward through the last block      # D (T, out), X (T, in)

With norm 'unit' f_i is G_i / |G_i| and |.| the l2 norm, so that the Gram matrix K_ij = <G_i, G_j> is all it needs.
With 'adam', the paper's, f_i is the step that Adam would make of G_i, given the history of what was chosen before, in
the h coordinates where the mean step of the source is largest, and |.| is the l1 norm.

'hidden' compares H_i, the mean hidden state that this block reads, less the pool's mean. depth takes the block at that
share of the depth for the last one, and the blocks above it do not run.

Memory: 'grad' keeps n T (in + out) numbers of a pool, 'zo' n m, 'hidden' n D. Time: a forward pass over all examples
that are compared, and but for 'hidden' the last block and the head once more: with n = 4 k two thirds of a step. A
quarter of the blocks and hidden states find near-duplicates as well (results/cheaper.md), in a fifth of a step.
Not for: data without repetition, where gradients of different examples are nearly orthogonal and a random batch is as
good. What changes results there is the larger weight of small sources, and 'random' gives them that, too. In pools of
near-duplicates 64 chosen examples reach a lower loss than all 256 (results/coreset.md).

    python train.py config/coreset_laptop.py                                                      # ours
    chosen = select(features, sources, k)                                     # (n, anything), (n,) -> (k,) indices
"""

import contextlib
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.functional import normalize
from torch.utils._pytree import tree_map

from head import ROWS, blocks_of_rows, cross_entropy_rows, room_for_logits, trained_rows
from model import ModelError

PIECE = 1 << 25  # numbers of all G_i that exist at a time
EPS = 1e-3  # of 'zo'
VALUES = ('v_proj', 'value', 'value_proj', 'v_lin')  # names of a value projection

# ---- which examples: pure functions --------------------------------------------------------------------------------


def naive_facility_location(similarity, k):
    """`facility_location` as it is defined, O(n^2 k): the same choices, but where gains are equal up to rounding."""
    A = np.asarray(similarity, dtype=np.float64)  # (n, n)
    best, chosen = np.full(len(A), A.min()), []  # (n,): max_{s in S} A_is so far
    for _ in range(k):
        objective = np.maximum(A, best[:, None]).sum(0)  # (n,): of S with each candidate added
        objective[chosen] = -np.inf
        chosen.append(int(objective.argmax()))
        best = np.maximum(best, A[:, chosen[-1]])
    return torch.tensor(chosen, dtype=torch.int64)


def facility_location(similarity, k):
    """Indices (k,) int64, in the order of their choice, of the greedy maximum of sum_i max_{s in S} similarity_is.

    similarity: (n, n). Raises ValueError if there are fewer than k examples."""
    # A choice raises `best` in few rows, and only these rows change the gains of the candidates. Updating the gains
    # instead of computing them anew takes about n^2 log n operations. A quarter of n examples chosen on one core: 0.6
    # ms against 0.5 for the naive function at n = 128, 1.6 against 3.1 at 256, 36 against 340 at 1,024.
    A = np.ascontiguousarray(torch.as_tensor(similarity).double().numpy().T)  # (n, n); row s: similarity_is of all i
    n = len(A)
    if A.shape != (n, n) or not 0 <= k <= n:
        raise ValueError(f'similarity of shape {A.T.shape} holds no {k} examples to choose: use (n, n) and k up to n')
    best = np.full(n, A.min() if n else 0.0)  # (n,): max_{s in S} similarity_is so far
    gain = (A - best).sum(1)  # (n,)
    rows = np.ascontiguousarray(A.T)  # (n, n); row i: similarity_is of all s
    chosen = np.empty(k, dtype=np.int64)
    for j in range(k):
        s = chosen[j] = int(gain.argmax())
        new = np.maximum(best, A[s])  # (n,)
        changed = np.flatnonzero(new > best)
        for some in np.split(changed, range(64, len(changed), 64)):  # as many rows as fit the cache
            lost = rows[some]  # (some, n)
            lost -= best[some, None]
            np.minimum(lost, (new - best)[some, None], out=lost)
            gain -= np.ones(len(some)) @ np.maximum(lost, 0, out=lost)
        gain[s], best = -np.inf, new
    return torch.from_numpy(chosen)


def budgets(sources, k, small=(), cap=1.0):
    """{source: how many of its examples to take}, k in all. sources: (n,) ints.

    small: sources to take whole; if they would fill more than `cap` of k, they share that in proportion. The others
    share the rest in proportion, rounded down, and the smallest of these shares get one more until all k are given.
    Raises ValueError if there are fewer than k examples."""
    names, counts = np.unique(np.asarray(sources), return_counts=True)
    if not 0 <= k <= counts.sum():
        raise ValueError(f'a budget of {k} does not fit a pool of {counts.sum()}: use a larger pool')
    keep, take = np.isin(names, list(small)), np.zeros_like(counts)
    kept = max(min(int(cap * k), counts[keep].sum()), k - counts[~keep].sum())  # no less than the others leave
    for group, part in ((keep, kept), (~keep, k - kept)):
        share = counts[group] * part // max(counts[group].sum(), 1)
        share[np.argsort(share, kind='stable')[: part - share.sum()]] += 1
        take[group] = share
    return dict(zip(names.tolist(), take.tolist()))


def unit_distance(K):
    """(n, n) distances |G_i / |G_i| - G_j / |G_j|| from the Gram matrix K (n, n) of the G."""
    length = K.diagonal().clamp_min(1e-30).sqrt()  # (n,)
    return (2 - 2 * K / (length[:, None] * length)).clamp_min(0).sqrt().fill_diagonal_(0)


def select(features, sources, k, small=(), cap=1.0, seed=0, distance=None):
    """(k,) int64, ascending: distinct examples of a pool, as many of each source as `budgets` says.

    features: (n, f), compared at unit length; None: choose at random, as is done in any case among small sources that
    do not all fit. distance: (n, n), used instead of the features'. seed: an int or several of them."""
    if features is not None:
        distance = unit_distance(features.float() @ features.float().T)
    sources, rng, chosen = np.asarray(sources), np.random.default_rng(seed), []
    for q, take in budgets(sources, k, small, cap).items():
        members = np.flatnonzero(sources == q)
        if take == len(members) or distance is None or q in small:
            chosen.append(rng.permutation(members)[:take])
        else:
            near = distance[members][:, members]
            chosen.append(members[facility_location(near.max() - near, take).numpy()])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def cluster_weights(chosen, sources, distance=None):
    """(k,) fp32 of mean 1: in proportion to how many examples of its source each chosen one is nearest to; without a
    distance (n, n), the chosen ones of a source stand for equal parts of it."""
    weights, sources = torch.zeros(len(chosen)), torch.as_tensor(sources)
    for q in sources.unique():
        mine, members = sources[chosen] == q, sources == q  # (k,), (n,)
        if mine.any() and distance is not None:
            nearest = distance[members][:, chosen[mine]].argmin(1)  # (members,)
            weights[mine] = torch.bincount(nearest, minlength=int(mine.sum())).float()
        elif mine.any():
            weights[mine] = members.sum() / mine.sum()
    return weights / weights.mean()


def gram(X, D):
    """K (n, n) fp32, K_ij = <G_i, G_j> of G_i = D_i.T @ X_i. X (n, T, in), D (n, T, out).

    The G_i are made some columns at a time: together they can be larger than the model."""
    n, _, out = D.shape
    K, step = torch.zeros(n, n, device=X.device), max(PIECE // (n * out), 1)
    for a in range(0, X.shape[2], step):
        G = (D.transpose(1, 2) @ X[:, :, a : a + step]).flatten(1).float()  # (n, out step)
        K.addmm_(G, G.T)
    return K


def matching_error(K, chosen, weights=None):
    """(2,): |mean of the chosen G - mean of all G| / |mean of all G|, and its root mean square over random batches of
    that size. K (n, n): Gram matrix; chosen (k,); weights (k,) of mean 1."""
    n, k = len(K), len(chosen)
    w = torch.zeros(n, device=K.device)
    w[chosen] = 1 / k if weights is None else weights.to(K.device) / k
    e, square = w - 1 / n, K.mean()  # (n,); |mean of all|^2
    spread = (K.diagonal().mean() - square) * (n - k) / (k * max(n - 1, 1))
    return (torch.stack([e @ K @ e, spread]).clamp_min(0) / square.clamp_min(1e-30)).sqrt()


# ---- features: no weight, .grad or global generator is touched (in eval mode), and fake tensors will do --------------


class Through(torch.autograd.Function):
    """A frozen linear layer: returns the y already computed and passes back dy @ W. Needed because a method's own
    backward (LoQT, GaLore) would collect a gradient here."""

    @staticmethod
    def forward(ctx, x, y, module):
        ctx.module = module
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        W = ctx.module.dense_weight() if hasattr(ctx.module, 'dense_weight') else ctx.module.weight  # (out, in)
        return dy @ W.to(dy.dtype), None, None  # (b, T, in)


def trained_input(v_proj, x):
    """The input of the V projection's trained matrix: x for W, alpha / r A x for LoRA's B."""
    return v_proj.scale * (x @ v_proj.A.to(x.dtype).T) if hasattr(v_proj, 'A') else x  # (b, T, in)


def example_losses(x, W, targets, needs_grad=False, bias=None, trained=None):
    """(b,) fp64: each example's mean cross-entropy in nats over its own targets that are not -100; and the gradient of
    their sum by x, or None. x (b, T, D), W (V, D), targets (b, T), bias (V,) or None: of the head; trained:
    `trained_rows` of the targets, or None."""
    keep = targets != -100
    share = (keep / keep.sum(1, keepdim=True).clamp_min(1)).flatten()  # (b T,): a token's part in its example's mean
    flat, ids, W = x.flatten(0, 1), targets.flatten(), W.detach().to(x.dtype)
    losses, dx = torch.zeros_like(share), torch.zeros_like(flat) if needs_grad else None
    bias, room = None if bias is None else bias.detach(), room_for_logits(min(len(flat), ROWS), W)
    for rows in blocks_of_rows(len(flat), trained):
        scale = share[rows] if needs_grad else None
        losses[rows], delta = cross_entropy_rows(flat[rows], W, ids[rows], scale, room, bias)
        if needs_grad:
            dx[rows] = delta @ W
    return (share * losses).double().view(targets.shape).sum(1), dx.view_as(x) if needs_grad else None


def blocks_of(model, depth):
    """How many of a model's blocks are this share of them: at least one."""
    return max(round(depth * len(model.layers)), 1)


def value_layer(model, name='auto', blocks=None):
    """The value projection of the last of so many blocks (all): the layer of a name that it has in one family or
    another, or whose name ends as `name` does. Raises ModelError where there is none."""
    ends = VALUES if name == 'auto' else (name,)
    linears = {n: m for n, m in model.layers[(blocks or 0) - 1].named_modules() if hasattr(m, 'in_features')}
    found = [module for n, module in linears.items() if f'.{n}'.endswith(tuple(f'.{end}' for end in ends))]
    if not found:
        asked = 'none of its layers is named as a value projection' if name == 'auto' else f'it has no layer {name}'
        some = ', '.join(dict.fromkeys(n.rpartition('.')[2] for n in linears))
        raise ModelError(
            f'CoLM compares gradients of a layer of the last block; {asked}: use --coreset_layer=NAME, one of {some}'
        )
    if hasattr(found[-1], 'A') and not len(found[-1].A):
        own = next(n for n, module in linears.items() if module is found[-1]).rpartition('.')[2]
        raise ModelError(f'CoLM compares gradients of {own}, which targets leaves out: add it, or use coreset=random')
    return found[-1]


@torch.no_grad()
def zeroth_order(model, h, rest, targets, directions=1, seed=0, layer='auto', trained=None, blocks=None):
    """p (b, m) fp32: derivatives of each example's loss along m random directions z of the last V projection, which are
    the same in every call with this seed. h (b, T, D): what enters the last block, rest: what else does.

    In fp32 and without TF32: the rounding of lower precision is larger than the difference of two such losses."""
    h, rest = tree_map(lambda t: t.float() if torch.is_tensor(t) and t.is_floating_point() else t, (h, rest))
    v_proj, precision = value_layer(model, layer, blocks), torch.get_float32_matmul_precision()
    shape, p, kept = (v_proj.out_features, len(v_proj.A) if hasattr(v_proj, 'A') else v_proj.in_features), [], {}
    torch.set_float32_matmul_precision('highest')

    def moved(z, eps, module, inputs, v):
        if not kept:
            kept['v'], kept['x'] = v, trained_input(module, inputs[0])  # (b, T, out), (b, T, in)
        return kept['v'] + eps * (kept['x'] @ z.T)

    try:
        for j in range(directions):
            generator = torch.Generator(h.device).manual_seed(100_003 * seed + j)
            z, losses = torch.randn(*shape, generator=generator, device=h.device), []  # (out, in)
            for eps in (EPS, -EPS):
                with v_proj.register_forward_hook(partial(moved, z, eps)):
                    out = model.last(h, rest, blocks)
                losses.append(example_losses(out, model.head, targets, False, model.head_bias, trained)[0])
            p.append(((losses[0] - losses[1]) / (2 * EPS)).float())
    finally:
        torch.set_float32_matmul_precision(precision)
    return torch.stack(p, 1)


def factors(model, h, rest, targets, layer='auto', trained=None, blocks=None):
    """X (b, T, in), D (b, T, out): each example's gradient by the last V projection (LoRA: by its B) is D_i.T @ X_i."""
    block, kept = model.layers[(blocks or 0) - 1], {}
    v_proj = value_layer(model, layer, blocks)

    def make_leaf(module, args, v):
        kept['X'], kept['v'] = trained_input(module, args[0]).detach(), v.detach().requires_grad_()
        return kept['v']

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        hooks.enter_context(v_proj.register_forward_hook(make_leaf))
        for module in block.modules():
            if module is not v_proj and (isinstance(module, nn.Linear) or hasattr(module, 'dense_weight')):
                frozen = module.register_forward_hook(lambda m, args, y: Through.apply(args[0], y.detach(), m))
                hooks.enter_context(frozen)
        out = model.last(h, rest, blocks)  # (b, T, D)
        _, dx = example_losses(out.detach(), model.head, targets, True, model.head_bias, trained)
        (D,) = torch.autograd.grad(out, kept['v'], dx)
    return kept['X'], D


def widths_of(targets, batch_size):
    """Of each micro-batch of targets (n, T) the place behind its last one: nothing beyond it counts."""
    places = torch.arange(1, targets.shape[1] + 1, device=targets.device)
    last = ((targets != -100) * places).amax(1).cpu()  # (n,)
    return [max(int(some.max()), 1) for some in last.split(batch_size)]


def features(model, tokens, targets, feature, batch_size, directions=1, seed=0, rank=0, world=1, widths=None,
             layer='auto', blocks=None):  # fmt: skip
    """{name: tensor} of a pool, tokens and targets (n, T): H (n, D), each example's mean hidden state, and for 'zo' p
    (n, m), for 'grad' X (n, T, in) and D (n, T, out). batch_size examples at a time; process `rank` of `world` fills in
    its share of these micro-batches and leaves zeros elsewhere. widths: `widths_of` the targets, to run no padding.

    All run the model equally often, as those must that gather its weights together; what is too much is dropped."""
    found, n = {}, len(tokens)
    widths = widths or [tokens.shape[1]] * -(-n // batch_size)
    for first in range(0, n, world * batch_size):
        mine = first + rank * batch_size < n
        a = first + rank * batch_size if mine else 0
        rows, T = slice(a, a + batch_size), widths[a // batch_size]
        x, y = tokens[rows, :T], targets[rows, :T]
        trained = trained_rows(y)  # the others have no logits
        with torch.no_grad():
            h, rest = model.before_last(x, blocks)  # (b, T, D)
            own = (y != -100)[:, :, None]
            part = {'H': (h * own).float().sum(1) / own.sum(1).clamp_min(1)}
        if feature == 'zo':
            part['p'] = zeroth_order(model, h, rest, y, directions, seed, layer, trained, blocks)
        elif feature == 'grad':
            part['X'], part['D'] = factors(model, h, rest, y, layer, trained, blocks)
        del h, rest  # not beside the next ones
        for name, t in part.items():
            if name not in found:
                found[name] = t.new_zeros(n, *([max(widths)] * (t.ndim == 3)), t.shape[-1])
            if mine:
                (found[name][rows, :T] if t.ndim == 3 else found[name][rows]).copy_(t)
    return found


# ---- step after step ------------------------------------------------------------------------------------------------


class Coreset:
    """Chooses the batch of each step, and keeps what has to last from one step to the next.

    feature: 'random', 'zo', 'hidden' or 'grad'; norm: 'unit' or 'adam'; weights: 'uniform' or 'cluster'; directions: m
    of 'zo'; depth: share of the blocks that the pool runs through, as if there were no more; sparsity: h of 'adam', 0
    for all coordinates. small: sources to keep whole, as long as they fill at most keep_small
    of the batch. clusters: 0, or how many clusters of hidden states replace the sources; they are found anew at the
    steps `remake`, and before the first of these the choice is random. Raises ValueError for an unknown word.

    After `choose`: kept_share, the part of the batch that comes from small sources; errors, for 'grad' (3,), else None:
    `matching_error` of what was chosen and of a random batch, over the examples that were compared, and of what was
    chosen if each example has the weight of its cluster."""

    def __init__(self, feature='grad', norm='unit', small=(), weights='uniform', directions=16, clusters=0,
                 remake=(), keep_small=1.0, sparsity=2560, betas=(0.9, 0.999), seed=0, layer='auto',
                 depth=1.0):  # fmt: skip
        self.feature, self.norm, self.small, self.weights, self.directions = feature, norm, small, weights, directions
        self.clusters, self.remake, self.keep_small, self.sparsity = clusters, set(remake), keep_small, sparsity
        self.betas, self.seed, self.layer, self.depth = betas, seed, layer, depth
        self.t, self.M, self.V, self.centres = 0, None, None, None
        self.kept_share, self.errors = 0.0, None
        known = dict(feature=('random', 'zo', 'hidden', 'grad'), norm=('unit', 'adam'), weights=('uniform', 'cluster'))
        for name, words in known.items():
            if (value := getattr(self, name)) not in words:
                raise ValueError(f'{name}={value!r} is not known: use one of {", ".join(map(repr, words))}')

    def look(self, model, tokens, targets, batch_size, plan=False):
        """`features` of a pool, made by all processes together. plan: of two of its micro-batches alone, to learn how
        much memory the pool takes."""
        together, share = dist.is_initialized() and not plan, (0, 1)
        widths = [tokens.shape[1]] * -(-len(tokens) // batch_size) if plan else widths_of(targets, batch_size)
        if together:
            share = (dist.get_rank(), dist.get_world_size())
        elif plan:
            share = (0, max(len(tokens) // batch_size // 2, 1))
        training = [module for module in model.modules() if module.training]
        model.eval()  # no dropout, whose masks would advance the global generator
        own = self.feature, batch_size, self.directions, self.seed
        try:
            found = features(model, tokens, targets, *own, *share, widths, self.layer, blocks_of(model, self.depth))
        finally:
            for module in training:
                module.training = True
        for t in found.values() if together else ():
            dist.all_reduce(t)  # zeros where another process filled in its share
        return found

    def compare(self, found):
        """K (c, c): the Gram matrix of the gradients G, for 'zo' of their p, for 'hidden' of H less its mean."""
        if self.feature == 'grad':
            return gram(found['X'], found['D'])
        f = found['p'] if self.feature == 'zo' else found['H'] - found['H'].mean(0)  # (c, m or D)
        return f @ f.T

    @torch.no_grad()
    def choose(self, model, tokens, targets, sources, k, step, batch_size):
        """-> (k,) ascending indices into the pool tokens, targets (n, T), sources (n,), and (k,) weights or None.

        The same in all processes, given the same pool. Only sources of which a part is chosen run through the model."""
        n, found, distance = len(tokens), None, None
        if self.clusters:
            found = self.look(model, tokens, targets, batch_size)
            sources = self.find_clusters(normalize(found['H']), step)
        take, sources = budgets(sources, k, self.small, self.keep_small), torch.as_tensor(sources)
        partly = [q for q, t in take.items() if q not in self.small and 0 < t < (sources == q).sum()]
        rows = torch.isin(sources, torch.tensor(partly, dtype=sources.dtype)).nonzero()[:, 0]  # (c,): to be compared
        compare = self.feature != 'random' and len(rows) > 0 and (not self.clusters or self.centres is not None)
        if compare:
            if found is None:
                found = self.look(model, tokens[rows], targets[rows], batch_size)
            else:
                found = {name: t[rows] for name, t in found.items()}
            K = self.compare(found)
            near = unit_distance(K) if self.norm == 'unit' else self.adam_distance(found, sources[rows])
            distance = near.cpu()
            if len(rows) < n:  # only these are ever asked for
                distance = torch.zeros(n, n).index_put_((rows[:, None], rows), distance)
        chosen = select(None, sources, k, self.small, self.keep_small, (self.seed, step), distance)
        if dist.is_initialized():  # processes may round differently and must train on the same choice
            shared = chosen.to(tokens.device)
            dist.broadcast(shared, 0)
            chosen = shared.cpu()
        weights = cluster_weights(chosen, sources, distance) if self.weights == 'cluster' else None
        self.kept_share, self.errors = sum(take.get(q, 0) for q in self.small) / k, None
        if compare:
            picked, among = torch.isin(rows, chosen).nonzero()[:, 0], torch.isin(chosen, rows)
            if self.feature == 'grad':
                w = None if weights is None else weights[among] / weights[among].mean()
                by_size = cluster_weights(picked, sources[rows], near.cpu())
                self.errors = torch.cat([matching_error(K, picked, w), matching_error(K, picked, by_size)[:1]])
            if self.norm == 'adam':
                self.remember(found, picked)
        return chosen, weights

    # ---- norm 'adam': the step that Adam would take with one example alone

    def gradient(self, found, i):
        return found['p'][i] if self.feature == 'zo' else (found['D'][i].T @ found['X'][i]).float().flatten()

    def adam_distance(self, found, sources):
        """(c, c) l1 distances of Adam's steps, between examples of one source; t counts the calls of `remember`.
        sources (c,), or for a plan, which knows no data, None: all of one source takes most."""
        (b1, b2), t = self.betas, self.t + 1
        if self.M is None:
            self.M, self.V = (torch.zeros_like(self.gradient(found, 0)) for _ in range(2))
        self.M, self.V = (m.to(found['H'].device) for m in (self.M, self.V))  # a checkpoint's are on the CPU
        one = [list(range(len(found['H'])))]
        groups = one if sources is None else [(sources == q).nonzero()[:, 0].tolist() for q in sources.unique()]
        D = torch.zeros(len(found['H']), len(found['H']), device=self.M.device)

        def direction(i):
            g = self.gradient(found, i)
            M, V = (b1 * self.M + (1 - b1) * g) / (1 - b1**t), (b2 * self.V + (1 - b2) * g * g) / (1 - b2**t)
            return M / (V.sqrt() + 1e-8)

        for rows in groups:
            mean = sum(direction(i) for i in rows) / len(rows)
            top = mean.abs().topk(min(self.sparsity or len(mean), len(mean))).indices  # (h,)
            f = torch.stack([direction(i)[top] for i in rows])  # (rows, h)
            at = torch.tensor(rows)
            D[at[:, None], at] = torch.cdist(f, f, p=1)
        return D

    def remember(self, found, picked):
        """Add the chosen examples to the history: to M their mean, to V, other than in Adam, the mean of squares."""
        (b1, b2), self.t = self.betas, self.t + 1
        g, square = torch.zeros_like(self.M), torch.zeros_like(self.V)
        for i in picked:
            g += self.gradient(found, i) / len(picked)
            square += self.gradient(found, i).square() / len(picked)
        self.M, self.V = b1 * self.M + (1 - b1) * g, b2 * self.V + (1 - b2) * square

    # ---- where the data names no sources: clusters

    def find_clusters(self, H, step):
        """(n,) the nearest of the centres, which are found anew at the steps of `remake`. H (n, D) of unit length."""
        if step in self.remake:
            far = torch.cdist(H, H)
            self.centres = H[facility_location(far.max() - far, min(self.clusters, len(H))).to(H.device)]  # (c, D)
            for _ in range(10):  # Lloyd's k-means
                nearest = torch.cdist(H, self.centres).argmin(1)  # (n,)
                for c in nearest.unique():
                    self.centres[c] = H[nearest == c].mean(0)
        if self.centres is None:
            return torch.zeros(len(H), dtype=torch.int64)
        nearest = torch.cdist(H, self.centres.to(H.device)).argmin(1)  # (n,)
        if step in self.remake:
            counts = torch.bincount(nearest, minlength=len(self.centres))
            self.small = (counts < len(H) / len(counts)).nonzero()[:, 0].tolist() if self.keep_small else []
        return nearest.cpu()

    def state_dict(self):
        return {name: getattr(self, name) for name in ('t', 'M', 'V', 'centres', 'small')}

    def load_state_dict(self, state):
        for name, value in state.items():
            if name != 'small' or self.clusters:  # without clusters `small` follows from the config and the data
                setattr(self, name, value)


# ---- for train.py ---------------------------------------------------------------------------------------------------


class Options:
    """What --coreset adds to train.py's keys."""

    coreset_from = 4  # how many times more windows a step chooses from; each costs a forward under zo and grad
    coreset_norm = 'unit'  # 'unit' | 'adam': compare gradients at unit length, or, as in the paper, Adam's step of each
    coreset_sparsity = 2560  # h: coordinates that adam compares, those where a source's mean step is largest; 0: all
    coreset_weights = 'uniform'  # 'uniform' | 'cluster': cluster weighs each window by how many it stands for
    coreset_clusters = 0  # 0: sources are the data set's; else so many clusters of hidden states, found anew five times
    coreset_depth = 1.0  # share of the blocks that the pool runs through: a quarter finds the same copies at less cost
    coreset_layer = 'auto'  # the layer of the last block whose gradients are compared; auto: its value projection
    keep_small = 0.5  # share of the batch within which sources below average size are taken whole; 0: all in proportion
    zo_directions = 16  # random directions of zo; the paper's 1 leaves a single number a window


FIXED = ('coreset', 'coreset_norm', 'coreset_clusters', 'zo_directions', 'coreset_layer')  # what a saved history means
FIXED += ('coreset_depth',)

MOST_WINDOWS = 2**16  # in a pool, of which each is compared with each: 17 GB


def problems(config):
    """What does not go together, a sentence each."""
    if config.coreset == 'none':
        return []
    from configurator import between, typed

    c, k = config, config.batch_size * config.gradient_accumulation_steps
    found = between(c, 2, max(MOST_WINDOWS // max(k, 1), 2), 'coreset_from') + between(c, 1, 4096, 'zo_directions')
    found += between(c, 0, c.coreset_from * k, 'coreset_clusters') + between(c, 0, 1, 'keep_small')
    found += between(c, 0, 2**40, 'coreset_sparsity') + between(c, 0.001, 1, 'coreset_depth')
    if c.coreset != 'zo' and typed(c, 'zo_directions'):
        found.append(f"zo_directions is of zo alone: leave it out with coreset='{c.coreset}', or use --coreset=zo")
    if c.coreset in ('random', 'hidden') and c.coreset_norm != 'unit':
        found.append(f"coreset_norm is of what zo and grad compare: leave it out with coreset='{c.coreset}'")
    if c.coreset == 'random' and not c.coreset_clusters and typed(c, 'coreset_depth'):
        found.append("coreset='random' looks at no block: leave out coreset_depth")
    if c.coreset in ('random', 'hidden') and typed(c, 'coreset_layer'):
        found.append(f"coreset_layer is of what zo and grad compare: leave it out with coreset='{c.coreset}'")
    if c.coreset_norm == 'unit' and c.coreset_sparsity != Options.coreset_sparsity:
        found.append('coreset_sparsity is of what adam compares: leave it out, or use --coreset_norm=adam')
    if c.coreset == 'zo' and c.coreset_norm == 'unit' and c.zo_directions == 1:
        found.append(
            "coreset='zo' in one direction keeps only a sign at unit length: "
            'use --coreset_norm=adam, or more --zo_directions'
        )
    targets, own = c.targets if c.method == 'lora' else 'all', c.coreset_layer
    names = {'all', own} if own != 'auto' else {'all', *VALUES}
    if c.coreset in ('zo', 'grad') and not names & set(targets.split(',')):
        own = 'v_proj' if own == 'auto' else own
        found.append(
            f"coreset='{c.coreset}' compares gradients of {own}, which targets leaves out: "
            f'add {own}, or use --coreset=random'
        )
    return found


def setup(config, data=None):
    """The Coreset of a run, or None for coreset='none'. data: the training tokens, which know the sources' sizes."""
    c = config
    if c.coreset == 'none':
        return None
    sizes = np.diff(data.source_ends, prepend=0) if data else np.zeros(1)
    small = np.flatnonzero(sizes < sizes.mean()).tolist() if c.keep_small and not c.coreset_clusters else []
    remake = (20, *(c.max_iters * i // 5 for i in range(1, 5)))  # after 20 random steps, then four times (CoLM, 5.4)
    return Coreset(feature=c.coreset, norm=c.coreset_norm, small=small, weights=c.coreset_weights,
                   directions=c.zo_directions, clusters=c.coreset_clusters, remake=remake, keep_small=c.keep_small,
                   sparsity=c.coreset_sparsity, betas=(c.beta1, c.beta2), seed=c.seed,
                   layer=c.coreset_layer, depth=c.coreset_depth)  # fmt: skip


def chosen_batches(selection, model, data, config, step, device, rank=0, world=1):
    """The micro-batches of a step for one process, out of a pool that is a function of the seed and the step alone."""
    c, k = config, config.batch_size * config.gradient_accumulation_steps
    pool = data.pool(c.seed, step, c.coreset_from * k)
    x, y, sources = data.read(pool)
    indices, weights = selection.choose(model, x.to(device), y.to(device), sources, k, step, c.batch_size)
    return data.micro_batches([pool[i] for i in indices], weights, c.batch_size, rank, world)


def summary(selection, kept):
    """What a log line says about the choices since the last one. kept: their kept_share."""
    if not selection:
        return ''
    text = f' | kept {100 * sum(kept) / len(kept):.0f}%'
    if selection.errors is not None:  # of the last step
        chosen, at_random, by_size = selection.errors.tolist()
        text += f' | gradient error {chosen:.3f}, by cluster size {by_size:.3f}, random {at_random:.3f}'
    return text
