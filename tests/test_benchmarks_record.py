"""What all benchmarks share: how they are started, today and by their old names."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY

from benchmarks.record import benchmark_parser, markdown_table, parse, publish
from benchmarks.turns import by_turns, spread


def test_a_file_started_by_path_says_so_in_one_line_and_does_its_work(tmp_path):
    command = [sys.executable, REPOSITORY / "benchmarks" / "data_scale.py", "--largest", "100"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    notice, error = done.stderr.splitlines()
    assert "python -m benchmarks.data_scale" in notice and "--largest 100" in error and done.returncode == 2


@pytest.mark.parametrize("words", [["--pictures", "3", "a.b=1"], ["--pictures=3", "a.b=1"]])
def test_the_old_name_of_an_option_works_with_one_line_of_notice(words, capsys):
    parser = benchmark_parser("some", "about", overrides="settings")
    parser.add_argument("--num_images", type=int)
    args = parse(parser, words, renamed={"--pictures": "--num_images"})
    assert (args.num_images, args.overrides) == (3, ["a.b=1"])
    assert args.command == f"python -m benchmarks.some {' '.join(words)}".replace("pictures", "num_images")
    assert capsys.readouterr().err == "--pictures is called --num_images now\n"


def test_what_is_printed_is_the_record_where_one_is_written(tmp_path):
    parser = benchmark_parser("some", "about")
    assert publish(parse(parser, []), "Title", "body\n") == "body\n"
    text = publish(parse(parser, ["--record", str(tmp_path / "r.md")]), "Title", "body")
    assert text == (tmp_path / "r.md").read_text() and text.startswith("# Title\n\n`python -m benchmarks.some --record")


def test_each_has_its_turn_once_a_round_in_an_order_that_turns():
    assert list(by_turns("ab", 2)) == [(False, "a"), (False, "b"), (True, "b"), (True, "a"), (True, "a"), (True, "b")]
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00 to 3.00)" and spread([]) == ""
    assert markdown_table(("a", "b"), [(1, "x")]) == "| a | b |\n|---|---|\n| 1 | x |"
