"""VQ-KD: the released layout, independent implementations of both transformers, and what training asks of the
module.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_peco_tokenizer import images_11
from test_planner import bytes_kept, count, forward_and_training_flops
from transformers import BeitConfig, BeitModel
from vqkd_samples import released_layout

from peco_ds.config import TokenizerLossSettings, TokenizerSettings, TokenizerVitSettings
from peco_ds.errors import UserError
from peco_ds.models.tokenizers import build_tokenizer, load_tokenizer, save_tokenizer
from peco_ds.models.vqkd_tokenizer import Fp32Linear, VqkdTokenizer, read_vqkd
from peco_ds.objectives.tokenizer_losses import DistillationObjective
from peco_ds.planner.shapes import FLOPS_PER_MAC, tokenizer_cost

TINY = TokenizerSettings(
    kind="vqkd",
    vit=TokenizerVitSettings(
        image_px=32,
        patch_px=8,
        width=64,
        depth=2,
        heads=1,
        decoder_width=128,
        decoder_depth=1,
        decoder_heads=2,
        target_width=24,
    ),
    num_codes=64,
    code_dim=8,
    l2_normalized=True,
    average="directions",
)


HF_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def transformers_beit(
    file: dict[str, torch.Tensor], part: str, *, image_px: int, patch_px: int, channels: int, heads: int, folder
) -> BeitModel:
    """The encoder or decoder of a released file as transformers' own network, which ends in a norm over all tokens."""
    tensors = {}
    for name, tensor in file.items():
        if not name.startswith(f"{part}."):
            continue
        name = name.removeprefix(f"{part}.")
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            layer = f"encoder.layer.{number}"
            if rest == "attn.qkv.weight":
                tensors |= {
                    f"{layer}.attention.attention.{kind}.weight": piece.clone()
                    for kind, piece in zip(("query", "key", "value"), tensor.chunk(3))
                }
            elif rest in ("attn.q_bias", "attn.v_bias"):
                tensors[f"{layer}.attention.attention.{'query' if 'q_' in rest else 'value'}.bias"] = tensor
            else:
                module, _, kind = rest.rpartition(".")
                tensors[f"{layer}.{HF_NAMES[module]}.{kind}"] = tensor
        else:
            for theirs, hf in (
                ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
                ("pos_embed", "embeddings.position_embeddings"),
                ("cls_token", "embeddings.cls_token"),
                ("fc_norm", "layernorm"),
            ):
                name = name.replace(theirs, hf)
            tensors[name] = tensor
    depth = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer."))
    width = tensors["layernorm.weight"].numel()
    config = BeitConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=image_px,
        patch_size=patch_px,
        num_channels=channels,
        layer_norm_eps=1e-6,
        use_absolute_position_embeddings=True,
        use_relative_position_bias=False,
        use_mask_token=False,
        use_mean_pooling=False,
        layer_scale_init_value=0.0,
    )
    config.save_pretrained(folder)
    save_file(
        {f"beit.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    model, report = BeitModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def tanh_head(file: dict[str, torch.Tensor], name: str, rows: np.ndarray) -> np.ndarray:
    first, last = (
        {kind: file[f"{name}.{layer}.{kind}"].double().numpy() for kind in ("weight", "bias")} for layer in (0, 2)
    )
    return np.tanh(rows @ first["weight"].T + first["bias"]) @ last["weight"].T + last["bias"]


def tiny() -> VqkdTokenizer:
    torch.manual_seed(0)
    return build_tokenizer(TINY)


# -------------------------------------------------------------------------------------- released files


@torch.no_grad()
@pytest.mark.parametrize("name", ["base", "tiny"])
def test_a_released_file_gives_the_codes_and_features_of_independent_networks(name, tmp_path, real_data):
    vit, num_codes, code_dim = {"base": (TokenizerVitSettings(decoder_depth=1), 8192, 32), "tiny": (TINY.vit, 64, 8)}[
        name
    ]
    file = released_layout(vit, num_codes, code_dim)
    settings, state = read_vqkd(
        {
            "model": file | {"teacher_model.proj": torch.zeros(3), "scaling_layer.shift": torch.zeros(1, 3, 1, 1)},
            "epoch": 99,
        }
    )
    assert (settings.vit, settings.num_codes, settings.code_dim, settings.l2_normalized) == (
        vit,
        num_codes,
        code_dim,
        True,
    )
    tokenizer = build_tokenizer(settings).eval()
    tokenizer.load_state_dict(state)
    images = images_11(real_data.imagenet[:1], vit.image_px)
    grid = vit.image_px // vit.patch_px

    (tmp_path / "encoder").mkdir()
    (tmp_path / "decoder").mkdir()
    encoder = transformers_beit(
        file,
        "encoder",
        image_px=vit.image_px,
        patch_px=vit.patch_px,
        channels=3,
        heads=vit.heads,
        folder=tmp_path / "encoder",
    )
    tokens = encoder(images).last_hidden_state[0, 1:].double().numpy()
    raw = tanh_head(file, "encode_task_layer", tokens)
    mine = tokenizer.encode(images)
    assert mine.shape == (1, code_dim, grid, grid)
    np.testing.assert_allclose(mine[0].flatten(1).T.numpy(), raw, atol=1e-4)

    codes, table = tokenizer.tokenize(images), file["quantize.embedding.weight"].double().numpy()
    cosines = raw / np.linalg.norm(raw, axis=1, keepdims=True) @ table.T
    assert codes.shape == (1, grid**2) and len(np.unique(codes)) > 2
    chosen = cosines[np.arange(grid**2), codes[0].numpy()]
    # two codes may lie closer to each other than float32 can tell
    np.testing.assert_allclose(chosen, cosines.max(axis=1), atol=1e-5)

    decoder = transformers_beit(
        file,
        "decoder",
        image_px=grid,
        patch_px=1,
        channels=code_dim,
        heads=vit.decoder_heads,
        folder=tmp_path / "decoder",
    )
    image = torch.from_numpy(table[codes[0].numpy()].T.reshape(1, code_dim, grid, grid)).float()
    features = tanh_head(file, "decode_task_layer", decoder(image).last_hidden_state[0, 1:].double().numpy())
    np.testing.assert_allclose(tokenizer(images).features[0].numpy(), features, atol=1e-4)


def without(name):
    return lambda file: file.pop(name)


def changed(name, change):
    return lambda file: file.update({name: change(file[name])})


BAD_FILES = [
    (
        without("quantize.embedding.weight"),
        "tensor quantize.embedding.weight is missing, so this is no VQ-KD tokenizer",
    ),
    (without("encoder.blocks.1.attn.v_bias"), "tensor encoder.blocks.1.attn.v_bias is missing"),
    (without("encode_task_layer.2.bias"), "tensor encode_task_layer.2.bias is missing"),
    (lambda file: file.update({"decoder.norm.weight": torch.ones(3)}), "decoder.norm.weight' has no place in"),
    (
        changed("encode_task_layer.0.weight", lambda tensor: tensor[:5]),
        r"tensor encode_task_layer.0.weight has shape \(5, 64\), the other shapes ask for \(64, 64\)",
    ),
    (changed("encoder.pos_embed", lambda tensor: tensor[:, :-1]), "encoder.pos_embed has 16 places, no square grid"),
    (
        changed("encoder.patch_embed.proj.weight", lambda tensor: tensor[:60]),
        "its encoder is 60 wide, not a multiple of 64",
    ),
    (changed("quantize.embedding.weight", lambda tensor: tensor.long()), "quantize.embedding.weight is torch.int64"),
    (changed("quantize.embedding.weight", lambda tensor: tensor[0]), "a VQ-KD tokenizer's has 2 dimensions"),
    (
        changed("quantize.embedding.weight", lambda tensor: tensor.repeat(2000, 1)),
        r"num_codes 128000: must be in \[1, 65536\] \(codes are stored as uint16\)",
    ),
    (
        changed("encoder.blocks.0.norm1.weight", lambda tensor: tensor.index_fill(0, torch.tensor([3]), float("nan"))),
        "tensor encoder.blocks.0.norm1.weight holds values that are not finite",
    ),
    (
        changed("decode_task_layer.2.bias", lambda tensor: tensor / 0),
        "tensor decode_task_layer.2.bias holds values that are not finite",
    ),
    (
        changed("encoder.fc_norm.weight", lambda tensor: tensor.long()),
        "encoder.fc_norm.weight' is torch.int64, no tensor of floats",
    ),
    (changed("encoder.cls_token", lambda tensor: tensor[0, 0, 0]), r"tensor encoder.cls_token has shape \(\)"),
    (
        lambda file: file.update({"encoder.blocks.99999.norm1.weight": torch.ones(3)}),
        "its encoder has 3 blocks up to number 99999",
    ),
]


@pytest.mark.parametrize("spoil, said", BAD_FILES, ids=[said for _, said in BAD_FILES])
def test_a_file_that_is_no_whole_vqkd_names_the_tensor(spoil, said):
    file = released_layout(TINY.vit, 64, 8)
    spoil(file)
    with pytest.raises(UserError, match=said):
        read_vqkd({"model": file})


def test_an_imported_tokenizer_is_a_release_like_a_trained_one(tmp_path, real_data):
    settings, state = read_vqkd(released_layout(TINY.vit, 64, 8))
    save_tokenizer(tmp_path, state, settings, {"judge": "none"})
    loaded, card = load_tokenizer(tmp_path)
    assert (card.settings, card.stride_px, card.settings.only_px) == (TINY, 8, 32)
    direct = build_tokenizer(settings).eval()
    direct.load_state_dict(state)
    images = images_11(real_data.imagenet[:3], 32)
    codes = loaded.tokenize(images)
    assert torch.equal(codes, direct.tokenize(images)) and codes.unique().numel() > 2
    assert json.loads((tmp_path / "tokenizer.json").read_text())["settings"]["kind"] == "vqkd"
    assert torch.equal(loaded.code_vectors[codes], direct.codebook.codes[codes])


# ------------------------------------------------------------------------------------------ the module


def test_every_parameter_gets_a_gradient():
    tokenizer = tiny()
    out = tokenizer(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert out.features.shape == (2, 16, 24) and out.codes.shape == (2, 16)
    (out.features.square().mean() + out.commitment).backward()
    assert [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_initial_weights_are_the_released_ones():
    torch.manual_seed(0)
    module = build_tokenizer(
        TokenizerSettings(
            **{
                **TINY.__dict__,
                "vit": TokenizerVitSettings(
                    image_px=64,
                    patch_px=16,
                    width=256,
                    depth=3,
                    heads=4,
                    decoder_width=256,
                    decoder_depth=2,
                    decoder_heads=4,
                ),
            }
        )
    )
    expected = {
        "encoder.pos_embed": 0.02,
        "encoder.blocks.2.attn.qkv.weight": 0.02,
        "decoder.blocks.0.mlp.fc1.weight": 0.02,
        "to_code.0.weight": 0.02,
        "to_target.2.weight": 0.02,
    }
    expected |= {
        f"encoder.blocks.{number}.{name}.weight": 0.02 / (2 * (number + 1)) ** 0.5
        for number in range(3)
        for name in ("attn.proj", "mlp.fc2")
    }
    found = {name: float(p.detach().std()) for name, p in module.named_parameters()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0.05)
    # not cut at one standard deviation, as pre-training's weights are
    assert module.to_code[0].weight.abs().max() > 0.05
    assert all(
        not p.any() for name, p in module.named_parameters() if name.endswith("bias") and "patch_embed" not in name
    )


@torch.no_grad()
@pytest.mark.parametrize("precision", ["module", "autocast"])
def test_codes_are_chosen_in_float32_under_bf16(precision, real_data):
    tokenizer = tiny().eval()
    images = images_11(real_data.imagenet[:2], 32)
    if precision == "module":
        tokenizer.bfloat16()
        for module in tokenizer.modules():
            if getattr(module, "k_bias", None) is not None:
                module.k_bias = module.k_bias.bfloat16()  # as the engine does it
    seen = {}
    tokenizer.to_code.register_forward_hook(
        lambda module, arguments, output: seen.update(tokens=arguments[0], vectors=output)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        features = tokenizer.encode(images)
        assert tokenizer(images).features.dtype == torch.float32
    assert features.dtype == seen["vectors"].dtype == torch.float32 and tokenizer.codebook.codes.dtype == torch.float32
    first, _, last = tokenizer.to_code
    assert isinstance(first, Fp32Linear)
    exact = (
        seen["tokens"].double() @ first.weight.double().T + first.bias.double()
    ).tanh() @ last.weight.double().T + last.bias.double()
    torch.testing.assert_close(seen["vectors"].double(), exact, rtol=1e-5, atol=1e-7)


def test_soft_codes_are_the_head_of_the_softmax_over_cosines(real_data):
    tokenizer = tiny().eval()
    images = images_11(real_data.imagenet[:2], 32)
    soft = tokenizer.tokenize_soft(images, 5, temperature=0.1)
    with torch.no_grad():
        rows = torch.nn.functional.normalize(tokenizer.encode(images).flatten(2).transpose(1, 2), dim=-1)
    probs = (rows @ tokenizer.code_vectors.T / 0.1).softmax(dim=-1)
    torch.testing.assert_close(soft.topk_probs, probs.topk(5).values)
    assert torch.equal(soft.codes, tokenizer.tokenize(images)) and torch.equal(soft.topk_codes[..., 0], soft.codes)


def test_an_image_of_another_size_and_training_mode_are_refused():
    tokenizer = tiny()
    with pytest.raises(AssertionError, match="eval"):
        tokenizer.tokenize(torch.zeros(1, 3, 32, 32))
    with pytest.raises(AssertionError, match="positions are those of 32 px"):
        tokenizer.eval().tokenize(torch.zeros(1, 3, 40, 40))
    assert not tokenizer.makes_images


class EdgesTeacher:
    """Features that a network can learn: colours of a patch, their spread, and where it lies."""

    def targets(self, images_01: torch.Tensor) -> torch.Tensor:
        patches = images_01.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4).permute(0, 2, 3, 1, 4).flatten(1, 2)
        features = torch.cat([patches.mean(-1), patches.std(-1), patches[..., ::8].flatten(2)[..., :18]], dim=-1)
        return features - 0.4


def test_a_tiny_tokenizer_learns_its_teachers_features_on_real_images(real_data):
    tokenizer, images = tiny(), images_11(real_data.imagenet[:4], 32)
    with torch.no_grad():
        rows = tokenizer.eval().encode(images).flatten(2).transpose(1, 2).reshape(-1, 8)
    tokenizer.codebook.init_kmeans(rows, 10, torch.Generator().manual_seed(0))
    tokenizer.train()
    objective = DistillationObjective(TokenizerLossSettings(commitment_weight=1.0), EdgesTeacher())
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-3)
    seen = []
    for step in range(60):
        loss, stats = objective(tokenizer(images), images, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tokenizer.codebook.update()
        seen.append(stats["cosine"].item())
    assert seen[-1] > seen[0] + 0.3 and seen[-1] > 0.8


# --------------------------------------------------------------------------------------------- planner


@pytest.mark.parametrize(
    "settings", [TINY, TokenizerSettings(kind="vqkd", code_dim=32, l2_normalized=True)], ids=["tiny", "base"]
)
def test_planned_parameters_equal_those_of_its_modules(settings):
    with torch.device("meta"):
        module = build_tokenizer(settings)
    cost = tokenizer_cost(settings, settings.vit.image_px)
    assert cost.encoder.parameters == count(module.encoder) + count(module.to_code)
    assert cost.decoder.parameters == count(module.decoder) + count(module.to_target)


def test_planned_flops_and_kept_elements_are_those_that_torch_counts():
    module, images = tiny(), torch.randn(2, 3, 32, 32).clamp(-1, 1)
    cost = tokenizer_cost(TINY, 32)
    forward, training = forward_and_training_flops(lambda: module(images).features.sum())
    assert FLOPS_PER_MAC * cost.forward_macs * 2 == pytest.approx(forward, rel=0.01)
    # the image gets no gradient, which two blocks make up for less than twelve
    assert cost.training_flops * 2 == pytest.approx(training, rel=0.05)
    # Norms' statistics and copies of the small codes are not planned: more than elsewhere at these widths
    assert 2 * 4 * (cost.encoder.saved + cost.decoder.saved) == pytest.approx(
        bytes_kept(module, lambda: (module(images).features,)), rel=0.1
    )
