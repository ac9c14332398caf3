"""A training stage of somebody else's: predict by which quarter turn an image was rotated (RotNet, arXiv 1803.07728).

    python rotation_stage.py --recipe rotation.yaml --out runs/rotation data.root=...

It stands outside the package and is as long as a stage has to be.
"""

from __future__ import annotations

from dataclasses import field

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import nn

from peco_ds import command_line
from peco_ds.config import (
    CheckpointSettings,
    DataSettings,
    OptimSettings,
    RunSettings,
    ScheduleSettings,
    ViewSettings,
)
from peco_ds.data.image_set import ImageSet
from peco_ds.data.loaders import crop_batches, training_order
from peco_ds.data_paths import data_path
from peco_ds.runtime.run import Run

TURNS = 4


@dataclass(frozen=True)
class RotationRecipe:
    name: str = "rotation"
    width: int = 16
    data: DataSettings = field(default_factory=DataSettings)
    views: ViewSettings = field(default_factory=ViewSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    run: RunSettings = field(default_factory=RunSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)


class RotationNet(nn.Module):
    """images_11 [B, 3, S, S] -> logits [B, TURNS]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.ReLU(), nn.Conv2d(width, width, 3, 2), nn.ReLU())
        self.head = nn.Linear(width, TURNS)

    def forward(self, images_11: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images_11).mean(dim=(2, 3)))


def train(args, resolved) -> int:
    cfg = resolved.recipe
    images = ImageSet(data_path(cfg.data, cfg.data.images))
    order = training_order(images, cfg.data, cfg.run.seed)
    with Run.start(args, resolved, "rotation", images, num_samples=order.num_samples) as run:
        run.seed_weights()
        run.attach(RotationNet(cfg.width), training_flops=0.0)
        batches = crop_batches(images, order, run.positions(), cfg, run.world.device, run.bad_images)
        for _ in run.steps():
            for batch in run.micro_batches(batches):
                turns = torch.arange(len(batch.images_11)) % TURNS
                turned = torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(batch.images_11, turns)])
                logits = run.engine(turned)
                loss = F.cross_entropy(logits.float(), turns)
                run.backward(loss, {"accuracy": (logits.argmax(dim=1) == turns).float().mean()}, batch.keys)
            run.finish_step()
    return run.exit_code


def main(argv: list[str] | None = None) -> int:
    parser = command_line.stage_parser(__doc__.splitlines()[0], recipe="rotation.yaml", deepspeed_config="zero1.json")
    return train(*command_line.parse_stage(parser, RotationRecipe, argv))


if __name__ == "__main__":
    command_line.run(main)
