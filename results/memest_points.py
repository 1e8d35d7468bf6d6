"""
Published measurements of peak memory beside what memest_hf.py predicts: makes memest_points.md.

    python results/memest_points.py --points=path/to/points.csv          # about 20 seconds a row; --only=C,X for some ids

Columns of the file: id, source, model, params_B, batch, seq, dtype, optimizer, ckpt, attn, extra, gpu, metric, value, unit,
quality. The models are built here from their published shapes; nothing is downloaded. Rows that say too little of
their run, or of a run that no trace of ours covers, are listed with the reason.
"""

import argparse
import csv
import os
import re
import sys

import torch
from transformers import (
    BloomConfig,
    CodeGenConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from memest_hf import trace_hf  # noqa: E402

UNITS = {'GiB': 2**30, 'GB': 10**9, 'MB': 2**20, 'B': 1}


def qwen2(d, f, L, H, kv, tied, vocab=151936, make=Qwen2Config, **more):
    return make(
        hidden_size=d, intermediate_size=f, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=kv,
        tie_word_embeddings=tied, vocab_size=vocab, max_position_embeddings=32768, **more,
    )  # fmt: skip


def llama(d, f, L, H, kv, vocab=32000, tied=False):
    return LlamaConfig(
        hidden_size=d, intermediate_size=f, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=kv,
        vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=131072,
    )  # fmt: skip


def cerebras(d, L, H):
    none = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    return GPT2Config(
        n_embd=d, n_layer=L, n_head=H, n_inner=4 * d, n_positions=2048, activation_function='gelu', **none
    )


def neo(d, L, H):
    kinds = [[['global', 'local'], L // 2]]
    return GPTNeoConfig(hidden_size=d, num_layers=L, num_heads=H, attention_types=kinds, max_position_embeddings=2048)


def opt(d, f, L, H, **more):
    return OPTConfig(hidden_size=d, ffn_dim=f, num_hidden_layers=L, num_attention_heads=H, vocab_size=50272, **more)


def pythia(d, L, H, vocab=50304):
    return GPTNeoXConfig(
        hidden_size=d, intermediate_size=4 * d, num_hidden_layers=L, num_attention_heads=H, vocab_size=vocab
    )


CONFIGS = {
    'qwen2.5-0.5b': lambda: qwen2(896, 4864, 24, 14, 2, True),
    'qwen2.5-1.5b': lambda: qwen2(1536, 8960, 28, 12, 2, True),
    'qwen2.5-3b': lambda: qwen2(2048, 11008, 36, 16, 2, True),
    'qwen2.5-7b': lambda: qwen2(3584, 18944, 28, 28, 4, False, 152064),
    'qwen2.5-14b': lambda: qwen2(5120, 13824, 48, 40, 8, False, 152064),
    'qwen3-0.6b': lambda: qwen2(1024, 3072, 28, 16, 8, True, make=Qwen3Config, head_dim=128),
    'qwen3-1.7b': lambda: qwen2(2048, 6144, 28, 16, 8, True, make=Qwen3Config, head_dim=128),
    'qwen3-4b': lambda: qwen2(2560, 9728, 36, 32, 8, True, make=Qwen3Config, head_dim=128),
    'gpt-neo-125m': lambda: neo(768, 12, 12),
    'gpt-neo-1.3b': lambda: neo(2048, 24, 16),
    'cerebras-gpt-111m': lambda: cerebras(768, 10, 12),
    'cerebras-gpt-256m': lambda: cerebras(1088, 14, 17),
    'cerebras-gpt-590m': lambda: cerebras(1536, 18, 12),
    'cerebras-gpt-1.3b': lambda: cerebras(2048, 24, 16),
    'distilgpt2': lambda: GPT2Config(n_layer=6),
    'gpt2': lambda: GPT2Config(),
    'gpt2-medium': lambda: GPT2Config(n_layer=24, n_embd=1024, n_head=16),
    'gpt2-large': lambda: GPT2Config(n_layer=36, n_embd=1280, n_head=20),
    'gpt2-xl': lambda: GPT2Config(n_layer=48, n_embd=1600, n_head=25),
    'opt-125m': lambda: opt(768, 3072, 12, 12),
    'opt-350m': lambda: opt(1024, 4096, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    'opt-1.3b': lambda: opt(2048, 8192, 24, 32),
    'pythia-70m': lambda: pythia(512, 6, 8),
    'pythia-160m': lambda: pythia(768, 12, 12),
    'pythia-410m': lambda: pythia(1024, 24, 16),
    'pythia-1b': lambda: pythia(2048, 16, 8),
    'bloom-560m': lambda: BloomConfig(hidden_size=1024, n_layer=24, n_head=16, vocab_size=250880),
    'codegen-350m': lambda: CodeGenConfig(n_embd=1024, n_layer=20, n_head=16, rotary_dim=32, vocab_size=51200),
    'llama-1b': lambda: llama(2048, 5461, 24, 32, 32),
    'llama-7b': lambda: llama(4096, 11008, 32, 32, 32),
    'llama2-7b': lambda: llama(4096, 11008, 32, 32, 32),
    'llama-13b': lambda: llama(5120, 13824, 40, 40, 40),
    'llama2-13b': lambda: llama(5120, 13824, 40, 40, 40),
    'llama3.1-8b': lambda: llama(4096, 14336, 32, 32, 8, 128256),
    'llama3.2-1b': lambda: llama(2048, 8192, 16, 32, 8, 128256, True),
    'llama3.2-3b': lambda: llama(3072, 8192, 28, 24, 8, 128256, True),
    'tinyllama-1.1b': lambda: llama(2048, 5632, 22, 32, 4),
    'smollm2-135m': lambda: llama(576, 1536, 30, 9, 3, 49152, True),
    'phi-1.5': lambda: PhiConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, vocab_size=51200),
    'stablelm-3b': lambda: StableLmConfig(
        hidden_size=2560, intermediate_size=6912, num_hidden_layers=32, num_key_value_heads=32, vocab_size=50304
    ),
}

OPTIMIZERS = {'adamw': 'adamw', 'adam': 'adam', 'sgd': 'sgd', 'rmsprop': 'rmsprop', 'adagrad': 'adagrad'}
OPTIMIZERS |= {'paged_adamw_8bit': 'paged_adamw8bit', 'adamw_8bit': 'adamw8bit', 'adam8bit': 'adamw8bit'}
