"""Which form of attention a run takes: the recipe's, or the fastest, timed once and kept by later starts."""

import logging
from dataclasses import replace

import pytest
import torch

from peco_ds.config import PretrainRecipe, TokenizerRecipe
from peco_ds.errors import UserError
from peco_ds.models.vit import build_backbone
from peco_ds.recipe_files import load_recipe
from peco_ds.runtime import attention_choice
from peco_ds.runtime.attention_choice import fastest, kept_bytes, settle_attention
from peco_ds.runtime.distributed import World

FORMS = ["triton", "unfused", "efficient"]
GPU = World(0, 1, torch.device("cuda"))
CPU = World(0, 1, torch.device("cpu"))


def recipe_with(form: str) -> PretrainRecipe:
    recipe = load_recipe(PretrainRecipe, "peco_vittiny16", [f"model.attention={form}"], environ={}).recipe
    return replace(recipe, model=replace(recipe.model, depth=1, width=32, heads=2))


@pytest.fixture
def gpu(monkeypatch):
    """Forms that the machine takes, and what each would cost; no GPU is asked."""
    seconds = dict(zip(FORMS, (2e-3, 1e-3, 3e-3)))
    monkeypatch.setattr(attention_choice, "_usable", lambda *_: list(seconds))
    monkeypatch.setattr(attention_choice, "form_fault", lambda form, _device: "" if form in seconds else "is not there")
    monkeypatch.setattr(attention_choice, "measure", lambda form, *_: seconds[form])
    return seconds


def settled(form: str, world: World, *, resumes: bool = False, recorded: str | None = None):
    recipe = recipe_with(form)
    model = build_backbone(recipe.model)
    record = settle_attention(model, recipe, world, resumes=resumes, recorded=recorded)
    return model.blocks[0].attention_form, record


def test_auto_takes_the_fastest_on_a_gpu_and_the_run_folder_tells_it(gpu):
    assert settled("auto", GPU) == ("unfused", {"attention": "unfused"})


def test_a_later_start_takes_what_the_run_began_with_though_another_is_faster(gpu):
    assert settled("auto", GPU, resumes=True, recorded="triton")[0] == "triton"


def test_a_run_from_before_there_was_a_choice_goes_on_as_it_began(gpu):
    assert settled("auto", GPU, resumes=True)[0] == "efficient"


def test_a_form_that_this_machine_does_not_take_is_replaced_and_named(gpu, caplog):
    del gpu["triton"]
    with caplog.at_level(logging.WARNING, logger="peco_ds"):
        logging.getLogger("peco_ds").addHandler(caplog.handler)
        assert settled("auto", GPU, resumes=True, recorded="triton")[0] == "unfused"
        logging.getLogger("peco_ds").removeHandler(caplog.handler)
    assert "began with triton" in caplog.text


def test_what_the_recipe_says_is_taken_or_refused_in_one_line(gpu):
    assert settled("efficient", GPU) == ("efficient", {"attention": "efficient"})
    del gpu["triton"]
    with pytest.raises(UserError, match="model.attention triton: is not there; set model.attention=auto"):
        settled("triton", GPU)


def test_a_cpu_has_nothing_to_choose():
    assert settled("auto", CPU) == ("efficient", {})
    assert settled("unfused", CPU) == ("unfused", {})
    with pytest.raises(UserError, match="needs a GPU"):
        settled("triton", CPU)
    assert settle_attention(torch.nn.Linear(1, 1), TokenizerRecipe(), CPU, resumes=False, recorded=None) == {}


def test_the_slowest_rank_decides_and_a_form_that_fails_on_one_is_out():
    def measure(form):
        if form == "triton":
            raise RuntimeError("does not compile")
        return {"unfused": 1.0, "efficient": 2.0}[form]

    class TwoRanks(World):
        def gather_objects(self, value):
            return [value, {"triton": 0.1, "unfused": 3.0, "efficient": 2.5}]

    assert fastest(FORMS, measure, CPU) == "unfused"
    assert fastest(FORMS, measure, TwoRanks(0, 2, torch.device("cpu"))) == "efficient"


def test_the_unfused_form_is_counted_with_all_the_weights_that_it_keeps():
    recipe = load_recipe(PretrainRecipe, "peco_vith14", ["run.micro_batch=128"], environ={}).recipe
    assert kept_bytes(recipe.model, recipe.run) == 128 * 32 * 16 * 264**2 * 2
    assert kept_bytes(recipe.model, replace(recipe.run, activation_checkpointing="full")) == 128 * 16 * 264**2 * 2
