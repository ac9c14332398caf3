"""Linear probing by path on one rank and on two.

Photographs are the classes, crops of them the images, so that features of any network carry the label.
"""

import json
import random

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_stage
from PIL import Image

from peco_ds.config import ModelSettings
from peco_ds.errors import UserError
from peco_ds.linear_probe import main
from peco_ds.models.mim import MaskedImageModel
from peco_ds.pack_images import main as pack_images

DEPTH, CLASSES = 3, 4
# more would fight the other processes for the same cores
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
SMALL = (
    "probe.image_px=32 probe.epochs=10 probe.global_batch=16 probe.feature_batch=7 "
    "probe.precision=fp32 probe.knn_k=[3,5] data.num_workers=0"
).split()


def pack(root, name, labels_of):
    """Two image sets: root/NAME/train of 40 images and root/NAME/val of 21."""
    for split, number in (("train", 40), ("val", 21)):
        folder = root / "raw" / name / split
        for image, label in enumerate(labels_of[split]):
            (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
            (folder / f"class{label}" / f"{image:02d}.jpg").symlink_to(root / "crops" / split / f"{image:02d}.jpg")
        assert len(labels_of[split]) == number
        pack_images(
            ["--images", str(folder), "--out", str(root / name / split), "--samples_per_shard", "16", "--workers", "1"]
        )


@pytest.fixture(scope="module")
def root(real_data, tmp_path_factory):
    """Image sets with true and with shuffled labels, and weights of a random ViT."""
    root = tmp_path_factory.mktemp("probe")
    photographs = [Image.open(path).convert("RGB").resize((128, 128)) for path in real_data.kodak[:CLASSES]]
    draw, labels = random.Random(0), {}
    for split, number in (("train", 40), ("val", 21)):
        (root / "crops" / split).mkdir(parents=True)
        labels[split] = [image % CLASSES for image in range(number)]
        for image, label in enumerate(labels[split]):
            left, top = draw.randrange(64), draw.randrange(64)
            photographs[label].crop((left, top, left + 64, top + 64)).save(
                root / "crops" / split / f"{image:02d}.jpg", quality=95
            )
    pack(root, "true", labels)
    pack(root, "shuffled", {split: draw.sample(values, len(values)) for split, values in labels.items()})
    for label in range(2):
        (root / "raw" / "two").mkdir(exist_ok=True)
        (root / "raw" / "two" / f"class{label}").symlink_to(root / "raw" / "true" / "val" / f"class{label}")
    pack_images(["--images", str(root / "raw" / "two"), "--out", str(root / "two_classes"), "--workers", "1"])
    pack_images(["--images", str(root / "crops" / "val"), "--out", str(root / "unlabelled"), "--workers", "1"])
    torch.manual_seed(0)
    model = MaskedImageModel(
        ModelSettings(image_px=32, patch_px=8, width=64, depth=DEPTH, heads=1, layer_scale=0.5, drop_path=0), 16
    )
    torch.save(
        {"model": {name.removeprefix("backbone."): tensor for name, tensor in model.state_dict().items()}},
        root / "mim.pth",
    )
    return root


def case(root, out, images, *extra):
    sets = [
        f"data.root={root}",
        f"data.images={images}/train",
        f"data.val_images={images}/val",
        f"init.weights={root / 'mim.pth'}",
    ]
    return {
        "stage": "linear_probe",
        "arguments": ["--recipe", "probe_vitb16", "--out", str(root / out), *sets, *SMALL, *extra],
    }


@pytest.fixture(scope="module")
def runs(root):
    """Standard error of the starts on one rank, in the order of the cases."""
    listings = {
        1: [
            case(root, "true_1", "true"),
            case(root, "shuffled_1", "shuffled"),
            case(root, "one_block", "true", "probe.blocks=[2]", "probe.pooling=mean"),
        ],
        2: [case(root, "true_2", "true"), case(root, "shuffled_2", "shuffled")],
    }
    for ranks, cases in listings.items():
        listing = root / f"cases_{ranks}.json"
        listing.write_text(json.dumps(cases))
        run_stage(str(REPOSITORY / "tests" / "many_runs.py"), listing, ranks=ranks, environment=ONE_THREAD)
        assert json.loads((root / f"cases_{ranks}.json.codes").read_text()) == [0] * len(cases)
    return root


def record(root, out):
    return json.loads((root / out / "probe.json").read_text())


def test_features_that_carry_the_label_beat_the_same_features_under_shuffled_labels(runs):
    true, shuffled = (record(runs, f"{name}_1") for name in ("true", "shuffled"))
    assert shuffled["best"]["top1"] < 55, "a guess is right in 25 of 100"
    assert true["best"]["top1"] > shuffled["best"]["top1"] + 15 and max(true["best"]["knn"].values()) > 55


@pytest.mark.parametrize("name", ["true", "shuffled"])
def test_two_ranks_give_the_table_of_one(runs, name):
    one, two = (record(runs, f"{name}_{ranks}")["layers"] for ranks in (1, 2))
    assert [layer["block"] for layer in one] == [1, 2, 3]
    assert one == two
    assert (runs / f"{name}_1" / "probe.md").read_text() == (runs / f"{name}_2" / "probe.md").read_text()


def test_the_record_names_weights_images_settings_and_the_best_layer(runs):
    found = record(runs, "true_1")
    best = max(row["top1"] for layer in found["layers"] for row in layer["linear"])
    assert found["best"]["top1"] == best and found["num_classes"] == CLASSES
    assert "mim.pth" in found["weights"]["source"] and found["settings"]["recipe"]["probe"]["epochs"] == 10
    assert {"commit", "versions", "command"} <= found.keys()
    rows = (runs / "true_1" / "probe.md").read_text().splitlines()
    assert sum(row.startswith("| ") for row in rows) == 2 + DEPTH  # heads, rule, one row a block
    assert Image.open(runs / "true_1" / "layers.png").size[0] > 300


def test_chosen_blocks_and_pooling_decide_what_is_kept(runs):
    assert [layer["block"] for layer in record(runs, "one_block")["layers"]] == [2]
    kept = {path.name: np.load(path).shape for path in (runs / "one_block" / "features").glob("*.npy")}
    assert kept == {
        "train_block_02.npy": (40, 64),
        "val_block_02.npy": (21, 64),
        "train_labels.npy": (40,),
        "val_labels.npy": (21,),
    }


def test_a_second_start_reads_the_features_and_other_images_make_them_anew(runs):
    file = runs / "true_2" / "features" / "train_block_01.npy"
    before = file.stat().st_mtime_ns
    again = run_stage(
        "linear_probe", *case(runs, "true_2", "true", "probe.lrs=[2e-3]")["arguments"], environment=ONE_THREAD
    )
    assert "are read" in again.stderr and file.stat().st_mtime_ns == before
    assert [row["lr"] for row in record(runs, "true_2")["layers"][0]["linear"]] == [2e-3]
    assert again.stdout.splitlines()[-1].startswith("best block ")
    other = run_stage("linear_probe", *case(runs, "true_2", "shuffled")["arguments"], environment=ONE_THREAD)
    assert "are of other images, weights or settings" in other.stderr and file.stat().st_mtime_ns > before
    assert record(runs, "true_2")["layers"] == record(runs, "shuffled_1")["layers"]


def test_a_dry_run_says_what_lies_on_disk_and_writes_nothing(root, capsys, tmp_path):
    arguments = case(root, "unused", "true", "--dry_run", "--out", str(tmp_path / "out"))["arguments"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert f"{DEPTH} blocks x 128 numbers an image" in text and f"{61 * DEPTH * 128 * 2 / 1e9:.4g} GB" in text
    assert not (tmp_path / "out").exists()
    main([*arguments, "data.images=not_packed"])
    assert "1,281,167 to train" in capsys.readouterr().out


@pytest.mark.parametrize(
    "override, said",
    [
        ("probe.blocks=[1,4]", "has blocks 1 to 3, not 4"),
        ("probe.image_px=36", "not a multiple of the patch size 8"),
        ("init.weights=", "init.weights is empty"),
        ("init.weights=nowhere.pth", "nowhere.pth: no such file"),
        ("data.val_images=two_classes", "its classes are not those of"),
        ("data.val_images=unlabelled", "holds images without labels"),
    ],
)
def test_bad_input_is_one_line(root, override, said):
    with pytest.raises(UserError, match=said):
        main([*case(root, "bad", "true")["arguments"], override])
