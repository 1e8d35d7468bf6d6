"""LLaMA-350M on C4 with LoQT's hyper-parameters (2405.16528, section 4 and the authors' scripts).

64 windows x 256 tokens x 8 micro-batches = 131,072 tokens a step; 60,000 steps = 7.86B tokens.
    python data/c4/prepare.py --tokenizer=t5-base --tokens=8000000000
    python train.py config/loqt_350m.py
"""

out_dir = 'out/loqt_350m'
dataset = 'c4'
model = '350m'
batch_size = 64  # as many as fit; a step is 512 windows in any case
gradient_accumulation_steps = 512 // batch_size
max_iters = 60_000
warmup_iters = 6_000  # a tenth of the steps
learning_rate = 0.01
min_lr = 0.001  # a tenth of the peak
method = 'loqt'
rank = 256
scale = 0.5
update_proj_gap = 100  # tau
psi = 1.2
moments = 'keep'
dtype = 'bfloat16'
log_interval = 100
eval_interval = 1000
eval_tokens = 10_000_000  # the paper's
