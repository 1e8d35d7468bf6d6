"""What a run needs besides the mathematics: folders, checkpoints, reports, processes. Read it last."""


class Stop(Exception):
    """The run cannot continue; the message is one sentence that says why and what to do."""


# Keys and values that train.py no longer has, and what to type instead.
MOVED = {
    'lora_targets': 'it is of every method: --targets=q_proj,v_proj',
    'residual': 'Fira is a method of its own: --method=fira',
    'method=apollo_mini': 'it is APOLLO with one factor a tensor: --method=apollo --tensorwise --rank=1 --scale=11.3',
}
