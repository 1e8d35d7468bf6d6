"""What the prepare.py scripts promise: the format, determinism, one-sentence errors, no half-written data."""

import bz2
import gzip
import hashlib
import itertools
import json
import lzma
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data import DataError, common, tokenizer
from data import files as files_of
from data.c4 import prepare as c4
from data.pystdlib import prepare as pystdlib
from data.shakespeare import prepare as shakespeare
from data.sitepackages import prepare as sitepackages
from data.text import prepare as text_data

ROOT = Path(__file__).resolve().parent.parent


def run(name, *args, cwd=None):
    command = [sys.executable, str(ROOT / 'data' / name / 'prepare.py'), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


def read(folder):
    meta = json.loads((folder / 'meta.json').read_text())
    return meta, {split: np.fromfile(folder / f'{split}.bin', meta['dtype']) for split in common.SPLITS}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_format(folder):
    """Sizes, sums, and every source one contiguous range of whole documents. Returns {(source, split): [texts]}."""
    meta, ids = read(folder)
    tok = tokenizer.load(folder)
    assert meta['format'] == 1
    assert meta['vocab_size'] == tok.vocab_size
    assert meta['dtype'] == ('uint16' if tok.vocab_size <= 65536 else 'uint32')
    assert not list(folder.glob('.preparing-*'))
    texts = {}
    for split in common.SPLITS:
        assert len(ids[split]) == meta[f'{split}_tokens'] == sum(s[f'{split}_tokens'] for s in meta['sources']) > 0
        begin = 0
        for source in meta['sources']:
            part = ids[split][begin : begin + source[f'{split}_tokens']]
            begin += len(part)
            ends = np.flatnonzero(part == tok.eot)
            assert len(ends) == source[f'{split}_documents']
            assert len(part) == 0 or ends[-1] == len(part) - 1
            bounds = [0, *(ends + 1)]
            texts[source['name'], split] = [tok.decode(part[a : b - 1].tolist()) for a, b in itertools.pairwise(bounds)]
        size = sum(len(t.encode()) for (_, s), all_texts in texts.items() if s == split for t in all_texts)
        assert size == meta[f'{split}_bytes']
    return texts


@pytest.fixture
def library(tmp_path):
    """A small standard library: modules, two packages, and what must be skipped."""
    root = tmp_path / 'lib'
    for n in range(40):
        for folder in ('', 'alpha', 'beta/inner', 'test', 'alpha/tests', 'site-packages/x', '__pycache__'):
            path = root / folder / f'file{n}.py'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'# {folder or "top"} {n}\ndef function_{n}(argument):\n    return argument + {n}\n')
    (root / 'alpha' / 'latin.py').write_bytes('# coding: latin-1\n# é'.encode('latin-1'))
    (root / 'alpha' / 'notes.txt').write_text('not python')
    return root


@pytest.fixture
def prepared(tmp_path):
    """A folder prepared earlier, that a failing run must leave alone."""
    folder = tmp_path / 'prepared'
    with common.Writer(folder, tokenizer.Bytes(), 'earlier') as out:
        out.add('old', 'train', 'old train')
        out.add('old', 'val', 'old val')
    return folder


# ---- the writer


def test_documents_are_grouped_by_source_however_they_arrive(tmp_path, monkeypatch):
    monkeypatch.setattr(common, 'BATCH_CHARACTERS', 10)  # many flushes
    with common.Writer(tmp_path, tokenizer.Bytes(), 'test') as out:
        for n in range(9):
            out.add(f's{n % 3}', 'val' if n > 5 else 'train', f'text {n} é')
        out.add('s0', 'train', '')  # nothing to write
    assert check_format(tmp_path) == {
        ('s0', 'train'): ['text 0 é', 'text 3 é'],
        ('s1', 'train'): ['text 1 é', 'text 4 é'],
        ('s2', 'train'): ['text 2 é', 'text 5 é'],
        ('s0', 'val'): ['text 6 é'],
        ('s1', 'val'): ['text 7 é'],
        ('s2', 'val'): ['text 8 é'],
    }


def test_the_bytes_on_disk_are_little_endian_and_end_each_document(tmp_path):
    with common.Writer(tmp_path, tokenizer.Bytes(), 'test') as out:
        out.add('s', 'train', 'ab')
        out.add('s', 'val', 'c')
    assert (tmp_path / 'train.bin').read_bytes() == bytes([97, 0, 98, 0, 0, 1])  # 256 = 00 01
    assert (tmp_path / 'val.bin').read_bytes() == bytes([99, 0, 0, 1])


def test_the_checksum_is_of_both_files_whatever_order_the_documents_came_in(tmp_path):
    for order in (1, -1):
        with common.Writer(tmp_path, tokenizer.Bytes(), 'test') as out:
            for source, split, text in [('s', 'train', 'ab'), ('s', 'val', 'c'), ('t', 'val', 'd')][::order]:
                out.add(source, split, text)
        both = (tmp_path / 'train.bin').read_bytes() + (tmp_path / 'val.bin').read_bytes()
        assert read(tmp_path)[0]['checksum'] == hashlib.blake2b(both, digest_size=8).hexdigest()


@pytest.mark.parametrize(('vocab_size', 'dtype'), [(65536, 'uint16'), (65537, 'uint32')])
def test_ids_that_do_not_fit_16_bits_are_written_in_32(tmp_path, vocab_size, dtype):
    class Wide(tokenizer.Bytes):
        eot = vocab_size - 1

    Wide.vocab_size = vocab_size
    with common.Writer(tmp_path, Wide(), 'test') as out:
        out.add('s', 'train', 'ab')
        out.add('s', 'val', 'c')
    meta, ids = read(tmp_path)
    assert meta['dtype'] == dtype
    assert ids['train'].tolist() == [97, 98, vocab_size - 1]


def test_a_long_document_is_encoded_in_pieces_with_the_same_ids(tmp_path, monkeypatch):
    text = ''.join(f'def f{n}(x):\n    return x\n\n\nz = "é"\r\n' for n in range(300))
    tok = tokenizer.train_bpe([text], 300)
    monkeypatch.setattr(common, 'PIECE_CHARACTERS', 50)
    pieces = [piece for piece, _ in common.cut(text)]
    assert len(pieces) > 100
    assert ''.join(pieces) == text
    assert [i for ids in tok.encode_batch(pieces) for i in ids] == tok.encode(text)
    with common.Writer(tmp_path, tok, 'test') as out:
        out.add('s', 'train', text)
        out.add('s', 'val', text)
    assert check_format(tmp_path) == {('s', 'train'): [text], ('s', 'val'): [text]}


def spaced(bos):
    """A tokenizer of pieces as SentencePiece's, with a space before each text, and <s> if its file asks for that."""
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='<unk>', byte_fallback=True))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace('\u2581', 'first', split=False)
    special = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), '\u2581', 'a', 'b', '\u2581a', 'ab']
    vocabulary = {token: i for i, token in enumerate(special)}
    hf.model = tokenizers.models.BPE(vocabulary, [('\u2581', 'a'), ('a', 'b')], unk_token='<unk>', byte_fallback=True)
    hf.add_special_tokens(['<unk>', '<s>', '</s>'])
    if bos:
        hf.post_processor = tokenizers.processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    return hf


@pytest.mark.parametrize('bos', [[], [1]])
def test_what_stands_before_a_text_stands_before_each_document_and_not_before_its_pieces(tmp_path, monkeypatch, bos):
    hf = spaced(bos)
    hf.save(str(tmp_path / 'tokenizer.json'))
    text = 'ab a\n\nb ab\n' * 20 + 'a'
    monkeypatch.setattr(common, 'PIECE_CHARACTERS', 15)
    with common.Writer(tmp_path / 'out', tokenizer.load(tmp_path), 'test') as out:
        for split in ('train', 'train', 'val'):
            out.add('s', split, text)
    document = [*hf.encode(text).ids, 2]  # with <s> before it, where the file asks for that
    assert document[: len(bos)] == bos and document.count(1) == len(bos)
    ids = read(tmp_path / 'out')[1]
    assert ids['train'].tolist() == document * 2 and ids['val'].tolist() == document


def test_limits_take_whole_documents_until_they_are_reached(tmp_path):
    with common.Writer(tmp_path, tokenizer.Bytes(), 'test', limits={'train': 25, 'val': 1}) as out:
        for n in range(9):
            out.add('s', 'train', f'train   {n}')  # 10 tokens each with the end of text
            out.add('s', 'val', f'val {n}')
    assert check_format(tmp_path) == {
        ('s', 'train'): ['train   0', 'train   1', 'train   2'],
        ('s', 'val'): ['val 0'],
    }


def test_a_crash_in_the_middle_leaves_the_old_folder_intact(prepared, monkeypatch):
    before = files(prepared)
    monkeypatch.setattr(common, 'BATCH_CHARACTERS', 10)
    with pytest.raises(ZeroDivisionError), common.Writer(prepared, tokenizer.Bytes(), 'test') as out:
        out.add('new', 'train', 'new text, long enough to be flushed')
        out.add('new', 'val', 'new text')
        raise ZeroDivisionError
    assert files(prepared) == before


@pytest.mark.parametrize('survive', [0, 1, 2])
def test_a_crash_while_replacing_never_leaves_a_folder_that_looks_complete(prepared, monkeypatch, survive):
    replaced, real = [], os.replace

    def fails(source, target):
        if len(replaced) == survive:
            raise ZeroDivisionError
        replaced.append(target)
        real(source, target)

    monkeypatch.setattr(os, 'replace', fails)
    with pytest.raises(ZeroDivisionError), common.Writer(prepared, tokenizer.Bytes(), 'test') as out:
        out.add('new', 'train', 'new text')
        out.add('new', 'val', 'new text')
    assert not (prepared / 'meta.json').exists()


def test_what_a_killed_one_left_is_cleared_by_the_next_and_what_a_living_one_writes_is_not(prepared):
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from data import common, tokenizer
common.Writer({str(prepared)!r}, tokenizer.Bytes(), 'killed').__enter__().add('s', 'train', 'text')
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == -9
    (left,) = prepared.glob('.preparing-*')
    with common.Writer(prepared, tokenizer.Bytes(), 'living') as out:
        out.add('s', 'train', 'train')
        out.add('s', 'val', 'val')
        assert not left.exists() and out.work.exists()
        with pytest.raises(RuntimeError), common.Writer(prepared, tokenizer.Bytes(), 'beside it') as other:
            assert out.work.exists() and other.work.exists()
            raise RuntimeError
    assert not list(prepared.glob('.preparing-*')) and read(prepared)[0]['made_by'] == 'living'


def test_a_new_kind_of_tokenizer_leaves_no_old_tokenizer_json(tmp_path):
    for tok in (tokenizer.train_bpe(['a b a b'], 300), tokenizer.Bytes()):
        with common.Writer(tmp_path, tok, 'test') as out:
            out.add('s', 'train', 'a')
            out.add('s', 'val', 'b')
        check_format(tmp_path)
    assert sorted(files(tmp_path)) == ['meta.json', 'train.bin', 'val.bin']


def test_the_split_of_a_name_is_fixed_for_ever():
    # Worked by hand: sha256('0') begins with 5feceb66, and 0x5feceb66 / 2**32 = 0.3747.
    assert common.split_of('0', 0.38) == 'val'
    assert common.split_of('0', 0.37) == 'train'
    share = sum(common.split_of(str(n), 0.05) == 'val' for n in range(10_000)) / 10_000
    assert abs(share - 0.05) < 0.01


# ---- pystdlib


def test_pystdlib_is_byte_identical_twice_and_skips_tests(library, tmp_path):
    for name in ('one', 'two'):
        pystdlib.prepare(tmp_path / name, vocab_size=300, root=library)
    assert files(tmp_path / 'one') == files(tmp_path / 'two')
    texts = check_format(tmp_path / 'one')
    assert {source for source, _ in texts} == {'modules', 'alpha', 'beta'}
    assert sum(map(len, texts.values())) == 120
    meta, _ = read(tmp_path / 'one')
    assert meta['sources'][0]['name'] == 'modules'
    assert meta['skipped_not_utf8'] == 1
    assert texts['modules', 'train'][0] in [path.read_text() for path in library.glob('*.py')]


def test_pystdlib_works_from_the_command_line_anywhere(tmp_path):
    # The real library with bytes, which need no training: fast.
    done = run('pystdlib', '--tokenizer=bytes', f'--out_dir={tmp_path / "out"}', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    meta, ids = read(tmp_path / 'out')
    assert f'train_tokens: {meta["train_tokens"]}' in done.stdout
    assert meta['train_tokens'] > 3_000_000
    assert 0.02 < meta['val_tokens'] / meta['train_tokens'] < 0.15
    first = ids['train'][: np.flatnonzero(ids['train'] == 256)[0]].tolist()
    texts = (p.read_text(encoding='utf-8') for _, _, p in pystdlib.find(Path(os.__file__).parent))
    assert tokenizer.load(tmp_path / 'out').decode(first) in texts


def test_sitepackages_reads_each_text_once_and_names_its_own_command(library, tmp_path, capsys, monkeypatch):
    (library / 'gamma').mkdir()
    for name in ('vendored.py', 'again.py'):
        (library / 'gamma' / name).write_text('x = "the same in two places"\n')
    monkeypatch.setattr(sysconfig, 'get_paths', lambda: {'purelib': str(library)})
    monkeypatch.setattr(sys, 'argv', ['prepare.py', f'--out_dir={tmp_path / "out"}', '--tokenizer=bytes'])
    sitepackages.main()
    assert 'skipped_copies: ' in capsys.readouterr().out
    texts = [text for some in check_format(tmp_path / 'out').values() for text in some]
    assert len(texts) == len(set(texts)) and 'x = "the same in two places"\n' in texts
    meta, _ = read(tmp_path / 'out')
    assert meta['made_by'].startswith('python data/sitepackages/prepare.py')
    assert meta['skipped_copies'] >= 1


# ---- c4


def c4_file(path, n=200, key='text'):
    rows = [
        {key: f'Web page number {i}.\nIt says é.', 'timestamp': '2019-04-25T12:57:54Z', 'url': f'http://{i}'}
        for i in range(n)
    ]
    data = '\n'.join(map(json.dumps, rows)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
    return path


@pytest.fixture
def hub_tokenizer(tmp_path):
    """A folder as one downloads it from the hub: tokenizer.json, and the end-of-text token's name in another file."""
    folder = tmp_path / 'downloaded'
    folder.mkdir()
    text = tokenizer.train_bpe(['web page'], 257).json.replace('<|endoftext|>', '</s>')
    (folder / 'tokenizer.json').write_text(text)
    (folder / 'tokenizer_config.json').write_text('{"eos_token": "</s>"}')
    return folder


def test_c4_reads_a_local_gz_file_with_a_published_tokenizer(tmp_path, hub_tokenizer):
    path, out = c4_file(tmp_path / 'c4.json.gz'), tmp_path / 'out'
    done = run(
        'c4', f'--input={path}', f'--tokenizer={hub_tokenizer}', '--tokens=2e3', '--val_tokens=100', f'--out_dir={out}'
    )
    assert done.returncode == 0, done.stderr
    texts = check_format(out)
    meta, _ = read(out)
    assert meta['tokenizer'] == 'hf'
    assert (out / 'tokenizer.json').read_bytes() == (hub_tokenizer / 'tokenizer.json').read_bytes()
    assert 2000 <= meta['train_tokens'] < 2040  # whole documents: at most one page more
    assert 100 <= meta['val_tokens'] < 140
    assert texts['c4', 'train'][0].startswith('Web page number ')
    assert all(common.split_of(t, 0.05) == split for (_, split), all_texts in texts.items() for t in all_texts)


def test_c4_takes_all_there_is_of_a_plain_file(tmp_path):
    path = c4_file(tmp_path / 'c4.jsonl')
    meta = c4.prepare(tmp_path / 'out', 'bytes', inputs=[str(path)])
    assert sum(meta['sources'][0][f'{split}_documents'] for split in common.SPLITS) == 200
    check_format(tmp_path / 'out')


def test_c4_says_what_is_wrong_with_a_file(tmp_path, prepared):
    before = files(prepared)
    broken = tmp_path / 'broken.jsonl'
    broken.write_text('{"text": "a"}\n{"text": \n')
    for path, says in (
        (c4_file(tmp_path / 'key.jsonl', key='content'), 'needs a "text"'),
        (broken, 'could not read'),
        (tmp_path / 'none.json.gz', 'is not a file'),
    ):
        with pytest.raises(common.DataError, match=says):
            c4.prepare(prepared, 'bytes', inputs=[str(path)])
    assert files(prepared) == before


@pytest.mark.parametrize('tokens', ['inf', '-inf', 'nan', '1e400', '0', '-5', 'many'])
def test_c4_takes_no_number_of_tokens_that_is_none(capsys, monkeypatch, tokens):
    monkeypatch.setattr(sys, 'argv', ['prepare.py', f'--tokens={tokens}'])
    with pytest.raises(SystemExit) as end:
        c4.main()
    assert end.value.code == 2 and 'argument --tokens: ' in capsys.readouterr().err


def test_c4_without_a_network_fails_at_once_and_names_the_alternative(tmp_path):
    env = {**os.environ, 'HF_HUB_OFFLINE': '1'}  # the same path as a network that is down, on any machine
    for args in ([], [f'--input={c4_file(tmp_path / "c4.jsonl")}', '--tokenizer=nobody/has-this']):
        command = [sys.executable, ROOT / 'data/c4/prepare.py', f'--out_dir={tmp_path / "out"}', *args]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith('error: could not')
        assert 'python data/pystdlib/prepare.py' in done.stderr
    assert not (tmp_path / 'out').exists()


# ---- shakespeare


def test_shakespeare_takes_any_local_file_and_says_when_it_is_not_the_known_one(tmp_path):
    path = tmp_path / 'play.txt'
    path.write_text('To be, or not to be.\n' * 10)
    done = run('shakespeare', f'--input={path}', f'--out_dir={tmp_path / "out"}')
    assert done.returncode == 0, done.stderr
    assert 'is not the well-known file' in done.stdout
    texts = check_format(tmp_path / 'out')
    assert ''.join(t for (_, _), (t,) in texts.items()) == path.read_text()
    meta, _ = read(tmp_path / 'out')
    assert meta['train_tokens'] == 190  # int(210 * 0.9) bytes and the end


def test_shakespeare_refuses_a_download_with_a_wrong_checksum(tmp_path, monkeypatch):
    wrong = tmp_path / 'wrong.txt'
    wrong.write_text('an error page')
    monkeypatch.setattr(shakespeare, 'URL', wrong.as_uri())
    with pytest.raises(common.DataError, match='sha256 differs'):
        shakespeare.prepare(tmp_path / 'out')
    assert not (tmp_path / 'out' / 'input.txt').exists()
    monkeypatch.setattr(shakespeare, 'URL', (tmp_path / 'nothing').as_uri())
    with pytest.raises(common.DataError, match=r'could not download.*--input=FILE'):
        shakespeare.prepare(tmp_path / 'out')


def test_shakespeare_keeps_and_checks_its_download(tmp_path, monkeypatch):
    right, out = tmp_path / 'right.txt', tmp_path / 'out'
    right.write_text('To be, or not to be.\n' * 10)
    monkeypatch.setattr(shakespeare, 'URL', right.as_uri())
    monkeypatch.setattr(shakespeare, 'SHA256', shakespeare.hashlib.sha256(right.read_bytes()).hexdigest())
    shakespeare.prepare(out)
    right.unlink()
    shakespeare.prepare(out, tokenizer='bpe', vocab_size=260)  # no second download
    check_format(out)
    (out / 'input.txt').write_text('edited')
    with pytest.raises(common.DataError, match='sha256 differs'):
        shakespeare.prepare(out)


# ---- text


def test_text_makes_a_source_of_each_top_level_folder(tmp_path):
    for name in (
        'top/wiki/deep/a.txt',
        'top/wiki/b.md',
        'top/code/c.py',
        'top/d.txt',
        'top/.hidden/e.txt',
        'top/code/f.bin',
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{name}\n' * 50)
    done = run('text', f'--input={tmp_path / "top"}', '--vocab_size=280', f'--out_dir={tmp_path / "out"}')
    assert done.returncode == 0, done.stderr
    texts = check_format(tmp_path / 'out')
    assert {source for source, _ in texts} == {'wiki', 'code', 'top'}
    assert texts['wiki', 'train'][1] + texts['wiki', 'val'][1] == 'top/wiki/deep/a.txt\n' * 50
    # The same files given as two folders: each one is a source.
    text_data.prepare(tmp_path / 'two', [str(tmp_path / 'top/wiki'), str(tmp_path / 'top/code')], 'bytes')
    assert [s['name'] for s in read(tmp_path / 'two')[0]['sources']] == ['wiki', 'code']


def test_text_makes_a_source_of_each_file_of_a_glob(tmp_path):
    for name in ('a.txt', 'b.txt'):
        (tmp_path / name).write_text(name * 100)
    # The second input overlaps with the first: no file counts twice.
    text_data.prepare(tmp_path / 'out', [str(tmp_path / '*.txt'), str(tmp_path / 'a.txt')], 'bytes')
    texts = check_format(tmp_path / 'out')
    assert texts['a.txt', 'train'] == [('a.txt' * 100)[:475]]
    assert texts['a.txt', 'val'] == [('a.txt' * 100)[475:]]
    assert set(texts) == {(name, split) for name in ('a.txt', 'b.txt') for split in common.SPLITS}


@pytest.mark.parametrize('seed', range(4))
def test_no_split_is_less_than_half_of_its_share(tmp_path, seed):
    for i in range(42):  # with 40 files the hash leaves val empty 13 times in 100
        (tmp_path / f'{seed}_chapter{i}.txt').write_text(f'chapter {i}\n' * (1 if i % 3 else 400))
    meta = text_data.prepare(tmp_path / 'out', [str(tmp_path)], 'bytes')
    share = meta['val_tokens'] / (meta['val_tokens'] + meta['train_tokens'])
    assert 0.025 <= share <= 0.5


def test_the_hash_is_kept_where_it_is_fair(tmp_path):
    found = [('s', f'file{i}', tmp_path / f'file{i}') for i in range(400)]
    for _, _, path in found:
        path.write_text('some text')
    assert not text_data.by_position(found, 0.05)
    (tmp_path / 'file7').write_text('some text' * 10_000)  # nearly all of the text, on the side of train
    assert common.split_of('file7', 0.05) == 'train' and text_data.by_position(found, 0.05)


TEXT = 'Zwölf Boxkämpfer, 東京 😀\n' * 9


def gzipped(data):
    """Without the time of day, which would be in a test's name: pytest-xdist wants the same names in all processes."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(
    ('name', 'data'),
    [
        ('utf8.txt', TEXT.encode()),
        ('utf8_bom.txt', TEXT.encode('utf-8-sig')),
        ('utf16.txt', TEXT.encode('utf-16')),
        ('utf16be.txt', b'\xfe\xff' + TEXT.encode('utf-16-be')),
        ('utf32.txt', TEXT.encode('utf-32')),
        ('a.txt.gz', gzipped(TEXT.encode())),
        ('named_txt.txt', gzipped(TEXT.encode('utf-16'))),
        ('a.txt.bz2', bz2.compress(TEXT.encode())),
        ('a.md.xz', lzma.compress(TEXT.encode('utf-8-sig'))),
    ],
)
def test_text_is_read_however_it_is_coded_and_packed(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert files_of.read_text(tmp_path / name) == TEXT
    assert [path.name for path in text_data.walk(tmp_path)] == [name]


@pytest.mark.parametrize(
    ('name', 'data', 'says'),
    [
        ('a.txt', TEXT.encode('utf-16-le'), r'looks like UTF-16: iconv -f utf-16le'),
        ('a.txt', 'plain'.encode('utf-16-be'), r'looks like UTF-16: iconv -f utf-16be'),
        ('a.txt', TEXT.encode('utf-16')[:-1], r'begins as utf-16 and is broken at byte'),
        ('a.txt', bytes(99), r'full of NUL bytes\): leave it out'),
        ('a.txt', 'Zwölf'.encode('latin1'), r'is not UTF-8 \(byte 2\): .* iconv -f latin1'),
        ('a.txt.gz', gzipped(TEXT.encode())[:-9], r'packed by gzip and broken'),
        ('train.parquet', b'PAR1....PAR1', r'a Parquet table, not text: python -c "import datasets'),
        ('a.docx', b'PK\x03\x04....', r'a zip archive, not text: unzip .*pandoc'),
        ('a.pdf', b'%PDF-1.7', r'a PDF, not text: pdftotext'),
        ('a.tar.gz', gzipped(bytes(257) + b'ustar' + bytes(250)), r'a tar archive, not text: tar -xf'),
        ('a.zst', b'\x28\xb5\x2f\xfd....', r'packed by zstd, not text: zstd -d'),
        (
            'a.jsonl',
            b'{"prompt": "p", "answer": "a"}\n',
            r'JSON lines, not text: python data/instruct/prepare.py --input=',
        ),
        (
            'a.jsonl.gz',
            gzipped(b'{"text": "t", "url": "u"}\n'),
            r'JSON lines: python data/c4/prepare.py --input=',
        ),
    ],
)
def test_what_is_no_text_is_named_with_what_to_type(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says):
        files_of.read_text(tmp_path / name)


def test_a_folder_of_something_else_says_of_what(tmp_path):
    (tmp_path / 'part.parquet').write_bytes(b'PAR1....PAR1')
    with pytest.raises(DataError, match=r'part.parquet is a Parquet table'):
        text_data.find([str(tmp_path)])


def test_json_that_is_no_lines_of_objects_is_text(tmp_path):
    (tmp_path / 'a.json').write_text('[\n 1,\n 2\n]\n')
    assert files_of.read_text(tmp_path / 'a.json') == '[\n 1,\n 2\n]\n'


def test_text_with_many_files_keeps_whole_files_apart(tmp_path):
    (tmp_path / 'in').mkdir()
    for n in range(100):
        (tmp_path / 'in' / f'{n}.txt').write_text(f'text {n}')
    text_data.prepare(tmp_path / 'out', [str(tmp_path / 'in')], 'bytes')
    texts = check_format(tmp_path / 'out')
    assert sorted(texts['in', 'train'] + texts['in', 'val']) == sorted(f'text {n}' for n in range(100))


@pytest.mark.parametrize(
    ('content', 'args', 'says'),
    [
        (b'some text', ['--input=nothing*'], 'matches no file'),
        (b'', ['--input=file.txt'], 'is empty'),
        (b'caf\xe9', ['--input=file.txt'], 'not UTF-8 (byte 3): convert it first, e.g. iconv -f latin1 -t utf-8'),
        (b'some text', ['--input=file.txt', '--tokenizer=magic'], "unknown tokenizer 'magic'"),
        (b'some text', ['--input=file.txt', '--tokenizer=tiktoken:magic'], "no encoding 'magic'"),
        (b'some text', ['--input=file.txt', '--tokenizer=empty'], 'no tokenizer.json'),
        (b'some text', ['--input=file.txt', '--vocab_size=100'], 'at least 257'),
        (b'x', ['--input=file.txt'], 'too little text'),
        (b'some text', ['--input=file.txt', '--val_share=5'], 'between 0 and 1'),
        (b'some text', ['--input=empty'], 'holds no text file'),
    ],
)
def test_an_error_is_one_sentence_and_leaves_the_old_folder_intact(tmp_path, prepared, content, args, says):
    (tmp_path / 'file.txt').write_bytes(content)
    (tmp_path / 'empty').mkdir()
    before = files(prepared)
    done = run('text', *args, f'--out_dir={prepared}', cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith('error: ')
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert files(prepared) == before


@pytest.mark.parametrize(
    'prepare', [pystdlib, sitepackages, c4, shakespeare, text_data], ids=lambda module: module.__name__
)
def test_an_empty_out_dir_is_not_the_folder_one_is_in(capsys, monkeypatch, prepare):
    monkeypatch.setattr(sys, 'argv', ['prepare.py', '--input=x', '--out_dir='])
    with pytest.raises(SystemExit) as end:
        prepare.main()
    assert end.value.code == 2 and 'argument --out_dir: it is empty' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['pystdlib', 'sitepackages', 'c4', 'shakespeare', 'text'])
def test_help_shows_the_launch_card_and_a_comment_for_every_flag(name):
    done = run(name, '--help')
    assert done.returncode == 0
    assert f'python data/{name}/prepare.py' in done.stdout
    assert '--out_dir' in done.stdout
