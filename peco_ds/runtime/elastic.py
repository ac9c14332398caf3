"""Continue a checkpoint with another number of ranks or under another ZeRO stage, through DeepSpeed's universal
checkpoints.

The one place that knows what DeepSpeed's universal path (0.19.8) does not do by itself:
- ZeRO-3 gives every parameter group the rate and weight decay of the first one, and all groups one Adam step counter, a
single tensor that then
  advances once a group: `_own_settings_and_steps`.
- Each stage reads only what its own kind was converted to: tensors bare or in a dict, the step beside each parameter or
among the optimiser's global
  state, files by other names: `_serve_every_stage`.
- Buffers (a codebook and its averages) are not loaded at all: `_load_buffers`.
- It knows nothing of moving averages: `_load_average`.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_set_full_fp32_param
from safetensors import safe_open
from safetensors.torch import save_file

from peco_ds.errors import UserError, describe_os_error
from peco_ds.runtime.checkpoint.consolidate import fp32_weights, has_ema
from peco_ds.runtime.checkpoint.files import MANIFEST, UNIVERSAL, Progress
from peco_ds.runtime.checkpoint.pickles import load_known, refuse_foreign_classes
from peco_ds.runtime.distributed import World
from peco_ds.runtime.ema import WeightEma, local_masters
from peco_ds.schema import sha256_of_file, write_json

logger = logging.getLogger("peco_ds")

AVERAGE = "ema.safetensors"
# written last: sha256 of the source's manifest
COMPLETE = "converted_from.json"
OPTIMIZER_STATE = Path("zero", "optimizer_state.pt")
# threads that convert; each holds one rank's part of the source at a time
WORKERS = 8


def load_elastic(engine, folder: Path, saved: Progress, world: World, ema: WeightEma | None) -> None:
    """Load a verified checkpoint into an engine of another size or ZeRO stage. Collective.

    The converted copy is kept beside the checkpoints until they are gone, so that further starts find it.

    Args:
        folder: the checkpoint.  saved: its progress.  ema: loaded along.
    Raises: UserError if one of the two is without ZeRO: DeepSpeed's universal format has no way there.
    """
    stage = engine.zero_optimization_stage()
    if 0 in (stage, saved.zero_stage):
        raise UserError(
            f"{folder.name} was written under ZeRO-{saved.zero_stage}, this run has ZeRO-{stage}: "
            "DeepSpeed converts between stages 1, 2 and 3 only; "
            "continue with the stage of the checkpoint, or start a new --out"
        )
    universal = folder.parent / UNIVERSAL / folder.name
    fault = ""
    if world.is_main:
        try:
            _convert(folder, universal)
            refuse_foreign_classes(universal)
        except UserError as error:
            fault = str(error)
        except OSError as error:
            fault = f"{describe_os_error(error)}; the universal copy of {folder.name} cannot be written there"
    world.agree(fault)

    own = [{key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups]
    _load_average(engine, ema, universal)
    # what "checkpoint": {"load_universal": true} sets
    engine._config.load_universal_checkpoint = True
    try:
        loaded, _ = engine.load_checkpoint(str(universal.parent), tag=universal.name)
    finally:
        engine._config.load_universal_checkpoint = False
    assert loaded is not None, f"DeepSpeed found nothing in {universal}"
    _own_settings_and_steps(engine, own, universal)
    _load_buffers(engine, universal)


def _convert(folder: Path, universal: Path) -> None:
    """Make the universal copy, whole or not at all.

    Memory: one rank's part of the source for each worker, plus the average.
    """
    source = sha256_of_file(folder / MANIFEST)
    if (universal / COMPLETE).is_file() and source in (universal / COMPLETE).read_text():
        return
    logger.info("converting %s to DeepSpeed's universal format, once", folder.name)
    shutil.rmtree(universal, ignore_errors=True)
    temporary = universal.with_name(f".tmp-{universal.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    arguments = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(temporary),
        num_extract_workers=WORKERS,
        num_merge_workers=WORKERS,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    # Threads in place of its processes: the fork of a process that has computed with OpenMP was seen to hang for ever.
    # What takes the time is many small files.
    ds_to_universal.ProcessPoolExecutor = ThreadPoolExecutor
    # its steps and progress bars are no news to whoever trains
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
    _serve_every_stage(folder, temporary)
    if has_ema(folder):
        save_file(
            {name: tensor.contiguous() for name, tensor in fp32_weights(folder, average=True).items()},
            temporary / AVERAGE,
        )
    for path in filter(Path.is_file, temporary.rglob("*")):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    write_json(temporary / COMPLETE, {"manifest_sha256": source})
    os.rename(temporary, universal)


def _serve_every_stage(folder: Path, universal: Path) -> None:
    """Optimiser state and file names as ZeRO-1, 2 and 3 each look for them."""
    first = sorted(folder.glob("*_optim_states.pt"))[0]
    state = load_known(first, mmap=True)["optimizer_state_dict"]
    base = state.get("optimizer_state_dict") or state["base_optimizer_state"]  # ZeRO-3; the others
    step = base["state"][0].get("step")
    merged = load_known(universal / OPTIMIZER_STATE)
    kept = {
        key: value
        for key, value in merged.items()
        if not isinstance(value, (torch.Tensor, list)) and key != "optimizer_state_dict"
    }
    kept |= {"ds_version": kept.get("ds_version") or load_known(first, mmap=True)["ds_version"]}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in base["param_groups"]]
    torch.save(
        {
            **kept,
            "param_groups": groups,
            "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups},
        },
        universal / OPTIMIZER_STATE,
    )
    for parameter in filter(Path.is_dir, (universal / "zero").iterdir()):
        for part in parameter.glob("*.pt"):
            content = load_known(part) if part.name != "step.pt" else {}
            if isinstance(content, torch.Tensor):  # ZeRO-3 writes them bare and reads both
                torch.save({"param": content, "cat_dim": 0}, part)
        if step is not None and (parameter / "exp_avg.pt").is_file():
            torch.save(step, parameter / "step.pt")
    names = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    there = next(name for name in names if (universal / name).is_file())
    for name in names:
        if name != there:
            os.link(universal / there, universal / name)


def _own_settings_and_steps(engine, own: list[dict], universal: Path) -> None:
    """Each parameter group its own settings, each part of the optimiser its own step counter."""
    for group, settings in zip(engine.optimizer.param_groups, own, strict=True):
        # some optimisers count there: that is progress, not a setting
        group |= {key: value for key, value in settings.items() if key != "step"}
    step = load_known(universal / OPTIMIZER_STATE)["optimizer_state_dict"]["state"][0]["step"]
    for state in engine.basic_optimizer.state.values():
        if "exp_avg" in state and step is not None:
            state["step"] = step.clone() if isinstance(step, torch.Tensor) else step


def _load_buffers(engine, universal: Path) -> None:
    module = load_known(universal / "mp_rank_00_model_states.pt", mmap=True)["module"]
    with torch.no_grad():
        for name, buffer in engine.module.named_buffers():
            if name in module:
                buffer.copy_(module[name])


@torch.no_grad()
def _load_average(engine, ema: WeightEma | None, universal: Path) -> None:
    """The average takes the masters' place for a moment: DeepSpeed knows which piece of a parameter lies where.

    Before the masters are loaded.
    """
    if ema is None:
        return
    with safe_open(universal / AVERAGE, framework="pt") as file:
        for name, parameter in engine.module.named_parameters():
            safe_set_full_fp32_param(parameter, file.get_tensor(name).to(engine.device))
    ema.load({"shards": [master.detach() for master in local_masters(engine)]})
