"""memest.py: the bytes of a step on fake tensors against the same step on real ones."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import adam
import configurator
import galore
import loqt
import lora
import memest
import train
from memory import fit, record, trace
from memory.record import Allocator, LiveBytes
from model import SIZES, LLaMA, ModelConfig
from train import training_step

TINY = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=64, n_inner=176, vocab_size=301, block_size=32)
CONFIG = dict(learning_rate=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.0, rank=8, update_proj_gap=200, scale=0.25)
CONFIG |= dict(refresh='subspace', stagger=True, state_bits=32, grad_clip=0.0, per_layer=False, offload=False, seed=0)
CONFIG |= dict(method='galore', lazy=0.0, moments='keep', residual='none', basis_bits=16, weight_bits=16, compile=False)
CONFIG |= dict(quantize='nf4', double_quant=False, psi=1.2, compensation=2, max_iters=10)
CONFIG |= dict(dropout=0.0, merge_every=0, train_rest='auto', lora_targets='all', init_from='scratch')
CONFIG |= dict(checkpointing=False, batch_size=4, block_size=32, gradient_accumulation_steps=1)
MODES = {
    'adamw': (adam, {}),
    'adamw clipped, accumulated': (adam, dict(grad_clip=1.0, gradient_accumulation_steps=2)),
    'adamw 8 bits, per layer': (adam, dict(state_bits=8, per_layer=True)),
    'galore': (galore, {}),
    'galore per layer, accumulated': (galore, dict(per_layer=True, gradient_accumulation_steps=2)),
    'galore everything': (galore, dict(per_layer=True, state_bits=8, checkpointing=True)),
    'galore svd': (galore, dict(refresh='svd')),
    'galore 4-bit basis': (galore, dict(basis_bits=4, per_layer=True, gradient_accumulation_steps=2)),
    'galore 8-bit basis': (galore, dict(basis_bits=8, lazy=0.5)),
    'fira': (galore, dict(residual='fira', per_layer=True)),
    'apollo': (galore, dict(method='apollo')),
    'loqt': (loqt, {}),
    'loqt without nf4': (loqt, dict(quantize='none')),
    'loqt everything': (
        loqt,
        dict(double_quant=True, state_bits=8, per_layer=True, checkpointing=True, gradient_accumulation_steps=2),
    ),
    'lora': (lora, dict(gradient_accumulation_steps=2)),
    'lora fine-tuning': (lora, dict(train_rest='no', dropout=0.1, checkpointing=True, state_bits=8)),
    'lora, merged': (lora, dict(merge_every=1, quantize='none', lora_targets='q_proj,v_proj', per_layer=True)),
}


def options(config, method):
    return dict(linear=method.linear(config)) if hasattr(method, 'linear') else {}


def real_steps(config, method, dtype, live):
    """The three steps that a trace takes, on real tensors: -> model, optimizer."""
    model = LLaMA(ModelConfig(**TINY), dtype=dtype, **options(config, method))
    model.checkpointing, model.compute_dtype = config.checkpointing, torch.float32
    optimizer = method.setup(model, config)
    live.weights = live.now
    for i in range(3):
        n = min(config.gradient_accumulation_steps, 2)
        batches = [(torch.randint(0, 301, (4, 32)),) * 2 for _ in range(n)]
        if i == 2:
            trace.make_due(model, optimizer, config, TINY['n_layer'])
        training_step(model, optimizer, batches, 1e-3, 'cpu')
        del batches
    return model, optimizer


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('mode', MODES)
def test_bytes_planned_equal_bytes_of_real_steps_with_a_refresh_or_merge(mode, checkpointing):
    method, changes = MODES[mode]
    config = SimpleNamespace(**CONFIG | changes | dict(checkpointing=checkpointing))
    dtype = torch.bfloat16 if checkpointing else torch.float32
    plan = trace.trace_step(
        ModelConfig(**TINY), dtype, config, method.setup, training_step, torch.float32, True, **options(config, method)
    )
    with LiveBytes() as live:
        model, optimizer = real_steps(config, method, dtype, live)
    kept = [(name, t) for state in optimizer.state.values() for name, t in state.items() if torch.is_tensor(t)]
    states = sum(t.nbytes for name, t in kept if name not in ('W', 'W_scale'))
    assert plan.states == states
    assert live.weights == plan.weights >= sum(p.nbytes for p in model.parameters())
    assert abs(plan.total / live.peak - 1) < 0.001, (plan.total, live.peak, plan.moment)


def test_bytes_planned_equal_the_profilers_allocations_in_a_real_step():
    config, peaks = SimpleNamespace(**CONFIG), []
    plan = trace.trace_step(ModelConfig(**TINY), torch.float32, config, adam.setup, training_step, None, True)
    with torch.profiler.profile(profile_memory=True) as profile:
        model, optimizer = real_steps(config, adam, torch.float32, LiveBytes())
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


DEEP = ('adamw clipped, accumulated', 'galore everything', 'galore 8-bit basis', 'fira', 'loqt everything', 'lora')


@pytest.mark.parametrize('mode', DEEP)
def test_a_record_of_four_layers_repeated_equals_that_of_all_layers(mode, monkeypatch):
    method, changes = MODES[mode]
    config = SimpleNamespace(**CONFIG | changes)
    shape = ModelConfig(**TINY | dict(n_layer=7))

    def plan():
        made = trace.trace_step(
            shape, torch.bfloat16, config, method.setup, training_step, torch.bfloat16, **options(config, method)
        )
        peak = made.peak
        assert peak.layer in (None, 0, 6)
        sizes = made.weights, made.states, made.total, made.allocated, made.reserved
        return *sizes, peak.kinds, peak.operation, peak.layer, len(peak.timeline)

    traced = []
    steps = trace.record_steps
    monkeypatch.setattr(trace, 'record_steps', lambda shape, *a: traced.append(shape.n_layer) or steps(shape, *a))
    repeated = plan()

    def refuse(*_):
        raise trace.NotUniform

    monkeypatch.setattr(trace, 'deeper', refuse)
    assert plan() == repeated
    assert traced == [4, 4, 7]


def test_layers_that_differ_are_traced_one_by_one():
    config = SimpleNamespace(**CONFIG | dict(update_proj_gap=3))  # a third of the matrices are due at each step
    shape = ModelConfig(**TINY | dict(n_layer=6))
    plan = trace.trace_step(shape, torch.float32, config, galore.setup, training_step)
    assert plan.total > plan.weights + plan.states > 0


CONFIGURATIONS = [
    ('--method=adamw --model=60m --batch_size=16 --gradient_accumulation_steps=1', 0.005),
    ('--method=adamw --model=60m --state_bits=8 --per_layer --grad_clip=0 --batch_size=4', 0.005),
    ('--method=galore --model=60m --checkpointing --batch_size=8 --rank=128', 0.005),
    ('--method=galore --model=7b --state_bits=8 --per_layer --checkpointing --batch_size=1 --rank=1024', 0.01),
    ('--method=loqt --model=60m --batch_size=4 --rank=128', 0.01),
    ('--method=lora --model=60m --batch_size=4 --rank=16', 0.01),
]


@pytest.mark.parametrize('flags,within', CONFIGURATIONS)
def test_the_formula_says_what_the_trace_says(flags, within):
    argv = [str(ROOT / 'config/galore_130m.py'), *flags.split(), '--dry_run']
    config = configurator.load(ROOT / 'train.py', argv)
    instant, traced = memest.estimate(config), memest.trace(config)
    assert instant.weights == traced.weights and instant.states == traced.states
    assert abs(instant.total / traced.total - 1) < within, (instant.parts, traced.parts)


def test_what_fits_a_card_fits_it_runs_and_twice_the_windows_do_not_fit():
    config = configurator.load(ROOT / 'train.py', [str(ROOT / 'config/galore_7b_4090.py'), '--dry_run'])
    shape = ModelConfig(**SIZES['7b'], block_size=256)
    rows = memest.fit(config, 24 * 2**30, shape, train.problems)
    assert {'GaLore, 8-bit, offloaded', 'LoQT, 8-bit, per layer', 'QLoRA'} <= {row[0] for row in rows}
    assert 'AdamW' not in {row[0] for row in rows}, 'a 7B with its states takes 80 GB'
    assert [row[4] for row in rows] == sorted(row[4] for row in rows)
    for _, _, batch, plan, _, flags in rows:
        assert plan.card * (1 + memest.MARGIN) <= 24 * 2**30
        typed = configurator.load(ROOT / 'train.py', [str(ROOT / 'config/galore_7b_4090.py'), *flags.split()])
        assert typed.batch_size == batch and memest.estimate(typed).total == plan.total, 'the flags say it all'
        assert not train.problems(typed) and typed.batch_size * typed.gradient_accumulation_steps == 512
        typed.batch_size, typed.gradient_accumulation_steps = 2 * batch, 256 // batch
        assert memest.estimate(typed).card * (1 + memest.MARGIN) > 24 * 2**30 or batch == 512


@pytest.mark.parametrize(
    'flags,says',
    [
        ('--gpu_gb=0', '--gpu_gb=0 is not a size'),
        ('--gpus=two', '--gpus=two is not a number'),
        ('--gpu=24', 'use --gpu_gb=24'),
        ('--model=60x', "model='60x' is not a size"),
        ('--method=loqt --compile=True', 'compile'),
        ('--init_from=/nope', 'no folder'),
        ('--dataset=nope', 'no data set nope'),
        ('--plot', 'use --plot=plan.png'),
        ('--gpus=3 --tp=2', 'cannot be cut'),
        ('--fit --json', 'a table of its own'),
        ('--hf=/nope', 'does not go with --hf'),
    ],
)
def test_bad_input_is_one_sentence(flags, says):
    argv = [sys.executable, 'memest.py', 'config/galore_60m.py', *flags.split()]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and says in done.stderr and 'Traceback' not in done.stderr


def test_the_command_prints_a_table_json_a_plot_and_several_gpus(tmp_path, capsys):
    config = str(ROOT / 'config/galore_60m.py')
    memest.main([config, f'--plot={tmp_path}/plan.png', '--gpu_gb=24', '--batch_size=2', '--n_layer=2'])
    out = capsys.readouterr().out
    assert 'as nvidia-smi would show' in out and 'fits' in out and 'largest at the peak' in out and '█' in out
    assert (tmp_path / 'plan.png').stat().st_size > 10_000
    memest.main([config, '--json', '--instant'])
    plan = json.loads(capsys.readouterr().out)
    assert plan['card'] > plan['reserved'] > plan['total'] == plan['formula'] == sum(plan['parts'].values())
    memest.main([config, '--gpus=4'])
    assert 'zero3' in capsys.readouterr().out
    memest.main([config, '--model=llmem', '--gpus=4'])
    assert 'its choice' in capsys.readouterr().out
    memest.main([config, '--fit', '--gpu_gb=0.7'])
    assert 'nothing fits 0.7 GiB' in capsys.readouterr().out


def test_out_of_memory_advice_names_what_each_flag_saves():
    config = configurator.load(ROOT / 'train.py', [str(ROOT / 'config/galore_60m.py'), '--method=adamw'])
    words = fit.explain_out_of_memory(config, MemoryError('no'))
    assert words.startswith('out of memory (no); try ') and words.count('saves about') == 3
    first = float(words.split('saves about ')[1].split(' GB')[0])
    now = memest.estimate(config).total
    flags = words.split('try ')[1].split(' (')[0].split()
    then = memest.estimate(configurator.load(ROOT / 'train.py', [str(ROOT / 'config/galore_60m.py'),
                                                               '--method=adamw', *flags])).total  # fmt: skip
    assert abs((now - then) / 1e9 - first) < 0.006


def test_per_layer_and_checkpointing_and_8_bits_each_lower_the_plan():
    def total(**changes):
        config = SimpleNamespace(**CONFIG | changes)
        shape = ModelConfig(**TINY | dict(n_layer=12))
        return trace.trace_step(shape, torch.float32, config, galore.setup, training_step, None).total

    assert total(per_layer=True, checkpointing=True, batch_size=1) < total(checkpointing=True, batch_size=1)
    assert total(checkpointing=True) < total()
    assert total(state_bits=8) < total()


def test_allocator_rounds_splits_and_joins_as_torchs_does_by_hand():
    MB = record.MB
    card = Allocator()
    small = card.malloc(100)  # rounded to 512, from a segment of 2 MB
    assert (small.size, card.reserved) == (512, 2 * MB)
    card.malloc(MB)  # the rest of that segment holds it
    assert card.reserved == 2 * MB
    card.malloc(MB)  # but not another one
    assert card.reserved == 4 * MB
    middle = card.malloc(3 * MB)  # from 1 to 10 MB: a segment of 20 MB
    assert card.reserved == 24 * MB
    card.malloc(11 * MB)
    assert card.reserved == 24 * MB, 'in what is left of the 20'
    large = card.malloc(21 * MB + 1)
    assert card.reserved == 46 * MB, 'its own segment, rounded to 2 MB'
    card.free(large)
    again = card.malloc(21 * MB)  # what is over, 1 MB or less, is not split off
    assert (card.reserved, again.size) == (46 * MB, 22 * MB)
    card.free(again)
    first = card.malloc(10 * MB)  # the smallest free block that is large enough: 22, since 6 of the 20 are left
    second = card.malloc(12 * MB)
    assert card.reserved == 46 * MB
    card.free(first)
    card.free(second)
    assert card.malloc(22 * MB).size == 22 * MB and card.reserved == 46 * MB, 'free neighbours are joined'
    card.free(middle)
    card.malloc(4 * MB)
    assert card.reserved == 46 * MB


def test_reserved_is_never_less_than_what_is_alive_and_fits_the_real_allocators_bound():
    generator = torch.Generator().manual_seed(0)
    card, alive, most = Allocator(), [], 0
    for _ in range(3000):
        if alive and torch.rand((), generator=generator) < 0.5:
            card.free(alive.pop(int(torch.randint(len(alive), (), generator=generator))))
        else:
            alive.append(card.malloc(int(2 ** (27 * torch.rand((), generator=generator)))))
        most = max(most, sum(block.size for block in alive))
        assert card.reserved >= most
    for block in alive:
        card.free(block)
    card.limit = card.reserved
    card.give_back()
    assert card.reserved == 0, 'all of it can go back to the card'


def test_a_full_card_takes_its_free_segments_back_before_it_is_full():
    MB = record.MB
    card = Allocator(limit=50 * MB)
    card.free(card.malloc(30 * MB))
    card.malloc(40 * MB)  # 30 free ones are in the way, and go
    assert card.reserved == 40 * MB and not card.full and card.peak_reserved == 40 * MB
    card.malloc(20 * MB)
    assert card.full


def test_no_byte_is_lost_between_the_blocks():
    generator = torch.Generator().manual_seed(1)
    card, alive = Allocator(), []
    for _ in range(300):
        alive.append(card.malloc(int(2 ** (27 * torch.rand((), generator=generator)))))
    for block in alive:
        card.free(block)
    whole = sum(size for pool in card.free_blocks.values() for size, _, _ in pool)
    assert whole == card.reserved, 'no byte is lost or counted twice'
    assert all(b.before is None and b.after is None for pool in card.free_blocks.values() for _, _, b in pool)


@pytest.mark.parametrize('method,state', [(adam, {}), (galore, dict(moments='rotate', update_proj_gap=1))])
def test_offloaded_moments_take_none_of_the_card_and_change_no_weight(method, state):
    def run(**changes):
        config = SimpleNamespace(**CONFIG | state | changes)
        model = LLaMA(ModelConfig(**TINY)).materialise(seed=0)
        optimizer = method.setup(model, config)
        for step in range(3):
            x = torch.randint(0, 301, (4, 32), generator=torch.Generator().manual_seed(step))
            training_step(model, optimizer, [(x, x)], 1e-3, 'cpu')
        return torch.cat([p.detach().flatten() for p in model.parameters()]), optimizer

    (weights, _), (offloaded, optimizer) = run(), run(offload=True)
    assert optimizer.home == torch.device('cpu') and torch.equal(weights, offloaded)
    plans = [
        trace.trace_step(ModelConfig(**TINY), torch.float32, SimpleNamespace(**CONFIG | {'offload': offload}),
                     method.setup, training_step)
        for offload in (False, True)
    ]  # fmt: skip
    bases = sum(s['P'].nbytes for s in optimizer.state.values() if 'P' in s)
    assert plans[1].states == bases and plans[1].total < plans[0].total - 0.9 * (plans[0].states - bases)
