"""
Questions with their right answers, to be scored by eval.py: files with one JSON object a line, and prompts of them.

    for q in questions.read('test.jsonl', 'gsm8k'):
        q.messages, q.answer, q.choices, q.source, q.rule
    plain = questions.Plain(tok, 'gsm8k')     # for a model without a chat template; else data/chat.py's Template
    ids = plain.prompt(q.messages)
    ids, trained = plain.encode([*q.messages, {'role': 'assistant', 'content': q.answer}])

What a row is say its fields: question and answer, problem and solution, instruction (with input) and output, prompt and
completion; `choices` or `options`, and which of them is right as `answer` or `label`: its index, letter, label or text.
"""

import os
import random
from types import SimpleNamespace

from data import DataError, fields
from data.tasks import TASKS

PAIRS = [('question', 'answer'), ('problem', 'solution'), ('instruction', 'output'), ('prompt', 'completion')]
PAIRS += [('query', 'response'), ('instruction', 'response')]
RIGHT = ('answer', 'label', 'answerKey', 'gold', 'target')
PUBLISHED = {
    'gsm8k': ('openai/gsm8k', 'main', 'test'),
    'math': ('HuggingFaceH4/MATH-500', 'default', 'test'),
}


def find(spec):
    """'gsm8k:test.jsonl', 'test.jsonl', 'choice:rows.jsonl' or 'gsm8k' -> rows of questions. Raises DataError."""
    rule, _, path = spec.partition(':') if spec.partition(':')[0] in (*TASKS, 'choice') else ('', '', spec)
    if path:
        return read(path, rule)
    if rule not in PUBLISHED:
        raise DataError(f'--data={spec} names no file: type --data={spec}:FILE.jsonl')
    return [question(row, rule, f'{rule}, row {i + 1}', rule) for i, row in enumerate(download(rule))]


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


def read(path, rule=''):
    """All questions of a .jsonl file. rule: of TASKS, 'choice', or '': what each row itself looks like."""
    if not os.path.isfile(path):
        raise DataError(f'{path} is no file here: name a prepared folder, or a .jsonl file of questions')
    found, name = [], os.path.splitext(os.path.basename(path))[0]
    for i, line in enumerate(fields.read_text(path, DataError, 'mend it').split('\n')):
        if line.strip():
            where = f'{path}, line {i + 1}'
            found.append(question(fields.parse(line, where, DataError, 'mend or remove it'), rule, where, name))
    if not found:
        raise DataError(f'{path} holds no question: one JSON object a line is what is read')
    return found


def question(row, rule, where, name):
    """One row -> its messages, its right answer (a text, or the index of a choice), and by which rule it is judged."""
    source = row.get('source') or name
    options = row.get('choices', row.get('options'))
    if rule == 'choice' or (options is not None and not rule):
        return choice(row, options, where, source)
    pair = next((pair for pair in PAIRS if all(isinstance(row.get(key), str) for key in pair)), None)
    if pair is None:
        known = ', '.join(' and '.join(pair) for pair in PAIRS)
        raise DataError(f'{where} has the fields {", ".join(row)}: two of these are needed, as texts: {known}')
    asked, answer = row[pair[0]], row[pair[1]]
    if isinstance(row.get('input'), str) and row['input']:
        asked += '\n\n' + row['input']
    system = row['system'] if isinstance(row.get('system'), str) else ''
    messages = [{'role': 'system', 'content': system}] * bool(system) + [{'role': 'user', 'content': asked}]
    rule = rule or ('gsm8k' if '####' in answer else 'math' if TASKS['math'].extract(answer) else '')
    if rule and TASKS[rule].extract(answer) is None:
        raise DataError(f'{where}: no answer is to be found in its {pair[1]} by the rule of {rule}: mend or remove it')
    return SimpleNamespace(messages=messages, answer=answer, source=source, rule=rule, choices=None, literal=False)


def choice(row, options, where, source):
    if isinstance(options, dict):  # as ARC has it
        labels, options = options.get('label'), options.get('text')
    else:
        labels = None
    if not (isinstance(options, list) and len(options) > 1 and all(isinstance(one, str) for one in options)):
        raise DataError(f'{where} has no list of choices, texts, two or more: mend or remove it')
    right = next((row[key] for key in RIGHT if row.get(key) is not None), None)
    if labels and right in labels:
        right = labels.index(right)
    elif right in options:
        right = options.index(right)
    elif isinstance(right, str) and len(right) == 1 and right.isalpha():
        right = ord(right.upper()) - ord('A')
    if type(right) is not int or not 0 <= right < len(options):
        what = fields.shown(right)
        raise DataError(f'{where}: its answer is {what}, none of the {len(options)} choices: mend or remove it')
    literal = isinstance(row.get('prompt'), str)  # a text that the choices continue, and no question
    asked = next((row[key] for key in ('prompt', 'question', 'query') if isinstance(row.get(key), str)), None)
    if asked is None:
        raise DataError(f'{where} has neither prompt nor question: mend or remove it')
    messages = [{'role': 'user', 'content': asked}]
    return SimpleNamespace(
        messages=messages, answer=right, source=source, rule='choice', choices=options, literal=literal
    )


def drawn(found, limit, seed):
    """So many questions of all, in their order, the same for the same seed."""
    if not 0 < limit < len(found):
        return found
    return [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), limit))]


class Plain:
    """Prompts for a model that knows no conversations: "Question: ...\\nAnswer:". The interface of a chat Template."""

    def __init__(self, tok, rule):
        self.tok, task = tok, TASKS.get(rule, TASKS['gsm8k'])
        self.ask, self.reply = task.question, task.answer
        self.stop = self.ask.strip()

    def written(self, messages):
        """The text up to the last answer, and that answer, None where it is still to come."""
        text, answers = '', [m['content'] for m in messages if m['role'] == 'assistant']
        last = answers.pop() if messages[-1]['role'] == 'assistant' else None
        for message in messages[: len(messages) - (last is not None)]:
            if message['role'] == 'user':
                text += f'{self.ask}{message["content"]}\n{self.reply}'
            else:
                text += (' ' if message['role'] == 'assistant' else '') + message['content'] + '\n\n'
        return text, last

    def prompt(self, messages):
        return self.tok.bos + self.tok.encode(self.written(messages)[0])

    def encode(self, messages, train_on='last'):
        text, answer = self.written(messages)
        return continued(self.tok, text, ' ' + answer)


def continued(tok, text, more, end=True):
    """-> ids of text + more as one, and which of them are trained: as many as `more` adds, and the end of text."""
    before, ids = tok.bos + tok.encode(text), tok.bos + tok.encode(text + more)
    ids += [tok.eot] if end and tok.eot is not None else []
    known = min(len(before), len(ids) - 1)
    return ids, [False] * known + [True] * (len(ids) - known)
