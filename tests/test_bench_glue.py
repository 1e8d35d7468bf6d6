"""bench.runs.glue: which runs it makes, of which the table is, and that it goes on where it stopped."""

import json
import os
from types import SimpleNamespace

import pytest

from bench.runs import glue


def test_each_method_is_tried_with_its_rates_and_the_best_runs_under_the_other_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(glue, 'ROOT', str(tmp_path))
    (tmp_path / 'results').mkdir()
    done = []

    def do(words, log, finished=False):
        if finished and ('LoRA' in log or '_3_2/' in log):
            return None
        folder = os.path.dirname(os.path.join(tmp_path, log))
        if 'prepare.py' in words[0]:
            out = os.path.join(tmp_path, words[-1].removeprefix('--out_dir='))
            os.makedirs(out, exist_ok=True)
            with open(os.path.join(out, 'meta.json'), 'w') as f:
                json.dump({'train_examples': 100, 'longest': 40}, f)
            return ''
        flags = dict(word.removeprefix('--').split('=', 1) for word in words[1:] if '=' in word)
        done.append(flags)
        os.makedirs(os.path.join(folder, 'last'), exist_ok=True)
        high = 0.5 + 0.1 * (flags['learning_rate'] in ('5e-5', '1e-4', '1e-3')) + 0.01 * int(flags['seed'])
        metric = 'val_matthews' if 'cola' in flags['dataset'] else 'val_accuracy'
        rows = [f'step,{metric}', '0,0.99', '1,', f'4,{high + 0.2}', f'8,{high}']
        with open(os.path.join(folder, 'metrics.csv'), 'w') as f:
            f.write('\n'.join(rows))
        return 'device: cpu\nseconds: 12.5\npeak_bytes_planned: 2000000000\npeak_bytes_measured: 1000000000\n'

    monkeypatch.setattr(glue, 'do', do)
    args = SimpleNamespace(
        model='m/x', input='glue', tasks='cola,rte', epochs=2, seeds=3, device='cpu', jobs=1, finished=False
    )
    glue.main(args)
    assert len(done) == 2 * 5 * (3 + 2) and all(
        one['max_iters'] == '8' == str(2 * int(one['eval_interval'])) for one in done
    )
    assert {one['update_proj_gap'] for one in done if one['method'] == 'galore'} == {'1'}
    text = (tmp_path / 'results/glue.md').read_text()
    assert '| cola | AdamW | 5e-5 | 62.0 (61.0 to 63.0) | 82.0 | cpu | 12 | 2.00 | 1.00 |' in text
    assert '| rte | LoQT r 32 | 1e-4 (lowest) | 62.0 (61.0 to 63.0) | 82.0 |' in text
    assert '| GaLore r 4 | 62.00 | +0.00 | -0.39 |' in text
    args.finished = True  # as if LoRA and the third seed were not
    glue.main(args)
    text = (tmp_path / 'results/glue.md').read_text()
    assert 'LoRA' not in text and '| cola | AdamW | 5e-5 | 61.5 (61.0 to 62.0) |' in text
    assert not list(tmp_path.glob('out/glue/*/last'))


def test_the_spread_is_of_the_seeds():
    assert glue.spread([50.0, 58.0, 51.0]) == '51.0 (50.0 to 58.0)'
    assert glue.best_rate({'1': {'scores': [9, 1]}, '2': {'scores': [1, 2]}, '3': {'scores': [0, 2]}}) == '2'
    assert pytest.approx(-0.39) == glue.PUBLISHED['GaLore r 4']
