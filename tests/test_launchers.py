"""Launcher files by themselves; test_slurm.py runs them under Slurm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from peco_ds.config import RECIPES

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHERS = REPOSITORY / "launchers"
BATCH_FILES = sorted(LAUNCHERS.glob("*.sbatch"))
SHELL_FILES = sorted([*BATCH_FILES, *LAUNCHERS.glob("*.sh"), LAUNCHERS / "cluster.env", REPOSITORY / "tests" / "run.sh", REPOSITORY / ".ci" / "run"])


def directives(path: Path) -> dict[str, str]:
    lines = [line.split() for line in path.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert all(len(line) == 2 for line in lines), f"{path.name}: one option a line"
    return dict((option.split("=", 1) + [""])[:2] for _, option in lines)


def shell(*arguments: str | Path, cwd: Path = REPOSITORY, **env: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "PECO_"))}
    return subprocess.run([str(a) for a in arguments], cwd=cwd, env=environment | env, text=True, capture_output=True, timeout=60)


def test_there_is_a_launcher_for_every_stage_of_the_way_from_pictures_to_release():
    assert {path.stem for path in BATCH_FILES} >= {
        *("prepare_data", "train_tokenizer", "tokenize", "tokenize_finish", "convert"),
        *("pretrain_vitb", "pretrain_vitl", "pretrain_vith"),
    }


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_bash_can_parse(path):
    done = shell("bash", "-n", path)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("path", BATCH_FILES, ids=lambda path: path.name)
def test_every_job_can_be_requeued_is_warned_and_goes_on_in_one_log(path):
    found = directives(path)
    assert "--requeue" in found
    assert found["--open-mode"] == "append", "a restart would wipe out what the job said before"
    assert found["--signal"] == "USR2@120", "with a B: the batch script would get the signal and the stage none"
    assert found["--output"].endswith(".log") and "/" not in found["--output"], "sbatch makes no folders: the log would be lost"
    assert {"--nodes", "--time", "--job-name"} <= found.keys()


@pytest.mark.parametrize("path", BATCH_FILES, ids=lambda path: path.name)
def test_what_belongs_to_the_cluster_stands_in_no_launcher(path):
    assert not {"--partition", "--account", "--qos", "--constraint", "--reservation"} & directives(path).keys()


@pytest.mark.parametrize("path", BATCH_FILES, ids=lambda path: path.name)
def test_every_launcher_passes_its_arguments_on_and_starts_a_stage_and_recipe_that_exist(path):
    text = path.read_text()
    assert text.rstrip().endswith('"$@"'), "arguments after the script's name must come last, so that they win"
    stages = re.findall(r"peco_ds/(\w+)\.py", text) + re.findall(r"-m peco_ds\.(\w+)", text)
    assert stages and all((REPOSITORY / "peco_ds" / f"{stage}.py").is_file() for stage in stages), stages
    recipes = re.findall(r"^\s*[^#\n].*--recipe (\w+)", text, flags=re.MULTILINE)
    assert all((RECIPES / f"{recipe}.yaml").is_file() for recipe in recipes), recipes


def test_an_array_launcher_writes_a_log_for_each_task():
    arrays = [path for path in BATCH_FILES if "--array" in directives(path)]
    assert arrays and all("%a" in directives(path)["--output"] for path in arrays)


@pytest.fixture
def recording_sbatch(tmp_path):
    """A PATH whose sbatch and scancel write down their command lines; sbatch fails from the job named in `fail_at` on."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text(
        f'#!/bin/bash\nid=$(($(wc -l < {tools}/sbatch.log) + 1))\n[ "$id" != "${{FAIL_AT:-}}" ] || exit 1\n'
        f"printf '%s|' \"$SBATCH_PARTITION\" \"$@\" >> {tools}/sbatch.log\necho >> {tools}/sbatch.log\necho $id\n"
    )
    (tools / "scancel").write_text(f'#!/bin/bash\necho "$*" >> {tools}/scancel.log\n')
    (tools / "sbatch.log").touch()
    for tool in ("sbatch", "scancel"):
        (tools / tool).chmod(0o755)
    return tools


def pipeline(tools: Path, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess:
    return shell("bash", LAUNCHERS / "pipeline.sh", *arguments, cwd=tools.parent, PATH=f"{tools}:{os.environ['PATH']}", **env)


def test_pipeline_chains_every_job_to_the_one_before_and_cancels_what_cannot_run(recording_sbatch, tmp_path):
    done = pipeline(recording_sbatch, tmp_path, tmp_path / "out", "vitl")
    assert done.returncode == 0, done.stderr
    submitted = (recording_sbatch / "sbatch.log").read_text().splitlines()
    assert [int(line.split()[1]) for line in done.stdout.splitlines()] == list(range(1, len(submitted) + 1))
    assert "--dependency" not in submitted[0]
    for before, line in enumerate(submitted[1:], start=1):
        assert f"|--dependency=afterok:{before}|--kill-on-invalid-dep=yes|" in line


def test_pipeline_keeps_folder_names_with_spaces_in_one_piece(recording_sbatch, tmp_path):
    (tmp_path / "my pictures").mkdir()
    done = pipeline(recording_sbatch, "my pictures", "my run")
    assert done.returncode == 0, done.stderr
    submitted = (recording_sbatch / "sbatch.log").read_text().splitlines()
    assert f"|--images|{tmp_path}/my pictures|--out|{tmp_path}/my run/images|" in submitted[0]
    assert f"|data.tokens={tmp_path}/my run/tokens|" in submitted[2]


def test_pipeline_takes_back_what_it_submitted_when_a_later_job_is_refused(recording_sbatch, tmp_path):
    done = pipeline(recording_sbatch, tmp_path, tmp_path / "out", FAIL_AT="3")
    assert done.returncode != 0
    assert (recording_sbatch / "scancel.log").read_text().split() == ["1", "2"]


@pytest.mark.parametrize(
    "arguments, word",
    [
        ([], "IMAGES_DIR"),
        (["nowhere", "out"], "nowhere"),
        ([".", "out", "vitg"], "vitg"),
        ([".", "out", "vitb", "model.depth=2"], "model.depth=2"),
    ],
)
def test_pipeline_refuses_bad_arguments_in_one_line_and_submits_nothing(recording_sbatch, arguments, word):
    done = pipeline(recording_sbatch, *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and word in done.stderr
    assert not (recording_sbatch / "sbatch.log").read_text()


def test_cluster_settings_reach_sbatch_and_a_variable_of_the_environment_wins_in_the_job(recording_sbatch, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(LAUNCHERS, home / "launchers")
    settings = home / "launchers" / "cluster.env"
    settings.write_text(settings.read_text().replace("# export SBATCH_PARTITION=gpu", "export SBATCH_PARTITION=gpu"))
    done = shell(
        "bash", home / "launchers" / "pipeline.sh", tmp_path, tmp_path / "out", cwd=tmp_path, PATH=f"{recording_sbatch}:{os.environ['PATH']}"
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("gpu|") for line in (recording_sbatch / "sbatch.log").read_text().splitlines())
    script = f"set -eu; source {settings}; echo $PECO_HOME $PECO_DATA_ROOT $PECO_RUNS_ROOT"
    seen = shell("bash", "-c", script, SLURM_JOB_ID="1", PECO_DATA_ROOT="/elsewhere")
    assert seen.stdout.split() == [str(home), "/elsewhere", f"{home}/runs"], seen.stderr


def task(tmp_path: Path, command: str) -> tuple[int, str]:
    """Exit code of task.sh around a command, and the code it left for the launcher."""
    left = tmp_path / "exit"
    done = shell("bash", LAUNCHERS / "task.sh", "bash", "-c", command, PECO_EXIT_FILE=str(left))
    return done.returncode, left.read_text().strip() if left.exists() else ""


def test_a_task_that_stopped_in_good_order_does_not_look_like_a_failure_to_srun(tmp_path):
    assert task(tmp_path, "exit 75") == (0, "75")


def test_a_task_that_fails_keeps_its_code_and_the_first_code_stands(tmp_path):
    assert task(tmp_path, "exit 2") == (2, "2")
    assert task(tmp_path, "kill -9 $$") == (137, "2")


def test_a_signal_to_the_whole_task_leaves_the_answer_to_the_stage(tmp_path):
    command = "trap 'sleep 0.2; exit 75' USR2; kill -USR2 $PPID; kill -USR2 $$; sleep 5"
    assert task(tmp_path, command) == (0, "75")
