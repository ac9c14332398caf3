"""benchmarks.reproduce: the paper's tables as data, the chain of full size as its programs take it, a table at small
scale, run to its end.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest
import test_readme
import timm
import torch
from conftest import REPOSITORY, run_stage
from PIL import Image

from benchmarks import paper_chain, reproduce, stages
from benchmarks.paper_inputs import untrained
from benchmarks.paper_small import Progress, SmallStep, SmallTable, run_in_order
from benchmarks.paper_tables import read_paper
from peco_ds.config import ClassifierSettings, FinetuneRecipe, ModelSettings, PretrainRecipe, TokenizerRecipe
from peco_ds.errors import UserError
from peco_ds.models.classifier import build_classifier
from peco_ds.recipe_files import load_recipe

PAPER = read_paper()
FULL = [number for number, table in PAPER.tables.items() if any(row.arm for row in table.rows)]
SMALL = [number for number, table in PAPER.tables.items() if table.measures and not table.full_only]
TINY = (
    "tokenizer.channels=8 tokenizer.channel_mults=[1,1,1,1] tokenizer.z_channels=8 tokenizer.num_codes=16 "
    "tokenizer.code_dim=4 tokenizer.kmeans_vectors=256 tokenizer.kmeans_iters=1 perceptual.blocks=[1,3] "
    "views.tokenizer_px=32 schedule.steps=2 schedule.warmup_steps=1 run.global_batch=4 run.micro_batch=4 "
    "data.num_workers=0 evaluation.max_images=4 pretrain:views.tokenizer_px=32"
).split()
# a fixture of another file; it reads a command line as its program does
take = test_readme.take


# ------------------------------------------------------------------------------------------------ the data


def test_all_tables_are_there_and_a_run_has_the_same_published_figure_in_each():
    assert list(PAPER.tables) == list(range(1, 13))
    found: dict[str, set] = {}
    for table in PAPER.tables.values():
        for row in table.rows:
            if row.arm and table.columns[0] in ("top-1", "clean"):
                found.setdefault(row.arm, set()).add(row.published[0])
    assert len(found) == len(PAPER.arms) and all(len(figures) == 1 for figures in found.values()), found


@pytest.mark.parametrize("name", PAPER.tokenizers)
def test_the_settings_of_a_tokenizer_go_with_its_recipe(name):
    wanted = PAPER.tokenizers[name]
    if wanted.release:
        return
    recipe = load_recipe(TokenizerRecipe, wanted.recipe, PAPER.tokenizer_settings(name)).recipe
    assert bool(wanted.judge) == bool(recipe.perceptual.weight) and bool(wanted.judge) == bool(
        recipe.perceptual.weights
    )


@pytest.mark.parametrize("name", PAPER.arms)
def test_an_arm_pre_trains_for_the_epochs_of_its_name_and_is_fine_tuned_in_its_size(name):
    arm = PAPER.arms[name]
    recipe = load_recipe(PretrainRecipe, arm.pretrain, PAPER.pretrain_settings(name)).recipe
    assert recipe.schedule.epochs == (300 if name.endswith("_300") else 800)
    tuned = [load_recipe(FinetuneRecipe, other, []).recipe.model for other in arm.finetune]
    assert [model.width for model in tuned] == [recipe.model.width] * len(arm.finetune)


def test_our_own_figures_stand_in_the_record_that_they_name():
    checked = 0
    for table in PAPER.tables.values():
        if table.ours:
            record = (REPOSITORY / "docs" / re.search(r"\]\((\S+\.md)\)", table.ours)[1]).read_text()
            figures = re.findall(r"\d+\.\d+", table.ours.split("(")[0])
            assert figures and all(re.search(rf"\b{re.escape(figure)}\b", record) for figure in figures)
            checked += 1
    assert checked


# ------------------------------------------------------------------------------------------------ full size


def commands(number: int) -> list[str]:
    """Of a table, those for Slurm too."""
    text = paper_chain.script(number, PAPER).replace("\\\n", "").replace("\n# Slurm: ", "\n")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


EVERY = list(dict.fromkeys(line for number in FULL for line in commands(number)))


@pytest.mark.parametrize("line", EVERY, ids=range(len(EVERY)))
def test_every_command_of_the_chain_is_one_that_its_program_takes(line, take, monkeypatch, request):
    words = shlex.split(line)
    # what the launcher adds itself
    words += ["--images", "images/val"] if words[1].endswith("evaluate.sbatch") else []
    test_readme.test_every_command_of_a_page_is_one_that_its_program_takes("", words, take, monkeypatch, request)


@pytest.mark.parametrize("number", FULL)
def test_a_command_starts_from_what_a_command_above_it_makes(number):
    made, needed = set(), 0
    for line in commands(number):
        words = shlex.split(line)
        for word in words:
            if found := re.search(r"(?:init\.weights=|data\.tokenizer=\$PWD/)(runs/\w+)", word):
                assert found[1] in made, line
                needed += 1
            if word.startswith("data.tokens=") and "pretrain.py" in line:
                assert word in made, line
        made |= {word for word in words if word.startswith("data.tokens=")}
        made |= {words[place + 1] for place, word in enumerate(words) if word == "--out"}
    assert needed or PAPER.tables[number].measures == "tokens"


def test_the_script_of_a_table_has_its_published_figures_and_prices_a_shared_run_once(capsys):
    reproduce.main(["--table", "10", "--scale", "full"])
    printed = capsys.readouterr().out
    assert all(f"top-1 {figure}" in printed for figure in ("82.9", "84.1", "83.6", "83.5"))
    hours = [float(text) for text in re.findall(r"^# .*: ([\d.]+) GPU-hours$", printed, flags=re.MULTILINE)]
    total = float(re.search(r"^# ([\d,.]+) GPU-hours in all", printed, flags=re.MULTILINE)[1].replace(",", ""))
    assert sum(hours) == pytest.approx(total, rel=0.01)
    assert printed.count("pretrain.py") == len(PAPER.tables[10].rows)


def test_the_page_is_what_its_command_makes_and_its_bill_adds_up():
    page = reproduce.PAGE.read_text()
    assert reproduce.page(page, PAPER) == page, "run: python -m benchmarks.reproduce --write_docs"
    bill = page.split("## The bill")[1]
    lines = [line.strip("| ").split(" | ") for line in bill.splitlines() if line.startswith("| ")]
    rows = [[float(cell.replace(",", "")) for cell in line[1:]] for line in lines[1:-2]]
    totals = [float(cell.split(" ")[0].replace(",", "")) for cell in lines[-2][1:]]
    assert totals == pytest.approx([sum(column) for column in zip(*rows)], rel=0.01)
    assert sum(line[0].startswith("pre-training") for line in lines) == 9 and "9 distinct pre-trainings" in bill
    # the run of 448 px goes on from that of 224, and what is billed once is not billed for both tables
    assert bill.count("pre-training vith") == bill.count("pre-training peco_800") == 1


# ---------------------------------------------------------------------------------------------- small scale


@pytest.fixture(scope="module")
def images(real_data, tmp_path_factory) -> Path:
    """A tar of a folder with train/ and val/, two classes each."""
    folder = tmp_path_factory.mktemp("images")
    paths = iter(real_data.imagenet)
    with tarfile.open(folder / "tiny.tar", "w") as tar:
        for split, count in (("train", 8), ("val", 4)):
            for place in range(2 * count):
                path = next(paths)
                tar.add(path.resolve(), f"tiny/{split}/class_{place % 2}/{path.name}")
    return folder / "tiny.tar"


@pytest.fixture(scope="module")
def judge_file(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=0)
    path = tmp_path_factory.mktemp("judge") / "vit_tiny.pth"
    torch.save({"model": net.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory) -> Path:
    """Of the two classes; it has not learned anything."""
    torch.manual_seed(2)
    model = ModelSettings(image_px=32, patch_px=8, width=24, depth=2, heads=2, layer_scale=1.0, drop_path=0)
    path = tmp_path_factory.mktemp("classifier") / "classifier.pth"
    torch.save({"model": build_classifier(model, ClassifierSettings(head_scale=1.0), 2).state_dict()}, path)
    return path


class Started(list):
    """Names of stages that were started, each as a fork; the one called `refused` ends with 1."""

    refused = ""

    def run(self, command, stdout, stderr, env) -> subprocess.CompletedProcess:
        name = Path(stdout.name).stem
        if name == self.refused:
            return subprocess.CompletedProcess(command, 1)
        done = run_stage(Path(command[1]).stem, *command[2:], check=False)
        stdout.write(done.stdout + done.stderr)
        self.append(name)
        return done


@pytest.fixture
def started(monkeypatch) -> Started:
    started = Started()
    monkeypatch.setattr(stages.subprocess, "run", started.run)
    return started


def table_of(number: int, images: Path, *words: str) -> SmallTable:
    args = reproduce.parse(reproduce.arguments(), ["--table", str(number), "--images", str(images), *words])
    return reproduce.prepared(args, PAPER)


def test_a_table_runs_to_its_record_and_goes_on_where_it_was_stopped(
    images, judge_file, classifier_file, started, tmp_path, capsys
):
    words = ["--table", "7", "--images", str(images), "--out", str(tmp_path), "--judge", str(judge_file)]
    words += ["--classifier", str(classifier_file), "--arms", "plain_300", "peco_300", "--set", *TINY]
    words += ["--also", str(shutil.copy(images, tmp_path / "again.tar"))]
    started.refused = "codes_plain_0"
    with pytest.raises(SystemExit):
        reproduce.main(words)
    capsys.readouterr()
    assert started == ["pack_train", "pack_val", "pack_train_again", "pack_val_again", "tokenizer_plain_0"]
    started.refused = ""
    reproduce.main(words)
    printed = capsys.readouterr().out
    both = [[f"tokenizer_{name}_0", f"codes_{name}_0", f"codes_{name}_0_again"] for name in ("plain", "peco")]
    assert started[5:] == [*both[0][1:], *both[1]]
    assert printed.index("tokenizer 2 steps of 4 images") < printed.index("step 8 of 12: codes_plain_0")
    assert re.search(r"step 12 of 12: codes_peco_0_again \(about \d+ min to go\)", printed)

    record = (tmp_path / "table_7.md").read_text()
    assert record in printed and (tmp_path / "table_7.png").stat().st_size > 5000
    # originals and two tokenizers, 32 px enlarged to 128
    with Image.open(tmp_path / "table_7_images.png") as shown:
        assert 3 * 128 < shown.width < 3 * 140 and shown.height > 8 * 128
    heads, _, *rows = [line.strip("| ").split(" | ") for line in record.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows] == [["pixel loss", "82.9"], ["+ perceptual loss", "84.1"]]
    for name, row in zip(("plain", "peco"), rows):
        codes = json.loads((tmp_path / f"codes_{name}_0.json").read_text())
        cells, probes = dict(zip(heads, row)), codes["code_probes"]["images_as"]
        read = codes["reconstructions_read_by"]
        assert cells["top-1 on reconstructions"] == f"{read['reconstructions']['top1']:.2f}"
        assert cells["PSNR"] == f"{codes['quality']['psnr']:.2f}"
        assert cells["codes used"] == f"{codes['quality']['codes_used']}"
        assert cells["mean code vector: linear"] == f"{probes['mean code vector']['best_linear']:.2f}"
        # the same images under another name
        assert cells["again, bag of codes: linear"] == cells["bag of codes: linear"]
        assert cells["bag of codes: k-NN"] == f"{probes['bag of codes']['best_knn']:.2f}"
    judges = [
        json.loads((tmp_path / f"codes_{name}_0.json").read_text())["facts"]["judge"] for name in ("plain", "peco")
    ]
    assert judges[0] == "none" and judge_file.name in judges[1]

    started.clear()
    reproduce.main(words)
    assert started == []


@pytest.mark.parametrize("number", SMALL)
def test_every_arm_of_a_table_has_a_recipe_of_small_size_and_an_equal_budget(number, images, tmp_path):
    words = ["--bootstrap_judge", "--pretrain", "--dalle", str(tmp_path), "--out", str(tmp_path), "--seeds", "2"]
    table = table_of(number, images, *words)
    steps = table.steps()
    assert len({step.name for step in steps}) == len(steps)
    for place, step in enumerate(steps):
        assert set(step.needs) <= {other.name for other in steps[:place]}, step.name
    for arm in table.arms.values():
        assert arm.tokenizer is None or f"pretrain_{arm.name}_1" in {step.name for step in steps}
    tokenizers = [arm.tokenizer for arm in table.arms.values() if arm.tokenizer and not arm.tokenizer.release]
    assert len({table.tokenizer_stage(tokenizer).images for tokenizer in tokenizers}) == 1
    assert table.left_out == [] or number == 5


def test_judges_on_the_command_line_are_the_arms_of_table_5(images, judge_file, tmp_path):
    words = ["--judge", str(judge_file), "--bootstrap_judge", "--out", str(tmp_path)]
    table = table_of(5, images, *words)
    assert list(table.arms) == ["plain_300", "judge_vit_tiny_pth", "judge_bootstrapped"]
    of_file, of_none = (table.arms[name].tokenizer.settings for name in ("judge_vit_tiny_pth", "plain_300"))
    assert f"perceptual.weights={judge_file}" in of_file and "perceptual.blocks=[1,2,3]" in of_file
    assert "perceptual.weight=0" in of_none and len(table.left_out) == 3


def test_a_judges_own_settings_go_to_its_arm_alone_and_the_sweep_to_the_first_judge(images, judge_file, tmp_path):
    own = "perceptual.blocks=[2,4]", "perceptual.image_px=112"
    words = ["--judge", str(judge_file), *own, "--judge", "random:resnet18", "--weight", "1,10", "--out", str(tmp_path)]
    table = table_of(5, images, *words)
    assert list(table.arms)[1:] == [
        *("judge_vit_tiny_pth", "judge_untrained_resnet18", "judge_vit_tiny_pth_channel_10"),
    ]
    given, control, swept = (table._tokenizer_recipe(arm.tokenizer).perceptual for arm in list(table.arms.values())[1:])
    assert (given.blocks, given.image_px, swept.blocks, swept.weight) == ((2, 4), 112, (2, 4), 10)
    assert control.blocks == () and control.image_px != 112
    assert [table.arms[name].label for name in list(table.arms)[1:3]] == ["vit_tiny_pth", "untrained_resnet18"]
    # a control is the same network wherever it is made
    (tmp_path / "other").mkdir()
    made = [Path(untrained("resnet18", folder)) / "model.safetensors" for folder in (tmp_path, tmp_path / "other")]
    assert made[0].read_bytes() == made[1].read_bytes()


def test_codes_are_probed_on_further_images_too(images, tmp_path):
    tar = shutil.copy(images, tmp_path / "dogs v2.tar")
    table = table_of(4, images, "--bootstrap_judge", "--also", str(tar), "--out", str(tmp_path / "out"))
    steps = {step.name: step for step in table.steps()}
    step = steps["codes_plain_0_dogs_v2"]
    assert step.needs == ("tokenizer_plain_0", "pack_train_dogs_v2", "pack_val_dogs_v2")
    assert steps["pack_val_dogs_v2"].needs == ("unpack_dogs_v2",)
    assert tmp_path / "out/images_dogs_v2/val" in step.words and "Codes probed on dogs_v2 too: 16" in table.plan()


def test_a_sweep_adds_every_pair_but_the_one_that_is_an_arm_already(images, tmp_path):
    words = ["--bootstrap_judge", "--out", str(tmp_path), "--normalize", "channel,none", "--weight", "0.1,1"]
    table = table_of(4, images, *words)
    swept = ["peco_300_channel_0_1", "peco_300_none_0_1", "peco_300_none_1"]
    assert list(table.arms) == ["plain_300", "peco_300", *swept]
    assert table.arms[swept[1]].tokenizer.settings[-2:] == ("perceptual.normalize=none", "perceptual.weight=0.1")


def test_the_plan_says_arms_budget_and_what_is_left_out_and_runs_nothing(images, tmp_path, capsys):
    words = ["--table", "2", "--images", str(images), "--bootstrap_judge", "--dry_run", "--out", str(tmp_path / "out")]
    reproduce.main(words)
    printed = capsys.readouterr().out
    assert "16 to train on, 8 to measure on" in printed and not (tmp_path / "out").exists()
    assert "lite_300: PeCo lite, 300 epochs; tokenizer 1,000 steps of 16 images (" in printed and "TFLOP" in printed
    assert "Left out: BEiT: DALL-E's tokens, 300 epochs: no --dalle" in printed
    assert "codes_lite_0" in printed


def test_the_time_to_go_is_that_of_steps_of_its_kind_by_their_flop(tmp_path):
    steps = [
        SmallStep("tokenizer_a_0", "train", flops=1e12),
        SmallStep("tokenizer_b_0", "train", flops=3e12),
        SmallStep("codes_a_0", "python"),
    ]
    (tmp_path / "tokenizer_a_0.json").write_text(json.dumps({"seconds": 600.0}))
    progress = Progress(steps, tmp_path, jobs=1)
    assert progress.line("tokenizer_b_0") == (
        "step 2 of 3: tokenizer_b_0 (about 30 min to go and what is not yet known: codes)"
    )
    (tmp_path / "tokenizer_b_0.json").write_text(json.dumps({"seconds": 1800.0}))
    progress.ends(steps[1])
    assert progress.line("codes_a_0") == "step 3 of 3: codes_a_0 (time to go not yet known)"


def test_two_steps_run_at_a_time_each_after_those_it_needs():
    both = threading.Barrier(2, timeout=60)
    ended: list[str] = []

    def do(step: SmallStep) -> None:
        if step.name in ("a", "b"):
            both.wait()
        ended.append(step.name)

    needs = {"a": (), "c": ("a", "b"), "b": (), "d": ("c",)}
    run_in_order([SmallStep(name, "python", needs=needed) for name, needed in needs.items()], do, jobs=2)
    assert set(ended[:2]) == {"a", "b"} and ended[2:] == ["c", "d"]


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "nothing to do"),
        (["--table", "13"], "tables 1 to 12"),
        (["--table", "7"], "needs --images"),
        (["--table", "1", "--images", "{images}"], "not at small scale"),
        (["--table", "6", "--images", "{images}"], "Losses on codewords are not provided"),
        (["--table", "7", "--images", "{images}"], "--table 7: needs a judge"),
        (["--table", "8", "--images", "{images}", "--bootstrap_judge"], "add --pretrain"),
        (["--table", "7", "--images", "{images}", "--judge", "/no/judge"], "no such file or folder"),
        (["--table", "7", "--images", "{images}", "--bootstrap_judge", "--arms", "beit_300"], "not in table 7"),
        (["--table", "7", "--images", "{images}", "--set", "tokeniser:a.b=1"], "STAGE one of tokenizer"),
        (["--table", "7", "--images", "{images}", "--bootstrap_judge", "--set", "optim.lrr=1"], "did you mean"),
        (["--table", "7", "--images", "{images}", "--bootstrap_judge", "--weight", "0"], "above 0"),
        (["--table", "7", "--images", "{images}", "--bootstrap_judge", "--normalize", "batch"], "not one of channel"),
        (["--table", "7", "--images", "{folder}", "--bootstrap_judge"], "0 images in train/"),
        (["--table", "7", "--images", "{images}", "--judge", "random:vgg17"], "timm makes no network of it"),
        (["--table", "7", "--images", "{images}", "--judge", "a", "optim.lr=1"], "perceptual.key=value; others: --set"),
        (
            ["--table", "7", "--images", "{images}", "--bootstrap_judge", "--also", "/no"],
            "--also /no: neither a folder",
        ),
        (["--table", "7", "--images", "/no/images", "--bootstrap_judge"], "neither a folder nor a tar"),
    ],
)
def test_what_makes_no_table_is_refused_in_a_line(words, told, images, tmp_path):
    words = [word.format(images=images, folder=tmp_path) for word in words]
    with pytest.raises(UserError, match=re.escape(told)) as error:
        reproduce.main([*words, "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_it_starts_by_path_and_as_a_module(capsys):
    listed = run_stage("benchmarks/reproduce.py", "--list").stdout
    assert reproduce.main(["--list"]) == 0
    assert listed == capsys.readouterr().out and listed.count("\nTable ") == 11
