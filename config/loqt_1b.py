"""LLaMA-1B on C4 with LoQT's hyper-parameters (2405.16528, section 4 and the authors' scripts).

16 windows x 256 tokens x 32 micro-batches = 131,072 tokens a step; 100,000 steps = 13.11B tokens.
rank is the paper's 512 (table 1); the authors' script has 256 and loads the 350M's shape.
    python data/c4/prepare.py --tokenizer=t5-base --tokens=13200000000
    python train.py config/loqt_1b.py
"""

out_dir = 'out/loqt_1b'
dataset = 'c4'
model = '1b'
batch_size = 16  # as many as fit; a step is 512 windows in any case
gradient_accumulation_steps = 512 // batch_size
max_iters = 100_000
warmup_iters = 10_000  # a tenth of the steps
learning_rate = 0.01
min_lr = 0.001  # a tenth of the peak
method = 'loqt'
rank = 512
scale = 0.25
update_proj_gap = 100  # tau
psi = 1.2
compensation = 5  # lose less than the ten of the paper's 1b: see loqt.compensate
moments = 'keep'
dtype = 'bfloat16'
log_interval = 100
eval_interval = 1000
eval_tokens = 10_000_000  # the paper's
