"""What every training loop does around its steps must not make the host wait for the device, except where a step
logs.
"""

from __future__ import annotations

import json

import pytest
from conftest import run_stage
from host_reads import LOG_EVERY, STAGES, STEPS

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
