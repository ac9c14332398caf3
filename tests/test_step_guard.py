"""A bad batch on one rank under every ZeRO stage: skipped on all ranks, counted, and an end when there are too many.

One launch runs all cases.
"""

import json

import pytest
from conftest import REPOSITORY, run_stage

from peco_ds.data.image_set import ImageSet
from peco_ds.runtime.metrics import read_metrics

STAGES = (0, 1, 2, 3)
NAN, SPIKE = float("nan"), 1e6


@pytest.fixture(scope="module")
def runs(small_sets, tmp_path_factory):
    """Two ranks, one pass a step; the fourth step's pass of rank 1 is spoilt. Folder and outcomes."""
    folder = tmp_path_factory.mktemp("guarded")

    persistent = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    # all weights of a small model stay gathered from step to step
    persistent["zero_optimization"]["stage3_param_persistence_threshold"] = 100000
    (folder / "zero3_persistent.json").write_text(json.dumps(persistent))

    def case(name, zero, factor, *extra, passes=(3, 3)):
        config = str((folder if zero == "3_persistent" else REPOSITORY / "ds_configs") / f"zero{zero}.json")
        arguments = [
            "--recipe",
            "peco_vitb16",
            "--deepspeed_config",
            config,
            "--out",
            str(folder / name),
            *small_sets.overrides,
            *extra,
        ]
        return {
            "stage": "pretrain",
            "name": name,
            "arguments": arguments,
            "spoilt": {"rank": 1, "passes": passes, "factor": factor} if factor else None,
        }

    cases = [
        case(f"{kind}_zero{zero}", zero, factor) for kind, factor in (("nan", NAN), ("spike", SPIKE)) for zero in STAGES
    ]
    cases += [case(f"bf16_zero{zero}", zero, NAN, "run.precision=bf16") for zero in STAGES]
    cases += [
        case("unclipped_zero0", 0, SPIKE, "optim.clip_norm=0"),
        case("nan_zero3_persistent", "3_persistent", NAN),
        case("spike_taken", 3, SPIKE, "run.spike_factor=0"),
        case("for_good", 3, NAN, "run.max_skipped_steps=2", "checkpoint.every_steps=2", passes=(3, 99)),
    ]
    listing = folder / "cases.json"
    listing.write_text(json.dumps(cases))
    run_stage(str(REPOSITORY / "tests" / "many_runs.py"), listing, ranks=2, timeout_s=900)
    return folder, dict(
        zip((case["name"] for case in cases), json.loads(listing.with_name(listing.name + ".codes").read_text()))
    )


@pytest.mark.parametrize(
    "name",
    [f"{kind}_zero{zero}" for kind in ("nan", "spike", "bf16") for zero in STAGES]
    + ["unclipped_zero0", "nan_zero3_persistent"],
)
def test_one_ranks_bad_batch_is_skipped_on_all_and_the_run_goes_on(runs, name):
    rows = read_metrics(runs[0] / name)
    assert runs[1][name] == 0 and [row["step"] for row in rows] == list(range(1, 11))
    assert [row["skipped_steps"] for row in rows] == [0] * 3 + [1] * 7
    assert rows[3]["loss"] is None and rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("kind", ("nan", "spike"))
@pytest.mark.parametrize("zero", (0, 1, 2))
def test_what_is_skipped_is_the_same_under_every_zero_stage(runs, kind, zero):
    """Weights, moments and the schedule after a skipped step: whatever one stage did otherwise would show in the losses
    that follow.
    """
    ours, reference = (
        [row["loss"] for row in read_metrics(runs[0] / f"{kind}_zero{stage}") if row["loss"] is not None]
        for stage in (zero, 3)
    )
    assert len(ours) == 9 and ours == pytest.approx(reference, rel=1e-5)


def test_a_skipped_batch_is_as_if_it_had_not_been_there_for_nan_and_spike_alike(runs):
    nan, spike = ([row["loss"] for row in read_metrics(runs[0] / f"{kind}_zero3")] for kind in ("nan", "spike"))
    assert nan == spike


def test_a_spike_is_taken_where_the_setting_says_so(runs):
    rows = read_metrics(runs[0] / "spike_taken")
    assert rows[-1]["skipped_steps"] == 0 and rows[3]["grad_norm"] > 1e4


def test_a_run_whose_batches_stay_bad_ends_naming_step_rank_and_samples_and_keeps_its_checkpoint(runs, small_sets):
    said = runs[1]["for_good"]
    assert (
        said.startswith("step 6: rank 1: loss nan, samples ")
        and "3 of the last 6 steps were skipped" in said
        and "run.max_skipped_steps 2" in said
    )
    images = ImageSet(small_sets.root / "images" / "train")
    assert any(images.key(sample) in said for sample in range(images.num_samples))
    assert [folder.name for folder in sorted((runs[0] / "for_good" / "checkpoints").glob("step_*"))] == [
        "step_00000002",
        "step_00000004",
    ]
