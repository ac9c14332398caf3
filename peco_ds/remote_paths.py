"""Files of object stores and web servers, by URL: what `pathlib.Path` is for files of this machine.

`s3://bucket/prefix`, `https://host/folder`, `hf://datasets/owner/name` and whatever else fsspec opens. Credentials come
from where its libraries look (environment, `~/.aws`, `~/.netrc`, a login of the hub). One that stands in a URL all the
same is used, and shown nowhere: the text of a `RemotePath` is without it.

Every request is repeated, with pauses that grow, until `Access.retry_s` is over; then `StoreFault` is raised, which
ends a stage with the code that launchers requeue.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from peco_ds.errors import StoreFault, UserError, redact

logger = logging.getLogger("peco_ds")
T = TypeVar("T")

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]+)://(.*)", re.DOTALL)
# Names of files of this machine, which no manifest of a store may lead to.
_LOCAL = ("file", "local")
# Protocol -> package that fsspec needs for it, extra of this package that brings it.
_EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), ("s3fs", "s3")),
    "hf": ("huggingface_hub", "hf"),
    **dict.fromkeys(("http", "https"), ("aiohttp", "http")),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", "")),
    **dict.fromkeys(("az", "abfs", "abfss"), ("adlfs", "")),
}
# A request takes as long as some hundred kilobytes do, so smaller gaps are read with their neighbours.
GAP_BYTES = 128 << 10
# Of one request, so that several go side by side and a lost one costs little.
REQUEST_BYTES = 8 << 20
# Seconds: to reach a server, and without a byte from it.
_CONNECT_S, _SILENCE_S = 10, 30
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 15.0
# Repeating a request does not help against these.
_FINAL_STATUS = frozenset({400, 405, 410, 414, 501})
# Every file system that was opened. A forked loader process that drops its parent's closes the connections, which takes
# them from the list of what the parent waits for: the two share it, and the parent would not see its next answer.
_held: dict[int, object] = {}


def is_url(text: str) -> bool:
    return _URL.match(text) is not None


@dataclass(frozen=True)
class Access:
    """How files of a store are read; part of every `RemotePath`, so that it reaches the loader processes.

    Attributes:
        cache: folder that keeps what was read; "": nothing is kept.
        cache_bytes: its bound.
        whole_shards: keep whole shards, not ranges of them.
        retry_s: how long a request is repeated.
        requests: at a time, of one process.
        staged: all shards are brought into the cache before the first step.
    """

    cache: str = ""
    cache_bytes: int = 100 << 30
    whole_shards: bool = False
    retry_s: float = 120.0
    requests: int = 8
    staged: bool = False


# Of the recipe that this process runs, for the tars that a set on a disk names in a store.
_access = Access()


def use_access(access: Access) -> None:
    """Read stores so wherever nothing else is said; loader processes inherit it."""
    global _access
    _access = access


def usual_access() -> Access:
    return _access


class RemoteStatus(NamedTuple):
    """What a store tells of a file."""

    st_size: int
    # Changes with the content; "" where the store has none.
    etag: str


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of a store. Its text (`str`) shows no credential; `url` is for requests alone.

    It has no `__fspath__`: `Path(remote)` fails, where it would make `s3:/bucket` of `s3://bucket`.

    Args:
        protocol, place, query: `protocol://place?query`.
    """

    protocol: str
    place: str
    query: str = ""
    access: Access = field(default=Access(), compare=False)

    @property
    def url(self) -> str:
        return f"{self.protocol}://{self.place}" + (f"?{self.query}" if self.query else "")

    def __str__(self) -> str:
        return redact(self.url)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    @property
    def name(self) -> str:
        return self.place.rpartition("/")[2]

    @property
    def parts(self) -> tuple[str, ...]:
        """Folders and file name."""
        return tuple(self.place.split("/"))

    @property
    def parent(self) -> RemotePath:
        return replace(self, place=self.place.rpartition("/")[0])

    def __truediv__(self, name: str) -> RemotePath:
        """Raises: UserError for a name that leads out of the folder."""
        name = str(name)
        if name.startswith("/") or ".." in name.split("/") or is_url(name) or "\0" in name or "::" in name:
            raise UserError(f"{self}: {name[:80]!r} leads out of it; correct the name")
        # A "?" or "#" of a name would end the path of a web address.
        if self.protocol in ("http", "https"):
            name = name.replace("%", "%25").replace("?", "%3F").replace("#", "%23")
        return replace(self, place=f"{self.place}/{name}")

    # ---------------------------------------------------------------------------------------- looking

    def status(self) -> RemoteStatus:
        """Raises: FileNotFoundError; StoreFault, UserError as `request`."""
        store, place = self._store()
        return _status_of(self.request(lambda: store.info(place)))

    stat = status

    def exists(self) -> bool:
        return self.is_dir() or (self.protocol not in ("http", "https") and self.is_file())

    def is_file(self) -> bool:
        store, place = self._store()
        found = self.request(lambda: _or_missing(lambda: store.info(place)))
        return found is not None and found.get("type") != "directory"

    def is_dir(self) -> bool:
        """Whether anything lies under it. Web servers do not tell: a folder of theirs is one that has a manifest."""
        if self.protocol in ("http", "https"):
            return (self / "manifest.json").is_file()
        return bool(self.listing())

    def listing(self) -> dict[str, RemoteStatus] | None:
        """Name -> status of the files right under it, by one request or a few.

        None where the store lists nothing, as web servers do.
        """
        if self.protocol in ("http", "https"):
            return None
        store, place = self._store()
        found = self.request(lambda: _or_missing(lambda: store.ls(place, detail=True, refresh=True))) or []
        return {
            entry["name"].rstrip("/").rpartition("/")[2]: _status_of(entry)
            for entry in found
            if entry.get("type") != "directory"
        }

    # ---------------------------------------------------------------------------------------- reading

    def read_bytes(self) -> bytes:
        """Raises: FileNotFoundError; StoreFault, UserError as `request`."""
        store, place = self._store()
        return self.request(lambda: store.cat_file(place))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, size: int, check: Callable[[bytes], str] = lambda _data: "") -> bytes:
        """`size` bytes from byte `start` on.

        Args:
            check: what is wrong with the bytes; "" if nothing is. Faulty ones are asked for again.
        Raises: StoreFault; UserError where the server sends the whole file instead.
        """
        if not size:
            return b""
        store, place = self._store()

        def read() -> bytes:
            data = store.cat_file(place, start=start, end=start + size)
            if len(data) > size:
                raise UserError(
                    f"{self}: the server has no ranges (sent {len(data)} bytes for {size}); copy the set to a store "
                    "or a server that has, or to a disk"
                )
            fault = check(data) if len(data) == size else f"{len(data)} of {size} bytes came"
            if fault:
                raise _Faulty(f"bytes {start} to {start + size}: {fault}")
            return data

        return self.request(read, missing_is_final=False)

    def download(self, local: Path) -> None:
        """Raises: FileNotFoundError; StoreFault, UserError as `request`; OSError of the disk."""
        store, place = self._store()
        expected = self.status().st_size

        def fetch() -> None:
            store.get_file(place, str(local))
            size = local.stat().st_size
            if expected >= 0 and size != expected:
                raise _Faulty(f"{size} of {expected} bytes came")

        self.request(fetch)

    # ---------------------------------------------------------------------------------------- writing

    def write_bytes(self, data: bytes) -> None:
        """Whole or not at all, as stores take a file. Raises: StoreFault, UserError as `request`."""
        self._refuse_read_only()
        store, place = self._store()
        self.request(lambda: store.pipe_file(place, data))

    def upload(self, local: Path) -> None:
        """As `write_bytes`, from a file of this machine."""
        self._refuse_read_only()
        store, place = self._store()
        self.request(lambda: store.put_file(str(local), place))

    def unlink(self, missing_ok: bool = False) -> None:
        store, place = self._store()
        self.request(lambda: _or_missing(lambda: store.rm_file(place)) if missing_ok else store.rm_file(place))

    def _refuse_read_only(self) -> None:
        if self.protocol in ("http", "https"):
            raise UserError(f"{self}: a web server takes no files; give an object store (s3://...) or a folder")

    # --------------------------------------------------------------------------------------- requests

    def request(self, call: Callable[[], T], *, missing_is_final: bool = True) -> T:
        """The answer of a call, tried again with growing pauses until `access.retry_s` is over.

        Args:
            missing_is_final: a file that is not there is not asked for again.
        Raises: FileNotFoundError (if final); UserError where trying again cannot help; StoreFault when the time is
            over.
        """
        end, pause_s = time.monotonic() + self.access.retry_s, _FIRST_PAUSE_S
        while True:
            try:
                return call()
            except UserError:
                raise
            except Exception as caught:
                # Each library has errors of its own, and not all of them are OSErrors.
                error = _cause_of(caught)
                if isinstance(error, FileNotFoundError):
                    if missing_is_final:
                        raise FileNotFoundError(2, "no such file", str(self)) from None
                else:
                    self._refuse_final(error)
                reason = _reason(error)
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise StoreFault(
                    f"{self}: {reason}, for {self.access.retry_s:g} s; start again when the store answers, or put the "
                    "set back"
                )
            # Ranks that failed together would come back together.
            pause_s = min(pause_s, _LONGEST_PAUSE_S, left_s)
            logger.warning("%s: %s; asked again in %.1f s", self, reason, pause_s)
            time.sleep(pause_s * random.SystemRandom().uniform(0.5, 1.0))
            pause_s *= 2

    def _refuse_final(self, error: Exception) -> None:
        """Raises: UserError for an error that stays the same however often a request is repeated."""
        name, status = type(error).__name__, _http_status(error)
        if "Redirect" in name or name in ("InvalidURL", "InvalidUrlClientError"):
            raise UserError(f"{self}: leads to what is no web address ({_reason(error)}); correct the URL") from None
        if name in ("NoCredentialsError", "PartialCredentialsError", "LocalTokenNotFoundError"):
            raise UserError(
                f"{self}: {_reason(error)}; log in as its library describes (for s3: AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or ~/.aws; for hf: hf auth login)"
            ) from None
        if status in _FINAL_STATUS or isinstance(error, (NotImplementedError, TypeError)):
            raise UserError(f"{self}: {_reason(error)}; correct the URL, or give another store") from None

    def _store(self):
        """fsspec's file system, one a process, and the place in it.

        Raises: UserError where it or its package is missing.
        """
        import fsspec

        package, extra = _EXTRAS.get(self.protocol, ("", ""))
        try:
            store, place = fsspec.core.url_to_fs(self.url, **_options(self.protocol))
            _held[id(store)] = store
            return store, place
        except ImportError:
            named = f"pip install {package or 'the package that fsspec names for it'}"
            remedy = f"pip install 'peco_ds[{extra}]', or {named}" if extra else named
            raise UserError(f"{self}: {self.protocol}:// needs {package or 'another package'}; {remedy}") from None
        except ValueError as error:
            known = "s3://, https://, hf://datasets/, gs://"
            raise UserError(f"{self}: {_reason(error)}; known are {known} and what else fsspec opens") from None


# What the readers of sets take.
Place = Path | RemotePath


class _Faulty(Exception):
    """Bytes that came and are not those that were asked for."""


def parse_url(text: str, access: Access | None = None) -> Place:
    """A URL as a path; `file:///a` is the file of this machine.

    Raises: UserError for one that is incomplete, chained, or leads out of its folder.
    """
    found = _URL.match(text)
    assert found is not None, text
    protocol, rest = found[1].lower(), found[2]
    # A key of an object store may hold a "?".
    place, _, query = rest.partition("?") if protocol in ("http", "https") else (rest, "", "")
    shown = redact(text)
    if protocol in _LOCAL:
        if not place.startswith("/"):
            raise UserError(f"{shown}: names another machine's file; write the path alone")
        return Path(place)
    place = place.rstrip("/")
    if "::" in text or "\0" in text:
        raise UserError(f"{shown}: chains of stores are not read; give the address of the files")
    if not place.strip("/") or ".." in place.split("/"):
        fault = "leads out of its folder by '..'" if place else "names no place"
        raise UserError(f"{shown}: {fault}; write the address out, as s3://bucket/folder")
    return RemotePath(protocol, place, query, access or _access)


def place_of(path: str | Place, access: Access | None = None) -> Place:
    """A path, or the text of a path or URL, without the expansion of variables."""
    if isinstance(path, (Path, RemotePath)):
        return path
    return parse_url(path, access) if is_url(path) else Path(path)


def local_copy(path: Place) -> Path:
    """A file that libraries open by its name; of a store, a copy that lives as long as this process.

    Raises: FileNotFoundError; StoreFault, UserError as `RemotePath.request`.
    """
    return path if isinstance(path, Path) else _copy_of(path, path.url)


def local_folder(folder: Place, names: tuple[str, ...]) -> Path:
    """As `local_copy`, of a folder's files of these names; those that it has not are left out."""
    if isinstance(folder, Path):
        return folder
    for name in names:
        with suppress(FileNotFoundError):
            local_copy(folder / name)
    return _copies_of(folder.url)


# Files of releases (convert/, models/tokenizers.py, and what others release with theirs), for stores that list nothing.
_OF_RELEASES = (
    *("config.json", "model.safetensors", "mim_head.safetensors", "model.pth", "pytorch_model.bin"),
    *("preprocessor_config.json", "open_clip_config.json", "open_clip_model.safetensors"),
    *("open_clip_pytorch_model.bin", "tokenizer.json", "tokenizer.safetensors", "README.md"),
)
_WEIGHTS = (".safetensors", ".pth", ".pt", ".tar", ".bin")


def local_release(place: Place) -> Path:
    """Weights or a release folder as a path of this machine; of a store, a copy that lives as long as this process.

    Raises: UserError if nothing is there, or as `RemotePath.request`; StoreFault.
    """
    if isinstance(place, Path):
        return place
    is_file = place.name.endswith(_WEIGHTS)
    folder = place.parent if is_file else place
    listing = folder.listing()
    names = [name for name in _OF_RELEASES if listing is None or name in listing]
    if is_file:
        # A config beside a file tells what the file does not.
        names = [name for name in names if name.endswith(".json")] + [place.name]
    copies = local_folder(folder, tuple(names))
    found = copies / place.name if is_file else copies
    if not found.exists():
        raise UserError(f"{place}: no weights and no release there; correct the address")
    return found


@cache
def _copy_of(path: RemotePath, _url: str) -> Path:
    copy = _copies_of(path.parent.url) / path.name
    copy.parent.mkdir(exist_ok=True)
    try:
        path.download(copy)
    except FileNotFoundError:
        # A folder of which nothing is there is not there either.
        with suppress(OSError):
            copy.parent.rmdir()
        raise
    return copy


@cache
def _copies_of(folder_url: str) -> Path:
    return Path(_copies().name) / hashlib.sha256(folder_url.encode()).hexdigest()[:16]


@cache
def _copies() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="peco_ds_", ignore_cleanup_errors=True)


def fault_of_shard_url(text: str) -> str:
    """Why a URL may not stand in a manifest; "" if it may."""
    try:
        found = parse_url(text)
    except UserError as error:
        return str(error)
    if not isinstance(found, RemotePath):
        return f"{redact(text)[:80]} names a file of this machine"
    return "holds credentials" if str(found) != found.url else ""


def holds_credentials(text: str) -> bool:
    """Whether a text that is meant as a path is a URL with a user, a password or a query that are no $VARIABLE."""
    return is_url(text) and redact(text) != text and "$" not in text


def _options(protocol: str) -> dict:
    """Time-outs, under what the user has set for fsspec (`~/.config/fsspec`, FSSPEC_S3_..., FSSPEC_HTTPS_...)."""
    import fsspec

    own: dict[str, dict] = {}
    if protocol in ("s3", "s3a"):
        own = {"config_kwargs": {"connect_timeout": _CONNECT_S, "read_timeout": _SILENCE_S}}
    elif protocol in ("http", "https"):
        try:
            import aiohttp
        except ImportError:
            return {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
        # trust_env: ~/.netrc and proxies. A compressed body has no ranges.
        own = {
            "client_kwargs": {"timeout": timeout, "trust_env": True},
            "headers": {"Accept-Encoding": "identity"},
        }
    given = fsspec.config.conf.get(protocol, {})
    return {
        "use_listings_cache": False,
        **{name: {**value, **given.get(name, {})} for name, value in own.items()},
    }


def _status_of(info: dict) -> RemoteStatus:
    etag = info.get("ETag") or info.get("etag") or ""
    size = info.get("size")
    return RemoteStatus(size if type(size) is int else -1, str(etag).strip('"'))


def _or_missing(call: Callable[[], T]) -> T | None:
    try:
        return call()
    except FileNotFoundError as error:
        if _cause_of(error) is not error:
            raise
        return None


def _cause_of(error: Exception) -> Exception:
    """The error; of fsspec's "no such file" what it stands for: a web server that fails or is away is called so too."""
    cause = error.__cause__
    if (
        not isinstance(error, FileNotFoundError)
        or not isinstance(cause, Exception)
        or isinstance(cause, FileNotFoundError)
        or _http_status(cause) in (404, 410)
    ):
        return error
    return cause if isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp") else error


def _http_status(error: Exception) -> int | None:
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if type(status) is int else None


def _reason(error: Exception) -> str:
    """A library's error in a few words, without what it may tell of credentials."""
    status = _http_status(error)
    message = getattr(error, "message", "") if status else str(error)
    words = " ".join(redact(f"{status} {message}" if status else str(message)).split())[:200]
    return words or type(error).__name__
