"""methods/fira.py against its equations written out again."""

import pytest
import torch
from test_galore import adam_by_hand, give, random

from adam import limit_growth
from methods.apollo import ApolloAdamW
from methods.fira import FiraAdamW


def test_limited_lets_a_norm_grow_by_one_per_cent_at_most():
    state = {}
    for update, wanted, norm in (
        ([3.0, 4.0], [3.0, 4.0], 5.0),
        ([6.0, 8.0], [3.03, 4.04], 5.05),  # 1.01 times 5
        ([0.6, 0.8], [0.6, 0.8], 1.0),  # smaller is free
        ([0.606, 0.807], [0.606, 0.807], 1.00922),  # within 1 %
        ([0.0, 3.0], [0.0, 1.0193], 1.0193),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([3.0, 4.0], [3.0, 4.0], 5.0),  # after nothing, anything
    ):
        torch.testing.assert_close(limit_growth(torch.tensor(update), state), torch.tensor(wanted), rtol=1e-4, atol=0)
        torch.testing.assert_close(state['norm'], torch.tensor(norm), rtol=1e-4, atol=0)


LOUDNESS = [1.0, 1.0, 1.0, 5.0, 1.0, 0.1, 1.0, 30.0]  # of the gradients: some steps are limited, some are not


@pytest.mark.parametrize('shape', [(12, 30), (30, 12)])
def test_fira_equals_its_equations_written_out(shape):
    W = torch.nn.Parameter(random(*shape))
    w = W.detach().clone().T if shape[0] > shape[1] else W.detach().clone()  # (12, 30)
    optimizer = FiraAdamW([W], lr=1e-2, rank=4, update_proj_gap=3, refresh='svd', stagger=False)
    M = V = torch.zeros(4, 30)
    last, clipped = None, []
    for t, loud in enumerate(LOUDNESS):
        G = loud * random(12, 30, seed=t)
        if t % 3 == 0:
            P = torch.linalg.svd(G)[0][:, :4]
        R = P.T @ G
        N, M, V = adam_by_hand(R, M, V, t + 1)
        S = G - P @ R
        for j in range(30):
            S[:, j] *= N[:, j].norm() / R[:, j].norm()
        norm = S.norm().item()
        clipped.append(last is not None and norm > 1.01 * last)
        if clipped[-1]:
            S *= 1.01 * last / norm
            norm = 1.01 * last
        last = norm
        w -= 1e-2 * (0.25 * P @ N + S)  # the paper's equation: alpha is of the subspace alone
        give(optimizer, W, G.T if shape[0] > shape[1] else G)
        torch.testing.assert_close(W.detach().T if shape[0] > shape[1] else W.detach(), w, atol=1e-5, rtol=1e-5)
    assert 0 < sum(clipped) < len(LOUDNESS) - 1, 'both kinds of step should occur'


def test_scale_is_of_what_comes_back_from_the_subspace_and_leaves_the_residual_as_it_is():
    moved = []
    for scale in (0.25, 1.0):
        W = torch.nn.Parameter(torch.zeros(12, 30))
        optimizer = FiraAdamW([W], lr=1.0, rank=4, scale=scale)
        give(optimizer, W, random(12, 30))
        P = optimizer.state[W]['P']
        inside = P @ (P.T @ W.detach())
        moved.append((inside, W.detach() - inside))
    (inside, residual), (inside_1, residual_1) = moved
    torch.testing.assert_close(inside, 0.25 * inside_1, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(residual, residual_1, atol=1e-5, rtol=1e-5)


METHODS = {
    'fira': lambda W: FiraAdamW([W], lr=1e-2, rank=4),
    'apollo': lambda W: ApolloAdamW([W], lr=1e-2, rank=4),
    'apollo_mini': lambda W: ApolloAdamW([W], lr=1e-2, rank=1, scale=128**0.5, tensorwise=True),
}


@pytest.mark.parametrize('zero_at', [0, 2])
@pytest.mark.parametrize('method', METHODS)
def test_a_gradient_of_zero_gives_no_nan_and_does_not_freeze_what_follows(method, zero_at):
    moved = []
    for zero in (False, True):
        W = torch.nn.Parameter(torch.zeros(12, 30))
        optimizer = METHODS[method](W)
        for step in range(6):
            before = W.detach().clone()
            give(optimizer, W, random(12, 30, seed=step) * (0.0 if zero and step == zero_at else 1.0))
            assert W.isfinite().all()
        moved.append((W.detach() - before).norm())
    assert 0.5 < moved[1] / moved[0] < 2
