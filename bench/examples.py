"""Examples of many lengths: packed into windows, in buckets of like length, or padded as they come."""

import functools
import json
import os
import tempfile

import numpy as np
import torch

import train
from bench.measure import clear, interleaved, made_in, named, run_config, sizes
from configurator import method_of
from data.batches import Examples
from plumbing.build import build_model

# Tokens of GSM8K's 7,473 train examples by SmolLM2's tokenizer and template: percentiles, and what these are.
PERCENTILES = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.9, 100)
LENGTHS = (97, 115, 129, 141, 158, 173, 188, 204, 222, 243, 269, 312, 350, 425, 508, 570)
WINDOW, VOCABULARY = 1024, 4096  # of few ids, so that blocks, not the head, take most of the time of a small model


def written(folder, n):
    """A prepared folder of n examples of random tokens, with lengths as GSM8K's, the last 58 % of each trained."""
    draw = np.random.default_rng(0)
    lengths = np.interp(draw.random(n) * 100, PERCENTILES, LENGTHS).astype(int)
    ends = np.cumsum(lengths)
    trained = np.concatenate([np.arange(length) >= 0.42 * length for length in lengths])
    meta = dict(dtype='uint16', vocab_size=VOCABULARY, examples=True)
    source = dict(name='gsm8k')
    for split in ('train', 'val'):
        meta |= {f'{split}_tokens': int(ends[-1]), f'{split}_examples': n, f'{split}_trained': int(trained.sum())}
        source |= {f'{split}_tokens': int(ends[-1]), f'{split}_examples': n}
    for kind, array in (
        ('', draw.integers(VOCABULARY, size=ends[-1]).astype('uint16')),
        ('_trained', trained.astype('uint8')),
        ('_ends', ends.astype('int64')),
    ):
        array.tofile(os.path.join(folder, f'train{kind}.bin'))
    with open(os.path.join(folder, 'meta.json'), 'w') as f:
        json.dump(meta | {'sources': [source]}, f)
    return folder


def ways(data, n, batch_size):
    """{name: the micro-batches of a step on the first n examples}."""
    whole = list(range(n))
    by_length = sorted(whole, key=lambda i: -data.lengths[i])
    few = max(batch_size // 8, 1)

    def rows(examples, size=batch_size, T=0):
        parts = [examples[a : a + size] for a in range(0, n, size)]
        return [data.pack([[i] for i in part], T or int(data.lengths[part].max()))[:2] for part in parts]

    windows = data.micro_batches(by_length, None, max(batch_size // 4, 1))
    return {
        f'packed, windows of {WINDOW:,}': windows,
        f'padded, in order of length, {few} at a time': rows(by_length, few),
        'padded, in order of arrival': rows(whole),
        f'padded to {max(LENGTHS)}, the longest of all': rows(whole, T=max(LENGTHS)),
    }


def measure_examples(config):
    rows = []
    for size, blocks in sizes(config.example_sizes):
        run = run_config(size, blocks, '--method=adamw', f'--block_size={WINDOW}', f'--vocab_size={VOCABULARY}')
        model = build_model(run, '', VOCABULARY, torch.float32, 'cpu')
        optimizer = method_of(run).setup(model, run)
        n = config.examples_a_step
        with tempfile.TemporaryDirectory() as folder:
            data = Examples(written(folder, n), 'train', WINDOW)
            made = ways(data, n, config.examples_at_once)
        steps = {
            name: functools.partial(train.training_step, model, optimizer, batches, 1e-3, 'cpu')
            for name, batches in made.items()
        }
        peaks = {name: made_in(step) for name, step in steps.items()}
        times = interleaved(steps, 3)
        tokens, packed = int(data.lengths.sum()), times[next(iter(times))]
        for name, seconds in times.items():
            places = sum(x.numel() for x, *_ in made[name])
            share = f'{tokens / places:.0%}'
            rows.append([named(size, blocks), name, share, 1e3 * seconds, tokens / seconds, packed / seconds,
                         peaks[name] / 1e6])  # fmt: skip
        del model, optimizer, steps
        clear()
    return rows


PARTS = {
    'examples': (
        measure_examples,
        "Examples of GSM8K's lengths",
        'A whole step of AdamW in fp32, vocabulary 4,096, on the same {examples_a_step} examples, with lengths drawn '
        "from GSM8K's in tokens of SmolLM2, the answers trained: {examples_at_once} in a padded micro-batch where "
        'nothing else is said, a quarter as many windows in a packed one. Tokens/s: of the examples, without fillers.',
        ['model', 'rows', 'of it examples', 'ms', 'tokens/s', 'speed over packed', 'MB made in a step'],
    )
}
