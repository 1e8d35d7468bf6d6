"""What a run needs besides the mathematics: folders in and out, checkpoints, reports, processes. Read it last."""
