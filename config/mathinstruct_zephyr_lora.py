"""StableLM Zephyr 3B on MathInstruct with LoRA on 128 random examples a step: what CoLM is held against.

4 examples x 32 micro-batches = 128 examples a step; 1,024 steps = 131,072 examples.
    python data/mathinstruct/prepare.py --tokenizer=stabilityai/stablelm-zephyr-3b --too_long=truncate --max_tokens=512
    python train.py config/mathinstruct_zephyr_lora.py
"""

out_dir = 'out/mathinstruct_zephyr_lora'
init_from = 'stabilityai/stablelm-zephyr-3b'
dataset = 'mathinstruct'
block_size = 512
batch_size = 4
gradient_accumulation_steps = 32
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
targets = 'q_proj,k_proj,v_proj,o_proj'  # the paper's
eval_interval = 256
