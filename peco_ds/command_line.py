"""The command line every stage shares, and the one place where an error becomes an exit code."""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from peco_ds.config import DS_CONFIGS, Resolved, load_recipe
from peco_ds.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAULT, EXIT_REQUEUE, UserError

# A rank other than the first waits so long before it speaks: where all ranks found the same fault, the launcher ends it
# first and the user reads one line; where it is this rank's alone, nothing is lost.
OTHER_RANKS_WAIT_S = 6.0


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{self.prog}: {message}; see --help")


def stage_parser(description: str, *, recipe: str, deepspeed_config: str | None) -> Parser:
    """Parser of a stage that is driven by a recipe.

    Args:
        recipe: name of the default recipe.  deepspeed_config: default file in ds_configs/, None for a stage without training.
    """
    parser = Parser(
        description=description,
        epilog="exit codes: 0 done, 2 bad input (one line says what), 75 stopped in good order, start again to continue",
    )
    parser.add_argument("--recipe", default=recipe, help="YAML file, or the name of one in peco_ds/recipes (default: %(default)s)")
    if deepspeed_config is not None:
        parser.add_argument("--deepspeed_config", default=str(DS_CONFIGS / deepspeed_config), help=f"DeepSpeed JSON (default: ds_configs/{deepspeed_config})")
        parser.add_argument("--out", type=Path, default=None, help="run folder (default: runs/RECIPE_NAME)")
    parser.add_argument("--dry_run", action="store_true", help="resolve and check everything, print it, do nothing")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings over the recipe's; all of them stand, with comments, in peco_ds/config.py")
    return parser


def parse_stage(parser: argparse.ArgumentParser, recipe_type: type, argv: list[str] | None) -> tuple[argparse.Namespace, Resolved]:
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
    """Call `main(argv)`, exit with its code; a UserError becomes one line on stderr and exit code 2."""
    try:
        code = main(argv)
    except UserError as error:
        if env_rank() != 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher ends this rank with it
            time.sleep(OTHER_RANKS_WAIT_S)
        if os.environ.get("PECO_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        code = EXIT_BAD_INPUT
    except OSError as error:
        if error.filename is None or os.environ.get("PECO_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {error.filename}: {error.strerror}\n")
        code = EXIT_BAD_INPUT
    except Exception:
        traceback.print_exc()
        code = EXIT_FAULT
    leave(EXIT_DONE if code is None else code)


def leave(code: int) -> None:
    """End the process with its exit code.

    Where a process group was joined, Python's own exit handlers run and the process ends there: about one rank in twenty, done and saved, was
    seen to abort while C++ destructors tore down communication threads, which turns a finished job into a failed one.
    """
    distributed = sys.modules.get("torch.distributed")  # not imported here: a stage that needs no torch stays quick
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    if code in (EXIT_DONE, EXIT_REQUEUE):  # else the other ranks are in a collective, and leaving the group would wait for them
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
