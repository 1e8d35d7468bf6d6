"""galore_laptop.py's model, data and steps with AdaLomo: no first moment, and a factored second one.

8 windows x 256 tokens x 1 micro-batch = 2,048 tokens a step; 750 steps = 1.5M tokens.
    python train.py config/adalomo_laptop.py
"""

out_dir = 'out/adalomo_laptop'
dataset = 'pystdlib'
model = '9m'  # four blocks, made wider: 3.3M parameters with the data's 4,096 ids
n_embd = 192
n_head = 6
n_inner = 512
batch_size = 8
max_iters = 750
warmup_iters = 75  # a tenth of the steps
learning_rate = 5e-2  # a share of each weight's size
method = 'adalomo'
per_layer = True  # the method's own way: one gradient at a time
eval_interval = 250
