"""Which form of attention a run computes with: what the recipe says, or the fastest on this GPU, the same on all ranks.

The fastest is timed once, at the run's first start. Later starts take the form that the run folder records, because
another one would round otherwise, and a resumed run would not be bit for bit what it would have been.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import get_args

import torch
from torch import nn

from peco_ds.config import AttentionForm, ModelSettings, RunSettings, TrainingRecipe
from peco_ds.field_marks import AbsentMeans, keys_with
from peco_ds.models.attention import attend, form_fault
from peco_ds.models.attention_unfused import padded
from peco_ds.models.vit import TransformerBlock
from peco_ds.runtime.distributed import World

logger = logging.getLogger("peco_ds")

# Images that are timed, at most, and passes before and while it is timed.
IMAGES, WARM_UP, PASSES = 64, 3, 10
# Of a GPU's memory: the most that weights kept by the unfused form may take for auto to choose it.
KEPT_SHARE = 0.1
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# form -> seconds of a forward and backward pass on this rank's GPU
Measure = Callable[[AttentionForm], float]


def settle_attention(
    model: nn.Module, recipe: TrainingRecipe, world: World, *, resumes: bool, recorded: str | None
) -> dict[str, str]:
    """Give every transformer block of the model its form of attention. Collective.

    Args:
        resumes: whether a run is continued.
        recorded: the form that its folder tells; None: it began before there was a choice, or is new.
    Returns: what the run folder is to record; {} where there is nothing to choose: no blocks, or a CPU.
    Raises: UserError if the recipe asks for a form that a rank cannot take.
    """
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    settings = getattr(recipe, "model", None)
    if not blocks or not isinstance(settings, ModelSettings):
        return {}
    form = settings.attention
    if form == "auto":
        before = recorded or (before_there_was_a_choice(recipe) if resumes else None)
        form = _chosen(before, settings, recipe.run, world)
    else:
        fault = form_fault(form, world.device)
        world.agree(fault and f"model.attention {form}: {fault}; set model.attention=auto")
    for block in blocks:
        block.attention_form = form
    return {"attention": form} if world.device.type == "cuda" else {}


def before_there_was_a_choice(recipe: TrainingRecipe) -> str | None:
    """The form of runs from before `model.attention` existed; None for stages that have no such runs."""
    mark = keys_with(type(recipe), AbsentMeans).get("model.attention")
    return mark.value if mark else None


def _chosen(before: str | None, settings: ModelSettings, run: RunSettings, world: World) -> AttentionForm:
    """What auto means here. Collective."""
    if world.device.type != "cuda":
        return "efficient"
    usable = _usable(settings, run, world)
    # One rank's view of a shared folder may lag behind.
    before = world.gather_objects(before)[0]
    for form in usable:
        if form == before:
            logger.info("attention: %s, as this run began (model.attention auto)", form)
            return form
    if before:
        logger.warning("attention: this run began with %s, which this machine does not take; chosen anew", before)
    return fastest(usable, lambda form: measure(form, settings, run, world.device), world)


def _usable(settings: ModelSettings, run: RunSettings, world: World) -> list[AttentionForm]:
    """Forms that every rank's device can take, in this order. Collective."""
    mine = [form for form in get_args(AttentionForm) if form != "auto" and not form_fault(form, world.device)]
    memory = torch.cuda.get_device_properties(world.device).total_memory
    if kept_bytes(settings, run) > KEPT_SHARE * memory:
        mine.remove("unfused")
    others = world.gather_objects(mine)
    return [form for form in mine if all(form in forms for forms in others)]


def kept_bytes(settings: ModelSettings, run: RunSettings) -> int:
    """Of the weights that the unfused form keeps for the backward pass, on a rank."""
    layers = 1 if run.activation_checkpointing == "full" else settings.depth
    size = padded(settings.grid**2 + 1)
    return run.micro_batch * layers * settings.heads * size**2 * DTYPES[run.precision].itemsize


def fastest(forms: list[AttentionForm], measure: Measure, world: World) -> AttentionForm:
    """The form whose slowest rank is the fastest; one that fails on a rank is out of the question. Collective."""
    mine = {form: _seconds_or_failure(form, measure) for form in forms}
    slowest = {form: max(of_rank[form] for of_rank in world.gather_objects(mine)) for form in forms}
    best = min(forms, key=slowest.__getitem__)
    logger.info(
        "attention: %s (model.attention auto); ms a layer, forward and backward: %s",
        best,
        ", ".join(f"{form} {1e3 * seconds:.2f}" for form, seconds in slowest.items()),
    )
    return best


def _seconds_or_failure(form: AttentionForm, measure: Measure) -> float:
    try:
        return measure(form)
    # Compilers raise errors of many types. A form that does not run here must not end a run that has others.
    except Exception as error:
        logger.warning("attention: %s does not run here: %s", form, " ".join(str(error).split())[:300])
        return math.inf


def measure(form: AttentionForm, settings: ModelSettings, run: RunSettings, device: torch.device) -> float:
    """Seconds of a layer's attention, forward and backward, for the images of a pass, or the first IMAGES of them."""
    images, tokens, heads = min(run.micro_batch, IMAGES), settings.grid**2 + 1, settings.heads
    # A generator of its own: the run's random numbers are as without this.
    drawn = torch.randn(
        (images, tokens, 3, heads, settings.width // heads),
        generator=torch.Generator(device).manual_seed(0),
        device=device,
    )
    qkv = drawn.to(DTYPES[run.precision]).requires_grad_()
    bias = torch.zeros(heads, tokens, tokens, device=device, requires_grad=True)
    grad = torch.ones(images, tokens, settings.width, dtype=qkv.dtype, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number in range(WARM_UP + PASSES):
        if number == WARM_UP:
            start.record()
        torch.autograd.grad(attend(qkv, bias, form), (qkv, bias), grad)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / PASSES / 1e3
