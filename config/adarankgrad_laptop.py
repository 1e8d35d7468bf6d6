"""galore_laptop.py with AdaRankGrad: the rank of each layer falls where its gradient needs fewer directions.

8 windows x 256 tokens x 1 micro-batch = 2,048 tokens a step; 750 steps = 1.5M tokens.
    python train.py config/adarankgrad_laptop.py
"""

out_dir = 'out/adarankgrad_laptop'
dataset = 'pystdlib'
model = '9m'  # four blocks, made wider: 3.3M parameters with the data's 4,096 ids
n_embd = 192
n_head = 6
n_inner = 512
batch_size = 8  # small: with so few tokens, more steps help more than larger batches
max_iters = 750
warmup_iters = 75  # a tenth of the steps
learning_rate = 1e-2
method = 'adarankgrad'
rank = 96  # half of the width: to start with
update_proj_gap = 50  # a short run has few steps to refresh in
eval_interval = 250
