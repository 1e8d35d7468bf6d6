"""GLUE: its files as they are, tokens as transformers makes them, batches that are functions of their number, metrics
as scikit-learn's and scipy's."""

import json
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, run

from data import DataError, agreement, common, examples, labelled, tokenizer
from data.batches import Labelled, fingerprint, load, longest_of, read_meta, trained_tokens
from data.glue import prepare as glue

TEXTS = [
    'the cat sat on the mat .', 'a dog " barked " at it', 'it did not , however , bark', 'the mat', 'cats and dogs',
    'no one saw the dog on the mat before the cat sat down on it', 'barking', 'a "quoted', 'down', 'naïve café',
]  # fmt: skip


def bert(folder):
    """A BERT's folder of few words: pieces, lower case, [CLS] a [SEP] b [SEP] with types."""
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefghijklmnopqrstuvwxyz".,']
    words += [f'##{c}' for c in 'abcdefghijklmnopqrstuvwxyz'] + ['the', 'cat', 'dog', '##s', 'bark', '##ing', 'mat']
    transformers = pytest.importorskip('transformers')
    tok = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(dict.fromkeys(words))})
    tok.save_pretrained(folder)
    return folder


def pieces(folder, specials, begin, **config):
    """The folder of a byte-level BPE of a few merges whose special tokens have the first ids."""
    import tokenizers

    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    hf.train_from_iterator(TEXTS * 3, trainer)
    hf.post_processor = begin(tokenizers, hf)
    folder.mkdir(exist_ok=True)
    hf.save(str(folder / 'tokenizer.json'))
    saved = {'tokenizer_class': 'PreTrainedTokenizerFast', **config}
    (folder / 'tokenizer_config.json').write_text(json.dumps(saved))
    return folder


def roberta(folder):
    def around(tokenizers, hf):
        return tokenizers.processors.RobertaProcessing(
            ('</s>', 2), ('<s>', 0), trim_offsets=True, add_prefix_space=False
        )

    names = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
    made = pieces(folder, names, around, pad_token='<pad>', eos_token='</s>', bos_token='<s>')
    config = {'model_type': 'roberta', 'max_position_embeddings': 40, 'pad_token_id': 1}
    (made / 'config.json').write_text(json.dumps(config))
    return made


def decoder(folder):
    def before(tokenizers, hf):
        return tokenizers.processors.TemplateProcessing('<s> $A', '<s> $A $B:1', [('<s>', 0)])

    return pieces(folder, ['<s>', '</s>'], before, eos_token='</s>', bos_token='<s>', pad_token='</s>')


KINDS = {'bert': bert, 'roberta': roberta, 'decoder': decoder}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp('tok') / name) for name, make in KINDS.items()}


def tsv(path, lines, coding='utf-8', end='\n'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((end.join('\t'.join(line) for line in lines) + end).encode(coding))
    return path


def cola(folder, n=12, dev=6):
    """A CoLA of its own: a sentence with a dog is acceptable."""
    draw = np.random.default_rng(0)
    for name, count in (('train', n), ('dev', dev)):
        lines = []
        for i in range(count):
            words = [*draw.choice(['the', 'mat', 'a', 'barking', 'it'], draw.integers(1, 9))]
            words += ['dog'] * (i % 2)
            lines.append(['x1', str(i % 2), '*' * (i % 3 == 0), ' '.join(words)])
        tsv(folder / 'CoLA' / f'{name}.tsv', lines)
    return folder


def made(name, given, out, model, **how):
    """-> (meta, drops) of a folder prepared from GLUE's own files."""
    drops = examples.Drops()
    rows = glue.local(name, str(given), drops)
    meta, _ = glue.prepare(name, rows, str(out), str(model), how.get('block_size'), 'a test', drops)
    return meta, drops


def rows_in(folder, split='train'):
    """[(source, ids, label, where the second sentence begins)] by the format's description alone."""
    meta = json.loads((folder / 'meta.json').read_text())
    ids = np.fromfile(folder / f'{split}.bin', meta['dtype'])
    ends = np.fromfile(folder / f'{split}_ends.bin', 'int64')
    labels = np.fromfile(folder / f'{split}_labels.bin', 'int64' if meta['labels'] else 'float32')
    seconds = np.fromfile(folder / f'{split}_pairs.bin', 'int64')
    sources = [s['name'] for s in meta['sources'] for _ in range(s[f'{split}_examples'])]
    starts = [0, *ends[:-1]]
    return [
        (source, ids[a:b].tolist(), label.item(), second.item())
        for source, a, b, label, second in zip(sources, starts, ends, labels, seconds, strict=True)
    ]


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('longest', [512, 9])
def test_ids_types_and_cuts_are_those_of_transformers(folders, kind, longest):
    transformers = pytest.importorskip('transformers')
    theirs, tok = transformers.AutoTokenizer.from_pretrained(folders[kind]), tokenizer.load(folders[kind])
    pairs = [(a, b) for a in TEXTS for b in (None, *TEXTS[::3])] + [('', None), ('', 'dogs'), ('dogs', '')]
    found = labelled.encode(tok, pairs, longest)
    cut = 0
    for (a, b), (ids, second, was_cut) in zip(pairs, found, strict=True):
        words = [a], None if b is None else [b]  # in lists, since alone it takes an empty second one for none
        want = theirs(*words, truncation=True, max_length=longest, return_token_type_ids=True)
        assert ids == want['input_ids'][0], (a, b)
        assert was_cut == (len(theirs(*words)['input_ids'][0]) > longest)
        cut += was_cut
        if kind == 'bert':
            assert [int(i >= second) for i in range(len(ids))] == want['token_type_ids'][0]
        sequences = want.sequence_ids(0)
        assert second == (sequences.index(1) if 1 in sequences else len(ids)) or not b
    assert (cut > 10) == (longest == 9)


def test_the_name_of_a_special_token_in_a_sentence_is_plain_text(folders):
    tok = tokenizer.load(folders['roberta'])
    ((ids, _, _),) = labelled.encode(tok, [('the </s> mat', None)], 64)
    assert ids.count(2) == 1 and ids[-1] == 2


def test_rows_are_filled_with_the_models_own_pad_id_and_are_as_long_as_it_reads(folders, tmp_path):
    pads = {name: labelled.pad_of(tokenizer.load(folder), str(folder)) for name, folder in folders.items()}
    assert pads == {'bert': 0, 'roberta': 1, 'decoder': 1}
    assert [labelled.room(str(folders[name])) for name in ('roberta', 'decoder')] == [38, 512]
    with pytest.raises(DataError, match='--block_size=64 is more than the model reads: use 38'):
        made('cola', cola(tmp_path), tmp_path / 'out', folders['roberta'], block_size=64)
    with pytest.raises(DataError, match='name a model'):
        labelled.encode(tokenizer.Bytes(), [('a', 'b')], 8)


def test_a_name_on_the_hub_is_fetched_without_weights_and_old_files_are_refused_with_what_to_type(
    folders, tmp_path, monkeypatch
):
    import huggingface_hub

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == 'some/where':
            raise OSError('no network')
        return str(folders['bert'])

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
    meta, _ = made('cola', cola(tmp_path), tmp_path / 'out', 'google-bert/bert-tiny')
    assert asked[0][0] == 'google-bert/bert-tiny' and not any('safetensors' in kind for kind in asked[0][1])
    assert meta['pad'] == 0 and meta['vocab_size'] < 100
    with pytest.raises(DataError, match=r'hub did not give it \(no network\)'):
        common.model_folder('some/where')
    assert common.model_folder('bytes') == 'bytes' and common.model_folder(str(folders['bert'])) == str(folders['bert'])
    (tmp_path / 'old').mkdir()
    (tmp_path / 'old/spm.model').write_text('')
    with pytest.raises(DataError, match=r'AutoTokenizer.from_pretrained.* writes it to a FOLDER'):
        common.model_folder(str(tmp_path / 'old'))


# ---- files -----------------------------------------------------------------------------------------------------------

HEADS = {
    'SST-2': ['sentence', 'label'],
    'RTE': ['index', 'sentence1', 'sentence2', 'label'],
    'QNLI': ['index', 'question', 'sentence', 'label'],
    'MRPC': ['Quality', '#1 ID', '#2 ID', '#1 String', '#2 String'],
    'QQP': ['id', 'qid1', 'qid2', 'question1', 'question2', 'is_duplicate'],
    'STS-B': [
        'index',
        'genre',
        'filename',
        'year',
        'old_index',
        'source1',
        'source2',
        'sentence1',
        'sentence2',
        'score',
    ],
    'MNLI': ['index', 'promptID', 'pairID', 'genre', *[f'parse{i}' for i in range(4)], 'sentence1', 'sentence2'],
}


def dev_and_train(folder, name, lines, dev=None, **how):
    for split, some in (('train', lines), ('dev', dev or lines[:2])):
        tsv(folder / name / f'{split}.tsv', [HEADS[name], *some], **how)
    return folder


def test_cola_has_no_header_and_its_last_line_needs_no_newline(folders, tmp_path):
    given = cola(tmp_path)
    path = given / 'CoLA/dev.tsv'
    path.write_bytes(path.read_bytes().rstrip(b'\n'))
    meta, _ = made('cola', given / 'CoLA', tmp_path / 'out', folders['bert'])  # the task's own folder is named
    assert (meta['train_examples'], meta['val_examples']) == (12, 6)
    assert meta['labels'] == ['unacceptable', 'acceptable'] and meta['metrics'] == ['matthews']
    assert [label for _, _, label, _ in rows_in(tmp_path / 'out')] == [0, 1] * 6
    tok = tokenizer.load(tmp_path / 'out')
    first = (given / 'CoLA/train.tsv').read_text().split('\n')[1].split('\t')
    assert tok.decode(rows_in(tmp_path / 'out')[1][1]) == f'[CLS] {first[3]} [SEP]'


@pytest.mark.parametrize('coding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_quotes_are_none_a_mark_of_byte_order_is_no_text_and_columns_are_found_by_name(folders, tmp_path, coding):
    lines = [
        ['1', '11', '12', 'a "quoted', 'the mat'],
        ['0', '13', '14', '"the cat sat ""down"""', 'dogs"'],
        ['1', '15', '16', 'a\u2028b\x0bc', 'two breaks that end no line'],
    ]
    made('mrpc', dev_and_train(tmp_path, 'MRPC', lines, coding=coding), tmp_path / 'out', folders['roberta'])
    found, tok = rows_in(tmp_path / 'out'), tokenizer.load(tmp_path / 'out')
    assert [label for _, _, label, _ in found] == [1, 0, 1]
    for (_, ids, _, second), line in zip(found, lines):
        assert tok.decode(ids) == f'<s>{line[3]}</s></s>{line[4]}</s>'
        assert tok.decode(ids[second:]) == f'{line[4]}</s>'


def test_short_and_long_lines_are_left_out_and_counted_with_the_first_place(folders, tmp_path):
    good = [[str(i), '1', '2', f'the cat {i}', f'a cat {i}', str(i % 2)] for i in range(60)]
    lines = [*good, ['7', '1', '2', 'broken'], *good, ['8', '1'], ['9', '1', '2', 'a', 'tab', 'in it', '1']]
    meta, drops = made('qqp', dev_and_train(tmp_path, 'QQP', lines, good), tmp_path / 'out', folders['bert'])
    assert meta['train_examples'] == 120 and meta['dropped'] == 3
    few, many = drops.lines()
    assert few.startswith('2 dropped: a line with too few columns') and 'train.tsv:62)' in few
    assert many.startswith('1 dropped: a line with too many')
    assert meta['metrics'] == ['f1', 'accuracy']
    for i in range(40):
        lines.append([str(i)])
    with pytest.raises(DataError, match='43 of 164 lines have not the 6 columns of QQP'):
        made('qqp', dev_and_train(tmp_path, 'QQP', lines, good), tmp_path / 'out', folders['bert'])


def test_stsb_has_scores_and_refuses_others(folders, tmp_path):
    line = ['0', 'g', 'f', 'y', 'o', 's', 's', 'the cat', 'a cat']
    given = dev_and_train(tmp_path, 'STS-B', [[*line, '2.5'], [*line, '0'], [*line, '5.000']])
    meta, _ = made('stsb', given, tmp_path / 'out', folders['decoder'])
    assert meta['labels'] == [] and [label for _, _, label, _ in rows_in(tmp_path / 'out')] == [2.5, 0, 5]
    x, y, *_ = load(str(tmp_path / 'out'), 'train', 64).batch(1, 0, 2)
    assert y.dtype == torch.float32 and x.dtype == torch.int64
    for wrong in ('5.1', 'nan', '-1', 'x', ''):
        given = dev_and_train(tmp_path, 'STS-B', [[*line, '1'], [*line, wrong]])
        with pytest.raises(DataError, match=r'train.tsv:3: the label is .*, not a number from 0 to 5'):
            made('stsb', given, tmp_path / 'out', folders['decoder'])


def test_mnli_has_two_dev_splits_its_label_last_and_lines_of_different_widths(folders, tmp_path):
    line = [*'01234567', 'the cat sat', 'a cat']
    labels = ['entailment', 'neutral', 'contradiction', '-']
    tsv(tmp_path / 'MNLI/train.tsv', [[*HEADS['MNLI'], 'label1', 'gold_label'], *([*line, 'x', l] for l in labels)])
    for kind, some in (('matched', labels[1:3]), ('mismatched', labels[:1])):
        head = [*HEADS['MNLI'], *[f'label{i}' for i in range(5)], 'gold_label']
        tsv(tmp_path / f'MNLI/dev_{kind}.tsv', [head, *([*line, *'01234', l] for l in some)])
    meta, drops = made('mnli', tmp_path, tmp_path / 'out', folders['roberta'])
    assert [(s, l) for s, _, l, _ in rows_in(tmp_path / 'out')] == [('matched', i) for i in range(3)]
    assert [(s, l) for s, _, l, _ in rows_in(tmp_path / 'out', 'val')] == [
        ('matched', 1),
        ('matched', 2),
        ('mismatched', 0),
    ]
    assert meta['dropped'] == 1 and 'no label (-)' in next(drops.lines())
    data = load(str(tmp_path / 'out'), 'val', 32)
    assert data.sources == ['matched', 'mismatched']
    assert sorted(s for *_, sources, _, _ in data.evaluation(999, 2) for s in sources.tolist()) == [0, 0, 1]


def test_mrpc_is_cut_by_its_list_of_ids_when_it_comes_from_microsoft(folders, tmp_path):
    lines = [[str(i % 2), str(i), str(i + 100), f'the cat {i}', 'a cat'] for i in range(6)]
    tsv(tmp_path / 'MRPC/msr_paraphrase_train.txt', [HEADS['MRPC'], *lines], 'utf-8-sig', '\r\n')
    with pytest.raises(DataError, match=r'without mrpc_dev_ids\.tsv'):
        made('mrpc', tmp_path, tmp_path / 'out', folders['bert'])
    tsv(tmp_path / 'MRPC/mrpc_dev_ids.tsv', [['1', '101'], ['4', '104'], ['5', '999']])
    made('mrpc', tmp_path, tmp_path / 'out', folders['bert'])
    assert [len(rows_in(tmp_path / 'out', split)) for split in ('train', 'val')] == [4, 2]


def others(folder):
    """Files that are not what they are taken for."""
    sentences = [['it is', '1'], ['it is not', '0']]
    return {
        'rte as cola': ('cola', tsv(folder / '1/CoLA/train.tsv', [HEADS['RTE'], ['0', 'a', 'b', 'entailment']])),
        'cola as rte': ('rte', tsv(folder / '2/RTE/train.tsv', [['x', '1', '', 'a b'], ['x', '0', '*', 'b']])),
        'qnli as rte': ('rte', tsv(folder / '3/RTE/train.tsv', [HEADS['QNLI'], ['0', 'a', 'b', 'entailment']])),
        'wnli as rte': ('rte', tsv(folder / '4/RTE/train.tsv', [HEADS['RTE'], ['0', 'a', 'b', '1']])),
        'no header': ('sst2', tsv(folder / '5/SST-2/train.tsv', sentences)),
        'test': ('sst2', tsv(folder / '6/SST-2/train.tsv', [['index', 'sentence'], ['0', 'it is']])),
        'not text': ('sst2', tsv(folder / '7/SST-2/train.tsv', [['\0' * 40]])),
        'latin1': ('sst2', tsv(folder / '8/SST-2/train.tsv', [['sentence', 'label'], ['caf\xe9', '1']], 'latin1')),
    }


SAYS = {
    'rte as cola': "CoLA/train.tsv:1: the label is 'sentence1', not 0 or 1: is this a file of CoLA",
    'cola as rte': "RTE/train.tsv is no file of RTE with labels: its first line has no column 'sentence1'",
    'qnli as rte': "no column 'sentence1', it is 'index question sentence label'",
    'wnli as rte': "train.tsv:2: the label is '1', not entailment or not_entailment",
    'no header': "no column 'sentence', it is 'it is 1': name the folder of SST-2 as GLUE has it, header included",
    'test': "no column 'label'",
    'not text': 'is not text',
    'latin1': 'is not UTF-8',
}


@pytest.mark.parametrize('what', SAYS)
def test_a_wrong_file_is_refused_in_a_sentence_and_the_folder_stays_as_it_was(folders, tmp_path, what):
    made('cola', cola(tmp_path / 'good'), tmp_path / 'out', folders['bert'])
    before = fingerprint(str(tmp_path / 'out'))
    name, path = others(tmp_path)[what]
    (path.parent / 'dev.tsv').write_bytes(path.read_bytes())
    with pytest.raises(DataError) as error:
        made(name, path.parent.parent, tmp_path / 'out', folders['bert'])
    assert SAYS[what] in str(error.value) and '\n' not in str(error.value)
    assert fingerprint(str(tmp_path / 'out')) == before


def test_the_command_prints_an_example_and_a_table_and_says_what_is_missing(folders, tmp_path):
    given, out = cola(tmp_path, 40), tmp_path / 'out'
    words = ['data/glue/prepare.py', '--task=cola', f'--tokenizer={folders["bert"]}', f'--out_dir={out}']
    done = run([*words, f'--input={given}', '--block_size=8'])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2].startswith('[CLS] ') and lines[3] == '-> unacceptable'
    table = next(line for line in lines if line.startswith('train, cola'))
    assert table.split()[2] == '40' and table.endswith('unacceptable 50%, acceptable 50%') and ' 8 ' in table
    meta = read_meta(str(out))
    assert f'{meta["truncated"]} cut to 8 tokens' in lines and meta['truncated'] > 0 and 'metrics: matthews' in lines
    assert meta['longest'] == 8 == longest_of(str(out)) and meta['glue'] == 'cola'
    done = run([*words, f'--input={tmp_path / "nowhere"}'])
    assert done.returncode == 1 and done.stderr.strip().endswith(
        "is no folder: name GLUE's folder, or that of the task"
    )
    (given / 'CoLA/dev.tsv').unlink()
    done = run([*words, f'--input={given}'])
    assert 'dev.tsv does not exist' in done.stderr and 'Traceback' not in done.stderr


def test_without_local_files_the_hub_is_asked_for_glue(folders, tmp_path, monkeypatch):
    asked = []

    def from_hub(script, name, config, split):
        asked.append((script, name, config, split))
        yield from ({'premise': f'the cat {i}', 'hypothesis': 'a cat', 'label': i % 3, 'idx': i} for i in range(4))

    monkeypatch.setattr(examples, 'from_hub', from_hub)
    drops = examples.Drops()
    meta, _ = glue.prepare('mnli', glue.from_hub('mnli'), str(tmp_path), str(folders['bert']), None, 'a test', drops)
    splits = ('train', 'validation_matched', 'validation_mismatched')
    assert asked == [('glue', 'nyu-mll/glue', 'mnli', split) for split in splits]
    assert [(s['name'], s['train_examples'], s['val_examples']) for s in meta['sources']] == [
        ('matched', 4, 4),
        ('mismatched', 0, 4),
    ]
    with pytest.raises(DataError, match='mnli train 1 is not in the format of GLUE: it lacks sentence1'):
        monkeypatch.setitem(glue.TASKS, 'mnli', glue.TASKS['rte'])
        next(glue.from_hub('mnli'))


def test_where_a_task_is_not_prepared_yet_its_command_is_named():
    from plumbing.build import data_folder

    config = type('', (), dict(dataset='glue/never_prepared'))
    with pytest.raises(DataError, match=r'data/glue/prepare.py --task=never_prepared first'):
        read_meta(data_folder(config))
    config.dataset = 'glu/cola'
    with pytest.raises(DataError, match='no data set glu/cola'):
        data_folder(config)


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(folders, tmp_path):
    lines = [[str(i), ' '.join(TEXTS[: 1 + i % 7]), TEXTS[i % 10], f'{"not_" * (i % 2)}entailment'] for i in range(70)]
    made('rte', dev_and_train(tmp_path, 'RTE', lines, lines[:9]), tmp_path / 'out', folders['bert'])
    return tmp_path / 'out'


def test_an_epoch_holds_every_example_once_with_its_label_its_length_and_its_types(prepared):
    data, found = Labelled(str(prepared), 'train', 512), []
    for t in range(35):
        x, y, sources, lengths, types = data.batch(3, t, 2)
        assert x.shape == types.shape == (2, lengths.max()) and sources.tolist() == [0, 0]
        assert trained_tokens([(x, y)]) == 2 and trained_tokens([(x, y, torch.tensor([0.5, 2.0]))]) == 2.5
        for row, label, n, marks in zip(x, y, lengths, types):
            assert not row[n:].any() and not marks[n:].any()
            assert marks[:n].tolist() == sorted(marks[:n].tolist())
            found.append((row[:n].tolist(), label.item(), int(n - marks.sum())))
    assert sorted(found) == sorted(row[1:] for row in rows_in(prepared))
    assert len(data.ends) == 70 == data.windows and data.tokens_a_row() == len(data.tokens) / 70


def test_a_batch_is_a_function_of_its_number_processes_share_them_and_neighbours_are_of_like_lengths(prepared):
    one, other = (Labelled(str(prepared), 'train', 512) for _ in range(2))
    for t in (0, 9, 3, 3, 50):
        assert all(torch.equal(a, b) for a, b in zip(one.batch(2, t, 4), other.batch(2, t, 4), strict=True))
    for rank in (0, 1):
        shared, single = one.batch(2, 5, 2, rank, 2), other.batch(2, 2 * 5 + rank, 2)
        assert all(torch.equal(a, b) for a, b in zip(shared, single, strict=True))
    other.skip = 12  # another batch size from row 12 on: none is read twice or left out
    rows = [row[row > 0].tolist() for t in range(6, 12) for row in one.batch(2, t, 2)[0]]
    assert rows == [row[row > 0].tolist() for t in range(3) for row in other.batch(2, t, 4)[0]]
    padded = np.mean([1 - lengths.sum() / x.numel() for x, _, _, lengths, _ in (one.batch(1, t, 2) for t in range(35))])
    shuffled = np.random.default_rng(0).permutation(one.lengths).reshape(-1, 2)
    assert padded < 0.5 * (1 - shuffled.sum() / (2 * shuffled.max(1).sum()))


def test_broken_files_are_one_sentence(prepared):
    for name, content, says in (
        ('train_labels', np.full(70, 2), 'holds labels that meta.json does not name'),
        ('train_labels', np.full(69, 1), 'meta.json says 70'),
        ('train_pairs', np.full(70, 500), 'places beyond the ends'),
        ('train', np.full(read_meta(str(prepared))['train_tokens'], 60000, 'uint16'), 'beyond the vocabulary'),
    ):
        path = prepared / f'{name}.bin'
        good, was = path.read_bytes(), fingerprint(str(prepared))
        content.tofile(path)
        assert fingerprint(str(prepared)) != was
        with pytest.raises(DataError, match=says):
            Labelled(str(prepared), 'train', 512).batch(1, 0, 4)
        path.write_bytes(good)
    with pytest.raises(DataError, match='do not fit block_size=8: use --block_size='):
        Labelled(str(prepared), 'train', 8)


def test_data_of_another_kind_prepared_later_leaves_nothing(prepared):
    (prepared.parent / 'text.txt').write_text('some text\n' * 99)
    done = run(
        [
            'data/text/prepare.py',
            f'--input={prepared.parent / "text.txt"}',
            '--tokenizer=bytes',
            f'--out_dir={prepared}',
        ]
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in prepared.iterdir()) == ['meta.json', 'train.bin', 'val.bin']


# ---- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('n', [1, 2, 50])
@pytest.mark.parametrize('predicted', ['random', 'all 0', 'all 1', 'right', 'wrong'])
def test_accuracy_f1_and_matthews_are_scikit_learns(n, predicted):
    sk = pytest.importorskip('sklearn.metrics')
    draw = np.random.default_rng(n)
    labels = draw.integers(0, 2, n)
    made_up = {'random': draw.integers(0, 2, n), 'all 0': 0 * labels, 'all 1': 0 * labels + 1, 'right': labels}
    p = made_up.get(predicted, 1 - labels)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found, notes = agreement.scores(('accuracy', 'f1', 'matthews'), p, labels)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # it warns of a single label
        want = sk.accuracy_score(labels, p), sk.f1_score(labels, p, zero_division=0), sk.matthews_corrcoef(labels, p)
    assert [*found.values()] == pytest.approx(want, abs=1e-12) and not notes
    if predicted.startswith('all'):
        assert found['matthews'] == 0
    assert found['f1'] == 0 or predicted != 'all 0'


def test_three_classes_have_an_accuracy():
    found, _ = agreement.scores(('accuracy', 'matthews'), [0, 1, 2, 2], [0, 2, 2, 1])
    assert found['accuracy'] == 0.5


def test_correlations_are_scipys_and_0_with_a_sentence_where_they_are_not_defined():
    stats = pytest.importorskip('scipy.stats')
    draw = np.random.default_rng(0)
    labels = draw.random(40).round(1) * 5  # with ties
    p = labels + draw.normal(size=40)
    found, notes = agreement.scores(('pearson', 'spearman'), p, labels)
    assert [*found.values()] == pytest.approx([stats.pearsonr(p, labels)[0], stats.spearmanr(p, labels)[0]], abs=1e-12)
    assert not notes
    for predicted, truth, what in (
        (np.full(40, 2.5), labels, 'prediction'),
        (p, np.ones(40), 'label'),
        ([1], [2], 'pre'),
    ):
        found, notes = agreement.scores(('pearson', 'spearman'), predicted, truth)
        assert found == {'pearson': 0.0, 'spearman': 0.0}
        assert len(notes) == 2 and f'pearson is not defined, since every {what}' in notes[0]


def test_a_library_that_is_missing_is_named_with_what_to_type(monkeypatch):
    monkeypatch.setattr(agreement.importlib.util, 'find_spec', lambda name: None if name == 'scipy' else name)
    with pytest.raises(DataError, match=r'metrics need scipy: pip install -r requirements-extra\.txt'):
        agreement.check()


def test_what_prepare_scripts_share_is_known_to_glue():
    assert {f'{split}_{kind}.bin' for split in common.SPLITS for kind in ('labels', 'pairs')} <= {*common.MAY_BE_LEFT}
    assert (ROOT / 'data/glue/prepare.py').exists()
