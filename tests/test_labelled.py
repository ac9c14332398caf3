"""Labelled batches are a function of the run alone; evaluation sees every image exactly once."""

import io
import json
import random
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler

from peco_ds.config import AugmentSettings, DataSettings, FinetuneRecipe, ModelSettings, RunSettings
from peco_ds.data.image_set import ImageSet
from peco_ds.data.indexed_tar import index_name, write_index
from peco_ds.data.labelled import CropSettings, _difference, check_labels, evaluation_batches, training_batches
from peco_ds.data.order import SampleOrder, rank_positions
from peco_ds.errors import UserError
from peco_ds.schema import MANIFEST_NAME, ImageManifest, Shard, write_manifest

CPU = torch.device("cpu")
HALF = (0.5, 0.5, 0.5)
RUN = RunSettings(global_batch=8, micro_batch=4)


@pytest.fixture
def images(small_sets) -> ImageSet:
    return ImageSet(small_sets.root / "images" / "train")


def train(images, positions, *, num_workers=0, seed=0, augment=None, max_bad_share=0.0):
    recipe = FinetuneRecipe(
        data=DataSettings(num_workers=num_workers, shuffle_window_shards=2, max_bad_share=max_bad_share),
        model=ModelSettings(image_px=32),
        augment=augment or AugmentSettings(),
        run=replace(RUN, seed=seed),
    )
    return training_batches(images, positions, recipe, CPU)


def of_run(images, *, world_size=1, first_step=0, last_step=3, **options):
    """What all ranks together train on, pass by pass, in the order of the passes."""
    ranks = [
        list(
            train(images, rank_positions(RUN, rank, world_size, first_step=first_step, last_step=last_step), **options)
        )
        for rank in range(world_size)
    ]
    return [batch for passes in zip(*ranks) for batch in passes]


def evaluate(images, *, rank=0, world_size=1, batch=8, num_workers=0, crop=0.875):
    world = SimpleNamespace(rank=rank, size=world_size, device=CPU)
    wanted = CropSettings(32, crop, HALF, HALF)
    return list(evaluation_batches(images, wanted, world, batch=batch, num_workers=num_workers))


def assert_equal_batches(found, expected):
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    for a, b in zip(found, expected):
        assert torch.equal(a.images_norm, b.images_norm) and torch.equal(a.targets, b.targets)


def copy_of(images: ImageSet, folder, **manifest_changes) -> ImageSet:
    """The set in another folder, with other entries in its manifest."""
    shutil.copytree(images.folder, folder)
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | manifest_changes))
    return ImageSet(folder)


def damage(images: ImageSet, sample: int) -> str:
    """Change a byte of an image on disk. Returns: its key."""
    shard, place = images.shards.locate(sample)
    name = images.manifest.shards[shard].name
    entry = json.loads((images.folder / index_name(name)).read_text())["samples"][place]
    offset = next(span[0] for extension, span in entry["members"].items() if extension != "cls")
    with open(images.folder / name, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 255]))
    return entry["key"]


@pytest.mark.parametrize("world_size, num_workers", [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2)])
def test_global_batches_are_bit_identical_for_any_ranks_and_workers(images, world_size, num_workers):
    expected = of_run(images)
    found = of_run(images, world_size=world_size, num_workers=num_workers)
    assert len(found) == 6
    assert_equal_batches(found, expected)


def test_a_run_that_starts_in_the_middle_reads_what_the_uninterrupted_one_reads(images):
    # step 11 starts inside the repeats of an image, step 12 in the next epoch of 96
    augment = AugmentSettings(repeats=3)
    whole = of_run(images, last_step=14, augment=augment)
    assert_equal_batches(of_run(images, first_step=11, last_step=14, augment=augment), whole[22:])


def test_another_seed_and_another_epoch_augment_and_mix_anew(images):
    epochs = of_run(images, last_step=24)
    by_key = {}
    for batch in of_run(images, last_step=24, augment=AugmentSettings(mixup=0.0, cutmix=0.0)):
        for key, image in zip(batch.keys, batch.images_norm):
            by_key.setdefault(key, []).append(image)
    assert len(by_key) == 96 and all(len(seen) == 2 and not torch.equal(*seen) for seen in by_key.values())
    assert [batch.keys for batch in epochs] != [batch.keys for batch in of_run(images, last_step=24, seed=1)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loop_keeps_its_own_random_states(images, num_workers):
    """Stochastic depth draws from the global generators: loading may not move them."""
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(3)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    batches = train(images, rank_positions(RUN, 0, 1, first_step=0, last_step=2), num_workers=num_workers)
    next(batches), next(batches)
    evaluate(images, num_workers=num_workers)
    assert (random.random(), np.random.rand()) == expected[:2] and torch.equal(torch.rand(3), expected[2])


def test_labels_are_those_of_the_images_folders(images):
    classes = check_labels(images, "data.images")
    for batch in of_run(images, augment=AugmentSettings(mixup=0.0, cutmix=0.0)):
        assert batch.targets.shape == (4, len(classes))
        for key, target in zip(batch.keys, batch.targets):
            assert classes[int(target.argmax())] in key


@pytest.mark.parametrize("repeats", [2, 3])
def test_an_epoch_of_repeated_augmentation_has_the_counts_of_timms_sampler(repeats):
    sizes = np.array([50, 30, 20])
    order, plain = SampleOrder(sizes, 0, 2, repeats), SampleOrder(sizes, 0, 2)
    for epoch in range(2):
        places = range(epoch * 100, (epoch + 1) * 100)
        shown = [order.sample_at(place) for place in places]
        assert shown == np.repeat([plain.sample_at(place) for place in places], repeats)[:100].tolist()
        for num_replicas in (1, 2):
            ranks = [
                list(RepeatAugSampler(range(100), num_replicas, rank, num_repeats=repeats))
                for rank in range(num_replicas)
            ]
            timms = Counter(Counter(sum(ranks, [])).values())
            assert Counter(Counter(shown).values()) == timms
        assert len(set(shown)) == -(-100 // repeats)
        assert len({(order.sample_at(place), order.repeat_of(place)) for place in places}) == 100


def test_repeats_of_an_image_are_augmented_each_in_its_own_way(images):
    augment = AugmentSettings(repeats=3, mixup=0.0, cutmix=0.0)
    batches = of_run(images, last_step=12, augment=augment)
    by_key = {}
    for batch in batches:
        for key, image in zip(batch.keys, batch.images_norm):
            by_key.setdefault(key, []).append(image)
    assert len(by_key) == 32
    for seen in by_key.values():
        assert len(seen) == 3
        assert not any(torch.equal(seen[a], seen[b]) for a, b in ((0, 1), (1, 2), (0, 2)))


def test_an_unreadable_image_is_named_and_the_next_one_comes_with_its_own_label(images, tmp_path, caplog):
    order = SampleOrder(images.shards.shard_sizes, 0, 2)
    hit = order.sample_at(2)
    spoilt = copy_of(images, tmp_path / "spoilt")
    key = damage(spoilt, hit)
    batch = of_run(spoilt, last_step=1, augment=AugmentSettings(mixup=0.0, cutmix=0.0))[0]
    substitute = (hit + 1) % 96
    assert batch.keys[2] == images.key(substitute) and int(batch.targets[2].argmax()) == images.label(substitute)
    assert key in caplog.text


def test_a_set_without_labels_is_refused(images, tmp_path):
    with pytest.raises(UserError, match="data.val_images .*without labels; pack"):
        check_labels(copy_of(images, tmp_path / "unlabelled", classes=None), "data.val_images")


@pytest.mark.parametrize("label, complaint", [(b"cat", "'cat'"), (b"7", "'7'"), (b"-1", "'-1'"), (None, "has no .cls")])
def test_a_label_that_is_no_class_of_the_set_is_refused_with_its_key(real_data, tmp_path, label, complaint):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("one.jpg", real_data.imagenet[0].read_bytes()), ("one.cls", label)):
            if content is not None:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    samples, index_sha256 = write_index(tmp_path / "a.tar", tmp_path / index_name("a.tar"))
    shard = Shard("a.tar", samples, (tmp_path / "a.tar").stat().st_size, "0" * 64, index_sha256)
    write_manifest(tmp_path, ImageManifest([shard], samples, classes=["first", "second"]))
    for read in (
        lambda: evaluate(ImageSet(tmp_path)),
        lambda: list(train(ImageSet(tmp_path), [np.zeros(2, dtype=np.int64)], num_workers=1)),
    ):
        with pytest.raises(UserError, match=f"a.tar: one: .*{complaint}"):
            read()


@pytest.mark.parametrize("world_size, batch, num_workers", [(1, 8, 0), (1, 7, 2), (2, 5, 0), (3, 7, 1), (5, 96, 0)])
def test_evaluation_sees_every_image_exactly_once_in_equally_many_equal_batches(images, world_size, batch, num_workers):
    ranks = [
        evaluate(images, rank=rank, world_size=world_size, batch=batch, num_workers=num_workers)
        for rank in range(world_size)
    ]
    assert len({tuple(found.images_norm.shape for found in found_batches) for found_batches in ranks}) == 1
    assert all(len(found.labels) <= batch for found in ranks[0])
    samples, labels = (
        torch.cat([getattr(found, name) for found_batches in ranks for found in found_batches])
        for name in ("samples", "labels")
    )
    assert torch.equal(samples < 0, labels < 0)
    real = samples[samples >= 0]
    assert real.tolist() == list(range(96))
    assert labels[labels >= 0].tolist() == [images.label(sample) for sample in range(96)]
    assert all(found.images_norm.isfinite().all() for found_batches in ranks for found in found_batches)


@pytest.mark.parametrize("crop", [0.875, 1.0])
def test_an_evaluation_image_is_timms_evaluation_transform(images, crop):
    from torchvision.transforms.functional import to_pil_image

    reference = create_transform(32, is_training=False, crop_pct=crop, interpolation="bicubic", mean=HALF, std=HALF)
    for found in evaluate(images, crop=crop, batch=16)[:2]:
        for image_norm, sample in zip(found.images_norm, found.samples):
            assert torch.allclose(image_norm, reference(to_pil_image(images.decode(int(sample))[1])), atol=1e-5)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_stops_evaluation_with_its_name(images, tmp_path, num_workers):
    spoilt = copy_of(images, tmp_path / "spoilt")
    key = damage(spoilt, 40)
    with pytest.raises(UserError) as caught:
        evaluate(spoilt, num_workers=num_workers)
    assert (
        key in str(caught.value) and "accuracy needs every image" in str(caught.value) and "\n" not in str(caught.value)
    )


def test_the_class_that_two_sets_do_not_share_is_named(tmp_path):
    one = ("ant", "bee", "caf\u00e9")
    assert _difference(one, one) == ""
    assert _difference(one, ("ant", "caf\u00e9")) == "1 of the classes, as 'bee', are not in it"
    assert _difference(one, (*one, "cow", "dog")) == "2 of the classes, as 'cow', are in it alone"
    assert "composed otherwise in Unicode" in _difference(one, ("ant", "bee", "cafe\u0301"))
    assert _difference(one, ("bee", "ant", "caf\u00e9")) == "class 0 is 'bee' there and 'ant' here"
