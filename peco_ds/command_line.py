"""The command line that every stage shares, and the one place where an error becomes an exit code."""

from __future__ import annotations

import argparse
import atexit
import io
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_KEYBOARD,
    EXIT_REQUEUE,
    FULL,
    OF_STORAGE,
    StoreFault,
    UserError,
    describe_os_error,
    env_rank,
    notice,
    printable,
)
from peco_ds.recipe_files import R, Resolved, load_recipe
from peco_ds.remote_paths import Place, place_of
from peco_ds.user_paths import expand, expand_path

logger = logging.getLogger("peco_ds")

# A rank other than the first waits so long before it reports an error. Where all ranks found the same one, the launcher
# ends this rank first and the user reads one line; where only this rank did, nothing is lost.
OTHER_RANKS_WAIT_S = 6.0
# A finished rank waits so long for its process group to shut down: NCCL's teardown waits for ranks that have died.
TEARDOWN_S = 60.0

# gloo has no exception type of its own: its errors are recognised by its source path or its words.
_GLOO_WORDS = re.compile(
    r"gloo/transport|Connection closed by peer|Connection reset by peer|Timed out waiting \d+ "
    r"?ms|Application timeout caused pair closure|Socket closed"
)

# CUDA's messages about a broken GPU, bus or link, none of which an error in our code causes.
_BROKEN_DEVICE = re.compile(
    r"CUDA error: (uncorrectable ECC|unspecified launch failure|uncorrectable NVLink|hardware "
    r"stack error|GPU is lost|.*device.* (is|are) busy or unavailable)"
)


def user_path(text: str) -> Path:
    """`type` of an option that names a path."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a path, . for the folder you are in")
    try:
        return expand_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def user_place(text: str) -> Place:
    """As `user_path`, for an option that may name a place in a store."""
    try:
        return place_of(expand(text)) if "://" in text or "$" in text else user_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def user_text(text: str) -> str:
    """As `user_path`, for an option that names a path or something else."""
    return (text if "://" in text else str(user_path(text))) if text[:1] == "~" or "$" in text else text


class Parser(argparse.ArgumentParser):
    """Raises UserError for a command line that it cannot read, and still takes flags under their old names."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self._renamed_flags: dict[str, str] = {}

    def renamed_flag(self, old: str, new: str) -> None:
        """`old` on a command line means `new`, with one line of notice."""
        self._renamed_flags[old] = new

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(self._current(args), namespace)

    def parse_known_intermixed_args(self, args=None, namespace=None):
        return super().parse_known_intermixed_args(self._current(args), namespace)

    def _current(self, args: Sequence[str] | None) -> list[str]:
        """The arguments with flags in today's spelling."""
        found = []
        for text in sys.argv[1:] if args is None else args:
            flag, equals, value = text.partition("=")
            new = self._renamed_flags.get(flag)
            if new is not None:
                notice(f"{flag} is now written {new}; the old spelling still works")
            found.append(text if new is None else f"{new}{equals}{value}")
        return found

    def error(self, message):
        raise UserError(f"{self.prog}: {message}; see --help")


def stage_parser(description: str, *, recipe: str, deepspeed_config: str | None) -> Parser:
    """Parser of a stage that is driven by a recipe.

    Args:
        recipe: name of the default recipe.
        deepspeed_config: default file in ds_configs/, None for a stage without training.
    """
    parser = Parser(
        description=description,
        epilog="exit codes: 0 done, 2 bad input (one line says what), 75 stopped in good order, start again "
        "to continue, "
        "76 lost the other ranks or the store of the data, or hung, start again to continue from the newest "
        "checkpoint; 1 is a fault of this program",
    )
    parser.add_argument(
        "--recipe",
        default=recipe,
        help="YAML file, the name of one in peco_ds/recipes, or a run folder for its settings (default: %(default)s)",
    )
    if deepspeed_config is not None:
        parser.add_argument(
            "--deepspeed_config",
            default=str(DS_CONFIGS / deepspeed_config),
            help=f"DeepSpeed JSON (default: ds_configs/{deepspeed_config})",
        )
        parser.add_argument("--out", type=user_path, default=None, help="run folder (default: runs/RECIPE_NAME)")
    parser.add_argument("--dry_run", action="store_true", help="resolve and check everything, print it, do nothing")
    # The deepspeed launcher appends it.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="settings over the recipe's; all of them stand, with comments, in peco_ds/config.py",
    )
    return parser


def parse_stage(
    parser: argparse.ArgumentParser, recipe_type: type[R], argv: list[str] | None
) -> tuple[argparse.Namespace, Resolved[R]]:
    """Arguments and the resolved recipe; runs before torch is imported, so a misspelt key answers at once."""
    args = parser.parse_intermixed_args(argv)
    resolved = load_recipe(recipe_type, args.recipe, args.overrides)
    if getattr(args, "out", "") is None:
        args.out = Path("runs") / resolved.recipe.name
    return args, resolved


def run(main, argv: list[str] | None = None) -> None:
    """Call `main(argv)`, exit with its code.

    A UserError becomes one line on stderr and exit code 2, the loss of other ranks one and 76.
    """
    _write_any_sign()
    try:
        code = main(argv)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was finished stands, start the same command again to go on\n")
        code = EXIT_KEYBOARD
    except Exception as error:
        # For the rank's log; stderr gets the line below.
        logger.debug("ends with", exc_info=True)
        line = _bad_input(error)
        if line:
            code = EXIT_BAD_INPUT
            if env_rank() != 0:
                # The launcher ends this rank with SIGTERM.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(OTHER_RANKS_WAIT_S)
        else:
            line = _interruption(error)
            code = EXIT_INTERRUPTED if line else EXIT_FAULT
        end_progress_bars()
        if line and not os.environ.get("PECO_TRACEBACK"):
            sys.stderr.write(f"error: {printable(line)}\n")
        else:
            traceback.print_exc()
    leave(EXIT_DONE if code is None else code)


def end_progress_bars() -> None:
    """Close every bar that is still shown, whoever opened it: what is written next begins a line."""
    # Looked up, not imported: where nobody has, there is no bar.
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
    for bar in list(bars):
        if getattr(bar, "disable", True):
            continue
        stays = bar.leave
        bar.close()
        # One that does not stay leaves the cursor in the line that it has wiped.
        if not stays:
            bar.fp.write("\n")


def _write_any_sign() -> None:
    """A name that the terminal's encoding has no sign for is shown in escapes, and a record of the log on one line."""
    for stream in (sys.stdout, sys.stderr):
        # Absent in streams that others put in their place.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if _printable_record not in logger.filters:
        logger.addFilter(_printable_record)


def _printable_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def _bad_input(error: Exception) -> str:
    """The line for an error that a user can mend; "" for any other exception."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and (error.filename is not None or error.errno in OF_STORAGE):
        remedy = "; make room and start the same command again" if error.errno in FULL else ""
        return describe_os_error(error) + remedy
    # Looked up, not imported, so that a stage that compiles nothing stays quick.
    compiler = sys.modules.get("torch._dynamo.exc")
    if compiler is not None and isinstance(error, compiler.TorchDynamoException):
        return (
            f"torch.compile failed ({' '.join(str(error).split())[:300]}); set run.compile=none to train "
            "without it (PECO_TRACEBACK=1 shows where)"
        )
    return ""


def _interruption(error: Exception) -> str:
    """The line for an error of hardware or of other ranks, which may not occur in a new start.

    "" for any other exception.
    """
    if isinstance(error, StoreFault):
        return f"rank {env_rank()}: {error}"
    if reason := lost_ranks(error):
        if not sys.modules["torch.distributed"].is_initialized():
            place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
            return (
                f"rank {env_rank()}: the ranks did not find one another at {place} ({reason}); start again; "
                "if another run holds the port, end that one or choose another (MASTER_PORT, deepspeed "
                "--master_port)"
            )
        return f"rank {env_rank()}: lost the other ranks ({reason}); the newest checkpoint stands, start again to go on"
    if isinstance(error, RuntimeError) and _BROKEN_DEVICE.search(str(error)):
        words = " ".join(str(error).split())[:200]
        return (
            f"rank {env_rank()}: its device failed ({words}); the newest checkpoint stands, start again "
            "to go on, on another node if it comes back"
        )
    return ""


def lost_ranks(error: BaseException) -> str:
    """Why the communication between ranks failed, in a few words.

    "" if neither the exception nor one of its causes is such a failure.
    """
    # Looked up, not imported, so that a stage that needs no torch stays quick.
    distributed = sys.modules.get("torch.distributed")
    own_type = getattr(distributed, "DistError", ())
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, own_type) or (
            distributed is not None and isinstance(found, RuntimeError) and _GLOO_WORDS.search(str(found))
        ):
            words = re.sub(r"\[[^\]]*\.(cc|cpp|h):\d+\]", "", str(found)).strip()
            return " ".join(re.split(r"\.\s|\n", words)[0].split())[:200] or type(found).__name__
        found = found.__cause__ or found.__context__
    return ""


def ending(error: BaseException) -> tuple[int, str]:
    """For records: the exit code that an error which leaves a training loop ends in, and why, in one line."""
    if isinstance(error, StoreFault):
        return EXIT_INTERRUPTED, str(error)[:500]
    if lost := lost_ranks(error):
        return EXIT_INTERRUPTED, f"lost the other ranks: {lost}"[:500]
    code = EXIT_BAD_INPUT if isinstance(error, Exception) and _bad_input(error) else EXIT_FAULT
    return code, " ".join(f"{type(error).__name__}: {error}".split())[:500]


def leave(code: int) -> None:
    """End the process with its exit code.

    Where a process group was joined, Python's own exit handlers run and the process ends there: about one rank in
    twenty, done and saved, was seen to abort while C++ destructors tore down communication threads, which turns a
    finished job into a failed one.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    # Otherwise the other ranks are in a collective, and leaving the group would wait for them.
    if code in (EXIT_DONE, EXIT_REQUEUE):
        last_resort = threading.Timer(TEARDOWN_S, os._exit, (code,))
        last_resort.daemon = True
        last_resort.start()
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
