"""memest.py: the bytes of a step on fake tensors against the same step on real ones."""

from types import SimpleNamespace

import pytest
import torch

import adam
import galore
import loqt
import lora
import memest
from model import Linear, LLaMA, ModelConfig
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


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('mode', MODES)
def test_bytes_planned_equal_bytes_of_a_real_step(mode, dtype):
    method, changes = MODES[mode]
    config = SimpleNamespace(**CONFIG | changes)
    linear = method.linear(config) if hasattr(method, 'linear') else Linear
    plan = memest.trace_step(
        ModelConfig(**TINY), dtype, config, method.setup, training_step, torch.float32, linear=linear
    )

    with memest.LiveBytes() as live:
        model = LLaMA(ModelConfig(**TINY), dtype=dtype, linear=linear)
        model.checkpointing, model.compute_dtype = config.checkpointing, torch.float32
        optimizer = method.setup(model, config)
        assert live.now == plan.weights >= sum(p.nbytes for p in model.parameters())
        for _ in range(2):
            n = config.gradient_accumulation_steps
            batches = [(torch.randint(0, 301, (4, 32)),) * 2 for _ in range(n)]
            training_step(model, optimizer, batches, 1e-3, 'cpu')
            del batches
    states = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
    assert plan.states == states
    assert abs(plan.total / live.peak - 1) < 0.01, (plan.total, live.peak)


def test_per_layer_and_checkpointing_and_8_bits_each_lower_the_plan():
    def total(**changes):
        config = SimpleNamespace(**CONFIG | changes)
        shape = ModelConfig(**TINY | dict(n_layer=12))
        return memest.trace_step(shape, torch.float32, config, galore.setup, training_step, None).total

    assert total(per_layer=True, checkpointing=True, batch_size=1) < total(checkpointing=True, batch_size=1)
    assert total(checkpointing=True) < total()
    assert total(state_bits=8) < total()


def test_allocator_rounds_splits_and_joins_as_torchs_does_by_hand():
    MB = memest.MB
    card = memest.Allocator()
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
    card, alive, most = memest.Allocator(), [], 0
    for _ in range(3000):
        if alive and torch.rand((), generator=generator) < 0.5:
            card.free(alive.pop(int(torch.randint(len(alive), (), generator=generator))))
        else:
            alive.append(card.malloc(int(2 ** (27 * torch.rand((), generator=generator)))))
        most = max(most, sum(block.size for block in alive))
        assert card.reserved >= most
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
        memest.trace_step(ModelConfig(**TINY), torch.float32, SimpleNamespace(**CONFIG | {'offload': offload}),
                     method.setup, training_step)
        for offload in (False, True)
    ]  # fmt: skip
    bases = sum(s['P'].nbytes for s in optimizer.state.values() if 'P' in s)
    assert plans[1].states == bases and plans[1].total < plans[0].total - 0.9 * (plans[0].states - bases)
