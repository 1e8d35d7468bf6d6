"""What instruct, gsm8k and mathinstruct promise: all formats read, nothing lost in silence."""

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from data import DataError, chat, common, examples, files, formats, tokenizer
from data.duplicates import Duplicates
from data.gsm8k import prepare as gsm8k
from data.instruct import prepare as instruct
from data.mathinstruct import prepare as mathinstruct


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


def texts(folder, split='train'):
    """[(source, text, trained text)] of a prepared folder."""
    tok = tokenizer.load(folder)
    rows = read(folder, split)
    return [
        (source, tok.decode(ids), tok.decode([i for i, t in zip(ids, trained) if t])) for source, ids, trained in rows
    ]


def write(path, rows):
    path.write_text('\n'.join(map(json.dumps, rows)))
    return path


def rows_of(n):
    return [{'question': f'What is {i} + {i}?', 'answer': f'It is {2 * i}.'} for i in range(n)]


def prepare(path, out, template='qa', **how):
    return examples.prepare(out, instruct.rows_of(instruct.find([str(path)])), 'test', 'bytes', template, **how)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """A model's folder: a tokenizer of 257 bytes and two control tokens, a template, a context of 64 tokens."""
    folder = tmp_path_factory.mktemp('model')
    saved = json.loads(tokenizer.train_bpe(['a'], 257).json)
    for i, name in enumerate(('<|im_start|>', '<|im_end|>'), 257):
        saved['added_tokens'].append(saved['added_tokens'][0] | {'id': i, 'content': name})
    (folder / 'tokenizer.json').write_text(json.dumps(saved))
    source = chat.TEMPLATES['chatml']
    config = {'eos_token': '<|endoftext|>', 'chat_template': source, 'tokenizer_class': 'PreTrainedTokenizerFast'}
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    (folder / 'config.json').write_text('{"model_type": "llama", "max_position_embeddings": 128}')
    return folder


def run(script, *words, **kw):
    command = [sys.executable, ROOT / 'data' / script / 'prepare.py', *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=kw.pop('cwd', ROOT), timeout=60, check=False, **kw
    )


# ---- the folder


def test_the_writer_keeps_tokens_marks_and_ends_of_each_source_together(tmp_path, monkeypatch):
    monkeypatch.setattr(common, 'BATCH_CHARACTERS', 5)  # many writes
    tok = tokenizer.Bytes()
    template = chat.load(None, tok, 'plain')
    with examples.ExampleWriter(tmp_path, tok, template, 'test') as out:
        for i, (source, split) in enumerate([('a', 'train'), ('b', 'train'), ('a', 'train'), ('b', 'val')]):
            ids, trained = template.encode([{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': str(i)}])
            out.add_example(source, split, ids, trained, 1)
        with pytest.raises(DataError, match='teaches nothing'):
            out.add_example('a', 'train', [1], [False], 0)
    assert read(tmp_path) == [(s, [113, 48 + i, 256], [0, 1, 1]) for s, i in (('a', 0), ('a', 2), ('b', 1))]
    assert read(tmp_path, 'val') == [('b', [113, 51, 256], [0, 1, 1])]


def test_the_folder_of_a_model_can_be_talked_to_as_the_model(tmp_path, model):
    """Template, special tokens and ends of turn go along, one template only, ids of control tokens fit."""
    path, out = write(tmp_path / 'rows.jsonl', rows_of(40)), tmp_path / 'out'
    done = run('instruct', f'--input={path}', f'--tokenizer={model}', f'--out_dir={out}')
    assert done.returncode == 0, done.stderr
    meta = json.loads((out / 'meta.json').read_text())
    assert meta['vocab_size'] == 259 and meta['end_of_turn'] == [258] and meta['model_type'] == 'llama'
    assert meta['max_tokens'] == 128 and meta['longest'] == max(len(ids) for _, ids, _ in read(out))
    assert 'chat_template' not in json.loads((out / 'tokenizer_config.json').read_text())
    mine, its = (chat.load(folder, tokenizer.load(folder)) for folder in (out, model))
    messages = [{'role': 'user', 'content': 'What is 3 + 3?'}, {'role': 'assistant', 'content': 'It is 6.'}]
    assert mine.encode(messages) == its.encode(messages)
    assert its.encode(messages)[0] in [ids for split in common.SPLITS for _, ids, _ in read(out, split)]
    assert tokenizer.ends(out, tokenizer.load(out)) == [258, 0]
    # Prepared as text later, nothing of it is left.
    (tmp_path / 'text.txt').write_text('some text\n' * 99)
    assert run('text', f'--input={tmp_path / "text.txt"}', '--tokenizer=bytes', f'--out_dir={out}').returncode == 0
    assert sorted(p.name for p in out.iterdir()) == ['meta.json', 'train.bin', 'val.bin']


def test_the_same_rows_give_the_same_files(tmp_path):
    path = write(tmp_path / 'rows.jsonl', rows_of(60))
    made = [prepare(path, tmp_path / name)[0]['checksum'] for name in 'ab']
    assert made[0] == made[1]


def test_the_checksum_tells_which_tokens_are_trained(tmp_path):
    turns = [{'role': role, 'content': 'x'} for role in ('user', 'assistant') * 2]
    path = write(
        tmp_path / 'rows.jsonl',
        [{'messages': [*turns[:3], {'role': 'assistant', 'content': str(i)}]} for i in range(9)],
    )
    path = write(path, [{'messages': [{'role': 'user', 'content': str(i)}, *turns[1:]]} for i in range(9)])
    both, last = (prepare(path, tmp_path / on, train_on=on)[0] for on in ('all', 'last'))
    assert both['train_tokens'] == last['train_tokens'] and both['train_trained'] > last['train_trained']
    assert both['checksum'] != last['checksum']


def test_equal_questions_are_in_one_split_and_keep_it_when_others_are_added(tmp_path):
    rows = rows_of(400) + [row | {'answer': 'Another answer.'} for row in rows_of(400)]
    prepare(write(tmp_path / 'a.jsonl', rows), tmp_path / 'a')
    prepare(write(tmp_path / 'b.jsonl', [{'question': 'new?', 'answer': 'yes'}, *rows]), tmp_path / 'b')
    asked = [
        {split: {text.split('Answer')[0] for _, text, _ in texts(tmp_path / name, split)} for split in common.SPLITS}
        for name in 'ab'
    ]
    assert not asked[0]['train'] & asked[0]['val'] and asked[0]['val'] == asked[1]['val']
    assert 10 <= len(asked[0]['val']) <= 40


@pytest.mark.parametrize('n', [2, 3, 10, 30])
def test_few_examples_have_a_val_split_of_about_their_share(tmp_path, n):
    meta, _ = prepare(write(tmp_path / 'rows.jsonl', rows_of(n)), tmp_path / 'out')
    assert meta['val_examples'] == max(round(0.05 * n), 1) and meta['train_examples'] == n - meta['val_examples']


def test_val_files_are_the_val_split(tmp_path):
    write(tmp_path / 'a.jsonl', rows_of(5))
    write(tmp_path / 'b.jsonl', [{'question': 'v', 'answer': 'w'}])
    words = [f'--input={tmp_path / "a.jsonl"}', f'--val={tmp_path / "b.jsonl"}', '--tokenizer=bytes', '--template=qa']
    assert run('instruct', *words, f'--out_dir={tmp_path / "out"}').returncode == 0
    assert texts(tmp_path / 'out', 'val') == [('b', 'Question: v\nAnswer: w<|endoftext|>', ' w<|endoftext|>')]
    assert len(texts(tmp_path / 'out')) == 5


# ---- files and formats


def test_files_are_found_by_name_list_glob_and_folder_and_read_by_what_they_are(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = rows_of(12)
    write(tmp_path / 'a.jsonl', rows[:2])
    (tmp_path / 'b.json').write_text(json.dumps(rows[2:4], indent=1))
    (tmp_path / 'c.json').write_text('\ufeff' + json.dumps({'version': 1, 'data': rows[4:6]}))
    (tmp_path / 'd.jsonl.gz').write_bytes(gzip.compress('\r\n\r\n'.join(map(json.dumps, rows[6:8])).encode('utf-16')))
    (tmp_path / 'more' / 'deep').mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[8:10]), tmp_path / 'more' / 'deep' / 'e.parquet')
    write(tmp_path / 'more' / 'f.json', rows[10:])
    (tmp_path / 'more' / 'readme.md').write_text('no examples')
    names = [
        f'{tmp_path}/a.jsonl,{tmp_path}/b.json',
        f'{tmp_path}/[c-d].js*',
        f'{tmp_path}/more',
        f'{tmp_path}/a.jsonl',
    ]
    found = [row for _, _, row, _ in instruct.rows_of(instruct.find(names))()]
    assert found == rows
    places = [place for place, *_ in instruct.rows_of(instruct.find([f'{tmp_path}/a.jsonl', f'{tmp_path}/b.json']))()]
    assert places == [f'{tmp_path}/{one}' for one in ('a.jsonl:1', 'a.jsonl:2', 'b.json, row 1', 'b.json, row 2')]


def turns(*contents, first='user'):
    roles = ('user', 'assistant') if first == 'user' else ('assistant', 'user')
    return [{'role': roles[i % 2], 'content': content} for i, content in enumerate(contents)]


CALL = {'type': 'function', 'function': {'name': 'f', 'arguments': {'a': 1}}}
SYSTEM = {'role': 'system', 'content': 's'}
FORMATS = [
    ({'instruction': 'q', 'output': 'a'}, turns('q', 'a')),
    *(({'instruction': 'q', 'input': empty, 'output': 'a'}, turns('q', 'a')) for empty in ('', None)),
    (
        {'instruction': 'q', 'input': 'i', 'output': 'a', 'system': 's'},
        [
            SYSTEM,
            {'role': 'user', 'content': 'q\n\ni', 'instruction': 'q', 'input': 'i'},
            *turns('a', first='assistant'),
        ],
    ),
    ({'instruction': 'q', 'output': 'a', 'history': [['b', 'c'], ['d', 'e']]}, turns('b', 'c', 'd', 'e', 'q', 'a')),
    ({'source': 'data/CoT/gsm.json', 'instruction': 'q', 'output': 'a'}, turns('q', 'a')),
    ({'conversations': [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]}, turns('q', 'a')),
    (
        {
            'system': 's',
            'conversations': [
                {'from': 'chatgpt', 'value': 'hi'},
                {'from': 'user', 'value': 'q'},
                {'from': 'bing', 'value': 'a'},
            ],
        },
        [SYSTEM, *turns('q', 'a')],
    ),
    (
        {
            'conversations': [
                {'from': 'human', 'value': 'q'},
                {'from': 'function_call', 'value': '{"name": "f", "arguments": {"a": 1}}'},
                {'from': 'observation', 'value': '2'},
                {'from': 'gpt', 'value': 'a'},
            ],
            'tools': '[{"name": "f"}]',
        },
        [
            *turns('q'),
            {'role': 'assistant', 'content': '', 'tool_calls': [CALL]},
            {'role': 'tool', 'content': '2'},
            *turns('a', first='assistant'),
        ],
    ),
    ({'messages': turns('q', 'a')}, turns('q', 'a')),
    (
        {
            'messages': [
                {'role': 'developer', 'content': 's'},
                {'role': 'user', 'content': [{'type': 'text', 'text': 'q'}, {'type': 'text', 'text': 'r'}]},
                {
                    'role': 'assistant',
                    'content': None,
                    'tool_calls': [{'id': '1', 'type': 'function', 'function': {'name': 'f', 'arguments': '{"a": 1}'}}],
                },
                {'role': 'tool', 'tool_call_id': '1', 'content': '2'},
                {'role': 'assistant', 'content': 'a', 'weight': 1, 'refusal': None},
            ]
        },
        [
            SYSTEM,
            *turns('qr'),
            {'role': 'assistant', 'content': '', 'tool_calls': [CALL | {'id': '1'}]},
            {'role': 'tool', 'content': '2', 'tool_call_id': '1'},
            {'role': 'assistant', 'content': 'a', 'weight': 1},
        ],
    ),
    ({'prompt': 'q', 'completion': ' a'}, turns('q', ' a')),
    (
        {'prompt': turns('b', 'c', 'q'), 'completion': turns('a', first='assistant')},
        [*turns('b'), {'role': 'assistant', 'content': 'c', 'weight': 0}, *turns('q', 'a')],
    ),
    ({'question': 'q', 'answer': 42}, turns('q', '42')),
    ({'system_prompt': 's', 'question': 'q', 'response': 'a'}, [SYSTEM, *turns('q', 'a')]),
    ({'problem': 'q', 'solution': 'a', 'level': 'Level 5'}, turns('q', 'a')),
    ({'instruction': 'q', 'context': '', 'response': 'a', 'category': 'c'}, turns('q', 'a')),
    ({'INSTRUCTION': 'q', 'RESPONSE': 'a'}, turns('q', 'a')),
    ({'prompt': 'q', 'generation': 'a'}, turns('q', 'a')),
    ({'question': 'half \ud83d, whole \ud83d\ude00', 'answer': 'a'}, turns('half \ufffd, whole 😀', 'a')),
]


@pytest.mark.parametrize(
    ('row', 'messages'), FORMATS, ids=lambda value: '+'.join(value) if isinstance(value, dict) else ''
)
def test_a_format_is_known_by_its_fields(row, messages):
    found, tools, source = formats.conversation(row, {}, 'rows.jsonl:1')
    assert found == messages
    assert source == row.get('source') and tools == ([{'name': 'f'}] if 'tools' in row else None)


def test_fields_are_mapped():
    names = formats.parse_fields('prompt:ask, completion:reply,source:')
    row = {'ask': 'q', 'reply': 'a', 'source': 'x', 'messages': []}
    assert formats.conversation(row, names, 'here') == (turns('q', 'a'), None, None)
    for wrong in ('ask', 'asked:prompt', 'prompt=ask'):
        with pytest.raises(DataError, match=r'OURS:YOURS, ours being one of prompt, completion'):
            formats.parse_fields(wrong)


WRONG = [
    ('{"question": "q", "answer": "a"', r'rows\.jsonl:3 is not valid JSON .*: mend this line or delete it'),
    ('[1, 2]', r'rows\.jsonl:3 holds \[1, 2\], not an object with fields'),
    ('null', r'rows\.jsonl:3 holds None, not an object'),
    ('{"question": "q"}', r'rows\.jsonl:3 lacks answer, it has question: .*--fields=prompt:YOURS,completion:YOURS'),
    ('{"answer": "a"}', r'rows\.jsonl:3 lacks question, it has answer'),
    ('{"question": null, "answer": "a"}', r'rows\.jsonl:3 lacks question'),
    ('{"question": ["x"], "answer": "a"}', r'rows\.jsonl:3 holds \[.x.\] where a list of turns should be'),
    ('{"question": "q", "answer": true}', r'rows\.jsonl:3: answer is True, not a text'),
    ('{"a": 1, "b": 2}', r'rows\.jsonl:3 has a, b, of no format known: name them'),
    ('{}', r'rows\.jsonl:3 has no field'),
    ('{"text": "t"}', r'rows\.jsonl:3 is text, no example'),
    (
        '{"messages": [{"role": "wizard", "content": "x"}]}',
        r'rows\.jsonl:3, turn 1 is of the unknown role .wizard.: known are',
    ),
    ('{"messages": [{"content": "x"}]}', r'rows\.jsonl:3, turn 1 is of the unknown role None'),
    ('{"messages": [3]}', r'rows\.jsonl:3 holds \[3\] where a list of turns should be'),
    ('{"messages": [{"role": "user", "content": {"a": 1}}]}', r'rows\.jsonl:3, turn 1 is .*, not a text'),
    ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', r'only text can be trained on'),
    ('{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}', r'weight=0.5 should be 0 or 1'),
    ('{"messages": [{"role": "assistant", "tool_calls": [1]}]}', r'tool_calls=1 names no function'),
    ('{"question": "q", "answer": "a", "tools": 3}', r'tools=3 is not a list of objects'),
    ('{"instruction": "q", "output": "a", "history": [["x"]]}', r'history=\[.x.\] is not a question and its answer'),
]


@pytest.mark.parametrize(('line', 'says'), WRONG)
def test_a_row_that_is_wrong_is_named_and_nothing_is_written(tmp_path, line, says):
    path, out = tmp_path / 'rows.jsonl', tmp_path / 'out'
    prepare(write(path, rows_of(9)), out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    path.write_text('\n'.join([json.dumps(rows_of(1)[0]), '', line, *map(json.dumps, rows_of(9))]))
    with pytest.raises(DataError, match=says) as raised:
        prepare(path, out)
    assert '\n' not in str(raised.value)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_errors_of_the_command_line_are_one_sentence(tmp_path, model):
    path = write(tmp_path / 'rows.jsonl', rows_of(9))
    (tmp_path / 'bare').mkdir()
    (tmp_path / 'bare' / 'tokenizer.json').write_bytes((model / 'tokenizer.json').read_bytes())
    (tmp_path / 'empty').mkdir()
    one = write(tmp_path / 'one.jsonl', rows_of(1) * 5)
    for words, says in (
        (
            [f'--input={path}', f'--tokenizer={tmp_path / "bare"}'],
            'has no chat template of its own: choose one, --template=',
        ),
        ([f'--input={path}', '--tokenizer=bytes', '--template=chatml'], 'needs the special token <|im_start|>'),
        ([f'--input={path}', '--tokenizer=nowhere'], "unknown tokenizer 'nowhere'"),
        ([f'--input={path}', f'--tokenizer={model}', '--template=x.jinja'], 'is none of ours and no .jinja file'),
        (['--input=none.jsonl', f'--tokenizer={model}'], '--input=none.jsonl matches no file'),
        ([f'--input={tmp_path / "empty"}', f'--tokenizer={model}'], 'holds no file of examples'),
        ([f'--input={path}', f'--tokenizer={model}', '--val_share=2'], 'between 0 and 1'),
        ([f'--input={path}', f'--tokenizer={model}', '--fields=x:y'], 'OURS:YOURS'),
        (
            [f'--input={path}', f'--tokenizer={model}', '--max_tokens=8'],
            'no example is left for the train split: 9 dropped: longer',
        ),
        ([f'--input={one}', f'--tokenizer={model}'], 'there is only one question'),
    ):
        done = run('instruct', *words, f'--out_dir={tmp_path / "out"}')
        assert done.returncode == 1 and done.stderr.startswith('error: ') and says in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / 'out').glob('*'))
    done = run('instruct', f'--input={path}', f'--tokenizer={model}', f'--out_dir={model}/')
    assert done.returncode == 1 and 'is the folder of the model, whose files it would replace' in done.stderr


def test_a_data_set_without_anything_to_train_is_refused(tmp_path):
    rows = [
        {'messages': [{'role': 'user', 'content': str(i)}, {'role': 'assistant', 'content': 'x', 'weight': 0}]}
        for i in range(9)
    ]
    with pytest.raises(
        DataError, match=r'no example is left .* 9 dropped: nothing in it is trained \(the first at .*:1\)'
    ):
        prepare(write(tmp_path / 'rows.jsonl', rows), tmp_path / 'out')


def test_a_source_that_is_different_in_every_row_is_refused(tmp_path):
    rows = [row | {'source': str(i)} for i, row in enumerate(rows_of(300))]
    path = write(tmp_path / 'rows.jsonl', rows)
    with pytest.raises(DataError, match=r'more than 256 values.*--fields=source:'):
        prepare(path, tmp_path / 'out')
    prepare(path, tmp_path / 'out', names={'source': ''})
    assert {source for source, *_ in texts(tmp_path / 'out')} == {'rows'}


# ---- what is left out, and what is cut


def test_what_teaches_nothing_is_left_out_and_counted_with_the_first_place(tmp_path):
    rows = [
        *rows_of(20),
        {'question': 'q', 'answer': ''},
        {'question': 'q', 'answer': None},
        {'question': ' ', 'answer': 'a'},
        {'messages': turns('q')},
        {'messages': []},
        {'messages': turns('q', 'a', 'q', '  ')},
        {'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': '', 'tool_calls': [CALL]}]},
        {'question': 'long ' * 100, 'answer': 'a'},
    ]
    path = write(tmp_path / 'rows.jsonl', rows)
    meta, report = prepare(path, tmp_path / 'out', max_tokens=100)
    assert meta['dropped'] == 8 and meta['train_examples'] + meta['val_examples'] == 20
    lines = '\n'.join(report.drops.lines())
    for n, why, line in (
        (3, 'an empty answer', 21),
        (2, 'no answer at its end', 24),
        (1, 'an empty question', 23),
        (1, '--template=qa has no place for tool calls', 27),
        (1, 'longer than 100 tokens', 28),
    ):
        assert f'{n} dropped: {why} (the first at {path}:{line})' in lines


def test_a_cut_example_has_no_end_of_text_and_one_without_an_answer_left_is_dropped(tmp_path):
    rows = [*rows_of(5), {'question': 'q', 'answer': 'long ' * 50}, {'question': 'long ' * 50, 'answer': 'a'}]
    meta, report = prepare(write(tmp_path / 'rows.jsonl', rows), tmp_path / 'out', max_tokens=60, too_long='truncate')
    assert meta['truncated'] == 1 and meta['dropped'] == 1
    assert 'no answer within the first 60 tokens' in ''.join(report.drops.lines())
    (cut,) = [
        (ids, trained) for split in common.SPLITS for _, ids, trained in read(tmp_path / 'out', split) if len(ids) == 60
    ]
    assert 256 not in cut[0] and cut[1][-1] == 1 and meta['longest'] == 60


def test_two_questions_in_a_row_are_kept_where_the_template_has_them(tmp_path):
    rows = [{'messages': [*turns(f'{i}'), *turns('b', 'c')]} for i in range(4)]
    meta, _ = prepare(write(tmp_path / 'rows.jsonl', rows), tmp_path / 'out')
    assert meta['dropped'] == 0
    refuses = tmp_path / 'refuses.jinja'
    refuses.write_text(
        "{% if messages[1:] and messages[1].role == 'user' %}{{ raise_exception('twice') }}{% endif %}"
        '{{ messages[0].content }}'
    )
    with pytest.raises(DataError, match=r'4 dropped: .*refuses\.jinja cannot write this conversation: twice'):
        prepare(tmp_path / 'rows.jsonl', tmp_path / 'out', template=str(refuses))


# ---- duplicates


def test_duplicates_are_counted_exact_near_and_across_splits():
    seen = Duplicates()
    text = 'Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. ' * 2
    seen.add(text, 'train')
    seen.add('  ' + text.upper().replace(' ', '\n'), 'val')
    assert (seen.exact, seen.near, seen.across) == (1, 0, 1)
    seen.add(text.replace('48', '50'), 'train')
    assert (seen.exact, seen.near, seen.across) == (1, 1, 1)
    for other in (
        'Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting.',
        'hi',
        'ho',
        '',
        '東京',
    ):
        seen.add(other, 'train')
    assert (seen.exact, seen.near, seen.across) == (1, 1, 1)


def test_near_is_what_jaccard_says_of_the_pieces():
    """Against the sets of pieces themselves, for texts that share from none to all of their words."""
    draw, words = np.random.default_rng(1), [f'word{i}' for i in range(400)]
    wrong = 0
    for trial in range(200):
        keep = trial / 200
        one = draw.choice(words, 60)
        other = np.where(draw.random(60) < keep, one, draw.choice(words, 60))
        seen = Duplicates()
        for text in (one, other):
            seen.add(' '.join(text), 'train')
        a, b = ({t[i : i + 8] for i in range(len(t) - 7)} for t in (' '.join(one), ' '.join(other)))
        jaccard = len(a & b) / len(a | b)
        wrong += (seen.near == 1 and jaccard < 0.65) or (seen.near + seen.exact == 0 and jaccard > 0.92)
    assert wrong == 0


# ---- what is printed


def test_the_report_shows_an_example_with_its_trained_tokens_marked_and_a_table(tmp_path, model):
    rows = [row | {'source': 'ab'[i % 2]} for i, row in enumerate(rows_of(40))]
    path = write(tmp_path / 'rows.jsonl', [*rows, {'question': 'q', 'answer': ''}])
    out, unicode = tmp_path / 'out', os.environ | {'PYTHONIOENCODING': 'utf-8'}
    done = run('instruct', f'--input={path}', f'--tokenizer={model}', f'--out_dir={out}', env=unicode)
    assert '<|im_start|>assistant\n⟦It is 0.<|im_end|>⟧\n' in done.stdout and '\033' not in done.stdout
    table = next(line for line in done.stdout.splitlines() if line.startswith('all '))
    assert table.split()[1:4] == [
        '40',
        f'{sum(len(i) for s in common.SPLITS for _, i, _ in read(out, s)):,}',
        f'{sum(sum(t) for s in common.SPLITS for _, _, t in read(out, s)):,}',
    ]
    assert f'1 dropped: an empty answer (the first at {path}:41)' in done.stdout
    values = dict(line.split(': ', 1) for line in done.stdout.splitlines()[-20:] if ': ' in line)
    assert int(values['train_examples']) + int(values['val_examples']) == 40 and values['dropped'] == '1'
    assert {'duplicates', 'near_duplicates', 'train_trained', 'longest', 'written'} <= {*values}
    done = run(
        'instruct',
        f'--input={path}',
        f'--tokenizer={model}',
        f'--out_dir={out}',
        env=os.environ | {'PYTHONIOENCODING': 'ascii'},
    )
    assert '[[It is 0.<|im_end|>]]' in done.stdout


def test_a_long_example_is_shown_without_its_middle_and_no_escape_sequence_reaches_the_terminal():
    tok = tokenizer.Bytes()
    shown = examples.marked(tok, [*tok.encode('a' * 3000 + '\x1b[2J'), 256], [False] * 3004 + [True])
    assert len(shown) < 1700 and ' characters ... aaa' in shown and '<|endoftext|>' in shown
    assert '\x1b' not in shown


# ---- gsm8k and mathinstruct


def test_gsm8k_keeps_train_and_test_apart(tmp_path, model):
    for name, start in (('train', 0), ('test', 50)):
        rows = [{'question': f'How many are {start + i}?', 'answer': f'<<{i}={i}>>{i}\n#### {i}'} for i in range(9)]
        write(tmp_path / f'{name}.jsonl', rows)
    (tmp_path / 'README.md').write_text('x')
    done = run('gsm8k', f'--input={tmp_path}', '--tokenizer=bytes', '--template=qa', f'--out_dir={tmp_path / "out"}')
    assert done.returncode == 0, done.stderr
    train, val = texts(tmp_path / 'out'), texts(tmp_path / 'out', 'val')
    wanted = [f'Question: How many are {50 + i}?\nAnswer: <<{i}={i}>>{i}\n#### {i}<|endoftext|>' for i in range(9)]
    assert [text for _, text, _ in val] == wanted and len(train) == 9
    assert train[3] == (
        'gsm8k',
        'Question: How many are 3?\nAnswer: <<3=3>>3\n#### 3<|endoftext|>',
        ' <<3=3>>3\n#### 3<|endoftext|>',
    )


@pytest.mark.parametrize(
    ('names', 'says'),
    [
        (['train.jsonl'], 'holds no file named test.jsonl'),
        (['train.jsonl', 'other.jsonl'], 'says neither train nor test in its name'),
        (['train.jsonl', 'test.jsonl'], r'is not in the format of GSM8K: it lacks answer'),
    ],
)
def test_gsm8k_says_what_is_wrong_with_local_files(tmp_path, names, says):
    for name in names:
        write(tmp_path / name, [{'question': 'q'}])
    with pytest.raises(DataError, match=says):
        list(gsm8k.rows_of([str(tmp_path / name) for name in names])())


def test_mathinstruct_has_alpacas_prompt_and_its_sources(tmp_path):
    rows = [
        {'source': f'data/{"CoT" if i % 2 else "PoT"}/x.json', 'instruction': f'{i}?', 'output': f'{i}.'}
        for i in range(40)
    ]
    path = tmp_path / 'MathInstruct.json'
    path.write_text(json.dumps([*rows, {'source': 's', 'instruction': 'q', 'output': ''}]))
    done = run('mathinstruct', f'--input={path}', '--tokenizer=bytes', f'--out_dir={tmp_path / "out"}')
    assert done.returncode == 0 and '1 dropped: an empty answer' in done.stdout, done.stderr
    found = texts(tmp_path / 'out')
    assert {source for source, *_ in found} == {'data/CoT/x.json', 'data/PoT/x.json'}
    begin = (
        'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n'
    )
    assert all(
        text.startswith(begin + '### Instruction:\n') and f'### Response:{answer}' in text for _, text, answer in found
    )
    with pytest.raises(DataError, match='is not in the format of MathInstruct: it lacks output'):
        list(mathinstruct.rows_of([str(write(tmp_path / 'x.jsonl', [{'source': 's', 'instruction': 'q'}]))])())


def test_without_local_files_the_hub_is_asked_for_the_published_sets(tmp_path, monkeypatch):
    """A hub that holds two splits of GSM8K and MathInstruct, and what it was asked for."""
    import datasets
    import huggingface_hub

    asked, rows = (
        [],
        [
            {'question': f'{i}?', 'answer': f'{i}', 'source': 's', 'instruction': f'{i}?', 'output': ''}
            for i in range(6)
        ],
    )

    def load(name, config, split):
        asked.append((name, config, split))
        kept = ('question', 'answer') if 'gsm8k' in name else ('source', 'instruction', 'output')
        found = [row | {'question': f'{split} {row["question"]}', 'output': row['instruction']} for row in rows]
        return datasets.Dataset.from_list([{key: row[key] for key in kept} for row in found])

    monkeypatch.setattr(datasets, 'load_dataset', load)
    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', lambda self, name, timeout: None)
    examples.prepare(tmp_path / 'g', gsm8k.rows_of(None), 'test', 'bytes', 'qa')
    assert {*asked} == {('openai/gsm8k', 'main', 'train'), ('openai/gsm8k', 'main', 'test')}
    assert [text.split()[1] for _, text, _ in texts(tmp_path / 'g')] == ['train'] * 6
    assert [text.split()[1] for _, text, _ in texts(tmp_path / 'g', 'val')] == ['test'] * 6
    asked.clear()
    examples.prepare(tmp_path / 'm', mathinstruct.rows_of(None), 'test', 'bytes', 'alpaca')
    assert {*asked} == {('TIGER-Lab/MathInstruct', None, 'train')} and len(texts(tmp_path / 'm')) == 5


@pytest.mark.parametrize('script', ['gsm8k', 'mathinstruct'])
def test_without_a_network_the_alternative_is_named_at_once(tmp_path, script):
    words = ['--tokenizer=bytes', '--template=qa', f'--out_dir={tmp_path / "out"}']
    done = run(script, *words, env=os.environ | {'HF_HUB_OFFLINE': '1'})
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith('error: could not read') and f'data/{script}/prepare.py --input=FILES' in done.stderr
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('script', ['instruct', 'gsm8k', 'mathinstruct'])
def test_help_shows_the_launch_card_and_no_empty_out_dir_is_taken(script):
    done = run(script, '--help')
    assert done.returncode == 0 and f'python data/{script}/prepare.py' in done.stdout and '--max_tokens' in done.stdout
    done = run(script, '--input=x', '--tokenizer=bytes', '--out_dir=')
    assert done.returncode == 2 and 'argument --out_dir: it is empty' in done.stderr
    for wrong in ('0', 'x', '1e3', '-5'):
        done = run(script, '--input=x', '--tokenizer=bytes', f'--max_tokens={wrong}')
        assert done.returncode == 2 and 'is no number of tokens' in done.stderr


def test_a_parquet_table_that_is_cut_off_is_named(tmp_path):
    (tmp_path / 'a.parquet').write_bytes(b'PAR1 and no more')
    with pytest.raises(DataError, match=r'a\.parquet is a broken Parquet table'):
        list(files.rows(tmp_path / 'a.parquet'))
