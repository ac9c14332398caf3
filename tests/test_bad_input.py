"""What a user gets wrong: one line on stderr that names value, reason and remedy, exit code 2, no traceback.

Nothing half-made left.
"""

import json
import shutil

import pytest
import timm
import torch
from conftest import REPOSITORY, run_stage


@pytest.fixture
def refused(small_sets, tmp_path):
    """Start a stage that must refuse; returns its one line."""

    def start(stage, *arguments, ranks=1):
        done = run_stage(stage, *arguments, ranks=ranks, check=False)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode != 0 and len(errors) == 1 and "Traceback" not in done.stderr.split("error: ")[0], (
            done.stderr[-3000:]
        )
        if ranks == 1:
            assert done.returncode == 2
        return errors[0]

    return start


def pretrain(small_sets, tmp_path, *overrides):
    return ["pretrain", "--recipe", "peco_vitb16", "--out", tmp_path / "run", *small_sets.overrides, *overrides]


def test_a_misspelt_setting_names_the_nearest_one(refused, small_sets, tmp_path):
    assert "'model.widht'; did you mean 'model.width'?" in refused(*pretrain(small_sets, tmp_path, "model.widht=96"))


def test_a_misspelt_setting_answers_before_torch_is_imported(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optimizer: {lr: 1}\n")
    done = run_stage("pretrain", "--recipe", recipe, check=False, environment={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 2 and "unknown setting 'optimizer.lr'; did you mean 'optim.lr'?" in done.stderr
    assert not any(line.endswith("| torch") for line in done.stderr.splitlines())


def test_a_json_value_that_contradicts_the_recipe_names_both(refused, small_sets, tmp_path):
    config = json.loads((REPOSITORY / "ds_configs" / "zero1.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**config, "gradient_clipping": 1.0}))
    line = refused(*pretrain(small_sets, tmp_path), "--deepspeed_config", tmp_path / "mine.json")
    assert "gradient_clipping = 1.0" in line and "optim.clip_norm = 3.0" in line


def test_a_batch_that_does_not_divide_names_batches_that_do(refused, small_sets, tmp_path):
    assert "global_batch 9 is not a multiple of 2 ranks; use 8 or 10" in refused(
        *pretrain(small_sets, tmp_path, "run.global_batch=9"), ranks=2
    )


def test_two_ranks_that_find_the_same_fault_say_it_once(refused, small_sets, tmp_path):
    folder = tmp_path / "absent"
    assert str(folder) in refused(*pretrain(small_sets, tmp_path, f"data.images={folder}"), ranks=2)


@pytest.mark.parametrize(
    "key, words",
    [("data.images", "no such folder of images shards"), ("data.tokens", "no such folder of tokens shards")],
)
def test_a_missing_folder_is_named(refused, small_sets, tmp_path, key, words):
    line = refused(*pretrain(small_sets, tmp_path, f"{key}=nowhere"))
    assert str(small_sets.root / "nowhere") in line and words in line


def test_an_empty_class_folder_is_named(refused, real_data, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "raw" / name).mkdir(parents=True)
    shutil.copy(real_data.imagenet[0], tmp_path / "raw" / "cat")
    assert "dog" in refused(
        "pack_images", "--images", tmp_path / "raw", "--labels", "folders", "--out", tmp_path / "out"
    )


def test_shards_without_a_manifest_are_not_trusted(refused, small_sets, tmp_path):
    shutil.copytree(small_sets.root / "images", tmp_path / "images")
    (tmp_path / "images" / "train" / "manifest.json").unlink()
    assert "4 tar files but no manifest.json" in refused(
        *pretrain(small_sets, tmp_path, f"data.images={tmp_path / 'images' / 'train'}")
    )


def test_a_truncated_tar_is_named(refused, small_sets, tmp_path):
    shutil.copytree(small_sets.root / "images", tmp_path / "images")
    victim = sorted((tmp_path / "images" / "train").glob("*.tar"))[1]
    victim.write_bytes(victim.read_bytes()[:-4096])
    assert victim.name in refused(*pretrain(small_sets, tmp_path, f"data.images={tmp_path / 'images' / 'train'}"))


@pytest.mark.parametrize(
    "text, words",
    [
        ("zero_optimization:\n  stage: 3\n", "not JSON"),
        ("[1, 2]", "DeepSpeed config is a JSON object"),
        ('{"zero_optimisation": {"stage": 3}}', "did you mean 'zero_optimization'?"),
        ('{"zero_optimization": {"stage": 3, "overlap_com": true}}', "overlap_com"),
        ('{"zero_optimization": {"stage": 7}}', "stage must be 0, 1, 2 or 3"),
    ],
)
def test_a_json_that_is_no_deepspeed_config_is_refused(refused, small_sets, tmp_path, text, words):
    (tmp_path / "mine.json").write_text(text)
    assert words in refused(*pretrain(small_sets, tmp_path), "--deepspeed_config", tmp_path / "mine.json")


def test_more_views_than_stored_are_refused(refused, small_sets, tmp_path):
    assert "3 views are stored for each image, views.count asks for 5" in refused(
        *pretrain(small_sets, tmp_path, "views.count=5")
    )


def test_a_moco_file_of_another_width_names_both_widths(refused, small_sets, tmp_path):
    net = timm.create_model("vit_small_patch16_224", num_classes=0, depth=2)
    torch.save(
        {"state_dict": {f"module.base_encoder.{name}": value for name, value in net.state_dict().items()}},
        tmp_path / "vit-s-300ep.pth.tar",
    )
    line = refused(
        "train_tokenizer",
        "--recipe",
        "peco_tokenizer",
        "--out",
        tmp_path / "run",
        f"data.root={small_sets.root}",
        f"perceptual.weights={tmp_path / 'vit-s-300ep.pth.tar'}",
        "perceptual.architecture=vit_base_patch16_224",
    )
    assert "384" in line and "768" in line


def test_a_tokenizer_without_a_judge_must_be_asked_for(refused, small_sets, tmp_path):
    line = refused(
        "train_tokenizer", "--recipe", "peco_tokenizer", "--out", tmp_path / "run", f"data.root={small_sets.root}"
    )
    assert "vit-b-300ep.pth.tar" in line and "perceptual.weight=0" in line


def test_a_missing_judge_says_what_to_fetch(refused, small_sets, tmp_path):
    line = refused(
        "train_tokenizer",
        "--recipe",
        "peco_tokenizer",
        "--out",
        tmp_path / "run",
        f"data.root={small_sets.root}",
        "perceptual.weights=/nowhere/vit-b-300ep.pth.tar",
    )
    assert "/nowhere/vit-b-300ep.pth.tar" in line and "MoCo v3" in line


def test_tokens_of_another_tokenizer_stop_the_run_before_it_starts(refused, small_sets, tmp_path):
    from peco_ds.config import TokenizerSettings
    from peco_ds.models.tokenizers import build_tokenizer, save_tokenizer

    torch.manual_seed(7)
    settings = TokenizerSettings(
        channels=16,
        channel_mults=(1, 1, 2, 2),
        blocks_per_level=1,
        z_channels=16,
        num_codes=64,
        code_dim=8,
        l2_normalized=True,
    )
    save_tokenizer(tmp_path / "other", build_tokenizer(settings).state_dict(), settings, {})
    assert "made by tokenizer" in refused(*pretrain(small_sets, tmp_path, f"data.tokenizer={tmp_path / 'other'}"))
    assert not (tmp_path / "run").exists()


def test_a_flipped_byte_in_a_token_shard_stops_the_run_before_it_starts(refused, small_sets, tmp_path):
    shutil.copytree(small_sets.root / "tokens", tmp_path / "tokens")
    victim = sorted((tmp_path / "tokens" / "train").glob("*.tar"))[2]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert victim.name in refused(*pretrain(small_sets, tmp_path, f"data.tokens={tmp_path / 'tokens' / 'train'}"))


def test_a_tokenizer_whose_grid_is_not_the_backbones_is_refused(refused, small_sets, tmp_path):
    overrides = [*small_sets.overrides, f"data.tokens={tmp_path / 'tokens'}", "views.tokenizer_px=48"]
    assert "set views.tokenizer_px=32" in refused("tokenize_shards", "--recipe", "peco_vitb16", *overrides)


def test_another_run_in_the_same_folder_is_not_overwritten(refused, small_sets, tmp_path):
    run_stage(*pretrain(small_sets, tmp_path, "schedule.steps=2"))
    assert "optim.lr = 0.003, this one has 0.001" in refused(
        *pretrain(small_sets, tmp_path, "schedule.steps=2", "optim.lr=1e-3")
    )


def test_a_folder_that_is_no_run_cannot_be_converted(refused, tmp_path):
    assert "no settings.yaml" in refused("convert_checkpoint", tmp_path, "--to", "timm", "--out", tmp_path / "release")
    assert "--to" in refused("convert_checkpoint", tmp_path, "--to", "onnx", "--out", tmp_path / "release")
