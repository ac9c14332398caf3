import pytest
import torch
from timm.models.beit import Beit
from transformers import BeitConfig, BeitForMaskedImageModeling

from peco_ds.config import ModelSettings
from peco_ds.models.mim import MaskedImageModel
from peco_ds.models.vit import timm_arguments
from peco_ds.objectives import OBJECTIVES

SMALL = ModelSettings(image_px=64, patch_px=16, width=96, depth=3, heads=3, layer_scale=0.1, drop_path=0.0)
V = 50


def model_with_trained_look(settings=SMALL, num_codes=V):
    """Every parameter moved off its initial value, so that a bias table or q_bias in the wrong place shows."""
    torch.manual_seed(0)
    model = MaskedImageModel(settings, num_codes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def pictures_and_masks(settings=SMALL, batch=2, count=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, settings.image_px, settings.image_px, generator=generator)
    masked = torch.stack([torch.randperm(settings.grid**2, generator=generator)[:count].sort().values for _ in range(batch)])
    return images, masked


def to_hugging_face(weights: dict, depth: int) -> dict:
    """Our names -> the names a BeitForMaskedImageModeling file has (papers' key tables), written out independently of peco_ds.convert."""
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
            for ours, theirs in (("norm1", "layernorm_before"), ("norm2", "layernorm_after"), ("attn.proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense")):
                rest = rest.replace(ours, theirs)
            out[layer + rest] = value
        else:
            out[
                {
                    "cls_token": "beit.embeddings.cls_token",
                    "mask_token": "beit.embeddings.mask_token",
                    "patch_embed.proj.weight": "beit.embeddings.patch_embeddings.projection.weight",
                    "patch_embed.proj.bias": "beit.embeddings.patch_embeddings.projection.bias",
                    "rel_pos_bias.relative_position_bias_table": "beit.encoder.relative_position_bias.relative_position_bias_table",
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
    save_file({k: v.contiguous().clone() for k, v in to_hugging_face(model.state_dict(), SMALL.depth).items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, report = BeitForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    images, masked = pictures_and_masks()
    hidden = torch.zeros(2, SMALL.grid**2, dtype=torch.bool).scatter_(1, masked, True)
    with torch.no_grad():
        expected = theirs.eval()(images, bool_masked_pos=hidden).logits.gather(1, masked.unsqueeze(-1).expand(-1, -1, V))
        ours = model(images, masked).logits
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_features_equal_timms_beit():
    model = model_with_trained_look()
    theirs = Beit(**timm_arguments(SMALL)).eval()
    theirs.load_state_dict(model.backbone.state_dict())
    images, _ = pictures_and_masks()
    with torch.no_grad():
        assert (model.features(images) - theirs.forward_features(images)).abs().max() <= 1e-5


def test_hidden_patches_are_invisible_and_shown_ones_are_not():
    model = model_with_trained_look()
    images, masked = pictures_and_masks(batch=1)
    changed = images.clone()
    row, column = divmod(int(masked[0, 0]), SMALL.grid)
    changed[:, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] += 1.0
    with torch.no_grad():
        assert torch.equal(model(images, masked).logits, model(changed, masked).logits)
        assert not torch.equal(model.features(images), model.features(changed))


def test_checkpointing_blocks_changes_no_loss_and_no_gradient():
    settings = ModelSettings(image_px=64, patch_px=16, width=96, depth=3, heads=3, drop_path=0.2)
    images, masked = pictures_and_masks()
    targets = torch.randint(V, masked.shape, generator=torch.Generator().manual_seed(2))
    results = []
    for checkpoint_blocks in (False, True):
        torch.manual_seed(0)
        model = MaskedImageModel(settings, V, checkpoint_blocks=checkpoint_blocks).train()
        torch.manual_seed(5)  # stochastic depth draws the same in both
        loss, _ = OBJECTIVES["hard_tokens"](model(images, masked), targets)
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


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


def test_the_objective_is_the_mean_cross_entropy_of_hidden_patches():
    import numpy as np

    generator = np.random.default_rng(0)
    logits, targets = generator.normal(size=(2, 5, 7)), generator.integers(7, size=(2, 5))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, targets[..., None], -1).mean()
    outputs = type("O", (), {"logits": torch.from_numpy(logits)})
    loss, stats = OBJECTIVES["hard_tokens"](outputs, torch.from_numpy(targets))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert stats["accuracy"].item() == pytest.approx((logits.argmax(-1) == targets).mean())
