"""Results of a linear probe: one file a layer while it runs, a table and a plot over the layers when it is done.

A layer's result is {"block", "linear": [{"lr", "top1", "top5"}], "knn": {k: top1}}, in percent.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from peco_ds.config import ProbeRecipe
from peco_ds.evaluation.features import FEATURES, OWN_FEATURES, refuse_foreign_features
from peco_ds.own_files import (
    Own,
    markdown_mark,
    own_json,
    own_markdown,
    own_png,
    png_text,
    refuse_foreign,
    written_whole,
)
from peco_ds.schema import MANIFEST_NAME, read_json, write_json

RECORD, TABLE, PLOT, LAYERS = "probe.json", "probe.md", "layers.png", "layers"
OWN_RECORD = own_json("linear_probe", "best", "layers", "made_from", "settings", "command")


def _is_table(text: str) -> bool:
    return "frozen features (" in text and " epochs of AdamW at batch " in text


OWN_TABLE = own_markdown("linear_probe", older=_is_table)


def _is_layer(path: Path) -> bool:
    try:
        return own_json("linear_probe", "key", "block", "linear", "knn").knows(path)
    except ValueError:
        # A damaged one is measured again, where the features beside it tell whose it was.
        return OWN_FEATURES.knows(path.parent.parent / FEATURES / MANIFEST_NAME)


OWN_LAYER = Own("linear_probe", _is_layer)


def _by_its_record(path: Path) -> bool:
    return OWN_RECORD.knows(path.parent / RECORD)


# Plots of before they named their maker are known by the record beside them.
OWN_PLOT = own_png("linear_probe", older=_by_its_record)


def check_places(out: Path) -> None:
    """Raises: UserError, before the work, where the results would replace what no probe wrote."""
    places = {out / RECORD: OWN_RECORD, out / TABLE: OWN_TABLE, out / PLOT: OWN_PLOT}
    places |= dict.fromkeys(sorted((out / LAYERS).glob("block_*.json")), OWN_LAYER)
    for path, own in places.items():
        refuse_foreign(path, own, remedy="give another --out, or move it away")
    refuse_foreign_features(out / FEATURES)


class LayerResults:
    """One file a layer, so that ranks need not wait for one another, and a second start continues where the first
    stopped.

    Args:
        key: identifies features and settings; results under another key are ignored.
    """

    def __init__(self, folder: Path, key: str, blocks: tuple[int, ...]) -> None:
        self._folder, self._key, self._blocks = folder, key, blocks

    def missing(self) -> list[int]:
        return [block for block in self._blocks if self._read(block) is None]

    def write(self, block: int, result: dict) -> None:
        refuse_foreign(self._path(block), OWN_LAYER)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(block), {"key": self._key, **result})

    def read(self) -> list[dict]:
        layers = [layer for block in self._blocks if (layer := self._read(block)) is not None]
        assert len(layers) == len(self._blocks), "a layer is missing"
        return layers

    def _read(self, block: int) -> dict | None:
        path = self._path(block)
        try:
            found = read_json(path) if path.is_file() else {}
        except ValueError:
            found = {}
        # The file is damaged: the block is measured again.
        if not isinstance(found, dict):
            return None
        return (
            {name: value for name, value in found.items() if name != "key"} if found.get("key") == self._key else None
        )

    def _path(self, block: int) -> Path:
        return self._folder / f"block_{block:02d}.json"


def table(cfg: ProbeRecipe, layers: list[dict], source: str, image_px: int) -> str:
    """Markdown: one row a block, top-1 of every lr and every k."""
    lrs, ks = [row["lr"] for row in layers[0]["linear"]], list(layers[0]["knn"])
    heads = ["block", *(f"linear, lr {lr:g}" for lr in lrs), *(f"{k}-NN" for k in ks)]
    rows = [
        [
            str(layer["block"]),
            *(f"{row['top1']:.2f}" for row in layer["linear"]),
            *(f"{layer['knn'][k]:.2f}" for k in ks),
        ]
        for layer in layers
    ]
    settings = cfg.probe
    lines = [
        f"# {cfg.name}: {source}",
        "",
        f"Top-1 in percent on `{cfg.data.val_images}`, frozen features ({settings.pooling}, "
        f"{image_px} px central crops, no augmentation), {settings.epochs} epochs of AdamW at batch "
        f"{settings.global_batch}.",
        "",
        *("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)),
    ]
    return "\n".join(lines) + "\n\n" + markdown_mark("linear_probe")


def plot(path: Path, layers: list[dict], title: str) -> None:
    """Top-1 over the blocks."""
    blocks = [layer["block"] for layer in layers]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(layers[0]["linear"]):
        axes.plot(
            blocks,
            [layer["linear"][place]["top1"] for layer in layers],
            marker="o",
            markersize=3,
            label=f"linear, lr {row['lr']:g}",
        )
    for k in layers[0]["knn"]:
        axes.plot(blocks, [layer["knn"][k] for layer in layers], linestyle="--", label=f"{k}-NN")
    axes.set(xlabel="block", ylabel="top-1 (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure)
    with written_whole(path, OWN_PLOT) as temporary:
        figure.savefig(temporary, format="png", metadata=png_text(OWN_PLOT))
