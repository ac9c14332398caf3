"""Frozen networks that judge (perceptual loss) or teach (VQ-KD), whatever their family.

A family is a line of `registry.FEATURE_NETS`: it recognises its weights, and its subclass of `FeatureNet` gives
features after stages. The blocks of perceptual.blocks are stages: of a ViT its transformer blocks (`vit_feature_nets`),
of a convolutional network timm's stages (`conv_feature_nets`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from peco_ds.errors import UserError
from peco_ds.registry import family_of
from peco_ds.user_paths import expand

MOCO_V3_URL = "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"
# Advice on what to fetch, by section of the recipe.
FETCH = {
    "perceptual": f"fetch {MOCO_V3_URL} (MoCo v3, ViT-B/16, 300 epochs) and give its path in perceptual.weights",
    "teacher": "fetch ViT-B-16.pt of github.com/openai/CLIP, or dino_vitbase16_pretrain.pth of "
    "github.com/facebookresearch/dino, and give its path in teacher.weights",
}


class FeatureNet(nn.Module):
    """A frozen network that gives features after chosen stages, or its final ones. A subclass runs the network.

    It stays in eval mode, whatever its parent does.

    Args:
        net: the network; taken to float32 and frozen.
        image_px: side of the square image it looks at.
        grid: places a side of its final features.
        depth: number of its stages.
        target_width: numbers a place of `targets`; 0: it only judges.
        mean, std: of its input, for images in [0, 1].
        description: one line for the log, the run's record and the model card.
        licence: what the weights are published under, "" unknown.
        statistics: what tells mean and std, for the record; "" where its makers set them.
        precision: of the network's own work; its weights, its input and its answers are float32 in any case. auto: bf16
            on a GPU, fp32 elsewhere. `load_feature_net` sets it.
    """

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # What messages call its stages, and whether no number stands for all of them.
    stage_name, judged_whole = "blocks", False

    def __init__(
        self,
        net: nn.Module,
        *,
        image_px: int,
        grid: int,
        depth: int,
        target_width: int = 0,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        description: str,
        licence: str = "",
        statistics: str = "",
    ) -> None:
        super().__init__()
        self.net = net.float().eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.image_px, self.grid, self.depth, self.target_width = image_px, grid, depth, target_width
        self.description, self.licence, self.statistics = description, licence, statistics
        self.compile_passes(0)

    def after_blocks(self, images_norm: torch.Tensor, blocks: list[int]) -> list[torch.Tensor]:
        """Features after stages.

        Args:
            images_norm: float32 [B, 3, image_px, image_px], normalised; gradient flows back to it.
            blocks: numbers from 1, ascending, each once; what lies behind the last need not run.
        Returns: one [B, N, D] a block, places row-major; N and D may differ between blocks.
        """
        raise NotImplementedError

    def final(self, images_norm: torch.Tensor) -> torch.Tensor:
        """What a tokenizer learns to give: [B, grid * grid, target_width], row-major."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> FeatureNet:
        return super().train(False)

    def checked_blocks(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """The stages that these numbers name; no number: all, of a network that is judged as a whole.

        Raises: UserError if one of the numbers does not exist, or none is given to another network.
        """
        if not blocks and self.judged_whole:
            return tuple(range(1, self.depth + 1))
        if not blocks or not all(1 <= number <= self.depth for number in blocks):
            advice = ", or [] for all of them" if self.judged_whole else ""
            raise UserError(
                f"perceptual.blocks {list(blocks)}: {self.description} has {self.stage_name} 1 to {self.depth}; name "
                f"at least one of these and no other{advice}"
            )
        return blocks

    def features(self, images_01: torch.Tensor, blocks: tuple[int, ...]) -> list[torch.Tensor]:
        """Features after the given blocks.

        Args:
            images_01: [B, 3, H, W] in [0, 1], resized (bilinear, antialiased) where its size is not image_px; gradient
                flows back to it.
            blocks: numbers from 1, in the order of the answer; none: as `checked_blocks`.
        Returns: one float32 [B, N, D] a block.
        Raises: UserError if a block does not exist.
        """
        blocks = self.checked_blocks(blocks)
        ascending = sorted(set(blocks))
        images_norm = self._normalized(images_01)
        with self._autocast(images_norm.device):
            after = dict(zip(ascending, self._pass("after_blocks", images_norm)(images_norm, ascending)))
        return [after[number].float() for number in blocks]

    def targets(self, images_01: torch.Tensor) -> torch.Tensor:
        """Final features, as `final`.

        Args:
            images_01: as in `features`.
        Returns: float32 [B, grid * grid, target_width].
        """
        images_norm = self._normalized(images_01)
        with self._autocast(images_norm.device):
            return self._pass("final", images_norm)(images_norm).float()

    def compile_passes(self, images: int) -> None:
        """Compile passes of so many images, as a training has them; others run as they are. 0: none is compiled."""
        self._compiled_images = images
        names = ("after_blocks", "final") if images else ()
        self._compiled = {name: torch.compile(getattr(self, name), dynamic=False) for name in names}

    def _pass(self, name: str, images: torch.Tensor) -> Callable:
        return self._compiled[name] if len(images) == self._compiled_images else getattr(self, name)

    def _autocast(self, device: torch.device) -> torch.autocast:
        bf16 = self.precision == "bf16" or (self.precision == "auto" and device.type == "cuda")
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def _normalized(self, images_01: torch.Tensor) -> torch.Tensor:
        size = (self.image_px, self.image_px)
        images = images_01.float()
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        return (images - self.mean) / self.std


def load_feature_net(
    weights: str,
    architecture: str = "auto",
    *,
    image_px: int = 0,
    section: str = "perceptual",
    precision: Literal["auto", "bf16", "fp32"] = "auto",
) -> FeatureNet:
    """Read a frozen network, in the way of the family that recognises it.

    Args:
        weights, architecture, precision: as the recipe has them.
        image_px: side of the image it shall look at; 0: the one it was trained on.
        section: of the recipe, for messages: "perceptual" or "teacher".
    Raises: UserError if nothing is named, or what is named cannot be read as a whole.
    """
    if not weights:
        raise UserError(
            f"{section}.weights is empty; {FETCH[section]}"
            + (", or set perceptual.weight=0" if section == "perceptual" else "")
        )
    weights = expand(weights)
    network = family_of(weights, architecture).load(weights, architecture, image_px=image_px, section=section)
    network.precision = precision
    return network
