"""Does the chain teach anything? Imagenette, a small ViT, fine-tuned from scratch, after masked pre-training on plain
tokens, and on perceptual tokens.

    python -m benchmarks.small_scale_proof --images imagenette112 --out proof_out

This is `python -m benchmarks.compare benchmarks/compare/small_scale.yaml`; options and results are compare.py's, and
with GPUs it is raised as that is. Sized for two CPU cores (under two hours, nothing else running).
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import compare
from peco_ds.command_line import run

COMPARISON = Path(__file__).resolve().parent / "compare" / "small_scale.yaml"


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    return compare.main([str(COMPARISON), "--out", "proof_out", *words])


if __name__ == "__main__":
    run(main)
