import numpy as np
import pytest
import torch
from beit_samples import classifier_shapes, drawn
from scipy import interpolate
from timm.layers import pos_embed_rel, resize_rel_pos_bias_table
from timm.models.beit import Beit, checkpoint_filter_fn

from peco_ds.config import ModelSettings
from peco_ds.convert.initialize import classifier_of
from peco_ds.convert.resample import geometric_points, grid_of, resize_bias_table
from peco_ds.errors import UserError
from peco_ds.models.beit_weights import BeitWeights
from peco_ds.models.vit import timm_arguments

# B/16 224 to 384: 27 to 47 wide; H/14 224 to 448: 31 to 63; and back
SIZES = [(14, 24), (16, 32), (24, 14)]


def random_table(grid: int, heads: int = 3) -> torch.Tensor:
    return torch.randn((2 * grid - 1) ** 2 + 3, heads, generator=torch.Generator().manual_seed(grid))


def in_timm(table, grid):
    shape = ((2 * grid - 1) ** 2 + 3, table.shape[1])
    return resize_rel_pos_bias_table(table, new_window_size=(grid, grid), new_bias_shape=shape)


@pytest.mark.parametrize("old, new", SIZES)
def test_a_table_is_resized_as_timm_does_with_the_released_codes_cubic_interpolation(monkeypatch, old, new):
    class Interp2d:
        """The routine that SciPy removed, as its migration guide replaces it on a regular grid."""

        def __init__(self, x, y, z, kind):
            assert kind == "cubic"
            self.spline = interpolate.RectBivariateSpline(x, y, z.T)

        def __call__(self, x, y):
            return self.spline(np.asarray(x), np.asarray(y)).T

    monkeypatch.setattr(pos_embed_rel, "_USE_SCIPY", True)
    monkeypatch.setattr(interpolate, "interp2d", Interp2d)
    table = random_table(old)
    torch.testing.assert_close(resize_bias_table(table, new), in_timm(table, new), rtol=0, atol=1e-5)


@pytest.mark.parametrize("old, new", SIZES[:2])
def test_on_a_smooth_table_timms_linear_interpolation_agrees(old, new):
    axis = torch.linspace(-2, 2, 2 * old - 1)
    bump = torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / 2).reshape(-1, 1)
    table = torch.cat([bump, torch.zeros(3, 1)])
    assert (resize_bias_table(table, new) - in_timm(table, new)).abs().max() < 0.01


@pytest.mark.parametrize("width, new_width, ratio", [(27, 47, 1.0903), (31, 63, 1.0969)])
def test_distances_grow_by_the_ratio_that_the_released_code_finds(width, new_width, ratio):
    points = geometric_points(width, new_width)
    assert len(points) == width and np.allclose(points, -points[::-1])
    steps = np.diff(points[width // 2 :])
    assert steps[0] == 1 and np.allclose(steps[1:] / steps[:-1], ratio, atol=1e-4)
    assert points[-1] == pytest.approx(new_width // 2, abs=1e-3)


def test_the_nearest_neighbours_and_the_class_tokens_rows_keep_their_bias():
    table = random_table(16)
    resized = resize_bias_table(table, 32)
    assert resized.shape == (63**2 + 3, 3) and torch.equal(resized[-3:], table[-3:])
    old, new = table[:-3].view(31, 31, 3), resized[:-3].view(63, 63, 3)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            torch.testing.assert_close(new[31 + down, 31 + right], old[15 + down, 15 + right], rtol=0, atol=1e-5)


def test_the_same_grid_changes_nothing_and_a_half_precision_table_stays_one():
    table = random_table(14)
    assert resize_bias_table(table, 14) is table
    assert resize_bias_table(table.to(torch.bfloat16), 24).dtype == torch.bfloat16
    assert resize_bias_table(random_table(2), 4).shape == (52, 3)


def test_a_table_for_no_square_grid_is_refused():
    assert (
        grid_of(random_table(14)) == 14 and grid_of(torch.zeros(100, 3)) is None and grid_of(torch.zeros(2, 3)) is None
    )
    assert grid_of(torch.zeros(36 + 3, 3)) is None, "(2 g - 1)^2 is odd"
    with pytest.raises(UserError, match="100 rows"):
        resize_bias_table(torch.zeros(100, 3), 14)


def test_vit_h_at_448_with_the_resized_table_equals_timms_beit_through_its_own_filter():
    small = ModelSettings(image_px=224, patch_px=14, width=1280, depth=2, heads=16, drop_path=0.0)
    weights = BeitWeights("classifier", small, drawn(classifier_shapes(small)), "drawn")
    large = ModelSettings(image_px=448, patch_px=14, width=1280, depth=2, heads=16, drop_path=0.0)
    resized = {
        name: resize_bias_table(tensor, 32) if name.endswith("table") else tensor
        for name, tensor in weights.tensors.items()
    }
    theirs = Beit(**timm_arguments(large, shared_bias=False, num_classes=weights.num_classes, pooling="mean")).eval()
    theirs.load_state_dict(checkpoint_filter_fn({"model": resized}, theirs))
    images = torch.randn(1, 3, 448, 448, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(images)
        found = classifier_of(weights, image_px=448)(images)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
