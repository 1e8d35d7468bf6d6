"""What every method owes, whatever it does: these tests take the method's name, and the names are train.py's.

A new file in methods/, its name added to the comment of `method`, is tested here as it stands, in the modes of COMMON;
what its own options change belongs in MODES."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_coreset import assert_untouched, snapshot, tokens_of
from test_galore import TINY, train

import configurator
import train as training
from coreset import Coreset
from memory import trace
from memory.record import LiveBytes
from model import Linear, LLaMA, ModelConfig
from plumbing import Stop, checkpoint, report

SCRIPT = str(ROOT / 'train.py')
NAMES = configurator._layout(SCRIPT).trunk['method'].choices
# Some of everything within a few steps of a tiny model, for the keys among these that a method has.
SHORT = dict(rank=8, update_proj_gap=3, learning_rate=1e-3, warmup_iters=0, max_iters=40, lazy=0.0, quantize='none')
SHORT |= dict(block_steps=3)
COMMON = [{}, dict(state_bits=8), dict(weight_decay=0.1), dict(grad_clip=0.05)]
RELORA = dict(dropout=0.3, merge_every=2, train_rest='no')
MODES = {
    'galore': [
        dict(refresh='svd', stagger=False),
        dict(basis_bits=8),
        dict(basis_bits=4),
        dict(moments='rotate', refresh='sara'),
        dict(moments='reset', offload=True),
    ],
    'qgalore': [
        dict(lazy=0.1, weight_bits=16, basis_bits=16),
        dict(state_bits=8, lazy=0.1, moments='rotate', weight_decay=0.1, grad_clip=0.05),
    ],
    'fira': [dict(basis_bits=8, state_bits=8, refresh='svd')],
    'adalomo': [dict(adaptive=False)],
    'sltrain': [dict(density=0.5, offload=True)],
    'adarankgrad': [dict(energy=0.5, basis_bits=4, state_bits=8), dict(energy=0.5, offload=True)],
    'ldadam': [dict(feedback=False, offload=True)],
    'badam': [dict(choose='norm', offload=True)],
    'grass': [dict(choose='norm', stagger=False, offload=True)],
    'apollo': [dict(tensorwise=True, rank=1, scale=128**0.5)],
    'sumo': [
        dict(orthogonal='newton', basis_bits=4, refresh='sara'),
        dict(moments='reset', state_bits=8, offload=True),
    ],
    'scale': [dict(momentum=0.0)],
    'muon': [dict(row_norm=True, momentum=0.8, offload=True)],
    'loqt': [
        dict(quantize='nf4', moments='reset'),
        dict(quantize='nf4', double_quant=True, state_bits=8),
        dict(stagger=False, moments='rotate', offload=True, refresh='sara'),
        dict(quantize='nf4', refresh='svd', grad_clip=0.5, weight_decay=0.1),
    ],
    'lora': [
        dict(quantize='nf4', double_quant=True),
        RELORA,
        dict(RELORA, quantize='nf4', state_bits=8, offload=True, targets='q_proj,v_proj'),
    ],
}
CASES = [(name, mode) for name in NAMES for mode in (*COMMON, *MODES.get(name, ()))]
ADDED_APART = ('muon',)  # per layer each micro-batch goes into the momentum: the same sum in another order
CASES.remove(('adalomo', dict(state_bits=8)))  # which keeps no moments
ACCUMULATED = [(*case, 2) for case in CASES] + [(name, {}, steps) for name in NAMES for steps in (1, 8)]


def config_of(name, **changes):
    found = vars(configurator.load(SCRIPT, [f'--method={name}']))
    return SimpleNamespace(**found | {key: value for key, value in SHORT.items() if key in found} | changes)


def linear_of(config):
    method = configurator.method_of(config)
    return method.linear(config) if hasattr(method, 'linear') else Linear


def model_and_optimizer(name, dtype=torch.float32, checkpointing=False, **changes):
    config = config_of(name, **changes)
    model = LLaMA(ModelConfig(**TINY), dtype=dtype, linear=linear_of(config)).materialise(seed=0)
    model.compute_dtype, model.checkpointing = torch.float32, checkpointing
    for module in model.modules():  # large enough weights that gradients are of a common size
        draw = torch.Generator().manual_seed(0)
        if hasattr(module, 'set_weight'):
            module.set_weight(0.2 * torch.randn(module.out_features, module.in_features, generator=draw).to(dtype))
        for p in module.parameters(recurse=False):
            if p.dim() == 2 and not hasattr(module, 'set_weight'):
                torch.nn.init.normal_(p, std=0.2, generator=draw)
    return model, configurator.method_of(config).setup(model, config)


def everything(model, optimizer):
    """{name: tensor} of what a run has: weights, packed ones among them, and the optimizer's state."""
    found = dict(model.state_dict())
    for p, state in optimizer.state.items():
        found |= {f'{optimizer.index_of[p]} {name}': t for name, t in state.items() if torch.is_tensor(t)}
    return {name: t.detach().clone() for name, t in found.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def assert_near(a, b, start, most):
    """The weights of a and of b lie apart by no more than this share of the way from `start`."""
    apart, way = (sum((x[name] - y[name]).square().sum() for name in start) for x, y in ((a, b), (a, start)))
    assert apart.sqrt() < most * way.sqrt(), (apart.sqrt() / way.sqrt()).item()


@pytest.mark.parametrize('name,mode,accumulation', ACCUMULATED, ids=str)
def test_per_layer_equals_normal_or_is_refused_with_the_flag_to_change(name, mode, accumulation, small_8bit):
    # 7 steps at T = 3: first bases, staggered refreshes, merges and ordinary steps all occur. The same products are
    # taken in the same order, so the same bits come out, without which random rounding would differ by whole steps.
    found = []
    for per_layer in (False, True):
        try:
            model, optimizer = model_and_optimizer(name, per_layer=per_layer, **mode)
        except ValueError as error:
            assert per_layer and mode.get('grad_clip') and 'set grad_clip=0 or per_layer=False' in str(error)
            config = config_of(name, per_layer=True, **mode)
            assert any('grad_clip=0' in problem for problem in training.problems(config)), 'before a model is built'
            return
        start = {name: t.detach().clone() for name, t in model.state_dict().items()}
        found.append(everything(train(model, optimizer, 7, accumulation), optimizer))
    if name not in ADDED_APART or accumulation == 1:
        assert_same(*found)
    else:
        assert_near(*found, start, 0.1 if mode.get('state_bits') == 8 else 1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name,mode', [*CASES, *((name, dict(per_layer=True)) for name in NAMES)], ids=str)
def test_interrupted_equals_uninterrupted_bit_for_bit(name, mode, dtype, tmp_path, small_8bit):
    model, optimizer = model_and_optimizer(name, dtype, **mode)
    train(model, optimizer, 5, accumulation=2)
    checkpoint.save(str(tmp_path / 'c'), model, optimizer, {}, {})
    whole = everything(train(model, optimizer, 6, accumulation=2, first=5), optimizer)

    config = config_of(name, **mode)
    resumed = LLaMA.from_pretrained(tmp_path / 'c', dtype=dtype, linear=linear_of(config))
    resumed.compute_dtype = torch.float32
    again = configurator.method_of(config).setup(resumed, config)
    checkpoint.load_optimizer(str(tmp_path / 'c'), again)
    assert_same(whole, everything(train(resumed, again, 6, accumulation=2, first=5), again))
    # moments are fp32 or 8 bits, never bf16
    moments = {t.dtype for state in again.state.values() for key, t in state.items() if key in ('M', 'V')}
    assert mode.get('lazy', 0) == 0 or any(state.get('gap') == 6 for state in again.state.values()), 'some were put off'
    assert moments <= {torch.float32, torch.uint8} and (mode.get('state_bits') != 8 or torch.uint8 in moments)


@pytest.mark.parametrize('name', NAMES)
def test_activation_checkpointing_changes_nothing(name):
    found = [train(*model_and_optimizer(name, checkpointing=on), 6, accumulation=2) for on in (False, True)]
    assert_same(*(model.state_dict() for model in found))


# Every half of the 16 combinations in which each three of the four switches still meet in all their settings.
SWITCHES = itertools.product((False, True), repeat=4)
STACKS = [
    (name, torch.bfloat16 if bf16 else torch.float32, 8 if eight else 32, per_layer, checkpointing)
    for (bf16, eight, per_layer, checkpointing), name in itertools.product(SWITCHES, NAMES)
    if not (bf16 ^ eight ^ per_layer ^ checkpointing)
]


@pytest.mark.parametrize('name,dtype,bits,per_layer,checkpointing', STACKS)
def test_every_stack_is_trained_and_choosing_touches_nothing(name, dtype, bits, per_layer, checkpointing, small_8bit):
    options = dict(state_bits=bits, per_layer=per_layer)
    model, optimizer = model_and_optimizer(name, dtype, checkpointing, **options)
    before = [p.detach().clone() for p in model.parameters()]
    choosers = [Coreset('grad', small=[2]), Coreset('zo', norm='adam', directions=2, small=[2], weights='cluster')]
    for step, chooser in enumerate(choosers):
        x, y = tokens_of(16, T=8, seed=step)
        sources = torch.tensor([0] * 8 + [1] * 5 + [2] * 3)
        state = snapshot(model, optimizer)
        chosen, weights = chooser.choose(model, x, y, sources, 8, step, batch_size=6)
        # a galore that has not stepped yet makes the (empty) place for a weight's state on the way, as forward does
        assert_untouched(state, snapshot(model, optimizer))
        assert len(set(chosen.tolist())) == 8 and {13, 14, 15} <= set(chosen.tolist())
        parts = [chosen.split(4), *([weights.split(4)] if weights is not None else [])]
        batches = [(x[i], y[i], *w) for i, *w in zip(*parts)]
        assert training.training_step(model, optimizer, batches, 1e-2, 'cpu').isfinite()
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name', NAMES)
def test_clipping_is_no_silent_no_op(name):
    norms, moved = [], []
    for grad_clip in (0.0, 1e-4):
        model, optimizer = model_and_optimizer(name, grad_clip=grad_clip)
        train(model, optimizer, 4)
        norms.append(optimizer.metrics['grad_norm'])
        moved.append(everything(model, optimizer))
    assert min(norms) > 1e-3, 'the norm that is shown is that before clipping'
    assert not all(torch.equal(a, b) for a, b in zip(moved[0].values(), moved[1].values()))


@pytest.mark.parametrize('name', NAMES)
def test_metrics_are_single_numbers_the_norm_first_and_can_be_logged(name):
    model, optimizer = model_and_optimizer(name)
    train(model, optimizer, 1)
    assert next(iter(optimizer.metrics)) == 'grad_norm'
    assert all(value.dim() == 0 and value.isfinite() for value in optimizer.metrics.values())
    assert set(report.checked(optimizer.metrics)) == set(optimizer.metrics)


def test_a_metric_may_be_any_number_and_one_that_cannot_be_logged_is_refused_by_name():
    good = dict(flips=0.5, count=3, norm=torch.tensor([2.0]), kept=torch.tensor(1, dtype=torch.int64))
    assert {name: float(t) for name, t in report.checked(good).items()} == dict(flips=0.5, count=3, norm=2, kept=1)
    assert all(t.dim() == 0 for t in report.checked(good).values())
    for name in ('loss', 'seconds', 'memory', 'step', 'val_loss'):
        with pytest.raises(Stop, match=rf"metrics\['{name}'\] has the name of one of train.py's own columns"):
            report.checked({name: torch.tensor(1.0)})
    for value in (torch.ones(3), 'fast', None):
        with pytest.raises(Stop, match=r"metrics\['flips'\] is no single number: .* such as its mean"):
            report.checked({'flips': value})


@pytest.mark.parametrize('name', NAMES)
def test_the_plan_of_a_step_is_what_a_real_step_holds(name, data):
    """Of the bytes of tensors, to 2 %: so a step runs on fake tensors, which have no values to branch on."""
    config = config_of(name, batch_size=4, block_size=16, device='cpu')
    shape, linear = ModelConfig(**TINY), linear_of(config)
    method = configurator.method_of(config)
    planned = trace.plan_memory(config, shape, torch.float32, 'cpu', method, training.training_step).total
    tokens = torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(0))
    with LiveBytes() as live:
        model = LLaMA(shape, linear=linear).materialise(seed=0)
        optimizer = method.setup(model, config)
        live.peak = live.now
        for _ in range(6):
            training.training_step(model, optimizer, [(tokens, tokens)], 1e-3, 'cpu')
    assert planned == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize('name', NAMES)
def test_targets_choose_layers_or_are_refused(name):
    refused = {'adamw', 'adalomo', 'badam', 'scale', 'sltrain'}  # which do the same with all layers
    assert any('targets=' in told for told in training.problems(config_of(name, targets='q_proj'))) == (name in refused)
    if name not in refused:
        with pytest.raises(
            ValueError, match="targets='q_proj,x' names no such layers: use all, or some of q_proj,k_proj"
        ):
            model_and_optimizer(name, targets='q_proj,x')
