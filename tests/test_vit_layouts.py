import pytest
import timm
import torch
from beit_samples import sample

from peco_ds.convert.release import model_card
from peco_ds.convert.to_timm import to_timm
from peco_ds.errors import UserError
from peco_ds.models.vit_layouts import licence_beside, read_vit_file, terms_beside

TINY = dict(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2)


def test_a_clips_head_is_its_projection_and_a_classifiers_head_is_not(tmp_path):
    """Both are linear layers under one name; CLIP's projection has no bias, so that timm's layer holds zeros."""
    net = timm.create_model("vit_base_patch16_clip_224", num_classes=24, **TINY)
    for bias, expected in ((0.0, (24, 128)), (0.01, None)):
        torch.nn.init.constant_(net.head.bias, bias)
        torch.save(net.state_dict(), tmp_path / "clip.pth")
        found = read_vit_file(tmp_path / "clip.pth").projection
        assert (None if found is None else tuple(found.shape)) == expected


def test_a_name_without_a_place_survives_to_be_refused(tmp_path):
    state = timm.create_model("vit_base_patch16_clip_224", num_classes=0, **TINY).state_dict()
    torch.save(state | {"blocks.0.new_gate": torch.zeros(2)}, tmp_path / "clip.pth")
    assert "blocks.0.new_gate" in read_vit_file(tmp_path / "clip.pth").state


def test_two_tensors_for_one_place_do_not_hide_each_other(tmp_path):
    state = {
        "visual.conv1.weight": torch.ones(64, 3, 8, 8),
        "visual.class_embedding": torch.ones(64),
        "visual.cls_token": torch.zeros(64),
    }
    for written in (state, dict(reversed(state.items()))):
        torch.save(written, tmp_path / "clip.pt")
        assert {"cls_token", "class_embedding"} <= read_vit_file(tmp_path / "clip.pt").state.keys()


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("transformer.resblocks.0.mlp.c_fc.weight", torch.ones(4)),
        ("conv1.weight", torch.ones(4)),
        ("positional_embedding", torch.ones(5)),
    ],
)
def test_a_tensor_of_the_wrong_form_is_named(tmp_path, name, tensor):
    state = {
        "visual.conv1.weight": torch.ones(64, 3, 8, 8),
        "visual.class_embedding": torch.ones(64),
        f"visual.{name}": tensor,
    }
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(UserError, match="of shape .*a ViT's has [234] numbers"):
        read_vit_file(tmp_path / "clip.pt")


def test_a_licence_is_read_from_the_front_matter_of_a_card_alone(tmp_path):
    assert licence_beside(tmp_path) == ""
    cards = {
        "---\nlibrary_name: timm\nlicense: mit\n---\n": "mit",
        "---\ntags:\n- x\nlicense: 'cc-by-nc-4.0'\n---\n# a\n": "cc-by-nc-4.0",
        "---\nlicense: other\n---\n": f"as the README.md of {tmp_path.name} says",
        "---\ntags: x\n---\nlicense: mit\n": "",
        "# a model\nlicense: mit\n": "",
    }
    for text, expected in cards.items():
        (tmp_path / "README.md").write_text(text)
        assert licence_beside(tmp_path) == expected


def test_the_terms_that_bound_a_release_of_ours_are_carried_on_and_no_other_rows_of_its_table(tmp_path):
    facts = {
        "judge's licence": "CC BY-NC 4.0 (MoCo v3's release)",
        "tokenizer's licence of what it started from": "MIT",
        "recipe": "peco",
        "weights": "x | judge's licence | none |",
    }
    weights = sample("classifier", facts=facts)
    (tmp_path / "README.md").write_text(model_card(to_timm(weights), weights))
    carried = licence_beside(tmp_path)
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(
        f"{card}\n| judge's licence of what it started from | Apache-2.0 (DINO's release) |\n"
    )
    assert licence_beside(tmp_path) == carried + "; its judge's licence Apache-2.0 (DINO's release)", (
        "of two judges neither is forgotten"
    )
    assert terms_beside(tmp_path)["judge's licence"] == "CC BY-NC 4.0 (MoCo v3's release); Apache-2.0 (DINO's release)"
    (tmp_path / "README.md").write_text(card)
    assert (
        carried == f"as the README.md of {tmp_path.name} says; its judge's licence CC BY-NC 4.0 (MoCo v3's "
        "release); its tokenizer's licence MIT"
    )
    grandchild = sample("mim", facts={"judge's licence": carried})
    (tmp_path / "README.md").write_text(model_card(to_timm(grandchild), grandchild))
    assert "CC BY-NC 4.0 (MoCo v3's release)" in licence_beside(tmp_path)
    for row in (
        "| judge's licence | a\x1b[2Jb |",
        "| judge's licence |  |",
        "judge's licence | MIT |",
        "| judge's licence | " + "x" * 3000 + " |",
    ):
        (tmp_path / "README.md").write_text(f"---\nlicense: mit\n---\n{row}\n")
        assert licence_beside(tmp_path) == "mit"
    (tmp_path / "README.md").write_text("# no front matter\n| judge's licence | MIT |\n")
    assert licence_beside(tmp_path) == ""
