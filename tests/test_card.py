"""bench/card.py, as far as it goes without a card: its runs, its tables, its one sentence."""

import pytest
import torch

import configurator
import train
from bench import card


@pytest.mark.parametrize('name', card.RUNS)
def test_every_run_of_the_card_check_is_a_configuration_without_problems(name):
    file, flags = card.RUNS[name]
    config = configurator.load(train.__file__, [*([f'config/{file}.py'] if file else []), *flags])
    assert not train.problems(config)


def test_a_run_that_fails_is_a_row_and_the_others_stand():
    ran = {'allocated': 2e9, 'reserved': 3e9, 'card': 4e9, 'tokens': 1000, 'seconds': 0.5, 'refresh': 1.0, 'mfu': 'N/A'}
    ran |= {'kinds': {kind: 100.0 for kind, _ in card.KINDS}, 'launches': 7, 'built': 1.0, 'first': 10.0}
    planned = ran | {'plan_allocated': 1.9e9, 'plan_reserved': 3e9, 'plan_card': 5e9}
    lines = card.tables({'compiled': ran, 'planned': planned, 'broken': {'error': 'CUDA out of memory | really'}})
    rows = {line.split(' | ')[0][2:]: line.split(' | ') for line in lines if line.startswith('| ')}
    assert rows['broken'][1].startswith('CUDA out of memory / really')
    memory = next(line for line in lines if line.startswith('| planned'))
    assert '-5.0 %' in memory and '+25.0 %' in memory
    speed = [line for line in lines if line.startswith('| planned')][1].split(' | ')
    assert speed[4] == '2,000' and speed[8] == '100 %', 'tokens a second, and 500 ms of kernels in 500 ms'


@pytest.mark.skipif(torch.cuda.is_available(), reason='says what is missing without a card')
def test_without_a_card_the_check_says_so(monkeypatch, capsys):
    config = configurator.load(card.__file__, [], card.problems)
    with pytest.raises(card.Stop, match='python -m bench'):
        card.main(config)
