"""
The peak of a real run, in bytes of tensors: what torch counts on CUDA, and on a CPU what a recorder sees.

    measure = Measure(model, optimizer, on_cuda)
    with measure.step(n): ...                   # the n-th step of this process
    measure.peak                                # to be compared with a Plan's total, on CUDA with its allocated
"""

import contextlib

import torch

from memory.record import LiveBytes, Resizing


class Measure:
    """peak: bytes of all tensors at the peak so far; None if nobody has looked.

    A recorder costs some 20 microseconds an operation, so on a CPU it looks at the steps that hold the peak alone: the
    first, which makes the states, an ordinary one, and those in which the last layer is due for a new basis or a merge,
    while the activations of all others are alive. building: the peak while the model was built."""

    def __init__(self, model, optimizer, on_cuda, building=0, compiled=False):
        self.model, self.optimizer, self.on_cuda, self.recorded = model, optimizer, on_cuda, building
        self.compiled = compiled  # what compiled code makes, no recorder sees

    @contextlib.contextmanager
    def step(self, n):
        looks = n < 2 or any(self.optimizer.is_due(p) for p in self.model.layers[-1].parameters())
        if self.on_cuda or self.compiled or not looks:
            yield
            return
        with Resizing() if any(hasattr(p, 'part') for p in self.model.parameters()) else LiveBytes() as live:
            self.begin(live)
            yield
        self.recorded = max(self.recorded, live.peak)

    def begin(self, live):
        """Count what there is. Nothing of it is held here: a basis that the step replaces is to be freed."""
        states = (x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))
        for tensor in (*self.model.parameters(), *self.model.buffers(), *states):
            live.add(tensor.untyped_storage(), tensor)

    @property
    def peak(self):
        if self.on_cuda:
            return torch.cuda.max_memory_allocated(self.model.head.device)
        return None if self.compiled else self.recorded
