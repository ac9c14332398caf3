"""Unreadable images are named, counted over restarts, and stop the run when there are too many."""

import pytest
import webdataset

from peco_ds.data.decode import DecodeError
from peco_ds.data.image_set import BadImages, ImageSet
from peco_ds.data.indexed_tar import write_index
from peco_ds.errors import UserError
from peco_ds.schema import ImageManifest, Shard, sha256_of_file, write_manifest


def test_a_sample_of_two_images_is_a_bad_one_whichever_stands_first(real_data, tmp_path):
    """As a set may hold that was indexed before such samples were refused."""
    image = real_data.imagenet[0].read_bytes()
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "k", "png": image, "jpg": image})
    samples, index_sha256 = write_index(tmp_path / "a.tar", tmp_path / "a.index.json")
    tar = tmp_path / "a.tar"
    shard = Shard(tar.name, samples, tar.stat().st_size, sha256_of_file(tar), index_sha256)
    write_manifest(tmp_path, ImageManifest([shard], 1, None, ["x.jpg: cut short"], left_out={"hidden": 2}))
    images = ImageSet(tmp_path)
    with pytest.raises(DecodeError, match="k: has two images .*jpg"):
        images.decode(0)
    # what a measurement says of its images tells what is missing
    assert (images.facts()["rejected"], images.facts()["left_out"]) == (1, {"hidden": 2})


def test_unreadable_images_are_named_and_too_many_stop_the_run(caplog):
    bad = BadImages(max_share=0.01)
    bad.add(1000, ["a: truncated"] * 10)
    with pytest.raises(UserError, match="12 of 1100 readings of images failed"):
        bad.add(100, ["b: truncated"] * 2)
    assert bad.count == 12


def test_an_image_is_named_once_a_start_and_counted_every_time(caplog):
    bad = BadImages(max_share=1.0)
    for _ in range(3):
        bad.add(4, ["a: truncated"])
    assert (bad.count, bad.read) == (3, 12)
    assert len([record for record in caplog.records if "a: truncated" in record.getMessage()]) == 1


def test_the_first_few_unreadable_images_are_not_granted_anew_by_a_restart():
    before = BadImages(max_share=0.001)
    before.add(500, ["a: truncated"] * 10)
    after = BadImages(max_share=0.001)
    after.load_state([before.state()])
    assert (after.count, after.read) == (10, 500)
    after.add(100, [])
    with pytest.raises(UserError, match="11 of 700 readings of images failed"):
        after.add(100, ["b: truncated"])


def test_the_counts_of_several_ranks_are_continued_by_one():
    states = [{"count": 2, "read": 100}, {"count": 3, "read": 200}]
    one = BadImages(max_share=0.5)
    one.load_state(states)
    assert one.state() == {"count": 5, "read": 300}
    one.load_state([])
    assert one.state() == {"count": 0, "read": 0}
