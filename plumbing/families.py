"""
config.json of the families that model.py computes, read into a ModelConfig and written back.

    config = config_from_hf(read_config(folder), folder)     # a ModelConfig
    stored = config_to_hf(config, torch.bfloat16)            # the dict to write as config.json

A field that changes the mathematics, and that we do not compute, is refused by its name and value: loading such a model
all the same would give other numbers without a word. What else a file says passes.
"""

import os

import torch

from data import fields
from data.fields import either, maybe, number, one_of, several, switch, table, whole
from model import ROPE, ModelConfig, ModelError

ADVICE = 'fetch or save the model again'
FLOATS = {'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
DTYPE = maybe(one_of(*(str(dtype).removeprefix('torch.') for dtype in FLOATS.values())))
LONGEST = 2**31  # positions

THETA, TOKEN = maybe(number(1.001, 1e15)), whole(-1, 2**31)  # llama 1 wrote -1 for no token
HEADS, WINDOW, FACTOR = whole(1, 2**16), maybe(whole(1, LONGEST)), number(1e-6, 1e6)
CONFIG = {
    'hidden_size': whole(1, 2**20),
    'intermediate_size': whole(1, 2**22),
    'num_hidden_layers': whole(1, 4096),
    'num_attention_heads': HEADS,
    'num_key_value_heads': maybe(HEADS),
    'head_dim': maybe(HEADS),
    'vocab_size': whole(1, fields.ROWS),
    'max_position_embeddings': whole(1, LONGEST, default=2048),
    'original_max_position_embeddings': maybe(whole(2, LONGEST)),
    'rms_norm_eps': number(0, 1, default=1e-6),
    'rope_theta': THETA,
    'rope_scaling': maybe(table()),
    'rope_parameters': maybe(table()),
    'tie_word_embeddings': switch(default=False),
    'bos_token_id': maybe(either(TOKEN, several(TOKEN))),
    'eos_token_id': maybe(either(TOKEN, several(TOKEN))),
    'pad_token_id': maybe(TOKEN),
    'dtype': DTYPE,  # transformers 5
    'torch_dtype': DTYPE,  # transformers 4
    'packed_weights': switch(default=False),  # ours
}
BIASES = {'attention_bias': switch(default=False), 'mlp_bias': switch(default=False)}
PARTIAL = {'partial_rotary_factor': maybe(number(0, 1))}
SOME_SLIDE = {
    'sliding_window': WINDOW,
    'use_sliding_window': maybe(switch(), default=False),
    'max_window_layers': maybe(whole(0, 4096), default=28),
    'layer_types': maybe(several(one_of('full_attention', 'sliding_attention'))),
}
# What the families have beyond that, and what a missing field means where a family has a default of its own: that of
# its class in transformers, which writes only what differs from a default, or, since version 5, everything.
FAMILIES = {
    'llama': BIASES,
    'mistral': {
        'num_key_value_heads': maybe(HEADS, default=8),
        'sliding_window': maybe(WINDOW, default=4096),
        'max_position_embeddings': whole(1, LONGEST, default=131072),
    },
    'qwen2': {
        'num_key_value_heads': maybe(HEADS, default=32),
        'max_position_embeddings': whole(1, LONGEST, default=32768),
        **SOME_SLIDE,
    },
    'qwen3': {
        'num_key_value_heads': maybe(HEADS, default=32),
        'head_dim': maybe(HEADS, default=128),
        'max_position_embeddings': whole(1, LONGEST, default=32768),
        'attention_bias': switch(default=False),
        **SOME_SLIDE,
    },
    'phi3': {
        'max_position_embeddings': whole(1, LONGEST, default=4096),
        'original_max_position_embeddings': whole(2, LONGEST, default=4096),
        'rms_norm_eps': number(0, 1, default=1e-5),
        'sliding_window': WINDOW,
        **PARTIAL,
    },
    'smollm3': {
        'num_key_value_heads': maybe(HEADS, default=4),
        'max_position_embeddings': whole(1, LONGEST, default=32768),
        'tie_word_embeddings': switch(default=True),
        'no_rope_layers': maybe(several(one_of(0, 1))),  # 1: rotates
        'no_rope_layer_interval': maybe(whole(1, 4096), default=4),
        **BIASES,
        **SOME_SLIDE,
    },
    'granite': {
        'attention_multiplier': number(1e-6, 1e6, default=1.0),
        'embedding_multiplier': number(1e-6, 1e6, default=1.0),
        'residual_multiplier': number(1e-6, 1e6, default=1.0),
        'logits_scaling': number(1e-6, 1e6, default=1.0),
        'attention_dropout': maybe(number(0, 1), default=0.0),  # in training alone, where we leave it out
        **BIASES,
    },
    'stablelm': {
        'num_key_value_heads': maybe(HEADS, default=32),
        'max_position_embeddings': whole(1, LONGEST, default=4096),
        'layer_norm_eps': number(0, 1, default=1e-5),
        'use_qkv_bias': switch(default=False),
        **PARTIAL,
    },
}
# Theta, and the share of a head that rotates, where nothing is said of them.
ROTATION = {'smollm3': (2e6, 1.0), 'stablelm': (1e4, 0.25)}
# What is not needed here, and goes back into the config.json of what we save.
KEPT = ('pad_token_id', 'sliding_window', 'use_sliding_window', 'max_window_layers', 'layer_types', 'attention_dropout')
# Fields that change the arithmetic, and the values that stand for ours, where the family does not say more of them.
COMPUTED = {
    'hidden_act': ('silu', 'swish'),
    'attention_bias': (False,),
    'mlp_bias': (False,),
    'attention_dropout': (0.0, None),
    'hidden_dropout': (0.0, None),
    'resid_pdrop': (0.0, None),
    'embd_pdrop': (0.0, None),
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
    'use_mrope': (False, None),
    'lm_head_bias': (False, None),
}
OLD_LENGTH = {'original_max_position_embeddings': maybe(whole(2, LONGEST))}
SCALING = {
    'default': {},
    'linear': {'factor': FACTOR},
    'dynamic': {'factor': number(1, 1e6)},
    'llama3': dict.fromkeys(('factor', 'low_freq_factor', 'high_freq_factor'), FACTOR) | OLD_LENGTH,
    'yarn': {
        **dict.fromkeys(('factor', 'attention_factor', 'beta_fast', 'beta_slow'), maybe(FACTOR)),
        **dict.fromkeys(('mscale', 'mscale_all_dim'), maybe(FACTOR)),
        'truncate': maybe(switch()),
        **OLD_LENGTH,
    },
    'longrope': {
        **dict.fromkeys(('short_factor', 'long_factor'), several(FACTOR)),
        **dict.fromkeys(('factor', 'attention_factor'), maybe(FACTOR)),
        **OLD_LENGTH,
    },
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
        raise ModelError(f'{where}: {what} is not what this LLaMA computes (only {", ".join(FAMILIES)} are)')
    for name, allowed in COMPUTED.items():
        known = name not in given or name in FAMILIES[family] or any(same(given[name], value) for value in allowed)
        if not known:
            what = f'{name}={fields.shown(given[name])}'
            raise ModelError(f'{where}: {what} is not what this LLaMA computes (only {allowed[0]!r} is)')
    return fields.check(given, CONFIG | SOME_SLIDE | FAMILIES[family], where, ModelError, ADVICE)


def rope_from_hf(hf, where):
    """-> theta, ModelConfig's rope_scaling, and the share of a head that rotates.

    transformers 4 keeps theta beside `rope_scaling`, 5 has both in `rope_parameters`; which of two counts depends on
    the version, so they must say the same. Raises ModelError if they do not."""
    theta, partial = ROTATION.get(hf['model_type'], (1e4, 1.0))
    theta, outer = float(hf['rope_theta'] or theta), hf.get('partial_rotary_factor')
    partial = float(partial if outer is None else outer)
    names = [name for name in ('rope_scaling', 'rope_parameters') if hf[name]]
    said = [one_rope(hf[name], hf, theta, partial, f'{where}, {name}') for name in names] or [(theta, None, partial)]
    agree = hf['rope_theta'] in (None, said[0][0]) and outer in (None, said[0][2])
    if not agree or any(one != said[0] for one in said):
        raise ModelError(f'{where}: rope_theta, rope_scaling and rope_parameters contradict each other: {ADVICE}')
    return said[0]


def one_rope(rope, hf, theta, partial, place):
    """The same of one of the two dicts; theta, partial: what stands beside it."""
    rope = {'rope_type': rope.get('type', 'default')} | rope
    if hf['model_type'] == 'phi3' and rope['rope_type'] in ('su', 'yarn'):  # names that longrope had before
        rope['rope_type'] = 'longrope'
    parts = hf['model_type'] in ('phi3', 'stablelm')
    share = rope.get('partial_rotary_factor')
    if (share not in (1.0, None) and not parts) or any(type(v) is dict for v in rope.values()):
        what = fields.shown(rope)
        raise ModelError(f'{place} is {what}: only one rotation, of whole heads, is what this LLaMA computes')
    only = 'only these are what this LLaMA computes'
    known = {'rope_type': one_of(*SCALING), 'rope_theta': THETA, **PARTIAL}
    rope = fields.check(rope, known, place, ModelError, only)
    kind, found = rope['rope_type'], (float(rope['rope_theta'] or theta), float(partial if share is None else share))
    rope = fields.check(rope, SCALING[kind], place, ModelError, ADVICE)
    most, outer = hf['max_position_embeddings'], hf['original_max_position_embeddings']
    if kind == 'dynamic':
        rope['original_max_position_embeddings'] = most
    elif 'original_max_position_embeddings' in SCALING[kind]:
        inner = rope['original_max_position_embeddings']
        if outer and inner not in (outer, None) and hf['model_type'] != 'phi3':  # where the outer one counts
            raise ModelError(f'{place}: original_max_position_embeddings has two values: {ADVICE}')
        rope['original_max_position_embeddings'] = outer or inner or most
        rope['factor'] = rope['factor'] or most / rope['original_max_position_embeddings']
    if kind == 'llama3' and rope['low_freq_factor'] >= rope['high_freq_factor']:
        raise ModelError(f'{place}: low_freq_factor must be less than high_freq_factor: {ADVICE}')
    keys = [key for key in ROPE.get(kind, ()) if key and rope[key] is not None]
    return found[0], {'rope_type': kind} | {key: rope[key] for key in keys} if keys else None, found[1]


def window_of(hf):
    """W of a sliding window, in which attention is ordinary; None if no layer slides. As in transformers, the field
    alone does not make a Qwen or a SmolLM3 slide."""
    family, W, n = hf['model_type'], hf.get('sliding_window'), hf['num_hidden_layers']
    if family in ('mistral', 'phi3'):
        return W
    if family not in ('qwen2', 'qwen3', 'smollm3') or not hf['use_sliding_window']:
        return None
    slides = (hf['max_window_layers'] or 0) < n if family != 'smollm3' else bool(silent_layers(hf))
    return W if (slides if hf['layer_types'] is None else 'sliding_attention' in hf['layer_types']) else None


def silent_layers(hf):
    """The layers of a SmolLM3 that do not rotate."""
    n, each = hf['num_hidden_layers'], hf.get('no_rope_layer_interval') or 4
    rotates = hf.get('no_rope_layers')
    rotates = [int((i + 1) % each != 0) for i in range(n)] if rotates is None else rotates
    return tuple(i for i, one in enumerate(rotates[:n]) if not one)


def config_from_hf(given, where='config.json'):
    """ModelConfig of a Hugging Face config (a dict). Raises ModelError, naming the field that LLaMA cannot have."""
    hf = checked(given, where)
    family, heads = hf['model_type'], hf['num_attention_heads']
    theta, scaling, partial = rope_from_hf(hf, where)
    head_dim, positions = hf['head_dim'] or hf['hidden_size'] // heads, hf['max_position_embeddings']
    block_size, kind = positions, (scaling or {}).get('rope_type')
    if kind in ('dynamic', 'yarn'):  # made to go on beyond
        block_size = max(positions, int(scaling['factor'] * scaling['original_max_position_embeddings']))
    block_size = min(block_size, window_of(hf) or block_size, LONGEST)
    rotary_dim = int(head_dim * partial)
    check_rotation(hf, scaling, rotary_dim, where)
    attention_bias = hf.get('attention_bias', False)
    try:
        return ModelConfig(
            n_layer=hf['num_hidden_layers'],
            n_head=heads,
            n_kv_head=hf['num_key_value_heads'] or 0,
            n_embd=hf['hidden_size'],
            n_inner=hf['intermediate_size'],
            vocab_size=hf['vocab_size'],
            block_size=block_size,
            head_dim=hf['head_dim'] or 0,
            norm_eps=hf['layer_norm_eps' if family == 'stablelm' else 'rms_norm_eps'],
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=hf['tie_word_embeddings'],
            family=family,
            qkv_bias=family == 'qwen2' or attention_bias or bool(hf.get('use_qkv_bias')),
            o_bias=attention_bias,
            mlp_bias=hf.get('mlp_bias', False),
            qk_norm=family == 'qwen3',
            layer_norm=family == 'stablelm',
            rotary_dim=rotary_dim,
            no_rope=silent_layers(hf) if family == 'smollm3' else (),
            embedding_scale=float(hf['embedding_multiplier']) if family == 'granite' else 1.0,
            residual_scale=float(hf['residual_multiplier']) if family == 'granite' else 1.0,
            attention_scale=float(hf['attention_multiplier']) if family == 'granite' else 0.0,
            logit_divisor=float(hf['logits_scaling']) if family == 'granite' else 1.0,
            max_positions=positions,
            bos_token_id=hf['bos_token_id'],
            eos_token_id=hf['eos_token_id'],
            kept={name: hf[name] for name in KEPT if name in given and name in {'pad_token_id', *FAMILIES[family]}},
        )
    except ModelError as error:
        raise ModelError(f'{where}: {error}') from None


def check_rotation(hf, scaling, rotary_dim, where):
    """Raise ModelError for a rotation whose parts do not fit each other."""
    kind, rotates = (scaling or {}).get('rope_type'), hf.get('no_rope_layers')
    if hf['model_type'] == 'stablelm' and hf['head_dim'] not in (None, hf['hidden_size'] // hf['num_attention_heads']):
        raise ModelError(f'{where}: head_dim={hf["head_dim"]} is not hidden_size / num_attention_heads: {ADVICE}')
    if rotary_dim < (least := 4 if kind == 'dynamic' else 2) or rotary_dim % 2:
        what = f'{rotary_dim} dimensions of a head would rotate, which come in pairs, {least} or more'
        raise ModelError(f'{where}: by head_dim and partial_rotary_factor {what}: {ADVICE}')
    for key in ('short_factor', 'long_factor') if kind == 'longrope' else ():
        if len(scaling[key]) != rotary_dim // 2:
            raise ModelError(f'{where}: {key} has {len(scaling[key])} numbers, not {rotary_dim // 2}: {ADVICE}')
    if hf['model_type'] == 'smollm3' and rotates is not None and len(rotates) < hf['num_hidden_layers']:
        raise ModelError(f'{where}: no_rope_layers has {len(rotates)} numbers, fewer than layers: {ADVICE}')


# ---- and back ----------------------------------------------------------------------------------------------------

ARCHITECTURES = dict(llama='Llama', mistral='Mistral', qwen2='Qwen2', qwen3='Qwen3', phi3='Phi3', smollm3='SmolLM3')
ARCHITECTURES |= dict(granite='Granite', stablelm='StableLm')


def config_to_hf(c, dtype=torch.float32):
    """The dict that Hugging Face writes as config.json, with dtype and the rotary keys in the spellings of transformers
    4 and 5. Raises ModelError where the family has no words for what the ModelConfig says."""
    if c.family not in FAMILIES:
        raise ModelError(f"family='{c.family}' is not known: use one of {', '.join(FAMILIES)}")
    dtype = str(dtype).removeprefix('torch.')
    stored = {
        'architectures': [ARCHITECTURES[c.family] + 'ForCausalLM'],
        'model_type': c.family,
        'vocab_size': c.vocab_size,
        'hidden_size': c.n_embd,
        'intermediate_size': c.n_inner,
        'num_hidden_layers': c.n_layer,
        'num_attention_heads': c.n_head,
        'num_key_value_heads': c.n_kv_head,
        'head_dim': c.head_dim,
        'hidden_act': 'silu',
        'bos_token_id': c.bos_token_id,
        'eos_token_id': c.eos_token_id,
        'pad_token_id': None,
        'initializer_range': 0.02,
        'tie_word_embeddings': c.tie_embeddings,
        'torch_dtype': dtype,
        'dtype': dtype,
    }
    stored |= rope_to_hf(c) | own_fields(c) | (c.kept or {})
    back = config_from_hf(stored)
    for name in vars(c).keys() - {'block_size', 'max_positions', 'kept'}:
        said, read = getattr(c, name), getattr(back, name)
        if said != read:
            what = f'{name}={fields.shown(said)} is not what family={c.family!r} can say'
            raise ModelError(f'{what}, it would be read as {fields.shown(read)}: choose another family')
    return stored


def rope_to_hf(c):
    """The fields of the rotation and of the longest window."""
    s, longest = c.rope_scaling or {'rope_type': 'default'}, max(c.max_positions, c.block_size)
    kind, old = s['rope_type'], s.get('original_max_position_embeddings')
    if kind in ('dynamic', 'yarn'):  # which go on beyond
        longest = old if kind == 'dynamic' else c.max_positions
    rope = {key: s[key] for key in ('rope_type', *ROPE.get(kind, ())) if key in s}
    if kind == 'dynamic' or (kind == 'longrope' and s['factor'] == longest / old):  # max_position_embeddings says it
        del rope['original_max_position_embeddings' if kind == 'dynamic' else 'factor']
    older, parts = (rope if c.rope_scaling else None), {}
    if c.family in ('phi3', 'stablelm'):
        parts = {'partial_rotary_factor': c.rotary_dim / c.head_dim}
    found = {'max_position_embeddings': longest, 'rope_theta': c.rope_theta, **parts}
    if c.family == 'phi3':
        found['original_max_position_embeddings'] = old or longest
        if older:  # transformers 4 wants these three and no more
            older = {'type': kind, 'short_factor': s['short_factor'], 'long_factor': s['long_factor']}
    return found | {'rope_scaling': older, 'rope_parameters': {'rope_theta': c.rope_theta, **rope, **parts}}


def own_fields(c):
    """Those that not every family has."""
    biases = {'attention_bias': c.o_bias, 'mlp_bias': c.mlp_bias}
    found = {
        'llama': biases,
        'mistral': {'sliding_window': None},
        'qwen3': {'attention_bias': c.o_bias},
        'smollm3': {**biases, 'no_rope_layers': [int(i not in c.no_rope) for i in range(c.n_layer)]},
        'granite': {
            **biases,
            'attention_multiplier': c.attention_scale,
            'embedding_multiplier': c.embedding_scale,
            'residual_multiplier': c.residual_scale,
            'logits_scaling': c.logit_divisor,
        },
        'stablelm': {'use_qkv_bias': c.qkv_bias, 'use_parallel_residual': False, 'qk_layernorm': False},
    }.get(c.family, {})
    return found | {'layer_norm_eps' if c.family == 'stablelm' else 'rms_norm_eps': c.norm_eps}
