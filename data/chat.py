"""
Conversations -> token ids, and which of them are trained. The only place that knows a chat template.

    template = chat.load(folder, tok)                 # the model's own; chat.load(folder, tok, 'chatml'): one of ours
    ids, trained = template.encode([{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}])
    ids = template.prompt([{'role': 'user', 'content': '2+2?'}])             # up to where the answer begins
    template.text(messages)                           # as transformers' apply_chat_template(tokenize=False) has it

A template is jinja from a stranger's folder, so it runs in jinja's sandbox, with what transformers gives it. A
conversation is written and tokenised once, as a whole, and its trained tokens are found by characters: those of each
answer up to and with the token that ends the turn. Where an answer begins and ends say the `{% generation %}` tags of
the template; without them an answer is what the template writes more than it wrote to ask for it, which must therefore
be how the whole begins. Names of special tokens within a message are plain text, so that no user can end a turn.
"""

import json
import os
import re
from itertools import pairwise, takewhile

import numpy as np

from data import fields
from data.signed import NONCHARACTERS, Coder, pattern, special_names
from data.templates import NEEDS, TEMPLATES, environment
from data.tokenizer import ADVICE, HF, PATIENCE, TokenizerError, finished, name_of, read_json

NAMES = '|'.join(TEMPLATES)
KNOWN = [f'{kind}_token' for kind in ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')]
TOKENS = {name: fields.maybe(fields.either(fields.text(), fields.table())) for name in KNOWN}
OWN = {'chat_template': fields.maybe(fields.either(fields.text(), fields.several(fields.table())))}
GENERATION = re.compile(r'\{%-?\s*generation\s*-?%\}')


class ChatError(TokenizerError):
    """A conversation that a template cannot write, or whose answers cannot be found in what it writes."""


def load(folder, tok, name=None):
    """The model's own template (name None or 'own'), the one of that name, or the one in that .jinja file.

    folder: the model's, or None for a tokenizer without one. Raises TokenizerError, with what to type."""
    folder = folder or os.devnull  # where nothing is found
    variables = token_names(folder, tok)
    if name in TEMPLATES:
        special, added = special_names(tok)
        if missing := [token for token in NEEDS.get(name, ()) if token not in {**special, **added}]:
            fit = '|'.join(other for other in TEMPLATES if other not in NEEDS)
            raise TokenizerError(
                f'--template={name} needs the special token {missing[0]}, which this tokenizer lacks: '
                f'use one of ordinary text, --template={fit}'
            )
        # Readers of the saved file add no BOS of their own.
        bos = '{{ bos_token }}'
        if not tok.bos or tok.bos != [special.get(variables.get('bos_token'))]:
            bos = "{% set bos_token = '' %}" * ('bos_token' in TEMPLATES[name])  # named, but nothing begins with it
        return Template({'default': bos + TEMPLATES[name]}, tok, variables, f'--template={name}')
    if name not in (None, 'own'):
        if not name.endswith('.jinja') or not os.path.isfile(name):
            raise TokenizerError(f'--template={name} is none of ours and no .jinja file: use one of {NAMES}')
        return Template({'default': fields.read_text(name, TokenizerError, ADVICE)}, tok, variables, name)
    sources, where = own(folder)
    if not sources:
        raise TokenizerError(f'{folder} has no chat template of its own: choose one, --template={NAMES}')
    return Template(sources, tok, variables, where)


def own(folder):
    """-> {'default': jinja, 'tool_use': another for conversations with tools, if there is one}, the file they are from.

    chat_template.jinja counts before tokenizer_config.json, as in transformers."""
    sources, where = {}, os.path.join(folder, 'chat_template.jinja')
    more = os.path.join(folder, 'additional_chat_templates', 'tool_use.jinja')
    for kind, path in (('default', where), ('tool_use', more)):
        if os.path.exists(path):
            fields.check_link(folder, os.path.relpath(path, folder), TokenizerError)  # its text is copied
            sources[kind] = fields.read_text(path, TokenizerError, ADVICE)
    if 'default' in sources:
        return sources, where
    path = os.path.join(folder, 'tokenizer_config.json')
    found = read_json(path, OWN)['chat_template'] if os.path.exists(path) else None
    if isinstance(found, str):
        return {'default': found}, path
    table = {'name': fields.text(), 'template': fields.text()}
    for one in found or ():
        fields.check(one, table, f'{path}, chat_template', TokenizerError, ADVICE)
    sources = {one['name']: one['template'] for one in found or ()}
    if sources and 'default' not in sources:
        raise TokenizerError(f'{path} has the chat templates {", ".join(sources)} and no default: --template={NAMES}')
    return sources, path


def token_names(folder, tok):
    """{'bos_token': '<s>', ...} as the folder says; the end of text also if it does not."""
    found = {}
    for file in ('tokenizer_config.json', 'special_tokens_map.json'):  # the second is of older folders
        path = os.path.join(folder, file)
        if os.path.exists(path):
            said = read_json(path, TOKENS)
            found |= {name: name_of(said[name], f'{path}, {name}') for name in KNOWN if said[name] is not None}
            if 'added_tokens_decoder' in said:
                break
    if 'eos_token' not in found and tok.eot is not None:
        found['eos_token'] = name_of_id(tok, tok.eot)
    return found


def name_of_id(tok, i):
    return tok.hf.id_to_token(i) if isinstance(tok, HF) else tok.decode([i])


class Template:
    """sources: jinja as {'default': text, maybe 'tool_use': text}; where: the file or flag that they are from.

    Raises TokenizerError if it is not jinja, or cannot write even one question."""

    def __init__(self, sources, tok, variables, where):
        import jinja2

        self.sources, self.tok, self.variables, self.where = sources, tok, variables, where
        self.environment = environment()
        try:
            self.compiled = {kind: self.environment.from_string(source) for kind, source in sources.items()}
            parsed = [self.environment.parse(source) for source in sources.values()]
        except (jinja2.TemplateError, RecursionError, ValueError, OverflowError) as error:
            line = f'line {error.lineno}: ' if getattr(error, 'lineno', None) else ''
            raise TokenizerError(
                f'{where} is not a template that jinja can read ({line}{error}): use --template={NAMES}'
            ) from None
        literals = [node.data for tree in parsed for node in tree.find_all(jinja2.nodes.TemplateData)]
        literals += [node.value for tree in parsed for node in tree.find_all(jinja2.nodes.Const)]
        literals = '\0'.join(text for text in literals if isinstance(text, str))
        self.special, added = special_names(tok)
        # Some tokenizers do not say of their control tokens that they are special; a template that writes one does.
        self.loose = {name: i for name, i in added.items() if name.strip() and name in literals}
        self.coder = Coder(tok, {**self.special, **self.loose})
        self.ids = [*self.coder.names.values()]
        self.names, self.specials = pattern(self.coder.names), pattern(self.special)
        self.free = [c for c in NONCHARACTERS if not any(c in source for source in sources.values())]
        self.tagged = all(GENERATION.search(source) for source in sources.values())
        self.takes_system = True
        done = finished(self.finds_system, PATIENCE)
        if not done:
            raise TokenizerError(f'{where} did not write one question in {PATIENCE} s: use --template={NAMES}')
        self.takes_system, error = done[0]
        if error:
            raise error

    # ---- writing

    def text(self, messages, generation_prompt=False, tools=None):
        """The conversation as the template writes it. Raises ChatError if it refuses to."""
        return self.write(messages, generation_prompt, tools)

    def write(self, messages, generation_prompt=False, tools=None, signs=('', '')):
        import jinja2

        self.environment.generation_signs = signs
        compiled = self.compiled.get('tool_use' if tools else 'default', self.compiled['default'])
        given = {'tools': tools or None, 'documents': None, 'add_generation_prompt': generation_prompt}
        try:
            return compiled.render(messages=self.prepared(messages), **given, **self.variables)
        except jinja2.exceptions.SecurityError as error:
            raise TokenizerError(
                f'{self.where} tries to leave its sandbox ({error}): do not trust this folder, use --template={NAMES}'
            ) from None
        except Exception as error:  # a template is a program, and can fail in any way
            why = ' '.join(str(error).split())[:200] or type(error).__name__
            raise ChatError(f'{self.where} cannot write this conversation: {why}') from None

    def prepared(self, messages):
        """Messages as templates want them: no null, no field of ours, the system message where there is a place."""
        ours = ('weight', 'train')
        found = [{key: v for key, v in m.items() if v is not None and key not in ours} for m in messages]
        if self.takes_system or not found or found[0]['role'] != 'system':
            return found
        system, *rest = found
        if not rest or rest[0]['role'] != 'user' or not system.get('content'):
            return rest
        before = {
            key: system['content'] + '\n\n' + rest[0][key] for key in ('content', 'instruction') if key in rest[0]
        }
        return [rest[0] | before, *rest[1:]]

    def finds_system(self):
        user = {'role': 'user', 'content': 'question'}
        try:
            alone = self.write([user], True)
        except ChatError as error:
            raise TokenizerError(f'{error}, not even one question: use --template={NAMES}') from None
        if 'question' not in alone:  # some models for pictures want their content in parts
            raise TokenizerError(f'{self.where} leaves out what it is asked: use --template={NAMES}')
        try:
            return 'instructions' in self.write([{'role': 'system', 'content': 'instructions'}, user], True)
        except ChatError:
            return False

    # ---- tokens

    def prompt(self, messages, tools=None):
        """Ids up to where the model's answer begins."""
        signs = self.signs(messages, tools)
        written = self.write(self.shielded(messages, signs), True, self.shielded(tools, signs))
        return self.encode_written([(written, [], signs)])[0][0]

    def encode(self, messages, train_on='all', tools=None):
        """-> ids, trained (list of bool of the same length). train_on: 'all' answers, or the 'last' one.

        An answer whose message says weight 0 or train false is not trained. Raises ChatError."""
        (found,) = self.encode_batch([(messages, tools)], train_on)
        if isinstance(found, ChatError):
            raise found
        return found[:2]

    def encode_batch(self, conversations, train_on='all'):
        """[(messages, tools)] -> for each (ids, trained, bytes of the text that is trained), or the ChatError that says
        what is wrong with it."""
        written = []
        for messages, tools in conversations:
            try:
                written.append(self.spans(messages, train_on, tools))
            except ChatError as error:
                written.append(error)
        coded = iter(self.encode_written([one for one in written if not isinstance(one, ChatError)]))
        return [one if isinstance(one, ChatError) else (*next(coded), trained_bytes(*one)) for one in written]

    def encode_written(self, written):
        """[(ids, trained)] of [(text with signs, its trained spans, its signs)], in one call of the tokenizer."""
        texts, places = [], []
        for text, spans, signs in written:
            cuts = sorted({0, len(text), *(at for span in spans for at in span)})
            parts = [self.signed(text[a:b], signs) for a, b in pairwise(cuts)]
            lengths = [len(part) - part.count(signs[-1]) for part in parts]  # ends do not count signs
            moved = {at: sum(lengths[:i]) for i, at in enumerate(cuts)}
            texts.append((''.join(parts), signs[-1]))
            places.append([(moved[a], moved[b]) for a, b in spans])
        coded = [None] * len(texts)
        for sign in {sign for _, sign in texts}:
            rows = [i for i, (_, one) in enumerate(texts) if one == sign]
            for i, row in zip(rows, self.coder.encode_batch([texts[i][0] for i in rows], sign)):
                coded[i] = row
        return [self.marked(*row, text, spans) for row, text, spans in zip(coded, texts, places)]

    def marked(self, ids, ends, text, spans):
        """-> ids, trained. A token is trained if it ends within a trained span; a special one, which may swallow the
        spaces around it, if it begins there."""
        for a, _ in reversed(spans):
            ids, ends = self.divided(ids, ends, text, a)
        begins = np.concatenate([[0], ends[:-1]])
        special, trained = np.isin(ids, self.ids), np.zeros(len(ids), bool)
        for a, b in spans:
            trained |= np.where(special, (a <= begins) & (begins < b), (a < ends) & (ends <= b))
        ids, trained, bos = list(ids), trained.tolist(), self.tok.bos
        if bos and ids[: len(bos)] != bos:  # once: the template may have written it
            ids, trained = bos + ids, [False] * len(bos) + trained
        return ids, trained

    def divided(self, ids, ends, text, at):
        """The token that begins before an answer and ends in it ("\\n " before a space) made two, if there is one: when
        the model is asked, the text ends there, and that token cannot come."""
        i = int(np.searchsorted(ends, at, 'right'))
        begin = int(ends[i - 1]) if i else 0
        if i == len(ids) or begin >= at or ids[i] in self.ids:
            return ids, ends
        text, sign = text
        text, end, j = text.replace(sign, ''), int(ends[i]), int(np.searchsorted(ends, ends[i], 'right'))
        new = [(start, *self.middle(part, sign)) for start, part in ((begin, text[begin:at]), (at, text[at:end]))]
        ids = [*ids[:i], *(t for _, some, _ in new for t in some), *ids[j:]]
        return ids, np.concatenate([ends[:i], *(start + some for start, _, some in new), ends[j:]])

    def middle(self, text, sign):
        """(ids, ends) of a text that neither begins nor follows a special token."""
        ids, ends = self.coder.encode_batch([sign + text], sign)[0]
        first = int(np.searchsorted(ends, 1, 'right'))  # behind the tokens of the sign, which merges with nothing
        return ids[first:], ends[first:] - 1

    def signs(self, messages, tools=None):
        """Characters that stand nowhere in the conversation: before a name that is text, around what is generated, and
        before a name that is a token."""
        said = json.dumps([messages, tools], ensure_ascii=False)
        free = [c for c in self.free if c not in said]
        if len(free) < 4:
            raise ChatError('it holds nearly all of the characters U+FDD0 to U+FDEF, which no text should')
        return free[0], free[1], free[2], free[3]

    def shielded(self, value, signs, loose=True):
        """The same with a sign before each name of a special token in it. An answer's own <think> stays a token."""
        if isinstance(value, str):
            return (self.names if loose else self.specials).sub(signs[0] + r'\1', value)
        if isinstance(value, list):
            return [self.shielded(one, signs, loose) for one in value]
        if isinstance(value, dict):
            loose = loose and value.get('role') != 'assistant'
            return {self.shielded(k, signs): self.shielded(v, signs, loose) for k, v in value.items()}
        return value

    def signed(self, text, signs):
        """What was written: names with the first sign become text, all others get the last sign, which makes tokens."""
        shield, sign = signs[0], signs[-1]
        either = re.compile(f'{shield}?{self.names.pattern}|{shield}')
        return either.sub(lambda m: m[0].lstrip(shield) if m[0][0] == shield else sign + m[0], text)

    # ---- which characters are trained

    def spans(self, messages, train_on, tools):
        """-> text with signs, [(begin, end)] of its trained characters, the signs."""
        signs = self.signs(messages, tools)
        wanted = [i for i, m in enumerate(messages) if m['role'] == 'assistant']
        if not wanted or messages[-1]['role'] != 'assistant':
            raise ChatError('its last turn is no answer')
        if any(m.get('tool_calls') for m in messages) and not any('tool_calls' in s for s in self.sources.values()):
            raise ChatError(f'{self.where} has no place for tool calls')
        turns = wanted[-1:] if train_on == 'last' else wanted
        turns = [i for i in turns if messages[i].get('weight') != 0 and messages[i].get('train') is not False]
        shielded, tools = self.shielded(messages, signs), self.shielded(tools, signs)
        if self.tagged:
            text, found = self.tagged_spans(shielded, tools, signs)
            if len(found) == len(wanted):
                found = [span for i, span in zip(wanted, found) if i in turns]
            elif turns != wanted:
                raise ChatError(f'{self.where} marks {len(found)} answers as generated, there are {len(wanted)}')
        else:
            text = self.write(shielded, False, tools)
            found = [self.span_of(shielded, i, text, tools, train_on) for i in turns]
        return self.with_end(text, found, signs)

    def tagged_spans(self, messages, tools, signs):
        """The text without the signs of {% generation %}, and what they enclose, with the token that ends the turn: a
        tag may have left it out."""
        shield, begin, end, _ = signs
        at, parts, found = 0, [], []
        for part in re.split(f'([{begin}{end}])', self.write(messages, False, tools, (begin, end))):
            if part == begin and not (found and found[-1][1] == at):  # two that touch are one answer
                found.append((at, at))
            elif part == end:
                found[-1] = (found[-1][0], at)
            elif part != begin:
                parts.append(part)
                at += len(part)
        text, token = ''.join(parts), re.compile(f'(?<!{shield}){self.names.pattern}')
        last = token.match(text, found[-1][1]) if found else None  # what follows the last answer can only end it
        if last:
            found = [(a, b + len(last[0]) if text.startswith(last[0], b) else b) for a, b in found]
        return text, found

    def span_of(self, messages, i, text, tools, train_on):
        """The characters of answer i: what is written with it and was not when it was asked for."""
        asked = self.write(messages[:i], True, tools)
        told = text if i == len(messages) - 1 else self.write(messages[: i + 1], False, tools)
        upto = (
            len(told) if text.startswith(told) else sum(1 for _ in takewhile(lambda p: p[0] == p[1], zip(told, text)))
        )
        upto = min([upto, *(m.start() for m in self.names.finditer(told) if m.start() < upto < m.end())])
        # What a template writes only at the very end, as Phi-3 an end of text, may be missing.
        if not text.startswith(asked) or upto <= len(asked) or self.names.sub('', told[upto:]).strip():
            other = f'--template={NAMES}, or a FILE.jinja with generation tags'
            other = '--train_on=last' if train_on == 'all' and i < len(messages) - 1 else other
            raise ChatError(
                f'{self.where} has no generation tags, and writes the turns before an answer otherwise once it is '
                f'there, so that what is trained cannot be told: use {other}'
            )
        return len(asked), upto

    def with_end(self, text, spans, signs):
        """Spans that end with the token that ends the turn, without what follows it. Where a template writes none after
        the last answer, the end of text comes there."""
        shield = signs[0]
        token = re.compile(f'(?<!{shield}){self.names.pattern}')
        found = []
        for a, b in spans:
            last = next(reversed([*token.finditer(text, a, b)]), None)
            if last and not text[last.end() : b].strip():
                b = last.end()
            elif not text[b:].strip():
                if self.tok.eot is None:
                    raise TokenizerError(f'{self.where} writes no end of turn, and the tokenizer has no end of text')
                name = name_of_id(self.tok, self.tok.eot)
                text, b = text[:b] + name, b + len(name)
            found.append((a, b))
        return text, found, signs


def trained_bytes(text, spans, signs):
    plain = (re.sub('[' + ''.join(signs) + ']', '', text[a:b]) for a, b in spans)
    return sum(len(part.encode('utf-8', 'replace')) for part in plain)
