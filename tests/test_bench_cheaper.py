"""bench.runs.cheaper: its pools hold copies, its errors are of whole gradients, and each look finds the copies."""

import numpy as np
import torch

from bench.runs import cheaper
from model import LLaMA, ModelConfig


def test_a_pool_of_copies_has_a_quarter_as_many_texts_and_each_at_least_once():
    ids = np.random.default_rng(1).integers(97, size=5000)
    x, y = cheaper.copies(ids, 97, seed=0, n=64, T=128)
    assert x.shape == y.shape == (64, 128) and torch.equal(x[:, 1:], y[:, :-1])
    alike = (x[:, None] == x[None]).float().mean(2)  # of copies about 0.9 of the tokens
    assert len({tuple(row) for row in (alike > 0.8).tolist()}) == 16


def test_every_look_finds_planted_copies_and_its_error_is_of_the_last_blocks_gradient():
    torch.manual_seed(0)
    model = LLaMA(ModelConfig(n_layer=4, n_head=2, n_embd=32, n_inner=64, vocab_size=61, block_size=24))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2)
    x = torch.randint(61, (8, 25)).repeat(4, 1)
    rows = {row[0]: row[1:] for row in cheaper.errors(model, [(x[:, :-1], x[:, 1:])], 8, 8)}
    assert rows.keys() == cheaper.LOOKS.keys()
    for plain, weighted, at_random, *over in rows.values():
        assert float(plain) < 1e-2 and float(weighted) < 1e-2 < float(at_random) and len(over) == 3
