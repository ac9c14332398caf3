"""Released files read as they are: recognised, nothing in them run, and refused by name where they are something
else.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from published_samples import dalle_tensors, save_dalle, save_lightning, taming_tensors
from safetensors.torch import save_file
from vqkd_samples import released_layout

from peco_ds.config import TokenizerVitSettings
from peco_ds.errors import UserError
from peco_ds.models.dalle_tokenizer import read_dvae
from peco_ds.models.published_tokenizers import read_published, releases
from peco_ds.models.taming_layout import read_gumbel, read_vqgan
from peco_ds.models.vqkd_tokenizer import read_vqkd
from peco_ds.registry import TOKENIZERS


def equal(found, expected) -> bool:
    settings, state = expected
    return (
        found.settings == settings
        and found.state_dict.keys() == state.keys()
        and all(torch.equal(found.state_dict[name], state[name]) for name in state)
    )


def with_sides(*sides: str) -> dict[str, torch.Tensor]:
    return {f"{side}.{name}": tensor for side in sides for name, tensor in dalle_tensors(side).items()}


def refused(paths, kind: str = "auto") -> str:
    with pytest.raises(UserError) as caught:
        read_published(paths if isinstance(paths, list) else [paths], kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def dalle(tmp_path):
    """Folder with the encoder.pkl and the decoder.pkl of one tokenizer."""
    for side in ("encoder", "decoder"):
        save_dalle(tmp_path / f"{side}.pkl", side, dalle_tensors(side))
    return tmp_path


def test_every_kind_of_tokenizer_that_others_released_has_a_layout():
    assert releases().keys() == {name for name, kind in TOKENIZERS.items() if kind.release is not None}


@pytest.mark.parametrize("order", [["encoder.pkl", "decoder.pkl"], ["decoder.pkl", "encoder.pkl"]])
def test_pickled_modules_of_dalle_are_read_in_any_order_without_their_package(dalle, order):
    assert "dall_e" not in sys.modules
    found = read_published([dalle / name for name in order])
    assert equal(found, read_dvae(with_sides("encoder", "decoder"))) and found.settings.decoder
    assert "dall_e" not in sys.modules
    assert [name for name, _ in found.facts["files"]] == ["decoder.pkl", "encoder.pkl"]


def test_the_encoder_alone_is_a_tokenizer_without_decoder(dalle):
    found = read_published([dalle / "encoder.pkl"])
    assert equal(found, read_dvae(with_sides("encoder"))) and not found.settings.decoder


@pytest.mark.parametrize(
    "save", [torch.save, save_file, lambda tensors, path: torch.save({"state_dict": tensors}, path)]
)
def test_plain_state_dicts_with_dalles_names_are_read_too(tmp_path, save):
    paths = [tmp_path / f"{side}.{'safetensors' if save is save_file else 'pth'}" for side in ("encoder", "decoder")]
    for path, side in zip(paths, ("encoder", "decoder")):
        save(dalle_tensors(side), path)
    assert equal(read_published(paths), read_dvae(with_sides("encoder", "decoder")))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("kind", "reader"), [("vqgan", read_vqgan), ("gumbel", read_gumbel)])
def test_lightning_checkpoints_of_taming_are_read_without_lightning_and_their_loss_is_counted_and_left_out(
    tmp_path, kind, reader, zipped
):
    save_lightning(tmp_path / "last.ckpt", taming_tensors(kind), _use_new_zipfile_serialization=zipped)
    found = read_published([tmp_path / "last.ckpt"])
    assert equal(found, reader(taming_tensors(kind))) and found.settings.kind == kind
    assert found.left_out == 2 and found.facts["licence"] == "MIT"
    assert "LPIPS" in found.facts["judge"] and found.facts["judge_licence"].startswith("BSD-2-Clause")
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


def vqkd_tensors(target_width: int = 8) -> dict[str, torch.Tensor]:
    vit = TokenizerVitSettings(
        image_px=16,
        patch_px=8,
        width=64,
        depth=1,
        heads=1,
        decoder_width=64,
        decoder_depth=1,
        decoder_heads=1,
        target_width=target_width,
    )
    return released_layout(vit, 16, 4)


@pytest.mark.parametrize(
    ("width", "name", "licence"),
    [
        (512, "most likely CLIP", "MIT"),
        (768, "most likely DINO", "Apache-2.0"),
        (8, "the file does not name", "unknown"),
    ],
)
def test_a_vqkd_file_is_said_to_have_had_a_teacher_which_its_width_tells_as_far_as_it_can(
    tmp_path, width, name, licence
):
    torch.save({"model": vqkd_tensors(width)}, tmp_path / "vqkd.pth")
    facts = read_published([tmp_path / "vqkd.pth"]).facts
    assert (
        name in facts["judge"]
        and str(width) in facts["judge"]
        and facts["judge_licence"].startswith(licence)
        and facts["licence"] == "MIT"
    )


def test_a_vqkd_file_is_not_taken_for_a_vqgans(tmp_path):
    tensors = vqkd_tensors()
    torch.save({"model": tensors}, tmp_path / "vqkd.pth")
    found = read_published([tmp_path / "vqkd.pth"])
    assert equal(found, read_vqkd(tensors)) and found.settings.kind == "vqkd" and found.left_out == 0
    assert read_published([tmp_path / "vqkd.pth"], "vqkd").settings == found.settings


# ------------------------------------------------------------------------------------- what is refused


class Payload:
    """Opens a file where it is unpickled."""

    def __init__(self, marker) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["beside the modules", "in a list", "alone"])
def test_a_pickle_that_would_run_something_is_refused_by_name_and_nothing_runs(tmp_path, place, zipped):
    path, marker = tmp_path / "encoder.pkl", tmp_path / "ran"
    held = {
        "beside the modules": dalle_tensors("encoder") | {"blocks.surprise": Payload(marker)},
        "in a list": {"state_dict": [Payload(marker)]},
        "alone": Payload(marker),
    }
    torch.save(held[place], path, _use_new_zipfile_serialization=zipped)
    assert "io.open" in refused(path)
    assert not marker.exists()


def test_a_payload_inside_a_pickled_module_does_not_run_either(tmp_path, monkeypatch):
    path, marker = tmp_path / "encoder.pkl", tmp_path / "ran"
    monkeypatch.setattr(torch.nn.ReLU, "__reduce__", lambda self: (open, (str(marker), "w")), raising=False)
    save_dalle(path, "encoder", dalle_tensors("encoder"))
    monkeypatch.undo()
    assert "io.open" in refused(path)
    assert not marker.exists()


def test_a_module_of_a_package_that_is_not_known_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "net.pkl")
    assert "torch.nn.modules.linear.Linear" in refused(tmp_path / "net.pkl")


class Encoder:
    """A package's class of a known name, which opens a file where it is made or filled."""

    __module__ = "dall_e.encoder"

    def __init__(self, marker: str) -> None:
        self.marker = marker
        open(marker, "w").close()

    def __getstate__(self) -> str:
        return self.marker

    __setstate__ = __init__


class Called:
    def __init__(self, *how) -> None:
        self.how = how

    def __reduce__(self):
        return self.how


def test_a_known_class_is_not_the_packages_own_even_where_that_is_installed(tmp_path, monkeypatch):
    package, path, marker = types.ModuleType("dall_e.encoder"), tmp_path / "encoder.pkl", tmp_path / "ran"
    package.Encoder = Encoder
    monkeypatch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
    monkeypatch.setitem(sys.modules, "dall_e.encoder", package)
    for stored in [Called(Encoder, (str(marker),)), Encoder(str(marker))]:
        torch.save({"state_dict": {}, "callbacks": stored}, path)
        marker.unlink(missing_ok=True)
        torch.load(path, weights_only=False)  # else nothing below means anything
        assert marker.exists()
        marker.unlink()
        assert "no tokenizer's tensors among its 0 entries" in refused(path)
        assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_module_that_was_saved_whole_in_the_old_format_is_called_that(tmp_path):
    save_dalle(tmp_path / "encoder.pkl", "encoder", dalle_tensors("encoder"), _use_new_zipfile_serialization=False)
    assert "state_dict()" in refused(tmp_path / "encoder.pkl")


def test_a_module_that_holds_itself_ends_in_one_line(tmp_path):
    net = torch.nn.Sequential(torch.nn.ReLU())
    net._modules["0"] = net
    torch.save(net, tmp_path / "loop.pkl")
    assert "stands in it twice" in refused(tmp_path / "loop.pkl")


def test_files_that_do_not_belong_together_are_named(dalle):
    ckpt = dalle / "last.ckpt"
    save_lightning(ckpt, taming_tensors("gumbel"))
    encoder, decoder = dalle / "encoder.pkl", dalle / "decoder.pkl"
    assert f"{encoder}: DALL-E's encoder, as {encoder} is" in refused([encoder, encoder])
    assert "decoder alone" in refused(decoder)
    assert f"{ckpt}: tensors of a gumbel tokenizer, {encoder} of a dvae" in refused([encoder, ckpt])
    assert "give one file" in refused([ckpt, ckpt])
    assert "tensors of a gumbel tokenizer, --kind vqgan asks for another" in refused(ckpt, "vqgan")
    save_dalle(dalle / "other.pkl", "decoder", dalle_tensors("decoder", codes=40))
    assert "decoder.blocks.input.w has shape" in refused([encoder, dalle / "other.pkl"])


@pytest.mark.parametrize("kind", ["dvae", "vqgan", "gumbel", "vqkd"])
def test_a_tensor_by_which_a_file_is_known_is_named_where_it_is_a_number_or_empty(tmp_path, kind):
    tensors = {"dvae": lambda: dalle_tensors("encoder"), "vqkd": vqkd_tensors}.get(kind, lambda: taming_tensors(kind))()
    for sign in releases()[kind].signs:
        for broken in (torch.tensor(1.0), torch.empty(0, 0, 0, 0)):
            torch.save({"state_dict": tensors | {sign: broken}}, tmp_path / "last.ckpt")
            assert (
                f"{tmp_path / 'last.ckpt'}: tensor " in (said := refused(tmp_path / "last.ckpt"))
                and sign in said
                and "shape" in said
            )


def test_what_is_no_tokenizer_is_said(tmp_path):
    torch.save({"state_dict": {"blocks.0.attn.qkv.weight": torch.ones(3, 1)}}, tmp_path / "vit.pth")
    assert "no tokenizer's tensors among its 1 entries" in refused(tmp_path / "vit.pth")
    (tmp_path / "page.pkl").write_text("<!DOCTYPE html><title>404</title>")
    assert "a web page" in refused(tmp_path / "page.pkl")
    assert "no such file" in refused(tmp_path / "none.pkl")
    damaged = taming_tensors("vqgan")
    del damaged["decoder.conv_out.bias"]
    save_lightning(tmp_path / "last.ckpt", damaged)
    assert f"{tmp_path / 'last.ckpt'}: tensor decoder.conv_out.bias is missing" in refused(tmp_path / "last.ckpt")
