"""Every parser of bytes from outside, fed random bytes and valid ones that were changed: only its documented errors
come out, soon and in little memory.

`PARSERS` is the one list of them. The package is searched for functions that read, and each has to be reached by one of
the list.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from beit_samples import sample
from bounds import bounded
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from packaged_samples import dinov2_sample, flax_sample, pickled
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from published_samples import dalle_tensors, save_dalle, save_lightning, taming_tensors
from safetensors.torch import save_file
from vqkd_samples import released_layout

from peco_ds import run_status
from peco_ds.config import (
    DetectorSettings,
    FinetuneRecipe,
    ModelSettings,
    PretrainRecipe,
    SegmenterSettings,
    TokenizerSettings,
    TokenizerVitSettings,
)
from peco_ds.convert.read import read_weights
from peco_ds.convert.read_detector import is_detector_release, read_detector_release
from peco_ds.convert.read_segmenter import (
    is_segmenter,
    read_segmenter,
    told_by_mmcv_config,
)
from peco_ds.convert.release import refuse_foreign_files, write_files, write_release
from peco_ds.convert.segmenter_layouts import segmenter_card, segmenter_release
from peco_ds.convert.to_hf import to_hf
from peco_ds.convert.to_timm import to_timm
from peco_ds.convert.to_torchvision import detector_card, detector_release
from peco_ds.convert.to_unilm import to_unilm
from peco_ds.data.coco_annotations import read_coco
from peco_ds.data.decode import DecodeError, decode_map, decode_rgb, image_kind
from peco_ds.data.image_folders import list_images
from peco_ds.data.image_set import ImageSet
from peco_ds.data.image_shards import IndexJob, PackJob, make_shard, packed_bytes, prepare_folder
from peco_ds.data.indexed_tar import DamagedRecord, IndexedTar, build_index, write_index
from peco_ds.data.label_lists import labels_from_list, read_classes
from peco_ds.data.objects import ObjectSet
from peco_ds.data.scene_packing import map_bytes, read_scene_classes
from peco_ds.data.token_parts import TokenParts
from peco_ds.data.token_shards import TokenRecord, read_npy, write_token_shard
from peco_ds.data.views import fault_of_views
from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
from peco_ds.errors import LONGEST_LINE, UserError
from peco_ds.evaluate import find_tokenizer
from peco_ds.evaluation.features import FeatureFiles
from peco_ds.evaluation.probe_results import LayerResults
from peco_ds.import_judge import refuse_occupied
from peco_ds.models.detector_weights import DetectorWeights
from peco_ds.models.feature_nets import load_feature_net
from peco_ds.models.mask_rcnn import build_detector
from peco_ds.models.packaged_networks import NETWORKS
from peco_ds.models.published_tokenizers import read_published
from peco_ds.models.segmenter import build_segmenter
from peco_ds.models.segmenter_weights import SegmenterWeights
from peco_ds.models.timm_classifier import is_foreign_release, load_timm_release
from peco_ds.models.tokenizers import build_tokenizer, load_tokenizer, refuse_foreign_release, save_tokenizer
from peco_ds.models.torchscript_files import read_torchscript
from peco_ds.models.weight_files import foreign_classes, made_here, read_tensor_file
from peco_ds.own_files import (
    is_own_tar,
    markdown_mark,
    own_json,
    own_markdown,
    own_png,
    png_text,
    refuse_foreign,
    write_own_json,
)
from peco_ds.pack_images import plan_indexes
from peco_ds.planner.bill import make_bill
from peco_ds.planner.chain import read_chain
from peco_ds.planner.hardware import find_hardware
from peco_ds.recipe_files import load_recipe
from peco_ds.runtime.checkpoint.files import newest_whole
from peco_ds.runtime.run_folder import read_provenance, read_settings
from peco_ds.runtime.run_weights import read_run
from peco_ds.runtime.timeline import drop_rows_after, goodput, read_rows, record_start
from peco_ds.schema import (
    ImageManifest,
    Shard,
    TokenManifest,
    ViewRecipe,
    read_manifest,
    sha256_of_file,
    write_json,
    write_manifest,
)
from peco_ds.tensor_names import tensor_names

PACKAGE = Path(__file__).resolve().parents[1] / "peco_ds"
SMALL = ModelSettings(image_px=32, patch_px=8, width=24, depth=1, heads=3, drop_path=0.0)
ROW = [0, 0, 20, 30, 0, 1, 1, 1, 0]
VIEWS = ViewRecipe(32, (0.2, 1.0), (0.75, 4 / 3), 0.5, 0.4, 0)


@dataclass(frozen=True)
class Parser:
    """A file in a folder, and who reads it.

    Args:
        make: fills an empty folder with what is valid.  file: the one whose bytes are changed.  read: given the folder.
        errors: what it documents; () for a reader that never raises.
    """

    make: Callable[[Path], None]
    file: str
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = (UserError,)
    examples: int = 40


# --------------------------------------------------------------------------------------- what is valid


def image(folder: Path, kind: str, name: str, **options) -> None:
    grey = np.add.outer(np.arange(24), np.arange(32)).astype(np.uint8) * 4
    Image.fromarray(np.stack([grey, grey.T[:24, :24].repeat(2, 1)[:, :32], grey[::-1]], axis=-1)).save(
        folder / name, kind, **options
    )


def results(folder: Path) -> None:
    write_own_json(folder / "e.json", own_json("evaluate"), {"top1": 1.5})
    text = PngInfo()
    for key, value in png_text(own_png("plan")).items():
        text.add_text(key, value)
    image(folder, "PNG", "p.png", pnginfo=text)
    (folder / "t.md").write_text(f"# Table\n{markdown_mark('linear_probe')}")


def annotated(folder: Path) -> None:
    entry = {"id": 1, "file_name": "x", "height": 24, "width": 32}
    runs = {"size": [24, 32], "counts": [100, 50, 618]}
    box = {"image_id": 1, "category_id": 3, "bbox": [2, 2, 9.5, 9], "iscrowd": 0}
    objects = [{**box, "id": 1, "segmentation": [[2, 2, 11, 2, 11, 11]]}, {**box, "id": 2, "segmentation": runs}]
    raw = {"images": [entry], "annotations": objects, "categories": [{"id": 3, "name": "cat"}]}
    (folder / "a.json").write_text(json.dumps(raw))


def object_set(folder: Path) -> None:
    annotated(folder)
    image(folder, "PNG", "x")
    coco = read_coco(folder / "a.json")
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as file:
        for name, data in (("x.png", (folder / "x").read_bytes()), ("x.instances.json", coco.text_of(1).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    write_index(folder / "a.tar", folder / "a.index.json")
    hashes = sha256_of_file(folder / "a.tar"), sha256_of_file(folder / "a.index.json")
    shard = Shard("a.tar", 1, (folder / "a.tar").stat().st_size, *hashes)
    write_json(folder / "categories.json", {"categories": coco.categories})
    write_manifest(folder, ImageManifest([shard], 1))


def objects_of(folder: Path) -> None:
    ObjectSet(folder).entry(0)


def class_map(folder: Path) -> None:
    Image.fromarray(np.add.outer(np.arange(24), np.arange(32)).astype(np.uint8)).save(folder / "x", "PNG")


def tar(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as file:
        for name, data in (("a.jpg", b"A" * 300), ("a.cls", b"1"), ("b\u00e4/" + "c" * 120 + ".jpg", b"B" * 300)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))


def indexed_tar(folder: Path) -> None:
    tar(folder)
    write_index(folder / "a.tar", folder / "a.index.json")


def labelled_set(folder: Path) -> None:
    indexed_tar(folder)
    shard = Shard(
        "a.tar",
        2,
        (folder / "a.tar").stat().st_size,
        sha256_of_file(folder / "a.tar"),
        sha256_of_file(folder / "a.index.json"),
    )
    write_manifest(folder, ImageManifest([shard], 2, ["cat", "dog"], ["x.jpg: cut short"], {"source": "here"}))


def token_set(folder: Path) -> None:
    shard = Shard("a.tar", 3, 4096, "a" * 64, "b" * 64)
    write_manifest(folder, TokenManifest([shard], 3, "f" * 64, {"a.tar": "a" * 64}, "c" * 64, 64, (4, 4), 2, VIEWS))


def array(folder: Path) -> None:
    np.save(folder / "x.npy", np.arange(32, dtype=np.uint16).reshape(2, 16))


def rows(folder: Path) -> None:
    np.save(folder / "x.npy", np.array([ROW, ROW], np.float32))


def pack_records(folder: Path) -> None:
    (folder / ".pack").mkdir()
    shard = {"name": "a.tar", "samples": 1, "bytes": 8, "sha256": "a" * 64, "index_sha256": "b" * 64, "path": ""}
    write_json(folder / ".pack" / "a.record.json", {"job_digest": "d", "units": 1, "shard": shard, "rejected": []})
    write_json(folder / ".pack" / "plan.json", {"quality": "92"})


def packed_shard(folder: Path) -> None:
    """One shard of two files, of which one is no image and one cannot be read."""
    (folder / "raw").mkdir()
    image(folder / "raw", "JPEG", "a.jpg")
    (folder / "raw" / "b.jpg").write_bytes(b"broken")
    (folder / "raw" / "c.jpg").symlink_to("nowhere")
    (folder / ".pack").mkdir()
    write_json(folder / ".pack" / "plan.json", {"quality": "92"})
    make_shard(folder, job_of(folder), lambda: None)
    (folder / "raw" / "c.jpg").unlink()
    (folder / "raw" / "c.jpg").write_bytes(b"there now")


def job_of(folder: Path) -> PackJob:
    return PackJob("shard-0.tar", str(folder / "raw"), list_images(folder / "raw", "auto", None, None).images, 0, 92)


def finished_set(folder: Path) -> None:
    packed_shard(folder)
    # As one would be in which a shard is then found to be damaged.
    write_manifest(folder, ImageManifest([], 0))


def pack_again(folder: Path) -> None:
    prepare_folder(folder, [job_of(folder)], {"quality": "92"})


def tar_of_an_image(folder: Path) -> None:
    image(folder, "PNG", "x")
    (folder / "tars").mkdir()
    (folder / "out" / ".pack").mkdir(parents=True)
    with tarfile.open(folder / "tars" / "a.tar", "w") as file:
        for name, data in (("a.png", (folder / "x").read_bytes()), ("a.cls", b"1"), ("README", b"words")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def recipe(folder: Path) -> None:
    shutil.copy(PACKAGE / "recipes" / "peco_vitb16.yaml", folder / "mine.yaml")


def deepspeed_json(folder: Path) -> None:
    shutil.copy(PACKAGE.parent / "ds_configs" / "zero3_offload.json", folder / "mine.json")


def tensors_of(name: str, **options) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tensors = sample("mim", SMALL).tensors
        save_file(tensors, folder / name) if name.endswith("safetensors") else torch.save(
            {"model": tensors, "epoch": 3}, folder / name, **options
        )

    return make


def release_of(convert) -> Callable[[Path], None]:
    weights = sample("classifier", SMALL, classes=("cat", "dog", "cow", "ape", "fox", "hen", "bee"))
    return lambda folder: write_release(folder, convert(weights), weights)


def segmenter(to: str) -> Callable[[Path], None]:
    """A segmenter's release; as small as may be, so that a change falls on what is not numbers."""

    def make(folder: Path) -> None:
        model = ModelSettings(image_px=32, patch_px=16, width=6, depth=4, heads=3, mlp_ratio=1, drop_path=0.0)
        settings = SegmenterSettings(taps=(0, 1, 2, 3), head_width=2, auxiliary_width=2)
        tensors = build_segmenter(model, settings, 2).state_dict()
        weights = SegmenterWeights(model, settings, tensors, "a toy", classes=("cat", "dog"))
        release = segmenter_release(weights, to)
        write_files(folder, release, segmenter_card(release, weights))

    return make


def detector(folder: Path) -> None:
    """As `segmenter`."""
    model = ModelSettings(image_px=32, patch_px=16, width=6, depth=4, heads=3, mlp_ratio=1, drop_path=0.0)
    settings = DetectorSettings(taps=(0, 1, 2, 3), channels=2, box_width=2, mask_convs=1)
    tensors = build_detector(model, settings, 2).state_dict()
    weights = DetectorWeights(model, settings, tensors, "a toy", ("cat", "dog"), (1, 2), 32, 64)
    release = detector_release(weights)
    write_files(folder, release, detector_card(release, weights))


def tokenizer(folder: Path) -> None:
    wanted = TokenizerSettings(
        channels=8, channel_mults=(1, 1), blocks_per_level=1, attention=False, z_channels=4, num_codes=4, code_dim=4
    )
    torch.manual_seed(0)
    save_tokenizer(folder, build_tokenizer(wanted).state_dict(), wanted, {"judge": "none"})


def published(*files: str) -> Callable[[Path], None]:
    """Tokenizers that others released; the smaller the file, the likelier a change falls on what is not numbers."""

    def make(folder: Path) -> None:
        for name in files:
            if name in ("encoder", "decoder"):
                save_dalle(folder / f"{name}.pkl", name, dalle_tensors(name, channels=4, codes=4, init=4))
            else:
                save_lightning(folder / f"{name}.ckpt", taming_tensors(name, mults=(1,), z=4, codes=4, dim=4))

    return make


def vqkd(folder: Path) -> None:
    vit = TokenizerVitSettings(
        image_px=8,
        patch_px=4,
        width=64,
        depth=1,
        heads=1,
        mlp_ratio=0.25,
        decoder_width=64,
        decoder_depth=1,
        decoder_heads=1,
        target_width=4,
    )
    torch.save({"model": released_layout(vit, 4, 4), "epoch": 99}, folder / "vqkd.pth")


def vqkd_release(folder: Path) -> None:
    vqkd(folder)
    found = read_published([folder / "vqkd.pth"])
    save_tokenizer(folder, found.state_dict, found.settings, found.facts)


def plain_vit(folder: Path) -> None:
    net = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=192, depth=1, num_heads=3, num_classes=0
    )
    torch.save({"state_dict": net.state_dict()}, folder / "judge.pth")


def convolutional(folder: Path) -> None:
    torch.save({"state_dict": timm.create_model("test_resnet", pretrained=False).state_dict()}, folder / "judge.pth")


def packaged_pickle(folder: Path) -> None:
    (folder / "alexnet.ckpt").write_bytes(pickled(flax_sample("alexnet")[1]))


def packaged_graph(folder: Path) -> None:
    (folder / "vit.onnx").write_bytes(dinov2_sample()[1].SerializeToString())


def imported_network(folder: Path) -> None:
    write_json(folder / "config.json", {"architecture": "vgg16", "origin": {"package": "a"}})


def foreign_classifier(folder: Path) -> None:
    """timm's own release of a small network."""
    net = timm.create_model("test_resnet", pretrained=False, num_classes=3)
    timm.models.save_for_hf(net, folder, safe_serialization=True)


def clip_tensors() -> dict[str, torch.Tensor]:
    """The names of OpenAI's CLIP, one block of width 64."""
    shapes = {
        "class_embedding": (64,),
        "positional_embedding": (5, 64),
        "conv1.weight": (64, 3, 8, 8),
        "proj": (64, 16),
    }
    shapes |= {
        f"{norm}.{kind}": (64,)
        for norm in ("ln_pre", "ln_post", "transformer.resblocks.0.ln_1", "transformer.resblocks.0.ln_2")
        for kind in ("weight", "bias")
    }
    for name, (out, wide) in {
        "attn.in_proj_": (192, 64),
        "attn.out_proj.": (64, 64),
        "mlp.c_fc.": (256, 64),
        "mlp.c_proj.": (64, 256),
    }.items():
        shapes |= {f"transformer.resblocks.0.{name}weight": (out, wide), f"transformer.resblocks.0.{name}bias": (out,)}
    return {
        f"visual.{name}": torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for name, shape in shapes.items()
    }


class Holder(torch.nn.Module):
    """Modules nested as the dots of names say."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for first in {name.partition(".")[0] for name in tensors}:
            below = {
                name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.partition(".")[0] == first
            }
            if "" in below:
                self.register_buffer(first, below[""])
            else:
                self.add_module(first, Holder(below))

    def forward(self, x):
        return x


def torchscript(folder: Path) -> None:
    torch.jit.script(Holder(clip_tensors() | {"input_resolution": torch.tensor(16)})).save(str(folder / "clip.pt"))


def torchscript_pickle(folder: Path) -> None:
    torchscript(folder)
    with zipfile.ZipFile(folder / "clip.pt") as archive:
        (folder / "data.pkl").write_bytes(archive.read("clip/data.pkl"))


def read_packed_pickle(folder: Path) -> None:
    """The archive again with the pickle that lies beside it, for its checksum would keep changed bytes from the
    reader.
    """
    with zipfile.ZipFile(folder / "clip.pt") as old, zipfile.ZipFile(folder / "packed.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, (folder / "data.pkl").read_bytes() if name == "clip/data.pkl" else old.read(name))
    read_torchscript(folder / "packed.pt")


def open_clip(folder: Path) -> None:
    save_file(clip_tensors(), folder / "open_clip_model.safetensors")
    write_json(
        folder / "open_clip_config.json",
        {
            "model_cfg": {"embed_dim": 16, "quick_gelu": True},
            "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        },
    )


def hf_clip(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            projection_dim=8,
        )
    ).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- vision\n---\n# a model\n")


def finished_run(folder: Path) -> None:
    wanted = json.loads(json.dumps(dataclasses.asdict(load_recipe(FinetuneRecipe, "finetune_vitb16", []).recipe)))
    wanted["model"] = dataclasses.asdict(SMALL)
    (folder / "settings.yaml").write_text(yaml.safe_dump({"stage": "finetune", "recipe": wanted, "sources": {}}))
    write_json(folder / "deepspeed.json", {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}})
    write_json(
        folder / "provenance.json",
        {
            "commit": "c",
            "images_fingerprint": "f" * 64,
            "classes": ["cat", "dog"],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "init_facts": {"recipe": "r"},
        },
    )
    (folder / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "loss": 1.5, "time": 1e9 + step, "up_s": step, "start": 1, "step_s": 0.5}) + "\n"
            for step in (1, 2, 3)
        )
    )
    (folder / "evaluation.jsonl").write_text('{"step": 3, "top1": 50.0}\n')
    start = {
        "event": "start",
        "start": 1,
        "time": 1e9,
        "host": "node",
        "pid": 7,
        "ranks": 2,
        "zero_stage": 1,
        "step": 0,
        "total_steps": 9,
        "stop_step": 9,
    }
    (folder / "starts.jsonl").write_text(
        json.dumps(start)
        + "\n"
        + json.dumps({"event": "end", "start": 1, "time": 1e9 + 9, "code": 0, "up_s": 9.0})
        + "\n"
    )
    checkpoint = folder / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    tensors = sample("classifier", SMALL).tensors | {"head.weight": torch.ones(2, 24), "head.bias": torch.zeros(2)}
    torch.save({"module": tensors}, checkpoint / "mp_rank_00_model_states.pt")
    torch.save({}, checkpoint / "rank_00000.pt")
    write_json(
        checkpoint / "progress.json",
        {"step": 3, "cursor": {"fingerprint": "f" * 64, "seed": 0, "samples": 24}, "world_size": 1, "zero_stage": 0},
    )
    for name in ("settings.yaml", "provenance.json"):
        shutil.copy(folder / name, checkpoint / name)
    write_json(
        checkpoint / "manifest.json",
        {"files": {path.name: [path.stat().st_size, sha256_of_file(path)] for path in sorted(checkpoint.iterdir())}},
    )


def features(folder: Path) -> FeatureFiles:
    return FeatureFiles(folder, {"weights": "w"}, blocks=(1,), sizes={"val": 3}, width=4)


def feature_files(folder: Path) -> None:
    files = features(folder)
    files.create()
    files.write("val", [(np.arange(3), np.arange(3), [np.ones((3, 4), np.float16)])])
    files.finish()


def part_files(folder: Path) -> None:
    token_parts(folder).write(
        0, [TokenRecord(key, np.zeros((2, 16), np.uint16), np.array([ROW, ROW], np.float32)) for key in "abc"]
    )


def token_parts(folder: Path) -> TokenParts:
    images = ImageManifest([Shard("a.tar", 3, 4096, "a" * 64, "b" * 64)], 3)
    return TokenParts(
        folder / "tokens",
        images,
        tokenizer_fingerprint="c" * 64,
        num_codes=64,
        grid=4,
        num_views=2,
        topk=0,
        topk_temperature=1.0,
        views=VIEWS,
    )


# ---------------------------------------------------------------------------------------- who reads it


def written_shard(folder: Path) -> None:
    write_token_shard(folder, "a.tar", [TokenRecord("a", np.zeros((1, 4), np.uint16), np.array([ROW], np.float32))])


def every_member(folder: Path) -> None:
    shard = IndexedTar(folder / "a.tar", folder / "a.index.json")
    for number in range(len(shard)):
        shard.read(number)
    shard.close()


def labels_of(folder: Path) -> None:
    images = ImageSet(folder)
    for number in range(images.num_samples):
        images.key(number)
    images.label(0)


def rows_of(folder: Path) -> None:
    fault_of_views(read_npy((folder / "x.npy").read_bytes(), what="x", dtype=np.float32, shape=(2, 9)))


def merged(folder: Path) -> None:
    wanted = load_recipe(PretrainRecipe, "peco_vitb16", []).recipe
    merge_deepspeed(read_deepspeed_json(folder / "mine.json"), folder / "mine.json", wanted.run, wanted.optim, 1)


def listed(folder: Path, classes: str | None = None) -> None:
    labels_from_list(["x/a.jpg", "x/b.jpg"], folder / "list", folder / classes if classes else None)


def over_a_release(folder: Path) -> None:
    """A second release into the folder of a first: what it holds is looked at."""
    weights = sample("classifier", SMALL)
    write_release(folder, to_timm(weights), weights)


def tokens_of(folder: Path) -> None:
    manifest = read_manifest(folder, TokenManifest)
    assert manifest.samples == sum(shard.samples for shard in manifest.shards) > 0


def status_of(folder: Path) -> None:
    run_status.run_lines(folder, verify=True, now=2e9)


PARSERS = {
    "a JPEG": Parser(
        lambda f: image(f, "JPEG", "x"), "x", lambda f: decode_rgb((f / "x").read_bytes()), (DecodeError,), 100
    ),
    "a JPEG with EXIF": Parser(
        lambda f: image(f, "JPEG", "x", exif=b"Exif\0\0MM\0*\0\0\0\b\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
        "x",
        lambda f: decode_rgb((f / "x").read_bytes()),
        (DecodeError,),
        100,
    ),
    "a progressive JPEG": Parser(
        lambda f: image(f, "JPEG", "x", progressive=True),
        "x",
        lambda f: decode_rgb((f / "x").read_bytes()),
        (DecodeError,),
        100,
    ),
    "a PNG": Parser(
        lambda f: image(f, "PNG", "x"), "x", lambda f: decode_rgb((f / "x").read_bytes()), (DecodeError,), 100
    ),
    "a WebP": Parser(
        lambda f: image(f, "WEBP", "x"), "x", lambda f: decode_rgb((f / "x").read_bytes()), (DecodeError,), 100
    ),
    "a TIFF": Parser(
        lambda f: image(f, "TIFF", "x"), "x", lambda f: decode_rgb((f / "x").read_bytes()), (DecodeError,), 100
    ),
    "the kind of an image": Parser(
        lambda f: image(f, "PNG", "x"), "x", lambda f: image_kind((f / "x").read_bytes()), (DecodeError,), 100
    ),
    "an image to be packed": Parser(
        lambda f: image(f, "GIF", "x"), "x", lambda f: packed_bytes(f / "x", 16, 90), (DecodeError,)
    ),
    "a tar": Parser(tar, "a.tar", lambda f: build_index(f / "a.tar"), examples=150),
    "an index": Parser(indexed_tar, "a.index.json", every_member, (UserError, DamagedRecord), 100),
    "an indexed tar": Parser(indexed_tar, "a.tar", every_member, (UserError, DamagedRecord)),
    "a manifest of images": Parser(
        labelled_set, "manifest.json", lambda f: read_manifest(f, ImageManifest), examples=60
    ),
    "a labelled set": Parser(labelled_set, "manifest.json", labels_of),
    "a manifest of tokens": Parser(token_set, "manifest.json", tokens_of, examples=60),
    "codes": Parser(
        array,
        "x.npy",
        lambda f: read_npy((f / "x.npy").read_bytes(), what="x", dtype=np.uint16, shape=(2, 16)),
        examples=150,
    ),
    "views": Parser(rows, "x.npy", rows_of, examples=60),
    "the record of a packed shard": Parser(
        pack_records, ".pack/a.record.json", lambda f: prepare_folder(f, [], {"quality": "92"}), ()
    ),
    "the record of a packed shard whose images are judged again": Parser(
        packed_shard, ".pack/shard-0.tar.record.json", pack_again, ()
    ),
    "a manifest where a set is to be packed": Parser(finished_set, "manifest.json", pack_again),
    "a file that may be an image": Parser(
        lambda f: (image(f, "PNG", "x"), image(f, "PNG", "y.png")), "x", lambda f: list_images(f, "auto", None, None)
    ),
    "a tar that is indexed in place": Parser(
        tar_of_an_image,
        "tars/a.tar",
        lambda f: make_shard(f / "out", IndexJob("a.tar", str(f / "tars" / "a.tar")), lambda: None),
        examples=100,
    ),
    "a file that may be a tar": Parser(
        lambda f: (tar(f), tar_of_an_image(f), shutil.copy(f / "a.tar", f / "tars" / "b")),
        "tars/b",
        lambda f: plan_indexes(str(f / "tars")),
        (),
    ),
    "the plan of a packing": Parser(
        pack_records, ".pack/plan.json", lambda f: prepare_folder(f, [], {"quality": "92"}), ()
    ),
    "the part of a token set": Parser(
        part_files, "tokens/.parts/a.json", lambda f: token_parts(f).is_done(0) and token_parts(f).read_counts(0), ()
    ),
    "the part of a token shard that is written again": Parser(
        part_files, "tokens/.parts/a.json", lambda f: token_parts(f).check_place(0), ()
    ),
    "the index of a token shard that is written again": Parser(written_shard, "a.index.json", written_shard, ()),
    "COCO annotations": Parser(annotated, "a.json", lambda f: read_coco(f / "a.json"), examples=100),
    "the categories of a set": Parser(object_set, "categories.json", objects_of),
    "the objects of an image": Parser(object_set, "a.tar", objects_of, (UserError, DamagedRecord)),
    "a class map": Parser(class_map, "x", lambda f: decode_map(map_bytes(f / "x")), (DecodeError,), 100),
    "a list of classes of scenes": Parser(
        text("list", "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t9\t1\twall\n2\t0.1\t8\t1\tbuilding, edifice\n"),
        "list",
        lambda f: read_scene_classes(f / "list"),
    ),
    "a list of classes": Parser(text("list", "cat one\ndog two\n"), "list", lambda f: read_classes(f / "list")),
    "a list of classes as JSON": Parser(
        text("list", '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}'),
        "list",
        lambda f: read_classes(f / "list"),
        examples=100,
    ),
    "a list of classes in quotes": Parser(
        text("list", '"cat"\n"dog, hound"\n'), "list", lambda f: read_classes(f / "list")
    ),
    "a list of labels": Parser(text("list", "a.jpg cat\nb.jpg dog\n"), "list", listed),
    "a list of labels as CSV": Parser(
        text("list", "ImageId,PredictionString\na,cat 1 2 3 4\nb,dog 1 2 3 4\n"), "list", listed
    ),
    "a list of label numbers": Parser(
        lambda f: (text("list", "a.jpg 0\nb.jpg 1\n")(f), text("classes", "cat\ndog\n")(f)),
        "list",
        lambda f: listed(f, "classes"),
    ),
    "a recipe": Parser(recipe, "mine.yaml", lambda f: load_recipe(PretrainRecipe, f / "mine.yaml", []), examples=40),
    "a recipe that is planned": Parser(
        recipe,
        "mine.yaml",
        lambda f: make_bill(read_chain(str(f / "mine.yaml"), []), find_hardware("h100"), 8),
        examples=40,
    ),
    "a tokenizer's recipe that is planned": Parser(
        text("mine.yaml", "tokenizer:\n  channels: 64\ndata:\n  holdout: 9\nschedule:\n  epochs: 3\n"),
        "mine.yaml",
        lambda f: read_chain(str(f / "mine.yaml"), []),
        examples=40,
    ),
    "a machine of one's own": Parser(
        text(
            "mine.yaml",
            "base: h100\nname: mine\ngpus_per_node: 4\nnetwork_bytes_s: 5.0e+10\nproduct_share: [0.4, "
            "0.5, 0.6]\npeak_flops: {bf16: 9.0e+14, fp32: 6.0e+13}\n",
        ),
        "mine.yaml",
        lambda f: make_bill(read_chain("peco_vitb16", [], finetune=[]), find_hardware(f / "mine.yaml"), 8),
        examples=60,
    ),
    "an override": Parser(
        text("x", "optim.betas=[0.9, 0.98]"),
        "x",
        lambda f: load_recipe(PretrainRecipe, "peco_vitb16", [(f / "x").read_text(errors="replace")]),
        examples=60,
    ),
    "a DeepSpeed JSON": Parser(deepspeed_json, "mine.json", merged, examples=60),
    "a weights file": Parser(tensors_of("w.pth"), "w.pth", lambda f: read_weights(f / "w.pth"), examples=60),
    "a weights file of the old format": Parser(
        tensors_of("w.pth", _use_new_zipfile_serialization=False),
        "w.pth",
        lambda f: read_weights(f / "w.pth"),
        examples=60,
    ),
    "a safetensors file": Parser(
        tensors_of("w.safetensors"), "w.safetensors", lambda f: read_weights(f / "w.safetensors"), examples=60
    ),
    "any tensor file": Parser(tensors_of("w.pth"), "w.pth", lambda f: read_tensor_file(f / "w.pth"), examples=60),
    "the names in a pickle": Parser(tensors_of("w.pth"), "w.pth", lambda f: foreign_classes(f / "w.pth"), examples=60),
    "DALL-E's encoder": Parser(
        published("encoder"), "encoder.pkl", lambda f: read_published([f / "encoder.pkl"]), examples=60
    ),
    "DALL-E's decoder": Parser(
        published("encoder", "decoder"),
        "decoder.pkl",
        lambda f: read_published([f / "encoder.pkl", f / "decoder.pkl"]),
        examples=40,
    ),
    "taming-transformers' VQGAN": Parser(
        published("vqgan"), "vqgan.ckpt", lambda f: read_published([f / "vqgan.ckpt"]), examples=60
    ),
    "taming-transformers' GumbelVQ": Parser(
        published("gumbel"), "gumbel.ckpt", lambda f: read_published([f / "gumbel.ckpt"]), examples=40
    ),
    "timm's config": Parser(release_of(to_timm), "config.json", read_weights, examples=60),
    "transformers' config": Parser(release_of(to_hf), "config.json", read_weights, examples=60),
    "transformers' preprocessor": Parser(release_of(to_hf), "preprocessor_config.json", read_weights, examples=60),
    "a segmenter's file": Parser(segmenter("unilm"), "model.pth", lambda f: read_segmenter(f / "model.pth")),
    "unilm's config of a segmenter": Parser(
        segmenter("unilm"), "config.json", lambda f: is_segmenter(f) and read_segmenter(f)
    ),
    "transformers' config of a segmenter": Parser(segmenter("hf"), "config.json", read_segmenter, examples=60),
    "a detector's config": Parser(
        detector, "config.json", lambda f: is_detector_release(f) and read_detector_release(f), examples=60
    ),
    "mmcv's text of a config": Parser(
        text("x", "out_indices=[3, 5]\nmean=[1, 2, 3]\nauxiliary_head = dict(loss_weight=0.4)"),
        "x",
        lambda f: told_by_mmcv_config((f / "x").read_bytes().decode("latin-1")),
        (),
    ),
    "unilm's config": Parser(release_of(to_unilm), "config.json", read_weights, examples=60),
    "a release that stands where another shall": Parser(
        release_of(to_timm), "config.json", over_a_release, examples=20
    ),
    "a tokenizer's card": Parser(tokenizer, "tokenizer.json", load_tokenizer, examples=60),
    "a VQ-KD tokenizer's card": Parser(vqkd_release, "tokenizer.json", load_tokenizer, examples=60),
    "a tokenizer's card where a release is to be written": Parser(
        tokenizer, "tokenizer.json", refuse_foreign_release, examples=60
    ),
    "a tokenizer's tensors": Parser(tokenizer, "tokenizer.safetensors", load_tokenizer),
    "unilm's VQ-KD": Parser(vqkd, "vqkd.pth", lambda f: read_published([f / "vqkd.pth"]), examples=60),
    "a judge": Parser(plain_vit, "judge.pth", lambda f: load_feature_net(str(f / "judge.pth")), examples=20),
    "a convolutional judge": Parser(
        convolutional,
        "judge.pth",
        lambda f: load_feature_net(str(f / "judge.pth"), "test_resnet"),
        examples=20,
    ),
    "the names in a file of tensors": Parser(
        tokenizer, "tokenizer.safetensors", lambda f: tensor_names(f / "tokenizer.safetensors"), errors=()
    ),
    "the names in a pickle of tensors": Parser(
        convolutional, "judge.pth", lambda f: tensor_names(f / "judge.pth"), errors=(), examples=10
    ),
    "a network in a package": Parser(
        packaged_pickle,
        "alexnet.ckpt",
        lambda f: NETWORKS["alexnet"].read(f / "alexnet.ckpt", NETWORKS["alexnet"]),
        examples=15,
    ),
    "a network in a package, as a graph": Parser(
        packaged_graph,
        "vit.onnx",
        lambda f: NETWORKS["dinov2_s"].read(f / "vit.onnx", NETWORKS["dinov2_s"]),
        examples=2,
    ),
    "a folder that a network is imported into": Parser(
        imported_network, "config.json", lambda f: refuse_occupied(f, {"origin": {"package": "a"}}), examples=25
    ),
    "a classifier's config": Parser(
        foreign_classifier, "config.json", lambda f: is_foreign_release(f) and load_timm_release(f), examples=25
    ),
    "a judge's config": Parser(release_of(to_timm), "config.json", lambda f: load_feature_net(str(f)), examples=25),
    "a teacher in a TorchScript archive": Parser(
        torchscript, "clip.pt", lambda f: load_feature_net(str(f / "clip.pt"), section="teacher"), examples=40
    ),
    "the pickle of a TorchScript archive": Parser(torchscript_pickle, "data.pkl", read_packed_pickle, examples=60),
    "the config of Hugging Face's CLIP": Parser(
        hf_clip, "config.json", lambda f: load_feature_net(str(f)), examples=40
    ),
    "the statistics of Hugging Face's CLIP": Parser(
        hf_clip, "preprocessor_config.json", lambda f: load_feature_net(str(f)), examples=40
    ),
    "open_clip's config": Parser(open_clip, "open_clip_config.json", lambda f: load_feature_net(str(f)), examples=40),
    "a teacher's model card": Parser(hf_clip, "README.md", lambda f: load_feature_net(str(f)), (), 40),
    "a result where another shall stand": Parser(
        results, "e.json", lambda f: refuse_foreign(f / "e.json", own_json("evaluate")), examples=60
    ),
    "a picture where another shall stand": Parser(
        results, "p.png", lambda f: refuse_foreign(f / "p.png", own_png("plan")), examples=60
    ),
    "a table where another shall stand": Parser(
        results, "t.md", lambda f: refuse_foreign(f / "t.md", own_markdown("linear_probe"))
    ),
    "a shard where another shall stand": Parser(
        tar, "a.tar", lambda f: is_own_tar(f / "a.tar", "0" * 64, first_ends=(".jpg",)), ()
    ),
    "the maker of tensors": Parser(
        tokenizer, "tokenizer.safetensors", lambda f: made_here(f / "tokenizer.safetensors"), ()
    ),
    "a card where another shall stand": Parser(
        release_of(to_timm), "README.md", lambda f: refuse_foreign_files(f, ["README.md", "config.json"]), examples=20
    ),
    "a run's settings": Parser(
        finished_run, "settings.yaml", lambda f: (read_settings(f), find_tokenizer(f)), examples=30
    ),
    "a run's origins": Parser(finished_run, "provenance.json", read_provenance, examples=60),
    "a checkpoint's manifest": Parser(
        finished_run, "checkpoints/step_00000003/manifest.json", lambda f: (newest_whole(f), read_run(f)), examples=50
    ),
    "a checkpoint's weights": Parser(
        finished_run, "checkpoints/step_00000003/mp_rank_00_model_states.pt", read_run, examples=20
    ),
    "metrics": Parser(
        finished_run,
        "metrics.jsonl",
        lambda f: (read_rows(f / "metrics.jsonl"), drop_rows_after(f / "metrics.jsonl", 2), goodput(f)),
        (),
    ),
    "the record of starts": Parser(finished_run, "starts.jsonl", lambda f: (goodput(f), status_of(f)), ()),
    "the engine's settings in the record of starts": Parser(
        finished_run, "deepspeed.json", lambda f: record_start(f, ranks=1, step=0, total_steps=2, stop_step=2), ()
    ),
    "settings in the status of a run": Parser(finished_run, "settings.yaml", status_of, (), 20),
    "metrics in the status of a run": Parser(finished_run, "metrics.jsonl", status_of, (), 40),
    "a manifest in the status of a run": Parser(
        finished_run, "checkpoints/step_00000003/manifest.json", status_of, (), 40
    ),
    "the record of features": Parser(feature_files, "manifest.json", lambda f: features(f).state(), ()),
    "labels of features": Parser(feature_files, "val_labels.npy", lambda f: features(f).labels("val"), examples=60),
    "features": Parser(feature_files, "val_block_01.npy", lambda f: features(f).features("val", 1), examples=60),
    "a layer's result": Parser(
        lambda f: LayerResults(f, "k", (1,)).write(1, {"top1": 5.0}),
        "block_01.json",
        lambda f: LayerResults(f, "k", (1,)).missing(),
        (),
    ),
}


# ---------------------------------------------------------------------------- random and changed bytes

TOKEN = re.compile(rb'"[^"\n]*"|-?[0-9][0-9.e+-]*|true|false|null')
SURPRISES = [
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b"[[[[]]]]",
    b'""',
    b'"x"',
    b'"../../x"',
    b'"/etc/passwd"',
    b"99999999999999999999",
    b"1.5",
    b"-0.0",
    b'"\\u0000"',
    b'"\\ud800"',
    b"9" * 5000,
    b"[" * 3000,
    b"*a",
    b"&a",
    b"!!python/name:os.system",
    b"\xff",
    b"\0",
]


@st.composite
def changed(draw, valid: bytes) -> bytes:
    """Valid bytes with a few changes: flipped, cut, inserted, repeated, or one value of a text put in place of
    another.
    """
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "zero", "value", "value", "value"]))
        start = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), start + draw(st.sampled_from([1, 4, 30, 512])))
        if how == "flip" and data:
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[start : draw(st.sampled_from([end, len(data)]))]
        elif how == "insert":
            data[start:start] = draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(SURPRISES)))
        elif how == "repeat":
            data[start:start] = data[start:end]
        elif how == "zero":
            data[start:end] = bytes(end - start)
        elif values := list(TOKEN.finditer(bytes(data)))[:400]:
            found = draw(st.sampled_from(values))
            data[found.start() : found.end()] = draw(st.sampled_from(SURPRISES))
    return bytes(data)


# Pillow's and torch's remarks on damaged files
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_fed_random_or_changed_bytes_raises_what_it_documents_and_nothing_else(tmp_path_factory, name):
    parser = PARSERS[name]
    valid = tmp_path_factory.mktemp("valid")
    parser.make(valid)
    parser.read(valid)  # else nothing below means anything
    shutil.rmtree(valid)
    valid.mkdir()
    parser.make(valid)
    whole = (valid / parser.file).read_bytes()

    # Without shrinking: bytes that came of bytes are shown as they are, and a parser that is slow to refuse would be
    # asked a thousand times more.
    @settings(
        max_examples=parser.examples, suppress_health_check=list(HealthCheck), database=None, phases=[Phase.generate]
    )
    @given(st.one_of(changed(whole), changed(whole), st.binary(max_size=600)))
    def feed(data: bytes) -> None:
        folder = valid.with_name(f"{valid.name}_fed")
        shutil.copytree(valid, folder, dirs_exist_ok=True)
        (folder / parser.file).write_bytes(data)
        try:
            with bounded(seconds=30, gib=3):
                parser.read(folder)
        except parser.errors as error:
            assert str(error) and (not isinstance(error, UserError) or len(str(error)) <= LONGEST_LINE + 5), (
                "an error is a line to read"
            )
        finally:
            shutil.rmtree(folder)

    feed()


# ----------------------------------------------------------------------------------- the list is whole

READING = {
    "read_text",
    "read_bytes",
    "readline",
    "readlines",
    "loads",
    "load",
    "read_json",
    "parse_json",
    "read_yaml",
    "parse_yaml",
    "safe_load",
    "load_file",
    "safe_open",
    "open_memmap",
    "fromfile",
    "memmap",
    "pread",
    "reader",
    "decode_jpeg",
    "frombuffer",
    "create_model",
    "get_unsafe_globals_in_checkpoint",
    "read_array_header_1_0",
    "ZipFile",
    "unpack_from",
}
NOT_FROM_OUTSIDE = {
    "planner.hardware": "the catalogue that comes with the package",
    "convert.to_torchvision.detector_release": "the text of a module of the package",
    "convert.torchvision_detector.load": "the release that its copy lies in, in a program of the user's",
    "convert.verify._answers": "answers of a process that the program itself started a moment ago",
    "evaluation.features.FeatureFiles.create": "files that it makes",
    "evaluation.features.FeatureFiles.write": "files that `create` made for it",
    "models.timm_classifier.load_timm_classifier": "a name of timm's own list",
    "runtime.rank_log._ends_cut_short": "the last byte of a log",
    "data.remote_tar.RemoteTar._kept": "bytes that are compared with the CRC-32 of the index",
    "data.remote_tar.read_index": "bytes that are compared with the sha256 of the manifest, and read by IndexedTar",
    "data.remote_tar.read_index.write": "bytes that are compared with the sha256 of the manifest",
    "data.store_token_parts.StoreTokenParts.__init__": "a copy of the manifest, which TokenParts reads",
    "data.store_token_parts.StoreTokenParts._part_of_store": "parse_json alone; readers of parts check what it says",
    "data.store_writer._json_or_none": "parse_json alone; the readers of records and plans check what it says",
    "remote_paths.RemotePath.read_text": "text for other readers",
    "runtime.checkpoint.pinned.host_buffer": "memory that was just asked for",
    "data.image_shards._opens": "whether a file can be opened; nothing of it is used",
    "data.instance_packing.Instances.write_beside": "a copy of the file that `read_coco` has read",
    "data.instance_packing.InstancesJob.members": "the text and the image that it made a moment ago",
    "evaluation.detection.detection_quality": "texts of the other ranks",
}
# whole by their hashes before they are read
CHECKPOINTS_OF_THE_RUN = tuple(
    f"runtime.checkpoint.{file}." for file in ("save_restore", "consolidate", "elastic", "writer")
)


def readers_in_the_package() -> set[str]:
    """Every function that calls something that reads, by module and name."""
    found = set()

    def visit(node: ast.AST, place: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = f"{place}.{child.name}" if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else place
            if isinstance(child, ast.Call):
                called = child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")
                mode = next((argument.value for argument in child.args[1:2] if isinstance(argument, ast.Constant)), "r")
                of_own = (
                    called == "loads"
                    and any(isinstance(argument, ast.Call) for argument in child.args)
                    and "dumps" in ast.dump(child)
                )
                opens = (
                    called == "open"
                    and str(mode) in ("r", "rb")
                    and (
                        isinstance(child.func, ast.Name) or getattr(child.func.value, "id", "") in ("Image", "tarfile")
                    )
                )
                of_a_kernel = ast.dump(child.func).startswith("Attribute(value=Name(id='tl'")
                if (called in READING or opens) and not of_own and not of_a_kernel:
                    found.add(place)
            visit(child, inner)

    for path in sorted(PACKAGE.rglob("*.py")):
        visit(ast.parse(path.read_text()), ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    return found


# deprecated; OpenAI's files stay what they are
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_every_function_that_reads_bytes_from_outside_is_reached_by_a_parser_of_the_list(tmp_path):
    reached: set[str] = set()

    def note(frame, event, _argument):
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(PACKAGE)):
            module = ".".join(Path(file).relative_to(PACKAGE).with_suffix("").parts)
            reached.add(f"{module}.{frame.f_code.co_qualname}".replace(".<locals>", ""))

    for number, parser in enumerate(PARSERS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        parser.make(folder)
        sys.setprofile(note)
        try:
            parser.read(folder)
        finally:
            sys.setprofile(None)
    readers = {name for name in readers_in_the_package() if not name.startswith(CHECKPOINTS_OF_THE_RUN)}
    assert sorted(readers - reached - NOT_FROM_OUTSIDE.keys()) == [], "readers without a parser in PARSERS"
    assert NOT_FROM_OUTSIDE.keys() <= readers - reached, "an exception that is none"
