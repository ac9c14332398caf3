"""What a training step of a recipe's model costs on this device: forward, objective, backward, AdamW, without data and without DeepSpeed."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch

from peco_ds.config import PretrainRecipe
from peco_ds.data.loaders import Codes, masked_targets
from peco_ds.data.masking import draw_masked
from peco_ds.models.mim import build_mim
from peco_ds.objectives import build_objective

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class StepCost(NamedTuple):
    step_s: float  # median of a step with run.micro_batch pictures
    images_per_s: float
    saved_bytes: float  # a picture, kept from forward to backward
    spread: tuple[float, float]  # fastest and slowest step, seconds


class _Trainee:
    """A model of a recipe, and one batch of random pictures and codes."""

    def __init__(self, recipe: PretrainRecipe, device: torch.device) -> None:
        torch.manual_seed(0)
        model, mask, views, self.batch = recipe.model, recipe.mask, recipe.views, recipe.run.micro_batch
        dtype = DTYPES[recipe.run.precision]
        checkpointed = recipe.run.activation_checkpointing == "full"
        self.model = build_mim(model, recipe.encoding, recipe.aggregation, recipe.objective.num_codes, checkpoint_blocks=checkpointed).to(device, dtype)
        self.objective, self.optimizer = build_objective(recipe.objective), torch.optim.AdamW(self.model.parameters(), fused=device.type == "cuda")
        self.images = torch.randn(self.batch, 3, model.image_px, model.image_px, device=device)
        drawn = [draw_masked(seed=0, epoch=0, sample=i, grid=model.grid, kind=mask.kind, count=mask.count, min_block=mask.min_block, min_aspect=mask.min_aspect, exact=True) for i in range(self.batch)]
        self.masked = torch.stack([torch.from_numpy(places) for places in drawn]).to(device)
        patches, codes = model.grid**2, recipe.objective.num_codes
        soft = ()
        if views.topk:
            probs = torch.rand(self.batch, patches, views.topk, device=device)
            soft = torch.rand(self.batch, patches, codes, device=device).topk(views.topk).indices, probs / probs.sum(-1, keepdim=True)
        self.targets = masked_targets(Codes(torch.randint(codes, (self.batch, patches), device=device), *soft), self.masked)

    def forward(self) -> torch.Tensor:
        return self.objective(self.model(self.images, self.masked), self.targets)[0]

    def step(self) -> None:
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def saved_bytes(self) -> float:
        """Of storages that autograd keeps, each once, weights left out."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.forward()
        return sum(kept.values()) / self.batch


def step_costs(recipes: dict[str, PretrainRecipe], *, rounds: int = 9, warm_up: int = 2) -> dict[str, StepCost]:
    """Step by step by turns, so that whatever else the machine does falls on all of them alike."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainees = {name: _Trainee(recipe, device) for name, recipe in recipes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    for number in range(warm_up + rounds):
        for name, trainee in trainees.items():
            begun = time.perf_counter()
            trainee.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: StepCost(medians[name], trainee.batch / medians[name], trainee.saved_bytes(), (min(seconds[name]), max(seconds[name]))) for name, trainee in trainees.items()}
