"""What a training step of a recipe's model costs on this device: forward pass, objective, backward pass, AdamW; no data, no DeepSpeed."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peco_ds.config import PretrainRecipe
from peco_ds.data.loaders import Codes, masked_targets
from peco_ds.data.masking import draw_masked
from peco_ds.models.mim import build_mim
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
    flops_a_picture: int
    saved_bytes_a_picture: float = 0.0  # kept from the forward to the backward pass
    peak_bytes: int = 0  # of a step on the device, beyond weights, gradients and moments; 0 on a CPU
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def images_per_s(self) -> float:
        return self.batch / statistics.median(self.seconds)


def training_flops(recipe: PretrainRecipe) -> int:
    """Of a picture's forward and backward pass, as the planner counts them."""
    return mim_macs(recipe.model, num_codes=recipe.objective.num_codes, masked=recipe.mask.count, encoding=recipe.encoding, aggregation=recipe.aggregation).training_flops


def step_costs(recipes: dict[str, PretrainRecipe], *, rounds: int = 9) -> dict[str, StepCost]:
    """Step by step by turns, so that whatever else the machine does falls on all of them alike. Pictures and codes are drawn: values do not matter to the time.

    Args:
        rounds: steps of each that are counted; a step has run.micro_batch pictures.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainees = {name: _Trainee(recipe, device) for name, recipe in recipes.items()}
    for number in range(-WARM_UP, rounds):
        for trainee in list(trainees.values())[:: 1 if number % 2 else -1]:
            trainee.timed_step(counted=number >= 0)
    for trainee in trainees.values():
        trainee.cost.saved_bytes_a_picture = trainee.saved_bytes() / trainee.cost.batch
    return {name: trainee.cost for name, trainee in trainees.items()}


class _Trainee:
    """A model of a recipe, and one batch."""

    def __init__(self, recipe: PretrainRecipe, device: torch.device) -> None:
        torch.manual_seed(0)
        model, mask, views, batch, codes = recipe.model, recipe.mask, recipe.views, recipe.run.micro_batch, recipe.objective.num_codes
        self.device = device
        self.model = build_mim(model, recipe.encoding, recipe.aggregation, codes, checkpoint_blocks=recipe.run.activation_checkpointing == "full").to(device, DTYPES[recipe.run.precision]).train()
        self.objective, self.optimizer = build_objective(recipe.objective), build_optimizer(decay_groups(self.model, recipe.optim.weight_decay), recipe.optim, offloaded=False)
        self.cost = StepCost(batch, sum(parameter.numel() for parameter in self.model.parameters()), training_flops(recipe))
        self.images = torch.randn(batch, 3, model.image_px, model.image_px, device=device)
        drawn = [draw_masked(seed=0, epoch=0, sample=i, grid=model.grid, kind=mask.kind, count=mask.count, min_block=mask.min_block, min_aspect=mask.min_aspect) for i in range(batch)]
        self.masked = torch.stack([torch.from_numpy(places) for places in drawn]).to(device)
        patches, soft = model.grid**2, ()
        if views.topk:
            probs = torch.rand(batch, patches, views.topk, device=device)
            soft = torch.rand(batch, patches, codes, device=device).topk(views.topk).indices, probs / probs.sum(-1, keepdim=True)
        self.targets = masked_targets(Codes(torch.randint(codes, (batch, patches), device=device), *soft), self.masked)

    def forward(self) -> torch.Tensor:
        return self.objective(self.model(self.images, self.masked), self.targets)[0]

    def timed_step(self, *, counted: bool) -> None:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began, began_cpu = time.perf_counter(), time.process_time()
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # the gradients' memory is part of the state, not of a step
        if on_gpu:
            torch.cuda.synchronize()
            self.cost.peak_bytes = torch.cuda.max_memory_allocated() - before
        if counted:
            self.cost.seconds.append(time.perf_counter() - began)
            self.cost.cpu_seconds.append(time.process_time() - began_cpu)

    def saved_bytes(self) -> int:
        """Of storages that autograd keeps, each once, weights left out."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, tuple[int, torch.Tensor]] = {}  # the tensors too: a freed storage would give its address to another

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.forward()
        return sum(size for size, _ in kept.values())
