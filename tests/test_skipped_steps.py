"""A step that is not taken leaves no trace: loops that skip batches whose loss is not finite, GradScaler among them."""

import copy

import pytest
import torch
from test_other_loops import METHODS, net, weights

from adam import read_state

DROPS = ('optimizer', 'model', 'at the top', 'nothing')
BAD = {0, 4}  # the batches that have a NaN: the very first, and one of a step in which layers are due
KINDS = [(name, attach) for name in METHODS for attach in (False, True)]
KINDS = [kind for kind in KINDS if not kind[1] or kind[0] in ('galore', 'qgalore', 'fira', 'grass', 'adarankgrad')]
NEVER_CLIP = ('adamw', 'fira', 'apollo', 'muon', 'scale', 'adalomo', 'ldadam')  # per layer


def made(method, attach=False, dtype=torch.float32, **options):
    model = net().to(dtype)
    optimizer = METHODS[method](model, **options)
    if attach:
        optimizer.attach([model[0], model[2]])
    return model, optimizer


def loss_of(model, seed, value=None):
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
    if value is not None:
        x[3, 5] = value
    return (model(x) - x.flip(1)).square().mean()


def walk(model, optimizer, drop, accumulation=1, flag=True, value=float('nan'), bad=BAD, zero_grad_late=False):
    """Eight batches, of which those in `bad` are never seen (drop=None) or seen and dropped."""
    for batch in range(8):
        if drop is None and batch in bad:
            continue
        if drop == 'at the top' and not zero_grad_late:
            optimizer.zero_grad()
        for micro in range(accumulation):
            if flag:
                optimizer.last_micro_batch = micro == accumulation - 1
            wrong = batch in bad and micro == min(1, accumulation - 1)
            loss = loss_of(model, 10 * batch + micro, value if wrong else None) / accumulation
            if drop == 'at the top' and zero_grad_late and micro == 0:
                optimizer.zero_grad()
            loss.backward()
        if batch in bad:
            if drop == 'optimizer':
                optimizer.zero_grad()
            elif drop == 'model':
                model.zero_grad()
            continue
        optimizer.step()
    return weights(model)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize('accumulation', [1, 4])
@pytest.mark.parametrize('drop', DROPS)
@pytest.mark.parametrize('method,attach', KINDS)
def test_a_batch_with_a_nan_that_a_loop_skips_leaves_no_trace(method, attach, drop, accumulation):
    never = walk(*made(method, attach), None, accumulation)
    assert all(w.isfinite().all() for w in never if w.is_floating_point())
    assert same(walk(*made(method, attach), drop, accumulation), never)


@pytest.mark.parametrize('drop', DROPS[:3])
@pytest.mark.parametrize('method,attach', KINDS)
def test_a_batch_that_is_finite_and_dropped_all_the_same_leaves_none_either(method, attach, drop):
    never = walk(*made(method, attach), None, 2)
    assert same(walk(*made(method, attach), drop, 2, value=1e4), never)


@pytest.mark.parametrize('flag,accumulation', [(True, 1), (True, 4), (False, 1), (False, 4)])
@pytest.mark.parametrize('options', [dict(), dict(grad_clip=0.1), dict(per_layer=True, grad_clip=0.1)], ids=str)
@pytest.mark.parametrize('method,attach', [('galore', True), ('qgalore', True), ('loqt', False), ('lora', False)])
def test_nor_does_one_that_zero_grad_drops_between_forward_and_backward(method, attach, options, flag, accumulation):
    if options.get('per_layer') and (accumulation > 1 and not flag):
        pytest.skip('per_layer needs the flag')
    never = walk(*made(method, attach, **options), None, accumulation, flag)
    found = walk(*made(method, attach, **options), 'at the top', accumulation, flag, zero_grad_late=True)
    assert same(found, never)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('method,attach', KINDS)
def test_in_every_dtype(method, attach, dtype):
    never = walk(*made(method, attach, dtype), None, 3)
    assert all(w.isfinite().all() for w in never if w.is_floating_point())
    for drop in ('model', 'nothing'):
        assert same(walk(*made(method, attach, dtype), drop, 3), never)


@pytest.mark.parametrize('options', [dict(), dict(weight_decay=0.1), dict(state_bits=8)], ids=str)
@pytest.mark.parametrize('method,attach', [kind for kind in KINDS if kind[0] != 'grass'])  # whose rows may be finite
def test_per_layer_leaves_weights_and_moments_as_they_are_where_a_gradient_is_not_finite(
    method, attach, options, small_8bit
):
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = made(method, attach, dtype, per_layer=True, **options)
        for batch in range(4):
            loss_of(model, batch).backward()
            optimizer.step()
        before = copy.deepcopy((weights(model), [dict(state) for state in optimizer.state.values()]))
        loss_of(model, 4, float('inf')).backward()
        optimizer.step()
        after = weights(model), [dict(state) for state in optimizer.state.values()]
        if method != 'loqt':  # a merge of the same basis rounds W anew
            assert same(after[0], before[0]) and not optimizer.metrics['grad_norm'].isfinite()
        for old, new in zip(before[1], after[1]):
            kept = [name for name in old if name[0] in 'MVn' and name != 'next']
            for name in kept:  # two of the evenly spaced codes stand for 0, or nearly
                torch.testing.assert_close(read_state(new, name), read_state(old, name), rtol=0, atol=1e-8)
        for batch in range(5, 9):
            loss_of(model, batch).backward()
            optimizer.step()
        assert all(w.isfinite().all() for w in weights(model) if w.is_floating_point())
        assert not same(weights(model), before[0])


@pytest.mark.parametrize('refresh', ['subspace', 'svd'])
@pytest.mark.parametrize('method', ['galore', 'qgalore', 'fira', 'loqt'])
def test_per_layer_survives_a_first_batch_that_is_not_finite(method, refresh):
    if method == 'loqt':
        model, optimizer = made('loqt', per_layer=True)
        for layer in optimizer.layers.values():
            layer.refresh = refresh
    else:
        model, optimizer = made(method, method != 'fira', per_layer=True, refresh=refresh)
    walk(model, optimizer, 'nothing', bad={0})
    assert loss_of(model, 1).isfinite() and loss_of(model, 1) < loss_of(net(), 1) + 1


@pytest.mark.parametrize('options', [dict(), dict(grad_clip=0.1), dict(per_layer=True, grad_clip=0.1)], ids=str)
@pytest.mark.parametrize('method,attach', KINDS)
def test_grad_scaler_skips_a_step_that_overflows_and_trains_as_without_it(method, attach, options):
    if options.get('per_layer') and method in NEVER_CLIP:
        pytest.skip('refused: these cannot clip per layer')
    found = []
    for scaled in (False, True):
        model, optimizer = made(method, attach, **options)
        scaler = torch.amp.GradScaler('cpu', init_scale=64.0, growth_interval=100, enabled=scaled)
        for batch in range(8):
            if not scaled and batch in BAD:
                continue
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch, float('inf') if batch in BAD else None)).backward()
            if batch % 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        found.append(weights(model))
        assert not scaled or scaler.get_scale() == 16.0  # halved twice
    if method not in ('loqt', 'qgalore'):  # which round: 1e-7 may be a whole step of theirs
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('drop', DROPS[:3])
def test_dropout_of_the_next_batch_is_that_of_a_run_that_never_saw_the_dropped_one(drop):
    found = []
    for how in (None, drop):
        model, optimizer = made('lora')
        for layer in optimizer.layers:
            layer.dropout = 0.5
        found.append(walk(model, optimizer, how, 2))
    assert same(*found)
