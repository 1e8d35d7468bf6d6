"""LLaMA-7B on C4 with the GaLore paper's hyper-parameters (2403.03507, section 5.4), on eight cards.

16 windows x 256 tokens x 32 micro-batches = 131,072 tokens a step; 150,000 steps = 19.66B tokens.
    python data/c4/prepare.py --tokenizer=t5-base --tokens=20000000000
    python -m torch.distributed.run --nproc_per_node=8 train.py config/galore_7b.py
"""

out_dir = 'out/galore_7b'
dataset = 'c4'
model = '7b'
batch_size = 16
gradient_accumulation_steps = 512 // batch_size  # over all processes: 4 on each of eight
max_iters = 150_000
warmup_iters = 15_000
learning_rate = 0.005  # half that of the smaller models
min_lr = 0.0005
grad_clip = 1.0  # as in the authors' script; here it clips the projected gradients
method = 'galore'
rank = 1024
scale = 0.25
update_proj_gap = 500
state_bits = 8
dtype = 'bfloat16'
checkpointing = True
log_interval = 10
eval_interval = 1000
save_interval = 100  # torchrun kills its processes 30 s after a signal, and a step may take longer
eval_tokens = 10_000_000
