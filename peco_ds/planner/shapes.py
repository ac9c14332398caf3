"""Parameters, multiply-accumulates and activation bytes of the networks, counted layer by layer from the settings.

Letters: N patches, T = N + 1 tokens, n tokens that the encoder sees, M masked patches, D width, F hidden width of the
MLP, H heads, L blocks, V codes. What a MAC counts: `peco_ds.costs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from peco_ds.config import AggregationSettings, EncodingSettings, ModelSettings, PretrainRecipe, TokenizerSettings
from peco_ds.costs import (
    FLOPS_PER_MAC,
    IMAGE_CHANNELS,
    TRAINING_OVER_FORWARD,
    Cost,
    ObjectiveCost,
    TokenizerCost,
)
from peco_ds.planner.attention_tiles import Form, form_of, score_gradient_bytes, unfused_weight_bytes
from peco_ds.registry import OBJECTIVES, TOKENIZERS
from peco_ds.schedules import images_taken

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


# ---------------------------------------------------------------------------------- vision transformer


FULL_ENCODING, NO_AGGREGATION = EncodingSettings(), AggregationSettings()


@dataclass(frozen=True)
class MimParameters:
    """Parameters of the pre-training model by part; all of them are trained."""

    # Includes the final norm and the relative position table, but no head.
    backbone: int
    token_head: int
    mask_token: int
    # Extra blocks of the second branch.
    aggregation: int = 0
    # The decoder without its mask token and token head.
    decoder: int = 0

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
    places = (model.grid**2 + 1) * model.width if model.absolute_positions else 0
    return patch_embed + class_token + places + model.depth * block + final_norm + tables + classifier


def _block_parameters(width: int, hidden: int, *, scaled: bool) -> int:
    # Query, value and output have biases; the key has none.
    attention = 4 * width**2 + 3 * width
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
    # The head runs at masked patches only, for both branches where there are two.
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
    # Two products pick rows, then columns, of the table's T x T values.
    bias = model.heads * seen * (patches + 1) * (patches + 1 + seen)
    decoder = seen * width * narrow + encoding.decoder_depth * _block_macs(patches + 1, narrow, _hidden(model, narrow))
    backbone = patch_embed + bias + model.depth * _block_macs(seen, width, _hidden(model))
    return MimMacs(backbone=backbone, token_head=masked * narrow * num_codes, decoder=decoder)


def _block_macs(tokens: int, width: int, hidden: int) -> int:
    """MACs of the projections, and of the quadratic products query x key and weights x value."""
    return tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width


@dataclass(frozen=True)
class ActivationBytes:
    """Device memory of one image between its forward and its backward pass."""

    # Tensors kept by autograd, and the model's outputs.
    saved: int
    # Gradients and recomputed tensors alive beside the saved ones at the worst moment.
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
    34 T D counts two dropout masks, which this network has not, and no layer scale. Folded layer scale keeps no branch
    output, and unfused attention keeps its weights instead of log-sums. Beyond the blocks: the image,
    input and output of the final norm, and at M masked patches the head's input, its logits and the log-probabilities,
    these in 32 bits; a second branch has a norm and logits of its own. An encoder that sees n tokens has a bias of its
    own for each image, n x n a head.

    The working part is an estimate of the worst moment: in a block's backward pass the gradients of the hidden layer
    before and after GELU, of the block's input and of a branch, and of an attention bias that is an image's own, [H,
    T, T]; or in attention's the gradient of the scores, of query, key, value and output, if that is more (above 2 GiB
    a pass they are taken some images at a time, which is not counted); in the head's the
    gradient of the logits in both precisions. The caching allocator's fragmentation is not in it, nor is what an
    objective keeps beside the log-probabilities (soft targets are made some images at a time and not kept).

    Args:
        checkpointing: "none"; "full": every block keeps its input alone and is recomputed in the backward pass;
            "selective": beside it what the four matrix products and attention give, the rest is recomputed.
        precision: "bf16", "fp16" or "fp32".
    """
    assert checkpointing in ("none", "selective", "full"), checkpointing
    element, tokens, form = ELEMENT_BYTES[precision], model.grid**2 + 1, form_of(model.attention)
    # Whether the branch outputs are kept.
    scaled = bool(model.layer_scale) and not model.fold_layer_scale
    image = IMAGE_CHANNELS * model.image_px**2 * element
    if encoding.kind == "visible":
        seen, narrow = tokens - masked, encoding.decoder_width
        encoder = _BlockActivations(seen, model.width, _hidden(model), model.heads, scaled, element, own_bias=True)
        hidden, decoder_heads = _hidden(model, narrow), encoding.decoder_heads
        decoder = _BlockActivations(tokens, narrow, hidden, decoder_heads, False, element, attention=form)
        stacks = [(model.depth, encoder), (encoding.decoder_depth, decoder)]
        # One-hot rows, and the bias that they pick.
        places = seen * tokens * element + model.heads * seen**2 * element
        # All patches before the visible ones are picked, and again before each is put at its place.
        places += (tokens - 1) * (model.width + narrow) * element
        head, head_backward = _head_activations(masked, narrow, num_codes, element)
        ends = image + places + encoder.norm + decoder.norm + head
    else:
        block, extra = (
            _BlockActivations(tokens, model.width, _hidden(model), model.heads, scaled, element, attention=form),
            _extra_blocks(aggregation),
        )
        stacks = [(model.depth + extra, block)]
        head, head_backward = _head_activations((2 if extra else 1) * masked, model.width, num_codes, element)
        # The second branch keeps its last tokens and what its norm needs; the norm's output goes into the head's input.
        second_branch = block.input + masked * (model.width * element + 2 * 4) if extra else 0
        ends = image + block.norm + second_branch + head
    if checkpointing == "none":
        return ActivationBytes(
            saved=ends + sum(depth * block.saved for depth, block in stacks),
            working=max(head_backward, *(block.backward for _, block in stacks)),
        )
    kept = attrgetter({"selective": "products", "full": "input"}[checkpointing])
    recomputed = max(block.saved + block.backward - kept(block) for _, block in stacks)
    return ActivationBytes(
        saved=ends + sum(depth * kept(block) for depth, block in stacks), working=max(head_backward, recomputed)
    )


def own_bias_bytes(model: ModelSettings, checkpointing: str) -> int:
    """What blocks with a bias table each keep of it, [H, T, T] in float32, whatever the number of images.

    Blocks that are recomputed keep nothing.
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
    # Whether each image has an attention bias of its own.
    own_bias: bool = False
    attention: Form = "fused"

    @property
    def input(self) -> int:
        return self.tokens * self.width * self.element

    @property
    def products(self) -> int:
        """Bytes of input, query, key, value, attention's output, log-sums and projection, both layers of the MLP."""
        return self.tokens * ((1 + 3 + 1 + 1 + 1) * self.width + self.hidden) * self.element + self.of_attention

    @property
    def of_attention(self) -> int:
        """Bytes that attention keeps beside its output: a log-sum a row in 32 bits, or the weights."""
        if self.attention == "unfused":
            return unfused_weight_bytes(self.tokens, self.heads, self.element)
        return self.tokens * 4 * self.heads

    @property
    def norm(self) -> int:
        """Bytes of input, output and two statistics a row."""
        return self.tokens * (2 * self.width * self.element + 2 * 4)

    @property
    def saved(self) -> int:
        values = (8 + (2 if self.scaled else 0)) * self.width + 2 * self.hidden
        return self.tokens * values * self.element + self.tokens * 2 * 2 * 4 + self.of_attention

    @property
    def backward(self) -> int:
        of_mlp = (
            self.tokens * (2 * self.hidden + 2 * self.width) + self.own_bias * self.heads * self.tokens**2
        ) * self.element
        scores = score_gradient_bytes(self.attention, self.tokens, self.heads, self.element)
        return max(of_mlp, self.tokens * 4 * self.width * self.element + scores)


def _head_activations(masked: int, width: int, num_codes: int, element: int) -> tuple[int, int]:
    """Bytes kept, and bytes at work in the backward pass, of the token head and the cross-entropy behind it."""
    return masked * (width * element + num_codes * (element + 4)), masked * num_codes * (element + 4)


# ------------------------------------------------------------------------------ tokenizers, objectives


def tokenizer_cost(tokenizer: TokenizerSettings, image_px: int) -> TokenizerCost:
    """Cost of a tokenizer on an image of image_px x image_px, as its kind tells it.

    For a kind that tells none, the images at either end and the search for the nearest code alone are counted.
    """
    cost = TOKENIZERS[tokenizer.kind].cost
    if cost is not None:
        return cost(tokenizer, image_px)
    codes = (image_px // tokenizer.stride_px) ** 2
    image = Cost(saved=IMAGE_CHANNELS * image_px**2)
    return TokenizerCost(image, image, 0, codes * tokenizer.code_dim * tokenizer.num_codes, known=False)


def objective_cost(recipe: PretrainRecipe) -> ObjectiveCost:
    """What a recipe's objective costs beside a cross-entropy with hard codes; nothing where it does not tell."""
    return OBJECTIVES[recipe.objective.name].cost(recipe) or ObjectiveCost()
