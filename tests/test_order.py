import pickle

import numpy as np
import pytest

from peco_ds.config import RunSettings
from peco_ds.data.order import Cursor, SampleOrder, generator, rank_positions, uniform, view_at
from peco_ds.errors import UserError

SIZES = np.array([7, 1, 12, 5, 9, 3])


def test_an_epoch_is_every_sample_once_and_the_next_has_another_order():
    order = SampleOrder(SIZES, seed=3, window_shards=2)
    first = [order.sample_at(p) for p in range(order.num_samples)]
    second = [order.sample_at(p) for p in range(order.num_samples, 2 * order.num_samples)]
    assert sorted(first) == sorted(second) == list(range(SIZES.sum()))
    assert first != second


def test_the_order_does_not_depend_on_where_one_starts_to_ask():
    order, other = SampleOrder(SIZES, 0, 2), SampleOrder(SIZES, 0, 2)
    whole = [order.sample_at(p) for p in range(200)]
    assert [other.sample_at(p) for p in reversed(range(200))] == whole[::-1]
    assert [pickle.loads(pickle.dumps(other)).sample_at(p) for p in (5, 77, 123)] == [whole[p] for p in (5, 77, 123)]


def test_another_seed_gives_another_order():
    assert [SampleOrder(SIZES, 0, 2).sample_at(p) for p in range(37)] != [
        SampleOrder(SIZES, 1, 2).sample_at(p) for p in range(37)
    ]


def test_reading_stays_inside_a_window_of_shards():
    order = SampleOrder(np.full(12, 10), seed=0, window_shards=3)
    for window in range(4):
        shards = {order.sample_at(p) // 10 for p in range(window * 30, (window + 1) * 30)}
        assert len(shards) == 3


def test_no_view_repeats_before_all_were_seen():
    for sample in range(20):
        for cycle in range(3):
            views = [view_at(0, cycle * 8 + epoch, sample, 8) for epoch in range(8)]
            assert sorted(views) == list(range(8))
    assert len({tuple(view_at(0, epoch, sample, 8) for epoch in range(8)) for sample in range(20)}) > 15


@pytest.mark.parametrize("world_size, micro_batch", [(1, 32), (1, 4), (2, 8), (4, 8), (4, 2)])
def test_global_batches_are_the_same_for_any_ranks_and_micro_batch(world_size, micro_batch):
    per_rank = [
        list(
            rank_positions(
                RunSettings(global_batch=32, micro_batch=micro_batch), rank, world_size, first_step=5, last_step=8
            )
        )
        for rank in range(world_size)
    ]
    micro_steps = 32 // micro_batch // world_size
    for step in range(3):
        # the order in which the passes run: micro-step by micro-step, over the ranks
        batch = np.concatenate(
            [per_rank[rank][step * micro_steps + micro] for micro in range(micro_steps) for rank in range(world_size)]
        )
        assert batch.tolist() == list(range((5 + step) * 32, (6 + step) * 32))


def test_a_cursor_of_other_images_or_another_seed_is_refused():
    cursor = Cursor("a" * 64, 0, 100)
    cursor.check("a" * 64, 0)
    with pytest.raises(UserError, match="image set"):
        cursor.check("b" * 64, 0)
    with pytest.raises(UserError, match="seed"):
        cursor.check("a" * 64, 1)


def test_an_empty_set_is_refused():
    with pytest.raises(UserError, match="no sample"):
        SampleOrder(np.array([0, 0]), 0, 1)


def test_a_uniform_number_is_the_generators_own():
    ours, numpys = generator(3, 1, 4), generator(3, 1, 4)
    for low, high in [(0.08, 1.0), (16, 75), (-1.2, 1.2), (5, 5)] * 50:
        assert uniform(ours, low, high) == pytest.approx(numpys.uniform(low, high), rel=1e-15, abs=1e-15)
    assert ours.integers(1 << 30) == numpys.integers(1 << 30), "both have drawn the same words"
