"""What is left out is counted by reason and named; what systems leave behind is known by name."""

from __future__ import annotations

import pytest

from peco_ds.data.left_out import Account, file_of_a_system, folder_of_a_system, write_list


@pytest.mark.parametrize(
    "name",
    "@eaDir $RECYCLE.BIN $Recycle.Bin RECYCLER __MACOSX .ipynb_checkpoints .git lost+found FOUND.000 #recycle "
    "@__thumb .@__thumb .Trash-1000 .Spotlight-V100 __pycache__ .snapshot _vti_cnf".split()
    + ["System Volume Information", "Network Trash Folder"],
)
def test_folders_of_systems_are_known_in_any_spelling(name):
    assert folder_of_a_system(name) and folder_of_a_system(name.lower()) and folder_of_a_system(name.upper())


@pytest.mark.parametrize("name", ["cat", "n01440764", "@handle", "found", "recycling", "_", "0", "#1", "$5"])
def test_a_class_is_no_folder_of_a_system(name):
    assert not folder_of_a_system(name)


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "thumbs.db", "desktop.ini", "._a.jpg", ".a.jpg", "Icon\r"])
def test_files_of_systems_are_known(name):
    assert file_of_a_system(name)


def test_an_account_tells_the_commonest_reasons_with_an_example_and_counts_the_rest():
    account = Account()
    for number in range(20):
        for _ in range(20 - number):
            account.add(f"reason {number}", f"{number}.txt")
    text = account.text()
    assert text.startswith("20 reason 0, e.g. '0.txt'; 19 reason 1, e.g. '1.txt'") and "reason 6," not in text
    told = sum(range(15, 21))
    assert text.endswith(f"; {account.total() - told} for other reasons")
    assert sum(account.numbers().values()) == account.total() == 210


def test_a_list_has_one_line_a_name_whatever_is_in_it(tmp_path):
    names = ["a b.txt", "new\nline.txt", "tab\t.txt", "latin\udce9.txt", "\u00fc.txt"]
    write_list(tmp_path / "list.txt", [(name, "no image") for name in names])
    lines = (tmp_path / "list.txt").read_text().splitlines()
    assert lines == [
        "no image\ta b.txt",
        "no image\tnew\\nline.txt",
        "no image\ttab\\t.txt",
        "no image\tlatin\ufffd.txt",
        "no image\t\u00fc.txt",
    ]
