"""The configurator on scripts made here: what it reads, what it refuses, and that it says all of it at once."""

import ast
import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

import configurator
from configurator import (
    ConfigError,
    as_text,
    at_least,
    between,
    check_or_exit,
    help_text,
    keys,
    load,
    load_or_exit,
    options,
    switch,
    undocumented,
)

SCRIPT = '''"""Train a model.

    $ python toy.py config/small.py       about 3 minutes
"""
# not a heading: outside of the block
# ---- config -------------------------------------------------------------
# data
dataset = 'pystdlib'  # name of a folder in data/, or a path to one; '#' is fine in it
block_size = 256  # tokens in one training window

# method
# and what it needs
method = 'galore'  # 'adamw' | 'galore' | 'loqt': how the weights are trained.
#                    GaLore is the default, since it fits
#                    everywhere
state_bits = 32  # 32 | 8: of Adam's moments
learning_rate = 1e-3  # peak learning rate
floor = -1.5  # a negative default
compile = True  # torch.compile
per_layer = False  # update in backward
# text
prompt = ''  # what to begin with, see https://example.org/a-long-address-stays-in-one-piece
checkpoint = 'out/last'  # folder to read
device = 'cpu'  # 'cpu' | 'cuda' | anything that torch knows
naked = 1
# ---- end of config -------------------------------------------------------
after = 'not a key'  # outside of the block
raise RuntimeError('the script was executed')
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('toy.py').write_text(SCRIPT, encoding='utf-8')
    Path('config').mkdir()
    return tmp_path


def config_file(text, name='config/small.py'):
    Path(name).write_text(text, encoding='utf-8')
    return name


def script(block, name='other.py'):
    Path(name).write_text(f'# ---- config ----\n{block}\n# ---- end of config ----\n', encoding='utf-8')
    return name


def ok(*argv, **kwargs):
    return load('toy.py', argv, **kwargs)


def public(config):
    return {name: value for name, value in vars(config).items() if not name.startswith('_')}


def refused(*argv, script='toy.py', **kwargs):
    with pytest.raises(ConfigError) as e:
        load(script, argv, **kwargs)
    assert all(isinstance(error, str) for error in e.value.errors)
    return e.value.errors


def only_error(*argv, **kwargs):
    (error,) = refused(*argv, **kwargs)
    return error


pytestmark = pytest.mark.usefixtures('folder')


# ---- the block -----------------------------------------------------------


def test_block_is_read_without_running_the_script():
    found = keys('toy.py')
    assert list(found)[:3] == ['dataset', 'block_size', 'method'] and 'after' not in found
    assert found['dataset'].default == 'pystdlib'
    assert found['dataset'].help == "name of a folder in data/, or a path to one; '#' is fine in it"
    assert found['floor'].default == -1.5
    assert found['compile'].default is True


def test_sections_come_from_lone_comments():
    found = keys('toy.py')
    assert found['dataset'].section == found['block_size'].section == 'data'
    assert found['method'].section == found['per_layer'].section == 'method and what it needs'
    assert found['prompt'].section == 'text'


def test_indented_comment_continues_the_help_of_the_key_above():
    assert keys('toy.py')['method'].help.endswith('are trained. GaLore is the default, since it fits everywhere')


def test_indented_comment_not_touching_a_key_is_a_heading():
    found = keys(script('a = 1  # one\n\n#          far away\nb = 2  # two'))
    assert (found['a'].help, found['b'].section) == ('one', 'far away')


@pytest.mark.parametrize(
    'line, choices',
    [
        ("k = 'a'  # 'a' | 'b'", ('a', 'b')),
        ("k = 'a'  # 'a' | 'b': which", ('a', 'b')),
        ("k = ''  # '' | 'csv'. Where to", ('', 'csv')),
        ("k = 'c'  # 'a' | 'b' |\n#            'c': over two lines", ('a', 'b', 'c')),
        ('k = 8  # 8 | 32 bits', (8, 32)),
        ("k = 'a'  # 'a' | 'b' | ...", ()),
        ("k = 'a'  # 'a' | 'b' or a path", ()),
        ("k = 'a'  # 'a', or a path", ()),
        ("k = 'a'  # 'a' is the default", ()),
        ("k = 1.5  # 'a' | 'b' are other keys' values", ()),
        ("k = 'x'  # mentions 'a' | 'b' later", ()),
    ],
)
def test_choices_are_the_closed_list_that_begins_the_help(line, choices):
    assert keys(script(line))['k'].choices == choices


def test_string_over_several_lines_keeps_its_comment():
    found = keys(script("k = (\n    'a'\n    'b'\n)  # joined\nm = 'x # y'  # z"))
    assert (found['k'].default, found['k'].help) == ('ab', 'joined')
    assert (found['m'].default, found['m'].help) == ('x # y', 'z')


@pytest.mark.parametrize(
    'block',
    [
        'k = 2 * 3',
        'k = None',
        'k = [1]',
        'a = b = 1',
        'a, b = 1, 2',
        'k: int = 1',
        'import os',
        '_k = 1',
        'print(1)',
        'k = 1\nk = 2',
        "k = 'c'  # 'a' | 'b'",
    ],
)
def test_block_written_wrongly_is_a_bug_of_the_script_with_its_line(block):
    with pytest.raises(ValueError, match=r'other\.py line \d'):
        keys(script(block))


def test_script_without_a_block_says_so():
    Path('empty.py').write_text('"""\n# ---- config\n# ---- end of config\n"""\n')
    with pytest.raises(ValueError, match='no block'):
        keys('empty.py')


def test_undocumented_names_the_keys_without_a_comment():
    assert undocumented('toy.py') == ['naked']


# ---- flags ---------------------------------------------------------------


def test_without_arguments_every_key_has_its_default():
    config = ok()
    assert public(config) == {n: k.default for n, k in keys('toy.py').items()}
    assert config._given == {}


def test_both_spellings_of_a_flag_and_dashes_in_its_name():
    assert ok('--block_size=8').block_size == ok('--block_size', '8').block_size == 8
    assert ok('--block-size=8').block_size == ok('--block-size', '8').block_size == 8


def test_values_keep_their_dashes():
    assert ok('--dataset=my-data').dataset == ok('--dataset', 'my-data').dataset == 'my-data'


def test_negative_numbers_in_both_spellings():
    assert ok('--learning_rate', '-1e-3').learning_rate == ok('--learning_rate=-1e-3').learning_rate == -1e-3
    assert ok('--block_size', '-1').block_size == -1


def test_text_is_taken_verbatim():
    assert ok('--prompt=a=b=c').prompt == ok('--prompt', 'a=b=c').prompt == 'a=b=c'
    assert ok('--prompt=').prompt == ok('--prompt', '').prompt == ''
    assert ok('--prompt=12').prompt == '12'
    assert ok("--prompt='q'").prompt == "'q'"
    assert ok('--prompt=Größe 漢字 🙂\nnext').prompt == 'Größe 漢字 🙂\nnext'
    assert ok('--prompt=--rank').prompt == '--rank'
    assert ok('--prompt', 'data.py').prompt == 'data.py'


@pytest.mark.parametrize(
    'text, value', [('8', 8), ('1e4', 10_000), ('1_000', 1000), ('8.0', 8), ('0x10', 16), ('+3', 3)]
)
def test_int_key_takes_whole_numbers_however_written(text, value):
    got = ok(f'--block_size={text}').block_size
    assert (got, type(got)) == (value, int)


@pytest.mark.parametrize(
    'text',
    [
        '1.5',
        'abc',
        '',
        'True',
        "'8'",
        '1e999',
        '-1e999',
        'nan',
        '2*4',
        '1j',
        '[1]',
        '010',
        '1e-3',
        '9' * 5000,
        '(' * 500,
    ],
)
def test_int_key_refuses_everything_else(text):
    error = only_error(f'--block_size={text}')
    assert error.startswith('command line: block_size expects a whole number, got ') and len(error) < 200


@pytest.mark.parametrize('text, value', [('1e-4', 1e-4), ('3', 3.0), ('.5', 0.5), ('1_0', 10.0)])
def test_float_key_takes_ints_and_is_always_a_float(text, value):
    got = ok(f'--learning_rate={text}').learning_rate
    assert (got, type(got)) == (value, float)


@pytest.mark.parametrize('text', ['nan', 'inf', '-inf', '1e999', '1' + '0' * 400, 'True', 'None', '1,5', 'x', ''])
def test_float_key_refuses_what_is_not_a_finite_number(text):
    assert 'learning_rate expects a finite number' in only_error(f'--learning_rate={text}')


@pytest.mark.parametrize('text', ['True', 'true', '1', 'yes', 'YES', 'False', 'false', '0', 'no'])
def test_bool_words_in_both_spellings(text):
    value = text.lower() in ('true', '1', 'yes')
    assert ok(f'--compile={text}').compile is value
    assert ok('--compile', text).compile is value


@pytest.mark.parametrize('text', ['2', '', 'maybe', 'None', '1.0'])
def test_bool_key_refuses_other_words(text):
    assert 'compile expects True or False' in only_error(f'--compile={text}')


def test_bool_flag_alone_is_true_and_leaves_the_next_word_alone():
    assert ok('--per_layer').per_layer is True
    config = ok('--per_layer', '--block_size=8', '--per_layer', config_file('floor = 2'))
    assert (config.per_layer, config.block_size, config.floor) == (True, 8, 2.0)
    assert ok('--per_layer', 'out/best', positional='checkpoint').checkpoint == 'out/best'


def test_last_flag_wins():
    assert ok('--block_size=8', '--block_size', '16').block_size == 16


@pytest.mark.parametrize('argv', [['--block_size'], ['--block_size', '--compile'], ['--prompt'], ['--method']])
def test_missing_value_is_an_error(argv):
    error = only_error(*argv)
    assert f'{argv[0]} needs a value' in error


def test_unknown_flag_suggests_and_its_value_is_no_second_error():
    assert only_error('--blocksize', '8') == 'command line: unknown key --blocksize, did you mean --block_size?'
    assert only_error('--Block-Size=8').endswith('did you mean --block_size?')
    assert only_error('--zzz') == 'command line: unknown key --zzz'
    assert only_error('--_given=1').startswith('command line: unknown key --_given')
    assert only_error('--no_compile').endswith('did you mean --compile=False?')
    assert only_error('--') and only_error('--=3')


def test_unknown_flag_does_not_swallow_the_config_file_after_it():
    errors = refused('--typo', config_file('bad = 1'))
    assert len(errors) == 2


def test_wrong_choice_names_the_choices_and_the_closest():
    expected = "command line: method expects 'adamw' | 'galore' | 'loqt', got 'GaLor', did you mean galore?"
    assert only_error('--method=GaLor') == expected
    assert only_error('--state_bits=16') == "command line: state_bits expects 32 | 8, got '16'"
    assert ok('--state_bits=8').state_bits == 8 and ok('--device=cuda:1').device == 'cuda:1'


# ---- bare words ----------------------------------------------------------


def test_bare_word_sets_the_positional_key():
    config = ok('out/mine', '--block_size=8', positional='checkpoint')
    assert (config.checkpoint, config._given['checkpoint']) == ('out/mine', 'command line')
    assert ok('out/mine', config_file('floor = 2'), positional='checkpoint').floor == 2
    words = ('out/a', '--block_size=8', 'out/b')
    assert ok(*words, positional='checkpoint', several=True).checkpoint == 'out/a,out/b'


def test_bare_word_that_means_nothing_says_what_is_expected():
    assert 'expected a config file (NAME.py) or --key=value' in only_error('out/mine')
    assert only_error('block_size=8').endswith('did you mean --block_size=8?')
    assert only_error('-block_size=8').endswith('did you mean --block_size=8?')
    assert only_error('block_size=8', positional='checkpoint').endswith('did you mean --block_size=8?')
    config_file('floor = 2')
    assert only_error('config/small').endswith('did you mean config/small.py?')
    assert '-x' in only_error('-x', positional='checkpoint') and only_error('')


def test_second_bare_word_is_an_error_since_quotes_were_forgotten():
    assert "'time'" in only_error('--prompt', 'once', 'upon', 'time', positional='checkpoint')


# ---- config files --------------------------------------------------------


def test_flags_win_over_files_and_later_files_over_earlier_wherever_they_stand():
    a, b = config_file('block_size = 1\nfloor = 1\nstate_bits = 8', 'a.py'), config_file('\nfloor = 2', 'b.py')
    config = ok('--block_size=9', a, b)
    assert (config.block_size, config.floor, config.state_bits) == (9, 2.0, 8)
    assert config._given == {'block_size': 'command line', 'floor': 'b.py line 2', 'state_bits': 'a.py line 3'}


def test_file_may_compute_and_keep_private_helpers():
    path = config_file(
        'import math as _math\n_rows = [4 * n for n in (1, 2)]\ndef _f(n):\n    return n * _rows[1]\n'
        'block_size = _f(8)\nlearning_rate = _math.sqrt(block_size)\nif block_size > 1:\n    dataset = __file__\n'
    )
    config = ok(path)
    assert (config.block_size, config.learning_rate, config.dataset) == (64, 8.0, path)
    assert config._given['dataset'] == 'config/small.py line 8'


def test_line_of_a_key_set_twice_is_the_last():
    config = ok(config_file('if True:\n    floor = 1\nfloor = 2\nblock_size = 1\nif True:\n    block_size = 2'))
    assert config._given == {'floor': 'config/small.py line 3', 'block_size': 'config/small.py line 6'}


def test_true_division_that_comes_out_whole_is_an_int():
    got = ok(config_file('block_size = 512 / 2')).block_size
    assert (got, type(got)) == (256, int)


def test_file_cannot_see_or_change_the_scripts_globals(monkeypatch):
    module_globals = globals()
    before = dict(module_globals), dict(vars(configurator))
    for name in ('SCRIPT', 'known', 'block_size', 'config_file'):
        assert 'NameError' in only_error(config_file(f'floor = {name}'))
    ok(config_file('_SCRIPT = 1\nfloor = 1.0\nglobal_names = 0\ndel global_names\n_keys = None'))
    refused(config_file('SCRIPT = keys = known = load = 1'))
    assert (dict(module_globals), dict(vars(configurator))) == before


def test_one_file_does_not_see_the_names_of_another():
    a, b = config_file('block_size = 4', 'a.py'), config_file('floor = block_size', 'b.py')
    assert 'b.py line 1: NameError' in only_error(a, b)


def test_name_of_a_key_that_the_file_did_not_set_is_explained():
    error = only_error(config_file('\nfloor = 512 // block_size'))
    assert error.startswith("config/small.py line 2: NameError: name 'block_size' is not defined")
    assert error.endswith('set block_size in it too)')


WRONG_IN_A_FILE = """
block_size = True; block_size = '8'; block_size = 1.5; block_size = None; block_size = (8,); block_size = 1e999
compile = 1; compile = 'True'; compile = 0.0; compile = None
prompt = 3; prompt = b'x'; prompt = None; method = 'sgd'; method = True; state_bits = 16
learning_rate = '1e-3'; learning_rate = False; learning_rate = float('nan'); learning_rate = -float('inf')
learning_rate = 10 ** 400
"""


@pytest.mark.parametrize('line', WRONG_IN_A_FILE.strip().replace('\n', '; ').split('; '))
def test_wrong_type_in_a_file_is_refused_with_its_line(line):
    name = line.split()[0]
    assert only_error(config_file(f'\n{line}')).startswith(f'config/small.py line 2: {name} expects ')


def test_unknown_names_in_a_file_are_errors_with_their_lines():
    path = config_file(
        'import os\nfrom math import pi as tau\nblok_size = 3\ndef f(): pass\nclass C: pass\nimport a.b\n'
    )
    Path('a').mkdir()
    Path('a/b.py').touch()
    sys.path.insert(0, os.getcwd())
    try:
        errors = refused(path)
    finally:
        sys.path.pop(0)
        for name in ('a', 'a.b'):
            sys.modules.pop(name, None)
    assert errors[0] == 'config/small.py line 1: unknown key os (a helper name begins with _)'
    assert errors[2] == 'config/small.py line 3: unknown key blok_size, did you mean block_size?'
    lines = [(error.split(':')[0].split()[-1], error.split('unknown key ')[1].split()[0]) for error in errors]
    assert lines == [('1', 'os'), ('2', 'tau'), ('3', 'blok_size,'), ('4', 'f'), ('5', 'C'), ('6', 'a')]


def test_unknown_name_of_a_loop_variable_is_caught_too():
    assert only_error(config_file('for i in range(3):\n    block_size = i')).startswith(
        'config/small.py line 1: unknown key i'
    )


@pytest.mark.parametrize(
    'text, where',
    [
        ('floor = (', 'config/small.py line 1: SyntaxError: '),
        ('a = 1\n  b = 2', 'config/small.py line 2: IndentationError: '),
        ('\n\nfloor = 1 / 0', 'config/small.py line 3: ZeroDivisionError: division by zero'),
        ('def _f():\n    raise ValueError("two\\nlines")\n_f()', 'config/small.py line 2: ValueError: two'),
        ('_x = 1\nraise SystemExit(7)', 'config/small.py line 2: SystemExit: 7'),
        ("open('nowhere.txt')", 'config/small.py line 1: FileNotFoundError: '),
        ("import json as _j\n_j.loads('{')", 'config/small.py line 2: JSONDecodeError: '),
        ("_x = eval('1 +')", 'config/small.py line 1: SyntaxError: '),
        ('_f = lambda: _f()\n_f()', 'config/small.py line 1: RecursionError: '),
        ('floor = 1\0', 'config/small.py'),
    ],
)
def test_file_that_fails_is_one_sentence_with_its_line(text, where):
    assert only_error(config_file(text)).startswith(where)


def test_names_set_before_a_failing_line_are_checked_too():
    errors = refused(config_file('blok_size = 1\nfloor = "x"\n1 / 0'))
    assert [e.split(': ')[0][-1] for e in errors] == ['1', '2', '3']


def test_file_that_is_not_there_suggests_its_neighbour():
    config_file('', 'config/galore_laptop.py')
    assert only_error('config/galor_laptop.py') == (
        'config/galor_laptop.py: no such config file, did you mean config/galore_laptop.py?'
    )
    assert only_error('galore_laptop.py').endswith('did you mean config/galore_laptop.py?')
    assert only_error('nowhere/qqqq.py') == 'nowhere/qqqq.py: no such config file'


def test_directory_and_bytes_are_one_sentence_each():
    Path('folder.py').mkdir()
    Path('latin.py').write_bytes(b"prompt = '\xff'")
    assert only_error('folder.py').startswith('folder.py: cannot be read: ')
    assert only_error('latin.py').startswith("latin.py: cannot be read: 'utf-8' codec")
    assert only_error('a\0b.py').startswith('a\0b.py: cannot be read: embedded null')


def test_unreadable_file_is_one_sentence(monkeypatch):
    read_text = Path.read_text  # chmod would not do: root, in a container, reads everything

    def denied(path, **kwargs):
        if path.name == 'small.py':
            raise PermissionError(13, 'Permission denied')
        return read_text(path, **kwargs)

    monkeypatch.setattr(Path, 'read_text', denied)
    assert only_error('config/small.py') == 'config/small.py: cannot be read: Permission denied'


def test_script_given_as_a_config_is_not_executed():
    assert only_error('toy.py') == 'toy.py: this is a script, not a config file'


def test_file_saved_by_notepad_is_read():
    Path('bom.py').write_bytes(b'\xef\xbb\xbfprompt = "h\xc3\xa9"\r\nfloor = 2\r\n')
    config = ok('bom.py')
    assert (config.prompt, config._given['floor']) == ('hé', 'bom.py line 2')


# ---- all errors at once --------------------------------------------------


def test_every_error_is_in_one_report():
    path = config_file('blok_size = 8\nlearning_rate = "fast"\nfloor = 1')
    errors = refused(path, 'config/smal.py', '--mehtod=loqt', '--method=galor', '--block_size=1.5', 'word', '--floor')
    text = '\n'.join(errors)
    assert len(errors) == 8
    for part in (
        'config/small.py line 1: unknown key blok_size, did you mean block_size?',
        "config/small.py line 2: learning_rate expects a finite number, got 'fast'",
        'config/smal.py: no such config file, did you mean config/small.py?',
        'command line: unknown key --mehtod, did you mean --method?',
        "got 'galor', did you mean galore?",
        "command line: block_size expects a whole number, got '1.5'",
        "got 'word'",
        '--floor needs a value',
    ):
        assert part in text


def problems(config):
    return ['per_layer needs method galore'] * (config.per_layer and config.method != 'galore')


def test_impossible_combinations_are_added_to_the_report():
    assert refused('--per_layer', '--method=adamw', problems=problems) == ['per_layer needs method galore']
    assert len(refused('--per_layer', '--method=adamw', '--typo', problems=problems)) == 2
    assert ok('--per_layer', problems=problems).per_layer


def test_combinations_are_not_judged_on_values_that_could_not_be_read():
    def never(config):
        raise AssertionError

    refused('--block_size=x', problems=never)
    refused('config/none.py', problems=never)


# ---- what the user sees --------------------------------------------------


def test_load_or_exit_prints_a_line_an_error_and_exits_with_2(capsys):
    config_file('raise ValueError("two\\nlines")')
    with pytest.raises(SystemExit) as e:
        load_or_exit('toy.py', ['--typo', '--block_size=x\ny', 'config/small.py'])
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert (e.value.code, out, len(lines)) == (2, '', 4)
    assert all(line.startswith('error: ') for line in lines[:3])
    assert lines[3] == 'python toy.py --help lists every key'


def test_load_or_exit_returns_the_config():
    assert load_or_exit('toy.py', ['out'], problems=problems, positional='checkpoint').checkpoint == 'out'


@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help_is_printed_even_among_errors(flag, capsys):
    with pytest.raises(SystemExit) as e:
        load_or_exit('toy.py', ['--typo', flag])
    out, err = capsys.readouterr()
    assert (e.value.code, err) == (0, '') and 'usage: python toy.py [config/NAME.py ...] [--key=value ...]' in out


@pytest.mark.parametrize('columns', [20, 62, 80, 200])
def test_help_holds_every_key_with_its_comment_in_any_terminal(columns, monkeypatch):
    monkeypatch.setenv('COLUMNS', str(columns))
    text = help_text('toy.py')
    flat = ' '.join(text.split())
    for key in keys('toy.py').values():
        assert f' --{key.name}=' in flat and key.help in flat and key.section in flat
    assert max(map(len, text.splitlines())) <= max(columns, 85)
    assert text.startswith('Train a model.\n\n    $ python toy.py config/small.py       about 3 minutes\n')


def test_help_shows_defaults_as_a_shell_takes_them():
    text = help_text('toy.py', positional='checkpoint')
    assert '--dataset=pystdlib ' in text and "--prompt='' " in text and '--floor=-1.5 ' in text
    assert 'usage: python toy.py [CHECKPOINT] [config/NAME.py ...]' in text
    assert help_text(script('k = 1  # one')).startswith('usage: python other.py')


def test_as_text_says_what_differs_and_who_set_it():
    config = ok('--floor=2', '--prompt=it\'s "x"', '--compile=True', config_file('\nblock_size = 8\ncompile = False'))
    text = as_text(config, 'toy.py')
    assert text.splitlines() == [
        'block_size = 8  # from config/small.py line 2',
        'floor = 2.0  # from command line',
        'prompt = \'it\\\'s "x"\'  # from command line',
    ]
    assert as_text(ok(), 'toy.py') == ''


def test_as_text_is_itself_a_config_file():
    config = ok('--floor=-2e-7', '--prompt=# é\n🙂', '--compile=no', '--method=loqt')
    again = ok(config_file(as_text(config, 'toy.py'), 'again.py'))
    assert public(again) == public(config)


def test_as_text_of_a_value_the_script_changed_or_a_config_of_an_older_version():
    assert as_text(SimpleNamespace(block_size=8), 'toy.py') == 'block_size = 8  # from toy.py'


def test_from_a_shell_a_script_needs_one_line(folder):
    source = SCRIPT.split('after =')[0] + (
        'import sys\nfrom configurator import load_or_exit\n'
        "config = load_or_exit(__file__, sys.argv[1:])\nprint(config.method, config.block_size)\n"
    )
    Path('real.py').write_text(source, encoding='utf-8')
    env = {**os.environ, 'PYTHONPATH': str(Path(configurator.__file__).parent)}

    def run(*argv):
        return subprocess.run([sys.executable, 'real.py', *argv], env=env, capture_output=True, text=True)

    assert run('--method=loqt', '--block_size=1e3').stdout == 'loqt 1000\n'
    bad = run('--method=x')
    assert (bad.returncode, bad.stdout) == (2, '') and bad.stderr.endswith('\npython real.py --help lists every key\n')
    assert run('--help').returncode == 0


# ---- options: what a method's file adds ----------------------------------

FILES = {
    'run.py': '''
        # ---- config ----
        # run
        out_dir = 'out'  # folder for checkpoints
        steps = 10  # optimizer steps
        # method
        method = 'galore'  # 'adamw' | 'galore' | 'loqt' | 'lora' | 'qgalore' | 'fira': one file each
        coreset = 'none'  # 'none' | 'random' | 'zo' | 'grad': choose each step's windows out of more
        # ---- end of config ----
    ''',
    'adam.py': 'beta = 0.9',
    'galore.py': '''
        import torch


        class Options:
            """What --method=galore adds.

            rank = 3  # not a key
            """

            # subspace
            rank = 128  # dimensions of the subspace
            gap = 200  # steps between two
            #            refreshes
            refresh = 'qr'  # 'qr' | 'svd': how,
                #             and at what cost
            stagger = True  # layers refresh in turns

            # states
            bits = 16  # 16 | 8 | 4: of the bases


        # ---- not an option ----
        FIXED = ('rank', 'bits')
    ''',
    'loqt.py': '''
        class Options:
            rank = 64  # dimensions of B
            psi = 1.2  # growth of tau
            nf4 = True  # 4 bits
    ''',
    'lora.py': '''
        class Options:
            rank = 16  # dimensions of the change
            nf4 = True  # 4 bits, too
    ''',
    'methods/qgalore.py': '''
        import galore


        class Options(galore.Options):
            """Q-GaLore."""

            bits = 4
            lazy = 0.4  # overlap that doubles T
    ''',
    'methods/fira.py': '''
        class Options(galore.Options):
            pass
    ''',
    'coreset.py': '''
        class Options:
            ratio = 4  # windows to choose from, times those kept
            small = True  # sources below average size are taken whole
    ''',
}


@pytest.fixture
def run(folder):
    """A script with a folder of methods beside it. None of its files could be run."""
    Path('methods').mkdir()
    for name, text in FILES.items():
        Path(name).write_text(textwrap.dedent(text).lstrip() + "\nraise RuntimeError('this file was run')\n")
    return lambda *argv, **kwargs: load('run.py', argv, **kwargs)


def wrong(*argv, **kwargs):
    (error,) = refused(*argv, script='run.py', **kwargs)
    return error


def test_options_are_read_from_the_class_as_keys_are_from_a_block(run):
    found = options('galore.py')
    assert list(found) == ['rank', 'gap', 'refresh', 'stagger', 'bits']
    assert found['rank'] == configurator.Key('rank', 128, 'dimensions of the subspace', (), 'subspace', 'galore')
    assert found['gap'].help == 'steps between two refreshes'
    assert (found['refresh'].help, found['refresh'].choices) == ("'qr' | 'svd': how, and at what cost", ('qr', 'svd'))
    assert (found['bits'].section, found['bits'].choices) == ('states', (16, 8, 4))
    assert all(key.owner == '' for key in keys('run.py').values())


def test_a_relative_inherits_options_and_their_owner(run):
    found, base = options('methods/qgalore.py'), options('galore.py')
    assert list(found) == [*base, 'lazy']
    assert found['rank'] == base['rank'] and options('methods/fira.py') == base
    assert (found['bits'].default, found['bits'].owner, found['lazy'].owner) == (4, 'galore', 'qgalore')
    assert (found['bits'].help, found['bits'].choices) == ('16 | 8 | 4: of the bases', (16, 8, 4))  # not said again


def test_a_relative_of_a_relative_keeps_the_first_owner(run):
    Path('methods/lazier.py').write_text(
        'class Options(qgalore.Options):\n    bits = 8  # 8 | 4: fewer\n    rank = 8\n'
    )
    found = options('methods/lazier.py')
    assert [found[name].owner for name in ('bits', 'rank', 'lazy')] == ['galore', 'galore', 'qgalore']
    assert (found['bits'].choices, found['rank'].help) == ((8, 4), 'dimensions of the subspace')


def test_a_file_without_options_has_none(run):
    assert options('adam.py') == options('nowhere.py') == {}
    Path('adam.py').write_text('"""\nclass Options:\n    rank = 1\n"""\n# class Options:\n')
    assert options('adam.py') == {}


def test_a_form_feed_or_a_decorator_does_not_shift_comments(run):
    Path('odd.py').write_text(
        'x = "\x0c \u2028"\nclass Options:\n    a = 1  # one\n@wraps(\n    f\n)\ndef g(): pass  # no\n'
    )
    assert options('odd.py')['a'].help == 'one'


@pytest.mark.parametrize(
    'text, where',
    [
        ('class Options:\n    rank = 2 * 3', 'line 2'),
        ('class Options:\n    rank: int = 3', 'line 2'),
        ('class Options:\n    def f(self): pass', 'line 2'),
        ("class Options:\n    k = 'c'  # 'a' | 'b'", 'line 2'),
        ('class Options(Base):\n    a = 1', 'line 1'),
        ('class Options(nowhere.Options):\n    a = 1', 'line 1'),
        ('class Options(galore.Options, lora.Options):\n    a = 1', 'line 1'),
        ('class Options(galore.Options):\n    gap = 2.0', 'gap = 2.0'),  # a whole number in galore.py
        ('class Options(galore.Options):\n    bits = 2', 'bits = 2'),  # 16 | 8 | 4 there
    ],
)
def test_options_written_wrongly_are_a_bug_of_the_file_with_its_line(run, text, where):
    Path('bad.py').write_text(text)
    with pytest.raises(ValueError, match=rf'bad\.py.* ?{where}'):
        options('bad.py')


@pytest.mark.parametrize(
    'name, text',
    [
        ('lora.py', 'class Options:\n    steps = 1  # a key of the script'),
        ('coreset.py', 'class Options:\n    rank = 1  # an option of galore'),
        ('lora.py', 'class Options:\n    stagger = 2  # a bool in galore: --stagger alone means something'),
    ],
)
def test_an_option_named_like_another_key_is_a_bug(run, name, text):
    Path(name).write_text(text)
    with pytest.raises(ValueError, match=rf'{name}: \S+ has another key \w+: rename the option'):
        run()


def test_config_holds_the_options_of_the_chosen_method_and_coreset_alone(run):
    trunk = {'out_dir': 'out', 'steps': 10}
    galore = {'rank': 128, 'gap': 200, 'refresh': 'qr', 'stagger': True, 'bits': 16}
    assert public(run()) == {**trunk, 'method': 'galore', 'coreset': 'none', **galore}
    assert public(run('--method=adamw')) == {**trunk, 'method': 'adamw', 'coreset': 'none'}
    assert public(run('--method=qgalore')) == {
        **trunk, 'method': 'qgalore', 'coreset': 'none', **galore, 'bits': 4, 'lazy': 0.4
    }  # fmt: skip
    assert public(run('--method=lora', '--coreset=zo')) == {
        **trunk, 'method': 'lora', 'coreset': 'zo', 'rank': 16, 'nf4': True, 'ratio': 4, 'small': True
    }  # fmt: skip


def test_the_order_of_flags_does_not_matter(run):
    flags = [
        '--rank=8',
        '--method=lora',
        '--nf4',
        'False',
        '--ratio=2',
        '--coreset=grad',
        config_file("method = 'loqt'"),
    ]
    first = run(*flags)
    assert (first.method, first.rank, first.nf4, first.ratio) == ('lora', 8, False, 2)
    assert first._given['rank'] == 'command line'
    # '--nf4 False' are two words of one flag
    words = [[flag] for flag in flags if flag not in ('--nf4', 'False')] + [['--nf4', 'False']]
    for order in itertools.permutations(words):
        assert vars(run(*itertools.chain(*order))) == vars(first)


def test_a_bool_option_may_stand_alone(run):
    Path('go.py').write_text("steps = 3")
    config = run('--stagger', 'False', '--small', 'go.py', '--coreset=grad')
    assert (config.stagger, config.small, config.steps) == (False, True, 3)
    assert run('--stagger', '--rank', '8').rank == 8 and run('--nf4', '--method=lora').nf4 is True


def test_values_of_options_are_checked_as_all_values_are(run):
    assert run('--rank=1e2').rank == 100
    assert wrong('--rank=1.5') == "command line: rank expects a whole number, got '1.5'"
    assert wrong('--refresh=svt').endswith("refresh expects 'qr' | 'svd', got 'svt', did you mean svd?")
    assert wrong('--rank') == 'command line: --rank needs a value: --rank=..., a whole number'
    assert wrong(config_file('\nbits = 3')) == 'config/small.py line 2: bits expects 16 | 8 | 4, got 3'
    # what the flags leave out must still be right
    assert wrong(config_file("method = 'galore'\ngap = 'x'"), '--method=lora').startswith(
        'config/small.py line 2: gap '
    )


WHOSE = {
    '--lazy=0.5': "lazy is qgalore's: leave it out with method='galore', or use --method=qgalore",
    '--method=adamw --gap=1': "gap is galore's: leave it out with method='adamw', or use --method=galore",
    '--gap 1 --method=adamw': "gap is galore's: leave it out with method='adamw', or use --method=galore",
    '--method=adamw --stagger': "stagger is galore's: leave it out with method='adamw', or use --method=galore",
    '--method=adamw --rank=1': "rank is galore's, loqt's and lora's: leave it out with method='adamw'",
    '--nf4=False': "nf4 is loqt's and lora's: leave it out with method='galore'",
    '--small': "small says something with coreset alone: leave it out with coreset='none', or use --coreset=grad",
}


@pytest.mark.parametrize('flags', WHOSE)
def test_an_option_of_another_method_says_whose_it_is(run, flags):
    assert wrong(*flags.split()) == f'command line: {WHOSE[flags]}'


def test_an_option_of_another_method_in_a_file_is_refused_with_its_line(run):
    path = config_file("\nlazy = 0.5\nmethod = 'fira'")
    assert wrong(path) == (
        "config/small.py line 2: lazy is qgalore's: leave it out with method='fira', or use --method=qgalore"
    )
    assert wrong(config_file("method = 'fira'\nlazy = 0.5"), '--method=qgalore').startswith(
        'config/small.py line 2: lazy'
    )
    assert wrong(config_file('ratio = 2')).startswith('config/small.py line 1: ratio says something with coreset alone')


def test_an_ancestor_that_is_no_method_is_not_offered_as_one(run):
    Path('base.py').write_text('class Options:\n    depth = 1  # shared\n')
    Path('lora.py').write_text('class Options(base.Options):\n    pass\n')
    assert wrong('--depth=2').endswith("depth is lora's: leave it out with method='galore', or use --method=lora")


def test_a_typo_is_compared_with_the_options_of_all_methods(run):
    assert wrong('--lasy=1') == 'command line: unknown key --lasy, did you mean --lazy?'
    assert wrong('--ratoi', '2').endswith('did you mean --ratio?')
    assert wrong(config_file('stager = True')).endswith('unknown key stager, did you mean stagger?')
    assert 'set rank in it too' in wrong(config_file('steps = rank'))


def test_a_wrong_method_is_one_error_and_not_one_an_option(run):
    assert wrong('--method=galor', '--rank=8', '--lazy=1').endswith('did you mean galore?')
    assert wrong(config_file("method = 'x'\nlazy = 1"), '--method=galore').startswith('config/small.py line 1: method ')


def test_all_kinds_of_errors_are_in_one_report(run):
    errors = refused('--lazy=1', '--small', '--zzz', '--steps=x', config_file('gap = 1.5\n1 / 0'), script='run.py')
    assert len(errors) == 6


def test_moved_keys_and_choices_say_what_to_use_now(run):
    moved = {'residual': 'Fira is a method of its own now: --method=fira', 'method=mini': 'use --method=lora'}
    sentence = 'residual: Fira is a method of its own now: --method=fira'
    assert (
        wrong('--residual=fira', moved=moved) == wrong('--residual', 'fira', moved=moved) == f'command line: {sentence}'
    )
    assert wrong(config_file('\nresidual = 1'), moved=moved) == f'config/small.py line 2: {sentence}'
    assert wrong('--method=mini', '--rank=2', moved=moved) == 'command line: method=mini: use --method=lora'
    assert (
        wrong(config_file("method = 'mini'"), moved=moved) == 'config/small.py line 1: method=mini: use --method=lora'
    )
    assert run('--method=lora', moved=moved).method == 'lora'
    assert wrong('--residual=fira') == 'command line: unknown key --residual'


def test_problems_see_the_options(run):
    assert wrong('--rank=0', problems=lambda c: at_least(c, 1, 'rank')) == 'rank=0 is too small: use 1 or more'


# ---- files and flags that choose different methods ------------------------

GALORE = "method = 'galore'\nrank = 1024\ngap = 500\nsteps = 7\n"


def test_flags_that_choose_a_relative_keep_the_files_options(run):
    config = run(config_file(GALORE), '--method=qgalore')
    assert (config.method, config.rank, config.gap, config.bits, config.steps) == ('qgalore', 1024, 500, 4, 7)
    assert (config._left_out, config._given['gap']) == ({}, 'config/small.py line 3')


def test_an_option_of_the_same_name_and_another_owner_is_left_out(run):
    config = run(config_file(GALORE), '--method=lora')
    assert (config.rank, config.steps, hasattr(config, 'gap')) == (16, 7, False)
    assert config._left_out == {'rank': 'config/small.py line 2', 'gap': 'config/small.py line 3'}
    assert 'rank' not in config._given
    line = "# left out: rank and gap, which config/small.py says of method='galore'"
    assert as_text(config, 'run.py').splitlines()[-1] == line


def test_a_value_that_a_relative_does_not_take_is_left_out(run):
    Path('methods/fira.py').write_text('class Options(galore.Options):\n    bits = 8  # 8 | 16: no fewer\n')
    config = run(config_file("method = 'galore'\nbits = 4"), '--method=fira')
    assert (config.bits, list(config._left_out)) == (8, ['bits'])


def test_an_option_typed_for_the_new_method_is_no_longer_left_out(run):
    config = run(config_file(GALORE), '--method=lora', '--rank=8')
    assert (config.rank, list(config._left_out)) == (8, ['gap'])
    assert wrong(config_file(GALORE), '--method=lora', '--gap=8').startswith("command line: gap is galore's")


def test_flags_that_choose_the_same_method_leave_nothing_out(run):
    config = run(config_file(GALORE), '--method=galore')
    assert (config.rank, config.gap, config._left_out) == (1024, 500, {})


def test_a_file_that_names_no_method_is_about_the_one_that_is_chosen(run):
    path = config_file('rank = 8')
    assert (run(path).rank, run(path, '--method=lora').rank) == (8, 8)
    assert wrong(path, '--method=adamw').startswith('config/small.py line 1: rank is ')
    assert run(config_file('ratio = 2'), '--coreset=zo').ratio == 2


def test_of_two_files_the_later_chooses_the_method_of_both(run):
    a, b = config_file('rank = 8\nsteps = 3', 'a.py'), config_file("method = 'lora'", 'b.py')
    assert (run(a, b).rank, run(b, a).rank) == (8, 8)
    assert wrong(config_file(GALORE, 'a.py'), b).startswith(
        "a.py line 3: gap is galore's: leave it out with method='lora'"
    )
    config = run(config_file(GALORE, 'a.py'), config_file("method = 'fira'\ngap = 3", 'b.py'), '--method=lora')
    assert config._left_out == {'rank': 'a.py line 2', 'gap': 'b.py line 2'}
    assert as_text(config, 'run.py').splitlines()[-2:] == [
        "# left out: rank, which a.py says of method='fira'",
        "# left out: gap, which b.py says of method='fira'",
    ]


def test_coreset_options_of_a_file_are_left_out_where_flags_say_none(run):
    path = config_file("coreset = 'grad'\nratio = 2\nrank = 8")
    assert run(path, '--coreset=zo').ratio == 2
    config = run(path, '--coreset=none')
    assert (config.rank, hasattr(config, 'ratio')) == (8, False)
    assert config._left_out == {'ratio': 'config/small.py line 2'}
    assert as_text(config, 'run.py').endswith("# left out: ratio, which config/small.py says of coreset='grad'")


# ---- switch --------------------------------------------------------------


def test_switch_equals_what_the_flags_would_have_given(run):
    for text in (GALORE, GALORE + "coreset = 'grad'\nratio = 2", "method = 'lora'\nnf4 = False\nsteps = 2"):
        path = config_file(text)
        for method in ('adamw', 'galore', 'loqt', 'lora', 'qgalore', 'fira'):
            assert public(switch(run(path), method)) == public(run(path, f'--method={method}'))
            changed = switch(run(path), method, steps=5, coreset='none')
            assert public(changed) == public(run(path, f'--method={method}', '--steps=5', '--coreset=none'))


def test_switch_takes_over_typed_and_later_changes_and_leaves_its_config_alone(run):
    config = run('--gap=7')
    config.rank = 99  # a script's own decision
    before = dict(vars(config))
    switched = switch(config, 'qgalore', lazy=0.9)
    assert (switched.rank, switched.gap, switched.lazy, switched.bits) == (99, 7, 0.9, 4)
    back = switch(switched, 'galore')
    assert (back.rank, back.gap, hasattr(back, 'lazy')) == (99, 7, False) and vars(config) == before


def test_switch_to_the_same_method_only_changes_values(run):
    config = run('--method=lora', '--rank=8')
    assert public(switch(config)) == public(switch(config, 'lora')) == public(config)
    assert public(switch(config, steps=3, nf4=False)) == {**public(config), 'steps': 3, 'nf4': False}


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(blok=1), 'unknown key --blok'),
        (dict(method='lora', gap=1), "gap is galore's: leave it out with method='lora'"),
        (dict(method='galor'), 'did you mean galore'),
        (dict(ratio=2), 'ratio says something with coreset alone'),
        (dict(rank=1.5), 'rank expects a whole number'),
        (dict(stagger=1), 'stagger expects True or False'),
    ],
)
def test_switch_refuses_what_load_would(run, changes, words):
    with pytest.raises(ValueError, match=words):
        switch(run(), **changes)


def test_switch_works_on_what_it_gave_and_on_a_copy(run):
    config = SimpleNamespace(**vars(run('--rank=8')) | {'steps': 3})
    assert public(switch(switch(config, 'fira'), 'qgalore')) == public(run('--rank=8', '--steps=3', '--method=qgalore'))


# ---- what the user sees of options ----------------------------------------


def test_help_shows_the_options_under_their_methods(run, monkeypatch):
    monkeypatch.setenv('COLUMNS', '100')
    text = help_text('run.py')
    parts = text[text.index('\n--method=galore') :].split('\n\n--')
    heads = [part.strip().splitlines()[0].lstrip('-') for part in parts]
    assert heads == [
        'method=galore',
        'method=loqt',
        'method=lora',
        "method=qgalore: galore's, and",
        "method=fira: galore's",
        'coreset=random|zo|grad',
    ]
    assert '--rank=128 ' in parts[0] and '--rank=64 ' in parts[1] and '--rank=16 ' in parts[2]
    assert 'dimensions of the change' in parts[2] and '\nsubspace\n' in parts[0] and '\nstates\n' in parts[0]
    assert '--bits=4 ' in parts[3] and '--lazy=0.4 ' in parts[3] and '--rank' not in parts[3]
    assert '--ratio=4 ' in parts[5] and text.index('--out_dir=out') < text.index('--method=galore\n')


def test_as_text_with_options_is_a_config_file(run):
    config = run(config_file(GALORE), '--method=qgalore', '--lazy=0.9', '--coreset=zo', '--ratio=2', '--small=no')
    text = as_text(config, 'run.py')
    assert 'lazy = 0.9  # from command line' in text and 'gap = 500  # from config/small.py line 3' in text
    assert public(run(config_file(text, 'again.py'))) == public(config)
    assert 'bits' not in text  # 4 is what qgalore has anyway


def test_undocumented_names_options_too(run):
    Path('lora.py').write_text('class Options:\n    rank = 16\n    alpha = 1.0\n')
    assert undocumented('run.py') == ['rank', 'alpha']


def test_check_or_exit_prints_problems_as_load_or_exit_does(run, capsys):
    config = run('--rank=0')
    check_or_exit(config, 'run.py', lambda c: [])
    assert capsys.readouterr() == ('', '')
    with pytest.raises(SystemExit) as e:
        check_or_exit(config, 'run.py', lambda c: [*at_least(c, 1, 'rank'), 'two\nlines'])
    assert e.value.code == 2
    expected = 'error: rank=0 is too small: use 1 or more\nerror: two lines\npython run.py --help lists every key\n'
    assert capsys.readouterr() == ('', expected)


def test_load_or_exit_passes_moved_on(run, capsys):
    with pytest.raises(SystemExit):
        load_or_exit('run.py', ['--old=1'], moved={'old': 'use --steps'})
    assert capsys.readouterr().err.startswith('error: command line: old: use --steps\n')


def test_at_least_and_between_name_what_is_outside():
    config = SimpleNamespace(rank=0, gap=1, share=1.5)
    assert at_least(config, 1, 'rank', 'gap') == ['rank=0 is too small: use 1 or more']
    assert between(config, 0, 1, 'gap', 'share') == ['share=1.5 is out of range: use 0 to 1']
    assert at_least(config, 0, 'rank') == between(config, 0, 1.5, 'share') == []


# ---- the trainer itself ---------------------------------------------------


def test_the_trainers_keys_are_read_without_importing_anything_heavy():
    root = Path(configurator.__file__).parent
    code = (
        'import sys, configurator\n'
        "try:\n    configurator.load_or_exit('train.py', ['--help'])\n"
        "finally:\n    print(sorted({'torch', 'numpy', 'galore', 'train'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == '[]\n' and '--learning_rate=' in done.stdout


def test_every_method_of_the_trainer_has_a_file_and_can_be_switched_to():
    root = Path(configurator.__file__).parent
    config = load(root / 'train.py', [])
    for method in keys(root / 'train.py')['method'].choices:
        assert configurator._file_of(root, method).is_file(), method
        switched = switch(config, method)
        assert public(switched) == public(load(root / 'train.py', [f'--method={method}']))


def test_configurator_imports_the_standard_library_only():
    tree = ast.parse(Path(configurator.__file__).read_text(encoding='utf-8'))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {n for i in imports for n in ([i.module] if isinstance(i, ast.ImportFrom) else [a.name for a in i.names])}
    assert names <= set(sys.stdlib_module_names)
