"""
Read a file as text, or say what it is instead and what to type.

    text = files.read_text('chapter.txt')          # UTF-8, or UTF-16 and UTF-32 that begin with a byte order mark
    text = files.read_text('chapter.txt.gz')       # unpacked first; .bz2 and .xz, too
    for place, row in files.rows('examples.jsonl'):    # ('examples.jsonl:1', {...}); .json and .parquet, too

A file is known by its first bytes, not by its name, since guessing wrongly would train on noise without a word.
"""

import codecs
import importlib
import json
from pathlib import Path

from data import DataError, fields

UNPACK = {b'\x1f\x8b': 'gzip', b'BZh91AY&SY': 'bz2', b'\xfd7zXZ\x00': 'lzma'}
PACKED = ('.gz', '.bz2', '.xz')
LISTS = ('data', 'train', 'rows', 'examples', 'instances')  # fields of a .json file that may hold its rows
MARKS = {  # UTF-32's first, since UTF-16's is its beginning
    codecs.BOM_UTF32_LE: 'utf-32',
    codecs.BOM_UTF32_BE: 'utf-32',
    codecs.BOM_UTF8: 'utf-8-sig',
    codecs.BOM_UTF16_LE: 'utf-16',
    codecs.BOM_UTF16_BE: 'utf-16',
}
PARQUET = '''python -c "import datasets; [print(row['text']) for row in datasets.Dataset.from_parquet('{path}')]"'''
IMAGE = ('a picture', 'leave it out')
KNOWN = {  # first bytes: what it is, how to make text of it
    b'PAR1': ('a Parquet table', PARQUET + ' > text.txt (with the name of its column for text)'),
    b'ARROW1': ('an Arrow table', PARQUET.replace('parquet', 'file') + ' > text.txt (with the name of its column)'),
    b'%PDF': ('a PDF', 'pdftotext {path}'),
    b'PK\x03\x04': ('a zip archive', 'unzip {path} -d text/, or for a .docx or .epub: pandoc {path} -o text.txt'),
    b'\x28\xb5\x2f\xfd': ('packed by zstd', 'zstd -d {path}'),
    b'7z\xbc\xaf\x27\x1c': ('a 7z archive', '7z x {path}'),
    b'Rar!\x1a\x07': ('a rar archive', 'unrar x {path}'),
    b'\xd0\xcf\x11\xe0': ('an old Office document', 'libreoffice --convert-to txt {path}'),
    b'{\\rtf': ('RTF', 'libreoffice --convert-to txt {path}'),
    b'SQLite format 3\x00': ('a SQLite database', 'sqlite3 {path} "select COLUMN from TABLE" > text.txt'),
    b'\x93NUMPY': ('a NumPy array', 'write its text to a .txt file'),
    b'\x89HDF': ('an HDF5 file', 'write its text to a .txt file'),
    b'\x89PNG': IMAGE,
    b'\xff\xd8\xff': IMAGE,
    b'GIF8': IMAGE,
    b'\x7fELF': ('a program', 'leave it out'),
}


def read_text(path):
    """The text of a file. Raises DataError if it is something else, or text in a coding that it does not name."""
    data = unpacked(path, Path(path).read_bytes())
    text = decoded(path, data)
    check_json(path, text)
    return text


def decoded(path, data):
    if encoding := next((MARKS[mark] for mark in MARKS if data.startswith(mark)), None):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as e:
            raise DataError(f'{path} begins as {encoding} and is broken at byte {e.start:,}: fetch it again') from e
    check_kind(path, data)
    check_zeros(path, data)
    try:
        return data.decode('utf-8')
    except UnicodeDecodeError as e:
        raise DataError(
            f'{path} is not UTF-8 (byte {e.start:,}): '
            f'convert it first, e.g. iconv -f latin1 -t utf-8 {path} > converted.txt, or leave it out if it is no text'
        ) from e


def look(path):
    """Raise DataError if the first bytes of a file say that it is no plain text."""
    with open(path, 'rb') as f:
        head = f.read(2**16)
    check_kind(path, head)
    check_json(path, head.decode('utf-8', 'ignore'))


def check_kind(path, data):
    if what := next((KNOWN[start] for start in KNOWN if data.startswith(start)), None):
        raise DataError(f'{path} is {what[0]}, not text: {what[1].format(path=path)}')
    if data[257:262] == b'ustar':
        raise DataError(f'{path} is a tar archive, not text: tar -xf {path}')


def unpacked(path, data):
    module = next((UNPACK[start] for start in UNPACK if data.startswith(start)), None)
    if module is None:
        return data
    try:
        return importlib.import_module(module).decompress(data)
    except Exception as e:  # each library has its own
        raise DataError(f'{path} is packed by {module} and broken ({e}): fetch it again') from e


def check_zeros(path, data):
    """Raise DataError for text in two bytes a character without a mark, which is valid UTF-8 full of NULs, and for what
    else is full of them."""
    odd, even = data[1::2].count(0), data[::2].count(0)
    if odd + even <= len(data) // 50:
        return
    if max(odd, even) > 9 * min(odd, even):
        coding = 'utf-16le' if odd > even else 'utf-16be'
        raise DataError(f'{path} looks like UTF-16: iconv -f {coding} -t utf-8 {path} > converted.txt')
    raise DataError(f'{path} is not text (it is full of NUL bytes): leave it out')


def check_json(path, text):
    """Raise DataError for a file of one JSON object a line: trained on as it is, a model learns its brackets."""
    if not {'.json', '.jsonl', '.ndjson'} & {*Path(path).suffixes}:
        return
    try:
        row = json.loads(text.lstrip().partition('\n')[0])
    except (ValueError, RecursionError):
        return
    if isinstance(row, dict) and isinstance(row.get('text'), str):
        raise DataError(f'{path} is JSON lines: python data/c4/prepare.py --input={path} --tokenizer=FOLDER reads them')
    if isinstance(row, dict):
        command = f'python data/instruct/prepare.py --input={path} --tokenizer=FOLDER'
        raise DataError(f'{path} is JSON lines, not text: {command} reads examples')


def rows(path):
    """Yield (place, row) of a .jsonl, .json or .parquet file: 'FILE:3', as an editor finds it, and a dict.

    Raises DataError, naming the place, for what is no row of fields."""
    with open(path, 'rb') as f:
        head = f.read(4)
    if head.startswith(b'PAR1'):
        found = parquet_rows(path)
    else:
        text = decoded(path, unpacked(path, Path(path).read_bytes()))
        found = whole_rows(path, text)
        found = line_rows(path, text) if found is None else found
    for place, row in found:
        if not isinstance(row, dict):
            raise DataError(f'{place} holds {fields.shown(row)}, not an object with fields: mend it or leave it out')
        yield place, row


def whole_rows(path, text):
    """The rows of a file that is one JSON value: a list, or an object with the list in a field; None if it is not."""
    begin = text[:4096].lstrip()
    first, _, more = begin.partition('\n')
    if begin.startswith('{') and more.strip() and parsed(first)[1] is None:
        return None  # an object a line
    found, error = parsed(text)
    if error:
        if begin.startswith('['):
            raise DataError(f'{path} begins as a list and is not valid JSON ({error}): mend it')
        return None
    if isinstance(found, dict):
        inner = [found[name] for name in LISTS if isinstance(found.get(name), list)]
        if not inner and not more:
            return None  # one object on one line
        found = (inner or [found])[0]
    found = found if isinstance(found, list) else [found]
    return [(f'{path}, row {n}', row) for n, row in enumerate(found, 1)]


def line_rows(path, text):
    begin, n = 0, 0
    while begin < len(text):
        end = text.find('\n', begin)
        end = len(text) if end < 0 else end
        line, n, begin = text[begin:end], n + 1, end + 1
        if line.strip():
            row, error = parsed(line)
            if error:
                raise DataError(f'{path}:{n} is not valid JSON ({error}): mend this line or delete it')
            yield f'{path}:{n}', row


def parsed(text):
    """-> the JSON value, None; or None, the error."""
    try:
        return json.loads(text), None
    except (ValueError, RecursionError) as error:
        return None, error


def parquet_rows(path):
    import pyarrow
    import pyarrow.parquet

    n = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                n += 1
                yield f'{path}, row {n}', row
    except (pyarrow.ArrowException, OSError) as e:
        raise DataError(f'{path} is a broken Parquet table ({e}): fetch it again') from None
