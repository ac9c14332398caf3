"""mIoU against a count in NumPy, windows, bands of rows, scales."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peco_ds.config import ModelSettings, SegmentationSettings
from peco_ds.data.scene_augment import IGNORED_PIXEL
from peco_ds.errors import UserError
from peco_ds.evaluation import segmentation
from peco_ds.evaluation.scene_picture import palette, scene_grid
from peco_ds.evaluation.segmentation import Confusion, ScenePredictor, Windows, predicted_classes, resized_rows

MODEL = ModelSettings(image_px=32, patch_px=8, width=48, depth=4, heads=3)


def alone(tensor):
    return tensor


def test_miou_is_that_of_a_count_pixel_by_pixel():
    draw = np.random.default_rng(0)
    confusion = Confusion(5, torch.device("cpu"))
    intersection, union, labelled, right, valid = np.zeros(5), np.zeros(5), np.zeros(5), 0, 0
    for _ in range(3):
        # Class 4 is never labelled and never predicted; 3 is predicted only.
        labels, found = draw.integers(0, 3, (9, 11)), draw.integers(0, 4, (9, 11))
        labels[draw.random((9, 11)) < 0.2] = IGNORED_PIXEL
        confusion.add(torch.from_numpy(labels).byte(), torch.from_numpy(found).byte())
        for label, prediction in zip(labels.ravel(), found.ravel()):
            if label == IGNORED_PIXEL:
                continue
            valid += 1
            labelled[label] += 1
            union[label] += 1
            if label == prediction:
                intersection[label] += 1
                right += 1
            else:
                union[prediction] += 1
    measured = confusion.result(alone)
    assert measured["miou"] == pytest.approx(100 * (intersection[:4] / union[:4]).mean(), abs=1e-4)
    assert measured["aacc"] == pytest.approx(100 * right / valid, abs=1e-4)
    assert measured["macc"] == pytest.approx(100 * (intersection[:3] / labelled[:3]).mean(), abs=1e-4)
    assert measured["images"] == 3


def test_a_set_without_a_labelled_pixel_is_refused():
    confusion = Confusion(3, torch.device("cpu"))
    confusion.add(torch.full((2, 2), IGNORED_PIXEL, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(UserError, match="no pixel of data.val_images is labelled"):
        confusion.result(alone)


@pytest.mark.parametrize("length", (31, 32, 33, 64, 100))
def test_windows_reach_from_border_to_border(length):
    boxes = Windows(length, 32, 32, 21).boxes()
    tops = [top for top, _ in boxes]
    assert tops == sorted(set(tops)) and tops[0] == 0 and tops[-1] == max(length - 32, 0)
    assert all(later - top <= 21 for top, later in zip(tops, tops[1:]))
    assert len(tops) == max(length - 32 + 20, 0) // 21 + 1


def by_colour(images_norm):
    """A model whose logits are its image's channels, at stride 4."""
    return F.avg_pool2d(images_norm, 4)


def predictor(forward=by_colour, batch=2, most_passes=lambda passes: passes, **settings):
    given = SegmentationSettings(long_px=400, short_px=48, stride_px=20, **settings)
    return ScenePredictor(forward, given, MODEL, batch=batch, mean=(0.0,) * 3, std=(1.0,) * 3, most_passes=most_passes)


def coloured(height, width):
    """Left, middle and right third in red, green and blue."""
    labels = (torch.arange(width) * 3 // width).expand(height, width).byte()
    return F.one_hot(labels.long(), 3).permute(2, 0, 1).to(torch.uint8) * 255, labels


@pytest.mark.parametrize(
    "settings",
    [{}, {"windows": "whole"}, {"scales": (0.5, 1.0, 1.5)}, {"scales": (1.0, 1.25), "flip": True}, {"flip": True}],
    ids=["slide", "whole", "scales", "scales and flip", "flip"],
)
@pytest.mark.parametrize("size", [(48, 96), (60, 45), (20, 90), (31, 33)])
def test_the_class_of_every_pixel_comes_back_at_the_images_own_size(size, settings):
    image, labels = coloured(*size)
    found = predictor(**settings)(image)
    assert found.shape == labels.shape and (found == labels).float().mean() > 0.9


def test_the_short_side_of_a_scale_never_falls_below_the_crop():
    sizes = []
    predict = predictor(scales=(0.5, 1.0, 1.5))
    predict.logits_of = lambda views: sizes.extend(view.shape[1:] for view in views) or [torch.zeros(3, 4, 4)]
    predict(coloured(50, 100)[0])
    assert sizes == [(32, 64), (48, 96), (72, 144)]


def test_passes_are_of_one_shape_and_as_many_as_the_busiest_rank_makes():
    shapes = []

    def forward(images_norm):
        shapes.append(tuple(images_norm.shape))
        return by_colour(images_norm)

    predictor(forward, batch=4, most_passes=lambda passes: passes + 2)(coloured(48, 96)[0])
    # 2 x 5 windows
    assert shapes == [(4, 3, 32, 32)] * 5


def test_bands_of_rows_are_the_resized_whole(monkeypatch):
    logits = torch.randn(6, 9, 14, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(logits[None], size=(31, 40), mode="bilinear", align_corners=False)[0]
    bands = torch.cat([resized_rows(logits, first, min(first + 4, 31), 31, 40) for first in range(0, 31, 4)], dim=1)
    torch.testing.assert_close(bands, whole, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(segmentation, "BAND_ELEMENTS", 6 * 40 * 3)
    assert (predicted_classes([logits], 31, 40) == whole.argmax(0)).float().mean() > 0.999


def test_several_views_are_averaged_as_probabilities():
    views = [torch.tensor([4.0, 0.0, 0.0]).view(3, 1, 1), torch.tensor([0.0, 1.5, 1.4]).view(3, 1, 1)]
    expected = sum(view.softmax(0) for view in views).argmax()
    assert predicted_classes(views, 1, 1).item() == expected == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("views", [1, 2])
def test_logits_that_are_not_finite_are_no_prediction_and_give_no_score(value, views):
    logits = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = predicted_classes([logits] * views, 4, 4)
    broken = logits.clone()
    broken[1, 2, 3] = value
    found = predicted_classes([broken] * views, 4, 4)
    assert found[2, 3] == IGNORED_PIXEL and torch.equal(found[0], expected[0])
    confusion = Confusion(3, torch.device("cpu"))
    for predictions in (expected, found):
        confusion.add(torch.zeros(4, 4, dtype=torch.uint8), predictions)
    with pytest.raises(UserError, match="not finite on 1 of 2 scenes, so there is no score"):
        confusion.result(alone)


def test_the_picture_has_a_row_for_each_scene_and_colours_far_apart():
    image, labels = coloured(30, 60)
    grid = scene_grid([(image, labels, labels)] * 2)
    assert grid.dtype == torch.uint8 and grid.shape[0] == 3 and grid.shape[2] > 3 * 256
    colours = palette()[:150]
    assert len({tuple(colour) for colour in colours.tolist()}) == 150 and not palette()[IGNORED_PIXEL].any()
