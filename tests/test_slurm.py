"""Launchers under a real Slurm: virtual nodes on this host.

Stand-in stages show how a stage is started and what its end does to the
job; the last tests run the real ones, also through a requeue, a time limit and the loss of a node."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import run_stage
from scene_samples import CLASSES, photographs, write_scene
from slurm_cluster import FINISHED, PATIENCE, SlurmCluster, missing_programs, slurm_cluster

from peco_ds.runtime.timeline import STARTS_FILE, read_evaluation, read_metrics, read_rows

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = ("pack_images", "train_tokenizer", "tokenize_shards", "pretrain", "convert_checkpoint")
SCENES, VAL_SCENES = 9, 3
ONE_RANK_A_NODE = {"SBATCH_GPUS_PER_NODE": "1"}

# Writes down how it was started and when it ended; ends with the code that RECORDS/<stage>.codes lists for this
# (re)start.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

stage, rank = Path(__file__).stem, int(os.environ["SLURM_PROCID"])
start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
signals = []
records = Path(os.environ["RECORDS"])
plan = records / (stage + ".codes")
codes = json.loads(plan.read_text()) if plan.exists() else [0]
code = codes[min(start, len(codes) - 1)]
name = "-".join([stage, os.environ["SLURM_JOB_ID"], str(start), str(rank)])
began = time.time()
if code == 75:
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
(records / (name + ".began")).touch()
if code == 75:
    awaited = 2 if rank and (records / (stage + ".twice")).exists() else 1
    while len(signals) < awaited:
        time.sleep(0.1)
        if signals:
            (records / (name + ".signalled")).touch()
elif code == 2:
    if rank == 0:
        sys.stderr.write("error: data.images '/nowhere': no such folder; correct the path\\n")
    else:
        time.sleep(6)
wanted = ("SLURM_", "SLURMD_", "MASTER_", "PECO_", "OMP_")
(records / (name + ".json")).write_text(json.dumps({
    "stage": stage, "argv": sys.argv[1:], "cwd": os.getcwd(), "python": sys.prefix,
    "signals": signals, "began": began, "ended": time.time(),
    "env": {key: value for key, value in os.environ.items() if key.startswith(wanted)},
}))
if code > 128:
    os.kill(os.getpid(), code - 128)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def slurm_is_there():
    missing = missing_programs()
    if missing and not os.environ.get("PECO_REQUIRE_SLURM"):
        pytest.skip(f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)")
    assert not missing, f"PECO_REQUIRE_SLURM is set, but {', '.join(missing)} are not installed"


@pytest.fixture(scope="module")
def cluster(slurm_is_there):
    with slurm_cluster() as running:
        yield running


class StandIns:
    """A copy of the launchers beside stand-in stages, and what these wrote down."""

    def __init__(self, folder: Path):
        self.home = folder / "my repository"
        self.records = folder / "records"
        self.records.mkdir()
        shutil.copytree(REPOSITORY / "launchers", self.home / "launchers")
        (self.home / "peco_ds").mkdir()
        (self.home / "peco_ds" / "__init__.py").touch()
        for stage in STAGES:
            (self.home / "peco_ds" / f"{stage}.py").write_text(STAND_IN)
        self.env = ONE_RANK_A_NODE | {"RECORDS": str(self.records), "PECO_VENV": sys.prefix}

    def exit_with(self, stage: str, *codes: int) -> None:
        """Codes of the first start, the second, ...; the last one holds for all later starts."""
        (self.records / f"{stage}.codes").write_text(json.dumps(codes))

    def read(self, stage: str) -> list[dict]:
        found = [json.loads(path.read_text()) for path in self.records.glob(f"{stage}-*.json")]
        return sorted(
            found,
            key=lambda record: (int(record["env"].get("SLURM_RESTART_COUNT", "0")), int(record["env"]["SLURM_PROCID"])),
        )


@pytest.fixture
def stand_ins(tmp_path) -> StandIns:
    return StandIns(tmp_path)


@pytest.mark.slurm
def test_overrides_reach_the_stage_on_every_node_with_its_rank_and_one_address(
    cluster: SlurmCluster, stand_ins: StandIns
):
    overrides = [
        "model.depth=2",
        "views.scale=[0.2, 1.0]",
        "--deepspeed_config",
        "ds_configs/zero1.json",
        "--out",
        "runs/x",
    ]
    job = cluster.sbatch(
        "--nodes=2", "launchers/pretrain_vith.sbatch", *overrides, cwd=stand_ins.home, env=stand_ins.env
    )
    assert cluster.wait(job, timeout_s=60) == {job: "COMPLETED"}
    ranks = stand_ins.read("pretrain")
    assert [record["env"]["SLURM_PROCID"] for record in ranks] == ["0", "1"]
    assert [record["env"]["SLURM_LOCALID"] for record in ranks] == ["0", "0"]
    assert {record["env"]["SLURM_NTASKS"] for record in ranks} == {"2"}
    assert {record["env"]["SLURMD_NODENAME"] for record in ranks} == {"n1", "n2"}
    assert {record["env"]["MASTER_ADDR"] for record in ranks} == {"127.0.0.1"}, (
        "n1 resolves nowhere; Slurm knows its address"
    )
    ports = {int(record["env"]["MASTER_PORT"]) for record in ranks}
    assert len(ports) == 1 and 1024 < ports.pop() < 32768
    for record in ranks:
        assert record["argv"][:2] == ["--recipe", "peco_vith14"]
        assert record["argv"][-len(overrides) :] == overrides
        assert record["cwd"] == str(stand_ins.home)
        assert record["python"] == sys.prefix
    assert not list(stand_ins.home.glob(".peco_exit*")), "the launcher leaves a file behind"


@pytest.mark.slurm
def test_each_gpu_of_a_node_gets_a_rank(cluster: SlurmCluster, stand_ins: StandIns):
    job = cluster.sbatch(
        "--nodes=2", "--gpus-per-node=3", "launchers/pretrain_vitl.sbatch", cwd=stand_ins.home, env=stand_ins.env
    )
    assert cluster.wait(job, timeout_s=60) == {job: "COMPLETED"}
    places = sorted((int(r["env"]["SLURM_PROCID"]), int(r["env"]["SLURM_LOCALID"])) for r in stand_ins.read("pretrain"))
    assert places == [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1), (5, 2)]


@pytest.mark.slurm
def test_tasks_a_node_can_be_said_and_may_exceed_the_cpus(cluster: SlurmCluster, stand_ins: StandIns):
    env = stand_ins.env | {"TASKS_PER_NODE": "9"}
    job = cluster.sbatch("--nodes=1", "launchers/pretrain_vitb.sbatch", cwd=stand_ins.home, env=env)
    assert cluster.wait(job, timeout_s=60) == {job: "COMPLETED"}
    assert len(stand_ins.read("pretrain")) == 9


@pytest.mark.slurm
def test_submitting_from_elsewhere_works_after_sourcing_cluster_env_and_else_says_what_to_do(
    cluster: SlurmCluster, stand_ins: StandIns, tmp_path
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    launcher = stand_ins.home / "launchers" / "pretrain_vitb.sbatch"
    lost = cluster.sbatch("--nodes=1", launcher, cwd=elsewhere, env=stand_ins.env)
    sourced = cluster.command(
        "bash",
        "-c",
        f"source '{stand_ins.home}/launchers/cluster.env' && sbatch --parsable --nodes=1 '{launcher}'",
        cwd=elsewhere,
        env=stand_ins.env,
    )
    found = int(sourced.stdout)
    assert cluster.wait(lost, found, timeout_s=60) == {lost: "FAILED", found: "COMPLETED"}
    lines = (elsewhere / f"peco_vitb-{lost}.log").read_text().splitlines()
    assert len(lines) == 1 and "PECO_HOME" in lines[0], lines
    assert stand_ins.read("pretrain")[0]["cwd"] == str(elsewhere), (
        "relative paths are those of the folder one submits from"
    )


@pytest.mark.slurm
def test_array_tasks_divide_the_tokenization(cluster: SlurmCluster, stand_ins: StandIns):
    """Two of three tasks, as one does parts again: which parts there are does not follow from what is asked for."""
    env = stand_ins.env | {"TOKENIZE_PARTS": "3"}
    job = cluster.sbatch(
        "--array=0,2", "launchers/tokenize.sbatch", "--recipe", "peco_vitb16", cwd=stand_ins.home, env=env
    )
    assert cluster.wait(job, timeout_s=90) == {job: "COMPLETED"}
    parts = sorted(record["argv"] for record in stand_ins.read("tokenize_shards"))
    assert parts == [
        ["--recipe", "peco_vith14", "--part", part, "--parts", "3", "--recipe", "peco_vitb16"] for part in "02"
    ]


@pytest.mark.slurm
def test_a_task_of_an_array_that_stops_in_good_order_leaves_the_other_tasks_alone(
    cluster: SlurmCluster, stand_ins: StandIns
):
    """One of them has the array's own job id, by which `scontrol requeue` would start every task again."""
    stand_ins.exit_with("tokenize_shards", 75, 0)
    job = cluster.sbatch("--array=0-1", "launchers/tokenize.sbatch", cwd=stand_ins.home, env=stand_ins.env)
    wait_until(lambda: len(list(stand_ins.records.glob("tokenize_shards-*-0-0.began"))) == 2)
    tasks = {found["JobId"]: f"{job}_{found['ArrayTaskId']}" for found in cluster.jobs(job)}
    for task in (tasks.pop(str(job)), *tasks.values()):
        assert cluster.command("scancel", "--signal=USR2", task).returncode == 0
        wait_until(lambda: cluster.jobs(task)[0]["JobState"] in FINISHED, timeout_s=90)
    assert {(found["JobState"], found["Restarts"]) for found in cluster.jobs(job)} == {("COMPLETED", "1")}
    assert sorted(len(record["signals"]) for record in stand_ins.read("tokenize_shards")) == [0, 0, 1, 1]


@pytest.mark.slurm
def test_a_stop_in_good_order_in_a_submit_folder_that_takes_no_file_is_requeued(
    cluster: SlurmCluster, stand_ins: StandIns, tmp_path
):
    """Codes of two nodes through no file at all, with a rank that stops seconds after the other."""
    stand_ins.exit_with("pretrain", 75, 0)
    (stand_ins.records / "pretrain.twice").touch()
    common = stand_ins.home / "launchers" / "common.sh"
    # Root, too, can make no folder there.
    text, places = re.subn(r"for folder in .*;", "for folder in /proc/self;", common.read_text())
    assert places == 1
    common.write_text(text)
    env = stand_ins.env | {"PECO_HOME": str(stand_ins.home)}
    launcher = stand_ins.home / "launchers" / "pretrain_vitb.sbatch"
    job = cluster.sbatch("--nodes=2", f"--output={tmp_path}/log", launcher, cwd=stand_ins.home, env=env)
    wait_until(lambda: len(list(stand_ins.records.glob(f"pretrain-{job}-0-*.began"))) == 2)
    for _ in range(2):
        assert cluster.command("scancel", "--signal=USR2", str(job)).returncode == 0
        wait_until(lambda: len(list(stand_ins.records.glob(f"pretrain-{job}-0-*.signalled"))) == 2)
    assert cluster.wait(job, timeout_s=120) == {job: "COMPLETED"}, (tmp_path / "log").read_text()
    assert cluster.jobs(job)[0]["Restarts"] == "1"


@pytest.mark.slurm
def test_pipeline_runs_the_stages_in_order_on_each_others_output(cluster: SlurmCluster, stand_ins: StandIns, tmp_path):
    images, out = tmp_path / "raw", tmp_path / "out"
    images.mkdir()
    env = stand_ins.env | {
        "TOKENIZE_PARTS": "2",
        "PECO_SBATCH_TRAIN_ARGS": "--nodes=2",
        "TOKENIZER_ARGS": "perceptual.weight=0 schedule.steps=3",
        "TOKENIZE_ARGS": "data.num_workers=0",
        "PRETRAIN_ARGS": "--deepspeed_config ds_configs/zero1.json",
        "CONVERT_ARGS": "--to hf",
    }
    done = cluster.command(
        "bash",
        "launchers/pipeline.sh",
        images,
        "../out",
        "vitb",
        "--",
        "model.depth=2",
        "views.count=3",
        cwd=stand_ins.home,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    names, ids = zip(*(line.split() for line in done.stdout.splitlines()))
    assert names == ("prepare_data", "train_tokenizer", "tokenize", "tokenize_finish", "pretrain_vitb", "convert")
    states = cluster.wait(*map(int, ids), timeout_s=150)
    assert set(states.values()) == {"COMPLETED"}, states

    by_job = [
        [
            r
            for stage in STAGES
            for r in stand_ins.read(stage)
            if job in (r["env"]["SLURM_JOB_ID"], r["env"].get("SLURM_ARRAY_JOB_ID"))
        ]
        for job in ids
    ]
    assert [len(records) for records in by_job] == [1, 2, 2, 1, 2, 1]
    for before, after in zip(by_job, by_job[1:]):
        assert max(record["ended"] for record in before) <= min(record["began"] for record in after)
    argv = [records[0]["argv"] for records in by_job]
    assert f"--images {images} --out {out}/images" in " ".join(argv[0])
    assert (
        f"--out {out}/tokenizer_run data.images={out}/images data.val_images= data.holdout=64 "
        "perceptual.weight=0 schedule.steps=3" in " ".join(argv[1])
    )
    for mim in (2, 3, 4):
        assert (
            f"data.images={out}/images data.tokens={out}/tokens data.tokenizer={out}/tokenizer_run/tokenizer"
            in " ".join(argv[mim])
        )
        assert "model.depth=2" in argv[mim] and "views.count=3" in argv[mim]
        recipes = [argv[mim][index + 1] for index, word in enumerate(argv[mim]) if word == "--recipe"]
        assert recipes[-1] == "peco_vitb16"
    assert "--finish" in argv[3] and "--part" not in argv[3]
    assert argv[4][-2:] == ["--deepspeed_config", "ds_configs/zero1.json"]
    assert argv[5] == [f"{out}/pretrain", "--out", f"{out}/release", "--to", "hf"]


@pytest.mark.slurm
def test_bad_input_of_one_stage_stops_the_chain_with_its_one_line_in_the_log(
    cluster: SlurmCluster, stand_ins: StandIns, tmp_path
):
    images, out = tmp_path / "raw", tmp_path / "out"
    images.mkdir()
    stand_ins.exit_with("train_tokenizer", 2)
    env = stand_ins.env | {"PECO_SBATCH_TRAIN_ARGS": "--nodes=2"}
    done = cluster.command("bash", "launchers/pipeline.sh", images, out, cwd=stand_ins.home, env=env)
    assert done.returncode == 0, done.stderr
    ids = [int(line.split()[1]) for line in done.stdout.splitlines()]
    states = list(cluster.wait(*ids, timeout_s=90).values())
    assert states == ["COMPLETED", "FAILED", "CANCELLED", "CANCELLED", "CANCELLED", "CANCELLED"]
    assert cluster.jobs(ids[1])[0]["ExitCode"] == "2:0", "the stage's own code, though srun had to end the other rank"
    log = (out / "logs" / f"train_tokenizer-{ids[1]}.log").read_text()
    assert [line for line in log.splitlines() if line.startswith("error:")] == [
        "error: data.images '/nowhere': no such folder; correct the path"
    ]
    assert not stand_ins.read("tokenize_shards") and not stand_ins.read("pretrain")


@pytest.mark.slurm
def test_a_signalled_stage_ends_in_good_order_on_all_ranks_and_is_requeued_into_the_same_log(
    cluster: SlurmCluster, stand_ins: StandIns
):
    stand_ins.exit_with("pretrain", 75, 0)
    # rank 1 is still at its save when the second signal comes
    (stand_ins.records / "pretrain.twice").touch()
    job = cluster.sbatch("--nodes=2", "launchers/pretrain_vitb.sbatch", cwd=stand_ins.home, env=stand_ins.env)
    wait_until(lambda: len(list(stand_ins.records.glob(f"pretrain-{job}-0-*.began"))) == 2)
    # What --signal=USR2@120 does before the time limit: every process of the step gets it, the batch script does not.
    assert cluster.command("scancel", "--signal=USR2", str(job)).returncode == 0
    wait_until(lambda: len(list(stand_ins.records.glob(f"pretrain-{job}-0-*.signalled"))) == 2)
    assert cluster.command("scancel", "--signal=USR2", str(job)).returncode == 0
    assert cluster.wait(job, timeout_s=90) == {job: "COMPLETED"}
    starts = stand_ins.read("pretrain")
    assert [len(record["signals"]) > 0 for record in starts] == [True, True, False, False] and len(
        starts[1]["signals"]
    ) == 2
    assert [record["env"].get("SLURM_RESTART_COUNT", "0") for record in starts] == ["0", "0", "1", "1"]
    assert cluster.jobs(job)[0]["Restarts"] == "1"
    assert "goes back into the queue" in (stand_ins.home / f"peco_vitb-{job}.log").read_text()


@pytest.mark.slurm
def test_scancel_ends_a_job_for_good_though_its_stage_stops_in_good_order(cluster: SlurmCluster, stand_ins: StandIns):
    stand_ins.exit_with("pretrain", 75)
    job = cluster.sbatch("--nodes=2", "launchers/pretrain_vitb.sbatch", cwd=stand_ins.home, env=stand_ins.env)
    wait_until(lambda: len(list(stand_ins.records.glob(f"pretrain-{job}-0-*.began"))) == 2)
    assert cluster.command("scancel", str(job)).returncode == 0
    assert cluster.wait(job, timeout_s=60) == {job: "CANCELLED"}
    assert cluster.jobs(job)[0]["Restarts"] == "0"
    assert [len(record["signals"]) > 0 for record in stand_ins.read("pretrain")] == [True, True]
    assert not list(stand_ins.home.glob(".peco_exit*")), "the launcher leaves a file behind"


@pytest.mark.slurm
def test_a_job_that_lost_a_rank_starts_again_so_often_and_no_more(cluster: SlurmCluster, stand_ins: StandIns):
    stand_ins.exit_with("pretrain", 137, 76, 0)
    stand_ins.exit_with("train_tokenizer", 76)
    mended = cluster.sbatch("--nodes=1", "launchers/pretrain_vitb.sbatch", cwd=stand_ins.home, env=stand_ins.env)
    env = stand_ins.env | {"PECO_FAULT_RESTARTS": "1"}
    hopeless = cluster.sbatch("--nodes=1", "launchers/train_tokenizer.sbatch", cwd=stand_ins.home, env=env)
    assert cluster.wait(mended, hopeless, timeout_s=120) == {mended: "COMPLETED", hopeless: "FAILED"}
    assert len(stand_ins.read("pretrain")) == 3 and len(stand_ins.read("train_tokenizer")) == 2
    assert cluster.jobs(hopeless)[0]["ExitCode"] == "76:0"
    assert "PECO_FAULT_RESTARTS=1" in (stand_ins.home / f"peco_tokenizer-{hopeless}.log").read_text()
    assert not list(stand_ins.home.glob(".peco_*")), "the launcher leaves a file behind"


@pytest.mark.slurm
def test_each_task_of_an_array_starts_again_by_itself_after_a_rank_was_killed(
    cluster: SlurmCluster, stand_ins: StandIns
):
    stand_ins.exit_with("tokenize_shards", 137, 0)
    job = cluster.sbatch("--array=0-1", "launchers/tokenize.sbatch", cwd=stand_ins.home, env=stand_ins.env)
    assert cluster.wait(job, timeout_s=90) == {job: "COMPLETED"}
    parts = [record["argv"][3] for record in stand_ins.read("tokenize_shards")]
    assert sorted(parts) == ["0", "0", "1", "1"]
    assert not list(stand_ins.home.glob(".peco_*")), "the launcher leaves a file behind"


# The real stages, small enough for two CPU cores: 56 px images, patch 14, a 4x4 grid, 32 codes, 2 optimiser steps.
TINY_TOKENIZER = """
    views.tokenizer_px=64 tokenizer.channels=8 tokenizer.blocks_per_level=1 tokenizer.attention=false
    tokenizer.z_channels=8 tokenizer.code_dim=8 tokenizer.num_codes=32
    tokenizer.kmeans_vectors=64 tokenizer.kmeans_iters=2 perceptual.weight=0
    run.global_batch=8 run.micro_batch=4 schedule.epochs=null schedule.steps=2
    schedule.warmup_epochs=null schedule.warmup_steps=0
    data.holdout=4 data.num_workers=0
"""
TINY_MODEL = """
    views.tokenizer_px=64 views.count=2 model.image_px=56 model.width=32 model.depth=4 model.heads=2
    mask.count=6 mask.min_block=2 objective.num_codes=32 data.num_workers=0
"""
TINY_PRETRAINING = """
    run.global_batch=8 run.micro_batch=4 schedule.epochs=null schedule.steps=2
    schedule.warmup_epochs=null schedule.warmup_steps=0
    run.log_every_steps=1
"""
TINY_CLASSIFIER = f"""
    {TINY_PRETRAINING} model.width=32 model.depth=4 model.heads=2 data.num_workers=0 run.precision=fp32 ema.decay=0.5
    optim.lr=1e-2 classifier.head_scale=1 checkpoint.every_epochs=null evaluation.every_epochs=0
"""


TINY_SEGMENTER = """
    model.image_px=56 model.width=32 model.depth=4 model.heads=2 segmenter.taps=[0,1,2,3] segmenter.head_width=16
    segmenter.auxiliary_width=8 augment.long_px=128 augment.short_px=56 evaluation.long_px=128 evaluation.short_px=56
    evaluation.stride_px=28 evaluation.every_steps=0 schedule.steps=2 schedule.warmup_steps=1 run.global_batch=4
    run.micro_batch=2 run.precision=fp32 checkpoint.every_steps=null data.num_workers=0
"""


@pytest.fixture(scope="module")
def real_run(cluster: SlurmCluster, labelled_sets, real_data, tmp_path_factory):
    """The pipeline over class folders and scenes of real images on two nodes: its folder, the states of its jobs by
    stage, its environment.
    """
    folder = tmp_path_factory.mktemp("pipeline")
    for number, image in enumerate(photographs(real_data, SCENES)):
        write_scene(folder, "train" if number < SCENES - VAL_SCENES else "val", f"scene_{number}", image)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    env = ONE_RANK_A_NODE | {
        "PATH": f"{Path(sys.executable).parent}:{cluster.env['PATH']}",
        "PECO_VENV": sys.prefix,
        # two ranks and whatever else runs share the host's cores
        "OMP_NUM_THREADS": "1",
        "VAL_DIR": str(labelled_sets.root / "val"),
        "PREPARE_ARGS": "--samples_per_shard 10 --workers 1",
        "TOKENIZER_ARGS": " ".join(TINY_TOKENIZER.split()),
        "TOKENIZE_PARTS": "2",
        "PRETRAIN_ARGS": " ".join(TINY_PRETRAINING.split()),
        "FINETUNE_ARGS": " ".join(["model.image_px=56", *TINY_CLASSIFIER.split()]),
        "FINETUNE_448_ARGS": " ".join(["model.image_px=112", *TINY_CLASSIFIER.split()]),
        "EVALUATE_ARGS": "--batch 25 --num_workers 0",
        "SCENES_DIR": str(folder / "images" / "train"),
        "SCENES_VAL_DIR": str(folder / "images" / "val"),
        "PREPARE_SCENES_ARGS": f"--reduce_zero_label --classes {folder / 'classes.txt'} --workers 1",
        "SEGMENT_ARGS": " ".join(TINY_SEGMENTER.split()),
        "EVALUATE_SEGMENTER_ARGS": "--num_workers 0",
        "PECO_SBATCH_TRAIN_ARGS": "--nodes=2",
    }
    done = cluster.command(
        "bash",
        "launchers/pipeline.sh",
        labelled_sets.root / "train",
        folder / "out",
        "vith",
        "--",
        *TINY_MODEL.split(),
        cwd=REPOSITORY,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    jobs = {name: int(job) for name, job in (line.split() for line in done.stdout.splitlines())}
    states = cluster.wait(*jobs.values(), timeout_s=600)
    return folder / "out", {name: states[job] for name, job in jobs.items()}, env


def tiny_pretraining(out: Path) -> list[str]:
    """Settings of a pre-training on what the pipeline made."""
    data = [f"data.images={out}/images", f"data.tokens={out}/tokens", f"data.tokenizer={out}/tokenizer_run/tokenizer"]
    return [*data, *TINY_MODEL.split(), *TINY_PRETRAINING.split()]


def logs(folder: Path) -> str:
    return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("*.log")))


@pytest.mark.slurm
def test_pipeline_takes_real_images_to_a_converted_release(real_run):
    import timm

    out, states, _ = real_run
    assert states["convert"] == "COMPLETED", f"{states}\n{logs(out / 'logs')}"
    model = timm.create_model(f"local-dir:{out}/release", pretrained=True, num_classes=0)
    assert model.num_features == 32 and len(model.blocks) == 4


@pytest.mark.slurm
def test_pipeline_goes_on_to_the_top_1_of_the_released_classifier_at_twice_the_size(real_run, labelled_sets):
    import timm

    out, states, _ = real_run
    assert set(states.values()) == {"COMPLETED"}, f"{states}\n{logs(out / 'logs')}"
    model = timm.create_model(f"local-dir:{out}/classifier", pretrained=True)
    assert model.num_classes == labelled_sets.classes and model.patch_embed.grid_size == (8, 8)
    quality = json.loads((out / "top1.json").read_text())["quality"]
    assert quality["images"] == labelled_sets.val_images
    trained = read_evaluation(out / "finetune_448")[-1]
    assert quality["top1"] == pytest.approx(trained["ema_top1"]) and quality["loss"] == pytest.approx(
        trained["ema_loss"], rel=1e-5
    )
    assert quality["loss"] != pytest.approx(trained["loss"], rel=1e-4), "the moving average is what is released"
    (log,) = (out / "logs").glob("evaluate-*.log")
    assert f"top-1 {quality['top1']:.2f}" in log.read_text()
    starts = [json.loads((out / name / "provenance.json").read_text())["init"] for name in ("finetune", "finetune_448")]
    assert starts == ["peco_vith14, step_00000002", "finetune_vith14, step_00000002, moving average"]


@pytest.mark.slurm
def test_pipeline_goes_on_to_the_miou_of_the_released_segmenter(real_run):
    out, states, _ = real_run
    assert set(states.values()) == {"COMPLETED"}, f"{states}\n{logs(out / 'logs')}"
    trained = read_evaluation(out / "segment")[-1]
    assert json.loads((out / "segment" / "provenance.json").read_text())["init"].startswith("release/model.safetensors")
    progress = next((out / "segment" / "checkpoints").glob("step_*/progress.json"))
    assert json.loads(progress.read_text())["world_size"] == 2
    measured = json.loads((out / "miou.json").read_text())["quality"]
    assert measured["images"] == trained["images"] == VAL_SCENES and 0 <= measured["miou"] <= 100


@pytest.mark.slurm
def test_pretrain_vith_sbatch_trains_saves_and_completes_on_two_nodes(real_run):
    out, states, _ = real_run
    assert states["pretrain_vith"] == "COMPLETED", f"{states}\n{logs(out / 'logs')}"
    checkpoints = out / "pretrain" / "checkpoints"
    newest = checkpoints / (checkpoints / "latest").read_text().strip()
    assert json.loads((newest / "progress.json").read_text())["step"] == 2
    assert json.loads((newest / "progress.json").read_text())["world_size"] == 2


@pytest.mark.slurm
def test_a_signalled_pretraining_saves_is_requeued_and_goes_on_where_it_stopped(
    cluster: SlurmCluster, real_run, tmp_path
):
    out, states, env = real_run
    assert states["tokenize_finish"] == "COMPLETED", f"{states}\n{logs(out / 'logs')}"
    # A worker process a rank gets the signal too. So many steps that the signal arrives long before the last one.
    settings = [*tiny_pretraining(out), "schedule.steps=200", "data.num_workers=1"]
    arguments = [
        "--nodes=2",
        f"--output={tmp_path}/%x-%j.log",
        "launchers/pretrain_vith.sbatch",
        "--out",
        tmp_path / "run",
        *settings,
    ]
    job = cluster.sbatch(*arguments, cwd=REPOSITORY, env=env)
    log = tmp_path / f"peco_vith-{job}.log"
    wait_until(
        lambda: log.exists() and ("step 3/200 " in log.read_text() or cluster.states(job)[0] in FINISHED), timeout_s=400
    )
    assert cluster.command("scancel", "--signal=USR2", str(job)).returncode == 0
    assert cluster.wait(job, timeout_s=400) == {job: "COMPLETED"}, logs(tmp_path)

    assert cluster.jobs(job)[0]["Restarts"] == "1", logs(tmp_path)
    # the launcher says so to exit code 75 alone
    before, after = log.read_text().split("stopped in good order;")
    trained = [
        [int(step) for step in re.findall(r"^step (\d+)/200 ", text, flags=re.MULTILINE)] for text in (before, after)
    ]
    assert trained[0] and trained[1], logs(tmp_path)
    assert sum(trained, []) == list(range(1, 201)), "a step was lost, or trained twice"
    assert f"step_{trained[0][-1]:08d} at step {trained[0][-1]}," in after
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, 201)
    )
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step_00000200"


STEPS = 120  # of the runs that are interrupted
LAUNCHED_S = 400.0  # eight ranks at once on two cores


@dataclass(frozen=True)
class Trained:
    """A job of two nodes that is over."""

    out: Path  # its run folder
    job: dict[str, str]  # as `scontrol show job` says
    log: str


class Interruptions:
    """What happens to a running pre-training from outside; each waits for as many rows as it needs."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster = cluster

    def nothing(self, job: int, out: Path) -> None:
        pass

    def requeue(self, job: int, out: Path) -> None:
        wait_until(lambda: len(read_metrics(out)) >= STEPS // 3, LAUNCHED_S)
        self._command("scontrol", "requeue", str(job))

    def run_out_of_time(self, job: int, out: Path) -> None:
        """The job has two minutes and stops itself when one is left.

        Held in between: a fast machine would be done before.
        """
        began = time.monotonic()
        while len(read_metrics(out)) < STEPS // 6:
            # a slow machine, still starting
            if self.cluster.states(job) == ["RUNNING"] and time.monotonic() - began > 45.0:
                self._command("scontrol", "update", f"jobid={job}", "timelimit=+1")
                began += 60.0
            assert self.cluster.states(job)[0] not in FINISHED
            time.sleep(0.5)
        self._command("scancel", "--signal=STOP", str(job))
        wait_until(lambda: self._left_s(job) < 60.0, 200.0)
        self._command("scancel", "--signal=CONT", str(job))

    def _left_s(self, job: int) -> float:
        minutes, seconds = self._command("squeue", "--noheader", f"--jobs={job}", "--format=%L").strip().split(":")
        return 60.0 * int(minutes) + int(seconds)

    def kill_node(self, job: int, out: Path) -> None:
        """Power fails on the node without the batch script; it comes back when Slurm has given it up."""
        wait_until(lambda: len(read_metrics(out)) >= STEPS // 3, LAUNCHED_S)
        node = self._command("scontrol", "show", "hostnames", self.cluster.jobs(job)[0]["NodeList"]).split()[-1]
        self.cluster.kill_node(node)
        wait_until(lambda: "down" in self._command("sinfo", "--noheader", "--nodes", node, "--format=%t"), 120.0)
        self.cluster.start_node(node)

    def _command(self, *arguments: str) -> str:
        done = self.cluster.command(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def interrupted(slurm_is_there, small_sets, tmp_path_factory) -> dict[str, Trained]:
    """The same pre-training four times side by side on two nodes each, by what happened to it."""
    folder = tmp_path_factory.mktemp("interrupted")
    env = ONE_RANK_A_NODE | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        "PECO_VENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
    }
    # Slurm's own warning before the limit would come at once in so short a job.
    options = {"run_out_of_time": ["--time=2", "--signal=USR2@1"]}
    settings = [
        "--recipe",
        "peco_vitb16",
        *small_sets.overrides,
        f"schedule.steps={STEPS}",
        "checkpoint.every_steps=15",
    ]
    with slurm_cluster(8, cpus=1, gpus=1, node_timeout_s=30) as cluster, ThreadPoolExecutor() as pool:
        happenings, jobs = Interruptions(cluster), {}
        for name in ("nothing", "requeue", "run_out_of_time", "kill_node"):
            launch = [
                "--nodes=2",
                f"--output={folder}/{name}.log",
                *options.get(name, []),
                "launchers/pretrain_vith.sbatch",
            ]
            jobs[name] = cluster.sbatch(*launch, "--out", folder / name, *settings, cwd=REPOSITORY, env=env)
        for happening in [pool.submit(getattr(happenings, name), job, folder / name) for name, job in jobs.items()]:
            try:
                happening.result()
            except AssertionError as error:
                raise AssertionError(f"{error}\n{logs(folder)}") from error
        cluster.wait(*jobs.values(), timeout_s=LAUNCHED_S)
        return {
            name: Trained(folder / name, cluster.jobs(job)[0], (folder / f"{name}.log").read_text())
            for name, job in jobs.items()
        }


@pytest.mark.slurm
@pytest.mark.parametrize("happening", ["requeue", "run_out_of_time", "kill_node"])
def test_a_run_that_was_interrupted_ends_as_one_that_never_was(interrupted, happening):
    whole, run = interrupted["nothing"], interrupted[happening]
    assert whole.job["JobState"] == "COMPLETED" and whole.job["Restarts"] == "0", whole.log[-3000:]
    assert run.job["JobState"] == "COMPLETED" and int(run.job["Restarts"]) >= 1, run.log[-6000:]
    lines = (run.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1)), (
        "a step is missing, or there twice"
    )
    names = ("loss", "accuracy", "grad_norm", "lr", "images")
    assert [[row[name] for name in names] for row in read_metrics(run.out)] == [
        [row[name] for name in names] for row in read_metrics(whole.out)
    ]

    starts = [row for row in read_rows(run.out / STARTS_FILE)[0] if row["event"] == "start"]
    ends = {
        row["start"]: (row["code"], row["step"]) for row in read_rows(run.out / STARTS_FILE)[0] if row["event"] == "end"
    }
    assert [start["slurm_job"] for start in starts] == [run.job["JobId"]] * len(starts) and len(starts) == int(
        run.job["Restarts"]
    ) + 1
    assert starts[1]["step"] > 0 and starts[1]["checkpoint"] != "scratch", "it began anew"
    assert ends[len(starts)] == (0, STEPS)
    # a node that comes back may still be told to end the job's first life, and ends its second
    if happening == "kill_node":
        assert "lost the other ranks" in run.log
    if happening == "requeue":
        assert run.job["Restarts"] == "1"
    if happening == "run_out_of_time":
        assert "stopped in good order; job" in run.log
        assert ends[1] == (75, starts[1]["step"]), "steps were lost though there was time to save them"


NODES = 2  # of as many ranks; test_many_ranks.py has more
WIDE_STEPS = 24


@pytest.fixture(scope="module")
def signalled(slurm_is_there, small_sets, tmp_path_factory) -> tuple[Trained, Trained]:
    """A pre-training on several nodes of several ranks, asked to stop in the middle, and the same by one process."""
    folder = tmp_path_factory.mktemp("many_nodes")
    env = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        "PECO_VENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
    }
    settings = [
        "--recipe",
        "peco_vitb16",
        *small_sets.overrides,
        "run.global_batch=32",
        "run.micro_batch=2",
        f"schedule.steps={WIDE_STEPS}",
    ]
    launch = [f"--nodes={NODES}", f"--output={folder}/log", "launchers/pretrain_vith.sbatch", "--out", folder / "run"]
    with slurm_cluster(NODES, cpus=4, gpus=4) as cluster:
        job = cluster.sbatch(*launch, *settings, cwd=REPOSITORY, env=env | {"SBATCH_GPUS_PER_NODE": str(NODES)})
        try:
            wait_until(lambda: len(read_metrics(folder / "run")) >= 3, LAUNCHED_S)
        except AssertionError as error:
            raise AssertionError((folder / "log").read_text()[-6000:]) from error
        assert cluster.command("scancel", "--signal=USR2", str(job)).returncode == 0
        cluster.wait(job, timeout_s=LAUNCHED_S)
        several = Trained(folder / "run", cluster.jobs(job)[0], (folder / "log").read_text())
    run_stage("pretrain", *settings, "--out", folder / "alone")
    return several, Trained(folder / "alone", {}, "")


@pytest.mark.slurm
def test_ranks_on_several_nodes_save_on_a_signal_are_requeued_and_end_as_one_process_does(signalled):
    run, alone = signalled
    ranks = NODES * NODES
    assert (run.job["JobState"], run.job["Restarts"]) == ("COMPLETED", "1"), run.log[-6000:]
    assert "stopped in good order; job" in run.log
    starts = [row for row in read_rows(run.out / STARTS_FILE)[0] if row["event"] == "start"]
    ends = [(row["code"], row["step"]) for row in read_rows(run.out / STARTS_FILE)[0] if row["event"] == "end"]
    assert [start["ranks"] for start in starts] == [ranks, ranks] and 3 <= starts[1]["step"] < WIDE_STEPS
    assert ends == [(75, starts[1]["step"]), (0, WIDE_STEPS)], "steps were lost, or trained twice"
    rows, plain = read_metrics(run.out), read_metrics(alone.out)
    assert [row["step"] for row in rows] == list(range(1, WIDE_STEPS + 1)) and [row["images"] for row in rows] == [
        row["images"] for row in plain
    ]
    # float32, sums over ranks in another order; measured worst case 2.5e-7
    assert (
        max(abs(ours["loss"] - theirs["loss"]) / theirs["loss"] for ours, theirs in zip(rows, plain, strict=True))
        < 5e-6
    )
    newest = run.out / "checkpoints" / (run.out / "checkpoints" / "latest").read_text().strip()
    files = json.loads((newest / "manifest.json").read_text())["files"]
    assert sum(name.endswith("_optim_states.pt") for name in files) == ranks and {
        path.name for path in newest.iterdir()
    } == {*files, "manifest.json"}
    assert json.loads((newest / "progress.json").read_text())["cursor"]["samples"] == WIDE_STEPS * 32


def wait_until(condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + PATIENCE * timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
