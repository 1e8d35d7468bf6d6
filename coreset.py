"""
CoLM: at every step a small batch chosen out of a large one, so that its gradient is like the large one's (2407.19580).

Of a pool of n examples k are trained on. Small sources, those below the average size, are kept whole; the others get
budgets in proportion, and within each a subset S that represents its members V best (facility location):

    max_S sum_{i in V} max_{s in S} (C - |f_i - f_s|),  |S| = budget,  C = max_ij |f_i - f_j|      # greedy, exact

f_i stands for the gradient G_i of example i (its mean loss over its own target tokens) by the last block's V
projection v = W x. All blocks before run once without gradients; then, for each example,

    'zo':    p_i = (L_i(v + eps z x) - L_i(v - eps z x)) / (2 eps),  m fixed random z      # (m,): p_i ~ <G_i, z>
    'grad':  G_i = D_i.T @ X_i,  D_i = dL_i / dv: one backward through the last block      # D (T, out), X (T, in)

and f_i is G_i at unit length ('unit'), |.| the l2 norm, for which K_ij = <G_i, G_j> is all one needs; or, as in the
paper, what Adam with a history of what was selected would make of G_i ('adam'), at the h coordinates that are largest
on average in a source, |.| the l1 norm.

Memory: 'grad' keeps n T (in + out) numbers of a pool, 'zo' n m. Time: a forward of what is compared, and the last block
and the head again: with n = 4 k about two thirds of a step.
Not for: data without repetition, where gradients of different examples are nearly orthogonal and a random batch is as
good. What moves results there is the larger weight of small sources, which 'random' gives, too. In pools of
near-duplicates 64 chosen examples end below all 256 (results/coreset.md).

    python train.py config/coreset_laptop.py                                                      # ours
    chosen = select(features, sources, k)                                     # (n, anything), (n,) -> (k,) indices
"""

import contextlib

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.functional import normalize

ROWS = 512  # rows of logits at a time
PIECE = 1 << 25  # numbers of all G_i at a time
EPS = 1e-3  # of 'zo'

# ---- which examples: pure functions --------------------------------------------------------------------------------


def facility_location(similarity, k):
    """Indices (k,) int64, in the order of their choice, of the greedy maximum of sum_i max_{s in S} similarity_is.

    similarity: (n, n). Each gain is kept up to date with the rows that the last choice changed, n^2 log n operations
    in practice. Raises ValueError where there are not k examples."""
    A = np.ascontiguousarray(torch.as_tensor(similarity).double().numpy().T)  # (n, n): row s is what s gives to each i
    n = len(A)
    if A.shape != (n, n) or not 0 <= k <= n:
        raise ValueError(f'similarity of shape {A.T.shape} holds no {k} examples to choose: use (n, n) and k up to n')
    best = np.full(n, A.min() if n else 0.0)  # (n,); a constant from which all gains are counted
    gain = (A - best).sum(1)  # (n,)
    rows = np.ascontiguousarray(A.T)  # (n, n): row i is what each candidate gives to i
    chosen = np.empty(k, dtype=np.int64)
    for j in range(k):
        s = chosen[j] = int(gain.argmax())
        new = np.maximum(best, A[s])  # (n,)
        changed = np.flatnonzero(new > best)
        for some in np.split(changed, range(64, len(changed), 64)):  # as many rows as stay in the cache
            lost = rows[some]  # (some, n)
            lost -= best[some, None]
            np.minimum(lost, (new - best)[some, None], out=lost)
            gain -= np.ones(len(some)) @ np.maximum(lost, 0, out=lost)
        gain[s], best = -np.inf, new
    return torch.from_numpy(chosen)


def budgets(sources, k, small=(), cap=1.0):
    """{source: how many of its examples to take}, k in all. sources: (n,) ints.

    small: sources to take whole, or in proportion where they would fill more than `cap` of k. The others share the rest
    in proportion, rounded down, what remains going to the smallest first. Raises ValueError where there are not k."""
    names, counts = np.unique(np.asarray(sources), return_counts=True)
    if not 0 <= k <= counts.sum():
        raise ValueError(f'a budget of {k} does not fit a pool of {counts.sum()}: use a larger pool')
    keep, take = np.isin(names, list(small)), np.zeros_like(counts)
    kept = max(min(int(cap * k), counts[keep].sum()), k - counts[~keep].sum())
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

    features: (n, f), compared at unit length, or None: at random, as the small sources are where not all of them fit.
    distance: (n, n), in the place of the features' own. seed: an int or several of them."""
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
    """(k,) fp32 of mean 1: in proportion to how many of the pool are nearest to each chosen one, within its source;
    without a distance (n, n), each as many as the others of its source."""
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
    """K (n, n) fp32, K_ij = <G_i, G_j>, G_i = D_i.T @ X_i, some columns of all G_i at a time. X (n, T, in), D (n, T,
    out)."""
    n, _, out = D.shape
    K, step = torch.zeros(n, n, device=X.device), max(PIECE // (n * out), 1)
    for a in range(0, X.shape[2], step):
        G = (D.transpose(1, 2) @ X[:, :, a : a + step]).flatten(1).float()  # (n, out step)
        K.addmm_(G, G.T)
    return K


def matching_error(K, chosen, weights=None):
    """(2,): |mean of the chosen G - mean of all G| / |mean of all G|, and its root mean square for a random batch of
    that size. K (n, n): Gram matrix; chosen (k,); weights (k,) of mean 1."""
    n, k = len(K), len(chosen)
    w = torch.zeros(n, device=K.device)
    w[chosen] = 1 / k if weights is None else weights.to(K.device) / k
    e, square = w - 1 / n, K.mean()  # (n,); |mean of all|^2
    spread = (K.diagonal().mean() - square) * (n - k) / (k * max(n - 1, 1))
    return (torch.stack([e @ K @ e, spread]).clamp_min(0) / square.clamp_min(1e-30)).sqrt()


# ---- features: nothing is touched, and all of it runs on fake tensors -----------------------------------------------


class Through(torch.autograd.Function):
    """The output y that a layer gave for x, as a function of x alone: its weights take no gradient, whoever owns them
    and whatever their own backward does."""

    @staticmethod
    def forward(ctx, x, y, module):
        ctx.module = module
        return y.view_as(y)

    @staticmethod
    def backward(ctx, delta):
        W = ctx.module.dense_weight() if hasattr(ctx.module, 'dense_weight') else ctx.module.weight  # (out, in)
        return delta @ W.to(delta.dtype), None, None


@contextlib.contextmanager
def hooked(module, hook):
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def evaluating(model):
    """No dropout, whose masks would take from the global generator; afterwards every module's flag is what it was."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def trained_input(v_proj, x):
    """What the trained matrix of the V projection multiplies: x, or under LoRA alpha / r A x for its B."""
    return v_proj.scale * (x @ v_proj.A.to(x.dtype).T) if hasattr(v_proj, 'A') else x  # (b, T, in)


def example_losses(x, W, targets, needs_grad=False):
    """(b,) fp64: each example's mean cross-entropy in nats over its own targets that are not -100; its gradient by x.

    x (b, T, D), W (V, D), targets (b, T). ROWS rows of logits exist at a time."""
    keep = targets != -100
    share = (keep / keep.sum(1, keepdim=True).clamp_min(1)).flatten()  # (b T,): what a token counts in its example
    rows, ids, W = x.flatten(0, 1), targets.clamp_min(0).flatten()[:, None], W.detach().to(x.dtype)
    losses, dx = [], torch.empty_like(rows) if needs_grad else None
    for a in range(0, len(rows), ROWS):
        logits = (rows[a : a + ROWS] @ W.T).float()  # (rows, V)
        logits -= logits.amax(1, keepdim=True)
        picked = logits.gather(1, ids[a : a + ROWS])  # (rows, 1)
        total = logits.exp_().sum(1, keepdim=True)  # (rows, 1)
        scale = share[a : a + ROWS, None]
        losses.append(scale * (total.log() - picked))
        if needs_grad:
            logits = (logits.mul_(scale / total)).scatter_add_(1, ids[a : a + ROWS], -scale)
            torch.mm(logits.to(x.dtype), W, out=dx[a : a + ROWS])
    return torch.cat(losses).double().view(targets.shape).sum(1), dx.view_as(x) if needs_grad else None


@torch.no_grad()
def zeroth_order(model, h, cos, sin, targets, directions=1, seed=0):
    """p (b, m) fp32: derivatives of each example's loss along m random directions z of the last V projection, which are
    the same at every call with this seed. h (b, T, D): what enters the last block.

    In fp32, and in full: half precision's rounding is larger than the difference of two such losses."""
    block, (h, cos, sin), p = model.layers[-1], (t.float() for t in (h, cos, sin)), []
    v_proj, precision = block.self_attn.v_proj, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        x = block.input_layernorm(h)  # (b, T, D)
        v, x = v_proj(x), trained_input(v_proj, x)  # (b, T, out), (b, T, in)
        for j in range(directions):
            generator = torch.Generator(h.device).manual_seed(100_003 * seed + j)
            z = torch.randn(v.shape[-1], x.shape[-1], generator=generator, device=h.device)  # (out, in)
            u, losses = x @ z.T, []  # (b, T, out)
            for eps in (EPS, -EPS):
                with hooked(v_proj, lambda *_, eps=eps, u=u: v + eps * u):
                    out = model.norm(block(h, cos, sin))
                losses.append(example_losses(out, model.head, targets)[0])
            p.append(((losses[0] - losses[1]) / (2 * EPS)).float())
    finally:
        torch.set_float32_matmul_precision(precision)
    return torch.stack(p, 1)


def factors(model, h, cos, sin, targets):
    """X (b, T, in), D (b, T, out): each example's gradient by the last V projection (LoRA: by its B) is D_i.T @ X_i."""
    block, kept = model.layers[-1], {}
    v_proj = block.self_attn.v_proj

    def make_leaf(module, args, v):
        kept['X'], kept['v'] = trained_input(module, args[0]).detach(), v.detach().requires_grad_()
        return kept['v']

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        hooks.enter_context(hooked(v_proj, make_leaf))
        for module in block.modules():
            if module is not v_proj and (isinstance(module, nn.Linear) or hasattr(module, 'dense_weight')):
                hooks.enter_context(hooked(module, lambda m, args, y: Through.apply(args[0], y.detach(), m)))
        out = model.norm(block(h, cos, sin))  # (b, T, D)
        _, dx = example_losses(out.detach(), model.head, targets, needs_grad=True)
        (D,) = torch.autograd.grad(out, kept['v'], dx)
    return kept['X'], D


def features(model, tokens, targets, feature, batch_size, directions=1, seed=0, rank=0, world=1):
    """{name: tensor} of a pool, tokens and targets (n, T): H (n, D), hidden states in the mean, and p (n, m) for 'zo',
    X (n, T, in) and D (n, T, out) for 'grad'. batch_size examples at a time; process `rank` of `world` does its share
    of those and leaves zeros elsewhere."""
    found, n = {}, len(tokens)
    mine = range(rank * batch_size, n, world * batch_size)
    for a in mine or [0]:  # one that has none of them needs the shapes all the same
        x, y = tokens[a : a + batch_size], targets[a : a + batch_size]
        with torch.no_grad():
            h, cos, sin = model.embed(x)  # (b, T, D)
            for layer in model.layers[:-1]:
                h = layer(h, cos, sin)
            own = (y != -100)[:, :, None]
            part = {'H': (h * own).float().sum(1) / own.sum(1).clamp_min(1)}
        if feature == 'zo':
            part['p'] = zeroth_order(model, h, cos, sin, y, directions, seed)
        elif feature == 'grad':
            part['X'], part['D'] = factors(model, h, cos, sin, y)
        for name, t in part.items():
            if name not in found:
                found[name] = torch.zeros(n, *t.shape[1:], dtype=t.dtype, device=t.device)
            if mine:
                found[name][a : a + batch_size] = t
    return found


# ---- the history ----------------------------------------------------------------------------------------------------


class Coreset:
    """Chooses each step's batch, and keeps the little that lasts from one step to the next.

    feature: 'random', 'zo' or 'grad'; norm: 'unit' or 'adam'; weights: 'uniform' or 'cluster'; directions: m of 'zo';
    sparsity: h of 'adam'. small: sources to be kept whole, as long as they fill at most keep_small of the batch.
    clusters: 0, or the number of clusters of hidden states that stand in for sources, found anew at the steps `remake`
    (all is random before the first). Raises ValueError for words that are not known.

    After `choose`: kept_share, of the batch; errors, None or for 'grad' (3,): `matching_error` of what was chosen and
    of a random batch, among what was compared, and of the chosen if each is weighed by the size of its cluster."""

    def __init__(self, feature='grad', norm='unit', small=(), weights='uniform', directions=16, clusters=0,
                 remake=(), keep_small=1.0, sparsity=2560, betas=(0.9, 0.999), seed=0):  # fmt: skip
        for name, value, allowed in (
            ('feature', feature, ('random', 'zo', 'grad')),
            ('norm', norm, ('unit', 'adam')),
            ('weights', weights, ('uniform', 'cluster')),
        ):
            if value not in allowed:
                raise ValueError(f'{name}={value!r} is not known: use one of {", ".join(map(repr, allowed))}')
        self.feature, self.norm, self.small, self.weights, self.directions = feature, norm, small, weights, directions
        self.clusters, self.remake, self.keep_small, self.sparsity = clusters, set(remake), keep_small, sparsity
        self.betas, self.seed = betas, seed
        self.t, self.M, self.V, self.centres = 0, None, None, None
        self.kept_share, self.errors = 0.0, None

    def look(self, model, tokens, targets, batch_size, plan=False):
        """`features` of a pool, each process its share, all of them in the end. plan: of two micro-batches alone."""
        several = dist.is_initialized() and dist.get_world_size() > 1 and not plan
        share = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        if plan:
            share = (0, max(len(tokens) // batch_size // 2, 1))
        with evaluating(model):
            found = features(model, tokens, targets, self.feature, batch_size, self.directions, self.seed, *share)
        for t in found.values() if several else ():
            dist.all_reduce(t)  # the others' are zeros here
        return found

    def compare(self, found):
        """K (c, c), the Gram matrix of what was looked at; of 'zo', in its directions."""
        return gram(found['X'], found['D']) if self.feature == 'grad' else found['p'] @ found['p'].T

    @torch.no_grad()
    def choose(self, model, tokens, targets, sources, k, step, batch_size):
        """-> (k,) ascending indices into the pool tokens, targets (n, T), sources (n,), and (k,) weights or None.

        The same on all processes, given the same pool. Only examples of sources that lose some are looked at."""
        n, found, distance = len(tokens), None, None
        if self.clusters:
            found = self.look(model, tokens, targets, batch_size)
            sources = self.find_clusters(normalize(found['H']), step)
        take, sources = budgets(sources, k, self.small, self.keep_small), torch.as_tensor(sources)
        open_ = [q for q, t in take.items() if q not in self.small and 0 < t < (sources == q).sum()]
        rows = torch.isin(sources, torch.tensor(open_, dtype=sources.dtype)).nonzero()[:, 0]  # (c,): to be compared
        compare = self.feature != 'random' and len(rows) > 0 and (not self.clusters or self.centres is not None)
        if compare:
            if found is None:
                found = self.look(model, tokens[rows], targets[rows], batch_size)
            else:
                found = {name: t[rows] for name, t in found.items()}
            K = self.compare(found)
            near = unit_distance(K) if self.norm == 'unit' else self.adam_distance(found, sources[rows])
            distance = torch.zeros(n, n)
            distance[rows[:, None], rows] = near.cpu()
        chosen = select(None, sources, k, self.small, self.keep_small, (self.seed, step), distance)
        if dist.is_initialized() and dist.get_world_size() > 1:  # rounding must not set the processes apart
            shared = chosen.to(tokens.device)
            dist.broadcast(shared, 0)
            chosen = shared.cpu()
        weights = cluster_weights(chosen, sources, distance) if self.weights == 'cluster' else None
        self.kept_share = sum(take.get(q, 0) for q in self.small) / k
        self.errors = None
        if compare:
            picked = torch.isin(rows, chosen).nonzero()[:, 0]
            among = torch.isin(chosen, rows)
            if self.feature == 'grad':
                w = None if weights is None else weights[among] / weights[among].mean()
                by_size = cluster_weights(picked, sources[rows], near.cpu())
                self.errors = torch.cat([matching_error(K, picked, w), matching_error(K, picked, by_size)[:1]])
            if self.norm == 'adam':
                self.remember(found, picked)
        return chosen, weights

    # ---- Adam of each example: as if the step were its alone

    def gradient(self, found, i):
        return found['p'][i] if self.feature == 'zo' else (found['D'][i].T @ found['X'][i]).float().flatten()

    def adam_distance(self, found, sources):
        """(c, c) l1 distances of Adam's directions, between examples of one source; t counts steps that chose."""
        (b1, b2), t = self.betas, self.t + 1
        if self.M is None:
            self.M, self.V = (torch.zeros_like(self.gradient(found, 0)) for _ in range(2))
        self.M, self.V = (t.to(found['H'].device) for t in (self.M, self.V))  # a checkpoint's are on the CPU
        D = torch.zeros(len(sources), len(sources), device=self.M.device)

        def direction(i):
            g = self.gradient(found, i)
            M, V = (b1 * self.M + (1 - b1) * g) / (1 - b1**t), (b2 * self.V + (1 - b2) * g * g) / (1 - b2**t)
            return M / (V.sqrt() + 1e-8)

        for q in sources.unique():
            rows = (sources == q).nonzero()[:, 0]
            mean = sum(direction(i) for i in rows) / len(rows)
            top = mean.abs().topk(min(self.sparsity, len(mean))).indices  # (h,)
            f = torch.stack([direction(i)[top] for i in rows])  # (rows, h)
            D[rows[:, None], rows] = torch.cdist(f, f, p=1)
        return D

    def remember(self, found, picked):
        """The history goes on with the mean of what was chosen, and, unlike Adam's, with the mean of its squares."""
        (b1, b2), self.t = self.betas, self.t + 1
        g, square = torch.zeros_like(self.M), torch.zeros_like(self.V)
        for i in picked:
            g += self.gradient(found, i) / len(picked)
            square += self.gradient(found, i).square() / len(picked)
        self.M, self.V = b1 * self.M + (1 - b1) * g, b2 * self.V + (1 - b2) * square

    # ---- sources where the data names none

    def find_clusters(self, H, step):
        """(n,) the nearest of the centres, which are found anew at the steps of `remake`. H (n, D) of unit length."""
        if step in self.remake:
            far = torch.cdist(H, H)
            self.centres = H[facility_location(far.max() - far, min(self.clusters, len(H))).to(H.device)]  # (c, D)
            for _ in range(10):  # Lloyd's
                of = torch.cdist(H, self.centres).argmin(1)  # (n,)
                for c in of.unique():
                    self.centres[c] = H[of == c].mean(0)
            counts = torch.bincount(torch.cdist(H, self.centres).argmin(1), minlength=len(self.centres))
            self.small = (counts < len(H) / len(counts)).nonzero()[:, 0].tolist() if self.keep_small else []
        if self.centres is None:
            return torch.zeros(len(H), dtype=torch.int64)
        return torch.cdist(H, self.centres.to(H.device)).argmin(1).cpu()

    def state_dict(self):
        return {name: getattr(self, name) for name in ('t', 'M', 'V', 'centres', 'small')}

    def load_state_dict(self, state):
        for name, value in state.items():
            if name != 'small' or self.clusters:  # else it is the config's and the data's
                setattr(self, name, value)
