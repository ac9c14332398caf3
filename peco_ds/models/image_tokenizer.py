"""The interface of all tokenizers: images -> codes, hard or soft, and for most of them codes -> images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from peco_ds.config import TokenizerSettings
from peco_ds.errors import UserError
from peco_ds.models.vq import Codebook, full_float32, no_tf32
from peco_ds.schema import NO_CODE


class SoftTokens(NamedTuple):
    codes: torch.Tensor  # int64 [B, N], row-major
    topk_codes: torch.Tensor  # int64 [B, N, k], likeliest first
    # float32 [B, N, k], probabilities of the softmax over all V codes: a row sums to the mass kept.
    topk_probs: torch.Tensor


class ImageTokenizer(nn.Module):
    """Base of the tokenizers. Letters: B images, N patches row-major, V codes, C numbers a code.

    Every tokenizer takes images float [B, 3, H, W] in [-1, 1], sides multiples of `settings.stride_px`, and maps them
    to the range its own network knows. Those that are trained here have a `codebook` too, and a `forward` that gives
    codes and commitment.
    """

    # False: the codes stand for features, not for pixels, and there is no `decode_codes`.
    makes_images = True

    def __init__(self, settings: TokenizerSettings) -> None:
        super().__init__()
        self.settings = settings

    def trunk(self, images_11: torch.Tensor) -> torch.Tensor:
        """Nearly all of the work, in the precision of autocast: images -> the input of `choose`, [B, ..., H / stride,
        W / stride].
        """
        raise NotImplementedError

    def choose(self, outputs: torch.Tensor) -> torch.Tensor:
        """Codes int64 [B, N] from the trunk's outputs, compared in float32 whatever autocast asks for.

        NO_CODE where the logits or features are not finite.
        """
        raise NotImplementedError

    def choose_soft(self, outputs: torch.Tensor, k: int, *, temperature: float = 1.0) -> SoftTokens:
        """As `choose`, with the k likeliest of softmax(logits / temperature) over all V codes.

        The codes are those of `choose`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def tokenize(self, images_11: torch.Tensor) -> torch.Tensor:
        """Codes int64 [B, N]. Needs eval mode, in which a codebook does not count.

        Raises: UserError if the network's numbers are not finite.
        """
        self.check_eval()
        with no_tf32():
            return check_codes(self.choose(self.trunk(images_11)))

    @torch.no_grad()
    def tokenize_soft(self, images_11: torch.Tensor, k: int, *, temperature: float = 1.0) -> SoftTokens:
        """The codes, and the k likeliest of softmax(logits / temperature) over all V codes.

        Args:
            k: 1 to V.  temperature: > 0.
        Raises: UserError as `tokenize`.
        """
        self.check_eval()
        with no_tf32():
            soft = self.choose_soft(self.trunk(images_11), k, temperature=temperature)
        check_codes(soft.codes)
        return soft

    def decode_codes(self, codes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Codes int64 [B, N] of a (height, width) grid -> images float32 [B, 3, H, W], about [-1, 1]."""
        raise NotImplementedError

    @property
    def code_vectors(self) -> torch.Tensor:
        """float [V, C] without gradient: a vector for each code, for probes of the codes."""
        raise NotImplementedError

    def check_eval(self) -> None:
        assert not self.training, (
            "call eval() before tokenizing: in training mode the codebook would count these images"
        )

    def check_sides(self, images_11: torch.Tensor) -> None:
        stride = self.settings.stride_px
        assert images_11.shape[-2] % stride == 0 and images_11.shape[-1] % stride == 0, (
            f"image {tuple(images_11.shape)}, stride {stride}"
        )


class LogitTokenizer(ImageTokenizer):
    """Base of the tokenizers that compute a logit for every code: the code is the arg max."""

    def code_logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """The last layer, in the precision of its weights: [B, C, h, w] -> [B, V, h, w].

        In 16 bits several codes would often share the largest logit.
        """
        raise NotImplementedError

    def logits(self, images_11: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [-1, 1], sides multiples of the stride -> float32 [B, V, H / stride, W / stride]."""
        return self._logits(self.trunk(images_11))

    def _logits(self, outputs: torch.Tensor) -> torch.Tensor:
        with full_float32(outputs.device):
            return self.code_logits(outputs).float()

    def choose(self, outputs: torch.Tensor) -> torch.Tensor:
        return largest(self._logits(outputs), dim=1).flatten(1)

    def choose_soft(self, outputs: torch.Tensor, k: int, *, temperature: float = 1.0) -> SoftTokens:
        return soft_tokens(self._logits(outputs).flatten(2).transpose(1, 2), k, temperature)


class CodebookTokenizer(ImageTokenizer):
    """Base of the tokenizers that choose the nearest vector of a codebook, which a subclass sets as `codebook`."""

    codebook: Codebook

    def to_features(self, outputs: torch.Tensor) -> torch.Tensor:
        """Run the last layers in the precision of their weights.

        The trunk's outputs -> features [B, C, H / stride, W / stride].
        """
        raise NotImplementedError

    def encode(self, images_11: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> features [B, C, H / stride, W / stride]; the stride divides the sides."""
        outputs = self.trunk(images_11)
        with no_tf32():
            return self.to_features(outputs)

    def choose(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.codebook.nearest(self._features(outputs))

    def choose_soft(self, outputs: torch.Tensor, k: int, *, temperature: float = 1.0) -> SoftTokens:
        """Logits: negative squared distances to the codes, or cosines where the codes are unit vectors."""
        return SoftTokens(*self.codebook.topk(self._features(outputs), k, temperature=temperature))

    def _features(self, outputs: torch.Tensor) -> torch.Tensor:
        with full_float32(outputs.device):
            return self.to_features(outputs)

    @property
    def code_vectors(self) -> torch.Tensor:
        return self.codebook.codes


def soft_tokens(logits: torch.Tensor, k: int, temperature: float) -> SoftTokens:
    """Soft tokens from the logits [B, N, V] of a tokenizer that computes them all."""
    scaled = logits.float() / temperature
    values, indices = scaled.topk(k, dim=-1)
    return SoftTokens(largest(logits, dim=-1), indices, (values - scaled.logsumexp(dim=-1, keepdim=True)).exp())


def largest(logits: torch.Tensor, dim: int) -> torch.Tensor:
    """The arg max; NO_CODE where the largest logit is not finite."""
    codes = logits.argmax(dim=dim, keepdim=True)
    is_lost = logits.gather(dim, codes).isfinite().logical_not()
    return codes.masked_fill(is_lost, NO_CODE).squeeze(dim)


def check_codes(codes: torch.Tensor) -> torch.Tensor:
    """The codes [B, N], read back to the host. Raises: UserError where an image has NO_CODE."""
    lost = int((codes == NO_CODE).any(dim=1).sum())
    if lost:
        raise UserError(
            f"the tokenizer's numbers are not finite on {lost} of {len(codes)} images, so they have no codes; take "
            "weights of an earlier step, or more precision (fp32)"
        )
    return codes
