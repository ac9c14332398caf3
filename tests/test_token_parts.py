"""An unfinished token set survives the death of its writers at any moment, and several writers at once."""

import hashlib
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from killed import forked

from peco_ds.data.token_parts import TokenParts
from peco_ds.data.token_shards import TokenRecord
from peco_ds.errors import UserError
from peco_ds.schema import VIEW_COLUMNS, ImageManifest, Shard, TokenManifest, ViewRecipe, read_manifest

SHARDS, SAMPLES = 3, 2
IMAGES = ImageManifest(
    [Shard(f"shard-{number:06d}.tar", SAMPLES, 10240, f"{number:064x}", f"{number:064x}") for number in range(SHARDS)],
    SHARDS * SAMPLES,
)


def parts_of(folder: Path, tokenizer: str = "a" * 64, **facts) -> TokenParts:
    views = ViewRecipe(32, (0.2, 1.0), (0.75, 1.33), 0.5, 0.4, 0)
    return TokenParts(
        folder,
        IMAGES,
        tokenizer_fingerprint=tokenizer,
        num_codes=64,
        grid=4,
        num_views=1,
        topk=0,
        topk_temperature=1.0,
        views=views,
        **facts,
    )


def records(number: int, usable: bool = True):
    generator = np.random.default_rng(number)
    for image in range(SAMPLES):
        views = np.ones((1, len(VIEW_COLUMNS)), np.float32) if usable else np.zeros((1, len(VIEW_COLUMNS)), np.float32)
        yield TokenRecord(f"{number}_{image}", generator.integers(0, 64, (1, 16)).astype(np.uint16), views)


def tokenize(folder: Path) -> None:
    """One start: what is missing is made, then the manifest."""
    parts = parts_of(folder)
    for number in range(SHARDS):
        if not parts.is_done(number):
            parts.write(number, records(number))
    parts.finish()


def contents(folder: Path) -> dict[str, str]:
    """Every file but locks, by its sha256."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert forked(lambda: tokenize(folder)) == 0
    return contents(folder)


def test_a_kill_before_any_operation_on_files_leaves_a_set_that_the_next_start_finishes_byte_for_byte(
    tmp_path, undisturbed
):
    kills = 0
    for moment in range(1, 10_000):
        folder = tmp_path / str(moment)
        status = forked(lambda: tokenize(folder), kill_at=moment)
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
        parts = parts_of(folder)
        for number in range(SHARDS):
            if parts.is_done(number):  # whole: as an undisturbed start leaves it
                name = Path(IMAGES.shards[number].name).stem
                found = contents(folder)
                assert all(
                    found[path] == undisturbed[path]
                    for path in (f"{name}.tar", f"{name}.index.json", f".parts/{name}.json")
                )
        tokenize(folder)
        assert contents(folder) == undisturbed, f"killed before operation {moment}"
        shutil.rmtree(folder)
    assert kills >= SHARDS * 8


@pytest.mark.parametrize("seed", range(3))
def test_a_set_whose_every_start_is_killed_gets_done(tmp_path, undisturbed, seed):
    drawn, starts = random.Random(seed), 0
    while forked(lambda: tokenize(tmp_path), kill_at=drawn.randint(1, 40)):
        starts += 1
        assert starts < 200
    assert starts and contents(tmp_path) == undisturbed


def test_two_writers_of_the_same_shards_do_not_disturb_each_other(tmp_path, undisturbed):
    def write_all():
        parts = parts_of(tmp_path)
        for number in [*range(SHARDS)] * 5:
            parts.write(number, records(number))
            assert parts.is_done(number)

    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            try:
                write_all()
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    tokenize(tmp_path)
    assert contents(tmp_path) == undisturbed


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"made_from": 1}', '{"made_from": null, "shard": {"name": "../x"}}', "\x00\xff"]
)
def test_a_damaged_part_file_is_made_again(tmp_path, undisturbed, damage):
    tokenize(tmp_path)
    part = tmp_path / ".parts" / "shard-000001.json"
    part.write_text(damage)
    assert [parts_of(tmp_path).is_done(number) for number in range(SHARDS)] == [True, False, True]
    with pytest.raises(UserError, match="1 of 3 shards are not tokenized yet, first shard-000001.tar"):
        parts_of(tmp_path).finish()
    tokenize(tmp_path)
    assert contents(tmp_path) == undisturbed


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.index.json"])
@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_shard_whose_tar_or_index_is_gone_or_cut_is_made_again(tmp_path, undisturbed, name, damage):
    tokenize(tmp_path)
    if damage == "removed":
        (tmp_path / name).unlink()
    else:
        os.truncate(tmp_path / name, 100)
    tokenize(tmp_path)
    assert contents(tmp_path) == undisturbed


def test_what_a_card_says_of_the_tokenizer_is_kept_and_makes_no_other_set(tmp_path, undisturbed):
    tokenize(tmp_path)  # by a tokenizer of whom nothing was known
    assert read_manifest(tmp_path, TokenManifest).tokenizer_facts == {}
    card = {
        "judge": "MoCo v3",
        "judge_licence": "CC BY-NC 4.0",
        "recipe": "",
        "licence": None,
        "steps": 5,
        "psnr": "20",
    }
    parts = parts_of(tmp_path, tokenizer_facts=card)
    assert all(parts.is_done(number) for number in range(SHARDS))
    parts.finish()
    assert read_manifest(tmp_path, TokenManifest).tokenizer_facts == {
        "judge": "MoCo v3",
        "judge_licence": "CC BY-NC 4.0",
    }
    changed = {name for name, sha256 in contents(tmp_path).items() if undisturbed.get(name) != sha256}
    assert changed == {"manifest.json"}
    tokenize(tmp_path)
    assert contents(tmp_path) == undisturbed


def test_unreadable_images_of_earlier_starts_are_known(tmp_path):
    parts = parts_of(tmp_path)
    parts.write(0, records(0))
    parts.write(1, records(1, usable=False))
    assert parts.read_counts(0) == {"count": 0, "read": SAMPLES} and parts.read_counts(1) == {
        "count": SAMPLES,
        "read": SAMPLES,
    }
