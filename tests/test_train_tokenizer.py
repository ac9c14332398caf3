"""Tokenizer training through DeepSpeed on CPU: ranks, ZeRO stages, judge, critic, teacher (VQ-KD), resume, release.

One launch of one rank and one of two run all cases; each test looks at what its cases left behind.
"""

import json

import pytest
import timm
import torch
from conftest import REPOSITORY, run_stage
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from peco_ds.models.tokenizers import load_tokenizer
from peco_ds.runtime.metrics import read_metrics

COMMON = (
    "views.tokenizer_px=32 data.val_images= data.holdout=7 data.num_workers=0 "
    "tokenizer.num_codes=32 tokenizer.code_dim=8 tokenizer.l2_normalized=true "
    "tokenizer.decay=0.9 "
    "tokenizer.kmeans_vectors=256 optim.lr=2e-3 schedule.epochs=null schedule.steps=12 "
    "schedule.warmup_epochs=null schedule.warmup_steps=1 run.precision=fp32 run.global_batch=8 "
    "run.micro_batch=4 run.log_every_steps=1 evaluation.every_steps=6 checkpoint.every_epochs=null"
).split()
SMALL = [
    *COMMON,
    *(
        "tokenizer.channels=16 tokenizer.channel_mults=[1,1,2,2] tokenizer.blocks_per_level=1 "
        "tokenizer.z_channels=16 tokenizer.revive_below=0.5 perceptual.weight=0"
    ).split(),
]
SMALL_VQKD = [
    *COMMON,
    *(
        "tokenizer.vit.image_px=32 tokenizer.vit.patch_px=8 tokenizer.vit.width=48 "
        "tokenizer.vit.depth=2 tokenizer.vit.heads=3 tokenizer.vit.decoder_width=48 "
        "tokenizer.vit.decoder_depth=1 tokenizer.vit.decoder_heads=3 tokenizer.vit.target_width=192"
    ).split(),
]


@pytest.fixture(scope="module")
def judge_file(tmp_path_factory):
    """A small DeiT-shaped file, as timm writes one.

    Its weights are random, which is enough to see that the loss reaches the tokenizer.
    """
    torch.manual_seed(1)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=0)
    path = tmp_path_factory.mktemp("judge") / "vit_tiny.pth"
    torch.save({"model": net.state_dict()}, path)
    return path


def case(small_sets, folder, name, *, zero=1, extra=(), recipe="peco_tokenizer", small=SMALL):
    config = REPOSITORY / "ds_configs" / f"zero{zero}.json"
    return {
        "stage": "train_tokenizer",
        "arguments": [
            "--recipe",
            recipe,
            "--deepspeed_config",
            str(config),
            "--out",
            str(folder / name),
            f"data.root={small_sets.root}",
            *small,
            *extra,
        ],
    }


@pytest.fixture(scope="module")
def runs(small_sets, judge_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    judged = ["perceptual.weight=30", f"perceptual.weights={judge_file}", "perceptual.blocks=[1,3]"]

    def vqkd(name, *extra, zero=1):
        return case(
            small_sets,
            folder,
            name,
            zero=zero,
            extra=[f"teacher.weights={judge_file}", *extra],
            recipe="beitv2_tokenizer",
            small=SMALL_VQKD,
        )

    for ranks in (1, 2):
        if ranks == 1:
            cases = [
                case(small_sets, folder, "plain_1"),
                case(small_sets, folder, "judged_1", extra=judged),
                case(small_sets, folder, "one_pass_1", extra=["run.micro_batch=8"]),
            ]
            cases += [vqkd("vqkd_1")]
            vits = [setting for setting in SMALL_VQKD if "target_width" not in setting]
            cases += [case(small_sets, folder, "vqvit_1", small=vits, extra=["tokenizer.kind=vqvit", *judged])]
        else:
            critic = [
                "adversarial.weight=3",
                "adversarial.start_step=3",
                "adversarial.lr=1e-3",
                "adversarial.channels=8",
                "adversarial.layers=2",
            ]
            cases = [case(small_sets, folder, f"plain_zero{zero}_2", zero=zero) for zero in (0, 1, 2, 3)]
            cases += [
                case(small_sets, folder, "critic_2", zero=3, extra=[*critic, *judged]),
                case(small_sets, folder, "half_2", extra=["schedule.stop_at_step=5"]),
                case(small_sets, folder, "half_2"),
                case(small_sets, folder, "bf16_2", extra=["run.precision=bf16"]),
                *(vqkd(f"vqkd_zero{zero}_2", zero=zero) for zero in (1, 3)),
                vqkd("vqkd_half_2", "schedule.stop_at_step=5", zero=3),
                vqkd("vqkd_half_2", zero=3),
                vqkd("vqkd_bf16_2", "run.precision=bf16", zero=3),
            ]
        listing = folder / f"cases_{ranks}.json"
        listing.write_text(json.dumps(cases))
        run_stage(str(REPOSITORY / "tests" / "many_runs.py"), listing, ranks=ranks, timeout_s=900)
        assert not any(json.loads((folder / f"cases_{ranks}.json.codes").read_text()))
    return folder


def losses(runs, name):
    return [row["loss"] for row in read_metrics(runs / name)]


def evaluations(runs, name):
    return [json.loads(line) for line in (runs / name / "evaluation.jsonl").read_text().splitlines()]


def test_held_out_reconstructions_get_better_on_real_images(runs):
    first, *_, last = evaluations(runs, "plain_1")
    assert (first["step"], last["step"]) == (0, 12)
    assert last["psnr"] > first["psnr"] + 1 and last["ssim"] > first["ssim"]
    assert 1 < last["codes_used"] <= 32 and 1 < last["perplexity"] <= 32


@pytest.mark.parametrize("name", ["plain_zero0_2", "plain_zero1_2", "plain_zero2_2", "plain_zero3_2", "one_pass_1"])
def test_ranks_zero_stage_and_micro_batch_change_neither_losses_nor_codebook(runs, name):
    # a sum taken in another order now and then tips a patch to its second nearest code; measured worst case 4e-4
    assert losses(runs, name) == pytest.approx(losses(runs, "plain_1"), rel=4e-3)
    mine, reference = (load_tokenizer(runs / run / "tokenizer")[0].codebook for run in (name, "plain_1"))
    # ... and a dead code to restart at another encoder output, whose place in the lottery follows from its bits
    same = (mine.codes - reference.codes).abs().amax(dim=1) < 0.05
    assert same.float().mean() > 0.85


def test_the_judge_enters_the_loss_and_the_record(runs, judge_file):
    rows = read_metrics(runs / "judged_1")
    for row in rows:
        terms = row["pixel"] + 0.25 * row["commitment"] + 30 * row["perceptual"]
        assert row["loss"] == pytest.approx(terms, rel=1e-5) and row["perceptual"] > 0
    plain = read_metrics(runs / "plain_1")
    assert rows[0]["pixel"] == plain[0]["pixel"] and rows[-1]["pixel"] != plain[-1]["pixel"], "its gradient trains"
    card = load_tokenizer(runs / "judged_1" / "tokenizer")[1]
    assert judge_file.name in card.extra["judge"] and card.extra["steps"] == 12 and card.extra["images_seen"] == 96
    assert load_tokenizer(runs / "plain_1" / "tokenizer")[1].extra["judge"] == "none"


def test_a_critic_trains_beside_the_tokenizer_and_stays_out_of_its_release(runs):
    rows, without = read_metrics(runs / "critic_2"), read_metrics(runs / "judged_1")
    assert all({"critic", "generator"} <= row.keys() for row in rows)
    assert min(row["critic"] for row in rows) < rows[0]["critic"], "the critic learns"
    # until start_step the tokenizer trains as if the critic were not there (up to the order of sums), then it feels it
    assert [row["pixel"] for row in rows[:4]] == pytest.approx([row["pixel"] for row in without[:4]], rel=4e-3)
    assert rows[-1]["pixel"] != pytest.approx(without[-1]["pixel"], rel=4e-3)
    load_tokenizer(runs / "critic_2" / "tokenizer")


def test_a_tokenizer_run_that_was_stopped_continues_bit_for_bit(runs):
    whole, resumed = read_metrics(runs / "plain_zero1_2"), read_metrics(runs / "half_2")
    assert [row["step"] for row in resumed] == list(range(1, 13))
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]
    assert [row["codes_used"] for row in resumed] == [row["codes_used"] for row in whole]
    assert (
        load_tokenizer(runs / "half_2" / "tokenizer")[1].fingerprint
        == load_tokenizer(runs / "plain_zero1_2" / "tokenizer")[1].fingerprint
    )


def test_vits_on_both_sides_of_a_codebook_learn_images_and_their_release_makes_them(runs):
    measured = evaluations(runs, "vqvit_1")
    assert measured[-1]["psnr"] > measured[0]["psnr"] + 1
    assert all(row["perceptual"] > 0 for row in read_metrics(runs / "vqvit_1"))
    tokenizer, card = load_tokenizer(runs / "vqvit_1" / "tokenizer")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    codes = tokenizer.tokenize(images)
    assert card.stride_px == 8 and codes.shape == (2, 16)
    torch.testing.assert_close(tokenizer.decode_codes(codes, (4, 4)), tokenizer(images).reconstruction)


def test_bf16_training_keeps_the_codebook_in_float32_and_follows_the_curve(runs):
    tokenizer, _ = load_tokenizer(runs / "bf16_2" / "tokenizer")
    assert tokenizer.codebook.codes.dtype == torch.float32
    rounded = tokenizer.codebook.codes.to(torch.bfloat16).float()
    assert not torch.equal(rounded, tokenizer.codebook.codes), "the codes were rounded to bf16 on the way"
    assert losses(runs, "bf16_2") == pytest.approx(losses(runs, "plain_1"), rel=0.1)


def test_the_image_grid_shows_original_and_round_trip(runs):
    grid = Image.open(runs / "plain_1" / "reconstructions.png")
    # two columns, seven held-out images of 32 px enlarged to 128, a gap of 4 px around each, their names above
    assert grid.size == (2 * (128 + 8), 24 + 7 * (128 + 8))


@pytest.mark.parametrize("name", ["plain_1", "critic_2", "vqkd_1", "vqkd_half_2"])
def test_training_ends_in_an_atlas_of_the_codes_with_and_without_images(runs, name):
    events = EventAccumulator(str(runs / name / "tensorboard"))
    events.Reload()
    (shown,) = [image for image in events.Images("code atlas") if image.step == 12]
    assert Image.open(runs / name / "code_atlas.png").size == (shown.width, shown.height)


def test_a_tokenizer_run_is_no_input_for_convert(runs, tmp_path):
    done = run_stage("convert_checkpoint", runs / "plain_1", "--to", "timm", "--out", tmp_path, check=False)
    assert done.returncode == 2 and "a run of train_tokenizer" in done.stderr


# ----------------------------------------------------------------------------------------------- VQ-KD


def cosines(runs, name):
    return [row["cosine"] for row in read_metrics(runs / name)]


def test_a_vqkd_tokenizer_comes_to_look_like_its_teacher_on_real_images(runs):
    assert (
        cosines(runs, "vqkd_1")[-1] > cosines(runs, "vqkd_1")[0] + 0.2
        and losses(runs, "vqkd_1")[-1] < losses(runs, "vqkd_1")[0] - 0.2
    )
    first, *_, last = evaluations(runs, "vqkd_1")
    assert first.keys() == {"step", "cosine", "codes_used", "perplexity"} and last["cosine"] > first["cosine"] + 0.2
    assert 1 < last["codes_used"] <= 32 and not (runs / "vqkd_1" / "reconstructions.png").exists()


@pytest.mark.parametrize("name", ["vqkd_zero1_2", "vqkd_zero3_2"])
def test_ranks_and_zero_stage_change_neither_losses_nor_codebook_of_vqkd(runs, name):
    # measured: no difference at all, since a sum of two ranks and one of two passes are the same two numbers
    assert losses(runs, name) == pytest.approx(losses(runs, "vqkd_1"), rel=1e-5)
    mine, reference = (load_tokenizer(runs / run / "tokenizer")[0].codebook for run in (name, "vqkd_1"))
    torch.testing.assert_close(mine.codes, reference.codes, rtol=0, atol=1e-5)
    torch.testing.assert_close(mine.ema_count, reference.ema_count)


def test_a_vqkd_run_that_was_stopped_continues_bit_for_bit(runs):
    whole, resumed = read_metrics(runs / "vqkd_zero3_2"), read_metrics(runs / "vqkd_half_2")
    assert [row["step"] for row in resumed] == list(range(1, 13))
    assert [(row["loss"], row["cosine"], row["codes_used"]) for row in resumed] == [
        (row["loss"], row["cosine"], row["codes_used"]) for row in whole
    ]
    assert (
        load_tokenizer(runs / "vqkd_half_2" / "tokenizer")[1].fingerprint
        == load_tokenizer(runs / "vqkd_zero3_2" / "tokenizer")[1].fingerprint
    )


def test_vqkd_in_bf16_keeps_its_codebook_in_float32_and_follows_the_curve(runs):
    codes = load_tokenizer(runs / "vqkd_bf16_2" / "tokenizer")[0].codebook.codes
    assert codes.dtype == torch.float32 and not torch.equal(codes.to(torch.bfloat16).float(), codes)
    # measured worst case 2e-3
    assert losses(runs, "vqkd_bf16_2") == pytest.approx(losses(runs, "vqkd_1"), rel=0.02)


def test_a_vqkd_release_names_its_teacher_and_its_size_and_gives_codes(runs, judge_file):
    tokenizer, card = load_tokenizer(runs / "vqkd_1" / "tokenizer")
    assert (
        judge_file.name in card.extra["judge"]
        and isinstance(card.extra["judge_licence"], str)
        and card.extra["steps"] == 12
    )
    assert (card.settings.kind, card.settings.only_px, card.stride_px) == ("vqkd", 32, 8) and card.extra[
        "cosine"
    ] == evaluations(runs, "vqkd_1")[-1]["cosine"]
    codes = tokenizer.tokenize(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert codes.shape == (2, 16) and codes.max() < 32
