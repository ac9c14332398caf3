"""Parts that train: the pre-training step, the peers, a tokenizer; and tokenizing.

Each takes the benchmark of its name as it stands, so that a figure here is the figure there.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks.gpu.parts import Part
from benchmarks.record import markdown_table

# Overrides that make a recipe a toy.
TOY = (
    "model.depth=2 model.width=48 model.heads=3 model.image_px=64 mask.count=6 mask.min_block=2 "
    "objective.num_codes=64 run.micro_batch=2"
).split()
SMALL_TOKENIZERS = (
    "tokenizer.channels=8 tokenizer.vit.image_px=32 views.tokenizer_px=32 views.count=2 model.image_px=32 "
    "model.patch_px=16 mask.count=2 mask.min_block=1 run.micro_batch=2"
)
# A card with less memory takes half of the peers' batch: they keep more of an image than we do.
PEERS_GIB, PEERS_BATCH = 120, 128


def step(part: Part, *, size: str, zero: str) -> None:
    """A size under one ZeRO stage: images/s, MFU, memory, and where the time goes."""
    from benchmarks import step

    own = ["--sizes", size, "--zero", zero, "--checkpointing", "none", "--drop_by", "image", "--profile"]
    own += ["--rounds", "3", "--passes", "4", "--record", str(part.logs / f"{part.name}.md")]
    if part.small:
        own[1] = next(iter(step.CPU_SIZES))
        own += ["--compile", "none", "--rounds", "1", "--passes", "2", *TOY]
    else:
        own += ["--gpu", "--compile", "blocks", *fastest_attention(part, size)]
    measurement = step.Measurement(step.arguments(own))
    try:
        measurement.measure()
    finally:
        if measurement.rows:
            rows = [figures_of_step(row, measurement.ceilings) for row in measurement.rows]
            part.keep("", lower_headings(measurement.body()), rows=rows)
    if failed := measurement.broken():
        raise RuntimeError(failed[0].failure)


def figures_of_step(row, ceilings: dict) -> dict:
    from benchmarks.step import utilisation

    found = {"size": row.setting.size, "zero": row.setting.zero, "micro_batch": row.batch, "passes": row.passes}
    if row.failure:
        return found | {"failure": row.failure}
    of_ceiling, of_sheet = utilisation(row, ceilings)
    return found | {
        "images_s": row.images_per_s,
        "images_s_spread": row.spread,
        "mfu_of_measured_ceiling": of_ceiling,
        "mfu_of_data_sheet": of_sheet,
        "activation_bytes_an_image": row.kept_bytes / row.batch,
        "peak_bytes": row.peak_bytes,
        "start_s": row.start_s,
    }


def peers(part: Part) -> None:
    """The same step in timm and Hugging Face, at H/14 on a GPU."""
    from benchmarks import peers

    own = ["--rounds", "2", "--record", str(part.logs / "peers.md"), "--plot", str(part.logs / "peers.png")]
    if part.small:
        own += ["--passes", "2", "--at_once", "4", *(f"--without={text}" for text in ("compiled", "eager attention"))]
        own += TOY
    else:
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        own += ["--gpu", "--sizes", "H/14 at 224", "--at_once", "4", *fastest_attention(part, "H/14 at 224")]
        own.append(f"run.micro_batch={PEERS_BATCH if gib > PEERS_GIB else PEERS_BATCH // 2}")
    comparison = peers.Comparison(peers.arguments(own))
    try:
        comparison.measure()
    finally:
        if comparison.results:
            (results,) = comparison.results.values()
            part.keep("", lower_headings(comparison.body()), rows=[figures_of_peer(one) for one in results])
    if failed := comparison.broken():
        raise RuntimeError(f"{failed[0].contender.label}: {failed[0].failure}; the other rows stand")


def figures_of_peer(result) -> dict:
    one = result.contender
    found = {"label": one.label, "library": one.library, "precision": one.precision, "compiled": one.compiled}
    if result.failure or not result.ratios:
        return found | {"failure": result.failure or "cut off"}
    # to the reference of the same turns
    return found | {"ratios": result.ratios, "step_s": statistics.median(result.seconds), "zero": one.zero}


def tokenizing(part: Part) -> None:
    from benchmarks import tokenizing
    from benchmarks.sets import draw_images

    draw_images(part.work / "images", 8 if part.small else 64)
    own = ["--rounds", "1", "--images", str(part.work / "images"), "--record", str(part.logs / "tokenizing.md")]
    if part.small:
        own += ["--num_images", "2", "--single_views", "2", *SMALL_TOKENIZERS.split()]
    else:
        own += ["--gpu"]
    rows: dict[str, dict] = {}
    for name, found in tokenizing.found_cases(tokenizing.arguments(own)):
        rows[name] = {way: statistics.median(rates) for way, rates in found.rates.items()}
        part.keep(name, tokenizing.table(found), views_s=rows)


def tokenizer_training(part: Part) -> None:
    """A step of PeCo's tokenizer, and of VQ-KD's, with a judge and a teacher of drawn weights."""
    from benchmarks import tokenizer_step

    rows = {}
    for name, found in tokenizer_step.measured_cases(small=part.small):
        rows[name] = found
        table = markdown_table(tokenizer_step.HEADS, [tokenizer_step.cells(*row) for row in rows.items()])
        part.keep("", table, rows=rows)


def planner(part: Part) -> None:
    """The planner's step beside this device's."""
    from benchmarks import plan_step

    own = ["--rounds", "2" if part.small else "3", "--record", str(part.logs / "plan_step.md")]
    own += ["--rows", "width 384"] if part.small else ["--gpu"]
    plan_step.main(own)
    part.keep("", lower_headings((part.logs / "plan_step.md").read_text()))


def fastest_attention(part: Part, size: str) -> list[str]:
    """The setting that a run of its own would come to: of the forms that were found right at this size, the fastest."""
    from peco_ds.config import ModelSettings

    measured = part.report.parts.get("attention")
    rows = measured.figures.get("rows", []) if measured else []
    times = {
        row["form"]: row["both_ms"]
        for row in rows
        if row["shape"] == size
        and row["dtype"] == "bf16"
        and "both_ms" in row
        and row["worst_error"] <= row["tolerance"]
    }
    times.pop("PyTorch's", None)
    if not times or "attention" not in ModelSettings.__dataclass_fields__:
        return []
    return [f"model.attention={min(times, key=times.get)}"]


def lower_headings(text: str) -> str:
    """Under a part's own heading."""
    return "\n".join(f"##{line}" if line.startswith("#") else line for line in text.splitlines())
