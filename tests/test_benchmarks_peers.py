"""benchmarks.peers: that it compares equal computations only, and that its arithmetic is right.

Never how fast anything is.
"""

import re

import pytest
import torch
from benchmark_runs import run_benchmark

from benchmarks import peers
from benchmarks.peers import (
    GPU_CONTENDERS,
    GPU_SIZES,
    HF,
    LIBRARIES,
    OURS,
    TIMM,
    BareTrainer,
    Comparison,
    Contender,
    LossesDiffer,
    Result,
    arguments,
    check_libraries,
    compare,
    drawn_weights,
    other_losses,
    resolved,
    table,
    verdicts,
)
from peco_ds.errors import UserError

TOY = (
    "model.depth=2 model.width=48 model.heads=3 model.image_px=64 mask.count=6 mask.min_block=2 "
    "objective.num_codes=64 run.micro_batch=2"
).split()
THREE = [Contender(library, "fp32") for library in (OURS, HF, TIMM)]


def toy():
    return resolved("peco_vitb16", "run.precision=fp32", TOY)


def test_ours_hugging_face_timm_and_the_engine_take_turns_from_the_same_first_loss(tmp_path):
    record = tmp_path / "peers.md"
    run_benchmark(
        "peers",
        "--rounds",
        2,
        "--at_once",
        4,
        "--without",
        "compiled",
        "--without",
        "eager attention",
        "--record",
        record,
        "--plot",
        tmp_path / "peers.png",
        *TOY,
    )
    text = record.read_text()
    rows = {
        cells[0]: cells[1:]
        for cells in (re.split(r" *\| *", line.strip("|").strip()) for line in text.splitlines())
        if len(cells) == 7
    }
    assert list(rows)[-4:] == ["ours, eager", "Hugging Face, eager", "timm, eager", "ours, DeepSpeed ZeRO-1, eager"]
    assert rows["ours, eager"][0].startswith("1.000") and all(float(rows[name][2]) > 0 for name in list(rows)[-4:])
    assert (
        "The same function, float32, loss" in text
        and "times the fastest of the 2 measured peers" in text
        and "transformers" in text
    )
    assert (tmp_path / "peers.png").stat().st_size > 1000


def test_all_libraries_compute_the_same_from_converted_weights():
    checked = check_libraries(toy(), [*THREE, Contender(HF, "fp32", attention="eager")])
    assert "gradient norm of the bias table" in checked.agreed and not checked.unlike


@pytest.mark.parametrize(
    "spoilt", ["rel_pos_bias.relative_position_bias_table", "backbone.cls_token", "blocks.1.gamma_2", "lm_head.bias"]
)
def test_a_library_that_computes_something_else_is_in_no_turn_and_the_others_are(monkeypatch, spoilt):
    def other(recipe, weights, batch, contender):
        return timm(
            recipe,
            {name: value * 0 if name.endswith(spoilt) else value for name, value in weights.items()},
            batch,
            contender,
        )

    timm = LIBRARIES[TIMM]
    monkeypatch.setitem(peers.LIBRARIES, TIMM, other)
    checked = check_libraries(toy(), THREE)
    assert list(checked.unlike) == [(TIMM, "SDPA")] and "gradient norm of the bias table" in checked.agreed
    assert re.search("of ours, eager is .*, of timm, eager", checked.unlike[TIMM, "SDPA"])


def test_a_library_that_fails_has_its_reason_in_the_table_and_costs_the_others_nothing(monkeypatch, tmp_path):
    def broken(*_):
        raise ImportError("huggingface_hub is of another age")

    monkeypatch.setitem(peers.LIBRARIES, HF, broken)
    without = [f"--without={text}" for text in ("compiled", "eager attention", "DeepSpeed")]
    comparison = Comparison(arguments(["--rounds", "1", "--passes", "2", *without, *TOY]))
    comparison.measure()
    found = {result.contender.library: result for result in comparison.results["B/16 at 224"]}
    assert [result.contender.library for result in comparison.broken()] == [HF]
    assert "another age" in found[HF].failure and found[HF].failure in comparison.body()
    assert len(found[TIMM].ratios) == 1 and "times the fastest of the 1 measured peers" in comparison.body()


def test_turns_of_several_passes_have_the_loss_and_the_gradient_of_one_pass():
    """The same batch in each pass: their mean is its gradient."""
    ends = []
    for passes in (1, 3):
        recipe = resolved("peco_vitb16", "run.precision=fp32", TOY, passes=passes)
        trainer = BareTrainer(recipe, drawn_weights(recipe), THREE[0])
        trainer.optimizer.zero_grad = lambda **_: None
        ends.append((trainer.step().item(), [weight.grad for weight in trainer.model.parameters()]))
    assert ends[0][0] == ends[1][0]
    for one, other in zip(ends[0][1], ends[1][1]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_no_number_is_a_difference():
    figures = {"ours": {"loss": 6.0}, "theirs": {"loss": 6.001}}
    assert "within 0.0002" in compare(figures, {"loss": 1e-3})
    for value in (6.1, float("nan")):
        with pytest.raises(LossesDiffer, match="of theirs"):
            compare(figures | {"theirs": {"loss": value}}, {"loss": 1e-3})


def test_full_sizes_are_the_recipes_own_in_16_bits_and_every_bare_precision_of_a_peer_has_one_of_ours():
    for size, (name, own) in GPU_SIZES.items():
        recipe = resolved(name, own, [])
        assert (
            recipe.run.precision == "bf16" and size.endswith(str(recipe.model.image_px)) and recipe.model.drop_path == 0
        )
    assert {contender.precision for contender in GPU_CONTENDERS if contender.library != OURS} <= {
        contender.precision for contender in GPU_CONTENDERS if contender.library == OURS
    }
    assert len({contender.label for contender in GPU_CONTENDERS}) == len(GPU_CONTENDERS)


def test_a_row_whose_first_loss_is_not_the_references_has_no_figures():
    said = other_losses({"ours": 9.0, "near": 9.01, "far": 9.5, "none": float("nan")}, 3e-2)
    assert list(said) == ["far", "none"] and "9.5" in said["far"] and "9" in said["none"]
    failed = Result(THREE[1], seconds=[1.0], ratios=[1.0], failure=said["far"])
    assert (
        said["far"]
        in table([Result(THREE[0], seconds=[1.0], ratios=[1.0], cpu_ratios=[1.0]), failed], 8).splitlines()[3]
        and verdicts([failed]) == []
    )


@pytest.mark.parametrize("setting", ["encoding.kind=visible", "aggregation.early_block=1", "run.precision=fp16"])
def test_what_the_peers_have_no_counterpart_of_is_refused(setting):
    with pytest.raises(UserError, match="BEiT's own step|loss scale"):
        resolved("peco_vitb16", "", ["model.depth=2", setting])


def test_ours_is_held_against_the_fastest_peer_of_its_precision():
    def result(contender, ratio):
        return Result(contender, seconds=[1.0], ratios=[ratio])

    results = [
        result(Contender(OURS, "bf16"), 1.0),
        result(Contender(HF, "bf16"), 0.5),
        result(Contender(TIMM, "bf16"), 0.8),
        result(Contender(TIMM, "bf16", compiled=True), 1.25),
        result(Contender(OURS, "bf16", compiled=True), 1.5),
        result(Contender(TIMM, "autocast"), 0.25),
        result(Contender(OURS, "master", compiled=True, zero="1"), 1.25),
        Result(Contender(HF, "autocast"), failure="out of memory"),
    ]
    said = verdicts(results)
    assert (
        "1.25 times the fastest of the 2 measured peers that are not compiled (timm, eager, bf16 "
        "weights; 1.25 to 1.25 over its turns)" in said[0]
    )
    assert (
        "1.20 times the fastest of the 3 measured peers (timm, compiled, bf16 weights; 1.20 to 1.20 over its turns)"
        in said[1]
    )
    assert (
        "5.00 times the fastest of the 1 measured peers (timm, eager, fp32 weights, bf16 autocast; "
        "5.00 to 5.00 over its turns)" in said[2]
    )
