"""Does pre-training help to name pixels? A ViT that was pre-trained by the chain on images without labels, against the
same from scratch: equal steps of segmentation, one table, one plot.

    python -m benchmarks.scenes --scenes camvid240.tar --classes benchmarks/scenes/camvid.txt --ignored 11
    --images imagenette112.tar imagewoof112.tar --tokenizer runs/tokenizer/tokenizer --seeds 3 --out scenes_out

--scenes holds images/ and annotations/, each with train/ and test/; --images hold train/. The ViT is pre-trained on all
of their training images, those of --scenes among them, on the codes of --tokenizer (a release of train_tokenizer.py);
no label is read. Then every seed is a segmentation of its own from each start. Arms and budget are said before the
first stage. What is finished is not done again, so a stopped comparison continues. Ends in OUT/results.json,
results.md and results.png. The recipes are benchmarks/scenes/vit.yaml and segmenter.yaml; --pretrain and --segment go
over them.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path

from benchmarks.compare import OF_TOKENS
from benchmarks.paper_inputs import unpack_all
from benchmarks.plots import drawing
from benchmarks.record import OWN_PICTURE, at_least, benchmark_parser, markdown_table, own_record, parse, publish
from benchmarks.stages import Stages
from peco_ds.command_line import run
from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.errors import EXIT_DONE, UserError
from peco_ds.own_files import own_json, refuse_foreign, write_own_json

RESULTS = own_json("benchmarks.scenes", "command", "commit", "versions", "arms", "runs")
RECIPES = Path(__file__).with_name("scenes")
ARMS = {"scratch": "from scratch", "pretrained": "pre-trained on codes, without labels"}
HEADS = "start | mIoU, each seed | mean | aAcc, mean | mAcc, mean".split(" | ")
TRAIN, TEST = "train", "test"


def main(argv: list[str] | None = None) -> int:
    args = read_arguments(argv)
    scenes = Scenes(args)
    sys.stdout.write(scenes.budget())
    scenes.run()
    sys.stdout.write(scenes.write_results())
    return EXIT_DONE


def read_arguments(argv: list[str] | None):
    """Raises: UserError for a tokenizer that is none, or where a result would replace what no earlier call wrote."""
    parser = benchmark_parser("scenes", __doc__)
    add = parser.add_argument
    scenes = "folder or tar with images/{train,test} and annotations/{train,test}"
    add("--scenes", type=Path, required=True, metavar="PATH", help=scenes)
    add("--classes", type=Path, required=True, metavar="FILE", help="its classes, one a line")
    add("--ignored", type=int, nargs="*", default=[], metavar="N", help="numbers of its maps that are no class")
    images = "folders or tars with train/: further images to pre-train on"
    add("--images", type=Path, nargs="*", default=[], metavar="PATH", help=images)
    add("--tokenizer", type=Path, required=True, metavar="FOLDER", help="a release of train_tokenizer.py")
    out = "runs, their logs and results (default: %(default)s)"
    add("--out", type=Path, default=Path("scenes_out"), metavar="FOLDER", help=out)
    add("--seeds", type=at_least(1), default=3, help="segmentations from each start (default: %(default)s)")
    add("--deepspeed_config", default=str(DS_CONFIGS / "zero1.json"))
    for name in ("pretrain", "segment"):
        add(f"--{name}", nargs="*", default=[], metavar="key=value", help=f"settings over the {name} recipe")
    args = parse(parser, argv)
    args.record = args.record or args.out / "results.md"
    refuse_foreign(args.out / "results.json", RESULTS)
    refuse_foreign(args.record.with_suffix(".png"), OWN_PICTURE)
    refuse_foreign(args.record, own_record(args.command))
    if not (args.tokenizer / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {args.tokenizer}: no tokenizer.json there; give a run's tokenizer/")
    for name, paths in {"scenes": [args.scenes], "classes": [args.classes], "images": args.images}.items():
        for path in paths:
            if not path.exists():
                raise UserError(f"--{name} {path}: is not there; correct the path")
    return args


class Scenes:
    """The runs of one comparison, in their order."""

    def __init__(self, args) -> None:
        self.args, self.out = args, args.out.resolve()
        self.stages = Stages(self.out, ranks=1, deepspeed_config=args.deepspeed_config)

    def run(self) -> None:
        # First, so that what is wrong with the maps is found before the hours of pre-training.
        for split in (TRAIN, TEST):
            self.pack_scenes(split)
        self.pretrain()
        for seed in range(self.args.seeds):
            for arm in ARMS:
                self.segment(arm, seed)

    def pretrain(self) -> None:
        """Images without labels, their codes, and the ViT that learns them."""
        name, settings = "pack_unlabelled", ["--labels", "none", "--samples_per_shard", 1000]
        self.stages.python(
            name, "pack_images.py", "--images", self.unlabelled(), "--out", self.out / "unlabelled", *settings
        )
        settings = [f"data.tokenizer={self.args.tokenizer.resolve()}", f"data.images={self.out / 'unlabelled'}"]
        settings.append(f"data.tokens={self.out / 'tokens'}")
        # Codes that stand serve any schedule.
        of_tokens = [setting for setting in self.args.pretrain if setting.startswith(OF_TOKENS)]
        recipe = RECIPES / "vit.yaml"
        words = ["--recipe", recipe, f"data.root={self.out}", *settings, *of_tokens]
        self.stages.python("tokens", "tokenize_shards.py", *words)
        self.stages.train("pretrain", "pretrain.py", recipe, self.out / "pretrain", *settings, *self.args.pretrain)

    def segment(self, arm: str, seed: int) -> None:
        out = self.out / f"{arm}_{seed}"
        settings = [f"data.images={self.out / 'scenes' / TRAIN}", f"data.val_images={self.out / 'scenes' / TEST}"]
        settings += [f"run.seed={seed}", *self.args.segment]
        if arm == "pretrained":
            settings.append(f"init.weights={self.out / 'pretrain'}")
        self.stages.train(out.name, "segment.py", RECIPES / "segmenter.yaml", out, *settings)

    # ---------------------------------------------------------------------------------------------------- images

    def pack_scenes(self, split: str) -> None:
        folder = self.folder(self.args.scenes, f"images/{TRAIN}").parent.parent
        words = ["--images", folder / "images" / split, "--maps", folder / "annotations" / split, "--labels", "scenes"]
        words += ["--classes", self.args.classes, *(["--ignored", *self.args.ignored] if self.args.ignored else [])]
        self.stages.python(f"pack_{split}", "pack_images.py", *words, "--out", self.out / "scenes" / split)

    def unlabelled(self) -> Path:
        """A folder of links to all folders of training images."""
        links = self.out / "sources" / "unlabelled"
        links.mkdir(parents=True, exist_ok=True)
        wanted = {self.args.scenes: f"images/{TRAIN}", **dict.fromkeys(self.args.images, TRAIN)}
        for path, inside in wanted.items():
            link = links / path.stem
            if not link.is_symlink():
                os.symlink(self.folder(path, inside), link)
        return links

    def folder(self, path: Path, inside: str) -> Path:
        """Where `inside` lies in a folder, or in a tar that is unpacked here once.

        Raises: UserError if it lies nowhere.
        """
        root = path.resolve() if path.is_dir() else unpack_all(path, self.out / "sources" / path.stem)
        found = next((place / inside for place in (root, *sorted(root.iterdir())) if (place / inside).is_dir()), None)
        if found is None:
            raise UserError(f"{path}: holds no {inside}/; give a folder or a tar that does")
        return found

    # ---------------------------------------------------------------------------------------------------- results

    def budget(self) -> str:
        """Arms and steps, before the first of them."""
        return "".join(
            [
                f"1 pre-training, then {len(ARMS)} starts x {self.args.seeds} seeds of segmentation, equal steps:\n",
                *(f"- {name}: {label}\n" for name, label in ARMS.items()),
            ]
        )

    def write_results(self) -> str:
        """Everything that was measured as JSON, a table, and the plot. Returns: the table."""
        arms = {arm: [self.rows(f"{arm}_{seed}") for seed in range(self.args.seeds)] for arm in ARMS}
        first = json.loads((self.out / "pretrain" / "provenance.json").read_text())
        results = {"command": self.args.command, "commit": first["commit"], "versions": first["versions"]}
        results |= {"arms": arms, "runs": self.stages.records()}
        write_own_json(self.out / "results.json", RESULTS, results)
        plot(self.args.record.with_suffix(".png"), arms)
        pretraining = [json.loads(line) for line in (self.out / "pretrain" / "metrics.jsonl").read_text().splitlines()]
        body = f"{about(arms, pretraining, results)}\n\n{markdown_table(HEADS, map(cells, arms, arms.values()))}"
        body += f"\n\n![mIoU over the steps]({self.args.record.with_suffix('.png').name})"
        return publish(self.args, "Scenes: from scratch and from pre-training on codes", body, "deepspeed")

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.out / name / "evaluation.jsonl").read_text().splitlines()]


def about(arms: dict[str, list], pretraining: list[dict], results: dict) -> str:
    last, end = arms["scratch"][0][-1], pretraining[-1]
    minutes = sum(stage["seconds"] for stage in results["runs"].values()) / 60
    return (
        f"Segmentation: {last['step']} steps, measured on {last['images']} images that no stage was trained on. "
        f"Pre-training: {end['step']} steps, loss {pretraining[0]['loss']:.2f} to {end['loss']:.2f}; it saw the images "
        "of the scenes that are trained on, and no label. "
        f"{minutes:.0f} minutes of stages; commit {results['commit'][:12]}."
    )


def cells(arm: str, curves: list[list[dict]]) -> list[str]:
    ends = [curve[-1] for curve in curves]
    each = ", ".join(f"{end['miou']:.1f}" for end in ends)
    means = [f"{statistics.mean(end[name] for end in ends):.1f}" for name in ("miou", "aacc", "macc")]
    return [ARMS[arm], each, *means]


def plot(path: Path, arms: dict[str, list]) -> None:
    """mIoU over the steps, a line a seed."""
    with drawing(path, 1, 1, size=(6.5, 4.2)) as drawn:
        axes = drawn[0, 0]
        for arm, curves in arms.items():
            for seed, curve in enumerate(curves):
                label = ARMS[arm] if seed == 0 else None
                values = [row["miou"] for row in curve]
                style = dict(marker=".", color="0.5" if arm == "scratch" else "C0")
                axes.plot([row["step"] for row in curve], values, label=label, **style)
        axes.set(xlabel="step of segmentation", ylabel="mIoU on held-out images, %")
        axes.grid(alpha=0.3)
        axes.legend()


if __name__ == "__main__":
    run(main)
