"""benchmarks.drawn_objects: what it draws, packs and asks for, and its record; the detector has tests of its own."""

import json

import pytest
from PIL import Image

from benchmarks import drawn_objects, stages
from benchmarks.record import OWN_PICTURE
from peco_ds.config import DetectRecipe
from peco_ds.data.objects import ObjectSet
from peco_ds.errors import UserError
from peco_ds.own_files import refuse_foreign
from peco_ds.recipe_files import load_recipe


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Sets are packed as ever; a training leaves what one leaves, and its command here."""
    asked: list[str] = []
    run_once = stages.Stages._run_once

    def note(self, name: str, command: list[str]) -> None:
        if name != "detect":
            run_once(self, name, command)
            return
        asked.append(" ".join(command))
        folder = self.out / "run"
        folder.mkdir(exist_ok=True)
        row = dict.fromkeys(drawn_objects.MEASURES, 10.0) | {"images": 100}
        rows = [row | {"step": 200}, row | {"step": 800, "box_ap": 61.25}]
        (folder / "evaluation.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        (folder / "provenance.json").write_text(json.dumps({"commit": "1" * 40}))
        (self.out / "log" / "detect.json").write_text(json.dumps({"command": "", "seconds": 120}))
        Image.new("RGB", (30, 20), "green").save(folder / "detections.png")

    monkeypatch.setattr(stages.Stages, "_run_once", note)
    return asked


def test_sets_are_drawn_once_and_the_record_holds_the_curve_and_what_was_found(trained, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        assert drawn_objects.main(["--out", str(out), "schedule.steps=800"]) == 0
    sets = {split: ObjectSet(out / "images" / split) for split in drawn_objects.SPLITS}
    assert {split: found.num_samples for split, found in sets.items()} == {"train": 400, "val": 100}
    assert trained[0] == trained[1] and "schedule.steps=800" in trained[0] and "init.weights" not in trained[0]
    table = (out / "results.md").read_text()
    assert "| 800 | 61.2 | 10.0 | 10.0 | 10.0 |" in table and "2 minutes of training" in table
    for picture in drawn_objects.pictures(out / "results.md"):
        refuse_foreign(picture, OWN_PICTURE)
        assert picture.name in table


def test_the_recipe_is_one_of_detection():
    recipe = load_recipe(DetectRecipe, drawn_objects.RECIPE, [], environ={}).recipe
    assert recipe.schedule.steps == 800 and not recipe.init.weights


def test_somebodys_picture_is_not_replaced(trained, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "results_images.png")
    with pytest.raises(UserError, match="results_images.png"):
        drawn_objects.main(["--out", str(tmp_path)])
    assert not trained
