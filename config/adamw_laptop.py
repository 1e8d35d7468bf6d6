"""The baseline of galore_laptop.py: the same model, data and steps with AdamW.

8 windows x 256 tokens x 1 micro-batch = 2,048 tokens a step; 500 steps = 1.0M tokens.
    python train.py config/adamw_laptop.py
"""

out_dir = 'out/adamw_laptop'
dataset = 'pystdlib'
model = '20m'
batch_size = 8
max_iters = 500
warmup_iters = 50
learning_rate = 2e-3  # best of those tried, see results/laptop.md
method = 'adamw'
eval_interval = 100
