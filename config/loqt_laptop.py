"""A small LLaMA on Python's own source code with LoQT: weights in 4 bits from the first step on, no GPU, no network.

8 windows x 256 tokens x 1 micro-batch = 2,048 tokens a step; 750 steps = 1.5M tokens.
    python train.py config/loqt_laptop.py
    python sample.py out/loqt_laptop --prompt='def '
"""

out_dir = 'out/loqt_laptop'
dataset = 'pystdlib'
model = '9m'  # four blocks, made wider: 3.3M parameters with the data's 4,096 ids
n_embd = 192
n_head = 6
n_inner = 512
batch_size = 8
max_iters = 750
warmup_iters = 75  # a tenth of the steps
learning_rate = 1e-2
method = 'loqt'
rank = 48  # a quarter of the width, as in the paper
scale = 0.25
update_proj_gap = 50  # tau: a short run has few steps to merge in
psi = 1.2
moments = 'keep'
eval_interval = 250
