"""memory/work.py, memory/rates.py: what a step does, counted by hand; rates and their file; what is said of them."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, train, values
from test_trace import KEYS, TINY

import configurator
import memest
import train as trainer
from configurator import method_of
from memory import flags, rates, work
from memory.record import Chunk
from model import LLaMA, ModelConfig

SHAPE = dict(n_layer=3, n_head=4, n_kv_head=4, n_embd=64, n_inner=176, vocab_size=301, block_size=32)


def config_of(**changes):
    own = dict(method='adamw') | changes
    options = dict(rank=8, update_proj_gap=200, scale=0.25, compensation=1)
    words = [f'--{name}={own[name]}' for name in ('method', 'coreset') if name in own]
    loaded = configurator.load(ROOT / 'train.py', [*words, '--device=cpu', '--dtype=float32'])
    known = {key: value for key, value in (KEYS | options | own).items() if hasattr(loaded, key)}
    return SimpleNamespace(**vars(loaded) | known)


def planned(shape=None, device='cpu', **changes):
    return trainer.plan_memory(config_of(**changes), ModelConfig(**SHAPE | (shape or {})), device, torch.float32).work


def flops(counted, *phases):
    """Of products and of attention."""
    found = Counter()
    for (phase, task), times in counted.items():
        if task[0] == 'product' and (not phases or phase in phases):
            found['product'] += times * 2 * math.prod(task[2:])
        elif task[0].startswith('attention') and (not phases or phase in phases):
            found[task[0]] += times * task[1] * task[2] * task[3] * task[4]
    return found


def by_hand(layers=3, batches=1, windows=4):
    """A step of AdamW: each matrix multiplies every token's vector once forward and twice backward."""
    D, F, V, T = (SHAPE[name] for name in ('n_embd', 'n_inner', 'vocab_size', 'block_size'))
    tokens = batches * windows * T
    attention = batches * windows * layers * T * T * D
    return {
        'product': 3 * 2 * tokens * (layers * (4 * D * D + 3 * D * F) + V * D),
        'attention': attention,
        'attention back': attention,
    }


@pytest.mark.parametrize('layers', [3, 9])
def test_a_steps_operations_are_those_counted_by_hand_however_deep_the_model(layers):
    assert flops(planned(dict(n_layer=layers)).ordinary) == by_hand(layers)


def test_a_cards_kernels_that_a_plan_stands_in_for_do_what_they_are_for():
    counted = planned(device='cuda').ordinary
    assert flops(counted) == by_hand()
    norms = sum(times for (_, task), times in counted.items() if task[:2] == ('made', 'rms_norm'))
    assert norms == 2 * (2 * SHAPE['n_layer'] + 1)


def test_offloaded_moments_travel_to_the_card_and_back():
    moved = sum(times * task[1] for (_, task), times in planned(device='cuda', offload=True).ordinary.items()
                if task[0] == 'copied')  # fmt: skip
    D, F, V = (SHAPE[name] for name in ('n_embd', 'n_inner', 'vocab_size'))
    assert moved == pytest.approx(2 * 8 * (3 * (4 * D * D + 3 * D * F + 2 * D) + 2 * V * D + D), rel=0.01)


def test_micro_batches_are_so_many_times_one_and_checkpointing_is_a_forward_more():
    for n, per_layer in ((2, False), (7, True)):
        assert flops(planned(gradient_accumulation_steps=n, per_layer=per_layer).ordinary) == by_hand(batches=n)
    again, (D, F) = flops(planned(checkpointing=True).ordinary), (SHAPE['n_embd'], SHAPE['n_inner'])
    forward = 2 * 4 * 32 * 3 * (4 * D * D + 2 * D * F)  # it stops before the last product, which nothing needs
    assert again['product'] == by_hand()['product'] + forward and again['attention'] == 2 * by_hand()['attention']


@pytest.mark.parametrize('method', ['galore', 'loqt', 'muon', 'sltrain'])
def test_what_is_counted_on_fake_tensors_is_what_real_steps_do(method):
    """In everything that costs time, but for NF4's coding, which stands for itself."""
    config = config_of(method=method)
    shape = ModelConfig(**TINY)
    found = trainer.plan_memory(config, shape, 'cpu', torch.float32).work.ordinary
    module = method_of(config)
    torch.manual_seed(0)
    model = LLaMA(shape, **(dict(linear=module.linear(config)) if hasattr(module, 'linear') else {}))
    optimizer = module.setup(model, config)
    count = work.Count(SimpleNamespace(chunks=[Chunk(None)], phase='backward'), model, optimizer)
    x = torch.zeros(4, 32, dtype=torch.int64)
    for _ in range(2):
        with count.step():
            trainer.training_step(model, optimizer, [(x, x, None)], 1e-3, 'cpu')
    real = work.whole(count.steps[1])

    def costs(counted):
        total = Counter()
        for (_, task), times in counted.items():
            if task[0] != 'call' and task[-1] > 64:
                total[task] += times
        return total

    assert costs(found) == costs(real)


def test_galores_new_bases_are_two_products_and_a_qr_for_each_matrix_and_badams_blocks_take_turns():
    found = planned(method='galore', update_proj_gap=50)
    D, F = SHAPE['n_embd'], SHAPE['n_inner']
    qr = Counter(task[2:] for (_, task), times in found.renewal.items() for _ in range(times) if task[0] == 'qr')
    assert qr == {(D, 8): 3 * 7} and found.share == 1 / 50
    formed = 4 * 32 * (4 * D * D + 3 * D * F)  # G, and not R by its factors
    factors = 4 * 32 * 8 * (4 * 2 * D + 3 * (D + F))
    iteration = 8 * (4 * 3 * D * D + 3 * 3 * D * F)  # two products, and then R = P.T @ G
    assert flops(found.renewal)['product'] == 3 * 2 * (formed - factors + iteration)
    mean = found.step()
    assert flops(mean)['product'] == pytest.approx(flops(found.ordinary)['product'] + 3 * 2 / 50 * (
        formed - factors + iteration
    ))  # fmt: skip
    a_third, all_of_it = by_hand()['product'] / 3, by_hand()['product']
    assert a_third < flops(planned(method='badam').step())['product'] < 0.8 * all_of_it


def test_a_choices_pool_is_counted_whole():
    counted = planned(coreset='grad', coreset_from=8).ordinary
    D, F = SHAPE['n_embd'], SHAPE['n_inner']
    two_blocks = 2 * 8 * 4 * 32 * 2 * (4 * D * D + 3 * D * F)  # the last one, and the head, are looked into in parts
    assert flops(counted, 'data')['product'] > two_blocks


def test_bytes_of_operations_by_hand():
    A = torch.zeros(100, 10)

    def of(name, *args, **named):
        function = getattr(torch.ops.aten, name).default if '.' not in name else None
        function = function or getattr(getattr(torch.ops.aten, name.split('.')[0]), name.split('.')[1])
        return list(work.tasks(function, args, named, function(*args, **named)))[1:]

    assert of('mul.Tensor', A, A) == [('made', 'mul', 12_000)]
    assert of('mul_.Tensor', A, A) == [('moved', 'mul_', 12_000)]
    assert of('add.Tensor', A, torch.zeros(1, 1).expand(100, 10)) == [('narrow', 10, 8_004)]
    assert of('view', A, [10, 100]) == of('empty_like', A) == []
    assert of('mm', A, A.T) == [('product', torch.float32, 1, 100, 100, 10)]
    assert of('zeros', [work.PAGES // 4]) == [('pages', work.PAGES), ('made', 'zeros', work.PAGES)]


# ---- rates -------------------------------------------------------------------------------------------------------

CURVES = {'made': [[100, 1e-9], [10_000, 4e-9]], 'call': [[1, 1e-6]], 'torch.float32': [[16, 1e-9], [64, 1e-10]]}


def test_rates_are_interpolated_and_stay_beyond_their_ends():
    r = rates.Rates(CURVES)
    assert [r.at('made', x) for x in (1, 100, 10_000, 1e9)] == pytest.approx([1e-9, 1e-9, 4e-9, 4e-9])
    assert r.at('made', 1000) == pytest.approx(2e-9)
    counted = Counter({('forward', ('made', 'mul', 100)): 3, ('forward', ('call',)): 2, ('update', ('call',)): 1})
    r.curves = CURVES | {'call in update': [[1, 5e-6]]}
    assert r.seconds(counted) == pytest.approx({'forward': 3e-7 + 2e-6, 'update': 5e-6})


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A cache of its own, and the list of what was measured."""
    seen = []
    monkeypatch.setenv('NANO24_CACHE', str(tmp_path))
    monkeypatch.setattr(rates, 'common_tasks', lambda *_: 'common')
    monkeypatch.setattr(rates, 'bit_tasks', lambda *_: 'bits')

    def measure(tasks, device, seconds):
        seen.append(tasks)
        return {'nf4': [[1, 1e-9]]} if tasks == 'bits' else dict(CURVES)

    monkeypatch.setattr(rates, 'measure', measure)
    return seen


def test_what_was_measured_is_kept_and_a_damaged_file_or_another_machines_is_measured_anew(measured, monkeypatch):
    assert rates.load().curves == CURVES and rates.load().curves == CURVES and measured == ['common']
    assert 'nf4' in rates.load(bits=True).curves and 'nf4' in rates.load(bits=True).curves
    assert measured == ['common', 'bits']
    rates.load(anew=True)
    assert measured == ['common', 'bits', 'common']
    for damaged in ('', '{"a": ', '[]', '{"a": 1}', json.dumps({rates.name_of('cpu', torch.float32): {'made': []}})):
        with open(rates.cache_file(), 'w') as f:
            f.write(damaged)
        measured.clear()
        assert rates.load().curves == CURVES and measured == ['common']
    with open(rates.cache_file()) as f:
        (name,) = json.load(f)
    monkeypatch.setattr(rates, 'name_of', lambda *_: 'another machine')
    assert rates.load().curves == CURVES and measured == ['common'] * 2
    with open(rates.cache_file()) as f:
        assert set(json.load(f)) == {name, 'another machine'}


def test_a_cache_that_cannot_be_written_is_no_error(measured, monkeypatch, tmp_path):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('NANO24_CACHE', str(tmp_path / 'file'))
    assert rates.load().curves == CURVES


def test_every_sort_that_is_measured_takes_positive_time():
    curves = rates.measure(rates.common_tasks('cpu', torch.float32), 'cpu', 0)
    assert rates.checked(curves) is curves and {'call', 'made', 'moved', 'pages', 'torch.float32', 'qr'} <= set(curves)


def test_calibrate_is_refused_where_nothing_would_be_measured():
    for other in ('--instant', '--gpus=4', '--model=llmem'):
        with pytest.raises(ValueError, match='--calibrate is of the seconds of a trace'):
            flags.split(['--calibrate', other])


# ---- what is said ------------------------------------------------------------------------------------------------


def test_memest_says_seconds_or_why_not(capsys):
    small = ['--method=adamw', '--n_layer=1', '--batch_size=1', '--block_size=16', '--device=cpu']
    memest.main([*small, '--json'])
    found = json.loads(capsys.readouterr().out)
    assert found['seconds'] == pytest.approx(sum(found['seconds_of'].values())) and found['seconds'] > 0
    memest.main(small)
    assert 's a step by what this device was measured to do: ' in capsys.readouterr().out
    memest.main([*small, '--compile=True'])
    assert 'no time is planned of compiled code' in capsys.readouterr().out
    if not torch.cuda.is_available():
        memest.main([*small[:-1], '--gpu_gb=24'])
        assert 'no time is planned, since the plan is of a card' in capsys.readouterr().out
        memest.main([*small[:-1], '--instant', '--json'])
        found = json.loads(capsys.readouterr().out)
        assert found['seconds'] is None and '--instant' in found['no_seconds']


def test_a_run_says_its_eta_before_the_first_step(data, tmp_path):
    done = train(tmp_path / 'run', data, '--max_iters=3')
    assert done.returncode == 0, done.stderr
    eta, first = done.stdout.find('\nETA 0:0'), done.stdout.find('\nstep 0/3')
    assert 0 < eta < first and 's a step by what this device was measured to do' in done.stdout
    assert values(done.stdout)['steps'] == '3'
