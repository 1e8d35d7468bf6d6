"""loqt.py against bitsandbytes, autograd on dense weights, GaLore, and its two algorithms written out again."""

from types import SimpleNamespace

import pytest
import torch
from test_galore import TINY, matrix, train

import loqt
from adam import split_decay
from galore import GaLoreAdamW, orthonormal_basis, rotate_moments
from loqt import LoQTAdamW, LoQTLinear, merge, replace_linears, update_steps
from memory.record import LiveBytes
from model import LLaMA, ModelConfig
from quant import decode, encode

CONFIG = dict(learning_rate=1e-2, beta1=0.9, beta2=0.999, weight_decay=0.0, rank=8, update_proj_gap=3, scale=0.5)
CONFIG |= dict(refresh='subspace', stagger=True, state_bits=32, grad_clip=0.0, per_layer=False, offload=False, seed=0)
CONFIG |= dict(psi=1.2, compensation=5, quantize='nf4', double_quant=False, moments='reset', max_iters=40)
CONFIG |= dict(train_rest='yes', targets='all')
CONFIG |= dict(compile=False, proj_type='std')
SHAPES = [(12, 30), (30, 12), (16, 16)]  # (out, in): wide, tall, square


def model_and_optimizer(dtype=torch.float32, checkpointing=False, **changes):
    config = SimpleNamespace(**CONFIG | changes)
    model = LLaMA(ModelConfig(**TINY), dtype=dtype, linear=loqt.linear(config)).materialise(seed=0)
    model.compute_dtype, model.checkpointing = torch.float32, checkpointing
    for module in model.modules():  # large enough weights that gradients are of a common size
        generator = torch.Generator().manual_seed(0)
        if isinstance(module, LoQTLinear):
            W = torch.randn(module.shapes['W'], generator=generator)
            module.set_weight(0.2 * W.to(dtype), precious=False)
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(model.lm_head.weight, std=0.2, generator=torch.Generator().manual_seed(2))
    return model, loqt.setup(model, config)


def layer_of(shape, rank=4, started=True, **options):
    """A layer with weights, a P and a B of which none is zero; and x, delta to run through it."""
    torch.manual_seed(0)
    layer = LoQTLinear(shape[1], shape[0], rank=rank, **options)
    layer.set_weight(torch.randn(shape), precious=False)
    if started:
        layer.keep('P', orthonormal_basis(torch.randn(layer.shapes['P'][0], 40), rank))
        layer.B.data.normal_()
        layer.started, layer.collect = True, False
    return layer


def whole(layer):
    """The weight by its definition."""
    P, W = layer.read('P', torch.float32), layer.read('W', torch.float32)
    PB = P @ layer.B.detach()
    return W + layer.scale * (PB.T if layer.tall else PB)


# ---- when --------------------------------------------------------------------------------------------------------


def test_update_steps_are_the_papers():
    ten_thousand = update_steps(10_000)
    assert ten_thousand[:11] == [0, 100, 201, 302, 403, 505, 607, 709, 812, 916, 1021] and ten_thousand[-1] == 9999
    assert [len(update_steps(1000 * k)) for k in (10, 20, 60, 100)] == [40, 45, 52, 55]
    assert update_steps(500, 100, 0) == [0, 100, 200, 300, 400]
    assert update_steps(5) == [0] and update_steps(0) == []
    with pytest.raises(ValueError, match=r'tau=0, psi=.* are no intervals: use 1 or more steps'):
        update_steps(10, 0)


@pytest.mark.parametrize('per_layer', [False, True])
@pytest.mark.parametrize('stagger', [False, True])
def test_layers_merge_at_the_update_steps_together_or_in_turns(stagger, per_layer, monkeypatch):
    seen, real = [], loqt.merge
    monkeypatch.setattr(loqt, 'merge', lambda layer: seen.append((step, layer)) or real(layer))
    model, optimizer = model_and_optimizer(update_proj_gap=5, psi=1.5, stagger=stagger, per_layer=per_layer)
    layers = list(optimizer.layers.values())
    for step in range(24):
        train(model, optimizer, 1, accumulation=2, first=step)
    steps = update_steps(24, 5, 1.5)
    assert steps == [0, 5, 11, 18]
    for i, layer in enumerate(layers):
        later = i * 5 // len(layers) if stagger else 0
        assert [s for s, who in seen if who is layer] == [0, *(s + later for s in steps[1:] if s + later < 24)]


# ---- NF4 ---------------------------------------------------------------------------------------------------------

NF4 = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]


@pytest.mark.parametrize('double_quant', [False, True])
def test_nf4_is_bitsandbytes_bit_for_bit(double_quant):
    functional = pytest.importorskip('bitsandbytes.functional')
    W = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    parts = encode(W, 'nf4', double_quant)
    packed, how = functional.quantize_4bit(W, blocksize=64, quant_type='nf4', compress_statistics=double_quant)
    assert torch.equal(parts[''].view(-1), packed.view(-1)) and torch.equal(parts['_absmax'], how.absmax)
    assert torch.equal(decode(parts, W.shape, torch.float32), functional.dequantize_4bit(packed, how))
    assert parts['_absmax'].dtype == (torch.uint8 if double_quant else torch.float32)


def test_nf4_is_the_nearest_of_sixteen_values_times_the_largest_of_64_and_errs_by_9_per_cent():
    W = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    decoded = decode(encode(W), W.shape, torch.float32)
    code, blocks = torch.tensor(NF4), W.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = torch.bucketize(blocks / scale, (code[1:] + code[:-1]) / 2)
    torch.testing.assert_close(decoded.view(-1, 64), code[nearest] * scale, atol=1e-6, rtol=1e-6)
    assert abs((decoded - W).norm() / W.norm() - 0.092) < 0.002


@pytest.mark.parametrize('double_quant', [False, True])
@pytest.mark.parametrize('shape', [(33, 7), (5461 // 43, 48)])
def test_blocks_run_across_rows_that_are_not_whole_blocks(shape, double_quant):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    decoded = decode(encode(W, 'nf4', double_quant), shape, torch.float32)
    assert decoded.shape == shape and (decoded - W).norm() < 0.11 * W.norm()


# ---- the layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('quantize', ['nf4', 'none'])
@pytest.mark.parametrize('tokens', [1, 200])  # few go through the factors, many through W_q + s P B
@pytest.mark.parametrize('shape', SHAPES)
def test_forward_and_backward_are_autograds_on_the_dense_weight(shape, tokens, quantize):
    layer = layer_of(shape, quantize=quantize)
    x = torch.randn(2, tokens, shape[1], requires_grad=True)
    delta = torch.randn(2, tokens, shape[0])
    (layer(x) * delta).sum().backward()
    W = whole(layer).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    y = x2 @ W.T
    (y * delta).sum().backward()
    torch.testing.assert_close(layer(x), y, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(x.grad, x2.grad, atol=1e-4, rtol=1e-5)
    P, G = layer.read('P', torch.float32), W.grad.T if layer.tall else W.grad
    torch.testing.assert_close(layer.B.grad, layer.scale * P.T @ G, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(layer.dense_weight(), W.detach())


@pytest.mark.parametrize('shape', SHAPES)
def test_gradient_of_B_is_s_P_transposed_G_to_1e_5(shape):
    layer = layer_of(shape, quantize='none')
    x, delta = torch.randn(50, shape[1]), torch.randn(50, shape[0])
    (layer(x) * delta).sum().backward()
    G = delta.T @ x
    expected = layer.scale * layer.P.T @ (G.T if layer.tall else G)
    assert (layer.B.grad - expected).norm() < 1e-5 * expected.norm()


def test_a_layer_with_bias_takes_an_nn_linears_place_and_both_learn():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    x, y = torch.randn(256, 20), torch.randint(0, 10, (256,))
    before = model(x)
    layers = replace_linears(model, rank=8)
    assert (model(x) - before).norm() < 0.02 * before.norm(), 'until the first merge in 8 bits'
    optimizer = LoQTAdamW(split_decay(model.parameters()), layers, total_steps=60, lr=1e-2, tau=20)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0] and model[0].bias.requires_grad
    assert len(list(model[0].parameters())) == 2


def test_between_forward_and_backward_no_whole_weight_is_alive():
    with LiveBytes() as live:
        layer = LoQTLinear(512, 512, rank=8)
        layer.started, layer.collect = True, False
        x = torch.zeros(3, 512, requires_grad=True)
        before = live.now
        y = layer(x)
        assert live.now - before < 512 * 512, 'less than a byte a weight'
        y.sum().backward()
    assert layer.W.nbytes == 512 * 512 // 2


# ---- merge -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('shape', SHAPES)
def test_a_merge_without_quantisation_leaves_the_forward_as_it_was(shape):
    layer = layer_of(shape, quantize='none')
    x, before = torch.randn(9, shape[1]), whole(layer)
    layer.G = torch.randn(shape)
    merge(layer)
    torch.testing.assert_close(layer.W, before)
    assert not layer.B.any()
    torch.testing.assert_close(layer(x), x @ before.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('shape', SHAPES)
def test_a_merge_equals_algorithm_2_written_out_with_half_a_step_ahead(shape):
    layer = layer_of(shape, compensation=3)
    W, G = whole(layer), torch.randn(shape)
    layer.G = G.clone()
    wide = (lambda A: A.T) if layer.tall else (lambda A: A)
    U = torch.linalg.svd(wide(G))[0][:, :4]
    layer.refresh = 'svd'
    merge(layer)
    P = decode(encode(U.contiguous()), U.shape, torch.float32)
    sign = torch.sign((P * layer.read('P', torch.float32)).sum(0))  # that of a singular vector is open
    assert (layer.read('P', torch.float32) - P * sign).norm() < 0.15 * P.norm()
    P = layer.read('P', torch.float32)
    rounds, B, before = [], torch.zeros(layer.B.shape), torch.zeros(layer.B.shape)
    for _ in range(3):
        What = wide(W) - 0.5 * P @ (1.5 * B - 0.5 * before)
        before = B
        Q = wide(decode(encode(wide(What).contiguous()), shape, torch.float32))
        B = torch.linalg.pinv(P) @ (wide(W) - Q) / 0.5
        rounds.append(((wide(W) - Q - 0.5 * P @ B).norm(), Q, B))
    _, Q, B = min(rounds, key=lambda found: found[0])
    torch.testing.assert_close(layer.read('W', torch.float32), wide(Q))
    torch.testing.assert_close(layer.B.detach(), B, atol=1e-5, rtol=1e-4)


def test_three_rounds_lose_no_more_than_five_of_the_papers_and_say_how_much():
    torch.manual_seed(0)
    P = torch.linalg.qr(torch.randn(256, 64))[0]
    fine = 0.02 * torch.randn(256, 512)
    merged = decode(encode(fine), fine.shape, torch.float32) + P @ (0.003 * torch.randn(64, 512))  # as after a period
    P = torch.linalg.qr(torch.randn(256, 64))[0]
    for W in (fine, merged):
        B, lost = torch.zeros(64, 512), []
        for _ in range(5):
            E = W - decode(encode(W - 0.5 * P @ B), W.shape, torch.float32)
            B = P.T @ E / 0.5
            lost.append(((E - 0.5 * P @ B).norm() / W.norm()).item())
        layer = LoQTLinear(512, 256, rank=64)
        B, parts, said = loqt.compensate(W, P, layer, 3)
        left = W - decode(parts, W.shape, torch.float32) - 0.5 * P @ B
        torch.testing.assert_close(said, left.norm() / W.norm(), rtol=1e-3, atol=0)
        assert said <= min(lost)


@pytest.mark.parametrize('shape', [(768, 2048), (2048, 768)])
def test_compensation_loses_at_most_70_per_cent_of_plain_quantisation_by_the_third_round(shape):
    torch.manual_seed(0)
    W, G = 0.02 * torch.randn(shape), matrix(768, 2048, decay=0.01)
    G = G.T if shape[0] > shape[1] else G
    left = []
    for rounds in range(5):
        layer = LoQTLinear(shape[1], shape[0], rank=256, compensation=rounds)
        layer.set_weight(W)
        layer.keep('rest', W - layer.read('W', torch.float32))
        layer.G = G.clone()
        W0 = layer.dense_weight()
        merge(layer)
        left.append(((W0 - whole(layer)).norm() / (W0 - decode(encode(W0), shape, torch.float32)).norm()).item())
    assert abs(left[0] - 1) < 1e-6 and left == sorted(left, reverse=True) and left[3] <= 0.70, left


@pytest.mark.parametrize('shape', [(48, 128), (128, 48), (64, 64)])
def test_basis_of_a_merge_holds_the_svds_energy_on_both_sides(shape):
    G = matrix(*shape)
    for quantize, loss in (('none', 1e-4), ('nf4', 1e-2)):
        layer = layer_of(shape, rank=10, started=False, quantize=quantize, refresh='svd')
        layer.G = G.clone()
        merge(layer)
        P, wide = torch.linalg.qr(layer.read('P', torch.float32))[0], G.T if layer.tall else G
        best = torch.linalg.svdvals(G)[:10].square().sum()
        assert (P.T @ wide).square().sum() > (1 - loss) * best
    assert LoQTLinear(8, 8, rank=2).refresh == 'subspace'


def test_the_first_backward_makes_P_and_compensates_for_a_weight_that_was_given():
    torch.manual_seed(0)
    W, x = 0.02 * torch.randn(64, 96), torch.randn(200, 96)
    layer = LoQTLinear(96, 64, rank=48)
    layer.set_weight(W)
    assert (layer.dense_weight() - W).norm() < 0.01 * W.norm() and not layer.started
    delta = torch.randn(200, 64)
    (layer(x) * delta).sum().backward()
    assert layer.started and layer.G is None and 'rest' not in dict(layer.named_buffers())
    assert (whole(layer) - W).norm() < 0.7 * 0.092 * W.norm()
    P = layer.read('P', torch.float32)
    assert (P.T @ P - torch.eye(48)).abs().max() < 0.1
    torch.testing.assert_close(layer.B.grad, layer.scale * P.T @ (delta.T @ x), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize('compensation,most', [(0, 0.095), (2, 0.07)])
def test_what_the_first_step_loses_of_given_weights_is_shown_and_compensation_makes_it_small(compensation, most):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 96))
    given = [linear.weight.detach().clone() for linear in model]
    layers = replace_linears(model, rank=24, compensation=compensation)
    optimizer = LoQTAdamW(split_decay(model.parameters()), layers, total_steps=60, lr=0.0)
    shown = []
    for _ in range(3):
        model(torch.randn(50, 96)).square().mean().backward()
        optimizer.step()
        shown.append(optimizer.metrics.pop('rounded', None))
    lost = [(whole(layer) - W).norm() / W.norm() for layer, W in zip(layers, given)]
    later = [  # of a merge of the same weights that takes only as many rounds as it is told
        loqt.compensate(W, layer.read('P', torch.float32), layer, compensation)[2] for layer, W in zip(layers, given)
    ]
    assert shown[0] < (0.99 if compensation else 1.01) * torch.stack(later).mean()
    torch.testing.assert_close(shown[0], torch.stack(lost).mean(), rtol=0.02, atol=0)  # 8 bits until then
    assert 0.05 < shown[0] < most and shown[1] is None and shown[2] is None


def test_merging_without_a_gradient_says_what_to_do():
    with pytest.raises(ValueError, match=r'collected no gradient: set .* before a backward'):
        merge(layer_of((12, 30)))


# ---- training ----------------------------------------------------------------------------------------------------


def test_without_quantisation_and_until_the_first_merge_it_is_galore(monkeypatch):
    """W_q + s P B with Adam on B moves as W with GaLore's update: one identity."""
    torch.manual_seed(0)
    for shape in SHAPES:
        W = torch.randn(shape)
        layer = LoQTLinear(shape[1], shape[0], rank=4, scale=0.25, quantize='none', refresh='svd')
        layer.set_weight(W)
        ours = LoQTAdamW([layer.B], [layer], 1000, lr=1e-2, eps=1e-12)
        dense = torch.nn.Linear(shape[1], shape[0], bias=False)
        dense.weight.data.copy_(W)
        galore = GaLoreAdamW(
            [dense.weight], lr=1e-2, rank=4, scale=0.25, refresh='svd', update_proj_gap=1000, eps=1e-12
        )
        for step in range(20):
            x = torch.randn(40, shape[1], generator=torch.Generator().manual_seed(step))
            for module, optimizer in ((layer, ours), (dense, galore)):
                module(x).pow(4).mean().backward()
                optimizer.step()
            torch.testing.assert_close(whole(layer), dense.weight.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('moments', ['reset', 'keep', 'rotate'])
def test_training_equals_algorithm_1_written_out(moments):
    """LoQT-nq on one layer, three merges, from the equations alone."""
    torch.manual_seed(0)
    W = torch.randn(12, 30)
    layer = LoQTLinear(30, 12, rank=4, scale=0.5, quantize='none', refresh='svd')
    layer.set_weight(W)
    optimizer = LoQTAdamW([layer.B], [layer], 30, lr=1e-2, tau=6, moments=moments)
    P, B = None, torch.zeros(4, 30)
    M, V, t = torch.zeros(4, 30), torch.zeros(4, 30), 0
    merged = []
    for step in range(24):
        x = torch.randn(40, 30, generator=torch.Generator().manual_seed(step))
        delta = torch.randn(40, 12, generator=torch.Generator().manual_seed(100 + step))
        G = delta.T @ x / 40
        if step == 0:
            P = orthonormal_basis(G, 4, 'svd')
        (layer(x) * delta / 40).sum().backward()
        optimizer.step()
        R, t = 0.5 * P.T @ G, t + 1
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R * R
        B = B - 1e-2 * (M / (1 - 0.9**t)) / ((V / (1 - 0.999**t)).sqrt() + 1e-8)
        if step in update_steps(30, 6)[1:]:
            merged.append(step)
            W, B = W + 0.5 * P @ B, torch.zeros(4, 30)
            old, P = P, orthonormal_basis(G, 4, 'svd')
            if moments == 'reset':
                M, V, t = 0 * M, 0 * V, 0
            elif moments == 'rotate':
                M, V = rotate_moments(M, V, P.T @ old, (0.9, 0.999), t)
        torch.testing.assert_close(whole(layer), W + 0.5 * P @ B, atol=1e-5, rtol=1e-5)
    assert merged == [6, 13, 20]


def test_accumulated_micro_batches_equal_one_large_batch():
    # from the second step on: the first P comes from the first micro-batch alone
    def run(parts):
        model, optimizer = model_and_optimizer(quantize='none', grad_clip=1e9, stagger=False)
        train(model, optimizer, 1)
        for step in range(1, 8):
            x = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(step))
            for i, part in enumerate(x.chunk(parts)):
                optimizer.last_micro_batch = i == parts - 1
                (model(part[:, :-1], part[:, 1:]) / parts).backward()
            optimizer.step()
        return torch.cat([W().flatten() for _, _, W in model.dense_weights()])

    torch.testing.assert_close(run(4), run(1), atol=2e-4, rtol=1e-3)


def test_a_saved_model_is_a_plain_one_with_the_merged_weights(tmp_path):
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 7)
    model.save_pretrained(tmp_path)
    plain = LLaMA.from_pretrained(tmp_path)
    x = torch.randint(0, 61, (2, 16))
    torch.testing.assert_close(plain(x), model(x), atol=1e-4, rtol=1e-4)
    assert plain.n_params() == model.n_params() == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize('per_layer', [False, True])
@pytest.mark.parametrize('stagger,accumulation', [(True, 1), (True, 4), (False, 1)])
def test_a_step_with_merges_takes_at_most_four_whole_weights_more_than_one_without(stagger, accumulation, per_layer):
    config = SimpleNamespace(**CONFIG | dict(update_proj_gap=28, stagger=stagger, per_layer=per_layer))
    shape = TINY | dict(n_embd=128, n_inner=352, vocab_size=31)
    peaks = []
    with LiveBytes() as live:
        model = LLaMA(ModelConfig(**shape), linear=loqt.linear(config))
        optimizer = loqt.setup(model, config)
        for _ in range(57):
            live.peak = live.now
            for micro in range(accumulation):
                x = torch.zeros(1, 17, dtype=torch.int64)
                optimizer.last_micro_batch = micro == accumulation - 1
                (model(x[:, :-1], x[:, 1:]) / accumulation).backward()
            optimizer.step()
            peaks.append(live.peak)
    ordinary, merging = max(peaks[2:28]), max(peaks[28:])
    assert stagger or ordinary < merging
    assert merging <= ordinary + 4 * 128 * 352 * 4, (ordinary, merging)
    assert peaks[0] <= ordinary + 4 * 128 * 352 * 4, 'nor does the first step, in which all P are made'


def test_weight_decay_leaves_the_factors_alone():
    _, optimizer = model_and_optimizer(weight_decay=0.1)
    assert all(optimizer.group_of[B]['weight_decay'] == 0 for B in optimizer.layers)
    assert sum(group['weight_decay'] == 0.1 for group in optimizer.param_groups) == 1


def test_a_dropped_gradient_is_not_merged():
    model, optimizer = model_and_optimizer(update_proj_gap=1, stagger=False, grad_clip=1e9)
    train(model, optimizer, 1)
    x = torch.zeros(1, 4, dtype=torch.int64)
    model(x, x).backward()
    assert all(layer.next is not None for layer in optimizer.layers.values())
    optimizer.zero_grad()
    assert all(layer.next is None and B.grad is None for B, layer in optimizer.layers.items())


def test_impossible_arguments_name_the_thing_and_what_to_type():
    for arguments, message in (
        (dict(rank=0), 'rank=0, .* cannot be: use at least 1'),
        (dict(quantize='int4'), "quantize='int4' is not known: use 'nf4' or 'none'"),
        (dict(refresh='qr'), "refresh='qr' is not known: use 'subspace', 'svd', 'sara' or 'random'"),
    ):
        with pytest.raises(ValueError, match=message):
            LoQTLinear(8, 8, **arguments)
    with pytest.raises(ValueError, match="moments='turn' is not known: use 'reset', 'keep' or 'rotate'"):
        LoQTAdamW([], [], 10, moments='turn')
