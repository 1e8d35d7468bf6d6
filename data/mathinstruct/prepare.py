"""
MathInstruct, 262K questions of 14 unbalanced sources with worked answers (arXiv 2309.05653): what CoLM trains on.

    python data/mathinstruct/prepare.py --tokenizer=MODEL_FOLDER                   # streams it from the hub
    python data/mathinstruct/prepare.py --tokenizer=MODEL_FOLDER --input=MathInstruct.json
    python data/mathinstruct/prepare.py --tokenizer=MODEL_FOLDER --template=own    # the model's own chat template

Then train with --dataset=mathinstruct --coreset=grad. The default template is alpaca's without a newline after
"### Response:", as MAmmoTH and CoLM have it. The source of an example is the file that its row names
(data/CoT/gsm_rft.json), by which CoLM tells them apart. One answer of the data is empty and left out.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from data import DataError, common, examples, files  # noqa: E402

HUB = 'TIGER-Lab/MathInstruct'


def rows_of(inputs):
    def rows():
        if inputs:
            found = (pair for path in inputs for pair in files.rows(path))
        else:
            hub = examples.from_hub('mathinstruct', HUB, None, 'train')
            found = ((f'{HUB} {n}', row) for n, row in enumerate(hub, 1))
        for place, row in found:
            if missing := {'source', 'instruction', 'output'} - row.keys():
                raise DataError(f'{place} is not in the format of MathInstruct: it lacks {min(missing)}')
            yield place, None, row, 'mathinstruct'

    return rows


def main():
    parser = common.parser(__doc__)
    parser.add_argument('--input', nargs='+', default=None, help='local files in the format of MathInstruct')
    examples.add_arguments(parser, HERE, template='alpaca')
    args = parser.parse_args()
    examples.run(args, rows_of(args.input), common.made_by('mathinstruct'))


if __name__ == '__main__':
    common.run(main)
