"""Which target teaches most? A list of pre-training recipes on the same images, at equal compute, in one table and
one plot.

    python benchmarks/compare.py benchmarks/compare/imagenette.yaml --images imagenette112 --out compare_out

IMAGES holds train/ and val/ with a folder a class. The file names tokenizers and arms (what it may hold: `Comparison`
in this file). Every arm is pre-trained with the same number of FLOPs (forward and backward of its own model, as the
planner counts them; a cheaper encoder makes more steps), then probed and fine-tuned alike, once a seed. Equal is the
compute of the arm's own pre-training; its tokenizer, and the arm that taught
that, come on top: the table's stage minutes show them. All seeds of an arm share tokenizer and codes. The probe's best
block and rate are picked on the images that
are reported, alike for all arms. Masked accuracy is not compared: it means another thing for every vocabulary. What is
finished is not done again, so a stopped comparison continues. Ends in OUT/results.json, results.md and compare.png.
With GPUs, raise it:
    --ranks 8 --tokenizer run.global_batch=512 run.micro_batch=64 tokenizer.vit.target_width=384 --pretrain
    run.global_batch=2048 run.micro_batch=256 schedule.epochs=800 model.width=384 model.heads=6 --classifier
    run.global_batch=1024 run.micro_batch=128 schedule.epochs=100 model.width=384 model.heads=6
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked
from stages import Stages
from step_time import step_costs, training_flops

from peco_ds.command_line import Parser, run
from peco_ds.config import PretrainRecipe
from peco_ds.durations import micro_steps
from peco_ds.errors import EXIT_DONE, UserError
from peco_ds.recipe_files import load_recipe
from peco_ds.schema import sha256_of_json, write_json
from peco_ds.strict_yaml import NOT_YAML, read_yaml

_strict = ConfigDict(extra="forbid")
# in a setting: the timm release of an arm that stands earlier, pre-trained with the first seed
RELEASE = re.compile(r"\{release:(\w+)\}")


# settings that codes depend on, or that making them needs
OF_TOKENS = ("views.", "data.", "model.image_px=", "model.patch_px=", "objective.num_codes=", "run.")


@checked(frozen=True, config=_strict)
class Tokenizer:
    recipe: str = ""  # of train_tokenizer.py
    settings: list[str] = field(default_factory=list)
    # instead of a recipe: a folder that train_tokenizer.py or import_tokenizer.py has written
    release: str = ""


@checked(frozen=True, config=_strict)
class Arm:
    label: str
    # one of `tokenizers`; empty: no pre-training
    tokenizer: str = ""
    settings: list[str] = field(default_factory=list)  # over the shared pre-training recipe


@checked(frozen=True, config=_strict)
class Comparison:
    """A file of `benchmarks/compare`. Recipes: paths relative to it, or names of the package's."""

    pretrain: str
    classifier: str
    probe: str
    tokenizers: dict[str, Tokenizer]
    arms: dict[str, Arm]
    # the arm whose schedule says how many FLOPs every arm gets
    budget_of: str
    probe_settings: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "comparison",
        type=Path,
        metavar="FILE",
        help="YAML: tokenizers and arms; benchmarks/compare/imagenette.yaml is one, class Comparison of "
        "this file says what it may hold",
    )
    parser.add_argument(
        "--images", type=Path, required=True, metavar="FOLDER", help="train/ and val/, each with a folder a class"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("compare_out"),
        metavar="FOLDER",
        help="runs, records and results (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, default=2, help="pre-trainings and fine-tunings of each arm (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="stages at a time, each with its share of the cores; with GPUs: 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--ranks", type=int, default=1, help="1: plain python; more: the deepspeed launcher (default: %(default)s)"
    )
    parser.add_argument("--deepspeed_config", default=str(HERE.parent / "ds_configs" / "zero1.json"))
    for name in ("tokenizer", "pretrain", "classifier"):
        parser.add_argument(
            f"--{name}",
            nargs="*",
            default=[],
            metavar="key=value",
            help=f"settings over every {name} recipe of the file",
        )
    args = parser.parse_args(argv)
    comparison = Comparisons(args, read_comparison(args.comparison))
    comparison.run()
    comparison.write_results()
    return EXIT_DONE


def read_comparison(path: Path) -> Comparison:
    """Raises: UserError if the file is none, or an arm asks for what is not there."""
    try:
        found = TypeAdapter(Comparison).validate_python(read_yaml(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file such as benchmarks/compare/imagenette.yaml") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; correct the file") from None
    except NOT_YAML as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    names = list(found.arms)
    for number, (name, arm) in enumerate(found.arms.items()):
        if arm.tokenizer and arm.tokenizer not in found.tokenizers:
            raise UserError(
                f"{path}: arm {name} has the tokenizer {arm.tokenizer}; known: {', '.join(found.tokenizers)}"
            )
        used = found.tokenizers[arm.tokenizer].settings if arm.tokenizer else []
        late = [
            other
            for setting in [*used, *arm.settings]
            for other in RELEASE.findall(setting)
            if other not in names[:number] or not found.arms[other].tokenizer
        ]
        if late:
            raise UserError(
                f"{path}: arm {name} needs a release of {late[0]}, which is no pre-trained arm that stands before it"
            )
    if not (found.budget_of in found.arms and found.arms[found.budget_of].tokenizer):
        raise UserError(f"{path}: budget_of {found.budget_of}: no pre-trained arm; name one")
    return found


@dataclass(frozen=True)
class Budget:
    """What an arm's pre-training is, in numbers."""

    flops_per_image: int
    steps: int
    images: int


class Comparisons:
    """The runs: arms side by side as far as --jobs allows, each in its own order."""

    def __init__(self, args, comparison: Comparison) -> None:
        self.args, self.comparison, self.out = args, comparison, args.out.resolve()
        threads = max(1, (os.cpu_count() or 1) // args.jobs) if args.jobs > 1 else 0
        self.stages = Stages(
            self.out, ranks=args.ranks, deepspeed_config=args.deepspeed_config, threads=threads, jobs=args.jobs
        )
        self.trained = [name for name, arm in comparison.arms.items() if arm.tokenizer]
        for name in self.trained:
            # refused before hours of stages, not after
            micro_steps(self.resolved(name).run, args.ranks)

    def run(self) -> None:
        for split in ("train", "val"):
            self.stages.python(
                f"pack_{split}",
                "pack_images.py",
                "--images",
                self.args.images / split,
                "--out",
                self.out / "images" / split,
                "--samples_per_shard",
                500,
            )
        with ThreadPoolExecutor(len(self.comparison.arms)) as threads:
            for done in [threads.submit(self.arm, name) for name in self.comparison.arms]:
                done.result()

    def arm(self, name: str) -> None:
        if name in self.trained:
            self.probe(name)
        for seed in range(self.args.seeds):
            init = [f"init.weights={self.pretrained(name, seed)}"] if name in self.trained else []
            run = f"classifier_{name}_{seed}"
            self.stages.train(
                run,
                "finetune.py",
                self.recipe(self.comparison.classifier),
                self.out / run,
                *init,
                f"run.seed={seed}",
                *self.args.classifier,
            )

    def probe(self, name: str) -> None:
        settings = [
            f"data.root={self.out}",
            f"init.weights={self.pretrained(name, 0)}",
            *self.comparison.probe_settings,
        ]
        self.stages.python(
            f"probe_{name}",
            "linear_probe.py",
            "--recipe",
            self.recipe(self.comparison.probe),
            *settings,
            "--out",
            self.out / f"probe_{name}",
        )
        arm = self.comparison.arms[name]
        self.stages.python(
            f"codes_{arm.tokenizer}",
            "evaluate.py",
            self.tokenizer(arm.tokenizer),
            "--images",
            self.out / "images/val",
            "--out",
            self.out / f"codes_{arm.tokenizer}.json",
            "--image_px",
            self.views(name).tokenizer_px,
        )

    # -------------------------------------------------------------------------------- pieces that several arms ask for

    def pretrained(self, name: str, seed: int) -> Path:
        """The run folder of an arm's pre-training."""
        run = f"pretrain_{name}_{seed}"
        tokens = self.tokens(name)
        settings = [
            *self.settings(name),
            f"data.tokens={tokens}",
            "schedule.epochs=null",
            f"schedule.steps={self.budget(name).steps}",
            f"run.seed={seed}",
        ]
        self.stages.train(run, "pretrain.py", self.recipe(self.comparison.pretrain), self.out / run, *settings)
        return self.out / run

    def tokens(self, name: str) -> Path:
        """The codes of an arm; arms that record the same views of one tokenizer share them."""
        arm, views = self.comparison.arms[name], self.views(name)
        self.tokenizer(arm.tokenizer)
        # the command is the same for all arms that share the codes
        settings = [setting for setting in self.settings(name) if setting.startswith(OF_TOKENS)]
        folder = self.out / f"tokens_{arm.tokenizer}_{sha256_of_json(asdict(views))[:8]}"
        self.stages.ranks(
            folder.name,
            "tokenize_shards.py",
            "--recipe",
            self.recipe(self.comparison.pretrain),
            f"data.root={self.out}",
            *settings,
            f"data.tokens={folder}",
        )
        return folder

    def tokenizer(self, name: str) -> Path:
        """A tokenizer's release folder."""
        wanted, release = self.comparison.tokenizers[name], self.tokenizer_folder(name)
        if not wanted.release:
            settings = [self.filled(setting) for setting in (*wanted.settings, *self.args.tokenizer)]
            self.stages.train(
                f"tokenizer_{name}", "train_tokenizer.py", self.recipe(wanted.recipe), release.parent, *settings
            )
        return release

    def release(self, name: str) -> Path:
        run = self.pretrained(name, 0)
        self.stages.python(
            f"release_{name}", "convert_checkpoint.py", run, "--to", "timm", "--out", self.out / f"release_{name}"
        )
        return self.out / f"release_{name}"

    def filled(self, setting: str) -> str:
        return RELEASE.sub(lambda found: str(self.release(found[1])), setting)

    # -------------------------------------------------------------------------------- settings

    def recipe(self, name: str) -> Path | str:
        beside = self.args.comparison.parent / name
        return beside if beside.is_file() else name

    def settings(self, name: str) -> list[str]:
        arm = self.comparison.arms[name]
        return [*arm.settings, *self.args.pretrain, f"data.tokenizer={self.tokenizer_folder(arm.tokenizer)}"]

    def tokenizer_folder(self, name: str) -> Path:
        """Where a tokenizer's release lies, or will."""
        given = self.comparison.tokenizers[name].release
        return Path(given).resolve() if given else self.out / f"tokenizer_{name}" / "tokenizer"

    def resolved(self, name: str) -> PretrainRecipe:
        return load_recipe(PretrainRecipe, self.recipe(self.comparison.pretrain), self.settings(name)).recipe

    def views(self, name: str):
        return self.resolved(name).views

    def budget(self, name: str) -> Budget:
        """As many steps as cost what the reference arm's schedule costs."""
        reference, mine = (self.resolved(arm) for arm in (self.comparison.budget_of, name))
        images = json.loads((self.out / "images/train/manifest.json").read_text())["samples"]
        steps = reference.schedule.steps or int(reference.schedule.epochs * images // reference.run.global_batch)
        flops = training_flops(mine)
        steps = round(steps * reference.run.global_batch * training_flops(reference) / (flops * mine.run.global_batch))
        return Budget(flops, steps, steps * mine.run.global_batch)

    # -------------------------------------------------------------------------------- results

    def write_results(self) -> None:
        """Everything that was measured as JSON, a table, and the plot."""
        costs = step_costs({name: self.resolved(name) for name in self.trained})
        curves = {
            name: [rows(self.out / f"classifier_{name}_{seed}" / "evaluation.jsonl") for seed in range(self.args.seeds)]
            for name in self.comparison.arms
        }
        first = json.loads((self.out / f"classifier_{next(iter(curves))}_0" / "provenance.json").read_text())
        arms = {}
        for name, arm in self.comparison.arms.items():
            arms[name] = {
                "label": arm.label,
                "top1": [curve[-1]["top1"] for curve in curves[name]],
                "curves": curves[name],
            }
            if name in self.trained:
                probe = json.loads((self.out / f"probe_{name}" / "probe.json").read_text())
                codes = json.loads((self.out / f"codes_{arm.tokenizer}.json").read_text())
                arms[name] |= {
                    "budget": vars(self.budget(name)),
                    "step": {
                        "images_per_s": costs[name].images_per_s,
                        "saved_bytes_per_image": costs[name].saved_bytes_per_image,
                    },
                    "probe": probe["layers"],
                    "codes": codes["quality"],
                    "num_codes": codes["settings"]["num_codes"],
                }
        results = {
            "command": shlex.join(sys.argv),
            "commit": first["commit"],
            "versions": first["versions"],
            "arms": arms,
            "runs": self.stages.records(),
        }
        write_json(self.out / "results.json", results)
        text = table(results)
        (self.out / "results.md").write_text(text)
        plot(self.out / "compare.png", arms)
        sys.stdout.write(text)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(results: dict) -> str:
    heads = (
        "arm",
        "fine-tuned top-1, each seed",
        "mean",
        "linear probe, best block",
        "k-NN, best block",
        "steps",
        "GFLOP an image",
        "TFLOP in all",
        "images/s",
        "activations an image",
        "codes used",
    )
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for arm in results["arms"].values():
        cells = [
            arm["label"],
            ", ".join(f"{value:.1f}" for value in arm["top1"]),
            f"{statistics.mean(arm['top1']):.1f}",
        ]
        if "probe" in arm:
            linear = max(row["top1"] for layer in arm["probe"] for row in layer["linear"])
            knn = max(value for layer in arm["probe"] for value in layer["knn"].values())
            budget, step = arm["budget"], arm["step"]
            cells += [
                f"{linear:.1f}",
                f"{knn:.1f}",
                f"{budget['steps']}",
                f"{budget['flops_per_image'] / 1e9:.2f}",
                f"{budget['flops_per_image'] * budget['images'] / 1e12:.1f}",
                f"{step['images_per_s']:.0f}",
                f"{step['saved_bytes_per_image'] / 1e6:.2f} MB",
                f"{arm['codes']['codes_used']} of {arm['num_codes']}",
            ]
        lines.append(f"| {' | '.join(cells + ['-'] * (len(heads) - len(cells)))} |")
    minutes = sum(run["seconds"] for run in results["runs"].values()) / 60
    versions = results["versions"]
    lines += [
        "",
        f"{minutes:.0f} minutes of stages; {versions['device']}, torch {versions['torch']}, deepspeed "
        f"{versions['deepspeed']}, timm {versions['timm']}, commit {results['commit'][:12]}",
    ]
    return "\n".join([*lines, f"`{results['command']}`", ""])


def plot(path: Path, arms: dict[str, dict]) -> None:
    """Left: top-1 over the steps of fine-tuning, a line a seed. Right: the linear probe block by block."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    tuned, probed = figure.subplots(1, 2)
    for number, arm in enumerate(arms.values()):
        colour = f"C{number}" if "probe" in arm else "0.5"
        for seed, curve in enumerate(arm["curves"]):
            tuned.plot(
                [row["step"] for row in curve],
                [row["top1"] for row in curve],
                marker=".",
                color=colour,
                label=arm["label"] if seed == 0 else None,
            )
        if "probe" in arm:
            probed.plot(
                [layer["block"] for layer in arm["probe"]],
                [max(row["top1"] for row in layer["linear"]) for layer in arm["probe"]],
                marker=".",
                color=colour,
                label=arm["label"],
            )
    tuned.set(xlabel="step of fine-tuning", ylabel="top-1, %", title="fine-tuned, a line a seed")
    probed.set(xlabel="features after block", ylabel="top-1, %", title="linear probe of frozen features")
    for axes in (tuned, probed):
        axes.grid(alpha=0.3)
    tuned.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main)
