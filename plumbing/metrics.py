"""metrics.csv and the tracker. Neither may end a run: what cannot be written or sent now is said once."""

import atexit
import contextlib
import csv
import importlib
import os

from plumbing import Stop
from plumbing.hf import first_line

METRICS = 'metrics.csv'


class Metrics:
    """metrics.csv, one row per log line or evaluation, and the tracker. The header has the first row's columns and
    grows if a later row has more. A run that resumes at first_step drops the rows that it will write again, and those
    that cannot be read. replaces: an earlier run's rows are kept as metrics.csv.old until this one has saved."""

    def __init__(self, path, first_step=0, tracker=None, replaces=False):
        self.path, self.tracker, self.rows, self.head, self.said = str(path), tracker, [], [], set()
        self.complete = False  # is all that the file should hold in it?
        old = self.path + '.old'
        if replaces and os.path.exists(path) and not os.path.exists(old):  # or one that replaces it was started again
            os.replace(path, old)
        elif first_step and os.path.exists(old):  # the run that was to replace this one never saved anything
            os.replace(old, path)
        if first_step:
            self.read(first_step)
        self.write()

    def read(self, first_step):
        """Take the rows up to first_step from the file, and say how many of them cannot be read."""
        broken = 0
        try:
            with open(self.path, newline='', encoding='utf-8', errors='replace') as f:
                reader = csv.DictReader(line.replace('\0', '?') for line in f)
                self.head = list(reader.fieldnames or [])
                for row in reader:
                    try:
                        self.rows += [row] * (int(row['step']) <= first_step)
                        broken += None in row or None in row.values()  # too many values, or too few
                    except (ValueError, TypeError, KeyError):
                        broken += 1
        except (OSError, csv.Error) as error:
            self.say(f'{self.path} cannot be read ({getattr(error, "strerror", None) or error})')
        self.rows = [row for row in self.rows if None not in row and None not in row.values()]
        self.head = self.head if self.rows else []
        if broken or not self.rows:
            counts = f'{len(self.rows)} of before step {first_step} can be read, {broken} cannot'
            self.say(f'{self.path} has lost rows: {counts}')

    def say(self, what):
        """Print it, once."""
        if what not in self.said:
            self.said.add(what)
            print(f'warning: {what}; the run goes on', flush=True)

    def write(self, row=None):
        """Append `row`; without one, or where the file is not complete, write all rows anew."""
        try:
            if row is not None and self.complete and os.path.exists(self.path):
                self.complete = False  # until the row is there as a whole
                with open(self.path, 'a', newline='', encoding='utf-8') as f:
                    csv.DictWriter(f, self.head).writerow(row)
            else:
                with open(f'{self.path}.new', 'w', newline='', encoding='utf-8') as f:
                    writer = csv.DictWriter(f, self.head)
                    writer.writeheader()
                    writer.writerows(self.rows)
                os.replace(f'{self.path}.new', self.path)
            self.complete = True
        except OSError as error:  # a full disk, say; the rows wait for the next time
            self.say(f'{self.path} could not be written ({error.strerror})')
            with contextlib.suppress(OSError):
                os.remove(f'{self.path}.new')

    def log(self, **row):
        self.rows.append(row)
        more = [name for name in row if name not in self.head]
        self.head += more
        self.write(None if more else row)
        if self.tracker:
            try:
                self.tracker({name: x for name, x in row.items() if x is not None and name != 'step'}, row['step'])
            except Exception as error:
                self.say(f'the tracker failed ({type(error).__name__}: {first_line(error)})')


def make_tracker(kind, out_dir, config):
    """A function (values, step) that sends to wandb, trackio or tensorboard; None for 'none'.

    The package is imported only here. Raises Stop, in one sentence, if it is not installed or does not start."""
    if kind == 'none':
        return None
    module = 'torch.utils.tensorboard' if kind == 'tensorboard' else kind
    try:
        library = importlib.import_module(module)
    except ImportError:
        raise Stop(f"tracker='{kind}' needs a package: pip install {kind}, or use --tracker=none") from None
    try:
        if kind == 'tensorboard':
            writer = library.SummaryWriter(out_dir)
        else:
            library.init(project='nano24', name=os.path.basename(out_dir), config=config)
    except Exception as error:
        reason = f'{type(error).__name__}: {first_line(error)}'
        raise Stop(f"tracker='{kind}' did not start ({reason}): mend that, or use --tracker=none") from error
    if kind == 'tensorboard':

        def send(values, step):
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return send

    def finish():
        with contextlib.suppress(Exception):  # the run is over, and saved
            library.finish()

    atexit.register(finish)
    return lambda values, step: library.log(values, step=step)
