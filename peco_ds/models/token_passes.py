"""Run a tokenizer fast over many images: one precision, passes of one size, the network compiled where asked for.

Stored and online codes both come from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from peco_ds.models.image_tokenizer import ImageTokenizer, SoftTokens
from peco_ds.models.vq import no_tf32
from peco_ds.schema import NO_CODE

_SIXTEEN_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TokenPasses:
    """Stands for the tokenizer where only codes are wanted: the same `tokenize` and `tokenize_soft`, for any number of
    images of one size.

    In bf16 or fp16 the trunk runs under autocast: products in 16 bits, statistics of norms in float32. The last layer
    and the search for the code run in the precision of the weights, float32, and never in TF32. A compiled trunk has
    one static shape: a last pass with fewer images is filled up, so that nothing is compiled again for it.

    Args:
        tokenizer: in eval mode, on its device.
        images: the most images of one pass.
        compiled: by torch.compile, which the first pass waits for.
    """

    def __init__(
        self, tokenizer: ImageTokenizer, *, precision: Literal["bf16", "fp16", "fp32"], images: int, compiled: bool
    ) -> None:
        tokenizer.check_eval()
        assert images >= 1
        # Eager group norms return images channels first, and the next convolution would convert them back; compiled
        # ones keep the memory format.
        self._layout = torch.channels_last if compiled else torch.contiguous_format
        self._tokenizer = tokenizer.to(memory_format=self._layout)
        self._dtype, self._images, self._compiled = _SIXTEEN_BITS.get(precision), images, compiled
        self._trunk = torch.compile(tokenizer.trunk, fullgraph=True, dynamic=False) if compiled else tokenizer.trunk

    @torch.no_grad()
    def tokenize(self, images_11: torch.Tensor) -> torch.Tensor:
        """As `ImageTokenizer.tokenize`, without reading back: NO_CODE all over an image on which the network's numbers
        are not finite, as where they outgrow fp16, whose largest is 65504.
        """
        return torch.cat(
            [_without_lost(self._tokenizer.choose(outputs), outputs) for outputs in self.outputs(images_11)]
        )

    @torch.no_grad()
    def tokenize_soft(self, images_11: torch.Tensor, k: int, *, temperature: float = 1.0) -> SoftTokens:
        """As `ImageTokenizer.tokenize_soft`, without reading back: NO_CODE among the codes as by `tokenize`."""
        found = []
        for outputs in self.outputs(images_11):
            soft = self._tokenizer.choose_soft(outputs, k, temperature=temperature)
            found.append(soft._replace(codes=_without_lost(soft.codes, outputs)))
        return SoftTokens(*(torch.cat(values) for values in zip(*found)))

    @torch.no_grad()
    def outputs(self, images_11: torch.Tensor) -> Iterator[torch.Tensor]:
        """The trunk's outputs, pass by pass."""
        for piece in images_11.split(self._images):
            number = len(piece)
            if self._compiled and number < self._images:
                piece = torch.cat([piece, piece.new_zeros(self._images - number, *piece.shape[1:])])
            with no_tf32(), torch.autocast(piece.device.type, self._dtype, enabled=self._dtype is not None):
                outputs = self._trunk(piece.contiguous(memory_format=self._layout))
            yield outputs[:number]


def _without_lost(codes: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """The codes [B, N]; NO_CODE in every place of an image whose outputs [B, ...] are not finite.

    The layers behind them need not show it: a tanh makes 1 of infinity.
    """
    is_lost = outputs.flatten(1).isfinite().all(dim=1, keepdim=True).logical_not()
    return codes.masked_fill(is_lost, NO_CODE)


def even_pass_size(images: int, at_most: int) -> int:
    """Images of each pass when `images` are cut into the fewest of at most `at_most`: as equal as can be, so that
    next to nothing is filled up.
    """
    passes = -(-images // at_most)
    return -(-images // passes)
