"""A tar read by index gives the bytes that were packed, whatever happens to it is found and named."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from peco_ds.data.indexed_tar import DamagedRecord, IndexedTar, ShardSet, build_index, index_name, write_index
from peco_ds.errors import UserError
from peco_ds.schema import ImageManifest, Shard, sha256_of_file

IMAGES_A_SHARD = (3, 0, 5, 1, 4)  # an empty shard among them


def make_tar(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def tar_of_three(tmp_path, real_data) -> tuple[Path, Path, str, list[bytes]]:
    images = [path.read_bytes() for path in real_data.imagenet[:3]]
    path = tmp_path / "three.tar"
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for number, data in enumerate(images):
            writer.write({"__key__": f"image{number}", "jpg": data, "cls": str(number).encode()})
    index_path = tmp_path / index_name(path.name)
    samples, index_sha256 = write_index(path, index_path)
    assert samples == 3
    return path, index_path, index_sha256, images


@pytest.fixture
def shard_set(tmp_path, real_data) -> tuple[Path, ImageManifest, list[tuple[str, bytes]]]:
    images = [(path.stem, path.read_bytes()) for path in real_data.imagenet[: sum(IMAGES_A_SHARD)]]
    shards, remaining = [], iter(images)
    for number, count in enumerate(IMAGES_A_SHARD):
        path = make_tar(
            tmp_path / f"shard-{number:06d}.tar",
            [(f"{key}.jpg", data) for key, data in (next(remaining) for _ in range(count))],
        )
        samples, index_sha256 = write_index(path, tmp_path / index_name(path.name))
        shards.append(Shard(path.name, samples, path.stat().st_size, sha256_of_file(path), index_sha256))
    return tmp_path, ImageManifest(shards, len(images)), images


def test_every_member_comes_back_byte_for_byte_in_any_order(tar_of_three):
    path, index_path, index_sha256, images = tar_of_three
    tar = IndexedTar(path, index_path, index_sha256)
    assert len(tar) == 3
    for number in (2, 0, 1, 2):
        assert tar.key(number) == f"image{number}"
        assert tar.read(number) == {"jpg": images[number], "cls": str(number).encode()}
        assert tar.read(number, ["cls", "absent"]) == {"cls": str(number).encode()}


def test_keys_and_extensions_are_those_webdataset_gives(tmp_path):
    long_name = "a" * 140
    members = [
        ("plain.jpg", b"1"),
        ("plain.seg.PNG", b"2"),
        ("folder.v2/name.jpg", b"3"),
        ("folder.v2/name.cls", b"4"),
        ("überlänge/" + long_name + ".JPEG", b"5" * 1000),
        ("README", b"no dot, no sample"),
        ("empty.jpg", b""),
    ]
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = make_tar(tmp_path / "set.tar", members, tar_format)
        write_index(path, tmp_path / "set.index.json")
        tar = IndexedTar(path, tmp_path / "set.index.json")
        ours = [(tar.key(i), tar.read(i)) for i in range(len(tar))]
        theirs = []
        for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
            theirs.append(
                (sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")})
            )
        assert ours == theirs


def test_an_index_of_one_tar_is_the_same_every_time(tar_of_three, tmp_path):
    path, index_path, index_sha256, _ = tar_of_three
    assert write_index(path, tmp_path / "again.index.json") == (3, index_sha256)
    assert json.loads(index_path.read_text()) == build_index(path)


def test_a_flipped_byte_is_found_and_named(tar_of_three):
    path, index_path, index_sha256, images = tar_of_three
    offset = build_index(path)["samples"][1]["members"]["jpg"][0]
    with open(path, "r+b") as file:
        file.seek(offset + 1000)
        byte = file.read(1)
        file.seek(offset + 1000)
        file.write(bytes([byte[0] ^ 1]))
    tar = IndexedTar(path, index_path, index_sha256)
    assert tar.read(0)["jpg"] == images[0]
    with pytest.raises(DamagedRecord, match=r"three\.tar: key 'image1', member \.jpg"):
        tar.read(1)
    assert tar.read(1, ["cls"]) == {"cls": b"1"}


def test_a_tar_cut_while_it_is_read_is_a_damaged_record(tar_of_three):
    path, index_path, index_sha256, _ = tar_of_three
    tar = IndexedTar(path, index_path, index_sha256)
    os.truncate(path, build_index(path)["samples"][2]["members"]["jpg"][0] + 10)
    with pytest.raises(DamagedRecord, match="image2.*ends .* early"):
        tar.read(2)


def test_a_tar_or_index_that_is_not_the_indexed_one_is_refused(tar_of_three):
    path, index_path, index_sha256, _ = tar_of_three
    with pytest.raises(UserError, match="sha256 differs"):
        IndexedTar(path, index_path, "0" * 64)
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="bytes"):
        IndexedTar(path, index_path, index_sha256)
    index_path.write_text("[]")
    with pytest.raises(UserError, match="index"):
        IndexedTar(path, index_path)
    index_path.write_text('{"format')
    with pytest.raises(UserError, match="not JSON"):
        IndexedTar(path, index_path)
    index_path.unlink()
    with pytest.raises(UserError, match="no such index"):
        IndexedTar(path, index_path)


def test_a_tar_cut_at_any_place_is_not_indexed(tmp_path):
    path = make_tar(tmp_path / "cut.tar", [(f"k{number}.jpg", bytes([number]) * 900) for number in range(4)])
    whole = path.read_bytes()
    content = len(whole.rstrip(b"\0"))
    for length in [*range(0, content, 256), content]:  # member borders are multiples of 512
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.tar"):
            build_index(path)


def test_a_damaged_header_in_the_middle_does_not_end_the_list_in_silence(tmp_path):
    path = make_tar(tmp_path / "bad.tar", [(f"k{number}.jpg", b"data" * 100) for number in range(4)])
    content = bytearray(path.read_bytes())
    second_header = build_index(path)["samples"][1]["members"]["jpg"][0] - tarfile.BLOCKSIZE
    content[second_header + 20] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged header after sample 'k0'"):
        build_index(path)


@pytest.mark.parametrize(
    "names, reason",
    [
        (["a.jpg", "b.jpg", "a.cls"], "'a.cls': key 'a' comes back"),
        (["a.jpg", "a.JPG"], "two members .jpg"),
        (["/etc/a.jpg"], "'/etc/a.jpg' points outside"),
        (["x/../../a.jpg"], "points outside"),
    ],
)
def test_members_that_break_the_rules_are_named(tmp_path, names, reason):
    path = make_tar(tmp_path / "rules.tar", [(name, b"x") for name in names])
    with pytest.raises(UserError, match=rf"rules\.tar: member .*{reason}"):
        build_index(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused_and_folders_passed_over(tmp_path, kind):
    path = tmp_path / "special.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        member = tarfile.TarInfo("folder.d/a.jpg")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    assert [sample["key"] for sample in build_index(path)["samples"]] == ["folder.d/a"]
    with tarfile.open(path, "a") as tar:
        special = tarfile.TarInfo("b.jpg")
        special.type, special.linkname = kind, "folder.d/a.jpg"
        tar.addfile(special)
    with pytest.raises(UserError, match="'b.jpg' is a link, device"):
        build_index(path)


def test_a_compressed_tar_says_so(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(UserError, match="uncompressed"):
        build_index(path)


def _read_all(tar: IndexedTar, queue) -> None:
    queue.put([tar.read(i) for i in range(len(tar))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_reads_through_an_instance_already_in_use(tar_of_three, method):
    path, index_path, index_sha256, _ = tar_of_three
    tar = IndexedTar(path, index_path, index_sha256)
    expected = [tar.read(i) for i in range(3)]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_read_all, args=(tar, queue))
    process.start()
    assert queue.get(timeout=600) == expected
    process.join()
    assert tar.read(0) == expected[0]


def test_a_set_is_one_long_list_over_its_shards(shard_set):
    folder, manifest, images = shard_set
    shards = ShardSet(folder, manifest)
    assert shards.num_samples == len(images)
    assert shards.shard_sizes.dtype == np.int64 and shards.shard_sizes.tolist() == list(IMAGES_A_SHARD)
    expected_places = [(shard, index) for shard, count in enumerate(IMAGES_A_SHARD) for index in range(count)]
    assert [shards.locate(sample) for sample in range(len(images))] == expected_places
    for sample in np.random.default_rng(0).permutation(len(images)):
        key, members = shards.read(sample)
        assert (key, members["jpg"]) == images[sample]
        assert shards.key(sample) == key


def test_open_files_stay_bounded_and_a_pickled_set_reads_on(shard_set):
    folder, manifest, images = shard_set
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    shards = ShardSet(folder, manifest, max_open=2)
    for _ in range(2):
        for sample, (key, _) in enumerate(images):
            assert shards.read(sample)[0] == key
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    copy = pickle.loads(pickle.dumps(shards))
    assert [copy.read(sample)[0] for sample in range(len(images))] == [key for key, _ in images]


def test_a_hundred_thousand_shards_need_no_file_at_construction(tmp_path):
    shard = {"bytes": 1, "sha256": "0" * 64, "index_sha256": "0" * 64}
    manifest = ImageManifest([Shard(name=f"{number}.tar", samples=10, **shard) for number in range(100_000)], 1_000_000)
    shards = ShardSet(tmp_path / "nowhere", manifest)
    assert shards.locate(999_999) == (99_999, 9)
    assert shards.locate(10) == (1, 0)


def test_check_passes_a_sound_set_and_names_the_shard_that_is_not(shard_set):
    folder, manifest, _ = shard_set
    shards = ShardSet(folder, manifest)
    shards.check("size")
    shards.check("all")
    tar = folder / "shard-000002.tar"
    whole = tar.read_bytes()

    changed = bytearray(whole)
    changed[2000] ^= 1
    tar.write_bytes(changed)
    shards.check("size")
    shards.check_shards([0, 1, 3], "all")
    with pytest.raises(UserError, match=r"shard-000002\.tar: changed"):
        shards.check_shards([2], "all")

    tar.write_bytes(whole[:-1024])
    with pytest.raises(UserError, match=r"shard-000002\.tar: shard is cut short"):
        shards.check("size")
    tar.unlink()
    with pytest.raises(UserError, match=r"shard-000002\.tar: no such shard"):
        shards.check("size")
    with pytest.raises(UserError, match=r"shard-000002\.tar: no such tar"):
        shards.read(3)
    tar.write_bytes(whole)

    index = folder / "shard-000004.index.json"
    index.write_text(index.read_text().replace('"key"', '"Key"', 1))
    with pytest.raises(UserError, match=r"shard-000004\.index\.json: changed"):
        shards.check("all")
    index.unlink()
    with pytest.raises(UserError, match=r"shard-000004\.index\.json: no such index"):
        shards.check("size")


def test_a_shard_indexed_in_place_is_read_where_it_lies(tmp_path, real_data):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "set"
    elsewhere.mkdir()
    folder.mkdir()
    data = real_data.imagenet[0].read_bytes()
    tar = make_tar(elsewhere / "0000.tar", [("a.jpg", data)])
    samples, index_sha256 = write_index(tar, folder / "train_0000.index.json")
    shard = Shard("train_0000.tar", samples, tar.stat().st_size, sha256_of_file(tar), index_sha256, path=str(tar))
    shards = ShardSet(folder, ImageManifest([shard], 1))
    shards.check("all")
    assert shards.read(0) == ("a", {"jpg": data})


# --------------------------------------------------------------------------------------- nothing lost in silence


def test_a_tar_behind_another_is_refused_at_the_byte_where_it_begins(tmp_path):
    first = make_tar(tmp_path / "first.tar", [("a.jpg", b"1")])
    second = make_tar(tmp_path / "second.tar", [("b.jpg", b"2")])
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(UserError, match=f"after sample 'a', at byte 1024, and goes on at byte {first.stat().st_size}"):
        build_index(joined)
    # one zero block alone ends a tar for most readers
    content = first.read_bytes()[:1024]
    joined.write_bytes(content + bytes(tarfile.BLOCKSIZE) + second.read_bytes())
    with pytest.raises(UserError, match="goes on at byte 1536"):
        build_index(joined)
    joined.write_bytes(first.read_bytes() + bytes(3_000_000))
    assert len(build_index(joined)["samples"]) == 1


def test_members_of_no_sample_are_given_with_their_reasons(tmp_path):
    names = [
        "README",
        "a.jpg",
        "./b.jpg",
        "x/._a.jpg",
        "__MACOSX/a.jpg",
        "x/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
        ".ipynb_checkpoints/a.jpg",
        "x/Thumbs.db",
    ]
    path = make_tar(tmp_path / "a.tar", [(name, b"x") for name in names])
    left_out: list[tuple[str, str]] = []
    assert [sample["key"] for sample in build_index(path, left_out)["samples"]] == ["a", "./b"]
    assert dict(left_out) == {
        "README": "file without a dot in its name, so of no sample",
        "x/._a.jpg": "hidden",
        "__MACOSX/a.jpg": "in a folder of a system",
        "x/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg": "in a folder of a system",
        ".ipynb_checkpoints/a.jpg": "in a folder of a system",
        "x/Thumbs.db": "file of a system",
    }
