"""
transformers' own modules behind the names that model.LLaMA has, so that methods, CoLM, checkpoints and memest take them
as they take ours: GPT-2, OPT, Phi-2, and whatever else AutoModelForCausalLM builds of a stack of blocks, and the
encoders and decoders of AutoModelForSequenceClassification.

    model = load('path/to/folder', config, torch.bfloat16, 'cuda', linear)            # tokens (B, T) -> logits, or loss
    model = load('path/to/roberta', config, torch.float32, 'cpu', linear, labels=3)    # -> logits (B, 3), or loss

hf_modules.py has the model; here it is read from a folder, and refused by name where it cannot be trained.
"""

import os

import torch

from data import fields
from model import Linear, ModelError
from plumbing.families import ADVICE
from plumbing.hf_modules import Shape, Transformers, kind_of, quiet

EXPERTS = ('num_local_experts', 'num_experts', 'n_routed_experts', 'moe_num_experts')


def load(folder, config, dtype=None, device='cpu', linear=Linear, labels=0):
    """The model in a folder of transformers' layout. config: the run's, of which it takes block_size, seed, targets and
    model_dropout; linear: the class of the blocks' linear layers, as in LLaMA; labels: see Shape.

    dtype None keeps the file's. On the meta device config.json alone is enough. Weights pass through main memory in
    their own dtype. A classifier that the folder has not is made anew, N(0, 0.02), by the seed. Raises ModelError."""
    if not getattr(config, 'save_merged', True):
        raise ModelError("save_merged=False is of our own families, not of transformers' models: leave it out")
    shape = read_shape(folder, config, labels)
    if torch.device(device).type == 'meta':
        return shape.blank(dtype or shape.hf.dtype, linear)
    try:
        with quiet():
            inner, told = kind_of(shape).from_pretrained(
                folder, config=shape.hf, dtype=dtype or 'auto', output_loading_info=True, local_files_only=True,
                ignore_mismatched_sizes=bool(labels), use_safetensors=True,
            )  # fmt: skip
    except Exception as error:  # transformers has all kinds, for all a folder can hold
        raise ModelError(f'{folder}: transformers cannot read its weights ({one_line(error)}): {ADVICE}') from None
    fill_new_head(inner, told, folder, shape)
    check_language_model(inner, folder, shape)
    return Transformers(inner, shape, linear, device)


def read_shape(folder, config, labels=0):
    """The Shape that a folder's config.json says. Raises ModelError for what cannot be trained here."""
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ModelError('this model is computed by transformers: pip install transformers') from None
    path = os.path.join(folder, 'config.json')
    given = fields.read(path, {'model_type': fields.text()}, ModelError, ADVICE)
    try:
        with quiet():
            hf = AutoConfig.for_model(**given)
    except Exception as error:
        raise ModelError(f'{path} is not a config that this transformers knows: {one_line(error)}') from None
    if getattr(hf, 'is_encoder_decoder', False) or not hasattr(hf, 'num_hidden_layers'):
        raise ModelError(f'{path}: model_type={hf.model_type!r} is no single stack of blocks: use another model')
    if any(getattr(hf, name, None) for name in EXPERTS):
        what = f"model_type={hf.model_type!r} has experts, and which of them a token's step moves depends on the token"
        raise ModelError(f'{path}: {what}: use a dense model')
    if labels:
        hf.num_labels = labels
        hf.problem_type = 'regression' if labels == 1 else 'single_label_classification'
    set_dropout(hf, getattr(config, 'model_dropout', -1.0))
    apart = getattr(config, 'method', '') != 'lora'  # whose other layers are frozen, and its own all the same
    targets = getattr(config, 'targets', 'all') if apart else 'all'
    try:
        shape = Shape(hf, labels, seed=getattr(config, 'seed', 0), targets=targets)
    except AttributeError as error:
        raise ModelError(f'{path}: model_type={hf.model_type!r} is no stack of blocks ({error}): use another') from None
    block_size = getattr(config, 'block_size', 0)
    if block_size > shape.max_positions:
        most = shape.max_positions
        raise ModelError(f'{folder} is made for windows of {most} tokens: set block_size to at most that')
    shape.block_size = block_size or shape.block_size
    return shape


def labels_of(folder):
    """How many labels the classifier in a folder has, 1 for a number; 0 where it holds another model."""
    path = os.path.join(folder, 'config.json')
    stored = fields.read(path, {}, ModelError, ADVICE) if os.path.exists(path) else {}
    kinds, names = stored.get('architectures'), stored.get('id2label')
    if not isinstance(kinds, list) or not any(str(kind).endswith('ForSequenceClassification') for kind in kinds):
        return 0
    return len(names) if isinstance(names, dict) and names else 2  # transformers' default


def set_dropout(hf, share):
    """All of a config's dropouts become `share`, if that is not negative; layerdrop, which skips whole blocks, 0."""
    for name, value in list(vars(hf).items()):
        if name == 'layerdrop':
            hf.layerdrop = 0.0
        elif share >= 0 and ('drop' in name or name.endswith('pdrop')) and type(value) in (int, float):
            setattr(hf, name, share)


@torch.no_grad()
def fill_new_head(inner, told, folder, shape):
    """Make what the folder has not of a classifier; raise ModelError for anything else that is missing."""
    body = inner.base_model_prefix + '.'
    odd = [key if isinstance(key, str) else key[0] for key in told['mismatched_keys']]
    lost = sorted({*told['missing_keys'], *odd})
    if wrong := [name for name in lost if not shape.labels or (name.startswith(body) and 'pooler' not in name)]:
        raise ModelError(f"{folder} lacks {len(wrong)} of the model's tensors, the first {wrong[0]}: {ADVICE}")
    generator = torch.Generator().manual_seed(shape.seed)
    for name in lost:
        p = inner.get_parameter(name)
        p.copy_(torch.randn(p.shape, generator=generator) * 0.02 if p.dim() > 1 else torch.zeros(p.shape))
    if lost and os.environ.get('RANK', '0') == '0':
        print(f'{folder} has no {", ".join(sorted({name.rpartition(".")[0] for name in lost}))}: made anew')


@torch.no_grad()
def check_language_model(inner, folder, shape):
    """Raise ModelError where a token sees what comes behind it, or logits are not the head's product with the hidden
    states, on which `hidden` and HeadLoss rest."""
    if shape.labels:
        return
    tokens = torch.tensor([[0, 1, 2], [0, 1, 3]]) % shape.vocab_size
    logits = inner(input_ids=tokens, use_cache=False).logits
    found = inner.get_output_embeddings()(inner.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    if not torch.allclose(logits[0, :2], logits[1, :2], rtol=1e-2, atol=1e-3):
        raise ModelError(
            f'{folder}: in {shape.family} a token sees those behind it, it is no language model: use another'
        )
    if found.shape != logits.shape or not torch.allclose(found, logits, rtol=1e-2, atol=1e-3):
        what = 'makes more of its logits than a product with its head, as a soft cap does'
        raise ModelError(f'{folder}: {shape.family} {what}, and its loss here would be another: use another model')


def one_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
