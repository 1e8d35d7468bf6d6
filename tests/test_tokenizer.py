"""What tokenizer.py promises: any text comes back, two libraries agree on the ids, streams never break a character."""

import json
import random
import time

import pytest
import tokenizers

from data import bpe as bpe_file
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


@pytest.mark.parametrize('vocab_size', [-1, 256, 99999999999])
def test_a_vocabulary_that_cannot_be_is_refused(vocab_size):
    with pytest.raises(tokenizer.TokenizerError, match='need at least 257, and no model has more than'):
        tokenizer.train_bpe(CORPUS, vocab_size)


# ---- special tokens: never in a document, always in a prompt


def published(folder, single='<s> $A', special=('<unk>', '<s>', '</s>', '<|user|>'), pieces=False):
    """A tokenizer.json of a stranger: byte-level, or of pieces with a space before each text, as SentencePiece's."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='<unk>'))
    if pieces:
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        bpe.decoder = tokenizers.decoders.Metaspace()
    else:
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=[*special], initial_alphabet=alphabet)
    bpe.train_from_iterator(CORPUS, trainer)
    ids = [(token, i) for i, token in enumerate(special)]
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=ids)
    bpe.save(str(folder / 'tokenizer.json'))
    return tokenizer.load(folder)


def test_a_prompt_has_special_tokens_and_a_document_has_none(bpe, tmp_path):
    text = 'the text <|endoftext|>\n'
    for tok, end in ((tokenizer.Bytes(), 256), (bpe, 0), (published(tmp_path, special=('<unk>', '<|endoftext|>'),
                                                                    single='$A'), 1)):  # fmt: skip
        assert tok.prompt(text) == [*tok.encode('the text '), end, *tok.encode('\n')]
        assert end not in tok.encode(text)


@pytest.mark.parametrize(('single', 'bos'), [('$A', []), ('<s> $A', [1]), ('<s> <|user|> $A </s>', [1, 3])])
def test_a_text_begins_with_what_the_post_processor_asks_for(tmp_path, single, bos):
    tok = published(tmp_path, single)
    assert tok.bos == bos
    assert tok.prompt('self') == bos + tok.encode('self')
    assert tok.vocab_size > max(bos, default=0)


def test_what_begins_a_text_is_found_for_a_tokenizer_that_does_not_know_every_text(tmp_path):
    hf = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<s>': 0, 'word': 1}, unk_token='<none>'))
    hf.add_special_tokens(['<s>'])
    hf.post_processor = tokenizers.processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
    hf.save(str(tmp_path / 'tokenizer.json'))
    assert tokenizer.load(tmp_path).prompt('word') == [0, 1]
    with pytest.raises(tokenizer.TokenizerError, match='cannot encode the text'):
        tokenizer.load(tmp_path).prompt('another')


def test_a_stream_goes_on_from_its_prompt_and_leaves_special_tokens_out(bpe, tmp_path):
    tok = published(tmp_path, pieces=True)
    prompt, more = tok.prompt('def'), [*tok.encode('encode self'), 2]
    assert ''.join(tok.decode_stream(more)) == 'encode self'  # the first token of a text lost its space
    assert ''.join(tok.decode_stream(more, prompt)) == ' encode self'
    assert ''.join(bpe.decode_stream([*bpe.encode('x'), bpe.eot, *bpe.encode('y')])) == 'xy'


def test_single_bytes_wait_for_the_whole_of_their_run(tmp_path):
    tok = published(tmp_path, special=('<unk>', '<s>', '</s>', '<|user|>', '<0x0C>', '<0xE6>'), pieces=True)
    tok.special -= {4, 5}
    tok.hf.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    ids = [4, 5, tok.hf.token_to_id('s'), 4]
    assert list(tok.decode_stream(ids)) == ['\ufffd\ufffds', '\x0c']  # two bytes that are no UTF-8 together
    assert ''.join(tok.decode_stream(ids)) == tok.decode(ids)


@pytest.mark.parametrize(
    ('files', 'ends'),
    [
        ({}, [2]),  # '</s>', by its name
        ({'config.json': 3}, [3]),
        ({'config.json': [3, 1]}, [3, 1]),
        ({'config.json': 3, 'generation_config.json': [1, -1, 0]}, [1, 0]),
        ({'config.json': 3, 'generation_config.json': None}, [3]),
        ({'config.json': 3, 'generation_config.json': 1, 'meta.json': 2}, [1, 2]),  # what our documents end with
    ],
)
def test_all_tokens_that_a_folder_names_end_a_text(tmp_path, files, ends):
    for name, eos in files.items():
        (tmp_path / name).write_text(json.dumps({'eos_token_id': eos, 'eot': eos}))
    assert tokenizer.ends(tmp_path, published(tmp_path) if 'meta.json' not in files else loaded(tmp_path, 2)) == ends


def loaded(folder, eot):
    published(folder)
    return tokenizer.HF(folder / 'tokenizer.json', eot)


# ---- the same tokenizer


def written_anew(saved, version):
    """The content of tokenizer.json as other versions of the libraries write it."""
    model, added = saved['model'], saved['added_tokens']
    if version == 'merges as texts':
        model['merges'] = [' '.join(pair) for pair in model['merges']]
    if version == 'in another order, with other defaults':
        model['vocab'] = dict(reversed(model['vocab'].items()))
        model |= {'ignore_merges': True, 'byte_fallback': None, 'fuse_unk': None}
        saved |= {'normalizer': {'type': 'NFC'}, 'truncation': None, 'version': '2.0'}
    if version == 'special tokens among the added ones only':
        for token in added:
            model['vocab'].pop(token['content'])
    if version == 'a padding token more':
        added.append(added[0] | {'content': '<pad>', 'id': len(model['vocab'])})
    if version == 'another id':
        model['vocab']['a'], model['vocab']['b'] = model['vocab']['b'], model['vocab']['a']
    if version == 'another merge':
        model['merges'].reverse()
    if version == 'a token less':
        model['vocab'].pop('\u0120self')
    if version == 'an added token in the place of another':
        added[0] |= {'content': '<pad>'}
        model['vocab'].pop('<unk>')
    return saved


@pytest.mark.parametrize(
    ('version', 'same'),
    [
        ('merges as texts', True),
        ('in another order, with other defaults', True),
        ('special tokens among the added ones only', True),
        ('a padding token more', True),
        ('another id', False),
        ('another merge', False),
        ('a token less', False),
        ('an added token in the place of another', False),
    ],
)
def test_a_tokenizer_saved_by_another_version_is_the_same(tmp_path, version, same):
    published(tmp_path)
    first = tokenizer.identity(tmp_path)
    path = tmp_path / 'tokenizer.json'
    path.write_text(json.dumps(written_anew(json.loads(path.read_text()), version)))
    other = tokenizer.identity(tmp_path)
    assert tokenizer.same(first, other) == tokenizer.same(other, first) == same
    assert tokenizer.same(first, first) and not tokenizer.same(first, 'bytes') and not tokenizer.same(first, None)


def test_transformers_saves_the_same_tokenizer(tmp_path):
    transformers = pytest.importorskip('transformers')
    published(tmp_path)
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'pad_token': '<pad>', 'bos_token': '<s>'}))
    transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path / 'again')
    one, other = (tmp_path / 'tokenizer.json').read_text(), (tmp_path / 'again/tokenizer.json').read_text()
    assert one != other and '<pad>' in other
    assert tokenizer.same(tokenizer.identity(tmp_path), tokenizer.identity(tmp_path / 'again'))


# ---- what takes long


def test_a_tokenizer_that_does_not_come_to_an_end_is_left_behind(monkeypatch):
    monkeypatch.setattr(tokenizer, 'PATIENCE', 0.05)
    with pytest.raises(tokenizer.TokenizerError, match=r'regular expression .* did not come to an end in 0 s'):
        tokenizer.in_time(lambda: time.sleep(1), 10)
    assert tokenizer.in_time(lambda: 'ids', 10) == 'ids'


def test_a_panic_of_the_library_is_a_sentence(tmp_path):
    published(tmp_path)
    saved = json.loads((tmp_path / 'tokenizer.json').read_text())
    saved['pre_tokenizer'] = {'type': 'Split', 'pattern': {'Regex': '(a+)+$'}, 'behavior': 'Isolated', 'invert': False}
    (tmp_path / 'tokenizer.json').write_text(json.dumps(saved))
    with pytest.raises(tokenizer.TokenizerError, match=r'cannot encode the text \(.*retry-limit'):
        tokenizer.load(tmp_path).encode('a' * 28 + '!')


@pytest.mark.parametrize('pattern', ['(a+)+$', r'\p{L}+|\s+', '(', ''])
def test_a_pattern_that_leaves_out_text_or_does_not_parse_is_refused(bpe, pattern):
    saved = json.loads(bpe.json)
    saved['pre_tokenizer']['pretokenizers'][0]['pattern']['Regex'] = pattern
    with pytest.raises(tokenizer.TokenizerError, match='is not one that train_bpe wrote'):
        tokenizer.from_bpe(json.dumps(saved))


def test_training_on_one_long_line_of_letters_does_not_take_the_square_of_its_length():
    letters = ''.join(random.Random(0).choices('ACGT', k=100_000))
    begin = time.process_time()
    tok = tokenizer.train_bpe([letters, '\n' * 100_000], 1000)
    assert time.process_time() - begin < 3  # 6 s and more if the line is one word
    assert tok.vocab_size == 1000 and tok.decode(tok.encode(letters)) == letters
    pieces = [*bpe_file.short_runs(['a b' * 1000, letters, 'x\n' + '\r\n' * 1000])]
    assert ''.join(pieces) == 'a b' * 1000 + letters + 'x\n' + '\r\n' * 1000
    assert pieces[0] == 'a b' * 1000 and max(map(len, pieces[1:])) < 2 * bpe_file.LONGEST
