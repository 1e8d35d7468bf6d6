"""
Load and save folders: models in Hugging Face's layout, adapters in PEFT's.

    model = hf.load('path/to/folder')       # config.json + model.safetensors, or its sharded index -> a LLaMA
    hf.save(model, 'path/to/folder')
    hf.save_adapter(model, folder, base)    # LoRA's A and B as a folder that `peft` reads
"""

import json
import math
import os
import shutil

import torch
import torch.nn as nn
from tqdm import tqdm

from model import ROPE_SCALING, Linear, LLaMA, ModelConfig, ModelError


class PackedError(ModelError):
    def __init__(self, folder):
        way = f'python sample.py {folder} --save_to=DIR makes a plain folder'
        super().__init__(f'{folder} keeps its weights packed: {way}')


def load(folder, dtype=None, device='cpu', block_size=None, linear=Linear):
    """The model in a Hugging Face folder: LLaMA, Mistral, SmolLM2 and others of their layout.

    dtype None keeps the file's dtype; block_size None takes the longest window the model was made for. Tensors are
    read one at a time, straight into place. Raises ModelError if a file is missing or broken, or the model is one
    that LLaMA cannot represent."""
    stored = read_json(os.path.join(folder, 'config.json'))
    config = config_from_hf(stored, folder)
    if block_size is not None and block_size > config.block_size:
        raise ModelError(f'{folder} is made for windows of {config.block_size} tokens: set block_size to at most that')
    config.block_size = block_size or config.block_size
    with torch.device('meta'):
        model = LLaMA(config, dtype=dtype, linear=linear)
    wanted = {name: shape for name, shape, _ in model.dense_weights()}
    for name, read in tqdm(stored_tensors(folder), 'reading weights', len(wanted), delay=3, leave=False, disable=None):
        name = name.removeprefix('model.')
        if (name == 'lm_head.weight' and config.tie_embeddings) or name.endswith('rotary_emb.inv_freq'):
            continue  # a copy of the embedding; a table that rotary_tables computes
        if name not in wanted:
            raise ModelError(f'{folder} holds a tensor this model has no place for: {name}')
        tensor = read()
        if tensor.shape != wanted[name]:
            shapes = f'{tuple(tensor.shape)}, but config.json makes it {wanted[name]}'
            raise ModelError(f'{folder}: {name} is {shapes}: its files do not belong together')
        module, _, leaf = name.rpartition('.')
        module = model.get_submodule(module)
        tensor = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)  # not the file's mmap
        if hasattr(module, 'set_weight'):
            module.to_empty(device=device, recurse=False).set_weight(tensor)
        else:
            setattr(module, leaf, nn.Parameter(tensor))
        del wanted[name]
    for name in list(wanted) if stored.get('packed_weights') else ():
        module = model.get_submodule(name.rpartition('.')[0])
        if not hasattr(module, 'set_weight'):
            raise PackedError(folder)
        module.to_empty(device=device, recurse=False)  # filled later, from optimizer.pt
        del wanted[name]
    if wanted:
        raise ModelError(f'{folder} lacks {len(wanted)} of the model\'s tensors, the first {next(iter(wanted))}')
    model.set_block_size(config.block_size, device)
    return model


def save(model, folder, shard_bytes=4 * 2**30, merged=True):
    """Write config.json and model.safetensors, or shards of at most `shard_bytes` with their index: a GPU's weights
    pass through main memory one file at a time. merged=False leaves out weights that the method packs and saves
    itself."""
    from safetensors.torch import save_file

    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'config.json'), 'w') as f:
        marked = {} if merged else {'packed_weights': True}
        json.dump(config_to_hf(model.config, model.head.dtype) | marked, f, indent=2)
    shards, size = [{}], 0
    each, total = model.head.element_size(), 0
    for name, shape, whole in model.dense_weights():
        if not merged and hasattr(model.get_submodule(name.rpartition('.')[0]), 'set_weight'):
            continue
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
    return (str(error) or type(error).__name__).splitlines()[0]


def read_json(path):
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except FileNotFoundError:
        raise ModelError(f'{path} does not exist: name a folder that holds config.json and model.safetensors') from None
    except ValueError as error:
        raise ModelError(f'{path} is not JSON ({error}): fetch or save the model again') from None


def stored_tensors(folder):
    """Yield (name, function that reads it) for each tensor of a folder's safetensors file or files."""
    from safetensors import SafetensorError, safe_open

    index, single = (os.path.join(folder, f) for f in ('model.safetensors.index.json', 'model.safetensors'))
    if os.path.exists(index):
        files = sorted(set(read_json(index)['weight_map'].values()))
    elif os.path.exists(single):
        files = ['model.safetensors']
    else:
        raise ModelError(f'{folder} has no model.safetensors: save the model again in that format')
    for path in (os.path.join(folder, file) for file in files):
        try:
            with safe_open(path, framework='pt') as f:
                for name in f.keys():  # noqa: SIM118 (not a dict)
                    yield name, lambda f=f, name=name: f.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f'{path} is missing or broken ({error}): fetch or save the model again') from None


def config_from_hf(hf, folder='config.json'):
    """ModelConfig of a Hugging Face config (a dict). Raises ModelError, naming the key that LLaMA cannot represent."""
    # Each of these changes the arithmetic; loading such a model anyway would silently give wrong numbers.
    for key, allowed in (
        ('model_type', ('llama', 'mistral')),
        ('hidden_act', ('silu',)),
        ('attention_bias', (False,)),
        ('mlp_bias', (False,)),
        ('partial_rotary_factor', (None, 1.0)),
        ('quantization_config', (None,)),
    ):
        if hf.get(key, allowed[0]) not in allowed:
            raise ModelError(f'{folder}: {key}={hf[key]!r} is not what this LLaMA computes (only {allowed[0]!r} is)')
    # transformers 5 keeps rope_theta and the scaling in one dict, older versions in two keys
    rope = dict(hf.get('rope_parameters') or hf.get('rope_scaling') or {})
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind not in ('default', 'llama3'):
        raise ModelError(f'{folder}: rope_type={kind!r} is not supported, only default and llama3 are')
    try:
        block_size = hf.get('max_position_embeddings', 2048)
        return ModelConfig(
            n_layer=hf['num_hidden_layers'],
            n_head=hf['num_attention_heads'],
            n_kv_head=hf.get('num_key_value_heads') or 0,
            n_embd=hf['hidden_size'],
            n_inner=hf['intermediate_size'],
            vocab_size=hf['vocab_size'],
            # within its window, a sliding-window model (Mistral 7B v0.1) has ordinary attention
            block_size=min(block_size, hf.get('sliding_window') or block_size),
            head_dim=hf.get('head_dim') or 0,
            norm_eps=hf.get('rms_norm_eps', 1e-6),
            rope_theta=float(rope.get('rope_theta') or hf.get('rope_theta') or 10000.0),
            rope_scaling={key: rope[key] for key in ROPE_SCALING} if kind == 'llama3' else None,
            tie_embeddings=hf.get('tie_word_embeddings', False),
            bos_token_id=hf.get('bos_token_id'),
            eos_token_id=hf.get('eos_token_id'),
        )
    except KeyError as missing:
        raise ModelError(f'{folder}: config.json lacks {missing}: this is not a LLaMA folder') from None


def config_to_hf(c, dtype=torch.float32):
    """The dict that Hugging Face writes as config.json for a LlamaForCausalLM, the rotary keys in both spellings."""
    rope = {'rope_type': 'llama3', **c.rope_scaling} if c.rope_scaling else {'rope_type': 'default'}
    return {
        'architectures': ['LlamaForCausalLM'],
        'model_type': 'llama',
        'vocab_size': c.vocab_size,
        'hidden_size': c.n_embd,
        'intermediate_size': c.n_inner,
        'num_hidden_layers': c.n_layer,
        'num_attention_heads': c.n_head,
        'num_key_value_heads': c.n_kv_head,
        'head_dim': c.head_dim,
        'hidden_act': 'silu',
        'max_position_embeddings': max(c.max_positions, c.block_size),
        'bos_token_id': c.bos_token_id,
        'eos_token_id': c.eos_token_id,
        'initializer_range': 0.02,
        'rms_norm_eps': c.norm_eps,
        'tie_word_embeddings': c.tie_embeddings,
        'rope_theta': c.rope_theta,
        'rope_scaling': rope if c.rope_scaling else None,
        'rope_parameters': {'rope_theta': c.rope_theta, **rope},
        'attention_bias': False,
        'mlp_bias': False,
        'torch_dtype': str(dtype).removeprefix('torch.'),
    }


# ---- PEFT's adapter folders --------------------------------------------------------------------------------------


class AdapterError(ValueError):
    """An adapter that cannot be written or read; the message says what to do."""


def is_lora(module):
    return hasattr(module, 'dense_weight') and hasattr(module, 'A')  # recognises a lora.LoRALinear without importing it


def adapters(model, prefix='base_model.model.model.'):
    """Yield (PEFT's name, parameter) for each A and B. prefix: what PEFT and LlamaForCausalLM add before our names."""
    for name, layer in model.named_modules():
        if is_lora(layer) and len(layer.A):
            yield f'{prefix}{name}.lora_A.weight', layer.A
            yield f'{prefix}{name}.lora_B.weight', layer.B


def save_adapter(model, folder, base):
    """Write A and B as a folder that `peft.PeftModel.from_pretrained` reads. base: path or name of the base model."""
    from safetensors.torch import save_file

    tensors = {name: p.detach().cpu().contiguous() for name, p in adapters(model)}
    layer = next(module for module in model.modules() if is_lora(module) and len(module.A))
    stored = dict(peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=base, bias='none')
    stored |= dict(r=len(layer.A), lora_alpha=layer.scale * len(layer.A), lora_dropout=layer.dropout)
    stored |= dict(target_modules=sorted({name.split('.')[-3] for name in tensors}), inference_mode=True)
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, 'adapter_model.safetensors'), metadata={'format': 'pt'})
    with open(os.path.join(folder, 'adapter_config.json'), 'w') as f:
        json.dump(stored, f, indent=2)


def read_adapter(folder):
    """-> the folder's adapter_config.json as a dict, or None if there is none. Raises AdapterError if it asks for
    something that LoRALinear does not compute."""
    path = os.path.join(folder, 'adapter_config.json')
    if not os.path.exists(path):
        return None
    try:
        with open(path) as f:
            stored = json.load(f)
        stored['r'], stored['lora_alpha']
    except (ValueError, KeyError) as error:
        raise AdapterError(f'{path} is broken ({error!r}): save the adapter again') from None
    odd = ('use_dora', 'use_rslora', 'fan_in_fan_out', 'modules_to_save', 'rank_pattern', 'alpha_pattern')
    for key, plain in {'peft_type': 'LORA', 'bias': 'none', **dict.fromkeys(odd)}.items():
        if stored.get(key) and stored[key] != plain:
            what = f'{key}={stored[key]!r}'
            raise AdapterError(f'{path}: {what} is not plain LoRA: merge it with peft, and use the result')
    return stored


@torch.no_grad()
def load_adapter(model, folder):
    """Fill A and B of the model's LoRALinears from a PEFT folder; layers missing there keep theirs.

    Raises AdapterError if shapes or scale differ."""
    from safetensors.torch import load_file

    stored, ours = read_adapter(folder), dict(adapters(model))
    r, scale = stored['r'], stored['lora_alpha'] / stored['r']
    layer = next(module for module in model.modules() if is_lora(module))
    tensors = load_file(os.path.join(folder, 'adapter_model.safetensors'))
    targets = ','.join(sorted({name.split('.')[-3] for name in tensors}))
    for name, tensor in tensors.items():
        if name not in ours or ours[name].shape != tensor.shape or not math.isclose(scale, layer.scale):
            options = f'--rank={r} --scale={scale:g} --lora_targets={targets}'
            raise AdapterError(f'{folder} does not fit this model at {name}: use its base, and {options}')
        ours[name].copy_(tensor)


def weights_folder(path):
    """The folder with weights: `path` itself, the best/ or last/ of a run, or the base of an adapter."""
    for folder in (path, os.path.join(path, 'best'), os.path.join(path, 'last'), os.path.join(path, 'last.old')):
        if os.path.exists(os.path.join(folder, 'config.json')):
            return folder
    if adapter := read_adapter(path):
        base = adapter.get('base_model_name_or_path') or ''
        if os.path.exists(os.path.join(base, 'config.json')):
            return base
        file = f'{path}/adapter_config.json'
        raise ModelError(f"{path} is an adapter of '{base}', no folder here: fetch that and write its path to {file}")
    raise ModelError(f'{path} holds no config.json, best/ or last/: name the out_dir of a run or a Hugging Face folder')


def download(name):
    """Download a model from the Hugging Face hub. -> its local folder."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=['*.json', '*.safetensors'])
    except Exception as error:
        reason = first_line(error)
        raise ModelError(
            f"init_from='{name}' is no folder here and the hub did not give it ({reason}): "
            'name a folder with config.json and model.safetensors'
        ) from None
