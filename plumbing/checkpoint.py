"""
Checkpoints that survive a crash at any moment: out_dir/last and out_dir/best, each a Hugging Face folder with the
optimizer's and the run's state beside the weights.

    save('out/last', model, optimizer, run)          # written under another name, synced, then renamed into place
    folder, run = find('out/last')                   # or the one before it, if a crash came between two renames
"""

import json
import os
import shutil
from dataclasses import dataclass, field

import torch

from plumbing import Stop
from plumbing.hf import download, first_line, load_adapter, read_adapter, weights_folder


class CheckpointError(Stop):
    """A checkpoint that cannot be written or read; the message says what to do."""


def save(folder, model, optimizer, run, extra_files, selection=None):
    """Write weights, `optimizer.pt`, `coreset.pt` if there is a selection, and `run.json` (a dict of plain values) to
    `folder`. An earlier checkpoint there is replaced only when everything is on disk. `extra_files` are the tokenizer's
    {name: bytes}, so that the folder is complete."""
    new = folder + '.new'
    try:
        shutil.rmtree(new, ignore_errors=True)
        model.save_pretrained(new, merged=run.get('config', {}).get('save_merged', True))
        torch.save(optimizer.state_dict(), os.path.join(new, 'optimizer.pt'))
        if selection:
            torch.save(selection.state_dict(), os.path.join(new, 'coreset.pt'))
        with open(os.path.join(new, 'run.json'), 'w') as f:
            json.dump(run, f, indent=1)
        for name, content in extra_files.items():
            with open(os.path.join(new, name), 'wb') as f:
                f.write(content)
        swap(new, folder)
    except Exception as error:  # a full disk is an OSError, or an error type of safetensors or torch
        if not os.path.exists(folder) and os.path.exists(folder + '.old'):
            os.rename(folder + '.old', folder)
        shutil.rmtree(new, ignore_errors=True)
        kept = f'{folder} still holds the one before' if os.path.exists(folder) else 'there was none before it'
        reason = getattr(error, 'strerror', None) or first_line(error)
        raise CheckpointError(
            f'could not write a checkpoint to {folder} ({reason}); {kept}: free some space or choose another --out_dir'
        ) from error


def copy(folder, target):
    """Copy the checkpoint `folder` to `target`, by hard links if the file system has them, which writes no data."""
    new = target + '.new'
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(new)
    for name in os.listdir(folder):
        try:
            os.link(os.path.join(folder, name), os.path.join(new, name))
        except OSError:
            shutil.copy(os.path.join(folder, name), new)
    swap(new, target)


def swap(new, folder):
    """Rename the complete folder `new` to `folder`; until then the old one exists, as `folder` or `folder.old`."""
    for name in [*os.listdir(new), '.'] if os.name == 'posix' else []:
        handle = os.open(os.path.join(new, name), os.O_RDONLY)
        os.fsync(handle)  # if the rename reached the disk before the data, a power cut would leave an empty file
        os.close(handle)
    old = folder + '.old'
    if os.path.exists(folder):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def exists(folder):
    return os.path.isdir(folder) or os.path.isdir(folder + '.old')


def remove(folder):
    for path in (folder + '.old', folder):
        shutil.rmtree(path, ignore_errors=True)


def advice_for_broken(path):
    return f'move {path} away to resume from best/ beside it, if there is one, or start anew with another --out_dir'


def find(folder):
    """-> the folder to read, `folder` or `folder.old`, and its run.json as a dict."""
    for path in (folder, folder + '.old'):
        if os.path.isdir(path):
            try:
                with open(os.path.join(path, 'run.json')) as f:
                    run = json.load(f)
                in_todays_keys(run.get('config', {}))
                return path, run
            except (OSError, ValueError) as error:
                raise CheckpointError(f'{path}/run.json cannot be read ({error}): {advice_for_broken(path)}') from None
    raise CheckpointError(f'{folder} does not exist, nothing to resume: drop --init_from=resume to start anew')


def in_todays_keys(c):
    """A run's configuration, changed in place where it was written before methods had options of their own.

    Raises CheckpointError for what no method of today does."""
    if 'residual' not in c:
        return
    packed = c['weight_bits'] == 8 or bool(c['lazy'])
    if c['method'].startswith('apollo'):
        c['method'], c['tensorwise'] = 'apollo', c['method'] == 'apollo_mini'
    elif c['method'] == 'galore' and c['residual'] == 'fira' and packed:
        raise CheckpointError('this run had the residual of Fira with int8 weights or lazy: no method has both now')
    elif c['method'] == 'galore' and c['residual'] == 'fira':
        c['method'] = 'fira'
    elif c['method'] == 'galore' and packed:
        c['method'] = 'qgalore'


def load_optimizer(path, optimizer):
    """Fill the optimizer's state from path/optimizer.pt; its hyper-parameters stay as configured in this run."""
    file = os.path.join(path, 'optimizer.pt')
    try:
        state = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
        state['param_groups'] = optimizer.state_dict()['param_groups']
        optimizer.load_state_dict(state)
    except Exception as error:
        reason = first_line(error)
        raise CheckpointError(f'{file} is missing or broken ({reason}): {advice_for_broken(path)}') from error


def load_selection(path, selection):
    """Fill a selection's state from path/coreset.pt, which is missing if the run had no selection so far."""
    file = os.path.join(path, 'coreset.pt')
    try:
        if find(path)[1].get('config', {}).get('coreset', 'none') != 'none':
            selection.load_state_dict(torch.load(file, map_location='cpu', weights_only=True))
    except Exception as error:
        reason = first_line(error)
        raise CheckpointError(f'{file} is missing or broken ({reason}): {advice_for_broken(path)}') from error


# ---- how a run begins ---------------------------------------------------------------------------------------------


@dataclass
class Begin:
    """Where a run starts from. weights: folder to load them from, None for new ones; adapter: PEFT folder to load
    LoRA's A and B from; saved_at: the checkpoint that a resumed run continues; run: its run.json."""

    weights: str | None = None
    adapter: str | None = None
    saved_at: str | None = None
    run: dict = field(default_factory=lambda: {'step': 0, 'best_val_loss': 1e30, 'seconds': 0.0})

    @property
    def step(self):
        return self.run['step']

    def restore(self, model, optimizer, selection):
        """Load what is not part of the weights: the adapter, the optimizer's and the selection's state."""
        if self.adapter:
            load_adapter(model, self.adapter)
        if self.saved_at:
            load_optimizer(self.saved_at, optimizer)
        if self.saved_at and selection:
            load_selection(self.saved_at, selection)


def begin(config, fixed, fixed_coreset=()):
    """-> Begin. fixed: keys that a resumed run must not change, since they fix the shape or the meaning of the saved
    tensors; fixed_coreset: more such keys, checked only if the run chooses its batches before and after.

    Raises Stop, saying what to type, if the run cannot begin."""
    last, best = os.path.join(config.out_dir, 'last'), os.path.join(config.out_dir, 'best')
    if config.init_from == 'resume':
        saved_at, run = find(last if exists(last) or not exists(best) else best)
        check_fixed(config, run['config'], saved_at, fixed, fixed_coreset)
        if run['step'] >= config.max_iters:
            raise Stop(f'{saved_at} is at step {run["step"]}, max_iters is {config.max_iters}: raise it to go on')
        return Begin(saved_at, None, saved_at, run)
    if (exists(last) or exists(best)) and not config.overwrite:
        raise Stop(
            f'{config.out_dir} holds a run already: --init_from=resume goes on with it, --overwrite replaces it, '
            'or choose another --out_dir'
        )
    if config.init_from == 'scratch':
        return Begin()
    source = config.init_from if os.path.isdir(config.init_from) else download(config.init_from)
    adapter = source if read_adapter(source) else None
    if adapter and config.method != 'lora':
        raise Stop(f'{source} is an adapter: use --method=lora, or python sample.py {source} --save_to=DIR first')
    return Begin(weights_folder(source), adapter)  # source may also be the out_dir of one of our runs


def clear(config, begin):
    """Remove the checkpoints that --overwrite lets a new run replace."""
    if config.overwrite and not begin.saved_at:
        for name in ('last', 'best'):
            remove(os.path.join(config.out_dir, name))


def check_fixed(config, was, saved_at, fixed, fixed_coreset):
    """Raise Stop if the configuration differs from the saved run's in a fixed key; 'auto' takes the saved value."""
    if 'none' not in (config.coreset, was.get('coreset', 'none')):
        fixed = (*fixed, *fixed_coreset)
    for key in fixed:
        if getattr(config, key, None) == 'auto' and key in was and key != 'dtype':  # 'auto' is a dtype of its own
            setattr(config, key, was[key])
    if changed := [key for key in fixed if getattr(config, key, None) != was.get(key)]:
        old = ' '.join(f'--{key}={was.get(key)}' for key in changed)
        new = ' '.join(f'{key}={getattr(config, key, None)}' for key in changed)
        raise Stop(f'{saved_at} cannot go on with {new}: type {old}, or the config file it was started with')


def save_all(config, model, optimizer, selection, files, run, begin, save_now, better):
    """Save out_dir/last if `save_now`, and out_dir/best if the model is `better` than all before. files: see `save`."""
    last, best = os.path.join(config.out_dir, 'last'), os.path.join(config.out_dir, 'best')
    settings = {key: value for key, value in vars(config).items() if not key.startswith('_')}
    if begin.saved_at:
        settings['init_from'] = begin.run['config']['init_from']  # its first source, on which a LoRA adapter rests
    run = run | {'config': settings}
    if better:  # best first: a crash between the two is repaired by the next evaluation
        save(best, model, optimizer, run, files, selection)
    if save_now and better:
        copy(best, last)
    elif save_now:
        save(last, model, optimizer, run, files, selection)
