"""
Adam's arithmetic on one tensor, and the thin optimizer around it that every method file inherits.

    M = b1 M + (1 - b1) G          Mh = M / (1 - b1^t)
    V = b2 V + (1 - b2) G * G      Vh = V / (1 - b2^t)
    W = W - lr (Mh / (sqrt(Vh) + eps) + weight_decay W)            Adam (1412.6980), decoupled decay (AdamW, 1711.05101)

What is not in the papers, and why:
- The moments are fp32, or 8 bits in blocks of 256, never bf16: there V * 0.999 rounds back to V, which could only grow.
- A bf16 weight takes its update with stochastic rounding. Late in training an update is smaller than half the distance
  between two bf16 numbers, and rounding to the nearest would lose it every time instead of some of the time.
- per_layer=True updates a weight inside backward, as soon as its gradient is there, and drops the gradient: at no time
  do the gradients of all layers exist. The result is the same.

    optimizer = AdamW(model.parameters(), lr=1e-3)         # drop-in: backward(), step()
"""

import contextlib
import functools
import itertools
import logging
import math
import weakref
import zlib

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

BLOCK = 256  # numbers that share a scale in 8-bit states
BLOCK_4BIT = 64  # numbers that share one in NF4
NF4 = (  # the values of QLoRA's appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
PARTS = '', '_absmax', '_offset', '_outer_absmax'  # what `encode` makes of a tensor, as endings of its name
PIECE = 1 << 24  # numbers updated at once
SMALLEST_8BIT = 4096  # smaller tensors (norms) keep fp32 states, as in bitsandbytes


# ---- pure functions of tensors -----------------------------------------------------------------------------------


def adam_(W, G, state, lr, betas, eps, decay=0.0, state_bits=32, seed=None):
    """The four lines above on an fp32 W, in place: G (W's shape) goes into the moments in `state`, W moves.

    torch's fused kernel passes over memory once where the lines written out take nine passes: six times faster here."""
    state['step'] = state.get('step', 0) + 1
    make_moments(state, G, state_bits)
    M, V = load(state, 'M'), load(state, 'V')
    t = torch.full((), state['step'] - 1.0, device=W.device)  # the kernel counts it up itself
    adamw([W], [G.float().contiguous()], [M], [V], [], [t], fused=True, amsgrad=False, maximize=False,
          lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=decay)  # fmt: skip
    store(state, 'M', M)
    store(state, 'V', V, seed)


def adam_direction(G, state, betas, eps, state_bits=32, seed=None):
    """Take gradient G (any shape) into the moments in `state`, in place, and return Mh / (sqrt(Vh) + eps) in fp32.

    seed: of the random rounding of an 8-bit V; None: to the nearest."""
    N = torch.zeros(G.shape, device=G.device)
    adam_(N, G, state, -1.0, betas, eps, state_bits=state_bits, seed=seed)  # 0 - (-1) direction
    return N


def make_moments(state, G, state_bits):
    """Zero moments for G where there are none: M and V of G's shape, with 8 bits also M_absmax and V_absmax."""
    eight = state_bits == 8 and G.numel() >= SMALLEST_8BIT
    for name in ('M', 'V') if 'M' not in state else ():
        state[name] = torch.zeros(G.shape, dtype=torch.uint8 if eight else torch.float32, device=G.device)
        if eight:
            state[name + '_absmax'] = torch.zeros(-(-G.numel() // BLOCK), device=G.device)


def load(state, name):
    """A tensor of the state as fp32: one kept whole is the state's own, to be changed in place, one kept in 8 bits is
    a decoded copy."""
    if name + '_absmax' not in state:
        return state[name]
    code, absmax = code_of(name, state[name].device), state[name + '_absmax']
    return kernels().dequantize_blockwise(state[name], absmax=absmax, code=code, blocksize=BLOCK)


def store(state, name, changed, seed=None):
    """Quantise a changed copy back to 8 bits, blockwise (8-bit Optimizers, 2110.02861, section 2); else nothing.

    Given a seed it is rounded at random, unlike there: V changes by a thousandth a step and 8 bits tell apart some
    hundredths, so to the nearest it stays where it is (laptop run, 300 steps: loss 0.8 % above that of fp32 states, at
    random 0.35 %). M, which changes by a tenth, needs no such noise."""
    if name + '_absmax' not in state:
        return
    code = code_of(name, changed.device)
    quantised, how = kernels().quantize_blockwise(changed, code=code, blocksize=BLOCK)
    if seed is not None:
        # Noise as wide as the codes lie apart there, decoded as if those distances were the codes; then the nearest.
        apart = torch.cat([code[1:2] - code[:1], (code[2:] - code[:-2]) / 2, code[-1:] - code[-2:-1]])
        apart = kernels().dequantize_blockwise(quantised, absmax=how.absmax, code=apart, blocksize=BLOCK)
        generator = torch.Generator(changed.device).manual_seed(seed)
        noise = torch.rand(changed.shape, generator=generator, device=changed.device).sub_(0.5)
        noisy = noise.mul_(apart).add_(changed).clamp_min_(0)  # V is never negative
        quantised, how = kernels().quantize_blockwise(noisy, code=code, blocksize=BLOCK)
    state[name].copy_(quantised)
    state[name + '_absmax'].copy_(how.absmax)


def pieces(W, G, state):
    """Yield (first row, W, G, state) in views of at most PIECE numbers: the fp32 temporaries of an embedding's update
    are many times its bf16 gradient, and in one piece they were the peak of a 7B's step."""
    if W.numel() <= PIECE:
        yield 0, W, G, state
        return
    rows = max(PIECE // W[0].numel() // BLOCK, 1) * BLOCK  # a multiple of BLOCK, so that no 8-bit block is cut
    per_row = W[0].numel() / BLOCK
    for a in range(0, len(W), rows):
        part = {'step': state['step']}
        for name in state.keys() - {'step'}:
            scale = per_row if name.endswith('_absmax') else 1
            part[name] = state[name][math.floor(a * scale) : math.ceil((a + rows) * scale)]
        yield a, W[a : a + rows], G[a : a + rows], part


@functools.cache  # setLevel drops what all loggers have cached, milliseconds in a process that has many
def kernels():
    """bitsandbytes, imported only where 8 bits are asked for, without its note that it lacks a kernel we do not use."""
    logging.getLogger('bitsandbytes').setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


_codes = {}  # the 256 values of a code, made once a device


def code_of(name, device):
    """The 256 values that 8 bits stand for. Moments: dynamic ones, exact to some per cent over seven decades, for V all
    of them positive. Anything else, such as a basis, whose numbers are of one size: evenly spaced ones."""
    if (name, device) not in _codes:
        make = kernels().create_dynamic_map if name in ('M', 'V') else kernels().create_linear_map
        _codes[name, device] = make(signed=name != 'V').to(device)
    return _codes[name, device]


def encode(A, quantize='nf4', double_quant=False):
    """A (any shape) as named tensors: itself, or NF4 (QLoRA, 2305.14314): 4 bits a number, and an fp32 scale for each
    64 of the flat tensor. double_quant: the scales in 8 bits, around their mean, with an fp32 scale for each 256."""
    if quantize == 'none':
        return {'': A}
    packed, absmax = nf4(A.reshape(-1))  # bitsandbytes 0.50.2 decodes a matrix wrongly whose rows are not whole blocks
    if not double_quant:
        return {'': packed, '_absmax': absmax}
    offset, code = absmax.mean(), code_of('M', A.device)
    scales, outer = kernels().quantize_blockwise(absmax - offset, code=code, blocksize=BLOCK)
    return {'': packed, '_absmax': scales, '_offset': offset, '_outer_absmax': outer.absmax}


def nf4(A):
    """A flat A's codes, two a byte (ceil(n / 2), 1), and the scale of each 64 (ceil(n / 64),), by bitsandbytes."""
    if A.device.type == 'cpu' and A.numel() % BLOCK_4BIT == 0:
        return nf4_on_cpu(A)
    packed, how = kernels().quantize_4bit(A, blocksize=BLOCK_4BIT, quant_type='nf4')
    return packed, how.absmax.float()


def nf4_on_cpu(A):
    """The same, to the bit for finite and normal numbers, without the five temporaries of A's size that bitsandbytes
    makes on a CPU, and in half its time: a number's code is how many of the 15 boundaries between 16 values lie below
    it, counted in the cache."""
    packed = torch.empty(A.numel() // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(A.numel() // BLOCK_4BIT)
    for piece, pairs, scales in zip(A.split(1 << 17), packed.split(1 << 16), absmax.split((1 << 17) // BLOCK_4BIT)):
        blocks = piece.float().view(-1, BLOCK_4BIT)
        torch.amax(blocks.abs(), 1, out=scales)
        blocks = blocks / (scales + (scales == 0))[:, None]
        codes, above = torch.zeros(blocks.shape, dtype=torch.uint8), torch.empty(blocks.shape, dtype=torch.bool)
        for low, high in itertools.pairwise(NF4):
            codes += torch.gt(blocks, (low + high) / 2, out=above).view(torch.uint8)
        codes = codes.view(-1, 2)
        torch.add(codes[:, 1], codes[:, 0], alpha=16, out=pairs[:, 0])  # the first of two in the upper half
    return packed, absmax


def decode(parts, shape, dtype):
    """The tensor that `encode` made the parts of, in a dtype of one's choice."""
    packed, absmax = parts[''], parts.get('_absmax')
    if absmax is None:
        return packed.to(dtype)
    if '_offset' in parts:
        outer, code = parts['_outer_absmax'], code_of('M', packed.device)
        absmax = kernels().dequantize_blockwise(absmax, absmax=outer, code=code, blocksize=BLOCK) + parts['_offset']
    how = kernels().QuantState(absmax, (shape[0] * shape[1],), None, BLOCK_4BIT, 'nf4', dtype)
    return kernels().dequantize_4bit(packed, how).view(shape)


def add_(W, N, lr, decay, seed):
    """W <- (1 - lr decay) W - lr N, in place. Only a bf16 W uses `seed`: it is rounded up or down at random, with the
    odds that make the rounded weight right on average."""
    if W.dtype != torch.bfloat16:
        W.mul_(1 - lr * decay).add_(N, alpha=-lr)
        return
    exact = W.float().mul_(1 - lr * decay).add_(N, alpha=-lr)
    # bf16 is the upper half of fp32: add a random lower half, let it carry into the upper one, and cut it off.
    generator = torch.Generator(W.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, W.shape, generator=generator, dtype=torch.int32, device=W.device)
    exact.view(torch.int32).add_(noise).bitwise_and_(-(1 << 16))
    W.copy_(exact)


def product_dtype(A):
    """What to multiply matrices of A's kind in: a CPU may have no fast bf16."""
    return torch.float32 if A.device.type == 'cpu' else A.dtype


def fast_bf16(device):
    """Does it multiply bf16 in hardware? The two names are x86's; elsewhere fp32 is right, and merely not faster."""
    cpu = torch.cpu.get_capabilities()
    return device.type != 'cpu' or bool(cpu.get('amx_bf16') or cpu.get('avx512_bf16'))


def weakly(method):
    """A hook that calls `method` as long as its object lives. Autograd holds hooks where Python's collector does
    not look: held in earnest, an optimizer and its parameters would never be freed."""
    alive = weakref.WeakMethod(method)

    def hook(*arguments):
        if method := alive():
            method(*arguments)

    return hook


def several_processes():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average_(G):
    """Mean of G over the processes of a data-parallel run, in place; nothing where there is one."""
    if several_processes():
        dist.all_reduce(G)
        G /= dist.get_world_size()
    return G


# ---- weights in few bits -----------------------------------------------------------------------------------------


class Packed(torch.nn.Module):
    """A module whose large tensors are kept encoded, in buffers: 'W' in the buffers W, W_absmax and so on.

    `how` are the arguments of `encode`, `shapes` the tensors' shapes by name."""

    def keep(self, name, A):
        for part, tensor in encode(A, *self.how).items():
            self.register_buffer(name + part, tensor)

    def read(self, name, dtype):
        parts = {part: self._buffers[name + part] for part in PARTS if name + part in self._buffers}
        return decode(parts, self.shapes[name], dtype)

    def forget(self, name):
        for part in PARTS:
            self._buffers.pop(name + part, None)

    def restore(self, tensors):
        """Become what `state_dict()` said, whatever tensors there are now."""
        for name in self.shapes:
            self.forget(name)
        for name, tensor in tensors.items():
            if name in self._parameters:
                p = self._parameters[name]
                p.data = tensor.to(p.device, p.dtype, copy=True)  # of another rank, perhaps
            else:
                self.register_buffer(name, tensor.to(next(self.parameters()).device, copy=True))


# ---- the optimizer -----------------------------------------------------------------------------------------------


class AdamW(torch.optim.Optimizer):
    """AdamW, and what all methods share: per-layer mode, clipping, data parallelism, exact resume.

    params: parameters, or groups of them as in torch. state_bits: 32 or 8. grad_clip: largest global gradient norm, 0
    for none. offload: the moments live in main memory, and on the card only while their parameter is updated: once a
    step, however many micro-batches it has. seed: of the stochastic rounding, which is drawn from (seed, step,
    parameter), so no generator is state. group_defaults: what a method adds to the keys of its groups.

    Before each backward of a step the loop says whether it is the step's last, `optimizer.last_micro_batch`; a loop
    without accumulation need not. `step()` drops the gradients itself. Afterwards `grad_norm` is a 0-dim tensor.

    A method overrides `gradient_ready` (what to do with each micro-batch's gradient), `take` (the gradient of the whole
    step, as small as the method needs it) and `update` (one parameter moves)."""

    small_gradients = False  # True: what waits for clipping's norm is much smaller than the weights

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, state_bits=32, grad_clip=0.0,
                 per_layer=False, offload=False, seed=0, group_defaults=None):  # fmt: skip
        if state_bits not in (32, 8):
            raise ValueError(f'state_bits={state_bits} is not a width of the moments: use 32 or 8')
        if per_layer and grad_clip and not self.small_gradients:
            raise ValueError(
                f'{type(self).__name__} cannot clip with per_layer=True: the norm is known only when all gradients '
                'are, and by then per_layer has used and dropped them; set grad_clip=0 or per_layer=False'
            )
        self.state_bits, self.grad_clip, self.per_layer, self.seed = state_bits, grad_clip, per_layer, seed
        self.home = torch.device('cpu') if offload else None  # of the moments; None: beside their parameter
        self.last_micro_batch = True
        self.grad_norm = None
        self.squares = []  # squared norms of the gradients taken so far in this step
        self.number, self.group_of = {}, {}
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **(group_defaults or {})))

    def add_param_group(self, group):
        super().add_param_group(group)
        for p in self.param_groups[-1]['params']:
            self.number[p], self.group_of[p] = len(self.number), self.param_groups[-1]
            p.register_post_accumulate_grad_hook(weakly(self.gradient_ready))

    @property
    def lr(self):
        return self.param_groups[0]['lr']

    @lr.setter
    def lr(self, lr):
        for group in self.param_groups:
            group['lr'] = lr

    @torch.no_grad()
    def gradient_ready(self, p):
        """Autograd calls this in backward, when p.grad has taken in a micro-batch."""
        if self.per_layer and self.last_micro_batch:
            self.finish(p)

    def finish(self, p):
        """Per-layer mode, p's gradient of this step complete: update now, unless clipping waits for all the norms."""
        if not self.grad_clip:
            with self.moments_at_hand(p):
                self.update(p, self.take(p))

    @contextlib.contextmanager
    def moments_at_hand(self, p):
        """p's moments on p's device, and back home afterwards."""
        state, names = self.state[p], ('M', 'V', 'M_absmax', 'V_absmax')
        at_home = {name: state[name] for name in names if name in state} if self.home else {}
        state.update({name: moment.to(p.device) for name, moment in at_home.items()})
        yield
        for name in names if self.home else ():
            if name in state:
                if name not in at_home:
                    at_home[name] = torch.empty_like(state[name], device=self.home, pin_memory=p.is_cuda)
                state[name] = at_home[name].copy_(state[name])

    def has_gradient(self, p):
        return p.grad is not None

    def take(self, p):
        """The gradient of the whole step, averaged over processes, its norm counted; p lets go of it."""
        G, p.grad = p.grad, None
        return self.count(average_(G))

    def count(self, G):
        if G.dtype == torch.float32 and G.is_contiguous():  # three times faster than vector_norm on a CPU
            self.squares.append(torch.dot(G.view(-1), G.view(-1)))
        else:  # row by row: over a whole embedding at once, sums in fp32 were 0.3 % off
            self.squares.append(torch.linalg.vector_norm(G, dim=-1, dtype=torch.float32).square().sum())
        return G

    def update(self, p, G):
        group, state = self.group_of[p], self.state[p]
        make_moments(state, G, self.state_bits)
        state.setdefault('step', 0)
        for row, W, part_of_G, part in pieces(p, G, state):
            options = dict(betas=group['betas'], eps=group['eps'], state_bits=self.state_bits)
            options['seed'] = self.random_seed(p, part['step'], row)
            if W.dtype == torch.float32 and W.is_contiguous():
                adam_(W, part_of_G, part, group['lr'], decay=group['weight_decay'], **options)
            else:
                self.move(p, W, adam_direction(part_of_G, part, **options), part['step'], row)
        state['step'] = part['step']

    def move(self, p, W, N, step, row=0):
        """W, which is p or some rows of it, takes the step N."""
        group = self.group_of[p]
        add_(W, N, group['lr'], group['weight_decay'], self.random_seed(p, step, row))

    def random_seed(self, p, step, row=0):
        return zlib.crc32(f'{self.seed} {step} {self.number[p]} {row}'.encode())

    @torch.no_grad()
    def step(self, closure=None):
        """One optimizer step, on whatever gradients are still waiting."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        waiting = [p for group in self.param_groups for p in group['params'] if self.has_gradient(p)]
        if self.grad_clip:
            gradients = [self.take(p) for p in waiting]
            norm = torch.stack(self.squares).sum().sqrt()
            keep = (self.grad_clip / (norm + 1e-6)).clamp(max=1.0)  # a tensor: nothing waits for the device
            for p in waiting:
                with self.moments_at_hand(p):
                    self.update(p, gradients.pop(0).mul_(keep))
        else:
            for p in waiting:
                with self.moments_at_hand(p):
                    self.update(p, self.take(p))
        if self.squares:
            self.grad_norm = torch.stack(self.squares).sum().sqrt()
            self.squares = []
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """torch's casts the moments to the parameter's dtype, which would make them bf16; ours keep their own."""
        super().load_state_dict({**state_dict, 'state': {}})
        saved = [i for group in state_dict['param_groups'] for i in group['params']]
        for i, p in zip(saved, (p for group in self.param_groups for p in group['params'])):
            for name, value in state_dict['state'].get(i, {}).items():
                here = self.home if self.home and name[0] in 'MV' else p.device
                self.state[p][name] = value.detach().to(here, copy=True) if torch.is_tensor(value) else value
        self.group_of = {p: group for group in self.param_groups for p in group['params']}


def split_decay(parameters):
    """Two groups: matrices, which decay, and vectors (norms), which do not."""
    parameters = list(parameters)
    return [
        {'params': [p for p in parameters if p.dim() >= 2]},
        {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0},
    ]


def setup(model, config):
    """What train.py calls for method='adamw'."""
    return AdamW(
        split_decay(model.parameters()),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        state_bits=config.state_bits,
        grad_clip=config.grad_clip,
        per_layer=config.per_layer,
        offload=config.offload,
        seed=config.seed,
    )
