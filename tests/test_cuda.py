"""On a card: every method takes the steps that it takes on a CPU, in each mode, and whole runs resume.

Skipped without one. `python -m bench.card` runs these, and measures."""

import pytest
import torch
from conftest import tiny, train, values

import attention
import configurator
import quant
import train as trainer
from plumbing.build import build_model, compile_between, layers_of

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA card')]

METHODS = {  # flags of each, and whether weights agree with a CPU's: a basis starts from a device's random numbers
    'adamw': (['--method=adamw'], True),
    'galore': (['--method=galore'], False),
    'galore, svd': (['--method=galore', '--refresh=svd'], False),
    'loqt': (['--method=loqt', '--quantize=none', '--update_proj_gap=3'], False),
    'loqt, nf4': (['--method=loqt', '--update_proj_gap=3'], False),
    'lora': (['--method=lora'], True),
    'lora, nf4': (['--method=lora', '--quantize=nf4', '--double_quant=True'], True),
    'qgalore': (['--method=qgalore'], False),
    'fira': (['--method=fira'], False),
    'apollo': (['--method=apollo'], False),
    'muon': (['--method=muon'], True),
    'scale': (['--method=scale'], True),
    'sumo': (['--method=sumo'], False),
    'badam': (['--method=badam', '--block_steps=2'], True),
    'grass': (['--method=grass'], True),
    'adalomo': (['--method=adalomo'], True),
    'sltrain': (['--method=sltrain'], False),
    'adarankgrad': (['--method=adarankgrad', '--energy=0.5', '--update_proj_gap=2'], False),
    'ldadam': (['--method=ldadam'], False),
    '8-bit moments': (['--method=galore', '--state_bits=8'], False),
    '4-bit bases': (['--method=galore', '--basis_bits=4'], False),
}
WIDE = ['--n_embd=64', '--n_inner=128']  # matrices large enough for 8 bits


def walk(flags, device, steps=6, dtype=torch.float32, accumulation=1):
    """-> the losses and the weights after a few steps from the same start, on this device."""
    config = configurator.load(trainer.__file__, tiny(*WIDE, *flags, f'--device={device}'), trainer.problems)
    torch.manual_seed(0)
    model = build_model(config, '', 256, dtype, 'cpu', linear=layers_of(config)).to(device)
    optimizer = trainer.setup(model, config)
    generator, losses = torch.Generator().manual_seed(1), []
    if config.compile:
        compile_between(model, config, device)
    tokens = [torch.randint(256, (4, 32), generator=generator) for _ in range(accumulation)]
    batches = [(x, x.roll(-1, 1)) for x in tokens]
    for _ in range(steps):
        losses.append(trainer.training_step(model, optimizer, batches, 3e-3, device).item())
    return torch.tensor(losses), [p.detach().float().cpu() for p in model.parameters()]


def same(a, b, **tolerance):
    torch.testing.assert_close(a[0], b[0], **tolerance)
    for p, q in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(p, q, **tolerance)


@pytest.mark.parametrize('d,dtype', [(64, torch.bfloat16), (12, torch.bfloat16), (64, torch.float32)])
def test_packed_rows_see_on_a_card_what_they_see_by_a_mask(d, dtype):
    pieces = torch.tensor([0, 70, 71, 200, 256, 256, 300, 512, 512], dtype=torch.int32, device='cuda')
    q, k, v = (torch.randn(2, 256, h, d, device='cuda', dtype=dtype, requires_grad=True) for h in (4, 2, 2))
    delta, found = torch.randn(2, 256, 4, d, device='cuda', dtype=dtype), []
    for attend in (attention.attend_packed, attention.attend_masked):
        y = attend(q, k, v, pieces, 0.2)
        found.append((y, *torch.autograd.grad(y, (q, k, v), delta)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.03 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize('name', METHODS)
def test_a_card_takes_the_steps_of_a_cpu(name):
    flags, equal = METHODS[name]
    cpu, card = walk(flags, 'cpu'), walk(flags, 'cuda')
    torch.testing.assert_close(card[0], cpu[0], atol=2e-3 if equal else 2e-2, rtol=0)
    assert card[0][-1] < card[0][0]
    if equal:
        same(card, cpu, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize('name', METHODS)
def test_on_a_card_per_layer_takes_the_steps_of_the_normal_mode(name):
    flags, _ = METHODS[name]
    same(walk([*flags, '--per_layer=True'], 'cuda', accumulation=2), walk(flags, 'cuda', accumulation=2),
         atol=1e-5, rtol=1e-5)  # fmt: skip


@pytest.mark.parametrize('name', METHODS)
def test_on_a_card_bf16_weights_learn(name):
    losses, weights = walk(METHODS[name][0], 'cuda', steps=12, dtype=torch.bfloat16)
    assert losses.isfinite().all() and losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in weights)


@pytest.mark.parametrize('flags', [[], ['--state_bits=8'], ['--state_bits=8', '--basis_bits=4', '--per_layer=True']])
def test_moments_in_main_memory_take_the_steps_of_moments_on_the_card(flags):
    same(walk([*flags, '--offload=True'], 'cuda'), walk(flags, 'cuda'), atol=0, rtol=0)


@pytest.mark.parametrize('name', ['adamw', 'galore', 'loqt, nf4', 'lora, nf4'])
def test_checkpointing_on_a_card_takes_the_steps_without_it(name):
    flags = METHODS[name][0]
    same(walk([*flags, '--checkpointing=True'], 'cuda'), walk(flags, 'cuda'), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', ['adamw', 'galore', 'lora', 'loqt, nf4'])
def test_a_compiled_model_takes_the_steps_of_the_model(name):
    flags = METHODS[name][0]
    same(walk([*flags, '--compile=True'], 'cuda'), walk(flags, 'cuda'), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize('double_quant', [False, True])
def test_nf4_of_a_card_is_nf4_of_a_cpu(double_quant):
    A = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    there, here = quant.encode(A.cuda(), 'nf4', double_quant), quant.encode(A, 'nf4', double_quant)
    assert (there[''].cpu() == here['']).float().mean() > 0.999
    torch.testing.assert_close(
        quant.decode(there, A.shape, torch.float32).cpu(), quant.decode(here, A.shape, torch.float32), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize('flags', [['--method=adamw'], ['--method=galore', '--state_bits=8', '--per_layer=True'],
                                   ['--method=loqt', '--coreset=zo', '--coreset_from=2']])  # fmt: skip
def test_a_run_on_a_card_that_was_interrupted_ends_like_one_that_was_not(data, tmp_path, flags):
    flags = [*flags, '--device=cuda', '--save_interval=10']
    whole = train(tmp_path / 'whole', data, *flags)
    assert whole.returncode == 0, whole.stderr
    part = train(tmp_path / 'part', data, *flags, '--max_iters=10', '--lr_decay_iters=20')
    assert part.returncode == 0, part.stderr
    rest = train(tmp_path / 'part', data, *flags, '--lr_decay_iters=20', '--init_from=resume')
    assert rest.returncode == 0, rest.stderr
    got, expected = values(rest.stdout), values(whole.stdout)
    assert got['val_loss'] == expected['val_loss']
    assert got['device'].startswith('cuda')
