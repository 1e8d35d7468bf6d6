"""adam.py against torch.optim.AdamW, and the things bf16 training silently gets wrong elsewhere."""

import gc
import weakref

import pytest
import torch

import adam
from adam import AdamW, adam_direction, add_


def tiny_net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(24, 96), torch.nn.Tanh(), torch.nn.Linear(96, 7)).to(dtype)


def train(net, optimizer, steps, accumulation=1, seed=1):
    torch.manual_seed(seed)
    dtype = next(net.parameters()).dtype
    for _ in range(steps):
        for micro in range(accumulation):
            optimizer.last_micro_batch = micro == accumulation - 1
            x, y = torch.randn(16, 24).to(dtype), torch.randint(0, 7, (16,))
            (torch.nn.functional.cross_entropy(net(x).float(), y) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def test_path_equals_torch_adamw_with_decay_and_clipping():
    ours, theirs = tiny_net(), tiny_net()
    train(ours, AdamW(ours.parameters(), lr=1e-2, weight_decay=0.1), 20)
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1), 20)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)

    class Clipped(torch.optim.AdamW):
        def step(self):
            torch.nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g['params']], 0.05)
            super().step()

    ours, theirs = tiny_net(), tiny_net()
    train(ours, AdamW(ours.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0, grad_clip=0.05), 20)
    train(theirs, Clipped(theirs.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0), 20)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_grad_norm_is_the_global_norm_of_the_step():
    net = tiny_net()
    optimizer = AdamW(net.parameters())
    torch.nn.functional.cross_entropy(net(torch.randn(16, 24)), torch.zeros(16, dtype=torch.int64)).backward()
    expected = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    optimizer.step()
    torch.testing.assert_close(optimizer.metrics['grad_norm'], expected)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize('bits', [32, 8])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('accumulation', [1, 2, 8])
def test_per_layer_gives_the_same_weights_bit_for_bit(accumulation, dtype, bits):
    normal, per_layer = tiny_net(dtype=dtype), tiny_net(dtype=dtype)
    train(normal, AdamW(normal.parameters(), state_bits=bits), 5, accumulation)
    train(per_layer, AdamW(per_layer.parameters(), state_bits=bits, per_layer=True), 5, accumulation)
    for p, q in zip(normal.parameters(), per_layer.parameters()):
        assert torch.equal(p, q)


def test_per_layer_drops_each_gradient_within_backward():
    net = tiny_net()
    optimizer = AdamW(net.parameters(), per_layer=True)
    before = net[0].weight.clone()
    net(torch.randn(16, 24)).square().mean().backward()
    assert all(p.grad is None for p in net.parameters()) and not torch.equal(before, net[0].weight)
    optimizer.step()
    assert optimizer.metrics['grad_norm'] > 0


def test_clipping_with_per_layer_is_refused_with_the_flags_to_change():
    with pytest.raises(ValueError, match='set grad_clip=0 or per_layer=False'):
        AdamW(tiny_net().parameters(), grad_clip=1.0, per_layer=True)
    with pytest.raises(ValueError, match='use 32 or 8'):
        AdamW(tiny_net().parameters(), state_bits=4)


@pytest.mark.parametrize('bits', [32, 8])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_interrupted_equals_uninterrupted_and_states_keep_their_dtype(dtype, bits, tmp_path):
    whole = tiny_net(dtype=dtype)
    optimizer = AdamW(whole.parameters(), state_bits=bits)
    train(whole, optimizer, 4)
    torch.save({'model': whole.state_dict(), 'optimizer': optimizer.state_dict()}, tmp_path / 'state.pt')
    train(whole, optimizer, 4, seed=2)

    resumed = tiny_net(seed=99, dtype=dtype)
    optimizer = AdamW(resumed.parameters(), state_bits=bits)
    state = torch.load(tmp_path / 'state.pt', weights_only=True)
    resumed.load_state_dict(state['model'])
    optimizer.load_state_dict(state['optimizer'])
    big = optimizer.state[resumed[0].weight]
    assert big['M'].dtype == torch.float32, 'the first layer has under 4096 elements'
    train(resumed, optimizer, 4, seed=2)
    for p, q in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


def test_eight_bit_states_take_a_quarter_and_follow_fp32():
    torch.manual_seed(0)
    exact, small = {}, {}
    for _ in range(30):
        G = torch.randn(64, 256) * torch.logspace(-3, 0, 64)[:, None]  # a scale a block: what blocks are for
        N32, N8 = (adam_direction(G, s, (0.9, 0.999), 1e-8, bits) for s, bits in ((exact, 32), (small, 8)))
    assert small['M'].dtype == small['V'].dtype == torch.uint8
    nbytes = {bits: sum(t.nbytes for t in s.values() if torch.is_tensor(t)) for bits, s in ((8, small), (32, exact))}
    assert nbytes[8] / nbytes[32] < 0.26
    assert (N8 - N32).norm() / N32.norm() < 0.05


def test_eight_bit_path_stays_close_to_bitsandbytes_own():
    bitsandbytes = pytest.importorskip('bitsandbytes')
    torch.manual_seed(0)
    start, gradients = torch.randn(64, 256), [torch.randn(64, 256) for _ in range(20)]
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a, b = AdamW([ours], lr=1e-2, state_bits=8), bitsandbytes.optim.AdamW8bit([theirs], lr=1e-2, weight_decay=0.0)
    for G in gradients:
        ours.grad, theirs.grad = G.clone(), G.clone()
        a.step(), b.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() / moved < 0.02


def test_second_moment_follows_a_gradient_that_falls_tenfold():
    # a bf16 second moment would stand still at its first value for ever (V * 0.999 rounds back to V)
    state, frozen = {}, torch.zeros(5000, dtype=torch.bfloat16)
    for step in range(4000):
        G = torch.randn(5000, generator=torch.Generator().manual_seed(step)) * (1.0 if step < 2000 else 0.1)
        adam_direction(G, state, (0.9, 0.999), 1e-8)
        frozen.mul_(0.999).addcmul_(G.bfloat16(), G.bfloat16(), value=0.001)
    assert state['V'].mean() < 0.13 and frozen.float().mean() > 1.0


def test_stochastic_rounding_is_right_on_average_and_repeatable():
    W = torch.full((400_000,), 1.0, dtype=torch.bfloat16)
    step = 0.001  # the next bf16 below 1 is 1 - 0.0039: rounding to the nearest would never move
    add_(W, torch.ones(400_000), lr=step, decay=0.0, seed=7)
    assert set(W.unique().tolist()) == {1.0, 1 - 2**-8}
    assert abs(W.float().mean().item() - (1 - step)) < 3 * 0.0039 / 2 / 400_000**0.5
    again = torch.full((400_000,), 1.0, dtype=torch.bfloat16)
    add_(again, torch.ones(400_000), lr=step, decay=0.0, seed=7)
    assert torch.equal(W, again)


def test_late_small_updates_reach_bf16_weights_on_average():
    torch.manual_seed(0)
    W = (0.02 * torch.randn(64, 64)).bfloat16()
    nearest, start, intended = W.clone(), W.float(), torch.zeros(64, 64)
    for step in range(3000):
        N = torch.randn(64, 64) + 0.5
        add_(W, N, lr=1e-5, decay=0.0, seed=step)
        nearest.add_(N, alpha=-1e-5)
        intended -= 1e-5 * N

    def agreement(weights):
        return torch.nn.functional.cosine_similarity((weights.float() - start).flatten(), intended.flatten(), dim=0)

    assert agreement(W) > 0.99
    assert agreement(nearest) < 0.7, 'rounding to the nearest would do as well: this test proves nothing'


def test_decay_of_bf16_weights_is_not_lost_to_rounding():
    W = torch.full((100_000,), 1.0, dtype=torch.bfloat16)
    for step in range(50):
        add_(W, torch.zeros(100_000), lr=1e-3, decay=0.1, seed=step)
    assert abs(W.float().mean().item() - (1 - 1e-4) ** 50) < 2e-4


def test_small_tensors_keep_fp32_states():
    state = {}
    adam_direction(torch.ones(adam.SMALLEST_8BIT - 1), state, (0.9, 0.999), 1e-8, state_bits=8)
    assert state['M'].dtype == torch.float32


@pytest.mark.parametrize('bits', [32, 8])
@pytest.mark.parametrize('shape', [(1000, 40), (1024, 64), (700,)])
def test_a_large_tensor_updated_in_pieces_equals_the_whole(shape, bits, monkeypatch):
    whole, parts = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    a, b = (AdamW([p], lr=1e-2, state_bits=bits) for p in (whole, parts))
    monkeypatch.setattr(AdamW, 'random_seed', lambda *_: None)  # to the nearest: the noise of a piece is another
    for step in range(5):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        whole.grad, parts.grad = G.clone(), G.clone()
        a.step()
        with monkeypatch.context() as patch:
            patch.setattr(adam, 'PIECE', 15_000 if len(shape) > 1 else 10**9)
            b.step()
    assert torch.equal(whole, parts)
    assert a.state[whole].keys() == b.state[parts].keys() and b.state[parts]['step'] == 5


def test_a_dropped_optimizer_is_freed_with_its_parameters():
    net = tiny_net()
    optimizer = AdamW(net.parameters())
    train(net, optimizer, 1)
    gone = [weakref.ref(p) for p in (*net.parameters(), optimizer)]
    del net, optimizer
    gc.collect()
    assert all(ref() is None for ref in gone)


def test_eight_bit_second_moment_follows_changes_far_smaller_than_its_codes_are_apart():
    """To the nearest, V * 0.999 of most numbers would be V again for ever, beside a largest one that does not fall."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for step in range(1500):
        G = torch.randn(4096, generator=generator) * (1.0 if step < 300 else 0.1)
        G[::256] = 3.0  # one number a block keeps its size, and with it the block's scale
        adam_direction(G, state, (0.9, 0.999), 1e-8, 8, seed=2 * step)
    fallen = adam.read_state(state, 'V').view(16, 256)[:, 1:].mean()
    exact = (1 - 0.999**300) * 0.999**1200 + (1 - 0.999**1200) * 0.01
    assert abs(fallen / exact - 1) < 0.1, (fallen, exact)


def test_random_rounding_of_eight_bits_is_right_on_average():
    generator = torch.Generator().manual_seed(0)
    moment = torch.randn(4096, generator=generator)
    moment = moment.square()
    state = {'V': torch.zeros(4096, dtype=torch.uint8), 'V_absmax': torch.zeros(16)}
    total = torch.zeros(4096)
    for seed in range(400):
        adam.write_state(state, 'V', moment, seed)
        total += adam.read_state(state, 'V')
    adam.write_state(state, 'V', moment)
    nearest = (adam.read_state(state, 'V') - moment).norm()
    assert (total / 400 - moment).norm() < 0.25 * nearest
