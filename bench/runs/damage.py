"""
Damaged checkpoints: each is refused in a sentence, or makes no difference; none goes on to another result in silence.

    python -m bench.runs.damage                      # 100 files: ten minutes on one CPU core
    python -m bench.runs.damage --files=10 --seed=1  # fewer, and others

A tiny run stops half way. In a copy of it one file of last/ or best/ is cut short, emptied, deleted, made longer,
exchanged for the same file of the other folder, or has one bit flipped; then the run is resumed from last/, and
sample.py continues a text from best/. What comes out is compared with what comes of the undamaged run.
"""

from bench import parser

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('--files', type=int, default=100, choices=range(1, 10**6), metavar='N', help='to damage (100)')
    asked.add_argument('--seed', type=int, default=0, help='of the damages (0)')
    args = asked.parse_args()

import collections
import contextlib
import io
import random
import shutil
import sys
import tempfile
from pathlib import Path

import configurator
import sample
import train
from data import DataError
from data.tokenizer import TokenizerError
from model import ModelError
from plumbing import Stop, resume
from plumbing.hf import AdapterError

SENTENCES = (Stop, DataError, ModelError, TokenizerError, AdapterError, OSError, configurator.ConfigError)
TINY = '--model=9m --n_layer=2 --n_embd=32 --n_head=4 --n_inner=64 --block_size=32 --batch_size=4'
TINY += ' --eval_interval=4 --save_interval=5 --eval_tokens=512 --sample_tokens=0 --rank=8 --update_proj_gap=3'
HOW = ('cut', 'emptied', 'deleted', 'longer', 'exchanged', 'bit', 'bit', 'bit')


def call(main, config):
    """What a script prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        main(config)
    return out.getvalue()


def trained(out, *words):
    call(train.main, configurator.load(train.__file__, [*words, f'--out_dir={out}', '--device=cpu'], train.problems,
                                       earlier=resume.settings))  # fmt: skip


def outcome(out, folder):
    """What a user has of last/, the final weights of the run resumed from it, or of best/, text."""
    if folder == 'last':
        trained(out, '--init_from=resume', '--max_iters=12')
        return (out / 'last' / 'model.safetensors').read_bytes()
    words = [str(out / 'best'), '--tokens=12', '--temperature=0', '--prompt=def']
    return call(sample.main, configurator.load(sample.__file__, words, sample.problems, 'checkpoint'))


def damage(out, folder, draw):
    """Damage one file of out/folder. -> its name, and how"""
    path, how = draw.choice(sorted((out / folder).iterdir())), draw.choice(HOW)
    data = path.read_bytes()
    if how == 'cut':
        path.write_bytes(data[: draw.randrange(len(data))])
    elif how == 'emptied':
        path.write_bytes(b'')
    elif how == 'deleted':
        path.unlink()
    elif how == 'longer':
        path.write_bytes(data + draw.randbytes(9))
    elif how == 'exchanged':
        shutil.copy(out / ('best' if folder == 'last' else 'last') / path.name, path)
    else:
        bit = draw.randrange(8 * len(data))
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
    return path.name, how


def test(files, seed, folder):
    """Yield (where, what came of it) for each damaged file: refused, no difference, another result, or an error."""
    draw, start = random.Random(seed), folder / 'start'
    trained(start, *TINY.split(), '--max_iters=6')
    shutil.copytree(start / 'best', folder / 'earlier')
    trained(start, '--init_from=resume', '--max_iters=10')
    shutil.rmtree(start / 'best')
    (folder / 'earlier').rename(start / 'best')  # so that best/ is of another step than last/
    expected = {name: outcome(shutil.copytree(start, folder / name), name) for name in ('last', 'best')}
    for _ in range(files):
        out, name = folder / 'damaged', draw.choice(('last', 'best'))
        shutil.copytree(start, out)
        file, how = damage(out, name, draw)
        try:
            result = 'no difference' if outcome(out, name) == expected[name] else 'another result, in silence'
        except SENTENCES:
            result = 'refused'
        except Exception as error:
            result = f'a traceback: {error!r:.80}'
        shutil.rmtree(out)
        yield f'{name}/{file} {how}', result


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        found = collections.defaultdict(list)
        for where, result in test(args.files, args.seed, Path(folder)):
            found[result].append(where)
            if result not in ('refused', 'no difference'):
                print(f'{where}: {result}', flush=True)
    print(', '.join(f'{result}: {len(where)}' for result, where in sorted(found.items())))
    print('no difference:', ', '.join(sorted(set(found['no difference']))) or 'none')
    sys.exit(bool(found.keys() - {'refused', 'no difference'}))


if __name__ == '__main__':
    main(args)
