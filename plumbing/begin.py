"""How a run begins: anew, from a folder of weights, or where an earlier one stopped. What has changed since is said."""

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from types import SimpleNamespace

from data import fields
from data.batches import fingerprint
from plumbing import Stop, resume
from plumbing.checkpoint import load_optimizer, load_selection, tidy, verify
from plumbing.hf import download, load_adapter, read_adapter, weights_folder
from plumbing.metrics import METRICS
from plumbing.resume import CheckpointError, exists, find

# What a change of these keys means for a run that goes on.
MEANS = {
    'dataset': 'another text from here on',
    'seed': 'another order of the text from here on, and other dropout and rounding',
    'block_size': 'the text is cut into other windows, so some of this epoch is read twice and some is not',
    'batch_size': 'it goes on at the next window: none is read twice or left out',
    'gradient_accumulation_steps': 'it goes on at the next window: none is read twice or left out',
    'packing': 'the examples are put into other rows, so some of this epoch is read twice and some is not',
    'data': 'the data set was prepared anew since the run began: other text, or another order, from here on',
}
# Keys of the run's configuration by which its place in the data is known.
A_STEP = dict.fromkeys(('batch_size', 'block_size', 'gradient_accumulation_steps'), fields.whole(1, 2**40))


@dataclass
class Begin:
    """Where a run starts from. weights: folder to load them from, None for new ones; adapter: PEFT folder to load
    LoRA's A and B from; saved_at: the checkpoint that a resumed run continues; run: its run.json; replaces: the out_dir
    of an earlier run, which stays as it is until this one has saved something; data: the data set's fingerprint; row:
    tokens in a row of a batch, on average."""

    weights: str | None = None
    adapter: str | None = None
    saved_at: str | None = None
    run: dict = field(default_factory=lambda: {'step': 0, 'best_val_loss': 1e30, 'seconds': 0.0})
    replaces: str | None = None
    data: str | None = None
    row: float = 0.0

    @property
    def step(self):
        return self.run['step']

    def restore(self, model, optimizer, selection, data, config):
        """Load what is not part of the weights: the adapter, the optimizer's and the selection's state, the place in
        the data."""
        self.data = fingerprint(os.path.dirname(data.path))
        self.row = data.tokens_a_row(config.coreset != 'none')
        if self.adapter:
            load_adapter(model, self.adapter)
        if self.saved_at:
            load_optimizer(self.saved_at, optimizer)
            data.skip = self.windows - self.step * windows_a_step(config)
        if self.saved_at and selection:
            load_selection(self.saved_at, selection)

    @property
    def windows(self):
        """How many windows the run has read, whatever its batch size was then."""
        was = self.run.get('config')
        return self.run.get('windows', self.step * windows_a_step(SimpleNamespace(**was)) if was else 0)

    @property
    def tokens(self):
        """How many tokens it was trained on."""
        was = self.run.get('config')
        return self.run.get('tokens', self.step * tokens_a_step(SimpleNamespace(**was)) if was else 0)

    def tokens_a_step(self, config):
        """How many tokens a step of this run trains on, on average."""
        return tokens_a_step(config) * (self.row or config.block_size) / config.block_size

    def position(self, step, config):
        """What run.json says of the place in the data after this many steps."""
        new = step - self.step
        windows = self.windows + new * windows_a_step(config)
        tokens = self.tokens + round(new * self.tokens_a_step(config))
        return {'step': step, 'windows': windows, 'tokens': tokens, 'data': self.data}

    def changes(self, config, learning_rate_at):
        """Yield a sentence for each thing that is not as it was when the run was saved."""
        was, step = self.run.get('config', {}), self.step
        for key, value in vars(config).items():
            if key in was and was[key] != value and key not in resume.OF_A_SESSION:
                yield f'{key} {was[key]} -> {value}' + (f': {MEANS[key]}' if key in MEANS else '')
        if self.run.get('data', self.data) != self.data and was.get('dataset') == config.dataset:
            yield MEANS['data']
        if was:
            old, new = (learning_rate_at(step, SimpleNamespace(**vars(config) | keys)) for keys in (was, {}))
            if old != new:
                yield f'the schedule of the learning rate changes with that: at step {step} {old:.3g} -> {new:.3g}'

    def forget_the_earlier_run(self, keep_best):
        """Delete what is left of the run that --overwrite lets this one replace."""
        best = os.path.join(self.replaces, 'best')
        if not keep_best:
            tidy(best)
            shutil.rmtree(resume.place(best), ignore_errors=True)
        with contextlib.suppress(OSError):
            os.remove(os.path.join(self.replaces, METRICS + '.old'))
        self.replaces = None


def windows_a_step(config):
    """Windows that a step reads, by all processes: with a coreset the whole pool that it chooses from."""
    pool = config.coreset_from if getattr(config, 'coreset', 'none') != 'none' else 1
    return config.batch_size * config.gradient_accumulation_steps * pool


def tokens_a_step(config):
    return config.batch_size * config.block_size * config.gradient_accumulation_steps


def begin(config, fixed, fixed_coreset=(), first=True):
    """-> Begin. fixed: keys that a resumed run must not change, since they fix the shape or the meaning of the saved
    tensors; fixed_coreset: more such keys, checked only if the run chooses its batches before and after. first: this is
    the process that writes, so it keeps others out of out_dir.

    Raises Stop, saying what to type, if the run cannot begin."""
    last, best = os.path.join(config.out_dir, 'last'), os.path.join(config.out_dir, 'best')
    earlier = exists(last) or exists(best)
    if config.init_from == 'resume':
        return begin_again(config, fixed, fixed_coreset, first)
    if earlier and not config.overwrite and not config.eval_only:
        raise Stop(
            f'{config.out_dir} holds a run already: --init_from=resume goes on with it, --overwrite replaces it, '
            'or choose another --out_dir'
        )
    source = adapter = None
    if config.init_from != 'scratch':
        source = config.init_from if os.path.isdir(config.init_from) else download(config.init_from)
        adapter = source if read_adapter(source) else None
        if adapter and config.method != 'lora':
            raise Stop(f'{source} is an adapter: use --method=lora, or python sample.py {source} --save_to=DIR first')
        source = weights_folder(source)  # it may also be the out_dir of one of our runs
        verify(source, weights_alone=True)
    if first and not config.eval_only:
        resume.lock(config.out_dir)
    return Begin(source, adapter, replaces=config.out_dir if earlier else None)


def begin_again(config, fixed, fixed_coreset, first):
    folder = resume.last_or_best(config.out_dir)
    saved_at, run = find(folder)
    if first and not config.eval_only:
        resume.lock(config.out_dir)
    needed = {name: resume.RUN[name] for name in ('step', 'best_val_loss', 'seconds', 'config')}
    file, advice = os.path.join(saved_at, 'run.json'), resume.advice_for_broken(saved_at)
    fields.check(run, needed, file, CheckpointError, advice)
    fields.check(run['config'], A_STEP, file, CheckpointError, advice)
    check_fixed(config, run['config'], saved_at, fixed, fixed_coreset)
    if run['step'] >= config.max_iters and not config.eval_only:
        raise Stop(f'{saved_at} is at step {run["step"]}, max_iters is {config.max_iters}: raise it to go on')
    if 'optimizer.pt' not in run.get('files', ['optimizer.pt']):
        raise CheckpointError(
            f'{saved_at} was saved with save_best=weights, and a run cannot go on from weights alone: '
            f'start anew from them with --init_from={saved_at} and another --out_dir'
        )
    if first:
        verify(saved_at)
        if saved_at == resume.place(folder):
            tidy(folder)
    return Begin(saved_at, None, saved_at, run)


def check_fixed(config, was, saved_at, fixed, fixed_coreset):
    """Raise Stop if the configuration differs from the saved run's in a fixed key; 'auto' takes the saved value."""
    if 'none' not in (config.coreset, was.get('coreset', 'none')):
        fixed = (*fixed, *fixed_coreset)
    for key in fixed:
        if getattr(config, key, None) == 'auto' and key in was and key != 'dtype':  # 'auto' is a dtype of its own
            setattr(config, key, was[key])
    # A key that the saved run does not have yet is newer than it, and its default is what was done.
    if changed := [key for key in fixed if key in was and getattr(config, key, None) != was[key]]:
        old = ' '.join(f'--{key}={was.get(key)}' for key in changed)
        new = ' '.join(f'{key}={getattr(config, key, None)}' for key in changed)
        raise Stop(f'{saved_at} cannot go on with {new}: type {old}, or the config file it was started with')
