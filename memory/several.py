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

from configurator import method_of
from memory.cuda import CONTEXT, workspace
from memory.formula import SLACK, SLACK_BYTES, Plan
from memory.llmem import NCCL
from model import LLaMA

CUT = ('weights', 'states', 'gradients')  # kinds of which a process has its share


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
    """Yield (phase, layer, share of its chunk that is done, Counter of bytes by (kind, is it of a layer)) whenever
    something was made."""
    alive, now = {}, Counter()
    for c, chunk in enumerate(chunks):
        i = 0
        for done, event in enumerate(chunk.events, 1):
            if event[0] == '-':
                what, size = alive.pop(event[1:])
                now[what] -= size
                continue
            what = event[2], chunk.layer is not None
            alive[c, i] = what, event[1]
            now[what] += event[1]
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


def beside_packed(phase, layer, s, n, accumulates, copies):
    """The same where blocks keep encoded weights, whose gathering the record has seen: of all else, in one group.

    What it arrives in stays until the end of forward. Its gradients are scattered when all of backward is done, the
    head's beside the packed ones. Of a frozen group none come."""
    R, come = s['root'], s['trained']
    if phase in ('forward', 'loss'):
        return 2 * R + s['head'] * (phase == 'loss' and come > 0 and not accumulates)
    if layer is None:
        return max(R, 2 * come + copies * come // n + s['head'] * (come > 0))
    return R + s['head'] * (come > 0)


def share(config, shape, dtype, plan, n):
    """The Plan of one of n processes among which fully_shard has cut the model of this shape, that `plan` is of.

    Weights, states and gradients are cut along one side each, and bases are whole on all; of blocks with encoded
    weights `plan` has the pieces, and all else in them is whole. NCCL's own buffers are as memory/llmem.py guesses
    them."""
    with torch.device('meta'):
        s = sizes_of(LLaMA(replace(shape), dtype=dtype))
    on_cuda, packed = plan.context > 0, hasattr(method_of(config), 'linear')
    accumulates, copies, most = config.gradient_accumulation_steps > n, int(not on_cuda), Counter()
    for *_, now in moments(plan.peak.chunks):
        most |= now  # of each kind, the most at any moment

    def cut(kind, now=most):
        return now[kind, False] + (0 if packed else now[kind, True])

    s['trained'], projects = cut('gradients'), most['bases', True] > 0
    best, parts, moment = 0, {}, ''
    for phase, layer, done, now in moments(plan.peak.chunks):
        come = 1.0 if accumulates or phase == 'update' else 0.0  # those of earlier micro-batches, or of later blocks
        if not (accumulates or packed) and phase in ('backward', 'forward again'):
            come = (shape.n_layer - 1 - (layer or 0)) / shape.n_layer
        found = {'activations, logits, temporaries': sum(size for (kind, _), size in now.items() if kind not in CUT)}
        found['gradients'] = round(cut('gradients') / n * come) + packed * now['gradients', True]
        for kind, name in (('weights', 'weights'), ('states', 'optimizer states')):
            gone = 0 if phase == 'setup' else cut(kind, now) * (n - 1) // n  # while it is built, the model is whole
            found[name] = now[kind, True] + now[kind, False] - gone
        if phase not in ('setup', 'update'):
            where = 'forward' if phase == 'data' else phase, layer
            of = (
                (s, n, accumulates, copies)
                if packed
                else (done, s, n, shape.n_layer - 1, projects, accumulates, copies)
            )
            more = (beside_packed if packed else beside)(*where, *of)
            found['gathered weights, gradients not yet scattered'] = round(more)
        if sum(found.values()) > best:
            best, parts = sum(found.values()), found
            moment = f'{phase} of layer {layer}' if layer is not None else phase
    weights, states = plan.weights - cut('weights') * (n - 1) // n, plan.states - cut('states') * (n - 1) // n
    if not on_cuda:
        return Plan(weights, states, best, best, best, parts, moment, context=0, work=plan.work)
    allocated = best + 2 * workspace()
    reserved = int(best * (1 + SLACK)) + SLACK_BYTES + 2 * workspace()
    return Plan(weights, states, best, allocated, reserved, parts, moment, context=CONTEXT + NCCL, work=plan.work)
