"""List the images of a folder with their labels and keys, and account for every other file below it.

A file that is named as an image is taken by its name, and opened when it is packed. Of any other file the first bytes
decide.

Links are followed, in the folder and out of it, and what they lead to goes by the link's own path. A folder that is met
a second time is not entered again, and one that this folder lies in not at all. A link to nothing or round in a circle
is no image. In the place of a class folder it is refused, since without its class the later ones would be renumbered.

Names are told apart by their capitals: `a.jpg` and `A.JPG` are two images. Class folders that differ in capitals alone
are refused.
"""

from __future__ import annotations

import errno
import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from peco_ds.data.image_formats import (
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    is_decoded,
    is_raw,
    kind_of,
    suffix_of,
    without_suffix,
)
from peco_ds.data.label_lists import labels_from_list
from peco_ds.data.left_out import (
    CASE_APART,
    DANGLING,
    EMPTY,
    LINKED,
    LINKED_TWICE,
    NO_IMAGE,
    NOT_DECODED,
    NOT_REGULAR,
    RAW,
    SEEN_BEFORE,
    UPWARDS,
    Account,
    file_of_a_system,
    folder_of_a_system,
)
from peco_ds.errors import UserError, describe_os_error


@dataclass(frozen=True)
class Image:
    # Relative to --images.
    path: str
    # -1: the file cannot be reached.
    size_bytes: int
    # The time of the last change of its content; 0: the file cannot be reached.
    modified_ns: int
    key: str
    # -1: the image has no label.
    label: int


class Listing(NamedTuple):
    """What a folder holds."""

    # By path.
    images: list[Image]
    # In label order; None: the images have no labels.
    classes: list[str] | None
    # (path, reason) of each file and folder that is not taken; a folder stands for all in it.
    left_out: list[tuple[str, str]]
    # What was taken and is worth a word.
    remarks: Account
    # Where the labels come from, in words; "" where class folders give them.
    labels_from: str


class _File(NamedTuple):
    path: str
    size_bytes: int
    modified_ns: int


@dataclass
class _Walk:
    """Everything below a folder."""

    files: list[_File] = field(default_factory=list)
    # Folders that were entered, less the root.
    folders: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    # A folder that was met a second time -> where it was met first.
    again: dict[str, str] = field(default_factory=dict)
    # Taken files that are links or lie below one, and those of them whose file another link led to before.
    linked: list[str] = field(default_factory=list)
    linked_twice: list[str] = field(default_factory=list)

    def account(self) -> Account:
        account = Account()
        for name, reason in self.left_out:
            account.add(reason, printable(name))
        return account


def list_images(folder: Path, labels: str, synsets: Path | None, classes_file: Path | None) -> Listing:
    """Every image below a folder, by path, with its label; the classes; and every file that is left out, with a reason.

    Raises: UserError if the folder is missing, holds no image, has a folder that cannot be read or an empty class
        folder, or does not match its list of labels.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder; correct the path")
    found = _walk_or_refuse(folder)
    if not found.files:
        others = f"; left out: {found.account().text()}" if found.left_out else ""
        raise UserError(f"--images {folder}: holds no image ({' '.join(sorted(IMAGE_SUFFIXES))}){others}; correct it")
    paths = [file.path for file in found.files]
    remarks, classes, labels_from = _remarks_on_names(found), None, ""
    if synsets is not None:
        if labels != "auto":
            raise UserError(f"--labels {labels} and --synsets both say where labels come from; drop one")
        label_of, classes, labels_from = labels_from_list(paths, synsets, classes_file, dict(found.left_out))
    else:
        label_of, classes, labels_from = _labels_from_folders(folder, found, labels)
        if classes is not None:
            for path in (path for path in paths if path.count("/") > 1):
                remarks.add("deeper than its class folder", printable(path))
    keys = unique_keys(paths)
    images = [
        Image(file.path, file.size_bytes, file.modified_ns, key, label)
        for file, key, label in zip(found.files, keys, label_of)
    ]
    return Listing(images, classes, found.left_out, remarks, labels_from)


def _remarks_on_names(found: _Walk) -> Account:
    remarks = Account()
    for remark, paths in ((LINKED, found.linked), (LINKED_TWICE, found.linked_twice)):
        for path in sorted(paths):
            remarks.add(remark, printable(path))
    # Most likely one image that two systems have copied.
    plain: set[str] = set()
    for path in (file.path for file in found.files):
        if (folded := path.casefold()) in plain:
            remarks.add(CASE_APART, printable(path))
        plain.add(folded)
    return remarks


def image_files(folder: Path) -> list[str]:
    """The paths of all images below a folder, relative to it, as `list_images` takes them.

    Raises: UserError if there is no such folder, or one in it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder; correct the path")
    return [file.path for file in _walk_or_refuse(folder).files]


def _walk_or_refuse(folder: Path) -> _Walk:
    try:
        return _walk(folder)
    except OSError as error:
        raise UserError(f"--images {folder}: {describe_os_error(error)}; make every folder in it readable") from None


def _walk(folder: Path) -> _Walk:
    """Links are followed; a folder met a second time (a loop, or two links to one folder) is not entered again."""
    found = _Walk()
    seen: dict[tuple[int, int], str] = {}
    linked_files: set[tuple[int, int]] = set()
    above = set(folder.resolve().parents)
    # Links wait until all real folders were entered, so that of two names the real one counts.
    waiting, links = [""], list[str]()
    below_a_link = False
    while waiting or links:
        below_a_link = below_a_link or not waiting
        relative = waiting.pop() if waiting else links.pop(0)
        status = os.stat(folder / relative)
        first = seen.setdefault((status.st_dev, status.st_ino), relative)
        if first != relative:
            found.again[relative] = first
            found.left_out.append((f"{relative}/", SEEN_BEFORE))
            continue
        if relative:
            found.folders.append(relative)
        with os.scandir(folder / relative) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                path = f"{relative}/{entry.name}" if relative else entry.name
                if _is_folder(entry):
                    reason = folder_of_a_system(entry.name)
                    if not reason and entry.is_symlink() and Path(entry.path).resolve() in above:
                        reason = UPWARDS
                    if reason:
                        found.left_out.append((f"{path}/", reason))
                    else:
                        (links if entry.is_symlink() else waiting).append(path)
                    continue
                reason, file = _looked_at(entry, path)
                if reason:
                    found.left_out.append((path, reason))
                    continue
                found.files.append(file)
                if below_a_link or entry.is_symlink():
                    found.linked.append(path)
                    _note_second_link(found, linked_files, entry, path)
    found.files.sort()
    found.left_out.sort()
    return found


def _note_second_link(found: _Walk, linked_files: set[tuple[int, int]], entry: os.DirEntry, path: str) -> None:
    try:
        status = entry.stat()
    except OSError:
        # A link to nothing, which the reader rejects by name.
        return
    place = status.st_dev, status.st_ino
    if place in linked_files:
        found.linked_twice.append(path)
    linked_files.add(place)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        # Links that lead round in a circle are links to nothing.
        if error.errno != errno.ELOOP:
            raise
        return False


def _looked_at(entry: os.DirEntry, path: str) -> tuple[str, _File]:
    """The reason for which a file is left out, "" where it is taken; and the file.

    What is named as an image and cannot be reached is taken, so that the reader rejects it by name.
    """
    unreachable = _File(path, -1, 0)
    reason = file_of_a_system(entry.name)
    if reason:
        return reason, unreachable
    named_as_image = suffix_of(entry.name) in IMAGE_SUFFIXES
    try:
        status = entry.stat()
    except OSError:
        return "" if named_as_image else DANGLING, unreachable
    file = _File(path, status.st_size, status.st_mtime_ns)
    if named_as_image:
        return "", file
    # To open a pipe would block for ever.
    if not entry.is_file():
        return NOT_REGULAR, file
    try:
        with open(entry.path, "rb") as opened:
            head = opened.read(HEAD_BYTES)
    except OSError as error:
        return f"cannot be read ({error.strerror})", file
    return reason_of_content(entry.name, head), file


def reason_of_content(name: str, head: bytes) -> str:
    """The reason for which a file of these first bytes is no image to take; "" where it is one."""
    if not head:
        return EMPTY
    kind = kind_of(head)
    if is_raw(name) and kind in ("TIFF", "film", ""):
        return RAW
    if is_decoded(kind):
        return ""
    return {"": NO_IMAGE, "archive": "archive, not unpacked", "tar": "tar, not unpacked", "film": "film"}.get(
        kind, f"{kind}{NOT_DECODED}"
    )


def _labels_from_folders(folder: Path, found: _Walk, labels: str) -> tuple[list[int], list[str] | None, str]:
    paths = [file.path for file in found.files]
    at_top = next((path for path in paths if "/" not in path), None)
    in_class_folders = any(path.count("/") == 1 for path in paths)
    if labels == "none" or (labels == "auto" and (at_top or not in_class_folders)):
        why = f"{printable(at_top)!r} lies beside the folders" if at_top and in_class_folders else ""
        return [-1] * len(paths), None, why if labels == "auto" else ""
    if at_top:
        raise UserError(
            f"--labels folders: image {at_top!r} lies in no class folder; move it into one, or use --labels none"
        )
    of_path = [path.partition("/")[0] for path in paths]
    _refuse_linked_classes(folder, found)
    classes = sorted(name for name in found.folders if "/" not in name)
    alike: dict[str, str] = {}
    for name in classes:
        # As archives from macOS, which writes accents as two characters, file systems that do not know capitals, and
        # hasty hands leave them. Lists of labels are read by the same rule.
        first = alike.setdefault(unicodedata.normalize("NFC", printable(name)).strip().casefold(), name)
        if first != name:
            raise UserError(
                f"class folders {first!r} and {name!r} look like one class; give them one name, or use --labels none"
            )
    empty = sorted(set(classes) - set(of_path))
    if empty:
        inside = Account()
        for name, reason in found.left_out:
            if name.startswith(f"{empty[0]}/"):
                inside.add(reason, printable(name))
        others = f" ({inside.text()})" if inside.total() else ""
        raise UserError(
            f"class folder {str(folder / empty[0])!r} holds no image{others} ({len(empty)} such); fill or "
            "remove it, or use --labels none"
        )
    number = {name: label for label, name in enumerate(classes)}
    return [number[name] for name in of_path], [printable(name) for name in classes], ""


def _refuse_linked_classes(folder: Path, found: _Walk) -> None:
    """Two class folders that are one folder: either class would hold the other's images. And one that leads nowhere:
    without it the later classes would have other numbers.
    """
    for name, first in sorted(found.again.items()):
        # A link back to the root is a loop, and no class.
        if "/" not in name and first:
            raise UserError(
                f"class folder {str(folder / name)!r} is a link to {str(folder / first)!r}, whose images have a class "
                "already; remove one of the two, or use --labels none"
            )
    lost = [name for name, reason in found.left_out if reason == DANGLING and "/" not in name]
    if lost:
        raise UserError(
            f"{str(folder / lost[0])!r} stands among the class folders and is a link to nothing, or round in a circle "
            f"({len(lost)} such); restore what it led to, or remove the link"
        )


def unique_keys(paths: list[str]) -> list[str]:
    """A WebDataset key for each path: the file name without extension, or the whole path joined by `_` where several
    images have that name.

    Dots would end a key and slashes would make folders, so both are replaced; so are control and unpaired characters.
    """
    stems = [_key_text(without_suffix(path.rpartition("/")[2])) for path in paths]
    count = Counter(stems)
    used = {stem for stem in stems if count[stem] == 1}
    keys = []
    for path, stem in zip(paths, stems):
        if count[stem] > 1:
            joined = stem = _key_text(without_suffix(path))
            number = 1
            while stem in used:
                number += 1
                stem = f"{joined}_{number}"
            used.add(stem)
        keys.append(stem)
    return keys


def _key_text(text: str) -> str:
    return "".join(character if character.isprintable() and character not in "./\\" else "_" for character in text)


def printable(path: str) -> str:
    """File names are bytes; what is not UTF-8 in them cannot stand in a manifest."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
