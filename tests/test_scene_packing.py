import json

import numpy as np
import pytest
import torch
from PIL import Image
from scene_samples import CLASSES, pack, photographs, write_scene

from peco_ds import pack_images
from peco_ds.data.image_set import BadImages
from peco_ds.data.scene_packing import read_scene_classes
from peco_ds.data.scenes import SceneSet, label_table, scene_batches, scene_sets
from peco_ds.errors import UserError
from peco_ds.schema import SceneMaps


@pytest.fixture
def raw(real_data, tmp_path):
    """Three scenes, not packed."""
    for number, image in enumerate(photographs(real_data, 3)):
        write_scene(tmp_path / "raw", "train", f"scene_{number}", image)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    return tmp_path / "raw"


def packed(raw, *more):
    pack(raw, "train", raw.parent / "packed", *more, classes=raw.parent / "classes.txt")
    return SceneSet(raw.parent / "packed")


def map_of(raw, name="scene_1"):
    return raw / "annotations" / "train" / f"{name}.png"


def test_an_image_and_its_map_are_one_record_and_numbers_become_classes_when_read(raw):
    found = packed(raw)
    assert found.manifest.classes == list(CLASSES) and found.manifest.maps == SceneMaps(True, [])
    for sample in range(3):
        key, scene = found.scene(sample)
        published = np.array(Image.open(map_of(raw, key)))
        assert np.array_equal(scene.labels.numpy(), np.where(published == 0, 255, published - 1))
        assert scene.image_u8.shape[1:] == scene.labels.shape
        assert found.shards.read(sample)[1]["seg.png"] == map_of(raw, key).read_bytes()


def test_zero_is_no_class_or_the_first_one_as_stated():
    reduced, plain = label_table(SceneMaps(True), 150), label_table(SceneMaps(False, [11]), 11)
    assert reduced[[0, 1, 150, 151, 255]].tolist() == [255, 0, 149, 255, 255]
    assert plain[[0, 10, 11, 255]].tolist() == [0, 10, 255, 255]


def test_ade20ks_list_names_its_classes_and_lies_beside_the_folders(raw, tmp_path):
    lines = [f"{number}\t0.1\t10\t2\t{name}, thing" for number, name in enumerate(CLASSES, start=1)]
    (raw / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "\n".join(lines))
    assert read_scene_classes(raw / "objectInfo150.txt")[0] == "dark low, thing"
    pack_images.main(
        ["--images", str(raw / "images" / "train"), "--labels", "scenes", "--reduce_zero_label"]
        + ["--out", str(tmp_path / "ade"), "--workers", "1"]
    )
    assert len(SceneSet(tmp_path / "ade").manifest.classes) == 4


def spoil_missing(raw):
    map_of(raw).unlink()


def spoil_size(raw):
    Image.open(map_of(raw)).resize((20, 21)).save(map_of(raw))


def spoil_class(raw):
    found = np.array(Image.open(map_of(raw)))
    found[3, 4] = 151
    Image.fromarray(found).save(map_of(raw))


def spoil_colour(raw):
    Image.open(map_of(raw)).convert("RGB").save(map_of(raw))


def spoil_cut(raw):
    map_of(raw).write_bytes(map_of(raw).read_bytes()[:-40])


def spoil_extra(raw):
    Image.new("L", (4, 4)).save(map_of(raw, "scene_9"))


def spoil_format(raw):
    Image.open(map_of(raw)).save(map_of(raw), "JPEG")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (spoil_missing, "image 'scene_1.jpg' has no map 'scene_1.png' there (1 such); add it"),
        (spoil_size, "scene_1.png: 20 x 21 px, its image 'scene_1.jpg' has"),
        (spoil_class, "scene_1.png: holds the number 151, classes are 1 to 4; correct the map"),
        (spoil_colour, "scene_1.png: a map of mode RGB (R+G+B), wants one channel of class numbers"),
        (spoil_cut, "scene_1.png: "),
        (spoil_extra, "map 'scene_9.png' has no image (1 such)"),
        (spoil_format, "scene_1.png: a JPEG, a class map is a PNG"),
    ],
)
def test_a_map_that_is_not_its_images_ends_the_packing_by_name(raw, spoil, words):
    spoil(raw)
    with pytest.raises(UserError) as refusal:
        packed(raw)
    assert words in str(refusal.value) and not (raw.parent / "packed" / "manifest.json").exists()


@pytest.mark.parametrize(
    "more, words",
    [
        (["--short_side", "32"], "--short_side does not go with --labels scenes"),
        (["--ignored", "300"], "--ignored 300: must lie between 0 and 255"),
        (["--ignored", "2"], "--ignored 2: is the number of a class, --classes names 4"),
        (["--maps", "nowhere"], "--maps nowhere: no such folder"),
    ],
)
def test_options_that_do_not_fit_are_refused(raw, more, words):
    with pytest.raises(UserError) as refusal:
        packed(raw, *more)
    assert words in str(refusal.value)


def test_scene_options_without_scenes_are_refused(raw, tmp_path):
    with pytest.raises(UserError, match="--reduce_zero_label goes with --labels scenes"):
        pack_images.main(["--images", str(raw / "images"), "--out", str(tmp_path / "x"), "--reduce_zero_label"])


def test_a_set_without_maps_cannot_be_segmented(raw, tmp_path):
    pack_images.main(["--images", str(raw / "images"), "--labels", "none", "--out", str(tmp_path / "plain")])
    with pytest.raises(UserError, match="data.images .*: holds images without class maps"):
        SceneSet(tmp_path / "plain")


def test_sets_of_other_classes_do_not_go_together(raw, tmp_path):
    packed(raw)
    (tmp_path / "others.txt").write_text("\n".join(reversed(CLASSES)))
    pack(raw, "train", tmp_path / "other", classes=tmp_path / "others.txt")
    with pytest.raises(UserError, match="its classes are not those of"):
        scene_sets(tmp_path / "packed", tmp_path / "other")


def test_training_batches_are_padded_with_the_mean_colour_and_no_class(raw):
    from peco_ds.config import SegmentRecipe
    from peco_ds.recipe_files import load_recipe

    recipe = load_recipe(
        SegmentRecipe,
        "segment_vitb16",
        [
            "model.image_px=96",
            "model.patch_px=8",
            "augment.short_px=40",
            "augment.ratio=[1.0,1.0]",
            "data.num_workers=0",
        ]
        + ["evaluation.stride_px=64"],
        environ={},
    ).recipe
    bad = BadImages(1.0)
    positions = [np.arange(2), np.arange(2, 4)]
    batches = list(scene_batches(packed(raw), positions, recipe, torch.device("cpu"), bad))
    assert len(batches) == 2 and not bad.count
    for batch in batches:
        assert batch.images_norm.shape == (2, 3, 96, 96) and batch.labels.dtype == torch.int64
        # The short side has 40 px.
        padded = batch.labels == 255
        assert padded[:, 60:, 60:].all() and not batch.images_norm[:, :, 60:, 60:].any()
        assert set(batch.labels.unique().tolist()) <= {0, 1, 2, 3, 255} and not padded.all()
    again = list(scene_batches(packed(raw), positions[1:], recipe, torch.device("cpu"), bad))
    assert torch.equal(again[0].images_norm, batches[1].images_norm) and again[0].keys == batches[1].keys


def test_an_interrupted_packing_goes_on_and_a_changed_map_is_packed_again(raw):
    packed(raw)
    before = json.loads((raw.parent / "packed" / "manifest.json").read_text())["shards"]
    packed(raw)
    assert json.loads((raw.parent / "packed" / "manifest.json").read_text())["shards"] == before
