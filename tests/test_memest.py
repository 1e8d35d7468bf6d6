"""memest.py: the bytes of a step on fake tensors against the same step on real ones."""

from types import SimpleNamespace

import pytest
import torch

import adam
import galore
import memest
from model import LLaMA, ModelConfig
from train import training_step

TINY = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=64, n_inner=176, vocab_size=301, block_size=32)
CONFIG = dict(learning_rate=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.0, rank=8, update_proj_gap=200, scale=0.25)
CONFIG |= dict(refresh='subspace', stagger=True, state_bits=32, grad_clip=0.0, per_layer=False, offload=False, seed=0)
CONFIG |= dict(method='galore', lazy=0.0, moments='keep', residual='none', basis_bits=16, weight_bits=16, compile=False)
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
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('mode', MODES)
def test_bytes_planned_equal_bytes_of_a_real_step(mode, dtype):
    method, changes = MODES[mode]
    config = SimpleNamespace(**CONFIG | changes)
    plan = memest.trace(ModelConfig(**TINY), dtype, config, method.setup, training_step, torch.float32)

    with memest.LiveBytes() as live:
        model = LLaMA(ModelConfig(**TINY), dtype=dtype)
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
        return memest.trace(shape, torch.float32, config, galore.setup, training_step, None).total

    assert total(per_layer=True, checkpointing=True, batch_size=1) < total(checkpointing=True, batch_size=1)
    assert total(checkpointing=True) < total()
    assert total(state_bits=8) < total()
