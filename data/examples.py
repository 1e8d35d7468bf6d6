"""
What data/instruct, data/gsm8k and data/mathinstruct share: rows of many formats -> conversations -> token files.

    with ExampleWriter('data/mine', tok, template, made_by='my script') as out:
        out.add_example('gsm8k', 'train', ids, trained, size)         # any number, in any order

Beside train.bin, val.bin and meta.json of a folder of text (data/common.py) stand, for each split, SPLIT_trained.bin
(uint8, as long as the tokens: 1 where a token is trained, as what is to be predicted) and SPLIT_ends.bin (int64: of
each example the position one past its last token). meta.json says "examples": true, and how many there are.
"""

import numpy as np

from data import DataError, common
from data.signed import special_names


class ExampleWriter(common.Writer):
    """A Writer of examples. Their tokens, marks and ends are grouped by source alike."""

    kinds = ('', '_trained', '_ends')

    def __init__(self, folder, tok, template, made_by, **extra):
        super().__init__(folder, tok, made_by, examples=True, **extra)
        top = max([tok.vocab_size - 1, *(i for names in special_names(tok) for i in names.values())])
        self.dtype = 'uint16' if top < 65536 else 'uint32'
        self.template = template
        self.examples, self.trained = dict.fromkeys(common.SPLITS, 0), dict.fromkeys(common.SPLITS, 0)

    def add_example(self, source, split, ids, trained, size):
        """ids: list of int; trained: list of bool of the same length; size: bytes of the text that is trained."""
        if not any(trained):
            raise DataError('an example without a trained token teaches nothing: leave it out')
        self.take(source, split, ids, size, documents=1)
        for kind, array in (('_trained', np.array(trained, np.uint8)), ('_ends', np.array([len(ids)], '<i8'))):
            self.chunks.setdefault((source, split, kind), []).append(array)
        entry = self.sources[source]
        entry[f'{split}_examples'] = entry[f'{split}_documents']
        self.examples[split] += 1
        self.trained[split] += sum(trained)
        self.vocab_size = max(self.vocab_size, max(ids) + 1)
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
        super()._finish()
