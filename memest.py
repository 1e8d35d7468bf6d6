"""
The peak memory of a run, known before it starts: a step of it is run on fake tensors, which have shapes and no bytes.

    python memest.py config/galore_7b_4090.py                   # a table: what takes how much, and what holds the peak
    python train.py config/galore_7b_4090.py --dry_run          # its first line is the same plan
    plan = trace(config)                                        # a Plan; config: a namespace with train.py's keys

The step is train.py's own, with the method's own optimizer, so the plan cannot drift from the code (LLMem, 2404.10933,
fits formulas to a loaded model). A few layers are traced and the record of the rest written by repetition, storage by
storage (record.py). Three steps: the first, which makes moments and bases, an ordinary one, and one in which layers are
due for a new basis or a merge. What no trace sees, CUDA's context and the workspaces of libraries, has lines of its
own.
"""

import contextlib
import gc
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode

import adam
import galore
import loqt
import model as models
from model import Linear, LLaMA
from record import MB, Allocator, LiveBytes, NotUniform, Peak, Record, deeper, replay  # noqa: F401

# Bytes of a card that no tensor holds.
WORKSPACE = 2 * 8_519_680  # cuBLAS before Hopper, ':4096:2:16:8', for the main thread and for autograd's
CONTEXT = 500 * MB  # CUDA's own; 300 MB to 1 GB are reported for one card or another


@dataclass
class Plan:
    """Bytes. weights, states: what stays between two steps. total: the most that is alive at once, tensor by tensor.

    allocated, reserved: what CUDA's allocator makes of it, as torch.cuda.max_memory_allocated and max_memory_reserved
    would say, workspaces included; card: nvidia-smi's figure. peak: when that is, and what is alive then."""

    weights: int
    states: int
    total: int
    allocated: int = 0
    reserved: int = 0
    context: int = CONTEXT
    peak: Peak = field(default_factory=Peak)

    @property
    def card(self):
        return self.reserved + self.context

    def __str__(self):
        rest = self.total - self.weights - self.states
        return (
            f'{self.total / 1e9:.2f} GB = weights {self.weights / 1e9:.2f} + states {self.states / 1e9:.2f} + '
            f'gradients, activations and temporaries {rest / 1e9:.2f}'
        )


# ---- a card's kernels, which a CPU has not ------------------------------------------------------------------------


class FusedRMSNorm(torch.autograd.Function):
    """The tensors of CUDA's fused kernel, without its arithmetic: it keeps x and a number a row, where the CPU's ops
    keep four matrices."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, delta):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class FlashAttention(torch.autograd.Function):
    """The tensors of CUDA's flash attention: its result lies token by token, so that nobody has to copy it; backward
    sums dq in fp32, keeps a number a row, and gives each query head keys' and values' gradients of its own."""

    @staticmethod
    def forward(ctx, q, k, v):
        B, H, T, d = q.shape
        out = q.new_empty(B, T, H, d).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(B, H, T, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, delta):
        q, k, v, _, rows = ctx.saved_tensors
        _sums = torch.empty_like(q, dtype=torch.float32), torch.empty_like(rows)
        dq, dk, dv = (A.new_empty(A.shape[0], A.shape[2], q.shape[1], A.shape[3]).transpose(1, 2) for A in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            dk, dv = (A.unflatten(1, (-1, groups)).sum(2) for A in (dk, dv))
        return dq, dk, dv


@contextlib.contextmanager
def as_on_a_card():
    """What differs there: fused norms, flash attention, and products in the weights' own dtype."""

    def attention(q, k, v, attn_mask=None, is_causal=True, enable_gqa=False):
        return FlashAttention.apply(q, k, v)

    with (
        mock.patch.object(models.F, 'rms_norm', lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight)),
        mock.patch.object(models.F, 'scaled_dot_product_attention', attention),
        mock.patch.object(galore, 'product_dtype', lambda A: A.dtype),
    ):
        yield


# ---- the trace ---------------------------------------------------------------------------------------------------


def watch(record, model, optimizer):
    """Let the record know, at any time, in which layer and phase one is."""

    def enter(phase, layer):
        def hook(*_):
            record.phase = phase
            record.at(layer)

        return hook

    def begin_layer(layer):
        def hook(*_):
            if record.phase == 'backward':
                record.phase = 'forward again'
            record.at(layer)

        return hook

    def end_layer(layer):
        def hook(module, inputs, x):
            if record.phase == 'forward again':
                record.phase = 'backward'
            elif x.requires_grad:
                x.register_hook(enter('backward', layer))

        return hook

    def start_of_layers(module, inputs):
        if inputs[0].requires_grad and record.phase == 'forward':
            inputs[0].register_hook(enter('backward', None))

    def located(method):
        def call(p, *arguments):
            before, record.phase = record.phase, 'update'
            record.at(layer_of.get(p))
            out = method(p, *arguments)
            record.phase = before
            return out

        return call

    layer_of = {p: i for i, layer in enumerate(model.layers) for p in layer.parameters()}
    model.register_forward_pre_hook(enter('forward', None))
    model.norm.register_forward_pre_hook(enter('loss', None))
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(begin_layer(i))
        layer.register_forward_hook(end_layer(i))
    model.layers[0].register_forward_pre_hook(start_of_layers)
    optimizer.take, optimizer.update = located(optimizer.take), located(optimizer.update)


def storages(model, optimizer):
    """Yield (layer or None, tensor) of all that a model and its optimizer keep."""
    for i, layer in enumerate(model.layers):
        for tensor in (*layer.parameters(), *layer.buffers()):
            yield i, tensor
        for p in layer.parameters():
            yield from ((i, t) for t in optimizer.state.get(p, {}).values() if isinstance(t, torch.Tensor))
    inside = {id(tensor) for tensor in (*model.layers.parameters(), *model.layers.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in inside:
            yield None, tensor


def make_due(model, optimizer, config, n_layer):
    """Let the next step refresh or merge: all layers where they do so together, else as many matrices as fall on one
    step, the last layer's, in whose backward most activations are alive."""
    matrices = [m for layer in model.layers for m in layer.modules() if hasattr(m, 'in_features')]
    if config.stagger:
        together = -(-len(matrices) * n_layer // (len(model.layers) * config.update_proj_gap))
        matrices = matrices[-min(together, 7) :]
    for module in matrices:
        if isinstance(optimizer, loqt.LoQTAdamW):
            module.collect = True
        elif isinstance(optimizer, galore.GaLoreAdamW) and 'next' in optimizer.state[module.weight]:
            optimizer.state[module.weight]['next'] = optimizer.age(module.weight)


def bytes_of(tensors):
    return sum(storage.nbytes() for storage in {t.untyped_storage() for t in tensors})


def record_steps(model_config, dtype, config, setup, step, compute_dtype, main_memory, linear, given, n_layer):
    """-> the chunks of three steps, and bytes of the weights, of the states, and at most while setting up, as they are
    with n_layer layers of which model_config may have fewer."""
    micro_batches = min(config.gradient_accumulation_steps, 2)  # a third holds nothing that the second does not
    more = n_layer - model_config.n_layer  # layers like the third
    with FakeTensorMode(allow_non_fake_inputs=True):
        with LiveBytes() as building:
            model = LLaMA(replace(model_config), dtype=dtype, linear=linear)
            model.checkpointing, model.compute_dtype = config.checkpointing, compute_dtype
            for module in model.modules() if given else ():
                if hasattr(module, 'set_weight'):
                    module.set_weight(torch.zeros(module.out_features, module.in_features, dtype=dtype))
            before = bytes_of((*model.layers[2].parameters(), *model.layers[2].buffers())) if more else 0
            optimizer = setup(model, config)  # may put weights into fewer bits
        if config.offload and not main_memory:
            optimizer.home = torch.device('meta')
        record = Record()
        record.phase = 'weights'
        for layer, tensor in storages(model, optimizer):
            record.at(layer)
            record.add(tensor.untyped_storage(), tensor)
        a_layer = bytes_of(tensor for layer, tensor in storages(model, optimizer) if layer == 2)
        weights = record.now + more * a_layer
        most = building.peak + more * max(before, a_layer)
        watch(record, model, optimizer)
        with record:
            for i in range(3):
                record.phase = 'data'
                record.at(None)
                shape = config.batch_size, config.block_size
                tokens = [torch.zeros(shape, dtype=torch.int64) for _ in range(micro_batches)]
                if i == 2:
                    make_due(model, optimizer, config, n_layer)
                step(model, optimizer, [(x, x) for x in tokens], config.learning_rate, 'cpu')
                record.at(None)
                del tokens
        # int8 weights are weights, and what is offloaded takes none of the card
        kept = [
            (p, t)
            for p, state in optimizer.state.items()
            for name, t in state.items()
            if isinstance(t, torch.Tensor) and name not in ('W', 'W_scale') and t.device.type != 'meta'
        ]
        states = bytes_of(t for _, t in kept)
        if more:
            third = set(model.layers[2].parameters())
            states += more * bytes_of(t for p, t in kept if p in third)
        del optimizer.take, optimizer.update  # which hold what they belong to
        return record.chunks, weights, states, most


def trace_step(model_config, dtype, config, setup, step, compute_dtype=None, main_memory=False, linear=Linear,
               given=False):  # fmt: skip
    """The Plan of a run: `setup` is the method's, `step` is train.training_step, `dtype` that of the weights.

    main_memory: of a run on a CPU, where what is offloaded counts too, and no allocator rounds. linear: what the blocks
    are made of. given: the weights come from a folder, which a method that packs them may keep in more bits at first."""
    if 8 in (config.state_bits, config.basis_bits) or getattr(config, 'double_quant', False):
        for name in ('M', 'V', 'P'):  # bitsandbytes reads values to make a code, and fake tensors have none
            adam.code_of(name, torch.device('cpu'))
    n_layer = model_config.n_layer

    def steps(depth):
        shape = replace(model_config, n_layer=depth)
        return record_steps(shape, dtype, config, setup, step, compute_dtype, main_memory, linear, given, n_layer)

    gc.collect()
    gc.disable()  # it would drop storages at moments of its own
    try:
        with contextlib.nullcontext() if main_memory else as_on_a_card():
            try:
                chunks, *sizes = steps(min(n_layer, 4))
                chunks = deeper(chunks, n_layer) if n_layer > 4 else chunks
            except NotUniform:  # such as layers that are due at the second step already
                chunks, *sizes = steps(n_layer)
    finally:
        gc.enable()
    peak, (weights, states, building) = replay(chunks), sizes
    seen = 0 if main_memory else WORKSPACE
    return Plan(weights, states, max(peak.live, building), peak.allocated + seen, peak.reserved + seen, peak=peak)
