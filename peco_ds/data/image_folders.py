"""List the images of a folder with their labels and keys, from names only: no image is opened here."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peco_ds.errors import UserError, describe_os_error

IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jpe .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm".split())
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Image:
    # Relative to --images.
    path: str
    # -1: the file cannot be reached.
    size_bytes: int
    key: str
    # -1: the image has no label.
    label: int


def list_images(
    folder: Path, labels: str, synsets: Path | None, classes_file: Path | None
) -> tuple[list[Image], list[str] | None]:
    """Every image below a folder, by path, with its label; and the classes in label order.

    Raises: UserError if the folder is missing, holds no image, has an empty class folder, or does not match its list
        of synsets.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder; correct the path")
    try:
        found = sorted(_walk(folder))
    except OSError as error:
        raise UserError(f"--images {folder}: {describe_os_error(error)}; make every folder in it readable") from None
    if not found:
        raise UserError(f"--images {folder}: holds no image ({' '.join(sorted(IMAGE_SUFFIXES))}); correct the path")
    paths = [path for path, _ in found]
    classes: list[str] | None
    if synsets is not None:
        if labels != "auto":
            raise UserError(f"--labels {labels} and --synsets both say where labels come from; drop one")
        label_of, classes = labels_from_list(paths, synsets, classes_file)
    else:
        label_of, classes = _labels_from_folders(folder, paths, labels)
    keys = unique_keys(paths)
    return [
        Image(path, size_bytes, key, label) for (path, size_bytes), key, label in zip(found, keys, label_of)
    ], classes


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    """(relative path, bytes) of each image.

    Links are followed, a folder met a second time (a loop) is passed over.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        status = os.stat(folder / relative)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder / relative) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                path = f"{relative}/{entry.name}" if relative else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(path)
                elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                    try:
                        yield path, entry.stat().st_size
                    except OSError:
                        # A dangling link is listed, so that the reader rejects it by name.
                        yield path, -1


def _labels_from_folders(folder: Path, paths: list[str], labels: str) -> tuple[list[int], list[str] | None]:
    at_top = next((path for path in paths if "/" not in path), None)
    if labels == "none" or (labels == "auto" and (at_top or not any(path.count("/") == 1 for path in paths))):
        return [-1] * len(paths), None
    if at_top:
        raise UserError(
            f"--labels folders: image {at_top!r} lies in no class folder; move it into one, or use --labels none"
        )
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    of_path = [path.partition("/")[0] for path in paths]
    empty = sorted(set(classes) - set(of_path))
    if empty:
        raise UserError(
            f"class folder {str(folder / empty[0])!r} holds no image ({len(empty)} such); fill or "
            "remove it, or use --labels none"
        )
    number = {name: label for label, name in enumerate(classes)}
    return [number[name] for name in of_path], [printable(name) for name in classes]


def labels_from_list(paths: list[str], synsets: Path, classes_file: Path | None) -> tuple[list[int], list[str]]:
    """Labels of a flat folder from a list, in any of the forms in which ILSVRC's validation labels are published.

    1. Kaggle's LOC_val_solution.csv: `name,synset box box...`.
    2. `name synset` or `name number`, number counted from 0 (Caffe's val.txt).
    3. One synset a line, in image-name order.
    4. One number a line in image-name order, counted from 1 (the devkit's ILSVRC2012_validation_ground_truth.txt).

    Numbers index the lines of `classes_file`. The label is always the place among sorted synsets, which for ILSVRC is
    the usual class index.

    Raises: UserError if list and images do not match one to one, or the order of the numbers is in doubt.
    """
    classes_listed = read_classes(classes_file) if classes_file is not None else None
    rows = _rows(synsets)
    stems = [path.rpartition("/")[2].rpartition(".")[0] for path in paths]
    by_name = len(rows[0]) > 1
    if by_name:
        named = {
            row[0].rpartition(".")[0] if Path(row[0]).suffix.lower() in IMAGE_SUFFIXES else row[0]: row[1]
            for row in rows
        }
        for missing, where in (
            (sorted(set(stems) - set(named)), f"is not in {synsets}"),
            (sorted(set(named) - set(stems)), "is listed but not in the folder"),
        ):
            if missing:
                raise UserError(
                    f"--synsets {synsets}: image {missing[0]!r} {where} ({len(missing)} such); complete the "
                    "folder or the list"
                )
        names = [named[stem] for stem in stems]
    else:
        if len(rows) != len(paths):
            raise UserError(
                f"--synsets {synsets}: {len(rows)} lines for {len(paths)} images; complete the folder or the list"
            )
        order = sorted(range(len(paths)), key=lambda i: stems[i])
        names = [""] * len(paths)
        for i, row in zip(order, rows):
            names[i] = row[0]
    if all(name.isdecimal() for name in names):
        names = _names_of_numbers(names, 0 if by_name else 1, synsets, classes_listed)
    classes = sorted(set(classes_listed or names))
    number = {name: label for label, name in enumerate(classes)}
    unknown = next((name for name in names if name not in number), None)
    if unknown is not None:
        raise UserError(f"--synsets {synsets}: {unknown!r} is not in {classes_file}; give the matching list of classes")
    return [number[name] for name in names], classes


def _rows(synsets: Path) -> list[list[str]]:
    """[label] or [image name, label] for each line."""
    text = _text(synsets, "--synsets")
    if text.startswith("ImageId,"):
        try:
            rows = [[row[0], (row[1].split() or [""])[0]] for row in csv.reader(text.splitlines()[1:]) if len(row) > 1]
        except csv.Error as error:
            raise UserError(
                f"--synsets {synsets}: not CSV ({error}); give LOC_val_solution.csv as it was published"
            ) from None
    else:
        rows = [line.split()[:2] for line in text.splitlines() if line.strip()]
    if not rows or len({len(row) for row in rows}) != 1 or not all(all(row) for row in rows):
        raise UserError(f"--synsets {synsets}: wants one label a line, or an image name and a label on every line")
    return rows


def _names_of_numbers(numbers: list[str], first: int, synsets: Path, classes_listed: list[str] | None) -> list[str]:
    if classes_listed is None:
        raise UserError(
            f"--synsets {synsets}: holds numbers; say what they mean with --classes FILE, one synset a "
            "line in the order of the numbers"
        )
    if (
        first == 1
        and classes_listed == sorted(classes_listed)
        and all(_WNID.fullmatch(name) for name in classes_listed)
    ):
        # The devkit's numbers follow its own order (1 is n02119789). A sorted list would give wrong labels silently.
        raise UserError(
            f"--synsets {synsets}: ILSVRC2012 numbers do not follow sorted synsets; give --classes in the "
            "order of ILSVRC2012_ID (meta.mat of the devkit), "
            "or use LOC_val_solution.csv, which needs no list"
        )
    outside = next(
        (
            number[:20]
            for number in numbers
            if len(number) > 9 or not first <= int(number) < first + len(classes_listed)
        ),
        None,
    )
    if outside is not None:
        raise UserError(
            f"--synsets {synsets}: number {outside} is outside "
            f"{first}..{first + len(classes_listed) - 1}, the lines of --classes"
        )
    return [classes_listed[int(number) - first] for number in numbers]


def read_classes(path: Path) -> list[str]:
    """The first word of each line of `--classes`.

    Raises: UserError if the file cannot be read, is empty or names a class twice.
    """
    words = [line.split()[0] for line in _text(path, "--classes").splitlines() if line.strip()]
    twice = [word for word, count in Counter(words).items() if count > 1]
    if not words or twice:
        raise UserError(
            f"--classes {path}: {f'{twice[0]!r} stands twice' if twice else 'is empty'}; wants one class "
            "a line, its first word being the name"
        )
    return words


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path}: cannot be read as text ({error}); correct the path") from None


def unique_keys(paths: list[str]) -> list[str]:
    """A WebDataset key for each path: the file name without extension, or the whole path joined by `_` where several
    images have that name.

    Dots would end a key and slashes would make folders, so both are replaced; so are control and unpaired characters.
    """
    stems = [_key_text(path.rpartition("/")[2].rpartition(".")[0]) for path in paths]
    count = Counter(stems)
    used = {stem for stem in stems if count[stem] == 1}
    keys = []
    for path, stem in zip(paths, stems):
        if count[stem] > 1:
            joined = stem = _key_text(path.rpartition(".")[0])
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
