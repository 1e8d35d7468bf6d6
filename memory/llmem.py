"""
What each of several GPUs holds: by LLMem's equations (arXiv 2404.10933), and by what torch really allocates.

    peak(model, 'ADP', batch=8, gpus=4)                     # LLMem's equations, as published
    decide(model, card, gpus=4)                             # its Algorithm 1: CDP, ADP, TP, DP+TP or CPU offload
    several_gpus(parts, n=8, how='zero3')                   # our own: bytes of each part on each GPU, as in torch
    choose(parts, card, n=8, seconds=0.2, bandwidth=50e9)   # which ways fit, with what batch, the fastest first

LLMem assumes fp16 weights with an fp32 copy in Gemini's chunks, Adam, and checkpointing of every layer; it counts 6
bytes a logit where torch needs 12. So do not plan a run of train.py with it.

We compare seven choices of its Table 3, and the equations give six of them. For OPT-2.7b on 4 x 16 GB they choose ADP
with room for 9 samples a GPU, where the table has TP and says that 4DP ran out of memory: of 5.3 GB fp16, 10.6 GB fp32
and 21.2 GB states, ADP is said to hold the first whole and a quarter of the rest, 13.3 GB. No m_base up to 7,000 MiB
gives all seven: from 1,150 to 4,250 OPT-2.7b alone is wrong; below 1,150 bloom-3b gets DP+TP; from 4,650 on OPT-2.7b is
right, but bloom-3b no longer fits. With whole=6 (the fp32 copy is whole, too, and only the states are sharded) all
seven are right for m_base from 0 to 2,400 MiB, and at 1,150 so is each "out of memory" of these rows. That is our
reading of the table and not the paper's equation, so it is not the default.

Nothing here was measured on a GPU, neither NCCL's buffers nor speed. tests/test_llmem.py compares with what four CPU
processes hold.
"""

from typing import NamedTuple

MIB = 1 << 20
METHODS = ('CDP', 'ADP', 'TP', 'DP+TP')  # of equals Algorithm 1 takes the first
NCCL = 256 * MIB  # a guess, not measured: channels x 4 MiB (NCCL_BUFFSIZE) a communicator, and its context


# ---- LLMem, as published -----------------------------------------------------------------------------------------


class Model(NamedTuple):
    """What LLMem's equations ask of a model; parameters are counts, not bytes."""

    embedding: int  # parameters of the embeddings (tied with the head or not)
    other: int  # all others; an untied head is one of them
    matrices: int  # those of Embedding and Linear modules alone: LLMem counts no states for biases and norms
    head: int  # parameters of the head, also where it is tied: LLMem counts its fp16 copy apart (lm_p)
    vocabulary: int
    layers: int
    width: int  # of a layer's output
    logit_bytes: int = 2  # 4 for CodeGen and GPT-Neo, which compute them in fp32
    embeddings: int = 2  # outputs kept of embeddings: the official code always records two


def peak(model, how, batch, sequence=512, gpus=1, tp=1, m_base=1150 * MIB, whole=2, cu_p=2 * MIB, cs=16 * MIB,
         B16=2, B32=4):  # fmt: skip
    """Peak bytes of one GPU by LLMem's equations; how: one of METHODS. `batch` is that of one GPU (of all, with TP).

    m_base: CUDA's context and the chunk manager, which the authors measure and no formula gives; 1 to 1.15 GB is
    inferred from their Table 2. cs: parameters of a chunk. cu_p: what allocations are rounded up to. whole: bytes of a
    parameter that ADP and DP+TP hold unsharded: 2 is the paper's (fp16, gathered); for 6 see the top of this file.
    Sums are rounded, where the paper rounds the states tensor by tensor: less than 2 MiB each. Raises ValueError for an
    unknown method, or a tp that does not divide gpus."""
    if how not in METHODS:
        raise ValueError(f'LLMem knows no method {how!r}: use one of {", ".join(METHODS)}.')
    if gpus < 1 or tp < 1 or gpus % tp:
        raise ValueError(f'{gpus} GPUs cannot be cut into groups of tp={tp}: use a tp that divides them.')
    up = lambda n: -(-round(n) // cu_p) * cu_p  # noqa: E731
    bs, sl, dict_n = batch, sequence, model.vocabulary
    parameters = model.embedding + -(-model.other // cs) * cs
    m_p = up(parameters * (B16 + B32))  # the gradients overwrite the fp16 copy
    m_os = up(model.matrices * (B32 + B32))
    m_out = up((model.embeddings + model.layers) * bs * sl * model.width * B16)  # checkpoints; no recomputed layer
    logits = up(bs * sl * dict_n * model.logit_bytes) + 2 * up(bs * (sl - 1) * dict_n * model.logit_bytes)
    m_lm = logits + model.head * B16
    back = lambda n: up(model.layers * bs * sl * model.width * (n - 1) / n * B16)  # noqa: E731  gathered backward
    if how == 'CDP':
        return m_base + m_p + m_os + m_out + m_lm  # (a DDP bucket is not in it)
    if how == 'TP':
        return m_base + (m_p + m_os) // gpus + m_out + m_lm + back(gpus)
    m_whole = up(parameters * whole)
    m_adp = m_base + m_whole + (m_p - m_whole + m_os) // gpus + m_out + m_lm
    # tp/gpus as published. A TP group saves 1 - 1/tp, which is the same for 2 x 2 GPUs but not in general
    return m_adp if how == 'ADP' else m_adp - m_whole * tp // gpus + back(tp)


def decide(model, card, gpus, tp=2, **constants):
    """Algorithm 1: (choice, {method: (largest batch, score)}) for `gpus` cards of `card` bytes; constants: peak's.

    A score is the samples of a step, CDP's times 1.5, since ADP moves 1.5 times its bytes. It contains no time."""
    weight = {'CDP': 1.5 * gpus, 'ADP': gpus, 'TP': 1, 'DP+TP': gpus // tp}
    scores = {}
    for how in METHODS:
        batch = 0
        while peak(model, how, batch + 1, gpus=gpus, tp=tp if how == 'DP+TP' else 1, **constants) <= card:
            batch += 1
        scores[how] = batch, batch * weight[how]
    best = max(METHODS, key=lambda how: scores[how][1])  # max keeps the first of equals
    return (best if scores[best][1] else 'CPU offload'), scores


# ---- as torch does it --------------------------------------------------------------------------------------------

WAYS = {
    'ddp': 'DistributedDataParallel(gradient_as_bucket_view=True)',
    'ddp_copy': 'DistributedDataParallel as it is by default',
    'zero1': 'DistributedDataParallel(gradient_as_bucket_view=True) and ZeroRedundancyOptimizer',
    'zero2': 'fully_shard of each block and of the model, all with reshard_after_forward=False',
    'zero3': 'fully_shard of each block and of the model',
    'tp': 'parallelize_module: Colwise q k v gate up head, Rowwise o down embedding; loss_parallel',
}
PER_SAMPLE = ('activations', 'residual', 'logits')
PARTS = ('weights', 'gradients', 'states', 'layer', 'root', 'head', 'norms', 'temporaries', *PER_SAMPLE)


def block_activations(d, d_k, f, heads, element=2, norms=None):
    """Bytes a token that one block of model.py saves for backward, in the two parts that tensor parallelism treats
    differently: `activations`, which are cut with the heads and inner units, and `residual`, whole on every GPU.

    d: width; d_k: of all keys together; f: inner width; heads; element: bytes of a number. norms: bytes a token of the
    two norms, 8 d + 8 in 16 bits from the fused kernel (input, output, 1/rms), 16 d + 8 from norms written out."""
    # q and attention's output, in memory by token: d each; k, v: d_k; gate, up, what down_proj reads: f
    sharded = element * (2 * d + 2 * d_k + 3 * f) + 4 * heads  # and SDPA's logsumexp, fp32
    return dict(activations=sharded, residual=element * 4 * d + 8 if norms is None else norms)


def cut(parts, tp):
    """The parts that one GPU of a tensor-parallel group holds (parallelize_module, 1-D); the batch is the group's.

    A Colwise matrix keeps 1/tp of its rows, the Rowwise one after it 1/tp of its columns. So the heads, or FFN's inner
    units, and all that is saved for them exist once in the group. A norm needs the whole residual stream: every GPU
    keeps the norms' inputs, outputs and weights. Vocabulary: Rowwise embedding, Colwise head, and the loss of cut
    logits (loss_parallel); without that, add logits x (1 - 1/tp). Not counted: the one (B, T, d) tensor that is being
    all-reduced."""
    held = parts['norms'] / parts['weights']  # the share of weights, gradients and states that is not cut
    out = dict(parts)
    for name in ('weights', 'gradients', 'states', 'layer', 'temporaries'):
        out[name] = parts[name] * (held + (1 - held) / tp)
    for name in ('root', 'head', 'activations', 'logits'):
        out[name] = parts[name] / tp
    return out  # residual and norms: whole


def several_gpus(parts, n, how, tp=1, nccl=NCCL):
    """Bytes of each part on each of n GPUs, and their 'total'. parts: those of one GPU with the batch of one group,

        weights, gradients, states    what stays between steps
        layer, root, head             of the weights: the largest block; all outside of blocks; of these the head
                                      (tied: as much as root)
        norms                         of the weights: what tensor parallelism cannot cut
        activations, residual         saved for backward: of heads and inner units; of norms and the residual stream
        logits, temporaries           of the loss; of the optimizer's step (never alive together)

    how: one of WAYS. With tp > 1 it runs between the n / tp groups, over what `cut` leaves to each GPU of a group; of
    torch's public ways only fully_shard does that, on a 2-D mesh. 'total': what stays, the buffers, and the largest of
    what forward, backward and the optimizer need beside it. That is an upper bound, since the loss's peak comes before
    the gradients. Raises ValueError for an unknown way, a missing part, a tp that does not divide n."""
    if how not in WAYS:
        raise ValueError(f'There is no way {how!r} to use several GPUs: use one of {", ".join(WAYS)}.')
    if missing := [name for name in PARTS if name not in parts]:
        raise ValueError(f'The parts lack {", ".join(missing)}: give their bytes, 0 where there are none.')
    tp = n if how == 'tp' else tp
    if n < 1 or tp < 1 or n % tp:
        raise ValueError(f'{n} GPUs cannot be cut into groups of tp={tp}: use a tp that divides them.')
    p = cut(parts, tp)
    ranks = n // tp  # that repeat a tensor, or share it
    out = {name: p[name] for name in ('weights', 'gradients', 'states', *PER_SAMPLE, 'temporaries')}
    out |= dict(buckets=0, gathered=0, scattered=0, nccl=nccl * ((ranks > 1) + (tp > 1)))  # a communicator for each
    edges = 0  # what forward's first and backward's last moment need, when there are no activations
    if ranks > 1:
        if how == 'ddp_copy':
            # The Reducer's flat buckets hold all gradients and stay, and each .grad is a tensor beside them
            out['buckets'] = p['gradients']
        if how == 'zero1':
            # Whole parameters are dealt out, the largest first, to the rank that has least: 1/ranks, up to one of them.
            # The temporaries shrink alike only if they are of all tensors at once (foreach): whole is an upper bound
            out['states'] = p['states'] / ranks
        if how in ('zero2', 'zero3'):
            for name in ('weights', 'gradients', 'states', 'temporaries'):
                out[name] = p[name] / ranks  # each tensor cut along its first dimension, padded to a multiple
            R, l = p['root'], p['layer']
            grow = p['gradients'] / p['weights'] or 1  # bytes of gradient for one of weights; per-layer updates: 1
            # Backward of a block: the root's weights (gathered in forward, kept to the end), its own, and a buffer for
            # the next block's (prefetch); its whole gradients, the head's, which wait for the rest of the root's, and
            # the packed input of the last reduce-scatter, which is freed when the next one starts.
            out['gathered'] = R + 2 * l
            out['scattered'] = grow * (p['head'] + 2 * l)
            if how == 'zero2':
                # Forward frees nothing: it ends with all weights, a buffer, and one not yet freed. In backward one
                # block has been freed before two are at work.
                out['gathered'] = p['weights'] + 2 * l
                out['scattered'] = max(out['scattered'] - 3 * l, 0)
            # First the root's weights and a block's arrive, each in a buffer and then in place. Last, after the root's
            # weights have gone, there are its gradients and their packed copy
            edges = max(2 * R + 2 * l, grow * 2 * R)
    busy = sum(out[name] for name in (*PER_SAMPLE, 'gathered', 'scattered'))
    kept = sum(out[name] for name in ('weights', 'gradients', 'states', 'buckets', 'nccl'))
    out['total'] = kept + max(busy, edges, out['temporaries'])
    return {name: round(size) for name, size in out.items()}


def choose(parts, card, n, seconds, bandwidth, exchanged=0, ways=tuple(WAYS), tps=(), nccl=NCCL):
    """Which ways fit n cards of `card` bytes, each with its largest batch: a list of dicts, the fastest first.

    parts: several_gpus', of one sample. seconds: forward and backward of a sample on one GPU. bandwidth: bytes a
    second that a GPU sends. exchanged: bytes a sample that tensor parallelism all-reduces, 4 tensors (T, d) a block (2
    forward, 2 backward; 6 with checkpointing). tps: sizes of groups to try with 'zero3', beside 'tp'. -> [] if nothing
    fits.

    The speed is predicted from arithmetic and bytes, as if the two never overlapped: good for an order, not for a time.
    Each dict: way, tp, batch (of a group), samples (of a step), bytes (of a GPU), samples_per_second, reason."""
    if card <= 0 or seconds <= 0 or bandwidth <= 0:
        raise ValueError('A card, seconds or bandwidth of 0 cannot be planned for: give them in bytes and seconds.')
    rows = []
    for how, tp in [(how, n if how == 'tp' else 1) for how in ways] + [('zero3', tp) for tp in tps]:

        def need(batch, how=how, tp=tp):
            scaled = parts | {name: parts[name] * batch for name in PER_SAMPLE}
            return several_gpus(scaled, n, how, tp, nccl)['total']

        if need(1) > card:
            continue
        low, high = 1, 2
        while need(high) <= card and high < 1 << 20:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if need(middle) <= card else (low, middle)
        ranks, p = n // tp, cut(parts, tp)
        W, G, ring = p['weights'], p['gradients'], (ranks - 1) / ranks  # a gather or a scatter sends this much of it
        wire, what = {
            'zero1': (ring * (2 * G + W), 'all-reduce of gradients, broadcast of weights'),
            'zero2': (ring * (G + W), 'weights gathered once, gradients scattered'),
            'zero3': (ring * (G + 2 * W), 'weights gathered twice, gradients scattered'),
        }.get(how, (ring * 2 * G, 'all-reduce of gradients'))
        if tp > 1:
            wire += low * exchanged * 2 * (tp - 1) / tp
            what = (what + ', ' if ranks > 1 else '') + 'all-reduce of activations in each block'
        busy, waits = low * seconds / tp, wire / bandwidth
        rows.append(dict(way=how, tp=tp, batch=low, samples=low * ranks, bytes=need(low)))
        rows[-1]['samples_per_second'] = low * ranks / (busy + waits)
        rows[-1]['reason'] = f'{low * ranks} samples a step: {busy:.3g} s of arithmetic, {waits:.3g} s for {what}'
    return sorted(rows, key=lambda row: -row['samples_per_second'])
