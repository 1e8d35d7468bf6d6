"""methods/adalomo.py by hand, against the paper's loop written out, torch's Adafactor, and torch's SGD."""

import math

import pytest
import torch
from test_galore import give, random

from methods.adalomo import AdaLomo


def test_a_step_by_hand():
    W = torch.nn.Parameter(torch.full((2, 3), 2.0))
    optimizer = AdaLomo([W], lr=0.1)
    give(optimizer, W, torch.tensor([[1.0, -2.0, 2.0], [0.0, 0.0, 0.0]]))
    # rows 9/3, 0, their mean 1.5; columns 1/2, 4/2, 4/2; V = 3 c / 1.5 = 1, 4, 4; U = 1, -1, 1 and 0; RMS(U) < 1
    torch.testing.assert_close(W.detach(), torch.tensor([[1.8, 2.2, 1.8], [2.0, 2.0, 2.0]]))
    torch.testing.assert_close(optimizer.state[W]['V_rows'], torch.tensor([3.0, 0.0]))
    torch.testing.assert_close(optimizer.state[W]['V_columns'], torch.tensor([0.5, 2.0, 2.0]))
    small = torch.nn.Parameter(torch.zeros(3))
    give(AdaLomo([small], lr=0.1), small, torch.tensor([1.0, -5.0, 0.1]))
    torch.testing.assert_close(small.detach(), torch.tensor([-1e-4, 1e-4, -1e-4]))  # 0.1 * 0.001 at least


def plain_loop(w, gradients, lr, decay):
    """The paper's algorithm number by number, in float64."""
    m, n = w.shape
    w, r, c = w.double().clone(), [0.0] * m, [0.0] * n
    for t, G in enumerate(gradients, 1):
        G, b = G.double(), 1 - t**-0.8
        r = [b * r[i] + (1 - b) * sum(G[i, j].item() ** 2 for j in range(n)) / n for i in range(m)]
        c = [b * c[j] + (1 - b) * sum(G[i, j].item() ** 2 for i in range(m)) / m for j in range(n)]
        U = torch.tensor(
            [[G[i, j].item() / math.sqrt(r[i] * c[j] / (sum(r) / m)) for j in range(n)] for i in range(m)],
            dtype=torch.float64,
        )
        rms_U, rms_w = (math.sqrt(A.square().sum().item() / (m * n)) for A in (U, w))
        w = w - lr * (U / max(1, rms_U) * max(1e-3, rms_w) + decay * w)
    return w


@pytest.mark.parametrize('shape', [(5, 7), (7, 5)])
def test_it_is_the_papers_loop_and_adafactor_without_a_relative_step(shape):
    start = random(*shape)
    gradients = [(0.1 + i) * random(*shape, seed=i) for i in range(9)]
    W, V = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours = AdaLomo([W], lr=0.05, weight_decay=0.1)
    theirs = torch.optim.Adafactor([V], lr=0.05, weight_decay=0.1)  # whose rate falls only below 1 / sqrt(t)
    for G in gradients:
        give(ours, W, G)
        V.grad = G
        theirs.step()
    torch.testing.assert_close(W.detach().double(), plain_loop(start, gradients, 0.05, 0.1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(W, V, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('shape', [(6,), (3, 4, 2), ()])
def test_what_is_no_matrix_has_a_whole_second_moment(shape):
    W, V = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    ours, theirs = AdaLomo([W], lr=0.05), torch.optim.Adafactor([V], lr=0.05, weight_decay=0.0)
    for step in range(5):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        give(ours, W, G)
        V.grad = G
        if len(shape) < 2:  # torch factors the last two sides of anything
            theirs.step()
    assert ours.state[W]['V'].shape == shape
    assert len(shape) == 3 or torch.allclose(W, V, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_lomo_is_torchs_sgd_and_keeps_nothing(dtype):
    W, V = (torch.nn.Parameter(random(5, 7).to(dtype)) for _ in range(2))
    ours = AdaLomo([W], lr=0.1, adaptive=False, weight_decay=0.01)
    theirs = torch.optim.SGD([V], lr=0.1, weight_decay=0.01)
    for step in range(6):
        G = random(5, 7, seed=step).to(dtype)
        give(ours, W, G)
        V.grad = G.clone()
        theirs.step()
    torch.testing.assert_close(W, V, atol=1e-6 if dtype == torch.float32 else 0.03, rtol=1e-5)
    assert not any(torch.is_tensor(value) for value in ours.state[W].values())
