"""
BAdam: Adam on one block of layers at a time, the next one every K steps (2404.02827).

    for K steps:  W = W - lr (Adam(G) + weight_decay W) of the active block     # all other weights need no gradient
    then its moments are dropped, and the next block is active: embedding, layer 0, ..., layer L - 1, norm and head, in
    a circle that begins with the largest

choose='norm' takes as the next block b the one of the largest |G_b| / (1 + how often it was active), as BlockLLM does
(2406.17296). The last step of each block then has all gradients, layer by layer, and keeps their norms alone, of its
last micro-batch; that step takes as long as one of full training.

Memory: 2 m n numbers for a matrix of the active block and none for others, 1 / (L + 2) of Adam's; gradients, too.
Time: no weight gradients but the block's, and backward ends where the block begins: about half of a backward.
Not for: few steps from scratch, since each weight moves in one of L + 2 only.

    python train.py config/badam_laptop.py
    optimizer = BAdamW([{'params': layer.parameters(), 'block': i} for i, layer in enumerate(layers)])     # any loop
"""

import torch

import adam
from adam import MOMENTS, AdamW, average_, exactly, split_decay


class BAdamW(AdamW):
    """AdamW on one block at a time. Arguments as in adam.AdamW, and block_steps: K. choose: 'cycle' or 'norm'.

    Groups of the same number under the key 'block' are a block; one without is trained at every step. What waits has
    requires_grad=False until its turn; what was frozen before, or while its block was active, stays so."""

    small_gradients = keeps_gradients_back = True  # torch's DistributedDataParallel waits for the gradients of all

    def __init__(self, params, lr=1e-3, block_steps=100, choose='cycle', **adam):
        if choose not in ('cycle', 'norm') or block_steps < 1:
            raise ValueError(f"choose={choose!r}, block_steps={block_steps}: use 'cycle' or 'norm', and 1 or more")
        self.block_steps, self.choose = block_steps, choose
        self.turn = dict(active=None, taken=0, visits={})  # the block, its steps, how often each was active before
        self.waiting, self.squares_of = set(), {}  # what we froze; parameter -> |G|^2, where a step looked
        super().__init__(params, lr, group_defaults=dict(block=None), **adam)

    def add_param_group(self, group):
        super().add_param_group(group)
        self.freeze()

    def freeze(self, looks=False):
        """Only what is live needs a gradient; all does in a step that looks for the next block."""
        sizes = {group['block']: 0 for group in self.param_groups}
        for p, group in self.group_of.items():
            sizes[group['block']] += p.numel()
        self.blocks = sorted(sizes.keys() - {None})
        if self.blocks and not self.turn['taken'] and not self.turn['visits']:  # the first steps show the memory's peak
            self.turn['active'] = max(self.blocks, key=sizes.get)
        looks |= self.choose == 'norm' and self.turn['taken'] == self.block_steps - 1
        for p in self.group_of:
            if p.requires_grad or p in self.waiting:
                p.requires_grad_(looks or self.is_live(p))
                (self.waiting.discard if p.requires_grad else self.waiting.add)(p)

    def is_live(self, p):
        return self.group_of[p]['block'] in (None, self.turn['active'])

    def watch(self, q):
        q.requires_grad_(q.requires_grad or q in self.waiting)  # of a copy, whose hooks are made anew
        super().watch(q)
        q.requires_grad_(q.requires_grad and q not in self.waiting)

    def gradient_ready(self, p):
        if self.is_live(p):
            return super().gradient_ready(p)
        self.squares_of[p], p.grad = p.grad.float().square().sum(), None

    @exactly
    def take_step(self):
        super().take_step()
        self.turn['taken'] += 1
        if self.turn['taken'] >= self.block_steps and self.blocks:
            self.next_block()
        self.freeze()

    def next_block(self):
        """Another block is active, if there is one; what waits keeps nothing."""
        turn, visits, at = self.turn, self.turn['visits'], self.blocks.index(self.turn['active'])
        visits[turn['active']] = visits.get(turn['active'], 0) + 1
        others, best = self.blocks[at + 1 :] + self.blocks[:at], 0
        if self.squares_of and others:
            scores = torch.zeros(len(others), device=next(iter(self.squares_of)).device)
            for p, square in self.squares_of.items():
                block = self.group_of[p]['block']
                scores[others.index(block)] += square.nan_to_num(0.0, 0.0) / (1 + visits.get(block, 0)) ** 2
            best = average_(scores).argmax()
        best = best.item() if type(best) is torch.Tensor else 0  # one number, once in K steps; a plan's has no value
        turn.update(active=(others or self.blocks)[best], taken=0)
        self.squares_of = {}
        for p, state in self.state.items():
            for name in ('fill', *MOMENTS) if not self.is_live(p) else ():
                state.pop(name, None)

    def make_due(self, modules):
        """The next step looks at all gradients, if one ever does: a plan counts that."""
        self.freeze(looks=self.choose == 'norm')

    def state_dict(self):
        return super().state_dict() | {'turn': self.turn | {'visits': dict(self.turn['visits'])}}

    def load_state_dict(self, state_dict):
        super().load_state_dict({name: state_dict[name] for name in ('state', 'param_groups')})
        self.turn = {**self.turn, **state_dict.get('turn', {})}
        self.freeze()


# ---- for train.py ------------------------------------------------------------------------------------------------


class Options:
    """What --method=badam adds to train.py's keys."""

    block_steps = 100  # K: steps that a block is trained for before the next one
    choose = 'cycle'  # 'cycle' | 'norm': the blocks from bottom to top, or the one of the largest gradient (BlockLLM)


FIXED = ()


def problems(config):
    """What does not go together, a sentence each."""
    from configurator import between

    return between(config, 1, 10**9, 'block_steps') + adam.no_targets(config)


def setup(model, config):
    """What train.py calls for method='badam'."""
    blocks = [model.embed_tokens, *model.layers]
    number, groups = {id(p): i for i, block in enumerate(blocks) for p in block.parameters()}, []
    for i in range(len(blocks) + 1):  # the last one: norm and head
        mine = split_decay(p for p in model.parameters() if number.get(id(p), len(blocks)) == i)
        groups += [group | {'block': i} for group in mine if group['params']]
    return BAdamW(groups, block_steps=config.block_steps, choose=config.choose, **adam.common(config))
