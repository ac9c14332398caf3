import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from beit_samples import (
    CLASSES,
    CODES,
    SMALL,
    classifier_shapes,
    drawn,
    feature_shapes,
    index_buffers,
    mim_shapes,
    same,
)
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitModel,
)

from peco_ds.config import ModelSettings
from peco_ds.convert.read import read_weights
from peco_ds.convert.release import write_release
from peco_ds.convert.to_hf import to_hf
from peco_ds.convert.to_timm import to_timm
from peco_ds.convert.to_unilm import to_unilm
from peco_ds.convert.verify import model_outputs
from peco_ds.errors import UserError
from peco_ds.models.beit_weights import SHARED_TABLE, BeitWeights

# full width, two of the twelve blocks
BASE = ModelSettings(image_px=224, patch_px=16, width=768, depth=2, heads=12, drop_path=0.0)


def refused(path, **options) -> str:
    with pytest.raises(UserError) as caught:
        read_weights(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(tensors, path):
    torch.save({"model": tensors}, path)
    return path


# ----------------------------------------------------------------------------------------------- files


def test_a_file_in_the_layout_of_beit_base_patch16_224_pt22k_is_read_whole(tmp_path):
    tensors = drawn(mim_shapes(BASE, codes=8192))
    path = saved(
        tensors | {"rel_pos_bias.relative_position_index": torch.zeros(197, 197, dtype=torch.long)},
        tmp_path / "beit_base_patch16_224_pt22k.pth",
    )
    weights = read_weights(path)
    assert weights.kind == "mim" and weights.num_codes == 8192 and same(weights.tensors, tensors)
    found = weights.model
    assert (found.image_px, found.patch_px, found.width, found.depth, found.heads, found.mlp_ratio) == (
        224,
        16,
        768,
        2,
        12,
        4.0,
    )
    assert found.layer_scale == pytest.approx(0.1, abs=0.01)
    assert weights.mean == weights.std == (0.5, 0.5, 0.5) and weights.crop == 0.875
    assert path.name in weights.source and "sha256" in weights.source


def test_a_beit_v2_file_is_read_without_its_class_token_branch_and_says_so(tmp_path, caplog):
    tensors = drawn(mim_shapes(SMALL))
    blocks = {name.removeprefix("blocks."): tensor for name, tensor in tensors.items() if name.startswith("blocks.0.")}
    branch = {f"cls_pt_layers.{name}": tensor for name, tensor in blocks.items()}
    branch |= {
        "cls_pt_norm.weight": torch.ones(96),
        "cls_pt_norm.bias": torch.zeros(96),
        "cls_pt_lm_head.weight": torch.zeros(CODES, 96),
        "cls_pt_lm_head.bias": torch.zeros(CODES),
    }
    with caplog.at_level(logging.INFO, "peco_ds"):
        weights = read_weights(saved(tensors | branch, tmp_path / "beitv2.pth"))
    assert same(weights.tensors, tensors)
    assert f"{len(branch)} tensors" in weights.facts["left out"] and "class-token branch" in caplog.text


def test_a_fine_tuned_file_of_unilm_is_a_classifier_with_its_buffers_left_out(tmp_path):
    tensors = drawn(classifier_shapes(SMALL))
    weights = read_weights(saved(tensors | index_buffers(tensors, SMALL), tmp_path / "fine_tuned.pth"))
    assert (
        weights.kind == "classifier"
        and weights.num_classes == CLASSES
        and weights.pooling == "mean"
        and same(weights.tensors, tensors)
    )
    class_token = drawn(classifier_shapes(SMALL, norm="norm"))
    assert read_weights(saved(class_token, tmp_path / "class_token.pth")).pooling == "class"


@pytest.mark.parametrize(
    "wrap",
    [lambda state: state, lambda state: {"module": state, "global_steps": 3}, lambda state: {"state_dict": state}],
    ids=["bare", "deepspeed", "timm"],
)
def test_the_containers_of_training_scripts_are_opened(tmp_path, wrap):
    tensors = drawn(mim_shapes(SMALL))
    torch.save(wrap(tensors), tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth").tensors, tensors)
    save_file(tensors, tmp_path / "w.safetensors")
    assert same(read_weights(tmp_path / "w.safetensors", layout="unilm").tensors, tensors)


def test_the_moving_average_of_a_file_is_taken_unless_the_raw_weights_are_asked_for(tmp_path):
    raw, average = drawn(classifier_shapes(SMALL), 0), drawn(classifier_shapes(SMALL), 1)
    torch.save({"model": raw, "model_ema": average}, tmp_path / "both.pth")
    assert same(read_weights(tmp_path / "both.pth").tensors, average) and same(
        read_weights(tmp_path / "both.pth", average="ema").tensors, average
    )
    assert same(read_weights(tmp_path / "both.pth", average="raw").tensors, raw)
    assert "moving average" in read_weights(tmp_path / "both.pth").source
    assert "holds no moving average" in refused(saved(raw, tmp_path / "raw.pth"), average="ema")


def test_from_384_px_on_the_whole_central_square_is_seen(tmp_path):
    model = ModelSettings(image_px=384, patch_px=16, width=96, depth=1, heads=3)
    weights = read_weights(saved(drawn(classifier_shapes(model)), tmp_path / "w.pth"))
    assert weights.model.image_px == 384 and weights.crop == 1.0


def test_the_statistics_can_be_told(tmp_path):
    path = saved(drawn(classifier_shapes(SMALL)), tmp_path / "w.pth")
    assert read_weights(path).mean == (0.485, 0.456, 0.406) and read_weights(path, statistics="half").std == (
        0.5,
        0.5,
        0.5,
    )


def test_half_precision_stays_half_precision(tmp_path):
    tensors = {name: tensor.half() for name, tensor in drawn(mim_shapes(SMALL)).items()}
    assert same(read_weights(saved(tensors, tmp_path / "w.pth")).tensors, tensors)


def test_a_classifier_with_one_table_for_all_blocks_gets_a_copy_in_every_block(tmp_path):
    tensors = drawn(classifier_shapes(SMALL))
    table = tensors["blocks.0.attn.relative_position_bias_table"]
    shared = {name: tensor for name, tensor in tensors.items() if not name.endswith("table")} | {SHARED_TABLE: table}
    weights = read_weights(saved(shared, tmp_path / "w.pth"))
    assert all(
        torch.equal(weights.tensors[f"blocks.{block}.attn.relative_position_bias_table"], table)
        for block in range(SMALL.depth)
    )
    assert "copied into every block" in weights.facts["bias tables"]


# -------------------------------------------------------------------------------------------- refusals


def pt1k_800ep():
    """beit_base_patch16_224_pt1k_800ep.pth: absolute embeddings, no relative bias, no layer scale."""
    return {
        name: tensor for name, tensor in drawn(mim_shapes(SMALL)).items() if "gamma" not in name and "table" not in name
    } | {"pos_embed": torch.zeros(1, 17, 96)}


def without(*parts):
    return {
        name: tensor for name, tensor in drawn(mim_shapes(SMALL)).items() if not any(part in name for part in parts)
    }


REFUSALS = {
    "whose number of heads no shape tells": pt1k_800ep,
    "pos_embed of shape (1, 19, 96)": lambda: pt1k_800ep() | {"pos_embed": torch.zeros(1, 19, 96)},
    "tensor pos_embed has shape (1, 17, 8)": lambda: drawn(mim_shapes(SMALL)) | {"pos_embed": torch.zeros(1, 17, 8)},
    "a plain ViT (blocks.0.attn.qkv.bias)": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=1
    ).state_dict(),
    "holds no BEiT": lambda: {"conv1.weight": torch.zeros(8, 3, 7, 7)},
    "tensor blocks.1.gamma_2 is missing": lambda: without("blocks.1.gamma_2"),
    "neither relative position bias": lambda: without("table"),
    "tensor blocks.1.norm2.bias is missing": lambda: without("blocks.1.norm2.bias"),
    "tensor blocks.1.gamma_1 is missing": lambda: without("blocks.1."),
    "tensor mask_token is missing": lambda: without("mask_token"),
    "tensor lm_head.weight is missing": lambda: without("lm_head"),
    "tensor rel_pos_bias.relative_position_bias_table is missing": lambda: (
        without("rel_pos_bias") | drawn(feature_shapes(SMALL))
    ),
    "tensor blocks.2.attn.relative_position_bias_table has shape (732, 3)": lambda: (
        drawn(feature_shapes(SMALL)) | {"blocks.2.attn.relative_position_bias_table": torch.zeros(732, 3)}
    ),
    "tensor decoder.weight has no place": lambda: drawn(mim_shapes(SMALL)) | {"decoder.weight": torch.zeros(2)},
    "tensor head.weight has no place in a BEiT (mim)": lambda: (
        drawn(mim_shapes(SMALL)) | {"head.weight": torch.zeros(2, 96)}
    ),
    "no square grid": lambda: drawn(mim_shapes(SMALL)) | {SHARED_TABLE: torch.zeros(100, 3)},
    "not a multiple of the 5 heads": lambda: drawn(mim_shapes(SMALL)) | {SHARED_TABLE: torch.zeros(52, 5)},
    "tensor patch_embed.proj.weight has shape (96, 1, 16, 16)": lambda: (
        drawn(mim_shapes(SMALL)) | {"patch_embed.proj.weight": torch.zeros(96, 1, 16, 16)}
    ),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_what_cannot_be_this_backbone_is_refused_by_name(tmp_path, words):
    assert words in refused(saved(REFUSALS[words](), tmp_path / "w.pth"))


def test_what_is_no_release_is_refused(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "none")
    assert "no settings.yaml" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "a vit of transformers" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "beit"}')
    assert "neither model.safetensors nor pytorch_model.bin" in refused(tmp_path)
    assert "of layout hf, not timm" in refused(tmp_path, layout="timm")
    assert "one set of weights" in refused(tmp_path, average="ema")
    (tmp_path / "config.json").write_text("<html>")
    assert "no JSON object" in refused(tmp_path)
    path = saved(drawn(mim_shapes(SMALL)), tmp_path / "w.pth")
    assert "a file, not a run folder" in refused(path, layout="run")


def test_a_run_is_handed_to_its_reader_and_refused_where_there_is_none(tmp_path):
    (tmp_path / "settings.yaml").write_text("stage: pretrain\n")
    assert "a run folder" in refused(tmp_path)
    asked = []

    def read_run(path, average):
        asked.append((path, average))
        return BeitWeights("mim", SMALL, drawn(mim_shapes(SMALL)), "a run")

    assert read_weights(tmp_path, average="raw", read_run=read_run).source == "a run" and asked == [(tmp_path, "raw")]


# ------------------------------------------------------------------------------------------------ timm


def timm_folder(folder, model, **options):
    save_for_hf(model, folder, safe_serialization=options.pop("safe", True), model_config=options)
    return folder


@pytest.mark.parametrize(
    "name, mean", [("beit_base_patch16_224", (0.5, 0.5, 0.5)), ("beitv2_base_patch16_224", (0.485, 0.456, 0.406))]
)
def test_a_folder_that_timm_wrote_gives_its_logits_and_its_own_statistics(tmp_path, name, mean):
    torch.manual_seed(0)
    sizes = dict(img_size=64, embed_dim=96, depth=2, num_heads=3, num_classes=4)
    model = timm.create_model(name, **sizes).eval()
    torch.nn.init.normal_(model.head.weight)
    weights = read_weights(timm_folder(tmp_path, model, label_names=["ant", "bee", "cat", "dog"]))
    assert (
        weights.kind == "classifier"
        and weights.classes == ("ant", "bee", "cat", "dog")
        and weights.mean == mean
        and weights.crop == 0.9
    )
    answers = model_outputs(weights)
    with torch.no_grad():
        np.testing.assert_allclose(answers.values["logits"], model(answers.images_norm).numpy(), rtol=0, atol=1e-5)


def test_a_folder_with_a_pickled_file_and_mean_pooled_features_is_read(tmp_path):
    model = timm.create_model("beit_base_patch16_224", img_size=64, embed_dim=96, depth=2, num_heads=3, num_classes=0)
    weights = read_weights(timm_folder(tmp_path, model, safe=False))
    assert weights.kind == "features" and weights.pooling == "mean" and same(weights.tensors, dict(model.state_dict()))


# ---------------------------------------------------------------------------------------- Hugging Face


HF = dict(
    hidden_size=96,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=384,
    image_size=64,
    patch_size=16,
    layer_norm_eps=1e-6,
    vocab_size=CODES,
)


def hf_folder(folder, architecture, seed=0, **options):
    torch.manual_seed(seed)
    model = architecture(BeitConfig(**{**HF, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


MIM_FLAGS = dict(use_mask_token=True, use_shared_relative_position_bias=True)


def test_a_masked_image_model_that_transformers_wrote_gives_its_token_logits(tmp_path):
    model = hf_folder(tmp_path, BeitForMaskedImageModeling, **MIM_FLAGS)
    weights = read_weights(tmp_path)
    assert weights.kind == "mim" and weights.num_codes == CODES
    answers = model_outputs(weights)
    with torch.no_grad():
        expected = model(answers.images_norm, bool_masked_pos=answers.is_masked).logits.numpy()
    np.testing.assert_allclose(answers.values["logits"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("mean_pooling", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_classifier_that_transformers_wrote_gives_its_logits_under_every_flag(tmp_path, mean_pooling, shared):
    flags = dict(
        use_mean_pooling=mean_pooling,
        use_shared_relative_position_bias=shared,
        use_relative_position_bias=not shared,
        use_mask_token=shared,
    )
    model = hf_folder(tmp_path, BeitForImageClassification, **flags, id2label={0: "ant", 1: "bee", 2: "cat"})
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
                "size": 73,
                "crop_size": {"height": 64, "width": 64},
                "do_center_crop": True,
            }
        )
    )
    weights = read_weights(tmp_path)
    assert (
        weights.kind == "classifier"
        and weights.classes == ("ant", "bee", "cat")
        and weights.pooling == ("mean" if mean_pooling else "class")
    )
    assert weights.mean == (0.5, 0.5, 0.5) and weights.crop == pytest.approx(64 / 73)
    answers = model_outputs(weights)
    with torch.no_grad():
        expected = model(answers.images_norm).logits.numpy()
    np.testing.assert_allclose(answers.values["logits"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "flags",
    [
        dict(use_absolute_position_embeddings=True, layer_scale_init_value=0.0),
        dict(use_absolute_position_embeddings=True, use_relative_position_bias=True),
        dict(use_relative_position_bias=True, layer_scale_init_value=0.0),
    ],
)
def test_a_classifier_with_absolute_positions_or_without_layer_scale_gives_its_logits(tmp_path, flags):
    model = hf_folder(tmp_path, BeitForImageClassification, **flags, id2label={0: "ant", 1: "bee", 2: "cat"})
    weights = read_weights(tmp_path)
    assert weights.model.absolute_positions == flags.get("use_absolute_position_embeddings", False)
    answers = model_outputs(weights)
    with torch.no_grad():
        expected = model(answers.images_norm).logits.numpy()
    np.testing.assert_allclose(answers.values["logits"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "flags",
    [dict(use_mean_pooling=False, use_relative_position_bias=True), dict(use_relative_position_bias=True), MIM_FLAGS],
)
def test_a_bare_backbone_that_transformers_wrote_gives_its_hidden_states(tmp_path, flags):
    model = hf_folder(tmp_path, BeitModel, **flags)
    weights = read_weights(tmp_path)
    assert weights.kind == "features"
    answers = model_outputs(weights)
    with torch.no_grad():
        out = model(answers.images_norm)
    for found, expected in (
        (answers.values["tokens"], out.last_hidden_state.numpy()),
        (answers.values["pooled"], out.pooler_output.numpy()),
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_bare_file_in_transformers_names_is_recognised(tmp_path):
    hf_folder(tmp_path, BeitForMaskedImageModeling, **MIM_FLAGS)
    assert same(read_weights(tmp_path / "model.safetensors").tensors, read_weights(tmp_path).tensors)
    assert same(read_weights(tmp_path / "model.safetensors", layout="hf").tensors, read_weights(tmp_path).tensors)


def test_an_eps_that_is_not_beits_is_warned_of(tmp_path, caplog):
    hf_folder(tmp_path, BeitForMaskedImageModeling, **MIM_FLAGS, layer_norm_eps=1e-12)
    read_weights(tmp_path)
    assert "layer_norm_eps is 1e-12" in caplog.text


@pytest.mark.parametrize(
    "architecture, flags, words",
    [
        (
            BeitForSemanticSegmentation,
            dict(use_relative_position_bias=True, num_hidden_layers=4, out_indices=[1, 2, 3, 4]),
            "a segmentation model",
        ),
        (
            BeitForMaskedImageModeling,
            dict(use_mask_token=True, use_relative_position_bias=True),
            "rel_pos_bias.relative_position_bias_table is missing",
        ),
        (BeitForMaskedImageModeling, dict(**MIM_FLAGS, use_mean_pooling=False), "beit.layernorm.bias has no place"),
        (BeitForMaskedImageModeling, dict(use_shared_relative_position_bias=True), "mask_token is missing"),
        (
            BeitForImageClassification,
            dict(use_relative_position_bias=True, use_shared_relative_position_bias=True),
            "has no place",
        ),
        (BeitForImageClassification, dict(use_relative_position_bias=True, hidden_act="relu"), "hidden_act relu"),
    ],
)
def test_models_of_transformers_that_are_not_this_backbone_are_refused(tmp_path, architecture, flags, words):
    hf_folder(tmp_path, architecture, **flags)
    assert words in refused(tmp_path)


def test_a_config_that_contradicts_its_tensors_is_refused(tmp_path):
    hf_folder(tmp_path, BeitForMaskedImageModeling, **MIM_FLAGS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 6}))
    assert "num_attention_heads is 6" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "patch_size": 8}))
    assert "patch_size is 8" in refused(tmp_path)


def test_the_names_that_transformers_5_has_in_memory_are_refused_with_the_remedy(tmp_path):
    torch.manual_seed(0)
    path = saved(BeitForMaskedImageModeling(BeitConfig(**{**HF, **MIM_FLAGS})).state_dict(), tmp_path / "w.pth")
    if any(".q_proj." in name for name in torch.load(path)["model"]):
        assert "save_pretrained" in refused(path)
    else:
        assert read_weights(path).kind == "mim"


# ---------------------------------------------------------------------------------------------- finite


def poisoned(tensors: dict, value: float) -> dict:
    """A copy in which one value of the last tensor is not finite."""
    copy = {name: tensor.clone() for name, tensor in tensors.items()}
    copy[sorted(copy)[-1]].view(-1)[-1] = value
    return copy


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shapes", [mim_shapes, classifier_shapes, feature_shapes])
def test_weights_that_are_not_finite_are_no_weights(tmp_path, shapes, value):
    tensors = drawn(shapes(SMALL))
    assert read_weights(saved(tensors, tmp_path / "good.pth")).tensors
    assert "not finite" in refused(saved(poisoned(tensors, value), tmp_path / "bad.pth"))


def test_an_average_that_is_not_finite_is_refused_and_the_raw_weights_beside_it_are_not(tmp_path):
    tensors = drawn(classifier_shapes(SMALL))
    torch.save({"model": tensors, "model_ema": poisoned(tensors, float("nan"))}, tmp_path / "run.pth")
    assert "not finite" in refused(tmp_path / "run.pth")
    assert same(read_weights(tmp_path / "run.pth", average="raw").tensors, tensors)


@pytest.mark.parametrize("library", ["timm", "hf", "unilm"])
def test_a_release_of_weights_that_are_not_finite_is_neither_read_nor_written(tmp_path, library):
    weights = read_weights(saved(drawn(classifier_shapes(SMALL)), tmp_path / "good.pth"))
    make = {"timm": to_timm, "hf": to_hf, "unilm": to_unilm}[library]
    broken = replace(weights, tensors=poisoned(weights.tensors, float("nan")))
    with pytest.raises(UserError, match="no release in .* not finite"):
        write_release(tmp_path / "broken", make(broken), broken)
    assert not (tmp_path / "broken").exists()

    write_release(tmp_path / "good", make(weights), weights)
    (file,) = [path for path in (tmp_path / "good").iterdir() if path.suffix in (".safetensors", ".pth")]
    content = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)["model"]
    content = poisoned(content, float("inf"))
    save_file(content, file) if file.suffix == ".safetensors" else torch.save({"model": content}, file)
    assert "not finite" in refused(tmp_path / "good")
