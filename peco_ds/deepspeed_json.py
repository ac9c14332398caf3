"""Read and check a ds_configs JSON, and fill in the values that the recipe owns.

The JSON owns ZeRO stage, buckets, overlap, offload and communication types. A key that belongs to the recipe has the
value "auto".
"""

from __future__ import annotations

import json
from pathlib import Path

from peco_ds.config import OptimSettings, RunSettings
from peco_ds.durations import micro_steps, settle_micro_batch
from peco_ds.errors import UserError, nearest
from peco_ds.schema import read_json, short
from peco_ds.user_paths import expand_path

DS_CONFIGS = Path(__file__).parent.parent / "ds_configs"

# Top-level keys of deepspeed 0.19.8 (runtime/constants.py and the blocks read in runtime/config.py). DeepSpeed itself
# ignores a misspelt one in silence; test_config.py holds this list against the installed package.
DEEPSPEED_KEYS = frozenset(
    """activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comms_logger communication_data_type comet
    compile csv_monitor data_efficiency data_parallel_size data_types dataloader_drop_last datastates_ckpt
    disable_allgather disable_python_gc dump_state expert_parallel flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine
    log_level managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel tensorboard
    timers torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
    vocabulary_size wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization""".split()
)
# Under zero_optimization; DeepSpeed 0.19.8 raises an exception of its own for them once all ranks are up.
REMOVED_ZERO_KEYS = frozenset("mics_shard_size mics_hierarchical_params_gather zeropp_loco_param".split())
# Types of the values. DeepSpeed reads most of them without a check, and would fail on another type in the middle of a
# run, or never notice it.
_OBJECTS = frozenset(
    """activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger compile csv_monitor
    data_efficiency data_types datastates_ckpt expert_parallel flops_profiler fp16 hybrid_engine optimizer
    pipeline scheduler tensor_parallel tensorboard timers torch_autocast wandb weight_quantization""".split()
)
_BOOLEANS = frozenset(
    """dataloader_drop_last disable_allgather disable_python_gc dump_state memory_breakdown prescale_gradients
    use_data_before_expert_parallelism wall_clock_breakdown zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer""".split()
)
_NUMBERS = frozenset(
    "data_parallel_size gradient_predivide_factor sequence_parallel_size steps_per_print vocabulary_size".split()
)
# These hold a number or "auto".
_OWNED_NUMBERS = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping".split()
)
_NAMES = frozenset("communication_data_type seq_parallel_communication_data_type".split())


def read_deepspeed_json(path: str | Path) -> dict:
    """Read a DeepSpeed JSON.

    Raises: UserError if it is missing, is not JSON, or has a top-level key that DeepSpeed does not know or with a value
        of another type.
    """
    path = expand_path(path)
    if not path.is_file():
        raise UserError(
            f"DeepSpeed config {str(path)!r}: no such file; ready ones lie in ds_configs/ of the repository, "
            "which a package installed without -e does not see: name one with --deepspeed_config FILE"
        )
    try:
        raw = read_json(path)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); a DeepSpeed config is a JSON object") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds {type(raw).__name__}, a DeepSpeed config is a JSON object")
    for key in raw:
        if key not in DEEPSPEED_KEYS:
            raise UserError(f"{path}: {short(key)} is no DeepSpeed key{nearest(key, sorted(DEEPSPEED_KEYS))}")
        wanted = _wanted(key, raw[key])
        if wanted:
            raise UserError(f"{path}: {key} is {short(raw[key])}, DeepSpeed wants {wanted} there")
    zero = raw.get("zero_optimization", {})
    if not isinstance(zero, dict) or type(zero.get("stage", 0)) is not int or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3")
    removed = sorted(REMOVED_ZERO_KEYS & zero.keys())
    if removed:
        raise UserError(
            f"{path}: zero_optimization.{removed[0]}: DeepSpeed has removed it, 0.19.8 no longer trains "
            "with it; take the key out"
        )
    for key in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(key) or {}, dict):
            raise UserError(f"{path}: zero_optimization.{key} is {short(zero[key])}, DeepSpeed wants an object there")
    return raw


def _wanted(key: str, value) -> str:
    """The type that a top-level key should have, if it has another one; else ""."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    kinds = (
        (_OBJECTS, isinstance(value, dict), "an object"),
        (_BOOLEANS, isinstance(value, bool), "true or false"),
        (_NUMBERS, is_number, "a number"),
        (_OWNED_NUMBERS, is_number or value == "auto", 'a number or "auto"'),
        (_NAMES, value is None or isinstance(value, str), "the name of a type"),
    )
    return next((wanted for keys, fits, wanted in kinds if key in keys and not fits), "")


def merge_deepspeed(raw: dict, path: str | Path, run: RunSettings, optim: OptimSettings, world_size: int) -> dict:
    """Fill a DeepSpeed JSON with the values that the recipe owns.

    Args:
        raw: as `read_deepspeed_json` gives it.  world_size: ranks.
    Returns: a complete DeepSpeed config; keys the recipe does not own are passed through untouched.
    Raises: UserError naming both values where the JSON holds a plain value that differs from the recipe's.
    """
    run = settle_micro_batch(run, world_size)
    accumulation = micro_steps(run, world_size)
    # 16-bit gradients are summed in 32 bits unless the JSON says otherwise: DeepSpeed's own default for bf16 is bf16.
    # Without ZeRO it sums them in the weights' type and refuses any other.
    without_zero = raw.get("zero_optimization", {}).get("stage", 0) == 0
    summed_in = {
        "communication_data_type": "fp32",
        "data_types.grad_accum_dtype": run.precision if without_zero else "fp32",
    }
    owned = {
        "train_batch_size": (run.global_batch, "run.global_batch"),
        "train_micro_batch_size_per_gpu": (run.micro_batch, "run.micro_batch"),
        "gradient_accumulation_steps": (accumulation, "run.global_batch / (run.micro_batch x ranks)"),
        "gradient_clipping": (optim.clip_norm, "optim.clip_norm"),
        "bf16.enabled": (run.precision == "bf16", "run.precision"),
        "fp16.enabled": (run.precision == "fp16", "run.precision"),
        "optimizer.params.lr": (optim.lr, "optim.lr"),
        "optimizer.params.betas": (list(optim.betas), "optim.betas"),
        "optimizer.params.eps": (optim.eps, "optim.eps"),
        "optimizer.params.weight_decay": (optim.weight_decay, "optim.weight_decay"),
    }
    merged = json.loads(json.dumps(raw))
    for key, (value, owner) in owned.items():
        *sections, name = key.split(".")
        node = merged
        for section in sections:
            node = node.setdefault(section, {}) if sections[0] != "optimizer" else (node or {}).get(section, {})
            if not isinstance(node, dict):
                raise UserError(f"{path}: {'.'.join(sections)} is {node!r}, DeepSpeed wants an object there")
        found = node.get(name, "auto")
        if found != "auto" and found != value:
            raise UserError(
                f'{path} says {key} = {found!r} but the recipe says {owner} = {value!r}; write "auto" in the '
                "JSON or change one of them"
            )
        if sections[:1] != ["optimizer"]:
            node[name] = value
    kind = (merged.get("optimizer") or {}).get("type", "AdamW")
    if kind not in ("auto", "Adam", "AdamW"):
        raise UserError(
            f"{path}: optimizer.type = {kind!r}, but runs are trained with AdamW; remove the block "
            "(optim.* of the recipe owns it)"
        )
    if merged.get("scheduler"):
        raise UserError(
            f"{path}: 'scheduler' belongs to the recipe (schedule.*), which sets the rate of every step; "
            "remove it from the JSON"
        )
    # Compared above. The optimiser is built from the recipe, because it needs parameter groups.
    merged.pop("optimizer", None)
    for key, dtype in summed_in.items():
        *sections, name = key.split(".")
        node = merged
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"{path}: {section} is {node!r}, DeepSpeed wants an object there")
        if node.get(name, "auto") == "auto":
            node[name] = dtype
    if without_zero and merged["data_types"]["grad_accum_dtype"] != run.precision:
        raise UserError(
            f"{path}: data_types.grad_accum_dtype = {merged['data_types']['grad_accum_dtype']!r} with "
            f"ZeRO stage 0 and run.precision {run.precision}: "
            f'DeepSpeed sums gradients in the weights\' type there; write "auto", or take stage 1, 2 or 3'
        )
    return merged
