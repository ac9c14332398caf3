"""PatchGAN critic, and the wrapper that trains it with the tokenizer in one backward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from peco_ds.config import AdversarialSettings
from peco_ds.models.image_tokenizer import ImageTokenizer
from peco_ds.models.peco_tokenizer import PecoTokenizer, TokenizerOutput, group_norm


class PatchCritic(nn.Sequential):
    """Images [B, 3, H, W] in [-1, 1] -> one logit a patch, [B, 1, about H / 2 ** layers, W / 2 ** layers].

    GroupNorm replaces the published critic's BatchNorm: batch statistics would make an image's logits, and so the loss,
    depend on its micro-batch and rank, and would mix real images with reconstructions.

    Args:
        channels: channels of the first convolution; doubled at each further one, up to eight times.
        layers: convolutions of stride 2.
    Source: pix2pix (arXiv 1611.07004), the "PatchGAN" of appendix 6.1.2; VQGAN (arXiv 2012.09841) for its use here.
    """

    def __init__(self, channels: int, layers: int) -> None:
        widths = [channels * min(2**index, 8) for index in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index in range(1, layers + 1):
            stride = 2 if index < layers else 1
            # No bias, because the norm after it would remove it.
            modules.append(nn.Conv2d(widths[index - 1], widths[index], 4, stride=stride, padding=1, bias=False))
            modules += [group_norm(widths[index]), nn.LeakyReLU(0.2)]
        modules.append(nn.Conv2d(widths[layers], 1, 4, padding=1))
        super().__init__(*modules)


class CriticLogits(NamedTuple):
    """float32 [B, 1, h, w] each."""

    real: torch.Tensor
    # The critic's logits of the reconstruction, with gradient to the critic only.
    fake_detached: torch.Tensor
    # The same values, with gradient to the reconstruction and to the critic.
    fake: torch.Tensor


class TokenizerWithCriticOutput(NamedTuple):
    tokenizer: TokenizerOutput
    logits: CriticLogits


class TokenizerWithCritic(nn.Module):
    """Tokenizer and critic in one forward, so that one engine and one backward pass train both.

    The critic must ascend where the tokenizer descends. `hinge_losses` of tokenizer_losses.py adds
    `fake_detached.mean() - fake.mean()` for the tokenizer: in the critic the gradients of the two terms cancel, and for
    the reconstruction the gradient of the second remains. This needs no second optimiser, and no parameter has to be
    switched off for a part of the graph, which ZeRO-3 does not support.
    """

    def __init__(self, tokenizer: PecoTokenizer, critic: PatchCritic) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.critic = critic

    def forward(self, images_11: torch.Tensor) -> TokenizerWithCriticOutput:
        """Images [B, 3, H, W] in [-1, 1], sides multiples of the tokenizer's stride."""
        output = self.tokenizer(images_11)
        dtype = self.critic[0].weight.dtype
        real = self.critic(images_11.to(dtype))
        fake_detached = self.critic(output.reconstruction.detach().to(dtype))
        fake = self.critic(output.reconstruction.to(dtype))
        return TokenizerWithCriticOutput(output, CriticLogits(real.float(), fake_detached.float(), fake.float()))


def with_critic(tokenizer: ImageTokenizer, settings: AdversarialSettings) -> nn.Module:
    """The model that the engine trains: the tokenizer with a new critic, or alone where the recipe has none."""
    if not settings.weight:
        return tokenizer
    return TokenizerWithCritic(tokenizer, PatchCritic(settings.channels, settings.layers))
