"""Wrap a model into a DeepSpeed engine, from the recipe and a merged ds_configs JSON; the order of wrapping is here."""

from __future__ import annotations

import logging
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.utils import set_z3_leaf_modules
from pydantic import ValidationError
from torch import nn

from peco_ds.config import OptimSettings, RunSettings, ScheduleSettings
from peco_ds.durations import Durations
from peco_ds.errors import UserError
from peco_ds.runtime.ema import clear_padding, local_masters
from peco_ds.runtime.optim import build_optimizer, decay_groups
from peco_ds.schedules import cosine_with_warmup, drops_with_warmup, linear_with_warmup

logger = logging.getLogger("peco_ds")


def start_engine(
    model: nn.Module,
    ds_config: dict,
    *,
    source: str | Path,
    run: RunSettings,
    optim: OptimSettings,
    leaf_modules: tuple[type[nn.Module], ...] = (),
    lr_scales: dict[str, float] | None = None,
) -> deepspeed.DeepSpeedEngine:
    """Wrap a freshly initialised model.

    The model is built whole on every rank and partitioned here. `zero.Init` is not used: up to 2 B parameters fit, and
    it would lose BEiT's in-place depth scaling without a word.

    Args:
        model: the same weights on every rank.
        ds_config: merged with the recipe (`deepspeed_json.merge_deepspeed`).
        source: its file, for messages.
        leaf_modules: classes that ZeRO-3 gathers as one unit, and torch.compile sees as one where run.compile asks for
            it.
        lr_scales: parameter-name prefix -> factor on the scheduled learning rate.
    Raises: UserError if DeepSpeed refuses the config, or the device the precision.
    """
    if run.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError(
            "run.precision = 'fp16': DeepSpeed does not train in fp16 on "
            f"{get_accelerator().device_name()}; use bf16 or fp32"
        )
    zero = ds_config.get("zero_optimization", {})
    if zero.get("stage", 0) == 3 and leaf_modules:
        set_z3_leaf_modules(model, list(leaf_modules))
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    optimizer = build_optimizer(decay_groups(model, optim.weight_decay, lr_scales), optim, offloaded=offloaded)
    check_deepspeed_config(ds_config, source)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    clear_padding(engine, local_masters(engine))
    if leaf_modules and compiles(run):
        logger.info("transformer blocks are compiled (run.compile %s): the first step takes longer", run.compile)
        compile_each(engine.module, leaf_modules)
    return engine


def compiles(run: RunSettings) -> bool:
    """Whether run.compile means to compile on this machine."""
    return run.compile == "blocks" or (
        run.compile == "auto" and torch.cuda.is_available() and run.layer_norm == "torch"
    )


def compile_each(model: nn.Module, classes: tuple[type[nn.Module], ...]) -> None:
    """Compile the forward pass of every module of these classes, each by itself; they share the graphs.

    ZeRO-3's hooks, which gather and free weights, run around a module's forward pass and so outside of the compiled
    code. A graph break would make it slow silently, so it is an error here.
    """
    # Training, evaluation and subsets of several sizes each need a graph.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in model.modules():
        if isinstance(module, classes):
            # A size other than the first, as a decoder's after an encoder's, would make all sizes symbolic and kernels
            # slower. Only subsets have too many sizes for a graph each.
            dynamic = None if getattr(module, "drop_path_by", "") == "subset" else False
            module.forward = torch.compile(module.forward, fullgraph=True, dynamic=dynamic)


def check_deepspeed_config(ds_config: dict, source: str | Path) -> None:
    """Let DeepSpeed read its config, before anything is built with it.

    Raises: UserError with what DeepSpeed has to say of it.
    """
    try:
        deepspeed.DeepSpeedConfig(ds_config)
    except ValidationError as error:
        # DeepSpeed checks some blocks with pydantic.
        first = error.errors()[0]
        raise UserError(
            f"{source}: {error.title}: {'.'.join(map(str, first['loc']))}: {first['msg']}; DeepSpeed "
            f"{deepspeed.__version__} refuses it"
        ) from None
    except (DeepSpeedConfigError, TypeError, AttributeError, ValueError, KeyError, AssertionError) as error:
        # Other blocks raise errors of any of these types.
        raise UserError(
            f"{source}: DeepSpeed {deepspeed.__version__} refuses it: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None


def set_lr(
    engine: deepspeed.DeepSpeedEngine, optim: OptimSettings, schedule: ScheduleSettings, durations: Durations, step: int
) -> float:
    """Write the learning rate of this step into every parameter group; no DeepSpeed scheduler is configured beside it.

    Returns: the learning rate of groups with scale 1.
    """
    lr = scheduled_lr(optim, schedule, durations, step)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def scheduled_lr(optim: OptimSettings, schedule: ScheduleSettings, durations: Durations, step: int) -> float:
    """The learning rate of groups with scale 1 at a step."""
    spans: dict = dict(peak=optim.lr, warmup_steps=durations.warmup_steps, total_steps=durations.total_steps)
    floor, start = min(schedule.min_lr, optim.lr), schedule.warmup_from
    if schedule.decay == "linear":
        return linear_with_warmup(step, floor=floor, **spans)
    if schedule.decay == "drops":
        return drops_with_warmup(step, drops=schedule.drops, warmup_from=start, **spans)
    return cosine_with_warmup(step, floor=floor, warmup_from=start, **spans)


def grad_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """L2 norm of the last step's gradient before clipping; reads from the device."""
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else float("nan")


def memory_gib(device: torch.device) -> float:
    """Peak bytes of this rank so far, GiB: of the device, or resident memory of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
