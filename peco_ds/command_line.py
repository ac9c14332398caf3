"""The command line every stage shares, and the one place where an error becomes an exit code."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_KEYBOARD,
    EXIT_REQUEUE,
    UserError,
)
from peco_ds.recipe_files import Resolved, load_recipe

logger = logging.getLogger("peco_ds")

# A rank other than the first waits so long before it speaks: where all ranks found the same fault, the launcher ends it
# first and the user reads one line; where it is this rank's alone, nothing is lost.
OTHER_RANKS_WAIT_S = 6.0
# A rank that is done waits so long for its process group to come down. NCCL's teardown waits for ranks that are gone.
TEARDOWN_S = 60.0

# gloo has no exception type of its own: what it raises is told by its source path or its words.
_GLOO_WORDS = re.compile(
    r"gloo/transport|Connection closed by peer|Connection reset by peer|Timed out waiting \d+ "
    r"?ms|Application timeout caused pair closure|Socket closed"
)

# What CUDA says of a broken GPU, bus or link, in words that a fault of ours does not cause.
_BROKEN_DEVICE = re.compile(
    r"CUDA error: (uncorrectable ECC|unspecified launch failure|uncorrectable NVLink|hardware "
    r"stack error|GPU is lost|.*device.* (is|are) busy or unavailable)"
)


class Parser(argparse.ArgumentParser):
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
        "76 lost the other ranks or hung, start again to continue from the newest checkpoint; 1 is a "
        "fault of this program",
    )
    parser.add_argument(
        "--recipe", default=recipe, help="YAML file, or the name of one in peco_ds/recipes (default: %(default)s)"
    )
    if deepspeed_config is not None:
        parser.add_argument(
            "--deepspeed_config",
            default=str(DS_CONFIGS / deepspeed_config),
            help=f"DeepSpeed JSON (default: ds_configs/{deepspeed_config})",
        )
        parser.add_argument("--out", type=Path, default=None, help="run folder (default: runs/RECIPE_NAME)")
    parser.add_argument("--dry_run", action="store_true", help="resolve and check everything, print it, do nothing")
    # the deepspeed launcher appends it
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="settings over the recipe's; all of them stand, with comments, in peco_ds/config.py",
    )
    return parser


def parse_stage(
    parser: argparse.ArgumentParser, recipe_type: type, argv: list[str] | None
) -> tuple[argparse.Namespace, Resolved]:
    """Arguments and the resolved recipe; runs before torch is imported, so a misspelt key answers at once."""
    args = parser.parse_intermixed_args(argv)
    resolved = load_recipe(recipe_type, args.recipe, args.overrides)
    if getattr(args, "out", "") is None:
        args.out = Path("runs") / resolved.recipe.name
    return args, resolved


def env_rank() -> int:
    """This process's rank, as the launcher (deepspeed, torchrun, srun) wrote it into the environment."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def run(main, argv: list[str] | None = None) -> None:
    """Call `main(argv)`, exit with its code.

    A UserError becomes one line on stderr and exit code 2, the loss of other ranks one and 76.
    """
    try:
        code = main(argv)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the newest checkpoint stands, start the same command again to go on\n")
        code = EXIT_KEYBOARD
    except Exception as error:
        # for the rank's log; stderr has the line below
        logger.debug("ends with", exc_info=True)
        line = _bad_input(error)
        if line:
            code = EXIT_BAD_INPUT
            if env_rank() != 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher ends this rank with it
                time.sleep(OTHER_RANKS_WAIT_S)
        else:
            line = _interruption(error)
            code = EXIT_INTERRUPTED if line else EXIT_FAULT
        if line and not os.environ.get("PECO_TRACEBACK"):
            sys.stderr.write(f"error: {line}\n")
        else:
            traceback.print_exc()
    leave(EXIT_DONE if code is None else code)


def _bad_input(error: Exception) -> str:
    """The line for what a user can mend; "" for any other exception."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    # not imported here: a stage that compiles nothing stays quick
    compiler = sys.modules.get("torch._dynamo.exc")
    if compiler is not None and isinstance(error, compiler.TorchDynamoException):
        return (
            f"torch.compile failed ({' '.join(str(error).split())[:300]}); set run.compile=none to train "
            "without it (PECO_TRACEBACK=1 shows where)"
        )
    return ""


def _interruption(error: Exception) -> str:
    """The line for what no user and no code of ours caused, and what a new start may be rid of.

    "" for any other exception.
    """
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
    """What communication between ranks broke on, in a few words.

    "" if the exception (or one that it came from) tells of no such thing.
    """
    # not imported here: a stage that needs no torch stays quick
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


def leave(code: int) -> None:
    """End the process with its exit code.

    Where a process group was joined, Python's own exit handlers run and the process ends there: about one rank in
    twenty, done and saved, was seen to abort while C++ destructors tore down communication threads, which turns a
    finished job into a failed one.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    # else the other ranks are in a collective, and leaving the group would wait for them
    if code in (EXIT_DONE, EXIT_REQUEUE):
        last_resort = threading.Timer(TEARDOWN_S, os._exit, (code,))
        last_resort.daemon = True
        last_resort.start()
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
