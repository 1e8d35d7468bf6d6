"""
A model and its tokenizer as one GGUF file, which llama.cpp, ollama, LM Studio and transformers read.

    save(model, 'out/mine.gguf', folder)                 # matrices in f16, vectors in f32
    save(model, 'out/mine.gguf', folder, 'q8_0')         # matrices in blocks of 32 int8 numbers with an f16 scale

What is written is named and laid out as llama.cpp's own converter does it, by the `gguf` package's tables. Where that
is not enough for this model, its family, its rotation or its tokenizer is refused by name: llama.cpp would read the
file all the same, and compute something else.
"""

import os

import numpy as np
import torch

from attention import rotary_frequencies
from data import chat, fields, tokenizer
from data.tokenizer import ADVICE, TokenizerError
from model import ModelError
from plumbing import Stop
from plumbing.fused import fuse_weights
from plumbing.terminal import patience

KINDS = ('f16', 'q8_0')
# model_type: (llama.cpp's name, whether it rotates neighbours (x_2i, x_2i+1), for which rows of q and k change places)
FAMILIES = {
    'llama': ('llama', True),
    'mistral': ('llama', True),
    'smollm3': ('smollm3', True),
    'granite': ('granite', True),
    'qwen2': ('qwen2', False),
    'qwen3': ('qwen3', False),
    'phi3': ('phi3', False),
    'stablelm': ('stablelm', False),
}
# How byte-level tokenizers cut a text before they merge: the regular expression, and llama.cpp's name for it.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
CUTS = {
    ('words',): 'gpt-2',
    ('digits', 'words'): 'smollm',
    (WORDS + r'\p{N}{1,3}' + REST,): 'llama-bpe',
    (WORDS + r'\p{N}' + REST,): 'qwen2',
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of a token


def save(model, path, folder, kind='f16'):
    """Write the file, under another name until it is complete. folder: whose tokenizer and chat template go into it."""
    try:
        import gguf
    except ImportError:
        raise Stop('writing GGUF needs the gguf package: pip install gguf') from None
    c = model.config
    check_family(c)
    architecture, swaps = FAMILIES[c.family]
    words = vocabulary(folder, c)  # raises before anything is written
    new = f'{path}.new'
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    writer = gguf.GGUFWriter(new, architecture)
    try:
        write_shape(writer, c, os.path.basename(path).removesuffix('.gguf'), kind)
        for name, value in words.items():
            getattr(writer, f'add_{name}')(value)
        tensors = list(tensors_of(model, gguf, kind, architecture, swaps))
        for name, shape, dtype, nbytes, _ in tensors:
            raw = gguf.GGMLQuantizationType.Q8_0 if dtype == np.uint8 else None
            writer.add_tensor_info(name, shape, np.dtype(dtype), nbytes, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with patience(f'writing {path}') as tell:
            for i, (*_, whole) in enumerate(tensors):
                writer.write_tensor_data(whole())
                tell((i + 1) / len(tensors))
        writer.close()
        os.replace(new, path)
    finally:
        if os.path.exists(new):
            writer.close()
            os.remove(new)


def check_family(c):
    """Raise ModelError for what llama.cpp computes otherwise, or not at all."""
    if c.family not in FAMILIES:
        raise ModelError(f'model_type={c.family} is not one that is written as GGUF here: {", ".join(FAMILIES)} are')
    rope = (c.rope_scaling or {}).get('rope_type', 'default')
    known = {'llama': ('default', 'linear', 'llama3'), 'mistral': ('default', 'linear')}.get(c.family, ('default',))
    if rope not in known:
        raise ModelError(f'rope_type={rope} of {c.family} is not written as GGUF here: only {", ".join(known)}')
    if c.family == 'smollm3' and set(c.no_rope) != {i for i in range(c.n_layer) if i % 4 == 3}:
        raise ModelError(f'no_rope={c.no_rope} is not what llama.cpp computes for smollm3: every fourth layer is')
    if c.family in ('smollm3', 'granite') and (c.qkv_bias or c.o_bias or c.mlp_bias):
        raise ModelError(f'biases in {c.family} are not written as GGUF here')


def write_shape(writer, c, name, kind):
    import gguf

    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == 'q8_0' else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(c.max_positions)
    writer.add_block_count(c.n_layer)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(c.n_inner)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_rope_dimension_count(c.rotary_dim)
    writer.add_rope_freq_base(c.rope_theta)
    if c.rope_scaling and c.rope_scaling['rope_type'] == 'linear':
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_scaling['factor'])
    if c.layer_norm:
        writer.add_layer_norm_eps(c.norm_eps)
        writer.add_parallel_residual(False)
    else:
        writer.add_layer_norm_rms_eps(c.norm_eps)
    if c.family == 'phi3':
        writer.add_sliding_window(0)
    if c.family == 'granite':
        writer.add_attention_scale(c.attention_scale)
        writer.add_embedding_scale(c.embedding_scale)
        writer.add_residual_scale(c.residual_scale)
        writer.add_logit_scale(c.logit_divisor)


def tensors_of(model, gguf, kind, architecture, swaps):
    """Yield (name, shape, dtype, bytes, function that returns the array) in the order of the file."""
    c = model.config
    table = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(table, c.n_layer)
    if c.rope_scaling and c.rope_scaling['rope_type'] == 'llama3':
        plain = c.rope_theta ** (-torch.arange(0, c.rotary_dim, 2, dtype=torch.float32) / c.rotary_dim)  # (d/2,)
        factors = (plain / rotary_frequencies(c, 0, 'cpu')[0].cpu()).numpy()
        yield 'rope_freqs.weight', factors.shape, np.float32, factors.nbytes, lambda: factors
    for ours, shape, whole in fuse_weights(model.dense_weights(), c):
        theirs, _, leaf = (ours if ours.startswith('lm_head') else f'model.{ours}').rpartition('.')
        heads = next((n for end, n in (('.q_proj', c.n_head), ('.k_proj', c.n_kv_head)) if theirs.endswith(end)), 0)
        dtype, nbytes = stored_as(shape, kind)
        read = lambda whole=whole, dtype=dtype, name=ours, heads=heads * swaps: array(whole(), dtype, name, heads)  # noqa: E731
        yield f'{names.get_name(theirs)}.{leaf}', stored_shape(shape, dtype), dtype, nbytes, read


def stored_as(shape, kind):
    """-> the dtype, np.uint8 for blocks of q8_0, and how many bytes that takes. Vectors stay in f32."""
    n = int(np.prod(shape))
    if len(shape) == 1:
        return np.float32, 4 * n
    return (np.uint8, n // 32 * 34) if kind == 'q8_0' and shape[-1] % 32 == 0 else (np.float16, 2 * n)


def stored_shape(shape, dtype):
    return (*shape[:-1], shape[-1] // 32 * 34) if dtype == np.uint8 else shape


def array(weight, dtype, name, heads=0):
    """A weight or bias as it is stored. heads: of which the rows change places, the halves that rotate together."""
    import gguf

    weight = weight.detach().float().cpu()
    if heads:
        halves = weight.view(heads, 2, -1, *weight.shape[1:])  # (heads, 2, d/2, ...)
        weight = halves.transpose(1, 2).reshape(weight.shape)
    if dtype == np.uint8:
        return gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    if dtype == np.float16 and weight.abs().max() > torch.finfo(torch.float16).max:
        raise ModelError(f'{name} holds numbers beyond those of f16: use --gguf=q8_0')
    return weight.numpy().astype(dtype)


# ---- the tokenizer -----------------------------------------------------------------------------------------------


def vocabulary(folder, c):
    """{what: value} of the tokenizer, as GGUFWriter's add_ methods are named. Raises TokenizerError."""
    tok = tokenizer.load(folder)
    if tok.json is None:
        raise TokenizerError(f'GGUF has no place for a tokenizer of the kind {tok.kind}: it needs a tokenizer.json')
    saved = fields.parse(tok.json, f'{folder}/tokenizer.json', TokenizerError, ADVICE)
    model = saved['model']
    if model.get('type', 'BPE') != 'BPE':
        raise TokenizerError(f'{folder}: a tokenizer of the type {model["type"]} is not written as GGUF here')
    merges = [pair.split(' ') if isinstance(pair, str) else pair for pair in model['merges']]
    pieces = bool(model.get('byte_fallback'))  # of SentencePiece
    found = {'tokenizer_model': 'llama' if pieces else 'gpt2', 'tokenizer_pre': 'default' if pieces else cuts(saved)}
    tokens, kinds = tokens_of(saved, c.vocab_size, pieces)
    found |= {'token_list': tokens, 'token_types': kinds}
    if pieces:
        made = {}  # the earlier a merge, the higher the score
        for i, (a, b) in enumerate(merges):
            made.setdefault(a + b, -float(i))
        found['token_scores'] = [made.get(token, 0.0 if kind != NORMAL else -1e4) for token, kind in zip(tokens, kinds)]
        found['add_space_prefix'] = starts_with_space(saved)
    else:
        found['token_merges'] = [f'{a} {b}' for a, b in merges]
    ends = tokenizer.ends(folder, tok)
    bos = tok.bos[:1] or ([c.bos_token_id] if isinstance(c.bos_token_id, int) else [])
    found |= {'bos_token_id': bos[0]} if bos else {}
    found |= {'eos_token_id': ends[0]} if ends else {}
    found |= {'eot_token_id': ends[1]} if len(ends) > 1 else {}
    found |= {'add_bos_token': bool(tok.bos), 'add_eos_token': False}
    template = chat.own(folder)[0]
    return found | ({'chat_template': template['default']} if template else {})


def tokens_of(saved, rows, pieces):
    """-> the tokens of all rows of the model, and the kind of each. A row without a token gets a name of its own."""
    ids, added = {i: token for token, i in saved['model']['vocab'].items()}, {}
    for token in saved.get('added_tokens') or ():
        ids[token['id']], added[token['id']] = token['content'], token['special']
    if max(ids) >= rows:
        raise TokenizerError(
            f'the tokenizer has id {max(ids)}, the model {rows} rows, and llama.cpp wants a row for each: '
            'give the model more rows, or remove the added token'
        )
    unknown, kinds = saved['model'].get('unk_token'), []
    for i in range(rows):
        token = ids.get(i)
        byte = pieces and token is not None and len(token) == 6 and token.startswith('<0x')
        kind = UNUSED if token is None else BYTE if byte else UNKNOWN if pieces and token == unknown else NORMAL
        if i in added and kind != UNKNOWN:
            kind = CONTROL if added[i] else USER_DEFINED
        kinds.append(kind)
    return [ids.get(i, f'[PAD{i}]') for i in range(rows)], kinds


def cuts(saved):
    """llama.cpp's name of how a byte-level tokenizer cuts a text before it merges. Raises TokenizerError."""
    first = saved.get('pre_tokenizer') or {}
    steps, found = first.get('pretokenizers', [first]), []
    for step in steps:
        if step.get('type') == 'ByteLevel' and not step.get('add_prefix_space'):
            found += ['words'] if step.get('use_regex', True) else []
        elif step.get('type') == 'Digits' and step.get('individual_digits'):
            found.append('digits')
        elif step.get('type') == 'Split' and step.get('behavior') == 'Isolated' and not step.get('invert'):
            found.append(step['pattern'].get('Regex'))
        else:
            found.append(step.get('type'))
    if tuple(found) not in CUTS:
        raise TokenizerError(
            f'llama.cpp has no name for how this tokenizer cuts a text ({fields.shown(found)}), and would refuse the '
            'file or read text otherwise: GGUF is written for the tokenizers of published models'
        )
    return CUTS[tuple(found)]


def starts_with_space(saved):
    """Whether SentencePiece puts a space before a text."""
    steps = [one for key in ('normalizer', 'pre_tokenizer') for one in nested(saved.get(key) or {})]
    return any(s.get('type') == 'Prepend' or s.get('prepend_scheme') in ('first', 'always') for s in steps)


def nested(step):
    yield step
    for inner in step.get('normalizers', []) + step.get('pretokenizers', []):
        yield from nested(inner)
