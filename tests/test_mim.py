import pytest
import torch
from timm.models.beit import Beit
from transformers import BeitConfig, BeitForMaskedImageModeling

from peco_ds.config import AggregationSettings, EncodingSettings, ModelSettings
from peco_ds.models.mim import MaskedImageModel, build_mim
from peco_ds.models.vit import timm_arguments

SMALL = ModelSettings(image_px=64, patch_px=16, width=96, depth=3, heads=3, layer_scale=0.1, drop_path=0.0)
V = 50
VARIANTS = {
    "full": {},
    "aggregating": dict(aggregation=AggregationSettings(early_block=2, blocks=2)),
    "visible": dict(encoding=EncodingSettings(kind="visible", decoder_width=48, decoder_depth=2, decoder_heads=3)),
}


def build(variant, settings=SMALL, **arguments):
    torch.manual_seed(0)
    asked = {"encoding": EncodingSettings(), "aggregation": AggregationSettings()} | VARIANTS[variant]
    return build_mim(settings, asked["encoding"], asked["aggregation"], V, **arguments)


def model_with_trained_look(variant="full", settings=SMALL):
    """Every parameter moved off its initial value, so that a bias table or q_bias in the wrong place shows."""
    model = build(variant, settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def images_and_masks(settings=SMALL, batch=2, count=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, settings.image_px, settings.image_px, generator=generator)
    masked = torch.stack(
        [torch.randperm(settings.grid**2, generator=generator)[:count].sort().values for _ in range(batch)]
    )
    return images, masked


def to_hugging_face(weights: dict, depth: int) -> dict:
    """Our names -> the names a BeitForMaskedImageModeling file has (papers' key tables), written out independently of
    peco_ds.convert.
    """
    out = {}
    for name, value in weights.items():
        name = name.removeprefix("backbone.")
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            layer = f"beit.encoder.layer.{number}."
            if rest == "attn.qkv.weight":
                for part, chunk in zip(("query", "key", "value"), value.chunk(3)):
                    out[f"{layer}attention.attention.{part}.weight"] = chunk
                continue
            rest = {
                "attn.q_bias": "attention.attention.query.bias",
                "attn.v_bias": "attention.attention.value.bias",
                "gamma_1": "lambda_1",
                "gamma_2": "lambda_2",
            }.get(rest, rest)
            for ours, theirs in (
                ("norm1", "layernorm_before"),
                ("norm2", "layernorm_after"),
                ("attn.proj", "attention.output.dense"),
                ("mlp.fc1", "intermediate.dense"),
                ("mlp.fc2", "output.dense"),
            ):
                rest = rest.replace(ours, theirs)
            out[layer + rest] = value
        else:
            table = "relative_position_bias_table"
            out[
                {
                    "cls_token": "beit.embeddings.cls_token",
                    "mask_token": "beit.embeddings.mask_token",
                    "patch_embed.proj.weight": "beit.embeddings.patch_embeddings.projection.weight",
                    "patch_embed.proj.bias": "beit.embeddings.patch_embeddings.projection.bias",
                    f"rel_pos_bias.{table}": f"beit.encoder.relative_position_bias.{table}",
                    "norm.weight": "layernorm.weight",
                    "norm.bias": "layernorm.bias",
                }.get(name, name)
            ] = value
    return out


def test_token_logits_equal_hugging_face(tmp_path):
    from safetensors.torch import save_file

    model = model_with_trained_look()
    config = BeitConfig(
        vocab_size=V,
        hidden_size=SMALL.width,
        num_hidden_layers=SMALL.depth,
        num_attention_heads=SMALL.heads,
        intermediate_size=4 * SMALL.width,
        image_size=SMALL.image_px,
        patch_size=SMALL.patch_px,
        layer_norm_eps=1e-6,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        use_relative_position_bias=False,
        layer_scale_init_value=0.1,
        drop_path_rate=0.0,
    )
    config.save_pretrained(tmp_path)
    save_file(
        {k: v.contiguous().clone() for k, v in to_hugging_face(model.state_dict(), SMALL.depth).items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    theirs, report = BeitForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    images, masked = images_and_masks()
    hidden = torch.zeros(2, SMALL.grid**2, dtype=torch.bool).scatter_(1, masked, True)
    with torch.no_grad():
        expected = theirs.eval()(images, bool_masked_pos=hidden).logits.gather(
            1, masked.unsqueeze(-1).expand(-1, -1, V)
        )
        ours = model(images, masked).logits
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_patches_are_invisible_and_shown_ones_are_not(variant):
    model = model_with_trained_look(variant)
    images, masked = images_and_masks(batch=1)
    changed = images.clone()
    row, column = divmod(int(masked[0, 0]), SMALL.grid)
    changed[:, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] += 1.0
    with torch.no_grad():
        assert torch.equal(model(images, masked).logits, model(changed, masked).logits)
        assert not torch.equal(model.features(images), model.features(changed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_blocks_changes_no_logit_and_no_gradient_and_every_parameter_has_one(variant):
    settings = ModelSettings(image_px=64, patch_px=16, width=96, depth=3, heads=3, drop_path=0.2)
    images, masked = images_and_masks()
    results = []
    for kind in ("none", "selective", "full"):
        model = build(variant, settings, activation_checkpointing=kind).train()
        torch.manual_seed(5)  # stochastic depth draws the same in both
        outputs = model(images, masked)
        logits = torch.cat([branch for branch in (outputs.logits, outputs.aggregated_logits) if branch is not None])
        (logits.log_softmax(-1)[..., :7].mean() + outputs.features.square().mean()).backward()
        results.append((logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (plain, gradients), *others = results
    for recomputed, again in others:
        assert torch.equal(plain, recomputed)
        assert all(torch.equal(gradients[name], again[name]) for name in gradients)
    assert not [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_of_whole_images_are_the_backbones_alone(variant):
    model = model_with_trained_look(variant)
    theirs = Beit(**timm_arguments(SMALL)).eval()
    theirs.load_state_dict(model.backbone.state_dict())
    images, _ = images_and_masks()
    with torch.no_grad():
        assert (model.features(images) - theirs.forward_features(images)).abs().max() <= 1e-5


def test_the_first_branch_of_an_aggregating_model_is_the_plain_model():
    model = model_with_trained_look("aggregating")
    plain = MaskedImageModel(SMALL, V).eval()
    plain.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("aggregation_blocks.")}
    )
    images, masked = images_and_masks()
    with torch.no_grad():
        ours, theirs = model(images, masked), plain(images, masked)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-6) and torch.equal(ours.features, theirs.features)


def test_the_second_branch_is_a_deeper_model_whose_patches_skip_the_late_blocks():
    """Written out from the paper: early patches and final class token, extra blocks, the same norm and head."""
    model = model_with_trained_look("aggregating")
    images, masked = images_and_masks()
    with torch.no_grad():
        bias, backbone = model.backbone.rel_pos_bias(), model.backbone
        x = backbone.patch_embed(images)
        for image, places in enumerate(masked):
            x[image, places] = model.mask_token[0, 0]
        x = torch.cat([backbone.cls_token.expand(2, -1, -1), x], dim=1)
        after = []
        for block in backbone.blocks:
            after.append(x := block(x, shared_rel_pos_bias=bias))
        # after block 2 of 3, counted from 1
        x = torch.cat([after[-1][:, :1], after[1][:, 1:]], dim=1)
        for block in model.aggregation_blocks:
            x = block(x, shared_rel_pos_bias=bias)
        expected = model.lm_head(backbone.norm(x))[:, 1:].gather(1, masked.unsqueeze(-1).expand(-1, -1, V))
        found = model(images, masked).aggregated_logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_extra_blocks_have_the_depth_and_the_stochastic_depth_of_their_place():
    settings = ModelSettings(image_px=64, patch_px=16, width=384, depth=12, heads=6, drop_path=0.11)
    torch.manual_seed(0)
    model = build_mim(settings, EncodingSettings(), AggregationSettings(early_block=9, blocks=2), V)
    # PyTorch's own initial weights, as the released code leaves them
    uniform = 384**-0.5 / 3**0.5
    for place, block in zip((10, 11), model.aggregation_blocks):
        assert block.attn.qkv.weight.std().item() == pytest.approx(uniform, rel=0.02)
        assert block.attn.proj.weight.std().item() == pytest.approx(uniform / (2 * place) ** 0.5, rel=0.02)
        assert block.drop_path == pytest.approx(0.01 * (place - 1))
        assert block.gamma_1.detach().unique().item() == pytest.approx(0.1)


def test_a_visible_encoder_is_a_full_one_whose_shown_tokens_attend_to_no_hidden_one():
    """The same backbone with the masked patches' keys masked out of every block: what the visible tokens are must not
    differ.
    """
    model = model_with_trained_look("visible")
    images, masked = images_and_masks()
    hidden = torch.zeros(2, 1 + SMALL.grid**2, dtype=torch.bool).scatter_(1, masked + 1, True)
    seen = []
    model.decoder.embed.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    with torch.no_grad():
        model(images, masked)
        backbone = model.backbone
        bias = backbone.rel_pos_bias().masked_fill(hidden[:, None, None, :], float("-inf"))
        x = torch.cat([backbone.cls_token.expand(2, -1, -1), backbone.patch_embed(images)], dim=1)
        for block in backbone.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        expected = torch.stack([tokens[~places] for tokens, places in zip(backbone.norm(x), hidden)])
    assert seen[0].shape == expected.shape == (2, 1 + 10, SMALL.width)
    assert (seen[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("variant", ("full", "aggregating"))
def test_a_place_that_fills_a_row_up_changes_nothing_elsewhere(variant):
    model = model_with_trained_look(variant)
    images, masked = images_and_masks()
    filled = torch.cat([masked, masked[:, -1:].expand(-1, 2)], dim=1)
    with torch.no_grad():
        ours, theirs = model(images, filled), model(images, masked)
    assert torch.equal(ours.features, theirs.features)
    assert torch.allclose(ours.logits[:, :6], theirs.logits, atol=1e-6) and torch.allclose(
        ours.logits[:, 7], theirs.logits[:, 5], atol=1e-6
    )


def test_initial_weights_have_beits_depth_scaled_statistics():
    settings = ModelSettings(image_px=64, patch_px=16, width=384, depth=6, heads=6)
    model = MaskedImageModel(settings, 1000)
    # a normal distribution cut at one standard deviation keeps 0.5396 of it
    expected = 0.02 * 0.5396
    for number, block in enumerate(model.backbone.blocks, start=1):
        assert block.attn.qkv.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert block.attn.proj.weight.std().item() == pytest.approx(expected / (2 * number) ** 0.5, rel=0.02)
        assert block.mlp.fc2.weight.std().item() == pytest.approx(expected / (2 * number) ** 0.5, rel=0.02)
        assert block.attn.qkv.weight.abs().max() <= 0.02 and block.attn.proj.bias.abs().max() == 0
    assert model.lm_head.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert model.mask_token.std().item() == pytest.approx(expected, rel=0.15)
    assert model.backbone.rel_pos_bias.relative_position_bias_table.abs().max() == 0
