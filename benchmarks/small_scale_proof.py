"""Does the chain teach anything? Imagenette, a small ViT, fine-tuned from scratch, after masked pre-training on plain tokens, and on perceptual tokens.

    python benchmarks/small_scale_proof.py --pictures imagenette112 --out proof_out

PICTURES holds train/ and val/ with a folder a class. The plain tokenizer is trained without a judge. The judge of the perceptual one is bootstrapped: the
ViT that was pre-trained on plain tokens with the first seed; no label is seen before fine-tuning. Tokenizers, pre-trainings and fine-tunings have equal
budgets, and every pre-training and fine-tuning runs once a seed. What is finished is not done again, so a stopped run continues.
Sized for two CPU cores (hours); recipes in benchmarks/imagenette. With GPUs, raise it: --ranks 8 --mim schedule.epochs=800 model.width=384 --classifier ...
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STAGES = HERE.parent / "peco_ds"
RECIPES = HERE / "imagenette"
TARGETS = ("plain", "perceptual")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("proof_out"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="1: plain python; more: the deepspeed launcher")
    parser.add_argument("--deepspeed_config", default=str(HERE.parent / "ds_configs" / "zero1.json"))
    for name in ("tokenizer", "mim", "classifier"):
        parser.add_argument(f"--{name}", nargs="*", default=[], metavar="key=value", help=f"settings over benchmarks/imagenette's recipe of the {name}")
    args = parser.parse_args()
    Chain(args).run()


class Chain:
    """The runs in order; each leaves its command and seconds in OUT/log/NAME.json."""

    def __init__(self, args) -> None:
        self.args, self.out = args, args.out.resolve()
        (self.out / "log").mkdir(parents=True, exist_ok=True)
        self.data = [f"data.root={self.out}"]
        self.engine = ["--deepspeed_config", args.deepspeed_config]

    def run(self) -> None:
        args = self.args
        for split in ("train", "val"):
            self.python(f"pack_{split}", "pack_images.py", "--images", args.pictures / split, "--out", self.out / "images" / split, "--samples_per_shard", 500)
        self.tokens("plain", "perceptual.weight=0")
        self.pretraining("plain", 0)
        self.python("judge", "convert_checkpoint.py", self.out / "mim_plain_0", "--to", "timm", "--out", self.out / "judge")
        self.tokens("perceptual", f"perceptual.weights={self.out / 'judge'}")
        for seed in range(args.seeds):
            for target in TARGETS:
                self.pretraining(target, seed)
        for seed in range(args.seeds):
            for start in ("scratch", *TARGETS):
                init = [] if start == "scratch" else [f"init.weights={self.out / f'mim_{start}_{seed}'}"]
                name = f"classifier_{start}_{seed}"
                self.train(name, "finetune.py", "classifier", self.out / name, *init, f"run.seed={seed}", *args.classifier)

    def tokens(self, target: str, *judge: str) -> None:
        """A tokenizer and the codes of all views."""
        self.train(f"tokenizer_{target}", "train_tokenizer.py", "tokenizer", self.out / f"tokenizer_{target}", *judge, *self.args.tokenizer)
        self.ranks(f"tokens_{target}", "tokenize_shards.py", "--recipe", RECIPES / "vit.yaml", *self.data, *self.source(target), *self.args.mim)

    def pretraining(self, target: str, seed: int) -> None:
        name = f"mim_{target}_{seed}"
        self.train(name, "pretrain.py", "vit", self.out / name, *self.source(target), f"run.seed={seed}", *self.args.mim)

    def source(self, target: str) -> list[str]:
        return [f"data.tokens=tokens_{target}", f"data.tokenizer=tokenizer_{target}/tokenizer"]

    def train(self, name: str, stage: str, recipe: str, out: Path, *settings: str) -> None:
        self.ranks(name, stage, "--recipe", RECIPES / f"{recipe}.yaml", *self.engine, "--out", out, *self.data, *settings)

    def ranks(self, name: str, stage: str, *arguments) -> None:
        launcher = [sys.executable] if self.args.ranks == 1 else ["deepspeed", "--num_gpus", str(self.args.ranks)]
        self.command(name, [*launcher, STAGES / stage, *arguments])

    def python(self, name: str, stage: str, *arguments) -> None:
        self.command(name, [sys.executable, STAGES / stage, *arguments])

    def command(self, name: str, command: list) -> None:
        record, command = self.out / "log" / f"{name}.json", [str(word) for word in command]
        if record.exists():
            return
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {name}\n")
        sys.stdout.flush()
        begun = time.perf_counter()
        with open(self.out / "log" / f"{name}.log", "a") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            sys.stderr.write(f"{name} ended with {code}; see {self.out / 'log' / name}.log\n")
            sys.exit(code)
        record.write_text(json.dumps({"command": shlex.join(command), "seconds": round(time.perf_counter() - begun, 1)}) + "\n")


if __name__ == "__main__":
    main()
