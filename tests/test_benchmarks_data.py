"""The data benchmark at toy size: it runs as a user starts it, both ways see the same images, and its arithmetic is
right.
"""

import pytest
import torch
from benchmark_runs import run_benchmark
from PIL import Image

from benchmarks import data as benchmark
from benchmarks import sets
from peco_ds.config import PretrainRecipe
from peco_ds.recipe_files import load_recipe


def timed(ours: list[float], theirs: list[float]):
    return benchmark.Timed(2, 1e4, 1e3, {benchmark.STORED: ours, benchmark.ONLINE: ours, benchmark.BEIT: theirs})


def test_a_run_of_a_few_images_writes_every_table_and_how_it_was_made(real_data, tmp_path):
    for number, path in enumerate(real_data.imagenet[:6]):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / f"{number}.jpg").symlink_to(path)
    record = tmp_path / "record.md"
    done = run_benchmark(
        "data",
        "--images",
        tmp_path / "raw",
        "--num_images",
        4,
        "--rounds",
        1,
        "--chunk",
        2,
        "--record",
        record,
        "views.count=2",
    )
    text = record.read_text()
    assert text.strip() in done.stdout
    assert text.count("4 images of") == 6 and "as they are" in text and "--short_side 320" in text
    for words in (
        "ours, stored tokens",
        "ours, online tokens",
        "BEiT transform",
        "tar read",
        "jitter",
        "H/14 at 40%",
        "batches in their turn",
        "torchvision",
        "python -m benchmarks.data --images",
    ):
        assert words in text, words


def test_image_shards_give_the_images_they_hold(small_sets, tmp_path):
    from peco_ds.data.image_set import ImageSet

    files = sets.chosen_files(small_sets.root / "images" / "train", 5, tmp_path / "files")
    images = ImageSet(small_sets.root / "images" / "train")
    for path, sample in zip(sorted(files.iterdir()), sets.evenly_spread(96, 5), strict=True):
        assert Image.open(path).size == tuple(reversed(images.decode(sample)[1].shape[1:]))


def test_where_no_real_image_is_found_some_are_drawn_that_every_path_can_read(tmp_path, monkeypatch):
    from peco_ds.data.decode import decode_rgb

    monkeypatch.setattr(sets, "images_of_the_tests", lambda: [])
    files = sorted(sets.chosen_files(None, 3, tmp_path / "files").iterdir())
    assert len(files) == 3 and all(path.name.startswith(sets.DRAWN) for path in files)
    assert all(decode_rgb(path.read_bytes()).shape == (3, 375, 500) for path in files)


def test_chosen_numbers_are_spread_and_never_more_than_there_are():
    assert sets.evenly_spread(10, 5) == [0, 2, 4, 6, 8]
    assert sets.evenly_spread(3, 5) == [0, 1, 2]


def test_the_ratio_is_of_rates_round_by_round():
    result = timed([0.001, 0.002, 0.001], [0.004, 0.004, 0.006])
    assert result.rate(benchmark.STORED) == 1000 and result.ratios(benchmark.STORED, benchmark.BEIT) == pytest.approx(
        [4, 2, 6]
    )
    assert "| 1000 | 4.00 (2.00 to 6.00) |" in benchmark.rate_table({"as_they_are": result})


def test_cores_are_the_images_a_step_takes_over_those_a_core_makes():
    result = timed([0.001], [0.004])
    lines = benchmark.core_table({"as_they_are": result, "short_side": timed([0.0005], [0.004])}).splitlines()
    row = next(line for line in lines if line.startswith("| H/14 at 40%"))
    rate, as_they_are, short_side, reference = (float(cell) for cell in row.split("|")[2:-1])
    # images a second of a training step at 40 % of the peak, by the model's published multiply-adds
    assert rate == pytest.approx(394, rel=0.02)
    assert (
        as_they_are == pytest.approx(rate / 1000, abs=0.06)
        and short_side == pytest.approx(rate / 2000, abs=0.06)
        and reference == pytest.approx(rate / 250, abs=0.06)
    )


def test_the_reference_gives_two_tensors_of_one_box_in_beits_ranges_and_a_mask(real_data):
    reference = benchmark.Reference(
        load_recipe(
            PretrainRecipe, "peco_vitb16", ["views.color_jitter=0", "views.flip=0", "views.scale=[1.0,1.0]"]
        ).recipe
    )
    backbone, tokenizer, masked = reference(real_data.imagenet[0].read_bytes(), 0)
    assert backbone.shape == (3, 224, 224) and tokenizer.shape == (3, 112, 112) and masked.shape == (75,)
    assert tokenizer.min() >= 0.1 - 1e-6 and tokenizer.max() <= 0.9 + 1e-6
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    same = torch.nn.functional.avg_pool2d(backbone * std + mean, 2) - (tokenizer - 0.1) / 0.8
    assert same.abs().mean() < 0.03
