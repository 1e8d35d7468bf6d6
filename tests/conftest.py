"""What several test files share: tiny token data and a way to run the scripts as a user does."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import preloaded
import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch is imported: tensors of tests are too small to share
# Rates that tests measure are no user's.
os.environ.setdefault('NANO24_CACHE', os.path.join(tempfile.gettempdir(), f'nano24-tests-{os.getuid()}'))

ROOT = Path(__file__).resolve().parent.parent
TINY = ['--model=9m', '--n_layer=2', '--n_embd=32', '--n_head=4', '--n_inner=64', '--block_size=32', '--batch_size=4']
TINY += ['--warmup_iters=2', '--eval_tokens=512', '--log_interval=5']
TINY += ['--max_iters=20', '--eval_interval=10', '--sample_tokens=8', '--device=cpu']


SLOW = ('test_train', 'test_readme', 'test_bench', 'test_lora', 'test_trace', 'test_memory_hf')


def pytest_collection_modifyitems(items):
    """The slowest files first, so that none of them runs alone at the end while other workers are idle."""
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A prepared data folder of a few KB of code, byte by byte."""
    folder = tmp_path_factory.mktemp('data')
    text = folder / 'text.txt'
    text.write_text('\n'.join(f'def f{i}(x):\n    return x + {i * i}\n' for i in range(1500)))
    command = ['data/text/prepare.py', f'--input={text}', '--tokenizer=bytes', f'--out_dir={folder / "bytes"}']
    done = run(command)
    assert done.returncode == 0, done.stderr
    return str(folder / 'bytes')


@pytest.fixture
def small_8bit(monkeypatch):
    """8-bit states for the matrices of tiny models, too."""
    import adam

    monkeypatch.setattr(adam, 'SMALLEST_8BIT', 64)


def run(words, **kw):
    """Run a script of ours, as `python WORDS`, from the repository's root."""
    changed, timeout = kw.pop('env', {}), kw.pop('timeout', 300)
    environment = os.environ | {'PYTHONWARNINGS': 'ignore'} | changed
    read_before = any(name.startswith(('PYTHON', 'OMP_', 'TORCH')) for name in changed)  # when torch was imported
    script = words[0] == '-m' or str(words[0]).endswith('.py')
    if script and not kw and not read_before and hasattr(os, 'fork'):
        return preloaded.run(words, ROOT, environment, timeout=timeout)
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment, **kw)


def tiny(*flags):
    """TINY, without the shape where a folder has one, and what else the method among the flags takes."""
    method = next((flag.partition('=')[2] for flag in flags if flag.startswith('--method=')), 'galore')
    given = any(flag.startswith('--init_from=') and flag != '--init_from=resume' for flag in flags)
    common = [flag for flag in TINY if not (given and flag.startswith(('--model=', '--n_')))]
    own = {name: [] for name in ('adamw', 'muon', 'scale', 'badam', 'adalomo')}
    own |= {name: ['--rank=8'] for name in ('lora', 'ldadam', 'sltrain')}
    own = own.get(method, ['--rank=8', '--update_proj_gap=5'])
    return [*common, *own, *flags]


def train(out_dir, data, *flags, **kw):
    return run(['train.py', *tiny(f'--dataset={data}', f'--out_dir={out_dir}', *flags)], **kw)


def values(text):
    """The `name: value` lines that end a run, as a dict of text."""
    return dict(line.split(': ', 1) for line in text.splitlines()[-12:] if ': ' in line)
