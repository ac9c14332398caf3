"""benchmarks.step and what it shares: that it runs at toy size, and that its arithmetic is right.

Never how fast anything is.
"""

import argparse
import os
import re
import subprocess
import sys

import pytest
import torch
from benchmark_runs import run_benchmark
from conftest import REPOSITORY

from benchmarks.engine_step import recompilation
from benchmarks.matmul_ceiling import data_sheet_flops, matmul_ceiling
from benchmarks.plots import ratio_bars
from benchmarks.profile_step import Stretch, kind_of, profile_step, shares_of_kernels
from benchmarks.record import versions, write_record
from benchmarks.step import AXES, CPU_SIZES, Measurement, Row, Setting, cells, settings_of, table, utilisation
from benchmarks.step_time import Turns, step_costs, step_memory
from peco_ds.config import PretrainRecipe
from peco_ds.errors import UserError
from peco_ds.recipe_files import load_recipe

TOY = (
    "model.depth=2 model.width=48 model.heads=3 model.image_px=64 mask.count=6 mask.min_block=2 "
    "objective.num_codes=64 run.micro_batch=2"
).split()
CEILINGS = {torch.float32: 1e13}


def row(seconds, *, batch=10, compile="none", drop_by="image", **fields):
    return Row(
        Setting("B/16", "3", "none", compile, drop_by), batch=batch, flops_per_image=10**11, seconds=seconds, **fields
    )


def arguments(**chosen):
    return argparse.Namespace(
        **{
            "gpu": False,
            "sizes": None,
            "all": False,
            "passes": None,
            **{axis: ",".join(values) for axis, values in AXES.items()},
        }
        | chosen
    )


def table_rows(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_every_row_is_trained_and_recorded_with_ratio_ceiling_activations_and_profile(tmp_path):
    record = tmp_path / "step.md"
    run_benchmark(
        "step",
        "--sizes",
        "B/16 of 3 blocks",
        "--zero",
        "3,1",
        "--checkpointing",
        "none,full",
        "--compile",
        "none",
        "--drop_by",
        "image",
        "--rounds",
        2,
        "--passes",
        2,
        "--profile",
        "--record",
        record,
        "--plot",
        tmp_path / "step.png",
        *TOY,
    )
    text = record.read_text()
    found = [re.split(r" *\| *", line.strip("|").strip()) for line in text.splitlines() if line.startswith("| B/16")]
    assert [(cell[1], cell[2]) for cell in found] == [("3", "none"), ("3", "full"), ("1", "none")]
    assert {cell[5] for cell in found} == {"2 x 2"} and "1 steps, 2 passes each" in text
    assert found[0][7] == "1.00" and all(float(cell[6].split()[0]) > 0 and cell[8].endswith("%") for cell in found)
    assert float(found[1][10]) < float(found[0][10]), "blocks that are recomputed keep less"
    assert "## Where the time goes: B/16 of 3 blocks, base" in text and "matrix products" in text and "torch 2" in text
    assert (tmp_path / "step.png").stat().st_size > 1000


def test_the_base_of_every_size_comes_first_and_then_one_change_at_a_time():
    found = settings_of(arguments(zero="1,3", compile="none,blocks"))
    sizes = list(CPU_SIZES)
    assert found[:2] == [
        Setting(size, zero="1", checkpointing="none", compile="none", drop_by="image") for size in sizes
    ]
    base = found[0]
    changed = [
        [name for name in AXES if getattr(other, name) != getattr(base, name)]
        for other in found[2:]
        if other.size == sizes[0]
    ]
    assert changed == [["compile"], ["checkpointing"], ["checkpointing"], ["drop_by"], ["zero"]]
    assert (
        len(settings_of(arguments(all=True, sizes=sizes[0])))
        == 4 * 3 * 2 * 2
        == len(set(settings_of(arguments(all=True, sizes=sizes[0]))))
    )


@pytest.mark.parametrize("wrong", [{"sizes": "G/14"}, {"zero": "4"}, {"compile": "blocks,never"}])
def test_a_size_or_value_that_is_not_known_is_named(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))} (G/14|4|never): not one of"):
        settings_of(arguments(**wrong))


def test_full_sizes_are_those_of_the_recipes_with_four_passes_a_step():
    measurement = Measurement(arguments(gpu=True, overrides=[], steps=None))
    assert len(measurement.settings) == 4 + 4 * 7
    for setting in measurement.settings:
        recipe = measurement.recipe(setting)
        assert (
            recipe.run.precision == "bf16"
            and 4 * recipe.run.micro_batch == recipe.run.global_batch
            and recipe.run.compile == setting.compile
        )
        assert recipe.model.depth == {"H": 32, "L": 24, "B": 12}[setting.size[0]] and setting.size.endswith(
            str(recipe.model.image_px)
        )


FORGOTTEN = """
import sys, weakref
import torch
from benchmarks.engine_step import EngineTrainer, join_alone
from benchmarks.guards import free_memory
from benchmarks.step_time import this_device
from peco_ds.config import PretrainRecipe
from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.recipe_files import load_recipe
join_alone()
linear = torch.nn.functional.linear
settings = ["run.precision=fp32", "run.compile=none", "run.global_batch=2", *sys.argv[1:]]
for zero in "03":
    recipe = load_recipe(PretrainRecipe, "peco_vitb16", settings).recipe
    trainer = EngineTrainer(recipe, DS_CONFIGS / f"zero{zero}.json", this_device())
    trainer.step()
    assert torch.nn.functional.linear is linear, "another trainer would run ZeRO-3's"
    kept = [weakref.ref(thing) for thing in (trainer.engine.module, trainer.engine.optimizer)]
    trainer.close()
    free_memory()
    print([thing() is None for thing in kept])
"""


def test_a_trainer_that_is_closed_leaves_neither_model_nor_moments_behind():
    done = subprocess.run([sys.executable, "-c", FORGOTTEN, *TOY], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["[True, True]"] * 2


def test_utilisation_is_the_models_flops_over_the_ceiling_and_missing_where_branches_are_skipped():
    assert utilisation(row([0.9, 1.0, 5.0]), CEILINGS) == (pytest.approx(10 * 10**11 / 1e13), None)
    assert utilisation(row([1.0], skips=True), CEILINGS) == (None, None)


def test_images_a_second_count_all_passes_of_a_step():
    fast = row([2.0, 2.0], passes=4)
    assert fast.images_per_s == 20 and fast.spread == (20, 20)


def test_a_row_that_failed_says_why_and_is_nobodys_base():
    failed, fine = row([], failure="out of memory"), row([2.0])
    assert "out of memory" in cells(failed, CEILINGS)
    assert [found["ratio"] for found in table_rows(table([fine, row([1.0])], CEILINGS))] == ["1.00", "2.00"]
    assert " 2.00 " not in table([failed, fine], CEILINGS).splitlines()[3]


def test_only_a_later_compilation_of_the_same_frame_counts_as_recompilation():
    assert [recompilation(number) for number in ("0/0", "3/0_1", "0/1", "2/10_0")] == [False, False, True, True]


def test_the_data_sheet_is_known_by_the_cards_name_and_for_16_bits_alone():
    names = {
        "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA H200": 989.4e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "CPU": None,
    }
    assert {name: data_sheet_flops(name, torch.bfloat16) for name in names} == names
    assert data_sheet_flops("NVIDIA H200", torch.float32) is None


def test_the_ceiling_is_at_least_what_one_product_just_reached():
    device = torch.device("cpu")
    assert 0 < matmul_ceiling(torch.float32, device, (64,)) < matmul_ceiling(torch.float32, device, (64, 512)) * 2


def test_a_trainer_that_fails_is_dropped_with_its_reason_and_the_others_take_all_their_turns():
    taken = []

    def failing():
        taken.append("bad")
        if taken.count("bad") == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    turns = Turns(
        {"bad": failing, "good": lambda: taken.append("good"), "best": lambda: taken.append("best")}, steps_a_turn=2
    ).run(3, warm_up=1)
    assert turns.failed == {"bad": "out of memory"} and len(turns.seconds["good"]) == len(turns.seconds["best"]) == 3
    assert taken.count("good") == taken.count("best") == 1 + 2 * 3 and taken.count("bad") == 3
    kept = [name for name in taken[-12:] if name != "bad"]
    assert (
        kept[0::2] == kept[1::2]
        and len(set(kept)) == 2
        and (kept[0] != kept[2] != kept[4] or kept[0] == kept[2] != kept[4])
    ), "the order turns from round to round"


def test_activations_are_what_stands_after_the_forward_pass():
    x = torch.randn(1000, 1000, requires_grad=True)
    kept, worst = step_memory(lambda: x.exp().sum(), lambda loss: loss.backward())
    assert kept == pytest.approx(4 * 10**6, rel=0.01) and worst == 0 and x.grad is not None


def test_two_recipes_step_by_turns_and_the_one_that_recomputes_keeps_less():
    recipes = {
        kind: load_recipe(
            PretrainRecipe, "peco_vitb16", [*TOY, "run.precision=fp32", f"run.activation_checkpointing={kind}"]
        ).recipe
        for kind in ("none", "full")
    }
    costs = step_costs(recipes, rounds=2)
    assert all(
        cost.batch == 2 and len(cost.seconds) == len(cost.cpu_seconds) == 2 and cost.images_per_s > 0
        for cost in costs.values()
    )
    assert 0 < costs["full"].saved_bytes_per_image < costs["none"].saved_bytes_per_image
    assert costs["full"].flops_per_image == costs["none"].flops_per_image, "recomputation is no work of the model"


def test_kernels_are_sorted_by_what_they_do():
    names = {
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80": "attention, forward",
        "fmha_cutlassB_bf16_aligned_64x64_k128_sm80": "attention, backward",
        "aten::_scaled_dot_product_efficient_attention_backward": "attention, backward",
        "nvjet_hsh_256x128_64x4_2x1_v_bz_coopB_NNT": "matrix products",
        "sm90_xmma_gemm_bf16bf16_bf16f32": "matrix products",
        "aten::addmm": "matrix products",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "communication",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimiser",
        "triton_red_fused__log_softmax_0": "softmax and loss over the codes",
        "triton_poi_fused_gelu_3": "norms, elementwise, sums, gathers",
        "Memcpy DtoD (Device -> Device)": "copies and fills",
        "something new": "other",
    }
    assert {name: kind_of(name) for name in names} == names


def test_idle_time_is_what_no_kernel_covers_though_two_ran_side_by_side():
    shares, total = shares_of_kernels(
        [Stretch("gemm", 0, 10), Stretch("ncclAllReduce", 5, 12), Stretch("gemm", 20, 30)]
    )
    assert total == 30 and shares["idle"] == 8 and shares["matrix products"] == 20 and shares["communication"] == 7


def test_a_profile_names_the_attention_operator_that_ran():
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    text = profile_step(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward(), steps=2)
    assert (
        "_scaled_dot_product_flash_attention_for_cpu` x 1" in text and "_flash_attention_for_cpu_backward` x 1" in text
    )


def test_a_record_says_command_versions_and_hardware_and_is_written_anew(tmp_path):
    path = tmp_path / "new" / "record.md"
    write_record(path, "A title", "python -m benchmarks.step --y", "first", "no-such-package")
    text = write_record(path, "A title", "python -m benchmarks.step --y", "| a |\n", "timm")
    assert path.read_text() == text and "first" not in text and "`python -m benchmarks.step --y`" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text and "timm 1" in text
    assert "no-such-package not installed" in versions("no-such-package") and [path.name] == os.listdir(path.parent)


def test_a_plot_without_bars_is_no_file(tmp_path):
    ratio_bars(tmp_path / "none.png", "title", {"size": []})
    ratio_bars(tmp_path / "bars.png", "title", {"size": [("ours", 1.2, 1.1, 1.3)], "other": []})
    assert os.listdir(tmp_path) == ["bars.png"]
