"""The baseline of galore_laptop.py: the same model, data and steps with AdamW.

8 windows x 256 tokens x 1 micro-batch = 2,048 tokens a step; 750 steps = 1.5M tokens.
    python train.py config/adamw_laptop.py
"""

out_dir = 'out/adamw_laptop'
dataset = 'pystdlib'
model = '9m'  # four blocks, made wider: 3.3M parameters with the data's 4,096 ids
n_embd = 192
n_head = 6
n_inner = 512
batch_size = 8
max_iters = 750
warmup_iters = 75  # a tenth of the steps
learning_rate = 1e-3  # best of those tried, see results/shelf.md
table_lr_scale = 16  # so that embedding and head learn at 1.6e-2, as in galore_laptop.py
beta2 = 0.95
weight_decay = 0.1
grad_clip = 1
method = 'adamw'
eval_interval = 250
