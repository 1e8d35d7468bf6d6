"""methods/adarankgrad.py: what it cuts, by hand and by singular values, and GaLore where it cuts nothing."""

import copy

import pytest
import torch
from test_contract import everything, model_and_optimizer
from test_galore import give, matrix, random, train

from galore import GaLoreAdamW
from methods.adarankgrad import AdaRankGradAdamW


def cut(G, energy, rank, steps=7, **options):
    W = torch.nn.Parameter(torch.zeros(G.shape))
    optimizer = AdaRankGradAdamW([W], lr=0.1, rank=rank, energy=energy, update_proj_gap=2, stagger=False, **options)
    for _ in range(steps):
        give(optimizer, W, G)
    return W, optimizer


@pytest.mark.parametrize('energy,r', [(0.85, 1), (0.95, 2), (0.89, 1), (0.91, 2)])
def test_by_hand_a_gradient_of_energies_9_and_1_needs_one_direction_or_two(energy, r):
    W, optimizer = cut(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), energy, rank=2)
    state = optimizer.state[W]
    assert state['P'].shape == (2, r) and state['M'].shape == state['V'].shape == (r, 3)
    assert optimizer.metrics['mean_rank'] == r
    torch.testing.assert_close(state['P'][:, 0].abs(), torch.tensor([1.0, 0.0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize('shape', [(20, 50), (50, 20)])
def test_as_many_directions_stay_as_singular_values_hold_that_energy(shape):
    G = matrix(20, 50, decay=0.3)
    squares = torch.linalg.svdvals(G).square()
    for energy in (0.5, 0.9, 0.99):
        wanted = int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1
        W, optimizer = cut(G if shape[0] < shape[1] else G.T, energy, rank=16, steps=9)
        assert abs(len(optimizer.placeholder[W]) - wanted) <= 1
        P = optimizer.state[W]['P']
        assert (P.T @ G).square().sum() > 0.99 * energy * squares.sum()


def test_a_rank_that_fell_rises_again_to_what_a_richer_gradient_needs():
    narrow, rich = matrix(20, 50, decay=2.0), matrix(20, 50, decay=0.3)
    squares = torch.linalg.svdvals(rich).square()
    wanted = int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1
    W, optimizer = cut(narrow, 0.9, rank=16)
    assert len(optimizer.placeholder[W]) == 1 and optimizer.metrics['mean_rank'] == 1
    for _ in range(6):
        give(optimizer, W, rich)
    state = optimizer.state[W]
    assert abs(len(optimizer.placeholder[W]) - wanted) <= 1 and wanted > 3
    assert state['M'].shape == state['V'].shape == (len(optimizer.placeholder[W]), 50)
    P = state['P']
    torch.testing.assert_close(P.T @ P, torch.eye(P.shape[1]), atol=1e-5, rtol=0)
    assert (P.T @ rich).square().sum() > 0.85 * squares.sum() and (state['V'] >= 0).all()


def test_where_the_subspace_holds_less_than_that_share_nothing_is_cut():
    W, optimizer = cut(torch.eye(20), 0.8, rank=10)
    assert optimizer.state[W]['P'].shape == (20, 10) and 'rank' not in optimizer.state[W]


def test_with_nothing_cut_it_is_galore_with_moments_that_turn():
    W, V = (torch.nn.Parameter(random(12, 30)) for _ in range(2))
    options = dict(lr=1e-2, rank=4, update_proj_gap=2, moments='rotate')
    ours, theirs = AdaRankGradAdamW([W], energy=1.0, **options), GaLoreAdamW([V], **options)
    for step in range(9):
        give(ours, W, random(12, 30, seed=step))
        give(theirs, V, random(12, 30, seed=step))
    assert torch.equal(W, V)


@pytest.mark.parametrize('bits,basis_bits', [(32, 16), (8, 4)])
@pytest.mark.parametrize('per_layer', [False, True])
def test_ranks_fall_in_attached_layers_and_a_copy_and_a_resumed_run_go_on_alike(
    per_layer, bits, basis_bits, small_8bit
):
    options = dict(energy=0.3, state_bits=bits, basis_bits=basis_bits, per_layer=per_layer)
    model, optimizer = model_and_optimizer('adarankgrad', **options)
    train(model, optimizer, 9, accumulation=2)
    ranks = [len(q) for q in optimizer.placeholder.values()]
    assert len(set(ranks)) > 1 and max(ranks) <= 8, ranks
    for p, q in optimizer.placeholder.items():
        if p in optimizer.attached:
            assert optimizer.state[p]['M'].shape[0] == len(q), 'M has as many rows'
    copied = copy.deepcopy((model, optimizer))
    again, resumed = model_and_optimizer('adarankgrad', **options)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    a = everything(train(model, optimizer, 8, accumulation=2, first=9), optimizer)
    for other in (copied, (again, resumed)):
        b = everything(train(*other, 8, accumulation=2, first=9), other[1])
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    _, fresh = model_and_optimizer('adarankgrad', **options)
    optimizer.load_state_dict(copy.deepcopy(fresh.state_dict()))  # a state of before the cuts gives the rows back
    assert {len(q) for p, q in optimizer.placeholder.items() if p in optimizer.attached} == {8}


def test_an_energy_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match='energy=0 is not a share'):
        AdaRankGradAdamW([torch.nn.Parameter(torch.zeros(2, 2))], energy=0)
