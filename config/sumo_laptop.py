"""galore_laptop.py's model, data, steps and subspace with SUMO.

8 windows x 256 tokens x 1 micro-batch = 2,048 tokens a step; 750 steps = 1.5M tokens.
    python train.py config/sumo_laptop.py
"""

out_dir = 'out/sumo_laptop'
dataset = 'pystdlib'
model = '9m'  # four blocks, made wider: 3.3M parameters with the data's 4,096 ids
n_embd = 192
n_head = 6
n_inner = 512
batch_size = 8
max_iters = 750
warmup_iters = 75  # a tenth of the steps
learning_rate = 4e-3  # 2e-3 and 8e-3 were worse, see LOG.md
method = 'sumo'
rank = 48  # a quarter of the width, as in galore_laptop.py
update_proj_gap = 50  # a short run has few steps to refresh in
eval_interval = 250
