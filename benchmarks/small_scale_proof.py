"""Does the chain teach anything? Imagenette, a small ViT, fine-tuned from scratch, after masked pre-training on plain
tokens, and on perceptual tokens.

    python benchmarks/small_scale_proof.py --images imagenette112 --out proof_out

IMAGES holds train/ and val/ with a folder a class. The plain tokenizer is trained without a judge. The judge of the
perceptual one is bootstrapped: the ViT that was pre-trained on plain tokens with the first seed; no label is seen
before fine-tuning. Tokenizers, pre-trainings and fine-tunings have equal budgets, and every pre-training and
fine-tuning runs once a seed. What is finished is not done again, so a stopped run continues. Ends in OUT/results.json,
results.md and curves.png. Sized for two CPU cores (under two hours, nothing else running); recipes in
benchmarks/imagenette.
With GPUs, raise it: --ranks 8 --mim schedule.epochs=800 model.width=384 model.heads=6 --classifier schedule.epochs=100
model.width=384 model.heads=6
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path

from stages import Stages

HERE = Path(__file__).resolve().parent
RECIPES = HERE / "imagenette"
TARGETS = ("plain", "perceptual")
STARTS = {"scratch": "scratch", "plain": "MIM, plain tokens", "perceptual": "MIM, perceptual tokens"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("proof_out"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="1: plain python; more: the deepspeed launcher")
    parser.add_argument("--deepspeed_config", default=str(HERE.parent / "ds_configs" / "zero1.json"))
    for name in ("tokenizer", "mim", "classifier"):
        parser.add_argument(
            f"--{name}",
            nargs="*",
            default=[],
            metavar="key=value",
            help=f"settings over benchmarks/imagenette's recipe of the {name}",
        )
    args = parser.parse_args()
    chain = Chain(args)
    chain.run()
    write_results(chain, args.seeds)


class Chain:
    """The runs in order."""

    def __init__(self, args) -> None:
        self.args, self.out = args, args.out.resolve()
        self.stages = Stages(self.out, ranks=args.ranks, deepspeed_config=args.deepspeed_config)
        self.data = [f"data.root={self.out}"]

    def run(self) -> None:
        args = self.args
        for split in ("train", "val"):
            self.stages.python(
                f"pack_{split}",
                "pack_images.py",
                "--images",
                args.images / split,
                "--out",
                self.out / "images" / split,
                "--samples_per_shard",
                500,
            )
        self.tokens("plain", "perceptual.weight=0")
        self.pretraining("plain", 0)
        self.stages.python(
            "judge", "convert_checkpoint.py", self.out / "mim_plain_0", "--to", "timm", "--out", self.out / "judge"
        )
        self.tokens("perceptual", f"perceptual.weights={self.out / 'judge'}")
        for seed in range(args.seeds):
            for target in TARGETS:
                self.pretraining(target, seed)
        for target in TARGETS:
            measured = [
                self.out / f"tokenizer_{target}",
                "--images",
                self.out / "images/val",
                "--train_images",
                self.out / "images/train",
            ]
            self.stages.python(f"codes_{target}", "evaluate.py", *measured, "--out", self.out / f"codes_{target}.json")
            probe = [
                "--recipe",
                "probe_vitb16",
                *self.data,
                f"init.weights={self.out / f'mim_{target}_0'}",
                "probe.image_px=64",
                "probe.crop=1.0",
                "probe.precision=fp32",
            ]
            self.stages.python(f"probe_{target}", "linear_probe.py", *probe, "--out", self.out / f"probe_{target}")
        for seed in range(args.seeds):
            for start in STARTS:
                init = [] if start == "scratch" else [f"init.weights={self.out / f'mim_{start}_{seed}'}"]
                name = f"classifier_{start}_{seed}"
                self.stages.train(
                    name,
                    "finetune.py",
                    RECIPES / "classifier.yaml",
                    self.out / name,
                    *init,
                    f"run.seed={seed}",
                    *args.classifier,
                )

    def tokens(self, target: str, *judge: str) -> None:
        """A tokenizer and the codes of all views."""
        self.stages.train(
            f"tokenizer_{target}",
            "train_tokenizer.py",
            RECIPES / "tokenizer.yaml",
            self.out / f"tokenizer_{target}",
            *judge,
            *self.args.tokenizer,
        )
        self.stages.ranks(
            f"tokens_{target}",
            "tokenize_shards.py",
            "--recipe",
            RECIPES / "vit.yaml",
            *self.data,
            *self.source(target),
            *self.args.mim,
        )

    def pretraining(self, target: str, seed: int) -> None:
        name = f"mim_{target}_{seed}"
        self.stages.train(
            name,
            "pretrain.py",
            RECIPES / "vit.yaml",
            self.out / name,
            *self.source(target),
            f"run.seed={seed}",
            *self.args.mim,
        )

    def source(self, target: str) -> list[str]:
        return [f"data.tokens=tokens_{target}", f"data.tokenizer=tokenizer_{target}/tokenizer"]


# --------------------------------------------------------------------------------------------- results


def write_results(chain: Chain, seeds: int) -> None:
    """Everything that was measured as JSON, a table, and the curves."""
    out = chain.out

    def read(path: str):
        return json.loads((out / path).read_text())

    def rows(run: str, name: str) -> list[dict]:
        return [json.loads(line) for line in (out / run / name).read_text().splitlines()]

    curves = {
        start: [rows(f"classifier_{start}_{seed}", "evaluation.jsonl") for seed in range(seeds)] for start in STARTS
    }
    provenance = read("classifier_scratch_0/provenance.json")
    results = {
        "command": shlex.join(sys.argv),
        "commit": provenance["commit"],
        "versions": provenance["versions"],
        "top1": {start: [curve[-1]["top1"] for curve in of_seeds] for start, of_seeds in curves.items()},
        "curves": curves,
        "pretraining": {
            f"{target}_{seed}": rows(f"mim_{target}_{seed}", "metrics.jsonl")[-1]
            for target in TARGETS
            for seed in range(seeds)
        },
        "tokenizers": {target: read(f"codes_{target}.json") for target in TARGETS},
        "probes": {target: read(f"probe_{target}/probe.json") for target in TARGETS},
        "runs": chain.stages.records(),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (out / "results.md").write_text(text)
    plot(out / "curves.png", curves)
    sys.stdout.write(text)


def table(results: dict) -> str:
    lines = ["| start | top-1, each seed | mean |", "|---|---|---|"]
    for start, label in STARTS.items():
        top1 = results["top1"][start]
        lines.append(f"| {label} | {', '.join(f'{value:.1f}' for value in top1)} | {statistics.mean(top1):.1f} |")
    heads = (
        "PSNR | SSIM | codes used | perplexity | bag of codes: linear / k-NN | mean code vector: "
        "linear / k-NN | MIM loss | masked accuracy | best layer's linear / k-NN probe"
    )
    lines += ["", f"| tokens | {heads} |", "|" + "---|" * 10]
    for target in TARGETS:
        codes, layers, last = (
            results["tokenizers"][target],
            results["probes"][target]["layers"],
            results["pretraining"][f"{target}_0"],
        )
        quality, probes = codes["quality"], codes["code_probes"]["images_as"]
        of_codes = " | ".join(
            f"{probes[form]['best_linear']:.1f} / {probes[form]['best_knn']:.1f}"
            for form in ("bag of codes", "mean code vector")
        )
        linear = max(row["top1"] for layer in layers for row in layer["linear"])
        knn = max(value for layer in layers for value in layer["knn"].values())
        quality_cells = (
            f"{quality['psnr']:.2f} | {quality['ssim']:.3f} | {quality['codes_used']} | {quality['perplexity']:.0f}"
        )
        lines.append(
            f"| {target} | {quality_cells} | {of_codes} | {last['loss']:.3f} | "
            f"{100 * last['accuracy']:.2f}% | {linear:.1f} / {knn:.1f} |"
        )
    seconds = sum(run["seconds"] for run in results["runs"].values())
    versions = results["versions"]
    lines += [
        "",
        f"{seconds / 60:.0f} minutes in all; {versions['device']}, torch {versions['torch']}, "
        f"deepspeed {versions['deepspeed']}, timm {versions['timm']}, commit {results['commit'][:12]}",
        f"`{results['command']}`",
        "",
    ]
    return "\n".join(lines)


def plot(path: Path, curves: dict[str, list[list[dict]]]) -> None:
    """Top-1 on the validation images over the steps of fine-tuning: a line a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (start, of_seeds), colour in zip(curves.items(), ("0.5", "tab:blue", "tab:red")):
        for seed, curve in enumerate(of_seeds):
            axes.plot(
                [row["step"] for row in curve],
                [row["top1"] for row in curve],
                marker=".",
                color=colour,
                label=STARTS[start] if seed == 0 else None,
            )
    axes.set(
        xlabel="step of fine-tuning",
        ylabel="top-1 on Imagenette's validation set, %",
        title="small ViT at 64 px, one line a seed",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
