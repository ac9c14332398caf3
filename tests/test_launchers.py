"""Launcher files by themselves; test_slurm.py runs them under Slurm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from peco_ds.command_line import parse_stage, stage_parser
from peco_ds.config import DetectRecipe, FinetuneRecipe, PretrainRecipe, ProbeRecipe, SegmentRecipe, TokenizerRecipe
from peco_ds.data.left_out import SYSTEM_FOLDERS
from peco_ds.recipe_checks import recipe_of_ranks
from peco_ds.recipe_files import RECIPES, load_recipe

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHERS = REPOSITORY / "launchers"
BATCH_FILES = sorted(LAUNCHERS.glob("*.sbatch"))
SHELL_FILES = sorted(
    [
        *BATCH_FILES,
        *LAUNCHERS.glob("*.sh"),
        LAUNCHERS / "cluster.env",
        REPOSITORY / "tests" / "run.sh",
        REPOSITORY / ".ci" / "run",
    ]
)


def directives(path: Path) -> dict[str, str]:
    lines = [line.split() for line in path.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert all(len(line) == 2 for line in lines), f"{path.name}: one option a line"
    return dict((option.split("=", 1) + [""])[:2] for _, option in lines)


def shell(*arguments: str | Path, cwd: Path = REPOSITORY, **env: str) -> subprocess.CompletedProcess:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "PECO_"))
    }
    return subprocess.run(
        [str(a) for a in arguments], cwd=cwd, env=environment | env, text=True, capture_output=True, timeout=600
    )


def test_there_is_a_launcher_for_every_stage_of_the_way_from_images_to_top_1():
    assert {path.stem for path in BATCH_FILES} >= {
        *("prepare_data", "train_tokenizer", "tokenize", "tokenize_finish", "convert", "evaluate", "probe"),
        *("pretrain_vitb", "pretrain_vitl", "pretrain_vith"),
        *("finetune_vitb", "finetune_vitl", "finetune_vith", "finetune_vith_448"),
        *("segment_vitb", "segment_vitl", "segment_vith"),
        *("detect_vitb", "detect_vitl", "detect_vith", "detect_mcbeit_vitb16"),
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
    assert found["--output"].endswith(".log") and "/" not in found["--output"], (
        "sbatch makes no folders: the log would be lost"
    )
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


RECIPE_TYPES = {
    "train_tokenizer": TokenizerRecipe,
    "pretrain": PretrainRecipe,
    "finetune": FinetuneRecipe,
    "segment": SegmentRecipe,
    "detect": DetectRecipe,
    "linear_probe": ProbeRecipe,
}


@pytest.fixture(scope="module")
def echoing_home(tmp_path_factory) -> Path:
    """A repository whose launchers, run by bash, write down the stage's command line instead of starting it."""
    home = tmp_path_factory.mktemp("echoing") / "my repository"
    shutil.copytree(LAUNCHERS, home / "launchers")
    (home / "peco_ds").mkdir()
    (home / "launchers" / "common.sh").write_text(
        "PECO_RUNS_ROOT=/runs\nPECO_DATA_ROOT=/data\n"
        'run_ranks() { printf \'%s\\n\' "$@"; }\nrun_one() { run_ranks "$@"; }\n'
    )
    return home


def resolved(home: Path, launcher: str, *given: str):
    """Stage, recipe and run folder that a launcher's command line comes to."""
    done = shell("bash", home / "launchers" / f"{launcher}.sbatch", *given, PECO_HOME=str(home))
    script, *words = done.stdout.splitlines()
    stage = Path(script).stem
    args, settings = parse_stage(
        stage_parser("", recipe="none", deepspeed_config="zero1.json"), RECIPE_TYPES[stage], words
    )
    return stage, settings.recipe, str(args.out)


@pytest.mark.parametrize("size, name", [("vitb", "vitb16"), ("vitl", "vitl16"), ("vith", "vith14")])
def test_fine_tuning_starts_where_the_pretraining_launcher_of_its_size_ends(echoing_home, size, name):
    _, _, ends = resolved(echoing_home, f"pretrain_{size}")
    stage, recipe, out = resolved(echoing_home, f"finetune_{size}")
    assert (stage, recipe.name, out) == ("finetune", f"finetune_{name}", f"/runs/finetune_{name}")
    assert recipe.init.weights == ends
    if size == "vith":
        assert resolved(echoing_home, "finetune_vith_448")[1].init.weights == out
        assert resolved(echoing_home, "probe")[1].init.weights == ends


@pytest.mark.parametrize("size, name", [("vitb", "vitb16"), ("vitl", "vitl16"), ("vith", "vith16")])
def test_detection_starts_where_the_pretraining_launcher_of_its_size_ends(echoing_home, size, name):
    _, _, ends = resolved(echoing_home, f"pretrain_{size}")
    stage, recipe, out = resolved(echoing_home, f"detect_{size}")
    assert (stage, recipe.name, out) == ("detect", f"detect_{name}", f"/runs/detect_{name}")
    assert recipe.init.weights == ends


def test_detection_of_mcbeit_starts_from_its_pretraining(echoing_home):
    stage, recipe, out = resolved(echoing_home, "detect_mcbeit_vitb16")
    assert (stage, recipe.name, out) == ("detect", "detect_mcbeit_vitb16", "/runs/detect_mcbeit_vitb16")
    assert recipe.init.weights == "/runs/mcbeit_vitb16" and recipe.augment.kind == "scale_jitter"


@pytest.mark.parametrize("size, name", [("vitb", "vitb16"), ("vitl", "vitl16"), ("vith", "vith14")])
def test_segmentation_starts_where_the_pretraining_launcher_of_its_size_ends(echoing_home, size, name):
    _, _, ends = resolved(echoing_home, f"pretrain_{size}")
    stage, recipe, out = resolved(echoing_home, f"segment_{size}")
    assert (stage, recipe.name, out) == ("segment", f"segment_{name}", f"/runs/segment_{name}")
    assert recipe.init.weights == ends


@pytest.mark.parametrize("launcher", ["finetune_vitb", "finetune_vitl", "finetune_vith", "finetune_vith_448", "probe"])
def test_what_the_user_gives_wins_over_the_launchers_own_words(echoing_home, launcher):
    _, recipe, out = resolved(
        echoing_home, launcher, "init.weights=/else where/run", "--out", "/mine", "data.num_workers=3"
    )
    assert (recipe.init.weights, out, recipe.data.num_workers) == ("/else where/run", "/mine", 3)


def test_the_probe_launcher_takes_another_sizes_recipe(echoing_home):
    assert resolved(echoing_home, "probe", "--recipe", "probe_vitb16")[1].name == "probe_vitb16"


@pytest.mark.parametrize(
    "path",
    [path for path in BATCH_FILES if path.stem.startswith(("train_", "pretrain_", "finetune_"))],
    ids=lambda path: path.name,
)
def test_the_batch_of_a_training_launchers_recipe_divides_by_its_gpus(path):
    stage, recipe = re.search(r"peco_ds/(\w+)\.py\" --recipe (\w+)", path.read_text()).groups()
    found = directives(path)
    needs = {TokenizerRecipe: ["perceptual.weight=0"]}.get(RECIPE_TYPES[stage], [])
    whole, ranks = load_recipe(RECIPE_TYPES[stage], recipe, needs).recipe, int(found["--nodes"])
    ranks *= int(found["--gpus-per-node"])
    taken = recipe_of_ranks(whole, ranks).run.micro_batch
    assert taken == min(whole.run.micro_batch, whole.run.global_batch // ranks)


def test_an_array_launcher_writes_a_log_for_each_task():
    arrays = [path for path in BATCH_FILES if "--array" in directives(path)]
    assert arrays and all("%a" in directives(path)["--output"] for path in arrays)


@pytest.fixture
def recording_sbatch(tmp_path):
    """A PATH whose sbatch and scancel write down their command lines.

    Sbatch fails from the job named in `fail_at` on.
    """
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text(
        f'#!/bin/bash\nid=$(($(wc -l < {tools}/sbatch.log) + 1))\n[ "$id" != "${{FAIL_AT:-}}" ] || exit 1\n'
        f'printf \'%s|\' "$SBATCH_PARTITION" "$@" >> {tools}/sbatch.log\necho >> {tools}/sbatch.log\necho $id\n'
    )
    (tools / "scancel").write_text(f'#!/bin/bash\necho "$*" >> {tools}/scancel.log\n')
    (tools / "sbatch.log").touch()
    for tool in ("sbatch", "scancel"):
        (tools / tool).chmod(0o755)
    return tools


@pytest.fixture
def raw(tmp_path) -> Path:
    """A folder of images, empty, beside which there is room for OUT_DIR."""
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


def pipeline(tools: Path, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess:
    return shell(
        "bash", LAUNCHERS / "pipeline.sh", *arguments, cwd=tools.parent, PATH=f"{tools}:{os.environ['PATH']}", **env
    )


def test_pipeline_chains_every_job_to_the_one_before_and_cancels_what_cannot_run(recording_sbatch, raw, tmp_path):
    done = pipeline(recording_sbatch, raw, tmp_path / "out", "vitl")
    assert done.returncode == 0, done.stderr
    submitted = (recording_sbatch / "sbatch.log").read_text().splitlines()
    assert [int(line.split()[1]) for line in done.stdout.splitlines()] == list(range(1, len(submitted) + 1))
    assert "--dependency" not in submitted[0]
    for before, line in enumerate(submitted[1:], start=1):
        assert f"|--dependency=afterok:{before}|--kill-on-invalid-dep=yes|" in line


def labelled_folders(tmp_path: Path) -> dict[str, Path]:
    """Training and validation folder of two classes each, names with spaces."""
    folders = {"train": tmp_path / "my images", "val": tmp_path / "my validation"}
    for folder in folders.values():
        for name in ("n01440764", "n01443537"):
            (folder / name).mkdir(parents=True)
    return folders


FINE_TUNING = {
    "vitb": ["finetune_vitb", "convert_classifier", "evaluate"],
    "vith": ["finetune_vith", "finetune_vith_448", "convert_classifier", "evaluate"],
}


@pytest.mark.parametrize("size", FINE_TUNING)
def test_pipeline_with_validation_images_goes_on_from_the_release_to_the_top_1(recording_sbatch, tmp_path, size):
    labelled_folders(tmp_path)
    stages = {
        "PREPARE_ARGS": "--workers 2",
        "PREPARE_VAL_ARGS": "--max_bad_share 0",
        "CONVERT_ARGS": "--to hf",
        "FINETUNE_ARGS": "ema.decay=0.9",
        "EVALUATE_ARGS": "--batch 8",
    }
    stages |= {"FINETUNE_448_ARGS": "ema.decay=0.8"} if size == "vith" else {}
    done = pipeline(recording_sbatch, "my images", "out", size, VAL_DIR="my validation", **stages)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == [
        "prepare_data",
        "prepare_val",
        "train_tokenizer",
        "tokenize",
        "tokenize_finish",
        f"pretrain_{size}",
        "convert",
        *FINE_TUNING[size],
    ]
    submitted = dict(zip(names, (recording_sbatch / "sbatch.log").read_text().splitlines()))
    for before, line in enumerate(list(submitted.values())[1:], start=1):
        assert f"|--dependency=afterok:{before}|" in line
    assert all(f"--output={tmp_path}/out/logs/{name}-%A" in line for name, line in submitted.items())

    out = tmp_path / "out"
    labelled = f"data.images={out}/images|data.val_images={out}/val_images"
    last = "finetune" if size == "vitb" else "finetune_448"
    assert (
        f"/prepare_data.sbatch|--images|{tmp_path}/my validation|--out|{out}/val_images|--workers|2|--max_bad_share|0|"
        in submitted["prepare_val"]
    )
    assert (
        f"|--images|{tmp_path}/my images|--out|{out}/images|--workers|2|" in submitted["prepare_data"]
        and "max_bad_share" not in submitted["prepare_data"]
    )
    assert (
        f"/finetune_{size}.sbatch|--out|{out}/finetune|{labelled}|init.weights={out}/pretrain|ema.decay=0.9|"
        in submitted[f"finetune_{size}"]
    )
    if size == "vith":
        assert (
            f"/finetune_vith_448.sbatch|--out|{out}/finetune_448|{labelled}|init.weights={out}/finetune|ema.decay=0.8|"
            in submitted["finetune_vith_448"]
        )
    assert f"/convert.sbatch|{out}/pretrain|--out|{out}/release|--to|hf|" in submitted["convert"]
    assert f"/convert.sbatch|{out}/{last}|--out|{out}/classifier|--to|hf|" in submitted["convert_classifier"]
    assert (
        f"/evaluate.sbatch|{out}/classifier|--images|{out}/val_images|--out|{out}/top1.json|--batch|8|"
        in submitted["evaluate"]
    )


def test_pipeline_takes_a_flat_validation_folder_whose_labels_are_listed(recording_sbatch, tmp_path):
    labelled_folders(tmp_path)
    (tmp_path / "flat").mkdir()
    done = pipeline(
        recording_sbatch, "my images", "out", VAL_DIR="flat", PREPARE_VAL_ARGS="--synsets LOC_val_solution.csv"
    )
    assert done.returncode == 0, done.stderr
    assert "|--synsets|LOC_val_solution.csv|" in (recording_sbatch / "sbatch.log").read_text().splitlines()[1]


@pytest.mark.parametrize(
    "size, env, word",
    [
        ("vith", {"VAL_DIR": "nowhere"}, "nowhere"),
        ("vith", {"VAL_DIR": "flat"}, "--synsets"),
        ("vith", {"VAL_DIR": "fewer"}, "n01443537"),
        ("vith", {"VAL_DIR": "more"}, "n99999999"),
        ("vith", {"FINETUNE_ARGS": "ema.decay=0"}, "FINETUNE_ARGS"),
        ("vitb", {"VAL_DIR": "my validation", "FINETUNE_448_ARGS": "ema.decay=0"}, "FINETUNE_448_ARGS"),
    ],
)
def test_pipeline_refuses_what_would_fail_after_days_of_pretraining(recording_sbatch, tmp_path, size, env, word):
    folders = labelled_folders(tmp_path)
    (tmp_path / "flat").mkdir()
    (tmp_path / "fewer" / "n01440764").mkdir(parents=True)
    shutil.copytree(folders["val"], tmp_path / "more")
    (tmp_path / "more" / "n99999999").mkdir()
    done = pipeline(recording_sbatch, "my images", "out", size, **env)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and word in done.stderr
    assert not (recording_sbatch / "sbatch.log").read_text()


def test_pipeline_takes_no_folder_of_a_system_for_a_class(recording_sbatch, tmp_path):
    folders = labelled_folders(tmp_path)
    for name in [*SYSTEM_FOLDERS, "FOUND.000", "@eaDir", "$Recycle.Bin"]:
        (folders["val"] / name).mkdir(exist_ok=True)
    done = pipeline(recording_sbatch, "my images", "out", VAL_DIR="my validation")
    assert done.returncode == 0, done.stderr


def test_pipeline_refuses_to_fine_tune_on_images_without_classes(recording_sbatch, tmp_path):
    labelled_folders(tmp_path)
    (tmp_path / "flat").mkdir()
    done = pipeline(recording_sbatch, "flat", "out", VAL_DIR="my validation")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "class folders" in done.stderr


def test_pipeline_keeps_folder_names_with_spaces_in_one_piece(recording_sbatch, tmp_path):
    (tmp_path / "my images").mkdir()
    done = pipeline(recording_sbatch, "my images", "my run")
    assert done.returncode == 0, done.stderr
    submitted = (recording_sbatch / "sbatch.log").read_text().splitlines()
    assert f"|--images|{tmp_path}/my images|--out|{tmp_path}/my run/images|" in submitted[0]
    assert f"|data.tokens={tmp_path}/my run/tokens|" in submitted[2]


def test_pipeline_takes_back_what_it_submitted_when_a_later_job_is_refused(recording_sbatch, raw, tmp_path):
    done = pipeline(recording_sbatch, raw, tmp_path / "out", FAIL_AT="3")
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


def test_cluster_settings_reach_sbatch_and_a_variable_of_the_environment_wins_in_the_job(
    recording_sbatch, raw, tmp_path
):
    home = tmp_path / "home"
    shutil.copytree(LAUNCHERS, home / "launchers")
    settings = home / "launchers" / "cluster.env"
    settings.write_text(settings.read_text().replace("# export SBATCH_PARTITION=gpu", "export SBATCH_PARTITION=gpu"))
    done = shell(
        "bash",
        home / "launchers" / "pipeline.sh",
        raw,
        tmp_path / "out",
        cwd=tmp_path,
        PATH=f"{recording_sbatch}:{os.environ['PATH']}",
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("gpu|") for line in (recording_sbatch / "sbatch.log").read_text().splitlines())
    script = f"set -eu; source {settings}; echo $PECO_HOME $PECO_DATA_ROOT $PECO_RUNS_ROOT"
    seen = shell("bash", "-c", script, SLURM_JOB_ID="1", PECO_DATA_ROOT="/elsewhere")
    assert seen.stdout.split() == [str(home), "/elsewhere", f"{home}/runs"], seen.stderr


@pytest.mark.parametrize(
    "images, out, word",
    [
        ("raw", "raw", "become a class"),
        ("raw", "raw/out", "become a class"),
        ("raw", "raw/a/../b", "become a class"),
        ("raw", "link/out", "become a class"),
        ("out/images", "out", "give another OUT_DIR"),
        ("out/images/n01440764", "out", "give another OUT_DIR"),
        ("raw", "a file/out", "cannot be made"),
    ],
)
def test_pipeline_writes_nothing_into_the_images(recording_sbatch, raw, tmp_path, images, out, word):
    (tmp_path / "link").symlink_to(raw)
    (tmp_path / "a file").touch()
    (tmp_path / images).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    done = pipeline(recording_sbatch, images, out)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and word in done.stderr, done.stderr
    assert not (recording_sbatch / "sbatch.log").read_text() and sorted(tmp_path.rglob("*")) == before


def test_pipeline_takes_images_that_lie_beside_its_own_folders(recording_sbatch, tmp_path):
    (tmp_path / "out" / "raw").mkdir(parents=True)
    done = pipeline(recording_sbatch, "out/raw", "out")
    assert done.returncode == 0, done.stderr


def tokenization(home: Path, launcher: str, *given: str, **env: str) -> str:
    done = shell("bash", home / "launchers" / f"{launcher}.sbatch", *given, PECO_HOME=str(home), **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\n", " ")


@pytest.mark.parametrize("asked", ["3", "1", "8"])
def test_a_part_of_the_tokenization_done_again_is_the_same_part(echoing_home, asked):
    """However many tasks are asked for: `--array=3` redoes part 3 of 8."""
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": asked, "SLURM_ARRAY_TASK_MAX": "3"}
    assert "--part 3 --parts 8 " in tokenization(echoing_home, "tokenize", **array) + " "
    assert "--part 3 --parts 16 " in tokenization(echoing_home, "tokenize", TOKENIZE_PARTS="16", **array)
    assert "--parts 16 " in tokenization(echoing_home, "tokenize_finish", TOKENIZE_PARTS="16")


def test_pipeline_says_how_many_parts_there_are(recording_sbatch, raw, tmp_path):
    done = pipeline(recording_sbatch, raw, tmp_path / "out", TOKENIZE_PARTS="4")
    submitted = dict(zip([line.split()[0] for line in done.stdout.splitlines()], submissions(recording_sbatch)))
    assert "|--array=0-3|" in submitted["tokenize"]
    assert "|--parts|4|" in submitted["tokenize"] and "|--parts|4|" in submitted["tokenize_finish"]


def submissions(tools: Path) -> list[str]:
    return (tools / "sbatch.log").read_text().splitlines()


WORD = "7-0-of this start"


def task(tmp_path: Path, command: str, word: str = WORD, **env: str) -> tuple[int, str]:
    """Exit code of task.sh around a command, and the code it left for the launcher.

    Args:
        word: what stands in the folder that the task leaves its code in.
    """
    folder = tmp_path / "exit"
    folder.mkdir(exist_ok=True)
    (folder / "word").write_text(f"{word}\n")
    env = {"PECO_EXIT_DIR": str(folder), "PECO_EXIT_WORD": WORD} | env
    done = shell("bash", LAUNCHERS / "task.sh", "bash", "-c", command, **env)
    return done.returncode, (folder / "code").read_text().strip() if (folder / "code").exists() else ""


def test_a_task_that_stopped_in_good_order_does_not_look_like_a_failure_to_srun(tmp_path):
    assert task(tmp_path, "exit 75") == (0, "75")


def test_a_task_that_fails_keeps_its_code_and_the_first_code_stands(tmp_path):
    assert task(tmp_path, "exit 2") == (2, "2")
    assert task(tmp_path, "kill -9 $$") == (137, "2")


def test_a_signal_to_the_whole_task_leaves_the_answer_to_the_stage(tmp_path):
    command = "trap 'sleep 0.2; exit 75' USR2; kill -USR2 $PPID; kill -USR2 $$; sleep 5"
    assert task(tmp_path, command) == (0, "75")


def test_a_rank_that_refused_its_input_outweighs_one_that_lost_it_for_that_but_a_crash_does_not(tmp_path):
    assert task(tmp_path, "exit 76") == (76, "76")
    assert task(tmp_path, "exit 1") == (1, "76"), "a rank that lost the others may well crash of it"
    assert task(tmp_path, "exit 2") == (2, "2")
    assert task(tmp_path, "exit 76") == (76, "2")


@pytest.mark.parametrize(
    "word, env",
    [
        ("7-0-of another start", {}),  # a folder of this name on a node's own disk
        ("", {}),
        (WORD, {"PECO_EXIT_DIR": ""}),  # the launcher found no folder
        (WORD, {"PECO_EXIT_DIR": "/nowhere"}),  # a folder that this node does not see
        (WORD, {"PECO_EXIT_DIR": "/proc/self"}),  # one that takes no file
    ],
)
def test_a_task_that_cannot_leave_its_code_tells_srun_that_it_stopped_in_good_order(tmp_path, word, env):
    assert task(tmp_path, "exit 75", word, **env) == (75, "")
    assert task(tmp_path, "exit 2", word, **env) == (2, "")
    assert task(tmp_path, "exit 0", word, **env) == (0, "")


def test_a_disk_that_is_full_when_the_code_is_written_ends_the_task_with_75(tmp_path):
    (tmp_path / "full.sh").write_text(f"{FULL}\n")
    assert task(tmp_path, "exit 75", BASH_ENV=str(tmp_path / "full.sh")) == (75, "")


# In bash: every file is as on a full disk, or over a quota.
FULL = "trap '' XFSZ; ulimit -S -f 0"


class Job:
    """One job over its restarts: common.sh between a srun that ends as it is told and a scontrol that writes down what
    is asked of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, tools = folder, folder / "tools"
        tools.mkdir()
        (tools / "srun").write_text(
            '#!/bin/bash\neval "$MISHAP"\n[ -z "$FIRST" ] || echo "$FIRST" > "$PECO_EXIT_DIR/code"\nexit "$CODE"\n'
        )
        (tools / "scontrol").write_text(
            '#!/bin/bash\nulimit -S -f unlimited\ncase "$1 $2" in "show hostnames") echo n1 ;; "show node") echo '
            f'NodeAddr=127.0.0.1 ;; *) echo "$*" >> {folder}/asked; exit "${{REFUSED:-0}}" ;; esac\n'
        )
        for tool in tools.iterdir():
            tool.chmod(0o755)
        self.env = dict(
            PATH=f"{tools}:{os.environ['PATH']}",
            SLURM_JOB_ID="7",
            SLURM_JOB_NODELIST="n1",
            SLURM_JOB_NUM_NODES="1",
            SLURM_CPUS_ON_NODE="2",
        )
        self.env |= {"SLURM_SUBMIT_DIR": str(folder), "PECO_VENV": "/nowhere"}
        self.name = "7"

    def end(self, code: int, first: str = "", *, full: bool = False, **env: str) -> tuple[int, bool]:
        """Exit code of the batch script whose srun ends with `code` after a task left `first`.

        Whether the job goes back into the queue.

        Args:
            full: no file takes a byte, wherever it is.
        """
        asked = self.folder / "asked"
        asked.unlink(missing_ok=True)
        script = f"source {LAUNCHERS}/common.sh && run_ranks stage.py"
        script = f"{FULL}; {script}" if full else script
        done = shell("bash", "-c", script, cwd=self.folder, **self.env, CODE=str(code), FIRST=first, **env)
        assert "line " not in done.stderr, done.stderr  # how bash begins a complaint
        self.output = done.stdout + done.stderr
        return done.returncode, asked.exists() and asked.read_text() == f"requeue {self.name}\n"

    def left_behind(self) -> list[Path]:
        return list(self.folder.glob(".peco_*"))


@pytest.mark.parametrize(
    "code, first, ends",
    [
        (0, "", (0, False)),
        (0, "75", (75, True)),  # stopped in good order
        (137, "137", (137, True)),  # a rank was killed
        # a rank lost the others, which srun then killed
        (137, "76", (76, True)),
        # so suddenly that no task could write its code
        (139, "", (139, True)),
        (137, "75", (137, True)),  # a rank was killed while the others saved
        (1, "75", (1, False)),
        (1, "1", (1, False)),
        (143, "2", (2, False)),
        (9, "rubbish", (9, False)),
    ],
)
def test_how_a_stage_ends_decides_whether_the_job_runs_again(tmp_path, code, first, ends):
    job = Job(tmp_path)
    assert job.end(code, first) == ends
    assert len(job.left_behind()) == (ends[1] and ends[0] != 75), (
        "only a count of faults outlives the job, and only where it runs again"
    )


def test_faults_in_a_row_are_counted_and_a_stop_in_good_order_begins_the_count_anew(tmp_path):
    job = Job(tmp_path)
    ends = [job.end(137, first, PECO_FAULT_RESTARTS="2") for first in ("76", "137")] + [
        job.end(0, "75", PECO_FAULT_RESTARTS="2")
    ]
    ends += [job.end(137, "76", PECO_FAULT_RESTARTS="2") for _ in range(3)]
    assert ends == [(76, True), (137, True), (75, True), (76, True), (76, True), (76, False)]
    assert job.left_behind() == []


def test_a_cluster_that_refuses_to_requeue_gets_the_stages_own_code(tmp_path):
    job = Job(tmp_path)
    assert job.end(137, "76", REFUSED="1")[0] == 76 and job.end(0, "75", REFUSED="1")[0] == 75
    assert job.left_behind() == []


def test_a_task_of_an_array_goes_back_alone_though_its_id_is_the_arrays(tmp_path):
    job = Job(tmp_path)
    job.env |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    job.name = "7_3"
    assert job.end(0, "75") == (75, True) and job.end(137, "76") == (76, True)


# /proc: root may write into a folder of any mode.
@pytest.mark.parametrize("submitted_from", ["/proc/self", "/nowhere", "/dev/null"])
def test_a_submit_folder_that_cannot_be_written_hides_no_stop_in_good_order(tmp_path, submitted_from):
    """The codes go through another folder, and where there is none through srun alone; the job is never COMPLETED."""
    job = Job(tmp_path)
    job.env["SLURM_SUBMIT_DIR"] = submitted_from
    (tmp_path / "runs").mkdir()
    assert job.end(0, "75", PECO_RUNS_ROOT=str(tmp_path / "runs")) == (75, True)
    assert job.end(75, full=True) == (75, True), "a task that cannot leave its code gives it to srun"
    assert job.end(0, full=True) == (0, False) and job.end(2, full=True) == (2, False)
    assert job.end(137, full=True) == (137, False) and "no file can be written to count it" in job.output
    assert not list((tmp_path / "runs").iterdir()) and not job.left_behind()


@pytest.mark.parametrize(
    "mishap",
    [
        'rm -r "$PECO_EXIT_DIR"',  # the file system of the submit folder is gone
        'echo another > "$PECO_EXIT_DIR/word"',
        ': > "$PECO_EXIT_DIR/code"',  # a task left a code, and it is not there
    ],
)
def test_a_job_whose_end_cannot_be_known_is_not_completed(tmp_path, mishap):
    job = Job(tmp_path)
    assert job.end(0, MISHAP=mishap) == (1, False)
    assert [line for line in job.output.splitlines() if line.startswith("error:")] and not job.left_behind()
    assert job.end(75, MISHAP=mishap) == (75, True) and job.end(2, MISHAP=mishap) == (2, False)


@pytest.mark.parametrize(
    "asked, ranks",
    [
        ({"SLURM_GPUS_PER_NODE": "8"}, 8),
        ({"SLURM_GPUS_PER_NODE": "h100:8"}, 8),
        ({"SLURM_GPUS_PER_NODE": "a100:4,h100:4"}, 8),
        ({"SLURM_GPUS_PER_NODE": "a100:2,h100:2,v100:1"}, 5),
        ({"SLURM_GPUS_PER_NODE": "volta,h100:08"}, 9),
        ({"SLURM_GPUS_PER_NODE": "0"}, 1),
        ({"SLURM_GPUS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "8"}, 2),
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({}, 1),
        ({"SLURM_GPUS_ON_NODE": "4", "TASKS_PER_NODE": "3"}, 3),
    ],
)
def test_there_is_a_rank_for_each_gpu_of_a_node_of_whatever_type(tmp_path, asked, ranks):
    script = f"source {LAUNCHERS}/common.sh && echo $TASKS_PER_NODE"
    done = shell("bash", "-c", script, cwd=tmp_path, **Job(tmp_path).env, **asked)
    assert done.stdout.split() == [str(ranks)] and not done.stderr, done.stderr


@pytest.mark.parametrize("value", ["abc", "0", "-1", "2.5", "8 8", "08x"])
def test_a_number_of_ranks_a_node_that_is_none_is_refused(tmp_path, value):
    script = f"source {LAUNCHERS}/common.sh"
    done = shell("bash", "-c", script, cwd=tmp_path, **Job(tmp_path).env, TASKS_PER_NODE=value)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "TASKS_PER_NODE" in done.stderr


@pytest.mark.parametrize("value", ["many", "-1", ""])
def test_a_number_of_fault_restarts_that_is_none_is_refused(tmp_path, value):
    done = shell(
        "bash", "-c", f"source {LAUNCHERS}/common.sh", cwd=tmp_path, **Job(tmp_path).env, PECO_FAULT_RESTARTS=value
    )
    refused = done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "PECO_FAULT_RESTARTS" in done.stderr
    assert refused == (value != "")  # empty stands for the default


def test_jobs_hand_the_staging_disk_on_to_their_ranks():
    ask = f"source {LAUNCHERS / 'cluster.env'} && env"
    inside = shell("bash", "-c", ask, SLURM_JOB_ID="1", PECO_STAGE_DIR="/scratch/me").stdout.splitlines()
    assert "PECO_STAGE_DIR=/scratch/me" in inside
    assert "PECO_STAGE_DIR=" in shell("bash", "-c", ask, SLURM_JOB_ID="1").stdout.splitlines(), "off by default"
