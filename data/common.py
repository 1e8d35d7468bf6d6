"""
What the prepare.py scripts share: read text, choose a tokenizer, write the files that data/batches.py reads.

    tok = common.choose_tokenizer('bpe', texts, vocab_size=4096)
    with common.Writer('data/mine', tok, made_by='my script') as out:
        out.add('poems', 'train', 'the text of one document')     # source, split, text: any number, in any order
        out.add('poems', 'val', 'another')
    # now the folder holds train.bin, val.bin, meta.json and, for bpe and hf, tokenizer.json

train.bin and val.bin are raw token ids, as uint16 if they fit. Documents are grouped by source, in the order of
`sources` in meta.json, and each ends with the end-of-text id. Documents are read one at a time: the whole text is never
in memory.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from data import DataError, tokenizer  # noqa: E402

FORMAT = 1
SPLITS = ('train', 'val')
BATCH_CHARACTERS = 4_000_000  # encoded at a time: about 1M tokens, some 40 MB as Python lists
# What an earlier preparation of other data or another tokenizer may have left, to be removed.
MAY_BE_LEFT = ['tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja']
MAY_BE_LEFT += [f'{split}_{kind}.bin' for split in SPLITS for kind in ('trained', 'ends', 'labels', 'pairs')]
PIECE_CHARACTERS = 500_000  # a longer document is encoded in pieces, so that one huge file also uses all cores


def split_of(name, val_share):
    """'train' or 'val' by a hash of the name: a file stays in its split when others are added, on every machine."""
    return 'val' if int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) < val_share * 2**32 else 'train'


def check_val_share(val_share):
    if not 0 < val_share < 1:
        raise DataError(f'--val_share={val_share} must lie between 0 and 1, e.g. 0.05')


def choose_tokenizer(spec, texts, vocab_size):
    """bpe (trained on texts, the train split only) | bytes | tiktoken:NAME | a folder that holds a tokenizer.json."""
    try:
        if spec == 'bytes':
            return tokenizer.Bytes()
        if spec == 'bpe':
            # In pieces, since a single text of 200 MB takes the library a minute and 15 GB.
            pieces = (piece for text in texts for piece, _ in cut(text))
            bar = tqdm(pieces, 'train bpe', unit=' texts', unit_scale=True, delay=2, leave=False)
            tok = tokenizer.train_bpe(bar, vocab_size)
            if tok.vocab_size < vocab_size:
                print(f'note: the text has repeated pairs for only {tok.vocab_size:,} ids, not for {vocab_size:,}')
            return tok
        if spec.startswith('tiktoken:'):
            return tokenizer.from_tiktoken(spec.removeprefix('tiktoken:'))
        if os.path.isdir(spec):
            return tokenizer.load(spec)
    except (ValueError, FileNotFoundError) as e:
        raise DataError(str(e)) from e
    raise DataError(
        f'unknown tokenizer {spec!r}: use bpe, bytes, tiktoken:NAME or a folder that holds a tokenizer.json'
    )


SLOW = ('spm.model', 'tokenizer.model', 'sentencepiece.bpe.model', 'vocab.json', 'vocab.txt')


def model_folder(spec):
    """The folder of a model that --tokenizer names, or of ORGANISATION/NAME on the hub the one in its cache, without
    the weights. What names none, as 'bytes', comes back as it is. Raises DataError for a tokenizer in old files."""
    if not os.path.isdir(spec) and re.fullmatch(r'\w[\w.-]*/[\w.-]+', spec):
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(spec, allow_patterns=['*.json', '*.jinja', '*.model', '*.txt'])
        except Exception as error:
            said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise DataError(f'{spec} is no folder here and the hub did not give it ({said}): name a folder') from None
    else:
        folder = spec
    has = set(os.listdir(folder)) if os.path.isdir(folder) else {'tokenizer.json'}
    if not has & {'tokenizer.json', 'meta.json'} and has & {*SLOW}:
        code = f"AutoTokenizer.from_pretrained('{spec}').save_pretrained('FOLDER')"
        raise DataError(
            f'{spec} has its tokenizer in files of an old kind: python -c "from transformers import AutoTokenizer; '
            f'{code}" writes it to a FOLDER, which --tokenizer=FOLDER reads'
        )
    return folder


class Writer:
    """Collects documents in a hidden subfolder, and moves the files into place only when all documents are written.

    kinds: of files for each split, named after it; '' is the one of the tokens.
    limits={'train': N}: take whole documents until there are N tokens, then ignore the rest (see .full).
    total: bytes expected, for the progress bar. Further keywords are written to meta.json."""

    kinds = ('',)

    def __init__(self, folder, tok, made_by, limits=None, total=None, **extra):
        if tok.eot is None:
            raise DataError(
                'this tokenizer has no end-of-text token: name it as eos_token in its tokenizer_config.json'
            )
        self.folder, self.tok, self.made_by, self.extra = Path(folder), tok, made_by, extra
        self.limits, self.vocab_size = limits or {}, tok.vocab_size
        self.dtype = 'uint16' if tok.vocab_size <= 65536 else 'uint32'
        self.files = {} if tok.json is None else {'tokenizer.json': tok.json}  # beside the tokens: name -> text
        if tok.kind == 'bpe':  # transformers' AutoTokenizer needs a second file
            config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': tokenizer.EOT}
            self.files['tokenizer_config.json'] = json.dumps(config) + '\n'
        self.sources = {}  # name -> its entry in meta.json, in order of first appearance
        self.tokens = dict.fromkeys(SPLITS, 0)
        self.bytes = dict.fromkeys(SPLITS, 0)
        self.waiting, self.waiting_characters, self.taking = [], 0, True
        self.chunks = {}  # (source, split, kind): arrays that are still to be written to its file
        unit, total = ('tok', sum(limits.values())) if limits else ('B', total)
        self.bar = tqdm(total=total, desc='tokenize', unit=unit, unit_scale=True, delay=2, leave=False)

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob('.preparing-*'):  # by one that was killed; one that still runs holds its lock
            if lock(left):
                shutil.rmtree(left, ignore_errors=True)
        self.work = Path(tempfile.mkdtemp(prefix='.preparing-', dir=self.folder))
        self.lock = lock(self.work)
        return self

    def __exit__(self, error, *_):
        try:
            if error is None:
                self._finish()
        finally:
            self.bar.close()
            self.lock.close()
            shutil.rmtree(self.work, ignore_errors=True)

    def add(self, source, split, text):
        if not text:
            return
        first = True
        for piece, last in cut(text):
            self.waiting.append((source, split, piece, first, last))
            self.waiting_characters += len(piece)
            first = False
            if self.waiting_characters >= BATCH_CHARACTERS:
                self._flush()

    def full(self, split):
        return self.tokens[split] >= self.limits.get(split, float('inf'))

    def _flush(self):
        encoded = encode_pieces(self.tok, [(piece, first) for _, _, piece, first, _ in self.waiting])
        for (source, split, piece, first, last), ids in zip(self.waiting, encoded):
            if first:
                self.taking = not self.full(split)  # never half a document
            if not self.taking:
                continue
            if last:
                ids.append(self.tok.eot)
            self.take(source, split, ids, len(piece.encode('utf-8', 'replace')), last)
        self._write_chunks()
        self.waiting, self.waiting_characters = [], 0

    def take(self, source, split, ids, size, documents):
        """Count these tokens and put them aside for the file of their source and split."""
        entry = self.sources.setdefault(
            source, {'name': source, 'train_tokens': 0, 'val_tokens': 0, 'train_documents': 0, 'val_documents': 0}
        )
        entry[f'{split}_tokens'] += len(ids)
        entry[f'{split}_documents'] += documents
        self.tokens[split] += len(ids)
        self.bytes[split] += size
        self.bar.update(len(ids) if self.limits else size)
        self.chunks.setdefault((source, split, ''), []).append(np.array(ids, np.dtype(self.dtype).newbyteorder('<')))

    def _write_chunks(self):
        # One file per source and split, opened only to append: there may be more sources than file handles.
        for (source, split, kind), arrays in self.chunks.items():
            with open(self._part(source, split, kind), 'ab') as f:
                np.concatenate(arrays).tofile(f)
        self.chunks = {}

    def _part(self, source, split, kind=''):
        return self.work / f'{list(self.sources).index(source)}.{split}{kind}'

    def _join(self, split, kind, checksum):
        """The parts of all sources, one after another, as a file of the folder."""
        with open(self.work / f'{split}{kind}.bin', 'wb') as out:
            for source in self.sources:
                part = self._part(source, split, kind)
                if part.exists():
                    with open(part, 'rb') as f:
                        while block := f.read(2**20):
                            out.write(block)
                            checksum.update(block)
                    part.unlink()
            out.flush()
            os.fsync(out.fileno())

    def _finish(self):
        self._flush()
        if not any(self.tokens.values()):
            raise DataError('the input is empty: there is nothing to train on')
        checksum = hashlib.blake2b(digest_size=8)
        for split in SPLITS:
            if not self.tokens[split]:
                raise DataError(f'too little text: the {split} split is empty; give more text or change --val_share')
            for kind in self.kinds:
                self._join(split, kind, checksum)
        self.meta = {
            'format': FORMAT,
            'tokenizer': self.tok.kind,
            'vocab_size': self.vocab_size,
            'eot': self.tok.eot,
            'dtype': self.dtype,
            'train_tokens': self.tokens['train'],
            'val_tokens': self.tokens['val'],
            'train_bytes': self.bytes['train'],  # loss in bits per byte = loss / ln 2 * tokens / bytes
            'val_bytes': self.bytes['val'],
            'sources': list(self.sources.values()),
            'checksum': checksum.hexdigest(),  # of train.bin, then val.bin: a run knows its data again
            'made_by': self.made_by,
            'python': platform.python_version(),
            **self.extra,
        }
        self.files['meta.json'] = json.dumps(self.meta, indent=1) + '\n'
        for name, text in self.files.items():
            (self.work / name).write_text(text, encoding='utf-8')
        names = [f'{split}{kind}.bin' for split in SPLITS for kind in self.kinds] + [*self.files]
        # Remove the old meta.json first and write the new one last: after a crash in between, the folder counts as not
        # prepared.
        if (self.folder / 'meta.json').exists():
            (self.folder / 'meta.json').unlink()
            for name in {*MAY_BE_LEFT} - {*names}:
                (self.folder / name).unlink(missing_ok=True)
        for name in names:  # meta.json is the last
            os.replace(self.work / name, self.folder / name)


def lock(folder):
    """The open file that locks a work folder until this process ends, however it ends; None if another holds it."""
    file = open(folder / 'lock', 'w')  # noqa: SIM115
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
    return file


def encode_pieces(tok, pieces):
    """The ids of each (piece of a text, whether it is the first), as in the whole text: what the tokenizer puts before
    every text stands before the first only, and so does the space of SentencePiece."""
    newline = tok.encode('\n')  # what the piece before ends with
    encoded = tok.encode_batch([piece if first else '\n' + piece for piece, first in pieces])
    for (piece, first), ids in zip(pieces, encoded):
        if first:
            yield tok.bos + ids
        else:
            yield ids[len(newline) :] if ids[: len(newline)] == newline else tok.encode(piece)


def cut(text, size=None):
    """Yield (piece, whether it is the last) of a long text. Cuts only after a newline that no space follows: every
    tokenizer here splits there anyway, so the ids are the same as for the whole text."""
    size = size or PIECE_CHARACTERS
    begin, boundary = 0, re.compile(r'\n(?=\S)')
    while len(text) - begin > size and (match := boundary.search(text, begin + size)):
        yield text[begin : match.end()], False
        begin = match.end()
    yield text[begin:], True


def made_by(script):
    """The command, as typed in the repository's root."""
    return shlex.join(['python', f'data/{script}/prepare.py', *sys.argv[1:]])


def report(meta, folder, seconds):
    sources = sorted(meta['sources'], key=lambda s: -s['train_tokens'])
    width = max(len(s['name']) for s in sources[:8])
    print(f'{"source":<{width}}  train tokens    val tokens  documents')
    for s in sources[:8]:
        documents = s['train_documents'] + s['val_documents']
        print(f'{s["name"]:<{width}}  {s["train_tokens"]:>12,}  {s["val_tokens"]:>12,}  {documents:>9,}')
    if len(sources) > 8:
        print(f'and {len(sources) - 8} smaller sources')
    tokens, size = meta['train_tokens'] + meta['val_tokens'], meta['train_bytes'] + meta['val_bytes']
    print(f'tokenizer: {meta["tokenizer"]}')
    print(f'vocab_size: {meta["vocab_size"]}')
    print(f'documents: {sum(s["train_documents"] + s["val_documents"] for s in sources)}')
    print(f'megabytes: {size / 1e6:.2f}')
    print(f'train_tokens: {meta["train_tokens"]}')
    print(f'val_tokens: {meta["val_tokens"]}')
    print(f'tokens_per_byte: {tokens / size:.4f}')
    print(f'seconds: {seconds:.1f}')
    print(f'written: {folder}')


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parser(doc):
    return argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)


def folder(text):
    """The type of --out_dir."""
    if not text:
        raise argparse.ArgumentTypeError('it is empty, which would be the folder you are in: name one, or . for that')
    return text


def run(main):
    """Run main(). An error that the user can fix becomes one sentence on stderr and exit code 1, with no traceback."""
    try:
        main()
    except (DataError, tokenizer.TokenizerError, OSError) as e:  # an OSError explains itself
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        sys.exit('interrupted: data prepared earlier is unchanged')
