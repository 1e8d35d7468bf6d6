"""
A model taken home: a folder in Hugging Face's layout, complete with its tokenizer, or one GGUF file.

    export.save(model, tok, folder, 'out/mine')             # folder: whose tokenizer's files go with it
    export.save(model, tok, folder, 'out/mine.q8_0.gguf')
"""

import contextlib
import os
import shutil

from data.tokenizer_files import files_of
from plumbing import Stop, gguf_file
from plumbing.checkpoint import swap


def save(model, tok, folder, target, overwrite=False, gguf=''):
    """gguf: 'f16' or 'q8_0'; '': q8_0 if the file's name says so, else f16."""
    if target.endswith('.gguf'):
        check_target(target, overwrite)
        kind = gguf or ('q8_0' if 'q8_0' in os.path.basename(target).lower() else 'f16')
        gguf_file.save(model, target, folder, kind)
        print(f'written: {target}')
        return
    with written(target, overwrite) as new:
        model.save_pretrained(new)
        for name, content in files_of(folder, tok=tok).items():
            with open(os.path.join(new, name), 'wb') as f:
                f.write(content)


def check_target(folder, overwrite):
    """Raise Stop unless a model may be written to `folder`: there is none yet, it is empty, or overwrite allows it."""
    if folder.endswith('.gguf'):  # a file
        if os.path.isdir(folder):
            raise Stop(f'{folder} is a folder: choose another name')
        if os.path.lexists(folder) and not overwrite:
            raise Stop(f'{folder} is there already: choose another name, or --overwrite to replace it')
        return
    there = os.listdir(folder) if os.path.isdir(folder) else []
    if not there and not os.path.lexists(folder):
        return
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise Stop(f'{folder} is a file: choose another folder')
    if there and not overwrite:
        raise Stop(f'{folder} is not empty: choose another folder, or --overwrite to replace it')
    model = {'config.json', 'adapter_config.json'} & set(there)
    if there and not (model and all(os.path.isfile(os.path.join(folder, name)) for name in there)):
        raise Stop(f'{folder} holds other things than a model, which --overwrite would delete: choose another folder')


@contextlib.contextmanager
def written(folder, overwrite):
    """A new folder to write a model into, which takes the name `folder` at the end: what was there is read until then,
    and no file of it is written to, since a run's last/ and best/ share theirs."""
    check_target(folder, overwrite)
    target = os.path.realpath(folder)  # a link goes on to lead there
    new = os.path.join(os.path.dirname(target), f'.{os.path.basename(target)}.new')
    shutil.rmtree(new, ignore_errors=True)
    try:
        os.makedirs(new)
        yield new
        swap(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f'written: {folder}')
