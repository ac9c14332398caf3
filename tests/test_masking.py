import numpy as np
import pytest

from peco_ds.config import MaskSettings
from peco_ds.data.masking import block_mask, draw_masked


@pytest.mark.parametrize(
    "grid, count, kind",
    [(14, 75, "block"), (16, 98, "block"), (8, 24, "block"), (14, 147, "random"), (14, 195, "block")],
)
def test_the_count_is_exact_and_positions_are_distinct_and_increasing(grid, count, kind):
    for sample in range(60):
        mask = MaskSettings(kind=kind, count=count, min_block=min(16, count))
        masked = draw_masked(mask, grid, seed=0, epoch=1, sample=sample)
        assert masked.shape == (count,) and masked.dtype == np.int64
        assert (np.diff(masked) > 0).all() and masked[0] >= 0 and masked[-1] < grid * grid


def test_a_mask_follows_from_seed_epoch_and_sample_alone():
    def draw(**change) -> list[int]:
        return draw_masked(MaskSettings(), 14, **{"seed": 0, "epoch": 0, "sample": 0, **change}).tolist()

    assert draw() == draw()
    assert len({tuple(draw()), tuple(draw(seed=1)), tuple(draw(epoch=1)), tuple(draw(sample=1))}) == 4


def neighbours_hidden(masked, grid):
    """Share of masked patches whose right neighbour is hidden too."""
    mask = np.zeros((grid, grid), bool)
    mask.flat[masked] = True
    return (mask[:, :-1] & mask[:, 1:]).sum() / mask[:, :-1].sum()


def test_block_masks_hide_connected_regions_and_random_masks_do_not():
    def share_of(kind: str):
        masks = [draw_masked(MaskSettings(kind=kind), 14, seed=0, epoch=0, sample=sample) for sample in range(100)]
        return np.mean([neighbours_hidden(masked, 14) for masked in masks])

    block, random = share_of("block"), share_of("random")
    # random hides 75 of 196, so about 0.38 of the neighbours; blocks of 16 and more patches hide most of them
    assert abs(random - 74 / 195) < 0.03
    assert block > 0.7


def test_every_patch_is_hidden_now_and_then_and_none_almost_always():
    counts = np.zeros(196)
    for sample in range(1500):
        counts[draw_masked(MaskSettings(), 14, seed=0, epoch=0, sample=sample)] += 1
    share = counts.reshape(14, 14) / 1500
    # a block fits around the middle in more ways than at the rim, where a corner is hidden about one time in twenty
    assert share.min() > 0.02 and share.max() < 0.85
    assert abs(share.mean() - 75 / 196) < 1e-9


def beit_v1(sample, *, grid=14, **change):
    return draw_masked(MaskSettings(**{"exact": False, **change}), grid, seed=0, epoch=0, sample=sample)


def test_beits_first_masks_never_hide_more_than_the_count_and_sometimes_less():
    counts = [len(beit_v1(sample)) for sample in range(400)]
    assert max(counts) == 75 and min(counts) < 75
    # the bound is nearly reached: ten tries seldom fail before a few patches are left
    assert np.mean(counts) > 65


def test_an_exact_mask_is_the_first_ones_filled_up_at_random():
    for sample in range(100):
        loose, exact = beit_v1(sample), beit_v1(sample, exact=True)
        assert set(loose) <= set(exact) and len(exact) == 75 and (np.diff(loose) > 0).all()


def test_a_mask_of_one_block_is_a_rectangle_within_the_limits_of_area_aspect_and_side():
    """Count equal to min_block leaves room for one block alone.

    Sides are rounded, so area and aspect are bound up to the rounding.
    """
    alone = 0
    for seed in range(300):
        mask = block_mask(np.random.default_rng(seed), MaskSettings(count=40, min_block=40, exact=False), 14)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        if mask.sum() == height * width:
            alone += 1
            assert height < 14 and width < 14
            assert 0.3 * 0.8 < height / width < 1.25 / 0.3
            assert height * width <= 40
    assert alone > 50


def test_random_masks_are_exact_whatever_is_asked():
    assert all(len(beit_v1(sample, kind="random", count=147)) == 147 for sample in range(20))


def test_an_image_where_no_block_fits_still_hides_one_patch():
    """On a grid of 2 a block of 3 has a side of 2 at least, which is not smaller than the grid's."""
    assert {len(beit_v1(sample, grid=2, count=3, min_block=3)) for sample in range(20)} == {1}
