"""
What a stranger's folder says: config.json, adapter_config.json and the headers of its weights, each checked before any
of it is believed and before anything is allocated.

    config = config_from_hf(read_config(folder), folder)     # a ModelConfig
    held = headers(folder)                                   # {name: Held(path, raw name, shape, dtype)}
    adapter = read_adapter(folder)                           # adapter_config.json of plain LoRA, or None

A field that changes the mathematics, and that we do not compute, is refused by its name and value: loading such a model
all the same would give other numbers without a word. What else a file says passes.
"""

import math
import os
from typing import NamedTuple

import torch

from data import fields
from data.fields import either, maybe, number, one_of, several, switch, table, text, whole
from model import ROPE_SCALING, ModelConfig, ModelError

ADVICE = 'fetch or save the model again'
FLOATS = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
DTYPE = maybe(one_of(*(str(dtype).removeprefix('torch.') for dtype in FLOATS.values())))
LONGEST = 2**31  # positions

# ---- config.json -------------------------------------------------------------------------------------------------

THETA, TOKEN = maybe(number(1, 1e15)), whole(-1, 2**31)  # llama 1 wrote -1 for no token
CONFIG = {
    'hidden_size': whole(1, 2**20),
    'intermediate_size': whole(1, 2**22),
    'num_hidden_layers': whole(1, 4096),
    'num_attention_heads': whole(1, 2**16),
    'num_key_value_heads': maybe(whole(1, 2**16)),
    'head_dim': maybe(whole(1, 2**16)),
    'vocab_size': whole(1, fields.ROWS),
    'max_position_embeddings': whole(1, LONGEST, default=2048),
    'sliding_window': maybe(whole(1, LONGEST)),
    'rms_norm_eps': number(0, 1, default=1e-6),
    'rope_theta': THETA,
    'rope_scaling': maybe(table()),
    'rope_parameters': maybe(table()),
    'tie_word_embeddings': switch(default=False),
    'bos_token_id': maybe(either(TOKEN, several(TOKEN))),
    'eos_token_id': maybe(either(TOKEN, several(TOKEN))),
    'dtype': DTYPE,  # transformers 5
    'torch_dtype': DTYPE,  # transformers 4
    'packed_weights': switch(default=False),  # ours
}
# What a missing field means, where the family has a default of its own.
FAMILIES = {
    'llama': {},
    'mistral': {'num_key_value_heads': 8, 'sliding_window': 4096, 'max_position_embeddings': 131072},
}
# Fields that change the arithmetic, and the values that stand for ours. The second half is of other families.
COMPUTED = {
    'hidden_act': ('silu', 'swish'),
    'attention_bias': (False,),
    'mlp_bias': (False,),
    'attention_dropout': (0.0, None),
    'partial_rotary_factor': (1.0, None),
    'is_causal': (True, None),
    'quantization_config': (None,),
    'compression_config': (None,),
    'qkv_bias': (False, None),
    'use_qkv_bias': (False, None),
    'qk_layernorm': (False, None),
    'use_qk_norm': (False, None),
    'use_parallel_residual': (False, None),
    'clip_qkv': (None,),
    'attn_logit_softcapping': (None,),
    'final_logit_softcapping': (None,),
    'attention_chunk_size': (None,),
    'no_rope_layers': (None,),
    'attention_multiplier': (None,),
    'embedding_multiplier': (1.0, None),
    'residual_multiplier': (1.0, None),
    'logits_scaling': (1.0, None),
    'num_local_experts': (None,),
    'pruned_heads': ({}, None),
    'use_bidirectional_attention': (False, None),
}
ROPE = {'rope_type': one_of('default', 'llama3'), 'rope_theta': THETA}
SCALING = {
    'factor': number(1e-6, 1e6),
    'low_freq_factor': number(1e-6, 1e6),
    'high_freq_factor': number(1e-6, 1e6),
    'original_max_position_embeddings': whole(1, LONGEST),
}


def same(a, b):
    """Equal, and True is no 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def read_config(folder):
    """config.json of a folder as a dict that fits CONFIG. Raises ModelError."""
    path = os.path.join(folder, 'config.json')
    try:
        return checked(fields.read(path, {}, ModelError, ADVICE), path)
    except FileNotFoundError:
        raise ModelError(f'{path} does not exist: name a folder that holds config.json and model.safetensors') from None


def checked(given, where):
    """A config.json, given as a dict, with the defaults of its family. Raises ModelError."""
    family = given.get('model_type')
    if not isinstance(family, str) or family not in FAMILIES:
        what = f'model_type={fields.shown(family)}'
        raise ModelError(f'{where}: {what} is not what this LLaMA computes (only llama and mistral are)')
    for name, allowed in COMPUTED.items():
        if name in given and not any(same(given[name], value) for value in allowed):
            what = f'{name}={fields.shown(given[name])}'
            raise ModelError(f'{where}: {what} is not what this LLaMA computes (only {allowed[0]!r} is)')
    return fields.check(FAMILIES[family] | given, CONFIG, where, ModelError, ADVICE)


def rope_from_hf(hf, where):
    """-> theta, and Llama 3's scaling or None.

    transformers 4 keeps theta beside `rope_scaling`, 5 has both in `rope_parameters`; which of two counts depends on
    the version, so they must say the same. Raises ModelError if they do not."""
    said, theta = [], float(hf['rope_theta'] or 10000.0)
    for name in ('rope_scaling', 'rope_parameters'):
        if not (rope := hf[name]):
            continue
        place = f'{where}, {name}'
        rope = {'rope_type': rope.get('type', 'default')} | rope
        if rope.get('partial_rotary_factor') not in (1.0, None) or any(type(v) is dict for v in rope.values()):
            what = fields.shown(rope)
            raise ModelError(f'{place} is {what}: only one rotation, of whole heads, is what this LLaMA computes')
        kind = fields.check(rope, ROPE, place, ModelError, 'only these are what this LLaMA computes')['rope_type']
        if kind == 'llama3':
            fields.check(rope, SCALING, place, ModelError, ADVICE)
            outer = hf.get('original_max_position_embeddings', rope['original_max_position_embeddings'])
            if rope['low_freq_factor'] >= rope['high_freq_factor']:
                raise ModelError(f'{place}: low_freq_factor must be less than high_freq_factor: {ADVICE}')
            if outer != rope['original_max_position_embeddings']:
                raise ModelError(f'{where}: original_max_position_embeddings has two values: {ADVICE}')
        scaling = {key: rope[key] for key in ROPE_SCALING} if kind == 'llama3' else None
        said.append((float(rope.get('rope_theta') or theta), scaling))
    said = said or [(theta, None)]
    if any(one != said[0] for one in said) or hf['rope_theta'] not in (None, said[0][0]):
        raise ModelError(f'{where}: rope_theta, rope_scaling and rope_parameters contradict each other: {ADVICE}')
    return said[0]


def config_from_hf(given, where='config.json'):
    """ModelConfig of a Hugging Face config (a dict). Raises ModelError, naming the field that LLaMA cannot have."""
    hf = checked(given, where)
    theta, scaling = rope_from_hf(hf, where)
    block_size = hf['max_position_embeddings']
    if hf['model_type'] == 'mistral':  # within its window, a sliding-window model has ordinary attention
        block_size = min(block_size, hf['sliding_window'] or block_size)
    try:
        return ModelConfig(
            n_layer=hf['num_hidden_layers'],
            n_head=hf['num_attention_heads'],
            n_kv_head=hf['num_key_value_heads'] or 0,
            n_embd=hf['hidden_size'],
            n_inner=hf['intermediate_size'],
            vocab_size=hf['vocab_size'],
            block_size=block_size,
            head_dim=hf['head_dim'] or 0,
            norm_eps=hf['rms_norm_eps'],
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=hf['tie_word_embeddings'],
            bos_token_id=hf['bos_token_id'],
            eos_token_id=hf['eos_token_id'],
        )
    except ModelError as error:
        raise ModelError(f'{where}: {error}') from None


# ---- weights -----------------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """A tensor in a file: where it is, under which name, and what the file's header says of it."""

    path: str
    raw: str
    shape: tuple
    dtype: str  # as safetensors writes it: 'F32', 'BF16', 'I8' ...


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


ADAPTER = {
    'peft_type': text(),
    'r': whole(1, 2**16),
    'lora_alpha': number(-1e9, 1e9),
    'base_model_name_or_path': maybe(text()),
    'target_modules': either(one_of('all-linear'), several(text())),
    'layers_to_transform': maybe(either(whole(0, 4096), several(whole(0, 4096)))),
    'exclude_modules': maybe(several(text())),
}
# Fields that may be false, null or missing, or this; an empty object is a wish to peft, but where it is a default.
# init_lora_weights: those that leave the base's weights alone.
PLAIN = {
    'peft_type': ('LORA',),
    'bias': ('none',),
    'init_lora_weights': (True, 'gaussian', 'eva', 'orthogonal', 'mica'),
    'rank_pattern': ({},),
    'alpha_pattern': ({},),
    'modules_to_save': ([],),
    **dict.fromkeys(('fan_in_fan_out', 'trainable_token_indices', 'target_parameters', 'lora_bias'), ()),
    **dict.fromkeys(('layer_replication', 'layers_pattern', 'alora_invocation_tokens'), ()),
    **dict.fromkeys(('arrow_config', 'kasa_config', 'velora_config', 'monteclora_config', 'megatron_config'), ()),
}


def read_adapter(folder):
    """-> the folder's adapter_config.json as a dict, or None if there is none. `quantize` and `double_quant` in it say
    in what form the base was when the adapter was made, 'none' if nobody says. Raises AdapterError if it asks for
    something that LoRALinear does not compute, or its weights are not what it says."""
    path, advice = os.path.join(folder, 'adapter_config.json'), 'save the adapter again'
    if not os.path.exists(path):
        return None
    stored = fields.read(path, {}, AdapterError, advice)
    odd = dict.fromkeys(name for name in stored if name.startswith('use_'))  # options of a later peft
    for name in {**odd, **PLAIN}:
        value, allowed = stored.get(name), PLAIN.get(name, ())
        if value is not None and not any(same(value, plain) for plain in (False, *allowed)):
            what = f'{name}={fields.shown(value)}'
            raise AdapterError(f'{path}: {what} is not plain LoRA: merge it with peft, and use the result')
    stored = fields.check(stored, ADAPTER, path, AdapterError, advice)
    held, metadata = read_header(os.path.join(folder, 'adapter_model.safetensors'), AdapterError, advice)
    check_adapter_tensors(folder, stored, held)
    quantize = 'nf4' if metadata.get('base', '').startswith('nf4') else 'none'
    return stored | {'quantize': quantize, 'double_quant': metadata.get('base') == 'nf4, double_quant'}


def check_adapter_tensors(folder, stored, held):
    """Raise AdapterError for a tensor that adapter_config.json has no place for, or another one for."""
    layers, targets, r = stored['layers_to_transform'], stored['target_modules'], stored['r']
    layers = [layers] if isinstance(layers, int) else layers

    def among(module, names):
        return any(module == name or module.endswith('.' + name) for name in names)

    for name, (shape, dtype) in held.items():
        module, _, leaf = name.removesuffix('.weight').rpartition('.lora_')
        said = leaf in ('A', 'B') and (targets == 'all-linear' or among(module, targets))
        if layers is not None and said:
            said = any(f'.layers.{layer}.' in module for layer in layers)
        if not said or among(module, stored['exclude_modules'] or ()):
            raise AdapterError(f'{folder}: its adapter_config.json says nothing of {name}: save the adapter again')
        if dtype not in FLOATS or len(shape) != 2 or shape[leaf == 'B'] != r:
            what = f'{name} is {shape} of {dtype}, r is {r}'
            raise AdapterError(f'{folder}: {what}: its files do not belong together, save the adapter again')
    if not held:
        raise AdapterError(f'{folder} has an adapter without tensors: save the adapter again')


def finite(tensor):
    """Whether all numbers of a tensor are finite, without a temporary of its size."""
    return all(map(math.isfinite, torch.aminmax(tensor)))  # NaN is the least and the largest of all
