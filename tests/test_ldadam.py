"""methods/ldadam.py by hand, and against its equations written out again."""

import pytest
import torch
from test_galore import give, random

from galore import orthonormal_basis
from methods.ldadam import LDAdamW


def test_two_steps_of_rank_one_by_hand():
    W = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = LDAdamW([W], lr=0.1, rank=1, rho=0.0, betas=(0.5, 0.5))
    give(optimizer, W, torch.tensor([[2.0, -1.0, 1.0], [0.0, 0.0, 0.0]]))  # P = +-(1, 0): the step is sign(R) on it
    torch.testing.assert_close(W.detach(), torch.tensor([[-0.1, 0.1, -0.1], [0.0, 0.0, 0.0]]))
    assert optimizer.state[W]['E'].abs().max() == 0
    # The second gradient has two equal directions, and the power iteration stays in that of P: G G.T P = P.
    give(optimizer, W, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    M, V = torch.tensor([1.0, -0.25, 0.25]), torch.tensor([1.5, 0.25, 0.25])  # of (1, 0, 0) and (2, -1, 1) before
    step = (M / 0.75) / (V / 0.75).sqrt()
    torch.testing.assert_close(W.detach()[0], torch.tensor([-0.1, 0.1, -0.1]) - 0.1 * step)
    torch.testing.assert_close(optimizer.state[W]['E'], torch.tensor([[0.0, 0, 0], [0, 1, 0]]))
    # A gradient at right angles to P: nothing of it is taken, and all of it waits beside what waited before.
    give(optimizer, W, torch.tensor([[0.0, 0, 0], [0, 1, 0]]))
    torch.testing.assert_close(optimizer.state[W]['E'], torch.tensor([[0.0, 0, 0], [0, 2, 0]]))


def written_out(W, gradients, r, rho, b1, b2, lr, decay, feedback):
    """The equations at the top of ldadam.py in float64, G (m, n), m <= n, numbers of t by themselves."""
    W, E, P, M, V = W.double().clone(), torch.zeros_like(W).double(), None, 0.0, 0.0
    for t, G in enumerate(gradients, 1):
        A = G.double() + E
        if t == 1:
            P = orthonormal_basis(A.float(), r).double()
            m_before = torch.zeros(r, W.shape[1]).double()
            old, Q, M, V = P, torch.eye(r).double(), m_before, m_before
        else:
            old = P
            B = rho * old @ M / (1 - b1 ** (t - 1)) + (1 - rho) * A
            P, upper = torch.linalg.qr(B @ B.T @ old)
            P = P * upper.diagonal().sign()
            Q = P.T @ old
            m_before, square = M, V / (1 - b2 ** (t - 1))
            mean = M / (1 - b1 ** (t - 1))
            M = Q @ M
            V = (1 - b2 ** (t - 1)) * (Q**2 @ (square - mean**2) + (Q @ mean) ** 2).abs()
        R = P.T @ A
        E = A - P @ R + b1 / (1 - b1) * (old @ m_before - P @ M) if feedback else 0.0
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R**2
        N = (M / (1 - b1**t)) / ((V / (1 - b2**t)).sqrt() + 1e-8)
        W = W - lr * (P @ N + decay * W)
    return W, E, P, M


@pytest.mark.parametrize('feedback', [True, False])
@pytest.mark.parametrize('shape', [(12, 30), (30, 12)])
def test_it_is_its_equations_written_out(shape, feedback):
    start, gradients = random(12, 30), [random(12, 30, seed=i) for i in range(6)]
    W = torch.nn.Parameter(start.clone() if shape[0] < shape[1] else start.T.clone())
    optimizer = LDAdamW([W], lr=1e-2, rank=4, rho=0.9, betas=(0.9, 0.99), weight_decay=0.1, feedback=feedback)
    for G in gradients:
        give(optimizer, W, G if shape[0] < shape[1] else G.T)
    w, E, P, _ = written_out(start, gradients, 4, 0.9, 0.9, 0.99, 1e-2, 0.1, feedback)
    found = W.detach() if shape[0] < shape[1] else W.detach().T
    torch.testing.assert_close(found.double(), w, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(optimizer.state[W]['P'].double(), P, atol=1e-4, rtol=1e-3)
    assert ('E' in optimizer.state[W]) == feedback
    if feedback:
        torch.testing.assert_close(optimizer.state[W]['E'].double(), E, atol=1e-4, rtol=1e-3)


def test_at_full_rank_nothing_is_left_out_and_the_momentum_is_that_of_the_gradient():
    W, mean = torch.nn.Parameter(random(12, 30)), torch.zeros(12, 30)
    optimizer = LDAdamW([W], lr=1e-2, rank=12)
    for step in range(8):
        G = random(12, 30, seed=step)
        mean = 0.9 * mean + 0.1 * G
        give(optimizer, W, G)
        state = optimizer.state[W]
        assert state['E'].abs().max() < 1e-5
        torch.testing.assert_close(state['P'] @ state['M'], mean, atol=1e-5, rtol=1e-4)


def test_what_is_left_out_is_never_lost():
    """Sum of all gradients = sum of all momenta + b1 / (1 - b1) of the last one + what waits."""
    W, b1 = torch.nn.Parameter(random(12, 30)), 0.9
    optimizer, total, taken = LDAdamW([W], lr=1e-2, rank=2, betas=(b1, 0.99)), torch.zeros(12, 30), torch.zeros(12, 30)
    for step in range(10):
        G = random(12, 30, seed=step)
        give(optimizer, W, G)
        total += G
        momentum = optimizer.state[W]['P'] @ optimizer.state[W]['M']
        taken += momentum
        torch.testing.assert_close(
            taken + b1 / (1 - b1) * momentum + optimizer.state[W]['E'], total, atol=1e-4, rtol=1e-4
        )


def test_a_rho_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r'rho=1\.0 is not a share'):
        LDAdamW([torch.nn.Parameter(torch.zeros(2, 2))], rho=1.0)


def test_a_first_step_without_a_finite_gradient_leaves_a_basis_that_the_next_can_turn():
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 8, bias=False)
    optimizer = LDAdamW([linear.weight], lr=1e-2, rank=4, per_layer=True)
    before = linear.weight.detach().clone()
    (linear(torch.ones(5, 12)).sum() * float('nan')).backward()
    optimizer.step()
    assert torch.equal(linear.weight, before)
    x = torch.randn(5, 2) @ torch.randn(2, 12)  # the gradient's rank is 2, so a power iteration's P (8, 4) holds it all
    loss = linear(x).square().sum()
    G = torch.autograd.grad(loss, linear.weight, retain_graph=True)[0]
    loss.backward()
    optimizer.step()
    assert optimizer.state[linear.weight]['E'].norm() < 1e-4 * G.norm()
