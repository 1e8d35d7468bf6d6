"""Tiny random models of transformers' own classes, for the tests: biases and norms at random, which a forgotten bias
would else pass."""

import torch
import transformers

SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
DECODERS = {
    'gpt2': lambda: transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=64),
    'opt': lambda: transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32
    ),
    'phi': lambda: transformers.PhiConfig(**SMALL),
    'codegen': lambda: transformers.CodeGenConfig(
        n_embd=32, n_layer=3, n_head=4, n_inner=48, rotary_dim=8, n_positions=64
    ),
    'gpt_neox': lambda: transformers.GPTNeoXConfig(**SMALL),
}
ENCODERS = {
    'roberta': lambda: transformers.RobertaConfig(**SMALL, pad_token_id=1, type_vocab_size=1),
    'bert': lambda: transformers.BertConfig(**SMALL),
    'deberta-v2': lambda: transformers.DebertaV2Config(
        **SMALL, relative_attention=True, pos_att_type=['p2c', 'c2p'], position_buckets=8, share_att_key=True,
        norm_rel_ebd='layer_norm', position_biased_input=False, type_vocab_size=0, max_relative_positions=-1,
        pooler_hidden_size=32,
    ),
}  # fmt: skip
OTHERS = {
    'gemma2': lambda: transformers.Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=2, final_logit_softcapping=0.5)
}


def saved(folder, name, labels=0, dropout=0.0, vocab_size=301, masked=True, **changes):
    """Write such a model to a folder. -> the model, in evaluation mode"""
    config = (DECODERS | ENCODERS | OTHERS)[name]()
    changes = dict(vocab_size=vocab_size, max_position_embeddings=64, bos_token_id=0, eos_token_id=2) | changes
    for key, value in changes.items():
        setattr(config, key, value)
    for key, value in vars(config).items():
        if 'drop' in key and type(value) is float:
            setattr(config, key, dropout)
    if labels:
        config.num_labels = labels
    kind = 'SequenceClassification' if labels else 'MaskedLM' if name in ENCODERS and masked else 'CausalLM'
    kind = getattr(transformers, 'AutoModelFor' + kind)
    torch.manual_seed(0)
    model = kind.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained(folder)
    return model.eval()
