"""What was measured against the bars: one H200, bf16, no recomputation.

Nothing here needs more than Python's own library.
"""

from __future__ import annotations

from benchmarks.gpu.report import Verdict

# images/s: bar, aim
STEPS = {
    "step_h_zero1": ("ViT-H/14 at 224, ZeRO-1", 440, 490),
    "step_h_zero3": ("ViT-H/14 at 224, ZeRO-3", 440, 490),
    "step_l": ("ViT-L/16 at 224", 1100, None),
    "step_b": ("ViT-B/16 at 224", 3300, None),
    "step_h_448": ("ViT-H/14 at 448", 80, None),
}
ATTENTION_SHAPE, ATTENTION_MS = "H/14 at 224", 0.45
FORMS = ("triton", "unfused", "efficient")
OURS, PEERS, PEERS_TIMES = "ours", ("Hugging Face", "timm"), 1.5
# whose like in 32-bit weights is ours through the engine
LIKE = {"master": "autocast"}


def verdicts(figures: dict[str, dict], *, small: bool) -> list[Verdict]:
    """Args: figures: by part.  small: sizes for a CPU, which no bar of speed is meant for."""
    found = [right_attention(figures.get("attention", {})), fast_attention(figures.get("attention", {}))]
    found += [step(figures.get(part, {}), *bar) for part, bar in STEPS.items()]
    found += [against(library, figures.get("peers", {})) for library in PEERS]
    if small:
        found = [one if one.what.endswith("float64") else one._replace(met=None) for one in found]
    return [*found, same_bits(figures.get("resume", {})), gpu_tests(figures.get("tests", {}), small)]


def right_attention(figures: dict) -> Verdict:
    rows = [row for row in figures.get("rows", ()) if row["form"] in FORMS and "worst_error" in row]
    what, bar = "attention and its gradients against float64", "within the type's tolerance"
    if not rows:
        return Verdict(what, bar, "", None)
    wrong = [row for row in rows if not row["worst_error"] <= row["tolerance"]]
    worst = max(rows, key=lambda row: row["worst_error"] / row["tolerance"])
    named = f"{worst['form']}, {worst['shape']}, {worst['dtype']}: {worst['worst_error']:.1e}"
    return Verdict(what, bar, f"{len(rows) - len(wrong)} of {len(rows)} are right, the worst {named}", not wrong)


def fast_attention(figures: dict) -> Verdict:
    """Of the forms that are right, the fastest."""
    timed = [row for row in figures.get("rows", ()) if row["form"] in FORMS and "both_ms" in row]
    rows = [row for row in timed if row["shape"] == ATTENTION_SHAPE and row["dtype"] == "bf16"] or timed
    right = [row for row in rows if row["worst_error"] <= row["tolerance"]]
    what = f"attention forward and backward, {(rows or [{'shape': ATTENTION_SHAPE}])[0]['shape']}"
    bar = f"{ATTENTION_MS} ms an image"
    if not right:
        return Verdict(what, bar, "", None)
    best = min(right, key=lambda row: row["both_ms"])
    return Verdict(what, bar, f"{best['both_ms']:.3g} ms ({best['form']})", best["both_ms"] <= ATTENTION_MS)


def step(figures: dict, what: str, bar: float, aim: float | None) -> Verdict:
    rates = [row["images_s"] for row in figures.get("rows", ()) if "images_s" in row]
    wanted = f"{bar} images/s" + (f", aim {aim}" if aim else "")
    if not rates:
        return Verdict(what, wanted, "", None)
    shares = [row.get("mfu_of_data_sheet") for row in figures["rows"] if "images_s" in row]
    share = f" ({shares[0]:.1%} of the data sheet)" if shares[0] else ""
    return Verdict(what, wanted, f"{rates[0]:.4g} images/s{share}", rates[0] >= bar)


def against(library: str, figures: dict) -> Verdict:
    """Compiled rows of a precision: ours over the library's fastest; the least of the precisions."""
    rows = [row for row in figures.get("rows", ()) if row.get("ratios") and row["compiled"]]
    what, bar = f"our compiled step over {library}'s", f"{PEERS_TIMES} times"
    times = {}
    for mine in (row for row in rows if row["library"] == OURS):
        like = LIKE.get(mine["precision"], mine["precision"])
        rivals = [middle(row["ratios"]) for row in rows if row["library"] == library and row["precision"] == like]
        if rivals:
            times.setdefault(like, []).append(middle(mine["ratios"]) / max(rivals))
    if not times:
        return Verdict(what, bar, "", None)
    precision, best = min(((one, max(values)) for one, values in times.items()), key=lambda item: item[1])
    return Verdict(what, bar, f"{best:.2f} times ({precision})", best >= PEERS_TIMES)


def same_bits(figures: dict) -> Verdict:
    what, bar = "stop and resume of peco_vittiny16", "bit for bit"
    if "same_bits" not in figures:
        return Verdict(what, bar, "", None)
    apart = f"from step {figures['first_step_apart']} on apart, weights by {figures['largest_difference']:.2g} at most"
    return Verdict(what, bar, "the same bits" if figures["same_bits"] else apart, figures["same_bits"])


def gpu_tests(figures: dict, small: bool) -> Verdict:
    what, bar = "tests that need a GPU", "all pass"
    ran = figures.get("passed", 0) + figures.get("failed", 0) + figures.get("error", 0)
    if "passed" not in figures or not (ran or figures["skipped"]):
        return Verdict(what, bar, "", None)
    said = ", ".join(f"{figures[name]} {name}" for name in ("passed", "failed", "error", "skipped") if figures[name])
    sound = ran > 0 and figures["failed"] == figures["error"] == 0
    return Verdict(what, bar, said, None if small and not ran else sound)


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
