"""
Generate text from a checkpoint of ours or any Hugging Face LLaMA folder, and print it token by token.

    python sample.py out/galore_laptop                              # the best checkpoint continues a newline
    python sample.py out/galore_laptop --prompt='def main(' --tokens=300 --temperature=0.5
    python sample.py path/to/SmolLM2-135M --prompt='The capital of France is' --top_p=0.9
    python sample.py path/to/SmolLM2-135M-Instruct --chat           # a conversation; /system TEXT, /reset, /quit
    echo 'import os' | python sample.py out/galore_laptop --prompt=-
    python sample.py path/to/SmolLM2-135M --prompts=prompts.txt     # one a line, 16 at once
    python sample.py out/loqt_13b_4090 --save_to=out/merged         # also write it as a Hugging Face folder
    python sample.py out/run --save_to=out/mine.gguf                # for llama.cpp and ollama; mine.q8_0.gguf: half
    python sample.py out/lora_run --save_adapter=out/adapter        # also write LoRA's A and B as a PEFT folder
    python sample.py out/adapter                                    # a PEFT folder, with the base model it names

570 tokens a second for the laptop model on two CPU cores: with the key-value cache, a token costs one forward pass.
A text longer than the window goes on at that price: the window slides, its first four tokens stay, and none is read
again. It is not what reading the last window anew would give, but closer to the whole text's (see plumbing/cache.py).
"""

import sys

import configurator
from plumbing import terminal

if __name__ == '__main__':  # before the imports that take seconds
    terminal.quiet_ctrl_c()
    config = configurator.load_or_exit(__file__, sys.argv[1:], positional='checkpoint')

import itertools
import math
import os
import re
from functools import partial
from types import SimpleNamespace

import torch

import lora
from data import chat as templates
from data import fields, tokenizer
from model import LLaMA, ModelError
from plumbing import Stop, export, hf, talking
from plumbing.build import base_of, load_model
from plumbing.cache import KVCache
from plumbing.checkpoint import verify
from plumbing.hf import AdapterError, weights_folder
from plumbing.ready import decoded

# ---- config ----------------------------------------------------------------------------------------------------------
checkpoint = ''  # folder of a run (its best/, else last/, is used) or of weights, or a name on the Hugging Face hub
prompt = '\n'  # text to continue; - reads it from standard input
prompts = ''  # a file of prompts, one a line, in the place of `prompt`
batch_size = 16  # how many of its texts are written at once; each as it would be alone
tokens = 200  # maximum number of new tokens; an end-of-text token stops earlier. In a chat: of each answer, if given
samples = 1  # number of texts to generate, one after the other; with a file of prompts, of each
temperature = 0.8  # below 1 safer, above 1 wilder; 0 always takes the likeliest token
top_k = 0  # choose among the k likeliest tokens only; 0: all
top_p = 1.0  # choose among the likeliest tokens whose probabilities sum to this
chat = False  # talk with the model in the terminal, with its chat template
template = ''  # the chat's template, a name of data/templates.py; '': the model's own
context = 8192  # longest conversation, in tokens; less where the model's own window is shorter
save_to = ''  # also write the model to this Hugging Face folder, or file NAME.gguf, packed weights as dense ones
gguf = ''  # '' | 'f16' | 'q8_0': how save_to=NAME.gguf holds matrices; '': q8_0 if the name says so, else f16
save_adapter = ''  # also write LoRA's A and B to this folder, in peft's format; '': no
overwrite = False  # let save_to and save_adapter replace a folder that holds a model
seed = 1  # the same seed gives the same text
device = 'auto'  # 'auto' | 'cpu' | 'cuda': auto uses cuda if it is available
# ---- end of config ---------------------------------------------------------------------------------------------------

NO_NUMBERS = 'the model computes NaN or infinity: its weights are damaged, or a training that diverged'
# What generation_config.json may ask for that changes even the likeliest text, and is not done here.
NOT_DONE = ('no_repeat_ngram_size', 'min_length', 'min_new_tokens', 'bad_words_ids', 'suppress_tokens', 'num_beams')
NOT_DONE += ('begin_suppress_tokens', 'forced_bos_token_id', 'forced_eos_token_id', 'sequence_bias')
NOT_DONE += ('exponential_decay_length_penalty', 'guidance_scale')


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
    if not -(2**63) <= config.seed < 2**64:
        found.append(f'seed={config.seed} has more than 64 bits: use a smaller number')
    if config.prompts and (both := configurator.typed(config, 'prompt')):
        found.append(f'{both[0]} says nothing where prompts is a file of them: leave one of the two out')
    if config.prompts and not os.path.isfile(config.prompts):
        found.append(f'prompts={config.prompts!r} is no file: give one with a prompt in each line')
    if not config.prompts and (both := configurator.typed(config, 'batch_size')):
        found.append(f'{both[0]} is of a file of prompts: add --prompts=FILE')
    if config.chat and (both := configurator.typed(config, 'prompt', 'prompts', 'samples')):
        found.append(f'{both[0]} says nothing in a chat: leave it out, and type your message when you are asked')
    if not config.chat and (both := configurator.typed(config, 'template', 'context')):
        found.append(f'{both[0]} is of a conversation: add --chat')
    found += configurator.at_least(config, 1, 'context', 'batch_size')
    if config.gguf and not config.save_to.endswith('.gguf'):
        found.append(f'gguf={config.gguf} says how --save_to=NAME.gguf is written: add that')
    if config.device == 'cuda' and not torch.cuda.is_available():
        found.append("device='cuda', but torch sees no CUDA device: use --device=cpu, or install a CUDA build of torch")
    return found


def choose(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One token id from the last position's logits (V,): nucleus sampling (1904.09751) within the top k.

    Raises ModelError if the logits are no numbers."""
    if not math.isfinite(highest := float(logits.max())):
        raise ModelError(NO_NUMBERS)
    if temperature == 0:
        return int(logits.argmax())
    # The likeliest is at 0, so that no temperature, however low, makes an infinity of it.
    logits, order = ((logits.float() - highest) / max(temperature, 1e-30)).sort(descending=True)
    p = logits.softmax(0)  # (V,)
    p[p.cumsum(0) - p >= top_p] = 0  # keep a token if the likelier ones sum to less than top_p; the first always stays
    if 0 < top_k < len(p):
        p[top_k:] = 0
    return int(order[torch.multinomial(p, 1, generator=generator)])


def choose_each(logits, rows, temperature, top_k, top_p, penalty=1.0):
    """choose() for each row of logits (rows, V), with its own generator; the likeliest ones where the logits are."""
    if penalty != 1:
        logits = torch.stack([penalised(one, row.ids, penalty) for one, row in zip(logits.cpu(), rows)])
    if temperature:
        return [choose(one, temperature, top_k, top_p, row.generator) for one, row in zip(logits.cpu(), rows)]
    highest, tokens = logits.max(1)
    if not highest.isfinite().all():
        raise ModelError(NO_NUMBERS)
    return tokens.tolist()


def penalised(logits, ids, penalty):
    """Divide the logits (V,) of tokens that are there by `penalty`, multiply negative ones (CTRL, 1909.05858, 4.1)."""
    if penalty != 1:
        seen = torch.tensor(sorted(set(ids)))
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
    return logits


def ends_of(eot):
    return [] if eot is None else [eot] if isinstance(eot, int) else list(eot)


def turn_ends(template):
    """The id that ends a turn as this chat template writes it."""
    ids, trained = template.encode([{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}])
    return [i for i, kept in zip(ids, trained) if kept][-1:]


def first_ids(model, ids, ends):
    """The ids to continue: some tokenizers encode a newline as no token at all."""
    return list(ids) or [next((i for i in (model.config.bos_token_id, *ends) if i is not None), 0)]


@torch.inference_mode()
def generate(model, ids, n, eot=None, temperature=1.0, top_k=0, top_p=1.0, generator=None, penalty=1.0, cache=None):
    """Yield up to n token ids that continue the list `ids`; stop after an end-of-text id.

    eot: that id, a list of several, or None. penalty: see `penalised`. cache: kept between calls, so that what two
    texts begin with is computed once."""
    device, window, ends = model.head.device, model.config.block_size, ends_of(eot)
    ids, fresh = first_ids(model, ids, ends), None
    if kept := cache:
        known = min(len(common([kept.ids, ids[:-1]])), kept.length) if kept.length <= kept.slots else 0
        kept.lengths, kept.ids, fresh = [known], [], ids[known:]  # ids: [] until the end, since Ctrl-C may come between
    if fresh is None or len(ids) > window:
        cache = None
    for i in range(n):
        if cache is None or (cache.length == window and not cache.slides):
            # Fill a new cache: at the start, and where a full one cannot slide, from its second half at new positions.
            fresh = ids[-window:] if not i else ids[-(window // 2) :]
            cache = model.new_cache()
        x = model.hidden(torch.tensor([fresh], device=device), cache)  # (1, T, D)
        logits = penalised(model.logits(x[0, -1]).cpu(), ids, penalty)  # (V,)
        token = choose(logits, temperature, top_k, top_p, generator)
        ids.append(token)
        fresh = [token]
        done = token in ends or i == n - 1
        if done and kept is cache:
            kept.ids = ids
        yield token
        if done:
            return


def common(lists):
    """What all these lists begin with."""
    low, high = min(lists, default=[]), max(lists, default=[])  # no other differs from them earlier
    return [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(low, high))]


@torch.inference_mode()
def generate_batch(model, prompts, n, eot=None, batch_size=16, stop=None, temperature=0.0, top_k=0, top_p=1.0, seed=1,
                   penalty=1.0):  # fmt: skip
    """Continue many prompts (lists of ids), batch_size at a time. Yields (index of a prompt, its up to n new ids) in
    the order in which they end, each as `generate` alone would continue it with a generator of seed + index.

    A prompt that ends leaves its row of the cache to the next that waits, and what all prompts begin with is computed
    once. A rotation that depends on the length of the text follows the longest row. stop(ids): whether to stop after
    these new ids, besides after an end-of-text id."""
    device, window, ends = model.head.device, model.config.block_size, ends_of(eot)
    waiting = [SimpleNamespace(index=i, ids=first_ids(model, ids, ends)) for i, ids in enumerate(prompts)][::-1]
    slots = min(window, max((len(row.ids) for row in waiting), default=0) + n)
    new_cache = partial(KVCache, model.config, device=device, dtype=model.activation_dtype, slots=slots)
    prefix = common([row.ids[-window:-1] for row in waiting])
    begun, cache, rows = new_cache(1), new_cache(min(batch_size, len(waiting))), []
    if prefix:
        model.hidden(torch.tensor([prefix], device=device), begun)

    def fill(b, ids, known=0):
        """Read ids into row b of the cache, all but the last, which the next step reads, as in all rows."""
        row = cache.row(b, known)
        row.k[..., :known, :], row.v[..., :known, :] = begun.k[..., :known, :], begun.v[..., :known, :]
        if fresh := ids[known:-1]:
            model.hidden(torch.tensor([fresh], device=device), row)
        cache.lengths[b] = len(ids) - 1

    cache.lengths = []  # none in use
    while rows or waiting:
        while waiting and len(rows) < cache.k.shape[1]:
            rows.append(row := waiting.pop())
            row.start, row.generator = len(row.ids), torch.Generator().manual_seed(seed + row.index)
            cache.lengths.append(0)
            fill(len(rows) - 1, row.ids[-window:], len(prefix))
        x = model.hidden(torch.tensor([row.ids[-1:] for row in rows], device=device), cache)  # (rows, 1, D)
        tokens = choose_each(model.logits(x[:, -1]), rows, temperature, top_k, top_p, penalty)
        for b in reversed(range(len(rows))):
            row = rows[b]
            row.ids.append(tokens[b])
            made = row.ids[row.start :]
            if made[-1] in ends or len(made) == n or (stop and stop(made)):
                yield row.index, made
                cache.drop(b)
                rows[b] = rows[-1]
                rows.pop()


def located(checkpoint):
    """Its folder, once it is downloaded if it is a model's name on the hub. Raises ModelError if there is no model."""
    if re.fullmatch(r'(?!out/)\w[\w.-]*/[\w.-]+', checkpoint) and not os.path.exists(checkpoint):
        checkpoint = hf.download(checkpoint)
    weights_folder(checkpoint)
    return checkpoint


def load(checkpoint, device, factors=False, labels=0):
    """-> the model of a run, of a Hugging Face folder or of an adapter; its tokenizer; the folder its files are in.
    A model that is no folder here, ORGANISATION/NAME, is downloaded from the hub.

    factors: for LoRA's A and B, which a run's folder keeps beside dense weights. labels: of a classifier, else 0."""
    checkpoint = located(checkpoint)
    folder = weights_folder(checkpoint)
    verify(folder, weights_alone=not factors)
    if adapter := hf.read_adapter(checkpoint):
        base = {key: adapter[key] for key in ('quantize', 'double_quant')}  # as it was when the adapter was made
        linear = partial(lora.LoRALinear, rank=adapter['r'], alpha=adapter['scale'] * adapter['r'], **base)
        model = LLaMA.from_pretrained(folder, device=device, linear=linear)
        hf.load_adapter(model, checkpoint)
    else:
        if factors:
            base_of(folder)  # raises here, before the model is loaded, if there is no adapter
        model = load_model(folder, device, factors, labels)
    return model, tokenizer.load(folder), folder


def main(config):
    for target in filter(None, (config.save_to, config.save_adapter)):
        export.check_target(target, config.overwrite)  # before anything that takes time
    device = config.device if config.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    model, tok, folder = load(config.checkpoint, device, factors=bool(config.save_adapter))
    if config.save_adapter:
        with export.written(config.save_adapter, config.overwrite) as new:
            hf.save_adapter(model, new, *base_of(folder))
    if config.save_to:
        if any(map(hf.is_lora, model.modules())):
            say_merged(model, tok, device)
        export.save(model, tok, folder, config.save_to, config.overwrite, config.gguf)
    with decoded(model):
        write = talk if config.chat else write_all if config.prompts else write_samples
        write(config, model, tok, folder, device)


def talk(config, model, tok, folder, device):
    """A conversation in the terminal. What was said in it is computed once."""
    template = templates.load(folder, tok, config.template or None)
    window = min(config.context, model.config.block_size)
    check_ids(template.prompt([{'role': 'user', 'content': 'a'}]), model, folder)
    model.set_block_size(window, device)
    cache = KVCache(model.config, device=device, dtype=model.activation_dtype)
    ends = [*tokenizer.ends(folder, tok), *turn_ends(template)]
    options = (ends, config.temperature, config.top_k, config.top_p, torch.Generator().manual_seed(config.seed))
    options += (penalty_of(folder), cache)
    longest = config.tokens if configurator.typed(config, 'tokens') else None
    talking.talk(template, tok, lambda ids, n: generate(model, ids, n, *options), window, longest)


def check_ids(ids, model, folder):
    """Raise ModelError for an id beyond the model's rows."""
    if max(ids, default=0) >= (rows := model.config.vocab_size):
        raise ModelError(
            f'{folder}: its tokenizer has id {max(ids)}, its model {rows} rows: they do not belong together'
        )


def say_merged(model, tok, device):
    """Print how far the merged model's logits are from those of W and the adapter side by side."""
    ids = tok.prompt('A bat and a ball cost $1.10 in total. The bat costs $1.00 more than the ball.\n' * 4)
    ids = [i for i in ids if i < model.config.vocab_size][: min(64, model.config.block_size)] or [0]
    most, largest, same = hf.merge_error(model, torch.tensor([ids], device=device))
    print(f'merged: on {len(ids)} tokens logits move by {most:.2g} at most (the largest is {largest:.3g}), ', end='')
    print(f'the likeliest token is the same at {100 * same:.0f}% of positions')


def write_samples(config, model, tok, folder, device):
    """Print the prompt and what the model makes of it, `samples` times."""
    prompt = sys.stdin.read() if config.prompt == '-' else config.prompt
    prompt = prompt.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')  # bytes that are no UTF-8: U+FFFD
    ids, ends = tok.prompt(prompt), tokenizer.ends(folder, tok)
    window = model.config.block_size
    check_ids(ids, model, folder)
    if len(ids) > window:
        print(f'note: the model reads only the last {window:,} of the {len(ids):,} tokens', file=sys.stderr)
    model.set_block_size(min(window, len(ids) + config.tokens), device)  # what the cache and the tables are made for
    generator = torch.Generator().manual_seed(config.seed)
    for i in range(config.samples):
        if config.samples > 1:
            print(f'---- sample {i + 1}')
        options = (config.temperature, config.top_k, config.top_p, generator, penalty_of(folder))
        made = generate(model, ids, config.tokens, ends, *options)
        print(prompt, end='', flush=True)
        anything = False
        for piece in tok.decode_stream(made, ids):
            anything = True
            print(piece, end='', flush=True)
        print(flush=True)
        if not anything:
            print('note: nothing follows: the model ended at once, at end-of-text', file=sys.stderr)


def write_all(config, model, tok, folder, device):
    """Print each prompt of the file and what the model makes of it, in the file's order, as they are done."""
    if not isinstance(model, LLaMA):
        raise ModelError(f'{folder}: its cache is of one text: leave out prompts, and use --prompt')
    with open(config.prompts, encoding='utf-8', errors='replace') as f:
        texts = [line.rstrip('\n') for line in f if line.strip() for _ in range(config.samples)]
    if not texts:
        raise Stop(f'{config.prompts} has no line with a prompt in it: write some')
    prompts, ends = [tok.prompt(text) for text in texts], tokenizer.ends(folder, tok)
    window, longest = model.config.block_size, max(map(len, prompts))
    check_ids([i for ids in prompts for i in ids], model, folder)
    if longest > window:
        print(f'note: the model reads only the last {window:,} tokens of a prompt', file=sys.stderr)
    model.set_block_size(min(window, longest + config.tokens), device)
    options = (config.batch_size, None, config.temperature, config.top_k, config.top_p, config.seed, penalty_of(folder))
    made, shown = {}, 0
    for i, ids in generate_batch(model, prompts, config.tokens, ends, *options):
        made[i] = ''.join(tok.decode_stream(ids, prompts[i]))
        while shown in made:
            print(f'---- prompt {shown // config.samples + 1}\n{texts[shown]}{made.pop(shown)}', flush=True)
            shown += 1


def penalty_of(folder):
    """What generation_config.json asks for that changes even the likeliest text; a note names what is not done here."""
    path = os.path.join(folder, 'generation_config.json')
    if not os.path.exists(path):
        return 1.0
    asked = tokenizer.read_json(path, {'repetition_penalty': fields.maybe(fields.number(0.01, 100), default=1.0)})
    for key in NOT_DONE:
        if asked.get(key) not in (None, False, 0, 1, [], {}):
            print(f'note: {path} asks for {key}, which sample.py does not know', file=sys.stderr)
    return asked['repetition_penalty'] or 1.0


if __name__ == '__main__':
    configurator.check_or_exit(config, __file__, problems)
    sys.stdin.reconfigure(errors='surrogateescape')
    sys.stdout.reconfigure(errors='backslashreplace')  # a terminal that is not UTF-8 shows what it can
    terminal.imported()
    try:
        main(config)
    except BrokenPipeError:  # the reader, `head` perhaps, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ModelError, Stop, tokenizer.TokenizerError, AdapterError, OSError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit(130)
