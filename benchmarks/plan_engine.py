"""The planner's figures beside what torch and DeepSpeed count: FLOPs, bytes of state a rank, traffic of an optimiser
step.

    python benchmarks/plan_engine.py [--ranks 1 2 4] [--only flops state traffic] [--gpu] [--record FILE.md]

FLOPs: torch's counter on the pre-training model, at a toy size and at full width with few blocks. State and traffic:
one launch for each number of ranks, in which real models of a small width train three optimiser steps through DeepSpeed
under the files of ds_configs and changes of them, buckets scaled down so that there are many. Traffic is what
DeepSpeed's own comms logger says of the third step; state is every storage that Python knows of (--gpu: what the
device's allocator holds) at the end of a forward and of a backward pass. Counts and bytes are those of any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from record import at_least, require_gpu

from peco_ds.command_line import Parser, run
from peco_ds.config import FinetuneRecipe, PretrainRecipe
from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.errors import UserError
from peco_ds.planner.memory import GpuMemory, gpu_memory, saved_bytes
from peco_ds.planner.shapes import FLOPS_PER_MAC, mim_macs
from peco_ds.planner.traffic import Collective, TrainedTensor, step_collectives
from peco_ds.planner.work import Segment, finetune_segments, pretrain_segments
from peco_ds.recipe_files import load_recipe

PARTS = ("flops", "state", "traffic")
# optimiser steps: in the first one ZeRO-3 records its order, in the second it first follows it
WARM_UP = 2


# ----------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One engine. `changed`: a key without a dot stands under zero_optimization."""

    name: str
    file: str
    changed: dict = field(default_factory=dict)
    micro_steps: int = 1
    precision: str = "bf16"
    model: str = "mim"  # a key of MODELS
    weighed: bool = False  # its state too, which takes longer


MODELS = {
    "mim": (
        "peco_vittiny16",
        "model.depth=6 model.width=64 model.heads=4 model.image_px=64 views.tokenizer_px=64 "
        "mask.count=6 mask.min_block=2 objective.num_codes=256",
    ),
    "classifier": (
        "finetune_vittiny16",
        "model.depth=4 model.width=64 model.heads=4 model.image_px=64 augment.mixup=0",
    ),
    # For bytes of state: wider, so that paddings and scalars are as small beside the rest as in a real model.
    "wide mim": (
        "peco_vittiny16",
        "model.depth=12 model.width=192 model.heads=3 model.image_px=64 views.tokenizer_px=64 "
        "mask.count=6 mask.min_block=2 objective.num_codes=256",
    ),
}
NUM_CLASSES = 10

# Scaled down as the models are: a bucket holds one to two blocks, as ds_configs have it for ViT-H.
FLAT = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
SCATTERED = {"reduce_bucket_size": 60_000, "stage3_prefetch_bucket_size": 60_000}
BF16_SUMS = {"data_types.grad_accum_dtype": "bf16"}

TRAFFIC = (
    Case("zero0", "zero0.json"),
    Case("zero0, 3 micro-steps", "zero0.json", micro_steps=3),
    Case("zero0, fp32", "zero0.json", precision="fp32"),
    Case("zero1", "zero1.json", FLAT),
    Case("zero1, 3 micro-steps", "zero1.json", FLAT, micro_steps=3),
    Case("zero1, summed in bf16", "zero1.json", FLAT | BF16_SUMS, micro_steps=3),
    Case("zero1, summed in bf16, no overlap", "zero1.json", FLAT | BF16_SUMS | {"overlap_comm": False}),
    Case("zero1, fp32", "zero1.json", FLAT, precision="fp32"),
    Case("zero1, classifier", "zero1.json", FLAT, model="classifier"),
    Case("zero2", "zero2.json", FLAT),
    Case("zero2, 3 micro-steps", "zero2.json", FLAT, micro_steps=3),
    Case("zero2, no overlap", "zero2.json", FLAT | {"overlap_comm": False}),
    Case("zero2, reduce_scatter false", "zero2.json", FLAT | {"reduce_scatter": False}),
    Case("zero2, reduced to owners", "zero2.json", FLAT | {"use_multi_rank_bucket_allreduce": False}),
    Case("zero2, reduced in bf16", "zero2.json", FLAT | {"communication_data_type": "bf16"}),
    Case("zero2, classifier", "zero2.json", FLAT, model="classifier"),
    Case("zero3", "zero3.json", SCATTERED),
    Case("zero3, 3 micro-steps", "zero3.json", SCATTERED, micro_steps=3),
    Case("zero3, fp32", "zero3.json", SCATTERED, precision="fp32"),
    Case("zero3, shipped buckets", "zero3.json"),
    Case("zero3, no prefetch", "zero3.json", SCATTERED | {"stage3_prefetch_bucket_size": 0}),
    Case("zero3, short prefetch", "zero3.json", SCATTERED | {"stage3_prefetch_bucket_size": 10_000}),
    Case("zero3, reuse distance 0", "zero3.json", SCATTERED | {"stage3_max_reuse_distance": 0}),
    Case(
        "zero3, reuse distance of three blocks",
        "zero3.json",
        SCATTERED | {"stage3_prefetch_bucket_size": 10_000, "stage3_max_reuse_distance": 150_000},
    ),
    Case("zero3, live parameters of three blocks", "zero3.json", SCATTERED | {"stage3_max_live_parameters": 150_000}),
    Case(
        "zero3, neither live nor reused",
        "zero3.json",
        SCATTERED | {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0},
    ),
    Case("zero3, persistence 1000", "zero3.json", SCATTERED | {"stage3_param_persistence_threshold": 1000}),
    Case("zero3, reduce bucket of a third block", "zero3.json", SCATTERED | {"reduce_bucket_size": 17_000}),
    Case("zero3, reduce_scatter false", "zero3.json", SCATTERED | {"reduce_scatter": False}),
    Case("zero3, reduced in bf16", "zero3.json", SCATTERED | {"communication_data_type": "bf16"}),
    Case("zero3, no overlap", "zero3.json", SCATTERED | {"overlap_comm": False}),
    Case("zero3, clipping off", "zero3.json", SCATTERED | {"gradient_clipping": 0.0}),
    Case("zero3, classifier", "zero3.json", SCATTERED, model="classifier"),
    Case("zero3_offload", "zero3_offload.json", SCATTERED),
)


def _weighed(
    name: str, stage: int, changed: dict, *, precision: str = "bf16", summed: str = "fp32", micro_steps: int = 2
) -> Case:
    buckets = {0: {}, 3: {"reduce_bucket_size": 300_000, "stage3_prefetch_bucket_size": 300_000}}.get(
        stage, {"reduce_bucket_size": 300_000}
    )
    return Case(
        name,
        f"zero{stage}.json",
        {"data_types.grad_accum_dtype": summed} | buckets | changed,
        micro_steps,
        precision,
        "wide mim",
        weighed=True,
    )


STATE = (
    _weighed("ZeRO-0, bf16", 0, {}, summed="auto"),
    _weighed("ZeRO-1, bf16", 1, {}),
    _weighed("ZeRO-1, bf16, summed in bf16", 1, {}, summed="bf16"),
    _weighed("ZeRO-2, bf16", 2, {}),
    _weighed("ZeRO-2, bf16, one bucket", 2, {"overlap_comm": False}),
    _weighed("ZeRO-2, bf16, summed in bf16", 2, {}, summed="bf16"),
    _weighed("ZeRO-3, bf16", 3, {}),
    _weighed("ZeRO-3, bf16, summed in bf16", 3, {}, summed="bf16"),
    _weighed("ZeRO-3, bf16, live parameters 0", 3, {"stage3_max_live_parameters": 0}),
    _weighed("ZeRO-0, fp32", 0, {}, precision="fp32", summed="auto"),
    _weighed("ZeRO-1, fp32", 1, {}, precision="fp32"),
    _weighed("ZeRO-2, fp32", 2, {}, precision="fp32"),
    _weighed("ZeRO-3, fp32", 3, {}, precision="fp32"),
)
_OPTIMIZER, _WEIGHTS = {"offload_optimizer": {"device": "cpu"}}, {"offload_param": {"device": "cpu"}}
OFFLOADED = (
    _weighed("ZeRO-1, optimiser offloaded", 1, _OPTIMIZER),
    _weighed("ZeRO-1, optimiser offloaded, summed in bf16", 1, _OPTIMIZER, summed="bf16"),
    _weighed("ZeRO-2, optimiser offloaded", 2, _OPTIMIZER),
    _weighed("ZeRO-2, optimiser offloaded, summed in bf16", 2, _OPTIMIZER, summed="bf16"),
    _weighed(
        "ZeRO-2, optimiser offloaded, summed in bf16, one micro-step", 2, _OPTIMIZER, summed="bf16", micro_steps=1
    ),
    _weighed("ZeRO-3, optimiser offloaded", 3, _OPTIMIZER),
    _weighed("ZeRO-3, optimiser offloaded, summed in bf16", 3, _OPTIMIZER, summed="bf16"),
    _weighed("ZeRO-3, optimiser and weights offloaded", 3, _OPTIMIZER | _WEIGHTS),
)


# -------------------------------------------------------------------------------- what the engine does


def measure(cases, ranks: int, folder: Path, *, gpu: bool = False) -> list[dict]:
    """One launch: what rank 0 of `ranks` counted for each case, as `count_case` gives it.

    Args:
        gpu: a rank on each of the first GPUs of this machine, and not on its processors.
    Raises: UserError if the ranks fail.
    """
    asked, rows = folder / f"cases_{ranks}.json", folder / f"rows_{ranks}.json"
    asked.write_text(json.dumps([asdict(case) for case in cases]))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
        __file__,
        "--cases",
        str(asked),
        "--rows_to",
        str(rows),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | ({} if gpu else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}),
    )
    if done.returncode:
        said = done.stderr.split("torch/distributed/run.py")[0]  # then the launcher's own words
        raise UserError(
            f"{ranks} ranks ended with {done.returncode}; the last they said: {' '.join(said[-1000:].split())}"
        )
    return json.loads(rows.read_text())


def count(cases: list[Case], rows_to: Path) -> int:
    """One rank: every case; rank 0 writes them down."""
    import gc

    import torch

    from peco_ds.runtime.distributed import start_world

    world = start_world()
    gc.collect()
    # the libraries' own objects: going through them is most of the time of a weighing, and of DeepSpeed's own reports
    gc.freeze()
    if world.device.type == "cpu":
        torch.set_num_threads(1)
    found = [count_case(case, world) for case in cases]
    if world.is_main:
        rows_to.write_text(json.dumps(found))
    return 0


def count_case(case: Case, world) -> dict:
    """An engine's third optimiser step.

    Returns: device, modules (elements and decay of each trained tensor, by segment and module in running order),
        ds_config, groups; calls (phase, micro-step, operation, bytes of the whole result or input, in order), logged
        (operation -> [calls, bytes] of DeepSpeed's logger); of a case that is weighed also held (moment -> bytes of
        state), saved (bytes of the copies that each rank saves from), averaged (bytes of a moving average of the
        weights).
    """
    import torch
    from collectives import _held_bytes
    from deepspeed.comm import comms_logger

    weigh = (lambda: _held_bytes(world)) if case.weighed else lambda: 0
    trainee = _Trainee(case, _recipe(case, world.size), world)
    activations = trainee.bytes_of_a_forward_pass(weigh)
    before = weigh() - trainee.model_bytes
    trainee.start()
    for _ in range(WARM_UP):
        trainee.step()
    comms_logger.comms_dict.clear()
    calls, held = trainee.watched_step(lambda: weigh() - before)
    held = (
        {moment: num_bytes - (activations if moment != "end of backward" else 0) for moment, num_bytes in held.items()}
        if case.weighed
        else {}
    )
    logged = {
        operation: [sum(entry[0] for entry in sizes.values()), sum(size * entry[0] for size, entry in sizes.items())]
        for operation, sizes in comms_logger.comms_dict.items()
    }
    row = {
        "device": world.device.type,
        "modules": trainee.modules,
        "ds_config": trainee.ds_config,
        "groups": trainee.groups,
        "calls": calls,
        "logged": logged,
        "held": held,
    }
    if case.weighed:
        row |= {"saved": world.gather_objects(trainee.saved_bytes()), "averaged": trainee.averaged_bytes()}
    trainee.destroy()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _recipe(case: Case, ranks: int):
    name, sizes = MODELS[case.model]
    kind = FinetuneRecipe if case.model == "classifier" else PretrainRecipe
    run_settings = [
        "run.micro_batch=1",
        f"run.global_batch={ranks * case.micro_steps}",
        f"run.precision={case.precision}",
        "run.compile=none",
    ]
    return load_recipe(kind, name, [*sizes.split(), *run_settings], environ={}).recipe


class _Trainee:
    """An engine of a case, and one batch."""

    def __init__(self, case: Case, recipe, world) -> None:
        import torch

        from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
        from peco_ds.models.classifier import build_classifier
        from peco_ds.models.mim import build_mim
        from peco_ds.runtime.optim import layer_scales

        torch.manual_seed(0)
        scales = None
        if case.model == "classifier":
            self._model = build_classifier(recipe.model, recipe.classifier, NUM_CLASSES)
            scales = layer_scales(recipe.model.depth, recipe.classifier.layer_decay)
        else:
            self._model = build_mim(recipe.model, recipe.encoding, recipe.aggregation, recipe.objective.num_codes)
        self.modules, self.groups = modules_of(self._model), "segment" if scales else "whole"
        source = DS_CONFIGS / case.file
        raw = read_deepspeed_json(source)
        for key, value in case.changed.items():
            if "." in key or key in ("communication_data_type", "gradient_clipping"):
                section, _, name = key.rpartition(".")
                (raw.setdefault(section, {}) if section else raw)[name] = value
            else:
                raw["zero_optimization"][key] = value
        optim = recipe.optim
        if "gradient_clipping" in case.changed:
            from dataclasses import replace

            optim = replace(optim, clip_norm=case.changed["gradient_clipping"])
        self.ds_config = merge_deepspeed(raw, source, recipe.run, optim, world.size)
        self._start = dict(source=source, run=recipe.run, optim=optim, lr_scales=scales)
        self._micro_steps, size, self._dtype = (
            case.micro_steps,
            recipe.model.image_px,
            {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case.precision],
        )
        self._inputs = (torch.randn(1, 3, size, size, device=world.device),)
        if case.model != "classifier":
            self._inputs += (torch.arange(recipe.mask.count, device=world.device).expand(1, -1),)

    def bytes_of_a_forward_pass(self, held) -> int:
        """What the model alone holds between a forward and its backward pass."""
        import copy

        model = copy.deepcopy(self._model).to(self._inputs[0].device, self._dtype)
        before = held()
        loss = _loss(model(*self._inputs))
        after = held()
        del loss
        return after - before

    @property
    def model_bytes(self) -> int:
        """On the device where the engine will be, before it is."""
        return sum(
            parameter.nbytes for parameter in self._model.parameters() if parameter.device == self._inputs[0].device
        )

    def start(self) -> None:
        logger = {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False}}
        self._engine = _engine(self._model, self.ds_config | logger, **self._start)
        self._model = None

    def step(self, phase=lambda name, micro_step: None) -> None:
        for micro_step in range(self._micro_steps):
            phase("forward", micro_step)
            loss = _loss(self._engine(*self._inputs))
            phase("backward", micro_step)
            self._engine.backward(loss)
            del loss
            phase("after", micro_step)
            self._engine.step()

    def watched_step(self, held) -> tuple[list, dict[str, int]]:
        """A step's collectives in order, and the bytes held at the end of its last forward pass, at the first reduction
        behind it, and at the end of its last backward pass.

        At the first reduction the buckets stand whole: they are added to what was held before, since activations and
        single gradients come and go beside them.
        """
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        calls, moments, now, buckets, last, bucket_bytes = [], {}, [], [], self._micro_steps - 1, self._bucket_bytes

        class Listing(TorchDispatchMode):
            def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
                if operation.namespace == "c10d":
                    sides = [
                        sum(leaf.nbytes for leaf in tree_leaves(side) if hasattr(leaf, "nbytes")) for side in args[:2]
                    ]
                    calls.append([*now, plain_name(operation._schema.name.split("::")[1]), max(sides)])
                    if now == ["backward", last] and "all_gather" not in calls[-1]:
                        moments.setdefault("first reduction", moments["end of forward"] + bucket_bytes() - buckets[0])
                return operation(*args, **(kwargs or {}))

        def phase(name: str, micro_step: int) -> None:
            now[:] = [name, micro_step]
            if micro_step == last and name != "forward":
                moments["end of forward" if name == "backward" else "end of backward"] = held()
                buckets.append(bucket_bytes())

        with Listing():
            self.step(phase)
        return calls, moments

    def _bucket_bytes(self) -> int:
        found = [bucket.buffer for bucket in getattr(self._engine.optimizer, "ipg_buckets", {}).values()]
        return sum(
            part.nbytes
            for buffer in found
            for part in (buffer if isinstance(buffer, list) else [buffer])
            if part is not None
        )

    def saved_bytes(self) -> int:
        """Of the copies in host memory that this rank's part of a checkpoint is written from."""
        from peco_ds.runtime.checkpoint.writer import HostCopies

        copies = self._engine.checkpoint_engine = HostCopies()
        self._engine._copy_recovery_script = lambda _folder: None
        with tempfile.TemporaryDirectory() as folder:
            self._engine.save_checkpoint(folder, tag="copies", save_latest=False)
        return sum(buffer.nbytes for buffer in copies._buffers.values())

    def averaged_bytes(self) -> int:
        from peco_ds.runtime.ema import WeightEma

        return sum(shard.nbytes for shard in WeightEma(self._engine, 0.9).shards)

    def destroy(self) -> None:
        """Give back the engine's memory: hooks of DeepSpeed's keep it otherwise."""
        self._engine.destroy()
        for owner in (self._engine.optimizer, self._engine.basic_optimizer, self._engine.module, self._engine):
            if owner is not None:
                vars(owner).clear()
        self._engine = None


def _loss(output):
    return getattr(output, "logits", output).float().square().mean()


def _engine(model, ds_config: dict, *, source: Path, run, optim, lr_scales):
    """The engine that a run would have.

    Where it offloads, with torch's AdamW in the place of DeepSpeed's for the host, which is compiled for minutes.
    """
    from peco_ds.models.vit import TransformerBlock
    from peco_ds.runtime.engine import start_engine

    if (ds_config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") == "none":
        return start_engine(
            model, ds_config, source=source, run=run, optim=optim, leaf_modules=(TransformerBlock,), lr_scales=lr_scales
        )
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    from peco_ds.runtime.optim import build_optimizer, decay_groups

    set_z3_leaf_modules(model, [TransformerBlock])
    optimizer = build_optimizer(decay_groups(model, optim.weight_decay, lr_scales), optim, offloaded=False)
    return deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=ds_config | {"zero_force_ds_cpu_optimizer": False},
        dist_init_required=False,
    )[0]


def plain_name(operation: str) -> str:
    """A name of the process group's, as the planner calls it."""
    name = operation.strip("_")
    return next((plain for start, plain in _NAMES.items() if name.startswith(start)), name)


_NAMES = {
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "reduce": "reduce",
}


def modules_of(model) -> list[list[list[tuple[int, bool]]]]:
    """Segments (embedding, each block, head) of modules in running order, of [elements, whether they decay] of the
    tensors they hold.
    """
    from peco_ds.models.vit import TransformerBlock
    from peco_ds.runtime.optim import decay_groups

    decaying = {
        id(parameter) for group in decay_groups(model, 0.05) if group["weight_decay"] for parameter in group["params"]
    }

    def own(module, recurse: bool) -> list:
        return [(parameter.numel(), id(parameter) in decaying) for parameter in module.parameters(recurse=recurse)]

    backbone = getattr(model, "backbone", model)
    mask_token = [(model.mask_token.numel(), True)] if hasattr(model, "mask_token") else []
    embedding = [mask_token + [(backbone.cls_token.numel(), False)], [], own(backbone.patch_embed.proj, False), []]
    if backbone.rel_pos_bias is not None:
        embedding.append(own(backbone.rel_pos_bias, False))
    blocks = [[own(block, True)] for block in backbone.blocks]
    ends = [
        part
        for part in (
            backbone.norm,
            getattr(backbone, "fc_norm", None),
            getattr(model, "lm_head", None),
            getattr(backbone, "head", None),
        )
        if part is not None
    ]
    assert all(isinstance(block, TransformerBlock) for block in backbone.blocks)
    return [embedding, *blocks, [own(part, False) for part in ends]]


# ------------------------------------------------------------------------------- what the planner says


def segments_of(case: Case) -> tuple[Segment, ...]:
    """As a plan has them: from the recipe alone."""
    recipe = _recipe(case, 1)
    return finetune_segments(recipe, NUM_CLASSES) if case.model == "classifier" else pretrain_segments(recipe)


def predicted_calls(case: Case, row: dict, ranks: int, *, by_module: bool) -> tuple[Collective, ...]:
    """`by_module`: told which tensors the modules of the real model hold, or with a plan's own segments."""
    modules = (
        [[[TrainedTensor(*tensor) for tensor in module] for module in segment] for segment in row["modules"]]
        if by_module
        else None
    )
    return step_collectives(
        segments_of(case),
        ds_config=row["ds_config"],
        precision=case.precision,
        micro_steps=case.micro_steps,
        ranks=ranks,
        groups=row["groups"],
        modules=modules,
    )


def sums(collectives) -> dict[str, list[float]]:
    """(operation, bytes) pairs -> operation -> [calls, bytes]."""
    found: dict[str, list[float]] = {}
    for operation, num_bytes in collectives:
        entry = found.setdefault(operation, [0, 0])
        entry[0] += 1
        entry[1] += num_bytes
    return found


def logged_sums(row: dict, ranks: int) -> dict[str, list[float]]:
    """DeepSpeed's logger counts what a rank puts in: of a gather its own part."""
    found: dict[str, list[float]] = {}
    for operation, (calls, num_bytes) in row["logged"].items():
        entry = found.setdefault(plain_name(operation), [0, 0])
        entry[0] += calls
        entry[1] += num_bytes * (ranks if plain_name(operation) == "all_gather" else 1)
    return found


def sizes_of(case: Case, row: dict, ranks: int) -> tuple[int, dict]:
    """Trained parameters, and what else the planner's formulas of memory take."""
    elements = sum(elements for segment in row["modules"] for module in segment for elements, _ in module)
    return elements, dict(
        stage=row["ds_config"]["zero_optimization"]["stage"], world_size=ranks, precision=case.precision
    )


def predicted_memory(case: Case, row: dict, ranks: int) -> GpuMemory:
    elements, sizes = sizes_of(case, row, ranks)
    return gpu_memory(elements, ds_config=row["ds_config"], **sizes)


def saved(case: Case, row: dict, ranks: int) -> float:
    elements, sizes = sizes_of(case, row, ranks)
    return saved_bytes(elements, first_rank=True, **sizes)


# ----------------------------------------------------------------------------------------------- FLOPs


FULL_WIDTH = {
    "peco_vitb16": "model.depth=3",
    "peco_vith14": "model.depth=2",
    "beitv2_vitl16": "model.depth=3 aggregation.early_block=2 aggregation.blocks=1",
    "peco_vith14_visible": "model.depth=4",
}


@dataclass(frozen=True)
class Flops:
    """Of one image."""

    forward: float
    training: float


def counted_flops(recipe: PretrainRecipe) -> Flops:
    """What torch's counter sees in the kernels.

    The plain attention kernel, because the counter does not know a CPU's fused one.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from peco_ds.models.mim import build_mim

    model = build_mim(recipe.model, recipe.encoding, recipe.aggregation, recipe.objective.num_codes)
    images, masked = (
        torch.randn(1, 3, recipe.model.image_px, recipe.model.image_px),
        torch.arange(recipe.mask.count).expand(1, -1),
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        output = model(images, masked)
        loss = sum(logits.sum() for logits in (output.logits, output.aggregated_logits) if logits is not None)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        loss.backward()
    return Flops(forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops())


def predicted_flops(recipe: PretrainRecipe) -> Flops:
    macs = mim_macs(
        recipe.model,
        num_codes=recipe.objective.num_codes,
        masked=recipe.mask.count,
        encoding=recipe.encoding,
        aggregation=recipe.aggregation,
    )
    return Flops(FLOPS_PER_MAC * macs.total, macs.training_flops)


def flops_recipes() -> dict[str, PretrainRecipe]:
    asked = {"toy": MODELS["wide mim"]} | {name: (name, changes) for name, changes in FULL_WIDTH.items()}
    return {
        name: load_recipe(PretrainRecipe, source, [*changes.split(), "run.compile=none"], environ={}).recipe
        for name, (source, changes) in asked.items()
    }


# ---------------------------------------------------------------------------------------------- tables


def flops_table() -> list[str]:
    lines = [
        "FLOP of one image, in millions.",
        "",
        "| | blocks x width | forward | counted | error | forward and backward | counted | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, recipe in flops_recipes().items():
        said, seen = predicted_flops(recipe), counted_flops(recipe)
        cells = [
            f"{a / 1e6:,.1f} | {b / 1e6:,.1f} | {a / b - 1:+.2%}"
            for a, b in ((said.forward, seen.forward), (said.training, seen.training))
        ]
        lines.append(f"| {name} | {recipe.model.depth} x {recipe.model.width} | {' | '.join(cells)} |")
    return [*lines, ""]


def worst_moment(row: dict) -> tuple[str, int]:
    """When the most is held, and how much."""
    return max(row["held"].items(), key=lambda item: item[1])


def state_table(found: dict[int, list[tuple[Case, dict]]]) -> list[str]:
    lines = [
        "State of a rank at its worst moment, kB; on CPUs what is offloaded counts too. Beside it "
        "the copies that rank 0 saves from.",
        "",
        "| | ranks | state | counted | error | when | copies | counted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ranks, cases in found.items():
        for case, row in cases:
            memory, (moment, held) = predicted_memory(case, row, ranks), worst_moment(row)
            total = memory.state + (memory.host if row["device"] == "cpu" else 0)
            copies = f"{saved(case, row, ranks) / 1e3:,.1f} | {row['saved'][0] / 1e3:,.1f}"
            lines.append(
                f"| {case.name} | {ranks} | {total / 1e3:,.1f} | {held / 1e3:,.1f} | {total / held - 1:+.2%} "
                f"| {moment} | {copies} |"
            )
    return [*lines, ""]


def traffic_table(found: dict[int, list[tuple[Case, dict]]]) -> list[str]:
    lines = [
        "Collectives of one optimiser step: calls and kB (of a gather the whole result, of a "
        "reduction the whole input), as the planner has them from the recipe, "
        "and in DeepSpeed's comms logger.",
        "",
        "| | ranks | operation | calls | counted | kB | counted | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ranks, cases in found.items():
        for case, row in cases:
            said = sums((call.operation, call.num_bytes) for call in predicted_calls(case, row, ranks, by_module=False))
            seen = logged_sums(row, ranks)
            for operation in sorted(said.keys() | seen.keys()):
                (calls, num_bytes), (seen_calls, seen_bytes) = said.get(operation, (0, 0)), seen.get(operation, (0, 0))
                error = f"{num_bytes / seen_bytes - 1:+.2%}" if seen_bytes else "none counted"
                lines.append(
                    f"| {case.name} | {ranks} | {operation} | {calls} | {seen_calls} | {num_bytes / 1e3:,.2f} | "
                    f"{seen_bytes / 1e3:,.2f} | {error} |"
                )
    return [*lines, ""]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks", type=at_least(1), nargs="+", default=[1, 2, 4], help="a launch each (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--gpu", action="store_true", help="the ranks on the GPUs of this machine")
    parser.add_argument("--record", type=Path, help="also write the tables to this file")
    parser.add_argument("--cases", type=Path, help=argparse.SUPPRESS)  # this process is a rank
    parser.add_argument("--rows_to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rows_to:
        return count([Case(**case) for case in json.loads(args.cases.read_text())], args.rows_to)
    if args.gpu:
        require_gpu()
        import torch

        if max(args.ranks) > torch.cuda.device_count():
            raise UserError(
                f"--ranks {max(args.ranks)} with --gpu: this machine has {torch.cuda.device_count()} GPUs, a "
                "rank takes one; give fewer"
            )
    lines = flops_table() if "flops" in args.only else []
    asked = {"state": (*STATE, *OFFLOADED), "traffic": TRAFFIC}
    parts = [part for part in ("state", "traffic") if part in args.only]
    found: dict[str, dict[int, list]] = {part: {} for part in parts}
    with tempfile.TemporaryDirectory(prefix="peco_plan_engine_") as folder:
        for ranks in args.ranks if parts else []:
            # One rank has no traffic.
            cases = [(part, case) for part in parts for case in asked[part] if part == "state" or ranks > 1]
            rows = measure([case for _, case in cases], ranks, Path(folder), gpu=args.gpu) if cases else []
            for (part, case), row in zip(cases, rows):
                found[part].setdefault(ranks, []).append((case, row))
    for part, table in (("state", state_table), ("traffic", traffic_table)):
        lines += table(found[part]) if part in parts else []
    body = "\n".join(lines)
    sys.stdout.write(body + "\n")
    if args.record:
        from record import write_record

        shown = shlex.join(["python", "benchmarks/plan_engine.py", *(sys.argv[1:] if argv is None else argv)])
        write_record(args.record, "The planner beside what torch and DeepSpeed count", shown, body, "deepspeed", "timm")
    return 0


if __name__ == "__main__":
    run(main)
