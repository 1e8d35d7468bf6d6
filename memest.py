"""
The peak memory of a run, known before it starts: a step of it is run on fake tensors, which have shapes and no bytes.

    python train.py config/galore_7b_4090.py --dry_run          # seconds, and a few hundred MB, whatever the model
    plan = trace(model_config, dtype, config, setup, step)      # what train.py prints before it starts

The step is train.py's own, with the method's own optimizer, so the plan cannot drift from the code. Counted: the
storage of every tensor. Not counted: CUDA's context (about half a GB), the allocator's rounding, workspaces of
libraries, and refreshes of a basis after the first step. Every layer is traced: a line drawn through the peaks of a few
goes wrong where the peak moves to another phase with more layers (a 7B's from the embedding's update to its gradients).
"""

import weakref
from dataclasses import dataclass, replace

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adam
from model import LLaMA


@dataclass
class Plan:
    """Bytes. `total` is the peak of all that is alive at once; weights and states are what stays between two steps."""

    weights: int
    states: int
    total: int

    def __str__(self):
        rest = self.total - self.weights - self.states
        return (
            f'{self.total / 1e9:.2f} GB = weights {self.weights / 1e9:.2f} + states {self.states / 1e9:.2f} + '
            f'gradients, activations and temporaries {rest / 1e9:.2f}'
        )


class LiveBytes(TorchDispatchMode):
    """While active: how many bytes the storages made so far and still alive take, and the most they took at once."""

    def __init__(self):
        super().__init__()
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
        weakref.finalize(storage, self.drop, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def drop(self, size):
        self.now -= size


def trace(model_config, dtype, config, setup, step, compute_dtype=None):
    """The Plan of a run: `setup` is the method's, `step` is train.training_step, `dtype` that of the weights."""
    micro_batches = min(config.gradient_accumulation_steps, 2)  # a third holds nothing that the second does not
    if 8 in (config.state_bits, config.basis_bits):
        for name in ('M', 'V', 'P'):  # bitsandbytes reads values to make a code, and fake tensors have none
            adam.code_of(name, torch.device('cpu'))
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        model = LLaMA(replace(model_config), dtype=dtype)
        model.checkpointing, model.compute_dtype = config.checkpointing, compute_dtype
        optimizer = setup(model, config)  # may put weights into fewer bits
        if config.offload:
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
        return Plan(weights, sum(t.untyped_storage().nbytes() for t in kept), live.peak)
