"""Console commands: `peco-pretrain` and its siblings, one for each entry point. pyproject.toml declares them.

An entry point is imported when its command is called, so no command pays for another one.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from peco_ds.command_line import run


def _command(entry: str) -> Callable[[], None]:
    def command() -> None:
        run(import_module(f"peco_ds.{entry}").main)

    return command


pack_images = _command("pack_images")
train_tokenizer = _command("train_tokenizer")
import_tokenizer = _command("import_tokenizer")
import_judge = _command("import_judge")
tokenize_shards = _command("tokenize_shards")
pretrain = _command("pretrain")
finetune = _command("finetune")
segment = _command("segment")
linear_probe = _command("linear_probe")
detect = _command("detect")
evaluate = _command("evaluate")
convert = _command("convert_checkpoint")
plan = _command("plan")
status = _command("run_status")
