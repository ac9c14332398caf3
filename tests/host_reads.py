"""Who reads tensors back to the host in a step: pre-training steps of a tiny model in one process, under every ZeRO
stage.

    python host_reads.py JSON

Written to JSON: {stage: [[step from 1, "deepspeed" or FILE:FUNCTION of ours, operation], ...]}, in order.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

STEPS, LOG_EVERY = 6, 3
STAGES = ("zero0", "zero1", "zero2", "zero3")
# Read back by a copy to the host where the tensor lies on a device; on a CPU there is no such copy to be seen, so the
# asking is.
READERS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")


def main(out: Path) -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from peco_ds.config import PretrainRecipe
    from peco_ds.data.loaders import Codes, MaskedBatch, masked_targets
    from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
    from peco_ds.durations import resolve_durations
    from peco_ds.models.mim import build_mim
    from peco_ds.models.vit import TransformerBlock
    from peco_ds.objectives import build_objective
    from peco_ds.recipe_files import load_recipe
    from peco_ds.runtime.distributed import start_world
    from peco_ds.runtime.run import Run

    small = (
        "model.image_px=32 model.patch_px=16 model.width=24 model.depth=2 model.heads=3 "
        "views.tokenizer_px=32 mask.count=2 mask.min_block=1 objective.num_codes=16"
    ).split()
    small += [
        "model.drop_path=0.2",
        "run.global_batch=4",
        "run.micro_batch=2",
        f"run.log_every_steps={LOG_EVERY}",
        "schedule.epochs=null",
        f"schedule.steps={STEPS + 2}",
    ]
    small += ["schedule.warmup_epochs=null", "schedule.warmup_steps=1", "checkpoint.every_epochs=null"]
    resolved = load_recipe(PretrainRecipe, "peco_vitb16", small)
    cfg = resolved.recipe
    world, durations = start_world(), resolve_durations(cfg, 100)
    found: dict[str, list] = {}
    reads: list[list] = []
    step_now = [0]

    def note(operation: str) -> None:
        # the nearest of the two is the one that asked
        for frame in reversed(traceback.extract_stack()):
            if "/deepspeed/" in frame.filename or "/peco_ds/" in frame.filename:
                reads.append(
                    [
                        step_now[0],
                        f"{Path(frame.filename).name}:{frame.name}" if "/peco_ds/" in frame.filename else "deepspeed",
                        operation,
                    ]
                )
                return

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            name = operation._schema.name
            if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"):
                note(name)
            return operation(*args, **(kwargs or {}))

    def noted(name: str):
        plain = getattr(torch.Tensor, name)

        def asked(self, *args, **options):
            note(name)
            return plain(self, *args, **options)

        return asked

    for stage in STAGES:
        config = REPOSITORY / "ds_configs" / f"{stage}.json"
        model = build_mim(cfg.model, cfg.encoding, cfg.aggregation, cfg.objective.num_codes)
        run_folder = out.parent / stage
        run_folder.mkdir()
        merged = merge_deepspeed(read_deepspeed_json(config), config, cfg.run, cfg.optim, 1)
        run = Run(run_folder, cfg, merged, world, durations, source=str(config), fingerprint="f", num_samples=100)
        run.attach(model, training_flops=1.0, leaf_modules=(TransformerBlock,))
        masked = torch.tensor([[0, 3], [1, 2]])
        batch = MaskedBatch(
            torch.randn(2, 3, 32, 32), masked, masked_targets(Codes(torch.randint(16, (2, 4))), masked), ["a", "b"]
        )
        batches, objective = iter([batch] * 2 * STEPS), build_objective(cfg.objective)
        saved = {name: getattr(torch.Tensor, name) for name in READERS}
        for name in READERS:
            setattr(torch.Tensor, name, noted(name))
        try:
            with run, Watching():
                for step in run.steps():
                    step_now[0] = step + 1
                    for batch in run.micro_batches(batches):
                        outputs = run.engine(batch.images_norm, batch.masked)
                        run.backward(*objective(outputs, batch.targets), batch.keys)
                    run.finish_step()
                    if step + 1 == STEPS:
                        break
        finally:
            for name, plain in saved.items():
                setattr(torch.Tensor, name, plain)
        found[stage], reads[:] = list(reads), []
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)
    main(Path(sys.argv[1]))
