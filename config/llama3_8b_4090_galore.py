"""Llama-3.1-8B fine-tuned on examples of your own by GaLore on one 24 GB card: all weights train.

4 windows x 2048 tokens x 1 micro-batch = 8,192 tokens a step; 2,000 steps = 16.4M tokens.
8-bit states wait in main memory. Planned peak of 21.04 GB.
    python data/instruct/prepare.py --input=my.jsonl --tokenizer=meta-llama/Llama-3.1-8B-Instruct
    python train.py config/llama3_8b_4090_galore.py
    python sample.py out/llama3_8b_4090_galore --chat
"""

out_dir = 'out/llama3_8b_4090_galore'
init_from = 'meta-llama/Llama-3.1-8B-Instruct'
dataset = 'instruct'
block_size = 2048
batch_size = 4
gradient_accumulation_steps = 1  # several would keep sums of gradients: 3 GB more
max_iters = 2000
warmup_iters = 60
min_lr = 0.0
dtype = 'bfloat16'
checkpointing = True
learning_rate = 1e-5
method = 'galore'
rank = 512
scale = 4.0
update_proj_gap = 200
basis_bits = 4
state_bits = 8
offload = True
per_layer = True
eval_interval = 100
save_interval = 100
