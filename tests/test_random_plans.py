"""Seeded random configurations: the trace against real live bytes, the formula against the trace. 40 of either kind:
python -m bench.runs.random_plans."""

import random

import pytest
import torch

import train
from bench.runs import random_plans
from model import LLaMA
from plumbing.build import layers_of, new_shape


def some(seed, sizes, n):
    pick = random.Random(seed)
    return [random_plans.flags_of(pick, sizes, random_plans.METHODS) for _ in range(n)]


@pytest.mark.parametrize('flags', some(7, random_plans.SMALL, 2))
def test_bytes_planned_are_those_of_building_and_three_real_steps(flags):
    (planned,), (real,), moment = random_plans.trace_and_real(flags)
    assert abs(planned / real - 1) < 0.02, (planned, real, moment)


@pytest.mark.parametrize('flags', some(3, random_plans.LARGER, 2))
def test_the_formula_says_what_a_trace_says(flags):
    (total, reserved), (traced, traced_reserved), moments = random_plans.formula_and_trace(flags)
    assert abs(total / traced - 1) < 0.03, (total, traced, moments)
    assert reserved > 0.9 * traced_reserved


@pytest.mark.parametrize('method', ['qgalore --weight_bits=8', 'loqt', 'lora'])
def test_building_packed_weights_needs_one_layer_beside_what_is_kept(method):
    config = random_plans.load(f'--method={method} --n_layer=3 --n_embd=256 --n_inner=704 --n_head=4 --vocab_size=64')
    with random_plans.LiveBytes() as live:
        with torch.device('meta'):
            model = LLaMA(new_shape(config, 64), dtype=torch.bfloat16, linear=layers_of(config))
        model.materialise()
        optimizer = train.setup(model, config)
    layer = 2 * (4 * 256 * 256 + 3 * 256 * 704)  # bf16
    assert optimizer.param_groups and live.peak - live.now <= layer, (live.peak - live.now, layer)


@pytest.mark.parametrize('words', ['grad --coreset_sparsity=0', 'grad --method=lora --rank=8', 'zo --zo_directions=1'])
def test_the_history_of_a_choice_by_adams_steps_is_counted(words):
    """--coreset_norm=adam keeps M and V, and takes one window's step after another: with 'grad' that is the peak."""
    flags = f'--n_embd=256 --n_head=4 --n_inner=512 --vocab_size=64 --block_size=16 --batch_size=1 --coreset={words} '
    flags += '--n_layer=1 --gradient_accumulation_steps=2 --coreset_from=4 --coreset_norm=adam --dtype=float32 '
    flags += (
        '--method=adamw --grad_clip=0 --per_layer=True' if 'lora' not in words else '--quantize=none --train_rest=no'
    )
    (planned,), (real,), moment = random_plans.trace_and_real(flags)
    assert abs(planned / real - 1) < 0.005, (planned, real, moment)
    (total, _), (traced, _), moments = random_plans.formula_and_trace(flags)
    assert abs(total / traced - 1) < 0.03, (total, traced, moments)
    assert ('choice' in moment) == ('grad' in words), moment


@pytest.mark.parametrize('gap, layers', [(2, 3), (3, 3), (2, 6), (50, 3)])
def test_full_gradients_of_the_first_layers_wait_beside_the_updates_of_the_last(gap, layers):
    """In turns, with earlier micro-batches and updates per layer: most waits where the first layers are due."""
    flags = f'--method=qgalore --n_embd=96 --n_head=4 --n_inner=176 --vocab_size=301 --rank=8 --n_layer={layers} '
    flags += '--block_size=16 --batch_size=2 --gradient_accumulation_steps=3 --per_layer=True --grad_clip=0 '
    (planned,), (real,), _ = random_plans.trace_and_real(flags + f'--dtype=float32 --update_proj_gap={gap}')
    assert abs(planned / real - 1) < 0.001, (planned, real)
