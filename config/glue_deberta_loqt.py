"""DeBERTaV3-base on GLUE's MRPC with LoQT, as in the paper's table 2 (arXiv 2405.16528): merges at steps 2400 and 4800.

32 examples x 1 micro-batches = 32 examples a step; 6,900 steps = 220,800 examples, 60 epochs of 3,668.
Its rates: CoLA 8e-5, MNLI, MRPC and STS-B 1e-4, all other tasks 5e-5; 5 to 60 epochs. All but the head is frozen;
its code also takes the pooler's matrix, which is part of the head here and trained as it is.
    python data/glue/prepare.py --task=mrpc --tokenizer=microsoft/deberta-v3-base
    python train.py config/glue_deberta_loqt.py
"""

out_dir = 'out/glue_deberta_loqt'
init_from = 'microsoft/deberta-v3-base'
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
train_rest = 'no'
eval_interval = 115  # an epoch
best_by = 'metric'
