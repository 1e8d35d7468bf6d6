"""Llama-2-7B fine-tuned on GSM8K as LoQT's paper does it (2405.16528, appendix): one subspace for all steps.

4 examples x 4 micro-batches = 16 examples a step; 1,401 steps = 22,416 examples: three epochs.
    python data/gsm8k/prepare.py --tokenizer=meta-llama/Llama-2-7b-hf --template=qa --max_tokens=512
    python train.py config/llama2_7b_gsm8k_loqt.py
    python eval.py out/llama2_7b_gsm8k_loqt --data=gsm8k
"""

out_dir = 'out/llama2_7b_gsm8k_loqt'
init_from = 'meta-llama/Llama-2-7b-hf'
dataset = 'gsm8k'
block_size = 512
batch_size = 4
gradient_accumulation_steps = 4
packing = False  # a step is counted in examples, as in the paper
max_iters = 1401
warmup_iters = 42  # 3 %
learning_rate = 4e-4
min_lr = 0.0
dtype = 'bfloat16'
checkpointing = True
method = 'loqt'
rank = 64
scale = 0.25  # alpha 16
update_proj_gap = 100_000  # the subspace of the first step stays
state_bits = 8
eval_interval = 200
