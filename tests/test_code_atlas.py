"""Atlas of a tokenizer whose codes are colours, on images that are painted patch by patch: every count is known."""

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, run_stage
from PIL import Image
from scipy.stats import binomtest

from peco_ds.config import TokenizerSettings, TokenizerVitSettings
from peco_ds.data.image_set import ImageSet
from peco_ds.errors import UserError
from peco_ds.evaluate import main
from peco_ds.evaluation.atlas_picture import OUTLINE, atlas_picture, readable_class
from peco_ds.evaluation.code_atlas import EXAMPLES, SHOWN, AtlasSums, class_numbers, wilson_bound
from peco_ds.models.tokenizers import build_tokenizer, save_tokenizer
from peco_ds.pack_images import main as pack

CPU = torch.device("cpu")
# Code -> the colour of its patches.
COLOURS = np.array(
    [
        *((40, 40, 40), (230, 30, 30), (30, 200, 30), (30, 30, 230), (220, 30, 220)),
        *((20, 210, 220), (240, 240, 240), (120, 60, 10)),
    ],
    dtype=np.uint8,
)
CLASSES = ("heron", "mill", "tram")
EACH, GRID, PATCH_PX = 12, 4, 8


def painted():
    """(class, codes [GRID, GRID]) of every image.

    Code 0 is the ground; the classes have codes 1 to 3 to themselves, the first two share code 4; 5 is in half of the
    last class, 6 in two images alone, and 7 in none.
    """
    images = []
    for label in range(len(CLASSES)):
        for number in range(EACH):
            codes = [label + 1] * 3
            codes += (
                [4] * (label < 2) + [5] * (label == 2 and number < EACH // 2) + [6, 6] * (label == 0 and number < 2)
            )
            codes += [0] * (GRID**2 - len(codes))
            images.append((label, np.random.default_rng(len(images)).permutation(codes).reshape(GRID, GRID)))
    return images


def patchwise_tokenizer(kind):
    """A ViT in which no patch sees another or its own place, with the codes of the colours: settings, weights."""
    settings = TokenizerSettings(
        kind=kind,
        num_codes=len(COLOURS),
        code_dim=8,
        l2_normalized=True,
        vit=TokenizerVitSettings(
            image_px=GRID * PATCH_PX,
            patch_px=PATCH_PX,
            width=32,
            depth=1,
            heads=2,
            decoder_width=32,
            decoder_depth=1,
            decoder_heads=2,
            target_width=16,
        ),
    )
    torch.manual_seed(0)
    tokenizer = build_tokenizer(settings).eval()
    with torch.no_grad():
        tokenizer.encoder.pos_embed.zero_()
        for block in tokenizer.encoder.blocks:
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight.zero_()
                last.bias.zero_()
        for layer in (tokenizer.encoder.patch_embed.proj, tokenizer.to_code[0], tokenizer.to_code[2]):
            layer.weight.normal_(std=0.3)
        plain = torch.from_numpy(COLOURS).float().div(127.5).sub(1)[:, :, None, None]
        features = tokenizer.encode(plain.expand(-1, -1, GRID * PATCH_PX, GRID * PATCH_PX))
        tokenizer.codebook.start_at(F.normalize(features[:, :, 0, 0]))
    return settings, tokenizer.state_dict()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """images/labelled, images/unlabelled, and a release of a tokenizer that makes images and of one that makes none."""
    root = tmp_path_factory.mktemp("atlas")
    for number, (label, codes) in enumerate(painted()):
        pixels = COLOURS[codes].repeat(PATCH_PX, axis=0).repeat(PATCH_PX, axis=1)
        for path in (root / "raw" / CLASSES[label] / f"{number:02d}.png", root / "flat" / f"{number:02d}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    for source, name, labels in (("raw", "labelled", "folders"), ("flat", "unlabelled", "none")):
        out = root / "images" / name
        pack(["--images", str(root / source), "--out", str(out), "--labels", labels, "--workers", "1"])
    for kind in ("vqvit", "vqkd"):
        settings, weights = patchwise_tokenizer(kind)
        save_tokenizer(root / kind, weights, settings, {"judge": "none"})
    return root


@pytest.fixture(scope="module")
def measured(root):
    """(name, ranks) -> the `atlas` of the result and the picture's pixels."""
    cases = {
        1: {
            "labelled": ["vqvit", "labelled", "--batch", "5"],
            "features": ["vqkd", "labelled", "--batch", "64"],
            "unlabelled": ["vqvit", "unlabelled"],
        },
        2: {"labelled": ["vqvit", "labelled", "--batch", "7"]},
    }
    found = {}
    for ranks, chosen in cases.items():
        starts = [
            {
                "stage": "evaluate",
                "arguments": [
                    *(str(root / tokenizer), "--images", str(root / "images" / images), "--num_workers", "0", *more),
                    *("--out", str(root / f"{name}_{ranks}.json"), "--atlas", str(root / f"{name}_{ranks}.png")),
                ],
            }
            for name, (tokenizer, images, *more) in chosen.items()
        ]
        listing = root / f"cases_{ranks}.json"
        listing.write_text(json.dumps(starts))
        done = run_stage(str(REPOSITORY / "tests" / "many_runs.py"), listing, ranks=ranks)
        assert json.loads((root / f"cases_{ranks}.json.codes").read_text()) == [0] * len(starts)
        found["lines", ranks] = done.stdout
        for name in chosen:
            written = json.loads((root / f"{name}_{ranks}.json").read_text())
            found[name, ranks] = written["atlas"], np.asarray(Image.open(root / f"{name}_{ranks}.png"))
    return found


def test_codes_are_sorted_into_common_rare_and_pure_ones_with_their_counts(measured):
    atlas, _ = measured["labelled", 1]
    painted_codes = np.stack([codes for _, codes in painted()])
    counts = Counter(painted_codes.ravel().tolist())
    listed = {name: [code["code"] for code in atlas[name]] for name in ("commonest", "rarest", "purest")}
    # Of equal ones the smaller code comes first; 6 is in two images only.
    assert listed == {"commonest": [0, 1, 2, 3, 4, 5, 6], "rarest": [5, 4, 1, 2, 3, 0], "purest": [1, 2, 3, 5, 4, 0]}
    for code in atlas["commonest"]:
        number = code["code"]
        assert code["patches"] == counts[number] and code["share"] == counts[number] / painted_codes.size
        assert code["images"] == int((painted_codes == number).any(axis=(1, 2)).sum())
    by_code = {code["code"]: code for code in atlas["commonest"]}
    assert by_code[2]["classes"] == [{"class": "mill", "share": 1.0}]
    assert by_code[4]["classes"] == [{"class": "heron", "share": 0.5}, {"class": "mill", "share": 0.5}]
    assert by_code[5]["purity_bound"] == pytest.approx(binomtest(6, 6).proportion_ci(method="wilson").low)
    assert atlas["summary"]["codes_used"] == 7 and atlas["summary"]["codes_in_few_images"] == 1


def test_examples_are_patches_of_their_code_from_different_images(root, measured):
    images = ImageSet(root / "images" / "labelled")
    sample_of = {images.key(sample): sample for sample in range(images.num_samples)}
    for code in measured["labelled", 1][0]["commonest"]:
        keys = [example["image"] for example in code["examples"]]
        assert len(set(keys)) == len(keys) == min(EXAMPLES, code["images"])
        for example in code["examples"]:
            _, image = images.decode(sample_of[example["image"]])
            patch = image[:, example["row"] * PATCH_PX, example["column"] * PATCH_PX]
            assert patch.tolist() == COLOURS[code["code"]].tolist()


def outlined(pixels):
    """Colours in the middle of the outlined patches, row by row of the picture."""
    side = 32
    is_outline = (pixels == np.array([int(OUTLINE[start : start + 2], 16) for start in (1, 3, 5)])).all(axis=2)
    begins = is_outline.copy()
    begins[1:] &= ~is_outline[:-1]
    begins[:, 1:] &= ~is_outline[:, :-1]
    return [pixels[y + side // 2, x + side // 2].astype(int) for y, x in np.argwhere(begins)]


@pytest.mark.parametrize("name", ["labelled", "features", "unlabelled"])
def test_the_picture_outlines_a_patch_of_the_code_in_every_tile(measured, name):
    atlas, pixels = measured[name, 1]
    assert pixels.shape[1] <= 1600
    expected = Counter(
        code["code"] for section in atlas.keys() - {"summary"} for code in atlas[section] for _ in code["examples"]
    )
    found = Counter()
    for colour in outlined(pixels):
        distances = np.abs(COLOURS.astype(int) - colour).max(axis=1)
        assert distances.min() <= 12, "resizing lets neighbours shine through a little"
        found[int(distances.argmin())] += 1
    assert found == expected


def test_atlas_and_picture_do_not_depend_on_ranks_or_batch_and_need_no_reconstructions(measured):
    one, two, features = (measured[case] for case in (("labelled", 1), ("labelled", 2), ("features", 1)))
    assert one[0] == two[0] == features[0]
    assert np.array_equal(one[1], two[1])
    # The fingerprint in the title differs.
    assert not np.array_equal(one[1], features[1]) and np.array_equal(one[1][80:], features[1][80:])


def test_a_set_without_labels_has_no_purest_codes_and_no_classes(measured):
    atlas, pixels = measured["unlabelled", 1]
    assert atlas.keys() == {"summary", "commonest", "rarest"} and "class_bits" not in atlas["summary"]
    assert all("classes" not in code and "purity_bound" not in code for code in atlas["commonest"])
    labelled, labelled_pixels = measured["labelled", 1]
    places = [[(c["code"], c["share"]) for c in each["commonest"]] for each in (atlas, labelled)]
    assert places[0] == places[1] and len(pixels) < len(labelled_pixels)
    lines = [line for line in measured["lines", 1].splitlines() if line.endswith(".json")]
    assert "no labels, so no classes of codes" in lines[2] and "bits of the class, purity" in lines[0]


# ------------------------------------------------------------------------------------------- the numbers


def atlas_of(codes, labels, classes, *, world_size, batch, num_codes, grid):
    """The atlas that ranks, here threads, make of images dealt out in batches; the same on all."""
    handed, meeting = [None] * world_size, threading.Barrier(world_size)

    def rank_atlas(rank):
        def gather(value):
            handed[rank] = value
            meeting.wait()
            values = list(handed)
            meeting.wait()
            return values

        def all_reduce(tensor):
            return torch.stack(gather(tensor)).sum(dim=0, dtype=tensor.dtype)

        sums = AtlasSums(num_codes, grid, classes, CPU)
        for start in range(rank * batch, len(codes), world_size * batch):
            samples = torch.arange(start, start + batch)
            samples[samples >= len(codes)] = -1
            sums.add(codes[samples], labels[samples], samples)
        return sums.result(SimpleNamespace(size=world_size, all_reduce=all_reduce, gather_objects=gather))

    with ThreadPoolExecutor(world_size) as pool:
        first, *others = pool.map(rank_atlas, range(world_size))
    assert all(other == first for other in others)
    return first


def random_codes(images, grid, num_codes, num_classes):
    draw = np.random.default_rng(0)
    codes = torch.from_numpy((num_codes * draw.random((images, grid**2)) ** 2).astype(np.int64))
    return codes, torch.from_numpy(draw.integers(num_classes, size=images))


@pytest.mark.parametrize("world_size, batch", [(1, 1), (2, 7), (3, 16)])
def test_any_division_gives_the_same_atlas_whose_counts_are_those_of_a_loop(world_size, batch):
    codes, labels = random_codes(60, 3, 40, 4)
    classes, sizes = ("a", "b", "c", "d"), dict(num_codes=40, grid=3)
    whole = atlas_of(codes, labels, classes, world_size=1, batch=60, **sizes)
    assert atlas_of(codes, labels, classes, world_size=world_size, batch=batch, **sizes) == whole
    carriers = {code: (codes == code).any(dim=1) for code in range(40)}
    patches = {code: int((codes == code).sum()) for code in range(40)}
    usual = [code for code in carriers if carriers[code].sum() >= EXAMPLES]
    assert [each.code for each in whole.sections["rarest"]] == sorted(usual, key=lambda code: patches[code])[:SHOWN]
    for each in (code for codes in whole.sections.values() for code in codes):
        by_class = Counter(int(labels[i]) for i, row in enumerate(codes.tolist()) for code in row if code == each.code)
        assert each.patches == patches[each.code] and each.images == int(carriers[each.code].sum())
        assert dict(each.classes) == pytest.approx(
            {name: by_class[classes.index(name)] / each.patches for name, _ in each.classes}
        )
        assert max(by_class.values()) / each.patches == each.classes[0][1]
        for sample, row, column in each.examples:
            assert codes[sample, 3 * row + column] == each.code
        assert len({example.sample for example in each.examples}) == len(each.examples) == min(each.images, EXAMPLES)


def test_examples_are_drawn_from_the_whole_set():
    codes, labels = torch.zeros(1000, 4, dtype=torch.int64), torch.zeros(1000, dtype=torch.int64)
    (code,) = atlas_of(codes, labels, (), world_size=1, batch=100, num_codes=2, grid=2).sections["commonest"]
    samples = [example.sample for example in code.examples]
    assert min(samples) < 700 and max(samples) > 300 and samples != sorted(samples)
    assert len({(example.row, example.column) for example in code.examples}) > 1


def numbers_of(codes, labels, num_codes, num_classes):
    """`class_numbers` with even and odd images as halves."""
    patches, images = np.zeros((2, num_codes, num_classes), dtype=np.int32), np.zeros((2, num_codes), dtype=np.int32)
    for sample, row in enumerate(codes.tolist()):
        for code in row:
            patches[sample % 2, code, labels[sample]] += 1
        for code in set(row):
            images[sample % 2, code] += 1
    return class_numbers(patches, images)


def test_codes_that_name_the_class_tell_all_of_its_bits():
    labels = torch.arange(800) // 2 % 4
    found = numbers_of(labels[:, None].repeat(1, 3), labels, 4, 4)
    assert found["class_bits"] == pytest.approx(2) and found["information_bits"] == pytest.approx(2)
    assert 1.95 < found["held_out_information_bits"] <= 2
    assert found["purity"] == found["held_out_purity"] == 1 and found["commonest_class"] == 0.25


def test_codes_that_have_nothing_to_do_with_the_class_seem_to_tell_of_it_only_where_they_were_counted():
    codes, labels = random_codes(200, 3, 300, 4)
    found = numbers_of(codes, labels, 300, 4)
    assert found["information_bits"] > 0.2 and found["purity"] > 0.4
    assert found["held_out_information_bits"] < 0.01 and abs(found["held_out_purity"] - 0.25) < 0.06


def test_a_larger_codebook_that_knows_no_more_does_not_tell_more_on_images_that_were_not_seen():
    draw = np.random.default_rng(1)
    labels = torch.from_numpy(draw.integers(2, size=400))
    # A code is right about the class three times in four, and comes in as many variants as there are.
    right = draw.random((400, 4)) < 0.75
    known = np.where(right, labels[:, None].numpy(), 1 - labels[:, None].numpy())
    small, large = (
        numbers_of(torch.from_numpy(known + 2 * draw.integers(variants, size=known.shape)), labels, 2 * variants, 2)
        for variants in (1, 200)
    )
    told = 1 + 0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)
    assert small["held_out_information_bits"] == pytest.approx(told, abs=0.05)
    assert small["held_out_purity"] == pytest.approx(0.75, abs=0.05)
    assert large["information_bits"] > small["information_bits"] + 0.1 and large["purity"] > small["purity"] + 0.02
    assert large["held_out_information_bits"] < small["held_out_information_bits"] + 0.01
    assert large["held_out_purity"] < small["held_out_purity"] + 0.01


def test_the_bound_of_purity_is_wilsons():
    for right, trials in ((0, 3), (1, 1), (2, 2), (40, 50), (999, 1000)):
        expected = binomtest(right, trials).proportion_ci(method="wilson").low
        assert wilson_bound(np.array(right / trials), np.array(trials)) == pytest.approx(expected, abs=1e-6)


def test_an_atlas_of_almost_nothing_is_drawn_too():
    square = torch.full((3, 16, 16), 200, dtype=torch.uint8)
    atlas = atlas_of(
        torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1), (), world_size=1, batch=1, num_codes=1, grid=1
    )
    picture = atlas_picture(atlas, lambda _: square, title="x" * 500, images="1 image", num_codes=1, grid=1)
    assert atlas.sections["rarest"] == [] and picture.shape[0] == 3 and (picture == 255).all(dim=0).any()
    assert (picture[:, :, -20:] == 255).all(), "a title of any length stays on the page"


def test_class_names_are_made_readable_where_they_are_wordnets():
    assert readable_class("n02102040") == "English springer" and readable_class("tram") == "tram"
    assert readable_class("n99999999") == "n99999999"


BAD = [
    (["vqvit", "--atlas", "nowhere/atlas.png"], "--atlas nowhere/atlas.png: no folder nowhere; make it"),
    (["vqvit", "--atlas", "atlas.jpg"], "--atlas atlas.jpg: the picture is written as PNG; give a name that ends"),
    (["classifier.pth", "--atlas", "atlas.png"], "--atlas: measures a tokenizer, and classifier.pth is a classifier"),
]


@pytest.mark.parametrize("arguments, said", BAD, ids=[said for _, said in BAD])
def test_bad_input_is_one_line(root, monkeypatch, arguments, said):
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match=said):
        main([*arguments, "--images", "images/labelled"])
