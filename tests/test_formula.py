"""memory/formula.py and matrices.py: what the formula says against the trace."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import configurator
import memest
import train as training
from memory.formula import UnknownMethod, estimate
from memory.matrices import METHODS, adam_moments, nf4
from memory.trace import plan_memory
from model import ModelConfig

CONFIGURATIONS = [
    ('--method=adamw --model=60m --batch_size=16 --gradient_accumulation_steps=1', 0.005),
    ('--method=adamw --model=60m --state_bits=8 --per_layer --grad_clip=0 --batch_size=4', 0.005),
    ('--method=galore --model=60m --checkpointing --batch_size=8 --rank=128', 0.005),
    ('--method=galore --model=7b --state_bits=8 --per_layer --checkpointing --batch_size=1 --rank=1024', 0.01),
    ('--method=qgalore --model=60m --batch_size=4 --rank=128 --per_layer --lazy=0', 0.01),
    ('--method=galore --model=60m --batch_size=4 --rank=128 --proj_type=right', 0.01),
    ('--method=fira --model=60m --batch_size=4 --rank=128 --proj_type=right', 0.01),
    ('--method=fira --model=60m --batch_size=4 --rank=128', 0.01),
    ('--method=apollo --model=60m --batch_size=4 --rank=128', 0.01),
    ('--method=muon --model=60m --batch_size=4', 0.01),
    ('--method=muon --model=350m --batch_size=4 --state_bits=8 --per_layer --grad_clip=0', 0.01),
    ('--method=sumo --model=60m --batch_size=4 --rank=128', 0.01),
    ('--method=loqt --model=60m --batch_size=4 --rank=128', 0.01),
    ('--method=lora --model=60m --batch_size=4 --rank=16', 0.01),
]


def config_of(flags):
    return configurator.load(ROOT / 'train.py', [str(ROOT / 'config/galore_130m.py'), *flags.split(), '--dry_run'])


@pytest.mark.parametrize('flags,within', CONFIGURATIONS)
def test_the_formula_says_what_the_trace_says(flags, within):
    config = config_of(flags)
    instant, traced = memest.estimate(config), memest.trace(config)
    assert instant.weights == traced.weights and instant.states == traced.states
    assert abs(instant.total / traced.total - 1) < within, (instant.parts, traced.parts)


SHAPE = dict(n_layer=5, n_head=8, n_kv_head=2, n_embd=256, n_inner=704, vocab_size=2000, block_size=128)
FAMILIES = [  # the switches of other families
    ('adamw', dict(qkv_bias=True, o_bias=True, mlp_bias=True, no_rope=(3,), tie_embeddings=True)),
    ('galore', dict(qk_norm=True, head_dim=64)),
    ('lora', dict(layer_norm=True, rotary_dim=8, qkv_bias=True)),
]


@pytest.mark.parametrize('method,switches', FAMILIES, ids=str)
def test_the_formula_says_of_other_families_what_the_trace_says(method, switches):
    words = f'--dry_run --method={method} --batch_size=8 --block_size=128 --dtype=bfloat16'
    config, shape = configurator.load(ROOT / 'train.py', words.split()), ModelConfig(**SHAPE, **switches)
    instant, step = estimate(config, shape), training.training_step
    traced = plan_memory(config, shape, torch.bfloat16, 'cpu', configurator.method_of(config), step)
    assert instant.weights == traced.weights and instant.states == traced.states
    assert abs(instant.total / traced.total - 1) < 0.01, (instant.parts, traced.parts)


def test_the_parts_are_the_total():
    for flags, _ in CONFIGURATIONS:
        plan = memest.estimate(config_of(flags))
        assert sum(plan.parts.values()) == plan.total < plan.allocated < plan.reserved < plan.card


def test_every_method_that_can_be_chosen_has_a_formula():
    # a method without a function here is planned by the trace; these have theirs
    assert set(METHODS) >= {'adamw', 'galore', 'loqt', 'lora', 'qgalore', 'fira', 'apollo'}


@pytest.mark.parametrize('name', ['lion', 'galore2', 'AdamW', ''])
def test_a_method_without_a_formula_is_refused_and_never_planned_as_another(name):
    config = SimpleNamespace(**vars(config_of('--method=galore')) | {'method': name})
    with pytest.raises(UnknownMethod, match=f"method='{name}'"):
        memest.estimate(config)


def test_numbers_in_few_bits_by_hand():
    assert nf4(128) == 64 + 2 * 4  # two codes a byte, an fp32 scale for each 64
    assert nf4(64 * 256, double_quant=True) == 64 * 128 + 256 + 4 + 4  # a byte a scale, a scale of these, their mean
    assert adam_moments(8192, 32) == 2 * 4 * 8192
    assert adam_moments(8192, 8) == 2 * (8192 + 4 * 8192 // 256)
    assert adam_moments(100, 8) == 2 * 4 * 100, 'small tensors keep fp32'
