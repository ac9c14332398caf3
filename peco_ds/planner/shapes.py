"""Parameters, multiply-accumulates and activation bytes of the networks, counted layer by layer from the settings.

Letters: N patches, T = N + 1 tokens, n tokens that the encoder sees, M masked patches, D width, F hidden width of the
MLP, H heads, L blocks, V codes. One multiply-accumulate (MAC) is two FLOPs. Norms, activations, softmax and biases are
left out of the MACs, as is usual; all matrix products and convolutions are in, the quadratic part of attention too.
"""

from __future__ import annotations

from dataclasses import dataclass

from peco_ds.config import AggregationSettings, EncodingSettings, ModelSettings, TokenizerSettings
from peco_ds.schedules import images_taken

IMAGE_CHANNELS = 3
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
FLOPS_PER_MAC = 2
# The backward pass computes a gradient for the input and one for the weight of every product. Recomputed activations
# are not counted: FLOPs are the model's, the convention of MFU.
TRAINING_OVER_FORWARD = 3


# ---------------------------------------------------------------------------------- vision transformer


FULL_ENCODING, NO_AGGREGATION = EncodingSettings(), AggregationSettings()


@dataclass(frozen=True)
class MimParameters:
    """Parameters of the pre-training model by part; all of them are trained."""

    # with its final norm and relative position table, without any head
    backbone: int
    token_head: int
    mask_token: int
    aggregation: int = 0  # the second branch's extra blocks
    decoder: int = 0  # without its mask token and token head

    @property
    def total(self) -> int:
        return self.backbone + self.token_head + self.mask_token + self.aggregation + self.decoder


def mim_parameters(
    model: ModelSettings,
    num_codes: int,
    *,
    encoding: EncodingSettings = FULL_ENCODING,
    aggregation: AggregationSettings = NO_AGGREGATION,
) -> MimParameters:
    """Parameters of backbone, mask token, linear head over `num_codes` codes, and what the variants add."""
    width, decoder = model.width, 0
    if encoding.kind == "visible":
        width = encoding.decoder_width
        blocks = encoding.decoder_depth * _block_parameters(width, _hidden(model, width), scaled=False)
        decoder = (
            (model.width + 1) * width + relative_positions(model.grid) * encoding.decoder_heads + blocks + 2 * width
        )
    return MimParameters(
        backbone=backbone_parameters(model),
        token_head=width * num_codes + num_codes,
        mask_token=width,
        aggregation=_extra_blocks(aggregation)
        * _block_parameters(model.width, _hidden(model), scaled=bool(model.layer_scale)),
        decoder=decoder,
    )


def backbone_parameters(model: ModelSettings, *, shared_bias: bool = True, num_classes: int = 0) -> int:
    """Parameters of timm's `Beit` of these sizes, without absolute position embedding.

    Args:
        shared_bias: one relative position table for all blocks (pre-training) or one a block (fine-tuning, releases).
        num_classes: outputs of a linear classifier; 0: none.
    Source: BEiT (arXiv 2106.08254): query and value have a bias, the key has none; two layer-scale vectors a block.
    """
    width = model.width
    block = _block_parameters(width, _hidden(model), scaled=bool(model.layer_scale))
    patch_embed = IMAGE_CHANNELS * model.patch_px**2 * width + width
    class_token, final_norm = width, 2 * width
    classifier = (width + 1) * num_classes
    tables = relative_positions(model.grid) * model.heads * (1 if shared_bias else model.depth)
    return patch_embed + class_token + model.depth * block + final_norm + tables + classifier


def _block_parameters(width: int, hidden: int, *, scaled: bool) -> int:
    attention = 4 * width**2 + 3 * width  # biases of query, value and output
    mlp = 2 * width * hidden + hidden + width
    norms = 2 * 2 * width
    return attention + mlp + norms + (2 * width if scaled else 0)


def relative_positions(grid: int) -> int:
    """Rows of a relative position table of a grid x grid image; three are for pairs with the class token."""
    return (2 * grid - 1) ** 2 + 3


def _hidden(model: ModelSettings, width: int | None = None) -> int:
    return int((width or model.width) * model.mlp_ratio)


def _extra_blocks(aggregation: AggregationSettings) -> int:
    return aggregation.blocks if aggregation.early_block else 0


@dataclass(frozen=True)
class MimMacs:
    """Multiply-accumulates of one image's forward pass."""

    backbone: int
    # at masked patches only, of both branches where there are two
    token_head: int
    aggregation: int = 0
    decoder: int = 0

    @property
    def total(self) -> int:
        return self.backbone + self.token_head + self.aggregation + self.decoder

    @property
    def training_flops(self) -> int:
        """FLOPs of forward and backward, an image."""
        return TRAINING_OVER_FORWARD * FLOPS_PER_MAC * self.total


def mim_macs(
    model: ModelSettings,
    *,
    num_codes: int,
    masked: int,
    encoding: EncodingSettings = FULL_ENCODING,
    aggregation: AggregationSettings = NO_AGGREGATION,
) -> MimMacs:
    """MACs of one image.

    Args:
        masked: masked patches of the image, the only ones the head sees.
        encoding: full: every token, hidden or not, goes through the encoder; visible: the shown ones alone, and all of
            them through the decoder.
    """
    patches, width = model.grid**2, model.width
    patch_embed = patches * IMAGE_CHANNELS * model.patch_px**2 * width
    if encoding.kind == "full":
        block, extra = _block_macs(patches + 1, width, _hidden(model)), _extra_blocks(aggregation)
        head = (2 if extra else 1) * masked * width * num_codes
        return MimMacs(backbone=patch_embed + model.depth * block, token_head=head, aggregation=extra * block)
    seen, narrow = patches - masked + 1, encoding.decoder_width
    # rows, then columns, of the table's T x T values
    bias = model.heads * seen * (patches + 1) * (patches + 1 + seen)
    decoder = seen * width * narrow + encoding.decoder_depth * _block_macs(patches + 1, narrow, _hidden(model, narrow))
    backbone = patch_embed + bias + model.depth * _block_macs(seen, width, _hidden(model))
    return MimMacs(backbone=backbone, token_head=masked * narrow * num_codes, decoder=decoder)


def _block_macs(tokens: int, width: int, hidden: int) -> int:
    """Projections, and the quadratic products query x key and weights x value."""
    return tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width


@dataclass(frozen=True)
class ActivationBytes:
    """Device memory of one image between its forward and its backward pass."""

    saved: int  # kept by autograd, and the model's outputs
    # gradients and recomputed tensors alive beside them at the worst moment
    working: int

    @property
    def total(self) -> int:
        return self.saved + self.working


def mim_activation_bytes(
    model: ModelSettings,
    *,
    num_codes: int,
    masked: int,
    checkpointing: str,
    precision: str,
    encoding: EncodingSettings = FULL_ENCODING,
    aggregation: AggregationSettings = NO_AGGREGATION,
) -> ActivationBytes:
    """Activations of one image, with an attention kernel that does not store the T x T weights.

    A block keeps, of T rows each: input and output of both norms (4 D), query, key and value (3 D), attention's output
    (D), the two branch outputs that layer scale multiplies (2 D), the MLP's hidden layer before and after GELU (2 F);
    and in 32 bits two statistics a row of each norm and one log-sum-exp a row of each head. With F = 4 D that is 36 T D
    bytes in 16 bits; the classic
    34 T D counts two dropout masks, which this network has not, and no layer scale. Beyond the blocks: the image,
    input and output of the final norm, and at M masked patches the head's input, its logits and the log-probabilities,
    these in 32 bits; a second branch has a norm and logits of its own. An encoder that sees n tokens has a bias of its
    own for each image, n x n a head.

    The working part is an estimate of the worst moment: in a block's backward pass the gradients of the hidden layer
    before and after GELU, of the block's input and of a branch, and of an attention bias that is an image's own, [H,
    T, T]; that of a shared one is summed some images at a time (at most 128 MiB a pass, not counted here); in the
    head's the gradient of the logits in both precisions. The caching allocator's fragmentation is not in it, nor is
    what an objective keeps beside the log-probabilities (soft targets are made some images at a time and not kept).

    Args:
        checkpointing: "none"; "full": every block keeps its input alone and is recomputed in the backward pass;
            "selective": beside it what the four matrix products and attention give, the rest is recomputed.
        precision: "bf16", "fp16" or "fp32".
    """
    assert checkpointing in ("none", "selective", "full"), checkpointing
    element, tokens, scaled = ELEMENT_BYTES[precision], model.grid**2 + 1, bool(model.layer_scale)
    image = IMAGE_CHANNELS * model.image_px**2 * element
    if encoding.kind == "visible":
        seen, narrow = tokens - masked, encoding.decoder_width
        encoder = _BlockActivations(seen, model.width, _hidden(model), model.heads, scaled, element, own_bias=True)
        decoder = _BlockActivations(tokens, narrow, _hidden(model, narrow), encoding.decoder_heads, False, element)
        stacks = [(model.depth, encoder), (encoding.decoder_depth, decoder)]
        # one-hot rows, and the bias they pick
        places = seen * tokens * element + model.heads * seen**2 * element
        # patches before those that are shown are picked, and before each is put at its place
        places += (tokens - 1) * (model.width + narrow) * element
        head, head_backward = _head_activations(masked, narrow, num_codes, element)
        ends = image + places + encoder.norm + decoder.norm + head
    else:
        block, extra = (
            _BlockActivations(tokens, model.width, _hidden(model), model.heads, scaled, element),
            _extra_blocks(aggregation),
        )
        stacks = [(model.depth + extra, block)]
        head, head_backward = _head_activations((2 if extra else 1) * masked, model.width, num_codes, element)
        # its last tokens; its norm, whose output goes into the head's input
        second_branch = block.input + masked * (model.width * element + 2 * 4) if extra else 0
        ends = image + block.norm + second_branch + head
    if checkpointing == "none":
        return ActivationBytes(
            saved=ends + sum(depth * block.saved for depth, block in stacks),
            working=max(head_backward, *(block.backward for _, block in stacks)),
        )
    kept = {"selective": _BlockActivations.products.fget, "full": _BlockActivations.input.fget}[checkpointing]
    recomputed = max(block.saved + block.backward - kept(block) for _, block in stacks)
    return ActivationBytes(
        saved=ends + sum(depth * kept(block) for depth, block in stacks), working=max(head_backward, recomputed)
    )


def own_bias_bytes(model: ModelSettings, checkpointing: str) -> int:
    """What blocks with a bias table each keep of it, [H, T, T] in float32, whatever the number of images.

    Recomputed, nothing.
    """
    return model.depth * model.heads * (model.grid**2 + 1) ** 2 * 4 if checkpointing == "none" else 0


def skipped_by_subsets(model: ModelSettings, micro_batch: int) -> float:
    """Share of the blocks' work that model.drop_path_by = subset leaves out of a pass: whole images, at least one of
    them taken.
    """
    rates = [model.drop_path * place / max(1, model.depth - 1) for place in range(model.depth)]
    return 1 - sum(images_taken(micro_batch, rate) for rate in rates) / (micro_batch * model.depth)


@dataclass(frozen=True)
class _BlockActivations:
    """Bytes of one image in one block, as `mim_activation_bytes` describes them."""

    tokens: int
    width: int
    hidden: int
    heads: int
    scaled: bool
    element: int
    own_bias: bool = False  # one an image

    @property
    def input(self) -> int:
        return self.tokens * self.width * self.element

    @property
    def products(self) -> int:
        """Input; query, key and value; attention's output and log-sums; its projection; both layers of the MLP."""
        return (
            self.tokens * ((1 + 3 + 1 + 1 + 1) * self.width + self.hidden) * self.element + self.tokens * 4 * self.heads
        )

    @property
    def norm(self) -> int:
        """Input, output and two statistics a row."""
        return self.tokens * (2 * self.width * self.element + 2 * 4)

    @property
    def saved(self) -> int:
        values = (8 + (2 if self.scaled else 0)) * self.width + 2 * self.hidden
        return self.tokens * values * self.element + self.tokens * (2 * 2 * 4 + 4 * self.heads)

    @property
    def backward(self) -> int:
        return (
            self.tokens * (2 * self.hidden + 2 * self.width) + self.own_bias * self.heads * self.tokens**2
        ) * self.element


def _head_activations(masked: int, width: int, num_codes: int, element: int) -> tuple[int, int]:
    """Bytes kept, and bytes at work in the backward pass, of the token head and the cross-entropy behind it."""
    return masked * (width * element + num_codes * (element + 4)), masked * num_codes * (element + 4)


# ------------------------------------------------------------------------------------------- tokenizer


@dataclass(frozen=True)
class Cost:
    """Of some layers of a tokenizer: parameters, forward MACs an image, elements an image kept for backward."""

    parameters: int = 0
    macs: int = 0
    saved: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.parameters + other.parameters, self.macs + other.macs, self.saved + other.saved)

    def times(self, count: int) -> Cost:
        return Cost(count * self.parameters, count * self.macs, count * self.saved)


@dataclass(frozen=True)
class TokenizerCost:
    encoder: Cost  # with the layers to the code's dimension
    # with the layers from it, and VQ-KD's to the teacher's
    decoder: Cost
    # codes, and the moving averages of their counts and sums: buffers, not parameters
    codebook_elements: int
    search_macs: int  # nearest-code search of an image

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


def tokenizer_cost(tokenizer: TokenizerSettings, image_px: int) -> TokenizerCost:
    """Cost of a tokenizer on an image of image_px x image_px.

    Of those that are read from released files (gumbel, dvae), who pick a code by its logit, the layer of
    logits is the search; a dvae's decoder, which nothing here trains or runs at scale, is left out.

    Source: of kind vqgan, VQGAN (arXiv 2012.09841), the f16 configuration of its released code, sizes of a PeCo
        stand-in; gumbel: its f8; vqkd: BEiT v2 (arXiv 2208.06366); dvae: DALL-E (arXiv 2102.12092).
    """
    grid = image_px // tokenizer.stride_px
    parts = {
        "vqgan": (_encoder, _decoder),
        "gumbel": (_gumbel_encoder, _decoder),
        "vqkd": (_vqkd_encoder, _vqkd_decoder),
        "dvae": (_dvae_encoder, _nothing),
    }
    encoder, decoder = parts[tokenizer.kind]
    searched = tokenizer.channels * tokenizer.channel_mults[-1] if tokenizer.kind == "dvae" else tokenizer.code_dim
    return TokenizerCost(
        encoder=encoder(tokenizer, image_px),
        decoder=decoder(tokenizer, image_px),
        codebook_elements=tokenizer.num_codes * (2 * tokenizer.code_dim + 1)
        if tokenizer.kind in ("vqgan", "vqkd")
        else 0,
        search_macs=grid**2 * searched * tokenizer.num_codes,
    )


def _nothing(tokenizer: TokenizerSettings, image_px: int) -> Cost:
    return Cost()


def _gumbel_encoder(tokenizer: TokenizerSettings, image_px: int) -> Cost:
    """VQGAN's, with a layer of logits behind it."""
    return _encoder(tokenizer, image_px) + Cost(
        (tokenizer.code_dim + 1) * tokenizer.num_codes, 0, tokenizer.code_dim * (image_px // tokenizer.stride_px) ** 2
    )


def _dvae_encoder(tokenizer: TokenizerSettings, image_px: int) -> Cost:
    """Blocks of four convolutions at a quarter of the width, and pooling between two groups."""
    width, size = tokenizer.channels, image_px
    cost = _conv(IMAGE_CHANNELS, width, 7, size)
    for level, mult in enumerate(tokenizer.channel_mults):
        out = tokenizer.channels * mult
        for _ in range(tokenizer.blocks_per_level):
            hidden = out // 4
            cost += (
                _conv(width, hidden, 3, size) + _conv(hidden, hidden, 3, size).times(2) + _conv(hidden, out, 1, size)
            )
            cost += _conv(width, out, 1, size) if width != out else Cost()
            width = out
        size //= 1 if level == len(tokenizer.channel_mults) - 1 else 2
    return cost + Cost((width + 1) * tokenizer.num_codes, 0, width * size**2)


def _vqkd_encoder(tokenizer: TokenizerSettings, image_px: int) -> Cost:
    vit = tokenizer.vit
    grid = image_px // vit.patch_px
    return _patch_transformer(
        IMAGE_CHANNELS, grid, vit.patch_px, vit.width, vit.depth, int(vit.width * vit.mlp_ratio)
    ) + _tanh_head(vit.width, tokenizer.code_dim, grid**2)


def _vqkd_decoder(tokenizer: TokenizerSettings, image_px: int) -> Cost:
    vit = tokenizer.vit
    grid = image_px // vit.patch_px
    blocks = _patch_transformer(
        tokenizer.code_dim, grid, 1, vit.decoder_width, vit.decoder_depth, int(vit.decoder_width * vit.mlp_ratio)
    )
    return blocks + _tanh_head(vit.decoder_width, vit.target_width, grid**2)


def _patch_transformer(channels: int, grid: int, patch_px: int, width: int, depth: int, hidden: int) -> Cost:
    """A ViT with absolute positions and a class token, without layer scale, down to its normed patch tokens.

    What a block keeps: `mim_activation_bytes`.
    """
    patches, tokens = grid**2, grid**2 + 1
    embedding = Cost(
        channels * patch_px**2 * width + width,
        patches * channels * patch_px**2 * width,
        channels * (grid * patch_px) ** 2,
    )
    positions_and_norm = Cost((tokens + 1) * width + 2 * width, 0, tokens * width + patches * width)
    block = Cost(
        4 * width**2 + 3 * width + 2 * width * hidden + hidden + width + 4 * width,
        tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width,
        tokens * (8 * width + 2 * hidden),
    )
    return embedding + block.times(depth) + positions_and_norm


def _tanh_head(width: int, out: int, positions: int) -> Cost:
    """Linear, tanh, linear at every position; keeps the input, tanh's output, and the output."""
    return Cost(
        width**2 + width + width * out + out, positions * (width**2 + width * out), positions * (2 * width + out)
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
    """Single head over all positions: four 1x1 convolutions.

    Keeps the norm's input, its output, query, key, value and the mixture.
    """
    positions = size**2
    return Cost(
        2 * width + 4 * (width**2 + width), 4 * width**2 * positions + 2 * positions**2 * width, 6 * width * positions
    )


def _norm_swish(width: int, size: int) -> Cost:
    return Cost(2 * width, 0, 2 * width * size**2)


def _conv(width: int, out: int, kernel: int, size: int, *, in_size: int | None = None) -> Cost:
    """`size` is the output's side in pixels, and the input's too unless `in_size` is given."""
    return Cost(kernel**2 * width * out + out, kernel**2 * width * out * size**2, width * (in_size or size) ** 2)
