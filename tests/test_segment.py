"""Segmentation through DeepSpeed on CPU: ZeRO x ranks x precision, batch norm over ranks, exact counts, resume."""

import json
import shutil
from pathlib import Path

import beit_samples
import pytest
import torch
from conftest import REPOSITORY, run_stage
from scene_samples import CLASSES, make_scenes

from peco_ds import convert_checkpoint, evaluate, segment
from peco_ds.convert.read_segmenter import read_segmenter
from peco_ds.convert.release import write_release
from peco_ds.convert.to_timm import to_timm
from peco_ds.errors import UserError
from peco_ds.runtime.checkpoint.consolidate import fp32_weights
from peco_ds.runtime.checkpoint.files import newest_whole
from peco_ds.runtime.metrics import read_evaluation, read_metrics
from peco_ds.runtime.run_folder import read_provenance
from peco_ds.schema import MANIFEST_NAME, read_json

STAGES = (0, 1, 2, 3)
HALF = ["model.drop_path=0.3", "segmenter.dropout=0.1", "checkpoint.every_steps=2", "evaluation.every_steps=3"]


@pytest.fixture(scope="module")
def scenes(real_data, tmp_path_factory):
    return make_scenes(real_data, tmp_path_factory.mktemp("scenes"))


def command(overrides, out, *extra, zero=1):
    return [
        *("--recipe", "segment_vitb16", "--deepspeed_config", str(REPOSITORY / "ds_configs" / f"zero{zero}.json")),
        *("--out", str(out), *overrides, *extra),
    ]


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory):
    """Folder of run folders; one launch of one rank, one of two and one of three run all cases."""
    folder = tmp_path_factory.mktemp("segmented")
    cases = {ranks: [] for ranks in (1, 2, 3)}

    def add(ranks, name, *extra, zero=3, folder_name=None, **more):
        out = folder / (folder_name or name)
        cases[ranks].append({"stage": "segment", "arguments": command(scenes, out, *extra, zero=zero), **more})

    for zero in STAGES:
        add(1, f"zero{zero}_1", "run.micro_batch=4", zero=zero)
        add(2, f"zero{zero}_2", zero=zero, lrs=str(folder / f"zero{zero}.lrs.json"))
    for zero in (1, 2, 3):
        add(2, f"bf16_zero{zero}", "run.precision=bf16", "schedule.steps=3", zero=zero)
    add(2, "whole", *HALF)
    add(2, "half", *HALF, "schedule.stop_at_step=3")
    add(2, "rest", *HALF, folder_name="half")
    add(1, "goes_on", f"init.weights={folder / 'zero1_1'}", "run.micro_batch=4", "schedule.steps=2", zero=1)
    add(1, "scaled", "run.micro_batch=4", "evaluation.scales=[1,1.5]", "evaluation.flip=true", zero=1)
    add(3, "three", "run.global_batch=6", "schedule.steps=2", "evaluation.batch=1")
    released = str(folder / "released")
    into = ["--to", "unilm", "--out", released]
    cases[1].append({"stage": "convert_checkpoint", "arguments": [str(folder / "zero1_1"), *into]})
    val = ["--images", scenes[0].removeprefix("data.root=") + "/images/val", "--num_workers", "0"]
    for ranks in (1, 2, 3):
        for name, source in (("run", str(folder / "zero1_1")), ("release", released)):
            out = ["--out", str(folder / f"{name}_{ranks}.json")]
            cases[ranks].append({"stage": "evaluate", "arguments": [source, *val, *out]})
    asked = ["--scales", "1,1.5", "--flip", "--out", str(folder / "asked.json")]
    cases[1].append({"stage": "evaluate", "arguments": [str(folder / "zero1_1"), *val, *asked]})
    for ranks, of_ranks in cases.items():
        listing = folder / f"cases_{ranks}.json"
        listing.write_text(json.dumps(of_ranks))
        run_stage(str(REPOSITORY / "tests" / "many_runs.py"), listing, ranks=ranks, timeout_s=900)
        codes = json.loads(listing.with_name(listing.name + ".codes").read_text())
        assert set(codes) == {0}, codes
    return folder


def losses(folder):
    return [row["loss"] for row in read_metrics(folder)]


def tensors(folder):
    return fp32_weights(newest_whole(folder))


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("zero", STAGES)
def test_every_zero_stage_at_one_and_two_ranks_gives_the_same_losses_and_statistics(runs, zero, ranks):
    ours, reference = losses(runs / f"zero{zero}_{ranks}"), losses(runs / "zero0_1")
    assert len(ours) == 6 and max(abs(a - b) / b for a, b in zip(ours, reference)) < 1.5e-5
    ours, reference = tensors(runs / f"zero{zero}_{ranks}"), tensors(runs / "zero0_1")
    names = [name for name in reference if "running_" in name]
    assert len(names) == 28 and ours.keys() == reference.keys()
    for name in names:
        # Adam makes much of gradients that are nearly zero.
        torch.testing.assert_close(ours[name], reference[name], rtol=1e-2, atol=2e-3)


def test_a_run_stopped_and_continued_is_the_run_that_never_stopped_bit_for_bit(runs):
    """Weights, statistics of the batch norms, random crops, stochastic depth, dropout, evaluations."""

    def rows(folder):
        return [(row["step"], row["loss"], row["accuracy"], row["grad_norm"]) for row in read_metrics(folder)]

    assert rows(runs / "half") == rows(runs / "whole")
    assert read_evaluation(runs / "half") == read_evaluation(runs / "whole")
    assert [row["step"] for row in read_evaluation(runs / "whole")] == [3, 6]
    half, whole = tensors(runs / "half"), tensors(runs / "whole")
    assert half.keys() == whole.keys() and all(torch.equal(half[name], whole[name]) for name in whole)
    assert not torch.equal(whole["decode_head.bottleneck.bn.running_mean"], torch.zeros(16))


@pytest.mark.parametrize("name", ("zero0_1", "zero3_2", "three"))
def test_every_held_out_scene_is_counted_once_on_one_two_and_three_ranks(runs, name):
    assert read_evaluation(runs / name)[-1]["images"] == 7


def test_miou_does_not_depend_on_the_ranks(runs):
    one, two = (read_evaluation(runs / name)[-1] for name in ("zero3_1", "zero3_2"))
    assert one["miou"] == pytest.approx(two["miou"], abs=0.5) and one["aacc"] == pytest.approx(two["aacc"], abs=0.5)


def test_evaluate_measures_a_run_as_it_measured_itself_whatever_the_ranks(runs):
    found = [read_json(runs / f"run_{ranks}.json") for ranks in (1, 2, 3)]
    own = read_evaluation(runs / "zero1_1")[-1]
    assert {result["quality"]["images"] for result in found} == {7} and found[0]["kind"] == "segmenter"
    for name in ("miou", "aacc", "macc"):
        assert [result["quality"][name] for result in found] == pytest.approx([own[name]] * 3, abs=0.1)
    assert found[0]["settings"]["stride_px"] == 20 and found[2]["settings"]["ranks"] == 3
    assert found[0]["facts"]["mIoU"] == f"{own['miou']:.2f}"


def test_evaluate_measures_a_release_by_the_published_settings(runs):
    one, three = (read_json(runs / f"release_{ranks}.json") for ranks in (1, 3))
    assert one["quality"]["images"] == three["quality"]["images"] == 7
    assert one["quality"]["miou"] == pytest.approx(three["quality"]["miou"], abs=0.1)
    assert [one["settings"][name] for name in ("crop_px", "short_px", "long_px", "stride_px")] == [32, 32, 128, 21]


def test_scales_and_flips_asked_for_are_those_of_a_run_that_had_them(runs):
    found, own = read_json(runs / "asked.json"), read_evaluation(runs / "scaled")[-1]
    assert (found["settings"]["scales"], found["settings"]["flip"]) == ([1, 1.5], True)
    plain = read_json(runs / "run_1.json")["quality"]
    for name in ("miou", "aacc", "macc"):
        assert found["quality"][name] == pytest.approx(own[name], abs=0.1)
    assert found["quality"]["miou"] != plain["miou"], "another prediction than that of one scale"


@pytest.mark.parametrize(
    "more, words",
    [
        (["--windows", "whole", "--stride_px", "8"], "--stride_px: whole images have no windows"),
        (["--stride_px", "33"], "--stride_px 33: windows are 32 px"),
        (["--attack", "bim"], "--attack: has no meaning for a segmenter"),
        (["--image_px", "64"], "--image_px: has no meaning for a segmenter"),
        (["--lpips", "x"], "--lpips: has no meaning for a segmenter"),
        (["--weights", "ema"], "keeps no moving average"),
        (["--batch", "0"], "--batch 0: must be at least 1"),
    ],
)
def test_what_has_no_meaning_for_a_segmenter_is_refused(runs, scenes, tmp_path, more, words):
    val = ["--images", scenes[0].removeprefix("data.root=") + "/images/val", "--out", str(tmp_path / "e.json")]
    with pytest.raises(UserError) as refused:
        evaluate.main([str(runs / "zero1_1"), *val, *more])
    assert words in str(refused.value)


def test_a_run_starts_from_a_whole_segmenter_where_that_one_ended(runs):
    assert read_provenance(runs / "goes_on")["fresh"] == []
    assert losses(runs / "goes_on")[0] < losses(runs / "zero1_1")[0]


def test_a_run_is_released_with_the_tensors_of_its_last_checkpoint(runs, tmp_path):
    out = tmp_path / "unilm"
    assert convert_checkpoint.main([str(runs / "zero3_2"), "--to", "unilm", "--out", str(out)]) == 0
    found, trained = read_segmenter(out), tensors(runs / "zero3_2")
    assert found.classes == CLASSES and found.segmenter.taps == (0, 1, 2, 3) and found.tensors.keys() == trained.keys()
    assert all(torch.equal(found.tensors[name].float(), trained[name].float()) for name in trained)
    words = "a segmenter, and timm has none as it is made here; give --to hf or --to unilm"
    with pytest.raises(UserError, match=words):
        convert_checkpoint.main([str(runs / "zero3_2"), "--to", "timm", "--out", str(tmp_path / "timm")])


@pytest.mark.parametrize("zero", (1, 2, 3))
def test_statistics_stay_in_float32_when_weights_are_bfloat16(runs, zero):
    assert all(loss == loss and loss < 4 for loss in losses(runs / f"bf16_zero{zero}"))
    mean = tensors(runs / f"bf16_zero{zero}")["decode_head.fpn_bottleneck.bn.running_mean"]
    assert not torch.equal(mean, mean.bfloat16().float())


@pytest.mark.parametrize("zero", STAGES)
def test_the_rates_in_the_optimiser_are_the_layer_decay_table(runs, zero):
    groups = json.loads((runs / f"zero{zero}.lrs.json").read_text())["groups"]
    assert {round(group["lr_scale"], 6) for group in groups} == {round(0.7**power, 6) for power in range(6)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}


# ------------------------------------------------------------------------------------- bad input, in this process


def refusal(overrides, tmp_path, *extra):
    with pytest.raises(UserError) as refused:
        segment.main(command(overrides, tmp_path / "run", *extra))
    return str(refused.value)


@pytest.mark.parametrize(
    "extra, words",
    [
        (["run.micro_batch=1", "run.global_batch=1"], "run.micro_batch 1 x 1 rank: batch norm needs two images a pass"),
        (
            ["model.image_px=24"],
            "model.image_px 24: gives 3 patches of 8 px a side, the coarsest map halves them; take",
        ),
        (["model.image_px=4"], "model.image_px 4 is not a multiple of model.patch_px 8"),
        (["segmenter.taps=[0,1,2]"], "segmenter.taps [0, 1, 2]: wants four blocks, rising from 0, the last of them 3"),
        (["segmenter.taps=[0,2,1,3]"], "segmenter.taps [0, 2, 1, 3]: wants four blocks"),
        (["evaluation.stride_px=40"], "evaluation.stride_px 40 is more than model.image_px 32: windows would leave"),
        (["evaluation.scales=[]"], "evaluation.scales []: one factor at least"),
        (["data.val_images="], "data.val_images is empty; give the images with maps"),
        (["augment.short_px=200"], "augment.short_px 200 is more than augment.long_px 128"),
        (["ema.decay=0.9"], "ema"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_in_one_line(scenes, tmp_path, extra, words):
    assert words in refusal(scenes, tmp_path, *extra)


def test_weights_of_another_patch_size_are_refused(scenes, tmp_path):
    weights = beit_samples.sample("classifier")
    write_release(tmp_path / "release", to_timm(weights), weights)
    words = refusal(scenes, tmp_path, f"init.weights={tmp_path / 'release'}", "model.width=96", "--dry_run")
    assert "patch_px 16, " in words and "the recipe's model has patch_px 8" in words


def test_maps_of_one_class_are_refused_since_whatever_is_trained_on_them_is_right(scenes, tmp_path):
    root = Path(scenes[0].partition("=")[2])
    for split in ("train", "val"):
        shutil.copytree(root / "images" / split, tmp_path / "images" / split)
        manifest = json.loads((tmp_path / "images" / split / MANIFEST_NAME).read_text())
        (tmp_path / "images" / split / MANIFEST_NAME).write_text(json.dumps(manifest | {"classes": ["sky"]}))
    words = refusal([f"data.root={tmp_path}", *scenes[1:]], tmp_path)
    assert "all labelled pixels are of one class, 'sky'" in words and not (tmp_path / "run").exists()
