import logging
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch

from peco_ds.config import TokenizerRecipe
from peco_ds.errors import UserError
from peco_ds.models.frozen_net import load_frozen_net
from peco_ds.recipe_files import load_recipe
from peco_ds.runtime.frozen_passes import compile_frozen

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


# --------------------------------------------------------------------------------------------- compiled


def of_recipe(recipe, *overrides):
    found = load_recipe(TokenizerRecipe, recipe, ["run.micro_batch=4", "run.global_batch=8", *overrides], environ={})
    return load_frozen_net(found.recipe), found.recipe


@pytest.fixture
def quick_compiler(monkeypatch):
    """torch's compiler up to the kernels, which take it long."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    return torch._dynamo.utils.counters["stats"]


@pytest.mark.slow
def test_a_compiled_judge_judges_alike_and_compiles_for_no_other_number_of_images(vit_file, quick_compiler):
    judge, recipe = of_recipe(
        "peco_tokenizer", f"perceptual.weights={vit_file}", "perceptual.blocks=[1,2]", "run.compile=blocks"
    )
    images = torch.rand(4, 3, 32, 32, requires_grad=True)

    def judged(images):
        found = judge.features(images, recipe.perceptual.blocks)
        return [*found, *torch.autograd.grad(sum(one.square().mean() for one in found), images)]

    plain = judged(images)
    recipe = replace(recipe, views=replace(recipe.views, tokenizer_px=32))
    compile_frozen(judge, recipe, torch.device("cpu"))
    graphs = quick_compiler["unique_graphs"]
    assert graphs >= 2, "with and without a gradient"
    for ours, theirs in zip(judged(images), plain):
        torch.testing.assert_close(ours, theirs)
    judged(torch.rand(3, 3, 32, 32, requires_grad=True))
    assert quick_compiler["unique_graphs"] == graphs


def test_a_compiled_teacher_teaches_alike(vit_file, quick_compiler):
    teacher, recipe = of_recipe("beitv2_tokenizer", f"teacher.weights={vit_file}", *SMALL, "run.compile=blocks")
    images = torch.rand(4, 3, 32, 32)
    plain = teacher.targets(images)
    compile_frozen(teacher, recipe, torch.device("cpu"))
    assert quick_compiler["unique_graphs"] >= 1
    torch.testing.assert_close(teacher.targets(images), plain)


def test_a_network_that_does_not_compile_stays_as_it_is_and_is_named(vit_file, monkeypatch, caplog):
    teacher, recipe = of_recipe("beitv2_tokenizer", f"teacher.weights={vit_file}", *SMALL, "run.compile=blocks")
    images = torch.rand(4, 3, 32, 32)
    plain = teacher.targets(images)

    def failing(*_arguments, **_options):
        def called(*_arguments):
            raise RuntimeError("no kernel for this")

        return called

    monkeypatch.setattr(torch, "compile", failing)
    logger = logging.getLogger("peco_ds")
    logger.addHandler(caplog.handler)
    compile_frozen(teacher, recipe, torch.device("cpu"))
    logger.removeHandler(caplog.handler)
    assert f"{teacher.description} stays uncompiled: no kernel for this" in caplog.text
    assert torch.equal(teacher.targets(images), plain)


def test_on_a_cpu_nothing_is_compiled_unless_it_is_asked_for(vit_file, monkeypatch):
    teacher, recipe = of_recipe("beitv2_tokenizer", f"teacher.weights={vit_file}", *SMALL)
    monkeypatch.setattr(torch, "compile", lambda *_arguments, **_options: pytest.fail("compiled"))
    compile_frozen(teacher, recipe, torch.device("cpu"))
    compile_frozen(None, recipe, torch.device("cpu"))
    teacher.targets(torch.rand(4, 3, 32, 32))
