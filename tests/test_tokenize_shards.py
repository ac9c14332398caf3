"""Tokenizing is killed, and gets done: the set is that of an undisturbed start, byte for byte."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from peco_ds.errors import EXIT_DONE, EXIT_REQUEUE

REPOSITORY = Path(__file__).resolve().parents[1]

# One process imports, then forks the starts, since a start is short and the imports are long.
STARTS = """
import json, os, random, signal, sys, time
import torch, deepspeed
from peco_ds import tokenize_shards
from peco_ds.command_line import run

arguments, drawn = json.loads(sys.argv[1]), random.Random(0)
codes, kills = [], 0
while True:
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        run(tokenize_shards.main, arguments)
    os.setpgid(child, child)  # here as well: whichever of the two comes first
    ending = signal.SIGTERM if kills == 2 else signal.SIGKILL
    if kills < 6:
        time.sleep(drawn.uniform(0.1, 1.5))
        os.killpg(child, ending)
        kills += 1
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    if kills == 6 and codes[-1] != -signal.SIGKILL:
        break
print(json.dumps(codes))
"""


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def test_a_tokenizing_that_is_killed_again_and_again_gives_the_set_of_an_undisturbed_one(small_sets, tmp_path):
    arguments = ["--recipe", "peco_vitb16", *small_sets.overrides, f"data.tokens={tmp_path / 'tokens'}", "data.num_workers=1", "run.micro_batch=3"]
    environment = {**{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STARTS, json.dumps(arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes[-1] == EXIT_DONE and codes[2] in (EXIT_REQUEUE, EXIT_DONE, -15), codes
    assert contents(tmp_path / "tokens") == contents(small_sets.root / "tokens" / "train")
    assert codes.count(-9) >= 3
