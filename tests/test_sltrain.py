"""methods/sltrain.py by hand, against autograd on the whole matrix, and AdamW where S has all places."""

import copy

import pytest
import torch
from test_contract import config_of
from test_galore import TINY, random

from adam import AdamW
from galore import GaLoreAdamW
from methods import sltrain
from methods.sltrain import SLLinear, SLTrainAdamW
from model import LLaMA, ModelConfig


def test_a_layer_by_hand():
    layer = SLLinear(3, 2, rank=1, scale=0.5, density=1 / 3)
    with torch.no_grad():
        layer.places.copy_(torch.tensor([1, 3]))
        for p, numbers in ((layer.A, [[1.0, 2.0, 0.0]]), (layer.B, [[2.0], [4.0]]), (layer.S, [10.0, 20.0])):
            p.copy_(torch.tensor(numbers))
    assert layer.dense_weight().tolist() == [[1.0, 12.0, 0.0], [22.0, 4.0, 0.0]]
    x = torch.tensor([[1.0, 1.0, 1.0]])
    y = layer(x)
    assert y.tolist() == [[13.0, 26.0]]
    (y * torch.tensor([1.0, -1.0])).sum().backward()  # dW = [[1, 1, 1], [-1, -1, -1]]
    assert layer.S.grad.tolist() == [1.0, -1.0]
    assert layer.B.grad.tolist() == [[1.5], [-1.5]] and layer.A.grad.tolist() == [[-1.0, -1.0, -1.0]]


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('shape', [(12, 30), (30, 12)])
def test_values_and_gradients_are_those_of_autograd_on_the_whole_matrix(shape, bias):
    layer = SLLinear(shape[1], shape[0], rank=4, scale=0.7, density=0.2, bias=bias)
    torch.nn.init.normal_(layer.B)
    x, delta = random(2, 5 * shape[1]).view(2, 5, -1).requires_grad_(), random(2, 5 * shape[0]).view(2, 5, -1)
    wanted = [x, *layer.parameters()]
    W = (layer.scale * layer.B @ layer.A).flatten().index_add(0, layer.places, layer.S).view(shape)
    plain = torch.nn.functional.linear(x, W, layer.bias)
    torch.testing.assert_close(layer(x), plain, atol=1e-5, rtol=1e-5)
    theirs, ours = (torch.autograd.grad((y * delta).sum(), wanted) for y in (plain, layer(x)))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize('density', [0.001, 0.03, 0.37, 0.9, 1.0])
def test_as_many_places_as_the_density_says_none_twice_all_over_the_matrix_and_others_each_time(density):
    layers = [SLLinear(96, 64, density=density) for _ in range(2)]
    for layer in layers:
        places = layer.places.tolist()
        assert len(set(places)) == len(places) == len(layer.S) == max(round(density * 96 * 64), 1)
        assert min(places) >= 0 and max(places) < 96 * 64
        assert abs(sum(places) / len(places) / (96 * 64) - 0.5) < 0.5 / len(places) ** 0.5
    assert density == 1.0 or not torch.equal(layers[0].places, layers[1].places)


def test_with_all_places_and_still_factors_it_is_adamw_on_a_plain_layer():
    plain = torch.nn.Linear(12, 30)
    layer = SLLinear(12, 30, density=1.0, bias=True)
    layer.set_weight(plain.weight.detach())
    layer.bias.data.copy_(plain.bias.detach())
    assert torch.equal(layer.dense_weight(), plain.weight)
    layer.A.requires_grad_(False), layer.B.requires_grad_(False)
    optimizers = SLTrainAdamW(layer.parameters(), [layer], lr=1e-2), AdamW(plain.parameters(), lr=1e-2)
    for step in range(6):
        for one, optimizer in zip((layer, plain), optimizers):
            (one(random(8, 12, seed=step)) - 1).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer.dense_weight(), plain.weight.detach(), atol=1e-6, rtol=1e-5)


def test_a_model_has_the_trained_numbers_that_the_head_of_the_file_counts_and_what_is_sparse_decays():
    config = config_of('sltrain', rank=8, density=0.1, weight_decay=0.1)
    model = LLaMA(ModelConfig(**TINY), linear=sltrain.linear(config)).materialise(seed=0)
    optimizer = sltrain.setup(model, config)
    for layer in optimizer.layers:
        m, n = layer.out_features, layer.in_features
        assert sum(p.numel() for p in layer.parameters()) == 8 * (m + n) + round(0.1 * m * n)
        assert optimizer.group_of[layer.S]['weight_decay'] == 0.1
    assert optimizer.group_of[model.norm.weight]['weight_decay'] == 0.0
    other = LLaMA(ModelConfig(**TINY), linear=sltrain.linear(config)).materialise(seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_galore_on_top_is_refused_with_the_reason_and_copies_are_made():
    layer = SLLinear(12, 30, rank=4)
    with pytest.raises(AttributeError, match='GaLore on top of them collapses, use AdamW'):
        GaLoreAdamW(layer.parameters(), rank=4).attach([layer])
    assert torch.equal(copy.deepcopy(layer).dense_weight(), layer.dense_weight())
    with pytest.raises(ValueError, match='density=2 cannot be: use at least 1'):
        SLLinear(12, 30, density=2)
    with pytest.raises(ValueError, match="method='sltrain' trains SLLinears: build with"):
        sltrain.setup(LLaMA(ModelConfig(**TINY)).materialise(), config_of('sltrain'))
