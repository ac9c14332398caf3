"""What lies in an image folder lies in its shards: the same images, the right labels, nothing lost in silence."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from killed import forked
from PIL import Image

from peco_ds import pack_images, progress_bar
from peco_ds.command_line import run
from peco_ds.data.decode import decode_rgb
from peco_ds.data.indexed_tar import ShardSet
from peco_ds.errors import EXIT_BAD_INPUT, EXIT_DONE, UserError
from peco_ds.pack_images import main
from peco_ds.schema import ImageManifest, read_manifest

NUM_IMAGES = 60
NUM_CLASSES = 6


def pack(*options) -> None:
    main([*map(str, options), *([] if "--workers" in options else ["--workers", "1"])])


def refusal(capsys, *options) -> str:
    """The one line a user reads."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(main, [*map(str, options)])
    said = capsys.readouterr()
    assert exit_.value.code == EXIT_BAD_INPUT and said.out == ""
    assert said.err.count("\n") == 1, said.err
    return said.err


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    shards = ShardSet(folder, read_manifest(folder, ImageManifest))
    shards.check("all")
    samples = dict(shards.read(sample) for sample in range(shards.num_samples))
    assert len(samples) == shards.num_samples
    return samples


def image_in(members: dict[str, bytes]) -> np.ndarray:
    (extension,) = set(members) - {"cls"}
    assert extension in ("jpg", "png", "webp")
    return decode_rgb(members[extension]).permute(1, 2, 0).numpy().astype(int)


@pytest.fixture(scope="module")
def tree(real_data, tmp_path_factory) -> Path:
    """60 real images in 6 class folders, in the layout of ILSVRC's training set."""
    root = tmp_path_factory.mktemp("ilsvrc") / "train"
    for number, path in enumerate(real_data.imagenet[:NUM_IMAGES]):
        folder = root / f"n{number % NUM_CLASSES:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"{folder.name}_{number}.JPEG")
    return root


@pytest.fixture
def flat(tree, tmp_path) -> tuple[Path, list[str]]:
    """The layout of ILSVRC's validation set, and the synset of each image in name order."""
    folder = tmp_path / "val"
    folder.mkdir()
    synsets = []
    for number, path in enumerate(sorted(tree.glob("*/*.JPEG"), key=lambda path: path.name[::-1])[:20]):
        shutil.copyfile(path, folder / f"ILSVRC2012_val_{number + 1:08d}.JPEG")
        synsets.append(path.parent.name)
    return folder, synsets


def labels_of(folder: Path) -> list[str]:
    """Class name of each sample, by key."""
    classes = read_manifest(folder, ImageManifest).classes
    return [classes[int(members["cls"])] for _, members in sorted(samples_of(folder).items())]


# --------------------------------------------------------------------------------------- class folders


def test_a_class_folder_tree_comes_back_byte_for_byte_with_its_labels(tree, tmp_path, capsys):
    pack("--images", tree, "--out", tmp_path, "--samples_per_shard", 16)
    manifest = read_manifest(tmp_path, ImageManifest)
    assert manifest.classes == sorted(path.name for path in tree.iterdir())
    assert manifest.rejected == [] and manifest.samples == NUM_IMAGES
    assert [shard.samples for shard in manifest.shards] == [16, 16, 16, 12]
    expected = {path.stem: (path.read_bytes(), path.parent.name) for path in tree.glob("*/*.JPEG")}
    found = {
        key: (members["jpg"], manifest.classes[int(members["cls"])]) for key, members in samples_of(tmp_path).items()
    }
    assert found == expected
    last_line = capsys.readouterr().out.splitlines()[-1]
    for part in (
        f"{NUM_IMAGES} samples",
        f"{NUM_CLASSES} classes",
        "4 shards",
        "0 rejected",
        str(tmp_path),
        str(sum(shard.bytes for shard in manifest.shards)),
    ):
        assert part in last_line


def test_webdataset_itself_reads_the_shards(tree, tmp_path):
    pack("--images", tree, "--out", tmp_path, "--samples_per_shard", 40)
    urls = sorted(str(path) for path in tmp_path.glob("*.tar"))
    read = {sample["__key__"]: sample["jpg"] for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    assert read == {path.stem: path.read_bytes() for path in tree.glob("*/*.JPEG")}


def test_every_shard_mixes_the_classes(tree, tmp_path):
    pack("--images", tree, "--out", tmp_path, "--samples_per_shard", 20)
    shards = ShardSet(tmp_path, read_manifest(tmp_path, ImageManifest))
    for number in range(3):
        shard = shards.open_shard(number)
        assert len({shard.read(i)["cls"] for i in range(len(shard))}) > NUM_CLASSES // 2


def test_packing_twice_gives_the_same_bytes_and_another_seed_another_order(tree, tmp_path):
    sets = {}
    for name, options in (
        ("once", ["--workers", "1"]),
        ("twice", ["--workers", "2"]),
        ("other", ["--shuffle_seed", "1"]),
    ):
        pack("--images", tree, "--out", tmp_path / name, "--samples_per_shard", 30, *options)
        sets[name] = read_manifest(tmp_path / name, ImageManifest)
    assert sets["once"].shards == sets["twice"].shards
    assert sets["once"].fingerprint() != sets["other"].fingerprint()
    assert samples_of(tmp_path / "once") == samples_of(tmp_path / "other")


def test_the_stage_starts_by_path_and_says_one_line(tree, tmp_path):
    script = Path(pack_images.__file__)
    command = [
        sys.executable,
        str(script),
        "--images",
        str(tree),
        "--out",
        str(tmp_path / "out"),
        "--samples_per_shard",
        "30",
        "--workers",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == EXIT_DONE, done.stderr
    assert len(done.stdout.splitlines()) == 1 and f"{NUM_IMAGES} samples" in done.stdout
    assert len(samples_of(tmp_path / "out")) == NUM_IMAGES


def test_dry_run_counts_and_writes_nothing(tree, tmp_path, capsys):
    pack("--images", tree, "--out", tmp_path / "out", "--samples_per_shard", 25, "--dry_run")
    assert f"{NUM_IMAGES} images into 3 shards" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(tree, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress_bar, "EVERY_S", 0.0)
    pack("--images", tree, "--out", tmp_path, "--samples_per_shard", 30)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(f" of {NUM_IMAGES} images, " in line and line.endswith("s left") for line in lines)


def test_short_side_and_quality_reach_the_stored_images(real_data, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    Image.open(real_data.kodak[0]).convert("RGB").save(source / "large.jpg", quality=95)
    num_bytes = []
    for quality in (90, 30):
        pack("--images", source, "--out", tmp_path / f"quality{quality}", "--short_side", 128, "--quality", quality)
        (members,) = samples_of(tmp_path / f"quality{quality}").values()
        assert min(image_in(members).shape[:2]) == 128
        num_bytes.append(len(members["jpg"]))
    assert num_bytes[1] < num_bytes[0]


# ---------------------------------------------------------------------------------------- bad images


def spoil(tree: Path, folder: Path) -> tuple[Path, set[str]]:
    source = folder / "spoilt"
    shutil.copytree(tree, source)
    first, second, third = sorted(source.glob("*/*.JPEG"))[:3]
    first.write_bytes(first.read_bytes()[:-300])
    second.write_bytes(b"")
    third.unlink()
    third.symlink_to(folder / "nowhere.JPEG")
    return source, {f"{path.parent.name}/{path.name}" for path in (first, second, third)}


def test_unreadable_images_are_named_and_left_out(tree, tmp_path, capsys):
    source, spoilt = spoil(tree, tmp_path)
    pack("--images", source, "--out", tmp_path / "out", "--max_bad_share", 0.05, "--samples_per_shard", 25)
    manifest = read_manifest(tmp_path / "out", ImageManifest)
    assert {line.split(": ")[0] for line in manifest.rejected} == spoilt
    assert all(line.split(": ", 1)[1] for line in manifest.rejected)
    assert set(samples_of(tmp_path / "out")) == {path.stem for path in tree.glob("*/*.JPEG")} - {
        Path(path).stem for path in spoilt
    }
    assert "3 rejected" in capsys.readouterr().out


def test_too_many_unreadable_images_are_an_error_and_leave_no_manifest(tree, tmp_path, capsys):
    source, spoilt = spoil(tree, tmp_path)
    options = ["--images", source, "--out", tmp_path / "out", "--workers", 1]
    line = refusal(capsys, *options)
    assert "3 of 60" in line and "--max_bad_share" in line and all(path in line for path in spoilt)
    assert not (tmp_path / "out" / "manifest.json").exists()
    before = (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns
    pack(*options, "--max_bad_share", 0.05)
    # what was packed is not packed again
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns == before


# ---------------------------------------------------------------------------------- nothing lost in silence


def test_what_is_left_out_is_told_in_the_summary_the_manifest_and_a_list(tree, tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(tree, source)
    image = next(tree.glob("*/*.JPEG"))
    for name in ("n00000000/plain", "n00000000/b.jpg_large", "n00000000/c.png"):
        shutil.copyfile(image, source / name)
    for name in ("@eaDir/x.jpg", "n00000001/@eaDir/x.jpg"):
        (source / name).parent.mkdir()
        shutil.copyfile(image, source / name)
    Image.open(image).resize((8, 8)).save(source / "n00000000" / "d.avif")
    (source / "n00000000" / "notes.txt").write_text("words")
    (source / ".DS_Store").write_bytes(b"x")
    pack("--images", source, "--out", out)
    manifest = read_manifest(out, ImageManifest)
    assert manifest.samples == NUM_IMAGES + 3 and len(manifest.classes) == NUM_CLASSES
    assert manifest.left_out == {
        "AVIF image, not decoded": 1,
        "folder of a system, with all in it": 2,
        "hidden": 1,
        "no image": 1,
    }
    assert manifest.remarks == {"of another format than the suffix says, taken by content": 3}
    last_line = capsys.readouterr().out.splitlines()[-1]
    for part in ("5 left out", "'n00000000/d.avif'", "'.DS_Store'", "3 remarks", "left_out.txt"):
        assert part in last_line
    assert (out / ".pack" / "left_out.txt").read_text().splitlines() == [
        "hidden\t.DS_Store",
        "folder of a system, with all in it\t@eaDir/",
        "AVIF image, not decoded\tn00000000/d.avif",
        "no image\tn00000000/notes.txt",
        "folder of a system, with all in it\tn00000001/@eaDir/",
    ]
    pack("--images", source, "--out", tmp_path / "dry", "--dry_run")
    assert "5 left out" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- judged again


def test_an_image_of_another_time_is_packed_again_though_its_size_is_the_same(tree, tmp_path, real_data):
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(tree, source)
    pack("--images", source, "--out", out)
    changed = sorted(source.glob("*/*.JPEG"))[7]
    pixels = np.asarray(Image.open(changed).convert("RGB"))
    Image.fromarray(pixels[::-1]).save(tmp_path / "other.jpg", quality=40)
    data = (tmp_path / "other.jpg").read_bytes()
    assert len(data) <= changed.stat().st_size
    # zeros behind the end mark change the size alone
    data += bytes(changed.stat().st_size - len(data))
    changed.write_bytes(data)
    pack("--images", source, "--out", out)
    assert samples_of(out)[changed.stem]["jpg"] == data


def test_a_repaired_image_of_the_same_size_is_judged_again(tree, tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(sorted(tree.iterdir())[0], source / "a")
    options = ["--images", source, "--out", out, "--workers", 1]
    victim = sorted(source.glob("*/*.JPEG"))[2]
    whole, times = victim.read_bytes(), victim.stat()
    victim.write_bytes(whole[:1000] + bytes(len(whole) - 1000))
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "1 of 10" in refusal(capsys, *options)
    victim.write_bytes(whole)
    # as cp --preserve or rsync leave it
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    pack(*options)
    assert read_manifest(out, ImageManifest).rejected == [] and len(samples_of(out)) == 10


def test_a_file_that_can_be_read_now_is_judged_again_and_one_that_cannot_is_not(tree, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(sorted(tree.iterdir())[0], source / "a")
    image = next(source.glob("*/*.JPEG"))
    (source / "a" / "x.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    options = ["--images", source, "--out", out, "--max_bad_share", 0.5]
    pack(*options)
    before = stamps(out)
    assert len(read_manifest(out, ImageManifest).rejected) == 1
    pack(*options)
    assert stamps(out) == before
    # the link itself, its size and its time, are as before
    shutil.copyfile(image, tmp_path / "elsewhere.jpg")
    pack(*options)
    assert read_manifest(out, ImageManifest).rejected == [] and len(samples_of(out)) == 11


def test_other_permissions_have_a_file_judged_again(tree, tmp_path):
    from peco_ds.data.image_shards import PackJob, prepare_folder

    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(sorted(tree.iterdir())[0], source / "a")
    (source / "a" / "x.jpg").write_bytes(b"no image")
    options = ["--images", source, "--out", out, "--max_bad_share", 0.5]
    pack(*options)
    plan = json.loads((out / ".pack" / "plan.json").read_text())
    args = pack_images._parse([*map(str, options)])

    def jobs_to_do() -> list[PackJob]:
        return prepare_folder(out, pack_images.plan_folder(args).jobs, plan)[1]

    assert jobs_to_do() == []
    (source / "a" / "x.jpg").chmod(0o600)
    assert [job.name for job in jobs_to_do()] == ["shard-000000.tar"]


def test_a_shard_that_was_written_to_after_its_record_is_made_again(tree, tmp_path):
    options = ["--images", tree, "--out", tmp_path, "--samples_per_shard", 30]
    pack(*options)
    expected = (tmp_path / "shard-000001.tar").read_bytes()
    spoilt = bytearray(expected)
    spoilt[5000] ^= 1
    (tmp_path / "shard-000001.tar").write_bytes(spoilt)
    later = (tmp_path / ".pack" / "shard-000001.tar.record.json").stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "shard-000001.tar", ns=(later, later))
    pack(*options)
    assert (tmp_path / "shard-000001.tar").read_bytes() == expected


# --------------------------------------------------------------------------------------------- restart


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}


def test_a_restart_rebuilds_what_is_missing_and_nothing_else(tree, tmp_path):
    options = ["--images", tree, "--out", tmp_path, "--samples_per_shard", 15]
    pack(*options)
    first, before = read_manifest(tmp_path, ImageManifest), stamps(tmp_path)
    (tmp_path / "shard-000001.tar").unlink()
    (tmp_path / "shard-000002.index.json").unlink()
    os.truncate(tmp_path / "shard-000003.tar", 5000)
    (tmp_path / ".shard-000001.tar.123.tmp").write_bytes(b"left by a killed run")
    pack(*options)
    after = stamps(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {
        f"shard-00000{number}.tar" for number in (1, 2, 3)
    }
    assert read_manifest(tmp_path, ImageManifest) == first
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_run_killed_at_any_moment_is_finished_by_the_next_byte_for_byte(tree, tmp_path):
    def contents(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")
            if path.is_file() and path.name != "lock"
        }

    source = tmp_path / "source"
    shutil.copytree(sorted(tree.iterdir())[0], source / "a")  # ten images
    options = ["--images", source, "--samples_per_shard", 4]
    pack(*options, "--out", tmp_path / "undisturbed")
    expected = contents(tmp_path / "undisturbed")
    drawn, kills = random.Random(0), 0
    for _ in range(40):
        status = forked(lambda: pack(*options, "--out", tmp_path / "killed"), kill_at=drawn.randint(1, 60))
        if status == 0:
            assert contents(tmp_path / "killed") == expected
            shutil.rmtree(tmp_path / "killed")
        else:
            assert os.WIFSIGNALED(status)
            kills += 1
    assert kills >= 20
    pack(*options, "--out", tmp_path / "killed")
    assert contents(tmp_path / "killed") == expected


def test_a_folder_that_another_run_is_packing_into_is_refused(tree, tmp_path, capsys):
    from peco_ds.data.image_shards import sole_writer

    options = ["--images", tree, "--out", tmp_path / "out", "--workers", 1]
    holder = os.fork()
    if not holder:
        with sole_writer(tmp_path / "out"):
            (tmp_path / "held").touch()
            time.sleep(3600)
        os._exit(0)
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        assert "another pack_images.py is at work" in refusal(capsys, *options)
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    pack(*options)


def test_workers_end_with_a_killed_run(tree, tmp_path):
    command = [
        sys.executable,
        str(Path(pack_images.__file__)),
        "--images",
        str(tree),
        "--out",
        str(tmp_path / "out"),
        "--samples_per_shard",
        "1",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list((tmp_path / "out").glob("*.tar")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("workers outlive the run they work for")


def test_a_changed_image_rebuilds_only_its_shard(tree, tmp_path, real_data):
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(tree, source)
    pack("--images", source, "--out", out, "--samples_per_shard", 15)
    before = stamps(out)
    changed = sorted(source.glob("*/*.JPEG"))[7]
    shutil.copyfile(real_data.imagenet[NUM_IMAGES], changed)
    pack("--images", source, "--out", out, "--samples_per_shard", 15)
    after = stamps(out)
    assert sum(after[name] != before[name] for name in after) == 1
    assert samples_of(out)[changed.stem]["jpg"] == changed.read_bytes()


def test_an_unfinished_set_is_made_anew_with_other_options_and_a_finished_one_is_not(tree, tmp_path, capsys):
    options = ["--images", tree, "--out", tmp_path, "--workers", 1]
    pack(*options, "--samples_per_shard", 10)
    line = refusal(capsys, *options, "--samples_per_shard", 30)
    assert "samples_per_shard was '10', is '30'" in line
    assert len(read_manifest(tmp_path, ImageManifest).shards) == 6
    (tmp_path / "manifest.json").unlink()
    pack(*options, "--samples_per_shard", 30)
    # none of the old ones is left to mislead
    assert sorted(stamps(tmp_path)) == ["shard-000000.tar", "shard-000001.tar"]
    assert len(samples_of(tmp_path)) == NUM_IMAGES


def test_tars_of_unknown_origin_are_not_overwritten(tree, tmp_path, capsys):
    (tmp_path / "shard-000000.tar").write_bytes(b"somebody's work")
    assert "was not made by pack_images.py" in refusal(capsys, "--images", tree, "--out", tmp_path, "--workers", 1)
    assert (tmp_path / "shard-000000.tar").read_bytes() == b"somebody's work"


# ------------------------------------------------------------------------- flat and unlabelled folders


def test_a_flat_folder_takes_its_labels_from_any_form_in_which_ilsvrc_has_them(flat, tmp_path):
    folder, synsets = flat
    names = sorted(path.stem for path in folder.iterdir())
    sorted_synsets = sorted(set(synsets))
    devkit_order = sorted_synsets[::-1]
    (tmp_path / "devkit.txt").write_text("\n".join(f"{synset} some words" for synset in devkit_order))
    (tmp_path / "mapping.txt").write_text("\n".join(f"{synset} some words" for synset in sorted_synsets))
    # the lists that name images come in any order
    backwards = list(zip(names, synsets))[::-1]
    forms = {
        "lines": ("\n".join(synsets), None),
        "kaggle": (
            "ImageId,PredictionString\n"
            + "\n".join(f"{name},{synset} 85 1 499 272 {synset} 1 2 3 4 " for name, synset in backwards),
            None,
        ),
        "caffe": (
            "\n".join(f"{name}.JPEG {sorted_synsets.index(synset)}" for name, synset in backwards),
            "mapping.txt",
        ),
        "devkit": ("\n".join(str(devkit_order.index(synset) + 1) for synset in synsets), "devkit.txt"),
    }
    for form, (text, classes) in forms.items():
        (tmp_path / f"{form}.list").write_text(text + "\n")
        extra = ["--classes", tmp_path / classes] if classes else []
        pack("--images", folder, "--synsets", tmp_path / f"{form}.list", "--out", tmp_path / form, *extra)
        assert labels_of(tmp_path / form) == synsets, form
        assert read_manifest(tmp_path / form, ImageManifest).classes == sorted_synsets, form


def test_unlabelled_images_at_any_depth_have_no_labels(tree, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(tree, source / "deep" / "deeper")
    shutil.copyfile(next(tree.glob("*/*.JPEG")), source / "on top.jpg")
    (source / "README.txt").write_text("no image")
    (source / ".thumb.jpg").write_bytes(b"no image either")
    pack("--images", source, "--out", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out", ImageManifest)
    assert manifest.classes is None and manifest.samples == NUM_IMAGES + 1 and manifest.rejected == []
    assert all(set(members) == {"jpg"} for members in samples_of(tmp_path / "out").values())


def test_labels_none_ignores_class_folders(tree, tmp_path):
    pack("--images", tree, "--out", tmp_path, "--labels", "none")
    assert read_manifest(tmp_path, ImageManifest).classes is None


def test_odd_file_names_and_equal_names_get_keys_of_their_own(real_data, tmp_path):
    source = tmp_path / "in"
    names = [
        "a/0001.jpg",
        "b/0001.jpg",
        "b/0001.jpeg",
        "a/b.c.d.jpg",
        "a/with space und Ümlaut.jpg",
        "a/-rf.jpg",
        "a/new\nline.jpg",
        "a/" + "x" * 200 + ".jpg",
    ]
    encoded = [os.fsencode(source / name) for name in names] + [os.fsencode(source) + b"/a/latin\xe9.jpg"]
    for path, image in zip(encoded, real_data.imagenet):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        shutil.copyfile(image, path)
    pack("--images", source, "--out", tmp_path / "out")
    samples = samples_of(tmp_path / "out")
    assert sorted(members["jpg"] for members in samples.values()) == sorted(
        path.read_bytes() for path in real_data.imagenet[: len(encoded)]
    )
    assert {"a_0001", "b_c_d", "with space und Ümlaut", "new_line", "x" * 200} <= set(samples)
    urls = [str(path) for path in (tmp_path / "out").glob("*.tar")]
    assert {sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False)} == set(samples)


# ----------------------------------------------------------------------------- tars that exist already


@pytest.fixture
def tars(tree, tmp_path) -> Path:
    """The layout of timm/imagenet-1k-wds: jpg, json and cls a sample."""
    folder = tmp_path / "wds"
    folder.mkdir()
    images = sorted(tree.glob("*/*.JPEG"))
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"imagenet1k-train-{number:04d}.tar")) as writer:
            for path in images[number * 10 : number * 10 + 10]:
                label = int(path.parent.name[1:])
                writer.write(
                    {
                        "__key__": path.stem,
                        "jpg": path.read_bytes(),
                        "json": {"label": label, "filename": path.name},
                        "cls": label,
                    }
                )
    return folder


def test_tars_are_indexed_where_they_lie_and_not_touched(tars, tree, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in tars.iterdir()}
    pack("--index_tars", tars, "--out", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in tars.iterdir()} == before
    manifest = read_manifest(tmp_path / "out", ImageManifest)
    assert [shard.name for shard in manifest.shards] == sorted(before) and manifest.samples == 20
    originals = {path.stem: path for path in tree.glob("*/*.JPEG")}
    for key, members in samples_of(tmp_path / "out").items():
        assert members["jpg"] == originals[key].read_bytes()
        assert manifest.classes[int(members["cls"])] == str(int(originals[key].parent.name[1:]))
        assert json.loads(members["json"])["filename"] == originals[key].name
    assert "20 samples" in capsys.readouterr().out


def test_a_restart_indexes_only_the_tar_that_changed(tars, tmp_path):
    out = tmp_path / "out"
    options = ["--index_tars", tars / "*.tar", "--out", out]
    pack(*options)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.index.json")}
    shutil.copyfile(tars / "imagenet1k-train-0000.tar", tars / "imagenet1k-train-0001.tar")
    pack(*options)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.index.json")}
    assert [name for name in after if after[name] != before[name]] == ["imagenet1k-train-0001.index.json"]
    samples = [shard.sha256 for shard in read_manifest(out, ImageManifest).shards]
    assert samples[0] == samples[1]


def test_class_names_of_tars_come_from_a_file(tars, tmp_path, capsys):
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(f"class{number} words" for number in range(10)))
    pack("--index_tars", tars, "--classes", names, "--out", tmp_path / "out")
    assert read_manifest(tmp_path / "out", ImageManifest).classes == [f"class{number} words" for number in range(10)]
    names.write_text("only\n")
    assert "1 classes, but" in refusal(
        capsys, "--index_tars", tars, "--classes", names, "--out", tmp_path / "out2", "--workers", 1
    )


def test_tars_of_one_name_in_two_folders_become_two_shards(tars, tmp_path):
    other = tmp_path / "more" / "wds"
    shutil.copytree(tars, other)
    pack("--index_tars", tmp_path / "**" / "wds" / "*.tar", "--out", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out", ImageManifest)
    assert manifest.samples == 40 and len({shard.name for shard in manifest.shards}) == 4
    ShardSet(tmp_path / "out", manifest).check("all")


def test_tars_that_cannot_serve_are_refused_by_name(tars, tree, tmp_path, capsys):
    options = ["--index_tars", tars, "--out", tmp_path / "out", "--workers", 1]
    last = tars / "imagenet1k-train-0001.tar"
    whole = last.read_bytes()
    last.write_bytes(whole[:100_000])
    assert last.name in refusal(capsys, *options)
    image = next(tree.glob("*/*.JPEG")).read_bytes()
    for extra, reason in (
        ({"txt": "caption"}, "has no image"),
        ({"jpg": b"x", "cls": "cat"}, "not a class number"),
        ({"jpg": b"x", "cls": "1"}, "1 of 11 images cannot be decoded"),
        ({"jpg": image}, "labelled"),
        ({"jpg": image, "cls": "999999"}, "label 999999, which makes 1000000 classes of"),
    ):
        with webdataset.TarWriter(str(last)) as writer:
            writer.write(
                {
                    "__key__": "odd",
                    **{name: value.encode() if isinstance(value, str) else value for name, value in extra.items()},
                }
            )
        line = refusal(capsys, *options)
        assert last.name in line and reason in line
    assert not (tmp_path / "out" / "manifest.json").exists()
    last.write_bytes(whole)
    pack(*options)
    assert len(samples_of(tmp_path / "out")) == 20


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("first, second", [("png", "jpg"), ("jpg", "png"), ("jpg", "jpeg"), ("jpg", "gif")])
def test_two_images_in_a_sample_are_refused_whichever_stands_first(real_data, tmp_path, capsys, first, second):
    image = real_data.imagenet[0].read_bytes()
    (tmp_path / "wds").mkdir()
    write_tar(tmp_path / "wds" / "0.tar", {f"k.{first}": image, f"k.{second}": image, "k.cls": b"0"})
    line = refusal(capsys, "--index_tars", tmp_path / "wds", "--out", tmp_path / "out", "--workers", 1)
    assert f"key 'k' has two images, k.{first} and k.{second}" in line


def test_members_of_a_tar_are_taken_remarked_or_left_out(real_data, tmp_path, capsys):
    jpeg, other = (path.read_bytes() for path in real_data.imagenet[:2])
    (tmp_path / "wds" / "more").mkdir(parents=True)
    members = {
        "README": b"words",
        "__MACOSX/._a.jpg": b"x",
        "__MACOSX/a.jpg": b"x",
        "a.jpg": jpeg,
        "a.json": b"{}",
        "a.seg.png": b"x",
        "b.png": other,
        "c.jpg": b"<html>not found</html>",
        "d.jpg": b"",
    }
    write_tar(tmp_path / "wds" / "0.tar", members)
    (tmp_path / "wds" / "0_stats.json").write_text("{}")
    (tmp_path / "wds" / "._0.tar").write_bytes(b"x")
    options = ["--index_tars", tmp_path / "wds", "--out", tmp_path / "out", "--workers", 1]
    assert "2 of 4 images cannot be decoded" in refusal(capsys, *options)
    pack(*options, "--max_bad_share", 0.5)
    manifest = read_manifest(tmp_path / "out", ImageManifest)
    assert samples_of(tmp_path / "out") == {
        "a": {"jpg": jpeg, "json": b"{}", "seg.png": b"x"},
        "b": {"png": other},
    }
    assert manifest.rejected == ["0.tar: c.jpg: no image", "0.tar: d.jpg: empty file"]
    assert manifest.left_out == {
        "file without a dot in its name, so of no sample": 1,
        "folder, not entered": 1,
        "hidden": 2,
        "in a folder of a system": 1,
        "no tar": 1,
    }
    assert manifest.remarks == {
        "member beside an image, not read (.json)": 1,
        "member beside an image, not read (.seg.png)": 1,
        "of another format than the suffix says, taken by content": 1,
    }
    names = {line.split("\t")[1] for line in (tmp_path / "out" / ".pack" / "left_out.txt").read_text().splitlines()}
    assert names == {
        "more/",
        "._0.tar",
        "0_stats.json",
        "0.tar: README",
        "0.tar: __MACOSX/._a.jpg",
        "0.tar: __MACOSX/a.jpg",
    }


def test_tars_are_known_by_suffix_in_any_spelling_or_by_content(real_data, tmp_path):
    (tmp_path / "wds").mkdir()
    for number, name in enumerate(("a.tar", "b.TAR", "c")):
        write_tar(tmp_path / "wds" / name, {f"{number}.jpg": real_data.imagenet[number].read_bytes()})
    pack("--index_tars", tmp_path / "wds", "--out", tmp_path / "out")
    assert len(samples_of(tmp_path / "out")) == 3


@pytest.mark.parametrize("name", ["1.tar.gz", "1.tgz", "1.TAR.ZST", "1.tar.bz2", "1.txz"])
def test_a_compressed_tar_among_others_is_refused_by_name(tars, tmp_path, capsys, name):
    (tars / name).write_bytes(b"x")
    line = refusal(capsys, "--index_tars", tars, "--out", tmp_path / "out", "--workers", 1)
    assert repr(name) in line and "compressed" in line
    pack("--index_tars", tars / "*.tar", "--out", tmp_path / "out")


def test_a_tar_that_was_made_anew_after_indexing_is_refused_though_its_size_is_the_same(tars, tmp_path):
    pack("--index_tars", tars, "--out", tmp_path / "out")
    shards = ShardSet(tmp_path / "out", read_manifest(tmp_path / "out", ImageManifest))
    victim = tars / "imagenet1k-train-0001.tar"
    os.utime(victim, ns=(1, 1))
    shards.check("size")
    content = bytearray(victim.read_bytes())
    content[5000] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match=f"{victim}: changed since the set was made"):
        shards.check("size")
    pack("--index_tars", tars, "--out", tmp_path / "out")
    ShardSet(tmp_path / "out", read_manifest(tmp_path / "out", ImageManifest)).check("all")


def test_a_tar_under_two_names_is_refused(tars, tmp_path, capsys):
    (tars / "again.tar").symlink_to(tars / "imagenet1k-train-0000.tar")
    line = refusal(capsys, "--index_tars", tars, "--out", tmp_path / "out", "--workers", 1)
    assert "again.tar" in line and "imagenet1k-train-0000.tar" in line and "are one file" in line
    (tars / "again.tar").unlink()
    (tars / "again.tar").symlink_to("nowhere")
    assert "again.tar" in refusal(capsys, "--index_tars", tars, "--out", tmp_path / "out", "--workers", 1)


# ------------------------------------------------------------------------------------------- bad input


def test_bad_folders_are_refused_in_one_line(tree, tmp_path, capsys):
    out = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no such folder" in refusal(capsys, "--images", tmp_path / "absent", "--out", out)
    assert "holds no image" in refusal(capsys, "--images", empty, "--out", out)
    assert "no tar there" in refusal(capsys, "--index_tars", empty, "--out", out)
    source = tmp_path / "in"
    shutil.copytree(tree, source)
    (source / "n00000099").mkdir()
    assert "n00000099" in refusal(capsys, "--images", source, "--out", out)
    (source / "n00000099").rmdir()
    shutil.copyfile(next(tree.glob("*/*.JPEG")), source / "top.jpg")
    assert "'top.jpg'" in refusal(capsys, "--images", source, "--out", out, "--labels", "folders")
    assert "inside" in refusal(capsys, "--images", source, "--out", source / "shards")
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "cannot be made" in refusal(capsys, "--images", tree, "--out", blocked / "shards")
    assert not out.exists()


def test_a_folder_of_nothing_but_broken_images_is_no_set(tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jpg").write_bytes(b"broken")
    line = refusal(capsys, "--images", source, "--out", tmp_path / "out", "--max_bad_share", 1, "--workers", 1)
    assert "no image that can be decoded" in line


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--quality", "101"], "--quality 101"),
        (["--samples_per_shard", "0"], "--samples_per_shard 0"),
        (["--short_side", "-1"], "--short_side -1"),
        (["--workers", "0"], "--workers 0"),
        (["--max_bad_share", "2"], "--max_bad_share 2"),
        (["--max_bad_share", "nan"], "--max_bad_share nan"),
        (["--quality", "high"], "--quality"),
        (["--labels", "some"], "--labels"),
        (["--classes", "x"], "--classes goes with"),
        (["--unknown"], "--unknown"),
        (["--index_tars", "x"], "not allowed with"),
    ],
)
def test_bad_options_are_refused_in_one_line(tree, tmp_path, capsys, options, reason):
    assert reason in refusal(capsys, "--images", tree, "--out", tmp_path / "out", *options)


def test_options_that_cannot_act_on_tars_are_refused(tars, tmp_path, capsys):
    for option in (
        ["--short_side", "64"],
        ["--quality", "80"],
        ["--labels", "none"],
        ["--synsets", "x"],
    ):
        assert f"{option[0]} " in refusal(capsys, "--index_tars", tars, "--out", tmp_path / "out", *option)
