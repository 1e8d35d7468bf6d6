"""
Make a data set of your own text files.

    python data/text/prepare.py --input=notes/                           # a folder: its top-level folders are sources
    python data/text/prepare.py --input='books/*.txt'                    # files: each one is a source
    python data/text/prepare.py --input wiki/ code/ --out_dir=data/mix   # several folders: each one is a source
    python data/text/prepare.py --input=book.txt --tokenizer=bytes       # one file: its last 5 % are the val split

Then train with --dataset=text (or the name of out_dir). Files are UTF-8, or UTF-16 with a byte order mark, and
may be packed by gzip, bzip2 or xz.
"""

import glob
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from data import DataError, common, files  # noqa: E402

# Files taken from a folder. A file that --input names may have any ending.
ENDINGS = ('.txt', '.md', '.rst', '.tex', '.py', '.c', '.h', '.cpp', '.cu', '.js', '.ts', '.java', '.go', '.rs', '.sh')


def unpacked_name(name):
    stem, ending = os.path.splitext(name.lower())
    return stem if ending in files.PACKED else name.lower()


def walk(folder):
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith('.') and f not in ('__pycache__', 'node_modules'))
        yield from (Path(parent, name) for name in sorted(names) if unpacked_name(name).endswith(ENDINGS))


def find(inputs):
    """[(source, name, path)] of all files. The split of a file depends on its name."""
    paths = []
    for pattern in inputs:
        # A path that exists is taken literally, even with a [ in it.
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f'--input={pattern} matches no file and no folder')
        paths += [Path(match).resolve() for match in matches]
    paths = list(dict.fromkeys(paths))
    if len(paths) == 1 and paths[0].is_dir():
        top = paths[0]
        found = [(path.relative_to(top).parts, path) for path in walk(top)]
        found = [(parts[0] if len(parts) > 1 else top.name, '/'.join(parts), path) for parts, path in found]
    else:
        common_parent = os.path.commonpath([path.parent for path in paths])
        found = []
        for path in paths:
            source = path.relative_to(common_parent).as_posix()
            inside = walk(path) if path.is_dir() else [path]
            found += [(source, file.relative_to(common_parent).as_posix(), file) for file in inside]
    found = list({path: (source, name, path) for source, name, path in reversed(found)}.values())[::-1]
    if not found:
        for other in (file for path in paths for file in sorted(path.rglob('*')) if file.is_file()):
            files.look(other)  # says what it is, if it is a table, an archive, ...
        raise DataError(f'--input={" ".join(inputs)} holds no text file ({" ".join(ENDINGS)})')
    return found


def by_position(found, val_share):
    """Whether val is to be the last part of each file. Many files are split by name instead, so that no val text
    continues a train text, unless chance leaves a side less than half of its share."""
    sizes = {'train': 0, 'val': 0}
    for _, name, path in found:
        sizes[common.split_of(name, val_share)] += path.stat().st_size
    total, wanted = sum(sizes.values()), {'train': 1 - val_share, 'val': val_share}
    return len(found) * val_share < 2 or any(sizes[split] < wanted[split] / 2 * total for split in sizes)


def documents(found, val_share):
    """Yield (source, split, text)."""
    cut_each = by_position(found, val_share)
    for source, name, path in found:
        text = files.read_text(path)
        if cut_each:
            n = int(len(text) * (1 - val_share))
            yield source, 'train', text[:n]
            yield source, 'val', text[n:]
        else:
            yield source, common.split_of(name, val_share), text


def prepare(out_dir, inputs, tokenizer='bpe', vocab_size=4096, val_share=0.05):
    common.check_val_share(val_share)
    found = find(inputs)
    size = sum(path.stat().st_size for _, _, path in found)
    if not size:
        raise DataError(f'--input={" ".join(inputs)} is empty: there is nothing to train on')
    train_texts = (text for _, split, text in documents(found, val_share) if split == 'train')
    tok = common.choose_tokenizer(tokenizer, train_texts, vocab_size)
    with common.Writer(out_dir, tok, common.made_by('text'), total=size) as out:
        for source, split, text in documents(found, val_share):
            out.add(source, split, text)
    return out.meta


def main():
    parser = common.parser(__doc__)
    parser.add_argument('--input', nargs='+', required=True, help='files, folders or quoted globs')
    parser.add_argument('--tokenizer', default='bpe', help='bpe | bytes | tiktoken:NAME | folder with a tokenizer.json')
    parser.add_argument('--vocab_size', type=int, default=4096, help='ids of a bpe tokenizer, at least 257')
    parser.add_argument('--val_share', type=float, default=0.05, help='share of the text for validation')
    parser.add_argument(
        '--out_dir', type=common.folder, default=str(HERE), help='where train.bin, val.bin and meta.json go'
    )
    args = parser.parse_args()
    start = time.time()
    meta = prepare(args.out_dir, args.input, args.tokenizer, args.vocab_size, args.val_share)
    common.report(meta, args.out_dir, time.time() - start)


if __name__ == '__main__':
    common.run(main)
