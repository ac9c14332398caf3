"""image -> codes -> image: VQGAN's autoencoder with a Gumbel-softmax choice of codes, mc-BEiT's tokenizer.

Read from a released file; it is not trained here.

Source: VQGAN (arXiv 2012.09841) and the layout of its released `vqgan_gumbel_f8`; mc-BEiT (arXiv 2203.15371) for its
    use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peco_ds.config import TokenizerSettings
from peco_ds.models.image_tokenizer import LogitTokenizer
from peco_ds.models.peco_tokenizer import Decoder, Encoder


class GumbelTokenizer(LogitTokenizer):
    """Codes are the arg max of the logits: in training the network drew them at random, which a target must not be.

    Args:
        seed: not used; nothing here is random.
    """

    def __init__(self, settings: TokenizerSettings, *, seed: int = 0) -> None:
        super().__init__(settings)
        self.encoder = Encoder(settings)
        self.to_code = nn.Conv2d(settings.z_channels, settings.code_dim, 1)
        self.to_logits = nn.Conv2d(settings.code_dim, settings.num_codes, 1)
        self.codes = nn.Embedding(settings.num_codes, settings.code_dim)
        self.from_code = nn.Conv2d(settings.code_dim, settings.z_channels, 1)
        self.decoder = Decoder(settings)

    def trunk(self, images_11: torch.Tensor) -> torch.Tensor:
        self.check_sides(images_11)
        return self.encoder(images_11.to(self.to_code.weight.dtype))

    def code_logits(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.to_logits(self.to_code(outputs.to(self.to_code.weight.dtype)))

    @torch.no_grad()
    def decode_codes(self, codes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        vectors = F.embedding(codes, self.codes.weight).transpose(1, 2).unflatten(2, grid)
        return self.decoder(self.from_code(vectors)).float()

    @property
    def code_vectors(self) -> torch.Tensor:
        return self.codes.weight.detach()
