"""
A row of somebody's examples -> a conversation, whatever the format: it is known by the fields it has.

    messages, tools, source = conversation({'question': '2+2?', 'answer': '4'}, {}, 'mine.jsonl:1')

| format             | fields                                | besides                                              |
|--------------------|---------------------------------------|------------------------------------------------------|
| OpenAI             | messages: role, content               | tools, tool_calls, weight of a message, content null |
| sharegpt           | conversations: from, value            | system, tools; a first turn of the model is left out |
| alpaca             | instruction, output                   | input, system, history                               |
| prompt, completion | two texts, or two lists of messages   | system; a space between them is the completion's     |
| other pairs        | question and answer, ...: see PAIRS   | input or context, system                             |

`source` of a row is kept: it tells CoLM what the example is about (MathInstruct has 14). What is missing or of the
wrong kind is an error that names the place; what teaches nothing, as an empty answer, is a Drop that is counted.
"""

import json
from itertools import dropwhile

from data import DataError, fields

# Our names of the fields, as --fields has them, and those that rows have. The question's, then the answer's.
PAIRS = [
    ('prompt', 'completion'),
    ('instruction', 'output'),
    ('question', 'answer'),
    ('problem', 'solution'),
    ('instruction', 'response'),
    ('prompt', 'response'),
    ('question', 'response'),
    ('query', 'response'),
    ('prompt', 'generation'),
    ('INSTRUCTION', 'RESPONSE'),
    ('input', 'output'),
]
MORE = {
    'messages': ('messages', 'conversations', 'conversation'),
    'input': ('input', 'context'),
    'system': ('system', 'system_prompt'),
    'history': ('history',),
    'tools': ('tools',),
    'source': ('source',),
}
OURS = ('prompt', 'completion', *MORE)
ROLES = {
    **dict.fromkeys(('user', 'human'), 'user'),
    **dict.fromkeys(('assistant', 'gpt', 'chatgpt', 'bing', 'bard', 'model', 'bot', 'function_call'), 'assistant'),
    **dict.fromkeys(('system', 'developer'), 'system'),
    **dict.fromkeys(('tool', 'observation', 'function', 'function_response', 'ipython'), 'tool'),
}
KEPT = ('tool_calls', 'name', 'tool_call_id', 'reasoning_content', 'weight', 'train')


class Drop(Exception):
    """An example that is left out and counted; the message is why, in a few words."""


def parse_fields(text):
    """'prompt:question,completion:answer' -> {'prompt': 'question', ...}. Raises DataError."""
    found = {}
    for pair in filter(None, (text or '').split(',')):
        ours, colon, theirs = pair.partition(':')
        if ours.strip() not in OURS or not colon:
            raise DataError(f'--fields={text}: {pair!r} should be OURS:YOURS, ours being one of {", ".join(OURS)}')
        found[ours.strip()] = theirs.strip()
    return found


def conversation(row, names, place):
    """-> messages, tools (a list of dicts, or None), source (a text, or None).

    names: {our name of a field: the row's}, instead of the usual ones. Raises DataError or Drop."""

    def value(ours):
        known = [names[ours]] if ours in names else MORE[ours]
        return next((row[name] for name in known if row.get(name) is not None), None)

    tools = as_json(value('tools'))
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise DataError(f'{place}: tools={fields.shown(tools)} is not a list of objects')
    source = value('source')
    if (turns := value('messages')) is not None and not {'prompt', 'completion'} & {*names}:
        messages = from_turns(turns, place)
        if isinstance(value('system'), str) and value('system') and messages[:1] and messages[0]['role'] != 'system':
            messages.insert(0, {'role': 'system', 'content': text(value('system'), f'{place}: system')})
    else:
        messages = from_pair(row, names, value, place)
    return checked(messages), tools or None, text(source, f'{place}: source') if source is not None else None


def from_pair(row, names, value, place):
    """A question and its answer, each a text or a list of messages."""
    asked, answered = pair_of(row, names, place)
    if isinstance(row[asked], list):
        messages = [m if m['role'] != 'assistant' else m | {'weight': 0} for m in from_turns(row[asked], place)]
    else:
        instruction = text(row[asked], f'{place}: {asked}')
        more = value('input') if asked != 'input' else None
        more = text(more, f'{place}: input') if more is not None else ''
        message = {'role': 'user', 'content': instruction}
        if more:  # alpaca's template has a place for it, all others take both together
            together = f'{instruction}\n\n{more}' if instruction else more
            message |= {'content': together, 'instruction': instruction, 'input': more}
        messages = [message]
    for old in reversed(value('history') or []):
        if not (isinstance(old, list) and len(old) == 2):
            raise DataError(f'{place}: history={fields.shown(old)} is not a question and its answer')
        question, answer = (text(one, f'{place}: history') for one in old)
        messages = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}, *messages]
    if value('system'):
        messages.insert(0, {'role': 'system', 'content': text(value('system'), f'{place}: system')})
    if isinstance(row[answered], list):
        return messages + from_turns(row[answered], place)
    answer = '' if row[answered] is None else text(row[answered], f'{place}: {answered}')
    return [*messages, {'role': 'assistant', 'content': answer}]


def pair_of(row, names, place):
    """The names of the row's fields for question and answer."""
    pairs = [(names.get('prompt', a), names.get('completion', b)) for a, b in PAIRS]
    for asked, answered in pairs:
        if asked in row and answered in row and row[asked] is not None:
            return asked, answered
    have = ', '.join(map(str, row)) or 'no field'
    if {'prompt', 'completion'} & {*names}:
        missing = next((name for name in pairs[0] if name not in row), None)
        if missing:
            raise DataError(f'{place} lacks the field {missing}, it has {have}: change --fields')
    if half := next(((a, b) for a, b in pairs if (a in row) != (b in row) or (a in row and row[a] is None)), None):
        missing = half[0] if half[0] not in row or half[1] in row else half[1]
        raise DataError(
            f'{place} lacks {missing}, it has {have}: mend this row, or name the fields, '
            '--fields=prompt:YOURS,completion:YOURS'
        )
    if 'text' in row:
        raise DataError(f'{place} is text, no example of question and answer: data/c4/prepare.py reads it')
    raise DataError(f'{place} has {have}, of no format known: name them, --fields=prompt:YOURS,completion:YOURS')


def from_turns(turns, place):
    """OpenAI's messages or sharegpt's, with our roles, texts as content and calls as objects."""
    if isinstance(turns, str):
        return [{'role': 'user', 'content': text(turns, place)}]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f'{place} holds {fields.shown(turns)} where a list of turns should be')
    return [from_turn(turn, f'{place}, turn {i}') for i, turn in enumerate(turns, 1)]


def from_turn(turn, place):
    role = turn.get('role', turn.get('from'))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f'{place} is of the unknown role {fields.shown(role)}: known are {", ".join(ROLES)}')
    content = turn.get('content', turn.get('value'))
    if isinstance(content, list):
        content = ''.join(part_text(part, place) for part in content)
    message = {'role': ROLES[role], 'content': '' if content is None else text(content, place)}
    message |= {key: clean(turn[key]) for key in KEPT if turn.get(key) is not None}
    if message.get('weight', 0) not in (0, 1):
        raise DataError(f'{place}: weight={fields.shown(message["weight"])} should be 0 or 1')
    call = turn.get('function_call')
    if role == 'function_call' and isinstance(as_json(content), dict):
        call, message['content'] = as_json(content), ''
    if call is not None:
        message['tool_calls'] = [{'type': 'function', 'function': clean(call)}]
    if 'tool_calls' in message:
        message['tool_calls'] = [with_arguments(call, place) for call in as_list(message['tool_calls'])]
    return message


def part_text(part, place):
    if isinstance(part, str):
        return text(part, place)
    if isinstance(part, dict) and part.get('type', 'text') == 'text' and isinstance(part.get('text'), str):
        return text(part['text'], place)
    raise DataError(f'{place} has a part {fields.shown(part)}: only text can be trained on')


def with_arguments(call, place):
    """A call whose arguments are an object, as templates want them, not the text of one, as OpenAI sends them."""
    inner = call.get('function', call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get('name'), str):
        raise DataError(f'{place}: tool_calls={fields.shown(call)} names no function')
    arguments = as_json(inner.get('arguments', {}))
    inner = inner | {'arguments': arguments}
    return call | {'function': inner} if 'function' in call else {'type': 'function', 'function': inner}


def checked(messages):
    """Messages that a template can write and that teach something. Raises Drop."""
    system = messages[:1] if messages and messages[0]['role'] == 'system' else []
    messages = [*system, *dropwhile(lambda m: m['role'] == 'assistant', messages[len(system) :])]  # a greeting
    if not messages or messages[-1]['role'] != 'assistant':
        raise Drop('no answer at its end')
    if any(not m['content'].strip() and not m.get('tool_calls') for m in messages if m['role'] == 'assistant'):
        raise Drop('an empty answer')
    if not any(m['content'].strip() for m in messages if m['role'] in ('user', 'tool')):
        raise Drop('an empty question')
    return messages


def text(value, place):
    """A text without half surrogates, which JSON can hold and no tokenizer can read. A number is its digits."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f'{place} is {fields.shown(value)}, not a text: mend this row')
    return value if value.isascii() else value.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def clean(value):
    """All texts in a JSON value made readable, as text() does."""
    if isinstance(value, str):
        return text(value, '')
    if isinstance(value, list):
        return [clean(one) for one in value]
    return {clean(key): clean(one) for key, one in value.items()} if isinstance(value, dict) else value


def as_json(value):
    """The value that a text of JSON holds; anything else as it is."""
    try:
        return clean(json.loads(value) if isinstance(value, str) and value.strip() else value or None)
    except (ValueError, RecursionError):
        return value


def as_list(value):
    return value if isinstance(value, list) else [value]
