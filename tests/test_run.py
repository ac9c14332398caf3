"""What every training loop has around its steps: it reads nothing from the device except where a step logs, and a stop
is the same in every stage.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_stage
from host_reads import LOG_EVERY, STAGES, STEPS
from test_train_tokenizer import SMALL as SMALL_TOKENIZER

from peco_ds.errors import EXIT_DONE, EXIT_REQUEUE
from peco_ds.runtime.checkpoint.files import list_checkpoints
from peco_ds.runtime.metrics import read_evaluation, read_metrics
from peco_ds.runtime.timeline import STARTS_FILE, read_rows

GUARD, AGREE = "step_guard.py:_admits", "distributed.py:agree_on"


@pytest.fixture(scope="module")
def reads(tmp_path_factory) -> dict[str, list]:
    out = tmp_path_factory.mktemp("reads") / "reads.json"
    run_stage("tests/host_reads.py", out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_does_not_log_reads_back_only_what_deepspeed_has_read_and_the_ranks_answers(reads, stage):
    of_step = {step: [who for number, who, _ in reads[stage] if number == step] for step in range(1, STEPS + 1)}
    for step, readers in of_step.items():
        ours = {who for who in readers if who != "deepspeed"}
        if step % LOG_EVERY:
            # on a GPU the answers are those of the step before, already on the host
            assert ours <= {GUARD, AGREE}
        else:
            assert "metrics.py:_means" in ours
        # the norm: DeepSpeed has waited for it a moment before
        if GUARD in readers:
            assert "deepspeed" in readers[: readers.index(GUARD)]


# ------------------------------------------------------------------------------------------- the stop rule

STEPS_OF_STOPPED = 2
SHORT = [
    f"schedule.steps={STEPS_OF_STOPPED}",
    "schedule.warmup_steps=0",
    "schedule.epochs=null",
    "schedule.warmup_epochs=null",
]


@pytest.fixture(scope="module")
def stopped(small_sets, labelled_sets, tmp_path_factory) -> dict[str, tuple[Path, list]]:
    """Stage -> its run folder and the outcomes of three starts: stopped in the last step, started again, and again."""
    folder = tmp_path_factory.mktemp("stopped")
    arguments = {
        "pretrain": ["--recipe", "peco_vitb16", *small_sets.overrides, *SHORT],
        "train_tokenizer": ["--recipe", "peco_tokenizer", f"data.root={small_sets.root}", *SMALL_TOKENIZER, *SHORT],
        "finetune": ["--recipe", "finetune_vitb16", *labelled_sets.overrides, *SHORT],
    }
    config = str(REPOSITORY / "ds_configs" / "zero1.json")
    cases = [
        {
            "stage": stage,
            "arguments": [*of_stage, "--deepspeed_config", config, "--out", str(folder / stage)],
            "stop": STEPS_OF_STOPPED if number == 0 else None,
        }
        for stage, of_stage in arguments.items()
        for number in range(3)
    ]
    listing = folder / "cases.json"
    listing.write_text(json.dumps(cases))
    run_stage("tests/many_runs.py", listing, timeout_s=900)
    codes = json.loads(listing.with_name("cases.json.codes").read_text())
    return {stage: (folder / stage, codes[3 * place : 3 * place + 3]) for place, stage in enumerate(arguments)}


@pytest.mark.parametrize("stage", ("pretrain", "train_tokenizer", "finetune"))
def test_a_stop_in_the_last_step_is_a_stop_and_the_next_start_does_what_is_left(stopped, stage):
    folder, codes = stopped[stage]
    assert codes == [EXIT_REQUEUE, EXIT_DONE, EXIT_DONE]
    assert [path.name for path in list_checkpoints(folder)][0] == f"step_{STEPS_OF_STOPPED:08d}"
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, STEPS_OF_STOPPED + 1)), "no step twice"
    ends = [row["code"] for row in read_rows(folder / STARTS_FILE)[0] if row["event"] == "end"]
    assert ends == [EXIT_REQUEUE, EXIT_DONE, EXIT_DONE]


def test_evaluation_and_release_that_a_stop_left_are_made_by_the_next_start(stopped):
    for stage in ("train_tokenizer", "finetune"):
        assert read_evaluation(stopped[stage][0])[-1]["step"] == STEPS_OF_STOPPED
    assert (stopped["train_tokenizer"][0] / "tokenizer" / "tokenizer.json").is_file()


# --------------------------------------------------------------------------------- a stage from outside


def test_a_training_stage_from_outside_takes_less_than_100_lines_and_has_what_the_others_have(small_sets, tmp_path):
    stage = REPOSITORY / "tests" / "rotation_stage.py"
    assert len(stage.read_text().splitlines()) < 100
    recipe = tmp_path / "rotation.yaml"
    recipe.write_text("name: rotation\nviews: {tokenizer_px: 32}\n")
    settings = (
        "schedule.steps=8 schedule.warmup_steps=2 optim.lr=1e-2 run.precision=fp32 run.global_batch=8 "
        "run.micro_batch=4 run.log_every_steps=1 data.num_workers=0 data.shuffle_window_shards=2"
    ).split()
    whole, half = tmp_path / "whole", tmp_path / "half"
    starts = [(whole, []), (half, ["schedule.stop_at_step=3"]), (half, [])]
    listing = tmp_path / "cases.json"
    common = ["--recipe", str(recipe), f"data.root={small_sets.root}", *settings]
    cases = [{"stage": str(stage), "arguments": [*common, "--out", str(out), *extra]} for out, extra in starts]
    listing.write_text(json.dumps(cases))
    run_stage("tests/many_runs.py", listing, timeout_s=900)
    assert json.loads(listing.with_name("cases.json.codes").read_text()) == [EXIT_DONE] * 3
    rows, continued = read_metrics(whole), read_metrics(half)
    assert len(rows) == 8 and [row["loss"] for row in rows] == [row["loss"] for row in continued]
    assert {"accuracy", "grad_norm", "lr", "images_per_s", "bad_images"} <= rows[-1].keys()
