"""memory/fit.py: what fits a card, the flags that make it so, and the advice where memory ran out."""

from types import SimpleNamespace

import pytest
from conftest import ROOT

import configurator
import memest
import train
from memory import fit
from memory.fit import MARGIN
from model import SIZES, ModelConfig


def load(*argv):
    return configurator.load(ROOT / 'train.py', list(argv))


def test_what_fits_a_card_fits_it_runs_and_twice_the_windows_do_not_fit():
    config = load(str(ROOT / 'config/galore_7b_4090.py'), '--dry_run')
    shape = ModelConfig(**SIZES['7b'], block_size=256)
    rows = memest.fit(config, 24 * 2**30, shape, train.problems)
    assert {'GaLore, 8-bit, offloaded', 'LoQT, 8-bit, per layer', 'QLoRA'} <= {row.name for row in rows}
    assert 'AdamW' not in {row.name for row in rows}, 'a 7B with its states takes 80 GB'
    assert [row.seconds for row in rows] == sorted(row.seconds for row in rows)
    for row in rows:
        batch, plan, flags = row.batch, row.plan, row.flags
        assert plan.card * (1 + MARGIN) <= 24 * 2**30
        typed = load(str(ROOT / 'config/galore_7b_4090.py'), '--dry_run', *flags.split())
        assert typed.batch_size == batch and memest.estimate(typed).total == plan.total, 'the flags say it all'
        assert not train.problems(typed) and typed.batch_size * typed.gradient_accumulation_steps == 512
        typed.batch_size, typed.gradient_accumulation_steps = 2 * batch, 256 // batch
        assert memest.estimate(typed).card * (1 + MARGIN) > 24 * 2**30 or batch == 512
        typed.batch_size, typed.gradient_accumulation_steps, typed.block_size = 1, 512, row.context
        assert memest.estimate(typed).card * (1 + MARGIN) <= 24 * 2**30
        typed.block_size += fit.STEP
        assert memest.estimate(typed).card * (1 + MARGIN) > 24 * 2**30


@pytest.mark.parametrize(
    'argv',
    [
        'config/galore_7b_4090.py --basis_bits=8 --rank=512',  # a typed option stays where the method has it
        'config/loqt_7b_4090.py --double_quant=False',
        'config/loqt_7b_4090.py --method=lora --scale=3 --targets=q_proj,v_proj',
        'config/galore_7b_4090.py --method=qgalore',
        'config/galore_7b.py --method=apollo',
        '--model=1b --method=adamw --dtype=bfloat16',
    ],
)
def test_the_flags_of_a_row_make_it_when_typed_after_the_same_command_line(argv):
    config = load(*(str(ROOT / word) if word.endswith('.py') else word for word in argv.split()))
    size = config.model
    shape = ModelConfig(**SIZES[size], block_size=config.block_size)
    rows = memest.fit(config, 80 * 2**30, shape, train.problems)
    assert len(rows) > 12
    methods = set()
    for row in rows:
        flags, _, foreign = row.flags.partition(' (and leave out ')
        left_out = foreign.removesuffix(')').split(', ') if foreign else []
        words = [word for word in argv.split() if word.partition('=')[0] not in left_out]
        typed = load(*(str(ROOT / word) if word.endswith('.py') else word for word in words), *flags.split())
        assert (typed.checkpointing, typed.batch_size) == (row.checkpointing, row.batch)
        assert memest.estimate(typed, shape).total == row.plan.total, (row.name, flags)
        methods.add(typed.method)
    assert methods >= {'galore', 'qgalore', 'apollo', 'loqt', 'lora'}


def test_out_of_memory_advice_names_what_each_flag_saves():
    argv = [str(ROOT / 'config/galore_60m.py'), '--method=adamw']
    config = load(*argv)
    words = fit.explain_out_of_memory(config, MemoryError('no'))
    assert words.startswith('out of memory (no); try ') and words.count('saves about') == 3
    now = memest.estimate(config).total
    for advice in words.split('try ')[1].split('; ' + '--'):
        flags, says = advice.split(' (saves about ')[0].split(), advice.split('saves about ')[1].split(' GB')[0]
        flags = [flag if flag.startswith('--') else f'--{flag}' for flag in flags]
        then = memest.estimate(load(*argv, *flags)).total
        assert abs((now - then) / 1e9 - float(says)) < 0.006, advice


def test_advice_for_a_method_without_a_formula_still_names_flags():
    config = SimpleNamespace(**vars(load('--method=adamw')) | {'method': 'nobody'})
    words = fit.explain_out_of_memory(config, MemoryError('no'))
    assert '--checkpointing=True' in words and "method='nobody' has no formula" in words


def test_a_way_without_a_formula_is_skipped(monkeypatch):
    monkeypatch.setattr(fit, 'WAYS', {'Other': dict(method='fira'), 'AdamW': dict(method='adamw')})
    monkeypatch.delitem(fit.estimate.__globals__['METHODS'], 'fira')
    config, shape = load('--model=60m'), ModelConfig(**SIZES['60m'])
    assert {row.name for row in memest.fit(config, 24 * 2**30, shape, train.problems)} == {'AdamW'}


def test_several_cards_give_each_method_its_fastest_way_and_what_fits_one_of_them():
    config = load(str(ROOT / 'config/galore_7b_4090.py'), '--dry_run')
    shape = ModelConfig(**SIZES['7b'], block_size=256)
    rows = fit.fit_several(config, 24 * 2**30, 4, shape, train.problems)
    ways = {row.name: row.way for row in rows}
    assert ways['LoQT, 8-bit, per layer'] == 'ddp', 'packed weights cannot be cut'
    assert ways['AdamW'] in ('zero3', 'tp'), 'its states fit four cards together'
    for row in rows:
        assert row.bytes * (1 + MARGIN) <= 24 * 2**30 and 512 % row.batch == 0
        typed = load(str(ROOT / 'config/galore_7b_4090.py'), *row.flags.split(), '--dry_run')
        assert typed.batch_size == row.batch and not train.problems(typed)
