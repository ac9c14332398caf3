"""A token set is used only with the images and the tokenizer it was made from, and only undamaged."""

import dataclasses
import json
import shutil
import tarfile

import numpy as np
import pytest
import webdataset

from peco_ds.config import ViewSettings
from peco_ds.data.image_set import ImageSet
from peco_ds.data.token_parts import TokenParts
from peco_ds.data.token_shards import TokenRecord, TokenSet, read_npy, write_token_shard
from peco_ds.errors import UserError
from peco_ds.models.tokenizers import read_card
from peco_ds.schema import VIEW_COLUMNS, TokenManifest, ViewRecipe, read_manifest

# as conftest.SMALL_VIT tokenizes
VIEWS = ViewSettings(tokenizer_px=32, tokenizer_precision="fp32", scale=(0.2, 1.0), count=3)


@pytest.fixture
def copied(small_sets, tmp_path):
    shutil.copytree(small_sets.root / "tokens", tmp_path / "tokens")
    return tmp_path / "tokens" / "train"


@pytest.fixture
def images(small_sets):
    return ImageSet(small_sets.root / "images" / "train").manifest


def open_set(folder, images, **change):
    return TokenSet(folder, images, **{**dict(num_codes=64, grid=4, views=VIEWS), **change})


def test_a_webdataset_reader_reads_token_shards_beside_image_shards(small_sets):
    """The sibling-folder convention: same shard names, same keys, same order, readable by plain webdataset."""
    tokens, images = small_sets.root / "tokens" / "train", small_sets.root / "images" / "train"
    for shard in sorted(images.glob("*.tar")):
        keys = [sample["__key__"] for sample in webdataset.WebDataset(str(shard), shardshuffle=False)]
        records = list(webdataset.WebDataset(str(tokens / shard.name), shardshuffle=False).decode())
        assert [record["__key__"] for record in records] == keys
        assert all(
            record["codes.npy"].shape == (3, 16) and record["codes.npy"].dtype == np.uint16 for record in records
        )
        assert all(record["views.npy"].shape == (3, len(VIEW_COLUMNS)) for record in records)


def test_tokenizing_again_does_nothing_and_a_lost_shard_alone_is_made_again(small_sets, copied, tmp_path):
    from conftest import run_stage

    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in copied.glob("*.tar")}
    lost = sorted(before)[1]
    (copied / lost).unlink()
    run_stage("tokenize_shards", "--recipe", "peco_vitb16", *small_sets.overrides, f"data.tokens={copied}")
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in copied.glob("*.tar")}
    assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in before.items()}, (
        "the same tokens must give the same bytes"
    )
    assert [name for name in before if before[name][0] != after[name][0]] == [lost]


def test_tokens_of_another_tokenizer_are_refused(copied, images, small_sets):
    fingerprint = read_card(small_sets.root / "tokenizer").fingerprint
    open_set(copied, images, tokenizer_fingerprint=fingerprint)
    with pytest.raises(UserError, match=f"made by tokenizer {fingerprint[:12]}, this run names tokenizer 000000000000"):
        open_set(copied, images, tokenizer_fingerprint="0" * 64)


def test_tokens_of_other_images_are_refused_by_shard(copied, images):
    changed = dataclasses.replace(
        images, shards=[dataclasses.replace(images.shards[0], sha256="1" * 64), *images.shards[1:]]
    )
    with pytest.raises(UserError, match=f"image shard {images.shards[0].name} has sha256 111111111111"):
        open_set(copied, changed)
    longer = dataclasses.replace(
        images, shards=[*images.shards, dataclasses.replace(images.shards[0], name="more.tar")]
    )
    with pytest.raises(UserError, match="no tokens for image shard more.tar"):
        open_set(copied, longer)
    with pytest.raises(UserError, match="made from image set"):
        open_set(copied, dataclasses.replace(images, shards=images.shards[:-1]))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(num_codes=8192), "vocabulary of 64"),
        (dict(grid=14), "4x4 grid, the backbone has 14x14"),
        (
            dict(views=dataclasses.replace(VIEWS, count=4)),
            "3 views are stored for each image, views.count asks for 4",
        ),
        (
            dict(views=dataclasses.replace(VIEWS, color_jitter=0.1)),
            "recorded with views.color_jitter = 0.4, the recipe has 0.1",
        ),
        (dict(views=dataclasses.replace(VIEWS, seed=1)), "recorded with views.seed = 0, the recipe has 1"),
        (
            dict(views=dataclasses.replace(VIEWS, tokenizer_interpolation="lanczos")),
            "recorded with views.tokenizer_interpolation = bicubic, the recipe has lanczos",
        ),
        (
            dict(views=dataclasses.replace(VIEWS, topk=2)),
            "0 soft codes are stored for each patch, views.topk asks for 2",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_the_tokens_is_refused(copied, images, change, words):
    with pytest.raises(UserError, match=words):
        open_set(copied, images, **change)


def test_a_missing_shard_is_named(copied, images):
    name = images.shards[2].name
    (copied / name).unlink()
    with pytest.raises(UserError, match=name):
        open_set(copied, images).shards.check("size")


def test_a_flipped_byte_is_found_at_start_and_when_read(copied, images):
    name = images.shards[1].name
    data = bytearray((copied / name).read_bytes())
    with tarfile.open(copied / name) as tar:
        member = next(m for m in tar if m.name.endswith(".codes.npy"))
        position = member.offset_data + member.size - 1
    data[position] ^= 1
    (copied / name).write_bytes(data)
    tokens = open_set(copied, images)
    tokens.shards.check("size")
    with pytest.raises(UserError, match=name):
        tokens.shards.check("all")
    with pytest.raises(UserError, match=f"{name}.*{member.name.split('.')[0]}"):
        for sample in range(tokens.num_samples):
            tokens.read(sample)


def test_a_record_under_another_images_key_is_refused(copied, images):
    with pytest.raises(UserError, match="the image at this place is somebody_else"):
        open_set(copied, images).read(0, "somebody_else")


def test_codes_outside_of_the_vocabulary_are_refused(tmp_path, copied, images):
    records = [
        TokenRecord(f"k{i}", np.full((1, 16), 64, np.uint16), np.ones((1, len(VIEW_COLUMNS)), np.float32))
        for i in range(2)
    ]
    shard = write_token_shard(tmp_path, images.shards[0].name, records)
    manifest = read_manifest(copied, TokenManifest)
    broken = dataclasses.replace(
        manifest, shards=[shard], samples=2, num_views=1, image_shards={shard.name: images.shards[0].sha256}
    )
    one = dataclasses.replace(images, shards=images.shards[:1])
    broken = dataclasses.replace(broken, images_fingerprint=one.fingerprint())
    from peco_ds.schema import write_manifest

    write_manifest(tmp_path, broken)
    with pytest.raises(UserError, match="code 64 in a vocabulary of 64"):
        open_set(tmp_path, one, views=dataclasses.replace(VIEWS, count=1)).read(0)


def test_a_pickle_in_a_record_is_refused_unread():
    payload = bytearray(
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(128)
        + b"\n"
        + b"cos\nsystem\n(S'false'\ntR."
    )
    with pytest.raises(UserError, match="not an .npy array"):
        read_npy(bytes(payload), what="x", dtype=np.uint16, shape=(1,))


def test_parts_are_finished_only_when_all_shards_are_there(images, tmp_path):
    views = ViewRecipe(32, (0.2, 1.0), (0.75, 1.3), 0.5, 0.4, 0)
    parts = TokenParts(
        tmp_path,
        images,
        tokenizer_fingerprint="f" * 64,
        num_codes=64,
        grid=4,
        num_views=1,
        topk=0,
        topk_temperature=1.0,
        views=views,
    )

    def record(key: str) -> TokenRecord:
        return TokenRecord(key, np.zeros((1, 16), np.uint16), np.ones((1, len(VIEW_COLUMNS)), np.float32))

    for number in (0, 1, 3):
        parts.write(number, [record(f"k{i}") for i in range(images.shards[number].samples)])
    with pytest.raises(UserError, match=f"1 of 4 shards are not tokenized yet, first {images.shards[2].name}"):
        parts.finish()
    with pytest.raises(UserError, match=r"run their parts \(2 of --parts 4\)"):
        parts.finish(4)
    parts.write(2, [record(f"k{i}") for i in range(images.shards[2].samples)])
    assert parts.finish().samples == images.samples
    (tmp_path / "manifest.json").rename(tmp_path / "was.json")
    other = TokenParts(
        tmp_path,
        images,
        tokenizer_fingerprint="e" * 64,
        num_codes=64,
        grid=4,
        num_views=1,
        topk=0,
        topk_temperature=1.0,
        views=views,
    )
    assert not any(other.is_done(number) for number in range(4)), "shards of another tokenizer must be made again"
    (tmp_path / "was.json").rename(tmp_path / "manifest.json")
    with pytest.raises(UserError, match="holds a finished token set with tokenizer_fingerprint = ffff"):
        TokenParts(
            tmp_path,
            images,
            tokenizer_fingerprint="e" * 64,
            num_codes=64,
            grid=4,
            num_views=1,
            topk=0,
            topk_temperature=1.0,
            views=views,
        )


def test_soft_codes_are_stored_with_their_mass(small_sets, tmp_path):
    from conftest import run_stage

    run_stage(
        "tokenize_shards",
        "--recipe",
        "peco_vitb16",
        *small_sets.overrides,
        f"data.tokens={tmp_path / 'soft'}",
        "views.topk=8",
        "views.count=1",
    )
    manifest = json.loads((tmp_path / "soft" / "manifest.json").read_text())
    assert manifest["topk"] == 8
    images = ImageSet(small_sets.root / "images" / "train").manifest
    record = open_set(tmp_path / "soft", images, views=dataclasses.replace(VIEWS, count=1, topk=8)).read(5)
    assert record.topk_codes.shape == record.topk_probs.shape == (1, 16, 8)
    assert np.array_equal(record.topk_codes[..., 0], record.codes), "the likeliest soft code is the hard one"
    mass = record.topk_probs.astype(np.float32).sum(-1)
    assert (mass > 8 / 64 - 1e-3).all() and (mass < 1).all()
    with pytest.raises(UserError, match="soft codes of temperature 1.0, the recipe has views.topk_temperature 4.0"):
        open_set(tmp_path / "soft", images, views=dataclasses.replace(VIEWS, count=1, topk=8, topk_temperature=4.0))
    # hard codes alone know no temperature
    open_set(tmp_path / "soft", images, views=dataclasses.replace(VIEWS, count=1, topk_temperature=4.0))


def test_one_view_of_a_record_is_what_the_whole_record_holds(small_sets, copied, images):
    tokens = open_set(copied, images)
    for sample in (0, 50):
        whole = tokens.read(sample)
        for view in range(3):
            one = tokens.read(sample, whole.key, view)
            assert (
                one.codes.shape == (1, 16)
                and np.array_equal(one.codes[0], whole.codes[view])
                and np.array_equal(one.views[0], whole.views[view])
            )
            # a copy: the bytes it came from cannot be written to
            one.codes[0, 0] = 1
