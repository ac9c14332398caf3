"""Gather a checkpoint's sharded weights into one set of float32 tensors, for any ZeRO stage and number of ranks."""

from __future__ import annotations

import io
import math
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from deepspeed.utils import zero_to_fp32

from peco_ds.runtime.checkpoint.pickles import load_known, refuse_foreign_classes


def has_ema(checkpoint: Path) -> bool:
    return (checkpoint / ema_name(0)).is_file()


def ema_name(rank: int) -> str:
    return f"ema_rank_{rank:05d}.pt"


def fp32_weights(checkpoint: Path, *, average: bool = False) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a checkpoint in float32, whatever the ZeRO stage and number of ranks that wrote it.

    The ranks' files are mapped, not read: what is held in memory is the result.

    Args:
        checkpoint: a complete checkpoint folder that was verified (`newest_whole`, `verify`).
        average: the moving average of the weights (`has_ema`) instead of the weights.
    """
    # zero_to_fp32 reads some of the files itself.
    refuse_foreign_classes(checkpoint)
    optimizer_files = (
        zero_to_fp32.get_optim_files(str(checkpoint)) if list(checkpoint.glob("*_optim_states.pt")) else []
    )
    averages = [load_known(path, mmap=True) for path in sorted(checkpoint.glob("ema_rank_*.pt"))] if average else []
    if not optimizer_files:
        if average:
            return _unflatten(averages[0])
        # ZeRO-0 writes whole modules and no partitioned optimiser.
        module = load_known(checkpoint / "mp_rank_00_model_states.pt", mmap=True)["module"]
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in module.items()}
    # The entry function of zero_to_fp32 is not used: it refuses ZeRO-1 in bf16, whose `BF16_Optimizer` keeps the same
    # flat partitions but does not write their stage, and it does not know moving averages, which are laid out like the
    # weights.
    partitions = [load_known(path, mmap=True)["optimizer_state_dict"] for path in optimizer_files]
    stage_3 = "fp32_flat_groups" in partitions[0]
    groups = [part["shards"] for part in averages] or [
        part["fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"] for part in partitions
    ]
    # The user who converts does not need its progress bars.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        states = zero_to_fp32.parse_model_states(zero_to_fp32.get_model_state_files(str(checkpoint)))
        if stage_3:
            merged = zero_to_fp32._get_fp32_state_dict_from_zero3_checkpoint(len(groups), groups, states, False)
        else:
            paddings = partitions[0].get("param_alignment_paddings")
            merged = zero_to_fp32._get_fp32_state_dict_from_zero2_checkpoint(
                len(groups), groups, states, False, paddings
            )
        return zero_to_fp32.to_torch_tensor(merged)


def _unflatten(state: dict) -> dict[str, torch.Tensor]:
    """An average that was kept without ZeRO, by name."""
    weights: dict[str, torch.Tensor] = {}
    for shard, parameters in zip(state["shards"], state["names"], strict=True):
        parts = shard.flatten().split([math.prod(shape) for _, shape in parameters])
        weights |= {name: part.view(shape) for (name, shape), part in zip(parameters, parts)}
    return weights
