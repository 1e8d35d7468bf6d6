"""From a configuration to a data folder and a model: what happens once, before train.py's loop."""

import difflib
import os
import subprocess
import sys

import torch

from checkpoint import first_line
from data import DataError, tokenizer
from model import SIZES, Linear, LLaMA, ModelConfig, ModelError, PackedError, read_json

ROOT = os.path.dirname(os.path.abspath(__file__))
SHAPE = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner', 'vocab_size')  # keys that override what `model` has


def data_folder(config, prepare=True):
    """The data set's folder; pystdlib's, which needs no network, is prepared on the spot."""
    name = config.dataset
    folder = name if os.path.isdir(name) and '/' in name.replace(os.sep, '/') else os.path.join(ROOT, 'data', name)
    if not os.path.isdir(folder):
        here = os.path.join(ROOT, 'data')
        have = sorted(d for d in os.listdir(here) if os.path.exists(os.path.join(here, d, 'prepare.py')))
        near = difflib.get_close_matches(name, have, 1)
        raise DataError(
            f'no data set {name}'
            + (f' (did you mean {near[0]}?)' if near else '')
            + f': use one of {", ".join(have)}, or a path to a folder that prepare.py filled'
        )
    if prepare and name == 'pystdlib' and not os.path.exists(os.path.join(folder, 'meta.json')):
        print('preparing data/pystdlib', flush=True)
        subprocess.run([sys.executable, os.path.join(folder, 'prepare.py')], check=True)
    return folder


def check_tokenizer(model_folder, data_folder):
    """Raise where model and data were made with different tokenizers: the ids of one are noise to the other."""

    def identity(folder):  # kind, and the vocabulary where there is a file of it; None where nothing is known
        meta, vocabulary = (os.path.join(folder, name) for name in ('meta.json', 'tokenizer.json'))
        kind = tokenizer.read_json(meta).get('tokenizer') if os.path.exists(meta) else None
        if kind in ('bpe', 'hf') and not os.path.exists(vocabulary):
            raise DataError(f'{vocabulary} is missing, which {meta} needs: put it back, or name another folder')
        model = tokenizer.read_json(vocabulary).get('model') if os.path.exists(vocabulary) else None
        return model or kind

    wanted = identity(model_folder)
    if wanted is not None and wanted != identity(data_folder):
        raise DataError(
            f'{data_folder} was not made with the tokenizer of {model_folder}: prepare your text with it, '
            f'python data/text/prepare.py --input=FILES --tokenizer={model_folder}, and use --dataset=text'
        )


def build_model(config, data, vocab_size, dtype, device, source=None, linear=Linear):
    """The model on `device`: from the Hugging Face folder `source`, or new where there is none. linear: the module that
    the method wants the blocks made of."""
    if source:
        check_tokenizer(source, data)
        if config.init_from != 'resume' and read_json(os.path.join(source, 'config.json')).get('packed_weights'):
            raise PackedError(source)
        built = LLaMA.from_pretrained(source, dtype=dtype, device=device, block_size=config.block_size, linear=linear)
    else:
        shape = SIZES[config.model] | {'vocab_size': vocab_size, 'block_size': config.block_size}
        shape |= {key: getattr(config, key) for key in SHAPE if getattr(config, key)}
        with torch.device('meta'):
            built = LLaMA(ModelConfig(**shape), dtype=dtype, linear=linear)
        if device != 'meta':
            built.materialise(device, config.seed)
    if built.config.vocab_size < vocab_size:
        raise ModelError(
            f'the data has {vocab_size} token ids, the model {built.config.vocab_size}: '
            f'use --vocab_size={vocab_size}, or prepare the data with the tokenizer of the model'
        )
    built.checkpointing = config.checkpointing
    return built


def download(name):
    """A model of the Hugging Face hub, as a local folder."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=['*.json', '*.safetensors'])
    except Exception as error:
        reason = first_line(error)
        raise ModelError(
            f"init_from='{name}' is no folder here and the hub did not give it ({reason}): "
            'name a folder with config.json and model.safetensors'
        ) from None


def try_compile(model, x, y):
    """torch.compile where it works; where it does not, say why and go on without."""
    try:
        compiled = torch.compile(model)
        compiled(x, y)
        return compiled
    except Exception as error:
        print(f'compile off: {type(error).__name__}: {first_line(error)}')
        torch._dynamo.reset()
        return model
