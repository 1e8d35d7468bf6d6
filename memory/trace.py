"""
A training step on fake tensors, which have shapes and no bytes: what it makes, when, and how much is alive at once.

    plan = trace_step(model_config, dtype, config, method.setup, training_step)      # a formula.Plan

The step is train.py's own, with the method's own optimizer, so the plan cannot drift from the code. At most four layers
are traced; the record of a deeper model repeats the third, storage by storage (record.py). Three steps: the first,
which makes moments and bases, an ordinary one, and one in which layers are due for a new basis or a merge.
"""

import contextlib
import gc
import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode

import adam
import model as models
import quant
from memory.cuda import FlashAttention, FusedRMSNorm, workspace
from memory.formula import Plan
from memory.record import LiveBytes, NotUniform, Record, deeper, replay
from model import Linear, LLaMA

PHASES = {
    'weights': 'weights',
    'states': 'states',
    'data': 'tokens, and the choice among them',
    'forward': 'activations',
    'forward again': 'the block that runs again, and its backward',
    'loss': 'the loss, and the gradients of head and last block',
    'backward': 'gradients',
    'update': 'temporaries of the update',
}


# ---- a card's kernels --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_on_a_card():
    """The differences from a CPU: fused norms, flash attention, NF4 by kernel, products in the weights' own dtype."""

    def by_kernel(A):
        packed, how = adam.kernels().quantize_4bit(A, blocksize=quant.BLOCK_4BIT, quant_type='nf4')
        return packed, how.absmax

    def attention(q, k, v, attn_mask=None, is_causal=True, enable_gqa=False):
        return FlashAttention.apply(q, k, v)

    with contextlib.ExitStack() as patches:
        for module, name, on_a_card in (
            (models.F, 'rms_norm', lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight)),
            (models.F, 'scaled_dot_product_attention', attention),
            (quant, 'nf4_on_cpu', by_kernel),
            *((module, 'product_dtype', lambda A: A.dtype) for module in importers(adam.product_dtype)),
            *((module, 'fast_bf16', lambda device: True) for module in importers(adam.fast_bf16)),
        ):
            patches.enter_context(mock.patch.object(module, name, on_a_card))
        yield


def importers(function):
    """The modules that have this function under its own name: adam.py, and the methods that import it from there."""
    named = ((module, getattr(module, '__dict__', {}).get(function.__name__)) for module in list(sys.modules.values()))
    return [module for module, found in named if found is function]


# ---- where one is ------------------------------------------------------------------------------------------------


def watch(record, model, optimizer):
    """Tell the record, all the time, which layer and phase it is in."""

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

    # Not `update` itself: a wrapper would keep its gradient alive for longer than the caller does.
    take_gradient, moments_at_hand = optimizer.take_gradient, optimizer.moments_at_hand

    def located(p):
        record.at(layer_of.get(p))
        return take_gradient(p)

    @contextlib.contextmanager
    def at_hand(p):
        before, record.phase = record.phase, 'update'
        record.at(layer_of.get(p))
        with moments_at_hand(p):
            yield
        record.phase = before

    layer_of = {p: i for i, layer in enumerate(model.layers) for p in layer.parameters()}
    model.register_forward_pre_hook(enter('forward', None))
    model.norm.register_forward_pre_hook(enter('loss', None))
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(begin_layer(i))
        layer.register_forward_hook(end_layer(i))
    model.layers[0].register_forward_pre_hook(start_of_layers)
    optimizer.take_gradient, optimizer.moments_at_hand = located, at_hand


def storages(model, optimizer):
    """Yield (layer or None, tensor) of all that a model and its optimizer keep."""
    placeholders = getattr(optimizer, 'placeholder', {})
    for i, layer in enumerate(model.layers):
        for tensor in (*layer.parameters(), *layer.buffers()):
            yield i, tensor
        for p in layer.parameters():
            kept = [*optimizer.state.get(p, {}).values(), placeholders.get(p)]
            yield from ((i, tensor) for tensor in kept if isinstance(tensor, torch.Tensor))
    inside = {id(tensor) for tensor in (*model.layers.parameters(), *model.layers.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in inside:
            yield None, tensor


def make_due(model, optimizer, config, n_layer):
    """Let the next step refresh or merge: all matrices, where a method does so for all in the same step; else as many
    as fall on one step of n_layer layers, the last ones, in whose backward most activations are alive."""
    matrices = [m for layer in model.layers for m in layer.modules() if hasattr(m, 'in_features')]
    if getattr(config, 'stagger', False):
        together = -(-len(matrices) * n_layer // (len(model.layers) * config.update_proj_gap))
        matrices = matrices[-min(together, 7) :]  # a layer has seven
    optimizer.make_due(matrices)


def bytes_of(tensors):
    return sum(storage.nbytes() for storage in {t.untyped_storage() for t in tensors})


# ---- three steps -------------------------------------------------------------------------------------------------


def record_steps(model_config, dtype, config, setup, step, compute_dtype, on_cpu, linear, pretrained, n_layer):
    """-> the chunks of three steps, and bytes of the weights, of the states, and of the peak while setting up: all of
    these as with n_layer layers, but for the chunks, which are those of the model_config's own layers."""
    micro_batches = min(config.gradient_accumulation_steps, 2)  # a third holds nothing that the second does not
    extra_layers = n_layer - model_config.n_layer  # like the third
    with FakeTensorMode(allow_non_fake_inputs=True):
        with LiveBytes() as building:
            model = build(model_config, dtype, linear, pretrained)
            model.checkpointing, model.compute_dtype = config.checkpointing, compute_dtype
            as_built = bytes_of((*model.layers[2].parameters(), *model.layers[2].buffers())) if extra_layers else 0
            optimizer = setup(model, config)  # may put weights into fewer bits
        if config.offload and not on_cpu:
            optimizer.home = torch.device('meta')
        record = Record()
        record.phase = 'weights'
        for layer, tensor in storages(model, optimizer):
            record.at(layer)
            record.add(tensor.untyped_storage(), tensor)
        a_layer = bytes_of(tensor for layer, tensor in storages(model, optimizer) if layer == 2)
        weights = record.now + extra_layers * a_layer
        setup_peak = building.peak + extra_layers * max(as_built, a_layer)
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
        states = relabel_resident(record, model, optimizer, extra_layers)
        del optimizer.take_gradient, optimizer.moments_at_hand  # these wrappers hold the optimizer
        return record.chunks, weights, states, setup_peak


def build(model_config, dtype, linear, pretrained):
    model = LLaMA(replace(model_config), dtype=dtype, linear=linear)
    for module in model.modules() if pretrained else ():
        if hasattr(module, 'set_weight'):
            module.set_weight(torch.zeros(module.out_features, module.in_features, dtype=dtype))
    return model


def relabel_resident(record, model, optimizer, extra_layers):
    """After the steps: what stays was made in phases of all kinds, and is now called weights or states. -> bytes of the
    states, with those of extra_layers more layers like the third."""
    # An int8 weight lies among the states, and is a weight; what is offloaded takes none of the card.
    resident = [
        (p, t)
        for p, state in optimizer.state.items()
        for name, t in state.items()
        if isinstance(t, torch.Tensor) and name not in ('W', 'W_scale') and t.device.type != 'meta'
    ]
    record.relabel({t.untyped_storage() for _, t in storages(model, optimizer)}, 'weights')
    record.relabel({t.untyped_storage() for _, t in resident}, 'states')
    third = set(model.layers[2].parameters()) if extra_layers else set()
    return bytes_of(t for _, t in resident) + extra_layers * bytes_of(t for p, t in resident if p in third)


def trace_step(model_config, dtype, config, setup, step, compute_dtype=None, on_cpu=False, linear=Linear,
               pretrained=False):  # fmt: skip
    """The Plan of a run: `setup` is the method's, `step` is train.training_step, `dtype` that of the weights.

    on_cpu: what is offloaded counts too, and no allocator rounds. linear: what the blocks are made of. pretrained: the
    weights come from a folder; a method may keep those in more bits at first."""
    if 8 in (config.state_bits, getattr(config, 'basis_bits', 16)) or getattr(config, 'double_quant', False):
        for name in ('M', 'V', 'P'):  # bitsandbytes reads values to make a code, and fake tensors have none
            adam.code_of(name, torch.device('cpu'))
    n_layer = model_config.n_layer

    def steps(depth):
        shape = replace(model_config, n_layer=depth)
        return record_steps(shape, dtype, config, setup, step, compute_dtype, on_cpu, linear, pretrained, n_layer)

    gc.collect()
    gc.disable()  # it would drop storages at moments of its own
    try:
        with contextlib.nullcontext() if on_cpu else as_on_a_card():
            try:
                chunks, *sizes = steps(min(n_layer, 4))
                chunks = deeper(chunks, n_layer) if n_layer > 4 else chunks
            except NotUniform:  # such as layers that are due at the second step already
                chunks, *sizes = steps(n_layer)
    finally:
        gc.enable()
    return as_plan(replay(chunks), *sizes, on_cpu)


def as_plan(peak, weights, states, setup_peak, on_cpu):
    """The Plan of a replayed record; where setting up takes more than any step, the peak is there, and has no parts."""
    total = max(peak.live, setup_peak)
    if on_cpu:
        plan = Plan(weights, states, total, total, total, context=0, peak=peak)
    else:
        allocated, reserved = (size + 2 * workspace() for size in (peak.allocated, peak.reserved))
        plan = Plan(weights, states, total, allocated, reserved, peak=peak)
    plan.moment = 'setting up'
    if peak.live >= setup_peak:
        where = f' of layer {peak.layer}' if peak.layer is not None else ''
        plan.moment = f'{PHASES[peak.phase]}{where} ({peak.operation})'
        plan.parts = {PHASES[phase]: size for phase, size in peak.kinds.items()}
    return plan


def plan_memory(config, shape, dtype, device, method, training_step, selection=None, compute_dtype=None):
    """The Plan of one process, from a trace of its step; shape: the ModelConfig, method: the module of config.method,
    training_step: train.py's, selection: its Coreset. On a card where there is one, or where a dry run of bf16 weights
    says that there will be."""
    on_card = device.startswith('cuda') or (config.dry_run and dtype == torch.bfloat16)
    run = SimpleNamespace(**vars(config))
    if hasattr(run, 'compensation'):  # a third round holds nothing that the second does not
        run.compensation = min(run.compensation, 2)
    world = int(os.environ.get('WORLD_SIZE', 1))
    run.gradient_accumulation_steps = max(config.gradient_accumulation_steps // world, 1)  # of one process
    linear = method.linear(run) if hasattr(method, 'linear') else Linear
    pretrained = config.init_from not in ('scratch', 'resume')

    def step(model, optimizer, batches, learning_rate, device):
        if selection and selection.feature != 'random':  # two micro-batches of its pool, and the tensors for all of it
            pool_size = config.batch_size * config.gradient_accumulation_steps * config.coreset_from
            pool = torch.zeros(pool_size, config.block_size, dtype=torch.int64)
            selection.compare(selection.look(model, pool, pool, config.batch_size, plan=True))
            del pool
        return training_step(model, optimizer, batches, learning_rate, device)

    compute_dtype = dtype if on_card else compute_dtype
    return trace_step(shape, dtype, run, method.setup, step, compute_dtype, not on_card, linear, pretrained)
