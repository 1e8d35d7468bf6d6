"""A small LLaMA on Python's own source, with GaLore, on two CPU cores in about three minutes.

32 windows x 256 tokens x 1 micro-batch = 4,096 tokens a step; 800 steps = 3.3M tokens
"""

out_dir = 'out/galore_laptop'
model = '20m'
n_layer = 4
batch_size = 16
max_iters = 400
method = 'galore'
rank = 64
learning_rate = 1e-2
