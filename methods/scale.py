"""
SCALE: gradient descent on normalised columns, with a momentum for the head alone (2506.16659).

    M = mu M + G for the head, M = G for every other matrix                  # (out, in)
    N_i = M_i sqrt(in) / |M_i| for each output i                             # (in,): a column, where W is (in, out)
    N_j = M_j sqrt(vocabulary) / |M_j| for each feature j of the embedding   # (vocabulary,): the other dimension
    W = (1 - lr weight_decay) W - lr N

and Adam for vectors (norms, biases). Memory: nothing for a matrix of a block or the embedding, one number a weight for
the head, 1 byte with state_bits=8. The full G of each weight is needed, of which per_layer keeps one at a time, unless
micro-batches accumulate. Time: one pass over G. A step's root mean square is 1, where AdamW's is 0.2 to 1.
Not for: small batches. Nothing averages the blocks' gradients over steps but the batch itself.

    python train.py config/scale_laptop.py
    optimizer = ScaleAdamW([{'params': rest}, {'params': [head], 'momentum': 0.9}], lr=1e-3)       # in any other loop
"""

import torch

import adam
from adam import AdamW, at_least_fp32, heavy_ball, pieces, split_decay


def lengths_of(M, dim):
    """Root mean squares along a dimension of M, which stays as one of size 1: fp32, above 0."""
    sums = torch.linalg.vector_norm(M, dim=dim, keepdim=True, dtype=at_least_fp32(M))
    return (sums / M.shape[dim] ** 0.5).clamp_min(1e-8)


class ScaleAdamW(AdamW):
    """Arguments as in adam.AdamW, and two keys of a group. momentum: mu, 0 for none and no state. along: the dimension
    of a matrix (out, in) along which each of its vectors is normalised: 1, or 0 for an embedding."""

    def __init__(self, params, lr=1e-3, momentum=0.0, along=1, **adam):
        super().__init__(params, lr, group_defaults=dict(momentum=momentum, along=along), **adam)

    def update(self, p, G):
        """The equations at the top of this file, for p and its gradient G (out, in)."""
        if p.dim() != 2:
            return super().update(p, G)
        group, state = self.group_of[p], self.state[p]
        M = heavy_ball(state, G, group['momentum'], self.state_bits) if group['momentum'] else G  # (out, in)
        lengths = lengths_of(M, group['along'])  # (out, 1) or (1, in)
        if 'skip' in state:
            lengths = torch.where(state['skip'] > 0, torch.inf, lengths)  # a step that is left out has no length
        for row, W, part, _ in pieces(p, M, {}):
            self.move(p, W, part / lengths[row : row + len(part)] if group['along'] else part / lengths, row)


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options:
    """What --method=scale adds to train.py's keys."""

    momentum = 0.9  # mu, of the head's gradient; 0: none, and no state


FIXED = ()


def problems(config):
    """What does not go together, a sentence each."""
    from configurator import between

    return between(config, 0, 0.9999, 'momentum') + adam.problems(config)


def setup(model, config):
    """What train.py calls for method='scale'. A head that is the embedding, too, is treated as a head."""
    heads = [model.head]  # or a classifier
    if getattr(model.config, 'labels', 0):
        heads = [p for module in model.head_modules().values() for p in module.parameters() if p.dim() == 2]
    tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    tables = [p for p in tables if all(p is not head for head in heads)]
    rest = split_decay(p for p in model.parameters() if all(p is not q for q in (*heads, *tables)))
    groups = [{'params': heads, 'momentum': config.momentum}, {'params': tables, 'along': 0}]
    return ScaleAdamW([group for group in [*rest, *groups] if group['params']], **adam.common(config))
