"""One flat block of documented keys: defaults in the script, then config files, then flags, all checked before the run.

    $ python train.py                                                      the defaults
    $ python train.py config/galore_laptop.py                              a config file: only what differs
    $ python train.py config/galore_laptop.py --batch_size=32 --compile=False    flags win over files
    $ python train.py --help                                               every key, from its comment

It keeps the look of nanoGPT's configurator.py and not its mechanism: exec into the script's globals is pleasant until
a mistyped key in a file changes nothing and says nothing. Here the block is read from the source and never run:

    # ---- config ---------------------------------------
    # data
    dataset = 'pystdlib'  # name of a folder in data/, or a path to one
    method = 'galore'  # 'adamw' | 'galore': such a list is all that the key accepts
    #                    and a comment indented like this one continues the key's help
    # ---- end of config --------------------------------

A lone comment is a heading in --help; a key's type is its default's. A config file runs in a namespace of its own:
`gradient_accumulation_steps = 512 // batch_size` works on names it set itself, and names with a leading _ are its own
helpers. It is Python all the same: run no config that you would not run as a script.
"""

import ast
import difflib
import importlib
import io
import math
import re
import shlex
import shutil
import sys
import textwrap
import tokenize
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

BOOLS = {'true': True, 'false': False, '1': True, '0': False, 'yes': True, 'no': False}
EXPECTS = {bool: 'True or False', int: 'a whole number', float: 'a finite number', str: 'text'}
BEGIN, END = re.compile(r'# -+ config\b'), re.compile(r'# -+ end of config\b')
# 'a' | 'b', also 8 | 32. An open list is no list of choices: "'cpu' | 'cuda' | ...", "'a' | 'b' or a path"
CHOICE = r"'[^']*'|-?\d+"
CHOICES = re.compile(rf'({CHOICE})(\s*\|\s*({CHOICE}))+(?!\.?\w|,?\s+or\b|\s*\|)')


class ConfigError(Exception):
    def __init__(self, errors):
        super().__init__('\n'.join(errors))
        self.errors = errors  # every one of them, a sentence each


@dataclass
class Key:
    name: str
    default: object
    help: str
    choices: tuple  # empty: anything of the default's type
    section: str

    @property
    def expects(self):
        return ' | '.join(map(repr, self.choices)) or EXPECTS[type(self.default)]


# ---- the block in the script ---------------------------------------------


def keys(script):
    """{name: Key} in the order of the block. A block that is written wrongly is a bug in the script: ValueError."""
    source = Path(script).read_text(encoding='utf-8-sig')
    # ast drops comments, and only tokenize tells one from a '#' in a string
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    comments = {t.start[0]: t.string.lstrip('# ').rstrip() for t in tokens}
    continued = {t.start[0] for t in tokens if re.match(r'\s+#|#\s{8}', t.line)}
    begin = next((t.start[0] for t in tokens if BEGIN.match(t.line)), 0)
    end = next((t.start[0] for t in tokens if END.match(t.line)), 0)
    if not 0 < begin < end:
        raise ValueError(f'{script}: no block between "# ---- config" and "# ---- end of config"')

    found, section, last = {}, '', begin  # last: the line where the key before this one ends, its help included
    for node in ast.parse(source).body:
        if not begin < node.lineno < end:
            continue
        where = f'{script} line {node.lineno}'
        heading = [comments[line] for line in range(last + 1, node.lineno) if line in comments]
        section, last = ' '.join(heading) or section, node.end_lineno
        text = comments.get(last, '')
        while last + 1 in continued:
            last += 1
            text = f'{text} {comments[last]}'.strip()
        try:
            (target,) = node.targets
            name, default = target.id, ast.literal_eval(node.value)
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f'{where}: the config block holds only `name = literal`') from None
        if type(default) not in EXPECTS or name.startswith('_') or name in found:
            raise ValueError(f'{where}: {name} must be a bool, int, float or str, with no leading _, and there once')

        match = CHOICES.match(text)
        choices = tuple(ast.literal_eval(c) for c in re.findall(CHOICE, match[0])) if match else ()
        choices = choices if {type(c) for c in choices} == {type(default)} else ()
        if choices and default not in choices:
            raise ValueError(f'{where}: {name} = {default!r} is not among the choices of its own comment')
        found[name] = Key(name, default, text, choices, section)
    return found


def undocumented(script):
    return [key.name for key in keys(script).values() if not key.help]


# ---- files and flags -----------------------------------------------------


def load(script, argv, problems=None, positional=None):
    """The config as a namespace of the script's keys, or ConfigError with everything that is wrong with it.

    problems: config -> sentences about combinations that cannot be; asked when every value by itself is all right.
    positional: the key that a bare word sets (`sample.py out/last`). `config._given` says who set a key, and where.
    """
    known = keys(script)
    assert positional is None or positional in known, f'{script} has no key {positional}'
    values = {name: key.default for name, key in known.items()}
    given, unknown, errors = {}, [], []

    def put(name, value, where, typed):
        if name not in known:
            dashes = '--' if typed else ''
            hint = _did_you_mean(name, known, dashes) or ('' if typed else ' (a helper name begins with _)')
            if typed and name[:3] == 'no_' and name[3:] in known:
                hint = f', did you mean --{name[3:]}=False?'
            unknown.append(f'{where}: unknown key {dashes}{name}{hint}')
            return
        key = known[name]
        try:
            values[name], given[name] = _convert(key, value, typed), where
        except Exception:  # literal_eval alone has six kinds
            hint = _did_you_mean(value, key.choices) if key.choices and isinstance(value, str) else ''
            errors.append(f'{where}: {name} expects {key.expects}, got {value!r:.80}{hint}')

    files, flags = _split(argv, known, positional, errors)
    for path in files:
        names, lines, error = _run_file(path, known)
        for name, value in names.items():
            if not name.startswith('_'):
                put(name, value, f'{path} line {lines[name]}' if name in lines else path, typed=False)
        errors += [error] if error else []
    for name, text in flags:
        put(name, text, 'command line', typed=True)

    config = SimpleNamespace(**values, _given=given)
    if problems and not errors:
        errors += problems(config)
    if unknown or errors:
        raise ConfigError(unknown + errors)
    return config


def _split(argv, known, positional, errors):
    """Config files, and (key, text) pairs, each in their order."""
    files, flags, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.lstrip('-').partition('=')
        name = name.replace('-', '_')
        following = rest[0] if rest and not rest[0].startswith('--') else None  # -1e-3 is a value, --rank is not
        if not word.startswith('--'):
            if word.endswith('.py'):
                files.append(word)
            elif positional and not word.startswith('-') and not (equals and name in known):
                flags.append((positional, word))
                positional = None  # a second one is a prompt without its quotes, more likely than a change of mind
            else:
                hint = f', did you mean --{name}={text or "..."}?' if name in known else ''
                hint = f', did you mean {word}.py?' if Path(f'{word}.py').is_file() else hint
                errors.append(f'command line: expected a config file (NAME.py) or --key=value, got {word!r}{hint}')
        elif equals:
            flags.append((name, text))
        elif name in known and isinstance(known[name].default, bool):
            flags.append((name, rest.pop(0) if following and following.lower() in BOOLS else 'True'))
        elif name not in known:
            flags.append((name, ''))
            if following is not None and not following.endswith('.py'):
                rest.pop(0)  # the typo's value, which would be a second error by itself
        elif following is None:
            errors.append(f'command line: --{name} needs a value: --{name}=..., {known[name].expects}')
        else:
            flags.append((name, rest.pop(0)))
    return files, flags


def _convert(key, value, typed):
    """The value in the type of the key's default, or an exception. typed: it is text from the command line."""
    kind = type(key.default)
    if typed and kind is bool:
        value = BOOLS[value.lower()]
    elif typed and kind is not str:
        value = ast.literal_eval(value)
    if kind in (int, float):
        # 1e4 iterations are welcome, 1.5 are not; and True, which Python counts as 1, is no number here
        if type(value) not in (int, float) or not math.isfinite(value) or kind(value) != value:
            raise ValueError
        value = kind(value)
    if type(value) is not kind or (key.choices and value not in key.choices):
        raise ValueError
    return value


def _run_file(path, known):
    """What a config file sets, on which lines, and what went wrong with it ('' if nothing did)."""
    names, lines = {'__name__': 'config', '__file__': path}, {}
    try:
        source = Path(path).read_text(encoding='utf-8-sig')  # -sig: Notepad's invisible first character
    except FileNotFoundError:
        near = {p.name: str(p) for folder in (Path('config'), Path(path).parent) for p in folder.glob('*.py')}
        best = difflib.get_close_matches(Path(path).name, near, n=1)
        return {}, {}, f'{path}: no such config file' + (f', did you mean {near[best[0]]}?' if best else '')
    except (OSError, ValueError) as e:  # ValueError: not UTF-8
        return {}, {}, f'{path}: cannot be read: {getattr(e, "strerror", None) or e}'
    if any(END.match(line) for line in source.splitlines()):
        return {}, {}, f'{path}: this is a script, not a config file'  # running it would train inside the trainer

    try:
        tree = ast.parse(source, path)
        for node in ast.walk(tree):
            if isinstance(node, ast.alias):
                name = (node.asname or node.name).split('.')[0]
            elif isinstance(node, ast.Name):
                name = node.id if isinstance(node.ctx, ast.Store) else None
            else:
                name = getattr(node, 'name', None)  # def and class
            if name:
                lines[name] = max(node.lineno, lines.get(name, 0))
        exec(compile(tree, path, 'exec'), names)
    except (Exception, SystemExit) as e:
        frames = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        line = frames[-1] if frames else getattr(e, 'lineno', None)
        what = f'{type(e).__name__}: {e.msg if isinstance(e, SyntaxError) else e}'
        if isinstance(e, NameError) and e.name in known:
            what += f' (a config file sees only its own names: set {e.name} in it too)'
        return names, lines, f'{path} line {line}: {what}' if line else f'{path}: {what}'
    return names, lines, ''


def _did_you_mean(word, options, dashes=''):
    options = {str(option).lower(): option for option in options}
    best = difflib.get_close_matches(word.lower(), options, n=1)
    return f', did you mean {dashes}{options[best[0]]}?' if best else ''


def method_of(config):
    """The module of config.method: the file of that name at the top, or in methods/; 'adamw' is adam.py."""
    name = {'adamw': 'adam', 'apollo': 'galore', 'apollo_mini': 'galore'}.get(config.method, config.method)
    at_the_top = (Path(__file__).parent / f'{name}.py').exists()
    return importlib.import_module(name if at_the_top else f'methods.{name}')


# ---- what the user sees --------------------------------------------------


def load_or_exit(script, argv, problems=None, positional=None):
    """load() for a script's first lines: --help and errors are printed, and end it."""
    if '--help' in argv or '-h' in argv:
        print(help_text(script, positional))
        sys.exit(0)
    try:
        return load(script, argv, problems, positional)
    except ConfigError as e:
        for error in e.errors:
            print('error:', ' '.join(error.splitlines()), file=sys.stderr)
        print(f'{Path(script).name} --help lists every key', file=sys.stderr)
        sys.exit(2)


def help_text(script, positional=None):
    """The script's docstring (its launch card), then the block as flags that can be pasted into a shell."""
    width, indent = shutil.get_terminal_size().columns, 32
    word = f' [{positional.upper()}]' if positional else ''
    usage = f'usage: python {Path(script).name}{word} [config/NAME.py ...] [--key=value ...]'
    card = ast.get_docstring(ast.parse(Path(script).read_text(encoding='utf-8-sig')), clean=False)
    out, section = ([card.strip(), ''] if card else []) + [usage], ''
    for key in keys(script).values():
        if key.section != section:
            section = key.section
            out += ['', textwrap.fill(section, max(width, 40))]
        default = shlex.quote(str(key.default)) if str(key.default).isprintable() else repr(key.default)
        flag = f'  --{key.name}={default}'
        if len(flag) > indent - 2:
            out.append(flag)
            flag = ''
        wrap = textwrap.TextWrapper(max(width, indent + 30), break_long_words=False, break_on_hyphens=False)
        wrap.initial_indent, wrap.subsequent_indent = flag.ljust(indent), ' ' * indent
        out += wrap.wrap(key.help or '(no comment)')
    return '\n'.join(out)


def as_text(config, script):
    """The keys that differ from their defaults, as a config file would say it, each with who set it."""
    given, lines = getattr(config, '_given', {}), []
    for name, key in keys(script).items():
        value = getattr(config, name, key.default)
        if value != key.default:
            lines.append(f'{name} = {value!r}  # from {given.get(name, Path(script).name)}')
    return '\n'.join(lines)
