"""Batches are a function of the run alone: ranks, workers and micro-batch only divide them."""

import errno
import logging
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_stage

from peco_ds.config import PretrainRecipe
from peco_ds.data import retry
from peco_ds.data.image_set import BadImages, ImageSet
from peco_ds.data.indexed_tar import IndexedTar
from peco_ds.data.loaders import (
    Codes,
    crop_batches,
    held_out_images,
    masked_batches,
    training_order,
    without_lost,
)
from peco_ds.data.order import rank_positions
from peco_ds.data.token_shards import TokenSet
from peco_ds.data.workers import MAX_WORKER_DEATHS, WORKER_STRETCH, RawBatch, load_raw
from peco_ds.data_paths import data_path
from peco_ds.errors import UserError
from peco_ds.models.tokenizers import load_tokenizer
from peco_ds.recipe_files import load_recipe
from peco_ds.runtime.token_source import online_tokenizer
from peco_ds.schema import IGNORED, NO_CODE

CPU = torch.device("cpu")


def open_sets(small_sets, *overrides):
    recipe = load_recipe(PretrainRecipe, "peco_vitb16", [*small_sets.overrides, *overrides]).recipe
    images = ImageSet(data_path(recipe.data, recipe.data.images))
    tokens = TokenSet(
        data_path(recipe.data, recipe.data.tokens), images.manifest, num_codes=64, grid=4, views=recipe.views
    )
    return recipe, images, tokens


def batches_of(recipe, images, tokens, *, rank=0, world_size=1, first_step=0, last_step=6):
    positions = rank_positions(recipe.run, rank, world_size, first_step=first_step, last_step=last_step)
    return masked_batches(images, tokens, positions, recipe, CPU)


def global_batches(small_sets, *, world_size, num_workers, micro_batch):
    """What all ranks together train on, pass by pass, in the order of the passes."""
    recipe, images, tokens = open_sets(small_sets, f"data.num_workers={num_workers}", f"run.micro_batch={micro_batch}")
    ranks = [list(batches_of(recipe, images, tokens, rank=rank, world_size=world_size)) for rank in range(world_size)]
    passes = [batch for passes in zip(*ranks) for batch in passes]
    assert all(batch.masked.shape == (micro_batch, 6) for batch in passes)
    return [key for b in passes for key in b.keys], *(
        torch.cat([tensors(b)[place] for b in passes]) for place in range(3)
    )


def tensors(batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return batch.images_norm, batch.masked, batch.targets.codes


@pytest.fixture(scope="module")
def reference(small_sets):
    return global_batches(small_sets, world_size=1, num_workers=0, micro_batch=8)


@pytest.mark.parametrize(
    "world_size, num_workers, micro_batch", [(1, 1, 4), (1, 3, 8), (2, 0, 4), (2, 3, 2), (4, 0, 2), (4, 1, 1)]
)
def test_global_batches_are_the_same_for_any_ranks_and_workers(
    small_sets, reference, world_size, num_workers, micro_batch
):
    found = global_batches(small_sets, world_size=world_size, num_workers=num_workers, micro_batch=micro_batch)
    assert found[0] == reference[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1:], reference[1:]))


def test_a_run_that_starts_in_the_middle_reads_what_the_uninterrupted_one_reads(small_sets):
    recipe, images, tokens = open_sets(small_sets)
    # 240 samples: past the end of the first and second epoch of 96
    whole = list(batches_of(recipe, images, tokens, last_step=30))
    tail = list(batches_of(recipe, images, tokens, first_step=11, last_step=30))
    assert len(whole) == 60 and len(tail) == 38
    for a, b in zip(whole[22:], tail):
        assert a.keys == b.keys and all(torch.equal(mine, other) for mine, other in zip(tensors(a), tensors(b)))


def test_stored_codes_equal_codes_computed_online_for_every_view(small_sets):
    """All 96 images, all 3 views: 13,824 codes at 4 x 4 a view, plus the replayed crops themselves."""
    recipe, images, tokens = open_sets(small_sets)
    tokenizer, _ = load_tokenizer(data_path(recipe.data, recipe.data.tokenizer))

    @torch.no_grad()
    def online(images_11):
        return Codes(tokenizer.tokenize(images_11))

    seen, compared = set(), 0
    epochs = zip(batches_of(recipe, images, tokens, last_step=36), batches_of(recipe, images, online, last_step=36))
    for stored, computed in epochs:
        assert stored.keys == computed.keys
        assert torch.equal(stored.images_norm, computed.images_norm), (
            "the backbone's replayed crop differs from the drawn one"
        )
        assert torch.equal(stored.targets.codes, computed.targets.codes)
        seen |= {(key, tuple(target.tolist())) for key, target in zip(stored.keys, stored.targets.codes)}
        compared += stored.targets.codes.numel()
    assert compared == 3 * 96 * 6 and len({key for key, _ in seen}) == 96


def test_an_image_without_codes_makes_its_own_loss_not_finite_and_changes_no_other():
    images_norm, codes = torch.rand(3, 3, 4, 4), Codes(torch.tensor([[1, 2], [NO_CODE, 5], [0, 63]]))
    poisoned, usable = without_lost(images_norm, codes)
    assert poisoned[1].isnan().all() and torch.equal(poisoned[[0, 2]], images_norm[[0, 2]])
    assert usable.codes.tolist() == [[1, 2], [0, 5], [0, 63]]


def test_every_stored_code_and_crop_is_what_the_record_replays(small_sets):
    from peco_ds.data.views import cut, draw_view, jitter, to_tokenizer

    recipe, images, tokens = open_sets(small_sets)
    tokenizer, _ = load_tokenizer(data_path(recipe.data, recipe.data.tokenizer))
    for sample in range(96):
        key, image = images.decode(sample)
        record = tokens.read(sample, key)
        drawn = np.stack([draw_view(recipe.views, *image.shape[1:], sample=sample, view=view) for view in range(3)])
        assert np.array_equal(drawn, record.views)
        crops = jitter(torch.stack([cut(image, row, 32) for row in record.views]), torch.from_numpy(record.views))
        with torch.no_grad():
            assert np.array_equal(tokenizer.tokenize(to_tokenizer(crops)).numpy(), record.codes.astype(np.int64)), key


def test_soft_codes_are_the_tokenizers_for_all_patches_stored_or_computed_online(small_sets, tmp_path):
    soft = [
        f"data.tokens={tmp_path / 'soft'}",
        "views.topk=6",
        "views.topk_temperature=0.3",
        "views.tokenizer_interpolation=lanczos",
    ]
    run_stage("tokenize_shards", "--recipe", "peco_vitb16", *small_sets.overrides, *soft)
    recipe, images, tokens = open_sets(small_sets, *soft)
    online = online_tokenizer(data_path(recipe.data, recipe.data.tokenizer), recipe, CPU)
    compared = 0
    for stored, computed in zip(batches_of(recipe, images, tokens), batches_of(recipe, images, online)):
        assert torch.equal(stored.images_norm, computed.images_norm) and torch.equal(
            stored.targets.codes, computed.targets.codes
        )
        # Up to the rounding to 16 bits, by which two codes that are almost equally likely may change places.
        assert torch.allclose(stored.targets.topk_probs, computed.targets.topk_probs, rtol=2e-3, atol=1e-6)
        assert (stored.targets.topk_codes == computed.targets.topk_codes).float().mean() > 0.99
        assert stored.targets.topk_codes.shape == (4, 16, 6), (
            "a target may mix in what other patches are, so all of them are there"
        )
        assert torch.equal(stored.targets.topk_codes[..., 0].gather(1, stored.masked), stored.targets.codes)
        compared += stored.targets.topk_probs.numel()
    assert compared == 6 * 2 * 4 * 16 * 6
    fewer, _, _ = open_sets(small_sets, *soft, "views.topk=2")
    first, all_six = (
        next(batches_of(fewer, images, tokens)).targets,
        next(batches_of(recipe, images, tokens)).targets,
    )
    assert torch.equal(first.topk_probs, all_six.topk_probs[..., :2]), (
        "a set with more soft codes than are asked for gives the likeliest"
    )


def test_an_image_with_fewer_hidden_patches_repeats_its_last_one_and_has_no_target_there(small_sets):
    recipe, images, tokens = open_sets(small_sets, "mask.exact=false", "mask.count=7", "mask.min_block=4")
    filled = 0
    for batch in batches_of(recipe, images, tokens, last_step=36):
        for key, masked, codes in zip(batch.keys, batch.masked.tolist(), batch.targets.codes.tolist()):
            shown = len(set(masked))
            assert masked == sorted(masked) and masked[shown:] == [masked[-1]] * (7 - shown), key
            assert codes[shown:] == [IGNORED] * (7 - shown) and min(codes[:shown]) >= 0, key
            filled += shown < 7
    assert filled > 0, "no mask of the sample was short of its count, so nothing was tested"


def test_the_tokenizers_crop_is_resized_as_the_recipe_says_and_the_backbones_is_not(small_sets):
    crops = {}
    for interpolation in ("bicubic", "lanczos"):
        recipe = load_recipe(
            PretrainRecipe,
            "peco_vitb16",
            [*small_sets.overrides, f"views.tokenizer_interpolation={interpolation}", "views.tokenizer_px=64"],
        ).recipe
        images = ImageSet(data_path(recipe.data, recipe.data.images))
        seen = []

        def online(images_11):
            seen.append(images_11)
            return Codes(torch.zeros(len(images_11), 16, dtype=torch.int64))

        batch = next(batches_of(recipe, images, online))
        crops[interpolation] = (seen[0], batch.images_norm)
    assert torch.equal(crops["bicubic"][1], crops["lanczos"][1])
    assert not torch.equal(crops["bicubic"][0], crops["lanczos"][0])


def test_every_epoch_shows_another_view_until_all_were_seen(small_sets):
    recipe, image_set, tokens = open_sets(small_sets)
    targets: dict[str, list] = {}
    order = []
    for batch in batches_of(recipe, image_set, tokens, last_step=36):
        for key, image in zip(batch.keys, batch.images_norm):
            targets.setdefault(key, []).append(image)
            order.append(key)
    assert all(len(images) == 3 for images in targets.values())
    different = [
        not torch.equal(a, b)
        for images in targets.values()
        for a, b in ((images[0], images[1]), (images[1], images[2]), (images[0], images[2]))
    ]
    assert all(different)
    assert order[:96] != order[96:192]


def test_held_out_images_are_kept_from_training(small_sets):
    recipe, images, _ = open_sets(small_sets, "data.holdout=10")
    order = training_order(images, recipe.data, 0)
    assert order.num_samples == 86
    trained = {order.sample_at(position) for position in range(86)}
    assert trained == set(range(86))
    held_out = held_out_images(images, recipe.data, 100, 32)
    crops = held_out.images_u8
    assert held_out.labels.tolist() == [images.label(sample) for sample in range(86, 96)]
    assert held_out.classes == tuple(images.manifest.classes)
    assert crops.shape == (10, 3, 32, 32) and crops.dtype == torch.uint8
    batch = next(crop_batches(images, order, [np.arange(4)], recipe, CPU)).images_11
    assert batch.shape == (4, 3, 32, 32) and batch.min() >= -1 and batch.max() <= 1
    with pytest.raises(UserError, match="holdout"):
        training_order(images, load_recipe(PretrainRecipe, "peco_vitb16", ["data.holdout=96"]).recipe.data, 0)


# ------------------------------------------------------------------------------------ workers that die


class Numbers:
    """Place n -> a tensor of n, made slowly enough that a kill finds workers at work; some places end their worker."""

    def __init__(self, folder: Path, deadly: dict[int, int] | None = None, times: int = 1) -> None:
        self.folder, self.deadly, self.times = folder, deadly or {}, times

    def __call__(self, places: np.ndarray) -> RawBatch:
        place = int(places[0])
        time.sleep(0.002)
        died = len(list(self.folder.glob(f"died_{place}_*")))
        if place in self.deadly and died < self.times:
            (self.folder / f"died_{place}_{died}").touch()
            os.kill(os.getpid(), self.deadly[place])
            time.sleep(60)
        return RawBatch(samples=torch.full((1000,), place))


def places(count: int) -> list[np.ndarray]:
    return [np.array([place]) for place in range(count)]


def leftovers() -> tuple[int, set[str]]:
    """Child processes, and files of ours in shared memory."""
    return len(multiprocessing.active_children()), {
        name for name in os.listdir("/dev/shm") if name.startswith("torch_")
    }


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_killed_worker_costs_no_batch_and_changes_none(tmp_path, caplog, num_workers):
    before = leftovers()
    taken = []
    for raw in load_raw(Numbers(tmp_path), places(60), num_workers):
        taken.append(int(raw.samples[0]))
        assert bool((raw.samples == taken[-1]).all())
        if len(taken) in (7, 40):
            victim = multiprocessing.active_children()[-1]
            os.kill(victim.pid, signal.SIGKILL)
            # as where the kill met it while it made a batch's shared memory
            Path(f"/dev/shm/torch_{victim.pid}_1_0").write_bytes(b"half made")
            # the main thread is in its step when the worker dies: nothing may be raised here
            time.sleep(0.05)
    assert taken == list(range(60))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2 and all("SIGKILL" in text and "out of memory" in text for text in warnings)
    del raw
    assert leftovers() == before


@pytest.mark.parametrize(
    "number, words",
    [
        (signal.SIGKILL, "lower data.num_workers or give the job more memory"),
        (signal.SIGSEGV, "SIGSEGV.*native decoder"),
    ],
)
def test_workers_that_keep_dying_end_the_run_with_the_likely_reason(tmp_path, number, words):
    before = leftovers()
    taken = []
    with pytest.raises(UserError, match=f"{MAX_WORKER_DEATHS} loader workers died in a row.*{words}"):
        for raw in load_raw(Numbers(tmp_path, {20: number}, times=99), places(40), 3):
            taken.append(int(raw.samples[0]))
    assert taken == list(range(len(taken))) and len(taken) <= 20
    del raw
    assert leftovers() == before


def test_deaths_far_apart_do_not_add_up(tmp_path):
    apart = WORKER_STRETCH + 20
    deadly = {apart * (number + 1): signal.SIGKILL for number in range(MAX_WORKER_DEATHS + 1)}
    taken = [
        int(raw.samples[0]) for raw in load_raw(Numbers(tmp_path, deadly), places(apart * (MAX_WORKER_DEATHS + 2)), 2)
    ]
    assert taken == list(range(apart * (MAX_WORKER_DEATHS + 2)))
    assert len(list(tmp_path.glob("died_*"))) == len(deadly)


def test_batches_of_a_run_whose_worker_was_killed_are_those_of_an_undisturbed_one(small_sets, reference):
    recipe, images, tokens = open_sets(small_sets, "data.num_workers=2", "run.micro_batch=8")
    found = []
    for batch in batches_of(recipe, images, tokens):
        found.append(batch)
        if len(found) == 2:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    assert [key for batch in found for key in batch.keys] == reference[0]
    for place, expected in enumerate(reference[1:]):
        assert torch.equal(torch.cat([tensors(batch)[place] for batch in found]), expected)


def test_an_abandoned_loader_leaves_no_process(tmp_path):
    batches = load_raw(Numbers(tmp_path), places(1000), 2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


def test_a_fault_in_a_worker_keeps_its_traceback_and_is_no_death(tmp_path):
    def make(places):
        assert int(places[0]) < 3, "ours"
        return RawBatch(samples=torch.from_numpy(places))

    with pytest.raises(AssertionError, match="ours"):
        list(load_raw(make, places(9), 2))


# --------------------------------------------------------------------- shards that change during a run


@pytest.fixture
def own_images(small_sets, tmp_path):
    shutil.copytree(small_sets.root / "images", tmp_path / "images")
    return tmp_path / "images" / "train"


def read_all(small_sets, folder, *, num_workers, disturb, after=2):
    """Keys of the batches that were handed out, `disturb` called when `after` were."""
    recipe, _, tokens = open_sets(small_sets, f"data.num_workers={num_workers}", "data.max_bad_share=0.02")
    images = ImageSet(folder)
    keys = []
    for batch in batches_of(recipe, images, tokens, last_step=24):
        keys.append(batch.keys)
        if len(keys) == after:
            disturb()
    return keys


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_cut_short_during_the_run_ends_it_and_is_named_with_what_changed(small_sets, own_images, num_workers):
    def cut_all():
        for shard in own_images.glob("*.tar"):
            os.truncate(shard, 2000)

    with pytest.raises(UserError, match=r"\.tar: shard is cut short: 2000 bytes, the manifest says \d+"):
        read_all(small_sets, own_images, num_workers=num_workers, disturb=cut_all)


def test_a_shard_removed_during_the_run_is_named_when_it_is_next_opened(small_sets, own_images):
    def remove():
        for shard in own_images.glob("*.tar"):
            shard.unlink()

    with pytest.raises(UserError, match=r"shard-\d+\.tar: no such"):
        read_all(small_sets, own_images, num_workers=0, disturb=remove, after=1)


def test_a_shard_replaced_by_another_of_its_size_gives_no_image_of_the_other(small_sets, own_images):
    """Every image of it differs from the index: a few are passed over, then the run ends.

    No batch holds what is not in the manifest.
    """
    expected = read_all(small_sets, small_sets.root / "images" / "train", num_workers=0, disturb=lambda: None)
    taken = []

    def replace():
        for shard in own_images.glob("*.tar"):
            data = bytearray(shard.read_bytes())
            for place in range(0, len(data), 997):
                data[place] ^= 0xFF
            shard.write_bytes(data)

    recipe, _, tokens = open_sets(small_sets, "data.max_bad_share=0.02")
    with pytest.raises(UserError, match="CRC-32 differs|readings of images failed|none of 96 images"):
        for batch in batches_of(recipe, ImageSet(own_images), tokens, last_step=24):
            taken.append(batch.keys)
            if len(taken) == 2:
                replace()
    assert taken == expected[: len(taken)]


class Flaky:
    """Makes `IndexedTar.read` fail the first times it is asked for a sample."""

    def __init__(self, monkeypatch, number: int, times: int, only_tar: str = "") -> None:
        self.left, self.failed = {}, 0
        read = IndexedTar.read

        def flaky(tar, i, extensions=None):
            place = (str(tar.tar_path), i)
            if only_tar in place[0] and i == 3 and self.left.setdefault(place, times) > 0:
                self.left[place] -= 1
                self.failed += 1
                raise OSError(number, os.strerror(number))
            return read(tar, i, extensions)

        monkeypatch.setattr(IndexedTar, "read", flaky)
        monkeypatch.setattr(retry, "WAITS_S", (0.01, 0.01, 0.01))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_read_that_fails_a_few_times_changes_nothing(small_sets, reference, monkeypatch, number, caplog):
    flaky = Flaky(monkeypatch, number, times=3)
    found = global_batches(small_sets, world_size=1, num_workers=0, micro_batch=8)
    assert flaky.failed
    assert found[0] == reference[0] and all(torch.equal(a, b) for a, b in zip(found[1:], reference[1:]))
    assert os.strerror(number) in caplog.text and "read again" in caplog.text


def test_an_image_that_cannot_be_read_at_all_counts_as_unreadable_and_a_token_record_ends_the_run(
    small_sets, monkeypatch, caplog
):
    Flaky(monkeypatch, errno.EIO, times=99, only_tar="images")
    recipe, images, tokens = open_sets(small_sets)
    bad = BadImages(max_share=0.1)
    positions = rank_positions(recipe.run, 0, 1, first_step=0, last_step=12)
    keys = [key for batch in masked_batches(images, tokens, positions, recipe, CPU, bad) for key in batch.keys]
    # one image in each of four shards
    assert len(keys) == 96 and (bad.count, bad.read) == (4, 96)
    assert "4 times in 0.03 s" in caplog.text
    monkeypatch.undo()
    Flaky(monkeypatch, errno.EIO, times=99, only_tar="tokens")
    with pytest.raises(UserError, match=r"tokens/train/shard-\d+\.tar: Input/output error, 4 times"):
        list(batches_of(recipe, images, tokens, last_step=12))
