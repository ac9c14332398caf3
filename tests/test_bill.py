"""The bill of a chain: its sums, its text, its plain values."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from step_simulation import simulate_step

from peco_ds.planner.bill import bad_node_costs, bill_facts, make_bill
from peco_ds.planner.bill_text import assumption_lines, bad_node_lines, bill_text, scan_rows
from peco_ds.planner.chain import read_chain
from peco_ds.planner.hardware import find_hardware
from peco_ds.planner.stages import Stage

H100 = find_hardware("h100")
CHAIN = read_chain("peco_vith14", [])


@pytest.fixture(scope="module")
def bill():
    return make_bill(CHAIN, H100, 64)


def test_the_totals_are_the_sums_of_the_stages(bill):
    for pace in ("slow", "typical", "fast"):
        assert bill.hours(pace) == pytest.approx(sum(found.best.hours(pace) for found in bill.recommended))
        assert bill.gpu_hours(pace) == pytest.approx(
            sum(found.best.gpus * found.best.hours(pace) for found in bill.recommended)
        )


def test_the_recommended_settings_cost_no_more_than_the_written_ones(bill):
    for written, found in zip(bill.written, bill.recommended):
        assert found.best.gpu_hours() <= 1.02 * written.gpu_hours(), written.stage.name


def test_short_stages_take_fewer_gpus_than_a_long_one_where_they_do_not_scale():
    wide = make_bill(CHAIN, H100, 512, as_written=False)
    counts = {found.best.stage.name: found.best.gpus for found in wide.recommended}
    assert counts["peco_vith14"] == 512 and counts["finetune_vith14"] < 512
    whole = make_bill(read_chain("finetune_vith14", []), H100, 512, as_written=False)
    few = next(found.best for found in wide.recommended if found.best.stage.name == "finetune_vith14")
    assert few.gpu_hours() < whole.gpu_hours() and few.gpus < whole.main.gpus == 512


def test_a_stage_whose_batch_the_gpus_do_not_divide_takes_as_many_as_do():
    counts = {made.stage.name: made.gpus for made in make_bill(CHAIN, H100, 1024).written}
    assert counts == {
        "peco_tokenizer": 128,
        "peco_vith14, views": 1024,
        "peco_vith14": 1024,
        "finetune_vith14": 512,
        "finetune_vith14_448": 512,
    }


def test_the_text_has_every_stage_in_both_tables_and_the_parts_of_the_main_one(bill):
    text = bill_text(bill, assumed=True)
    for stage in CHAIN.stages:
        assert len(re.findall(rf"^{re.escape(stage.name)}  ", text, re.MULTILINE)) == 2
    for word in (
        "weights",
        "gradients",
        "optimiser",
        "buffers",
        "activations of 32",
        "all_gather",
        "reduce_scatter",
        "not hidden",
        "cores a node",
        "goodput",
        "token shards",
        "assumed: ImageNet-1K",
    ):
        assert word in text, word
    assert "run.micro_batch=32 run.activation_checkpointing=none" in text, "what to type"


def test_the_plain_values_are_json_and_those_of_the_text(bill):
    facts = json.loads(json.dumps(bill_facts(bill)))
    assert [row["recipe"] for row in facts["recommended"]] == [stage.recipe.name for stage in CHAIN.stages]
    main = facts["written"][2]
    assert main["by_pace"]["typical"]["hours"] == pytest.approx(bill.written[2].hours())
    assert main["memory_bytes"]["total"] == pytest.approx(
        sum(size for name, size in main["memory_bytes"].items() if name != "total") + 1.5 * 2**30
    )
    assert main["traffic"]["all_gather"]["num_bytes"] == pytest.approx(2 * main["parameters"], rel=0.02), (
        "every weight once, in 16 bits"
    )
    assert set(facts["storage_bytes"]) >= {"image shards", "token shards"}
    said = next(line for line in bill_text(bill, assumed=True).splitlines() if "storage, GB" in line)
    assert said.endswith(f"; {sum(facts['storage_bytes'].values()) / 1e9:,.0f} in all")
    assert facts["held_gpu_hours"]["typical"] == pytest.approx(64 * facts["total_hours"]["typical"])
    assert facts["held_gpu_hours"]["typical"] >= 0.999 * facts["total_gpu_hours"]["typical"]


def test_a_scan_scales_from_its_smallest_count():
    bills = [make_bill(CHAIN, H100, count, as_written=False) for count in (8, 64)]
    first, second = scan_rows(bills)
    assert first[5] == "100%" and 80 < int(second[5].rstrip("%")) <= 101


def test_one_bad_node_costs_what_a_played_step_takes_longer(bill):
    inputs, costs = bill.main.inputs(), bad_node_costs(bill.main)
    usual = simulate_step(inputs, steps=50).mean_s
    played = (
        simulate_step(inputs, steps=50, slow_nodes={0: 1.1}),
        simulate_step(inputs, steps=50, slow_nodes={0: 2.0}),
        simulate_step(inputs, steps=50, slow_network=0.5),
        simulate_step(inputs, steps=50, slow_network=0.1),
    )
    assert list(costs.values()) == pytest.approx([step.mean_s / usual - 1 for step in played], abs=0.012)
    (line,) = bad_node_lines(bill)
    assert all(f"{case} {share:+.1%}" in line for case, share in costs.items())
    alone = make_bill(CHAIN, H100, 8)
    assert bad_node_costs(alone.main) == {} and "there is only one node" in bad_node_lines(alone)[0]


def test_every_assumption_has_a_source_and_machines_that_share_it_share_the_line():
    lines = assumption_lines([H100, find_hardware("h200")])
    assert any(line.startswith("  h100, h200 ") for line in lines)
    for name in ("peak_flops", "product_share", "memory_bytes_s", "network_bytes_s", "storage_bytes_s"):
        assert [line for line in lines if f" {name}: " in line and len(line.split(": ", 2)[2]) > 20], name
    assert all(
        any(word in line for line in lines)
        for word in ("failures", "loaders", "stragglers", "reserved", "not in the hours")
    )


def test_a_neighbour_that_does_not_fit_as_written_does_not_hide_the_rest():
    tight = make_bill(CHAIN, replace(H100, memory_bytes=16e9), 1)
    assert tight.unfit and f"{tight.unfit[0].name}: does not fit as its recipe is written" in bill_text(
        tight, assumed=True
    )


def test_a_lone_pretraining_says_that_its_neighbours_are_not_known():
    text = bill_text(make_bill(read_chain("quickstart_vit", []), H100, 1), assumed=True)
    assert "--finetune_recipes" in text


def test_starved_loaders_are_told_which_limit_binds():
    starved = make_bill(read_chain("finetune_vitb16", ["data.num_workers=2"]), H100, 8)
    assert re.search(r"set data.num_workers=\d+ in place of 2", bill_text(starved, assumed=True))
    poor = make_bill(read_chain("finetune_vitb16", []), replace(H100, cores_per_node=8), 8)
    assert "the node has 8" in bill_text(poor, assumed=True)


def test_tokens_alone_are_no_training():
    tokenizing = next(made for made in make_bill(CHAIN, H100, 8).written if made.stage.kind == "tokenizing")
    assert isinstance(tokenizing.stage, Stage) and tokenizing.costs == {} and tokenizing.host_bytes == 0
