"""Llama-3.1-8B fine-tuned on examples of your own by QLoRA where 6 GB are free: all that can leave the card does.

1 windows x 2048 tokens x 8 micro-batches = 16,384 tokens a step; 1,000 steps = 16.4M tokens.
Planned peak of 5.31 GB.
    python data/instruct/prepare.py --input=my.jsonl --tokenizer=meta-llama/Llama-3.1-8B-Instruct
    python train.py config/llama3_8b_6gb_qlora.py
    python sample.py out/llama3_8b_6gb_qlora --chat
"""

out_dir = 'out/llama3_8b_6gb_qlora'
init_from = 'meta-llama/Llama-3.1-8B-Instruct'
dataset = 'instruct'
block_size = 2048
batch_size = 1
gradient_accumulation_steps = 8
max_iters = 1000
warmup_iters = 30
min_lr = 0.0
grad_clip = 1.0
dtype = 'bfloat16'
checkpointing = True
offload_activations = True  # else 0.5 GB
mlp_chunk = 512  # else 0.1 GB more of an MLP's backward
offload_embedding = True  # else 1.05 GB
head_bits = 8  # else 0.53 GB more
learning_rate = 2e-4
method = 'lora'
rank = 32
scale = 2.0  # alpha 64
quantize = 'nf4'
double_quant = True
state_bits = 8  # else 0.5 GB more
eval_interval = 100
save_interval = 100
