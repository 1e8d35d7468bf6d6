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
import json
import math
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode

import adam
import galore
import llmem
import loqt
import model as models
from formula import CONTEXT, WORKSPACE, Plan, estimate
from model import Linear, LLaMA
from record import MB, Allocator, LiveBytes, NotUniform, Record, deeper, replay

__all__ = ['MB', 'Allocator', 'LiveBytes', 'Plan', 'estimate', 'fit', 'trace', 'trace_step']

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
        allocated, reserved = (size + WORKSPACE for size in (peak.allocated, peak.reserved))
        plan = Plan(weights, states, total, allocated, reserved, peak=peak)
    where = f' of layer {peak.layer}' if peak.layer is not None else ''
    plan.moment = f'{PHASES[peak.phase]}{where} ({peak.operation})' if peak.live >= building else 'setting up'
    plan.parts = {PHASES[phase]: size for phase, size in peak.kinds.items()} if peak.live >= building else {}
    return plan


def trace(config, device=None):
    """The Plan of a configuration (a namespace with train.py's keys): of a run on a card, or, where the weights are
    fp32 and there is none, on this CPU; device: 'cuda' plans for a card all the same. Raises what train.py raises."""
    import train  # which imports this module

    here, dtype = train.device_and_dtype(config)
    model, _, _ = train.described(config)
    return train.plan_memory(config, model.config, dtype, device or here)


# ---- what fits a card ----------------------------------------------------------------------------------------------

# What a run can be turned into. Learning rates are not touched: each method wants its own (see its config files).
WAYS = {
    'AdamW': dict(method='adamw'),
    'AdamW, 8-bit': dict(method='adamw', state_bits=8),
    'AdamW, 8-bit, per layer': dict(method='adamw', state_bits=8, per_layer=True, grad_clip=0.0),
    'GaLore': dict(method='galore', scale=0.25),
    'GaLore, 8-bit, per layer': dict(method='galore', scale=0.25, state_bits=8, per_layer=True),
    'GaLore, 8-bit, offloaded': dict(
        method='galore', scale=0.25, state_bits=8, basis_bits=4, per_layer=True, offload=True
    ),
    'Q-GaLore': dict(method='galore', scale=0.25, state_bits=8, basis_bits=4, weight_bits=8, per_layer=True),
    'APOLLO-Mini, per layer': dict(method='apollo_mini', rank=1, scale=11.3, per_layer=True, grad_clip=0.0),
    'LoQT': dict(method='loqt', scale=0.5),
    'LoQT, 8-bit, per layer': dict(method='loqt', scale=0.5, state_bits=8, per_layer=True),
    'LoRA': dict(method='lora', rank=16, scale=2.0, quantize='none'),
    'QLoRA': dict(method='lora', rank=16, scale=2.0, quantize='nf4', double_quant=True),
}  # fmt: skip
MARGIN = 0.03  # of a plan, kept free: an allocator's gaps differ from run to run
TERAFLOPS, GB_PER_SECOND = 165e12, 1008e9  # an RTX 4090's, from its data sheet: only the ranks are meant
PCI_EXPRESS = 25e9  # bytes a second between two of them, PCIe 4.0 x16 less its overhead: a guess


def seconds_per_token(config, shape):
    """Predicted, at best: of arithmetic and memory the slower, micro-batch by micro-batch, and the update's passes."""
    c = config
    D, F, L, V = shape.n_embd, shape.n_inner, shape.n_layer, shape.vocab_size
    K = (shape.n_kv_head or shape.n_head) * shape.head_dim
    N = c.batch_size * c.block_size
    matrices = [(D, D), (K, D), (K, D), (D, D), (F, D), (F, D), (F, D)]
    size = L * sum(m * n for m, n in matrices)
    r = [min(c.rank, m, n) for m, n in matrices]
    both = L * sum(k * (m + n) for k, (m, n) in zip(r, matrices))  # r (m + n)
    product = L * sum(k * m * n for k, (m, n) in zip(r, matrices))  # r m n
    forward = 2 * size * (2 if c.checkpointing else 1) + 2 * L * D * c.block_size
    backward = 2 * size + 4 * L * D * c.block_size
    low_rank = c.method in ('galore', 'loqt', 'lora') and c.residual == 'none'
    flops = forward + backward + (2 * both if low_rank else 2 * size) + 8 * V * D  # a token
    flops += 4 * both * (c.method == 'lora')
    per_batch = 2 * 2 * product * (c.method == 'loqt')  # s P B into W, forward and backward
    read = 3 * 2 * size * (1.5 if c.method in ('loqt', 'lora') and c.quantize == 'nf4' else 1)
    micro = max((flops * N + per_batch) / TERAFLOPS, read / GB_PER_SECOND)
    states = estimate(SimpleNamespace(**vars(c) | {'offload': False}), shape).states
    update = (
        (2 * states + 4 * size) / GB_PER_SECOND
        + 2 * states / PCI_EXPRESS * c.offload
        + 2 * product / TERAFLOPS * (c.method == 'galore')
    )
    micro *= 1.03 if c.state_bits == 8 or c.weight_bits == 8 else 1  # coding and decoding
    return (micro + update / c.gradient_accumulation_steps) / N


# What belongs to one method or another, as train.py has it by default.
NEUTRAL = dict(
    state_bits=32, basis_bits=16, weight_bits=16, per_layer=False, residual='none', quantize='nf4', offload=False,
    double_quant=False, lazy=0.0, compile=False, save_merged=True, dropout=0.0, merge_every=0, train_rest='auto',
    lora_targets='all',
)  # fmt: skip


def fit(config, gpu_bytes, shape, problems):
    """Rows (name, checkpointing, batch, Plan, seconds a token, flags) of every way to run this model that fits a card
    of gpu_bytes by the formula, with the largest batch that does and divides the windows of a step, fastest first: on
    one card, what LLMem's algorithm 1 is for. problems: train.problems, which knows what does not go together."""
    total, rows = config.batch_size * config.gradient_accumulation_steps, []
    batches = [batch for batch in range(total, 0, -1) if total % batch == 0]
    for name, way in WAYS.items():
        for checkpointing in (False, True):
            for batch in batches:
                turns = NEUTRAL | way | dict(checkpointing=checkpointing, batch_size=batch)
                turns['gradient_accumulation_steps'] = total // batch
                c = SimpleNamespace(**vars(config) | turns)
                plan = estimate(c, shape)
                if plan.card * (1 + MARGIN) <= gpu_bytes and not problems(c):
                    changed = {key: value for key, value in vars(c).items() if value != getattr(config, key)}
                    words = ' '.join(f'--{key}={value}' for key, value in changed.items())
                    rows.append((name, checkpointing, batch, plan, seconds_per_token(c, shape), words))
                    break
    return sorted(rows, key=lambda row: row[4])


# ---- what a person reads -------------------------------------------------------------------------------------------


def table(plan, width=40):
    """A plan as text: a line and a bar for each part."""
    lines = []
    for name, size in sorted(plan.parts.items(), key=lambda part: -part[1]):
        lines.append(f'{name:52} {size / 1e9:9.3f} GB  {"█" * round(width * size / plan.total)}')
    lines.append(f'{"= alive at the peak":52} {plan.total / 1e9:9.3f} GB  {plan.moment}')
    if plan.context:
        gib = f'{plan.card / 2**30:.2f} GiB'
        lines += [
            f"{'with what the allocator rounds up, and cuBLAS':52} {plan.allocated / 1e9:9.3f} GB  allocated",
            f'{"with what it cannot use":52} {plan.reserved / 1e9:9.3f} GB  reserved',
            f"{'with CUDA itself':52} {plan.card / 1e9:9.3f} GB  = {gib}, as nvidia-smi would show",
        ]
    if plan.peak:
        lines.append('largest at the peak:')
        for size, shape, operation, layer in plan.peak.largest:
            of = f', layer {layer}' if layer is not None else ''
            lines.append(f'  {size / 1e6:10.1f} MB  {" x ".join(map(str, shape))}  {operation or "weights"}{of}')
    return '\n'.join(lines)


def draw(plan, png):
    """Memory over three steps, phases in colours."""
    import matplotlib

    matplotlib.use('Agg')  # a file, no window
    import matplotlib.pyplot as plt

    points = plan.peak.timeline
    every = max(len(points) // 20_000, 1)
    groups = [points[i : i + every] for i in range(0, len(points), every)]
    most = [max(group) for group in groups]
    figure, axes = plt.subplots(figsize=(10, 5), layout='constrained')
    for phase, name in PHASES.items():
        there = [alive / 1e9 if kind == phase else 0 for alive, kind in most]
        if any(there):
            axes.fill_between(range(len(most)), there, step='mid', label=name, alpha=0.8)
    axes.axhline(plan.total / 1e9, color='black', lw=0.8, ls='--')
    axes.set(
        ylabel='GB alive', xlabel='the first step, an ordinary one, one with a refresh: tensors made', title=plan.moment
    )
    axes.set_xticks([])
    axes.legend(loc='lower right')
    figure.savefig(png, dpi=120)
    plt.close(figure)


FLAGS = {
    'gpu_gb': (float, 24, 'the card, in GiB'),
    'fit': (bool, '', 'every method, the largest batch that fits, and the flags to type'),
    'gpus': (int, 4, 'what each of several GPUs holds'),
    'tp': (int, 2, 'with --gpus: size of the tensor-parallel groups'),
    'instant': (bool, '', 'by the formula, without a trace'),
    'json': (bool, '', 'numbers instead of a table'),
    'plot': (str, 'plan.png', 'memory over three steps, as a picture'),
    'hf': (str, 'path/to/config.json', "transformers' own model instead: see python memest_hf.py"),
}


def own_flags(argv):
    """Split off the flags that are this script's: -> (those as a dict, the rest). Raises ValueError for a bad one."""
    flags, rest = {}, []
    for word in argv:
        name, equals, value = word.removeprefix('--').partition('=')
        name = name.replace('-', '_')
        if word == '--model=llmem':
            flags['llmem'] = True
            continue
        if word.startswith('--gpu') and name not in FLAGS:
            raise ValueError(f'--{name} is unknown: use --gpu_gb=24, the card in GiB, or --gpus=4, how many')
        if not word.startswith('--') or name not in FLAGS:
            rest.append(word)
            continue
        kind, example, _ = FLAGS[name]
        try:
            flags[name] = True if kind is bool else kind(value)
        except ValueError:
            raise ValueError(f'--{name}={value} is not a number: use for example --{name}={example}') from None
        if kind in (int, float) and not 0 < flags[name] < math.inf:
            raise ValueError(f'--{name}={value} is not a size: use more than 0, for example --{name}={example}')
        if bool(equals) == (kind is bool) or (kind is str and not value):
            raise ValueError(f'{word} is not how it is typed: use --{name}{f"={example}" if example else ""}')
    shows = [name for name in ('fit', 'gpus', 'llmem') if name in flags]
    if shows and {'json', 'plot', 'instant'} & set(flags):
        raise ValueError(f'--{shows[0]} prints a table of its own: leave out --json, --plot and --instant')
    if 'plot' in flags and 'instant' in flags:
        raise ValueError('--plot draws a trace, and --instant makes none: leave out one of them')
    return flags, rest


def main(argv):
    """What `python memest.py ARGV` does."""
    import configurator
    import train

    if '--help' in argv or '-h' in argv:
        print('python memest.py CONFIG [--key=value ...], keys as train.py has them, and of its own:\n')
        for name, (kind, example, meaning) in FLAGS.items():
            print(f'  {f"--{name}" if kind is bool else f"--{name}={example}":28} {meaning}')
        return print(f"  {'--model=llmem':28} LLMem's published equations instead")
    if any(word.startswith('--hf') for word in argv):
        import memest_hf

        return memest_hf.main(argv)
    flags, rest = own_flags(argv)
    config = configurator.load_or_exit(train.__file__, [*rest, '--dry_run'], train.problems)
    shape = train.described(config)[0].config
    if 'fit' in flags:
        return print_fit(config, shape, flags, train.problems)
    if 'llmem' in flags or 'gpus' in flags:
        return (print_llmem if 'llmem' in flags else print_gpus)(config, shape, flags)
    started = time.perf_counter()
    instant = estimate(config, shape)
    plan = instant if 'instant' in flags else trace(config)
    seconds = time.perf_counter() - started
    if 'json' in flags:
        found = {key: getattr(plan, key) for key in ('weights', 'states', 'total', 'allocated', 'reserved', 'context')}
        found |= {'card': plan.card, 'moment': plan.moment, 'parts': plan.parts}
        found |= {'formula': instant.total} if plan.context else {}  # which is a card's
        print(json.dumps(found))
    else:
        print(
            f'{shape.n_layer} layers, method {config.method}, {config.batch_size} x {config.block_size} tokens; '
            'planned, not measured'
        )
        print(table(plan))
        if plan.context:  # the formula is a card's
            error = 100 * (instant.total / plan.total - 1)
            print(f'by the formula {instant.total / 1e9:.3f} GB ({error:+.2f} %); {seconds:.1f} s')
        if 'gpu_gb' in flags:
            room = flags['gpu_gb'] * 2**30 - plan.card * (1 + MARGIN)
            says = f'fits, {room / 2**30:.2f} GiB to spare' if room >= 0 else f'is {-room / 2**30:.2f} GiB too much'
            print(
                f'a card of {flags["gpu_gb"]:g} GiB: {says} (with {100 * MARGIN:g} % kept free); '
                '--fit shows what else does'
            )
    if 'plot' in flags and plan.peak:
        draw(plan, flags['plot'])
        print(f'written: {flags["plot"]}', file=sys.stderr if 'json' in flags else sys.stdout)


def print_gpus(config, shape, flags):
    """What each of several GPUs holds, way by way (llmem.py has the derivations)."""
    n, gb, tp = flags['gpus'], flags.get('gpu_gb', 24.0), flags.get('tp', 1)
    plan = estimate(config, shape)
    if n % tp:
        raise ValueError(f'--gpus={n} cannot be cut into groups of --tp={tp}: use a tp that divides them')
    print(f'{n} GPUs, planned; each, or with tp each group, has {config.batch_size} x {config.block_size} tokens')
    print(f'{"":10} {"GiB a GPU":>9}  fits {gb:g} GiB   what torch calls it')
    for how, words in llmem.WAYS.items():
        need = llmem.several_gpus(plan.pieces, n, how, tp if how == 'zero3' else 1)['total'] + CONTEXT
        print(f'{how:10} {need / 2**30:9.2f}  {"yes" if need * (1 + MARGIN) <= gb * 2**30 else "no":11} {words}')
    parts = estimate(SimpleNamespace(**vars(config) | {'batch_size': 1}), shape).pieces
    seconds = seconds_per_token(config, shape) * config.block_size
    exchanged = (6 if config.checkpointing else 4) * shape.n_layer * config.block_size * shape.n_embd * 2
    ways = llmem.choose(parts, gb * 2**30 / (1 + MARGIN) - CONTEXT, n, seconds, PCI_EXPRESS, exchanged,
                        tps=(tp,) if tp > 1 else ())  # fmt: skip
    print('(train.py itself averages over processes, as ddp does; the others want torch around a loop of your own)')
    if config.method in ('loqt', 'lora') or config.weight_bits == 8:
        print('(packed weights are buffers, which fully_shard does not cut: zero2 and zero3 are too low here)')
    print(
        'with the largest batches that fit, fastest first:' if ways else 'none of these fits: try --fit, or more GPUs'
    )
    for row in ways:
        print(f'{row["way"]:10} batch {row["batch"]} a group; {row["reason"]}')


def print_llmem(config, shape, flags):
    """LLMem's equations for this model, whatever the config's method: they know mixed-precision Adam alone."""
    table, n, gb = shape.vocab_size * shape.n_embd, flags.get('gpus', 1), flags.get('gpu_gb', 24.0)
    size = models.LLaMA(shape, device='meta').n_params()
    norms = (2 * shape.n_layer + 1) * shape.n_embd
    described = llmem.Model(table, size - table, size - norms, table, shape.vocab_size, shape.n_layer, shape.n_embd)
    print(
        f"LLMem's equations, {config.batch_size} x {config.block_size} tokens, fp16 with checkpointing, on {n} GPU(s):"
    )
    tp = flags.get('tp') or next(k for k in range(max(n // 2, 1), 0, -1) if n % k == 0)
    for how in llmem.METHODS if n > 1 else ('CDP',):
        need = llmem.peak(described, how, config.batch_size, config.block_size, n, tp if how == 'DP+TP' else 1)
        print(f'{how:6} {need / 2**30:9.2f} GiB a GPU')
    choice, _ = llmem.decide(described, gb * 2**30, n, tp=tp, sequence=config.block_size)
    print(f'its choice for cards of {gb:g} GiB: {choice}')


def print_fit(config, shape, flags, problems):
    gb = flags.get('gpu_gb', 24.0)
    rows = fit(config, gb * 2**30, shape, problems)
    if not rows:
        print(f'nothing fits {gb:g} GiB: use a smaller --model or --block_size, or more cards (--gpus=N)')
        return
    print(
        f'what fits {gb:g} GiB by the formula, with the largest batch, fastest first; planned, not measured on a card.'
    )
    print('It knows the gaps of an allocator on average alone: trace what you choose, with --gpu_gb.')
    print(f'{"":26} {"checkpointing":>13} {"batch":>6} {"GiB":>6} {"speed":>6}   flags')
    best = rows[0][4]
    for name, checkpointing, batch, plan, seconds, words in rows:
        print(
            f'{name:26} {"yes" if checkpointing else "no":>13} {batch:6d} {plan.card / 2**30:6.2f} '
            f'{best / seconds:6.2f}   {words}'
        )


if __name__ == '__main__':
    import train

    try:
        sys.exit(main(sys.argv[1:]))
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error.name} is not installed: pip install -r requirements-extra.txt')
    except (ValueError, OSError, train.Stop, train.DataError, train.ModelError) as error:
        sys.exit(f'error: {error}')
