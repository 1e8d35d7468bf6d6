"""memest.py: what the command prints, and what it says where it cannot."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, run

import configurator
import memest
import quant
from memory import flags, matrices, trace
from model import ModelError


@pytest.mark.parametrize(
    'words,says',
    [
        ('--gpu_gb=0', '--gpu_gb=0 is not a size'),
        ('--gpus=two', '--gpus=two is not a number'),
        ('--gpu=24', 'use --gpu_gb=24'),
        ('--model=60x', "model='60x' is not a size"),
        ('--init_from=/nope', 'no folder'),
        ('--dataset=nope', 'no data set nope'),
        ('--plot', 'use --plot=plan.png'),
        ('--plot=plan.png --instant', '--instant makes none'),
        ('--tp=2', 'type --gpus=4 --tp=2'),
        ('--fit --gpus=4 --tp=2', 'without --fit'),
        ('--fit --model=llmem', 'leave out --fit'),
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
    assert 'nothing fits 0.7 GB' in capsys.readouterr().out


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


def test_a_card_that_is_given_is_a_card_and_every_plan_says_of_what_it_is(capsys):
    small = [str(ROOT / 'config/galore_laptop.py'), '--n_layer=1', '--batch_size=1', '--instant']
    for words, says in (
        (['--gpu_gb=24'], 'bfloat16 on a card'),
        (['--gpu_gb=24', '--dtype=float32'], 'float32 on a card'),
        (['--gpus=2'], 'bfloat16 on a card'),
    ):
        memest.main([*(small if 'gpus' not in words[0] else small[:-1]), *words])
        assert says in capsys.readouterr().out
    with pytest.raises(ValueError, match='--device=cpu is none'):
        memest.main([*small, '--gpu_gb=24', '--device=cpu'])


def test_tables_fit_a_hundred_columns_and_say_what_pretrains_nothing(capsys):
    for words in (['--fit'], ['--fit', '--gpus=4'], ['--gpus=4']):
        memest.main([str(ROOT / 'config/galore_7b_4090.py'), *words])
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 100
        assert ('no substitute for pretraining' in out) == ('--fit' in words)


def test_a_plan_needs_neither_data_nor_weights_of_our_models_and_of_transformers(tmp_path, capsys):
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=300)
    llama = shape | dict(model_type='llama', max_position_embeddings=64, tie_word_embeddings=True)
    (tmp_path / 'config.json').write_text(json.dumps(llama))
    (tmp_path / 'tokenizer.json').write_text(json.dumps({'model': {'type': 'another than the data has'}}))
    argv = ['--method=lora', f'--init_from={tmp_path}', '--batch_size=1', '--block_size=16', '--json']
    memest.main(argv)
    found = json.loads(capsys.readouterr().out)
    assert (found['device'], found['dtype']) == ('this CPU', 'float32') and found['total'] > found['weights'] > 0
    (tmp_path / 'config.json').write_text(json.dumps(llama | dict(model_type='gpt_neox')))
    memest.main(argv)
    theirs = json.loads(capsys.readouterr().out)
    assert theirs['total'] > theirs['weights'] > 0 and theirs['weights'] != found['weights']
    (tmp_path / 'config.json').write_text(json.dumps(llama | dict(model_type='mixtral', num_local_experts=4)))
    with pytest.raises(ModelError, match='has experts'):
        memest.main(argv)


def test_planning_codes_no_nf4_and_repeats_layers_of_a_frozen_model(monkeypatch):
    pieces, depths, steps = [], [], trace.record_steps
    coded = quant.code_piece_
    monkeypatch.setattr(quant, 'code_piece_', lambda *piece: pieces.append(1) or coded(*piece))
    monkeypatch.setattr(trace, 'record_steps', lambda run, s, n: depths.append(s.n_layer) or steps(run, s, n))
    words = '--method=lora --train_rest=no --n_layer=9 --n_embd=512 --n_inner=1408 --batch_size=1 --block_size=16'
    config = configurator.load(ROOT / 'train.py', ['--model=9m', '--vocab_size=32000', '--dry_run', *words.split()])
    memest.trace(config)
    assert depths == [4] and len(pieces) == 4 * 7, 'a piece for each matrix of the layers that are traced'
