"""LLaMA-7B on one 24 GB card: 8-bit states in a subspace, one full gradient at a time, blocks recomputed.

16 windows x 256 tokens x 32 micro-batches = 131,072 tokens a step; 150,000 steps = 19.66B tokens.
As galore_7b.py, except for what makes it fit: a planned peak of 19.71 GB = 18.4 GiB, of which weights take 13.5,
projected gradients during accumulation 3.2, the blocks' inputs 1.1, 4-bit bases 0.5. The 8-bit moments, 3.8 GB in main
memory, visit the card once a step; with --offload=False they stay on it, and the plan is 23.5 GB. An H100 held to
24 GB took it, see results/card_nvidia_h100_80gb_hbm3.md; CUDA's context, a third of a GB, comes on top.
    python data/c4/prepare.py --tokenizer=t5-base --tokens=20000000000
    python train.py config/galore_7b_4090.py
"""

out_dir = 'out/galore_7b_4090'
dataset = 'c4'
model = '7b'
batch_size = 16  # the paper's
gradient_accumulation_steps = 512 // batch_size  # exact: projected gradients are summed, full ones never kept
max_iters = 150_000
warmup_iters = 15_000
learning_rate = 0.005
min_lr = 0.0005
grad_clip = 1.0  # of the projected gradients, which accumulation keeps anyway; updates wait until the norm is known
method = 'galore'
rank = 1024
scale = 0.25
update_proj_gap = 500
state_bits = 8
basis_bits = 4
offload = True
per_layer = True
dtype = 'bfloat16'
checkpointing = True
log_interval = 1  # a step takes minutes
eval_interval = 500
save_interval = 50
eval_tokens = 1_000_000
