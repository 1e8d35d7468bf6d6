"""lora.py against its formula under autograd, peft, bitsandbytes' NF4, and the contract that every method keeps."""

import json
import shutil
import signal
from types import SimpleNamespace

import conftest
import pytest
import torch
from safetensors.torch import load_file
from test_galore import TINY, train

import configurator
import lora
import sample
import train as training
from lora import LoRALinear
from model import LLaMA, ModelConfig
from plumbing import build, hf, resume
from quant import decode, encode

CONFIG = dict(learning_rate=1e-2, beta1=0.9, beta2=0.999, weight_decay=0.0, rank=4, scale=2.0, state_bits=32, seed=0)
CONFIG |= dict(grad_clip=0.0, per_layer=False, offload=False, quantize='none', double_quant=False)
CONFIG |= dict(dropout=0.0, merge_every=0, train_rest='auto', targets='all', init_from='scratch')
CONFIG |= dict(rslora=False, lora_plus=1.0)
RELORA = dict(dropout=0.3, merge_every=2, train_rest='no')


def model_and_optimizer(dtype=torch.float32, **changes):
    config = SimpleNamespace(**CONFIG | changes)
    model = LLaMA(ModelConfig(**TINY), dtype=dtype, linear=lora.linear(config)).materialise(seed=0)
    model.compute_dtype = torch.float32
    return model, lora.setup(model, config)


@pytest.mark.parametrize('quantize', ['none', 'nf4'])
@pytest.mark.parametrize('shape', [(12, 30), (30, 12)])
def test_forward_and_backward_are_the_formulas(shape, quantize):
    torch.manual_seed(0)
    W = torch.randn(shape)
    layer = LoRALinear(shape[1], shape[0], rank=4, alpha=8.0, quantize=quantize)
    layer.set_weight(W)
    W = decode(encode(W, quantize), shape, torch.float32)
    x, delta = torch.randn(2, 9, shape[1], requires_grad=True), torch.randn(2, 9, shape[0])
    torch.testing.assert_close(layer(x), x @ W.T, msg='B is zero at the start')
    layer.B.data.normal_()
    (layer(x) * delta).sum().backward()
    A, B = layer.A.detach().clone().requires_grad_(), layer.B.detach().clone().requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    ((x2 @ (W + 2.0 * B @ A).T) * delta).sum().backward()
    for ours, theirs in ((x.grad, x2.grad), (layer.A.grad, A.grad), (layer.B.grad, B.grad)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.dense_weight(), (W + 2.0 * B @ A).detach())


def test_frozen_weights_do_not_move_and_all_else_learns():
    model, optimizer = model_and_optimizer()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    train(model, optimizer, 5)
    after = model.state_dict()
    frozen = [name for name in before if name.endswith('_proj.W')]
    assert len(frozen) == 14 and all(torch.equal(before[name], after[name]) for name in frozen)
    assert not any(torch.equal(before[name], after[name]) for name in before if name not in frozen)


def test_targets_that_name_no_layer_are_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"targets='q_prj' names no such layers: use all, or some of q_proj,k_proj"):
        model_and_optimizer(init_from='path/to/folder', targets='q_prj')


def test_a_run_of_before_goes_on_with_its_targets():
    config = {'method': 'lora', 'lora_targets': 'q_proj,v_proj'}
    resume.in_todays_keys(config)
    assert config == {'method': 'lora', 'targets': 'q_proj,v_proj'}


def test_fine_tuning_trains_the_factors_of_the_chosen_layers_and_nothing_else():
    model, optimizer = model_and_optimizer(init_from='path/to/folder', targets='q_proj,down_proj')
    before = {name: t.clone() for name, t in model.state_dict().items()}
    train(model, optimizer, 3)
    moved = {name for name, t in model.state_dict().items() if not torch.equal(before[name], t)}
    chosen = [f'layers.{i}.{module}' for i in range(2) for module in ('self_attn.q_proj', 'mlp.down_proj')]
    assert moved == {f'{name}.{factor}' for name in chosen for factor in 'AB'}
    assert sum(p.numel() for group in optimizer.param_groups for p in group['params']) == 2 * 4 * (32 + 32 + 56 + 32)


def test_given_weights_get_an_A_of_their_own_in_each_layer(tmp_path):
    LLaMA(ModelConfig(**TINY)).materialise().save_pretrained(tmp_path)
    config = SimpleNamespace(**CONFIG | dict(init_from=str(tmp_path)))
    model = LLaMA.from_pretrained(tmp_path, linear=lora.linear(config))
    lora.setup(model, config)
    a, b = (model.layers[i].self_attn.q_proj.A for i in range(2))
    assert not torch.allclose(a, b) and a.abs().max() < 32**-0.5


# ---- beside peft and bitsandbytes ----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A tiny random LLaMA of transformers, in a folder."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=16, initializer_range=0.2)
    folder = tmp_path_factory.mktemp('base')
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def theirs(base):
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(base, attn_implementation='sdpa')


def ours(base, adapter=None, **changes):
    config = SimpleNamespace(**CONFIG | dict(init_from=str(base)) | changes)
    model = LLaMA.from_pretrained(base, linear=lora.linear(config))
    optimizer = lora.setup(model, config)
    if adapter:
        hf.load_adapter(model, str(adapter))
    return model, optimizer


def peft_model(base, targets, **options):
    peft = pytest.importorskip('peft')
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type='CAUSAL_LM', **options)
    model = peft.get_peft_model(theirs(base), config)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if 'lora_' in name:
            torch.nn.init.normal_(p, std=0.2, generator=generator)
    return model


ALL = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']


@pytest.mark.parametrize('targets', [ALL, ['q_proj', 'v_proj']], ids=len)
def test_logits_loss_and_gradients_equal_pefts_after_reading_its_folder(targets, base, tmp_path):
    reference = peft_model(base, targets)
    reference.save_pretrained(tmp_path)
    model, _ = ours(base, tmp_path, targets=','.join(targets))
    x = torch.randint(0, 61, (3, 16), generator=torch.Generator().manual_seed(0))
    expected = reference(x, labels=x)
    torch.testing.assert_close(model(x), expected.logits, atol=1e-5, rtol=1e-5)
    loss = model(x[:, :-1], x[:, 1:])
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    expected.loss.backward(), loss.backward()
    gradients = {name.replace('.default', ''): p.grad for name, p in reference.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in hf.adapters(model)}
    assert found.keys() == gradients.keys() and len(found) == 2 * 2 * len(targets)
    for name in found:
        torch.testing.assert_close(found[name], gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize('options', [dict(rslora=True), dict(train_rest='tables'), dict(train_rest='tables', tie=True)])
def test_rslora_and_trained_tables_go_to_peft_and_back(options, base, tmp_path):
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    if options.pop('tie', False):
        torch.manual_seed(0)
        config = transformers.LlamaConfig.from_pretrained(base, tie_word_embeddings=True)
        base = tmp_path / 'base'
        transformers.LlamaForCausalLM(config).save_pretrained(base)
    model, optimizer = ours(base, **options)
    assert model.layers[0].self_attn.q_proj.scale == (8 / 4**0.5 if options.get('rslora') else 2.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 5)
    tables = options.get('train_rest') == 'tables'
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    expected = {'embed_tokens.weight', *[['lm_head.weight'], []][model.config.tie_embeddings]} if tables else set()
    assert {name for name in moved if not name.endswith(('.A', '.B'))} == expected
    hf.save_adapter(model, str(tmp_path / 'adapter'), str(base), tables)
    x = torch.randint(0, 61, (3, 16), generator=torch.Generator().manual_seed(0))
    reference = peft.PeftModel.from_pretrained(theirs(base), tmp_path / 'adapter')
    torch.testing.assert_close(reference(x).logits, model(x), atol=1e-5, rtol=1e-5)
    again, _ = ours(base, tmp_path / 'adapter', **options)
    assert torch.equal(again(x), model(x))
    reference.save_pretrained(tmp_path / 'theirs')  # as peft writes it
    again, _ = ours(base, tmp_path / 'theirs', **options)
    assert torch.equal(again(x), model(x))


def test_an_adapter_that_trains_a_tied_head_apart_is_refused(base, tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.LlamaConfig.from_pretrained(base, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / 'base')
    peft_model(tmp_path / 'base', ['q_proj'], modules_to_save=['lm_head']).save_pretrained(tmp_path / 'adapter')
    with pytest.raises(hf.AdapterError, match='trains embedding and head apart, which are one matrix in its base'):
        ours(tmp_path / 'base', tmp_path / 'adapter', targets='q_proj')


def test_lora_plus_is_a_learning_rate_of_B_alone(base):
    found = []
    for factor in (1.0, 16.0):
        model, optimizer = ours(base, lora_plus=factor)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, optimizer, 1)
        found.append({name: p.detach() - start[name] for name, p in model.named_parameters()})
    for name in found[0]:
        scale = 16.0 if name.endswith('.B') else 1.0
        torch.testing.assert_close(found[1][name], scale * found[0][name], atol=1e-6, rtol=1e-5, msg=name)
    assert any(d.abs().max() > 0 for name, d in found[0].items() if name.endswith('.B'))


def test_merged_logits_are_told_apart_from_the_adapters(base):
    model, optimizer = ours(base)
    train(model, optimizer, 5)
    x = torch.randint(0, 61, (1, 16), generator=torch.Generator().manual_seed(0))
    before = model(x)
    most, largest, same = hf.merge_error(model, x)
    assert most < 1e-4 < largest and same == 1 and torch.equal(model(x), before)
    rough, optimizer = ours(base, quantize='nf4')
    train(rough, optimizer, 5)
    for layer in (module for module in rough.modules() if hf.is_lora(module)):
        layer.dtype = torch.bfloat16  # of what is written
    assert hf.merge_error(rough, x)[0] > 1e-3


@pytest.mark.parametrize('targets', ['all', 'q_proj,v_proj'])
def test_peft_reads_our_folder_and_computes_the_same(targets, base, tmp_path):
    peft = pytest.importorskip('peft')
    model, optimizer = ours(base, targets=targets)
    train(model, optimizer, 5)
    hf.save_adapter(model, str(tmp_path), str(base))
    reference = peft.PeftModel.from_pretrained(theirs(base), tmp_path)
    x = torch.randint(0, 61, (3, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reference(x).logits, model(x), atol=1e-5, rtol=1e-5)
    assert (model(x) - LLaMA.from_pretrained(base)(x)).abs().max() > 0.1, 'it has learnt something'
    again, _ = ours(base, tmp_path, targets=targets)
    assert torch.equal(again(x), model(x))


def test_the_merged_folder_is_pefts_merged_model(base, tmp_path):
    reference = peft_model(base, ALL)
    reference.save_pretrained(tmp_path / 'adapter')
    model, _ = ours(base, tmp_path / 'adapter')
    model.save_pretrained(tmp_path / 'merged')
    merged = reference.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / 'merged/model.safetensors').items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-5, rtol=1e-5, msg=name)


def test_qlora_is_bitsandbytes_decoded_weight_plus_the_product():
    functional = pytest.importorskip('bitsandbytes.functional')
    torch.manual_seed(0)
    W, x = torch.randn(96, 128), torch.randn(5, 128, requires_grad=True)
    decoded = functional.dequantize_4bit(*functional.quantize_4bit(W, blocksize=64, quant_type='nf4'))
    layer = LoRALinear(128, 96, rank=4, alpha=8.0, quantize='nf4')
    layer.set_weight(W)
    layer.B.data.normal_()
    torch.testing.assert_close(layer(x), x @ (decoded + 2.0 * layer.B @ layer.A).T, atol=1e-4, rtol=1e-5)
    assert layer.W.dtype == torch.uint8 and layer.W.numel() == 96 * 128 // 2, 'half a byte a weight'
    delta = torch.randn(5, 96)
    (gradient,) = torch.autograd.grad(layer(x), x, delta)
    torch.testing.assert_close(gradient, delta @ (decoded + 2.0 * layer.B @ layer.A), atol=1e-4, rtol=1e-4)


# ---- ReLoRA --------------------------------------------------------------------------------------------------------


def test_a_merge_by_hand():
    layer = LoRALinear(2, 2, rank=1, alpha=2.0)
    layer.set_weight(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    layer.A.data, layer.B.data = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5], [2.0]])
    layer.merge(seed=0)
    assert torch.equal(layer.W, torch.tensor([[2.0, 1.0], [7.0, 0.0]])), 'W + 2 (0.5, 2)^T (1, -1)'
    assert torch.equal(layer.B, torch.zeros(2, 1)) and layer.A.abs().max() < 0.5**0.5
    A = layer.A.clone()
    layer.merge(seed=1)
    assert not torch.equal(layer.A, A) and torch.equal(layer.dense_weight(), layer.W), 'other dimensions each time'


def test_a_merge_into_bf16_is_right_on_average_and_into_4_bits_to_the_nearest():
    torch.manual_seed(0)
    W, B, A = torch.ones(64, 64), torch.full((64, 1), 0.001), torch.ones(1, 64)
    found = []
    for dtype, quantize in ((torch.bfloat16, 'none'), (torch.float32, 'nf4')):
        layer = LoRALinear(64, 64, rank=1, alpha=1.0, quantize=quantize, dtype=dtype)
        layer.set_weight(W)
        layer.A.data, layer.B.data = A.clone(), B.clone()
        layer.merge(seed=3)
        found.append(layer.read('W', torch.float32))
    assert set(found[0].unique().tolist()) == {1.0, 1.0078125} and abs(found[0].mean() - 1.001) < 3e-4
    assert torch.equal(found[1], decode(encode(W + B @ A), (64, 64), torch.float32))


@pytest.mark.parametrize('per_layer', [False, True])
@pytest.mark.parametrize('accumulation', [1, 2])
def test_after_a_merge_all_goes_on_as_a_new_run_on_the_merged_weights(accumulation, per_layer):
    changes = dict(train_rest='no', per_layer=per_layer)
    model, optimizer = model_and_optimizer(merge_every=3, **changes)
    train(model, optimizer, 3, accumulation)
    x = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    without, _ = model_and_optimizer(**changes)
    assert all(not layer.B.any() for layer in optimizer.layers)
    assert all(not s['M'].any() and not s['V'].any() and s['fill'] == 0 for s in optimizer.state.values())
    fresh, other = model_and_optimizer(**changes)
    fresh.load_state_dict(model.state_dict())
    assert (fresh(x) - without(x)).abs().max() > 1e-3
    for one, its_optimizer in ((model, optimizer), (fresh, other)):
        train(one, its_optimizer, 2, accumulation, first=3)
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_two_merges_give_a_change_of_twice_the_rank():
    model, optimizer = model_and_optimizer(merge_every=4, train_rest='no', rank=2)
    layer = model.layers[0].mlp.up_proj
    before = layer.dense_weight().clone()
    ranks = []
    for first in (0, 4):
        train(model, optimizer, 4, first=first)
        s = torch.linalg.svdvals(layer.dense_weight() - before)
        ranks.append(int((s > 1e-4 * s[0]).sum()))
    assert ranks == [2, 4]


def test_learning_rate_warms_up_again_after_each_merge():
    model, optimizer = model_and_optimizer(merge_every=40, train_rest='no')
    p, optimizer.lr = model.layers[0].mlp.up_proj.A, 0.5
    rates = [optimizer.state[p].update(step=step) or optimizer.rate(p) for step in range(120)]
    rise = [0.2, 0.4, 0.6, 0.8]  # a tenth of 40 steps
    assert rates == pytest.approx([0.5 * share for share in [1] * 40 + rise + [1] * 36 + rise + [1] * 36])


# ---- dropout -------------------------------------------------------------------------------------------------------


def identity_layer(n=64, p=0.25):
    """W = 0, A = B = I: it returns its input with the mask applied."""
    layer = LoRALinear(n, n, rank=n, alpha=float(n), dropout=p)
    layer.set_weight(torch.zeros(n, n))
    layer.A.data, layer.B.data = torch.eye(n), torch.eye(n)
    return layer


def test_dropout_zeroes_its_share_scales_the_rest_and_touches_no_global_generator():
    layer, x = identity_layer(), torch.ones(200, 64)
    state = torch.get_rng_state()
    y = layer(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs((y == 0).float().mean() - 0.25) < 0.015 and abs(y.mean() - 1) < 0.02


def test_dropout_is_off_in_evaluation_and_sampling():
    layer, x = identity_layer(), torch.ones(20, 64)
    with torch.no_grad():
        assert torch.equal(layer(x), x)
    assert torch.equal(layer.eval()(x), x)


def test_masks_differ_by_layer_and_micro_batch_and_by_nothing_else():
    def masks(**changes):
        model, optimizer = model_and_optimizer(**RELORA | dict(merge_every=0) | changes)
        seen = []
        for layer in optimizer.layers:
            layer.dropped = lambda x, layer=layer, old=layer.dropped: (
                seen.append((layer.in_features, old(x) == 0)) or old(x)
            )
        train(model, optimizer, 2, accumulation=2)
        return [mask for size, mask in seen if size == 32]

    first, again, other = masks(), masks(per_layer=True), masks(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(first) == 2 * 2 * 2 * 6 and len({mask.numpy().tobytes() for mask in first}) == len(first)
    assert not any(torch.equal(a, b) for a, b in zip(first, other))


def test_activation_checkpointing_sees_the_same_masks():
    results = []
    for checkpointing in (False, True):
        model, optimizer = model_and_optimizer(dropout=0.5)
        model.checkpointing = checkpointing
        results.append(train(model, optimizer, 4, accumulation=2).state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_one_large_batch_equals_its_micro_batches():
    results = []
    for parts in (1, 2, 4):
        model, optimizer = model_and_optimizer(learning_rate=1e-3, train_rest='no')
        for step in range(4):
            x = torch.randint(0, 61, (8, 17), generator=torch.Generator().manual_seed(step))
            for part in x.chunk(parts):
                (model(part[:, :-1], part[:, 1:]) / parts).backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=2e-5, rtol=0)


def test_a_saved_model_is_a_plain_one_with_the_product_added(tmp_path):
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 4)
    model.save_pretrained(tmp_path)
    x = torch.randint(0, 61, (2, 16))
    torch.testing.assert_close(LLaMA.from_pretrained(tmp_path)(x), model(x), atol=1e-4, rtol=1e-4)


# ---- the commands --------------------------------------------------------------------------------------------------


def here(script, *words):
    """What `python SCRIPT.py WORDS` does, in this process, which has imported everything already."""
    flags = conftest.tiny(*words) if script is training else list(words)
    positional = {} if script is training else {'positional': 'checkpoint'}
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    script.main(configurator.load(script.__file__, flags, script.problems, **positional))
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture(scope='module')
def tuned(tmp_path_factory, data):
    """A model of ours, and a run of LoRA that started from it and was resumed."""
    folder = tmp_path_factory.mktemp('tuned')
    here(training, f'--dataset={data}', f'--out_dir={folder / "base"}', '--max_iters=5')
    flags = ['--method=lora', '--dropout=0.1', '--learning_rate=1e-2', '--quantize=none', f'--dataset={data}']
    flags.append(f'--out_dir={folder / "run"}')
    here(training, *flags, f'--init_from={folder / "base"}', '--max_iters=5')
    shape = [f'--{name}=0' for name in ('n_layer', 'n_head', 'n_embd', 'n_inner')]  # the folder's
    here(training, *flags, '--init_from=resume', '--max_iters=10', *shape)
    return folder


def test_a_runs_adapter_goes_to_peft_and_back(tuned, data, capsys):
    words = ['--tokens=12', '--temperature=0', '--prompt=def']
    here(sample, str(tuned / 'run'), f'--save_adapter={tuned / "adapter"}', *words)
    text = capsys.readouterr().out.partition('\n')[2]  # without what was written where
    here(sample, str(tuned / 'adapter'), f'--save_to={tuned / "merged"}', *words)
    said = capsys.readouterr().out
    assert 'the likeliest token is the same at 100% of positions' in said
    assert said.partition('written: ')[2].partition('\n')[2] == text != ''

    stored = json.loads((tuned / 'adapter/adapter_config.json').read_text())
    assert stored['base_model_name_or_path'] == str(tuned / 'base/best') and stored['target_modules'] == sorted(ALL)
    peft = pytest.importorskip('peft')
    reference = peft.PeftModel.from_pretrained(theirs(stored['base_model_name_or_path']), tuned / 'adapter')
    x = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(0))
    for name in ('run/best', 'merged'):
        merged = LLaMA.from_pretrained(tuned / name)
        torch.testing.assert_close(reference(x).logits, merged(x), atol=1e-5, rtol=1e-5)
    embeddings = [LLaMA.from_pretrained(tuned / name).embed_tokens.weight for name in ('base/best', 'run/best')]
    assert torch.equal(*embeddings), 'also after a resume'

    flags = ['--method=lora', f'--init_from={tuned / "adapter"}', '--quantize=none', '--max_iters=3']
    flags += [f'--dataset={data}', f'--out_dir={tuned / "further"}']
    here(training, *flags)
    began = float(capsys.readouterr().out.split('val loss ')[1].split()[0])
    assert abs(began - json.loads((tuned / 'run/best/run.json').read_text())['best_val_loss']) < 1e-4
    expected = '--rank=8 --scale=2 --targets=down_proj,gate_proj,'
    with pytest.raises(hf.AdapterError, match=expected):
        here(training, *flags, '--rank=4', '--overwrite')
    with pytest.raises(training.Stop, match='is an adapter: use --method=lora'):
        here(training, *flags[1:2], *flags[4:], '--overwrite')


def test_an_adapter_that_is_not_all_that_was_trained_is_refused(tuned, tmp_path):
    shutil.copytree(tuned / 'run/best', tmp_path / 'run')
    run = json.loads((tmp_path / 'run/run.json').read_text())
    del run['checksum']  # as in the record of an old run
    for changes, expected in {
        (('train_rest', 'yes'),): 'trained embeddings, head and norms, too, so an adapter alone is not the model',
        (('merge_every', 3),): 'merged its adapter into them, so an adapter alone is not the model: use --save_to=DIR',
        (('method', 'galore'),): 'is no run of --method=lora, there is no adapter in it: use --save_to=DIR',
    }.items():
        (tmp_path / 'run/run.json').write_text(json.dumps(run | {'config': run['config'] | dict(changes)}))
        with pytest.raises(hf.AdapterError, match=expected):
            build.base_of(str(tmp_path / 'run'))


@pytest.mark.parametrize('change', [dict(use_dora=True), dict(rank_pattern={'q_proj': 2}), dict(bias='all')], ids=str)
def test_an_adapter_that_is_not_plain_lora_is_refused(change, base, tmp_path):
    peft_model(base, ['q_proj'], **change).save_pretrained(tmp_path)
    with pytest.raises(hf.AdapterError, match='is not plain LoRA: merge it with peft'):
        hf.read_adapter(str(tmp_path))


def test_impossible_combinations_are_refused_in_a_sentence_each():
    def problems(*flags):
        return training.problems(configurator.load(conftest.ROOT / 'train.py', list(flags)))

    refused = r"is lora's: leave it out with method='\w+', or use --method=lora"
    for flags in ('--dropout=0.1',), ('--merge_every=5', '--method=loqt'):
        with pytest.raises(configurator.ConfigError, match=refused):
            problems(*flags)
    for flags, expected in {
        ('--method=lora', '--dropout=1.5'): 'dropout=1.5 is not a share of the inputs',
        ('--method=lora', '--merge_every=-1'): 'merge_every=-1 is too small: use 0 or more',
    }.items():
        found = problems(*flags)
        assert len(found) == 1 and expected in found[0], found
    assert problems('--method=lora', '--dropout=0.05', '--merge_every=100', '--targets=q_proj,v_proj') == []


def test_impossible_arguments_name_the_thing_and_what_to_type():
    with pytest.raises(ValueError, match="rank=0 cannot be: use 'nf4' or 'none', and at least 1"):
        LoRALinear(8, 8, rank=0)
    with pytest.raises(ValueError, match='dropout=1 is not a share of the inputs: use at least 0 and less than 1'):
        LoRALinear(8, 8, dropout=1)
    with pytest.raises(ValueError, match=r'build the model with LLaMA\(config, linear=lora.linear'):
        lora.setup(LLaMA(ModelConfig(**TINY)), SimpleNamespace(**CONFIG))


def test_a_run_that_trains_the_tables_gives_an_adapter_with_them(tuned, data, tmp_path, capsys):
    flags = ['--method=lora', '--train_rest=tables', '--rslora', '--scale=0.5', '--quantize=none', '--max_iters=3']
    flags += [
        '--learning_rate=1e-2',
        f'--dataset={data}',
        f'--init_from={tuned / "base"}',
        f'--out_dir={tmp_path / "run"}',
    ]
    here(training, *flags)
    assert 'lora: lora_alpha 4, r 8, factor on B A: lora_alpha / sqrt(r) = 1.41421' in capsys.readouterr().out
    here(sample, str(tmp_path / 'run'), f'--save_adapter={tmp_path / "adapter"}', '--tokens=1')
    stored = json.loads((tmp_path / 'adapter/adapter_config.json').read_text())
    assert stored['modules_to_save'] == ['embed_tokens', 'lm_head'] and stored['use_rslora']
    peft = pytest.importorskip('peft')
    reference = peft.PeftModel.from_pretrained(theirs(tuned / 'base/best'), tmp_path / 'adapter')
    x = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(0))
    run = LLaMA.from_pretrained(tmp_path / 'run/best')
    torch.testing.assert_close(reference(x).logits, run(x), atol=1e-5, rtol=1e-5)
    assert not torch.equal(run.embed_tokens.weight, LLaMA.from_pretrained(tuned / 'base/best').embed_tokens.weight)
    # a run that goes on with the adapter keeps its tables, and so does its own adapter
    flags = [*flags[:1], *flags[2:6], f'--dataset={data}', f'--init_from={tmp_path / "adapter"}']
    here(training, *flags, f'--out_dir={tmp_path / "further"}')
    here(sample, str(tmp_path / 'further'), f'--save_adapter={tmp_path / "again"}', '--tokens=1')
    assert json.loads((tmp_path / 'again/adapter_config.json').read_text())['modules_to_save']
    a, b = (load_file(tmp_path / name / 'adapter_model.safetensors') for name in ('adapter', 'again'))
    assert torch.equal(a['base_model.model.lm_head.weight'], b['base_model.model.lm_head.weight'])
