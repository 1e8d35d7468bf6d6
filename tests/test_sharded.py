"""train.py on 2 and 4 processes that hold parts of the weights: it trains as one process does, and resumes anywhere."""

import json
import os
import shutil
import sys

import pytest
import torch
from conftest import ROOT, run, tiny
from safetensors.torch import load_file

STEP = ['--gradient_accumulation_steps=4', '--learning_rate=1e-3', '--sample_tokens=0', '--eval_interval=20']
ADAMW = ['--method=adamw', '--grad_clip=1.0', '--weight_decay=0.1']
GALORE = ['--method=galore', '--moments=rotate', '--grad_clip=1.0']
EIGHT = ['--state_bits=8']
HALF = ['--max_iters=10', '--lr_decay_iters=20']
ON = ['--init_from=resume', '--max_iters=20', '--lr_decay_iters=20']
LORA = ['--method=lora', '--double_quant', '--dropout=0.1', '--grad_clip=1.0']
RELORA = ['--method=lora', '--quantize=none', '--merge_every=8', '--train_rest=no', '--lora_plus=4']
LOQT = ['--method=loqt', '--quantize=none', '--moments=rotate', '--grad_clip=1.0']
COLM = ['--method=adamw', '--coreset=grad', '--coreset_from=2']
# examples, of each of which 1 to 25 tokens are trained
MASKED = [*ADAMW, '--dataset=EXAMPLES', '--batch_size=1', '--block_size=48', '--packing=False']
# The first basis is of the first micro-batch of all processes, so one process has to read as much at once.
ONE_BATCH = ['--batch_size=16', '--gradient_accumulation_steps=1']
# name: flags, in the order in which they run; a name with '>' goes on from a copy of the run before it
CASES = {
    1: {
        'adamw': ADAMW,
        'galore': [*GALORE, *ONE_BATCH],
        'from1': [*ADAMW, *HALF],
        'lora': LORA,
        'relora': RELORA,
        'loqt': LOQT,
        'colm': COLM,
        'masked': MASKED,
    },
    2: {
        'adamw fsdp': [*ADAMW, '--parallel=fsdp', '--sample_tokens=4'],
        'adamw8 fsdp': [*ADAMW, *EIGHT, '--parallel=fsdp'],
        'from2': [*ADAMW, *HALF, '--parallel=fsdp'],
        'eight from2': [*ADAMW, *EIGHT, *HALF, '--parallel=fsdp'],
        'galore8 fsdp': [*GALORE, *EIGHT, '--parallel=fsdp'],
        'galore8 from2': [*GALORE, *EIGHT, *HALF, '--parallel=fsdp'],
        'from2 > fsdp': [*ADAMW, *ON, '--parallel=fsdp'],
        'eight from2 > fsdp': [*ADAMW, *EIGHT, *ON, '--parallel=fsdp'],
        'from1 > tp': [*ADAMW, *ON, '--parallel=tp', '--checkpointing'],
        'lora fsdp': [*LORA, '--parallel=fsdp'],
        'lora from2': [*LORA, *HALF, '--parallel=fsdp'],
        'lora from2 > fsdp': [*LORA, *ON, '--parallel=fsdp'],
        'loqt fsdp': [*LOQT, '--parallel=fsdp'],
        'loqt from2': [*LOQT, *HALF, '--parallel=fsdp'],
        'loqt from2 > fsdp': [*LOQT, *ON, '--parallel=fsdp'],
        'colm fsdp': [*COLM, '--parallel=fsdp'],
        'masked fsdp': [*MASKED, '--parallel=fsdp'],
        'masked tp': [*MASKED, '--parallel=tp'],
    },
    4: {
        'adamw fsdp': [*ADAMW, '--parallel=fsdp', '--checkpointing'],
        'adamw tp': [*ADAMW, '--parallel=tp'],
        'adamw dp+tp': [*ADAMW, '--parallel=dp+tp'],
        'galore fsdp': [*GALORE, '--parallel=fsdp'],
        'from2 > dp+tp': [*ADAMW, *ON, '--parallel=dp+tp'],
        'from2 > half': [*ADAMW, *ON, '--parallel=fsdp', '--max_iters=15'],
        'eight from2 > fsdp': [*ADAMW, *EIGHT, *ON, '--parallel=fsdp'],
        'galore8 from2 > fsdp': [*GALORE, *EIGHT, *ON, '--parallel=fsdp'],
        'relora fsdp': [*RELORA, '--parallel=fsdp', '--checkpointing'],
        'loqt fsdp': [*LOQT, '--parallel=fsdp'],
    },
}


def worker(folder, data, which):
    """Run all cases of this number of processes; what they hold goes to a file."""
    import torch.distributed as dist

    import adam
    import configurator
    import train
    from plumbing import parallel, sharding

    adam.SMALLEST_8BIT = 64
    world, rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))
    if world > 1:
        dist.init_process_group('gloo')
    held = {}

    class Measure(train.Measure):
        def step(self, n):
            self.compiled = world < 4  # nobody asks for the peak of these, and a recorder takes time
            states = [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
            packed = [b for module in self.model.modules() if hasattr(module, 'pieces') for b in module.buffers()]
            frozen = [*packed, *(p for p in self.model.parameters() if not p.requires_grad)]
            held[name] = [sum(t.nbytes for t in some) for some in (self.model.parameters(), states, frozen)] + [self]
            return super().step(n)

    train.Measure = Measure
    train.announce = lambda *arguments: None  # its plan takes longer than the run
    train.processes.start = lambda config: parallel.Here(
        rank, world, 'cpu', torch.float32, sharding.tp_of(config, world)
    )
    parallel.Here.finish = lambda here, code=0: None
    for name, flags in json.loads(which).items():
        out = os.path.join(folder, f'{world} {name}')
        before, goes_on, _ = name.partition(' > ')
        if goes_on and rank == 0:
            shutil.copytree(os.path.join(folder, f'{before[-1]} {before}'), out)  # from2 is of two
        if world > 1:
            dist.barrier()
        config = configurator.load('train.py', tiny(f'--dataset={data}', f'--out_dir={out}', *STEP, *flags))
        assert not train.problems(config), train.problems(config)
        train.main(config)
        held[name][3] = held[name][3].peak if world == 4 else None
    with open(os.path.join(folder, f'held {world} {rank}.json'), 'a') as f:
        f.write(json.dumps(held) + '\n')
    if world > 1:
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads abort a process now and then while Python shuts down


@pytest.fixture(scope='module')
def folder(tmp_path_factory, data):
    from test_examples import LENGTHS, written

    folder = tmp_path_factory.mktemp('runs')
    examples = written(tmp_path_factory.mktemp('examples'), LENGTHS)
    for world, cases in CASES.items():
        words = [__file__, folder, data, json.dumps(cases).replace('EXAMPLES', examples)]
        if world > 1:
            words = ['-m', 'torch.distributed.run', f'--nproc_per_node={world}', '--standalone', *words]
        done = run(words, timeout=900)  # two minutes, where nothing else runs
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def weights(folder, name):
    return load_file(folder / name / 'last/model.safetensors')


def apart(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


FSDP = [f'2 {name} fsdp' for name in ('adamw', 'lora', 'loqt', 'colm', 'masked')]
FSDP += [f'4 {name} fsdp' for name in ('adamw', 'relora', 'loqt')]


@pytest.mark.parametrize('name', [*FSDP, '4 adamw tp', '2 masked tp', '4 adamw dp+tp'])
def test_parts_of_weights_come_to_the_weights_of_one_process(folder, name):
    assert apart(weights(folder, f'1 {name.split()[1]}'), weights(folder, name)) < 2e-6


def test_galore_on_parts_is_galore(folder):
    assert apart(weights(folder, '1 galore'), weights(folder, '4 galore fsdp')) < 1e-5


@pytest.mark.parametrize('name', ['4 from2 > dp+tp', '2 from1 > tp'])
def test_a_run_goes_on_with_another_number_of_processes_or_another_way(folder, name):
    assert apart(weights(folder, '1 adamw'), weights(folder, name)) < 2e-6


@pytest.mark.parametrize(
    ('whole', 'resumed'),
    [
        ('2 adamw fsdp', '2 from2 > fsdp'),
        ('2 adamw8 fsdp', '2 eight from2 > fsdp'),
        ('2 lora fsdp', '2 lora from2 > fsdp'),
        ('2 loqt fsdp', '2 loqt from2 > fsdp'),
    ],
)
def test_the_same_number_goes_on_bit_for_bit(folder, whole, resumed):
    assert apart(weights(folder, whole), weights(folder, resumed)) == 0


@pytest.mark.parametrize(
    ('whole', 'half', 'name'),
    [
        ('2 adamw8 fsdp', '2 eight from2', '4 eight from2 > fsdp'),
        ('2 galore8 fsdp', '2 galore8 from2', '4 galore8 from2 > fsdp'),
    ],
)
def test_moments_in_8_bits_go_on_in_other_parts(folder, whole, half, name):
    """Their blocks end elsewhere, so they are rounded anew: near, and far nearer than without moments."""
    at = [torch.cat([W.flatten() for W in weights(folder, run).values()]) for run in (whole, half, name)]
    assert (at[2] - at[0]).norm() < (at[1] - at[0]).norm() / 10


@pytest.mark.parametrize(
    ('was', 'flags', 'alone'), [('4 from2 > half', ADAMW, 'adamw'), ('2 lora from2', LORA, 'lora')]
)
def test_several_stopped_and_one_goes_on(was, flags, alone, folder, data, tmp_path):
    shutil.copytree(folder / was, tmp_path / 'run')
    words = ['train.py', *tiny(f'--dataset={data}', f'--out_dir={tmp_path / "run"}', *STEP, *flags, *ON)]
    done = run(words)
    assert done.returncode == 0, done.stderr
    assert 'one process' in done.stdout, 'parallel=fsdp cuts nothing here'
    assert apart(weights(folder, f'1 {alone}'), load_file(tmp_path / 'run/last/model.safetensors')) < 2e-6


def held(folder, world, rank, name):
    lines = (folder / f'held {world} {rank}.json').read_text().splitlines()
    return json.loads(lines[0])[name]


@pytest.mark.parametrize('method', ['adamw', 'galore'])
def test_a_process_of_four_holds_a_quarter(folder, method):
    alone = held(folder, 1, 0, method)
    for rank in range(4):
        there = held(folder, 4, rank, f'{method} fsdp')
        assert there[0] <= 0.30 * alone[0]
        if method == 'adamw':
            assert there[1] <= 0.30 * alone[1]


def test_a_process_of_four_holds_a_quarter_of_what_lora_freezes(folder):
    alone, there = held(folder, 1, 0, 'relora'), [held(folder, 4, rank, 'relora fsdp') for rank in range(4)]
    assert all(some[2] <= 0.30 * alone[2] for some in there)
    assert all(some[1] == alone[1] for some in there), 'the factors, and their moments, are whole'


@pytest.mark.parametrize('name', ['adamw fsdp', 'adamw tp', 'adamw dp+tp', 'galore fsdp', 'relora fsdp', 'loqt fsdp'])
def test_the_plan_of_a_process_is_what_it_holds(folder, data, name):
    import configurator
    import train as training

    config = configurator.load('train.py', tiny(f'--dataset={data}', *STEP, *CASES[4][name]))
    plan = training.plan_memory(config, training.shape_of(config), 'cpu', torch.float32, torch.float32, world=4)
    assert plan.total == pytest.approx(held(folder, 4, 0, name)[3], rel=0.05)


def test_a_dry_run_of_one_process_says_that_nothing_is_cut(data, capsys):
    import configurator
    import train as training

    training.main(configurator.load('train.py', tiny(f'--dataset={data}', '--parallel=fsdp', '--dry_run', *ADAMW)))
    assert "parallel='fsdp' cuts nothing, there is one process" in capsys.readouterr().out


@pytest.mark.parametrize(
    ('gb', 'way'),
    [(99, {'parallel': 'dp'}), (2.2, {'parallel': 'fsdp'}), (1, {'parallel': 'fsdp', 'offload': True})],
)
def test_auto_takes_the_first_way_that_fits(gb, way, data):
    import configurator
    import train as training

    flags = ['--method=adamw', '--model=130m', '--dataset=c4', '--batch_size=1', '--parallel=auto', '--device=cuda']
    config = configurator.load('train.py', [*flags, '--dry_run', '--gradient_accumulation_steps=4'])
    assert training.choose_way(config, 4, 'cuda', torch.bfloat16, gb * 1e9) == way
    assert training.choose_way(config, 4, 'cpu', torch.float32, gb * 1e9) == {'parallel': 'dp'}


@pytest.mark.parametrize(
    ('flags', 'says'),
    [
        ('--parallel=fsdp --method=muon', "method='muon' needs whole: use dp, or adamw, galore, lora or loqt"),
        ('--parallel=tp --method=galore', "method='galore' needs whole: use dp, or adamw"),
        ('--parallel=fsdp --mlp_chunk=16 --method=adamw', 'mlp_chunk=16 is of whole weights'),
        ('--parallel=fsdp --per_layer', 'per_layer=True moves weights in backward'),
        ('--parallel=tp --coreset=grad --method=adamw', "coreset='grad' does: use fsdp or dp"),
        ('--parallel=fsdp --method=lora --offload', "pieces of method='lora'"),
        ('--parallel=tp --compile --method=adamw', 'compile=True'),
    ],
)
def test_what_does_not_go_together_is_said_by_name(flags, says, data):
    done = run(['train.py', *tiny(f'--dataset={data}', *flags.split()), '--dry_run'])
    assert done.returncode != 0 and says in done.stderr and 'Traceback' not in done.stderr


if __name__ == '__main__':
    sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
    worker(*sys.argv[1:])
