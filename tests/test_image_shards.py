"""One shard: each image as a person sees it, the shard whole or absent."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from peco_ds.data.decode import decode_rgb
from peco_ds.data.image_folders import list_images
from peco_ds.data.image_shards import PackJob, make_shard, prepare_folder
from peco_ds.data.indexed_tar import IndexedTar, index_name
from peco_ds.errors import UserError

OPTIONS = {"source": "here"}


def job_of(source: Path, short_side_px: int = 0, quality: int = 92) -> PackJob:
    images = list_images(source, "auto", None, None).images
    return PackJob("shard-000000.tar", str(source), images, short_side_px, quality)


def packed(source: Path, out: Path, **options) -> dict[str, dict[str, bytes]]:
    """The samples of one shard that holds every image of a folder."""
    job = job_of(source, **options)
    prepare_folder(out, [job], OPTIONS)
    record = make_shard(out, job, lambda: None)
    assert record.rejected == []
    tar = IndexedTar(out / job.name, out / index_name(job.name), record.shard.index_sha256)
    samples = {tar.key(i): tar.read(i) for i in range(len(tar))}
    assert len(samples) == len(tar) == record.shard.samples
    return samples


def pixels_of(data: bytes) -> np.ndarray:
    return decode_rgb(data).permute(1, 2, 0).numpy().astype(int)


def save_odd_kinds(folder: Path, photograph: Image.Image) -> dict[str, tuple[np.ndarray, int]]:
    """One file of each odd kind: name -> (pixels a person should see, tolerance of the mean difference).

    The two JPEGs are coded a second time, at quality 95; measured 1.8 for the inverted CMYK one and 0.9 for the rotated
    one.
    """
    upright = np.asarray(photograph, dtype=int)
    grey = np.asarray(photograph.convert("L"))
    expected = {}
    photograph.convert("CMYK").save(folder / "cmyk.JPEG", quality=95)
    expected["cmyk"] = np.asarray(Image.open(folder / "cmyk.JPEG").convert("RGB"), dtype=int), 3
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph.save(folder / "rotated.jpg", quality=95, exif=exif)
    expected["rotated"] = np.rot90(np.asarray(Image.open(folder / "rotated.jpg"), dtype=int), -1), 2
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    expected["deep"] = np.repeat(grey[..., None], 3, axis=2), 0
    palette = photograph.quantize(64)
    palette.save(folder / "palette.png")
    palette.save(folder / "moving.gif", save_all=True, append_images=[ImageOps.invert(photograph).quantize(64)])
    expected["palette"] = expected["moving"] = np.asarray(palette.convert("RGB")), 0
    layered = photograph.copy()
    layered.putalpha(
        Image.fromarray(
            np.where(np.arange(grey.shape[1]) < 20, 0, 255).astype(np.uint8)[None].repeat(grey.shape[0], axis=0)
        )
    )
    layered.save(folder / "layered.png")
    over_white = upright.copy()
    over_white[:, :20] = 255
    expected["layered"] = over_white, 0
    photograph.save(folder / "bitmap.bmp")
    photograph.save(folder / "scan.TIFF")
    expected["bitmap"] = expected["scan"] = upright, 0
    return expected


def test_odd_images_are_stored_as_upright_rgb_that_any_reader_understands(real_data, tmp_path):
    source = tmp_path / "odd"
    source.mkdir()
    photograph = Image.open(real_data.kodak[1]).convert("RGB").resize((120, 80))
    expected = save_odd_kinds(source, photograph)
    samples = packed(source, tmp_path / "out", quality=95)
    assert set(samples) == set(expected)
    for name, (pixels, tolerance) in expected.items():
        (data,) = samples[name].values()
        stored = Image.open(io.BytesIO(data))
        assert stored.mode == "RGB" and stored.getexif().get(0x0112, 1) == 1, name
        assert stored.size == pixels.shape[1::-1], name
        assert np.abs(np.asarray(stored, dtype=int) - pixels).mean() <= tolerance, name
        assert set(samples[name]) == {"jpg" if name in ("cmyk", "rotated") else "png"}, name


def test_plain_png_and_webp_are_kept_and_named_by_content_not_by_file_name(real_data, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    png = real_data.kodak[0].read_bytes()
    (source / "disguised.JPEG").write_bytes(png)  # as one image of ILSVRC is
    Image.open(real_data.kodak[1]).convert("RGB").resize((60, 40)).save(source / "small.webp", quality=80)
    assert packed(source, tmp_path / "out") == {
        "disguised": {"png": png},
        "small": {"webp": (source / "small.webp").read_bytes()},
    }


def test_short_side_shrinks_and_never_enlarges(real_data, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    photograph = Image.open(real_data.kodak[0]).convert("RGB")
    photograph.save(source / "large.jpg", quality=95)
    photograph.save(source / "lossless.png")
    photograph.resize((96, 64)).save(source / "small.jpg", quality=95)
    samples = packed(source, tmp_path / "out", short_side_px=128)
    assert samples["small"]["jpg"] == (source / "small.jpg").read_bytes()
    short, long = sorted(photograph.size)
    reference = np.asarray(
        photograph.resize([round(side * 128 / short) for side in photograph.size], Image.Resampling.BICUBIC), dtype=int
    )
    assert sorted(pixels_of(samples["large"]["jpg"]).shape[:2]) == [128, round(long * 128 / short)]
    assert np.abs(pixels_of(samples["lossless"]["png"]) - reference).max() == 0
    assert np.abs(pixels_of(samples["large"]["jpg"]) - reference).mean() < 5


# ------------------------------------------------------------------------------------- whole or absent


@pytest.fixture
def photographs(real_data, tmp_path) -> Path:
    """Five images and one that is none."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, path in enumerate(real_data.imagenet[:5]):
        shutil.copyfile(path, folder / f"{number}.jpg")
    (folder / "broken.jpg").write_bytes(b"broken")
    return folder


def test_a_shard_that_was_interrupted_is_absent_and_made_by_the_next_run(photographs, tmp_path):
    out, job = tmp_path / "out", job_of(photographs)
    prepare_folder(out, [job], OPTIONS)
    images_until_the_end = iter(range(3))

    def count_one() -> None:
        if next(images_until_the_end, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shard(out, job, count_one)
    assert not (out / job.name).exists() and not (out / index_name(job.name)).exists()
    assert prepare_folder(out, [job], OPTIONS) == ([], [job])
    assert not list(out.glob(".*.tmp"))
    record = make_shard(out, job, lambda: None)
    assert prepare_folder(out, [job], OPTIONS) == ([record], [])


def test_every_image_is_counted_once_whether_it_can_be_read_or_not(photographs, tmp_path):
    out, job, counted = tmp_path / "out", job_of(photographs), []
    prepare_folder(out, [job], OPTIONS)
    record = make_shard(out, job, lambda: counted.append(1))
    assert len(counted) == record.units == 6
    assert record.shard.samples == 5 and [line.split(":")[0] for line in record.rejected] == ["broken.jpg"]


def test_a_shard_that_cannot_be_written_says_where(photographs, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path / "absent")):
        make_shard(tmp_path / "absent", job_of(photographs), lambda: None)
