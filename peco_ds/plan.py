"""What a run would cost before it is one: memory, traffic, step time, hours and GPU-hours of every stage, on so many
GPUs of a kind. Needs neither torch nor a GPU.

python peco_ds/plan.py --hardware h100 --gpus 64
python peco_ds/plan.py --hardware h100 h200 --gpus 8 64 256 512 --plot scaling.png schedule.epochs=1600
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

if __package__ in (None, ""):
    # Python puts this file's folder first when it is started by path; imports need the package's parent there.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds.command_line import Parser, run, user_path
from peco_ds.data_paths import data_path
from peco_ds.errors import EXIT_DONE, UserError
from peco_ds.own_files import check_output, own_json, own_png, png_text, write_own_json, written_whole
from peco_ds.user_paths import expand

BILLS = own_json("plan", "recipe", "samples", "bills", "assumptions")
SCALING = own_png("plan")
_SETTING = re.compile(r"([\w-]+:)?\w+(\.\w+)+=")

RECIPE = (
    "with a pre-training's the whole chain around it is planned, with a tokenizer's or a fine-tuning's that stage "
    "alone (default: %(default)s)"
)
HARDWARE = "a machine of the catalogue (--list_hardware), or a YAML file of your own (default: h100)"
DEEPSPEED_CONFIG = "DeepSpeed JSON of the recipe's stage (default: the one that its entry point takes by itself)"
TOKENIZER_RECIPE = "tokenizer of the chain (default: the one that usually goes with the recipe)"
FINETUNE_RECIPES = "fine-tunings of the chain, in order; without a name the chain ends at pre-training"
SAMPLES = "images of the training set (default: those of data.images where it is packed, else ImageNet-1K's 1,281,167)"
FINETUNE_SAMPLES = "labelled images of the fine-tunings (default: as many)"
VAL_SAMPLES = "images that a classifier is measured on (default: ImageNet-1K's 50,000)"
BAD_NODE = "also say how much longer a step takes when one node computes slowly or has a slow network"
STORE = "also say what an epoch asks of an object store: requests and bytes (by itself where data lie at a URL)"
OVERRIDES = "settings over the recipe's, or over those of another recipe of the chain"
NO_SIMULATION = (
    "--simulate: steps are no longer played rank by rank (closed form and simulation differed by at most 1.8 %: "
    "benchmarks/plan_simulate_202611.md); --bad_node tells what one slow node costs\n"
)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", default="peco_vith14", help=RECIPE)
    add("--hardware", nargs="+", default=["h100"], metavar="NAME", help=HARDWARE)
    add("--gpus", nargs="+", type=_count, default=[64], metavar="N", help="1 to 1024; several: a table (default: 64)")
    add("--deepspeed_config", default=None, help=DEEPSPEED_CONFIG)
    add("--tokenizer_recipe", metavar="RECIPE", help=TOKENIZER_RECIPE)
    add("--finetune_recipes", nargs="*", default=None, metavar="RECIPE", help=FINETUNE_RECIPES)
    add("--samples", type=_count, default=None, help=SAMPLES)
    add("--finetune_samples", type=_count, help=FINETUNE_SAMPLES)
    add("--val_samples", type=_count, default=None, help=VAL_SAMPLES)
    add("--bad_node", action="store_true", help=BAD_NODE)
    add("--store", action="store_true", help=STORE)
    add("--simulate", action="store_true", help=argparse.SUPPRESS)
    add("--json", type=user_path, default=None, metavar="FILE", help="also write all numbers")
    add("--plot", type=user_path, metavar="FILE.png", help="also draw images/s and days over the GPU counts")
    add("--list_hardware", action="store_true", help="print the catalogue with its sources, and nothing else")
    add("overrides", nargs="*", metavar="[RECIPE:]key.sub=value", help=OVERRIDES)
    given = sys.argv[1:] if argv is None else argv
    # Settings are taken out first: --gpus 8 64 model.depth=2 would take the setting for a number.
    settings = [text for text in given if _SETTING.match(text)]
    args = parser.parse_intermixed_args([text for text in given if text not in settings])
    args.overrides = settings + args.overrides
    if args.list_hardware:
        from peco_ds.planner.hardware import hardware_table

        sys.stdout.write(hardware_table() + "\n")
        return EXIT_DONE
    return plan(args)


def _count(text: str) -> int:
    """A whole number, also written as 3e6."""
    try:
        value = float(text.replace(",", "") if re.fullmatch(r"\d{1,3}(,\d{3})+", text) else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, nor a setting (key.sub=value)") from None
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(value)


def plan(args) -> int:
    from peco_ds.planner.bill import bill_facts, make_bill
    from peco_ds.planner.bill_text import assumption_lines, bad_node_lines, bill_text, scan_text
    from peco_ds.planner.fitting import check_gpus
    from peco_ds.planner.hardware import find_hardware

    machines = list({machine.name: machine for machine in map(find_hardware, args.hardware)}.values())
    for option, path, own in (("json", args.json, BILLS), ("plot", args.plot, SCALING)):
        suffix = ".json" if own is BILLS else ".png"
        if path is not None and path.suffix != suffix:
            raise UserError(f"{path}: give the name of a {suffix} file")
        if path is not None:
            check_output(path, own, f"--{option}")
    chain, assumed = _chain(args)
    stored = _stored(args, chain.main)
    asked = _asked_json(args.deepspeed_config, chain.main) if args.deepspeed_config else None
    for machine in machines:
        for count in args.gpus:
            check_gpus(count, machine, chain.main)
    counts = sorted(set(args.gpus))
    single = len(counts) == len(machines) == 1
    bills = [make_bill(chain, machine, count, asked, as_written=single) for machine in machines for count in counts]
    assumptions = assumption_lines(machines)
    lines = [bill_text(bills[0], assumed=assumed) if single else scan_text(bills, assumed=assumed)]
    if args.simulate:
        sys.stderr.write(NO_SIMULATION)
    if args.bad_node or args.simulate:
        lines += ["", *(line for bill in bills for line in bad_node_lines(bill))]
    if stored:
        from peco_ds.planner.store_costs import store_facts, store_lines

        sets, guessed = stored
        for bill in bills:
            lines += ["", *store_lines(bill.main, sets, assumed=guessed)]
    lines += ["", "On these assumptions (slow, typical, fast where there are three):", *assumptions]
    sys.stdout.write("\n".join(lines) + "\n")
    if args.json:
        facts = {
            "recipe": chain.main.recipe.name,
            "samples": chain.main.num_samples,
            "bills": [bill_facts(bill) for bill in bills],
            "assumptions": [line.strip() for line in assumptions],
        }
        if stored:
            facts["store"] = [store_facts(bill.main, stored[0]) for bill in bills]
        write_own_json(args.json, BILLS, facts)
    if args.plot:
        scaling_plot(args.plot, bills)
    return EXIT_DONE


def _chain(args):
    """The chain of the recipe, and whether its number of images is a guess."""
    from peco_ds.planner.chain import read_chain
    from peco_ds.schema import ImageManifest, read_manifest

    named = dict(
        tokenizer=args.tokenizer_recipe, finetune=args.finetune_recipes, finetune_samples=args.finetune_samples
    )
    named |= dict(val_samples=args.val_samples) if args.val_samples else {}
    chain = read_chain(args.recipe, args.overrides, **named)
    samples, data = args.samples, chain.main.recipe.data
    if samples is None:
        images = data_path(data, data.images)
        if not images.exists():
            return chain, True
        samples = read_manifest(images, ImageManifest).samples
    elif samples < 1:
        raise UserError(f"--samples {samples}: at least 1 image")
    return read_chain(args.recipe, args.overrides, num_samples=samples, **named), False


def _stored(args, main):
    """The sets of the main stage as they are read from a store, and whether their sizes are guesses; None where nobody
    asked and nothing lies in a store.
    """
    from peco_ds.planner.store_costs import assumed_sets, set_of
    from peco_ds.remote_paths import is_url
    from peco_ds.schema import ImageManifest, TokenManifest, read_manifest

    data = main.recipe.data
    sets = assumed_sets(main)
    places = {"images": (data.images, ImageManifest), "tokens": (data.tokens, TokenManifest)}
    if not args.store and not any(is_url(expand(value)) for value in (data.root, *(places[s.name][0] for s in sets))):
        return None
    if args.samples is not None:
        return sets, True
    found = []
    for assumed in sets:
        value, kind = places[assumed.name]
        place = data_path(data, value)
        found.append(set_of(assumed.name, read_manifest(place, kind)) if place.exists() else None)
    return [known or assumed for known, assumed in zip(found, sets)], None in found


def _asked_json(path: str, main):
    """The DeepSpeed JSON of the command line, which is refused as the stage itself would refuse it."""
    from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
    from peco_ds.planner.fitting import DeepSpeedChoice, shipped

    asked = DeepSpeedChoice(path, read_deepspeed_json(path))
    # The number of accumulation steps follows from the GPUs.
    held = {key: value for key, value in asked.raw.items() if key != "gradient_accumulation_steps"}
    merge_deepspeed(held, path, main.run, main.recipe.optim, world_size=1)
    return next((choice for choice in shipped() if choice.raw == asked.raw), asked)


def scaling_plot(path: Path, bills) -> None:
    """Two panels over GPU counts, a line a kind of GPU with a band from the slow to the fast pace: images/s of the main
    stage beside linear scaling, and days of the whole chain.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    speed, days = figure.subplots(1, 2)
    for number, name in enumerate(dict.fromkeys(bill.hardware.name for bill in bills)):
        own = sorted((bill for bill in bills if bill.hardware.name == name), key=lambda bill: bill.gpus)
        gpus, colour = [bill.gpus for bill in own], f"C{number}"
        linear = [own[0].main.images_s() / gpus[0] * count for count in gpus]
        speed.plot(gpus, linear, color=colour, linestyle=":", linewidth=1)
        for axes, quantity in ((speed, _images_s), (days, _days)):
            slow, typical, fast = ([quantity(bill, pace) for bill in own] for pace in ("slow", "typical", "fast"))
            axes.plot(gpus, typical, marker="o", color=colour, label=name)
            axes.fill_between(gpus, slow, fast, color=colour, alpha=0.2, linewidth=0)
    main, counts = bills[0].chain.main, sorted({bill.gpus for bill in bills})
    epochs = f"{main.recipe.schedule.epochs or 0:g} epochs"
    speed.set_title(f"{main.name}, {epochs}; dotted: linear, band: fast to slow pace", fontsize="medium")
    days.set_title("all stages, with evaluations, saves and failures", fontsize="medium")
    for axes, label in ((speed, "images/s"), (days, "days")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("GPUs")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    with written_whole(path, SCALING) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata=png_text(SCALING))


def _images_s(bill, pace: str) -> float:
    return bill.main.images_s(pace)


def _days(bill, pace: str) -> float:
    return bill.hours(pace) / 24


if __name__ == "__main__":
    run(main)
