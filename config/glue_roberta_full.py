"""RoBERTa-base on GLUE's MRPC, all weights by AdamW: what GaLore's table 4 compares with.

16 examples x 1 micro-batches = 16 examples a step; 6,900 steps = 110,400 examples, 30 epochs of 3,668.
The rate is that of fairseq's recipe for RoBERTa; GaLore's paper says none of its own for this row.
    python data/glue/prepare.py --task=mrpc --tokenizer=FacebookAI/roberta-base
    python train.py config/glue_roberta_full.py
"""

out_dir = 'out/glue_roberta_full'
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
learning_rate = 1e-5
method = 'adamw'
eval_interval = 230  # an epoch
best_by = 'metric'
