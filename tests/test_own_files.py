"""No command replaces or removes a file that it has not written: every entry point finds one where it would write."""

import importlib
import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import SMALL_VIT
from PIL import Image
from test_floors import ENTRY_POINTS

from benchmarks.record import OWN_PICTURE, own_record
from peco_ds.command_line import run
from peco_ds.config import TokenizerSettings
from peco_ds.convert.release import Release, write_files
from peco_ds.errors import EXIT_BAD_INPUT, EXIT_DONE, UserError
from peco_ds.models.tokenizers import build_tokenizer, save_tokenizer
from peco_ds.own_files import (
    check_output,
    is_same_file,
    lies_in,
    markdown_mark,
    own_json,
    own_markdown,
    own_png,
    png_text,
    refuse_foreign,
    write_own_json,
)

ROOT = Path(__file__).resolve().parents[1]
# They write nothing.
READERS = {"run_status"}
BENCHMARKS = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "benchmark_parser(" in path.read_text()} - {
    "record"
}
# What a benchmark asks for beside its record.
NEEDED = {
    "compare": ["compare.yaml", "--images", "images"],
    "soft_target_mass": ["tokenizer", "--images", "images", "--image_px", "32"],
    "reproduce": ["--table", "1"],
    "scenes": ["--scenes", "scenes", "--classes", "classes.txt", "--tokenizer", "tokenizer"],
}


def jpeg(number: int, size_px: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size_px, size_px), (number * 37 % 256, 90, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def save_users_tar(path: Path, keys: tuple[str, ...] = ("a", "b")) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, key in enumerate(keys):
            data = jpeg(number)
            member = tarfile.TarInfo(f"{key}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def put_foreign(path: Path) -> None:
    """Somebody's file, of the kind that its name promises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tar":
        save_users_tar(path)
    elif path.suffix == ".png":
        Image.new("RGB", (8, 8), "red").save(path)
    elif path.suffix == ".json":
        path.write_text('{"mine": [1, 2, 3], "kind": "of my own"}')
    elif path.suffix == ".yaml":
        path.write_text("mine: 1\n")
    else:
        path.write_text("# Mine\n\nsomebody's work\n")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(capsys, module: str, arguments: list) -> str:
    """The one line of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(importlib.import_module(module).main, list(map(str, arguments)))
    err = capsys.readouterr().err
    assert ended.value.code == EXIT_BAD_INPUT, err
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """raw/ two class folders, wds/ a user's tar, images/ and indexed/ packed from them, tokenizer/, judge.pth."""
    root = tmp_path_factory.mktemp("sources")
    for number in range(4):
        path = root / "raw" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    save_users_tar(root / "wds" / "train-0000.tar")
    pack = importlib.import_module("peco_ds.pack_images").main
    pack(["--images", str(root / "raw"), "--out", str(root / "images"), "--workers", "1"])
    pack(["--index_tars", str(root / "wds"), "--out", str(root / "indexed"), "--workers", "1"])
    settings = TokenizerSettings(
        channels=16,
        channel_mults=(1, 1, 2, 2),
        blocks_per_level=1,
        z_channels=16,
        num_codes=64,
        code_dim=8,
        l2_normalized=True,
    )
    save_tokenizer(root / "tokenizer", build_tokenizer(settings).state_dict(), settings, {"judge": "none"})
    torch.save({"model": {"weight": torch.zeros(1)}}, root / "w.pth")
    return root


def tokenizing(sources: Path, images: str | Path, out: Path) -> list:
    named = [f"data.images={sources / images}", f"data.tokenizer={sources / 'tokenizer'}", f"data.tokens={out}"]
    return ["--recipe", "peco_vitb16", *SMALL_VIT, *named]


def cases() -> list:
    """(module, arguments by (sources, out), name of somebody's file in the output folder)."""

    def entry(stage: str, arguments, *names: str) -> list:
        return [pytest.param(f"peco_ds.{stage}", arguments, name, id=f"{stage}-{name}") for name in names]

    def plain(*arguments):
        return lambda sources, out: [*arguments, "--out", out]

    run_folder = ("settings.yaml", "metrics.jsonl", "checkpoints/step_00000001/mine", "commands.txt", "logs/a.log")
    found = entry(
        "pack_images",
        lambda sources, out: ["--images", sources / "raw", "--out", out, "--workers", 1],
        *("shard-000000.tar", "shard-000000.index.json", "manifest.json"),
    )
    found += entry(
        "pack_images",
        lambda sources, out: ["--index_tars", sources / "wds", "--out", out, "--workers", 1],
        *("train-0000.index.json", "manifest.json"),
    )
    found += entry(
        "tokenize_shards",
        lambda sources, out: tokenizing(sources, "indexed", out),
        *("train-0000.tar", "train-0000.index.json", "manifest.json"),
    )
    release = ("tokenizer/tokenizer.safetensors", "tokenizer/tokenizer.json")
    found += entry(
        "train_tokenizer",
        plain("perceptual.weights=none.pth"),
        *run_folder,
        *release,
        "reconstructions.png",
        "code_atlas.png",
    )
    found += entry("pretrain", plain(), *run_folder, "provenance.json", "starts.jsonl", "deepspeed.json")
    found += entry("finetune", plain(), *run_folder, "evaluation.jsonl", "tensorboard/events")
    for stage in ("segment", "detect"):
        found += entry(stage, plain(), *run_folder, "evaluation.jsonl", "provenance.json")
    of_layers = ("layers/block_01.json", "features/train_block_01.npy", "features/val_labels.npy")
    found += entry(
        "linear_probe",
        plain("init.weights=none.pth"),
        *("probe.json", "probe.md", "layers.png", "features/manifest.json", *of_layers),
    )
    asked = ["vit_tiny_patch16_224", "--images", "none"]
    found += entry("evaluate", lambda sources, out: [*asked, "--out", out / "e.json"], "e.json")
    found += entry(
        "evaluate", lambda sources, out: [*asked, "--out", out / "e.json", "--atlas", out / "a.png"], "a.png"
    )
    for library, weights in (("timm", "model.safetensors"), ("hf", "model.safetensors"), ("unilm", "model.pth")):
        found += entry(
            "convert_checkpoint",
            lambda sources, out, library=library: [sources / "w.pth", "--to", library, "--out", out, "--no-verify"],
            *("README.md", "config.json", weights),
        )
    found += entry(
        "import_tokenizer",
        lambda sources, out: [sources / "w.pth", "--out", out],
        *("tokenizer.json", "tokenizer.safetensors"),
    )
    found += entry("import_judge", plain("lite0"), "README.md", "config.json", "model.safetensors")
    found += entry("plan", lambda sources, out: ["--json", out / "p.json"], "p.json")
    found += entry("plan", lambda sources, out: ["--plot", out / "p.png"], "p.png")
    for name in sorted(BENCHMARKS):
        record = lambda sources, out, name=name: ["--record", out / "r.md", *NEEDED.get(name, [])]  # noqa: E731
        found.append(pytest.param(f"benchmarks.{name}", record, "r.md", id=f"{name}-r.md"))
    plot = lambda sources, out: ["--plot", out / "r.png"]  # noqa: E731
    return [*found, pytest.param("benchmarks.step", plot, "r.png", id="step-r.png")]


def test_every_entry_point_that_writes_is_tried():
    tried = {param.values[0] for param in cases()}
    assert {f"peco_ds.{path.stem}" for path in ENTRY_POINTS if path.stem not in READERS} <= tried
    assert {f"benchmarks.{name}" for name in BENCHMARKS} <= tried


@pytest.mark.parametrize("module, arguments, name", cases())
def test_somebodys_file_where_a_command_would_write_stays_as_it_is(sources, tmp_path, capsys, module, arguments, name):
    out = tmp_path / "out"
    put_foreign(out / name)
    before = contents(out)
    line = refusal(capsys, module, arguments(sources, out))
    assert str(out / name.partition("/")[0]) in line
    after = contents(out)
    assert {path: after.get(path) for path in before} == before
    # Nothing else was begun.
    assert not {path for path in after if not path.startswith((".pack", ".lock"))} - before.keys()


@pytest.mark.parametrize("spelling", ["plain", "link", "dots"])
def test_tokens_never_replace_the_tars_that_they_are_made_from(sources, tmp_path, capsys, monkeypatch, spelling):
    shutil.copytree(sources / "wds", tmp_path / "wds")
    before = contents(tmp_path / "wds")
    (tmp_path / "link").symlink_to(tmp_path / "wds")
    monkeypatch.chdir(tmp_path)
    out = {"plain": tmp_path / "wds", "link": tmp_path / "link", "dots": tmp_path / "link/../wds"}[spelling]
    assert "train-0000.tar" in refusal(capsys, "peco_ds.tokenize_shards", tokenizing(sources, "indexed", out))
    assert contents(tmp_path / "wds") == before
    # Nor where they were indexed beside themselves.
    importlib.import_module("peco_ds.pack_images").main(["--index_tars", "wds", "--out", "wds", "--workers", "1"])
    refusal(capsys, "peco_ds.tokenize_shards", tokenizing(sources, tmp_path / "wds", out))
    assert contents(tmp_path / "wds")["train-0000.tar"] == before["train-0000.tar"]


def test_a_users_tar_under_the_name_of_a_recorded_shard_is_not_taken_for_it(sources, tmp_path, capsys):
    options = ["--images", sources / "raw", "--out", tmp_path / "out", "--workers", 1]
    pack = importlib.import_module("peco_ds.pack_images").main
    pack(list(map(str, options)))
    save_users_tar(tmp_path / "out" / "shard-000000.tar", ("my_own",))
    mine = (tmp_path / "out" / "shard-000000.tar").read_bytes()
    assert "shard-000000.tar" in refusal(capsys, "peco_ds.pack_images", options)
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == mine


def test_a_release_over_a_release_of_ours_of_any_age_is_written_and_over_one_from_elsewhere_is_not(tmp_path):
    release = Release("timm", {"model.safetensors": {"w": torch.ones(2)}}, {"config.json": {"architecture": "a"}}, "")
    write_files(tmp_path / "new", release, "# Card\n")
    write_files(tmp_path / "new", release, "# Card\n")
    # As an earlier version wrote it: no record in the card.
    old = tmp_path / "old"
    write_files(old, release, "# Card\n")
    (old / "README.md").write_text("# Card\n\nLicence: to be stated by whoever publishes these weights. It is\n")
    write_files(old, release, "# Card\n")
    hub = tmp_path / "hub"
    write_files(hub, release, "# Card\n")
    (hub / "README.md").write_text("# A model from the hub\n")
    before = contents(hub)
    with pytest.raises(UserError, match="README.md: stands there already"):
        write_files(hub, release, "# Card\n")
    assert contents(hub) == before


def test_results_of_ours_are_known_by_their_mark_and_those_of_earlier_versions_by_their_form(tmp_path):
    own = own_json("evaluate", "target", "commit")
    write_own_json(tmp_path / "new.json", own, {"a": 1})
    write_own_json(tmp_path / "new.json", own, {"a": 2})
    (tmp_path / "old.json").write_text('{"target": "x", "commit": "y", "z": 1}')
    write_own_json(tmp_path / "old.json", own, {"a": 2})
    for other in ('{"target": "x"}', "[]", "{", "\xff", '{"made_by": "peco_ds plan"}'):
        (tmp_path / "other.json").write_text(other, encoding="latin-1")
        with pytest.raises(UserError, match="was not written by evaluate"):
            write_own_json(tmp_path / "other.json", own, {})
        assert (tmp_path / "other.json").read_text(encoding="latin-1") == other
    table = own_markdown("linear_probe", older=lambda text: "frozen features (" in text)
    for text, known in (
        (f"# T\n{markdown_mark('linear_probe')}", True),
        ("frozen features (a)", True),
        ("# T\n", False),
    ):
        (tmp_path / "t.md").write_text(text)
        assert table.knows(tmp_path / "t.md") is known


def test_pictures_and_records_of_benchmarks_are_known_also_by_what_earlier_versions_wrote(tmp_path):
    record, picture = tmp_path / "r.md", tmp_path / "r.png"
    Image.new("RGB", (4, 4)).save(picture)
    for command in ("python benchmarks/step.py --record r.md", "python -m benchmarks.step --record r.md"):
        record.write_text(f"# Title\n\n`{command}`\n\nbody\n")
        refuse_foreign(record, own_record("python -m benchmarks.step --rounds 3"))
        with pytest.raises(UserError, match="was not written by benchmarks.data"):
            refuse_foreign(record, own_record("python -m benchmarks.data"))
        refuse_foreign(picture, OWN_PICTURE)
    record.unlink()
    with pytest.raises(UserError, match="was not written by benchmarks"):
        refuse_foreign(picture, OWN_PICTURE)
    from matplotlib.figure import Figure

    Figure().savefig(picture, metadata=png_text(own_png("plan")))
    refuse_foreign(picture, own_png("plan"))


def test_links_and_folders_in_the_place_of_a_result_are_seen_for_what_they_are(tmp_path):
    own = own_json("evaluate")
    (tmp_path / "data.json").write_text('{"precious": 1}')
    (tmp_path / "link.json").symlink_to("data.json")
    with pytest.raises(UserError, match="not written by evaluate"):
        check_output(tmp_path / "link.json", own, "--out")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_output(tmp_path / "folder.json", own, "--out")
    # A link to a result of ours stays a link.
    write_own_json(tmp_path / "result.json", own, {})
    (tmp_path / "alias.json").symlink_to("result.json")
    write_own_json(tmp_path / "alias.json", own, {"a": 1})
    assert (tmp_path / "alias.json").is_symlink() and '"a": 1' in (tmp_path / "result.json").read_text()
    assert sorted(os.listdir(tmp_path)) == ["alias.json", "data.json", "folder.json", "link.json", "result.json"]


def test_a_place_is_recognised_however_it_is_spelled(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert is_same_file(Path("a/../link"), tmp_path / "a") and not is_same_file(Path("none"), tmp_path)
    assert lies_in(Path("link/b/new/deep"), tmp_path / "a") and not lies_in(Path("a"), tmp_path / "a" / "b")


def test_a_conversion_into_the_folder_of_its_source_is_refused(sources, tmp_path, capsys):
    shutil.copy(sources / "w.pth", tmp_path / "w.pth")
    (tmp_path / "deep").mkdir()
    for out in (tmp_path, tmp_path / "deep" / ".."):
        line = refusal(capsys, "peco_ds.convert_checkpoint", [tmp_path / "w.pth", "--to", "timm", "--out", out])
        assert "the folder that it lies in" in line or "is SRC itself" in line
    assert sorted(os.listdir(tmp_path)) == ["deep", "w.pth"]


def test_a_plan_is_written_again_over_its_own_files(tmp_path):
    from peco_ds.plan import main

    arguments = ["--gpus", "8", "--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png")]
    assert main(arguments) == main(arguments) == EXIT_DONE
    assert sorted(os.listdir(tmp_path)) == ["p.json", "p.png"]
