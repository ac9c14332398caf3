"""pretrain.py's step through DeepSpeed, over one batch that is there already."""

from __future__ import annotations

import contextlib
import functools
import gc
import signal
from pathlib import Path

import torch
from deepspeed.runtime.zero import parameter_offload
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

from benchmarks.step_time import build_model, drawn_batch
from peco_ds.config import PretrainRecipe
from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
from peco_ds.models.vit import TransformerBlock
from peco_ds.objectives import build_objective
from peco_ds.runtime.distributed import start_world
from peco_ds.runtime.engine import start_engine

# TORCHDYNAMO_DISABLE switches it off without a word
NOTHING_COMPILED = "torch.compile was asked for and compiled nothing"


class EngineTrainer:
    """An engine and its batch; a step has as many forward and backward passes as the recipe accumulates.

    Args:
        config: JSON of ds_configs.
        changed: values over it, once it is merged with the recipe: keys of zero_optimization, or of the JSON itself.
        leaves: whether ZeRO-3 gathers blocks as wholes.
        weights: of the model; None: fresh ones.
    """

    def __init__(
        self,
        recipe: PretrainRecipe,
        config: Path,
        device: torch.device,
        *,
        world_size: int = 1,
        changed: dict | None = None,
        leaves: bool = True,
        weights: dict | None = None,
    ) -> None:
        self.ds_config = ds_config = merge_deepspeed(
            read_deepspeed_json(config), config, recipe.run, recipe.optim, world_size
        )
        for key, value in (changed or {}).items():
            part = ds_config if key == "communication_data_type" else ds_config["zero_optimization"]
            part[key] = value
        model = build_model(recipe, device)
        if weights is not None:
            model.load_state_dict(weights)
        linear = torch.nn.functional.linear
        try:
            self.engine = start_engine(
                model,
                ds_config,
                source=config,
                run=recipe.run,
                optim=recipe.optim,
                leaf_modules=(TransformerBlock,) if leaves else (),
            )
        finally:
            # ZeRO-3 puts a function of its own in the place of torch's for the rest of the process: what else is
            # measured there must not run it.
            self._linear, torch.nn.functional.linear = torch.nn.functional.linear, linear
        self.passes = recipe.run.global_batch // (recipe.run.micro_batch * world_size)
        self.objective, self.batch = build_objective(recipe.objective), drawn_batch(recipe, device)

    def forward(self) -> torch.Tensor:
        """The loss, on the device."""
        with self._with_linear():
            return self.objective(self.engine(self.batch.images_norm, self.batch.masked), self.batch.targets)[0]

    def learn(self, loss: torch.Tensor) -> None:
        with self._with_linear():
            self.engine.backward(loss)
            self.engine.step()

    def earlier_passes(self) -> None:
        """All passes of a step but the last, after which the optimiser moves."""
        for _ in range(self.passes - 1):
            self.learn(self.forward())

    def step(self) -> torch.Tensor:
        """The loss before the step, on the device."""
        self.earlier_passes()
        loss = self.forward()
        self.learn(loss)
        return loss.detach()

    def close(self) -> None:
        self.engine.destroy()
        self.engine = self.batch = None
        # ZeRO-3 keeps its model, and with it all of the optimiser, in two places of the process.
        parameter_offload.FWD_MODULE_STACK.clear()
        for thing in gc.get_objects():
            if type(thing) is functools._lru_cache_wrapper and str(thing.__module__).startswith("deepspeed."):
                thing.cache_clear()

    @contextlib.contextmanager
    def _with_linear(self):
        torchs, torch.nn.functional.linear = torch.nn.functional.linear, self._linear
        try:
            yield
        finally:
            torch.nn.functional.linear = torchs


def join_alone() -> None:
    """Join a group of one rank; a training run answers stop signals at the end of its step, a benchmark at once."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    start_world()
    for number, handler in kept.items():
        signal.signal(number, handler)


def fresh_compiler() -> None:
    """Forget compiled graphs and counts of what was measured before."""
    torch._dynamo.reset()
    counters.clear()
    clear_compilation_metrics()


def compiler_facts() -> tuple[int, int, int]:
    """Since `fresh_compiler`: graphs, graph breaks, and how often something was compiled again for other shapes or
    values.
    """
    ids = {str(metrics.compile_id) for metrics in get_compilation_metrics() if metrics.compile_id}
    again = sum(map(recompilation, ids))
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), again


def recompilation(compile_id: str) -> bool:
    """Of an id of torch.compile: FRAME/TIMES_COMPILED_BEFORE, with an ending that counts attempts."""
    return compile_id.split("/")[-1].split("_")[0] != "0"
