from types import SimpleNamespace

import pytest
import torch

from peco_ds.config import DataSettings
from peco_ds.data.central_squares import square_batches
from peco_ds.data.image_set import ImageSet
from peco_ds.data.loaders import held_out_images

CPU = torch.device("cpu")


@pytest.mark.parametrize("world_size, batch, num_workers", [(1, 10, 0), (2, 7, 0), (3, 64, 1)])
def test_every_square_comes_once_over_all_ranks_as_the_training_of_a_tokenizer_cuts_it(
    small_sets, world_size, batch, num_workers
):
    images = ImageSet(small_sets.root / "images" / "train")
    expected = held_out_images(images, DataSettings(root=str(small_sets.root), val_images="images/train"), 10**6, 32)
    expected = expected.images_u8
    seen, lengths = {}, set()
    for rank in range(world_size):
        world = SimpleNamespace(rank=rank, size=world_size, device=CPU)
        batches = list(square_batches(images, 32, world, batch=batch, num_workers=num_workers))
        lengths.add(tuple(len(each.samples) for each in batches))
        for each in batches:
            for image, label, sample in zip(each.images_01, each.labels.tolist(), each.samples.tolist()):
                if sample >= 0:
                    assert sample not in seen
                    seen[sample] = label
                    assert torch.equal(image, expected[sample].float() / 255)
    assert sorted(seen) == list(range(96)) and seen == {sample: images.label(sample) for sample in seen}
    assert len(lengths) == 1, "equal batches on every rank"
