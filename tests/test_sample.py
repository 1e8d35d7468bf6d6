"""sample.py: what is chosen, what is said, and where it reads from."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run, train

import configurator
import loqt
import lora
import quant
import sample
from data import tokenizer
from model import LLaMA, ModelConfig, ModelError
from plumbing import Stop, ready

TINY = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=56, vocab_size=97, block_size=16)


@pytest.fixture(scope='module')
def model():
    model = LLaMA(ModelConfig(**TINY)).materialise(seed=0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(p.numel()))
    return model


@pytest.fixture(scope='module')
def trained(tmp_path_factory, data):
    out = tmp_path_factory.mktemp('sample') / 'out'
    done = train(out, data)
    assert done.returncode == 0, done.stderr
    return out


@torch.no_grad()
def slow_greedy(model, ids, n):
    """Without a cache: the whole window through the model for each token."""
    for _ in range(n):
        ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    return ids


def test_greedy_generation_with_the_cache_equals_generation_without(model):
    made = list(sample.generate(model, [5, 6, 7], 12, temperature=0))
    assert [5, 6, 7, *made] == slow_greedy(model, [5, 6, 7], 12)


def test_a_prompt_longer_than_the_window_is_cut_from_the_left(model):
    prompt = list(range(40))
    assert next(sample.generate(model, prompt, 1, temperature=0)) == slow_greedy(model, prompt[-16:], 1)[-1]


def test_an_empty_prompt_starts_from_the_end_of_text(model):
    # T5's tokenizer makes nothing of a newline
    made = list(sample.generate(model, [], 5, eot=3, temperature=0))
    assert [3, *made] == slow_greedy(model, [3], 5)[: len(made) + 1]


def test_choose_follows_the_probabilities_and_their_cuts():
    logits = torch.log(torch.tensor([0.05, 0.5, 0.15, 0.3]))
    generator = torch.Generator().manual_seed(0)

    def frequencies(**kw):
        draws = torch.tensor([sample.choose(logits, generator=generator, **kw) for _ in range(4000)])
        return torch.bincount(draws, minlength=4) / 4000

    torch.testing.assert_close(frequencies(), logits.exp(), atol=0.03, rtol=0)
    torch.testing.assert_close(frequencies(top_k=2), torch.tensor([0, 0.625, 0, 0.375]), atol=0.03, rtol=0)
    torch.testing.assert_close(frequencies(top_p=0.6), torch.tensor([0, 0.625, 0, 0.375]), atol=0.03, rtol=0)
    torch.testing.assert_close(frequencies(top_p=0.4), torch.tensor([0, 1.0, 0, 0]), atol=0, rtol=0)
    sharp = (2 * logits).softmax(0)
    torch.testing.assert_close(frequencies(temperature=0.5), sharp, atol=0.03, rtol=0)
    assert frequencies(temperature=0)[1] == 1


@pytest.mark.parametrize('temperature', [1e-40, 1e-320, 1e300])
@pytest.mark.parametrize('size', [1, 1e-30, 1e30])
def test_no_temperature_is_too_low_or_too_high(temperature, size):
    logits = torch.tensor([0.0, 3.0, 1.0]) * size
    draws = {sample.choose(logits, temperature, top_k=2**70) for _ in range(50)}
    assert draws == ({1} if temperature < 1 and size >= 1 else {0, 1, 2} if temperature > 1 else draws)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('temperature', [0, 1])
def test_logits_that_are_no_numbers_are_named(bad, temperature):
    row = SimpleNamespace(generator=None)
    for function in (sample.choose, lambda one, t: sample.choose_each(one[None], [row], t, 0, 1.0)):
        with pytest.raises(ModelError, match='NaN or infinity: its weights are damaged'):
            function(torch.tensor([0.0, bad, 1.0]), temperature)


def test_generation_stops_at_the_end_of_text(model):
    free = list(sample.generate(model, [5, 6, 7], 12, temperature=0))
    stopped = list(sample.generate(model, [5, 6, 7], 12, eot=free[4], temperature=0))
    assert stopped == free[: free.index(free[4]) + 1]
    stopped = list(sample.generate(model, [5, 6, 7], 12, eot=[96, free[3], free[5]], temperature=0))
    assert stopped == free[: min(free.index(free[3]), free.index(free[5])) + 1]


PROMPTS = [[5, 6, 7], [9], list(range(40)), [], [5, 6, 7, 8, 9, 10, 11], [3, 3], [5, 6], list(range(20, 36))]


@pytest.mark.parametrize('batch_size', [1, 3, 8, 100])
def test_a_batch_is_continued_as_each_prompt_alone_to_its_own_end_and_beyond_the_window(model, batch_size):
    ends = [82, 18, 93]
    alone = [list(sample.generate(model, ids, 30, ends, temperature=0)) for ids in PROMPTS]
    made = dict(sample.generate_batch(model, PROMPTS, 30, ends, batch_size))
    assert [made[i] for i in range(len(PROMPTS))] == alone
    assert len({len(ids) for ids in alone}) > 3 and max(map(len, alone)) == 30
    assert all(not {*ends} & {*ids[:-1]} for ids in alone)


def test_what_all_prompts_begin_with_is_computed_once(model, monkeypatch):
    prompts = [[4, 8, 15, 16, 23, *rest] for rest in ([], [42], [1, 2], [42, 7, 7])]
    alone = [list(sample.generate(model, ids, 6, temperature=0)) for ids in prompts]
    seen, hidden = [], model.hidden
    monkeypatch.setattr(model, 'hidden', lambda tokens, cache: seen.append(tokens.numel()) or hidden(tokens, cache))
    made = dict(sample.generate_batch(model, prompts, 6))
    assert [made[i] for i in range(4)] == alone
    assert sum(seen) == 4 + sum(len(ids) - 4 for ids in prompts) + 4 * 5


def test_a_sampled_batch_is_each_prompt_with_its_own_seed(model):
    options = dict(temperature=0.8, top_k=20, top_p=0.9)
    made = dict(sample.generate_batch(model, PROMPTS, 9, batch_size=3, seed=5, **options))
    for i, ids in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(5 + i)
        assert made[i] == list(sample.generate(model, ids, 9, generator=generator, **options))


def test_a_batch_stops_where_its_caller_says(model):
    free = dict(sample.generate_batch(model, PROMPTS, 9))
    made = dict(sample.generate_batch(model, PROMPTS, 9, stop=lambda ids: sum(ids) > 150))
    for i, ids in free.items():
        sums = [sum(ids[: j + 1]) > 150 for j in range(len(ids))]
        assert made[i] == ids[: sums.index(True) + 1 if True in sums else None]


def test_it_writes_text_that_goes_on_from_the_prompt_and_repeats_by_seed(trained):
    first, again, other = (
        run(['sample.py', str(trained), '--prompt=def f1(', '--tokens=60', f'--seed={seed}']) for seed in (1, 1, 2)
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith('def f1(') and len(first.stdout) > 30
    assert first.stdout == again.stdout != other.stdout


def test_several_samples_and_a_prompt_from_standard_input(trained):
    words = ['sample.py', str(trained / 'last'), '--prompt=-', '--samples=2', '--tokens=5']
    done = run(words, input='héllo')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('---- sample') == 2 and done.stdout.count('héllo') == 2


def test_a_hugging_face_folder_with_its_own_tokenizer_is_read(tmp_path):
    transformers, tokenizers = pytest.importorskip('transformers'), pytest.importorskip('tokenizers')
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(['x = 1\n'] * 9, tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    bpe.save(str(tmp_path / 'tokenizer.json'))
    sizes = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=1, num_attention_heads=4)
    config = transformers.LlamaConfig(vocab_size=bpe.get_vocab_size(), max_position_embeddings=64, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    done = run(['sample.py', str(tmp_path), '--prompt=x = ', '--tokens=20', '--top_p=0.9', '--top_k=50'])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('x = ')


# ---- against transformers


def published(folder, spaces, bos=True, generation=None, eos=2, tokenizer_class='PreTrainedTokenizerFast', **said):
    """A random model and a tokenizer as published ones are: of bytes (None), or of pieces with a space before each text
    from a normalizer, or from a Metaspace with this prepend scheme."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    transformers = pytest.importorskip('transformers')
    special = ['<unk>', '<s>', '</s>', '<|user|>', '<|end|>']
    tok = Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=bool(spaces), fuse_unk=bool(spaces)))
    text = ['the capital of France is Paris. What is it? 42.\n  hello wörld\n'] * 4 + [(ROOT / 'README.md').read_text()]
    if spaces:
        first = pre_tokenizers.Metaspace('\u2581', 'always')
        special += [f'<0x{i:02X}>' for i in range(256)]
        strip = decoders.Strip(' ', 1, 0)
        steps = [decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse(), strip]
        tok.decoder = decoders.Sequence(steps)
    else:
        first, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.pre_tokenizer = first
    tok.train_from_iterator(text, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False))
    if spaces == 'normalizer':
        tok.normalizer = normalizers.Sequence([normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')])
        tok.pre_tokenizer = None
    elif spaces:
        tok.pre_tokenizer = pre_tokenizers.Metaspace('\u2581', spaces, split=False)
    if bos:
        tok.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    saved = json.loads(tok.to_str())
    saved['added_tokens'] = saved['added_tokens'][:5]  # single bytes are ordinary tokens
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, initializer_range=0.6, bos_token_id=1, eos_token_id=eos)
    config = transformers.LlamaConfig(vocab_size=420, max_position_embeddings=128, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / 'generation_config.json').unlink()
    said |= dict(tokenizer_class=tokenizer_class, bos_token='<s>', eos_token='</s>', unk_token='<unk>')
    files = {'tokenizer.json': saved, 'tokenizer_config.json': said, 'generation_config.json': generation}
    for name, content in files.items():
        if content:
            (folder / name).write_text(json.dumps(content))
    return folder


def said(capsys, *words):
    """What sample.py prints, in this process."""
    words = [str(word) for word in words]
    sample.main(configurator.load(ROOT / 'sample.py', words, sample.problems, positional='checkpoint'))
    return capsys.readouterr()


LEGACY = dict(tokenizer_class='LlamaTokenizer', legacy=True)


@pytest.mark.parametrize(
    'how',
    [
        dict(spaces=None, bos=False, eos=[2, 4]),
        dict(spaces=None, add_bos_token=False, generation={'eos_token_id': [2, 300, 310, 320, 330, 340]}),
        dict(spaces=None, generation={'eos_token_id': 2, 'repetition_penalty': 1.3}),
        dict(spaces='normalizer', tokenizer_class='LlamaTokenizer'),
        dict(spaces='normalizer', bos=False, **LEGACY),
        dict(spaces='normalizer', add_bos_token=True, bos=False),
        dict(spaces='first', tokenizer_class='LlamaTokenizerFast', generation={'eos_token_id': [4, 310, 320, 330]}),
        dict(spaces='always', **LEGACY),
    ],
    ids=str,
)
def test_greedy_text_is_that_of_transformers(tmp_path, capsys, how):
    folder = published(tmp_path, **how)
    transformers = pytest.importorskip('transformers')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in ('The capital of France is', '<|user|>\nWhat is it?<|end|>\n<|user|>hi', '  wörld 日本 '):
        given = tok(prompt, return_tensors='pt')['input_ids']
        assert tokenizer.load(folder).prompt(prompt) == given[0].tolist()
        made = theirs.generate(given, do_sample=False, max_new_tokens=24)[0]
        before, after = (tok.decode(ids, skip_special_tokens=True) for ids in (given[0], made))
        ours = said(capsys, folder, f'--prompt={prompt}', '--tokens=24', '--temperature=0', '--device=cpu')
        assert ours.out == prompt + after.removeprefix(before) + '\n'


def test_a_greedy_batch_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    folder = published(tmp_path, None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, generator = LLaMA.from_pretrained(folder), torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 420, (n,), generator=generator).tolist() for n in (1, 4, 30, 17, 9)]
    free = dict(sample.generate_batch(model, prompts, 20))
    ends = [free[0][2], free[2][9], free[4][15]]  # so that some stop early
    ours = dict(sample.generate_batch(model, prompts, 20, ends, batch_size=2))
    assert len({len(ids) for ids in ours.values()}) > 2
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    options = dict(do_sample=False, max_new_tokens=20, eos_token_id=ends, pad_token_id=0)
    made = theirs.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
    assert [ids[: len(ours[i])] for i, ids in enumerate(made)] == [ours[i] for i in range(len(prompts))]
    assert all(not any(ids[len(ours[i]) :]) for i, ids in enumerate(made))


@pytest.mark.parametrize('penalty', [1.0, 1.3])
def test_a_file_of_prompts_is_continued_as_each_alone(tmp_path, capsys, penalty):
    folder, lines = published(tmp_path, None, generation={'repetition_penalty': penalty}), tmp_path / 'prompts.txt'
    texts = ['The capital of France is', ' hello', 'What is it? 42.' * 9, 'a b']
    lines.write_text('\n\n'.join(texts) + '\n')
    options = (folder, '--tokens=20', '--temperature=0', '--device=cpu')
    alone = [said(capsys, *options, f'--prompt={text}').out for text in texts]
    both = said(capsys, *options, f'--prompts={lines}', '--batch_size=3', '--samples=2').out
    assert both == ''.join(f'---- prompt {i + 1}\n{text}' for i, text in enumerate(alone) for _ in range(2))


def test_a_name_on_the_hub_is_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    folder, asked = published(tmp_path, None), []
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **k: asked.append(name) or str(folder))
    model, _, where = sample.load('some-one/A_model-1.7B', 'cpu')
    assert asked == ['some-one/A_model-1.7B'] and where == str(folder) and model.config.vocab_size == 420
    for typed in ('out/typo', 'no/such/folder', './a/b', 'typo'):
        with pytest.raises(ModelError, match=r'holds no config.json, best/ or last/'):
            sample.load(typed, 'cpu')
    assert len(asked) == 1


def test_what_is_not_done_of_a_generation_config_is_named(tmp_path, capsys):
    folder = published(tmp_path, None, generation={'no_repeat_ngram_size': 3, 'num_beams': 1, 'bad_words_ids': [[5]]})
    notes = [line for line in said(capsys, folder, '--tokens=1').err.splitlines() if line.startswith('note: ')]
    named = [note.partition(' asks for ')[2].partition(',')[0] for note in notes]
    assert named == ['no_repeat_ngram_size', 'bad_words_ids']


def test_a_text_that_ends_at_once_says_so(tmp_path, capsys):
    folder = published(tmp_path, None, generation={'eos_token_id': list(range(420))})
    both = said(capsys, folder, '--prompt=The', '--temperature=0', '--tokens=9')
    assert 'nothing follows' not in both.err  # an end of text that is a word is shown
    saved = json.loads((folder / 'tokenizer.json').read_text())
    token = saved['added_tokens'][0]
    saved['added_tokens'] = [token | {'content': t, 'id': i} for t, i in saved['model']['vocab'].items()]
    (folder / 'tokenizer.json').write_text(json.dumps(saved))
    both = said(capsys, folder, '--prompt=<s>', '--temperature=0', '--tokens=9')
    assert both.out == '<s>\n' and 'the model ended at once, at end-of-text' in both.err


def test_a_prompt_of_bytes_that_are_no_text_and_a_terminal_of_another_coding(tmp_path):
    folder = published(tmp_path, None)
    words = [sys.executable, 'sample.py', str(folder), '--prompt=-', '--tokens=3']
    environment = os.environ | {'PYTHONIOENCODING': 'ascii', 'PYTHONUTF8': '0', 'PYTHONWARNINGS': 'ignore'}
    done = subprocess.run(words, input=b'caf\xe9', cwd=ROOT, capture_output=True, env=environment, check=False)
    assert done.returncode == 0 and done.stdout.startswith(rb'caf\ufffd'), done.stderr


def test_a_prompt_longer_than_the_model_says_what_is_read(tmp_path, capsys):
    folder = published(tmp_path, None)
    note = said(capsys, folder, '--prompt=' + ' is' * 200, '--tokens=1').err
    assert 'reads only the last 128 of the 201 tokens' in note


# ---- what is written


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_nothing_is_written_over_what_is_there_unless_asked_and_shared_files_stay(trained, tmp_path, capsys):
    out = tmp_path / 'out'
    shutil.copytree(trained, out)
    shutil.rmtree(out / 'best')
    shutil.copytree(out / 'last', out / 'best', copy_function=os.link)  # as train.py saves them
    before = contents(out / 'last')
    for target in (out / 'best', out / 'last', out):
        with pytest.raises(Stop, match='is not empty: choose another folder, or --overwrite'):
            said(capsys, out, f'--save_to={target}')
    with pytest.raises(Stop, match='holds other things than a model'):
        said(capsys, out, f'--save_to={out}', '--overwrite')
    with pytest.raises(Stop, match='is a file: choose another folder'):
        said(capsys, out, f'--save_to={out / "metrics.csv"}')
    (tmp_path / 'empty').mkdir()
    for target, flags in ((out / 'best', ['--overwrite']), (tmp_path / 'empty', []), (tmp_path / 'a/b', [])):
        assert f'written: {target}' in said(capsys, out, f'--save_to={target}', '--tokens=1', *flags).out
        assert set(contents(target)) == {'config.json', 'model.safetensors', 'meta.json', 'generation_config.json'}
    assert contents(out / 'last') == before
    assert {path.name for path in tmp_path.iterdir()} == {'out', 'empty', 'a'}


# ---- packed weights


@pytest.mark.parametrize('layer', [loqt.LoQTLinear, lora.LoRALinear])
@pytest.mark.parametrize('room', [2**40, 0])
def test_packed_weights_are_decoded_once_if_they_fit_and_the_numbers_stay(monkeypatch, layer, room):
    model = LLaMA(
        ModelConfig(**TINY | {'n_inner': 64}), linear=partial(layer, rank=4, quantize='nf4', double_quant=True)
    )
    model.materialise(seed=0)
    linears = [module for module in model.modules() if isinstance(module, layer)]
    for linear in linears:  # from a given weight: LoQT keeps beside it what 4 bits lose of it
        linear.set_weight(torch.randn(linear.out_features, linear.in_features) / 8)
        torch.nn.init.normal_(linear.B, std=0.1)
    decoded, calls = quant.decode, []
    monkeypatch.setattr(quant, 'decode', lambda parts, *a: calls.append('_absmax' in parts) or decoded(parts, *a))
    monkeypatch.setattr(ready, 'free_memory', lambda device: room)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = list(sample.generate(model, [5, 6, 7], 9, temperature=0))
    for_each, calls[:] = sum(calls), []
    with sample.decoded(model), torch.no_grad():
        once = list(sample.generate(model, [5, 6, 7], 9, temperature=0))
        logits = model(torch.tensor([packed]))
    assert once == packed
    torch.testing.assert_close(logits, model(torch.tensor([packed])))
    assert for_each % 9 == 0 and sum(calls) >= len(linears)
    assert (sum(calls) < for_each // 3) == bool(room)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_bad_input_is_one_sentence_each(trained, tmp_path):
    shutil.copytree(trained / 'best', tmp_path / 'broken')
    (tmp_path / 'broken/model.safetensors').write_bytes(b'123')
    for words, expected in {
        (): 'no checkpoint: type python sample.py FOLDER',
        ('no/such/folder',): 'holds no config.json, best/ or last/',
        (str(tmp_path / 'broken'),): 'model.safetensors is damaged: its bytes are not those that were saved',
        (str(trained), '--top_p=2'): 'top_p=2.0 is not a probability',
        (str(trained), f'--seed={2**64}'): 'has more than 64 bits',
        (str(trained), '--temprature=1'): 'temperature',
        (str(trained), '--prompts=a.txt', '--prompt=b'): 'says nothing where prompts is a file',
        (str(trained), '--prompts=nope.txt'): 'is no file: give one with a prompt in each line',
        (str(trained), '--batch_size=3'): 'is of a file of prompts: add --prompts=FILE',
    }.items():
        done = run(['sample.py', *words])
        assert done.returncode in (1, 2) and 'Traceback' not in done.stderr
        assert expected in done.stderr, done.stderr


def test_defaults_are_what_the_help_says():
    config = configurator.load(ROOT / 'sample.py', ['out/x'], sample.problems, positional='checkpoint')
    assert config.checkpoint == 'out/x' and math.isclose(config.temperature, 0.8)
