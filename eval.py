"""
Score checkpoints: loss per source, exact answers by GSM8K's and MATH's rules, multiple choice, GLUE's metrics of a
classifier; several side by side.

    python eval.py out/run --data=data/instruct                           # loss of a prepared folder's val split
    python eval.py out/run path/to/base --data=gsm8k:test.jsonl           # before and after: answers are generated
    python eval.py out/run --data=gsm8k:test.jsonl --limit=200 --answers=out/answers.jsonl
    python eval.py path/to/base --data=math:val.jsonl --shots=4 --shots_from=train.jsonl
    python eval.py out/run --data=choice:sst2.jsonl,data/text --json
    python eval.py out/cola,out/cola_lora --data=glue/cola                # of runs with --task=classify

A share comes with its 95 % interval (Wilson): 30 % of 100 questions may be 22 to 40 % of all there are. Nothing that a
model writes is run.
"""

import sys

import configurator
from plumbing import terminal

if __name__ == '__main__':  # before the imports that take seconds
    terminal.quiet_ctrl_c()
    config = configurator.load_or_exit(__file__, sys.argv[1:], positional='checkpoints', several=True)

import math
import os
from itertools import islice
from json import dumps

import numpy as np
import torch
from tqdm import tqdm

import sample
from data import DataError, chat, questions, tokenizer
from data.batches import Examples, Labelled, Tokens, longest_of, of_task, read_meta
from data.tasks import TASKS
from head import blocks_of_rows, cross_entropy_rows
from model import ModelError
from plumbing import Stop, classify
from plumbing.build import ROOT, check_tokenizer, data_sets, meant
from plumbing.hf import AdapterError
from plumbing.scores import ANSWERS, LABELS, LOSSES, LabelTally, Tally, table, with_totals

# ---- config ----------------------------------------------------------------------------------------------------------
checkpoints = ''  # folders of runs (best/, else last/), of weights or of adapters, or names on the hub, with commas
data = ''  # what to score, separated by commas: a prepared folder (loss alone), FILE.jsonl with questions and answers,
#            gsm8k:FILE.jsonl, math:FILE.jsonl or choice:FILE.jsonl; gsm8k and math alone are downloaded
score = 'all'  # 'all' | 'loss' | 'answers': of questions, the loss of their right answers, what the model answers, both
limit = 0  # score only so many questions of each file, or windows or examples of each folder; 0: all
split = 'val'  # 'train' | 'val': of a prepared folder
block_size = 1024  # tokens in a window of text; less where the model's own is shorter
template = ''  # chat template, a name of data/templates.py; '': the model's own, else a plain "Question: ... Answer:"
shots = 0  # solved questions before each one
shots_from = ''  # .jsonl file that they are from
tokens = 512  # longest answer
temperature = 0.0  # 0 always takes the likeliest token; above 0 each question has a generator of seed + its number
batch_size = 16  # answers or windows at a time
answers = ''  # also write each prompt, answer and verdict to this .jsonl file; '': no
json = False  # print JSON instead of tables
seed = 1  # of what `limit` and `shots` draw, and of sampled answers
device = 'auto'  # 'auto' | 'cpu' | 'cuda': auto uses cuda if it is available
# ---- end of config ---------------------------------------------------------------------------------------------------


def problems(config):
    """One sentence for each key that cannot work."""
    found = []
    if not config.checkpoints:
        found.append('no checkpoint: type python eval.py FOLDER --data=gsm8k:FILE.jsonl, several folders side by side')
    if not config.data:
        found.append('no data: add --data=FOLDER of a prepared data set, or --data=gsm8k:FILE.jsonl')
    if config.temperature < 0:
        found.append(f'temperature={config.temperature} is negative: use 0 or more')
    if bool(config.shots) != bool(config.shots_from):
        found.append('shots says how many solved questions, shots_from their .jsonl file: give both or neither')
    found += configurator.at_least(config, 0, 'limit', 'shots')
    found += configurator.at_least(config, 1, 'tokens', 'batch_size', 'block_size')
    if config.answers and os.path.lexists(config.answers):
        found.append(f'{config.answers} is there already: choose another name for --answers')
    if config.device == 'cuda' and not torch.cuda.is_available():
        found.append("device='cuda', but torch sees no CUDA device: use --device=cpu, or install a CUDA build of torch")
    return found


noted = set()


def note(text):
    """Say it once."""
    if text not in noted:
        noted.add(text)
        print(f'note: {text}', file=sys.stderr, flush=True)


# ---- likelihood ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_likelihoods(model, sequences, batch_size):
    """(key, ids, trained) -> yield (key, ids, trained, nats of its trained tokens together), in another order.

    Rows are padded behind their end, where a causal model does not look; the loss is fp32 whatever the model is in."""
    sequences, device = iter(sequences), model.head.device
    while block := list(islice(sequences, 32 * batch_size)):
        block.sort(key=lambda one: len(one[1]))  # neighbours of one length need no padding
        for some in (block[a : a + batch_size] for a in range(0, len(block), batch_size)):
            T = len(some[-1][1]) - 1
            x = torch.zeros(len(some), T, dtype=torch.int64)  # (B, T)
            y = torch.full((len(some), T), -100)
            for b, (_, ids, trained) in enumerate(some):
                ids, trained = torch.as_tensor(ids), torch.as_tensor(trained)
                x[b, : len(ids) - 1] = ids[:-1]
                y[b, : len(ids) - 1] = torch.where(trained[1:], ids[1:], -100)
            keep = (y != -100).to(device)  # (B, T)
            h, targets = model.hidden(x.to(device))[keep], y.to(device)[keep]  # (n, D), (n,)
            W, bias, blocks = model.head.to(h.dtype), model.head_bias, blocks_of_rows(len(h))
            losses = [cross_entropy_rows(h[rows], W, targets[rows], bias=bias)[0] for rows in blocks]  # (n,)
            nats = torch.zeros(len(some), dtype=torch.float64, device=device)
            nats.index_add_(0, keep.nonzero()[:, 0], torch.cat(losses).double())
            for one, loss in zip(some, nats.tolist()):
                yield *one, loss


def add_losses(model, tok, sequences, tallies, config, n, what):
    """Score (source, ids, trained), n of them, into the tallies of their sources."""
    sequences = tqdm(sequences, what, total=n, delay=3, leave=False, disable=None)
    for source, ids, trained, nats in log_likelihoods(model, sequences, config.batch_size):
        if not math.isfinite(nats):
            raise ModelError(sample.NO_NUMBERS)
        counted = [int(i) for i, kept in zip(ids[1:], trained[1:]) if kept]
        tally = tallies[source]
        tally.nats, tally.tokens, tally.examples = tally.nats + nats, tally.tokens + len(counted), tally.examples + 1
        tally.bytes += len(tok.decode([i for i in counted if i not in tok.special]).encode('utf-8', 'replace'))


def fitted(ids, trained, window, tok):
    """The same, cut from the left to the window, behind the BOS."""
    if len(ids) <= window + 1:
        return ids, trained
    note(f'what is longer than the window of {window:,} tokens is cut from the left')
    kept = tok.bos if list(ids[: len(tok.bos)]) == tok.bos else []
    tail = window + 1 - len(kept)
    return [*kept, *ids[-tail:]], [*[False] * len(kept), *trained[-tail:]]


def score_folder(config, path, checkpoint, model, tok, folder, tallies):
    """The loss of a prepared folder, per source: of text in windows, of examples whole."""
    meta = read_meta(path)
    check_tokenizer(folder, path)
    sources = [source['name'] for source in meta['sources']]
    for name in sources:
        tallies[path, name] = Tally(checkpoint, path, name)
    of_source, window = {i: tallies[path, name] for i, name in enumerate(sources)}, model.config.block_size
    if meta['examples']:
        data = Examples(path, config.split, longest_of(path, config.split), packing=False)
        some = questions.drawn(range(len(data.ends)), config.limit, config.seed)
        sequences = ((i, *fitted(ids, trained, window, tok)) for i, ids, trained in examples(data, some))
        n = len(some)
    else:
        T = min(config.block_size, window)
        text = Tokens(path, config.split, T)
        n = min(config.limit or 2**60, (len(text.tokens) - 1) // T)
        windows = ((x[0], y[0], source.item()) for x, y, source in text.evaluation(n * T, 1))
        sequences = ((source, torch.cat([x[:1], y]), torch.ones(T + 1, dtype=torch.bool)) for x, y, source in windows)
    add_losses(model, tok, sequences, of_source, config, n, path)


def examples(data, some):
    """Yield (source's index, ids, trained) of these examples of a prepared folder."""
    for i in some:
        rows = slice(data.starts[i], data.ends[i])
        source = int(np.searchsorted(data.source_ends, i, side='right'))
        yield source, data.tokens[rows].astype(np.int64), data.trained[rows].astype(bool)


# ---- labels ----------------------------------------------------------------------------------------------------------


def labels_of(paths):
    """How many labels the examples of these folders have, 1 for a number, 0 for none: None is a file, and has none.

    Raises Stop where one model cannot be judged by all of them."""
    metas = {path: read_meta(place) if place else {'task': 'lm'} for path, place in paths.items()}
    counts = {path: len(m['labels']) or 1 if m['task'] == 'classify' else 0 for path, m in metas.items()}
    for path, n in counts.items():
        if n != (first := next(iter(counts.values()))):
            raise Stop(f'{path} has {n or "no"} labels, {next(iter(counts))} {first or "none"}: score them apart')
    return first


def score_labelled(config, path, place, checkpoint, model, tok, folder, tallies, out):
    """What a classifier says of a prepared folder of labelled examples."""
    check_tokenizer(folder, place)
    data = Labelled(place, config.split, longest_of(place, config.split))
    some = np.array(questions.drawn(range(len(data.ends)), config.limit, config.seed))
    some = some[np.argsort(-data.lengths[some], kind='stable')]  # neighbours of one length need no padding
    parts = [some[a : a + config.batch_size] for a in range(0, len(some), config.batch_size)]
    bar = tqdm(map(data.read, parts), path, len(parts), delay=3, leave=False, disable=None)
    logits, targets, sources = classify.predictions(model, data, bar, model.head.device)
    if not logits.isfinite().all():
        raise ModelError(sample.NO_NUMBERS)
    logits = classify.in_order(model, data, logits)
    for i in sources.unique().tolist():
        mine, name = sources == i, data.sources[i]
        tallies[path, name] = LabelTally(checkpoint, path, name, data, logits[mine], targets[mine])
    shown = (lambda value: data.labels[int(value)]) if data.labels else float
    for at in np.argsort(some, kind='stable').tolist() if config.answers else ():
        said = logits[at].argmax() if data.labels else logits[at, 0]
        ids = data.tokens[data.starts[some[at]] : data.ends[some[at]]]
        where = {'checkpoint': checkpoint, 'data': path, 'source': data.sources[int(sources[at])]}
        row = {'text': tok.decode(ids), 'reference': shown(targets[at]), 'answer': shown(said)}
        print(dumps(where | row | {'logits': logits[at].tolist()}, ensure_ascii=False), file=out, flush=True)


# ---- questions -------------------------------------------------------------------------------------------------------


STOP = 'Question:'  # what the plain prompt of a base model goes on with after its answer


def template_of(config, folder, tok):
    """-> the chat template that asks, and what ends an answer besides the ends of text."""
    if config.template or chat.own(folder)[0]:
        return chat.load(folder, tok, config.template or None), ''
    note(
        f'{folder} has no chat template, so it is asked plainly, "Question: ... Answer:" (--template=NAME changes that)'
    )
    return chat.load(folder, tok, 'qa'), STOP


def score_questions(config, path, rows, checkpoint, model, tok, folder, tallies, out):
    """The loss of the right answers, the likeliest choices, the answers that the model writes."""
    plain = all(q.literal for q in rows)  # prompts, which the choices go on from as they stand
    if plain and config.shots:
        raise DataError(f'shots are of questions, and {path} holds prompts: leave them out')
    (template, stop), solved = (None, '') if plain else template_of(config, folder, tok), []
    for q in questions.drawn(questions.find(config.shots_from), config.shots, config.seed) if config.shots else ():
        if q.rule == 'choice':
            raise DataError(f'{config.shots_from} holds choices: shots are questions with written answers')
        solved += [*q.messages, {'role': 'assistant', 'content': q.answer}]
    solved = [message | {'weight': 0} for message in solved]  # their loss does not count
    for q in rows:
        tallies.setdefault((path, q.source), Tally(checkpoint, path, q.source))
    of_source = {q.source: tallies[path, q.source] for q in rows}
    written = [q for q in rows if q.rule != 'choice']
    if written and config.score != 'answers':
        coded = told(template, written, solved, model.config.block_size, tok)
        add_losses(model, tok, coded, of_source, config, len(written), f'{path}: loss')
    if config.score == 'loss':
        return
    if choices := [q for q in rows if q.rule == 'choice']:
        choose(config, path, choices, solved, template, model, tok, of_source, out)
    if asked := [q for q in rows if q.rule in TASKS]:
        answer(config, path, asked, solved, template, stop, model, tok, folder, of_source, out)


def told(template, rows, solved, window, tok):
    """Yield (source, ids, trained) of each question with its right answer."""
    for some in (rows[a : a + 64] for a in range(0, len(rows), 64)):
        both = [([*solved, *q.messages, {'role': 'assistant', 'content': q.answer}], q.tools) for q in some]
        for q, coded in zip(some, template.encode_batch(both)):
            if isinstance(coded, chat.ChatError):
                note(f'left out of the loss: {coded}')
            else:
                yield q.source, *fitted(*coded[:2], window, tok)


def candidates(q, solved, template, tok):
    """(ids, trained) of each choice: what the model is asked, and the choice, whose tokens count."""
    for text in q.choices:
        if q.literal:
            asked = q.messages[0]['content']
            space = '' if text[:1].isspace() or asked[-1:].isspace() else ' '
            yield questions.continued(tok, asked, space + text)
        else:
            ids, trained = template.encode([*solved, *q.messages, {'role': 'assistant', 'content': text}], 'last')
            last = len(trained) - 1 - trained[::-1].index(True)
            trained[last] = ids[last] not in tok.special  # not the end of the turn
            yield ids, trained


def choose(config, path, rows, solved, template, model, tok, tallies, out):
    """Of each question the choice whose tokens have the highest mean log-probability (MeZO, 2305.17333)."""
    window, means = model.config.block_size, {}
    coded = ((i, c, one) for i, q in enumerate(rows) for c, one in enumerate(candidates(q, solved, template, tok)))
    sequences = (((i, c), *fitted(*one, window, tok)) for i, c, one in coded)
    bar = tqdm(sequences, f'{path}: choices', sum(len(q.choices) for q in rows), delay=3, leave=False, disable=None)
    for (i, c), _, trained, nats in log_likelihoods(model, bar, config.batch_size):
        means.setdefault(i, {})[c] = -nats / max(sum(trained[1:]), 1)
        if len(means[i]) == len(rows[i].choices):
            each = [means[i][c] for c in range(len(means[i]))]  # they come in another order
            best = each.index(max(each))
            count(tallies[rows[i].source], {'exact': best == rows[i].answer})
            record(out, rows[i], tallies, answer=rows[i].choices[best], log_probabilities=each)


def answer(config, path, rows, solved, template, stop, model, tok, folder, tallies, out):
    """Let the model answer each question, and judge what it wrote."""
    window, ends, tokens = model.config.block_size, tokenizer.ends(folder, tok), config.tokens
    if tokens >= window:
        if configurator.typed(config, 'tokens'):
            raise Stop(f'tokens={tokens} leaves no room for a question in a window of {window:,}: use fewer')
        tokens = max(window // 2, 1)
        note(f'answers are cut at {tokens} tokens, half of the window of {folder}')
    ends = [*ends, *sample.turn_ends(template)]
    bar = tqdm(rows, f'{path}: prompts', delay=3, leave=False, disable=None)
    prompts = [template.prompt([*solved, *q.messages], q.tools) for q in bar]
    prompts = [fitted(ids, [False] * len(ids), window - tokens - 1, tok)[0] for ids in prompts]
    stops = (lambda ids: stop in tok.decode(ids[-16:])) if stop else None
    made = sample.generate_batch(
        model, prompts, tokens, ends, config.batch_size, stops, config.temperature, seed=config.seed
    )
    right = 0
    bar = tqdm(made, f'{path}: answers', len(rows), delay=3, leave=False, disable=None)
    for n, (i, ids) in enumerate(bar):
        q, text = rows[i], ''.join(tok.decode_stream(ids, prompts[i]))
        text, stopped, _ = text.partition(stop) if stop else (text, '', '')
        verdict = TASKS[q.rule].judge(text, q.answer)
        cut = ids[-1] not in ends and not stopped
        count(tallies[q.source], verdict, cut)
        record(out, q, tallies, answer=text, cut=cut, **verdict)
        right += bool(verdict['exact'])
        bar.set_postfix_str(f'{right} of {n + 1} right')


def count(tally, verdict, cut=False):
    tally.questions += 1
    tally.cut += cut
    tally.no_answer += verdict['exact'] is None
    for rule, said in verdict.items():
        tally.right[rule] = tally.right.get(rule, 0) + bool(said)


def record(out, q, tallies, **what):
    """A line of --answers."""
    where = {'checkpoint': tallies[q.source].checkpoint, 'data': tallies[q.source].data, 'source': q.source}
    asked = {'question': q.messages[-1]['content'], 'reference': q.answer}
    print(dumps(where | asked | what, ensure_ascii=False), file=out, flush=True)


# ---- what is printed -------------------------------------------------------------------------------------------------


def report(config, tallies):
    tallies = with_totals(tallies)
    found = [summary for tally in tallies if len(summary := tally.summary()) > 3]
    if config.json:
        print(dumps(found))
        return
    lines = [part for part in (table(found, columns) for columns in (LOSSES, ANSWERS, LABELS)) if part]
    if lines:
        print('\n\n'.join('\n'.join(part) for part in lines))
    if any('strict' in one for one in found):
        print('\nexact: our rule; strict, flexible: those of lm-evaluation-harness; cut: at the longest answer')
        print('none: answers in which our rule finds none; what is not an answer is never right')


def prepared(path):
    """The folder that prepare.py filled, named as it is or as in --dataset; None for a file, or a rule's own data."""
    word, colon, file = path.partition(':')
    if os.path.exists(path) or word in questions.RULES:
        return path if os.path.isdir(path) else None
    if os.path.isdir(ours := os.path.join(ROOT, 'data', path)) or of_task(ours):
        return ours
    if near := meant(word, [*questions.RULES, *data_sets()]):
        what = 'name a prepared folder, a file of questions (.jsonl, .parquet), or a rule and its file'
        raise DataError(f'{path} is no file or data set here{near.replace("?", colon + file + "?")}: {what}')
    return None


def main(config):
    device = config.device if config.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    # What cannot be scored is said at once, not after hours of what can.
    places = {name: sample.located(name) for name in map(str.strip, config.checkpoints.split(','))}
    paths = {path: prepared(path) for path in map(str.strip, config.data.split(','))}
    labels = labels_of(paths)
    sets = {path: None if place else questions.find(path) for path, place in paths.items()}
    sets = {path: rows and questions.drawn(rows, config.limit, config.seed) for path, rows in sets.items()}
    tallies = {}
    try:
        with open(config.answers or os.devnull, 'x' if config.answers else 'w', encoding='utf-8') as out:
            for checkpoint, place in places.items():
                model, tok, folder = sample.load(place, device, labels=labels)
                here = tallies[checkpoint] = {}
                with sample.decoded(model):
                    for path, rows in sets.items():
                        if labels:
                            score_labelled(config, path, paths[path], checkpoint, model, tok, folder, here, out)
                        elif rows is None:
                            score_folder(config, paths[path], checkpoint, model, tok, folder, here)
                        else:
                            score_questions(config, path, rows, checkpoint, model, tok, folder, here, out)
                del model
    finally:  # what was scored until an error or Ctrl-C is not lost
        report(config, [tally for here in tallies.values() for tally in here.values()])


if __name__ == '__main__':
    configurator.check_or_exit(config, __file__, problems)
    sys.stdout.reconfigure(errors='backslashreplace')
    terminal.imported()
    try:
        main(config)
    except (ModelError, DataError, Stop, tokenizer.TokenizerError, AdapterError, OSError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        print('interrupted: the table holds what was scored until then', file=sys.stderr)
        sys.exit(130)
