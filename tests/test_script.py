"""memest.py --script: somebody else's training script, planned by three of its steps on fake tensors."""

import json

import pytest
import torch
from conftest import run

from memory.script import plan_script

LOOP = """
import sys, torch, torch.nn as nn, torch.nn.functional as F
device = 'cuda' if torch.cuda.is_available() or 'cuda' in sys.argv else 'cpu'
width = int(sys.argv[1])

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(500, width), nn.Linear(width, 500)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
                                                  nn.Linear(4 * width, width)) for _ in range(3))
        self.register_buffer('places', torch.ones(32, width))

    def forward(self, x, y):
        h = self.embed(x) + self.places * torch.arange(32, device=x.device)[:, None]
        for layer in self.layers:
            h = h + layer(h)
        return F.cross_entropy(self.head(h).flatten(0, 1), y.flatten())

model = Net().to(device).to(torch.bfloat16 if 'bf16' in sys.argv else torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
rows = torch.utils.data.TensorDataset(torch.randint(500, (int(sys.argv[2]), 33)))
for (x,) in torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True):
    x = x.to(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled='amp' in sys.argv):
        loss = model(x[:, :-1], x[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not torch.isfinite(loss):
        sys.exit('the loss is not finite')
    optimizer.step()
    optimizer.zero_grad()
    if 'numpy' in sys.argv:
        loss.detach().numpy()
    print(f'loss {loss.item():.3f}')
"""
REAL = """
import runpy, sys
from memory.record import LiveBytes
sys.argv = sys.argv[1:]
with LiveBytes() as live:
    runpy.run_path(sys.argv[0], run_name='__main__')
print(live.peak)
"""


@pytest.fixture
def loop(tmp_path):
    (tmp_path / 'loop.py').write_text(LOOP)
    return str(tmp_path / 'loop.py')


@pytest.mark.parametrize('flags', [[], ['amp'], ['bf16']], ids=str)
def test_bytes_planned_are_those_of_three_real_steps_of_the_same_script(loop, flags):
    plan, asked = plan_script([loop, '256', '6', *flags], on_card=False)
    done = run(['-c', REAL, loop, '256', '6', *flags], env={'PYTHONPATH': '.'})
    assert done.returncode == 0, done.stderr
    assert abs(plan.live / int(done.stdout.splitlines()[-1]) - 1) < 0.001
    model = 500 * 256 + 256 * 500 + 500 + 3 * (2 * 256 + 2 * 4 * 256 * 256 + 5 * 256)
    assert plan.parameters == plan.trained == model
    assert plan.weights == (model + 32 * 256) * (2 if 'bf16' in flags else 4)
    assert asked >= 4, 'the loss is asked whether it is finite, and printed'


def test_nothing_stays_patched_and_a_module_made_afterwards_is_real(loop):
    plan_script([loop, '64', '6'])
    layer = torch.nn.Linear(3, 3)
    assert type(layer.weight.data) is torch.Tensor and layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert layer(torch.ones(1, 3, dtype=torch.bfloat16)).isfinite().all()


def test_a_model_far_larger_than_this_machine_is_planned_and_a_card_named_in_it_is_none(loop):
    plan, _ = plan_script([loop, '16000', '6', 'cuda'])
    assert plan.weights > 24e9 and plan.states > 48e9 and plan.allocated > 96e9
    assert plan.context > 0 and plan.workspaces > 0


def test_transformers_trainer_is_planned_from_a_config_without_weights(tmp_path):
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('accelerate')
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    config.architectures = ['LlamaForCausalLM']
    config.save_pretrained(tmp_path / 'model')
    (tmp_path / 'tune.py').write_text(
        'import sys, torch\n'
        'from transformers import AutoModelForCausalLM, Trainer, TrainingArguments\n'
        'model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n'
        'rows = [dict(input_ids=torch.arange(32), labels=torch.arange(32)) for _ in range(16)]\n'
        "args = TrainingArguments(sys.argv[2], per_device_train_batch_size=4, report_to=[], logging_steps=1,\n"
        "                         save_strategy='no', optim='adamw_torch', disable_tqdm=True)\n"
        'Trainer(model, args, train_dataset=rows).train()\n'
    )
    plan, _ = plan_script([str(tmp_path / 'tune.py'), str(tmp_path / 'model'), str(tmp_path / 'out')], on_card=False)
    n = transformers.LlamaForCausalLM(config).num_parameters()
    assert plan.parameters == n and plan.states == 8 * n
    logits = 4 * 32 * 300 * 4
    assert 16 * n + logits < plan.live < 16 * n + 8 * logits + 4 * 32 * 64 * 4 * 3 * 20
    assert not (tmp_path / 'out' / 'model.safetensors').exists()


@pytest.mark.parametrize(
    ('words', 'says'),
    [
        (['256', '6', 'numpy'], 'does not run on fake tensors: '),
        (['256', '2'], 'it took 1 optimizer steps, and a plan needs 3: give it more data'),
        (['not a number', '6'], 'ValueError: invalid literal'),
    ],
    ids=['numpy', 'too few', 'its own error'],
)
def test_what_cannot_be_planned_says_why_in_one_sentence(loop, words, says):
    with pytest.raises(ValueError, match=r'loop\.py ') as error:
        plan_script([loop, *words])
    assert says in str(error.value) and '\n' not in str(error.value)


def test_the_command_prints_a_table_or_json_and_refuses_what_does_not_go_with_it(loop):
    done = run(['memest.py', f'--script={loop} 64 6', '--gpu_gb=24'])
    assert done.returncode == 0, done.stderr
    assert 'a card of 24 GB' in done.stdout and 'was taken as 1' in done.stdout
    assert 'loss 1.000' not in done.stdout, 'what the script prints goes to stderr'
    found = json.loads(run(['memest.py', f'--script={loop} 64 6', '--json']).stdout)
    assert found['total'] > found['reserved'] > found['weights'] > 0
    for words, says in (
        (['--script=nowhere.py'], 'nowhere.py is not a file'),
        ([f'--script={loop}', '--fit'], 'leave out fit'),
        (['--script='], 'is not how it is typed'),
    ):
        done = run(['memest.py', *words])
        assert done.returncode == 1 and says in done.stderr and done.stderr.count('\n') == 1, done.stderr
