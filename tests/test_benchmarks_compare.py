"""benchmarks.compare: what it would run, and what it refuses; its stages have tests of their own."""

import json

import pytest
from conftest import REPOSITORY

from benchmarks import compare, stages
from peco_ds.errors import UserError

FILE = REPOSITORY / "benchmarks" / "compare" / "imagenette.yaml"


@pytest.fixture
def commands(monkeypatch) -> dict[str, str]:
    """Filled with the commands that were asked for, by name; none is run."""
    asked: dict[str, str] = {}

    def note(self, name: str, command: list[str]) -> None:
        asked[name] = " ".join(command)
        folder = self.out / "images" / name.removeprefix("pack_")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text(json.dumps({"samples": 640}))

    monkeypatch.setattr(stages.Stages, "_run_once", note)
    monkeypatch.setattr(compare.Comparisons, "write_results", lambda self: "")
    return asked


def test_tokenizers_are_trained_and_judged_by_the_network_of_an_earlier_arm(commands, tmp_path):
    out = tmp_path / "out"
    words = ["--images", "somewhere", "--out", str(out), "--seeds", "1", "--mim", "schedule.epochs=2"]
    compare.main([str(FILE), *words])
    of_tokens = {f"{run}_{tokens}" for run in ("tokenizer", "codes") for tokens in ("plain", "perceptual", "vqkd")}
    tuned = {f"classifier_{arm}_0" for arm in ("scratch", "beit", "peco", "mcbeit", "beitv2", "visible")}
    assert of_tokens | tuned | {"pretrain_beit_0", "pretrain_peco_0", "probe_peco"} <= set(commands)
    assert f"perceptual.weights={out / 'release_beit'}" in commands["tokenizer_perceptual"]
    assert str(out / "pretrain_beit_0") in commands["release_beit"]
    assert "init.weights" not in commands["classifier_scratch_0"]
    assert all("schedule.steps=20 " in commands[f"pretrain_{arm}_0"] for arm in ("beit", "peco"))
    assert f"--images {out / 'images/val'}" in commands["codes_plain"]


def test_an_arm_that_sees_half_the_patches_makes_the_more_steps(commands, tmp_path):
    compare.main([str(FILE), "--images", "somewhere", "--out", str(tmp_path), "--seeds", "1"])
    steps = {
        arm: int(commands[f"pretrain_{arm}_0"].split("schedule.steps=")[1].split()[0])
        for arm in ("beit", "peco", "beitv2", "visible")
    }
    assert steps["beit"] == steps["peco"] == 100 and steps["beitv2"] < 100 < 2 * 100 < steps["visible"]


@pytest.mark.parametrize(
    "spoilt, told",
    [
        (("budget_of: beit", "budget_of: scratch"), "budget_of scratch: no pre-trained arm"),
        (("{release:beit}", "{release:peco}"), "arm peco needs a release of peco"),
        (("tokenizer: perceptual", "tokenizer: other"), "arm peco has the tokenizer other"),
        (("probe_settings", "prove_settings"), "prove_settings"),
    ],
)
def test_a_file_that_asks_for_what_is_not_there_is_refused(tmp_path, spoilt, told):
    text = FILE.read_text()
    assert spoilt[0] in text
    (tmp_path / "file.yaml").write_text(text.replace(*spoilt))
    with pytest.raises(UserError, match=told):
        compare.read_comparison(tmp_path / "file.yaml")
