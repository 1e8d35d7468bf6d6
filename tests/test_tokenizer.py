"""What tokenizer.py promises: any text comes back, two libraries agree on the ids, streams never break a character."""

import json
import random

import pytest
import tokenizers

from data import tokenizer

CORPUS = [
    'def encode(self, text):\n    return self.encoder.encode(text)\n',
    'class Encoder:\n    def __init__(self, *args, **kwargs):\n        self.encoder = None\n',
    'Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 東京 東京 😀😀',
] * 3
TEXTS = [
    '',
    ' ',
    'a',
    '\n\n\n',
    '    \t\t  \r\n\r\n   x',
    'if x == 10**12:\n\treturn f"{x:>8}"  # don\'t I\'LL\n',
    'é e\u0301 漢字 한글 हिन्दी العربية \u200d👩\u200d👩\u200d👧 🏳️\u200d🌈 \x00\x7f\ufeff\ufffd\U0010ffff',
    'the text <|endoftext|> is only text',
    ' ' * 300 + 'x' + '\n' * 300 + '\t ' * 200,
    '1234567890' * 3 + ' ½ ² Ⅷ ٣',
    '_' * 100 + '-=' * 100,
]


@pytest.fixture(scope='module')
def bpe():
    return tokenizer.train_bpe(CORPUS, 350)


def random_texts(n=2000):
    rnd = random.Random(0)
    alphabet = [
        'self',
        'en',
        'cod',
        'e',
        'r',
        ' ',
        '    ',
        '\n',
        '\r\n',
        '\t',
        '1',
        '00',
        '_',
        '.',
        "'s",
        'ö',
        '東',
        '京',
        '😀',
        '\u0301',
    ]
    return [''.join(rnd.choices(alphabet, k=rnd.randrange(40))) for _ in range(n)]


def test_tiktoken_and_tokenizers_give_the_same_ids_from_one_file(bpe, tmp_path):
    path = tmp_path / 'tokenizer.json'
    path.write_text(bpe.json, encoding='utf-8')
    hf = tokenizers.Tokenizer.from_file(str(path))
    hf.encode_special_tokens = True
    for text in TEXTS + CORPUS + random_texts():
        assert bpe.encode(text) == hf.encode(text, add_special_tokens=False).ids, text


def test_both_libraries_split_every_unicode_character_alike(bpe):
    hf = tokenizers.Tokenizer.from_str(bpe.json)
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    # 4,096 characters a text, each between a letter and a space: where they differ in category, a split would move.
    texts = [''.join(f'a{c}1 {c}' for c in characters[n : n + 4096]) for n in range(0, len(characters), 4096)]
    for ours, theirs in zip(bpe.encode_batch(texts), hf.encode_batch_fast(texts, add_special_tokens=False)):
        assert ours == theirs.ids


def test_decode_gives_back_what_was_encoded(bpe):
    for tok in (bpe, tokenizer.Bytes()):
        for text in TEXTS + random_texts(200):
            assert tok.decode(tok.encode(text)) == text


def test_encode_batch_is_encode_of_each(bpe, tmp_path):
    (tmp_path / 'tokenizer.json').write_text(bpe.json, encoding='utf-8')
    for tok in (bpe, tokenizer.Bytes(), tokenizer.load(tmp_path)):
        assert tok.encode_batch(TEXTS) == [tok.encode(text) for text in TEXTS]


def test_a_text_cannot_smuggle_in_the_end_of_text_id(bpe, tmp_path):
    (tmp_path / 'tokenizer.json').write_text(bpe.json, encoding='utf-8')
    for tok in (bpe, tokenizer.Bytes(), tokenizer.load(tmp_path)):
        assert tok.eot not in tok.encode('a<|endoftext|>b')
        assert tok.decode([*tok.encode('a'), tok.eot]) == 'a<|endoftext|>'


def test_the_vocabulary_holds_the_end_of_text_all_bytes_and_no_hole(bpe):
    assert bpe.eot == 0
    assert bpe.vocab_size == 350
    assert sorted(bpe.decode_bytes([i]) for i in range(1, 257)) == [bytes([b]) for b in range(256)]
    assert all(bpe.decode_bytes([i]) for i in range(350))


def test_training_twice_gives_the_same_file(bpe):
    assert tokenizer.train_bpe(iter(CORPUS), 350).json == bpe.json


def test_a_million_spaces_do_not_overflow_the_regex_stack(bpe):
    assert bpe.decode(bpe.encode(' ' * 10**6 + 'x')) == ' ' * 10**6 + 'x'


@pytest.mark.parametrize('kind', ['bytes', 'bpe', 'hf'])
def test_a_stream_joins_to_the_text_and_never_shows_half_a_character(bpe, tmp_path, kind):
    (tmp_path / 'tokenizer.json').write_text(bpe.json, encoding='utf-8')
    tok = {'bytes': tokenizer.Bytes(), 'bpe': bpe, 'hf': tokenizer.load(tmp_path)}[kind]
    text = 'a漢字b 😀 Boxkämpfer\n'
    pieces = list(tok.decode_stream(iter(tok.encode(text))))
    assert len(pieces) > 5
    assert ''.join(pieces) == text
    assert all('\ufffd' not in piece for piece in pieces)
    # Cut inside the last character: the part that is there is shown at the end, as the replacement character.
    broken = tok.encode('ab🎈')[:-1]
    assert ''.join(tok.decode_stream(broken)).startswith('ab\ufffd')


def test_a_stream_of_a_tokenizer_without_bytes_joins_to_the_same_text(tmp_path):
    # As T5's: words with a leading '▁', whose first one loses it, and an unknown token.
    hf = tokenizers.Tokenizer(tokenizers.models.Unigram())
    hf.pre_tokenizer, hf.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, special_tokens=['</s>', '<unk>'], unk_token='<unk>', show_progress=False
    )
    hf.train_from_iterator(CORPUS, trainer)
    hf.save(str(tmp_path / 'tokenizer.json'))
    tok = tokenizer.load(tmp_path)
    assert tok.eot == 0
    ids = tok.encode('def encode the text, self.encoder')
    assert ''.join(tok.decode_stream(ids)) == tok.decode(ids) == 'def encode the text, self.encoder'


def test_ids_beyond_the_vocabulary_decode_to_a_replacement_character(bpe):
    # A model's head may be padded to a multiple of 64, and an untrained model samples from all of it.
    assert bpe.decode([bpe.encode('a')[0], 100_000]) == 'a\ufffd'


def test_load_finds_each_kind_from_meta_json(bpe, tmp_path):
    meta, path = tmp_path / 'meta.json', tmp_path / 'tokenizer.json'
    meta.write_text(json.dumps({'tokenizer': 'bytes'}))
    assert tokenizer.load(tmp_path).kind == 'bytes'
    path.write_text(bpe.json, encoding='utf-8')
    meta.write_text(json.dumps({'tokenizer': 'bpe'}))
    assert tokenizer.load(tmp_path).kind == 'bpe'
    meta.write_text(json.dumps({'tokenizer': 'hf', 'eot': 7}))
    assert tokenizer.load(tmp_path).kind == 'hf'
    assert tokenizer.load(tmp_path).eot == 7


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('config.json', {'eos_token_id': 5}),
        ('config.json', {'eos_token_id': [5, 6]}),
        ('generation_config.json', {'eos_token_id': 5}),
        ('tokenizer_config.json', {'eos_token': '$'}),
        ('tokenizer_config.json', {'eos_token': {'content': '$'}}),
        ('config.json', {'eos_token_id': None}),
        ('config.json', {'eos_token_id': 10**6}),
    ],
)
def test_the_end_of_text_of_a_published_tokenizer_is_found(bpe, tmp_path, name, content):
    (tmp_path / 'tokenizer.json').write_text(bpe.json, encoding='utf-8')
    (tmp_path / name).write_text(json.dumps(content))
    dollar = json.loads(bpe.json)['model']['vocab']['$']
    expected = {'config.json': 5, 'generation_config.json': 5, 'tokenizer_config.json': dollar}[name]
    if content.get('eos_token_id', 5) in (None, 10**6):
        expected = 0  # nothing usable is written: the common name <|endoftext|> is taken
    assert tokenizer.load(tmp_path).eot == expected


def test_truncation_and_padding_of_a_published_file_are_ignored(bpe, tmp_path):
    hf = tokenizers.Tokenizer.from_str(bpe.json)
    hf.enable_truncation(4)
    hf.enable_padding(length=8)
    hf.save(str(tmp_path / 'tokenizer.json'))
    tok = tokenizer.load(tmp_path)
    assert len(tok.encode('x y z ' * 100)) > 100
    assert len(tok.encode_batch(['x'])[0]) == 1


def test_transformers_reads_our_file_and_agrees(bpe, tmp_path):
    transformers = pytest.importorskip('transformers')
    (tmp_path / 'tokenizer.json').write_text(bpe.json, encoding='utf-8')
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'llama', 'eos_token_id': 0}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[1:7]:
        assert theirs(text)['input_ids'] == bpe.encode(text)
        assert theirs.decode(bpe.encode(text)) == text


@pytest.mark.parametrize(
    ('files', 'error', 'says'),
    [
        ({}, FileNotFoundError, 'run the prepare.py'),
        ({'meta.json': '{"tokenizer": "bpe"}'}, FileNotFoundError, 'no tokenizer.json'),
        ({'meta.json': '{'}, ValueError, 'not valid JSON'),
        ({'meta.json': '{"tokenizer": "magic"}', 'tokenizer.json': '{}'}, ValueError, "unknown tokenizer 'magic'"),
        ({'meta.json': '{"tokenizer": "bpe"}', 'tokenizer.json': '{}'}, ValueError, 'prepare the data again'),
        ({'tokenizer.json': '{}'}, ValueError, 'not a tokenizer'),
        ({'meta.json': '{"tokenizer": "tiktoken:magic"}'}, ValueError, 'no encoding'),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(tmp_path, files, error, says):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=says):
        tokenizer.load(tmp_path)


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match='at least 257'):
        tokenizer.train_bpe(CORPUS, 256)
