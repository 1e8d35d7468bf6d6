"""plumbing/hf_models.py: transformers' own modules under our trainer, against themselves."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import values
from hf_tiny import DECODERS, ENCODERS, saved

import configurator
import coreset
import galore
import memest
import quant
import train as training
from configurator import method_of
from memory import flags, trace
from memory.measure import Measure
from model import ModelError
from plumbing import hf, hf_models, hf_modules, resume
from plumbing.build import layers_of
from train import training_step

transformers.logging.disable_progress_bar()
KEYS = dict(learning_rate=1e-2, max_iters=10, batch_size=4, block_size=24, init_from='folder', model_dropout=-1.0)


def config_of(method='adamw', **changes):
    """A namespace with train.py's keys and the method's options."""
    return configurator.switch(SimpleNamespace(**KEYS), method, **changes)


def batch(seed=0, rows=4, T=24, masked=True):
    """tokens, targets (rows, T); rows of unequal length have no targets behind their end."""
    ids = torch.randint(0, 301, (rows, T + 1), generator=torch.Generator().manual_seed(seed))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].clone()
    for row in range(rows if masked else 0):
        y[row, : row + 1], y[row, T - 2 * row :] = -100, -100
    return x, y


def rows_of_step(step, labels):
    """Four rows as micro-batches of one."""
    if labels:
        x, types, y = pairs(labels, 1, step)
        return [(x[i : i + 1], y[i : i + 1], None, LENGTHS[i : i + 1], types[i : i + 1]) for i in range(4)]
    return [(x[None], y[None]) for x, y in zip(*batch(step))]


def steps(folder, config, n=3, micro_batches=1, labels=0, first=0, states=None):
    """-> model, optimizer, losses after n steps from the `first` on, of four rows each."""
    model = hf_models.load(folder, config, torch.float32, 'cpu', layers_of(config), labels)
    model.checkpointing = config.checkpointing
    optimizer = method_of(config).setup(model, config)
    if states:
        optimizer.load_state_dict(states)
    losses = []
    for step in range(first, first + n):
        model.at_step(step)
        rows, part = rows_of_step(step, labels), 4 // micro_batches
        batches = []
        for some in (rows[a : a + part] for a in range(0, 4, part)):
            batches.append(tuple(None if one[0] is None else torch.cat(one) for one in zip(*some)))
        losses.append(training_step(model, optimizer, batches, config.learning_rate, 'cpu').item())
    return model, optimizer, losses


def largest_difference(one, other):
    """Between the matrices of two models. A key's bias has no gradient but rounding, of which Adam makes steps."""
    pairs = zip(one.dense_weights(), other.dense_weights(), strict=True)
    return max((a() - b()).abs().max().item() for (_, shape, a), (_, _, b) in pairs if len(shape) == 2)


@pytest.mark.parametrize('name', DECODERS)
@pytest.mark.parametrize('checkpointing', [False, True])
def test_loss_and_gradients_are_those_of_the_models_own_backward(tmp_path, name, checkpointing):
    """Tied heads and heads with a bias, LayerNorms, learned and rotated positions, masked targets."""
    theirs, (x, y) = saved(tmp_path, name), batch()
    ours = hf_models.load(tmp_path, config_of())
    ours.checkpointing = checkpointing
    loss = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
    loss.backward()
    found = ours(x, y)
    found.backward()
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-6)
    for (key, p), q in zip(theirs.named_parameters(), ours.inner.parameters(), strict=True):
        grad = q.grad.T if name == 'gpt2' and 'c_' in key and p.dim() == 2 else q.grad
        torch.testing.assert_close(grad, p.grad, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize('name', DECODERS)
def test_a_saved_folder_is_the_models_own_and_has_equal_logits(tmp_path, name):
    theirs, (x, _) = saved(tmp_path / 'one', name), batch()
    for method in ('adamw', 'lora'):
        config = config_of(method, **dict(quantize='none') if method == 'lora' else {})
        ours = hf_models.load(tmp_path / 'one', config, linear=layers_of(config))
        assert ours.n_params() == sum(p.numel() for p in theirs.parameters())
        ours.save_pretrained(tmp_path / 'two')
        again, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'two', output_loading_info=True)
        assert not any(told.values()), told
        assert torch.equal(again(x).logits, theirs(x).logits)


@pytest.mark.parametrize('name', DECODERS)
def test_galore_of_full_rank_is_adamw(tmp_path, name):
    saved(tmp_path, name)
    adamw, _, _ = steps(tmp_path, config_of('adamw'), 2)
    full = config_of('galore', rank=32, scale=1.0, update_proj_gap=100, refresh='svd')
    galore, optimizer, _ = steps(tmp_path, full, 0)
    for p, state in ((p, optimizer.state[p]) for p in optimizer.placeholder):  # P = 1: the same coordinates
        state.update(P=torch.eye(min(p.shape)), next=100)
    for step in range(2):
        training_step(galore, optimizer, [batch(step)], full.learning_rate, 'cpu')
    assert largest_difference(adamw, galore) < 1e-4


METHODS = {
    'adamw': {},
    'galore': dict(rank=8, update_proj_gap=2),
    'loqt': dict(rank=8, update_proj_gap=2, quantize='none'),
    'lora': dict(rank=4, quantize='none', dropout=0.2),
}


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(('name', 'labels'), [('gpt2', 0), ('phi', 0), ('roberta', 3), ('deberta-v2', 1)])
def test_accumulation_per_layer_and_checkpointing_change_nothing(tmp_path, name, labels, method):
    saved(tmp_path, name, labels)
    options = METHODS[method] | (dict(dropout=0.0) if method == 'lora' else {})
    plain, _, losses = steps(tmp_path, config_of(method, **options), labels=labels)
    for change in (dict(per_layer=True), dict(checkpointing=True)):
        other, _, found = steps(tmp_path, config_of(method, **options, **change), labels=labels)
        assert largest_difference(plain, other) < 1e-6 and losses == pytest.approx(found, abs=1e-6), change
    if method != 'galore' and method != 'loqt':  # whose first P comes from the first micro-batch
        other, _, found = steps(tmp_path, config_of(method, **options), micro_batches=4, labels=labels)
        assert losses == pytest.approx(found, rel=1e-5)


def test_dropout_is_a_function_of_seed_step_micro_batch_and_block(tmp_path):
    """Checkpointing draws the same masks again; other steps and micro-batches draw others; evaluation draws none."""
    saved(tmp_path, 'gpt2', dropout=0.3)
    _, _, plain = steps(tmp_path, config_of())
    _, _, again = steps(tmp_path, config_of(checkpointing=True))
    _, _, none = steps(tmp_path, config_of(model_dropout=0.0))
    assert plain == again and plain != none
    model, (x, y) = hf_models.load(tmp_path, config_of()), batch()
    model.at_step(3)
    first, second = model(x, y).item(), model(x, y).item()
    model.at_step(3)
    assert model(x, y).item() == first != second
    with torch.no_grad():
        assert model(x, y).item() == model(x, y).item()
    assert model.inner.training is False and model.training


@pytest.mark.parametrize('method', ['adamw', 'galore', 'loqt', 'lora'])
@pytest.mark.parametrize(('name', 'labels'), [('roberta', 3), ('deberta-v2', 1), ('bert', 2), ('opt', 0), ('phi', 0)])
def test_a_model_that_is_saved_and_read_again_goes_on_bit_for_bit(tmp_path, name, labels, method):
    """With dropout, packed weights, and what a classifier adds."""
    saved(tmp_path / 'one', name, labels, dropout=0.1)
    config = config_of(method, **METHODS[method] | (dict(quantize='nf4') if method in ('loqt', 'lora') else {}))
    whole, _, _ = steps(tmp_path / 'one', config, 4, labels=labels, micro_batches=2)
    half, optimizer, _ = steps(tmp_path / 'one', config, 2, labels=labels, micro_batches=2)
    half.save_pretrained(tmp_path / 'two')
    torch.save(optimizer.state_dict(), tmp_path / 'states.pt')
    states = torch.load(tmp_path / 'states.pt', weights_only=True)
    rest, _, _ = steps(tmp_path / 'two', config, 2, labels=labels, micro_batches=2, first=2, states=states)
    for (key, _, p), (_, _, q) in zip(whole.dense_weights(), rest.dense_weights(), strict=True):
        assert torch.equal(p(), q()), key


def test_weights_in_4_bits_are_those_of_the_folder_rounded_to_them(tmp_path):
    """A Conv1D's, too, which is its transpose."""
    theirs, (x, _) = saved(tmp_path, 'gpt2'), batch()
    config = config_of('lora', rank=4, quantize='nf4', double_quant=True)
    ours = hf_models.load(tmp_path, config, linear=layers_of(config))
    for module in theirs.transformer.h.modules():
        if type(module).__name__ == 'Conv1D':
            W = module.weight.data.T.contiguous()
            module.weight.data = quant.decode(quant.encode(W, 'nf4', True), W.shape, torch.float32).T
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-5, atol=1e-5)
    assert all(module.W.dtype == torch.uint8 for module in ours.layers.modules() if hasattr(module, 'set_weight'))


@pytest.mark.parametrize('name', hf_modules.PACKED)
def test_packed_rows_are_as_their_pieces_alone(tmp_path, name):
    saved(tmp_path, name)
    model, (x, _) = hf_models.load(tmp_path, config_of()), batch(rows=2)
    pieces = torch.tensor([0, 5, 24, 31, 48, 48], dtype=torch.int32)
    packed = model(x, pieces=pieces).flatten(0, 1)
    flat = x.flatten()
    for a, b in ((0, 5), (5, 24), (24, 31), (31, 48)):
        torch.testing.assert_close(packed[a:b], model(flat[None, a:b])[0], rtol=1e-5, atol=1e-5)


def trained(capsys, *flags):
    """Run train.py here. -> the lines at its end"""
    training.cli(configurator.load(training.__file__, flags, training.problems, earlier=resume.settings))
    return values(capsys.readouterr().out)


@pytest.mark.parametrize('method', METHODS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, data, capsys, method):
    """With the model's dropout; and the plan is within 0.1 % of what the run measured."""
    saved(tmp_path / 'gpt2', 'gpt2', dropout=0.1)
    options = [f'--{key}={value}' for key, value in METHODS[method].items()]
    flags = [f'--method={method}', *options, f'--init_from={tmp_path / "gpt2"}', f'--dataset={data}', '--checkpointing']
    flags += ['--block_size=24', '--batch_size=4', '--eval_interval=3', '--eval_tokens=512', '--lr_decay_iters=6']
    said = trained(capsys, *flags, f'--out_dir={tmp_path / "whole"}', '--max_iters=6')
    trained(capsys, *flags, f'--out_dir={tmp_path / "cut"}', '--max_iters=3')
    trained(capsys, f'--out_dir={tmp_path / "cut"}', '--init_from=resume', '--max_iters=6')
    one, two = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name / 'last') for name in ('whole', 'cut')
    )
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert int(said['peak_bytes_planned']) == pytest.approx(int(said['peak_bytes_measured']), rel=1e-3)


def test_what_cannot_hold_is_refused_in_a_sentence(tmp_path):
    config = transformers.MixtralConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config.save_pretrained(tmp_path / 'moe')
    with pytest.raises(ModelError, match=r'has experts, .*: use a dense model'):
        hf_models.load(tmp_path / 'moe', config_of())
    saved(tmp_path / 'opt', 'opt')
    with pytest.raises(ModelError, match='made for windows of 64 tokens: set block_size'):
        hf_models.load(tmp_path / 'opt', config_of(block_size=65))
    with pytest.raises(ModelError, match='save_merged=False is of our own families'):
        hf_models.load(tmp_path / 'opt', config_of('loqt', save_merged=False))
    (tmp_path / 'opt' / 'model.safetensors').write_bytes(b'broken')
    with pytest.raises(ModelError, match='transformers cannot read its weights'):
        hf_models.load(tmp_path / 'opt', config_of())
    transformers.T5Config().save_pretrained(tmp_path / 't5')
    with pytest.raises(ModelError, match='no single stack of blocks'):
        hf_models.load(tmp_path / 't5', config_of())
    saved(tmp_path / 'codegen', 'codegen')
    with pytest.raises(ModelError, match='rows of codegen are not packed'):
        hf_models.load(tmp_path / 'codegen', config_of())(*batch(), pieces=torch.tensor([0, 5, 96]))
    saved(tmp_path / 'bert', 'bert', masked=False)
    with pytest.raises(ModelError, match='a token sees those behind it, it is no language model'):
        hf_models.load(tmp_path / 'bert', config_of())
    saved(tmp_path / 'gemma', 'gemma2')
    with pytest.raises(ModelError, match='makes more of its logits than a product with its head'):
        hf_models.load(tmp_path / 'gemma', config_of())


# ---- classifiers -----------------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([24, 9, 17, 2])


def pairs(labels, pad, seed=0):
    """tokens (4, 24) padded on the right, types, and targets of a batch of sentence pairs."""
    x, _ = batch(seed, masked=False)
    x = torch.where(torch.arange(24) < LENGTHS[:, None], x.clamp_min(3), pad)
    types = (torch.arange(24) >= LENGTHS[:, None] // 2).long()
    targets = torch.tensor([0.5, 2.0, -1.0, 4.5]) if labels == 1 else torch.arange(4) % labels
    return x, types, targets


def own_logits(theirs, name, x, types):
    """As transformers computes them; a decoder row by row, so that none has padding."""
    if name in DECODERS:
        rows = [theirs.base_model(row[None, :n]).last_hidden_state[0, -1] for row, n in zip(x, LENGTHS)]
        return theirs.score(torch.stack(rows))
    named = {'token_type_ids': types} if name == 'bert' else {}
    return theirs(x, attention_mask=(torch.arange(24) < LENGTHS[:, None]).long(), **named).logits


@pytest.mark.parametrize('name', [*ENCODERS, 'gpt2', 'opt', 'phi'])
@pytest.mark.parametrize(('labels', 'checkpointing'), [(3, False), (3, True), (1, False)])
def test_a_classifiers_loss_and_gradients_are_those_of_the_models_own(tmp_path, name, labels, checkpointing):
    theirs = saved(tmp_path, name, labels)
    x, types, targets = pairs(labels, theirs.config.pad_token_id or 0)
    ours = hf_models.load(tmp_path, config_of(), labels=labels)
    ours.checkpointing = checkpointing
    logits = own_logits(theirs, name, x, types)
    losses = (logits[:, 0] - targets) ** 2 if labels == 1 else F.cross_entropy(logits, targets, reduction='none')
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0])
    (losses * weights).sum().div(7).backward()
    found = ours(x, targets, lengths=LENGTHS, types=types, weights=weights, divisor=7)
    found.backward()
    torch.testing.assert_close(ours(x, lengths=LENGTHS, types=types), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x, targets, lengths=LENGTHS, types=types), losses.mean(), rtol=1e-5, atol=1e-5)
    for (key, p), q in zip(theirs.named_parameters(), ours.inner.parameters(), strict=True):
        if p.grad is None or q.grad is None:  # a pooler that nothing reads
            assert p.grad is q.grad, key
            continue
        grad = q.grad.T if name == 'gpt2' and 'c_' in key and p.dim() == 2 else q.grad
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize('name', [*ENCODERS, 'phi'])
def test_a_head_that_is_missing_or_of_another_size_is_made_anew_by_the_seed(tmp_path, name, capsys):
    theirs = saved(tmp_path / 'lm', name)
    one, two, three = (
        hf_models.load(tmp_path / 'lm', config_of(seed=seed), labels=3) for seed in (1, 1, 2)
    )  # fmt: skip
    assert 'made anew' in capsys.readouterr().out
    weights = [{n: make() for n, _, make in model.dense_weights()} for model in (one, two, three)]
    assert all(torch.equal(p, weights[1][n]) for n, p in weights[0].items())
    differ = {n.partition('.')[0] for n, p in weights[0].items() if not torch.equal(p, weights[2][n])}
    assert differ <= {'classifier', 'score', 'pooler', 'bert'} and differ
    body = dict(theirs.base_model.named_parameters())
    found = dict(one.inner.base_model.named_parameters())
    assert all(torch.equal(p, found[n]) for n, p in body.items() if n in found)
    one.save_pretrained(tmp_path / 'three')
    again = hf_models.load(tmp_path / 'three', config_of(), labels=3)
    assert 'made anew' not in capsys.readouterr().out
    assert all(torch.equal(make(), weights[0][n]) for n, _, make in again.dense_weights())
    hf_models.load(tmp_path / 'three', config_of(), labels=2)
    assert 'made anew' in capsys.readouterr().out


# ---- CoLM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('name', 'layer'), [('opt', 'auto'), ('phi', 'auto'), ('gpt2', 'c_attn'), ('phi', 'fc2')])
@pytest.mark.parametrize('method', ['adamw', 'lora'])
def test_coresets_features_are_gradients_of_a_layer_of_the_last_block(tmp_path, name, layer, method):
    saved(tmp_path, name)
    config = config_of(method, **dict(quantize='none', rank=4) if method == 'lora' else {})
    model, (x, y) = hf_models.load(tmp_path, config, linear=layers_of(config)), batch()
    for module in coreset.value_layer(model, layer).modules() if method == 'lora' else ():
        torch.nn.init.normal_(module.B)
    model.checkpointing = True
    model.eval()
    found = coreset.features(model, x, y, 'grad', 2, layer=layer)
    p = coreset.features(model, x, y, 'zo', 2, directions=1, seed=1, layer=layer)['p']
    module = coreset.value_layer(model, layer)
    W = module.B if method == 'lora' else module.weight
    z = torch.randn(W.shape, generator=torch.Generator().manual_seed(100_003))
    for i in range(len(x)):
        (G,) = torch.autograd.grad(model(x[i : i + 1], y[i : i + 1]), W)
        torch.testing.assert_close(found['D'][i].T @ found['X'][i], G, atol=1e-5, rtol=1e-3)
        assert abs(p[i, 0] - (G * z).sum()) < 0.02 * G.norm() * z.norm() ** 0.5
    half = hf_models.load(tmp_path, config, torch.bfloat16, linear=layers_of(config))
    assert half.eval() and coreset.features(half, x, y, 'zo', 2, layer=layer)['p'].dtype == torch.float32


@pytest.mark.parametrize('name', ['opt', 'phi'])
def test_coresets_features_of_fewer_blocks_are_read_where_those_end(tmp_path, name):
    saved(tmp_path, name)
    model, (x, y) = hf_models.load(tmp_path, config_of()), batch()
    inputs = []
    module = coreset.value_layer(model, blocks=1)
    handle = module.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach().clone()))
    with torch.no_grad():
        model.eval()(x, y)
    handle.remove()
    found = coreset.features(model, x, y, 'grad', len(x), blocks=1)
    assert len(model.layers) > 1 and module is coreset.value_layer(model, blocks=1)
    torch.testing.assert_close(found['X'], inputs[0].view_as(found['X']), atol=1e-6, rtol=1e-5)
    assert found['D'].abs().sum() > 0


def test_a_last_block_without_such_a_layer_is_told_with_the_names_it_has(tmp_path):
    saved(tmp_path, 'gpt2')
    with pytest.raises(ModelError, match=r'use --coreset_layer=NAME, one of c_attn, c_proj, c_fc$'):
        coreset.value_layer(hf_models.load(tmp_path, config_of()))


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('name', 'labels'), [('roberta', 3), ('deberta-v2', 1), ('bert', 2), ('gpt2', 0), ('phi', 0)])
def test_an_adapter_is_read_by_peft_with_the_trained_head_as_one_of_its_modules_to_save(tmp_path, name, labels):
    peft = pytest.importorskip('peft')
    saved(tmp_path / 'base', name, labels)
    config = config_of('lora', rank=4, quantize='none', train_rest='no')
    model = hf_models.load(tmp_path / 'base', config, torch.float32, 'cpu', layers_of(config), labels)
    optimizer = method_of(config).setup(model, config)
    named = dict(lengths=LENGTHS) if labels else {}
    x, y = pairs(labels, 1)[::2] if labels else batch()
    before = {n: p.clone() for n, p in model.named_parameters()}
    for _ in range(3):
        optimizer.lr = 1e-2
        model(x, y, **named).backward()
        optimizer.step()
    moved = {n.removeprefix('inner.') for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert all(n[-2:] in ('.A', '.B') or n.startswith(('classifier', 'pooler', 'score')) for n in moved)
    assert (len([n for n in moved if n[-2:] not in ('.A', '.B')]) > 0) == bool(labels)
    hf.save_adapter(model, tmp_path / 'adapter', str(tmp_path / 'base'))
    kind = transformers.AutoModelForSequenceClassification if labels else transformers.AutoModelForCausalLM
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / 'base'), tmp_path / 'adapter').eval()
    mask = dict(attention_mask=(torch.arange(24) < LENGTHS[:, None]).long()) if labels else {}
    with torch.no_grad():
        expected = model(x, **named)
        torch.testing.assert_close(theirs(x, **mask).logits, expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / 'merged')  # W + B A, as a plain folder
    merged = kind.from_pretrained(tmp_path / 'merged').eval()
    torch.testing.assert_close(merged(x, **mask).logits, expected, rtol=1e-4, atol=1e-4)


def test_loqt_may_train_the_head_alone_beside_its_layers(tmp_path):
    saved(tmp_path, 'deberta-v2', 3)
    config = config_of('loqt', rank=8, train_rest='no', targets='query_proj,value_proj')
    model = hf_models.load(tmp_path, config, torch.float32, 'cpu', layers_of(config), 3)
    method_of(config).setup(model, config)
    trained = {n.removeprefix('inner.') for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition('.')[2] for n in trained if n.startswith('deberta')} == {'B'}
    assert {n.split('.')[-2] for n in trained} == {'query_proj', 'value_proj', 'dense', 'classifier'}
    assert {n.partition('.')[0] for n in trained} == {'deberta', 'pooler', 'classifier'}


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'labels', 'options'),
    [
        ('roberta', 3, dict(method='galore', rank=8, update_proj_gap=2)),
        ('roberta', 3, dict(method='lora', rank=4, train_rest='no', checkpointing=True)),
        ('deberta-v2', 1, dict(method='loqt', rank=8, update_proj_gap=2, train_rest='no', per_layer=True)),
        ('phi', 0, dict(method='lora', rank=4, quantize='none', targets='q_proj,k_proj,v_proj,fc1,fc2', dropout=0.1)),
        ('phi', 0, dict(method='adamw', gradient_accumulation_steps=2, grad_clip=1.0)),
        ('opt', 0, dict(method='galore', rank=8, update_proj_gap=2, state_bits=8, per_layer=True, checkpointing=True)),
        ('gpt2', 0, dict(method='loqt', rank=8, update_proj_gap=2)),
        ('gpt2', 0, dict(method='galore', rank=8, update_proj_gap=2, targets='c_attn,mlp.c_proj')),
    ],
)
def test_planned_bytes_are_those_of_a_real_run(tmp_path, name, labels, options):
    """One trace for ours and for transformers' modules; six blocks, of which it traces four."""
    saved(tmp_path, name, labels, dropout=0.1, num_hidden_layers=6)
    config = config_of(**options)
    shape, method = hf_models.read_shape(tmp_path, config, labels), method_of(config)
    plan = trace.plan_memory(config, shape, torch.float32, 'cpu', method, training_step, None, torch.float32)
    model = hf_models.load(tmp_path, config, torch.float32, 'cpu', layers_of(config), labels)
    model.checkpointing = config.checkpointing
    optimizer = method.setup(model, config)
    measure, (x, types, targets) = Measure(model, optimizer, False), pairs(labels or 3, 1)
    for step in range(8):
        with measure.step(step):
            model.at_step(step)
            row = (
                (x.clone(), targets.clone(), None, LENGTHS.clone(), types.clone())
                if labels
                else batch(step, masked=False)
            )
            batches = [row, *(batch(step, masked=False) for _ in range(config.gradient_accumulation_steps - 1))]
            training_step(model, optimizer, batches, config.learning_rate, 'cpu')
    assert plan.total == pytest.approx(measure.peak, rel=1e-3)


def test_memest_traces_such_a_run_and_says_what_formulas_do_not_know(tmp_path, capsys):
    saved(tmp_path / 'opt', 'opt')
    words = ['config/galore_laptop.py', f'--init_from={tmp_path / "opt"}', '--block_size=24', '--rank=8']
    assert memest.answer(words, *flags.read(words, {})) is None
    assert 'by the formula' not in (said := capsys.readouterr().out) and '= alive at the peak' in said
    for asked in ('--fit', '--gpus=2'):
        with pytest.raises(ModelError, match=f'{asked[:5]}.* is of formulas, which know our own families'):
            memest.answer([*words, asked], *flags.read([*words, asked], {}))


# ---- GaLore's own run on GLUE ----------------------------------------------------------------------------------------


class AuthorsGaLore:
    """What galore-torch does to a weight: 'std' projects on the right where there are as many rows as columns or more,
    by an SVD of every T-th gradient; Adam's eps stands beside a V that is not corrected; alpha is a factor on all."""

    def __init__(self, p, rank=0, scale=1.0, betas=(0.9, 0.999), eps=1e-8):
        self.p, self.rank, self.scale, self.betas, self.eps, self.t = p, rank, scale, betas, eps, 0

    @torch.no_grad()
    def step(self, lr):
        G, right = self.p.grad, self.p.dim() == 2 and self.p.shape[0] >= self.p.shape[1]
        if self.rank and not self.t:  # T is longer than this run
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            self.P = Vh[: self.rank] if right else U[:, : self.rank]  # (r, n) or (m, r)
        R = G if not self.rank else G @ self.P.T if right else self.P.T @ G
        if not self.t:
            self.M, self.V = torch.zeros_like(R), torch.zeros_like(R)
        self.t += 1
        b1, b2 = self.betas
        self.M.mul_(b1).add_(R, alpha=1 - b1), self.V.mul_(b2).addcmul_(R, R, value=1 - b2)
        N = self.M / (self.V.sqrt() + self.eps) * (1 - b2**self.t) ** 0.5 / (1 - b1**self.t)
        N = N if not self.rank else self.scale * (N @ self.P if right else self.P @ N)
        self.p.sub_(lr * N)
        self.p.grad = None


@pytest.mark.parametrize(('rank', 'scale', 'rate'), [(4, 4.0, 3e-5), (2, 2.0, 1e-4)])
def test_twenty_steps_of_a_classifier_are_those_of_the_authors_glue_run(tmp_path, rank, scale, rate):
    """Their groups: the linear layers of the blocks projected, all else by Adam at the same rate, which falls to 0. Of
    four rows the last block's queries have gradients of rank 4: with more directions theirs and ours are rounding."""
    theirs, seen = saved(tmp_path, 'roberta', 2), []
    config = config_of('galore', targets='query,key,value,intermediate.dense,output.dense', model_dropout=0.0)
    ours = hf_models.load(tmp_path, config, torch.float32, labels=2)
    before = {name: p.clone() for name, p in ours.inner.named_parameters()}
    linears = galore.linears_of(ours, config)
    assert len(linears) == 18 and {id(m) for m in linears} == {
        id(m) for m in galore.linears_of(ours, config_of('galore'))
    }
    groups = galore.groups(ours, linears)
    options = dict(rank=rank, scale=scale, update_proj_gap=500, refresh='svd', stagger=False)
    optimizer = galore.GaLoreAdamW(groups, **options)
    optimizer.attach(linears)
    projected = {
        id(theirs.get_parameter(n))
        for n, p in ours.inner.named_parameters()
        if id(p) in {id(m.weight) for m in linears}
    }
    rows = [AuthorsGaLore(p, rank * (id(p) in projected), scale) for p in theirs.parameters()]
    for step in range(20):
        x, _, _ = pairs(2, 1, step)
        y = torch.randint(0, 2, (4,), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(own_logits(theirs, 'roberta', x, None), y)
        found = ours(x, y, lengths=LENGTHS)
        seen.append((loss.item(), found.item()))
        loss.backward(), found.backward()
        optimizer.lr = rate * (1 - step / 20)
        optimizer.step()
        for row in rows:
            row.step(optimizer.lr)
    assert [a for a, _ in seen] == pytest.approx([b for _, b in seen], abs=1e-5)
    for (name, p), q in zip(ours.inner.named_parameters(), theirs.parameters(), strict=True):
        if not name.endswith('key.bias'):  # whose gradient is rounding alone
            assert (p - q).norm() < 0.05 * (p - before[name]).norm() and (p - q).abs().max() < 1e-3, name


def test_processes_share_the_micro_batches_and_their_masks(tmp_path, monkeypatch):
    saved(tmp_path, 'gpt2', dropout=0.1)
    model = hf_models.load(tmp_path, config_of())
    monkeypatch.setattr(torch, 'manual_seed', lambda seed: drawn.append(seed))
    found = {}
    for world in (1, 2):
        for rank in range(world):
            drawn = []
            for name, value in dict(is_initialized=True, get_world_size=world, get_rank=rank).items():
                monkeypatch.setattr(hf_modules.dist, name, lambda value=value: value)
            model.at_step(3)
            for _ in range(4 // world):
                model(*batch(rows=1))
            found[world, rank] = [drawn[a : a + 4] for a in range(0, len(drawn), 4)]  # before the blocks, and in each
    assert len({seed for some in found[1, 0] for seed in some}) == 16
    assert [found[2, 0], found[2, 1]] == [found[1, 0][::2], found[1, 0][1::2]]
