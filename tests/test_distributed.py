import os
import subprocess
import sys

import pytest

from peco_ds.runtime.distributed import _translate_environment, local_size

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}


@pytest.fixture
def environment(monkeypatch):
    def set_to(**values):
        monkeypatch.setattr(os, "environ", dict(values))
        _translate_environment()
        return os.environ

    return set_to


def test_a_task_of_srun_is_a_rank(environment):
    env = environment(**SLURM, SLURM_STEP_ID="0", MASTER_ADDR="node1", MASTER_PORT="12345")
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["MASTER_ADDR"], env["MASTER_PORT"]) == (
        "5",
        "1",
        "8",
        "node1",
        "12345",
    )
    assert local_size() == 4


def test_all_tasks_of_a_job_agree_on_a_port_where_the_launcher_gave_none(environment):
    assert (
        environment(**SLURM, SLURM_STEP_ID="0")["MASTER_PORT"]
        == environment(**{**SLURM, "SLURM_PROCID": "2"}, SLURM_STEP_ID="0")["MASTER_PORT"]
    )


def test_a_plain_start_inside_a_batch_script_is_one_process(environment):
    """The batch script sees SLURM_NTASKS too; waiting for tasks that nobody started would hang."""
    env = environment(**SLURM)
    assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_what_torchrun_or_deepspeed_wrote_is_left_alone(environment):
    env = environment(
        **SLURM, SLURM_STEP_ID="0", RANK="3", LOCAL_RANK="3", WORLD_SIZE="4", MASTER_ADDR="a", MASTER_PORT="1"
    )
    assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_PORT"]) == ("3", "4", "1")


def test_a_start_that_compiles_nothing_does_not_load_the_compiler_and_one_that_compiles_still_can():
    code = """
import os, sys
import peco_ds.runtime.distributed
import torch
from deepspeed.runtime.zero.utils import is_zero_supported_optimizer
import deepspeed.comm
deepspeed.comm.get_rank = lambda: 1
assert is_zero_supported_optimizer(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
assert "torch._inductor.compile_fx" not in sys.modules and "TORCHDYNAMO_DISABLE" not in os.environ
compiled = torch.compile(lambda x: x + 1, backend="eager")
assert compiled(torch.zeros(1)).item() == 1
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
"""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    environment.pop("TORCHDYNAMO_DISABLE", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
