"""A rank of plan_engine.py: an engine of each case in turn, and what its third optimiser step sends and holds.

torchrun ... -m benchmarks.plan_engine_rank CASES.json ROWS.json
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
from deepspeed.comm import comms_logger
from deepspeed.utils import set_z3_leaf_modules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.collectives import held_bytes
from benchmarks.plan_engine import NUM_CLASSES, Case, plain_name
from peco_ds.command_line import run
from peco_ds.deepspeed_json import DS_CONFIGS, merge_deepspeed, read_deepspeed_json
from peco_ds.models.classifier import build_classifier
from peco_ds.models.mim import build_mim
from peco_ds.models.vit import TransformerBlock
from peco_ds.runtime.checkpoint.writer import HostCopies
from peco_ds.runtime.distributed import World, start_world
from peco_ds.runtime.ema import WeightEma
from peco_ds.runtime.engine import start_engine
from peco_ds.runtime.optim import build_optimizer, decay_groups, layer_scales

# optimiser steps: in the first one ZeRO-3 records its order, in the second it first follows it
WARM_UP = 2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> int:
    """Every case; rank 0 writes them down."""
    cases, rows_to = map(Path, sys.argv[1:] if argv is None else argv)
    world = start_world()
    gc.collect()
    # the libraries' own objects: going through them is most of the time of a weighing, and of DeepSpeed's own reports
    gc.freeze()
    if world.device.type == "cpu":
        torch.set_num_threads(1)
    found = [count_case(Case(**case), world) for case in json.loads(cases.read_text())]
    if world.is_main:
        rows_to.write_text(json.dumps(found))
    return 0


def count_case(case: Case, world: World) -> dict:
    """An engine's third optimiser step.

    Returns: device, modules (elements and decay of each trained tensor, by segment and module in running order),
        ds_config, groups; calls (phase, micro-step, operation, bytes of the whole result or input, in order), logged
        (operation -> [calls, bytes] of DeepSpeed's logger); of a case that is weighed also held (moment -> bytes of
        state), saved (bytes of the copies that each rank saves from), averaged (bytes of a moving average of the
        weights).
    """
    weigh = (lambda: held_bytes(world)) if case.weighed else lambda: 0
    trainee = _Trainee(case, world)
    activations = trainee.bytes_of_a_forward_pass(weigh)
    before = weigh() - trainee.model_bytes
    trainee.start()
    for _ in range(WARM_UP):
        trainee.step()
    comms_logger.comms_dict.clear()
    calls, held = trainee.watched_step(lambda: weigh() - before)
    row = {
        "device": world.device.type,
        "modules": trainee.modules,
        "ds_config": trainee.ds_config,
        "groups": "segment" if trainee.lr_scales else "whole",
        "calls": calls,
        "logged": {
            operation: [sum(entry[0] for entry in sizes.values()), sum(size * of[0] for size, of in sizes.items())]
            for operation, sizes in comms_logger.comms_dict.items()
        },
        "held": {},
    }
    if case.weighed:
        row["held"] = {at: size - (activations if at != "end of backward" else 0) for at, size in held.items()}
        row |= {"saved": world.gather_objects(trainee.saved_bytes()), "averaged": trainee.averaged_bytes()}
    trainee.destroy()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


class _Trainee:
    """An engine of a case, and one batch."""

    def __init__(self, case: Case, world: World) -> None:
        torch.manual_seed(0)
        recipe, self.lr_scales = case.recipe(world.size), None
        if case.model == "classifier":
            self._model = build_classifier(recipe.model, recipe.classifier, NUM_CLASSES)
            self.lr_scales = layer_scales(recipe.model.depth, recipe.classifier.layer_decay)
        else:
            self._model = build_mim(recipe.model, recipe.encoding, recipe.aggregation, recipe.objective.num_codes)
        self.modules = modules_of(self._model)
        self._source, self._run, self._optim = DS_CONFIGS / case.file, recipe.run, recipe.optim
        raw = read_deepspeed_json(self._source)
        for key, value in case.changed.items():
            if "." in key or key in ("communication_data_type", "gradient_clipping"):
                section, _, name = key.rpartition(".")
                (raw.setdefault(section, {}) if section else raw)[name] = value
            else:
                raw["zero_optimization"][key] = value
        if "gradient_clipping" in case.changed:
            self._optim = replace(self._optim, clip_norm=case.changed["gradient_clipping"])
        self.ds_config = merge_deepspeed(raw, self._source, self._run, self._optim, world.size)
        self._micro_steps, self._dtype, size = case.micro_steps, DTYPES[case.precision], recipe.model.image_px
        self._inputs = (torch.randn(1, 3, size, size, device=world.device),)
        if case.model != "classifier":
            self._inputs += (torch.arange(recipe.mask.count, device=world.device).expand(1, -1),)

    def bytes_of_a_forward_pass(self, held: Callable[[], int]) -> int:
        """What the model alone holds between a forward and its backward pass."""
        model = copy.deepcopy(self._model).to(self._inputs[0].device, self._dtype)
        before = held()
        loss = _loss(model(*self._inputs))
        after = held()
        del loss
        return after - before

    @property
    def model_bytes(self) -> int:
        """On the device where the engine will be, before it is."""
        device = self._inputs[0].device
        return sum(parameter.nbytes for parameter in self._model.parameters() if parameter.device == device)

    def start(self) -> None:
        """The engine that a run would have.

        Where it offloads, with torch's AdamW in the place of DeepSpeed's for the host, which is compiled for minutes.
        """
        model, optim, self._model = self._model, self._optim, None
        logger = {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False}}
        config = self.ds_config | logger
        if (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") == "none":
            self._engine = start_engine(
                model,
                config,
                source=self._source,
                run=self._run,
                optim=optim,
                leaf_modules=(TransformerBlock,),
                lr_scales=self.lr_scales,
            )
            return
        set_z3_leaf_modules(model, [TransformerBlock])
        optimizer = build_optimizer(decay_groups(model, optim.weight_decay, self.lr_scales), optim, offloaded=False)
        config["zero_force_ds_cpu_optimizer"] = False
        self._engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[
            0
        ]

    def step(self, phase: Callable[[str, int], None] = lambda name, micro_step: None) -> None:
        for micro_step in range(self._micro_steps):
            phase("forward", micro_step)
            loss = _loss(self._engine(*self._inputs))
            phase("backward", micro_step)
            self._engine.backward(loss)
            del loss
            phase("after", micro_step)
            self._engine.step()

    def watched_step(self, held: Callable[[], int]) -> tuple[list, dict[str, int]]:
        """A step's collectives in order, and the bytes held at the end of its last forward pass, at the first reduction
        behind it, and at the end of its last backward pass.

        At the first reduction the buckets stand whole: they are added to what was held before, since activations and
        single gradients come and go beside them.
        """
        calls, moments, now, buckets, last, bucket_bytes = [], {}, [], [], self._micro_steps - 1, self._bucket_bytes

        class Listing(TorchDispatchMode):
            def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
                if operation.namespace == "c10d":
                    sides = [sum(getattr(leaf, "nbytes", 0) for leaf in tree_leaves(side)) for side in args[:2]]
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
        parts = [part for buffer in found for part in (buffer if isinstance(buffer, list) else [buffer])]
        return sum(part.nbytes for part in parts if part is not None)

    def saved_bytes(self) -> int:
        """Of the copies in host memory that this rank's part of a checkpoint is written from."""
        copies = self._engine.checkpoint_engine = HostCopies()
        self._engine._copy_recovery_script = lambda _folder: None
        with tempfile.TemporaryDirectory() as folder:
            self._engine.save_checkpoint(folder, tag="copies", save_latest=False)
        return sum(buffer.nbytes for buffer in copies._buffers.values())

    def averaged_bytes(self) -> int:
        return sum(shard.nbytes for shard in WeightEma(self._engine, 0.9).shards)

    def destroy(self) -> None:
        """Give back the engine's memory: hooks of DeepSpeed's keep it otherwise."""
        self._engine.destroy()
        for owner in (self._engine.optimizer, self._engine.basic_optimizer, self._engine.module, self._engine):
            if owner is not None:
                vars(owner).clear()
        self._engine = None


def _loss(output) -> torch.Tensor:
    return getattr(output, "logits", output).float().square().mean()


def modules_of(model: torch.nn.Module) -> list[list[list[tuple[int, bool]]]]:
    """Segments (embedding, each block, head) of modules in running order, of [elements, whether they decay] of the
    tensors they hold.
    """
    groups = decay_groups(model, 0.05)
    decaying = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}

    def own(module, recurse: bool = False) -> list:
        return [(parameter.numel(), id(parameter) in decaying) for parameter in module.parameters(recurse=recurse)]

    backbone = getattr(model, "backbone", model)
    mask_token = [(model.mask_token.numel(), True)] if hasattr(model, "mask_token") else []
    embedding = [mask_token + [(backbone.cls_token.numel(), False)], [], own(backbone.patch_embed.proj), []]
    if backbone.rel_pos_bias is not None:
        embedding.append(own(backbone.rel_pos_bias))
    assert all(isinstance(block, TransformerBlock) for block in backbone.blocks)
    blocks = [[own(block, recurse=True)] for block in backbone.blocks]
    ends = [backbone.norm]
    ends += [getattr(*where, None) for where in ((backbone, "fc_norm"), (model, "lm_head"), (backbone, "head"))]
    return [embedding, *blocks, [own(part) for part in ends if part is not None]]


if __name__ == "__main__":
    run(main)
