"""Examples as batches: which rows there are, who sees whom, what a step's loss is divided by, and going on."""

import copy
import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run

import train as training
from attention import attend_masked, attend_packed, positions_of
from coreset import Coreset, chosen_batches
from data import DataError
from data.batches import Examples, best_fit, fingerprint, load, trained_tokens
from model import LLaMA, ModelConfig
from plumbing import parallel

VOCABULARY, WINDOW = 61, 48
HERE = parallel.Here(0, 1, 'cpu', torch.float32)


def written(folder, lengths, val_lengths=(9, 12, 30), split=3, seed=0, trained=None):
    """A prepared folder of examples with so many tokens each, in two sources. Of each the second half is trained."""
    draw, meta = np.random.default_rng(seed), dict(format=1, tokenizer='bytes', vocab_size=VOCABULARY, dtype='uint16')
    sources = [dict(name='small'), dict(name='large')]
    for name, sizes in (('train', lengths), ('val', val_lengths)):
        ids = draw.integers(1, VOCABULARY, sum(sizes)).astype('uint16')
        ends, marks = np.cumsum(sizes).astype('int64'), np.zeros(len(ids), 'uint8')
        for end, n in zip(ends, sizes):
            marks[end - (n // 2 if trained is None else trained) : end] = 1
        ids.tofile(folder / f'{name}.bin')
        marks.tofile(folder / f'{name}_trained.bin')
        ends.tofile(folder / f'{name}_ends.bin')
        cut = min(split, len(sizes) - 1)
        for source, some in zip(sources, (sizes[:cut], sizes[cut:])):
            source |= {f'{name}_tokens': int(sum(some)), f'{name}_examples': len(some)}
        meta |= {f'{name}_tokens': len(ids), f'{name}_examples': len(sizes), f'{name}_trained': int(marks.sum())}
    (folder / 'meta.json').write_text(json.dumps(meta | dict(examples=True, sources=sources)))
    return str(folder)


LENGTHS = [2, 49, 5, 17, 17, 30, 8, 8, 8, 23, 12, 40, 3, 6, 28, 19, 11, 9, 33, 21, 15, 4, 26, 10]


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path, LENGTHS)


def pieces_in(x, y, pieces):
    """[(tokens, targets)] of what the rows hold, one piece after another, fillers too."""
    return [(x.flatten()[a:b], y.flatten()[a:b]) for a, b in np.lib.stride_tricks.sliding_window_view(pieces, 2)]


def alone(data, i):
    """x and y (1, n) of one example."""
    x, y, _ = data.read([i])
    return x, y


# ---- which rows there are --------------------------------------------------------------------------------------------


def test_an_epoch_of_either_kind_holds_every_example_once_and_no_window_is_cut(folder):
    packed, padded = (Examples(folder, 'train', WINDOW, packing) for packing in (True, False))
    everything = sorted(tuple(alone(packed, i)[0][0].tolist()) for i in range(len(LENGTHS)))
    for epoch in range(2):
        found = []
        for t in range(packed.windows):
            x, y, _, pieces = packed.batch(5, epoch * packed.windows + t, 1)
            assert x.shape == y.shape == (1, WINDOW) and pieces.dtype == torch.int32
            found += [tuple(some.tolist()) for some, _ in pieces_in(x, y, pieces) if some.any()]
        assert sorted(found) == everything
        rows = [padded.batch(5, epoch * padded.windows + t, 1) for t in range(padded.windows)]
        assert sorted(tuple(x[0].tolist()) for x, *_ in rows) == everything
    orders = [
        [tuple(d.batch(seed, t, 1)[0][0].tolist()) for t in range(8)] for d in (packed, padded) for seed in (5, 6)
    ]
    assert len({tuple(order) for order in orders}) == 4, 'a permutation of the seed'


@pytest.mark.parametrize('packing', [True, False])
def test_a_batch_is_a_function_of_its_number_and_processes_share_the_rows(folder, packing):
    one, other = (Examples(folder, 'train', WINDOW, packing) for _ in range(2))
    for t in (0, 9, 3, 3, 21):
        assert all(torch.equal(a, b) for a, b in zip(one.batch(2, t, 2), other.batch(2, t, 2), strict=True))
    for rank in (0, 1):
        shared, single = one.batch(2, 5, 2, rank, 2), other.batch(2, 2 * 5 + rank, 2)
        assert all(torch.equal(a, b) for a, b in zip(shared, single, strict=True))
    # another batch size from row 12 on: none is read twice or left out
    rows = [x for t in range(6, 9) for x in one.batch(2, t, 2)[0]]
    other.skip = 12 - 3 * 4
    for a, b in zip(rows, [x for t in range(4, 6) for x in other.batch(2, t, 3)[0]], strict=True):
        n = min(len(a), len(b))
        assert torch.equal(a[:n], b[:n]) and not a[n:].any() and not b[n:].any()


def test_targets_are_the_trained_tokens_never_the_first_of_an_example_and_padding_is_known_by_its_place(tmp_path):
    data = Examples(written(tmp_path, [4, 3], trained=4), 'train', 8)
    data.tokens = np.array([7, 0, 8, 0, 9, 0, 0])  # a token like the filler, as end-of-text often is, is trained
    data.trained = np.array([1, 0, 1, 1, 1, 1, 1], 'uint8')
    x, y, sources, pieces = data.pack([[0, 1]])
    assert x.tolist() == [[7, 0, 8, 9, 0, 0, 0, 0]]
    assert y.tolist() == [[-100, 8, 0, 0, 0, -100, -100, -100]], 'no example predicts the first token of the next'
    assert pieces.tolist() == [0, 3, 5, 8] and sources.tolist() == [0, 1]
    x, y, _ = data.read([1, 0])
    assert x.tolist() == [[9, 0, 0], [7, 0, 8]] and y.tolist() == [[0, 0, -100], [-100, 8, 0]]


def test_windows_are_best_fit_and_their_number_does_not_depend_on_the_order():
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 120, 300)
    windows = best_fit(lengths, 128)
    room = []  # the same, one after another
    for n in sorted(lengths.tolist(), reverse=True):
        fits = [i for i, left in enumerate(room) if left >= n]
        if fits:
            room[min(fits, key=lambda i: room[i])] -= n
        else:
            room.append(128 - n)
    assert sorted(128 - lengths[window].sum() for window in windows) == sorted(room)
    assert sorted(i for window in windows for i in window) == list(range(300))
    assert {len(best_fit(draw.permutation(lengths), 128)) for _ in range(5)} == {len(windows)}
    assert best_fit([128, 1, 127], 128) == [[0], [2, 1]] and best_fit([], 128) == []


def test_neighbours_are_of_like_length_without_packing(tmp_path):
    lengths = np.random.default_rng(0).integers(2, 48, 400).tolist()
    data = Examples(written(tmp_path, lengths), 'train', WINDOW, packing=False)
    batches = [data.batch(0, t, 8) for t in range(50)]
    places = sum(x.numel() for x, *_ in batches)
    assert sum(lengths) - 400 < places < 1.1 * sum(lengths), 'under a tenth of padding'
    widths = [x.shape[1] for x, *_ in batches]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True), 'but not in the order of length'


def test_evaluation_is_of_all_examples_or_of_evenly_spread_ones(folder, tmp_path):
    for packing in (True, False):
        data = Examples(folder, 'train', WINDOW, packing)
        batches = list(data.evaluation(10**6, 3))
        assert sum(len(sources) for _, _, sources, *_ in batches) == len(LENGTHS)
        assert sum((y != -100).sum() for _, y, *_ in batches) == sum(n // 2 for n in LENGTHS)
        few = list(data.evaluation(200, 3))
        assert 0 < sum(len(sources) for _, _, sources, *_ in few) < len(LENGTHS)
        assert {int(q) for _, _, sources, *_ in few for q in sources} == {0, 1}


# ---- who sees whom ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype,close', [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize('heads', [(4, 4), (4, 2), (3, 1)])
def test_attention_by_pieces_and_by_a_mask_is_that_of_each_piece_alone(heads, dtype, close):
    B, T, d = 2, 40, 16
    pieces = torch.tensor([0, 7, 8, 30, 40, 40, 52, 80, 80], dtype=torch.int32)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(B, T, h, d, generator=draw, dtype=dtype).requires_grad_() for h in (heads[0], heads[1], heads[1])
    )
    delta = torch.randn(B, T, heads[0], d, generator=draw, dtype=dtype)
    found = []
    for attend in (attend_packed, attend_masked):
        y = attend(q, k, v, pieces, 0.3)
        found.append((y, *torch.autograd.grad(y, (q, k, v), delta)))
    flat = [A.flatten(0, 1) for A in (q, k, v)]
    y = torch.cat(
        [
            torch.nn.functional.scaled_dot_product_attention(
                *(A[a:b].transpose(0, 1)[None] for A in flat), is_causal=True, scale=0.3, enable_gqa=True
            )[0].transpose(0, 1)
            for a, b in zip(pieces.tolist(), pieces.tolist()[1:])
            if a < b
        ]
    ).view(B, T, heads[0], d)
    expected = (y, *torch.autograd.grad(y, (q, k, v), delta))
    for some in found:
        for a, b in zip(some, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=close, atol=close)
    assert positions_of(pieces, B, T)[0].tolist() == [*range(7), 0, *range(22), *range(10)]


def test_logits_of_packed_rows_equal_transformers():
    """Which sees pieces in positions that start again, without a mask and without a cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=61)
    theirs = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=64)).eval()
    ours = LLaMA(ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=64, vocab_size=61, block_size=40))
    names = {name.removeprefix('model.'): t for name, t in theirs.state_dict().items()}
    ours.load_state_dict(names)
    x, pieces = torch.randint(0, 61, (2, 40)), torch.tensor([0, 7, 8, 30, 40, 52, 80], dtype=torch.int32)
    with torch.no_grad():
        places = positions_of(pieces, 2, 40)
        for row in range(2):  # theirs takes one packed row at a time for granted
            expected = theirs(x[row : row + 1], position_ids=places[row : row + 1], use_cache=False).logits
            torch.testing.assert_close(ours(x, pieces=pieces)[row : row + 1], expected, rtol=1e-5, atol=1e-5)
        assert (ours(x) - ours(x, pieces=pieces)).abs().max() > 0.01, 'without pieces they see each other'


@pytest.mark.parametrize('name', ['adamw', 'loqt', 'lora'])
def test_recomputed_blocks_see_the_same_pieces(name, folder):
    data, (model, optimizer) = Examples(folder, 'train', WINDOW), prepared(name)
    batches = [(x, y, None, pieces) for x, y, _, pieces in (data.batch(0, t, 2) for t in range(2))]
    found = []
    for model.checkpointing in (False, True):
        found.append(step_of(model, optimizer, batches))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_neighbours_and_their_order_change_nothing(folder):
    data = Examples(folder, 'train', WINDOW)
    model = LLaMA(ModelConfig(n_layer=2, n_head=4, n_embd=32, n_inner=64, vocab_size=61, block_size=WINDOW))
    made = {}
    with torch.no_grad():
        for row in ([2, 3, 6], [6, 2, 3], [3, 12, 17, 0]):
            x, _, _, pieces = data.pack([row])
            logits = model(x, pieces=pieces)[0]
            for i, a, b in zip(row, pieces.tolist(), pieces.tolist()[1:]):
                made.setdefault(i, []).append(logits[a:b])
    assert all(torch.allclose(some[0], other, atol=1e-5) for some in made.values() for other in some)
    assert len(made[3]) == 3


# ---- what a step is divided by, every method -------------------------------------------------------------------------


def methods():
    from test_contract import NAMES

    return NAMES


def prepared(name):
    """A model and its optimizer after a first step, in which methods make what they keep from a gradient."""
    from test_contract import model_and_optimizer

    model, optimizer = model_and_optimizer(name, update_proj_gap=50)
    model.set_block_size(200)
    x = torch.randint(0, VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(0))
    training.training_step(model, optimizer, [(x[:, :-1], x[:, 1:])], 1e-3, 'cpu')
    return model, optimizer


def step_of(model, optimizer, batches):
    """-> the loss of a step, and all gradients that the method moves by, as one vector."""
    model, optimizer = copy.deepcopy((model, optimizer))
    take, taken = optimizer.take_gradient, {}

    def noted(p):
        G = take(p)
        taken[optimizer.index_of[p]] = G.detach().double().flatten().clone()
        return G

    optimizer.take_gradient = noted
    loss = training.training_step(model, optimizer, batches, 1e-3, 'cpu')
    return loss.double(), torch.cat([taken[i] for i in sorted(taken)])


def close(found, expected, to):
    assert abs(found[0] / expected[0] - 1) <= to, (found[0], expected[0])
    assert found[1].shape == expected[1].shape
    apart = (found[1] - expected[1]).norm() / expected[1].norm()
    assert apart <= to, apart


COUNTS = [1, 200, 3, 90, 17, 1, 60, 150]  # trained targets of a row


def uneven_rows(T=200):
    draw = torch.Generator().manual_seed(1)
    x = torch.randint(0, VOCABULARY, (8, T), generator=draw)
    y = torch.full((8, T), -100)
    for row, n in enumerate(COUNTS):
        y[row, T - n :] = torch.randint(0, VOCABULARY, (n,), generator=draw)
    return x, y


@pytest.fixture(scope='module')
def two_processes():
    """{method: (loss, gradients)} of a step of two processes with four micro-batches each, of both the mean."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    work = "import sys; sys.path[:0] = ['.', 'tests']; import test_examples; test_examples.worker({}, {})"
    other = subprocess.Popen([sys.executable, '-c', work.format(1, port)], cwd=ROOT)
    done = run(['-c', work.format(0, port)])
    assert done.returncode == 0 and other.wait(60) == 0, done.stderr
    return torch.load(done.stdout.splitlines()[-1])


def worker(rank, port):
    import tempfile

    import torch.distributed as dist

    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    x, y = uneven_rows()
    found = {}
    for name in methods():
        batches = [(x[i : i + 1], y[i : i + 1]) for i in range(rank, 8, 2)]
        loss, gradients = step_of(*prepared(name), batches)
        dist.all_reduce(loss)
        found[name] = (loss / 2, gradients)
    if rank == 0:
        path = tempfile.NamedTemporaryFile(delete=False).name  # noqa: SIM115
        torch.save(found, path)
        print(path)
    dist.destroy_process_group()


@pytest.mark.parametrize('name', methods())
def test_however_a_step_is_cut_into_micro_batches_and_processes_loss_and_gradient_are_the_same(name, two_processes):
    made, (x, y) = prepared(name), uneven_rows()
    whole = step_of(*made, [(x, y)])
    close(step_of(*made, [(x[i : i + 1], y[i : i + 1]) for i in range(8)]), whole, 1e-6)
    close(two_processes[name], whole, 1e-6)
    # and it is the mean over trained tokens, not over micro-batches
    model, _ = made
    each = torch.stack([model(x[i : i + 1], y[i : i + 1]).detach() for i in range(8)])
    assert whole[0] == pytest.approx(((each * torch.tensor(COUNTS)).sum() / sum(COUNTS)).item(), rel=1e-5)
    assert abs(whole[0] - each.mean()) > 1e-3


@pytest.mark.parametrize('name', methods())
def test_packed_equals_one_at_a_time(name, folder):
    made, packed = prepared(name), Examples(folder, 'train', WINDOW)
    some = list(range(14))
    rows = [[some[i] for i in window] for window in best_fit(packed.lengths[some], WINDOW)]
    one_row = packed.pack(rows)
    single = step_of(*made, [alone(packed, i) for i in some])
    close(step_of(*made, [(one_row[0], one_row[1], None, one_row[3])]), single, 1e-5)
    batches = [packed.pack(rows[a : a + 2]) for a in range(0, len(rows), 2)]
    close(step_of(*made, [(x, y, None, pieces) for x, y, _, pieces in batches]), single, 1e-5)
    x, y, _ = packed.read(some)
    close(step_of(*made, [(x, y)]), single, 1e-5)


@pytest.mark.parametrize('name', methods())
@pytest.mark.parametrize('weights', ['uniform', 'cluster'])
def test_examples_that_colm_chooses_are_packed_and_weighed_as_one_at_a_time(name, weights, folder):
    made = prepared(name)
    chooser = Coreset('grad', weights=weights)
    config = SimpleNamespace(seed=1, batch_size=2, gradient_accumulation_steps=4, coreset_from=2)
    found = []
    for packing in (True, False):
        data = Examples(folder, 'train', WINDOW, packing)
        batches = chosen_batches(chooser, made[0], data, config, 3, 'cpu')
        assert sum(len(sources) for sources in batches) if packing else len(batches) == 4
        found.append(step_of(*made, batches))
    close(found[0], found[1], 1e-5)
    # one at a time, by hand: weights multiply token losses, the divisor is the sum of weights times tokens
    pool = data.pool(1, 3, 16)
    x, y, sources = data.read(pool)
    chosen, w = chooser.choose(made[0], x, y, sources, 8, 3, 2)
    assert len(set(chosen.tolist())) == 8
    w = torch.ones(8) if w is None else w
    total = torch.zeros(2)
    for i, factor in zip(chosen.tolist(), w):
        x, y = alone(data, pool[i])
        count = (y != -100).sum()
        total += factor * torch.stack([made[0](x, y, divisor=1).detach(), count])
    assert found[0][0] == pytest.approx((total[0] / total[1]).item(), rel=1e-5)


def test_processes_get_equally_many_micro_batches_of_what_was_chosen_and_all_of_it(folder):
    data = Examples(folder, 'train', WINDOW)
    examples = [1, 11, 5, 14, 0, 2, 3]  # 48, 39, 29 and 27 places fill a window each
    weights = torch.arange(1.0, 8)
    shares = [data.micro_batches(examples, weights, 1, rank, 3) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    assert sum(int((y != -100).sum()) for _, y, *_ in batches) == sum(LENGTHS[i] // 2 for i in examples)
    expected = sum(w * (LENGTHS[i] // 2) for w, i in zip(weights.tolist(), examples))
    assert trained_tokens(batches) == expected
    assert all(w.shape == x.shape and not w[y == -100][x[y == -100] == 0].sum() for x, y, w, _ in batches[-1:])


def test_a_pool_is_looked_at_without_its_padding_to_the_same_effect(folder):
    from coreset import features, widths_of

    data = Examples(folder, 'train', WINDOW)
    x, y, _ = data.read(data.pool(0, 0, 12))
    widths = widths_of(y, 4)
    assert widths[0] == x.shape[1] > widths[1] > widths[2] > 0
    model, _ = prepared('adamw')
    for feature in ('grad', 'zo'):
        short, long = (features(model, x, y, feature, 4, 2, widths=some) for some in (widths, None))
        compared = [Coreset(feature).compare(found) for found in (short, long)]
        torch.testing.assert_close(*compared, rtol=1e-3, atol=1e-4 * compared[1].abs().max().item())
        torch.testing.assert_close(short['H'], long['H'])


@pytest.mark.parametrize('packing', [True, False])
def test_val_loss_is_the_mean_over_trained_tokens(folder, packing):
    model = LLaMA(ModelConfig(n_layer=1, n_head=2, n_embd=16, n_inner=32, vocab_size=61, block_size=WINDOW))
    data = Examples(folder, 'train', WINDOW, packing)
    config = SimpleNamespace(batch_size=2, eval_tokens=10**6)
    with torch.no_grad():
        each = [model(*alone(data, i), divisor=1) for i in range(len(LENGTHS))]
    expected = (sum(each) / sum(n // 2 for n in LENGTHS)).item()
    more = dict(task='lm', gradient_accumulation_steps=1, block_size=WINDOW, max_iters=9)
    found = training.evaluate(model, data, SimpleNamespace(**vars(config), **more), HERE)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_step_in_which_nothing_is_trained_changes_nothing_and_has_no_nan():
    model, optimizer = prepared('adamw')
    optimizer.param_groups[0]['betas'] = optimizer.param_groups[1]['betas'] = (0.0, 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randint(0, VOCABULARY, (2, 16))
    loss = training.training_step(model, optimizer, [(x, torch.full_like(x, -100))], 1e-3, 'cpu')
    assert loss == 0 and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# ---- a run -----------------------------------------------------------------------------------------------------------


FLAGS = ['--method=adamw', '--n_layer=1', f'--block_size={WINDOW}', '--batch_size=2', '--gradient_accumulation_steps=2']


@pytest.mark.parametrize('more', [[], ['--packing=False'], ['--coreset=grad', '--coreset_from=2']], ids=str)
def test_an_interrupted_run_on_examples_equals_an_uninterrupted_one(folder, tmp_path, more):
    from test_checkpoint import again, session

    flags = [*FLAGS, '--eval_interval=20', '--eval_tokens=300', *more]
    session(tmp_path / 'whole', folder, *flags, '--max_iters=12', '--lr_decay_iters=12')
    session(tmp_path / 'parts', folder, *flags, '--max_iters=7', '--lr_decay_iters=12')
    session(tmp_path / 'parts', folder, *flags, *again(tmp_path / 'parts', '--max_iters=12'))
    whole, parts = (tmp_path / name / 'last' for name in ('whole', 'parts'))
    assert (whole / 'model.safetensors').read_bytes() == (parts / 'model.safetensors').read_bytes()
    runs = [json.loads((path / 'run.json').read_text()) for path in (whole, parts)]
    for key in ('windows', 'tokens', 'data', 'step'):
        assert runs[0][key] == runs[1][key], key


def test_a_run_says_what_it_reads(folder, tmp_path, capsys):
    from test_checkpoint import session

    session(tmp_path / 'out', folder, *FLAGS, '--max_iters=3')
    out = capsys.readouterr().out
    assert f'data: {len(LENGTHS)} train examples with {sum(n // 2 for n in LENGTHS)} trained tokens and 3 val' in out
    assert f'step: 2 windows x {WINDOW} tokens x 2 micro-batches = {4 * WINDOW} tokens; ' in out
    data = Examples(folder, 'train', WINDOW)
    assert f'tokens = {4 * 3 / data.windows:.2f} epochs' in out, (
        'of windows, which hold fewer tokens than they have room for'
    )
    per_window = (sum(LENGTHS) - len(LENGTHS)) / data.windows
    assert f'\ntokens: {round(3 * 4 * per_window)}\n' in out, 'fillers are not counted'
    session(tmp_path / 'out2', folder, *FLAGS, '--max_iters=3', '--packing=False')
    out = capsys.readouterr().out
    assert f'step: 2 examples of up to {WINDOW} tokens x 2 micro-batches = 4 examples; 3 steps = 12 examples' in out


# ---- broken folders --------------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_a_sentence_each(tmp_path, data):
    folder = written(tmp_path, LENGTHS)
    with pytest.raises(
        DataError, match=r'train.bin: 2 of 24 examples do not fit block_size=36: use --block_size=48, or'
    ):
        load(folder, 'train', 36)
    for name in ('train_ends.bin', 'train_trained.bin'):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-8])
        with pytest.raises(DataError, match=rf'{name} holds \d+ .*, meta.json says \d+: run its prepare.py again'):
            load(folder, 'train', WINDOW)
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match=rf'{name} cannot be read'):
            load(folder, 'train', WINDOW)
        (tmp_path / name).write_bytes(whole)
    ends = np.fromfile(tmp_path / 'train_ends.bin', 'int64')
    np.append(ends[:-1], ends[-1] + 5).tofile(tmp_path / 'train_ends.bin')
    with pytest.raises(DataError, match=r'train_ends.bin does not cut \d+ tokens into examples'):
        load(folder, 'train', WINDOW)
    ends.tofile(tmp_path / 'train_ends.bin')
    meta = json.loads((tmp_path / 'meta.json').read_text())
    for changed, sentence in (
        (dict(train_trained=0), 'no token of any example is trained: prepare the data with answers'),
        (dict(train_examples=25), 'train_examples is 25, its sources have 24: run its prepare.py again'),
        (dict(val_trained='many'), "val_trained='many' is not a whole number"),
    ):
        (tmp_path / 'meta.json').write_text(json.dumps(meta | changed))
        with pytest.raises(DataError, match=sentence):
            load(folder, 'train', WINDOW)
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    done = run(['train.py', f'--dataset={data}', '--packing=False', f'--out_dir={tmp_path / "out"}', '--device=cpu'])
    assert done.returncode and 'packing is of examples, and' in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_fingerprint_is_also_of_what_is_trained_and_where_examples_end(folder, tmp_path):
    before = fingerprint(folder)
    for name in ('train_trained.bin', 'val_ends.bin'):
        whole = bytearray((tmp_path / name).read_bytes())
        whole[0] ^= 1
        (tmp_path / name).write_bytes(whole)
        assert fingerprint(folder) != before
        whole[0] ^= 1
        (tmp_path / name).write_bytes(whole)
        assert fingerprint(folder) == before
