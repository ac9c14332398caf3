"""A run neither saves nor goes on from a state that is not finite, and one that took no step is no success.

One launch of one rank and one of two run all cases.
"""

import json

import pytest
from conftest import REPOSITORY, run_stage
from drawn_objects import make_drawn_sets
from scene_samples import make_scenes
from test_train_tokenizer import SMALL as SMALL_TOKENIZER

from peco_ds.runtime.metrics import read_evaluation, read_metrics

STEPS = 4
SHORT = [f"schedule.steps={STEPS}", "schedule.warmup_steps=0", "checkpoint.every_steps=2"]
PARTS = {
    "weights": ("pretrain", "the weights"),
    "moments": ("pretrain", "the optimiser's state"),
    "average": ("finetune", "the moving average of the weights"),
    "codebook.ema_sum": ("train_tokenizer", "a buffer of the model"),
}


OF_OLD = ("weights", "average")


@pytest.fixture(scope="module")
def starts(small_sets, labelled_sets, real_data, tmp_path_factory):
    """Folder of the runs, and what each start of each said: (name, number of the start) -> code or refusal."""
    folder = tmp_path_factory.mktemp("finite")
    arguments = {
        "pretrain": ["--recipe", "peco_vitb16", *small_sets.overrides],
        "train_tokenizer": ["--recipe", "peco_tokenizer", f"data.root={small_sets.root}", *SMALL_TOKENIZER],
        "finetune": ["--recipe", "finetune_vitb16", *labelled_sets.overrides],
        "segment": ["--recipe", "segment_vitb16", *make_scenes(real_data, tmp_path_factory.mktemp("scenes"))],
        "detect": ["--recipe", "detect_vitb16", *make_drawn_sets(tmp_path_factory.mktemp("drawn")).overrides],
    }

    def start(stage, name, *extra, zero=1, **faults):
        config = str(REPOSITORY / "ds_configs" / f"zero{zero}.json")
        given = [*arguments[stage], *SHORT, *extra, "--deepspeed_config", config, "--out", str(folder / name)]
        return {"stage": stage, "name": name, "arguments": given, **faults}

    listed = {1: [], 2: []}
    for part, (stage, _) in PARTS.items():
        listed[1] += [start(stage, part, poisoned={"part": part, "step": STEPS}), start(stage, part)]
    for part in OF_OLD:
        stage, name = PARTS[part][0], f"{part} of old"
        fault = {"part": part, "step": 2}
        listed[1] += [start(stage, name, "schedule.stop_at_step=3", poisoned=fault, unchecked=True)]
        listed[1] += [start(stage, name)]
    every_pass = {"rank": 0, "passes": (0, 99), "factor": float("nan")}
    for stage in arguments:
        listed[1] += [start(stage, f"none of {stage}", spoilt=every_pass)]
    one_is_taken = {"rank": 0, "passes": (2, 99), "factor": float("nan")}
    listed[1] += [start("pretrain", "one", spoilt=one_is_taken)]
    listed[2] += [start("pretrain", "zero3", zero=3, poisoned={"part": "weights", "step": STEPS})]
    said: dict = {}
    for ranks, cases in listed.items():
        listing = folder / f"{ranks}.json"
        listing.write_text(json.dumps(cases))
        run_stage("tests/many_runs.py", listing, ranks=ranks, timeout_s=900)
        for case, code in zip(cases, json.loads(listing.with_name(f"{ranks}.json.codes").read_text()), strict=True):
            number = sum(name == case["name"] for name, _ in said)
            said[case["name"], number] = code
    return folder, said


def checkpoints(run_folder) -> list[str]:
    return sorted(path.name for path in (run_folder / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("part", PARTS)
def test_a_state_that_is_not_finite_is_not_saved_and_the_run_goes_on_from_the_one_before(starts, part):
    folder, said = starts
    refusal = said[part, 0]
    assert refusal.startswith(f"step 4: {PARTS[part][1]} of rank 0 hold values that are not finite"), refusal
    assert "step_00000002 stands" in refusal
    assert said[part, 1] == 0 and checkpoints(folder / part) == ["step_00000002", "step_00000004"]
    assert [row["step"] for row in read_metrics(folder / part)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("part", OF_OLD)
def test_a_run_does_not_go_on_from_a_checkpoint_that_is_not_finite(starts, part):
    """Saved by a release that did not look."""
    folder, said = starts
    refusal = said[f"{part} of old", 1]
    assert f": {PARTS[part][1]} of rank 0 hold values that are not finite, so no run goes on" in refusal, refusal
    assert len(read_metrics(folder / f"{part} of old")) == 3


def test_what_one_rank_finds_ends_all_of_them(starts):
    assert starts[1]["zero3", 0].startswith("step 4: the weights of rank 0 hold values that are not finite")


@pytest.mark.parametrize("stage", ["pretrain", "train_tokenizer", "finetune", "segment", "detect"])
def test_a_run_that_skipped_every_step_ends_with_an_error_and_has_no_score_and_no_release(starts, stage):
    folder, said = starts
    run_folder = folder / f"none of {stage}"
    assert said[run_folder.name, 0].startswith(f"none of the {STEPS} steps was taken"), said[run_folder.name, 0]
    assert not any(row["step"] == STEPS for row in read_evaluation(run_folder))
    assert not (run_folder / "tokenizer").exists()


def test_a_run_that_took_one_step_is_a_run(starts):
    folder, said = starts
    assert said["one", 0] == 0 and read_metrics(folder / "one")[-1]["skipped_steps"] == STEPS - 1
