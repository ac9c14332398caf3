"""Disks that fill up, go read-only or vanish under stages that the kills of the campaign do not reach.

Every stage is started once undisturbed, which counts its writes, and then again and again in one folder, each time with
a disk that fails from another of these writes on. What must hold after every start:

- it ends with code 2 or 76 and one line that begins with `error:`, without a traceback;
- nothing half is left: no draft under a temporary name in a folder that can be written to;
- figures that were computed are said;
- a start without a fault goes on from there and comes to the results of the undisturbed one.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from campaign import EXIT_BAD_INPUT, EXIT_INTERRUPTED, rows_of
from fork_server import Ended, ForkServer

# How the disk fails, in turn.
DISKS = ("full_disk", "read_only")
# Of drafts: `atomic_files`, `own_files` and checkpoints in the making.
DRAFT = re.compile(r"(^\.tmp-|\.tmp$|^\.[^/]*\.tmp)")


@dataclass(frozen=True)
class Task:
    """A start of a stage that is not a training run of the campaign.

    Args:
        arguments: of the command line; {out} stands for the folder that it writes to.
        results: folder -> what must be the same after any faults.
        said: in the output once the figures are known; "" where there are none.
        said_before: pattern of paths whose writing comes after the figures.
    """

    stage: str
    arguments: tuple[str, ...]
    results: Callable[[Path], object]
    said: str = ""
    said_before: str = ""


@dataclass
class Trial:
    """What the starts of one task came to."""

    starts: int = 0
    faults: int = 0
    writes: int = 0
    codes: Counter = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


def started(server: ForkServer, task: Task, out: Path, fault: dict | None = None) -> Ended:
    arguments = [argument.format(out=out) for argument in task.arguments]
    faults = {0: [{"kind": "disk", "folder": str(out), **fault}]} if fault else None
    return server.start(task.stage, arguments, ranks=1, faults=faults)


def undisturbed(server: ForkServer, task: Task, out: Path) -> tuple[int, object]:
    """The number of writes, and the results."""
    out.mkdir(parents=True)
    ended = started(server, task, out, {"nth": 1, "do": "note"})
    assert ended.codes == [0], ended.stderr()[-2000:]
    return len(rows_of(ended.logs / "struck.jsonl")), task.results(out)


def try_disks(server: ForkServer, task: Task, folder: Path, *, seed: int, most: int | None) -> Trial:
    """Break the disk at `most` of the writes (None: at each), the last one among them, and then let the task end.

    Args:
        folder: an empty one for the starts' own.
    """
    trial, rng = Trial(), random.Random(f"{task.stage} {seed}")
    trial.writes, expected = undisturbed(server, task, folder / "reference")
    moments = list(range(1, trial.writes + 1))
    if most is not None:
        moments = sorted({trial.writes, *rng.sample(moments, min(most - 1, len(moments)))})
    for number, moment in enumerate(moments):
        # Each begins anew: a start that goes on has fewer writes left.
        place = folder / f"out_{moment}"
        place.mkdir()
        do = DISKS[(number + seed) % len(DISKS)]
        ended = started(server, task, place, {"nth": moment, "do": do})
        trial.starts, trial.faults = trial.starts + 1, trial.faults + 1
        trial.codes += Counter(ended.codes)
        judge(trial, task, place, ended, f"{do} at write {moment} of {trial.writes}")
        ended = started(server, task, place)
        trial.starts += 1
        if ended.codes != [0] or "Traceback" in ended.stderr():
            trial.broken.append(f"after write {moment} a start ends with {ended.codes}: {ended.stderr()[-600:]!r}")
        elif (found := task.results(place)) != expected:
            trial.broken.append(f"after write {moment} the results are {found}, not {expected}")
    return trial


def judge(trial: Trial, task: Task, out: Path, ended: Ended, what: str) -> None:
    """One start whose disk failed."""
    stderr = ended.stderr()
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    if not set(ended.codes) <= {EXIT_BAD_INPUT, EXIT_INTERRUPTED}:
        trial.broken.append(f"{what}: code {ended.codes}, {stderr[-800:]!r}")
    if len(errors) != 1 or "Traceback" in stderr:
        trial.broken.append(f"{what}: {len(errors)} lines of errors, {stderr[-800:]!r}")
    drafts = [str(path.relative_to(out)) for path in out.rglob("*") if DRAFT.search(path.name)]
    if drafts:
        trial.broken.append(f"{what}: {drafts} are left")
    struck = rows_of(ended.logs / "struck.jsonl")
    if task.said and struck and re.search(task.said_before, struck[0]["path"]) and task.said not in ended.stdout():
        trial.broken.append(f"{what}: {struck[0]['path']} failed, and {task.said!r} is not said: {ended.stdout()!r}")


# --- the tasks -------------------------------------------------------------------------------------------


def make_weights(folder: Path) -> tuple[Path, Path]:
    """The release of a small classifier, and a file of a small backbone's weights."""
    import beit_samples
    import torch

    from peco_ds.config import ModelSettings
    from peco_ds.convert.release import write_release
    from peco_ds.convert.to_timm import to_timm
    from peco_ds.models.mim import MaskedImageModel

    weights = beit_samples.sample("classifier")
    write_release(folder / "classifier", to_timm(weights), weights)
    torch.manual_seed(0)
    settings = ModelSettings(image_px=32, patch_px=8, width=64, depth=2, heads=1, layer_scale=0.5, drop_path=0)
    tensors = MaskedImageModel(settings, 16).state_dict()
    torch.save(
        {"model": {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}}, folder / "m.pth"
    )
    return folder / "classifier", folder / "m.pth"


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob(pattern))}


def evaluations(folder: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "time"} for row in rows_of(folder / "evaluation.jsonl")]


def make_tasks(folder: Path, small: list[str], labelled: list[str]) -> list[Task]:
    """
    Args:
        folder: where sets and weights are made that these lack.
        small, labelled: overrides of SmallSets and LabelledSets; the first one of each is data.root.
    """
    from conftest import find_real_data
    from drawn_objects import make_drawn_sets
    from scene_samples import make_scenes

    for name in ("scenes", "drawn"):
        (folder / name).mkdir(parents=True)
    scenes, drawn = make_scenes(find_real_data(), folder / "scenes"), make_drawn_sets(folder / "drawn").overrides
    classifier, mim = make_weights(folder)
    root = Path(small[0].partition("=")[2])
    short = "schedule.steps=2 schedule.warmup_steps=1 checkpoint.every_steps=1".split()
    probe = "probe.image_px=32 probe.epochs=2 probe.global_batch=16 probe.feature_batch=16 probe.knn_k=[3]".split()
    probe += ["probe.precision=fp32", "probe.blocks=[1,2]", "data.num_workers=0", f"init.weights={mim}"]
    tokenizer = (
        "views.tokenizer_px=32 data.val_images= data.holdout=7 data.num_workers=0 tokenizer.channels=16 "
        "tokenizer.channel_mults=[1,1,2,2] tokenizer.blocks_per_level=1 tokenizer.z_channels=16 tokenizer.num_codes=32 "
        "tokenizer.code_dim=8 tokenizer.kmeans_vectors=256 schedule.epochs=null schedule.warmup_epochs=null "
        "run.precision=fp32 run.global_batch=8 run.micro_batch=8 perceptual.weight=0 checkpoint.every_epochs=null"
    ).split()
    run = ("--out", "{out}/run")
    images = str(root / "images" / "train")
    return [
        Task(
            "linear_probe",
            ("--recipe", "probe_vitb16", *run, labelled[0], *probe),
            lambda out: json.loads((out / "run" / "probe.json").read_text())["layers"],
            "best block",
            r"probe\.json|probe\.md|layers\.png",
        ),
        Task(
            "evaluate",
            (
                *(str(root / "tokenizer"), "--images", images, "--out", "{out}/e.json", "--num_workers", "0"),
                *("--image_px", "32", "--atlas", "{out}/atlas.png"),
            ),
            lambda out: json.loads((out / "e.json").read_text())["quality"],
            "tokenizer ",
            r"e\.json|atlas\.png",
        ),
        Task(
            "tokenize_shards",
            ("--recipe", "peco_vitb16", *small, "data.tokens={out}/tokens"),
            lambda out: hashes(out, "*.tar"),
        ),
        Task(
            "train_tokenizer",
            ("--recipe", "peco_tokenizer", f"data.root={root}", *tokenizer, *short, *run),
            lambda out: (evaluations(out / "run")[-1], hashes(out / "run" / "tokenizer", "*.safetensors")),
        ),
        Task("segment", ("--recipe", "segment_vitb16", *scenes, *short, *run), lambda out: evaluations(out / "run")),
        Task("detect", ("--recipe", "detect_vitb16", *drawn, *short, *run), lambda out: evaluations(out / "run")),
        Task(
            "convert_checkpoint",
            (str(classifier), "--to", "unilm", "--no-verify", "--out", "{out}/release"),
            lambda out: sorted(path.name for path in (out / "release").iterdir()),
        ),
    ]
