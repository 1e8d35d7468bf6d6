"""coreset.py against brute force, per-example autograd and finite differences; that it touches nothing; and its way
through training with every method."""

import io
import itertools
import os
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run, tiny, values
from safetensors.torch import load_file
from test_galore import CONFIG as GALORE
from test_loqt import CONFIG as LOQT

import adam
import configurator
import coreset
import galore
import loqt
import lora
import train as training
from coreset import Coreset, budgets, facility_location, features, gram, naive_facility_location, select
from data.batches import read_meta
from head import trained_rows
from memory import trace
from memory.record import LiveBytes
from model import Linear, LLaMA, ModelConfig, ModelError
from plumbing import build, checkpoint

TINY = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_inner=56, vocab_size=61, block_size=32)
CONFIG = LOQT | GALORE | dict(learning_rate=1e-3, moments='keep', update_proj_gap=4)
CONFIG |= dict(dropout=0.0, merge_every=0, train_rest='auto', targets='all', init_from='scratch')
CONFIG |= dict(rslora=False, lora_plus=1.0)
METHODS = {'adamw': adam, 'galore': galore, 'loqt': loqt, 'lora': lora}


def model_and_optimizer(method='adamw', dtype=torch.float32, checkpointing=False, **changes):
    config = SimpleNamespace(**CONFIG | dict(method=method) | changes)
    module = METHODS[method]
    linear = module.linear(config) if hasattr(module, 'linear') else Linear
    model = LLaMA(ModelConfig(**TINY), dtype=dtype, linear=linear).materialise(seed=0)
    model.compute_dtype, model.checkpointing = torch.float32, checkpointing
    for p in model.parameters():  # large enough weights that gradients are of a common size
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    return model, module.setup(model, config)


def tokens_of(n, T=32, seed=0):
    rows = torch.randint(0, 61, (n, T + 1), generator=torch.Generator().manual_seed(seed))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def objective(A, chosen):
    return A[:, list(chosen)].max(1).sum()


def points(n, f=6, seed=0):
    x = torch.randn(n, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distance = torch.cdist(x, x)
    return (distance.max() - distance).numpy()


# ---- which examples --------------------------------------------------------------------------------------------------


def test_facility_location_makes_the_choices_of_its_definition():
    for seed in range(100):
        n = 5 + seed % 50
        A, k = points(n, seed=seed), 1 + seed % (n - 1)
        A = A if seed % 2 else A * np.random.default_rng(seed).random((n, n))  # similarities need not be symmetric
        whole = np.round(20 * A)  # sums of these are exact: the first of equal gains is chosen in both
        assert torch.equal(facility_location(whole, k), naive_facility_location(whole, k))
        chosen = facility_location(A, k)  # rounding decides between equal gains, such as those of mutual neighbours
        assert chosen.shape == (k,) and len(set(chosen.tolist())) == k
        assert objective(A, chosen) == pytest.approx(objective(A, naive_facility_location(A, k)), rel=1e-6)


def test_the_greedy_choice_is_near_the_optimum():
    A = points(12)
    best = max(objective(A, subset) for subset in itertools.combinations(range(12), 4))
    assert objective(A, facility_location(A, 4)) >= 0.95 * best


def test_facility_location_takes_all_none_negative_and_equal_similarities():
    A = points(9)
    assert sorted(facility_location(A, 9).tolist()) == list(range(9)) and len(facility_location(A, 0)) == 0
    shifted = facility_location(A - 100, 4)
    assert objective(A, shifted) == pytest.approx(objective(A, facility_location(A, 4))), 'a constant changes nothing'
    assert len(set(facility_location(np.zeros((7, 7)), 5).tolist())) == 5, 'twins are told apart'
    with pytest.raises(ValueError, match=r'use \(n, n\) and k up to n'):
        facility_location(A, 10)


def test_budgets_sum_to_k_and_are_those_of_the_paper_on_1000_random_compositions():
    rng = random.Random(0)
    for trial in range(1000):
        counts = [rng.randint(1, 60) for _ in range(rng.randint(1, 14))]
        sources = rng.sample([q for q, n in enumerate(counts) for _ in range(n)], sum(counts))
        k = rng.randint(0, len(sources))
        small = [q for q in range(len(counts)) if rng.random() < 0.4]
        take = budgets(sources, k, small)
        assert sum(take.values()) == k and all(0 <= take[q] <= counts[q] for q in take)
        kept = sum(counts[q] for q in small)
        if kept <= k:
            assert all(take[q] == counts[q] for q in small)
        else:
            assert sum(take[q] for q in small) == k, 'more of them than the budget: still exactly the budget'
        large, left = [q for q in take if q not in small], k - min(kept, k)
        floor = {q: counts[q] * left // max(len(sources) - kept, 1) for q in large}
        raised = sorted(large, key=lambda q: (floor[q], q))[: left - sum(floor.values())]
        assert all(take[q] == floor[q] + (q in raised) for q in large), 'rounded down, and up for the smallest first'
        if trial % 5 == 0:  # the same with features
            chosen = select(torch.randn(len(sources), 3), sources, k, small, seed=trial)
            assert len(set(chosen.tolist())) == k
            assert np.bincount([sources[i] for i in chosen], minlength=len(counts)).tolist() == [
                take[q] for q in range(len(counts))
            ]
        capped = budgets(sources, k, small, cap=0.5)
        others = len(sources) - kept
        assert sum(capped.values()) == k
        assert sum(capped[q] for q in small) == max(min(kept, k // 2), k - others)


def test_the_kept_share_of_the_batch_is_r_times_that_of_the_pool():
    sources = [0] * 187 + [1] * 69  # MathInstruct's 27 %, at ratio 2 and at ratio 4
    for r, k in ((2, 128), (4, 64)):
        assert budgets(sources, k, small=[1])[1] / k == min(1, r * 69 / 256 if k > 69 else 1)


def test_select_takes_one_of_each_planted_group_and_random_choice_repeats_by_seed():
    centres = 10 * torch.eye(8)
    of = torch.tensor(random.Random(0).choices(range(8), k=120) + list(range(8)))
    x = centres[of] + 0.1 * torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
    chosen = select(x, [0] * 128, 8)
    assert sorted(of[chosen].tolist()) == list(range(8))
    a, b, c = (select(None, [0] * 128, 30, seed=seed) for seed in ((1, 5), (1, 5), (1, 6)))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(a, a.sort().values)
    with pytest.raises(ValueError, match='use a larger pool'):
        select(None, [0, 0], 3)


def test_cluster_weights_count_what_each_stands_for():
    distance = torch.tensor([[0.0, 1, 9, 9], [1, 0, 9, 9], [9, 9, 0, 9], [9, 9, 9, 0]])
    weights = coreset.cluster_weights(torch.tensor([0, 2, 3]), [0, 0, 0, 1], distance)
    torch.testing.assert_close(weights, torch.tensor([2.0, 1.0, 1.0]) * 3 / 4)
    weights = coreset.cluster_weights(torch.tensor([0, 3]), [0, 0, 0, 1])
    torch.testing.assert_close(weights, torch.tensor([1.5, 0.5]))


def test_weights_of_the_loss_are_factors_on_examples():
    model, _ = model_and_optimizer()
    x, y = tokens_of(4)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.5])
    each = torch.stack([model(x[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(x, y, weights=weights), (each * weights).mean())
    assert torch.equal(model(x, y), model(x, y, weights=torch.ones(4)))
    wanted = torch.autograd.grad((each * weights).mean(), list(model.parameters()))
    found = torch.autograd.grad(model(x, y, weights=weights), list(model.parameters()))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


# ---- features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_example_losses_are_means_over_own_targets_with_their_gradient(dtype):
    x, W = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((5, 300, 16), (61, 16)))
    x, W, y = x.to(dtype).requires_grad_(), W.to(dtype), tokens_of(5, 300)[1]  # 1,500 rows: two full pieces and a part
    y[0, 7:] = -100
    y[3] = -100
    sums = [F.cross_entropy((x[i] @ W.T).float(), y[i], reduction='sum') for i in range(5)]
    each = torch.stack(sums) / (y != -100).sum(1).clamp_min(1)
    wanted = torch.autograd.grad(each.sum(), x)[0]
    for trained in (None, trained_rows(y)):
        losses, dx = coreset.example_losses(x.detach(), W, y, True, trained=trained)
        without = coreset.example_losses(x.detach(), W, y, trained=trained)[0]
        assert torch.equal(losses, without) and losses.dtype == torch.float64
        torch.testing.assert_close(losses.float(), each.detach())
        torch.testing.assert_close(dx, wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def per_example_gradients(model, x, y):
    """(n, out, in), by autograd: of the last V projection's weight, of LoRA's B."""
    v_proj = model.layers[-1].self_attn.v_proj
    if hasattr(v_proj, 'A'):
        return torch.stack([torch.autograd.grad(model(x[i : i + 1], y[i : i + 1]), v_proj.B)[0] for i in range(len(x))])
    W = (v_proj.dense_weight() if hasattr(v_proj, 'dense_weight') else v_proj.weight).detach().clone().requires_grad_()
    with v_proj.register_forward_hook(lambda m, args, out: args[0] @ W.T):
        return torch.stack([torch.autograd.grad(model(x[i : i + 1], y[i : i + 1]), W)[0] for i in range(len(x))])


@pytest.mark.parametrize('method', METHODS)
def test_exact_gradients_are_those_of_per_example_autograd_and_zo_their_products_with_z(method):
    model, optimizer = model_and_optimizer(method)
    x, y = tokens_of(9)
    y[0, 7:] = -100
    y[3, :20] = -100
    for step in range(2):
        training.training_step(model, optimizer, [tokens_of(4, seed=step)], 1e-2, 'cpu')
    wanted = per_example_gradients(model, x, y)
    found = features(model, x, y, 'grad', batch_size=4)
    G = torch.einsum('bto,bti->boi', found['D'], found['X'])
    assert (G - wanted).abs().max() < 1e-5 * wanted.abs().max()
    exact = torch.einsum('aoi,boi->ab', wanted.double(), wanted.double())
    assert (gram(found['X'], found['D']) - exact).abs().max() < 1e-5 * exact.abs().max()
    p = features(model, x, y, 'zo', batch_size=4, directions=16, seed=3)['p']
    z = [torch.randn(G[0].shape, generator=torch.Generator().manual_seed(300_009 + j)) for j in range(16)]
    along = torch.einsum('boi,joi->bj', wanted, torch.stack(z))
    assert ((p - along).abs() / along.abs()).median() < 1e-3


def test_a_gram_matrix_in_pieces_is_that_of_one_piece(monkeypatch):
    X, D = torch.randn(7, 5, 12), torch.randn(7, 5, 6)
    whole = gram(X, D)
    monkeypatch.setattr(coreset, 'PIECE', 7 * 6 * 5)
    torch.testing.assert_close(gram(X, D), whole)


@pytest.mark.parametrize('feature', ['grad', 'zo', 'hidden'])
@pytest.mark.parametrize('blocks', [1, 2])
def test_fewer_blocks_give_the_features_of_a_model_that_has_no_more(feature, blocks):
    model, _ = model_and_optimizer()
    short = LLaMA(ModelConfig(**TINY | {'n_layer': blocks}), dtype=torch.float32)
    short.load_state_dict(model.state_dict(), strict=False)
    x, y = tokens_of(5)
    mine = features(model, x, y, feature, 2, directions=2, blocks=blocks)
    assert mine.keys() == {'grad': {'H', 'X', 'D'}, 'zo': {'H', 'p'}, 'hidden': {'H'}}[feature]
    for name, t in features(short, x, y, feature, 2, directions=2).items():
        assert torch.equal(mine[name], t) and t.abs().max() > 0, name


@pytest.mark.parametrize('depth, blocks', [(1.0, 3), (0.5, 2), (0.34, 1), (0.001, 1)])
def test_a_share_of_the_blocks_is_rounded_and_at_least_one(depth, blocks):
    model, _ = model_and_optimizer()
    ran = []
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    x, y = tokens_of(8)
    Coreset('grad', depth=depth).choose(model, x, y, [0] * 8, 2, 0, 8)
    assert ran == list(range(blocks))


def test_hidden_states_less_their_mean_are_compared_at_unit_length():
    model, _ = model_and_optimizer()
    x, y = tokens_of(6)
    y[:, 20:] = -100  # prompts and padding do not count
    with torch.no_grad():
        h, _ = model.before_last(x)
    H = h[:, :20].mean(1)
    H = F.normalize(H - H.mean(0))
    chooser = Coreset('hidden')
    found = chooser.look(model, x, y, 3)
    torch.testing.assert_close(coreset.unit_distance(chooser.compare(found)), torch.cdist(H, H), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('feature', ['grad', 'zo'])
def test_a_feature_is_the_same_alone_and_padded_beside_one_four_times_longer(feature):
    model, _ = model_and_optimizer()
    x, y = tokens_of(2)
    x[0, 8:], y[0, 8:] = 0, -100
    alone = features(model, x[:1, :8], y[:1, :8], feature, 1)
    beside = features(model, x, y, feature, 2)
    torch.testing.assert_close(beside['H'][:1], alone['H'], atol=1e-5, rtol=1e-5)
    if feature == 'grad':
        G = [torch.einsum('bto,bti->boi', f['D'][:1], f['X'][:1]) for f in (alone, beside)]
        assert (G[0] - G[1]).abs().max() < 1e-5 * G[0].abs().max()
    else:  # differences of losses that are 4 and end in their seventh digit, over 2 eps
        torch.testing.assert_close(beside['p'][:1], alone['p'], atol=5e-4, rtol=1e-3)


def snapshot(model, optimizer):
    """All that could have been touched, as a list to compare."""
    tensors = [*model.state_dict().items()]
    tensors += [(name, t) for state in optimizer.state.values() for name, t in state.items()]
    kept = [(name, t.clone() if torch.is_tensor(t) else t) for name, t in tensors]
    kept += [('rng', torch.get_rng_state()), ('python', random.getstate()), ('numpy', str(np.random.get_state()))]
    for name, module in model.named_modules():
        flags = [getattr(module, flag, None) for flag in ('training', 'collect', 'started', 'G')]
        kept.append((name, (flags, len(module._forward_hooks), len(module._forward_pre_hooks))))
    kept += [(name, (p.grad, p.requires_grad)) for name, p in model.named_parameters()]
    kept += [('R', R.grad) for R in getattr(optimizer, 'R', {}).values()]
    return [*kept, ('precision', torch.get_float32_matmul_precision()), ('grad', torch.is_grad_enabled())]


def assert_untouched(before, after):
    for (name, a), (_, b) in zip(before, after, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, name


def test_dropout_is_off_while_choosing_and_on_again_after():
    model, optimizer = model_and_optimizer()
    for block in model.layers:
        block.mlp.down_proj = torch.nn.Sequential(torch.nn.Dropout(0.5), block.mlp.down_proj)
    model.layers[0].eval()
    x, y = tokens_of(12)
    before = snapshot(model, optimizer)
    for feature in ('grad', 'zo'):
        a, b = (Coreset(feature).choose(model, x, y, [0] * 12, 5, 0, 4)[0] for _ in range(2))
        assert torch.equal(a, b)
    assert_untouched(before, snapshot(model, optimizer))


def test_neither_kept_nor_unwanted_examples_run_through_the_model():
    model, _ = model_and_optimizer()
    x, y = tokens_of(20)
    seen = []
    with model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(args[0])):
        Coreset('grad', small=[1]).choose(model, x, y, [0] * 9 + [1] * 6 + [2] * 5, 12, 0, batch_size=4)
        assert torch.equal(torch.cat(seen), torch.cat([x[:9], x[15:]]))
        seen.clear()
        Coreset('random').choose(model, x, y, [0] * 20, 12, 0, batch_size=4)
        assert not seen


# ---- what the choice is worth ----------------------------------------------------------------------------------------


def all_gradients(model, x, y, weights=None):
    return torch.cat([g.flatten() for g in torch.autograd.grad(model(x, y, weights=weights), list(model.parameters()))])


@pytest.mark.parametrize('depth', [1.0, 0.34])
def test_hidden_states_find_planted_duplicates_of_any_depth(depth):
    model, _ = model_and_optimizer()
    of = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat(np.arange(16), 4)))
    x, y = (t[of] for t in tokens_of(16))
    chooser = Coreset('hidden', weights='cluster', depth=depth)
    chosen, weights = chooser.choose(model, x, y, [0] * 64, 16, 0, 64)
    assert len(of[chosen].unique()) == 16 and torch.equal(weights, torch.ones(16)) and chooser.errors is None


def test_planted_duplicates_are_found_and_stand_for_each_other():
    model, _ = model_and_optimizer()
    rng = np.random.default_rng(0)
    copies = rng.multinomial(192, rng.dirichlet(np.full(64, 0.7))) + 1
    of = torch.from_numpy(rng.permutation(np.repeat(np.arange(64), copies)))
    x, y = tokens_of(64)
    rows = torch.cat([x, y[:, -1:]], 1)[of]
    noisy = torch.from_numpy(np.where(rng.random(rows.shape) < 0.03, rng.integers(61, size=rows.shape), rows))
    errors = {}
    for name, pool in (('exact', rows), ('noisy', noisy)):
        x, y = pool[:, :-1].contiguous(), pool[:, 1:].contiguous()
        whole = all_gradients(model, x, y)
        chooser = Coreset('grad', weights='cluster')
        chosen, weights = chooser.choose(model, x, y, [0] * 256, 64, 0, 64)
        errors[name] = ((all_gradients(model, x[chosen], y[chosen], weights) - whole).norm() / whole.norm()).item()
        hit = len(of[chosen].unique())
        assert hit == 64 if name == 'exact' else hit >= 60
        found = features(model, x, y, 'grad', 64)
        G = torch.einsum('bto,bti->boi', found['D'], found['X']).flatten(1)
        own = ((weights[:, None] * G[chosen]).mean(0) - G.mean(0)).norm() / G.mean(0).norm()
        assert chooser.errors[0].item() == pytest.approx(own.item(), rel=1e-2, abs=1e-3), 'what the log line shows'
        assert chooser.errors[2] == pytest.approx(chooser.errors[0].item(), abs=1e-6), 'these weights are those by size'
        at_random = [
            (G[rng.permutation(256)[:64]].mean(0) - G.mean(0)).square().sum() / G.mean(0).square().sum()
            for _ in range(500)
        ]
        assert chooser.errors[1].item() == pytest.approx(np.mean(at_random) ** 0.5, rel=0.05), 'and of a random batch'
    half = [rng.permutation(256)[:128] for _ in range(8)]
    at_random = np.mean([((all_gradients(model, x[i], y[i]) - whole).norm() / whole.norm()).item() for i in half])
    print(errors, at_random)
    assert errors['exact'] < 1e-3 and errors['noisy'] <= 0.30 and errors['noisy'] < at_random


def test_one_direction_compares_single_numbers_as_the_paper_does_in_all_coordinates():
    """p_i z in all 12 coordinates through Adam's history, the mask and l1 is h times the distance of two numbers."""
    generator, z = torch.Generator().manual_seed(0), torch.randn(12, generator=torch.Generator().manual_seed(1))
    wide, narrow = (Coreset('zo', norm='adam', directions=1, sparsity=h) for h in (5, 5))
    for step in range(3):
        p = torch.randn(10, 1, generator=generator)
        far = [c.adam_distance({'H': p, 'p': f}, torch.zeros(10)) for c, f in ((wide, p * z), (narrow, p))]
        torch.testing.assert_close(far[0], 5 * far[1], atol=1e-3, rtol=1e-3)
        assert step or narrow.adam_distance({'H': p, 'p': p}, torch.zeros(10)).unique().numel() <= 4, 'signs alone'
        for chooser, f in ((wide, p * z), (narrow, p)):
            chooser.remember({'H': p, 'p': f}, torch.tensor([1, 4]))


def test_adam_distance_is_the_formula_over_the_largest_coordinates_of_each_source():
    chooser = Coreset('zo', norm='adam', directions=6, sparsity=3, betas=(0.8, 0.9))
    sources = torch.tensor([0, 0, 1, 1, 1])
    M, V = torch.zeros(6), torch.zeros(6)
    for t in (1, 2, 3):
        p = torch.randn(5, 6, generator=torch.Generator().manual_seed(t))
        f = (0.8 * M + 0.2 * p) / (1 - 0.8**t) / (((0.9 * V + 0.1 * p**2) / (1 - 0.9**t)).sqrt() + 1e-8)
        found = chooser.adam_distance({'H': p, 'p': p}, sources)
        for q in (0, 1):
            on = sources == q
            top = f[on].mean(0).abs().argsort(descending=True)[:3]
            wanted = (f[on][:, None, top] - f[on][None, :, top]).abs().sum(-1)
            torch.testing.assert_close(found[on][:, on], wanted)
        picked = torch.tensor([0, 3])
        chooser.remember({'p': p}, picked)
        M, V = 0.8 * M + 0.2 * p[picked].mean(0), 0.9 * V + 0.1 * p[picked].square().mean(0)
    torch.testing.assert_close(chooser.V, V)


# ---- the history, checkpoints, sources from hidden states ------------------------------------------------------------


@pytest.mark.parametrize(
    'options',
    [dict(norm='adam'), dict(feature='zo', norm='adam'), dict(clusters=3, remake=(1, 4), weights='cluster')],
    ids=str,
)
def test_a_saved_and_loaded_history_chooses_as_the_uninterrupted_one(options):
    model, _ = model_and_optimizer()
    whole, first, second = (Coreset(**options) for _ in range(3))
    for step in range(6):
        if step == 3:
            file = io.BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            second.load_state_dict(torch.load(file, weights_only=True))
        pool = *tokens_of(24, seed=step), [0] * 24, 8, step, 8
        a, b = whole.choose(model, *pool), (second if step >= 3 else first).choose(model, *pool)
        assert torch.equal(a[0], b[0]) and (a[1] is None or torch.equal(a[1], b[1]))


def test_clusters_of_hidden_states_are_the_sources_where_the_data_names_none():
    model, _ = model_and_optimizer()
    x, y = tokens_of(40)
    x[:30] = 7  # two kinds of text
    chooser = Coreset('grad', clusters=2, remake=(1,))
    chooser.choose(model, x, y, [0] * 40, 20, 0, 8)
    assert chooser.centres is None and chooser.errors is None, 'random before the first'
    chosen, _ = chooser.choose(model, x, y, [0] * 40, 20, 1, 8)
    assert chooser.kept_share == 0.5 and set(range(30, 40)) <= set(chosen.tolist()), 'the small kind is kept whole'
    assert len(chooser.small) == 1 and chooser.centres.shape == (2, 32)


def test_unknown_words_name_the_choices():
    with pytest.raises(
        ValueError, match="feature='gradient' is not known: use one of 'random', 'zo', 'hidden', 'grad'"
    ):
        Coreset('gradient')


# ---- train.py --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
    """A data folder of four unbalanced sources."""
    folder = tmp_path_factory.mktemp('mixed')
    for name, n in (('a', 900), ('b', 400), ('c', 60), ('d', 40)):
        os.makedirs(folder / 'text' / name)
        for part in range(4):
            lines = [f'{name * 3} {i * ord(name)} = {i % 7}' for i in range(part, n, 4)]
            (folder / 'text' / name / f'{part}.txt').write_text('\n'.join(lines))
    words = [f'--input={folder / "text"}', '--tokenizer=bytes', f'--out_dir={folder / "bytes"}', '--val_share=0.2']
    done = run(['data/text/prepare.py', *words])
    assert done.returncode == 0, done.stderr
    return str(folder / 'bytes')


STEPS = ['--max_iters=8', '--lr_decay_iters=8', '--log_interval=4', '--eval_interval=8', '--sample_tokens=0']
STEPS += ['--coreset=grad', '--learning_rate=1e-3', '--gradient_accumulation_steps=2']


def trained(out, data, *flags, processes=1):
    words = ['train.py', *tiny(f'--dataset={data}', f'--out_dir={out}', *STEPS, *flags)]
    if processes > 1:
        words = ['-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--standalone', *words]
    done = run(words, env={'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    return done.stdout, load_file(out / 'last/model.safetensors')


def test_two_processes_choose_the_same_set_as_one(mixed, tmp_path):
    out, alone = trained(tmp_path / 'one', mixed, '--coreset_from=3')
    lines = re.search(r'^step 4/8 \| loss.*?(?=^step|\Z)', out, re.S | re.M)[0]  # a long one is folded
    wanted = r'kept [1-9]\d% \| gradient error 0\.\d{3}, by cluster size \d\.\d{3}, random 0\.\d{3}( |$)'
    assert re.search(wanted, ' '.join(lines.replace('\n', ' ').split())), lines
    _, both = trained(tmp_path / 'two', mixed, '--coreset_from=3', processes=2)
    assert max((alone[name] - both[name]).abs().max() for name in alone) < 2e-6


def test_resumed_equals_uninterrupted_bit_for_bit(mixed, tmp_path):
    flags = ['--coreset_norm=adam', '--coreset_weights=cluster', '--method=adamw']
    out, whole = trained(tmp_path / 'whole', mixed, *flags)
    trained(tmp_path / 'part', mixed, *flags, '--max_iters=4')
    assert os.path.exists(tmp_path / 'part/last/coreset.pt')
    out2, resumed = trained(tmp_path / 'part', mixed, *flags, '--init_from=resume')
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert values(out)['val_loss'] == values(out2)['val_loss']
    words = ['train.py', *tiny(f'--dataset={mixed}', f'--out_dir={tmp_path / "part"}', *STEPS, *flags)]
    refused = run([*words, '--init_from=resume', '--max_iters=12', '--coreset=zo'])
    assert refused.returncode == 1 and 'cannot go on with coreset=zo: type --coreset=grad' in refused.stderr
    os.remove(tmp_path / 'part/last/coreset.pt')
    with pytest.raises(checkpoint.CheckpointError, match=r'coreset\.pt is missing or broken'):
        checkpoint.load_selection(str(tmp_path / 'part/last'), Coreset())


@pytest.mark.parametrize('how', [['--coreset=grad'], ['--coreset=hidden', '--coreset_depth=0.5']])
def test_the_plan_counts_the_choice_as_a_real_step_does(data, how):
    words, planned = tiny(f'--dataset={data}', '--batch_size=2', '--method=adamw'), {}
    for more in ([], ['--coreset_from=60', *how]):
        config = configurator.load(training.__file__, [*words, *more], training.problems)
        model = build.build_model(config, data, 257, torch.float32, 'cpu')
        planned[bool(more)] = trace.plan_memory(
            config,
            model.config,
            torch.float32,
            'cpu',
            configurator.method_of(config),
            training.training_step,
            coreset.setup(config),
            torch.float32,
        ).total
    assert planned[True] > planned[False] or how[0] == '--coreset=hidden', 'which takes less than the step after it'
    with LiveBytes() as live:
        model = LLaMA(model.config)
        optimizer = adam.setup(model, config)
        chooser = coreset.setup(config)
        for step in range(2):
            x = torch.randint(0, 257, (120, 32))
            chosen, _ = chooser.choose(model, x, x, [0] * 120, 2, step, 2)
            batch = x[chosen]
            del x  # as chosen_batches does
            training.training_step(model, optimizer, [(batch, batch.clone())], 1e-3, 'cpu')
    assert planned[True] == pytest.approx(live.peak, rel=0.02)


def test_the_pool_is_a_function_of_seed_and_step_and_processes_share_the_choice(mixed):
    config = configurator.load(training.__file__, tiny(f'--dataset={mixed}', *STEPS), training.problems)
    tokens = training.load(mixed, 'train', 32)
    model = build.build_model(config, mixed, 257, torch.float32, 'cpu')
    chooser = coreset.setup(config, tokens)
    sizes = [source['train_tokens'] for source in read_meta(mixed)['sources']]
    assert chooser.small == [q for q, n in enumerate(sizes) if n < sum(sizes) / 4]
    made = [
        coreset.chosen_batches(chooser, model, tokens, config, 3, 'cpu', *share) for share in ((0, 1), (0, 2), (1, 2))
    ]
    for alone, shared in zip(made[0], (made[1][0], made[2][0]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    rows = {tuple(row.tolist()) for row in tokens.batch(config.seed, 3, 4 * 8)[0]}
    assert all(tuple(row.tolist()) in rows for x, *_ in made[0] for row in x)


AS_PUBLISHED = '--method=lora --quantize=none --dropout=0.05 --coreset=zo --zo_directions=1 --coreset_norm=adam '
AS_PUBLISHED += '--keep_small=1 --coreset_from=2'


def spsa(model, x, y, z, eps=1e-3):
    """(n,) CoLM's equation 5, one example at a time: (L(B + eps z) - L(B - eps z)) / (2 eps), B of the last V."""
    B, losses = model.layers[-1].self_attn.v_proj.B, []
    with torch.no_grad():
        for step in (eps * z, -2 * eps * z, eps * z):
            B += step
            losses.append(torch.stack([model(x[i : i + 1], y[i : i + 1]).double() for i in range(len(x))]))
    return ((losses[0] - losses[1]) / (2 * eps)).float()


def test_colm_as_published_chooses_what_its_equations_choose_and_trains_lora_on_it(mixed):
    """Four steps of a run, each beside the paper's section 4 written out: small sources whole; of every other one its
    share of the rest, by facility location in l1 over the h largest coordinates of Adam's step of p_i z."""
    words = tiny(f'--dataset={mixed}', '--rank=4', '--n_layer=1', '--block_size=24', *AS_PUBLISHED.split())
    words += ['--batch_size=8', '--coreset_sparsity=20']
    config = configurator.load(training.__file__, words, training.problems)
    tokens = training.load(mixed, 'train', 24)
    model = build.build_model(config, mixed, 257, torch.float32, 'cpu', linear=lora.linear(config))
    optimizer, chooser = lora.setup(model, config), coreset.setup(config, tokens)
    v_proj = model.layers[-1].self_attn.v_proj
    z = torch.randn(v_proj.B.shape, generator=torch.Generator().manual_seed(100_003 * config.seed))
    M, V, before = torch.zeros(z.shape), torch.zeros(z.shape), v_proj.B.detach().clone()
    some_were_compared = 0
    for step in range(4):
        x, y, sources = tokens.batch(config.seed, step, 16)
        sources = torch.as_tensor(sources)
        model.eval()
        p = spsa(model, x, y, z)
        model.train()
        G = p[:, None, None] * z  # (16, out, r)
        t = step + 1
        f = (0.9 * M + 0.1 * G) / (1 - 0.9**t) / (((0.999 * V + 0.001 * G * G) / (1 - 0.999**t)).sqrt() + 1e-8)
        wanted = [torch.isin(sources, torch.tensor(chooser.small)).nonzero()[:, 0]]
        large = [q for q in sources.unique().tolist() if q not in chooser.small]
        left = 8 - len(wanted[0])
        share = {q: left * int((sources == q).sum()) // (16 - len(wanted[0])) for q in large}
        for q in sorted(large, key=lambda q: share[q])[: left - sum(share.values())]:
            share[q] += 1
        for q in large:
            members = (sources == q).nonzero()[:, 0]
            h = f[members].mean(0).flatten().abs().argsort(descending=True)[:20]
            rows = f[members].flatten(1)[:, h]
            distance = (rows[:, None] - rows).abs().sum(-1)  # (members, members)
            wanted.append(members[naive_facility_location(distance.max() - distance, share[q])])
            some_were_compared += 0 < share[q] < len(members)
        picked = torch.cat(wanted[1:])
        M, V = 0.9 * M + 0.1 * G[picked].mean(0), 0.999 * V + 0.001 * G[picked].square().mean(0)
        batches = coreset.chosen_batches(chooser, model, tokens, config, step, 'cpu')
        assert len(batches) == 1 and len(batches[0]) == 2, 'one micro-batch, and no weights'
        assert torch.equal(batches[0][0], x[torch.cat(wanted).sort().values])
        assert training.training_step(model, optimizer, batches, 1e-2, 'cpu').isfinite()
    assert some_were_compared >= 4 and chooser.small and not torch.equal(v_proj.B, before)


IMPOSSIBLE = {
    '--coreset=zo --zo_directions=1': 'use --coreset_norm=adam, or more --zo_directions',
    '--coreset=grad --coreset_from=0': 'coreset_from=0 is too small: use 2 or more',
    '--coreset=grad --coreset_clusters=33': 'coreset_clusters=33 is out of range: use 0 to 16',
    '--coreset=grad --zo_directions=4': "leave it out with coreset='grad', or use --coreset=zo",
    '--coreset=grad --coreset_clusters=-1': 'coreset_clusters=-1 is too small: use 0 or more',
    '--coreset=grad --keep_small=2': 'keep_small=2.0 is out of range: use 0 to 1',
    '--coreset=random --coreset_norm=adam': "leave it out with coreset='random'",
    '--coreset=grad --coreset_sparsity=10': 'leave it out, or use --coreset_norm=adam',
    '--coreset=grad --coreset_norm=adam --coreset_sparsity=-1': 'coreset_sparsity=-1 is too small: use 0 or more',
    '--coreset=grad --method=lora --targets=q_proj': 'add v_proj, or use --coreset=random',
    '--coreset_norm=adam': "leave it out with coreset='none'",
    '--coreset_weights=cluster': 'or use --coreset=grad',
    '--coreset=grad --coreset_depth=0': 'coreset_depth=0.0 is too small: use 0.001 or more',
    '--coreset=random --coreset_depth=0.5': 'looks at no block: leave out coreset_depth',
    '--coreset=hidden --coreset_layer=q_proj': "leave it out with coreset='hidden'",
    '--coreset=hidden --coreset_norm=adam': "leave it out with coreset='hidden'",
}


@pytest.mark.parametrize('flags', IMPOSSIBLE)
def test_impossible_combinations_name_the_flag_to_change(flags):
    with pytest.raises(configurator.ConfigError, match=IMPOSSIBLE[flags]):
        configurator.load(training.__file__, tiny(*flags.split()), training.problems)


def test_a_value_projection_that_targets_left_out_is_told_by_its_name():
    from test_contract import model_and_optimizer  # which imports this file

    model, _ = model_and_optimizer('lora', targets='q_proj')
    with pytest.raises(ModelError, match='gradients of v_proj, which targets leaves out: add it'):
        coreset.value_layer(model)
