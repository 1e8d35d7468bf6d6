"""A window that slides: what plumbing.cache.KVCache forgets, what stays, and where it stands."""

import pytest
import torch
import torch.nn.functional as F

import sample
from attention import rotary_tables, rotate
from model import LLaMA, ModelConfig
from plumbing.cache import KVCache

TINY = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, n_inner=56, vocab_size=97)
DYNAMIC = {'rope_type': 'dynamic', 'factor': 2.0, 'original_max_position_embeddings': 12}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 64}  # its factor makes keys longer


def tiny(**other):
    model = LLaMA(ModelConfig(**TINY | other)).materialise(seed=0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4, generator=torch.Generator().manual_seed(p.numel()))
    return model


@torch.no_grad()
def slow(model, ids, window, sinks):
    """The last position's logits, without a cache: in every layer query p sees the first keys, moved up so that none is
    farther away than the window is long, and the latest ones."""
    config, n = model.config, len(ids)
    cos, sin = rotary_tables(config, T=0, at=torch.arange(n + 1))
    x = model.embed_tokens(torch.tensor([ids]))  # (1, n, D)
    for block in model.layers:
        a, y = block.self_attn, []
        q, k, v = a.project(block.input_layernorm(x))
        for p in range(n):
            moved = max(p - (window - 1), 0)
            seen = [j for j in range(p + 1) if j < sinks or j > p - (window - sinks) or p < window]
            at = torch.tensor([j + moved * (j < sinks) for j in seen])
            keys, query = (k[:, seen], q[:, p : p + 1])
            if a.rotates:
                keys, query = rotate(keys, cos[at], sin[at]), rotate(query, cos[p : p + 1], sin[p : p + 1])
            kept = (A.transpose(1, 2) for A in (query, keys, v[:, seen]))
            y.append(F.scaled_dot_product_attention(*kept, scale=a.scale, enable_gqa=True).reshape(1, 1, -1))
        x = block.add(x, a.o_proj(torch.cat(y, 1)))
        x = block.feed_forward(x)
    return model.logits(model.norm(x))[0]


@pytest.mark.parametrize('other', [{}, dict(no_rope=(1,), rotary_dim=4), dict(rope_scaling=YARN)], ids=str)
def test_a_full_window_slides_with_its_first_tokens_kept_and_reads_none_again(other, monkeypatch):
    window = 12
    model, seen = tiny(block_size=window, **other), []
    hidden = model.hidden
    monkeypatch.setattr(model, 'hidden', lambda tokens, *more: seen.append(tokens.numel()) or hidden(tokens, *more))
    ids = torch.randint(97, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = slow(model, ids, window, 4)
    cache = KVCache(model.config)
    with torch.no_grad():
        first = model(torch.tensor([ids[:5]]), cache=cache)
        found = [first[0], *(model(torch.tensor([[i]]), cache=cache)[0] for i in ids[5:])]
    torch.testing.assert_close(torch.cat(found), expected, atol=2e-4, rtol=2e-4)
    seen.clear()
    made = list(sample.generate(model, ids[:5], 40, temperature=0))
    assert seen == [5] + [1] * 39
    assert made[:30] == [int(logits.argmax()) for logits in slow(model, ids[:5] + made[:29], window, 4)[4:]]


def test_rows_of_a_batch_slide_each_when_it_is_full():
    model = tiny(block_size=12)
    prompts = [[5, 6, 7], [9], list(range(40)), [3, 3, 1, 4, 1, 5, 9, 2, 6]]
    alone = [list(sample.generate(model, ids, 30 + 3 * i, temperature=0)) for i, ids in enumerate(prompts)]
    made = dict(sample.generate_batch(model, prompts, 39, batch_size=2))
    assert [made[i][: 30 + 3 * i] for i in range(4)] == alone


def test_a_window_that_slides_with_no_token_kept_is_that_of_mistral(tmp_path, monkeypatch):
    transformers = pytest.importorskip('transformers')
    sizes = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, vocab_size=97)
    sizes |= dict(num_key_value_heads=2, initializer_range=0.4, max_position_embeddings=256, sliding_window=12)
    torch.manual_seed(0)
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    model = LLaMA.from_pretrained(tmp_path)
    model.set_block_size(12)
    monkeypatch.setattr(KVCache, 'SINKS', 0)
    given = torch.tensor([[5, 6, 7]])
    expected = theirs.generate(given, do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0)
    assert list(sample.generate(model, [5, 6, 7], 40, temperature=0)) == expected[0, 3:].tolist()
    ids = torch.tensor([expected[0, :30].tolist()])
    cache = KVCache(model.config)
    with torch.no_grad():
        found = torch.cat([model(ids[:, i : i + 1], cache=cache) for i in range(30)], 1)
        torch.testing.assert_close(found, theirs(ids).logits, atol=2e-4, rtol=2e-4)


def test_positions_go_on_beyond_any_table_and_distances_stay(monkeypatch):
    """a text of hundreds of tokens through a window of 12: the same continuation as that of its end alone would give
    a model whose layers are one, which knows nothing of what has left."""
    model = tiny(block_size=12, n_layer=1)
    monkeypatch.setattr(KVCache, 'SINKS', 0)
    ids = torch.randint(97, (800,), generator=torch.Generator().manual_seed(1)).tolist()
    cache = KVCache(model.config)
    with torch.inference_mode():
        for i in ids:
            last = model(torch.tensor([[i]]), cache=cache)
        torch.testing.assert_close(last[0, -1], model(torch.tensor([ids[-12:]]))[0, -1], atol=1e-3, rtol=1e-3)
