"""bench: every part at tiny size gives its rows, of numbers that can be."""

import importlib.util
import inspect
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, run

import configurator
from bench import __main__ as bench
from bench import gradients

PARTS = ['optimizer', 'training', 'stall', 'refresh', 'memory']
TINY = [f'--{name}_sizes=9m:1' for name in PARTS] + ['--claim_sizes=9m', '--state_sizes=9m 60m', '--real_sizes=9m']
TINY += ['--repeats=3', '--seconds=1', '--rounds=1', '--batch_size=1', '--periods=1', '--amortised_over=20']
TINY += ['--refreshes=1', '--update_proj_gap=5', '--merge_sizes=9m']
TINY += ['--example_sizes=9m:1', '--examples_a_step=4', '--examples_at_once=4']
TINY += ['--compiled_sizes=9m:1', '--compiled_windows=1', '--compiled_rounds=1']
AUTHORS = bool(importlib.util.find_spec('galore_torch'))


def table(text, heading):
    """{head: cells} of each row of the table under a heading."""
    lines = text.split(f'## {heading}\n')[1].split('\n## ')[0].splitlines()
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('|')]
    return [dict(zip(rows[0], row)) for row in rows[2:]]


def number(cell):
    return float(cell.replace(',', '').removesuffix('%'))


@pytest.fixture(scope='module')
def tables(tmp_path_factory):
    """What a run of all parts writes."""
    folder = tmp_path_factory.mktemp('bench')
    done = run(['-m', 'bench', *TINY, f'--out={folder / "results" / "bench.md"}'])
    assert done.returncode == 0, done.stderr
    if importlib.util.find_spec('matplotlib'):
        assert (folder / 'results' / 'bench.png').stat().st_size > 10_000
    return (folder / 'results' / 'bench.md').read_text()


def test_optimizers_have_times_and_states(tables):
    rows = {row['optimizer']: row for row in table(tables, 'The optimizer alone, on given gradients')}
    assert len(rows) == 10 + AUTHORS
    for row in rows.values():
        assert number(row['ms amortised']) >= number(row['ms']) > 0
    matrices = 4 * 128 * 128 + 3 * 128 * 352
    states = {name: number(row['MB of states']) for name, row in rows.items()}
    assert states['AdamW'] == pytest.approx(8 * matrices / 1e6, abs=0.01)
    assert states['GaLore'] == pytest.approx(4 * (7 * 128 * 32 + 2 * 32 * (4 * 128 + 3 * 352)) / 1e6, abs=0.01)
    assert states['GaLore, 8-bit states, 4-bit basis'] < states['GaLore, 8-bit states'] < states['GaLore']
    assert number(rows['GaLore']['slowest step over mean']) > 0


def test_examples_are_the_same_for_all_rows_and_packed_ones_fill_them_best(tables):
    rows = table(tables, "Examples of GSM8K's lengths")
    assert [row['rows'].split(',')[0] for row in rows] == ['packed', 'padded', 'padded', 'padded to 570']
    shares = [number(row['of it examples']) for row in rows]
    assert shares[1] >= shares[2] > shares[3] > 20 and shares[0] > shares[3]
    tokens = [number(row['tokens/s']) * number(row['ms']) for row in rows]
    assert max(tokens) < 1.02 * min(tokens), 'the same ones'
    assert number(rows[0]['speed over packed']) == 1 and all(number(row['MB made in a step']) > 0 for row in rows)


def test_a_compiled_step_has_a_time_beside_one_without(tables):
    rows = table(tables, 'A step with compile=True')
    assert {'AdamW', 'GaLore, per_layer', 'LoQT', 'LoRA'} <= {row['method'] for row in rows}
    for row in rows:
        of_rounded = number(row['CPU ms, compiled']) / number(row['CPU ms'])
        assert number(row['ratio']) == pytest.approx(of_rounded, rel=0.05) and number(row['start-up, s']) > 0


def test_merges_bytes_and_peaks_of_loqt(tables):
    rows = table(tables, 'A merge of one layer (LoQT)')
    assert [row['layer'] for row in rows] == ['128 x 128', '352 x 128', '128 x 352']
    assert all(number(row['CPU ms']) > 0 and number(row['CPU ms of theirs']) > 0 for row in rows)
    rows = {row['size']: row for row in table(tables, 'Bytes of a LoQT model')}
    assert rows['9m']['tensors'] == 'real' and rows['60m']['tensors'] == 'fake'
    small, r, layers = 4 * 128 * 128 + 3 * 128 * 352, 32, 4
    P, B, other = 7 * 128 * r, r * (4 * 128 + 3 * 352), 2 * 32000 * 128 + (2 * layers + 1) * 128
    packed = 0.5625 * (small + P) * layers  # half a byte, and four for each 64
    assert number(rows['9m']['bytes of weights']) == pytest.approx(packed + 2 * (B * layers + other), rel=0.01)
    assert number(rows['60m']['GiB']) < number(rows['60m']["at most: the paper's"])
    for row in table(tables, 'The peak of a step that merges (LoQT)'):
        assert number(row['MB, with merges']) > 0 and number(row['more, in those']) <= 4


def test_training_steps_are_compared_with_the_baseline(tables):
    rows = {row['method']: row for row in table(tables, 'Whole training steps')}
    assert len(rows) == 6 + AUTHORS
    assert number(rows['torch AdamW, fused']['over torch AdamW, fused']) == 1
    for row in rows.values():
        assert number(row['tokens/s']) > 0 and number(row['matmul']) > 0
        assert number(row['over torch AdamW, fused']) > 0
    kept = {name: number(row['MB of weights and states']) for name, row in rows.items()}
    assert kept['GaLore'] < kept['AdamW'] == kept['torch AdamW, fused']


def test_stall_is_the_slowest_over_the_mean(tables):
    (row,) = table(tables, 'The slowest step of a training run')
    assert row['steps in a period'] == '5' and row['refreshes a step'] == '1.40'
    assert number(row['ms, slowest']) >= number(row['ms, mean']) > 0
    assert number(row['slowest over mean']) > 0


def test_states_are_the_bytes_of_the_papers_counting(tables):
    rows = table(tables, 'Bytes')
    counted = {row['model']: row for row in rows if row['what'] == 'states of GaLore at 2 bytes a number'}
    assert number(counted['60m']['bytes']) == 163_743_744 and counted['60m']['tensors'] == 'fake'
    assert counted['9m']['tensors'] == 'real'
    assert [row['what'] for row in rows[2:]] == ['states of GaLore in 8 bits, bases in 4', 'all memory of training']
    for row in rows:
        assert 0 < number(row['bytes']) < number(row["AdamW's"])


def test_refreshes_are_compared_with_the_svd(tables):
    rows = table(tables, 'A new P on real gradients')
    assert [row['gradient'] for row in rows] == ['128 x 128', '128 x 352']
    for row in rows:
        assert 0.5 < number(row["energy kept, of the SVD's: mean"]) <= 1.0001
        assert number(row['by the old P']) < number(row["energy kept, of the SVD's: mean"])


def test_gradients_alive_at_once_are_fewer_per_layer(tables):
    full = {row['method']: number(row['most MB of full gradients']) for row in table(tables, 'Gradients alive at once')}
    assert full['GaLore, per_layer'] < full['GaLore'] < full['GaLore, drop-in'] == full['AdamW']
    assert full['AdamW, per_layer'] < full['AdamW']


def test_groups_hold_the_baseline_and_every_method_once():
    from bench import steps

    names = list(steps.TRAINERS)
    assert steps.groups(names, '130m', 12, 100e9) == [names]
    several = steps.groups(names, '1b', 6, 20e9)
    assert len(several) > 1 and all(group[0] == steps.BASELINE for group in several)
    assert [name for group in several for name in group[1:]] == names[1:]


def test_one_part_alone_writes_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, 'ROOT', str(tmp_path))
    bench.main(configurator.load(bench.__file__, ['--only=memory', '--memory_sizes=9m:1'], bench.problems))
    assert '## Gradients alive at once' in capsys.readouterr().out and not list(tmp_path.iterdir())


REFUSED = {
    '--optimizer_sizes=9mm': '9mm is not NAME or NAME:BLOCKS',
    '--training_sizes=9m:x': '9m:x is not NAME or NAME:BLOCKS',
    '--stall_sizes=9m:100000000': 'is not NAME or NAME:BLOCKS',
    '--real_sizes=9m:1': '9m:1 is not a NAME',
    '--only=foo': "only expects 'all' | 'optimizers'",
    '--only=merge --refresh_sizes=9m': "refresh_sizes is of refresh: leave it out with only='merge'",
    '--only=merge --out=x.md': "out is of full runs: leave it out with only='merge'",
    '--only=picture --out=no.md': "out='no.md' is no file with tables",
    '--repeats=0': 'repeats=0 is too small: use 1 or more',
    '--minutes=nan': 'minutes expects a finite number',
}


@pytest.mark.parametrize('flags', REFUSED)
def test_what_cannot_be_measured_is_refused_with_what_to_type(flags):
    with pytest.raises(configurator.ConfigError) as error:
        configurator.load(bench.__file__, flags.split(), bench.problems)
    assert REFUSED[flags] in str(error.value)


def test_the_headings_of_the_keys_name_the_parts_that_read_them():
    keys = configurator.keys(bench.__file__)
    headed = {name: set(key.section.partition(':')[0].split(', ')) for name, key in keys.items() if key.section}
    for part, (measure, *_) in bench.PARTS.items():
        code = inspect.getsource(measure) + inspect.getsource(gradients.real_run) * (part in ('refresh', 'memory'))
        assert {name for name, parts in headed.items() if part in parts} == set(re.findall(r'config\.(\w+)', code)), (
            part
        )


def test_the_picture_is_drawn_from_the_tables(tmp_path):
    pytest.importorskip('matplotlib')
    shutil.copy(ROOT / 'results' / 'bench.md', tmp_path)
    assert bench.draw(str(tmp_path / 'bench.md'))
    assert (tmp_path / 'bench.png').read_bytes().startswith(b'\x89PNG')


def test_commits_compares_a_commit_with_the_present_code_and_leaves_no_worktree(tmp_path):
    def git(*words):
        return subprocess.run(['git', *words], cwd=ROOT, capture_output=True, text=True)

    if git('rev-parse', 'HEAD').returncode:
        pytest.skip('not a git checkout')
    before, command = git('worktree', 'list').stdout, ['-m', 'bench.runs.commits']
    done = run([*command, 'HEAD', '--rounds=3', '--only=LoRA', f'--out={tmp_path / "commits.md"}'])
    assert done.returncode == 0, done.stderr
    row = next(line for line in (tmp_path / 'commits.md').read_text().splitlines() if line.startswith('| LoRA |'))
    assert all(number(cell) > 0 for cell in row.split('|')[2:5])
    assert git('worktree', 'list').stdout == before
    done = run([*command, 'no-such-commit'])
    assert done.returncode == 1 and done.stderr.startswith('error: git worktree')
