"""
What data/instruct, data/gsm8k and data/mathinstruct share: rows of many formats -> conversations -> token files.

    meta, report = prepare(out_dir, rows, made_by, model)     # rows() yields (place, split or None, row, its file)

    with ExampleWriter('data/mine', tok, template, made_by='my script') as out:
        out.add_example('gsm8k', 'train', ids, trained, size)         # any number, in any order

Beside train.bin, val.bin and meta.json of a folder of text (data/common.py) stand, for each split, SPLIT_trained.bin
(uint8, as long as the tokens: 1 where a token is trained, as what is to be predicted) and SPLIT_ends.bin (int64: of
each example the position one past its last token). meta.json says "examples": true, how many there are and of what
the trained tokens are: its train_bytes and val_bytes are of the trained text alone.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter
from itertools import chain, islice

import numpy as np

from data import DataError, chat, common, fields, formats
from data.chat import ChatError
from data.duplicates import Duplicates
from data.signed import special_names
from data.tokenizer import ADVICE, TokenizerError

LENGTH = 2048  # tokens of an example, without --max_tokens, unless the model's own context is shorter
SOURCES = 256  # a field with more values does not say what an example is about
BATCH = 500  # examples tokenised at a time


class RowWriter(common.Writer):
    """A Writer of rows that each have their length: where they end stands in SPLIT_ends.bin, and what else there is of
    each, grouped by source alike, in files of `kinds`."""

    def __init__(self, folder, tok, made_by, model_folder=None, **extra):
        super().__init__(folder, tok, made_by, examples=True, **extra)
        special, added = special_names(tok)
        top = max([tok.vocab_size - 1, *special.values(), *added.values()])
        self.dtype = 'uint16' if top < 65536 else 'uint32'
        self.lengths = []
        self.examples, self.trained = dict.fromkeys(common.SPLITS, 0), dict.fromkeys(common.SPLITS, 0)
        for name in ('special_tokens_map.json', 'tokenizer_config.json'):
            path = os.path.join(model_folder or os.devnull, name)
            if os.path.exists(path):
                fields.check_link(model_folder, name, TokenizerError)
                self.files[name] = json.dumps(fields.read(path, {}, TokenizerError, ADVICE), indent=1) + '\n'

    def add_row(self, source, split, ids, size, targets, **more):
        """ids: list of int; size: bytes of its text; targets: how many it has; more: an array for each kind."""
        self.take(source, split, ids, size, documents=1)
        for kind, array in {'ends': np.array([len(ids)], '<i8'), **more}.items():
            self.chunks.setdefault((source, split, f'_{kind}'), []).append(array)
        entry = self.sources[source]
        entry[f'{split}_examples'] = entry[f'{split}_documents']
        self.examples[split] += 1
        self.trained[split] += targets
        self.vocab_size = max(self.vocab_size, max(ids) + 1)
        self.lengths.append(len(ids))
        self.waiting_characters += len(ids)
        if self.waiting_characters >= common.BATCH_CHARACTERS:
            self._flush()

    def _join(self, split, kind, checksum):
        super()._join(split, kind, checksum)
        if kind == '_ends':  # the parts hold lengths
            path = self.work / f'{split}_ends.bin'
            np.cumsum(np.fromfile(path, '<i8')).astype('<i8').tofile(path)

    def _finish(self):
        for split in common.SPLITS:
            self.extra |= {f'{split}_examples': self.examples[split], f'{split}_trained': self.trained[split]}
            for entry in self.sources.values():
                entry.setdefault(f'{split}_examples', 0)
        self.extra['longest'] = max(self.lengths, default=0)
        super()._finish()


class ExampleWriter(RowWriter):
    """A Writer of examples. Their tokens, marks and ends are grouped by source alike.

    written_by: their chat.Template, which goes into the folder, too."""

    kinds = ('', '_trained', '_ends')

    def __init__(self, folder, tok, written_by, made_by, model_folder=None, **extra):
        super().__init__(folder, tok, made_by, model_folder, **extra)
        self.control, self.ends = {*written_by.ids}, set()
        self.take_template(written_by)

    def take_template(self, template):
        """The template and what it needs, so that the folder, and a model trained on it, can be talked to alike."""
        config = json.loads(self.files.get('tokenizer_config.json', '{}'))
        config.pop('chat_template', None)  # readers differ in which of two they take, so there is only one
        if len(template.sources) == 1:
            self.files['chat_template.jinja'] = template.sources['default']
        else:
            config['chat_template'] = [{'name': k, 'template': source} for k, source in template.sources.items()]
        if config:
            self.files['tokenizer_config.json'] = json.dumps(config, indent=1) + '\n'

    def add_example(self, source, split, ids, trained, size):
        """ids: list of int; trained: list of bool of the same length; size: bytes of the text that is trained."""
        if not any(trained):
            raise DataError('an example without a trained token teaches nothing: leave it out')
        last = (i for i, t in enumerate(trained) if t and trained[i + 1 : i + 2] != [True])
        self.ends |= {ids[i] for i in last} & self.control
        self.add_row(source, split, ids, size, sum(trained), trained=np.array(trained, np.uint8))

    def _finish(self):
        self.extra['end_of_turn'] = sorted(self.ends)
        super()._finish()


# ---- from rows to a folder


def from_hub(script, name, config, split):
    """The rows of a data set on the hub, which stay in its cache. Raises DataError at once without a network."""
    import datasets
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, timeout=10)
        yield from datasets.load_dataset(name, config, split=split)
    except Exception as e:  # depends on the libraries' versions: httpx, requests, OfflineMode, pyarrow's ...
        said = (str(e).splitlines() or [''])[0][:200]
        raise DataError(
            f'could not read {name} on the hub ({type(e).__name__}: {said}): '
            f'give local files, python data/{script}/prepare.py --input=FILES'
        ) from None


class Drops:
    """Examples left out: how many for which reason, and where the first one stands."""

    def __init__(self):
        self.counts, self.first = Counter(), {}

    def add(self, reason, place):
        self.counts[str(reason)] += 1
        self.first.setdefault(str(reason), place)

    def lines(self):
        for reason, n in self.counts.most_common(8):
            yield f'{n:,} dropped: {reason} (the first at {self.first[reason]})'
        if (rest := len(self.counts) - 8) > 0:
            yield f'and {rest} other reasons'


def conversations(rows, names, drops):
    """Yield (place, split or None, source, messages, tools) of rows() that teach something."""
    for place, split, row, file in rows():
        try:
            messages, tools, source = formats.conversation(row, names, place)
        except formats.Drop as reason:
            drops.add(reason, place)
            continue
        yield place, split, source or file, messages, tools


def hash_of(messages):
    """A number below 2^32 of what is asked: the same question is in the same split, whatever the answer."""
    question = ' '.join(m['content'] for m in messages if m['role'] == 'user').lower().split()
    return int(hashlib.sha256(' '.join(question).encode('utf-8', 'replace')).hexdigest()[:8], 16)


def check(rows, names, val_share):
    """Read everything once, so that a row that is wrong is found before anything is written.

    -> below which hash an example is of the val split: the share of all hashes if that gives a fair number, so that an
    example stays in its split when others are added; else exactly that share of these examples."""
    hashes, sources = [], set()
    for place, split, source, messages, _ in conversations(rows, names, Drops()):
        sources.add(source)
        if len(sources) > SOURCES:
            raise DataError(
                f'{place}: source has more than {SOURCES} values, {fields.shown(source)} and others: name a field that '
                'says what an example is about, --fields=source:YOURS, or none, --fields=source:'
            )
        if split is None:
            hashes.append(hash_of(messages))
    limit, wanted = val_share * 2**32, val_share * len(hashes)
    found = sum(h < limit for h in hashes)
    if hashes and not wanted / 2 <= found <= 2 * wanted:
        different = sorted({*hashes})
        if len(different) < 2:
            raise DataError('there is only one question, which cannot be in both splits: add some, or --val=FILE')
        limit = different[min(max(round(val_share * len(different)), 1), len(different) - 1)]
    return limit


def prepare(out_dir, rows, made_by, model, template='own', names=None, val_share=0.05, **how):
    """Write the folder. -> its meta.json, and the report that says what became of the examples.

    rows(): yields (place, split or None, row, name of its file); names: as formats.conversation; model: a folder with a
    tokenizer.json, or a tokenizer that needs none; how: train_on, too_long, max_tokens. Raises DataError."""
    common.check_val_share(val_share)
    names, model = names or {}, common.model_folder(model)
    tok = common.choose_tokenizer(model, None, None)
    folder = model if os.path.isdir(model) else None
    if folder and os.path.realpath(folder) == os.path.realpath(out_dir):
        raise DataError(f'--out_dir={out_dir} is the folder of the model, whose files it would replace: name another')
    template = chat.load(folder, tok, template)
    config = model_config(folder)
    longest = how.get('max_tokens') or min(LENGTH, config['max_position_embeddings'] or LENGTH)
    limit = check(rows, names, val_share)
    extra = {'template': template.where, 'train_on': how.get('train_on', 'all'), 'max_tokens': longest}
    extra |= {'model_type': config['model_type']} if config['model_type'] else {}
    report, drops, seen = Report(tok, longest), Drops(), Duplicates()
    with ExampleWriter(out_dir, tok, template, made_by, folder, **extra) as out:
        found = conversations(rows, names, drops)
        while batch := list(islice(found, BATCH)):
            coded = template.encode_batch([(messages, tools) for *_, messages, tools in batch], extra['train_on'])
            for (place, split, source, messages, _), example in zip(batch, coded):
                split = split or ('val' if hash_of(messages) < limit else 'train')
                try:
                    ids, trained, size = fitted(example, longest, how.get('too_long', 'drop'), report)
                except formats.Drop as reason:
                    drops.add(reason, place)
                    continue
                seen.add(' '.join(m['content'] for m in messages), split)
                out.add_example(source, split, ids, trained, size)
                report.add(source, ids, trained)
        for split in common.SPLITS:
            if not out.examples[split]:
                why = '; '.join(drops.lines()) or 'there are none'
                raise DataError(f'no example is left for the {split} split: {why}')
        out.extra |= {'dropped': sum(drops.counts.values()), 'truncated': report.cut}
    report.drops, report.seen = drops, seen
    return out.meta, report


def fitted(example, longest, too_long, report):
    """(ids, trained, bytes) of an example, cut if it is to be. Raises Drop."""
    if isinstance(example, ChatError):
        raise formats.Drop(example)
    ids, trained, size = example
    if not any(trained):
        raise formats.Drop('nothing in it is trained')
    if len(ids) > longest:
        if too_long == 'drop':
            raise formats.Drop(f'longer than {longest:,} tokens')
        if not any(trained[:longest]):
            raise formats.Drop(f'no answer within the first {longest:,} tokens')
        size = size * sum(trained[:longest]) // sum(trained)
        ids, trained = ids[:longest], trained[:longest]  # and no end of text, which would teach to stop mid-sentence
        report.cut += 1
    return ids, trained, size


def model_config(folder):
    """What a model's config.json says of it, as far as we ask; nothing without one."""
    path = os.path.join(folder or os.devnull, 'config.json')
    asked = {'model_type': fields.maybe(fields.text()), 'max_position_embeddings': fields.maybe(fields.whole(1, 2**31))}
    return fields.read(path, asked, TokenizerError, ADVICE) if os.path.exists(path) else dict.fromkeys(asked)


# ---- what is printed


class Report:
    """What became of the examples: lengths and trained tokens of each source, one example, drops, duplicates."""

    def __init__(self, tok, longest):
        self.tok, self.longest, self.cut, self.shown = tok, longest, 0, None
        self.lengths, self.trained = {}, Counter()  # of each source

    def add(self, source, ids, trained):
        self.shown = self.shown or (ids, trained)
        self.lengths.setdefault(source, []).append(len(ids))
        self.trained[source] += sum(trained)

    def print(self, meta, folder, seconds):
        print('the first example, what is trained of it between the marks:\n')
        print(marked(self.tok, *self.shown) + '\n')
        names = sorted(self.lengths, key=lambda name: -sum(self.lengths[name]))
        shown = names if len(names) <= 16 else names[:16]
        width = max(len(name) for name in [*shown, 'all'])
        print(f'{"source":<{width}}  examples        tokens       trained     p50     p90     p99     max')
        for name in [*shown, 'all'] if len(names) > 1 else shown:
            lengths = self.lengths.get(name) or [*chain(*self.lengths.values())]
            trained = self.trained[name] if name in self.lengths else sum(self.trained.values())
            p = [int(np.percentile(lengths, q, method='inverted_cdf')) for q in (50, 90, 99, 100)]
            row = f'{len(lengths):>8,}  {sum(lengths):>12,}  {trained:>12,}' + ''.join(f'  {one:>6,}' for one in p)
            print(f'{name:<{width}}  {row}')
        if len(names) > len(shown):
            print(f'and {len(names) - len(shown)} smaller sources, which are in the sum')
        for line in self.drops.lines():
            print(line)
        if self.cut:
            print(f'{self.cut:,} cut after {self.longest:,} tokens, without an end of text')
        known = ('tokenizer', 'template', 'vocab_size', 'train_examples', 'val_examples', 'dropped', 'truncated')
        for name in (*known, 'train_tokens', 'val_tokens', 'train_trained', 'val_trained', 'longest'):
            print(f'{name}: {meta[name]}')
        print(f'duplicates: {self.seen.exact}')  # but for case and spaces
        print(f'near_duplicates: {self.seen.near}')  # 8 of 10 pieces of 8 characters in common
        print(f'duplicates_across_splits: {self.seen.across}')
        print(f'seconds: {seconds:.1f}')
        print(f'written: {folder}')


def marked(tok, ids, trained, longest=1500):
    """The text of an example with its trained tokens between marks; coloured on a terminal. A long part loses its
    middle."""
    cuts = [0, *(i for i in range(1, len(ids)) if trained[i] != trained[i - 1]), len(ids)]
    texts = [tok.decode(ids[:cut]) for cut in cuts]  # decoded alone, a part would lose its first space
    left, right = ('⟦', '⟧') if can_print('⟦⟧') else ('[[', ']]')
    if sys.stdout.isatty() and not os.environ.get('NO_COLOR'):
        left, right = '\033[32m' + left, right + '\033[0m'
    parts = []
    for i, before, text in zip(cuts, texts, texts[1:]):
        part = printable(text[len(before) :])
        if len(part) > longest:
            half = longest // 2
            part = f'{part[:half]} ... {len(part) - longest:,} characters ... {part[-half:]}'
        parts.append(left + part + right if trained[i] else part)
    return ''.join(parts)


def can_print(text):
    try:
        text.encode(sys.stdout.encoding or 'ascii')
    except UnicodeEncodeError:
        return False
    return True


def printable(text):
    """What the terminal can show; a stranger's escape sequences are no commands to it."""
    coding = sys.stdout.encoding or 'ascii'
    text = text.encode(coding, 'backslashreplace').decode(coding)
    return re.sub('[\x00-\x08\x0b-\x1f\x7f-\x9f]', lambda m: repr(m[0])[1:-1], text)


# ---- the command line


def add_arguments(parser, here, template='own', val_share=0.05):
    """The flags that all three scripts share. val_share: None where the data has a val split."""
    parser.add_argument('--tokenizer', required=True, help="the model's folder: its tokenizer.json and template")
    parser.add_argument(
        '--template', default=template, help=f"own: the model's | {' | '.join(chat.TEMPLATES)} | FILE.jinja"
    )
    parser.add_argument(
        '--train_on', default='all', choices=('all', 'last'), help='answers of a conversation that are trained'
    )
    parser.add_argument(
        '--too_long', default='drop', choices=('drop', 'truncate'), help='what becomes of an example too long'
    )
    parser.add_argument(
        '--max_tokens', type=positive, default=None, help=f'longest example; {LENGTH:,} or the context if not given'
    )
    if val_share:
        parser.add_argument('--val_share', type=float, default=val_share, help='share of questions for validation')
    parser.add_argument(
        '--out_dir', type=common.folder, default=str(here), help='where train.bin, val.bin and meta.json go'
    )


def positive(text):
    try:
        found = int(text)
    except ValueError:
        found = 0
    if not 1 < found <= 2**31:
        raise argparse.ArgumentTypeError(f'{text!r} is no number of tokens, e.g. 2048')
    return found


def run(args, rows, made_by, names=None):
    """Prepare what the flags say, and print the report."""
    start = time.time()
    how = {name: getattr(args, name) for name in ('template', 'train_on', 'too_long', 'max_tokens')}
    share = {'val_share': args.val_share} if 'val_share' in args else {}
    meta, report = prepare(args.out_dir, rows, made_by, args.tokenizer, names=names, **how, **share)
    report.print(meta, args.out_dir, time.time() - start)
    if args.template in chat.NEEDS:
        print(
            f'note: a model that never saw {chat.NEEDS[args.template][-1]} must learn it: train the embeddings and the '
            'head, too, which an adapter alone does not'
        )
