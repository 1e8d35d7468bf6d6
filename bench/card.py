"""
What one CUDA card makes of the trainer: tests, plans against measured peaks, speed. For whoever has a card.

    python -m bench.card                       # less than ten minutes; writes results/card_NAME.md
    python -m bench.card --only=galore_7b_4090 # one run, printed
    python -m bench.card --tests=False         # without the tests marked cuda

Each run is a process of its own: what fails there is a row here. A run builds the model in bf16 with random weights
and takes three steps on random tokens, of which the first makes moments and bases and the third refreshes as many bases
as one step of a real run; the peaks are those of all three and of building. Then ordinary steps are timed, and one is
profiled. Nothing is trained: losses say only that the numbers stay finite.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import configurator
from bench.measure import table
from plumbing import Stop

# ---- config ----------------------------------------------------------------------------------------------------------
only = ''  # one of the runs below, by name; '': all that fit this card
tests = True  # run the tests marked cuda first
out = ''  # file for the tables; '': results/card_NAME.md
minutes = 10.0  # no run starts after this
steps = 5  # timed steps of each run
here = False  # measure `only` in this process and print JSON: how the runs are started
# ---- end of config ---------------------------------------------------------------------------------------------------

BATCH = ['--batch_size=64', '--gradient_accumulation_steps=1', '--grad_clip=0']
SMALL = ['--batch_size=16', *BATCH[1:]]
AS_24_GB = 24e9  # bytes that runs named _4090 may take
TWO = ['--gradient_accumulation_steps=2']  # a third micro-batch holds nothing new, and takes time
RUNS = {  # name: config, flags
    'adamw_130m': ('', ['--method=adamw', '--model=130m', '--block_size=256', *BATCH]),
    'adamw_130m, compile': ('', ['--method=adamw', '--model=130m', '--block_size=256', *BATCH, '--compile=True']),
    'galore_60m': ('galore_60m', BATCH),
    'galore_130m': ('galore_130m', BATCH),
    'galore_130m, compile': ('galore_130m', [*BATCH, '--compile=True', '--per_layer=False']),
    'galore_350m': ('galore_350m', BATCH),
    'galore_1b': ('galore_1b', [*SMALL, '--state_bits=8', '--per_layer=True']),
    'qgalore_350m': ('', ['--method=qgalore', '--model=350m', '--rank=256', *BATCH]),
    'fira_350m': ('', ['--method=fira', '--model=350m', '--rank=256', *BATCH]),
    'apollo_350m': ('', ['--method=apollo', '--model=350m', '--rank=256', *BATCH]),
    'loqt_130m': ('loqt_130m', BATCH),
    'loqt_1b': ('loqt_1b', SMALL),
    'adamw_1b': ('', ['--method=adamw', '--model=1b', *SMALL]),
    'qlora_7b': ('', ['--method=lora', '--model=7b', '--rank=32', '--quantize=nf4', '--double_quant=True',
                      '--train_rest=no', '--checkpointing=True', '--block_size=2048', '--batch_size=1']),
    'galore_7b_4090': ('galore_7b_4090', TWO),
    'loqt_7b_4090': ('loqt_7b_4090', TWO),
    'loqt_13b_4090': ('loqt_13b_4090', TWO),
    'galore_7b': ('galore_7b', ['--gradient_accumulation_steps=1']),
    'qwen25_7b_4090_galore': ('qwen25_7b_4090_galore', []),
    'qwen25_7b_4090_qlora': ('qwen25_7b_4090_qlora', TWO),
    'llama3_8b_4090_galore': ('llama3_8b_4090_galore', []),
    'llama3_8b_4090_qlora': ('llama3_8b_4090_qlora', TWO),
    **{
        f'{method}_130m': ('', [f'--method={method}', '--model=130m', '--block_size=256', *BATCH, *flags])
        for method, flags in {
            'muon': [], 'scale': [], 'sumo': ['--rank=256'], 'badam': [], 'grass': ['--rank=256'],
            'adalomo': ['--per_layer=True'], 'ldadam': ['--rank=256'], 'adarankgrad': ['--rank=256'],
            'sltrain': ['--rank=256'],
        }.items()
    },
}  # fmt: skip
PRETRAINED = {'qwen25': 'Qwen2.5-7B-Instruct', 'llama3': 'Llama-3.1-8B-Instruct'}  # their config.json, in tests/models/
KINDS = (  # of kernels, by their names; the first that fits
    ('attention', r'flash|fmha|attention|sdpa'),
    ('matrix products', r'gemm|cutlass|nvjet|xmma|wgmma|cublas'),
    ('quantised numbers', r'quantize|dequantize|blockwise'),
    ('copies', r'memcpy|memset'),
    ('the rest', ''),
)


def problems(config):
    found = []
    if config.only and config.only not in RUNS:
        found.append(f"only='{config.only}' is not a run: use one of {', '.join(RUNS)}")
    if config.steps < 1:
        found.append(f'steps={config.steps} times nothing: use at least 1')
    return found


# ---- one run, in its own process -------------------------------------------------------------------------------------


def prepared(name, folder):
    """-> config, model, optimizer, and a function that takes one step of a run on this card. folder: an empty one."""
    import torch

    import train
    from bench.examples import written
    from data.batches import Examples
    from plumbing.build import ROOT, build_model, compile_between, layers_of

    file, flags = RUNS[name]
    shape, vocabulary = PRETRAINED.get(name.split('_')[0]), 32000
    flags = [*([f'config/{file}.py'] if file else []), *flags, '--device=cuda', '--dtype=bfloat16']
    if shape:  # of a real model, its weights random, and examples in packed windows
        flags += [f'--init_from={os.path.join(ROOT, "tests", "models", shape)}', f'--dataset={written(folder, 2000)}']
    else:
        flags += [f'--vocab_size={vocabulary}']
    config = configurator.load(train.__file__, flags, train.problems)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision('high')  # as train.py does
    if '_4090' in name:
        torch.cuda.set_per_process_memory_fraction(AS_24_GB / torch.cuda.get_device_properties(0).total_memory)
    source, device = (config.init_from, 'meta') if shape else (None, 'cuda')
    model = build_model(config, '', vocabulary, torch.bfloat16, device, source, layers_of(config))
    if shape:
        model.materialise('cuda', config.seed)
    optimizer = train.setup(model, config)
    if config.compile:
        compile_between(model, config, 'cuda')
    parts = range(config.gradient_accumulation_steps)
    if shape:
        data = Examples(folder, 'train', config.block_size)
        batches = [(x, y, None, pieces) for x, y, _, pieces in (data.batch(1, i, config.batch_size) for i in parts)]
    else:
        tokens = [torch.randint(vocabulary, (config.batch_size, config.block_size), device='cuda') for _ in parts]
        batches = [(x, x.roll(-1, 1)) for x in tokens]

    def step():
        return train.training_step(model, optimizer, batches, config.learning_rate / 100, 'cuda')

    return config, model, optimizer, step


def measure(name, steps, folder):
    """-> {what: number} of one run on this card."""
    import torch

    import train
    from memory import rates, trace
    from plumbing.report import mfu

    def timed():
        began = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        return time.perf_counter() - began, loss.item()

    def used():
        free, total = torch.cuda.mem_get_info()
        return total - free

    started, before = time.perf_counter(), used()  # what others hold
    config, model, optimizer, step = prepared(name, folder)
    found = {'first': timed()[1], 'built': time.perf_counter() - started}
    timed()
    for due in trace.renewals(model, config, model.config.n_layer):
        optimizer.make_due(due)
        found['refresh'] = timed()[0]
    found |= {'allocated': torch.cuda.max_memory_allocated()}
    found |= {'reserved': torch.cuda.max_memory_reserved(), 'card': used() - before}
    found['seconds'] = statistics.median(timed()[0] for _ in range(steps))
    found['tokens'] = config.gradient_accumulation_steps * config.batch_size * config.block_size
    found['mfu'] = mfu(model.flops_per_token(config.block_size) * found['tokens'] / found['seconds'], 'cuda')
    found |= profiled(step)
    if not config.compile:  # whose kernels no plan knows
        began, shape, activations = time.perf_counter(), model.config, model.activation_dtype
        plan = train.plan_memory(config, shape, 'cuda', torch.bfloat16, activations)
        found |= {'plan_allocated': plan.allocated, 'plan_reserved': plan.reserved, 'plan_card': plan.card}
        found |= {'plan_seconds': time.perf_counter() - began, 'moment': plan.moment}
        del model, optimizer, step  # the rates of a card are measured in memory of it
        torch.cuda.empty_cache()
        found['plan_step'] = rates.planned(plan, config, 'cuda', torch.bfloat16).step
    return found


def profiled(step):
    """Kernels of one step: how many, and milliseconds of each kind."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
        step()
        torch.cuda.synchronize()
    spent, launches = dict.fromkeys((kind for kind, _ in KINDS), 0.0), 0
    for row in seen.key_averages():
        if row.device_type == torch.autograd.DeviceType.CUDA and not row.is_user_annotation:
            kind = next(kind for kind, pattern in KINDS if re.search(pattern, row.key, re.I))
            spent[kind] += row.self_device_time_total / 1e3
            launches += row.count
    return {'launches': launches, 'kinds': spent}


# ---- all of them -----------------------------------------------------------------------------------------------------


def in_a_process(name, steps):
    """-> what `measure` returns, or {'error': the last line that the run printed}."""
    command = [sys.executable, '-m', 'bench.card', f'--only={name}', f'--steps={steps}', '--here=True']
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return {'error': 'took more than three minutes'}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ['']
    if done.returncode:
        sys.stderr.write(f'---- {name}\n{done.stderr[-4000:]}\n')
        return {'error': lines[-1][:200] or f'ended with {done.returncode}'}
    return json.loads(lines[-1])


def run_tests():
    command = [sys.executable, '-m', 'pytest', '-q', '-m', 'cuda', 'tests/test_cuda.py', '-p', 'no:cacheprovider']
    done = subprocess.run([*command, '-o', 'addopts='], capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    return (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1].strip('= ')


def gb(found, name):
    return found[name] / 1e9 if name in found else None


def tables(measured):
    """The lines of three tables."""
    memory, speed, failed = [], [], []
    for name, m in measured.items():
        if 'error' in m:
            failed.append([name, m['error'].replace('|', '/')])
            continue
        off = f'{100 * (m["plan_allocated"] / m["allocated"] - 1):+.1f} %' if 'plan_allocated' in m else None
        off_card = f'{100 * (m["plan_card"] / m["card"] - 1):+.1f} %' if 'plan_card' in m else None
        memory.append([name, gb(m, 'plan_allocated'), gb(m, 'allocated'), off, gb(m, 'plan_reserved')])
        memory[-1] += [gb(m, 'reserved'), gb(m, 'plan_card'), gb(m, 'card'), off_card]
        kinds = [f'{100 * ms / max(sum(m["kinds"].values()), 1e-9):.0f} %' for ms in m['kinds'].values()]
        planned = 1e3 * m['plan_step'] if 'plan_step' in m else None
        speed.append([name, m['tokens'], planned, 1e3 * m['seconds'], round(m['tokens'] / m['seconds']), m['mfu']])
        busy = f'{sum(m["kinds"].values()) / (10 * m["seconds"]):.0f} %'
        speed[-1] += [1e3 * m['refresh'], m['launches'], busy, *kinds, m['built'], m['first']]
    head = ['run', 'planned', 'measured', 'off', 'planned reserved', 'measured', 'planned card', 'measured', 'off']
    lines = ['## Memory', '', 'GB. Measured: `torch.cuda.max_memory_allocated`, `max_memory_reserved`, and what the '
             'driver counts.', '', *table(head, memory), '']  # fmt: skip
    head = ['run', 'tokens', 'planned ms', 'ms a step', 'tokens/s', 'MFU', 'ms with refresh', 'kernels', 'busy']
    head += [*(kind for kind, _ in KINDS), 's to the first step', 'first loss']
    lines += ['## Speed', '', 'Busy: milliseconds of all kernels of a profiled step over those of a step without the '
              'profiler; the rest of it waits for Python.', '', *table(head, speed), '']  # fmt: skip
    return lines + (['## What failed', '', *table(['run', 'why'], failed), ''] if failed else [])


def main(config):
    import torch

    if not torch.cuda.is_available():
        raise Stop('torch sees no CUDA device, and this checks one: on a CPU, use python -m bench')
    if config.here:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(config.only, config.steps, folder)))
        return
    started = time.perf_counter()
    card = torch.cuda.get_device_name()
    lines = [f'# {card}', '', f'Made by `python -m bench.card` with torch {torch.__version__}, CUDA '
             f'{torch.version.cuda}.', '']  # fmt: skip
    if config.tests and not config.only:
        lines += [f'Tests marked cuda: {run_tests()}', '']
    measured = {}
    for name in [config.only] if config.only else RUNS:
        if time.perf_counter() - started > 60 * config.minutes:
            measured[name] = {'error': f'not started: {config.minutes:g} minutes were over'}
            continue
        measured[name] = in_a_process(name, config.steps)
        print(name, json.dumps(measured[name]), flush=True)
    lines += tables(measured)
    print('\n'.join(lines))
    if not config.only:
        path = config.out or f'results/card_{re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_")}.md'
        with open(path, 'w') as f:
            f.write('\n'.join(lines))
        print(f'wrote {os.path.abspath(path)}')


if __name__ == '__main__':
    config = configurator.load_or_exit(__file__, sys.argv[1:], problems)
    try:
        main(config)
    except Stop as error:
        sys.exit(f'error: {error}')
