"""A small LLaMA on Python's own source code, each batch chosen from a pool twice as large (CoLM): no GPU, no network.

8 windows x 256 tokens x 1 micro-batch = 2,048 tokens a step; 750 steps = 1.5M tokens.
    python train.py config/coreset_laptop.py
    python sample.py out/coreset_laptop --prompt='def '
"""

out_dir = 'out/coreset_laptop'
dataset = 'pystdlib'  # its 31 packages are the sources; 25 of them, a quarter of the tokens, are below average size
model = '9m'  # four blocks, made wider: 3.3M parameters with the data's 4,096 ids
n_embd = 192
n_head = 6
n_inner = 512
batch_size = 8
max_iters = 750
warmup_iters = 75  # a tenth of the steps
learning_rate = 1e-2
method = 'galore'
rank = 48  # a quarter of the width, as in the paper
update_proj_gap = 50  # a short run has few steps to refresh in
coreset = 'grad'
coreset_from = 2  # the paper's ratio; at 4 the small packages alone would fill the batch
eval_interval = 250
