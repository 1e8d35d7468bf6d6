"""
Train a byte-level BPE, and say how its file writes bytes.

    text = bpe.train(['some text', 'and more'], vocab_size=4096, eot='<|endoftext|>')      # a tokenizer.json

Merges are counted over words, not over the text: a word that comes a thousand times costs no more than once. The
library's work on one word grows with the square of its length, so a longer run than LONGEST is trained on in pieces.
"""

import re

# GPT-4's pattern with two changes: digits in groups of two, since a small vocabulary has no room for all groups of
# three, and whitespace in runs of at most 128, since an unbounded \s+ overflows tiktoken's regex stack on a file with a
# million spaces.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s{0,128}[\r\n]+|\s{1,128}(?!\S)|\s{1,128}'
)
LONGEST = 512  # characters of a word that is trained on; a word of PATTERN may be as long as the text
RUN = re.compile(rf'\S{{{LONGEST}}}|[\r\n]{{{LONGEST}}}')


def byte_alphabet():
    """GPT-2's map of characters to bytes: printable bytes are their own character, the others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}


def short_runs(texts):
    """The texts, cut where they go on for LONGEST characters without a space: DNA, base64, lines of dashes."""
    for text in texts:
        begin = 0
        for match in RUN.finditer(text):
            yield text[begin : match.end()]
            begin = match.end()
        yield text[begin:]


def train(texts, vocab_size, eot):
    """An iterable of texts -> tokenizer.json as a text. Token 0 is `eot`, 1 to 256 are the bytes, so any text can be
    encoded. A pair seen only once is never merged, so a short text yields fewer ids than asked for."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), 'isolated')
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[eot],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(short_runs(texts), trainer)
    return bpe.to_str(pretty=True)
