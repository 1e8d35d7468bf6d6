"""--task=classify: runs, their metrics and eval.py's, against transformers and scikit-learn."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from hf_tiny import saved
from test_glue import HEADS, cola, dev_and_train, made, tsv
from test_glue import bert as bert_tokenizer
from test_glue import decoder as decoder_tokenizer
from test_glue import roberta as roberta_tokenizer

import configurator
import eval as scoring
import sample
import train as training
from data import DataError, tokenizer
from data.batches import Labelled, trained_tokens
from model import ModelError
from plumbing import Stop, classify, hf_models, parallel

HERE = parallel.Here(0, 1, 'cpu', torch.float32)
TOKENIZERS = {'bert': bert_tokenizer, 'roberta': roberta_tokenizer, 'gpt2': decoder_tokenizer}
SMALL = [
    '--task=classify',
    '--method=adamw',
    '--learning_rate=3e-3',
    '--batch_size=4',
    '--block_size=32',
    '--device=cpu',
]
SMALL += ['--dtype=float32', '--max_iters=8', '--eval_interval=4', '--log_interval=1', '--warmup_iters=1']


def model_of(folder, kind, dropout=0.0, **changes):
    """A tiny model of transformers with the tokenizer of that kind, without a classifier."""
    TOKENIZERS[kind](folder)
    special = {'roberta': dict(bos_token_id=0, pad_token_id=1, eos_token_id=2)}
    saved(folder, kind, dropout=dropout, vocab_size=330, **special.get(kind, {}) | changes)
    return folder


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    return {kind: model_of(tmp_path_factory.mktemp('models') / kind, kind, 0.1) for kind in TOKENIZERS}


@pytest.fixture(scope='module')
def folders(tmp_path_factory, models):
    """The same CoLA for each of them."""
    place = tmp_path_factory.mktemp('cola')
    given = cola(place, 48, 24)
    for kind, model in models.items():
        made('cola', given, place / kind, model)
    return {kind: str(place / kind) for kind in models}


@pytest.fixture
def unplanned(monkeypatch):
    """Without the plan, which takes most of the time."""
    monkeypatch.setattr(training, 'announce', lambda *_: None)


def config_of(*words, **changes):
    config = configurator.load(ROOT / 'train.py', [*SMALL, *map(str, words)])
    vars(config).update(changes)
    return config


def trained(capsys, *words):
    """The lines of a run in this process, and those that end it as a dict."""
    config = config_of(*words)
    configurator.check_or_exit(config, ROOT / 'train.py', training.problems)
    training.main(config)
    lines = capsys.readouterr().out.splitlines()
    return lines, dict(line.split(': ', 1) for line in lines if ': ' in line)


def tensors(folder):
    """All tensors of a checkpoint, weights and states, as bytes."""
    state = torch.load(folder / 'optimizer.pt', weights_only=True)['state']
    found = {(p, name): t for p, some in state.items() for name, t in some.items()}
    found = {key: t.numpy().tobytes() if torch.is_tensor(t) else t for key, t in found.items()}
    return found | {'weights': (folder / 'model.safetensors').read_bytes()}


@torch.no_grad()
def by_transformers(folder, data):
    """(logits, labels) of every example of a Labelled alone, by transformers' own class."""
    import transformers

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    logits = []
    for i in range(len(data.ends)):
        x, _, _, _, types = data.read([i])
        more = {'token_type_ids': types} if theirs.config.model_type == 'bert' else {}
        theirs.config.pad_token_id = None  # one row has no padding
        logits.append(theirs(input_ids=x, **more).logits[0])
    return torch.stack(logits), data.targets


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_a_run_learns_and_its_last_lines_are_what_transformers_and_scikit_learn_say(
    models, folders, kind, tmp_path, capsys, unplanned
):
    sk = pytest.importorskip('sklearn.metrics')
    out, words = tmp_path / 'out', ['--max_iters=80', '--eval_interval=40', '--model_dropout=0', '--batch_size=8']
    lines, end = trained(
        capsys, f'--dataset={folders[kind]}', f'--init_from={models[kind]}', f'--out_dir={out}', *words
    )
    first = next(line for line in lines if line.startswith('step 1/'))
    assert float(end['train_loss']) < 0.5 * float(first.split('loss ')[1].split()[0])
    logits, labels = by_transformers(out / 'last', Labelled(folders[kind], 'val', 32))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    assert float(end['val_loss']) == pytest.approx(loss, abs=1e-4)
    assert end['val_matthews'] == f'{sk.matthews_corrcoef(labels, logits.argmax(1)):.4f}'
    assert float(end['val_matthews']) > 0.3 and end['steps'] == '80' and not any('sample:' in line for line in lines)
    assert json.loads((out / 'last/config.json').read_text())['id2label'] == {'0': 'unacceptable', '1': 'acceptable'}
    header, *rows = (out / 'metrics.csv').read_text().splitlines()
    assert 'val_matthews' in header.split(',') and len(rows) == 81


@pytest.mark.parametrize('flags', [['--method=adamw'], ['--method=galore', '--rank=4', '--update_proj_gap=3']])
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(models, folders, tmp_path, capsys, unplanned, flags):
    whole, halves = tmp_path / 'whole', tmp_path / 'halves'
    words = [f'--dataset={folders["roberta"]}', *flags, '--gradient_accumulation_steps=2', '--lr_decay_iters=8']
    trained(capsys, *words, f'--init_from={models["roberta"]}', f'--out_dir={whole}')
    trained(capsys, *words, f'--init_from={models["roberta"]}', f'--out_dir={halves}', '--max_iters=4')
    _, end = trained(capsys, *words, '--init_from=resume', f'--out_dir={halves}')
    assert tensors(whole / 'last') == tensors(halves / 'last') and 'val_matthews' in end
    _, again = trained(capsys, *words, '--init_from=resume', f'--out_dir={halves}', '--eval_only')
    assert [again[name] for name in ('val_loss', 'val_matthews')] == [
        end[name] for name in ('val_loss', 'val_matthews')
    ]


def test_eight_rows_at_once_are_eight_micro_batches_of_one(models, folders):
    config = config_of(f'--init_from={models["bert"]}', f'--dataset={folders["bert"]}', '--model_dropout=0')
    data, found = Labelled(folders['bert'], 'train', 32), []
    x, y, _, lengths, types = data.read([*range(8)])
    apart = []
    for i in range(8):
        n = lengths[i]
        apart.append((x[i : i + 1, :n], y[i : i + 1], None, lengths[i : i + 1], types[i : i + 1, :n]))
    for batches in ([(x, y, None, lengths, types)], apart):
        model = hf_models.load(str(models['bert']), config, labels=2)
        loss = sum(training.loss_of(model, batch, trained_tokens(batches), 'cpu') for batch in batches)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (loss, grads), (other, others) = found
    assert loss == pytest.approx(other, abs=1e-6) and torch.allclose(grads, others, atol=1e-6)


def test_numbers_are_learned_by_their_squared_error_and_judged_by_correlations(models, tmp_path, capsys, unplanned):
    stats = pytest.importorskip('scipy.stats')
    lines = [[*'ixfyoss', ' '.join(['the', *['dog'] * (i % 6)]), 'the cat', str(i % 6 - i % 6 / 6)] for i in range(36)]
    made('stsb', dev_and_train(tmp_path, 'STS-B', lines, lines[:12]), tmp_path / 'data', models['bert'])
    words = [f'--dataset={tmp_path / "data"}', f'--init_from={models["bert"]}', f'--out_dir={tmp_path / "out"}']
    _, end = trained(capsys, *words, '--max_iters=20', '--eval_interval=20')
    logits, scores = by_transformers(tmp_path / 'out/last', Labelled(str(tmp_path / 'data'), 'val', 32))
    assert float(end['val_loss']) == pytest.approx(((logits[:, 0].numpy() - scores) ** 2).mean(), abs=1e-3)
    assert float(end['val_pearson']) == pytest.approx(stats.pearsonr(logits[:, 0], scores)[0], abs=1e-3)
    assert float(end['val_spearman']) == pytest.approx(stats.spearmanr(logits[:, 0], scores)[0], abs=1e-3)
    assert float(end['val_pearson']) > 0.5
    answers = tmp_path / 'answers.jsonl'
    words = [tmp_path / 'out/last', f'--data={tmp_path / "data"}', '--json', f'--answers={answers}']
    (row,) = json.loads(scored(capsys, *words))
    assert f'{row["pearson"]:.4f}' == end['val_pearson'] and f'{row["loss"]:.4f}' == end['val_loss']
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert np.allclose([one['answer'] for one in written], logits[:, 0], atol=1e-4)
    assert np.allclose([one['reference'] for one in written], scores)


def mnli(folder, model):
    """Four kinds of words, three labels, a dev split that is harder than the other."""
    words = ['the cat sat', 'a dog', 'bark bark']
    names = ['entailment', 'neutral', 'contradiction']
    rows = [[*'01234567', words[i % 3], 'the mat', names[(i + (i % 5 == 0)) % 3]] for i in range(30)]
    for split in ('train', 'dev_matched', 'dev_mismatched'):
        tsv(folder / f'MNLI/{split}.tsv', [[*HEADS['MNLI'], 'gold_label'], *rows[: 30 if split == 'train' else 15]])
    made('mnli', folder, folder / 'data', model)
    return str(folder / 'data')


def test_mnlis_dev_splits_are_judged_together_and_apart_and_best_is_by_the_metric_if_asked(
    models, tmp_path, capsys, unplanned
):
    data, out = mnli(tmp_path, models['roberta']), tmp_path / 'out'
    words = [f'--dataset={data}', f'--init_from={models["roberta"]}', f'--out_dir={out}', '--best_by=metric']
    lines, end = trained(capsys, *words, '--max_iters=12', '--eval_interval=3')
    both = float(end['val_accuracy'])
    parts = [float(end[f'val_accuracy_{kind}']) for kind in ('matched', 'mismatched')]
    assert both == pytest.approx(sum(parts) / 2, abs=1e-4)
    found = [float(line.split('| accuracy ')[1].split()[0]) for line in lines if 'val loss' in line][1:]
    run = json.loads((out / 'best/run.json').read_text())
    assert run['best_val_loss'] == pytest.approx(-max(found), abs=1e-4)
    assert run['step'] == 3 * (1 + found.index(max(found)))
    with pytest.raises(Stop, match='--best_by=metric'):
        training.main(config_of(f'--dataset={data}', '--init_from=resume', f'--out_dir={out}', '--max_iters=20'))


def test_a_head_of_the_same_labels_in_another_order_is_said(models, tmp_path):
    import transformers

    data = SimpleNamespace(labels=['entailment', 'neutral', 'contradiction'])
    folder = tmp_path / 'theirs'
    theirs = transformers.AutoConfig.from_pretrained(models['roberta'])
    theirs.id2label = {0: 'CONTRADICTION', 1: 'NEUTRAL', 2: 'ENTAILMENT'}
    theirs.label2id = {name: i for i, name in theirs.id2label.items()}
    transformers.AutoModelForSequenceClassification.from_config(theirs).save_pretrained(folder)
    model = hf_models.load(str(folder), SimpleNamespace(), labels=3)
    assert classify.in_order(model, data, torch.tensor([[1.0, 2, 3]])).tolist() == [[3, 2, 1]]
    with pytest.raises(ModelError, match='tells contradiction, neutral, entailment apart, the data yes, no, maybe'):
        classify.in_order(model, SimpleNamespace(labels=['yes', 'no', 'maybe']), torch.zeros(1, 3))
    assert 'another order (contradiction, neutral, entailment)' in classify.name_labels(model, data.labels)
    assert classify.named(model) == data.labels and classify.name_labels(model, data.labels) is None


def test_processes_share_the_dev_split(models, folders):
    config = config_of(f'--init_from={models["bert"]}', f'--dataset={folders["bert"]}')
    model, data = hf_models.load(str(models['bert']), config, labels=2), Labelled(folders['bert'], 'val', 32)
    one, *two = (
        classify.predictions(model, data, data.evaluation(10**6, 5), 'cpu', rank, world)
        for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    assert torch.allclose(one[0], (two[0][0] + two[1][0]) / 2) and torch.equal(one[1], two[0][1]) and len(one[1]) == 24


def test_a_collapsed_model_scores_0_and_it_is_said(models, folders, tmp_path, capsys):
    data = Labelled(folders['bert'], 'val', 32)
    found, notes = classify.judged(data, torch.tensor([[0.0, 9.0]]).expand(24, 2), torch.tensor(data.targets))
    assert found['matthews'] == 0 and not notes
    data.labels, data.metrics = [], ['pearson']
    found, notes = classify.judged(data, torch.zeros(24, 1), torch.arange(24.0))
    assert found['pearson'] == 0 and 'every prediction is the same' in notes[0]


# ---- what cannot work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'words, says',
    [
        (['--init_from=scratch'], 'trains a model that knows a language: name its folder'),
        (['--coreset=random'], "coreset='random' chooses by losses of tokens"),
        (['--packing=True'], 'packing is of language models'),
        (['--sample_tokens=20'], 'sample_tokens is of language models'),
        (['--task=lm', '--best_by=metric'], "best_by='metric' is of task='classify'"),
    ],
)
def test_keys_that_do_not_go_with_the_task_are_one_sentence(models, words, says):
    config = config_of(f'--init_from={models["bert"]}', *words)
    assert any(says in problem for problem in training.problems(config)), training.problems(config)


def test_data_of_the_other_task_is_one_sentence(models, folders, data):
    with pytest.raises(Stop, match='holds examples with labels: add --task=classify'):
        training.main(config_of(f'--init_from={models["gpt2"]}', f'--dataset={folders["gpt2"]}', task='lm'))
    with pytest.raises(Stop, match=r'holds no labels, which task=.classify. learns'):
        training.main(config_of(f'--init_from={models["bert"]}', f'--dataset={data}'))
    with pytest.raises(DataError, match='was not made with the tokenizer of'):
        training.main(config_of(f'--init_from={models["bert"]}', f'--dataset={folders["roberta"]}'))


def test_a_dry_run_plans_what_a_run_holds(models, folders, tmp_path):
    words = ['train.py', *SMALL, f'--init_from={models["bert"]}', f'--dataset={folders["bert"]}', '--model_dropout=0']
    done = run([*words, f'--out_dir={tmp_path / "out"}'])
    assert done.returncode == 0, done.stderr
    assert (
        'step: 4 examples of up to 32 tokens x 1 micro-batch = 4 examples; 8 steps = 32 examples = 0.67 epochs'
        in done.stdout
    )
    assert 'data: each with a label, unacceptable, acceptable' in done.stdout
    end = dict(line.split(': ', 1) for line in done.stdout.splitlines() if ': ' in line)
    assert int(end['peak_bytes_planned']) >= int(end['peak_bytes_measured']) > 0
    dry = run([*words, '--dry_run=True'])
    assert 'dry run: nothing was trained' in dry.stdout, dry.stderr
    planned = [next(line for line in out.splitlines() if 'planned peak' in line) for out in (done.stdout, dry.stdout)]
    assert planned[0] == planned[1]


# ---- eval.py ---------------------------------------------------------------------------------------------------------


def scored(capsys, *words):
    scoring.noted.clear()
    words = [*map(str, words), '--device=cpu']
    scoring.main(configurator.load(ROOT / 'eval.py', words, scoring.problems, positional='checkpoints', several=True))
    return capsys.readouterr().out


def test_eval_says_of_a_run_what_the_run_said_and_of_each_source(models, folders, tmp_path, capsys, unplanned):
    data, out = mnli(tmp_path, models['roberta']), tmp_path / 'out'
    _, end = trained(capsys, f'--dataset={data}', f'--init_from={models["roberta"]}', f'--out_dir={out}')
    answers = tmp_path / 'answers.jsonl'
    rows = json.loads(scored(capsys, out / 'last', f'--data={data}', '--json', f'--answers={answers}'))
    assert [row['source'] for row in rows] == ['matched', 'mismatched', 'all sources']
    assert f'{rows[2]["loss"]:.4f}' == end['val_loss'] and f'{rows[2]["accuracy"]:.4f}' == end['val_accuracy']
    assert f'{rows[1]["accuracy"]:.4f}' == end['val_accuracy_mismatched'] and rows[1]['labelled'] == 15
    assert rows[0]['low'] < rows[0]['accuracy'] < rows[0]['high']
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert np.mean([one['answer'] == one['reference'] for one in written]) == pytest.approx(rows[2]['accuracy'])
    tok = tokenizer.load(data)
    assert written[0]['text'] == tok.decode(tok.hf.encode('the cat sat', 'the mat').ids) and len(written) == 30
    table = scored(capsys, f'{out}/last,{out}', f'--data={data}', '--limit=8').splitlines()
    assert table[0].split()[-6:] == ['loss', 'accuracy', '95', '%', 'interval'][-6:] or 'accuracy' in table[0]
    assert len(table) == 7 and sum('all sources' in line for line in table) == 2
    with pytest.raises(Stop, match=r'has 2 labels, .* 3: score them apart'):
        scored(capsys, out, f'--data={data},{folders["roberta"]}')
    with pytest.raises(ModelError, match='has 3 outputs, the data 2'):
        scored(capsys, out, f'--data={folders["roberta"]}')
    with pytest.raises(ModelError, match='is a classifier, which writes no text'):
        sample.load(str(out), 'cpu')
    with pytest.raises(ModelError, match='has no classifier: train one'):
        scored(capsys, models['roberta'], f'--data={data}')
    with pytest.raises(DataError, match=r'data/glue/prepare.py --task=qqp first'):
        if not (ROOT / 'data/glue/qqp').exists():
            scored(capsys, out, '--data=glue/qqp')
        raise DataError('data/glue/prepare.py --task=qqp first')
