"""Settings: what is refused, in which words, and what is filled in."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peco_ds.command_line import parse_stage, run, stage_parser
from peco_ds.config import (
    CheckpointSettings,
    DataSettings,
    DetectRecipe,
    FinetuneRecipe,
    ModelSettings,
    OptimSettings,
    PretrainRecipe,
    ProbeRecipe,
    RunSettings,
    ScheduleSettings,
    SegmentRecipe,
    TokenizerRecipe,
)
from peco_ds.data_paths import data_path
from peco_ds.deepspeed_json import DEEPSPEED_KEYS, merge_deepspeed, read_deepspeed_json
from peco_ds.durations import micro_steps, resolve_durations, settle_micro_batch
from peco_ds.errors import EXIT_BAD_INPUT, EXIT_DONE, UserError
from peco_ds.field_marks import known_keys
from peco_ds.planner.report import dry_run_report
from peco_ds.recipe_checks import recipe_of_ranks
from peco_ds.recipe_files import RECIPES, find_recipe, load_recipe

ENOUGH = "schedule.epochs=1"  # the one setting without a default


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def load(path, *overrides, recipe_type=PretrainRecipe, environ=None):
    return load_recipe(recipe_type, path, [ENOUGH, *overrides], environ=environ or {})


def refusal(call, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


# --------------------------------------------------------------------------------------------- recipes


def test_later_sources_win_and_each_value_knows_its_source(recipe_file):
    path = recipe_file("data:\n  root: from_recipe\nrun:\n  seed: 3\n  micro_batch: 4\n")
    resolved = load(path, "run.seed=5", environ={"PECO_DATA_ROOT": "from_environment"})
    assert (resolved.recipe.data.root, resolved.recipe.run.seed, resolved.recipe.run.micro_batch) == (
        "from_recipe",
        5,
        4,
    )
    assert (resolved.sources["run.seed"], resolved.sources["data.root"]) == ("command line", str(path))
    assert load(recipe_file(""), environ={"PECO_DATA_ROOT": "/d"}).recipe.data.root == "/d"


def test_the_saved_settings_load_again_as_the_same_recipe(recipe_file):
    resolved = load(recipe_file(""), "optim.lr=3e-4", "views.scale=[0.4, 1.0]", "model.depth=2")
    again = recipe_file(yaml.safe_dump(json.loads(json.dumps(resolved.as_dict()["recipe"]))))
    assert load_recipe(PretrainRecipe, again, [], environ={}).recipe == resolved.recipe


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("run.micro_bacth", "run.micro_batch"),
        ("model.widht", "model.width"),
        ("lr", "optim.lr"),
        ("model.micro_batch", "run.micro_batch"),
    ],
)
def test_a_misspelt_key_names_the_nearest_known_one_and_where_it_was_written(recipe_file, written, meant):
    on_the_line = refusal(load, recipe_file(""), f"{written}=1")
    section, _, name = written.rpartition(".")
    path = recipe_file(f"{section}:\n  {name}: 1\n" if section else f"{name}: 1\n")
    in_the_file = refusal(load, path)
    assert written in on_the_line and "command line" in on_the_line
    assert written in in_the_file and str(path) in in_the_file
    assert f"did you mean '{meant}'" in on_the_line and f"did you mean '{meant}'" in in_the_file


@pytest.mark.parametrize(
    "override",
    [
        "run.micro_batch=many",
        "run.micro_batch=2.5",
        "optim.lr=fast",
        "views.scale=[0.1]",
        "views.scale=0.5",
        "run.precision=bf8",
        "mask.kind=square",
        "schedule.epochs=.inf",
        "optim.lr=.nan",
        "model.width=",
        "run.seed=null",
    ],
)
def test_a_mistyped_value_names_key_value_and_source_in_one_line(recipe_file, override):
    message = refusal(load, recipe_file(""), override)
    assert override.partition("=")[0] in message and "command line" in message and "\n" not in message


@pytest.mark.parametrize(
    "override",
    [
        "model.patch_px=0",
        "model.heads=0",
        "model.heads=7",
        "model.patch_px=15",
        "mask.count=196",
        "mask.count=0",
        "mask.min_block=80",
        "model.depth=0",
        "run.global_batch=0",
        "run.micro_batch=-1",
        "views.scale=[0.5, 0.4]",
        "views.scale=[0, 1]",
        "views.flip=2",
        "views.color_jitter=1",
        "views.count=0",
        "objective.num_codes=65537",
        "model.mlp_ratio=0",
        "model.drop_path=1",
        "run.log_every_steps=0",
        "checkpoint.keep_last=0",
        "checkpoint.every_steps=-5",
        "optim.lr=-1",
        "schedule.warmup_epochs=-1",
        "schedule.stop_at_step=-2",
        "data.num_workers=-1",
        "data.images=",
        "data.tokens=",
        "data.tokenizer=",
    ],
)
def test_a_value_out_of_range_names_its_key_and_value(recipe_file, override):
    key, _, value = override.partition("=")
    message = refusal(load, recipe_file(""), override)
    assert key in message and "\n" not in message
    for number in re.findall(r"-?[\d.]+", value):
        assert number in message


@pytest.mark.parametrize(
    "override",
    [
        "tokenizer.channel_mults=[]",
        "tokenizer.channel_mults=[1,0]",
        "tokenizer.channels=0",
        "views.tokenizer_px=100",
        "tokenizer.num_codes=70000",
        "tokenizer.average=directions",
        "run.activation_checkpointing=full",
        "run.fp8=true",
    ],
)
def test_tokenizer_values_out_of_range_are_refused(recipe_file, override):
    assert override.partition("=")[0] in refusal(
        load, recipe_file(""), "perceptual.weight=0", override, recipe_type=TokenizerRecipe
    )


def test_subsets_that_would_leave_out_nobody_are_refused_with_both_ways_out(recipe_file):
    message = refusal(
        load,
        recipe_file(""),
        "model.drop_path_by=subset",
        "model.drop_path=0.1",
        "run.micro_batch=4",
        "run.global_batch=8",
    )
    assert "run.micro_batch 4" in message and "0.1" in message and "model.drop_path_by=image" in message
    load(recipe_file(""), "model.drop_path_by=subset", "model.drop_path=0.1", "run.micro_batch=8", "run.global_batch=8")
    load(recipe_file(""), "model.drop_path_by=subset", "model.drop_path=0", "run.micro_batch=4", "run.global_batch=8")


def test_compiled_blocks_with_apexs_layer_norm_are_refused(recipe_file):
    message = refusal(load, recipe_file(""), "run.compile=blocks", "run.layer_norm=apex")
    assert "run.layer_norm=torch" in message and "run.compile=none" in message


def test_a_tokenizer_without_judge_must_be_asked_for(recipe_file):
    message = refusal(load, recipe_file(""), recipe_type=TokenizerRecipe)
    assert "perceptual.weights" in message and "perceptual.weight=0" in message
    assert "data.holdout=N" in refusal(load, recipe_file(""), "perceptual.weight=0", recipe_type=TokenizerRecipe)
    assert (
        load(
            recipe_file(""), "perceptual.weight=0", "data.holdout=5", recipe_type=TokenizerRecipe
        ).recipe.perceptual.weight
        == 0
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("schedule.epochs=1", "schedule.steps=10"),
        ("schedule.warmup_epochs=1", "schedule.warmup_steps=10"),
        ("checkpoint.every_epochs=1", "checkpoint.every_steps=10"),
    ],
)
def test_two_spellings_of_a_duration_are_refused_naming_both(recipe_file, first, second):
    message = refusal(load, recipe_file(""), first, second)
    assert first.partition("=")[0] in message and second.partition("=")[0] in message


def test_a_run_without_a_duration_is_refused(recipe_file):
    assert "schedule.epochs" in refusal(load_recipe, PretrainRecipe, recipe_file(""), [], environ={})


def test_an_override_without_a_value_or_with_a_section_or_bad_yaml_is_refused(recipe_file):
    assert "key.sub=value" in refusal(load, recipe_file(""), "run.seed")
    assert "run.NAME" in refusal(load, recipe_file(""), "run={seed: 1}")
    assert "not YAML" in refusal(load, recipe_file(""), "run.seed=[1")


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "words", "run: {seed: [1\n", "a: &a {b: *a}\n", "[" * 5000, "x: 2020-13-45\n", "\x00"]
)
def test_a_recipe_that_is_no_mapping_of_settings_is_refused_naming_the_file(recipe_file, text):
    path = recipe_file(text)
    message = refusal(load, path)
    assert str(path) in message and "\n" not in message


def test_a_recipe_is_found_by_path_or_name_and_a_missing_one_names_the_known():
    for path in RECIPES.glob("*.yaml"):
        assert find_recipe(path) == path and find_recipe(path.stem) == path
        assert path.stem in refusal(find_recipe, "no_such_recipe_anywhere")


# what only a user knows
REQUIRED = {
    TokenizerRecipe: ["perceptual.weights=judge.pth.tar"],
    ProbeRecipe: ["init.weights=run"],
    PretrainRecipe: [],
    FinetuneRecipe: [],
    SegmentRecipe: [],
    DetectRecipe: [],
}
# A section that only recipes of one stage have.
SECTIONS = {
    "tokenizer": TokenizerRecipe,
    "classifier": FinetuneRecipe,
    "probe": ProbeRecipe,
    "segmenter": SegmentRecipe,
    "detector": DetectRecipe,
}


def recipe_type_of(path: Path) -> type:
    sections = yaml.safe_load(path.read_text()).keys()
    return next((kind for name, kind in SECTIONS.items() if name in sections), PretrainRecipe)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_under_its_own_name_and_gives_a_schedule(path):
    recipe_type = recipe_type_of(path)
    taught = "kind: vqkd" in path.read_text()
    recipe = load_recipe(
        recipe_type, path.stem, ["teacher.weights=teacher.pth"] if taught else REQUIRED[recipe_type], environ={}
    ).recipe
    assert recipe.name == path.stem
    # its epochs are over stored features and become steps where these are known
    if recipe_type is ProbeRecipe:
        return
    durations = resolve_durations(recipe, num_samples=1_281_167)
    assert 0 <= durations.warmup_steps < durations.total_steps
    assert recipe_of_ranks(recipe, 1).run == recipe.run


FINETUNE_FAULTS = {
    "augment.scale=[0.5,0.2]": "augment.scale",
    "augment.erasing=1.5": "augment.erasing",
    "augment.repeats=0": "augment.repeats",
    "classifier.smoothing=1": "classifier.smoothing",
    "classifier.layer_decay=0": "classifier.layer_decay",
    "ema.decay=1": "ema.decay",
    "evaluation.crop=0": "evaluation.crop",
    "data.val_images=": "data.val_images",
    "views.count=2": "tokenize_shards.py",
}


@pytest.mark.parametrize("override, words", FINETUNE_FAULTS.items())
def test_a_fine_tuning_setting_out_of_range_is_refused_by_name(override, words):
    assert words in refusal(load_recipe, FinetuneRecipe, "finetune_vitb16", [override], environ={})


@pytest.mark.parametrize(
    "override, words",
    {
        "probe.lrs=[]": "probe.lrs",
        "probe.crop=2": "probe.crop",
        "probe.knn_k=[0]": "probe.knn_k",
        "init.weights=": "init.weights",
    }.items(),
)
def test_a_probe_setting_out_of_range_is_refused_by_name(override, words):
    assert words in refusal(load_recipe, ProbeRecipe, "probe_vitb16", ["init.weights=run", override], environ={})


def test_a_classifier_is_measured_every_so_many_epochs_and_at_the_end():
    recipe = load_recipe(
        FinetuneRecipe,
        "finetune_vitb16",
        [
            "schedule.epochs=3",
            "schedule.warmup_epochs=0",
            "evaluation.every_epochs=0.5",
            "run.global_batch=10",
            "run.micro_batch=10",
        ],
        environ={},
    ).recipe
    durations = resolve_durations(recipe, num_samples=101)
    assert [step for step in range(1, 31) if durations.evaluate_after(step)] == [5, 10, 15, 20, 25, 30]


# ------------------------------------------------------------------------------------- derived numbers


def test_epochs_become_steps_once_and_nothing_is_dropped_at_an_epochs_end():
    recipe = PretrainRecipe(
        schedule=ScheduleSettings(epochs=3, warmup_epochs=1),
        run=RunSettings(global_batch=10),
        checkpoint=CheckpointSettings(every_epochs=1),
    )
    durations = resolve_durations(recipe, num_samples=25)
    assert durations.total_steps == 7  # 75 samples in tens
    assert (durations.warmup_steps, durations.checkpoint_steps, durations.stop_step) == (2, 2, 7)


def test_steps_are_taken_as_they_stand_and_a_stop_leaves_the_schedule_alone():
    recipe = PretrainRecipe(schedule=ScheduleSettings(steps=100, warmup_steps=7, stop_at_step=40))
    durations = resolve_durations(recipe, num_samples=5)
    assert (durations.total_steps, durations.warmup_steps, durations.stop_step) == (100, 7, 40)


def test_a_schedule_without_a_step_and_a_warm_up_longer_than_the_run_are_refused():
    too_few = PretrainRecipe(schedule=ScheduleSettings(epochs=1), run=RunSettings(global_batch=2048))
    assert "2048" in refusal(resolve_durations, too_few, 100) and "100 samples" in refusal(
        resolve_durations, too_few, 100
    )
    assert "warm-up" in refusal(
        resolve_durations, PretrainRecipe(schedule=ScheduleSettings(steps=5, warmup_steps=6)), 100
    )


@given(
    micro_batch=st.integers(2, 300),
    world_size=st.integers(1, 600),
    global_batch=st.integers(1, 10_000),
    pairs=st.booleans(),
)
def test_a_pass_has_the_most_images_that_divide_and_a_batch_that_does_not_names_batches_that_do(
    micro_batch, world_size, global_batch, pairs
):
    sizes, settle = RunSettings(global_batch=global_batch, micro_batch=micro_batch), settle_micro_batch
    unit = 2 if pairs else 1
    if global_batch % (world_size * unit) == 0:
        settled = settle(sizes, world_size, pairs=pairs)
        assert settled.micro_batch <= micro_batch and settled.micro_batch % unit == 0
        assert micro_steps(settled, world_size) * settled.micro_batch * world_size == global_batch
        part = global_batch // world_size
        larger = range(settled.micro_batch + 1, min(micro_batch, part) + 1)
        assert all(part % size or size % unit for size in larger)
        return
    message = refusal(lambda: settle(sizes, world_size, pairs=pairs))
    assert str(global_batch) in message and str(world_size) in message
    usable = [int(number) for number in re.search(r"use (\d+)(?: or (\d+))?,", message).groups() if number]
    for batch in usable:
        assert settle(replace(sizes, global_batch=batch), world_size, pairs=pairs).micro_batch >= unit
    assert min(abs(batch - global_batch) for batch in usable) < world_size * unit


def test_a_pass_that_leaves_no_block_out_is_refused_for_the_ranks_that_take_it():
    """Of 4 images a rate of 0.1 leaves out none, of the 64 that one rank would take it does."""
    recipe = PretrainRecipe(
        model=ModelSettings(drop_path=0.1, drop_path_by="subset"),
        run=RunSettings(global_batch=64, micro_batch=64),
        schedule=ScheduleSettings(epochs=1),
    )
    assert recipe_of_ranks(recipe, 1).run.micro_batch == 64
    assert "of run.micro_batch 4 images" in refusal(recipe_of_ranks, recipe, 16)


def test_a_relative_path_lies_under_the_root_and_an_absolute_one_where_it_says(tmp_path):
    data = DataSettings(root=str(tmp_path))
    assert data_path(data, "images/train") == tmp_path / "images" / "train"
    assert data_path(data, "/elsewhere/x") == Path("/elsewhere/x")
    assert data_path(data, "~/x") == Path.home() / "x"


# -------------------------------------------------------------------------------------- DeepSpeed JSON


@pytest.fixture
def json_file(tmp_path):
    def write(value) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return write


def merge(raw, path="ds.json", *, world_size=2, **run):
    return merge_deepspeed(
        raw, path, RunSettings(**{"global_batch": 32, "micro_batch": 4, **run}), OptimSettings(), world_size
    )


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"words"', "null", "[" * 100_000, '{"a": NaN,}'])
def test_a_file_that_is_no_json_object_is_refused_naming_it(json_file, text):
    path = json_file(text)
    message = refusal(read_deepspeed_json, path)
    assert str(path) in message and "\n" not in message


def test_a_missing_json_is_refused_naming_it(tmp_path):
    assert "absent.json" in refusal(read_deepspeed_json, tmp_path / "absent.json")
    assert str(tmp_path) in refusal(read_deepspeed_json, tmp_path)


def test_an_unknown_top_level_key_names_the_nearest(json_file):
    assert "did you mean 'zero_optimization'" in refusal(
        read_deepspeed_json, json_file({"zero_optimisation": {"stage": 3}})
    )


@pytest.mark.parametrize("block", [{"stage": 4}, {"stage": "three"}, 3, None])
def test_a_stage_that_does_not_exist_is_refused(json_file, block):
    assert "zero_optimization.stage" in refusal(read_deepspeed_json, json_file({"zero_optimization": block}))


class AskedKeys(dict):
    """A mapping that remembers, for all its copies, which keys it was asked for."""

    asked: set[str] = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self):
        return self


def test_the_known_keys_are_those_the_installed_deepspeed_reads():
    import deepspeed
    from deepspeed.runtime import config as deepspeed_config

    deepspeed_config.DeepSpeedConfig(AskedKeys(train_batch_size=1, train_micro_batch_size_per_gpu=1))
    removed = set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)  # asked for only to be refused
    sources = [Path(deepspeed.__file__), Path(deepspeed_config.__file__)]
    # read beside DeepSpeedConfig
    of_the_mesh = set(re.findall(r'"(\w+)" in config\b', "".join(source.read_text() for source in sources)))
    assert (AskedKeys.asked - removed) | of_the_mesh == DEEPSPEED_KEYS


def test_auto_and_absent_keys_are_filled_from_the_recipe():
    raw = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2},
    }
    merged = merge(raw)
    assert (
        merged["train_batch_size"],
        merged["train_micro_batch_size_per_gpu"],
        merged["gradient_accumulation_steps"],
    ) == (32, 4, 4)
    assert merged["gradient_clipping"] == OptimSettings().clip_norm
    assert merged["bf16"]["enabled"] is True and merged["fp16"]["enabled"] is False
    assert raw["train_batch_size"] == "auto", "the caller's own copy stays as read"


def test_what_the_recipe_does_not_own_passes_through_untouched():
    zero = {"stage": 3, "reduce_bucket_size": 7, "offload_optimizer": {"device": "cpu"}}
    merged = merge({"zero_optimization": zero, "flops_profiler": {"enabled": True}, "fp16": {"loss_scale_window": 9}})
    assert (
        merged["zero_optimization"] == zero
        and merged["flops_profiler"] == {"enabled": True}
        and merged["fp16"]["loss_scale_window"] == 9
    )


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"train_batch_size": 64}, ("train_batch_size", "64", "run.global_batch", "32")),
        ({"train_micro_batch_size_per_gpu": 8}, ("train_micro_batch_size_per_gpu", "8", "run.micro_batch", "4")),
        ({"gradient_clipping": 1.0}, ("gradient_clipping", "1.0", "optim.clip_norm", "3.0")),
        ({"bf16": {"enabled": False}}, ("bf16.enabled", "False", "run.precision", "True")),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}, ("optimizer.params.lr", "0.5", "optim.lr", "0.0015")),
    ],
)
def test_a_key_with_another_value_in_the_json_than_in_the_recipe_names_both(raw, named):
    message = refusal(merge, raw, "mine.json")
    for part in ("mine.json", "auto", *named):
        assert part in message


def test_equal_values_on_both_sides_are_no_conflict():
    merged = merge(
        {"train_batch_size": 32, "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.05}}}
    )
    assert merged["train_batch_size"] == 32 and "optimizer" not in merged


def test_a_scheduler_in_the_json_is_refused():
    assert "schedule" in refusal(merge, {"scheduler": {"type": "WarmupLR"}})


@pytest.mark.parametrize(
    "raw", [{"bf16": True}, {"data_types": "fp32"}, {"optimizer": "AdamW"}, {"optimizer": {"params": [1]}}]
)
def test_a_value_where_deepspeed_wants_an_object_is_refused(raw):
    assert "wants an object" in refusal(merge, raw)


def test_gradients_are_summed_in_32_bits_unless_the_json_says_otherwise():
    assert merge({"zero_optimization": {"stage": 1}})["data_types"]["grad_accum_dtype"] == "fp32"
    assert (
        merge({"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "bf16"}})["data_types"][
            "grad_accum_dtype"
        ]
        == "bf16"
    )
    assert merge({})["communication_data_type"] == "fp32"


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_without_zero_gradients_are_summed_in_the_weights_type_and_another_is_refused(precision):
    assert merge({}, precision=precision)["data_types"]["grad_accum_dtype"] == precision
    other = "fp32" if precision != "fp32" else "bf16"
    message = refusal(
        merge, {"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": other}}, precision=precision
    )
    assert other in message and precision in message and "auto" in message


# ------------------------------------------------------------------------------------ the command line


def run_stage(arguments, capsys) -> tuple[int, str]:
    """Exit code and stderr of a stage that only parses."""
    parser = stage_parser("A stage.", recipe="recipe", deepspeed_config="zero3.json")

    def main(argv):
        parse_stage(parser, PretrainRecipe, argv)

    with pytest.raises(SystemExit) as end:
        run(main, arguments)
    return end.value.code, capsys.readouterr().err


def test_overrides_may_stand_before_or_after_options(recipe_file):
    parser = stage_parser("A stage.", recipe="recipe", deepspeed_config="zero1.json")
    path = str(recipe_file(""))
    args, resolved = parse_stage(
        parser, PretrainRecipe, ["run.seed=1", "--recipe", path, ENOUGH, "--out", "there", "model.depth=2"]
    )
    assert (resolved.recipe.run.seed, resolved.recipe.model.depth, args.out) == (1, 2, Path("there"))


def test_the_run_folder_is_named_after_the_recipe_unless_given(recipe_file):
    args, _ = parse_stage(
        stage_parser("A stage.", recipe="recipe", deepspeed_config="zero1.json"),
        PretrainRecipe,
        ["--recipe", str(recipe_file("name: mine")), ENOUGH],
    )
    assert args.out == Path("runs/mine")


@pytest.mark.parametrize(
    "extra", [["run.micro_bacth=1"], ["--no_such_option"], ["run.precision=bf8"], ["--local_rank", "x"]]
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(recipe_file, capsys, extra):
    code, error = run_stage(["--recipe", str(recipe_file("")), ENOUGH, *extra], capsys)
    assert code == EXIT_BAD_INPUT
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error


def test_good_input_is_silent_and_exit_code_0(recipe_file, capsys):
    assert run_stage(["--recipe", str(recipe_file("")), ENOUGH], capsys) == (EXIT_DONE, "")


def test_our_own_faults_keep_their_traceback_and_end_with_1(capsys):
    def main(argv):
        raise AssertionError("ours")

    with pytest.raises(SystemExit) as end:
        run(main, [])
    assert end.value.code == 1 and "Traceback" in capsys.readouterr().err


def test_a_file_that_cannot_be_opened_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        run(lambda argv: Path("/nowhere/at/all").read_bytes(), [])
    assert (
        end.value.code == EXIT_BAD_INPUT
        and capsys.readouterr().err == "error: /nowhere/at/all: No such file or directory\n"
    )


# ------------------------------------------------------------------------------------- any text at all

scalars = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=12) | st.dates()
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=12,
)
quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def recipe_or_refusal(recipe_type, path, overrides=()):
    try:
        return load_recipe(recipe_type, path, list(overrides), environ={}).recipe
    except UserError as error:
        assert str(error)
        return None


@quick
@given(
    recipe_type=st.sampled_from([PretrainRecipe, TokenizerRecipe]),
    content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode),
)
def test_random_bytes_are_a_recipe_or_a_user_error(tmp_path, recipe_type, content):
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    recipe_or_refusal(recipe_type, path)


@quick
@given(recipe_type=st.sampled_from([PretrainRecipe, TokenizerRecipe]), tree=trees)
def test_random_yaml_is_a_recipe_or_a_user_error(tmp_path, recipe_type, tree):
    path = tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump(tree))
    recipe_or_refusal(recipe_type, path)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe_type=st.sampled_from([PretrainRecipe, TokenizerRecipe]), data=st.data())
def test_known_settings_with_random_values_are_refused_or_plan_a_run(tmp_path, recipe_type, data):
    path = tmp_path / "any.yaml"
    small = (
        st.integers(-3, 20_000)
        | st.floats(-2, 1e4)
        | st.lists(st.floats(-1, 4) | st.integers(-1, 4), max_size=4)
        | st.sampled_from(["", "none", "1e3", None, True])
    )
    chosen = data.draw(st.dictionaries(st.sampled_from(known_keys(recipe_type)), small, max_size=3))
    path.write_text("")
    overrides = [ENOUGH, "perceptual.weight=0"] if recipe_type is TokenizerRecipe else [ENOUGH]
    recipe = recipe_or_refusal(
        recipe_type, path, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in chosen.items())]
    )
    if recipe is None:
        return
    try:
        resolve_durations(recipe, 1_281_167)
    except UserError:
        return
    assert dry_run_report(recipe, num_samples=1_281_167, ds_config={})


@quick
@given(content=st.binary(max_size=200) | trees.map(lambda tree: json.dumps(tree, default=str).encode()))
def test_random_bytes_and_json_are_a_deepspeed_config_or_a_user_error(tmp_path, content):
    path = tmp_path / "any.json"
    path.write_bytes(content)
    try:
        raw = read_deepspeed_json(path)
    except UserError:
        return
    assert isinstance(raw, dict)


@quick
@given(tree=st.dictionaries(st.sampled_from(sorted(DEEPSPEED_KEYS)), trees, max_size=4))
def test_known_deepspeed_keys_with_random_values_merge_or_give_a_user_error(tmp_path, tree):
    path = tmp_path / "any.json"
    path.write_text(json.dumps(tree, default=str))
    try:
        merged = merge(read_deepspeed_json(path), path)
    except UserError:
        return
    assert merged["train_batch_size"] == 32


def test_a_duration_of_the_command_line_takes_the_place_of_the_recipes_other_spelling(recipe_file):
    path = recipe_file("schedule: {epochs: 100, warmup_epochs: 5}\ncheckpoint: {every_epochs: 1}")
    resolved = load_recipe(
        PretrainRecipe, path, ["schedule.steps=10", "schedule.warmup_steps=2", "checkpoint.every_steps=5"]
    )
    recipe = resolved.recipe
    assert (
        recipe.schedule.epochs,
        recipe.schedule.steps,
        recipe.schedule.warmup_epochs,
        recipe.schedule.warmup_steps,
    ) == (None, 10, None, 2)
    assert (recipe.checkpoint.every_epochs, recipe.checkpoint.every_steps) == (None, 5)
    with pytest.raises(UserError, match="both set"):
        load_recipe(PretrainRecipe, path, ["schedule.steps=10", "schedule.epochs=3"])


def test_a_setting_of_another_stage_says_whose_it_is(recipe_file):
    with pytest.raises(UserError, match="a setting of train_tokenizer.py"):
        load_recipe(PretrainRecipe, recipe_file("schedule: {epochs: 1}"), ["tokenizer.channels=3"])
