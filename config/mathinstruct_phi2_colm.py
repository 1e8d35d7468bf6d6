"""Phi-2 on MathInstruct with CoLM as published: LoRA, each step on 64 of 128 examples (arXiv 2407.19580).

4 examples x 16 micro-batches = 64 examples a step; 1,024 steps = 65,536 examples.
Phi-2 runs through transformers' own modules (pip install transformers), with the dropout of its config.json.
    python data/mathinstruct/prepare.py --tokenizer=microsoft/phi-2 --too_long=truncate --max_tokens=512
    python train.py config/mathinstruct_phi2_colm.py
"""

out_dir = 'out/mathinstruct_phi2_colm'
init_from = 'microsoft/phi-2'
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
targets = 'q_proj,k_proj,v_proj,fc1,fc2'  # the paper's
coreset = 'zo'
coreset_from = 2
coreset_norm = 'adam'
zo_directions = 1  # the paper's; more directions match the gradient better
keep_small = 1.0  # examples of small sources are all kept
eval_interval = 256
