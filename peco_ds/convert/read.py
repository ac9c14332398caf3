"""Read weights of the BEiT family from a run, from a release for timm, Hugging Face or unilm, or from a single file.

A file is read strictly: a tensor that is missing, left over or of another shape is refused by name. Tensors that only
training needs (index buffers, the class-token branch of BEiT v2) are left out, and the log says so.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from timm.models.beit import Beit

from peco_ds.config import Average, ModelSettings
from peco_ds.convert import to_hf, to_unilm
from peco_ds.convert.from_mmpretrain import from_mmpretrain, has_mmpretrain_names
from peco_ds.convert.other_families import refuse_other_families
from peco_ds.convert.release import CONFIG, WEIGHTS
from peco_ds.convert.resample import CLASS_ROWS, grid_of
from peco_ds.convert.to_hf import from_hf, has_hf_names
from peco_ds.convert.to_timm import HEAD_FILE, from_timm
from peco_ds.convert.to_unilm import from_unilm
from peco_ds.errors import UserError, redact
from peco_ds.models.beit_weights import PLACES, SHARED_TABLE, TABLE, BeitWeights, default_crop
from peco_ds.models.image_statistics import FACT, Asked, statistics_of_weights
from peco_ds.models.vit import mlp_ratio_of, timm_arguments
from peco_ds.models.vit_layouts import assumed_beside, terms_beside
from peco_ds.models.weight_files import check_finite, read_tensor_file, tensors_of_checkpoint
from peco_ds.remote_paths import is_url
from peco_ds.schema import read_json, sha256_of_file, short
from peco_ds.user_paths import released_path

logger = logging.getLogger("peco_ds")

Layout = Literal["auto", "run", "timm", "hf", "unilm"]
# The first lies in a run folder, the second in a checkpoint of it.
_RUN_FILES = ("settings.yaml", "progress.json")
_PICKLED = "pytorch_model.bin"
DIVERGED = (
    "the training that wrote it had diverged, or the file is damaged: give an earlier checkpoint, or fetch it again"
)
# Keys under which training scripts put the weights into their checkpoint; a moving average is asked for by name.
CONTAINERS = ("model", "module", "state_dict")
# Keys of unilm and of timm's training script.
_AVERAGES = ("model_ema", "state_dict_ema")
_BRANCH_V2 = ("cls_pt_layers.", "cls_pt_norm.", "cls_pt_lm_head.")
_PATCH = "patch_embed.proj.weight"


def read_weights(
    path: str | Path,
    *,
    layout: Layout = "auto",
    average: Average = "auto",
    statistics: Asked = "auto",
    read_run: Callable[[Path, Average], BeitWeights] | None = None,
) -> BeitWeights:
    """Weights in the canonical form, in the dtype they are stored in.

    Args:
        path: a run folder or a checkpoints/step_N of it; a release folder; or a file, whose tensor names tell timm and
            unilm (the same) from Hugging Face.
        layout: the layout that is required; auto: any.
        average: the moving average of the weights or the last ones; auto: the average where there is one.
        statistics: mean and standard deviation that the weights were trained with; auto: what
            `models.image_statistics` finds, else ImageNet's, with a warning. The facts say which and why.
        read_run: reads a run (`runtime.run_weights.read_run`); None where runs are not taken.
    A bare file does not state its crop: it is 0.875 below 384 px and 1 from there on.
    Raises: UserError if there is nothing to read, or it is of another layout or model family, or a tensor is missing,
        left over, of another shape or not finite.
    """
    weights = _read(released_path(path), layout, average, statistics, read_run)
    check_finite(weights.tensors, weights.source, DIVERGED)
    if is_url(str(path)):
        # A copy's place says nothing, and a credential is no source.
        return replace(weights, source=redact(str(path)))
    return weights


def _read(
    path: Path,
    layout: Layout,
    average: Average,
    statistics: Asked,
    read_run: Callable[[Path, Average], BeitWeights] | None,
) -> BeitWeights:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; correct the path")
    found = _layout_of(path, layout)
    if found == "run":
        if read_run is None:
            raise UserError(f"{path}: a run folder; convert it first with convert_checkpoint.py, and give the release")
        weights = read_run(path, average)
        if statistics == "auto":
            return weights
        return _with_statistics(weights, statistics, (weights.mean, weights.std), "as the run records")
    if path.is_dir():
        if average == "ema":
            raise UserError(f"{path}: a release, which holds one set of weights; leave the average out")
        weights, stated = {"timm": _from_timm_folder, "hf": _from_hf_folder, "unilm": _from_unilm_folder}[found](path)
        weights = replace(weights, facts=weights.facts | terms_beside(path))
        # What a release of ours states may have been assumed when it was made.
        stated = None if stated is None or assumed_beside(path) else stated
        return _with_statistics(weights, statistics, stated, path=path)
    return _read_file(path, found, average, statistics)


def _read_file(path: Path, layout: Layout, average: Average, statistics: Asked) -> BeitWeights:
    content = read_tensor_file(path)
    tensors, averaged = _tensors_of_file(content, path, average)
    where = named(path, path.name) + (", moving average" if averaged else "")
    beside: dict = {"arguments": content.get("args"), "path": path}
    if layout == "hf" or has_hf_names(tensors):
        return _with_statistics(_checked(from_hf(tensors, where), where), statistics, None, **beside)
    if all(name.startswith("backbone.") for name in tensors):
        tensors = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    refuse_other_families(tensors, where, path.name)
    if has_mmpretrain_names(tensors):
        tensors = from_unilm(from_mmpretrain(tensors, where))
    return _with_statistics(_checked(tensors, where), statistics, None, **beside)


def _with_statistics(
    weights: BeitWeights, asked: Asked, stated, stated_by: str = "as its config states", **told
) -> BeitWeights:
    found = statistics_of_weights(
        weights.source,
        remedy="say --statistics half (init.statistics=half) for 0.5; the same with imagenet confirms them",
        asked=asked,
        stated=stated,
        stated_by=stated_by,
        **told,
    )
    return replace(weights, mean=found.mean, std=found.std, facts=weights.facts | {FACT: found.words})


def _layout_of(path: Path, wanted: Layout) -> Layout:
    """The layout of the path; "auto" for a file, which its tensors' names have to tell."""
    if path.is_file():
        if wanted == "run":
            raise UserError(f"{path}: a file, not a run folder; give the --out folder of a training run")
        return wanted
    config = json_of(path / CONFIG) if (path / CONFIG).is_file() else {}
    found: Layout
    if any((path / name).is_file() for name in _RUN_FILES):
        found = "run"
    elif config.get("layout") == to_unilm.LAYOUT:
        found = "unilm"
    elif "architecture" in config:
        found = "timm"
    elif config.get("model_type") == "beit":
        found = "hf"
    elif config.get("layout") == "torchvision_detection":
        raise UserError(f"{path}: a detector's release, which its own detector.py loads; give the run of detect.py")
    elif config.get("model_type") == "upernet" or config.get("layout") == f"{to_unilm.LAYOUT}_segmentation":
        raise UserError(f"{path}: a segmenter, which segment.py starts from; give the BEiT that it was fine-tuned from")
    elif "model_type" in config:
        raise UserError(f"{path}: a {config['model_type']} of transformers; this reads BEiT (model_type beit)")
    elif config:
        raise UserError(
            f"{path / CONFIG}: neither of timm (architecture) nor of transformers (model_type) nor of "
            "unilm; give the weights file itself"
        )
    else:
        raise UserError(
            f"{path}: no settings.yaml (a run) and no {CONFIG} (a release) there; give a folder with one, "
            "or a weights file"
        )
    if wanted not in ("auto", found):
        raise UserError(f"{path}: is of layout {found}, not {wanted}; leave the layout to auto")
    return found


# ----------------------------------------------------------------------------------- folders and files


_Folder = tuple[BeitWeights, tuple[tuple[float, ...], tuple[float, ...]] | None]


def _from_timm_folder(folder: Path) -> _Folder:
    config = json_of(folder / CONFIG)
    file = weights_file(folder)
    head = read_tensor_file(folder / HEAD_FILE) if (folder / HEAD_FILE).is_file() else {}
    where = named(file, f"{folder.name}/{file.name}")
    stated = _checked_statements(lambda: _preprocessing_of_timm(config), where)
    tensors = tensors_of_checkpoint(read_tensor_file(file), CONTAINERS)
    statistics = _statistics_in(stated)
    return _checked(from_timm(from_unilm(tensors), head, where), where, **stated), statistics


def _from_hf_folder(folder: Path) -> _Folder:
    config = json_of(folder / CONFIG)
    file = weights_file(folder)
    where = named(file, f"{folder.name}/{file.name}")
    to_hf.check_config(config, where)
    preprocessor = folder / to_hf.PREPROCESSOR
    processing = json_of(preprocessor) if preprocessor.is_file() else {}
    stated = _checked_statements(lambda: to_hf.preprocessing_of(processing, config), where)
    statistics = _statistics_in(stated)
    tensors = from_hf(tensors_of_checkpoint(read_tensor_file(file), CONTAINERS), where)
    heads = config.get("num_attention_heads", 12)
    if type(heads) is not int or heads < 1:
        raise UserError(f"{where}: num_attention_heads is {short(heads)} in its {CONFIG}; fetch the folder again")
    weights = _checked(tensors, where, heads=heads, **stated)
    for key, found in (
        ("num_attention_heads", weights.model.heads),
        ("image_size", weights.model.image_px),
        ("patch_size", weights.model.patch_px),
    ):
        if config.get(key, found) not in (found, [found, found]):
            raise UserError(
                f"{where}: {key} is {config[key]} in its {CONFIG}, its tensors say {found}; correct the folder"
            )
    return weights, statistics


def _from_unilm_folder(folder: Path) -> _Folder:
    file = folder / to_unilm.FILE
    where = named(file, f"{folder.name}/{file.name}")
    config = json_of(folder / CONFIG)
    stated = _checked_statements(lambda: to_unilm.preprocessing_of(config), where)
    statistics = _statistics_in(stated)
    tensors = from_unilm(tensors_of_checkpoint(read_tensor_file(file), CONTAINERS))
    return _checked(tensors, where, **stated), statistics


def _statistics_in(stated: dict) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Takes mean and standard deviation out of a folder's statements; None: it does not state both."""
    mean, std = stated.pop("mean", None), stated.pop("std", None)
    return None if mean is None or std is None else (mean, std)


def _preprocessing_of_timm(config: dict) -> dict:
    cfg = config.get("pretrained_cfg", config)
    labels = config.get("label_names") or cfg.get("label_names")
    stated = {
        "mean": cfg.get("mean"),
        "std": cfg.get("std"),
        "classes": labels.values() if isinstance(labels, dict) else labels,
    }
    return {name: tuple(value) for name, value in stated.items() if value} | (
        {"crop": cfg["crop_pct"]} if cfg.get("crop_pct") else {}
    )


def _checked_statements(read: Callable[[], dict], where: str) -> dict:
    """mean, std, crop and classes that a folder's JSON states, with their types and ranges checked.

    Raises: UserError if one is wrong.
    """
    files = f"{CONFIG} or {to_hf.PREPROCESSOR}"
    try:
        stated = read()
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        # Raised wherever a value has an unexpected type.
        raise UserError(
            f"{where}: its {files} is not what a library wrote ({type(error).__name__}: {error}); fetch "
            "the folder again"
        ) from None
    for name, value in stated.items():
        if name == "classes":
            fits = all(isinstance(text, str) for text in value)
        elif name == "crop":
            fits = _is_number(value) and 0 < value <= 1
        else:
            fits = len(value) == 3 and all(map(_is_number, value)) and (name == "mean" or min(value) > 0)
        if not fits:
            raise UserError(f"{where}: {name} is {short(value)} in its {files}; fetch the folder again")
    return stated


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def weights_file(folder: Path) -> Path:
    for name in (WEIGHTS, _PICKLED):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: a {CONFIG}, but neither {WEIGHTS} nor {_PICKLED}; fetch the weights too, in one file")


def _tensors_of_file(content: dict, path: Path, average: Average) -> tuple[dict[str, torch.Tensor], bool]:
    """Tensors of a checkpoint file's content, and whether they are a moving average."""
    average_of = next((content[name] for name in _AVERAGES if isinstance(content.get(name), dict)), None)
    if average == "ema" and average_of is None:
        raise UserError(f"{path}: holds no moving average ({', '.join(_AVERAGES)}); take the raw weights")
    if average_of is None or average == "raw":
        return from_unilm(tensors_of_checkpoint(content, CONTAINERS)), False
    return from_unilm(tensors_of_checkpoint(average_of, CONTAINERS)), True


def json_of(path: Path) -> dict:
    try:
        value = read_json(path)
    except ValueError as error:
        raise UserError(
            f"{path}: is not what a library wrote there (no JSON object: {error}); fetch the folder again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not what a library wrote there (no JSON object); fetch the folder again")
    return value


def named(file: Path, name: str) -> str:
    """The file's name with its hash, for messages and cards; a missing file is refused by its reader."""
    return f"{name} (sha256 {sha256_of_file(file)[:12]})" if file.is_file() else name


# -------------------------------------------------------------------- from names and shapes to a model


def _checked(tensors: dict[str, torch.Tensor], where: str, *, heads: int | None = None, **stated) -> BeitWeights:
    """Canonical weights, after a check that each tensor is known and has the right shape.

    Args:
        heads: that a config states, where no table of a relative position bias tells them.
        stated: fields of `BeitWeights` that a config states.
    """
    _refuse_other_backbones(tensors, where)
    _refuse_odd_tensors(tensors, where)
    for name in ("head.weight", "lm_head.weight"):
        if name in tensors and tensors[name].ndim != 2:
            raise UserError(
                f"{where}: tensor {name} has shape {tuple(tensors[name].shape)}, a linear layer's has two "
                "numbers; fetch the file again"
            )
    branch = [name for name in tensors if name.startswith(_BRANCH_V2)]
    facts = {}
    if branch:
        facts["left out"] = f"BEiT v2's class-token branch, {len(branch)} tensors that only pre-training needs"
        logger.info("%s: %s", where, facts["left out"])
        tensors = {name: tensor for name, tensor in tensors.items() if name not in branch}
    # transformers keeps the mask token of a pre-trained model that it fine-tuned.
    if "head.weight" in tensors and "lm_head.weight" not in tensors:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "mask_token"}
    kind: Literal["mim", "features", "classifier"] = (
        "mim"
        if tensors.keys() & {"mask_token", "lm_head.weight"}
        else "classifier"
        if "head.weight" in tensors
        else "features"
    )
    tensors, settings, more = with_stand_ins(tensors, kind, where, heads)
    facts |= more
    _check_shapes(tensors, kind, settings, where)
    stated.setdefault("crop", default_crop(settings.image_px))
    weights = BeitWeights(kind, settings, tensors, where, facts=facts, **stated)
    if weights.classes and len(weights.classes) != weights.num_classes:
        raise UserError(
            f"{where}: {len(weights.classes)} class names in its {CONFIG}, a head of "
            f"{weights.num_classes}; correct the folder"
        )
    return weights


def with_stand_ins(
    tensors: dict[str, torch.Tensor], kind: str, where: str, heads: int | None = None
) -> tuple[dict[str, torch.Tensor], ModelSettings, dict[str, str]]:
    """A backbone's tensors with what its file lacks and the network here has, its settings, and what a card says of it.

    Args:
        tensors: by canonical names.
        kind: of `BeitWeights`; a classifier's blocks each have a bias table.
        heads: as of `_checked`.
    Raises: UserError if the tensors are those of no BEiT.
    """
    _refuse_other_backbones(tensors, where)
    _refuse_odd_tensors(tensors, where)
    facts = {}
    stand_ins = _stand_ins(tensors, kind, where, heads)
    if stand_ins:
        parts = [("bias tables of zeros", "table"), ("layer scales of ones", "gamma")]
        words = " and ".join(what for what, part in parts if any(part in name for name in stand_ins))
        facts["added"] = f"{words}, which the weights lack; with them the backbone here computes the same"
        logger.info("%s: %s", where, facts["added"])
        tensors = tensors | stand_ins
    settings = _settings_of(tensors, where)
    if kind == "classifier" and SHARED_TABLE in tensors and TABLE.format(0) not in tensors:
        tensors = dict(tensors)
        shared = tensors.pop(SHARED_TABLE)
        tensors |= {TABLE.format(block): shared.clone() for block in range(settings.depth)}
        facts["bias tables"] = "one for all blocks in the file, copied into every block"
    return tensors, settings, facts


def _refuse_odd_tensors(tensors: dict[str, torch.Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            raise UserError(
                f"{where}: tensor {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, no weights; fetch "
                "the file again"
            )
    name = "blocks.0.mlp.fc1.weight"
    if name in tensors and tensors[name].ndim != 2:
        raise UserError(
            f"{where}: tensor {name} has shape {tuple(tensors[name].shape)}, a linear layer's has two "
            "numbers; fetch the file again"
        )


def _refuse_other_backbones(tensors: dict[str, torch.Tensor], where: str) -> None:
    tables = any(name.endswith("relative_position_bias_table") for name in tensors)
    if _PATCH not in tensors or tensors[_PATCH].ndim != 4 or not any(name.startswith("blocks.0.") for name in tensors):
        raise UserError(
            f"{where}: holds no BEiT (no {_PATCH} with blocks.0.* among {len(tensors)} tensors); give a "
            "BEiT checkpoint of timm, transformers or unilm"
        )
    if "blocks.0.attn.qkv.bias" in tensors:
        raise UserError(
            f"{where}: a plain ViT (blocks.0.attn.qkv.bias), not a BEiT; it can be a judge "
            "(perceptual.weights), not a backbone here"
        )
    if not tables and PLACES not in tensors:
        raise UserError(
            f"{where}: neither relative position bias (no relative_position_bias_table) nor absolute positions "
            f"({PLACES}), so it does not tell one patch from another; give another checkpoint"
        )


def _stand_ins(tensors: dict[str, torch.Tensor], kind: str, where: str, heads: int | None) -> dict[str, torch.Tensor]:
    """What a BEiT without relative position bias or without layer scale lacks: tables of zeros, scales of ones.

    Args:
        heads: of its attention; None: one for 64 numbers of the width, as all BEiTs have.
    """
    width, depth, like = len(tensors[_PATCH]), _depth_of(tensors, where), tensors[_PATCH]
    added: dict[str, torch.Tensor] = {}
    if not any(name.endswith("relative_position_bias_table") for name in tensors):
        grid = _grid_of_places(tensors[PLACES], where)
        if heads is None and width % 64:
            raise UserError(
                f"{where}: a BEiT of width {width} without relative position bias, whose number of heads no shape "
                "tells; give a release folder of transformers, whose config does"
            )
        if heads is not None and width % heads:
            raise UserError(f"{where}: width {width} is not a multiple of its {heads} heads; fetch the folder again")
        shape = ((2 * grid - 1) ** 2 + CLASS_ROWS, heads or width // 64)
        names = [SHARED_TABLE] if kind == "mim" else [TABLE.format(block) for block in range(depth)]
        added |= {name: like.new_zeros(shape) for name in names}
    if not any(name.endswith((".gamma_1", ".gamma_2")) for name in tensors):
        names = [f"blocks.{block}.gamma_{branch}" for block in range(depth) for branch in (1, 2)]
        added |= {name: like.new_ones(width) for name in names}
    return added


def _grid_of_places(places: torch.Tensor, where: str) -> int:
    grid = math.isqrt(max(places.shape[1] - 1, 0)) if places.ndim == 3 else 0
    if not grid or grid**2 + 1 != places.shape[1]:
        raise UserError(
            f"{where}: {PLACES} of shape {tuple(places.shape)}, which is for no class token and square grid of "
            "patches; give weights of a square image"
        )
    return grid


def _depth_of(tensors: dict[str, torch.Tensor], where: str) -> int:
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    # Never empty: `_refuse_other_backbones` has found blocks.0.
    depth = 1 + max(int(number) for number in blocks if re.fullmatch("[0-9]{1,6}", number))
    # Checked first, so that no huge model is built only to find its first missing tensor.
    if depth > len(tensors):
        raise UserError(f"{where}: holds block {depth - 1}, but {len(tensors)} tensors in all; fetch the file again")
    return depth


def _settings_of(tensors: dict[str, torch.Tensor], where: str) -> ModelSettings:
    """Model settings that follow from the tensors' shapes.

    Layer scale is the mean magnitude of the learnt values; a file does not hold the rate of stochastic depth.
    """
    width, _, _, patch_px = tensors[_PATCH].shape
    table = next(tensor for name, tensor in tensors.items() if name.endswith("relative_position_bias_table"))
    grid = grid_of(table) if table.ndim == 2 else None
    if grid is None:
        raise UserError(
            f"{where}: a bias table of shape {tuple(table.shape)}, which is for no square grid of "
            "patches; give weights of a square image"
        )
    if "blocks.0.mlp.fc1.weight" not in tensors:
        raise UserError(f"{where}: tensor blocks.0.mlp.fc1.weight is missing; fetch the file again")
    gammas = [
        tensor.float().abs().mean() for name, tensor in tensors.items() if name.endswith((".gamma_1", ".gamma_2"))
    ]
    if not bool(torch.stack(gammas).isfinite().all()):
        raise UserError(
            f"{where}: a layer scale (gamma) that is not finite: the training that wrote it had diverged; "
            "give an earlier checkpoint"
        )
    return ModelSettings(
        image_px=grid * patch_px,
        patch_px=patch_px,
        width=width,
        depth=_depth_of(tensors, where),
        heads=table.shape[1],
        mlp_ratio=mlp_ratio_of(width, len(tensors["blocks.0.mlp.fc1.weight"])),
        # In the settings 0 would mean no layer scale.
        layer_scale=float(torch.stack(gammas).mean()) or 0.1,
        drop_path=0.0,
        absolute_positions=PLACES in tensors,
    )


def _check_shapes(tensors: dict[str, torch.Tensor], kind: str, settings: ModelSettings, where: str) -> None:
    pooling = "mean" if "fc_norm.weight" in tensors and kind != "mim" else "class"
    classes = len(tensors["head.weight"]) if kind == "classifier" else 0
    if settings.width % settings.heads:
        raise UserError(
            f"{where}: width {settings.width} is not a multiple of the {settings.heads} heads of its bias "
            "table; fetch the file again"
        )
    # On the meta device only shapes are computed.
    with torch.device("meta"):
        net = Beit(
            **timm_arguments(
                settings, shared_bias=SHARED_TABLE in tensors or kind == "mim", num_classes=classes, pooling=pooling
            )
        )
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    if kind == "mim":
        codes = len(tensors["lm_head.weight"]) if "lm_head.weight" in tensors else 0
        expected |= {
            "mask_token": (1, 1, settings.width),
            "lm_head.weight": (codes, settings.width),
            "lm_head.bias": (codes,),
        }
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{where}: tensor {name} is missing; fetch the file again, or give a whole checkpoint")
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {tuple(tensors[name].shape)}, a BEiT of its other sizes "
                f"has {shape}; fetch the file again"
            )
    strange = sorted(tensors.keys() - expected.keys())
    if strange:
        raise UserError(f"{where}: tensor {strange[0]} has no place in a BEiT ({kind}); give a file without it")
