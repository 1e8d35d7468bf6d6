"""
Load and save folders: models in Hugging Face's layout, adapters in PEFT's.

    model = hf.load('path/to/folder')       # config.json + model.safetensors, or its sharded index -> a LLaMA
    hf.save(model, 'path/to/folder')
    hf.save_adapter(model, folder, base)    # LoRA's A and B as a folder that `peft` reads
"""

import json
import math
import os
import re
import shutil

import torch
import torch.nn as nn

from model import Linear, LLaMA, ModelError
from plumbing.families import ADVICE, FLOATS, config_from_hf, config_to_hf, read_config
from plumbing.folder import TABLES, AdapterError, Held, finite, headers, read_adapter, read_header
from plumbing.fused import fuse_adapters, fuse_weights, split_adapters, split_weights
from plumbing.terminal import patience

WINDOW = 2**17  # positions that a model without a given block_size has rotary tables for


class PackedError(ModelError):
    def __init__(self, folder):
        way = f'python sample.py {folder} --save_to=DIR makes a plain folder'
        super().__init__(f'{folder} keeps its weights packed: {way}')


def load(folder, dtype=None, device='cpu', block_size=None, linear=Linear, prepare=lambda model: None):
    """The model in a Hugging Face folder of one of families.FAMILIES: LLaMA, Qwen, Phi-3 and others.

    dtype None keeps the file's dtype; block_size None takes the longest window the model was made for, of at most
    131,072 tokens. Nothing is allocated before config.json and the headers of all files agree; then tensors are read
    one at a time, straight into place, after prepare(model). On the meta device none is, and config.json alone is
    enough. Raises ModelError if a file is missing or broken, or the model is one that LLaMA cannot represent."""
    stored = read_config(folder)
    config = config_from_hf(stored, folder)
    if block_size is not None and block_size > config.block_size:
        raise ModelError(f'{folder} is made for windows of {config.block_size} tokens: set block_size to at most that')
    held = split_weights(headers(folder), config)
    planned = torch.device(device).type == 'meta' and not held
    last = f'layers.{config.n_layer - 1}.input_layernorm.weight'
    if not held and not planned:
        raise ModelError(f'{folder} has no model.safetensors: {how_to_get_it(folder)}')
    if not planned and last not in held:  # before a module of a layer is made
        raise ModelError(f'{folder} lacks {last}, one of the {config.n_layer} layers of its config.json: {ADVICE}')
    first = held.get('embed_tokens.weight')
    with torch.device('meta'):  # packed layers keep the file's dtype, too
        model = LLaMA(config, dtype=dtype or (FLOATS[first.dtype] if first else None), linear=linear)
    prepare(model)
    packed = [] if planned else check_tensors(model, held, folder, stored['packed_weights'])
    if torch.device(device).type != 'meta':
        if config.tie_embeddings and 'lm_head.weight' in held:
            check_copy(folder, held['embed_tokens.weight'], held.pop('lm_head.weight'))
        read_tensors(model, held, dtype, device)
        for name in packed:  # filled later, from optimizer.pt
            module_of(model, name).to_empty(device=device, recurse=False)
    model.set_block_size(block_size or min(config.block_size, WINDOW), device)
    return model


def how_to_get_it(folder):
    """What to do about a folder without model.safetensors."""
    pickles = [name for name in sorted(os.listdir(folder)) if re.fullmatch(r'pytorch_model.*\.bin', name)]
    if not pickles:
        return 'save the model again in that format'
    convert = "AutoModelForCausalLM.from_pretrained('OLD', dtype='auto').save_pretrained('NEW')"
    return f'{pickles[0]} is a pickle, which may run code as it is read; if you trust it, use transformers: {convert}'


def check_tensors(model, held, folder, packed_weights):
    """Raise ModelError unless the files hold this model's tensors, each in its shape, and nothing else. -> names of
    those that are in optimizer.pt instead. held: see folder.headers."""
    wanted = {name: shape for name, shape, _ in model.dense_weights()}
    if model.config.tie_embeddings and 'lm_head.weight' in held:
        wanted['lm_head.weight'] = wanted['embed_tokens.weight']  # a copy
    for name, (_, _, shape, *_) in held.items():
        if name not in wanted:
            raise ModelError(f'{folder} holds a tensor this model has no place for: {name}')
        if shape != wanted[name]:
            shapes = f'{shape}, but config.json makes it {wanted[name]}'
            raise ModelError(f'{folder}: {name} is {shapes}: its files do not belong together')
    lost = [name for name in wanted if name not in held]
    if packed_weights and any(not hasattr(module_of(model, name), 'set_weight') for name in lost):
        raise PackedError(folder)
    if lost and not packed_weights:
        raise ModelError(f'{folder} lacks {len(lost)} of the model\'s tensors, the first {lost[0]}')
    return lost


def module_of(model, name):
    return model.get_submodule(name.rpartition('.')[0])


def check_copy(folder, embedding, head):
    """Raise ModelError if a head that config.json ties to the embedding is not the same matrix."""
    (_, a), (_, b) = (next(tensors_of(one.path, [('', one)])) for one in (embedding, head))
    if a.dtype != b.dtype or not torch.equal(a, b):
        what = 'config.json says tie_word_embeddings, but lm_head.weight is another matrix than embed_tokens.weight'
        raise ModelError(f'{folder}: {what}: set it to false there if the model has a head of its own')


def read_tensors(model, held, dtype, device):
    """Fill a model on the meta device from its files."""
    by_file = {}
    for name, one in held.items():
        by_file.setdefault(one.path, []).append((name, one))
    done = 0
    with patience('reading weights') as tell:
        for path, names in by_file.items():
            for name, tensor in tensors_of(path, names):
                if not finite(tensor):
                    raise ModelError(f'{path}: {name} holds NaN or infinite numbers: {ADVICE}')
                module, leaf = module_of(model, name), name.rpartition('.')[2]
                where = getattr(module, 'reads_on', device)
                tensor = tensor.to(device=where, dtype=dtype or tensor.dtype, copy=True)  # not the file's mmap
                if hasattr(module, 'reads_on') and hasattr(module, 'q'):
                    module.to_empty(device=device, recurse=False).weight.take(tensor)
                elif hasattr(module, 'set_weight') and leaf == 'weight':
                    bias = None if module.bias is None or module.bias.is_meta else module.bias.detach()  # read before
                    module.to_empty(device=device, recurse=False).set_weight(tensor)
                    module.bias = module.bias if bias is None else nn.Parameter(bias)
                else:
                    setattr(module, leaf, nn.Parameter(tensor))
                done += 1
                tell(done / len(held))


def tensors_of(path, names):
    """Yield (name, tensor) for each (name, its Held): views of the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework='pt') as f:
            for name, one in names:
                yield name, f.get_tensor(one.raw) if one.rows is None else f.get_slice(one.raw)[slice(*one.rows)]
    except (SafetensorError, OSError) as error:
        raise ModelError(f'{path} is missing or broken ({error}): {ADVICE}') from None


def save(model, folder, shard_bytes=4 * 2**30, merged=True):
    """Write config.json and model.safetensors, or shards of at most `shard_bytes` with their index: a GPU's weights
    pass through main memory one file at a time. merged=False leaves out weights that the method packs and saves
    itself."""
    from safetensors.torch import save_file

    os.makedirs(folder, exist_ok=True)
    for file in os.listdir(folder):  # of a model saved here before: two models' files must not mix
        if file == 'config.json' or re.fullmatch(r'model(-\d+-of-\d+)?\.safetensors(\.index\.json)?', file):
            os.remove(os.path.join(folder, file))
    with open(os.path.join(folder, 'config.json'), 'w') as f:
        marked = {} if merged else {'packed_weights': True}
        json.dump(config_to_hf(model.config, model.head.dtype) | marked, f, indent=2)
    shards, size = [{}], 0
    each, total = model.head.element_size(), 0
    weights = model.dense_weights()
    if not merged:
        packed = {f'{name}.weight' for name, module in model.named_modules() if hasattr(module, 'set_weight')}
        weights = (one for one in weights if one[0] not in packed)
    for name, shape, whole in fuse_weights(weights, model.config):
        nbytes = math.prod(shape) * each
        if size + nbytes > shard_bytes and shards[-1]:
            shards, size = [*shards, {}], 0
        shards[-1][name if name.startswith('lm_head') else 'model.' + name] = whole
        size, total = size + nbytes, total + nbytes
    files, n = {}, len(shards)
    for i, shard in enumerate(shards):
        file = 'model.safetensors' if n == 1 else f'model-{i + 1:05d}-of-{n:05d}.safetensors'
        tensors = {name: whole() for name, whole in shard.items()}
        save_file(tensors, os.path.join(folder, file), metadata={'format': 'pt'})
        shutil.copymode(os.path.join(folder, 'config.json'), os.path.join(folder, file))  # not only the owner's
        files |= dict.fromkeys(shard, file)
    if n > 1:
        with open(os.path.join(folder, 'model.safetensors.index.json'), 'w') as f:
            json.dump({'metadata': {'total_size': total}, 'weight_map': files}, f, indent=2)


def first_line(error):
    text = str(error) or type(error).__name__
    if 'weights_only' in text:  # torch goes on to say how to run the code that is in the file
        return 'it holds other things than tensors, which are not read'
    return text.splitlines()[0]


# ---- PEFT's adapter folders --------------------------------------------------------------------------------------


def is_lora(module):
    return hasattr(module, 'dense_weight') and hasattr(module, 'A')  # recognises a lora.LoRALinear without importing it


PEFT = 'base_model.model.'  # what peft adds before the names of a model's layers


def adapters(model):
    """Yield (PEFT's name, parameter) for each A and B. LlamaForCausalLM has `model.` before our names, and the names in
    one of transformers' own models, `inner`, are its own."""
    for name, layer in model.named_modules():
        if is_lora(layer) and len(layer.A):
            name = name.removeprefix('inner.') if hasattr(model, 'inner') else f'model.{name}'
            yield f'{PEFT}{name}.lora_A.weight', layer.A
            yield f'{PEFT}{name}.lora_B.weight', layer.B


def target_modules(model, names):
    """What adapter_config.json says of the layers with these names (PEFT's, of an A or a B): their last parts; where
    another layer's name ends so, too, such as that of a head, the whole names."""
    layers = {name.removeprefix(PEFT).rpartition('.lora_')[0] for name in names}
    last = {name.rpartition('.')[2] for name in layers}
    linears = [n.removeprefix('inner.') for n, m in model.named_modules() if hasattr(m, 'in_features')]
    alone = not hasattr(model, 'inner') or all(n in layers for n in linears if n.rpartition('.')[2] in last)
    return sorted(last if alone else layers)


def save_adapter(model, folder, base, tables=False):
    """Write A and B as a folder that `peft.PeftModel.from_pretrained` reads. base: path or name of the base model.
    tables: embedding and head, too, as they are.

    An adapter made on a base in NF4 says so, in its README.md and in the file of its tensors."""
    from safetensors.torch import save_file

    tensors, parts = fuse_adapters(dict(adapters(model)), model.config)
    layer = next(module for module in model.modules() if is_lora(module) and len(module.A))
    r, root = len(layer.A), math.sqrt if layer.rslora else float
    stored = dict(peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=base, bias='none')
    stored |= dict(r=r, lora_alpha=layer.scale * root(r), lora_dropout=layer.dropout, use_rslora=layer.rslora)
    stored |= dict(target_modules=target_modules(model, tensors), inference_mode=True)
    stored['rank_pattern'] = {matrix: r * len(names) for matrix, names in parts.items()}
    stored['alpha_pattern'] = {m: stored['lora_alpha'] * root(len(names)) for m, names in parts.items()}
    quantize, double_quant = layer.how
    metadata = {'format': 'pt'}
    if parts:
        metadata['parts'] = json.dumps(parts)
    if quantize != 'none':
        metadata['base'] = quantize + ', double_quant' * double_quant
    if tables:  # a head that is tied to the embedding is trained as that, and peft sets the two apart
        stored['modules_to_save'] = list(TABLES)
        for name, W in zip(TABLES.values(), (model.embed_tokens.weight, model.head)):
            tensors['base_model.model.' + name] = W
    if heads := model.head_modules():
        stored |= dict(task_type='SEQ_CLS', modules_to_save=[*heads])
        tensors |= {f'{PEFT}{head}.{n}': p for head, module in heads.items() for n, p in module.named_parameters()}
    tensors = {name: p.detach().to('cpu', copy=True).contiguous() for name, p in tensors.items()}
    os.makedirs(folder, exist_ok=True)
    names = ('adapter_config.json', 'adapter_model.safetensors', 'README.md')
    config, weights, card = (os.path.join(folder, name) for name in names)
    for path in filter(os.path.lexists, (config, weights, card)):  # a link would be written through
        os.remove(path)
    with open(config, 'w') as f:
        json.dump(stored, f, indent=2)
    save_file(tensors, weights, metadata=metadata)
    shutil.copymode(config, weights)  # not only the owner's
    if quantize != 'none':
        with open(card, 'w') as f:
            f.write(CARD.format(base=base, double_quant=double_quant))


CARD = """---
base_model: {base}
library_name: peft
---

This adapter was made on its base in NF4 (QLoRA), and corrects what those 4 bits lose. Load the base with
`BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant={double_quant})`: on the
base in full precision it gives other numbers.
"""


@torch.no_grad()
def load_adapter(model, folder):
    """Fill A and B of the model's LoRALinears from a PEFT folder; layers missing there keep theirs.

    Raises AdapterError if shapes, scale, or the form of the base differ."""
    stored, ours = read_adapter(folder), dict(adapters(model))
    layer = next(module for module in model.modules() if is_lora(module))
    path = os.path.join(folder, 'adapter_model.safetensors')
    held = read_header(path, AdapterError)[0].items()
    tensors = dict(tensors_of(path, [(name, Held(path, name, *one)) for name, one in held]))
    tables = {name: tensors.pop('base_model.model.' + name, None) for name in TABLES.values()}
    tensors = split_adapters(tensors, model.config, stored['parts'], folder)
    targets, root = ','.join(sorted({name.split('.')[-3] for name in tensors})), ' --rslora' * stored['use_rslora']
    options = f'--rank={stored["r"]} --scale={stored["lora_alpha"] / stored["r"]:g}{root} --targets={targets}'
    for name, tensor in tensors.items():
        if name not in ours or ours[name].shape != tensor.shape or not math.isclose(stored['scale'], layer.scale):
            raise AdapterError(f'{folder} does not fit this model at {name}: use its base, and {options}')
        if not finite(tensor):
            raise AdapterError(f'{folder}: {name} holds NaN or infinite numbers: save the adapter again')
        ours[name].copy_(tensor)
    embedding, head = tables.values()
    both = embedding is not None and head is not None and torch.equal(embedding, head)
    if model.config.tie_embeddings and not both and (embedding is not None or head is not None):
        what = 'trains embedding and head apart, which are one matrix in its base'
        raise AdapterError(f'{folder} {what}: merge it with peft, and use the result')
    for tensor, W in ((embedding, model.embed_tokens.weight), (head, model.head)):
        if tensor is not None and (tensor.shape != W.shape or not finite(tensor)):
            raise AdapterError(f'{folder}: its embedding or head is not finite, or of another model: use its base')
        if tensor is not None:
            W.copy_(tensor)
    if stored['quantize'] != 'none' and layer.how[0] == 'none':
        raise AdapterError(f'{folder} was made on its base in NF4, and belongs to that: use --quantize=nf4')


@torch.no_grad()
def merge_error(model, tokens):
    """-> the largest difference between the logits of a model with adapters and those of what `save` writes of it, the
    largest logit, and the share of positions where both find the same token likeliest. tokens (1, T)."""
    import torch.nn.functional as F

    apart = model(tokens)  # (1, T, V)
    layers = [module for module in model.modules() if is_lora(module)]
    for layer in layers:
        bias = layer.bias
        layer.forward = lambda x, layer=layer, bias=bias: F.linear(x, layer.dense_weight().to(x.dtype), bias)
    merged = model(tokens)
    for layer in layers:
        del layer.forward
    same = (apart.argmax(-1) == merged.argmax(-1)).float().mean()
    return (apart - merged).abs().max().item(), apart.abs().max().item(), same.item()


def weights_folder(path):
    """The folder with weights: `path` itself, the best/ or last/ of a run, or the base of an adapter."""
    for folder in (path, os.path.join(path, 'best'), os.path.join(path, 'last'), os.path.join(path, 'last.old')):
        if os.path.exists(os.path.join(folder, 'config.json')):
            return folder
    if adapter := read_adapter(path):
        base = adapter['base_model_name_or_path'] or ''
        if base and os.path.exists(os.path.join(base, 'config.json')):
            return base
        file = f'{path}/adapter_config.json'
        raise ModelError(f"{path} is an adapter of '{base}', no folder here: fetch that and write its path to {file}")
    raise ModelError(f'{path} holds no config.json, best/ or last/: name the out_dir of a run or a Hugging Face folder')


def download(name):
    """Download a model from the Hugging Face hub. -> its local folder."""
    from huggingface_hub import snapshot_download

    try:
        kinds = ['*.json', '*.safetensors', '*.jinja', '*.model', 'merges.txt', 'vocab.txt']
        return snapshot_download(name, allow_patterns=kinds)
    except Exception as error:
        reason = first_line(error)
        raise ModelError(
            f"'{name}' is no folder here and the hub did not give it ({reason}): "
            'name a folder with config.json and model.safetensors'
        ) from None
