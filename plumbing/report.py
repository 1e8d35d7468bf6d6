"""What a run reports: log lines, metrics.csv, a tracker if asked for, memory, MFU, and what to type next."""

import atexit
import csv
import importlib
import math
import os
import re
import shlex
import signal
import sys
import time

import torch

import configurator
from adam import average_
from configurator import BOOLS
from plumbing import Stop

try:
    import resource
except ImportError:  # Windows: no peak to report there
    resource = None

# Dense bf16 (V100, T4: fp16) peaks from the vendors' data sheets, FLOP/s. An unknown card's MFU is N/A, not a guess.
PEAK_FLOPS = {
    'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'A6000': 155e12, 'A10G': 70e12, 'A10': 125e12,
    'L40S': 362e12, 'L4': 121e12, 'RTX 5090': 209e12, 'RTX 4090': 165e12, 'RTX 4080': 97e12, 'RTX 3090': 71e12,
    'V100': 125e12, 'T4': 65e12,
}  # fmt: skip


def mfu(flops_per_second, device):
    """Model FLOPs utilisation as text."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else 'CPU'
    known = not re.search(r'Laptop|Max-Q|NVL|SUPER|\bTi\b|\bD\b', name)  # these variants of a card have other peaks
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
    """metrics.csv, one row per log line or evaluation, and the tracker. The header has the first row's columns and
    grows if a later row has more. A resumed run drops the rows that it will write again."""

    def __init__(self, path, first_step=0, tracker=None):
        self.path, self.tracker, self.rows, self.head = path, tracker, [], []
        if first_step and os.path.exists(path):
            with open(path, newline='') as f:
                reader = csv.DictReader(f)
                self.rows = [row for row in reader if int(row['step']) <= first_step]
                self.head = list(reader.fieldnames or [])
        self.rewrite()

    def rewrite(self):
        with open(f'{self.path}.new', 'w', newline='') as f:
            writer = csv.DictWriter(f, self.head, extrasaction='ignore')  # of a row longer than its head
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(f'{self.path}.new', self.path)

    def log(self, **row):
        self.rows.append(row)
        if more := [name for name in row if name not in self.head]:
            self.head += more
            self.rewrite()
        else:
            with open(self.path, 'a', newline='') as f:
                csv.DictWriter(f, self.head).writerow(row)
        if self.tracker:
            self.tracker({name: x for name, x in row.items() if x is not None and name != 'step'}, row['step'])


def make_tracker(kind, out_dir, config):
    """A function (values, step) that sends to wandb, trackio or tensorboard; None for 'none'.

    The package is imported only here. Raises ImportError, in one sentence, if it is not installed."""
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
    """The command that the user typed, with --init_from=resume, ready to paste."""
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


# ---- before, during and after the loop ----------------------------------------------------------------------------


def print_plan(config, model, plan, folder, meta, device, script):
    """Print what the run is about to do, with the arithmetic. meta: None if the data is not prepared yet (dry run)."""
    c, total = config, tokens_per_step(config)
    print(configurator.as_text(config, script))
    print(f'model: {model.n_params():,} parameters in {str(model.head.dtype).removeprefix("torch.")} on {device}')
    print(f'memory: planned peak of all tensors {plan}')
    if plan.moment:
        shown = f', {plan.card / 1e9:.2f} GB as nvidia-smi shows it' if plan.context else ''
        print(f'memory: the peak is in {plan.moment}{shown}; python memest.py has the details')
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


def tokens_per_step(config):
    return config.batch_size * config.block_size * config.gradient_accumulation_steps


class Log:
    """The reports of the loop: log lines, metrics.csv, a tracker, and the `name: value` lines at the end.

    `note` keeps each step's loss and metrics on the device; `training` reads them back and prints. All processes call
    all methods, but only the first one prints and writes."""

    def __init__(self, config, model, plan, begin, here):
        self.config, self.here, self.plan, self.before, self.first_step = config, here, plan, begin.run, begin.step
        self.flops_per_token = model.flops_per_token(config.block_size)
        self.noted, self.rates, self.parts = [], [], []  # of the steps since the last log line
        self.numbers, self.row, self.val_loss, self.busy = {}, None, None, 0.0
        self.started = self.ticked = time.time()
        # On a CPU the process holds Python and torch, too. Subtract the part of the plan that is allocated by now.
        self.at_start = 0
        if here.rank == 0 and not here.on_cuda:
            allocated = plan.weights + plan.states * bool(begin.saved_at)
            self.at_start = max(memory(here.device) - allocated, 0)
            here.say(f'memory: {(self.at_start + plan.total) / 1e9:.2f} GB including Python and torch themselves')
        if here.rank == 0:
            os.makedirs(config.out_dir, exist_ok=True)
            settings = {key: value for key, value in vars(config).items() if not key.startswith('_')}
            tracker = make_tracker(config.tracker, config.out_dir, settings)
            self.csv = Metrics(os.path.join(config.out_dir, 'metrics.csv'), begin.step, tracker)

    def start_clock(self):
        """The next step begins now; what came before, compilation or a checkpoint, is not its time."""
        if self.row is None:  # the first one
            self.started = time.time()
        self.ticked = time.time()

    def note(self, loss, optimizer, *parts):
        """Keep a step's loss and the optimizer's metrics without reading them back. parts: a selection's kept_share."""
        self.noted.append({'loss': loss, **optimizer.metrics})
        optimizer.metrics = {}  # what the next step does not measure is not its
        self.rates.append(optimizer.lr)
        self.parts += parts

    def training(self, step, more=''):
        """Print a log line on the steps since the last one, with `more` at its end. Waits for the device.

        Raises Stop if a loss is not finite."""
        self.row = {'step': step, 'tokens': step * tokens_per_step(self.config)}
        if self.noted:
            rows = self.read_back(step)
            seconds, n, c = time.time() - self.ticked, len(rows), self.config
            self.busy += seconds
            speed = tokens_per_step(c) * n / seconds
            eta = (c.max_iters - step) * (time.time() - self.started) / (step - self.first_step)
            loss = sum(row.pop('loss') for row in rows) / n
            last = {name: value for row in rows for name, value in row.items()}  # the latest of each
            self.numbers = {'train_loss': loss, 'learning_rate': self.rates[-1], **last, 'tokens_per_second': speed}
            shown = ''.join(f'{name.replace("_", " ")} {value:.3f} | ' for name, value in last.items())
            self.here.say(
                f'step {step}/{c.max_iters} | loss {loss:.4f} | lr {self.rates[-1]:.2e} | {shown}'
                f'{speed:,.0f} tok/s | {1000 * seconds / n:.0f} ms | {memory(self.here.device) / 2**30:.2f} GiB | '
                f'MFU {mfu(speed / self.here.world * self.flops_per_token, self.here.device)} | ETA {clock(eta)}{more}'
            )
            self.noted, self.rates, self.parts = [], [], []
        self.row |= {'train_loss': None, 'val_loss': None, **self.numbers}

    def read_back(self, step):
        """[{name: float}], a dict for each step since the last line: its loss and metrics, in a single transfer."""
        losses = average_(torch.stack([row['loss'] for row in self.noted]))
        others = [value.to(losses) for row in self.noted for name, value in row.items() if name != 'loss']
        flat = torch.cat([losses, torch.stack(others)] if others else [losses]).tolist()
        losses, others = flat[: len(self.noted)], iter(flat[len(self.noted) :])
        rows = [
            {name: loss if name == 'loss' else next(others) for name in row} for row, loss in zip(self.noted, losses)
        ]
        for i, row in enumerate(rows):
            loss, norm = row['loss'], row.get('grad_norm', 0.0)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what, more = f'loss {loss}', f', grad norm {norm:.4g}'
                if math.isfinite(loss):
                    what, more = f'gradient norm {norm}', f', loss {loss:.4f}'
                stop_not_finite(what, step - len(rows) + i, self.rates[i], self.config, more)
        return rows

    def evaluation(self, step, val_loss):
        c, self.val_loss, self.row['val_loss'] = self.config, val_loss, val_loss
        perplexity = math.exp(min(val_loss, 99))
        self.here.say(f'step {step}/{c.max_iters} | val loss {val_loss:.4f} | perplexity {perplexity:.2f}')
        if not math.isfinite(val_loss):
            stop_not_finite(f'val loss {val_loss}', step, self.numbers.get('learning_rate', c.learning_rate), c)

    def write_row(self):
        """Write the row that `training` began and `evaluation` extended: before a checkpoint, since a run that resumes
        from it does not write that row again."""
        if self.here.rank == 0:
            self.csv.log(**self.row, seconds=self.seconds(), memory=memory(self.here.device))

    def seconds(self):
        """Duration of the run, earlier sessions included."""
        return self.before['seconds'] + time.time() - self.started

    def end(self, step, stop):
        """Print one `name: value` per line, for grep."""
        c, here = self.config, self.here
        if step < c.max_iters:
            last = os.path.join(c.out_dir, 'last')
            where = (
                f'saved in {last}; go on with\n{resume_command()}' if step > self.first_step else 'before any new step'
            )
            here.say(f'{stop.name} at step {step}, {where}')
        new_tokens = tokens_per_step(c) * (step - self.first_step)
        for name, value in {
            'steps': step,
            'tokens': step * tokens_per_step(c),
            'train_loss': f'{self.numbers["train_loss"]:.4f}' if self.numbers else 'N/A',
            'val_loss': f'{self.val_loss:.4f}' if self.val_loss is not None else 'N/A',
            'tokens_per_second': f'{new_tokens / self.busy:.0f}' if self.busy else 'N/A',
            'seconds': f'{self.seconds():.1f}',
            'peak_bytes_planned': self.at_start + self.plan.total if self.plan else 'N/A',
            'peak_bytes_measured': memory(here.device, peak=True),
            'method': c.method,
            'device': here.device,
        }.items():
            here.say(f'{name}: {value}')


class CtrlC:
    """On Ctrl-C or SIGTERM, finish the step, save and stop; a second one stops at once."""

    def __init__(self, here):
        self.here, self.signals = here, []
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number, _):
        if self.signals:
            raise KeyboardInterrupt
        self.signals.append(number)
        self.here.say(f'{self.name}: finishing this step, then saving; once more stops at once')

    @property
    def asked(self):
        return bool(self.signals)

    @property
    def name(self):
        return signal.Signals(self.signals[0]).name if self.signals else 'stopped'

    def exit(self):
        if self.signals:
            sys.exit(128 + self.signals[0])


def check_finite(model, optimizer, step, config):
    """Raise Stop if a weight, or a scale of packed weights, is not finite: saving it would ruin the checkpoint."""
    scales = [t for s in optimizer.state.values() for name, t in s.items() if name.endswith(('scale', 'absmax'))]
    scales += [t for t in model.buffers() if t.is_floating_point()]
    finite = [t.isfinite().all().to(model.head.device) for t in (*model.parameters(), *scales)]
    if not torch.stack(finite).all():
        stop_not_finite('weights that are not finite', step, optimizer.lr, config)


def stop_not_finite(what, step, rate, config, more=''):
    """Raise Stop, saying how to continue from the last good checkpoint. Training on would ruin the weights, saving them
    the checkpoint."""
    lower = f'--learning_rate={config.learning_rate / 2:g}'
    last = os.path.join(config.out_dir, 'last')
    if os.path.isdir(last) or os.path.isdir(last + '.old'):
        advice = f'go on from the last good checkpoint with {resume_command([lower])}'
    else:
        advice = f'start again with {lower}'
    raise Stop(f'{what} at step {step} (learning rate {rate:.3g}{more}); nothing was saved after that: {advice}')
