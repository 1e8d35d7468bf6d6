"""
A step of the present code beside one of an earlier commit, in turns: makes commits.md.

    python -m bench.runs.commits 2670116^ --rounds=7    # three minutes on a CPU core

Each commit has a process of its own, on one thread, that takes a step when it is told to. Seconds are the processor's,
which other programs do not stretch, and a number is the median over the rounds; of each round's two there is a ratio.
"""

from bench import parser

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('commit', help='what git knows it by')
    asked.add_argument('--rounds', type=int, default=7, choices=range(3, 1000), metavar='N', help='steps of each (7)')
    asked.add_argument('--only', default='', help='cases by their names, with semicolons (all)')
    asked.add_argument('--out', default='results/commits.md', help='where the table goes (results/commits.md)')
    asked.add_argument('--here', default='', help='the folder of a checkout to take steps of: how they are started')
    args = asked.parse_args()

import os
import statistics
import subprocess
import sys
import tempfile
import time

from bench.measure import table
from plumbing.build import ROOT

SHAPE = '--model=60m --n_layer=4 --block_size=256 --batch_size=2 --gradient_accumulation_steps=1'
LOW = '--rank=128 --update_proj_gap=1000'
CASES = {
    'AdamW': '--method=adamw',
    'AdamW, checkpointing': '--method=adamw --checkpointing=True',
    'GaLore': f'--method=galore {LOW}',
    'GaLore, per_layer': f'--method=galore --per_layer=True {LOW}',
    'Q-GaLore': f'--method=qgalore --state_bits=8 {LOW}',
    'Fira': f'--method=fira {LOW}',
    'APOLLO': f'--method=apollo {LOW}',
    'LoQT': f'--method=loqt {LOW}',
    'LoRA': '--method=lora --rank=32 --quantize=none',
    'Muon': '--method=muon',
}


def serve(folder):
    """Take the steps that lines of stdin ask for, with the code in this folder: NAME makes a model, '' is a step."""
    sys.path.insert(0, folder)
    os.chdir(folder)
    for name in [name for name in sys.modules if name.split('.')[0] in ('plumbing', 'bench', 'configurator')]:
        del sys.modules[name]  # they are of the present code
    import torch

    import configurator
    import train
    from plumbing.build import build_model, layers_of

    def prepared(name):
        words = [*CASES[name].split(), *SHAPE.split(), '--device=cpu', '--dtype=float32']
        config = configurator.load(train.__file__, words)
        model = build_model(config, '', 4096, torch.float32, 'cpu', '', layers_of(config))
        optimizer, tokens = train.setup(model, config), torch.randint(4096, (2, 257))
        return lambda: train.training_step(model, optimizer, [(tokens[:, :-1], tokens[:, 1:])], 1e-4, 'cpu')

    torch.set_num_threads(1)
    step = None
    for line in sys.stdin:
        if name := line.strip():
            step = None  # and with it the last one's memory
            step = prepared(name)
            step()  # makes states and bases
        began = time.process_time()
        step()
        print(time.process_time() - began, flush=True)


def compared(name, processes, rounds):
    """A row of the table: a case, and both commits' steps."""

    def ask(process, line):
        process.stdin.write(line + '\n')
        process.stdin.flush()
        return float(process.stdout.readline())

    for process in processes:
        ask(process, name)
    pairs = []
    for i in range(rounds):
        turn = processes[:: 1 if i % 2 else -1]
        took = {process.pid: ask(process, '') for process in turn}
        pairs.append([took[process.pid] for process in processes])
    before, now = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    ratios = [b / a for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return [name, 1e3 * before, 1e3 * now, f'{middle:.3f}', f'{low:.3f} to {high:.3f}']


def main():
    names = [name.strip() for name in args.only.split(';')] if args.only else list(CASES)
    if wrong := [name for name in names if name not in CASES]:
        sys.exit(f'error: --only={args.only}: {wrong[0]!r} is none of: {"; ".join(CASES)}')

    def git(*words):
        done = subprocess.run(['git', *words], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f'error: git {words[0]} {words[-1]}: {done.stderr.strip().splitlines()[-1]}')
        return done.stdout.strip()

    with tempfile.TemporaryDirectory() as folder:
        git('worktree', 'add', '--detach', folder, args.commit)
        try:
            command = [sys.executable, '-m', 'bench.runs.commits', args.commit, '--here']
            how = dict(cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes = [subprocess.Popen([*command, where], **how) for where in (folder, ROOT)]
            rows = []
            for name in names:
                rows.append(compared(name, processes, args.rounds))
                print(*table([''], rows[-1:])[2:], flush=True)
            for process in processes:
                process.stdin.close()
                process.wait()
        finally:
            git('worktree', 'remove', '--force', folder)
    old, new = (git('show', '-s', '--format=%h of %ad', '--date=short', which) for which in (args.commit, 'HEAD'))
    lines = [
        '# A step of an earlier commit and of the present code',
        '',
        f'Made by `python -m bench.runs.commits {args.commit} --rounds={args.rounds}`: {old} and {new}.',
        f'Milliseconds of the processor, one thread, fp32; no step refreshes a basis. `{SHAPE}`.',
        '',
        *table(['method', 'before', 'now', 'ratio, median', 'quartiles'], rows),
        '',
    ]
    with open(os.path.join(ROOT, args.out), 'w') as f:
        f.write('\n'.join(lines))
    print('\n'.join(lines))


if __name__ == '__main__':
    serve(args.here) if args.here else main()
