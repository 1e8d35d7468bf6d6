"""galore.py against the algorithm written out, torch's Adam and SGD in a rotated basis, and the SVD."""

from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode

import adam
import galore
from adam import read_state
from configurator import method_of
from galore import GaLoreAdamW, Shadow, orthonormal_basis, rotate_moments
from memory.record import LiveBytes
from model import SIZES, LLaMA, ModelConfig

TINY = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=56, vocab_size=61, block_size=16)
CONFIG = dict(learning_rate=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.0, rank=8, update_proj_gap=3, scale=0.25)
CONFIG |= dict(refresh='subspace', stagger=True, state_bits=32, grad_clip=0.0, per_layer=False, offload=False, seed=0)
CONFIG |= dict(method='galore', moments='keep', basis_bits=16, compile=False, project_tables=False, proj_type='std')
CONFIG |= dict(lazy=0.0, weight_bits=16, tensorwise=False)  # of relatives


def model_and_optimizer(dtype=torch.float32, checkpointing=False, attached=True, **changes):
    """attached: do the layers give R in backward, or is this a loop of torch's own gradients?"""
    model = LLaMA(ModelConfig(**TINY), dtype=dtype).materialise(seed=0)
    model.compute_dtype, model.checkpointing = torch.float32, checkpointing
    for p in model.parameters():  # large enough weights that gradients are of a common size
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    config = SimpleNamespace(**CONFIG | changes)
    with nullcontext() if attached else mock.patch.object(GaLoreAdamW, 'attach', lambda self, linears: None):
        return model, method_of(config).setup(model, config)


def train(model, optimizer, steps, accumulation=1, first=0):
    for step in range(first, first + steps):
        for micro in range(accumulation):
            generator = torch.Generator().manual_seed(1000 * step + micro)
            x = torch.randint(0, 61, (4, 17), generator=generator)
            optimizer.last_micro_batch = micro == accumulation - 1
            (model(x[:, :-1], x[:, 1:]) / accumulation).backward()
        optimizer.step()
    return model


def matrix(m, n, decay=0.2, seed=0):
    """A random matrix with a falling spectrum, as gradients have."""
    torch.manual_seed(seed)
    U, V = torch.linalg.qr(torch.randn(m, m))[0], torch.linalg.qr(torch.randn(n, n))[0]
    k = min(m, n)
    return U[:, :k] @ torch.diag(torch.exp(-decay * torch.arange(k))) @ V[:, :k].T


def energy(P, G):
    return (P.T @ G).square().sum() / G.square().sum()


@pytest.mark.parametrize('refresh', ['svd', 'subspace'])
@pytest.mark.parametrize('shape', [(48, 128), (64, 64), (512, 1376)])
def test_basis_is_orthonormal(shape, refresh):
    G = torch.randn(shape)
    for previous in (None, orthonormal_basis(torch.randn(shape), 16, 'svd')):
        P = orthonormal_basis(G, 16, refresh, previous)
        assert P.shape == (shape[0], 16) and P.is_contiguous() and P.untyped_storage().nbytes() == P.nbytes
        assert (P.T @ P - torch.eye(16)).abs().max() < 1e-5


@pytest.mark.parametrize('rank', [1, 2, 64])
@pytest.mark.parametrize('shape', [(64, 80), (64, 64), (1, 5)])
def test_a_basis_keeps_nothing_alive_but_itself(shape, rank):
    for refresh in ('svd', 'subspace'):
        P = orthonormal_basis(random(*shape), rank, refresh)
        assert P.is_contiguous() and P.untyped_storage().nbytes() == P.nbytes == 4 * shape[0] * min(rank, shape[0])


def test_svd_basis_captures_exactly_the_largest_singular_values():
    G = matrix(48, 128)
    S = torch.linalg.svdvals(G)
    P = orthonormal_basis(G, 10, 'svd')
    torch.testing.assert_close((P.T @ G).square().sum(), S[:10].square().sum())


def test_subspace_refresh_follows_a_turning_gradient_to_98_percent_of_the_svd():
    G = matrix(48, 128)
    P = orthonormal_basis(G, 10)
    assert energy(P, G) > 0.98 * energy(orthonormal_basis(G, 10, 'svd'), G), 'from a random sketch'
    for turn in range(1, 4):
        G = G + 0.3 * matrix(48, 128, seed=turn)
        stale, P = P, orthonormal_basis(G, 10, 'subspace', P)
        best = energy(orthonormal_basis(G, 10, 'svd'), G)
        assert energy(P, G) > 0.98 * best > energy(stale, G)


def test_subspace_refresh_keeps_the_direction_of_the_columns():
    # QR alone turns about a third of them round, and with them the moments that were gathered along them
    G = matrix(48, 128)
    P = orthonormal_basis(G, 10)
    for turn in range(5):
        old, P = P, orthonormal_basis(G + 0.05 * matrix(48, 128, seed=turn), 10, 'subspace', P)
        assert ((old * P).sum(0) > 0).all()


def test_rank_beyond_the_smaller_side_is_the_whole_space_and_a_zero_gradient_is_no_trouble():
    assert orthonormal_basis(matrix(8, 20), 64).shape == (8, 8)
    for refresh in ('svd', 'subspace'):
        P = orthonormal_basis(torch.zeros(8, 20), 4, refresh)
        assert (P.T @ P - torch.eye(4)).abs().max() < 1e-5


@pytest.mark.parametrize('shape', [(12, 30), (30, 12), (12, 12)])
def test_full_rank_walks_adams_path_in_the_rotated_basis(shape):
    """With r = min(m, n), scale 1 and one P, GaLore is torch's Adam on Y = P.T W, whose gradient is P.T G."""
    W = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    optimizer = GaLoreAdamW([W], lr=1e-2, rank=12, update_proj_gap=10**6, scale=1.0, refresh='svd', stagger=False)
    target = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    tall = shape[0] >= shape[1]
    for step in range(20):
        (W - target).pow(4).sum().backward()
        if step == 0:
            P = optimizer.basis(W).clone()
            assert torch.equal(P, orthonormal_basis(W.grad.T if tall else W.grad, 12, 'svd'))
            Y = torch.nn.Parameter(P.T @ (W.T if tall else W).detach())
            adam = torch.optim.Adam([Y], lr=1e-2)
        rotated_back = (P @ Y.detach()).T if tall else P @ Y.detach()
        torch.testing.assert_close(W.detach(), rotated_back, atol=1e-5, rtol=1e-5)
        G = 4 * (rotated_back - target).pow(3)
        Y.grad = P.T @ (G.T if tall else G)
        optimizer.step()
        adam.step()


@pytest.mark.parametrize('shape', [(12, 30), (30, 12)])
def test_full_rank_with_sgd_in_adams_place_is_minus_lr_G(shape, monkeypatch):
    monkeypatch.setattr(galore, 'adam_direction', lambda R, state, *_: R)
    for refresh in ('svd', 'subspace'):
        W = torch.nn.Parameter(torch.randn(shape))
        before, G = W.detach().clone(), torch.randn(shape)
        optimizer = GaLoreAdamW([W], lr=0.1, rank=12, scale=1.0, refresh=refresh)
        (W * G).sum().backward()
        optimizer.step()
        torch.testing.assert_close(W.detach() - before, -0.1 * G, atol=1e-5, rtol=1e-5)


def test_step_equals_the_papers_algorithm_written_out():
    """Algorithm 2 with numbers kept apart from our code: r = 4 of 12, T = 3, alpha = 0.25, 8 steps."""
    torch.manual_seed(0)
    W = torch.nn.Parameter(torch.randn(12, 30))
    w, M, V = W.detach().clone(), torch.zeros(4, 30), torch.zeros(4, 30)
    optimizer = GaLoreAdamW([W], lr=1e-2, rank=4, update_proj_gap=3, scale=0.25, refresh='svd', stagger=False)
    for t in range(8):
        G = torch.randn(12, 30)
        if t % 3 == 0:
            P = torch.linalg.svd(G)[0][:, :4]
        R = P.T @ G
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R * R
        w -= 1e-2 * 0.25 * P @ (M / (1 - 0.9 ** (t + 1)) / ((V / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8))
        (W * G).sum().backward()
        optimizer.step()
        torch.testing.assert_close(W.detach(), w, atol=1e-6, rtol=1e-5)


def refreshes(monkeypatch, stagger, T, layers, steps):
    """{layer: the steps at which it got a new P}"""
    seen = {}
    original = GaLoreAdamW.new_basis

    def spy(self, p, *more, **how):
        seen.setdefault(self.index_of[p], []).append(self.state[p].get('step', 0))
        original(self, p, *more, **how)

    monkeypatch.setattr(GaLoreAdamW, 'new_basis', spy)
    parameters = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(layers)]
    optimizer = GaLoreAdamW(parameters, rank=2, update_proj_gap=T, stagger=stagger)
    for _ in range(steps):
        sum((p * torch.randn(4, 6)).sum() for p in parameters).backward()
        optimizer.step()
    return seen


def test_refreshes_come_at_0_T_2T_and_staggered_ones_take_turns(monkeypatch):
    assert refreshes(monkeypatch, False, T=5, layers=2, steps=16) == {0: [0, 5, 10, 15], 1: [0, 5, 10, 15]}
    assert refreshes(monkeypatch, True, T=6, layers=3, steps=14) == {0: [0, 6, 12], 1: [0, 2, 8], 2: [0, 4, 10]}


def dense(model, optimizer):
    """{name: weight}, int8 weights decoded."""
    weight = getattr(optimizer, 'weight', lambda p: p)
    return {name: weight(p).detach().clone() for name, p in model.named_parameters()}


@cache
def drop_in_weights(accumulation):
    """The weights after 50 steps on gradients that torch made."""
    model, optimizer = model_and_optimizer(attached=False)
    assert not optimizer.attached
    return dense(train(model, optimizer, 50, accumulation), optimizer)


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('per_layer', [False, True])
@pytest.mark.parametrize('accumulation', [1, 2, 8])
def test_backward_that_gives_R_walks_the_path_of_the_ordinary_one(accumulation, per_layer, checkpointing):
    model, optimizer = model_and_optimizer(per_layer=per_layer, checkpointing=checkpointing)
    assert len(optimizer.attached) == 14
    found = dense(train(model, optimizer, 50, accumulation), optimizer)
    torch.testing.assert_close(found, drop_in_weights(accumulation), atol=1e-5, rtol=0)


class Made(LiveBytes):
    """While active: the sizes, in fp32 numbers, of all storages that are made."""

    def __init__(self, tensors):
        super().__init__()
        self.sizes = []
        for tensor in tensors:
            self.seen[tensor.untyped_storage()] = 0  # these were there before

    def add(self, storage, *what):
        if storage not in self.seen:
            self.sizes.append(storage.nbytes() / 4)
        super().add(storage, *what)


FULL = {1024, 512, 1792}  # m n of q and o, of k and v, of gate, up and down


def full_sized_made_in_backward(steps, **changes):
    """The sizes among FULL of what the backward after `steps` steps makes. With 3 x 7 tokens no activation (336, 672,
    1176, 588), basis (128, 256), R (256, 448) or gradient of embedding and head (1952) has such a size."""
    model, optimizer = model_and_optimizer(**changes)
    train(model, optimizer, steps)
    tokens = torch.randint(0, 61, (3, 8), generator=torch.Generator().manual_seed(0))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    before = dense(model, optimizer)
    with Made([*model.parameters(), *states]) as made:
        loss.backward()
    if changes.get('per_layer'):  # the update ran in this backward, too
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {p.numel() for p in optimizer.offset} == FULL and 1952 in made.sizes
    return sorted(size for size in made.sizes if size in FULL)


@pytest.mark.parametrize('per_layer', [False, True])
def test_between_refreshes_nothing_of_the_size_of_G_is_made_in_backward(per_layer):
    assert full_sized_made_in_backward(1, update_proj_gap=10**6, per_layer=per_layer) == []
    # the drop-in path does make them: at least one for each of the 14 weights
    drop_in = full_sized_made_in_backward(1, update_proj_gap=10**6, per_layer=per_layer, attached=False)
    assert len(drop_in) >= 14 and set(drop_in) == FULL


@pytest.mark.parametrize('per_layer', [False, True])
def test_a_layer_that_is_due_makes_its_own_G_and_no_other(per_layer):
    # T = 14 and 14 layers: step i is the turn of layer i. 1: a k_proj, 4: a gate_proj
    assert full_sized_made_in_backward(1, update_proj_gap=14, per_layer=per_layer) == [512]
    assert full_sized_made_in_backward(4, update_proj_gap=14, per_layer=per_layer) == [1792]


def test_only_the_layer_that_is_due_holds_a_full_gradient_while_accumulating():
    model, optimizer = model_and_optimizer(update_proj_gap=14)
    train(model, optimizer, 5)
    optimizer.last_micro_batch = False
    x = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(0))
    model(x[:, :-1], x[:, 1:]).backward()
    assert [i for i, p in enumerate(optimizer.offset) if not isinstance(p.grad, Shadow)] == [5]
    assert [i for i, p in enumerate(optimizer.offset) if optimizer.placeholder[p].grad is None] == [5]


@pytest.mark.parametrize('accumulation', [2, 8])
def test_per_layer_equals_normal_in_a_loop_that_attaches_nothing(accumulation):
    # here R is a sum of projections in one mode, the projection of a sum in the other
    weights = []
    for per_layer in (False, True):
        model, optimizer = model_and_optimizer(attached=False, per_layer=per_layer)
        weights.append(dense(train(model, optimizer, 7, accumulation), optimizer))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)


def test_per_layer_equals_normal_under_activation_checkpointing():
    normal = train(*model_and_optimizer(), steps=4, accumulation=2)
    per_layer = train(*model_and_optimizer(per_layer=True, checkpointing=True), steps=4, accumulation=2)
    for p, q in zip(normal.parameters(), per_layer.parameters()):
        assert (p - q).abs().max() < 1e-6


def test_accumulated_micro_batches_equal_one_large_batch():
    x = torch.randint(0, 61, (8, 17), generator=torch.Generator().manual_seed(0))
    weights = []
    for pieces in (1, 4):
        model, optimizer = model_and_optimizer(per_layer=True)
        model(x[:, :-1], x[:, 1:]).backward()  # step 0 from the whole batch, so that both start with the same P
        optimizer.step()
        for i, piece in enumerate(x.chunk(pieces)):
            optimizer.last_micro_batch = i == pieces - 1
            (model(piece[:, :-1], piece[:, 1:]) / pieces).backward()
        optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)


def test_between_refreshes_per_layer_keeps_no_full_gradient_while_accumulating():
    model, optimizer = model_and_optimizer(per_layer=True, update_proj_gap=10**6)
    train(model, optimizer, 1)
    optimizer.last_micro_batch = False
    x = torch.randint(0, 61, (4, 17))
    model(x[:, :-1], x[:, 1:]).backward()
    for p in optimizer.offset:
        assert isinstance(p.grad, Shadow) and optimizer.placeholder[p].shape == (8, max(p.shape))


def test_setup_projects_the_blocks_linear_layers_and_nothing_else():
    model, optimizer = model_and_optimizer()
    projected = {name for name, p in model.named_parameters() if p in optimizer.offset}
    kinds = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')
    assert projected == {n for n, _ in model.named_parameters() if n.split('.')[-2] in kinds} and len(projected) == 14
    assert optimizer.group_of[model.head]['rank'] == optimizer.group_of[model.norm.weight]['rank'] == 0


@pytest.mark.parametrize(
    'size,r,nbytes',
    [('60m', 128, 163_743_744), ('130m', 256, 342_961_152), ('350m', 256, 652_808_192), ('1b', 512, 2_084_921_344)],
)
def test_state_has_the_papers_number_of_elements(size, r, nbytes):
    """GaLore's table 1 at two bytes a number: P (m r) and two moments (n r) of a projected weight, else two moments.

    Counted from the state of one real step on fake tensors, with one of the blocks, which are all alike."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = LLaMA(ModelConfig(**SIZES[size] | dict(n_layer=1), block_size=4))
        optimizer = galore.setup(model, SimpleNamespace(**CONFIG | dict(rank=r)))
        tokens = torch.zeros(1, 4, dtype=torch.int64)
        model(tokens, tokens).backward()
        optimizer.step()
    found = 0
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        assert ('P' in state) == name.endswith('_proj.weight')
        numbers = sum(state[key].numel() for key in ('P', 'M', 'V') if key in state)
        found += 2 * numbers * (SIZES[size]['n_layer'] if name.startswith('layers.') else 1)
    assert found == nbytes


def test_small_updates_reach_bf16_weights_on_average():
    """The end of our 7B's cosine, 0.0005, and W of std 0.02: two updates in three are under half a step of bf16."""
    draw = torch.Generator().manual_seed(0)
    drift = 0.3 * torch.randn(256, 256, generator=draw)  # the mean of the gradients, whose noise is 1
    W = torch.nn.Parameter((0.02 * torch.randn(256, 256, generator=draw)).bfloat16())
    optimizer = GaLoreAdamW([W], lr=0.0, rank=128, scale=0.25)

    def step():
        (W * (drift + torch.randn(256, 256, generator=draw)).bfloat16()).sum().backward()
        optimizer.step()

    for _ in range(20):  # at rate 0: the moments fill, and N gets its usual size
        step()
    start, optimizer.lr = W.detach().clone(), 5e-4
    intended, applied, nearest = torch.zeros(3, 256, 256)
    for _ in range(250):
        before = W.detach().clone()
        step()
        applied += W.detach().float() - before.float()
        state = optimizer.state[W]
        t, P = state['fill'], state['P'].float()
        N = state['M'] / (1 - 0.9**t) / ((state['V'] / (1 - 0.999**t)).sqrt() + 1e-8)
        wanted = -5e-4 * 0.25 * (P @ N).T  # of a square matrix P stands on the inputs' side
        intended += wanted
        nearest += (before.float() + wanted).bfloat16().float() - before.float()
        W.data.copy_(start)

    def agreement(moved):
        return torch.nn.functional.cosine_similarity(moved.flatten(), intended.flatten(), dim=0)

    assert agreement(applied) > 0.99
    assert agreement(nearest) < 0.9, 'rounding to the nearest would do as well: this test proves nothing'


def test_projected_second_moment_follows_a_gradient_that_falls_tenfold():
    W = torch.nn.Parameter(torch.zeros(16, 64, dtype=torch.bfloat16))
    optimizer = GaLoreAdamW([W], rank=8, update_proj_gap=10**6)
    for step in range(2500):
        G = torch.randn(16, 64, generator=torch.Generator().manual_seed(step)) * (1.0 if step < 1000 else 0.1)
        (W * G).sum().backward()
        optimizer.step()
    V = optimizer.state[W]['V']
    before, after = 1 - 0.999**1000, 0.999**1500  # P is orthonormal: R's variance is G's
    expected = before * after + 0.01 * (1 - after)  # 0.149; moments in bf16 would stay above 0.6
    assert V.dtype == torch.float32 and abs(V.mean().item() / expected - 1) < 0.05


def test_it_learns_as_a_drop_in_in_an_ordinary_loop():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    optimizer = GaLoreAdamW(net.parameters(), lr=2e-2, rank=8, update_proj_gap=20)
    teacher, losses = torch.randn(16, 4), []
    for _ in range(200):
        x = torch.randn(32, 16)
        loss = torch.nn.functional.cross_entropy(net(x), (x @ teacher).argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_gradient_that_was_set_by_hand_serves_as_well_as_one_of_backward():
    G = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    by_backward, by_hand = (torch.nn.Parameter(torch.zeros(12, 30)) for _ in range(2))
    first, second = GaLoreAdamW([by_backward], rank=4), GaLoreAdamW([by_hand], rank=4)
    (by_backward * G).sum().backward()
    by_hand.grad = G.clone()
    first.step()
    second.step()
    assert torch.equal(by_backward, by_hand) and by_hand.abs().max() > 0


def test_a_mistyped_argument_is_refused():
    with pytest.raises(TypeError, match='update_proj_gp'):
        GaLoreAdamW([torch.nn.Parameter(torch.zeros(2, 2))], update_proj_gp=50)


def test_impossible_arguments_name_the_thing_and_what_to_type():
    with pytest.raises(ValueError, match="use 'subspace', 'svd', 'sara' or 'random'"):
        GaLoreAdamW([torch.nn.Parameter(torch.zeros(2, 2))], refresh='qr')
    for name, value, choices in (
        ('basis_bits', 2, '16, 8 or 4'),
        ('moments', 'x', "'keep', 'rotate' or 'reset'"),
    ):
        with pytest.raises(ValueError, match=f'^{name}={value!r} is not known: use {choices}$'):
            GaLoreAdamW([torch.nn.Parameter(torch.zeros(2, 2))], **{name: value})
    with pytest.raises(ValueError, match=r'update_proj_gap=0 .* use 1 or more'):
        GaLoreAdamW([torch.nn.Parameter(torch.zeros(2, 2))], update_proj_gap=0)


# ---- moments when P turns ------------------------------------------------------------------------------------------

BETAS = (0.9, 0.999)


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
    new_M, new_V = rotate_moments(M, V, Q, BETAS, 12)
    torch.testing.assert_close(new_M, M[order] * signs[:, None], rtol=1e-6, atol=0)
    torch.testing.assert_close(new_V, V[order], rtol=1e-5, atol=0)
    for new, old in zip(rotate_moments(M, V, torch.eye(5), BETAS, 12), (M, V)):
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
    found_M, found_V = rotate_moments(M, V, Q, BETAS, t)
    torch.testing.assert_close(found_M, wanted_M, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_V, wanted_V, rtol=1e-4, atol=1e-7)
    assert negative, 'no element where the absolute value matters'


@pytest.mark.parametrize('bits', [32, 8])
@pytest.mark.parametrize('shape', [(12, 30), (30, 12)])
@pytest.mark.parametrize('how', ['keep', 'rotate', 'reset'])
def test_moments_at_a_refresh(how, shape, bits, monkeypatch):
    monkeypatch.setattr(adam, 'SMALLEST_8BIT', 64)  # else these 120 numbers would stay in fp32
    W, tall = torch.nn.Parameter(torch.zeros(shape)), shape[0] >= shape[1]
    options = dict(rank=4, update_proj_gap=3, refresh='svd', stagger=False, moments=how, state_bits=bits)
    optimizer = GaLoreAdamW([W], **options)
    for step in range(3):
        give(optimizer, W, random(*shape, seed=step))
    state = optimizer.state[W]
    old, M, V = state['P'].clone(), read_state(state, 'M').clone(), read_state(state, 'V').clone()
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
        off = (read_state(state, name) - wanted).norm() / wanted.norm()
        assert off < (1e-5 if bits == 32 else 0.05), (name, off)


# ---- bases in 8 and 4 bits -----------------------------------------------------------------------------------------

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
    for attached in (False, True):
        model, optimizer = model_and_optimizer(basis_bits=bits, attached=attached)
        weights.append(dense(train(model, optimizer, 10, accumulation=2), optimizer))
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)
