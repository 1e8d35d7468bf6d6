"""
What is known of a run before torch is imported: its folders, run.json, the lock on out_dir, the command to go on.

    path, run = find('out/run/last')            # run: run.json as a dict, checked against its own checksum
    configurator.load(..., earlier=settings)    # a resumed run has the keys it had, unless others are typed
"""

import glob
import hashlib
import json
import os
import shlex
import sys

from configurator import BOOLS
from data import fields
from plumbing import Stop

try:
    import fcntl
except ImportError:  # Windows: there a run is not guarded against a second one
    fcntl = None

# What says how this session goes about it, and nothing about the run: taken from what is typed now, and not compared.
OF_A_SESSION = ('out_dir', 'init_from', 'overwrite', 'dry_run', 'eval_only')

# What run.json may hold. Old runs, and folders of weights, have some of it.
RUN = {
    'step': fields.whole(0, 2**48),
    'best_val_loss': fields.number(-1e30, 1e30),  # with best_by='metric' minus the best metric
    'seconds': fields.number(0, 1e12),
    'windows': fields.whole(0, 2**60),
    'tokens': fields.whole(0, 2**60),
    'files': fields.table(),
    'config': fields.table(),
}


class CheckpointError(Stop):
    """A checkpoint that cannot be written or read; the message says what to do."""


# ---- the folders of a run ------------------------------------------------------------------------------------------


def place(folder):
    """Where `folder` really is: a last/ that is a link to another disk stays one."""
    return os.path.realpath(folder) if os.path.islink(folder) else folder


def older(folder):
    """What a crash between two renames left of the checkpoint before: folder.old and the like, the newest first."""

    def saved(path):
        run = os.path.join(path, 'run.json')
        return os.path.getmtime(run) if os.path.exists(run) else 0.0

    return sorted(filter(os.path.isdir, glob.glob(glob.escape(place(folder)) + '.old*')), key=saved, reverse=True)


def candidates(folder):
    return [path for path in (place(folder), *older(folder)) if os.path.isdir(path)]


def exists(folder):
    return bool(candidates(folder))


def checksum_of(run):
    """blake2b of what run.json says, in hexadecimal; `run` without its own checksum."""
    return hashlib.blake2b(json.dumps(run, sort_keys=True).encode(), digest_size=32).hexdigest()


def read_run(path):
    """path/run.json as a dict, in today's keys. Raises CheckpointError if it is missing, damaged or of no run."""
    path = os.fspath(path)
    file = os.path.join(path, 'run.json')
    try:
        run = fields.read(file, {}, CheckpointError, advice_for_broken(path))
        if 'checksum' in run and run.pop('checksum') != checksum_of(run):  # the record of an old run has none
            raise ValueError('it is not as it was saved: its checksum differs')
        there = {name: field for name, field in RUN.items() if name in run}
        fields.check(run, there, file, CheckpointError, advice_for_broken(path))
        in_todays_keys(run.setdefault('config', {}))
        return run
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise CheckpointError(f'{file} cannot be read ({reason}): {advice_for_broken(path)}') from None


def find(folder):
    """-> the folder to read, `folder` or what a crash left of the one before, and its run.json as a dict."""
    for path in candidates(folder):
        return path, read_run(path)
    raise CheckpointError(f'{folder} does not exist, nothing to resume: drop --init_from=resume to start anew')


def in_todays_keys(c):
    """A run's configuration, changed in place where it was written before methods had options of their own.

    Raises CheckpointError for what no method of today does."""
    if 'lora_targets' in c:
        c['targets'] = c.pop('lora_targets')
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


def last_or_best(out_dir):
    """The folder that a resumed run continues: last/, or best/ where there is no last/."""
    last, best = (os.path.join(out_dir, name) for name in ('last', 'best'))
    return last if exists(last) or not exists(best) else best


def settings(config):
    """-> run.json's path and the keys in it, for a config that resumes a run; None for others. What cannot be read is
    reported later, by whoever needs it."""
    if getattr(config, 'init_from', None) != 'resume':
        return None
    try:
        path, run = find(last_or_best(config.out_dir))
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return None
    was, given = run['config'], getattr(config, '_given', {})
    if 'method' not in was or ('method' in given and config.method != was['method']):  # that is refused, by name
        return None
    kept = {name: value for name, value in was.items() if name not in OF_A_SESSION}
    # Until 2026-11-27 P stood on the left of square matrices, in these two and in all that refresh it in turns.
    if 'stagger' in kept or was['method'] in ('apollo', 'ldadam'):
        kept.setdefault('proj_type', 'paper')
    return os.path.join(path, 'run.json'), kept


# ---- what to type --------------------------------------------------------------------------------------------------


def command(*extra, init_from='resume'):
    """The command that the user typed, with another --init_from, ready to paste."""
    processes = int(os.environ.get('WORLD_SIZE', 1))
    launch = (
        ['-m', 'torch.distributed.run', f'--nproc_per_node={os.environ.get("LOCAL_WORLD_SIZE")}']
        if processes > 1
        else []
    )
    return shlex.join(['python', *launch, 'train.py', *words_without(*extra), f'--init_from={init_from}', *extra])


def words_without(*extra):
    """The words that the user typed, without --init_from, --overwrite and these flags."""
    replaced = {'__init_from', '__overwrite', *(word.partition('=')[0].replace('-', '_') for word in extra)}
    words, kept = sys.argv[1:], []
    while words:
        word = words.pop(0)
        name = word.partition('=')[0].replace('-', '_')
        if name not in replaced:
            kept.append(word)
        elif '=' not in word and words and (name != '__overwrite' or words[0].lower() in BOOLS):
            words.pop(0)  # its value
    return kept


def advice_for_broken(path):
    """What to type where the checkpoint `path` is damaged. Nothing falls back on best/ by itself: it is older."""
    folder = path.partition('.old')[0]
    best = os.path.join(os.path.dirname(folder), 'best')
    if os.path.basename(folder) != 'last' or not os.path.isfile(os.path.join(best, 'run.json')):
        return 'there is no other checkpoint beside it, so start anew with another --out_dir'
    if not os.path.exists(os.path.join(best, 'optimizer.pt')):  # weights alone
        return f'start anew from the best weights with {command("--out_dir=" + folder + "_2", init_from=best)}'
    return f'go on from best/, which is older, with\nmv {shlex.quote(path)} {shlex.quote(path)}.damaged && {command()}'


# ---- processes that torchrun starts again ---------------------------------------------------------------------------


def launch():
    """The name of this launch of torchrun, which is the same when it starts its processes again; None without one."""
    env = os.environ
    if 'TORCHELASTIC_RUN_ID' not in env:
        return None
    alone = env.get('LOCAL_WORLD_SIZE') == env.get('WORLD_SIZE')  # else the nodes have launchers of their own
    return ' '.join([env['TORCHELASTIC_RUN_ID'], env.get('MASTER_PORT', '') if not alone else str(os.getppid())])


def words_after_restart(config):
    """What these processes do, if torchrun --max-restarts has started them again: command-line words to go on from what
    this launch has saved; to replace it, if that is weights alone. None: as they were told, since nothing is saved."""
    if not int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)):
        return None
    try:
        path, run = find(last_or_best(config.out_dir))
    except CheckpointError:
        return None
    if run.get('launch') != launch():  # an earlier run's, which this one was to replace
        return None
    again = '--init_from=resume' if 'optimizer.pt' in run.get('files', ()) else '--overwrite'
    if os.environ.get('RANK') == '0':
        what = f'going on from {path}' if again != '--overwrite' else 'beginning anew'
        print(f'a process of this run ended, and torchrun has started all again: {what}', flush=True)
    return [*words_without(), again]


# ---- one run at a time ---------------------------------------------------------------------------------------------

HELD = {}  # out_dir -> its locked file, open as long as this process lives


def lock(out_dir):
    """Make `out_dir`, and hold it until this process ends, however it ends. Raises Stop if another process does."""
    os.makedirs(out_dir, exist_ok=True)
    where = os.path.realpath(out_dir)
    if fcntl is None or where in HELD:
        return
    file = open(os.path.join(where, '.lock'), 'a+')  # noqa: SIM115 (the kernel lets go of it when the process is gone)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        process = file.read().strip() or 'unknown'
        file.close()
        raise Stop(
            f'another run writes to {out_dir} (process {process}): wait for its end, or choose another --out_dir'
        ) from None
    except OSError:  # a file system without locks
        file.close()
        return
    file.truncate(0)
    file.write(f'{os.getpid()}\n')
    file.flush()
    HELD[where] = file
