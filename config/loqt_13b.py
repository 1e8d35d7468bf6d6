"""LLaMA-13B on C4 with the hyper-parameters of LoQT's own script (2405.16528): double quantisation, 8-bit states.

16 windows x 256 tokens x 32 micro-batches = 131,072 tokens a step; 150,000 steps = 19.66B tokens.
For a card of 32 GB or more; loqt_13b_4090.py fits 24 GB. Planned peak of 27.46 GB.
    python data/c4/prepare.py --tokenizer=t5-base --tokens=20000000000
    python train.py config/loqt_13b.py
"""

out_dir = 'out/loqt_13b'
dataset = 'c4'
model = '13b'
batch_size = 16
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
save_merged = False  # packed checkpoints only: dense blocks would add 26 GB to each
log_interval = 10
eval_interval = 1000
eval_tokens = 10_000_000  # the paper's
