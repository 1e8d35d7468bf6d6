"""
Train a LLaMA on the machine you own, with GaLore, LoQT or AdamW, from scratch or from a pretrained folder.

    python train.py config/galore_laptop.py                      # two CPU cores, about three minutes, code-like samples
    python train.py config/galore_laptop.py --max_iters=100      # flags win over the file
    python train.py config/galore_laptop.py --init_from=resume   # go on where it stopped, bit for bit
    python train.py config/galore_7b_4090.py --dry_run           # resolve, count, plan; nothing is trained
    python -m torch.distributed.run --nproc_per_node=8 train.py config/galore_1b.py            # eight cards
    python train.py --help                                       # every key below
"""

import difflib
import importlib.util
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import adam
import configurator
import sample
from configurator import method_of
from coreset import Coreset
from data import DataError, tokenizer
from data.batches import Tokens, read_meta
from memory import fit, trace
from model import SIZES, ModelError
from plumbing import checkpoint, report
from plumbing.build import (
    SHAPE,
    Stop,
    build_model,
    data_folder,
    described,
    device_and_dtype,
    download,
    layers_of,
    try_compile,
    weights_folder,
)
from plumbing.hf import AdapterError, load_adapter, read_adapter

# ---- config ----------------------------------------------------------------------------------------------------------
# run
out_dir = 'out/run'  # folder for checkpoints (last/, best/) and metrics.csv
init_from = 'scratch'  # 'scratch', 'resume' (go on from out_dir/last), a Hugging Face folder, or a name on its hub
overwrite = False  # let a run from scratch replace the checkpoints that an earlier one left in out_dir
seed = 1  # of the weights, the order of the data and stochastic rounding; the same seed gives the same run
max_iters = 1000  # optimizer steps in all
dry_run = False  # resolve the configuration, build on the meta device, print the plan and stop

# data
dataset = 'pystdlib'  # a folder in data/, or a path to one, that prepare.py has filled; pystdlib fills itself
block_size = 256  # tokens in a training window; attention's time grows with its square
batch_size = 8  # windows in a micro-batch: as many as fit, since activations take the memory
gradient_accumulation_steps = 1  # micro-batches in a step, of all processes together; exact in every mode

# model
model = '9m'  # shape of the GaLore and LoQT papers: 9m 20m 35m 40m 60m 71m 100m 130m 250m 350m 1b 3b 7b 13b
n_layer = 0  # transformer blocks; 0 here and below: what `model` has
n_head = 0  # attention heads
n_kv_head = 0  # key and value heads, fewer than n_head for grouped-query attention; 0: n_head
n_embd = 0  # width
n_inner = 0  # width of the SwiGLU layer, usually 8/3 of n_embd
vocab_size = 0  # rows of embedding and head; 0: what the data set's tokenizer has

# learning
learning_rate = 1e-3  # peak; GaLore wants about ten times AdamW's, since its update is multiplied by scale
warmup_iters = 100  # steps of linear rise from 0
lr_decay_iters = 0  # step at which the cosine reaches min_lr, and stays; 0: max_iters
min_lr = -1.0  # learning rate at the end; -1: a tenth of learning_rate
weight_decay = 0.0  # decoupled, on matrices only, times the learning rate
beta1 = 0.9  # Adam's memory of gradients
beta2 = 0.999  # Adam's memory of squared gradients
grad_clip = 0.0  # largest global gradient norm (of the projected gradients under GaLore); 0: no clipping

# method
method = 'galore'  # 'adamw' | 'galore' | 'loqt' | 'lora' | 'apollo' | 'apollo_mini': one file each
rank = 128  # dimensions of the subspace, all but adamw: less memory and less freedom with fewer; apollo_mini: 1
scale = 0.25  # factor on what comes back from the subspace (alpha, s; lora: alpha / r); apollo: 1, apollo_mini: 11.3
update_proj_gap = 200  # galore: steps between two refreshes of a layer's subspace (T); loqt: those to the first (tau)
refresh = 'subspace'  # 'subspace' | 'svd': galore, loqt improve the old subspace by one step, or do the slow SVD
stagger = True  # galore, loqt: layers refresh in turns, so that no step stalls; False: all at once, as in the papers
lazy = 0.0  # galore: a layer's T doubles where its new subspace overlaps the old by more than this share; 0: never
moments = 'keep'  # 'keep' | 'rotate' | 'reset': what galore, loqt do with Adam's moments when a subspace turns
psi = 1.2  # loqt: the k-th distance between two merges is tau + psi^k; 0: always tau
compensation = 5  # loqt: rounds in a merge that let B make good what 4 bits lose; 0: none
residual = 'none'  # 'none' | 'fira': galore adds the gradient's part outside the subspace; needs full gradients
dropout = 0.0  # lora: share of the adapters' inputs that is zero in training; 0.05 is usual for small data
merge_every = 0  # lora: steps between two merges of B A into the weights (ReLoRA), each with a short warm-up; 0: never
train_rest = 'auto'  # 'auto' | 'yes' | 'no': lora trains embeddings, head and norms, too; auto: in runs from scratch
lora_targets = 'all'  # lora: layers of a block that get an adapter, such as q_proj,v_proj; the others stay as they are

# memory and speed
device = 'auto'  # 'auto' | 'cpu' | 'cuda': auto takes cuda where there is one
dtype = 'auto'  # 'auto' | 'float32' | 'bfloat16': of the weights; auto: bfloat16 on cuda, else float32
state_bits = 32  # 32 | 8: of Adam's moments; 8 is blockwise and saves 3/4 of them
basis_bits = 16  # 16 | 8 | 4: of galore's bases; 16 stands for the weights' own dtype
weight_bits = 16  # 16 | 8: 8 keeps the blocks' weights as int8 with stochastic rounding (galore); 16: as dtype says
quantize = 'nf4'  # 'nf4' | 'none': loqt, lora keep the blocks' weights in 4 bits; none: as dtype says
double_quant = False  # loqt, lora: the scales of nf4 in 8 bits, too: 0.37 bits a weight less
offload = False  # Adam's moments stay in main memory and visit the card once a step, while their layer is updated
per_layer = False  # update each weight inside backward and drop its gradient; saves a copy of the weights, same result
checkpointing = False  # keep only each block's input and compute the block again in backward: a quarter slower here
compile = False  # torch.compile: 15 s to start, then a sixth faster here; off, with the reason, where it fails

# choice of batches
coreset = 'none'  # 'none' | 'random' | 'zo' | 'grad': choose each step's windows out of more (CoLM); random: by source
coreset_from = 4  # how many times more windows a step chooses from; each costs a forward under zo and grad
coreset_norm = 'unit'  # 'unit' | 'adam': compare gradients at unit length, or, as the paper does, Adam's steps of each
coreset_weights = 'uniform'  # 'uniform' | 'cluster': cluster weighs each window by how many it stands for
coreset_clusters = 0  # 0: sources are the data set's; else so many clusters of hidden states, found anew five times
keep_small = 0.5  # share of the batch within which sources below average size are taken whole; 0: all in proportion
zo_directions = 16  # random directions of zo; the paper's 1 leaves a single number a window

# reports
log_interval = 10  # steps between log lines
eval_interval = 250  # steps between evaluations
eval_tokens = 65536  # tokens of the val split to evaluate on: fixed windows, the same in every run
save_interval = 0  # steps between checkpoints in last/; 0: at each evaluation
save_merged = True  # checkpoints of loqt, lora hold the blocks as a plain model has them, too; False: packed, smaller
sample_tokens = 48  # tokens of a sample to print at each evaluation; 0: none
tracker = 'none'  # 'none' | 'wandb' | 'trackio' | 'tensorboard': imported only if asked for
# ---- end of config ---------------------------------------------------------------------------------------------------

# What a checkpoint's tensors decide.
FIXED = ('model', *SHAPE, 'method', 'rank', 'residual', 'state_bits', 'basis_bits', 'weight_bits', 'dtype')
FIXED_PACKED = ('scale', 'quantize', 'double_quant')  # the same of LoQT's and LoRA's layers
FIXED_LORA = ('train_rest', 'lora_targets', 'merge_every')
LINEARS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')  # of a block
FIXED_CORESET = ('coreset', 'coreset_norm', 'coreset_clusters', 'zo_directions')  # and of the history of the choices


def problems(config):
    """Combinations that cannot work, a sentence each; reported together with all other errors of the configuration."""
    c, found, world = config, [], int(os.environ.get('WORLD_SIZE', 1))
    for key in ('max_iters', 'block_size', 'batch_size', 'gradient_accumulation_steps', 'rank', 'update_proj_gap'):
        if getattr(c, key) < 1:
            found.append(f'{key}={getattr(c, key)} is not a count: use 1 or more')
    for key in ('log_interval', 'eval_interval', 'eval_tokens'):
        if getattr(c, key) < 1:
            found.append(f'{key}={getattr(c, key)} is not an interval: use 1 or more')
    counts = ('warmup_iters', 'lr_decay_iters', 'save_interval', 'sample_tokens', *SHAPE)
    for key in ('seed', 'learning_rate', 'weight_decay', 'grad_clip', *counts):
        if getattr(c, key) < 0:
            found.append(f'{key}={getattr(c, key)} is negative: use 0 or more')
    for key in ('beta1', 'beta2'):
        if not 0 <= getattr(c, key) < 1:
            found.append(f'{key}={getattr(c, key)} is not a decay rate: use at least 0 and less than 1')
    if c.lr_decay_iters and c.lr_decay_iters < c.warmup_iters:
        found.append(f'lr_decay_iters={c.lr_decay_iters} ends before warmup_iters={c.warmup_iters}: raise it')
    if c.model not in SIZES:
        near = difflib.get_close_matches(c.model, SIZES, 1)
        found.append(
            f"model='{c.model}' is not a size: use one of {' '.join(SIZES)}"
            + (f' (did you mean {near[0]}?)' if near else '')
        )
    if c.per_layer and c.grad_clip and (c.method in ('adamw', 'apollo', 'apollo_mini') or c.residual == 'fira'):
        found.append(
            f"per_layer=True cannot clip under method='{c.method}', whose global norm needs all gradients: "
            'set grad_clip=0 or per_layer=False'
        )
    if c.weight_bits == 8 and (c.method != 'galore' or c.compile):
        found.append(
            "weight_bits=8 works only with method='galore' and without compile: set --weight_bits=16, or change those"
        )
    if c.method == 'loqt' and c.compile:
        found.append("compile=True cannot follow method='loqt', which merges inside backward: set --compile=False")
    if c.method in ('loqt', 'lora') and (c.basis_bits != 16 or c.residual != 'none' or c.lazy):
        found.append(
            f"basis_bits, lazy and residual are galore's: leave them out with method='{c.method}'; see --quantize"
        )
    if not c.save_merged and c.method not in ('loqt', 'lora'):
        found.append(f"save_merged=False leaves out packed weights, and method='{c.method}' packs none: leave it out")
    for key in ('psi', 'compensation', 'merge_every'):
        if getattr(c, key) < 0:
            found.append(f'{key}={getattr(c, key)} is negative: use 0 or more')
    for key, default in (('dropout', 0.0), ('merge_every', 0), ('train_rest', 'auto'), ('lora_targets', 'all')):
        if c.method != 'lora' and getattr(c, key) != default:
            found.append(f"{key} is lora's: leave it out with method='{c.method}', or use --method=lora")
    if not 0 <= c.dropout < 1:
        found.append(f'dropout={c.dropout} is not a share of the inputs: use at least 0 and less than 1')
    if c.dropout and c.compile:
        found.append('dropout draws its masks where compile=True cannot follow: set --compile=False or --dropout=0')
    if c.lora_targets != 'all' and not set(c.lora_targets.split(',')) <= set(LINEARS):
        found.append(f"lora_targets='{c.lora_targets}' names no such layers: use all, or some of {','.join(LINEARS)}")
    if c.scale <= 0:
        found.append(f'scale={c.scale} would undo or hold every update: use more than 0')
    if c.per_layer and c.compile:
        found.append(
            'per_layer=True saves nothing with compile=True, whose backward returns all gradients at its end: '
            'set one of them to False'
        )
    if c.gradient_accumulation_steps % world:
        found.append(
            f'gradient_accumulation_steps={c.gradient_accumulation_steps} is counted over all {world} processes: '
            f'use a multiple of {world}'
        )
    if c.coreset_from < 1 or c.zo_directions < 1 or c.coreset_clusters < 0:
        wrong = f'coreset_from={c.coreset_from}, zo_directions={c.zo_directions}, coreset_clusters={c.coreset_clusters}'
        found.append(f'{wrong} are not counts: use 1 or more, and 0 or more clusters')
    if not 0 <= c.keep_small <= 1:
        found.append(f'keep_small={c.keep_small} is not a share of the batch: use 0 to 1')
    if c.coreset == 'zo' and c.coreset_norm == 'unit' and c.zo_directions == 1:
        found.append(
            "coreset='zo' in one direction keeps only a sign at unit length: "
            'use --coreset_norm=adam, or more --zo_directions'
        )
    targets = c.lora_targets.split(',')
    if c.method == 'lora' and c.coreset in ('zo', 'grad') and not {'all', 'v_proj'} & set(targets):
        found.append(
            f"coreset='{c.coreset}' compares gradients of v_proj, which lora_targets leaves out: "
            'add v_proj, or use --coreset=random'
        )
    if c.coreset in ('none', 'random') and c.coreset_norm != 'unit':
        found.append(f"coreset_norm is of what zo and grad compare: leave it out with coreset='{c.coreset}'")
    if c.coreset == 'none' and (c.coreset_weights != 'uniform' or c.coreset_clusters):
        found.append(
            "coreset_weights and coreset_clusters need something chosen: use --coreset=grad, or leave them out"
        )
    if c.coreset_weights == 'cluster' and c.compile:
        found.append('compile=True compiles a loss without weights: use --compile=False or --coreset_weights=uniform')
    if c.tracker != 'none' and not importlib.util.find_spec(c.tracker):
        found.append(f"tracker='{c.tracker}' needs a package: pip install {c.tracker}, or use --tracker=none")
    if c.device == 'cuda' and not torch.cuda.is_available() and not c.dry_run:
        found.append("device='cuda', but torch sees no CUDA device: use --device=cpu, or install a CUDA build of torch")
    return found


def learning_rate_at(step, config):
    """Linear warm-up from 0, half a cosine down to min_lr, and min_lr from then on. Depends on nothing but the step.

    After each merge of ReLoRA another warm-up, of a tenth of merge_every and at most 100 steps, back to that curve."""
    c = config
    low = c.min_lr if c.min_lr >= 0 else c.learning_rate / 10
    end = c.lr_decay_iters or c.max_iters
    if step < c.warmup_iters:
        return c.learning_rate * step / c.warmup_iters
    rise = 1.0
    if c.merge_every and step >= c.merge_every:
        rise = min((step % c.merge_every + 1) / (min(c.merge_every // 10, 100) + 1), 1.0)
    if step >= end:
        return low * rise
    progress = (step - c.warmup_iters) / (end - c.warmup_iters)
    return rise * (low + (c.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def evaluate(model, data, config, device, rank=0, world=1):
    """Mean loss in nats a token over the fixed evaluation windows, which processes share among them."""
    total = torch.zeros(2, dtype=torch.float64)  # summed loss, tokens
    windows = data.evaluation(config.eval_tokens, config.batch_size)
    count = min(config.eval_tokens, len(data.tokens)) // (config.block_size * config.batch_size)
    for i, (x, y, _) in enumerate(tqdm(windows, 'evaluating', count, delay=3, leave=False, disable=None)):
        if i % world == rank:
            total += torch.tensor(
                [model(x.to(device), y.to(device)).item() * y.numel(), y.numel()], dtype=torch.float64
            )
    if world > 1:
        total = total.to(device)
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def print_sample(model, tok, config):
    """A line of what the model would write by now."""
    generator = torch.Generator().manual_seed(config.seed)
    made = sample.generate(model, tok.encode('\n'), config.sample_tokens, tok.eot, 0.8, 0, 1.0, generator)
    print('sample:', repr(tok.decode(list(made)))[1:-1], flush=True)


def training_step(forward, optimizer, micro_batches, learning_rate, device):
    """One optimizer step on a list of (x, y), or (x, y, weights): these lines drive every method. -> mean loss, a 0-dim
    tensor."""
    optimizer.lr, total = learning_rate, 0.0
    for i, (x, y, *weights) in enumerate(micro_batches):
        optimizer.last_micro_batch = i == len(micro_batches) - 1
        weighted = {'weights': weights[0].to(device)} if weights else {}
        loss = forward(x.to(device), y.to(device), **weighted) / len(micro_batches)
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    return total


def make_selection(config, data=None):
    """What chooses each step's windows, or None. data: the training tokens, of which it knows the small sources."""
    c = config
    if c.coreset == 'none':
        return None
    sizes = np.diff(data.source_ends, prepend=0) if data else np.zeros(1)
    return Coreset(
        c.coreset,
        c.coreset_norm,
        np.flatnonzero(sizes < sizes.mean()).tolist() if c.keep_small and not c.coreset_clusters else [],
        c.coreset_weights,
        c.zo_directions,
        c.coreset_clusters,
        (20, *(c.max_iters * i // 5 for i in range(1, 5))),  # after 20 random steps, then four times (CoLM, 5.4)
        c.keep_small,
        betas=(c.beta1, c.beta2),
        seed=c.seed,
    )


def chosen_batches(selection, model, data, config, step, device, rank=0, world=1):
    """The micro-batches of a step for one process, out of a pool that is a function of the seed and the step alone."""
    c, k = config, config.batch_size * config.gradient_accumulation_steps
    x, y, sources = data.batch(c.seed, step, c.coreset_from * k)
    indices, weights = selection.choose(model, x.to(device), y.to(device), sources, k, step, c.batch_size)
    parts = [indices.split(c.batch_size)[rank::world]]
    if weights is not None:
        parts.append(weights.split(c.batch_size)[rank::world])
    return [(x[i], y[i], *w) for i, *w in zip(*parts)]


def read_back(losses, norms, step, config):
    """The losses and gradient norms of the steps before `step` as floats: here one process waits for its device.

    Raises Stop where one is not finite."""
    values = torch.stack([torch.stack(losses), torch.stack([norm.to(losses[0]) for norm in norms])])  # (2, steps)
    adam.average_(values[0])
    losses, norms = values.tolist()
    for bad, (loss, norm) in enumerate(zip(losses, norms), start=step - len(losses)):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            if math.isfinite(loss):
                stop_not_finite(f'gradient norm {norm}', bad, config, f', loss {loss:.4f}')
            stop_not_finite(f'loss {loss}', bad, config, f', grad norm {norm:.4g}')
    return losses, norms


def told(selection, kept):
    """What a log line says of the choice since the last one."""
    if not selection:
        return ''
    text = f' | kept {100 * sum(kept) / len(kept):.0f}%'
    if selection.errors is not None:  # of the last step, on what was compared
        chosen, at_random, by_size = selection.errors.tolist()
        text += f' | gradient error {chosen:.3f}, by cluster size {by_size:.3f}, random {at_random:.3f}'
    return text


def stop_not_finite(what, step, config, more=''):
    """Going on would only spoil the weights, and saving them the checkpoint: say how to go on from the good one."""
    lower = f'--learning_rate={config.learning_rate / 2:g}'
    if checkpoint.exists(os.path.join(config.out_dir, 'last')):
        advice = f'go on from the last good checkpoint with {report.resume_command([lower])}'
    else:
        advice = f'start again with {lower}'
    rate = learning_rate_at(step, config)
    raise Stop(f'{what} at step {step} (learning rate {rate:.3g}{more}); nothing was saved after that: {advice}')


def plan_only(config):
    """Resolve everything, build the model and the method on the meta device, print the plan. Needs no data yet."""
    device, dtype = device_and_dtype(config)
    model, folder, meta = described(config)
    method_of(config).setup(model, config)
    plan = trace.plan_memory(
        config, model.config, dtype, device, method_of(config), training_step, make_selection(config)
    )
    report.print_plan(config, model, plan, folder, meta, device, __file__)
    print('dry run: nothing was trained')


def main(config):
    # ---- processes, device, dtype ----
    world, rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))
    device, dtype = device_and_dtype(config)
    if world > 1:
        if device == 'cuda':
            device = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if device.startswith('cuda') else 'gloo')
    say = print if rank == 0 else lambda *words, **kw: None
    on_cuda = device.startswith('cuda')
    torch.set_float32_matmul_precision('high')
    last, best = os.path.join(config.out_dir, 'last'), os.path.join(config.out_dir, 'best')

    # ---- data ----
    if config.dry_run:
        return plan_only(config)
    if rank == 0:
        folder = data_folder(config)
    if world > 1:
        dist.barrier()  # the first process may have been preparing the data
        folder = data_folder(config)
    meta = read_meta(folder)
    train_data, val_data = (Tokens(folder, split, config.block_size) for split in ('train', 'val'))
    tok = tokenizer.load(folder)

    # ---- model and method ----
    saved_at, run = None, {'step': 0, 'best_val_loss': 1e30, 'seconds': 0.0}
    if config.init_from == 'resume':
        saved_at, run = checkpoint.find(last if checkpoint.exists(last) or not checkpoint.exists(best) else best)
        if config.train_rest == 'auto' and config.method == 'lora':
            config.train_rest = run['config'].get('train_rest')
        fixed = FIXED + FIXED_PACKED * (config.method in ('loqt', 'lora')) + FIXED_LORA * (config.method == 'lora')
        if 'none' not in (config.coreset, run['config'].get('coreset', 'none')):
            fixed += FIXED_CORESET
        if changed := [key for key in fixed if getattr(config, key) != run['config'].get(key)]:
            was = ' '.join(f'--{key}={run["config"].get(key)}' for key in changed)
            now = ' '.join(f'{key}={getattr(config, key)}' for key in changed)
            raise Stop(f'{saved_at} cannot go on with {now}: type {was}, or the config file it was started with')
        if run['step'] >= config.max_iters:
            raise Stop(f'{saved_at} is at step {run["step"]}, max_iters is {config.max_iters}: raise it to go on')
    elif (checkpoint.exists(last) or checkpoint.exists(best)) and not config.overwrite:
        raise Stop(
            f'{config.out_dir} holds a run already: --init_from=resume goes on with it, --overwrite replaces it, '
            'or choose another --out_dir'
        )
    if config.train_rest == 'auto' and config.method == 'lora':  # decided now, for those who resume this run
        config.train_rest = 'yes' if config.init_from == 'scratch' else 'no'
    source, adapter = saved_at, None
    if config.init_from not in ('scratch', 'resume'):
        source = config.init_from if os.path.isdir(config.init_from) else download(config.init_from)
        adapter = source if read_adapter(source) else None
        if adapter and config.method != 'lora':
            raise Stop(f'{source} is an adapter: use --method=lora, or python sample.py {source} --save_to=DIR first')
        source = weights_folder(source)  # the folder of a run of ours will do, too
    files = tokenizer.files_of(folder, source)
    model = build_model(config, folder, meta['vocab_size'], dtype, device, source, layers_of(config))
    if not source:
        model.config.eos_token_id = tok.eot
    optimizer = method_of(config).setup(model, config)
    if adapter:
        load_adapter(model, adapter)
    if saved_at:
        checkpoint.load_optimizer(saved_at, optimizer)
    selection = make_selection(config, train_data)
    if saved_at and selection:
        checkpoint.load_selection(saved_at, selection)
    if rank == 0:
        plan = trace.plan_memory(
            config,
            model.config,
            dtype,
            device,
            method_of(config),
            training_step,
            make_selection(config),
            model.activation_dtype,
        )
        report.print_plan(config, model, plan, folder, meta, device, __file__)
        # Python and torch, on a CPU part of the process; what the model takes is there already
        there = plan.weights + plan.states * bool(saved_at)
        at_start = 0 if on_cuda else max(report.memory(device) - there, 0)
        if not on_cuda:
            print(f'memory: {(at_start + plan.total) / 1e9:.2f} GB with what Python and torch take themselves')
        elif plan.card > (room := torch.cuda.get_device_properties(device).total_memory):
            advice = fit.memory_advice(config, model.config, problems, FIXED * bool(saved_at))
            print(f'warning: the plan is more than the {room / 1e9:.2f} GB of this card; try {advice}')

    # ---- the run's own files, and its end ----
    if config.overwrite and rank == 0 and not saved_at:
        checkpoint.remove(last)
        checkpoint.remove(best)
    settings = {key: value for key, value in vars(config).items() if not key.startswith('_')}
    if saved_at:
        settings['init_from'] = run['config']['init_from']  # what the run began from: its adapter belongs to that
    if rank == 0:
        os.makedirs(config.out_dir, exist_ok=True)
        tracker = report.make_tracker(config.tracker, config.out_dir, settings)
        metrics = report.Metrics(os.path.join(config.out_dir, 'metrics.csv'), run['step'], tracker)

    def save(folder):
        checkpoint.save(folder, model, optimizer, run | {'config': settings}, files, selection)

    signals = []  # Ctrl-C and SIGTERM let the step finish and save; a second one does not wait

    def ask_to_stop(number, _):
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        say(f'{signal.Signals(number).name}: finishing this step, then saving; once more stops at once', flush=True)

    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)
    forward = model
    if config.compile:
        forward = try_compile(
            model, *(part.to(device) for part in train_data.batch(config.seed, 0, config.batch_size)[:2])
        )

    # ---- the loop ----
    accumulation = config.gradient_accumulation_steps // world
    tokens_per_step = config.batch_size * config.block_size * config.gradient_accumulation_steps
    first = step = run['step']
    losses, norms, kept, numbers, val_loss = [], [], [], {}, None
    before, seconds = run['seconds'], 0.0  # of earlier sessions; of this one's training steps alone
    started = ticked = time.time()
    while True:
        done = step >= config.max_iters or bool(signals)
        if world > 1:  # all processes must leave at the same step
            vote = torch.tensor(float(done), device=device)
            dist.all_reduce(vote, dist.ReduceOp.MAX)
            done = vote.item() > 0
        fresh = step > first or step == 0  # a resumed run does not repeat what was done at the step it resumes from
        eval_now = (fresh and step % config.eval_interval == 0) or step >= config.max_iters
        save_now = step > first and (step % (config.save_interval or config.eval_interval) == 0 or done)

        # ---- once in a while: read the losses back and print them, evaluate, save ----
        if (fresh and step % config.log_interval == 0) or eval_now or save_now:
            if losses:
                values = read_back(losses, norms, step, config)
                busy, n = time.time() - ticked, len(losses)
                seconds += busy
                numbers = {
                    'train_loss': sum(values[0]) / n,
                    'learning_rate': optimizer.lr,
                    'grad_norm': values[1][-1],
                    'tokens_per_second': tokens_per_step * n / busy,
                }
                flops = numbers['tokens_per_second'] / world * model.flops_per_token(config.block_size)
                eta = (config.max_iters - step) * (time.time() - started) / (step - first)
                say(
                    f'step {step}/{config.max_iters} | loss {numbers["train_loss"]:.4f} | lr {optimizer.lr:.2e} | '
                    f'grad norm {values[1][-1]:.3f} | {numbers["tokens_per_second"]:,.0f} tok/s | '
                    f'{1000 * busy / n:.0f} ms | {report.memory(device) / 2**30:.2f} GiB | '
                    f'MFU {report.mfu(flops, device)} | ETA {report.clock(eta)}' + told(selection, kept),
                    flush=True,
                )
                losses, norms, kept = [], [], []
            if eval_now:
                val_loss = evaluate(forward, val_data, config, device, rank, world)
                say(
                    f'step {step}/{config.max_iters} | val loss {val_loss:.4f} | '
                    f'perplexity {math.exp(min(val_loss, 99)):.2f}',
                    flush=True,
                )
            if eval_now and not math.isfinite(val_loss):
                stop_not_finite(f'val loss {val_loss}', step, config)
            scales = [
                t for s in optimizer.state.values() for name, t in s.items() if name.endswith(('scale', 'absmax'))
            ]
            scales += [t for t in model.buffers() if t.is_floating_point()]
            finite = [t.isfinite().all().to(device) for t in (*model.parameters(), *scales)]
            if save_now and not torch.stack(finite).all():
                stop_not_finite('weights that are not finite', step, config)
            better = eval_now and step > first and val_loss < run['best_val_loss']
            run |= {'step': step, 'seconds': before + time.time() - started}
            run['best_val_loss'] = val_loss if better else run['best_val_loss']
            if rank == 0 and fresh:
                metrics.log(
                    step=step,
                    tokens=step * tokens_per_step,
                    seconds=run['seconds'],
                    **numbers,
                    memory=report.memory(device),
                    **({'val_loss': val_loss} if eval_now else {}),
                )
                if better:  # best first: a crash between the two is repaired by the next evaluation
                    save(best)
                if save_now:
                    checkpoint.copy(best, last) if better else save(last)
                if eval_now and config.sample_tokens and step > 0:
                    print_sample(model, tok, config)
            ticked = time.time()
        if done:
            break

        # ---- one step ----
        if selection:
            batches = chosen_batches(selection, model, train_data, config, step, device, rank, world)
            kept.append(selection.kept_share)
        else:
            batches = [
                train_data.batch(config.seed, step * accumulation + micro, config.batch_size, rank, world)[:2]
                for micro in range(accumulation)
            ]
        losses.append(training_step(forward, optimizer, batches, learning_rate_at(step, config), device))
        norms.append(optimizer.grad_norm)
        step += 1

    # ---- the end: one `name: value` a line, for grep ----
    if step < config.max_iters:
        where = f'saved in {last}; go on with\n{report.resume_command()}' if step > first else 'before any new step'
        say(f'{signal.Signals(signals[0]).name if signals else "stopped"} at step {step}, {where}')
    for name, value in {
        'steps': step,
        'tokens': step * tokens_per_step,
        'train_loss': f'{numbers["train_loss"]:.4f}' if numbers else 'N/A',
        'val_loss': f'{val_loss:.4f}' if val_loss is not None else 'N/A',
        'tokens_per_second': f'{tokens_per_step * (step - first) / seconds:.0f}' if seconds else 'N/A',
        'seconds': f'{run["seconds"]:.1f}',
        'peak_bytes_planned': at_start + plan.total if rank == 0 else 'N/A',
        'peak_bytes_measured': report.memory(device, peak=True),
        'method': config.method,
        'device': device,
    }.items():
        say(f'{name}: {value}', flush=True)
    if world > 1:
        dist.destroy_process_group()
    if signals:
        sys.exit(128 + signals[0])


def cli(argv):
    """What `python train.py ARGV` does; exits with one sentence where it cannot go on."""
    config = configurator.load_or_exit(__file__, argv, problems)
    try:
        main(config)
    except (Stop, DataError, ModelError, checkpoint.CheckpointError, tokenizer.TokenizerError) as error:
        sys.exit(f'error: {error}')
    except (ImportError, AdapterError) as error:
        sys.exit(f'error: {error}')
    except subprocess.CalledProcessError:
        sys.exit('error: the data set could not be prepared, for the reason above')
    except torch.linalg.LinAlgError as error:
        sys.exit(f'error: no basis could be made of a gradient ({error}): use a lower --learning_rate')
    except OSError as error:
        where = f'{error.filename or config.out_dir} could not be written or read ({error.strerror})'
        sys.exit(f'error: {where if error.strerror else error}')
    except (RuntimeError, MemoryError) as error:  # a GPU's out-of-memory has a type of its own, a CPU's has not
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or 'allocate memory' in str(error):
            kept = FIXED * (config.init_from == 'resume')
            sys.exit(f'error: {fit.explain_out_of_memory(config, error, problems, kept)}')
        raise
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == '__main__':
    cli(sys.argv[1:])
