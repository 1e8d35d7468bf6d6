"""LLaMA-130M on C4 with the GaLore paper's hyper-parameters (2403.03507, section 5.1 and appendix C.1).

128 windows x 256 tokens x 4 micro-batches = 131,072 tokens a step; 20,000 steps = 2.62B tokens.
    python data/c4/prepare.py --tokenizer=t5-base --tokens=2700000000
    python train.py config/galore_130m.py
"""

out_dir = 'out/galore_130m'
dataset = 'c4'
model = '130m'
batch_size = 128  # as many as fit; a step is 512 windows in any case
gradient_accumulation_steps = 512 // batch_size
max_iters = 20_000
warmup_iters = 2_000  # a tenth of the steps
learning_rate = 0.01  # the same for all sizes, since Adam normalises the update and scale multiplies it by 0.25
min_lr = 0.001  # a tenth of the peak
method = 'galore'
rank = 256
scale = 0.25
update_proj_gap = 200
dtype = 'bfloat16'
log_interval = 100
eval_interval = 1000
eval_tokens = 10_000_000  # the paper's
