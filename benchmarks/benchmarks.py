"""Stands in for the package where one of its files is started by path, and starts that file as a module.

`python benchmarks/step.py` puts this folder on Python's path, not the root, so that `import benchmarks` finds this
file. Records name such commands.
"""

import os
import sys
from pathlib import Path

if __name__ == "benchmarks":
    here = Path(__file__).resolve().parent
    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    sys.stderr.write(f"{sys.argv[0]}: this is `python -m {module}` now, from the root of the repository\n")
    sys.stderr.flush()
    roots = [str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(roots)
    os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])
