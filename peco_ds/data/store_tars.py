"""The WebDataset tars that a URL means: a folder, a glob, or names in braces, as WebDataset's users write them."""

from __future__ import annotations

import fnmatch
import re
from concurrent.futures import ThreadPoolExecutor

from peco_ds.errors import UserError
from peco_ds.remote_paths import RemotePath, RemoteStatus, holds_credentials, parse_url

COMPRESSED_TAR = re.compile(r"\.(tar\.\w{1,4}|tgz|tbz2?|txz|tzst|taz)", re.IGNORECASE)
_ASKED_AT_ONCE = 16
_MOST_TARS = 1_000_000


def tars_of_store(source: str) -> tuple[list[tuple[RemotePath, RemoteStatus]], list[tuple[str, str]]]:
    """Each tar with its status, by name; and (name, reason) of what else a folder holds.

    Raises: UserError if there is none, one is compressed or missing, the store lists nothing, or the address holds
        credentials; StoreFault.
    """
    if holds_credentials(source):
        raise UserError(
            f"--index_tars {source}: the manifest would keep the user, password or query; give them where the store's "
            "library looks (~/.aws, ~/.netrc, environment)"
        )
    folder_text, _, name = source.rpartition("/")
    left_out: list[tuple[str, str]] = []
    if "{" in source:
        found = _in_braces(source)
    elif any(sign in name for sign in "*?["):
        found, left_out = _listed(source, folder_text, name)
    elif name.lower().endswith(".tar"):
        found = _with_status([source])
    else:
        found, left_out = _listed(source, source.rstrip("/"), "")
    if not found:
        raise UserError(f"--index_tars {source}: no tar there; give a folder of .tar files, a glob, or names in braces")
    return sorted(found, key=lambda entry: entry[0].place), left_out


def _in_braces(source: str) -> list[tuple[RemotePath, RemoteStatus]]:
    # webdataset brings it.
    from braceexpand import braceexpand

    try:
        texts = []
        for text in braceexpand(source):
            texts.append(text)
            if len(texts) > _MOST_TARS:
                raise UserError(f"--index_tars {source}: more than {_MOST_TARS} names; correct the braces")
    except ValueError:
        raise UserError(f"--index_tars {source}: a brace has no partner; write train-{{0000..0099}}.tar") from None
    return _with_status(texts)


def _with_status(texts: list[str]) -> list[tuple[RemotePath, RemoteStatus]]:
    def look(text: str) -> tuple[RemotePath, RemoteStatus]:
        tar = parse_url(text)
        assert isinstance(tar, RemotePath)
        try:
            return tar, tar.status()
        except FileNotFoundError:
            raise UserError(f"--index_tars {tar}: no such tar; correct the address") from None

    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        found = list(pool.map(look, texts))
    _refuse_compressed([tar.name for tar, _ in found], texts[0])
    return found


def _listed(
    source: str, folder_text: str, pattern: str
) -> tuple[list[tuple[RemotePath, RemoteStatus]], list[tuple[str, str]]]:
    """Args: pattern: of the tars' names; "": all that end in .tar, and what else is there is told."""
    folder = parse_url(folder_text)
    assert isinstance(folder, RemotePath)
    listing = folder.listing()
    if listing is None:
        raise UserError(
            f"--index_tars {source}: web servers list nothing; write the names in braces, as "
            "https://host/folder/train-{0000..0099}.tar"
        )
    if pattern:
        chosen, left_out = [name for name in listing if fnmatch.fnmatchcase(name, pattern)], []
    else:
        chosen = [name for name in listing if name.lower().endswith(".tar")]
        left_out = [(name, "no tar") for name in sorted(listing) if name not in set(chosen)]
        _refuse_compressed(list(listing), source)
    _refuse_compressed(chosen, source)
    return [(folder / name, listing[name]) for name in chosen], left_out


def _refuse_compressed(names: list[str], source: str) -> None:
    compressed = next((name for name in names if COMPRESSED_TAR.search(name)), None)
    if compressed is not None:
        raise UserError(
            f"--index_tars {source}: {compressed!r} is a compressed tar, which has no places to read from; unpack it "
            "to a .tar, or give a glob of the tars that are meant"
        )
