"""
Train a LLaMA on the machine you own, with GaLore, LoQT or AdamW, from scratch or from a pretrained folder.

    python train.py config/galore_laptop.py                      # two CPU cores, about three minutes, code-like samples
    python train.py config/galore_laptop.py --max_iters=100      # flags win over the file
    python train.py --out_dir=out/galore_laptop --init_from=resume    # continue where it stopped, bit for bit
    python train.py config/galore_7b_4090.py --dry_run           # plan the memory and print it; nothing is trained
    python -m torch.distributed.run --nproc_per_node=8 train.py config/galore_1b.py            # eight cards
    python train.py --help                                       # every key below
"""

import sys

from plumbing import terminal

if __name__ == '__main__':
    terminal.prepare()

import configurator
from plumbing import MOVED, Stop, resume

if __name__ == '__main__':  # before the imports that take seconds: --help and mistyped keys are answered at once
    config = configurator.load_or_exit(__file__, sys.argv[1:], moved=MOVED, earlier=resume.settings)
    if words := resume.words_after_restart(config):
        sys.argv[1:] = words
        config = configurator.load_or_exit(__file__, words, moved=MOVED, earlier=resume.settings)

import difflib
import importlib.util
import math
import os
import subprocess
from types import SimpleNamespace

import torch

import coreset as colm
import sample
from adam import average_
from configurator import at_least, between, method_of, typed
from data import DataError, agreement, tokenizer
from data.batches import Labelled, keywords, load, read_meta, trained_tokens
from data.tokenizer_files import files_of
from head import trained_rows
from memory import fit, rates, several, trace
from memory.measure import Measure
from memory.record import LiveBytes
from model import SIZES, ModelConfig, ModelError
from plumbing import begin as start
from plumbing import checkpoint, classify, report, sharding
from plumbing import parallel as processes
from plumbing.build import (
    SHAPE,
    build_model,
    build_on_meta,
    compile_between,
    data_folder,
    labels_of,
    layers_of,
    rows_of,
    shape_of,
    shrink_tables,
)
from plumbing.hf import AdapterError
from plumbing.terminal import patience

# ---- config ----------------------------------------------------------------------------------------------------------
# run
out_dir = 'out/run'  # folder for checkpoints (last/, best/) and metrics.csv
init_from = 'scratch'  # 'scratch', 'resume' (continue from out_dir/last), a Hugging Face folder, or a name on its hub
overwrite = False  # let a run from scratch replace the checkpoints of an earlier run in out_dir
seed = 1  # for initial weights, data order and stochastic rounding; the same seed gives the same run
max_iters = 1000  # optimizer steps in total
eval_only = False  # measure val loss, of what init_from names or of a run to be resumed, print it and stop
dry_run = False  # resolve the configuration, build on the meta device, print the plan and stop

# data
task = 'lm'  # 'lm' | 'classify': predict the next token, or the label of a row (data/glue), by a head of transformers'
dataset = 'pystdlib'  # folder in data/, or path to a folder, filled by prepare.py; pystdlib is prepared automatically
block_size = 256  # tokens in a training window; attention time grows with its square
batch_size = 8  # windows in a micro-batch: as many as fit, since activations take the memory
packing = True  # rows of examples: True fills windows of block_size with them, False pads each to its batch's longest
gradient_accumulation_steps = 1  # micro-batches in a step, counted over all processes; exact in every mode

# model
model = '9m'  # shape from the GaLore and LoQT papers: 9m 20m 35m 40m 60m 71m 100m 130m 250m 350m 1b 3b 7b 13b
n_layer = 0  # transformer blocks; 0 here and below: the value from `model`
n_head = 0  # attention heads
n_kv_head = 0  # key and value heads, fewer than n_head for grouped-query attention; 0: n_head
n_embd = 0  # width
n_inner = 0  # width of the SwiGLU layer, usually 8/3 of n_embd
vocab_size = 0  # rows of embedding and head; 0: the size of the data set's tokenizer
model_dropout = -1.0  # share that transformers' own models (GPT-2, OPT, Phi-2) drop; -1: as their config.json says

# learning
learning_rate = 1e-3  # peak; GaLore needs about ten times AdamW's, since its update is multiplied by scale
table_lr_scale = 1.0  # factor on the learning rate of embedding and head; AdamW from scratch gains much by about 4
warmup_iters = -1  # steps of linear warm-up; -1: a tenth of max_iters, at most 100
lr_decay_iters = 0  # step at which the cosine decay reaches min_lr and stays there; 0: max_iters
decay = 'cosine'  # 'cosine' | 'linear': the way from learning_rate down to min_lr
min_lr = -1.0  # final learning rate; -1: a tenth of learning_rate
weight_decay = 0.0  # decoupled, applied to matrices only, multiplied by the learning rate
beta1 = 0.9  # decay rate of Adam's first moment
beta2 = 0.999  # decay rate of Adam's second moment
grad_clip = 0.0  # maximum global gradient norm (of the projected gradients under GaLore); 0: no clipping

# method
targets = 'all'  # layers of a block that the method works on, by the ends of their names, such as q_proj,v_proj
method = 'galore'  # 'adamw' | 'galore' | 'loqt' | 'lora' | 'qgalore' | 'fira' | 'apollo' | 'muon' | 'scale' |
#         'sumo' | 'badam' | 'grass' | 'adalomo' | 'ldadam' | 'adarankgrad' | 'sltrain': one file each

# memory and speed
device = 'auto'  # 'auto' | 'cpu' | 'cuda': auto uses cuda if it is available
dtype = 'auto'  # 'auto' | 'float32' | 'bfloat16': of the weights; auto: bfloat16 on cuda, else float32
state_bits = 32  # 32 | 8: bits of Adam's moments; 8 is blockwise and saves 3/4 of their memory
offload = False  # keep Adam's moments in main memory; each visits the card once a step, while its layer is updated
per_layer = False  # update each weight inside backward and drop its gradient; saves a copy of the weights, same result
checkpointing = False  # keep only each block's input and recompute the block in backward: measured a quarter slower
offload_activations = False  # with checkpointing: those inputs wait in main memory, T D 2 bytes for each block
offload_embedding = False  # a frozen embedding in main memory, where a step's rows are looked up
head_bits = 16  # 16 | 8: of a frozen head; 16 stands for what dtype says
mlp_chunk = 0  # tokens that an MLP takes at a time, computed again for their backward, for long windows; 0: all
parallel = 'dp'  # 'dp' | 'fsdp' | 'tp' | 'dp+tp' | 'auto': what several processes do, under torchrun: each holds all
#           and reads batches of its own; or holds a part of each tensor; or of each layer, for the same batch; or both.
#           auto: the first of these that is planned to fit a card of this machine; on a CPU dp
tp_size = 2  # of parallel='dp+tp': processes in a group that computes each layer together
compile = False  # torch.compile for what lies between a block's products; off, with the reason printed, if it fails

# choice of batches
coreset = 'none'  # 'none' | 'random' | 'zo' | 'hidden' | 'grad': choose each step's windows from a pool (CoLM) by their
#                    sources, by derivatives along random directions, by mean hidden states, or by gradients

# reports
log_interval = 10  # steps between log lines
eval_interval = 250  # steps between evaluations
eval_tokens = 0  # tokens of the val split to evaluate on; 0: 65536, but at most a quarter of what the run trains on
save_interval = 0  # steps between checkpoints in last/; 0: at each evaluation
best_by = 'val_loss'  # 'val_loss' | 'metric': by which best/ is chosen; metric: of classify, the data's first metric
save_best = 'all'  # 'all' | 'weights': what best/ holds; from weights alone, which are smaller, no run can go on
save_merged = True  # checkpoints of loqt and lora also hold the blocks as dense weights; False: packed only, smaller
sample_tokens = 48  # tokens of the sample printed at each evaluation; 0: no sample
tracker = 'none'  # 'none' | 'wandb' | 'trackio' | 'tensorboard': imported only if asked for
# ---- end of config ---------------------------------------------------------------------------------------------------

# Keys that a resumed run must not change: they fix the shape or the meaning of the saved tensors.
FIXED = ('model', *SHAPE, 'method', 'state_bits', 'dtype', 'targets', 'task', 'best_by', 'table_lr_scale', 'head_bits')


def fixed(config):
    """FIXED, and the method's own."""
    return (*FIXED, *method_of(config).FIXED)


# The least and the most of numbers; what is far above hangs, or overflows, before any error says why.
RANGES = {
    (1, 10**9): 'max_iters',
    (1, 2**20): 'block_size batch_size gradient_accumulation_steps',
    (0, 2**63 - 1): 'seed',
    (0, 1000): 'n_layer learning_rate weight_decay',
    (0, 2**20): 'n_head n_kv_head n_embd n_inner sample_tokens',
    (0, 2**24): 'vocab_size mlp_chunk',
    (0, 1e6): 'grad_clip table_lr_scale',
    (-1, 1): 'model_dropout',
}
MOST_TOKENS = 2**20  # in a micro-batch; a plan of more would take minutes


def without_effect(config):
    """One sentence for each flag that was typed and changes nothing in this run."""
    c, found = config, []
    if c.init_from not in ('scratch', 'resume'):
        for key in typed(c, 'model', *SHAPE):
            found.append(f"{key} is of new models, and init_from='{c.init_from}' has its own shape: leave it out")
    if c.init_from == 'resume' and c.overwrite and typed(c, 'overwrite'):
        found.append("overwrite=True replaces a run, and init_from='resume' goes on with it: leave out one of them")
    if c.min_lr > c.learning_rate or (c.min_lr < 0 and c.min_lr != -1):
        found.append(f'min_lr={c.min_lr} is out of range: use 0 to learning_rate={c.learning_rate}, or -1 for a tenth')
    moved = dict(offload='moments', offload_activations="blocks' inputs", offload_embedding='the embedding')
    for key, what in moved.items():
        if getattr(c, key) and typed(c, key) and not c.dry_run and processes.device_and_dtype(c)[0] == 'cpu':
            found.append(f'{key}=True moves {what} to main memory, where all is on a CPU: leave it out')
    return found


def problems_of_task(config):
    """One sentence for each key that does not go with the task."""
    c, found = config, []
    if c.task == 'lm':
        if c.best_by == 'metric':
            found.append("best_by='metric' is of task='classify', and a language model has none: leave it out")
        return found
    if c.init_from == 'scratch':
        found.append("task='classify' trains a model that knows a language: name its folder, --init_from=FOLDER")
    if c.coreset != 'none':
        found.append(f"coreset='{c.coreset}' chooses by losses of tokens, and task='classify' has labels: leave it out")
    for key in typed(c, 'packing', 'sample_tokens'):
        if getattr(c, key):
            found.append(f"{key} is of language models, and task='classify' pads rows and writes no text: leave it out")
    return found


def problems_of_chunks(config):
    """One sentence for each key that needs an MLP to see all tokens at once."""
    c, found = config, []
    if getattr(c, 'dropout', 0):
        found.append('dropout draws one mask for all tokens, which mlp_chunk has apart: leave out one of them')
    if c.coreset != 'none':
        found.append(f"coreset='{c.coreset}' looks into whole blocks, and mlp_chunk has parts: leave out one of them")
    return found


def problems(config):
    """One sentence for each combination that cannot work, including what the method and coreset.py find."""
    c, world = config, int(os.environ.get('WORLD_SIZE', 1))
    found = at_least(c, 1, 'log_interval', 'eval_interval') + at_least(c, -1, 'warmup_iters')
    found += at_least(c, 0, 'lr_decay_iters', 'save_interval', 'eval_tokens')
    for (low, high), names in RANGES.items():
        found += between(c, low, high, *names.split())
    if c.batch_size * c.block_size > MOST_TOKENS:
        found.append(
            f'batch_size={c.batch_size} and block_size={c.block_size} are {c.batch_size * c.block_size:,} tokens at '
            f'once, over {MOST_TOKENS:,}: use a smaller batch_size, with more gradient_accumulation_steps'
        )
    found += without_effect(c) + problems_of_task(c)
    found += [f'{key} is empty: say which' for key in ('out_dir', 'dataset', 'init_from') if not getattr(c, key)]
    for key in ('beta1', 'beta2'):
        if not 0 <= getattr(c, key) < 1:
            found.append(f'{key}={getattr(c, key)} is not a decay rate: use at least 0 and less than 1')
    if c.lr_decay_iters and c.lr_decay_iters < warmup_of(c):
        found.append(f'lr_decay_iters={c.lr_decay_iters} ends before warmup_iters={warmup_of(c)}: raise it')
    if c.warmup_iters > c.max_iters and typed(c, 'warmup_iters'):
        longer = f'warmup_iters={c.warmup_iters} is longer than max_iters={c.max_iters}'
        found.append(f'{longer}, so the rate would never reach its peak: use --warmup_iters=-1, a tenth of the run')
    if c.model not in SIZES:
        near = difflib.get_close_matches(c.model, SIZES, 1)
        hint = f' (did you mean {near[0]}?)' if near else ''
        found.append(f"model='{c.model}' is not a size: use one of {' '.join(SIZES)}{hint}")
    if not c.save_merged and not hasattr(method_of(c), 'linear'):
        found.append(f"save_merged=False leaves out packed weights, and method='{c.method}' packs none: leave it out")
    if c.offload_activations and not c.checkpointing:
        found.append('offload_activations=True moves what checkpointing keeps: add --checkpointing=True')
    if c.mlp_chunk:
        found += problems_of_chunks(c)
    if c.head_bits == 8 and c.coreset != 'none':
        found.append('head_bits=8 is multiplied piece by piece, which coreset cannot follow: set it to 16')
    for key in ('offload_activations', 'mlp_chunk', 'offload_embedding'):
        if getattr(c, key) and c.parallel != 'dp':
            found.append(f"{key} is of whole layers, and parallel='{c.parallel}' has parts of them: leave it out")
    readers = world // sharding.tp_of(c, world) or 1
    if c.gradient_accumulation_steps % readers:
        found.append(
            f'gradient_accumulation_steps={c.gradient_accumulation_steps} is counted over all {readers} processes: '
            f'use a multiple of {readers}'
        )
    if c.tracker != 'none' and not importlib.util.find_spec(c.tracker):
        found.append(f"tracker='{c.tracker}' needs a package: pip install {c.tracker}, or use --tracker=none")
    if c.device == 'cuda' and not torch.cuda.is_available() and not c.dry_run:
        found.append("device='cuda', but torch sees no CUDA device: use --device=cpu, or install a CUDA build of torch")
    return found + sharding.problems(c, world) + method_of(c).problems(c) + colm.problems(c)


def warmup_of(config):
    return config.warmup_iters if config.warmup_iters >= 0 else min(config.max_iters // 10, 100)


def learning_rate_at(step, config):
    """Linear warm-up, decay to min_lr, constant afterwards. A function of the step alone. Already the first step
    moves: with a rate of 0 a run of five would be one of four."""
    c, warmup = config, warmup_of(config)
    low = c.min_lr if c.min_lr >= 0 else c.learning_rate / 10
    end = c.lr_decay_iters or c.max_iters
    if step < warmup:
        return c.learning_rate * (step + 1) / (warmup + 1)
    if step >= end:
        return low
    progress = (step - warmup) / (end - warmup)
    left = 1 - progress if c.decay == 'linear' else 0.5 * (1 + math.cos(math.pi * progress))
    return low + (c.learning_rate - low) * left


def eval_tokens_of(config, labelled=0):
    """labelled: tokens of all labelled examples of the val split, which are all judged unless eval_tokens says less."""
    if config.task == 'classify':
        return config.eval_tokens or labelled
    a_quarter = report.tokens_a_step(config) * config.max_iters // 4
    return config.eval_tokens or max(min(65536, a_quarter), config.block_size)


@torch.no_grad()
def evaluate(model, data, config, here):
    """Mean loss in nats per trained token over what the data set fixes, which is divided among the processes."""
    total, n = torch.zeros(2, dtype=torch.float64), eval_tokens_of(config)  # summed loss, trained tokens
    with patience(f'evaluating on {n:,} tokens') as tell:
        for i, (x, y, _, *pieces) in enumerate(data.evaluation(n, config.batch_size)):
            if i % here.readers == here.reader:
                count = trained_tokens([(x, y)]).clamp_min(1)
                loss = loss_of(model, (x, y, None, *pieces), count.to(here.device), here.device)
                total += torch.tensor([loss.item() * count, count], dtype=torch.float64)
            tell(min((i + 1) * y.numel() / min(n, len(data.tokens)), 1))
        if sharding.is_cut(config, here.world) and here.reader > i % here.readers:  # others need it to gather
            loss_of(model, (x, y, None, *pieces), 1.0, here.device)
    total = average_(total.to(here.device))
    return (total[0] / total[1]).item()


def measured(model, data, config, here):
    """-> {'val_loss': mean loss}, and of labelled examples how well the predictions agree with them, val_accuracy."""
    if not isinstance(data, Labelled):
        return {'val_loss': evaluate(model, data, config, here)}
    n = eval_tokens_of(config, len(data.tokens))
    with patience(f'evaluating on {len(data.ends):,} examples') as tell:
        batches = data.evaluation(n, config.batch_size)
        some = classify.predictions(
            model, data, batches, here.device, here.rank, here.world, lambda rows: tell(rows / len(data.ends))
        )
    found, notes = classify.judged_by_source(data, *some)
    for note in notes:
        here.say(f'note: {note}')
    return {f'val_{name}': value for name, value in found.items()}


def print_sample(model, tok, config):
    """Print one line of text that the model generates."""
    generator = torch.Generator().manual_seed(config.seed)
    room = 0 if model.head.device.type == 'cuda' else None  # whose memory is planned for other things
    with patience(f'sampling {report.count(config.sample_tokens, "token")}'), sample.decoded(model, room):
        made = list(sample.generate(model, tok.prompt('\n'), config.sample_tokens, tok.eot, 0.8, 0, 1.0, generator))
    print('sample:', repr(tok.decode(made))[1:-1], flush=True)


def loss_of(forward, micro_batch, divisor, device):
    """The summed loss by the divisor of a micro-batch: (x, y), (x, y, weights), (x, y, weights or None, pieces), or of
    labelled examples (x, y, weights or None, lengths, types)."""
    x, y, *more = micro_batch
    given = keywords(y, more)
    if y.dim() > 1:
        given['trained'] = trained_rows(y)
    given = {name: part.to(device) for name, part in given.items() if part is not None}
    return forward(x.to(device), y.to(device), divisor=divisor, **given)


def training_step(forward, optimizer, micro_batches, learning_rate, device):
    """One optimizer step, the same for every method. -> the loss, a 0-dim tensor: of the step, summed over its trained
    tokens, by how many these are in all its micro-batches, of all processes, whose mean it is."""
    optimizer.lr, total = learning_rate, 0.0
    divisor = average_(trained_tokens(micro_batches).to(device)).clamp_min(1e-9)  # none trained: no loss, no gradient
    for i, micro_batch in enumerate(micro_batches):
        optimizer.last_micro_batch = i == len(micro_batches) - 1
        loss = loss_of(forward, micro_batch, divisor, device)
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    return total


def plan_memory(config, shape, device, dtype, compute_dtype=None, world=None):
    """The memory.formula.Plan of a process of a run, from a trace of `training_step`. shape: the ModelConfig; world:
    processes, None for as many as torchrun started."""
    method, selection, rows = method_of(config), colm.setup(config), rows_of(config)
    world = world or int(os.environ.get('WORLD_SIZE', 1))
    tp = sharding.tp_of(config, world)
    with patience('planning the memory'):
        shape = several.part_of(shape, tp) if tp > 1 else shape
        plan = trace.plan_memory(
            config, shape, dtype, device, method, training_step, selection, compute_dtype, *rows, readers=world // tp
        )
        if sharding.is_cut(config, world) and world > tp:
            plan = several.share(config, shape, dtype, plan, world // tp)
        return plan


def choose_way(config, world, device, dtype, room):
    """What parallel='auto' stands for: the first way whose plan fits a device of `room` bytes, those first that send
    least; where none does, fsdp, with all that stays in main memory (offload) if it can. On a CPU, or alone, dp."""
    if world == 1 or device == 'cpu':
        return {'parallel': 'dp'}
    for way in ('dp', 'fsdp', 'dp+tp', 'tp'):
        asked = SimpleNamespace(**vars(config) | {'parallel': way})
        shape = shape_of(config)
        cut = sharding.tp_of(asked, world) > 1 and not sharding.divides(shape, sharding.tp_of(asked, world))
        if cut or sharding.problems(asked, world):
            continue
        if plan_memory(asked, shape, device, dtype, world=world).card * (1 + fit.MARGIN) <= room:
            return {'parallel': way}
    ways = {'parallel': 'fsdp', 'offload': True}, {'parallel': 'fsdp'}, {'parallel': 'dp'}
    return next(way for way in ways if not sharding.problems(SimpleNamespace(**vars(config) | way), world))


def plan_only(config):
    """Build the model and the optimizer on the meta device and print the plan. The data need not be prepared."""
    device, dtype = processes.device_and_dtype(config)
    print(configurator.as_text(config, __file__), flush=True)
    shape_of(config)  # whatever is wrong with it is said before the model is built
    model, folder, meta = build_on_meta(config)
    setup(model, config)
    if note := sharding.nothing_to_cut(config, int(os.environ.get('WORLD_SIZE', 1))):
        print(note, flush=True)
    plan = plan_memory(config, model.config, device, dtype)
    report.print_plan(config, model, plan, folder, meta, device)
    print('dry run: nothing was trained')


def setup(model, config):
    """The method's optimizer. A ValueError that it raises ends the run with its message."""
    try:
        optimizer = method_of(config).setup(model, config)
    except ValueError as error:
        raise Stop(error) from None
    if config.head_bits == 8 or config.offload_embedding:
        shrink_tables(model, config)
        if model.embed_tokens.weight.requires_grad:
            what = f"are of frozen tables, and method='{config.method}' trains them"
            raise Stop(f'head_bits=8 and offload_embedding {what}: use --method=lora --train_rest=no')
    if config.table_lr_scale != 1:
        scaled = [p for module in model.head_modules().values() for p in module.parameters()] or [model.head]
        scaled += [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        try:
            optimizer.scale_rate([p for p in scaled if p.requires_grad], config.table_lr_scale)
        except ValueError:
            what = 'is of embedding and head, and this run trains neither'
            raise Stop(f'table_lr_scale={config.table_lr_scale} {what}: leave it out') from None
    return optimizer


def main(config):
    if config.dry_run:
        return plan_only(config)
    if config.parallel == 'auto':
        vars(config).update(choose_way(config, *processes.surroundings(config)))
    here = processes.start(config)  # this process: rank, world, device, dtype
    here.say(configurator.as_text(config, __file__))

    # ---- data, model, method ----
    folder = here.first(data_folder, config)  # the first process may have to prepare it
    meta = read_meta(folder)
    check_task(config, folder, meta)
    train_data, val_data = (load(folder, split, config.block_size, config.packing) for split in ('train', 'val'))
    tok = tokenizer.load(folder)
    check_size(config, here)
    begin = start.begin(config, fixed(config), colm.FIXED, here.rank == 0)
    with LiveBytes() as building, patience('building the model'):
        layers = layers_of(config)
        model = build_model(
            config, folder, meta['vocab_size'], here.dtype, here.device, begin.weights, layers, labels_of(config, meta)
        )
        if not begin.weights:
            model.config.eos_token_id = tok.eot
        if config.task == 'classify' and (note := classify.name_labels(model, meta['labels'])):
            here.say(f'note: {note}')
        mine = sharding.place(model, config, here)  # what of the model this process trains
        optimizer = setup(mine, config)
        sharding.freeze(model, mine)
    selection = colm.setup(config, train_data)
    begin.restore(mine, optimizer, selection, train_data, config)
    if config.eval_only:
        report.evaluated(measured(model, val_data, config, here), begin, config, here)
        return here.finish()
    files = files_of(folder, begin.weights, tok=tok if config.task == 'lm' else None)
    plan = announce(config, model, folder, meta, begin, here, train_data.windows) if here.rank == 0 else None
    log = report.Log(config, model, plan, begin, here)
    measure = Measure(mine, optimizer, here.on_cuda, building.peak, config.compile)
    stop = processes.CtrlC(here)
    if config.compile:
        compile_between(model, config, here.device)

    # ---- the loop ----
    save_interval = config.save_interval or config.eval_interval
    step, best = begin.step, begin.run['best_val_loss']  # the lowest, or minus the highest metric
    log.start_clock()
    while True:
        last_step = here.any(step >= config.max_iters or stop.asked)  # all processes leave at the same step
        fresh = step > begin.step or step == 0  # a resumed run does not repeat the reports of its first step
        eval_now = (fresh and step % config.eval_interval == 0) or step >= config.max_iters
        save_now = step > begin.step and (step % save_interval == 0 or last_step)
        log_now = (fresh and step % config.log_interval == 0) or eval_now or save_now

        # once in a while: read the losses back and print them (the only place that waits for the device)
        if log_now:
            log.training(step, colm.summary(selection, log.parts) if log.parts else '')

        # once in a while: evaluate
        better = False
        if eval_now:
            found = measured(model, val_data, config, here)
            log.evaluation(step, found)
            value = found['val_loss'] if config.best_by == 'val_loss' else -found[f'val_{val_data.metrics[0]}']
            better = step > begin.step and value < best
            best = value if better else best
        if log_now:
            log.write_row()

        # once in a while: save
        if save_now or better:
            report.check_finite(mine, optimizer, step, config, here)
            whole = sharding.gathered(mine, optimizer, here)
            if here.rank == 0:
                run = begin.position(step, config) | log.val | {'best_val_loss': best}
                run |= {'seconds': log.seconds()}
                checkpoint.save_all(config, *whole, selection, files, run, begin, save_now, better)

        # once in a while: print a sample
        if eval_now and config.sample_tokens and config.task == 'lm' and step > 0:
            whole = sharding.gathered(mine, None, here)[0]
            if here.rank == 0:
                print_sample(whole, tok, config)

        if log_now:
            log.start_clock()
        if last_step:
            break

        # one step
        with measure.step(step - begin.step):
            model.at_step(step)
            batches = batches_of(step, train_data, selection, model, config, here)
            loss = training_step(model, optimizer, batches, learning_rate_at(step, config), here.device)
        log.note(loss, optimizer, *([selection.kept_share] if selection else []))
        step += 1

    log.end(step, stop, measure.peak)
    here.finish(stop.code)


def check_task(config, folder, meta):
    """Raise Stop if the data is not of the task, or has no use for a key."""
    if meta['task'] != config.task:
        if config.task == 'lm':
            raise Stop(f'{folder} holds examples with labels: add --task=classify')
        raise Stop(f"{folder} holds no labels, which task='classify' learns: python data/glue/prepare.py --help")
    if typed(config, 'packing') and not meta['examples']:
        raise Stop(f'packing is of examples, and {folder} holds text: leave it out')
    if config.task == 'classify':
        agreement.check()


def check_size(config, here):
    """Raise what is wrong with the model's shape, or Stop if this machine is far too small for the run: at once, before
    anything is built, downloaded or overwritten."""
    if config.init_from == 'scratch' or os.path.isdir(config.init_from):
        dtype = str(here.dtype).removeprefix('torch.')
        shape, room = shape_of(config), here.room * (here.world if sharding.is_cut(config, here.world) else 1)
        if isinstance(shape, ModelConfig) and (too_much := fit.cannot_fit(config, shape, dtype, room)):
            raise Stop(too_much)


def announce(config, model, folder, meta, begin, here, windows):
    """Print what the run is about to do, what of it has changed since it was saved, and whether it fits. -> Plan"""
    plan = plan_memory(config, model.config, here.device, here.dtype, model.activation_dtype)
    report.print_plan(config, model, plan, folder, meta, here.device, windows)
    dtype = model.activation_dtype
    no_time = rates.why_not(plan, config, here.device, here.world, dtype)
    times = no_time or rates.planned(plan, config, here.device, dtype)
    report.print_times(config, eval_tokens_of(config, meta['val_tokens']), warmup_of(config), times, begin.step)
    report.print_changes(config, begin, learning_rate_at)
    if here.on_cuda and plan.card > here.room:
        shape = model.config if isinstance(model.config, ModelConfig) else None
        advice = fit.memory_advice(config, shape, problems, fixed(config) * bool(begin.saved_at))
        print(f'warning: the plan is more than the {here.room / 1e9:.2f} GB of this card; try {advice}')
    return plan


def batches_of(step, data, selection, model, config, here):
    """The micro-batches of a step for this process: the next ones, or those that a selection makes."""
    c = config
    if selection:
        return colm.chosen_batches(selection, model, data, c, step, here.device, here.rank, here.world)
    n = c.gradient_accumulation_steps // here.readers
    batches = (data.batch(c.seed, step * n + i, c.batch_size, here.reader, here.readers) for i in range(n))
    return [(x, y, None, *pieces) for x, y, _, *pieces in batches]


def cli(config):
    """Run main(config). An error that the user can fix ends it with one sentence instead of a traceback."""
    configurator.check_or_exit(config, __file__, problems)
    try:
        main(config)
    except (Stop, DataError, ModelError, tokenizer.TokenizerError, AdapterError, ImportError) as error:
        sys.exit(f'error: {error}')
    except subprocess.CalledProcessError:
        sys.exit('error: the data set could not be prepared, for the reason above')
    except torch.linalg.LinAlgError as error:
        sys.exit(f'error: no basis could be made of a gradient ({error}): use a lower --learning_rate')
    except OSError as error:
        where = f'{error.filename or config.out_dir} could not be written or read ({error.strerror})'
        sys.exit(f'error: {where if error.strerror else error}')
    except (RuntimeError, MemoryError) as error:  # running out of memory has its own type on a GPU, not on a CPU
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or 'allocate memory' in str(error):
            kept = fixed(config) * (config.init_from == 'resume')
            sys.exit(f'error: {fit.explain_out_of_memory(config, error, problems, kept)}')
        if lost := processes.lost(error):
            sys.exit(f'error: {lost}')
        raise
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == '__main__':
    cli(config)
