"""
Examples with a label each (data/labelled.py) under a model that classifies: what it predicts, and how good that is.

    logits, targets, sources = predictions(model, data, data.evaluation(n, 16), 'cpu')       # (n, labels), (n,), (n,)
    judged(data, logits, targets, sources)     # {'loss': 0.61, 'matthews': 0.41}, and a sentence for what is undefined
"""

import torch
import torch.nn.functional as F

from adam import average_
from data import agreement
from data.batches import keywords


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


def judged(data, logits, targets, sources):
    """-> {'loss': mean in nats, or squared error of numbers; the metrics of the data by name}, and sentences. Where
    there are several sources (MNLI's dev splits) each metric comes again of each alone, as accuracy_matched."""
    if data.labels:
        loss, predicted = F.cross_entropy(logits.double(), targets), logits.argmax(1)
    else:
        loss, predicted = F.mse_loss(logits[:, 0].double(), targets.double()), logits[:, 0]
    found, notes = agreement.scores(data.metrics, predicted.numpy(), targets.numpy())
    present = sources.unique().tolist()
    for i in present if len(present) > 1 else ():
        mine = (sources == i).numpy()
        alone, more = agreement.scores(data.metrics, predicted.numpy()[mine], targets.numpy()[mine])
        found |= {f'{name}_{data.sources[i]}': value for name, value in alone.items()}
        notes += [f'of {data.sources[i]}: {note}' for note in more]
    return {'loss': loss.item(), **found}, notes
