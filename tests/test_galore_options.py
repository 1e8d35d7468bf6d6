"""galore.py's options (turned moments, bases and weights in few bits, lazy refreshes, Fira) and APOLLO, each against
its equations written out again."""

import math
import zlib

import pytest
import torch
from test_galore import CONFIG, TINY, dense, model_and_optimizer, train

import adam
import galore
from adam import load
from galore import ApolloAdamW, GaLoreAdamW, decode_int8, encode_int8, limited, orthonormal_basis, turned
from model import LLaMA

BETAS = (0.9, 0.999)
assert (CONFIG['beta1'], CONFIG['beta2']) == BETAS


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def give(optimizer, W, G):
    """One step on a loss whose gradient is G."""
    (W * G).sum().backward()
    optimizer.step()


def adam_by_hand(R, M, V, t):
    """(N, M, V) after Adam's step number t, from the paper."""
    M, V = BETAS[0] * M + (1 - BETAS[0]) * R, BETAS[1] * V + (1 - BETAS[1]) * R * R
    return M / (1 - BETAS[0] ** t) / ((V / (1 - BETAS[1] ** t)).sqrt() + 1e-8), M, V


# ---- moments when P turns ----------------------------------------------------------------------------------------


def moments(r=5, n=7, t=12):
    """Adam's moments after t steps on random gradients."""
    M = V = torch.zeros(r, n)
    for step in range(t):
        _, M, V = adam_by_hand(random(r, n, seed=step), M, V, step + 1)
    return M, V


def test_turned_by_a_signed_permutation_permutes_both_and_flips_the_sign_of_M_alone():
    M, V = moments()
    order, signs = [3, 0, 4, 1, 2], torch.tensor([1.0, -1, -1, 1, -1])
    Q = torch.zeros(5, 5)
    for i in range(5):
        Q[i, order[i]] = signs[i]
    new_M, new_V = turned(M, V, Q, BETAS, 12)
    torch.testing.assert_close(new_M, M[order] * signs[:, None], rtol=1e-6, atol=0)
    torch.testing.assert_close(new_V, V[order], rtol=1e-5, atol=0)
    for new, old in zip(turned(M, V, torch.eye(5), BETAS, 12), (M, V)):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=0)


def test_turned_is_ldadams_rule_element_by_element():
    t, r, n = 12, 5, 7
    M, V = moments(r, n, t)
    V[:, :3] /= 20  # less than M squared, as after a few large gradients at the end
    Q = orthonormal_basis(random(20, 30, seed=1), r, 'svd').T @ orthonormal_basis(random(20, 30, seed=2), r, 'svd')
    Q = Q + 0.5 * torch.eye(r)  # neither orthogonal nor symmetric
    wanted_M, wanted_V = torch.zeros(r, n), torch.zeros(r, n)
    full_M, full_V = 1 - BETAS[0] ** t, 1 - BETAS[1] ** t
    negative = 0
    for i in range(r):
        for j in range(n):
            turned_M = sum(Q[i, k].item() * M[k, j].item() / full_M for k in range(r))
            variance = sum(
                Q[i, k].item() ** 2 * (V[k, j].item() / full_V - (M[k, j].item() / full_M) ** 2) for k in range(r)
            )
            negative += variance + turned_M**2 < 0
            wanted_M[i, j] = full_M * turned_M
            wanted_V[i, j] = full_V * abs(variance + turned_M**2)
    found_M, found_V = turned(M, V, Q, BETAS, t)
    torch.testing.assert_close(found_M, wanted_M, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_V, wanted_V, rtol=1e-4, atol=1e-7)
    assert negative, 'no element where the absolute value matters'


@pytest.mark.parametrize('bits', [32, 8])
@pytest.mark.parametrize('shape', [(12, 30), (30, 12)])
@pytest.mark.parametrize('how', ['keep', 'rotate', 'reset'])
def test_moments_at_a_refresh(how, shape, bits, monkeypatch):
    monkeypatch.setattr(adam, 'SMALLEST_8BIT', 64)  # else these 120 numbers would stay in fp32
    W, tall = torch.nn.Parameter(torch.zeros(shape)), shape[0] > shape[1]
    options = dict(rank=4, update_proj_gap=3, refresh='svd', stagger=False, moments=how, state_bits=bits)
    optimizer = GaLoreAdamW([W], **options)
    for step in range(3):
        give(optimizer, W, random(*shape, seed=step))
    state = optimizer.state[W]
    old, M, V = state['P'].clone(), load(state, 'M').clone(), load(state, 'V').clone()
    G = random(*shape, seed=3)
    give(optimizer, W, G)  # the step of the refresh
    G = G.T if tall else G
    P = torch.linalg.svd(G)[0][:, :4]
    torch.testing.assert_close(state['P'], P)
    if how == 'rotate':  # into the full space with the old P and back with the new one; V by LDAdam's rule
        full_M, full_V, square = 1 - 0.9**3, 1 - 0.999**3, (P.T @ old) ** 2
        mean = P.T @ (old @ M) / full_M
        V = full_V * (square @ (V / full_V - (M / full_M) ** 2) + mean**2).abs()
        M = full_M * mean
    elif how == 'reset':
        M, V = torch.zeros(4, 30), torch.zeros(4, 30)
    _, M, V = adam_by_hand(P.T @ G, M, V, 4)
    for name, wanted in (('M', M), ('V', V)):
        off = (load(state, name) - wanted).norm() / wanted.norm()
        assert off < (1e-5 if bits == 32 else 0.05), (name, off)


# ---- bases in 8 and 4 bits ---------------------------------------------------------------------------------------

NF4 = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]


def quantised_basis(bits, dtype=torch.float32):
    """(optimizer, weight, P in fp32) after the first step of a 96 x 256 weight with r = 64."""
    W = torch.nn.Parameter(torch.zeros(96, 256, dtype=dtype))
    optimizer = GaLoreAdamW([W], rank=64, basis_bits=bits)
    G = random(96, 256).to(dtype)
    give(optimizer, W, G)
    return optimizer, W, orthonormal_basis(G, 64)


@pytest.mark.parametrize('bits,low,high', [(8, 0.005, 0.009), (4, 0.085, 0.099)])
def test_basis_in_few_bits_is_close_and_as_small_as_promised(bits, low, high):
    optimizer, W, P = quantised_basis(bits)
    assert low < (optimizer.basis(W) - P).norm() / P.norm() < high
    state = optimizer.state[W]
    # a byte or half a one for each number, and an fp32 scale for each block of 256 or 64
    assert state['P'].nbytes == P.numel() * bits // 8
    assert state['P_absmax'].nbytes == 4 * P.numel() // (256 if bits == 8 else 64)
    assert quantised_basis(bits, torch.bfloat16)[0].state_dict()['state'][0]['P'].nbytes == state['P'].nbytes


def test_four_bits_are_nf4_as_published_and_as_bitsandbytes_has_it():
    functional = pytest.importorskip('bitsandbytes.functional')
    optimizer, W, P = quantised_basis(4)
    blocks = P.reshape(-1, 64)
    scale, code = blocks.abs().amax(1, keepdim=True), torch.tensor(NF4)
    nearest = (blocks / scale).unsqueeze(-1).sub(code).abs().argmin(-1)
    torch.testing.assert_close(optimizer.basis(W), (code[nearest] * scale).view(P.shape), rtol=1e-5, atol=1e-7)
    packed, how = functional.quantize_4bit(P, blocksize=64, quant_type='nf4')
    assert torch.equal(optimizer.state[W]['P'], packed)
    assert torch.equal(optimizer.basis(W), functional.dequantize_4bit(packed, how))


@pytest.mark.parametrize('bits', [8, 4])
def test_basis_in_few_bits_gives_the_same_path_attached_or_as_a_drop_in(bits):
    weights = []
    for compile in (False, True):
        model, optimizer = model_and_optimizer(basis_bits=bits, compile=compile)
        weights.append(dense(train(model, optimizer, 10, accumulation=2), optimizer))
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)


# ---- lazy refreshes ----------------------------------------------------------------------------------------------


def rank_4_gradient(step, space=None):
    """(64, 80), another one at each step. Its columns span 4 random directions, numbered `space`: the next P's."""
    space = step if space is None else space
    return torch.linalg.qr(random(64, 4, seed=space))[0] @ random(4, 80, seed=1000 + step)


def lazy_refreshes(gradient, steps, refresh='svd', **options):
    """[(step of a refresh, overlap)] with T = 4."""
    W = torch.nn.Parameter(torch.zeros(64, 80))
    optimizer = GaLoreAdamW([W], rank=4, update_proj_gap=4, refresh=refresh, stagger=False, lazy=0.5, **options)
    found, P = [], None
    for step in range(steps):
        give(optimizer, W, gradient(step))
        state = optimizer.state[W]
        if not torch.equal(state['P'], P if P is not None else state['P'] + 1):
            found.append((step, state['overlap'].item() if 'overlap' in state else None))
        P = state['P'].clone()
    return found


@pytest.mark.parametrize('refresh', ['svd', 'subspace'])
@pytest.mark.parametrize('options', [{}, dict(basis_bits=8), dict(basis_bits=4)], ids=str)
def test_refreshes_of_a_subspace_that_stays_come_at_doubling_gaps(refresh, options):
    # T = 4 becomes 8, then 16, then 32
    found = lazy_refreshes(lambda step: rank_4_gradient(step, space=0), 62, refresh, **options)
    assert [step for step, _ in found] == [0, 4, 12, 28, 60]
    for _, overlap in found[1:]:
        assert abs(overlap - 1) < (0.03 if options else 1e-5)


def test_refreshes_of_a_subspace_that_turns_keep_coming_every_T_steps():
    found = lazy_refreshes(rank_4_gradient, 62)
    assert [step for step, _ in found] == list(range(0, 62, 4))
    overlaps = [overlap for _, overlap in found[1:]]
    # two random subspaces share r / m = 4 / 64 on average
    assert max(overlaps) < 0.25 and abs(sum(overlaps) / len(overlaps) - 4 / 64) < 0.03


def test_a_subspace_that_turns_after_calm_is_refreshed_every_T_steps_again():
    found = [step for step, _ in lazy_refreshes(lambda step: rank_4_gradient(step, 0 if step < 20 else step), 62)]
    assert found[:4] == [0, 4, 12, 28]
    assert {b - a for a, b in zip(found[-5:], found[-4:])} == {4}


# ---- weights in 8 bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('shape', [(32, 512), (40, 96), (7, 5)])
def test_int8_is_off_by_at_most_half_a_step_and_leaves_room_to_grow(shape):
    W = random(*shape) * torch.logspace(-3, 0, shape[0])[:, None]
    q, scale = encode_int8(W)
    block = math.gcd(shape[1], 256)
    assert q.dtype == torch.int8 and q.shape == W.shape and scale.shape == (W.numel() // block,)
    error = (decode_int8(q, scale) - W).reshape(-1, block).abs()
    assert (error <= 0.5001 * scale[:, None]).all()
    largest = W.reshape(-1, block).abs().amax(1)
    torch.testing.assert_close(127 * scale, 1.25 * largest, rtol=0.01, atol=0)


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
    model, optimizer = model_and_optimizer(weight_bits=8, learning_rate=1e-2, weight_decay=5.0, rank=4)
    for linear in (model.layers[0].self_attn.q_proj, model.layers[0].mlp.up_proj, model.layers[0].mlp.down_proj):
        p, G = linear.weight, random(*linear.weight.shape)
        state = optimizer.state[p]
        q, scale = state['W'].clone(), state['W_scale'].clone()
        before, tall = decode_int8(q, scale), p.shape[0] > p.shape[1]
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
    before, tall = 0.02 * random(*shape), shape[0] > shape[1]
    q, scale = encode_int8(before)
    if kind == 'int8':
        W, before = torch.nn.Parameter(torch.zeros(()).expand(shape)), decode_int8(q, scale)
    else:
        W = torch.nn.Parameter(before.bfloat16())
        before = W.detach().float()
    optimizer = GaLoreAdamW([W], lr=20.0, rank=4)
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
    _, optimizer, losses = fit_one_batch(weight_bits=8)
    exact = fit_one_batch()[2]
    assert losses[-1] < 0.5 * losses[0] and abs(losses[-1] - exact[-1]) < 0.1 * losses[0]
    for p in optimizer.turn:
        state = optimizer.state[p]
        assert p.untyped_storage().nbytes() == 4 and state['W'].dtype == torch.int8 and state['W'].shape == p.shape
        assert set(state) <= {'W', 'W_scale', 'P', 'M', 'V', 'step', 'next'}
    # frozen blocks would learn less: their int8 weights do move
    start = model_and_optimizer(weight_bits=8)[1]
    for p, q in zip(optimizer.turn, start.turn):
        assert not torch.equal(optimizer.state[p]['W'], start.state[q]['W'])


def test_int8_weights_are_saved_whole_and_give_the_same_logits(tmp_path):
    model, optimizer, _ = fit_one_batch(5, weight_bits=8)
    model.save_pretrained(tmp_path)
    loaded = LLaMA.from_pretrained(tmp_path)
    wanted = dense(model, optimizer)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, wanted[name]), name
    tokens = torch.randint(0, 61, (2, TINY['block_size']), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(tokens), loaded(tokens))


# ---- Fira --------------------------------------------------------------------------------------------------------


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
        torch.testing.assert_close(limited(torch.tensor(update), state), torch.tensor(wanted), rtol=1e-4, atol=0)
        torch.testing.assert_close(state['norm'], torch.tensor(norm), rtol=1e-4, atol=0)


LOUDNESS = [1.0, 1.0, 1.0, 5.0, 1.0, 0.1, 1.0, 30.0]  # of the gradients: some steps are limited, some are not


@pytest.mark.parametrize('shape', [(12, 30), (30, 12)])
def test_fira_equals_its_equations_written_out(shape):
    W = torch.nn.Parameter(random(*shape))
    w = W.detach().clone().T if shape[0] > shape[1] else W.detach().clone()  # (12, 30)
    optimizer = GaLoreAdamW([W], lr=1e-2, rank=4, update_proj_gap=3, refresh='svd', stagger=False, residual='fira')
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
        w -= 1e-2 * 0.25 * (P @ N + S)
        give(optimizer, W, G.T if shape[0] > shape[1] else G)
        torch.testing.assert_close(W.detach().T if shape[0] > shape[1] else W.detach(), w, atol=1e-5, rtol=1e-5)
    assert 0 < sum(clipped) < len(LOUDNESS) - 1, 'both kinds of step should occur'


METHODS = {
    'fira': lambda W: GaLoreAdamW([W], lr=1e-2, rank=4, residual='fira'),
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


# ---- APOLLO ------------------------------------------------------------------------------------------------------


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
    original = galore.adam_direction

    def spy(R, *rest):
        seen.append(R.clone())
        return original(R, *rest)

    monkeypatch.setattr(galore, 'adam_direction', spy)
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
