"""Sets read from a web server and from an S3 store: the batches of a disk, whatever the server does."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from store_servers import s3_server

from benchmarks.web_server import WebServer
from peco_ds import pack_images
from peco_ds.config import PretrainRecipe
from peco_ds.data.image_set import ImageSet
from peco_ds.data.indexed_tar import write_index
from peco_ds.data.loaders import crop_batches, masked_batches
from peco_ds.data.order import SampleOrder, rank_positions
from peco_ds.data.remote_tar import GAP_BYTES, REQUEST_BYTES, Span, joined
from peco_ds.data.token_shards import TokenRecord, TokenSet, write_token_shard
from peco_ds.data_paths import data_path
from peco_ds.errors import StoreFault, UserError
from peco_ds.recipe_files import load_recipe
from peco_ds.remote_paths import parse_url
from peco_ds.runtime.distributed import World
from peco_ds.runtime.set_check import check_shared
from peco_ds.schema import (
    VIEW_COLUMNS,
    ImageManifest,
    Shard,
    TokenManifest,
    ViewRecipe,
    read_manifest,
    sha256_of_file,
    write_manifest,
)

SHARDS, SAMPLES = 3, 8
SETTINGS = (
    "model.image_px=32 model.patch_px=8 mask.count=6 mask.min_block=2 views.tokenizer_px=32 views.count=1 "
    "objective.num_codes=64 data.tokens=tokens/train data.num_workers=0 data.shuffle_window_shards=2 "
    "data.store_retry_s=0.5 run.global_batch=8 run.micro_batch=4"
).split()


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """images/train and tokens/train, of drawn images."""
    root, draw = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    images, tokens = root / "images" / "train", root / "tokens" / "train"
    images.mkdir(parents=True)
    tokens.mkdir(parents=True)
    shards, token_shards = [], []
    for number in range(SHARDS):
        tar, records = images / f"shard-{number:06d}.tar", []
        with webdataset.TarWriter(str(tar), encoder=False) as writer:
            for sample in range(SAMPLES):
                key = f"{number}/{sample:04d}"
                path = root / "image.png"
                Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
                writer.write({"__key__": key, "png": path.read_bytes(), "cls": str(sample % 3).encode()})
                view = np.zeros((1, len(VIEW_COLUMNS)), dtype=np.float32)
                view[0] = [0, 0, 40, 40, 0, 1, 1, 1, 0]
                records.append(TokenRecord(key, draw.integers(0, 64, (1, 16)).astype(np.uint16), view))
        samples, index_sha256 = write_index(tar, tar.with_name(tar.stem + ".index.json"))
        shards.append(Shard(tar.name, samples, tar.stat().st_size, sha256_of_file(tar), index_sha256))
        token_shards.append(write_token_shard(tokens, tar.name, records))
    manifest = ImageManifest(shards, SHARDS * SAMPLES, ["a", "b", "c"])
    write_manifest(images, manifest)
    views = load_recipe(PretrainRecipe, "peco_vitb16", SETTINGS).recipe.views
    names = ViewRecipe.__dataclass_fields__
    recorded = ViewRecipe(**{"tokenizer_px": 32} | {name: getattr(views, name) for name in names})
    write_manifest(
        tokens,
        TokenManifest(
            token_shards,
            SHARDS * SAMPLES,
            manifest.fingerprint(),
            {shard.name: shard.sha256 for shard in shards},
            "0" * 64,
            64,
            (4, 4),
            1,
            recorded,
        ),
    )
    return root


@pytest.fixture
def server(sets, tmp_path):
    """The sets on a web server, as copies that a test may change."""
    shutil.copytree(sets, tmp_path / "served")
    server = WebServer(tmp_path / "served")
    yield server
    server.stop()


def recipe_at(root: object, *overrides: str):
    return load_recipe(PretrainRecipe, "peco_vitb16", [*SETTINGS, f"data.root={root}", *overrides]).recipe


def open_sets(recipe) -> tuple[ImageSet, TokenSet]:
    images = ImageSet(data_path(recipe.data, recipe.data.images))
    tokens = TokenSet(
        data_path(recipe.data, recipe.data.tokens), images.manifest, num_codes=64, grid=4, views=recipe.views
    )
    return images, tokens


def batches(recipe, *, rank=0, world_size=1, first_step=0, last_step=6):
    images, tokens = open_sets(recipe)
    positions = rank_positions(recipe.run, rank, world_size, first_step=first_step, last_step=last_step)
    return masked_batches(images, tokens, positions, recipe, torch.device("cpu"))


def seen(found) -> list:
    return [
        (batch.keys, batch.images_norm.clone(), batch.masked.clone(), batch.targets.codes.clone()) for batch in found
    ]


def assert_same(found: list, expected: list) -> None:
    assert [entry[0] for entry in found] == [entry[0] for entry in expected]
    for one, other in zip(found, expected):
        assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:]))


@pytest.fixture(scope="module")
def local(sets) -> list:
    return seen(batches(recipe_at(sets)))


# ------------------------------------------------------------------------------------- the same batches


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_cold_and_warm_batches_are_those_of_a_disk(server, local, tmp_path, workers):
    workers = f"data.num_workers={workers}"
    assert_same(seen(batches(recipe_at(server.url, workers))), local)
    cached = recipe_at(server.url, workers, f"data.cache={tmp_path}/cache")
    assert_same(seen(batches(cached)), local)
    server.forget()
    assert_same(seen(batches(cached)), local)
    # the two manifests are read anew, and of each a byte that shows whether there are ranges
    assert server.requests <= 4


def test_whole_shards_are_read_once_and_then_from_the_disk(server, local, tmp_path):
    recipe = recipe_at(server.url, f"data.cache={tmp_path}/cache", "data.cache_whole_shards=true")
    assert_same(seen(batches(recipe)), local)
    kept = list((tmp_path / "cache").rglob("*.tar"))
    assert len(kept) == 2 * SHARDS
    server.forget()
    assert_same(seen(batches(recipe)), local)
    assert server.requests <= 4


def test_batches_from_s3_are_those_of_a_disk(sets, local):
    import s3fs

    with s3_server("bucket") as url:
        s3fs.S3FileSystem().put(str(sets), "bucket/sets", recursive=True)
        recipe = recipe_at(f"{url}/sets")
        assert_same(seen(batches(recipe)), local)
        open_sets(recipe)[0].shards.check("all")
        with pytest.raises(UserError, match="s3://no-such-bucket/images/train: no manifest.json .* no such bucket"):
            open_sets(recipe_at("s3://no-such-bucket"))


def test_a_run_stopped_anywhere_goes_on_at_its_place_with_any_number_of_ranks(server, local):
    recipe = recipe_at(server.url)
    for stop in (1, 4):
        assert_same(seen(batches(recipe, last_step=stop)) + seen(batches(recipe, first_step=stop)), local)
    ranks = [seen(batches(recipe, rank=rank, world_size=2)) for rank in range(2)]
    assert_same([batch for both in zip(*ranks) for batch in both], local)


def test_crops_of_a_tokenizers_training_are_those_of_a_disk(sets, server):
    found = []
    for root in (sets, server.url):
        recipe = recipe_at(root)
        images = ImageSet(data_path(recipe.data, recipe.data.images))
        order = SampleOrder(images.shards.shard_sizes, 0, 2)
        positions = rank_positions(recipe.run, 0, 1, first_step=0, last_step=3)
        found.append(
            [batch.images_11.clone() for batch in crop_batches(images, order, positions, recipe, torch.device("cpu"))]
        )
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_neighbours_are_one_request_and_requests_are_bounded(server):
    spans = [Span(512, 100, 0), Span(1024, 100, 0), Span(1024 + GAP_BYTES * 2, 5, 0)]
    assert [(start, size) for start, size, _ in joined(spans)] == [(512, 612), (1024 + GAP_BYTES * 2, 5)]
    far = [Span(place * GAP_BYTES, GAP_BYTES, 0) for place in range(200)]
    assert all(size <= REQUEST_BYTES for _, size, _ in joined(far))
    recipe = recipe_at(server.url)
    server.forget()
    seen(batches(recipe, last_step=3))
    # an epoch of 24 samples: of each window of two small shards everything is near
    assert server.requests < 2 * 24


def test_a_staged_set_is_on_the_disk_before_the_first_step(server, local, tmp_path, monkeypatch):
    monkeypatch.setenv("PECO_STAGE_DIR", str(tmp_path / "stage"))
    recipe = recipe_at(server.url)
    images, tokens = open_sets(recipe)
    check_shared(World(0, 1, torch.device("cpu")), images.shards, tokens.shards)
    server.forget()
    server.fault = lambda handler: ".tar" in handler.path and (handler.answer(503) or True)
    assert_same(seen(batches(recipe)), local)


# --------------------------------------------------------------------------------------------- faults


def test_one_request_in_a_hundred_failing_changes_nothing(server, local, caplog):
    count = 0

    def fault(handler) -> bool:
        nonlocal count
        count += 1
        if count % 5 == 3:
            kind = count % 4
            if kind == 0:
                handler.answer(503)
            elif kind == 1:
                handler.answer(403)
            elif kind == 2:
                handler.answer(206, b"x" * 1000, {"Content-Range": "bytes 0-999/5000"}, cut=300)
            else:
                handler.close_connection = True
            return True
        return False

    server.fault = fault
    assert_same(seen(batches(recipe_at(server.url, "data.store_retry_s=60"))), local)
    assert "asked again in" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_stays_away_ends_the_run_for_a_later_start(server, workers):
    found = batches(recipe_at(server.url, f"data.num_workers={workers}"))
    next(found)
    server.fault = lambda handler: handler.answer(503) or True
    with pytest.raises(StoreFault, match=r"127.0.0.1.*: 503 .*, for 0.5 s; start again when the store answers"):
        list(found)


def test_a_server_that_comes_back_in_mid_epoch_changes_nothing(server, local):
    found = batches(recipe_at(server.url, "data.store_retry_s=60"))
    start = seen([next(found)])
    server.stop()
    back = threading.Timer(0.5, server.start)
    back.start()
    assert_same(start + seen(found), local)
    back.join()


def test_a_shard_that_was_replaced_gives_no_image_of_the_other(server):
    tar = server.folder / "images" / "train" / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    for place in range(600, len(data) - 2000, 64):
        data[place] ^= 1
    found = batches(recipe_at(server.url))
    next(found)
    tar.write_bytes(data)
    with pytest.raises(StoreFault, match="shard-000001.tar: .*CRC-32 differs"):
        list(found)


def test_a_shard_of_another_size_is_named_at_the_start(server):
    tar = server.folder / "images" / "train" / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    images, _ = open_sets(recipe_at(server.url))
    with pytest.raises(UserError, match="shard-000001.tar: shard is cut short"):
        images.shards.check("size")


def test_an_index_of_another_shard_is_refused(server):
    folder = server.folder / "images" / "train"
    shutil.copy(folder / "shard-000000.index.json", folder / "shard-000001.index.json")
    with pytest.raises(UserError, match="shard-000001.index.json: is not the index its manifest names"):
        list(batches(recipe_at(server.url)))


def test_a_server_without_ranges_is_named(server):
    def whole(handler) -> bool:
        handler.headers.replace_header("Range", "none") if "Range" in handler.headers else None
        return False

    server.fault = whole
    images, _ = open_sets(recipe_at(server.url))
    with pytest.raises(UserError, match="the server has no ranges"):
        images.shards.check("size")
    with pytest.raises(UserError, match="the server has no ranges"):
        images.decode(0)


def test_a_redirect_to_a_file_of_the_machine_is_not_followed(server, tmp_path):
    (tmp_path / "secret").write_text("{}")
    server.fault = lambda handler: bool(handler.answer(302, b"", {"Location": f"file://{tmp_path}/secret"})) or True
    with pytest.raises(UserError, match="leads to what is no web address"):
        open_sets(recipe_at(server.url))


# ---------------------------------------------------------------------------------------- the cache


def test_a_damaged_cache_is_mended_and_gives_no_wrong_byte(server, local, tmp_path):
    recipe = recipe_at(server.url, f"data.cache={tmp_path}/cache")
    assert_same(seen(batches(recipe)), local)
    for path in (tmp_path / "cache").rglob("*.ranges"):
        data = bytearray(path.read_bytes())
        data[700:] = bytes(len(data) - 700)
        path.write_bytes(data)
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_bytes(b"{}")
    assert_same(seen(batches(recipe)), local)


def test_the_cache_keeps_its_bound_and_touches_nothing_else(server, local, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "mine.tar").write_bytes(bytes(1 << 20))
    recipe = recipe_at(server.url, f"data.cache={cache}", "data.cache_gib=0.00005")
    assert_same(seen(batches(recipe, last_step=6)), local)
    kept = sum(path.stat().st_blocks * 512 for path in cache.rglob("*") if path.name != "mine.tar" and path.is_file())
    assert kept < 3 * 0.00005 * (1 << 30)
    assert (cache / "mine.tar").stat().st_size == 1 << 20


def test_a_cache_that_cannot_be_written_is_named_at_the_start(sets, tmp_path):
    from peco_ds.data.range_cache import check_cache
    from peco_ds.data_paths import access_of

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.cache .*file: is a file|data.cache .*is a file; give a folder"):
        check_cache(access_of(recipe_at(sets, f"data.cache={tmp_path}/file").data))


# ------------------------------------------------------------------------------- addresses and secrets


def test_no_credential_reaches_settings_texts_or_errors(server, monkeypatch, caplog):
    monkeypatch.setenv("SECRET", "X-Amz-Signature=hushhush")
    recipe = recipe_at(server.url, f"data.images={server.url}/images/train?$SECRET")
    images = ImageSet(data_path(recipe.data, recipe.data.images))
    assert images.num_samples == SHARDS * SAMPLES
    images.decode(0)
    server.stop()
    with pytest.raises(StoreFault) as caught:
        images.decode(20)
    server.start()
    texts = [str(caught.value), repr(images.folder), str(images.facts()), str(recipe), caplog.text]
    assert not any("hushhush" in text for text in texts)
    assert "?***" in str(images.folder)


@pytest.mark.parametrize(
    "address", ["http://me:hushhush@host/set", "https://host/set?sig=hushhush", "s3://k:hush/hush@b/c"]
)
def test_a_recipe_that_holds_a_credential_is_refused_without_showing_it(address):
    with pytest.raises(UserError, match=r"data.images .*\*\*\*.*\$VARIABLE") as caught:
        recipe_at("data", f"data.images={address}")
    assert "hush" not in str(caught.value)


def test_a_password_is_sent_to_the_server_and_shown_nowhere(server, monkeypatch):
    monkeypatch.setenv("LOGIN", "me:hushhush")
    root = server.url.replace("://", "://$LOGIN@")
    images, _ = open_sets(recipe_at(root))
    assert any(headers.get("Authorization", "").startswith("Basic") for headers in server.headers_seen)
    assert "hushhush" not in str(images.folder) and "***@" in str(images.folder)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://bucket/../other", r"'\.\.'"),
        ("s3://", "names no place"),
        ("simplecache::s3://bucket/a", "chains of stores"),
        ("s3://bucket/a::file:///etc/passwd", "chains of stores"),
        ("nosuch://bucket/a", "nosuch"),
    ],
)
def test_an_address_that_leads_nowhere_is_named(address, words):
    recipe = recipe_at("data", f"data.images={address}")
    with pytest.raises(UserError, match=words):
        ImageSet(data_path(recipe.data, recipe.data.images))


@pytest.mark.parametrize("path", ["/etc/passwd", "file:///etc/passwd"])
def test_a_manifest_of_a_store_names_no_file_of_this_machine(server, path):
    file = server.folder / "images" / "train" / "manifest.json"
    text = file.read_text().replace('"path": ""', f'"path": "{path}"', 1)
    file.write_text(text)
    with pytest.raises(UserError, match="file of this machine"):
        images = ImageSet(data_path(recipe_at(server.url).data, "images/train"))
        images.shards.check("size")


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    import sys

    from fsspec.core import get_filesystem_class

    monkeypatch.setitem(sys.modules, "s3fs", None)
    # What other tests have imported.
    monkeypatch.delitem(sys.modules[get_filesystem_class.__module__]._registry, "s3", raising=False)
    with pytest.raises(UserError, match=r"s3:// needs s3fs; pip install 'peco_ds\[s3\]'"):
        ImageSet(data_path(recipe_at("s3://bucket").data, "images/train"))


def test_results_and_weights_at_a_url_are_refused_in_one_line():
    from peco_ds import pretrain

    with pytest.raises(UserError, match="is a URL, where a path of this machine is needed"):
        pretrain.main(["--out", "s3://bucket/run", "--dry_run"])
    assert not Path("s3:").exists() and "s3:" not in os.listdir(".")


def test_read_manifest_of_a_folder_without_one(server):
    with pytest.raises(UserError, match="no manifest.json of images shards there"):
        read_manifest(data_path(recipe_at(server.url).data, "elsewhere"), ImageManifest)


# ------------------------------------------------------------------------------------------- releases


@pytest.fixture
def release(server) -> Path:
    """A small classifier's release, on the server."""
    import beit_samples

    from peco_ds.convert.release import write_release
    from peco_ds.convert.to_timm import to_timm

    weights = beit_samples.sample("classifier")
    write_release(server.folder / "release", to_timm(weights), weights)
    return server.folder / "release"


@pytest.mark.parametrize("name", ["release", "release/model.safetensors"])
def test_weights_of_a_store_are_those_of_the_disk_and_name_their_address(server, release, name, monkeypatch):
    from peco_ds.convert.read import read_weights

    monkeypatch.setenv("LOGIN", "me:hushhush")
    here, there = read_weights(release.parent / name), read_weights(f"{server.url}/{name}".replace("://", "://$LOGIN@"))
    assert here.tensors.keys() == there.tensors.keys() and here.model == there.model
    assert all(torch.equal(tensor, there.tensors[key]) for key, tensor in here.tensors.items())
    assert there.source.endswith(name) and "://" in there.source and "hushhush" not in there.source + str(there.facts)


def test_a_release_in_a_bucket_is_listed_and_a_missing_one_named(server, release):
    from peco_ds.convert.read import read_weights

    with s3_server("bucket") as url:
        for path in release.iterdir():
            (parse_url(f"{url}/models/release") / path.name).upload(path)
        assert read_weights(f"{url}/models/release").num_classes == read_weights(release).num_classes
        with pytest.raises(UserError, match="models/nowhere: no weights and no release there"):
            read_weights(f"{url}/models/nowhere")
    with pytest.raises(UserError, match="no weights and no release there"):
        read_weights(f"{server.url}/elsewhere/model.pth")


# ------------------------------------------------------------------------ staging, and tars elsewhere


def check_alone(*sets) -> None:
    check_shared(World(0, 1, torch.device("cpu")), *(opened.shards for opened in sets))


def test_staging_that_was_cut_off_goes_on_with_the_shards_that_are_missing(server, local, tmp_path, monkeypatch):
    monkeypatch.setenv("PECO_STAGE_DIR", str(tmp_path / "stage"))
    recipe = recipe_at(server.url)
    images, tokens = open_sets(recipe)
    images.shards.stage(1)
    (tmp_path / "stage" / "peco_ds_cache" / ".tmp-left-by-a-kill").write_bytes(b"half")
    server.forget()
    check_alone(images, tokens)
    whole = sum(path.stat().st_size for path in server.folder.rglob("*.tar"))
    assert whole - images.manifest.shards[1].bytes <= server.bytes < whole
    assert len(list((tmp_path / "stage").rglob("*.tar"))) == 2 * SHARDS
    server.forget()
    check_alone(images, tokens)
    assert server.bytes < images.manifest.shards[1].bytes, "a set that is there is not brought again"


def test_ranks_of_a_node_bring_no_shard_twice(server, tmp_path, monkeypatch):
    monkeypatch.setenv("PECO_STAGE_DIR", str(tmp_path / "stage"))
    recipe = recipe_at(server.url)
    ranks = [open_sets(recipe)[0] for _ in range(3)]
    server.forget()
    threads = [threading.Thread(target=lambda one=one: [one.shards.stage(n) for n in range(SHARDS)]) for one in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = sum(path.stat().st_size for path in (server.folder / "images").rglob("*.tar"))
    assert whole <= server.bytes < whole + 64_000


def test_a_full_disk_under_the_staging_is_one_line(server, tmp_path, monkeypatch):
    monkeypatch.setenv("PECO_STAGE_DIR", str(tmp_path / "stage"))
    images, _ = open_sets(recipe_at(server.url))

    def full(*_args):
        raise OSError(28, "No space left on device", str(tmp_path / "stage"))

    monkeypatch.setattr("peco_ds.data.remote_tar.RemoteTar._download", full)
    with pytest.raises(UserError, match="stage: No space left on device"):
        check_alone(images)


def test_tars_of_a_store_under_a_set_of_the_disk_are_cached_and_staged_too(server, tmp_path, monkeypatch):
    index = tmp_path / "index"
    source = f"{server.url}/images/train/shard-{{000000..000002}}.tar"
    pack_images.main(["--index_tars", source, "--out", str(index), "--workers", "1"])
    monkeypatch.setenv("PECO_STAGE_DIR", str(tmp_path / "stage"))
    recipe = recipe_at(tmp_path, "data.images=index")
    images = ImageSet(data_path(recipe.data, recipe.data.images))
    check_alone(images)
    assert len(list((tmp_path / "stage").rglob("*.tar"))) == SHARDS
    server.stop()
    assert images.decode(SHARDS * SAMPLES - 1)[0] == "2/0007"
    server.start()
    server.fault = lambda handler: handler.answer(503) or True
    monkeypatch.delenv("PECO_STAGE_DIR")
    images = ImageSet(data_path(recipe.data, recipe.data.images))
    with pytest.raises(StoreFault, match="for 0.5 s"):
        images.decode(0)


@pytest.mark.parametrize("answer", [503, 403, 0])
def test_a_server_that_fails_at_the_start_is_a_fault_and_no_missing_file(server, answer):
    recipe = recipe_at(server.url)
    images, _ = open_sets(recipe)

    def fault(handler) -> bool:
        if answer:
            handler.answer(answer)
        handler.close_connection = True
        return True

    server.fault = fault
    with pytest.raises(StoreFault):
        check_alone(images)
    with pytest.raises(StoreFault):
        open_sets(recipe)
    with pytest.raises(StoreFault):
        (data_path(recipe.data, "images/train") / "manifest.json").is_file()


def test_a_cache_that_fills_up_costs_time_and_no_run(server, local, tmp_path, monkeypatch, caplog):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peco_ds.data.remote_tar.os.pwrite", full)
    assert_same(seen(batches(recipe_at(server.url, f"data.cache={tmp_path}/cache"))), local)
    assert "No space left on device; what is read is not kept" in caplog.text


def test_a_read_only_cache_is_named_at_the_start(server, tmp_path, monkeypatch):
    images, _ = open_sets(recipe_at(server.url, f"data.cache={tmp_path}/cache"))

    def read_only(self, *_args, **_options):
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr("peco_ds.data.range_cache.RangeCache.__init__", read_only)
    with pytest.raises(UserError, match="data.cache .*Read-only file system; give a folder that can be written"):
        check_alone(images)
