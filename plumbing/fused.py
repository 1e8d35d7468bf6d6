"""
Phi-3's fused matrices: q, k and v in one, gate and up in another. Here they are apart, so that methods and adapters do
with them what they do in every other family; in folders, of models and of adapters, they are fused.

    held = split_weights(headers(folder), config)            # what is read: parts of the rows of a file's tensor
    weights = fuse_weights(model.dense_weights(), config)    # what is written
"""

import torch

from plumbing.folder import AdapterError

FUSED = {'qkv_proj': ('q_proj', 'k_proj', 'v_proj'), 'gate_up_proj': ('gate_proj', 'up_proj')}  # row after row
MATRIX = {part: matrix for matrix, parts in FUSED.items() for part in parts}


def rows_of(config):
    """{a fused matrix: {its part: (first row, the one after its last)}} of a ModelConfig; {} of another family."""
    Q, K, F = config.n_head * config.head_dim, config.n_kv_head * config.head_dim, config.n_inner
    if config.family != 'phi3':
        return {}
    return {
        'qkv_proj': {'q_proj': (0, Q), 'k_proj': (Q, Q + K), 'v_proj': (Q + K, Q + 2 * K)},
        'gate_up_proj': {'gate_proj': (0, F), 'up_proj': (F, 2 * F)},
    }


def height(rows):
    return max(stop for _, stop in rows.values())


def split_weights(held, config):
    """{name: folder.Held} with parts in the place of fused matrices. One of other rows than theirs stays as it is."""
    found, fused = {}, rows_of(config)
    for name, one in held.items():
        matrix = name.removesuffix('.weight').rpartition('.')[2]
        if matrix not in fused or one.shape[:1] != (height(fused[matrix]),):
            found[name] = one
            continue
        for part, (start, stop) in fused[matrix].items():
            shape = (stop - start, *one.shape[1:])
            found[name.replace(matrix, part)] = one._replace(shape=shape, rows=(start, stop))
    return found


def fuse_weights(weights, config):
    """LLaMA.dense_weights with a fused matrix in the place of the last of its parts."""
    fused, waiting = rows_of(config), []
    for name, shape, whole in weights:
        part = name.removesuffix('.weight').rpartition('.')[2]
        matrix = MATRIX.get(part)
        if matrix not in fused:
            yield name, shape, whole
            continue
        waiting.append(whole)
        if part == FUSED[matrix][-1]:
            parts, waiting = waiting, []
            shape = (height(fused[matrix]), shape[1])
            yield name.replace(part, matrix), shape, lambda parts=parts: torch.cat([one() for one in parts])


# ---- adapters: `....self_attn.q_proj.lora_A.weight` -------------------------------------------------------------


def fuse_adapters(tensors, config):
    """-> {name: tensor} with one A (n r, in) and one B (out, n r) for the n parts of a fused matrix that have adapters,
    A below A, and of the columns of B for each part r, zero but in its own rows; and {matrix: these parts}."""
    fused, found, own = rows_of(config), {}, {}
    for name, A in tensors.items():
        part = name.split('.')[-3]
        matrix = MATRIX.get(part)
        if matrix not in fused:
            found[name] = A
        elif matrix not in own or part == own[matrix][0]:  # once for each layer, with all parts
            A_of, B_of = ({one: name.replace(part, one).replace('lora_A', leaf) for one in FUSED[matrix]}
                          for leaf in ('lora_A', 'lora_B'))  # fmt: skip
            own[matrix] = [one for one in FUSED[matrix] if A_of[one] in tensors]
            blocks = [
                tensors.get(B_of[one], A.new_zeros(stop - start, 0)) for one, (start, stop) in fused[matrix].items()
            ]
            found[A_of[part].replace(part, matrix)] = torch.cat([tensors[A_of[one]] for one in own[matrix]])
            found[B_of[part].replace(part, matrix)] = torch.block_diag(*blocks)
    return found, own


def split_adapters(tensors, config, own, folder):
    """The reverse. own: as above; all parts of a matrix that is not there share its A (r, in), as peft trains it.
    Raises AdapterError if a B is not of such blocks."""
    fused, found = rows_of(config), {}
    for name, tensor in tensors.items():
        matrix = name.split('.')[-3]
        if matrix not in fused:
            found[name] = tensor
            continue
        is_B, parts = '.lora_B.' in name, own.get(matrix, FUSED[matrix])
        blocks = tensor.chunk(len(parts), int(is_B)) if matrix in own else [tensor] * len(parts)
        if is_B and len(tensor) != height(fused[matrix]):
            raise AdapterError(f'{folder} does not fit this model at {name}: use its base')
        for part, block in zip(parts, blocks, strict=True):
            if is_B:
                start, stop = fused[matrix][part]
                if matrix in own and (block[:start].any() or block[stop:].any()):
                    what = f'{name} is not of a block for each of {",".join(parts)}'
                    raise AdapterError(f'{folder}: {what}: merge it with peft, and use the result')
                block = block[start:stop]
            found[name.replace(matrix, part)] = block
    return found
