"""
A model made ready to write text: each matrix kept, for a while, as this device multiplies it fastest.

    with decoded(model):
        sample.generate(model, ids, 100)

Packed weights (NF4; LoQT's P and B) are decoded once and not for each token, and a weight that is stored in another
dtype than it is computed in is cast once. On a CPU a matrix is laid out as oneDNN wants it, 1.2 to 2 times as fast with
few rows as row after row; q, k and v are one product then, gate and up another. The model's own tensors stay beside:
a matrix for which the device has no room is decoded when it is used, a layer at a time, as in training.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F

from loqt import LoQTLinear
from lora import LoRALinear
from model import Linear, LLaMA

KINDS = {Linear, LoRALinear, LoQTLinear, LLaMA}  # whose matrices are known here; a LLaMA's is its head
SHARE = {'cpu': 0.8}  # of the free memory; half on a card, where caches and logits come after


class Product:
    """x (..., in) -> x W^T + b (..., out), and scale (x A^T) B^T where there are such factors.

    W (out, in); packed: a copy in oneDNN's layout. factors: A (r, in), B (out, r), scale."""

    def __init__(self, W, bias=None, factors=None, packed=False):
        self.W, self.bias, self.factors, self.packed = W, bias, factors, packed
        # oneDNN multiplies one row in fp32 slower than four: 62 ms a token of SmolLM2 so, 54 ms as four that are alike.
        self.alone = 4 if packed and W.dtype == torch.float32 and len(W) >= 900 else 1
        if packed:
            self.W = torch.ops.mkldnn._reorder_linear_weight(W.contiguous(), 16)  # made for 16 rows, as good for one

    def __call__(self, x):
        if self.alone > 1 and x.numel() == x.shape[-1]:
            rows = x.reshape(1, -1).expand(self.alone, -1)
            y = torch.ops.mkldnn._linear_pointwise(rows, self.W, self.bias, 'none', [], '')[0]  # (out,)
            y = y.view(*x.shape[:-1], -1)
        elif self.packed:
            y = torch.ops.mkldnn._linear_pointwise(x, self.W, self.bias, 'none', [], '')
        else:
            y = F.linear(x, self.W, self.bias)
        if self.factors is None:
            return y
        A, B, scale = self.factors
        return y.add_((x @ A.T) @ B.T, alpha=scale)


@functools.cache
def packs(device, dtype):
    """Has this torch products with a matrix in oneDNN's own layout, and are they right?"""
    if device != 'cpu' or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 64, generator=generator).to(dtype) for n in (3, 48))
    try:
        found = Product(W, packed=True)(x)  # (3, 48)
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(found.float(), x.float() @ W.float().T, atol=0.5 if dtype.itemsize < 4 else 1e-3)


def parts(layer, dtype):
    """W (out, in), b or None, and LoRA's factors or None, in a dtype."""
    if type(layer) is LLaMA:
        return layer.head.detach().to(dtype), None, None
    bias, factors = layer.bias if layer.bias is None else layer.bias.detach().to(dtype), None
    if type(layer) is LoQTLinear:
        return layer.frozen(dtype, with_factors=True), bias, None  # as it multiplies many rows
    if type(layer) is Linear:
        return layer.weight.detach().to(dtype), bias, None
    if len(layer.A):
        factors = layer.A.detach().to(dtype), layer.B.detach().to(dtype), layer.scale
    return layer.read('W', dtype), bias, factors


def size(layer):
    """Of its matrix, in numbers."""
    return layer.head.numel() if type(layer) is LLaMA else layer.out_features * layer.in_features


def heads(attention, product):
    sizes = [layer.out_features // attention.d for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return lambda x: product(x).view(*x.shape[:2], -1, attention.d).split(sizes, 2)  # (B, T, H, d), K heads


def gated(mlp, product):
    def inner(x):
        gate, up = product(x).chunk(2, -1)  # (..., n_inner) each
        return F.silu(gate) * up

    return inner


def places(model):
    """Yield (layers, owner, name of the method that their product takes the place of, how it does)."""
    for block in model.layers:
        together = []
        if type(model) is LLaMA:
            a, mlp = block.self_attn, block.mlp
            groups = ([a.q_proj, a.k_proj, a.v_proj], a, 'project', heads), (
                [mlp.gate_proj, mlp.up_proj], mlp, 'inner', gated
            )  # fmt: skip
            for group in groups:
                if not any(type(layer) is LoRALinear and len(layer.A) for layer in group[0]):
                    together += group[0]
                    yield group
        for module in block.modules():
            if module not in together:
                yield [module], module, 'forward', lambda _, product: product
    if type(model) is LLaMA and torch.is_tensor(model.head):
        yield [model], model, 'logits', lambda _, product: product


def gains(layer, dtype, packed):
    """Is its product faster?"""
    kept = layer.head if type(layer) is LLaMA else getattr(layer, 'weight', None)
    return type(layer) in KINDS and (packed or kept is None or kept.dtype != dtype)


@contextlib.contextmanager
def decoded(model, room=None):
    """While this lasts, matrices are kept as the file's head says, as many as fit into `room` bytes; None: into most of
    what the device has free. The same products, but for the order of their sums. They are those of the weights as they
    are now: not for training."""
    device, dtype, changed = model.head.device, model.activation_dtype, []
    packed = packs(device.type, dtype)
    room = free_memory(device) * SHARE.get(device.type, 0.5) if room is None else room
    try:
        for layers, owner, name, wrap in places(model):
            if not all(gains(layer, dtype, packed) for layer in layers):
                continue
            room -= sum(map(size, layers)) * dtype.itemsize
            if room < 0:
                break
            Ws, biases, factors = zip(*(parts(layer, dtype) for layer in layers))
            W = Ws[0] if len(layers) == 1 else torch.cat(Ws)  # (out, in)
            bias = biases[0] if len(layers) == 1 or biases[0] is None else torch.cat(biases)
            changed.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, wrap(owner, Product(W, bias, factors[0], packed)))
        yield
    finally:
        for owner, name, before in changed:
            delattr(owner, name)  # so that the class's own is there again, or
            if before is not None:
                setattr(owner, name, before)  # that which GaLore gave to this layer alone


def free_memory(device):
    """Bytes of its memory that nothing uses yet; 0 where the system does not say."""
    if device.type == 'cuda':
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open('/proc/meminfo') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('MemAvailable'))
    except (OSError, StopIteration):
        return 0
