"""Detection through DeepSpeed on CPU: ZeRO x ranks, images and ranks without objects, exact counts, resume, start from
pre-training, windows and square images.
"""

import json

import pytest
import torch
from conftest import REPOSITORY, run_stage
from drawn_objects import make_drawn_sets
from PIL import Image

from benchmarks.drawing import DISC, RECTANGLE
from peco_ds import convert_checkpoint, evaluate
from peco_ds.config import DetectRecipe
from peco_ds.data.objects import ObjectSet, object_batches
from peco_ds.data.order import rank_positions
from peco_ds.errors import UserError
from peco_ds.recipe_files import load_recipe
from peco_ds.runtime.checkpoint.consolidate import fp32_weights
from peco_ds.runtime.checkpoint.files import newest_whole
from peco_ds.runtime.metrics import read_evaluation, read_metrics
from peco_ds.schema import read_json

STAGES = (0, 1, 2, 3)
HALF = ["model.drop_path=0.3", "checkpoint.every_steps=2", "detector.branch_norm=batch", "evaluation.every_epochs=0.5"]
# mc-BEiT's benchmark and ViTDet in small.
SQUARE = (
    "augment.kind=scale_jitter augment.long_px=128 augment.short_px=128 augment.scale=[0.5,1.5] detector.window=3 "
    "detector.global_blocks=[1,3]"
).split()
SIMPLE = [*SQUARE, *"detector.pyramid=simple detector.taps=[3] detector.head_norm=layer detector.box_convs=1".split()]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_drawn_sets(tmp_path_factory.mktemp("drawn"))


def arguments_of(sets, folder, name, *extra, zero=1):
    ds_config = str(REPOSITORY / "ds_configs" / f"zero{zero}.json")
    return [
        *("--recipe", "detect_vitb16", "--deepspeed_config", ds_config, "--out", str(folder / name)),
        *(*sets.overrides, *extra),
    ]


@pytest.fixture(scope="module")
def runs(sets, tmp_path_factory):
    """Folder of run folders; one launch of one rank, one of two and one of three run all cases."""
    folder = tmp_path_factory.mktemp("detected")
    cases = {ranks: {} for ranks in (1, 2, 3)}

    def case(ranks, name, *extra, zero=1, out=""):
        cases[ranks][name] = {
            "stage": "detect",
            "arguments": arguments_of(sets, folder, out or name, *extra, zero=zero),
        }

    case(1, "zero0_1", zero=0)
    for zero in STAGES:
        case(2, f"zero{zero}_2", zero=zero)
    case(2, "whole", *HALF)
    case(2, "half", *HALF, "schedule.stop_at_step=2")
    case(2, "rest", *HALF, out="half")
    case(2, "bf16", "run.precision=bf16", *SIMPLE, "schedule.steps=2", zero=3)
    case(2, "square", *SQUARE, "schedule.steps=2", zero=2)
    case(3, "three", "run.global_batch=6", "schedule.steps=2", zero=3)
    val = ["--images", str(sets.root / "images" / "val"), "--num_workers", "0"]
    for ranks in (1, 2, 3):
        out = ["--out", str(folder / f"measured_{ranks}.json")]
        cases[ranks]["measured"] = {"stage": "evaluate", "arguments": [str(folder / "zero0_1"), *val, *out]}
    released = str(folder / "released")
    into = [str(folder / "zero0_1"), "--to", "torchvision", "--out", released]
    cases[1]["released"] = {"stage": "convert_checkpoint", "arguments": into}
    out = ["--out", str(folder / "measured_release.json")]
    cases[1]["measured_release"] = {"stage": "evaluate", "arguments": [released, *val, *out]}
    codes = {}
    for ranks, of_ranks in cases.items():
        listing = folder / f"cases_{ranks}.json"
        listing.write_text(json.dumps(list(of_ranks.values())))
        run_stage(str(REPOSITORY / "tests" / "many_runs.py"), listing, ranks=ranks, timeout_s=900)
        codes |= dict(zip(of_ranks, json.loads(listing.with_name(listing.name + ".codes").read_text())))
    assert set(codes.values()) == {0}, codes
    return folder


def losses(folder):
    return [row["loss"] for row in read_metrics(folder)]


@pytest.mark.parametrize("zero", STAGES)
def test_two_ranks_under_every_zero_stage_give_the_losses_of_one_rank(runs, zero):
    """Half of the images have no object, so in some passes a rank has none at all."""
    ours, reference = losses(runs / f"zero{zero}_2"), losses(runs / "zero0_1")
    assert len(ours) == 4 and max(abs(a - b) / b for a, b in zip(ours, reference)) < 1.5e-5


def test_some_rank_had_no_object_in_a_pass(sets):
    recipe = load_recipe(DetectRecipe, "detect_vitb16", sets.overrides).recipe
    images = ObjectSet(sets.root / "images" / "train")
    counts = []
    for rank in range(2):
        positions = rank_positions(recipe.run, rank, 2, first_step=0, last_step=4)
        batches = object_batches(images, positions, recipe, torch.device("cpu"))
        counts.append([sum(len(target.boxes) for target in batch.targets) for batch in batches])
    assert any(0 in step and any(step) for step in zip(*counts))


def test_a_run_that_stopped_and_went_on_equals_one_that_did_not_bit_for_bit(runs):
    assert losses(runs / "half") == losses(runs / "whole")
    assert read_evaluation(runs / "half") == read_evaluation(runs / "whole")
    one, other = (fp32_weights(newest_whole(runs / name)) for name in ("half", "whole"))
    assert any("running_mean" in name for name in one)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ("zero0_1", "zero3_2", "three"))
def test_every_image_is_counted_once_on_one_two_and_three_ranks(runs, sets, name):
    assert read_evaluation(runs / name)[-1]["images"] == sets.val_images


def test_ranks_do_not_change_what_is_measured(runs):
    one, other = (read_evaluation(runs / name)[-1] for name in ("zero0_1", "zero1_2"))
    assert one.keys() == other.keys() and {"box_ap", "mask_ap50"} <= one.keys()
    assert all(one[key] == pytest.approx(other[key], abs=0.05) for key in one)


def test_evaluate_measures_a_run_as_it_measured_itself_whatever_the_ranks(runs, sets):
    own = read_evaluation(runs / "zero0_1")[-1]
    found = [read_json(runs / f"measured_{ranks}.json") for ranks in (1, 2, 3)]
    for result in found:
        assert result["kind"] == "detector" and result["quality"]["images"] == sets.val_images
        assert all(result["quality"][name] == pytest.approx(own[name], abs=0.05) for name in ("box_ap", "mask_ap50"))
    assert (found[0]["settings"]["short_px"], found[0]["settings"]["batch"]) == (96, 1)


def test_evaluate_measures_a_release_as_the_run_it_was_made_of(runs):
    run, release = (read_json(runs / f"{name}.json")["quality"] for name in ("measured_1", "measured_release"))
    assert release == pytest.approx(run, abs=1e-6)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--crop", "1"], "--crop: has no meaning for a detector"),
        (["--statistics", "half"], "--statistics: has no meaning for a detector"),
    ],
)
def test_what_has_no_meaning_for_a_detector_is_refused(runs, sets, tmp_path, more, words):
    val = ["--images", str(sets.root / "images" / "val"), "--out", str(tmp_path / "e.json")]
    with pytest.raises(UserError) as refused:
        evaluate.main([str(runs / "zero0_1"), *val, *more])
    assert words in str(refused.value)


@pytest.mark.parametrize("name", ("bf16", "square"))
def test_windows_square_images_both_pyramids_and_bf16_train(runs, name):
    assert len(losses(runs / name)) == 2 and all(0 < loss < 20 for loss in losses(runs / name))


def test_a_run_is_released_for_torchvision_and_finds_there_what_it_finds_here(runs, tmp_path, capsys):
    out = tmp_path / "release"
    assert convert_checkpoint.main([str(runs / "square"), "--to", "torchvision", "--out", str(out)]) == 0
    assert "maps and heads in torchvision equal our own detector's" in capsys.readouterr().out
    assert [entry["id"] for entry in read_json(out / "config.json")["categories"]] == [RECTANGLE, DISC]
    measured = read_evaluation(runs / "square")[-1]
    assert f"| box AP | {measured['box_ap']:.2f} |" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "more, words",
    [
        (["--to", "timm"], "a detector, and timm has none as it is made here; give --to torchvision"),
        (["--to", "torchvision", "--weights", "ema"], "--weights ema: "),
        (["--to", "torchvision", "--from", "hf"], "is of layout run, not hf"),
    ],
)
def test_what_no_library_has_of_a_detector_is_refused_in_one_line(runs, tmp_path, more, words):
    with pytest.raises(UserError) as refused:
        convert_checkpoint.main([str(runs / "square"), "--out", str(tmp_path / "release"), *more])
    assert words in str(refused.value) and not (tmp_path / "release").exists()


def test_an_image_of_what_was_found_is_left_in_the_run_folder(runs):
    with Image.open(runs / "zero0_1" / "detections.png") as image:
        assert image.size == (852, 640)


def test_the_parts_of_the_loss_are_logged(runs):
    row = read_metrics(runs / "zero0_1")[0]
    parts = ("loss_objectness", "loss_rpn_box_reg", "loss_class", "loss_box", "loss_mask")
    assert sum(row[part] for part in parts) == pytest.approx(row["loss"], rel=1e-5)
