"""COCO annotations: packed beside their images, refused by name where they contradict themselves or the images."""

import io
import json
import tarfile

import numpy as np
import pytest
from drawn_objects import pack
from PIL import Image
from pycocotools import mask as coco_mask

from benchmarks.drawing import draw_objects
from peco_ds.data.coco_annotations import _runs_of_text, masks_of, read_coco
from peco_ds.data.objects import ObjectSet, object_sets
from peco_ds.errors import UserError


@pytest.fixture
def drawn(tmp_path):
    """(folder, annotation file) of four images; the third has no object."""
    return tmp_path / "set", draw_objects(tmp_path, "set", 4, seed=3, empty=(2,))


def members(folder):
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    return found


def test_a_record_holds_the_image_as_it_is_and_its_entry_and_objects_as_they_stand(drawn, tmp_path, capsys):
    folder, path = drawn
    out = pack(folder, path, tmp_path / "out")
    raw, found = json.loads(path.read_text()), members(out)
    assert len(found) == 8
    for entry in raw["images"]:
        stem = entry["file_name"].partition(".")[0]
        record = json.loads(found[f"{stem}.instances.json"])
        assert record["image"] == entry
        assert record["annotations"] == [a for a in raw["annotations"] if a["image_id"] == entry["id"]]
        assert found[f"{stem}.png"] == (folder / entry["file_name"]).read_bytes()
    assert (out / "annotations.json").read_bytes() == path.read_bytes()
    assert f"{len(raw['annotations'])} objects of 2 categories" in capsys.readouterr().out
    images = ObjectSet(out)
    assert images.category_ids == (3, 17) and images.classes == ("rectangle", "disc") and images.label_of[17] == 2


def test_images_without_objects_and_images_that_are_not_listed_are_left_out_and_told(drawn, tmp_path, capsys):
    folder, path = drawn
    Image.new("RGB", (32, 32)).save(folder / "other.png")
    out = pack(folder, path, tmp_path / "out", "--only_with_objects")
    line = capsys.readouterr().out
    assert ObjectSet(out).num_samples == 3
    assert "2 left out (" in line and "not in set.json" in line and "no object to train on" in line


def change(path, how):
    raw = json.loads(path.read_text())
    how(raw)
    path.write_text(json.dumps(raw))


def of_first(**fields):
    return lambda raw: raw["annotations"][0].update(fields)


FAULTS = {
    "an image that is not there": (
        lambda raw: raw["images"][1].update(file_name="gone.png"),
        "lists image 11 'gone.png', which is not in",
    ),
    "a box outside": (of_first(bbox=[80, 100, 40, 40]), r"bbox \[80, 100, 40, 40\] .* lies outside the image of 96 x"),
    "a box of negative width": (of_first(bbox=[80, 10, -40, 40]), "lies outside"),
    "a box of three numbers": (of_first(bbox=[1, 2, 3]), "is not four finite numbers"),
    "a polygon of two points": (of_first(segmentation=[[1, 1, 9, 9]]), "has a polygon of 4 numbers"),
    "a polygon of words": (of_first(segmentation=[["a"] * 6]), "no list of finite numbers"),
    "no mask": (of_first(segmentation=[]), "segmentation is empty"),
    "no mask field": (lambda raw: raw["annotations"][0].pop("segmentation"), "segmentation is None"),
    "an unknown category": (of_first(category_id=5), "has category 5, which the file does not list"),
    "an unknown image": (of_first(image_id=99), "belongs to image 99, which the file does not list"),
    "a crowd of two": (of_first(iscrowd=2), "iscrowd 2 is neither 0 nor 1"),
    "a mask of another size": (
        of_first(segmentation={"size": [9, 9], "counts": [81]}),
        r"run-length mask of size \[9, 9\], not \[120, 96\]",
    ),
    "run lengths that do not add up": (
        of_first(segmentation={"size": [120, 96], "counts": [7]}),
        "run lengths of 7 pixels in all, the image has 11520",
    ),
    "run lengths that are none": (
        of_first(segmentation={"size": [120, 96], "counts": "\u00e4"}),
        "run lengths that cannot be read",
    ),
    "two images of one id": (lambda raw: raw["images"][1].update(id=10), "image id 10 stands twice"),
    "two objects of one id": (of_first(id=2), "annotation id 2 stands twice"),
    "two names alike": (lambda raw: raw["categories"][1].update(name="rectangle"), "two categories are named"),
    "an image of another size": (lambda raw: raw["images"][2].update(width=120), "is 120 x 120 px there, the file"),
    "a size in words": (lambda raw: raw["images"][0].update(width="96"), "has width '96', which is no whole number"),
    "no categories": (lambda raw: raw.update(categories=[]), "holds no category"),
    "captions": (lambda raw: raw.pop("categories"), "has no list 'categories'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name_in_one_line(fault, drawn, tmp_path):
    folder, path = drawn
    how, words = FAULTS[fault]
    change(path, how)
    with pytest.raises(UserError, match=words) as refused:
        pack(folder, path, tmp_path / "out")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--short_side", "64"), "--short_side 64: annotations are of the images' own pixels"),
        (("--labels", "none"), "go together"),
    ],
)
def test_options_that_do_not_fit_are_refused(extra, words, drawn, tmp_path):
    with pytest.raises(UserError, match=words):
        pack(*drawn, tmp_path / "out", *extra)


def test_a_box_without_area_is_kept_and_not_trained_on(drawn, tmp_path):
    from peco_ds.data.instance_packing import can_be_learnt

    folder, path = drawn
    change(path, of_first(bbox=[5, 5, 0, 4]))
    assert not can_be_learnt(read_coco(path).objects[10][0])
    pack(folder, path, tmp_path / "out")


def test_sets_of_other_categories_and_sets_without_annotations_are_refused(drawn, tmp_path):
    folder, path = drawn
    first = pack(folder, path, tmp_path / "first")
    change(path, lambda raw: raw["categories"][1].update(name="ring"))
    second = pack(folder, path, tmp_path / "second")
    with pytest.raises(UserError, match="data.val_images .* its categories are not those of"):
        object_sets(first, second)
    (second / "categories.json").unlink()
    with pytest.raises(UserError, match="holds images without boxes and masks; pack them with"):
        object_sets(first, second)


def test_run_lengths_are_read_as_cocos_own_reader_reads_them():
    draw = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.98):
        mask = (draw.random((37, 53)) < share).astype(np.uint8)
        text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        edges = np.flatnonzero(np.diff(mask.ravel(order="F"))) + 1
        runs = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
        assert _runs_of_text(text) == ([0, *runs] if mask[0, 0] else runs)
    assert _runs_of_text("0P") is None


@pytest.mark.parametrize("split", ("train", "val"))
def test_cocos_own_samples_are_packed_and_drawn_as_pycocotools_draws_them(coco_samples, tmp_path, split):
    from pycocotools.coco import COCO

    path = coco_samples / "annotations" / f"instances_{split}2017.json"
    out = pack(coco_samples / f"{split}2017", path, tmp_path / "out")
    images, reference = ObjectSet(out), COCO(str(path))
    assert len(images.classes) == 80 and max(images.category_ids) == 90
    crowds = 0
    for sample in range(images.num_samples):
        entry, objects = images.entry(sample)
        masks = masks_of(objects, entry["height"], entry["width"])
        assert {each["id"] for each in objects} == set(reference.getAnnIds(imgIds=entry["id"]))
        for mask, each in zip(masks, objects):
            crowds += each["iscrowd"]
            assert np.array_equal(mask, reference.annToMask(each))
    assert crowds == (2 if split == "val" else 0)


def test_a_run_length_mask_is_resized_as_a_polygon_is(drawn):
    _, path = drawn
    objects = read_coco(path).objects[11]
    as_runs = []
    for each in objects:
        mask = masks_of([each], 96, 120)[0]
        runs = coco_mask.encode(np.asfortranarray(mask))
        as_runs.append({**each, "segmentation": {"size": [96, 120], "counts": runs["counts"].decode()}})
    polygons, runs = (masks_of(each, 48, 60, scale=(0.5, 0.5)) for each in (objects, as_runs))
    assert (polygons != runs).mean() < 0.01 and runs.any()


def test_a_rotated_photograph_whose_entry_has_the_unrotated_size_is_refused(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(folder / "a.jpg", exif=exif)
    path = tmp_path / "a.json"
    entry = {"id": 1, "file_name": "a.jpg", "height": 30, "width": 40}
    path.write_text(json.dumps({"images": [entry], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}))
    with pytest.raises(UserError, match="is 40 x 30 px there, the file 'a.jpg' is 30 x 40 px"):
        pack(folder, path, tmp_path / "out")
    assert Image.open(io.BytesIO((folder / "a.jpg").read_bytes())).size == (40, 30)
