"""benchmarks.scenes: what it would run, what it makes of runs, what it refuses; its stages have tests of their own."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from benchmarks import scenes, stages
from peco_ds.errors import UserError


@pytest.fixture
def inputs(tmp_path) -> dict[str, str]:
    """Options and what they name: a folder of scenes, a tar of images, classes, a tokenizer."""
    for part in ("images", "annotations"):
        for split in ("train", "test"):
            (tmp_path / "streets" / "inner" / part / split).mkdir(parents=True)
    (tmp_path / "things" / "train").mkdir(parents=True)
    with tarfile.open(tmp_path / "things.tar", "w") as tar:
        tar.add(tmp_path / "things", "things")
    shutil.rmtree(tmp_path / "things")
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    named = {"scenes": "streets", "classes": "classes.txt", "images": "things.tar", "tokenizer": "tokenizer"}
    return {option: str(tmp_path / name) for option, name in named.items()}


@pytest.fixture
def commands(monkeypatch) -> dict[str, str]:
    """Filled with the commands that were asked for, by name, in their order; none is run."""
    asked: dict[str, str] = {}
    monkeypatch.setattr(
        stages.Stages, "_run_once", lambda _self, name, command: asked.update({name: " ".join(map(str, command))})
    )
    return asked


def words(inputs: dict[str, str], out: Path, *more: str) -> list[str]:
    return [*(word for option, value in inputs.items() for word in (f"--{option}", value)), "--out", str(out), *more]


def write_run(folder: Path, miou: float) -> None:
    """What a segmentation leaves."""
    folder.mkdir(parents=True)
    rows = [{"step": step, "images": 7, "miou": miou * step, "aacc": 50.0, "macc": 20.0} for step in (1, 2)]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_both_starts_are_segmented_alike_but_for_their_weights(inputs, commands, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes.Scenes, "write_results", lambda self: "")
    out = tmp_path / "out"
    scenes.main(words(inputs, out, "--seeds", "2", "--segment", "schedule.steps=3", "--ignored", "11"))
    runs = [f"{arm}_{seed}" for seed in range(2) for arm in ("scratch", "pretrained")]
    assert list(commands) == ["pack_train", "pack_test", "pack_unlabelled", "tokens", "pretrain", *runs]
    for seed in range(2):
        scratch, pretrained = (commands[f"{arm}_{seed}"] for arm in ("scratch", "pretrained"))
        assert f"run.seed={seed} schedule.steps=3" in scratch
        start = f" init.weights={out / 'pretrain'}"
        assert start in pretrained
        assert pretrained.replace(start, "").replace("pretrained_", "scratch_") == scratch
    # No label is read before the segmentations, and no held-out image.
    assert "--labels none" in commands["pack_unlabelled"]
    links = {link.name: link.resolve() for link in (out / "sources" / "unlabelled").iterdir()}
    assert links["streets"] == Path(inputs["scenes"]).resolve() / "inner" / "images" / "train"
    assert links["things"] == out.resolve() / "sources" / "things" / "things" / "train"
    assert "--ignored 11" in commands["pack_train"] and "annotations/test" in commands["pack_test"]


def test_the_table_holds_the_ends_of_the_runs_and_is_made_again_from_what_stands(inputs, commands, tmp_path):
    out = tmp_path / "out"
    for seed in range(2):
        write_run(out / f"scratch_{seed}", 10.0 + seed)
        write_run(out / f"pretrained_{seed}", 20.0 + seed)
    (out / "pretrain").mkdir()
    (out / "pretrain" / "provenance.json").write_text(json.dumps({"commit": "0" * 40, "versions": {}}))
    (out / "pretrain" / "metrics.jsonl").write_text('{"step": 1, "loss": 7.0}\n{"step": 9, "loss": 6.25}\n')
    for _ in range(2):
        scenes.main(words(inputs, out, "--seeds", "2"))
    table = (out / "results.md").read_text()
    assert "| from scratch | 20.0, 22.0 | 21.0 | 50.0 | 20.0 |" in table
    assert "| pre-trained on codes, without labels | 40.0, 42.0 | 41.0 | 50.0 | 20.0 |" in table
    assert "9 steps, loss 7.00 to 6.25" in table
    assert (out / "results.png").stat().st_size > 1000
    assert len(json.loads((out / "results.json").read_text())["arms"]["scratch"]) == 2


@pytest.mark.parametrize("option", ["scenes", "classes", "images", "tokenizer"])
def test_what_is_not_there_is_named_before_anything_runs(inputs, commands, tmp_path, option):
    with pytest.raises(UserError, match=f"--{option} .*absent"):
        scenes.main(words({**inputs, option: str(tmp_path / "absent")}, tmp_path / "out"))
    assert not commands


def test_scenes_without_images_to_train_on_are_refused(inputs, commands, tmp_path):
    shutil.rmtree(Path(inputs["scenes"]) / "inner" / "images" / "train")
    with pytest.raises(UserError, match="holds no images/train/"):
        scenes.main(words(inputs, tmp_path / "out"))
