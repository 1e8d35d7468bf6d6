"""plumbing/terminal.py, metrics.py, report.py: what is not training does not end it, and nothing is silent for long."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run, tiny

import configurator
import train as training
from memory.formula import Plan
from plumbing import begin, parallel, report, terminal
from plumbing import metrics as metrics_module
from plumbing.metrics import Metrics


def rows_of(path):
    return [line.split(',') for line in path.read_text().splitlines()]


# ---- the terminal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('code_page', ['cp1252', 'ascii', 'latin-1', 'utf-8'])
def test_what_a_code_page_does_not_have_is_written_all_the_same(code_page):
    bytes_written = io.BytesIO()
    stream = terminal.Tolerant(io.TextIOWrapper(bytes_written, code_page))
    print('sample: \ufffd ☃ \ud800 fin', file=stream, flush=True)
    assert bytes_written.getvalue().startswith(b'sample: ') and bytes_written.getvalue().endswith(b' fin\n')


def test_a_reader_that_has_gone_and_a_full_disk_end_nothing(tmp_path):
    code = 'from plumbing import terminal; terminal.prepare()\n'
    code += 'for i in range(9000): print(i, "x" * 50, flush=True)\nprint("done", file=open({!r}, "w"))'
    reading, writing = os.pipe()
    os.close(reading)
    for out in (writing, os.open('/dev/full', os.O_WRONLY) if os.path.exists('/dev/full') else writing):
        command = [sys.executable, '-c', code.format(str(tmp_path / 'told'))]
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b'') and (tmp_path / 'told').read_text() == 'done\n'
        (tmp_path / 'told').unlink()


def test_ctrl_c_before_the_loop_is_no_traceback():
    done = run(['-c', 'import os; from plumbing import terminal; terminal.prepare(); os.kill(os.getpid(), 2)'])
    assert (done.returncode, done.stdout, done.stderr) == (130, '', '')


def test_a_silence_of_more_than_three_seconds_is_filled_and_a_shorter_one_is_not(capsys, monkeypatch):
    with terminal.patience('evaluating', after=0.05) as tell:
        tell(0.25)
        time.sleep(0.2)
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert told.out == '' and lines[0] == 'evaluating: 0 s so far, 25% done' and 2 <= len(lines) <= 3, (
        'and again when the wait has doubled'
    )
    with terminal.patience('building', after=0.02), terminal.patience('reading', after=0.05):
        time.sleep(0.15)
    assert {line.split(':')[0] for line in capsys.readouterr().err.splitlines()} == {'reading'}
    with terminal.patience('evaluating'):
        pass
    monkeypatch.setenv('RANK', '1')
    with terminal.patience('evaluating', after=0.01):
        time.sleep(0.05)
    assert capsys.readouterr().err == ''


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_each_signal_that_asks_for_an_end_saves_first(name, tmp_path, data, monkeypatch, capsys):
    number = getattr(signal, name)
    handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    monkeypatch.setattr(training, 'plan_memory', lambda *_: Plan(1, 1, 1))
    monkeypatch.setattr(training, 'print_sample', lambda *_: os.kill(os.getpid(), number))  # after step 5 is saved
    flags = tiny(f'--dataset={data}', f'--out_dir={tmp_path}', '--eval_interval=4')
    with pytest.raises(SystemExit) as end:
        training.cli(configurator.load(ROOT / 'train.py', flags))
    for n, handler in handlers:
        signal.signal(n, handler)
    assert end.value.code == 128 + number
    told = capsys.readouterr().out
    assert f'{name} at step 5, saved in {tmp_path}/last; go on with\npython train.py' in told
    val_loss = re.search(r'step 4/20 \| val loss ([\d.]+)', told)[1]
    assert f'val_loss: {val_loss}\nval_step: 4\n' in told, 'the last that was measured, and where'


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    others = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        parallel.CtrlC(SimpleNamespace(say=print))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for n, handler in [*others, (signal.SIGHUP, before)]:
            signal.signal(n, handler)


def test_a_worker_whose_launcher_was_killed_ends_as_by_sigterm(monkeypatch):
    parents, sent = iter([7, 7, 1]), []
    monkeypatch.setattr(os, 'getppid', lambda: next(parents))
    monkeypatch.setattr(os, 'kill', lambda *what: sent.append(what))
    monkeypatch.setattr(time, 'sleep', lambda _: None)
    parallel.end_with(7)
    assert sent == [(os.getpid(), signal.SIGTERM)]


# ---- metrics.csv and the tracker -------------------------------------------------------------------------------------

GOOD = 'step,loss\n1,0.5\n2,0.4\n3,0.3\n'
DAMAGED = {
    GOOD: ['1', '2', '3'],
    '': [],
    'step,loss\n1,0.5\n2,0.4\n3,0': ['1', '2', '3'],
    'step,loss\n1,0.5\n2\n': ['1'],
    'step,loss\n1,0.5\nnan,0.4\nx,y\n3,0.3\n': ['1', '3'],
    'step,loss\n1,0.5\n\0\0\0\0': ['1'],
    'loss\n0.5\n': [],
    'step,loss\n1,2,3,4\n9,0.1\n': [],
    '\x80\xff\xfe': [],
    '"' + 200_000 * 'x': [],
}


@pytest.mark.parametrize('text', DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_metrics_csv_keeps_the_rows_that_can_be_read_and_goes_on(text, tmp_path, capsys):
    path = tmp_path / 'metrics.csv'
    path.write_text(text, encoding='latin-1')
    rows = Metrics(path, first_step=5)
    rows.log(step=6, loss=0.25)
    found = rows_of(path)
    assert [row[0] for row in found] == ['step', *DAMAGED[text], '6']
    assert all(len(row) == 2 for row in found)
    assert ('warning' in capsys.readouterr().out) == (DAMAGED[text] != ['1', '2', '3'])


def test_a_metrics_csv_that_is_deleted_or_cannot_be_written_is_whole_again_later(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'metrics.csv'
    rows = Metrics(path)
    rows.log(step=1, loss=0.5)
    path.unlink()
    rows.log(step=2, loss=0.4)
    assert [row[0] for row in rows_of(path)] == ['step', '1', '2']

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(metrics_module, 'open', full, raising=False)
        rows.log(step=3, loss=0.3)
        rows.log(step=4, loss=0.2)
    rows.log(step=5, loss=0.1)
    assert [row[0] for row in rows_of(path)] == ['step', '1', '2', '3', '4', '5']
    assert capsys.readouterr().out.count('No space left on device); the run goes on') == 1


def test_a_tracker_that_raises_once_gets_the_rows_after_that(tmp_path, capsys):
    sent = []

    def send(values, step):
        if step == 2:
            raise ConnectionError('no network\nand more')
        sent.append(step)

    rows = Metrics(tmp_path / 'metrics.csv', tracker=send)
    for step in (1, 2, 3):
        rows.log(step=step, loss=0.5)
    assert sent == [1, 3] and len(rows_of(tmp_path / 'metrics.csv')) == 4
    assert capsys.readouterr().out == 'warning: the tracker failed (ConnectionError: no network); the run goes on\n'


# ---- log lines -------------------------------------------------------------------------------------------------------


def log_of(tmp_path, **keys):
    flags = [f'--{name}={value}' for name, value in keys.items()]
    config = configurator.load(ROOT / 'train.py', tiny(f'--out_dir={tmp_path}', *flags))
    model = SimpleNamespace(flops_per_token=lambda _: 6e7)
    return report.Log(config, model, Plan(1, 1, 1), begin.Begin(), parallel.Here(0, 1, 'cpu', torch.float32))


def test_two_log_lines_in_one_tick_of_the_clock(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time, 'perf_counter', lambda: 5.0)
    log = log_of(tmp_path)
    for step in (1, 2):
        log.note(torch.ones(()), SimpleNamespace(lr=0.1, metrics={}))
        log.training(step)
        log.write_row()
    assert capsys.readouterr().out.count('| loss 1.0000 |') == 2


@pytest.mark.parametrize('flops', ['', '45.1%'])
def test_log_lines_fit_100_columns_and_mfu_is_there_where_it_is_known(flops, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, 'mfu', lambda *_: flops)
    monkeypatch.setattr(report, 'memory', lambda *_: 123.45e9)
    log = log_of(tmp_path, max_iters=90000)
    log.started -= 10_000
    norm = {'grad_norm': torch.tensor(0.1234)}
    log.note(torch.tensor(9.5), SimpleNamespace(lr=1e-5, metrics=norm))
    log.ticked = time.perf_counter() - 0.01
    log.training(10_000)
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) <= 100 and ('MFU 45.1%' in line) == bool(flops)
    more = ' | kept 45% | gradient error 0.478, by cluster size 0.478, random 1.201'
    log.note(torch.tensor(9.5), SimpleNamespace(lr=1e-5, metrics=norm | {'overlap': torch.tensor(0.5)}))
    log.ticked = time.perf_counter() - 0.01
    log.training(10_001, more)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith('step 10001/90000 | loss 9.5000 | lr ') and second.startswith('    | ')
    assert max(len(first), len(second)) <= 100 and second.endswith(more)


def test_one_of_a_thing_is_not_many():
    assert [report.count(n, 'step') for n in (0, 1, 2, 1000)] == ['0 steps', '1 step', '2 steps', '1,000 steps']
