"""Image sets packed into a store, and tars of a store indexed where they lie."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from store_servers import s3_server

from benchmarks.web_server import WebServer
from peco_ds import pack_images
from peco_ds.data import remote_tar, store_writer
from peco_ds.data.image_set import ImageSet
from peco_ds.data.indexed_tar import build_index
from peco_ds.data.remote_tar import ForwardReader
from peco_ds.data.store_token_parts import token_parts_at
from peco_ds.data.token_shards import TokenRecord
from peco_ds.errors import UserError
from peco_ds.remote_paths import parse_url
from peco_ds.schema import ImageManifest, ViewRecipe, read_manifest


def png(path: Path, seed: int) -> bytes:
    draw = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        png(folder / "ab"[number % 2] / f"{number}.png", number)
    return folder


def pack(photos: Path, out: object) -> None:
    arguments = f"--images {photos} --out {out} --samples_per_shard 5 --workers 1"
    pack_images.main(arguments.split())


@pytest.fixture(scope="module")
def s3():
    with s3_server("bucket") as url:
        yield url


def test_a_set_packed_into_a_store_is_the_one_of_a_folder(photos, s3, tmp_path):
    pack(photos, tmp_path / "set")
    pack(photos, f"{s3}/set")
    here, there = ImageSet(tmp_path / "set"), ImageSet(parse_url(f"{s3}/set"))
    assert here.manifest == there.manifest
    there.shards.check("all")
    assert all(here.key(number) == there.key(number) for number in range(12))
    assert all((here.decode(number)[1] == there.decode(number)[1]).all() for number in range(12))


def test_an_interrupted_packing_goes_on_and_has_no_manifest_before_its_end(photos, s3, monkeypatch):
    out, made, make = parse_url(f"{s3}/interrupted"), [], store_writer.make_shard

    def make_or_stop(folder, job, count_one):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(job.name)
        return make(folder, job, count_one)

    monkeypatch.setattr(store_writer, "make_shard", make_or_stop)
    with pytest.raises(KeyboardInterrupt):
        pack(photos, out)
    assert not (out / "manifest.json").is_file()
    monkeypatch.setattr(store_writer, "make_shard", lambda *args: made.append(args[1].name) or make(*args))
    pack(photos, out)
    assert sorted(made) == sorted({*made}), "the finished shard is not made again"
    assert ImageSet(out).num_samples == 12


def test_what_is_not_ours_in_a_store_is_not_replaced(photos, s3):
    out = parse_url(f"{s3}/foreign")
    (out / "shard-000001.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match="shard-000001.tar: stands there already"):
        pack(photos, out)
    assert (out / "shard-000001.tar").read_bytes() == b"mine"
    pack(photos, f"{s3}/other")
    with pytest.raises(UserError, match="already holds a finished set .*shuffle_seed"):
        pack_images.main(f"--images {photos} --out {s3}/other --samples_per_shard 5 --shuffle_seed 3".split())


def test_a_web_server_takes_no_set(photos, tmp_path):
    server = WebServer(tmp_path)
    with pytest.raises(UserError, match="a web server takes no files"):
        pack(photos, f"{server.url}/set")
    server.stop()


# ------------------------------------------------------------------------------------ indexing in place


@pytest.fixture
def tars(tmp_path) -> WebServer:
    """Two tars as img2dataset leaves them: keys with dots' rests, .json and .txt beside images, labels."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"{number:05d}.tar"), encoder=False) as writer:
            for sample in range(3):
                image = png(tmp_path / "x.png", 10 * number + sample)
                entry = {"png": image, "json": b"{}", "txt": b"a", "cls": str(sample % 2).encode()}
                writer.write({"__key__": f"{number:05d}{sample:04d}", **entry})
        with tarfile.open(folder / f"{number:05d}.tar", "a") as tar:
            info = tarfile.TarInfo("README")
            info.size = 0
            tar.addfile(info)
    server = WebServer(folder)
    yield server
    server.stop()


def test_tars_of_a_web_server_are_indexed_in_one_pass_as_those_of_a_disk(tars, tmp_path):
    source = tars.url + "/{00000..00001}.tar"
    pack_images.main(["--index_tars", source, "--out", str(tmp_path / "index"), "--workers", "1"])
    size = sum(path.stat().st_size for path in tars.folder.glob("*.tar"))
    assert tars.bytes == size
    pack_images.main(["--index_tars", str(tars.folder), "--out", str(tmp_path / "here"), "--workers", "1"])
    for name in ("00000.index.json", "00001.index.json"):
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    here, there = (read_manifest(tmp_path / name, ImageManifest) for name in ("here", "index"))
    assert here.fingerprint() == there.fingerprint() and here.left_out == there.left_out
    images = ImageSet(tmp_path / "index")
    assert [images.label(number) for number in range(6)] == [0, 1, 0, 0, 1, 0]
    assert images.decode(4)[0] == "000010001"
    tars.forget()
    pack_images.main(["--index_tars", source, "--out", str(tmp_path / "index"), "--workers", "1"])
    assert tars.bytes == 0, "a finished tar is not read again"


def test_a_tar_that_was_replaced_since_is_named_at_the_start(tars, tmp_path):
    out = tmp_path / "index"
    pack_images.main(["--index_tars", tars.url + "/{00000..00001}.tar", "--out", str(out), "--workers", "1"])
    other = (tars.folder / "00001.tar").read_bytes()
    (tars.folder / "00000.tar").write_bytes(other)
    with pytest.raises(UserError, match="00000.tar: (changed since the set was made|shard is)"):
        ImageSet(out).shards.check("size")


def test_an_index_made_from_small_chunks_is_the_same(tars, monkeypatch):
    monkeypatch.setattr(remote_tar, "REQUEST_BYTES", 777)
    tar = parse_url(f"{tars.url}/00000.tar")
    stream = ForwardReader(tar, tar.status().st_size)
    assert build_index(tar, [], stream=stream) == build_index(tars.folder / "00000.tar", [])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{url}/", "web servers list nothing"),
        ("{url}/missing.tar", "no such tar"),
        ("{url}/a.tar.gz", "web servers list nothing|compressed tar"),
        ("{url}/{{0..", "a brace has no partner"),
        ("http://me:hushhush@127.0.0.1:1/a.tar", r"\*\*\*@127.0.0.1:1/a.tar: the manifest would keep"),
    ],
)
def test_a_source_that_cannot_serve_is_named(tars, tmp_path, source, words):
    with pytest.raises(UserError, match=words) as caught:
        pack_images.main(["--index_tars", source.format(url=tars.url), "--out", str(tmp_path / "index")])
    assert "hushhush" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "absolute", "twice"])
def test_damaged_tars_of_a_store_are_refused_as_those_of_a_disk(tars, tmp_path, damage):
    path = tars.folder / "00000.tar"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1300])
    else:
        with tarfile.open(path, "a") as tar:
            tar.addfile(tarfile.TarInfo("/etc/x.png" if damage == "absolute" else "000000001.png"))
    words = []
    for source in (str(path), f"{tars.url}/00000.tar"):
        with pytest.raises(UserError) as caught:
            pack_images.main(["--index_tars", source, "--out", str(tmp_path / str(len(words))), "--workers", "1"])
        words.append(str(caught.value).partition("00000.tar: ")[2])
    assert words[0] == words[1] != ""


def test_tars_of_a_bucket_are_listed_and_indexed_into_the_bucket(s3, tars, tmp_path):
    for path in tars.folder.glob("*.tar"):
        (parse_url(f"{s3}/wds") / path.name).upload(path)
    (parse_url(f"{s3}/wds") / "notes.txt").write_bytes(b"hello")
    pack_images.main(["--index_tars", f"{s3}/wds", "--out", f"{s3}/wds_index", "--workers", "1"])
    images = ImageSet(parse_url(f"{s3}/wds_index"))
    images.shards.check("size")
    assert images.num_samples == 6 and images.manifest.left_out["no tar"] == 1
    assert json.loads((images.folder / "manifest.json").read_text())["shards"][0]["path"] == f"{s3}/wds/00000.tar"
    assert images.decode(5)[0] == "000010002"


# ---------------------------------------------------------------------------------------------- tokens


def test_a_token_set_in_a_store_is_made_shard_by_shard_and_goes_on(photos, s3, tmp_path):
    pack(photos, tmp_path / "set")
    images, place = ImageSet(tmp_path / "set"), parse_url(f"{s3}/tokens")
    made_of = dict(tokenizer_fingerprint="0" * 64, num_codes=64, grid=2, num_views=1, topk=0, topk_temperature=1.0)
    recorded = ViewRecipe(32, (0.1, 1.0), (0.75, 1.3), 0.5, 0.4, 0)

    def open_parts(where, **other):
        return token_parts_at(where, images.manifest, **{**made_of, "views": recorded, **other})

    def write(parts, number):
        first = sum(images.shards.shard_sizes[:number])
        view = np.array([[0, 0, 12, 12, 0, 1, 1, 1, 0]], dtype=np.float32)
        parts.write(
            number,
            (
                TokenRecord(images.key(first + place), np.full((1, 4), place, dtype=np.uint16), view)
                for place in range(images.shards.shard_sizes[number])
            ),
        )

    parts = open_parts(place)
    write(parts, 0)
    with pytest.raises(UserError, match=f"{s3}/tokens: 2 of 3 shards are not tokenized yet"):
        parts.finish()
    assert not (place / "manifest.json").is_file()
    parts, here = open_parts(place), open_parts(tmp_path / "tokens")
    assert [parts.is_done(number) for number in range(3)] == [True, False, False]
    assert parts.read_counts(0) == {"count": 0, "read": images.shards.shard_sizes[0]}
    for number in range(3):
        if not parts.is_done(number):
            write(parts, number)
        write(here, number)
    assert parts.finish() == here.finish()
    assert (place / "shard-000002.tar").read_bytes() == (tmp_path / "tokens" / "shard-000002.tar").read_bytes()
    with pytest.raises(UserError, match=f"{s3}/tokens: holds a finished token set with num_codes = 64"):
        open_parts(place, num_codes=128)
    (parse_url(f"{s3}/mine") / "shard-000000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match="mine/shard-000000.tar: stands there already"):
        open_parts(parse_url(f"{s3}/mine"))


def test_odd_members_of_a_tar_in_a_store_are_taken_as_those_of_a_disk(tars, tmp_path):
    """Folders with dots, keys that go on behind a dot, a sample without an image, one without a label, a link."""
    image = png(tmp_path / "odd.png", 7)
    with tarfile.open(tars.folder / "00000.tar", "w") as tar:
        for name, data in (
            ("v1.0/0001.png", image),
            ("v1.0/0001.cls", b"1"),
            ("v1.0/0002.seg.png", image),
            ("v1.0/0002.png", image),
            ("v1.0/0002.cls", b"0"),
            ("v1.0/0003.json", b"{}"),
            ("v1.0/0003.cls", b"0"),
            ("v1.0/0004.png", image),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("v1.0/0005.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    ends = []
    for number, source in enumerate((str(tars.folder / "00000.tar"), f"{tars.url}/00000.tar")):
        out = tmp_path / f"odd_{number}"
        try:
            pack_images.main(["--index_tars", source, "--out", str(out), "--workers", "1"])
            ends.append((out / "00000.index.json").read_bytes())
        except UserError as error:
            ends.append(str(error).partition("00000.tar: ")[2])
    assert ends[0] == ends[1] and ends[0]
    assert b"passwd" not in (ends[0] if isinstance(ends[0], bytes) else b"")
