"""What a training step of a recipe's model costs on this device: its batch, its FLOPs, its memory, steps by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from benchmarks.guards import free_memory, reason
from benchmarks.turns import by_turns
from peco_ds.config import MaskSettings, PretrainRecipe
from peco_ds.data.loaders import Codes, masked_targets
from peco_ds.data.masking import draw_masked
from peco_ds.models.mim import build_mim
from peco_ds.models.vit import TransformerBlock
from peco_ds.objectives import build_objective
from peco_ds.planner.shapes import mim_macs
from peco_ds.runtime.optim import build_optimizer, decay_groups

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WARM_UP = 2


@dataclass
class StepCost:
    """Of a recipe's model; the lists have an entry a counted step."""

    batch: int
    parameters: int
    flops_per_image: int
    saved_bytes_per_image: float = 0.0  # kept from the forward to the backward pass
    # of a step on the device, beyond weights, gradients and moments; 0 on a CPU
    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def images_per_s(self) -> float:
        return self.batch / statistics.median(self.seconds)


class DrawnBatch(NamedTuple):
    """Images and codes without meaning: values do not matter to the time."""

    images_norm: torch.Tensor  # [B, 3, S, S] float32
    masked: torch.Tensor  # int64 [B, M], by the recipe
    targets: object  # of the recipe's objective


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def training_flops(recipe: PretrainRecipe) -> int:
    """Of an image's forward and backward pass, as the planner counts them."""
    return mim_macs(
        recipe.model,
        num_codes=recipe.objective.num_codes,
        masked=recipe.mask.count,
        encoding=recipe.encoding,
        aggregation=recipe.aggregation,
    ).training_flops


def build_model(recipe: PretrainRecipe, device: torch.device) -> torch.nn.Module:
    """The recipe's model in training mode, float32.

    Made on the device, where drawing the weights of a large one takes no time.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = build_mim(
            recipe.model,
            recipe.encoding,
            recipe.aggregation,
            recipe.objective.num_codes,
            activation_checkpointing=recipe.run.activation_checkpointing,
        )
    return model.train()


def mask_of(mask: MaskSettings, grid: int, sample: int, seed: int = 0):
    """Masked positions of a sample in the first epoch."""
    return draw_masked(mask, grid, seed=seed, epoch=0, sample=sample)


def drawn_batch(recipe: PretrainRecipe, device: torch.device) -> DrawnBatch:
    """run.micro_batch images."""
    generator = torch.Generator().manual_seed(0)
    model, batch, codes, topk = recipe.model, recipe.run.micro_batch, recipe.objective.num_codes, recipe.views.topk
    images = torch.randn(batch, 3, model.image_px, model.image_px, generator=generator)
    # as many places in every image, so that they stack
    mask = replace(recipe.mask, exact=True)
    masked = torch.stack([torch.from_numpy(mask_of(mask, model.grid, sample)) for sample in range(batch)]).to(device)
    patches, soft = model.grid**2, ()
    if topk:
        probs = torch.rand(batch, patches, topk, generator=generator)
        likeliest = torch.rand(batch, patches, codes, generator=generator).topk(topk).indices
        soft = likeliest.to(device), (probs / probs.sum(-1, keepdim=True)).to(device)
    hard = torch.randint(codes, (batch, patches), generator=generator).to(device)
    return DrawnBatch(images.to(device), masked, masked_targets(Codes(hard, *soft), masked))


class Turns:
    """Steps of several trainers by turns.

    A trainer that fails is dropped with the reason; the others go on.

    Args:
        steps: a training step of each, by name.
        steps_a_turn: between two looks at the clock; the host waits for the device only there.
        give_up: is told the name of one that failed, to let go of its memory.
    """

    def __init__(
        self,
        steps: dict[str, Callable[[], object]],
        *,
        steps_a_turn: int = 1,
        give_up: Callable[[str], object] = lambda name: None,
    ) -> None:
        self.steps, self.steps_a_turn, self.give_up = dict(steps), steps_a_turn, give_up
        # of a step, an entry a counted turn
        self.seconds: dict[str, list[float]] = {name: [] for name in steps}
        # of all threads; tells more than the clock where others use the cores too
        self.cpu_seconds: dict[str, list[float]] = {name: [] for name in steps}
        # of the first step, with what it compiles and allocates
        self.first_s: dict[str, float] = {}
        self.failed: dict[str, str] = {}

    def run(self, rounds: int, warm_up: int = WARM_UP) -> Turns:
        for name in list(self.steps):
            self.first_s[name], _ = self._turn(name, 1)
        for counted, name in by_turns(self.steps, rounds, warm_up=warm_up - 1):
            seconds, cpu_seconds = self._turn(name, self.steps_a_turn)
            if counted and name in self.steps:
                self.seconds[name].append(seconds)
                self.cpu_seconds[name].append(cpu_seconds)
        return self

    def _turn(self, name: str, steps: int) -> tuple[float, float]:
        """Seconds a step, by the clock and of the CPU."""
        begun, begun_cpu = time.perf_counter(), time.process_time()
        try:
            for _ in range(steps):
                self.steps[name]()
            synchronize()
        except Exception as error:
            # of the libraries that are measured: one of them must not end the measurement of the others
            self.failed[name] = reason(error)
            del self.steps[name], error
            self.give_up(name)
            free_memory()
        return (time.perf_counter() - begun) / steps, (time.process_time() - begun_cpu) / steps


def step_memory(forward: Callable[[], torch.Tensor], learn: Callable[[torch.Tensor], object]) -> tuple[int, int]:
    """Memory of one step beyond what stood before it, bytes.

    Args:
        forward: gives the loss.  learn: takes it, backward pass and optimiser.
    Returns: what stands after the forward pass, outputs and what the backward pass needs, on a CPU of tensors alone;
        and the worst moment of the step, on a GPU alone, else 0.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = forward()
        kept = torch.cuda.memory_allocated() - before
        learn(loss)
        torch.cuda.synchronize()
        return kept, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = forward()
    learn(loss)
    return sum(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"), 0


def step_costs(recipes: dict[str, PretrainRecipe], *, rounds: int = 9) -> dict[str, StepCost]:
    """Steps of the recipes' models by turns: forward pass, objective, backward pass, AdamW; no data, no ZeRO.

    Args:
        rounds: steps of each that are counted; a step has run.micro_batch images.
    """
    trainees = {name: _Trainee(recipe, this_device()) for name, recipe in recipes.items()}
    for counted, name in by_turns(trainees, rounds, warm_up=WARM_UP):
        trainees[name].timed_step(counted=counted)
    for trainee in trainees.values():
        trainee.cost.saved_bytes_per_image = trainee.saved_bytes() / trainee.cost.batch
    return {name: trainee.cost for name, trainee in trainees.items()}


class _Trainee:
    """A model of a recipe, and one batch."""

    def __init__(self, recipe: PretrainRecipe, device: torch.device) -> None:
        # brings DeepSpeed along, which others of this file's users do without
        from peco_ds.runtime.engine import compile_each, compiles

        self.model = build_model(recipe, device).to(DTYPES[recipe.run.precision])
        if compiles(recipe.run):
            compile_each(self.model, (TransformerBlock,))
        groups = decay_groups(self.model, recipe.optim.weight_decay)
        self.optimizer = build_optimizer(groups, recipe.optim, offloaded=False)
        self.objective, self.batch = build_objective(recipe.objective), drawn_batch(recipe, device)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.cost = StepCost(recipe.run.micro_batch, parameters, training_flops(recipe))

    def forward(self) -> torch.Tensor:
        return self.objective(self.model(self.batch.images_norm, self.batch.masked), self.batch.targets)[0]

    def timed_step(self, *, counted: bool) -> None:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        begun, begun_cpu = time.perf_counter(), time.process_time()
        self.forward().backward()
        self.optimizer.step()
        # the gradients' memory is part of the state, not of a step
        self.optimizer.zero_grad(set_to_none=False)
        if on_gpu:
            torch.cuda.synchronize()
            self.cost.peak_bytes = torch.cuda.max_memory_allocated() - before
        if counted:
            self.cost.seconds.append(time.perf_counter() - begun)
            self.cost.cpu_seconds.append(time.process_time() - begun_cpu)

    def saved_bytes(self) -> int:
        """Of storages that autograd keeps, each once, weights left out."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        # the tensors too: a freed storage would give its address to another
        kept: dict[int, tuple[int, torch.Tensor]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.forward()
        return sum(size for size, _ in kept.values())
