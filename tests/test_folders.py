"""Folders from elsewhere: the oracle's numbers or one sentence, whatever their files say."""

import json
import os
import random
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny
from safetensors.torch import load_file, save_file

import configurator
import lora
import sample
from data import DataError, fields, tokenizer
from data.batches import Tokens, read_meta
from data.tokenizer_files import files_of
from model import LLaMA, ModelConfig, ModelError
from plumbing import build, checkpoint, hf
from plumbing.families import config_from_hf
from plumbing.folder import AdapterError, headers, read_adapter

EACH = int(os.environ.get('HOSTILE_EACH', 2))  # hostile values a field; more find more
DEEP = '[' * 10_000 + ']' * 10_000
HOSTILE = ['null', '"x"', '"8"', '""', '-1', '0', '1', '2', '9999', 'true', 'false', '0.5', '1e400', 'NaN', '1e11']
HOSTILE += [
    '1' + '0' * 30,
    '1' + '0' * 5000,
    '[]',
    '[1]',
    '[null]',
    '{}',
    '{"a": null}',
    '"\\u0000"',
    '"../../x"',
    DEEP,
]
WRONG_TOP = ['[]', 'null', '3', '"x"', '', '{', '[' * 100_000, 'NaN', '\ufeff{}']
REFUSED = (ModelError, AdapterError, DataError, tokenizer.TokenizerError, checkpoint.CheckpointError, OSError)
SHAPE = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
X = torch.randint(0, 263, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def transformers():
    library = pytest.importorskip('transformers')
    library.logging.set_verbosity(50)
    library.utils.logging.disable_progress_bar()
    return library


@pytest.fixture(scope='module')
def published(transformers, tmp_path_factory):
    """A tiny model as transformers saves it, large weights, with a tokenizer."""
    folder = tmp_path_factory.mktemp('published')
    tok = tokenizer.train_bpe(['abc abc abc def\n'] * 50, 280, folder / 'tokenizer.json')
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tok.vocab_size, max_position_embeddings=64, initializer_range=0.3, **SHAPE
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / 'tokenizer_config.json').write_text('{"eos_token": {"content": "<|endoftext|>"}, "bos_token": null}')
    return folder


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published, tmp_path / 'folder')


@pytest.fixture
def adapter(published, tmp_path):
    peft_adapter(published, tmp_path / 'adapter')
    return tmp_path / 'adapter'


def peft_adapter(base, folder, **options):
    """An adapter with large factors, as peft saves it. -> the logits of X that peft computes after reading it."""
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    options = dict(r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM') | options
    model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(**options))
    for name, p in model.named_parameters():
        if 'lora_' in name:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    model.save_pretrained(folder)
    change(folder / 'adapter_config.json', base_model_name_or_path=str(base))


def peft_logits(base, folder):
    import peft
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, folder)(X).logits


def our_logits(folder):
    """As sample.py reads a folder: an adapter on its base, or a model."""
    if stored := read_adapter(str(folder)):
        options = dict(rank=stored['r'], alpha=stored['lora_alpha'], quantize=stored['quantize'])
        model = hf.load(hf.weights_folder(str(folder)), linear=lambda *a, **kw: lora.LoRALinear(*a, **options, **kw))
        hf.load_adapter(model, str(folder))
    else:
        model = hf.load(str(folder))
    with torch.no_grad():
        return model(X)


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_sentence(error):
    text = str(error.value if hasattr(error, 'value') else error)
    assert '\n' not in text and 20 < len(text) < 420, text
    return text


# ---- every field of every file, with values that no field should have --------------------------------------------


def places(value, path=()):
    """The paths of all fields of a JSON value, of lists only the first."""
    for key in value if isinstance(value, dict) else range(len(value[:1])) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def spoiled(good, extra=(), seed=0):
    """Yield (words, text): the JSON text `good` with one field missing or of a hostile value, and other top levels."""
    draw = random.Random(seed)
    for path in [*places(json.loads(good)), *((name,) for name in extra)]:
        for value in [None, *draw.sample(HOSTILE, min(EACH, len(HOSTILE)))]:
            whole = inner = json.loads(good)
            for key in path[:-1]:
                inner = inner[key]
            if value is not None:
                inner[path[-1]] = '@@'
            elif isinstance(inner, dict):
                inner.pop(path[-1], None)
            words = f'{".".join(map(str, path))} {"missing" if value is None else "= " + value[:40]}'
            yield words, json.dumps(whole).replace('"@@"', value or '')
    yield from ((f'top level {text[:10]}', text) for text in WRONG_TOP)


def assert_spoiled_files_are_read_or_refused(file, read, extra=()):
    """read() for each spoiled version of `file`: returns, or raises one of ours with one sentence."""
    good, counts = file.read_text(), {'read': 0, 'refused': 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for words, text in spoiled(good, extra):
        file.write_text(text)
        try:
            read()
            counts['read'] += 1
        except REFUSED as error:
            one_sentence(error)
            counts['refused'] += 1
        except BaseException as error:
            raise AssertionError(f'{file.name}: {words}: {type(error).__name__}: {error}') from error
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kB
    assert grown < 300_000, f'{grown} kB'
    file.write_text(good)
    assert counts['read'] and counts['refused'], counts


MORE = ['rope_theta', 'rope_scaling', 'sliding_window', 'quantization_config', 'torch_dtype', 'partial_rotary_factor']
MORE += ['is_causal', 'packed_weights', 'original_max_position_embeddings', 'layer_types', 'attn_logit_softcapping']


def test_any_value_in_config_json_is_transformers_logits_or_one_sentence(folder, transformers):
    def read():
        ours = our_logits(folder)
        try:
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        except Exception:  # what they refuse is nobody's number
            return
        torch.testing.assert_close(ours, theirs(X).logits, atol=1e-4, rtol=1e-4)

    assert_spoiled_files_are_read_or_refused(folder / 'config.json', read, MORE)


def test_any_value_in_an_adapter_config_is_pefts_logits_or_one_sentence(published, adapter):
    def read():
        ours = our_logits(adapter)
        try:
            theirs = peft_logits(published, adapter)
        except Exception:
            return
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    assert_spoiled_files_are_read_or_refused(adapter / 'adapter_config.json', read, ['use_something_new'])


@pytest.mark.parametrize(
    ('name', 'extra'),
    [
        ('model.safetensors.index.json', ()),
        ('generation_config.json', ()),
        ('tokenizer_config.json', ('added_tokens_decoder', 'chat_template', 'add_bos_token', 'eos_token_id')),
        ('meta.json', ('vocab_size',)),
        ('tokenizer.json', ()),
    ],
)
def test_any_value_in_the_files_beside_is_read_or_one_sentence(name, extra, folder, capsys):
    if 'index' in name:
        model = hf.load(str(folder))
        (folder / 'model.safetensors').unlink()
        model.save_pretrained(folder, shard_bytes=20_000)
    if name == 'meta.json':
        (folder / name).write_text('{"tokenizer": "hf", "eot": 0}')
    if name == 'tokenizer.json':  # a shorter one: each token is a field
        tokenizers = pytest.importorskip('tokenizers')
        small = tokenizers.Tokenizer(tokenizers.models.WordLevel({'abc': 0, 'def': 1, '[UNK]': 2}, '[UNK]'))
        small.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        small.add_special_tokens(['</s>'])
        small.save(str(folder / name))
    change(folder / 'config.json', eos_token_id=None)  # so that the other files are asked
    if name == 'tokenizer_config.json':
        (folder / 'generation_config.json').unlink()

    def read():
        words = [str(folder), '--prompt=abc', '--tokens=2']
        sample.main(configurator.load(ROOT / 'sample.py', words, sample.problems, positional='checkpoint'))

    assert_spoiled_files_are_read_or_refused(folder / name, read, extra)


def test_any_value_in_the_meta_json_of_a_data_set_is_read_or_one_sentence(data, tmp_path):
    shutil.copytree(data, tmp_path / 'data')

    def read():
        Tokens(tmp_path / 'data', 'train', 32).batch(0, 0, 2)
        tokenizer.load(tmp_path / 'data').encode('abc')

    assert_spoiled_files_are_read_or_refused(tmp_path / 'data/meta.json', read)


@pytest.fixture
def packed(tmp_path):
    """A checkpoint of LoRA whose weights are in optimizer.pt alone."""
    config = configurator.load(ROOT / 'train.py', tiny('--method=lora', '--save_merged=False'))
    config.init_from = 'somebody/base'
    shape = ModelConfig(n_layer=1, n_head=2, n_embd=16, n_inner=64, vocab_size=64, block_size=32)
    model = LLaMA(shape, linear=lora.linear(config)).materialise()
    optimizer = lora.setup(model, config)
    options = {key: value for key, value in vars(config).items() if not key.startswith('_')}
    run = {'step': 3, 'best_val_loss': 5.5, 'seconds': 0.5, 'config': options}
    checkpoint.save(str(tmp_path / 'run'), model, optimizer, run, {})
    return tmp_path / 'run'


def test_any_value_in_a_run_json_is_read_or_one_sentence(packed):
    def read():
        build.load_model(str(packed), 'cpu')
        build.base_of(str(packed))

    assert_spoiled_files_are_read_or_refused(packed / 'run.json', read)


# ---- files that disagree -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('how', [True, False, 'gaussian', 'orthogonal', 'olora', 'pissa', 'pissa_niter_4'])
def test_an_adapter_whose_making_changed_the_base_is_refused_and_all_others_are_pefts_logits(how, published, tmp_path):
    peft_adapter(published, tmp_path, init_lora_weights=how)
    if str(how).startswith(('olora', 'pissa')):
        with pytest.raises(AdapterError, match=f"init_lora_weights='{how}' is not plain LoRA: merge it with peft"):
            read_adapter(str(tmp_path))
    else:
        torch.testing.assert_close(our_logits(tmp_path), peft_logits(published, tmp_path), atol=1e-4, rtol=1e-4)


SOME = [dict(layers_to_transform=[1]), dict(exclude_modules=['k_proj']), dict(target_modules='all-linear')]


@pytest.mark.parametrize('options', SOME, ids=str)
def test_adapters_of_some_layers_are_pefts_logits(options, published, tmp_path):
    peft_adapter(published, tmp_path, **options)
    torch.testing.assert_close(our_logits(tmp_path), peft_logits(published, tmp_path), atol=1e-4, rtol=1e-4)


WRONG = [dict(layers_to_transform=[0]), dict(exclude_modules=['v_proj']), dict(target_modules=['q_proj']), dict(r=2)]


@pytest.mark.parametrize('said', WRONG, ids=str)
def test_an_adapter_whose_config_and_tensors_disagree_is_refused(said, adapter):
    change(adapter / 'adapter_config.json', **said)
    with pytest.raises(AdapterError, match=r'says nothing of|do not belong together') as error:
        read_adapter(str(adapter))
    one_sentence(error)


def test_a_tied_head_must_be_the_embedding_and_a_missing_one_is_named(folder):
    change(folder / 'config.json', tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r'tie_word_embeddings, but lm_head.weight is another matrix') as error:
        hf.load(str(folder))
    one_sentence(error)
    tensors = load_file(folder / 'model.safetensors')
    save_file(tensors | {'lm_head.weight': tensors['model.embed_tokens.weight'].clone()}, folder / 'model.safetensors')
    tied = our_logits(folder)
    del tensors['lm_head.weight']
    save_file(tensors, folder / 'model.safetensors')
    assert torch.equal(our_logits(folder), tied)
    change(folder / 'config.json', tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors, the first lm_head.weight"):
        hf.load(str(folder))


ROPE3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
OLD = dict(rope_theta=500.0, rope_scaling=dict(type='llama3', **ROPE3), torch_dtype='float32')
NEW = dict(rope_parameters=dict(rope_theta=500.0, rope_type='llama3', **ROPE3), dtype='float32')


@pytest.mark.parametrize('written', [OLD, NEW, OLD | NEW], ids=['transformers 4', 'transformers 5', 'both'])
def test_rotary_fields_of_either_version_are_transformers_logits(written, folder, transformers):
    stored = json.loads((folder / 'config.json').read_text())
    stored = {key: value for key, value in stored.items() if key not in ('rope_parameters', 'dtype')}
    (folder / 'config.json').write_text(json.dumps(stored | written))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(X).logits
    torch.testing.assert_close(our_logits(folder), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    'also',
    [
        dict(rope_theta=600.0),
        dict(rope_scaling=None, rope_parameters=dict(rope_theta=600.0, rope_type='default')),
        dict(rope_parameters=dict(rope_theta=500.0, rope_type='llama3', **ROPE3 | {'factor': 8.0})),
        dict(original_max_position_embeddings=32),
        dict(rope_parameters=dict(rope_theta=500.0, full_attention=dict(rope_type='default'))),
    ],
    ids=str,
)
def test_rotary_fields_that_contradict_each_other_are_refused(also, folder):
    change(folder / 'config.json', **OLD | NEW | also)
    with pytest.raises(ModelError, match=r'contradict|two values|only one rotation') as error:
        hf.load(str(folder))
    one_sentence(error)


def test_missing_fields_of_a_mistral_have_its_familys_defaults(transformers):
    written = {'model_type': 'mistral', 'vocab_size': 64, **SHAPE}
    del written['num_key_value_heads']
    ours, theirs = config_from_hf(written | {'num_attention_heads': 8}), transformers.MistralConfig()
    assert ours.n_kv_head == theirs.num_key_value_heads == 8
    assert ours.block_size == theirs.sliding_window == 4096


# ---- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.int8, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_weights_that_are_no_floats_are_refused_by_name(dtype, device, folder):
    tensors = load_file(folder / 'model.safetensors')
    name = 'model.layers.1.mlp.up_proj.weight'
    save_file(tensors | {name: tensors[name].to(dtype)}, folder / 'model.safetensors')
    with pytest.raises(ModelError, match=f'{name} is of ') as error:
        hf.load(str(folder), dtype=torch.float32, device=device)
    one_sentence(error)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_refused_by_name(bad, folder, adapter):
    tensors = load_file(folder / 'model.safetensors')
    tensors['model.norm.weight'][3] = bad
    save_file(tensors, folder / 'model.safetensors')
    with pytest.raises(ModelError, match=r'norm.weight holds NaN or infinite numbers'):
        hf.load(str(folder))
    tensors = load_file(adapter / 'adapter_model.safetensors')
    next(iter(tensors.values()))[0, 0] = bad
    save_file(tensors, adapter / 'adapter_model.safetensors')
    with pytest.raises(AdapterError, match='holds NaN or infinite numbers'):
        our_logits(adapter)


@pytest.mark.parametrize('file', ['../other.safetensors', '/etc/passwd', '..', '', 'sub/x.safetensors', 'x.bin'])
def test_an_index_never_leaves_its_folder(file, folder):
    os.rename(folder / 'model.safetensors', folder.parent / 'other.safetensors')
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'lm_head.weight': file}}))
    with pytest.raises(ModelError, match='no safetensors file of its folder') as error:
        hf.load(str(folder))
    one_sentence(error)


def test_an_index_and_files_that_disagree_are_refused(folder):
    model = hf.load(str(folder))
    model.save_pretrained(folder, shard_bytes=20_000)
    path = folder / 'model.safetensors.index.json'
    index, parts = json.loads(path.read_text()), sorted(folder.glob('model-*.safetensors'))
    first, second = load_file(parts[0]), load_file(parts[1])
    name = next(iter(first))
    change(path, weight_map=index['weight_map'] | {name: parts[1].name})
    with pytest.raises(ModelError, match=f'lacks {name}, which the index says it holds'):
        hf.load(str(folder))
    path.write_text(json.dumps(index))
    save_file(second | {name: first[name] + 1}, parts[1])  # which of the two?
    with pytest.raises(ModelError, match=f'holds {name}, as .* does'):
        hf.load(str(folder))


LARGE = {'num_hidden_layers': 4096, 'hidden_size': 2**20, 'vocab_size': 2**22, 'intermediate_size': 2**22}


@pytest.mark.parametrize('name', LARGE)
def test_a_shape_allocates_nothing_before_the_files_have_it(name, folder):
    change(folder / 'config.json', **{name: LARGE[name]})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError):
        hf.load(str(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, 'kB'


def test_a_huge_window_allocates_no_more_than_an_ordinary_one(folder):
    change(folder / 'config.json', max_position_embeddings=10**11)
    with pytest.raises(ModelError, match='max_position_embeddings=100000000000 is not a whole number from 1 to'):
        hf.load(str(folder))
    change(folder / 'config.json', max_position_embeddings=2**31)
    model = hf.load(str(folder))
    assert model.cos.shape == (hf.WINDOW, 4) and model.config.max_positions == 2**31
    model.save_pretrained(folder)
    assert json.loads((folder / 'config.json').read_text())['max_position_embeddings'] == 2**31


# ---- plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('method', ['galore', 'lora', 'loqt'])
def test_a_plan_needs_config_json_alone_and_checks_the_weights_that_are_there(method, folder):
    (folder / 'tokenizer.json').write_text('{')  # nobody's business in a plan
    words = [f'--init_from={folder}', f'--method={method}', '--rank=4', '--block_size=32', '--dry_run', '--device=cpu']
    config = configurator.load(ROOT / 'train.py', words)
    assert build.shape_of(config).n_embd == 32
    change(folder / 'config.json', intermediate_size=48)
    with pytest.raises(ModelError, match=r'down_proj.weight is \(32, 56\), but config.json makes it \(32, 48\)'):
        build.shape_of(config)
    (folder / 'model.safetensors').unlink()
    model, _, _ = build.build_on_meta(config)
    assert model.config.n_inner == 48 and all(p.is_meta for p in model.parameters())
    with pytest.raises(ModelError, match=r'has no model.safetensors'):
        hf.load(str(folder))


# ---- what we write -----------------------------------------------------------------------------------------------


def test_exports_keep_the_weights_dtype_and_are_the_only_model_in_their_folder(folder, adapter, tmp_path):
    hf.load(str(folder), dtype=torch.bfloat16).save_pretrained(folder)
    change(adapter / 'adapter_config.json', base_model_name_or_path=str(folder))
    out = tmp_path / 'out'
    hf.load(str(folder)).save_pretrained(out, shard_bytes=9_000)
    assert (out / 'model.safetensors.index.json').exists() and len(list(out.glob('model-*'))) > 1
    words = [str(adapter), '--prompt=abc', '--tokens=1', f'--save_to={tmp_path / "merged"}']
    sample.main(configurator.load(ROOT / 'sample.py', words, sample.problems, positional='checkpoint'))
    merged = hf.load(str(tmp_path / 'merged'))
    merged.save_pretrained(out)
    assert sorted(path.name for path in out.iterdir()) == ['config.json', 'model.safetensors']
    assert {one.dtype for one in headers(str(out)).values()} == {'BF16'}
    assert json.loads((out / 'config.json').read_text())['torch_dtype'] == 'bfloat16'
    assert torch.equal(our_logits(out), merged(X))


def test_an_adapter_of_nf4_says_so_and_is_read_on_nf4(published, tmp_path):
    config = configurator.load(ROOT / 'train.py', tiny('--method=lora', f'--init_from={published}'))
    model = hf.load(str(published), linear=lora.linear(config))
    lora.setup(model, config)
    for layer in (module for module in model.modules() if hf.is_lora(module)):
        torch.nn.init.normal_(layer.B, std=0.2, generator=torch.Generator().manual_seed(0))
    old = os.umask(0o022)
    try:
        hf.save_adapter(model, str(tmp_path), str(published))
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}
    assert 'base in NF4 (QLoRA)' in (tmp_path / 'README.md').read_text()
    torch.testing.assert_close(our_logits(tmp_path), model(X))
    plain = hf.load(str(published), linear=lora.linear(SimpleNamespace(**vars(config) | {'quantize': 'none'})))
    with pytest.raises(AdapterError, match='was made on its base in NF4'):
        hf.load_adapter(plain, str(tmp_path))


class Evil:
    def __reduce__(self):
        return os.system, ('true',)


def test_a_pickle_that_is_refused_comes_without_the_hint_to_run_it(packed):
    torch.save({'state': {}, 'layers': Evil()}, packed / 'optimizer.pt')
    for read in (lambda: build.load_model(str(packed), 'cpu'), lambda: checkpoint.load_optimizer(str(packed), None)):
        with pytest.raises(checkpoint.CheckpointError, match='it holds other things than tensors') as error:
            read()
        assert 'weights_only' not in one_sentence(error)


def test_links_out_of_a_folder_are_not_followed_into_what_we_save(folder, tmp_path):
    (tmp_path / 'secret').write_text('secret')
    (folder / 'chat_template.jinja').symlink_to(tmp_path / 'secret')
    with pytest.raises(tokenizer.TokenizerError, match=r'is a link to .*secret, out of its folder') as error:
        files_of(str(folder))
    one_sentence(error)
    # the hub's cache is made of links
    hub = tmp_path / 'models--x/snapshots/abc'
    hub.parent.mkdir(parents=True), (tmp_path / 'models--x/blobs').mkdir()
    os.rename(folder / 'tokenizer.json', tmp_path / 'models--x/blobs/1')
    (folder / 'chat_template.jinja').unlink()
    os.rename(folder, hub)
    (hub / 'tokenizer.json').symlink_to('../../blobs/1')
    assert files_of(str(hub))['tokenizer.json'] == (tmp_path / 'models--x/blobs/1').read_bytes()


def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / 'meta.json')
    with pytest.raises(DataError, match='is no file'):
        read_meta(tmp_path)
    with pytest.raises(DataError, match=r'x={\'a\': {\'a\': .*} is not a text'):  # however deep, a short sentence
        fields.check({'x': json.loads('{"a":' * 900 + '1' + '}' * 900)}, {'x': fields.text()}, 'x.json', DataError, '!')
