"""Batches are a function of the run alone: ranks, workers and micro-batch only divide them."""

import numpy as np
import pytest
import torch

from peco_ds.config import PretrainRecipe, data_path, load_recipe
from peco_ds.data.loaders import BadPictures, Pictures, crop_batches, held_out_pictures, masked_batches, training_order
from peco_ds.data.order import rank_positions
from peco_ds.data.token_shards import TokenSet
from peco_ds.errors import UserError
from peco_ds.models.peco_tokenizer import load_tokenizer

CPU = torch.device("cpu")


def open_sets(small_sets, *overrides):
    recipe = load_recipe(PretrainRecipe, "peco_vitb16", [*small_sets.overrides, *overrides]).recipe
    pictures = Pictures(data_path(recipe.data, recipe.data.images))
    tokens = TokenSet(data_path(recipe.data, recipe.data.tokens), pictures.manifest, num_codes=64, grid=4, views=recipe.views)
    return recipe, pictures, tokens


def batches_of(recipe, pictures, tokens, *, rank=0, world_size=1, first_step=0, last_step=6):
    positions = rank_positions(recipe.run, rank, world_size, first_step=first_step, last_step=last_step)
    return masked_batches(
        pictures, tokens, positions, data=recipe.data, views=recipe.views, mask=recipe.mask, image_px=recipe.model.image_px, grid=recipe.model.grid, seed=recipe.run.seed, device=CPU
    )


def global_batches(small_sets, *, world_size, num_workers, micro_batch):
    """What all ranks together train on, pass by pass, in the order of the passes."""
    recipe, pictures, tokens = open_sets(small_sets, f"data.num_workers={num_workers}", f"run.micro_batch={micro_batch}")
    ranks = [list(batches_of(recipe, pictures, tokens, rank=rank, world_size=world_size)) for rank in range(world_size)]
    passes = [batch for passes in zip(*ranks) for batch in passes]
    assert all(batch.masked.shape == (micro_batch, 6) for batch in passes)
    return [key for b in passes for key in b.keys], *(torch.cat([getattr(b, name) for b in passes]) for name in ("images_norm", "masked", "targets"))


@pytest.fixture(scope="module")
def reference(small_sets):
    return global_batches(small_sets, world_size=1, num_workers=0, micro_batch=8)


@pytest.mark.parametrize("world_size, num_workers, micro_batch", [(1, 1, 4), (1, 3, 8), (2, 0, 4), (2, 3, 2), (4, 0, 2), (4, 1, 1)])
def test_global_batches_are_the_same_for_any_ranks_and_workers(small_sets, reference, world_size, num_workers, micro_batch):
    found = global_batches(small_sets, world_size=world_size, num_workers=num_workers, micro_batch=micro_batch)
    assert found[0] == reference[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1:], reference[1:]))


def test_a_run_that_starts_in_the_middle_reads_what_the_uninterrupted_one_reads(small_sets):
    recipe, pictures, tokens = open_sets(small_sets)
    whole = list(batches_of(recipe, pictures, tokens, last_step=30))  # 240 samples: past the end of the first and second epoch of 96
    tail = list(batches_of(recipe, pictures, tokens, first_step=11, last_step=30))
    assert len(whole) == 60 and len(tail) == 38
    for a, b in zip(whole[22:], tail):
        assert a.keys == b.keys and torch.equal(a.images_norm, b.images_norm) and torch.equal(a.masked, b.masked) and torch.equal(a.targets, b.targets)


def test_stored_codes_equal_codes_computed_online_for_every_view(small_sets):
    """All 96 pictures, all 3 views: 13,824 codes at 4 x 4 a view, plus the replayed crops themselves."""
    recipe, pictures, tokens = open_sets(small_sets)
    tokenizer, _ = load_tokenizer(data_path(recipe.data, recipe.data.tokenizer))

    @torch.no_grad()
    def online(images_11):
        return tokenizer.tokenize(images_11)

    seen, compared = set(), 0
    epochs = zip(batches_of(recipe, pictures, tokens, last_step=36), batches_of(recipe, pictures, online, last_step=36))
    for stored, computed in epochs:
        assert stored.keys == computed.keys
        assert torch.equal(stored.images_norm, computed.images_norm), "the backbone's replayed crop differs from the drawn one"
        assert torch.equal(stored.targets, computed.targets)
        seen |= {(key, tuple(target.tolist())) for key, target in zip(stored.keys, stored.targets)}
        compared += stored.targets.numel()
    assert compared == 3 * 96 * 6 and len({key for key, _ in seen}) == 96


def test_every_stored_code_and_crop_is_what_the_record_replays(small_sets):
    from peco_ds.data.loaders import draw_recorded_view
    from peco_ds.data.views import cut, jitter, to_tokenizer

    recipe, pictures, tokens = open_sets(small_sets)
    tokenizer, _ = load_tokenizer(data_path(recipe.data, recipe.data.tokenizer))
    for sample in range(96):
        key, image = pictures.decode(sample)
        record = tokens.read(sample, key)
        drawn = np.stack([draw_recorded_view(image, recipe.views, sample, view) for view in range(3)])
        assert np.array_equal(drawn, record.views)
        crops = jitter(torch.stack([cut(image, row, 32) for row in record.views]), torch.from_numpy(record.views))
        with torch.no_grad():
            assert np.array_equal(tokenizer.tokenize(to_tokenizer(crops)).numpy(), record.codes.astype(np.int64)), key


def test_every_epoch_shows_another_view_until_all_were_seen(small_sets):
    recipe, pictures, tokens = open_sets(small_sets)
    targets: dict[str, list] = {}
    order = []
    for batch in batches_of(recipe, pictures, tokens, last_step=36):
        for key, image in zip(batch.keys, batch.images_norm):
            targets.setdefault(key, []).append(image)
            order.append(key)
    assert all(len(images) == 3 for images in targets.values())
    different = [not torch.equal(a, b) for images in targets.values() for a, b in ((images[0], images[1]), (images[1], images[2]), (images[0], images[2]))]
    assert all(different)
    assert order[:96] != order[96:192]


def test_unreadable_pictures_are_named_and_too_many_stop_the_run(caplog):
    bad = BadPictures(max_share=0.01)
    bad.add(1000, ["a: truncated"] * 10)
    with pytest.raises(UserError, match="12 of 1100 pictures are unreadable"):
        bad.add(100, ["b: truncated"] * 2)
    assert bad.count == 12


def test_held_out_pictures_are_kept_from_training(small_sets):
    recipe, pictures, _ = open_sets(small_sets, "data.holdout=10")
    order = training_order(pictures, recipe.data, 0)
    assert order.num_samples == 86
    trained = {order.sample_at(position) for position in range(86)}
    assert trained == set(range(86))
    crops = held_out_pictures(pictures, recipe.data, 100, 32)
    assert crops.shape == (10, 3, 32, 32) and crops.dtype == torch.uint8
    batch = next(crop_batches(pictures, order, [np.arange(4)], data=recipe.data, views=recipe.views, device=CPU))
    assert batch.shape == (4, 3, 32, 32) and -1 <= batch.min() and batch.max() <= 1
    with pytest.raises(UserError, match="holdout"):
        training_order(pictures, load_recipe(PretrainRecipe, "peco_vitb16", ["data.holdout=96"]).recipe.data, 0)
