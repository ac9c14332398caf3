"""Several runs of one entry point inside one launch, because a launch costs more than a small run.

    python many_runs.py JSON    with [{"stage": "pretrain", "arguments": [...], "statistics": FILE or absent, "lrs":
    FILE or absent}, ...]

Exit codes of the runs are written to JSON + ".codes" by rank 0, a refusal as its text. With "spoilt", {"rank": R,
"passes": [first, last], "factor": F}, rank R's losses of these forward passes (from 0) are multiplied by F, as a bad
batch would do it; with "unmended", elastic resume leaves DeepSpeed's parameter groups as they come. With "statistics",
the standard deviation of every parameter as the engine holds it before the first step is saved there; with "keys", the
images of each pass, to FILE.RANK; with "lrs", the groups of the engine's optimiser after the last step's learning
rate was set; with "stop", rank 0 is asked to stop when so many steps are done; with "poisoned", {"part": P, "step": N},
one value of that part of the training state becomes NaN on rank 0 at the end of step N; with "unchecked", checkpoints
are saved as they were before they were looked at for such values; with "unwritten", memory that the engine takes and
does not write holds NaN.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)


def record_statistics(path: str):
    """Wrap start_engine so that initial weights are looked at through the engine, whole, whatever the ZeRO stage."""
    import deepspeed

    from peco_ds.runtime import run as module

    original = module.start_engine

    def wrapped(model, *positional, **arguments):
        engine = original(model, *positional, **arguments)
        partitioned = [p for p in engine.module.parameters() if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=None, enabled=bool(partitioned)):
            found = {
                name: float(p.detach().float().std()) for name, p in engine.module.named_parameters() if p.numel() > 1
            }
        if os.environ.get("RANK", "0") == "0":
            Path(path).write_text(json.dumps(found))
        return engine

    module.start_engine = wrapped
    return lambda: setattr(module, "start_engine", original)


def record_lrs(path: str):
    """Wrap set_lr so that what it left in the optimiser is written down."""
    from peco_ds.runtime import run as module

    original = module.set_lr

    def wrapped(engine, *positional):
        lr = original(engine, *positional)
        if os.environ.get("RANK", "0") == "0":
            groups = [
                {name: group[name] for name in ("name", "lr", "lr_scale", "weight_decay")}
                for group in engine.optimizer.param_groups
            ]
            Path(path).write_text(json.dumps({"lr": lr, "groups": groups}))
        return lr

    module.set_lr = wrapped
    return lambda: setattr(module, "set_lr", original)


def record_keys(path: str):
    """Wrap the guard so that every rank writes down which images each of its passes had, in files of their own."""
    from peco_ds.runtime import step_guard as module

    original = module.StepGuard.watch

    def wrapped(guard, loss, keys):
        with open(f"{path}.{os.environ.get('RANK', '0')}", "a") as file:
            file.write(json.dumps(keys) + "\n")
        return original(guard, loss, keys)

    module.StepGuard.watch = wrapped
    return lambda: setattr(module.StepGuard, "watch", original)


def spoil(fault: dict):
    """Wrap the guard so that losses arrive spoilt; spikes are looked for after two steps already."""
    from peco_ds.runtime import step_guard as module

    original, least, passes = module.StepGuard.watch, module.LEAST, []

    def wrapped(guard, loss, keys):
        number = len(passes)
        passes.append(number)
        hit = os.environ.get("RANK", "0") == str(fault["rank"]) and fault["passes"][0] <= number <= fault["passes"][1]
        return original(guard, loss * fault["factor"] if hit else loss, keys)

    module.StepGuard.watch, module.LEAST = wrapped, 2

    def undo():
        module.StepGuard.watch, module.LEAST = original, least

    return undo


def ask_to_stop(step: int):
    """Wrap the guard so that rank 0 sees a stop signal while step number `step` ends."""
    from peco_ds.runtime import step_guard as module

    original = module.StepGuard.close_step

    def wrapped(guard, done):
        if done == step and guard._world.is_main:
            guard._world.stop_seen = True
        return original(guard, done)

    module.StepGuard.close_step = wrapped
    return lambda: setattr(module.StepGuard, "close_step", original)


def poison(fault: dict):
    """Wrap the guard so that a step leaves a value that is not finite, as an optimiser that overflows would."""
    from peco_ds.runtime import run as run_module
    from peco_ds.runtime import step_guard as module
    from peco_ds.runtime.ema import local_masters

    original, attach, runs = module.StepGuard.close_step, run_module.Run.attach, []

    def attached(run, *positional, **arguments):
        runs.append(run)
        return attach(run, *positional, **arguments)

    def tensor_of(part: str, run):
        if part == "weights":
            return local_masters(run.engine)[0]
        if part == "moments":
            return next(iter(run.engine.basic_optimizer.state.values()))["exp_avg_sq"]
        return run.ema.shards[0] if part == "average" else dict(run.engine.module.named_buffers())[part]

    def wrapped(guard, done):
        applied = original(guard, done)
        if done == fault["step"] and guard._world.is_main:
            tensor_of(fault["part"], runs[-1]).data.view(-1)[0] = float("nan")
        return applied

    module.StepGuard.close_step, run_module.Run.attach = wrapped, attached

    def undo():
        module.StepGuard.close_step, run_module.Run.attach = original, attach

    return undo


def save_unchecked(_asked: bool):
    from peco_ds.runtime.checkpoint import save_restore as module

    original = module.part_not_finite
    module.part_not_finite = lambda *arguments: ""
    return lambda: setattr(module, "part_not_finite", original)


def fill_unwritten(_asked: bool):
    """Wrap start_engine so that memory it takes is full of NaN, as memory that was used before may be."""
    import torch

    from peco_ds.runtime import run as module

    original = module.start_engine

    def wrapped(*positional, **arguments):
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return original(*positional, **arguments)
        finally:
            torch.use_deterministic_algorithms(False)

    module.start_engine = wrapped
    return lambda: setattr(module, "start_engine", original)


def leave_unmended(_asked: bool):
    from peco_ds.runtime.checkpoint import elastic as module

    original = module._own_settings_and_steps
    module._own_settings_and_steps = lambda *arguments: None
    return lambda: setattr(module, "_own_settings_and_steps", original)


def outcome(main, arguments: list[str]):
    from peco_ds.errors import UserError

    try:
        return main(arguments)
    except UserError as error:
        return str(error)


def stage_module(name: str):
    """A stage of the package by its name, or one from outside by the path of its file."""
    if not name.endswith(".py"):
        return importlib.import_module(f"peco_ds.{name}")
    sys.path.append(str(Path(name).parent))
    return importlib.import_module(Path(name).stem)


def main():
    cases = json.loads(Path(sys.argv[1]).read_text())
    codes = []
    for case in cases:
        wrappers = {
            "statistics": record_statistics,
            "lrs": record_lrs,
            "stop": ask_to_stop,
            "keys": record_keys,
            "spoilt": spoil,
            "unmended": leave_unmended,
            "poisoned": poison,
            "unchecked": save_unchecked,
            "unwritten": fill_unwritten,
        }
        undo = [wrap(case[name]) for name, wrap in wrappers.items() if case.get(name)]
        codes.append(outcome(stage_module(case["stage"]).main, case["arguments"]))
        for restore in undo:
            restore()
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[1] + ".codes").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
    from peco_ds.command_line import leave

    leave(0)
