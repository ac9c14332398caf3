"""The line that a user reads."""

from peco_ds.errors import UserError, describe_os_error


def test_a_line_with_a_value_of_any_length_keeps_its_place_and_its_remedy_and_stays_a_line():
    short = "list.txt: 'n01' is not in classes.txt; give the matching list"
    assert str(UserError(short)) == short
    line = str(UserError(f"list.txt: {'[' * 100_000} is not in classes.txt; give the matching list"))
    assert (
        line.startswith("list.txt: [[[")
        and line.endswith("[[[ is not in classes.txt; give the matching list")
        and len(line) < 2000
    )


def test_a_system_error_names_its_file_or_the_place_that_its_caller_knows():
    assert describe_os_error(OSError(28, "No space left on device", "a.tar")) == "a.tar: No space left on device"
    assert describe_os_error(OSError(5, "Input/output error"), "b.tar") == "b.tar: Input/output error"
    assert describe_os_error(OSError("timed out")) == "timed out"
