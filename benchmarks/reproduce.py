"""PeCo's paper, table by table: what makes a table at full size, and the table itself at small scale on this machine.

    python -m benchmarks.reproduce --list
    python -m benchmarks.reproduce --table 7 --scale full
    python -m benchmarks.reproduce --table 7 --images imagenette112.tar --bootstrap_judge --seeds 3

--scale full prints the commands that make the table at the paper's size, with the published figure of every row and the
GPU-hours that the planner predicts; nothing is run. --scale small runs the table's arms with the same recipes scaled
down (reproduce/tables.yaml has the settings), equal budgets for all arms. It says arms and budget before it begins, and
ends in one record (OUT/table_N.md) with one table and one plot. A seed is the whole way. What is finished is not done
again: start the same command to continue. Several tables may share --out; arms that they share are run once.

Without --pretrain an arm is measured by its codes: linear classifier and nearest neighbours on the mean code vector and
on the bag of codes, PSNR, codes used, and with --classifier top-1 on its reconstructions. With --pretrain also by a
masked pre-training on them, probed and fine-tuned, beside a network without any.

--judge takes the network of the perceptual loss (any that train_tokenizer.py reads; :NAME is timm's, where the file
does not tell it). --bootstrap_judge trains one here: the ViT that is pre-trained on the codes of the tokenizer without
a judge. Such a judge has seen minutes of training and none of the paper's; no effect of it is no finding about PeCo's.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python's path needs the package's parent, not the package's folder.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.paper_tables import STAGES, Paper, published, read_paper
from benchmarks.record import at_least, benchmark_parser, chosen, parse
from peco_ds.command_line import run
from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.errors import EXIT_DONE, UserError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reproduce.md"
# between these lines of the page everything is made by --write_docs
BEGIN, END = "<!-- made by python -m benchmarks.reproduce --write_docs -->", "<!-- end of what is made -->"
NORMALIZE = ("channel", "layer", "none")


def main(argv: list[str] | None = None) -> int:
    args = parse(arguments(), argv)
    paper = read_paper()
    if args.list:
        sys.stdout.write(listed(paper))
    elif args.bill:
        from benchmarks.paper_chain import bill_page

        sys.stdout.write(f"{bill_page(paper)}\n")
    elif args.write_docs:
        PAGE.write_text(page(PAGE.read_text(), paper))
    elif args.table is None:
        raise UserError("nothing to do; give --table N, --list or --bill")
    elif args.table not in paper.tables:
        raise UserError(f"--table {args.table}: the paper has tables {min(paper.tables)} to {max(paper.tables)}")
    elif args.scale == "full":
        from benchmarks.paper_chain import script

        sys.stdout.write(script(args.table, paper))
    else:
        small(args, paper)
    return EXIT_DONE


def arguments():
    parser = benchmark_parser("reproduce", __doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--table", type=int, metavar="N", help="of the paper, 1 to 12")
    what.add_argument("--list", action="store_true", help="name all tables, their arms and published figures")
    what.add_argument("--bill", action="store_true", help="what the runs of Tables 1, 2 and 8 would cost")
    what.add_argument(
        "--write_docs", action="store_true", help="make the tables and the bill of docs/reproduce.md anew"
    )
    scale = "small: run it here; full: print the commands (default: %(default)s)"
    parser.add_argument("--scale", choices=["small", "full"], default="small", help=scale)
    add = parser.add_argument_group("small scale").add_argument
    images = "train/ and val/, each with a folder a class, or a tar of that"
    add("--images", type=Path, metavar="FOLDER", help=images)
    out = "runs, their logs and results (default: %(default)s)"
    add("--out", type=Path, default=Path("reproduce_out"), metavar="FOLDER", help=out)
    add("--arms", nargs="+", metavar="ARM", help="only these of the table (names: --list)")
    add("--seeds", type=at_least(1), default=1, metavar="N", help="of the whole way (default: %(default)s)")
    jobs = "steps at a time, each with its share of the cores; with GPUs: 1 (default: %(default)s)"
    add("--jobs", type=at_least(1), default=1, metavar="N", help=jobs)
    ranks = "1: plain python; more: the deepspeed launcher (default: %(default)s)"
    add("--ranks", type=at_least(1), default=1, metavar="N", help=ranks)
    add("--deepspeed_config", default=str(DS_CONFIGS / "zero1.json"), metavar="FILE")
    add("--pretrain", action="store_true", help="also pre-train on the codes, probe and fine-tune")
    judge = (
        "network of the perceptual loss, and perceptual.key=value of its arms alone; random:NAME: timm's, never "
        "trained; again for a further one (table 5)"
    )
    words = "FILE_OR_FOLDER[:NAME]", "perceptual.key=value"
    add("--judge", action="append", nargs="+", default=[], metavar=words, help=judge)
    add("--bootstrap_judge", action="store_true", help="train a small judge here")
    add("--dalle", type=Path, metavar="FOLDER", help="DALL-E's tokenizer, as import_tokenizer.py wrote it")
    classifier = "measure top-1 on reconstructions by this one, as evaluate.py takes it"
    add("--classifier", metavar="NAME_OR_PATH", help=classifier)
    some = "as many images, spread over val/, are what --classifier sees (default: all)"
    add("--classifier_images", type=at_least(1), metavar="N", help=some)
    add("--checkpoint", type=Path, metavar="FILE", help="local weights for --classifier, the name of a timm model")
    lpips = "measure LPIPS by this AlexNet or VGG16, as evaluate.py takes it"
    add("--lpips", type=Path, metavar="FILE", help=lpips)
    also = "probe the codes on these images too, given as --images; again for a further set"
    add("--also", action="append", type=Path, default=[], metavar="FOLDER", help=also)
    sweep = "further arms: the perceptual tokenizer of the first judge with these, separated by commas"
    add("--normalize", metavar="KIND", help=f"{sweep} ({', '.join(NORMALIZE)})")
    add("--weight", metavar="WEIGHT", help=f"{sweep} as weight of the loss")
    settings = "over all recipes of a stage: tokenizer (where none is named), pretrain, finetune or probe"
    add("--set", nargs="+", action="extend", default=[], metavar="[STAGE:]key.sub=value", help=settings)
    add("--dry_run", action="store_true", help="arms, budget and steps; nothing is run")
    return parser


def small(args: argparse.Namespace, paper: Paper) -> None:
    table = prepared(args, paper)
    sys.stdout.write(table.plan())
    sys.stdout.flush()
    if args.dry_run:
        for number, step in enumerate(table.steps(), start=1):
            sys.stdout.write(f"step {number}: {step.name}\n")
        return
    sys.stdout.write(table.run())


def prepared(args: argparse.Namespace, paper: Paper):
    """The table of a command line, nothing of it run.

    Raises: UserError for what makes no table.
    """
    from benchmarks.paper_small import SmallTable

    if args.images is None:
        raise UserError("--scale small: needs --images; or --scale full, which prints the commands of full size")
    args.normalize = chosen("normalize", args.normalize, NORMALIZE) if args.normalize else []
    args.weight = weights(args.weight) if args.weight else []
    args.set = settings_by_stage(args.set)
    for name in ("checkpoint", "classifier_images"):
        if getattr(args, name) and not args.classifier:
            raise UserError(f"--{name} {getattr(args, name)}: is of --classifier NAME; name that too")
    args.images, args.also = args.images.resolve(), [path.resolve() for path in args.also]
    # starts of stages find local files whatever folder they run in
    if args.classifier and os.path.exists(args.classifier):
        args.classifier = str(Path(args.classifier).resolve())
    return SmallTable(args, paper, args.table)


def weights(text: str) -> list[float]:
    """Of --weight. Raises: UserError for what is no positive number."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weight {text}: numbers, separated by commas") from None
    if not all(0 < weight < float("inf") for weight in found):
        raise UserError(f"--weight {text}: above 0; without a judge is the arm plain_300")
    return found


def settings_by_stage(texts: list[str]) -> dict[str, list[str]]:
    """Of --set. Raises: UserError for a stage that there is not."""
    found: dict[str, list[str]] = {}
    for text in texts:
        key, equals, _ = text.partition("=")
        stage, colon, rest = key.partition(":")
        if not equals or (colon and stage not in STAGES):
            raise UserError(f"--set {text}: written as [STAGE:]key.sub=value, STAGE one of {', '.join(STAGES)}")
        found.setdefault(stage if colon else STAGES[0], []).append(text.removeprefix(f"{stage}:") if colon else text)
    return found


def listed(paper: Paper) -> str:
    """All tables, their arms and published figures."""
    lines = []
    for number, table in paper.tables.items():
        where = "full scale only" if table.full_only else "" if table.measures else "not made here"
        lines.append(f"Table {number}: {table.title}{f' ({where})' if where else ''}")
        for row in table.rows:
            figures = ", ".join(f"{column} {value}" for column, value in zip(table.columns, published(row)))
            lines.append(f"    {row.arm or '-':<16} {row.row}: {figures}{f' ({row.why})' if row.why else ''}")
    return "\n".join(lines) + "\n"


def page(text: str, paper: Paper) -> str:
    """docs/reproduce.md with the part anew that is made."""
    from benchmarks.paper_chain import bill_page, judges_page, table_page

    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise UserError(f"{PAGE}: has not both lines {BEGIN!r} and {END!r}; put them back")
    parts = [table_page(number, paper) for number in paper.tables]
    made = "\n\n".join([judges_page(paper), *parts, "## The bill", BILL, bill_page(paper)])
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


BILL = """Predicted, not run: `python -m benchmarks.reproduce --bill`. Typical pace of the hardware, in brackets from a
fast to a slow one; every stage with the settings that `plan.py` recommends for that many GPUs. Short stages take fewer
GPUs and give the others back. [How far to trust it](planning.md#how-far-to-trust-it)."""


if __name__ == "__main__":
    run(main)
