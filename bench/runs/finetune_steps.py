"""
A fine-tuning step of a real model beside transformers with peft and torch's AdamW, on the same batch in the same
process: makes finetune_steps.md.

    python -m bench.runs.finetune_steps --model=path/to/SmolLM2-135M-Instruct      # five minutes on a CPU core

Pairs: all weights, LoRA (rank 16 of all seven layers), QLoRA (NF4 by bitsandbytes there). In fp32, whose products are
the same on both sides. The batch is of `--rows` examples of random tokens, with lengths as GSM8K's, padded to the
longest, the last 58 % of each trained; and the same examples in one row without padding, as our trainer packs them.
On one thread the seconds are of the processor's time, which is blind to what else runs on the machine.
"""

from bench import parser

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('--model', required=True, help='a Hugging Face folder of the LLaMA family')
    asked.add_argument('--rows', type=int, default=4, choices=range(1, 1025), metavar='N', help='examples (4)')
    asked.add_argument('--repeats', type=int, default=5, choices=range(1, 1025), metavar='N', help='steps of each (5)')
    args = asked.parse_args()

import functools
import os
import sys
import time

import numpy as np
import torch

import configurator
import train
from bench.examples import LENGTHS, PERCENTILES
from bench.measure import clear, interleaved, table
from configurator import method_of
from memory.record import LiveBytes
from plumbing.build import ROOT, build_model, layers_of

PAIRS = {  # name: (our flags, what peft is to make of theirs)
    'all weights': ('--method=adamw', None),
    'LoRA': ('--method=lora --rank=16 --scale=2 --quantize=none', 'lora'),
    'QLoRA': ('--method=lora --rank=16 --scale=2', 'qlora'),
}


def batch(rows, vocabulary):
    """-> x, y (B, T), mask of what is no padding (B, T)."""
    draw = np.random.default_rng(0)
    lengths = np.interp(draw.random(rows) * 100, PERCENTILES, LENGTHS).astype(int)
    tokens = torch.from_numpy(draw.integers(vocabulary, size=(rows, lengths.max() + 1)))
    places, lengths = torch.arange(lengths.max() + 1), torch.from_numpy(lengths)[:, None]
    y = torch.where((places >= 0.42 * lengths) & (places < lengths), tokens, -100)
    return tokens[:, :-1], y[:, 1:].contiguous(), (places < lengths)[:, :-1]


def packed(x, y, mask):
    """The same in one row: x, y (1, n), no weights, pieces."""
    ends = mask.sum(1).cumsum(0).int()
    return x[mask][None], y[mask][None], None, torch.cat([ends.new_zeros(1), ends])


def ours(folder, flags):
    """-> a function that takes one step on a micro-batch."""
    words = [*flags.split(), f'--init_from={folder}', '--dtype=float32', '--block_size=1024', '--device=cpu']
    config = configurator.load(train.__file__, words)
    model = build_model(config, folder, 0, torch.float32, 'cpu', folder, layers_of(config))
    optimizer = method_of(config).setup(model, config)
    return lambda *micro_batch: train.training_step(model, optimizer, [micro_batch], 1e-4, 'cpu')


def theirs(folder, kind):
    import peft
    import transformers

    how = {}
    if kind == 'qlora':
        nf4 = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.float32
        )
        how = dict(quantization_config=nf4)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    if kind:
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules='all-linear'))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(x, y, mask):
        labels = torch.cat([torch.full((len(y), 1), -100), y[:, :-1]], 1)  # it shifts them back
        loss = model(input_ids=x, attention_mask=mask.long(), labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def main(args):
    rows = []
    for name, (flags, kind) in PAIRS.items():
        x, y, mask = batch(args.rows, 49_000)
        one, other = ours(args.model, flags), theirs(args.model, kind)
        steps = {'ours': functools.partial(one, x, y), 'theirs': functools.partial(other, x, y, mask)}
        losses, peaks = {}, {}
        for who, step in steps.items():
            with LiveBytes() as live:  # of what a step makes: weights, and what is made later, come on top
                losses[who] = step().item()
                step()
            peaks[who] = live.peak
        steps['packed'] = functools.partial(one, *packed(x, y, mask))
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        seconds = interleaved(steps, args.repeats, clock=clock)
        ratios = [f'{seconds[who] / seconds["theirs"]:.2f}' for who in ('ours', 'packed')]
        rows.append(
            [name, *(f'{seconds[who]:.2f}' for who in ('ours', 'packed', 'theirs')), *ratios]
            + [f'{peaks[who] / 1e9:.2f}' for who in peaks]
            + [f'{losses[who]:.4f}' for who in losses]
        )
        print(*rows[-1], flush=True)
        del steps, step, one, other
        clear()
    head = ['', 'ours, s', 'packed', 'theirs', 'ours / theirs', 'packed / theirs']
    head += ['ours, GB', 'theirs', 'loss, ours', 'theirs']
    lines = [
        '# A fine-tuning step beside transformers and peft',
        '',
        f'Made by `python -m bench.runs.finetune_steps --rows={args.rows} --repeats={args.repeats}` in fp32 on '
        f'{torch.get_num_threads()} CPU thread(s), torch {torch.__version__.split("+")[0]}:',
        'medians of the steps, in turns, on one thread of processor time. Packed: our step on the same examples in one',
        'row, as train.py packs them. GB: what a first and a second padded step make and hold at once, states with it,',
        'without the weights.',
        '',
        *table(head, rows),
        '',
    ]
    with open(os.path.join(ROOT, 'results', 'finetune_steps.md'), 'w') as f:
        f.write('\n'.join(lines))
    print('\n'.join(lines))


if __name__ == '__main__':
    sys.exit(main(args))
