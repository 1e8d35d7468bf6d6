"""A small LLaMA on Python's own source code with GaLore: about three minutes on two CPU cores, no GPU, no network.

8 windows x 256 tokens x 1 micro-batch = 2,048 tokens a step; 500 steps = 1.0M tokens.
    python train.py config/galore_laptop.py
    python sample.py out/galore_laptop --prompt='def '
"""

out_dir = 'out/galore_laptop'
dataset = 'pystdlib'
model = '20m'  # its width of 256, with the data's 4,096 ids in place of 32,000: 5.3M parameters
batch_size = 8  # small: on so few tokens, more steps teach more than larger ones
max_iters = 500
warmup_iters = 50
learning_rate = 1e-2  # best of those tried, see results/laptop.md
method = 'galore'
rank = 64  # a quarter of the width, as in the paper
update_proj_gap = 50  # a short run has few steps to refresh in
eval_interval = 100
