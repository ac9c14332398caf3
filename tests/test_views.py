import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from peco_ds.config import ViewSettings
from peco_ds.data.views import (
    center_view,
    cut,
    draw_view,
    fault_of_views,
    jitter,
    room_for_cuts,
    to_backbone,
    to_tokenizer,
)
from peco_ds.schema import VIEW_COLUMNS

VIEWS = ViewSettings()


@pytest.fixture(scope="module")
def photograph(real_data):
    image = Image.open(real_data.imagenet[3]).convert("RGB")
    return image, torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def test_a_view_follows_from_seed_sample_and_view_alone():
    def draw(seed: int, sample: int, view: int):
        return draw_view(ViewSettings(seed=seed), 300, 400, sample=sample, view=view)

    assert len({tuple(draw(s, i, v)) for s in range(2) for i in range(5) for v in range(5)}) == 50
    assert np.array_equal(draw(1, 2, 3), draw(1, 2, 3))


@pytest.mark.parametrize("size", [(300, 400), (40, 500), (500, 33), (1, 1), (16, 16)])
def test_every_box_lies_inside_the_image_within_scale_and_ratio(size):
    for view in range(200):
        top, left, height, width, flip, *factors, order = draw_view(VIEWS, *size, sample=0, view=view)
        assert (
            top >= 0
            and left >= 0
            and height >= 1
            and width >= 1
            and top + height <= size[0]
            and left + width <= size[1]
        )
        assert flip in (0, 1) and all(0.6 <= f <= 1.4 for f in factors) and 0 <= order < 6
        if size == (300, 400):
            assert 0.07 < height * width / 120000 <= 1.0 and 0.73 < width / height < 1.37


def test_a_cut_is_the_crop_that_pil_makes(photograph):
    image, tensor = photograph
    row = draw_view(ViewSettings(flip=1.0), image.height, image.width, sample=0, view=4)
    top, left, height, width = (int(v) for v in row[:4])
    reference = (
        image.crop((left, top, left + width, top + height))
        .resize((224, 224), Image.BICUBIC)
        .transpose(Image.FLIP_LEFT_RIGHT)
    )
    ours = cut(tensor, row, 224).permute(1, 2, 0).numpy().astype(int)
    difference = np.abs(ours - np.asarray(reference).astype(int))
    assert difference.max() <= 2 and difference.mean() < 0.2


@pytest.mark.parametrize("size_px", [112, 32, 700])
def test_a_lanczos_cut_is_pils_pixel_for_pixel(photograph, size_px):
    image, tensor = photograph
    for view in range(4):
        row = draw_view(VIEWS, image.height, image.width, sample=1, view=view)
        top, left, height, width, flip = (int(v) for v in row[:5])
        reference = image.crop((left, top, left + width, top + height)).resize((size_px, size_px), Image.LANCZOS)
        reference = reference.transpose(Image.FLIP_LEFT_RIGHT) if flip else reference
        ours = cut(tensor, row, size_px, "lanczos")
        assert ours.dtype == torch.uint8 and ours.shape == (3, size_px, size_px)
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(reference))


def test_jitter_is_pils_on_the_same_crop(photograph):
    image, _ = photograph
    crop = image.crop((10, 10, 150, 150)).resize((64, 64))
    tensor = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None]
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    for number, order in enumerate(orders):
        factors = (0.7, 1.3, 1.35)
        reference = crop
        for operation in order:
            reference = enhancers[operation](reference).enhance(factors[operation])
        row = torch.tensor([[0, 0, 64, 64, 0, *factors, number]])
        difference = (jitter(tensor, row)[0].permute(1, 2, 0).int() - torch.from_numpy(np.array(reference)).int()).abs()
        assert difference.max() <= 3 and difference.float().mean() < 0.5, order


def test_a_replayed_view_does_not_depend_on_its_batch(photograph):
    _, tensor = photograph
    rows = np.stack([draw_view(VIEWS, *tensor.shape[1:], sample=0, view=v) for v in range(8)])
    crops = torch.stack([cut(tensor, row, 96) for row in rows])
    together = jitter(crops, torch.from_numpy(rows))
    for number in range(8):
        alone = jitter(cut(tensor, rows[number], 96)[None], torch.from_numpy(rows[number : number + 1]))
        assert torch.equal(alone[0], together[number])


def test_the_central_view_of_held_out_images_is_upright_and_unjittered(photograph):
    _, tensor = photograph
    row = center_view(*tensor.shape[1:])
    side = min(tensor.shape[1:])
    crop = cut(tensor, row, side)
    top, left = (tensor.shape[1] - side) // 2, (tensor.shape[2] - side) // 2
    assert torch.equal(crop, tensor[:, top : top + side, left : left + side])
    assert torch.equal(jitter(crop[None], torch.from_numpy(row)[None])[0], crop)


def test_value_ranges_are_those_the_networks_were_made_for():
    white, black = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    assert to_tokenizer(white).max() == 1 and to_tokenizer(black).min() == -1
    assert torch.allclose(
        to_backbone(white)[0, :, 0, 0], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    )


def test_a_row_survives_the_npy_format_exactly():
    row = draw_view(VIEWS, 3000, 4000, sample=0, view=0)
    buffer = io.BytesIO()
    np.save(buffer, row)
    buffer.seek(0)
    assert row.dtype == np.float32 and row.shape == (len(VIEW_COLUMNS),) and np.array_equal(np.load(buffer), row)


@pytest.mark.parametrize("size_px, interpolation", [(224, "bicubic"), (64, "bicubic"), (112, "lanczos")])
def test_a_cut_does_not_depend_on_how_the_images_memory_is_laid_out(photograph, size_px, interpolation):
    _, planes = photograph
    channels_last = planes.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for view in range(6):
        row = draw_view(ViewSettings(seed=1), *planes.shape[1:], sample=0, view=view)
        assert torch.equal(cut(planes, row, size_px, interpolation), cut(channels_last, row, size_px, interpolation))


def test_batches_of_either_memory_format_become_the_same_planes(photograph):
    _, tensor = photograph
    rows = np.stack([draw_view(VIEWS, *tensor.shape[1:], sample=0, view=v) for v in range(4)])
    channels_last = room_for_cuts(4, 64)
    for place, row in enumerate(rows):
        channels_last[place] = cut(tensor, row, 64)
    planes = channels_last.contiguous()
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    for function in (lambda images: jitter(images, torch.from_numpy(rows)), to_backbone, to_tokenizer):
        found = function(channels_last)
        assert found.is_contiguous() and torch.equal(found, function(planes))


def test_normalising_leaves_the_pixels_as_they_are():
    pixels = torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)
    to_backbone(pixels), to_tokenizer(pixels)
    assert (pixels == 7).all()


def test_the_grey_that_contrast_and_saturation_pivot_on_is_exact_for_every_colour():
    """Saturation 0 leaves the grey itself; against the fixed-point formula in whole numbers, for 262,144 colours."""
    levels = torch.arange(0, 256, 4)
    red, green, blue = torch.meshgrid(levels, levels, levels, indexing="ij")
    colours = torch.stack([red, green, blue]).reshape(1, 3, 512, 512)
    expected = (colours[:, 0] * 19595 + colours[:, 1] * 38470 + colours[:, 2] * 7471 + 32768) >> 16
    found = jitter(colours.to(torch.uint8), torch.tensor([[0, 0, 512, 512, 0, 1.0, 1.0, 0.0, 0]]))
    assert torch.equal(found.long(), expected.unsqueeze(1).expand(1, 3, 512, 512))


def test_a_fault_names_the_views_own_number():
    row = np.array([[0, 0.5, 4, 4, 0, 1, 1, 1, 0]], np.float32)
    assert fault_of_views(row).startswith("view 0 has the box") and fault_of_views(row, first=7).startswith(
        "view 7 has the box"
    )
    assert fault_of_views(np.zeros((2, len(VIEW_COLUMNS)), np.float32)) == ""
