"""
Kill a run again and again, at random moments and while it saves, and compare what comes of it with a run that nobody
touched: weights, optimizer and metrics.csv, bit for bit.

    python -m bench.runs.kills                     # 17 modes, 5 kills each: about an hour on two CPU cores
    python -m bench.runs.kills --seed=7 --kills=2 --only=loqt
"""

import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import parser

TINY = '--model=9m --n_layer=2 --n_embd=32 --n_head=4 --n_inner=64 --vocab_size=0 --block_size=32 --batch_size=4'
TINY += ' --device=cpu --max_iters=60 --log_interval=1 --eval_interval=6 --eval_tokens=512 --sample_tokens=0'
MODES = {
    'adamw': '--method=adamw --grad_clip=0.5 --weight_decay=0.1',
    'adamw 8 bit': '--method=adamw --state_bits=8 --dtype=bfloat16',
    'galore': '--rank=8 --update_proj_gap=5',
    'galore svd': '--rank=8 --update_proj_gap=5 --refresh=svd --stagger=False',
    'galore per layer': '--rank=8 --update_proj_gap=5 --per_layer --dtype=bfloat16 --state_bits=8',
    'galore accumulated': '--rank=8 --update_proj_gap=5 --gradient_accumulation_steps=3 --basis_bits=4',
    'galore rotated': '--rank=8 --update_proj_gap=5 --moments=rotate --checkpointing',
    'qgalore': '--method=qgalore --rank=8 --update_proj_gap=5',
    'fira': '--method=fira --rank=8 --update_proj_gap=5',
    'apollo': '--method=apollo --rank=8 --update_proj_gap=5',
    'loqt': '--method=loqt --rank=8 --update_proj_gap=5',
    'loqt packed': '--method=loqt --rank=8 --update_proj_gap=5 --save_merged=False --double_quant --per_layer',
    'lora': '--method=lora --rank=8 --dropout=0.1',
    'lora merged': '--method=lora --rank=8 --quantize=none --merge_every=9 --save_merged=False',
    'coreset': '--rank=8 --update_proj_gap=5 --coreset=grad --coreset_from=2',
    'saves often': '--rank=8 --update_proj_gap=5 --save_interval=1',
    'best of weights': '--rank=8 --update_proj_gap=5 --save_best=weights --save_interval=2',
}
ROOT = Path(__file__).resolve().parents[2]

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('--seed', type=int, default=1, help='of the moments (1)')
    asked.add_argument('--kills', type=int, default=5, choices=range(1, 100), metavar='N', help='of each mode (5)')
    asked.add_argument('--only', default='', help='modes whose name holds this')
    args = asked.parse_args()
    if not any(args.only in mode for mode in MODES):
        asked.error(f'--only={args.only} is in the name of no mode: {", ".join(MODES)}')


def command(out_dir, flags, *more):
    return [sys.executable, 'train.py', *TINY.split(), *flags.split(), f'--out_dir={out_dir}', *more]


def killed(words, out_dir, draw):
    """Start the run and kill it: at a random moment, or as soon as a checkpoint is being written. -> did it end?"""
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    steps, inside = draw.randrange(1, 20), draw.random() < 0.5
    for line in process.stdout:
        steps -= line.startswith('step ') and '| loss' in line
        if steps <= 0:
            break
    until = time.monotonic() + 5
    while inside and time.monotonic() < until and process.poll() is None:
        if any(name.endswith(('.new', '.old')) for name in os.listdir(out_dir)):
            break
    time.sleep(draw.random() * 0.02)
    process.kill()
    process.stdout.close()
    return process.wait() == 0


def differences(whole, broken):
    """What is not the same in two out_dirs, as names."""
    import torch
    from safetensors.torch import load_file

    a, b = (load_file(os.path.join(path, 'last/model.safetensors')) for path in (whole, broken))
    found = [name for name in a if not torch.equal(a[name], b[name])]
    states = [torch.load(os.path.join(path, 'last/optimizer.pt'), weights_only=True) for path in (whole, broken)]
    for p, state in states[0]['state'].items():
        theirs = states[1]['state'][p]
        found += [f'state {p} {name}' for name, x in state.items() if not equal(x, theirs[name])]
    rows = []
    for path in (whole, broken):
        with open(os.path.join(path, 'metrics.csv'), newline='') as f:
            rows.append([(row['step'], row['tokens'], row['train_loss'], row['val_loss']) for row in csv.DictReader(f)])
    return found + ['metrics.csv'] * (rows[0] != rows[1])


def equal(x, y):
    import torch

    return torch.equal(torch.as_tensor(x), torch.as_tensor(y))


def test(mode, kills, seed, folder):
    """-> names of what differs in the end, of a run in one mode that is killed so many times. folder: for both runs"""
    draw, flags = random.Random(f'{seed} {mode}'), MODES[mode]
    whole, broken = os.path.join(folder, 'whole'), os.path.join(folder, 'broken')
    subprocess.run(command(whole, flags), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for _ in range(kills):
        if killed(next_command(broken, flags), broken, draw):
            break
    else:
        subprocess.run(next_command(broken, flags), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return differences(whole, broken)


def main(args):
    wrong = 0
    for mode in MODES:
        if args.only in mode:
            with tempfile.TemporaryDirectory() as folder:
                found = test(mode, args.kills, args.seed, folder)
            wrong += bool(found)
            print(f'{mode}: {", ".join(found) if found else "the same, bit for bit"}', flush=True)
    sys.exit(f'{wrong} modes differ' if wrong else 0)


def next_command(out_dir, flags):
    """The command that goes on, or, where nothing is saved yet, begins again."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    resumable = ('last',) if 'save_best=weights' in flags else ('last', 'best')
    saved = any(name.startswith(resumable) and '.new' not in name for name in names)
    return command(out_dir, flags, '--init_from=resume' if saved else '--overwrite')


if __name__ == '__main__':
    main(args)
