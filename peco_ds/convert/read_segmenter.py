"""Read a whole segmenter, an UperNet on a BEiT, from what others released or trained, or from a release of our own.

unilm   files of the released BEiT, BEiT v2 and mc-BEiT code (mmsegmentation 0.11), or our release in that layout
mmseg   files of MMSegmentation with its own BEiT and Feature2Pyramid
hf      folders of transformers' UperNetForSemanticSegmentation with a BeitBackbone, and of its
        BeitForSemanticSegmentation; or the weights file of one alone

As with backbones, a tensor that is missing, left over or of another shape is refused by name. What no tensor tells
(which blocks the heads see, the classes' names, the images' statistics) is taken from the config beside the weights, or
from the one that mmcv keeps as text inside the file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from peco_ds.config import Average, ModelSettings, SegmenterSettings
from peco_ds.convert import to_hf
from peco_ds.convert.read import (
    CONTAINERS,
    DIVERGED,
    Layout,
    json_of,
    named,
    read_weights,
    weights_file,
    with_stand_ins,
)
from peco_ds.convert.release import CONFIG
from peco_ds.convert.segmenter_layouts import LAYOUT, from_hf_names, from_mmseg_names, from_unilm_names, has_mmseg_names
from peco_ds.convert.to_hf import has_hf_names
from peco_ds.convert.to_unilm import FILE as UNILM_FILE
from peco_ds.errors import UserError
from peco_ds.models.beit_weights import BeitWeights
from peco_ds.models.image_statistics import FACT, Asked, statistics_of_weights, three_numbers
from peco_ds.models.segmenter import build_segmenter
from peco_ds.models.segmenter_weights import SegmenterWeights
from peco_ds.models.uper_head import POOL_SCALES
from peco_ds.models.vit_layouts import assumed_beside, terms_beside
from peco_ds.models.weight_files import check_finite, read_tensor_file, tensors_of_checkpoint
from peco_ds.schema import short
from peco_ds.user_paths import released_path

logger = logging.getLogger("peco_ds")

_DECODE, _AUXILIARY = "decode_head.", "auxiliary_head."
# What mmengine's checkpoints hold beside tensors: its logged numbers, and numpy's. None of it is imported or run.
_OF_MMENGINE = frozenset(
    {
        "mmengine.logging.history_buffer.HistoryBuffer",
        "numpy.ndarray",
        "numpy.dtype",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    }
)
# Longer texts are no config.
_LONGEST_CONFIG = 2**20
_Pair = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class _Told:
    """What stands beside the tensors; None: nothing does."""

    taps: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None
    statistics: _Pair | None = None
    auxiliary_weight: float | None = None
    # Of the attention.
    heads: int | None = None
    # config.json, where it may contradict the tensors.
    backbone: dict = field(default_factory=dict)


def is_segmenter(path: str | Path) -> bool:
    """Whether a path is a release folder or a weights file of a segmenter. A path that cannot be read is none: what is
    wrong with it is said by the reader of weights.
    """
    path = released_path(path)
    try:
        if path.is_dir():
            return (path / CONFIG).is_file() and _is_segmenter_config(json_of(path / CONFIG))
        return path.is_file() and any(name.startswith(_DECODE) for name in _tensors(_content(path)))
    except (UserError, OSError):
        return False


def read_weights_or_segmenter(
    path: str | Path,
    *,
    layout: Layout = "auto",
    average: Average = "auto",
    statistics: Asked = "auto",
    read_run: Callable | None = None,
) -> BeitWeights | SegmenterWeights:
    """As `read_weights`, and whole segmenters too.

    Args:
        read_run: may return a segmenter, of a run of segment.py.
    """
    read = read_segmenter if is_segmenter(path) else read_weights
    more = {} if read is read_segmenter else {"read_run": read_run}
    return read(path, layout=layout, average=average, statistics=statistics, **more)


def read_segmenter(
    path: str | Path, *, layout: Layout = "auto", average: Average = "auto", statistics: Asked = "auto"
) -> SegmenterWeights:
    """A segmenter's weights in the canonical form, in the dtype they are stored in.

    Args:
        path: a release folder or a weights file.
        layout, statistics: as of `read_weights`.
        average: no segmenter's file holds a moving average.
    Raises: UserError if there is no segmenter, or it is of another layout, backbone or head, or a tensor is missing,
        left over, of another shape or not finite.
    """
    path = released_path(path)
    if average == "ema":
        raise UserError(f"{path}: a segmenter, which keeps no moving average; leave the average out")
    weights, stated = read_stated(path, layout)
    card = path if path.is_dir() else path.parent
    # What a release of ours states may have been assumed when it was made.
    stated = None if assumed_beside(card) else stated
    return with_statistics(weights, statistics, stated=stated, stated_by="as its config states", path=path)


def read_stated(path: Path, layout: Layout = "auto") -> tuple[SegmenterWeights, _Pair | None]:
    """A segmenter's weights, with ImageNet's statistics, and the statistics that the file or folder states, if any.

    Raises: UserError as `read_segmenter`.
    """
    folder = path if path.is_dir() else None
    config = json_of(path / CONFIG) if folder else {}
    file = path if folder is None else path / UNILM_FILE if "layout" in config else weights_file(path)
    where = named(file, f"{path.name}/{file.name}" if folder else path.name)
    content = _content(file)
    tensors = _tensors(content)
    found = "hf" if has_hf_names(tensors) else "mmseg" if has_mmseg_names(tensors) else "unilm"
    if layout not in ("auto", found):
        raise UserError(f"{path}: a segmenter of layout {found}, not {layout}; leave the layout to auto")
    shift = _shift_of_taps(tensors, config)
    if found == "hf":
        tensors, told = from_hf_names(tensors, where), _told_by_hf(config, folder, where)
    else:
        told = _told_by_unilm(config, content, where)
        tensors = from_mmseg_names(tensors, where) if found == "mmseg" else from_unilm_names(tensors)
    weights = _assembled(tensors, where, told, shift=shift)
    check_finite(weights.tensors, weights.source, DIVERGED)
    if folder is not None:
        weights = replace(weights, facts=weights.facts | terms_beside(folder))
    return weights, told.statistics


def with_statistics(weights: SegmenterWeights, asked: Asked, **told) -> SegmenterWeights:
    """The weights with the mean and standard deviation that the user asks for, or that something tells.

    Args:
        told: arguments of `statistics_of_weights`.
    """
    found = statistics_of_weights(
        weights.source,
        remedy="say --statistics half (init.statistics=half) for 0.5; the same with imagenet confirms them",
        asked=asked,
        **told,
    )
    return replace(weights, mean=found.mean, std=found.std, facts=weights.facts | {FACT: found.words})


def _content(path: Path) -> dict:
    return read_tensor_file(path, objects=_OF_MMENGINE)


def _tensors(content: dict) -> dict[str, torch.Tensor]:
    return tensors_of_checkpoint(content, CONTAINERS)


def _is_segmenter_config(config: dict) -> bool:
    architectures = config.get("architectures")
    segments = isinstance(architectures, list) and "BeitForSemanticSegmentation" in architectures
    return config.get("layout") == LAYOUT or config.get("model_type") == "upernet" or segments


# ---------------------------------------------------------------------------------- what no tensor tells


def _told_by_hf(config: dict, folder: Path | None, where: str) -> _Told:
    """What a folder of transformers states; nothing for a file alone.

    Raises: UserError if it asks for another network, or a value is of another type.
    """
    if folder is None:
        return _Told()
    is_upernet = config.get("model_type") == "upernet"
    backbone = config.get("backbone_config") if is_upernet else config
    if not isinstance(backbone, dict) or backbone.get("model_type") != "beit":
        kind = backbone.get("model_type") if isinstance(backbone, dict) else short(backbone)
        raise UserError(f"{where}: its backbone is {kind}; this reads UperNets on a BEiT")
    to_hf.check_config(backbone, where)
    for name, wanted in (("pool_scales", list(POOL_SCALES)), ("auxiliary_num_convs", 1)):
        if config.get(name, wanted) != wanted:
            raise UserError(
                f"{where}: {name} is {short(config[name])} in its {CONFIG}; the head here has {wanted}, give another"
            )
    if config.get("auxiliary_concat_input"):
        raise UserError(f"{where}: auxiliary_concat_input is set in its {CONFIG}; no head here has it, give another")
    processor = folder / to_hf.PREPROCESSOR
    stated = config | (json_of(processor) if processor.is_file() else {})
    mean, std = (three_numbers(stated.get(name)) for name in ("image_mean", "image_std"))
    weight = config.get("auxiliary_loss_weight")
    heads = backbone.get("num_attention_heads", 12)
    if type(heads) is not int or heads < 1:
        raise UserError(f"{where}: num_attention_heads is {short(heads)} in its {CONFIG}; fetch the folder again")
    return _Told(
        taps=_taps_of_hf(backbone, where),
        classes=_classes_of_hf(config, where),
        statistics=None if mean is None or std is None else (mean, std),
        auxiliary_weight=weight if isinstance(weight, float) and 0 < weight < 100 else None,
        heads=heads,
        backbone=backbone,
    )


def _taps_of_hf(backbone: dict, where: str) -> tuple[int, ...] | None:
    """Blocks that the folder's numbers mean if index or stage k is block k, counted from 1."""
    indices, stages = backbone.get("out_indices"), backbone.get("out_features")
    if indices is None and isinstance(stages, list):
        indices = [int(match[1]) if (match := re.fullmatch(r"stage(\d{1,6})", str(stage))) else -1 for stage in stages]
    if indices is None:
        return None
    if not isinstance(indices, list) or not all(type(index) is int and index > 0 for index in indices):
        raise UserError(f"{where}: out_indices is {short(indices)} in its {CONFIG}; fetch the folder again")
    return tuple(index - 1 for index in indices)


def _classes_of_hf(config: dict, where: str) -> tuple[str, ...] | None:
    labels = config.get("id2label") or {}
    try:
        names = [labels[key] for key in sorted(labels, key=int)]
    except (TypeError, ValueError, KeyError, AttributeError):
        raise UserError(
            f"{where}: id2label of its {CONFIG} is not what a library wrote; fetch the folder again"
        ) from None
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: id2label of its {CONFIG} holds no names; fetch the folder again")
    unnamed = (f"LABEL_{number}" for number in range(len(names))), map(str, range(len(names)))
    return None if not names or any(names == list(each) for each in unnamed) else tuple(names)


def _told_by_unilm(config: dict, content: dict, where: str) -> _Told:
    """What mmcv or mmengine keep in a file under "meta", or our config.json beside it."""
    meta = content.get("meta") if isinstance(content.get("meta"), dict) else {}
    assert isinstance(meta, dict)
    dataset = meta.get("dataset_meta", {})
    text = next((meta[name] for name in ("config", "cfg") if isinstance(meta.get(name), str)), "")
    told = told_by_mmcv_config(text)
    of_dataset = dataset.get("classes") if isinstance(dataset, dict) else None
    classes = config.get("classes") or meta.get("CLASSES") or of_dataset
    named_all = isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)
    if classes and not named_all:
        raise UserError(f"{where}: its class names are {short(classes)}, no list of names; fetch the file again")
    mean, std = (three_numbers(config.get(name)) for name in ("image_mean", "image_std"))
    return _Told(
        taps=told["taps"],
        classes=tuple(classes) if classes else None,
        statistics=told["statistics"] if mean is None or std is None else (mean, std),
        auxiliary_weight=told["auxiliary_weight"],
    )


def told_by_mmcv_config(text: str) -> dict:
    """Taps, statistics of images in [0, 1] and the auxiliary head's weight that the text of an mmcv config states;
    None for each that does not stand in it, or not in one way. Nothing of the text is run.
    """
    text = text if len(text) <= _LONGEST_CONFIG else ""
    taps = _numbers_after("out_indices", text)
    # Of pixels in [0, 255].
    mean, std = (_numbers_after(name, text) for name in ("mean", "std"))
    pair = tuple(three_numbers([round(value / 255, 6) for value in values or ()]) for values in (mean, std))
    auxiliary = re.search(r"auxiliary_head\s*=\s*dict\(.{0,2000}?loss_weight\s*=\s*([0-9.]{1,9})", text, re.DOTALL)
    weight = _number(auxiliary[1]) if auxiliary else None
    whole = taps is not None and all(value == int(value) for value in taps)
    return {
        "taps": tuple(map(int, taps or ())) if whole else None,
        "statistics": None if None in pair or not min(pair[1] or (0,)) else pair,
        "auxiliary_weight": weight if weight and weight < 100 else None,
    }


def _numbers_after(name: str, text: str) -> list[float] | None:
    found = set(re.findall(rf"\b{name}\s*=\s*[\[(]([0-9.,\s]{{1,200}})[\])]", text))
    lists = {tuple(_number(part) for part in each.split(",") if part.strip()) for each in found}
    if len(lists) != 1:
        return None
    values = [value for value in lists.pop() if value is not None]
    return values or None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _shift_of_taps(tensors: dict, config: dict) -> int:
    """Blocks by which transformers' BeitForSemanticSegmentation looks earlier than `_Told.taps` or the published ones.

    Args:
        tensors: in the names of the file.
    Source: its `hidden_states[i - 1]`, where 0 is what goes into the first block: number 3 is what block 1, counted
        from 0, gives. The released BEiT code takes it for block 3 itself.
    """
    if not any(name.startswith("beit.") for name in tensors):
        return 0
    return 1 if "out_indices" in config or "out_features" in config else 2


# --------------------------------------------------------------------------------- from tensors to a model


def _assembled(tensors: dict[str, torch.Tensor], where: str, told: _Told, *, shift: int) -> SegmenterWeights:
    """Canonical weights, after a check that each tensor is known and has the right shape.

    Args:
        tensors: in our names.  shift: of the taps, see `_shift_of_taps`.
    """
    inner = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    outer = {name: tensor for name, tensor in tensors.items() if not name.startswith("backbone.")}
    for name in [name for name in inner if name == "mask_token" or name.startswith("norm.")]:
        # transformers keeps them where a pre-training was fine-tuned; no head sees them.
        inner.pop(name)
    inner, model, facts = with_stand_ins(inner, "classifier", where, told.heads)
    for key, found in (
        ("num_attention_heads", model.heads),
        ("image_size", model.image_px),
        ("patch_size", model.patch_px),
    ):
        if told.backbone.get(key, found) not in (found, [found, found]):
            raise UserError(
                f"{where}: {key} is {short(told.backbone[key])} in its {CONFIG}, its tensors say {found}; correct the "
                "folder"
            )
    taps = _checked_taps(told, model.depth, where, shift, facts)
    settings = SegmenterSettings(
        taps=taps,
        head_width=_rows(outer, _DECODE + "bottleneck.conv.weight", where),
        auxiliary_width=_rows(outer, _AUXILIARY + "convs.0.conv.weight", where) if _has_auxiliary(outer) else 256,
        auxiliary_weight=(told.auxiliary_weight or 0.4) if _has_auxiliary(outer) else 0.0,
    )
    tensors = {f"backbone.{name}": tensor for name, tensor in inner.items()} | outer
    num_classes = _rows(outer, _DECODE + "conv_seg.weight", where)
    tensors = _with_checked_shapes(tensors, model, settings, num_classes, where)
    if told.classes and len(told.classes) != num_classes:
        raise UserError(
            f"{where}: {len(told.classes)} class names, a head of {num_classes}; fetch it again, or correct them"
        )
    return SegmenterWeights(model, settings, tensors, where, classes=told.classes, facts=facts)


def _has_auxiliary(outer: dict) -> bool:
    return any(name.startswith(_AUXILIARY) for name in outer)


def _rows(tensors: dict[str, torch.Tensor], name: str, where: str) -> int:
    if name not in tensors or tensors[name].ndim != 4 or not tensors[name].numel():
        raise UserError(f"{where}: no {name} of four dimensions, so its head is no UperNet; give one with such a head")
    return len(tensors[name])


def _checked_taps(told: _Told, depth: int, where: str, shift: int, facts: dict) -> tuple[int, ...]:
    """The blocks that the heads see, from 0. What was assumed or shifted is said, and noted in `facts`."""
    taps = default_taps(depth) if told.taps is None else told.taps
    if told.taps is None:
        facts["blocks seen"] = f"{_listed(taps)} counted from 0, assumed: nothing in or beside the weights tells"
        logger.warning("%s: %s; its heads are taken to see blocks %s", where, facts["blocks seen"], _listed(taps))
    shifted = tuple(tap - shift for tap in taps)
    if len(shifted) != 4 or list(shifted) != sorted(set(shifted)) or shifted[0] < 0 or shifted[-1] >= depth:
        raise UserError(
            f"{where}: its heads see blocks {_listed(shifted)} of {depth}, counted from 0; four of them are needed, "
            "rising; give another segmenter"
        )
    if shift:
        unilm = tuple(tap + 2 for tap in shifted)
        facts["blocks seen"] = (
            f"{_listed(shifted)} counted from 0, as BeitForSemanticSegmentation computes: two before the "
            f"{_listed(unilm)} that its config means in the released BEiT code"
        )
        logger.warning(
            "%s: taps two blocks too early: BeitForSemanticSegmentation looks at blocks %s, counted from 0, where the "
            "released BEiT code looks at %s; they are kept, so that logits are transformers'. If the weights come from "
            "that code, convert its own file instead",
            where,
            _listed(shifted),
            _listed(unilm),
        )
    return shifted


def default_taps(depth: int) -> tuple[int, ...]:
    """The blocks that published heads see, counted from 0.

    Source: released BEiT configs: 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24. Other depths are seen at their quarters.
    """
    if depth % 6 == 0:
        return depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1
    return tuple(part * depth // 4 - 1 for part in (1, 2, 3, 4))


def _listed(blocks: tuple[int, ...]) -> str:
    return ", ".join(map(str, blocks))


def _with_checked_shapes(
    tensors: dict[str, torch.Tensor], model: ModelSettings, settings: SegmenterSettings, num_classes: int, where: str
) -> dict[str, torch.Tensor]:
    """The tensors, in the network's order. Counts of batches that old files lack are 0.

    Raises: UserError naming a tensor that is missing, left over, of another shape, or no weights.
    """
    # On the meta device only shapes are computed.
    with torch.device("meta"):
        expected = build_segmenter(model, settings, num_classes).state_dict()
    found: dict[str, torch.Tensor] = {}
    for name, like in expected.items():
        if name not in tensors and name.endswith("num_batches_tracked"):
            found[name] = torch.zeros((), dtype=torch.int64)
            continue
        if name not in tensors:
            raise UserError(f"{where}: tensor {name} is missing; fetch the file again, or give a whole segmenter")
        tensor = tensors[name]
        if tensor.shape != like.shape or tensor.is_floating_point() != like.is_floating_point():
            raise UserError(
                f"{where}: tensor {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, an UperNet of its other "
                f"sizes has {tuple(like.shape)}; fetch the file again"
            )
        found[name] = tensor
    strange = sorted(tensors.keys() - expected.keys())
    if strange:
        raise UserError(f"{where}: tensor {strange[0]} has no place in an UperNet on a BEiT; give a file without it")
    return found
