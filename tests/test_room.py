"""What makes room for longer windows and larger vocabularies: each equals the run without it, and memest plans it."""

import functools
import re
import weakref

import pytest
import torch
from conftest import ROOT
from hf_tiny import saved
from test_trace import MODES, TINY, config_of, layers, plan_of, real_steps

import configurator
import memest
import model as models
import train
from configurator import method_of
from memory import trace
from memory.record import LiveBytes
from model import LLaMA, ModelConfig
from plumbing import Stop, hf_models
from plumbing.build import shape_of
from train import problems, training_step

METHODS = {
    'adamw': dict(method='adamw', per_layer=True),
    'galore': dict(update_proj_gap=3, per_layer=True),
    'loqt': dict(method='loqt', update_proj_gap=3),
    'lora': dict(method='lora', train_rest='no', init_from='folder'),
}
STEPS = {1: 20, 2: 8, 8: 4}  # by micro-batches, so that a case takes no more than a second or two
SMALL = TINY | dict(n_layer=2, n_embd=32, n_inner=80, n_head=2, n_kv_head=1, vocab_size=101)


def tokens_of(step, n):
    """x and y (2, 1, 16) of each micro-batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(0, 101, (2, 1, 16), generator=generator) for _ in range(n)]


def run(prepare, **changes):
    """-> weights and factors after some steps, and the losses, of a run with these keys in fp32."""
    config = config_of(**changes)
    with torch.device('meta'):
        model = LLaMA(ModelConfig(**SMALL), **layers(config))
    model.materialise(seed=0)
    model.checkpointing = config.checkpointing
    optimizer = method_of(config).setup(model, config)
    prepare(model)
    losses = []
    for step in range(STEPS[config.gradient_accumulation_steps]):
        batches = tokens_of(step, config.gradient_accumulation_steps)
        losses.append(training_step(model, optimizer, [tuple(pair) for pair in batches], 1e-3, 'cpu'))
    parts = [*model.parameters(), *(whole() for _, _, whole in model.dense_weights())]
    return torch.cat([part.detach().flatten().float() for part in parts]), torch.stack(losses)


@functools.cache
def plain_run(method, accumulation):
    """The run without any of it."""
    return run(lambda model: None, **METHODS[method], checkpointing=True, gradient_accumulation_steps=accumulation)


# ---- blocks' inputs in main memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize('accumulation', [1, 2, 8])
@pytest.mark.parametrize('method', METHODS)
def test_offloaded_inputs_change_no_bit(method, accumulation, monkeypatch):
    waited = []
    keep = models.Waiting.leave
    monkeypatch.setattr(models.Waiting, 'leave', lambda self: (keep(self), waited.append(self.kept)))
    expected, expected_losses = plain_run(method, accumulation)
    assert not waited
    keys = METHODS[method] | dict(checkpointing=True, gradient_accumulation_steps=accumulation)
    found, losses = run(lambda model: setattr(model, 'home', torch.device('cpu')), **keys)
    assert len(waited) == STEPS[accumulation] * accumulation * 2
    assert torch.equal(found, expected) and torch.equal(losses, expected_losses)


def test_a_block_is_fetched_once_and_ahead_of_its_backward(monkeypatch):
    events, waiting = [], {}

    def told(name, do):
        def instead(self, *given, **named):
            events.append((name, waiting.setdefault(id(self), len(waiting)), self.back is None))
            return do(self, *given, **named)

        return instead

    for name in ('fetch', 'run', 'leave'):
        monkeypatch.setattr(models.Waiting, name, told(name, getattr(models.Waiting, name)))
    model = LLaMA(ModelConfig(**TINY))
    model.checkpointing, model.home = True, torch.device('cpu')
    model(*torch.randint(0, 301, (2, 1, 24))).backward()
    forward = [event for i in range(3) for event in (('run', i, True), ('leave', i, True))]
    assert events[:6] == forward
    asked = [(name, i) for name, i, _ in events[6:]]
    assert asked == [
        ('run', 2), ('fetch', 2), ('fetch', 1), ('run', 1), ('fetch', 1), ('fetch', 0), ('run', 0), ('fetch', 0),
    ]  # fmt: skip
    made = [(name, i) for name, i, missing in events[6:] if name == 'fetch' and missing]
    assert made == [('fetch', 2), ('fetch', 1), ('fetch', 0)]


def test_a_graph_that_is_kept_is_walked_twice():
    model = LLaMA(ModelConfig(**TINY))
    model.checkpointing, model.home = True, torch.device('cpu')
    y = model.hidden(torch.randint(0, 301, (1, 24))).sum()
    gradients = [torch.autograd.grad(y, list(model.layers.parameters()), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize('name', ['opt', 'gpt2'])
def test_offloaded_inputs_of_transformers_own_models_change_no_bit(name, tmp_path):
    saved(tmp_path, name)
    tokens, found = torch.randint(0, 301, (2, 1, 24)), []
    for home in (None, torch.device('cpu')):
        model = hf_models.load(tmp_path, config_of('adamw'), torch.float32, 'cpu')
        model.checkpointing, model.home = True, home
        for _ in range(2):
            loss = model(*tokens)
            loss.backward()
        assert model.waiting is None
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 9 and all(torch.equal(a, b) for a, b in zip(*found))


OFFLOADED = ('adamw', 'galore everything', 'loqt', 'lora fine-tuning')


@pytest.mark.parametrize('mode', OFFLOADED)
def test_planned_bytes_are_those_of_real_steps_and_none_of_main_memory_is_the_cards(mode, monkeypatch):
    config = config_of(**MODES[mode] | dict(checkpointing=True))
    config.offload_activations = True

    class OfTheCard(LiveBytes):
        """As if main memory were another device: what blocks' inputs are copied to does not count."""

        def add(self, storage, tensor=None, function=None):
            if storage not in elsewhere and not making:
                super().add(storage, tensor, function)

    elsewhere, making, keep = weakref.WeakSet(), [], torch.empty_like

    def empty(*given, device=None, **named):
        if device != torch.device('cpu', 0):
            return keep(*given, device=device, **named)
        making.append(True)
        made = keep(*given, **named)
        elsewhere.add(made.untyped_storage())
        making.pop()
        return made

    def real(kind, home):
        monkeypatch.setattr(torch, 'empty_like', empty)
        steps = models.LLaMA.__init__
        monkeypatch.setattr(models.LLaMA, '__init__', lambda self, *a, **n: (steps(self, *a, **n), at(self))[0])

        def at(model):
            model.home = home

        with kind() as live:
            _kept = real_steps(config, torch.bfloat16, live)
        monkeypatch.undo()
        return live.peak

    shape = ModelConfig(**TINY)
    on_cpu = plan_of(config, shape, torch.bfloat16, torch.float32, True)
    assert abs(on_cpu.total / real(LiveBytes, torch.device('cpu')) - 1) < 0.001
    home = iter([torch.device('meta')])  # of those inputs; what tokens wait in comes after that
    monkeypatch.setattr(trace, 'main_memory', lambda run: next(home, torch.device('cpu')))
    of_card = plan_of(config, shape, torch.bfloat16, torch.float32, True)
    monkeypatch.undo()
    assert abs(of_card.total / real(OfTheCard, torch.device('cpu', 0)) - 1) < 0.001
    assert of_card.total <= on_cpu.total


def test_offloaded_inputs_take_none_of_a_card_and_layers_repeat(monkeypatch):
    def plan(offload, n_layer=7):
        config = config_of(**MODES['lora fine-tuning'] | dict(batch_size=64, offload_activations=offload))
        made = plan_of(config, ModelConfig(**TINY | dict(n_layer=n_layer)), torch.bfloat16)
        return made.total, made.allocated, made.reserved, made.peak.kinds, made.peak.operation

    kept, offloaded, one = plan(False), plan(True), 64 * 32 * 64 * 2
    assert 4 * one < kept[0] - offloaded[0] < 6.5 * one, 'of seven inputs two are there'

    def refuse(*_):
        raise trace.NotUniform

    monkeypatch.setattr(trace, 'deeper', refuse)
    assert plan(True) == offloaded


# ---- MLPs in chunks of tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('accumulation', [1, 2, 8])
@pytest.mark.parametrize('method', METHODS)
def test_an_mlp_in_chunks_is_the_whole_one(method, accumulation):
    expected, expected_losses = plain_run(method, accumulation)
    keys = METHODS[method] | dict(checkpointing=True, gradient_accumulation_steps=accumulation)

    def prepare(model):
        model.set_chunk(5)  # of 16 tokens
        model.home = torch.device('cpu') if accumulation != 2 else None

    found, losses = run(prepare, **keys)
    assert (found - expected).abs().max() < 1e-6 and (losses - expected_losses).abs().max() < 1e-6


def test_a_chunk_is_computed_twice_under_offload_as_an_mlp_is_and_in_its_backward_alone():
    seen, model = [], LLaMA(ModelConfig(**TINY))
    model.set_chunk(8)
    model.checkpointing, model.home = True, torch.device('cpu')
    model.layers[1].mlp.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    model(*torch.randint(0, 301, (2, 1, 20))).backward()
    assert seen == [(8, 64), (8, 64), (4, 64), (4, 64), (8, 64), (8, 64)]


CHUNKED = ('adamw', 'galore everything', 'lora fine-tuning', 'loqt')


@pytest.mark.parametrize('mode', CHUNKED)
def test_planned_bytes_of_chunks_are_those_of_real_steps(mode, monkeypatch):
    config = config_of(**MODES[mode] | dict(checkpointing=True, mlp_chunk=24))
    if mode == 'lora fine-tuning':
        config.dropout = 0.0
    planned = plan_of(config, ModelConfig(**TINY), torch.bfloat16, torch.float32, True).total
    config.mlp_chunk = 0
    assert planned < plan_of(config, ModelConfig(**TINY), torch.bfloat16, torch.float32, True).total
    built = LLaMA.__init__
    monkeypatch.setattr(LLaMA, '__init__', lambda self, *a, **n: (built(self, *a, **n), self.set_chunk(24))[0])
    with LiveBytes() as live:
        _kept = real_steps(config, torch.bfloat16, live)
    assert abs(planned / live.peak - 1) < 0.001


@pytest.mark.parametrize('keys', [dict(coreset='grad'), dict(method='lora', dropout=0.1)])
def test_what_chunks_do_not_go_with_is_said_by_name(keys):
    assert any('mlp_chunk' in p for p in problems(config_of(**keys | dict(mlp_chunk=8))))
    assert not any('mlp_chunk' in p for p in problems(config_of(**keys)))


def test_a_long_window_fits_24_gb_and_fit_says_how_long(capsys):
    """The target: 96,000 tokens. test_train.py dry-runs config/llama3_8b_4090_qlora_long.py, by a trace."""
    folder = str(ROOT / 'tests/models/Llama-3.1-8B-Instruct')
    words = [str(ROOT / 'config/llama3_8b_4090_qlora_long.py'), f'--init_from={folder}', '--dry_run']
    config = configurator.load(ROOT / 'train.py', words)
    shape = shape_of(config)
    assert config.block_size >= 96_000 and memest.estimate(config, shape).card * 1.03 < 24 * 2**30
    rows = {row.name: row for row in memest.fit(config, 24 * 2**30, shape, problems) if row.checkpointing}
    assert rows['QLoRA, long windows'].context > 130_000 and 'QLoRA' not in rows


@pytest.mark.parametrize(
    'flags, within',
    [
        ('--method=lora --offload_activations --mlp_chunk=512', 0.005),
        ('--method=lora --mlp_chunk=512 --train_rest=no --head_bits=8 --offload_embedding', 0.005),
        ('--method=galore --offload_activations --per_layer --state_bits=8', 0.01),
        ('--method=loqt --mlp_chunk=512', 0.005),
    ],
)
def test_the_formula_is_near_the_trace(flags, within):
    words = (
        '--model=350m --vocab_size=32000 --batch_size=1 --block_size=4096 --dtype=bfloat16 --checkpointing --dry_run'
    )
    config = configurator.load(ROOT / 'train.py', [*words.split(), *flags.split()])
    traced = memest.trace(config, 'cuda').total
    assert abs(memest.estimate(config).total / traced - 1) < within


def test_what_offload_activations_does_not_go_with_is_said_by_name():
    assert any('add --checkpointing=True' in p for p in problems(config_of('adamw', offload_activations=True)))


# ---- large vocabularies: tables in 8 bits, in main memory, or projected ----------------------------------------------


def test_a_head_in_8_bits_is_near_codes_to_itself_and_multiplies_as_its_decoded_self():
    W = torch.randn(301, 64, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    W[7], W[9, 0] = 0, 127 * 2.0**-9  # a row of zeros, and one whose largest is a power of two times 127
    once = models.Int8Head(W)
    decoded = once.dense_weight()
    again = models.Int8Head(decoded)
    assert torch.equal(once.q, again.q) and torch.equal(again.dense_weight(), decoded), 'what a checkpoint holds'
    assert decoded.dtype == W.dtype and ((decoded - W).norm() / W.norm()).item() < 0.02
    x, delta = torch.randn(5, 64), torch.randn(5, 301)
    head = once.weight.to(torch.float32)
    assert torch.allclose(head.logits(x), x @ decoded.float().T, atol=1e-6)
    assert torch.allclose(head.back(delta), delta @ decoded.float(), atol=1e-5)


@pytest.mark.parametrize('accumulation', [1, 8])
def test_twenty_steps_with_a_head_in_8_bits_are_those_with_what_it_decodes_to(accumulation, monkeypatch):
    monkeypatch.setattr(models.Int8Matrix, 'PIECE', 40)  # of 101 rows

    def decoded(model):
        model.lm_head.weight.data = models.Int8Head(model.lm_head.weight).dense_weight()

    keys, kept = METHODS['lora'] | dict(gradient_accumulation_steps=accumulation), []
    _, losses = run(lambda model: (kept.append(model), model.shrink_tables(8)), **keys)
    _, expected = run(lambda model: (kept.append(model), decoded(model)), **keys)
    assert (losses - expected).abs().max() < 1e-6
    for a, b in zip(*(model.layers.parameters() for model in kept), strict=True):
        assert (a - b).abs().max() < 1e-6


TABLES = {
    'qlora': dict(method='lora', train_rest='no', head_bits=8, state_bits=8),
    'qlora of a folder': dict(method='lora', train_rest='no', head_bits=8, offload_embedding=True, init_from='folder'),
}


def test_planned_bytes_of_small_tables_are_those_of_real_steps(monkeypatch):
    config = config_of(**TABLES['qlora'], checkpointing=True)
    planned = plan_of(config, ModelConfig(**TINY), torch.bfloat16, torch.float32, True)
    setup = method_of(config).setup

    def shrunk(model, config):
        optimizer = setup(model, config)
        model.shrink_tables(8)
        return optimizer

    monkeypatch.setattr(method_of(config), 'setup', shrunk)
    with LiveBytes() as live:
        _kept = real_steps(config, torch.bfloat16, live)
    assert abs(planned.total / live.peak - 1) < 0.001


def test_an_embedding_in_main_memory_takes_none_of_the_card_nor_does_a_heads_bf16(tmp_path):
    shape = ModelConfig(**TINY | dict(vocab_size=20_000))
    of = {name: plan_of(config_of(**TABLES[name]), shape, torch.bfloat16, pretrained=True) for name in TABLES}
    assert of['qlora'].weights - of['qlora of a folder'].weights == 2 * 20_000 * 64
    plain = plan_of(config_of(method='lora', train_rest='no'), shape, torch.bfloat16, pretrained=True)
    assert plain.weights - of['qlora'].weights == 20_000 * 64 - 4 * 20_000
    born = [e for c in of['qlora'].peak.chunks for e in c.events if e[0] == '+' and e[4] == (20_000, 64)]
    assert {e[1] for e in born} == {20_000 * 64, 2 * 20_000 * 64} and len(born) == 2, 'the embedding, and q'


def test_a_folder_is_read_straight_into_small_tables_and_a_run_of_them_goes_on_bit_for_bit(tmp_path):
    model = LLaMA(ModelConfig(**SMALL))
    model.save_pretrained(tmp_path)
    small = LLaMA.from_pretrained(tmp_path, prepare=lambda model: model.shrink_tables(8, torch.device('cpu')))
    expected = models.Int8Head(model.lm_head.weight).dense_weight()
    assert torch.equal(small.lm_head.dense_weight(), expected)
    tokens = torch.randint(0, 101, (1, 9))
    model.lm_head.weight.data = expected
    assert torch.allclose(small(tokens), model(tokens), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(small(tokens), model(tokens), atol=1e-6)
    small.save_pretrained(tmp_path / 'saved')
    again = LLaMA.from_pretrained(tmp_path / 'saved', prepare=lambda model: model.shrink_tables(8))
    assert torch.equal(again.lm_head.q, small.lm_head.q) and torch.equal(again.lm_head.scale, small.lm_head.scale)


@pytest.mark.parametrize('keys', [dict(head_bits=8), dict(offload_embedding=True)])
def test_tables_that_are_trained_stay_as_they_are(keys):
    model = LLaMA(ModelConfig(**TINY))
    with pytest.raises(Stop, match='train_rest=no'):
        train.setup(model, config_of('galore', **keys))
    with pytest.raises(models.ModelError, match='has one'):
        LLaMA(ModelConfig(**TINY, tie_embeddings=True)).shrink_tables(8)


@pytest.mark.parametrize('accumulation', [1, 2, 8])
def test_projected_tables_per_layer_and_accumulated_are_the_same_and_unseen_rows_stay(accumulation):
    keys = dict(project_tables=True, update_proj_gap=3, rank=8, gradient_accumulation_steps=accumulation)
    begin = LLaMA(ModelConfig(**SMALL | dict(tie_embeddings=False)))

    def prepare(model):
        begin.load_state_dict(model.state_dict(), strict=False)
        kept.append(model)

    kept = []
    (found, _), (expected, _) = run(prepare, per_layer=True, **keys), run(prepare, **keys)
    assert (found - expected).abs().max() < 1e-6
    n = STEPS[accumulation]
    seen = {t for step in range(n) for x, _ in tokens_of(step, accumulation) for t in x.flatten().tolist()}
    rows = [i for i in range(101) if i not in seen]
    moved = (kept[0].embed_tokens.weight - begin.embed_tokens.weight).abs().amax(1)
    assert not rows or moved[rows].max() == 0
    assert moved[sorted(seen)].min() > 0


@pytest.mark.parametrize('mode', ['galore per layer, accumulated'])
def test_planned_bytes_of_projected_tables_are_those_of_real_steps(mode):
    config = config_of(**MODES[mode] | dict(project_tables=True, checkpointing=True))
    plan = plan_of(config, ModelConfig(**TINY), torch.bfloat16, torch.float32, True)
    with LiveBytes() as live:
        model, optimizer = real_steps(config, torch.bfloat16, live)
    assert abs(plan.total / live.peak - 1) < 0.001
    assert optimizer.state[model.lm_head.weight]['M'].numel() == 8 * 301


@pytest.mark.parametrize('name, most', [('6gb_qlora', 5.5), ('16gb_qgalore', 16 * 2**30 / 1e9)])
def test_the_targets_are_met_by_what_their_configs_say_which_test_train_compares_with_a_dry_run(name, most):
    text = (ROOT / f'config/llama3_8b_{name}.py').read_text()
    assert float(re.search(r'Planned peak of ([\d.]+) GB', text)[1]) <= most
