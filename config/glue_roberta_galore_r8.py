"""RoBERTa-base on GLUE's MRPC with GaLore of rank 8, as in the paper's table 7 (arXiv 2403.03507).

16 examples x 1 micro-batches = 16 examples a step; 6,900 steps = 110,400 examples, 30 epochs of 3,668.
Its rates: MNLI, CoLA and QNLI 1e-5, STS-B 3e-5, all other tasks 2e-5; CoLA in batches of 32. It projects all linear
layers of the blocks, 72 matrices; all else moves by Adam at the same rate.
    python data/glue/prepare.py --task=mrpc --tokenizer=FacebookAI/roberta-base
    python train.py config/glue_roberta_galore_r8.py
"""

out_dir = 'out/glue_roberta_galore_r8'
init_from = 'FacebookAI/roberta-base'
task = 'classify'
dataset = 'glue/mrpc'
block_size = 512
batch_size = 16
packing = False
max_iters = 6900
warmup_iters = 0
decay = 'linear'
min_lr = 0.0
dtype = 'float32'  # as in the paper
learning_rate = 2e-5
method = 'galore'
rank = 8
scale = 2.0
update_proj_gap = 500
refresh = 'svd'
stagger = False
eval_interval = 230  # an epoch
best_by = 'metric'
