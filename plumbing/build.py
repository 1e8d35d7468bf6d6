"""From a configuration to a data folder and a model: done once, before train.py's loop."""

import difflib
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import torch

from configurator import method_of
from data import DataError, fields, tokenizer
from data.batches import longest_of, of_task, read_meta
from data.fields import check, text, whole
from model import BETWEEN, SIZES, Linear, LLaMA, ModelConfig, ModelError
from plumbing import Stop, classify, hf_models
from plumbing.families import ADVICE, FAMILIES, read_config
from plumbing.folder import AdapterError, read_adapter
from plumbing.hf import PackedError, first_line, weights_folder
from plumbing.parallel import device_and_dtype
from plumbing.resume import CheckpointError, find
from plumbing.terminal import patience

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHAPE = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner', 'vocab_size')  # keys that override the shape of `model`


def data_sets():
    """The names of the folders that --dataset knows."""
    parent = os.path.join(ROOT, 'data')
    return sorted(d for d in os.listdir(parent) if os.path.exists(os.path.join(parent, d, 'prepare.py')))


def meant(name, known):
    """' (did you mean X?)' with the known name that is nearest to a path or a name, or ''."""
    near = difflib.get_close_matches(os.path.basename(os.path.normpath(name)), known, 1)
    return f' (did you mean {near[0]}?)' if near else ''


def data_folder(config, prepare=True):
    """The data set's folder. pystdlib, which needs no network, is prepared here if it is missing."""
    name = config.dataset
    folder = name if os.path.isdir(name) and '/' in name.replace(os.sep, '/') else os.path.join(ROOT, 'data', name)
    if not (os.path.isdir(folder) or of_task(folder)):
        use = f'use one of {", ".join(data_sets())}, or a path to a folder that prepare.py filled'
        raise DataError(f'no data set {name}{meant(name, data_sets())}: {use}')
    if prepare and name == 'pystdlib' and not os.path.exists(os.path.join(folder, 'meta.json')):
        print('preparing data/pystdlib', flush=True)
        subprocess.run([sys.executable, os.path.join(folder, 'prepare.py')], check=True)
    return folder


def check_tokenizer(model_folder, data_folder):
    """Raise DataError if model and data have different tokenizers: the ids of one mean nothing to the other."""
    wanted = tokenizer.identity(model_folder)
    if wanted is not None and not tokenizer.same(wanted, tokenizer.identity(data_folder)):
        raise DataError(
            f'{data_folder} was not made with the tokenizer of {model_folder}: prepare your text with it, '
            f'python data/text/prepare.py --input=FILES --tokenizer={model_folder}, and use --dataset=text'
        )


def is_native(folder, labels=0):
    """Is the model in a folder one of our own families, and not for transformers' modules to compute?"""
    path = os.path.join(folder, 'config.json')
    try:
        family = fields.read(path, {}, ModelError, ADVICE).get('model_type')
    except FileNotFoundError:
        return True  # which says what is missing
    return not labels and family in FAMILIES


def build_model(config, data, vocab_size, dtype, device, source=None, linear=Linear, labels=0):
    """The model on `device`: loaded from the Hugging Face folder `source`, or new if that is None. linear: the class of
    the blocks' linear layers. labels: of a classifier, see hf_models.Shape."""
    if source and device != 'meta':  # a plan needs no data
        check_tokenizer(source, data)
    if source and not is_native(source, labels):
        built = hf_models.load(source, config, dtype, device, linear, labels)
    elif source:
        if config.init_from != 'resume' and read_config(source)['packed_weights']:
            raise PackedError(source)
        check_targets(config)
        built = LLaMA.from_pretrained(
            source, dtype=dtype, device=device, block_size=config.block_size, linear=linear,
            prepare=lambda model: shrink_tables(model, config),
        )  # fmt: skip
    else:
        check_targets(config)
        with torch.device('meta'):
            built = LLaMA(new_shape(config, vocab_size), dtype=dtype, linear=linear)
        if device != 'meta':
            built.materialise(device, config.seed)
    if device != 'meta' or not source:
        check_vocabulary(built.config, vocab_size)
    built.checkpointing = config.checkpointing
    built.home = torch.device('cpu') if config.offload_activations else None
    if config.mlp_chunk and not hasattr(built, 'set_chunk'):
        raise Stop(f"mlp_chunk is of our own families, and {source} is computed by transformers' modules: leave it out")
    if config.mlp_chunk:
        built.set_chunk(config.mlp_chunk)
    return built


def shrink_tables(model, config):
    """Head and embedding as config.head_bits and offload_embedding say."""
    if config.head_bits == 16 and not config.offload_embedding:
        return
    if not hasattr(model, 'shrink_tables'):
        raise Stop("head_bits=8 and offload_embedding are of our own families, not of transformers': leave them out")
    model.shrink_tables(config.head_bits, torch.device('cpu') if config.offload_embedding else None)


def check_targets(config):
    """Raise Stop where a method makes the layers of our own families itself, all of them."""
    if config.targets != 'all' and config.method != 'lora' and layers_of(config) is not Linear:
        what = (
            f"targets='{config.targets}' leaves layers as they are, and method='{config.method}' makes all of a LLaMA's"
        )
        raise Stop(f'{what} anew: leave it out, or use --method=galore or lora')


def new_shape(config, vocab_size):
    """The ModelConfig of a new model: what `model` has, unless other keys say otherwise."""
    shape = SIZES[config.model] | {'vocab_size': vocab_size, 'block_size': config.block_size}
    return ModelConfig(**shape | {key: getattr(config, key) for key in SHAPE if getattr(config, key)})


def check_vocabulary(shape, vocab_size):
    if shape.vocab_size < vocab_size:
        raise ModelError(
            f'the data has {vocab_size} token ids, the model {shape.vocab_size}: '
            f'use --vocab_size={vocab_size}, or prepare the data with the tokenizer of the model'
        )
    return shape


def check_rank(config, shape):
    """Raise Stop if a rank was asked for that no matrix of a block has. The default may be: it is cut to the matrix."""
    D, F, Q = shape.n_embd, shape.n_inner, shape.n_head * shape.head_dim
    most = max(min(D, F), min(D, Q))
    asked = 'rank' in getattr(config, '_given', {}) and config.init_from != 'resume'
    if asked and getattr(config, 'rank', 0) > most:
        raise Stop(f'rank={config.rank} is above every dimension of the blocks: use less than {most}')


def compile_between(model, config, device):
    """Compile what lies between a block's products (model.BETWEEN), once for all layers, each tried on numbers of a
    block's size. If that fails, print why and leave the model as it is."""
    if hasattr(model, 'inner'):  # whose dropout draws from a seed of each step, which would be compiled in
        return print("compile off: transformers' own modules are not compiled here")
    places = [(module, name) for module in model.modules() for name in BETWEEN if hasattr(type(module), name)]
    try:
        with patience('compiling'):
            compiled = {getattr(*place): torch.compile(getattr(*place)) for place in places}
            for function, arguments in examples_between(model, config.batch_size, config.block_size, device):
                made = compiled[function](*arguments)
                sum(A.sum() for A in (made if isinstance(made, tuple) else [made])).backward()
    except Exception as error:
        print(f'compile off: {type(error).__name__}: {first_line(error)}')
        return torch._dynamo.reset()
    for module, name in places:  # evaluation and sampling come in all shapes, which would each be compiled
        fast, plain = compiled[getattr(module, name)], getattr(module, name)
        setattr(module, name, partial(grad_or_not, fast, plain))


def grad_or_not(fast, plain, *arguments):
    return (fast if torch.is_grad_enabled() else plain)(*arguments)


def examples_between(model, B, T, device):
    """[(function, arguments)] of the first block's functions in BETWEEN, on B x T tokens that ask for gradients."""
    s, block, dtype = model.config, model.layers[0], model.activation_dtype
    attention, mlp, norm = block.self_attn, block.mlp, block.input_layernorm
    new = partial(torch.ones, device=device, dtype=dtype, requires_grad=True)
    weights = [new(A.shape, dtype=A.dtype) for A in norm.parameters()]
    found = [(norm.norm, (new(B, T, s.n_embd), weights[0], norm.eps, *weights[1:]))]
    if attention.rotates:
        q, k = (new(B, T, heads, s.head_dim) for heads in (s.n_head, s.n_kv_head))
        found.append((attention.rotated, (q, k, *(A.to(dtype) for A in model.rotary(T)))))
    return [*found, (mlp.gated, (new(B, T, s.n_inner), new(B, T, s.n_inner)))]


def layers_of(config):
    """The class of the blocks' linear layers: the method's own if it has one."""
    module = method_of(config)
    return module.linear(config) if hasattr(module, 'linear') else Linear


def labels_of(config, meta):
    """How many labels the model is to tell apart, 1 for a number, 0 for none. Data not prepared yet: it plans for 2."""
    if getattr(config, 'task', 'lm') == 'lm':
        return 0
    return len(meta['labels']) or 1 if meta and meta['task'] == 'classify' else 2


def build_on_meta(config):
    """-> the model on the meta device, the data folder, and that folder's meta.json (None if it is not prepared)."""
    _, dtype = device_and_dtype(config)
    folder, meta, vocab_size, source = where_from(config)
    layers, labels = layers_of(config), labels_of(config, meta)
    return build_model(config, folder, vocab_size, dtype, 'meta', source, layers, labels), folder, meta


def shape_of(config):
    """The ModelConfig of that model. A new one is not built for it: on the meta device torch would import its compiler,
    which takes as long as torch itself."""
    _, _, vocab_size, source = where_from(config)
    shape = build_on_meta(config)[0].config if source else check_vocabulary(new_shape(config, vocab_size), vocab_size)
    check_rank(config, shape)
    return shape


def rows_of(config):
    """What a plan has to know of the rows of examples: -> pieces in a packed one, the length of the longest padded one;
    0 where there is none, or where the data is not prepared yet."""
    try:
        folder = data_folder(config, prepare=False)
        meta = read_meta(folder)
    except DataError:
        return 0, 0
    if not meta['examples']:
        return 0, 0
    if config.packing and meta['task'] == 'lm':
        places = meta['train_tokens'] - meta['train_examples']
        return config.block_size * meta['train_examples'] // places + 2, 0
    return 0, min(longest_of(folder), config.block_size)


def where_from(config):
    """-> the data's folder, its meta (None: not prepared), the vocabulary's size, the folder with weights or None."""
    folder = os.path.join(ROOT, 'data', config.dataset)
    try:
        folder = data_folder(config, prepare=False)
        meta = read_meta(folder)
    except DataError:
        if not (os.path.isdir(folder) or of_task(folder)):
            raise
        meta = None
    vocab_size = meta['vocab_size'] if meta else SIZES[config.model]['vocab_size']
    if config.init_from not in ('scratch', 'resume') and not os.path.isdir(config.init_from):
        what = f"init_from='{config.init_from}' is no folder here, and a dry run downloads nothing"
        raise Stop(f'{what}: use --init_from=FOLDER, in which its config.json is enough')
    source = None if config.init_from in ('scratch', 'resume') else weights_folder(config.init_from)
    return folder, meta, vocab_size, source


def load_model(folder, device, factors=False, labels=0):
    """The model in a folder. If its weights are packed, it has the layers of the method that packed them.

    factors: load the packed weights even if the folder has dense ones, too. labels: of a classifier, else 0. Raises
    CheckpointError if they cannot be read."""
    if not factors:
        classify.check_head(folder, labels)
    labels = labels or hf_models.labels_of(folder) * factors
    if not is_native(folder, labels):
        linear = layers_of_run(folder) if factors else Linear
        model = hf_models.load(folder, SimpleNamespace(), None, device, linear, labels)
        if not factors:
            return model
    else:
        stored = read_config(folder)
        if not (stored['packed_weights'] or factors):
            return LLaMA.from_pretrained(folder, device=device)
        dtype = getattr(torch, stored['torch_dtype'] or stored['dtype'] or 'float32')
        model = LLaMA.from_pretrained(folder, dtype, device, linear=layers_of_run(folder))
    file = os.path.join(folder, 'optimizer.pt')
    try:
        packed = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
        layers = [module for module in model.modules() if hasattr(module, 'restore')]
        for layer, tensors in zip(layers, packed['layers'], strict=True):
            layer.restore(tensors)
    except Exception as error:
        raise CheckpointError(f'{file} is missing or broken ({first_line(error)}): {ADVICE}') from error
    return model


def layers_of_run(folder):
    """The class of the linear layers of the run that left the folder. Raises CheckpointError if run.json has none."""
    config = find(folder)[1]['config']
    try:
        if config['rank'] > 2**16:
            raise ValueError(f'rank={config["rank"]}')
        linear = layers_of(SimpleNamespace(**{'proj_type': 'paper', **config}))  # 'paper': see plumbing/resume.py
        linear(64, 64, device='meta')  # values that cannot be are refused here
        return linear
    except Exception as error:
        reason = f'{type(error).__name__}: {first_line(error)}'
        raise CheckpointError(f'{folder}/run.json has no configuration of its method ({reason}): {ADVICE}') from error


LORA_RUN = {'train_rest': text(), 'init_from': text(), 'merge_every': whole(0, 2**48)}


def base_of(folder):
    """-> path or name of the base model of a LoRA run, and whether embedding and head are the run's own.

    Raises AdapterError if the run changed more than that, so that an adapter would not reproduce it."""
    run = find(folder)[1] if os.path.exists(os.path.join(folder, 'run.json')) else {'config': {}}
    if run['config'].get('method') != 'lora':
        raise AdapterError(f'{folder} is no run of --method=lora, there is no adapter in it: use --save_to=DIR')
    c = SimpleNamespace(**check(run['config'], LORA_RUN, f'{folder}/run.json', AdapterError, ADVICE))
    alone = c.train_rest in ('no', 'tables')
    if not alone or c.init_from in ('scratch', 'resume') or 0 < c.merge_every <= run['step']:
        changed = 'merged its adapter into them' if alone else 'trained embeddings, head and norms, too'
        raise AdapterError(f'{folder} {changed}, so an adapter alone is not the model: use --save_to=DIR')
    if not os.path.isdir(c.init_from):
        return c.init_from, c.train_rest == 'tables'
    adapter = read_adapter(c.init_from)  # the run went on with that
    tables = c.train_rest == 'tables' or bool(adapter and adapter['modules_to_save'])
    return os.path.abspath(weights_folder(c.init_from)), tables
