"""
The source code of Python's own standard library, as a training text that every machine already has: no network needed.

    python data/pystdlib/prepare.py                        # BPE with 4,096 ids: what the small configs train on
    python data/pystdlib/prepare.py --vocab_size=16384     # a larger vocabulary for a larger model
    python data/pystdlib/prepare.py --tokenizer=bytes --out_dir=data/pystdlib_bytes

Expect about 11 MB in 700 files, 3.3M tokens, in about 3 seconds on two cores. The same Python gives the same files,
byte for byte.
"""

import os
import sys
import sysconfig
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from data import DataError, common  # noqa: E402

VAL_SHARE = 0.1
# Tests are a third of the library and mostly data. pydoc_data (one file of English) and encodings (120 nearly equal
# tables of characters) are generated, and would be two thirds of val. The others are not part of the library.
SKIP = {'test', 'tests', 'idle_test', 'pydoc_data', 'encodings', 'site-packages', 'dist-packages', '__pycache__'}
SKIP |= {'_bundled'}


def find(root):
    """[(source, split, path)] of all .py files. Each package is a source; the files at the top are 'modules'."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in SKIP and not f.startswith('config-'))
        for name in sorted(names):
            # _sysconfigdata holds the paths of the machine that built this Python.
            if not name.endswith('.py') or name.startswith('_sysconfigdata'):
                continue
            path = Path(folder, name)
            relative = path.relative_to(root)
            source = relative.parts[0] if len(relative.parts) > 1 else 'modules'
            found.append((source, common.split_of(relative.as_posix(), VAL_SHARE), path))
    return sorted(found, key=lambda item: (item[0] != 'modules', item))


def prepare(out_dir, tokenizer='bpe', vocab_size=4096, root=None, name='pystdlib', once=False):
    """Write out_dir and return its meta.json as a dict. train.py runs this file if its default data set is missing.

    root: the folder whose source it is, the library's own if None; name: of the data set. once: equal files count once.
    """
    root = Path(root or sysconfig.get_paths()['stdlib'])
    documents, skipped, copies, seen = [], 0, 0, set()
    for source, split, path in find(root):
        try:
            text = path.read_bytes().decode('utf-8-sig')
        except UnicodeDecodeError:
            skipped += 1
            continue
        if once and text in seen:
            copies += 1
            continue
        seen.add(text)
        documents.append((source, split, text))
    if not documents:
        raise DataError(f'{root} holds no .py files: this Python comes without its source, use data/text/prepare.py')
    tok = common.choose_tokenizer(tokenizer, (text for _, split, text in documents if split == 'train'), vocab_size)
    size = sum(len(text) for _, _, text in documents)
    command = f'python data/{name}/prepare.py --tokenizer={tokenizer} --vocab_size={vocab_size}'
    left_out = {'skipped_not_utf8': skipped} | ({'skipped_copies': copies} if once else {})
    with common.Writer(out_dir, tok, command, total=size, **left_out) as out:
        for source, split, text in documents:
            out.add(source, split, text)
    return out.meta


def main(doc=__doc__, folder=str(HERE), **more):
    parser = common.parser(doc)
    parser.add_argument('--tokenizer', default='bpe', help='bpe | bytes | tiktoken:NAME | folder with a tokenizer.json')
    parser.add_argument('--vocab_size', type=int, default=4096, help='ids of a bpe tokenizer, at least 257')
    parser.add_argument(
        '--out_dir', type=common.folder, default=folder, help='where train.bin, val.bin and meta.json go'
    )
    args = parser.parse_args()
    start = time.time()
    meta = prepare(args.out_dir, args.tokenizer, args.vocab_size, **more)
    common.report(meta, args.out_dir, time.time() - start)
    for what in ('skipped_not_utf8', 'skipped_copies'):
        if meta.get(what):
            print(f'{what}: {meta[what]}')


if __name__ == '__main__':
    common.run(main)
