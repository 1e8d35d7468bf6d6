"""SmolLM2-135M fine-tuned on GSM8K with LoRA, each step on the 21 of 84 examples whose gradient is nearest to all 84's.

7 examples x 3 micro-batches = 21 examples a step, with as many tokens as a step of smollm2_math_lora.py on average;
1,000 steps = 21,000 examples.
    python data/gsm8k/prepare.py --tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct
    python train.py config/smollm2_math_colm.py
    python train.py config/smollm2_math_colm.py --coreset=random      # what it is held against
"""

out_dir = 'out/smollm2_math_colm'
init_from = 'HuggingFaceTB/SmolLM2-135M-Instruct'
dataset = 'gsm8k'
block_size = 576
batch_size = 7  # examples, where a coreset chooses among them
gradient_accumulation_steps = 3
max_iters = 1000
warmup_iters = 30
learning_rate = 5e-4
min_lr = 0.0
grad_clip = 1.0
dtype = 'bfloat16'
method = 'lora'
rank = 16
scale = 2.0
quantize = 'none'
coreset = 'grad'  # of the last layer's value projection, exact
coreset_from = 4
eval_interval = 200
eval_tokens = 300_000
