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

from data.tokenizer import EOT, HF, TokenizerError, in_time

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

        ends[i] is how many characters of the text lie before the end of token i, the signs not counted; tokens that
        share a character all end behind it. Raises TokenizerError if a name without a sign becomes its token, too."""
        read = self.read_hf if isinstance(self.tok, HF) else self.read_bytes
        signed = pattern(self.names, sign)
        found = []
        for text, (ids, ends, parsed) in zip(texts, read(texts, sign)):
            places = [match.start() for match in signed.finditer(text)]
            plain = [self.names[name] for name in self.plain_names(text, sign)]
            if plain and (np.isin(ids, plain) & ~np.array(parsed)).any():
                raise TokenizerError('this tokenizer.json makes a special token of plain text that only names it')
            ends = np.array(ends, np.int64)
            found.append((ids, ends - np.searchsorted(places, ends)))  # without the signs before each end
        return found

    def plain_names(self, text, sign):
        return {match[1] for match in pattern(self.names, f'{sign}?').finditer(text) if match[0][0] != sign}

    def read_hf(self, texts, sign):
        hf, ids_of = self.copy(sign)
        made = in_time(lambda: hf.encode_batch(texts, add_special_tokens=False), sum(map(len, texts)))
        for e in made:
            ids = [ids_of.get(i, i) for i in e.ids]
            yield ids, [end for _, end in e.offsets], [i in ids_of for i in e.ids]

    def copy(self, sign):
        """A tokenizer that knows each of our names with the sign before it, as one more added token with an id of its
        own, and reads the bare name as text; {the new id: the token's}."""
        if sign not in self.copies:
            import tokenizers

            saved = json.loads(self.tok.hf.to_str())
            flags = {token['content']: token for token in saved['added_tokens']}
            for name in self.names:
                flags[name]['special'] = True  # a special token can be told not to count
            saved['post_processor'] = None  # it would add tokens, and byte-level ones trim the offsets
            hf = tokenizers.Tokenizer.from_str(json.dumps(saved))
            hf.encode_special_tokens = True
            for name in self.names:
                how = {key: flags[name][key] for key in ('lstrip', 'rstrip', 'single_word')}
                hf.add_tokens([tokenizers.AddedToken(sign + name, normalized=False, special=False, **how)])
            self.copies[sign] = hf, {hf.token_to_id(sign + name): i for name, i in self.names.items()}
        return self.copies[sign]

    def read_bytes(self, texts, sign):
        signed = pattern(self.names, sign)
        for text in texts:
            ids, ends, parsed, at = [], [], [], 0
            for i, part in enumerate(signed.split(text)):
                if i % 2:
                    ids.append(self.names[part])
                    at += len(sign + part)
                    ends.append(at)
                else:
                    new = self.tok.encode(part)
                    ids += new
                    ends += [at + end for end in character_ends(part, [len(self.tok.decode_bytes([t])) for t in new])]
                    at += len(part)
                parsed += [i % 2 == 1] * (len(ids) - len(parsed))
            yield ids, ends, parsed


def character_ends(text, sizes):
    """The characters of a text that are before the end of each token, given the tokens' sizes in bytes of UTF-8."""
    starts = [0, *accumulate(len(c.encode('utf-8', 'replace')) for c in text)]  # of each character, and the end
    ends, i = [], 0
    for at in accumulate(sizes):
        while i < len(text) and starts[i] < at:
            i += 1
        ends.append(i)
    return ends
