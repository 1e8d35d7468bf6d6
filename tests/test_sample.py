"""sample.py: what is chosen, what is said, and where it reads from."""

import math
import shutil

import pytest
import torch
from conftest import ROOT, run, train

import configurator
import sample
from model import LLaMA, ModelConfig

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


def test_a_full_window_goes_on_from_its_later_half(model):
    made = list(sample.generate(model, [5, 6, 7], 40, temperature=0))
    assert len(made) == 40
    ids = [5, 6, 7, *made]
    # the window of 16 filled when token 16 was needed as input: from there the last 8 are the context
    assert ids[17] == slow_greedy(model, ids[9:17], 1)[-1]


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


def test_generation_stops_at_the_end_of_text(model):
    free = list(sample.generate(model, [5, 6, 7], 12, temperature=0))
    stopped = list(sample.generate(model, [5, 6, 7], 12, eot=free[4], temperature=0))
    assert stopped == free[: free.index(free[4]) + 1]


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


def test_bad_input_is_one_sentence_each(trained, tmp_path):
    shutil.copytree(trained / 'best', tmp_path / 'broken')
    (tmp_path / 'broken/model.safetensors').write_bytes(b'123')
    for words, expected in {
        (): 'no checkpoint: type python sample.py FOLDER',
        ('no/such/folder',): 'holds no config.json, best/ or last/',
        (str(tmp_path / 'broken'),): 'model.safetensors is missing or broken',
        (str(trained), '--top_p=2'): 'top_p=2.0 is not a probability',
        (str(trained), '--temprature=1'): 'temperature',
    }.items():
        done = run(['sample.py', *words])
        assert done.returncode in (1, 2) and 'Traceback' not in done.stderr
        assert expected in done.stderr, done.stderr


def test_defaults_are_what_the_help_says():
    config = configurator.load(ROOT / 'sample.py', ['out/x'], sample.problems, positional='checkpoint')
    assert config.checkpoint == 'out/x' and math.isclose(config.temperature, 0.8)
