"""methods/scale.py by hand, against torch.optim.SGD and against its equations written out."""

import pytest
import torch
from test_galore import adam_by_hand, give, model_and_optimizer, random

from methods.scale import ScaleAdamW


def test_two_by_three_by_hand():
    """Rows of W (out, in) are divided by their root mean square: of (3, 0, 4) it is 5 / sqrt 3, of (1, 1, 1) it is 1.
    Along 0, columns are: (3, 1) has sqrt 5, (0, 1) has sqrt 1/2, (4, 1) has sqrt 17/2."""
    G = torch.tensor([[3.0, 0, 4], [1, 1, 1]])
    by_rows = torch.tensor([[3 * 3**0.5 / 5, 0, 4 * 3**0.5 / 5], [1, 1, 1]])
    by_columns = torch.tensor([[3 / 5**0.5, 0, 4 / 8.5**0.5], [1 / 5**0.5, 2**0.5, 1 / 8.5**0.5]])
    for along, N in ((1, by_rows), (0, by_columns)):
        W = torch.nn.Parameter(torch.ones(2, 3))
        give(ScaleAdamW([{'params': [W], 'along': along}], lr=0.1, weight_decay=0.5), W, G)
        torch.testing.assert_close(W.detach(), 0.95 * torch.ones(2, 3) - 0.1 * N)


@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_where_every_column_has_length_one_it_is_torchs_sgd(momentum):
    signs = random(12, 30).sign()  # the momentum of a steady gradient points along it
    found = []
    for kind in (ScaleAdamW, torch.optim.SGD):
        W = torch.nn.Parameter(random(12, 30))
        optimizer = kind([W], lr=0.1, momentum=momentum, **({'dampening': momentum} if kind is not ScaleAdamW else {}))
        for _ in range(5):
            optimizer.zero_grad()
            give(optimizer, W, signs)
        found.append(W.detach())
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_it_equals_its_equations_written_out():
    head, block, table, b = (torch.nn.Parameter(random(*shape)) for shape in ((20, 6), (6, 10), (20, 6), (6,)))
    w = [p.detach().clone() for p in (head, block, table, b)]
    groups = [{'params': [head], 'momentum': 0.9}, {'params': [block, b]}, {'params': [table], 'along': 0}]
    optimizer = ScaleAdamW(groups, lr=1e-2)
    M, M_b, V_b = torch.zeros(20, 6), torch.zeros(6), torch.zeros(6)
    for t in range(6):
        G = [random(*p.shape, seed=10 * t + i) for i, p in enumerate(w)]
        M = 0.9 * M + 0.1 * G[0]  # the published one is a mean
        N_b, M_b, V_b = adam_by_hand(G[3], M_b, V_b, t + 1)
        for i in range(20):
            w[0][i] -= 1e-2 * M[i] / M[i].square().mean().sqrt()
        for i in range(6):
            w[1][i] -= 1e-2 * G[1][i] / G[1][i].square().mean().sqrt()
            w[2][:, i] -= 1e-2 * G[2][:, i] / G[2][:, i].square().mean().sqrt()
        w[3] -= 1e-2 * N_b
        sum((p * g).sum() for p, g in zip((head, block, table, b), G)).backward()
        optimizer.step()
        for p, wanted in zip((head, block, table, b), w):
            torch.testing.assert_close(p.detach(), wanted, atol=1e-5, rtol=1e-5)


def test_setup_gives_momentum_to_the_head_adam_to_vectors_and_no_state_to_the_rest():
    model, optimizer = model_and_optimizer(method='scale', momentum=0.9)
    model(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        kept = {key for key, value in optimizer.state[p].items() if torch.is_tensor(value)}
        assert kept == ({'M'} if p is model.head else {'M', 'V'} if p.dim() == 1 else set()), name
    assert [p is model.embed_tokens.weight for p in optimizer.index_of] == [
        optimizer.group_of[p]['along'] == 0 for p in optimizer.index_of
    ]
    assert all(optimizer.group_of[p]['weight_decay'] == 0 for p in model.parameters() if p.dim() == 1)


def test_rows_and_columns_without_a_gradient_stay():
    for along in (0, 1):
        W = torch.nn.Parameter(torch.ones(4, 6))
        G = random(4, 6)
        (G[:, 2:] if along == 0 else G[2:]).zero_()
        give(ScaleAdamW([W], lr=0.1, along=along), W, G)
        assert torch.equal(W.detach() == 1, G == 0)
