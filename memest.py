"""
The peak memory of a run, known before it starts: a step of it is run on fake tensors, which have shapes and no bytes.

    python train.py config/galore_7b_4090.py --dry_run          # seconds, and a few hundred MB, whatever the model
    plan = trace(model_config, dtype, config, setup, step)      # what train.py prints before it starts

The step is train.py's own, with the method's own optimizer, so the plan cannot drift from the code. Counted: the
storage of every tensor, and, as `reserved`, what CUDA's allocator makes of it. Not counted: CUDA's context (half a GB),
workspaces of libraries, and refreshes of a basis after the first step. Every layer is traced: a line drawn through the
peaks of a few goes wrong where the peak moves to another phase with more layers (a 7B's from the embedding's update to
its gradients).
"""

import bisect
import weakref
from dataclasses import dataclass, replace

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adam
from model import Linear, LLaMA


@dataclass
class Plan:
    """Bytes. `total` is the peak of all that is alive at once; weights and states are what stays between two steps;
    `reserved` is what CUDA's allocator would have taken from the card for it, rounding and gaps included."""

    weights: int
    states: int
    total: int
    reserved: int

    def __str__(self):
        rest = self.total - self.weights - self.states
        return (
            f'{self.total / 1e9:.2f} GB = weights {self.weights / 1e9:.2f} + states {self.states / 1e9:.2f} + '
            f'gradients, activations and temporaries {rest / 1e9:.2f}; '
            f'{self.reserved / 1e9:.2f} GB reserved by the allocator of CUDA'
        )


MB = 1 << 20


class Block:
    """A piece of a segment; neighbours in it are linked, so that free ones can be joined."""

    __slots__ = ('after', 'before', 'free', 'serial', 'size', 'small')

    def __init__(self, size, small, serial):
        self.size, self.small, self.serial = size, small, serial
        self.before = self.after = None
        self.free = False


class Allocator:
    """torch's caching allocator for CUDA (c10/cuda/CUDACachingAllocator.cpp, default settings), in numbers alone.

    Sizes are rounded to 512 bytes. Up to 1 MB a block comes from a segment of 2 MB, up to 10 MB from one of 20 MB, a
    larger one gets a segment of its own, rounded to 2 MB. The smallest free block that is large enough is taken, split
    where enough is left, and joined with free neighbours when it is given back. Segments go back to the card only when
    it is full, which `reserved` leaves out: it is an upper bound."""

    def __init__(self):
        self.reserved = self.serial = 0
        self.free_blocks = {True: [], False: []}  # small pool, large pool: sorted (size, serial, block)

    def malloc(self, nbytes):
        size = max(-(-nbytes // 512), 1) * 512
        small = size <= MB
        pool = self.free_blocks[small]
        i = bisect.bisect_left(pool, (size, 0))
        if i < len(pool):
            block = pool.pop(i)[2]
        else:
            segment = 2 * MB if small else 20 * MB if size < 10 * MB else -(-size // (2 * MB)) * 2 * MB
            self.reserved += segment
            block = self.new_block(segment, small)
        left = block.size - size
        if left >= (512 if small else MB + 1):
            rest = self.new_block(left, small)
            rest.before, rest.after, block.after, block.size = block, block.after, rest, size
            if rest.after:
                rest.after.before = rest
            self.put_back(rest)
        block.free = False
        return block

    def new_block(self, size, small):
        self.serial += 1
        return Block(size, small, self.serial)

    def put_back(self, block):
        block.free = True
        bisect.insort(self.free_blocks[block.small], (block.size, block.serial, block))

    def free(self, block):
        for left, right in ((block.before, block), (block, block.after)):
            other = left if right is block else right
            if other is not None and other.free:
                pool = self.free_blocks[block.small]
                pool.pop(bisect.bisect_left(pool, (other.size, other.serial)))
                block.size += other.size
                if other is left:
                    block.before = other.before
                    if block.before:
                        block.before.after = block
                else:
                    block.after = other.after
                    if block.after:
                        block.after.before = block
        self.put_back(block)


class LiveBytes(TorchDispatchMode):
    """While active: how many bytes the storages made so far and still alive take, and the most they took at once.

    Given an Allocator, each storage also takes and gives back its block there."""

    def __init__(self, allocator=None):
        super().__init__()
        self.allocator = allocator
        self.now = self.peak = 0
        self.seen = weakref.WeakKeyDictionary()  # storages; each once, however many views

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != 'meta':  # `trace` keeps main memory there
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if storage in self.seen:
            return
        size = storage.nbytes()
        self.seen[storage] = size
        weakref.finalize(storage, self.drop, size, self.allocator and self.allocator.malloc(size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def drop(self, size, block):
        self.now -= size
        if block:
            self.allocator.free(block)


def trace(model_config, dtype, config, setup, step, compute_dtype=None, main_memory=False, linear=Linear,
          given=False):  # fmt: skip
    """The Plan of a run: `setup` is the method's, `step` is train.training_step, `dtype` that of the weights.

    main_memory: of a run on a CPU, where what is offloaded counts too. linear: what the blocks are made of. given:
    the weights come from a folder, which a method that packs them may keep in more bits at first."""
    micro_batches = min(config.gradient_accumulation_steps, 2)  # a third holds nothing that the second does not
    if 8 in (config.state_bits, config.basis_bits) or config.double_quant:
        for name in ('M', 'V', 'P'):  # bitsandbytes reads values to make a code, and fake tensors have none
            adam.code_of(name, torch.device('cpu'))
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(Allocator()) as live:
        model = LLaMA(replace(model_config), dtype=dtype, linear=linear)
        model.checkpointing, model.compute_dtype = config.checkpointing, compute_dtype
        for module in model.modules() if given else ():
            if hasattr(module, 'set_weight'):
                module.set_weight(torch.zeros(module.out_features, module.in_features, dtype=dtype))
        optimizer = setup(model, config)  # may put weights into fewer bits
        if config.offload and not main_memory:
            optimizer.home = torch.device('meta')
        weights = live.now
        for _ in range(2):  # the first step makes states and bases, the second has them all along
            tokens = [
                torch.zeros(config.batch_size, config.block_size, dtype=torch.int64) for _ in range(micro_batches)
            ]
            step(model, optimizer, [(x, x) for x in tokens], config.learning_rate, 'cpu')
            del tokens
        kept = [
            t
            for state in optimizer.state.values()
            for name, t in state.items()
            # int8 weights are weights, and what is offloaded takes none of the card
            if isinstance(t, torch.Tensor) and name not in ('W', 'W_scale') and t.device.type != 'meta'
        ]
        return Plan(weights, sum(t.untyped_storage().nbytes() for t in kept), live.peak, live.allocator.reserved)
