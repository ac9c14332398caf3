"""The package's floors, read off its imports; and entry points that answer at once."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "peco_ds"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOOR_1 = ("data", "models", "objectives", "planner")
FLOOR_2 = ("runtime", "convert", "evaluation")
FLOOR_0 = (
    *("__init__", "errors", "config", "deepspeed_json", "schema", "schedules", "command_line", "stop_signals"),
    *("registry", "costs", "kinds", "tensor_names"),
    *("field_marks", "old_spellings", "strict_yaml", "recipe_files", "recipe_checks", "durations", "data_paths"),
    *("own_files", "progress_bar", "user_paths", "remote_paths"),
)
ONLY_IN_RUNTIME = ("deepspeed", "apex", "torch.distributed")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_and_folder(module: str) -> tuple[int, str]:
    """(3, "") for an entry point `peco_ds.pretrain`; (1, "data") for `peco_ds.data.views`."""
    parts = module.split(".")
    first = parts[1] if len(parts) > 1 else "__init__"
    if first in FLOOR_1:
        return 1, first
    if first in FLOOR_2:
        return 2, first
    return (0, "") if first in FLOOR_0 else (3, "")


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> list[str]:
    """Every module that a file imports at any depth.

    `from a import b` gives a.b where b is a module of ours, else a.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([node.module] if node.module else []))
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                inside = PACKAGE.parent.joinpath(*whole.split("."))
                found.append(
                    whole if base == "torch" or inside.is_dir() or inside.with_suffix(".py").is_file() else base
                )
    return found


def imports_of(path: Path) -> list[str]:
    return imported_modules(ast.parse(path.read_text()), module_name(path), path.name == "__init__.py")


def within(module: str, roots: tuple[str, ...]) -> bool:
    return any(module == root or module.startswith(root + ".") for root in roots)


def defines_main(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(path.read_text()).body)


ENTRY_POINTS = [path for path in sorted(PACKAGE.glob("*.py")) if defines_main(path)]


def test_the_reader_of_imports_sees_every_spelling():
    source = (
        "import torch.distributed as d\nfrom torch import distributed\nfrom . import config\nfrom "
        ".data import views\ndef f():\n    from peco_ds import runtime\n"
    )
    found = imported_modules(ast.parse(source), "peco_ds.sample", is_package=False)
    assert found == [
        "torch.distributed",
        "torch.distributed",
        "peco_ds.config",
        "peco_ds.data.views",
        "peco_ds.runtime",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_a_file_imports_only_from_a_lower_floor_or_its_own_folder(path):
    floor, folder = floor_and_folder(module_name(path))
    for imported in imports_of(path):
        if within(imported, ("peco_ds",)):
            other_floor, other_folder = floor_and_folder(imported)
            own = floor == other_floor and folder == other_folder and floor != 3
            assert own or other_floor < floor, (
                f"{module_name(path)} (floor {floor}) imports {imported} (floor {other_floor})"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_deepspeed_apex_and_torch_distributed_stay_in_runtime(path):
    if floor_and_folder(module_name(path)) == (2, "runtime"):
        return
    assert not [imported for imported in imports_of(path) if within(imported, ONLY_IN_RUNTIME)]


PLAIN = [
    path
    for path in FILES
    if floor_and_folder(module_name(path))[0] == 0 or floor_and_folder(module_name(path))[1] == "planner"
]


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: module_name(path))
def test_the_planner_and_floor_0_import_no_torch(path):
    assert not [
        imported
        for imported in imports_of(path)
        if within(imported, ("torch", "torchvision", "timm", "transformers", "deepspeed"))
    ]


def test_nothing_directly_in_the_package_hides_a_standard_or_installed_module():
    installed = {
        name.split(".")[0]
        for name in importlib.metadata.packages_distributions()
        if not name.startswith("_") and name not in ("peco_ds", "__pycache__")
    }
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()} - {
        "__init__",
        "__pycache__",
    }
    assert not names & (set(sys.stdlib_module_names) | installed)


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_nothing_prints(path):
    tree = ast.parse(path.read_text())
    calls = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls, f"print at lines {calls}; entry points write to sys.stdout, the rest logs"


def test_there_are_entry_points():
    assert ENTRY_POINTS


# Runs a file or a module as __main__ with --help, and says at its end which heavy modules came along.
HELP = """
import runpy, sys
how, target = sys.argv[1:3]
sys.argv = [target, "--help"]
try:
    if how == "path":
        sys.path[0] = target.rpartition("/")[0]
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
except SystemExit as end:
    heavy = sorted({"torch", "torchvision", "timm", "deepspeed", "numpy"} & set(sys.modules))
    sys.stderr.write(f"code={end.code} heavy={heavy}")
"""


@pytest.mark.parametrize("how", ["path", "module"])
@pytest.mark.parametrize("path", ENTRY_POINTS, ids=lambda path: path.stem)
def test_an_entry_point_started_by_path_or_as_a_module_helps_without_importing_torch_or_numpy(path, how, tmp_path):
    target = str(path) if how == "path" else f"peco_ds.{path.stem}"
    # By path nothing but the file itself may be needed to find the package: no PYTHONPATH, another working directory.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if how == "module":
        environment["PYTHONPATH"] = str(PACKAGE.parent)
    result = subprocess.run(
        [sys.executable, "-c", HELP, how, target],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=600,
    )
    assert result.stderr.endswith("code=0 heavy=[]"), result.stderr
    assert "usage:" in result.stdout and "--help" in result.stdout
