"""A network of random weights that looks trained."""

from __future__ import annotations

import torch
from torch import nn


def trained(net: nn.Module) -> nn.Module:
    """With the look of training: fresh norms are all alike, which would hide one that went astray."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith(("running_mean", "running_var")):
                tensor.copy_(0.1 * torch.randn_like(tensor) if "mean" in name else 0.5 + torch.rand_like(tensor))
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif not tensor.is_floating_point():
                tensor.fill_(7)
    return net.eval()
