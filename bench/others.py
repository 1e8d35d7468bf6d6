"""What our methods are compared with: the authors' package, bitsandbytes, transformers."""

import functools

import torch

from adam import kernels
from bench.measure import NEVER, WINDOW
from model import SIZES, ModelConfig


@functools.cache
def galore_torch():
    """The package, or None if it is missing: it is not in our requirements, since only these tables need it."""
    try:
        import galore_torch.galore_projector
    except ImportError as error:  # also if transformers has moved the helpers that it imports
        print(f'galore-torch: {error}; its rows are left out, pip install --no-deps galore-torch', flush=True)
        return None
    return galore_torch


def galore_torch_adamw(projected, others, rank):
    """galore-torch's AdamW, with random bases in the layout of its SVD, slices of square matrices. Steps between two
    refreshes cost the same with any basis, and this avoids the SVDs of the first step, which take minutes at 1b."""
    options = dict(rank=rank, update_proj_gap=NEVER, scale=0.25, proj_type='std')
    groups = [{'params': projected, **options}] + [{'params': others}] * bool(others)
    optimizer = galore_torch().GaLoreAdamW(groups, lr=1e-3, no_deprecation_warning=True)
    square = {m: torch.linalg.qr(torch.randn(m, m))[0] for m in {min(p.shape) for p in projected}}
    for p in projected:
        Q, tall = square[min(p.shape)].clone(), p.shape[0] >= p.shape[1]
        projector = galore_torch().galore_projector.GaLoreProjector(**options)
        projector.ortho_matrix = Q[:rank] if tall else Q[:, :rank]
        optimizer.state[p].update(step=1, projector=projector)
    return optimizer


def bitsandbytes_adamw(parameters):
    kernels()  # without its warning
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3)


def transformers_llama(size, blocks):
    from transformers import LlamaConfig, LlamaForCausalLM

    c = ModelConfig(**SIZES[size] | {'n_layer': blocks})
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=c.n_inner,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head,
            max_position_embeddings=WINDOW,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation='sdpa',
        )
    )
