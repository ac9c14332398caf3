import pytest
import timm
import torch

from peco_ds.config import TokenizerRecipe
from peco_ds.errors import UserError
from peco_ds.models.frozen_net import load_frozen_net
from peco_ds.recipe_files import load_recipe

SMALL = [
    "tokenizer.vit.image_px=32",
    "tokenizer.vit.patch_px=8",
    "tokenizer.vit.target_width=192",
    "views.tokenizer_px=32",
]


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory):
    torch.manual_seed(1)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=0)
    path = tmp_path_factory.mktemp("teacher") / "vit_tiny.pth"
    torch.save({"model": net.state_dict()}, path)
    return path


def frozen(recipe, *overrides):
    return load_frozen_net(load_recipe(TokenizerRecipe, recipe, list(overrides), environ={}).recipe)


def test_a_teacher_that_fits_gives_features_of_the_promised_width_and_grid(vit_file):
    teacher = frozen("beitv2_tokenizer", f"teacher.weights={vit_file}", *SMALL)
    assert teacher.targets(torch.rand(2, 3, 32, 32)).shape == (2, 16, 192)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_judge_is_asked_for_its_blocks_and_may_be_left_out(vit_file):
    assert frozen("peco_tokenizer", "perceptual.weight=0") is None
    assert frozen("peco_tokenizer", f"perceptual.weights={vit_file}", "perceptual.blocks=[1,2]").depth == 2
    with pytest.raises(UserError, match="has blocks 1 to 2"):
        frozen("peco_tokenizer", f"perceptual.weights={vit_file}")


BAD = [
    (
        ["tokenizer.vit.target_width=512"],
        "tokenizer.vit.target_width 512: the teacher ViT 192 .* gives features of width 192; set it to 192",
    ),
    (
        ["tokenizer.vit.patch_px=16"],
        "a grid of 4 x 4 features, the tokenizer one of 2 x 2 codes; set teacher.image_px=16$",
    ),
    (
        ["teacher.image_px=64"],
        "teacher.image_px 64: .* a grid of 8 x 8 features, .* 4 x 4 codes; set teacher.image_px=32$",
    ),
    (["teacher.image_px=33"], "teacher.image_px 33 is not a multiple"),
    (["teacher.weights=nowhere.pth"], "nowhere.pth: no such file"),
]


@pytest.mark.parametrize("overrides, said", BAD, ids=[said for _, said in BAD])
def test_a_teacher_that_does_not_fit_is_refused_in_one_line(vit_file, overrides, said):
    with pytest.raises(UserError, match=said) as refused:
        frozen("beitv2_tokenizer", f"teacher.weights={vit_file}", *SMALL, *overrides)
    assert "\n" not in str(refused.value)


def test_the_remedy_for_a_grid_that_does_not_fit_works(vit_file):
    assert (
        frozen(
            "beitv2_tokenizer",
            f"teacher.weights={vit_file}",
            *SMALL,
            "tokenizer.vit.patch_px=16",
            "teacher.image_px=16",
        ).grid
        == 2
    )


def test_a_dry_run_refuses_a_teacher_that_does_not_fit_and_fetches_none(vit_file, capsys):
    from peco_ds import train_tokenizer

    start = ["--recipe", "beitv2_tokenizer", "--dry_run", "data.root=/nowhere"]
    assert train_tokenizer.main([*start, "teacher.weights=/nowhere/ViT-B-16.pt"]) == 0
    assert "not there yet (/nowhere/ViT-B-16.pt)" in capsys.readouterr().out
    with pytest.raises(UserError, match="tokenizer.vit.target_width 512"):
        train_tokenizer.main([*start, f"teacher.weights={vit_file}"])
