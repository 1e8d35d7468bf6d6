"""
Python that has torch imported already and becomes any script in a fork of itself: two seconds less for each of the
suite's hundreds of scripts. The fork is a process of its own, with its own arguments, folder, environment and files.

    done = run(['train.py', '--help'], cwd, environment)       # a subprocess.CompletedProcess, as of `python train.py`
"""

import json
import os
import subprocess
import sys
import tempfile

server = None


def run(words, cwd, environment, text=None, timeout=300):
    """What `python WORDS` does in the folder cwd. text: what it finds on stdin. Raises subprocess.TimeoutExpired."""
    global server
    if server is None or server.poll() is not None:
        command = [sys.executable, '-W', 'ignore', __file__]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ('in', 'out', 'err')]
        with open(files[0], 'w') as f:
            f.write(text or '')
        words = [*map(str, words)]
        asked = dict(words=words, cwd=str(cwd), environment=environment, files=files, timeout=timeout)
        server.stdin.write(json.dumps(asked) + '\n')
        server.stdin.flush()
        code = json.loads(server.stdout.readline())
        out, err = (read(path) for path in files[1:])
    if code is None:
        raise subprocess.TimeoutExpired(words, timeout, out, err)
    return subprocess.CompletedProcess([sys.executable, *words], code, out, err)


def read(path):
    with open(path, encoding='utf-8', errors='replace') as f:
        return f.read()


def serve():
    """For each line on stdin: fork, become the script, and write its exit status as a line; None: it took too long."""
    import gc
    import select
    import signal

    import torch._dynamo  # noqa: F401  # plans import it, which takes another second

    wake, woken = os.pipe()
    gc.freeze()
    signal.signal(signal.SIGCHLD, lambda *_: os.write(woken, b'.'))
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(become(**asked))  # Python's shutdown, which takes torch apart, would be most of a short script
        found, status = 0, 0
        while not found and select.select([wake], [], [], asked['timeout'])[0]:
            os.read(wake, 1)
            found, status = os.waitpid(child, os.WNOHANG)
        if not found:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status) if found else None), flush=True)


def become(words, cwd, environment, files, timeout):
    """This process is the script: its folder, environment, arguments and the three files. -> its exit status."""
    import atexit
    import runpy

    os.setpgid(0, 0)
    for number, (path, flags) in enumerate(zip(files, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT | os.O_APPEND] * 2))):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, 'w'), open(2, 'w')  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    module = words[0] == '-m'
    sys.argv = words[module:]
    sys.path[0] = cwd if module else os.path.dirname(os.path.abspath(words[0]))
    sys.path[1:1] = [path for path in environment.get('PYTHONPATH', '').split(os.pathsep) if path]
    try:
        if module:
            runpy.run_module(words[1], run_name='__main__', alter_sys=True)
        else:
            runpy.run_path(words[0], run_name='__main__')
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == '__main__':
    serve()
