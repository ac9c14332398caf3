"""What a run would cost before it is one: memory, traffic, step time, hours and GPU-hours of every stage, on so many
GPUs of a kind. Needs neither torch nor a GPU.

python peco_ds/plan.py --hardware h100 --gpus 64
python peco_ds/plan.py --hardware h100 h200 --gpus 8 64 256 512 --plot scaling.png schedule.epochs=1600
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

if __package__ in (None, ""):
    # started by path: the package's parent, not its inside
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peco_ds.command_line import Parser, run
from peco_ds.data_paths import data_path
from peco_ds.errors import EXIT_DONE, UserError

_SETTING = re.compile(r"([\w-]+:)?\w+(\.\w+)+=")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe",
        default="peco_vith14",
        help="of a pre-training: the whole chain around it; of a tokenizer or a fine-tuning: that stage "
        "alone (default: %(default)s)",
    )
    parser.add_argument(
        "--hardware",
        nargs="+",
        default=["h100"],
        metavar="NAME",
        help="of the catalogue (--list_hardware), or a YAML file of your own (default: h100)",
    )
    parser.add_argument(
        "--gpus",
        nargs="+",
        type=_count,
        default=[64],
        metavar="N",
        help="1 to 1024; several make a table over them (default: 64)",
    )
    parser.add_argument(
        "--deepspeed_config", default=None, help="of the recipe's stage (default: what its entry point takes by itself)"
    )
    parser.add_argument(
        "--tokenizer_recipe",
        default=None,
        metavar="RECIPE",
        help="in place of the one that usually goes with the recipe",
    )
    parser.add_argument(
        "--finetune_recipes",
        nargs="*",
        default=None,
        metavar="RECIPE",
        help="likewise, in order; none: the chain ends at pre-training",
    )
    parser.add_argument(
        "--samples",
        type=_count,
        default=None,
        help="images of the training set (default: those of data.images where it is packed, else "
        "ImageNet-1K's 1,281,167)",
    )
    parser.add_argument(
        "--finetune_samples", type=_count, default=None, help="labelled images of the fine-tunings (default: as many)"
    )
    parser.add_argument(
        "--val_samples",
        type=_count,
        default=None,
        help="images that a classifier is measured on (default: ImageNet-1K's 50,000)",
    )
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="also play the steps on every rank with stragglers, and the run with its failures",
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write all numbers")
    parser.add_argument(
        "--plot",
        type=Path,
        default=None,
        metavar="FILE.png",
        help="also draw images/s and days over the GPU counts",
    )
    parser.add_argument(
        "--list_hardware", action="store_true", help="print the catalogue with its sources, and nothing else"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="[RECIPE:]key.sub=value",
        help="settings over the recipe's, or over those of another recipe of the chain",
    )
    given = sys.argv[1:] if argv is None else argv
    # else --gpus 8 64 model.depth=2 would take the setting for a number
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
    from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
    from peco_ds.planner.assumptions import assumption_lines
    from peco_ds.planner.bill import (
        SCAN_HEADS,
        aligned,
        bill_facts,
        bill_text,
        make_bill,
        scan_notes,
        scan_rows,
        simulation_lines,
    )
    from peco_ds.planner.chain import read_chain
    from peco_ds.planner.fitting import DeepSpeedChoice, check_gpus, shipped
    from peco_ds.planner.hardware import find_hardware

    machines = list({machine.name: machine for machine in map(find_hardware, args.hardware)}.values())
    for path, suffix in ((args.json, ".json"), (args.plot, ".png")):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}; make it or correct the path")
        if path is not None and (path.suffix != suffix or path.is_dir()):
            raise UserError(f"{path}: give the name of a {suffix} file")
    named = dict(
        tokenizer=args.tokenizer_recipe, finetune=args.finetune_recipes, finetune_samples=args.finetune_samples
    )
    named |= dict(val_samples=args.val_samples) if args.val_samples else {}
    chain = read_chain(args.recipe, args.overrides, **named)
    samples = _samples(args.samples, chain.main.recipe)
    if samples is not None:
        chain = read_chain(args.recipe, args.overrides, num_samples=samples, **named)
    main = chain.main
    asked = None
    if args.deepspeed_config:
        asked = DeepSpeedChoice(args.deepspeed_config, read_deepspeed_json(args.deepspeed_config))
        # follows from the GPUs
        held = {key: value for key, value in asked.raw.items() if key != "gradient_accumulation_steps"}
        # refuses what the stage itself would
        merge_deepspeed(held, args.deepspeed_config, main.run, main.recipe.optim, world_size=1)
        asked = next((choice for choice in shipped() if choice.raw == asked.raw), asked)
    for machine in machines:
        for count in args.gpus:
            check_gpus(count, machine, main)
    counts = sorted(set(args.gpus))
    single = len(counts) == len(machines) == 1
    bills = [make_bill(chain, machine, count, asked, as_written=single) for machine in machines for count in counts]
    lines = []
    if single:
        lines.append(bill_text(bills[0], assumed=samples is None))
    else:
        said = f"{main.num_samples:,} images" + (" (assumed: ImageNet-1K; no set was read)" if samples is None else "")
        lines += [
            f"{main.name}{'' if len(chain.stages) == 1 else ' and what belongs to it'}, with the settings "
            f"recommended for each; {said}",
            "",
            *aligned([SCAN_HEADS, *scan_rows(bills)]),
            "",
            *scan_notes(bills),
        ]
    simulated = [simulation_lines(bill) for bill in bills] if args.simulate else []
    lines += ["", *(line for found in simulated for line in found)] if simulated else []
    lines += ["", "On these assumptions (slow, typical, fast where there are three):", *assumption_lines(machines)]
    sys.stdout.write("\n".join(lines) + "\n")
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "recipe": main.recipe.name,
                    "samples": main.num_samples,
                    "bills": [bill_facts(bill) for bill in bills],
                    "assumptions": [line.strip() for line in assumption_lines(machines)],
                },
                indent=1,
            )
            + "\n"
        )
    if args.plot:
        from peco_ds.planner.curves import scaling_plot

        scaling_plot(args.plot, bills)
    return EXIT_DONE


def _samples(given: int | None, recipe) -> int | None:
    """Images of the training set: as given, or of the set that is packed; None: neither."""
    from peco_ds.schema import ImageManifest, read_manifest

    if given is not None:
        if given < 1:
            raise UserError(f"--samples {given}: at least 1 image")
        return given
    images = data_path(recipe.data, recipe.data.images)
    return read_manifest(images, ImageManifest).samples if images.exists() else None


if __name__ == "__main__":
    run(main)
