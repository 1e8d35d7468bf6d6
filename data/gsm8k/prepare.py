"""
GSM8K, 8.5K grade-school word problems whose answers show every step and end in "#### 72" (arXiv 2110.14168).

    python data/gsm8k/prepare.py --tokenizer=MODEL_FOLDER                          # streams openai/gsm8k from the hub
    python data/gsm8k/prepare.py --tokenizer=MODEL_FOLDER --template=qa            # for a base model
    python data/gsm8k/prepare.py --tokenizer=MODEL_FOLDER --input=my/gsm8k         # train.jsonl and test.jsonl

Then train with --dataset=gsm8k. The 7,473 train examples are train, the 1,319 test examples are val, and nothing of one
is in the other. A question is what the user says, an answer is trained as it is, with its calculator marks
(<<48/2=24>>) and "#### ": nothing is added before or after but the template. --template=qa writes

    Question: Natalia sold clips to ...
    Answer: Natalia sold 48/2 = <<48/2=24>>24 clips in May. ...
    #### 72

as lm-evaluation-harness asks, with an end of text behind it: 1.68M tokens of SmolLM2, 1.11M of them trained.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from data import DataError, common, examples, files  # noqa: E402

HUB, CONFIG = 'openai/gsm8k', 'main'
SPLITS = {'train': 'train', 'test': 'val'}  # theirs: ours


def local(inputs):
    """[(its split, path)] of files whose names say train or test, or of the folders that hold them."""
    paths = [path for given in map(Path, inputs) for path in (sorted(given.iterdir()) if given.is_dir() else [given])]
    found = []
    for path in paths:
        splits = [split for split in SPLITS if split in path.name.lower()]
        if len(splits) == 1:
            found.append((splits[0], path))
        elif len(paths) == len(inputs):
            raise DataError(f'--input={path} says neither train nor test in its name: name both files, or their folder')
    if missing := [split for split in SPLITS if split not in dict(found)]:
        raise DataError(f'--input={" ".join(inputs)} holds no file named {missing[0]}.jsonl or .parquet: name both')
    return sorted(found, key=lambda one: [*SPLITS].index(one[0]))


def rows_of(inputs):
    def rows():
        if inputs:
            found = ((split, place, row) for split, path in local(inputs) for place, row in files.rows(path))
        else:
            found = (
                (split, f'{HUB} {split} {n}', row)
                for split in SPLITS
                for n, row in enumerate(examples.from_hub('gsm8k', HUB, CONFIG, split), 1)
            )
        for split, place, row in found:
            if missing := {'question', 'answer'} - row.keys():
                raise DataError(f'{place} is not in the format of GSM8K: it lacks {min(missing)}')
            yield place, SPLITS[split], row, 'gsm8k'

    return rows


def main():
    parser = common.parser(__doc__)
    parser.add_argument('--input', nargs='+', default=None, help='local files or a folder, in the format of GSM8K')
    examples.add_arguments(parser, HERE, val_share=None)
    args = parser.parse_args()
    examples.run(args, rows_of(args.input), common.made_by('gsm8k'))


if __name__ == '__main__':
    common.run(main)
