"""Fine-tuning through DeepSpeed on CPU: ZeRO x ranks x precision, layer-wise learning rates, moving average, exact
counts,
resume, start from pre-training.
"""

import json
from types import SimpleNamespace

import beit_samples
import pytest
import torch
from conftest import REPOSITORY, run_stage

from peco_ds import finetune
from peco_ds.config import ModelSettings
from peco_ds.convert.initialize import classifier_of
from peco_ds.convert.read import read_weights
from peco_ds.data.image_set import ImageSet
from peco_ds.data.labelled import CropSettings, evaluation_batches
from peco_ds.evaluation.classification import classification_quality
from peco_ds.runtime.metrics import read_evaluation, read_metrics
from peco_ds.runtime.run_weights import read_run

STAGES = (0, 1, 2, 3)
HALF = ["model.drop_path=0.3", "checkpoint.every_steps=3", "evaluation.every_epochs=0.35"]


def case(sets, folder, name, *, zero=3, extra=(), lrs=False):
    arguments = [
        "--recipe",
        "finetune_vitb16",
        "--deepspeed_config",
        str(REPOSITORY / "ds_configs" / f"zero{zero}.json"),
        "--out",
        str(folder / name),
        *sets.overrides,
        *extra,
    ]
    return {"stage": "finetune", "arguments": arguments, "lrs": str(folder / f"{name}.lrs.json") if lrs else None}


@pytest.fixture(scope="module")
def runs(labelled_sets, tmp_path_factory):
    """Folder of run folders `NAME_RANKS`; one launch of one rank, one of two and one of three run all cases."""
    folder = tmp_path_factory.mktemp("finetuned")
    cases = {ranks: {} for ranks in (1, 2, 3)}
    for zero in STAGES:
        cases[1][f"zero{zero}_1"] = case(labelled_sets, folder, f"zero{zero}_1", zero=zero)
        cases[2][f"zero{zero}_2"] = case(labelled_sets, folder, f"zero{zero}_2", zero=zero, lrs=True)
    for zero in STAGES:
        cases[2][f"bf16_zero{zero}_2"] = case(
            labelled_sets, folder, f"bf16_zero{zero}_2", zero=zero, extra=["run.precision=bf16"]
        )
    cases[2]["whole"] = case(labelled_sets, folder, "whole", extra=HALF)
    # a step that is evaluated
    cases[2]["half"] = case(labelled_sets, folder, "half", extra=[*HALF, "schedule.stop_at_step=6"])
    cases[2]["rest"] = case(labelled_sets, folder, "half", extra=HALF)
    cases[2]["started_again_when_done"] = case(labelled_sets, folder, "half", extra=HALF)
    cases[2]["long"] = case(
        labelled_sets,
        folder,
        "long",
        extra=[
            "schedule.steps=60",
            "augment.auto_augment=",
            "augment.mixup=0",
            "augment.cutmix=0",
            "augment.erasing=0",
            "run.log_every_steps=10",
        ],
    )
    cases[3]["three"] = case(labelled_sets, folder, "three", extra=["run.global_batch=12", "schedule.steps=2"])
    codes = {}
    for ranks, of_ranks in cases.items():
        listing = folder / f"cases_{ranks}.json"
        listing.write_text(json.dumps(list(of_ranks.values())))
        run_stage(str(REPOSITORY / "tests" / "many_runs.py"), listing, ranks=ranks, timeout_s=900)
        codes |= dict(zip(of_ranks, json.loads(listing.with_name(listing.name + ".codes").read_text())))
    assert set(codes.values()) == {0}
    return folder


def losses(folder):
    return [row["loss"] for row in read_metrics(folder)]


def test_the_loss_falls_on_real_images(runs):
    curve = losses(runs / "long")
    assert curve[-1] < curve[0] - 0.1


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("zero", STAGES)
def test_every_zero_stage_at_one_and_two_ranks_gives_the_same_losses_and_the_same_average(runs, zero, ranks):
    """Mixing, erasing and RandAugment included: their draws belong to the image and the slice of the batch, not to
    the rank.
    """
    ours, reference = losses(runs / f"zero{zero}_{ranks}"), losses(runs / "zero0_1")
    assert len(ours) == 10 and max(abs(a - b) / b for a, b in zip(ours, reference)) < 1e-5
    ours, reference = (read_run(runs / name, "ema").tensors for name in (f"zero{zero}_{ranks}", "zero0_1"))
    assert ours.keys() == reference.keys()
    assert max(float((ours[name] - reference[name]).abs().max()) for name in reference) < 2e-4


@pytest.mark.parametrize("zero", STAGES)
def test_the_rates_in_the_optimiser_are_the_layer_decay_table(runs, zero):
    written = json.loads((runs / f"zero{zero}_2.lrs.json").read_text())
    assert {round(group["lr_scale"], 6) for group in written["groups"]} == {
        round(0.7**power, 6) for power in (3, 2, 1, 0)
    }
    assert all(
        group["lr"] == pytest.approx(written["lr"] * group["lr_scale"]) and group["lr"] > 0
        for group in written["groups"]
    )
    assert {group["weight_decay"] for group in written["groups"]} == {0.0, 0.05}


@pytest.mark.parametrize("name", [f"bf16_zero{zero}_2" for zero in STAGES] + ["zero3_2", "zero2_2", "zero0_1"])
def test_the_average_is_its_own_and_a_fresh_model_scores_with_it_what_the_engine_scored(runs, labelled_sets, name):
    measured = read_evaluation(runs / name)[-1]
    for average, prefix in (("raw", ""), ("ema", "ema_")):
        weights = read_run(runs / name, average)
        model = classifier_of(weights)
        if name.startswith("bf16"):
            model = model.bfloat16()
        alone = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"))
        batches = evaluation_batches(
            ImageSet(labelled_sets.root / "images" / "val"), CropSettings(32, 0.875), alone, batch=4, num_workers=0
        )
        quality = classification_quality(model, batches, num_classes=4, device=torch.device("cpu"))
        assert quality["loss"] == pytest.approx(
            measured[f"{prefix}loss"], rel=1e-5 if not name.startswith("bf16") else 5e-3
        )
        assert name.startswith("bf16") or quality["top1"] == pytest.approx(measured[f"{prefix}top1"])
    raw, averaged = (read_run(runs / name, average).tensors["head.weight"] for average in ("raw", "ema"))
    assert not torch.equal(raw, averaged)


@pytest.mark.parametrize("name", ("zero3_1", "zero3_2", "three"))
def test_every_held_out_image_is_counted_once_on_one_two_and_three_ranks(runs, labelled_sets, name):
    assert read_evaluation(runs / name)[-1]["images"] == labelled_sets.val_images


def test_the_share_of_right_answers_does_not_depend_on_the_ranks(runs):
    one, two = (read_evaluation(runs / f"zero3_{ranks}")[-1] for ranks in (1, 2))
    assert one["top1"] == two["top1"] and one["loss"] == pytest.approx(two["loss"], rel=1e-4)


def test_a_run_stopped_and_continued_is_the_run_that_never_stopped_bit_for_bit(runs):
    """Weights, average, mixing draws, stochastic depth, evaluations.

    A third start, with nothing left to do, loses none of it.
    """

    def rows(folder):
        return [(row["step"], row["loss"], row["train_top1"], row["grad_norm"]) for row in read_metrics(folder)]

    assert rows(runs / "half") == rows(runs / "whole")
    assert read_evaluation(runs / "half") == read_evaluation(runs / "whole")
    steps = [row["step"] for row in read_evaluation(runs / "whole")]
    assert 6 in steps and steps[-1] == 10 and steps == sorted(set(steps))
    assert "top1" in read_run(runs / "half").facts
    for average in ("raw", "ema"):
        half, whole = (read_run(runs / name, average).tensors for name in ("half", "whole"))
        assert half.keys() == whole.keys() and all(torch.equal(half[name], whole[name]) for name in whole)


# ------------------------------------------------------------------------------------- where it starts


@pytest.fixture(scope="module")
def pretrained(small_sets, tmp_path_factory):
    """A run folder of pretrain.py: 32 px, patch 16 is the sets'; two steps."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    run_stage(
        "pretrain",
        "--recipe",
        "peco_vitb16",
        "--deepspeed_config",
        REPOSITORY / "ds_configs" / "zero0.json",
        "--out",
        out,
        *small_sets.overrides,
        "schedule.steps=2",
        "schedule.warmup_steps=0",
    )
    return out


def start(labelled_sets, out, *extra):
    """The command line of one step on 64 px, patch 16: the model that `pretrained` has."""
    sizes = [
        "model.image_px=64",
        "model.patch_px=16",
        "schedule.steps=1",
        "schedule.warmup_steps=0",
        "evaluation.batch=25",
    ]
    return [
        "--recipe",
        "finetune_vitb16",
        "--deepspeed_config",
        str(REPOSITORY / "ds_configs" / "zero0.json"),
        "--out",
        str(out),
        *labelled_sets.overrides,
        *sizes,
        *map(str, extra),
    ]


def test_224_then_448_in_small_from_a_pretraining_run_to_a_classifier_of_twice_the_size(
    labelled_sets, pretrained, tmp_path
):
    run_stage("finetune", *start(labelled_sets, tmp_path / "small", f"init.weights={pretrained}", "optim.lr=1e-9"))
    provenance = json.loads((tmp_path / "small" / "provenance.json").read_text())
    assert "peco_vitb16, step_00000002" in provenance["init"] and set(provenance["fresh"]) == {
        "fc_norm.weight",
        "fc_norm.bias",
        "head.weight",
        "head.bias",
    }
    small, started_from = read_run(tmp_path / "small", "raw"), read_run(pretrained)
    table = "rel_pos_bias.relative_position_bias_table"
    for block in range(2):
        torch.testing.assert_close(
            small.tensors[f"blocks.{block}.attn.relative_position_bias_table"],
            started_from.tensors[table],
            atol=1e-6,
            rtol=0,
        )
    torch.testing.assert_close(
        small.tensors["blocks.1.mlp.fc1.weight"], started_from.tensors["blocks.1.mlp.fc1.weight"], atol=1e-6, rtol=0
    )
    run_stage(
        "finetune",
        *start(
            labelled_sets,
            tmp_path / "large",
            f"init.weights={tmp_path / 'small'}",
            "model.image_px=128",
            "optim.lr=1e-9",
            "evaluation.crop=1.0",
        ),
    )
    large = read_run(tmp_path / "large", "raw")
    assert large.tensors["blocks.0.attn.relative_position_bias_table"].shape == (15**2 + 3, 3)
    assert json.loads((tmp_path / "large" / "provenance.json").read_text())["fresh"] == []
    torch.testing.assert_close(
        large.tensors["head.weight"], read_run(tmp_path / "small", "ema").tensors["head.weight"], atol=1e-6, rtol=0
    )


@pytest.fixture(scope="module")
def from_official(labelled_sets, tmp_path_factory):
    """One step each from files in others' layouts: unilm's base model at full size, a BEiT v2 file, folders that
    transformers wrote; what they held, by name.
    """
    from transformers import BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling

    folder, held = tmp_path_factory.mktemp("official"), {}
    base = ModelSettings(image_px=224, patch_px=16, width=768, depth=12, heads=12)
    tables = ["rel_pos_bias.relative_position_bias_table"]
    held["pt22k"] = beit_samples.drawn(beit_samples.mim_shapes(base, 8192))
    torch.save({"model": held["pt22k"] | beit_samples.index_buffers(tables, base)}, folder / "pt22k.pth")
    held["v2"] = beit_samples.drawn(beit_samples.mim_shapes(beit_samples.SMALL), seed=1)
    branch = beit_samples.drawn(
        {f"cls_pt_layers.0.{name}": shape for name, shape in beit_samples.block_shapes(96, 384).items()}
    )
    torch.save({"model": held["v2"] | branch}, folder / "v2.pth")
    sizes = dict(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=384,
        image_size=64,
        patch_size=16,
        layer_norm_eps=1e-6,
        vocab_size=50,
    )
    shared = dict(use_mask_token=True, use_shared_relative_position_bias=True, use_mean_pooling=True)
    BeitForMaskedImageModeling(BeitConfig(**sizes, **shared)).save_pretrained(folder / "hf_mim")
    BeitForImageClassification(
        BeitConfig(**sizes, use_relative_position_bias=True, use_mean_pooling=True, num_labels=4)
    ).save_pretrained(folder / "hf_classifier")
    (folder / "hf_classifier" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 64, "do_center_crop": False})
    )
    held |= {name: read_weights(folder / name).tensors for name in ("hf_mim", "hf_classifier")}
    small = ["model.image_px=64", "model.patch_px=16", "model.width=96", "model.depth=3"]
    large = [
        "model.image_px=224",
        "model.patch_px=16",
        "model.width=768",
        "model.depth=12",
        "model.heads=12",
        "evaluation.batch=4",
        "ema.decay=0",
    ]
    cases = []
    for name, source in (
        ("pt22k", "pt22k.pth"),
        ("v2", "v2.pth"),
        ("hf_mim", "hf_mim"),
        ("hf_classifier", "hf_classifier"),
    ):
        extra = [
            *(large if name == "pt22k" else small),
            f"init.weights={folder / source}",
            "schedule.steps=1",
            "schedule.warmup_steps=0",
            "optim.lr=1e-4",
            "run.global_batch=4",
        ]
        cases.append(case(labelled_sets, folder, f"run_{name}", zero=0, extra=extra))
    (folder / "cases.json").write_text(json.dumps(cases))
    run_stage(str(REPOSITORY / "tests" / "many_runs.py"), folder / "cases.json", timeout_s=900)
    return folder, held


@pytest.mark.parametrize(
    "name, head_is_kept", [("pt22k", False), ("v2", False), ("hf_mim", False), ("hf_classifier", True)]
)
def test_one_step_from_an_official_layout_moves_every_weight_a_little(from_official, name, head_is_kept):
    folder, held = from_official
    after, before = read_run(folder / f"run_{name}", "raw").tensors, dict(held[name])
    table = before.pop("rel_pos_bias.relative_position_bias_table", None)
    if table is not None:
        before |= {key: table for key in after if key.endswith("relative_position_bias_table")}
    names = [key for key in after if key.startswith(("blocks.", "patch_embed.", "cls_token")) or head_is_kept]
    assert len(names) == len(after) - (0 if head_is_kept else 4)
    moved = {key: float((after[key] - before[key]).abs().max()) for key in names}
    # AdamW's first step moves a weight by its rate, at most 1e-4, and decays it by 5 % of that
    assert 0 < max(moved.values()) < 3e-4 and sum(change > 0 for change in moved.values()) > 0.9 * len(moved)


def test_images_go_on_in_the_statistics_that_the_weights_know(from_official):
    recorded = [
        json.loads((from_official[0] / f"run_{name}" / "provenance.json").read_text())["mean"]
        for name in ("hf_classifier", "v2")
    ]
    assert recorded == [[0.5] * 3, [0.485, 0.456, 0.406]]
    assert read_run(from_official[0] / "run_hf_classifier").mean == (0.5, 0.5, 0.5)


def refusal(arguments):
    done = run_stage("finetune", *arguments, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and done.stderr.endswith(errors[0] + "\n")
    return errors[0]


@pytest.mark.parametrize(
    "setting, words",
    [
        ("model.patch_px=8", "patch_px 16"),
        ("model.width=96", "width 48"),
        ("model.depth=3", "depth 2"),
        ("model.heads=4", "heads 3"),
    ],
)
def test_weights_of_another_size_are_refused_by_name(labelled_sets, pretrained, tmp_path, setting, words):
    message = refusal(start(labelled_sets, tmp_path / "out", f"init.weights={pretrained}", setting))
    assert words in message and setting.partition("=")[0] in message


def test_a_classifier_of_other_classes_is_refused_unless_a_new_head_is_asked_for(
    labelled_sets, runs, small_sets, tmp_path
):
    others = ["model.image_px=32", "model.patch_px=8", f"data.root={small_sets.root}", "data.val_images=images/train"]
    message = refusal(start(labelled_sets, tmp_path / "out", f"init.weights={runs / 'zero3_2'}", *others))
    assert "4 classes" in message and "init.head=new" in message


def test_images_without_labels_are_refused(labelled_sets, real_data, tmp_path):
    images = tmp_path / "raw"
    images.mkdir()
    for path in real_data.imagenet[:8]:
        (images / path.name).symlink_to(path)
    run_stage("pack_images", "--images", images, "--labels", "none", "--out", tmp_path / "unlabelled", "--workers", 1)
    assert "without labels" in refusal(start(labelled_sets, tmp_path / "out", f"data.images={tmp_path / 'unlabelled'}"))
    assert "data.val_images" in refusal(
        start(labelled_sets, tmp_path / "out", f"data.val_images={tmp_path / 'unlabelled'}")
    )


@pytest.mark.parametrize(
    "content, words",
    [
        (b"<!DOCTYPE html><html>sign in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "LFS"),
    ],
)
def test_what_is_no_weights_file_is_refused(labelled_sets, tmp_path, content, words):
    path = tmp_path / "beit.pth"
    path.write_bytes(content)
    assert words.lower() in refusal(start(labelled_sets, tmp_path / "out", f"init.weights={path}")).lower()


def test_an_augmentation_that_timm_does_not_know_is_refused_before_anything_starts(labelled_sets, tmp_path):
    assert "augment.auto_augment" in refusal(start(labelled_sets, tmp_path / "out", "augment.auto_augment=ranf-m9"))


def test_a_dry_run_refuses_what_the_start_would_refuse(labelled_sets, runs, small_sets, tmp_path):
    assert "augment.auto_augment" in refusal(
        [*start(labelled_sets, tmp_path / "out", "augment.auto_augment=ranf-m9"), "--dry_run"]
    )
    assert "images/nowhere" in refusal(
        [*start(labelled_sets, tmp_path / "out", "data.val_images=images/nowhere"), "--dry_run"]
    )
    others = [
        "model.image_px=32",
        "model.patch_px=8",
        f"init.weights={runs / 'zero3_2'}",
        f"data.root={small_sets.root}",
        "data.val_images=images/train",
    ]
    assert "init.head=new" in refusal([*start(labelled_sets, tmp_path / "out", *others), "--dry_run"])


def test_a_checkpoint_that_was_moved_elsewhere_is_still_a_start(runs, tmp_path):
    import shutil

    checkpoint = next((runs / "zero3_2" / "checkpoints").glob("step_*"))
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    ours, theirs = read_run(moved).tensors, read_run(checkpoint).tensors
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_odd_micro_batch_cannot_be_mixed(labelled_sets, tmp_path):
    assert "2 or more" in refusal(start(labelled_sets, tmp_path / "out", "run.micro_batch=1", "run.global_batch=6"))
    assert "use 6 or 8" in refusal(start(labelled_sets, tmp_path / "out", "run.micro_batch=4", "run.global_batch=7"))


def test_a_dry_run_without_images_counts_the_full_size_model(capsys):
    """ViT-H/14 at 448 with 1000 classes: the count of timm's Beit of these sizes."""
    assert finetune.main(["--recipe", "finetune_vith14_448", "--dry_run", "data.root=/nowhere"]) == 0
    text = capsys.readouterr().out
    assert "633.8 M with a head of 1000 classes" in text and "12,511 steps" in text
