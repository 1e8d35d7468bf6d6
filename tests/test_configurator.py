"""The configurator on scripts made here: what it reads, what it refuses, and that it says all of it at once."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import configurator
from configurator import ConfigError, as_text, help_text, keys, load, load_or_exit, undocumented

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


def refused(*argv, **kwargs):
    with pytest.raises(ConfigError) as e:
        load('toy.py', argv, **kwargs)
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
    assert {k: v for k, v in vars(config).items() if k != '_given'} == {n: k.default for n, k in keys('toy.py').items()}
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
    assert lines[3] == 'toy.py --help lists every key'


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
    assert {**vars(again), '_given': 0} == {**vars(config), '_given': 0}


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
    assert (bad.returncode, bad.stdout) == (2, '') and bad.stderr.endswith('\nreal.py --help lists every key\n')
    assert run('--help').returncode == 0


def test_configurator_imports_the_standard_library_only():
    tree = ast.parse(Path(configurator.__file__).read_text(encoding='utf-8'))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {n for i in imports for n in ([i.module] if isinstance(i, ast.ImportFrom) else [a.name for a in i.names])}
    assert names <= set(sys.stdlib_module_names)
