"""
C4 (English), the web text of the GaLore and LoQT papers, streamed from the Hugging Face hub only as far as needed.

    python data/c4/prepare.py --tokens=1.3e9              # the 60M model's run in the papers: 10,000 steps x 512 x 256
    python data/c4/prepare.py --tokens=1e7 --val_tokens=1e6          # a first try
    python data/c4/prepare.py --tokenizer=tiktoken:gpt2
    python data/c4/prepare.py --input=c4-train.00000-of-01024.json.gz --tokenizer=my_tokenizer/     # no network

The tokenizer is T5's, as in the papers. Documents are kept whole and packed one after another, each followed by the
end-of-text id; the papers truncate and pad them instead. Expect 1 GB of disk for 500M tokens and, if the network keeps
up, less than a million tokens a second on two cores (measured on local files with our BPE: 3.8M tokens in 5 s).
"""

import argparse
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from data import DataError, common  # noqa: E402

OFFLINE = 'without a network use --input=FILE.json.gz, or another text: python data/pystdlib/prepare.py'


def count(text):
    number = float(text)  # accepts 1.3e9
    if not 1 <= number < 2**62:
        raise argparse.ArgumentTypeError(f'{text} is not a number of tokens: use at least 1, e.g. 1.3e9')
    return int(number)


def choose_tokenizer(spec):
    """A tokenizer from the hub by name, or any that the other scripts accept, except bpe."""
    if spec == 'bpe':
        raise DataError('a bpe tokenizer cannot be trained on C4: use t5-base, tiktoken:NAME, bytes or a folder')
    if spec == 'bytes' or spec.startswith('tiktoken:') or os.path.isdir(spec):
        return common.choose_tokenizer(spec, None, None)
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        path = hf_hub_download(spec, 'tokenizer.json', local_files_only=True)
    except Exception:
        # Ask once, with a timeout: without a network, a download retries for half a minute before it fails.
        try:
            files = {file.rfilename for file in HfApi().model_info(spec, timeout=10).siblings}
            for name in sorted(files & {'config.json', 'tokenizer_config.json'}):
                hf_hub_download(spec, name)  # these name the end-of-text token
            path = hf_hub_download(spec, 'tokenizer.json')
        except RepositoryNotFoundError as e:
            raise DataError(
                f'unknown tokenizer {spec!r}: use a name on the hub (t5-base), tiktoken:NAME, bytes or a folder'
            ) from e
        except Exception as e:  # depends on the library's version: httpx, requests, OfflineMode, ...
            raise DataError(
                f'could not fetch the tokenizer {spec!r} from the hub ({type(e).__name__}): '
                f'use --tokenizer=bytes or a folder with a tokenizer.json; {OFFLINE}'
            ) from e
    return common.choose_tokenizer(os.path.dirname(path), None, None)


def rows(split, inputs):
    """The texts of one split, or of all the local files."""
    import datasets

    try:
        if inputs:
            stream = datasets.load_dataset('json', data_files=inputs, split='train', streaming=True)
        else:
            stream = datasets.load_dataset('allenai/c4', 'en', split=split, streaming=True)
        for row in stream:
            if not isinstance(row.get('text'), str):
                raise DataError(
                    f'{" ".join(inputs or ["C4"])} is not in the format of C4: every line needs a "text", '
                    f'this one has only {", ".join(row)}'
                )
            yield row['text']
    except DataError:
        raise
    except Exception as e:  # as varied as above, and pyarrow's
        name = ' '.join(inputs or ['C4'])
        first_line = (str(e).splitlines() or [''])[0][:200]
        raise DataError(f'could not read {name} ({type(e).__name__}: {first_line})') from e


def prepare(out_dir, tokenizer='t5-base', tokens=100_000_000, val_tokens=10_000_000, inputs=None, val_share=0.05):
    common.check_val_share(val_share)
    for path in inputs or []:
        if not os.path.isfile(path):
            raise DataError(f'--input={path} is not a file')
    if not inputs:
        from huggingface_hub import HfApi

        try:
            HfApi().dataset_info('allenai/c4', timeout=10)
        except Exception as e:
            raise DataError(f'could not reach C4 on the hub ({type(e).__name__}): {OFFLINE}') from e
    tok = choose_tokenizer(tokenizer)
    limits = {'train': tokens, 'val': val_tokens}
    with common.Writer(out_dir, tok, common.made_by('c4'), limits=limits) as out:
        if inputs:
            for text in rows('train', inputs):
                out.add('c4', common.split_of(text, val_share), text)
                if out.full('train') and out.full('val'):
                    break
        else:
            for split, name in (('val', 'validation'), ('train', 'train')):
                for text in rows(name, None):
                    out.add('c4', split, text)
                    if out.full(split):
                        break
    return out.meta


def main():
    parser = common.parser(__doc__)
    parser.add_argument('--tokens', type=count, default=100_000_000, help='training tokens to take, e.g. 1.3e9')
    parser.add_argument('--val_tokens', type=count, default=10_000_000, help='validation tokens to take')
    parser.add_argument('--tokenizer', default='t5-base', help='a name on the hub | tiktoken:NAME | bytes | folder')
    parser.add_argument('--input', nargs='+', default=None, help="local files in C4's format, .json.gz or .jsonl")
    parser.add_argument('--val_share', type=float, default=0.05, help='with --input: share of rows for validation')
    parser.add_argument(
        '--out_dir', type=common.folder, default=str(HERE), help='where train.bin, val.bin and meta.json go'
    )
    args = parser.parse_args()
    start = time.time()
    meta = prepare(args.out_dir, args.tokenizer, args.tokens, args.val_tokens, args.input, args.val_share)
    common.report(meta, args.out_dir, time.time() - start)
    if meta['train_tokens'] < args.tokens:
        print(f'note: the input ended before --tokens={args.tokens:,} was reached')


if __name__ == '__main__':
    common.run(main)
