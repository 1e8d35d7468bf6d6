"""Weights in fp32, products in bf16 or fp16 by torch.autocast: what an optimizer of ours does is what torch's would."""

import pytest
import torch
from test_other_loops import METHODS, METHODS_BUT_LOQT, net, weights
from test_skipped_steps import KINDS, loss_of, made


def walk(model, optimizer, dtype, inside):
    """Six batches with torch.autocast around the forward, or, `inside`, around the whole step."""
    losses = []
    for batch in range(6):
        with torch.autocast('cpu', dtype):
            loss = loss_of(model, batch)
            if inside:
                loss.backward()
                optimizer.step()
        if not inside:
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return losses, weights(model)


@pytest.mark.parametrize('inside', [False, True])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('per_layer', [False, True])
@pytest.mark.parametrize('method', ['galore', 'qgalore', 'fira'])
def test_attached_layers_train_under_autocast_as_torchs_own(method, per_layer, dtype, inside):
    plain, attached = (walk(*made(method, how, per_layer=per_layer), dtype, inside) for how in (False, True))
    torch.testing.assert_close(attached[0], plain[0], rtol=5e-3 if dtype == torch.bfloat16 else 1e-3, atol=0)
    moved = torch.cat([(a - b).flatten() for a, b in zip(plain[1], weights(net()))]).norm()
    apart = torch.cat([(a - b).flatten() for a, b in zip(plain[1], attached[1])]).norm()
    assert apart < 0.05 * moved and all(w.dtype == torch.float32 for w in attached[1])


@pytest.mark.parametrize('method,attach', KINDS)
def test_a_step_inside_autocast_is_the_step_outside(method, attach):
    for per_layer in (False, True):
        found = [walk(*made(method, attach, per_layer=per_layer), torch.bfloat16, inside) for inside in (False, True)]
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-2)
        floats = ([w for w in ws if w.is_floating_point()] for _, ws in found)
        torch.testing.assert_close(*floats, rtol=0, atol=2e-2 if method == 'loqt' else 5e-3)


@pytest.mark.parametrize('method', METHODS)
def test_the_path_under_autocast_is_near_that_in_fp32(method):
    """As near as torch's own AdamW stays to itself, twice over."""

    def path(make, dtype):
        model = net()
        optimizer, losses = make(model), []
        for batch in range(12):
            with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    def apart(make):
        return (path(make, torch.bfloat16) / path(make, torch.float32) - 1).abs().max()

    assert apart(METHODS[method]) < 0.01 + 2 * apart(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2))


def test_no_stale_cast_of_a_weight_is_used_after_it_moved_inside_autocast():
    model, _ = kept = made('adamw', per_layer=True)
    with torch.autocast('cpu', torch.bfloat16):
        loss_of(model, 0).backward()
        inside = loss_of(model, 1)
    with torch.autocast('cpu', torch.bfloat16):
        assert kept and torch.equal(inside, loss_of(model, 1))


@pytest.mark.parametrize(
    'method,attach,per_layer', [('galore', True, False), ('galore', True, True), ('adamw', False, False)]
)
def test_transformers_trainer_with_bf16_trains_attached_layers_as_others(method, attach, per_layer, tmp_path):
    transformers = pytest.importorskip('transformers')

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, labels):
            return {'loss': (self.net(x) - labels).square().mean()}

    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    data = [{'x': row, 'labels': row.flip(0)} for row in x]
    found = []
    for attached in (False, attach):
        model = Model()
        optimizer = METHODS[method](model.net, per_layer=per_layer and attached)
        if attached:
            optimizer.attach([model.net[0], model.net[2]])
        arguments = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, bf16=True, max_steps=6, per_device_train_batch_size=8, report_to=[],
            gradient_accumulation_steps=1 if per_layer else 2, save_strategy='no', logging_steps=1, disable_tqdm=True,
            max_grad_norm=0.0 if per_layer else 1.0,
        )  # fmt: skip
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, constant))
        trainer.train()
        found.append([row['loss'] for row in trainer.state.log_history if 'loss' in row])
    assert found[1] == pytest.approx(found[0], rel=0.02)


@pytest.mark.parametrize('method', METHODS_BUT_LOQT)
def test_fp64_trains_in_fp64(method):
    found = []
    for dtype in (torch.float32, torch.float64):
        model, optimizer = made(method, method == 'galore', dtype)
        for batch in range(4):
            loss_of(model, batch).backward()
            optimizer.step()
        assert all(w.dtype == dtype for w in weights(model) if w.is_floating_point() and method != 'lora')
        found.append(loss_of(model, 9).item())
    assert found[0] == pytest.approx(found[1], rel=1e-2 if method == 'lora' else 1e-4)
    if method == 'adamw':
        theirs = net().double()
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
        for batch in range(4):
            optimizer.zero_grad()
            loss_of(theirs, batch).backward()
            optimizer.step()
        torch.testing.assert_close(weights(model), weights(theirs), rtol=1e-12, atol=1e-14)


def test_gradcheck_of_an_attached_layer():
    model, optimizer = made('galore', True, torch.float64)
    loss_of(model, 0).backward()
    optimizer.step()
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,))
