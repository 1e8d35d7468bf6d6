"""LLaMA-7B on one 24 GB card: 8-bit states in a subspace, weights updated inside backward, blocks recomputed.

8 windows x 256 tokens x 64 micro-batches = 131,072 tokens a step; 150,000 steps = 19.66B tokens.
Everything as in galore_7b.py but for what makes it fit: a planned peak of 25.07 GB = 23.3 GiB, of it weights 13.5,
bases 1.9, 8-bit moments 3.8 and projected gradients while accumulating 3.2. Not yet measured on such a card, and tight:
CUDA's context comes on top. --batch_size=4 --gradient_accumulation_steps=128 takes less and makes the same step.
    python data/c4/prepare.py --tokenizer=t5-base --tokens=20000000000
    python train.py config/galore_7b_4090.py
"""

out_dir = 'out/galore_7b_4090'
dataset = 'c4'
model = '7b'
batch_size = 8  # half of the paper's: its 16 plan 1 GB more, and the step is the same
gradient_accumulation_steps = 512 // batch_size  # exact: projected gradients are summed, full ones never kept
max_iters = 150_000
warmup_iters = 15_000
learning_rate = 0.005
min_lr = 0.0005
grad_clip = 0.0  # clipping would hold all projected gradients in fp32 until the norm is known: 6.5 GB
method = 'galore'
rank = 1024
scale = 0.25
update_proj_gap = 500
state_bits = 8
per_layer = True
dtype = 'bfloat16'
checkpointing = True
log_interval = 1  # a step takes minutes
eval_interval = 500
save_interval = 50
eval_tokens = 1_000_000
