"""methods/apollo.py against its equations written out again."""

import math
import zlib

import pytest
import torch
from test_fira import LOUDNESS
from test_galore import adam_by_hand, give, random

from methods import apollo
from methods.apollo import ApolloAdamW


@pytest.mark.parametrize('tensorwise,r,scale', [(False, 4, 1.0), (True, 1, 128**0.5)])
def test_apollo_equals_its_equations_written_out(tensorwise, r, scale):
    W, tall = torch.nn.Parameter(random(12, 30)), torch.nn.Parameter(random(12, 30).T.contiguous())
    w = W.detach().clone()
    options = dict(lr=1e-3, weight_decay=0.1, rank=r, update_proj_gap=3, scale=scale, tensorwise=tensorwise, seed=5)
    optimizer, optimizer_of_tall = ApolloAdamW([W], **options), ApolloAdamW([tall], **options)
    M = V = torch.zeros(r, 30)
    last, clipped, bases = None, [], []
    for t, loud in enumerate(LOUDNESS):
        G = loud * random(12, 30, seed=t)
        # its random numbers are those of (seed, t // T, number of the parameter, row 0)
        generator = torch.Generator().manual_seed(zlib.crc32(f'5 {t // 3} 0 0'.encode()))
        P = torch.randn(12, r, generator=generator) / math.sqrt(r)
        bases.append(P)
        R = P.T @ G
        N, M, V = adam_by_hand(R, M, V, t + 1)
        U = G.clone()
        for j in range(30):
            U[:, j] *= N.norm() / R.norm() if tensorwise else N[:, j].norm() / R[:, j].norm()
        norm = U.norm().item()
        clipped.append(last is not None and norm > 1.01 * last)
        if clipped[-1]:
            U *= 1.01 * last / norm
            norm = 1.01 * last
        last = norm
        w -= 1e-3 * (scale * U + 0.1 * w)
        give(optimizer, W, G)
        give(optimizer_of_tall, tall, G.T)
        torch.testing.assert_close(W.detach(), w, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tall.detach().T, w, atol=1e-5, rtol=1e-5)
    assert 0 < sum(clipped) < len(LOUDNESS) - 1, 'both kinds of step should occur'
    assert torch.equal(bases[0], bases[2]) and not torch.equal(bases[2], bases[3])


def test_apollos_basis_is_random_of_variance_1_over_r_and_another_one_every_T_steps_also_on_resume(monkeypatch):
    seen = []
    original = apollo.adam_direction

    def spy(R, *rest):
        seen.append(R.clone())
        return original(R, *rest)

    monkeypatch.setattr(apollo, 'adam_direction', spy)
    G = torch.eye(400)  # so that R is P.T itself
    W, V = torch.nn.Parameter(torch.zeros(400, 400)), torch.nn.Parameter(torch.zeros(400, 400))

    def optimizer():
        return ApolloAdamW([W, V], rank=16, update_proj_gap=3)

    first = optimizer()
    for _ in range(4):
        give(first, W, G)
    resumed = optimizer()
    resumed.load_state_dict(first.state_dict())
    for _ in range(3):
        give(resumed, W, G)
    for step, R in enumerate(seen):
        assert all(torch.equal(R, other) == (step // 3 == i // 3) for i, other in enumerate(seen))
    P = seen[0].T
    assert P.shape == (400, 16) and abs(P.mean()) < 0.015 and abs(P.var() * 16 - 1) < 0.1
    give(resumed, V, G)
    assert not any(torch.equal(seen[-1], R) for R in seen[:3]), 'two parameters share a basis'
