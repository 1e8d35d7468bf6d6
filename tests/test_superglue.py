"""data/superglue: CoLM's prompts, the tokens of answers alone, clusters as sources, and eval.py on what it writes."""

import json

import numpy as np
import pytest
import torch
from conftest import run
from test_eval import nats, scored
from test_glue import dev_and_train
from test_instruct import read
from test_sample import published

from data import DataError, examples, tokenizer
from data.superglue import prepare as superglue

CB = [
    {'premise': f'A {word}.', 'hypothesis': f'{word} "is"', 'label': label, 'idx': 1}
    for word, label in zip(['cat', 'dog', 'mat'] * 4, ['entailment', 'contradiction', 'neutral'] * 4)
]
PASSAGE = {
    'text': 'The cat sat.',
    'questions': [
        {'question': 'Who sat?', 'answers': [{'text': 'the cat', 'label': 1}, {'text': 'a dog', 'label': 0}]},
        {'question': 'Where?', 'answers': [{'text': 'nowhere', 'label': 0}]},
    ],
}


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return published(tmp_path_factory.mktemp('model'), None)


def jsonl(folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return folder


def made(name, given, out, model, **how):
    return superglue.prepare(name, superglue.local(name, str(given)), str(out), str(model), 'a test', **how)


def texts(out, split='train'):
    """[(source, text, trained text)]; the tokenizer knows no quote."""
    tok, rows = tokenizer.load(out), read(out, split)
    answer = [tok.decode([i for i, t in zip(ids, trained) if t]) for _, ids, trained in rows]
    whole = [tok.decode([i for i in ids if i not in tok.bos]).replace('<unk>', '"') for _, ids, _ in rows]
    return [(source, text, a) for (source, *_), text, a in zip(rows, whole, answer)]


def test_the_prompts_are_those_of_mezo_and_colm_and_only_the_answers_are_trained(model, tmp_path):
    made('cb', jsonl(tmp_path / 'CB', train=CB, val=CB[:3]), tmp_path / 'cb', model)
    ask = 'Suppose A {0}. Can we infer that "{0} "is""? Yes, No, or Maybe?\n'
    words, answers = ['cat', 'dog', 'mat'], ['Yes', 'No', 'Maybe']
    assert texts(tmp_path / 'cb', 'val') == [('cb', ask.format(w) + a, a) for w, a in zip(words, answers)]
    lines = [json.loads(line) for line in (tmp_path / 'cb/val.jsonl').read_text().splitlines()]
    assert lines[1] == {'prompt': ask.format('dog'), 'choices': answers, 'label': 1}

    passages = [{'idx': 0, 'passage': PASSAGE}]
    made('multirc', jsonl(tmp_path / 'in/MultiRC', train=passages, val=passages), tmp_path / 'multirc', model)
    ask = 'The cat sat.\nQuestion: {}\nI found this answer "{}". Is that correct? Yes or No?\n'
    asked = [ask.format('Who sat?', 'the cat'), ask.format('Who sat?', 'a dog'), ask.format('Where?', 'nowhere')]
    wanted = [('multirc', q + a, a) for q, a in zip(asked, ('Yes', 'No', 'No'))]
    assert texts(tmp_path / 'multirc') == texts(tmp_path / 'multirc', 'val') == wanted

    dev_and_train(tmp_path, 'SST-2', [['a fine "film', '1'], ['no film', '0']])
    made('sst2', tmp_path, tmp_path / 'sst2', model)
    assert [row[1:] for row in texts(tmp_path / 'sst2')] == [
        ('a fine "film It was great', ' great'),
        ('no film It was terrible', ' terrible'),
    ]


def test_train_is_drawn_val_is_whole_and_what_is_too_long_loses_its_beginning(model, tmp_path):
    given = jsonl(tmp_path / 'CB', train=CB, val=CB)
    meta, report = made('cb', given, tmp_path / 'out', model, limit=5, max_tokens=16)
    assert (meta['train_examples'], meta['val_examples'], report.cut, meta['longest']) == (5, 12, 17, 16)
    whole, _ = made('cb', given, tmp_path / 'whole', model, limit=0)
    assert whole['train_examples'] == 12 and meta['truncated'] == 17
    tok = tokenizer.load(tmp_path / 'out')
    long = read(tmp_path / 'whole', 'val')
    for (_, ids, trained), (_, all_ids, marks) in zip(read(tmp_path / 'out', 'val'), long):
        n = len(tok.bos)
        assert ids == all_ids[:n] + all_ids[n - 16 :] and trained[n:] == marks[n - 16 :] and ids[:n] == tok.bos
    other, _ = made('cb', given, tmp_path / 'other', model, limit=5, max_tokens=16, seed=2)
    assert other['checksum'] != meta['checksum']


@torch.no_grad()
def test_eval_scores_what_it_writes_by_the_mean_log_probability_of_each_answer(model, tmp_path, capsys):
    transformers = pytest.importorskip('transformers')
    made('cb', jsonl(tmp_path / 'CB', train=CB, val=CB), tmp_path / 'out', model)
    (one,) = scored(capsys, model, f'--data=choice:{tmp_path / "out/val.jsonl"}')
    theirs, tok = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tokenizer.load(model)
    right = 0
    for row in map(json.loads, (tmp_path / 'out/val.jsonl').read_text().splitlines()):
        before, means = tok.bos + tok.encode(row['prompt']), []
        for answer in row['choices']:
            ids = tok.bos + tok.encode(row['prompt'] + answer)
            means.append(-nats(theirs, ids, [i >= len(before) for i in range(len(ids))]) / (len(ids) - len(before)))
        right += means.index(max(means)) == row['label']
    assert one['questions'] == 12 and one['right'] == right


def test_clusters_of_hidden_states_are_the_sources(model, tmp_path, monkeypatch):
    transformers, _ = pytest.importorskip('transformers'), pytest.importorskip('sklearn')
    tok, prompts = tokenizer.load(model), ['a b c d e f g', 'a', 'the cat sat on it', 'no']
    theirs = transformers.AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    found = superglue.hidden_states(str(model), tok, prompts, 64)
    for prompt, state in zip(prompts, found):  # alone, without padding
        with torch.no_grad():
            alone = theirs(input_ids=torch.tensor([tok.bos + tok.encode(prompt)])).last_hidden_state[0, -1]
        assert np.allclose(state, alone, atol=1e-5)
    monkeypatch.setattr(superglue, 'hidden_states', lambda folder, tok, prompts, longest: np.array(
        [[10.0 * ('dog' in p), 10.0 * ('mat' in p)] for p in prompts]))  # fmt: skip
    given = jsonl(tmp_path / 'CB', train=CB, val=CB[:4])
    meta, _ = made('cb', given, tmp_path / 'out', model, clusters=3)
    assert [s['name'] for s in meta['sources']] == ['cluster_00', 'cluster_01', 'cluster_02']
    assert [s['train_examples'] for s in meta['sources']] == [4, 4, 4]
    assert sorted(s['val_examples'] for s in meta['sources']) == [1, 1, 2]
    for word in ('cat', 'dog', 'mat'):
        assert len({source for source, text, _ in texts(tmp_path / 'out') if word in text}) == 1
    again, _ = made('cb', given, tmp_path / 'again', model, clusters=3)
    assert again['checksum'] == meta['checksum']
    with pytest.raises(DataError, match='--clusters=13 is more than the 12 examples'):
        made('cb', given, tmp_path / 'again', model, clusters=13)


def test_without_local_files_the_hub_is_asked(model, tmp_path, monkeypatch):
    asked = []

    def from_hub(*words):
        asked.append(words)
        yield from ({'paragraph': 'a', 'question': 'b', 'answer': 'c', 'label': i % 2, 'idx': {}} for i in range(3))

    monkeypatch.setattr(examples, 'from_hub', from_hub)
    meta, _ = superglue.prepare('multirc', superglue.from_hub('multirc'), str(tmp_path), str(model), 'a test')
    assert asked == [('superglue', 'aps/super_glue', 'multirc', split) for split in ('train', 'validation')]
    assert meta['train_examples'] == 3


@pytest.mark.parametrize(
    'name, rows, says',
    [
        ('cb', [{'premise': 'a', 'label': 0}], 'is not in the format of CB: it lacks hypothesis, a text'),
        ('cb', [CB[0] | {'label': 'maybe'}], "the label is 'maybe', not entailment or contradiction or neutral"),
        ('cb', [CB[0] | {'label': -1}], 'the label is -1'),
        ('multirc', [{'passage': {'text': 'a'}}], "not in the format of MultiRC (it lacks 'questions')"),
    ],
)
def test_rows_of_something_else_are_one_sentence(model, tmp_path, name, rows, says):
    given = jsonl(tmp_path / 'in', train=rows, val=rows)
    with pytest.raises(DataError) as error:
        made(name, given, tmp_path / 'out', model)
    assert says in str(error.value) and 'train.jsonl:1' in str(error.value)


def test_the_command_prints_an_example_and_how_it_is_scored(model, tmp_path):
    given, out = jsonl(tmp_path / 'CB', train=CB, val=CB), tmp_path / 'out'
    words = ['data/superglue/prepare.py', '--task=cb', f'--tokenizer={model}', f'--out_dir={out}', f'--input={given}']
    done = run(words)
    assert done.returncode == 0, done.stderr
    assert 'Yes, No, or Maybe?' in done.stdout and 'train_examples: 12' in done.stdout
    assert done.stdout.splitlines()[-1] == f'to score: python eval.py RUN --data=choice:{out}/val.jsonl'
    done = run([*words, '--model=somewhere'])
    assert done.returncode == 1 and done.stderr.strip() == 'error: --model is of --clusters: give both, or leave it out'
    done = run([*words[:-1], f'--input={tmp_path}/nowhere'])
    assert 'holds no train.jsonl: name the folder of CB' in done.stderr
