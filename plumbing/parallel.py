"""One process, or several under torchrun: the rank, device and dtype of this one, and the signals that it gets."""

import math
import os
import platform
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from plumbing.sharding import tp_of


@dataclass
class Here:
    """This process among `world`, its device ('cpu', 'cuda', 'cuda:1') and the dtype of the weights; tp: how many
    processes share the arithmetic of a batch."""

    rank: int
    world: int
    device: str
    dtype: torch.dtype
    tp: int = 1

    @property
    def readers(self):
        """How many processes, or groups of them, read batches of their own."""
        return self.world // self.tp

    @property
    def reader(self):
        return self.rank // self.tp

    @property
    def on_cuda(self):
        return self.device.startswith('cuda')

    @property
    def room(self):
        """Bytes of this device's memory; of a CPU whose system does not tell, infinitely many."""
        if self.on_cuda:
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') if hasattr(os, 'sysconf') else math.inf

    def say(self, *words):
        """Print, on the first process alone."""
        if self.rank == 0:
            print(*words, flush=True)

    def first(self, function, *arguments):
        """Call function(*arguments) on the first process, where it may prepare something, before the others call it."""
        if self.rank == 0:
            found = function(*arguments)
        if self.world > 1:
            dist.barrier()
            found = function(*arguments)
        return found

    def any(self, flag):
        """True if `flag` is true on any process. All processes must call this at the same point."""
        if self.world == 1:
            return bool(flag)
        vote = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(vote, dist.ReduceOp.MAX)
        return vote.item() > 0

    def finish(self, code=0):
        """Leave the group once all have come here: a process that goes while the first still saves may end its run.
        Then all but the first end at once: gloo's threads abort a process now and then while Python shuts down."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()
            if self.rank:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        if code:
            sys.exit(code)


def device_and_dtype(config):
    """Resolve 'auto' on this machine. -> device, dtype of the weights."""
    device = config.device if config.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    dtype = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'auto': None}[config.dtype]
    return device, dtype or (torch.bfloat16 if device == 'cuda' else torch.float32)


def surroundings(config):
    """-> processes that torchrun started, device, dtype, bytes of a device's memory: known before they meet."""
    device, dtype = device_and_dtype(config)
    return int(os.environ.get('WORLD_SIZE', 1)), device, dtype, Here(0, 1, device, dtype).room


def start(config):
    """-> Here. Under torchrun, also start the process group: NCCL on CUDA, gloo on a CPU."""
    world, rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))
    device, dtype = device_and_dtype(config)
    torch.set_float32_matmul_precision('high')
    if world > 1:
        if device == 'cuda':
            device = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(device)
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
        # torchrun keeps its store when it starts processes again: in there are addresses of those that are gone
        store, _, _ = next(dist.rendezvous('env://'))
        store = dist.PrefixStore('start ' + os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        backend = 'nccl' if device.startswith('cuda') else 'gloo'
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        PEERS.extend([None] * world)
        dist.all_gather_object(PEERS, (platform.node(), os.getpid()))
    return Here(rank, world, device, dtype, tp_of(config, world))


PEERS = []  # machine and process id of each rank


def lost(error):
    """A sentence that names the process that is gone, if `error` says that a connection to one ended; else None.

    It waits a moment, so that torchrun sees the end of that process, and reports it, before this one's."""
    if not PEERS or not re.search('onnection (closed|reset)|roken pipe|remote process exited', str(error)):
        return None
    gone, end = [], time.monotonic() + 2
    while not gone and time.monotonic() < end:
        gone = [rank for rank, (machine, pid) in enumerate(PEERS) if machine == platform.node() and ended(pid)]
        time.sleep(0.05)
    time.sleep(1)
    if len(gone) != 1:  # on another machine; or those who found it have left, too
        return 'another process of this run ended: torchrun says below which was the first'
    rank = gone[0]
    return f'process {rank} of {len(PEERS)} (rank {rank}, process id {PEERS[rank][1]}) ended, and with it this run'


def ended(pid):
    """Is this process of this machine gone, or dead and not yet collected by its parent?"""
    try:
        with open(f'/proc/{pid}/stat') as f:
            return f.read().rpartition(')')[2].split()[0] in 'ZX'
    except OSError:
        return True


def end_with(parent):
    """End this worker, as SIGTERM does, when the launcher is gone: killed by SIGKILL it cannot tell its workers."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


class CtrlC:
    """On Ctrl-C, SIGTERM or a terminal that is closed, finish the step, save and stop; a second one stops at once."""

    def __init__(self, here):
        self.here, self.signals = here, []
        for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and not (name == 'SIGHUP' and signal.getsignal(number) == signal.SIG_IGN):  # nohup
                signal.signal(number, self.ask)

    def ask(self, number, _):
        if self.signals and number != getattr(signal, 'SIGHUP', None):  # a shell may send that twice
            raise KeyboardInterrupt
        self.signals.append(number)
        self.here.say(f'{self.name}: finishing this step, then saving; once more stops at once')

    @property
    def asked(self):
        return bool(self.signals)

    @property
    def name(self):
        return signal.Signals(self.signals[0]).name if self.signals else 'stopped'

    @property
    def code(self):
        """What a shell expects of a process that a signal ended; 0 if none did."""
        return 128 + self.signals[0] if self.signals else 0
