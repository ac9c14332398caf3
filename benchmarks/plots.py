"""The drawings beside the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.record import OWN_PICTURE
from peco_ds.own_files import png_text, written_whole

Bar = tuple[str, float, float, float]  # label, ratio, smallest, largest


@contextmanager
def drawing(path: Path, *panels: int, size: tuple[float, float], **arguments) -> Iterator:
    """Axes of rows x columns of panels, [rows, columns]; the figure is saved as PNG at the end.

    Args:
        size: inches.  arguments: of `Figure.subplots`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure.subplots(*panels, squeeze=False, **arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, OWN_PICTURE) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata=png_text(OWN_PICTURE))


def log_curves(axes, x: Sequence[float], curves: dict[str, Sequence[float]], x_label: str, y_label: str) -> None:
    """Curves by label, both axes logarithmic."""
    for label, values in curves.items():
        axes.loglog(x, values, marker="o", markersize=4, label=label)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def ratio_bars(path: Path, title: str, panels: dict[str, list[Bar]]) -> None:
    """One panel below another, a bar each, with whiskers from the smallest to the largest ratio and a line at 1.

    No file where there is nothing to draw.
    """
    panels = {name: bars for name, bars in panels.items() if bars}
    if not panels:
        return
    heights = [0.5 + 0.28 * len(bars) for bars in panels.values()]
    size = (10, sum(heights) + 0.8)
    with drawing(path, len(panels), 1, size=size, sharex=True, height_ratios=heights) as drawn:
        drawn[0, 0].figure.suptitle(title)
        for axes, (name, bars) in zip(drawn[:, 0], panels.items()):
            labels, ratios, lows, highs = zip(*bars)
            whiskers = [
                [max(0.0, ratio - low) for ratio, low in zip(ratios, lows)],
                [max(0.0, high - ratio) for ratio, high in zip(ratios, highs)],
            ]
            colours = ["C0" if label.startswith(("ours", "ZeRO")) else "0.6" for label in labels]
            axes.barh(range(len(bars)), ratios, xerr=whiskers, color=colours, ecolor="0.3", capsize=2)
            axes.axvline(1.0, color="0.2", linewidth=0.8)
            axes.set_yticks(range(len(bars)), labels, fontsize="small")
            axes.invert_yaxis()
            axes.set_title(name, fontsize="small", loc="left")
            axes.grid(axis="x", alpha=0.3)
