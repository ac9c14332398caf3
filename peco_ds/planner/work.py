"""What a pass of a network costs, piece by piece: the units that ZeRO-3 gathers, in running order.

Products and convolutions are counted as `shapes.py` counts them. Beside them stand the kernels that only move data,
read off models/vit.py, models/attention.py, models/mim.py and the objectives, kernel by kernel (`block_kernels`): every
one reads its inputs from device memory and writes its outputs there. Eager runs one kernel an operation; torch.compile
makes one of what lies between two products, and reads a row once for a norm and what follows it. Operands of the
products themselves are left out: their kernels load them while they multiply. What a kind of tokenizer, a frozen
network or an objective computes is told by its descriptor (`peco_ds.costs`).

Letters: N patches, T tokens, D width, F hidden width, H heads, M masked patches, V codes, E bytes of an activation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from peco_ds.config import (
    AdversarialSettings,
    DetectRecipe,
    FinetuneRecipe,
    ModelSettings,
    PretrainRecipe,
    RunSettings,
    SegmentRecipe,
    TokenizerRecipe,
    TokenizerSettings,
    ViewSettings,
)
from peco_ds.costs import FLOPS_PER_MAC, FP32_BYTES, IMAGE_CHANNELS, Blocks, Cost, FrozenCost, ObjectiveCost, conv
from peco_ds.planner.attention_tiles import AttentionCost, Form, aligned, attention_cost, bias_sum_bytes, form_of
from peco_ds.planner.shapes import ELEMENT_BYTES, objective_cost, relative_positions, tokenizer_cost
from peco_ds.registry import TOKENIZERS, family_of
from peco_ds.schedules import images_taken

# `autocast` is eager with weights and residual stream in float32 and products in 16 bits.
Kernels = Literal["compiled", "eager", "autocast"]

# PyTorch sorts the T x T places of a bias table to add its gradient up: assumed 8 passes of a radix sort over keys and
# values of 8 bytes each, read and written.
SORT_BYTES = 8 * 2 * (8 + 8)


@dataclass(frozen=True)
class Work:
    """Work of one image in one direction."""

    # FLOP in matrix products, those of attention too
    products: float = 0.0
    convolutions: float = 0.0  # FLOP
    # Bytes read and written in device memory by the kernels that are neither products nor convolutions.
    moved_bytes: float = 0.0
    # Kernels launched in a pass, whatever its number of images.
    kernels: float = 0.0
    # FLOP of `products` that are attention's, without what pads them. Their time is that of the next two.
    attention: float = 0.0
    # Bytes moved once a pass, whatever its number of images: bias tables, gradients of weights.
    pass_bytes: float = 0.0
    # FLOP of the tiles that attention kernels compute, as `attention_tiles.AttentionCost`.
    tiles: float = 0.0
    # FLOP of attention's batched products, with what pads them.
    batched: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(_values(self), _values(other))))

    def times(self, count: float) -> Work:
        return Work(*(count * value for value in _values(self)))

    @property
    def flops(self) -> float:
        return self.products + self.convolutions


def _values(work: Work) -> tuple[float, ...]:
    return (
        *(work.products, work.convolutions, work.moved_bytes, work.kernels, work.attention, work.pass_bytes),
        *(work.tiles, work.batched),
    )


@dataclass(frozen=True)
class Segment:
    """A piece of a network that ZeRO-3 gathers as a whole, in running order: embedding, one block, head.

    A frozen network is described in the same way.
    """

    name: str
    parameters: int  # trained; 0: frozen
    tensors: int  # trained
    forward: Work
    # Includes what activation checkpointing and the attention kernel compute again.
    backward: Work
    # The part of `backward` that is computed again. It is no FLOP of the model.
    recomputed: Work = Work()
    # Elements of each trained tensor; () where they are not listed.
    tensor_elements: tuple[int, ...] = ()
    # Precision that it computes in; "": the run's.
    precision: str = ""
    # A network beside the model, whose FLOP are not the model's.
    frozen: bool = False

    def plus(self, forward: Work, backward: Work) -> Segment:
        return replace(self, forward=self.forward + forward, backward=self.backward + backward)

    @property
    def model_flops(self) -> float:
        """FLOP of one image's forward and backward pass, recomputation not counted."""
        return self.forward.flops + self.backward.flops - self.recomputed.flops


def _trained(
    name: str, elements: tuple[int, ...], element: int, forward: Work, backward: Work, again: Work = Work()
) -> Segment:
    """A segment whose trained tensors are listed: their gradients are summed once a pass."""
    summed = Work(pass_bytes=gradient_sum_bytes(sum(elements), element))
    return Segment(name, sum(elements), len(elements), forward, backward + summed, again, elements)


def model_flops(segments: Iterable[Segment]) -> float:
    """FLOP of one image's forward and backward pass.

    Frozen networks beside the model and recomputation are not counted.
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
    # Its gradient is taken from those of the weights.
    folded: bool = False
    # Stochastic depth that drops images one by one.
    dropped: bool = False
    # `shared` is a table for all blocks, `own` one of this block, `image` values of each image that are made outside.
    bias: Literal["none", "shared", "own", "image"] = "none"
    trained: bool = True
    # Attention's form. The bias that images have of their own is taken by the efficient one alone.
    attention: Form = "fused"

    @property
    def stream(self) -> int:
        """Bytes of an element of the residual stream and of the norms."""
        return FP32_BYTES if self.kernels == "autocast" else self.element

    @property
    def scores(self) -> int:
        return self.heads * self.tokens**2

    @property
    def folds(self) -> bool:
        return self.scaled and self.folded and self.kernels != "autocast"

    @property
    def ending_weights(self) -> int:
        """Elements of the weights before both layer scales: attention's output and the MLP's."""
        return self.width * (self.width + self.hidden)

    def attention_cost(self) -> tuple[AttentionCost, AttentionCost]:
        form: Form = "efficient" if self.bias == "image" else self.attention
        biased = self.bias in ("shared", "own")
        return attention_cost(form, self.tokens, self.heads, self.width // self.heads, self.element, biased=biased)

    @property
    def tensor_elements(self) -> tuple[int, ...]:
        """Elements of each of the block's tensors, without a bias table.

        The tensors are those of both norms, query and value bias, projections, MLP and layer scale.
        """
        width, hidden = self.width, self.hidden
        norms, biases, scales = [width] * 4, [width] * 2, [width] * 2 if self.scaled else []
        products = [3 * width * width, width * width, width, hidden * width, hidden, width * hidden, width]
        return tuple(norms + biases + products + scales)


@dataclass(frozen=True)
class Kernel:
    """Some kernels of one kind in a block's pass that only move data."""

    launches: float
    # For one image.
    moved_bytes: float
    # False: on the residual stream, for every image.
    in_branch: bool = True


def block_kernels(block: BlockShape) -> tuple[list[Kernel], list[Kernel]]:
    """What moves data in a block's forward and backward pass beside the products, an image.

    Rows are of T D elements, of T F for the MLP's hidden layer. Attention reads and writes its operands while it
    multiplies, as products do.
    """
    return (_compiled if block.kernels == "compiled" else _eager)(block)


def _eager(block: BlockShape) -> tuple[list[Kernel], list[Kernel]]:
    """Kernels in eager mode.

    R: bytes of an element of the residual stream.  S: bytes of an element of what a branch adds to it.
    """
    E, R = block.element, block.stream
    row, hidden_row = block.tokens * block.width, block.tokens * block.hidden
    autocast, scaled, dropped = block.kernels == "autocast", block.scaled, block.dropped
    # Under autocast, layer scale is a product with float32 weights.
    S = R if scaled else E
    forward = [
        # Norms: read the input, write the output.
        Kernel(2, 2 * row * 2 * R),
        # Biases of query, key and value put together.
        Kernel(3, 0),
        # GELU: read the input, write the output.
        Kernel(1, hidden_row * 2 * E),
        # Sums with the residual stream: read both operands, write the sum.
        Kernel(2, 2 * row * (2 * R + S), in_branch=False),
    ]
    backward = [
        # Sums of the gradients of both paths: read both, write the sum.
        Kernel(2, 2 * row * 3 * R, in_branch=False),
        # GELU: read gradient and input, write the input's gradient.
        Kernel(1, hidden_row * 3 * E),
        # Norms: read gradient and input, write the input's gradient; read both again for weight and bias.
        Kernel(4, 2 * row * 5 * R),
    ]
    if block.trained:
        # Gradients of the biases: read the gradients of query, key, value, projection and MLP.
        backward.append(Kernel(4, (5 * row + hidden_row) * E))
    if autocast:
        # Casts of the norms' outputs to 16 bits, and of their gradients to float32.
        forward.append(Kernel(2, 2 * row * (R + E)))
        backward.append(Kernel(2, 2 * row * (R + E)))
        if not scaled:
            # Casts of the branches' gradients to 16 bits.
            backward.append(Kernel(2, 2 * row * (R + E)))
    if scaled:
        # Layer scale. Forward: read, write. Backward: gradient times scale; where it is not folded, gradient times
        # branch, and the sum of that.
        forward.append(Kernel(2, 2 * row * (E + S)))
        backward.append(Kernel(2, 2 * row * (R + E)))
        if not block.folds:
            backward.append(Kernel(4, 2 * row * ((R + E + R) + R)))
    if dropped:
        # Stochastic depth: random draws, then read and write.
        forward.append(Kernel(7, 2 * row * 2 * S))
        backward.append(Kernel(2, 2 * row * 2 * S))
    return forward, backward + _attention_moves(block)


def _compiled(block: BlockShape) -> tuple[list[Kernel], list[Kernel]]:
    """What torch.compile's own list of the kernels of a block shows.

    Sums over a batch's rows read their operand again.
    """
    E, row, hidden_row = block.element, block.tokens * block.width, block.tokens * block.hidden
    scale = 1 if block.scaled else 0
    # A sum over the rows of gradient and branch, where layer scale is not folded.
    summed = scale and not block.folds
    forward = [
        # First norm: read the input, write the output.
        Kernel(1, row * 2 * E),
        # First branch scaled and added, and second norm: read branch and stream, write the result.
        Kernel(1, row * 3 * E),
        # GELU: read the input, write the output.
        Kernel(1, hidden_row * 2 * E),
        # Both branches scaled and added: read them and the stream, write the sum.
        Kernel(1, row * 4 * E, in_branch=False),
    ]
    backward = [
        # Second branch: gradient read for the bias, then scaled, and read with the branch for the scale's gradient.
        Kernel(1 + scale + summed, row * (1 + 2 * scale + 2 * summed) * E),
        # GELU: read gradient and input, write the input's gradient; then the bias.
        Kernel(2, hidden_row * 4 * E),
        # Second norm, sum with the residual stream, first branch scaled. Sums for weights, biases and scale read again.
        Kernel(3 + scale + summed, row * (8 + 2 * scale + 2 * summed) * E),
        # Gradients of the biases of query, key and value.
        Kernel(1, row * 3 * E),
        # First norm, sum with the residual stream. Sums for weight and bias read again.
        Kernel(2, row * 6 * E),
    ]
    return forward, backward + _attention_moves(block)


def _attention_moves(block: BlockShape) -> list[Kernel]:
    """Kernels that move data for attention in the backward pass.

    The attention operator is opaque to the compiler, so it costs the same either way.
    """
    cost = block.attention_cost()[1]
    found = [Kernel(cost.kernels, cost.moved_bytes)]
    if block.bias == "image":
        # Gradient of the bias: written, read, and added to that of the other blocks.
        found.append(Kernel(2, block.scores * (2 + 3) * block.element))
    return found


def block_work(block: BlockShape, *, share: float = 1.0) -> tuple[Work, Work, Work]:
    """Work of one image: forward, backward, and what the backward pass computes again by itself.

    Args:
        share: of a pass's images that take a branch (model.drop_path_by = subset). They are gathered before it and
            added at their places behind it.
    """
    tokens, width = block.tokens, block.width
    linear = share * FLOPS_PER_MAC * tokens * (4 * width**2 + 2 * width * block.hidden)
    quadratic = share * FLOPS_PER_MAC * 2 * tokens**2 * width
    ahead, behind = (Work(tiles=share * cost.tiles, batched=share * cost.batched) for cost in block.attention_cost())
    # Query times key, unless the weights were kept.
    again = 0.0 if block.attention == "unfused" else quadratic / 2
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
    # Weights are cast, and their gradients back.
    casts = parameters * (FP32_BYTES + block.element) if block.kernels == "autocast" else 0
    # The bias is cast and padded, in one kernel if compiled; then the attention kernel runs.
    launched = 2 if block.kernels == "compiled" else 3
    moves[0] += ahead + Work(moved_bytes=share * block.attention_cost()[0].moved_bytes)
    moves[1] += behind
    forward = moves[0] + Work(
        products=linear + quadratic, attention=quadratic, kernels=4 + launched, pass_bytes=table[0] + casts
    )
    # A frozen block computes the gradients of its inputs alone.
    if not block.trained:
        return (
            forward,
            moves[1] + Work(products=linear + 2 * quadratic + again, attention=2 * quadratic + again, kernels=4 + 2),
            Work(products=again, attention=again),
        )
    backward = moves[1] + Work(
        products=2 * (linear + quadratic) + again,
        attention=2 * quadratic + again,
        kernels=8 + launched + 4 + 2 * len(block.tensor_elements),
        pass_bytes=table[1] + gradient_sum_bytes(parameters, block.element) + casts + folded_bytes(block),
    )
    return forward, backward, Work(products=again, attention=again)


def folded_bytes(block: BlockShape) -> float:
    """Bytes moved once a pass for folded layer scale: the weights' gradients are scaled, and summed with the weights.

    Compiled, both in one kernel: gradient and weight read, gradient written.
    """
    if not block.folds:
        return 0.0
    return block.ending_weights * block.element * (3 if block.kernels == "compiled" else 6)


def _table_bytes(block: BlockShape) -> tuple[float, float]:
    """Bytes moved for the bias once a pass: forward, backward.

    Forward: cast, padded, and for a table of the block's own spread out. Backward: the same casts, the sum of its
    gradient, and that added to the other blocks' or summed into the table.
    """
    if block.bias in ("none", "image"):
        return 0.0, 0.0
    padded = block.heads * block.tokens * aligned(block.tokens)
    cast = block.scores * (FP32_BYTES + block.element) + padded * 2 * block.element
    spread = block.scores * 3 * FP32_BYTES + 8 * block.tokens**2 if block.bias == "own" else 0
    gathered = block.scores * 3 * FP32_BYTES + (SORT_BYTES * block.tokens**2 if block.bias == "own" else 0)
    return cast + spread, cast + bias_sum_bytes(block.tokens, block.heads) + gathered


def gradient_sum_bytes(parameters: int, element: int) -> float:
    """Bytes moved once a pass for gradients of weights: each is read in its own type and added to a float32 sum, as
    data_types.grad_accum_dtype fp32 asks.
    """
    return parameters * (element + 2 * FP32_BYTES)


# ------------------------------------------------------------------------ pre-training and fine-tuning


def kernels_of(run: RunSettings) -> Kernels:
    """The kernels that run.compile leads to on a GPU (`runtime.engine.compiles`)."""
    return "compiled" if run.compile == "blocks" or (run.compile == "auto" and run.layer_norm == "torch") else "eager"


def pretrain_segments(recipe: PretrainRecipe) -> tuple[Segment, ...]:
    """Segments of a pre-training, from embedding to head.

    The embedding has mask token, class token and bias table. Its blocks follow; where there are, those of the second
    branch, or the decoder's; then the head with final norm, token head and loss.
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
    embedding = embedding.plus(Work(pass_bytes=spread), Work(pass_bytes=spread + SORT_BYTES * (patches + 1) ** 2))
    return (embedding, *blocks, *_heads(recipe, width, patches + 1, (2 if extra else 1) * masked, element))


def finetune_segments(recipe: FinetuneRecipe | SegmentRecipe | DetectRecipe, num_classes: int) -> tuple[Segment, ...]:
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
    moved = row + num_classes * 20
    head = _trained(
        "head",
        elements,
        element,
        Work(products=flops, moved_bytes=moved, kernels=15),
        Work(products=2 * flops, moved_bytes=moved, kernels=25),
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
        folded=model.fold_layer_scale,
        dropped=model.drop_path_by == "image" and _rate(model, number) > 0,
        bias="shared",
        attention=form_of(model.attention),
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
    return _trained(
        "embedding",
        elements,
        element,
        Work(convolutions=flops, moved_bytes=image * (FP32_BYTES + element) + moves * row, kernels=14),
        # The image wants no gradient: the weight's alone.
        Work(convolutions=flops, moved_bytes=(moves + 1) * row, kernels=12 + 2 * len(elements)),
    )


def _heads(recipe: PretrainRecipe, width: int, tokens: int, predicted: int, element: int) -> list[Segment]:
    """Final norm, the masked places picked, token head, cross-entropy and accuracy.

    What an objective computes beside them stands before: the last segment is that of the last module.
    """
    codes, cost = recipe.objective.num_codes, objective_cost(recipe)
    logits, flops = predicted * codes, FLOPS_PER_MAC * predicted * width * codes
    row, picked = tokens * width * element, predicted * width * element
    # Logits cast to float32, log-softmax, arg max; backward the loss's gradient, that of log-softmax, cast, the bias's
    # sum.
    loss_bytes = logits * ((element + FP32_BYTES) + 2 * FP32_BYTES + element)
    backward_bytes = logits * (FP32_BYTES + 3 * FP32_BYTES + (FP32_BYTES + element) + element)
    head = _trained(
        "head",
        (width, width, width * codes, codes),
        element,
        Work(products=flops, moved_bytes=2 * row + 2 * picked + loss_bytes, kernels=14),
        Work(products=2 * flops, moved_bytes=6 * row + 3 * picked + backward_bytes, kernels=28),
    )
    if cost == ObjectiveCost():
        return [head]
    again = Work()
    if cost.recomputed_macs:
        again = Work(products=FLOPS_PER_MAC * cost.recomputed_macs, moved_bytes=cost.moved_bytes + loss_bytes)
    forward = Work(FLOPS_PER_MAC * cost.forward_macs, moved_bytes=cost.moved_bytes, kernels=cost.kernels)
    backward = Work(FLOPS_PER_MAC * cost.backward_macs, kernels=2 * cost.kernels) + again
    return [Segment("objective", 0, 0, forward, backward, again, precision="fp32"), head]


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
    picking = Work(products=picks, moved_bytes=picked, kernels=20)
    embedding = embedding.plus(picking, picking + Work(pass_bytes=SORT_BYTES * tokens**2))
    encoder = BlockShape(
        seen,
        width,
        int(width * model.mlp_ratio),
        model.heads,
        element,
        kernels_of(run),
        bool(model.layer_scale),
        model.fold_layer_scale,
        bias="image",
    )
    decoder = BlockShape(
        *(tokens, narrow, int(narrow * model.mlp_ratio), encoding.decoder_heads, element, kernels_of(run)),
        bias="shared",
        attention=form_of(model.attention),
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
    between = _trained(
        "decoder's embedding",
        elements,
        element,
        Work(products=flops, moved_bytes=2 * seen * width * element + 6 * places, kernels=12),
        Work(
            products=2 * flops,
            moved_bytes=5 * seen * width * element + 8 * places,
            kernels=30,
            pass_bytes=SORT_BYTES * tokens**2,
        ),
    )
    decoders = [
        _block_segment(f"decoder, block {number}", decoder, None, run, number)
        for number in range(encoding.decoder_depth)
    ]
    return (embedding, *blocks, between, *decoders, *_heads(recipe, narrow, tokens, masked, element))


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


def tokenizer_segments(recipe: TokenizerRecipe) -> tuple[Segment, ...]:
    """Segments of a tokenizer's training: encoder, nearest code, decoder and frozen networks.

    A critic follows the decoder where there is one; then comes the frozen judge, which sees both images and hands a
    gradient to one, or the frozen teacher. These compute in their own precision, on the tokenizer's own images.
    """
    tokenizer, size, element = recipe.tokenizer, recipe.views.tokenizer_px, ELEMENT_BYTES[recipe.run.precision]
    cost = tokenizer_cost(tokenizer, size)
    encoder = _side("encoder", cost.encoder, cost.encoder_blocks, element)
    decoder = _side("decoder", cost.decoder, cost.decoder_blocks, element)
    search = _search_segment(tokenizer, cost.search_macs, (size // tokenizer.stride_px) ** 2)
    critic = [_critic_segment(recipe.adversarial, size, element)] if recipe.adversarial.weight else []
    return (encoder, search, decoder, *critic, *_frozen_segments(recipe))


def tokenizing_segments(tokenizer: TokenizerSettings, views: ViewSettings) -> tuple[Segment, ...]:
    """Segments of tokenizing one view of one image, compiled as on a GPU.

    They are the encoder and the code of each patch, forward alone.
    """
    size, element = views.tokenizer_px, ELEMENT_BYTES[views.tokenizer_precision]
    codes, cost = (size // tokenizer.stride_px) ** 2, tokenizer_cost(tokenizer, size)
    # Softmax over all codes, and the choice of the likeliest.
    soft = codes * tokenizer.num_codes * FP32_BYTES * (6 if views.topk else 0)
    trunk = _side("encoder", cost.encoder, cost.encoder_blocks, element, compiled=True)
    choose = _search_segment(tokenizer, cost.search_macs, codes).plus(Work(moved_bytes=soft), Work())
    return tuple(
        Segment(segment.name, 0, 0, segment.forward, Work(), precision=segment.precision) for segment in (trunk, choose)
    )


def frozen_net_bytes(recipe: TokenizerRecipe) -> FrozenBytes:
    """Device memory of the judge or teacher: float32 weights.

    A judge in bf16 keeps its weights in bf16 too, for its backward pass. Of an image, what the judge keeps of the
    reconstruction for its gradient, or the teacher's features.
    """
    net, element = frozen_cost(recipe), ELEMENT_BYTES[frozen_precision(recipe)]
    if net is None:
        return FrozenBytes(0.0, 0.0)
    weights = FP32_BYTES * net.parameters
    if frozen_role(recipe) == "teacher":
        codes = (recipe.views.tokenizer_px // recipe.tokenizer.stride_px) ** 2
        target = codes * recipe.tokenizer.vit.target_width
        working = max(stage.working for stage in net.stages)
        return FrozenBytes(weights, working * element + target * FP32_BYTES)
    asked = _judged_stages(recipe, net)
    saved = sum(stage.saved * element + stage.saved_bytes for stage in net.stages[: max(asked)])
    # Features of both images and their difference.
    features = 3 * sum(net.stages[number - 1].features for number in asked)
    casts = 0 if element == FP32_BYTES else element * net.parameters
    return FrozenBytes(weights + casts, saved + (features + 2 * IMAGE_CHANNELS * net.image_px**2) * FP32_BYTES)


def frozen_role(recipe: TokenizerRecipe) -> Literal["judge", "teacher"] | None:
    """What the frozen network is to the tokenizer; None: there is none."""
    if TOKENIZERS[recipe.tokenizer.kind].learns_from == "teacher":
        return "teacher"
    return "judge" if recipe.perceptual.weight else None


def frozen_cost(recipe: TokenizerRecipe) -> FrozenCost | None:
    """Cost of the judge or teacher. None: there is none, or its family does not tell what it costs."""
    role = frozen_role(recipe)
    if role is None:
        return None
    asked = recipe.teacher if role == "teacher" else recipe.perceptual
    return family_of(asked.weights, asked.architecture).cost(asked.weights, asked.architecture, asked.image_px)


def frozen_precision(recipe: TokenizerRecipe) -> Literal["bf16", "fp32"]:
    """What the judge or teacher computes in on a GPU."""
    asked = recipe.teacher if frozen_role(recipe) == "teacher" else recipe.perceptual
    return "fp32" if asked.precision == "fp32" else "bf16"


def frozen_of_unknown_cost(recipe: TokenizerRecipe) -> str:
    """The judge or teacher that no plan counts, and how the recipe names it; "" where none is left out."""
    role = frozen_role(recipe)
    if role is None or frozen_cost(recipe) is not None:
        return ""
    asked = recipe.teacher if role == "teacher" else recipe.perceptual
    return f"{role} {asked.weights if asked.architecture == 'auto' else asked.architecture}"


def _judged_stages(recipe: TokenizerRecipe, net: FrozenCost) -> list[int]:
    """Numbers from 1, ascending. One that the network has not, refused when it is loaded, is taken for its last."""
    last = len(net.stages)
    return sorted({min(max(number, 1), last) for number in recipe.perceptual.blocks}) or list(range(1, last + 1))


def _frozen_segments(recipe: TokenizerRecipe) -> list[Segment]:
    role, net, precision = frozen_role(recipe), frozen_cost(recipe), frozen_precision(recipe)
    if role is None or net is None:
        return []
    stem = Work(
        convolutions=FLOPS_PER_MAC * net.stem_macs,
        moved_bytes=6 * IMAGE_CHANNELS * net.image_px**2 * FP32_BYTES,
        kernels=10,
    )
    asked = net.stages if role == "teacher" else net.stages[: max(_judged_stages(recipe, net))]
    forward, backward = stem, stem
    for stage in asked:
        ahead, back = _frozen_work(stage.layers, precision)
        forward, backward = forward + ahead, backward + back
    if role == "teacher":
        return [Segment(role, 0, 0, forward, Work(), precision=precision, frozen=True)]
    return [Segment(role, 0, 0, forward.times(2), backward, precision=precision, frozen=True)]


def _frozen_work(layers: Blocks | Cost, precision: Literal["bf16", "fp32"]) -> tuple[Work, Work]:
    """Forward, and backward for the gradient of the input alone, eager; in bf16 under autocast."""
    element, autocast = ELEMENT_BYTES[precision], precision != "fp32"
    if isinstance(layers, Blocks):
        shape = _shape(layers, element, "autocast" if autocast else "eager")
        forward, backward, _ = block_work(replace(shape, trained=False))
        return forward.times(layers.number), backward.times(layers.number)
    trained = _convolutions("", layers, element)
    # Frozen weights are cast anew in every pass.
    casts = Work(kernels=layers.convolutions, pass_bytes=layers.parameters * (FP32_BYTES + element))
    backward = replace(trained.backward, convolutions=trained.forward.convolutions, pass_bytes=0.0)
    return trained.forward + casts if autocast else trained.forward, backward


def _shape(blocks: Blocks, element: int, kernels: Kernels = "eager") -> BlockShape:
    return BlockShape(blocks.tokens, blocks.width, blocks.hidden, blocks.heads, element, kernels)


def _side(name: str, cost: Cost, blocks: Blocks | None, element: int, *, compiled: bool = False) -> Segment:
    """Encoder or decoder of a tokenizer: transformer blocks with ends, or convolutions."""
    if blocks is None:
        return _convolutions(name, cost, element, compiled=compiled)
    shape = _shape(blocks, element, "compiled" if compiled else "eager")
    forward, backward, again = (work.times(blocks.number) for work in block_work(shape))
    # Patch embedding, and the layers to or from the codes.
    rest = FLOPS_PER_MAC * cost.macs - forward.flops
    row = blocks.tokens * blocks.width * element
    ends = Work(products=rest, moved_bytes=12 * row, kernels=20)
    behind = ends + Work(products=rest, moved_bytes=8 * row, kernels=30)
    return Segment(name, cost.parameters, cost.tensors, forward + ends, backward + behind, again)


def _convolutions(name: str, cost: Cost, element: int, *, compiled: bool = False) -> Segment:
    """Convolutions, each with a norm and an activation, and attention among them."""
    saved, attention = cost.saved * element, FLOPS_PER_MAC * cost.attention_macs
    flops = FLOPS_PER_MAC * cost.macs - attention
    forward = Work(
        products=attention,
        convolutions=flops,
        attention=attention,
        tiles=attention,
        moved_bytes=sum((COMPILED_FORWARD if compiled else EAGER_FORWARD).values()) / SAVED_A_LAYER * saved,
        kernels=(2 if compiled else 5) * cost.convolutions,
    )
    again = Work(products=attention / 2, attention=attention / 2)
    backward = Work(
        products=2.5 * attention,
        convolutions=2 * flops,
        attention=2.5 * attention,
        tiles=2.5 * attention,
        moved_bytes=sum(EAGER_BACKWARD.values()) / SAVED_A_LAYER * saved,
        kernels=10 * cost.convolutions + 2 * cost.tensors,
        pass_bytes=gradient_sum_bytes(cost.parameters, element),
    )
    return Segment(name, cost.parameters, cost.tensors, forward, backward, again)


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
        layer = conv(before, width, 4, smaller, in_size=side)
        if index not in (0, len(widths)):
            # A norm takes the place of the bias.
            layer += Cost(width, 0, 2 * width * smaller**2, tensors=1)
        cost += layer
        before, side = width, smaller
    passed = _convolutions("critic", cost, element)
    return replace(passed, forward=passed.forward.times(3), backward=passed.backward.times(3))
