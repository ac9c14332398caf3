"""What the documentation points to is there."""

from __future__ import annotations

import re

import pytest
from conftest import REPOSITORY

PAGES = ["README.md", "ds_configs/README.md", "launchers/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file_or_a_heading(page):
    path = REPOSITORY / page
    text = path.read_text()
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).strip().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links or page != "README.md"
    missing = [
        link
        for link in links
        if not link.startswith("http")
        and (link[1:] not in headings if link.startswith("#") else not (path.parent / link.split("#")[0]).exists())
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_every_script_that_a_page_names_is_there(page):
    named = re.findall(
        r"(?:python|bash|sbatch) ((?:peco_ds|benchmarks|launchers|tests)/[\w/]+\.(?:py|sh|sbatch))",
        (REPOSITORY / page).read_text(),
    )
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []
