"""
A text in which some names stand for special tokens and the same names elsewhere do not -> ids, and where each ends.

    coder = Coder(tok, names={'<|im_end|>': 2})
    coder.encode_batch(['SIGN<|im_end|> and <|im_end|>'], SIGN)     # [([2, 284, ...], [11, 15, ...])]

A name counts where the sign stands before it, a character that occurs nowhere else; everywhere else it is plain text,
so that nobody's text can end a turn. The text is tokenised once, as a whole: published tokenizers treat what follows a
special token differently from what begins a text, and pieces put together would differ.
"""

import json
import re
from itertools import accumulate

import numpy as np

from data.tokenizer import ADVICE, EOT, HF, TokenizerError, in_time

# Unicode's noncharacters: no text should hold one, and a text that does leaves 31 others.
NONCHARACTERS = [chr(0xFDD0 + i) for i in range(32)]


def pattern(names, sign=''):
    """A regular expression of any of the names, the longest first; group 1 is the name."""
    longest = sorted(names, key=len, reverse=True)
    return re.compile(sign + '(' + ('|'.join(map(re.escape, longest)) or '(?!)') + ')')


def special_names(tok):
    """-> {name: id} of the special tokens, and of those that were added and are not special."""
    if isinstance(tok, HF):
        added = tok.hf.get_added_tokens_decoder()
        return tuple({t.content: i for i, t in added.items() if t.special == special} for special in (True, False))
    encoding = getattr(tok, 'encoding', None)
    return (dict(encoding._special_tokens) if encoding else {EOT: tok.eot}), {}


class Coder:
    """names: {name: id} of the tokens that count only where the sign stands before them."""

    def __init__(self, tok, names):
        self.tok, self.names, self.copies = tok, names, {}

    def encode_batch(self, texts, sign):
        """[(ids, ends)] of texts in which `sign` stands before every name that is to be a token.

        ends, (tokens,) int64: how many characters of the text are before the end of each token, the signs not counted;
        tokens that share a character all end behind it."""
        read = self.read_hf if isinstance(self.tok, HF) else self.read_bytes
        signed, found = pattern(self.names, sign), []
        for text, (ids, ends) in zip(texts, read(texts, sign)):
            places = [match.start() for match in signed.finditer(text)]
            ends = np.array(ends, np.int64)
            found.append((ids, ends - np.searchsorted(places, ends)))  # without the signs before each end
        return found

    def read_hf(self, texts, sign):
        hf = self.copy(sign)
        made = in_time(lambda: hf.encode_batch(texts, add_special_tokens=False), sum(map(len, texts)))
        yield from ((e.ids, [end for _, end in e.offsets]) for e in made)

    def copy(self, sign):
        """The tokenizer with each of our tokens renamed, the sign before its name: of the bare name it knows nothing,
        wherever a tokenizer.json may have it."""
        if sign not in self.copies:
            import tokenizers

            saved = json.loads(self.tok.hf.to_str())
            new = {name: sign + name for name in self.names}
            saved['post_processor'] = None  # it would add tokens, and byte-level ones trim the offsets
            for token in saved['added_tokens']:
                if token['content'] in new:
                    token |= {'content': new[token['content']], 'normalized': False}
            model = saved['model']
            if isinstance(model['vocab'], list):  # of (token, score)
                model['vocab'] = [[new.get(name, name), score] for name, score in model['vocab']]
            else:
                model['vocab'] = {new.get(name, name): i for name, i in model['vocab'].items()}
            if model.get('unk_token') in new:
                model['unk_token'] = new[model['unk_token']]
            hf = tokenizers.Tokenizer.from_str(json.dumps(saved))
            if lost := [name for name, i in self.names.items() if hf.token_to_id(new[name]) != i]:
                raise TokenizerError(f'this tokenizer.json has {lost[0]} twice: {ADVICE}')
            self.copies[sign] = hf
        return self.copies[sign]

    def read_bytes(self, texts, sign):
        signed = pattern(self.names, sign)
        for text in texts:
            ids, ends, at = [], [], 0
            for i, part in enumerate(signed.split(text)):
                new = [self.names[part]] if i % 2 else self.tok.encode(part)
                if i % 2:
                    part = sign + part
                    ends.append(at + len(part))
                else:
                    ends += [at + end for end in character_ends(part, [len(self.tok.decode_bytes([t])) for t in new])]
                ids += new
                at += len(part)
            yield ids, ends


def character_ends(text, sizes):
    """The characters of a text that are before the end of each token, given the tokens' sizes in bytes of UTF-8."""
    starts = [0, *accumulate(len(c.encode('utf-8', 'replace')) for c in text)]  # of each character, and the end
    ends, i = [], 0
    for at in accumulate(sizes):
        while i < len(text) and starts[i] < at:
            i += 1
        ends.append(i)
    return ends
