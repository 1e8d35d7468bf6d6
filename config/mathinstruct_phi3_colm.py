"""Phi-3-mini on MathInstruct with CoLM as published: LoRA, each step on 64 of 128 examples (arXiv 2407.19580).

4 examples x 16 micro-batches = 64 examples a step; 1,024 steps = 65,536 examples.
    python data/mathinstruct/prepare.py --max_tokens=512 --too_long=truncate \
        --tokenizer=microsoft/Phi-3-mini-4k-instruct
    python train.py config/mathinstruct_phi3_colm.py
"""

out_dir = 'out/mathinstruct_phi3_colm'
init_from = 'microsoft/Phi-3-mini-4k-instruct'
dataset = 'mathinstruct'
block_size = 512
batch_size = 4
gradient_accumulation_steps = 16
packing = False  # a step is counted in examples, as in the paper
max_iters = 1024
warmup_iters = 31  # 3 %
learning_rate = 2e-5
min_lr = 0.0
grad_clip = 1.0
dtype = 'bfloat16'
checkpointing = True
method = 'lora'
rank = 128
scale = 4.0  # alpha 512
dropout = 0.05
quantize = 'none'
targets = 'q_proj,k_proj,v_proj,o_proj'  # the paper's, of which the official code finds o_proj alone in Phi-3
coreset = 'zo'
coreset_from = 2
coreset_norm = 'adam'
zo_directions = 1  # the paper's; more directions match the gradient better
keep_small = 1.0  # examples of small sources are all kept
eval_interval = 256
