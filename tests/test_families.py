"""The families of model.py against transformers: numbers, folders in the layouts of transformers 4 and 5, adapters."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from model import LLaMA

T, WINDOW = 40, 64
TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4)
TINY |= dict(num_key_value_heads=2, max_position_embeddings=WINDOW, initializer_range=0.2, pad_token_id=None)
TINY |= dict(bos_token_id=1, eos_token_id=2)


def rope(kind='default', **more):
    return {'rope_parameters': {'rope_type': kind, 'rope_theta': more.pop('theta', 1e4), **more}}


LLAMA3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
LONG = dict(short_factor=[1.0, 1.25, 1.5, 2.0], long_factor=[1.0, 2.0, 4.0, 8.0], original_max_position_embeddings=16)
PARTLY = dict(short_factor=[1.0, 1.25, 1.5], long_factor=[1.0, 2.0, 4.0], original_max_position_embeddings=16)
YARN = dict(factor=4.0, original_max_position_embeddings=16)
FAMILIES = {  # name: (class, changes to TINY)
    'llama': ('Llama', {}),
    'llama, all biases': ('Llama', dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    'llama, linear': ('Llama', rope('linear', factor=4.0)),
    'llama, dynamic': ('Llama', rope('dynamic', factor=4.0) | dict(max_position_embeddings=16)),
    'llama, llama3': ('Llama', rope('llama3', theta=5e5, **LLAMA3)),
    'llama, yarn': ('Llama', rope('yarn', **YARN)),
    'llama, yarn with all its keys': (
        'Llama',
        rope('yarn', **YARN, beta_fast=16.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=1.1, truncate=False),
    ),
    'mistral, wide heads': ('Mistral', dict(head_dim=16, sliding_window=48)),
    'mistral, yarn': ('Mistral', rope('yarn', **YARN, attention_factor=1.3) | dict(sliding_window=None)),
    'qwen2': ('Qwen2', dict(tie_word_embeddings=True, **rope(theta=1e6))),
    'qwen2, yarn': ('Qwen2', rope('yarn', theta=1e6, **YARN)),
    'qwen3': ('Qwen3', dict(head_dim=16, **rope(theta=1e6))),
    'qwen3, biases': ('Qwen3', dict(head_dim=8, attention_bias=True)),
    'phi3': ('Phi3', dict(sliding_window=50)),
    'phi3.5': ('Phi3', rope('longrope', **LONG) | dict(original_max_position_embeddings=16)),
    'phi4-mini': (
        'Phi3',
        rope('longrope', **PARTLY, partial_rotary_factor=0.75) | dict(original_max_position_embeddings=16),
    ),
    'smollm3': ('SmolLM3', dict(num_hidden_layers=5, tie_word_embeddings=True, **rope(theta=5e6))),
    'smollm3, other layers': ('SmolLM3', dict(no_rope_layers=[0, 1], attention_bias=True, mlp_bias=True)),
    'granite': (
        'Granite',
        dict(attention_multiplier=0.1, embedding_multiplier=6.0, residual_multiplier=0.3, logits_scaling=0.5),
    ),
    'stablelm': ('StableLm', rope(partial_rotary_factor=0.25)),
    'stablelm 2': ('StableLm', dict(use_qkv_bias=True, layer_norm_eps=1e-3, **rope(partial_rotary_factor=0.5))),
}
X = torch.randint(0, 97, (2, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def transformers():
    library = pytest.importorskip('transformers')
    library.logging.set_verbosity(50)
    library.utils.logging.disable_progress_bar()
    return library


@pytest.fixture(scope='module')
def made(transformers, tmp_path_factory):
    """made(name) -> a random model of transformers, none of whose biases is zero and norms is one, and its folder."""
    known = {}

    def make(name):
        if name not in known:
            kind, changes = FAMILIES[name]
            config = getattr(transformers, f'{kind}Config')(**TINY | changes)
            model = getattr(transformers, f'{kind}ForCausalLM')(config).eval()
            generator = torch.Generator().manual_seed(0)
            for p in model.parameters():
                torch.nn.init.normal_(p, mean=0.5 * (p.dim() == 1), std=0.2, generator=generator)
            folder = tmp_path_factory.mktemp('theirs')
            model.save_pretrained(folder)
            known[name] = model, folder
        return known[name]

    return make


def close(a, b, **more):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, **more)


def as_split(state, config):
    """A state dict of transformers under our names."""
    held = {name.removeprefix('model.'): tensor for name, tensor in state.items()}
    for name in [name for name in held if '.qkv_proj.' in name or '.gate_up_proj.' in name]:
        Q, K = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        qkv = '.qkv_proj.' in name
        parts = held.pop(name).split((Q, K, K) if qkv else config.n_inner)
        for part, tensor in zip(('q_proj', 'k_proj', 'v_proj') if qkv else ('gate_proj', 'up_proj'), parts):
            held[name.replace('qkv_proj' if qkv else 'gate_up_proj', part)] = tensor
    return held


@pytest.mark.parametrize('name', FAMILIES)
def test_logits_and_loss_and_gradients_equal_transformers(name, made):
    theirs, folder = made(name)
    ours = LLaMA.from_pretrained(folder)
    assert ours.config.block_size >= T
    logits = theirs(X).logits
    assert logits.std() > 0.3, 'a model whose logits hardly differ proves nothing'
    close(ours(X), logits)
    short = X[:, :12]
    close(ours(short), theirs(short).logits)  # and not longer than what the model was made for
    targets = X.roll(-1, dims=1)
    targets[:, -1] = targets[0, :3] = -100
    expected = F.cross_entropy(theirs(X).logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    theirs.zero_grad()
    expected.backward()
    grads = as_split({name: p.grad for name, p in theirs.named_parameters()}, ours.config)
    for ours.checkpointing in (False, True):
        ours.zero_grad()
        loss = ours(X, targets)
        close(loss, expected)
        loss.backward()
        assert grads.keys() == dict(ours.named_parameters()).keys()
        for which, p in ours.named_parameters():
            torch.testing.assert_close(p.grad, grads[which], atol=1e-4, rtol=1e-3, msg=which)
    assert ours.n_params() == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize('name', FAMILIES)
def test_what_is_read_and_saved_again_is_equal_to_the_byte_and_loads_in_transformers(
    name, made, tmp_path, transformers
):
    theirs, folder = made(name)
    LLaMA.from_pretrained(folder).save_pretrained(tmp_path, shard_bytes=20_000)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(again) is type(theirs)
    before = load_file(folder / 'model.safetensors')
    after = {}
    for path in tmp_path.glob('*.safetensors'):
        after |= load_file(path)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    with torch.no_grad():
        assert torch.equal(again(X).logits, theirs(X).logits)
    for key in ('sliding_window', 'use_sliding_window', 'layer_types', 'eos_token_id', 'head_dim', 'rope_parameters'):
        said, read = (getattr(model.config, key, None) for model in (theirs, again))
        if key == 'rope_parameters':
            read.pop('type', None)  # a second name for rope_type, from what transformers 4 wants
        if said is not None:
            assert read == said, key
