"""What the planner counts of segmenters and detectors, against the operators that PyTorch's counter sees: full-size
networks on the meta device, where nothing is computed.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from peco_ds.config import DetectRecipe, SegmentRecipe
from peco_ds.models.mask_rcnn import build_detector
from peco_ds.models.segmenter import build_segmenter
from peco_ds.planner.dense import segment_segments
from peco_ds.planner.detection import POSITIVE_SHARE, detect_segments, forward_flops, image_shape
from peco_ds.recipe_files import load_recipe

CLASSES = {"detect": 80, "segment": 150}
DETECTORS = ("detect_vitb16", "detect_mcbeit_vitb16", "detect_vith16")


def flops_of(call):
    """FLOP that a counter sees, and what the call gives; the plain attention kernel, because it knows no other."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        found = call()
    return counter.get_total_flops(), found


@pytest.mark.parametrize("name", DETECTORS)
def test_flops_of_each_part_of_a_detector_are_those_a_counter_sees(name):
    recipe = load_recipe(DetectRecipe, name, []).recipe
    with torch.device("meta"):
        model = build_detector(recipe.model, recipe.detector, CLASSES["detect"]).eval()
        images = torch.empty(1, 3, *image_shape(recipe))
        channels, rois = recipe.detector.channels, recipe.detector.rois
        boxes, masks = torch.empty(rois, channels, 7, 7), torch.empty(int(rois * POSITIVE_SHARE), channels, 14, 14)
    seen = {}
    seen["backbone"], maps = flops_of(lambda: model.backbone(images))
    seen["pyramid"], levels = flops_of(lambda: model.pyramid(maps))
    seen["proposals"], _ = flops_of(lambda: model.rpn.head(list(levels)))
    heads = model.roi_heads
    seen["boxes"], _ = flops_of(lambda: heads.box_predictor(heads.box_head(boxes)))
    seen["masks"], _ = flops_of(lambda: heads.mask_predictor(heads.mask_head(masks)))
    planned = forward_flops(recipe.model, recipe.detector, CLASSES["detect"], image_shape(recipe))
    assert planned.keys() == seen.keys()
    for part in seen:
        assert planned[part] == pytest.approx(seen[part], rel=0.01), part
    assert sum(planned.values()) == pytest.approx(sum(seen.values()), rel=0.01)
    segments = detect_segments(recipe, CLASSES["detect"])
    assert sum(segment.forward.flops for segment in segments) == pytest.approx(sum(seen.values()), rel=0.01)


@pytest.mark.parametrize("name", ("segment_vitb16", "segment_vith14"))
def test_flops_of_a_segmenter_are_those_a_counter_sees(name):
    recipe = load_recipe(SegmentRecipe, name, []).recipe
    side = recipe.model.image_px
    with torch.device("meta"):
        model = build_segmenter(recipe.model, recipe.segmenter, CLASSES["segment"]).eval()
        images = torch.empty(2, 3, side, side)
        third = torch.empty(2, recipe.model.width, side // recipe.model.patch_px, side // recipe.model.patch_px)
    seen = flops_of(lambda: model(images))[0] + flops_of(lambda: model.auxiliary_head(third))[0]
    segments = segment_segments(recipe, CLASSES["segment"])
    assert 2 * sum(segment.forward.flops for segment in segments) == pytest.approx(seen, rel=0.01)
