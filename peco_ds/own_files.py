"""What a command may replace or remove: files that are known to be its own, and no other.

A file is known by what stands in it (`made_by` in JSON, the software of a PNG, a comment in Markdown), or by the record
of the set, run or release that it is part of. Whatever else stands where a command would write is refused before the
work begins, and once more before the file takes its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from peco_ds.errors import UserError
from peco_ds.user_paths import check_can_write

MADE_BY = "made_by"
# As `made_by` in JSON, as the software of a PNG; the tars of this package name it as their owner.
PACKAGE = "peco_ds"
TAR_OWNER = "peco"


# Of a JSON or Markdown file of ours; what is larger, as weights given by mistake, is not read.
_LARGEST_TEXT_BYTES = 1 << 28


@dataclass(frozen=True)
class Own:
    """How a command knows a file as its own.

    Attributes:
        maker: the command, for messages and marks.
        knows: whether a standing file is the command's; may raise any exception for one that it cannot read.
    """

    maker: str
    knows: Callable[[Path], bool]

    @property
    def mark(self) -> str:
        return f"{PACKAGE} {self.maker}"


def own_json(maker: str, *older: str) -> Own:
    """JSON objects with a `made_by`, or with all of the keys that the command's files had before there was one."""

    def knows(path: Path) -> bool:
        value = json.loads(_text(path))
        return isinstance(value, dict) and (
            value.get(MADE_BY) == f"{PACKAGE} {maker}" or (bool(older) and set(older) <= value.keys())
        )

    return Own(maker, knows)


def own_png(maker: str, older: Callable[[Path], bool] = lambda _path: False) -> Own:
    """PNGs that name the command as their software (`png_text`).

    Args:
        older: whether a picture without the name is the command's, from before there was one.
    """

    def knows(path: Path) -> bool:
        from PIL import Image

        with Image.open(path, formats=("PNG",)) as image:
            named = image.info.get("Software")
        return named == f"{PACKAGE} {maker}" or older(path)

    return Own(maker, knows)


def _text(path: Path) -> str:
    if path.stat().st_size > _LARGEST_TEXT_BYTES:
        raise ValueError("larger than any text of ours")
    return path.read_text(encoding="utf-8")


def png_text(own: Own) -> dict[str, str]:
    """The text chunks of a PNG by which it is known again, for matplotlib's `metadata`."""
    return {"Software": own.mark}


# Drawn by evaluate.py, and by the training of a tokenizer into its run folder.
ATLAS = own_png("evaluate")


def own_markdown(maker: str, older: Callable[[str], bool] = lambda _text: False) -> Own:
    """Markdown that ends in the command's comment (`markdown_mark`).

    Args:
        older: whether a text without the comment is the command's, from before there was one.
    """

    def knows(path: Path) -> bool:
        text = _text(path)
        return text.rstrip().endswith(markdown_mark(maker).rstrip()) or older(text)

    return Own(maker, knows)


def markdown_mark(maker: str) -> str:
    """The last line of a Markdown file of ours; it is not shown."""
    return f"<!-- {MADE_BY} {PACKAGE} {maker} -->\n"


def is_own_tar(path: Path, sha256: str, *, first_ends: tuple[str, ...]) -> bool:
    """Whether a tar that a record names is still what this package wrote, or what damage left of it.

    Args:
        sha256: as recorded; "" where the record cannot be read.
        first_ends: what the name of its first member ends in.
    """
    with open(path, "rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
    if len(head) < tarfile.BLOCKSIZE:
        # Cut within the first header, which begins with the name.
        return not head or head[:100].rstrip(b"\0").decode("utf-8", "replace").endswith(first_ends)
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            first = tar.next()
    except Exception:
        # Beside its own errors, tarfile lets through what a damaged header makes of its numbers.
        first = None
    if first is not None and first.uname == TAR_OWNER and first.name.endswith(first_ends):
        return True
    if not sha256:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


# ------------------------------------------------------------------------------------------- refusing


def refuse_foreign(path: Path, own: Own, *, remedy: str = "give another name, or move it away") -> None:
    """Raises: UserError if something stands at `path` that is not the command's own."""
    if not os.path.lexists(path):
        return
    if path.is_dir():
        raise UserError(f"{path}: is a folder, where {own.maker} would write a file; {remedy}")
    if path.is_file():
        # Whatever a reader of foreign bytes fails with: what it cannot read is not ours.
        with suppress(Exception):
            if own.knows(path):
                return
    raise UserError(f"{path}: stands there already and was not written by {own.maker}; {remedy}")


def check_output(path: Path, own: Own, option: str = "") -> None:
    """Find out before the work whether its result can be written.

    Args:
        option: that named the file, for messages.
    Raises: UserError if the folder is missing or takes no file, or if something stands there that is not the command's.
    """
    check_can_write(option, path)
    refuse_foreign(path, own)


def is_same_file(one: Path, other: Path) -> bool:
    """Whether two names mean one file or folder, however they are spelled; False where one of them is missing."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path that need not exist is the folder or lies inside it, whatever links or letters spell it."""
    path = Path(os.path.realpath(path))
    return any(is_same_file(parent, folder) for parent in (path, *path.parents))


# -------------------------------------------------------------------------------------------- writing


@contextmanager
def written_whole(path: Path, own: Own | None = None) -> Iterator[Path]:
    """A temporary name to write a file under, which takes its own name when the block ends, and else is removed.

    A link is followed: what it points to is replaced, not the link.

    Args:
        own: refuses to replace what is not the command's.
    Raises: OSError that names the file; UserError as `refuse_foreign`.
    """
    final = Path(os.path.realpath(path))
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if own is not None:
            refuse_foreign(final, own)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, final)
    except OSError as error:
        raise naming(error, final, temporary) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def naming(error: OSError, path: Path, temporary: Path | None = None) -> OSError:
    """The error with the file that people know: one of a file descriptor names none, one of a draft its own name."""
    if error.errno is not None and error.filename in (None, str(temporary)):
        error.filename, error.filename2 = str(path), None
    return error


def write_own_json(path: Path, own: Own, value: dict) -> None:
    """Write a JSON object with the command's mark.

    Raises: as `written_whole`.
    """
    with written_whole(path, own) as temporary:
        temporary.write_text(json.dumps({MADE_BY: own.mark, **value}, indent=1) + "\n", encoding="utf-8")
