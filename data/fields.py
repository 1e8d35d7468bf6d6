"""
JSON files that somebody else wrote, read by a table of the fields they may have.

    META = {'vocab_size': whole(1, ROWS), 'tokenizer': text(default='hf'), 'eot': maybe(whole(0, ROWS))}
    meta = fields.read('data/mine/meta.json', META, DataError, 'make it again')     # a dict with all of META's fields

Whatever stands in a file, what comes back has the type and the range that its table says, and all else is one sentence:
the file, the field, what stands there, what may, and what to do. Fields that a table does not name pass unchecked.
"""

import json
import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

REQUIRED = object()
LARGEST = 2**30  # bytes of a JSON file; the largest vocabularies of published tokenizers take 2**26
ROWS = 2**22  # of an embedding: no published vocabulary has more than a quarter of it


@dataclass(frozen=True)
class Field:
    words: str  # what may stand there
    fits: Callable[[Any], bool]
    default: Any = REQUIRED  # of a missing field


def whole(low, high, default=REQUIRED):
    return Field(f'a whole number from {low:,} to {high:,}', lambda v: type(v) is int and low <= v <= high, default)


def number(low, high, default=REQUIRED):
    # NaN is neither above nor below anything
    return Field(f'a number from {low:g} to {high:g}', lambda v: type(v) in (int, float) and low <= v <= high, default)


def text(default=REQUIRED):
    return Field('a text', lambda v: type(v) is str and '\0' not in v, default)  # no path has a NUL


def one_of(*values, default=REQUIRED):
    fits = lambda v: any(type(v) is type(value) and v == value for value in values)  # noqa: E731 (True is no 1 here)
    return Field(' or '.join(map(repr, values)), fits, default)


def switch(default=REQUIRED):
    return one_of(True, False, default=default)


def table(default=REQUIRED):
    """A JSON object, of any content."""
    return Field('an object', lambda v: type(v) is dict, default)


def several(field, default=REQUIRED):
    """A list, each as `field` says."""
    return Field(f'a list, each {field.words}', lambda v: type(v) is list and all(map(field.fits, v)), default)


def either(*choices, default=REQUIRED):
    return Field(' or '.join(f.words for f in choices), lambda v: any(f.fits(v) for f in choices), default)


def maybe(field, default=None):
    """`field`, null, or missing, which is the default, too."""
    return replace(field, words=f'{field.words}, or null', fits=lambda v: v is None or field.fits(v), default=default)


def shown(value):
    """A value as text for a sentence, however long or deep it is."""
    return reprlib.repr(value)


def check(given, fields, where, error, advice):
    """`given`, a dict, with the defaults of what is missing. Raises `error` for the first field that does not fit."""
    for name, field in fields.items():
        if name not in given and field.default is REQUIRED:
            raise error(f'{where} lacks {name}, {field.words}: {advice}')
        if name in given and not field.fits(given[name]):
            raise error(f'{where}: {name}={shown(given[name])} is not {field.words}: {advice}')
    return {name: field.default for name, field in fields.items()} | given


def read_bytes(path, error, advice):
    """A file's bytes. Raises `error` if it is no file (a pipe never ends), or larger than any of its kind."""
    check_file(path, error, advice)
    with open(path, 'rb') as f:
        return f.read()


def check_file(path, error, advice):
    if os.path.exists(path) and not os.path.isfile(path):
        raise error(f'{path} is no file: {advice}')
    if os.path.getsize(path) > LARGEST:
        raise error(f'{path} is larger than any file of its kind: {advice}')


def read_text(path, error, advice):
    """A file's text. Raises `error` if it is no UTF-8, and as read_bytes does."""
    check_file(path, error, advice)
    with open(path, encoding='utf-8', newline='') as f:
        try:
            return f.read()
        except UnicodeDecodeError as reason:
            raise error(f'{path} is broken, not UTF-8 ({reason}): {advice}') from None


def check_link(folder, name, error):
    """Raise `error` if the file `name` is a link out of its folder. The hub's cache, whose files are links, is one."""
    home, path = os.path.realpath(folder), os.path.realpath(os.path.join(folder, name))
    snapshots = os.path.dirname(home)
    blobs = [os.path.join(os.path.dirname(snapshots), 'blobs')] if os.path.basename(snapshots) == 'snapshots' else []
    if not any(path.startswith(os.path.join(root, '')) for root in (home, *blobs)):
        raise error(f'{folder}/{name} is a link to {path}, out of its folder: put the file itself there')


def parse(text, path, error, advice):
    """A JSON object as a dict."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise error(f'{path} is broken, not valid JSON ({reason}): {advice}') from None
    if type(found) is not dict:
        raise error(f'{path} holds {shown(found)}, not an object with fields: {advice}')
    return found


def read(path, fields, error, advice):
    """A JSON file as a dict that fits the table. Raises `error`, or FileNotFoundError."""
    return check(parse(read_text(path, error, advice), path, error, advice), fields, path, error, advice)
