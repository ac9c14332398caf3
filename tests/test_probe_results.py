from PIL import Image

from peco_ds.config import ProbeRecipe
from peco_ds.evaluation.probe_results import LayerResults, plot, table


def layer(block, *top1, knn=50.0):
    return {
        "block": block,
        "linear": [{"lr": lr, "top1": value, "top5": 99.0} for lr, value in zip((1e-3, 4e-3), top1)],
        "knn": {"10": knn},
    }


def test_layers_that_are_done_stay_done_and_those_of_other_settings_do_not_count(tmp_path):
    results = LayerResults(tmp_path / "layers", "key", (3, 6, 9))
    assert results.missing() == [3, 6, 9]
    results.write(9, layer(9, 40.0, 41.0))
    results.write(3, layer(3, 20.0, 21.0))
    again = LayerResults(tmp_path / "layers", "key", (3, 6, 9))
    assert again.missing() == [6]
    again.write(6, layer(6, 30.0, 31.0))
    assert again.read() == [layer(3, 20.0, 21.0), layer(6, 30.0, 31.0), layer(9, 40.0, 41.0)]
    assert LayerResults(tmp_path / "layers", "other", (3, 6)).missing() == [3, 6]


def test_the_table_has_a_row_a_block_and_a_column_a_rate_and_k():
    rows = [
        line
        for line in table(
            ProbeRecipe(), [layer(1, 20.0, 21.25), layer(2, 30.0, 31.0, knn=44.4)], "weights", 224
        ).splitlines()
        if line.startswith("|")
    ]
    assert rows[0] == "| block | linear, lr 0.001 | linear, lr 0.004 | 10-NN |"
    assert rows[2:] == ["| 1 | 20.00 | 21.25 | 50.00 |", "| 2 | 30.00 | 31.00 | 44.40 |"]


def test_the_plot_is_an_image_with_something_on_it(tmp_path):
    plot(tmp_path / "layers.png", [layer(1, 20.0, 21.0), layer(2, 30.0, 31.0)], "weights")
    image = Image.open(tmp_path / "layers.png").convert("RGB")
    assert image.size == (700, 400) and len(image.getcolors(10**6)) > 20
