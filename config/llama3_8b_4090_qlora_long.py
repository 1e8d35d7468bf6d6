"""Llama-3.1-8B fine-tuned by QLoRA on windows of 131,072 tokens, all that it was made for, on one 24 GB card.

1 windows x 131072 tokens x 1 micro-batch = 131,072 tokens a step; 500 steps = 65.5M tokens.
Blocks' inputs wait in main memory, 34 GB of it. Planned peak of 21.15 GB.
    python data/instruct/prepare.py --input=my.jsonl --tokenizer=meta-llama/Llama-3.1-8B-Instruct
    python train.py config/llama3_8b_4090_qlora_long.py
    python sample.py out/llama3_8b_4090_qlora_long --chat
"""

out_dir = 'out/llama3_8b_4090_qlora_long'
init_from = 'meta-llama/Llama-3.1-8B-Instruct'
dataset = 'instruct'
block_size = 131072
batch_size = 1
gradient_accumulation_steps = 1
max_iters = 500
warmup_iters = 15
min_lr = 0.0
grad_clip = 1.0
dtype = 'bfloat16'
checkpointing = True
offload_activations = True  # else 1 GB for each of 32 blocks
mlp_chunk = 8192  # else an MLP's backward takes 20 GB
learning_rate = 2e-4
method = 'lora'
rank = 32
scale = 2.0  # alpha 64
quantize = 'nf4'
double_quant = True
eval_interval = 100
save_interval = 100
