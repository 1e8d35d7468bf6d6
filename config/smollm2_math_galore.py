"""SmolLM2-135M fine-tuned on GSM8K with GaLore: all weights train, with 8-bit states and one gradient at a time.

8 windows x 576 tokens x 1 micro-batch = 4,608 tokens a step; 1,000 steps = 4.6M tokens.
    python data/gsm8k/prepare.py --tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct
    python train.py config/smollm2_math_galore.py
    python eval.py out/smollm2_math_galore HuggingFaceTB/SmolLM2-135M-Instruct --data=gsm8k
"""

out_dir = 'out/smollm2_math_galore'
init_from = 'HuggingFaceTB/SmolLM2-135M-Instruct'
dataset = 'gsm8k'
block_size = 576  # the longest example has 570; each window is filled with whole ones
batch_size = 8
max_iters = 1000  # nearly three epochs
warmup_iters = 30
min_lr = 0.0
grad_clip = 1.0
dtype = 'bfloat16'
learning_rate = 5e-5  # AdamW's, for embeddings and norms
method = 'galore'
rank = 144  # a quarter of the width
scale = 4.0  # the paper's for fine-tuning: the blocks move at four times the rate within their subspace
update_proj_gap = 200
state_bits = 8
per_layer = True
eval_interval = 200
eval_tokens = 300_000  # all of the test answers
