"""Labels of images from a list, and names of classes from a file, each in one of a few stated forms.

Nothing is guessed: a text that is of none of the forms, or of two, is refused with its line. Lists come from
spreadsheets too, so a byte-order mark, UTF-16, DOS line ends, quotes, empty last columns and a header are read as such.
"""

from __future__ import annotations

import codecs
import csv
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from peco_ds.data.image_formats import IMAGE_SUFFIXES, suffix_of, without_suffix
from peco_ds.errors import UserError
from peco_ds.schema import parse_json, short

_WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"[0-9]+")
# What a spreadsheet makes of numbers, and what stands for no value.
_NO_LABEL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|#.*", re.IGNORECASE)
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x85\u2028\u2029]")
# By such a first line Excel is told the delimiter.
_SEPARATOR_LINE = re.compile(r"sep=[,;]?", re.IGNORECASE)
_NUMBERED_LINE = re.compile(r"([0-9]+)\s*[:,;\s]\s*(\S.*)")
_DELIMITERS = {"tab": "\t", "comma": ",", "semicolon": ";"}
# First and second column of a header line, in lower case.
_NAME_HEADERS = frozenset(
    "imageid image_id image images img name names file files filename filenames file_name path paths id key".split()
)
_LABEL_HEADERS = frozenset(
    "predictionstring label labels class classes class_id classid class_name classname category synset wnid "
    "target".split()
)


class Labels(NamedTuple):
    # In the order of the images.
    numbers: list[int]
    # In label order.
    classes: list[str]
    # How the list was read, in words.
    read_as: str


class _Row(NamedTuple):
    line: int
    # (label,) or (image name, label)
    fields: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.fields[-1]


def labels_from_list(
    paths: list[str],
    synsets: Path,
    classes_file: Path | None,
    left_out: Mapping[str, str] = MappingProxyType({}),
) -> Labels:
    """Labels of images from a list, in any of the forms in which ILSVRC's validation labels are published.

    1. Image name and label on every line, apart by a tab, a comma or a semicolon, or two words apart by spaces; a
       header line may stand first. A name is the path, the file name, or either without its suffix.
    2. The same with Kaggle's boxes (LOC_val_solution.csv): `name,synset box box...`.
    3. One synset or class a line, in image-name order.
    4. One number a line in image-name order, counted from 1 (the devkit's ILSVRC2012_validation_ground_truth.txt).

    Numbers index the classes of `classes_file`; beside image names they count from 0 (Caffe's val.txt). The label is
    always the place among sorted classes, which for ILSVRC is the usual class index.

    Args:
        paths: of the images, each once.
        left_out: path of a file that is not taken -> reason, for messages.
    Raises: UserError, naming line and reason, if the list is of no stated form, or list and images do not match one to
        one, or the order of names or the meaning of numbers is in doubt.
    """
    listed = read_classes(classes_file) if classes_file is not None else None
    rows, read_as = _rows(synsets, paths)
    by_name = len(rows[0].fields) == 2
    of_image = _rows_by_name(rows, paths, synsets, left_out) if by_name else _rows_by_order(rows, paths, synsets)
    if all(_NUMBER.fullmatch(row.label) for row in rows):
        first = 0 if by_name else 1
        names = _names_of_numbers(of_image, first, synsets, listed)
        read_as += f", numbers counted from {first}"
    else:
        names = [row.label for row in of_image]
        _refuse_doubtful_names(rows, synsets, classes_file, listed)
    classes = sorted(set(listed or names))
    number = {name: label for label, name in enumerate(classes)}
    return Labels([number[name] for name in names], classes, read_as)


# --------------------------------------------------------------------------------------- lines of a list


def read_lines(path: Path, option: str) -> list[tuple[int, str]]:
    """(line number, text) of each line that is not blank, less the spaces around it.

    Args:
        option: what the file was given by, for messages.
    Raises: UserError if the file cannot be read or is no plain text in UTF-8, or in UTF-16 with a byte-order mark.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path}: cannot be read as text ({error}); correct the path") from None
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{option} {path}: cannot be read as text: line {number} is not "
            f"{encoding.removesuffix('-sig').upper()}; save it as UTF-8"
        ) from None
    lines = []
    for place, line in enumerate(_LINE_ENDS.split(text), 1):
        control = _CONTROL.search(line)
        if control:
            raise UserError(
                f"{option} {path}: cannot be read as text: line {place} holds the character {control[0]!r}; save it "
                "as plain text in UTF-8"
            )
        # Tabs at the end are empty columns; a name may not begin with one.
        if line.strip():
            lines.append((place, line.strip()))
    return lines


def _rows(synsets: Path, paths: list[str]) -> tuple[list[_Row], str]:
    """The rows of a list, less its header, and how they were read."""
    lines = read_lines(synsets, "--synsets")
    if lines and _SEPARATOR_LINE.fullmatch(lines[0][1]):
        lines = lines[1:]
    if not lines:
        raise UserError(f"--synsets {synsets}: is empty; wants one label a line, or an image name and a label")
    between = _delimiter(lines, synsets)
    rows = [_Row(number, _fields(number, line, between, synsets)) for number, line in lines]
    widths = {len(row.fields) for row in rows}
    if not widths <= {1, 2} or len(widths) > 1:
        _refuse_width(rows, between, synsets)
    empty = next((row for row in rows if not all(row.fields)), None)
    if empty is not None:
        raise UserError(f"--synsets {synsets}: line {empty.line} has an empty field; give every image its label")
    has_header, boxes = _header(rows, paths)
    header, rows = (rows[0], rows[1:]) if has_header else (None, rows)
    if not rows:
        raise UserError(f"--synsets {synsets}: holds a header alone; wants one label a line, or an image name and one")
    if boxes:
        rows = [_Row(row.line, (row.fields[0], _synset_of_boxes(row, synsets))) for row in rows]
    form = "one label a line, in name order" if widths == {1} else f"name and label, apart by {between or 'spaces'}"
    return rows, form + (f", header on line {header.line}" if header else "")


def _delimiter(lines: list[tuple[int, str]], synsets: Path) -> str:
    """Name of the character that stands between the fields of every line; "": spaces do, or there is one field."""
    holding = {name: [number for number, line in lines if character in line] for name, character in _DELIMITERS.items()}
    found = next((name for name, numbers in holding.items() if len(numbers) == len(lines)), "")
    partly = next((name for name, numbers in holding.items() if numbers), "")
    if not found and partly:
        without = next(number for number, line in lines if _DELIMITERS[partly] not in line)
        raise UserError(
            f"--synsets {synsets}: line {holding[partly][0]} has a {partly} and line {without} has none; write every "
            "line alike"
        )
    return found


def _fields(number: int, line: str, between: str, synsets: Path) -> tuple[str, ...]:
    character = _DELIMITERS.get(between, " ")
    if not between and '"' not in line:
        return tuple(line.split())
    try:
        # Line by line: a quote that is left open must not swallow the next lines.
        (fields,) = csv.reader([line], delimiter=character, skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise UserError(
            f"--synsets {synsets}: line {number} is not CSV ({error}); give the list as it was published"
        ) from None
    stripped = [field.strip() for field in fields]
    # A spreadsheet writes out empty columns.
    while len(stripped) > 1 and not stripped[-1]:
        stripped.pop()
    return tuple(stripped) if between else tuple(field for field in stripped if field)


def _refuse_width(rows: list[_Row], between: str, synsets: Path) -> None:
    """Raises: UserError naming the first line that is neither one label, nor an image name and a label."""
    usual = 1 if len(rows[0].fields) == 1 else 2
    row = next(row for row in rows if len(row.fields) != usual)
    what = "fields" if between else "words"
    raise UserError(
        f"--synsets {synsets}: line {row.line} has {len(row.fields)} {what}; wants one label a line, or an image name "
        "and a label on every line, apart by a tab or a comma where either has spaces"
    )


def _header(rows: list[_Row], paths: list[str]) -> tuple[bool, bool]:
    """Whether the first row is a header, and whether it is that of Kaggle's boxes."""
    words = [field.lower() for field in rows[0].fields]
    if len(words) == 1:
        return words[0] in _LABEL_HEADERS and len(rows) == len(paths) + 1, False
    if words[0] not in _NAME_HEADERS or any(words[0] == without_suffix(_base(path)).lower() for path in paths):
        return False, False
    return True, words[1] == "predictionstring"


def _synset_of_boxes(row: _Row, synsets: Path) -> str:
    """The synset of `synset x y x y synset x y x y ...`, as Kaggle writes the boxes of an image."""
    words = row.label.split()
    found = set(words[::5])
    if len(words) != 1 and len(words) % 5:
        raise UserError(
            f"--synsets {synsets}: line {row.line} is not a synset and four numbers for each box; give "
            "LOC_val_solution.csv as it was published"
        )
    if len(found) > 1:
        raise UserError(
            f"--synsets {synsets}: line {row.line} gives {row.fields[0]!r} two labels, {' and '.join(sorted(found))}; "
            "keep one"
        )
    return words[0]


# ---------------------------------------------------------------------------------------- rows to images


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _composed(name: str) -> str:
    """A file name as lists spell it: forward slashes, and accents in one character, which macOS writes as two."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")


class _Spellings:
    """The names that an image of the folder goes by: its path, its file name, and either without its suffix."""

    def __init__(self, paths: list[str]) -> None:
        # From the most to the least certain. Name -> number of the first image of that name.
        self._known: list[dict[str, int]] = [{}, {}, {}, {}]
        # (place in `_known`, name) -> number of the second image of that name.
        self._second: dict[tuple[int, str], int] = {}
        for number, path in enumerate(map(_composed, paths)):
            base = _base(path)
            names = (path, without_suffix(path)) + ((base, without_suffix(base)) if base != path else ())
            for place, name in enumerate(names):
                if self._known[place].setdefault(name, number) != number:
                    self._second.setdefault((place, name), number)

    def find(self, listed: str) -> list[int]:
        """The images that a listed name may mean: one; none; or two, where more share the name."""
        name = _composed(listed)
        # A list of JPEGs serves a folder of PNGs made from them.
        for spelt in (name, without_suffix(name)) if suffix_of(name) in IMAGE_SUFFIXES else (name,):
            for place, known in enumerate(self._known):
                if spelt in known:
                    second = self._second.get((place, spelt))
                    return [known[spelt]] if second is None else [known[spelt], second]
        return []


def _rows_by_name(rows: list[_Row], paths: list[str], synsets: Path, left_out: Mapping[str, str]) -> list[_Row]:
    """The row of each image.

    Raises: UserError for a name that no image has, that two have, or that stands twice, and for an image without row.
    """
    known = _Spellings(paths)
    row_of: dict[int, _Row] = {}
    unknown = []
    for row in rows:
        found = known.find(row.fields[0])
        if not found:
            unknown.append(row)
        elif len(found) > 1:
            both = " and ".join(repr(paths[number]) for number in found)
            raise UserError(
                f"--synsets {synsets}: line {row.line}: {row.fields[0]!r} may be {both}; write the path below --images"
            )
        elif found[0] in row_of:
            _refuse_second_row(row_of[found[0]], row, synsets)
        else:
            row_of[found[0]] = row
    missing = [path for number, path in enumerate(paths) if number not in row_of]
    if missing:
        swapped = bool(unknown and known.find(unknown[0].label))
        raise UserError(
            f"--synsets {synsets}: image {missing[0]!r} is not in {synsets} ({len(missing)} such); "
            + ("write the image name before the label" if swapped else "complete the folder or the list")
            + (f"; line {unknown[0].line} names {short(unknown[0].fields[0])}, which is no image" if unknown else "")
            + (" but for capitals" if unknown and _but_for_capitals(unknown[0].fields[0], paths) else "")
        )
    if unknown:
        others = list(left_out)
        passed_over = _Spellings(others).find(unknown[0].fields[0])
        reason = f"left out: {left_out[others[passed_over[0]]]}" if passed_over else "not in the folder"
        raise UserError(
            f"--synsets {synsets}: line {unknown[0].line}: image {unknown[0].fields[0]!r} is listed but {reason} "
            f"({len(unknown)} such); complete the folder or the list"
        )
    _refuse_running_numbers(rows, synsets)
    return [row_of[number] for number in range(len(paths))]


def _but_for_capitals(name: str, paths: list[str]) -> bool:
    return bool(_Spellings([path.casefold() for path in paths]).find(name.casefold()))


def _refuse_second_row(first: _Row, second: _Row, synsets: Path) -> None:
    with_labels = (
        f"{first.label!r}, both times" if first.label == second.label else f"{first.label!r} and {second.label!r}"
    )
    raise UserError(
        f"--synsets {synsets}: lines {first.line} and {second.line} both name image {second.fields[0]!r} "
        f"({with_labels}); keep one"
    )


def _refuse_running_numbers(rows: list[_Row], synsets: Path) -> None:
    """ILSVRC's ImageSets/CLS-LOC/val.txt counts its images: `ILSVRC2012_val_00000001 1`. No labels stand there."""
    if len(rows) > 2 and all(row.label == str(number) for number, row in enumerate(rows, 1)):
        raise UserError(
            f"--synsets {synsets}: its numbers count the lines from 1 to {len(rows)}, so they are no labels; give "
            "LOC_val_solution.csv or ILSVRC2012_validation_ground_truth.txt"
        )


def _rows_by_order(rows: list[_Row], paths: list[str], synsets: Path) -> list[_Row]:
    """The row of each image, where rows stand in the order of the image names.

    Raises: UserError if there are not as many rows as images, a blank line stands among them, a row names an image, or
        the order is in doubt.
    """
    if len(rows) != len(paths):
        raise UserError(
            f"--synsets {synsets}: {len(rows)} lines for {len(paths)} images; complete the folder or the list"
        )
    for before, row in zip(rows, rows[1:]):
        if row.line != before.line + 1:
            raise UserError(
                f"--synsets {synsets}: line {before.line + 1} is blank, so the image of its place has no label; "
                "remove the line or fill it"
            )
    stems = [without_suffix(_base(path)) for path in paths]
    _refuse_names_as_labels(rows, paths, stems, synsets)
    orders = {tuple(sorted(range(len(paths)), key=key)) for key in _orders_of(paths, stems)}
    if len(orders) > 1 or len(set(stems)) < len(stems):
        first, *others = sorted(orders)
        place = next((i for i in range(len(paths)) if any(other[i] != first[i] for other in others)), 0)
        raise UserError(
            f"--synsets {synsets}: one label a line goes by the order of image names, and here there are several "
            f"(about {paths[first[place]]!r}); write the image name before each label"
        )
    of_image = dict(zip(orders.pop(), rows))
    return [of_image[number] for number in range(len(paths))]


def _refuse_names_as_labels(rows: list[_Row], paths: list[str], stems: list[str], synsets: Path) -> None:
    """A label that holds the name of an image is a name and a label, apart by something else."""
    names, bare = set(map(_base, paths)), set(stems)
    for row in rows:
        parts = re.split(r"[:|=\s]+", row.label)
        if not names.isdisjoint(parts) or (len(parts) > 1 and not bare.isdisjoint(parts)):
            raise UserError(
                f"--synsets {synsets}: line {row.line}: {short(row.label)} holds an image's name, so it is no label; "
                "write name and label apart by a tab or a comma"
            )
    labels = [row.label for row in rows]
    if len(rows) > 1 and set(labels) == bare and not (labels != sorted(labels) and all(map(_NUMBER.fullmatch, labels))):
        raise UserError(
            f"--synsets {synsets}: its lines are the names of the images, without a label; write one after each name"
        )


def _orders_of(paths: list[str], stems: list[str]) -> Iterable:
    """The sort keys of what may be meant by name order: by characters, with whole names or paths, without regard to
    capitals, and with numbers by their size.
    """

    def by_number(i: int) -> list:
        return [
            (0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"([0-9]{1,18})", stems[i])
        ]

    return (
        lambda i: stems[i],
        lambda i: _base(paths[i]),
        lambda i: paths[i],
        lambda i: (stems[i].casefold(), stems[i]),
        by_number,
    )


# ----------------------------------------------------------------------------------------------- classes


def _names_of_numbers(rows: list[_Row], first: int, synsets: Path, listed: list[str] | None) -> list[str]:
    if listed is None:
        raise UserError(
            f"--synsets {synsets}: holds numbers; say what they mean with --classes FILE, one synset a "
            "line in the order of the numbers"
        )
    if any(_NUMBER.fullmatch(name) for name in listed) and listed != [str(i + first) for i in range(len(listed))]:
        raise UserError(
            f"--synsets {synsets}: holds numbers, and so does --classes: they may be names or places; give names of "
            "classes in both"
        )
    if first == 1 and listed == sorted(listed) and all(_WNID.fullmatch(name) for name in listed):
        # The devkit's numbers follow its own order (1 is n02119789). A sorted list would give wrong labels silently.
        raise UserError(
            f"--synsets {synsets}: ILSVRC2012 numbers do not follow sorted synsets; give --classes in the "
            "order of ILSVRC2012_ID (meta.mat of the devkit), "
            "or use LOC_val_solution.csv, which needs no list"
        )
    outside = next(
        (row for row in rows if len(row.label) > 9 or not first <= int(row.label) < first + len(listed)), None
    )
    if outside is not None:
        raise UserError(
            f"--synsets {synsets}: line {outside.line}: number {outside.label[:20]} is outside "
            f"{first}..{first + len(listed) - 1}, the lines of --classes"
        )
    return [listed[int(row.label) - first] for row in rows]


def _refuse_doubtful_names(
    rows: list[_Row], synsets: Path, classes_file: Path | None, listed: list[str] | None
) -> None:
    """Raises: UserError for a label that is not among the listed classes; without these, for one that is no name, or
    is spelt like another but for capitals or the form of its accents.
    """
    if listed is not None:
        known = set(listed)
        unknown = next((row for row in rows if row.label not in known), None)
        if unknown is not None:
            raise UserError(
                f"--synsets {synsets}: line {unknown.line}: {unknown.label!r} is not in {classes_file}; give the "
                "matching list of classes"
            )
        return
    spelt: dict[str, _Row] = {}
    for row in rows:
        if _NO_LABEL.fullmatch(row.label):
            raise UserError(
                f"--synsets {synsets}: line {row.line}: {row.label!r} is no name of a class; write names on all "
                "lines, or whole numbers on all lines, or list the classes with --classes FILE"
            )
        if suffix_of(row.label) in IMAGE_SUFFIXES:
            raise UserError(
                f"--synsets {synsets}: line {row.line}: {row.label!r} is the name of an image, no label; write the "
                "label after the name, or list the classes with --classes FILE"
            )
        like = spelt.setdefault(unicodedata.normalize("NFC", row.label).casefold(), row)
        if like.label != row.label:
            raise UserError(
                f"--synsets {synsets}: lines {like.line} and {row.line}: {like.label!r} and {row.label!r} look like "
                "one class; spell them alike, or list both with --classes FILE"
            )


def read_classes(path: Path) -> list[str]:
    """The names of the classes in a file, in order.

    1. One class a line; the whole line is the name. Where every line begins with a synset (LOC_synset_mapping.txt,
       synset_words.txt), that is the name, and where it begins with its number, from 0 or 1, the rest.
    2. JSON: a list of names; number -> name; number -> [synset, name] (imagenet_class_index.json); name -> number.

    Raises: UserError if the file cannot be read, is of no such form, is empty or names a class twice.
    """
    lines = read_lines(path, "--classes")
    if lines and lines[0][1][0] in "[{":
        names = _classes_of_json(path, "\n".join(line for _, line in lines))
        places = list(range(1, len(names) + 1))
        where = "entry"
    else:
        names, places, where = _classes_of_lines(path, lines), [number for number, _ in lines], "line"
    first: dict[str, int] = {}
    for place, name in zip(places, names):
        before = first.setdefault(unicodedata.normalize("NFC", name), place)
        if before != place:
            raise UserError(
                f"--classes {path}: {short(name)} stands twice, on {where} {before} and {where} {place}; wants one "
                "class a line"
            )
    if not names:
        raise UserError(f"--classes {path}: is empty; wants one class a line")
    return names


def _classes_of_lines(path: Path, lines: list[tuple[int, str]]) -> list[str]:
    for (before, _), (number, _) in zip(lines, lines[1:]):
        if number != before + 1:
            raise UserError(
                f"--classes {path}: line {before + 1} is blank, and the place of a line is its number; remove it"
            )
    with_synset = [bool(_WNID.fullmatch(re.split(r"[\s,;]", line, maxsplit=1)[0])) for _, line in lines]
    if any(with_synset):
        if not all(with_synset):
            number = lines[with_synset.index(False)][0]
            raise UserError(f"--classes {path}: line {number} begins with no synset and others do; write all alike")
        return [line[:9] for _, line in lines]
    numbered = [_NUMBERED_LINE.fullmatch(line) for _, line in lines]
    starts = [int(match[1][:9]) if match else -1 for match in numbered]
    if lines and starts[0] in (0, 1) and all(numbered):
        wrong = next((i for i, start in enumerate(starts) if start != starts[0] + i), None)
        if wrong is not None:
            raise UserError(
                f"--classes {path}: line {lines[wrong][0]} has number {starts[wrong]} where {starts[0] + wrong} "
                "follows; sort the lines by their numbers, or quote names that begin with one"
            )
        lines = [(number, match[2]) for (number, _), match in zip(lines, numbered) if match]
    return [_unquoted(path, number, line) for number, line in lines]


def _unquoted(path: Path, number: int, line: str) -> str:
    if not line.startswith('"'):
        return line
    try:
        (fields,) = csv.reader([line], strict=True)
    except (csv.Error, ValueError):
        fields = []
    if len(fields) != 1 or not fields[0].strip():
        raise UserError(f"--classes {path}: line {number} has quotes about a part of it; quote all of it or nothing")
    return fields[0].strip()


def _classes_of_json(path: Path, text: str) -> list[str]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UserError(f"--classes {path}: not JSON ({error}); give a JSON file, or one class a line") from None
    if isinstance(found, dict) and found and all(type(value) is int for value in found.values()):
        # name -> number
        twice = next((number for number, count in Counter(found.values()).items() if count > 1), None)
        if twice is not None:
            raise UserError(f"--classes {path}: two classes have the number {twice}; give each one of its own")
        found = {str(number): name for name, number in sorted(found.items(), key=lambda item: item[1])}
    if isinstance(found, dict):
        missing = next((number for number in range(len(found)) if str(number) not in found), None)
        if missing is not None:
            raise UserError(
                f"--classes {path}: {len(found)} classes, but none has the number {missing}; wants numbers from 0 on"
            )
        found = [found[str(number)] for number in range(len(found))]
    if not isinstance(found, list):
        raise UserError(f"--classes {path}: is no list or object of names; give one, or one class a line")
    # imagenet_class_index.json: [synset, words]
    names = [value[0] if isinstance(value, list) and value else value for value in found]
    wrong = next((i for i, name in enumerate(names) if not isinstance(name, str) or not name.strip()), None)
    if wrong is not None:
        raise UserError(f"--classes {path}: entry {wrong} is {short(found[wrong])}; wants the name of a class")
    return [name.strip() for name in names]
