import json
import sys

import pytest
import torch
from beit_samples import same, sample
from conftest import run_stage
from safetensors.torch import load_file, save_file
from test_parsers import finished_run

from peco_ds.convert.read import read_weights
from peco_ds.convert.release import model_card, write_release
from peco_ds.convert.to_hf import to_hf
from peco_ds.convert.to_timm import HEAD_FILE, to_timm
from peco_ds.convert.to_unilm import to_unilm
from peco_ds.convert.verify import compare, model_outputs
from peco_ds.convert_checkpoint import main
from peco_ds.errors import UserError
from peco_ds.models.tokenizers import load_tokenizer, save_tokenizer
from peco_ds.runtime.run_weights import read_run
from peco_ds.schema import sha256_of_file, write_json

TO = {"timm": to_timm, "hf": to_hf, "unilm": to_unilm}
LIBRARY = {"timm": "timm", "hf": "transformers", "unilm": "unilm"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A file of each kind, as a stranger would have it."""
    folder = tmp_path_factory.mktemp("sources")
    for kind in ("mim", "features", "classifier"):
        torch.save({"model": sample(kind).tensors}, folder / f"{kind}.pth")
    return folder


def convert(source, to, out, *options):
    assert main([str(source), "--to", to, "--out", str(out), *options]) == 0
    return out


@pytest.mark.parametrize("to", ["timm", "hf", "unilm"])
@pytest.mark.parametrize(
    "kind, words",
    [("mim", "token logits and features in "), ("classifier", "class logits in "), ("features", "features in ")],
)
def test_a_release_is_loaded_in_a_fresh_process_and_its_outputs_are_compared(
    sources, tmp_path, capsys, kind, words, to
):
    if (kind, to) == ("features", "unilm"):
        with pytest.raises(UserError, match="convert it to timm or hf"):
            convert(sources / f"{kind}.pth", to, tmp_path / "release")
        return
    convert(sources / f"{kind}.pth", to, tmp_path / "release")
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and words in line and "equal our own model's to" in line
    assert float(line.split()[-1]) < 1e-5


@pytest.mark.parametrize("kind", ["mim", "classifier"])
def test_a_way_through_all_three_libraries_comes_back_bit_for_bit(sources, tmp_path, kind):
    start = convert(sources / f"{kind}.pth", "timm", tmp_path / "0", "--no-verify")
    for number, to in enumerate(("hf", "unilm", "timm", "unilm", "hf", "timm"), start=1):
        start = convert(start, to, tmp_path / f"{number}", "--no-verify")
        found = read_weights(start)
        assert found.kind == kind and same(found.tensors, sample(kind).tensors)
    assert same(load_file(tmp_path / "0" / "model.safetensors"), load_file(start / "model.safetensors"))


@pytest.mark.parametrize(
    "to, name",
    [
        ("timm", "blocks.1.mlp.fc2.weight"),
        ("timm", "lm_head.bias"),
        ("hf", "beit.encoder.layer.1.output.dense.weight"),
        ("hf", "beit.embeddings.mask_token"),
    ],
)
def test_one_changed_tensor_is_noticed(tmp_path, to, name):
    weights = sample("mim")
    write_release(tmp_path, TO[to](weights), weights)
    file = next(path for path in tmp_path.glob("*.safetensors") if name in load_file(path))
    save_file(
        {key: tensor * (1.1 if key == name else 1.0) for key, tensor in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match="differ from the trained model's by .*do not publish it"):
        compare(tmp_path, LIBRARY[to], model_outputs(weights))


@pytest.mark.parametrize("side", ["release", "weights"])
def test_a_head_of_nan_is_never_called_equal(tmp_path, side):
    weights = sample("mim")
    write_release(tmp_path, TO["timm"](weights), weights)
    if side == "release":
        # Nothing of ours writes such a file.
        tensors = load_file(tmp_path / HEAD_FILE)
        tensors["lm_head.bias"].fill_(float("nan"))
        save_file(tensors, tmp_path / HEAD_FILE, metadata={"format": "pt"})
    else:
        weights.tensors["lm_head.bias"].fill_(float("nan"))
    with pytest.raises(UserError, match="do not publish it"):
        compare(tmp_path, "timm", model_outputs(weights))


def test_a_release_for_another_library_is_not_written_over(tmp_path):
    weights = sample("classifier")
    write_release(tmp_path, TO["timm"](weights), weights)
    with pytest.raises(UserError, match="another library"):
        write_release(tmp_path, TO["hf"](weights), weights)
    write_release(tmp_path, TO["timm"](weights), weights)


@pytest.mark.parametrize(
    "change, words",
    [("tensor", "differ from"), ("index", "is not the port's"), ("missing", "Missing key|without its index")],
)
def test_one_changed_entry_of_a_unilm_file_is_noticed(tmp_path, change, words):
    weights = sample("classifier")
    write_release(tmp_path, to_unilm(weights), weights)
    tensors = torch.load(tmp_path / "model.pth")["model"]
    index = "blocks.1.attn.relative_position_index"
    if change == "tensor":
        tensors["blocks.2.attn.q_bias"] = tensors["blocks.2.attn.q_bias"] + 0.1
    elif change == "index":
        tensors[index] = tensors[index].T.contiguous()
    else:
        del tensors[index]
    torch.save({"model": tensors}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=words):
        compare(tmp_path, "unilm", model_outputs(weights))


def test_an_eps_that_is_not_beits_shows_in_the_comparison(tmp_path):
    """The trap of a BeitConfig that is told nothing; 1e-12 itself would hide behind activations of ordinary size."""
    weights = sample("classifier")
    write_release(tmp_path, to_hf(weights), weights)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["layer_norm_eps"] == 1e-6
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-2}))
    with pytest.raises(UserError, match="differ from"):
        compare(tmp_path, "transformers", model_outputs(weights))


@pytest.mark.parametrize("origin", ["", " of what it started from"], ids=["of its own run", "of the run before"])
def test_the_card_names_every_licence_that_binds_and_the_general_text_where_none_is_known(origin):
    weights = sample(
        "classifier",
        facts={f"judge's licence{origin}": "CC BY-NC 4.0 (MoCo v3's release)", f"tokenizer's licence{origin}": "MIT"},
    )
    text = model_card(to_timm(weights), weights)
    assert "\n- the tokenizer: MIT\n- the tokenizer's judge: CC BY-NC 4.0 (MoCo v3's release)\n" in text
    assert f"| judge's licence{origin} | CC BY-NC 4.0" in text
    plain = sample("classifier")
    assert "the weights that MoCo v3 released are CC BY-NC 4.0" in model_card(to_timm(plain), plain)


@pytest.mark.parametrize("told", ["judge's licence", "judge's licence of what it started from"])
def test_a_fine_tuning_of_a_fine_tuning_is_still_bound_by_the_first_runs_judge(tmp_path, told):
    finished_run(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step_00000003"
    provenance = json.loads((checkpoint / "provenance.json").read_text())
    write_json(checkpoint / "provenance.json", provenance | {"init_facts": {told: "CC BY-NC 4.0 (MoCo v3's release)"}})
    (checkpoint / "manifest.json").unlink()
    write_json(
        checkpoint / "manifest.json",
        {"files": {path.name: [path.stat().st_size, sha256_of_file(path)] for path in sorted(checkpoint.iterdir())}},
    )
    weights = read_run(tmp_path)
    assert weights.facts["judge's licence of what it started from"] == "CC BY-NC 4.0 (MoCo v3's release)"
    assert "- the tokenizer's judge: CC BY-NC 4.0 (MoCo v3's release)" in model_card(to_timm(weights), weights)


def test_a_run_converts_to_hugging_face_and_unilm_by_the_command_a_user_types(small_sets, tmp_path):
    tokenizer, card = load_tokenizer(small_sets.root / "tokenizer")
    save_tokenizer(
        tmp_path / "tokenizer",
        tokenizer.state_dict(),
        card.settings,
        {"judge": "a judge", "judge_licence": "Apache-2.0 (DINO's release)", "licence": "MIT"},
    )
    overrides = [*small_sets.overrides, "schedule.steps=2", f"data.tokenizer={tmp_path / 'tokenizer'}"]
    run_stage(
        "pretrain",
        "--recipe",
        "peco_vitb16",
        "--deepspeed_config",
        "ds_configs/zero3.json",
        "--out",
        tmp_path / "run",
        *overrides,
    )
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    found = []
    for to in ("hf", "unilm"):
        done = run_stage("convert_checkpoint", tmp_path / "run", "--to", to, "--out", tmp_path / to)
        assert "step_00000002" in done.stdout and "token logits and features in" in done.stdout
        card = (tmp_path / to / "README.md").read_text()
        assert provenance["tokenizer_fingerprint"] in card
        assert (
            "| judge's licence | Apache-2.0 (DINO's release) |" in card
            and "- the tokenizer: MIT\n- the tokenizer's judge: Apache-2.0 (DINO's release)\n" in card
        )
        found.append(read_weights(tmp_path / to))
    assert found[0].kind == "mim" and found[0].num_codes == 64 and same(found[0].tensors, found[1].tensors)
    assert main([str(tmp_path / "hf"), "--to", "timm", "--out", str(tmp_path / "again")]) == 0
    assert (
        "- the tokenizer: MIT\n- the tokenizer's judge: Apache-2.0 (DINO's release)\n"
        in (tmp_path / "again" / "README.md").read_text()
    ), "a release of a release is bound as that was"


def refused(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        main([str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_transformers_is_reported_before_anything_is_done(sources, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = refused(sources / "mim.pth", "--to", "hf", "--out", tmp_path / "release")
    assert "pip install transformers" in message and "--no-verify" in message and not (tmp_path / "release").exists()
    convert(sources / "mim.pth", "hf", tmp_path / "release", "--no-verify")


def test_what_would_overwrite_or_mix_releases_is_refused(sources, tmp_path):
    convert(sources / "mim.pth", "timm", tmp_path / "release", "--no-verify")
    assert "is SRC itself" in refused(tmp_path / "release", "--to", "hf", "--out", tmp_path / "release")
    assert "mim_head.safetensors of another release" in refused(
        sources / "classifier.pth", "--to", "timm", "--out", tmp_path / "release", "--no-verify"
    )
    convert(sources / "mim.pth", "timm", tmp_path / "release", "--no-verify")


def test_the_statistics_of_a_bare_file_can_be_told(sources, tmp_path):
    assert read_weights(
        convert(sources / "classifier.pth", "timm", tmp_path / "half", "--no-verify", "--statistics", "half")
    ).mean == (0.5, 0.5, 0.5)
    assert read_weights(convert(sources / "classifier.pth", "hf", tmp_path / "plain", "--no-verify")).mean == (
        0.485,
        0.456,
        0.406,
    )


def test_started_by_path_a_bad_source_is_one_line_and_exit_code_2(sources, tmp_path):
    done = run_stage(
        "convert_checkpoint", tmp_path / "none.pth", "--to", "hf", "--out", tmp_path / "release", check=False
    )
    assert done.returncode == 2 and done.stderr.strip().endswith("none.pth: no such file or folder; correct the path")
    done = run_stage(
        "convert_checkpoint",
        sources / "mim.pth",
        "--from",
        "run",
        "--to",
        "hf",
        "--out",
        tmp_path / "release",
        check=False,
    )
    assert done.returncode == 2 and "a file, not a run folder" in done.stderr and not (tmp_path / "release").exists()
