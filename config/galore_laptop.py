"""A small LLaMA on Python's own source code with GaLore: about three minutes on two CPU cores, no GPU, no network.

8 windows x 256 tokens x 1 micro-batch = 2,048 tokens a step; 750 steps = 1.5M tokens.
    python train.py config/galore_laptop.py
    python sample.py out/galore_laptop --prompt='def '
"""

out_dir = 'out/galore_laptop'
dataset = 'pystdlib'
model = '9m'  # four blocks, made wider: 3.3M parameters with the data's 4,096 ids
n_embd = 192
n_head = 6
n_inner = 512
batch_size = 8  # small: with so few tokens, more steps help more than larger batches
max_iters = 750
warmup_iters = 75  # a tenth of the steps
learning_rate = 1e-2  # best of those tried, see results/shelf.md
table_lr_scale = 1.6  # embedding and head want a rate of their own: 1.6e-2
beta2 = 0.95
weight_decay = 0.1
grad_clip = 1
method = 'galore'
rank = 48  # a quarter of the width, as in the paper
update_proj_gap = 50  # a short run has few steps to refresh in
eval_interval = 250
