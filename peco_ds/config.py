"""Settings: frozen dataclasses; YAML is their text. No torch is imported here, so a misspelt key answers at once.

Order of sources, the later one wins: defaults of this file, environment (`PECO_DATA_ROOT`), recipe, `a.b=c` on the
command line. The recipe owns batch, optimiser, schedule, clipping and precision; accumulation is derived; the rest of
the engine is the DeepSpeed JSON's (`deepspeed_json.py`).
"""

from __future__ import annotations

import difflib
import math
import os
from collections import Counter
from dataclasses import asdict, field, fields, is_dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from peco_ds.errors import UserError
from peco_ds.registry import OBJECTIVES, TOKENIZERS, Option, check_options, kinds_learning_from
from peco_ds.schedules import images_taken
from peco_ds.schema import short

RECIPES = Path(__file__).parent / "recipes"
DS_CONFIGS = Path(__file__).parent.parent / "ds_configs"
COMMAND_LINE = "command line"  # source of an override
# value of data.tokens that asks for codes computed in the training loop
ONLINE = "online"

_strict = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=_strict)
class DataSettings:
    """Where records lie. Relative paths are taken under `root`."""

    root: str = "data"
    images: str = "images/train"  # folder of image shards (pack_images.py)
    # held-out image shards; empty: the last `holdout` images of `images` judge the tokenizer
    val_images: str = ""
    # images kept from tokenizer training and used to judge it, when val_images is empty
    holdout: int = 0
    # folder of token shards (tokenize_shards.py), or "online"
    tokens: str = "tokens/train"
    # tokenizer release folder (train_tokenizer.py)
    tokenizer: str = "tokenizer"
    # loader processes a rank; the order of samples does not depend on it
    num_workers: int = 8
    # samples are permuted inside a window of so many permuted shards
    shuffle_window_shards: int = 16
    # share of failed readings of images after which a rank ends the run, beyond its first 10; each one is named and
    # counted
    max_bad_share: float = 1e-4
    # what is hashed at start; every record's CRC is checked when read
    verify: Literal["size", "tokens", "all"] = "tokens"


@dataclass(frozen=True, config=_strict)
class ViewSettings:
    """The views that are recorded by the tokenizer and replayed in pre-training (papers: BEiT 4.2)."""

    tokenizer_px: int = 224
    # of the tokenizer's crop; BEiT's is Lanczos
    tokenizer_interpolation: Literal["bicubic", "lanczos"] = "bicubic"
    # of the tokenizer's network when codes are computed; the search for the nearest code is fp32 always
    tokenizer_precision: Literal["bf16", "fp32"] = "bf16"
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (0.75, 4.0 / 3.0)
    flip: float = 0.5
    # brightness, contrast, saturation; as in BEiT both views of an image carry the same jitter
    color_jitter: float = 0.4
    count: int = 1  # K, views recorded for each image
    # soft codes kept for each patch beside the hard one; 0: none
    topk: int = 0
    # of the softmax over the tokenizer's logits that gives their probabilities; mc-BEiT has 4
    topk_temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True, config=_strict)
class ModelSettings:
    image_px: int = 224
    patch_px: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    layer_scale: float = 0.1  # initial value on both residual branches
    # stochastic depth of the last block; linear from 0 at the first
    drop_path: float = 0.1
    # image: each by its own coin; subset: a fixed share of a pass's images, drawn anew for each branch, skips it
    # and saves its cost
    drop_path_by: Literal["image", "subset"] = "image"
    # truncated at one standard deviation, as BEiT
    init_std: float = 0.02

    @property
    def grid(self) -> int:
        return self.image_px // self.patch_px


@dataclass(frozen=True, config=_strict)
class MaskSettings:
    kind: Literal["block", "random"] = "block"
    count: int = 75  # patches masked in every image
    # False: BEiT's first generator, which stops short of `count` when no further block fits; a pass's loss is the mean
    # over its own masked patches
    exact: bool = True
    min_block: int = 16  # patches in the smallest block
    # block aspect is log-uniform in [min_aspect, 1 / min_aspect]
    min_aspect: float = 0.3


@dataclass(frozen=True, config=_strict)
class EncodingSettings:
    """What the encoder sees of a masked image."""

    # full: every place, a mask token at the masked ones (BEiT); visible: visible patches alone, a decoder predicts
    # (MAE)
    kind: Literal["full", "visible"] = "full"
    decoder_width: int = 512  # of the decoder that `visible` needs
    decoder_depth: int = 8
    decoder_heads: int = 16


@dataclass(frozen=True, config=_strict)
class AggregationSettings:
    """BEiT v2's second branch: the final class token and early patch tokens predict the codes too, through the same
    head. Dropped at release.
    """

    # patch tokens after this block, counted from 1; 0: no second branch
    early_block: int = 0
    blocks: int = 2  # extra blocks of the branch


@dataclass(frozen=True, config=_strict)
class ObjectiveSettings:
    name: str = "hard_tokens"  # of registry.OBJECTIVES
    num_codes: int = 8192  # V; must be the tokenizer's
    # multi_choice: weight of the targets averaged over similar patches; 1 - omega stays with the patch's own
    omega: float = 0.2
    # multi_choice: of the softmax over patches' cosines
    similarity_temperature: float = 1.0
    # multi_choice: gradient through the similarities, as the released code has it
    similarity_gradient: bool = True
    # multi_choice: the mass of codes that were not stored, spread evenly over them, or given to the stored ones
    rest: Literal["uniform", "renormalize"] = "uniform"
    # objective.options.NAME: settings of its own that an objective declares in its descriptor
    options: dict[str, Option] = field(default_factory=dict, hash=False)

    def option(self, name: str) -> Option:
        """A setting of the objective's own: the recipe's, or its default."""
        return {**OBJECTIVES[self.name].options, **self.options}[name]


@dataclass(frozen=True, config=_strict)
class OptimSettings:
    impl: Literal["torch", "deepspeed", "apex"] = "torch"  # whose AdamW
    lr: float = 1.5e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float = 3.0  # 0: no clipping


@dataclass(frozen=True, config=_strict)
class ScheduleSettings:
    """Durations as people think of them. They become optimiser steps once, in `resolve_durations`."""

    epochs: float | None = None
    steps: int | None = None
    warmup_epochs: float | None = None
    warmup_steps: int | None = None
    min_lr: float = 1e-5
    # save and end at this step, the schedule unchanged; a later start with a higher one goes on
    stop_at_step: int | None = None


@dataclass(frozen=True, config=_strict)
class RunSettings:
    seed: int = 0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    global_batch: int = 2048  # images an optimiser step, over all ranks
    # images a forward pass, a rank; accumulation follows from it
    micro_batch: int = 64
    # selective: products and attention are kept, what lies between is computed again; full: whole blocks are
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    # blocks: each transformer block by torch.compile, and a tokenizer's network when codes are computed; auto: blocks
    # on a GPU, unless layer_norm is apex, else none
    compile: Literal["auto", "blocks", "none"] = "auto"
    layer_norm: Literal["torch", "apex"] = "torch"  # whose kernel
    log_every_steps: int = 20
    # of the last 128 steps; one is skipped for a loss or gradient that is not finite, or for a gradient spike
    max_skipped_steps: int = 10
    # a gradient norm above so many times the median of the last 128 is a spike; 0: none is
    spike_factor: float = 30.0
    # a rank that finishes no step for so long dumps its stacks and ends the run; start, saves and evaluation have an
    # hour; 0: never
    hang_timeout_s: float = 600.0


@dataclass(frozen=True, config=_strict)
class CheckpointSettings:
    """Two cadences: frequent ones of which the newest few are kept, and some that are kept for good.

    One more at the end and at every stop.
    """

    every_epochs: float | None = None
    every_steps: int | None = None
    # since the last save began, beside the above: what a failure costs at most; 0: none
    every_minutes: float = 20.0
    keep_last: int = 2  # newest complete checkpoints kept
    # saved and kept for good at multiples of this; 0: none
    keep_every_steps: int = 0
    # auto: continue the newest checkpoint of --out that verifies
    resume: Literal["auto", "never"] = "auto"


@dataclass(frozen=True, config=_strict)
class PretrainRecipe:
    """One masked pre-training run; tokenize_shards.py reads the same file for its `data` and `views`."""

    name: str = "pretrain"
    data: DataSettings = field(default_factory=DataSettings)
    views: ViewSettings = field(default_factory=ViewSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    mask: MaskSettings = field(default_factory=MaskSettings)
    encoding: EncodingSettings = field(default_factory=EncodingSettings)
    aggregation: AggregationSettings = field(default_factory=AggregationSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    run: RunSettings = field(default_factory=RunSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)


@dataclass(frozen=True, config=_strict)
class TokenizerVitSettings:
    """VQ-KD's transformers (BEiT v2, arXiv 2208.06366): a ViT encodes images, a small one decodes codes to a
    teacher's features.
    """

    # the encoder's positions are absolute: it looks at this size alone
    image_px: int = 224
    patch_px: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    decoder_width: int = 768
    # a deeper one follows the teacher better, and gives worse tokens
    decoder_depth: int = 3
    decoder_heads: int = 12
    # of the teacher's features; must be the teacher's
    target_width: int = 512


@dataclass(frozen=True, config=_strict)
class TokenizerSettings:
    """A tokenizer's network and its codebook.

    PeCo does not describe its network; kind vqgan is VQGAN's f16 (arXiv 2012.09841).
    """

    kind: str = "vqgan"  # of registry.TOKENIZERS
    # of transformers; from here to z_channels: of convolutional ones
    vit: TokenizerVitSettings = field(default_factory=TokenizerVitSettings)
    channels: int = 128
    channel_mults: tuple[int, ...] = (1, 1, 2, 2, 4)  # one level each; stride 2 ** (levels - 1)
    # residual blocks a level in the encoder; the decoder has one more
    blocks_per_level: int = 2
    # single-head attention at the coarsest level and in the middle
    attention: bool = True
    z_channels: int = 256
    num_codes: int = 8192
    code_dim: int = 256
    # False: a dvae of which only the encoder was given: codes, but no images
    decoder: bool = True
    # BEiT v2's cure for dead codes: unit codes and features; use with code_dim 32
    l2_normalized: bool = False
    decay: float = 0.99  # of the moving averages of counts and sums
    # what codes average: sums of their features (VQ-VAE), or, with l2_normalized, unit means, every step alike (BEiT
    # v2's released code)
    average: Literal["sums", "directions"] = "sums"
    count_eps: float = 1e-5  # Laplace smoothing of the counts
    # Lloyd iterations of the initialisation on the first images; 0: uniform random codes
    kmeans_iters: int = 10
    # encoder outputs gathered for it, over all ranks
    kmeans_vectors: int = 65536
    # codes whose averaged count falls below this restart at a random encoder output; 0: never
    revive_below: float = 0.0
    # tokenizer.options.NAME: settings of its own that a kind declares in its descriptor
    options: dict[str, Option] = field(default_factory=dict, hash=False)

    def option(self, name: str) -> Option:
        """A setting of the kind's own: the recipe's, or its default."""
        return {**TOKENIZERS[self.kind].options, **self.options}[name]

    @property
    def stride_px(self) -> int:
        return TOKENIZERS[self.kind].stride_px(self)

    @property
    def only_px(self) -> int | None:
        """The one size of image that it can look at; None: every multiple of the stride."""
        return TOKENIZERS[self.kind].only_px(self)


@dataclass(frozen=True, config=_strict)
class PerceptualSettings:
    """The frozen network that judges reconstructions."""

    # MoCo v3 .pth.tar, any timm ViT file, or a release folder; empty with weight 0: no judge
    weights: str = ""
    # timm name; auto: read off the file's shapes
    architecture: str = "auto"
    # features after these blocks, counted from 1; PeCo's own choice is not in any public text
    blocks: tuple[int, ...] = (3, 6, 9, 12)
    # size the judge looks at, crops are resized to it; 0: the size it was trained at
    image_px: int = 0
    weight: float = 1.0


@dataclass(frozen=True, config=_strict)
class TeacherSettings:
    """The frozen network whose features VQ-KD's decoder learns to give."""

    # CLIP, DINO, DINOv2, MoCo v3 or any timm ViT file, a release folder, or a name
    weights: str = ""
    # timm name; CLIP files that do not tell GELU from QuickGELU need it
    architecture: str = "auto"
    # size the teacher looks at; its grid must be the encoder's; 0: the size it was trained at
    image_px: int = 0


@dataclass(frozen=True, config=_strict)
class AdversarialSettings:
    """PatchGAN critic, off by default: the tokens of masked pre-training are not picked for looks."""

    weight: float = 0.0
    start_step: int = 0
    channels: int = 64
    layers: int = 3
    lr: float = 1e-4


@dataclass(frozen=True, config=_strict)
class TokenizerLossSettings:
    pixel: Literal["mse", "l1"] = "mse"
    pixel_weight: float = 1.0
    commitment_weight: float = 0.25


@dataclass(frozen=True, config=_strict)
class EvaluationSettings:
    # held-out PSNR, SSIM, code usage; 0: only at the end
    every_steps: int = 1000
    max_images: int = 1000
    # original | reconstruction pairs in TensorBoard and reconstructions.png
    grid_images: int = 8


@dataclass(frozen=True, config=_strict)
class TokenizerRecipe:
    """One tokenizer training run."""

    name: str = "tokenizer"
    data: DataSettings = field(default_factory=DataSettings)
    views: ViewSettings = field(default_factory=ViewSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    loss: TokenizerLossSettings = field(default_factory=TokenizerLossSettings)
    perceptual: PerceptualSettings = field(default_factory=PerceptualSettings)
    adversarial: AdversarialSettings = field(default_factory=AdversarialSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    run: RunSettings = field(default_factory=RunSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)


@dataclass(frozen=True, config=_strict)
class InitSettings:
    """Where the weights of a fine-tuning or a probe come from."""

    # run folder of pretrain.py or finetune.py, release folder (timm, Hugging Face, unilm), or weights file; empty: from
    # scratch
    weights: str = ""
    # which weights of a fine-tuning run; auto: the moving average where the run kept one
    average: Literal["auto", "ema", "raw"] = "auto"
    # mean and deviation of the images the weights know; half: 0.5, 0.5; auto: as their config says, else ImageNet's
    statistics: Literal["auto", "imagenet", "half"] = "auto"
    # auto: a classifier's head is kept, and has to have the images' classes; new: it starts afresh
    head: Literal["auto", "new"] = "auto"


@dataclass(frozen=True, config=_strict)
class ClassifierSettings:
    # mean: over the patches, then fc_norm; class: the class token after the final norm
    pooling: Literal["mean", "class"] = "mean"
    head_scale: float = 0.001  # initial head weights times this, as BEiT
    # rate of a block = rate of the one above times this; patch embedding lowest, head and pooling norm at the full rate
    layer_decay: float = 0.65
    smoothing: float = 0.1


@dataclass(frozen=True, config=_strict)
class AugmentSettings:
    """Random images for training, all of it timm's: crop, flip, RandAugment, erasing, mixup, cutmix, repeated
    augmentation.
    """

    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (0.75, 4.0 / 3.0)
    flip: float = 0.5
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    color_jitter: float = 0.0  # used only without auto_augment, as in timm
    # timm's text for RandAugment 9 / 0.5; empty: none
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25  # probability; per-pixel noise
    mixup: float = 0.8  # alpha of the Beta distribution; 0: none
    cutmix: float = 1.0
    mix_probability: float = 1.0  # of mixing a batch at all
    switch_probability: float = 0.5  # of cutmix where both are on
    # repeated augmentation: every image so often in a row, an epoch sees 1 / repeats of the images; DeiT has 3
    repeats: int = 1


@dataclass(frozen=True, config=_strict)
class EmaSettings:
    # of the moving average of the weights, updated after every optimiser step t at most with (1 + t) / (10 + t); 0:
    # none
    decay: float = 0.0


@dataclass(frozen=True, config=_strict)
class ClassificationSettings:
    """Top-1 and top-5 on data.val_images while a classifier trains."""

    every_epochs: float = 1.0  # 0: only at the end
    # share of the resized image's short side that is seen; 1: the whole central square (BEiT from 384 px on)
    crop: float = 0.875
    # images a forward pass, a rank; 0: run.micro_batch
    batch: int = 0


@dataclass(frozen=True, config=_strict)
class FinetuneRecipe:
    """One fine-tuning run: weights + labelled images -> classifier."""

    name: str = "finetune"
    data: DataSettings = field(default_factory=DataSettings)
    init: InitSettings = field(default_factory=InitSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    classifier: ClassifierSettings = field(default_factory=ClassifierSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    ema: EmaSettings = field(default_factory=EmaSettings)
    evaluation: ClassificationSettings = field(default_factory=ClassificationSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    run: RunSettings = field(default_factory=RunSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)


@dataclass(frozen=True, config=_strict)
class ProbeSettings:
    """Linear classifiers and nearest neighbours on frozen features."""

    image_px: int = 0  # 0: the size the weights were trained at
    crop: float = 0.875
    # features after these blocks, counted from 1; empty: after every block
    blocks: tuple[int, ...] = ()
    # class token beside the mean patch token, as BEiT's probe
    pooling: Literal["class_mean", "class", "mean"] = "class_mean"
    lrs: tuple[float, ...] = (1e-3, 4e-3, 1e-2)  # one classifier each, side by side
    epochs: int = 50
    global_batch: int = 1024
    weight_decay: float = 1e-4
    knn_k: tuple[int, ...] = (10, 20)
    knn_temperature: float = 0.07
    # images a forward pass, a rank, while features are taken
    feature_batch: int = 128
    # of the frozen backbone; the classifiers train in fp32
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0


@dataclass(frozen=True, config=_strict)
class ProbeRecipe:
    """One linear probe: frozen weights + labelled images -> accuracy over layers."""

    name: str = "probe"
    data: DataSettings = field(default_factory=DataSettings)
    init: InitSettings = field(default_factory=InitSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)


Recipe = PretrainRecipe | TokenizerRecipe | FinetuneRecipe | ProbeRecipe
# which stages read which settings, for messages
READERS = {
    PretrainRecipe: "pretrain.py and tokenize_shards.py",
    TokenizerRecipe: "train_tokenizer.py",
    FinetuneRecipe: "finetune.py",
    ProbeRecipe: "linear_probe.py",
}


@dataclass(frozen=True)
class Resolved:
    """A recipe with the source of every value that is not a default."""

    recipe: Recipe
    sources: dict[str, str]

    def as_dict(self) -> dict:
        """What `settings.yaml` of a run folder holds."""
        return {"recipe": asdict(self.recipe), "sources": self.sources}


# --------------------------------------------------------------------------------------------- reading


def load_recipe(recipe_type: type, path: str | Path, overrides: list[str], environ=os.environ) -> Resolved:
    """Defaults, environment, recipe file, overrides -> one frozen recipe.

    Args:
        recipe_type: one of `READERS`.
        path: YAML file; a bare name is looked up among the package's recipes.
        overrides: "a.b=c" texts; the value is read as YAML.
    Raises: UserError naming the key, with the nearest known one, for an unknown or mistyped key, a missing file, a
        value out of range, or two spellings of one duration.
    """
    path = find_recipe(path)
    merged: dict = {}
    sources: dict[str, str] = {}
    if environ.get("PECO_DATA_ROOT"):
        _set(merged, sources, "data.root", environ["PECO_DATA_ROOT"], "environment PECO_DATA_ROOT", recipe_type)
    for key, value in _read_yaml(path):
        _set(merged, sources, key, value, str(path), recipe_type)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"override {short(text)}: written as key.sub=value")
        try:
            parsed = parse_yaml(value) if value else ""
        except NOT_YAML:
            raise UserError(f"override {short(text)}: the value is not YAML; quote it") from None
        if isinstance(parsed, dict):
            raise UserError(
                f"override {short(text)}: sets one value, not a section; write {key[:80]}.NAME=VALUE for each"
            )
        _set(merged, sources, key, parsed, COMMAND_LINE, recipe_type)
    _displace(merged, sources)
    try:
        recipe = TypeAdapter(recipe_type).validate_python(merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        raise UserError(
            f"{key} = {short(first['input'])}: {first['msg']} (from {sources.get(key, 'the recipe')})"
        ) from None
    check_recipe(recipe)
    return Resolved(recipe, sources)


# Two spellings of one duration. A spelling of the command line takes the place of the recipe's other one.
_SPELLINGS = (
    ("schedule.epochs", "schedule.steps"),
    ("schedule.warmup_epochs", "schedule.warmup_steps"),
    ("checkpoint.every_epochs", "checkpoint.every_steps"),
)


def _displace(merged: dict, sources: dict) -> None:
    for pair in _SPELLINGS:
        for mine, other in (pair, pair[::-1]):
            if sources.get(mine) == COMMAND_LINE and sources.get(other, COMMAND_LINE) != COMMAND_LINE:
                section, name = other.split(".")
                merged[section][name] = None
                sources[other] = f"displaced by {mine}"


def find_recipe(path: str | Path) -> Path:
    path = Path(path)
    named = [RECIPES / path.name, RECIPES / f"{path.name}.yaml"] if len(path.parts) == 1 else []
    for candidate in (path, *named):
        if candidate.is_file():
            return candidate
    known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    raise UserError(f"recipe {str(path)!r}: no such file; known recipes: {', '.join(known)}{nearest(path.stem, known)}")


# PyYAML lets these through, beside its own error, for text of the right form without a value (a 13th month) or nested
# without end.
NOT_YAML = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)


# more than any recipe or record of settings; PyYAML takes seconds for it, and minutes for a megabyte
_YAML_BYTES = 1 << 17


class _StrictLoader(yaml.SafeLoader):
    """Plain values only.

    A key that stands twice and an alias are refused: the one hides a setting, the other makes gigabytes out of ten
    lines.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"alias *{event.anchor}: aliases are not read, write the value again", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {short(key.value)} stands twice", key.start_mark
                )
            seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str):
    """The value of a YAML text. Raises: one of `NOT_YAML`."""
    return yaml.load(text, _StrictLoader)


def read_yaml(path: Path):
    """The value of a YAML file. Raises: one of `NOT_YAML`."""
    if path.stat().st_size > _YAML_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes, at most {_YAML_BYTES} are read")
    return parse_yaml(path.read_text(encoding="utf-8"))


def _read_yaml(path: Path) -> list[tuple[str, object]]:
    """Dotted settings of a recipe file, in its order."""
    try:
        raw = read_yaml(path)
        raw = {} if raw is None else raw
        settings = list(_flatten(raw)) if isinstance(raw, dict) else []
    except NOT_YAML as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds {type(raw).__name__}, a recipe is sections of settings")
    twice = next((key for key, count in Counter(key for key, _ in settings).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{path}: {short(twice)} is set twice, once with its section written before a dot; drop one")
    return settings


def _flatten(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set(merged: dict, sources: dict, key: str, value, source: str, recipe_type: type) -> None:
    known = known_keys(recipe_type)
    if key not in known and not _is_option(key, known):
        others = [readers for other, readers in READERS.items() if key in known_keys(other)]
        if others:
            raise UserError(
                f"{source}: {short(key)} is a setting of {', '.join(others)}, not of this stage{nearest(key, known)}"
            )
        raise UserError(
            f"{source}: unknown setting {short(key)}{nearest(key, known)}; all settings stand in peco_ds/config.py"
        )
    *sections, name = key.split(".")
    node = merged
    for section in sections:
        node = node.setdefault(section, {})
    node[name] = value
    sources[key] = source


def _is_option(key: str, known: list[str]) -> bool:
    """Whether it is a setting that a kind declares, as `check_options` will find out."""
    section = key.rpartition(".")[0]
    return section.endswith(".options") and section in known


def known_keys(recipe_type: type) -> list[str]:
    """Every dotted setting of a recipe."""
    keys = []

    def collect(instance, prefix):
        for item in fields(instance):
            value = getattr(instance, item.name)
            collect(value, f"{prefix}{item.name}.") if is_dataclass(value) else keys.append(prefix + item.name)

    collect(recipe_type(), "")
    return keys


def nearest(key: str, known: list[str]) -> str:
    # nothing longer is near; comparing takes the square of its length
    key = key[:100]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    # right name in the wrong section, or no section at all
    if not close:
        close = [other for other in known if other.split(".")[-1] == key.split(".")[-1]][:1]
    return f"; did you mean {close[0]!r}?" if close else ""


# ---------------------------------------------------------------------------------------- cross-checks


def check_recipe(recipe: Recipe) -> None:
    """Everything that can be refused without files and without knowing the number of ranks."""
    _require_at_least(1, recipe, "data.shuffle_window_shards")
    _require_at_least(0, recipe, "data.num_workers data.holdout data.max_bad_share")
    _require(recipe.data.max_bad_share <= 1, f"data.max_bad_share {recipe.data.max_bad_share}: a share, at most 1")
    if hasattr(recipe, "schedule"):
        _check_training(recipe)
    if hasattr(recipe, "views"):
        _check_views(recipe)
    if hasattr(recipe, "model"):
        _check_model(recipe)
    {
        PretrainRecipe: _check_pretrain,
        TokenizerRecipe: _check_tokenizer,
        FinetuneRecipe: _check_finetune,
        ProbeRecipe: _check_probe,
    }[type(recipe)](recipe)


def _check_training(recipe) -> None:
    schedule = recipe.schedule
    _require_at_least(
        1,
        recipe,
        "run.global_batch run.micro_batch run.log_every_steps checkpoint.keep_last "
        "schedule.stop_at_step checkpoint.every_steps",
    )
    _require_at_least(
        0,
        recipe,
        "schedule.epochs schedule.steps schedule.warmup_epochs schedule.warmup_steps schedule.min_lr "
        "checkpoint.every_epochs",
    )
    _require_at_least(
        0,
        recipe,
        "optim.lr optim.eps optim.weight_decay optim.clip_norm checkpoint.keep_every_steps "
        "checkpoint.every_minutes run.seed",
    )
    _require_at_least(0, recipe, "run.max_skipped_steps run.spike_factor run.hang_timeout_s")
    _require(
        recipe.run.hang_timeout_s == 0 or recipe.run.hang_timeout_s >= 1,
        f"run.hang_timeout_s {recipe.run.hang_timeout_s}: seconds, at least 1, or 0 for no watchdog",
    )
    _require(
        recipe.run.max_skipped_steps < 128,
        f"run.max_skipped_steps {recipe.run.max_skipped_steps}: of the last 128 steps, so below 128",
    )
    _require(
        recipe.run.spike_factor == 0 or recipe.run.spike_factor > 1,
        f"run.spike_factor {recipe.run.spike_factor}: above 1, or 0 for none",
    )
    _require(
        recipe.run.compile != "blocks" or recipe.run.layer_norm == "torch",
        "run.compile blocks and run.layer_norm apex are both set: a compiled block fuses its own "
        "layer norm; set run.layer_norm=torch, or run.compile=none",
    )
    _require(recipe.optim.lr > 0, f"optim.lr {recipe.optim.lr}: must be positive")
    _require(all(0 <= beta < 1 for beta in recipe.optim.betas), f"optim.betas {recipe.optim.betas}: each in [0, 1)")
    _require(
        schedule.epochs is None or schedule.steps is None,
        "schedule.epochs and schedule.steps are both set; a duration has one spelling, drop one",
    )
    _require(
        schedule.epochs is not None or schedule.steps is not None,
        "schedule.epochs is not set; give schedule.epochs or schedule.steps",
    )
    _require(
        schedule.warmup_epochs is None or schedule.warmup_steps is None,
        "schedule.warmup_epochs and schedule.warmup_steps are both set; drop one",
    )
    _require(
        recipe.checkpoint.every_epochs is None or recipe.checkpoint.every_steps is None,
        "checkpoint.every_epochs and checkpoint.every_steps are both set; drop one",
    )


def _check_views(recipe) -> None:
    views = recipe.views
    _require_at_least(1, recipe, "views.count views.tokenizer_px")
    _require_at_least(0, recipe, "views.topk views.seed")
    _require(views.topk_temperature > 0, f"views.topk_temperature {views.topk_temperature}: must be positive")
    _check_crops("views", views)
    _require(0 <= views.color_jitter < 1, f"views.color_jitter {views.color_jitter}: in [0, 1)")


def _check_crops(section: str, crops) -> None:
    _require(
        0 < crops.scale[0] <= crops.scale[1] <= 1,
        f"{section}.scale {crops.scale}: two shares of the area, 0 < low <= high <= 1",
    )
    _require(
        0 < crops.ratio[0] <= crops.ratio[1], f"{section}.ratio {crops.ratio}: two positive aspect ratios, low <= high"
    )
    _require(0 <= crops.flip <= 1, f"{section}.flip {crops.flip}: a probability")


def _check_model(recipe) -> None:
    model = recipe.model
    _require_at_least(1, recipe, "model.image_px model.patch_px model.width model.depth model.heads")
    _require(
        model.image_px % model.patch_px == 0,
        f"model.image_px {model.image_px} is not a multiple of model.patch_px {model.patch_px}",
    )
    _require(
        model.width % model.heads == 0, f"model.width {model.width} is not a multiple of model.heads {model.heads}"
    )
    _require(
        int(model.width * model.mlp_ratio) >= 1,
        f"model.mlp_ratio {model.mlp_ratio}: gives a hidden layer without units",
    )
    _require(0 <= model.drop_path < 1, f"model.drop_path {model.drop_path}: in [0, 1)")
    if model.drop_path_by == "subset" and model.drop_path > 0:
        _require(
            images_taken(recipe.run.micro_batch, model.drop_path) < recipe.run.micro_batch,
            f"model.drop_path_by subset: of run.micro_batch {recipe.run.micro_batch} images a rate of "
            f"{model.drop_path} leaves out none, subsets are of whole images; raise one of the two, or "
            "set model.drop_path_by=image",
        )


def _check_pretrain(recipe: PretrainRecipe) -> None:
    mask, patches = recipe.mask, recipe.model.grid**2
    _require_at_least(1, recipe, "mask.min_block objective.num_codes")
    _require(
        0 < mask.count < patches,
        f"mask.count {mask.count}: the image has {patches} patches, hide between 1 and {patches - 1}",
    )
    _require(0 < mask.min_aspect <= 1, f"mask.min_aspect {mask.min_aspect}: in (0, 1]")
    _require(
        mask.kind == "random" or mask.min_block <= mask.count,
        f"mask.min_block {mask.min_block} is more than mask.count {mask.count}; lower it",
    )
    _check_objective(recipe)
    _check_variants(recipe)


def _check_objective(recipe: PretrainRecipe) -> None:
    objective = recipe.objective
    _require(
        objective.num_codes <= 65536,
        f"objective.num_codes {recipe.objective.num_codes}: codes are stored as uint16, at most 65536",
    )
    _require(0 <= objective.omega <= 1, f"objective.omega {objective.omega}: a share, in [0, 1]")
    _require(
        objective.similarity_temperature > 0,
        f"objective.similarity_temperature {objective.similarity_temperature}: must be positive",
    )
    kind = OBJECTIVES.named(objective.name)
    _require(
        not kind.soft_codes or recipe.views.topk > 0,
        f"objective.name {objective.name} learns from soft codes, and views.topk is 0; set views.topk "
        "(mc-BEiT's recipes: 64) and tokenize with it",
    )
    check_options(objective.options, kind.options, "objective.options")
    kind.check(recipe)


def _check_variants(recipe: PretrainRecipe) -> None:
    model, encoding, aggregation = recipe.model, recipe.encoding, recipe.aggregation
    _require_at_least(
        1, recipe, "encoding.decoder_width encoding.decoder_depth encoding.decoder_heads aggregation.blocks"
    )
    _require_at_least(0, recipe, "aggregation.early_block")
    _require(
        aggregation.early_block < model.depth,
        f"aggregation.early_block {aggregation.early_block}: the backbone has {model.depth} blocks, "
        f"so an early one is 1 to {model.depth - 1} (BEiT v2: 9 of 12, 21 of 24), or 0 for no second "
        "branch",
    )
    visible = encoding.kind == "visible"
    _require(
        encoding.decoder_width % encoding.decoder_heads == 0,
        f"encoding.decoder_width {encoding.decoder_width} is not a multiple of encoding.decoder_heads "
        f"{encoding.decoder_heads}",
    )
    _require(
        not visible or recipe.mask.exact,
        "encoding.kind visible needs the same number of visible patches in every image; set mask.exact=true",
    )
    _require(
        not (visible and aggregation.early_block),
        "encoding.kind visible and aggregation.early_block are both set: the second branch needs a "
        "token at every place; drop one",
    )


def _check_finetune(recipe: FinetuneRecipe) -> None:
    augment, classifier = recipe.augment, recipe.classifier
    _check_crops("augment", augment)
    _require_at_least(1, recipe, "augment.repeats")
    _require_at_least(
        0,
        recipe,
        "augment.mixup augment.cutmix augment.color_jitter evaluation.every_epochs evaluation.batch "
        "classifier.head_scale",
    )
    for key in ("erasing", "mix_probability", "switch_probability"):
        _require(0 <= getattr(augment, key) <= 1, f"augment.{key} {getattr(augment, key)}: a probability")
    mixes = augment.mix_probability > 0 and (augment.mixup > 0 or augment.cutmix > 0)
    _require(
        not mixes or recipe.run.micro_batch % 2 == 0,
        f"run.micro_batch {recipe.run.micro_batch} is odd: mixup and cutmix pair the images of a "
        "pass; make it even, or set augment.mixup=0 augment.cutmix=0",
    )
    _require(0 <= classifier.smoothing < 1, f"classifier.smoothing {classifier.smoothing}: in [0, 1)")
    _require(
        0 < classifier.layer_decay <= 1,
        f"classifier.layer_decay {classifier.layer_decay}: in (0, 1]; 1 gives every block the same rate",
    )
    _require(0 <= recipe.ema.decay < 1, f"ema.decay {recipe.ema.decay}: in [0, 1)")
    _require(0 < recipe.evaluation.crop <= 1, f"evaluation.crop {recipe.evaluation.crop}: in (0, 1]")
    _require(
        recipe.data.val_images != "", "data.val_images is empty; give the labelled images that top-1 is measured on"
    )


def _check_probe(recipe: ProbeRecipe) -> None:
    probe = recipe.probe
    _require_at_least(1, recipe, "probe.epochs probe.global_batch probe.feature_batch")
    _require_at_least(0, recipe, "probe.image_px probe.weight_decay probe.seed")
    _require(0 < probe.crop <= 1, f"probe.crop {probe.crop}: in (0, 1]")
    _require(len(probe.lrs) > 0 and min(probe.lrs) > 0, f"probe.lrs {probe.lrs}: one positive rate at least")
    _require(all(k >= 1 for k in probe.knn_k), f"probe.knn_k {probe.knn_k}: each at least 1")
    _require(probe.knn_temperature > 0, f"probe.knn_temperature {probe.knn_temperature}: must be positive")
    _require(
        recipe.init.weights != "",
        "init.weights is empty; give the run folder, release or weights file whose features are probed",
    )
    _require(
        recipe.data.val_images != "",
        "data.val_images is empty; give the labelled images that accuracy is measured on",
    )


def _check_tokenizer(recipe: TokenizerRecipe) -> None:
    for name in ("activation_checkpointing", "compile"):
        asked = getattr(recipe.run, name)
        _require(
            asked in ("none", "auto"),
            f"run.{name} {asked}: is of transformers that are pre-trained or fine-tuned; a tokenizer is "
            "trained without, drop it",
        )
    _require_at_least(1, recipe, "evaluation.max_images evaluation.grid_images")
    _require_at_least(0, recipe, "evaluation.every_steps")
    check_tokenizer_settings(recipe.tokenizer)
    kind, stride, size = recipe.tokenizer.kind, recipe.tokenizer.stride_px, recipe.views.tokenizer_px
    _require(size % stride == 0, f"views.tokenizer_px {size} is not a multiple of the tokenizer's stride {stride}")
    _require(
        recipe.tokenizer.only_px in (None, size),
        f"views.tokenizer_px {size} is not tokenizer.vit.image_px {recipe.tokenizer.only_px}; set both to one size",
    )
    judged, taught = kinds_learning_from("judge"), kinds_learning_from("teacher")
    _require(
        kind in judged + taught,
        f"tokenizer.kind {kind}: is read from released files (import_tokenizer.py), not trained here; "
        f"{' and '.join(judged + taught)} are",
    )
    if kind in taught:
        _require(
            recipe.perceptual.weights == "",
            f"perceptual.weights {recipe.perceptual.weights}: a tokenizer of kind {kind} has a teacher and "
            "no judge; drop it, and set teacher.weights",
        )
        _require(
            recipe.teacher.weights != "",
            "teacher.weights is empty; give a CLIP, DINO or any timm ViT file, whose features a "
            f"tokenizer of kind {kind} learns to give",
        )
        _require(
            recipe.adversarial.weight == 0,
            f"adversarial.weight {recipe.adversarial.weight}: a tokenizer of kind {kind} makes no images "
            "for a critic; set it to 0",
        )
    else:
        _require(
            recipe.teacher.weights == "",
            f"teacher.weights {recipe.teacher.weights}: a tokenizer of kind {kind} has a judge and no "
            f"teacher; drop it, or set tokenizer.kind={' or '.join(taught)}",
        )
        _require(
            recipe.perceptual.weight == 0 or recipe.perceptual.weights != "",
            "perceptual.weights is empty; give a MoCo v3 file (vit-b-300ep.pth.tar) or any timm ViT "
            "file, or set perceptual.weight=0 for a tokenizer without a judge",
        )
    _require(
        recipe.data.val_images != "" or recipe.data.holdout > 0,
        "no held-out image to judge the tokenizer on; set data.val_images to an image set, or "
        "data.val_images= data.holdout=N to keep N of the training images",
    )


def check_tokenizer_settings(settings: TokenizerSettings, section: str = "tokenizer") -> None:
    """Raises: UserError if they describe no network; a release's are checked as a recipe's are."""
    kind = TOKENIZERS.named(settings.kind, f"{section}.kind")
    check_options(settings.options, kind.options, f"{section}.options")
    for low, names in (
        (1, "channels blocks_per_level z_channels num_codes code_dim kmeans_vectors"),
        (0, "kmeans_iters revive_below"),
    ):
        for name in names.split():
            _require(
                getattr(settings, name) >= low, f"{section}.{name} {getattr(settings, name)}: must be at least {low}"
            )
    mults = settings.channel_mults
    _require(
        1 <= len(mults) <= 16 and min(mults) >= 1,
        f"{section}.channel_mults {short(mults)}: one positive factor a level",
    )
    _require(
        settings.decoder or kind.decoder_optional,
        f"{section}.decoder false: a {settings.kind} tokenizer has one; only "
        f"{' or '.join(name for name, other in TOKENIZERS.items() if other.decoder_optional)} can be without",
    )
    _require(
        settings.num_codes <= 65536,
        f"{section}.num_codes {settings.num_codes}: codes are stored as uint16, at most 65536",
    )
    _require(
        settings.average == "sums" or settings.l2_normalized,
        f"{section}.average {settings.average}: is of unit codes; set {section}.l2_normalized=true, "
        f"or {section}.average=sums",
    )
    kind.check(settings, section)


def _require_at_least(low: int, recipe, keys: str) -> None:
    for key in keys.split():
        section, name = key.split(".")
        value = getattr(getattr(recipe, section), name)
        _require(value is None or value >= low, f"{key} {value}: must be at least {low}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


# ------------------------------------------------------------------------------------- derived numbers


@dataclass(frozen=True)
class Durations:
    """The schedule in optimiser steps."""

    total_steps: int
    warmup_steps: int
    checkpoint_steps: int  # 0: only at the end
    # where this run ends: total_steps, or schedule.stop_at_step
    stop_step: int
    evaluation_steps: int = 0  # of a classifier; 0: only at the end
    keep_steps: int = 0  # checkpoints kept for good; 0: none

    def save_after(self, step: int) -> bool:
        """Whether a checkpoint is due when `step` steps are done."""
        return step == self.stop_step or any(
            cadence > 0 and step % cadence == 0 for cadence in (self.checkpoint_steps, self.keep_steps)
        )

    def evaluate_after(self, step: int) -> bool:
        """Whether a classifier is measured when `step` steps are done."""
        return step == self.stop_step or (self.evaluation_steps > 0 and step % self.evaluation_steps == 0)


def resolve_durations(recipe, num_samples: int) -> Durations:
    """Epochs -> steps, once. An epoch is every sample once; batches run across its end, so nothing is dropped.

    Raises: UserError if a run would have no step at all.
    """
    schedule, batch = recipe.schedule, recipe.run.global_batch

    def steps(epochs, count, default):
        if count is not None:
            return count
        return math.floor(epochs * num_samples / batch) if epochs is not None else default

    total = steps(schedule.epochs, schedule.steps, 0)
    _require(
        total >= 1,
        f"schedule gives {total} steps: {num_samples} samples, global_batch {batch}, epochs "
        f"{schedule.epochs}; raise schedule.epochs or lower run.global_batch",
    )
    every = steps(recipe.checkpoint.every_epochs, recipe.checkpoint.every_steps, 0)
    warmup = steps(schedule.warmup_epochs, schedule.warmup_steps, 0)
    spelt = (
        f"schedule.warmup_steps {warmup}"
        if schedule.warmup_steps is not None
        else f"schedule.warmup_epochs {schedule.warmup_epochs} = {warmup} steps"
    )
    _require(
        warmup <= total, f"the warm-up ({spelt}) is longer than the run of {total} steps; set {spelt.split()[0]} lower"
    )
    evaluation = 0
    if isinstance(recipe, FinetuneRecipe) and recipe.evaluation.every_epochs:
        evaluation = max(1, steps(recipe.evaluation.every_epochs, None, 0))
    return Durations(
        total, warmup, every, min(total, schedule.stop_at_step or total), evaluation, recipe.checkpoint.keep_every_steps
    )


def micro_steps(run: RunSettings, world_size: int) -> int:
    """Gradient accumulation: forward passes a rank makes for one optimiser step.

    Raises: UserError if the global batch does not divide.
    """
    per_pass = run.micro_batch * world_size
    if run.global_batch % per_pass:
        low = run.global_batch // per_pass * per_pass
        near = f"{low} or {low + per_pass}" if low else f"{per_pass}"
        raise UserError(
            f"global_batch {run.global_batch} is not a multiple of micro_batch {run.micro_batch} x "
            f"{world_size} ranks = {per_pass}; "
            f"use {near}, or change run.micro_batch"
        )
    return run.global_batch // per_pass


def data_path(data: DataSettings, value: str) -> Path:
    """A path of the recipe: absolute as it stands, else under data.root."""
    return (
        Path(os.path.expanduser(value))
        if os.path.isabs(os.path.expanduser(value))
        else Path(os.path.expanduser(data.root)) / value
    )
