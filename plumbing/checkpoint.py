"""
Checkpoints that survive a crash at any moment and know their own content: out_dir/last and out_dir/best, each a Hugging
Face folder with the optimizer's and the run's state beside the weights.

    save('out/last', model, optimizer, run, {})      # written under another name, synced, then renamed into place
    verify('out/last')                               # raises CheckpointError if a file is not as it was saved

run.json holds a checksum (blake2b) of each file and one of itself: a flipped bit in a weight would otherwise train on.
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import torch

from plumbing import sharding
from plumbing.hf import first_line
from plumbing.resume import (
    CheckpointError,
    advice_for_broken,
    checksum_of,
    exists,
    find,
    launch,
    older,
    place,
    read_run,
)
from plumbing.terminal import patience

STATES = ('optimizer.pt', 'coreset.pt')  # what a run needs to go on, beside the weights

# ---- writing -------------------------------------------------------------------------------------------------------


def save(folder, model, optimizer, run, extra_files, selection=None, states=True):
    """Write weights, `optimizer.pt`, `coreset.pt` if there is a selection, and `run.json` (a dict of plain values) to
    `folder`. An earlier checkpoint there is replaced only when everything is on disk. `extra_files` are the tokenizer's
    {name: bytes}, so that the folder is complete. states=False: the weights alone, from which no run can go on."""
    folder = place(folder)
    new = unused(folder + '.new')
    try:
        model.save_pretrained(new, merged=run.get('config', {}).get('save_merged', True))
        if states:
            torch.save(optimizer.state_dict(), os.path.join(new, 'optimizer.pt'))
        if states and selection:
            torch.save(selection.state_dict(), os.path.join(new, 'coreset.pt'))
        for name, content in extra_files.items():
            with open(os.path.join(new, name), 'wb') as f:
                f.write(content)
        write_run(new, run)
        sync(new)
    except Exception as error:  # a full disk is an OSError, or an error type of safetensors or torch
        shutil.rmtree(new, ignore_errors=True)
        raise not_written(folder, error) from error
    swap(new, folder)


def not_written(folder, error):
    kept = f'{folder} still holds the one before' if exists(folder) else 'there was none before it'
    reason = getattr(error, 'strerror', None) or first_line(error)
    return CheckpointError(
        f'could not write a checkpoint to {folder} ({reason}); {kept}: free some space or choose another --out_dir'
    )


def write_run(folder, run):
    """Write run.json, with the checksums of all files that are in the folder by now."""
    run = {name: value for name, value in run.items() if name not in ('files', 'checksum')}
    run['files'] = checksums(folder, sorted(set(os.listdir(folder)) - {'run.json'}))
    with open(os.path.join(folder, 'run.json'), 'w', encoding='utf-8') as f:
        json.dump(run | {'checksum': checksum_of(run)}, f, indent=1)


def checksums(folder, names):
    """{name: blake2b in hexadecimal}, or None of a file that is missing. hashlib lets go of the interpreter, so that
    shards are read side by side: about a second a gigabyte and core."""

    def checksum(name):
        try:
            with open(os.path.join(folder, name), 'rb') as f:
                return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
        except OSError:
            return None

    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(checksum, names), strict=True))


def copy(folder, target):
    """Copy the checkpoint `folder` to `target`. No hard links: who writes into best/ would write into last/ as well."""
    target = place(target)
    new = unused(target + '.new')
    try:
        shutil.copytree(place(folder), new)
        sync(new)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise not_written(target, error) from error
    swap(new, target)


def unused(path):
    """`path`, deleted if it exists; where it cannot be deleted, a name like it that is free."""
    while os.path.lexists(path):
        shutil.rmtree(path, ignore_errors=True)
        path += '_' * os.path.lexists(path)
    return path


def sync(new):
    """If a rename reached the disk before the data, a power cut would leave empty files."""
    for name in [*os.listdir(new), '.'] if os.name == 'posix' else []:
        handle = os.open(os.path.join(new, name), os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def swap(new, folder):
    """Rename the complete folder `new` to `folder`; until then the old one exists, as `folder` or `folder.old`."""
    try:
        if os.path.exists(folder):
            os.rename(folder, old := unused(folder + '.old'))
        try:
            os.rename(new, folder)
        except OSError:
            os.rename(old, folder)
            raise
    except OSError as error:
        reason = f'{folder} could not be replaced ({error.strerror})'
        raise CheckpointError(f'{reason}; the new checkpoint is complete in {new}: rename it') from error
    tidy(folder)


def tidy(folder):
    """Delete what a crash, or a file that could not be deleted then, has left beside the complete `folder`."""
    for path in older(folder):
        shutil.rmtree(path, ignore_errors=True)


def save_all(config, model, optimizer, selection, files, run, begin, save_now, better):
    """Save out_dir/last if `save_now`, and out_dir/best if the model is `better` than all before. files: see `save`."""
    last, best = os.path.join(config.out_dir, 'last'), os.path.join(config.out_dir, 'best')
    settings = {key: value for key, value in vars(config).items() if not key.startswith('_')}
    if begin.saved_at:
        settings['init_from'] = begin.run['config']['init_from']  # its first source, on which a LoRA adapter rests
    run, all_of_it = run | {'config': settings, 'launch': launch()}, config.save_best == 'all'
    with patience(f'saving to {config.out_dir}'):
        if better:  # best first: a crash between the two is repaired by the next evaluation
            save(best, model, optimizer, run, files, selection, all_of_it)
        if better and all_of_it and (save_now or begin.replaces):
            copy(best, last)
        elif save_now or begin.replaces:
            save(last, model, optimizer, run, files, selection)
    if begin.replaces:  # now that a checkpoint of this run is complete, the earlier run's can go
        begin.forget_the_earlier_run(better)


# ---- reading -------------------------------------------------------------------------------------------------------


def verify(folder, weights_alone=False):
    """Raise CheckpointError, naming the file, if one in a checkpoint of ours is not as it was saved. A folder of
    somebody else, and an old checkpoint, hold no checksums. weights_alone: leave out the states."""
    if not os.path.exists(os.path.join(folder, 'run.json')):
        return
    run = read_run(folder)
    files = run.get('files', {})
    packed = not run['config'].get('save_merged', True)  # then optimizer.pt holds weights, too
    names = [name for name in files if not (weights_alone and name in STATES[packed:])]
    with patience(f'reading the checksums of {folder}'):
        found_now = checksums(folder, names)
    for name, found in found_now.items():
        if found != files[name]:
            what = 'is missing' if found is None else 'is damaged: its bytes are not those that were saved'
            advice = 'save it again, or name another folder' if weights_alone else advice_for_broken(folder)
            raise CheckpointError(f'{os.path.join(folder, name)} {what}: {advice}')


def load_optimizer(path, optimizer):
    """Fill the optimizer's state from path/optimizer.pt; its hyper-parameters stay as configured in this run."""
    file = os.path.join(path, 'optimizer.pt')
    try:
        state = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
        state['param_groups'] = optimizer.state_dict()['param_groups']
        state = sharding.spread(state, optimizer)
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
