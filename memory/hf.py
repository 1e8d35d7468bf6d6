"""
The peak memory of fine-tuning any Hugging Face model on one GPU, known without a GPU: its own code on fake tensors.

    python memest.py --hf=path/to/folder                                # plain fine-tuning, bf16, AdamW
    python memest.py --hf=config.json --method=qlora --batch=1 --seq=1024 --optimizer=paged_adamw8bit
    python memest.py --hf=config.json --fit --gpu_gb=24                 # what fits, with the largest batch
    python memest.py --hf=config.json --gpus=4 --checkpointing          # each of four cards: DDP, ZeRO-1/2/3
    python memest.py --hf --help                                        # every flag
    plan = trace_hf('config.json', method='lora', seq=2048, checkpointing=True)

transformers builds the model, and three training steps of it run. Where peft and bitsandbytes would put LoRA and NF4
layers, layers with the same memory stand in, and every storage takes its block from a simulated allocator. What CUDA
does differently from a CPU is told by hand: attention's kernels, dropout's masks, cuBLAS's workspaces. Neither peft,
bitsandbytes nor weights are needed; a 7B takes about 10 seconds.
Not for: tensor parallelism, torch.compile, packages that bring kernels of their own (Liger, Unsloth), padding masks, a
card so full that the allocator gives cached segments back.
"""

import contextlib
import logging
import os
import re
from dataclasses import dataclass, field
from functools import partial
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from data import fields
from memory.cuda import CONTEXT, WORKSPACE, WORKSPACE_HOPPER, CudaAutocast, Recorder, cuda_attention, cuda_dropout
from memory.hf_layers import OPTIMIZERS, LoRA, NF4Linear, make_optimizer

aten = torch.ops.aten

# What is added to a plan before it is compared with a card (results/memest_points.md): for a block that fits no gap;
# and where lengths vary, for blocks cached for shorter batches than the longest.
MARGIN, MARGIN_VARYING = 0.05, 0.20

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
ALIASES = {'adamw_torch': 'adamw', 'adamw_torch_fused': 'adamw_fused', 'adamw_bnb_8bit': 'adamw8bit'}
ALIASES |= {'adamw_8bit': 'adamw8bit', 'paged_adamw_8bit': 'paged_adamw8bit', 'paged_adamw_32bit': 'paged_adamw32bit'}
CHOICES = dict(
    method=('full', 'lora', 'qlora'),
    dtype=DTYPES,
    optimizer=OPTIMIZERS,
    attention=('sdpa', 'noflash', 'flash', 'eager'),
    autocast=('', 'bf16', 'fp16'),
    lora_dtype=DTYPES,
    loss=('transformers5', 'shifted'),
)
TARGETS = {'attention': ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'out_proj', 'c_attn', 'query_key_value', 'qkv_proj')}


@dataclass
class HFPlan:
    """Bytes. `allocated` and `reserved` are what torch.cuda.max_memory_allocated and max_memory_reserved would say,
    `total` what nvidia-smi would: reserved, CUDA's context, and optimizer states in unified memory (`paged`).

    weights: with LoRA's factors; states: the optimizer's on the card; workspaces: cuBLAS's; phase, operation: where
    `allocated` was first reached; pieces: what llmem.several_gpus distributes."""

    weights: int = 0
    states: int = 0
    workspaces: int = 0
    allocated: int = 0
    reserved: int = 0
    paged: int = 0
    context: int = CONTEXT
    live: int = 0  # the storages' peak, before rounding and without workspaces
    parameters: int = 0
    trained: int = 0
    phase: str = ''
    operation: str = ''
    pieces: dict = field(default_factory=dict)

    @property
    def total(self):
        return self.reserved + self.paged + self.context


def trace_hf(
    config,
    method='full',  # 'full' | 'lora' | 'qlora'
    batch=1,  # rows in a micro-batch
    seq=512,  # tokens in a row
    dtype='bf16',  # 'fp32' | 'bf16' | 'fp16': of the weights; where NF4 takes their place, of its products
    optimizer='adamw',  # torch's default on CUDA, foreach; or adamw_loop, adamw_fused, sgd, adamw8bit, lomo ...
    checkpointing=False,  # keep only each block's input, and run the block again in backward
    attention='sdpa',  # 'sdpa' | 'noflash' (SDPA of a Windows wheel) | 'flash' (the package flash-attn) | 'eager'
    autocast='',  # 'bf16' | 'fp16', as in Trainer(bf16=True)
    lora_rank=16,  # r
    lora_targets='attention',  # 'attention', 'all' linear layers but the head, or last parts of names: q_proj,v_proj
    lora_dropout=0.0,  # share of the factors' inputs that is zero in training; any but 0 keeps a mask
    lora_dtype='fp32',  # of the factors: peft makes them fp32 over 16-bit weights
    double_quant=True,  # NF4's scales in 8 bits
    kbit_fp32=True,  # norms, embeddings and head in fp32, as peft's prepare_model_for_kbit_training puts them
    loss='transformers5',  # 'transformers5' | 'shifted', as before 4.50, with a copy of the logits
    warmup=True,  # where NF4 is loaded: transformers 5 allocates the room for all weights at once, and frees it
    keep_outputs=True,  # a step's logits live until the next step's are made, as in a plain loop; False: as in Trainer
    reentrant=True,  # the kind of checkpoints: torch's use_reentrant
    hopper=False,  # the larger workspaces of an H100
    cuda=True,  # False: this CPU's kernels, no workspaces
    context=CONTEXT,  # bytes of CUDA's own
    steps=3,  # reserved bytes can still grow in the second and third
):
    """The HFPlan of some steps of this config: a folder with a config.json, such a file, or a transformers config.
    ValueError, in one sentence, for what cannot be."""
    optimizer = ALIASES.get(optimizer, optimizer)
    words = dict(method=method, dtype=dtype, lora_dtype=lora_dtype, autocast=autocast, optimizer=optimizer)
    check(words | dict(attention=attention, loss=loss), dict(batch=batch, seq=seq, lora_rank=lora_rank, steps=steps))
    config = read_config(config) if isinstance(config, (str, os.PathLike)) else config
    recorder = Recorder(cuda, WORKSPACE_HOPPER if hopper else WORKSPACE)
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # transformers looks for packed sequences in the positions, and would take fake positions for such, and mask
        name = 'transformers.masking_utils.find_packed_sequence_indices'
        stack.enter_context(patch(name, lambda _: None, create=True))
        model = build(config, DTYPES[dtype], attention)
        if cuda:
            as_on_a_card(stack, attention)
        stack.enter_context(recorder)
        load(model, method, recorder, DTYPES[dtype], double_quant, kbit_fp32, warmup and cuda)
        if method != 'full':
            model.requires_grad_(False)
            add_lora(model, lora_targets, lora_rank, lora_dropout, DTYPES[lora_dtype])
        prepare(model, method, checkpointing, reentrant, loss)
        plan = HFPlan(weights=recorder.now, context=context if cuda else 0)
        params = [p for p in model.parameters() if p.requires_grad]
        plan.parameters, plan.trained = count(model), sum(p.numel() for p in params)
        update = make_optimizer(optimizer, params)
        recorder.watch(params)
        train(model, update, recorder, batch, seq, DTYPES.get(autocast), steps, keep_outputs)
        fill(plan, recorder, update)
        plan.pieces = pieces(model, plan, recorder)
        del model, update, params
    return plan


# ---- before the steps ----------------------------------------------------------------------------------------------


def check(words, counts):
    for name, value in words.items():
        if value not in CHOICES[name]:
            raise ValueError(f'{name}={value!r} is unknown: use {", ".join(repr(known) for known in CHOICES[name])}')
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f'{name}={value} cannot be: use at least 1')
    if words['attention'] == 'flash' and (words['autocast'] or words['dtype']) == 'fp32':
        raise ValueError("attention='flash' takes 16 bits: use dtype='bf16', or attention='sdpa'")


def read_config(path):
    """The transformers config in a folder or a config.json; ValueError in one sentence where there is none."""
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ValueError('--hf builds the model with transformers: pip install transformers') from None
    file = os.path.join(path, 'config.json') if os.path.isdir(path) else path
    if not os.path.exists(file):
        raise ValueError(f'{file} does not exist: give --hf a folder with a config.json, or such a file')
    given = fields.read(file, {'model_type': fields.text()}, ValueError, 'give --hf the config.json of a model')
    for name, value in given.items():  # each is a module to build: no published model has a tenth of that
        if type(value) is int and value > 10_000 and re.search('layers?$|experts?$|blocks?$', name):
            raise ValueError(f'{file}: {name}={value} is more than 10,000: give --hf the config.json of a model')
    try:
        return AutoConfig.for_model(**given)
    except Exception as e:
        reason = str(e).split('\n')[0][:200]
        raise ValueError(f'{file} is not a config that this transformers knows: {reason}') from None


def as_on_a_card(stack, attention):
    kernels = partial(cuda_attention, flash=attention != 'noflash')
    stack.enter_context(patch.object(F, 'scaled_dot_product_attention', kernels))
    stack.enter_context(patch.object(F, 'dropout', cuda_dropout))
    stack.enter_context(CudaAutocast())
    # a step that cannot run is told in a sentence; torch would print its traceback besides
    stack.enter_context(patch.object(logging.getLogger('torch._subclasses.fake_tensor'), 'disabled', True))


def build(config, dtype, attention):
    """The model on fake tensors, in its final dtype; ValueError where transformers cannot build it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:  # the package flash-attn is not needed: with a full mask it keeps what torch's flash attention keeps
        how = 'eager' if attention == 'eager' else 'sdpa'
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=how)
        except ValueError as e:
            if 'scaled_dot_product_attention' not in str(e):
                raise
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation='eager')
    except Exception as e:  # transformers has all kinds, for all a config.json can say
        reason = str(e).split('\n')[0][:200]
        raise ValueError(f'transformers cannot build a causal language model of this config: {reason}') from None


def load(model, method, recorder, dtype, double_quant, kbit_fp32, warmup):
    """Move each weight to the card: in the model's order, as .to('cuda') does; NF4 by name, as from_pretrained does."""
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    packed = {
        id(m.weight): m
        for m in modules.values()
        if method == 'qlora' and m is not head and (isinstance(m, nn.Linear) or type(m).__name__ == 'Conv1D')
    }
    names = [(name, p) for name, p in model.named_parameters()]  # a tied one once
    if method == 'qlora':
        names.sort(key=lambda item: [(x.isalpha(), int(x) if x.isdigit() else 0, x) for x in item[0].split('.')])
        if warmup:
            room = sum(p.numel() * (0.5 if id(p) in packed else p.element_size()) for _, p in names)
            recorder.allocator.free(recorder.allocator.malloc(int(room)))
    new = {}
    with torch.no_grad():
        for name, p in names:
            owner, _, last = name.rpartition('.')
            module = modules[owner]
            module._parameters[last] = q = nn.Parameter(torch.empty_like(p))
            if id(p) in packed:
                replace_module(model, owner, NF4Linear(module, dtype, double_quant))
                module._parameters.clear()
            else:
                new[id(p)] = q
            del q
        for module in model.modules():  # weights that are tied to others, and buffers
            for name, p in module._parameters.items():
                if p is not None and id(p) in new:
                    module._parameters[name] = new[id(p)]
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = torch.empty_like(b)
        if method == 'qlora' and kbit_fp32:
            for p in model.parameters():
                if p.dtype in (torch.bfloat16, torch.float16):
                    p.data = p.data.to(torch.float32)


def replace_module(model, name, module):
    parent, _, last = name.rpartition('.')
    setattr(model.get_submodule(parent), last, module)


def add_lora(model, targets, rank, dropout, dtype):
    """Wrap the linear layers that `targets` names; ValueError where it names none."""
    head = model.get_output_embeddings()
    kinds = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, (nn.Linear, NF4Linear)) or type(module).__name__ == 'Conv1D') and module is not head
    }
    known = sorted({name.split('.')[-1] for name in kinds})
    wanted = known if targets == 'all' else TARGETS.get(targets) or [t.strip() for t in targets.split(',')]
    chosen = [name for name in kinds if name.split('.')[-1] in wanted]
    if not chosen:
        raise ValueError(f"lora_targets={targets!r} names no layer of this model: use 'all', or some of {known}")
    for name in chosen:
        replace_module(model, name, LoRA(kinds[name], rank, dropout, dtype))


def count(model):
    """Parameters as one publishes their number: packed weights in full, LoRA's too, tied ones once."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
    return packed + sum(p.numel() for p in model.parameters())


# ---- the steps -----------------------------------------------------------------------------------------------------


def prepare(model, method, checkpointing, reentrant, loss):
    """What Trainer or a loop of one's own sets before the first step."""
    model.train()
    if checkpointing:
        name = 'activation_checkpointing_enable'  # since 5.20 or so
        getattr(model, name, model.gradient_checkpointing_enable)({'use_reentrant': reentrant})
        if method != 'full':  # as peft does: a checkpoint whose inputs need no gradient gives none at all
            model.enable_input_require_grads()
    if loss == 'shifted':
        model.loss_function = shifted_loss


def train(model, update, recorder, batch, seq, autocast, steps, keep_outputs):
    """A plain training loop. The attention mask is full, in which case transformers hands none to the kernels."""
    outputs = None
    try:
        for _ in range(steps):
            recorder.phase = 'forward'
            tokens = torch.zeros(batch, seq, dtype=torch.int64)
            labels, mask = torch.zeros_like(tokens), torch.ones_like(tokens)  # noqa: F841, part of a batch
            with torch.autocast('cpu', autocast) if autocast else contextlib.nullcontext():
                outputs = model(input_ids=tokens, labels=labels)
            value = outputs.loss
            if not keep_outputs:
                outputs = None
            recorder.phase = 'backward'
            value.backward()
            recorder.phase = 'optimizer'
            update.step()
            update.zero_grad()
            recorder.gradients.clear()
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as e:
        reason = ' '.join(str(e).split())[:200]
        raise ValueError(f'a step of {type(model).__name__} does not run on fake tensors: {reason}') from e


def fill(plan, recorder, update):
    """Write into the plan what the recorder and the optimizer hold after the steps."""
    kept = [t for state in update.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.ndim]
    plan.states, plan.paged = sum(t.nbytes for t in kept), getattr(update, 'unified', 0)
    card = recorder.allocator
    plan.live, plan.allocated, plan.reserved = recorder.peak, card.peak_allocated, card.peak_reserved
    plan.workspaces = recorder.workspace * len(recorder.workspaces)
    plan.phase, plan.operation = recorder.where


def pieces(model, plan, recorder):
    """The parts that llmem.several_gpus distributes, for all ways but tensor parallelism: which activations that would
    cut is known only for code of one's own. layer: the largest of the longest list of modules."""

    def size(module):
        return sum(p.nbytes for p in module.parameters())

    kept, most = plan.weights + plan.states, recorder.beside_gradients
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    layers = [size(layer) for layer in max(lists, key=lambda some: sum(map(size, some)), default=[])]
    head = model.get_output_embeddings()
    return dict(
        weights=plan.weights,
        gradients=sum(p.nbytes for p in model.parameters() if p.requires_grad),
        states=plan.states + plan.paged,
        layer=max(layers, default=0),
        root=size(model) - sum(layers),
        head=0 if head is None else size(head),
        norms=sum(p.nbytes for p in model.parameters() if p.ndim == 1),
        temporaries=max(most['optimizer'] - kept, 0),
        activations=max(most['forward'], most['backward']) - kept,
        residual=0,
        logits=0,
    )


def shifted_loss(logits, labels, vocab_size, **_):
    """The loss of transformers before 4.50: a copy of the logits without the last token's."""
    logits = logits.float()
    shifted = logits[..., :-1, :].contiguous()  # (B, T - 1, V)
    return F.cross_entropy(shifted.view(-1, vocab_size), labels[..., 1:].contiguous().view(-1))
