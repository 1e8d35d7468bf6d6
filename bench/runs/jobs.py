"""Commands whose output is kept, so that an experiment of many runs can be stopped at any time and go on."""

import os
import subprocess
import sys

from plumbing.build import ROOT


def do(words, log, finished=False):
    """Run `python WORDS` unless its log is there, or nothing if only the `finished` are asked for. -> what it printed,
    or None. An interrupted run starts again."""
    path = os.path.join(ROOT, log)
    if not os.path.exists(path):
        if finished:
            return None
        os.makedirs(os.path.dirname(path), exist_ok=True)
        print('python', *words, flush=True)
        with open(path + '.part', 'w') as f:
            subprocess.run([sys.executable, *words], cwd=ROOT, stdout=f, check=True)
        os.rename(path + '.part', path)
    with open(path) as f:
        return f.read()
