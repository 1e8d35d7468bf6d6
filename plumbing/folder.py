"""
What a stranger's folder says: the headers of its weights and adapter_config.json, each checked before any of it is
believed and before anything is allocated. (config.json: families.py.)

    held = headers(folder)                                   # {name: Held(path, raw name, shape, dtype)}
    adapter = read_adapter(folder)                           # adapter_config.json of plain LoRA, or None
"""

import json
import math
import os
from typing import NamedTuple

import torch

from data import fields
from data.fields import either, maybe, number, one_of, several, switch, table, text, whole
from model import ModelError
from plumbing.families import ADVICE, FLOATS, same

# ---- weights -----------------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """A tensor in a file: where it is, under which name, and what the file's header says of it."""

    path: str
    raw: str
    shape: tuple
    dtype: str  # as safetensors writes it: 'F32', 'BF16', 'I8' ...
    rows: tuple | None = None  # from which to which; None: the tensor is all of it


INDEX = {'weight_map': table()}


def weight_files(folder):
    """{file name: the tensors that the index says are in it, or None without an index}; {} if there are no weights.

    Like transformers, it takes model.safetensors where there is an index, too."""
    if os.path.exists(os.path.join(folder, 'model.safetensors')):
        return {'model.safetensors': None}
    path, files = os.path.join(folder, 'model.safetensors.index.json'), {}
    if not os.path.exists(path):
        return {}
    for name, file in fields.read(path, INDEX, ModelError, ADVICE)['weight_map'].items():
        if not text().fits(file) or os.path.basename(file) != file or not file.endswith('.safetensors'):
            raise ModelError(f'{path} maps {name} to {fields.shown(file)}, no safetensors file of its folder: {ADVICE}')
        files.setdefault(file, []).append(name)
    if not files:
        raise ModelError(f'{path} names no tensors: {ADVICE}')
    return files


def read_header(path, error=ModelError, advice=ADVICE):
    """The header of a safetensors file: ({name: (shape, dtype)}, its metadata)."""
    from safetensors import SafetensorError, safe_open

    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError('no file')
        with safe_open(path, framework='pt') as f:
            parts = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
            return {n: (tuple(part.get_shape()), part.get_dtype()) for n, part in parts.items()}, f.metadata() or {}
    except (SafetensorError, OSError) as reason:
        raise error(f'{path} is missing or broken ({reason}): {advice}') from None


def headers(folder):
    """{name without `model.`: Held} of all weights in a folder; {} if it has none. Reads no weights.

    Raises ModelError if a file is missing or broken, if the index and the files disagree, or for what are no floats."""
    found = {}
    for file, listed in weight_files(folder).items():
        path = os.path.join(folder, file)
        held, _ = read_header(path)
        if lost := set(listed or ()) - held.keys():
            raise ModelError(f'{path} lacks {min(lost)}, which the index says it holds: {ADVICE}')
        for raw, (shape, dtype) in held.items():
            name = raw.removeprefix('model.')
            if name in found:
                raise ModelError(f'{path} holds {raw}, as {found[name].path} does: {ADVICE}')
            if name.endswith('rotary_emb.inv_freq'):  # a table that rotary_tables computes
                continue
            if dtype not in FLOATS:
                what = 'numbers that stand for others, or no weights at all'
                raise ModelError(f'{path}: {raw} is of {dtype}, {what}: name a folder with weights in BF16, F16 or F32')
            found[name] = Held(path, raw, shape, dtype)
    return found


# ---- adapter_config.json -----------------------------------------------------------------------------------------


class AdapterError(ValueError):
    """An adapter that cannot be written or read; the message says what to do."""


LINEARS = ('q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj')  # that may be fused
TABLES = {'embed_tokens': 'model.embed_tokens.weight', 'lm_head': 'lm_head.weight'}  # modules_to_save: whole matrices
ADAPTER = {
    'peft_type': text(),
    'r': whole(1, 2**16),
    'lora_alpha': number(-1e9, 1e9),
    'use_rslora': maybe(switch(), default=False),
    'base_model_name_or_path': maybe(text()),
    'target_modules': either(one_of('all-linear'), several(text())),
    'modules_to_save': maybe(several(one_of(*TABLES))),
    'layers_to_transform': maybe(either(whole(0, 4096), several(whole(0, 4096)))),
    'exclude_modules': maybe(several(text())),
}
# Fields that may be false, null or missing, or this; an empty object is a wish to peft, but where it is a default.
# init_lora_weights: those that leave the base's weights alone.
PLAIN = {
    'peft_type': ('LORA',),
    'bias': ('none',),
    'init_lora_weights': (True, 'gaussian', 'eva', 'orthogonal', 'mica'),
    **dict.fromkeys(('fan_in_fan_out', 'trainable_token_indices', 'target_parameters', 'lora_bias'), ()),
    **dict.fromkeys(('layer_replication', 'layers_pattern', 'alora_invocation_tokens'), ()),
    **dict.fromkeys(('arrow_config', 'kasa_config', 'velora_config', 'monteclora_config', 'megatron_config'), ()),
}


def read_adapter(folder):
    """-> the folder's adapter_config.json as a dict, or None if there is none. `quantize` and `double_quant` in it say
    in what form the base was when the adapter was made, 'none' if nobody says; `scale` is the factor on B A; `parts`
    are {a fused matrix: those of its parts that have an A and a B of their own (fused.py)}. Raises AdapterError if it
    asks for something that LoRALinear does not compute, or its weights are not what it says."""
    path, advice = os.path.join(folder, 'adapter_config.json'), 'save the adapter again'
    if not os.path.exists(path):
        return None
    stored = fields.read(path, {}, AdapterError, advice)
    held, metadata = read_header(os.path.join(folder, 'adapter_model.safetensors'), AdapterError, advice)
    parts = read_parts(metadata.get('parts', '{}'))
    odd = {name: () for name in stored if name.startswith('use_') and name != 'use_rslora'}  # options of a later peft
    for name, allowed in (odd | PLAIN | patterns(stored, parts)).items():
        value = stored.get(name)
        known = name == 'modules_to_save' and ADAPTER[name].fits(value)
        if value is not None and not known and not any(same(value, plain) for plain in (False, *allowed)):
            what = f'{name}={fields.shown(value)}'
            raise AdapterError(f'{path}: {what} is not plain LoRA: merge it with peft, and use the result')
    stored = fields.check(stored, ADAPTER, path, AdapterError, advice)
    check_adapter_tensors(folder, stored, held, parts)
    quantize = 'nf4' if metadata.get('base', '').startswith('nf4') else 'none'
    stored |= {'quantize': quantize, 'double_quant': metadata.get('base') == 'nf4, double_quant', 'parts': parts}
    return stored | {'scale': stored['lora_alpha'] / (math.sqrt(stored['r']) if stored['use_rslora'] else stored['r'])}


def read_parts(text):
    """The parts that save_adapter wrote; {} if it was not written by that."""
    try:
        parts = json.loads(text)
        good = type(parts) is dict and all(several(one_of(*LINEARS)).fits(names) and names for names in parts.values())
        return parts if good else {}
    except (ValueError, RecursionError):
        return {}


def patterns(stored, parts):
    """{field: the values it may have} where n parts of a fused matrix have a rank of n r."""
    r, alpha, root = stored.get('r'), stored.get('lora_alpha'), math.sqrt if stored.get('use_rslora') else float
    if not parts or type(r) is not int or type(alpha) not in (int, float):
        return {'rank_pattern': ({},), 'alpha_pattern': ({},), 'modules_to_save': ([],)}
    ranks = {matrix: r * len(names) for matrix, names in parts.items()}
    alphas = {matrix: alpha * root(len(names)) for matrix, names in parts.items()}
    return {'rank_pattern': (ranks,), 'alpha_pattern': (alphas,), 'modules_to_save': ([],)}


def check_adapter_tensors(folder, stored, held, parts):
    """Raise AdapterError for a tensor that adapter_config.json has no place for, or another one for."""
    layers, targets, r = stored['layers_to_transform'], stored['target_modules'], stored['r']
    layers = [layers] if isinstance(layers, int) else layers
    tables = [f'base_model.model.{TABLES[name]}' for name in stored['modules_to_save'] or ()]

    def among(module, names):
        return any(module == name or module.endswith('.' + name) for name in names)

    for name, (shape, dtype) in held.items():
        module, _, leaf = name.removesuffix('.weight').rpartition('.lora_')
        said = leaf in ('A', 'B') and (targets == 'all-linear' or among(module, targets))
        if layers is not None and said:
            said = any(f'.layers.{layer}.' in module for layer in layers)
        if name not in tables and (not said or among(module, stored['exclude_modules'] or ())):
            raise AdapterError(f'{folder}: its adapter_config.json says nothing of {name}: save the adapter again')
        rank = None if name in tables else r * len(parts.get(module.rpartition('.')[2], 'x'))
        if dtype not in FLOATS or len(shape) != 2 or rank not in (None, shape[leaf == 'B']):
            what = f'{name} is {shape} of {dtype}, r is {rank}'
            raise AdapterError(f'{folder}: {what}: its files do not belong together, save the adapter again')
    if lost := [name for name in tables if name not in held]:
        raise AdapterError(f'{folder} lacks {lost[0]}, which its adapter_config.json names: save the adapter again')
    if not held:
        raise AdapterError(f'{folder} has an adapter without tensors: save the adapter again')


def finite(tensor):
    """Whether all numbers of a tensor are finite, without a temporary of its size."""
    return all(map(math.isfinite, torch.aminmax(tensor)))  # NaN is the least and the largest of all
