"""bench/plot.py draws what metrics.csv holds, and says what is missing."""

import pytest
from conftest import run

from bench import plot


@pytest.fixture
def runs(tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.csv').write_text('step,train_loss,val_loss\n0,,5.0\n10,4.5,\n20,4.0,4.2\n')
    return tmp_path


def test_points_are_the_rows_where_both_columns_are_there(runs):
    assert plot.read(str(runs / 'a'), 'step', 'val_loss') == [(0, 5.0), (20, 4.2)]
    assert plot.read(str(runs / 'a'), 'step', 'train_loss') == [(10, 4.5), (20, 4.0)]


def test_it_writes_a_png_of_several_runs(runs):
    pytest.importorskip('matplotlib')
    done = run(['-m', 'bench.plot', runs / 'a', runs / 'b', f'--png={runs / "x.png"}'])
    assert done.returncode == 0, done.stderr
    assert (runs / 'x.png').read_bytes().startswith(b'\x89PNG') and 'x.png' in done.stdout


def test_a_folder_that_is_no_run_is_one_sentence(runs):
    done = run(['-m', 'bench.plot', runs / 'nothing', f'--png={runs / "x.png"}'])
    assert done.returncode == 1 and done.stderr.startswith('error: ') and 'Traceback' not in done.stderr
