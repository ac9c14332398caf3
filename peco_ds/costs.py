"""What layers cost, counted from their sizes: the words in which a descriptor tells a planner of its network.

One multiply-accumulate (MAC) is two FLOP. Norms, activations, softmax and biases are left out of the MACs, as is usual;
all matrix products and convolutions are in, the quadratic part of attention too.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_CHANNELS = 3
FLOPS_PER_MAC = 2
FP32_BYTES = 4
# The backward pass computes a gradient for the input and one for the weight of every product. Recomputed activations
# are not counted: FLOPs are the model's, the convention of MFU.
TRAINING_OVER_FORWARD = 3


@dataclass(frozen=True)
class Cost:
    """Cost of some layers for one image."""

    parameters: int = 0
    # Multiply-accumulates of the forward pass.
    macs: int = 0
    # Elements kept for the backward pass.
    saved: int = 0
    # Parameter tensors.
    tensors: int = 0
    convolutions: int = 0
    # The part of `macs` that is query x key and weights x value beside convolutions.
    attention_macs: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def times(self, count: int) -> Cost:
        return Cost(*(count * getattr(self, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Blocks:
    """Equal transformer blocks."""

    number: int
    tokens: int
    width: int
    hidden: int
    heads: int


@dataclass(frozen=True)
class TokenizerCost:
    """Cost of a tokenizer for one image.

    `encoder_blocks` and `decoder_blocks` are the transformer blocks of a side; a side without them is convolutional.
    """

    # Includes the layers to the code's dimension.
    encoder: Cost
    # Includes the layers from the code's dimension, and those to a teacher's features.
    decoder: Cost
    # Codes, and the moving averages of their counts and sums. They are buffers, not parameters.
    codebook_elements: int
    # Nearest-code search, or the layer of logits.
    search_macs: int
    encoder_blocks: Blocks | None = None
    decoder_blocks: Blocks | None = None
    # False for a kind of tokenizer that does not tell the cost of its network.
    known: bool = True

    @property
    def parameters(self) -> int:
        return self.encoder.parameters + self.decoder.parameters

    @property
    def forward_macs(self) -> int:
        return self.encoder.macs + self.decoder.macs + self.search_macs

    @property
    def training_flops(self) -> int:
        """FLOPs of an image's forward and backward pass, without frozen networks and the critic.

        The search has no backward.
        """
        return FLOPS_PER_MAC * (TRAINING_OVER_FORWARD * (self.encoder.macs + self.decoder.macs) + self.search_macs)


@dataclass(frozen=True)
class FrozenStage:
    """What a frozen network computes for one image up to the next place where its features can be taken.

    Args:
        layers: transformer blocks, or convolutions. Of the latter, `saved` are the maps that norms and activations
            read, and no tensor is trained.
        saved: elements kept where a gradient goes back to the image, in the network's precision.
        working: elements alive at once where none does.
        features: elements of the features taken there.
        saved_bytes: kept beside `saved` whatever the precision: what layer norms read, indices of max pooling.
    """

    layers: Blocks | Cost
    saved: int
    working: int
    features: int
    saved_bytes: int = 0


@dataclass(frozen=True)
class FrozenCost:
    """A frozen network that judges or teaches, as far as its recipe names it.

    Args:
        name: what it is taken for.
        stem_macs: of what comes before the first stage.
    """

    name: str
    parameters: int
    image_px: int
    stem_macs: int
    stages: tuple[FrozenStage, ...]


@dataclass(frozen=True)
class ObjectiveCost:
    """What an objective costs for one image beside a cross-entropy with hard codes.

    Args:
        recomputed_macs: of forward_macs, those that the backward pass computes again; what the loss moves is then moved
            again too.
        moved_bytes: read and written by the forward pass.
        kernels: more than a cross-entropy's, of the forward pass.
    """

    forward_macs: int = 0
    backward_macs: int = 0
    recomputed_macs: int = 0
    moved_bytes: int = 0
    kernels: int = 0

    @property
    def model_flops(self) -> int:
        """FLOP of forward and backward pass, recomputation not counted."""
        return FLOPS_PER_MAC * (self.forward_macs + self.backward_macs)


# ---------------------------------------------------------------------------------------------- layers


def conv(width: int, out: int, kernel: int, size: int, *, in_size: int | None = None) -> Cost:
    """Cost of a convolution: `size` is the output's side in pixels, and the input's too unless `in_size` is given."""
    weights = kernel**2 * width * out
    return Cost(weights + out, weights * size**2, width * (in_size or size) ** 2, tensors=2, convolutions=1)


def shortcut(width: int, out: int, size: int) -> Cost:
    """A 1x1 convolution where the width changes; its input is the first norm's, kept already."""
    return Cost(width * out + out, width * out * size**2, tensors=2, convolutions=1) if width != out else Cost()


def norm_swish(width: int, size: int) -> Cost:
    return Cost(2 * width, 0, 2 * width * size**2, tensors=2)


def residual(width: int, out: int, size: int) -> Cost:
    """Cost of a residual block: norm, swish and 3x3 convolution, twice, and the shortcut."""
    layers = norm_swish(width, size) + conv(width, out, 3, size) + norm_swish(out, size) + conv(out, out, 3, size)
    return layers + shortcut(width, out, size)


def attention(width: int, size: int) -> Cost:
    """Cost of single-head attention over all positions: four 1x1 convolutions in two layers.

    It keeps the norm's input, its output, query, key, value and the mixture.
    """
    positions = size**2
    quadratic = 2 * positions**2 * width
    return Cost(
        2 * width + 4 * (width**2 + width),
        4 * width**2 * positions + quadratic,
        6 * width * positions,
        tensors=6,
        convolutions=2,
        attention_macs=quadratic,
    )


def patch_transformer(channels: int, patch_px: int, blocks: Blocks) -> Cost:
    """A ViT with absolute positions and a class token, without layer scale, down to its normed patch tokens.

    `planner.shapes.mim_activation_bytes` describes what a block keeps.
    """
    tokens, width, hidden = blocks.tokens, blocks.width, blocks.hidden
    patches, patch = tokens - 1, channels * patch_px**2
    embedding = Cost(patch * width + width, patches * patch * width, patches * patch)
    positions_and_norm = Cost((tokens + 1) * width + 2 * width, 0, tokens * width + patches * width)
    block = Cost(
        4 * width**2 + 3 * width + 2 * width * hidden + hidden + width + 4 * width,
        tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width,
        tokens * (8 * width + 2 * hidden),
        tensors=13,
    )
    # Tensors of patch embedding, class token, positions and norm.
    ends = Cost(tensors=6)
    return embedding + block.times(blocks.number) + positions_and_norm + ends


def tanh_head(width: int, out: int, positions: int) -> Cost:
    """Linear, tanh and linear layers at every position; they keep the input, tanh's output, and the output."""
    return Cost(
        width**2 + width + width * out + out,
        positions * (width**2 + width * out),
        positions * (2 * width + out),
        tensors=4,
    )
