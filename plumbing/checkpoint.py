"""
Checkpoints that survive a crash at any moment: out_dir/last and out_dir/best, each a Hugging Face folder with the
optimizer's and the run's state beside the weights.

    save('out/last', model, optimizer, run)          # written under another name, synced, then renamed into place
    folder, run = find('out/last')                   # or the one before it, if a crash came between two renames
"""

import json
import os
import shutil

import torch


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message says what to do."""


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


def save(folder, model, optimizer, run, extra_files, selection=None):
    """Write weights, `optimizer.pt`, `coreset.pt` if there is a selection, and `run.json` (a dict of plain values) to
    `folder`, replacing what was there only when all is on disk. `extra_files` (the tokenizer's), name -> bytes, make
    the folder complete in itself."""
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
    except Exception as error:  # OSError here, safetensors' and torch's own types for the same full disk
        if not os.path.exists(folder) and os.path.exists(folder + '.old'):
            os.rename(folder + '.old', folder)
        shutil.rmtree(new, ignore_errors=True)
        kept = f'{folder} still holds the one before' if os.path.exists(folder) else 'there was none before it'
        reason = getattr(error, 'strerror', None) or first_line(error)
        raise CheckpointError(
            f'could not write a checkpoint to {folder} ({reason}); {kept}: free some space or choose another --out_dir'
        ) from error


def copy(folder, target):
    """Make `target` the same checkpoint as `folder`, by hard links where the file system has them: no bytes written."""
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
        os.fsync(handle)  # a rename that reaches the disk before the bytes would leave an empty file after a power cut
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


def elsewhere(path):
    return f'move {path} away to resume from best/ beside it, if there is one, or start anew with another --out_dir'


def find(folder):
    """-> the folder to read, and its run.json as a dict."""
    for path in (folder, folder + '.old'):
        if os.path.isdir(path):
            try:
                with open(os.path.join(path, 'run.json')) as f:
                    return path, json.load(f)
            except (OSError, ValueError) as error:
                raise CheckpointError(f'{path}/run.json cannot be read ({error}): {elsewhere(path)}') from None
    raise CheckpointError(f'{folder} does not exist, nothing to resume: drop --init_from=resume to start anew')


def load_optimizer(path, optimizer):
    """Fill the optimizer's state from path/optimizer.pt; its hyper-parameters stay those of this run."""
    file = os.path.join(path, 'optimizer.pt')
    try:
        state = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
        state['param_groups'] = optimizer.state_dict()['param_groups']
        optimizer.load_state_dict(state)
    except Exception as error:
        reason = first_line(error)
        raise CheckpointError(f'{file} is missing or broken ({reason}): {elsewhere(path)}') from error


def load_selection(path, selection):
    """Fill a selection's state from path/coreset.pt; a run that did without one so far has none."""
    file = os.path.join(path, 'coreset.pt')
    try:
        if find(path)[1].get('config', {}).get('coreset', 'none') != 'none':
            selection.load_state_dict(torch.load(file, map_location='cpu', weights_only=True))
    except Exception as error:
        reason = first_line(error)
        raise CheckpointError(f'{file} is missing or broken ({reason}): {elsewhere(path)}') from error
