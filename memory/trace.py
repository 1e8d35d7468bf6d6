"""
A training step on fake tensors, which have shapes and no bytes: what it makes, when, and how much is alive at once.

    plan = trace_step(model_config, dtype, config, method.setup, training_step)      # a formula.Plan

The model is built as train.py builds it, and the step is train.py's own, with the method's own optimizer, so the plan
cannot drift from the code. At most four layers are traced; the record of a deeper model repeats the third, storage by
storage (record.py). Three steps or more: the first, which makes moments and bases, an ordinary one, and one or more in
which layers are due for a new basis or a merge.
"""

import contextlib
import copy
import gc
import sys
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode

import adam
import model as models
import quant
from loqt import update_steps
from memory.cuda import FusedRMSNorm, cuda_attention, cuda_packed_attention, workspace
from memory.depth import NotUniform, deeper
from memory.formula import Plan
from memory.matrices import turns
from memory.record import Chunk, Record, replay
from memory.watch import watch
from memory.work import PHASES, Count, Work, counted, tell, whole
from model import Linear, LLaMA

WHAT = {  # is alive; what is nothing more is a temporary of the phase that made it
    'weights': 'weights',
    'states': 'optimizer states',
    'bases': 'bases',
    'gradients': 'gradients',
    'forward': 'activations',
    'forward again': 'recomputed block and its backward',
    'loss': 'logits, loss, gradient of the head',
    'backward': 'temporaries of backward',
    'update': 'temporaries of the update',
    'data': 'tokens, and the choice among them',
    'setup': 'temporaries of building',
}
NEVER = 10**6  # steps between two refreshes while tracing: they come when `make_due` says so


# ---- a card's kernels --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_on_a_card(really=True):
    """The differences from a CPU: fused norms, flash attention, NF4 by kernel, products in the weights' own dtype."""

    def by_kernel(A):
        packed, how = adam.kernels().quantize_4bit(A, blocksize=quant.BLOCK_4BIT, quant_type='nf4')
        return packed, how.absmax

    with contextlib.ExitStack() as patches:
        for module, name, on_a_card in (
            (models.F, 'rms_norm', lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight)),
            (models.F, 'scaled_dot_product_attention', cuda_attention),
            (models, 'attend_packed', cuda_packed_attention),
            (quant, 'nf4_on_cpu', by_kernel),
            *((module, 'product_dtype', lambda A: A.dtype) for module in importers(adam.product_dtype)),
            *((module, 'fast_bf16', lambda device: True) for module in importers(adam.fast_bf16)),
        ):
            if really:
                patches.enter_context(mock.patch.object(module, name, on_a_card))
        yield


def nf4_by_shapes(A):
    """quant.nf4_on_cpu's tensors. It codes piece after piece, boundary after boundary: on fake tensors the first stands
    for all."""
    packed, absmax, (piece, *_) = quant.room_for_nf4(A)
    tell(('nf4', A.numel()))
    with mock.patch.object(quant, 'NF4', quant.NF4[:2]), counted(0):
        quant.code_piece_(*piece)
    return packed, absmax


def importers(function):
    """The modules that have this function under its own name: adam.py, and the methods that import it from there."""
    named = ((module, getattr(module, '__dict__', {}).get(function.__name__)) for module in list(sys.modules.values()))
    return [module for module, found in named if found is function]


# ---- where one is ------------------------------------------------------------------------------------------------


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


def renewals(model, config, n_layer):
    """The matrices that are due for a new basis or a merge, for each step to be traced of a model of n_layer layers, of
    which `model` has some.

    All, where a method does so for all in the same step. In turns: the last turn, in whose backward most activations
    are alive; where gradients accumulate the first, whose full gradients of earlier micro-batches wait beside the
    updates of all others; and where a turn in between has larger matrices, these, as deep in the model as they can be
    and as near to its start."""
    matrices = [*adam.targeted(model, config, (torch.nn.Linear, quant.Packed)).values()]
    tables = []  # projected, too; they come last, and have turns of their own
    if getattr(config, 'project_tables', False):
        weights = {id(W): W for W in (model.head, model.embed_tokens.weight)}
        tables = [SimpleNamespace(weight=W) for W in weights.values()]
    each = len(matrices) // len(model.layers)  # 7 in a LLaMA
    parts = turns(each * n_layer, config.update_proj_gap) if getattr(config, 'stagger', False) else []
    if len(parts) < 2:
        return [matrices + tables]

    def numbers(part):
        return sum(matrices[i % each].in_features * matrices[i % each].out_features for i in part)

    def with_larger(part, in_order):
        largest = max(in_order, key=numbers)  # the first of them in this order
        return [part, largest] if numbers(largest) > numbers(part) else [part]

    def at(layer, part):  # the layers in between are alike, and not all at hand: the first or the last stands for them
        return [matrices[i] if len(matrices) == each * n_layer else layer[i % each] for i in part]

    found = [at(matrices[-each:], part) for part in with_larger(parts[-1], parts[::-1])]
    if config.gradient_accumulation_steps > 1:
        found += [at(matrices[:each], part) for part in with_larger(parts[0], parts)]
    return found + [[table] for table in tables]


def bytes_of(tensors):
    """Of the card: what is offloaded takes none."""
    return sum(storage.nbytes() for storage in {t.untyped_storage() for t in tensors if t.device.type != 'meta'})


# ---- building, and three steps -----------------------------------------------------------------------------------


def record_steps(run, model_config, n_layer):
    """-> the chunks of building and of three steps or four, and bytes of the weights and of the states: these as with
    n_layer layers, the chunks with the model_config's own."""
    config, extra_layers = run.config, n_layer - model_config.n_layer  # like the third
    never = SimpleNamespace(**vars(config))
    if hasattr(never, 'update_proj_gap'):
        never.update_proj_gap = NEVER  # no layer is due by itself, so that layers are alike
    if getattr(never, 'merge_every', 0):
        never.merge_every = min(never.merge_every, 3)  # LoRA's merge, in the third step at the latest
    model = blank(model_config, run)
    with FakeTensorMode(allow_non_fake_inputs=True):
        record = Record()
        with record:
            if run.pretrained:
                shrink_tables(run, model)
            build(record, run, model)
            model.checkpointing, model.compute_dtype = config.checkpointing, run.compute_dtype
            optimizer = run.setup(model, never)  # may put weights into fewer bits
            shrink_tables(run, model)
            for module in model.modules() if run.among > 1 else ():
                if isinstance(module, quant.Packed):
                    module.in_pieces(quant.Pieces(run.among))
        if config.offload:
            optimizer.home = main_memory(run)
        if config.offload_activations:
            model.home = main_memory(run)
        if config.mlp_chunk:
            model.set_chunk(config.mlp_chunk)
        located = list(storages(model, optimizer))
        record.give_to_layers(located)
        weights = bytes_of(t for _, t in located) + extra_layers * bytes_of(t for layer, t in located if layer == 2)
        del located
        watch(record, model, optimizer)
        count, parts = Count(record, model, optimizer), renewals(model, config, n_layer)
        matrices = [*adam.targeted(model, config, (torch.nn.Linear, quant.Packed)).values()]
        all_due = len(parts) == 1 and len(parts[0]) >= len(matrices)
        with record:
            for due in [None, None, *parts]:
                if due:
                    optimizer.make_due(due)
                take_step(run, record, model, optimizer, count if all_due or not due else None)
        states = relabel_resident(record, model, optimizer, extra_layers)
        chunks = [Chunk(chunk.layer, list(chunk.events), chunk.made) for chunk in record.chunks]
        work = work_of(run, record, model, optimizer, count, [] if all_due else matrices, extra_layers)
        del optimizer.take_gradient, optimizer.moments_at_hand, optimizer.step  # these wrappers hold the optimizer
        return chunks, weights, states, work


def work_of(run, record, model, optimizer, count, due, extra_layers):
    """The Work of the steps that were counted, and of those that only time asks for: one in which all these are due."""
    extra_batches = run.config.gradient_accumulation_steps - micro_batches_of(run.config)
    if due:  # they take turns, of which a step has one
        optimizer.make_due(due)
        take_step(run, record, model, optimizer, count)
    first, ordinary, renewal = (whole(step, extra_layers, extra_batches) for step in count.steps)
    if hasattr(optimizer, 'blocks'):
        ordinary = by_turns(run, record, model, optimizer, count, extra_layers, extra_batches)
    renewal.subtract(ordinary)
    return Work(first, ordinary, renewal, share_of_renewals(run.config))


def by_turns(run, record, model, optimizer, count, extra_layers, extra_batches):
    """An ordinary step on average over the blocks of BAdam's. Those in the middle are between the first and the last:
    a backward ends where the block begins."""
    blocks, found = optimizer.blocks, Counter()
    layers = len(model.layers) + extra_layers
    for block in (blocks[0], blocks[1], blocks[-2], blocks[-1]):
        optimizer.turn |= dict(active=block, taken=1)
        optimizer.freeze()
        take_step(run, record, model, optimizer, count)
        share = (1 if block in (blocks[0], blocks[-1]) else layers / 2) / (layers + 2)
        for key, times in whole(count.steps[-1], extra_layers, extra_batches).items():
            found[key] += times * share
    return found


def share_of_renewals(config):
    """How many new bases, merges or other turns each layer has in a step on average."""
    c = config
    if hasattr(c, 'psi'):
        return len(update_steps(c.max_iters, c.update_proj_gap, c.psi)[1:]) / c.max_iters
    gap = getattr(c, 'update_proj_gap', 0) or getattr(c, 'merge_every', 0)
    if getattr(c, 'choose', '') == 'norm' and hasattr(c, 'block_steps'):
        gap = c.block_steps
    return 1 / gap if gap else 0.0


def main_memory(run):
    """The device that stands for it: what lies there takes none of a card."""
    return torch.device('cpu' if run.on_cpu else 'meta')


def shrink_tables(run, model):
    """As plumbing/build.py does it."""
    if run.config.head_bits == 8 or run.config.offload_embedding:
        model.shrink_tables(run.config.head_bits, main_memory(run) if run.config.offload_embedding else None)


def blank(shape, run):
    """The model on the meta device: LLaMA, or transformers' own, which its shape builds."""
    if hasattr(shape, 'blank'):
        return shape.blank(run.dtype, run.linear)
    with torch.device('meta'):
        return LLaMA(replace(shape), dtype=run.dtype, linear=run.linear)


def micro_batches_of(config):
    """How many of a step's are run: two, or three under per_layer, where only one between the first and the last has
    all sums and makes more; others make and hold what these do."""
    return min(config.gradient_accumulation_steps, 3 if config.per_layer else 2)


def take_step(run, record, model, optimizer, count):
    """One step, with some of its micro-batches; `count` may count it. But the tokens of all wait in main memory, which
    on a CPU counts."""
    config, shape = run.config, (run.config.batch_size, run.config.block_size)
    some = micro_batches_of(config)
    record.phase = 'data'
    record.at(None)

    def tokens(*size):
        return torch.zeros(*size, dtype=torch.int64, device=main_memory(run))

    waiting = [tokens(2, *shape) for _ in range(config.gradient_accumulation_steps - some)]
    pieces = [None, tokens(config.batch_size * run.pieces + 1).int()] if run.pieces else []
    if labels := getattr(model.config, 'labels', 0):  # (x, y, None, lengths, types), as data/batches.py has them
        y = tokens(config.batch_size).to(torch.float32 if labels == 1 else torch.int64)
        batches = [(tokens(*shape), y, None, tokens(config.batch_size), tokens(*shape)) for _ in range(some)]
    else:
        batches = [(tokens(*shape), tokens(*shape), *pieces) for _ in range(some)]
    with count.step() if count else contextlib.nullcontext():
        run.step(model, optimizer, batches, config.learning_rate, 'cpu')
    del waiting
    record.at(None)


def build(record, run, model):
    """Fill a model on the meta device module by module, as plumbing/ does it."""
    layer_of = {module: i for i, layer in enumerate(model.layers) for module in layer.modules()}
    record.phase = 'setup'

    def located(modules, *_, **__):  # in place of the progress bar in `materialise`
        for module in modules:
            record.at(layer_of.get(module))
            yield module
        record.at(None)

    if not run.pretrained and not hasattr(model, 'inner'):  # transformers' own is always read from a folder
        with mock.patch.object(models, 'tqdm', located):
            return model.materialise()
    for module in located(list(model.modules())):  # plumbing/hf.py reads one tensor after another
        module.to_empty(device='cpu' if hasattr(module, 'q') else getattr(module, 'reads_on', 'cpu'), recurse=False)
        if hasattr(module, 'set_weight'):
            module.set_weight(torch.empty(module.out_features, module.in_features, dtype=run.dtype))
    model.set_block_size(model.config.block_size, 'cpu')
    return model


def relabel_resident(record, model, optimizer, extra_layers):
    """After the steps: what stays was made in phases of all kinds, and is now called weights or states. -> bytes of the
    states, with those of extra_layers more layers like the third."""
    # An int8 weight lies among the states, and is a weight; what is offloaded takes none of the card.
    resident = [
        (p, name, t)
        for p, state in optimizer.state.items()
        for name, t in state.items()
        if isinstance(t, torch.Tensor) and name not in ('W', 'W_scale') and t.device.type != 'meta'
    ]
    record.relabel({t.untyped_storage() for _, t in storages(model, optimizer)}, 'weights')
    for what, of in (('states', lambda name: name[0] != 'P'), ('bases', lambda name: name[0] == 'P')):
        record.relabel({t.untyped_storage() for _, name, t in resident if of(name)}, what)
    third = set(model.layers[2].parameters()) if extra_layers else set()
    return bytes_of(t for *_, t in resident) + extra_layers * bytes_of(t for p, _, t in resident if p in third)


def trace_step(model_config, dtype, config, setup, step, compute_dtype=None, on_cpu=False, linear=Linear,
               pretrained=False, pieces=0, among=1):  # fmt: skip
    """The Plan of a run: `setup` is the method's, `step` is train.training_step, `dtype` that of the weights.

    on_cpu: what is offloaded counts too, and no allocator rounds. linear: what the blocks are made of. pretrained: the
    weights come from a folder; a method may keep those in more bits at first. pieces: of packed examples, in a row.
    among: how many processes have encoded weights in pieces."""
    if 8 in (config.state_bits, getattr(config, 'basis_bits', 16)) or getattr(config, 'double_quant', False):
        for name in ('M', 'V', 'P'):  # bitsandbytes reads values to make a code, and fake tensors have none
            adam.code_of(name, torch.device('cpu'))
    n_layer = model_config.n_layer

    run = SimpleNamespace(dtype=dtype, config=config, setup=setup, step=step, compute_dtype=compute_dtype)
    run.on_cpu, run.linear, run.pretrained, run.pieces, run.among = on_cpu, linear, pretrained, pieces, among

    def traced(depth):
        return record_steps(run, replace(model_config, n_layer=depth), n_layer)

    gc.collect()
    gc.disable()  # it would drop storages at moments of its own
    try:
        with mock.patch.object(quant, 'nf4_on_cpu', nf4_by_shapes), as_on_a_card(not on_cpu):
            try:
                if getattr(config, 'stagger', False) and n_layer > config.update_proj_gap > 1:
                    raise NotUniform('more than a layer is due at once, and less than all')
                chunks, *sizes = traced(min(n_layer, 4))
                chunks = deeper(chunks, n_layer) if n_layer > 4 else chunks
            except NotUniform:
                chunks, *sizes = traced(n_layer)
    finally:
        gc.enable()
    *sizes, work = sizes
    plan = as_plan(replay(chunks), *sizes, on_cpu)
    plan.work = work
    return plan


def as_plan(peak, weights, states, on_cpu):
    """The Plan of a replayed record."""
    if on_cpu:
        plan = Plan(weights, states, peak.live, peak.live, peak.live, context=0, peak=peak)
    else:
        allocated, reserved = (size + 2 * workspace() for size in (peak.allocated, peak.reserved))
        plan = Plan(weights, states, peak.live, allocated, reserved, peak=peak)
    where = f' of layer {peak.layer}' if peak.layer is not None else ''
    plan.moment = f'{PHASES[peak.phase]}{where} ({peak.operation})'
    plan.parts = {WHAT[what]: size for what, size in peak.kinds.items()}
    return plan


def plan_memory(config, shape, dtype, device, method, training_step, selection=None, compute_dtype=None, pieces=0,
                longest=0, readers=1):  # fmt: skip
    """The Plan of one process, from a trace of its step; shape: the ModelConfig, method: the module of config.method,
    training_step: train.py's, selection: its Coreset. On a card where there is one, or where a dry run of bf16 weights
    says that there will be. Of examples: pieces in a packed row, or the longest of padded rows. readers: processes that
    share the micro-batches."""
    on_card = device.startswith('cuda') or (config.dry_run and dtype == torch.bfloat16)
    run = SimpleNamespace(**vars(config) | {'block_size': longest or config.block_size})
    run.gradient_accumulation_steps = max(config.gradient_accumulation_steps // readers, 1)  # of one process
    linear = method.linear(run) if hasattr(method, 'linear') else Linear
    pretrained = config.init_from not in ('scratch', 'resume')

    choices = weakref.WeakKeyDictionary()  # each traced model's own: what one choice leaves behind, the next finds

    def step(model, optimizer, batches, learning_rate, device):
        if selection and selection.feature != 'random':  # two micro-batches of its pool, and the tensors for all of it
            pool_size = config.batch_size * config.gradient_accumulation_steps * config.coreset_from
            pool = torch.zeros(pool_size, run.block_size, dtype=torch.int64)
            choice = choices.setdefault(model, copy.copy(selection))
            with counted(pool_size / config.batch_size / 2):
                found = choice.look(model, pool, pool, config.batch_size, plan=True)
            gram = choice.compare(found)
            if choice.norm == 'adam':
                with torch.no_grad():
                    choice.adam_distance(found, None)
                    choice.remember(found, range(pool_size // config.coreset_from))
            del pool, found, gram
        return training_step(model, optimizer, batches, learning_rate, device)

    compute_dtype = dtype if on_card else compute_dtype
    among = readers if config.parallel == 'fsdp' else 1
    of = linear, pretrained, pieces, among
    return trace_step(shape, dtype, run, method.setup, step, compute_dtype, not on_card, *of)
