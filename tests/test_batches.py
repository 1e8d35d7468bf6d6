"""batches.py: pure in (seed, t, rank, world), without replacement, and honest about broken files."""

import json
import os

import numpy as np
import pytest
import torch

from data import DataError
from data.batches import Tokens, fingerprint


@pytest.fixture
def folder(tmp_path):
    """1000 training tokens in two sources, token i being i: what a window holds tells where it was cut."""
    write(tmp_path, np.arange(1000), np.arange(1000, 1130))
    return tmp_path


def write(folder, train, val, vocab_size=2000, dtype='uint16'):
    train.astype(dtype).tofile(folder / 'train.bin')
    val.astype(dtype).tofile(folder / 'val.bin')
    half, small = len(val) // 2, min(200, len(train))
    sources = [
        dict(name='small', train_tokens=small, val_tokens=half),
        dict(name='large', train_tokens=len(train) - small, val_tokens=len(val) - half),
    ]
    meta = dict(format=1, tokenizer='bytes', vocab_size=vocab_size, dtype=dtype, sources=sources)
    meta |= dict(train_tokens=len(train), val_tokens=len(val))
    (folder / 'meta.json').write_text(json.dumps(meta))


def test_batch_is_a_pure_function_of_seed_and_t(folder):
    one, other = Tokens(folder, 'train', 16), Tokens(folder, 'train', 16)
    for t in (0, 40, 7, 7, 123):
        for a, b in zip(one.batch(3, t, 4), other.batch(3, t, 4)):
            assert torch.equal(a, b)
    assert not torch.equal(one.batch(3, 0, 4)[0], one.batch(4, 0, 4)[0])


def test_targets_are_the_next_tokens(folder):
    x, y, _ = Tokens(folder, 'train', 16).batch(0, 5, 4)
    assert x.shape == y.shape == (4, 16) and x.dtype == torch.int64
    assert torch.equal(y, x + 1)


def test_an_epoch_takes_every_window_once_and_the_next_one_cuts_elsewhere(folder):
    data = Tokens(folder, 'train', 16)
    epochs = []
    for epoch in range(2):
        starts = [int(data.batch(1, epoch * data.windows + t, 1)[0][0, 0]) for t in range(data.windows)]
        assert sorted(starts) == list(range(min(starts), min(starts) + 16 * data.windows, 16))
        epochs.append(starts)
    assert 16 * data.windows >= 1000 - 2 * 16 - 1
    assert epochs[0] != epochs[1] and min(epochs[0]) != min(epochs[1])


def test_processes_split_what_one_process_reads(folder):
    data = Tokens(folder, 'train', 16)
    alone = torch.cat([data.batch(0, t, 4)[0] for t in range(6)])
    shared = torch.cat([data.batch(0, t, 4, rank, world=3)[0] for t in range(2) for rank in range(3)])
    assert torch.equal(alone, shared)


def test_a_window_knows_its_source(folder):
    data = Tokens(folder, 'train', 16)
    assert data.sources == ['small', 'large']
    for t in range(30):
        x, _, sources = data.batch(0, t, 4)
        assert torch.equal(sources, (x[:, 8] >= 200).long())


def test_evaluation_windows_are_fixed_and_spread_over_the_file(folder):
    data = Tokens(folder, 'val', 16)
    windows = [x for x, _, _ in data.evaluation(64, 3)]
    assert [len(x) for x in windows] == [3, 1]
    starts = torch.cat(windows)[:, 0].tolist()
    assert starts == [1000, 1032, 1064, 1096]
    five = torch.cat([x for x, _, _ in data.evaluation(5 * 16, 3)])[:, 0]
    assert five.tolist() == [1000, 1016, 1048, 1064, 1096], 'to the end of the file, whatever the number'
    everything = torch.cat([x for x, _, _ in data.evaluation(10**9, 3)])
    assert everything.flatten().tolist() == list(range(1000, 1128))


def test_every_start_stays_within_a_file_of_any_length(tmp_path):
    for n in range(17, 80):
        write(tmp_path, np.arange(n), np.arange(17))
        data = Tokens(tmp_path, 'train', 16)
        for t in range(3 * data.windows):
            x, y, _ = data.batch(n, t, 1)
            assert torch.equal(y, x + 1) and y.max() < n


def test_uint32_ids_are_read(tmp_path):
    write(tmp_path, np.arange(100_000, 100_300), np.arange(100), vocab_size=128_000, dtype='uint32')
    assert Tokens(tmp_path, 'train', 16).batch(0, 0, 1)[0].min() >= 100_000


def test_broken_files_are_one_sentence_each(folder):
    with pytest.raises(DataError, match=r'train.bin holds 1000 tokens, too few for a window of 1000: lower block_size'):
        Tokens(folder, 'train', 1000)
    whole = (folder / 'train.bin').read_bytes()
    (folder / 'train.bin').write_bytes(whole[:999])
    with pytest.raises(DataError, match=r'train.bin holds 499 tokens, meta.json says 1000: run its prepare.py again'):
        Tokens(folder, 'train', 16)
    (folder / 'train.bin').unlink()
    with pytest.raises(DataError, match=r'train.bin cannot be read'):
        Tokens(folder, 'train', 16)
    (folder / 'meta.json').write_text('{')
    with pytest.raises(DataError, match=r'meta.json is broken'):
        Tokens(folder, 'train', 16)
    (folder / 'meta.json').unlink()
    with pytest.raises(DataError, match=r'meta.json does not exist: run python .*prepare.py first'):
        Tokens(folder, 'train', 16)


def test_a_token_id_beyond_the_vocabulary_is_named_with_its_place(tmp_path):
    train = np.arange(1000)
    train[500] = 60_000
    write(tmp_path, train, np.arange(100))
    data = Tokens(tmp_path, 'train', 16)
    with pytest.raises(
        DataError, match=r'train.bin: token id 60000 near position \d+ is beyond the vocabulary of 2000'
    ):
        for t in range(data.windows):
            data.batch(0, t, 1)


def test_a_fingerprint_is_of_the_tokens_and_their_sources_and_of_nothing_else(folder):
    def changed(name, old, new):
        whole = (folder / name).read_bytes()
        assert old in whole
        (folder / name).write_bytes(whole.replace(old, new, 1))
        other = fingerprint(folder)
        (folder / name).write_bytes(whole)
        os.utime(folder / name, (1, 1))  # a copy of the folder has other times, and is the same data
        assert fingerprint(folder) == first
        return other

    first = fingerprint(folder)
    assert len(first) == 16 and int(first, 16) >= 0
    others = {
        changed('train.bin', b'\x07\x00', b'\x07\x01'),
        changed('val.bin', b'\xe8\x03', b'\xe8\x02'),
        changed('meta.json', b'"small"', b'"other"'),
        changed('meta.json', b'uint16', b'uint32'),
        changed('meta.json', b'"format"', b'"checksum": "of a token between the places looked at", "format"'),
    }
    assert len(others - {first}) == 5
    assert changed('meta.json', b'"format"', b'"python": "4.0", "format"') == first
    (folder / 'val.bin').unlink()
    with pytest.raises(DataError, match=r'val.bin cannot be read'):
        fingerprint(folder)


def test_a_fingerprint_looks_at_both_ends_of_a_large_file(tmp_path):
    train = np.zeros(4_000_000, dtype='uint16')  # 8 MB: read in places
    seen = set()
    for place in (None, 0, -1):
        train[:] = 0
        if place is not None:
            train[place] = 1
        write(tmp_path, train, np.arange(100))
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 3
