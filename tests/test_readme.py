"""Every command of the README, run in its order: as it is typed where that takes moments, else with a tiny model."""

import json
import os
import re
import shlex
import shutil

import preloaded
import pytest
from conftest import ROOT

TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')
# (language, text) of the fenced blocks
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```$', TEXT, re.S | re.M)
LINES = [line for language, block in BLOCKS if not language for line in block.splitlines()]
COMMANDS = [line.split('  #')[0].split('&& ')[-1].strip() for line in LINES]
COMMANDS = [command for command in COMMANDS if command.startswith('python ')]
# What makes a run of any config a matter of seconds; a flag that a method does not know is never among them.
SHORT = ['--max_iters=2', '--warmup_iters=0', '--lr_decay_iters=0', '--eval_interval=2', '--eval_tokens=256']
SHORT += ['--sample_tokens=4', '--batch_size=2', '--block_size=32', '--log_interval=1', '--device=cpu']
SHORT += ['--gradient_accumulation_steps=2', '--save_interval=0', '--dtype=float32']
TINY = ['--n_layer=2', '--n_embd=32', '--n_head=4', '--n_inner=64', '--dataset=pystdlib', '--vocab_size=0']
# A chat template of ordinary text.
CHAT = """{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


# Somebody's training script.
SCRIPT = """import sys, torch
assert sys.argv[1] == '--lr=2e-5'
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
for step in range(5):
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """A copy of the code, with a text, a tiny Hugging Face model and a config.json where the README has path/to/..."""
    transformers, tokenizers = pytest.importorskip('transformers'), pytest.importorskip('tokenizers')
    folder = tmp_path_factory.mktemp('readme') / 'nano24'
    ignore = shutil.ignore_patterns('out', '.*', '__pycache__', 'results')
    shutil.copytree(ROOT, folder, ignore=ignore)
    (folder / 'path' / 'to' / 'files').mkdir(parents=True)
    text = '\n'.join(f'def f{i}(x):\n    return x + {i * i}\n' for i in range(1500))
    (folder / 'path' / 'to' / 'files' / 'a.py').write_text(text)
    (folder / 'path' / 'to' / 'shakespeare.txt').write_text(text)
    model = folder / 'path' / 'to' / 'SmolLM2-135M'
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=['<|endoftext|>'],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([text], trainer)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    bpe.save(str(model / 'tokenizer.json'))
    shutil.copy(model / 'config.json', folder / 'path' / 'to' / 'config.json')
    (model / 'chat_template.jinja').write_text(CHAT)
    encoder = transformers.BertConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    transformers.BertModel(encoder).save_pretrained(folder / 'path' / 'to' / 'MiniLM')
    shutil.copy(model / 'tokenizer.json', folder / 'path' / 'to' / 'MiniLM')
    (folder / 'my' / 'glue' / 'CoLA').mkdir(parents=True)
    for name in ('train', 'dev'):
        lines = (f'a{i}\t{i % 2}\t\tf{i} returns x and {i}\n' for i in range(40))
        (folder / 'my' / 'glue' / 'CoLA' / f'{name}.tsv').write_text(''.join(lines))
    (folder / 'path' / 'to' / 'finetune.py').write_text(SCRIPT)
    rows = [{'question': f'What is {i} + {i}?', 'answer': f'{i} + {i} = {2 * i}\n#### {2 * i}'} for i in range(60)]
    for name in ('mine', 'test'):
        (folder / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return folder


def shortened(command):
    """The words to run in the place of a command, and why if they are others."""
    words = shlex.split(command)[1:]
    if 'train.py' in words and '--dry_run' not in words:
        words = [word.replace('nproc_per_node=8', 'nproc_per_node=2') for word in words]
        own = any(word.startswith(('--init_from=', '--dataset=')) for word in words)
        rank = ['--rank=8'] * ('adamw' not in command and 'rank=1' not in command)
        wrong = 'block_size' if 'instruct' in command else 'tokens' if 'classify' in command else None
        short = [word for word in SHORT if not wrong or wrong not in word]
        return words + short + (TINY if not own else TINY[:4] * ('init_from' not in command)) + rank
    if words[0] == 'sample.py':
        return [*words, '--tokens=4']
    if words[0] == 'eval.py':
        return [*words, '--tokens=4', '--limit=4']
    if words[0] == 'data/c4/prepare.py':
        return [words[0], '--help']  # it streams from the hub
    if words[0] == 'data/shakespeare/prepare.py':
        return [*words, '--input=path/to/shakespeare.txt', '--vocab_size=300']
    if words[0] == 'memest.py' or '--dry_run' in words:  # every config is planned in test_train.py
        return [re.sub(r'config/(galore|loqt)_\w+', r'config/\1_60m', word) for word in words]
    return words


def test_the_readmes_commands_run_in_their_order(checkout):
    assert len(COMMANDS) > 30
    environment = os.environ | {'PYTHONWARNINGS': 'ignore', 'OMP_NUM_THREADS': '1'}
    for command in COMMANDS:
        words = shortened(command)
        done = preloaded.run(words, checkout, environment, 'Hello!\n' if '--chat' in words else '')
        how = f'{command}\nrun as {shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}'
        assert done.returncode == 0, how
    made = {path.name for path in (checkout / 'out').iterdir()}
    assert {'galore_laptop', 'adapter', 'merged', 'merged_lora', 'tuned.q8_0.gguf', 'on', 'mine', 'qgalore_7b'} <= made


def test_the_loops_of_your_own_run():
    import torch

    from model import LLaMA, ModelConfig

    shape = dict(n_layer=2, n_head=4, n_embd=32, n_inner=56, vocab_size=61, block_size=16)
    blocks = [block for language, block in BLOCKS if language == 'python' and block.startswith(('from', 'import'))]
    assert len(blocks) == 2
    model = LLaMA(ModelConfig(**shape)).materialise(seed=0)
    draw = torch.Generator().manual_seed(0)
    batches = [[torch.randint(0, 61, (2, 17), generator=draw) for _ in range(2)] for _ in range(3)]
    start = [p.detach().clone() for p in model.parameters()]
    here = dict(model=model, torch=torch, batches=batches, loss_of=lambda x: model(x[:, :-1], x[:, 1:]))
    exec(blocks[0], here)
    assert all(not torch.equal(p, q) for p, q in zip(start, model.parameters()))
    assert len(here['optimizer'].attached) == 14
    exec(blocks[1], here)
    model(batches[0][0][:, :-1], batches[0][0][:, 1:]).backward()
    here['optimizer'].step()
    assert len(here['layers']) == 14 and all(layer.started for layer in here['layers'])
