"""
Real steps of the 24 GB config on a CPU with 24 GB of memory: 350m, 1b and LLaMA-7B itself; makes galore_7b.md.

    python -m bench.runs.galore_7b    # about 45 minutes on two cores; finished runs are kept in out/real

Two optimizer steps, with a checkpoint and a new process between them. The first makes every basis and accumulates two
micro-batches; the second refreshes every basis (T = 1), each from the only full gradient in memory.
"""

from bench import parser

if __name__ == '__main__':
    parser().parse_args()

import os
import re
import subprocess
import sys

from plumbing.build import ROOT

SIZES = {'350m': 256, '1b': 512, '7b': 1024}  # ranks
# By default glibc keeps freed blocks of up to 32 MB, which leave gaps that nothing fits: 3 GB at 7B. The threshold
# returns them to the system. New blocks are then zeroed page by page, which is faster with huge pages, if available.
MALLOC = 'MALLOC_MMAP_THRESHOLD_=1000000 GLIBC_TUNABLES=glibc.malloc.hugetlb=1'
COMMON = 'config/galore_7b_4090.py --device=cpu --dataset=pystdlib --vocab_size=32000 --batch_size=1 --warmup_iters=0'
COMMON += ' --update_proj_gap=1 --lr_decay_iters=100 --eval_tokens=256 --sample_tokens=0 --save_interval=1'
STEPS = ['--gradient_accumulation_steps=2 --max_iters=1 --overwrite']
STEPS += ['--gradient_accumulation_steps=1 --max_iters=2 --init_from=resume']


def run(words, log):
    """-> the command, and the output of its run under /usr/bin/time."""
    log = os.path.join(ROOT, log)
    os.makedirs(os.path.dirname(log), exist_ok=True)
    done = False
    if os.path.exists(log):
        with open(log) as f:
            done = 'device: cpu' in f.read()  # its last line
    if not done:
        print('python train.py', words, flush=True)
        with open(log, 'w') as f:
            command = ['/usr/bin/time', '-v', sys.executable, 'train.py', *words.split()]
            environment = os.environ | dict(word.split('=', 1) for word in MALLOC.split())
            subprocess.run(command, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, check=True, env=environment)
    with open(log) as f:
        return f'{MALLOC} /usr/bin/time -v python train.py {words}', f.read()


def cells(text):
    """From a run's output: loss, seconds of each step, time of the process, resident and planned peak in GiB."""
    steps = re.findall(r'^step \d+/\d+ \| loss ([\d.]+).* ([\d.,]+) tok/s', text, re.M)
    tokens = int(re.search(r' = ([\d,]+) tokens;', text)[1].replace(',', ''))  # of a step
    clock = re.findall(r'Elapsed .*: ([\d:.]+)', text)[-1]
    peak = int(re.findall(r'Maximum resident set size \(kbytes\): (\d+)', text)[-1]) * 1024
    planned = int(re.findall(r'peak_bytes_planned: (\d+)', text)[-1])
    took = ', '.join(f'{tokens / float(speed.replace(",", "")):.0f}' for _, speed in steps)
    return [steps[-1][0], took, clock, f'{peak / 2**30:.2f} GiB', f'{planned / 2**30:.2f} GiB']


def main():
    lines = [
        '# Real steps of `config/galore_7b_4090.py` on a CPU',
        '',
        'Made by `python -m bench.runs.galore_7b` on two cores with 24 GB of memory, no GPU. All layers, bf16 weights,',
        '8-bit states, 4-bit bases, per_layer, checkpointing. The first step makes every basis and accumulates two',
        'micro-batches of 256 tokens and writes a checkpoint; a new process resumes from it, and its step refreshes',
        'every basis (T = 1), each from the only full gradient in memory. Nothing is offloaded: main memory stands for',
        'the card. The plan of the first step covers a whole run with its flags: with T = 1 and two micro-batches,',
        'later steps would keep all full gradients between the two. Step 1 of the 7b shared the cores with other work,',
        'step 1 of the 1b for a minute. 350m and 7b ran before GLIBC_TUNABLES (huge pages) was added to the commands.',
        '',
        '| model | step | loss | seconds of the step | of the process | peak resident | planned |',
        '|---|---|---|---|---|---|---|',
    ]
    commands = []
    for size, rank in SIZES.items():
        for number in range(2):
            out_dir = f'out/real/{size}'
            words = f'{COMMON} --model={size} --rank={rank} --out_dir={out_dir} {STEPS[number]}'
            command, text = run(words, f'{out_dir}.{number + 1}.log')
            commands.append(command)
            lines.append(f'| {" | ".join(map(str, [size, number + 1, *cells(text)]))} |')
    lines += ['', 'Commands:', '', '```', *commands, '```', '']
    with open(os.path.join(ROOT, 'results', 'galore_7b.md'), 'w') as f:
        f.write('\n'.join(lines))
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
