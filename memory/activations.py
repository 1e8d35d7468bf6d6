"""
What a block keeps for its backward, in the letters of formula.py, whose Run each function takes.
"""


def activations_of_attention(run):
    """What a block keeps of its attention: x and its norm; q and k, rotated; v, and the result; x again."""
    c, a, N = run.config, run.a, run.N
    kept = a * N * (3 * run.D + 2 * run.Q + 2 * run.K) + N * (4 * run.H + 4 * (1 + run.shape.layer_norm))
    if run.shape.qk_norm:  # q and k before it
        kept += a * N * (run.Q + run.K) + 4 * N * (run.Q + run.K) // run.shape.head_dim
    if run.math_attention:  # q and k scaled, k and v repeated for each head, a number a score, the result copied
        kept += a * N * (2 * run.Q - 2 * run.K) + 4 * run.H * N * (c.block_size - 1)
    return kept + of_adapters(run, ('q', 'k', 'v', 'o'), N)


def activations_of_mlp(run, n):
    """And of an MLP of n tokens: the norm of its input; gate, up and what down_proj reads."""
    kept = run.a * n * (run.D + 3 * run.F) + 4 * n * (1 + run.shape.layer_norm)
    return kept + of_adapters(run, ('gate', 'up', 'down'), n)


def of_adapters(run, names, n):
    """What LoRA's layers of these names keep of n tokens, more or less than others."""
    if run.config.method != 'lora':
        return 0
    # A frozen layer keeps no input. One with an adapter keeps its input, x A^T, and A and B in the activations' dtype.
    a, adapted = run.a, {name: run.block[name] for name in names if run.block[name].r}
    kept = sum(a * n * x.r + (a * sum(x.trained) if a != 4 else 0) for x in adapted.values())
    need = set() if run.config.dropout else set(adapted)
    for group, width in (({'q', 'k', 'v'}, run.D), ({'gate', 'up'}, run.D), ({'down'}, run.F)):
        kept -= a * n * width * (group <= set(names) and not need & group)
    if run.config.dropout:  # each has an input of its own, and a mask of one byte a number
        kept += sum((a + 1) * n * x.trained[0] // x.r for x in adapted.values())
    return kept


def activations_of_a_block(run):
    return activations_of_attention(run) + activations_of_mlp(run, run.N)


def chunk(run):
    """Tokens that an MLP takes at a time."""
    return min(run.config.mlp_chunk or run.N, run.N)


def activations(run):
    """-> bytes of all blocks, as backward begins; of one; and what the recomputation of a block, or of a chunk of its
    MLP, adds. Offloaded, a block's input comes for that, and the next one's on its heels."""
    c, kept = run.config, activations_of_attention(run) + activations_of_mlp(run, chunk(run))
    saved = kept if chunk(run) == run.N else activations_of_attention(run)
    saved = run.a * run.N * run.D if c.checkpointing else saved
    positions = run.a * c.block_size * run.shape.rotary_dim
    if c.offload_activations:
        return positions, 0, kept + saved
    return run.L * saved + positions, saved, kept - saved


def in_attention(run):
    """Bytes of the backward of flash attention: the gradients of the residual stream, of the result, of q, k and v; q's
    in fp32 while it is summed; and, where heads share a key, k's and v's for each head."""
    if run.a == 4:
        return 0
    apart = 2 * run.Q * (run.Q != run.K)
    return run.a * run.N * (run.D + 2 * run.Q + 2 * run.K + 2 * run.Q + apart) + 4 * run.H * run.N
