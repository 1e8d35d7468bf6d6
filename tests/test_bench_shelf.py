"""bench.runs.shelf: every method's flags are right, rates go on while the best is at an edge, the frontier is one."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import ROOT

import configurator
import train
from bench.runs import shelf

ARGS = SimpleNamespace(data='pystdlib', steps=30, seeds=2, device='cpu', finished=False)


@pytest.mark.parametrize('name', shelf.METHODS)
def test_the_flags_of_each_method_are_what_train_py_takes(name):
    words = shelf.words_of(ARGS, name, shelf.rate_at(name, 0), 1)
    config = configurator.load(train.__file__, words[1:], train.problems)
    assert not train.problems(config)
    assert config.learning_rate == pytest.approx(shelf.METHODS[name][0])


def test_every_method_of_the_registry_is_on_the_shelf():
    shelved = {
        word.partition('=')[2] for _, flags, *_ in shelf.METHODS.values() for word in flags if '--method=' in word
    }
    relatives = {path.stem for path in (ROOT / 'methods').glob('*.py')} - {'__init__'}
    assert shelved == {'adamw', 'galore', 'loqt', 'lora'} | relatives


@pytest.mark.parametrize(
    ('best', 'tried'), [(0, [-1, 0, 1]), (1, [-1, 0, 1, 2]), (-2, [-3, -2, -1, 0, 1]), (9, [-1, 0, 1, 2, 3, 4])]
)
def test_rates_go_on_while_the_best_is_the_last_on_its_side_up_to_six(best, tried, monkeypatch):
    monkeypatch.setattr(shelf, 'run', lambda args, name, step, seed: {'loss': abs(step - best), 'bytes': 0})
    with ThreadPoolExecutor(1) as pool:
        assert sorted(shelf.tuned(ARGS, 'Muon', pool)) == tried


def test_a_method_that_is_not_finished_is_left_out_and_a_run_that_fails_is_infinitely_bad(monkeypatch):
    monkeypatch.setattr(shelf, 'do', lambda words, log, finished: None)
    with ThreadPoolExecutor(1) as pool:
        assert shelf.tuned(SimpleNamespace(**vars(ARGS) | {'finished': True}), 'Muon', pool) == {}

    def fails(words, log, finished):
        raise RuntimeError('exit status 1')

    monkeypatch.setattr(shelf, 'do', fails)
    assert shelf.run(ARGS, 'Muon', 0, 1)['loss'] == float('inf')


def test_a_run_that_shelf_csv_knows_is_not_made_again(monkeypatch, tmp_path):
    monkeypatch.setattr(shelf, 'made', {('Muon', '0.004', '1', str(ARGS.steps)): dict(loss=4.5, bytes=7, device='cpu')})
    shelf.write(tmp_path / 'shelf.csv')
    known = dict(shelf.made)
    shelf.made.clear()
    shelf.read(tmp_path / 'shelf.csv')
    assert shelf.made == known
    monkeypatch.setattr(shelf, 'do', None)
    assert shelf.run(ARGS, 'Muon', 0, 1)['loss'] == 4.5


def test_on_the_frontier_nothing_is_better_in_both():
    points = {'a': (1, 5.0), 'b': (2, 6.0), 'c': (3, 4.0), 'd': (3, 4.5), 'e': (9, 3.9)}
    assert shelf.frontier(points) == ['a', 'c', 'e']


def test_places_are_counted_within_a_family_of_tables():
    found = {'GaLore': (4.0, []), 'Fira': (3.0, []), 'Muon': (3.5, [])}
    lines = list(shelf.order(found))
    assert [line[1:4] for line in lines if line[0][0] == 'A'] == [['Fira', '3.000', 1], ['GaLore', '4.000', 2]]
    assert [line[5] for line in lines if line[0][0] == 'B'] == [2, 1, 3], 'of Fira, Muon, GaLore'
