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

Two keys of a script may bring further ones, its options, which other files list: `method = 'galore'` those of galore.py
or methods/galore.py ('adamw' stands for adam.py), and `coreset`, unless it is 'none', those of coreset.py. A file lists
its options in a class, which is read like the block and not run either. In methods/qgalore.py:

    class Options(galore.Options):
        basis_bits = 4  # 16 | 8 | 4: of the bases
        lazy = 0.4  # a layer's T doubles where its old basis held more than this share of what the new one holds

The class inherits the options of galore.py and lists only new ones and those with another default or comment. A config
has the options of the chosen method; setting one of another method is an error. If the flags choose another method than
the config files, an option in a file is kept where both methods have it from the same file (qgalore inherits `rank`
from galore, while lora declares a `rank` of its own). Otherwise it is left out, and as_text says so.
"""

import ast
import difflib
import functools
import importlib
import io
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import tokenize
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

BOOLS = {'true': True, 'false': False, '1': True, '0': False, 'yes': True, 'no': False}
EXPECTS = {bool: 'True or False', int: 'a whole number', float: 'a finite number', str: 'text'}
FLOAT32 = 3.4e38  # the largest that a tensor's arithmetic takes
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
    owner: str = ''  # an option: name of the file that declared it first, whoever inherits it; '' in a script's block

    @property
    def expects(self):
        return ' | '.join(map(repr, self.choices)) or EXPECTS[type(self.default)]


# ---- keys in the source of a script or a method file -----------------------


def keys(script):
    """{name: Key} in the order of the block. A block that is written wrongly is a bug in the script: ValueError."""
    source = Path(script).read_text(encoding='utf-8-sig')
    comments = _comments(source)
    begin = next((line for line, t in comments.items() if BEGIN.match(t.line)), 0)
    end = next((line for line, t in comments.items() if END.match(t.line)), 0)
    if not 0 < begin < end:
        raise ValueError(f'{script}: no block between "# ---- config" and "# ---- end of config"')
    nodes = [node for node in ast.parse(source).body if begin < node.lineno < end]
    return _read_keys(script, 'the config block', nodes, comments, begin)


def options(path):
    """{name: Key} of a method file's `class Options`, inherited ones first; {} where it has none."""
    base, own = _class_options(Path(path))
    found = options(base) if base else {}
    for name, key in own.items():
        if old := found.get(name):
            choices = key.choices if key.help else old.choices
            key = replace(key, owner=old.owner, help=key.help or old.help, choices=choices)
            if type(key.default) is not type(old.default) or (choices and key.default not in choices):
                raise ValueError(f'{path}: {name} = {key.default!r}: {name} of {base.name} has no such value')
        found[name] = key
    return found


def _class_options(path):
    """The file whose Options those of `path` inherit, or None, and {name: Key} of the class body."""
    source = path.read_text(encoding='utf-8-sig') if path.is_file() else ''
    body = ast.parse(source).body if 'class Options' in source else []
    at = next((i for i, node in enumerate(body) if isinstance(node, ast.ClassDef) and node.name == 'Options'), None)
    if at is None:
        return None, {}
    node, base = body[at], None
    if node.bases:
        module = re.fullmatch(r'(\w+)\.Options', ', '.join(map(ast.unparse, node.bases)))
        folder = path.parent.parent if path.parent.name == 'methods' else path.parent
        base = module and _file_of(folder, module[1])
        if not base or not base.is_file():
            raise ValueError(
                f'{path} line {node.lineno}: Options inherit only MODULE.Options, of a file beside the script'
            )
    # tokenize is slow and every method is read at the start, so it gets the lines of the class alone
    end = body[at + 1].lineno - 1 if at + 1 < len(body) else None
    comments = _comments('\n'.join(source.split('\n')[node.lineno - 1 : end]), node.lineno - 1)
    nodes, last = [n for n in node.body if not isinstance(n, ast.Pass)], node.lineno
    if ast.get_docstring(node) is not None:
        last = nodes.pop(0).end_lineno
    own = _read_keys(path, 'class Options', nodes, comments, last)
    return base, {name: replace(key, owner=path.stem) for name, key in own.items()}


def _comments(source, before=0):
    """{line: token} of the comments, which ast drops; and only tokenize tells one from a '#' in a string."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0] + before: t for t in tokens if t.type == tokenize.COMMENT}


def _read_keys(path, what, nodes, comments, last):
    """{name: Key} of the assignments. last: the line where the key before this one ends, its help included."""
    found, section = {}, ''

    def text_of(line):
        return comments[line].string.lstrip('# ').rstrip() if line in comments else ''

    def continues(line, indent):
        t = comments.get(line)
        alone = t and not t.line[: t.start[1]].strip()
        return alone and (t.start[1] > indent or re.match(r'#\s{8}', t.string))

    for node in nodes:
        where = f'{path} line {node.lineno}'
        heading = [text_of(line) for line in range(last + 1, node.lineno) if line in comments]
        section, last = ' '.join(heading) or section, node.end_lineno
        text = text_of(last)
        while continues(last + 1, node.col_offset):
            last += 1
            text = f'{text} {text_of(last)}'.strip()
        try:
            (target,) = node.targets
            name, default = target.id, ast.literal_eval(node.value)
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f'{where}: {what} holds only `name = literal`') from None
        if type(default) not in EXPECTS or name.startswith('_') or name in found:
            raise ValueError(f'{where}: {name} must be a bool, int, float or str, with no leading _, and there once')

        match = CHOICES.match(text)
        choices = tuple(ast.literal_eval(c) for c in re.findall(CHOICE, match[0])) if match else ()
        choices = choices if {type(c) for c in choices} == {type(default)} else ()
        if choices and default not in choices:
            raise ValueError(f'{where}: {name} = {default!r} is not among the choices of its own comment')
        found[name] = Key(name, default, text, choices, section)
    return found


# ---- a script's keys, and the options that two of them bring ----------------


@dataclass
class Layout:
    script: Path
    trunk: dict  # {name: Key} of the script's block
    options: dict  # {'method': {'galore': {name: Key}, ...}, 'coreset': {'grad': {name: Key}, ...}}
    opener: dict  # {option: 'method' or 'coreset'}
    known: dict  # {name: Key} of all of them; one Key for a name that several methods have
    files: list  # (opener, its values, the file that lists their options)

    def keys_of(self, config):
        """{name: Key} of the script's keys and of the options that this config's choices bring."""
        chosen = [groups.get(getattr(config, opener, None), {}) for opener, groups in self.options.items()]
        return {name: key for group in (self.trunk, *chosen) for name, key in group.items()}

    def whose(self, name, value):
        """Why the option `name` cannot be set where its opener has this value."""
        opener = self.opener[name]
        having = {choice: found[name] for choice, found in self.options[opener].items() if name in found}
        if opener == 'coreset':
            what, owners = 'says something with coreset alone', list(having)[-1:]
        else:
            # the ancestor stands for those who inherit the option, if --method can choose it
            owners = list(dict.fromkeys(key.owner if key.owner in having else choice for choice, key in having.items()))
            what = 'is ' + _listed([f"{owner}'s" for owner in owners])
        instead = f', or use --{opener}={owners[0]}' if len(owners) == 1 else ''
        return f'{name} {what}: leave it out with {opener}={value!r}{instead}'


def _layout(script):
    return _read_layout(Path(script).resolve())


@functools.cache  # memest calls switch() thousands of times
def _read_layout(script):
    trunk = keys(script)
    layout = Layout(script, trunk, {key: {} for key in ('method', 'coreset') if key in trunk}, {}, dict(trunk), [])
    if 'method' in trunk:
        layout.files += [('method', [value], _file_of(script.parent, value)) for value in trunk['method'].choices]
    if 'coreset' in trunk:
        values = [value for value in trunk['coreset'].choices if value != 'none']
        layout.files += [('coreset', values, script.parent / 'coreset.py')] * bool(values)
    for opener, values, path in layout.files:
        found = options(path)
        layout.options[opener] |= dict.fromkeys(values, found)
        for name, key in found.items():
            other = layout.known.setdefault(name, key)
            # a bool may stand alone on the command line: whether --name takes the next word must not depend on --method
            unlike = isinstance(key.default, bool) != isinstance(other.default, bool)
            if name in trunk or layout.opener.setdefault(name, opener) != opener or unlike:
                raise ValueError(f'{path}: {other.owner or script.name} has another key {name}: rename the option')
    return layout


def _file_of(folder, method):
    stem = {'adamw': 'adam'}.get(method, method)
    at_the_top = folder / f'{stem}.py'
    return at_the_top if at_the_top.is_file() else folder / 'methods' / f'{stem}.py'


def method_of(config):
    """The module of config.method: the file of that name at the top, or in methods/; 'adamw' is adam.py."""
    here = Path(__file__).parent
    path = _file_of(here, config.method)
    return importlib.import_module(path.stem if path.parent == here else f'methods.{path.stem}')


def undocumented(script):
    """Names of the keys and options without a comment."""
    layout = _layout(script)
    groups = [layout.trunk, *(found for values in layout.options.values() for found in values.values())]
    return list(dict.fromkeys(key.name for group in groups for key in group.values() if not key.help))


# ---- files and flags -----------------------------------------------------


class Said(NamedTuple):
    """One assignment, in a config file or on the command line."""

    name: str
    value: object  # on the command line text, or None for a flag without a value
    where: str  # 'config/small.py line 9' or 'command line'
    typed: bool  # on the command line; from switch(), too, where a value need not be text


def load(script, argv, problems=None, positional=None, moved=None, earlier=None, several=False):
    """The config as a namespace, or ConfigError with everything that is wrong with it.

    problems: config -> sentences about combinations that cannot be; asked when every value by itself is all right.
    several: the positional key takes any number of words, which become one text with commas.
    positional: the key that a bare word sets (`sample.py out/last`).
    moved: {'old_key' or 'key=old_value': a sentence that says what to use now}.
    earlier: config -> where and what an earlier run says that this one continues, or None: it stands before all files.
    `config._given` says who set a key, and where; `config._left_out`, which options of the files do not count.
    """
    layout, said, errors, broken = _layout(script), [], [], []
    assert positional is None or positional in layout.trunk, f'{script} has no key {positional}'
    files, flags = _split(argv, layout.known, positional, errors, several)
    for path in files:
        names, lines, error = _run_file(path, layout.known)
        for name, value in names.items():
            if not name.startswith('_'):
                said.append(Said(name, value, f'{path} line {lines[name]}' if name in lines else path, False))
        broken += [error] if error else []
    said += [Said(name, text, 'command line', True) for name, text in flags]
    unknown = [_unknown(s, layout.known, moved or {}) for s in said if s.name not in layout.known]
    config, wrong = _resolve(layout, said, moved or {})
    if was := earlier and earlier(config):
        where, keys_then = was
        said = [Said(name, value, where, False) for name, value in keys_then.items() if name in layout.known] + said
        config, wrong = _resolve(layout, said, moved or {})
    errors += wrong + broken
    if problems and not errors:
        errors += problems(config)
    if unknown or errors:
        raise ConfigError(unknown + errors)
    return config


def _resolve(layout, said, moved):
    """The config that these assignments make, a later one over an earlier, and what is wrong with their values."""
    config = SimpleNamespace(**{name: key.default for name, key in layout.trunk.items()})
    given, left_out, in_files, errors = {}, {}, {}, []
    for s in said:
        if s.name in layout.trunk:
            value, given[s.name] = _checked(layout.trunk[s.name], s, moved, errors), s.where
            setattr(config, s.name, value)
            if s.name in layout.options and not s.typed:
                in_files[s.name] = value

    # Which options there are is known only now, whatever the order of the flags.
    known = layout.keys_of(config)
    vars(config).update({name: key.default for name, key in known.items() if name not in layout.trunk})
    for s in said:
        if not (opener := layout.opener.get(s.name)):
            continue
        # what a file says is about the method that the files name, and if they name none, about the chosen one
        chosen = getattr(config, opener)
        about = chosen if s.typed else in_files.get(opener, chosen)
        if chosen is None or about is None:
            continue  # a wrong --method, which is an error already
        if not (key := layout.options[opener].get(about, {}).get(s.name)):
            errors.append(f'{s.where}: {layout.whose(s.name, about)}')
        elif (value := _checked(key, s, moved, errors)) is not None:
            here = known.get(s.name)
            if here and here.owner == key.owner and (not here.choices or value in here.choices):
                setattr(config, s.name, value)
                given[s.name] = s.where
            else:
                left_out[s.name] = s.where

    config._script, config._given, config._in_files = str(layout.script), given, in_files
    config._left_out = {name: where for name, where in left_out.items() if name not in given}
    return config, errors


def switch(config, method=None, **changes):
    """The config that load() would give if its files said what `config` says, and its flags said `changes`.

    For a planner that compares methods. ValueError where load() has an error.
    """
    layout = _layout(getattr(config, '_script', None) or Path(__file__).parent / 'train.py')
    given, said = getattr(config, '_given', {}), []
    for name, key in layout.keys_of(config).items():
        value = getattr(config, name, key.default)
        if name in given or name in layout.options or value != key.default:
            said.append(Said(name, value, given.get(name, 'config'), False))
    changes = changes if method is None else {'method': method, **changes}
    said += [Said(name, value, 'switch', True) for name, value in changes.items()]
    errors = [_unknown(s, layout.known, {}) for s in said if s.name not in layout.known]
    switched, wrong = _resolve(layout, said, {})
    if errors + wrong:
        raise ValueError('; '.join(errors + wrong))
    return switched


def at_least(config, least, *names):
    """A sentence for each of these keys that is less."""
    small = {name: value for name in names if (value := getattr(config, name)) < least}
    return [f'{name}={value} is too small: use {least} or more' for name, value in small.items()]


def between(config, low, high, *names):
    """A sentence for each of these keys that is less than low or more than high."""
    large = {name: value for name in names if (value := getattr(config, name)) > high}
    too_large = [f'{name}={value} is out of range: use {low} to {high}' for name, value in large.items()]
    return at_least(config, low, *names) + too_large


def typed(config, *names):
    """Those of these keys that the command line set. A key that says nothing in a run is refused if it was typed; in a
    file, which serves many runs, it may stand."""
    return [name for name in names if getattr(config, '_given', {}).get(name) == 'command line']


def _unknown(s, known, moved):
    if s.name in moved:
        return f'{s.where}: {s.name}: {moved[s.name]}'
    dashes = '--' if s.typed else ''
    hint = _did_you_mean(s.name, known, dashes) or ('' if s.typed else ' (a helper name begins with _)')
    if s.typed and s.name[:3] == 'no_' and s.name[3:] in known:
        hint = f', did you mean --{s.name[3:]}=False?'
    return f'{s.where}: unknown key {dashes}{s.name}{hint}'


def _checked(key, s, moved, errors):
    """The value of an assignment, or None, with an error."""
    if isinstance(s.value, str) and (word := f'{s.name}={s.value}') in moved:
        errors.append(f'{s.where}: {word}: {moved[word]}')
    elif s.typed and s.value is None:
        errors.append(f'{s.where}: --{s.name} needs a value: --{s.name}=..., {key.expects}')
    else:
        try:
            return _convert(key, s.value, s.typed and isinstance(s.value, str))
        except Exception:  # literal_eval alone has six kinds
            hint = _did_you_mean(s.value, key.choices) if key.choices and isinstance(s.value, str) else ''
            errors.append(f'{s.where}: {s.name} expects {key.expects}, got {s.value!r:.80}{hint}')
    return None


def _split(argv, known, positional, errors, several=False):
    """Config files, and (key, text) pairs, each in their order."""
    files, flags, rest, words = [], [], list(argv), []
    while rest:
        word = rest.pop(0)
        name, equals, text = word.lstrip('-').partition('=')
        name = name.replace('-', '_')
        following = rest[0] if rest and not rest[0].startswith('--') else None  # -1e-3 is a value, --rank is not
        if not word.startswith('--') or word.startswith('---'):
            if word.endswith('.py'):
                files.append(word)
            elif positional and several and not word.startswith('-') and not (equals and name in known):
                words.append(word)
            elif positional and not word.startswith('-') and not (equals and name in known):
                flags.append((positional, word))
                positional = None  # a second one is a prompt without its quotes, more likely than a change of mind
            else:
                hint = f', did you mean --{name}={text or "..."}?' if name in known else ''
                hint = f', did you mean {word}.py?' if os.path.isfile(f'{word}.py') else hint
                expected = 'expected a config file (NAME.py) or --key=value'
                errors.append(f'command line: {expected}, got {word!r:.80}{hint:.80}')
        elif equals:
            flags.append((name, text))
        elif name in known and isinstance(known[name].default, bool):
            flags.append((name, rest.pop(0) if following and following.lower() in BOOLS else 'True'))
        elif name not in known:
            flags.append((name, ''))
            if following is not None and not following.endswith('.py'):
                rest.pop(0)  # the typo's value, which would be a second error by itself
        else:
            flags.append((name, None if following is None else rest.pop(0)))
    return files, flags + [(positional, ','.join(words))] * bool(words)


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
        if kind is float and abs(value) > FLOAT32:
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


def _listed(words):
    return ' and '.join(filter(None, [', '.join(words[:-1]), words[-1]]))


# ---- what the user sees --------------------------------------------------


def load_or_exit(script, argv, problems=None, positional=None, moved=None, earlier=None, several=False):
    """load() for a script's first lines: --help and errors are printed, and end it."""
    if '--help' in argv or '-h' in argv:
        print(help_text(script, positional and positional + ' ...' * several))
        sys.exit(0)
    try:
        return load(script, argv, problems, positional, moved, earlier, several)
    except ConfigError as e:
        _exit(script, e.errors)


def check_or_exit(config, script, problems):
    """Ask problems(config) later than load_or_exit could: what it imports may be heavy."""
    if errors := problems(config):
        _exit(script, errors)


def _exit(script, errors):
    for error in errors:
        print('error:', ' '.join(error.splitlines()), file=sys.stderr)
    print(f'python {_command(script)} --help lists every key', file=sys.stderr)
    sys.exit(2)


def _command(script):
    """What to type after `python` to run this script, which may be a package's __main__.py."""
    path = Path(script).resolve()
    return f'-m {path.parent.name}' if path.name == '__main__.py' else path.name


def help_text(script, positional=None):
    """The script's docstring (its launch card), then the keys as flags that can be pasted into a shell."""
    word = f' [{positional.upper()}]' if positional else ''
    usage = f'usage: python {_command(script)}{word} [config/NAME.py ...] [--key=value ...]'
    card = ast.get_docstring(ast.parse(Path(script).read_text(encoding='utf-8-sig')), clean=False)
    layout = _layout(script)
    out = ([card.strip(), ''] if card else []) + [usage] + _help_lines(layout.trunk)
    for opener, values, path in layout.files:
        base, own = _class_options(path)
        if base or own:
            inherited = f": {base.stem}'s" + ', and' * bool(own) if base else ''
            out += ['', f'--{opener}={"|".join(values)}{inherited}']
            out += _help_lines({name: layout.options[opener][values[0]][name] for name in own})
    return '\n'.join(out)


def _help_lines(found):
    width, indent, section, out = shutil.get_terminal_size().columns, 32, '', []
    for key in found.values():
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
    return out


def as_text(config, script):
    """The keys that differ from their defaults, as a config file would say it, each with who set it."""
    layout, given, lines = _layout(script), getattr(config, '_given', {}), []
    for name, key in layout.keys_of(config).items():
        value = getattr(config, name, key.default)
        if value != key.default:
            lines.append(f'{name} = {value!r}  # from {given.get(name, Path(script).name)}')
    left_out = {}  # {which file says it of which choice: names}
    for name, where in getattr(config, '_left_out', {}).items():
        opener, path = layout.opener[name], re.sub(r' line \d+$', '', where)
        left_out.setdefault(f'{path} says of {opener}={config._in_files[opener]!r}', []).append(name)
    return '\n'.join(lines + [f'# left out: {_listed(names)}, which {words}' for words, names in left_out.items()])
