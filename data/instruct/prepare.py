"""
Make a data set of your own examples: questions and answers, or whole conversations, for a model that you have.

    python data/instruct/prepare.py --input=mine.jsonl --tokenizer=MODEL_FOLDER            # the model's own template
    python data/instruct/prepare.py --input=a.jsonl,more/ --tokenizer=FOLDER --template=alpaca     # for a base model
    python data/instruct/prepare.py --input=q.parquet --tokenizer=FOLDER --fields=prompt:ask,completion:reply
    python data/instruct/prepare.py --input=train.jsonl --val=val.jsonl --tokenizer=FOLDER --out_dir=data/mine

Then train with --dataset=instruct (or the name of out_dir). Reads .jsonl, .json and .parquet, packed by gzip or not, in
the formats of OpenAI (messages), sharegpt (conversations), alpaca, prompt and completion, question and answer, and
others (data/formats.py). Trained are the answers, each with the token that ends its turn. The script prints one
example with its trained tokens marked: look at it. A broken line stops it and nothing is written; empty answers and
examples too long are left out and counted.
"""

import glob
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from data import DataError, common, examples, files, formats  # noqa: E402

ENDINGS = ('.jsonl', '.ndjson', '.json', '.parquet')  # of files taken from a folder


def find(inputs, flag='--input'):
    """[path] of all files: of names, globs and folders, in lists or with commas between them."""
    found = []
    for word in inputs:
        for pattern in [word] if os.path.exists(word) else filter(None, word.split(',')):
            matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            if not matches:
                raise DataError(f'{flag}={pattern} matches no file and no folder')
            for match in map(Path, matches):
                inside = sorted(match.rglob('*')) if match.is_dir() else [match]
                inside = [path for path in inside if path == match or (path.is_file() and fits(path))]
                if not inside:
                    raise DataError(f'{flag}={match} holds no file of examples ({" ".join(ENDINGS)})')
                found += inside
    return list(dict.fromkeys(found))


def fits(path):
    name = path.name.lower()
    packed = next((ending for ending in files.PACKED if name.endswith(ending)), '')
    return name.removesuffix(packed).endswith(ENDINGS) and not name.startswith('.')


def rows_of(paths, val_paths=()):
    """rows() for examples.prepare, of files and, if there are any, files of the val split."""

    def rows():
        for split, some in (('train' if val_paths else None, paths), ('val', val_paths)):
            for path in some:
                for place, row in files.rows(path):
                    yield place, split, row, path.name.split('.')[0]

    return rows


def main():
    parser = common.parser(__doc__)
    parser.add_argument('--input', nargs='+', required=True, help='files, folders or quoted globs, commas between them')
    parser.add_argument('--val', nargs='+', default=[], help='files of the val split, instead of a share')
    parser.add_argument('--fields', default=None, help='OURS:YOURS,...; ours: ' + ', '.join(formats.OURS))
    examples.add_arguments(parser, HERE)
    args = parser.parse_args()
    rows = rows_of(find(args.input), find(args.val, '--val'))
    examples.run(args, rows, common.made_by('instruct'), formats.parse_fields(args.fields))


if __name__ == '__main__':
    common.run(main)
