"""
Generate text from a checkpoint of ours or any Hugging Face LLaMA folder, and print it token by token.

    python sample.py out/galore_laptop                              # the best checkpoint continues a newline
    python sample.py out/galore_laptop --prompt='def main(' --tokens=300 --temperature=0.5
    python sample.py path/to/SmolLM2-135M --prompt='The capital of France is' --top_p=0.9
    echo 'import os' | python sample.py out/galore_laptop --prompt=-
    python sample.py out/loqt_13b_4090 --save_to=out/merged         # also write it as a Hugging Face folder
    python sample.py out/lora_run --save_adapter=out/adapter        # also write LoRA's A and B as a PEFT folder
    python sample.py out/adapter                                    # a PEFT folder, with the base model it names

570 tokens a second for the laptop model on two CPU cores: with the key-value cache, a token costs one forward pass.
"""

import sys

import configurator

if __name__ == '__main__':  # before the imports that take seconds
    config = configurator.load_or_exit(__file__, sys.argv[1:], positional='checkpoint')

import os
from functools import partial

import torch

import lora
from data import tokenizer
from model import KVCache, LLaMA, ModelError
from plumbing import hf
from plumbing.build import base_of, load_model
from plumbing.checkpoint import CheckpointError
from plumbing.hf import AdapterError, weights_folder

# ---- config ----------------------------------------------------------------------------------------------------------
checkpoint = ''  # folder of a run (its best/, else last/, is used) or of weights; --checkpoint= may be left out
prompt = '\n'  # text to continue; - reads it from standard input
tokens = 200  # maximum number of new tokens; an end-of-text token stops earlier
samples = 1  # number of texts to generate, one after the other
temperature = 0.8  # below 1 safer, above 1 wilder; 0 always takes the likeliest token
top_k = 0  # choose among the k likeliest tokens only; 0: all
top_p = 1.0  # choose among the likeliest tokens whose probabilities sum to this
save_to = ''  # also write the model to this Hugging Face folder, packed weights as dense ones; '': no
save_adapter = ''  # also write LoRA's A and B to this folder, in peft's format; '': no
seed = 1  # the same seed gives the same text
device = 'auto'  # 'auto' | 'cpu' | 'cuda': auto uses cuda if it is available
# ---- end of config ---------------------------------------------------------------------------------------------------


def problems(config):
    """One sentence for each key that cannot work."""
    found = []
    if not config.checkpoint:
        found.append('no checkpoint: type python sample.py FOLDER, for instance out/galore_laptop')
    if config.temperature < 0:
        found.append(f'temperature={config.temperature} is negative: use 0 or more')
    if not 0 < config.top_p <= 1:
        found.append(f'top_p={config.top_p} is not a probability: use more than 0 and at most 1')
    if config.top_k < 0 or config.tokens < 1 or config.samples < 1:
        found.append('top_k, tokens and samples are counts: top_k is 0 or more, the others 1 or more')
    if config.device == 'cuda' and not torch.cuda.is_available():
        found.append("device='cuda', but torch sees no CUDA device: use --device=cpu, or install a CUDA build of torch")
    return found


def choose(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One token id from the last position's logits (V,): nucleus sampling (1904.09751) within the top k."""
    if temperature == 0:
        return int(logits.argmax())
    logits, order = (logits.float() / temperature).sort(descending=True)
    p = logits.softmax(0)  # (V,)
    p[p.cumsum(0) - p >= top_p] = 0  # keep a token if the likelier ones sum to less than top_p; the first always stays
    if top_k:
        p[top_k:] = 0
    return int(order[torch.multinomial(p, 1, generator=generator)])


@torch.no_grad()
def generate(model, ids, n, eot=None, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Yield up to n token ids that continue the list `ids`; stop after the end-of-text id."""
    device, window = model.head.device, model.config.block_size
    ids, cache = list(ids) or [eot or 0], None  # some tokenizers encode a newline as no token at all
    for _ in range(n):
        if cache is None or cache.length == window:
            # Fill a new cache: at the start, and when the window is full, from its second half at new positions.
            fresh = ids[-window:] if cache is None else ids[-(window // 2) :]
            cache = KVCache(model.config, device=device, dtype=model.activation_dtype)
        logits = model(torch.tensor([fresh], device=device), cache=cache)[0, -1]  # (V,)
        token = choose(logits.cpu(), temperature, top_k, top_p, generator)
        ids.append(token)
        fresh = [token]
        yield token
        if token == eot:
            return


def main(config):
    device = config.device if config.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    folder = weights_folder(config.checkpoint)
    if adapter := hf.read_adapter(config.checkpoint):
        base = {key: adapter[key] for key in ('quantize', 'double_quant')}  # as it was when the adapter was made
        linear = partial(lora.LoRALinear, rank=adapter['r'], alpha=adapter['lora_alpha'], **base)
        model = LLaMA.from_pretrained(folder, device=device, linear=linear)
        hf.load_adapter(model, config.checkpoint)
    else:
        if config.save_adapter:
            base_of(folder)  # raises here, before the model is loaded, if there is no adapter
        model = load_model(folder, device, factors=bool(config.save_adapter))
    model.set_block_size(min(model.config.block_size, 4096), device)  # a cache of 128k positions would be gigabytes
    tok = tokenizer.load(folder)
    if config.save_adapter:
        hf.save_adapter(model, config.save_adapter, base_of(folder))
    if config.save_to:
        model.save_pretrained(config.save_to)
        for name, content in tokenizer.files_of(folder).items():
            with open(os.path.join(config.save_to, name), 'wb') as f:
                f.write(content)
    prompt = sys.stdin.read() if config.prompt == '-' else config.prompt
    ids = tok.encode(prompt)
    generator = torch.Generator().manual_seed(config.seed)
    for i in range(config.samples):
        if config.samples > 1:
            print(f'---- sample {i + 1}')
        options = (config.temperature, config.top_k, config.top_p, generator)
        new_ids = generate(model, ids, config.tokens, tok.eot, *options)
        print(prompt, end='', flush=True)
        for piece in tok.decode_stream(token for token in new_ids if token != tok.eot):
            print(piece, end='', flush=True)
        print()


if __name__ == '__main__':
    configurator.check_or_exit(config, __file__, problems)
    try:
        main(config)
    except (ModelError, CheckpointError, tokenizer.TokenizerError, AdapterError, OSError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit(130)
