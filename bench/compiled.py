"""
The part of the bench that measures compile=True: a whole step of each method with it over one without.

    python -m bench --only=compiled
"""

import time

import torch

import train
from bench.measure import clear, interleaved, named, run_config, sizes
from plumbing.build import build_model, compile_between, layers_of

METHODS = {
    'AdamW': ['--method=adamw'],
    'GaLore': ['--method=galore'],
    'GaLore, per_layer': ['--method=galore', '--per_layer'],
    'Q-GaLore': ['--method=qgalore'],
    'LoQT': ['--method=loqt'],
    'LoRA': ['--method=lora', '--quantize=none', '--dropout=0.05'],
    'Muon': ['--method=muon'],
    'AdamW, checkpointing': ['--method=adamw', '--checkpointing'],
}


def measure_compiled(config):
    rows = []
    for size, blocks in sizes(config.compiled_sizes):
        torch._dynamo.reset()  # else a second shape is compiled for any shape at all
        for name, flags in METHODS.items():
            run, steps = run_config(size, blocks, f'--batch_size={config.compiled_windows}', *flags), {}
            for compiled in (False, True):
                torch.manual_seed(0)
                model = build_model(run, '', 4096, torch.float32, 'cpu', linear=layers_of(run))
                optimizer, started = train.setup(model, run), time.perf_counter()
                if compiled:
                    compile_between(model, run, 'cpu')
                x = torch.randint(4096, (run.batch_size, run.block_size))

                def step(model=model, optimizer=optimizer, x=x):
                    train.training_step(model, optimizer, [(x, x)], 1e-3, 'cpu')

                step()  # the first bases and states
                steps[compiled], start_up = step, time.perf_counter() - started
            times = interleaved(steps, config.compiled_rounds, clock=time.process_time)
            ratio = times[True] / times[False]
            ms = 1000 * times[False], 1000 * times[True]
            rows.append([named(size, blocks), name, *ms, f'{ratio:.3f}', start_up])
            del steps, model, optimizer
            clear()
    return rows


PARTS = {
    'compiled': (
        measure_compiled,
        'A step with compile=True',
        '{compiled_windows} windows of 256 tokens, fp32, 4,096 ids, without the refresh of a basis. '
        'Start-up: seconds until the first step is done; a method that is not the first finds its functions compiled.',
        ['model', 'method', 'CPU ms', 'CPU ms, compiled', 'ratio', 'start-up, s'],
    ),
}
