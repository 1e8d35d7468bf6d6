"""What a run needs besides the mathematics: folders in and out, checkpoints, reports, processes. Read it last."""


class Stop(Exception):
    """A run that cannot go on; the message is one sentence that says why and what to do."""


# Words that have gone from train.py's keys, and what to type now.
MOVED = {
    'residual': 'Fira is a method of its own: --method=fira',
    'method=apollo_mini': 'it is APOLLO with one factor a tensor: --method=apollo --tensorwise --rank=1 --scale=11.3',
}
