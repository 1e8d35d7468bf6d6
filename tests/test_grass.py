"""methods/grass.py by hand, against torch's Adam on the chosen rows, and against AdamW where all rows are chosen."""

import pytest
import torch
from test_galore import Made, give, random

from methods.grass import GrassAdamW, Rows


def test_two_of_three_rows_by_hand():
    W = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = GrassAdamW([W], lr=0.1, rank=1, update_proj_gap=2, scale=0.5, betas=(0.5, 0.5), stagger=False)
    give(optimizer, W, torch.tensor([[1.0, -2.0, 0.0], [2.0, 2.0, 2.0]]))  # lengths 2.2 and 3.5: the second row
    # M = G/2, V = G^2/2, both by 1 - 1/2: a step of 0.1 * 0.5 * sign(G)
    torch.testing.assert_close(W.detach(), torch.tensor([[0.0, 0, 0], [-0.05, -0.05, -0.05]]))
    give(optimizer, W, torch.tensor([[9.0, 9.0, 9.0], [-1.0, 0.0, 2.0]]))  # the second row still
    # M: [.0, .5, 1.5], V: [1.5, 1, 3], by 3/4
    step = torch.tensor([0.0, 0.5 / 0.75, 1.5 / 0.75]) / (torch.tensor([1.5, 1.0, 3.0]) / 0.75).sqrt()
    torch.testing.assert_close(W.detach()[1], -0.05 - 0.05 * step)
    assert torch.equal(W.detach()[0], torch.zeros(3))
    before = W.detach().clone()
    give(optimizer, W, torch.tensor([[3.0, 0.0, -3.0], [1.0, 1.0, 1.0]]))  # the first row, its moments new
    torch.testing.assert_close(W.detach() - before, torch.tensor([[-0.05, 0, 0.05], [0, 0, 0]]))
    assert optimizer.state[W]['P'].tolist() == [0] and optimizer.state[W]['M'].shape == (1, 3)


@pytest.mark.parametrize('shape', [(12, 30), (30, 12)])
def test_between_two_choices_it_is_torchs_adam_on_the_longest_rows_of_the_shorter_side(shape):
    W = torch.nn.Parameter(random(*shape))
    w = W.detach().clone() if shape[0] < shape[1] else W.detach().T.clone()
    optimizer = GrassAdamW([W], lr=1e-2, rank=4, update_proj_gap=3, stagger=False, weight_decay=0.1)
    for step in range(8):
        G = random(12, 30, seed=step)
        if step % 3 == 0:
            rows = G.norm(dim=1).topk(4).indices
            part = torch.nn.Parameter(w[rows].clone())
            adam = torch.optim.AdamW([part], lr=1e-2, weight_decay=0.1)
        part.grad = G[rows]
        adam.step()
        w[rows] = part.detach()
        give(optimizer, W, G if shape[0] < shape[1] else G.T)
        torch.testing.assert_close(W.detach() if shape[0] < shape[1] else W.detach().T, w, atol=1e-6, rtol=1e-5)


def test_with_all_rows_it_is_adamw():
    W, V = torch.nn.Parameter(random(12, 30)), torch.nn.Parameter(random(12, 30))
    optimizer = GrassAdamW([W], lr=1e-2, rank=12, update_proj_gap=2, weight_decay=0.1)
    adam = torch.optim.AdamW([V], lr=1e-2, weight_decay=0.1)
    for step in range(7):
        give(optimizer, W, random(12, 30, seed=step))
        V.grad = random(12, 30, seed=step)
        adam.step()
        torch.testing.assert_close(W, V, atol=1e-6, rtol=1e-5)


def test_rows_are_drawn_in_proportion_to_their_length_where_few_are_drawn():
    G, counts = torch.ones(4, 9) * torch.tensor([[0.0], [1.0], [2.0], [5.0]]), torch.zeros(4)
    W = torch.nn.Parameter(torch.zeros(4, 9))
    optimizer = GrassAdamW([W], lr=0.0, rank=1, update_proj_gap=1, choose='norm', stagger=False)
    for _ in range(800):
        give(optimizer, W, G)
        counts[optimizer.state[W]['P']] += 1
    assert counts[0] == 0 and (counts / 800 - torch.tensor([0.0, 0.125, 0.25, 0.625])).abs().max() < 0.05


@pytest.mark.parametrize('shape', [(64, 96), (96, 64)])
def test_in_an_attached_layer_the_whole_gradient_never_exists_between_two_choices(shape):
    found, largest = [], []
    for attach in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(shape[1], shape[0], bias=False)
        optimizer = GrassAdamW([layer.weight], lr=1e-2, rank=2, update_proj_gap=100, per_layer=True)
        if attach:
            optimizer.attach([layer])
        for step in range(3):
            x = random(8, shape[1], seed=step)
            with Made([layer.weight, x]) as made:
                layer(x).square().sum().backward()
            optimizer.step()
        largest.append(max(made.sizes))
        found.append(layer.weight.detach().clone())
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)
    assert largest[1] < 64 * 96 / 4 < largest[0] == 64 * 96


def test_rows_multiply_as_the_matrix_that_they_stand_for():
    rows, G, delta = torch.tensor([1, 4, 5]), random(6, 7), random(9, 6)
    P = torch.eye(6)[:, rows]
    assert torch.equal(delta @ Rows(rows), delta @ P) and torch.equal(Rows(rows).T @ G, P.T @ G)


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="choose='last' is not known: use 'top' or 'norm'"):
        GrassAdamW([torch.nn.Parameter(torch.zeros(2, 2))], choose='last')
