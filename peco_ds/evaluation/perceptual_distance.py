"""Compute LPIPS with the network's weights from a local file.

torchmetrics has the linear weights in its wheel, but would fetch the network from the web.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torchmetrics.functional.image.lpips import _NoTrainLpips

from peco_ds.errors import UserError
from peco_ds.models.timm_weights import WEIGHTS
from peco_ds.models.weight_files import check_finite, read_tensor_file

# The convolutions of torchvision's AlexNet and VGG; the classifier behind them is not part of LPIPS.
_FEATURES = "features."
_FIRST = "0.weight"
_FIRST_SHAPES = {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}


class Lpips(nn.Module):
    """restored_01, originals_01 [b, 3, S, S] in [0, 1] -> distance [b].

    Attributes: network, "alex" or "vgg"; values of the two do not compare.
    """

    def __init__(self, net: nn.Module, network: str) -> None:
        super().__init__()
        self.net, self.network = net, network

    @torch.no_grad()
    def forward(self, restored_01: torch.Tensor, originals_01: torch.Tensor) -> torch.Tensor:
        return self.net(restored_01, originals_01, normalize=True).reshape(-1)


def load_lpips(path: Path) -> Lpips:
    """LPIPS version 0.1, on the CPU in eval mode.

    Args:
        path: torchvision's AlexNet or VGG16, ImageNet-1K (`alexnet-owt-7be5be79.pth`, `vgg16-397923af.pth`), or a
            folder of import_judge.py with one of them. Its convolutions are enough.
    Raises: UserError if it is not one of these networks.
    Source: Zhang et al. (arXiv 1801.03924).
    """
    if (path / WEIGHTS).is_file():
        path = path / WEIGHTS
    tensors = {
        name.removeprefix(_FEATURES): tensor
        for name, tensor in read_tensor_file(path).items()
        if name.startswith(_FEATURES)
    }
    name = _FIRST_SHAPES.get(tuple(tensors[_FIRST].shape)) if _FIRST in tensors else None
    if name is None:
        raise UserError(
            f"{path}: is neither torchvision's AlexNet nor its VGG16; make one with import_judge.py alexnet, or fetch "
            "alexnet-owt-7be5be79.pth from download.pytorch.org/models"
        )
    # With pnet_rand torchvision is not asked for its weights.
    net = _NoTrainLpips(net=name, pnet_rand=True)
    # torchmetrics cuts the network into slices whose layers keep their numbers.
    expected = {key.partition(".")[2]: tensor for key, tensor in net.net.state_dict().items()}
    wrong = sorted(
        key
        for key in expected.keys() | tensors.keys()
        if key not in expected or key not in tensors or expected[key].shape != tensors[key].shape
    )
    if wrong:
        raise UserError(
            f"{path}: {_FEATURES}{wrong[0]} is missing, unexpected or of another shape than in "
            f"torchvision's {'AlexNet' if name == 'alex' else 'VGG16'}; give that network's file"
        )
    check_finite(tensors, str(path))
    for key, tensor in expected.items():
        tensor.copy_(tensors[key])
    return Lpips(net, name).eval()
