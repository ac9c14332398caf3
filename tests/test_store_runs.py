"""Whole stages on an S3 store: packed and tokenized there, pre-trained from there on two ranks, stopped and continued
on two and on one. Losses and weights are those of the disk, and no record holds a credential.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, run_stage
from store_servers import s3_server

from peco_ds.remote_paths import parse_url
from peco_ds.runtime.checkpoint.consolidate import fp32_weights
from peco_ds.runtime.checkpoint.files import list_checkpoints
from peco_ds.runtime.metrics import read_metrics

STEPS, STOP = 10, 5
# Every rank draws its own, so a resume that loses a random state shows.
STOCHASTIC = ["model.drop_path=0.3", "checkpoint.every_steps=3"]
HALF = [f"schedule.stop_at_step={STOP}"]


@pytest.fixture(scope="module")
def runs(small_sets, tmp_path_factory):
    """Folder with a run folder for each place and case, and the store's address while it is there."""
    folder = tmp_path_factory.mktemp("store_runs")
    with s3_server("bucket") as url:
        for path in (small_sets.root / "tokenizer").iterdir():
            (parse_url(f"{url}/tokenizer") / path.name).upload(path)
        pack = ["--images", small_sets.root / "raw", "--out", f"{url}/images/train", "--samples_per_shard", 24]
        run_stage("pack_images", *pack, "--workers", 1)
        there = [f"data.root={url}", *small_sets.overrides[1:]]
        tokenizing = run_stage("tokenize_shards", "--recipe", "peco_vitb16", *there)
        (folder / "tokenizing.txt").write_text(tokenizing.stdout + tokenizing.stderr)

        def launch(ranks: int, cases: list[tuple[str, list[str]]]) -> None:
            listing = folder / f"cases_{ranks}.json"
            zero = str(REPOSITORY / "ds_configs" / "zero3.json")
            fixed = ["--recipe", "peco_vitb16", "--deepspeed_config", zero]
            listed = [
                {"stage": "pretrain", "arguments": [*fixed, "--out", str(folder / name), *extra]}
                for name, extra in cases
            ]
            listing.write_text(json.dumps(listed))
            done = run_stage("tests/many_runs.py", listing, ranks=ranks, timeout_s=1200)
            (folder / f"said_{ranks}.txt").write_text(done.stdout + done.stderr)
            assert json.loads(listing.with_name(listing.name + ".codes").read_text()) == [0] * len(listed)

        here, cached = small_sets.overrides, [*there, f"data.cache={folder}/cache"]
        launch(
            2,
            [
                ("here", [*here, *STOCHASTIC]),
                ("there", [*there, *STOCHASTIC]),
                ("there_halves", [*there, *STOCHASTIC, *HALF]),
                ("there_halves", [*cached, *STOCHASTIC]),
                ("here_handed_on", [*here, *HALF]),
                ("there_handed_on", [*there, *HALF]),
            ],
        )
        launch(1, [("here_handed_on", here), ("there_handed_on", cached)])
        yield folder, url


def losses(folder: Path, name: str) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / name)]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return fp32_weights(list_checkpoints(folder / name)[0])


def test_shards_that_were_packed_and_tokenized_in_a_store_are_those_of_a_disk(runs, small_sets):
    _, url = runs
    for name in ("images/train", "tokens/train"):
        here, there = small_sets.root / name, parse_url(f"{url}/{name}")
        tars = sorted(path.name for path in here.glob("*.tar"))
        assert tars and sorted(name for name in there.listing() if name.endswith(".tar")) == tars
        assert all((here / tar).read_bytes() == (there / tar).read_bytes() for tar in tars)


@pytest.mark.parametrize(
    ("here", "there"), [("here", "there"), ("here", "there_halves"), ("here_handed_on", "there_handed_on")]
)
def test_runs_from_a_store_have_the_losses_and_weights_of_runs_from_a_disk(runs, here, there):
    folder, _ = runs
    expected = losses(folder, here)
    assert len(expected) == STEPS and losses(folder, there) == expected
    ours, theirs = weights(folder, here), weights(folder, there)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_continued_with_a_cache_keeps_its_shards_there(runs):
    folder, _ = runs
    assert len(list((folder / "cache").rglob("*.ranges"))) == 2 * 4


def test_no_record_of_a_run_or_a_set_holds_a_credential(runs):
    folder, url = runs
    texts = [path for path in folder.rglob("*") if path.suffix in (".yaml", ".json", ".jsonl", ".txt", ".log", ".md")]
    assert any(path.name == "settings.yaml" and url in path.read_text() for path in texts), "records name the place"
    assert not [path for path in texts if "hushhush" in path.read_text(errors="replace")]
    for name in ("images/train", "tokens/train"):
        assert "hushhush" not in (parse_url(f"{url}/{name}") / "manifest.json").read_text()
