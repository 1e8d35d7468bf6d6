"""What instruct, gsm8k and mathinstruct promise: all formats read, nothing lost in silence."""

import json

import numpy as np

from data import chat, common, examples, tokenizer


def read(folder, split='train'):
    """[(source, ids, trained)] of a prepared folder of examples, by the format's description alone."""
    meta = json.loads((folder / 'meta.json').read_text())
    ids = np.fromfile(folder / f'{split}.bin', meta['dtype'])
    trained = np.fromfile(folder / f'{split}_trained.bin', np.uint8)
    ends = np.fromfile(folder / f'{split}_ends.bin', np.int64)
    assert meta['examples'] is True and len(ids) == len(trained) == ends[-1] == meta[f'{split}_tokens']
    assert len(ends) == meta[f'{split}_examples'] and trained.sum() == meta[f'{split}_trained'] and trained.max() == 1
    sources = [s['name'] for s in meta['sources'] for _ in range(s[f'{split}_examples'])]
    starts = [0, *ends[:-1]]
    return [(source, ids[a:b].tolist(), trained[a:b].tolist()) for source, a, b in zip(sources, starts, ends)]


def test_the_writer_keeps_tokens_marks_and_ends_of_each_source_together(tmp_path, monkeypatch):
    monkeypatch.setattr(common, 'BATCH_CHARACTERS', 5)  # many writes
    tok = tokenizer.Bytes()
    template = chat.load(tmp_path, tok, 'plain')
    with examples.ExampleWriter(tmp_path, tok, template, 'test') as out:
        for i, (source, split) in enumerate([('a', 'train'), ('b', 'train'), ('a', 'train'), ('b', 'val')]):
            ids, trained = template.encode([{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': str(i)}])
            out.add_example(source, split, ids, trained, 1)
    assert read(tmp_path) == [(s, [113, 48 + i, 256], [0, 1, 1]) for s, i in (('a', 0), ('a', 2), ('b', 1))]
    assert read(tmp_path, 'val') == [('b', [113, 51, 256], [0, 1, 1])]
