"""
Examples with a label each (data/labelled.py) under a model that classifies: what it predicts, and how good that is.

    logits, targets, sources = predictions(model, data, data.evaluation(n, 16), 'cpu')       # (n, labels), (n,), (n,)
    judged(data, logits, targets)     # {'loss': 0.61, 'matthews': 0.41}, and a sentence for what is not defined
"""

import torch
import torch.nn.functional as F

from adam import average_
from data import agreement
from data.batches import keywords
from model import ModelError
from plumbing import hf_models


@torch.no_grad()
def predictions(model, data, batches, device, rank=0, world=1, tell=lambda rows: None):
    """-> logits (n, labels) fp32, targets (n,) and sources (n,), on the CPU. Processes share the batches. tell: is told
    how many rows are done."""
    logits, targets, sources, rows = [], [], [], 0
    for i, (x, y, source, *more) in enumerate(batches):
        made = torch.zeros(len(y), max(len(data.labels), 1), device=device)  # (B, labels)
        if i % world == rank:
            named = {name: part.to(device) for name, part in keywords(y, [None, *more]).items()}
            made += model(x.to(device), **named).float()
        logits.append(made)
        targets.append(y)
        sources.append(source)
        rows += len(y)
        tell(rows)
    logits = average_(torch.cat(logits)) * world
    return logits.cpu(), torch.cat(targets), torch.cat(sources)


def judged(data, logits, targets):
    """-> {'loss': mean in nats, or squared error of numbers; the metrics of the data by name}, and a sentence for each
    that is not defined. data: Labelled."""
    if data.labels:
        loss, predicted = F.cross_entropy(logits.double(), targets), logits.argmax(1)
    else:
        loss, predicted = F.mse_loss(logits[:, 0].double(), targets.double()), logits[:, 0]
    found, notes = agreement.scores(data.metrics, predicted.numpy(), targets.numpy())
    return {'loss': loss.item(), **found}, notes


def judged_by_source(data, logits, targets, sources):
    """The same, and where there are several sources, as MNLI's dev splits, each metric of each alone, too:
    accuracy_matched."""
    found, notes = judged(data, logits, targets)
    present = sources.unique().tolist()
    for i in present if len(present) > 1 else ():
        alone, more = judged(data, logits[sources == i], targets[sources == i])
        found |= {f'{name}_{data.sources[i]}': alone[name] for name in data.metrics}
        notes += [f'of {data.sources[i]}: {note}' for note in more]
    return found, notes


def named(model):
    """The names of the labels that a model's config has, in its order; None where it has only numbers."""
    names = [str(name).lower() for _, name in sorted(model.inner.config.id2label.items())]
    return None if any(name.startswith('label_') for name in names) else names


def name_labels(model, labels):
    """Write the names of the labels into the model's config. -> a sentence if its head has them in another order."""
    old, config = named(model), model.inner.config
    if labels:
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    if old and old != [*labels] and sorted(old) == sorted(labels):
        return f'the head was trained with the labels in another order ({", ".join(old)}), and has to learn this one'


def in_order(model, data, logits):
    """logits (n, labels) in the order that the data has the labels in. Raises ModelError if the model has others."""
    names = named(model)
    if not (data.labels and names):
        return logits
    if sorted(names) != sorted(data.labels):
        raise ModelError(f'the model tells {", ".join(names)} apart, the data {", ".join(data.labels)}: name its own')
    return logits[:, [names.index(name) for name in data.labels]]


def check_head(folder, labels):
    """Raise ModelError if a folder has no classifier, one of another number of labels, or, for labels=0, one at all."""
    has = hf_models.labels_of(folder)
    if has and not labels:
        what = 'is a classifier, which writes no text and has no loss of tokens'
        raise ModelError(f'{folder} {what}: python eval.py {folder} --data=glue/TASK judges it')
    if labels and not has:
        raise ModelError(f'{folder} has no classifier: train one, train.py --task=classify --init_from={folder}')
    if has != labels:
        raise ModelError(f'the classifier of {folder} has {has} outputs, the data {labels}: name the data of its task')
