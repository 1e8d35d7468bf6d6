r"""
Three tasks as prompts that a language model goes on from, as MeZO and CoLM have them (arXiv 2305.17333, 2407.19580).

    python data/superglue/prepare.py --task=sst2 --tokenizer=MODEL_FOLDER                  # fetches it from the hub
    python data/superglue/prepare.py --task=cb --tokenizer=MODEL_FOLDER --input=my/CB      # train.jsonl and val.jsonl
    python data/superglue/prepare.py --task=multirc --tokenizer=MODEL_FOLDER --clusters=16         # sources, for CoLM
    python eval.py out/run --data=choice:data/superglue/sst2/val.jsonl                     # accuracy, by likelihood

Then train with --dataset=superglue/sst2. Only the tokens of the answer are trained; what is too long loses the
beginning of its prompt. Train is --examples of the train split, drawn by --seed; val is all of the validation split.

| task | prompt | answers, by label |
|---|---|---|
| sst2 | SENTENCE It was | terrible, great |
| cb | Suppose PREMISE Can we infer that "HYPOTHESIS"? Yes, No, or Maybe?\n | Yes, No, Maybe |
| multirc | PARAGRAPH\nQuestion: QUESTION\nI found this answer "ANSWER". Is that correct? Yes or No?\n | No, Yes |

These data name no sources, by which CoLM chooses. --clusters=K makes K of them: k-means of what the model's last layer
holds at the end of each prompt (scikit-learn, transformers). The paper first trains 20 steps, and clusters again four
times: prepare with --model=out/run/last, then go on with --init_from=resume.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from data import DataError, common, examples, fields, files, questions  # noqa: E402
from data.duplicates import Duplicates  # noqa: E402
from data.glue import prepare as glue  # noqa: E402

BATCH = 8  # prompts at a time whose hidden states are computed


@dataclass(frozen=True)
class Task:
    """folder: its name in SuperGLUE or GLUE; hub: repository and config; prompt: with the columns in braces; answers:
    by label; words: what a local file has for each label."""

    folder: str
    hub: tuple
    prompt: str
    answers: tuple
    words: tuple


TASKS = {
    'sst2': Task('SST-2', ('nyu-mll/glue', 'sst2'), '{sentence} It was', ('terrible', 'great'), ('0', '1')),
    'cb': Task(
        'CB', ('aps/super_glue', 'cb'),
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        ('Yes', 'No', 'Maybe'), ('entailment', 'contradiction', 'neutral'),
    ),
    'multirc': Task(
        'MultiRC', ('aps/super_glue', 'multirc'),
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
        ('No', 'Yes'), ('0', '1'),
    ),
}  # fmt: skip
COLUMNS = {'sst2': ('sentence',), 'cb': ('premise', 'hypothesis'), 'multirc': ('paragraph', 'question', 'answer')}
SPLITS = {'train': 'train', 'val': 'validation'}  # ours: the hub's


# ---- rows ------------------------------------------------------------------------------------------------------------


def local(name, given):
    """Yield (place, split, row) of train.jsonl and val.jsonl in a folder, or of SST-2's .tsv files."""
    folder = Path(given) / TASKS[name].folder
    folder = folder if folder.is_dir() else Path(given)
    if name == 'sst2' and (folder / 'train.tsv').exists():
        for place, split, _, (text,), label in glue.local('sst2', str(folder), examples.Drops()):
            yield place, split, {'sentence': text, 'label': label}
        return
    for split in SPLITS:
        if not (folder / f'{split}.jsonl').exists():
            raise DataError(f'--input={given} holds no {split}.jsonl: name the folder of {TASKS[name].folder}')
        for place, row in files.rows(folder / f'{split}.jsonl'):
            for one in flat(row, place) if name == 'multirc' else [row]:
                yield place, split, one


def flat(row, place):
    """The answers of a row of MultiRC, which SuperGLUE's files have inside questions inside a passage."""
    if 'passage' not in row:
        return [row]
    try:
        passage = row['passage']
        return [
            {'paragraph': passage['text'], 'question': q['question'], 'answer': a['text'], 'label': a['label']}
            for q in passage['questions']
            for a in q['answers']
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f'{place} is not in the format of MultiRC (it lacks {error}): mend it') from None


def from_hub(name):
    for split, theirs in SPLITS.items():
        for n, row in enumerate(examples.from_hub('superglue', *TASKS[name].hub, theirs), 1):
            yield f'{TASKS[name].hub[0]} {theirs} {n}', split, row


def asked(name, row, place):
    """-> the prompt of a row, and its label, a number. Raises DataError."""
    task = TASKS[name]
    for column in COLUMNS[name]:
        if not isinstance(row.get(column), str):
            raise DataError(f'{place} is not in the format of {task.folder}: it lacks {column}, a text')
    label = row.get('label')
    if type(label) is bool or label is None or str(label) not in (*task.words, *map(str, range(len(task.words)))):
        raise DataError(f'{place}: the label is {fields.shown(label)}, not {" or ".join(task.words)}')
    label = task.words.index(str(label)) if str(label) in task.words else int(label)
    return task.prompt.format(**{column: row[column] for column in COLUMNS[name]}), label


def drawn(rows, limit, seed):
    """So many rows of the train split, in their order, and all of val."""
    train = [row for row in rows if row[1] == 'train']
    return [*questions.drawn(train, limit, seed), *(row for row in rows if row[1] == 'val')]


# ---- clusters --------------------------------------------------------------------------------------------------------


def hidden_states(folder, tok, prompts, longest):
    """What the last layer of the model in a folder holds at the last token of each prompt: (n, D) float32."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise DataError(f'--clusters needs {error.name}: pip install -r requirements-extra.txt') from None
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval()
        model.config.use_cache = False
    except Exception as error:  # transformers has all kinds
        said = (str(error).splitlines() or [''])[0][:200]
        raise DataError(f'--clusters needs a model, and {folder} holds none that transformers reads ({said})') from None
    ids = [cut(tok, [*tok.bos, *one], longest) for one in tok.encode_batch(prompts)]
    found = [None] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    for some in (order[a : a + BATCH] for a in range(0, len(order), BATCH)):
        x = torch.zeros(len(some), len(ids[some[0]]), dtype=torch.int64)
        for b, i in enumerate(some):
            x[b, : len(ids[i])] = torch.tensor(ids[i])  # behind a row's end, where a causal model does not look
        with torch.no_grad():
            h = model(input_ids=x.to(device)).last_hidden_state.float().cpu()  # (B, T, D)
        for b, i in enumerate(some):
            found[i] = h[b, len(ids[i]) - 1].numpy()
    return np.stack(found)


def clusters_of(states, is_train, k, seed):
    """The cluster of each of (n, D) states, by k-means over those of the train split."""
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise DataError('--clusters needs scikit-learn: pip install -r requirements-extra.txt') from None
    if k > is_train.sum():
        raise DataError(f'--clusters={k} is more than the {is_train.sum()} examples of train: use fewer')
    return KMeans(k, n_init=10, random_state=seed).fit(states[is_train]).predict(states)


# ---- the folder ------------------------------------------------------------------------------------------------------


class Writer(examples.RowWriter):
    kinds = examples.ExampleWriter.kinds


def cut(tok, ids, longest):
    """The last of the ids, behind what every text begins with."""
    if len(ids) <= longest:
        return ids
    kept = tok.bos if ids[: len(tok.bos)] == tok.bos else []
    return [*kept, *ids[len(kept) - longest :]]


def prepare(name, rows, out_dir, folder, made_by, max_tokens=None, limit=1000, clusters=0, model=None, seed=1):
    """Write the folder, and val.jsonl beside it. rows: (place, split, row). -> meta, the report."""
    folder = common.model_folder(folder)
    task, tok = TASKS[name], common.choose_tokenizer(folder, None, None)
    folder = folder if os.path.isdir(folder) else None
    if folder and os.path.realpath(folder) == os.path.realpath(out_dir):
        raise DataError(f'--out_dir={out_dir} is the folder of the model, whose files it would replace: name another')
    longest = max_tokens or min(
        examples.LENGTH, examples.model_config(folder)['max_position_embeddings'] or examples.LENGTH
    )
    rows = [(place, split, *asked(name, row, place)) for place, split, row in drawn(list(rows), limit, seed)]
    sources = [name] * len(rows)
    if clusters:
        states = hidden_states(model or folder, tok, [prompt for *_, prompt, _ in rows], longest)
        of_train = np.array([split == 'train' for _, split, _, _ in rows])
        sources = [f'cluster_{i:02d}' for i in clusters_of(states, of_train, clusters, seed)]
    report, seen = examples.Report(tok, longest), Duplicates()
    with Writer(out_dir, tok, made_by, folder, template='the prompts of CoLM', max_tokens=longest) as out:
        for (_, split, prompt, label), source in sorted(zip(rows, sources), key=lambda one: one[1]):
            answer = ' ' * (not prompt.endswith('\n')) + task.answers[label]
            ids, trained = questions.continued(tok, prompt, answer)
            report.cut += len(ids) > longest
            ids = cut(tok, ids, longest)
            trained = trained[len(trained) - len(ids) :]
            out.add_row(source, split, ids, len(answer.encode()), sum(trained), trained=np.array(trained, np.uint8))
            report.add(source, ids, trained)
            seen.add(prompt, split)
        out.extra |= {'dropped': 0, 'truncated': report.cut}
        choices = [
            dict(prompt=p, choices=[*task.answers], label=label) for _, split, p, label in rows if split == 'val'
        ]
        out.files['val.jsonl'] = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in choices)
    report.drops, report.seen = examples.Drops(), seen
    return out.meta, report


def main():
    parser = common.parser(__doc__)
    parser.add_argument('--task', required=True, choices=[*TASKS], help='of GLUE or SuperGLUE')
    parser.add_argument('--tokenizer', required=True, help="the model's folder, or its name on the hub")
    parser.add_argument(
        '--input', default=None, help="the task's folder with train.jsonl and val.jsonl (SST-2: or .tsv)"
    )
    parser.add_argument('--examples', type=int, default=1000, help='of the train split; 0: all')
    parser.add_argument('--clusters', type=int, default=0, help='sources to make by k-means, 16 with CoLM; 0: one')
    parser.add_argument(
        '--model', default=None, help="whose hidden states are clustered; the tokenizer's folder if not given"
    )
    parser.add_argument(
        '--max_tokens', type=examples.positive, default=None, help='longest example; 2,048 or the context'
    )
    parser.add_argument('--seed', type=int, default=1, help='of what --examples draws and where k-means begins')
    parser.add_argument('--out_dir', type=common.folder, default=None, help='data/superglue/TASK if not given')
    args, start = parser.parse_args(), time.time()
    if min(args.examples, args.clusters, args.seed) < 0:
        raise DataError('--examples, --clusters and --seed are no less than 0')
    if args.model and not args.clusters:
        raise DataError('--model is of --clusters: give both, or leave it out')
    out_dir = args.out_dir or str(HERE / args.task)
    rows = local(args.task, args.input) if args.input else from_hub(args.task)
    how = (args.max_tokens, args.examples, args.clusters, args.model, args.seed)
    meta, report = prepare(args.task, rows, out_dir, args.tokenizer, common.made_by('superglue'), *how)
    report.print(meta, out_dir, time.time() - start)
    print(f'to score: python eval.py RUN --data=choice:{os.path.join(out_dir, "val.jsonl")}')


if __name__ == '__main__':
    common.run(main)
