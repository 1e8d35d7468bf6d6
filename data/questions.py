"""
Questions with their right answers, to be scored by eval.py: rows of every format that data/formats.py knows, and
multiple choice.

    for q in questions.find('gsm8k:test.jsonl'):
        q.messages, q.answer, q.choices, q.source, q.rule

A row of multiple choice has `choices` or `options`, says which is right as `answer` or `label` (its index, letter,
label or text), and asks by `question`, or by `prompt`, a text that the choices go on from as it stands.
"""

import os
import random
from types import SimpleNamespace

from data import DataError, fields, files, formats
from data.tasks import TASKS

RULES = (*TASKS, 'choice')  # what may stand before a file and a colon
RIGHT = ('answer', 'label', 'answerKey', 'gold', 'target')
PUBLISHED = {
    'gsm8k': ('openai/gsm8k', 'main', 'test'),
    'math': ('HuggingFaceH4/MATH-500', 'default', 'test'),
}


def find(spec):
    """'test.jsonl', 'gsm8k:test.jsonl', 'choice:FILE' or 'gsm8k' -> a list of questions. Raises DataError.

    Before the colon stands a rule by which answers are judged; without one each row is judged by what it looks like."""
    rule, _, path = spec.partition(':') if spec.partition(':')[0] in RULES else ('', '', spec)
    if path and not os.path.isfile(path):
        raise DataError(f'{path} is no file here: name a prepared folder, or a file of questions (.jsonl, .parquet)')
    if not path and rule not in PUBLISHED:
        raise DataError(f'--data={spec} names no file: type --data={spec}:FILE.jsonl')
    rows = files.rows(path) if path else ((f'{rule}, row {i + 1}', row) for i, row in enumerate(download(rule)))
    name = os.path.splitext(os.path.basename(path))[0] or rule
    found = [question(row, rule, place, name) for place, row in rows]
    if not found:
        raise DataError(f'{spec} holds no question')
    return found


def download(name):
    """The test rows of a published data set, from the Hugging Face hub or its cache."""
    import datasets

    repository, part, split = PUBLISHED[name]
    try:
        return datasets.load_dataset(repository, part, split=split)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f'{repository} could not be downloaded ({reason}): fetch its test file and type --data={name}:FILE.jsonl'
        ) from None


def question(row, rule, place, name):
    """One row -> its messages, its right answer (a text, or the index of a choice), and by which rule it is judged."""
    options = row.get('choices', row.get('options'))
    if rule == 'choice' or (options is not None and not rule):
        return choice(row, options, place, name)
    try:
        messages, tools, source = formats.conversation(row, {}, place)
    except formats.Drop as reason:
        raise DataError(f'{place} has {reason}, so that it cannot be scored: mend or remove it') from None
    answer = messages[-1]['content']
    rule = rule or ('gsm8k' if '####' in answer else 'math' if TASKS['math'].extract(answer) else '')
    if rule and TASKS[rule].extract(answer) is None:
        raise DataError(f'{place}: no answer is to be found in it by the rule of {rule}: mend or remove it')
    shared = dict(messages=messages[:-1], tools=tools, answer=answer, source=source or name)
    return SimpleNamespace(**shared, rule=rule, choices=None, literal=False)


def choice(row, options, place, name):
    labels = options.get('label') if isinstance(options, dict) else None  # as ARC has it
    options = options.get('text') if isinstance(options, dict) else options
    if not (isinstance(options, list) and len(options) > 1 and all(isinstance(one, str) and one for one in options)):
        raise DataError(f'{place} has no list of choices, texts, two or more: mend or remove it')
    right = next((row[key] for key in RIGHT if row.get(key) is not None), None)
    if labels and right in labels:
        right = labels.index(right)
    elif right in options:
        right = options.index(right)
    elif isinstance(right, str) and len(right) == 1 and right.isalpha():
        right = ord(right.upper()) - ord('A')
    if type(right) is not int or not 0 <= right < len(options):
        what = fields.shown(right)
        raise DataError(f'{place}: its answer is {what}, none of the {len(options)} choices: mend or remove it')
    asked = next((row[key] for key in ('prompt', 'question', 'query') if isinstance(row.get(key), str)), None)
    if asked is None:
        raise DataError(f'{place} has neither prompt nor question: mend or remove it')
    shared = dict(messages=[{'role': 'user', 'content': asked}], tools=None, source=str(row.get('source') or name))
    return SimpleNamespace(**shared, answer=right, rule='choice', choices=options, literal='prompt' in row)


def drawn(found, limit, seed):
    """So many questions of all, in their order, the same for the same seed."""
    if not 0 < limit < len(found):
        return found
    return [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), limit))]


def continued(tok, text, more):
    """-> ids of text + more as one, and which of them are of `more`: as many as it adds."""
    before, ids = tok.bos + tok.encode(text), tok.bos + tok.encode(text + more)
    known = min(len(before), len(ids) - 1)
    return ids, [False] * known + [True] * (len(ids) - known)
