"""
Text to token ids and back. `load(folder)` reads what data/NAME/prepare.py wrote, or any folder with a tokenizer.json:

    tok = tokenizer.load('data/pystdlib')
    tok.encode('def f(x):')       # [483, 287, ...], never a special token: '<|endoftext|>' in a text is plain text
    tok.decode(ids)               # incomplete characters become U+FFFD
    tok.vocab_size, tok.eot       # number of ids, and the one that ends a document (None if there is none)

Four kinds: 'bytes' (no training, no file), 'bpe' (ours, trained on your text by train_bpe), 'tiktoken:NAME' (gpt2,
cl100k_base, ...) and 'hf' (any published tokenizer.json). Our BPE is saved in the Hugging Face format, so that
transformers can read it, but run by tiktoken, which encodes three times faster; the tests check that both give the same
ids.
"""

import codecs
import os

from data import fields

EOT = '<|endoftext|>'


class TokenizerError(ValueError):
    """A tokenizer that cannot be read or made; the message says what to do."""


ID, ADVICE = fields.whole(0, fields.ROWS - 1), 'fetch or make it again'
META = {'tokenizer': fields.text(default='hf'), 'eot': fields.maybe(ID)}
# Of config.json, generation_config.json and tokenizer_config.json: an id, several, or a name, alone or in an object.
EOT_FIELDS = {
    'eos_token_id': fields.maybe(fields.either(fields.whole(-1, 2**31), fields.several(fields.whole(-1, 2**31)))),
    'eos_token': fields.maybe(fields.either(fields.text(), fields.table())),
}


# GPT-4's pattern with two changes: digits in groups of two, since a small vocabulary has no room for all groups of
# three, and whitespace in runs of at most 128, since an unbounded \s+ overflows tiktoken's regex stack on a file with a
# million spaces.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s{0,128}[\r\n]+|\s{1,128}(?!\S)|\s{1,128}'
)


class Bytes:
    """UTF-8 bytes, and one extra id for the end of a text. Also the base class of the other byte-level kinds."""

    kind, json, vocab_size, eot = 'bytes', None, 257, 256

    def encode(self, text):
        return list(text.encode('utf-8', 'replace'))

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids):
        return b''.join(bytes([i]) if i < 256 else EOT.encode() for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def decode_stream(self, ids):
        """Yield text as the ids arrive; a character that spans several ids waits for the last of them."""
        decoder = codecs.getincrementaldecoder('utf-8')('replace')
        for i in ids:
            if piece := decoder.decode(self.decode_bytes([i])):
                yield piece
        if piece := decoder.decode(b'', final=True):
            yield piece


class Tiktoken(Bytes):
    """Any byte-level BPE that tiktoken can run: its own encodings, and ours."""

    def __init__(self, encoding, kind, json=None):
        self.encoding, self.kind, self.json = encoding, kind, json
        self.vocab_size, self.eot = encoding.n_vocab, encoding._special_tokens.get(EOT)

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts):
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())

    def decode_bytes(self, ids):
        return b''.join(self._bytes_of(int(i)) for i in ids)

    def _bytes_of(self, i):
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:  # a head may be padded beyond the vocabulary, and an untrained model samples such ids
            return '\ufffd'.encode()


class HF:
    """Any tokenizer.json, run by `tokenizers`. That decodes to text, not bytes, so the stream compares prefixes."""

    kind = 'hf'

    def __init__(self, path, eot=None):
        import tokenizers

        self.json = fields.read_text(path, TokenizerError, ADVICE)
        try:
            self.hf = tokenizers.Tokenizer.from_str(self.json)
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # the library raises bare Exceptions, and panics, which are no Exceptions
            raise TokenizerError(f'{path} is not a tokenizer that the tokenizers library can read ({e})') from e
        # Published files often set truncation to 512 tokens, which would silently cut the training documents.
        self.hf.no_truncation()
        self.hf.no_padding()
        self.hf.encode_special_tokens = True  # True means: encode their names as plain text
        vocab = self.hf.get_vocab(with_added_tokens=True)
        if not 0 <= max(vocab.values(), default=-1) < fields.ROWS:
            raise TokenizerError(f'{path} has no tokens, or ids of {fields.ROWS:,} and more: {ADVICE}')
        self.eot = find_eot(os.path.dirname(path), self.hf, max(vocab.values()) + 1) if eot is None else eot
        # Only ids that text can produce: not T5's 100 sentinels at the end, which the paper's 32,000 rows leave out.
        special = {token.content for token in self.hf.get_added_tokens_decoder().values() if token.special}
        self.vocab_size = max([0, *(i for name, i in vocab.items() if name not in special or i == self.eot)]) + 1

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        try:
            return [e.ids for e in self.hf.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as e:  # it may lack the token for what is unknown, which it needs only now
            raise TokenizerError(f'this tokenizer.json cannot encode the text ({e}): {ADVICE}') from e

    def decode(self, ids):
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_stream(self, ids):
        """Decode with the last finished piece as context: many decoders treat the first token of a text differently."""
        context, fresh = [], []
        for i in ids:
            fresh.append(int(i))
            text = self.decode(context + fresh)
            if not text.endswith('\ufffd'):
                if piece := text[len(self.decode(context)) :]:
                    yield piece
                context, fresh = fresh, []
        if fresh and (piece := self.decode(context + fresh)[len(self.decode(context)) :]):
            yield piece


def find_eot(folder, hf, vocab_size):
    """The end-of-text id of a published tokenizer: it may be written in any of three files, as an id or as a name."""
    for name in ('config.json', 'generation_config.json', 'tokenizer_config.json'):
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            continue
        config = read_json(path, EOT_FIELDS)
        eot, token = config.get('eos_token_id'), config.get('eos_token')
        if isinstance(eot, list):  # LLaMA 3: end of text first, then the end-of-turn ids
            eot = eot[0] if eot else None
        if isinstance(token, dict):
            fields.check(token, {'content': fields.text()}, f'{path}, eos_token', TokenizerError, ADVICE)
            token = token['content']
        if eot is None and token:
            eot = hf.token_to_id(token)
        if eot is not None and 0 <= eot < vocab_size:
            return eot
    names = (EOT, '<|end_of_text|>', '</s>', '<eos>', '<|im_end|>', '[SEP]')
    return next((i for i in map(hf.token_to_id, names) if i is not None), None)


def read_json(path, table=()):
    return fields.read(path, dict(table), TokenizerError, ADVICE)


def from_tiktoken(name):
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except ValueError as e:
        names = ', '.join(tiktoken.list_encoding_names())
        raise TokenizerError(f'tiktoken has no encoding {name!r}: choose one of {names}') from e
    except OSError as e:  # requests' errors are OSErrors
        raise TokenizerError(
            f'tiktoken could not download {name!r} ({type(e).__name__}): '
            'connect once, or use --tokenizer=bpe or bytes, which are offline'
        ) from e
    return Tiktoken(encoding, f'tiktoken:{name}')


def from_bpe(text):
    """Our own tokenizer.json, given as text, run by tiktoken. Our ids are in merge order, so they are its ranks."""
    import tiktoken

    saved = fields.parse(text, 'tokenizer.json', TokenizerError, ADVICE)
    try:
        # The file's own pattern: PATTERN may have changed since.
        pattern = saved['pre_tokenizer']['pretokenizers'][0]['pattern']['Regex']
        specials = {token['content']: token['id'] for token in saved['added_tokens']}
        byte_of = byte_alphabet()
        ranks = {bytes(byte_of[c] for c in t): i for t, i in saved['model']['vocab'].items() if t not in specials}
        ids = [*ranks.values(), *specials.values()]
        if not all(map(ID.fits, ids)) or len(set(ids)) < len(ids):
            raise ValueError('an id that is none, or is of two tokens')
        if len({token for token in ranks if len(token) == 1}) < 256 or not pattern:
            raise ValueError('a byte that has no token, or no pattern')
        encoding = tiktoken.Encoding('bpe', pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    except Exception as e:
        raise TokenizerError(
            f'this tokenizer.json is not one that train_bpe wrote ({e!r}): prepare the data again'
        ) from e
    return Tiktoken(encoding, 'bpe', text)


def byte_alphabet():
    """GPT-2's map of characters to bytes: printable bytes are their own character, the others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}


def train_bpe(texts, vocab_size, path=None):
    """Train a byte-level BPE on an iterable of texts, save it as `path` (a tokenizer.json) if given, and return it.

    The end-of-text token is id 0, the 256 bytes are ids 1 to 256, so any text can be encoded. A pair seen only once is
    never merged, so a short text yields fewer ids than requested."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise TokenizerError(
            f'vocab_size={vocab_size} is too small: 256 bytes and the end-of-text token need at least 257'
        )
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), 'isolated')
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    text = bpe.to_str(pretty=True)
    if path is not None:
        with open(path, 'w', encoding='utf-8') as f:
            f.write(text)
    return from_bpe(text)


def load(folder):
    """The tokenizer of a prepared data folder, of a checkpoint, or of a published model's folder."""
    meta_path, json_path = os.path.join(folder, 'meta.json'), os.path.join(folder, 'tokenizer.json')
    meta = read_json(meta_path, META) if os.path.exists(meta_path) else {}
    kind = meta.get('tokenizer', 'hf')
    if kind == 'bytes':
        return Bytes()
    if kind.startswith('tiktoken:'):
        return from_tiktoken(kind.removeprefix('tiktoken:'))
    if not os.path.exists(json_path):
        missing = 'tokenizer.json' if meta else 'meta.json and no tokenizer.json'
        raise FileNotFoundError(
            f'{folder} has no {missing}: run the prepare.py of that data set, or name another folder'
        )
    if kind == 'bpe':
        return from_bpe(fields.read_text(json_path, TokenizerError, ADVICE))
    if kind == 'hf':
        return HF(json_path, meta.get('eot'))
    raise TokenizerError(
        f'{meta_path} names an unknown tokenizer {kind!r}: it should be bpe, bytes, tiktoken:NAME or hf'
    )


def files_of(*folders):
    """{name: bytes} of the tokenizer's files, to be saved beside weights; the first folder that has a file counts.

    Raises TokenizerError for a link that leaves its folder: what it points to might be anything on this machine."""
    names = [
        'meta.json',
        'tokenizer.json',
        'tokenizer_config.json',
        'special_tokens_map.json',
        'generation_config.json',
    ]
    files = {}
    for folder in filter(None, folders):
        for name in [*names, 'chat_template.jinja']:
            path = os.path.join(folder, name)
            if name not in files and os.path.lexists(path):
                fields.check_link(folder, name, TokenizerError)
                files[name] = fields.read_text(path, TokenizerError, ADVICE).encode()
    return files
