"""plan.py as a user runs it: without torch, in a second, and in one line where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.errors import UserError
from peco_ds.plan import main
from peco_ds.schema import ImageManifest, Shard, write_manifest

PLAN = Path(__file__).resolve().parents[1] / "peco_ds" / "plan.py"


def test_a_plan_imports_no_torch_and_names_its_assumptions(tmp_path):
    script = (
        "import sys, runpy; sys.argv = ['plan.py', '--gpus', '64', '--bad_node']\ntry: "
        f"runpy.run_path({str(PLAN)!r}, run_name='__main__')\nfinally: "
        f"sys.stderr.write(str(sorted({{'torch', 'deepspeed', 'timm'}} & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=600,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert done.returncode == 0 and done.stderr.endswith("[]"), done.stderr
    assert "Recommended for these GPUs" in done.stdout and "assumed" in done.stdout and "data sheet" in done.stdout


def test_several_counts_and_machines_make_a_table_values_and_an_image(tmp_path, capsys):
    assert (
        main(
            [
                "--hardware",
                "h100",
                "h200",
                "--gpus",
                "8",
                "64",
                "schedule.epochs=1600",
                "--json",
                str(tmp_path / "plan.json"),
                "--plot",
                str(tmp_path / "plan.png"),
            ]
        )
        == 0
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("8 ", "64 "))]
    assert len(rows) == 4 and sum("h200" in row for row in rows) == 2
    facts = json.loads((tmp_path / "plan.json").read_text())
    assert [(bill["hardware"]["name"], bill["gpus"]) for bill in facts["bills"]] == [
        ("h100", 8),
        ("h100", 64),
        ("h200", 8),
        ("h200", 64),
    ]
    with Image.open(tmp_path / "plan.png") as image:
        assert image.width > 500 and len(image.convert("L").resize((50, 20)).getcolors()) > 5


def test_the_old_flag_of_the_simulation_says_where_its_record_is_and_tells_of_a_bad_node(capsys):
    assert main(["--recipe", "finetune_vitb16", "--gpus", "16", "--simulate"]) == 0
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "benchmarks/plan_simulate_202611.md" in said.err
    assert "One bad node, finetune_vitb16 on 16 h100" in said.out and "twice as long +" in said.out


def test_settings_after_a_list_of_counts_are_settings(tmp_path):
    hours = {}
    for epochs in (10, 20):
        assert (
            main(
                [
                    "--gpus",
                    "8",
                    f"finetune_vith14:schedule.epochs={epochs}",
                    "finetune_vith14:schedule.warmup_epochs=1",
                    "--hardware",
                    "h100",
                    "--json",
                    str(tmp_path / "plan.json"),
                ]
            )
            == 0
        )
        rows = json.loads((tmp_path / "plan.json").read_text())["bills"][0]["written"]
        hours[epochs] = {
            row["recipe"]: row["by_pace"]["typical"]["hours"] for row in rows if row["stage"] != "tokenizing"
        }
    assert (
        hours[20]["finetune_vith14"] > 1.8 * hours[10]["finetune_vith14"]
        and hours[20]["peco_vith14"] == hours[10]["peco_vith14"]
    )


def test_a_refused_plan_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, PLAN, "--hardware", "h10"], capture_output=True, text=True, timeout=600)
    assert (
        done.returncode == 2
        and len(done.stderr.strip().splitlines()) == 1
        and "h100" in done.stderr
        and done.stdout == ""
    )


def test_a_json_that_the_stage_would_refuse_is_refused_here(tmp_path):
    (tmp_path / "own.json").write_text(
        json.dumps({"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1}})
    )
    with pytest.raises(UserError, match="run.micro_batch"):
        main(["--deepspeed_config", str(tmp_path / "own.json")])


def test_a_small_labelled_set_is_not_billed_as_imagenet(tmp_path):
    hours = {}
    for few in ([], ["--finetune_samples", "10_000", "--val_samples", "1000"]):
        main(["--samples", "3e6", "--json", str(tmp_path / "plan.json"), *few])
        rows = json.loads((tmp_path / "plan.json").read_text())["bills"][0]["written"]
        hours[bool(few)] = {
            row["recipe"]: row["by_pace"]["typical"]["hours"] for row in rows if row["stage"] != "tokenizing"
        }
    assert (
        hours[True]["finetune_vith14"] < hours[False]["finetune_vith14"] / 50
        and hours[True]["peco_vith14"] == hours[False]["peco_vith14"]
    )


def test_twice_the_epochs_take_twice_the_hours(tmp_path):
    hours = []
    for epochs in (800, 1600):
        main(["--gpus", "64", f"schedule.epochs={epochs}", "--json", str(tmp_path / "plan.json"), "--finetune_recipes"])
        rows = json.loads((tmp_path / "plan.json").read_text())["bills"][0]["written"]
        hours.append(next(row for row in rows if row["stage"] == "pre-training")["by_pace"]["typical"]["hours"])
    assert hours[1] == pytest.approx(2 * hours[0], rel=0.001)


def test_a_machine_of_ones_own_and_a_json_of_ones_own_count(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"base": "h100", "name": "mine", "gpus_per_node": 4, "network_bytes_s": 2.5e10})
    )
    (tmp_path / "own.json").write_text((DS_CONFIGS / "zero1.json").read_text())
    assert (
        main(
            [
                "--hardware",
                str(tmp_path / "mine.yaml"),
                "--gpus",
                "4",
                "8",
                "16",
                "--json",
                str(tmp_path / "a.json"),
                "--deepspeed_config",
                str(tmp_path / "own.json"),
            ]
        )
        == 0
    )
    main(["--hardware", "h100", "--gpus", "16", "--json", str(tmp_path / "b.json")])
    slow, quick = (
        json.loads((tmp_path / name).read_text())["bills"][-1]["total_hours"]["typical"]
        for name in ("a.json", "b.json")
    )
    assert slow > 1.05 * quick, "a sixteenth of the network"
    assert "mine" in capsys.readouterr().out


def test_images_of_the_set_that_is_packed_are_counted(tmp_path, capsys):
    shards = [Shard(f"{number}.tar", 40_000, 1, "0" * 64, "0" * 64) for number in range(3)]
    write_manifest(tmp_path, ImageManifest(shards=shards, samples=120_000))
    assert main(["--recipe", "peco_vittiny16", "--gpus", "1", f"data.images={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert "120,000 images" in text and "assumed: ImageNet-1K" not in text
    assert main(["--recipe", "peco_vittiny16", "--gpus", "1", "--samples", "123456"]) == 0
    assert "123,456 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--hardware", "h10"], "did you mean 'h100'"),
        (["--gpus", "0"], "at least 1"),
        (["--gpus", "24"], "not a multiple"),
        (["--gpus", "12"], "use 8 or 16"),
        (["--samples", "0"], "at least 1 image"),
        (
            ["--gpus", "8", "model.width=8192", "model.heads=64", "model.depth=64", "--hardware", "l40s"],
            "needs .* GiB a GPU",
        ),
        (["--json", "no/such/folder/plan.json"], "no folder no.such.folder"),
        (["--deepspeed_config", "zero9.json"], "no such file"),
        (["--recipe", "probe_vith14"], "trains no network"),
        (["--gpus", "eight"], "'eight' is no number, nor a setting"),
        (["--gpus", "8", "model,depth=2"], "nor a setting"),
        (["--samples", "2.5"], "no whole number"),
        (["--plot", "scaling.gif"], "the name of a .png file"),
        (["--json", "."], "the name of a .json file"),
        (["finetune_vith14:run.global_batch=15"], "is odd, and mixup pairs"),
        (["--tokenizer_recipe", "finetune_vitb16"], "train_tokenizer.py"),
        (["--recipe", "peco_vitb16", "--finetune_recipes", "finetune_vith14"], "does not go on from"),
        (["run.micro_bach=3"], "did you mean 'run.micro_batch'"),
    ],
)
def test_bad_input_is_one_line(arguments, said):
    with pytest.raises(UserError, match=said):
        main(arguments)


def test_the_catalogue_is_printed_with_its_sources(capsys):
    assert main(["--list_hardware"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("h100:", "h200:", "a100-40:", "a100-80:", "b200:", "l40s:", "data sheet"))
