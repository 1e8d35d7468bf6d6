"""Bytes of optimizer states, and of all training memory, compared with AdamW's."""

import torch

import galore
import train
from bench.measure import clear, on_meta, run_config, state_tensors
from configurator import method_of
from memory.trace import trace_step
from model import SIZES, ModelConfig
from plumbing.build import build_model

SMALL = ['--state_bits=8', '--basis_bits=4']


def real_states(size, *flags):
    """-> the optimizer states of a whole bf16 model after two steps of GaLore, as [(name, tensor)]."""
    run = run_config(size, SIZES[size]['n_layer'], '--dtype=bfloat16', '--per_layer=True', *flags)
    model = build_model(run, '', SIZES[size]['vocab_size'], torch.bfloat16, 'cpu')
    optimizer = galore.setup(model, run)
    for _ in range(2):
        tokens = torch.randint(model.config.vocab_size, (1, 32))
        train.training_step(model, optimizer, [(tokens, tokens)], 1e-3, 'cpu')
    kept = list(state_tensors(optimizer))
    return kept


def planned(size, *flags, dtype='bfloat16'):
    """The memory plan of a whole model: 2,048 tokens a step, blocks recomputed in backward."""
    flags = [f'--dtype={dtype}', '--checkpointing=True', '--batch_size=1', '--block_size=2048', *flags]
    run = run_config(size, SIZES[size]['n_layer'], *flags)
    model_config = ModelConfig(**SIZES[size] | {'block_size': run.block_size})
    dtype, setup = getattr(torch, dtype), method_of(run).setup
    return trace_step(model_config, dtype, run, setup, train.training_step, dtype)


def measure_states(config):
    rows, real = [], config.real_sizes.split()

    def compare(what, size, how, ours, theirs, claim=''):
        rows.append([what, size, how, ours, theirs, f'{100 * (1 - ours / theirs):.1f} %', claim])
        print(f'states: {what}, {size}, {how}: {ours:,} bytes', flush=True)
        clear()

    for size in config.state_sizes.split():
        if size in real:
            numbers = sum(t.numel() for name, t in real_states(size) if name in ('M', 'V', 'P'))
        else:
            numbers = planned(size, dtype='float32').states // 4  # all of them are fp32
        n = on_meta(size, SIZES[size]['n_layer']).n_params()
        how = 'real' if size in real else 'fake'
        compare('states of GaLore at 2 bytes a number', size, how, 2 * numbers, 4 * n)
    for size in config.claim_sizes.split():
        n = on_meta(size, SIZES[size]['n_layer']).n_params()
        plan = planned(size, *SMALL, '--per_layer=True')
        ours = sum(t.nbytes for _, t in real_states(size, *SMALL)) if size in real else plan.states
        how = 'real' if size in real else 'fake'
        compare('states of GaLore in 8 bits, bases in 4', size, how, ours, 4 * n, '82.5 %' if size == '7b' else '')
        adamw = planned(size, '--method=adamw')
        adamw = adamw.total - adamw.states + 4 * n  # moments at two bytes per number, as the paper counts
        compare('all memory of training', size, 'fake', plan.total, adamw, '63.3 %' if size == '7b' else '')
    return rows


PARTS = {
    'states': (
        measure_states,
        'Bytes',
        'Compared with AdamW in bf16, whose two moments take 4 bytes per parameter. All memory of training is the '
        'planned peak at 1 x 2,048 tokens, bf16, blocks recomputed in backward: ours with per_layer, 8-bit states and '
        "4-bit bases, AdamW's with all gradients, 2 bytes per parameter, and the moments above. Counted: weights, "
        'gradients, states, activations, temporaries; memest.py says what is not. Real: after two steps; fake: '
        'planned.',
        ['what', 'model', 'tensors', 'bytes', "AdamW's", 'below it', "the paper's claim"],
    ),
}  # fmt: skip
