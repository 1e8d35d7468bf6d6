"""Llama-3.1-8B fine-tuned on examples of your own by Q-GaLore on one 16 GB card: all weights train, with accumulation.

1 windows x 2048 tokens x 8 micro-batches = 16,384 tokens a step; 1,000 steps = 16.4M tokens.
Nothing waits in main memory. Planned peak of 15.32 GB.
    python data/instruct/prepare.py --input=my.jsonl --tokenizer=meta-llama/Llama-3.1-8B-Instruct
    python train.py config/llama3_8b_16gb_qgalore.py
    python sample.py out/llama3_8b_16gb_qgalore --chat
"""

out_dir = 'out/llama3_8b_16gb_qgalore'
init_from = 'meta-llama/Llama-3.1-8B-Instruct'
dataset = 'instruct'
block_size = 2048
batch_size = 1
gradient_accumulation_steps = 8
max_iters = 1000
warmup_iters = 30
min_lr = 0.0
dtype = 'bfloat16'
checkpointing = True
learning_rate = 1e-5
method = 'qgalore'
rank = 256
scale = 4.0
update_proj_gap = 200
project_tables = True  # else 4.2 GB more: moments and summed gradients of 1.05 billion numbers
state_bits = 8
per_layer = True
eval_interval = 100
save_interval = 100
