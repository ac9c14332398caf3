"""Which target teaches most? A list of pre-training recipes on the same images, at equal compute, in one table and
one plot.

    python -m benchmarks.compare benchmarks/compare/imagenette.yaml --images imagenette112 --out compare_out

--images holds train/ and val/ with a folder a class. The file names tokenizers and arms (what it may hold: `Comparison`
in this file). Every arm is pre-trained with the same number of FLOPs (forward and backward of its own model, as the
planner counts them; a cheaper encoder makes more steps), then probed and fine-tuned alike, once a seed. Equal is the
compute of the arm's own pre-training; its tokenizer, and the arm that taught that, come on top: OUT/results.json has
the seconds of every stage. All seeds of an arm share tokenizer and codes. The probe's best block and rate are picked on
the images that are reported, alike for all arms. Masked accuracy means another thing for every vocabulary. What is
finished is not done again, so a stopped comparison continues. Ends in OUT/results.json, results.md and compare.png.
With GPUs, raise it:
    --ranks 8 --tokenizer run.global_batch=512 run.micro_batch=64 tokenizer.vit.target_width=384 --pretrain
    run.global_batch=2048 run.micro_batch=256 schedule.epochs=800 model.width=384 model.heads=6 --classifier
    run.global_batch=1024 run.micro_batch=128 schedule.epochs=100 model.width=384 model.heads=6
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked

from benchmarks.plots import drawing
from benchmarks.probed import best_knn, best_linear, linear_top1
from benchmarks.record import (
    OWN_PICTURE,
    at_least,
    benchmark_parser,
    markdown_table,
    own_record,
    parse,
    publish,
    read_checked,
)
from benchmarks.stages import Stages
from benchmarks.step_time import step_costs, training_flops
from peco_ds.command_line import run
from peco_ds.config import PretrainRecipe
from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.durations import settle_micro_batch
from peco_ds.errors import EXIT_DONE, UserError
from peco_ds.own_files import own_json, refuse_foreign, write_own_json
from peco_ds.recipe_files import load_recipe
from peco_ds.schema import sha256_of_json

RESULTS = own_json("benchmarks.compare", "command", "commit", "versions", "arms", "runs")
_strict = ConfigDict(extra="forbid")
# in a setting: the timm release of an arm that stands earlier, pre-trained with the first seed
RELEASE = re.compile(r"\{release:(\w+)\}")
# settings that codes depend on, or that making them needs
OF_TOKENS = ("views.", "data.", "model.image_px=", "model.patch_px=", "objective.num_codes=", "run.")
HEADS = (
    "arm | fine-tuned top-1, each seed | mean | linear probe, best block | k-NN, best block | steps | GFLOP an image | "
    "TFLOP in all | images/s | activations an image | codes used"
).split(" | ")


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
    parser = benchmark_parser("compare", __doc__)
    file = "YAML: tokenizers and arms; class Comparison of this file says what it may hold"
    parser.add_argument("comparison", type=Path, metavar="FILE", help=file)
    images = "train/ and val/, each with a folder a class"
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help=images)
    out = "runs, their logs and results (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("compare_out"), metavar="FOLDER", help=out)
    seeds = "pre-trainings and fine-tunings of each arm (default: %(default)s)"
    parser.add_argument("--seeds", type=at_least(1), default=2, help=seeds)
    jobs = "stages at a time, each with its share of the cores; with GPUs: 1 (default: %(default)s)"
    parser.add_argument("--jobs", type=at_least(1), default=1, help=jobs)
    ranks = "1: plain python; more: the deepspeed launcher (default: %(default)s)"
    parser.add_argument("--ranks", type=at_least(1), default=1, help=ranks)
    parser.add_argument("--deepspeed_config", default=str(DS_CONFIGS / "zero1.json"))
    for name in ("tokenizer", "pretrain", "classifier"):
        over = f"settings over every {name} recipe of the file"
        parser.add_argument(f"--{name}", nargs="*", default=[], metavar="key=value", help=over)
    args = parse(parser, argv, renamed={"--pictures": "--images", "--mim": "--pretrain"})
    args.record = args.record or args.out / "results.md"
    check_places(args)
    comparison = Comparisons(args, read_comparison(args.comparison))
    comparison.run()
    sys.stdout.write(comparison.write_results())
    return EXIT_DONE


def check_places(args) -> None:
    """Raises: UserError where the results would replace what no earlier call wrote."""
    places = {"results.json": RESULTS, "compare.png": OWN_PICTURE}
    for name, own in places.items():
        refuse_foreign(args.out / name, own)
    refuse_foreign(args.record, own_record(args.command))


def read_comparison(path: Path) -> Comparison:
    """Raises: UserError if the file is none, or an arm asks for what is not there."""
    found = read_checked(Comparison, path, "benchmarks/compare/imagenette.yaml")
    trained: set[str] = set()
    for name, arm in found.arms.items():
        if arm.tokenizer and arm.tokenizer not in found.tokenizers:
            raise UserError(
                f"{path}: arm {name} has the tokenizer {arm.tokenizer}; known: {', '.join(found.tokenizers)}"
            )
        used = found.tokenizers[arm.tokenizer].settings if arm.tokenizer else []
        for other in RELEASE.findall(" ".join([*used, *arm.settings])):
            if other not in trained:
                missing = f"needs a release of {other}, which is no pre-trained arm that stands before it"
                raise UserError(f"{path}: arm {name} {missing}")
        if arm.tokenizer:
            trained.add(name)
    if found.budget_of not in trained:
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
            settle_micro_batch(self.resolved(name).run, args.ranks)

    def run(self) -> None:
        for split in ("train", "val"):
            self.stages.pack(f"pack_{split}", self.args.images / split, self.out / "images" / split)
        with ThreadPoolExecutor(len(self.comparison.arms)) as threads:
            for done in [threads.submit(self.arm, name) for name in self.comparison.arms]:
                done.result()

    def arm(self, name: str) -> None:
        if name in self.trained:
            self.probe(name)
        for seed in range(self.args.seeds):
            init = [f"init.weights={self.pretrained(name, seed)}"] if name in self.trained else []
            out = self.out / f"classifier_{name}_{seed}"
            settings = [*init, f"run.seed={seed}", *self.args.classifier]
            self.stages.train(out.name, "finetune.py", self.recipe(self.comparison.classifier), out, *settings)

    def probe(self, name: str) -> None:
        """The frozen features of an arm, and its codes."""
        out, codes = self.out / f"probe_{name}", f"codes_{self.comparison.arms[name].tokenizer}"
        settings = [f"data.root={self.out}", f"init.weights={self.pretrained(name, 0)}"]
        settings += self.comparison.probe_settings
        self.stages.python(
            out.name, "linear_probe.py", "--recipe", self.recipe(self.comparison.probe), *settings, "--out", out
        )
        measured = [self.tokenizer(self.comparison.arms[name].tokenizer), "--images", self.out / "images/val"]
        measured += ["--out", self.out / f"{codes}.json", "--image_px", self.resolved(name).views.tokenizer_px]
        self.stages.python(codes, "evaluate.py", *measured)

    # -------------------------------------------------------------------------------- pieces that several arms ask for

    def pretrained(self, name: str, seed: int) -> Path:
        """The run folder of an arm's pre-training."""
        out = self.out / f"pretrain_{name}_{seed}"
        settings = [*self.settings(name), f"data.tokens={self.tokens(name)}", "schedule.epochs=null"]
        settings += [f"schedule.steps={self.budget(name).steps}", f"run.seed={seed}"]
        self.stages.train(out.name, "pretrain.py", self.recipe(self.comparison.pretrain), out, *settings)
        return out

    def tokens(self, name: str) -> Path:
        """The codes of an arm; arms that record the same views of one tokenizer share them."""
        arm, views = self.comparison.arms[name], self.resolved(name).views
        self.tokenizer(arm.tokenizer)
        # the command is the same for all arms that share the codes
        settings = [setting for setting in self.settings(name) if setting.startswith(OF_TOKENS)]
        folder = self.out / f"tokens_{arm.tokenizer}_{sha256_of_json(asdict(views))[:8]}"
        settings = [f"data.root={self.out}", *settings, f"data.tokens={folder}"]
        recipe = self.recipe(self.comparison.pretrain)
        self.stages.ranks(folder.name, "tokenize_shards.py", "--recipe", recipe, *settings)
        return folder

    def tokenizer(self, name: str) -> Path:
        """A tokenizer's release folder."""
        wanted, release = self.comparison.tokenizers[name], self.tokenizer_folder(name)
        if not wanted.release:
            settings = [self.filled(setting) for setting in (*wanted.settings, *self.args.tokenizer)]
            recipe = self.recipe(wanted.recipe)
            self.stages.train(f"tokenizer_{name}", "train_tokenizer.py", recipe, release.parent, *settings)
        return release

    def release(self, name: str) -> Path:
        out = self.out / f"release_{name}"
        command = [self.pretrained(name, 0), "--to", "timm", "--out", out]
        self.stages.python(out.name, "convert_checkpoint.py", *command)
        return out

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

    def budget(self, name: str) -> Budget:
        """As many steps as cost what the reference arm's schedule costs."""
        reference, mine = (self.resolved(arm) for arm in (self.comparison.budget_of, name))
        images = json.loads((self.out / "images/train/manifest.json").read_text())["samples"]
        steps = reference.schedule.steps or int(reference.schedule.epochs * images // reference.run.global_batch)
        flops = training_flops(mine)
        steps = round(steps * reference.run.global_batch * training_flops(reference) / (flops * mine.run.global_batch))
        return Budget(flops, steps, steps * mine.run.global_batch)

    # -------------------------------------------------------------------------------- results

    def write_results(self) -> str:
        """Everything that was measured as JSON, a table, and the plot. Returns: the table."""
        costs = step_costs({name: self.resolved(name) for name in self.trained})
        arms = {}
        for name, arm in self.comparison.arms.items():
            curves = [self.rows(f"classifier_{name}_{seed}/evaluation.jsonl") for seed in range(self.args.seeds)]
            arms[name] = {"label": arm.label, "top1": [curve[-1]["top1"] for curve in curves], "curves": curves}
            if name in self.trained:
                codes = self.read(f"codes_{arm.tokenizer}.json")
                arms[name] |= {
                    "budget": vars(self.budget(name)),
                    "step": {
                        "images_per_s": costs[name].images_per_s,
                        "saved_bytes_per_image": costs[name].saved_bytes_per_image,
                    },
                    "pretraining": [
                        self.rows(f"pretrain_{name}_{seed}/metrics.jsonl")[-1] for seed in range(self.args.seeds)
                    ],
                    "probe": self.read(f"probe_{name}/probe.json")["layers"],
                    "codes": codes["quality"],
                    "num_codes": codes["settings"]["num_codes"],
                }
        first = self.read(f"classifier_{next(iter(arms))}_0/provenance.json")
        about = {"command": self.args.command, "commit": first["commit"], "versions": first["versions"]}
        results = {**about, "arms": arms, "runs": self.stages.records()}
        write_own_json(self.out / "results.json", RESULTS, results)
        plot(self.out / "compare.png", arms)
        self.args.record = self.args.record or self.out / "results.md"
        return publish(self.args, f"Comparison {self.args.comparison.stem}", table(results), "deepspeed", "timm")

    def read(self, path: str) -> dict:
        return json.loads((self.out / path).read_text())

    def rows(self, path: str) -> list[dict]:
        return [json.loads(line) for line in (self.out / path).read_text().splitlines()]


def table(results: dict) -> str:
    arms = results["arms"].values()
    minutes = sum(stage["seconds"] for stage in results["runs"].values()) / 60
    about = f"{minutes:.0f} minutes of stages; {results['versions']['device']}, commit {results['commit'][:12]}"
    return f"{markdown_table(HEADS, map(cells, arms))}\n\n{about}"


def cells(arm: dict) -> list[str]:
    top1 = ", ".join(f"{value:.1f}" for value in arm["top1"])
    found = [arm["label"], top1, f"{statistics.mean(arm['top1']):.1f}"]
    if "probe" not in arm:
        return [*found, *["-"] * (len(HEADS) - len(found))]
    budget, step = arm["budget"], arm["step"]
    return [
        *found,
        f"{best_linear(arm['probe']):.1f}",
        f"{best_knn(arm['probe']):.1f}",
        f"{budget['steps']}",
        f"{budget['flops_per_image'] / 1e9:.2f}",
        f"{budget['flops_per_image'] * budget['images'] / 1e12:.1f}",
        f"{step['images_per_s']:.0f}",
        f"{step['saved_bytes_per_image'] / 1e6:.2f} MB",
        f"{arm['codes']['codes_used']} of {arm['num_codes']}",
    ]


def plot(path: Path, arms: dict[str, dict]) -> None:
    """Left: top-1 over the steps of fine-tuning, a line a seed. Right: the linear probe block by block."""
    with drawing(path, 1, 2, size=(11, 4.2)) as drawn:
        tuned, probed = drawn[0]
        for number, arm in enumerate(arms.values()):
            style = dict(marker=".", color=f"C{number}" if "probe" in arm else "0.5")
            for seed, curve in enumerate(arm["curves"]):
                label = arm["label"] if seed == 0 else None
                tuned.plot([row["step"] for row in curve], [row["top1"] for row in curve], label=label, **style)
            if "probe" in arm:
                blocks = [layer["block"] for layer in arm["probe"]]
                probed.plot(blocks, list(map(linear_top1, arm["probe"])), **style)
        tuned.set(xlabel="step of fine-tuning", ylabel="top-1, %", title="fine-tuned, a line a seed")
        probed.set(xlabel="features after block", ylabel="top-1, %", title="linear probe of frozen features")
        for axes in (tuned, probed):
            axes.grid(alpha=0.3)
        tuned.legend(fontsize="small")


if __name__ == "__main__":
    run(main)
