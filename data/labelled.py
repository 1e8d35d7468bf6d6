"""
Sentences, or pairs of them, with a label each -> token files that data/batches.py reads as Labelled.

    with LabelledWriter('data/mine', tok, ['no', 'yes'], ['accuracy'], made_by='my script') as out:
        for ids, second, cut in encode(tok, [('one sentence', None), ('a pair', 'of them')], longest=128):
            out.add_labelled('mine', 'train', ids, label=1, second=second, size=12)

Beside train.bin, val.bin, meta.json and SPLIT_ends.bin of a folder of examples (data/examples.py) stand, for each
split, SPLIT_labels.bin (int64, or float32 where the label is a number) and SPLIT_pairs.bin (int64: where in each
example its second sentence begins, its length if it has none). meta.json says "task": "classify", the names of the
labels ([]: the label is a number), by which metrics predictions are judged, and which id fills the rows.
"""

import os

import numpy as np

from data import DataError, fields, tokenizer
from data.examples import RowWriter
from data.tokenizer import ADVICE, TokenizerError

CONFIG = {
    'model_type': fields.maybe(fields.text()),
    'max_position_embeddings': fields.maybe(fields.whole(1, 2**31)),
    'pad_token_id': fields.maybe(fields.whole(-1, fields.ROWS)),
}
PAD = {'pad_token': fields.maybe(fields.either(fields.text(), fields.table()))}
AFTER_PAD = ('roberta', 'xlm-roberta', 'camembert', 'roberta-prelayernorm')  # their positions begin behind the pad id


class LabelledWriter(RowWriter):
    """A Writer of examples with a label each. labels: their names, [] where a label is a number."""

    kinds = ('', '_ends', '_labels', '_pairs')

    def __init__(self, folder, tok, labels, metrics, made_by, model_folder=None, **extra):
        extra |= {'task': 'classify', 'labels': [*labels], 'metrics': [*metrics], 'pad': pad_of(tok, model_folder)}
        super().__init__(folder, tok, made_by, model_folder, **extra)
        self.type = '<i8' if labels else '<f4'

    def add_labelled(self, source, split, ids, label, second, size):
        """ids: list of int; label: the index of its name, or a number; second: see above; size: bytes of its text."""
        self.add_row(source, split, ids, size, 1, labels=np.array([label], self.type), pairs=np.array([second], '<i8'))


def encode(tok, pairs, longest):
    """[(ids, where the second sentence begins, whether it was cut)] of pairs (a, b or None), with the special tokens
    that the tokenizer puts around them, the longer of the two cut until both fit: transformers' tokenizer(a, b,
    truncation=True, max_length=longest), but that the name of a special token in a text is plain text."""
    hf = runner(tok)
    hf.enable_truncation(longest, strategy='longest_first')
    texts = [a if b is None else (a, b) for a, b in pairs]
    characters = sum(len(a) + len(b or '') for a, b in pairs)
    made = tokenizer.in_time(lambda: hf.encode_batch(texts), characters)
    return [(one.ids, begin_of_second(one), bool(one.overflowing)) for one in made]


def runner(tok):
    """The tokenizers.Tokenizer that knows what stands around and between sentences. Raises DataError without one."""
    import tokenizers

    if getattr(tok, 'hf', None):
        return tok.hf
    if tok.json is None:
        raise DataError(f"the tokenizer '{tok.kind}' has no tokenizer.json: name a model's folder, --tokenizer=FOLDER")
    hf = tokenizers.Tokenizer.from_str(tok.json)  # ours
    hf.encode_special_tokens = True
    return hf


def begin_of_second(made):
    """By the types that BERT's tokenizers give; else by the sentence that each token is of."""
    for marks in (made.type_ids, made.sequence_ids):
        if 1 in marks:
            return marks.index(1)
    return len(made.ids)


def config_of(folder):
    """What a model's config.json says of it, as far as we ask; nothing without one."""
    path = os.path.join(folder or os.devnull, 'config.json')
    return fields.read(path, CONFIG, TokenizerError, ADVICE) if os.path.exists(path) else dict.fromkeys(CONFIG)


def pad_of(tok, folder):
    """The id that fills rows: the model's, else the tokenizer's, else 0. It is not read, but models that find their
    places by it (RoBERTa) have to meet their own."""
    pad = config_of(folder)['pad_token_id']
    if pad is not None and pad >= 0:
        return pad
    path = os.path.join(folder or os.devnull, 'tokenizer_config.json')
    if os.path.exists(path):
        named = tokenizer.name_of(tokenizer.read_json(path, PAD)['pad_token'], f'{path}, pad_token')
        return (named and runner(tok).token_to_id(named)) or 0
    return 0


def room(folder, most=512):
    """Tokens of the longest example that the model can read, at most `most`."""
    config = config_of(folder)
    positions = config['max_position_embeddings'] or most
    if config['model_type'] in AFTER_PAD:
        positions -= (config['pad_token_id'] or 0) + 1
    return min(positions, most)
