"""
memest's formula against its trace, its plans against real runs and against published figures: makes memest.md.

    python -m bench.runs.memest    # 100 traces, and 60 steps of each laptop config: 15 minutes on two CPU cores
"""

from bench import parser

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('--tracked', help='only track the memory of one laptop config, named without .py')
    args = asked.parse_args()

import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import time

from torch.utils._python_dispatch import _disable_current_modes

import configurator
import memest
import train
from memory.record import LiveBytes
from plumbing.build import ROOT

CACHE = os.path.join(ROOT, 'out', 'memest.json')  # finished traces; delete it after a change of the code
RANK = {'60m': 128, '130m': 256, '350m': 256, '1b': 512, '7b': 1024, '13b': 1024}
# flags to try each method with; successive sizes take successive ones
TURNS = {
    'adamw': ['', '--per_layer --grad_clip=0', '--checkpointing', '--state_bits=8', '--dtype=float32', '--offload'],
    'galore': [
        '', '--per_layer', '--checkpointing --state_bits=8', '--basis_bits=4',
        '--method=qgalore --basis_bits=16 --lazy=0 --per_layer',
        '--refresh=svd --stagger=False', '--method=fira --grad_clip=0', '--per_layer --checkpointing --state_bits=8',
        '--basis_bits=8 --offload', '--dtype=float32', '--grad_clip=1',
    ],
    'loqt': [
        '', '--per_layer --checkpointing', '--double_quant=True', '--quantize=none', '--state_bits=8 --per_layer',
        '--stagger=False', '--checkpointing --offload', '--grad_clip=1',
    ],
    'lora': [
        '--quantize=none', '--checkpointing', '--train_rest=no', '--train_rest=no --checkpointing --double_quant=True',
        '--per_layer --state_bits=8', '--targets=q_proj,v_proj',
        '--dropout=0.05 --train_rest=no',
    ],
    'apollo': [
        '', '--checkpointing', '--per_layer --grad_clip=0', '--state_bits=8', '--coreset=grad --coreset_from=16',
    ],
}  # fmt: skip
BATCHES = [(1, 256, 4), (4, 1024, 1), (16, 256, 2), (32, 256, 1), (4, 256, 4)]  # windows, tokens, micro-batches

# what, where it was published, the published GB, our flags
PUBLISHED = [
    ('8-bit GaLore, 7B, at most 500 tokens', 'GaLore paper, figure 1', '22.0',
     '7b --state_bits=8 --per_layer --batch_size=1'),
    ('the same, 1 x 256', "GaLore's script / Q-GaLore's", '22.7 / 21.3',
     '7b --state_bits=8 --per_layer --batch_size=1'),
    ('the same, 16 x 256, checkpointing', "GaLore's script", '22.8',
     '7b --state_bits=8 --per_layer --checkpointing --batch_size=16'),
    ('Q-GaLore, 7B, 1 x 256', "Q-GaLore's README", '15.1',
     '7b --state_bits=8 --per_layer --method=qgalore --lazy=0 --batch_size=1'),
    ('Q-GaLore, 7B, 16 x 256, checkpointing', "Q-GaLore's README", '15.3',
     '7b --state_bits=8 --per_layer --method=qgalore --lazy=0 --batch_size=16 --checkpointing'),
    ('LoQT, 7B, 1280 tokens, not per layer', 'LoQT paper: fits 24 GB', '<= 24',
     '7b --method=loqt --state_bits=8 --batch_size=5 --double_quant=True'),
    ('LoQT, 13B, per layer', 'LoQT paper: fits 24 GB', '<= 24',
     '13b --method=loqt --state_bits=8 --per_layer --batch_size=1 --double_quant=True --checkpointing'),
    ('AdamW, 1B, 1 x 256', 'GaLore paper, table 11', '13.6', '1b --method=adamw --batch_size=1'),
    ('8-bit Adam, 1B, per layer', 'GaLore paper, table 11', '6.93',
     '1b --method=adamw --state_bits=8 --per_layer --batch_size=1'),
    ('8-bit GaLore, 1B', 'GaLore paper, table 11', '7.95', '1b --state_bits=8 --batch_size=1'),
    ('8-bit GaLore, 1B, per layer', 'GaLore paper, table 11', '5.63', '1b --state_bits=8 --per_layer --batch_size=1'),
]  # fmt: skip


def load(flags):
    return configurator.load(ROOT + '/train.py', [ROOT + '/config/galore_130m.py', *flags.split(), '--dry_run'])


def traced(flags, cache):
    if flags not in cache:
        plan = memest.trace(load(flags), 'cuda')
        cache[flags] = [plan.weights, plan.states, plan.total, plan.allocated, plan.reserved, plan.card, plan.moment]
        os.makedirs(os.path.dirname(CACHE), exist_ok=True)
        with open(CACHE, 'w') as f:
            json.dump(cache, f)
    return cache[flags]


def configurations():
    i = 0
    for method, turns in TURNS.items():
        for k in range(max(len(turns), 6) * 2):
            size = list(RANK)[k % 6]
            batch, tokens, micro = BATCHES[i % len(BATCHES)]
            rank = 16 if method == 'lora' else RANK[size]
            own = '' if method == 'adamw' else f' --rank={rank} --scale=1'
            flags = f'--method={method} --model={size} --grad_clip=0{own}'
            flags += f' --batch_size={batch} --block_size={tokens} --gradient_accumulation_steps={micro}'
            yield f'{flags} {turns[(k + k // 6) % len(turns)]}'.strip()
            i += 1


def tracked(config):
    """Print plan and real peak, in bytes of tensors, of 60 steps of a laptop config. Needs a process of its own."""
    argv = [f'config/{config}.py', '--max_iters=60', '--warmup_iters=6', '--eval_interval=60', '--eval_tokens=8192']
    argv += ['--update_proj_gap=20', f'--out_dir=out/tracked_{config}', '--overwrite', '--sample_tokens=0']
    plans, planned = [], train.plan_memory

    def unseen(*words, **kw):  # hides the fake tensors of the trace from LiveBytes
        with _disable_current_modes():
            plans.append(planned(*words, **kw))
        return plans[-1]

    train.plan_memory = unseen
    with contextlib.redirect_stdout(io.StringIO()), LiveBytes() as live, contextlib.suppress(SystemExit):
        argv = [word for word in argv if 'adamw' not in config or 'proj_gap' not in word]
        train.cli(configurator.load(train.__file__, argv))
    print(json.dumps([plans[0].total, live.peak]))


def real_runs():
    """Lines of the table of plans against real runs."""
    lines = [
        '## Plans against real runs of train.py',
        '',
        '60 steps of each laptop config on this CPU, with refreshes or merges, an evaluation and a checkpoint; all',
        'storages of the process tracked from its start. The plan was printed before the first step.',
        '',
        '| config | planned, MB | tracked, MB | error |',
        '|---|---|---|---|',
    ]
    for config in sorted(name[:-3] for name in os.listdir(ROOT + '/config') if name.endswith('laptop.py')):
        words = [sys.executable, '-m', 'bench.runs.memest', f'--tracked={config}']
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        plan, real = json.loads(done.stdout.splitlines()[-1])
        lines.append(f'| {config} | {plan / 1e6:.1f} | {real / 1e6:.1f} | {100 * (plan / real - 1):+.2f} % |')
        print(lines[-1], flush=True)
    return lines


def formula_and_trace(cache):
    rows, slack = [], []
    for flags in configurations():
        config = load(flags)
        weights, states, total, allocated, reserved, _, moment = traced(flags, cache)
        instant = memest.estimate(config)
        rows.append((instant.total / total - 1, flags, instant.total, total, moment))
        slack.append(reserved / allocated - 1)
        if instant.weights != weights or instant.states != states:
            print('weights or states differ:', flags, instant.weights, weights, instant.states, states)
        if abs(rows[-1][0]) > 0.005:
            print(f'{100 * rows[-1][0]:+.2f} % {flags} | {instant.moment} | {moment}', flush=True)
    errors = sorted(abs(row[0]) for row in rows)
    within = sum(error <= 0.01 for error in errors)
    lines = [
        '## The formula against the trace',
        '',
        f'{len(rows)} configurations, 60m to 13b: mean error {100 * sum(errors) / len(errors):.3f} %, largest '
        f'{100 * errors[-1]:.2f} %, {within} within 1 %.',
        f'The simulated allocator reserves {100 * sum(slack) / len(slack):.1f} % more than is allocated on average, '
        f'{100 * max(slack):.1f} % at most.',
        '',
        '| formula, GB | trace, GB | error | flags | peak |',
        '|---|---|---|---|---|',
    ]
    for error, flags, instant, total, moment in sorted(rows, key=lambda row: -abs(row[0])):
        shown = flags.replace(' --scale=1', '').replace(' --grad_clip=0', '', 1)
        lines.append(f'| {instant / 1e9:.3f} | {total / 1e9:.3f} | {100 * error:+.2f} % | `{shown}` | {moment} |')
    return lines


def published(cache):
    lines = [
        '## Published and planned',
        '',
        'The published runs keep gradients, moments and the loss in other ways, on other allocators; "G" may be GB or',
        'GiB. Ours: bf16 weights, rank 1024 at 7B and 13B, 512 at 1B, no (V, N) logits, R instead of G.',
        '',
        '| what | source | published, G | planned: tensors, GB | reserved, GB | with CUDA, GB | GiB |',
        '|---|---|---|---|---|---|---|',
    ]
    for what, where, there, flags in PUBLISHED:
        size, _, rest = flags.partition(' ')
        method = '' if '--method' in rest else '--method=galore '
        own = '' if '--method=adamw' in rest else f'--rank={RANK[size]} --scale=1 '
        flags = f'--model={size} --grad_clip=0 --gradient_accumulation_steps=1 {own}{method}{rest}'
        _, _, total, _, reserved, card, _ = traced(flags, cache)
        lines.append(
            f'| {what} | {where} | {there} | {total / 1e9:.2f} | {reserved / 1e9:.2f} | {card / 1e9:.2f} '
            f'| {card / 2**30:.2f} |'
        )
    return lines


def times():
    config = configurator.load(ROOT + '/train.py', [ROOT + '/config/loqt_13b_4090.py', '--dry_run'])
    memest.trace(load('--model=60m'))  # warm up: imports, tables of codes
    started = time.perf_counter()
    memest.trace(config)
    seconds, started = time.perf_counter() - started, time.perf_counter()
    for _ in range(10):
        memest.estimate(config)
    instant = (time.perf_counter() - started) / 10
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [
        '## Time',
        '',
        f'A trace of `config/loqt_13b_4090.py` took {seconds:.1f} s, the process {memory / 1e9:.2f} GB at its peak;',
        f'the formula {1e3 * instant:.2f} ms.',
    ]


def main():
    cache = {}
    if os.path.exists(CACHE):
        with open(CACHE) as f:
            cache = json.load(f)
    lines = [
        '# memest: formula, trace, real runs, published figures',
        '',
        'Made by `python -m bench.runs.memest` (torch 2.13.0+cpu). GB: 1e9 bytes, GiB: 2^30. Nothing here was measured',
        'on a card: figures for a card are planned.',
    ]
    for part in (real_runs(), formula_and_trace(cache), published(cache), times()):
        lines += ['', *part]
    with open(os.path.join(ROOT, 'results', 'memest.md'), 'w') as f:
        f.write('\n'.join([*lines, '']))
    print('\n'.join(line for line in lines if '`--' not in line))


if __name__ == '__main__':
    tracked(args.tracked) if args.tracked else main()
