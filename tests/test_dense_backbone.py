from dataclasses import replace

import pytest
import torch
from beit_samples import SMALL, sample
from timm.models.beit import gen_relative_position_index

from peco_ds.config import ClassifierSettings
from peco_ds.convert.initialize import start_backbone, start_classifier
from peco_ds.convert.resample import resize_bias_table
from peco_ds.errors import UserError
from peco_ds.models.beit_weights import TABLE
from peco_ds.models.classifier import build_classifier
from peco_ds.models.dense_backbone import build_dense_backbone, position_index
from peco_ds.models.pyramids import FourBranches
from peco_ds.models.sync_norm import SyncBatchNorm
from peco_ds.models.vit import patches_of, with_class_token


def started(weights, image_px=64, **arguments):
    settings = replace(weights.model, image_px=image_px)
    backbone = build_dense_backbone(settings, (0, 2), **arguments)
    start_backbone(backbone, weights, settings)
    return backbone.eval()


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_on_a_square_the_index_is_the_released_codes():
    assert torch.equal(position_index(5, 5, 5), gen_relative_position_index((5, 5)))


def test_an_oblong_image_takes_the_rows_of_its_own_distances():
    inside = gen_relative_position_index((5, 5))
    # Patches of the left three columns of the upper two rows; the class token first.
    kept = [0, *(1 + 5 * row + column for row in range(2) for column in range(3))]
    assert torch.equal(position_index(2, 3, 5), inside[kept][:, kept])


def test_a_side_beyond_the_table_is_refused():
    with pytest.raises(UserError, match="3 x 6 patches: the position tables are for at most 5"):
        position_index(3, 6, 5)


@pytest.mark.parametrize("kind", ["mim", "classifier"])
def test_maps_are_the_residual_stream_of_a_classifier_of_the_same_weights(kind):
    weights, image = sample(kind), images(2, 3, 64, 64)
    classifier = build_classifier(weights.model, ClassifierSettings(), 7).eval()
    start_classifier(classifier, weights, weights.model, classes=tuple("abcdefg"), head="new")
    expected = []
    with torch.no_grad():
        tokens = with_class_token(classifier, patches_of(classifier, image))
        for block in classifier.blocks:
            tokens = block(tokens)
            expected.append(tokens[:, 1:].transpose(1, 2).reshape(2, 96, 4, 4))
        maps = started(weights)(image)
    torch.testing.assert_close(maps, [expected[0], expected[2]], rtol=0, atol=1e-5)


def test_tables_of_another_grid_are_resized_as_everywhere():
    weights = sample("classifier")
    backbone = started(weights, image_px=128)
    table = backbone.blocks[1].attn.relative_position_bias_table
    torch.testing.assert_close(table, resize_bias_table(weights.tensors[TABLE.format(1)], 8))


def test_a_part_of_the_tables_square_is_seen_as_with_a_table_of_its_own_size():
    weights = sample("classifier")
    large = started(weights, image_px=64, table_grid=8)
    # The middle of the large table is the table of the small grid.
    small = build_dense_backbone(weights.model, (0, 2)).eval()
    state = large.state_dict()
    rows = torch.arange(15)[4:11]
    inner = (rows[:, None] * 15 + rows[None]).flatten()
    for block in range(3):
        name = TABLE.format(block)
        state[name] = torch.cat([state[name][inner], state[name][-3:]])
    small.load_state_dict(state)
    with torch.no_grad():
        for one, other in zip(large(images(1, 3, 64, 64)), small(images(1, 3, 64, 64))):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        assert [tuple(found.shape) for found in large(images(1, 3, 32, 112))] == [(1, 96, 2, 7)] * 2


def test_an_oblong_image_takes_the_absolute_places_of_its_own_patches():
    weights = sample("classifier", replace(SMALL, absolute_positions=True))
    weights.tensors["pos_embed"] = images(1, 1 + SMALL.grid**2, SMALL.width)
    backbone, image = started(weights, image_px=128), images(1, 3, 48, 96)
    # the same places on a grid of its own
    places = backbone.pos_embed[:, 1:].unflatten(1, (8, 8))[:, :3, :6].flatten(1, 2)
    tokens = with_class_token(backbone, patches_of(backbone, image), torch.cat([backbone.pos_embed[:, :1], places], 1))
    with torch.no_grad():
        for block in backbone.blocks:
            tokens = block(tokens, backbone.position_index(3, 6))
        last = backbone(image)[-1]
        torch.testing.assert_close(last, tokens[:, 1:].transpose(1, 2).reshape(1, 96, 3, 6), rtol=0, atol=1e-5)
        backbone.pos_embed[:, 1 + 7] += 1
        moved = (backbone(image)[-1] - last).abs().amax()
    # the eighth patch of the first row lies beyond six columns
    assert moved == 0


def test_weights_of_another_patch_size_are_refused():
    weights = sample("classifier")
    with pytest.raises(UserError, match="patch_px 16, but the recipe's model has patch_px 8"):
        start_backbone(build_dense_backbone(replace(SMALL, patch_px=8), (0, 2)), weights, replace(SMALL, patch_px=8))


def test_gradients_reach_every_parameter_with_blocks_computed_again():
    weights = sample("classifier")
    found = []
    for activation_checkpointing in ("none", "full"):
        backbone = started(weights, activation_checkpointing=activation_checkpointing).train()
        sum(map(torch.sum, backbone(images(2, 3, 48, 64)))).backward()
        found.append({name: parameter.grad for name, parameter in backbone.named_parameters()})
    assert all(grad is not None for grad in found[0].values())
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-5, atol=1e-5)


def test_four_branches_have_strides_4_to_32():
    branches = FourBranches(8, SyncBatchNorm)
    maps = branches([images(2, 8, 6, 4)] * 4)
    assert [tuple(found.shape[2:]) for found in maps] == [(24, 16), (12, 8), (6, 4), (3, 2)]
    assert set(branches.state_dict()) >= {"fpn1.0.weight", "fpn1.1.running_mean", "fpn1.3.bias", "fpn2.0.weight"}
