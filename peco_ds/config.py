"""All settings: one frozen dataclass a section, one a recipe.

A field carries its default, its range (`Bounds`), and whether a run may be continued with another value
(`FreeOnResume`; a run folder refuses a change of any other setting). A comment above a field says what the name does
not. YAML is the text of these classes (`recipe_files.py`), `a.b=c` on the command line overrides it.

The recipe owns batch, optimiser, schedule, clipping and precision. Accumulation is derived (`durations.py`). The rest
of the engine is the DeepSpeed JSON's (`deepspeed_json.py`). No torch is imported here, so a misspelt key answers at
once.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from peco_ds.field_marks import AbsentMeans, Bounds, FreeOnResume, Renamed
from peco_ds.registry import OBJECTIVES, TOKENIZERS, Option

# A value of data.tokens: the codes are computed in the training loop.
ONLINE = "online"
# A value of data.cache: nothing is kept.
NO_CACHE = "none"

AtLeastOne = Annotated[int, Bounds(at_least=1)]
AtLeastZero = Annotated[int, Bounds(at_least=0)]
Positive = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(at_least=0)]
# A share or a probability.
Share = Annotated[float, Bounds(at_least=0, at_most=1)]
ShareAboveZero = Annotated[float, Bounds(above=0, at_most=1)]
ShareBelowOne = Annotated[float, Bounds(at_least=0, below=1)]
# Which weights of a run that kept a moving average. auto: the average where there is one.
Average = Literal["auto", "ema", "raw"]
# Precision of a frozen network that judges or teaches.
FrozenPrecision = Literal["auto", "bf16", "fp32"]
# How attention with a bias that all images share is computed (models/attention.py).
AttentionForm = Literal["auto", "triton", "unfused", "efficient"]
# V, codes of a codebook.
NumCodes = Annotated[int, Bounds(at_least=1, at_most=65536, because="codes are stored as uint16")]

# Built when the first of its kind is made: a start needs the settings of one stage alone, and --help of none.
_strict = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)


@dataclass(frozen=True, config=_strict)
class DataSettings:
    """Where the data lie and how they are read. Relative paths are taken under `root`.

    Paths may change on resume: what lies there is compared by its fingerprint. Each may be a URL (s3://, https://,
    ...), without credentials: those come from where fsspec's libraries look, or as a $VARIABLE in the URL.
    """

    root: Annotated[str, FreeOnResume()] = "data"
    # Folder of image shards (pack_images.py).
    images: Annotated[str, FreeOnResume()] = "images/train"
    # Held-out image shards. Empty: the last `holdout` images of `images` judge the tokenizer.
    val_images: Annotated[str, FreeOnResume()] = ""
    # Images kept from tokenizer training to judge it, when val_images is empty.
    holdout: AtLeastZero = 0
    # Folder of token shards (tokenize_shards.py), or "online".
    tokens: Annotated[str, FreeOnResume()] = "tokens/train"
    # Release folder of a tokenizer (train_tokenizer.py, import_tokenizer.py).
    tokenizer: Annotated[str, FreeOnResume()] = "tokenizer"
    # Loader processes a rank. The order of samples does not depend on it.
    num_workers: Annotated[AtLeastZero, FreeOnResume()] = 8
    # Samples are permuted inside a window of so many permuted shards.
    shuffle_window_shards: AtLeastOne = 16
    # Share of failed image readings above which a rank ends the run. The first 10 are always allowed; each is logged
    # and counted.
    max_bad_share: Annotated[Share, FreeOnResume()] = 1e-4
    # What is hashed at the start. The CRC of every record is checked in any case, when it is read.
    # What lies in a store is hashed with "all" alone: that reads it from end to end.
    verify: Annotated[Literal["size", "tokens", "all"], FreeOnResume()] = "tokens"
    # Folder on a disk of the node that keeps what was read from stores, for all ranks of the node. none: nothing is
    # kept.
    cache: Annotated[str, FreeOnResume()] = NO_CACHE
    # Bound of the cache. What was used longest ago goes first.
    cache_gib: Annotated[Positive, FreeOnResume()] = 100.0
    # Keep whole shards, which a node reads once: for few nodes. False: only what its ranks ask for.
    cache_whole_shards: Annotated[bool, FreeOnResume()] = False
    # Seconds a request to a store is repeated before the run ends with the code that launchers requeue.
    store_retry_s: Annotated[NotNegative, FreeOnResume()] = 120.0
    # Requests to stores at a time, of each loader process.
    store_requests: Annotated[AtLeastOne, FreeOnResume()] = 8


@dataclass(frozen=True, config=_strict)
class ViewSettings:
    """The random views that the tokenizer sees and pre-training replays (BEiT, section 4.2)."""

    # Side of the tokenizer's crop.
    tokenizer_px: AtLeastOne = 224
    # Resizing of the tokenizer's crop. BEiT's is Lanczos.
    tokenizer_interpolation: Literal["bicubic", "lanczos"] = "bicubic"
    # Precision of the tokenizer's network while codes are computed. Its last layer and the search for the nearest code
    # are always fp32. fp16 rounds an eighth as coarsely as bf16, as BEiT's own tokenizing; a network whose numbers
    # outgrow it is refused.
    tokenizer_precision: Annotated[Literal["bf16", "fp16", "fp32"], AbsentMeans("fp32", stage="pretrain")] = "bf16"
    # Share of the image's area that a crop covers: lowest and highest.
    scale: tuple[ShareAboveZero, ShareAboveZero] = (0.08, 1.0)
    # Aspect ratio of a crop, width over height: lowest and highest.
    ratio: tuple[Positive, Positive] = (0.75, 4.0 / 3.0)
    # Probability of a horizontal flip.
    flip: Share = 0.5
    # Brightness, contrast and saturation are multiplied by 1 +- this at most. Both views of an image carry the same
    # jitter (BEiT).
    color_jitter: ShareBelowOne = 0.4
    # K, views recorded for each image.
    count: AtLeastOne = 1
    # T, soft codes kept for each patch beside the hard one. 0: none.
    topk: AtLeastZero = 0
    # Temperature of the softmax over the tokenizer's logits that gives the soft codes' probabilities. mc-BEiT: 4.
    topk_temperature: Positive = 1.0
    seed: AtLeastZero = 0


@dataclass(frozen=True, config=_strict)
class ModelSettings:
    """The backbone: a ViT with relative position bias (BEiT)."""

    image_px: AtLeastOne = 224
    patch_px: AtLeastOne = 16
    width: AtLeastOne = 768
    depth: AtLeastOne = 12
    heads: AtLeastOne = 12
    # Width of a block's hidden layer over the backbone's width.
    mlp_ratio: float = 4.0
    # Initial value of the scale on both residual branches.
    layer_scale: float = 0.1
    # The gradient of that scale is taken from the gradient of the weight before it, so that nothing is kept for it. The
    # same function, the same loss; gradients differ by their rounding.
    fold_layer_scale: Annotated[
        bool, AbsentMeans(False, stage="pretrain"), AbsentMeans(False, stage="finetune"), FreeOnResume()
    ] = True
    # Stochastic depth of the last block. It grows linearly from 0 at the first block.
    drop_path: ShareBelowOne = 0.1
    # image: every image skips a branch by its own coin. subset: a fixed share of a pass's images, drawn anew for each
    # branch, skips it, which saves their cost.
    drop_path_by: Annotated[Literal["image", "subset"], Renamed(picture="image")] = "image"
    # Beside the relative position bias a learnt vector for each place, added to its token. For weights that were
    # trained with such (beit_base_patch16_224_pt1k_800ep).
    absolute_positions: bool = False
    # How attention is computed. triton: kernels of our own, on a GPU. unfused: products and a softmax, which keep the
    # weights. efficient: PyTorch's memory-efficient kernels. auto: the fastest on this GPU, timed at the run's first
    # start and kept by later ones; efficient on a CPU.
    attention: Annotated[
        AttentionForm,
        AbsentMeans("efficient", stage="pretrain"),
        AbsentMeans("efficient", stage="finetune"),
        FreeOnResume(),
    ] = "auto"
    # Standard deviation of the initial weights. BEiT cuts them at one deviation in pre-training, and nowhere that
    # matters in fine-tuning.
    init_std: float = 0.02

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_px // self.patch_px


@dataclass(frozen=True, config=_strict)
class MaskSettings:
    """Which patches of an image are masked."""

    kind: Literal["block", "random"] = "block"
    # Patches masked in every image.
    count: AtLeastOne = 75
    # False: BEiT's first generator, which stops short of `count` when no further block fits. The loss of a pass is then
    # the mean over its own masked patches.
    exact: bool = True
    # Patches in the smallest block.
    min_block: AtLeastOne = 16
    # The aspect of a block is log-uniform in [min_aspect, 1 / min_aspect].
    min_aspect: ShareAboveZero = 0.3


@dataclass(frozen=True, config=_strict)
class EncodingSettings:
    """What the encoder sees of a masked image."""

    # full: all patches, with a mask token at the masked ones (BEiT). visible: the visible patches alone, and a decoder
    # predicts the others (MAE).
    kind: Literal["full", "visible"] = "full"
    # The decoder is built for `visible` only.
    decoder_width: AtLeastOne = 512
    decoder_depth: AtLeastOne = 8
    decoder_heads: AtLeastOne = 16


@dataclass(frozen=True, config=_strict)
class AggregationSettings:
    """BEiT v2's second branch, dropped at release: the final class token and early patch tokens predict the codes too,
    through the same head.
    """

    # The branch takes patch tokens after this block, counted from 1. 0: no second branch.
    early_block: AtLeastZero = 0
    # Extra blocks of the branch.
    blocks: AtLeastOne = 2


@dataclass(frozen=True, config=_strict)
class ObjectiveSettings:
    """What pre-training predicts."""

    # One of registry.OBJECTIVES.
    name: str = "hard_tokens"
    # Settings that an objective declares for itself, as objective.options.NAME.
    options: dict[str, Option] = field(default_factory=dict, hash=False)
    # Must be the tokenizer's.
    num_codes: NumCodes = 8192
    # multi_choice: weight of the targets averaged over similar patches. The patch's own target has 1 - omega.
    omega: Share = 0.2
    # multi_choice: temperature of the softmax over the cosines between patches.
    similarity_temperature: Positive = 1.0
    # multi_choice: the gradient passes through the similarities, as in the released code.
    similarity_gradient: bool = True
    # multi_choice: the probability of codes that were not stored is spread evenly over them, or given to the stored
    # ones.
    rest: Literal["uniform", "renormalize"] = "uniform"

    def option(self, name: str) -> Option:
        """A setting of the objective's own: the recipe's, or its default."""
        return {**OBJECTIVES[self.name].options, **self.options}[name]


@dataclass(frozen=True, config=_strict)
class OptimSettings:
    """Adam or AdamW."""

    # adamw: weight decay beside the gradient's step. adam: added to the gradient, as an L2 penalty.
    kind: Literal["adamw", "adam"] = "adamw"
    # Whose implementation.
    impl: Literal["torch", "deepspeed", "apex"] = "torch"
    # Highest learning rate.
    lr: Positive = 1.5e-3
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    eps: NotNegative = 1e-8
    weight_decay: NotNegative = 0.05
    # Gradient norm above which gradients are scaled down. 0: no clipping.
    clip_norm: NotNegative = 3.0


@dataclass(frozen=True, config=_strict)
class ScheduleSettings:
    """How long a run is, and how its learning rate falls to `min_lr`.

    A duration is given in epochs or in optimiser steps, not in both.
    """

    # cosine: linear warm-up, then half a cosine. linear: a straight line from the first step on; the warm-up is a
    # factor on it that rises from 1e-6 to 1 (mmsegmentation's poly of power 1). drops: the full rate, times 0.1 at each
    # of `drops`, without a floor.
    decay: Literal["cosine", "linear", "drops"] = "cosine"
    epochs: NotNegative | None = None
    steps: AtLeastZero | None = None
    warmup_epochs: NotNegative | None = None
    warmup_steps: AtLeastZero | None = None
    min_lr: NotNegative = 1e-5
    # decay drops: shares of the run after which the rate falls, rising.
    drops: tuple[ShareBelowOne, ...] = ()
    # decay cosine and drops: the warm-up begins at this share of the rate.
    warmup_from: ShareBelowOne = 0.0
    # Save and end at this step. The schedule stays as it is, and a later start with a higher value continues.
    stop_at_step: Annotated[AtLeastOne | None, FreeOnResume()] = None


@dataclass(frozen=True, config=_strict)
class RunSettings:
    """Batch, precision and speed of a training run, and when it gives up."""

    seed: AtLeastZero = 0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    # Images an optimiser step, over all ranks.
    global_batch: AtLeastOne = 2048
    # Images a forward pass and rank, at most: the most that go evenly into a rank's part of the global batch are taken.
    # Gradient accumulation follows from it.
    micro_batch: Annotated[AtLeastOne, FreeOnResume()] = 64
    # selective: matrix products and attention are kept, the rest is computed again. full: whole blocks are.
    activation_checkpointing: Annotated[Literal["none", "selective", "full"], FreeOnResume()] = "none"
    # blocks: torch.compile for each transformer block, for a tokenizer's network while codes are computed, and for the
    # judge or teacher that a tokenizer learns from. auto: blocks on a GPU unless layer_norm is apex, else none.
    compile: Annotated[Literal["auto", "blocks", "none"], FreeOnResume()] = "auto"
    # Products of transformer blocks in training: output and gradient of the input in 8 bits (e4m3, e5m2), the weight's
    # gradient in bf16. Needs a GPU of compute capability 8.9; a CPU computes the same rounding, slowly.
    fp8: bool = False
    # On a GPU convolutions add up in one order. Costs little, because they are few. Off: cuDNN takes what it likes.
    deterministic: Annotated[bool, FreeOnResume()] = True
    # Whose kernel.
    layer_norm: Annotated[Literal["torch", "apex"], FreeOnResume()] = "torch"
    log_every_steps: Annotated[AtLeastOne, FreeOnResume()] = 20
    # Skipped steps among the last 128 above which the run ends. A step is skipped for a loss or a gradient that is not
    # finite, and for a gradient spike.
    max_skipped_steps: Annotated[
        int, Bounds(at_least=0, below=128, because="they are counted among the last 128 steps"), FreeOnResume()
    ] = 10
    # A gradient norm above so many times the median of the last 128 is a spike. 0: never.
    spike_factor: Annotated[float, Bounds(above=1, or_zero=True), FreeOnResume()] = 30.0
    # Seconds without a finished step after which a rank writes its stacks and ends the run. Start, saves and
    # evaluation have an hour. 0: no watchdog.
    hang_timeout_s: Annotated[float, Bounds(at_least=1, or_zero=True), FreeOnResume()] = 600.0


@dataclass(frozen=True, config=_strict)
class CheckpointSettings:
    """When a run saves. Beside these cadences it saves at the end and at every stop."""

    every_epochs: NotNegative | None = None
    every_steps: AtLeastOne | None = None
    # Minutes since the last save began, beside the above: the most that a failure costs. 0: not by the clock.
    every_minutes: NotNegative = 20.0
    # Newest complete checkpoints kept.
    keep_last: AtLeastOne = 2
    # A checkpoint at every multiple of this is kept for good. 0: none.
    keep_every_steps: AtLeastZero = 0
    # auto: continue from the newest checkpoint of --out that verifies.
    resume: Literal["auto", "never"] = "auto"


@dataclass(frozen=True, config=_strict)
class PretrainRecipe:
    """One masked pre-training run. tokenize_shards.py reads `data` and `views` from the same file."""

    name: Annotated[str, FreeOnResume()] = "pretrain"
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
    checkpoint: Annotated[CheckpointSettings, FreeOnResume()] = field(default_factory=CheckpointSettings)


@dataclass(frozen=True, config=_strict)
class TokenizerVitSettings:
    """Transformers of a tokenizer: a ViT encodes images, another one decodes codes: to a teacher's features (kind vqkd,
    BEiT v2, arXiv 2208.06366), or to images (kind vqvit).
    """

    # The encoder's positions are absolute, so it looks at images of this size alone.
    image_px: AtLeastOne = 224
    patch_px: AtLeastOne = 16
    width: AtLeastOne = 768
    depth: AtLeastOne = 12
    heads: AtLeastOne = 12
    mlp_ratio: float = 4.0
    decoder_width: AtLeastOne = 768
    # vqkd: a deeper decoder follows the teacher better and gives worse tokens.
    decoder_depth: AtLeastOne = 3
    decoder_heads: AtLeastOne = 12
    # vqkd: width of the teacher's features. Must be the teacher's.
    target_width: AtLeastOne = 512


@dataclass(frozen=True, config=_strict)
class TokenizerSettings:
    """A tokenizer's network and its codebook.

    Kind vqgan is VQGAN's autoencoder (arXiv 2012.09841), by default its f16; PeCo's is narrower (recipe
    peco_tokenizer).
    """

    # One of registry.TOKENIZERS. Some are trained here, others are read from released files.
    kind: str = "vqgan"
    # Settings that a kind declares for itself, as tokenizer.options.NAME.
    options: dict[str, Option] = field(default_factory=dict, hash=False)
    # The network of a kind of transformers. The fields from `channels` to `z_channels` describe convolutional ones.
    vit: TokenizerVitSettings = field(default_factory=TokenizerVitSettings)
    channels: AtLeastOne = 128
    # Channels of each level over `channels`. The stride is 2 ** (levels - 1).
    channel_mults: tuple[AtLeastOne, ...] = (1, 1, 2, 2, 4)
    # Residual blocks of a level in the encoder.
    blocks_per_level: AtLeastOne = 2
    # The decoder's `channels`. null: the encoder's.
    decoder_channels: AtLeastOne | None = None
    # The decoder's residual blocks of a level. null: one more than the encoder's (VQGAN).
    decoder_blocks_per_level: AtLeastOne | None = None
    # Single-head attention at the coarsest level and in the middle.
    attention: bool = True
    z_channels: AtLeastOne = 256
    num_codes: NumCodes = 8192
    code_dim: AtLeastOne = 256
    # False: a dvae of which only the encoder was given. It makes codes and no images.
    decoder: bool = True
    # Unit codes and features, BEiT v2's cure for dead codes. Use it with code_dim 32.
    l2_normalized: bool = False
    # Decay of the moving averages of counts and sums.
    decay: float = 0.99
    # What a code averages. sums: the sums of its features (VQ-VAE). directions, with l2_normalized: unit means, every
    # step alike (BEiT v2's released code).
    average: Literal["sums", "directions"] = "sums"
    # Laplace smoothing of the counts.
    count_eps: float = 1e-5
    # Lloyd iterations that initialise the codes on the first images. 0: uniform random codes.
    kmeans_iters: AtLeastZero = 10
    # Encoder outputs gathered for the initialisation, over all ranks.
    kmeans_vectors: AtLeastOne = 65536
    # A code whose averaged count falls below this restarts at a random encoder output. 0: never.
    revive_below: NotNegative = 0.0

    @property
    def stride_px(self) -> int:
        """Side of a patch that becomes one code."""
        return TOKENIZERS[self.kind].stride_px(self)

    @property
    def only_px(self) -> int | None:
        """The one image size that the network takes. None: every multiple of the stride."""
        return TOKENIZERS[self.kind].only_px(self)

    def option(self, name: str) -> Option:
        """A setting of the kind's own: the recipe's, or its default."""
        return {**TOKENIZERS[self.kind].options, **self.options}[name]


@dataclass(frozen=True, config=_strict)
class PerceptualSettings:
    """The judge: a frozen network in whose features reconstructions are compared with their originals."""

    # MoCo v3 .pth.tar, any timm ViT file, a file of a convolutional network, or a release folder. Empty, with weight 0:
    # no judge.
    weights: str = ""
    # timm's name of the network. auto: read from the shapes in the file.
    architecture: str = "auto"
    # Features after these blocks are compared, counted from 1: a ViT's blocks, a convolutional network's stages. Empty:
    # all stages of a convolutional network.
    blocks: tuple[int, ...] = (3, 6, 9, 12)
    # How features are normalised over the channels of a place before they are compared. channel: to unit length
    # (LPIPS). layer: to mean 0 and variance 1, as a layer norm without weights. none: not at all.
    normalize: Annotated[Literal["channel", "layer", "none"], AbsentMeans("none", stage="train_tokenizer")] = "channel"
    # Precision of the judge. auto: bf16 on a GPU, fp32 elsewhere.
    precision: Annotated[FrozenPrecision, AbsentMeans("fp32", stage="train_tokenizer")] = "auto"
    # Crops are resized to this size for the judge. 0: the size it was trained at.
    image_px: int = 0
    # Weight of the perceptual loss.
    weight: float = 1.0


@dataclass(frozen=True, config=_strict)
class TeacherSettings:
    """The teacher: a frozen network whose features VQ-KD's decoder learns to predict."""

    # CLIP, DINO, DINOv2, MoCo v3 or any timm ViT file, a release folder, or a name.
    weights: str = ""
    # timm's name of the network. Needed for CLIP files that do not tell GELU from QuickGELU.
    architecture: str = "auto"
    # Image size for the teacher. Its grid must be the encoder's. 0: the size it was trained at.
    image_px: int = 0
    # Precision of the teacher. auto: bf16 on a GPU, fp32 elsewhere.
    precision: Annotated[FrozenPrecision, AbsentMeans("fp32", stage="train_tokenizer")] = "auto"


@dataclass(frozen=True, config=_strict)
class AdversarialSettings:
    """PatchGAN critic, off by default: tokens for masked pre-training are not chosen by the look of images."""

    # Weight of the adversarial loss. 0: no critic.
    weight: float = 0.0
    # First optimiser step with the adversarial loss.
    start_step: int = 0
    channels: int = 64
    layers: int = 3
    lr: float = 1e-4


@dataclass(frozen=True, config=_strict)
class TokenizerLossSettings:
    """The terms of a tokenizer's loss beside judge, teacher and critic."""

    pixel: Literal["mse", "l1"] = "mse"
    pixel_weight: float = 1.0
    commitment_weight: float = 0.25


@dataclass(frozen=True, config=_strict)
class EvaluationSettings:
    """PSNR, SSIM and code usage on held-out images while a tokenizer trains."""

    # 0: only at the end.
    every_steps: AtLeastZero = 1000
    max_images: AtLeastOne = 1000
    # Pairs of original and reconstruction in TensorBoard and reconstructions.png.
    grid_images: AtLeastOne = 8


@dataclass(frozen=True, config=_strict)
class TokenizerRecipe:
    """One tokenizer training run."""

    name: Annotated[str, FreeOnResume()] = "tokenizer"
    data: DataSettings = field(default_factory=DataSettings)
    views: ViewSettings = field(default_factory=ViewSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    loss: TokenizerLossSettings = field(default_factory=TokenizerLossSettings)
    perceptual: PerceptualSettings = field(default_factory=PerceptualSettings)
    adversarial: AdversarialSettings = field(default_factory=AdversarialSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    evaluation: Annotated[EvaluationSettings, FreeOnResume()] = field(default_factory=EvaluationSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    run: RunSettings = field(default_factory=RunSettings)
    checkpoint: Annotated[CheckpointSettings, FreeOnResume()] = field(default_factory=CheckpointSettings)


@dataclass(frozen=True, config=_strict)
class InitSettings:
    """Where the weights of a fine-tuning or a probe come from."""

    # Run folder of pretrain.py or finetune.py, release folder (timm, Hugging Face, unilm), or weights file. Empty: from
    # scratch.
    weights: str = ""
    # Which weights of a fine-tuning run. auto: the moving average where the run kept one.
    average: Average = "auto"
    # Mean and deviation of the images that the weights expect. half: 0.5 and 0.5. auto: as their config, the arguments
    # in the file or the name of a release tell, else ImageNet's, with a warning.
    statistics: Literal["auto", "imagenet", "half"] = "auto"
    # auto: the head of a classifier is kept and must have the classes of the images. new: it is initialised.
    head: Literal["auto", "new"] = "auto"


@dataclass(frozen=True, config=_strict)
class ClassifierSettings:
    """The head of a classifier, and what its training adds to AdamW."""

    # mean: over the patches, then fc_norm. class: the class token after the final norm.
    pooling: Literal["mean", "class"] = "mean"
    # The initial weights of the head are multiplied by this (BEiT).
    head_scale: NotNegative = 0.001
    # Learning rate of a block over that of the block above it. The patch embedding has the lowest, the head and its
    # norm the full one. 1: all alike.
    layer_decay: ShareAboveZero = 0.65
    # Label smoothing.
    smoothing: ShareBelowOne = 0.1


@dataclass(frozen=True, config=_strict)
class AugmentSettings:
    """Random training images of a classifier, all of it timm's: crop, flip, RandAugment, erasing, mixup, cutmix,
    repeated augmentation.
    """

    # Share of the image's area that a crop covers: lowest and highest.
    scale: tuple[ShareAboveZero, ShareAboveZero] = (0.08, 1.0)
    # Aspect ratio of a crop, width over height: lowest and highest.
    ratio: tuple[Positive, Positive] = (0.75, 4.0 / 3.0)
    # Probability of a horizontal flip.
    flip: Share = 0.5
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    # Used only without auto_augment, as in timm.
    color_jitter: NotNegative = 0.0
    # timm's text; the default is RandAugment 9 / 0.5. Empty: none.
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    # Probability of random erasing with per-pixel noise.
    erasing: Share = 0.25
    # Alpha of the Beta distribution. 0: no mixup.
    mixup: NotNegative = 0.8
    # Alpha of the Beta distribution. 0: no cutmix.
    cutmix: NotNegative = 1.0
    # Probability that a batch is mixed.
    mix_probability: Share = 1.0
    # Probability of cutmix where both are on.
    switch_probability: Share = 0.5
    # Repeated augmentation: every image so many times in a row; an epoch sees 1 / repeats of the images. DeiT: 3.
    repeats: AtLeastOne = 1


@dataclass(frozen=True, config=_strict)
class EmaSettings:
    """The moving average of a classifier's weights."""

    # Decay of an optimiser step; (1 + t) / (10 + t) at step t where that is lower. 0: no average.
    decay: ShareBelowOne = 0.0


@dataclass(frozen=True, config=_strict)
class ClassificationSettings:
    """Top-1 and top-5 on data.val_images while a classifier trains."""

    # 0: only at the end.
    every_epochs: NotNegative = 1.0
    # Share of the resized image's short side that is seen. 1: the whole central square (BEiT from 384 px on).
    crop: ShareAboveZero = 0.875
    # Images a forward pass and rank. 0: run.micro_batch.
    batch: AtLeastZero = 0


@dataclass(frozen=True, config=_strict)
class FinetuneRecipe:
    """One fine-tuning run: weights and labelled images become a classifier."""

    name: Annotated[str, FreeOnResume()] = "finetune"
    data: DataSettings = field(default_factory=DataSettings)
    init: InitSettings = field(default_factory=InitSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    classifier: ClassifierSettings = field(default_factory=ClassifierSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    ema: EmaSettings = field(default_factory=EmaSettings)
    evaluation: Annotated[ClassificationSettings, FreeOnResume()] = field(default_factory=ClassificationSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    run: RunSettings = field(default_factory=RunSettings)
    checkpoint: Annotated[CheckpointSettings, FreeOnResume()] = field(default_factory=CheckpointSettings)


@dataclass(frozen=True, config=_strict)
class SegmenterSettings:
    """UperNet on a ViT: what is beside the backbone, and its loss."""

    # Blocks whose outputs the heads see, from 0: four, the last of all among them.
    taps: tuple[AtLeastZero, ...] = (3, 5, 7, 11)
    # Channels of the decode head. 0: the backbone's width (BEiT).
    head_width: AtLeastZero = 0
    # Channels of the auxiliary head on the third map.
    auxiliary_width: AtLeastOne = 256
    # Weight of its loss. 0: no auxiliary head.
    auxiliary_weight: NotNegative = 0.4
    # Whole channels dropped before a head's classifier.
    dropout: ShareBelowOne = 0.1
    # The pixels that a loss is averaged over. all: ignored ones too (BEiT's code). valid: the labelled ones.
    loss_over: Literal["all", "valid"] = "all"
    # Learning rate of a block over that of the block above it. The patch embedding has the lowest, branches and heads
    # the full one. 1: all alike.
    layer_decay: ShareAboveZero = 0.65


@dataclass(frozen=True, config=_strict)
class SceneAugmentSettings:
    """Random training crops of images and their maps (mmsegmentation's, as BEiT uses them). Their side is
    model.image_px.
    """

    # An image is resized so that neither its long nor its short side exceeds these, each times a factor of `ratio`.
    long_px: AtLeastOne = 2048
    short_px: AtLeastOne = 512
    ratio: tuple[Positive, Positive] = (0.5, 2.0)
    # A crop in which one class has this share of the labelled pixels, or more, is drawn again, ten times at most. 1:
    # never.
    max_class_share: ShareAboveZero = 0.75
    # Probability of a horizontal flip.
    flip: Share = 0.5
    # Brightness, contrast, saturation and hue, each changed with probability 0.5.
    photometric: bool = True


@dataclass(frozen=True, config=_strict)
class SegmentationSettings:
    """mIoU on data.val_images."""

    # Optimiser steps between two evaluations. 0: only at the end.
    every_steps: AtLeastZero = 16000
    # slide: windows of model.image_px, their logits averaged. whole: the resized image in one pass.
    windows: Literal["slide", "whole"] = "slide"
    # Pixels from one window to the next.
    stride_px: AtLeastOne = 341
    # Bounds of the resized image, as in training.
    long_px: AtLeastOne = 2048
    short_px: AtLeastOne = 512
    # Factors on the bounds, each a prediction of its own; their probabilities are averaged. The short side never falls
    # below model.image_px, so a factor below 1 may repeat that of 1, as in BEiT's code.
    scales: tuple[Positive, ...] = (1.0,)
    # Each of them mirrored too.
    flip: bool = False
    # Windows a forward pass and rank. 0: run.micro_batch.
    batch: AtLeastZero = 0
    # Images in TensorBoard and segmentation.png.
    shown_images: AtLeastOne = 4


@dataclass(frozen=True, config=_strict)
class SegmentRecipe:
    """One segmentation run: weights, images and their class maps become an UperNet."""

    name: Annotated[str, FreeOnResume()] = "segment"
    data: DataSettings = field(default_factory=DataSettings)
    init: InitSettings = field(default_factory=InitSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    segmenter: SegmenterSettings = field(default_factory=SegmenterSettings)
    augment: SceneAugmentSettings = field(default_factory=SceneAugmentSettings)
    evaluation: Annotated[SegmentationSettings, FreeOnResume()] = field(default_factory=SegmentationSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    run: RunSettings = field(default_factory=RunSettings)
    checkpoint: Annotated[CheckpointSettings, FreeOnResume()] = field(default_factory=CheckpointSettings)


@dataclass(frozen=True, config=_strict)
class ProbeSettings:
    """Linear classifiers and nearest neighbours on frozen features."""

    # 0: the size that the weights were trained at.
    image_px: AtLeastZero = 0
    # Share of the resized image's short side that is seen.
    crop: ShareAboveZero = 0.875
    # Features after these blocks, counted from 1. Empty: after every block.
    blocks: tuple[int, ...] = ()
    # What stands for an image. class_mean: the class token beside the mean patch token, as in BEiT's probe.
    pooling: Literal["class_mean", "class", "mean"] = "class_mean"
    # Learning rates; each trains a classifier of its own, side by side.
    lrs: tuple[Positive, ...] = (1e-3, 4e-3, 1e-2)
    epochs: AtLeastOne = 50
    global_batch: AtLeastOne = 1024
    weight_decay: NotNegative = 1e-4
    # Numbers of neighbours, each measured.
    knn_k: tuple[AtLeastOne, ...] = (10, 20)
    # A neighbour votes with the weight exp(cosine / temperature).
    knn_temperature: Positive = 0.07
    # Images a forward pass and rank, while features are taken.
    feature_batch: AtLeastOne = 128
    # Precision of the frozen backbone. The classifiers train in fp32.
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: AtLeastZero = 0


@dataclass(frozen=True, config=_strict)
class ProbeRecipe:
    """One linear probe: frozen weights and labelled images give accuracy over layers."""

    name: str = "probe"
    data: DataSettings = field(default_factory=DataSettings)
    init: InitSettings = field(default_factory=InitSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)


@dataclass(frozen=True, config=_strict)
class DetectorSettings:
    """Mask R-CNN on the backbone: where its maps come from, and its heads (arXiv 1703.06870).

    `model.image_px` is the side of the largest square that the position bias covers; images are of any shape within it.
    Blocks are counted from 0.
    """

    # branches: four taps, rescaled to strides 4 to 32, then an FPN (BEiT's maps). simple: all from the last map
    # (ViTDet, arXiv 2203.16527).
    pyramid: Literal["branches", "simple"] = "branches"
    # Maps are taken after these blocks. simple: the last one only.
    taps: tuple[AtLeastZero, ...] = (3, 5, 7, 11)
    # Attention inside windows of so many patches a side. 0: all blocks see the whole image.
    window: AtLeastZero = 0
    # Blocks that see the whole image all the same.
    global_blocks: tuple[AtLeastZero, ...] = ()
    # Norm of the branches at strides 4 and 8. batch: over all ranks.
    branch_norm: Literal["batch", "group"] = "group"
    # Norm of pyramid and heads. layer: over the channels of a place. batch: over all ranks.
    head_norm: Literal["none", "layer", "batch"] = "none"
    # Width of the pyramid.
    channels: AtLeastOne = 256
    # Convolutions of the proposal head.
    rpn_convs: AtLeastOne = 1
    # Convolutions and hidden layers of the box head, and the width of those layers.
    box_convs: AtLeastZero = 0
    box_layers: AtLeastOne = 2
    box_width: AtLeastOne = 1024
    # Convolutions of the mask head.
    mask_convs: AtLeastOne = 4
    # Proposals an image that the heads learn from, a quarter of them on objects.
    rois: AtLeastOne = 512
    # Boxes kept an image.
    detections: AtLeastOne = 100
    # As classifier.layer_decay. Pyramid and heads have the full rate.
    layer_decay: ShareAboveZero = 0.75
    # Weights of another patch size: their patch embedding is resized. Anchors need strides of powers of two.
    resample_patch: bool = False


@dataclass(frozen=True, config=_strict)
class ObjectAugmentSettings:
    """Training images of a detector, and the size it is measured at."""

    # resize: to short_px, or less where the long side would pass long_px. scale_jitter: to fit a square of long_px
    # times a random `scale`, cut or filled to that square (arXiv 2012.07177).
    kind: Literal["resize", "scale_jitter"] = "resize"
    short_px: AtLeastOne = 800
    long_px: AtLeastOne = 1333
    # scale_jitter: lowest and highest.
    scale: tuple[Positive, Positive] = (0.1, 2.0)
    # Probability of a horizontal flip.
    flip: Share = 0.5


@dataclass(frozen=True, config=_strict)
class DetectionSettings:
    """Box and mask AP on data.val_images while a detector trains."""

    # 0: only at the end.
    every_epochs: NotNegative = 1.0
    # Images a forward pass and rank. The filling of images of unequal size takes part in attention, so more than 1
    # changes results a little.
    batch: AtLeastOne = 1
    # Images with their boxes and masks in detections.png and TensorBoard. 0: none.
    grid_images: AtLeastZero = 8


@dataclass(frozen=True, config=_strict)
class DetectRecipe:
    """One detection run: weights and images with COCO annotations become a detector with masks."""

    name: Annotated[str, FreeOnResume()] = "detect"
    data: DataSettings = field(default_factory=DataSettings)
    init: InitSettings = field(default_factory=InitSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    augment: ObjectAugmentSettings = field(default_factory=ObjectAugmentSettings)
    evaluation: Annotated[DetectionSettings, FreeOnResume()] = field(default_factory=DetectionSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    run: RunSettings = field(default_factory=RunSettings)
    checkpoint: Annotated[CheckpointSettings, FreeOnResume()] = field(default_factory=CheckpointSettings)


# What a run of the training engine reads; a stage outside the package brings a class with the same sections.
TrainingRecipe = PretrainRecipe | TokenizerRecipe | FinetuneRecipe | SegmentRecipe | DetectRecipe
Recipe = TrainingRecipe | ProbeRecipe
