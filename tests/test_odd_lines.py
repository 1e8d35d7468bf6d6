"""Command lines that nobody should type: each is answered with sentences, at once, by every script.

python tests/test_odd_lines.py 300 1        # so many lines, and the seed; prints what was not answered
"""

import ast
import os
import random
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

import configurator
import memest
import sample
import train
from bench import __main__ as bench
from data import DataError
from memory import flags
from model import ModelError
from plumbing import MOVED, Stop, parallel

SENTENCES = (configurator.ConfigError, Stop, DataError, ModelError)
VALUES = ['', '-1', '0', '1', '8', '1.5', '1e300', '-1e300', '1e-40', 'nan', 'inf', '-inf', 'None', 'True', 'no', '[1]']
VALUES += ["'x'", 'é', '日本語', '\udcff', '9' * 25, '9' * 5000, '100000000', '1000000000000', '../x', 'a b', '--', '(']
VALUES += ['0x10', '1_000', '1e400', '-', '*', '9m', 'cpu', 'grad', 'resume', '{}', '1;2', '128', '0.5', '\x00', '\n']
PAIRS = ['--method=adamw --basis_bits=4', '--method=adamw --quantize=none', '--residual=fira --method=adamw', '--x']
PAIRS += ['--method=qgalore --lazy=-1', '--per_layer --grad_clip=1', '--init_from=resume --overwrite', '--min_lr=5']
PAIRS += ['--coreset=none --coreset_from=9', '--device=cuda --device=cpu', '--rank=8 --rank=-8', '--method=galor']
PAIRS += ['--coreset=random --zo_directions=3', '---rank=8', '-rank=8', 'rank=8', '--rank', '--', '=', '--=', '--=8']
PAIRS += ['--save_merged=False', '--method=lora --quantize=none --double_quant', '--model=60m --init_from=data']
SCRIPTS = {'train': train, 'memest': train, 'sample': sample, 'bench': bench}


def lines(n, seed):
    """Yield n (script, words)."""
    draw = random.Random(seed)
    known = {name: list(configurator._layout(module.__file__).known) for name, module in SCRIPTS.items()}
    known['memest'] = known['memest'] + 5 * list(flags.FLAGS)
    everything = sorted({key for keys in known.values() for key in keys})
    for _ in range(n):
        script, words = draw.choice(list(SCRIPTS)), []
        for _ in range(draw.randint(1, 4)):
            key = draw.choice(known[script] if draw.random() < 0.8 else everything)
            if draw.random() < 0.1:
                at = draw.randrange(len(key))
                key = key[:at] + draw.choice(['', 'x', key[at] * 2, '-', 'É']) + key[at + 1 :]
            how = draw.choice(['--{}={}'] * 8 + ['--{}', '---{}={}', '-{}={}', '{}={}', '--{} {}', '{}'])
            words += how.format(key, draw.choice(VALUES)).split(' ')
            if draw.random() < 0.1:
                words += draw.choice(PAIRS).split()
        yield script, words


def answer(script, words):
    """What the script does with these words until it would build, train or load something."""
    if script == 'memest':
        own, config = flags.read(words, MOVED)
        if config and 'plot' not in own:
            memest.answer(words, own if {'fit', 'gpus', 'llmem'} & set(own) else own | {'instant': True}, config)
        return
    positional = {'positional': 'checkpoint'} if script == 'sample' else {}
    module = SCRIPTS[script]
    config = configurator.load(module.__file__, words, module.problems, moved=MOVED, **positional)
    if script == 'train':
        train.check_size(config, parallel.Here(0, 1, *parallel.device_and_dtype(config)))


def not_answered(n, seed, seconds=10):
    """[(script, words, error)] of those lines that end neither well nor in a sentence, or not within some seconds."""

    def too_slow(*_):
        raise TimeoutError(f'not answered in {seconds} s')

    found, before = [], signal.signal(signal.SIGALRM, too_slow)
    for script, words in lines(n, seed):
        signal.alarm(seconds)
        try:
            answer(script, words)
        except (*SENTENCES, SystemExit):
            pass
        except (ValueError, OSError) as error:  # memest.py prints its own as a sentence
            if script != 'memest' or isinstance(error, TimeoutError):
                found.append((script, words, repr(error)))
        except Exception as error:
            found.append((script, words, repr(error)))
        finally:
            signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    return found


@pytest.mark.parametrize('seed', range(2))
def test_odd_lines_are_answered_in_sentences_and_at_once(seed, capsys):
    assert not_answered(150, seed) == []


def sources():
    """Our files of code: not tests, configs and runs, nor an environment somebody made in the folder (.venv)."""
    for path in sorted(ROOT.rglob('*.py')):
        where = path.relative_to(ROOT)
        hidden = any(part.startswith('.') for part in where.parts) or 'site-packages' in where.parts
        if not hidden and not {'tests', 'config', 'out'} & set(where.parts):
            yield path, where


def programs():
    """The words after `python` of every file that can be run."""
    for path, where in sources():
        if "if __name__ == '__main__':" in path.read_text(encoding='utf-8'):
            module = '.'.join(where.with_suffix('').parts).removesuffix('.__main__')
            yield ['-m', module] if where.parts[0] == 'bench' else [str(where)]


def test_what_is_called_a_program_is_one_and_the_folders_of_modules_have_none():
    """A module that is run would print nothing, which looks like an answer."""
    known = {' '.join(words) for words in programs()}
    texts = (ROOT / 'README.md').read_text(encoding='utf-8').split('```')[1::2]
    texts += [ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or '' for path, _ in sources()]
    for path in (ROOT / 'config').glob('*.py'):
        texts.append(path.read_text(encoding='utf-8'))
    said = set(re.findall(r'python ((?:-m bench[.\w]*)|[\w/]+\.py)\b', '\n'.join(texts))) - {'-m bench.runs.NAME'}
    assert len(said) > 20 and not said - known, said - known
    assert not [words for words in known if words.startswith(('memory/', 'methods/', 'plumbing/'))]


@pytest.mark.parametrize('words', list(programs()), ids=' '.join)
def test_every_program_has_help_under_its_own_name_and_refuses_what_it_does_not_know(words):
    environment = os.environ | {'PYTHONWARNINGS': 'ignore'}
    options = dict(cwd=ROOT, capture_output=True, text=True, env=environment, timeout=60)
    helped = subprocess.run([sys.executable, *words, '--help'], **options)
    assert helped.returncode == 0 and len(helped.stdout) > 200, helped.stderr
    assert 'python ' + ' '.join(words) in helped.stdout
    refused = subprocess.run([sys.executable, *words, '--foo=1'], **options)
    assert refused.returncode != 0 and 'error: ' in refused.stderr and 'Traceback' not in refused.stderr


if __name__ == '__main__':
    for line in not_answered(int(sys.argv[1]), int(sys.argv[2])):
        print(*line)
