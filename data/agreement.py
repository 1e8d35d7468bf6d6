"""
How well predictions agree with labels: GLUE's metrics, by scikit-learn and scipy, imported where they are used.

    scores(('accuracy', 'f1'), [0, 1, 1], [0, 1, 0])     # ({'accuracy': 0.667, 'f1': 0.667}, [])
    scores(('pearson',), [2.0, 2.0], [1.0, 5.0])         # ({'pearson': 0.0}, ['pearson is not defined: ...'])

Predictions that are all the same score 0 by F1, Matthews' coefficient and the correlations, where a formula would
divide by 0: a model that has collapsed is as good as none.
"""

import importlib.util

import numpy as np

from data import DataError


def accuracy(predicted, labels):
    from sklearn.metrics import accuracy_score

    return accuracy_score(labels, predicted)


def f1(predicted, labels):
    """Of class 1, as GLUE has it of MRPC and QQP."""
    from sklearn.metrics import f1_score

    return f1_score(labels, predicted, labels=[1], average='micro', zero_division=0)


def matthews(predicted, labels):
    from sklearn.metrics import matthews_corrcoef

    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:  # scikit-learn's 0, without its warning
        return 0.0
    return matthews_corrcoef(labels, predicted)


def pearson(predicted, labels):
    from scipy.stats import pearsonr

    return pearsonr(predicted, labels).statistic


def spearman(predicted, labels):
    from scipy.stats import spearmanr

    return spearmanr(predicted, labels).statistic


METRICS = {one.__name__: one for one in (accuracy, f1, matthews, pearson, spearman)}
CORRELATIONS = ('pearson', 'spearman')


def check():
    """Raise DataError if a library that judges is not installed: before a run, not at its first evaluation."""
    if missing := [name for name in ('sklearn', 'scipy') if not importlib.util.find_spec(name)]:
        raise DataError(f'metrics need {missing[0]}: pip install -r requirements-extra.txt')


def scores(names, predicted, labels):
    """-> {name: value} of (n,) predicted and true classes, or numbers, and a sentence for each that is not defined."""
    found, notes = {}, []
    predicted, labels = (np.asarray(some) for some in (predicted, labels))
    for name in names:
        constant = [what for what, some in (('prediction', predicted), ('label', labels)) if np.ptp(some) == 0]
        if name in CORRELATIONS and constant:
            found[name] = 0.0
            notes.append(f'{name} is not defined, since every {constant[0]} is the same, and counts as 0')
        else:
            found[name] = float(METRICS[name](predicted, labels))
    return found, notes
