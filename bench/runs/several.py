"""
What one of four processes is planned to hold, and what it holds, under each value of `parallel`: makes several.md.

    python -m bench.runs.several        # gloo on this CPU: 21 runs of three steps, some minutes on two cores
"""

from bench import parser

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('--worker', help='run one of the processes, which writes to this file')
    asked.add_argument('--only', default='', help='the runs among whose flags this is, printed and not written')
    args = asked.parse_args()

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
N = 4
BASE = '--model=20m --n_head=4 --block_size=128 --max_iters=3 --sample_tokens=0 --eval_interval=100 --eval_tokens=512'
BASE += ' --device=cpu --dtype=float32'
RUNS = [
    f'--method={method} --parallel={way} --batch_size={batch} --gradient_accumulation_steps={micro}{more}'
    for method, way, batch, micro, more in (
        ('adamw', 'dp', 4, 8, ''),
        ('adamw', 'fsdp', 4, 8, ''),
        ('adamw', 'fsdp', 4, 4, ''),
        ('adamw', 'fsdp', 4, 8, ' --checkpointing'),
        ('adamw', 'fsdp', 1, 8, ''),
        ('adamw', 'fsdp', 4, 8, ' --state_bits=8'),
        ('adamw', 'tp', 4, 2, ''),
        ('adamw', 'tp', 4, 2, ' --checkpointing'),
        ('adamw', 'dp+tp', 4, 4, ''),
        ('adamw', 'dp+tp', 1, 4, ' --checkpointing'),
        ('galore', 'dp', 4, 8, ' --rank=64'),
        ('galore', 'fsdp', 4, 8, ' --rank=64'),
        ('galore', 'fsdp', 4, 4, ' --rank=64 --state_bits=8'),
        ('galore', 'fsdp', 1, 8, ' --rank=64 --checkpointing'),
        ('lora', 'fsdp', 4, 8, ' --rank=16 --train_rest=no'),
        ('lora', 'fsdp', 1, 8, ' --rank=16 --train_rest=no --checkpointing'),
        ('lora', 'fsdp', 4, 4, ' --rank=16 --train_rest=yes --quantize=none --state_bits=8'),
        ('loqt', 'fsdp', 4, 8, ' --rank=64 --state_bits=8'),
        ('loqt', 'fsdp', 1, 4, ' --rank=64 --update_proj_gap=2 --checkpointing'),
        ('lora', 'fsdp', 1, 4, ' --rank=16 --train_rest=yes --checkpointing'),
        ('adamw', 'fsdp', 4, 4, ' --coreset=grad --coreset_from=4'),
    )
]


def worker(file, only):
    """All runs, by train.py's main, in one process of N: the first writes [bytes planned, bytes measured] of each."""
    import torch.distributed as dist

    import configurator
    import train
    from plumbing import parallel, sharding

    dist.init_process_group('gloo')
    rank, rows = dist.get_rank(), []

    def start(config):  # the group is there
        return parallel.Here(rank, N, 'cpu', torch.float32, sharding.tp_of(config, N))

    train.processes.start, parallel.Here.finish = start, lambda here, code=0: None
    for i, flags in enumerate(flags for flags in RUNS if only in flags):
        words = [*BASE.split(), *flags.split(), f'--out_dir={file}.{i}']
        with contextlib.redirect_stdout(io.StringIO()) as said:
            train.main(configurator.load(str(ROOT / 'train.py'), words))
        if rank == 0:
            lines = dict(line.split(': ', 1) for line in said.getvalue().splitlines() if ': ' in line)
            rows.append([int(lines[f'peak_bytes_{what}']) for what in ('planned', 'measured')])
            print(rows[-1], flags, flush=True)
    if rank == 0:
        Path(file).write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)


def main(only):
    with tempfile.TemporaryDirectory() as folder:
        words = ['-m', 'torch.distributed.run', f'--nproc_per_node={N}', '--standalone', '-m', 'bench.runs.several']
        environment = os.environ | {'OMP_NUM_THREADS': '1'}
        subprocess.run(
            [sys.executable, *words, f'--worker={folder}/rows', f'--only={only}'], cwd=ROOT, check=True, env=environment
        )
        found = json.loads((Path(folder) / 'rows').read_text())
    if only:
        return
    rows = [(flags, p, m, 100 * (p / m - 1)) for flags, (p, m) in zip(RUNS, found, strict=True)]
    worst = max(rows, key=lambda row: abs(row[3]))
    text = [
        '# several: the plan of one of four processes against its run',
        '',
        f'Made by `python -m bench.runs.several` (torch {torch.__version__}), on gloo and this CPU. Live bytes of all',
        "tensors of the first process at their peak in three steps, against train.py's own plan, printed before them.",
        f'`{BASE}`.',
        '',
        f'{len(rows)} runs, largest error {worst[3]:+.2f} %.',
        '',
        '| planned, MB | measured, MB | error | flags |',
        '|---|---|---|---|',
        *(f'| {p / 1e6:.2f} | {m / 1e6:.2f} | {error:+.2f} % | `{flags}` |' for flags, p, m, error in rows),
        '',
        'No card has run these: what NCCL keeps is a guess there (memory/llmem.py).',
    ]
    (ROOT / 'results' / 'several.md').write_text('\n'.join(text) + '\n')


if __name__ == '__main__':
    worker(args.worker, args.only) if args.worker else main(args.only)
