"""methods/badam.py against torch's AdamW, and by hand."""

import pytest
import torch
from test_contract import config_of, everything, model_and_optimizer
from test_galore import TINY, train

from adam import AdamW
from methods.badam import BAdamW
from model import LLaMA, ModelConfig


def pieces():
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(2, 3, generator=draw)) for _ in range(3)]


def loss(W, step):
    draw = torch.Generator().manual_seed(step)
    return sum(((p + 1) ** 2 * torch.randn(2, 3, generator=draw)).sum() for p in W)


def groups(W):
    return [{'params': [p], 'block': i} for i, p in enumerate(W)]


def test_each_block_takes_K_steps_of_a_new_adam_while_the_others_wait():
    W, theirs = pieces(), pieces()
    optimizer = BAdamW(groups(W), lr=0.1, block_steps=2, weight_decay=0.1)
    for step in range(10):
        i = step // 2 % 3
        if step % 2 == 0:
            adam = torch.optim.AdamW([theirs[i]], lr=0.1, weight_decay=0.1)
        assert [p.requires_grad for p in W] == [k == i for k in range(3)], 'and no other gradient is made'
        for ps, opt in ((W, optimizer), (theirs, adam)):
            loss(ps, step).backward()
            opt.step()
            for p in theirs:
                p.grad = None
        for p, q in zip(W, theirs):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
        assert sum('M' in state for state in optimizer.state.values()) == (step % 2 == 0), 'moments of one block'


@pytest.mark.parametrize('block', [None, 0])
def test_one_block_or_none_is_adamw(block):
    found = []
    for make in (lambda W: BAdamW([{'params': W, 'block': block}], lr=0.1, block_steps=2), lambda W: AdamW(W, lr=0.1)):
        W = pieces()
        optimizer = make(W)
        for step in range(7):
            loss(W, step).backward()
            optimizer.step()
        found.append(W)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_by_norm_the_next_block_is_that_of_the_largest_gradient_for_the_times_it_was_active():
    W = pieces()
    optimizer = BAdamW(groups(W), lr=0.0, block_steps=2, choose='norm')
    sizes, seen = (1.0, 2.0, 5.0), []
    for step in range(12):
        seen.append(optimizer.turn['active'])
        assert [p.requires_grad for p in W] == [step % 2 == 1 or k == seen[-1] for k in range(3)]
        sum(s * p.sum() for s, p in zip(sizes, W)).backward()
        assert all(p.grad is None or k == seen[-1] for k, p in enumerate(W)), 'the norm alone stays'
        optimizer.step()
    # |G_b| / (1 + visits), without the block that ends: 5 against 2; 1/2 against 2; 1/2 against 5/2; 1/2 against 2/2;
    # 1/2 against 5/3
    assert seen[::2] == [0, 2, 1, 2, 1, 2]


def test_what_a_user_froze_before_stays_frozen_and_what_waits_can_be_copied():
    import copy

    W = pieces()
    W[1].requires_grad_(False)
    optimizer = BAdamW(groups(W), lr=0.1, block_steps=1)
    both = copy.deepcopy((W, optimizer))
    for V, opt in ((W, optimizer), both):
        before = V[1].detach().clone()
        for step in range(6):
            opt.zero_grad()
            if any(p.requires_grad for p in V):
                loss(V, step).backward()
            opt.step()
        assert torch.equal(V[1], before)
    assert all(torch.equal(p, q) for p, q in zip(W, both[0]))
    assert not torch.equal(W[0], pieces()[0]) and not torch.equal(W[2], pieces()[2])


def test_a_resumed_run_is_in_the_same_block_of_the_same_turn_at_every_step():
    for step in range(1, 9):
        model, optimizer = model_and_optimizer('badam', choose='norm')
        train(model, optimizer, step)
        again, resumed = model_and_optimizer('badam', choose='norm')
        again.load_state_dict(model.state_dict())
        resumed.load_state_dict(optimizer.state_dict())
        a, b = (everything(train(m, o, 4, first=step), o) for m, o in ((model, optimizer), (again, resumed)))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_blocks_of_a_model_are_its_layers_its_embedding_and_its_head():
    for tied in (False, True):
        model = LLaMA(ModelConfig(**TINY, tie_embeddings=tied)).materialise(seed=0)
        from methods import badam

        optimizer = badam.setup(model, config_of('badam'))
        block = {name: optimizer.group_of[p]['block'] for name, p in model.named_parameters()}
        assert block['embed_tokens.weight'] == 0 and block['norm.weight'] == 3
        assert tied or block['lm_head.weight'] == 3
        assert {b for name, b in block.items() if name.startswith('layers.1.')} == {2}
        assert len(block) == len(list(model.parameters()))


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="use 'cycle' or 'norm', and 1 or more"):
        BAdamW(pieces(), choose='largest')
    with pytest.raises(ValueError, match="block_steps=0: use 'cycle'"):
        BAdamW(pieces(), block_steps=0)
