"""methods/sumo.py against its equations written out, and, at full rank, against Muon."""

import pytest
import torch
from test_galore import give, random

from adam import read_state
from galore import orthonormal_basis
from methods.muon import MuonAdamW
from methods.sumo import SumoAdamW, polar


@pytest.mark.parametrize('shape', [(4, 30), (12, 12), (1, 7)])
def test_polar_is_U_V_of_the_singular_value_decomposition(shape):
    M = random(*shape)
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    torch.testing.assert_close(polar(M), U @ Vh, atol=1e-4, rtol=0)


def test_polar_leaves_out_directions_in_which_there_is_nothing():
    M = random(2, 30)
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    doubled = torch.cat([M, M]) / 2**0.5  # (4, 30) of rank 2
    torch.testing.assert_close(polar(doubled), torch.cat([U @ Vh, U @ Vh]) / 2**0.5, atol=1e-4, rtol=0)
    assert not polar(torch.zeros(4, 30)).any()


def test_two_by_three_by_hand():
    """G = (0 3 0; 0 0 0) and rank 1: P = (1; 0), M = R = (0 3 0), O = (0 1 0), and the second step has the same O."""
    W = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = SumoAdamW([W], lr=1.0, rank=1, momentum=0.5, refresh='svd')
    for step in (1, 2):
        give(optimizer, W, torch.tensor([[0.0, 3, 0], [0, 0, 0]]))
        torch.testing.assert_close(W.detach(), -step * 0.2 * 3**0.5 * torch.tensor([[0.0, 1, 0], [0, 0, 0]]))
        assert optimizer.state[W]['M'].abs().max() == pytest.approx(3.0 if step == 1 else 4.5)


@pytest.mark.parametrize('attached', [False, True])
@pytest.mark.parametrize('shape', [(12, 30), (30, 12)])
def test_it_equals_its_equations_written_out(shape, attached):
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    W, tall = linear.weight, shape[0] > shape[1]
    w = (W.T if tall else W).detach().clone()  # (12, 30)
    optimizer = SumoAdamW([W], lr=1e-2, weight_decay=0.1, rank=4, update_proj_gap=3, refresh='svd', stagger=False)
    if attached:
        optimizer.attach([linear])
    M, P = torch.zeros(4, 30), torch.zeros(12, 4)
    for t in range(8):
        G = random(12, 30, seed=t)
        if t % 3 == 0:
            old, P = P, torch.linalg.svd(G)[0][:, :4]
            M = P.T @ old @ M
        M = 0.9 * M + P.T @ G
        U, _, Vh = torch.linalg.svd(M, full_matrices=False)
        w = w - 1e-2 * (0.2 * 30**0.5 * P @ U @ Vh + 0.1 * w)
        G = G.T if tall else G  # (out, in)
        linear(torch.eye(shape[1])).mul(G.T).sum().backward()
        optimizer.step()
        torch.testing.assert_close((W.T if tall else W).detach(), w, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('refresh', ['svd', 'sara', 'subspace'])
def test_at_full_rank_it_is_muon_whatever_the_basis_and_however_often_it_turns(refresh):
    found = []
    options = dict(rank=12, update_proj_gap=3, orthogonal='newton', refresh=refresh, momentum=0.95)
    for kind, more in ((SumoAdamW, options), (MuonAdamW, {})):
        W = torch.nn.Parameter(random(12, 30))
        optimizer = kind([W], lr=1e-2, weight_decay=0.1, **more)
        for step in range(8):
            give(optimizer, W, random(12, 30, seed=step))
        found.append(W.detach())
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('orthogonal', ['exact', 'newton'])
def test_a_step_moves_all_directions_of_the_subspace_alike_as_far_as_muons(orthogonal):
    W = torch.nn.Parameter(torch.zeros(30, 100))
    optimizer = SumoAdamW([W], lr=1.0, rank=8, orthogonal=orthogonal)
    give(optimizer, W, random(30, 100))
    S = torch.linalg.svdvals(W.detach()) / (0.2 * 100**0.5)
    assert S[8:].max() < 1e-5
    assert (S[:8] - 1).abs().max() < (1e-4 if orthogonal == 'exact' else 0.35)


@pytest.mark.parametrize('bits', [32, 8])
def test_its_state_is_a_basis_and_one_momentum(bits, small_8bit):
    W = torch.nn.Parameter(random(16, 64))
    optimizer = SumoAdamW([W], rank=4, state_bits=bits)
    give(optimizer, W, random(16, 64))
    kept = {name: t.nbytes for name, t in optimizer.state[W].items() if torch.is_tensor(t)}
    assert kept == {'P': 4 * 16 * 4, 'M': 4 * 64 * bits // 8} | ({'M_absmax': 4} if bits == 8 else {})
    R = optimizer.state[W]['P'].T @ random(16, 64)
    assert (read_state(optimizer.state[W], 'M') - R).norm() < (1e-5 if bits == 32 else 0.02) * R.norm()


def test_an_unknown_way_to_orthogonalise_is_refused():
    with pytest.raises(ValueError, match="orthogonal='svd' is not known: use 'exact' or 'newton'"):
        SumoAdamW([torch.nn.Parameter(torch.zeros(4, 4))], orthogonal='svd')


# ---- the control: refresh='random' -----------------------------------------------------------------------------------


def test_a_random_basis_is_orthonormal_blind_to_the_gradient_and_drawn_anew():
    G = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    P = [orthonormal_basis(A, 4, 'random', seed=seed) for A, seed in ((G, 1), (G.flip(0) * 3, 1), (G, 2))]
    torch.testing.assert_close(P[0].T @ P[0], torch.eye(4))
    assert torch.equal(P[0], P[1]) and not torch.equal(P[0], P[2])
    assert orthonormal_basis(G, 99, 'random').shape == (12, 12)


# ---- SARA: refresh='sara' ------------------------------------------------------------------------------------------


def test_sara_draws_singular_vectors_without_replacement_by_their_singular_values():
    U = torch.linalg.qr(random(6, 6))[0]
    S = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 0.0])
    G = U @ torch.diag(S) @ torch.linalg.qr(random(9, 9, seed=1))[0][:6]
    counts, pairs = torch.zeros(6), torch.zeros(6)
    for seed in range(2000):
        P = orthonormal_basis(G, 1, 'sara', seed=seed)
        counts += (U.T @ P).abs().round().sum(1)
        pair = (U.T @ orthonormal_basis(G, 2, 'sara', seed=seed)).abs()
        drawn = [0, 1, 2] if pair[3:5].norm() < 0.5 else []  # the two equal values share a plane
        pairs[drawn] += pair[drawn].round().sum(1) if drawn else 0
        assert (P.T @ P - 1).abs().max() < 1e-5
    torch.testing.assert_close(counts[:3] / 2000, S[:3] / 16, atol=0.03, rtol=0)
    assert counts[5] == 0, 'where there is no gradient there is nothing to draw'
    # both of the first two: 8/16 4/8 + 4/16 8/12
    assert pairs[0] > pairs[1] > pairs[2] > 0


def test_sara_draws_the_same_of_one_seed_in_falling_order_and_others_of_another():
    G = random(12, 30)
    U = torch.linalg.svd(G)[0]
    P = [orthonormal_basis(G, 4, 'sara', seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(P[0], P[1]) and not torch.equal(P[0], P[2])
    for basis in P:
        which = (U.T @ basis).abs().argmax(0)
        assert which.tolist() == sorted(set(which.tolist())) and len(which) == 4
        torch.testing.assert_close((U[:, which] * basis).sum(0).abs(), torch.ones(4))
    torch.testing.assert_close(orthonormal_basis(G, 12, 'sara').abs(), U.abs(), msg='all of them are the SVD')
    P = orthonormal_basis(torch.zeros(8, 20), 4, 'sara')
    assert (P.T @ P - torch.eye(4)).abs().max() < 1e-5
