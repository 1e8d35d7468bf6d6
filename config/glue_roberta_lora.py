"""RoBERTa-base on GLUE's MRPC with LoRA of rank 8 in query and value, as its paper has it (arXiv 2106.09685).

16 examples x 1 micro-batches = 16 examples a step; 6,900 steps = 110,400 examples, 30 epochs of 3,668.
The head is trained beside it; python sample.py --save_adapter is of language models, so take best/ as it is.
    python data/glue/prepare.py --task=mrpc --tokenizer=FacebookAI/roberta-base
    python train.py config/glue_roberta_lora.py
"""

out_dir = 'out/glue_roberta_lora'
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
learning_rate = 4e-4
method = 'lora'
rank = 8
scale = 1.0
quantize = 'none'
targets = 'query,value'
eval_interval = 230  # an epoch
best_by = 'metric'
