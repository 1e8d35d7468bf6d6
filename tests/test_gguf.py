"""GGUF files, read back by transformers to the same logits and the same ids, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run
from test_families import FAMILIES, TINY
from test_sample import published, said

from data import chat, tokenizer
from data.tokenizer import TokenizerError
from model import LLaMA, ModelError
from plumbing import Stop, gguf_file

gguf, transformers = pytest.importorskip('gguf'), pytest.importorskip('transformers')
TEMPLATE = '{% for message in messages %}<|user|>{{ message.content }}<|end|>{% endfor %}'
TEXTS = ['the capital of France is Paris', '  hello wörld\n\n 日本 42', 'What is it?']


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory):
    """{kind: a folder with a model of that tokenizer}."""
    return {spaces: published(tmp_path_factory.mktemp('tokenizer'), spaces) for spaces in (None, 'first', 'normalizer')}


def made(folder, source, family, **changes):
    """A random model of transformers of that family, in numbers that f16 has, with the tokenizer of `source`."""
    kind, more = FAMILIES[family]
    config = TINY | more | dict(vocab_size=420) | changes
    torch.manual_seed(0)
    model = getattr(transformers, f'{kind}ForCausalLM')(getattr(transformers, f'{kind}Config')(**config)).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=0.5 * (p.dim() == 1), std=0.2, generator=generator)
        p.data = p.data.half().float()
    model.save_pretrained(folder)
    (folder / 'generation_config.json').unlink()
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(source / name, folder)
    (folder / 'chat_template.jinja').write_text(TEMPLATE)
    return folder


def fields_of(path):
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


# What transformers does not read of a GGUF file: Qwen3's head_dim, Phi-3's padding id, StableLM's share that rotates.
GIVEN = ('qwen3', 'phi3', 'stablelm 2')


@torch.no_grad()
@pytest.mark.parametrize(
    'family', ['llama', 'llama, tied', 'mistral, wide heads', 'qwen2', 'qwen3', 'phi3', 'stablelm', 'stablelm 2']
)
def test_transformers_reads_equal_logits(tmp_path, tokenizers, family):
    changes = {'tie_word_embeddings': True} if family == 'llama, tied' else {}
    folder = made(tmp_path, tokenizers[None], family.removesuffix(', tied'), **changes)
    model = LLaMA.from_pretrained(folder)
    gguf_file.save(model, str(tmp_path / 'out' / 'mine.gguf'), folder)
    more = {'config': transformers.AutoConfig.from_pretrained(folder)} if family in GIVEN else {}
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / 'out', gguf_file='mine.gguf', dtype=torch.float32, output_loading_info=True, **more
    )
    assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
    x = torch.randint(0, 420, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(x).logits, model(x), atol=1e-4, rtol=1e-4)
    found, tensors = fields_of(tmp_path / 'out/mine.gguf')
    assert ('output.weight' in tensors) == (not model.config.tie_embeddings)
    name = found['general.architecture']
    assert found[f'{name}.rope.dimension_count'] == model.config.rotary_dim
    assert found[f'{name}.attention.key_length'] == model.config.head_dim
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['mine.gguf']


@torch.no_grad()
def test_q8_0_is_rounded_in_blocks_of_32_and_read_back_as_such(tmp_path, tokenizers):
    sizes = dict(hidden_size=64, intermediate_size=96, head_dim=16)
    folder = made(tmp_path, tokenizers[None], 'llama', **sizes)
    model = LLaMA.from_pretrained(folder)
    gguf_file.save(model, str(tmp_path / 'mine.gguf'), folder, 'q8_0')
    tensors = fields_of(tmp_path / 'mine.gguf')[1]
    assert tensors['blk.0.attn_q.weight'].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert tensors['blk.0.attn_norm.weight'].tensor_type == gguf.GGMLQuantizationType.F32
    for p in model.parameters():
        if p.dim() == 2:
            blocks = p.view(-1, 32)
            scale = blocks.abs().amax(1, keepdim=True) / 127
            whole = blocks * (1 / scale)
            whole = whole.sign() * (whole.abs() + 0.5).floor()  # halves away from zero
            p.copy_((whole * scale.half().float()).view(p.shape))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file='mine.gguf', dtype=torch.float32)
    x = torch.randint(0, 420, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(x).logits, model(x), atol=1e-4, rtol=1e-4)


def test_rows_that_do_not_divide_into_blocks_stay_in_f16(tmp_path, tokenizers):
    folder = made(tmp_path, tokenizers[None], 'llama', intermediate_size=56)
    gguf_file.save(LLaMA.from_pretrained(folder), str(tmp_path / 'mine.gguf'), folder, 'q8_0')
    tensors = fields_of(tmp_path / 'mine.gguf')[1]
    assert tensors['blk.0.ffn_down.weight'].tensor_type == gguf.GGMLQuantizationType.F16
    assert tensors['blk.0.ffn_up.weight'].tensor_type == gguf.GGMLQuantizationType.Q8_0


@pytest.mark.parametrize('spaces', [None, 'first', 'normalizer'])
def test_the_tokenizer_and_the_template_go_with_it(tmp_path, tokenizers, spaces):
    folder = made(tmp_path, tokenizers[spaces], 'llama', vocab_size=424, eos_token_id=[2, 4])
    gguf_file.save(LLaMA.from_pretrained(folder), str(tmp_path / 'mine.gguf'), folder)
    found, _ = fields_of(tmp_path / 'mine.gguf')
    assert found['tokenizer.ggml.model'] == ('llama' if spaces else 'gpt2')
    assert found['tokenizer.ggml.pre'] == ('default' if spaces else 'gpt-2')
    assert found['tokenizer.chat_template'] == TEMPLATE
    ids = ('bos', 'eos', 'eot')
    assert [found[f'tokenizer.ggml.{name}_token_id'] for name in ids] == [1, 2, 4]
    assert found['tokenizer.ggml.add_bos_token'] is True
    assert found['tokenizer.ggml.tokens'][-4:] == ['[PAD420]', '[PAD421]', '[PAD422]', '[PAD423]']
    kinds = found['tokenizer.ggml.token_type']
    assert kinds[:5] == [2 if spaces else 3, 3, 3, 3, 3] and kinds[-4:] == [5] * 4
    assert kinds.count(6) == (256 if spaces else 0)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file='mine.gguf'), tokenizer.load(folder)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)['input_ids'] == ours.encode(text)


def test_rows_of_q_and_k_change_places_as_llama_cpp_rotates_neighbours():
    W = torch.arange(16.0).view(8, 2)  # two heads of 4
    rows = gguf_file.array(W, np.float32, 'q', heads=2)[:, 0] / 2
    assert rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert gguf_file.array(W, np.float32, 'q').tolist() == W.tolist()


def test_llama_3s_rotation_is_a_tensor_of_factors(tmp_path, tokenizers):
    folder = made(tmp_path, tokenizers[None], 'llama, llama3')
    gguf_file.save(LLaMA.from_pretrained(folder), str(tmp_path / 'mine.gguf'), folder)
    factors = fields_of(tmp_path / 'mine.gguf')[1]['rope_freqs.weight'].data
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    plain = 5e5 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(torch.from_numpy(factors.copy()), plain / theirs, atol=1e-5, rtol=1e-5)
    assert factors.min() < 2 and factors.max() == 4


def test_granite_and_smollm3_say_what_llama_cpp_reads(tmp_path, tokenizers):
    for family in ('granite', 'smollm3'):
        folder = made(tmp_path / family, tokenizers[None], family)
        gguf_file.save(LLaMA.from_pretrained(folder), str(tmp_path / 'mine.gguf'), folder)
        found, _ = fields_of(tmp_path / 'mine.gguf')
        assert found['general.architecture'] == family
    found, _ = fields_of(tmp_path / 'mine.gguf')
    folder = made(tmp_path / 'g', tokenizers[None], 'granite')
    gguf_file.save(LLaMA.from_pretrained(folder), str(tmp_path / 'mine.gguf'), folder)
    found, _ = fields_of(tmp_path / 'mine.gguf')
    names = ('attention.scale', 'embedding_scale', 'residual_scale', 'logit_scale')
    assert [found[f'granite.{name}'] for name in names] == pytest.approx([0.1, 6.0, 0.3, 0.5])


@pytest.mark.parametrize(
    ('family', 'sentence'),
    [
        ('llama, yarn', 'rope_type=yarn of llama is not written as GGUF here'),
        ('phi3.5', 'rope_type=longrope of phi3 is not written as GGUF here'),
        ('smollm3, other layers', 'is not what llama.cpp computes for smollm3'),
    ],
)
def test_a_model_that_llama_cpp_computes_otherwise_is_refused_by_name(tmp_path, tokenizers, family, sentence):
    folder = made(tmp_path / 'in', tokenizers[None], family)
    with pytest.raises(ModelError, match=sentence):
        gguf_file.save(LLaMA.from_pretrained(folder), str(tmp_path / 'out/mine.gguf'), folder)
    assert not (tmp_path / 'out').exists()


def test_numbers_beyond_f16_are_refused_and_leave_nothing(tmp_path, tokenizers):
    folder = made(tmp_path, tokenizers[None], 'llama')
    model = LLaMA.from_pretrained(folder)
    model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    (tmp_path / 'mine.gguf').write_text('what was there')
    with pytest.raises(ModelError, match=r'up_proj.weight holds numbers beyond those of f16: use --gguf=q8_0'):
        gguf_file.save(model, str(tmp_path / 'mine.gguf'), folder)
    assert (tmp_path / 'mine.gguf').read_text() == 'what was there' and not list(tmp_path.glob('*.new'))
    gguf_file.save(model, str(tmp_path / 'mine.gguf'), folder, 'q8_0')


def test_a_tokenizer_that_llama_cpp_cannot_run_is_refused_by_name(tmp_path, tokenizers):
    folder = made(tmp_path, tokenizers[None], 'llama')
    model, saved = LLaMA.from_pretrained(folder), json.loads((folder / 'tokenizer.json').read_text())
    split = {'type': 'Split', 'pattern': {'Regex': r'\p{N}{1,2}'}, 'behavior': 'Isolated', 'invert': False}
    for change, sentence in {
        'pre_tokenizer': 'llama.cpp has no name for how this tokenizer cuts a text',
        'model': 'a tokenizer of the type Unigram is not written as GGUF here',
        'added_tokens': r'the tokenizer has id 420, the model 420 rows',
    }.items():
        changed = json.loads(json.dumps(saved))
        if change == 'pre_tokenizer':
            changed['pre_tokenizer'] = split
        elif change == 'model':
            changed['model'] = {'type': 'Unigram', 'unk_id': 0, 'vocab': [[t, -1.0] for t in saved['model']['vocab']]}
        else:
            changed['added_tokens'].append(saved['added_tokens'][0] | {'id': 420, 'content': '<new>'})
        (folder / 'tokenizer.json').write_text(json.dumps(changed))
        with pytest.raises(TokenizerError, match=sentence):
            gguf_file.save(model, str(tmp_path / 'mine.gguf'), folder)
    (folder / 'meta.json').write_text('{"tokenizer": "bytes"}')
    with pytest.raises(TokenizerError, match='GGUF has no place for a tokenizer of the kind bytes'):
        gguf_file.save(model, str(tmp_path / 'mine.gguf'), folder)
    assert not (tmp_path / 'mine.gguf').exists()


def test_published_ways_of_cutting_a_text_have_llama_cpps_names():
    words, rest = gguf_file.WORDS, gguf_file.REST
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': False}

    def split(pattern):
        one = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
        return {'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [one, level]}}

    digits = {'type': 'Digits', 'individual_digits': True}
    assert gguf_file.cuts({'pre_tokenizer': level | {'use_regex': True}}) == 'gpt-2'
    both = {'type': 'Sequence', 'pretokenizers': [digits, level | {'use_regex': True}]}
    assert gguf_file.cuts({'pre_tokenizer': both}) == 'smollm'
    assert gguf_file.cuts(split(words + r'\p{N}{1,3}' + rest)) == 'llama-bpe'
    assert gguf_file.cuts(split(words + r'\p{N}' + rest)) == 'qwen2'


def test_sample_writes_it_by_name_once(tmp_path, tokenizers, capsys):
    folder = made(tmp_path / 'in', tokenizers[None], 'qwen2', intermediate_size=64)
    for name, kind in {'a.gguf': 'F16', 'a.Q8_0.gguf': 'Q8_0'}.items():
        target = tmp_path / 'out' / name
        assert f'written: {target}' in said(capsys, folder, f'--save_to={target}', '--tokens=1').out
        assert fields_of(target)[1]['blk.0.ffn_up.weight'].tensor_type.name == kind
        with pytest.raises(Stop, match='is there already: choose another name, or --overwrite'):
            said(capsys, folder, f'--save_to={target}', '--tokens=1')
    said(capsys, folder, f'--save_to={target}', '--tokens=1', '--overwrite', '--gguf=f16')
    assert fields_of(target)[1]['blk.0.ffn_up.weight'].tensor_type.name == 'F16'
    done = run(['sample.py', folder, '--gguf=q8_0'])
    assert done.returncode == 2 and 'says how --save_to=NAME.gguf is written: add that' in done.stderr
    assert chat.own(str(folder))[0]  # the folder is as it was
