"""RoBERTa-base on GLUE's MRPC with LoQT: NF4 weights, rank 32, compensation (arXiv 2405.16528).

32 examples x 1 micro-batches = 32 examples a step; 6,900 steps = 220,800 examples, 60 epochs of 3,668.
The paper has DeBERTa alone on GLUE, config/glue_deberta_loqt.py, whose rate and rank these are.
    python data/glue/prepare.py --task=mrpc --tokenizer=FacebookAI/roberta-base
    python train.py config/glue_roberta_loqt.py
"""

out_dir = 'out/glue_roberta_loqt'
init_from = 'FacebookAI/roberta-base'
task = 'classify'
dataset = 'glue/mrpc'
block_size = 256
batch_size = 32
packing = False
max_iters = 6900
warmup_iters = 0
decay = 'linear'
min_lr = 0.0
dtype = 'float32'  # as in the paper
learning_rate = 1e-4
method = 'loqt'
rank = 32
scale = 2.0
update_proj_gap = 2400
psi = 0.0  # the paper's gaps here do not grow
stagger = False
eval_interval = 115  # an epoch
best_by = 'metric'
