"""The stages of the chain as a plan sees them: what each trains, how much of it, and what an image costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from peco_ds.config import (
    DetectRecipe,
    FinetuneRecipe,
    PretrainRecipe,
    Recipe,
    RunSettings,
    SegmentRecipe,
    TokenizerRecipe,
    TokenizerSettings,
)
from peco_ds.durations import Durations, mixes_pairs, resolve_durations
from peco_ds.errors import UserError
from peco_ds.planner import detection
from peco_ds.planner.dense import segment_activation_bytes, segment_segments
from peco_ds.planner.memory import ema_bytes
from peco_ds.planner.shapes import (
    ELEMENT_BYTES,
    backbone_parameters,
    mim_activation_bytes,
    mim_macs,
    mim_parameters,
    objective_cost,
    own_bias_bytes,
    tokenizer_cost,
)
from peco_ds.planner.work import (
    Segment,
    finetune_segments,
    frozen_net_bytes,
    pretrain_segments,
    tokenizer_segments,
    tokenizing_segments,
)

# Sizes of ImageNet-1K, which are assumed where no set is packed yet.
IMAGENET_1K_TRAIN = 1_281_167
IMAGENET_1K_VAL = 50_000
IMAGENET_1K_CLASSES = 1000

Kind = Literal["tokenizer", "tokenizing", "pre-training", "fine-tuning", "segmentation", "detection"]
# Of a pass in which PyTorch lets no gradient through, what lives at once: some layers' inputs and outputs, not all.
LAYERS_ALIVE = 0.1


@dataclass(frozen=True)
class Stage:
    """One stage: what it trains, on how many images, and what one of them costs.

    Args:
        num_samples: images of the training set.  num_classes, val_samples: of a fine-tuning or a segmentation.
        tokenizer: of tokenizing, whose recipe is the pre-training's.
    """

    kind: Kind
    # `kind` says which type of recipe this is.
    recipe: Any
    num_samples: int = IMAGENET_1K_TRAIN
    num_classes: int = IMAGENET_1K_CLASSES
    val_samples: int = IMAGENET_1K_VAL
    tokenizer: TokenizerSettings | None = None

    @property
    def name(self) -> str:
        return f"{self.recipe.name}, views" if self.kind == "tokenizing" else self.recipe.name

    @property
    def run(self) -> RunSettings:
        return self.recipe.run

    @property
    def trains(self) -> bool:
        return self.kind != "tokenizing"

    def with_run(self, **changes) -> Stage:
        """The same stage with other settings under `run`."""
        return replace(self, recipe=replace(self.recipe, run=replace(self.run, **changes)))

    @cached_property
    def durations(self) -> Durations:
        """Durations of the training in optimiser steps.

        Raises: UserError as `resolve_durations`.
        """
        assert self.trains
        try:
            return resolve_durations(self.recipe, self.num_samples)
        except UserError as error:
            raise UserError(f"{self.recipe.name}: {error}") from None

    @cached_property
    def images(self) -> int:
        """Images that pass through the network in training, every epoch anew; for tokenizing, views."""
        return (
            self.durations.total_steps * self.run.global_batch
            if self.trains
            else self.num_samples * self.recipe.views.count
        )

    @cached_property
    def evaluated(self) -> int:
        """Images that pass through the network beside training, forward alone: a classifier's evaluations, of the
        weights and of their moving average.
        """
        if self.kind not in ("fine-tuning", "segmentation", "detection"):
            return 0
        every = self.durations.evaluation_steps or self.durations.total_steps
        return -(-self.durations.total_steps // every) * self.val_samples * (2 if self.averages else 1)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Pieces of the network in running order, with the frozen ones."""
        if self.kind == "pre-training":
            return pretrain_segments(self.recipe)
        if self.kind == "fine-tuning":
            return finetune_segments(self.recipe, self.num_classes)
        if self.kind == "segmentation":
            return segment_segments(self.recipe, self.num_classes)
        if self.kind == "detection":
            return detection.detect_segments(self.recipe, self.num_classes)
        if self.kind == "tokenizer":
            return tokenizer_segments(self.recipe)
        return tokenizing_segments(self._tokenizer, self.recipe.views)

    @cached_property
    def parameters(self) -> int:
        """Trained parameters; of tokenizing, the frozen encoder's."""
        if self.kind == "pre-training":
            recipe = self.recipe
            return mim_parameters(
                recipe.model, recipe.objective.num_codes, encoding=recipe.encoding, aggregation=recipe.aggregation
            ).total
        if self.kind == "fine-tuning":
            return backbone_parameters(self.recipe.model, shared_bias=False, num_classes=self.num_classes)
        # A tokenizer's segments include the critic, where there is one.
        if self.kind in ("tokenizer", "segmentation", "detection"):
            return sum(segment.parameters for segment in self.segments)
        return tokenizer_cost(self._tokenizer, self.recipe.views.tokenizer_px).encoder.parameters

    @property
    def _tokenizer(self) -> TokenizerSettings:
        found = self.recipe.tokenizer if self.kind == "tokenizer" else self.tokenizer
        assert found is not None, self.kind
        return found

    @property
    def _sizes(self) -> dict:
        """What the formulas of a transformer take beside its model: head, masked patches, variant."""
        if self.kind in ("fine-tuning", "segmentation", "detection"):
            # A classifier's head sees one token an image.
            return dict(num_codes=self.num_classes, masked=1)
        recipe = self.recipe
        variant = dict(encoding=recipe.encoding, aggregation=recipe.aggregation)
        return dict(num_codes=recipe.objective.num_codes, masked=recipe.mask.count, **variant)

    @cached_property
    def model_flops(self) -> float:
        """FLOP of one image, forward and backward: the numerator of MFU.

        Recomputation is not counted, nor what subsets of stochastic depth leave out; a judge or teacher and the
        objective are, where they tell their cost. For tokenizing, the forward pass alone. 0 for a tokenizer of a kind
        that does not tell its cost.
        """
        recipe = self.recipe
        if self.kind == "detection":
            return detection.training_flops(recipe, self.num_classes)
        if self.kind == "tokenizer" and not tokenizer_cost(recipe.tokenizer, recipe.views.tokenizer_px).known:
            return 0.0
        if self.kind in ("tokenizer", "tokenizing", "segmentation") or recipe.model.drop_path_by == "subset":
            return sum(segment.model_flops for segment in self.segments)
        flops = mim_macs(recipe.model, **self._sizes).training_flops
        return flops + objective_cost(recipe).model_flops if self.kind == "pre-training" else flops

    @cached_property
    def activation_bytes(self) -> float:
        """Device memory of one image between its forward and its backward pass."""
        run, recipe = self.run, self.recipe
        if self.kind in ("pre-training", "fine-tuning", "segmentation"):
            how: dict[str, Any] = dict(checkpointing=run.activation_checkpointing, precision=run.precision)
            blocks = mim_activation_bytes(recipe.model, **self._sizes, **how).total
            return blocks + (segment_activation_bytes(recipe, self.num_classes) if self.kind == "segmentation" else 0)
        if self.kind == "detection":
            how = dict(checkpointing=run.activation_checkpointing, precision=run.precision)
            blocks = mim_activation_bytes(detection.usual_model(recipe), **self._sizes, **how).total
            return blocks + detection.head_bytes(recipe)
        cost = tokenizer_cost(self._tokenizer, recipe.views.tokenizer_px)
        if self.kind == "tokenizer":
            saved = (cost.encoder.saved + cost.decoder.saved) * ELEMENT_BYTES[run.precision]
            return saved + frozen_net_bytes(recipe).a_image
        return LAYERS_ALIVE * cost.encoder.saved * ELEMENT_BYTES[recipe.views.tokenizer_precision]

    @cached_property
    def fixed_bytes(self) -> float:
        """Device memory beside ZeRO's state that neither images nor ranks change: frozen networks, codebooks, bias
        tables spread out; of tokenizing the network itself.
        """
        if self.kind == "pre-training":
            return 0.0
        if self.kind == "fine-tuning":
            model = self.recipe.model
            # Each block holds, as int64, which row of its table it reads for each pair of tokens.
            places = model.depth * (model.grid**2 + 1) ** 2 * 8
            return places + own_bias_bytes(model, self.run.activation_checkpointing)
        if self.kind in ("segmentation", "detection"):
            model = self.recipe.model
            if self.kind == "detection":
                model = detection.usual_model(self.recipe)
                if self.recipe.detector.window:
                    # Windows share small ones.
                    model = replace(model, depth=len(self.recipe.detector.global_blocks))
            # All blocks share the index.
            return (model.grid**2 + 1) ** 2 * 8 + own_bias_bytes(model, self.run.activation_checkpointing)
        codebook = 4 * tokenizer_cost(self._tokenizer, self.recipe.views.tokenizer_px).codebook_elements
        if self.kind == "tokenizer":
            return codebook + frozen_net_bytes(self.recipe).weights
        return codebook + 4 * self.parameters

    def average_bytes(self, *, stage: int, world_size: int) -> float:
        """Device memory of the moving average of the weights, a GPU."""
        return ema_bytes(self.parameters, stage=stage, world_size=world_size) if self.averages else 0.0

    @property
    def averages(self) -> bool:
        """Whether training keeps a moving average of the weights."""
        return self.kind == "fine-tuning" and bool(self.recipe.ema.decay)

    @property
    def mixes(self) -> bool:
        """Whether the images of a pass are mixed in pairs, so that it needs an even number."""
        return mixes_pairs(self.recipe)


def stage_of(recipe: Recipe, num_samples: int = IMAGENET_1K_TRAIN, **more) -> Stage:
    """The stage that trains by a recipe; `more` as `Stage` takes it."""
    kinds: dict[type, Kind] = {
        PretrainRecipe: "pre-training",
        FinetuneRecipe: "fine-tuning",
        SegmentRecipe: "segmentation",
        DetectRecipe: "detection",
        TokenizerRecipe: "tokenizer",
    }
    return Stage(kinds[type(recipe)], recipe, num_samples, **more)


def training_flops(recipe: Recipe, num_classes: int = IMAGENET_1K_CLASSES) -> float:
    """The old name of `mfu.training_flops`; to be removed with its last caller."""
    return stage_of(recipe, num_classes=num_classes).model_flops
