"""memest.py: what the command prints, and what it says where it cannot."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, run

import memest
from memory import flags, matrices


@pytest.mark.parametrize(
    'words,says',
    [
        ('--gpu_gb=0', '--gpu_gb=0 is not a size'),
        ('--gpus=two', '--gpus=two is not a number'),
        ('--gpu=24', 'use --gpu_gb=24'),
        ('--model=60x', "model='60x' is not a size"),
        ('--method=loqt --compile=True', 'compile'),
        ('--init_from=/nope', 'no folder'),
        ('--dataset=nope', 'no data set nope'),
        ('--plot', 'use --plot=plan.png'),
        ('--plot=plan.png --instant', '--instant makes none'),
        ('--gpus=3 --tp=2', 'cannot be cut'),
        ('--fit --json', 'a table of its own'),
        ('--hf=/nope', 'does not go with --hf'),
        ('--ranc=8', 'did you mean --rank'),
        ('--residual=fira', '--method=fira'),
    ],
)
def test_bad_input_is_one_sentence(words, says):
    argv = [sys.executable, 'memest.py', 'config/galore_60m.py', *words.split()]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and says in done.stderr and 'Traceback' not in done.stderr


def test_the_command_prints_a_table_json_a_plot_and_several_gpus(tmp_path, capsys):
    config = str(ROOT / 'config/galore_60m.py')
    memest.main([config, f'--plot={tmp_path}/plan.png', '--gpu_gb=24', '--batch_size=2', '--n_layer=2'])
    out = capsys.readouterr().out
    assert 'as nvidia-smi would show' in out and 'fits' in out and 'largest at the peak' in out and '█' in out
    assert (tmp_path / 'plan.png').stat().st_size > 10_000
    memest.main([config, '--json', '--instant'])
    plan = json.loads(capsys.readouterr().out)
    assert plan['card'] > plan['reserved'] > plan['total'] == plan['formula'] == sum(plan['parts'].values())
    memest.main([config, '--gpus=4'])
    assert 'zero3' in capsys.readouterr().out
    memest.main([config, '--model=llmem', '--gpus=4'])
    assert 'its choice' in capsys.readouterr().out
    memest.main([config, '--fit', '--gpu_gb=0.7'])
    assert 'nothing fits 0.7 GiB' in capsys.readouterr().out


def test_a_method_without_a_formula_is_traced_and_says_so(capsys, monkeypatch):
    monkeypatch.delitem(matrices.METHODS, 'fira')
    argv = [str(ROOT / 'config/galore_60m.py'), '--method=fira', '--batch_size=2', '--n_layer=2']
    memest.main(argv)
    said = capsys.readouterr()
    assert 'alive at the peak' in said.out and 'by the formula' not in said.out
    assert said.err.startswith("no formula knows method='fira': this is a trace alone\n")
    memest.main([*argv, '--json'])
    assert 'formula' not in json.loads(capsys.readouterr().out)
    for words in (['--instant'], ['--gpus=4']):
        with pytest.raises(ValueError, match="no formula knows method='fira'"):
            memest.main([*argv, *words])
    memest.main([*argv, '--fit'])
    assert 'GaLore' in capsys.readouterr().out


def imported(*words):
    """Which packages a command imports."""
    done = run(['-X', 'importtime', 'memest.py', *words])
    assert done.returncode == 0, done.stderr
    return done.stdout, {line.rpartition('|')[2].strip().partition('.')[0] for line in done.stderr.splitlines()}


@pytest.mark.parametrize('words', [[], ['--help'], ['-h'], ['config/galore_60m.py', '--help']])
def test_help_comes_before_torch(words):
    out, packages = imported(*words)
    assert 'torch' not in packages and all(f'--{name}' in out for name in flags.FLAGS) and '--model=llmem' in out


def test_the_formula_imports_no_package_that_it_has_no_use_for():
    _, packages = imported('config/galore_60m.py', '--instant', '--json')
    assert 'torch' in packages and not packages & {'transformers', 'bitsandbytes', 'datasets', 'matplotlib', 'peft'}


def test_help_of_hf_says_a_word_of_each_argument():
    pytest.importorskip('transformers')
    done = run(['memest.py', '--hf', '--help'])
    assert done.returncode == 0 and '--lora_targets=attention' in done.stdout and '--gpu_gb=24' in done.stdout
