"""plumbing/checkpoint.py, begin.py, resume.py: what a run finds again, whatever happened to it in between."""

import fcntl
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, run, tiny

import configurator
import train as training
from data.batches import Tokens
from memory.formula import Plan
from memory.measure import Measure
from plumbing import Stop, begin, build, checkpoint, metrics, resume


@pytest.fixture(scope='module')
def finished(tmp_path_factory, data):
    """The folder of a tiny run of 10 steps, in this process."""
    out = tmp_path_factory.mktemp('out') / 'finished'
    session(out, data, '--max_iters=10', '--eval_interval=5')
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / 'out'))


def load(*flags):
    return configurator.load(ROOT / 'train.py', list(flags), training.problems, earlier=resume.settings)


def session(out, data, *flags):
    """train.py in this process; a sentence that it ends with is raised as SystemExit."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        with mock.patch.object(training, 'plan_memory', return_value=Plan(1, 1, 1)):  # it takes most of the time
            training.cli(load(*tiny(f'--dataset={data}', f'--out_dir={out}', '--sample_tokens=0', *flags)))
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def again(out, *flags):
    return ['--init_from=resume', f'--out_dir={out}', *flags]


def bits(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def parts(folder):
    return begin.begin(load(*again(folder, '--max_iters=20')), training.fixed(load()), first=True)


# ---- a checkpoint knows its own content ------------------------------------------------------------------------------


def test_a_flipped_bit_or_a_lost_byte_in_any_file_is_noticed_and_named(copied):
    parts(copied)
    draw = np.random.default_rng(0)
    for name, content in bits(copied / 'last').items():
        for _ in range(12):
            at, bit = int(draw.integers(len(content))), int(draw.integers(8))
            spoiled = bytearray(content)
            spoiled[at] ^= 1 << bit
            file = copied / 'last' / name
            for damaged in (bytes(spoiled), content[:at], content + b' '):
                file.write_bytes(damaged)
                if name == 'run.json':  # white space and the like may change there, a value may not
                    try:
                        before = json.loads(content)
                        if json.loads(damaged) == before:
                            continue
                    except ValueError:
                        pass
                with pytest.raises(checkpoint.CheckpointError, match=name):
                    parts(copied)
            file.write_bytes(content)
    (copied / 'last/optimizer.pt').unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r'optimizer\.pt is missing'):
        parts(copied)


def test_a_damaged_last_falls_back_on_best_only_by_the_command_that_is_told(copied, monkeypatch):
    words = again(copied, '--max_iters=20')
    monkeypatch.setattr(sys, 'argv', ['train.py', *words])
    (copied / 'last/model.safetensors').write_bytes(b'damaged')
    with pytest.raises(Stop, match='go on from best/, which is older, with\nmv ') as told:
        parts(copied)
    before = bits(copied / 'last')
    move, _, command = str(told.value).splitlines()[-1].partition(' && ')
    assert bits(copied / 'last') == before, 'nothing is changed until that is typed'
    os.rename(*move.split()[1:])
    assert command.split()[:2] == ['python', 'train.py']
    found = begin.begin(load(*command.split()[2:]), training.fixed(load()))
    assert found.saved_at == str(copied / 'best') and found.step > 0
    shutil.rmtree(copied / 'best')
    os.rename(copied / 'last.damaged', copied / 'last')
    with pytest.raises(Stop, match='start anew with another --out_dir'):
        parts(copied)


def test_weights_to_start_from_are_checked_but_not_the_states_beside_them(copied, tmp_path):
    fresh = load(f'--init_from={copied}', f'--out_dir={tmp_path / "new"}')
    (copied / 'best/optimizer.pt').write_bytes(b'')
    assert begin.begin(fresh, ()).weights == str(copied / 'best')
    content = (copied / 'best/model.safetensors').read_bytes()
    (copied / 'best/model.safetensors').write_bytes(content[:-4] + bytes(4))
    told = run(['sample.py', copied])
    assert (told.returncode, told.stdout) == (1, '') and 'model.safetensors is damaged' in told.stderr
    with pytest.raises(checkpoint.CheckpointError, match='is damaged: its bytes are not those that were saved'):
        begin.begin(fresh, ())


def test_a_checkpoint_from_before_there_were_checksums_goes_on(copied):
    record = json.loads((copied / 'last/run.json').read_text())
    old = {key: value for key, value in record.items() if key in ('step', 'best_val_loss', 'seconds', 'config')}
    (copied / 'last/run.json').write_text(json.dumps(old))
    found = parts(copied)
    assert (found.step, found.windows, found.tokens) == (10, 40, 1280)


@pytest.mark.parametrize('text', ['[]', '{}', 'null', '{"step": "ten"}', '[' * 100_000, '\0', '{"config": []}'])
def test_a_run_json_of_nonsense_is_one_sentence(text, copied):
    (copied / 'last/run.json').write_text(text)
    with pytest.raises(Stop, match=r'run\.json'):
        parts(copied)


# ---- ways to lose a checkpoint ---------------------------------------------------------------------------------------


def write(folder, step, **kw):
    def weights(new, merged):
        os.makedirs(new)
        Path(new, 'w').write_text(str(step))

    model = SimpleNamespace(save_pretrained=weights)
    state = SimpleNamespace(state_dict=lambda: {'step': step})
    checkpoint.save(str(folder), model, state, {'step': step, 'config': {}}, {}, **kw)


def step_of(folder):
    path, record = resume.find(str(folder))
    assert Path(path, 'w').read_text() == str(record['step'])
    checkpoint.verify(path)
    return record['step']


def test_last_and_best_share_no_bytes(finished):
    for file in (finished / 'last').iterdir():
        assert file.stat().st_nlink == 1, file
    assert bits(finished / 'last') == bits(finished / 'best')


def test_a_last_that_is_a_link_to_another_disk_stays_one(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'last').symlink_to(tmp_path / 'disk/last')
    for step in (1, 2, 3):
        write(tmp_path / 'last', step)
        assert step_of(tmp_path / 'last') == step_of(tmp_path / 'disk/last') == step
    assert (tmp_path / 'last').is_symlink() and sorted(os.listdir(tmp_path / 'disk')) == ['last']


def test_an_old_checkpoint_that_cannot_be_deleted_ends_nothing_and_is_cleared_when_it_can(tmp_path, monkeypatch):
    delete = shutil.rmtree
    monkeypatch.setattr(shutil, 'rmtree', lambda path, **kw: None)
    for step in (1, 2, 3, 4):
        write(tmp_path / 'last', step)
        assert step_of(tmp_path / 'last') == step
    os.rename(tmp_path / 'last', tmp_path / 'gone')  # as after a crash between two renames
    assert step_of(tmp_path / 'last') == 3, 'the newest of what is left'
    monkeypatch.setattr(shutil, 'rmtree', delete)
    write(tmp_path / 'last', 5)
    assert sorted(os.listdir(tmp_path)) == ['gone', 'last']


def test_a_complete_new_checkpoint_that_cannot_be_renamed_is_kept_and_named(tmp_path, monkeypatch):
    write(tmp_path / 'last', 1)
    rename = os.rename

    def refuse(source, target):
        if source.endswith('.new'):
            raise PermissionError(13, 'Permission denied')
        rename(source, target)

    monkeypatch.setattr(os, 'rename', refuse)
    with pytest.raises(checkpoint.CheckpointError, match=r'the new checkpoint is complete in .*last\.new: rename it'):
        write(tmp_path / 'last', 2)
    assert step_of(tmp_path / 'last') == 1 and step_of(tmp_path / 'last.new') == 2


def test_what_a_kill_left_is_cleared_when_the_run_goes_on(copied):
    for name in ('last.old', 'last.old_'):
        shutil.copytree(copied / 'best', copied / name)
    parts(copied)
    assert not list(copied.glob('last.old*')) and (copied / 'last').is_dir()


def test_overwrite_deletes_nothing_until_something_new_is_complete(copied, data, monkeypatch):
    before = {name: bits(copied / name) for name in ('last', 'best')}
    rows = (copied / 'metrics.csv').read_text()
    for flags in (['--learning_rate=1000', '--scale=10000'], ['--tracker=wandb']):
        monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=lambda **kw: 1 / 0, __spec__='here'))
        with pytest.raises(SystemExit) as end:
            session(copied, data, '--overwrite', '--max_iters=20', *flags)
        assert 'go on from' not in str(end.value) and str(end.value).startswith('error: ')
        assert before == {name: bits(copied / name) for name in ('last', 'best')}
    parts(copied)
    metrics.Metrics(copied / 'metrics.csv', first_step=10)
    assert (copied / 'metrics.csv').read_text() == rows, 'the rows of the run that is still there'
    flags = ['--max_iters=4', '--save_interval=2', '--eval_interval=4']
    session(copied, data, '--overwrite', *flags)
    assert [resume.find(copied / name)[1]['step'] for name in ('last', 'best')] == [4, 4]
    assert sorted(os.listdir(copied)) == ['.lock', 'best', 'last', 'metrics.csv']


def test_best_may_hold_weights_alone_and_then_no_run_goes_on_from_it(tmp_path, data):
    session(tmp_path, data, '--save_best=weights', '--max_iters=4', '--eval_interval=2')
    assert not (tmp_path / 'best/optimizer.pt').exists() and (tmp_path / 'last/optimizer.pt').exists()
    checkpoint.verify(tmp_path / 'best')
    assert parts(tmp_path).saved_at == str(tmp_path / 'last')
    shutil.rmtree(tmp_path / 'last')
    with pytest.raises(Stop, match=r'saved with save_best=weights.* --init_from=.*best and another --out_dir'):
        parts(tmp_path)


def test_a_second_run_in_the_same_folder_is_refused_and_a_crash_leaves_no_lock(tmp_path):
    command = f"import sys; from plumbing import resume; resume.lock('{tmp_path}'); print('locked', flush=True)"
    assert run(['-c', command]).stdout == 'locked\n'
    assert run(['-c', command + '; import os; os.kill(os.getpid(), 9)']).stdout == 'locked\n', (
        'of a process that is gone'
    )
    with open(tmp_path / '.lock') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(
            Stop, match=r'another run writes to .* \(process \d+\): wait for its end, or choose another'
        ):
            resume.lock(tmp_path)
    resume.lock(tmp_path)
    resume.lock(tmp_path)  # its own


# ---- going on --------------------------------------------------------------------------------------------------------


def starts(windows):
    return windows[0][:, 0].tolist(), windows[2].tolist()


def test_another_batch_size_neither_repeats_nor_skips_a_window(finished, data):
    whole, tokens = Tokens(data, 'train', 32), Tokens(data, 'train', 32)
    c = load(*again(finished, '--max_iters=20', '--batch_size=3', '--gradient_accumulation_steps=2'))
    found = begin.begin(c, training.fixed(c))
    assert found.windows == 40
    tokens.skip = found.windows - found.step * begin.windows_a_step(c)
    read = [tokens.batch(c.seed, t, 3)[0] for t in range(20, 24)]  # steps 10 and 11
    assert torch.equal(torch.cat(read), torch.cat([whole.batch(c.seed, t, 4)[0] for t in range(10, 13)]))
    then = SimpleNamespace(**found.position(12, c))
    assert (then.windows, then.tokens) == (40 + 12, 10 * 4 * 32 + 2 * 6 * 32)
    # and once more, from there
    found.run |= vars(then)
    assert found.windows - 12 * begin.windows_a_step(load('--batch_size=5')) == 52 - 60
    coreset = load(*again(finished, '--coreset=grad', '--coreset_from=4', '--max_iters=20'))
    assert begin.windows_a_step(coreset) == 16, 'the pool is what is read'


def test_a_resumed_run_takes_its_keys_from_run_json_and_what_is_typed_wins(finished, capsys, data):
    c = load(*again(finished, '--max_iters=14', '--learning_rate=0.1'))
    assert (c.rank, c.n_embd, c.learning_rate, c.max_iters, c.dataset) == (8, 32, 0.1, 14, data)
    assert 'run.json' in c._given['rank'] and c._given['learning_rate'] == 'command line'
    with pytest.raises(Stop, match='cannot go on with method=loqt: type --method=galore'):
        begin.begin(load(*again(finished, '--method=loqt', '--max_iters=14')), ('method',))
    assert load(f'--out_dir={finished}').rank != 8, 'only a run that resumes'


def test_an_option_of_the_runs_method_can_be_typed_alone(tmp_path, data):
    session(tmp_path, data, '--method=loqt', '--max_iters=2')
    c = load(*again(tmp_path, '--psi=1.5', '--max_iters=4'))
    assert (c.method, c.psi, c.rank) == ('loqt', 1.5, 8)


def test_what_has_changed_is_said_a_line_each_before_anything_is_overwritten(finished):
    c = load(
        *again(finished, '--max_iters=20', '--learning_rate=0.1', '--batch_size=2', '--seed=7', '--save_interval=9')
    )
    found = begin.begin(c, ())
    found.data = found.run['data']
    told = list(found.changes(c, training.learning_rate_at))
    assert [line.split(':')[0] for line in told] == [
        'seed 1 -> 7',
        'max_iters 10 -> 20',
        'batch_size 4 -> 2',
        'learning_rate 0.001 -> 0.1',
        'save_interval 0 -> 9',
        'the schedule of the learning rate changes with that',
    ]
    assert told[-1].endswith('at step 10 0.0001 -> 0.0628') and 'none is read twice' in told[2]
    same = load(*again(finished))
    assert list(found.changes(same, training.learning_rate_at)) == []


def test_data_prepared_anew_since_the_run_began_is_noticed(copied, data, tmp_path, capsys):
    other = Path(shutil.copytree(data, tmp_path / 'data'))
    tokens = np.fromfile(other / 'train.bin', np.uint16)
    np.roll(tokens, 1).tofile(other / 'train.bin')  # the same counts, other text
    flags = ['--max_iters=11', '--eval_interval=100', f'--dataset={other}']
    session(copied, data, '--init_from=resume', *flags)
    told = capsys.readouterr().out
    assert f'dataset {data} -> {other}: another text from here on' in told and 'prepared anew' not in told
    np.roll(tokens, 2).tofile(other / 'train.bin')
    session(copied, data, '--init_from=resume', *flags, '--max_iters=12')
    assert 'the data set was prepared anew since the run began' in capsys.readouterr().out
    session(copied, data, '--init_from=resume', *flags, '--max_iters=13')
    assert 'prepared anew' not in capsys.readouterr().out


def test_a_run_only_evaluated_writes_nothing_and_a_finished_one_may_be(copied, capsys):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob('*')}
    training.cli(load(*again(copied, '--eval_only')))
    told = dict(line.split(': ', 1) for line in capsys.readouterr().out.splitlines() if ': ' in line)
    record = json.loads((copied / 'last/run.json').read_text())
    assert told['val_loss'] == f'{record["val_loss"]:.4f}' and told['val_step'] == '10'
    assert before == {path: path.stat().st_mtime_ns for path in copied.rglob('*')}


# ---- short runs, and the peak ----------------------------------------------------------------------------------------


def test_defaults_follow_the_length_of_the_run_and_the_first_step_moves():
    for max_iters, warmup, tokens in ((5, 0, 2560), (40, 4, 20480), (1000, 100, 65536), (10**6, 100, 65536)):
        c = load(f'--max_iters={max_iters}')
        assert (training.warmup_of(c), training.eval_tokens_of(c)) == (warmup, tokens)
        rates = [training.learning_rate_at(step, c) for step in range(min(max_iters, 200))]
        assert min(rates) > 0 and rates[warmup] == max(rates) == c.learning_rate
    with pytest.raises(
        configurator.ConfigError, match=r'warmup_iters=100 is longer than max_iters=20.*--warmup_iters=-1'
    ):
        load('--max_iters=20', '--warmup_iters=100')


@pytest.mark.parametrize(
    'flags', [[], ['--method=loqt', '--stagger=False'], ['--checkpointing', '--per_layer']], ids=str
)
def test_measured_and_planned_peak_are_of_the_same_thing_and_looking_changes_no_bit(flags, data):
    c = load(*tiny(f'--dataset={data}', *flags))
    runs = []
    for compiled in (False, True):  # True: the recorder does not look
        model = build.build_model(c, data, 257, torch.float32, 'cpu', linear=build.layers_of(c))
        optimizer = training.setup(model, c)
        measure, tokens = Measure(model, optimizer, False, compiled=compiled), Tokens(data, 'train', 32)
        for step in range(7):
            with measure.step(step):
                batches = [tokens.batch(1, step, 4)[:2]]
                training.training_step(model, optimizer, batches, 1e-3, 'cpu')
        runs.append((measure.peak, [p.detach().clone() for p in model.parameters()]))
    assert all(map(torch.equal, runs[0][1], runs[1][1])) and runs[1][0] is None
    plan = training.plan_memory(c, model.config, 'cpu', torch.float32)
    assert runs[0][0] == pytest.approx(plan.total, rel=0.01)
