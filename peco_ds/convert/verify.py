"""Load a release by the target library's own loader, in a process that cannot import us, and compare what comes out."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from peco_ds.errors import UserError

TOLERANCE = 1e-5  # float32, largest difference over largest value; worst case seen on B/16 and H-wide models: 2e-6

_TIMM = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peco_ds":
            raise ImportError("a release must load without peco_ds")
sys.meta_path.insert(0, Refuse())
import numpy, timm, torch
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
with torch.no_grad():
    numpy.save(sys.argv[3], model.forward_features(torch.from_numpy(numpy.load(sys.argv[2]))).numpy())
"""


def compare_with_timm(release: Path, images_norm: torch.Tensor, features: torch.Tensor) -> float:
    """Largest difference between the release in timm and the trained model, relative to the largest feature.

    Args:
        images_norm: float32 [B, 3, S, S].  features: float32 [B, 1 + N, D] of our model with the checkpoint's consolidated weights, nothing hidden.
    Raises: UserError if timm cannot load the release, or the difference exceeds TOLERANCE.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "images.npy", Path(folder) / "features.npy"
        np.save(inputs, images_norm.numpy())
        # -I: no PYTHONPATH and no current folder, as on a stranger's machine
        done = subprocess.run([sys.executable, "-I", "-c", _TIMM, str(release.resolve()), str(inputs), str(outputs)], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{release}: timm does not load it: {done.stderr.strip().splitlines()[-1]}")
        theirs = torch.from_numpy(np.load(outputs))
    difference = float((theirs - features).abs().max() / features.abs().max())
    if not difference <= TOLERANCE:
        raise UserError(f"{release}: features in timm differ from the trained model's by {difference:.1e}, more than {TOLERANCE:.0e}; do not publish it")
    return difference
