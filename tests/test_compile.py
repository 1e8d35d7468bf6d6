"""compile=True: what lies between the products is compiled once for all layers; every method walks as without it."""

from functools import partial

import pytest
import torch
from conftest import tiny

import configurator
import train as trainer
from model import LayerNorm
from plumbing import build

REAL = torch.compile
METHODS = {
    'adamw': [],
    'adamw, per_layer': ['--per_layer'],
    'galore': ['--rank=4', '--update_proj_gap=3'],
    'galore, per_layer': ['--rank=4', '--update_proj_gap=3', '--per_layer'],
    'qgalore': ['--rank=4', '--update_proj_gap=3'],
    'loqt': ['--rank=4', '--update_proj_gap=3', '--quantize=none'],
    'lora': ['--rank=4', '--quantize=none', '--dropout=0.1'],
    'badam': ['--block_steps=2'],
    'muon': [],
    'sltrain': ['--rank=4'],
}
SHAPE = ['--n_layer=3', '--n_head=4', '--n_kv_head=2', '--n_embd=32', '--n_inner=64', '--batch_size=2', '--compile']


@pytest.fixture
def graphs(monkeypatch):
    """A list that grows by one for each graph that torch makes of our functions; they run as they are."""
    made = []

    def count(graph, inputs):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, 'compile', partial(REAL, backend=count))
    return made


def walk(flags, compiled, steps=7):
    """-> the losses and the weights of a few steps of two micro-batches, across a new basis."""
    config = configurator.load(trainer.__file__, tiny(*SHAPE, *flags), trainer.problems)
    torch.manual_seed(0)
    model = build.build_model(config, '', 64, torch.float32, 'cpu', linear=build.layers_of(config))
    optimizer = trainer.setup(model, config)
    if compiled:
        build.compile_between(model, config, 'cpu')
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        tokens = [torch.randint(64, (2, config.block_size), generator=generator) for _ in range(2)]
        batches = [(x, x.roll(-1, 1)) for x in tokens]
        losses.append(trainer.training_step(model, optimizer, batches, 3e-3, 'cpu').item())
    return torch.tensor(losses), [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_compiled_run_walks_as_without_it_in_one_graph_for_each_function(name, checkpointing, graphs):
    flags = [f'--method={name.split(",")[0]}', f'--checkpointing={checkpointing}', *METHODS[name]]
    found, expected = walk(flags, True), walk(flags, False)
    for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    # The norm, the rotation, the gate; once more where a norm's weight or its input asks for no gradient; and BAdam,
    # whose layers ask in turns, has each function in both kinds.
    assert 3 <= len(graphs) <= (9 if name == 'badam' else 5), [graph.code for graph in graphs]


def test_the_compiler_itself_gives_the_functions_values_and_gradients():
    config = configurator.load(trainer.__file__, tiny(*SHAPE), trainer.problems)
    model = build.build_model(config, '', 64, torch.float32, 'cpu')
    plain = build.examples_between(model, 2, config.block_size, 'cpu')
    assert build.compile_between(model, config, 'cpu') is None
    block = model.layers[0]
    fast = [block.input_layernorm.norm, block.self_attn.rotated, block.mlp.gated]
    if not all(isinstance(function, partial) for function in fast):
        pytest.skip('no C++ compiler here')
    for (function, arguments), compiled in zip(plain, fast, strict=True):
        arguments = [torch.randn_like(A).requires_grad_() if torch.is_tensor(A) else A for A in arguments]
        results = []
        for f in (function, compiled):
            made = f(*arguments)
            made = made if isinstance(made, tuple) else (made,)
            asked = [A for A in arguments if torch.is_tensor(A)]
            results.append([*made, *torch.autograd.grad(sum(A.square().sum() for A in made), asked)])
        torch.testing.assert_close(*results)


def test_layer_norms_qk_norms_and_partial_rotation_are_compiled_too(graphs):
    flags = ['--method=galore', '--rank=4']
    config = configurator.load(trainer.__file__, tiny(*SHAPE, *flags), trainer.problems)
    shape = build.build_model(config, '', 64, torch.float32, 'meta').config
    for more in (dict(layer_norm=True, rotary_dim=4), dict(qk_norm=True)):
        losses = []
        for compiled in (False, True):
            model = build.LLaMA(type(shape)(**{**vars(shape), **more})).materialise(seed=0)
            if compiled:
                build.compile_between(model, config, 'cpu')
            x = torch.randint(64, (2, config.block_size), generator=torch.Generator().manual_seed(0))
            losses.append(model(x, x))
            losses[-1].backward()
        assert isinstance(model.layers[0].input_layernorm, LayerNorm) == ('layer_norm' in more)
        torch.testing.assert_close(*losses)
    assert graphs


def test_evaluation_and_sampling_compile_nothing(graphs):
    config = configurator.load(trainer.__file__, tiny(*SHAPE), trainer.problems)
    model = build.build_model(config, '', 64, torch.float32, 'cpu')
    build.compile_between(model, config, 'cpu')
    before = len(graphs)
    with torch.no_grad():
        for T in (3, 5, 7):
            model(torch.zeros(1, T, dtype=torch.int64))
    assert len(graphs) == before


def test_where_there_is_no_compiler_the_run_says_so_and_goes_on(monkeypatch, capsys):
    def none(function):
        raise RuntimeError('no compiler here\nand more')

    monkeypatch.setattr(torch, 'compile', none)
    losses = [walk([], compiled)[0] for compiled in (True, False)]
    assert capsys.readouterr().out == 'compile off: RuntimeError: no compiler here\n'
    assert torch.equal(*losses)
