"""galore_laptop.py's model, data and steps with SCALE, whose blocks have no optimizer states.

8 windows x 256 tokens x 1 micro-batch = 2,048 tokens a step; 750 steps = 1.5M tokens.
    python train.py config/scale_laptop.py
"""

out_dir = 'out/scale_laptop'
dataset = 'pystdlib'
model = '9m'  # four blocks, made wider: 3.3M parameters with the data's 4,096 ids
n_embd = 192
n_head = 6
n_inner = 512
batch_size = 8
max_iters = 750
warmup_iters = 75  # a tenth of the steps
learning_rate = 1e-3  # best of 5e-4, 1e-3, 2e-3 after 200 steps
method = 'scale'
eval_interval = 250
