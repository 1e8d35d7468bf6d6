"""eval.py: losses, likeliest choices and written answers, against the same by hand and by transformers."""

import ast
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run, train, values
from test_sample import published

import configurator
import eval as scoring
import sample
import train as training
from data import DataError, chat, questions, tokenizer
from data.batches import read_meta
from data.common import Writer
from data.examples import ExampleWriter
from model import LLaMA, ModelConfig, ModelError
from plumbing import Stop, hf_models

QUESTIONS = [
    {'question': f'What is {a} + {b}?', 'answer': f'{a} + {b} = {a + b}\n#### {a + b}', 'source': source}
    for a, b, source in ((1, 2, 'small'), (3, 4, 'small'), (25, 17, 'large'), (5, 6, 'small'), (60, 40, 'large'))
]
TEMPLATE = """{% for message in messages %}{% if message.role == 'user' %}<|user|>{{ message.content }}<|end|>\
{% else %}{{ message.content }}<|end|>{% endif %}{% endfor %}"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A random model, its tokenizer, and a chat template."""
    folder = published(tmp_path_factory.mktemp('model'), None)
    (folder / 'chat_template.jinja').write_text(TEMPLATE)
    return folder


@pytest.fixture(scope='module')
def theirs(folder):
    transformers = pytest.importorskip('transformers')
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def written(path, rows):
    path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
    return path


def scored(capsys, *words, totals=False):
    """What eval.py prints as JSON, in this process."""
    words = [*map(str, words), '--json', '--device=cpu']
    scoring.noted.clear()
    scoring.main(configurator.load(ROOT / 'eval.py', words, scoring.problems, positional='checkpoints', several=True))
    found = json.loads(capsys.readouterr().out)
    return [one for one in found if totals or one['source'] != 'all sources']


@torch.no_grad()
def nats(model, ids, trained):
    """Nats of the trained tokens, by transformers."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    each = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction='none')
    return each[torch.tensor(trained[1:])].sum().item()


def bytes_model(folder):
    """A random model of bytes, with a short window."""
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=4, n_embd=32, n_inner=56, vocab_size=257, block_size=64)
    model = LLaMA(ModelConfig(**sizes)).materialise(seed=0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    (folder / 'meta.json').write_text('{"tokenizer": "bytes", "eot": 256}')
    return model


@torch.no_grad()
def test_the_loss_of_text_is_that_of_each_window_by_source_counted_in_tokens_and_bytes(tmp_path, capsys):
    model, data = bytes_model(tmp_path / 'model'), tmp_path / 'data'
    with Writer(data, tokenizer.Bytes(), 'a test') as out:
        for source, n in (('a', 7), ('b', 5)):
            for split in ('train', 'val'):
                out.add(source, split, ''.join(chr(97 + (i * n) % 26) for i in range(300)))
    found = {one['source']: one for one in scored(capsys, tmp_path / 'model', f'--data={data}', '--block_size=50')}
    ids = torch.frombuffer(bytearray((data / 'val.bin').read_bytes()), dtype=torch.uint16).long()
    assert read_meta(data)['sources'][0]['val_tokens'] == 301
    sums = {'a': [0, 0, 0], 'b': [0, 0, 0]}
    for begin in range(0, 600, 50):
        window = ids[begin : begin + 51]
        loss = torch.nn.functional.cross_entropy(model(window[None, :-1])[0], window[1:], reduction='sum').item()
        for i, amount in enumerate((loss, 50, int((window[1:] < 256).sum()))):
            sums['a' if begin + 25 < 301 else 'b'][i] += amount
    for source, (loss, tokens, size) in sums.items():
        one = found[source]
        assert (one['tokens'], one['bytes']) == (tokens, size)
        assert one['loss'] == pytest.approx(loss / tokens, rel=1e-5)
        assert one['perplexity'] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
        assert one['bits_per_byte'] == pytest.approx(loss / math.log(2) / size, rel=1e-5)


def test_likelihoods_and_losses_of_a_step_count_the_heads_bias(tmp_path):
    pytest.importorskip('transformers')
    from hf_tiny import saved
    from test_hf_models import batch, config_of

    theirs, (x, y) = saved(tmp_path, 'phi'), batch()
    model = hf_models.load(tmp_path, config_of())
    assert model.head_bias.abs().max() > 0.01
    rows = [(i, [*x[i].tolist(), max(int(y[i, -1]), 0)], [False, *(y[i] != -100).tolist()]) for i in range(len(x))]
    each = F.cross_entropy(theirs(x).logits.transpose(1, 2), y, reduction='none').sum(1)
    found = {i: nats for i, _, _, nats in scoring.log_likelihoods(model, rows, 2)}
    torch.testing.assert_close(torch.tensor([found[i] for i in range(len(x))]).float(), each.detach())
    loss = training.loss_of(model, (x, y), torch.tensor(7.0), 'cpu')
    torch.testing.assert_close(loss, F.cross_entropy(theirs(x).logits.transpose(1, 2), y, reduction='sum') / 7)


def test_the_loss_of_a_runs_own_windows_is_its_val_loss(tmp_path, data, capsys):
    done = train(tmp_path / 'out', data)
    assert done.returncode == 0, done.stderr
    (one,) = scored(capsys, tmp_path / 'out/last', f'--data={data}', '--limit=16')  # TINY: 512 tokens in windows of 32
    assert f'{one["loss"]:.4f}' == values(done.stdout)['val_loss'] and one['tokens'] == 512


@torch.no_grad()
def test_the_loss_of_examples_is_over_their_trained_tokens_one_example_at_a_time(tmp_path, capsys):
    model, data, tok = bytes_model(tmp_path / 'model'), tmp_path / 'data', tokenizer.Bytes()
    template, sums = chat.load(tmp_path, tok, 'alpaca'), {}
    with ExampleWriter(data, tok, template, 'a test') as out:
        for split in ('train', 'val'):
            for i, q in enumerate(QUESTIONS):
                ids = [*tok.encode('Q' * i), *tok.encode(q['question'][: 9 + i]), *tok.encode('yes' * i), 256]
                trained = [j >= len(ids) - 1 - 3 * i for j in range(len(ids))]
                out.add_example(q['source'], split, ids, trained, 3 * i)
                if split == 'val':
                    logits = model(torch.tensor([ids]))[0, :-1]
                    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction='none')
                    entry = sums.setdefault(q['source'], [0, 0, 0])
                    entry[0] += loss[torch.tensor(trained[1:])].sum().item()
                    entry[1] += sum(trained)
                    entry[2] += 1
    for batch_size in (1, 3):
        found = scored(capsys, tmp_path / 'model', f'--data={data}', f'--batch_size={batch_size}')
        for one in found:
            loss, tokens, n = sums[one['source']]
            assert (one['tokens'], one['examples']) == (tokens, n)
            assert one['loss'] == pytest.approx(loss / tokens, rel=1e-5)


def test_the_loss_of_right_answers_and_what_is_written_are_transformers_own(tmp_path, folder, theirs, capsys):
    path, out = written(tmp_path / 'q.jsonl', QUESTIONS), tmp_path / 'answers.jsonl'
    found = scored(capsys, folder, f'--data={path}', '--tokens=20', '--batch_size=2', f'--answers={out}')
    tok, losses = tokenizer.load(folder), {}
    template = chat.load(folder, tok)
    said = {one['question']: one for one in map(json.loads, out.read_text().splitlines())}
    assert len(said) == len(QUESTIONS)
    for q in QUESTIONS:
        asked = [{'role': 'user', 'content': q['question']}]
        ids, trained = template.encode([*asked, {'role': 'assistant', 'content': q['answer']}])
        entry = losses.setdefault(q['source'], [0, 0])
        entry[0] += nats(theirs, ids, trained)
        entry[1] += sum(trained)
        ids = template.prompt(asked)
        options = dict(do_sample=False, max_new_tokens=20, eos_token_id=[2, 4], pad_token_id=2)  # </s>, <|end|>
        made = theirs.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        one = said[q['question']]
        assert one['answer'] == ''.join(tok.decode_stream(made, ids))
        assert one['cut'] == (made[-1] not in (2, 4))
    for one in found:
        loss, tokens = losses[one['source']]
        assert one['tokens'] == tokens and one['loss'] == pytest.approx(loss / tokens, rel=1e-5)
        assert one['questions'] == sum(q['source'] == one['source'] for q in QUESTIONS)


CHOICES = [
    {'prompt': 'the capital of France is', 'choices': ['Paris', 'hello there', '42'], 'label': 0},
    {'prompt': 'What is it?\n', 'options': ['the', ' 42.'], 'answer': ' 42.'},
    {
        'question': 'What is it?',
        'choices': {'text': ['a', 'hello', 'Paris is'], 'label': ['1', '2', '3']},
        'answerKey': '2',
    },
    {'question': 'hello', 'choices': ['hello', 'is it'], 'answer': 'B'},
]


def test_the_likeliest_choice_is_by_transformers_mean_log_probabilities(tmp_path, folder, theirs, capsys):
    path, out = written(tmp_path / 'c.jsonl', CHOICES), tmp_path / 'answers.jsonl'
    (found,) = scored(capsys, folder, f'--data=choice:{path}', f'--answers={out}', '--batch_size=3')
    tok, right = tokenizer.load(folder), 0
    said = {one['question']: one for one in map(json.loads, out.read_text().splitlines())}
    texts = [['Paris', 'hello there', '42'], ['the', ' 42.'], ['a', 'hello', 'Paris is'], ['hello', 'is it']]
    for row, options, answer in zip(CHOICES, texts, (0, 1, 1, 1)):
        if asked := row.get('prompt'):
            before = tok.bos + tok.encode(asked)
            space = '' if asked.endswith('\n') else ' '
            coded = [tok.bos + tok.encode(asked + space + text.removeprefix(space)) for text in options]
        else:
            before = tok.bos + tok.prompt(f'<|user|>{row["question"]}<|end|>')[1:]
            coded = [tok.bos + tok.prompt(f'<|user|>{row["question"]}<|end|>{text}')[1:] for text in options]
        means = []
        for ids in coded:
            n = len(ids) - len(before)
            means.append(-nats(theirs, ids, [i >= len(before) for i in range(len(ids))]) / n)
        one = said[row.get('prompt') or row['question']]
        assert one['log_probabilities'] == pytest.approx(means, rel=1e-5)
        assert one['reference'] == answer and one['answer'] == options[means.index(max(means))]
        right += means.index(max(means)) == answer
    assert (found['right'], found['questions'], found['no_answer']) == (right, 4, 0)


def test_two_checkpoints_are_scored_side_by_side_on_the_same_questions(tmp_path, folder, capsys):
    path, other = written(tmp_path / 'q.jsonl', QUESTIONS), published(tmp_path / 'other', 'first')
    found = scored(capsys, folder, other, f'--data=gsm8k:{path}', '--tokens=8', '--limit=3', '--seed=4')
    assert [one['checkpoint'] for one in found[:1] + found[-1:]] == [str(folder), str(other)]
    first, second = ([o for o in found if o['checkpoint'] == str(name)] for name in (folder, other))
    assert [(o['source'], o['questions']) for o in first] == [(o['source'], o['questions']) for o in second]
    assert sum(o['questions'] for o in first) == 3


def test_several_sources_have_a_total_that_weighs_each_by_what_it_has(tmp_path, folder, capsys):
    path = written(tmp_path / 'q.jsonl', QUESTIONS)
    *parts, total = scored(capsys, folder, f'--data={path}', '--tokens=8', totals=True)
    assert total['source'] == 'all sources' and len(parts) == 2
    for name in ('examples', 'tokens', 'bytes', 'questions', 'right'):
        assert total[name] == sum(one[name] for one in parts)
    nats = sum(one['loss'] * one['tokens'] for one in parts)
    assert total['loss'] == pytest.approx(nats / total['tokens'])
    assert total['flexible'] == pytest.approx(sum(one['flexible'] * one['questions'] for one in parts) / 5)


class Fixed:
    """Stands in for generate_batch: it has the model answer with these texts."""

    def __init__(self, tok, texts, stop_after=None):
        self.tok, self.texts, self.stop_after = tok, texts, stop_after

    def __call__(self, model, prompts, n, ends, *more, **options):
        for i in range(len(prompts)):
            if i == self.stop_after:
                raise KeyboardInterrupt
            text = self.texts[i]
            yield i, self.tok.encode(text) + [ends[0]] * (not text.endswith('...'))


TEXTS = ['It is 3.\n#### 3.00', 'The answer is 8.', '42', 'I do not know', '100 or so ...']


def test_shares_intervals_cuts_and_missing_answers_are_counted(tmp_path, folder, capsys, monkeypatch):
    path = written(tmp_path / 'q.jsonl', [q | {'source': 'all'} for q in QUESTIONS])
    monkeypatch.setattr(sample, 'generate_batch', Fixed(tokenizer.load(folder), TEXTS))
    (one,) = scored(capsys, folder, f'--data=gsm8k:{path}', '--score=answers')
    assert 'loss' not in one
    assert (one['questions'], one['right'], one['exact']) == (5, 3, 0.6)
    assert (one['strict'], one['flexible'], one['cut'], one['no_answer']) == (0.0, 0.2, 0.2, 0.2)
    assert one['low'] == pytest.approx(0.2307, abs=1e-4) and one['high'] == pytest.approx(0.8824, abs=1e-4)


def test_what_was_scored_until_ctrl_c_is_printed_and_no_line_is_too_long(tmp_path, folder, capsys, monkeypatch):
    path = written(tmp_path / ('long name ' * 12 + '.jsonl'), QUESTIONS)
    monkeypatch.setattr(sample, 'generate_batch', Fixed(tokenizer.load(folder), TEXTS, stop_after=3))
    words = [str(folder), f'--data=gsm8k:{path}']
    config = configurator.load(ROOT / 'eval.py', words, scoring.problems, positional='checkpoints', several=True)
    with pytest.raises(KeyboardInterrupt):
        scoring.main(config)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    (small,) = [line.split() for line in lines if ' small ' in line and '%' in line]
    assert small[-9:-7] == ['2', '50.0%'] and small[-4:] == ['0.0%'] * 4


def test_a_base_model_gets_a_plain_prompt_with_shots_and_stops_at_its_next_question(tmp_path, capsys, monkeypatch):
    folder, path = published(tmp_path / 'base', 'first'), written(tmp_path / 'q.jsonl', QUESTIONS)
    tok, given = tokenizer.load(folder), []
    texts = [f'{q["answer"]}\nQuestion: what\n#### 7' for q in QUESTIONS]

    def batch(model, prompts, n, ends, batch_size, stop, *more, **options):
        given.extend(tok.decode(ids) for ids in prompts)
        for i, text in enumerate(texts):
            ids = tok.encode(text)
            yield i, ids[: next(n for n in range(1, len(ids) + 1) if stop(ids[:n]))]

    monkeypatch.setattr(sample, 'generate_batch', batch)
    monkeypatch.setattr(LLaMA, 'from_pretrained', lambda *a, load=LLaMA.from_pretrained, **k: widened(load(*a, **k)))
    words = ['--shots=2', f'--shots_from={path}', '--tokens=30', '--score=answers']
    found = scored(capsys, folder, f'--data={path}', *words)
    assert sum(one['right'] for one in found) == sum(one['questions'] for one in found) == 5
    assert all(one['cut'] == 0 and one['strict'] == 1 for one in found)
    assert given[0].count('Question: ') == 3 and given[0].endswith('Question: What is 1 + 2?\nAnswer:')
    assert given[0].startswith('<s>') and '#### ' in given[0]


def widened(model):
    model.set_block_size(512)
    return model


def test_it_runs_as_a_program_and_says_what_a_plain_prompt_is(tmp_path):
    folder, path = published(tmp_path / 'base', 'first'), written(tmp_path / 'q.jsonl', QUESTIONS)
    done = run(['eval.py', folder, f'--data={path}', '--tokens=4', '--limit=2', '--device=cpu'])
    assert done.returncode == 0, done.stderr
    assert 'note: ' in done.stderr and 'has no chat template, so it is asked plainly' in done.stderr
    titles = ['checkpoint', 'data', 'source', 'examples', 'tokens', 'loss', 'perplexity', 'bits/byte']
    assert done.stdout.splitlines()[0].split() == titles


@pytest.mark.parametrize(
    ('rows', 'spec', 'sentence'),
    [
        ('{"question": "a", "answer": "#### 1"}\n{"question": ', '', 'q.jsonl:2 is not valid JSON'),
        ('[]', '', 'holds no question'),
        ('{"text": "a"}', '', 'q.jsonl:1 is text, no example of question and answer'),
        ('{"question": "a", "answer": "no idea"}', 'gsm8k:', 'q.jsonl:1: no answer is to be found in it by the rule'),
        ('{"prompt": "a", "choices": ["b"], "label": 0}', '', 'q.jsonl:1 has no list of choices'),
        ('{"prompt": "a", "choices": ["b", "c"], "label": 2}', '', 'its answer is 2, none of the 2 choices'),
        ('{"prompt": "a", "choices": ["b", "c"]}', 'choice:', 'its answer is None, none of the 2 choices'),
        ('{"choices": ["b", "c"], "answer": "b"}', '', 'has neither prompt nor question'),
        ('\n\n', '', 'holds no question'),
        ('{"question": "a", "answer": " "}', '', 'q.jsonl:1 has an empty answer, so that it cannot be scored'),
    ],
)
def test_a_file_that_holds_no_questions_is_one_sentence(tmp_path, rows, spec, sentence):
    (tmp_path / 'q.jsonl').write_text(rows)
    with pytest.raises(DataError) as error:
        questions.find(f'{spec}{tmp_path / "q.jsonl"}')
    assert sentence in str(error.value) and len(str(error.value).splitlines()) == 1


def test_what_cannot_be_scored_is_one_sentence_and_nothing_is_written_over(tmp_path, folder, capsys):
    path = written(tmp_path / 'q.jsonl', QUESTIONS)
    for words, sentence in {
        (): 'no checkpoint: type python eval.py FOLDER',
        (folder,): 'no data: add --data=FOLDER',
        (folder, '--data=no/such.jsonl'): 'no/such.jsonl is no file here',
        (folder, '--data=gsm8j'): 'gsm8j is no file or data set here (did you mean gsm8k?)',
        (folder, '--data=gms8k:test.jsonl'): '(did you mean gsm8k:test.jsonl?)',
        (folder, '--data=data/mathinstrct'): '(did you mean mathinstruct?)',
        (folder, '--data=pystdlb'): '(did you mean pystdlib?)',
        (folder, '--data=c4'): 'data/c4',  # known, not prepared
        (folder, 'no/such/folder', f'--data={path}'): 'no/such/folder holds no config.json, best/ or last/',
        (folder, f'--data={path}', f'--answers={path}'): 'is there already: choose another name',
        (folder, f'--data={path}', '--shots=3'): 'give both or neither',
        (folder, f'--data={path}', '--tokens=200'): 'leaves no room for a question',
        (folder, f'--data={path}', '--template=chatml'): 'needs the special token <|im_start|>',
    }.items():
        with pytest.raises((configurator.ConfigError, DataError, ModelError, Stop, tokenizer.TokenizerError)) as error:
            scored(capsys, *words)
        assert sentence in str(error.value)
        assert 'loss' not in capsys.readouterr().out or 'no room' in sentence  # said before anything is scored
    assert path.read_text().count('\n') == len(QUESTIONS)
    done = run(['eval.py', folder, '--data=no/such.jsonl'])
    assert done.returncode == 1 and done.stderr.startswith('error: no/such.jsonl is no file here')


def test_published_questions_are_downloaded_or_their_file_is_asked_for(monkeypatch):
    datasets = pytest.importorskip('datasets')
    asked = []
    monkeypatch.setattr(datasets, 'load_dataset', lambda *a, **k: asked.append((a, k)) or QUESTIONS)
    assert [q.rule for q in questions.find('gsm8k')] == ['gsm8k'] * 5
    assert asked == [(('openai/gsm8k', 'main'), {'split': 'test'})]

    def offline(*a, **k):
        raise ConnectionError('no network\nat all')

    monkeypatch.setattr(datasets, 'load_dataset', offline)
    with pytest.raises(DataError, match=r'could not be downloaded \(no network\).*--data=math:FILE.jsonl'):
        questions.find('math')


def test_nothing_that_a_model_writes_can_be_run():
    for path in ('eval.py', 'data/tasks.py', 'data/questions.py'):
        tree = ast.parse((ROOT / path).read_text())
        called = {node.func.id for node in ast.walk(tree) if isinstance(getattr(node, 'func', None), ast.Name)}
        assert not called & {'eval', 'exec', 'compile', '__import__'}
