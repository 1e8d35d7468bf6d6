"""
A model of transformers under the names of model.LLaMA: blocks, head, loss, weights, a folder of its own.

    model = Transformers(AutoModelForCausalLM.from_pretrained(folder), Shape(config), linear)       # hf_models.load

The linear layers inside the blocks become the method's own; so does GPT-2's Conv1D, which keeps its weight (in, out),
and is saved as what it was. All else is transformers' code, and so are reading and writing of folders.

Dropout: as config.json says, as in transformers' own Trainer, unless model_dropout says otherwise. Each block draws its
masks from a seed made of (seed, step, micro-batch, block): the same when checkpointing computes it again, and when a
run resumes. For that it sets torch's global generator, and only where there is dropout at all.
"""

import contextlib
import copy
import math
import os
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import positions_of
from head import HeadLoss
from model import Linear, ModelError, Waiting

# Families whose blocks see nothing of other tokens than through a mask that they take as it is: rows may be packed.
PACKED = ('gpt2', 'gpt_neox', 'opt', 'phi')
NORMS = ('final_layer_norm', 'final_layernorm', 'ln_f', 'norm', 'project_out')  # what may follow the last block


@dataclass
class Shape:
    """What the trainer asks of a ModelConfig, read from a config.json of transformers, which `hf` is. labels: 0 for a
    language model, 1 for a regression, else how many classes."""

    hf: object
    labels: int = 0
    block_size: int = 0
    seed: int = 0
    targets: str = 'all'
    n_layer: int = 0
    eos_token_id: object = field(init=False)
    bos_token_id: object = field(init=False)

    def __post_init__(self):
        hf = self.hf
        self.n_layer = self.n_layer or hf.num_hidden_layers
        self.n_head, self.n_embd = hf.num_attention_heads, hf.hidden_size
        self.n_kv_head = getattr(hf, 'num_key_value_heads', None) or self.n_head
        self.head_dim = getattr(hf, 'head_dim', None) or self.n_embd // self.n_head
        widths = (getattr(hf, name, None) for name in ('intermediate_size', 'n_inner', 'ffn_dim'))
        self.n_inner = next((n for n in widths if n), 4 * self.n_embd)
        self.vocab_size, self.family = hf.vocab_size, f'{hf.model_type} of transformers'
        self.eos_token_id, self.bos_token_id = (getattr(hf, f'{name}_token_id', None) for name in ('eos', 'bos'))
        self.tie_embeddings = bool(getattr(hf, 'tie_word_embeddings', False))
        pad = getattr(hf, 'pad_token_id', None) or 0
        longest = getattr(hf, 'max_position_embeddings', None) or 2**31
        self.max_positions = longest - pad - 1 if hf.model_type in ROBERTA else longest
        self.block_size = self.block_size or min(self.max_positions, 2**17)

    def blank(self, dtype, linear):
        """The model on the meta device, of n_layer blocks."""
        hf = copy.deepcopy(self.hf)
        hf.num_hidden_layers = self.n_layer
        if getattr(hf, 'layer_types', None):
            hf.layer_types = hf.layer_types[: self.n_layer]
        with torch.device('meta'), quiet():
            return Transformers(kind_of(self).from_config(hf, dtype=dtype), replace(self), linear)


ROBERTA = ('roberta', 'xlm-roberta', 'camembert', 'xlm-roberta-xl', 'longformer')  # positions begin at pad + 1


def kind_of(shape):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if shape.labels else AutoModelForCausalLM


@contextlib.contextmanager
def quiet():
    """transformers' advice on missing heads and progress bars is not for our users."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error(), logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level), bars and logging.enable_progress_bar()


# ---- the linear layers -----------------------------------------------------------------------------------------------


def is_conv(module):
    return type(module).__name__ == 'Conv1D' and hasattr(module, 'nf')


@torch.no_grad()
def converted(module, linear, device):
    """The method's layer in the place of an nn.Linear or a Conv1D, whose weight is that of a linear layer transposed;
    `conv` says which it was."""
    W = module.weight.T.contiguous() if is_conv(module) else module.weight
    with torch.device('meta'):
        new = linear(W.shape[1], W.shape[0], bias=module.bias is not None, dtype=W.dtype)
    if W.is_meta or not hasattr(new, 'set_weight'):
        if not hasattr(new, 'set_weight'):
            new.weight = module.weight if W is module.weight else nn.Parameter(W)
    else:
        new.bias = None  # not beside its own
        new.to_empty(device=device).set_weight(W.to(device))
    new.bias, new.conv = module.bias, is_conv(module)
    return new.to(device) if torch.device(device).type != 'meta' else new


def blocks_of(inner):
    """The blocks, an nn.ModuleList: the one with most numbers in it."""
    lists = [m for m in inner.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(f'{type(inner).__name__} has no list of blocks: use another model')
    return max(lists, key=lambda some: sum(p.numel() for p in some.parameters()))


class Reached(Exception):
    """The last block is reached, with these arguments."""


class Tail(nn.Module):
    """A block, and what follows it."""

    def __init__(self, block, after):
        super().__init__()
        self.block, self.after = block, nn.ModuleList(after)

    def forward(self, *inputs, **named):
        x = self.block(*inputs, **named)
        x = x[0] if isinstance(x, tuple) else x
        for part in self.after:
            x = part(x)
        return x


class Transformers(nn.Module):
    """A model of transformers, `inner`, with the names of LLaMA, whose docstring says what they mean."""

    def __init__(self, inner, shape, linear=Linear, device='meta'):
        super().__init__()
        self.inner, self.config, self.checkpointing, self.compute_dtype = inner, shape, False, None
        self.home = self.waiting = None  # under checkpointing where blocks' inputs wait, and the last one that does
        self.blocks = [blocks_of(inner)]  # in a list: named once, inside `inner`
        self.step, self.micro_batch, self.again, self.to_head = 0, 0, False, nn.Identity()
        found = [name for name, m in self.layers.named_modules() if type(m) is nn.Linear or is_conv(m)]
        for name in found:
            parent, _, last = name.rpartition('.')
            owner = self.layers.get_submodule(parent)
            apart = shape.targets != 'all' and not name.endswith(tuple(f'.{end}' for end in shape.targets.split(',')))
            setattr(owner, last, converted(getattr(owner, last), Linear if apart else linear, device))
        if torch.device(device).type != 'meta':
            inner.to(device)
        for i, block in enumerate(self.layers):
            block.forward = partial(self.run_block, block.forward, block, i)
        self.drops = any('drop' in k and type(v) is float and v > 0 for k, v in vars(shape.hf).items())
        self.train()

    # ---- parts

    @property
    def layers(self):
        return self.blocks[0]

    @property
    def embed_tokens(self):
        return self.inner.get_input_embeddings()

    @property
    def head(self):
        """(V, D); of a classifier the embedding, which knows device and dtype as well."""
        return (self.inner.get_output_embeddings() or self.embed_tokens).weight

    @property
    def head_bias(self):
        return self.inner.get_output_embeddings().bias

    @property
    def activation_dtype(self):
        return self.head.dtype

    @property
    def after_blocks(self):
        """The modules that the base model calls after its last block, in that order."""
        parent = next(m for m in self.inner.modules() if any(child is self.layers for child in m.children()))
        return [part for name in NORMS if (part := getattr(parent, name, None)) is not None]

    @property
    def head_begins(self):
        """The module that is called when the last block is done."""
        return next(iter(self.head_modules().values())) if self.encodes else self.to_head

    def head_modules(self):
        """{name in `inner`: module} of what stands on the base model and is trained for a task: a classifier."""
        if not self.config.labels:
            return {}
        children = self.inner.named_children()
        return {n: m for n, m in children if n != self.inner.base_model_prefix and any(True for _ in m.parameters())}

    # ---- forward

    def run_block(self, forward, block, i, *inputs, **named):
        """A block's forward: under checkpointing through torch's, which calls the block again, with its hooks."""
        if self.checkpointing and torch.is_grad_enabled() and not self.again:
            again, how = partial(self.run_again, block), dict(use_reentrant=False, preserve_rng_state=False)
            if self.home is None:
                return checkpoint(again, *inputs, **how, **named)
            self.waiting = waiting = Waiting(inputs[0], self.home, self.waiting if i else None)
            x = checkpoint(waiting.run, again, *inputs[1:], **how, **named)
            waiting.leave()
            self.waiting = waiting if i + 1 < len(self.layers) else None
            return x
        self.draw(i)
        return forward(*inputs, **named)

    def run_again(self, block, *inputs, **named):
        self.again = True
        try:
            return block(*inputs, **named)
        finally:
            self.again = False

    def draw(self, place):
        """From here on random numbers are those of (seed, step, micro-batch, place)."""
        if self.drops and self.inner.training and torch.is_grad_enabled():
            world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
            at = f'{self.config.seed} {self.step} {(self.micro_batch - 1) * world + rank} {place}'
            torch.manual_seed(zlib.crc32(at.encode()))

    def at_step(self, step):
        """The next forward is the first of this step."""
        self.step, self.micro_batch = step, 0

    def begin(self):
        """Before a forward: dropout is of training alone, which evaluation during a run is not."""
        wanted = self.training and torch.is_grad_enabled()
        if self.inner.training != wanted:
            self.inner.train(wanted)
        self.micro_batch += wanted
        self.draw('first')

    def hidden(self, tokens, cache=None, pieces=None, lengths=None, types=None):
        """tokens (B, T) -> what the head reads, (B, T, D). lengths (B,): of rows padded on the right, whose padding an
        encoder must not see."""
        self.check_rows(tokens, pieces)
        named = self.inputs(tokens, pieces, lengths, types)
        self.begin()
        if cache is not None:
            named = {'past_key_values': cache.kept, 'use_cache': True}
            cache.length += tokens.shape[1]
        with no_search_for_pieces():
            return self.to_head(self.inner.base_model(input_ids=tokens, **named).last_hidden_state)

    def new_cache(self):
        """For `sample.generate`: transformers' own cache of one row, and how many tokens are in it."""
        from transformers import DynamicCache

        return SimpleNamespace(
            kept=DynamicCache(config=self.config.hf), length=0, slots=self.config.block_size, slides=False
        )

    def before_last(self, tokens, blocks=None):
        """As LLaMA's; the rest are the last block's other arguments."""

        def stop(module, inputs, named):
            raise Reached(inputs, named)

        hook = self.layers[(blocks or 0) - 1].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with no_search_for_pieces():
                self.inner.base_model(input_ids=tokens, **self.inputs(tokens, None, None, None))
        except Reached as reached:
            (x, *inputs), named = reached.args
            return x, (inputs, named)
        finally:
            hook.remove()

    def last(self, x, rest, blocks=None):
        """As LLaMA's. An x of another dtype than the weights' finds small ones, of norms and the like, in its own."""
        tail = Tail(self.layers[(blocks or 0) - 1], self.after_blocks)
        own = {name: p.to(x.dtype) for name, p in tail.named_parameters() if p.dim() == 1 and p.dtype != x.dtype}
        self.again = True  # computed once, whatever checkpointing says
        try:
            return torch.func.functional_call(tail, own, (x, *rest[0]), rest[1])
        finally:
            self.again = False

    def inputs(self, tokens, pieces, lengths, types):
        """The base model's keywords."""
        B, T = tokens.shape
        named = {} if self.encodes else {'use_cache': False}
        if types is not None and getattr(self.config.hf, 'type_vocab_size', 0) > 1:
            named['token_type_ids'] = types
        if lengths is not None and self.encodes:
            named['attention_mask'] = torch.arange(T, device=tokens.device) < lengths[:, None]  # (B, T)
        if pieces is not None:
            piece = torch.searchsorted(pieces, torch.arange(B * T, device=tokens.device), right=True).view(B, 1, T)
            named['attention_mask'] = (piece[..., None] == piece[..., None, :]).tril()  # (B, 1, T, T)
            named['position_ids'] = positions_of(pieces, B, T)
        return named

    @property
    def encodes(self):
        """Does a token see those behind it?"""
        return bool(self.config.labels) and not hasattr(self.inner, 'score')

    def check_rows(self, tokens, pieces):
        family = self.config.hf.model_type
        if tokens.shape[1] > self.config.max_positions:
            what = f'{tokens.shape[1]} tokens do not fit the window of {self.config.max_positions}'
            raise ModelError(f'{what}: use a smaller block_size')
        if pieces is not None and family not in PACKED:
            raise ModelError(f'rows of {family} are not packed, as its attention is its own: use --packing=False')

    def logits(self, x):
        return self.inner.get_output_embeddings()(x)  # (..., V)

    def classify(self, tokens, lengths=None, types=None):
        """tokens (B, T), padded on the right -> logits (B, labels). Decoders read the last token of each row."""
        if self.encodes:
            self.check_rows(tokens, None)
            self.begin()
            return self.inner(input_ids=tokens, **self.inputs(tokens, None, lengths, types)).logits
        x = self.hidden(tokens, None, None, lengths, types)  # (B, T, D)
        rows = torch.arange(len(x), device=x.device)
        return self.inner.score(x[rows, -1 if lengths is None else lengths - 1])

    def forward(self, tokens, targets=None, weights=None, divisor=None, pieces=None, trained=None, lengths=None,
                types=None):  # fmt: skip
        """As LLaMA's; of a classifier tokens (B, T), lengths (B,), types (B, T) or None -> logits (B, labels), and with
        targets (B,), classes or numbers, the sum of the rows' losses by `divisor`, or their mean."""
        if self.config.labels:
            logits = self.classify(tokens, lengths, types).float()  # (B, labels)
            if targets is None:
                return logits
            if self.config.labels == 1:
                losses = F.mse_loss(logits[:, 0], targets.float(), reduction='none')  # (B,)
            else:
                losses = F.cross_entropy(logits, targets, reduction='none')  # (B,)
            losses = losses if weights is None else losses * weights
            return losses.sum() / (len(losses) if divisor is None else divisor)
        x = self.hidden(tokens, pieces=pieces)
        if targets is None:
            return self.logits(x)
        if weights is not None:
            weights = weights.float().view(len(tokens), -1).expand(tokens.shape).reshape(-1)  # (B T,)
        x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)  # (B T, D), (B T,)
        return HeadLoss.apply(x, self.head, targets, torch.is_grad_enabled(), weights, divisor, trained, self.head_bias)

    # ---- weights

    def set_block_size(self, block_size, device=None):
        """Nothing here depends on the longest window. What was filled from the meta device is tied again."""
        self.config.block_size = block_size
        self.inner.tie_weights()

    def dense_weights(self):
        """Yield (name, shape, function that returns the dense tensor) for each weight, by transformers' names. One that
        two modules share comes once."""
        seen = set()
        for prefix, module in self.inner.named_modules():
            if conv := getattr(module, 'conv', False) or hasattr(module, 'dense_weight'):
                shape = (module.out_features, module.in_features)
                yield prefix + '.weight', shape[::-1] if module.conv else shape, partial(whole, module)
            for name, p in module.named_parameters(prefix, recurse=False):
                if id(p) not in seen and (not conv or p is module.bias):
                    seen.add(id(p))
                    yield name, tuple(p.shape), p.detach

    def n_params(self, embeddings=True):
        """As LLaMA's."""
        n = sum(math.prod(shape) for _, shape, _ in self.dense_weights())
        return n if embeddings or self.config.tie_embeddings else n - self.embed_tokens.weight.numel()

    def flops_per_token(self, T):
        """As LLaMA's."""
        c = self.config
        return 6 * self.n_params(embeddings=False) + 12 * c.n_layer * c.n_head * c.head_dim * T

    def save_pretrained(self, folder, merged=True):
        """Write the folder as transformers does, with dense weights under its own names. merged is always True."""
        os.makedirs(folder, exist_ok=True)
        weights = {name: make().to('cpu', copy=True) for name, _, make in self.dense_weights()}
        with quiet():
            self.inner.save_pretrained(folder, state_dict=weights)


def whole(module):
    W = module.dense_weight() if hasattr(module, 'dense_weight') else module.weight.detach()
    return W.T.contiguous() if getattr(module, 'conv', False) else W


@contextlib.contextmanager
def no_search_for_pieces():
    """transformers looks for packed rows in the positions of each batch, and waits for the device to tell."""
    with mock.patch('transformers.masking_utils.find_packed_sequence_indices', lambda _: None, create=True):
        yield
