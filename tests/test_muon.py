"""methods/muon.py against torch.optim.Muon and the singular value decomposition."""

import pytest
import torch
from test_galore import give, random

from adam import read_state
from methods.muon import MuonAdamW, orthogonalise


@pytest.fixture
def fp32(monkeypatch):
    """torch's Muon multiplies in bf16 wherever it runs; here it does so in fp32, as ours does on a CPU."""
    monkeypatch.setattr(torch.Tensor, 'bfloat16', torch.Tensor.clone)


def walk(kind, W, steps, **options):
    W = torch.nn.Parameter(W.clone())
    optimizer = kind([W], lr=1e-2, momentum=0.95, weight_decay=0.1, **options)
    for step in range(steps):
        optimizer.zero_grad()
        give(optimizer, W, random(*W.shape, seed=step))
    return W.detach()


@pytest.mark.parametrize('shape', [(12, 30), (30, 12), (16, 16)])
def test_muon_equals_torchs(shape, fp32):
    theirs = walk(torch.optim.Muon, random(*shape), 8, nesterov=False, adjust_lr_fn='match_rms_adamw')
    torch.testing.assert_close(walk(MuonAdamW, random(*shape), 8), theirs, atol=1e-6, rtol=1e-5)


def test_in_bf16_too_it_is_torchs():
    theirs = walk(torch.optim.Muon, random(12, 30), 8, nesterov=False, adjust_lr_fn='match_rms_adamw')
    ours, start = walk(MuonAdamW, random(12, 30), 8), random(12, 30)
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm(), 'torch rounds each product to three digits'


@pytest.mark.parametrize('shape', [(24, 60), (60, 24), (24, 24)])
def test_newton_schulz_is_near_U_V_and_takes_few_singular_values_far_from_one(shape):
    M = random(*shape)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    found = orthogonalise(M)
    ours = torch.linalg.svdvals(found)
    well = ours[0.02 * S.norm() < S]  # the least ones take more times
    assert well.min() > 0.65 and ours.max() < 1.25
    # the same singular vectors, so U.T O V is diagonal, and the diagonal is a function of S alone
    inside = U.T @ found @ Vh.T
    assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-4
    torch.testing.assert_close(orthogonalise(1e4 * M), found, atol=1e-4, rtol=0)
    assert not orthogonalise(torch.zeros(shape)).any()


def test_two_by_three_by_hand():
    """M = diag(3, 4) beside a column of zeros: |M| = 5, X = diag(.6, .8), and each of five times x becomes
    3.4445 x - 4.775 x^3 + 2.0315 x^5."""
    W = torch.nn.Parameter(torch.zeros(2, 3))
    give(MuonAdamW([W], lr=1.0), W, torch.tensor([[3.0, 0, 0], [0, 4.0, 0]]))
    x, y = 0.6, 0.8
    for _ in range(5):
        x, y = (3.4445 * z - 4.775 * z**3 + 2.0315 * z**5 for z in (x, y))
    wanted = -0.2 * 3**0.5 * torch.tensor([[x, 0, 0], [0, y, 0]])
    torch.testing.assert_close(W.detach(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('row_norm', [False, True])
@pytest.mark.parametrize('shape', [(40, 100), (100, 40), (64, 64)])
def test_a_steps_root_mean_square_is_adamws_whatever_the_shape(shape, row_norm):
    W = torch.nn.Parameter(torch.zeros(shape))
    give(MuonAdamW([W], lr=1.0, row_norm=row_norm), W, random(*shape))
    W = W.detach()
    assert W.square().mean().sqrt() == pytest.approx(0.2, rel=1e-5 if row_norm else 0.2)
    lengths = W.norm(dim=1)
    assert (lengths.max() / lengths.min() < 1 + 1e-5) == row_norm


def test_what_use_muon_says_is_not_to_be_orthogonalised_walks_as_by_adamw():
    found = []
    for kind in (MuonAdamW, torch.optim.AdamW):
        W, b = (torch.nn.Parameter(random(*shape)) for shape in ((12, 30), (30,)))
        more = {'use_muon': False} if kind is MuonAdamW else {}
        optimizer = kind([{'params': [W, b], **more}], lr=1e-2, weight_decay=0.1)
        for step in range(4):
            optimizer.zero_grad()
            give(optimizer, W, random(12, 30, seed=step) * b)
        found += [W.detach(), b.detach()]
    torch.testing.assert_close(found[:2], found[2:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('bits', [32, 8])
def test_per_layer_the_momentum_takes_in_micro_batches_and_no_gradient_stays(bits, small_8bit):
    W = torch.nn.Parameter(random(16, 32))
    optimizer = MuonAdamW([W], lr=1e-2, momentum=0.9, per_layer=True, state_bits=bits)
    G = [random(16, 32, seed=i) for i in range(6)]
    M = torch.zeros(16, 32)
    for step in range(2):
        M = 0.9 * M + sum(G[3 * step : 3 * step + 3])
        for micro in range(3):
            before = W.detach().clone()
            optimizer.last_micro_batch = micro == 2
            (W * G[3 * step + micro]).sum().backward()
            assert W.grad is None and torch.equal(before, W) == (micro < 2)
        found = read_state(optimizer.state[W], 'M')
        assert (found - M).norm() < (1e-6 if bits == 32 else 0.03) * M.norm()
        optimizer.step()
        squares = sum(g.square().sum() for g in G[3 * step : 3 * step + 3])
        assert optimizer.metrics['grad_norm'] == pytest.approx(squares.sqrt().item(), rel=1e-5)
    assert optimizer.state[W]['M'].nbytes == 16 * 32 * bits // 8


@pytest.mark.parametrize('bad', [0, 1, 2])
def test_a_micro_batch_that_is_not_finite_costs_its_step_and_no_more(bad):
    W = torch.nn.Parameter(random(16, 32))
    optimizer = MuonAdamW([W], lr=1e-2, momentum=0.9, weight_decay=0.1, per_layer=True)
    give(optimizer, W, random(16, 32))
    before, M = W.detach().clone(), 0.9 * optimizer.state[W]['M']
    for micro in range(3):
        optimizer.last_micro_batch = micro == 2
        G = random(16, 32, seed=micro)
        M += 0 if micro in (bad, 2) else G  # the last one comes when it is known that W will not move
        (W * G * (float('nan') if micro == bad else 1.0)).sum().backward()
    optimizer.step()
    assert torch.equal(W, before) and not optimizer.metrics['grad_norm'].isfinite()
    torch.testing.assert_close(optimizer.state[W]['M'], M)
    give(optimizer, W, random(16, 32, seed=9))
    assert W.isfinite().all() and not torch.equal(W, before)
