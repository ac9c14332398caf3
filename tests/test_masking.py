import numpy as np
import pytest

from peco_ds.data.masking import draw_masked


@pytest.mark.parametrize("grid, count, kind", [(14, 75, "block"), (16, 98, "block"), (8, 24, "block"), (14, 147, "random"), (14, 195, "block")])
def test_the_count_is_exact_and_positions_are_distinct_and_increasing(grid, count, kind):
    for sample in range(60):
        masked = draw_masked(seed=0, epoch=1, sample=sample, grid=grid, kind=kind, count=count, min_block=min(16, count), min_aspect=0.3)
        assert masked.shape == (count,) and masked.dtype == np.int64
        assert (np.diff(masked) > 0).all() and masked[0] >= 0 and masked[-1] < grid * grid


def test_a_mask_follows_from_seed_epoch_and_sample_alone():
    draw = lambda **change: draw_masked(**{**dict(seed=0, epoch=0, sample=0, grid=14, kind="block", count=75, min_block=16, min_aspect=0.3), **change}).tolist()  # noqa: E731
    assert draw() == draw()
    assert len({tuple(draw()), tuple(draw(seed=1)), tuple(draw(epoch=1)), tuple(draw(sample=1))}) == 4


def neighbours_hidden(masked, grid):
    """Share of hidden patches whose right neighbour is hidden too."""
    mask = np.zeros((grid, grid), bool)
    mask.flat[masked] = True
    return (mask[:, :-1] & mask[:, 1:]).sum() / mask[:, :-1].sum()


def test_block_masks_hide_connected_regions_and_random_masks_do_not():
    arguments = dict(seed=0, epoch=0, grid=14, count=75, min_block=16, min_aspect=0.3)
    block = np.mean([neighbours_hidden(draw_masked(sample=s, kind="block", **arguments), 14) for s in range(100)])
    random = np.mean([neighbours_hidden(draw_masked(sample=s, kind="random", **arguments), 14) for s in range(100)])
    # random hides 75 of 196, so about 0.38 of the neighbours; blocks of 16 and more patches hide most of them
    assert abs(random - 74 / 195) < 0.03
    assert block > 0.7


def test_every_patch_is_hidden_now_and_then_and_none_almost_always():
    counts = np.zeros(196)
    for sample in range(1500):
        counts[draw_masked(seed=0, epoch=0, sample=sample, grid=14, kind="block", count=75, min_block=16, min_aspect=0.3)] += 1
    share = counts.reshape(14, 14) / 1500
    # a block fits around the middle in more ways than at the rim, where a corner is hidden about one time in twenty
    assert share.min() > 0.02 and share.max() < 0.85
    assert abs(share.mean() - 75 / 196) < 1e-9
