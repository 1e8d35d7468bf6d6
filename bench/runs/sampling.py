"""
Tokens a second of sample.py's generation and of transformers' `generate` with its cache: makes sampling.md.

    python -m bench.runs.sampling --model=path/to/SmolLM2-135M    # minutes on a CPU

The same folder, dtype and prompts, greedy, in turns; medians of what a round takes, prompts read included, in seconds
of the processor, which other programs do not stretch. One prompt of 12 tokens, and 16 of 5 to 60 (theirs padded on the
left). NF4: ours as QLoRA keeps it, decoded once; theirs as bitsandbytes does, at each product. Every text is compared.
"""

from bench import parser

if __name__ == '__main__':
    options = parser()
    options.add_argument('--model', required=True, help='folder in the Hugging Face layout')
    options.add_argument('--tokens', type=int, default=32, help='new tokens of each text')
    options.add_argument('--rounds', type=int, default=3)
    options.add_argument('--kinds', default='fp32 bf16 nf4')
    options = options.parse_args()

import os
import time
from functools import partial

import torch

import lora
import sample
from bench.measure import clear, interleaved, table
from model import LLaMA
from plumbing.build import ROOT

LENGTHS = 12, 30, 7, 55, 23, 41, 9, 17, 33, 28, 14, 60, 5, 48, 19, 37
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'nf4': torch.bfloat16}


def ours(folder, kind, n, prompts):
    """A function that continues the first, or all of the prompts. Its model is ready, as sample.py's is."""
    linear = partial(lora.LoRALinear, rank=1, quantize='nf4', dtype=DTYPES[kind])
    model = LLaMA.from_pretrained(folder, dtype=DTYPES[kind], **({'linear': linear} if kind == 'nf4' else {}))
    for layer in model.modules():
        if isinstance(layer, lora.LoRALinear):  # the packed weights alone, as theirs
            layer.A, layer.B = (torch.nn.Parameter(p) for p in (layer.A[:0].detach(), layer.B[:, :0].detach()))
    model.set_block_size(max(map(len, prompts)) + n)
    ready = sample.decoded(model)
    ready.__enter__()  # until the model is given up, with `write`, which holds this

    def write(many):
        if not many:
            return [list(sample.generate(model, list(prompts[0]), n, temperature=0))]
        made = dict(sample.generate_batch(model, prompts, n))
        return [made[i] for i in range(len(prompts))]

    write.ready = ready
    return write


def theirs(folder, kind, n, prompts):
    import transformers

    more = {}
    if kind == 'nf4':
        how = dict(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=DTYPES[kind])
        more = dict(quantization_config=transformers.BitsAndBytesConfig(**how), device_map='cpu')
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[kind], **more).eval()

    def write(many):
        some = prompts if many else prompts[:1]
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in some])  # (B, T)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])  # (B, T)
        how = dict(do_sample=False, min_new_tokens=n, max_new_tokens=n, pad_token_id=0, eos_token_id=None)
        return model.generate(ids, attention_mask=mask, **how)[:, width:].tolist()

    return write


def main():
    n, generator = options.tokens, torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 4000, (length,), generator=generator).tolist() for length in LENGTHS]
    rows = []
    for kind in options.kinds.split():
        us, them = (make(options.model, kind, n, prompts) for make in (ours, theirs))
        for many in (False, True):
            same = sum(a == b for a, b in zip(us(many), them(many)))  # and both are warm
            took = interleaved(
                {'ours': partial(us, many), 'theirs': partial(them, many)}, options.rounds, clock=time.process_time
            )
            made = n * (len(prompts) if many else 1)
            rate = [made / took['ours'], made / took['theirs']]
            rows.append([kind, made // n, *rate, rate[0] / rate[1], f'{same} of {made // n}'])
            print(*table([''], rows[-1:])[2:], flush=True)
        del us, them
        clear()
    name = os.path.basename(os.path.normpath(options.model))
    head = ['weights', 'prompts', "ours, tokens a second", "transformers'", 'ratio', 'the same texts']
    lines = ["# Sampling: ours and transformers' generate", '']
    lines += [f'Made by `python -m bench.runs.sampling --model={name}`: {n} tokens, greedy, {options.rounds} rounds, ']
    lines[-1] += f'torch {torch.__version__}, threads: {torch.get_num_threads()}.'
    lines += ['', *table(head, rows), '']
    with open(os.path.join(ROOT, 'results', 'sampling.md'), 'w', encoding='utf-8') as f:
        f.write('\n'.join(lines))
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
