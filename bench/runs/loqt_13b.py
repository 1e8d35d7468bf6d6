"""
Real steps of LoQT's 24 GB config on a CPU with 24 GB of memory: LLaMA-13B itself; makes loqt_13b.md.

    python -m bench.runs.loqt_13b    # 45 minutes on two cores; a finished run is kept in out/real
"""

from bench import parser

if __name__ == '__main__':
    parser().parse_args()

import os

from bench.runs.galore_7b import ROOT, cells, run

SIZES = {'13b': 1024}  # ranks; other names in model.SIZES work, too
# Two steps in one process. The first gives every layer its P; with tau 1 and no staggering, the second merges them all.
WORDS = 'config/loqt_13b_4090.py --device=cpu --dataset=pystdlib --vocab_size=32000 --batch_size=1 --warmup_iters=0'
WORDS += ' --gradient_accumulation_steps=1 --max_iters=2 --lr_decay_iters=100 --update_proj_gap=1 --psi=0'
WORDS += ' --stagger=False --eval_tokens=256 --sample_tokens=0 --save_merged=False --overwrite'


def main():
    lines = [
        '# Real steps of `config/loqt_13b_4090.py` on a CPU',
        '',
        'Made by `python -m bench.runs.loqt_13b` on two cores and 24 GB of memory, no GPU. All layers, NF4 with double',
        'quantisation, 8-bit states, per_layer, checkpointing, one round of compensation, 256 tokens a step. In the',
        'first step every layer gets its first P, in the second every one merges; then a packed checkpoint is written.',
        'Nothing is offloaded: main memory stands for the card. The plan has only the merges of the first step. On so',
        'few tokens, at the full learning rate without warm-up, the steps show that it runs, not that it learns.',
        '',
        '| model | loss of step 2 | seconds of the steps | of the process | peak resident | planned |',
        '|---|---|---|---|---|---|',
    ]
    commands = []
    for size, rank in SIZES.items():
        out_dir = f'out/real/loqt_{size}'
        command, text = run(f'{WORDS} --model={size} --rank={rank} --out_dir={out_dir}', f'{out_dir}.log')
        commands.append(command)
        lines.append(f'| {" | ".join([size, *cells(text)])} |')
    lines += ['', 'Commands:', '', '```', *commands, '```', '']
    with open(os.path.join(ROOT, 'results', 'loqt_13b.md'), 'w') as f:
        f.write('\n'.join(lines))
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
