"""
Tensors in few bits: NF4, and a module that keeps its weights in it.

    parts = encode(W)                              # {'': two codes a byte, '_absmax': a scale for each 64 numbers}
    W = decode(parts, W.shape, torch.bfloat16)     # what is left of it

NF4 (QLoRA, 2305.14314, section 3) divides a block of 64 numbers by its largest and rounds each to the nearest of 16
values, the quantiles of a normal distribution. Half a byte a number, and 4 bytes a block for the scale; with
double_quant the scales are in 8 bits, too: 0.37 bits a number less.
Not for: weights that small steps are added to. A step below half the distance of two values is rounded away.
"""

import itertools
import math

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensor

from adam import BLOCK, code_of, kernels

BLOCK_4BIT = 64  # numbers that share a scale in NF4

NF4 = (  # the values of QLoRA's appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

GATHER = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor  # its name before torch 2.13
PARTS = '', '_absmax', '_offset', '_outer_absmax'  # what `encode` makes of a tensor, as endings of its name


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
    packed, absmax, pieces = room_for_nf4(A)
    for piece in pieces:
        code_piece_(*piece)
    return packed, absmax


def room_for_nf4(A):
    """Codes (n / 2, 1) and scales (n / 64,) of a flat A (n,), empty; and [(piece of A, its codes, its scales, room to
    work in)]. The pieces share the room, since new pages from the system take longer than the arithmetic."""
    packed = torch.empty(A.numel() // 2, 1, dtype=torch.uint8)
    absmax, size = torch.empty(A.numel() // BLOCK_4BIT), min(1 << 17, A.numel())
    room = [torch.empty(size, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.uint8, torch.bool)]
    pieces = zip(A.split(1 << 17), packed.split(1 << 16), absmax.split((1 << 17) // BLOCK_4BIT))
    return packed, absmax, [(*piece, [one[: len(piece[0])] for one in room]) for piece in pieces]


def code_piece_(piece, pairs, scales, room):
    blocks, sizes, codes, above = (one.view(-1, BLOCK_4BIT) for one in room)
    blocks.view(-1).copy_(piece)
    torch.amax(torch.abs(blocks, out=sizes), 1, out=scales)
    blocks /= (scales + (scales == 0))[:, None]
    codes.zero_()
    for low, high in itertools.pairwise(NF4):
        codes += torch.gt(blocks, (low + high) / 2, out=above).view(torch.uint8)
    codes = codes.view(-1, 2)
    torch.add(codes[:, 1], codes[:, 0], alpha=16, out=pairs[:, 0])  # the first of two in the upper half


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


class Pieces:
    """What one of n processes keeps of a buffer: the rank-th of n pieces of the flat tensor, all of one length."""

    def __init__(self, n, rank=0, group=None):
        self.n, self.rank, self.group = n, rank, group

    def cut(self, tensor):
        size = -(-tensor.numel() // self.n)
        mine, piece = tensor.flatten()[self.rank * size : (self.rank + 1) * size], tensor.new_zeros(size)
        piece[: len(mine)] = mine
        piece.of = tensor.shape
        return piece

    def gather(self, piece):
        """The whole tensor. All processes must call it."""
        whole = piece.new_empty(self.n * len(piece))
        if not isinstance(piece, FakeTensor):  # else a plan's
            GATHER(whole, piece, self.group)
        return whole[: math.prod(piece.of)].view(piece.of)


class Packed(torch.nn.Module):
    """A module whose large tensors are kept encoded, in buffers: 'W' in the buffers W, W_absmax and so on.

    `how` are the arguments of `encode`, `shapes` the tensors' shapes by name. pieces: None, or, of a model that lies in
    parts on several processes, what cuts a buffer and gathers it, `Pieces`: then a buffer is this process's piece,
    and is whole only while it is read; but those `in_full`, by name, stay whole."""

    pieces, in_full = None, ()

    def keep(self, name, A):
        for part, tensor in encode(A, *self.how).items():
            self.put(name + part, tensor)

    def put(self, name, tensor):
        """Let the whole `tensor` be the buffer of this name, or what of it this process keeps."""
        whole = self.pieces is None or name.partition('_')[0] in self.in_full
        self.register_buffer(name, tensor if whole else self.pieces.cut(tensor))

    def in_pieces(self, pieces):
        """From now on keep a piece of each buffer."""
        self.pieces = pieces
        for name, tensor in list(self._buffers.items()):
            self.put(name, tensor)

    def whole_of(self, buffer):
        """The whole of a buffer; of a model in parts all processes must call it."""
        return self.pieces.gather(buffer) if hasattr(buffer, 'of') else buffer

    def read(self, name, dtype):
        parts = {part: self.whole_of(self._buffers[name + part]) for part in PARTS if name + part in self._buffers}
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
                self.put(name, tensor.to(next(self.parameters()).device, copy=True))
