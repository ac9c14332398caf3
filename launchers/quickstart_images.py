"""Lay the photographs inside scikit-image's wheel into a folder: the default images of quickstart.sh."""

import shutil
import sys
from pathlib import Path

import skimage

# Photographs only, each motif once; the wheel's drawings, plots and pages of text are left out.
NAMES = (
    "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
    "hubble_deep_field.jpg ihc.png moon.png "
    "motorcycle_left.png retina.jpg rocket.jpg clock_motion.png"
).split()

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
source = Path(skimage.__file__).parent / "data"
for name in NAMES:
    # which images the wheel holds changes between its versions
    if (source / name).is_file():
        shutil.copyfile(source / name, folder / name)
sys.stdout.write(f"{len(list(folder.iterdir()))} photographs of scikit-image {skimage.__version__}\n")
