"""benchmarks.compare: what it would run, and what it refuses; its stages have tests of their own."""

import json

import pytest

from benchmarks import compare, small_scale_proof, stages
from peco_ds.errors import UserError


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


def test_the_small_scale_proof_trains_both_tokens_and_judges_by_the_plain_ones_first_network(commands, tmp_path):
    out = tmp_path / "out"
    small_scale_proof.main(["--images", "somewhere", "--out", str(out), "--seeds", "1", "--mim", "schedule.epochs=2"])
    of_tokens = {f"{run}_{arm}" for run in ("tokenizer", "codes", "probe") for arm in ("plain", "perceptual")}
    tuned = {f"classifier_{arm}_0" for arm in ("scratch", "plain", "perceptual")}
    assert of_tokens | tuned | {"pretrain_plain_0", "pretrain_perceptual_0"} <= set(commands)
    assert f"perceptual.weights={out / 'release_plain'}" in commands["tokenizer_perceptual"]
    assert str(out / "pretrain_plain_0") in commands["release_plain"]
    assert "init.weights" not in commands["classifier_scratch_0"]
    assert all("schedule.steps=20 " in commands[f"pretrain_{arm}_0"] for arm in ("plain", "perceptual"))
    assert "--train_images" in commands["codes_plain"], "a classifier of the codes alone"


def test_an_arm_that_sees_half_the_patches_makes_the_more_steps(commands, tmp_path):
    file = small_scale_proof.COMPARISON.with_name("imagenette.yaml")
    compare.main([str(file), "--images", "somewhere", "--out", str(tmp_path), "--seeds", "1"])
    steps = {
        arm: int(commands[f"pretrain_{arm}_0"].split("schedule.steps=")[1].split()[0])
        for arm in ("beit", "peco", "beitv2", "visible")
    }
    assert steps["beit"] == steps["peco"] == 100 and steps["beitv2"] < 100 < 2 * 100 < steps["visible"]


@pytest.mark.parametrize(
    "spoilt, told",
    [
        (("budget_of: plain", "budget_of: scratch"), "budget_of scratch: no pre-trained arm"),
        (("{release:plain}", "{release:perceptual}"), "arm perceptual needs a release of perceptual"),
        (("tokenizer: perceptual", "tokenizer: other"), "arm perceptual has the tokenizer other"),
        (("probe_codes", "prove_codes"), "prove_codes"),
    ],
)
def test_a_file_that_asks_for_what_is_not_there_is_refused(tmp_path, spoilt, told):
    text = small_scale_proof.COMPARISON.read_text()
    assert spoilt[0] in text
    (tmp_path / "file.yaml").write_text(text.replace(*spoilt))
    with pytest.raises(UserError, match=told):
        compare.read_comparison(tmp_path / "file.yaml")
