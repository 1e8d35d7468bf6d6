"""
A conversation in the terminal: each line is a turn, and the answer appears as it is made.

    talk(template, tok, answer, window, tokens)     # answer(ids, n): yields up to n new ids

    /reset          a new conversation
    /system TEXT    a new conversation in which TEXT says how to answer; /system alone: without
    /quit           as the end of input (Ctrl-D), and Ctrl-C where nothing is being written, leaves

Ctrl-C while an answer is being written stops it there. A line that ends in a backslash goes on in the next one.
"""

import contextlib
import difflib
import re

from data.chat import ChatError

COMMANDS = ('/reset', '/system', '/quit')
FULL = 0.8  # of the context: from there on it is said how much is used


def talk(template, tok, answer, window, tokens=None):
    """Until /quit or the end of input. window: of the model, in tokens; tokens: of the longest answer, None: as many as
    there is room for."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (arrow keys and history in input())
    print(f'a conversation of up to {window:,} tokens: /system TEXT and /reset begin a new one, /quit ends it')
    system, messages = [], []
    while (line := next_line()) is not None:
        command, _, rest = line.strip().partition(' ')
        if command == '/quit':
            return
        if command in ('/reset', '/system'):
            if command == '/system':
                system = [{'role': 'system', 'content': rest.strip()}] if rest.strip() else []
            messages = []
            print('a new conversation' + f', to which is said: {rest.strip()}' * bool(rest.strip()))
        elif re.fullmatch(r'/[a-z]+', line.strip()) or difflib.get_close_matches(command, COMMANDS, 1, 0.7):
            print(f'{command} is no command: there are {", ".join(COMMANDS)}')
        elif line.strip():
            asked = [*messages, {'role': 'user', 'content': line}]
            said = turn(template, tok, answer, system + asked, window, tokens)
            messages = [*asked, {'role': 'assistant', 'content': said}] if said is not None else messages


def next_line():
    """What was typed, in a line or several; None at the end."""
    lines = []
    while True:
        try:
            lines.append(input('... ' if lines else '> '))
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        if not lines[-1].endswith('\\'):
            text = '\n'.join([*(line[:-1] for line in lines[:-1]), lines[-1]])
            return text.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')


def turn(template, tok, answer, messages, window, tokens):
    """Print the answer as it comes. -> it, or None if there is no room, or no way to write the question."""
    try:
        ids = template.prompt(messages)
    except ChatError as error:
        print(f'note: {error}')
        return None
    room = window - len(ids)
    if room < 1:
        print(f'note: with this the conversation has {len(ids):,} tokens, the context ends at {window:,}: /reset')
        return None
    made, pieces = [], []
    try:
        for piece in tok.decode_stream(kept(answer(ids, min(room, tokens or room)), made), ids):
            pieces.append(piece)
            print(piece, end='', flush=True)
    except KeyboardInterrupt:
        print(' ...', end='')
    print(flush=True)
    used = len(ids) + len(made)
    if used >= window:
        print(f'note: the context of {window:,} tokens is full, and the answer ends there: /reset')
    elif used > FULL * window:
        print(f'note: {used:,} of {window:,} tokens of the context are used')
    return ''.join(pieces)


def kept(ids, made):
    for i in ids:
        made.append(i)
        yield i
