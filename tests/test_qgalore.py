"""methods/qgalore.py: int8 weights and lazy refreshes, each against its equations written out again."""

from types import SimpleNamespace

import pytest
import torch
from test_galore import TINY, dense, give, matrix, model_and_optimizer, random
from torch._subclasses import FakeTensorMode

from galore import orthonormal_basis
from methods.qgalore import Int8Linear, QGaLoreAdamW, decode_int8, encode_int8, share_kept
from model import LLaMA
from plumbing import Stop, parallel, report

# ---- lazy refreshes ----------------------------------------------------------------------------------------------


def rank_4_gradient(step, space=None):
    """(64, 80), another one at each step. Its columns span 4 random directions, numbered `space`: the next P's."""
    space = step if space is None else space
    return torch.linalg.qr(random(64, 4, seed=space))[0] @ random(4, 80, seed=1000 + step)


def lazy_refreshes(gradient, steps, refresh='svd', **options):
    """[(step of a refresh, share that the old basis kept)] with T = 4."""
    W = torch.nn.Parameter(torch.zeros(64, 80))
    options = dict(rank=4, lazy=0.5) | options
    optimizer = QGaLoreAdamW([W], update_proj_gap=4, refresh=refresh, stagger=False, **options)
    found, P = [], None
    for step in range(steps):
        give(optimizer, W, gradient(step))
        state = optimizer.state[W]
        if not torch.equal(state['P'], P if P is not None else state['P'] + 1):
            found.append((step, state['kept'].item() if 'kept' in state else None))
        P = state['P'].clone()
    return found


@pytest.mark.parametrize('refresh', ['svd', 'subspace'])
@pytest.mark.parametrize('options', [{}, dict(basis_bits=8), dict(basis_bits=4)], ids=str)
def test_refreshes_of_a_subspace_that_stays_come_at_doubling_gaps(refresh, options):
    # T = 4 becomes 8, then 16, then 32
    found = lazy_refreshes(lambda step: rank_4_gradient(step, space=0), 62, refresh, **options)
    assert [step for step, _ in found] == [0, 4, 12, 28, 60]
    for _, kept in found[1:]:
        assert abs(kept - 1) < (0.05 if options else 1e-5)


def noise(step):
    """(64, 80), independent at each step, of every rank."""
    return random(64, 80, seed=step)


def falling(step):
    """(64, 80), independent at each step, with a falling spectrum, as gradients have."""
    return matrix(64, 80, seed=step)


@pytest.mark.parametrize('refresh', ['svd', 'subspace'])
@pytest.mark.parametrize('rank,gradient', [(4, rank_4_gradient), (16, noise), (16, falling)])
def test_refreshes_of_a_subspace_that_turns_keep_coming_every_T_steps(rank, gradient, refresh):
    # the old basis is no better than a random one, however much the new one leans towards it
    found = lazy_refreshes(gradient, 42, refresh, rank=rank, lazy=0.3)
    assert [step for step, _ in found] == list(range(0, 42, 4))
    assert max(abs(kept) for _, kept in found[1:]) < 0.2


@pytest.mark.parametrize('share', [0.2, 0.5, 0.8])
def test_what_a_turning_subspace_keeps_is_measured_alike_under_both_refreshes(share):
    """A gradient of rank 16 of which that share of the directions stays: kept is the share."""
    stays = int(share * 16 + 0.5)
    basis = torch.linalg.qr(random(64, 64))[0]
    old = basis[:, :16]
    G = basis[:, 16 - stays : 32 - stays] @ random(16, 80, seed=1) + 1e-3 * random(64, 80, seed=2)
    found = [share_kept(old, orthonormal_basis(G, 16, refresh, old), G) for refresh in ('svd', 'subspace')]
    assert abs(found[0] - found[1]) < 0.02
    # of the energy 16 / 64 is what a random basis holds: (share - .25) / .75
    assert abs(found[0] - (stays / 16 - 0.25) / 0.75) < 0.1


def test_a_basis_of_the_whole_space_and_a_gradient_of_zero_are_calm_and_no_nan():
    P, Q = (torch.linalg.qr(random(8, 8, seed=seed))[0] for seed in (0, 1))
    assert share_kept(P, Q, random(8, 20)) == pytest.approx(1, abs=1e-3)
    assert share_kept(P[:, :4], Q[:, :4], torch.zeros(8, 20)).isfinite()


def test_a_subspace_that_turns_after_calm_is_refreshed_every_T_steps_again():
    found = [step for step, _ in lazy_refreshes(lambda step: rank_4_gradient(step, 0 if step < 20 else step), 62)]
    assert found[:4] == [0, 4, 12, 28]
    assert {b - a for a, b in zip(found[-5:], found[-4:])} == {4}


def test_a_plan_of_lazy_refreshes_needs_no_values_and_counts_every_refresh():
    with FakeTensorMode(allow_non_fake_inputs=True):
        W = torch.nn.Parameter(torch.zeros(64, 80))
        optimizer = QGaLoreAdamW([W], rank=4, update_proj_gap=2, stagger=False, lazy=0.5)
        for _ in range(8):
            give(optimizer, W, torch.ones(64, 80))
    assert optimizer.state[W]['next'] == 8 and optimizer.state[W]['gap'] == 2


# ---- weights in 8 bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'shape,size',
    # 5461: down_proj of the 1b; 1 and 257: what 256 leaves
    [((32, 512), 256), ((8, 192), 64), ((40, 96), 96), ((7, 5), 5), ((4, 5461), 249), ((6, 257), 129), ((3, 1), 1)],
)
def test_int8_is_off_by_at_most_half_a_step_and_leaves_room_to_grow(shape, size):
    W = random(*shape) * torch.logspace(-3, 0, shape[0])[:, None]
    q, scale = encode_int8(W)
    per_row = -(-shape[1] // size)
    assert q.dtype == torch.int8 and q.shape == W.shape and scale.shape == (shape[0] * per_row,)
    assert q.is_contiguous() and q.untyped_storage().nbytes() == W.numel()
    for dtype in (torch.float32, torch.bfloat16):
        assert decode_int8(q, scale, dtype).dtype == dtype
    W_again = decode_int8(q, scale)
    for row in range(shape[0]):
        for block in range(per_row):
            here, step = slice(block * size, (block + 1) * size), scale[row * per_row + block]
            assert ((W_again - W)[row, here].abs() <= 0.5001 * step).all()
            torch.testing.assert_close(127 * step, 1.25 * W[row, here].abs().max(), rtol=0.01, atol=0)


@pytest.mark.parametrize('columns', [*range(1, 40), 56, 100, 2731, 5461, 11008, 100_003])
def test_int8_takes_at_most_a_tenth_more_than_a_byte_a_weight(columns):
    q, scale = encode_int8(torch.ones(2, columns))
    assert scale.nbytes <= max(0.1 * q.nbytes, 4 * 2)  # or one scale a row


def test_int8_of_before_whose_blocks_were_what_divides_the_columns_goes_on_in_these():
    W = random(6, 96)
    old = W.view(-1, 32).abs().amax(1) / 100  # 3 a row, where there would be one now
    q, scale = encode_int8(W, 0, old)
    assert torch.equal(scale, old)
    assert ((decode_int8(q, scale) - W).view(-1, 32).abs() < 1.0001 * scale[:, None]).all()


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('shape', [(4, 512), (3, 5461)])
def test_what_is_not_finite_is_not_finite_in_int8(shape, bad):
    W = random(*shape)
    _, scale = encode_int8(W)
    W[1, 300] = bad
    for arguments in ((), (3, scale)):
        W_again = decode_int8(*encode_int8(W, *arguments))
        assert not W_again[1, 300].isfinite() and W_again[[0, 2]].isfinite().all()


def test_a_gradient_of_nan_stops_a_run_of_int8_weights_as_it_does_any_other():
    model, optimizer = model_and_optimizer(method='qgalore', weight_bits=8)
    x = torch.zeros(2, 8, dtype=torch.int64)
    model(x, x).backward()
    optimizer.step()
    p = model.layers[0].mlp.up_proj.weight
    model(x, x).backward()
    optimizer.placeholder[p].grad[0, 0] = float('nan')
    optimizer.step()
    assert not model(x, x).isfinite()
    with pytest.raises(Stop, match='weights that are not finite'):
        here = parallel.Here(0, 1, 'cpu', torch.float32)
        report.check_finite(model, optimizer, 2, SimpleNamespace(learning_rate=1e-3, out_dir='nowhere'), here)


def test_int8_rounded_at_random_is_right_on_average():
    W = random(16, 256)
    _, scale = encode_int8(W)
    mean, seeds = torch.zeros(16, 256), 1000
    for seed in range(seeds):
        decoded = decode_int8(*encode_int8(W, seed, scale))
        assert ((decoded - W).abs() < 1.0001 * scale[:, None]).all()
        mean += decoded / seeds
    error = (mean - W) / scale[:, None]  # in steps; the standard error is at most 0.5 / sqrt(1000) = 0.016
    assert error.abs().max() < 5 * 0.016 and abs(error.mean()) < 5 * 0.016 / 64
    assert torch.equal(encode_int8(W, 3, scale)[0], encode_int8(W, 3, scale)[0])


def test_an_update_of_zero_leaves_every_int8_number_as_it_is():
    q, scale = encode_int8(random(4096, 1024))
    for seed in range(2):
        new_q, new_scale = encode_int8(decode_int8(q, scale), seed, scale)
        assert torch.equal(new_scale, scale)
        assert torch.equal(new_q, q), f'{(new_q != q).sum()} of 4 million numbers moved'


def test_int8_scales_follow_a_block_that_outgrows_or_shrinks_and_nothing_is_clipped():
    W = random(4, 256)
    _, scale = encode_int8(W)
    W[1] *= 1.2  # within its room
    W[2] *= 3.0
    W[3] /= 10.0
    q, new_scale = encode_int8(W, 0, scale)
    assert torch.equal(new_scale[:2], scale[:2])
    torch.testing.assert_close(new_scale[2:] / scale[2:], torch.tensor([3.0, 0.1]), rtol=0.01, atol=0)
    assert ((decode_int8(q, new_scale) - W).abs() < 1.0001 * new_scale[:, None]).all()


def test_an_int8_weight_takes_galores_step_on_average():
    """The mean over 400 seeds of one and the same step, against W - lr (alpha P N + decay W)."""
    model, optimizer = model_and_optimizer(
        method='qgalore', weight_bits=8, learning_rate=1e-2, weight_decay=5.0, rank=4
    )
    for linear in (model.layers[0].self_attn.q_proj, model.layers[0].mlp.up_proj, model.layers[0].mlp.down_proj):
        p, G = linear.weight, random(*linear.weight.shape)
        state = optimizer.state[p]
        q, scale = state['W'].clone(), state['W_scale'].clone()
        before, tall = decode_int8(q, scale), p.shape[0] >= p.shape[1]
        P = orthonormal_basis(G.T if tall else G, 4)
        N = torch.sign(P.T @ (G.T if tall else G))  # Adam's first step
        update = (P @ N).T if tall else P @ N
        kept, mean = (1 - 1e-2 * 5) * before, torch.zeros(p.shape)
        for seed in range(400):
            optimizer.seed = seed
            optimizer.state[p] = {'W': q.clone(), 'W_scale': scale.clone()}
            optimizer.new_basis(p, G.T if tall else G)
            p.grad = G.clone()
            optimizer.step()
            mean += optimizer.weight(p) / 400
        steps = scale.repeat_interleave(p.numel() // len(scale)).view(p.shape)
        # in steps; the standard error is at most 0.5 / sqrt(400) = 0.025, the decay of the largest weight 5
        assert ((mean - kept + 1e-2 * 0.25 * update) / steps).abs().max() < 5 * 0.025
        found = torch.nn.functional.cosine_similarity((mean - kept).flatten(), -update.flatten(), dim=0)
        assert found > 0.9, 'the update is lost in the noise'


@pytest.mark.parametrize('kind', ['int8', 'bf16'])
@pytest.mark.parametrize('shape', [(2048, 2304), (2304, 2048)])
def test_a_large_weight_that_moves_some_rows_at_a_time_arrives_whole_and_outgrown_scales_with_it(shape, kind):
    # 4.7 million numbers, of which 2 ** 22 move at once; the step is some ten times the weights' size
    before, tall = 0.02 * random(*shape), shape[0] >= shape[1]
    q, scale = encode_int8(before)
    if kind == 'int8':
        W, before = torch.nn.Parameter(torch.zeros(()).expand(shape)), decode_int8(q, scale)
    else:
        W = torch.nn.Parameter(before.bfloat16())
        before = W.detach().float()
    optimizer = QGaLoreAdamW([W], lr=20.0, rank=4)
    if kind == 'int8':
        optimizer.state[W].update(W=q.clone(), W_scale=scale.clone())
    W.grad = random(*shape, seed=1).to(W.dtype)
    G = W.grad.float().T if tall else W.grad.float()
    with torch.no_grad():
        optimizer.new_basis(W, G)
    P = orthonormal_basis(G, 4).to(W.dtype).float()
    update = P @ torch.sign(P.T @ G)  # Adam's first step
    wanted = before - 20.0 * 0.25 * (update.T if tall else update)
    optimizer.step()
    error = (optimizer.weight(W).float() - wanted).abs()
    if kind == 'int8':
        new_scale = optimizer.state[W]['W_scale']
        assert (new_scale > 2 * scale).float().mean() > 0.9
        assert (error.reshape(len(scale), -1) < 1.001 * new_scale[:, None]).all()
    else:
        assert (error <= 2**-7 * wanted.abs() + 1e-5).all()  # a step of bf16


def fit_one_batch(steps=30, **mode):
    model, optimizer = model_and_optimizer(**mode, learning_rate=1e-2, update_proj_gap=10)
    x = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


def test_a_model_with_int8_weights_learns_as_one_in_fp32_and_holds_no_second_copy():
    _, optimizer, losses = fit_one_batch(method='qgalore', weight_bits=8)
    exact = fit_one_batch()[2]
    assert losses[-1] < 0.5 * losses[0] and abs(losses[-1] - exact[-1]) < 0.1 * losses[0]
    for p in optimizer.offset:
        state = optimizer.state[p]
        assert p.untyped_storage().nbytes() == 4 and state['W'].dtype == torch.int8 and state['W'].shape == p.shape
        assert set(state) <= {'W', 'W_scale', 'P', 'M', 'V', 'step', 'fill', 'next'}
    # frozen blocks would learn less: their int8 weights do move
    start = model_and_optimizer(method='qgalore', weight_bits=8)[1]
    for p, q in zip(optimizer.offset, start.offset):
        assert not torch.equal(optimizer.state[p]['W'], start.state[q]['W'])


def test_int8_weights_are_saved_whole_and_give_the_same_logits(tmp_path):
    model, optimizer, _ = fit_one_batch(5, method='qgalore', weight_bits=8)
    model.save_pretrained(tmp_path)
    loaded = LLaMA.from_pretrained(tmp_path)
    wanted = dense(model, optimizer)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, wanted[name]), name
    tokens = torch.randint(0, 61, (2, TINY['block_size']), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(tokens), loaded(tokens))


def test_a_packed_layer_takes_its_weight_along_when_it_moves():
    layer = Int8Linear(64, 32, bias=True, dtype=torch.bfloat16)
    layer.set_weight(random(32, 64).bfloat16())
    before = layer.dense_weight()
    assert torch.equal(layer.to('cpu').dense_weight(), before)
    assert layer.weight.shape == (32, 64) and layer.weight.untyped_storage().nbytes() == 2
    layer.to('meta')
    assert {A.device.type for A in (layer.weight, layer.bias, *layer.packed.values())} == {'meta'}
