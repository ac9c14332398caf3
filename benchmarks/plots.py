"""Bars of ratios, a panel a size: what step.py and peers.py draw beside their tables."""

from __future__ import annotations

from pathlib import Path

Bar = tuple[str, float, float, float]  # label, ratio, smallest, largest


def ratio_bars(path: Path, title: str, panels: dict[str, list[Bar]]) -> None:
    """One panel below another, a bar each, with whiskers from the smallest to the largest ratio and a line at 1.

    No file where there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {name: bars for name, bars in panels.items() if bars}
    if not panels:
        return
    heights = [0.5 + 0.28 * len(bars) for bars in panels.values()]
    figure = Figure(figsize=(10, sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    drawn = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (name, bars) in zip(drawn, panels.items()):
        labels, ratios, lows, highs = zip(*bars)
        whiskers = [
            [max(0.0, ratio - low) for ratio, low in zip(ratios, lows)],
            [max(0.0, high - ratio) for ratio, high in zip(ratios, highs)],
        ]
        axes.barh(
            range(len(bars)),
            ratios,
            xerr=whiskers,
            color=["C0" if label.startswith("ours") or label.startswith("ZeRO") else "0.6" for label in labels],
            ecolor="0.3",
            capsize=2,
        )
        axes.axvline(1.0, color="0.2", linewidth=0.8)
        axes.set_yticks(range(len(bars)), labels, fontsize="small")
        axes.invert_yaxis()
        axes.set_title(name, fontsize="small", loc="left")
        axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
