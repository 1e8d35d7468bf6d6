"""The house: who imports whom, how many files stand at the top, how long files and functions are."""

import ast
import graphlib

import pytest
from conftest import ROOT, run

# Rows from the ground up: a file imports from lower rows only, and from its own folder.
ROWS = [
    ['attention', 'head'],
    ['adam', 'model', 'configurator', 'data'],
    ['quant', 'coreset'],
    ['galore', 'lora'],
    ['loqt'],
    ['methods'],
    ['memory', 'plumbing'],
    ['sample'],
    ['train', 'eval'],
    ['memest'],
    ['bench'],
]
ROW = {name: i for i, row in enumerate(ROWS) for name in row}
# What stands against the order, and why.
EXCEPT = {
    ('model', 'plumbing'): 'from_pretrained and save_pretrained are two lines that call plumbing/hf.py',
}
FILES = [p for p in sorted(ROOT.rglob('*.py')) if not {'tests', 'config', 'out'} & set(p.relative_to(ROOT).parts)]
FILES = [p for p in FILES if not any(part.startswith('.') for part in p.relative_to(ROOT).parts)]
LONG = 420  # about 400 lines
LONG_FILES = {  # path: why it is longer
    'train.py': 'the keys, what they may be, evaluation, a step and the loop, read in this order',
    'adam.py': 'the one class that every method inherits, in one piece',
    'galore.py': 'the method in a loop of ours and of others: backward, projected gradient, and what stands for it',
    'loqt.py': 'the layer, its merge, and the optimizer that tells it when, read in this order',
    'coreset.py': 'choice, features and history of one published system, read from top to bottom',
    'model.py': 'the modules of all families and what a run asks of them, read from top to bottom',
    'configurator.py': 'scripts import it before anything else, so it has nothing below it to lean on',
}
LONG_FUNCTIONS = {  # name: why it is longer than 60 lines
    'train.py main': 'the loop, in two screens: a step is read from top to bottom',
}


def module(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


MODULES = {module(path) for path in FILES}


def imports(path):
    """The modules of ours that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f'{node.module}.{alias.name}' for alias in node.names]
            names = [name if name in MODULES else node.module for name in names]
        else:
            continue
        yield from (name for name in names if name in MODULES)


def room(name):
    return name.split('.')[0]


def test_no_import_runs_back_up_and_no_two_rooms_of_a_row_import_each_other():
    wrong = []
    for path in FILES:
        here = room(module(path))
        for name in imports(path):
            there = room(name)
            if here == there or (here, there) in EXCEPT:
                continue
            if ROW[there] >= ROW[here]:
                wrong.append(f'{path.relative_to(ROOT)} imports {name}')
    assert not wrong, '\n'.join(wrong)


def test_there_is_no_circle_of_files():
    graph = {}
    for path in FILES:
        here = module(path)
        graph[here] = {name for name in imports(path) if name != here and (room(here), room(name)) not in EXCEPT}
        graph[here] = {name for name in graph[here] if not here.startswith(name + '.')}  # its own package
    graphlib.TopologicalSorter(graph).prepare()  # CycleError says which


def test_every_file_has_a_row_and_at_most_fourteen_stand_at_the_top():
    assert {room(module(path)) for path in FILES} <= set(ROW)
    top = [path.name for path in ROOT.glob('*.py')]
    assert len(top) <= 14, top  # the design has twelve; model.py grew until it asked to be three


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_longer_file_or_function_has_its_reason(path):
    where, text = str(path.relative_to(ROOT)), path.read_text(encoding='utf-8')
    lines = len(text.splitlines())
    assert lines <= LONG or where in LONG_FILES, f'{where} has {lines} lines'
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60 or f'{where} {node.name}' in LONG_FUNCTIONS, f'{where} {node.name} has {lines} lines'


def test_the_reasons_are_of_what_is_there():
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding='utf-8').splitlines()) for path in FILES}
    assert all(sizes.get(where, 0) > LONG for where in LONG_FILES)


HEAVY = ('torch', 'numpy', 'tqdm', 'safetensors', 'transformers', 'bitsandbytes', 'datasets')


@pytest.mark.parametrize('words', ['--help', '--rnk=8', '--method=adamw --rank=8', '--method=galor', 'no/file.py'])
@pytest.mark.parametrize('script', ['train.py', 'memest.py', 'sample.py', 'eval.py'])
def test_help_and_mistyped_words_are_answered_before_the_heavy_imports(script, words):
    code = f"""
import runpy, sys
sys.argv = [{script!r}, *{words.split()!r}]
try:
    runpy.run_path({script!r}, run_name='__main__')
except SystemExit as end:
    print('exit', end.code)
print('imported:', *[name for name in {HEAVY!r} if name in sys.modules])
"""
    done = run(['-c', code])
    *_, end, imported = done.stdout.splitlines()
    assert imported == 'imported:', done.stdout
    assert end == ('exit 0' if words == '--help' else 'exit 2'), done.stdout + done.stderr
    assert ('error: ' in done.stderr) == (words != '--help')
