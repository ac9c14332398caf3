"""Keep a moving average of the weights, sharded like the fp32 master weights: no rank ever holds it whole.

DeepSpeed's optimisers keep those masters in lists of their own; this file is the one place that knows which.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed import comm as dist
from torch import nn

from peco_ds.errors import UserError


class WeightEma:
    """average = d * average + (1 - d) * weights, after every optimiser step t, with d = min(decay, (1 + t) / (10 + t)).

    The ramp lets a short run forget its initial weights: at a plain 0.9998, two thirds of them would still be in the
    average after 2,000 steps.

    Memory: 4 bytes a parameter over all ranks together (under ZeRO-0 on each rank).

    Args:
        engine: DeepSpeed engine; the average starts at its weights.  decay: in (0, 1).
    Source: timm's ModelEmaV3 with warm-up, after TensorFlow's ExponentialMovingAverage.
    Raises: UserError if the masters are not in memory (ZeRO-Infinity keeps them on NVMe).
    """

    def __init__(self, engine, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self.shards = [master.detach().clone() for master in local_masters(engine)]
        if any(not shard.numel() for shard in self.shards):
            raise UserError(
                "ema.decay: the DeepSpeed config keeps the optimiser's weights on NVMe, where they cannot be "
                "averaged; set ema.decay=0 or offload to cpu"
            )

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step number `step` (from 1)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shards, [master.detach() for master in local_masters(self._engine)], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The engine computes with the average inside; afterwards its weights are back, bit for bit. Collective.

        Not put back when something raises inside: the other ranks would not be there to gather, and the run ends
        anyway.
        """
        self._swap()
        yield
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for shard, master in zip(self.shards, local_masters(self._engine)):
            weights = master.detach().clone()
            master.data.copy_(shard)
            shard.copy_(weights)
        refresh_weights(self._engine)

    def state(self) -> dict:
        """What a checkpoint keeps of this rank's part.

        Under ZeRO-0 with the parameters' names and shapes, which no other file of the checkpoint tells.
        """
        return {"shards": self.shards, "names": _names_of_whole_masters(self._engine)}

    @torch.no_grad()
    def load(self, state: dict) -> None:
        for shard, saved in zip(self.shards, state["shards"], strict=True):
            shard.copy_(saved)


def local_masters(engine) -> list[torch.Tensor]:
    """The fp32 weights that this rank's optimiser steps on: flat partitions under ZeRO, whole parameters or flat groups
    without.
    """
    optimizer = engine.optimizer
    for name in (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
        "fp32_groups_flat",
    ):
        # In this order: ZeRO-3; ZeRO-1 and 2; ZeRO-1 in bf16; without ZeRO in 16 bit with a fused optimiser.
        if getattr(optimizer, name, None):
            return getattr(optimizer, name)
    # Without ZeRO in 16 bit.
    if hasattr(optimizer, "fp32_groups"):
        return [master for group in optimizer.fp32_groups for master in group]
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def clear_padding(engine, shards: list[torch.Tensor]) -> None:
    """Set to 0 what ZeRO-3 appends to a weight whose values do not divide by the ranks.

    DeepSpeed takes that memory as it finds it and never writes it. It is no weight, but what lies there may be NaN, and
    two checkpoints of equal weights would differ in it.

    Args:
        shards: laid out as `local_masters` are; changed in place. An empty one (its weights are on NVMe) stays.
    """
    if not hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        return
    for shard, parameters in zip(shards, engine.optimizer.fp16_groups, strict=True):
        start = 0
        for parameter in parameters if shard.numel() else ():
            held = parameter.partition_numel()
            before = held * dist.get_rank(group=parameter.ds_process_group)
            real = min(held, max(0, parameter.ds_numel - before))
            shard[start + real : start + held] = 0
            start += held


@torch.no_grad()
def refresh_weights(engine) -> None:
    """Bring changed masters into the weights that the model computes with. Collective."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        # As ZeRO-3's own step does: otherwise a gathered copy would keep the old weights.
        optimizer._partition_all_parameters()
        for sub_group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        # ZeRO-3 keeps small parameters whole on every rank.
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp16_groups"):
        for master, parameters in zip(local_masters(engine), _parameters_of_whole_masters(engine)):
            for parameter, part in zip(
                parameters, master.flatten().split([parameter.numel() for parameter in parameters])
            ):
                parameter.copy_(part.view_as(parameter))


def _parameters_of_whole_masters(engine) -> list[list[nn.Parameter]]:
    """Without ZeRO: the model's parameters behind each of `local_masters`."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups_flat"):
        return [list(group) for group in optimizer.fp16_groups]
    groups = (
        optimizer.fp16_groups
        if hasattr(optimizer, "fp16_groups")
        else [group["params"] for group in optimizer.param_groups]
    )
    return [[parameter] for group in groups for parameter in group]


def _names_of_whole_masters(engine) -> list[list[list]] | None:
    """[name, shape] of every parameter behind each master; None under ZeRO, whose checkpoints say it themselves."""
    if engine.zero_optimization_stage() or hasattr(engine.optimizer, "fp32_groups_flat_partition"):
        return None
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return [
        [[names[parameter], list(parameter.shape)] for parameter in parameters]
        for parameters in _parameters_of_whole_masters(engine)
    ]
