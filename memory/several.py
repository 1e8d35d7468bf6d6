"""
What one of several processes holds at its peak under train.py's parallel = 'fsdp' | 'tp' | 'dp+tp', from the record of
a step of one process (memory/trace.py).

    shape = part_of(shape, tp)                    # a process of a tensor-parallel group computes this smaller LLaMA
    plan = share(config, shape, dtype, plan, n)   # fully_shard among n: what it cuts, and what it gathers beside that

Activations and temporaries are the record's own, moment by moment. Weights, states and gradients are cut, and
fully_shard adds what it gathers and what it has not scattered yet, as memory/llmem.py derives it.
"""

from collections import Counter
from dataclasses import replace

import torch

from memory.cuda import CONTEXT, workspace
from memory.formula import SLACK, SLACK_BYTES, Plan
from memory.llmem import NCCL
from model import LLaMA

CUT = ('weights', 'states', 'bases', 'gradients')  # kinds that are not counted as they are in the record


def part_of(shape, tp):
    """The ModelConfig of what one of tp processes computes: its share of the heads and of the inner units."""
    return replace(
        shape, n_head=shape.n_head // tp, n_kv_head=shape.n_kv_head // tp, n_inner=shape.n_inner // tp,
        head_dim=shape.head_dim,
    )  # fmt: skip


def sizes_of(model):
    """Bytes of the weights of a model (on the meta device, say): a block, all else, the head, the largest matrix."""
    layer = sum(p.nbytes for p in model.layers[0].parameters())
    largest = max(p.nbytes for p in model.layers[0].parameters())
    root = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in model.layers.parameters())
    return dict(layer=layer, root=root, head=model.head.nbytes, matrix=largest)


def moments(chunks):
    """Yield (phase, layer, share of its chunk that is done, Counter of bytes by kind) whenever something was made."""
    alive, now = {}, Counter()
    for c, chunk in enumerate(chunks):
        i = 0
        for done, event in enumerate(chunk.events, 1):
            if event[0] == '-':
                what, size = alive.pop(event[1:])
                now[what] -= size
                continue
            alive[c, i] = event[2], event[1]
            now[event[2]] += event[1]
            i += 1
            yield event[5], chunk.layer, done / len(chunk.events), now


def beside(phase, layer, done, s, n, last, projects, accumulates, copies):
    """Bytes that fully_shard has beside the parts: gathered weights, and whole gradients that wait to be scattered.

    A group's weights arrive in a buffer, which stays until the next one's arrive, and are then put in place. Its
    gradients are packed when it is done, and the packed ones stay until the next group's are. copies: that the backend
    makes of these, 1 for gloo, 0 for NCCL. projects: a layer that is due for a new basis has its gradient gathered."""
    R, l, head = s['root'], s['layer'], s['head']
    if phase == 'forward':
        return 2 * R if layer is None else R + 2 * l + R * (layer == 0)
    if phase == 'loss':
        return R + l + head * (not accumulates)  # else the record has it, as a temporary
    if layer is None:
        return 2 * R + copies * R // n  # gradients and their packed copy, or that and what comes of it
    here = 2 * l + copies * l + 2 * projects * s['matrix'] if done == 1 else done * l + l * (layer < last)
    return R + (2 if layer else 1) * l + head + here  # behind the first block none is fetched


def share(config, shape, dtype, plan, n):
    """The Plan of one of n processes among which fully_shard has cut the model of this shape, that `plan` is of.

    Weights, states and gradients are cut along one side each, and bases are whole on all. NCCL's own buffers are as
    memory/llmem.py guesses them."""
    with torch.device('meta'):
        s = sizes_of(LLaMA(replace(shape), dtype=dtype))
    n_layer, on_cuda = shape.n_layer, plan.context > 0
    accumulates = config.gradient_accumulation_steps > n
    kinds = [Counter(now) for *_, now in moments(plan.peak.chunks)]
    bases, kept = (max(now[kind] for now in kinds) for kind in ('bases', 'gradients'))
    weights, states = plan.weights // n, (plan.states - bases) // n + bases
    best, parts, moment = 0, {}, ''
    for phase, layer, done, now in moments(plan.peak.chunks):
        rest = sum(size for kind, size in now.items() if kind not in CUT)
        if phase in ('setup', 'data'):
            continue
        found = {'activations, logits, temporaries': rest}
        come = 1.0 if accumulates or phase == 'update' else 0.0  # those of earlier micro-batches, or of later blocks
        if not accumulates and phase in ('backward', 'forward again'):
            come = (n_layer - 1 - (layer or 0)) / n_layer
        found['gradients'] = round(kept / n * come)
        if phase != 'update':
            more = beside(phase, layer, done, s, n, n_layer - 1, bool(bases), accumulates, int(not on_cuda))
            found['gathered weights, gradients not yet scattered'] = round(more)
        if sum(found.values()) > best:
            best, parts = sum(found.values()), found
            moment = f'{phase} of layer {layer}' if layer is not None else phase
    total = weights + states + best
    parts |= {'weights': weights, 'optimizer states': states}
    if not on_cuda:
        return Plan(weights, states, total, total, total, parts, moment, context=0)
    allocated = total + 2 * workspace()
    reserved = int(total * (1 + SLACK)) + SLACK_BYTES + 2 * workspace()
    return Plan(weights, states, total, allocated, reserved, parts, moment, context=CONTEXT + NCCL)
