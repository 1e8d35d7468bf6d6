"""
A model on several processes, each with a part of it: torch's fully_shard and parallelize_module, applied from outside.

    view = place(model, config, here)       # cut as `parallel` says; view: the same modules, with this process's parts
    optimizer = method.setup(view, config)  # a method sees plain parameters, whose .part says what they are parts of
    whole = gathered(model, optimizer)      # the whole of both on the first process, as one process would have them

'fsdp' cuts every tensor of a block and gathers the block while it computes (FSDP2). 'tp' cuts the blocks' matrices by
heads and by inner units (Megatron, 1909.08053), so that each process computes a part of every layer, on the same batch;
embedding, head and norms are whole. 'dp+tp' does the second in groups of tp_size and the first between the groups.

Weights that a method keeps encoded in buffers (quant.Packed: LoRA's, LoQT's) are no parameters, and fully_shard knows
nothing of them. Under 'fsdp' each process has a piece of every such buffer, which is gathered while a layer reads it,
in forward and again in backward. The factors beside them and the blocks' norms, which are small, are whole everywhere.

An optimizer never meets a DTensor. Where a gradient comes to one, what this process has of it is handed on to the plain
parameter that shares its memory, with the hooks that a method has put there.
"""

from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

import adam
from adam import BLOCK, MOMENTS, read_state, write_state
from plumbing import Stop
from quant import Packed, Pieces

COLUMNS = ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'mlp.gate_proj', 'mlp.up_proj')
ROWS = ('self_attn.o_proj', 'mlp.down_proj')
HEADS = ('n_head', 'n_kv_head', 'n_inner')  # what tp cuts
HALVES = ('before_last', 'last')  # of the model's forward: what CoLM calls
REPLACED = ('forward', *HALVES)  # of a module, by a method or by torch: no part of a copy
# which methods hold on parts of weights
METHODS = {'fsdp': ('adamw', 'galore', 'lora', 'loqt'), 'tp': ('adamw',), 'dp+tp': ('adamw',)}


# ---- before torch's engine starts --------------------------------------------------------------------------------


def divides(shape, n):
    """Can n processes share the heads and the inner units of this ModelConfig?"""
    return not (getattr(shape, 'qk_norm', True) or any(getattr(shape, name) % n for name in HEADS))


def tp_of(config, world):
    """How many processes share a layer's arithmetic, all on the same batch."""
    return {'tp': world, 'dp+tp': getattr(config, 'tp_size', 2)}.get(getattr(config, 'parallel', 'dp'), 1)


def is_cut(config, world):
    return world > 1 and getattr(config, 'parallel', 'dp') in METHODS


def nothing_to_cut(config, world):
    """What to say of a run that is alone, though it was to be cut; else None."""
    if config.parallel in METHODS and world == 1:
        return f"note: parallel='{config.parallel}' cuts nothing, there is one process: torchrun starts more"
    return None


def problems(config, world):
    """One sentence for each key that does not go with `parallel`."""
    c, found = config, []
    if c.parallel not in METHODS:
        return found
    here = f"parallel='{c.parallel}'"
    if c.method not in METHODS[c.parallel]:
        *some, last = METHODS[c.parallel]
        able = f'{", ".join(some)} or {last}' if some else last
        found.append(f"{here} holds parts of the weights, which method='{c.method}' needs whole: use dp, or {able}")
    if c.coreset != 'none' and c.parallel != 'fsdp':
        found.append(f"{here} has no whole gradients to choose by, as coreset='{c.coreset}' does: use fsdp or dp")
    if c.offload and hasattr(c, 'quantize'):
        found.append(f"offload=True moves no pieces of method='{c.method}' to main memory: leave it out, or use dp")
    for key, why in (
        ('per_layer', 'moves weights in backward, where each process knows its own part alone'),
        ('compile', 'compiles a forward in which no weights come and go'),
    ):
        if getattr(c, key):
            found.append(f'{key}=True {why}: leave it out, or use --parallel=dp')
    for key in ('offload_activations', 'offload_embedding', 'mlp_chunk', 'project_tables'):
        if getattr(c, key, False):
            found.append(f'{key}={getattr(c, key)} is of whole weights, and {here} cuts them: use --parallel=dp')
    if getattr(c, 'head_bits', 16) != 16:
        found.append(f'head_bits={c.head_bits} is of a whole head, and {here} cuts it: use --parallel=dp')
    if c.task != 'lm':
        found.append(f"{here} is of our own families, and task='{c.task}' trains transformers' modules: use dp")
    if c.parallel == 'dp+tp' and (c.tp_size < 2 or world % c.tp_size or world == c.tp_size) and world > 1:
        found.append(f'tp_size={c.tp_size} does not cut {world} processes into groups: use a divisor, or --parallel=tp')
    return found


# ---- the model ---------------------------------------------------------------------------------------------------


def place(model, config, here):
    """Cut the model in place, as config.parallel says. -> what the optimizer is made of: `mirror` of this process's
    parts; the model itself where nothing is cut. Raises Stop for a model that cannot be cut."""
    if not is_cut(config, here.world):
        if note := nothing_to_cut(config, here.world):
            here.say(note)
        return model
    if hasattr(model, 'inner'):
        raise Stop(f"parallel='{config.parallel}' is of our own families: use --parallel=dp with transformers' modules")
    tp = here.world // here.readers
    kind = 'cuda' if here.on_cuda else 'cpu'
    mesh = dist.init_device_mesh(kind, (here.readers, tp), mesh_dim_names=('dp', 'tp'))
    if tp > 1:
        cut(model, mesh['tp'])
    if here.readers > 1:
        shard(model, mesh['dp'], config)
    return mirror(model, partial(part_of, as_mean=config.parallel != 'fsdp'), shared=Packed)


def shard(model, mesh, config):
    """fully_shard of each block, and of all else together; of packed blocks the latter alone."""
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    wide = torch.float32 if model.head.dtype != torch.float64 else None  # sums of gradients
    how = {'mesh': mesh, 'mp_policy': MixedPrecisionPolicy(reduce_dtype=wide, cast_forward_inputs=False)}
    if config.offload:
        how['offload_policy'] = CPUOffloadPolicy()
    if config.method == 'galore':
        how['shard_placement_fn'] = unprojected_side(model, mesh.size(), config.proj_type)
    if packed := [module for module in model.modules() if isinstance(module, Packed)]:
        how['ignored_params'] = set(model.layers.parameters())
        for module in packed:
            module.in_pieces(Pieces(mesh.size(), mesh.get_local_rank(), mesh.get_group()))
    else:
        for layer in model.layers:
            fully_shard(layer, **how)
    fully_shard(model, **how)
    for name in HALVES:
        register_fsdp_forward_method(model, name)


def freeze(model, view):
    """What a method trains of the view is trained of the model, and no gradient comes to the rest."""
    for p, q in zip(model.parameters(), view.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)


def unprojected_side(model, n, proj_type):
    """A function parameter -> Shard: a block's matrix is cut along the side on which P does not stand. Then R and the
    moments are parts along it, too, and P is the same on all processes."""
    from torch.distributed.tensor import Shard

    named = [(name, p) for name, p in model.layers.named_parameters() if p.dim() == 2 and proj_type != 'right']
    wide = {id(p): name for name, p in named if p.shape[0] < p.shape[1] + (proj_type == 'paper')}
    uneven = next((name for id_, name in wide.items() if model.layers.get_parameter(name).shape[1] % n), None)
    if uneven:
        raise Stop(f"{uneven} has columns that {n} processes cannot share evenly: use --parallel=dp, or method='adamw'")
    return lambda p: Shard(1) if id(p) in wide else Shard(0)


def cut(model, mesh):
    """Each block's matrices in parts, by heads and by inner units (parallelize_module)."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    c, n = model.config, mesh.size()
    for name in HEADS:
        if getattr(c, name) % n:
            raise Stop(f'{name}={getattr(c, name)} cannot be shared by {n} processes: use --parallel=fsdp')
    if c.qk_norm:
        raise Stop('the norms of heads are shared by all of them, which tp takes apart: use --parallel=fsdp')
    for layer in model.layers:
        plan = {name: ColwiseParallel() for name in COLUMNS} | {name: RowwiseParallel() for name in ROWS}
        parallelize_module(layer, mesh, plan)


class Part:
    """What of a tensor this process holds.

    shape: the whole one's. slices: where the part is in it. copies: how many processes hold this very part. as_mean: is
    its gradient the mean over processes when it comes, or has the optimizer to average it."""

    def __init__(self, p, as_mean=True):
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        self.shape, self.mesh, self.placements, self.copies = p.shape, None, None, dist.get_world_size()
        self.as_mean = as_mean or isinstance(p, DTensor)
        local, first = p.shape, [0] * p.dim()
        if isinstance(p, DTensor):
            self.mesh, self.placements = p.device_mesh, p.placements
            self.copies //= self.mesh.size()
            local, first = compute_local_shape_and_global_offset(p.shape, self.mesh, self.placements)
        self.slices = tuple(slice(a, a + n) for a, n in zip(first, local))
        self.salt = ' '.join(str(s.start) for s in self.slices if s.start)  # of what is drawn at random for it

    def whole(self, local, dim=None):
        """The whole tensor of which each process has `local`, on all of them: cut as p is, or along `dim` alone."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if self.mesh is None:
            return local
        placements, shape = self.placements, list(self.shape)
        if dim is not None:
            placements = [Shard(dim)]
            shape = list(local.shape)
            shape[dim] = self.shape[self.placements[0].dim]
        shape, stride = torch.Size(shape), torch.empty(shape, device='meta').stride()
        local = local.contiguous()
        found = DTensor.from_local(local, self.mesh, placements, run_check=False, shape=shape, stride=stride)
        if len(placements) > 1:  # undone in the order in which it was done, or torch warns
            found = found.redistribute(placements=[Replicate(), placements[1]])
        return found.full_tensor()

    def sum_(self, x):
        """The sum of x over all processes; of one in main memory, too, where NCCL knows cards alone."""
        there = x.cuda() if dist.get_backend() == 'nccl' else x
        dist.all_reduce(there)
        return there.to(x.device)


def part_of(p, as_mean):
    """A plain parameter in the memory of what this process has of p; its gradient is handed on to it."""
    from torch.distributed.tensor import DTensor

    q = nn.Parameter(p.to_local().detach(), p.requires_grad) if isinstance(p, DTensor) else p
    q.part = Part(p, as_mean)
    if q is not p and p.requires_grad:
        p.register_post_accumulate_grad_hook(lambda p: hand_on(p, q))
    return q


@torch.no_grad()
def hand_on(p, q):
    """What has come to p goes to q, and calls q's hooks as autograd does."""
    G, p.grad = p.grad.to_local(), None
    G = G.clone() if G.dim() < 2 else G  # else a norm's, kept, would keep the buffer of its whole block's
    for hook in list((q._backward_hooks or {}).values()):
        hook(G)
    q.grad = G if q.grad is None else q.grad.add_(G)
    for hook in list((getattr(q, '_post_accumulate_grad_hooks', None) or {}).values()):
        hook(q)


def cut_from(part, tensor):
    """What of a state's whole tensor belongs to a part: of the weight's shape, or (r, n) of a projected one."""
    if tensor.shape == part.shape:
        return tensor[part.slices]
    return tensor[:, part.slices[part.placements[0].dim]]


def gathered(model, optimizer, here):
    """-> the whole model, and what has the whole optimizer's state_dict(), both in main memory, on the first process,
    as if it were alone. All processes must call it. Where nothing is cut: the two as they are."""
    if not any(hasattr(p, 'part') for p in model.parameters()):
        return model, optimizer

    @torch.no_grad()
    def whole(p):
        found = p.part.whole(p.detach())
        return nn.Parameter(found.cpu(), p.requires_grad) if here.rank == 0 else p

    found = mirror(model, whole)
    for module in found.modules():
        module._buffers, pieces = {}, module._buffers
        for name, b in pieces.items():
            b = module.whole_of(b) if isinstance(module, Packed) else b
            if here.rank == 0:
                module._buffers[name] = None if b is None else b.cpu()
        if isinstance(module, Packed):
            module.pieces = None
    states = optimizer and whole_states(optimizer, here)
    if states and 'layers' in states:
        states['layers'] = [dict(module.state_dict()) for module in found.modules() if isinstance(module, Packed)]
    return found, SimpleNamespace(state_dict=lambda: states)


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group['params']]


def projected(optimizer, p):
    return hasattr(optimizer, 'is_projected') and optimizer.is_projected(p)


def whole_states(optimizer, here):
    """The optimizer's state_dict with whole moments. Those in 8 bits are kept as the parts that they are, a list in
    `parts`: blocks of 256 numbers end elsewhere in a whole, so that only the parts go on bit for bit."""
    found = optimizer.state_dict()
    for i, p in enumerate(parameters_of(optimizer)):
        state = found['state'].get(i)
        moments = {name: state[name] for name in state or () if name in MOMENTS}
        if not moments or p.part.mesh is None:
            continue
        if 'M_absmax' in moments:
            mine = {'at': [[s.start, s.stop] for s in p.part.slices]} | {n: t.cpu() for n, t in moments.items()}
            parts = [None] * here.world
            dist.gather_object(mine, parts if here.rank == 0 else None)
            rest = {name: value for name, value in state.items() if name not in MOMENTS}
            found['state'][i] = rest | {'of': [*p.part.shape, projected(optimizer, p)], 'parts': parts}
            continue
        for name, M in moments.items():
            whole = p.part.whole(M.to(p.device), 1 if projected(optimizer, p) else None)
            moments[name] = whole.cpu() if here.rank == 0 else None
        found['state'][i] = state | moments
    return found


def spread(saved, optimizer):
    """A saved state_dict, of any number of processes, with what of the moments this process holds."""
    states = dict(saved['state'])
    for i, p in enumerate(parameters_of(optimizer)):
        state, part = dict(states.get(i, {})), getattr(p, 'part', None)
        if 'parts' not in state and (part is None or part.mesh is None):
            continue
        of, parts = state.pop('of', None), state.pop('parts', None)
        at = part and [[s.start, s.stop] for s in part.slices]
        if parts and (same := [piece for piece in parts if piece['at'] == at]):
            states[i] = state | {name: tensor for name, tensor in same[0].items() if name != 'at'}
            continue
        moments = joined(parts, *of) if parts else {n: read_state(state, n) for n in ('M', 'V') if n in state}
        eight = optimizer.state_bits == 8 and (parts or 'M_absmax' in state)
        state = {name: value for name, value in state.items() if name not in MOMENTS}
        states[i] = state | encoded({n: cut_from(part, M) if part else M for n, M in moments.items()}, eight)
    return saved | {'state': states}


def joined(parts, *of):
    """The whole moments, decoded, of a list of parts; of: the weight's shape, and whether they are (r, n) of it."""
    *shape, projected = of
    found = {}
    for piece in parts:
        for name in ('M', 'V'):
            if name not in piece:
                continue
            M, at = read_state(piece, name), [slice(*one) for one in piece['at']]
            size = shape
            if projected:  # (r, n), along the side that is cut
                cut = [i for i in range(2) if at[i] != slice(0, shape[i])]
                size = [len(M), shape[cut[0]] if cut else M.shape[1]]
                at = [slice(None), at[cut[0]] if cut else slice(None)]
            if name not in found:
                found[name] = torch.zeros(size)
            found[name][tuple(at)] = M
    return found


def encoded(moments, eight):
    """Moments as a state keeps them: in 8 bits, if those were and they are not too small."""
    state = {}
    for name, M in moments.items():
        if not eight or M.numel() < adam.SMALLEST_8BIT:
            state[name] = M
            continue
        both = dict.fromkeys(moments) | {name: torch.zeros(M.shape, dtype=torch.uint8)}
        both[name + '_absmax'] = torch.zeros(-(-M.numel() // BLOCK))
        write_state(both, name, M.contiguous())
        state |= {n: both[n] for n in (name, name + '_absmax')}
    return state


def mirror(model, replace, shared=()):
    """The same tree of modules, without the hooks of torch's engines, with replace(p) in the place of each parameter p,
    once for each. Modules of the class `shared` are the same, those whose own forward a method steers; of others all
    tensors but the parameters are."""
    from torch.distributed.fsdp import FSDPModule

    made = {}

    def once(p):
        if p is not None and id(p) not in made:
            made[id(p)] = replace(p)
        return None if p is None else made[id(p)]

    def copied(module):
        if isinstance(module, shared):
            for p in module.parameters():
                once(p)
            return module
        kind = type(module)
        new = object.__new__(kind.__mro__[2] if isinstance(module, FSDPModule) else kind)
        new.__dict__.update({name: value for name, value in vars(module).items() if name not in REPLACED})
        for name in vars(module):
            if name.endswith('_hooks') or name.endswith('_hooks_with_kwargs'):
                new.__dict__[name] = type(vars(module)[name])()
        new._parameters = {name: once(p) for name, p in module._parameters.items()}
        new._modules = {name: child and copied(child) for name, child in module._modules.items()}
        return new

    return copied(model)
