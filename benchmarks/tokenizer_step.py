"""A training step of a tokenizer through DeepSpeed, over one batch that is there already.

Its judge or teacher has the size of the usual one, a ViT-B/16, and drawn weights, which do not matter to the time.
`benchmarks.run_gpu` has it as a part.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch
from timm.models.vision_transformer import VisionTransformer

from benchmarks.engine_step import fresh_compiler, join_alone
from benchmarks.guards import free_memory
from benchmarks.step_time import Turns, this_device
from peco_ds.config import TokenizerRecipe
from peco_ds.deepspeed_json import DS_CONFIGS, merge_deepspeed, read_deepspeed_json
from peco_ds.models.critic import with_critic
from peco_ds.models.tokenizers import build_tokenizer
from peco_ds.models.vit_feature_nets import VitFeatureNet
from peco_ds.objectives.tokenizer_losses import build_tokenizer_objective
from peco_ds.recipe_files import load_recipe
from peco_ds.registry import TOKENIZERS
from peco_ds.runtime.engine import start_engine

# by name: recipe, settings without which it asks for a file, settings that make it small
CASES = {
    "PeCo, f16 VQGAN": (
        "peco_tokenizer",
        "perceptual.weights=drawn",
        "tokenizer.channels=8 tokenizer.z_channels=8 tokenizer.code_dim=8 tokenizer.num_codes=64 run.micro_batch=2",
    ),
    "BEiT v2, VQ-KD": (
        "beitv2_tokenizer",
        "teacher.weights=drawn",
        "tokenizer.vit.width=48 tokenizer.vit.depth=2 tokenizer.vit.heads=3 tokenizer.vit.decoder_width=48 "
        "tokenizer.vit.decoder_depth=1 tokenizer.vit.decoder_heads=3 tokenizer.vit.target_width=24 run.micro_batch=2",
    ),
}
SMALL = "views.tokenizer_px=32 run.precision=fp32"
SMALL_VIT = "tokenizer.vit.image_px=32"
PASSES, STEPS, ROUNDS = 4, 1, 5
HEADS = ("tokenizer", "images a pass", "images/s", "passes of a step", "peak, GiB")


class TokenizerTrainer:
    """Engine, objective and batch of a tokenizer; a step has as many passes as the recipe accumulates."""

    def __init__(self, recipe: TokenizerRecipe, device: torch.device, *, small: bool) -> None:
        config = DS_CONFIGS / "zero1.json"
        torch.manual_seed(0)
        self.tokenizer = build_tokenizer(recipe.tokenizer).to(device)
        self.engine = start_engine(
            with_critic(self.tokenizer, recipe.adversarial).to(device).train(),
            merge_deepspeed(read_deepspeed_json(config), config, recipe.run, recipe.optim, 1),
            source=config,
            run=recipe.run,
            optim=recipe.optim,
        )
        self.objective = build_tokenizer_objective(recipe, drawn_network(recipe, small=small).to(device))
        side, self.batch = recipe.views.tokenizer_px, recipe.run.micro_batch
        self.images_11 = torch.rand(self.batch, 3, side, side, device=device) * 2 - 1
        self.passes = recipe.run.global_batch // recipe.run.micro_batch

    def step(self) -> None:
        for _ in range(self.passes):
            loss, _ = self.objective(self.engine(self.images_11), self.images_11, 0)
            self.engine.backward(loss)
            self.engine.step()
        self.tokenizer.codebook.update()

    def close(self) -> None:
        self.engine.destroy()
        self.engine = self.objective = self.tokenizer = None


def drawn_network(recipe: TokenizerRecipe, *, small: bool) -> VitFeatureNet:
    """A judge, or a teacher with the features that the recipe's tokenizer learns to give."""
    size = {"img_size": 32, "embed_dim": 48, "num_heads": 3} if small else {"img_size": 224}
    net, projection = VisionTransformer(num_classes=0, **size), None
    if TOKENIZERS[recipe.tokenizer.kind].learns_from == "teacher":
        projection = torch.randn(recipe.tokenizer.vit.target_width, net.embed_dim) * net.embed_dim**-0.5
    half = (0.5, 0.5, 0.5)
    network = VitFeatureNet(net, projection=projection, mean=half, std=half, description="drawn")
    network.precision = recipe.teacher.precision if projection is not None else recipe.perceptual.precision
    return network


def measured_cases(*, small: bool) -> Iterator[tuple[str, dict]]:
    """Each tokenizer's figures as it is measured; small ones for a CPU."""
    passes = 2 if small else PASSES
    join_alone()
    for name, (recipe_name, needed, cut) in CASES.items():
        vit = [SMALL_VIT] if "vit" in cut else []
        settings = [needed, *([*SMALL.split(), *cut.split(), *vit] if small else [])]
        recipe = load_recipe(TokenizerRecipe, recipe_name, settings).recipe
        recipe = replace(recipe, run=replace(recipe.run, global_batch=recipe.run.micro_batch * passes))
        fresh_compiler()
        yield name, measured(TokenizerTrainer(recipe, this_device(), small=small), rounds=1 if small else ROUNDS)
        free_memory()


def measured(trainer: TokenizerTrainer, *, rounds: int) -> dict:
    try:
        turns = Turns({"": trainer.step}, steps_a_turn=STEPS).run(rounds, warm_up=min(2, rounds))
        found = {"micro_batch": trainer.batch, "passes": trainer.passes}
        if turns.failed:
            return found | {"failure": turns.failed[""]}
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        images_s = trainer.batch * trainer.passes / statistics.median(turns.seconds[""])
        return found | {"images_s": images_s, "peak_bytes": peak}
    finally:
        trainer.close()


def cells(name: str, found: dict) -> list[str]:
    rate = found.get("failure") or f"{found['images_s']:.4g}"
    peak = f"{found['peak_bytes'] / 2**30:.1f}" if found.get("peak_bytes") else ""
    return [name, str(found["micro_batch"]), rate, str(found["passes"]), peak]
