"""memory/record.py: the allocator by hand. What a record says of a step, and a deeper one's, is in test_trace.py."""

import pytest
import torch

from memory import record
from memory.depth import NotUniform, deeper
from memory.record import Allocator, Chunk


def test_allocator_rounds_splits_and_joins_as_torchs_does_by_hand():
    MB = record.MB
    card = Allocator()
    small = card.malloc(100)  # rounded to 512, from a segment of 2 MB
    assert (small.size, card.reserved) == (512, 2 * MB)
    card.malloc(MB)  # the rest of that segment holds it
    assert card.reserved == 2 * MB
    card.malloc(MB)  # but not another one
    assert card.reserved == 4 * MB
    middle = card.malloc(3 * MB)  # from 1 to 10 MB: a segment of 20 MB
    assert card.reserved == 24 * MB
    card.malloc(11 * MB)
    assert card.reserved == 24 * MB, 'in what is left of the 20'
    large = card.malloc(21 * MB + 1)
    assert card.reserved == 46 * MB, 'its own segment, rounded to 2 MB'
    card.free(large)
    again = card.malloc(21 * MB)  # what is over, 1 MB or less, is not split off
    assert (card.reserved, again.size) == (46 * MB, 22 * MB)
    card.free(again)
    first = card.malloc(10 * MB)  # the smallest free block that is large enough: 22, since 6 of the 20 are left
    second = card.malloc(12 * MB)
    assert card.reserved == 46 * MB
    card.free(first)
    card.free(second)
    assert card.malloc(22 * MB).size == 22 * MB and card.reserved == 46 * MB, 'free neighbours are joined'
    card.free(middle)
    card.malloc(4 * MB)
    assert card.reserved == 46 * MB


def test_reserved_is_never_less_than_what_is_alive_and_fits_the_real_allocators_bound():
    generator = torch.Generator().manual_seed(0)
    card, alive, most = Allocator(), [], 0
    for _ in range(3000):
        if alive and torch.rand((), generator=generator) < 0.5:
            card.free(alive.pop(int(torch.randint(len(alive), (), generator=generator))))
        else:
            alive.append(card.malloc(int(2 ** (27 * torch.rand((), generator=generator)))))
        most = max(most, sum(block.size for block in alive))
        assert card.reserved >= most
    for block in alive:
        card.free(block)
    card.limit = card.reserved
    card.give_back()
    assert card.reserved == 0, 'all of it can go back to the card'


def test_a_full_card_takes_its_free_segments_back_before_it_is_full():
    MB = record.MB
    card = Allocator(limit=50 * MB)
    card.free(card.malloc(30 * MB))
    card.malloc(40 * MB)  # 30 free ones are in the way, and go
    assert card.reserved == 40 * MB and not card.full and card.peak_reserved == 40 * MB
    card.malloc(20 * MB)
    assert card.full


def test_no_byte_is_lost_between_the_blocks():
    generator = torch.Generator().manual_seed(1)
    card, alive = Allocator(), []
    for _ in range(300):
        alive.append(card.malloc(int(2 ** (27 * torch.rand((), generator=generator)))))
    for block in alive:
        card.free(block)
    whole = sum(size for pool in card.free_blocks.values() for size, _, _ in pool)
    assert whole == card.reserved, 'no byte is lost or counted twice'
    assert all(b.before is None and b.after is None for pool in card.free_blocks.values() for _, _, b in pool)


def test_layers_in_the_middle_that_differ_are_not_repeated():
    def record_of(size):
        return [Chunk(layer, [('+', size(layer), 'forward', '', ())], 1) for layer in range(4)]

    deep = deeper(record_of(lambda layer: 8 + (layer in (1, 2))), 6)
    assert [(chunk.layer, chunk.events[0][1]) for chunk in deep] == [(0, 8), (1, 9), (2, 9), (3, 9), (4, 9), (5, 8)]
    assert [chunk.layer for chunk in deeper(record_of(lambda layer: 8)[:3], 6)] == [0, 1, 2, 3, 4], 'all but the last'
    for chunks in (record_of(lambda layer: layer), record_of(lambda layer: 8)[:2], record_of(lambda layer: 8)[1:]):
        with pytest.raises(NotUniform):
            deeper(chunks, 6)
