"""
What a script owes to the terminal, before torch is imported: output that no reader, disk or code page can end, Ctrl-C
without a traceback, and a word every few seconds.

    terminal.prepare()                              # the first line of a script
    with terminal.patience('planning the memory'): ...
"""

import atexit
import contextlib
import errno
import os
import signal
import sys
import threading
import time


class Tolerant:
    """A stream whose write never fails: `| head` has gone, the disk under a log is full, the terminal was closed. What
    it cannot encode it writes as \\u2026."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *arguments):
        try:
            function(*arguments)
        except (OSError, ValueError, RuntimeError) as error:  # closed; a signal's handler prints within a print
            if getattr(error, 'errno', None) in (errno.EPIPE, errno.EIO, errno.EBADF):
                self.give_up()
            else:  # there may be room again
                atexit.register(self.give_up)

    def give_up(self):
        """Send to nowhere what still waits in the stream's buffers: Python would fail at its end to write it."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


def prepare():
    """For a script that is run, once: tolerant output, and no traceback by Ctrl-C."""
    sys.stdout, sys.stderr = (Tolerant(stream) if stream else stream for stream in (sys.stdout, sys.stderr))
    quiet_ctrl_c()


def quiet_ctrl_c():
    """Until something else takes it over, Ctrl-C ends the process at once: an exception inside an import leaves half a
    module, on which the next line fails with words of its own."""

    def end(*_):
        sys.stdout.flush()
        os._exit(130)

    signal.signal(signal.SIGINT, end)


def imported():
    """From here on Ctrl-C is a KeyboardInterrupt again, for a script that has something to clean up."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


waiting = []  # one for each patience that is in force


@contextlib.contextmanager
def patience(what, after=3.0):
    """While the block runs, say `what` it does after three seconds, and again each time the wait has doubled. Yields a
    function that takes the share done so far, 0 to 1, where that is known. Only the first process speaks, and
    to stderr: what a script prints may be read by another."""
    begun, done, share = time.monotonic(), threading.Event(), [None]

    def wait(seconds=after):
        while not done.wait(seconds):
            passed = time.monotonic() - begun
            part = f', {share[0]:.0%} done' if share[0] is not None else ''
            if waiting[-1] is share:  # of what waits for one another, the innermost speaks
                print(f'{what}: {passed:.0f} s so far{part}', file=sys.stderr, flush=True)
            seconds = min(passed, 60)

    waiting.append(share)
    thread = threading.Thread(target=wait, daemon=True)
    if os.environ.get('RANK', '0') == '0':
        thread.start()
    try:
        yield lambda part: share.__setitem__(0, part)
    finally:
        done.set()
        if thread.ident:
            thread.join()  # so that its line does not run into the next one
        waiting.remove(share)
