"""The documentation is true: links lead somewhere, commands are ones that the programs take, pages keep their form."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import math
import re
import runpy
import shlex
import shutil
import sys
import tomllib
import warnings
from collections.abc import Callable
from itertools import dropwhile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import REPOSITORY

import peco_ds.command_line
from peco_ds.schema import IGNORED

DOCS = REPOSITORY / "docs"
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "ds_configs/README.md", "launchers/README.md"),
    *sorted(f"docs/{path.name}" for path in DOCS.glob("*.md")),
]
FRONT_PAGE_BYTES = 9000
COLUMNS = 120


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text()


def blocks(page: str) -> list[tuple[str, str]]:
    """Fenced blocks of a page: language, "" for commands, and text."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL)


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def headings(path: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    lines = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL).splitlines()
    titles = [line.lstrip("# ").lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", title).strip().replace(" ", "-") for title in titles}


# ------------------------------------------------------------------------------------------------ form


@pytest.mark.parametrize("page", PAGES)
def test_no_line_of_a_page_is_longer_than_120_columns(page):
    assert [line for line in text_of(page).splitlines() if len(line) > COLUMNS] == []


def test_the_front_page_stays_short():
    assert len((REPOSITORY / "README.md").read_bytes()) <= FRONT_PAGE_BYTES


def links_of(page: str) -> list[str]:
    text = prose(page)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'\b(?:src|srcset|href)="([^"]+)"', text)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    here, missing = REPOSITORY / page, []
    for link in links_of(page):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = here.parent / file if file else here
        if not target.exists() or (anchor and anchor not in headings(target)):
            missing.append(link)
    assert missing == []
    assert links_of(page)


def test_the_index_leads_to_every_page_of_docs_and_the_front_page_to_the_index():
    assert {path.name for path in DOCS.glob("*.md")} - {"README.md"} <= set(links_of("docs/README.md"))
    assert "docs/README.md" in links_of("README.md")


def test_the_page_of_measurements_leads_to_every_record():
    records = {f"../benchmarks/{path.name}" for path in (REPOSITORY / "benchmarks").glob("*_20[0-9][0-9][0-9][0-9].md")}
    assert records and records <= set(links_of("docs/measurements.md"))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page):
    named = re.findall(r"`((?:peco_ds|benchmarks|launchers|tests|ds_configs|docs)/[\w/.]+\.\w+)`", text_of(page))
    assert [name for name in named if not (REPOSITORY / name).exists()] == []
    modules = re.findall(r"`python -m ([\w.]+)", text_of(page))
    assert [name for name in modules if not (REPOSITORY / f"{name.replace('.', '/')}.py").is_file()] == []
    tests = re.findall(r"`(test_\w+\.py)`", text_of(page))
    assert [name for name in tests if not (REPOSITORY / "tests" / name).is_file()] == []


def test_the_images_of_the_front_page_are_what_their_script_draws():
    drawn = runpy.run_path(str(DOCS / "images" / "make_images.py"))["render"]()
    stale = [name for name, svg in drawn.items() if (DOCS / "images" / name).read_text() != svg]
    assert drawn and stale == [], "run: python docs/images/make_images.py"


def test_every_recipe_is_on_the_page_of_the_family():
    page = text_of("docs/family.md")
    recipes = sorted(path.stem for path in (REPOSITORY / "peco_ds" / "recipes").glob("*.yaml"))
    ends = [recipe.removeprefix("finetune_beitv2") for recipe in recipes]
    assert [
        recipe for recipe, end in zip(recipes, ends) if f"`{recipe}`" not in page and f"...{end}`" not in page
    ] == []


def test_the_sample_of_the_quickstart_has_the_rows_that_its_table_prints():
    table = (REPOSITORY / "launchers" / "quickstart_table.py").read_text()
    sample = next(block for language, block in blocks("README.md") if language == "text")
    rows = [re.split(r"\s{2,}", line)[0] for line in sample.splitlines() if re.search(r"\s{2,}", line)]
    assert len(rows) == 7 and [row for row in rows if f'"{row}"' not in table] == []


def test_the_quickstart_does_not_pack_its_photographs_into_the_folder_that_they_lie_in():
    script = (REPOSITORY / "launchers" / "quickstart.sh").read_text()
    source = re.search(r'^ *images="\$out/(\w+)"$', script, flags=re.MULTILINE)[1]
    packed = re.search(r'pack_images\.py .*--out "\$out/(\w+)/', script)[1]
    assert source != packed, "pack_images.py refuses an --out inside of its --images"


# -------------------------------------------------------------------------------------------- commands

SCRIPTS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
# programs of other projects, whose arguments are not looked at
OTHERS = ("git", "pip", "pre-commit", "python3", "ruff", "mypy", "pytest")
LAUNCHERS = {"deepspeed": ("--num_gpus",), "torchrun": ("--nproc_per_node",), "python": ()}


class Taken(BaseException):
    """The program has read its command line and is content."""


def commands(page: str) -> list[list[str]]:
    """Words of every command of a page's blocks, assignments before it included."""
    found = []
    for language, block in blocks(page):
        if language not in ("", "bash"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s&&\s", line):
                if words := shlex.split(part, comments=True):
                    found.append(words)
    return found


EVERY = [(page, words) for page in PAGES for words in commands(page)]
# These need nothing of a reader's machine, and no torch.
RUN = {" ".join(words): words for _, words in EVERY if "peco_ds/plan.py" in words or "--dry_run" in words}
READ = [(page, words) for page, words in EVERY if " ".join(words) not in RUN]


def without_assignments(words: list[str]) -> list[str]:
    return list(dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))


def write_files(folder: Path) -> None:
    """The files that readers are told to write: blocks that begin with a comment with the name."""
    for page in PAGES:
        for _, block in blocks(page):
            if named := re.match(r"# ([\w.]+\.(?:yaml|py))\n", block):
                (folder / named[1]).write_text(block)


def started(words: list[str]) -> tuple[str, list[str]] | None:
    """What a command runs: a file of the repository, and its arguments. None where nothing of ours is started.

    Raises: LookupError for a program that this test does not know.
    """
    program, *rest = without_assignments(words)
    if program in SCRIPTS:
        return program, rest
    if program in OTHERS or program in ("export", "source", "cd"):
        return None
    if program == "bash":
        if rest[0].endswith("status.sh"):
            return "peco_ds/run_status.py", rest[1:]
        return rest[0], []
    if program == "sbatch":
        at = next(number for number, word in enumerate(rest) if not word.startswith("-"))
        return rest[at], rest[at + 1 :]
    options = LAUNCHERS[program]
    while rest[0] in options:
        rest = rest[2:]
    if program == "torchrun" and rest[0] == "--no-python":
        return started([word for word in rest[1:] if word not in options and not word.isdigit()])
    if program == "python" and rest[0] == "-m":
        return (rest[1].replace(".", "/") + ".py", rest[2:]) if rest[1] not in OTHERS else None
    return rest[0], rest[1:]


@pytest.fixture
def take(monkeypatch, tmp_path) -> Callable[[str, list[str]], None]:
    """Runs a program of ours in this process until it has read its command line, recipe and overrides."""
    read_stage = peco_ds.command_line.parse_stage
    parser = argparse.ArgumentParser
    plain = {name: getattr(parser, name) for name in ("parse_args", "parse_intermixed_args")}

    def parse_stage(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(parser, "parse_intermixed_args", plain["parse_intermixed_args"])
            read_stage(*arguments)
        # What follows would look at the paths of a reader's machine.
        raise Taken

    def then_stop(parse):
        def parse_and_stop(*arguments):
            parse(*arguments)
            raise Taken

        return parse_and_stop

    def run(program: str, arguments: list[str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [program, *arguments])
            patch.setattr(sys, "path", [str(REPOSITORY), *sys.path])
            patch.setattr("peco_ds.command_line.parse_stage", parse_stage)
            for name, parse in plain.items():
                patch.setattr(parser, name, then_stop(parse))
            if program in SCRIPTS:
                program = f"peco_ds/{entry_of(program)}.py"
            # a module that another test has imported is run again
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning), pytest.raises(Taken):
                if program.startswith("benchmarks/"):
                    runpy.run_module(program.removesuffix(".py").replace("/", "."), run_name="__main__")
                else:
                    runpy.run_path(str(REPOSITORY / program), run_name="__main__")

    monkeypatch.chdir(tmp_path)
    # as the front page exports it
    monkeypatch.setenv("PECO_DATA_ROOT", "/data/imagenet")
    (tmp_path / "ds_configs").symlink_to(REPOSITORY / "ds_configs")
    (tmp_path / "benchmarks").symlink_to(REPOSITORY / "benchmarks")
    write_files(tmp_path)
    return run


@pytest.fixture
def own_registries(monkeypatch):
    """What a page's extension adds is gone after the test."""
    from peco_ds import registry

    monkeypatch.setattr(registry, "_extensions", {})
    for kinds in (registry.OBJECTIVES, registry.TOKENIZERS, registry.FEATURE_NETS):
        monkeypatch.setattr(kinds, "_entries", dict(kinds._entries))
    return registry


def entry_of(script: str) -> str:
    """Entry point behind a console command."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peco_ds.console.run", lambda main: found.append(main.__module__.removeprefix("peco_ds.")))
        module, function = SCRIPTS[script].split(":")
        getattr(importlib.import_module(module), function)()
    return found[0]


@pytest.mark.parametrize("page, words", READ, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in READ])
def test_every_command_of_a_page_is_one_that_its_program_takes(page, words, take, monkeypatch, request):
    ours = started(words)
    if ours is None:
        return
    program, arguments = ours
    if program not in SCRIPTS:
        assert (REPOSITORY / program).is_file(), f"{page} starts {program}, which is not there"
    if program.endswith(".sbatch"):
        script = (REPOSITORY / program).read_text()
        stage = re.search(r"peco_ds/(\w+)\.py|-m peco_ds\.(\w+)", script)
        recipe = re.findall(r"^\s*[^#\n].*(--recipe \w+)", script, flags=re.MULTILINE)
        arguments = [word for found in recipe for word in found.split()] + arguments
        program = f"peco_ds/{stage[1] or stage[2]}.py"
        assert (REPOSITORY / program).is_file()
        # what the launcher adds itself
        arguments += {"convert_checkpoint": ["--out", "x"], "pack_images": ["--out", "x"]}.get(Path(program).stem, [])
    if program in SCRIPTS or (program.endswith(".py") and takes_arguments(program)):
        for word in words[: len(words) - len(without_assignments(words))]:
            if word.startswith("PECO_EXTENSIONS="):
                request.getfixturevalue("own_registries")
                monkeypatch.setenv(*word.split("="))
        take(program, arguments)


def takes_arguments(program: str) -> bool:
    return "add_argument(" in (text := (REPOSITORY / program).read_text()) or "stage_parser(" in text


@pytest.mark.parametrize("words", RUN.values(), ids=RUN)
def test_every_plan_and_dry_run_of_a_page_runs_as_it_stands(words, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPOSITORY / "ds_configs", tmp_path / "ds_configs")
    write_files(tmp_path)
    program, arguments = started(words)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.setattr(sys, "path", [str(REPOSITORY), *sys.path])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / program), run_name="__main__")
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    assert printed.out


# ------------------------------------------------------------------------------------------------ code

CODE = [(page, block) for page in PAGES for language, block in blocks(page) if language == "python"]


@pytest.mark.parametrize("page, block", CODE, ids=[page for page, _ in CODE])
def test_python_of_a_page_is_python_and_imports_what_is_there(page, block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "peco_ds":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), (
                    alias.name
                )


@pytest.mark.parametrize("page", PAGES)
def test_yaml_and_toml_of_a_page_can_be_read(page):
    for language, block in blocks(page):
        if language == "yaml":
            assert yaml.safe_load(block)
        elif language == "toml":
            assert tomllib.loads(block)


def test_the_objective_that_contributing_adds_gives_a_loss_and_an_accuracy(own_registries, monkeypatch, tmp_path):
    import torch

    write_files(tmp_path)
    monkeypatch.setenv("PECO_EXTENSIONS", str(tmp_path / "my_objective.py"))
    objective = own_registries.OBJECTIVES["smooth"].build(SimpleNamespace(option=lambda _: 0.1))
    logits = torch.zeros(2, 3, 16, requires_grad=True)
    codes = torch.tensor([[0, 0, 1], [5, 0, IGNORED]])
    loss, stats = objective(SimpleNamespace(logits=logits), SimpleNamespace(codes=codes))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(16)) and logits.grad.abs().sum() > 0
    # equal logits: the first code is the most likely one
    assert stats["accuracy"].item() == pytest.approx(3 / 5)
