"""Several processes take the steps of one: alone, under torch's DDP or refused by name, and after one was killed."""

import contextlib
import csv
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run, tiny
from safetensors.torch import load_file

METHODS = ['adamw', 'galore', 'loqt', 'lora', 'muon', 'scale', 'sumo']


def worker(rank, port):
    """All cases in one pair of processes; what they found, as one line of JSON."""
    import torch.distributed as dist
    from test_other_loops import METHODS as MAKE
    from test_other_loops import net, weights
    from torch.nn.parallel import DistributedDataParallel as DDP

    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    found = {}
    for wrapped in (False, True):
        for method in METHODS:
            for how in ('plain', 'attach', 'per_layer'):
                model = net()
                optimizer = MAKE[method](model, per_layer=how == 'per_layer')
                if how == 'attach':
                    if method != 'galore':
                        continue
                    optimizer.attach([model[0], model[2]])
                outer = DDP(model) if wrapped else model
                try:
                    for step in range(5):
                        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))[rank::2]
                        (outer(x) - x.flip(1)).square().mean().backward()
                        optimizer.step()
                    answer = [w.double().sum().item() for w in weights(model)]
                except ValueError as error:
                    answer = str(error)
                found[f'{method} {how} {"DDP" if wrapped else "alone"}'] = answer
                del outer
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def together(world, *words):
    """Run this file in so many processes. -> what the first printed."""
    import socket

    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    others = [
        subprocess.Popen([sys.executable, __file__, str(r), str(port), *words], cwd=ROOT) for r in range(1, world)
    ]
    done = run([__file__, '0', port, *words])
    assert done.returncode == 0 and not any(other.wait(60) for other in others), done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def found():
    return json.loads(together(2).splitlines()[-1])


def whole_batch(method):
    from test_other_loops import METHODS as MAKE
    from test_other_loops import loss_of, net, weights

    model = net()
    optimizer = MAKE[method](model)
    for step in range(5):
        loss_of(model, step).backward()
        optimizer.step()
    return [w.double().sum().item() for w in weights(model)]


@pytest.mark.parametrize('method', ['adamw', 'lora', 'muon', 'scale'])
@pytest.mark.parametrize('how', ['plain DDP', 'plain alone', 'per_layer alone'])
def test_two_processes_take_the_step_of_the_whole_batch(found, method, how):
    assert found[f'{method} {how}'] == pytest.approx(whole_batch(method), abs=1e-4)


@pytest.mark.parametrize('method', ['galore', 'loqt', 'sumo'])  # whose first basis is of the first process's share
def test_with_ddp_and_without_it_is_the_same_path(found, method):
    assert found[f'{method} plain DDP'] == pytest.approx(found[f'{method} plain alone'], abs=1e-3)
    assert found[f'{method} per_layer alone'] == pytest.approx(found[f'{method} plain alone'], abs=1e-3)


@pytest.mark.parametrize('case', ['galore attach', *(f'{method} per_layer' for method in METHODS)])
def test_what_ddp_would_not_see_is_refused_by_name(found, case):
    assert 'leave DDP out, the optimizer averages them itself' in found[f'{case} DDP']


# ---- N processes equal one ------------------------------------------------------------------------------------------

# Micro-batches of one example, whose trained tokens are 1 to 25. In 20 steps each layer gets several new bases. The
# last ones, of the shelf, take eight steps, and on two processes alone.
EXACT = {
    'adamw': ('adamw', {}),
    'galore': ('galore', {}),
    'galore per_layer': ('galore', dict(per_layer=True)),
    'galore as in the paper': ('galore', dict(refresh='svd', stagger=False, per_layer=True)),
    'galore clipped': ('galore', dict(grad_clip=0.1, per_layer=True)),
    'loqt': ('loqt', dict(quantize='none')),
    'loqt per_layer': ('loqt', dict(quantize='none', per_layer=True, stagger=False)),
    'lora': ('lora', dict(quantize='none', dropout=0.1)),
    'lora per_layer': ('lora', dict(quantize='none', per_layer=True)),
    'colm': ('adamw', dict(coreset='grad', coreset_from=2)),
    'fira': ('fira', {}),
    'sumo': ('sumo', {}),
    'grass': ('grass', {}),
    'muon': ('muon', dict(per_layer=True)),
}


SHELF = ('fira', 'sumo', 'grass', 'muon')


def trained(folder, case, rank=0, world=1):
    """A run of so many steps. -> its weights, and the bytes that each step sent."""
    from test_contract import config_of, model_and_optimizer

    import coreset
    import train as training
    from data.batches import Examples
    from plumbing import parallel

    (name, options), steps = EXACT[case], 8 if case in SHELF else 20
    own = dict(update_proj_gap=5, gradient_accumulation_steps=4, batch_size=1, parallel='dp', max_iters=steps)
    choice = {key: value for key, value in vars(coreset.Options).items() if key[0] != '_'}
    config = config_of(name, **choice | own | options)
    model, optimizer = model_and_optimizer(name, **own, **options)
    model.set_block_size(48)
    data, sent = Examples(folder, 'train', 48, packing=False), []
    selection = coreset.setup(config, data)
    here = parallel.Here(rank, world, 'cpu', torch.float32)
    for step in range(steps):
        batches = training.batches_of(step, data, selection, model, config, here)
        training.training_step(model, optimizer, batches, 1e-3, 'cpu')
        sent.append(optimizer.metrics.pop('bytes_sent', torch.zeros(())).item())
    dense = {name: module.dense_weight() for name, module in model.named_modules() if hasattr(module, 'dense_weight')}
    others = {name: p.detach() for name, p in model.named_parameters() if name.rpartition('.')[0] not in dense}
    return dense | others, sent


def exact_worker(rank, port, world, folder, target):
    import torch.distributed as dist

    import adam

    adam.BUCKET = 20000, 20000  # so that several are under way in each backward of a tiny model
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=world)
    found = {
        f'{case} run': trained(folder, case, rank=rank, world=world)
        for case in EXACT
        if world == 2 or case not in SHELF
    }
    if world == 2:
        found |= {name: counted(name) for name in ('adamw', 'galore')}
    if rank == 0:
        torch.save(found, target)
    dist.barrier()
    dist.destroy_process_group()


def counted(method):
    """The bytes that each of 200 steps sent, of a model whose blocks are 96 % of it, with rank m / 4 and T = 200."""
    from adam import AdamW
    from galore import GaLoreAdamW, groups
    from model import LLaMA, ModelConfig

    shape = ModelConfig(n_layer=4, n_head=4, n_embd=64, n_inner=172, vocab_size=61, block_size=8)
    model = LLaMA(shape).materialise(seed=0)
    if method == 'adamw':
        optimizer = AdamW(model.parameters())
    else:
        linears = [module for module in model.layers.modules() if isinstance(module, torch.nn.Linear)]
        optimizer = GaLoreAdamW(groups(model, linears), rank=16, update_proj_gap=200)
        optimizer.attach(linears)
    sent = []
    for step in range(201 if method == 'galore' else 2):
        x = torch.randint(0, 61, (1, 9), generator=torch.Generator().manual_seed(step))
        model(x[:, :-1], x[:, 1:]).backward()
        optimizer.step()
        sent.append(optimizer.metrics.pop('bytes_sent').item())
    return sent[1:], sum(p.nbytes for p in model.parameters())


@pytest.fixture(scope='module')
def examples(tmp_path_factory):
    from test_examples import LENGTHS, written

    return written(tmp_path_factory.mktemp('examples'), LENGTHS)


@pytest.fixture(scope='module')
def alone(examples):
    return functools.cache(functools.partial(trained, examples))


@pytest.fixture(scope='module', params=[2, 4])
def exact(request, examples, tmp_path_factory):
    target = str(tmp_path_factory.mktemp('found') / 'found.pt')
    together(request.param, str(request.param), examples, target)
    return torch.load(target)


@pytest.mark.parametrize('case', EXACT)
def test_n_processes_end_in_the_weights_of_one(exact, alone, case):
    if f'{case} run' not in exact:
        pytest.skip('of the shelf, on two processes alone')
    alone, sent = alone(case)
    assert not any(sent), 'alone, nothing is sent'
    apart = {name: (exact[f'{case} run'][0][name] - alone[name]).abs().max().item() for name in alone}
    assert max(apart.values()) <= 1e-5, apart


def test_galore_at_a_quarter_of_the_rank_sends_at_most_0_30_of_the_bytes_of_ddp(exact):
    if 'adamw' not in exact:
        pytest.skip('counted on two processes')
    (whole, size), (sent, _) = exact['adamw'], exact['galore']
    assert whole == [size], 'two processes, all gradients: DDP in a ring'
    share = sum(sent) / len(sent) / size
    assert 0.25 < share <= 0.30
    assert min(sent) > 0.25 * size, 'R in every step'
    assert max(sent) < 0.5 * size, 'G of a layer or two, by turns'


# ---- a process that is killed ---------------------------------------------------------------------------------------


def kill_rank(launcher, rank):
    """SIGKILL for the worker of this rank, which the launcher started."""
    for folder in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            mine = (folder / 'stat').read_text().rpartition(')')[2].split()[1] == str(launcher)
            if mine and f'RANK={rank}' in (folder / 'environ').read_text().split('\0'):
                os.kill(int(folder.name), signal.SIGKILL)


@pytest.mark.skipif(not os.path.exists('/proc/self/environ'), reason='finds the worker in /proc')
def test_a_killed_process_ends_all_by_name_and_a_restart_ends_in_the_weights_of_an_undisturbed_run(tmp_path, data):
    flags = ['--gradient_accumulation_steps=2', '--max_iters=12', '--save_interval=4', '--eval_interval=12']
    flags += ['--log_interval=1', '--sample_tokens=0', f'--dataset={data}']
    undisturbed = run(['train.py', *tiny(*flags, f'--out_dir={tmp_path / "one"}')])
    assert undisturbed.returncode == 0, undisturbed.stderr
    words = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=1', 'train.py']
    words = [sys.executable, *words, *tiny(*flags, f'--out_dir={tmp_path / "two"}')]
    text, killed, ended = [], None, None
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        for line in launcher.stdout:
            text.append(line)
            if killed is None and line.startswith('step 6/12'):
                kill_rank(launcher.pid, 1)
                killed = time.monotonic()
            elif killed and ended is None and 'torchrun has started all again' in line:
                ended = time.monotonic()
    text = ''.join(text)
    assert launcher.returncode == 0, text
    assert ended - killed < 60 and f'going on from {tmp_path / "two/last"}' in text
    assert re.search(r'^error: process 1 of 2 \(rank 1, process id \d+\) ended, and with it this run$', text, re.M), (
        text
    )
    a, b = (load_file(tmp_path / name / 'last/model.safetensors') for name in ('one', 'two'))
    assert max((a[name] - b[name]).abs().max() for name in a) < 2e-6
    with open(tmp_path / 'two/metrics.csv') as f:
        rows = list(csv.DictReader(f))
    assert [int(row['step']) for row in rows] == list(range(13)), 'none twice'
    assert float(rows[-1]['bytes_sent']) > 0


@pytest.mark.parametrize(
    'saved,expected',
    [
        (None, None),
        (dict(launch='another 1'), None),
        (dict(launch='a 1', files={'model.safetensors': ''}), '--overwrite'),
        (dict(launch='a 1', files={'optimizer.pt': ''}), '--init_from=resume'),
    ],
)
def test_processes_started_again_go_on_from_what_their_launch_saved_alone(saved, expected, tmp_path, monkeypatch):
    from plumbing import resume

    if saved:
        (tmp_path / 'best').mkdir()
        (tmp_path / 'best/run.json').write_text(json.dumps({'config': {}, **saved}))
    monkeypatch.setattr(sys, 'argv', ['train.py', 'config/x.py', '--init_from', 'out/a', '--overwrite', '--rank=8'])
    monkeypatch.setattr(os, 'getppid', lambda: 1)
    for name, value in dict(RUN_ID='a', RESTART_COUNT='1').items():
        monkeypatch.setenv(f'TORCHELASTIC_{name}', value)
    config = SimpleNamespace(out_dir=str(tmp_path))
    assert resume.words_after_restart(config) == (expected and ['config/x.py', '--rank=8', expected])
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '0')
    assert resume.words_after_restart(config) is None, 'the first time, all is as typed'


if __name__ == '__main__':
    sys.path[:0] = ['.', 'tests']
    rank, port, *words = sys.argv[1:]
    if words:
        exact_worker(int(rank), int(port), int(words[0]), *words[1:])
    else:
        worker(int(rank), int(port))
