"""Console commands: each entry point has one, and it answers --help with exit code 0."""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module

import pytest
from conftest import REPOSITORY
from test_floors import ENTRY_POINTS

from peco_ds.errors import EXIT_BAD_INPUT

SCRIPTS: dict[str, str] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]


def called(name: str, monkeypatch, *arguments: str) -> int:
    """Exit code of a console command, called as the installed script calls it: without arguments."""
    module, function = SCRIPTS[name].split(":")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as end:
        getattr(import_module(module), function)()
    return end.value.code


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_console_command_helps_under_its_own_name(name, monkeypatch, capsys):
    assert called(name, monkeypatch, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: {name} ")


def test_a_console_command_ends_bad_input_with_one_line_and_its_exit_code(monkeypatch, capsys):
    assert called("peco-status", monkeypatch, "/no/such/run") == EXIT_BAD_INPUT
    assert capsys.readouterr().err.startswith("error: ")


def test_every_entry_point_has_a_console_command(monkeypatch):
    started = []
    monkeypatch.setattr("peco_ds.console.run", lambda main: started.append(main.__module__))
    for target in SCRIPTS.values():
        module, function = target.split(":")
        getattr(import_module(module), function)()
    assert sorted(started) == sorted(f"peco_ds.{path.stem}" for path in ENTRY_POINTS)
