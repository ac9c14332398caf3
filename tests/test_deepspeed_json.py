"""The DeepSpeed JSONs that come with the package, against each other and against DeepSpeed's own reader."""

from __future__ import annotations

import json

import deepspeed
import pytest
from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS

from peco_ds.config import OptimSettings, RunSettings
from peco_ds.deepspeed_json import DS_CONFIGS, REMOVED_ZERO_KEYS, merge_deepspeed, read_deepspeed_json
from peco_ds.errors import UserError

FILES = sorted(DS_CONFIGS.glob("*.json"))
OWN_OF_A_STAGE = {"zero_optimization", "data_types"}  # ZeRO-0 sums gradients in the weights' type


def read_by_deepspeed(raw: dict, path="ds.json"):
    merged = merge_deepspeed(raw, path, RunSettings(global_batch=32, micro_batch=4), OptimSettings(), world_size=1)
    return merged, deepspeed.DeepSpeedConfig(merged)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_knows_every_key_of_a_json_that_comes_with_the_package(path):
    raw = read_deepspeed_json(path)
    merged, config = read_by_deepspeed(raw, path)
    names = {field.alias or name: name for name, field in type(config.zero_config).model_fields.items()}
    for key, value in raw["zero_optimization"].items():
        read = getattr(config.zero_config, names[key])
        assert (read.model_dump(mode="json", include=set(value)) if isinstance(value, dict) else read) == value
    assert config.gradient_clipping == OptimSettings().clip_norm and config.train_batch_size == 32
    assert merged["bf16"]["enabled"] is True and config.checkpoint_tag_validation_fail is True


def test_the_jsons_differ_in_nothing_but_their_stage():
    plain = {
        path.stem: {key: value for key, value in read_deepspeed_json(path).items() if key not in OWN_OF_A_STAGE}
        for path in FILES
    }
    assert len(plain) == 5 and all(settings == plain["zero3"] for settings in plain.values())
    stages = {path.stem: read_deepspeed_json(path)["zero_optimization"] for path in FILES}
    assert {name: zero["stage"] for name, zero in stages.items()} == {
        "zero0": 0,
        "zero1": 1,
        "zero2": 2,
        "zero3": 3,
        "zero3_offload": 3,
    }
    assert {**stages["zero2"], "stage": 1} == stages["zero1"]
    assert {key: value for key, value in stages["zero3_offload"].items() if key != "offload_optimizer"} == stages[
        "zero3"
    ]


def test_keys_of_zero_plus_plus_are_off_in_what_comes_with_the_package_and_reach_deepspeed_where_they_are_added():
    raw = json.loads((DS_CONFIGS / "zero3.json").read_text())
    added = {
        "zero_hpz_partition_size": 8,
        "zero_quantized_weights": True,
        "zero_quantized_nontrainable_weights": True,
        "zero_quantized_gradients": True,
    }
    own = read_by_deepspeed(raw)[1].zero_config
    assert {key: getattr(own, key) for key in added} == {
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
    }
    raw["zero_optimization"] |= added
    merged, config = read_by_deepspeed(raw)
    assert {key: merged["zero_optimization"][key] for key in added} == added
    assert {key: getattr(config.zero_config, key) for key in added} == added


@pytest.mark.parametrize("key", sorted(_REMOVED_ZERO_CONFIG_KEYS))
def test_a_key_that_this_deepspeed_has_removed_is_refused_before_any_rank_starts(tmp_path, key):
    raw = json.loads((DS_CONFIGS / "zero3.json").read_text())
    raw["zero_optimization"][key] = 4
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"mine.json: zero_optimization.{key}: .*take the key out"):
        read_deepspeed_json(path)


def test_no_key_is_refused_that_this_deepspeed_still_takes():
    assert set(_REMOVED_ZERO_CONFIG_KEYS) == REMOVED_ZERO_KEYS
