"""Masked pre-training through DeepSpeed on CPU: the matrix ZeRO x ranks x precision, accumulation, resume, init,
conversion.

One launch of one rank and one of two run all cases; each test looks at what its cases left behind.
"""

import json

import pytest
import yaml
from conftest import REPOSITORY, run_stage
from deepspeed.accelerator import get_accelerator

from peco_ds.runtime.metrics import read_metrics

STAGES = (0, 1, 2, 3)


def case(small_sets, folder, name, *, recipe="peco_vitb16", zero=3, extra=(), statistics=False):
    config = zero if isinstance(zero, str) else str(REPOSITORY / "ds_configs" / f"zero{zero}.json")
    arguments = [
        "--recipe",
        recipe,
        "--deepspeed_config",
        config,
        "--out",
        str(folder / name),
        *small_sets.overrides,
        *extra,
    ]
    return {
        "stage": "pretrain",
        "arguments": arguments,
        "statistics": str(folder / f"{name}.statistics.json") if statistics else None,
    }


@pytest.fixture(scope="module")
def runs(small_sets, tmp_path_factory):
    """Folder of run folders `NAME_RANKS`, and the exit code of each run."""
    folder, codes = tmp_path_factory.mktemp("runs"), {}
    for ranks in (1, 2):
        # First of its process: once a ZeRO-3 engine was made there, DeepSpeed's own linear layer stands in for torch's,
        # and it takes any type.
        cases = {"bf16_alone": case(small_sets, folder, f"bf16_alone_{ranks}", zero=1, extra=["run.precision=bf16"])}
        cases |= {
            f"zero{stage}": case(small_sets, folder, f"zero{stage}_{ranks}", zero=stage, statistics=ranks == 2)
            for stage in STAGES
        }
        if ranks == 1:
            cases["micro8"] = case(small_sets, folder, "micro8_1", extra=["run.micro_batch=8"])
            cases["micro2"] = case(small_sets, folder, "micro2_1", extra=["run.micro_batch=2"])
            cases["online"] = case(small_sets, folder, "online_1", extra=["data.tokens=online"])
        else:
            cases["bf16"] = case(small_sets, folder, "bf16_2", extra=["run.precision=bf16"])
            cases["bf16_zero1"] = case(small_sets, folder, "bf16_zero1_2", zero=1, extra=["run.precision=bf16"])
            # the tensors of a small model all lie below the persistence threshold: at 0 every weight is gathered, used
            # and released
            config = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            (folder / "gathered.json").write_text(json.dumps(config))
            cases["gathered"] = case(small_sets, folder, "gathered_2", zero=str(folder / "gathered.json"))
            cases["gathered_checkpointed"] = case(
                small_sets,
                folder,
                "gathered_checkpointed_2",
                zero=str(folder / "gathered.json"),
                extra=["run.activation_checkpointing=full"],
            )
            cases["checkpointed"] = case(
                small_sets, folder, "checkpointed_2", extra=["run.activation_checkpointing=full"]
            )
            stochastic = ["model.drop_path=0.3", "checkpoint.every_steps=3"]
            cases["whole"] = case(small_sets, folder, "whole_2", extra=stochastic)
            cases["half"] = case(small_sets, folder, "half_2", extra=[*stochastic, "schedule.stop_at_step=5"])
            cases["rest"] = case(small_sets, folder, "half_2", extra=stochastic)
            sixteen = ["run.precision=bf16", "run.micro_batch=2"]
            cases["half16"] = case(small_sets, folder, "half16_2", zero=1, extra=[*sixteen, "schedule.stop_at_step=5"])
            cases["rest16"] = case(small_sets, folder, "half16_2", zero=1, extra=sixteen)
            cases["whole16"] = case(small_sets, folder, "whole16_2", zero=1, extra=sixteen)
            cases["over"] = case(small_sets, folder, "over_2", extra=["schedule.stop_at_step=6"])
            cases["over_again"] = case(
                small_sets,
                folder,
                "over_2",
                extra=["checkpoint.resume=never", "schedule.stop_at_step=2", "optim.lr=1e-4"],
            )
            cases["again"] = case(small_sets, folder, "half_2", extra=stochastic)
        listing = folder / f"cases_{ranks}.json"
        listing.write_text(json.dumps(list(cases.values())))
        # the two ranks by the true torchrun
        run_stage("tests/many_runs.py", listing, ranks=ranks, timeout_s=1800, fresh=ranks == 2)
        codes |= {
            f"{name}_{ranks}": code
            for name, code in zip(cases, json.loads((folder / f"cases_{ranks}.json.codes").read_text()))
        }
    return folder, codes


def losses(runs, name):
    return [row["loss"] for row in read_metrics(runs[0] / name)]


def largest_difference(a, b):
    assert len(a) == len(b) == 10
    return max(abs(x - y) / abs(y) for x, y in zip(a, b))


def test_the_loss_falls_on_real_images(runs):
    curve = losses(runs, "zero3_1")
    assert sum(curve[-3:]) < sum(curve[:3]) - 0.3


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("zero", STAGES)
def test_every_zero_stage_at_one_and_two_ranks_gives_the_same_losses(runs, zero, ranks):
    # float32, 10 steps; measured worst case 1.2e-7: sums over ranks and buckets are taken in another order
    assert largest_difference(losses(runs, f"zero{zero}_{ranks}"), losses(runs, "zero0_1")) < 2e-6


@pytest.mark.parametrize("name", ("gathered_2", "gathered_checkpointed_2"))
def test_zero3_that_gathers_every_weight_trains_as_one_that_keeps_them(runs, name):
    assert losses(runs, name) == losses(runs, "zero3_2")


@pytest.mark.parametrize("name", ["zero1_1", "zero2_2", "zero3_1", "zero3_2", "gathered_2"])
def test_weights_consolidated_from_any_zero_stage_are_the_ones_that_were_trained(runs, name):
    """ZeRO-0 saves whole modules, nothing is put together there.

    Equal losses mean equal weights, so the others must agree with it.
    """
    import torch

    from peco_ds.runtime.checkpoint.consolidate import fp32_weights
    from peco_ds.runtime.checkpoint.files import list_checkpoints

    found, reference = (fp32_weights(list_checkpoints(runs[0] / run)[0]) for run in (name, "zero0_1"))
    assert found.keys() == reference.keys()
    for key, tensor in reference.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-5, msg=key)


@pytest.mark.parametrize("name", ("micro8_1", "micro2_1"))
def test_accumulation_gives_the_update_of_the_undivided_batch(runs, name):
    assert largest_difference(losses(runs, name), losses(runs, "zero3_1")) < 2e-6


def test_codes_computed_online_give_the_losses_of_stored_ones(runs):
    assert losses(runs, "online_1") == losses(runs, "zero3_1")


def test_activation_checkpointing_changes_no_loss(runs):
    assert losses(runs, "checkpointed_2") == losses(runs, "zero3_2")


@pytest.mark.parametrize("name", ("bf16_2", "bf16_zero1_2", "bf16_alone_1", "bf16_alone_2"))
def test_sixteen_bit_training_follows_the_float32_curve(runs, name):
    # 8 bits of mantissa; measured worst case 3e-4
    assert largest_difference(losses(runs, name), losses(runs, "zero3_2")) < 0.005


@pytest.mark.parametrize("precision", ("", "16"))
def test_a_run_that_was_stopped_continues_bit_for_bit(runs, precision):
    """With stochastic depth: random states, order, optimiser and schedule all have to come back."""
    folder, codes = runs
    assert codes["half_2"] == codes["rest_2"] == codes["whole_2"] == 0
    whole, resumed = read_metrics(folder / f"whole{precision}_2"), read_metrics(folder / f"half{precision}_2")
    assert [row["step"] for row in resumed] == list(range(1, 11)), "no step missing, none twice"
    for name in ("loss", "accuracy", "lr", "grad_norm"):
        assert [row[name] for row in resumed] == [row[name] for row in whole]


def test_a_run_started_over_owns_the_newest_checkpoint(runs):
    from peco_ds.runtime.checkpoint.files import list_checkpoints

    folder = runs[0] / "over_2"
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000002"]
    assert len(list((folder / "checkpoints").glob("set_aside_step_00000006_*"))) == 1, "nothing is lost"
    assert [row["step"] for row in read_metrics(folder)] == [1, 2]


def test_starting_a_finished_run_again_trains_nothing_and_says_done(runs):
    folder, codes = runs
    assert codes["again_2"] == 0 and len(read_metrics(folder / "half_2")) == 10


@pytest.mark.parametrize("zero", STAGES)
def test_initial_weights_are_depth_scaled_under_every_zero_stage(runs, zero):
    found = json.loads((runs[0] / f"zero{zero}_2.statistics.json").read_text())
    reference = json.loads((runs[0] / "zero0_2.statistics.json").read_text())
    assert found == pytest.approx(reference, rel=1e-5)
    for name in ("attn.proj", "mlp.fc2"):
        # std 0.02 cut at one standard deviation is 0.0108; 48 x 48 weights say it to a few percent
        for number in (1, 2):
            assert found[f"backbone.blocks.{number - 1}.{name}.weight"] == pytest.approx(
                0.02 * 0.5396 / (2 * number) ** 0.5, rel=0.06
            )


def test_the_run_folder_tells_what_ran(runs):
    folder = runs[0] / "zero3_2"
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    assert settings["stage"] == "pretrain" and settings["recipe"]["model"]["depth"] == 2
    assert settings["sources"]["model.depth"] == "command line" and settings["sources"]["data.tokens"] == "command line"
    deepspeed = json.loads((folder / "deepspeed.json").read_text())
    assert (
        deepspeed["train_batch_size"],
        deepspeed["train_micro_batch_size_per_gpu"],
        deepspeed["gradient_accumulation_steps"],
    ) == (8, 4, 1)
    assert (
        deepspeed["gradient_clipping"] == 3.0
        and deepspeed["zero_optimization"]["stage"] == 3
        and "optimizer" not in deepspeed
    )
    provenance = json.loads((folder / "provenance.json").read_text())
    assert (
        len(provenance["tokenizer_fingerprint"]) == 64
        and provenance["num_samples"] == 96
        and "deepspeed" in provenance["versions"]
    )
    row = read_metrics(folder)[-1]
    assert {
        "step",
        "images",
        "epoch",
        "loss",
        "accuracy",
        "lr",
        "grad_norm",
        "images_per_s",
        "step_s",
        "data_wait_s",
        "memory_gib",
    } <= row.keys()
    assert list((folder / "tensorboard").iterdir())


@pytest.mark.parametrize("name", ["zero0_1", "zero2_2", "zero3_1", "bf16_2"])
def test_any_zero_stage_and_number_of_ranks_converts_to_a_release_that_timm_loads(runs, name, tmp_path):
    """convert_checkpoint itself compares features with timm's in a process that cannot import peco_ds, and exits 2
    beyond 1e-5.
    """
    import numpy as np
    import timm
    import torch

    done = run_stage("convert_checkpoint", runs[0] / name, "--to", "timm", "--out", tmp_path / "release")
    assert "features in timm equal our own model's" in done.stdout
    model = timm.create_model(f"local-dir:{tmp_path / 'release'}", pretrained=True)
    assert np.isfinite(model(torch.randn(1, 3, 64, 64)).detach().numpy()).all()
    if name != "zero3_1":
        return
    classifier = timm.create_model(f"local-dir:{tmp_path / 'release'}", pretrained=True, num_classes=10)
    assert classifier(torch.randn(1, 3, 64, 64)).shape == (1, 10)
    card = (tmp_path / "release" / "README.md").read_text()
    assert json.loads((runs[0] / name / "provenance.json").read_text())["tokenizer_fingerprint"] in card


def test_a_damaged_checkpoint_is_passed_over_and_one_alone_refused(runs, tmp_path):
    import shutil

    from peco_ds.runtime.checkpoint.files import list_checkpoints, newest_whole, verify

    shutil.copytree(runs[0] / "whole_2", tmp_path / "run")
    newest, older = list_checkpoints(tmp_path / "run")  # keep_last 2: steps 10 and 9
    assert (newest.name, older.name) == ("step_00000010", "step_00000009")
    victim = next(newest.glob("*optim_states.pt"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert victim.name in verify(newest)
    assert newest_whole(tmp_path / "run") == older
    done = run_stage("convert_checkpoint", newest, "--to", "timm", "--out", tmp_path / "release", check=False)
    assert done.returncode == 2 and "damaged" in done.stderr and not (tmp_path / "release" / "config.json").exists()
    next(older.glob("*optim_states.pt")).unlink()
    assert newest_whole(tmp_path / "run") is None
    (newest / "manifest.json").unlink()
    assert "manifest.json" in verify(newest), "one without a manifest is named, not overlooked"


def test_fp16_on_a_cpu_without_it_is_refused_in_one_line(small_sets, tmp_path):
    done = run_stage(
        "pretrain", *case(small_sets, tmp_path, "fp16", zero=1)["arguments"], "run.precision=fp16", check=False
    )
    # Some CPUs have it, for some versions of torch; there it trains.
    if get_accelerator().is_fp16_supported():
        assert done.returncode == 0
    else:
        assert done.returncode == 2 and "use bf16 or fp32" in done.stderr.splitlines()[-1]


# ------------------------------------------------------------------------------------------ the family

# a recipe, and what makes it fit the small sets
FAMILY = {
    "beit_vitb16": "data.tokens=online",
    "mcbeit_vitb16": "data.tokens=tokens/soft views.topk=8 views.topk_temperature=0.2 mask.count=12",
    "beitv2_vitb16": "data.tokens=online aggregation.early_block=1",
    "peco_vith14_visible": "data.tokens=online encoding.decoder_width=24 encoding.decoder_depth=1 "
    "encoding.decoder_heads=3 mask.count=12",
}


@pytest.fixture(scope="module")
def family(small_sets, tmp_path_factory):
    """As `runs`, two ranks and ZeRO-3: each recipe whole, and stopped and continued, with stochastic depth."""
    folder = tmp_path_factory.mktemp("family")
    run_stage("tokenize_shards", "--recipe", "mcbeit_vitb16", *small_sets.overrides, *FAMILY["mcbeit_vitb16"].split())
    config = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "gathered.json").write_text(json.dumps(config))
    cases = []
    for recipe, overrides in FAMILY.items():
        extra = [*overrides.split(), "model.drop_path=0.3"]
        cases.append(case(small_sets, folder, f"{recipe}_whole", recipe=recipe, extra=extra))
        cases.append(
            case(small_sets, folder, f"{recipe}_half", recipe=recipe, extra=[*extra, "schedule.stop_at_step=5"])
        )
        cases.append(case(small_sets, folder, f"{recipe}_half", recipe=recipe, extra=extra))
        cases.append(
            case(small_sets, folder, f"{recipe}_bf16", recipe=recipe, zero=1, extra=[*extra, "run.precision=bf16"])
        )
        recomputed = [*extra, "run.activation_checkpointing=full"]
        cases.append(
            case(
                small_sets,
                folder,
                f"{recipe}_gathered",
                recipe=recipe,
                zero=str(folder / "gathered.json"),
                extra=recomputed,
            )
        )
    online = [*FAMILY["mcbeit_vitb16"].split(), "data.tokens=online", "model.drop_path=0.3"]
    cases.append(case(small_sets, folder, "mcbeit_online", recipe="mcbeit_vitb16", extra=online))
    listing = folder / "cases.json"
    listing.write_text(json.dumps(cases))
    run_stage(str(REPOSITORY / "tests" / "many_runs.py"), listing, ranks=2, timeout_s=900)
    codes = json.loads((folder / "cases.json.codes").read_text())
    assert codes == [0] * len(cases), codes
    return folder


def family_losses(family, name):
    return [row["loss"] for row in read_metrics(family / name)]


@pytest.mark.parametrize("name", FAMILY)
def test_every_member_of_the_family_learns_on_real_images_and_continues_bit_for_bit(family, name):
    whole = family_losses(family, f"{name}_whole")
    assert len(whole) == 10 and sum(whole[-3:]) < sum(whole[:3]) - 0.1
    assert family_losses(family, f"{name}_half") == whole


@pytest.mark.parametrize("name", FAMILY)
def test_a_member_whose_every_weight_is_gathered_and_whose_blocks_are_recomputed_trains_the_same(family, name):
    assert family_losses(family, f"{name}_gathered") == family_losses(family, f"{name}_whole")


@pytest.mark.parametrize("name", FAMILY)
def test_a_member_in_bf16_follows_its_curve_in_fp32(family, name):
    assert family_losses(family, f"{name}_bf16") == pytest.approx(family_losses(family, f"{name}_whole"), rel=3e-3)


def test_soft_codes_computed_online_give_the_losses_of_stored_ones(family):
    # The tokenizer sees other batches, so a probability may fall on the other side of a rounding to 16 bits.
    assert family_losses(family, "mcbeit_online") == pytest.approx(
        family_losses(family, "mcbeit_vitb16_whole"), rel=1e-4
    )


def test_both_branches_and_the_kept_mass_are_reported(family):
    row = read_metrics(family / "beitv2_vitb16_whole")[-1]
    assert (
        row["loss"] == pytest.approx(row["mim_loss"] + row["aggregated_loss"], rel=1e-5)
        and 0 <= row["aggregated_accuracy"] <= 1
    )
    # 8 of 64 codes hold at least an eighth, and less than all
    assert 0.125 <= read_metrics(family / "mcbeit_vitb16_whole")[-1]["kept_mass"] < 0.999


@pytest.mark.parametrize("name", FAMILY)
def test_a_release_of_any_member_is_a_backbone_that_timm_loads_and_a_classifier_starts_from(
    family, name, tmp_path, capsys
):
    """What only pre-training needs is left behind, and said."""
    import timm
    import torch
    from safetensors.torch import load_file

    from peco_ds import convert_checkpoint
    from peco_ds.config import ClassifierSettings
    from peco_ds.convert.initialize import start_classifier
    from peco_ds.models.classifier import build_classifier
    from peco_ds.runtime.run_weights import read_run

    assert (
        convert_checkpoint.main([str(family / f"{name}_whole"), "--to", "timm", "--out", str(tmp_path / "release")])
        == 0
    )
    assert "features in timm equal our own model's" in capsys.readouterr().out
    tensors = load_file(tmp_path / "release" / "model.safetensors")
    assert {tensor.split(".")[0] for tensor in tensors} == {"cls_token", "patch_embed", "blocks", "norm"} and not [
        tensor for tensor in tensors if tensor.startswith("blocks.2")
    ]
    assert (tmp_path / "release" / "mim_head.safetensors").exists() == (name != "peco_vith14_visible"), (
        "the decoder's head works on the decoder's tokens"
    )
    card = (tmp_path / "release" / "README.md").read_text()
    left = {"beitv2_vitb16": "aggregation_blocks (", "peco_vith14_visible": "decoder ("}
    assert left.get(name, "| objective |") in card and ("left out" in card) == (name in left)
    assert timm.create_model(f"local-dir:{tmp_path / 'release'}", pretrained=True, num_classes=10)(
        torch.randn(1, 3, 64, 64)
    ).shape == (1, 10)

    weights = read_run(family / f"{name}_whole")
    fresh = start_classifier(
        build_classifier(weights.model, ClassifierSettings(), 3),
        weights,
        weights.model,
        classes=("a", "b", "c"),
        head="auto",
    )
    assert set(fresh) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}


def test_a_visible_run_goes_to_transformers_as_features_and_unilm_has_no_model_for_it(family, tmp_path, capsys):
    from peco_ds import convert_checkpoint
    from peco_ds.errors import UserError

    source = str(family / "peco_vith14_visible_whole")
    assert convert_checkpoint.main([source, "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert "features in transformers equal our own model's" in capsys.readouterr().out
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["BeitModel"]
    with pytest.raises(UserError, match="unilm has no model for; convert it to timm or hf"):
        convert_checkpoint.main([source, "--to", "unilm", "--out", str(tmp_path / "unilm")])
