"""
The files of a tokenizer that go into a folder with weights, so that it is complete for us and for other readers.

    for name, content in files_of('data/mine', 'path/to/base', tok=tok).items(): ...      # {name: bytes}
"""

import json
import os

from data import fields
from data.tokenizer import ADVICE, EOT_FIELDS, META, TokenizerError, ends_of, read_json, several

FILES = ('meta.json', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja')
FILES += ('generation_config.json',)
# What slow tokenizers and llama.cpp read instead of tokenizer.json; beside one that says the same.
OLD_FILES = ('tokenizer.model', 'spm.model', 'sentencepiece.bpe.model', 'vocab.json', 'merges.txt', 'vocab.txt')
OLD_FILES += ('added_tokens.json',)


def files_of(*folders, tok=None):
    """{name: bytes} of the tokenizer's files, to be saved beside weights; the first folder that has a file counts.
    There is one chat template among them, and with `tok` generation_config.json names all tokens that end a text.

    Raises TokenizerError for a link that leaves its folder: what it points to might be anything on this machine."""
    files, folders = {}, [*filter(None, folders)]
    for folder in folders:
        for name in [*FILES, *(OLD_FILES if os.path.exists(os.path.join(folder, 'tokenizer.json')) else ())]:
            path = os.path.join(folder, name)
            if name not in files and os.path.lexists(path):
                fields.check_link(folder, name, TokenizerError)
                if name.endswith('.model'):
                    files[name] = fields.read_bytes(path, TokenizerError, ADVICE)
                else:
                    files[name] = fields.read_text(path, TokenizerError, ADVICE).encode()

    def parsed(name, table):
        return fields.check(
            fields.parse(files[name], name, TokenizerError, ADVICE), table, name, TokenizerError, ADVICE
        )

    if 'chat_template.jinja' in files and 'tokenizer_config.json' in files:  # readers differ in which of two they take
        config = parsed('tokenizer_config.json', {})
        if config.pop('chat_template', None) is not None:
            files['tokenizer_config.json'] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    if tok:
        name, paths = 'generation_config.json', [os.path.join(folder, 'config.json') for folder in folders]
        generation = parsed(name, EOT_FIELDS) if name in files else {'eos_token_id': None}
        config = next((read_json(path, EOT_FIELDS) for path in paths if os.path.exists(path)), None)
        meta = parsed('meta.json', META) if 'meta.json' in files else None
        found = ends_of(generation, config, meta, tok)
        if found and found != several(generation):
            generation = {key: value for key, value in generation.items() if key != 'eos_token'}
            generation['eos_token_id'] = found if len(found) > 1 else found[0]
            files[name] = json.dumps(generation, indent=2).encode()
    return files
