"""A conversation in the terminal: what the model is given, what is printed, and how it ends."""

import contextlib
import os
import select
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, run
from test_sample import published, said

import configurator
import sample
from data import chat, tokenizer
from model import LLaMA
from plumbing import talking
from plumbing.cache import KVCache

pty = pytest.importorskip('pty')  # not on Windows
TEMPLATE = """{% for message in messages %}{% if message.role == 'user' %}<|user|>{{ message.content }}<|end|>\
{% elif message.role == 'system' %}{{ message.content }}<|end|>{% else %}{{ message.content }}<|end|>{% endif %}\
{% endfor %}"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = published(tmp_path_factory.mktemp('model'), None)
    (folder / 'chat_template.jinja').write_text(TEMPLATE)
    return folder


class Typed:
    """Stands in for input(): lines of text, and errors to raise; then the end of input."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self, prompt=''):
        line = self.lines.pop(0) if self.lines else EOFError
        if not isinstance(line, str):
            raise line
        return line


class Model:
    """Answers with these texts, whatever it is asked, and remembers what it was asked and how much room it had."""

    def __init__(self, tok, *texts, window=200):
        self.tok, self.texts, self.window, self.asked = tok, list(texts), window, []

    def __call__(self, ids, n):
        self.asked.append((self.tok.decode(ids).removeprefix('<s>'), n))
        text = self.texts.pop(0)
        if callable(text):
            yield from self.tok.encode('half of')
            text()
        yield from [*self.tok.encode(text), 4][:n]


def talk(monkeypatch, folder, *lines, texts, window=200, tokens=None):
    tok = tokenizer.load(folder)
    model = Model(tok, *texts)
    monkeypatch.setattr('builtins.input', Typed(*lines))
    talking.talk(chat.load(folder, tok), tok, model, window, tokens)
    return model.asked


def test_each_turn_is_given_all_before_it_and_commands_begin_anew(folder, monkeypatch, capsys):
    lines = ['hello', 'is it?', '/system the capital', 'What', '/reset', 'What is', '/system', 'it', '/quit', 'never']
    asked = talk(monkeypatch, folder, *lines, texts=['Paris', 'it is', 'a', 'b', 'c'])
    assert [text for text, _ in asked] == [
        '<|user|>hello<|end|>',
        '<|user|>hello<|end|>Paris<|end|><|user|>is it?<|end|>',
        'the capital<|end|><|user|>What<|end|>',
        'the capital<|end|><|user|>What is<|end|>',
        '<|user|>it<|end|>',
    ]
    out = capsys.readouterr().out
    assert 'Paris\nit is\n' in out and 'a new conversation, to which is said: the capital\n' in out
    assert '<|end|>' not in out


def test_empty_lines_unknown_commands_and_lines_that_go_on(folder, monkeypatch, capsys):
    asked = talk(monkeypatch, folder, '', '  ', '/rest', '/sytem be kind', '/etc/x is it', 'a\\', 'b', texts=['1', '2'])
    assert [text for text, _ in asked] == ['<|user|>/etc/x is it<|end|>', asked[1][0]]
    assert asked[1][0].endswith('<|user|>a\nb<|end|>')
    out = capsys.readouterr().out
    assert all(f'{word} is no command: there are /reset, /system, /quit' in out for word in ('/rest', '/sytem'))


def test_names_of_special_tokens_that_are_typed_end_no_turn(folder, monkeypatch):
    tok, seen = tokenizer.load(folder), []
    monkeypatch.setattr('builtins.input', Typed('<|end|>hello</s>'))

    def answer(ids, n):
        seen.append(ids)
        yield 4

    talking.talk(chat.load(folder, tok), tok, answer, 100)
    assert sum(i in (1, 2, 3, 4) for i in seen[0]) == 3  # BOS, <|user|>, <|end|>


def test_the_contexts_limit_is_said_and_not_crashed_into(folder, monkeypatch, capsys):
    long = 'the capital of France is Paris. ' * 9
    asked = talk(monkeypatch, folder, 'hello', long, 'hello', texts=['Paris ' * 30, 'a'], window=60)
    assert len(asked) == 1 and asked[0][1] == 60 - len(tokenizer.load(folder).prompt('<|user|>hello<|end|>'))
    out = capsys.readouterr().out
    assert 'the context of 60 tokens is full, and the answer ends there: /reset' in out
    assert out.count('the context ends at 60: /reset') == 2
    asked = talk(monkeypatch, folder, 'hello', texts=['Paris ' * 9], window=60, tokens=3)
    assert asked[0][1] == 3
    tok = tokenizer.load(folder)
    used = len(tok.prompt('<|user|>hello<|end|>')) + len(tok.encode('Paris. ' * 8)) + 1
    talk(monkeypatch, folder, 'hello', texts=['Paris. ' * 8], window=used + 2)
    assert f'{used} of {used + 2} tokens of the context are used' in capsys.readouterr().out


def test_ctrl_c_stops_an_answer_and_leaves_where_nothing_is_written(folder, monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    asked = talk(monkeypatch, folder, 'hello', 'is it', KeyboardInterrupt, 'never', texts=[interrupt, 'Paris'])
    assert asked[1][0] == '<|user|>hello<|end|>half of<|end|><|user|>is it<|end|>'
    assert 'half of ...\nParis\n' in capsys.readouterr().out


def test_a_question_that_the_template_refuses_is_said_and_forgotten(tmp_path, monkeypatch, capsys):
    folder = published(tmp_path, None)
    (folder / 'chat_template.jinja').write_text(
        "{% if 'capital' in messages[0].content %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    )
    asked = talk(monkeypatch, folder, 'the capital', 'hello', texts=['Paris'])
    assert [text for text, _ in asked] == ['<|user|>hello<|end|>']
    assert 'cannot write this conversation: no' in capsys.readouterr().out


def test_what_was_said_is_computed_once_and_the_answers_stay_the_same(folder, monkeypatch, capsys):
    seen, hidden = [], LLaMA.hidden

    def counted(self, tokens, *more):
        seen.append(tokens.numel())
        return hidden(self, tokens, *more)

    monkeypatch.setattr(LLaMA, 'hidden', counted)
    lines = ('What is', 'the capital', 'of France')
    monkeypatch.setattr('builtins.input', Typed(*lines))
    words = [folder, '--chat', '--temperature=0', '--tokens=6', '--device=cpu']
    out = said(capsys, *words).out
    tok, model = tokenizer.load(folder), LLaMA.from_pretrained(folder)
    template, messages, fresh = chat.load(folder, tok), [], []
    total = sum(seen)
    for line in lines:
        messages.append({'role': 'user', 'content': line})
        ids = template.prompt(messages)
        made = list(sample.generate(model, ids, 6, [2, 4], temperature=0))
        fresh.append(''.join(tok.decode_stream(iter(made), ids)))
        messages.append({'role': 'assistant', 'content': fresh[-1]})
    assert out.split('\n')[1:4] == [line.split('\n')[0] for line in fresh] or all(text in out for text in fresh)
    whole = len(template.prompt(messages[:-1]))
    assert total < whole + 3 * 6 + 12  # each token once, but for those that are written otherwise than they were made


def test_a_kept_cache_changes_no_token_whatever_the_texts_have_in_common(folder):
    model = LLaMA.from_pretrained(folder)
    cache = KVCache(model.config)
    for ids in ([5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 7], [9], [5, 6, 7, 8, 9, 10], list(range(5, 205)), [5, 6], []):
        alone = list(sample.generate(model, ids, 9, [3], temperature=0))
        assert list(sample.generate(model, ids, 9, [3], temperature=0, cache=cache)) == alone
        some = sample.generate(model, [*ids, *alone, 11], 9, temperature=0, cache=cache)
        next(some)
        some.close()  # as Ctrl-C does


def test_a_model_without_a_template_is_one_sentence_that_says_what_to_type(tmp_path):
    done = run(['sample.py', published(tmp_path, None), '--chat'], input='hello\n')
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'has no chat template of its own: choose one, --template=chatml|' in done.stderr


def test_flags_that_say_nothing_are_refused():
    for words, sentence in {
        ('out/x', '--chat', '--prompt=a'): 'prompt says nothing in a chat',
        ('out/x', '--template=chatml'): 'template is of a conversation: add --chat',
    }.items():
        with pytest.raises(configurator.ConfigError, match=sentence):
            configurator.load(ROOT / 'sample.py', words, sample.problems, positional='checkpoint')


def test_it_streams_in_a_terminal_and_ctrl_c_at_the_prompt_leaves_without_a_traceback(folder):
    ours, theirs = pty.openpty()
    words = [sys.executable, 'sample.py', str(folder), '--chat', '--tokens=5', '--device=cpu']
    environment = os.environ | {'PYTHONWARNINGS': 'ignore', 'TERM': 'dumb'}
    with subprocess.Popen(words, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        seen = b''

        def wait_for(text):
            nonlocal seen
            while text not in seen:
                assert select.select([ours], [], [], 60)[0], seen
                seen += os.read(ours, 4096)

        try:
            wait_for(b'> ')
            os.write(ours, b'hello\n')
            seen = b''
            wait_for(b'> ')
            for _ in range(6):  # readline overlooks one that comes before it waits for a key
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(15)
                    break
            assert process.wait(1) == 0
        finally:
            process.kill()
    os.close(ours)
    assert b'Traceback' not in seen
