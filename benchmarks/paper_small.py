"""A table of PeCo's paper at small scale: its arms with their recipes scaled down, on the images at hand.

Everything that will be run is known as a list of steps beforehand. A seed is the whole way: tokenizer, codes, and with
--pretrain pre-training, probe and fine-tuning.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from benchmarks.paper_inputs import (
    SPLITS,
    GivenJudge,
    LabelledSet,
    as_list,
    as_name,
    count_images,
    folder_of,
    given_judge,
    quarters,
    unpack,
)
from benchmarks.paper_tables import Paper, Row, Table, published
from benchmarks.plots import drawing
from benchmarks.probed import best_linear
from benchmarks.record import OWN_PICTURE, markdown_table, own_record, publish
from benchmarks.stages import Stages
from peco_ds.config import FinetuneRecipe, PretrainRecipe, TokenizerRecipe
from peco_ds.errors import UserError
from peco_ds.own_files import own_json, refuse_foreign, write_own_json
from peco_ds.planner.stages import Stage, stage_of
from peco_ds.recipe_files import load_recipe
from peco_ds.schema import sha256_of_json

RESULTS = own_json("benchmarks.reproduce", "command", "commit", "versions", "plan", "arms", "runs")
# arms of the data that the bootstrapped judge comes from
JUDGE_TOKENIZER, JUDGE_ARM = "plain", "plain_300"
BOOTSTRAPPED = "bootstrapped"
# sweeps change this tokenizer
SWEPT = "peco"
# how settings of a pre-training begin that its codes do not depend on
NOT_OF_TOKENS = ("optim.", "schedule.", "checkpoint.")
NOT_DRAWN = ("codes used", "on the images themselves")
PANELS_A_ROW = 4
BAG, MEAN = "bag of codes", "mean code vector"
CAUTION = (
    "Small scale: it says whether the arms differ here, on these images and this budget, and nothing of ImageNet. "
    "Published figures are those of full size."
)


@dataclass(frozen=True)
class SmallTokenizer:
    """A tokenizer of this run; `name` names its run folders."""

    name: str
    recipe: str
    settings: tuple[str, ...]
    judge: GivenJudge | None = None
    release: str = ""  # a folder that is there


@dataclass(frozen=True)
class SmallArm:
    name: str
    label: str
    published: tuple[str, ...]
    # None: no pre-training
    tokenizer: SmallTokenizer | None
    recipe: str = ""  # of the pre-training
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SmallStep:
    """A command of the plan.

    Args:
        how: the method of `Stages` that starts it: train, ranks or python; unpack, pack: of this module.
        needs: names of steps that come first.
        flops: of its training, by the planner; 0: of no training.
    """

    name: str
    how: str
    words: tuple = ()
    needs: tuple[str, ...] = ()
    flops: float = 0.0

    @property
    def kind(self) -> str:
        return self.name.split("_")[0]


# ---------------------------------------------------------------------------------------------------- plan


def packing(split: str, images: LabelledSet | None = None) -> str:
    """Name of the step that packs a split."""
    return f"pack_{split}{images.ending if images else ''}"


class SmallTable:
    """Arms and steps of a table.

    Args:
        args: the command line of `reproduce`.
    Raises: UserError for what makes no table.
    """

    def __init__(self, args, paper: Paper, number: int) -> None:
        self.args, self.paper, self.number = args, paper, number
        self.table: Table = paper.tables[number]
        self.out = args.out.resolve()
        if self.table.full_only or not self.table.measures:
            reason = self.table.full_only or self.table.note.partition(". ")[0].rstrip(".")
            raise UserError(f"--table {number}: not at small scale ({reason}); --list names the tables that are")
        # what was left out, and why
        self.left_out: list[str] = []
        self.images = count_images(args.images)
        # their codes are probed too
        self.further = [LabelledSet(path, f"_{as_name(path.stem)}") for path in args.also]
        self.further_images = [count_images(other.images, "--also") for other in self.further]
        self.judges = self._judges()
        self.arms = self._arms()

    # ------------------------------------------------------------------------------------------- judges

    def _judges(self) -> list[GivenJudge]:
        judges = [given_judge(*words, out=self.out) for words in self.args.judge]
        if self.args.bootstrap_judge:
            depth = self._pretrain_recipe(self._arm(JUDGE_ARM, None)).model.depth
            settings = (
                f"perceptual.weights={self.out / 'release_judge'}",
                f"perceptual.blocks={as_list(quarters(depth))}",
            )
            label = "a ViT pre-trained here on codes of the tokenizer without a judge"
            judges.append(GivenJudge(BOOTSTRAPPED, label, settings))
        if len(judges) > 1 and not self.table.given_judges:
            raise UserError(f"--judge: {len(judges)} judges; table {self.number} has one, table 5 compares several")
        return judges

    def _judge_of(self, name: str) -> GivenJudge | None:
        """The judge of a tokenizer of the data."""
        if not self.paper.tokenizers[name].judge:
            return None
        if not self.judges:
            raise UserError(
                f"--table {self.number}: needs a judge; give --judge FILE_OR_FOLDER (MoCo v3, or any timm network), or "
                "--bootstrap_judge for one that is trained here in minutes"
            )
        return self.judges[0]

    # --------------------------------------------------------------------------------------------- arms

    def _arms(self) -> dict[str, SmallArm]:
        rows = self.table.arms()
        self._check_names(rows)
        chosen = [name for name in rows if not self.args.arms or name in self.args.arms]
        found: dict[str, SmallArm] = {}
        for name in chosen:
            row, tokenizer = rows[name], self.paper.tokenizers[self.paper.arms[name].tokenizer]
            if tokenizer.release and not self.args.dalle:
                self.left_out.append(f"{row.row}: no --dalle FOLDER (import_tokenizer.py makes it)")
            elif self.table.given_judges and tokenizer.judge:
                self.left_out.append(f"{row.row}: the judges given take its place")
            else:
                found[name] = self._arm(name, row)
        if self.table.given_judges:
            # every judge makes an arm of its own, whatever the rows' are
            for judge in self.judges or [self._judge_of(SWEPT)]:
                arm = self._arm(f"{SWEPT}_300", None, judge)
                found[f"judge_{judge.name}"] = replace(arm, name=f"judge_{judge.name}", label=judge.name)
        found |= self._swept(found)
        if not self.args.pretrain:
            found = self._one_a_tokenizer(found)
        if self.args.pretrain:
            found = {"scratch": SmallArm("scratch", "from scratch", (), None)} | found
        for arm in found.values():
            # refused before hours of stages, not after
            self._check(arm)
        return found

    def _check_names(self, rows: dict[str, Row]) -> None:
        for name in self.args.arms or ():
            if name not in rows:
                raise UserError(f"--arms {name}: not in table {self.number}, which has {', '.join(rows)}")

    def _arm(self, name: str, row: Row | None, judge: GivenJudge | None = None) -> SmallArm:
        wanted = self.paper.arms[name]
        settings = [*self.paper.pretrain_settings(name), *self.paper.small["pretrain"]]
        settings += [*self.paper.tokenizers[wanted.tokenizer].small_pretrain, *wanted.small]
        return SmallArm(
            name,
            row.row if row else "",
            tuple(published(row)) if row else (),
            self._tokenizer(wanted.tokenizer, judge),
            wanted.pretrain,
            (*settings, *self._asked("pretrain")),
        )

    def _tokenizer(self, name: str, judge: GivenJudge | None = None) -> SmallTokenizer:
        wanted = self.paper.tokenizers[name]
        if wanted.release:
            return SmallTokenizer(name, "", (), release=str(Path(self.args.dalle or wanted.release).resolve()))
        judge = judge or self._judge_of(name)
        settings = [*(judge.settings if judge else ()), *wanted.settings, *self.paper.small["tokenizer"], *wanted.small]
        settings += self._asked("tokenizer")
        several = judge is not None and self.table.given_judges
        return SmallTokenizer(f"{name}_{judge.name}" if several else name, wanted.recipe, tuple(settings), judge)

    def _swept(self, arms: dict[str, SmallArm]) -> dict[str, SmallArm]:
        """Further arms: the perceptual tokenizer, of the first judge, with every pair of --normalize and --weight."""
        found = {}
        if not self.args.normalize and not self.args.weight:
            return found
        bases = [arm for arm in arms.values() if arm.tokenizer and arm.tokenizer.name.split("_")[0] == SWEPT]
        if not bases:
            raise UserError(
                f"--normalize, --weight: change the arm {SWEPT}_300, which is not among the arms of this call"
            )
        base = bases[0]
        own = self._tokenizer_recipe(base.tokenizer).perceptual
        for normalize in self.args.normalize or [own.normalize]:
            for weight in self.args.weight or [own.weight]:
                if (normalize, weight) == (own.normalize, own.weight):
                    continue
                ends = f"{normalize}_{weight:g}".replace(".", "_")
                changed = f"perceptual.normalize={normalize}", f"perceptual.weight={weight:g}"
                tokenizer = replace(
                    base.tokenizer, name=f"{base.tokenizer.name}_{ends}", settings=(*base.tokenizer.settings, *changed)
                )
                name, label = f"{base.name}_{ends}", f"{base.label}, normalize {normalize}, weight {weight:g}"
                found[name] = replace(base, name=name, label=label, published=(), tokenizer=tokenizer)
        return found

    def _one_a_tokenizer(self, arms: dict[str, SmallArm]) -> dict[str, SmallArm]:
        """Without pre-training, arms of the same tokenizer are one."""
        seen: dict[str, SmallArm] = {}
        for arm in arms.values():
            first = seen.setdefault(arm.tokenizer.name, arm)
            if first is not arm:
                self.left_out.append(f"{arm.label}: has the tokenizer of {first.label!r}; --pretrain tells them apart")
        if len(arms) > 1 and len(seen) == 1:
            raise UserError(
                f"--table {self.number}: compares pre-trainings on the codes of one tokenizer; add --pretrain"
            )
        return {arm.name: arm for arm in seen.values()}

    def _asked(self, stage: str) -> list[str]:
        return self.args.set.get(stage, [])

    # ------------------------------------------------------------------------------------------ recipes

    def _check(self, arm: SmallArm) -> None:
        if arm.tokenizer is None:
            return
        if not arm.tokenizer.release:
            self._tokenizer_recipe(arm.tokenizer)
        self._pretrain_recipe(arm)

    def _tokenizer_recipe(self, tokenizer: SmallTokenizer) -> TokenizerRecipe:
        return load_recipe(TokenizerRecipe, tokenizer.recipe, list(tokenizer.settings)).recipe

    def _pretrain_recipe(self, arm: SmallArm) -> PretrainRecipe:
        return load_recipe(PretrainRecipe, arm.recipe, list(arm.settings)).recipe

    @cached_property
    def _finetune(self) -> tuple[str, list[str]]:
        """Recipe of the fine-tunings, and its settings."""
        recipe = next(self.paper.arms[name].finetune[0] for name in self.table.arms())
        return recipe, [*self.paper.small["finetune"], *self._asked("finetune")]

    def tokenizer_stage(self, tokenizer: SmallTokenizer) -> Stage:
        """As the planner sees it, without the judge, whose size it does not know."""
        recipe = self._tokenizer_recipe(tokenizer)
        return stage_of(
            replace(recipe, perceptual=replace(recipe.perceptual, weight=0.0)), num_samples=self.images["train"]
        )

    def pretrain_stage(self, arm: SmallArm) -> Stage:
        return stage_of(self._pretrain_recipe(arm), num_samples=self.images["train"])

    def finetune_stage(self) -> Stage:
        recipe, settings = self._finetune
        return stage_of(load_recipe(FinetuneRecipe, recipe, settings).recipe, num_samples=self.images["train"])

    # -------------------------------------------------------------------------------------------- steps

    def steps(self) -> list[SmallStep]:
        """Everything that is run, in an order in which it may be."""
        found: dict[str, SmallStep] = {}

        def add(step: SmallStep) -> str:
            found.setdefault(step.name, step)
            return step.name

        for images in (LabelledSet(self.args.images), *self.further):
            unpacked = ()
            if images.images.is_file():
                unpacked = (add(SmallStep(f"unpack{images.ending}", "unpack", (images,))),)
            for split in SPLITS:
                add(SmallStep(packing(split, images), "pack", (images, split), unpacked))
        packed = tuple(packing(split) for split in SPLITS)
        # all arms of a seed before the next seed: what is there early says something of all arms
        for seed in range(self.args.seeds):
            for arm in self.arms.values():
                self._add_arm(add, arm, seed, packed)
        return list(found.values())

    def _add_arm(self, add: Callable[[SmallStep], str], arm: SmallArm, seed: int, packed: tuple[str, ...]) -> None:
        pretrained: tuple[str, ...] = packed
        if arm.tokenizer is not None:
            made = self._add_tokenizer(add, arm.tokenizer, seed, packed)
            release, px = self.release(arm.tokenizer, seed), self._pretrain_recipe(arm).views.tokenizer_px
            words = [release, "--images", self.out / "images/val", "--train_images", self.out / "images/train"]
            words += ["--image_px", px, "--out", self.out / f"codes_{arm.tokenizer.name}_{seed}.json"]
            if self.args.classifier:
                words += ["--classifier", self.args.classifier]
                words += ["--checkpoint", self.args.checkpoint.resolve()] if self.args.checkpoint else []
                some = self.args.classifier_images
                words += ["--classifier_images", some] if some else []
            words += ["--lpips", self.args.lpips.resolve()] if self.args.lpips else []
            add(SmallStep(f"codes_{arm.tokenizer.name}_{seed}", "python", ("evaluate.py", *words), made))
            for other in self.further:
                name, folder = f"codes_{arm.tokenizer.name}_{seed}{other.ending}", self.out / f"images{other.ending}"
                words = [release, "--images", folder / "val", "--train_images", folder / "train", "--image_px", px]
                words += ["--out", self.out / f"{name}.json"]
                needs = *made, *(packing(split, other) for split in SPLITS)
                add(SmallStep(name, "python", ("evaluate.py", *words), needs))
            if self.args.pretrain:
                pretrained = (self._add_pretraining(add, arm, seed, made),)
                probe = self.out / f"probe_{arm.name}_{seed}"
                words = ["--recipe", "probe_vitb16", f"data.root={self.out}"]
                words += [f"init.weights={self.out / pretrained[0]}", *self.paper.small["probe"], *self._asked("probe")]
                words += ["--out", probe]
                add(SmallStep(probe.name, "python", ("linear_probe.py", *words), pretrained))
        if self.args.pretrain:
            recipe, settings = self._finetune
            init = [f"init.weights={self.out / pretrained[0]}"] if arm.tokenizer else []
            out, stage = self.out / f"finetune_{arm.name}_{seed}", self.finetune_stage()
            words = ["finetune.py", recipe, out, *init, *settings, f"run.seed={seed}"]
            add(SmallStep(out.name, "train", tuple(words), pretrained, stage.model_flops * stage.images))

    def _add_tokenizer(self, add, tokenizer: SmallTokenizer, seed: int, packed: tuple[str, ...]) -> tuple[str, ...]:
        if tokenizer.release:
            return packed
        needs = packed
        if tokenizer.judge and tokenizer.judge.name == BOOTSTRAPPED:
            needs = (*packed, self._add_judge(add, packed))
        stage, out = self.tokenizer_stage(tokenizer), self.out / f"tokenizer_{tokenizer.name}_{seed}"
        words = ("train_tokenizer.py", tokenizer.recipe, out, *tokenizer.settings, f"run.seed={seed}")
        return (add(SmallStep(out.name, "train", words, needs, stage.model_flops * stage.images)),)

    def _add_judge(self, add, packed: tuple[str, ...]) -> str:
        """The ViT that is pre-trained on the codes of the tokenizer without a judge, first seed."""
        arm = self._arm(JUDGE_ARM, None)
        trained = self._add_pretraining(add, arm, 0, self._add_tokenizer(add, arm.tokenizer, 0, packed))
        words = ("convert_checkpoint.py", self.out / trained, "--to", "timm", "--out", self.out / "release_judge")
        return add(SmallStep("release_judge", "python", words, (trained,)))

    def _add_pretraining(self, add, arm: SmallArm, seed: int, made: tuple[str, ...]) -> str:
        release = f"data.tokenizer={self.release(arm.tokenizer, seed)}"
        of_tokens = [setting for setting in arm.settings if not setting.startswith(NOT_OF_TOKENS)]
        # arms with the same codes share them
        views = sha256_of_json([of_tokens, asdict(self._pretrain_recipe(arm).views)])[:8]
        tokens = self.out / f"tokens_{arm.tokenizer.name}_{seed}_{views}"
        words = ["--recipe", arm.recipe, f"data.root={self.out}", *of_tokens, release, f"data.tokens={tokens}"]
        add(SmallStep(tokens.name, "ranks", ("tokenize_shards.py", *words), made))
        stage, out = self.pretrain_stage(arm), self.out / f"pretrain_{arm.name}_{seed}"
        words = ["pretrain.py", arm.recipe, out, *arm.settings, release, f"data.tokens={tokens}", f"run.seed={seed}"]
        return add(SmallStep(out.name, "train", tuple(words), (tokens.name,), stage.model_flops * stage.images))

    def release(self, tokenizer: SmallTokenizer, seed: int) -> Path:
        """Where a tokenizer's release lies, or will."""
        if tokenizer.release:
            return Path(tokenizer.release)
        return self.out / f"tokenizer_{tokenizer.name}_{seed}" / "tokenizer"

    # --------------------------------------------------------------------------------------------- plan

    def plan(self) -> str:
        """Arms and budget, before anything is run."""
        seeds = f"{self.args.seeds} seed{'s' if self.args.seeds > 1 else ''}"
        lines = [f"Table {self.number}: {self.table.title}; {seeds}, {len(self.steps())} steps"]
        lines.append(f"Images: {self.images['train']:,} to train on, {self.images['val']:,} to measure on")
        for other, count in zip(self.further, self.further_images):
            lines.append(f"Codes probed on {other.title} too: {count['train']:,} and {count['val']:,} images")
        if self.args.classifier_images:
            lines.append(f"The classifier reads {self.args.classifier_images:,} of the images to measure on")
        for judge in self.judges:
            lines.append(f"Judge {judge.name}: {judge.label}")
        for arm in self.arms.values():
            lines.append(f"{arm.name}: {arm.label}; {self.budget(arm)}")
        if any(tokenizer.judge for tokenizer in self._tokenizers()):
            lines.append("FLOP are the planner's; a judge's passes come on top, as many in every arm that has one.")
        lines += [f"Left out: {why}" for why in self.left_out]
        return "\n".join(f"- {line}" if number else line for number, line in enumerate(lines)) + "\n"

    def _tokenizers(self) -> list[SmallTokenizer]:
        return [arm.tokenizer for arm in self.arms.values() if arm.tokenizer]

    def budget(self, arm: SmallArm) -> str:
        """Of one seed, in words."""
        parts = []
        if arm.tokenizer and arm.tokenizer.release:
            parts.append(f"tokenizer {arm.tokenizer.release}")
        elif arm.tokenizer:
            parts.append(_budget("tokenizer", self.tokenizer_stage(arm.tokenizer)))
        if arm.tokenizer and self.args.pretrain:
            parts.append(_budget("pre-training", self.pretrain_stage(arm)))
        if self.args.pretrain:
            parts.append(_budget("fine-tuning", self.finetune_stage()))
        return ", ".join(parts)

    # ---------------------------------------------------------------------------------------------- run

    def run(self) -> str:
        """Returns: the record.

        Raises: UserError, before anything is run, where the results would replace what no earlier call wrote.
        """
        for place, own in zip(self._places(), (RESULTS, own_record(self.args.command), OWN_PICTURE)):
            refuse_foreign(place, own)
        steps = self.steps()
        progress = Progress(steps, self.out / "log", self.args.jobs)
        threads = max(1, (os.cpu_count() or 1) // self.args.jobs) if self.args.jobs > 1 else 0
        stages = Stages(
            self.out,
            ranks=self.args.ranks,
            deepspeed_config=self.args.deepspeed_config,
            threads=threads,
            jobs=self.args.jobs,
            announce=progress.line,
        )

        def do(step: SmallStep) -> None:
            if step.how == "unpack":
                (images,) = step.words
                unpack(images.images, self.out / f"raw{images.ending}")
            elif step.how == "pack":
                images, split = step.words
                raw = images.images if images.images.is_dir() else folder_of(self.out / f"raw{images.ending}")
                stages.pack(step.name, raw / split, self.out / f"images{images.ending}" / split)
            elif step.how == "train":
                stage, recipe, out, *settings = step.words
                stages.train(step.name, stage, recipe, out, *settings)
            else:
                getattr(stages, step.how)(step.name, *step.words)
            progress.ends(step)

        run_in_order(steps, do, self.args.jobs)
        return self.write_results({step.name for step in steps}, stages)

    # ------------------------------------------------------------------------------------------ results

    def _places(self) -> tuple[Path, Path, Path]:
        """JSON, record and picture."""
        base = self.out / f"table_{self.number}"
        record = self.args.record or base.with_suffix(".md")
        return base.with_suffix(".json"), record, record.with_suffix(".png")

    def write_results(self, names: set[str], stages: Stages) -> str:
        """What was measured as JSON, a record with one table, a plot and a picture. Returns: the record."""
        arms = {name: self.measured(arm) for name, arm in self.arms.items()}
        runs = {name: run for name, run in stages.records().items() if name in names}
        first = json.loads((self.out / f"codes_{self._tokenizers()[0].name}_0.json").read_text())
        about = {"command": self.args.command, "commit": first["commit"], "versions": first["versions"]}
        results, self.args.record, picture = self._places()
        write_own_json(results, RESULTS, {**about, "plan": self.plan(), "arms": arms, "runs": runs})
        plot(picture, self.table, arms)
        shown = picture.with_name(f"{picture.stem}_images.png")
        self.draw(shown)
        minutes = sum(run["seconds"] for run in runs.values()) / 60
        parts = [self.plan(), result_table(self.table, arms), f"![the measures by arm]({picture.name})"]
        parts.append(f"![held-out images as each tokenizer of the first seed gives them back]({shown.name})")
        parts.append(f"{CAUTION} {_reading(self.args.seeds)}")
        parts.append(f"{minutes:.0f} minutes of stages; commit {first['commit'][:12]}.")
        title = f"Table {self.number} of PeCo's paper at small scale"
        return publish(self.args, title, "\n\n".join(part.strip() for part in parts), "deepspeed", "timm")

    def draw(self, path: Path) -> None:
        """Held-out images through every tokenizer of the first seed."""
        from benchmarks.paper_images import draw_reconstructions

        releases = {arm.tokenizer.name: self.release(arm.tokenizer, 0) for arm in self.arms.values() if arm.tokenizer}
        releases = {name.removeprefix(f"{SWEPT}_"): folder for name, folder in releases.items()}
        px = {self._pretrain_recipe(arm).views.tokenizer_px for arm in self.arms.values() if arm.tokenizer}
        draw_reconstructions(path, self.out / "images" / "val", releases, max(px))

    def measured(self, arm: SmallArm) -> dict:
        """Label, published figures, and of every measure a value a seed."""
        found: dict[str, list[float]] = {}

        def add(measure: str, value: float) -> None:
            found.setdefault(measure, []).append(value)

        for seed in range(self.args.seeds):
            if arm.tokenizer:
                codes = json.loads((self.out / f"codes_{arm.tokenizer.name}_{seed}.json").read_text())
                for form in (MEAN, BAG):
                    probes = codes["code_probes"]["images_as"][form]
                    add(f"{form}: linear", probes["best_linear"])
                    add(f"{form}: k-NN", probes["best_knn"])
                for other in self.further:
                    on = json.loads((self.out / f"codes_{arm.tokenizer.name}_{seed}{other.ending}.json").read_text())
                    for form in (MEAN, BAG):
                        add(f"{other.title}, {form}: linear", on["code_probes"]["images_as"][form]["best_linear"])
                if self.args.classifier:
                    read = codes["reconstructions_read_by"]
                    add("top-1 on reconstructions", read["reconstructions"]["top1"])
                    add("on the images themselves", read["originals"]["top1"])
                if "psnr" in codes["quality"]:
                    add("PSNR", codes["quality"]["psnr"])
                if self.args.lpips:
                    add("LPIPS", codes["quality"]["lpips"])
                add("codes used", codes["quality"]["codes_used"])
            if self.args.pretrain:
                curve = (self.out / f"finetune_{arm.name}_{seed}" / "evaluation.jsonl").read_text().splitlines()
                add("fine-tuned top-1", json.loads(curve[-1])["top1"])
                if arm.tokenizer:
                    probe = json.loads((self.out / f"probe_{arm.name}_{seed}" / "probe.json").read_text())
                    add("linear probe of the backbone", best_linear(probe["layers"]))
        return {"label": arm.label, "published": list(arm.published), "measures": found}


def _budget(name: str, stage: Stage) -> str:
    steps, flops = stage.durations.total_steps, stage.model_flops * stage.images
    return f"{name} {steps:,} steps of {stage.run.global_batch} images ({flops / 1e12:,.3g} TFLOP)"


def _reading(seeds: int) -> str:
    if seeds == 1:
        return "One seed: a difference may be chance."
    return f"Means of {seeds} seeds of the whole way, each seed in brackets."


# ---------------------------------------------------------------------------------------------- running


def run_in_order(steps: Sequence[SmallStep], do: Callable[[SmallStep], None], jobs: int) -> None:
    """Run every step after those it needs, the first of the list first, `jobs` at a time."""
    waiting, running, done = list(steps), {}, set()
    with ThreadPoolExecutor(jobs) as threads:
        while waiting or running:
            ready = [step for step in waiting if done.issuperset(step.needs)]
            for step in ready[: jobs - len(running)]:
                waiting.remove(step)
                running[threads.submit(do, step)] = step
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                future.result()
                done.add(running.pop(future).name)


class Progress:
    """Which of how many steps runs, and how long the rest will take by the steps that are done.

    Args:
        log: folder of the records of steps, also of an earlier start.
    """

    def __init__(self, steps: Sequence[SmallStep], log: Path, jobs: int) -> None:
        self._steps, self._log, self._jobs = list(steps), log, jobs
        self._done: dict[str, float] = {}
        self._lock = threading.Lock()
        for step in steps:
            self._read(step)

    def ends(self, step: SmallStep) -> None:
        with self._lock:
            self._read(step)

    def _read(self, step: SmallStep) -> None:
        record = self._log / f"{step.name}.json"
        if record.exists():
            self._done[step.name] = json.loads(record.read_text())["seconds"]

    def line(self, name: str) -> str:
        """What to say of a step that begins."""
        number = [step.name for step in self._steps].index(name) + 1
        with self._lock:
            seconds, unknown = self._rest()
        rest = f"about {clock(seconds)} to go"
        if unknown:
            rest = f"{rest} and what is not yet known: {', '.join(unknown)}" if seconds else "time to go not yet known"
        return f"step {number} of {len(self._steps)}: {name} ({rest})"

    def _rest(self) -> tuple[float, list[str]]:
        """Seconds of what is not done, and kinds of steps of which none is."""
        seconds, unknown = 0.0, {}
        for step in self._steps:
            if step.name in self._done or step.how == "unpack":
                continue
            alike = [other for other in self._steps if other.kind == step.kind and other.name in self._done]
            if not alike:
                unknown[step.kind] = None
                continue
            took, flops = sum(self._done[other.name] for other in alike), sum(other.flops for other in alike)
            seconds += took * step.flops / flops if flops else took / len(alike)
        return seconds / self._jobs, list(unknown)


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{max(1, minutes)} min"


# ---------------------------------------------------------------------------------------------- results


def measures_of(arms: dict[str, dict]) -> list[str]:
    """In the order of the arm that has most; one without pre-training has few."""
    most = max(arms.values(), key=lambda arm: len(arm["measures"]))
    return list(dict.fromkeys([*most["measures"], *(name for arm in arms.values() for name in arm["measures"])]))


def result_table(table: Table, arms: dict[str, dict]) -> str:
    measures, columns = measures_of(arms), [f"published: {column}" for column in table.columns]
    rows = []
    for arm in arms.values():
        figures = arm["published"] or ["-"] * len(columns)
        rows.append([arm["label"], *figures, *(shown(measure, arm["measures"]) for measure in measures)])
    return markdown_table(["arm", *columns, *measures], rows)


def shown(measure: str, measured: dict[str, list[float]]) -> str:
    """Mean, and every seed where there are several."""
    values, form = measured.get(measure, []), ".0f" if measure == "codes used" else ".2f"
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{value:{form}}' for value in values)})"


def plot(path: Path, table: Table, arms: dict[str, dict]) -> None:
    """A panel a measure, an arm a line of it: a dot a seed, a bar at the mean; first the published figures."""
    measures = [measure for measure in measures_of(arms) if measure not in NOT_DRAWN]
    labels = [arm["label"] for arm in arms.values()]
    columns = min(PANELS_A_ROW, len(measures) + 1)
    rows = -(-(len(measures) + 1) // columns)
    size = (2.6 * columns + 2, rows * (0.9 + 0.35 * len(labels)))
    with drawing(path, rows, columns, size=size, sharey=True) as drawn:
        first, *others = drawn.flat
        for column, name in enumerate(table.columns):
            known = [
                (place, float(arm["published"][column]))
                for place, arm in enumerate(arms.values())
                if arm["published"] and arm["published"][column] != "-"
            ]
            first.plot([value for _, value in known], [place for place, _ in known], "s", label=name)
        first.set_title("published, full size", fontsize="small")
        if len(table.columns) > 1:
            first.legend(fontsize="x-small")
        for axes, measure in zip(others, measures):
            for place, arm in enumerate(arms.values()):
                values = arm["measures"].get(measure, [])
                axes.plot(values, [place] * len(values), "o", color=f"C{place % 10}", alpha=0.7)
                if values:
                    axes.plot(statistics.mean(values), place, "|", color="0.2", markersize=14)
            axes.set_title(measure, fontsize="small")
        for axes in drawn[:, 0]:
            axes.set_yticks(range(len(labels)), labels, fontsize="small")
        first.set_ylim(len(labels) - 0.5, -0.5)
        for axes in drawn.flat:
            axes.ticklabel_format(axis="x", useOffset=False)
            axes.grid(axis="x", alpha=0.3)
        for axes in others[len(measures) :]:
            axes.set_visible(False)
