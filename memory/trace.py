"""
A training step on fake tensors, which have shapes and no bytes: what it makes, when, and how much is alive at once.

    plan = trace_step(model_config, dtype, config, method.setup, training_step)      # a formula.Plan

The step is train.py's own, with the method's own optimizer, so the plan cannot drift from the code. A few layers are
traced, and the record of the rest is written by repetition, storage by storage (record.py). Three steps: the first,
which makes moments and bases, an ordinary one, and one in which layers are due for a new basis or a merge.
"""

import contextlib
import gc
import os
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode

import adam
import galore
import loqt
import model as models
from memory.cuda import WORKSPACE, FlashAttention, FusedRMSNorm
from memory.formula import Plan
from memory.record import LiveBytes, NotUniform, Record, deeper, replay
from model import Linear, LLaMA


@contextlib.contextmanager
def as_on_a_card():
    """What differs there: fused norms, flash attention, and products in the weights' own dtype."""

    def by_kernel(A):
        packed, how = adam.kernels().quantize_4bit(A, blocksize=adam.BLOCK_4BIT, quant_type='nf4')
        return packed, how.absmax

    def attention(q, k, v, attn_mask=None, is_causal=True, enable_gqa=False):
        return FlashAttention.apply(q, k, v)

    with (
        mock.patch.object(models.F, 'rms_norm', lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight)),
        mock.patch.object(models.F, 'scaled_dot_product_attention', attention),
        mock.patch.object(galore, 'product_dtype', lambda A: A.dtype),
        mock.patch.object(adam, 'nf4_on_cpu', by_kernel),
        mock.patch.object(loqt, 'fast_bf16', lambda device: True),
    ):
        yield


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

    # Not `update` itself: a wrapper would hold its gradient for longer than the caller does.
    take, moments_at_hand = optimizer.take, optimizer.moments_at_hand

    def located(p):
        record.at(layer_of.get(p))
        return take(p)

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
    optimizer.take, optimizer.moments_at_hand = located, at_hand


def storages(model, optimizer):
    """Yield (layer or None, tensor) of all that a model and its optimizer keep."""
    for i, layer in enumerate(model.layers):
        for tensor in (*layer.parameters(), *layer.buffers()):
            yield i, tensor
        for p in layer.parameters():
            kept = [*optimizer.state.get(p, {}).values(), getattr(optimizer, 'R', {}).get(p)]
            yield from ((i, tensor) for tensor in kept if isinstance(tensor, torch.Tensor))
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
        record.call({t.untyped_storage() for _, t in storages(model, optimizer)}, 'weights')  # also those made anew
        record.call({t.untyped_storage() for _, t in kept}, 'states')
        if more:
            third = set(model.layers[2].parameters())
            states += more * bytes_of(t for p, t in kept if p in third)
        del optimizer.take, optimizer.moments_at_hand  # which hold what they belong to
        return record.chunks, weights, states, most


def trace_step(model_config, dtype, config, setup, step, compute_dtype=None, main_memory=False, linear=Linear,
               given=False):  # fmt: skip
    """The Plan of a run: `setup` is the method's, `step` is train.training_step, `dtype` that of the weights.

    main_memory: of a run on a CPU, where what is offloaded counts too, and no allocator rounds. linear: what the
    blocks are made of. given: the weights come from a folder, which a method may keep in more bits at first."""
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
    (weights, states, building), peak = sizes, replay(chunks)
    total = max(peak.live, building)
    if main_memory:
        plan = Plan(weights, states, total, total, total, context=0, peak=peak)
    else:
        allocated, reserved = (size + 2 * WORKSPACE for size in (peak.allocated, peak.reserved))
        plan = Plan(weights, states, total, allocated, reserved, peak=peak)
    where = f' of layer {peak.layer}' if peak.layer is not None else ''
    plan.moment = f'{PHASES[peak.phase]}{where} ({peak.operation})' if peak.live >= building else 'setting up'
    plan.parts = {PHASES[phase]: size for phase, size in peak.kinds.items()} if peak.live >= building else {}
    return plan


def plan_memory(config, shape, dtype, device, method, training_step, selection=None, compute_dtype=None):
    """The Plan of one process, from a trace of its step; shape: the ModelConfig, method: the module of config.method,
    training_step: train.py's, selection: its Coreset. On a card where there is one, or where a dry run of bf16 weights
    says that there will be."""
    on_card = device.startswith('cuda') or (config.dry_run and dtype == torch.bfloat16)
    linear = Linear
    if hasattr(method, 'linear'):  # a third round of compensation holds nothing that the second does not
        linear = method.linear(SimpleNamespace(**vars(config) | {'compensation': min(config.compensation, 2)}))
    given = config.init_from not in ('scratch', 'resume')
    compute_dtype = dtype if on_card else compute_dtype
    world = int(os.environ.get('WORLD_SIZE', 1))
    own = max(config.gradient_accumulation_steps // world, 1)  # micro-batches of one process
    run = SimpleNamespace(**vars(config) | {'gradient_accumulation_steps': own})
    pool_size = config.batch_size * config.gradient_accumulation_steps * config.coreset_from

    def step(model, optimizer, batches, learning_rate, device):
        if selection and selection.feature != 'random':  # two micro-batches of its pool, and the tensors for all of it
            pool = torch.zeros(pool_size, config.block_size, dtype=torch.int64)
            selection.compare(selection.look(model, pool, pool, config.batch_size, plan=True))
            del pool
        return training_step(model, optimizer, batches, learning_rate, device)

    return trace_step(shape, dtype, run, method.setup, step, compute_dtype, not on_card, linear, given)
