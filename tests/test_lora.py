"""lora.py against its formula under autograd, bitsandbytes' NF4, and the contract that every method keeps."""

from types import SimpleNamespace

import pytest
import torch
from test_galore import TINY, train

import checkpoint
import lora
from adam import decode, encode
from lora import LoRALinear
from model import LLaMA, ModelConfig

CONFIG = dict(learning_rate=1e-2, beta1=0.9, beta2=0.999, weight_decay=0.0, rank=4, scale=2.0, state_bits=32, seed=0)
CONFIG |= dict(grad_clip=0.0, per_layer=False, offload=False, quantize='none', double_quant=False)
MODES = [{}, dict(quantize='nf4', double_quant=True), dict(state_bits=8), dict(grad_clip=0.5)]


def model_and_optimizer(dtype=torch.float32, **changes):
    config = SimpleNamespace(**CONFIG | changes)
    model = LLaMA(ModelConfig(**TINY), dtype=dtype, linear=lora.linear(config)).materialise(seed=0)
    model.compute_dtype = torch.float32
    return model, lora.setup(model, config)


@pytest.mark.parametrize('quantize', ['none', 'nf4'])
@pytest.mark.parametrize('shape', [(12, 30), (30, 12)])
def test_forward_and_backward_are_the_formulas(shape, quantize):
    torch.manual_seed(0)
    W = torch.randn(shape)
    layer = LoRALinear(shape[1], shape[0], rank=4, alpha=8.0, quantize=quantize)
    layer.set_weight(W)
    W = decode(encode(W, quantize), shape, torch.float32)
    x, delta = torch.randn(2, 9, shape[1], requires_grad=True), torch.randn(2, 9, shape[0])
    torch.testing.assert_close(layer(x), x @ W.T, msg='B is zero at the start')
    layer.B.data.normal_()
    (layer(x) * delta).sum().backward()
    A, B = layer.A.detach().clone().requires_grad_(), layer.B.detach().clone().requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    ((x2 @ (W + 2.0 * B @ A).T) * delta).sum().backward()
    for ours, theirs in ((x.grad, x2.grad), (layer.A.grad, A.grad), (layer.B.grad, B.grad)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.dense_weight(), (W + 2.0 * B @ A).detach())


def test_frozen_weights_do_not_move_and_all_else_learns():
    model, optimizer = model_and_optimizer()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    train(model, optimizer, 5)
    after = model.state_dict()
    frozen = [name for name in before if name.endswith('_proj.W')]
    assert len(frozen) == 14 and all(torch.equal(before[name], after[name]) for name in frozen)
    assert not any(torch.equal(before[name], after[name]) for name in before if name not in frozen)


@pytest.mark.parametrize('mode', MODES, ids=str)
@pytest.mark.parametrize('accumulation', [1, 4])
def test_per_layer_equals_normal(accumulation, mode, small_8bit):
    normal, other = (train(*model_and_optimizer(**mode, per_layer=on), 5, accumulation) for on in (False, True))
    for a, b in zip(normal.parameters(), other.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('mode', MODES, ids=str)
def test_interrupted_equals_uninterrupted_bit_for_bit(mode, dtype, tmp_path, small_8bit):
    whole, optimizer = model_and_optimizer(dtype, **mode)
    train(whole, optimizer, 8, accumulation=2)
    model, optimizer = model_and_optimizer(dtype, **mode)
    train(model, optimizer, 3, accumulation=2)
    checkpoint.save(str(tmp_path / 'c'), model, optimizer, {}, {})
    config = SimpleNamespace(**CONFIG | mode)
    resumed = LLaMA.from_pretrained(tmp_path / 'c', dtype=dtype, linear=lora.linear(config))
    resumed.compute_dtype = torch.float32
    optimizer = lora.setup(resumed, config)
    checkpoint.load_optimizer(str(tmp_path / 'c'), optimizer)
    train(resumed, optimizer, 5, accumulation=2, first=3)
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_saved_model_is_a_plain_one_with_the_product_added(tmp_path):
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 4)
    model.save_pretrained(tmp_path)
    x = torch.randint(0, 61, (2, 16))
    torch.testing.assert_close(LLaMA.from_pretrained(tmp_path)(x), model(x), atol=1e-4, rtol=1e-4)


def test_impossible_arguments_name_the_thing_and_what_to_type():
    with pytest.raises(ValueError, match="rank=0 cannot be: use 'nf4' or 'none', and at least 1"):
        LoRALinear(8, 8, rank=0)
    with pytest.raises(ValueError, match=r'build the model with LLaMA\(config, linear=lora.linear'):
        lora.setup(LLaMA(ModelConfig(**TINY)), SimpleNamespace(**CONFIG))
