"""Two processes and torch's DDP: our optimizers take one step on the loss of the whole batch, or refuse by name."""

import json
import sys

import pytest
import torch
from conftest import run

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


@pytest.fixture(scope='module')
def found():
    import socket
    import subprocess

    from conftest import ROOT

    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    other = subprocess.Popen([sys.executable, __file__, '1', str(port)], cwd=ROOT)
    done = run([__file__, '0', port])
    assert done.returncode == 0 and other.wait(60) == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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


if __name__ == '__main__':
    sys.path[:0] = ['.', 'tests']
    worker(int(sys.argv[1]), int(sys.argv[2]))
