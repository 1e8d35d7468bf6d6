"""The families of model.py against transformers: numbers, folders in the layouts of transformers 4 and 5, adapters."""

import json
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_contract import NAMES, assert_same, config_of, everything, linear_of
from test_folders import one_sentence, spoiled
from test_galore import train
from test_lora import CONFIG as LORA

import configurator
import coreset
import lora
import sample
from data import tokenizer
from data.tokenizer_files import files_of
from model import LLaMA, ModelConfig, ModelError
from plumbing import build, checkpoint, hf
from plumbing.cache import KVCache
from plumbing.families import config_from_hf, config_to_hf

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


@pytest.mark.parametrize('name', ['qwen3', 'phi4-mini', 'smollm3', 'granite', 'stablelm 2'])
def test_cached_forward_equals_uncached_for_rows_of_unequal_length(name, made):
    model = LLaMA.from_pretrained(made(name)[1])
    with torch.no_grad():
        expected = model(X[:, :15])
        cache = KVCache(model.config, batch_size=2)
        for b, length in enumerate((3, 8)):
            model(X[b : b + 1, :length], cache=cache.row(b))
        cache.lengths = [3, 8]
        found = [model(torch.stack([X[0, 3 + t], X[1, 8 + t]])[:, None], cache=cache)[:, 0] for t in range(7)]
    close(torch.stack(found, 1), torch.stack([expected[0, 3:10], expected[1, 8:15]]))


@pytest.mark.parametrize('name', ['qwen3', 'phi4-mini', 'smollm3', 'granite', 'stablelm 2'])
def test_a_batch_of_texts_is_that_of_transformers(name, made):
    theirs, folder = made(name)
    model, generator = LLaMA.from_pretrained(folder), torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, model.config.vocab_size, (n,), generator=generator).tolist() for n in (3, 9, 1, 6)]
    with sample.decoded(model):
        ours = dict(sample.generate_batch(model, prompts, 8, batch_size=3))
    for i, ids in enumerate(prompts):
        options = dict(do_sample=False, max_new_tokens=8, min_new_tokens=8, eos_token_id=None, pad_token_id=0)
        assert theirs.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() == ours[i]


# ---- config.json: two layouts, and what a field means ------------------------------------------------------------


def layout_4(stored):
    """A config.json of today as transformers 4 wrote it."""
    rope = dict(stored.pop('rope_parameters'))
    stored |= {'rope_theta': rope.pop('rope_theta'), 'torch_dtype': stored.pop('dtype'), 'rope_scaling': None}
    if 'partial_rotary_factor' in rope:
        stored['partial_rotary_factor'] = rope.pop('partial_rotary_factor')
    if stored['model_type'] == 'phi3':
        rope.pop('original_max_position_embeddings', None)
        rope['type'] = rope.pop('rope_type')
    if rope.get('rope_type', rope.get('type')) != 'default':
        stored['rope_scaling'] = rope
    stored.pop('layer_types', None)
    return stored


@pytest.mark.parametrize('name', [name for name in FAMILIES if name != 'smollm3, other layers'])
def test_folders_in_the_layout_of_transformers_4_load_and_what_we_save_holds_both(name, made, tmp_path):
    theirs, folder = made(name)
    shutil.copytree(folder, tmp_path / 'old')
    stored = json.loads((folder / 'config.json').read_text())
    (tmp_path / 'old/config.json').write_text(json.dumps(layout_4(dict(stored))))
    ours = LLaMA.from_pretrained(tmp_path / 'old')
    assert torch.equal(ours(X), LLaMA.from_pretrained(folder)(X))
    ours.save_pretrained(tmp_path / 'new')
    written = json.loads((tmp_path / 'new/config.json').read_text())
    for layout in (
        layout_4(dict(written)),
        {k: v for k, v in written.items() if k not in ('rope_theta', 'rope_scaling', 'torch_dtype')},
    ):
        (tmp_path / 'new/config.json').write_text(json.dumps(layout))
        assert torch.equal(LLaMA.from_pretrained(tmp_path / 'new')(X), ours(X))
        with torch.no_grad():
            assert torch.equal(type(theirs).from_pretrained(tmp_path / 'new')(X).logits, theirs(X).logits)
    assert written['torch_dtype'] == written['dtype'] == 'float32'


SHAPE = {key: TINY[key] for key in TINY if key not in ('num_key_value_heads', 'max_position_embeddings')} | dict(
    num_attention_heads=32, hidden_size=64
)
PHI = dict(model_type='phi3', **SHAPE)


@pytest.mark.parametrize('family', ['llama', 'mistral', 'qwen2', 'qwen3', 'phi3', 'smollm3', 'granite', 'stablelm'])
def test_a_missing_field_means_what_it_means_to_the_family(family, transformers):
    shape = SHAPE | dict(hidden_size=256)
    ours = config_from_hf(dict(model_type=family, **shape))
    theirs = transformers.AutoConfig.for_model(family, **shape)
    said = theirs.rope_parameters
    head_dim = getattr(theirs, 'head_dim', None) or 8
    assert ours.n_kv_head == theirs.num_key_value_heads and ours.head_dim == head_dim
    assert ours.max_positions == theirs.max_position_embeddings and ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.norm_eps == getattr(theirs, 'rms_norm_eps', getattr(theirs, 'layer_norm_eps', None))
    assert ours.rope_theta == said['rope_theta']
    assert ours.rotary_dim == int(head_dim * said.get('partial_rotary_factor', 1.0))
    sliding = theirs.sliding_window if family == 'mistral' else None
    assert ours.block_size == (sliding or theirs.max_position_embeddings)
    silent = getattr(theirs, 'no_rope_layers', None) or [1] * ours.n_layer
    assert list(ours.no_rope) == [i for i, rotates in enumerate(silent) if not rotates]


SLIDING = [
    (dict(sliding_window=16, use_sliding_window=False), WINDOW),
    (dict(sliding_window=16), WINDOW),
    (dict(sliding_window=16, use_sliding_window=True, max_window_layers=2), WINDOW),
    (dict(sliding_window=16, use_sliding_window=True, max_window_layers=1), 16),
    (dict(sliding_window=16, use_sliding_window=True, layer_types=['full_attention'] * 2), WINDOW),
    (dict(sliding_window=16, use_sliding_window=True, layer_types=['full_attention', 'sliding_attention']), 16),
    (dict(sliding_window=None, use_sliding_window=True, max_window_layers=0), WINDOW),
]


@pytest.mark.parametrize('family', ['qwen2', 'qwen3'])
@pytest.mark.parametrize('fields,context', SLIDING, ids=str)
def test_a_qwens_context_is_cut_only_where_layers_slide(fields, context, family, transformers):
    given = dict(TINY, model_type=family, **fields)
    ours = config_from_hf(given)
    assert ours.block_size == context and ours.max_positions == WINDOW
    theirs = transformers.AutoConfig.for_model(family, **{**TINY, **fields})
    assert ('sliding_attention' in theirs.layer_types and theirs.sliding_window == 16) == (context == 16)
    assert config_to_hf(ours)['sliding_window'] == fields['sliding_window']  # goes on as it came


def test_within_its_window_a_sliding_model_is_an_ordinary_one_and_beyond_it_is_refused(made):
    theirs, folder = made('phi3')
    ours = LLaMA.from_pretrained(folder)
    assert ours.config.block_size == 50
    longest = torch.randint(0, 97, (1, 50), generator=torch.Generator().manual_seed(1))
    close(ours(longest), theirs(longest).logits)
    with pytest.raises(ModelError, match='51 tokens do not fit the window of 50'):
        ours(torch.zeros(1, 51, dtype=torch.int64))
    with pytest.raises(ModelError, match='made for windows of 50 tokens: set block_size'):
        LLaMA.from_pretrained(folder, block_size=64)


def test_packed_windows_beyond_longropes_first_length_are_refused(made):
    model = LLaMA.from_pretrained(made('phi3.5')[1])
    pieces = torch.tensor([0, 5, 12, 24, 32], dtype=torch.int32)
    alone = [model(X[0:1, :5]), model(X[0:1, 5:12])]
    packed = model(X[:, :12].contiguous(), pieces=torch.tensor([0, 5, 12, 24], dtype=torch.int32))
    close(packed[:1], torch.cat(alone, 1))
    with pytest.raises(ModelError, match='under longrope no window of over 16 tokens is packed: use a smaller block'):
        model(X[:, :17].contiguous(), pieces=pieces)


LONGROPE = dict(type='longrope', short_factor=[1.0], long_factor=[2.0])
REFUSED = {
    "qk_layernorm=True is not what this LLaMA computes": dict(model_type='stablelm', qk_layernorm=True),
    'use_parallel_residual=True': dict(model_type='stablelm', use_parallel_residual=True),
    "model_type='gemma3_text'": dict(model_type='gemma3_text'),
    "model_type='gemma2'": dict(model_type='gemma2'),
    "model_type='olmo2'": dict(model_type='olmo2'),
    "model_type='phi'": dict(model_type='phi'),
    'no_rope_layers has 1 numbers, fewer than layers': dict(model_type='smollm3', no_rope_layers=[1]),
    'short_factor has 2 numbers, not 1': PHI | dict(rope_scaling=LONGROPE | dict(short_factor=[1.0, 1.0])),
    'head_dim=64 is not hidden_size': dict(model_type='stablelm', head_dim=64),
    'logits_scaling=4.0': dict(model_type='llama', logits_scaling=4.0),
    'lm_head_bias=True': PHI | dict(lm_head_bias=True),
    'use_mrope=True': dict(model_type='qwen2', use_mrope=True),
    'attention_dropout=0.1': dict(model_type='qwen2', attention_dropout=0.1),
    'contradict each other': dict(
        model_type='phi3', partial_rotary_factor=0.5, rope_parameters={'partial_rotary_factor': 1.0}
    ),
    'partial_rotary_factor 0 dimensions of a head would rotate': dict(model_type='stablelm'),
    "rope_type='proportional'": dict(rope_parameters={'rope_type': 'proportional', 'rope_theta': 1e4}),
    'only one rotation': dict(
        model_type='qwen3',
        rope_parameters={'full_attention': {'rope_theta': 1e6}, 'sliding_attention': {'rope_theta': 1e4}},
    ),
}


@pytest.mark.parametrize('words', REFUSED)
def test_what_a_family_cannot_say_is_refused_by_name(words):
    with pytest.raises(ModelError, match=words) as error:
        config_from_hf(dict(model_type='llama') | SHAPE | REFUSED[words])
    one_sentence(error)


def test_phi3_takes_the_outer_original_length_and_the_old_names_of_longrope(transformers):
    for name in ('su', 'yarn', 'longrope'):
        stored = PHI | dict(
            max_position_embeddings=128,
            original_max_position_embeddings=32,
            rope_scaling=LONGROPE | dict(type=name, original_max_position_embeddings=64),
        )
        ours = config_from_hf(stored)
        assert ours.rope_scaling['rope_type'] == 'longrope' and ours.rope_scaling['factor'] == 4.0
        assert ours.rope_scaling['original_max_position_embeddings'] == 32
        if name == 'su':  # transformers 5 no longer reads it
            continue
        theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(stored))).rope_parameters
        assert theirs['original_max_position_embeddings'] == 32 and theirs['rope_type'] == 'longrope'


def test_a_config_that_its_family_cannot_say_is_not_saved_as_another():
    for changes, words in {
        (('qk_norm', True),): "qk_norm=True is not what family='llama' can say",
        (('qkv_bias', True),): "qkv_bias=True is not what family='llama' can say",
        (('family', 'gpt2'),): "family='gpt2' is not known: use one of llama",
    }.items():
        with pytest.raises(ModelError, match=words):
            config_to_hf(ModelConfig(**dict(changes)))


@pytest.mark.parametrize(
    'name', ['qwen3', 'phi4-mini', 'smollm3', 'granite', 'stablelm 2', 'llama, yarn with all its keys']
)
def test_any_value_in_a_familys_config_is_read_or_one_sentence(name, made):
    _, folder = made(name)
    good, read = (folder / 'config.json').read_text(), 0
    for words, text in spoiled(good, ['rope_theta', 'partial_rotary_factor', 'no_rope_layers', 'sliding_window']):
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(given, dict):
            continue
        try:
            config = config_from_hf(given)
            if config.n_layer < 9 and config.n_embd * config.vocab_size * config.n_inner < 1e9:
                with torch.device('meta'):
                    LLaMA(config)
            config_to_hf(config)
            read += 1
        except ModelError as error:
            one_sentence(error)
        except BaseException as error:
            raise AssertionError(f'{words}: {type(error).__name__}: {error}') from error
    assert read > 5


# ---- folders -----------------------------------------------------------------------------------------------------


def test_a_folder_of_pickles_says_what_to_do(made, tmp_path):
    shutil.copytree(made('qwen2')[1], tmp_path / 'old')
    (tmp_path / 'old/model.safetensors').rename(tmp_path / 'old/pytorch_model.bin')
    with pytest.raises(ModelError, match=r'pytorch_model.bin is a pickle, .*from_pretrained') as error:
        LLaMA.from_pretrained(tmp_path / 'old')
    one_sentence(error)


def test_a_fused_matrix_of_other_rows_is_refused(made, tmp_path):
    shutil.copytree(made('phi3')[1], tmp_path / 'x')
    stored = json.loads((tmp_path / 'x/config.json').read_text())
    (tmp_path / 'x/config.json').write_text(json.dumps(stored | {'num_key_value_heads': 4}))
    with pytest.raises(ModelError, match=r'no place for: layers.*qkv_proj.weight'):
        LLaMA.from_pretrained(tmp_path / 'x')
    tensors = load_file(tmp_path / 'x/model.safetensors')
    tensors['model.layers.1.mlp.gate_up_proj.weight'][60, 3] = torch.nan
    save_file(tensors, tmp_path / 'x/model.safetensors')
    (tmp_path / 'x/config.json').write_text(json.dumps(stored))
    with pytest.raises(ModelError, match=r'layers.1.mlp.up_proj.weight holds NaN'):
        LLaMA.from_pretrained(tmp_path / 'x')


# ---- methods on biases, LayerNorm, fused matrices ----------------------------------------------------------------

BIASED = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=56, vocab_size=61, block_size=16)
SWITCHES = {
    'biases': dict(qkv_bias=True, o_bias=True, mlp_bias=True),
    'qwen2': dict(family='qwen2', qkv_bias=True),
    'qwen3': dict(family='qwen3', qk_norm=True, head_dim=16),
    'phi3': dict(family='phi3', rotary_dim=6, norm_eps=1e-5),
    'stablelm': dict(family='stablelm', qkv_bias=True, layer_norm=True, rotary_dim=4),
}


def of_family(name, method, **changes):
    config = config_of(method, **changes)
    model = LLaMA(ModelConfig(**BIASED, **SWITCHES[name]), linear=linear_of(config)).materialise(seed=0)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for key, p in module.named_parameters(recurse=False):
            if key == 'bias' or p.dim() == 1:
                torch.nn.init.normal_(p, mean=1.0 * (key == 'weight'), std=0.2, generator=generator)
    return config, model, configurator.method_of(config).setup(model, config)


@pytest.mark.parametrize('method', NAMES)
@pytest.mark.parametrize('name', ['biases', 'phi3'])
def test_every_method_trains_biases_as_vectors_and_per_layer_and_a_resume_change_nothing(name, method, tmp_path):
    found = []
    for per_layer in (False, True):
        _, model, optimizer = of_family(name, method, per_layer=per_layer)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        biases = {key for key in before if key.endswith('.bias')}
        assert len(biases) == (14 if name == 'biases' else 0)
        decays = {key for key, p in model.named_parameters() if optimizer.decay(p) == 0}
        found.append(everything(train(model, optimizer, 5), optimizer))
        assert biases <= {key for key, p in model.named_parameters() if not torch.equal(p, before[key])} & decays
    assert_same(*found)
    checkpoint.save(str(tmp_path / 'c'), model, optimizer, {}, {})
    whole = everything(train(model, optimizer, 7, first=5), optimizer)
    config = config_of(method, per_layer=True)
    resumed = LLaMA.from_pretrained(tmp_path / 'c', linear=linear_of(config))
    again = configurator.method_of(config).setup(resumed, config)
    checkpoint.load_optimizer(str(tmp_path / 'c'), again)
    assert_same(whole, everything(train(resumed, again, 7, first=5), again))
    resumed.save_pretrained(tmp_path / 'plain')
    plain = LLaMA.from_pretrained(tmp_path / 'plain')
    x = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    close(plain(x), resumed(x))
    assert plain.n_params() == resumed.n_params() == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize('method', ['lora', 'loqt'])
@pytest.mark.parametrize('name', ['qwen2', 'phi3'])
def test_packed_checkpoints_leave_out_the_fused_matrices_and_keep_biases(name, method, tmp_path):
    config, model, optimizer = of_family(name, method, quantize='nf4')
    train(model, optimizer, 3)
    run = {'config': {key: value for key, value in vars(config).items() if not key.startswith('_')}}
    run['config'] |= {'save_merged': False, 'method': method}
    checkpoint.save(str(tmp_path / 'c'), model, optimizer, run, {})
    held = load_file(tmp_path / 'c/model.safetensors')
    assert not any('_proj.weight' in key for key in held)
    assert sum('_proj.bias' in key for key in held) == (6 if name == 'qwen2' else 0)
    from plumbing.build import load_model

    x = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path / 'c'), 'cpu')(x), model(x))


@pytest.mark.parametrize('name', ['llama, all biases', 'granite', 'stablelm 2', 'smollm3, other layers', 'qwen3'])
def test_coresets_features_are_gradients_of_the_last_v_projection(name, made):
    model = LLaMA.from_pretrained(made(name)[1])
    x, y = X.repeat(2, 1)[:3, :20], X.roll(-1, 1).repeat(2, 1)[:3, :20].clone()
    y[0, 5:] = -100
    with torch.no_grad():
        h, rest = model.before_last(x)
    inputs, D = coreset.factors(model, h, rest, y)
    W = model.layers[-1].self_attn.v_proj.weight
    p = coreset.zeroth_order(model, h, rest, y, directions=1, seed=1)
    z = torch.randn(W.shape, generator=torch.Generator().manual_seed(100_003))
    for i in range(3):
        (G,) = torch.autograd.grad(model(x[i : i + 1], y[i : i + 1]), W)
        torch.testing.assert_close(D[i].T @ inputs[i], G, atol=1e-5, rtol=1e-3)
        assert abs(p[i, 0] - (G * z).sum()) < 0.02 * G.norm() * z.norm() ** 0.5


# ---- adapters ----------------------------------------------------------------------------------------------------


def with_adapter(folder, adapter=None, **changes):
    config = SimpleNamespace(**LORA | dict(init_from=str(folder)) | changes)
    model = LLaMA.from_pretrained(folder, linear=lora.linear(config))
    lora.setup(model, config)
    if adapter:
        hf.load_adapter(model, str(adapter))
    return model


@pytest.mark.parametrize('targets', ['all', 'q_proj,v_proj,up_proj'])
@pytest.mark.parametrize('rslora', [False, True])
@pytest.mark.parametrize('name', ['qwen2', 'phi3.5', 'stablelm 2'])
def test_our_adapters_are_read_by_peft(name, rslora, targets, made, tmp_path):
    peft = pytest.importorskip('peft')
    theirs, folder = made(name)
    ours = with_adapter(folder, targets=targets, rslora=rslora)
    generator = torch.Generator().manual_seed(3)
    for _, p in hf.adapters(ours):
        torch.nn.init.normal_(p, std=0.2, generator=generator)
    hf.save_adapter(ours, str(tmp_path), str(folder))
    reference = peft.PeftModel.from_pretrained(type(theirs).from_pretrained(folder), tmp_path)
    with torch.no_grad():
        logits = ours(X)
        close(reference(X).logits, logits)
        assert (logits - theirs(X).logits).abs().max() > 0.1
    assert torch.equal(with_adapter(folder, tmp_path, targets=targets, rslora=rslora)(X), logits)
    merged = tmp_path / 'merged'
    ours.save_pretrained(merged)
    with torch.no_grad():
        close(type(theirs).from_pretrained(merged)(X).logits, logits)


@pytest.mark.parametrize(
    'name,targets', [('phi3.5', ['qkv_proj', 'o_proj', 'gate_up_proj']), ('qwen3', ['q_proj', 'v_proj'])]
)
def test_adapters_that_peft_trained_are_read(name, targets, made, tmp_path):
    peft = pytest.importorskip('peft')
    theirs, folder = made(name)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type='CAUSAL_LM')
    model = peft.get_peft_model(type(theirs).from_pretrained(folder), config)
    for key, p in model.named_parameters():
        if 'lora_' in key:
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    model.save_pretrained(tmp_path)
    ours = {'qkv_proj': ['q_proj', 'k_proj', 'v_proj'], 'gate_up_proj': ['gate_proj', 'up_proj']}
    wanted = [part for target in targets for part in ours.get(target, [target])]
    with torch.no_grad():
        close(with_adapter(folder, tmp_path, targets=','.join(wanted))(X), model(X).logits)


def test_an_adapter_of_a_fused_matrix_that_is_not_of_blocks_is_refused(made, tmp_path):
    folder = made('phi3.5')[1]
    hf.save_adapter(with_adapter(folder), str(tmp_path), str(folder))
    path = tmp_path / 'adapter_model.safetensors'
    from safetensors import safe_open

    with safe_open(path, 'pt') as f:
        metadata, tensors = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    name = next(key for key in tensors if 'qkv_proj.lora_B' in key)
    tensors[name][0, -1] = 1.0
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(hf.AdapterError, match='is not of a block for each of q_proj,k_proj,v_proj: merge it') as error:
        with_adapter(folder, tmp_path)
    one_sentence(error)


# ---- a complete folder -------------------------------------------------------------------------------------------


def test_a_saved_folder_has_every_tokenizer_file_one_chat_template_and_all_end_tokens(made, tmp_path, monkeypatch):
    transformers = pytest.importorskip('transformers')
    base, data, out = tmp_path / 'base', tmp_path / 'data', tmp_path / 'out'
    shutil.copytree(made('qwen2')[1], base)
    data.mkdir()
    tokenizers = pytest.importorskip('tokenizers')
    words = {word: i for i, word in enumerate(['abc', 'def', '</s>', 'x', 'y', '<end>', '[UNK]', '<turn>'])}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, '[UNK]')).save(str(base / 'tokenizer.json'))
    shutil.copy(base / 'tokenizer.json', data)
    (data / 'meta.json').write_text(json.dumps({'tokenizer': 'hf', 'eot': 2, 'end_of_turn': [5, 7]}))
    (data / 'chat_template.jinja').write_text('of the data')
    files = {'tokenizer.model': b'\xff\x00\x80binary', 'vocab.json': b'{"a": 0}', 'merges.txt': b'a b\n'}
    files |= {'added_tokens.json': b'{}', 'special_tokens_map.json': b'{"eos_token": "x"}'}
    for name, content in files.items():
        (base / name).write_bytes(content)
    (base / 'tokenizer_config.json').write_text('{"chat_template": "of the base", "model_max_length": 99}')
    (base / 'generation_config.json').write_text('{"eos_token_id": [4, 5], "temperature": 0.6, "do_sample": true}')
    found = files_of(str(data), str(base), tok=tokenizer.load(str(data)))
    assert files.items() <= found.items()
    assert found['chat_template.jinja'] == b'of the data'
    assert json.loads(found['tokenizer_config.json']) == {'model_max_length': 99}
    generation = json.loads(found['generation_config.json'])
    assert generation == {'eos_token_id': [4, 5, 7, 2], 'temperature': 0.6, 'do_sample': True}

    (base / 'generation_config.json').unlink()  # of a folder that only says it in config.json
    change = json.loads((base / 'config.json').read_text()) | {'eos_token_id': [3, 4]}
    (base / 'config.json').write_text(json.dumps(change))
    words = [str(base), '--prompt=abc', '--tokens=1', f'--save_to={out}']
    sample.main(configurator.load(ROOT / 'sample.py', words, sample.problems, positional='checkpoint'))
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == [3, 4]
    assert json.loads((out / 'tokenizer_config.json').read_text())['chat_template'] == 'of the base'  # the only one
    assert {path.name for path in out.iterdir()} >= {*files, 'config.json', 'model.safetensors', 'tokenizer.json'}
    (base / 'tokenizer.json').unlink()  # nothing says that these are of the tokenizer of the data
    assert not {'tokenizer.model', 'vocab.json'} & {*files_of(str(data), str(base))}


def test_all_files_of_a_tokenizer_are_downloaded(monkeypatch):
    hub = pytest.importorskip('huggingface_hub')
    seen = []
    monkeypatch.setattr(hub, 'snapshot_download', lambda name, allow_patterns: seen.extend(allow_patterns) or name)
    assert hf.download('a/model') == 'a/model'
    for name in ('tokenizer.model', 'chat_template.jinja', 'merges.txt', 'vocab.json', 'model-1-of-2.safetensors'):
        assert any(fnmatch(name, pattern) for pattern in seen), name
    assert not any(fnmatch('pytorch_model.bin', pattern) for pattern in seen)


def test_rows_beyond_the_tokenizer_stay(made, tmp_path):
    folder = shutil.copytree(made('phi3')[1], tmp_path / 'base')
    tok = tokenizer.train_bpe(['ab ab\n'] * 9, 260, folder / 'tokenizer.json')
    assert tok.vocab_size == 259  # more ids than rows
    config = configurator.load(ROOT / 'train.py', ['--dry_run', f'--init_from={folder}', '--block_size=16'])
    with pytest.raises(ModelError, match='the data has 259 token ids, the model 97'):
        build.check_vocabulary(build.shape_of(config), tok.vocab_size)
    model = LLaMA.from_pretrained(folder)
    assert build.check_vocabulary(model.config, 60).vocab_size == 97 == len(model.embed_tokens.weight)
