"""Qwen2.5-7B fine-tuned on examples of your own with QLoRA, on one 24 GB card: 4-bit weights, adapters of all layers.

2 windows x 2048 tokens x 8 micro-batches = 32,768 tokens a step; 1,000 steps = 32.8M tokens.
Planned peak of 8.64 GB.
    python data/instruct/prepare.py --input=my.jsonl --tokenizer=Qwen/Qwen2.5-7B-Instruct
    python train.py config/qwen25_7b_4090_qlora.py
    python sample.py out/qwen25_7b_4090_qlora --chat
"""

out_dir = 'out/qwen25_7b_4090_qlora'
init_from = 'Qwen/Qwen2.5-7B-Instruct'
dataset = 'instruct'
block_size = 2048
batch_size = 2
gradient_accumulation_steps = 8
max_iters = 1000
warmup_iters = 30
min_lr = 0.0
grad_clip = 1.0
dtype = 'bfloat16'
checkpointing = True
learning_rate = 2e-4
method = 'lora'
rank = 32
scale = 2.0  # alpha 64
quantize = 'nf4'
double_quant = True
eval_interval = 100
save_interval = 100
