"""What a run tells the world: metrics.csv, a tracker if asked for, memory, use of the machine, what to type next."""

import atexit
import csv
import importlib
import math
import os
import re
import shlex
import sys

import torch

import configurator
from configurator import BOOLS

try:
    import resource
except ImportError:  # Windows: no peak to report there
    resource = None

COLUMNS = ['step', 'tokens', 'train_loss', 'val_loss', 'learning_rate', 'grad_norm', 'tokens_per_second', 'seconds']
COLUMNS += ['memory']

# Dense bf16 (V100, T4: fp16) peaks from the vendors' data sheets, FLOP/s. An unknown card's MFU is N/A, not a guess.
PEAK_FLOPS = {
    'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'A6000': 155e12, 'A10G': 70e12, 'A10': 125e12,
    'L40S': 362e12, 'L4': 121e12, 'RTX 5090': 209e12, 'RTX 4090': 165e12, 'RTX 4080': 97e12, 'RTX 3090': 71e12,
    'V100': 125e12, 'T4': 65e12,
}  # fmt: skip


def mfu(flops_per_second, device):
    """Model FLOPs utilisation as text."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else 'CPU'
    known = not re.search(r'Laptop|Max-Q|NVL|SUPER|\bTi\b|\bD\b', name)  # variants of a card, with other peaks
    peak = next((peak for card, peak in PEAK_FLOPS.items() if known and re.search(rf'\b{card}\b', name)), None)
    return f'{100 * flops_per_second / peak:.1f}%' if peak else 'N/A'


def memory(device, peak=False):
    """Bytes in use now, or at the peak so far: allocated by torch on a GPU, resident in the process on a CPU."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    if resource is None:
        return math.nan
    if peak or not os.path.exists('/proc/self/statm'):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def clock(seconds):
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'


class Metrics:
    """metrics.csv, a row for each log line or evaluation, and the tracker. A resumed run drops rows it will redo."""

    def __init__(self, path, first_step=0, tracker=None):
        self.path, self.tracker, rows = path, tracker, []
        if first_step and os.path.exists(path):
            with open(path, newline='') as f:
                rows = [row for row in csv.DictReader(f) if int(row['step']) <= first_step]
        with open(path + '.new', 'w', newline='') as f:
            writer = csv.DictWriter(f, COLUMNS, extrasaction='ignore')
            writer.writeheader()
            writer.writerows(rows)
        os.replace(path + '.new', path)

    def log(self, **row):
        with open(self.path, 'a', newline='') as f:
            csv.DictWriter(f, COLUMNS).writerow(row)
        if self.tracker:
            self.tracker({key: value for key, value in row.items() if key != 'step'}, row['step'])


def make_tracker(kind, out_dir, config):
    """A function (values, step) that sends to wandb, trackio or tensorboard; None for 'none'.

    Raises ImportError, in a sentence, where the package is not installed: it is imported only here."""
    if kind == 'none':
        return None
    module = 'torch.utils.tensorboard' if kind == 'tensorboard' else kind
    try:
        library = importlib.import_module(module)
    except ImportError:
        raise ImportError(f"tracker='{kind}' needs a package: pip install {kind}, or use --tracker=none") from None
    if kind == 'tensorboard':
        writer = library.SummaryWriter(out_dir)

        def send(values, step):
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return send
    library.init(project='nano24', name=os.path.basename(out_dir), config=config)
    atexit.register(library.finish)
    return lambda values, step: library.log(values, step=step)


def resume_command(extra=()):
    """What the user typed, with --init_from=resume, ready to be typed."""
    processes = int(os.environ.get('WORLD_SIZE', 1))
    launch = (
        ['-m', 'torch.distributed.run', f'--nproc_per_node={os.environ.get("LOCAL_WORLD_SIZE")}']
        if processes > 1
        else []
    )
    words, kept = sys.argv[1:], []
    while words:
        word = words.pop(0)
        name = word.replace('-', '_')
        if name == '__init_from' or (name == '__overwrite' and words and words[0].lower() in BOOLS):
            words.pop(0)  # its value
        elif not name.startswith(('__init_from', '__overwrite')):
            kept.append(word)
    return shlex.join(['python', *launch, 'train.py', *kept, '--init_from=resume', *extra])


def print_plan(config, model, plan, folder, meta, device, script):
    """What is about to happen, with the arithmetic. meta is None where the data is not there yet (a dry run)."""
    c, total = config, config.batch_size * config.block_size * config.gradient_accumulation_steps
    print(configurator.as_text(config, script))
    print(f'model: {model.n_params():,} parameters in {str(model.head.dtype).removeprefix("torch.")} on {device}')
    print(f'memory: planned peak of all tensors {plan}')
    if plan.moment:
        shown = f', {plan.card / 1e9:.2f} GB as nvidia-smi shows it' if plan.context else ''
        print(f'memory: that is in {plan.moment}{shown}; python memest.py has the details')
    epochs = ''
    if meta:
        counts = f'{meta["train_tokens"]:,} train and {meta["val_tokens"]:,} val tokens, {len(meta["sources"])} sources'
        print(f'data: {folder}, {counts}, {meta["vocab_size"]:,} ids')
        epochs = f' = {total * c.max_iters / meta["train_tokens"]:.2f} epochs'
    else:
        needed = f' --tokens={total * c.max_iters}' if c.dataset == 'c4' else ''
        print(f'data: {folder} is not prepared yet: python {os.path.join(folder, "prepare.py")}{needed} does that')
    print(
        f'step: {c.batch_size} windows x {c.block_size} tokens x {c.gradient_accumulation_steps} micro-batches '
        f'= {total:,} tokens; {c.max_iters:,} steps = {total * c.max_iters:,} tokens{epochs}',
        flush=True,
    )
