"""hf.py: steps of Hugging Face models on fake tensors against the same steps on real ones, with peft's LoRA."""

import gc
import inspect
import json

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip('transformers')

from memory import hf, hf_command, hf_layers, llmem  # noqa: E402
from memory.cuda import math_attention  # noqa: E402
from memory.hf import trace_hf  # noqa: E402
from memory.record import LiveBytes  # noqa: E402

SHAPE = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, vocab_size=301)
CONFIGS = {
    'llama': transformers.LlamaConfig(num_key_value_heads=2, **SHAPE),
    'qwen2': transformers.Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **SHAPE),
    'gpt2': transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=301, n_positions=64),
    'gpt_neo': transformers.GPTNeoConfig(
        hidden_size=64, num_layers=2, num_heads=4, vocab_size=301, attention_types=[[['global', 'local'], 1]]
    ),
}
TARGETS = {'llama': 'q_proj,v_proj,down_proj', 'qwen2': 'q_proj,v_proj', 'gpt2': 'c_attn', 'gpt_neo': 'q_proj,v_proj'}


def real_peak(config, dtype, lora, targets, checkpointing, optimizer):
    """The most that the storages of two real steps on this CPU took at once; the house's recorder over transformers,
    peft and torch, none of them patched."""
    how = 'eager' if config.model_type == 'gpt_neo' else 'sdpa'
    with LiveBytes() as live:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=how)
        if checkpointing:
            model.gradient_checkpointing_enable({'use_reentrant': True})
        if lora:
            peft = pytest.importorskip('peft')
            conv = config.model_type == 'gpt2'
            settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets.split(','), fan_in_fan_out=conv)
            model = peft.get_peft_model(model, settings)
        model.train()
        gc.collect()
        live.peak = live.now  # what building took is not the step's
        params = [p for p in model.parameters() if p.requires_grad]
        update = hf.make_optimizer(optimizer, params)
        for _ in range(2):
            tokens = torch.randint(0, 301, (2, 32))
            labels, mask = tokens.clone(), torch.ones_like(tokens)  # noqa: F841
            outputs = model(input_ids=tokens, labels=labels)
            outputs.loss.backward()
            update.step()
            update.zero_grad()
        return live.peak


@pytest.mark.parametrize('checkpointing', [False, True], ids=['', 'checkpointed'])
@pytest.mark.parametrize('lora', [False, True], ids=['full', 'lora'])
@pytest.mark.parametrize('name', CONFIGS)
def test_live_bytes_equal_a_real_run_of_transformers_and_peft(name, lora, checkpointing):
    for dtype in ('fp32', 'bf16') if name == 'llama' and lora else ('fp32',):
        optimizer = {'qwen2': 'adamw_loop', 'gpt2': 'adamw_fused'}.get(name, 'adamw')
        plan = trace_hf(CONFIGS[name], method='lora' if lora else 'full', batch=2, seq=32, dtype=dtype, cuda=False,
                        optimizer=optimizer, checkpointing=checkpointing, lora_rank=4, lora_targets=TARGETS[name],
                        steps=2)  # fmt: skip
        real = real_peak(CONFIGS[name], hf.DTYPES[dtype], lora, TARGETS[name], checkpointing, optimizer)
        assert abs(plan.live / real - 1) < 0.001, (dtype, plan.live, real)


@pytest.mark.parametrize('double_quant', [False, True], ids=['', 'double'])
def test_a_packed_layer_takes_the_bytes_of_bitsandbytes_own(double_quant):
    bnb = pytest.importorskip('bitsandbytes')
    theirs = bnb.nn.Linear4bit(
        192, 336, bias=False, compute_dtype=torch.bfloat16, quant_type='nf4', compress_statistics=double_quant
    ).to('cpu')
    state = theirs.weight.quant_state
    tensors = [theirs.weight.data, state.code, state.absmax]
    if double_quant:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    ours = hf_layers.NF4Linear(torch.nn.Linear(192, 336, bias=False), torch.bfloat16, double_quant)
    assert sorted(t.nbytes for t in ours.parts) == sorted(t.nbytes for t in tensors)
    assert ours.decode(torch.bfloat16).shape == state.shape


def test_qlora_holds_what_is_packed_and_what_is_not_by_hand():
    config = CONFIGS['llama']
    plan = trace_hf(config, method='qlora', batch=1, seq=8, lora_rank=4, lora_targets='q_proj', optimizer='adamw8bit')
    d, f, V, L = 64, 176, 301, 2
    matrices = [d * d] * 2 + [d * d // 2] * 2 + [d * f] * 3  # q, o; k, v; gate, up, down
    packed = sum(n // 2 + n // 64 + 4 * -(-n // 64 // 256) + 4 * 16 + 4 * 256 + 4 for n in matrices) * L
    fp32 = 4 * (2 * V * d + (2 * L + 1) * d)  # embeddings, head, norms: as peft prepares them
    lora = 4 * L * 4 * (d + d)
    buffers = 2 * 4 * (d // 4 // 2)  # rotary frequencies, twice
    assert plan.weights == packed + fp32 + lora + buffers
    assert plan.trained == L * 4 * (d + d)
    assert plan.parameters == sum(matrices) * L + 2 * V * d + (2 * L + 1) * d + plan.trained
    assert plan.states == 2 * 4 * plan.trained  # below 4,096 numbers: fp32


def test_bitsandbytes_states_are_those_of_its_own_optimizer():
    bnb = pytest.importorskip('bitsandbytes')
    params = [torch.nn.Parameter(torch.randn(n)) for n in (100, 4096, 70000)]
    for p in params:
        p.grad = torch.ones_like(p)
    theirs = bnb.optim.AdamW8bit(params, lr=1e-3)
    theirs.step()
    names = ('state1', 'state2', 'absmax1', 'absmax2')
    made = sum(state[name].nbytes for state in theirs.state.values() for name in names if name in state)
    ours = hf_layers.BnbStates(params, 8, False)
    ours.step()
    assert sum(t.nbytes for state in ours.state.values() for t in state.values()) == made
    paged = hf_layers.BnbStates([torch.nn.Parameter(torch.zeros(200_000))], 8, True)
    paged.params[0].grad = torch.zeros(200_000)
    paged.step()
    assert paged.unified == 2 * 200_000


def test_attention_step_by_step_is_torchs_in_value_gradient_and_memory():
    q, k, v = (torch.randn(2, h, 48, 16, requires_grad=True) for h in (4, 2, 2))
    ours = math_attention(q, k, v, causal=True)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours.sum(), (q, k, v)), torch.autograd.grad(theirs.sum(), (q, k, v))):
        torch.testing.assert_close(a, b)

    def most(function):
        """The peak of torch's own count of allocations, inside of operations, too."""
        with torch.profiler.profile(profile_memory=True) as seen:
            function()
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == '[memory]']
        now = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        return peak

    q, k, v = (torch.randn(2, h, 256, 16) for h in (4, 2, 2))
    native = torch.ops.aten._scaled_dot_product_attention_math
    theirs = most(lambda: native(q, k, v, is_causal=True, enable_gqa=True))
    ours = most(lambda: math_attention(q, k, v, causal=True))
    assert theirs > 2 * 2 * 4 * 256 * 256 * 4  # it saw the scores and the probabilities
    assert abs(ours / theirs - 1) < 0.02, (ours, theirs)


def test_what_cuda_does_otherwise_than_a_cpu_is_in_the_plan():
    config = CONFIGS['llama']
    plan = trace_hf(config, batch=2, seq=32)
    assert plan.workspaces == 2 * 8_519_680  # forward's thread and backward's
    assert plan.allocated >= plan.live + plan.workspaces
    assert plan.reserved >= plan.allocated and plan.reserved % (2 << 20) == 0
    assert plan.total == plan.reserved + plan.context
    assert plan.phase in ('forward', 'backward', 'optimizer') and plan.operation
    long = dict(seq=512, steps=1)
    assert trace_hf(config, attention='noflash', **long).live > 2 * trace_hf(config, **long).live  # T x T scores
    short = dict(seq=2, batch=1)
    loop = trace_hf(config, optimizer='adamw_loop', **short).live
    assert trace_hf(config, optimizer='adamw', **short).live > loop > trace_hf(config, optimizer='sgd', **short).live
    assert trace_hf(config, optimizer='lomo', **short).live < trace_hf(config, optimizer='sgd', **short).live
    mixed = trace_hf(config, dtype='fp32', autocast='bf16', seq=256, steps=1).live
    assert mixed < trace_hf(config, dtype='fp32', seq=256, steps=1).live


def test_the_command_prints_a_table_and_json(tmp_path, capsys):
    CONFIGS['llama'].save_pretrained(tmp_path)
    assert hf_command.main([f'--hf={tmp_path}', '--method=qlora', '--seq=16', '--gpu_gb=24']) == 0
    text = capsys.readouterr().out
    assert 'reserved' in text and 'a card of 24 GB, 25.77e9 bytes:\n  fits, ' in text
    assert hf_command.main([f'--hf={tmp_path / "config.json"}', '--seq=16', '--json', '--checkpointing']) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan['total'] == plan['reserved'] + plan['paged'] + plan['context']


@pytest.mark.parametrize('words', [[], ['--method=lora'], ['--checkpointing', '--seq=64']], ids=' '.join)
def test_one_of_one_gpu_holds_what_the_plan_says_and_of_more_ones_less(words):
    _, given, _ = hf_command.read(['--hf=x', *words])
    plan = trace_hf(CONFIGS['llama'], batch=4, **{'seq': 256} | given)
    needs = [llmem.several_gpus(plan.pieces, n, 'zero1', nccl=0)['total'] for n in (1, 2, 4)]
    assert plan.allocated <= needs[0] <= 1.15 * plan.allocated, (plan, needs)
    assert needs[0] - needs[1] == pytest.approx(plan.states / 2, abs=2) and needs[2] < needs[1]


@pytest.mark.parametrize('room', [99, 110, 118, 119, 135, 200, 2000, 20_000, 1e9])
def test_fit_of_hf_finds_the_largest_batch_in_a_few_traces(room):
    tried = []

    def trace(batch):
        """As plans are: flat where the optimizer holds the peak, then one slope, then a steeper one."""
        tried.append(batch)
        return hf.HFPlan(reserved=max(100 + (batch > 1) * 13, 60 + 10 * batch, 11 * batch - 100), context=0)

    found, plan = hf_command.largest_batch(trace, room)
    fit = [b for b in range(1, 4097) if trace(b).total * (1 + hf.MARGIN) <= room]
    assert found == max(fit, default=0) and len(tried) - 4096 <= 9, tried[:-4096]
    assert (plan is None) == (found == 0)


@pytest.mark.parametrize('words', [['--fit', '--gpu_gb=0.6'], ['--gpus=4'], ['--gpus=4', '--method=qlora'], []])
def test_tables_of_hf_fit_a_hundred_columns(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hf_command, 'LARGEST', 9)
    CONFIGS['llama'].save_pretrained(tmp_path)
    assert hf_command.main([f'--hf={tmp_path}', '--seq=32', *words]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100 and 'GiB' not in out and ' GB' in out
    if '--fit' in words:
        flags = [line.split() for line in out.splitlines() if line.startswith('    --')]
        assert len(flags) == 8 and all('--batch=9' in line for line in flags)
        hf_command.main([f'--hf={tmp_path}', '--seq=32', '--json', '--steps=2', *flags[0]])
        assert f'{json.loads(capsys.readouterr().out)["total"] / 1e9:6.2f}' in out.splitlines()[3]


@pytest.mark.parametrize('name', hf_command.RECIPES)
def test_a_recipe_of_another_tool_is_its_flags_and_what_is_typed_beside_it_wins(name, tmp_path, capsys):
    CONFIGS['llama'].save_pretrained(tmp_path)
    flags = [f'--{key}={value}' for key, value in hf_command.RECIPES[name].items()]
    plans = []
    for words in ([f'--recipe={name}'], flags, [f'--recipe={name}', '--lora_rank=64']):
        assert hf_command.main([f'--hf={tmp_path}', '--seq=32', '--steps=1', '--json', *words]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0] == plans[1] and plans[2]['states'] == 8 * plans[0]['states']


def test_help_says_a_word_of_each_argument(capsys):
    assert hf_command.main(['--hf', '--help']) == 0
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line.startswith('  --')]
    said = {words[0].removeprefix('--').partition('=')[0]: words[1] for words in lines}
    assert set(said) == {*hf_command.OWN, *inspect.signature(trace_hf).parameters} - {'config'}
    assert all(said.values())


@pytest.mark.parametrize(
    'words, names',
    [
        (['--hf=nowhere'], 'nowhere does not exist'),
        ([], '--hf is missing'),
        (['--hf=CONFIG', '--batch=0'], 'batch=0'),
        (['--hf=CONFIG', '--batch=two'], '--batch=two'),
        (['--hf=CONFIG', '--method=dora'], "'dora'"),
        (['--hf=CONFIG', '--optimizer=lion'], "'lion'"),
        (['--hf=CONFIG', '--gpu_gb=0'], '--gpu_gb=0'),
        (['--hf=CONFIG', '--colour=red'], '--colour'),
        (['--hf=CONFIG', '--gpus=none'], '--gpus=none is no number'),
        (['--hf=CONFIG', '--gpus=4', '--tp=2'], '--tp=2 does not go with --hf'),
        (['--hf=CONFIG', '--instant'], 'a trace answers'),
        (['--hf=CONFIG', '--plot=plan.png'], 'leave it out'),
        (['--hf=CONFIG', '--fit', '--gpus=4'], 'use --gpus with a --method'),
        (['--hf=CONFIG', '--fit', '--json'], 'leave out --json'),
        (['--hf=CONFIG', '--recipe=torchtune'], 'use one of litgpt_lora, litgpt_qlora, llamafactory_lora'),
        (['--hf=CONFIG', '--fit', '--recipe=litgpt_lora'], 'leave out --recipe'),
        (['--hf=CONFIG', '--fit', '--batch=4', '--method=lora'], 'leave out --method and --batch'),
        (['--hf=CONFIG', '--gpus=2', '--optimizer=lomo'], 'no gradients to exchange'),
        (['--hf=CONFIG', '--method=lora', '--lora_targets=nothing'], 'q_proj'),
        (['--hf=CONFIG', '--dtype=fp32', '--attention=flash'], 'flash'),
        (['--hf=UNKNOWN'], 'not a config that this transformers knows'),
        (['--hf=NOTJSON'], 'not valid JSON'),
        (['--hf=LIST'], 'not an object with fields'),
        (['--hf=ENDLESS'], 'num_hidden_layers=100000000 is more than 10,000'),
        (['--hf=PAD'], 'Padding_idx must be within num_embeddings'),
        (['--hf=BERTISH'], 'causal language model'),
    ],
)
def test_bad_input_is_one_sentence(words, names, tmp_path, capsys):
    CONFIGS['llama'].save_pretrained(tmp_path / 'CONFIG')
    (tmp_path / 'UNKNOWN').write_text(json.dumps({'model_type': 'no-such-model'}))
    (tmp_path / 'NOTJSON').write_text('{')
    (tmp_path / 'LIST').write_text('[]')
    stored = CONFIGS['llama'].to_dict()
    (tmp_path / 'ENDLESS').write_text(json.dumps(stored | {'num_hidden_layers': 10**8}))
    (tmp_path / 'PAD').write_text(json.dumps(stored | {'pad_token_id': 9999}))
    (tmp_path / 'BERTISH').write_text(json.dumps({'model_type': 'vit'}))
    words = [
        w.replace('--hf=', f'--hf={tmp_path}/') if any(c.isupper() for c in w.partition('=')[2]) else w for w in words
    ]
    assert hf_command.main(words) == 1
    said = capsys.readouterr().err.strip()
    assert names in said and '\n' not in said and 'Traceback' not in said
