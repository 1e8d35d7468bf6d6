"""plumbing/ready.py: matrices as a device multiplies them fastest change no text, and leave the model as it was."""

from functools import partial

import pytest
import torch

import loqt
import lora
import sample
from model import Linear, LLaMA, ModelConfig
from plumbing import ready

TINY = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_inner=128, vocab_size=97, block_size=24)
FAMILIES = {
    'llama': {},
    'tied, biases': dict(tie_embeddings=True, qkv_bias=True, o_bias=True, mlp_bias=True),
    'norms, part rotates': dict(qk_norm=True, layer_norm=True, rotary_dim=8, no_rope=(1,), residual_scale=0.5),
}
LAYERS = {
    'dense': Linear,
    'LoRA': partial(lora.LoRALinear, rank=4),
    'QLoRA': partial(lora.LoRALinear, rank=4, quantize='nf4', double_quant=True),
    'LoQT': partial(loqt.LoQTLinear, rank=4),
}


def made(family='llama', layer='dense', **other):
    model = LLaMA(ModelConfig(**TINY | FAMILIES[family]), linear=LAYERS[layer], **other)
    for module in model.materialise(seed=0).layers.modules():
        if hasattr(module, 'set_weight'):
            module.set_weight(torch.randn(module.out_features, module.in_features) / 4)
            torch.nn.init.normal_(module.B, std=0.1)
        elif type(module) is Linear:
            torch.nn.init.normal_(module.weight, std=0.3)
            if module.bias is not None:
                torch.nn.init.normal_(module.bias)
    return model


def texts(model):
    prompts = [[5, 6, 7], [9], list(range(20)), [3, 3, 4, 5, 6]]
    return dict(sample.generate_batch(model, prompts, 12, batch_size=3))


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('layer', LAYERS)
@pytest.mark.parametrize('packs', [True, False])
def test_a_ready_model_says_what_it_said_and_is_then_as_it_was(family, layer, packs, monkeypatch):
    torch.manual_seed(0)
    model, ids = made(family, layer), torch.arange(22)[None]
    before, logits = texts(model), model(ids).detach()
    own = {id(module): dict(vars(module)) for module in model.modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if not packs:
        monkeypatch.setattr(ready, 'packs', lambda device, dtype: False)
    with ready.decoded(model), torch.no_grad():
        assert texts(model) == before
        torch.testing.assert_close(model(ids), logits, atol=1e-4, rtol=1e-4)
        changed = sum('project' in vars(m) or 'inner' in vars(m) or 'forward' in vars(m) for m in model.modules())
    assert bool(changed) == ((packs and ready.packs('cpu', torch.float32)) or layer in ('LoRA', 'QLoRA', 'LoQT'))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items()) and after.keys() == state.keys()
    assert {id(module): dict(vars(module)).keys() for module in model.modules()} == {
        i: d.keys() for i, d in own.items()
    }
    assert torch.equal(model(ids), logits)


def test_what_a_layer_had_of_its_own_is_there_again():
    """As GaLore's layers have a forward of their own, whose backward forms no gradient."""
    model = made()
    layer = model.layers[0].self_attn.o_proj
    layer.forward = mine = partial(Linear.forward, layer)
    with ready.decoded(model):
        assert layer.forward is not mine
    assert layer.forward is mine and 'forward' not in vars(model.layers[1].self_attn.o_proj)


@pytest.mark.parametrize('share', [0, 0.4, 0.8, 2])
def test_as_many_matrices_are_decoded_as_have_room(share, monkeypatch):
    model, read = made(layer='QLoRA'), []
    matrices = [m for m in model.modules() if isinstance(m, lora.LoRALinear)]
    whole = 4 * sum(m.out_features * m.in_features for m in matrices)
    monkeypatch.setattr(ready, 'free_memory', lambda device: share * whole / 0.8)
    inner = lora.LoRALinear.read
    monkeypatch.setattr(lora.LoRALinear, 'read', lambda self, *a: read.append(self) or inner(self, *a))
    with ready.decoded(model), torch.no_grad():
        once = len(read)
        model(torch.arange(5)[None])
        each = len(read) - once
    assert (
        once + each == len(matrices) and sum(m.out_features * m.in_features for m in read[:once]) * 4 <= share * whole
    )
    assert (once == 0) == (share == 0) and (each == 0) == (share == 2)


def test_a_weight_stored_in_another_dtype_is_cast_once():
    model = made()
    model.bfloat16()
    model.compute_dtype = torch.float32
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = model(ids)
        with ready.decoded(model):
            model.layers[0].mlp.down_proj.weight.zero_()  # is not looked at
            torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)
