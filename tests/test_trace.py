"""memory/trace.py: the bytes of a step on fake tensors against the same step on real ones."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from test_examples import written

import adam
import configurator
import galore
from configurator import method_of
from data.batches import load
from memory import trace
from memory.matrices import turns
from memory.record import LiveBytes
from model import LLaMA, ModelConfig
from plumbing.build import rows_of
from train import plan_memory, training_step

TINY = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=64, n_inner=176, vocab_size=301, block_size=32)
KEYS = dict(learning_rate=1e-3, max_iters=10, batch_size=4, block_size=32)
# of the methods that have them
OPTIONS = dict(rank=8, update_proj_gap=200, scale=0.25, compensation=2, basis_bits=16, weight_bits=16, lazy=0.0)
MODES = {
    'adamw': dict(method='adamw'),
    'adamw clipped, accumulated': dict(method='adamw', grad_clip=1.0, gradient_accumulation_steps=2),
    'adamw 8 bits, per layer': dict(method='adamw', state_bits=8, per_layer=True),
    'galore': dict(),
    'galore per layer, accumulated': dict(per_layer=True, gradient_accumulation_steps=2),
    'galore everything': dict(per_layer=True, state_bits=8, checkpointing=True),
    'galore svd': dict(refresh='svd'),
    'galore sara': dict(refresh='sara'),
    'galore 4-bit basis': dict(basis_bits=4, per_layer=True, gradient_accumulation_steps=2),
    'galore 8-bit basis': dict(basis_bits=8),
    'qgalore 8-bit basis': dict(method='qgalore', basis_bits=8, lazy=0.5),
    'qgalore everything': dict(method='qgalore', basis_bits=4, weight_bits=8, state_bits=8, per_layer=True),
    'fira': dict(method='fira', per_layer=True),
    'apollo': dict(method='apollo'),
    'apollo mini': dict(method='apollo', tensorwise=True, rank=1, per_layer=True),
    'badam': dict(method='badam'),
    'adalomo': dict(method='adalomo', per_layer=True),
    'sltrain': dict(method='sltrain', per_layer=True, gradient_accumulation_steps=2),
    'adarankgrad': dict(method='adarankgrad', state_bits=8),
    'ldadam': dict(method='ldadam', per_layer=True),
    'grass': dict(method='grass', per_layer=True, gradient_accumulation_steps=2),
    'grass by norm': dict(method='grass', choose='norm'),
    'badam by norm': dict(method='badam', choose='norm', per_layer=True, gradient_accumulation_steps=2),
    'sumo': dict(method='sumo', state_bits=8, per_layer=True, gradient_accumulation_steps=2),
    'scale per layer, four micro-batches': dict(method='scale', per_layer=True, gradient_accumulation_steps=4),
    'scale 8 bits': dict(method='scale', state_bits=8),
    'muon 8 bits, per layer, accumulated': dict(
        method='muon', state_bits=8, per_layer=True, gradient_accumulation_steps=2, row_norm=True
    ),
    'loqt': dict(method='loqt'),
    'loqt without nf4': dict(method='loqt', quantize='none'),
    'loqt everything': dict(
        method='loqt', double_quant=True, state_bits=8, per_layer=True, checkpointing=True,
        gradient_accumulation_steps=2
    ),
    'lora': dict(method='lora', gradient_accumulation_steps=2),
    'lora fine-tuning': dict(method='lora', train_rest='no', dropout=0.1, checkpointing=True, state_bits=8),
    'lora, merged': dict(
        method='lora', merge_every=1, quantize='none', targets='q_proj,v_proj', per_layer=True
    ),
}  # fmt: skip


def config_of(method='galore', **changes):
    """A namespace with train.py's keys and the method's options."""
    plain = configurator.switch(SimpleNamespace(**KEYS), method)
    own = {name: value for name, value in OPTIONS.items() if hasattr(plain, name)}
    return configurator.switch(plain, **own | changes)


def layers(config):
    method = method_of(config)
    return dict(linear=method.linear(config)) if hasattr(method, 'linear') else {}


def plan_of(config, shape, dtype, *more, **options):
    options |= layers(config)
    return trace.trace_step(shape, dtype, config, method_of(config).setup, training_step, *more, **options)


def windows():
    return torch.randint(0, 301, (4, 32)), torch.randint(0, 301, (4, 32))


def real_steps(config, dtype, live, batch=windows):
    """The steps that a trace takes, on real tensors: -> model, optimizer."""
    with torch.device('meta'):
        model = LLaMA(ModelConfig(**TINY), dtype=dtype, **layers(config))
    model.materialise()
    model.checkpointing, model.compute_dtype = config.checkpointing, torch.float32
    optimizer = method_of(config).setup(model, config)
    live.weights = live.now
    n = config.gradient_accumulation_steps
    for due in [None, None, *trace.renewals(model, config, TINY['n_layer'])]:
        batches = [batch() for _ in range(n)]
        if due:
            optimizer.make_due(due)
        training_step(model, optimizer, batches, 1e-3, 'cpu')
        del batches
    return model, optimizer


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('mode', MODES)
def test_bytes_planned_equal_bytes_of_real_steps_with_a_refresh_or_merge(mode, checkpointing):
    config = config_of(**MODES[mode] | dict(checkpointing=checkpointing))
    dtype = torch.bfloat16 if checkpointing else torch.float32
    plan = plan_of(config, ModelConfig(**TINY), dtype, torch.float32, True)
    with LiveBytes() as live:
        model, optimizer = real_steps(config, dtype, live)
    kept = [(name, t) for state in optimizer.state.values() for name, t in state.items() if torch.is_tensor(t)]
    states = sum(t.nbytes for name, t in kept if name not in ('W', 'W_scale'))
    assert plan.states == states
    assert live.weights == plan.weights >= sum(p.untyped_storage().nbytes() for p in model.parameters())
    assert abs(plan.total / live.peak - 1) < 0.001, (plan.total, live.peak, plan.moment)


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('mode', ['adamw clipped, accumulated', 'galore', 'loqt everything', 'lora fine-tuning'])
def test_bytes_planned_equal_bytes_of_real_steps_on_packed_examples(mode, checkpointing, tmp_path):
    folder = written(tmp_path, [9, 21, 5, 33, 17, 12, 30, 8, 4, 26, 14, 11] * 2)
    config = config_of(**MODES[mode] | dict(checkpointing=checkpointing))
    config.dataset, config.packing = folder, True
    data, numbers = load(folder, 'train', 32), itertools.count()

    def examples():
        x, y, _, pieces = data.batch(0, next(numbers), 4)
        return x, y, None, pieces

    plan = plan_of(config, ModelConfig(**TINY), torch.float32, torch.float32, True, pieces=rows_of(config)[0])
    with LiveBytes() as live:
        model, optimizer = real_steps(config, torch.float32, live, examples)
    del model, optimizer
    assert abs(plan.total / live.peak - 1) < 0.001, (plan.total, live.peak, plan.moment)


def test_packed_rows_take_on_a_card_what_windows_take_and_little_more():
    config, shape = config_of('adamw'), ModelConfig(**TINY)
    windows, packed = (plan_of(config, shape, torch.bfloat16, None, False, pieces=n).total for n in (0, 3))
    most = (
        128 * (4 * 3 + 2) * 4 * 33 * 4
    )  # backward's room beside each piece: fp32, 4 heads of 16, padded to 32, and a sum
    assert 0 < packed - windows < 1.1 * most


def test_bytes_planned_equal_the_profilers_allocations_in_a_real_step():
    config, peaks = config_of('adamw'), []
    plan = plan_of(config, ModelConfig(**TINY), torch.float32, None, True)
    with torch.profiler.profile(profile_memory=True) as profile:
        model, optimizer = real_steps(config, torch.float32, LiveBytes())
    del model, optimizer

    def allocations(nodes):
        for node in nodes:
            if node.name == '[memory]':
                yield node.start_time_ns, node.extra_fields.alloc_size
            yield from allocations(node.children)

    now = 0
    for _, size in sorted(allocations(profile.profiler.kineto_results.experimental_event_tree())):
        now += size
        peaks.append(now)
    assert abs(max(peaks) / plan.total - 1) < 0.001, (max(peaks), plan.total)


DEEP = (
    'adamw clipped, accumulated', 'galore everything', 'galore 8-bit basis', 'qgalore 8-bit basis', 'fira',
    'loqt everything', 'lora',
)  # fmt: skip


COLM = {
    'gradients': dict(coreset='grad'),
    'zeroth order': dict(coreset='zo', zo_directions=2, coreset_norm='adam', checkpointing=True, batch_size=2),
    'clusters of hidden states': dict(method='lora', coreset='zo', coreset_clusters=3, gradient_accumulation_steps=2),
}


@pytest.mark.parametrize('mode', [*DEEP, *COLM])
def test_a_record_of_four_layers_repeated_equals_that_of_all_layers(mode, monkeypatch):
    config, shape = config_of(**(MODES | COLM)[mode]), ModelConfig(**TINY | dict(n_layer=7))

    def plan():
        if mode in COLM:
            made = plan_memory(config, shape, 'cpu', torch.bfloat16, torch.bfloat16)
        else:
            made = plan_of(config, shape, torch.bfloat16, torch.bfloat16)
        peak = made.peak
        assert peak.layer in (None, 0, 6)
        sizes = made.weights, made.states, made.total, made.allocated, made.reserved
        born = sum(event[0] == '+' and event[5] != 'setup' for chunk in peak.chunks for event in chunk.events)
        return *sizes, peak.kinds, peak.operation, peak.layer, born

    traced = []
    steps = trace.record_steps
    monkeypatch.setattr(trace, 'record_steps', lambda run, s, n: traced.append(s.n_layer) or steps(run, s, n))
    repeated = plan()

    def refuse(*_):
        raise trace.NotUniform

    monkeypatch.setattr(trace, 'deeper', refuse)
    assert plan() == repeated
    assert traced == [4, 4, 7]


def test_layers_that_differ_are_traced_one_by_one():
    config = config_of(update_proj_gap=3)  # a third of the matrices are due at each step
    plan = plan_of(config, ModelConfig(**TINY | dict(n_layer=6)), torch.float32)
    assert plan.total > plan.weights + plan.states > 0


def test_as_many_matrices_are_due_as_fall_on_one_step():
    model = LLaMA(ModelConfig(**TINY))  # a quarter of the 12 layers that are planned
    matrices = [module for module in model.layers.modules() if hasattr(module, 'in_features')]

    def due(n_layer=12, **changes):
        return [[matrices.index(m) for m in some] for some in trace.renewals(model, config_of(**changes), n_layer)]

    end = len(matrices)
    assert due() == [[end - 1]] and due(stagger=False) == due(method='adamw') == [list(range(end))]
    # 14 matrices in 5 turns: q k v, o gate up, down q k, v o gate, up down
    assert due(update_proj_gap=30) == [[end - 2, end - 1], [end - 4, end - 3, end - 2]], (
        'o gate up is more than up down'
    )
    starts = due(update_proj_gap=30, gradient_accumulation_steps=2)[2:]
    assert starts == [[0, 1, 2], [3, 4, 5]], 'and their full gradients wait longest in the first layer'
    assert due(3, update_proj_gap=2) == [list(range(11, 21))], 'where all layers are at hand they are where they are'


@pytest.mark.parametrize('n, gap', [(14, 5), (84, 30), (84, 200), (84, 5), (7, 3)])
def test_turns_are_those_of_the_optimizers(n, gap):
    of = [i * gap // n for i in range(n)]  # galore.py and loqt.py: `offset`
    assert turns(n, gap) == [range(of.index(k), n - of[::-1].index(k)) for k in sorted(set(of))]


def test_a_cards_products_are_in_the_weights_dtype_in_whatever_file_they_are_written():
    from methods import fira

    bf16 = torch.zeros(1, dtype=torch.bfloat16)
    assert galore.product_dtype(bf16) == fira.product_dtype(bf16) == torch.float32, 'on this CPU'
    with trace.as_on_a_card():
        assert galore.product_dtype(bf16) == fira.product_dtype(bf16) == adam.product_dtype(bf16) == torch.bfloat16
    assert fira.product_dtype is adam.product_dtype


def test_per_layer_and_checkpointing_and_8_bits_each_lower_the_plan():
    def total(**changes):
        return plan_of(config_of(**changes), ModelConfig(**TINY | dict(n_layer=12)), torch.float32).total

    assert total(per_layer=True, checkpointing=True, batch_size=1) < total(checkpointing=True, batch_size=1)
    assert total(checkpointing=True) < total()
    assert total(state_bits=8) < total()


@pytest.mark.parametrize('changes', [dict(method='adamw'), dict(moments='rotate', update_proj_gap=1)])
def test_offloaded_moments_take_none_of_the_card_and_change_no_weight(changes):
    def run(**more):
        config = config_of(**changes | more)
        model = LLaMA(ModelConfig(**TINY)).materialise(seed=0)
        optimizer = method_of(config).setup(model, config)
        for step in range(3):
            x = torch.randint(0, 301, (4, 32), generator=torch.Generator().manual_seed(step))
            training_step(model, optimizer, [(x, x)], 1e-3, 'cpu')
        return torch.cat([p.detach().flatten() for p in model.parameters()]), optimizer

    (weights, _), (offloaded, optimizer) = run(), run(offload=True)
    assert optimizer.home == torch.device('cpu') and torch.equal(weights, offloaded)
    method = changes.get('method', 'galore')
    plans = [
        plan_of(config_of(method, offload=offload), ModelConfig(**TINY), torch.float32) for offload in (False, True)
    ]
    bases = sum(s['P'].nbytes for s in optimizer.state.values() if 'P' in s)
    assert plans[1].states == bases and plans[1].total < plans[0].total - 0.9 * (plans[0].states - bases)
