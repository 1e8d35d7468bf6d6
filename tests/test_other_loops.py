"""The optimizers in loops that are not ours: galore-torch's groups, torch's schedulers, copies, frozen weights."""

import copy
from functools import partial

import pytest
import torch
from conftest import ROOT, run
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adam import AdamW, add_up_, split_decay
from galore import GaLoreAdamW, on_the_right
from loqt import LoQTAdamW, replace_linears
from lora import LoRAAdamW, LoRALinear
from methods.adalomo import AdaLomo
from methods.adarankgrad import AdaRankGradAdamW
from methods.apollo import ApolloAdamW
from methods.badam import BAdamW
from methods.fira import FiraAdamW
from methods.grass import GrassAdamW
from methods.ldadam import LDAdamW
from methods.muon import MuonAdamW
from methods.qgalore import QGaLoreAdamW
from methods.scale import ScaleAdamW
from methods.sltrain import SLLinear, SLTrainAdamW
from methods.sumo import SumoAdamW


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.Tanh(), torch.nn.Linear(32, 12))


def lowrank(kind):
    return lambda model, **more: kind(model.parameters(), lr=1e-2, rank=4, update_proj_gap=3, **more)


def loqt(model, **more):
    layers = replace_linears(model, rank=4)
    return LoQTAdamW(split_decay(model.parameters()), layers, total_steps=20, tau=3, lr=1e-2, **more)


def lora(model, **more):
    for i in (0, 2):
        linear, W = LoRALinear(model[i].in_features, model[i].out_features, rank=4), model[i].weight.detach()
        linear.set_weight(W)
        model[i] = linear
    return LoRAAdamW(model.parameters(), [model[0], model[2]], lr=1e-2, **more)


def badam(model, **more):
    return BAdamW([{'params': model[i].parameters(), 'block': i} for i in (0, 2)], lr=1e-2, block_steps=3, **more)


def sltrain(model, **more):
    for i in (0, 2):
        linear = SLLinear(model[i].in_features, model[i].out_features, rank=4, density=0.5, bias=True)
        linear.set_weight(model[i].weight.detach())
        model[i] = linear.to(model[i].weight.dtype)
    return SLTrainAdamW(model.parameters(), [model[0], model[2]], lr=1e-2, **more)


METHODS = {
    'adamw': lambda model, **more: AdamW(model.parameters(), lr=1e-2, **more),
    'galore': lowrank(GaLoreAdamW),
    'qgalore': lowrank(QGaLoreAdamW),
    'fira': lowrank(FiraAdamW),
    'apollo': lowrank(ApolloAdamW),
    'badam': badam,
    'sltrain': sltrain,
    'adarankgrad': lowrank(partial(AdaRankGradAdamW, moments='keep', energy=0.5)),
    'ldadam': lambda model, **more: LDAdamW(model.parameters(), lr=1e-2, rank=4, **more),
    'adalomo': lambda model, **more: AdaLomo(model.parameters(), lr=1e-1, **more),
    'grass': lowrank(GrassAdamW),
    'sumo': lowrank(SumoAdamW),
    'scale': lambda model, **more: ScaleAdamW(model.parameters(), lr=1e-2, **more),
    'muon': lambda model, **more: MuonAdamW(model.parameters(), lr=1e-2, **more),
    'loqt': loqt,
    'lora': lora,
}
MODULES = ('adam', 'quant', 'galore', 'loqt', 'lora', 'train', 'model', 'configurator', 'plumbing', 'memory')
METHODS_BUT_LOQT = [name for name in METHODS if name != 'loqt']


def loss_of(model, step):
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
    return (model(x) - x.flip(1)).square().mean()


def train(model, optimizer, steps, first=0, scheduler=None):
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step(*([loss.item()] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        losses.append(loss.item())
    return losses


def weights(model):
    return [t.detach().clone() for t in model.state_dict().values()]


# ---- galore-torch's groups ----------------------------------------------------------------------------------------


def test_groups_as_galore_torch_takes_them_project_each_with_its_own_numbers():
    W = [torch.nn.Parameter(torch.randn(12, 30)) for _ in range(3)]
    plain = torch.nn.Parameter(torch.randn(12, 30))  # a group without a rank is plain Adam's there
    optimizer = GaLoreAdamW(
        [
            {'params': [plain]},
            {'params': [W[0]], 'rank': 4, 'update_proj_gap': 2, 'scale': 0.25, 'proj_type': 'std'},
            {'params': [W[1]], 'rank': 6, 'update_proj_gap': 5, 'scale': 0.5, 'proj_type': 'reverse_std'},
            {'params': [W[2]], 'rank': 4, 'update_proj_gap': 2, 'scale': 1.0, 'proj_type': 'right'},
        ],
        lr=1e-2,
        refresh='svd',
        stagger=False,
    )
    bases = {i: [] for i in range(3)}
    for step in range(6):
        before = [p.detach().clone() for p in W]
        draw = torch.Generator().manual_seed(step)
        G = [torch.randn(12, 30, generator=draw) for _ in range(4)]
        sum((p * g).sum() for p, g in zip([*W, plain], G)).backward()
        optimizer.step()
        for i, p in enumerate(W):
            bases[i].append(optimizer.state[p]['P'].clone())
        if step == 0:  # Adam's first step is the sign of what it is given
            U = torch.linalg.svd(G[0])[0]
            P = optimizer.state[W[0]]['P']  # (12, 4)
            torch.testing.assert_close(P.abs(), U[:, :4].abs(), atol=1e-4, rtol=1e-3)
            wanted = before[0] - 1e-2 * 0.25 * P @ torch.sign(P.T @ G[0])
            torch.testing.assert_close(W[0].detach(), wanted, atol=1e-6, rtol=1e-5)
            for i, r, scale in ((1, 6, 0.5), (2, 4, 1.0)):
                P = optimizer.state[W[i]]['P']  # (30, r): on the side of the columns
                assert P.shape == (30, r)
                wanted = before[i] - 1e-2 * scale * torch.sign(G[i] @ P) @ P.T
                torch.testing.assert_close(W[i].detach(), wanted, atol=1e-6, rtol=1e-5)
    for i, gap in ((0, 2), (1, 5), (2, 2)):
        changed = [step for step in range(1, 6) if not torch.equal(bases[i][step], bases[i][step - 1])]
        assert changed == list(range(gap, 6, gap))
    assert optimizer.state[plain]['M'].shape == (12, 30) and 'P' not in optimizer.state[plain]


@pytest.mark.parametrize('proj_type', ['std', 'reverse_std', 'left', 'right'])
@pytest.mark.parametrize('shape', [(12, 30), (30, 12), (12, 12)])
def test_attached_layers_project_on_the_side_that_proj_type_says(shape, proj_type):
    found = []
    for attached in (False, True):
        torch.manual_seed(0)
        linear = torch.nn.Linear(shape[1], shape[0])
        optimizer = GaLoreAdamW([{'params': [linear.weight], 'rank': 4, 'proj_type': proj_type, 'update_proj_gap': 3}])
        if attached:
            optimizer.attach([linear])
        for step in range(8):
            x = torch.randn(16, shape[1], generator=torch.Generator().manual_seed(step))
            linear(x).pow(2).sum().backward()
            optimizer.step()
        m = shape[1] if on_the_right(shape, proj_type) else shape[0]
        assert optimizer.state[linear.weight]['P'].shape == (m, 4)
        found.append(linear.weight.detach().clone())
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('method', METHODS_BUT_LOQT)
def test_an_unknown_key_of_a_group_is_refused_by_name(method):
    optimizer = METHODS[method](net())
    new = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(
        ValueError, match=f"{type(optimizer).__name__} knows no key 'wieght_decay' of a group, did you mean"
    ):
        optimizer.add_param_group({'params': [new], 'wieght_decay': 0.1})
    with pytest.raises(ValueError, match="knows no key 'foo' of a group: use some of lr, betas"):
        optimizer.add_param_group({'params': [new], 'foo': 1})
    assert new not in optimizer.index_of


def test_update_proj_gap_mistyped_in_a_group_says_what_was_meant():
    with pytest.raises(ValueError, match="'update_proj_gp' of a group, did you mean 'update_proj_gap'"):
        GaLoreAdamW([{'params': [torch.nn.Parameter(torch.zeros(2, 2))], 'rank': 2, 'update_proj_gp': 50}])
    with pytest.raises(ValueError, match="proj_type='full' is not known: use 'std'"):
        GaLoreAdamW([{'params': [torch.nn.Parameter(torch.zeros(2, 2))], 'rank': 2, 'proj_type': 'full'}])


# ---- rates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('per_layer', [False, True])
def test_lr_scale_of_a_group_is_a_learning_rate_of_its_own(per_layer):
    found = []
    for groups in ('scaled', 'apart'):
        model = net()
        first, second = list(model[0].parameters()), list(model[2].parameters())
        if groups == 'scaled':
            optimizer = AdamW([{'params': first}, {'params': second, 'lr_scale': 0.1}], lr=1e-2, per_layer=per_layer)
        else:
            optimizer = torch.optim.AdamW([{'params': first}, {'params': second, 'lr': 1e-3}], lr=1e-2, weight_decay=0)
        train(model, optimizer, 5)
        found.append(weights(model))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('per_layer', [False, True])
def test_a_rate_scaled_afterwards_is_that_of_a_group_of_its_own(per_layer):
    found = []
    for when in ('at once', 'afterwards'):
        model = net()
        first, second = list(model[0].parameters()), list(model[2].parameters())
        if when == 'at once':
            optimizer = AdamW([{'params': first}, {'params': second, 'lr_scale': 0.1}], lr=1e-2, per_layer=per_layer)
        else:
            optimizer = AdamW(model.parameters(), lr=1e-2, per_layer=per_layer)
            optimizer.scale_rate(second, 0.1)
        train(model, optimizer, 5)
        found.append(weights(model))
    assert all(torch.equal(*pair) for pair in zip(*found))
    with pytest.raises(ValueError, match='none of these parameters is trained here'):
        optimizer.scale_rate([torch.zeros(3)], 2.0)


def test_the_lr_of_the_optimizer_is_one_number_for_all_groups_beside_lr_scale():
    model = net()
    optimizer = AdamW([{'params': [p], 'lr_scale': i + 1.0} for i, p in enumerate(model.parameters())], lr=1e-3)
    optimizer.lr = 0.5
    assert [group['lr'] for group in optimizer.param_groups] == [0.5] * 4
    assert [optimizer.rate(p) for p in model.parameters()] == [0.5, 1.0, 1.5, 2.0]


SCHEDULERS = {
    'LambdaLR': lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    'OneCycleLR': lambda o: lr_scheduler.OneCycleLR(o, max_lr=2e-2, total_steps=12),
    'ReduceLROnPlateau': lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
    'CosineAnnealingLR': lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    'SequentialLR': lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.StepLR(o, 2)], [3]
    ),
}


@pytest.mark.parametrize('scheduler', SCHEDULERS)
def test_torchs_schedulers_drive_ours_as_they_drive_torchs(scheduler):
    found, rates = [], []
    for make in (AdamW, torch.optim.AdamW):
        model = net()
        optimizer = make(model.parameters(), lr=1e-2, weight_decay=0.0)
        driver, seen = SCHEDULERS[scheduler](optimizer), []
        for step in range(10):
            train(model, optimizer, 1, step, driver)
            seen.append(optimizer.param_groups[0]['lr'])
        found.append(weights(model))
        rates.append(seen)
    assert rates[0] == pytest.approx(rates[1]) and len(set(rates[0])) > 1
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('scheduler', SCHEDULERS)
def test_every_method_moves_by_the_schedulers_rate(scheduler, method):
    model = net()
    optimizer = METHODS[method](model)
    driver = SCHEDULERS[scheduler](optimizer)
    train(model, optimizer, 4, scheduler=driver)
    for group in optimizer.param_groups:
        group['lr'] = 0.0
    before = weights(model) if method != 'loqt' else [p.detach().clone() for p in model.parameters()]
    loss_of(model, 99).backward()
    optimizer.step()
    after = weights(model) if method != 'loqt' else [p.detach().clone() for p in model.parameters()]
    if method != 'loqt':  # a merge remakes B whatever the rate
        assert all(torch.equal(a, b) for a, b in zip(before, after))


# ---- the usual loop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('method', METHODS)
def test_state_dict_round_trip_goes_on_bit_for_bit(method):
    model = net()
    optimizer = METHODS[method](model)
    train(model, optimizer, 4)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    other = net(seed=1)
    resumed = METHODS[method](other)
    if method in ('loqt', 'lora'):  # packed tensors travel with the optimizer's state
        resumed.load_state_dict(saved[1])
        other.load_state_dict(saved[0], strict=False)
    else:
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
    assert train(model, optimizer, 6, first=4) == train(other, resumed, 6, first=4)


@pytest.mark.parametrize('attach', [False, True])
@pytest.mark.parametrize('method', METHODS)
def test_a_deep_copy_of_model_and_optimizer_goes_its_own_way(method, attach):
    model = net()
    optimizer = METHODS[method](model)
    if attach and hasattr(optimizer, 'attach'):
        optimizer.attach([model[0], model[2]])
    train(model, optimizer, 4)
    other, its_optimizer = copy.deepcopy((model, optimizer))
    before = weights(other)
    losses = train(model, optimizer, 6, first=4)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(other))), 'the copy moved with the original'
    assert train(other, its_optimizer, 6, first=4) == losses


@pytest.mark.parametrize('per_layer', [False, True])
def test_a_deep_copy_works_per_layer_and_after_a_scheduler_wrapped_step(per_layer):
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-2, per_layer=per_layer)
    lr_scheduler.StepLR(optimizer, 100)
    train(model, optimizer, 2)
    other, its_optimizer = copy.deepcopy((model, optimizer))
    assert train(other, its_optimizer, 3, first=2) == train(model, optimizer, 3, first=2)


@pytest.mark.parametrize('per_layer', [False, True])
@pytest.mark.parametrize('method', [name for name in METHODS if name not in ('loqt', 'lora', 'sltrain')])
def test_frozen_parameters_stay_and_the_others_learn(method, per_layer):
    model = net()
    model[0].weight.requires_grad_(False)
    optimizer = METHODS[method](model, per_layer=per_layer)
    if hasattr(optimizer, 'attach'):
        optimizer.attach([model[0], model[2]])
    before = weights(model)
    train(model, optimizer, 4)
    moved = [not torch.equal(a, b) for a, b in zip(before, weights(model))]
    assert moved == [False, True, True, True]


# badam's waiting weights have requires_grad=False already: who freezes one of them cannot be heard
@pytest.mark.parametrize('method', [name for name in METHODS if name not in ('loqt', 'lora', 'badam', 'sltrain')])
def test_a_weight_frozen_after_attach_stays_where_it_is(method):
    model = net()
    optimizer = METHODS[method](model)
    if hasattr(optimizer, 'attach'):
        optimizer.attach([model[0], model[2]])
    train(model, optimizer, 2)
    model[2].weight.requires_grad_(False)
    optimizer.zero_grad()
    before = model[2].weight.detach().clone()
    train(model, optimizer, 3, first=2)
    assert torch.equal(model[2].weight, before)


@pytest.mark.parametrize('method', METHODS_BUT_LOQT)
def test_a_parameter_without_a_gradient_in_some_steps_waits_and_its_clock_with_it(method):
    model, idle = net(), torch.nn.Parameter(torch.ones(8, 12))
    optimizer = METHODS[method](model)
    optimizer.add_param_group({'params': [idle]})
    for step in range(5):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        if step in (1, 3):
            loss = loss + idle.square().sum()
        before = idle.detach().clone()
        loss.backward()
        optimizer.step()
        assert torch.equal(idle, before) == (step not in (1, 3))
    assert optimizer.state[idle]['step'] == 2


@pytest.mark.parametrize('foreach', [None, True])
@pytest.mark.parametrize('attach', [False, True])
@pytest.mark.parametrize('method', METHODS)
def test_clip_grad_norm_works_where_gradients_wait_for_step(method, attach, foreach):
    def path(clip):
        model = net()
        optimizer = METHODS[method](model)
        if attach and hasattr(optimizer, 'attach'):
            optimizer.attach([model[0], model[2]])
        for step in range(4):
            optimizer.zero_grad()
            (1000 * loss_of(model, step)).backward()
            if clip:
                assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=foreach) > 0.1
            optimizer.step()
        return optimizer

    assert path(False).metrics['grad_norm'] > 0.2
    assert path(True).metrics['grad_norm'] <= 0.1001  # of R it may be less


def attached(steps=2):
    model = net()
    optimizer = METHODS['galore'](model)
    optimizer.attach([model[0], model[2]])
    train(model, optimizer, steps)
    optimizer.zero_grad()
    loss_of(model, steps).backward()
    return model, optimizer


def test_under_attach_clip_grad_norm_clips_the_norm_that_grad_clip_clips():
    found = []
    for clip in (0.0, 0.05):
        model, optimizer = attached()
        optimizer.grad_clip = clip
        if not clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        found.append(weights(model))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_under_attach_grad_answers_what_its_projection_knows_and_refuses_the_rest_in_a_sentence():
    model, optimizer = attached()
    R = optimizer.placeholder[model[0].weight].grad
    G = model[0].weight.grad
    assert G.shape == model[0].weight.shape and G.norm() == R.norm() > 0 and torch.isfinite(G).all()
    before = R.clone()
    G /= 2
    torch.testing.assert_close(R, before / 2)
    for odd in (
        lambda: G + 1,
        lambda: G.abs().max(),
        lambda: G.clone(),
        lambda: torch.nn.utils.clip_grad_value_(model.parameters(), 0.1),
        lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=float('inf')),
    ):
        with pytest.raises(NotImplementedError, match='only its projection'):
            odd()


@pytest.mark.parametrize('unscale', [False, True])
@pytest.mark.parametrize('method', METHODS)
def test_grad_scaler_is_refused_in_a_sentence_where_backward_uses_the_gradients_up(method, unscale):
    model = net()
    optimizer = METHODS[method](model, per_layer=True)
    scaler = torch.amp.GradScaler('cpu', init_scale=64.0)
    scaler.scale(loss_of(model, 0)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(
        ValueError, match=r'GradScaler cannot scale gradients that are used up inside backward .*: train in'
    ):
        scaler.step(optimizer)


@pytest.mark.parametrize('method', METHODS)
def test_a_closure_gives_its_loss(method):
    model = net()
    optimizer = METHODS[method](model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > optimizer.step(closure).item() > 0


def test_apollos_groups_follow_the_same_rules_as_galores():
    for kind in (GaLoreAdamW, ApolloAdamW):
        p, q = (torch.nn.Parameter(torch.zeros(4, 6)) for _ in range(2))
        optimizer = kind([{'params': [p], 'rank': 4}, {'params': [q]}])
        assert [group['rank'] for group in optimizer.param_groups] == [4, 0]
        before = len(optimizer.param_groups)
        with pytest.raises(ValueError, match='update_proj_gap=0 is not a number of steps'):
            optimizer.add_param_group({'params': [torch.nn.Parameter(torch.zeros(4, 6))], 'update_proj_gap': 0})
        assert len(optimizer.param_groups) == before


@pytest.mark.parametrize('method', METHODS_BUT_LOQT)
def test_a_state_saved_before_a_key_existed_takes_the_default_and_torchs_own_is_refused(method):
    model = net()
    optimizer = METHODS[method](model)
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved['param_groups']:
        del group['lr_scale']
    optimizer.load_state_dict(saved)
    again = copy.deepcopy(saved)
    assert train(model, optimizer, 2, first=2)
    optimizer.load_state_dict(again)  # nothing of it was changed by loading it
    theirs = torch.optim.AdamW([p for group in optimizer.param_groups for p in group['params']])
    for p in theirs.param_groups[0]['params']:
        p.grad = torch.zeros_like(p)
    theirs.step()
    state = theirs.state_dict() | {name: again[name] for name in ('layers', 'drawn') if name in again}
    with pytest.raises(ValueError, match="states of torch's own Adam"):
        optimizer.load_state_dict(state)


def test_a_shallow_copy_is_refused_since_two_optimizers_would_move_one_parameter():
    with pytest.raises(TypeError, match=r'use copy\.deepcopy'):
        copy.copy(AdamW(net().parameters()))


@pytest.mark.parametrize(
    'files',
    [
        'adam galore',
        'adam quant lora',
        'adam quant galore loqt',
        'adam galore methods/qgalore',
        'adam galore methods/fira',
        'adam galore methods/apollo',
        'adam methods/badam',
        'adam methods/adalomo',
        'adam methods/sltrain',
        'adam galore methods/adarankgrad',
        'adam galore methods/ldadam',
        'adam galore methods/grass',
        'adam galore methods/muon',
        'adam methods/scale',
        'adam galore methods/muon methods/sumo',
    ],
)
def test_a_method_file_works_in_a_folder_of_its_own_beside_the_files_it_names(files, tmp_path):
    *_, last = files.split()
    for file in files.split():
        text = (ROOT / f'{file}.py').read_text(encoding='utf-8')
        text = text.split('# ---- for train.py')[0] if file == last else text  # all below may be cut off
        flat = text.replace('from methods.', 'from ')  # all in one folder
        (tmp_path / f'{file.split("/")[-1]}.py').write_text(flat, encoding='utf-8')
    code = f'import {last.split("/")[-1]} as m, sys; print(sorted(x for x in sys.modules if x in {MODULES!r}))'
    done = run(['-c', f'import sys; sys.path[:] = [{str(tmp_path)!r}, *sys.path[1:]]; {code}'])
    assert done.returncode == 0, done.stderr
    assert not {'train', 'model', 'configurator', 'plumbing', 'memory'} & set(eval(done.stdout)), done.stdout


@pytest.mark.parametrize('per_layer', [False, True])
def test_of_two_optimizers_of_a_weight_the_later_one_has_its_gradient(per_layer):
    weights = [torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2)]
    earlier = AdamW(weights[:1], lr=1.0, per_layer=True)  # it would take the gradient inside backward
    for p in weights:
        later = AdamW([p], lr=1e-2, per_layer=per_layer)
        for _ in range(3):
            p.square().sum().backward()
            later.step()
    assert torch.equal(*weights) and not earlier.state


# ---- what is saved, averaged, or of another kind -----------------------------------------------------------------


def with_layers(method, **more):
    model = net()
    optimizer = METHODS[method](model, **more)
    if hasattr(optimizer, 'attach'):
        optimizer.attach([model[0], model[2]])
    return model, optimizer


@pytest.mark.parametrize('method', METHODS_BUT_LOQT)  # whose merged weights, packed, have no average
def test_an_average_of_an_attached_model_is_the_average_of_its_weights_and_does_not_train(method):
    model, optimizer = with_layers(method)
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = None
    for step in range(3):
        train(model, optimizer, 1, first=step)
        mean.update_parameters(model)
        now = [p.detach() for p in model.parameters()]
        expected = [p.clone() for p in now] if expected is None else [0.5 * a + 0.5 * b for a, b in zip(expected, now)]
    for a, b in zip(mean.module.parameters(), expected):
        torch.testing.assert_close(a, b)
    before = weights(model)
    loss_of(mean, 5).backward()  # as in an evaluation that forgot no_grad
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model))), 'the original moved'


@pytest.mark.parametrize('method', METHODS)
def test_an_attached_model_and_its_optimizer_pass_through_torch_save(method, tmp_path):
    model, optimizer = with_layers(method)
    train(model, optimizer, 4)
    torch.save((model, optimizer), tmp_path / 'both.pt')
    other, its_optimizer = torch.load(tmp_path / 'both.pt', weights_only=False)
    assert train(other, its_optimizer, 4, first=4) == train(model, optimizer, 4, first=4)


@pytest.mark.parametrize('per_layer', [False, True])
@pytest.mark.parametrize('method', ['galore', 'qgalore', 'fira', 'grass', 'ldadam', 'adarankgrad'])
def test_a_layer_that_no_group_projects_is_attached_and_trains_as_by_adamw(method, per_layer):
    model, plain = net(), net()
    optimizer = type(METHODS[method](net()))([{'params': model.parameters(), 'rank': 0}], lr=1e-2, per_layer=per_layer)
    optimizer.attach([model[0], model[2]])
    losses = train(model, optimizer, 5)
    assert losses == pytest.approx(
        train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0), 5), 1e-5
    )


@pytest.mark.parametrize('method', METHODS_BUT_LOQT)
def test_gradients_that_are_sparse_and_parameters_that_are_complex_are_refused_in_a_sentence(method):
    table = torch.nn.Embedding(6, 12, sparse=True)
    model = torch.nn.Sequential(table, *net())
    optimizer = type(METHODS[method](net()))
    more = ([],) if method in ('lora', 'sltrain') else ()
    trains = optimizer(model.parameters(), *more, lr=1e-2)
    with pytest.raises(ValueError, match=r'takes no sparse gradients: use nn\.Embedding\(sparse=False\)'):
        model(torch.tensor([1, 2])).sum().backward()
    assert trains.state is not None
    with pytest.raises(ValueError, match=r'not torch[.]complex64: leave them out'):
        optimizer([torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))], *more, lr=1e-2)


@pytest.mark.parametrize('dtype, n, most', [(torch.bfloat16, 128, 0.03), (torch.float16, 128, 0.005)])
def test_sums_of_micro_batches_in_few_bits_are_right_on_average(dtype, n, most):
    G = (torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype)
    naive, total = torch.zeros_like(G), torch.zeros_like(G)
    for i in range(n):
        naive += G
        add_up_(total, G, seed=i * 1000)
    exact = n * G.double()
    assert abs((total - exact).sum() / exact.sum()) < 1e-3, 'biased'
    off, before = ((A - exact).norm() / exact.norm() for A in (total, naive))
    assert off < most and (dtype == torch.float16 or before > 3 * off), (off, before)
