"""LLaMA-13B on one 24 GB card with LoQT: NF4 weights with double quantisation, 8-bit states, per-layer updates.

8 windows x 256 tokens x 64 micro-batches = 131,072 tokens a step; 150,000 steps = 19.66B tokens.
As loqt_13b.py, with smaller micro-batches. Planned peak of 20.52 GB; an H100 held to 24 GB took it.
--offload=False raises it to 26.5 GB, but fits without accumulation, since per_layer then keeps no gradients.
Measured: results/card_nvidia_h100_80gb_hbm3.md, and results/loqt_13b.md on a CPU.
    python data/c4/prepare.py --tokenizer=t5-base --tokens=20000000000
    python train.py config/loqt_13b_4090.py
"""

out_dir = 'out/loqt_13b_4090'
dataset = 'c4'
model = '13b'
batch_size = 8
gradient_accumulation_steps = 512 // batch_size
max_iters = 150_000
warmup_iters = 15_000
learning_rate = 0.01
min_lr = 0.001
method = 'loqt'
rank = 1024
scale = 0.5
update_proj_gap = 200  # tau
psi = 1.2
compensation = 1  # every round quantises all of W again; the paper has 5
moments = 'keep'
double_quant = True
state_bits = 8
offload = True  # 5.8 GB of moments in main memory, since the factors' gradients accumulate on the card
per_layer = True
dtype = 'bfloat16'
checkpointing = True
save_merged = False  # packed checkpoints only: dense blocks would add 26 GB to each
log_interval = 1
eval_interval = 500
save_interval = 50
eval_tokens = 1_000_000
