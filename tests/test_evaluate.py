"""Finished models measured by path, on one rank and on two, on 27 images: a number that no batch and no two ranks
divide.
"""

import json

import pytest
import timm
import torch
import torchvision
from conftest import REPOSITORY, run_stage
from PIL import Image
from test_train_tokenizer import SMALL, SMALL_VQKD
from timm.data import create_transform

from peco_ds.config import ClassifierSettings, ModelSettings
from peco_ds.convert.initialize import check_classes
from peco_ds.data.image_set import ImageSet
from peco_ds.data.labelled import CropSettings
from peco_ds.data.views import center_view, cut
from peco_ds.errors import UserError
from peco_ds.evaluate import main
from peco_ds.evaluation.attacks import AttackSettings
from peco_ds.evaluation.evaluate_classifier import evaluate_classifier
from peco_ds.evaluation.forward import ForwardSettings
from peco_ds.evaluation.stopping import Stopped
from peco_ds.models.classifier import build_classifier
from peco_ds.models.mim import MaskedImageModel
from peco_ds.models.tokenizers import load_tokenizer
from peco_ds.pack_images import main as pack
from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD

CLASSES, IMAGES = 3, 27
MODEL = ModelSettings(image_px=32, patch_px=8, width=24, depth=2, heads=2, layer_scale=1.0, drop_path=0)


@pytest.fixture(scope="module")
def root(real_data, tmp_path_factory):
    """images/train and images/val in three classes, an unlabelled set, classifiers, and AlexNet's layout for LPIPS."""
    root = tmp_path_factory.mktemp("evaluate")
    for split, paths in (("train", real_data.imagenet[:40]), ("val", real_data.imagenet[40 : 40 + IMAGES])):
        for number, path in enumerate(paths):
            folder = root / split / f"class{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:02d}.JPEG").symlink_to(path)
        pack(
            [
                "--images",
                str(root / split),
                "--out",
                str(root / "images" / split),
                "--samples_per_shard",
                "16",
                "--workers",
                "1",
            ]
        )
    pack(["--images", str(root / "val" / "class0"), "--out", str(root / "images" / "unlabelled"), "--workers", "1"])
    torch.manual_seed(0)
    torch.save(
        {"model": build_classifier(MODEL, ClassifierSettings(head_scale=1.0), CLASSES).state_dict()},
        root / "classifier.pth",
    )
    torch.save({"model": build_classifier(MODEL, ClassifierSettings(), 5).state_dict()}, root / "five.pth")
    mim = MaskedImageModel(MODEL, 16).state_dict()
    torch.save({"model": {name.removeprefix("backbone."): tensor for name, tensor in mim.items()}}, root / "mim.pth")
    torch.save(timm.create_model("test_vit", pretrained=False, num_classes=CLASSES).state_dict(), root / "test_vit.pth")
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), root / "alexnet.pth")
    torch.save(
        timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=0).state_dict(),
        root / "teacher.pth",
    )
    return root


@pytest.fixture(scope="module")
def results(root):
    """(name, ranks) -> what the start wrote."""
    common = ["--images", str(root / "images" / "val"), "--num_workers", "0"]
    cases = {
        "classifier": [str(root / "classifier.pth"), *common, "--batch", "5"],
        "larger": [str(root / "classifier.pth"), *common, "--image_px", "48", "--crop", "1", "--precision", "bf16"],
        "named": ["test_vit", *common, "--checkpoint", str(root / "test_vit.pth"), "--batch", "9"],
        "run": [
            str(root / "run"),
            *common,
            "--batch",
            "4",
            "--train_images",
            str(root / "images" / "train"),
            "--lpips",
            str(root / "alexnet.pth"),
            "--classifier",
            str(root / "classifier.pth"),
        ],
        "release": [
            str(root / "run" / "tokenizer"),
            *common,
            "--image_px",
            "32",
            "--classifier",
            "test_vit",
            "--checkpoint",
            str(root / "test_vit.pth"),
            *("--classifier_images", "9"),
        ],
        "attacked": [
            str(root / "classifier.pth"),
            *common,
            "--batch",
            "5",
            *("--attack", "bim", "--epsilon", "2/255", "--steps", "5"),
        ],
        "attacked_named": [
            "test_vit",
            *common,
            *("--checkpoint", str(root / "test_vit.pth"), "--image_px", "32", "--precision", "bf16"),
            *("--attack", "mim", "--epsilon", "0.01", "--steps", "2", "--step_size", "1/255"),
        ],
        "vqkd": [
            str(root / "vqkd" / "tokenizer"),
            *common,
            "--train_images",
            str(root / "images" / "train"),
            "--precision",
            "bf16",
        ],
    }
    short = [f"data.root={root}", "data.val_images=images/val", "schedule.steps=3", "evaluation.every_steps=3"]
    tokenizers = [
        ["--recipe", "peco_tokenizer", "--out", str(root / "run"), *SMALL, *short],
        [
            "--recipe",
            "beitv2_tokenizer",
            "--out",
            str(root / "vqkd"),
            f"teacher.weights={root / 'teacher.pth'}",
            *SMALL_VQKD,
            *short,
        ],
    ]
    found = {}
    for ranks in (1, 2):
        chosen = cases if ranks == 1 else {name: cases[name] for name in ("classifier", "run", "attacked")}
        starts = [
            {"stage": "evaluate", "arguments": [*arguments, "--out", str(root / f"{name}_{ranks}.json")]}
            for name, arguments in chosen.items()
        ]
        if ranks == 1:
            starts = [*({"stage": "train_tokenizer", "arguments": arguments} for arguments in tokenizers), *starts]
        listing = root / f"cases_{ranks}.json"
        listing.write_text(json.dumps(starts))
        done = run_stage(
            str(REPOSITORY / "tests" / "many_runs.py"), listing, ranks=ranks, environment={"OMP_NUM_THREADS": "1"}
        )
        assert json.loads((root / f"cases_{ranks}.json.codes").read_text()) == [0] * len(starts)
        found |= {(name, ranks): json.loads((root / f"{name}_{ranks}.json").read_text()) for name in chosen}
        found["lines", ranks] = done.stdout
    return found


@torch.no_grad()
def right_answers(model, root, image_px, crop, mean, std):
    """Of timm's own model on timm's own evaluation transform, one image after the other."""
    transform = create_transform(
        image_px, is_training=False, crop_pct=crop, interpolation="bicubic", mean=mean, std=std
    )
    right = 0
    for label in range(CLASSES):
        for path in sorted((root / "val" / f"class{label}").iterdir()):
            right += int(model(transform(Image.open(path).convert("RGB"))[None]).argmax() == label)
    return right


def test_top1_is_an_exact_count_and_the_same_on_one_rank_and_on_two(root, results):
    one, two = (results["classifier", ranks] for ranks in (1, 2))
    assert one["quality"]["images"] == two["quality"]["images"] == IMAGES
    count = one["quality"]["top1"] * IMAGES / 100
    assert count == pytest.approx(round(count), abs=1e-4) and one["quality"] == pytest.approx(two["quality"], rel=1e-5)
    assert one["quality"]["top5"] == 100 and (one["settings"]["ranks"], two["settings"]["ranks"]) == (1, 2)


def test_top1_is_that_of_timms_model_under_timms_transform(root, results):
    model = build_classifier(MODEL, ClassifierSettings(), CLASSES).eval()
    model.load_state_dict(torch.load(root / "classifier.pth", weights_only=True)["model"])
    expected = right_answers(model, root, 32, 0.875, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    found = results["classifier", 1]["quality"]["top1"] * IMAGES / 100
    assert found == pytest.approx(expected, abs=1e-4) and 0 < expected < IMAGES


def test_settings_come_from_the_weights_unless_they_are_given(results):
    own, larger, named = (results[name, 1]["settings"] for name in ("classifier", "larger", "named"))
    assert (own["image_px"], own["crop"], own["precision"]) == (32, 0.875, "fp32")
    assert (larger["image_px"], larger["crop"], larger["precision"]) == (48, 1, "bf16")
    cfg = timm.get_pretrained_cfg("test_vit")
    assert (
        named["image_px"] == cfg.input_size[-1]
        and tuple(named["mean"]) == cfg.mean
        and results["named", 1]["quality"]["images"] == IMAGES
    )


def test_throughput_and_provenance_stand_beside_the_accuracy(results):
    for name in ("classifier", "named"):
        found = results[name, 1]
        assert found["throughput"]["forward_images_per_s"] > 0 and found["throughput"]["end_to_end_images_per_s"] > 0
        assert len(found["images"]["fingerprint"]) == 64 and {"command", "commit", "versions"} <= found.keys()
    lines = [line for line in results["lines", 1].splitlines() if line.endswith(".json")]
    assert len(lines) == 8 and "on 27 images at 32 px" in lines[0]
    assert sum("PSNR" in line or "top-1" in line for line in results["lines", 2].splitlines()) == 3, (
        "one line a start, not one a rank"
    )


def test_a_tokenizers_numbers_are_those_its_training_reported_on_the_same_images(root, results):
    reported = [json.loads(line) for line in (root / "run" / "evaluation.jsonl").read_text().splitlines()][-1]
    reported.pop("step")
    for name, ranks in (("run", 1), ("run", 2), ("release", 1)):
        quality = {key: value for key, value in results[name, ranks]["quality"].items() if key != "lpips"}
        assert quality == pytest.approx(reported, rel=1e-5)
        assert results[name, ranks]["settings"]["image_px"] == 32


def test_lpips_is_measured_where_its_network_is_given(results):
    one, two = (results["run", ranks]["quality"]["lpips"] for ranks in (1, 2))
    assert one > 0 and one == pytest.approx(two, rel=1e-5)
    assert "lpips" not in results["release", 1]["quality"] and results["run", 1]["settings"]["lpips_network"] == "alex"


@torch.no_grad()
def answers_of(root, read, *, to_px, mean=IMAGENET_MEAN, std=IMAGENET_STD, every=1):
    """Right answers on the originals' central squares of 32 px and on their reconstructions, one image at a time.

    Of every `every`-th image.
    """
    tokenizer, _ = load_tokenizer(root / "run" / "tokenizer")
    images, right = ImageSet(root / "images" / "val"), [0, 0]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    for sample in range(0, IMAGES, every):
        _, image = images.decode(sample)
        square = cut(image, center_view(*image.shape[1:]), 32)[None].float() / 255
        codes = tokenizer.tokenize(square * 2 - 1)
        restored = (tokenizer.decode_codes(codes, (4, 4)) + 1) / 2
        for place, seen in enumerate((square, restored.clamp(0, 1))):
            if to_px != 32:
                seen = torch.nn.functional.interpolate(seen, size=to_px, mode="bicubic", antialias=True).clamp(0, 1)
            right[place] += int(read((seen - mean) / std).argmax() == images.label(sample))
    return right


def test_a_classifier_reads_reconstructions_as_it_reads_originals(root, results):
    own = build_classifier(MODEL, ClassifierSettings(), CLASSES).eval()
    own.load_state_dict(torch.load(root / "classifier.pth", weights_only=True)["model"])
    named = timm.create_model("test_vit", pretrained=False, num_classes=CLASSES).eval()
    named.load_state_dict(torch.load(root / "test_vit.pth", weights_only=True))
    cfg = timm.get_pretrained_cfg("test_vit")
    cases = (
        ("run", own, IMAGES, dict(to_px=32)),
        # --classifier_images
        ("release", named, 9, dict(to_px=cfg.input_size[-1], mean=cfg.mean, std=cfg.std, every=3)),
    )
    for name, read, number, seen in cases:
        found = results[name, 1]["reconstructions_read_by"]
        counts = [found[what]["top1"] * number / 100 for what in ("originals", "reconstructions")]
        assert counts == pytest.approx(answers_of(root, read, **seen), abs=1e-4)
        assert found["images"] == number and found["image_px"] == seen["to_px"] and found["originals"]["top5"] == 100
    assert results["run", 1]["reconstructions_read_by"] == results["run", 2]["reconstructions_read_by"]
    line = next(line for line in results["lines", 1].splitlines() if line.endswith("run_1.json"))
    assert "read by classifier.pth" in line and "on the originals" in line


def test_an_attack_is_measured_on_the_same_images_alike_on_one_rank_and_on_two(results):
    one, two = (results["attacked", ranks] for ranks in (1, 2))
    found = {name: value for name, value in one["robustness"].items() if name != "images_per_s"}
    assert found == {name: value for name, value in two["robustness"].items() if name != "images_per_s"}
    assert found["clean"]["top1"] == one["quality"]["top1"] == results["classifier", 1]["quality"]["top1"]
    assert found["robust"]["top1"] < found["clean"]["top1"] and found["images"] == IMAGES
    assert (found["attack"], found["steps"], found["judged"]) == ("bim", 5, "the last iterate")
    assert found["epsilon"] == pytest.approx(2 / 255) and found["step_size"] == pytest.approx(1 / 255)
    assert "robustness" not in results["classifier", 1]
    line = next(line for line in results["lines", 1].splitlines() if line.endswith("attacked_1.json"))
    assert "bim (epsilon 2/255, 5 steps): top-1" in line


def test_a_model_of_timm_is_attacked_too(results):
    found = results["attacked_named", 1]
    assert found["robustness"]["robust"]["top1"] <= found["robustness"]["clean"]["top1"] == found["quality"]["top1"]
    assert (found["robustness"]["epsilon"], found["robustness"]["images"]) == (0.01, IMAGES)
    assert found["robustness"]["step_size"] == pytest.approx(1 / 255) and found["settings"]["precision"] == "bf16"


class AskedToStop:
    """One rank, asked to stop before its last batch."""

    rank, size, device, is_main = 0, 1, torch.device("cpu"), True

    def __init__(self, batches):
        self.batches = batches

    def stop_requested(self):
        self.batches -= 1
        return self.batches < 0

    def barrier(self):
        pass

    def all_reduce(self, tensor):
        return tensor


def test_an_attack_stops_between_two_batches(root):
    model = build_classifier(MODEL, ClassifierSettings(), CLASSES).eval()
    images, crops, how = ImageSet(root / "images" / "val"), CropSettings(32, 1.0), ForwardSettings("fp32", 9, 0)
    attack = AttackSettings("bim", 0.01, 2, 0.01)
    world = AskedToStop(2 * 3 - 1)
    with pytest.raises(Stopped):
        evaluate_classifier(model, images, crops, how, world, attack=attack)
    assert world.batches == -1, "in the second pass"


def test_codes_alone_are_probed_in_two_forms_alike_on_one_rank_and_on_two(results):
    one, two = (results["run", ranks]["code_probes"]["images_as"] for ranks in (1, 2))
    assert list(one) == ["bag of codes", "mean code vector"] and one == two
    for found in one.values():
        assert found["best_linear"] == max(row["top1"] for row in found["linear"]) and 0 <= found["best_knn"] <= 100
    for ranks in (1, 2):
        probes = results["run", ranks]["code_probes"]
        assert probes["mean code vector, linear"]["top1"] == probes["images_as"]["mean code vector"]["best_linear"]
    assert "code_probes" not in results["release", 1]


def test_a_tokenizer_without_images_is_measured_by_its_codes_and_their_probes(root, results):
    found = results["vqkd", 1]
    assert found["quality"].keys() == {"codes_used", "perplexity"} and 1 < found["quality"]["codes_used"] <= 32
    assert found["settings"]["image_px"] == 32, "the one size that it looks at"
    assert list(found["code_probes"]["images_as"]) == ["bag of codes", "mean code vector"]
    trained, measured = (
        next(line for line in results["lines", 1].splitlines() if line.endswith(str(root / end)))
        for end in ("vqkd/tokenizer", "vqkd_1.json")
    )
    assert "cosine to the teacher 0." in trained and "of 32 codes, perplexity" in trained and "PSNR" not in trained
    assert (
        "cosine" not in measured
        and "PSNR" not in measured
        and "of 32 codes, perplexity" in measured
        and "mean code vector: linear" in measured
    )


BAD = [
    (["mim.pth"], "has no classifier .kind mim.; fine-tune it with finetune.py, or probe"),
    (["five.pth"], "its head has 5 classes, .* has 3"),
    (["classifier.pth", "--images", "images/unlabelled"], "holds images without labels"),
    (["classifier.pth", "--images", "val"], "no manifest.json"),
    (["classifier.pth", "--image_px", "36"], "not a multiple of the patch size 8"),
    (["classifier.pth", "--crop", "1.5"], "--crop 1.5"),
    (["classifier.pth", "--checkpoint", "five.pth"], "goes with the name of a timm model"),
    (["classifier.pth", "--lpips", "alexnet.pth"], "--lpips: measures a tokenizer, and classifier.pth is a classifier"),
    (["classifier.pth", "--train_images", "images/train"], "leave it out .linear_probe.py probes a backbone"),
    (["classifier.pth", "--classifier", "classifier.pth"], "--classifier: measures a tokenizer"),
    (["run", "--crop", "0.9"], "--crop: measures a classifier, and run is a tokenizer; leave it out"),
    (["run", "--attack", "bim"], "--attack: measures a classifier, and run is a tokenizer; leave it out"),
    (["run", "--epsilon", "2/255"], "--epsilon: measures a classifier"),
    (["run", "--weights", "raw"], "--weights: is about a classifier's weights, and run is a tokenizer"),
    (["test_vit", "--statistics", "half"], "--statistics half: goes with a run, a release or a weights file"),
    (["run", "--checkpoint", "five.pth"], "--checkpoint: is about a classifier's weights"),
    (["run", "--classifier", "five.pth"], "its head has 5 classes, .* has 3"),
    (["run", "--classifier", "mim.pth"], "has no classifier .kind mim."),
    (["run", "--classifier_images", "9"], "goes with --classifier"),
    (["run", "--classifier", "classifier.pth", "--classifier_images", "0"], "must be at least 1"),
    (["run", "--classifier", "nowhere.pth"], "nor the name of a timm model"),
    (["run", "--classifier", "vqkd"], "vqkd: a run of train_tokenizer; give a run of pretrain.py or finetune.py"),
    (["run", "--classifier", "classifier.pth", "--checkpoint", "five.pth"], "classifier.pth is a path"),
    (["run", "--classifier", "classifier.pth", "--images", "images/unlabelled"], "holds images without labels"),
    (["vqkd", "--classifier", "classifier.pth"], "makes no images, so there is nothing to compare"),
    (["classifier.pth", "--epsilon", "2/255"], "--epsilon: goes with --attack"),
    (["classifier.pth", "--steps", "3"], "--steps: goes with --attack"),
    (["classifier.pth", "--attack", "bim", "--epsilon", "2/0"], "'2/0' is not a number; write it as 2/255"),
    (["classifier.pth", "--attack", "bim", "--epsilon", "small"], "'small' is not a number"),
    (["classifier.pth", "--attack", "bim", "--epsilon", "2"], "--epsilon 2: in .0, 1., as pixel values are"),
    (["classifier.pth", "--attack", "bim", "--epsilon=-1/255"], "--epsilon -1/255: in"),
    (["classifier.pth", "--attack", "bim", "--steps", "0"], "--steps 0: must be at least 1"),
    (["classifier.pth", "--attack", "mim", "--step_size", "0"], "--step_size 0: must be above 0"),
    (["classifier.pth", "--attack", "pgd"], "invalid choice: 'pgd'"),
    (["classifier.pth", "--out", "nowhere/result.json"], "no folder"),
    (["run", "--image_px", "36"], "not a multiple of the tokenizer's stride 8"),
    (["run", "--lpips", "classifier.pth"], "neither torchvision's AlexNet"),
    (["vqkd", "--lpips", "alexnet.pth"], "makes no images, so there is nothing to compare; leave --lpips out"),
    (["vqkd", "--image_px", "64"], "--image_px 64: the tokenizer takes images of 32 px only"),
    (["run", "--train_images", "images/unlabelled"], "holds images without labels"),
    (["runs/nowhere"], "nor the name of a timm model"),
]


@pytest.mark.parametrize("arguments, said", BAD, ids=[said for _, said in BAD])
def test_bad_input_is_one_line(root, results, monkeypatch, arguments, said):
    monkeypatch.chdir(root)
    images = [] if "--images" in arguments else ["--images", "images/val"]
    with pytest.raises(UserError, match=said):
        main([*arguments, *images])


def test_a_tokenizer_run_without_a_release_and_a_head_in_another_order_are_refused(root, results, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.yaml").write_bytes((root / "run" / "settings.yaml").read_bytes())
    with pytest.raises(UserError, match="without a release yet"):
        main([str(tmp_path / "run"), "--images", str(root / "images" / "val"), "--out", str(tmp_path / "out.json")])
    said = dict(what=str(root), remedy="or fine-tune it on these")
    check_classes("weights", 2, ("tench", "goldfish"), ("n01440764", "n01443537"), **said)
    check_classes("weights", 2, None, ("a", "b"), **said)
    with pytest.raises(UserError, match="class 0 of its head is 'b'"):
        check_classes("weights", 2, ("b", "a"), ("a", "b"), **said)
    with pytest.raises(UserError, match="class 1 of its head is 'n01443537'"):
        check_classes("weights", 2, ("n01440764", "n01443537"), ("n01440764", "n02102040"), **said)


@pytest.mark.parametrize("name", ["classifier", "test_vit"])
def test_weights_that_are_not_finite_get_no_score(root, tmp_path, name):
    """In one tensor alone, with a value that is NaN: argmax takes it for class 0."""
    content = torch.load(root / f"{name}.pth", weights_only=True)
    tensors = content.get("model", content)
    tensors["blocks.0.mlp.fc1.weight"][0, 0] = float("nan")
    torch.save(content, tmp_path / "broken.pth")
    file, out = str(tmp_path / "broken.pth"), tmp_path / "e.json"
    target = [file] if name == "classifier" else ["test_vit", "--checkpoint", file]
    with pytest.raises(UserError, match="blocks.0.mlp.fc1.weight holds values that are not finite"):
        main([*target, "--images", str(root / "images" / "val"), "--out", str(out), "--num_workers", "0"])
    assert not out.exists()
