"""Tokenizing started again and again until it is done; of the first starts six are ended after a moment.

    python killed_starts.py JSON    arguments of tokenize_shards; prints the exit codes as JSON

One process imports, then forks the starts, since a start is short and the imports are long.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)


def main() -> None:
    import deepspeed  # noqa: F401
    import torch  # noqa: F401

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


if __name__ == "__main__":
    main()
