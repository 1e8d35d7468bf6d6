"""
Text to token ids and back. `load(folder)` reads what data/NAME/prepare.py wrote, or any folder with a tokenizer.json:

    tok = tokenizer.load('data/pystdlib')
    tok.encode('def f(x):')       # [483, 287, ...], never a special token: '<|endoftext|>' in a text is plain text
    tok.prompt('def f(x):')       # of a text to be continued, as transformers reads it: special tokens count
    tok.decode(ids)               # incomplete characters become U+FFFD
    tok.vocab_size, tok.eot       # number of ids, and the one that ends a document (None if there is none)
    tok.bos                       # the ids that every document begins with, [] with most tokenizers

Four kinds: 'bytes' (no training, no file), 'bpe' (ours, trained on your text by train_bpe), 'tiktoken:NAME' (gpt2,
cl100k_base, ...) and 'hf' (any published tokenizer.json). Our BPE is saved in the Hugging Face format, so that
transformers can read it, but run by tiktoken, which encodes three times faster; the tests check that both give the same
ids.
"""

import codecs
import contextlib
import os
import threading

from data import bpe, fields

EOT = '<|endoftext|>'


class TokenizerError(ValueError):
    """A tokenizer that cannot be read or made; the message says what to do."""


ID, ADVICE = fields.whole(0, fields.ROWS - 1), 'fetch or make it again'
META = {
    'tokenizer': fields.text(default='hf'),
    'eot': fields.maybe(ID),
    'end_of_turn': fields.several(ID, default=()),  # of examples: what their answers end with
    'model_type': fields.maybe(fields.text()),  # of the model whose tokenizer it is
}
# Of config.json, generation_config.json and tokenizer_config.json: an id, several, or a name, alone or in an object.
EOT_FIELDS = {
    'eos_token_id': fields.maybe(fields.either(fields.whole(-1, 2**31), fields.several(fields.whole(-1, 2**31)))),
    'eos_token': fields.maybe(fields.either(fields.text(), fields.table())),
}
CLASS_FIELDS = {
    'tokenizer_class': fields.maybe(fields.text()),
    'add_prefix_space': fields.maybe(fields.switch()),
    'legacy': fields.maybe(fields.switch()),
}


class Bytes:
    """UTF-8 bytes, and one extra id for the end of a text. Also the base class of the other byte-level kinds."""

    kind, json, vocab_size, eot, bos, special = 'bytes', None, 257, 256, [], {256}

    def encode(self, text):
        return list(text.encode('utf-8', 'replace'))

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def prompt(self, text):
        ids = []
        for i, part in enumerate(text.split(EOT)):
            ids += [self.eot] * bool(i) + self.encode(part)
        return ids

    def decode_bytes(self, ids):
        return b''.join(bytes([i]) if i < 256 else EOT.encode() for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def decode_stream(self, ids, context=()):
        """Yield text as the ids arrive, without special tokens; a character that spans several ids waits for the last
        of them. context: the ids before."""
        decoder = codecs.getincrementaldecoder('utf-8')('replace')
        for i in ids:
            if i not in self.special and (piece := decoder.decode(self.decode_bytes([i]))):
                yield piece
        if piece := decoder.decode(b'', final=True):
            yield piece


class Tiktoken(Bytes):
    """Any byte-level BPE that tiktoken can run: its own encodings, and ours."""

    def __init__(self, encoding, kind, json=None):
        self.encoding, self.kind, self.json = encoding, kind, json
        self.vocab_size, self.eot = encoding.n_vocab, encoding._special_tokens.get(EOT)
        self.special = {*encoding._special_tokens.values()}

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts):
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())

    def prompt(self, text):
        return self.encoding.encode(text, allowed_special='all')

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
        vocab, folder = self.hf.get_vocab(with_added_tokens=True), os.path.dirname(path)
        if not 0 <= max(vocab.values(), default=-1) < fields.ROWS:
            raise TokenizerError(f'{path} has no tokens, or ids of {fields.ROWS:,} and more: {ADVICE}')
        self.eot = find_eot(folder, self.hf, max(vocab.values()) + 1) if eot is None else eot
        self.special = {i for i, token in self.hf.get_added_tokens_decoder().items() if token.special}
        self.bytes = {i for name, i in vocab.items() if name.startswith('<0x')}
        self.as_llama(folder)
        self.bos = in_time(self.find_bos, 0)
        # Only ids that text can produce: not T5's 100 sentinels at the end, which the paper's 32,000 rows leave out.
        self.vocab_size = max({*vocab.values()} - self.special | {*self.bos, self.eot or 0}) + 1

    def find_bos(self):
        """The ids that the post-processor puts before a text. What it puts behind, a continuation would come after."""
        for text in ('a', *(self.hf.decode([i]) for i in range(300))):  # the first that is more than special tokens
            with contextlib.suppress(Exception):  # it may know no token for this one
                made = self.hf.encode(text)
                if 0 in made.special_tokens_mask:
                    return made.ids[: made.special_tokens_mask.index(0)]
        return []

    def as_llama(self, folder):
        """Read text as transformers 5 does if the folder names its LlamaTokenizer. That takes vocabulary and merges
        from tokenizer.json and puts the space before a text itself: not before what follows a special token."""
        from tokenizers import models, pre_tokenizers

        config, model = (os.path.join(folder, name) for name in ('tokenizer_config.json', 'config.json'))
        config = read_json(config, CLASS_FIELDS) if os.path.exists(config) else {'tokenizer_class': None}
        meta = os.path.join(folder, 'meta.json')
        model = next((read_json(path).get('model_type') for path in (model, meta) if os.path.exists(path)), None)
        ours = isinstance(self.hf.model, models.BPE) and self.hf.model.byte_fallback and model != 'mistral'
        if ours and config['tokenizer_class'] in ('LlamaTokenizer', 'LlamaTokenizerFast'):
            space = 'never' if config['add_prefix_space'] is False else 'always' if config['legacy'] else 'first'
            self.hf.normalizer = None
            self.hf.pre_tokenizer = pre_tokenizers.Metaspace('\u2581', space, split=False)

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        characters = sum(map(len, texts))
        return [e.ids for e in in_time(lambda: self.hf.encode_batch_fast(texts, add_special_tokens=False), characters)]

    def prompt(self, text):
        self.hf.encode_special_tokens = False
        try:
            return self.bos + self.encode(text)
        finally:
            self.hf.encode_special_tokens = True

    def decode(self, ids):
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_stream(self, ids, context=()):
        """Yield text as the ids arrive, without special tokens. context: the ids before them.

        The last finished piece is decoded again as context: many decoders treat the first token of a text
        differently. Tokens of a single byte wait for one that is none."""
        context, fresh = [i for i in context if i not in self.special][-16:], []
        for i in ids:
            if i in self.special:
                continue
            fresh.append(int(i))
            text = self.decode(context + fresh)
            if not text.endswith('\ufffd') and i not in self.bytes:
                if piece := text[len(self.decode(context)) :]:
                    yield piece
                context, fresh = fresh, []
        if fresh and (piece := self.decode(context + fresh)[len(self.decode(context)) :]):
            yield piece


PATIENCE = 30  # seconds


def in_time(encode, characters):
    """encode() of a text of so many characters, in a thread of its own, since nothing else can leave a regular
    expression behind that tries for hours how a text may be divided. Raises TokenizerError then, and for any error."""
    limit = PATIENCE + characters / 20_000  # a tenth of the speed of the slowest published tokenizers
    done = finished(encode, limit)
    if not done:
        raise TokenizerError(
            f'the regular expression in this tokenizer.json did not come to an end in {limit:.0f} s: {ADVICE}'
        )
    ids, error = done[0]
    if error:  # it may lack the token for what is unknown, which it needs only now
        raise TokenizerError(f'this tokenizer.json cannot encode the text ({error}): {ADVICE}') from error
    return ids


def finished(work, seconds):
    """[(work(), None)] or [(None, what it raised)]; [] if it did not come to an end."""
    done = []

    def run():
        try:
            done.append((work(), None))
        except BaseException as error:  # panics of a library are no Exceptions
            done.append((None, error))

    thread = threading.Thread(target=run, daemon=True)  # if it does not end, it does not keep the process
    thread.start()
    thread.join(seconds)
    return done


def find_eot(folder, hf, vocab_size):
    """The end-of-text id of a published tokenizer: it may be written in any of three files, as an id or as a name."""
    for name in ('config.json', 'generation_config.json', 'tokenizer_config.json'):
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            continue
        config = read_json(path, EOT_FIELDS)
        eot = next(iter(several(config)), None)  # LLaMA 3: end of text first, then the end-of-turn ids
        if eot is None and (token := name_of(config['eos_token'], f'{path}, eos_token')):
            eot = hf.token_to_id(token)
        if eot is not None and eot < vocab_size:
            return eot
    names = (EOT, '<|end_of_text|>', '</s>', '<eos>', '<|im_end|>', '[SEP]')
    return next((i for i in map(hf.token_to_id, names) if i is not None), None)


def ends(folder, tok):
    """The ids that end a generated text, as transformers' `generate` takes them: what generation_config.json names,
    else config.json. With data of ours (meta.json), what its answers end with; then, or if they name none, the end of a
    document is one, too."""
    paths = (os.path.join(folder, name) for name in ('generation_config.json', 'config.json', 'meta.json'))
    tables = (EOT_FIELDS, EOT_FIELDS, META)
    return ends_of(*(read_json(path, t) if os.path.exists(path) else None for path, t in zip(paths, tables)), tok)


def ends_of(generation, config, meta, tok):
    """The same of three files' contents, None for one that is not there."""
    named = (several(generation) if generation else []) or (several(config) if config else [])
    turns = meta['end_of_turn'] if meta else []
    ours = (not named or meta is not None) and tok.eot is not None
    return [*dict.fromkeys([*named, *turns, *([tok.eot] if ours else [])])]


def several(config):
    eos = config['eos_token_id']
    return [i for i in (eos if isinstance(eos, list) else [eos]) if i is not None and i >= 0]


def name_of(token, where):
    """The name of a token that is given as a text or as an object; None if there is none."""
    if isinstance(token, dict):
        fields.check(token, {'content': fields.text()}, where, TokenizerError, ADVICE)
        return token['content']
    return token


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


EVERY_KIND = ''.join(map(chr, range(0x600))) + ' \n\t東京😀'  # letters, digits, marks, spaces


def from_bpe(text):
    """Our own tokenizer.json, given as text, run by tiktoken. Our ids are in merge order, so they are its ranks."""
    import tiktoken

    saved = fields.parse(text, 'tokenizer.json', TokenizerError, ADVICE)
    try:
        # The file's own pattern: PATTERN may have changed since.
        pattern = saved['pre_tokenizer']['pretokenizers'][0]['pattern']['Regex']
        specials = {token['content']: token['id'] for token in saved['added_tokens']}
        byte_of = bpe.byte_alphabet()
        ranks = {bytes(byte_of[c] for c in t): i for t, i in saved['model']['vocab'].items() if t not in specials}
        ids = [*ranks.values(), *specials.values()]
        if not all(map(ID.fits, ids)) or len(set(ids)) < len(ids):
            raise ValueError('an id that is none, or is of two tokens')
        if len({token for token in ranks if len(token) == 1}) < 256 or not pattern:
            raise ValueError('a byte that has no token, or no pattern')
        encoding = tiktoken.Encoding('bpe', pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        if encoding.decode(encoding.encode_ordinary(EVERY_KIND)) != EVERY_KIND:
            raise ValueError('a pattern that leaves out part of a text')
    except Exception as e:
        raise TokenizerError(
            f'this tokenizer.json is not one that train_bpe wrote ({e!r}): prepare the data again'
        ) from e
    return Tiktoken(encoding, 'bpe', text)


def train_bpe(texts, vocab_size, path=None):
    """Train our tokenizer on an iterable of texts, save it as `path` (a tokenizer.json) if given, and return it."""
    if not 257 <= vocab_size <= fields.ROWS:
        raise TokenizerError(
            f'vocab_size={vocab_size} is not possible: 256 bytes and the end-of-text token need at least 257, '
            f'and no model has more than {fields.ROWS:,}'
        )
    text = bpe.train(texts, vocab_size, EOT)
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


def identity(folder):
    """What ids mean in a folder: the name of a tokenizer without files, or (vocabulary, added tokens, merges) however
    the file writes them, each version of a library in its way; None if the folder has no tokenizer."""
    meta, path = os.path.join(folder, 'meta.json'), os.path.join(folder, 'tokenizer.json')
    kind = read_json(meta, META)['tokenizer'] if os.path.exists(meta) else None
    if not os.path.exists(path):
        if kind in ('bpe', 'hf'):
            raise TokenizerError(f'{path} is missing, which {meta} needs: put it back, or name another folder')
        return kind
    saved = fields.parse(fields.read_text(path, TokenizerError, ADVICE), path, TokenizerError, ADVICE)
    try:
        added = {token['content']: token['id'] for token in saved.get('added_tokens') or ()}
        vocabulary, merges = saved['model']['vocab'], saved['model'].get('merges') or ()
        if isinstance(vocabulary, list):  # of (token, score)
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **added}, added, [pair.split(' ') if isinstance(pair, str) else pair for pair in merges]
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise TokenizerError(f'{path} is not a tokenizer ({e!r}): {ADVICE}') from e


def same(one, other):
    """Whether two identities are of one tokenizer. Either may have added tokens that are not in the other."""
    if not (isinstance(one, tuple) and isinstance(other, tuple)):
        return one == other
    for (mine, added, _), (theirs, _, _) in ((one, other), (other, one)):
        taken = set(theirs.values())
        if any(token in theirs or token not in added or i in taken for token, i in mine.items() - theirs.items()):
            return False
    return one[2] == other[2]
