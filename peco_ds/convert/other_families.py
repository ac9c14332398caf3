"""Files of models near BEiT that this backbone is not, each refused by its own name."""

from __future__ import annotations

import re

import torch

from peco_ds.errors import UserError

# Any of the patterns in the name of a tensor -> what the file is, and the remedy. The first that fits is taken.
_BY_TENSOR = (
    (r"beit3\.|.*\.self_attn\.[kqv]_proj\.[AB]\.|.*\bvision_embed\.", "a BEiT-3", "give a BEiT or BEiT v2"),
    (
        r"(decode_head|auxiliary_head)\.",
        "a segmentation model, as the releases named *toade20k",
        "give the BEiT that it was fine-tuned from",
    ),
    (
        r"(roi_head|rpn_head|bbox_head|mask_head)\.",
        "a detector of mmdetection",
        "give the BEiT that it was fine-tuned from",
    ),
    (
        r"rope\.freqs_|.*\.rope\.|.*\battn\.inner_attn_ln\.|blocks\.0\.mlp\.w[123]\.",
        "an EVA-02 (rotary positions, gated MLP)",
        "give a BEiT",
    ),
    (
        r"quantize\.|decode_task_layer\.",
        "a tokenizer, not a backbone",
        "make a release of it with import_tokenizer.py",
    ),
)
_EVA_WIDTH = 1408
# Numbers of a patch's CLIP features, which EVA's head regresses; no codebook of the family is so small.
_CLIP_WIDTHS = (512, 768, 1024)
_EVA_NAME = re.compile(r"(?<![a-z])eva(?![a-z])", re.IGNORECASE)


def refuse_other_families(tensors: dict[str, torch.Tensor], where: str, file: str) -> None:
    """
    Args:
        tensors: in the names of the file.  file: its name.
    Raises: UserError if names, widths or the file's name tell another model than a BEiT.
    """
    for pattern, what, remedy in _BY_TENSOR:
        found = next((name for name in tensors if re.match(pattern, name)), None)
        if found is not None:
            raise UserError(f"{where}: {what} (tensor {found[:80]}); {remedy}")
    if "pos_embed" not in tensors or any(name.endswith("relative_position_bias_table") for name in tensors):
        return
    head = tensors.get("lm_head.weight")
    regresses = head is not None and head.ndim == 2 and len(head) in _CLIP_WIDTHS
    wide = tensors["pos_embed"].shape[-1:] == (_EVA_WIDTH,)
    if "blocks.0.attn.q_bias" in tensors and (wide or regresses or _EVA_NAME.search(file)):
        raise UserError(
            f"{where}: an EVA-01 (absolute positions and no layer scale; its head regresses features of CLIP); give a "
            "BEiT"
        )
