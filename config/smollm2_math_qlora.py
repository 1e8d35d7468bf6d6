"""SmolLM2-135M fine-tuned on GSM8K with QLoRA: adapters of all seven layers beside frozen weights in 4 bits.

8 windows x 576 tokens x 1 micro-batch = 4,608 tokens a step; 1,000 steps = 4.6M tokens.
    python data/gsm8k/prepare.py --tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct
    python train.py config/smollm2_math_qlora.py
    python eval.py out/smollm2_math_qlora HuggingFaceTB/SmolLM2-135M-Instruct --data=gsm8k
"""

out_dir = 'out/smollm2_math_qlora'
init_from = 'HuggingFaceTB/SmolLM2-135M-Instruct'
dataset = 'gsm8k'
block_size = 576  # the longest example has 570; each window is filled with whole ones
batch_size = 8
max_iters = 1000  # nearly three epochs
warmup_iters = 30
min_lr = 0.0
grad_clip = 1.0
dtype = 'bfloat16'
learning_rate = 5e-4
method = 'lora'
rank = 16
scale = 2.0  # alpha 32
quantize = 'nf4'
eval_interval = 200
eval_tokens = 300_000  # all of the test answers
