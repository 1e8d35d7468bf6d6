"""
The peak memory of somebody else's training script on one GPU, known without a GPU: three of its steps on fake tensors.

    python memest.py --script='finetune.py --epochs=3 --lr=2e-5'          # a loop of torch, or transformers' Trainer
    python memest.py --script='finetune.py' --gpu_gb=24 --json
    plan = plan_script(['finetune.py', '--lr=2e-5'])                      # an HFPlan, and how many numbers it read

The script runs as it would on a machine without CUDA, and is stopped after its third optimizer step. Parameters and
buffers are fake from birth: they have shapes and take no memory, so a model of any size is planned on a laptop;
transformers' from_pretrained reads the config.json and no weights. What data loaders make is real. What a card does
differently is told by hand, as in hf.py. A number that the script reads from a tensor, such as the loss that it prints,
has no value here: it is taken as 1, and counted.
Not for: scripts that insist on CUDA, that load weights in 4 bits, or whose step depends on numbers that it computes;
torch.compile; several processes.
"""

import contextlib
import dataclasses
import json
import logging
import os
import runpy
import shlex
import sys
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _disable_current_modes

from memory.cuda import CONTEXT, WORKSPACE, CudaAutocast, Recorder, cuda_attention, cuda_dropout
from memory.hf import HFPlan, fill
from memory.hf_command import table

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default)  # a number from a tensor
STEPS = 3  # reserved bytes can still grow in the second and third


class Enough(BaseException):
    """The steps that a plan needs are taken. No `except Exception` of a script holds it up."""


class OnFakeTensors(Recorder):
    """Records the storages of fake tensors alone; batches and what else is real stays in main memory. asked: how many
    numbers the script read from fake tensors; taken: its optimizer steps; modules: the outermost that computed."""

    def __init__(self, on_card):
        super().__init__(cuda=on_card, workspace=WORKSPACE)
        self.mode, self.depth, self.modules = FakeTensorMode(allow_non_fake_inputs=True), 0, {}
        self.asked, self.taken, self.optimizer = 0, 0, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in READS:
            if not isinstance(args[0], FakeTensor):
                with _disable_current_modes():
                    return function(*args)
            self.asked += 1
            if args[0].dtype == torch.bool:
                return hasattr(args[0], 'is_so')
            return 1.0 if args[0].dtype.is_floating_point else 1
        return super().__torch_dispatch__(function, types, args, kwargs)

    def add(self, storage, tensor=None, function=None):
        if isinstance(tensor, FakeTensor):
            super().add(storage, tensor, function)

    def fake(self, tensor):
        """A fake tensor of this one's shape and dtype; itself, where it is none, or is fake already."""
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor) or tensor.is_meta:
            return tensor
        with _disable_current_modes(), self.mode:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        self.add(made.untyped_storage(), made)
        return made

    # What a model makes while it computes is fake, too: torch.arange of its positions, say.

    def enters(self, module, inputs):
        if not self.depth:
            self.modules[id(module)] = module
            self.phase = 'forward' if self.phase != 'backward' else self.phase  # a checkpoint computes again
            self.__exit__(None, None, None)
            self.mode.__enter__()
            self.__enter__()
        self.depth += 1

    def leaves(self, module, inputs, output):
        self.depth -= 1
        if not self.depth:
            self.__exit__(None, None, None)
            self.mode.__exit__(None, None, None)
            self.__enter__()

    def step_begins(self, optimizer, *_):
        self.phase = 'optimizer'

    def step_ends(self, optimizer, *_):
        self.taken += 1
        self.optimizer = optimizer
        self.gradients.clear()
        if self.taken == STEPS:
            raise Enough


class OnCpu(torch.overrides.TorchFunctionMode):
    """Where a script names a CUDA device, the CPU. Questions that a step asks of numbers get the usual answer: is the
    loss finite, is there no padding: yes; any other: no."""

    YES = (torch.isfinite, torch.Tensor.isfinite, torch.all, torch.Tensor.all)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def here(value):
            named = isinstance(value, (str, torch.device)) and str(value).partition(':')[0] == 'cuda'
            return type(value)('cpu') if named else value

        if function is torch.Tensor.cuda:
            return args[0]
        out = function(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})
        if function in self.YES and isinstance(out, FakeTensor):
            out.is_so = True
        return out


def apply(module, function, recurse=True):
    """nn.Module._apply, which would swap fake tensors for others and cannot: `.data` takes the new ones, as of real."""
    for child in module.children() if recurse else ():
        apply(child, function)
    with torch.no_grad():
        for p in [p for p in module._parameters.values() if p is not None]:
            p.data = function(p)
        for name, tensor in module._buffers.items():
            module._buffers[name] = function(tensor) if tensor is not None else None
    return module


def prepare(stack, record):
    """Until the stack is left: parameters and buffers are fake, CUDA is this CPU with a card's kernels."""
    new, register, initialise = torch.nn.Parameter.__new__, torch.nn.Module.register_buffer, torch.autocast.__init__
    backward = torch.autograd.backward

    def parameter(cls, data=None, requires_grad=True):
        return new(cls, record.fake(torch.empty(0) if data is None else data), requires_grad)

    def buffer(module, name, tensor, persistent=True):
        return register(module, name, record.fake(tensor), persistent)

    def autocast(self, device_type='cuda', *args, **kwargs):
        return initialise(self, 'cpu' if device_type == 'cuda' else device_type, *args, **kwargs)

    def in_backward(*args, **kwargs):
        record.phase = 'backward'
        return backward(*args, **kwargs)

    hooks = torch.nn.modules.module
    for handle in (
        hooks.register_module_forward_pre_hook(record.enters),
        hooks.register_module_forward_hook(record.leaves, always_call=True),
        register_optimizer_step_pre_hook(record.step_begins),
        register_optimizer_step_post_hook(record.step_ends),
    ):
        stack.callback(handle.remove)
    patches = [
        (torch.nn.Parameter, '__new__', parameter),
        (torch.nn.Module, 'register_buffer', buffer),
        (torch.nn.Module, '_apply', apply),
        (torch.nn.Module, 'cuda', lambda module, device=None: module),
        (torch.autocast, '__init__', autocast),
        (torch.autograd, 'backward', in_backward),
        (logging.getLogger('torch._subclasses.fake_tensor'), 'disabled', True),
    ]
    if record.cuda:
        patches += [(F, 'scaled_dot_product_attention', cuda_attention), (F, 'dropout', cuda_dropout)]
        stack.enter_context(CudaAutocast())
    for module in [module for name, module in sys.modules.items() if name.startswith('torch.optim.')]:
        if record.cuda and hasattr(module, '_default_to_fused_or_foreach'):  # on a card many tensors at once
            patches.append((module, '_default_to_fused_or_foreach', lambda *_, **__: (False, True)))
    for owner, name, other in patches:
        stack.enter_context(patch.object(owner, name, other))
    stack.enter_context(OnCpu())


def of_a_config(stack):
    """transformers' from_pretrained makes the model of a config.json and reads no weights."""
    import transformers

    def from_pretrained(cls, name, *args, config=None, **options):
        few = [key for key in ('quantization_config', 'load_in_4bit', 'load_in_8bit') if options.get(key)]
        if few or getattr(config, 'quantization_config', None):
            raise ValueError('it loads weights in few bits: python memest.py --hf=FOLDER --method=qlora plans those')
        config = config if config is not None else transformers.AutoConfig.from_pretrained(name)
        dtype = options.get('dtype', options.get('torch_dtype'))
        how = {key: options[key] for key in ('attn_implementation',) if options.get(key)}
        model = cls._from_config(config, dtype=config.dtype if dtype == 'auto' else dtype, **how)
        return model.eval()

    stack.enter_context(patch.object(transformers.PreTrainedModel, 'from_pretrained', classmethod(from_pretrained)))
    # It looks for packed sequences in the positions, and would take fake positions for such; and of a mask that is fake
    # it does not know that it masks nothing.
    for name, answer in (('find_packed_sequence_indices', None), ('is_tracing', False), ('fast_all', True)):
        replaced = patch(f'transformers.masking_utils.{name}', lambda *_, answer=answer: answer, create=True)
        stack.enter_context(replaced)


def plan_script(words, on_card=True):
    """-> the HFPlan of a script and its arguments, and how many numbers it read that have no value here. on_card: with
    CUDA's kernels; False: with this CPU's. ValueError, in one sentence, if it cannot be."""
    record, why = OnFakeTensors(on_card), None
    if not os.path.isfile(words[0]):
        raise ValueError(f'{words[0]} is not a file: give --script the script and its arguments, in quotes')
    with open(words[0], encoding='utf-8') as f:
        source = f.read()
    with contextlib.ExitStack() as stack:
        prepare(stack, record)
        if any(name in source for name in ('transformers', 'peft', 'trl')):
            of_a_config(stack)
        stack.enter_context(patch.object(sys, 'argv', list(words)))
        stack.enter_context(patch.object(sys, 'path', [os.path.dirname(os.path.abspath(words[0])), *sys.path[1:]]))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            with record:
                runpy.run_path(words[0], run_name='__main__')
        except Enough:
            pass
        except SystemExit as end:
            why = f'it ended with {end.code!r}' if end.code else None
        except Exception as error:
            why = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
    if why or record.taken < STEPS:
        why = why or f'it took {record.taken} optimizer steps, and a plan needs {STEPS}: give it more data'
        raise ValueError(f'{words[0]} does not run on fake tensors: {why}')
    return filled(record, CONTEXT if on_card else 0), record.asked


def filled(record, context):
    plan = HFPlan(context=context)
    fill(plan, record, record.optimizer)
    held = [t for module in record.modules.values() for t in (*module.parameters(), *module.buffers())]
    plan.weights = sum({t.untyped_storage(): t.untyped_storage().nbytes() for t in held}.values())
    parameters = {id(p): p for module in record.modules.values() for p in module.parameters()}.values()
    plan.parameters = sum(p.numel() for p in parameters)
    plan.trained = sum(p.numel() for p in parameters if p.requires_grad)
    return plan


def main(own):
    """Print what `--script` asks for. own: memest.py's flags. Raises ValueError."""
    words = shlex.split(own['script'])
    plan, asked = plan_script(words)
    if 'json' in own:
        print(json.dumps(dataclasses.asdict(plan) | {'total': plan.total, 'numbers_read': asked}))
        return
    print(f'{own["script"]}, {STEPS} steps on a card: planned, not measured')
    print(table(plan, own.get('gpu_gb')))
    if asked:
        print(f'it read {asked} numbers from tensors, which have none here: each was taken as 1')
