"""Real images for the tests, and one CPU thread a process so that files of tests can run beside launches."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# One thread a process: two processes share two cores. Read when torch is imported, so it stands before all others.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import hypothesis
import pytest
from fork_server import OF_LAUNCHERS, ForkServer

# a busy machine is slow, not wrong
hypothesis.settings.register_profile("any_machine", deadline=None)
hypothesis.settings.load_profile("any_machine")

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class RealData:
    """Real photographs on disk: the shared packs where they lie, else those inside scikit-image's wheel."""

    imagenet: list[Path]  # JPEGs, one folder a class
    kodak: list[Path]  # PNGs
    imagenette_tar: Path | None


@pytest.fixture(scope="session")
def real_data() -> RealData:
    return find_real_data()


@pytest.fixture(scope="session")
def coco_samples(tmp_path_factory) -> Path:
    """A few COCO images, laid out as COCO is: {train,val}2017 and annotations. Drawn ones where the pack is missing."""
    shared = Path(os.environ.get("PECO_TEST_DATA", REPOSITORY.parent / "shared" / "data")) / "coco_samples"
    if shared.is_dir():
        return shared
    from drawn_objects import draw_like_coco

    return draw_like_coco(tmp_path_factory.mktemp("like_coco"))


def find_real_data() -> RealData:
    """What the fixture gives, for programs outside of pytest."""
    shared = Path(os.environ.get("PECO_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if shared.is_dir():
        return RealData(
            imagenet=sorted((shared / "imagenet_samples").glob("*/*.JPEG")),
            kodak=sorted((shared / "kodak").glob("*.png")),
            imagenette_tar=shared / "imagenette112.tar",
        )
    return wheel_photographs(Path(os.environ.get("PYTEST_TMPDIR", "/tmp")) / f"peco_photographs_{os.getpid()}")


def wheel_photographs(folder: Path) -> RealData:
    """128 overlapping JPEG tiles of the photographs in scikit-image's wheel, in 8 class folders, and the photographs as
    PNG.
    """
    import numpy as np
    import skimage
    from PIL import Image

    names = ("astronaut", "chelsea", "coffee", "motorcycle_left", "camera", "coins", "moon", "grass")
    jpegs, pngs = [], []
    for number, name in enumerate(names):
        image = Image.open(Path(skimage.__file__).parent / "data" / f"{name}.png").convert("RGB")
        image = image.resize((512, 512))
        class_folder = folder / "imagenet" / f"n{number:08d}"
        class_folder.mkdir(parents=True, exist_ok=True)
        (folder / "kodak").mkdir(exist_ok=True)
        image.save(folder / "kodak" / f"{name}.png")
        pngs.append(folder / "kodak" / f"{name}.png")
        for tile, corner in enumerate(np.random.default_rng(number).integers(0, 256, (16, 2))):
            left, top = map(int, corner)
            path = class_folder / f"n{number:08d}_{tile}.JPEG"
            image.crop((left, top, left + 256, top + 256)).save(path, quality=92)
            jpegs.append(path)
    return RealData(imagenet=jpegs, kodak=pngs, imagenette_tar=None)


@pytest.fixture(autouse=True)
def _rank_and_port_go_with_the_test():
    """A stage started in this process makes itself the one rank of a group. What it wrote of that into the environment
    would make later plain starts ask at a port where that group still listens.
    """
    before = {name: os.environ.pop(name) for name in OF_LAUNCHERS if name in os.environ}
    yield
    for name in OF_LAUNCHERS:
        os.environ.pop(name, None)
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _pytest_outlives_the_stages_it_runs(monkeypatch):
    """Where a process group was joined, an entry point ends its process at once. Here that process is pytest's, and the
    group may be one that an earlier test left.
    """
    monkeypatch.setattr("peco_ds.command_line.leave", sys.exit)


_server: ForkServer | None = None


@pytest.fixture(scope="session", autouse=True)
def _starts(tmp_path_factory):
    """What forked starts leave behind lies with the other files of the session."""
    yield fork_server(tmp_path_factory.mktemp("starts"))
    close_fork_server()


def fork_server(folder: Path | None = None) -> ForkServer:
    """The one of this process; its ten seconds of imports are paid at the first start."""
    global _server
    if _server is None:
        _server = ForkServer(folder or Path(tempfile.mkdtemp(prefix="peco_starts_")))
        atexit.register(close_fork_server)
    return _server


def close_fork_server() -> None:
    global _server
    if _server is not None:
        _server.close()
        _server = None


def run_stage(
    stage: str,
    *arguments,
    ranks: int = 1,
    check: bool = True,
    timeout_s: float = 600,
    environment: dict | None = None,
    fresh: bool = False,
):
    """Start an entry point by path as a user does: plainly on one process, by torchrun on several.

    The start is a fork of a process that has imported everything (tests/fork_server.py), where that shows the same.

    Args:
        stage: name of an entry in peco_ds, a file below the repository, or a module (`benchmarks.step`).
        fresh: start a new Python, or the true torchrun.
    Returns: subprocess.CompletedProcess with text output.
    """
    script = stage if "." in stage else f"peco_ds/{stage}.py"
    env = {
        **{name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS},
        "DS_ACCELERATOR": "cpu",
        **(environment or {}),
    }
    if fresh or not ForkServer.can_fork(env):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        target = [str(REPOSITORY / script)] if script.endswith(".py") else ["-m", script]
        done = subprocess.run(
            [sys.executable, *(torchrun if ranks > 1 else []), *target, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=env,
            cwd=REPOSITORY,
        )
    else:
        done = fork_server().run(script, arguments, ranks=ranks, environment=env, timeout_s=timeout_s)
    if check:
        assert done.returncode == 0, (
            f"{stage} {arguments} exited with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        )
    return done


# One small chain for all tests that need records: 96 real images in 4 shards, a stride-8 tokenizer of 64 codes, 3
# views an image.
SMALL_VIT = (
    "views.tokenizer_px=32 views.tokenizer_precision=fp32 views.count=3 views.scale=[0.2,1.0] "
    "model.image_px=64 model.patch_px=16 model.width=48 model.depth=2 model.heads=3 "
    "model.drop_path=0 "
    "mask.count=6 mask.min_block=2 objective.num_codes=64 data.num_workers=0 "
    "data.shuffle_window_shards=2 optim.lr=3e-3 schedule.epochs=null schedule.steps=10 "
    "schedule.warmup_epochs=null schedule.warmup_steps=2 run.precision=fp32 run.global_batch=8 "
    "run.micro_batch=4 run.log_every_steps=1 checkpoint.every_epochs=null"
).split()


@dataclass(frozen=True)
class SmallSets:
    """A data root with images/train, tokenizer and tokens/train, and the overrides that make peco_vitb16 fit it."""

    root: Path
    overrides: list[str]


@pytest.fixture(scope="session")
def small_sets(real_data, tmp_path_factory) -> SmallSets:
    return make_small_sets(real_data, tmp_path_factory.mktemp("small_sets"))


def make_small_sets(real_data: RealData, root: Path) -> SmallSets:
    """Build them in an empty folder."""
    import torch

    from peco_ds.config import TokenizerSettings
    from peco_ds.models.tokenizers import build_tokenizer, save_tokenizer

    images = root / "raw"
    for path in real_data.imagenet[:96]:
        (images / path.parent.name).mkdir(parents=True, exist_ok=True)
        (images / path.parent.name / path.name).symlink_to(path)
    run_stage(
        "pack_images",
        "--images",
        images,
        "--out",
        root / "images" / "train",
        "--samples_per_shard",
        24,
        "--workers",
        1,
    )
    torch.manual_seed(0)
    settings = TokenizerSettings(
        channels=16,
        channel_mults=(1, 1, 2, 2),
        blocks_per_level=1,
        z_channels=16,
        num_codes=64,
        code_dim=8,
        l2_normalized=True,
    )
    tokenizer = build_tokenizer(settings)
    save_tokenizer(root / "tokenizer", tokenizer.state_dict(), settings, {"judge": "none"})
    overrides = [f"data.root={root}", "data.tokens=tokens/train", *SMALL_VIT]
    run_stage("tokenize_shards", "--recipe", "peco_vitb16", *overrides)
    return SmallSets(root, overrides)


@dataclass(frozen=True)
class LabelledSets:
    """A data root with labelled images/train and images/val, and the overrides that make finetune_vitb16 fit it."""

    root: Path
    classes: int
    val_images: int
    overrides: list[str]


SMALL_CLASSIFIER = (
    "model.image_px=32 model.patch_px=8 model.width=48 model.depth=2 model.heads=3 "
    "model.drop_path=0 model.init_std=0.1 model.layer_scale=1 data.num_workers=0 "
    "data.shuffle_window_shards=2 augment.scale=[0.3,1.0] classifier.layer_decay=0.7 "
    "ema.decay=0.9 evaluation.every_epochs=0 optim.lr=5e-3 schedule.epochs=null "
    "schedule.steps=10 "
    "schedule.warmup_epochs=null schedule.warmup_steps=2 run.precision=fp32 run.global_batch=8 "
    "run.micro_batch=4 run.log_every_steps=1 checkpoint.every_epochs=null"
).split()


@pytest.fixture(scope="session")
def labelled_sets(real_data, tmp_path_factory) -> LabelledSets:
    return make_labelled_sets(real_data, tmp_path_factory.mktemp("labelled_sets"))


def make_labelled_sets(real_data: RealData, root: Path) -> LabelledSets:
    """Four classes of real images in an empty folder.

    25 to measure on, a number that neither 2 nor 3 ranks divide.
    """
    import tarfile

    chosen: dict[str, list[Path]] = {}
    if real_data.imagenette_tar is not None:
        with tarfile.open(real_data.imagenette_tar) as tar:
            members = sorted((m for m in tar.getmembers() if m.isfile() and "/train/" in m.name), key=lambda m: m.name)
            for member in members:
                name = Path(member.name).parent.name
                if name in chosen and len(chosen[name]) == 24 or name not in chosen and len(chosen) == 4:
                    continue
                path = root / "raw" / name / Path(member.name).name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
                chosen.setdefault(name, []).append(path)
    else:
        for path in real_data.imagenet[:64]:
            chosen.setdefault(path.parent.name, []).append(path)
    for number, (name, paths) in enumerate(sorted(chosen.items())):
        cut = len(paths) - 6 - (number == 0)
        for split, part in (("train", paths[:cut]), ("val", paths[cut:])):
            (root / split / name).mkdir(parents=True)
            for path in part:
                (root / split / name / path.name).symlink_to(path)
    for split in ("train", "val"):
        run_stage(
            "pack_images",
            "--images",
            root / split,
            "--out",
            root / "images" / split,
            "--samples_per_shard",
            20,
            "--workers",
            1,
        )
    return LabelledSets(root, 4, 25, [f"data.root={root}", *SMALL_CLASSIFIER])


# Files that start processes, train, or draw many examples. Minutes are won where the longest begin first and the short
# ones fill up the end.
LONGEST_FIRST = (
    *("test_slurm", "test_faults", "test_pretrain", "test_finetune", "test_parsers", "test_train_tokenizer"),
    *("test_convert_checkpoint", "test_many_ranks", "test_elastic", "test_evaluate", "test_stopping"),
    *("test_engine_state", "test_traffic", "test_detect", "test_segment", "test_finite_state", "test_endings"),
    *("test_store_runs", "test_remote_sets", "test_store_writer", "test_store_costs"),
    *("test_benchmarks_run_gpu", "test_attention_forms", "test_read_layouts", "test_own_files"),
    *("test_endings_of_stages", "test_read_segmenter", "test_to_torchvision", "test_dense_flops", "test_set_check"),
    *("test_linear_probe", "test_benchmarks_many_ranks", "test_benchmarks_launch", "test_benchmarks_collectives"),
    *("test_benchmarks_reproduce", "test_conv_feature_nets", "test_attacks", "test_code_atlas"),
    *("test_import_judge", "test_packaged_networks"),
    *("test_benchmarks_data_scale", "test_benchmarks_step", "test_benchmarks_peers", "test_benchmarks_data"),
    *("test_benchmarks_remote_data",),
    *("test_benchmarks_tokenizing", "test_benchmarks_plan_engine"),
    *("test_benchmarks_plan_step", "test_benchmarks_plan_world", "test_command_line", "test_bad_input"),
    *("test_tokenize_shards", "test_step_guard", "test_fast_step", "test_run", "test_token_parts", "test_watchdog"),
    *("test_registry", "test_loaders", "test_import_tokenizer", "test_distributed", "test_rank_log"),
)
# What is made for them takes many seconds, and what needs them starts processes or trains.
COSTLY_FIXTURES = {"small_sets", "labelled_sets", "cluster"}


# A wrapper comes before all others, so that `-m` finds the mark.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]):
    """The longest files come first; what needs a costly fixture is slow."""
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    for item in items:
        if item.path.stem in rank or COSTLY_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Damaged input ends in captured text, and lone surrogates cannot be sent from pytest-xdist's worker."""
    report = yield
    report.sections = [(title, _sendable(text)) for title, text in report.sections]
    if report.failed and _sendable(text := str(report.longrepr)) != text:
        report.longrepr = _sendable(text)
    return report


def _sendable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
