"""
Adam's arithmetic on one tensor, and the thin optimizer around it that every method file inherits.

    M = b1 M + (1 - b1) G          Mh = M / (1 - b1^t)
    V = b2 V + (1 - b2) G * G      Vh = V / (1 - b2^t)
    W = W - lr (Mh / (sqrt(Vh) + eps) + weight_decay W)            Adam (1412.6980), decoupled decay (AdamW, 1711.05101)

What is not in the papers, and why:
- The moments are fp32, or 8 bits in blocks of 256, never bf16: there V * 0.999 rounds back to V, which could only grow.
- A bf16 weight takes its update with stochastic rounding. Late in training an update is smaller than half the distance
  between two bf16 numbers, and rounding to the nearest would lose it every time instead of some of the time.
- Micro-batches are summed in a bf16 gradient with the same rounding, for the same reason: of 512 equal ones the sum to
  the nearest holds three quarters.
- per_layer=True updates a weight inside backward, as soon as its gradient is complete, and drops the gradient: the
  gradients of all layers never exist at once. The result is the same.
- In several processes a gradient travels as soon as it is complete, in buckets, while backward goes on. When backward
  ends, each has the mean, as torch's DistributedDataParallel leaves it.
- What a backward leaves behind counts from `step()` on. A batch whose step a loop does not take, because its loss was
  not finite, leaves no trace, whoever drops its gradients: either zero_grad, or, where they are not finite, nobody.
  per_layer has moved the weights by then: it leaves out those whose gradient was not finite.

    optimizer = AdamW(model.parameters(), lr=1e-3)         # drop-in: backward(), step()
    python train.py config/adamw_laptop.py                 # in train.py
"""

import contextlib
import difflib
import functools
import gc
import logging
import math
import weakref
import zlib

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensor
from torch.optim.adamw import adamw

BLOCK = 256  # numbers that share a scale in 8-bit moments
PIECE = 1 << 24  # numbers updated at once
BUCKET = 25 << 20, 1 << 20  # bytes of gradients that travel together; under per_layer, where they are not to gather
SENT = [0.0]  # bytes that this process sent to others, until an optimizer's step tells and begins anew
CUT = {torch.bfloat16: 16, torch.float16: 13}  # bits that a half has less than fp32
SMALLEST_8BIT = 4096  # smaller tensors (norms) keep fp32 moments, as in bitsandbytes
WATCHING = weakref.WeakValueDictionary()  # id of a tensor -> the optimizer that watched it last: who has its gradient
MOMENTS = ('M', 'V', 'M_absmax', 'V_absmax')
# What torch puts into a group and nothing here reads: its schedulers, names of parameters.
FOREIGN = ('params', 'param_names', 'initial_lr', 'max_lr', 'min_lr', 'base_momentum', 'max_momentum', 'differentiable')


# ---- pure functions of tensors -----------------------------------------------------------------------------------


def adam_(W, G, state, lr, betas, eps, decay=0.0, state_bits=32, seed=None):
    """The four lines above on an fp32 W, in place: G (W's shape) goes into the moments in `state`, W moves.

    state['fill'] is t, the gradients that the moments have taken in. state['skip'], where there is one: 1.0 on the
    device lets everything stay as it is. torch's fused kernel passes over memory once where the lines written out take
    nine passes: six times faster here."""
    state['fill'] = state.get('fill', 0) + 1
    make_moments(state, G, state_bits)
    M, V = read_state(state, 'M'), read_state(state, 'V')
    t = torch.full((), state['fill'] - 1.0, device=W.device)  # the kernel counts it up itself
    adamw([W], [G.to(M.dtype).contiguous()], [M], [V], [], [t], fused=True, amsgrad=False, maximize=False,
          lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=decay, found_inf=state.get('skip'))  # fmt: skip
    write_state(state, 'M', M)
    write_state(state, 'V', V, seed)


def adam_direction(G, state, betas, eps, state_bits=32, seed=None):
    """Take gradient G (any shape) into the moments in `state`, in place, and return Mh / (sqrt(Vh) + eps), in fp32 (of
    a G in fp64, in fp64).

    seed: of the stochastic rounding of an 8-bit V; None: round to the nearest."""
    N = torch.zeros(G.shape, dtype=at_least_fp32(G), device=G.device)
    adam_(N, G, state, -1.0, betas, eps, state_bits=state_bits, seed=seed)  # 0 - (-1) direction
    return N


def make_moments(state, G, state_bits, names=('M', 'V')):
    """Zero moments for G where there are none: M and V of G's shape, with 8 bits also M_absmax and V_absmax."""
    eight = state_bits == 8 and G.numel() >= SMALLEST_8BIT
    for name in names if 'M' not in state else ():
        state[name] = torch.zeros(G.shape, dtype=torch.uint8 if eight else at_least_fp32(G), device=G.device)
        if eight:
            state[name + '_absmax'] = torch.zeros(-(-G.numel() // BLOCK), device=G.device)


def read_state(state, name):
    """A tensor of the state: the state's own, to be changed in place, or, of one in 8 bits, a decoded copy in fp32."""
    if name + '_absmax' not in state:
        return state[name]
    code, absmax = code_of(name if 'V' in state else 'P', state[name].device), state[name + '_absmax']
    return kernels().dequantize_blockwise(state[name], absmax=absmax, code=code, blocksize=BLOCK)


def write_state(state, name, changed, seed=None):
    """Quantise a changed copy back to 8 bits, blockwise (8-bit Optimizers, 2110.02861, section 2); else do nothing.

    Given a seed, the rounding is stochastic, unlike there: V changes by a thousandth a step, and neighbouring 8-bit
    codes differ by some hundredths, so rounding to the nearest would freeze it (laptop run, 300 steps: loss 0.8 % above
    that of fp32 moments, with stochastic rounding 0.35 %). M changes by a tenth a step and needs no such noise."""
    if name + '_absmax' not in state:
        return
    code = code_of(name if 'V' in state else 'P', changed.device)
    quantised, how = kernels().quantize_blockwise(changed, code=code, blocksize=BLOCK)
    if seed is not None:
        # Noise as wide as the distance between neighbouring codes at each number: look the distances up as if they
        # were the codes, add the noise, and round to the nearest.
        apart = torch.cat([code[1:2] - code[:1], (code[2:] - code[:-2]) / 2, code[-1:] - code[-2:-1]])
        apart = kernels().dequantize_blockwise(quantised, absmax=how.absmax, code=apart, blocksize=BLOCK)
        generator = torch.Generator(changed.device).manual_seed(seed)
        noise = torch.rand(changed.shape, generator=generator, device=changed.device).sub_(0.5)
        noisy = noise.mul_(apart).add_(changed).clamp_min_(0)  # V is never negative
        quantised, how = kernels().quantize_blockwise(noisy, code=code, blocksize=BLOCK)
    for part, new in ((name, quantised), (name + '_absmax', how.absmax)):
        state[part].copy_(torch.where(state['skip'] > 0, state[part], new) if 'skip' in state else new)


def heavy_ball(state, G, keep, state_bits=32):
    """M <- keep M + G, a momentum without a V. -> M, or a decoded copy, not to be changed. It is of methods for which
    M's direction alone counts, so it needs no factor 1 - keep and no bias correction. state['skip'] is as in `adam_`;
    G is of zeros then."""
    make_moments(state, G, state_bits, ('M',))
    M = read_state(state, 'M')
    M.mul_(torch.where(state['skip'] > 0, 1.0, keep) if 'skip' in state else keep).add_(G)
    write_state(state, 'M', M)
    return M


def pieces(W, G, state):
    """Yield (first row, W, G, state) in views of at most PIECE numbers. In one piece, the fp32 temporaries of an
    embedding's update, many times its bf16 gradient, were the peak of a 7B's step."""
    if W.numel() <= PIECE:
        yield 0, W, G, state
        return
    rows = max(PIECE // W[0].numel() // BLOCK, 1) * BLOCK  # a multiple of BLOCK, so that no 8-bit block is cut
    per_row = W[0].numel() / BLOCK
    for a in range(0, len(W), rows):
        part = {name: state[name] for name in ('fill', 'skip') if name in state}
        for name in state.keys() & set(MOMENTS):
            scale = per_row if name.endswith('_absmax') else 1
            part[name] = state[name][math.floor(a * scale) : math.ceil((a + rows) * scale)]
        yield a, W[a : a + rows], G[a : a + rows], part


@functools.cache  # setLevel empties the caches of all loggers, which takes milliseconds in a process that has many
def kernels():
    """bitsandbytes, imported only where few bits are asked for, without its warning about a kernel not used here."""
    logging.getLogger('bitsandbytes').setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


_codes = {}  # the 256 values of a code, made once a device


def code_of(name, device):
    """The 256 values that 8 bits stand for. For moments they are dynamic, within some per cent over seven decades, and
    for V all positive. For anything else they are evenly spaced: a basis, whose numbers are of one size, or an M
    without a V that would be divided by small ones (8-bit Muon, 2509.23106): 2.2 % off where dynamic is 3.5 %."""
    if (name, device) not in _codes:
        make = kernels().create_dynamic_map if name in ('M', 'V') else kernels().create_linear_map
        _codes[name, device] = make(signed=name != 'V').to(device)
    return _codes[name, device]


def add_(W, N, lr, decay, seed):
    """W <- (1 - lr decay) W - lr N, in place. decay: a number, or a 0-dim tensor. Only a W in bf16 or fp16 uses `seed`,
    for stochastic rounding."""
    if W.dtype not in CUT:
        W.mul_(1 - lr * decay).add_(N, alpha=-lr)
        return
    round_into(W, W.float().mul_(1 - lr * decay).add_(N, alpha=-lr), seed)


def round_into(W, exact, seed):
    """W (bf16 or fp16) <- exact (fp32, which is used up), rounded up or down at random, with the odds that make it
    right on average; in fp16, numbers below 6e-5 to the nearest."""
    # bf16 is the upper half of fp32: add a random lower half, let it carry into the upper one, and cut it off.
    generator, cut = torch.Generator(W.device).manual_seed(seed), CUT[W.dtype]
    noise = torch.randint(0, 1 << cut, W.shape, generator=generator, dtype=torch.int32, device=W.device)
    exact.view(torch.int32).add_(noise).bitwise_and_(-(1 << cut))
    W.copy_(exact)


def add_up_(total, G, seed):
    """total + G, a sum of micro-batches, in place; rounded at random where it is in bf16 or fp16."""
    if total.dtype not in CUT:
        return total.add_(G)
    rows = max((1 << 22) // max(total[:1].numel(), 1), 1) if total.dim() else 1
    for i, (A, B) in enumerate(zip(torch.atleast_1d(total).split(rows), torch.atleast_1d(G).split(rows))):
        round_into(A, A.float().add_(B), seed + i)
    return total


def is_finite(A):
    """Is all of A finite? A 0-dim bool, made without a temporary of A's size."""
    return A.sum(dtype=torch.promote_types(A.dtype, torch.float32)).isfinite()


def zero_unless_(good, A):
    """A, in place, becomes zeros where the 0-dim `good` is False: a branch that does not wait for the device."""
    return A.nan_to_num_(0.0, 0.0, 0.0).mul_(good)


def limit_growth(update, state, most=1.01):
    """The update, scaled down where its norm is more than `most` times the last one's (Fira, 2410.01623, section 4.3;
    APOLLO): without a second moment of its own, one odd batch could throw the weights far off. state['norm']: the last
    norm."""
    norm = update.norm()
    last = state.get('norm', norm)
    keep = torch.where((last > 0) & (norm > most * last), most * last / norm, 1.0)
    state['norm'] = torch.where(state['skip'] > 0, last, norm * keep) if 'skip' in state else norm * keep
    return update.mul_(keep)


def at_least_fp32(A):
    return torch.promote_types(A.dtype, torch.float32)


def product_dtype(A):
    """The dtype to multiply matrices like A in: a CPU may have no fast bf16."""
    return at_least_fp32(A) if A.device.type == 'cpu' else A.dtype


def fast_bf16(device):
    """Does the device multiply bf16 in hardware? The two names are x86's; on another CPU the answer is no, which is
    correct and at worst slow."""
    cpu = torch.cpu.get_capabilities()
    return device.type != 'cpu' or bool(cpu.get('amx_bf16') or cpu.get('avx512_bf16'))


def weak_hook(method, tensor):
    """A hook that calls method(tensor) while the method's optimizer lives, and is the last that watches the tensor.

    Autograd stores hooks in C++, invisible to Python's garbage collector. A strong reference here would keep the
    optimizer and its parameters alive forever."""
    alive, of = weakref.WeakMethod(method), weakref.ref(tensor)
    WATCHING[id(tensor)] = method.__self__

    def hook(_):
        method = alive()
        if method and WATCHING.get(id(of())) is method.__self__:
            method(of())

    hook.__torch_unserializable__ = True  # torch.save need not warn that it leaves the hook out
    return hook


def exactly(method):
    """A function that runs without a graph, and outside of an autocast that its caller is in."""

    @functools.wraps(method)
    def wrapped(*arguments):
        inside = [kind for kind in ('cpu', 'cuda') if torch.is_autocast_enabled(kind)]
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for kind in inside:
                stack.enter_context(torch.autocast(kind, enabled=False))
            found = method(*arguments)
        if inside:
            torch.clear_autocast_cache()  # it holds weights from before they moved
        return found

    return wrapped


def several_processes():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def in_ddp(p):
    """Does torch's DistributedDataParallel wait for the gradient of p?"""
    everything = gc.get_objects() if dist.is_available() and dist.is_initialized() else ()
    wrappers = [found for found in everything if issubclass(type(found), torch.nn.parallel.DistributedDataParallel)]
    return any(p is q for wrapper in wrappers for q in wrapper.parameters())


def travel(how, A, *owner, wait=True):
    """A collective of torch.distributed on A, in place; its bytes are counted as in a ring, where each process sends
    the (N - 1) / N-th part of A, in an all_reduce twice. -> what to wait for, unless `wait` does."""
    share, tensors = 1 - 1 / dist.get_world_size(), A if how is together else [A]
    SENT[0] += sum(A.nbytes for A in tensors) * share * (2 if how in (dist.all_reduce, together) else 1)
    return how(A, *owner, async_op=not wait)


def together(tensors, async_op):
    """The all_reduce of tensors of one kind as one message. A card needs no copy of them for that, as a bucket would
    be; gloo makes one."""
    if isinstance(tensors[0], FakeTensor):  # of a plan, for which torch knows single ones alone
        return [dist.all_reduce(A, async_op=True) for A in tensors][-1]
    return dist.group.WORLD.allreduce_coalesced(tensors, dist.AllreduceCoalescedOptions())


def hand_out_(A, owner=0):
    """A becomes that of process `owner`, so that rounding does not set the processes apart; alone, nothing."""
    if several_processes():
        travel(dist.broadcast, A, owner)
    return A


def average_(G):
    """Mean of G over the processes of a data-parallel run, in place; nothing where there is one."""
    if several_processes():
        travel(dist.all_reduce, G)
        G /= dist.get_world_size()
    return G


# ---- the optimizer -----------------------------------------------------------------------------------------------


class AdamW(torch.optim.Optimizer):
    """AdamW, and what all methods share: per-layer mode, clipping, data parallelism, exact resume.

    params: parameters, or groups of them as in torch; a group may also say lr_scale, a factor on the learning rate.
    state_bits: 32 or 8, of the moments. grad_clip: largest global gradient norm, 0 for none. offload: the moments live
    in main memory, and on the card only while their parameter is updated: once a step, however many micro-batches it
    has. seed: of the stochastic rounding, which is drawn from (seed, step, parameter), so no generator is state.
    group_defaults: what a method adds to the keys of its groups. Raises ValueError for what cannot be.

    Before each backward of a step the loop says whether it is the step's last, `optimizer.last_micro_batch`; a loop
    without accumulation need not. `step()` drops the gradients itself, and leaves in `metrics` what a log may show,
    0-dim tensors by name, grad_norm first.

    state[p]['step'] counts p's steps since the start and never goes back; ['fill'] counts the gradients in its moments,
    for Adam's bias correction, and starts again where a method resets them.

    A method overrides `update` (one parameter moves), and, if it keeps something smaller than the gradient,
    `gradient_ready` (what to do with each micro-batch's), `take_gradient` (that of the whole step) and `own_gradient`
    (what the processes average of it). In several processes `metrics` says how many bytes each sent since the last
    step, bytes_sent."""

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
        self.last_micro_batch, self.metrics = True, {}
        self.squares = {}  # p -> squared norm of its gradient, of those taken so far in this step
        self.sums, self.counts = {}, {}  # p -> the sum of its gradients while the next arrives; how many are in it
        self.complete, self.sound = set(), {}  # those whose last micro-batch came, but no step; is their sum finite
        self.flagged, self.wrapped = False, None  # does the loop set last_micro_batch; is there a DDP, once looked for
        self.gathered, self.flying, self.shared = [], [], []  # on their way to the other processes, see `exchange`
        self.means, self.task = set(), None  # p whose gradient is the mean of all; the backward that will wait
        self.index_of, self.group_of, self.watched, self.weight_of = {}, {}, [], {}
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, lr_scale=1.0)
        super().__init__(params, defaults | (group_defaults or {}))

    def update(self, p, G):
        """The four lines at the top of this file, for p and its gradient G of the whole step."""
        group, state = self.group_of[p], self.state[p]
        make_moments(state, G, self.state_bits)
        state.setdefault('fill', 0)
        lr, step = self.rate(p), state['step']
        for row, W, part_of_G, part in pieces(p, G, state):
            options = dict(betas=group['betas'], eps=group['eps'], state_bits=self.state_bits)
            options['seed'] = self.random_seed(p, step, row)
            if W.dtype == torch.float32 and W.is_contiguous():
                adam_(W, part_of_G, part, lr, decay=group['weight_decay'], **options)
            else:
                self.move(p, W, adam_direction(part_of_G, part, **options), row)
        state['fill'] = part['fill']

    def move(self, p, W, N, row=0):
        """W, which is p or its rows from `row` on, takes the step N."""
        seed = self.random_seed(p, self.state[p]['step'] + 1, row)
        add_(W, N, self.rate(p), self.decay(p), seed)

    # ---- learning rate, groups

    @property
    def lr(self):
        return self.param_groups[0]['lr']

    @lr.setter
    def lr(self, lr):
        for group in self.param_groups:
            group['lr'] = lr

    def rate(self, p):
        """The learning rate of p's next step."""
        return self.group_of[p]['lr'] * self.group_of[p]['lr_scale']

    def scale_rate(self, parameters, factor):
        """Let these parameters learn `factor` times as fast, in groups of their own. ValueError if it trains none."""
        chosen = {id(p) for p in parameters}
        if not any(id(p) in chosen for group in self.param_groups for p in group['params']):
            raise ValueError('there is nothing to scale the rate of: none of these parameters is trained here')
        for group in list(self.param_groups):
            mine = [p for p in group['params'] if id(p) in chosen]
            if not mine:
                continue
            apart = {**group, 'params': mine, 'lr_scale': factor * group['lr_scale']}
            group['params'] = [p for p in group['params'] if id(p) not in chosen]
            self.param_groups.append(apart)
            self.group_of.update(dict.fromkeys(mine, apart))
        self.param_groups[:] = [group for group in self.param_groups if group['params']]

    def decay(self, p):
        """The weight decay of p's next step: none in one that is skipped."""
        decay, skip = self.group_of[p]['weight_decay'], self.state[p].get('skip')
        return decay if skip is None or not decay else torch.where(skip > 0, 0.0, decay).double()

    def add_param_group(self, group):
        for key in group.keys() - self.defaults.keys() - set(FOREIGN):
            near = difflib.get_close_matches(key, self.defaults, 1)
            hint = f', did you mean {near[0]!r}?' if near else f': use some of {", ".join(self.defaults)}'
            raise ValueError(f'{type(self).__name__} knows no key {key!r} of a group{hint}')
        super().add_param_group(group)
        for p in self.param_groups[-1]['params']:
            if not p.is_floating_point() or type(p).__name__ in ('DTensor', 'FlatParameter'):
                self.param_groups.pop()
                what = f'parts of {type(p).__name__}s' if p.is_floating_point() else p.dtype
                raise ValueError(f'{type(self).__name__} trains whole, real parameters, not {what}: leave them out')
        for p in self.param_groups[-1]['params']:
            self.index_of[p], self.group_of[p] = len(self.index_of), self.param_groups[-1]
            self.watch(p)

    def watch(self, q):
        """Hook q: a parameter, or what receives a gradient for self.weight_of[q]."""
        if q.requires_grad:  # of a frozen one no gradient will come; if it thaws, step() finds what is in .grad
            q.register_hook(weak_hook(self.gradient_comes, q))
            q.register_post_accumulate_grad_hook(weak_hook(self.gradient_came, q))
            self.watched.append(q)

    # ---- from gradients to steps

    @exactly
    def gradient_comes(self, q):
        """Autograd calls this in backward, before q.grad takes in a micro-batch."""
        p = self.weight_of.get(q, q)
        if p.grad is None:  # the first one of a step
            self.begin(p)
        elif p in self.complete and q.grad is not None:  # of a step that was not taken, or of a loop without the flag
            self.drop_if_not_finite(p, q.grad)
        if q.grad is not None and q.dtype in CUT:
            self.sums[p], q.grad = q.grad, None

    def drop_if_not_finite(self, p, total):
        """`total` holds p's gradients of a whole step, and more of them come."""
        self.sound[p] = is_finite(total)
        zero_unless_(self.sound[p], total)
        if self.flagged:  # the step was not taken, and the rounding of the next one counts from the start
            self.counts[p] = -1

    def begin(self, p):
        """The first micro-batch of a step comes, or none: forget what is left of a step that was not taken."""
        self.counts[p] = 0
        self.complete.discard(p)
        self.means.discard(p)
        self.sound.pop(p, None)

    @exactly
    def gradient_came(self, q):
        """Autograd calls this in backward, when q.grad has taken in a micro-batch."""
        p = self.weight_of.get(q, q)
        if q.grad.is_sparse:
            raise ValueError(f'{type(self).__name__} takes no sparse gradients: use nn.Embedding(sparse=False)')
        if self.wrapped is None:
            self.wrapped = in_ddp(p)
        if self.wrapped and self.keeps_gradients_back:
            raise ValueError(
                f'{type(self).__name__} uses gradients inside backward (per_layer, attach), before '
                'DistributedDataParallel has averaged them: leave DDP out, the optimizer averages them itself'
            )
        self.means.discard(p)
        if p in self.sums:
            q.grad = self.sum_up(p, self.sums.pop(p), q.grad)
        self.gradient_ready(p)
        self.flagged |= not self.last_micro_batch
        if self.last_micro_batch and p.grad is not None:
            self.complete.add(p)
        else:
            self.complete.discard(p)

    def sum_up(self, p, total, G):
        """total + G, in place, for one micro-batch more of p."""
        self.counts[p] = self.counts.get(p, 0) + 1
        return add_up_(total, G, self.random_seed(p, self.state[p].get('step', 0), f'sum {self.counts[p]}'))

    def gradient_ready(self, p):
        """p has its gradient of one more micro-batch."""
        if self.last_micro_batch and self.in_common(p) and not self.wrapped:
            if (task := torch._C._current_graph_task_id()) != self.task:  # the first one of this backward
                self.task = task
                torch.autograd.Variable._execution_engine.queue_callback(self.finish_exchange)
            self.exchange(p)
        elif self.last_micro_batch and self.per_layer:
            self.finish(p)

    def finish(self, p):
        """Per-layer mode, p's gradient of this step complete: update now, unless clipping waits for all the norms."""
        if not self.grad_clip:
            self.advance(p)

    def advance(self, p, G=None):
        """p takes its step, by G or by its own gradient, and its clock goes on."""
        state = self.state[p]
        state.setdefault('step', 0)
        with self.moments_at_hand(p):
            G = self.take_gradient(p) if G is None else G
            if self.moves_in_backward:  # before the loop can look at the loss
                good = self.squares[p].isfinite()
                zero_unless_(good, G)
                state['skip'] = 1.0 - good.float()
            self.update(p, G)
        state.pop('skip', None)
        state['step'] += 1
        self.complete.discard(p)

    @contextlib.contextmanager
    def moments_at_hand(self, p):
        """p's moments on p's device, and back home afterwards."""
        state = self.state[p]
        at_home = {name: state[name] for name in MOMENTS if name in state} if self.home else {}
        state.update({name: moment.to(p.device) for name, moment in at_home.items()})
        yield
        for name in MOMENTS if self.home else ():
            if name in state:
                if name not in at_home:
                    at_home[name] = torch.empty_like(state[name], device=self.home, pin_memory=p.is_cuda)
                state[name] = at_home[name].copy_(state[name])

    def take_gradient(self, p):
        """The gradient of the whole step, averaged over processes, its norm counted; p lets go of it."""
        G, p.grad = p.grad, None
        return self.add_to_norm(p, self.averaged(p, G))

    def averaged(self, p, G):
        """The mean of p's gradient G over the processes, which may be there already."""
        if self.in_common(p) and p not in self.means:
            average_(G)
        self.means.discard(p)
        return G

    def in_common(self, p):
        """Do processes that have the same p average its gradient? Of a part of a cut weight it comes as the mean."""
        return several_processes() and not (hasattr(p, 'part') and p.part.as_mean)

    def add_to_norm(self, p, G):
        if G.dtype == torch.float32 and G.is_contiguous():  # three times faster than vector_norm on a CPU
            self.squares[p] = torch.dot(G.view(-1), G.view(-1))
        else:  # row by row: over a whole embedding at once, sums in fp32 were 0.3 % off
            self.squares[p] = torch.linalg.vector_norm(G, dim=-1, dtype=at_least_fp32(G)).square().sum()
        return G

    def random_seed(self, p, step, row=0):
        of = p.part.salt if hasattr(p, 'part') else ''  # other numbers for other parts of a weight
        return zlib.crc32(f'{self.seed} {step} {self.index_of[p]} {row}{of}'.encode())

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        self.squares = {}
        for p in self.index_of:
            if p.grad is None:
                self.begin(p)

    def step(self, closure=None):
        """One optimizer step, on whatever gradients are still waiting."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.take_step()
        return loss

    @exactly
    def take_step(self):
        """What step() does when its closure has run."""
        if hasattr(self, 'found_inf'):  # see _step_supports_amp_scaling
            raise ValueError(
                'GradScaler cannot scale gradients that are used up inside backward (by per_layer): train in bf16 '
                'without it'
            )
        if several_processes():
            for p in [p for p in self.index_of if p.grad is not None and p not in self.means and self.in_common(p)]:
                self.exchange(p)
            self.finish_exchange()
        waiting = [p for group in self.param_groups for p in group['params'] if p.grad is not None]
        if self.grad_clip and waiting:
            gradients = [self.take_gradient(p) for p in waiting]
            norm = self.norm()
            keep = (self.grad_clip / (norm + 1e-6)).clamp(max=1.0)  # a tensor: nothing waits for the device
            for p in waiting:
                self.advance(p, gradients.pop(0).mul_(keep))
        else:
            for p in waiting:
                self.advance(p)
        if self.squares:
            norm = {'grad_norm': self.norm()}
            self.metrics = norm | self.metrics | norm  # first in a log line, which takes them all and empties the dict
            self.squares = {}
        if several_processes():
            self.metrics['bytes_sent'], SENT[0] = torch.tensor(SENT[0]), 0.0

    def norm(self):
        part = getattr(next(iter(self.squares)), 'part', None)
        if part is None:
            return torch.stack(list(self.squares.values())).sum().sqrt()
        return part.sum_(torch.stack([square / p.part.copies for p, square in self.squares.items()]).sum()).sqrt()

    # ---- several processes: what is complete travels while backward goes on

    def exchange(self, p):
        """p's gradient of the step is complete in this process: let the mean over all be on its way."""
        self.gathered.append((p, self.own_gradient(p)))
        if sum(G.nbytes for _, G in self.gathered) >= BUCKET[self.per_layer]:
            self.send()

    def own_gradient(self, p):
        """What the processes average for p: its gradient, or what a method keeps of it."""
        return p.grad

    def send(self):
        """The bucket goes off, and the one before has to be there, so that no third one takes memory."""
        bucket, self.gathered, works = self.gathered, [], []
        for kind in dict.fromkeys((G.dtype, G.device) for _, G in bucket):
            works.append(travel(together, [G for _, G in bucket if (G.dtype, G.device) == kind], wait=False))
        self.flying.append((bucket, works))
        if len(self.flying) > 1:
            self.land()

    def land(self):
        """Wait for the oldest bucket under way: those in it have their mean gradient."""
        bucket, works = self.flying.pop(0)
        for work in works:
            work.wait()
        for p, G in bucket:
            G /= dist.get_world_size()
            self.arrived(p)

    def arrived(self, p):
        self.means.add(p)
        if self.per_layer:
            self.finish(p)

    def share(self, p, G):
        """What p's method makes of the mean of G is dear: one process makes it and hands it out, p by p another. They
        work side by side: as many G wait here as there are processes. A resumed run must choose the same one."""
        G, owner = G.contiguous(), self.index_of[p] % dist.get_world_size()
        self.shared.append((p, G, owner, travel(dist.reduce, G, owner, wait=False)))
        if len(self.shared) == dist.get_world_size():
            self.make_shared()

    def make_shared(self):
        shared, self.shared, me = self.shared, [], dist.get_rank()
        for _, G, owner, work in shared:
            work.wait()
            if owner == me:
                G /= dist.get_world_size()
        made = [self.make(p, G, owner == me) for p, G, owner, _ in shared]
        for (p, _, owner, _), tensors in zip(shared, made):
            self.made(p, *(hand_out_(A, owner) for A in tensors))

    @exactly
    def finish_exchange(self):
        """At the end of a backward, and of whatever else is still waiting at a step."""
        if self.shared:
            self.make_shared()
        if self.gathered:
            self.send()
        while self.flying:
            self.land()

    @property
    def keeps_gradients_back(self):
        """Is there nothing in some .grad when backward ends, or not the gradient?"""
        return self.per_layer

    @property
    def moves_in_backward(self):
        """Is step() too late to change the gradients?"""
        return self.per_layer and not self.grad_clip

    @property
    def _step_supports_amp_scaling(self):
        """GradScaler asks this. Gradients that lie in .grad until step() it unscales itself; of others it would say
        only that it found none, so it is told to leave them to step(), which refuses in a sentence."""
        return self.moves_in_backward

    def is_due(self, p):
        """Will the next step do to p what a method does now and then? Known before backward; Adam does nothing."""
        return False

    def make_due(self, modules):
        """Let these modules do in the next step what a method does to them now and then; Adam does nothing."""

    # ---- checkpoints and copies

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """torch's casts the moments to the parameter's dtype, which would make them bf16; ours keep their own."""
        if any('exp_avg' in state for state in state_dict['state'].values()):
            raise ValueError(f"these are the states of torch's own Adam: {type(self).__name__} starts without them")
        super().load_state_dict({**state_dict, 'state': {}})
        for group in self.param_groups:  # keys that did not exist when it was saved
            group.update({key: value for key, value in self.defaults.items() if key not in group})
        saved = [i for group in state_dict['param_groups'] for i in group['params']]
        for i, p in zip(saved, (p for group in self.param_groups for p in group['params'])):
            state = dict(state_dict['state'].get(i, {}))
            if 'M' in state and 'fill' not in state:  # written before there was one clock
                state['fill'] = state.get('step', 0)
                state['step'] = state.pop('age', state['fill'] + state.pop('before', 0))
            for name, value in state.items():
                here = self.home if self.home and name[0] in 'MV' else p.device
                self.state[p][name] = value.detach().to(here, copy=True) if torch.is_tensor(value) else value
        self.group_of = {p: group for group in self.param_groups for p in group['params']}

    def __copy__(self):
        raise TypeError('copy.copy would leave two optimizers on one parameter: use copy.deepcopy((model, optimizer))')

    def __getstate__(self):
        """For copy.deepcopy and pickle: all of it, where torch's own keeps defaults, state and groups alone."""
        return {name: value for name, value in self.__dict__.items() if name != 'step'}  # a scheduler's wrapper of it

    def __setstate__(self, state):
        super().__setstate__(state)
        if 'watched' in state:  # of a copy, whose tensors have no hooks yet; load_state_dict comes here, too
            watched, self.watched = self.watched, []
            for p in watched:
                self.watch(p)


# ---- for train.py ------------------------------------------------------------------------------------------------

FIXED = ()


def targeted(model, config, kind):
    """{name: module} of those of this class in the blocks that config.targets says, by the ends of their names.
    ValueError for one that ends no name."""
    found = {name: module for name, module in model.layers.named_modules() if isinstance(module, kind)}
    asked = getattr(config, 'targets', 'all')
    if asked == 'all':
        return found
    ends = ['.' + end.strip() for end in asked.split(',')]
    if any(not any(name.endswith(end) for name in found) for end in ends):
        known = ','.join(dict.fromkeys(name.rpartition('.')[2] for name in found))
        raise ValueError(f"targets='{asked}' names no such layers: use all, or some of {known}")
    return {name: module for name, module in found.items() if any(name.endswith(end) for end in ends)}


def split_decay(parameters):
    """Two groups: matrices, which decay, and vectors (norms), which do not."""
    parameters = list(parameters)
    return [
        {'params': [p for p in parameters if p.dim() >= 2]},
        {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0},
    ]


def common(config):
    """The arguments of every method's optimizer that train.py's own keys say."""
    c = config
    return dict(
        lr=c.learning_rate, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay, state_bits=c.state_bits,
        grad_clip=c.grad_clip, per_layer=c.per_layer, offload=c.offload, seed=c.seed,
    )  # fmt: skip


def problems(config):
    """What does not go together, a sentence each."""
    return no_clip_per_layer(config) + no_targets(config)


def no_clip_per_layer(config):
    """Of methods that clip by the norm of all gradients."""
    if not (config.per_layer and config.grad_clip):
        return []
    return [
        f"per_layer=True cannot clip under method='{config.method}', whose global norm needs all gradients: "
        'set grad_clip=0 or per_layer=False'
    ]


def no_targets(config):
    """Of methods that do the same with all layers."""
    what = f"targets='{config.targets}' is of methods that treat some layers in their own way, unlike {config.method}"
    return [] if config.targets == 'all' else [f'{what}: leave it out']


def setup(model, config):
    """What train.py calls for method='adamw'."""
    return AdamW(split_decay(model.parameters()), **common(config))
