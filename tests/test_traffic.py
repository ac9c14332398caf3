"""Predicted collectives against those that DeepSpeed's engine asks for, and what a user would miss if they were
wrong.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
from engine_census import TRAFFIC, census, each

from benchmarks.plan_engine import logged_sums, predicted_calls, sums
from peco_ds.config import FinetuneRecipe, PretrainRecipe
from peco_ds.deepspeed_json import DS_CONFIGS
from peco_ds.planner.traffic import Collective, sent_bytes, step_collectives, traffic_by_operation
from peco_ds.planner.work import finetune_segments, pretrain_segments
from peco_ds.recipe_files import load_recipe


def pairs(collectives) -> list[tuple[str, float]]:
    return [(call.operation, call.num_bytes) for call in collectives]


# ---------------------------------------------------------------------------------- against the engine


@pytest.mark.parametrize(("ranks", "name"), each(TRAFFIC), ids=str)
def test_bytes_and_calls_from_the_recipe_are_those_of_deepspeeds_logger(ranks, name):
    case, row = census(ranks)[name]
    said, seen = sums(pairs(predicted_calls(case, row, ranks, by_module=False))), logged_sums(row, ranks)
    assert said.keys() == seen.keys()
    for operation, (calls, num_bytes) in seen.items():
        # Worst case measured: 0.01 percent, what the padding of vectors comes to whose order in a group is guessed.
        assert said[operation][1] == pytest.approx(num_bytes, rel=1e-3), operation
        # Who owns a small tensor is guessed too, so reductions to owners may be cut at other places.
        assert said[operation][0] == pytest.approx(calls, abs=2 if operation == "reduce" else 0), operation


@pytest.mark.parametrize(("ranks", "name"), each(TRAFFIC), ids=str)
def test_told_what_each_module_holds_the_planner_finds_every_call_to_the_byte(ranks, name):
    case, row = census(ranks)[name]
    said = sums(pairs(predicted_calls(case, row, ranks, by_module=True)))
    assert said == logged_sums(row, ranks) == sums((operation, num_bytes) for *_, operation, num_bytes in row["calls"])


@pytest.mark.parametrize(("ranks", "name"), each(TRAFFIC), ids=str)
def test_gradients_are_reduced_in_the_micro_steps_in_which_the_engine_reduces_them(ranks, name):
    case, row = census(ranks)[name]
    said = Counter(
        (call.operation, call.micro_step)
        for call in predicted_calls(case, row, ranks, by_module=True)
        if call.operation != "all_gather"
    )
    seen = Counter((operation, micro_step) for _, micro_step, operation, _ in row["calls"] if operation != "all_gather")
    assert said == seen


# --------------------------------------------------------------------------------------- of a real run


def vith(
    changes: dict | None = None, *, file: str = "zero3", micro_steps: int = 1, ranks: int = 64, **arguments
) -> tuple[Collective, ...]:
    ds_config = json.loads((DS_CONFIGS / f"{file}.json").read_text())
    ds_config["zero_optimization"] |= changes or {}
    return step_collectives(
        VITH, ds_config=ds_config, precision="bf16", micro_steps=micro_steps, ranks=ranks, **arguments
    )


VITH = pretrain_segments(load_recipe(PretrainRecipe, "peco_vith14", [], environ={}).recipe)
WEIGHTS = 2 * sum(segment.parameters for segment in VITH)  # bytes


def multiples(collectives, ranks: int = 64) -> float:
    """What a rank sends, over the weights: as many ranks would, without the n-th part that stays."""
    return (
        sum(traffic.sent for traffic in traffic_by_operation(collectives, ranks).values())
        / WEIGHTS
        * ranks
        / (ranks - 1)
    )


@pytest.mark.parametrize(
    ("expected", "file", "changes"),
    [
        (4, "zero0", {}),
        (5, "zero1", {}),
        (5, "zero2", {}),
        (3, "zero2", {"use_multi_rank_bucket_allreduce": False}),
        (3, "zero3", {}),
        (4, "zero3", {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}),
    ],
    ids=str,
)
def test_vit_h_sends_the_multiples_of_its_weights_that_the_readme_of_the_jsons_says(expected, file, changes):
    assert multiples(vith(changes, file=file)) == pytest.approx(expected, rel=0.01)


def test_reduction_in_sixteen_bits_halves_what_is_reduced_and_nothing_else():
    configs = [{"zero_optimization": {"stage": 3}, "communication_data_type": dtype} for dtype in ("fp32", "bf16")]
    full, half = (
        traffic_by_operation(step_collectives(VITH, ds_config=config, precision="bf16", micro_steps=1, ranks=8), 8)
        for config in configs
    )
    assert half["reduce_scatter"].sent == full["reduce_scatter"].sent / 2
    assert half["all_gather"] == full["all_gather"]


def test_accumulation_repeats_the_traffic_of_zero2_and_3_and_not_that_of_zero0_and_1():
    for file, repeats in (("zero0", False), ("zero1", False), ("zero2", True), ("zero3", True)):
        once, thrice = multiples(vith(file=file)), multiples(vith(file=file, micro_steps=3))
        assert (thrice > 2 * once) == repeats and (repeats or thrice == once), file


def test_smaller_buckets_mean_more_calls_and_the_same_bytes():
    large, small = vith(), vith({"reduce_bucket_size": 20_000_000, "stage3_prefetch_bucket_size": 20_000_000})
    large, small = traffic_by_operation(large, 64), traffic_by_operation(small, 64)
    for operation in ("all_gather", "reduce_scatter"):
        assert small[operation].calls > large[operation].calls
        assert small[operation].num_bytes == pytest.approx(large[operation].num_bytes)


LIVES = [
    {},
    {"stage3_prefetch_bucket_size": 0},
    {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0},
    {"stage3_max_reuse_distance": 300_000_000},
]


@pytest.mark.parametrize("changes", LIVES, ids=str)
def test_a_gather_is_asked_for_before_it_is_needed_and_each_segment_is_gathered_before_its_pass(changes):
    gathers = [call for call in vith(changes) if call.operation == "all_gather"]
    forward, backward = ([call for call in gathers if call.when == when] for when in ("forward", "backward"))
    assert all(call.asked <= call.segment for call in forward) and all(call.asked >= call.segment for call in backward)
    assert [call.segment for call in forward] == sorted(call.segment for call in forward)
    assert [call.segment for call in backward] == sorted((call.segment for call in backward), reverse=True)
    assert sum(call.num_bytes for call in forward) >= WEIGHTS
    if not changes.get("stage3_prefetch_bucket_size", 1):
        assert all(call.asked == call.segment for call in forward), "nothing is fetched ahead"


def test_without_overlap_no_reduction_is_hidden_and_without_zero_none_can_be():
    calls = {
        file: vith({"overlap_comm": False} if file != "zero0" else {}, file=file)
        for file in ("zero0", "zero1", "zero2", "zero3")
    }
    reductions = {file: [call for call in found if call.operation != "all_gather"] for file, found in calls.items()}
    assert all(found and not any(call.overlaps for call in found) for found in reductions.values())
    assert all(call.when == "after" for call in reductions["zero0"])
    overlapped = [call for call in vith(file="zero2") if call.when == "backward"]
    assert overlapped and all(call.overlaps for call in overlapped)
    assert [call.segment for call in overlapped] == sorted((call.segment for call in overlapped), reverse=True), (
        "the last layers' gradients are there first"
    )


def test_layer_decay_costs_a_gather_and_a_norm_for_each_of_its_parameter_groups():
    recipe = load_recipe(FinetuneRecipe, "finetune_vith14", [], environ={}).recipe
    segments = finetune_segments(recipe, 1000)
    ds_config = json.loads((DS_CONFIGS / "zero2.json").read_text())
    by_groups = {}
    for groups in ("whole", "segment"):
        by_groups[groups] = traffic_by_operation(
            step_collectives(segments, ds_config=ds_config, precision="bf16", micro_steps=1, ranks=8, groups=groups), 8
        )
    assert by_groups["whole"]["all_gather"].calls == 2
    assert by_groups["segment"]["all_gather"].calls == 2 * len(segments)
    assert by_groups["segment"]["all_gather"].sent == pytest.approx(by_groups["whole"]["all_gather"].sent, rel=1e-3)


def test_one_rank_sends_nothing_and_neither_does_a_network_that_is_not_trained():
    assert vith(ranks=1) == ()
    frozen = [segment for segment in VITH if not segment.parameters]
    assert step_collectives(frozen, ds_config={}, precision="bf16", micro_steps=1, ranks=8) == ()


@pytest.mark.parametrize("operation", ["all_gather", "reduce_scatter", "all_reduce", "reduce"])
def test_what_a_rank_sends_is_what_a_ring_needs(operation):
    ranks, blocks = 5, 5 * 12

    def ring() -> int:
        """Values that a rank sends when every rank passes one part on to its neighbour, as often as it takes: once
        around, for an all-reduce twice.
        """
        return sum(blocks // ranks for _ in range(2 if operation == "all_reduce" else 1) for _ in range(ranks - 1))

    assert sent_bytes(Collective(operation, blocks, "after", 0, 0, False), ranks) == ring()
