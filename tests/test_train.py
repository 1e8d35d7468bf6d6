"""train.py as its users meet it: what a run prints and writes, how it stops and goes on, and how it takes bad input."""

import csv
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run, tiny, train, values
from safetensors.torch import load_file

import configurator
import lora
import train as training
from data import DataError
from memory.formula import Plan
from model import LLaMA, ModelError
from plumbing import MOVED, Stop, build, parallel, report, resume
from plumbing import begin as begin_module
from plumbing.checkpoint import write_run
from plumbing.metrics import Metrics

CONFIGS = sorted(path.name for path in (ROOT / 'config').glob('*.py'))
SHAPES = {'60m': 58_073_600, '130m': 134_105_856, '350m': 367_969_280, '1b': 1_339_082_752, '7b': 6_738_415_616}
SHAPES['13b'] = 13_015_864_320


def weights(folder):
    return load_file(folder / 'model.safetensors')


def rows_of(folder):
    with open(folder / 'metrics.csv', newline='') as f:
        return list(csv.DictReader(f))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope='session')
def finished(tmp_path_factory, data):
    """One uninterrupted tiny run, which many tests look at."""
    out = tmp_path_factory.mktemp('out') / 'finished'
    done = train(out, data)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=out, text=done.stdout)


# ---- what a run prints and writes ----------------------------------------------------------------------------------


def test_a_run_ends_with_greppable_lines_that_are_true(finished):
    found = values(finished.text)
    names = ['steps', 'tokens', 'train_loss', 'val_loss', 'val_step', 'tokens_per_second', 'seconds']
    names += ['peak_bytes_planned', 'peak_bytes_measured', 'resident_bytes', 'method', 'device']
    assert list(found) == names
    assert found['steps'] == '20' and int(found['tokens']) == 20 * 4 * 32
    assert (found['method'], found['device']) == ('galore', 'cpu')
    assert 50e6 < int(found['resident_bytes']) < 4e9 and float(found['tokens_per_second']) > 0
    assert int(found['peak_bytes_measured']) == pytest.approx(int(found['peak_bytes_planned']), rel=0.01)
    rows = rows_of(finished.out)
    assert [int(row['step']) for row in rows] == [0, 5, 10, 15, 20]
    assert f'{float(rows[-1]["val_loss"]):.4f}' == found['val_loss']
    assert f'{float(rows[-1]["train_loss"]):.4f}' == found['train_loss']
    assert float(rows[-1]['val_loss']) < float(rows[0]['val_loss']) - 0.05


def test_a_log_line_has_everything_one_wants_to_know(finished):
    line = next(line for line in finished.text.splitlines() if line.startswith('step 5/20'))
    number = r'[\d.,e+-]+'
    expected = rf'step 5/20 \| loss {number} \| lr {number} \| grad norm {number} \| {number} tok/s \| '
    assert re.fullmatch(expected + rf'{number} GB \| ETA \d+:\d\d', line), line
    assert 'sample: ' in finished.text
    assert '1 micro-batch = 128 tokens; 20 steps' in finished.text and '1 source\n' in finished.text


def test_the_loss_shown_is_the_mean_over_micro_batches_and_steps(tmp_path, data):
    flags = ['--gradient_accumulation_steps=3', '--learning_rate=0', '--log_interval=2', '--max_iters=2']
    out = train(tmp_path, data, *flags).stdout
    config = configurator.load(ROOT / 'train.py', tiny(f'--dataset={data}', *flags))
    model = build.build_model(config, data, 257, torch.float32, 'cpu')
    tokens = training.load(data, 'train', 32)
    losses = [model(*tokens.batch(config.seed, t, 4)[:2]).item() for t in range(6)]
    assert f'loss {sum(losses) / 6:.4f}' in out


def test_evaluation_is_the_mean_over_the_val_tokens_without_dropout_and_without_a_graph(data):
    config = configurator.load(ROOT / 'train.py', tiny(f'--dataset={data}', '--method=lora', '--dropout=0.5'))
    model = build.build_model(config, data, 257, torch.float32, 'cpu', linear=lora.linear(config))
    for layer in model.layers.modules():
        if hasattr(layer, 'B'):
            torch.nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(0))
    tokens, graphs = training.load(data, 'val', 32), []

    def forward(x, y, **more):
        loss = model(x, y, **more)
        graphs.append(loss.requires_grad)
        return loss

    found = training.evaluate(forward, tokens, config, parallel.Here(0, 1, 'cpu', torch.float32))
    with torch.no_grad():
        expected = [model(x, y).item() for x, y, _ in tokens.evaluation(config.eval_tokens, config.batch_size)]
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    assert graphs == [False] * len(expected) and len(graphs) > 1


def test_metrics_may_come_late_and_go_and_no_loss_that_is_not_finite_is_missed(data, tmp_path, capsys):
    config = configurator.load(ROOT / 'train.py', tiny(f'--dataset={data}', f'--out_dir={tmp_path}'))
    model = build.build_model(config, data, 257, torch.float32, 'cpu')
    here, begin = parallel.Here(0, 1, 'cpu', torch.float32), begin_module.Begin()
    log = report.Log(config, model, Plan(0, 0, 0), begin, here)
    optimizer = SimpleNamespace(lr=0.1, metrics={})
    one = torch.ones(())
    for step, metrics in enumerate([{}, {'grad_norm': one}, {'grad_norm': 2 * one, 'overlap': one / 2}, {}], 1):
        optimizer.metrics = metrics
        log.note(one * step, optimizer)
        assert optimizer.metrics == {}
        log.training(step)
        log.write_row()
    rows = rows_of(tmp_path)
    assert [row['train_loss'] for row in rows] == ['1.0', '2.0', '3.0', '4.0']
    assert [row['grad_norm'] for row in rows] == ['', '1.0', '2.0', '']
    assert [row['overlap'] for row in rows] == ['', '', '0.5', '']
    assert 'grad norm 2.00 | overlap 0.500' in capsys.readouterr().out
    log.note(one, optimizer)  # nothing measured: the next step's norm must not stand for this one's
    optimizer.metrics = {'grad_norm': one}
    log.note(one * math.nan, optimizer)
    with pytest.raises(training.Stop, match=r'loss nan at step 5 \(learning rate 0.1, grad norm 1\)'):
        log.training(6)


def test_a_row_is_written_before_the_checkpoint_from_which_a_resumed_run_goes_on(tmp_path, data, monkeypatch):
    config = configurator.load(ROOT / 'train.py', tiny(f'--dataset={data}', f'--out_dir={tmp_path}', '--max_iters=10'))

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, 'print_sample', die)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit):
        training.cli(config)
    for number, handler in handlers:
        signal.signal(number, handler)
    step = json.loads((tmp_path / 'last/run.json').read_text())['step']
    assert [int(row['step']) for row in rows_of(tmp_path)][-1] == step == 10
    assert rows_of(tmp_path)[-1]['val_loss']


@pytest.mark.parametrize('text', ['', 'step,loss\n1,2,3,4\n'])
def test_a_damaged_metrics_csv_does_not_stop_a_run_that_resumes(text, tmp_path):
    (tmp_path / 'metrics.csv').write_text(text)
    metrics = Metrics(tmp_path / 'metrics.csv', first_step=5)
    metrics.log(step=6, loss=0.5)
    assert rows_of(tmp_path)[-1]['loss'] == '0.5'


def test_checkpoints_are_hugging_face_folders_that_transformers_reads(finished):
    transformers = pytest.importorskip('transformers')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished.out / 'best')
    tokens = torch.randint(0, 257, (2, 32))
    ours = LLaMA.from_pretrained(finished.out / 'best')
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert same(weights(finished.out / 'best'), weights(finished.out / 'last')), 'val loss fell to the end'
    assert json.loads((finished.out / 'last/run.json').read_text())['step'] == 20


@pytest.mark.parametrize('method', ['galore', 'loqt', 'apollo', 'ldadam'])
def test_a_run_from_before_proj_type_goes_on_with_its_bases_where_they_stood(method, tmp_path, data):
    """Before, a square matrix had P on the left, as 'paper' has it."""
    flags = [f'--method={method}', '--lr_decay_iters=20']
    for name, steps, *more in (('old', 7, '--proj_type=paper'), ('whole', 12, '--proj_type=paper'), ('new', 12)):
        done = train(tmp_path / name, data, *flags, f'--max_iters={steps}', *more)
        assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / 'old/last/run.json').read_text())
    assert run['config'].pop('proj_type') == 'paper'
    write_run(str(tmp_path / 'old/last'), run)
    done = train(tmp_path / 'old', data, *flags, '--max_iters=12', '--init_from=resume')
    assert done.returncode == 0, done.stderr
    old, whole, new = (weights(tmp_path / name / 'last') for name in ('old', 'whole', 'new'))
    assert same(old, whole) and not same(old, new)


def test_max_iters_3_runs_3_steps(tmp_path, data):
    assert values(train(tmp_path, data, '--max_iters=3').stdout)['steps'] == '3'


def test_learning_rate_of_the_60m_run_is_the_papers_and_does_not_wrap():
    config = configurator.load(ROOT / 'train.py', [str(ROOT / 'config/galore_60m.py')])
    rates = {0: 0.01 / 1001, 500: 0.01 * 501 / 1001, 1000: 0.01, 5500: 0.0055, 9999: 0.0010000003, 10_000: 0.001}
    rates[10_001] = 0.001
    for step, expected in rates.items():
        assert math.isclose(training.learning_rate_at(step, config), expected, rel_tol=1e-6), step


def dry_flags(name):
    """The flags that plan a config without a network: a pretrained model's config.json lies in tests/models/."""
    init_from = configurator.load(ROOT / 'train.py', [str(ROOT / 'config' / name)]).init_from
    local = ROOT / 'tests' / 'models' / init_from.split('/')[-1]
    return ['--dry_run', *([f'--init_from={local}'] if init_from != 'scratch' else [])]


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_dry_runs(name, capsys):
    words = [str(ROOT / 'config' / name), *dry_flags(name)]
    training.cli(configurator.load(ROOT / 'train.py', words))
    out = capsys.readouterr().out
    assert 'dry run: nothing was trained' in out and 'tokens a step' not in out
    planned = re.search(r'planned peak of all tensors ([\d.]+) GB', out)[1]
    told = re.search(r'[Pp]lanned peak of ([\d.]+) GB', (ROOT / 'config' / name).read_text())
    assert told is None or told[1] == planned, 'the docstring of the config'
    row = re.search(rf'\| `{name.removesuffix(".py")}` \|.*\| ([\d.]+) GB \|', (ROOT / 'README.md').read_text())
    assert ('laptop' in name) == (row is None) and (row is None or row[1] == planned), 'the table in the README'
    if len(words) == 2:
        size = name.removesuffix('.py').split('_')[1]
        assert f'model: {SHAPES[size]:,} parameters' in out if size in SHAPES else 'laptop' in name
    elif '4090' in name:
        assert float(re.search(r'([\d.]+) GB as nvidia-smi', out)[1]) < 24 * 1.0737 / 1.03, 'with room to spare'
    assert not os.path.exists(ROOT / 'out' / name.removesuffix('.py') / 'dry')


@pytest.mark.parametrize('name', CONFIGS)
def test_the_arithmetic_in_a_configs_docstring_is_that_of_its_values(name):
    path = ROOT / 'config' / name
    config = configurator.load(ROOT / 'train.py', [str(path)])
    c, text = config, path.read_text()
    if c.init_from != 'scratch' and (
        c.coreset != 'none' or not c.packing or c.task == 'classify'
    ):  # which count examples
        total = c.batch_size * c.gradient_accumulation_steps
        product = f'{c.batch_size} examples x {c.gradient_accumulation_steps} micro-batches = {total} examples a step'
        assert product in text and re.search(rf'{c.max_iters:,} steps = {total * c.max_iters:,} examples', text)
        return
    total = c.batch_size * c.block_size * c.gradient_accumulation_steps
    tokens = f'{total * c.max_iters / 1e9:.2f}B' if total * c.max_iters > 1e8 else f'{total * c.max_iters / 1e6:.1f}M'
    product = f'{c.batch_size} windows x {c.block_size} tokens x {c.gradient_accumulation_steps} micro-batch'
    assert product in text and f'= {total:,} tokens a step; {c.max_iters:,} steps = {tokens} tokens' in text


def test_every_key_has_a_comment_and_the_design_names_are_there():
    for script in ('train.py', 'sample.py'):
        assert configurator.undocumented(ROOT / script) == []
    keys = set(configurator.keys(ROOT / 'train.py'))
    # Frozen, so that a new key is a decision: add it here, and say in its comment what it costs.
    expected = """out_dir init_from overwrite seed max_iters eval_only dry_run task dataset block_size batch_size
        packing gradient_accumulation_steps model n_layer n_head n_kv_head n_embd n_inner vocab_size model_dropout
        learning_rate table_lr_scale warmup_iters lr_decay_iters decay min_lr weight_decay beta1 beta2 grad_clip
        method targets device dtype state_bits offload per_layer checkpointing offload_activations mlp_chunk
        offload_embedding head_bits
        compile coreset parallel tp_size log_interval eval_interval eval_tokens save_interval best_by save_best
        save_merged sample_tokens tracker"""
    assert keys == set(expected.split())
    galore = 'rank update_proj_gap scale refresh proj_type stagger moments basis_bits project_tables'
    for file, expected in {
        'adam.py': '',
        'galore.py': galore,
        'methods/qgalore.py': galore + ' weight_bits lazy',
        'methods/fira.py': galore,
        'methods/badam.py': 'block_steps choose',
        'methods/adalomo.py': 'adaptive',
        'methods/sltrain.py': 'rank scale density',
        'methods/adarankgrad.py': 'rank update_proj_gap scale energy proj_type stagger moments basis_bits',
        'methods/ldadam.py': 'rank rho feedback proj_type',
        'methods/grass.py': 'rank update_proj_gap scale choose proj_type stagger',
        'methods/apollo.py': 'rank update_proj_gap scale tensorwise proj_type',
        'methods/muon.py': 'momentum row_norm',
        'methods/scale.py': 'momentum',
        'methods/sumo.py': galore + ' momentum orthogonal',
        'loqt.py': 'rank scale update_proj_gap psi compensation refresh proj_type stagger moments quantize '
        'double_quant train_rest',
        'lora.py': 'rank scale rslora lora_plus quantize double_quant dropout merge_every train_rest',
        'coreset.py': 'coreset_from coreset_norm coreset_weights coreset_clusters keep_small zo_directions '
        'coreset_sparsity coreset_layer coreset_depth',
    }.items():
        assert set(configurator.options(ROOT / file)) == set(expected.split()), file


# ---- stopping and going on -----------------------------------------------------------------------------------------


def start(out_dir, data, *flags):
    words = tiny(f'--dataset={data}', f'--out_dir={out_dir}', *flags)
    command = [sys.executable, '-u', 'train.py', *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


LONG = ['--max_iters=60', '--log_interval=1', '--eval_interval=7', '--gradient_accumulation_steps=2']
MODES = {
    'galore': [],
    'galore per layer, bf16 weights, 8-bit states': ['--per_layer', '--dtype=bfloat16', '--state_bits=8'],
    'loqt': ['--method=loqt', '--stagger=False'],
    'loqt, packed checkpoints, all of it': [
        '--method=loqt',
        '--save_merged=False',
        '--per_layer',
        '--dtype=bfloat16',
        '--state_bits=8',
        '--double_quant',
    ],
    'lora': ['--method=lora', '--save_merged=False', '--dropout=0.1', '--merge_every=9'],
    'adamw, clipped': ['--method=adamw', '--grad_clip=0.5', '--weight_decay=0.1'],
}


@pytest.mark.parametrize('mode', MODES)
def test_killed_and_interrupted_then_resumed_equals_uninterrupted_bit_for_bit(mode, tmp_path, data):
    flags = [*LONG, *MODES[mode]]
    whole = train(tmp_path / 'whole', data, *flags)
    assert whole.returncode == 0, whole.stderr

    # SIGKILL at some step after a checkpoint: nothing is said, the last checkpoint is what there is
    kill_at, interrupt_at = random.Random(mode).randint(8, 25), random.Random(mode).randint(26, 50)
    process = start(tmp_path / 'broken', data, *flags)
    for line in process.stdout:
        if line.startswith(f'step {kill_at}/'):
            process.kill()
            break
    process.wait(), process.stdout.close()
    # SIGINT: saved at the step it was in
    process = start(tmp_path / 'broken', data, *flags, '--init_from=resume')
    output = ''
    for line in process.stdout:
        output += line
        if line.startswith(f'step {interrupt_at}/60 | loss'):  # once: a second SIGINT does not wait
            process.send_signal(signal.SIGINT)
    assert process.wait() == 130, output
    assert 'SIGINT at step' in output and '--init_from=resume' in output.split('go on with')[1]
    step = json.loads((tmp_path / 'broken/last/run.json').read_text())['step']
    assert interrupt_at <= step < 60

    last = train(tmp_path / 'broken', data, *flags, '--init_from=resume')
    assert last.returncode == 0, last.stderr
    assert same(weights(tmp_path / 'whole/last'), weights(tmp_path / 'broken/last'))
    saved = [torch.load(tmp_path / n / 'last/optimizer.pt', weights_only=True) for n in ('whole', 'broken')]
    states = [{**file['state'], **dict(enumerate(file.get('layers', []), len(file['state'])))} for file in saved]
    for i, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][i][name])), (i, name)
    assert values(whole.stdout)['val_loss'] == values(last.stdout)['val_loss']
    rows = [
        [(row['step'], row['train_loss'], row['val_loss'], row['grad_norm']) for row in rows_of(tmp_path / name)]
        for name in ('whole', 'broken')
    ]
    assert rows[0] == rows[1], 'every step stands once in metrics.csv, with the numbers of an uninterrupted run'


@pytest.mark.parametrize('method,dtype', [('loqt', 'float32'), ('loqt', 'bfloat16'), ('lora', 'float32')])
def test_a_packed_checkpoint_is_smaller_samples_alike_and_becomes_a_plain_folder(method, dtype, tmp_path, data):
    flags = [f'--method={method}', '--n_embd=64', '--n_inner=256', '--n_layer=6', f'--dtype={dtype}']
    for name, more in (('packed', ['--save_merged=False']), ('merged', [])):
        done = train(tmp_path / name, data, *flags, *more)
        assert done.returncode == 0, done.stderr
    size = {name: sum(f.stat().st_size for f in (tmp_path / name / 'last').iterdir()) for name in ('packed', 'merged')}
    assert size['packed'] < 0.8 * size['merged']
    words = [tmp_path / 'packed/last', '--tokens=20', '--prompt=def', f'--save_to={tmp_path / "plain"}']
    texts = [run(['sample.py', *words]), run(['sample.py', tmp_path / 'merged/last', *words[1:3]])]
    assert texts[0].returncode == 0 and texts[0].stdout != '', texts
    if dtype == 'float32':  # in bf16 a sum of factors rounds otherwise than their product
        said = texts[0].stdout.partition('written: ')[2]  # before it, what merging an adapter changed
        assert said == f'{tmp_path / "plain"}\n' + texts[1].stdout
    assert same(weights(tmp_path / 'plain'), weights(tmp_path / 'merged/last'))
    assert run(['sample.py', tmp_path / 'plain', *words[1:3]]).stdout == texts[1].stdout, 'with its tokenizer'
    for flag in ('--method=galore', f'--method={method}'):
        refused = train(tmp_path / 'next', data, f'--init_from={tmp_path / "packed/last"}', flag)
        assert refused.returncode == 1 and 'keeps its weights packed: python sample.py' in refused.stderr


def test_sigterm_saves_too(tmp_path, data):
    process = start(tmp_path, data, '--max_iters=100000', '--log_interval=1', '--eval_interval=100000')
    for line in process.stdout:
        if line.startswith('step 3/100000 | loss'):
            process.terminate()
    assert process.wait() == 143
    assert json.loads((tmp_path / 'last/run.json').read_text())['step'] >= 3


def test_a_crash_between_two_renames_is_no_loss(finished, tmp_path, data):
    shutil.copytree(finished.out, tmp_path / 'out')
    os.rename(tmp_path / 'out/last', tmp_path / 'out/last.old')
    refused = train(tmp_path / 'out', data)
    assert refused.returncode == 1 and 'holds a run already' in refused.stderr
    assert values(train(tmp_path / 'out', data, '--init_from=resume', '--max_iters=22').stdout)['steps'] == '22'


def test_per_layer_through_the_whole_loop_equals_normal(tmp_path, data):
    for name, flags in {'normal': [], 'per_layer': ['--per_layer']}.items():
        done = train(tmp_path / name, data, '--gradient_accumulation_steps=4', '--learning_rate=1e-3', *flags)
        assert done.returncode == 0, done.stderr
    a, b = weights(tmp_path / 'normal/last'), weights(tmp_path / 'per_layer/last')
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-6


@pytest.mark.parametrize(
    'flags',
    [
        [],
        ['--per_layer'],
        ['--method=loqt', '--quantize=none'],
        ['--method=lora', '--quantize=none', '--dropout=0.2', '--merge_every=3'],
        ['--method=adamw', '--grad_clip=0.5'],
    ],
    ids=str,
)
def test_two_processes_equal_one(flags, tmp_path, data):
    flags = [*flags, '--gradient_accumulation_steps=4', '--learning_rate=1e-3', '--max_iters=8']
    alone = train(tmp_path / 'one', data, *flags)
    assert alone.returncode == 0, alone.stderr
    words = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=0', '--standalone', 'train.py']
    flags = tiny(f'--dataset={data}', f'--out_dir={tmp_path / "two"}', *flags)
    both = run([*words, *flags], env={'OMP_NUM_THREADS': '1'})
    assert both.returncode == 0, both.stderr
    a, b = weights(tmp_path / 'one/last'), weights(tmp_path / 'two/last')
    assert max((a[name] - b[name]).abs().max() for name in a) < 2e-6
    assert abs(float(values(alone.stdout)['val_loss']) - float(values(both.stdout)['val_loss'])) < 1e-3


# ---- starting from pretrained weights ------------------------------------------------------------------------------


def test_training_goes_on_from_a_hugging_face_folder(finished, tmp_path, data):
    out = train(tmp_path, data, f'--init_from={finished.out / "best"}', '--max_iters=5', '--learning_rate=1e-4')
    assert out.returncode == 0, out.stderr
    first = re.search(r'step 0/5 \| val loss ([\d.]+)', out.stdout)[1]
    config = json.loads((tmp_path / 'last/config.json').read_text())
    assert config['eos_token_id'] == 256, 'what the folder says passes through'
    assert first == values(finished.text)['val_loss']


@pytest.mark.parametrize('flags', [['--method=loqt', '--double_quant'], ['--method=lora', '--quantize=nf4']], ids=str)
def test_a_pretrained_folder_goes_into_4_bits_and_on(flags, finished, tmp_path, data):
    start_from = [f'--init_from={finished.out / "best"}', '--learning_rate=1e-3', '--max_iters=20', *flags]
    plan = train(tmp_path, data, *start_from, '--dry_run')
    assert 'planned peak' in plan.stdout, plan.stderr
    out = train(tmp_path, data, *start_from)
    assert out.returncode == 0, out.stderr
    first = float(re.search(r'step 0/20 \| val loss ([\d.]+)', out.stdout)[1])
    assert abs(first - float(values(finished.text)['val_loss'])) < 0.05, 'what 4 bits cost'
    assert float(values(out.stdout)['val_loss']) < first


def test_data_of_another_tokenizer_is_refused_for_a_pretrained_model(finished, tmp_path, data):
    tokenizers = pytest.importorskip('tokenizers')
    shutil.copytree(finished.out / 'best', tmp_path / 'model')
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / 'model/tokenizer.json'))
    out = train(tmp_path / 'out', data, f'--init_from={tmp_path / "model"}')
    assert_one_sentence(out, r'was not made with the tokenizer of .*: prepare your text with it', '--tokenizer=')


# ---- bad input: one sentence, a non-zero exit code, nothing lost -----------------------------------------------------


def assert_one_sentence(done, *patterns, code=1):
    assert done.returncode == code, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1, done.stderr
    for pattern in patterns:
        assert re.search(pattern, errors[0]), errors[0]


def test_missing_config_file_and_typos_are_all_reported_at_once(tmp_path, data):
    out = run(['train.py', 'config/galore_laptp.py', '--learning_rat=1', '--batch_size=many', '--method=galor'])
    assert out.returncode == 2 and 'Traceback' not in out.stderr
    for expected in ('did you mean config/galore_laptop.py', 'learning_rate', 'batch_size', 'galore'):
        assert expected in out.stderr


IMPOSSIBLE = {
    '--rank=0': 'rank=0 is too small: use 1 or more',
    '--model=13m': "model='13m' is not a size: use one of .*did you mean 130m",
    '--beta2=1': 'beta2=1.0 is not a decay rate',
    '--learning_rate=-1': 'learning_rate=-1.0 is too small: use 0 or more',
    '--method=adamw --per_layer --grad_clip=1': 'set grad_clip=0 or per_layer=False',
    '--method=fira --per_layer --grad_clip=1': 'set grad_clip=0 or per_layer=False',
    '--method=ldadam --per_layer --grad_clip=1': 'set grad_clip=0 or per_layer=False',
    '--method=ldadam --rho=1': 'rho=1.0 is out of range: use 0 to 0.9999',
    '--method=adarankgrad --energy=0': 'energy=0.0 is too small',
    '--method=sltrain --density=0': 'density=0.0 is too small',
    '--method=sltrain --init_from=tests/models': 'use --init_from=scratch, or --method=lora',
    '--method=adalomo --per_layer --grad_clip=1': 'set grad_clip=0 or per_layer=False',
    '--method=adalomo --state_bits=8': "state_bits is of Adam's moments, and adalomo keeps none: leave it out",
    '--method=adalomo --beta1=0.8': "beta1 is of Adam's moments, and adalomo keeps none: leave it out",
    '--method=apollo --per_layer --grad_clip=1': 'set grad_clip=0 or per_layer=False',
    '--method=muon --per_layer --grad_clip=1': 'set grad_clip=0 or per_layer=False',
    '--lr_decay_iters=1': 'ends before warmup_iters=2',
    '--device=cuda': 'torch sees no CUDA device',
    '--seed=-1': 'seed=-1 is too small: use 0 or more',
    '--method=loqt --psi=-1': 'psi=-1.0 is too small: use 0 or more',
    '--scale=0': 'scale=0.0 is too small: use 1e-06 or more',
    '--save_merged=False': "method='galore' packs none: leave it out",
    # keys of another method, and words that have gone
    '--method=loqt --basis_bits=4': "basis_bits is galore's and adarankgrad's: leave it out with method='loqt'",
    '--weight_bits=8': "weight_bits is qgalore's: leave it out with method='galore', or use --method=qgalore",
    '--lazy=0.5': "lazy is qgalore's: leave it out with method='galore', or use --method=qgalore",
    '--residual=fira': 'Fira is a method of its own: --method=fira',
    '--method=apollo_mini': '--method=apollo --tensorwise --rank=1 --scale=11.3',
    # what says nothing in the run that it was typed for, and numbers that hang or overflow
    '--min_lr=5': 'min_lr=5.0 is out of range: use 0 to learning_rate=0.001, or -1 for a tenth',
    '--min_lr=-.5': 'min_lr=-0.5 is out of range',
    '--warmup_iters=100': 'warmup_iters=100 is longer than max_iters=20',
    '--init_from=resume --overwrite': 'leave out one of them',
    '--init_from=x --n_layer=3': "n_layer is of new models, and init_from='x' has its own shape: leave it out",
    '--offload': 'where all is on a CPU: leave it out',
    '--method=loqt --quantize=none --compensation=2': "compensation is of weights in 4 bits: leave it out",
    '--method=loqt --quantize=none --double_quant': 'double_quant is of weights in 4 bits',
    '--method=lora --quantize=none --double_quant': 'double_quant is of weights in 4 bits',
    '--method=loqt --compensation=1000000': 'compensation=1000000 is out of range: use 0 to 100',
    '--method=loqt --psi=0 --update_proj_gap=1 --max_iters=1e9': 'is over a million merges in max_iters: raise it',
    '--scale=1e30': 'scale=1e.30 is out of range',
    '--learning_rate=1e30': 'learning_rate=1e.30 is out of range: use 0 to 1000',
    '--seed=9223372036854775808': 'seed=9223372036854775808 is out of range: use 0 to 9223372036854775807',
    '--batch_size=100000000': 'batch_size=100000000 is out of range: use 1 to 1048576',
    '--batch_size=1000000': '32,000,000 tokens at once, over 1,048,576: use a smaller batch_size, with more grad',
    '--n_layer=100000000': 'n_layer=100000000 is out of range: use 0 to 1000',
    '--coreset=grad --coreset_from=100000000': 'coreset_from=100000000 is out of range: use 2 to 16384',
    '--out_dir=': 'out_dir is empty: say which',
    '--dataset=': 'dataset is empty: say which',
    '---rank=8': "expected a config file .* got '---rank=8', did you mean --rank=8?",
    '--learning_rate=nan': 'learning_rate expects a finite number',
    '--learning_rate=1e39': 'learning_rate expects a finite number',
    '--coreset_from=2': 'coreset_from says something with coreset alone: .* --coreset=grad',
}


@pytest.mark.parametrize('flags', IMPOSSIBLE)
def test_impossible_combinations_name_the_flag_to_change(flags):
    if flags == '--device=cuda' and torch.cuda.is_available():
        pytest.skip('it is possible here')
    with pytest.raises(configurator.ConfigError, match=IMPOSSIBLE[flags]):
        configurator.load(ROOT / 'train.py', tiny(*flags.split()), training.problems, moved=MOVED)


def test_a_run_in_the_same_folder_is_refused_until_told_what_to_do(finished, data):
    before = weights(finished.out / 'last')
    assert_one_sentence(train(finished.out, data), 'holds a run already', '--init_from=resume', '--overwrite')
    assert same(before, weights(finished.out / 'last'))


@pytest.mark.parametrize(
    'flag, sentence',
    {
        '--rank=100': 'rank=100 is above every dimension of the blocks: use less than 32',
        '--n_head=5': 'n_embd',
        '--batch_size=32768': 'needs about .* GB by the formula, most of it activations, and there are 2 GB: use',
        '--coreset=grad --coreset_from=16000': 'needs about .* GB by the formula, most of it activations',
        '--block_size=100000': 'too few for a window of 100000: lower block_size',
    }.items(),
)
def test_what_is_wrong_is_said_before_the_folder_that_holds_a_run(flag, sentence, finished, data, monkeypatch):
    monkeypatch.setattr(parallel.Here, 'room', 2e9)  # bytes
    config = configurator.load(
        ROOT / 'train.py', tiny(f'--dataset={data}', f'--out_dir={finished.out}', *flag.split()), training.problems
    )
    with pytest.raises((Stop, DataError, ModelError), match=sentence):
        training.main(config)


def test_a_checkpoint_of_another_shape_names_the_flag(finished, data):
    out = train(finished.out, data, '--init_from=resume', '--n_embd=64')
    assert_one_sentence(out, 'cannot go on with n_embd=64: type --n_embd=32')


def test_resuming_a_finished_run_says_that_there_is_nothing_to_do(finished, data):
    assert_one_sentence(train(finished.out, data, '--init_from=resume'), 'is at step 20, max_iters is 20: raise it')


def test_nothing_to_resume_and_no_such_data_set(tmp_path, data):
    assert_one_sentence(train(tmp_path, data, '--init_from=resume'), 'does not exist, nothing to resume')
    assert_one_sentence(
        train(tmp_path, 'pystdlb'), r'no data set pystdlb \(did you mean pystdlib\?\): use one of c4, .*pystdlib'
    )
    assert_one_sentence(
        train(tmp_path, 'c4'), r'data/c4/meta.json does not exist: run python .*data/c4/prepare.py first'
    )
    assert_one_sentence(train(tmp_path, data, '--init_from=no/such-model'), 'is no folder here and the hub')


@pytest.mark.parametrize('part', ['model.safetensors', 'optimizer.pt', 'run.json', 'meta.json'])
def test_a_broken_checkpoint_is_named_and_left_alone(part, finished, tmp_path, data):
    shutil.copytree(finished.out, tmp_path / 'out')
    path = tmp_path / 'out/last' / part
    path.write_bytes(path.read_bytes()[:100])
    assert_one_sentence(
        train(tmp_path / 'out', data, '--init_from=resume', '--max_iters=30'), part, 'broken|cannot be read'
    )
    assert path.stat().st_size == 100


def test_a_broken_tokenizer_file_is_one_sentence(tmp_path):
    text = tmp_path / 'text.txt'
    text.write_text('def f(x):\n    return x\n' * 400)
    words = ['data/text/prepare.py', f'--input={text}', '--vocab_size=300', f'--out_dir={tmp_path / "data"}']
    assert run(words).returncode == 0
    (tmp_path / 'data/tokenizer.json').write_text('{}')
    assert_one_sentence(train(tmp_path / 'out', tmp_path / 'data'), 'prepare the data again')


def test_truncated_token_file_and_ids_beyond_the_vocabulary(tmp_path, data):
    shutil.copytree(data, tmp_path / 'data')
    whole = (tmp_path / 'data/train.bin').read_bytes()
    (tmp_path / 'data/train.bin').write_bytes(whole[:-1000])
    assert_one_sentence(train(tmp_path / 'out', tmp_path / 'data'), r'train.bin holds \d+ tokens, meta.json says \d+')
    (tmp_path / 'data/train.bin').write_bytes(b'\xff\xff' * (len(whole) // 2))
    assert_one_sentence(train(tmp_path / 'out', tmp_path / 'data'), 'token id 65535 .* beyond the vocabulary of 257')
    assert_one_sentence(train(tmp_path / 'out', data, '--vocab_size=100'), 'the data has 257 token ids, the model 100')


def test_a_non_finite_loss_stops_the_run_and_keeps_the_good_checkpoint(finished, tmp_path, data):
    shutil.copytree(finished.out, tmp_path / 'out')
    before = weights(tmp_path / 'out/last')
    flags = ['--init_from=resume', '--max_iters=60', '--learning_rate=1000', '--scale=10000']
    out = train(tmp_path / 'out', data, *flags)
    assert_one_sentence(out, r'(loss|gradient norm) (nan|inf) at step \d+ \(learning rate', '--learning_rate=500')
    assert same(before, weights(tmp_path / 'out/last')) and same(before, weights(tmp_path / 'out/best'))


@pytest.mark.parametrize('flag', ['--eval_interval=1', '--save_interval=1'])
def test_weights_spoiled_by_the_last_update_are_not_saved(flag, finished, tmp_path, data, monkeypatch):
    # the loss of the step is finite, it is the update that is not: only looking at the weights or val loss shows it
    shutil.copytree(finished.out, tmp_path / 'out')
    before, step = weights(tmp_path / 'out/last'), training.training_step

    def spoiled(model, *rest):
        loss = step(model, *rest)
        with torch.no_grad():
            model.norm.weight[0] = math.inf
        return loss

    monkeypatch.setattr(training, 'training_step', spoiled)
    monkeypatch.setattr(training, 'plan_memory', lambda *_: Plan(1, 1, 1))
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    flags = [f'--dataset={data}', f'--out_dir={tmp_path / "out"}', '--init_from=resume', '--max_iters=60', flag]
    with pytest.raises(SystemExit, match=r'(val loss (nan|inf)|weights that are not finite) at step 21 '):
        training.cli(configurator.load(ROOT / 'train.py', tiny(*flags)))
    for number, handler in handlers:
        signal.signal(number, handler)
    assert same(before, weights(tmp_path / 'out/last')) and same(before, weights(tmp_path / 'out/best'))


def test_best_alone_is_neither_overwritten_nor_lost(finished, tmp_path, data):
    shutil.copytree(finished.out, tmp_path / 'out')
    shutil.rmtree(tmp_path / 'out/last')
    assert_one_sentence(train(tmp_path / 'out', data), 'holds a run already')
    assert values(train(tmp_path / 'out', data, '--init_from=resume', '--max_iters=22').stdout)['steps'] == '22'


def test_the_command_that_resumes_is_what_was_typed(monkeypatch):
    for typed, expected in {
        'config/x.py --rank=8': 'python train.py config/x.py --rank=8 --init_from=resume',
        '--overwrite config/x.py': 'python train.py config/x.py --init_from=resume',
        '--overwrite True --init_from out/y config/x.py': 'python train.py config/x.py --init_from=resume',
        '--init-from=out/y --overwrite=True': 'python train.py --init_from=resume',
    }.items():
        monkeypatch.setattr(sys, 'argv', ['train.py', *typed.split()])
        assert resume.command() == expected
    monkeypatch.setenv('WORLD_SIZE', '8'), monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    assert resume.command().startswith('python -m torch.distributed.run --nproc_per_node=8 train.py')


def test_mfu_is_known_for_known_cards_only(monkeypatch):
    cards = {
        'NVIDIA GeForce RTX 4090': '60.6%',
        'NVIDIA A100-SXM4-80GB': '32.1%',
        'NVIDIA L4': '82.6%',
        'Tesla T4': '153.8%',
    }
    cards |= dict.fromkeys(['NVIDIA L40', 'NVIDIA GeForce RTX 4090 Laptop GPU', 'NVIDIA H100 NVL', 'Quadro T400'], '')
    for card, expected in cards.items():
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda _, card=card: card)
        assert report.mfu(100e12, 'cuda') == expected, card
    assert report.mfu(1e12, 'cpu') == ''


def test_a_full_disk_at_save_time_keeps_the_checkpoint_before(finished, tmp_path, data):
    shutil.copytree(finished.out, tmp_path / 'out')
    before = weights(tmp_path / 'out/last')

    def small_files():  # a real write error from the kernel, as a full disk gives
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    out = train(tmp_path / 'out', data, '--init_from=resume', '--max_iters=30', preexec_fn=small_files)
    assert_one_sentence(out, 'could not write a checkpoint to', 'still holds the one before: free some space')
    assert same(before, weights(tmp_path / 'out/last'))
    assert sorted(os.listdir(tmp_path / 'out')) == ['.lock', 'best', 'last', 'metrics.csv']


def test_out_of_memory_is_explained_with_flags_to_turn(tmp_path, data):
    def little_memory():
        resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))

    out = train(tmp_path, data, '--batch_size=2048', '--n_inner=16384', preexec_fn=little_memory)
    assert_one_sentence(out, 'out of memory|needs about .* there are', '--batch_size')


def test_a_tracker_that_is_not_installed_says_what_to_type(tmp_path, data):
    out = train(tmp_path, data, '--tracker=wandb', env={'PYTHONPATH': str(blocked(tmp_path, 'wandb'))})
    assert_one_sentence(out, 'pip install wandb, or use --tracker=none')


def blocked(folder, module):
    (folder / f'{module}.py').write_text(f"raise ImportError('no {module} here')")
    return folder


@pytest.mark.parametrize('kind', ['wandb', 'trackio', 'tensorboard'])
def test_a_tracker_gets_every_row(kind, tmp_path, data):
    # stands in for the package: writes what it is sent to a file
    if kind == 'tensorboard':
        pytest.importorskip('tensorboard')
    else:
        code = "import json\ndef init(**kw): print('init', sorted(kw))\ndef finish(): print('finished')\n"
        code += "def log(values, step): print('logged', json.dumps([step, sorted(values)]))\n"
        (tmp_path / f'{kind}.py').write_text(code)
    out = train(tmp_path / 'out', data, f'--tracker={kind}', env={'PYTHONPATH': str(tmp_path)})
    assert out.returncode == 0, out.stderr
    if kind == 'tensorboard':
        assert list((tmp_path / 'out').glob('events*'))
    else:
        logged = [json.loads(line[7:]) for line in out.stdout.splitlines() if line.startswith('logged')]
        assert [step for step, _ in logged] == [0, 5, 10, 15, 20] and 'val_loss' in logged[-1][1]
        assert 'finished' in out.stdout


def test_help_lists_every_key_with_its_comment():
    out = run(['train.py', '--help'])
    assert out.returncode == 0
    for name in configurator.keys(ROOT / 'train.py'):
        assert f'--{name}' in out.stdout
    for method in ('galore', 'loqt', 'lora', 'qgalore', 'fira', 'apollo'):
        assert f'\n--method={method}' in out.stdout
    assert 'config/galore_laptop.py' in out.stdout


def test_the_laptop_config_learns(tmp_path):
    """The README's first command, shortened: same file, fewer steps."""
    flags = [f'--out_dir={tmp_path}', '--max_iters=30', '--warmup_iters=10', '--eval_interval=30', '--eval_tokens=4096']
    out = run(['train.py', 'config/galore_laptop.py', *flags])
    assert out.returncode == 0, out.stderr
    first = float(re.search(r'step 0/30 \| val loss ([\d.]+)', out.stdout)[1])
    assert abs(first - math.log(4096)) < 0.1
    assert float(values(out.stdout)['val_loss']) < first - 1.2
