"""
Tiny Shakespeare, 1.1 MB: the usual first data set of a small language model.

    python data/shakespeare/prepare.py                          # downloads it once; one token per byte
    python data/shakespeare/prepare.py --tokenizer=bpe          # BPE with 1,024 ids
    python data/shakespeare/prepare.py --input=my/input.txt     # any text, without a network

Expect 1,003,855 train and 111,541 val tokens (bytes) in a second. The last tenth is the val split, as in nanoGPT.
"""

import hashlib
import sys
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from data import DataError, common, files  # noqa: E402

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def fetch(cache):
    """The path of the file: the copy from an earlier run, or a new download."""
    if cache.exists():
        data, origin = cache.read_bytes(), str(cache)
    else:
        try:
            with urllib.request.urlopen(URL, timeout=20) as response:
                data, origin = response.read(), URL
        except OSError as e:
            reason = getattr(e, 'reason', e)
            raise DataError(
                f'could not download {URL} ({reason}): give a local copy with --input=FILE, '
                'or use python data/pystdlib/prepare.py, which is offline'
            ) from e
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise DataError(
            f'{origin} is not the well-known file (its sha256 differs): '
            'delete it if it is a copy, or use it anyway with --input='
        )
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_bytes(data)  # only after the check, so that the cached file is never a wrong one
    return cache


def prepare(out_dir, tokenizer='bytes', vocab_size=1024, path=None):
    text = files.read_text(path or fetch(Path(out_dir) / 'input.txt'))
    n = int(len(text) * 0.9)
    tok = common.choose_tokenizer(tokenizer, [text[:n]], vocab_size)
    with common.Writer(out_dir, tok, common.made_by('shakespeare')) as out:
        out.add('shakespeare', 'train', text[:n])
        out.add('shakespeare', 'val', text[n:])
    return out.meta


def main():
    parser = common.parser(__doc__)
    parser.add_argument('--input', default=None, help='a local text file; any text will do, no checksum')
    parser.add_argument(
        '--tokenizer', default='bytes', help='bytes | bpe | tiktoken:NAME | folder with a tokenizer.json'
    )
    parser.add_argument('--vocab_size', type=int, default=1024, help='ids of a bpe tokenizer, at least 257')
    parser.add_argument(
        '--out_dir', type=common.folder, default=str(HERE), help='where train.bin, val.bin and meta.json go'
    )
    args = parser.parse_args()
    start = time.time()
    if args.input and not Path(args.input).is_file():
        raise DataError(f'--input={args.input} is not a file')
    if args.input and hashlib.sha256(Path(args.input).read_bytes()).hexdigest() != SHA256:
        print(f'note: {args.input} is not the well-known file; losses will not compare to published ones')
    meta = prepare(args.out_dir, args.tokenizer, args.vocab_size, args.input)
    common.report(meta, args.out_dir, time.time() - start)


if __name__ == '__main__':
    common.run(main)
