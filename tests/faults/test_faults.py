"""The short version of the campaign: every kind of fault once or twice against real runs of two ranks, and proof that
the judge sees broken promises.
"""

from __future__ import annotations

import json
import random

import campaign
import pytest
from conftest import fork_server


@pytest.fixture(scope="module")
def stages(small_sets, labelled_sets):
    return campaign.stages_on(small_sets.overrides, labelled_sets.overrides)


@pytest.fixture(scope="module")
def server():
    return fork_server()


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return campaign.References(tmp_path_factory.mktemp("references"))


@pytest.fixture
def scene(server, references, tmp_path, request):
    return campaign.Scene(
        server, random.Random(request.node.name), tmp_path, campaign.Row(request.node.name), references
    )


PRETRAIN, FINETUNE = ("pretrain", 3), ("finetune", 1)
SHORT = [
    pytest.param(
        campaign.kills, PRETRAIN, {"most": 2}, id="killed_at_any_instant_pretraining_comes_to_the_same_losses"
    ),
    pytest.param(
        campaign.kills, FINETUNE, {"most": 2}, id="killed_at_any_instant_fine_tuning_comes_to_the_same_losses"
    ),
    pytest.param(campaign.stops, FINETUNE, {"most": 2}, id="stop_signals_also_during_a_save_end_in_good_order"),
    pytest.param(campaign.damaged, PRETRAIN, {"most": 1}, id="a_damaged_newest_checkpoint_is_passed_over_aloud"),
    pytest.param(campaign.full_disk, PRETRAIN, {"most": 2}, id="a_full_disk_is_one_clear_line_and_costs_no_checkpoint"),
    pytest.param(
        campaign.stalls, PRETRAIN, {"kinds": ("sleep",)}, id="a_rank_that_stands_still_ends_the_start_everywhere"
    ),
    pytest.param(campaign.spoilt_batch, PRETRAIN, {}, id="a_batch_of_nan_is_skipped_by_all_and_counted"),
    pytest.param(campaign.dead_worker, PRETRAIN, {}, id="a_dead_loader_worker_changes_no_batch"),
    pytest.param(campaign.store_faults, PRETRAIN, {}, id="sets_come_from_a_server_that_fails"),
    pytest.param(campaign.elastic, FINETUNE, {"most": 1}, id="another_number_of_ranks_sees_the_same_global_batches"),
]


@pytest.mark.parametrize(("scenario", "where", "options"), SHORT)
def test_the_promises_hold_when(scenario, where, options, scene, stages):
    entry, zero = where
    scenario(scene, stages[entry], zero, **options)
    assert scene.row.broken == []
    assert scene.row.faults and scene.row.committed, "nothing was tried"


@pytest.fixture
def finished(server, references, stages, tmp_path):
    """A finished run and its judge, before anything is wrong."""
    row = campaign.Row("finished")
    scene = campaign.Scene(server, random.Random(0), tmp_path, row, references)
    run = scene.run(stages["pretrain"], 3)
    return run, row


def test_the_judge_sees_what_breaks_a_promise(finished):
    """One start; then each promise is broken by hand, and has to be found broken."""
    run, row = finished
    ended = run.start(zero=3)
    run.compare()
    assert row.broken == [] and row.committed == campaign.STEPS // 2

    metrics = run.folder / "metrics.jsonl"
    text = metrics.read_text()
    lines = text.splitlines()
    changed = json.loads(lines[4])
    changed["loss"] *= 1 + 1e-7
    for spoilt, words in (
        ([*lines, lines[-1]], "metrics.jsonl has steps"),
        (lines[:-1], "metrics.jsonl has steps"),
        ([*lines[:-1], lines[-1][:20]], "not readable"),
        ([*lines[:4], json.dumps(changed), *lines[5:]], "from step 5 on"),
    ):
        metrics.write_text("\n".join(spoilt) + "\n")
        run.compare()
        assert words in row.broken.pop()
    metrics.write_text(text)

    newest = campaign.checkpoints_of(run.folder)[campaign.STEPS]
    victim = newest / "progress.json"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1])
    run._judge_checkpoints(ended)
    assert "bears its final name" in row.broken.pop() and row.lost == 1
    victim.write_bytes(whole)
    run._judge_checkpoints(ended)
    newest.rename(newest.with_name("elsewhere"))
    run._judge_checkpoints(ended)
    assert "is gone" in row.broken.pop() and row.lost == 2
    assert row.broken == []
