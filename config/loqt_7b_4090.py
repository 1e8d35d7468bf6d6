"""LLaMA-7B on one 24 GB card with LoQT: no per-layer updates needed, and clipping is possible.

16 windows x 256 tokens x 32 micro-batches = 131,072 tokens a step; 150,000 steps = 19.66B tokens.
As loqt_7b.py, with smaller micro-batches. Planned peak of 17.15 GB; an H100 held to 24 GB took
it, see results/card_nvidia_h100_80gb_hbm3.md.
    python data/c4/prepare.py --tokenizer=t5-base --tokens=20000000000
    python train.py config/loqt_7b_4090.py
"""

out_dir = 'out/loqt_7b_4090'
dataset = 'c4'
model = '7b'
batch_size = 16
gradient_accumulation_steps = 512 // batch_size
max_iters = 150_000
warmup_iters = 15_000
learning_rate = 0.01
min_lr = 0.001
grad_clip = 1.0  # of the factors' gradients
method = 'loqt'
rank = 1024
scale = 0.5
update_proj_gap = 200  # tau
psi = 1.2
moments = 'keep'
double_quant = True
state_bits = 8
dtype = 'bfloat16'
checkpointing = True
log_interval = 1
eval_interval = 500
save_interval = 50
eval_tokens = 1_000_000
