"""What a pass of a network costs, piece by piece: the units that ZeRO-3 gathers, in running order.

Products and convolutions are counted as `shapes.py` counts them. Beside them stand the kernels that only move data,
read off models/vit.py, models/attention.py, models/mim.py and the objectives, kernel by kernel (`block_kernels`): every
one reads its inputs from device memory and writes its outputs there. Eager runs one kernel an operation; torch.compile
makes one of what lies between two products, and reads a row once for a norm and what follows it. Operands of the
products
themselves are left out: their kernels load them while they multiply.

Letters: N patches, T tokens, D width, F hidden width, H heads, M masked patches, V codes, E bytes of an activation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from peco_ds.config import (
    AdversarialSettings,
    FinetuneRecipe,
    ModelSettings,
    PretrainRecipe,
    RunSettings,
    TokenizerRecipe,
    TokenizerSettings,
    TokenizerVitSettings,
    ViewSettings,
)
from peco_ds.planner.shapes import (
    ELEMENT_BYTES,
    FLOPS_PER_MAC,
    IMAGE_CHANNELS,
    Cost,
    relative_positions,
    tokenizer_cost,
)
from peco_ds.schedules import images_taken

# autocast: eager, weights and residual stream in float32, products in 16 bits
Kernels = Literal["compiled", "eager", "autocast"]

FP32_BYTES = 4
# models/attention.py: rows of the bias start at multiples of ALIGNMENT elements; its gradient is summed some images
# at a time, of at most SUM_BYTES.
ALIGNMENT, SUM_BYTES = 16, 2**27
# PyTorch sorts the T x T places of a bias table to add its gradient up: assumed 8 passes of a radix sort over keys and
# values of 8 bytes each, read and written.
SORT_BYTES = 8 * 2 * (8 + 8)


@dataclass(frozen=True)
class Work:
    """Of one image, in one direction."""

    # FLOP in matrix products, those of attention too
    products: float = 0.0
    convolutions: float = 0.0  # FLOP
    # read and written in device memory by the kernels that are neither
    moved_bytes: float = 0.0
    kernels: float = 0.0  # launched a pass, whatever its images
    # FLOP of `products` that run inside the attention kernel
    attention: float = 0.0
    # moved once a pass, whatever its images: bias tables, gradients of weights
    pass_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(_values(self), _values(other))))

    def times(self, count: float) -> Work:
        return Work(*(count * value for value in _values(self)))

    @property
    def flops(self) -> float:
        return self.products + self.convolutions


def _values(work: Work) -> tuple[float, ...]:
    return work.products, work.convolutions, work.moved_bytes, work.kernels, work.attention, work.pass_bytes


@dataclass(frozen=True)
class Segment:
    """A piece of a network that ZeRO-3 gathers as a whole, in running order: embedding, one block, head.

    Or a frozen network.
    """

    name: str
    parameters: int  # trained; 0: frozen
    tensors: int  # trained
    forward: Work
    # with what activation checkpointing and the attention kernel compute again
    backward: Work
    # of `backward`, what is computed again: no FLOP of the model
    recomputed: Work = Work()
    # of each trained tensor; () where they are not listed
    tensor_elements: tuple[int, ...] = ()
    precision: str = ""  # in which it computes; "": the run's
    # a network beside the model, whose FLOP are not the model's
    frozen: bool = False

    @property
    def model_flops(self) -> float:
        """FLOP of one image's forward and backward pass, recomputation not counted."""
        return self.forward.flops + self.backward.flops - self.recomputed.flops


def model_flops(segments: Iterable[Segment]) -> float:
    """FLOP of one image's forward and backward pass.

    Frozen networks beside the model and recomputation not counted.
    """
    return sum(segment.model_flops for segment in segments if not segment.frozen)


# ------------------------------------------------------------------------------- one transformer block


@dataclass(frozen=True)
class BlockShape:
    """A transformer block as its kernels see it."""

    tokens: int
    width: int
    hidden: int
    heads: int
    element: int  # E
    kernels: Kernels
    scaled: bool = False  # layer scale
    dropped: bool = False  # stochastic depth, by image
    # a table for all blocks; one of this block; values of each image, made outside
    bias: Literal["none", "shared", "own", "image"] = "none"
    trained: bool = True

    @property
    def stream(self) -> int:
        """Bytes of an element of the residual stream and of the norms."""
        return FP32_BYTES if self.kernels == "autocast" else self.element

    @property
    def scores(self) -> int:
        return self.heads * self.tokens**2

    @property
    def tensor_elements(self) -> tuple[int, ...]:
        """Of the block's parameters, without a bias table: both norms, query and value bias, projections, MLP, layer
        scale.
        """
        width, hidden = self.width, self.hidden
        found = [width] * 4 + [
            width,
            width,
            3 * width * width,
            width * width,
            width,
            hidden * width,
            hidden,
            width * hidden,
            width,
        ]
        return tuple(found + [width, width] if self.scaled else found)


@dataclass(frozen=True)
class Kernel:
    """Some kernels of one kind in a block's pass that only move data."""

    what: str
    launches: float
    moved_bytes: float  # of one image
    # False: on the residual stream, for every image
    in_branch: bool = True


def block_kernels(block: BlockShape) -> tuple[list[Kernel], list[Kernel]]:
    """What moves data in a block's forward and backward pass beside the products, an image.

    Rows are of T D elements, of T F for the MLP's hidden layer. Attention reads and writes its operands while it
    multiplies, as products do.
    """
    return (_compiled if block.kernels == "compiled" else _eager)(block)


def _eager(block: BlockShape) -> tuple[list[Kernel], list[Kernel]]:
    """R: bytes of an element of the residual stream.  S: of what a branch adds to it."""
    E, R = block.element, block.stream
    row, hidden_row = block.tokens * block.width, block.tokens * block.hidden
    autocast, scaled, dropped = block.kernels == "autocast", block.scaled, block.dropped
    # under autocast layer scale is a product with float32 weights
    S = R if scaled else E
    forward = [
        Kernel("norms: read, write", 2, 2 * row * 2 * R),
        Kernel("query, key and value bias put together", 3, 0),
        Kernel("GELU: read, write", 1, hidden_row * 2 * E),
        Kernel("sums with the residual stream: read both, write", 2, 2 * row * (2 * R + S), in_branch=False),
    ]
    backward = [
        Kernel("gradients of both paths into a sum: read both, write", 2, 2 * row * 3 * R, in_branch=False),
        Kernel("GELU: read gradient and input, write", 1, hidden_row * 3 * E),
        Kernel("norms: read gradient and input, write; read both again for weight and bias", 4, 2 * row * 5 * R),
    ]
    if block.trained:
        backward.append(
            Kernel(
                "gradients of the biases: read gradients of query, key, value, projection, MLP",
                4,
                (5 * row + hidden_row) * E,
            )
        )
    if autocast:
        forward.append(Kernel("norms' outputs cast to 16 bits", 2, 2 * row * (R + E)))
        backward.append(Kernel("gradients of norms' outputs cast to float32", 2, 2 * row * (R + E)))
        if not scaled:
            backward.append(Kernel("gradients of branches cast to 16 bits", 2, 2 * row * (R + E)))
    if scaled:
        forward.append(Kernel("layer scale: read, write", 2, 2 * row * (E + S)))
        backward.append(
            Kernel(
                "layer scale: gradient times scale; gradient times branch, and its sum",
                6,
                2 * row * ((R + E) + (R + E + R) + R),
            )
        )
    if dropped:
        forward.append(Kernel("stochastic depth: draws; read, write", 7, 2 * row * 2 * S))
        backward.append(Kernel("stochastic depth: read, write", 2, 2 * row * 2 * S))
    return forward, backward + _attention_moves(block)


def _compiled(block: BlockShape) -> tuple[list[Kernel], list[Kernel]]:
    """What torch.compile's own list of the kernels of a block shows.

    Sums over a batch's rows read their operand again.
    """
    E, row, hidden_row = block.element, block.tokens * block.width, block.tokens * block.hidden
    scale = 1 if block.scaled else 0
    forward = [
        Kernel("first norm: read, write", 1, row * 2 * E),
        Kernel("first branch scaled and added, second norm: read branch and stream, write", 1, row * 3 * E),
        Kernel("GELU: read, write", 1, hidden_row * 2 * E),
        Kernel("both branches scaled and added: read them and the stream, write", 1, row * 4 * E, in_branch=False),
    ]
    backward = [
        Kernel(
            "second branch: gradient read for the bias; scaled, and with the branch for the scale",
            1 + 2 * scale,
            row * (1 + 4 * scale) * E,
        ),
        Kernel("GELU: read gradient and input, write; bias", 2, hidden_row * 4 * E),
        Kernel(
            "second norm, sum with the residual stream, first branch scaled; sums for weights, biases, "
            "scale read again",
            3 + 2 * scale,
            row * (8 + 4 * scale) * E,
        ),
        Kernel("query, key and value bias", 1, row * 3 * E),
        Kernel("first norm, sum with the residual stream; sums for weight and bias read again", 2, row * 6 * E),
    ]
    return forward, backward + _attention_moves(block)


def _attention_moves(block: BlockShape) -> list[Kernel]:
    """Of the backward pass: the attention operator is opaque to the compiler, so it costs the same either way."""
    E, row = block.element, block.tokens * block.width
    found = [Kernel("gradients of query, key and value copied together", 3, row * 6 * E)]
    if block.bias == "none":
        return found
    if block.bias == "image":
        return [
            *found,
            Kernel(
                "gradient of the bias: written, read, and added to that of the other blocks",
                2,
                block.scores * (2 + 3) * E,
            ),
        ]
    padded = block.heads * block.tokens * _aligned(block.tokens)
    together = max(1, SUM_BYTES // (padded * E))
    return [
        *found,
        Kernel(
            "gradient of the bias: written once an image, read, summed some images at a time",
            3,
            2 * padded * E + 4 * FP32_BYTES * block.scores / together,
        ),
    ]


def _aligned(tokens: int) -> int:
    return -(-tokens // ALIGNMENT) * ALIGNMENT


def block_work(block: BlockShape, *, share: float = 1.0) -> tuple[Work, Work, Work]:
    """Forward, backward, and what the backward pass computes again by itself, of one image.

    Args:
        share: of a pass's images that take a branch (model.drop_path_by = subset). They are gathered before it and
            added at their places behind it.
    """
    tokens, width = block.tokens, block.width
    linear = share * FLOPS_PER_MAC * tokens * (4 * width**2 + 2 * width * block.hidden)
    quadratic = share * FLOPS_PER_MAC * 2 * tokens**2 * width
    again = quadratic / 2  # query times key
    moves = [
        Work(
            moved_bytes=sum(item.moved_bytes * (share if item.in_branch else 1) for item in side),
            kernels=sum(item.launches for item in side),
        )
        for side in block_kernels(block)
    ]
    if share < 1:
        # Of both branches. Forward: gathered, scaled, and added at their places to a copy of all. Backward: gathered,
        # scaled, zeros for all, added at their places.
        both = 2 * tokens * width * block.element
        moves[0] += Work(moved_bytes=both * (2 * share + 2 * share + 2 * share), kernels=10)
        moves[1] += Work(moved_bytes=both * (2 * share + 2 * share + 1 + 3 * share), kernels=10)
    table, parameters = _table_bytes(block), sum(block.tensor_elements)
    # of the weights, and of their gradients back
    casts = parameters * (FP32_BYTES + block.element) if block.kernels == "autocast" else 0
    launched = 2 if block.kernels == "compiled" else 3  # bias cast and padded, the kernel
    forward = moves[0] + Work(
        products=linear + quadratic, attention=quadratic, kernels=4 + launched, pass_bytes=table[0] + casts
    )
    if not block.trained:  # gradients of inputs alone
        return (
            forward,
            moves[1] + Work(products=linear + 2 * quadratic + again, attention=2 * quadratic + again, kernels=4 + 2),
            Work(products=again, attention=again),
        )
    backward = moves[1] + Work(
        products=2 * (linear + quadratic) + again,
        attention=2 * quadratic + again,
        kernels=8 + launched + 4 + 2 * len(block.tensor_elements),
        pass_bytes=table[1] + gradient_sum_bytes(parameters, block.element) + casts,
    )
    return forward, backward, Work(products=again, attention=again)


def _table_bytes(block: BlockShape) -> tuple[float, float]:
    """Of the bias, once a pass.

    Forward: cast, padded, and for a table of the block's own spread out. Backward: the same casts, zeros for its
    gradient, and that added to the
    other blocks' or summed into the table."""
    if block.bias in ("none", "image"):
        return 0.0, 0.0
    padded = block.heads * block.tokens * _aligned(block.tokens)
    cast = block.scores * (FP32_BYTES + block.element) + padded * 2 * block.element
    spread = block.scores * 3 * FP32_BYTES + 8 * block.tokens**2 if block.bias == "own" else 0
    gathered = block.scores * 3 * FP32_BYTES + (SORT_BYTES * block.tokens**2 if block.bias == "own" else 0)
    return cast + spread, cast + FP32_BYTES * block.scores + gathered


def gradient_sum_bytes(parameters: int, element: int) -> float:
    """Moved once a pass for gradients of weights: each read in its own type and added to a float32 sum, as
    data_types.grad_accum_dtype fp32 asks.
    """
    return parameters * (element + 2 * FP32_BYTES)


# ------------------------------------------------------------------------ pre-training and fine-tuning


def kernels_of(run: RunSettings) -> Kernels:
    """What run.compile comes to on a GPU (`runtime.engine.compiles`)."""
    return "compiled" if run.compile == "blocks" or (run.compile == "auto" and run.layer_norm == "torch") else "eager"


def pretrain_segments(recipe: PretrainRecipe) -> tuple[Segment, ...]:
    """Embedding with mask token, class token and bias table.

    Blocks; where there are, those of the second branch, or the decoder's; head with final norm, token head and loss.
    """
    model, run, encoding = recipe.model, recipe.run, recipe.encoding
    element, patches, masked = ELEMENT_BYTES[run.precision], model.grid**2, recipe.mask.count
    if encoding.kind == "visible":
        return _visible_segments(recipe)
    width, extra = model.width, recipe.aggregation.blocks if recipe.aggregation.early_block else 0
    blocks = [
        _block_segment(f"block {number}", _block_of(model, run, number), model, run, number)
        for number in range(model.depth)
    ]
    # The second branch's blocks have the rates of the backbone's blocks in their place; what they save or cost differs
    # by nothing that counts.
    blocks += [
        _block_segment(
            f"second branch, block {number}", _block_of(model, run, model.depth - 1), model, run, model.depth - 1
        )
        for number in range(extra)
    ]
    table = relative_positions(model.grid) * model.heads
    embedding = _embedding(model, element, (_patch_weights(model), width, width, width, table))
    spread = 3 * FP32_BYTES * model.heads * (patches + 1) ** 2
    embedding = replace(
        embedding,
        forward=embedding.forward + Work(pass_bytes=spread),
        backward=embedding.backward + Work(pass_bytes=spread + SORT_BYTES * (patches + 1) ** 2),
    )
    head = _head(recipe, width, patches + 1, (2 if extra else 1) * masked, element)
    return (embedding, *blocks, head)


def finetune_segments(recipe: FinetuneRecipe, num_classes: int) -> tuple[Segment, ...]:
    """Embedding with class token; blocks with a bias table each; head with pooling, norm and classifier."""
    model, run = recipe.model, recipe.run
    element, width, tokens = ELEMENT_BYTES[run.precision], model.width, model.grid**2 + 1
    blocks = [
        _block_segment(f"block {number}", replace(_block_of(model, run, number), bias="own"), model, run, number)
        for number in range(model.depth)
    ]
    flops = FLOPS_PER_MAC * width * num_classes
    row = tokens * width * element
    elements = (width, width, width * num_classes, num_classes)
    head = Segment(
        "head",
        sum(elements),
        len(elements),
        forward=Work(products=flops, moved_bytes=row + num_classes * 20, kernels=15),
        backward=Work(
            products=2 * flops,
            moved_bytes=row + num_classes * 20,
            kernels=25,
            pass_bytes=gradient_sum_bytes(sum(elements), element),
        ),
        tensor_elements=elements,
    )
    return (_embedding(model, element, (_patch_weights(model), width, width)), *blocks, head)


def _patch_weights(model: ModelSettings) -> int:
    return IMAGE_CHANNELS * model.patch_px**2 * model.width


def _block_of(model: ModelSettings, run: RunSettings, number: int) -> BlockShape:
    return BlockShape(
        tokens=model.grid**2 + 1,
        width=model.width,
        hidden=int(model.width * model.mlp_ratio),
        heads=model.heads,
        element=ELEMENT_BYTES[run.precision],
        kernels=kernels_of(run),
        scaled=bool(model.layer_scale),
        dropped=model.drop_path_by == "image" and _rate(model, number) > 0,
        bias="shared",
    )


def _rate(model: ModelSettings, number: int) -> float:
    return model.drop_path * number / max(1, model.depth - 1)


def _block_segment(name: str, block: BlockShape, model: ModelSettings | None, run: RunSettings, number: int) -> Segment:
    """
    Args:
        model: whose stochastic depth applies; None: none does.
    """
    share = 1.0
    if model is not None and model.drop_path_by == "subset" and _rate(model, number) > 0:
        share = images_taken(run.micro_batch, _rate(model, number)) / run.micro_batch
    forward, backward, again = block_work(block, share=share)
    if run.activation_checkpointing == "full":
        again += forward
        backward += forward
    elif run.activation_checkpointing == "selective":
        kept = Work(moved_bytes=forward.moved_bytes, kernels=forward.kernels - 5)
        again += kept
        backward += kept
    elements = block.tensor_elements
    if block.bias == "own":
        elements = (relative_positions(round((block.tokens - 1) ** 0.5)) * block.heads, *elements)
        backward += Work(pass_bytes=gradient_sum_bytes(elements[0], block.element))
    return Segment(name, sum(elements), len(elements), forward, backward, again, elements)


def _embedding(model: ModelSettings, element: int, elements: tuple[int, ...], *, mask_tokens: bool = True) -> Segment:
    """Image read in float32 and cast, patches by a convolution, mask tokens put in their places, class token put
    before them.
    """
    patches, width = model.grid**2, model.width
    flops = FLOPS_PER_MAC * patches * _patch_weights(model)
    row, image = patches * width * element, IMAGE_CHANNELS * model.image_px**2
    moves = 4 if mask_tokens else 2
    return Segment(
        "embedding",
        sum(elements),
        len(elements),
        forward=Work(convolutions=flops, moved_bytes=image * (FP32_BYTES + element) + moves * row, kernels=14),
        # The image wants no gradient: the weight's alone.
        backward=Work(
            convolutions=flops,
            moved_bytes=(moves + 1) * row,
            kernels=12 + 2 * len(elements),
            pass_bytes=gradient_sum_bytes(sum(elements), element),
        ),
        tensor_elements=elements,
    )


def _head(recipe: PretrainRecipe, width: int, tokens: int, predicted: int, element: int) -> Segment:
    """Final norm, the masked places picked, token head, cross-entropy and accuracy; of soft codes also the targets."""
    codes, patches = recipe.objective.num_codes, recipe.model.grid**2
    logits, flops = predicted * codes, FLOPS_PER_MAC * predicted * width * codes
    # Logits cast to float32, log-softmax, arg max; backward the loss's gradient, that of log-softmax, cast, the bias's
    # sum.
    forward_bytes = logits * ((element + FP32_BYTES) + 2 * FP32_BYTES + element)
    backward_bytes = logits * (FP32_BYTES + 3 * FP32_BYTES + (FP32_BYTES + element) + element)
    kernels, targets = 14, 0.0
    if recipe.objective.name == "multi_choice":
        # The dense choices [N, V] in float32, filled, scattered into, read by a product with every masked patch; all of
        # it again in the backward pass.
        targets, forward_bytes = (
            FLOPS_PER_MAC * predicted * patches * codes,
            forward_bytes + patches * codes * 4 * FP32_BYTES,
        )
        backward_bytes, kernels = backward_bytes + forward_bytes, 60
    row, picked = tokens * width * element, predicted * width * element
    elements = (width, width, width * codes, codes)
    return Segment(
        "head",
        sum(elements),
        len(elements),
        forward=Work(products=flops, moved_bytes=2 * row + 2 * picked + forward_bytes, kernels=kernels),
        backward=Work(
            products=2 * flops,
            moved_bytes=6 * row + 3 * picked + backward_bytes,
            kernels=2 * kernels,
            pass_bytes=gradient_sum_bytes(sum(elements), element),
        ),
        tensor_elements=elements,
    )


def _visible_segments(recipe: PretrainRecipe) -> tuple[Segment, ...]:
    model, run, encoding = recipe.model, recipe.run, recipe.encoding
    element, tokens, masked, width, narrow = (
        ELEMENT_BYTES[run.precision],
        model.grid**2 + 1,
        recipe.mask.count,
        model.width,
        encoding.decoder_width,
    )
    seen, table = tokens - masked, relative_positions(model.grid)
    embedding = _embedding(
        model, element, (_patch_weights(model), width, width, table * model.heads), mask_tokens=False
    )
    # The bias of the visible places: rows, then columns, of the whole one, picked by products with one-hot rows.
    picks = FLOPS_PER_MAC * model.heads * seen * tokens * (tokens + seen)
    picked = (2 * model.heads * seen * tokens + 4 * model.heads * seen**2) * element + 3 * seen * width * element
    embedding = replace(
        embedding,
        forward=embedding.forward + Work(products=picks, moved_bytes=picked, kernels=20),
        backward=embedding.backward
        + Work(products=picks, moved_bytes=picked, kernels=20, pass_bytes=SORT_BYTES * tokens**2),
    )
    encoder = BlockShape(
        seen,
        width,
        int(width * model.mlp_ratio),
        model.heads,
        element,
        kernels_of(run),
        bool(model.layer_scale),
        bias="image",
    )
    decoder = BlockShape(
        tokens, narrow, int(narrow * model.mlp_ratio), encoding.decoder_heads, element, kernels_of(run), bias="shared"
    )
    blocks = [
        _block_segment(
            f"block {number}",
            replace(encoder, dropped=model.drop_path_by == "image" and _rate(model, number) > 0),
            model,
            run,
            number,
        )
        for number in range(model.depth)
    ]
    flops = FLOPS_PER_MAC * seen * width * narrow
    elements = (width, width, width * narrow, narrow, narrow, table * encoding.decoder_heads)
    places = tokens * narrow * element
    between = Segment(
        "decoder's embedding",
        sum(elements),
        len(elements),
        forward=Work(products=flops, moved_bytes=2 * seen * width * element + 6 * places, kernels=12),
        backward=Work(
            products=2 * flops,
            moved_bytes=5 * seen * width * element + 8 * places,
            kernels=30,
            pass_bytes=gradient_sum_bytes(sum(elements), element) + SORT_BYTES * tokens**2,
        ),
        tensor_elements=elements,
    )
    return (
        embedding,
        *blocks,
        between,
        *(
            _block_segment(f"decoder, block {number}", decoder, None, run, number)
            for number in range(encoding.decoder_depth)
        ),
        _head(recipe, narrow, tokens, masked, element),
    )


# ------------------------------------------------------------------------------------------ tokenizers

# Of a convolutional network, in maps a layer of norm, activation and convolution, of which autograd keeps
# SAVED_A_LAYER: what eager kernels read and write. A norm reads its input twice; cuDNN turns the convolution's operands
# round, because eager norms give them back channels first: assumed, a read and a write of each.
SAVED_A_LAYER = 3
EAGER_FORWARD = {"norm": 3, "activation": 2, "sums and padding": 2, "order of channels": 4}
EAGER_BACKWARD = {"norm": 5, "activation": 3, "sums and padding": 2, "order of channels": 6, "bias": 1}
COMPILED_FORWARD = {"statistics of the norm": 1, "norm and activation": 2, "sums and padding": 2}


@dataclass(frozen=True)
class FrozenBytes:
    """Device memory of the frozen network beside a tokenizer."""

    weights: float
    a_image: float


@dataclass(frozen=True)
class FrozenVit:
    """A ViT that judges or teaches, as far as its recipe names it."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    patch_px: int = 16
    image_px: int = 224

    def block(self, element: int) -> BlockShape:
        tokens = (self.image_px // self.patch_px) ** 2 + 1
        return BlockShape(tokens, self.width, 4 * self.width, self.heads, element, "eager", trained=False)

    @property
    def parameters(self) -> int:
        block = 12 * self.width**2 + 13 * self.width
        tokens = (self.image_px // self.patch_px) ** 2 + 1
        return self.depth * block + (IMAGE_CHANNELS * self.patch_px**2 + 1 + 1 + tokens + 2) * self.width


_VIT_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


def _frozen_vit(architecture: str, image_px: int) -> FrozenVit:
    """By timm's name.

    A file's own sizes are not read, so without a name it is ViT-B/16, that of MoCo v3, DINO and CLIP which the recipes
    name.
    """
    found = re.search(r"(tiny|small|base|large|huge)_patch(\d+)", architecture)
    width, depth, heads = _VIT_SIZES[found[1]] if found else _VIT_SIZES["base"]
    return FrozenVit(width, depth, heads, int(found[2]) if found else 16, image_px or 224)


def tokenizer_segments(recipe: TokenizerRecipe) -> tuple[Segment, ...]:
    """Encoder, nearest code, decoder.

    A critic where there is one; the frozen judge, which sees both images and hands a gradient to one, or the frozen
    teacher.

    Both frozen networks compute in float32 whatever the run's precision, on the tokenizer's own images.
    """
    tokenizer, size, element = recipe.tokenizer, recipe.views.tokenizer_px, ELEMENT_BYTES[recipe.run.precision]
    cost = tokenizer_cost(tokenizer, size)
    codes = (size // tokenizer.stride_px) ** 2
    if tokenizer.kind == "vqkd":
        vit, grid = tokenizer.vit, size // tokenizer.stride_px
        encoder = _transformer_segment(
            "encoder", cost.encoder, vit.depth, _vit_block(vit, grid, element, decoder=False)
        )
        decoder = _transformer_segment(
            "decoder", cost.decoder, vit.decoder_depth, _vit_block(vit, grid, element, decoder=True)
        )
    else:
        encoder = _autoencoder_segment("encoder", tokenizer, cost.encoder, codes, tokenizer.blocks_per_level, element)
        decoder = _autoencoder_segment(
            "decoder", tokenizer, cost.decoder, codes, tokenizer.blocks_per_level + 1, element
        )
    search = _search_segment(tokenizer, cost.search_macs, codes)
    critic = [_critic_segment(recipe.adversarial, size, element)] if recipe.adversarial.weight else []
    return (encoder, search, decoder, *critic, *_frozen_segments(recipe))


def tokenizing_segments(tokenizer: TokenizerSettings, views: ViewSettings) -> tuple[Segment, ...]:
    """Of one view of one image: the encoder and the code of each patch, forward alone; compiled, as on a GPU."""
    size, element = views.tokenizer_px, ELEMENT_BYTES[views.tokenizer_precision]
    codes = (size // tokenizer.stride_px) ** 2
    # softmax over all codes, and the likeliest of them picked
    soft = codes * tokenizer.num_codes * FP32_BYTES * (6 if views.topk else 0)
    cost = tokenizer_cost(tokenizer, size)
    if tokenizer.kind == "vqkd":
        block = replace(
            _vit_block(tokenizer.vit, size // tokenizer.stride_px, element, decoder=False), kernels="compiled"
        )
        trunk = _transformer_segment("encoder", cost.encoder, tokenizer.vit.depth, block)
    elif tokenizer.kind == "dvae":
        trunk = _convolution_segment(
            "encoder",
            cost.encoder,
            0.0,
            element,
            convolutions=4 * tokenizer.blocks_per_level * len(tokenizer.channel_mults) + 1,
            tensors=0,
            compiled=True,
        )
    else:
        trunk = _autoencoder_segment(
            "encoder", tokenizer, cost.encoder, codes, tokenizer.blocks_per_level, element, compiled=True
        )
    choose = _search_segment(tokenizer, cost.search_macs, codes)
    choose = replace(choose, forward=choose.forward + Work(moved_bytes=soft))
    return tuple(
        replace(segment, parameters=0, tensors=0, backward=Work(), recomputed=Work(), tensor_elements=())
        for segment in (trunk, choose)
    )


def frozen_net_bytes(recipe: TokenizerRecipe) -> FrozenBytes:
    """Device memory of the judge or teacher: float32 weights.

    Of an image, what the judge keeps of the reconstruction for its gradient, or the teacher's features.

    A frozen block keeps no operand of its linear layers: of T D values the inputs of both norms, query, key, value and
    attention's output; of T F the input of GELU.
    """
    vit = _frozen_net(recipe)
    if vit is None:
        return FrozenBytes(0.0, 0.0)
    tokens = (vit.image_px // vit.patch_px) ** 2 + 1
    if recipe.tokenizer.kind == "vqkd":
        working = tokens * 2 * (4 * vit.width) * FP32_BYTES  # of the one layer that runs
        return FrozenBytes(
            FP32_BYTES * vit.parameters, working + (tokens - 1) * recipe.tokenizer.vit.target_width * FP32_BYTES
        )
    block = tokens * (6 * vit.width + 4 * vit.width) * FP32_BYTES
    # features of both images and their difference
    kept = (tokens - 1) * vit.width * FP32_BYTES * 3 * len(recipe.perceptual.blocks)
    return FrozenBytes(
        FP32_BYTES * vit.parameters,
        max(recipe.perceptual.blocks, default=0) * block + kept + 2 * IMAGE_CHANNELS * vit.image_px**2 * FP32_BYTES,
    )


def _frozen_net(recipe: TokenizerRecipe) -> FrozenVit | None:
    if recipe.tokenizer.kind == "vqkd":
        return _frozen_vit(recipe.teacher.architecture, recipe.teacher.image_px)
    return _frozen_vit(recipe.perceptual.architecture, recipe.perceptual.image_px) if recipe.perceptual.weight else None


def _frozen_segments(recipe: TokenizerRecipe) -> list[Segment]:
    vit = _frozen_net(recipe)
    if vit is None:
        return []
    forward, backward, _ = block_work(vit.block(FP32_BYTES))
    values = IMAGE_CHANNELS * vit.image_px**2
    patches = Work(convolutions=FLOPS_PER_MAC * values * vit.width, moved_bytes=6 * values * FP32_BYTES, kernels=10)
    if recipe.tokenizer.kind == "vqkd":
        return [Segment("teacher", 0, 0, patches + forward.times(vit.depth), Work(), precision="fp32", frozen=True)]
    depth = min(vit.depth, max(recipe.perceptual.blocks))
    return [
        Segment(
            "judge",
            0,
            0,
            (patches + forward.times(depth)).times(2),
            patches + backward.times(depth),
            precision="fp32",
            frozen=True,
        )
    ]


def _vit_block(vit: TokenizerVitSettings, grid: int, element: int, *, decoder: bool) -> BlockShape:
    width, heads = (vit.decoder_width, vit.decoder_heads) if decoder else (vit.width, vit.heads)
    return BlockShape(grid**2 + 1, width, int(width * vit.mlp_ratio), heads, element, "eager")


def _transformer_segment(name: str, cost: Cost, depth: int, block: BlockShape) -> Segment:
    forward, backward, again = (work.times(depth) for work in block_work(block))
    # patches, and the layers to or from the codes
    rest = FLOPS_PER_MAC * cost.macs - forward.flops
    row = block.tokens * block.width * block.element
    ends = Work(products=rest, moved_bytes=12 * row, kernels=20)
    return Segment(
        name,
        cost.parameters,
        13 * depth + 10,
        forward + ends,
        backward + ends + Work(products=rest, moved_bytes=8 * row, kernels=30),
        again,
    )


def _autoencoder_segment(
    name: str,
    tokenizer: TokenizerSettings,
    cost: Cost,
    positions: int,
    blocks: int,
    element: int,
    *,
    compiled: bool = False,
) -> Segment:
    """One side of VQGAN's autoencoder.

    Args:
        positions: codes of an image.  blocks: residual blocks a level.
    """
    widths = [tokenizer.channels * multiplier for multiplier in tokenizer.channel_mults]
    # two residual blocks in the middle, and attention between them
    residual, attending = blocks * len(widths) + 2, blocks + 1 if tokenizer.attention else 0
    changes = sum(before != after for before, after in zip(widths, widths[1:])) + (
        name == "encoder" and widths[0] != tokenizer.channels
    )
    # changes of size, first and last, to or from the code
    convolutions = 2 * residual + changes + 2 * attending + len(widths) - 1 + 3
    norms = 2 * residual + attending + 1
    quadratic = attending * 2 * FLOPS_PER_MAC * positions**2 * widths[-1]
    return _convolution_segment(
        name, cost, quadratic, element, convolutions=convolutions, tensors=2 * (convolutions + norms), compiled=compiled
    )


def _convolution_segment(
    name: str, cost: Cost, attention: float, element: int, *, convolutions: int, tensors: int, compiled: bool = False
) -> Segment:
    """
    Args:
        attention: FLOP of query x key and weights x value, an image.
        convolutions: layers, each with a norm and an activation.
    """
    flops, saved = FLOPS_PER_MAC * cost.macs, cost.saved * element
    forward = Work(
        products=attention,
        convolutions=flops - attention,
        attention=attention,
        moved_bytes=sum((COMPILED_FORWARD if compiled else EAGER_FORWARD).values()) / SAVED_A_LAYER * saved,
        kernels=(2 if compiled else 5) * convolutions,
    )
    again = Work(products=attention / 2, attention=attention / 2)
    backward = Work(
        products=2.5 * attention,
        convolutions=2 * (flops - attention),
        attention=2.5 * attention,
        moved_bytes=sum(EAGER_BACKWARD.values()) / SAVED_A_LAYER * saved,
        kernels=10 * convolutions + 2 * tensors,
        pass_bytes=gradient_sum_bytes(cost.parameters, element),
    )
    return Segment(name, cost.parameters, tensors, forward, backward, again)


def _search_segment(tokenizer: TokenizerSettings, macs: int, codes: int) -> Segment:
    """Every patch against every code in float32: similarities written, turned into distances, their smallest found.

    Statistics for the moving averages.
    """
    similarities, features = codes * tokenizer.num_codes * FP32_BYTES, codes * tokenizer.code_dim * FP32_BYTES
    forward = Work(products=FLOPS_PER_MAC * macs, moved_bytes=3 * similarities + 12 * features, kernels=30)
    return Segment("nearest code", 0, 0, forward, Work(moved_bytes=4 * features, kernels=5), precision="fp32")


def _critic_segment(adversarial: AdversarialSettings, size: int, element: int) -> Segment:
    """PatchGAN: three forward passes (the image, the reconstruction with and without its gradient), backward through
    all of them.
    """
    widths = [adversarial.channels * min(2**index, 8) for index in range(adversarial.layers + 1)]
    cost, before, side = Cost(), IMAGE_CHANNELS, size
    for index, width in enumerate([*widths, 1]):
        stride = 2 if index < adversarial.layers else 1
        smaller = (side + 2 - 4) // stride + 1
        first_or_last = index in (0, len(widths))
        parameters = 16 * before * width + (width if first_or_last else 2 * width)
        cost += Cost(
            parameters,
            16 * before * width * smaller**2,
            before * side**2 + (0 if first_or_last else 2 * width * smaller**2),
        )
        before, side = width, smaller
    passed = _convolution_segment(
        "critic", cost, 0.0, element, convolutions=len(widths) + 1, tensors=2 + 3 * adversarial.layers + 2
    )
    return replace(passed, forward=passed.forward.times(3), backward=passed.backward.times(3))
