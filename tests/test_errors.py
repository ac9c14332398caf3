"""The line that a user reads."""

from peco_ds.errors import UserError


def test_a_line_with_a_value_of_any_length_keeps_its_place_and_its_remedy_and_stays_a_line():
    short = "list.txt: 'n01' is not in classes.txt; give the matching list"
    assert str(UserError(short)) == short
    line = str(UserError(f"list.txt: {'[' * 100_000} is not in classes.txt; give the matching list"))
    assert (
        line.startswith("list.txt: [[[")
        and line.endswith("[[[ is not in classes.txt; give the matching list")
        and len(line) < 2000
    )
