"""LLaMA-7B on C4 with LoQT, in large micro-batches: double quantisation, 8-bit states.

32 windows x 256 tokens x 16 micro-batches = 131,072 tokens a step; 150,000 steps = 19.66B tokens.
The papers give no hyper-parameters for this size: rank is from GaLore's 7B, the rest from LoQT's 13B script.
Planned peak of 18.94 GB.
    python data/c4/prepare.py --tokenizer=t5-base --tokens=20000000000
    python train.py config/loqt_7b.py
"""

out_dir = 'out/loqt_7b'
dataset = 'c4'
model = '7b'
batch_size = 32
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
moments = 'keep'
double_quant = True
state_bits = 8
dtype = 'bfloat16'
checkpointing = True
log_interval = 10
eval_interval = 1000
eval_tokens = 10_000_000  # the paper's
