"""The stages of the chain as a plan sees them: what each trains, how much of it, and what an image costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from peco_ds.config import FinetuneRecipe, PretrainRecipe, Recipe, RunSettings, TokenizerRecipe, TokenizerSettings
from peco_ds.durations import Durations, resolve_durations
from peco_ds.errors import UserError
from peco_ds.planner.memory import ema_bytes
from peco_ds.planner.shapes import (
    ELEMENT_BYTES,
    backbone_parameters,
    mim_activation_bytes,
    mim_macs,
    mim_parameters,
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

# training images: what is assumed where no set is packed yet
IMAGENET_1K_TRAIN = 1_281_167
IMAGENET_1K_VAL = 50_000
IMAGENET_1K_CLASSES = 1000

Kind = Literal["tokenizer", "tokenizing", "pre-training", "fine-tuning"]
# Of a pass in which PyTorch lets no gradient through, what lives at once: some layers' inputs and outputs, not all.
LAYERS_ALIVE = 0.1


@dataclass(frozen=True)
class Stage:
    """One stage: what it trains, on how many images, and what one of them costs.

    Args:
        num_samples: images of the training set.  num_classes, val_samples: of a fine-tuning.
        tokenizer: of tokenizing, whose recipe is the pre-training's.
    """

    kind: Kind
    recipe: Recipe
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
        """In optimiser steps.

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
        if self.kind != "fine-tuning":
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
        if self.kind == "tokenizer":
            return tokenizer_segments(self.recipe)
        return tokenizing_segments(self.tokenizer, self.recipe.views)

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
        if self.kind == "tokenizer":  # with a critic where there is one
            return sum(segment.parameters for segment in self.segments)
        return tokenizer_cost(self._tokenizer, self.recipe.views.tokenizer_px).encoder.parameters

    @property
    def _tokenizer(self) -> TokenizerSettings:
        return self.recipe.tokenizer if self.kind == "tokenizer" else self.tokenizer

    @cached_property
    def model_flops(self) -> float:
        """FLOP of one image, forward and backward: the numerator of MFU.

        Recomputation is not counted, nor what subsets of stochastic depth leave out; a judge or teacher
        is. Of tokenizing, forward alone."""
        recipe = self.recipe
        if self.kind in ("tokenizer", "tokenizing") or recipe.model.drop_path_by == "subset":
            return sum(segment.model_flops for segment in self.segments)
        if self.kind == "pre-training":
            macs = mim_macs(
                recipe.model,
                num_codes=recipe.objective.num_codes,
                masked=recipe.mask.count,
                encoding=recipe.encoding,
                aggregation=recipe.aggregation,
            )
        else:
            macs = mim_macs(recipe.model, num_codes=self.num_classes, masked=1)
        return macs.training_flops

    @cached_property
    def activation_bytes(self) -> float:
        """Device memory of one image between its forward and its backward pass."""
        run = self.run
        if self.kind == "pre-training":
            recipe = self.recipe
            sizes = dict(
                num_codes=recipe.objective.num_codes,
                masked=recipe.mask.count,
                encoding=recipe.encoding,
                aggregation=recipe.aggregation,
            )
            return mim_activation_bytes(
                recipe.model, checkpointing=run.activation_checkpointing, precision=run.precision, **sizes
            ).total
        if self.kind == "fine-tuning":
            return mim_activation_bytes(
                self.recipe.model,
                num_codes=self.num_classes,
                masked=1,
                checkpointing=run.activation_checkpointing,
                precision=run.precision,
            ).total
        cost = tokenizer_cost(self._tokenizer, self.recipe.views.tokenizer_px)
        if self.kind == "tokenizer":
            return (cost.encoder.saved + cost.decoder.saved) * ELEMENT_BYTES[run.precision] + frozen_net_bytes(
                self.recipe
            ).a_image
        return LAYERS_ALIVE * cost.encoder.saved * ELEMENT_BYTES[self.recipe.views.tokenizer_precision]

    @cached_property
    def fixed_bytes(self) -> float:
        """Device memory beside ZeRO's state that neither images nor ranks change: frozen networks, codebooks, bias
        tables spread out; of tokenizing the network itself.
        """
        if self.kind == "pre-training":
            return 0.0
        if self.kind == "fine-tuning":
            model = self.recipe.model
            # which row of its table each block reads for each pair of tokens: int64
            places = model.depth * (model.grid**2 + 1) ** 2 * 8
            return places + own_bias_bytes(model, self.run.activation_checkpointing)
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
        if self.kind != "fine-tuning":
            return False
        augment = self.recipe.augment
        return augment.mix_probability > 0 and (augment.mixup > 0 or augment.cutmix > 0)


def training_flops(recipe: Recipe, num_classes: int = IMAGENET_1K_CLASSES) -> float:
    """`Stage.model_flops` of a training's recipe: what its MFU counts."""
    kinds: dict[type, Kind] = {
        PretrainRecipe: "pre-training",
        FinetuneRecipe: "fine-tuning",
        TokenizerRecipe: "tokenizer",
    }
    return Stage(kinds[type(recipe)], recipe, num_classes=num_classes).model_flops
