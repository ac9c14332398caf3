"""A release folder: weights, the target library's config, and a model card that says where the weights come from."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from peco_ds.config import PretrainRecipe
from peco_ds.schema import write_json

WEIGHTS = "model.safetensors"
HEAD = "mim_head.safetensors"  # mask token and token head, which timm has no place for


def write_release(out: Path, backbone: dict[str, torch.Tensor], head: dict[str, torch.Tensor], config: dict, *, recipe: PretrainRecipe, progress, provenance: dict, metrics: dict) -> None:
    """Write `model.safetensors`, `config.json`, `mim_head.safetensors`, `README.md`; config.json last, so a folder with one is whole.

    Args:
        progress: has `.step` and `.cursor.samples`.  provenance: of the run folder.  metrics: last logged row, may be empty.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)
    for name, tensors in ((WEIGHTS, backbone), (HEAD, head)):
        temporary = out / f".{name}.{os.getpid()}.tmp"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
        os.replace(temporary, out / name)
    (out / "README.md").write_text(model_card(recipe, progress, provenance, metrics))
    write_json(out / "config.json", config)


def model_card(recipe: PretrainRecipe, progress, provenance: dict, metrics: dict) -> str:
    """Markdown with the front matter that model hubs read."""
    model, tokenizer = recipe.model, provenance.get("tokenizer", {})
    facts = [
        ("recipe", recipe.name),
        ("backbone", f"ViT, width {model.width}, depth {model.depth}, {model.heads} heads, patch {model.patch_px} at {model.image_px} px"),
        ("objective", f"{recipe.objective.name}, {recipe.objective.num_codes} codes, {recipe.mask.count} of {model.grid**2} patches hidden ({recipe.mask.kind})"),
        ("optimiser steps", f"{progress.step}"),
        ("images seen", f"{progress.cursor.samples}"),
        ("images", f"{provenance.get('num_samples', '?')} pictures, fingerprint `{provenance.get('images_fingerprint', '?')}`"),
        ("tokenizer", f"fingerprint `{provenance.get('tokenizer_fingerprint', '?')}`"),
        ("tokenizer's judge", tokenizer.get("judge", "not recorded")),
        ("code", f"peco_ds, commit `{provenance.get('commit', '?')}`"),
    ]
    facts += [(name, f"{metrics[name]:.4f}") for name in ("loss", "accuracy") if name in metrics]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    return f"""---
library_name: timm
tags:
- image-feature-extraction
- timm
license: other
---
# {recipe.name}

Masked pre-trained vision transformer (PeCo, arXiv 2111.12710; BEiT, arXiv 2106.08254), no classifier.

| | |
|---|---|
{table}

```python
import timm

model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True)               # features: class token, then patches
classifier = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True, num_classes=1000)
```

Input: {model.image_px} px, RGB, ImageNet mean and standard deviation. `{HEAD}` holds the mask token and the token head.

Licence: to be stated by whoever publishes these weights. It is bound by the terms of the pictures and of the tokenizer's judge, if it had one
(the weights that MoCo v3 released are CC BY-NC 4.0).
"""
