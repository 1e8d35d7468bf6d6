"""What a run reports: the plan, log lines, memory, MFU, the lines at the end, and what to type next."""

import math
import os
import re
import sys
import time

import torch

from adam import average_
from configurator import method_of
from data.batches import prepare_command
from plumbing import Stop, resume
from plumbing.begin import tokens_a_step
from plumbing.metrics import METRICS, Metrics, make_tracker

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


COLUMNS = 100  # of a log line


def mfu(flops_per_second, device):
    """Model FLOPs utilisation as text; '' where the device's peak is not known."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else 'CPU'
    known = not re.search(r'Laptop|Max-Q|NVL|SUPER|\bTi\b|\bD\b', name)  # these variants of a card have other peaks
    peak = next((peak for card, peak in PEAK_FLOPS.items() if known and re.search(rf'\b{card}\b', name)), None)
    return f'{100 * flops_per_second / peak:.1f}%' if peak else ''


def memory(device):
    """Bytes in use now: allocated by torch on a GPU, resident in the process on a CPU."""
    return torch.cuda.memory_allocated(device) if torch.device(device).type == 'cuda' else resident()


def resident(peak=False):
    """Bytes of main memory that this process holds now, or held at most."""
    if resource is None:
        return math.nan
    if peak or not os.path.exists('/proc/self/statm'):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def clock(seconds):
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f'{minutes}:{int(seconds) % 60:02d}' if hours == 0 else f'{hours}h{minutes % 60:02d}'


def count(n, thing):
    """3 steps, 1 step."""
    return f'{n:,} {thing}' + 's' * (n != 1)


def joined(parts):
    """The parts with ' | ' between them, in lines of at most COLUMNS, the later ones indented."""
    lines = ['']
    for part in parts:
        if lines[-1].strip() and len(lines[-1]) + 3 + len(part) > COLUMNS:
            lines.append('   ')
        lines[-1] += f' | {part}' if lines[-1] else part
    return '\n'.join(lines)


# ---- before, during and after the loop ----------------------------------------------------------------------------


def print_plan(config, model, plan, folder, meta, device, windows=0):
    """Print what the run is about to do, with the arithmetic. meta: None if the data is not prepared yet (dry run).
    windows: in an epoch, where they are known; examples leave room in theirs, which the tokens alone do not tell."""
    c, total = config, tokens_a_step(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = str(model.head.dtype).removeprefix('torch.')
    print(f'model: {model.n_params():,} parameters in {dtype} on {device}, {trained:,} trained by {c.method}')
    if hasattr(method_of(c), 'described'):
        print(f'{c.method}: {method_of(c).described(c)}')
    print(f'memory: planned peak of all tensors {plan}')
    if plan.moment:
        shown = f', {plan.card / 1e9:.2f} GB as nvidia-smi shows it' if plan.context else ''
        print(f'memory: the peak is in {plan.moment}{shown}; python memest.py has the details')
    epochs = ''
    if meta:
        sources = count(len(meta['sources']), 'source')
        print(f'data: {folder}, {meta["train_tokens"]:,} train and {meta["val_tokens"]:,} val tokens, {sources}')
        if meta['examples']:
            counts = [f'{meta[f"{split}_examples"]:,} {split} examples' for split in ('train', 'val')]
            if meta['task'] == 'lm':
                more = (f' with {meta[f"{split}_trained"]:,} trained tokens' for split in ('train', 'val'))
                counts = [one + what for one, what in zip(counts, more)]
            print(f'data: {" and ".join(counts)}')
            if meta['task'] == 'classify':
                print(f'data: each with a label, {", ".join(meta["labels"]) or "a number"}')
        epochs = f' = {total * c.max_iters / meta["train_tokens"]:.2f} epochs'
    else:
        needed = f' --tokens={total * c.max_iters}' if c.dataset == 'c4' else ''
        print(f'data: {folder} is not prepared yet: {prepare_command(folder)}{needed} does that')
    micro_batches = count(c.gradient_accumulation_steps, 'micro-batch').replace('batchs', 'batches')
    if c.task == 'classify' or (meta and meta['examples'] and (not c.packing or c.coreset != 'none')):
        total = c.batch_size * c.gradient_accumulation_steps
        rows = f'{count(c.batch_size, "example")} of up to {c.block_size} tokens'
        epochs, tokens = f' = {total * c.max_iters / meta["train_examples"]:.2f} epochs' if meta else '', 'examples'
    else:
        rows, tokens = f'{count(c.batch_size, "window")} x {c.block_size} tokens', 'tokens'
        if meta and meta['examples'] and windows:
            epochs = f' = {total // c.block_size * c.max_iters / windows:.2f} epochs'
    print(
        f'step: {rows} x {micro_batches} = {total:,} {tokens}; '
        f'{count(c.max_iters, "step")} = {total * c.max_iters:,} {tokens}{epochs}',
        flush=True,
    )


def print_times(config, eval_tokens, warmup, planned, step=0):
    """What takes longer than one may think, before it begins. planned: memory.rates.Times, or why there are none; step:
    where the run goes on."""
    c = config
    times = 1 + -(-c.max_iters // c.eval_interval)  # before the first step, too
    # a forward is a third of a step's work
    share = times * eval_tokens / (times * eval_tokens + 3 * tokens_a_step(c) * c.max_iters)
    print(f'evaluation: {count(times, "time")} on {eval_tokens:,} tokens, about {share:.0%} of the work')
    if isinstance(planned, str):
        print(f'ETA: {planned}', flush=True)
    else:
        left = c.max_iters - step
        eta = clock(planned.run(left, eval_tokens * (1 + left // c.eval_interval)))
        print(f'ETA {eta}, evaluations included; {planned}', flush=True)
    if warmup > c.max_iters:
        print(f'warm-up: {warmup:,} steps, longer than this run: the rate stays below learning_rate', flush=True)


def print_changes(config, begin, learning_rate_at):
    if changes := list(begin.changes(config, learning_rate_at)):
        print(*[f'changed since {begin.saved_at} was saved:', *changes], sep='\n    ', flush=True)


def evaluated(found, begin, config, here):
    """The lines of a run that only evaluates. found: {'val_loss': ..., and metrics}."""
    for name, value in found.items():
        here.say(f'{name}: {value:.4f}')
    here.say(f'val_step: {begin.step}\nmethod: {config.method}\ndevice: {here.device}')


# Columns of metrics.csv that are not the method's to write.
OWN = ('loss', 'step', 'tokens', 'train_loss', 'val_loss', 'learning_rate', 'tokens_per_second', 'seconds', 'memory')


def checked(metrics):
    """An optimizer's metrics as {name: 0-dim tensor}. Raises Stop for what no column can hold, before a step is lost to
    it."""
    found = {}
    for name, value in metrics.items():
        if name in OWN:
            raise Stop(f"metrics[{name!r}] has the name of one of train.py's own columns: call it something else")
        if not isinstance(value, (int, float, torch.Tensor)) or (torch.is_tensor(value) and value.numel() != 1):
            raise Stop(f'metrics[{name!r}] is no single number: put one there, such as its mean')
        found[name] = torch.as_tensor(value).detach().reshape(())
    return found


class Log:
    """The reports of the loop: log lines, metrics.csv, a tracker, and the `name: value` lines at the end.

    `note` keeps each step's loss and metrics on the device; `training` reads them back and prints. All processes call
    all methods, but only the first one prints and writes."""

    def __init__(self, config, model, plan, begin, here):
        self.config, self.here, self.plan, self.begin, self.first_step = config, here, plan, begin, begin.step
        self.flops_per_token = model.flops_per_token(config.block_size)
        self.noted, self.rates, self.parts = [], [], []  # of the steps since the last log line
        self.numbers, self.row, self.busy = {}, None, 0.0
        self.val = {'val_loss': None, 'val_step': None}  # the last that was measured
        self.val |= {name: value for name, value in begin.run.items() if name.startswith('val_')}
        self.started = self.ticked = time.perf_counter()
        if here.rank == 0 and not config.eval_only:
            os.makedirs(config.out_dir, exist_ok=True)
            settings = {key: value for key, value in vars(config).items() if not key.startswith('_')}
            tracker = make_tracker(config.tracker, config.out_dir, settings)  # first: it may refuse
            self.csv = Metrics(os.path.join(config.out_dir, METRICS), begin.step, tracker, bool(begin.replaces))

    def start_clock(self):
        """The next step begins now; what came before, compilation or a checkpoint, is not its time."""
        if self.row is None:  # the first one
            self.started = time.perf_counter()
        self.ticked = time.perf_counter()

    def note(self, loss, optimizer, *parts):
        """Keep a step's loss and the optimizer's metrics without reading them back. parts: a selection's kept_share."""
        self.noted.append({'loss': loss, **checked(optimizer.metrics)})
        optimizer.metrics = {}  # what the next step does not measure is not its
        self.rates.append(optimizer.lr)
        self.parts += parts

    def training(self, step, more=''):
        """Print a log line on the steps since the last one, with `more` at its end. Waits for the device.

        Raises Stop if a loss is not finite."""
        self.row = {'step': step, 'tokens': self.begin.position(step, self.config)['tokens']}
        if self.noted:
            rows = self.read_back(step)
            n, c, now = len(rows), self.config, time.perf_counter()
            seconds = max(now - self.ticked, 1e-9)  # a clock may not have moved
            self.busy += seconds
            speed = self.begin.tokens_a_step(c) * n / seconds
            eta = (c.max_iters - step) * (now - self.started) / (step - self.first_step)
            loss = sum(row.pop('loss') for row in rows) / n
            last = {name: value for row in rows for name, value in row.items()}  # the latest of each
            self.numbers = {'train_loss': loss, 'learning_rate': self.rates[-1], **last, 'tokens_per_second': speed}
            used = mfu(speed / self.here.world * self.flops_per_token, self.here.device)
            parts = [f'step {step}/{c.max_iters}', f'loss {loss:.4f}', f'lr {self.rates[-1]:.1e}']
            parts += [f'{name.replace("_", " ")} {value:#.3g}' for name, value in last.items()]
            tokens = f'{speed:,.0f}' if speed >= 100 else f'{speed:.3g}'
            parts += [f'{tokens} tok/s', f'MFU {used}' if used else f'{memory(self.here.device) / 1e9:.1f} GB']
            parts += [f'ETA {clock(eta)}', *more.split(' | ')[1:]]
            self.here.say(joined(parts))
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

    def evaluation(self, step, found):
        """found: {'val_loss': ..., and of labelled examples the metrics}."""
        c, val_loss = self.config, found['val_loss']
        self.row |= found
        self.val = found | {'val_step': step}
        parts = [f'{name.removeprefix("val_").replace("_", " ")} {found[name]:.4f}' for name in found][1:]
        parts = parts or [f'perplexity {math.exp(min(val_loss, 99)):.2f}']
        self.here.say(joined([f'step {step}/{c.max_iters}', f'val loss {val_loss:.4f}', *parts]))
        if not math.isfinite(val_loss):
            stop_not_finite(f'val loss {val_loss}', step, self.numbers.get('learning_rate', c.learning_rate), c)

    def write_row(self):
        """Write the row that `training` began and `evaluation` extended: before a checkpoint, since a run that resumes
        from it does not write that row again."""
        if self.here.rank == 0:
            self.csv.log(**self.row, seconds=self.seconds(), memory=memory(self.here.device))

    def seconds(self):
        """Duration of the run, earlier sessions included."""
        return self.begin.run['seconds'] + time.perf_counter() - self.started

    def end(self, step, stop, measured):
        """Print one `name: value` per line, for grep. measured: bytes of all tensors at the peak, or None."""
        c, here, loss = self.config, self.here, self.val['val_loss']
        if step < c.max_iters:
            last = os.path.join(c.out_dir, 'last')
            where = (
                f'saved in {last}; go on with\n{resume.command()}' if step > self.first_step else 'before any new step'
            )
            here.say(f'{stop.name} at step {step}, {where}')
        new_tokens = self.begin.tokens_a_step(c) * (step - self.first_step)
        planned = self.plan and (self.plan.allocated if here.on_cuda else self.plan.total)
        for name, value in {
            'steps': step,
            'tokens': self.begin.position(step, c)['tokens'],
            'train_loss': f'{self.numbers["train_loss"]:.4f}' if self.numbers else 'N/A',
            'val_loss': f'{loss:.4f}' if loss is not None else 'N/A',
            **{name: f'{x:.4f}' for name, x in self.val.items() if name not in ('val_loss', 'val_step')},
            'val_step': self.val['val_step'] if loss is not None else 'N/A',  # where that was measured
            'tokens_per_second': f'{new_tokens / self.busy:.0f}' if self.busy else 'N/A',
            'seconds': f'{self.seconds():.1f}',
            'peak_bytes_planned': planned or 'N/A',
            'peak_bytes_measured': measured or 'N/A',
            'resident_bytes': resident(peak=True),
            'method': c.method,
            'device': here.device,
        }.items():
            here.say(f'{name}: {value}')


def check_finite(model, optimizer, step, config, here):
    """Raise Stop on all processes if a weight, or a scale of packed weights, is not finite: saving it would ruin the
    checkpoint."""
    scales = [t for s in optimizer.state.values() for name, t in s.items() if name.endswith(('scale', 'absmax'))]
    scales += [t for t in model.buffers() if t.is_floating_point()]
    finite = [t.isfinite().all().to(model.head.device) for t in (*model.parameters(), *scales)]
    if here.any(not torch.stack(finite).all()):
        stop_not_finite('weights that are not finite', step, optimizer.lr, config)


def stop_not_finite(what, step, rate, config, more=''):
    """Raise Stop, saying how to continue from the last good checkpoint. Training on would ruin the weights, saving them
    the checkpoint."""
    lower = f'--learning_rate={config.learning_rate / 2:g}'
    last = os.path.join(config.out_dir, 'last')
    replacing = os.path.exists(os.path.join(config.out_dir, METRICS + '.old'))  # last/ is an earlier run's
    if resume.exists(last) and not replacing:
        advice = f'go on from the last good checkpoint with {resume.command(lower)}'
    else:
        advice = f'start again with {lower}'
    raise Stop(f'{what} at step {step} (learning rate {rate:.3g}{more}); nothing was saved after that: {advice}')
