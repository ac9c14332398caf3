import torch
from torch import nn

from peco_ds.evaluation.imagenet_subset import NUM_CLASSES, OfSomeClasses, imagenet_columns

# Imagenette: its synsets with their published numbers in ImageNet-1K.
IMAGENETTE = {
    "n01440764": 0,
    "n02102040": 217,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,
}


def test_synsets_are_found_in_imagenets_order_and_other_names_are_not():
    assert imagenet_columns(tuple(IMAGENETTE)) == list(IMAGENETTE.values())
    assert imagenet_columns(("n01440764", "tench")) is None and imagenet_columns(("n99999999",)) is None


def test_only_the_classes_of_the_set_are_chosen_among():
    logits = nn.Linear(4, NUM_CLASSES)
    x = torch.randn(3, 4)
    columns = list(IMAGENETTE.values())
    assert torch.equal(OfSomeClasses(logits, columns)(x), logits(x)[:, columns])
