"""Resize the relative position bias of one image size to another, and vectors of places where a backbone has them.

Nothing else depends on the image size. Weights of another patch size are another model and are never
resampled.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import RectBivariateSpline

from peco_ds.errors import UserError
from peco_ds.models.dense_backbone import CLASS_ROWS


def grid_of(table: torch.Tensor) -> int | None:
    """Patches a side of the image that a table [(2 g - 1)^2 + 3, heads] is for; None if it is for no square grid."""
    width = math.isqrt(max(len(table) - CLASS_ROWS, 0))
    return (width + 1) // 2 if width % 2 and width**2 + CLASS_ROWS == len(table) else None


def resize_bias_table(table: torch.Tensor, grid: int) -> torch.Tensor:
    """The table for a grid x grid image, as the released BEiT code resizes it: neighbours keep their bias, far
    patches share what is left.

    The old distances are laid over the new ones in geometric progression (1, 1 + q, 1 + q + q^2, ...) so that the
    largest meet, and the table is read at whole distances by an interpolating bicubic spline. The three rows of the
    class token are kept.

    Args:
        table: [(2 g - 1)^2 + 3, heads] of any floating dtype.  grid: patches a side of the new image.
    Returns: [(2 grid - 1)^2 + 3, heads] in the same dtype, on the same device; the same tensor where grid is g.
    Raises: UserError if the table is for no square grid, or for one of a single patch.
    Source: BEiT (arXiv 2106.08254), released `run_class_finetuning.py`. timm's own resizing lies the same points but
        interpolates linearly between them.
    """
    old_grid = grid_of(table)
    if old_grid == grid:
        return table
    if old_grid is None or old_grid < 2:
        raise UserError(
            f"a bias table of {len(table)} rows is for no square grid of patches that could be resized; "
            "give weights of a square image"
        )
    width, new_width = 2 * old_grid - 1, 2 * grid - 1
    points = geometric_points(width, new_width)
    wanted = np.arange(new_width) - new_width // 2
    # A 2 x 2 grid has three distances, too few for a cubic spline.
    order = min(3, width - 1)
    planes = table[:-CLASS_ROWS].detach().double().cpu().numpy().reshape(width, width, -1)
    resized = [
        RectBivariateSpline(points, points, planes[:, :, head], kx=order, ky=order)(wanted, wanted).ravel()
        for head in range(planes.shape[2])
    ]
    return torch.cat([torch.from_numpy(np.stack(resized, axis=1)).to(table), table[-CLASS_ROWS:]])


def resize_places(places: torch.Tensor, grid: int) -> torch.Tensor:
    """Vectors of places for a grid x grid image, as the released BEiT code resizes them: bicubic, the class token's
    kept.

    Args:
        places: [1, 1 + g g, D] of any floating dtype.
    Returns: [1, 1 + grid grid, D] in the same dtype; the same tensor where grid is g.
    Source: BEiT (arXiv 2106.08254), released `run_class_finetuning.py`.
    """
    old_grid = math.isqrt(places.shape[1] - 1)
    if old_grid == grid:
        return places
    planes = places[:, 1:].float().transpose(1, 2).unflatten(2, (old_grid, old_grid))
    resized = F.interpolate(planes, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([places[:, :1], resized.flatten(2).transpose(1, 2).to(places)], dim=1)


def geometric_points(width: int, new_width: int) -> np.ndarray:
    """Where `width` old distances lie on the axis of `new_width` new ones: float64 [width], ascending, symmetric about
    0, steps growing by one ratio.

    The ratio is searched in [1.01, 1.5], as in the released code; towards a smaller image it ends at 1.01, which cuts
    far distances off.
    """
    half, reach = width // 2, new_width // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if np.sum(ratio ** np.arange(half)) > reach else (ratio, high)
    distances = np.cumsum(ratio ** np.arange(half))
    return np.concatenate([-distances[::-1], [0.0], distances])
