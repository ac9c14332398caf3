"""Parameters, multiply-accumulates and activation bytes of the networks, counted layer by layer from the settings.

Letters: N patches, T = N + 1 tokens, M masked patches, D width, F hidden width of the MLP, H heads, L blocks, V codes. One
multiply-accumulate (MAC) is two FLOPs. Norms, activations, softmax and biases are left out of the MACs, as is usual; all
matrix products and convolutions are in, the quadratic part of attention too.
"""

from __future__ import annotations

from dataclasses import dataclass

from peco_ds.config import ModelSettings, TokenizerSettings

IMAGE_CHANNELS = 3
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
FLOPS_PER_MAC = 2
# The backward pass computes a gradient for the input and one for the weight of every product. Recomputed activations are not
# counted: FLOPs are the model's, the convention of MFU.
TRAINING_OVER_FORWARD = 3


# ---------------------------------------------------------------------------------------------- vision transformer


@dataclass(frozen=True)
class MimParameters:
    """Parameters of the pre-training model by part; all of them are trained."""

    backbone: int  # with its final norm and relative position table, without any head
    token_head: int
    mask_token: int

    @property
    def total(self) -> int:
        return self.backbone + self.token_head + self.mask_token


def mim_parameters(model: ModelSettings, num_codes: int) -> MimParameters:
    """Parameters of backbone + mask token + linear head over `num_codes` codes."""
    return MimParameters(
        backbone=backbone_parameters(model),
        token_head=model.width * num_codes + num_codes,
        mask_token=model.width,
    )


def backbone_parameters(model: ModelSettings, *, shared_bias: bool = True, num_classes: int = 0) -> int:
    """Parameters of timm's `Beit` of these sizes, without absolute position embedding.

    Args:
        shared_bias: one relative position table for all blocks (pre-training) or one a block (fine-tuning, releases).
        num_classes: outputs of a linear classifier; 0: none.
    Source: BEiT (arXiv 2106.08254): query and value have a bias, the key has none; two layer-scale vectors a block.
    """
    width, hidden = model.width, _hidden(model)
    attention = 4 * width**2 + 3 * width  # biases of query, value and output
    mlp = 2 * width * hidden + hidden + width
    norms = 2 * 2 * width
    layer_scale = 2 * width if model.layer_scale else 0
    patch_embed = IMAGE_CHANNELS * model.patch_px**2 * width + width
    class_token, final_norm = width, 2 * width
    classifier = (width + 1) * num_classes
    tables = relative_positions(model.grid) * model.heads * (1 if shared_bias else model.depth)
    return patch_embed + class_token + model.depth * (attention + mlp + norms + layer_scale) + final_norm + tables + classifier


def relative_positions(grid: int) -> int:
    """Rows of a relative position table of a grid x grid picture; three are for pairs with the class token."""
    return (2 * grid - 1) ** 2 + 3


def _hidden(model: ModelSettings) -> int:
    return int(model.width * model.mlp_ratio)


@dataclass(frozen=True)
class MimMacs:
    """Multiply-accumulates of one picture's forward pass."""

    backbone: int
    token_head: int  # at masked patches only

    @property
    def total(self) -> int:
        return self.backbone + self.token_head

    @property
    def training_flops(self) -> int:
        """FLOPs of forward and backward, a picture."""
        return TRAINING_OVER_FORWARD * FLOPS_PER_MAC * self.total


def mim_macs(model: ModelSettings, *, num_codes: int, masked: int) -> MimMacs:
    """MACs of one picture; every token, hidden or not, goes through the encoder.

    Args:
        masked: hidden patches of the picture, the only ones the head sees.
    """
    patches, width = model.grid**2, model.width
    tokens = patches + 1
    projections = tokens * (4 * width**2 + 2 * width * _hidden(model))
    quadratic = 2 * tokens**2 * width  # query x key, and weights x value
    patch_embed = patches * IMAGE_CHANNELS * model.patch_px**2 * width
    return MimMacs(backbone=patch_embed + model.depth * (projections + quadratic), token_head=masked * width * num_codes)


@dataclass(frozen=True)
class ActivationBytes:
    """Device memory of one picture between its forward and its backward pass."""

    saved: int  # kept by autograd, and the model's outputs
    working: int  # gradients and recomputed tensors alive beside them at the worst moment

    @property
    def total(self) -> int:
        return self.saved + self.working


def mim_activation_bytes(model: ModelSettings, *, num_codes: int, masked: int, checkpointing: str, precision: str) -> ActivationBytes:
    """Activations of one picture, with an attention kernel that does not store the T x T weights.

    A block keeps, of T rows each: input and output of both norms (4 D), query, key and value (3 D), attention's output (D), the two
    branch outputs that layer scale multiplies (2 D), the MLP's hidden layer before and after GELU (2 F); and in 32 bits two
    statistics a row of each norm and one log-sum-exp a row of each head. With F = 4 D that is 36 T D bytes in 16 bits; the classic
    34 T D counts two dropout masks, which this network has not, and no layer scale. Beyond the blocks: the picture, input and
    output of the final norm, and at M masked patches the head's input, its logits and the log-probabilities, these in 32 bits.

    The working part is an estimate of the worst moment: in a block's backward pass the gradients of the hidden layer before
    and after GELU, of the block's input and of a branch, and of the attention bias, which kernels write as [H, T, T] a picture before they
    sum it; in the head's the gradient of the logits in both precisions. The caching allocator's fragmentation is not in it.

    Args:
        checkpointing: "none", or "full": every block keeps its input alone and is recomputed in the backward pass.
        precision: "bf16", "fp16" or "fp32".
    """
    assert checkpointing in ("none", "full"), checkpointing
    element, width, hidden = ELEMENT_BYTES[precision], model.width, _hidden(model)
    tokens = model.grid**2 + 1
    scaled = 2 if model.layer_scale else 0
    norm_statistics = 2 * 4
    block = tokens * ((8 + scaled) * width + 2 * hidden) * element + tokens * (2 * norm_statistics + 4 * model.heads)
    block_backward = tokens * (2 * hidden + 2 * width) * element + model.heads * tokens**2 * element
    ends = IMAGE_CHANNELS * model.image_px**2 * element + tokens * (2 * width * element + norm_statistics)
    head = masked * (width * element + num_codes * (element + 4))
    head_backward = masked * num_codes * (element + 4)
    if checkpointing == "none":
        return ActivationBytes(saved=ends + head + model.depth * block, working=max(block_backward, head_backward))
    inputs = model.depth * tokens * width * element
    return ActivationBytes(saved=ends + head + inputs, working=max(block + block_backward - tokens * width * element, head_backward))


# ---------------------------------------------------------------------------------------------- tokenizer


@dataclass(frozen=True)
class Cost:
    """Of some layers of the convolutional tokenizer: parameters, forward MACs a picture, elements a picture kept for backward."""

    parameters: int = 0
    macs: int = 0
    saved: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.macs + other.macs, self.saved + other.saved)

    def times(self, count: int) -> Cost:
        return Cost(count * self.parameters, count * self.macs, count * self.saved)


@dataclass(frozen=True)
class TokenizerCost:
    encoder: Cost  # with the 1x1 convolution to the code's dimension
    decoder: Cost  # with the 1x1 convolution from it
    codebook_elements: int  # codes, and the moving averages of their counts and sums: buffers, not parameters
    search_macs: int  # nearest-code search of a picture

    @property
    def parameters(self) -> int:
        return self.encoder.parameters + self.decoder.parameters

    @property
    def forward_macs(self) -> int:
        return self.encoder.macs + self.decoder.macs + self.search_macs

    @property
    def training_flops(self) -> int:
        """FLOPs of a picture's forward and backward pass, without the perceptual network and the critic; the search has no backward."""
        return FLOPS_PER_MAC * (TRAINING_OVER_FORWARD * (self.encoder.macs + self.decoder.macs) + self.search_macs)


def tokenizer_cost(tokenizer: TokenizerSettings, image_px: int) -> TokenizerCost:
    """Cost of the convolutional VQ autoencoder on a picture of image_px x image_px.

    Source: VQGAN (arXiv 2012.09841), the f16 configuration of its released code; sizes of a PeCo stand-in.
    """
    grid = image_px // tokenizer.stride_px
    return TokenizerCost(
        encoder=_encoder(tokenizer, image_px),
        decoder=_decoder(tokenizer, image_px),
        codebook_elements=tokenizer.num_codes * (2 * tokenizer.code_dim + 1),
        search_macs=grid**2 * tokenizer.code_dim * tokenizer.num_codes,
    )


def _encoder(tokenizer: TokenizerSettings, image_px: int) -> Cost:
    widths = [tokenizer.channels * multiplier for multiplier in tokenizer.channel_mults]
    cost, width, size = _conv(IMAGE_CHANNELS, tokenizer.channels, 3, image_px), tokenizer.channels, image_px
    for level, out in enumerate(widths):
        last = level == len(widths) - 1
        for _ in range(tokenizer.blocks_per_level):
            cost += _residual(width, out, size)
            width = out
            if last and tokenizer.attention:
                cost += _attention(width, size)
        if not last:
            cost += _conv(width, width, 3, size // 2, in_size=size)
            size //= 2
    cost += _middle(tokenizer, width, size)
    cost += _norm_swish(width, size) + _conv(width, tokenizer.z_channels, 3, size)
    return cost + _conv(tokenizer.z_channels, tokenizer.code_dim, 1, size)


def _decoder(tokenizer: TokenizerSettings, image_px: int) -> Cost:
    widths = [tokenizer.channels * multiplier for multiplier in tokenizer.channel_mults]
    width, size = widths[-1], image_px // tokenizer.stride_px
    cost = _conv(tokenizer.code_dim, tokenizer.z_channels, 1, size) + _conv(tokenizer.z_channels, width, 3, size)
    cost += _middle(tokenizer, width, size)
    for level, out in reversed(list(enumerate(widths))):
        for _ in range(tokenizer.blocks_per_level + 1):
            cost += _residual(width, out, size)
            width = out
            if level == len(widths) - 1 and tokenizer.attention:
                cost += _attention(width, size)
        if level:
            size *= 2
            cost += _conv(width, width, 3, size)
    return cost + _norm_swish(width, size) + _conv(width, IMAGE_CHANNELS, 3, size)


def _middle(tokenizer: TokenizerSettings, width: int, size: int) -> Cost:
    cost = _residual(width, width, size).times(2)
    return cost + _attention(width, size) if tokenizer.attention else cost


def _residual(width: int, out: int, size: int) -> Cost:
    cost = _norm_swish(width, size) + _conv(width, out, 3, size) + _norm_swish(out, size) + _conv(out, out, 3, size)
    if width != out:
        # The shortcut's input is the first norm's, kept already.
        cost += Cost(width * out + out, width * out * size**2)
    return cost


def _attention(width: int, size: int) -> Cost:
    """Single head over all positions: four 1x1 convolutions; keeps the norm's input, its output, query, key, value and the mixture."""
    positions = size**2
    return Cost(2 * width + 4 * (width**2 + width), 4 * width**2 * positions + 2 * positions**2 * width, 6 * width * positions)


def _norm_swish(width: int, size: int) -> Cost:
    return Cost(2 * width, 0, 2 * width * size**2)


def _conv(width: int, out: int, kernel: int, size: int, *, in_size: int | None = None) -> Cost:
    """`size` is the output's side in pixels, and the input's too unless `in_size` is given."""
    return Cost(kernel**2 * width * out + out, kernel**2 * width * out * size**2, width * (in_size or size) ** 2)
