"""
The parts of the bench that measure LoQT: the time of a merge, the bytes of a model, the peak of a step that merges.

    python -m bench --only=merge
    python -m bench --only=nf4 --real_sizes='60m 130m'
"""

import functools
import math
import time

import torch

import loqt
import train
from adam import kernels
from bench.measure import (
    block_matrices,
    clear,
    interleaved,
    made_in,
    named,
    on_meta,
    rank_of,
    run_config,
    sizes,
    state_tensors,
)
from galore import short_side_first
from memory.trace import trace_step
from model import SIZES
from plumbing.build import build_model

ASKED = {'60m': 0.234, '130m': 0.486, '350m': 0.970, '1b': 3.145}  # GiB of LoQT's table 1, recomputed from the shapes

THEIR_ROUNDS = 5  # of compensation; ours loses as much in three


def official(layer, rounds):
    """A merge as in the authors' LoQT, reimplemented from its description: an SVD in fp32, another for the
    pseudo-inverse, and in each round a quantisation of all of W by bitsandbytes. -> the error's norm over W's."""

    def rounded(A):
        packed, state = kernels().quantize_4bit(A.reshape(-1), blocksize=64, quant_type='nf4')
        return kernels().dequantize_4bit(packed, state).view(A.shape)

    W, P = short_side_first(layer.dense_weight(torch.float32)), layer.read('P', torch.float32)  # (m, n), (m, r)
    U, _, _ = torch.linalg.svd(short_side_first(layer.G).float(), full_matrices=False)
    P = rounded(U[:, : P.shape[1]].contiguous())
    inverse = torch.linalg.pinv(P)  # (r, m)
    What, best = W, math.inf
    for _ in range(rounds):
        Q = rounded(What.contiguous())  # (m, n)
        B = inverse @ (W - Q) / layer.scale  # (r, n)
        What = W - layer.scale * P @ B
        best = min(best, (What - Q).norm().item())
    return best / W.norm().item()


def measure_merge(config):
    """Our merge and the authors' of a bf16 layer of each shape, with a gradient whose spectrum decays as in real
    runs."""
    rows = []
    for size, _ in sizes(config.merge_sizes):
        rank = rank_of(size)
        for m, n in dict.fromkeys(tuple(p.shape) for p in block_matrices(on_meta(size, 1))):
            torch.manual_seed(0)
            layer = loqt.LoQTLinear(n, m, rank=rank, dtype=torch.bfloat16)
            k = min(m, n)
            G = torch.randn(m, k) @ (torch.exp(-8 * torch.arange(k) / k)[:, None] * torch.randn(k, n))
            G = G.bfloat16()
            layer.G = G.clone()
            loqt.merge(layer)  # from now on there is an old P to start from
            new = loqt.LoQTLinear(n, m, rank=rank, dtype=torch.bfloat16)
            new.set_weight(torch.randn(m, n))  # like a trained weight, not on NF4's 16 values
            new.G, W = G.clone(), new.dense_weight(torch.float32)
            lost = {'theirs': official(new, THEIR_ROUNDS)}
            P = layer.read('P', torch.float32)
            lost['ours'] = loqt.compensate(W.bfloat16(), P, layer, layer.compensation)[2].item()
            del new, W, P

            def ours(layer=layer, G=G):
                layer.G = G.clone()
                loqt.merge(layer)

            def theirs(layer=layer, G=G):
                layer.G = G
                official(layer, THEIR_ROUNDS)

            clock = time.process_time  # deaf to other programs
            times = interleaved({'ours': ours, 'theirs': theirs}, config.repeats, config.seconds, 2, clock)
            made = made_in(ours) / (4 * m * n)
            ratio = times['theirs'] / times['ours']
            ms = 1000 * times['ours'], 1000 * times['theirs']
            shares = f'{lost["ours"]:.4f}', f'{lost["theirs"]:.4f}'
            rows.append([size, f'{m} x {n}', rank, *ms, f'1/{ratio:.1f}', *shares, made])
    return rows


def measure_packed(config):
    """Bytes of weights and states after a step: of real tensors for `real_sizes`, else of fake ones."""
    rows = []
    for size in config.state_sizes.split():
        flags = ['--method=loqt', '--state_bits=8', f'--rank={rank_of(size)}', '--dtype=bfloat16', '--batch_size=1']
        run = run_config(size, SIZES[size]['n_layer'], *flags, '--block_size=8', '--per_layer=True', '--compensation=1')
        vocabulary = SIZES[size]['vocab_size']
        if size in config.real_sizes.split():
            model = build_model(run, '', vocabulary, torch.bfloat16, 'cpu', linear=loqt.linear(run))
            optimizer = loqt.setup(model, run)
            x = torch.randint(0, vocabulary, (1, 8))
            train.training_step(model, optimizer, [(x, x)], 1e-3, 'cpu')
            weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
            states, kind = sum(t.nbytes for _, t in state_tensors(optimizer)), 'real'
            del model, optimizer
        else:
            with torch.device('meta'):
                model = build_model(run, '', vocabulary, torch.bfloat16, 'meta', linear=loqt.linear(run))
            options = dict(compute_dtype=torch.bfloat16, linear=loqt.linear(run))
            plan = trace_step(model.config, torch.bfloat16, run, loqt.setup, train.training_step, **options)
            weights, states, kind = plan.weights, plan.states, 'fake'
        clear()
        both = (weights + states) / 2**30
        rows.append([size, kind, weights, states, f'{both:.3f}', ASKED.get(size, math.nan)])
    return rows


def measure_peaks(config):
    """Peak bytes that a step creates, without and with merges."""
    rows, tau = [], 30
    for size, blocks in sizes(config.memory_sizes):
        for name, flags in (
            ('all at once', ['--stagger=False']),
            ('all at once, per_layer', ['--stagger=False', '--per_layer=True']),
            ('in turns, 4 micro-batches', ['--gradient_accumulation_steps=4']),
            ('in turns, 4 micro-batches, per_layer', ['--gradient_accumulation_steps=4', '--per_layer=True']),
        ):
            base = ['--method=loqt', '--batch_size=1', f'--update_proj_gap={tau}', f'--rank={rank_of(size)}', *flags]
            run = run_config(size, blocks, *base, '--max_iters=100')
            model = build_model(run, '', 1000, torch.float32, 'cpu', linear=loqt.linear(run))
            optimizer = loqt.setup(model, run)
            n = run.gradient_accumulation_steps
            peaks, merging = {True: 0, False: 0}, False
            for t in range(2 * tau):
                batches = [(torch.randint(0, 1000, (1, 256)),) * 2 for _ in range(n)]
                merging = any(layer.collect for layer in optimizer.layers.values())
                step = functools.partial(train.training_step, model, optimizer, batches, 1e-3, 'cpu')
                if t > 1 and (merging or t < 5):  # the first step also creates what stays
                    peaks[merging] = max(peaks[merging], made_in(step))
                else:
                    step()
            largest = 4 * max(math.prod(layer.shapes['W']) for layer in optimizer.layers.values())
            more = (peaks[True] - peaks[False]) / largest
            rows.append(
                [named(size, blocks), name, peaks[False] / 1e6, peaks[True] / 1e6, largest / 1e6, f'{more:.2f}']
            )
            del model, optimizer, step
            clear()
    return rows


PARTS = {
    'merge': (
        measure_merge,
        'A merge of one layer (LoQT)',
        'Three rounds of compensation, NF4 without double quantisation. Theirs is the procedure of the official code, '
        'reimplemented in merges.py: an SVD for P, another for the pseudo-inverse, five quantisations. The last column '
        "is the peak of what our merge creates, in fp32 matrices of W's size, including a copy of the gradient. Lost: "
        "the norm of the merged layer's error over the norm of W.",
        ['size', 'layer', 'rank', 'CPU ms', 'CPU ms of theirs', 'time', 'lost', 'lost by theirs', 'made, in matrices'],
    ),
    'nf4': (
        measure_packed,
        'Bytes of a LoQT model',
        'Weights in NF4, B, embeddings and head in bf16, moments in 8 bits; after one step.',
        ['size', 'tensors', 'bytes of weights', 'bytes of states', 'GiB', "at most: the paper's"],
    ),
    'peaks': (
        measure_peaks,
        'The peak of a step that merges (LoQT)',
        'fp32, 256 tokens per micro-batch: the peak MB that a step creates, and by how many of its largest fp32 '
        'matrices a step with merges exceeds one without.',
        ['model', 'merges', 'MB, ordinary step', 'MB, with merges', 'MB of the largest matrix', 'more, in those'],
    ),
}
