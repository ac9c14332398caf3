"""Real pictures for the tests, and one CPU thread a process so that files of tests can run beside launches."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class RealData:
    """Real photographs on disk: the shared packs where they lie, else those inside scikit-image's wheel."""

    imagenet: list[Path]  # JPEGs, one folder a class
    kodak: list[Path]  # PNGs
    imagenette_tar: Path | None


@pytest.fixture(scope="session")
def real_data() -> RealData:
    shared = Path(os.environ.get("PECO_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if shared.is_dir():
        return RealData(
            imagenet=sorted((shared / "imagenet_samples").glob("*/*.JPEG")),
            kodak=sorted((shared / "kodak").glob("*.png")),
            imagenette_tar=shared / "imagenette112.tar",
        )
    return wheel_photographs(Path(os.environ.get("PYTEST_TMPDIR", "/tmp")) / f"peco_photographs_{os.getpid()}")


def wheel_photographs(folder: Path) -> RealData:
    """128 overlapping JPEG tiles of the photographs in scikit-image's wheel, in 8 class folders, and the photographs as PNG."""
    import numpy as np
    import skimage
    from PIL import Image

    names = ("astronaut", "chelsea", "coffee", "motorcycle_left", "camera", "coins", "moon", "grass")
    jpegs, pngs = [], []
    for number, name in enumerate(names):
        picture = Image.open(Path(skimage.__file__).parent / "data" / f"{name}.png").convert("RGB")
        picture = picture.resize((512, 512))
        class_folder = folder / "imagenet" / f"n{number:08d}"
        class_folder.mkdir(parents=True, exist_ok=True)
        (folder / "kodak").mkdir(exist_ok=True)
        picture.save(folder / "kodak" / f"{name}.png")
        pngs.append(folder / "kodak" / f"{name}.png")
        for tile, corner in enumerate(np.random.default_rng(number).integers(0, 256, (16, 2))):
            left, top = map(int, corner)
            path = class_folder / f"n{number:08d}_{tile}.JPEG"
            picture.crop((left, top, left + 256, top + 256)).save(path, quality=92)
            jpegs.append(path)
    return RealData(imagenet=jpegs, kodak=pngs, imagenette_tar=None)
