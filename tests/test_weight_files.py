import argparse

import pytest
import torch
from safetensors.torch import save_file

from peco_ds.errors import UserError
from peco_ds.models.weight_files import check_finite, read_tensor_file, weights_fingerprint


def refused(path, content: bytes | None = None) -> str:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_tensor_file(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.pth.tar", "w.safetensors"])
def test_tensors_come_back_whatever_the_ending(tmp_path, name):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    save_file(tensors, tmp_path / name) if name.endswith("safetensors") else torch.save(tensors, tmp_path / name)
    found = read_tensor_file(tmp_path / name)
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_the_old_format_and_a_stored_command_line_are_read(tmp_path):
    torch.save(
        {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=1.0)},
        tmp_path / "old.pth",
        _use_new_zipfile_serialization=False,
    )
    assert torch.equal(read_tensor_file(tmp_path / "old.pth")["model"]["a"], torch.ones(2))


def test_changing_a_mapped_tensor_does_not_change_the_file(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pth")
    read_tensor_file(tmp_path / "w.pth")["a"].zero_()
    assert torch.equal(read_tensor_file(tmp_path / "w.pth")["a"], torch.ones(2))


def test_what_is_no_weights_file_is_called_what_it_is(tmp_path):
    assert "no such file" in refused(tmp_path / "none.pth")
    assert "a folder" in refused(tmp_path)
    assert "it is empty" in refused(tmp_path / "empty.safetensors", b"")
    assert "web page" in refused(tmp_path / "page.pth", b"\n<!DOCTYPE html><html><title>Sign in</title></html>")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 368000000\n"
    assert "git lfs pull" in refused(tmp_path / "pointer.safetensors", pointer)
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    assert "holds a list" in refused(tmp_path / "list.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_file_cut_short_is_refused_and_its_size_said(tmp_path, name, kept):
    path = tmp_path / name
    tensors = {"a": torch.randn(100, 100)}
    save_file(tensors, path) if name.endswith("safetensors") else torch.save(tensors, path)
    whole = path.read_bytes()
    assert f"cut short at {int(kept * len(whole))} bytes" in refused(path, whole[: int(kept * len(whole))])


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path, zipped):
    torch.save(
        {"a": torch.ones(2), "surprise": Payload(str(tmp_path / "ran"))},
        tmp_path / "w.pth",
        _use_new_zipfile_serialization=zipped,
    )
    message = refused(tmp_path / "w.pth")
    assert "io.open" in message and "was not run" in message
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_a_blocked_module_is_refused_by_name(tmp_path):
    assert "os.system" in refused(tmp_path / "w.pth", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")


def test_a_fingerprint_follows_settings_names_types_shapes_and_bytes_and_stays_what_it_was():
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
    found = weights_fingerprint({"width": 3, "kind": "x"}, tensors)
    assert found == "07b25fb6cb9c0950fa4b3f2b02c2342edae93523e2d5649d378eca81e4b0ae13"
    assert found == weights_fingerprint({"kind": "x", "width": 3}, dict(reversed(tensors.items())))
    others = (
        ({"width": 4, "kind": "x"}, tensors),
        ({"width": 3, "kind": "x"}, tensors | {"b": tensors["b"].reshape(3, 2)}),
        ({"width": 3, "kind": "x"}, tensors | {"a": tensors["a"].float()}),
        ({"width": 3, "kind": "x"}, {"b": tensors["b"], "c": tensors["a"]}),
    )
    assert found not in {weights_fingerprint(*other) for other in others}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_in_any_precision(dtype, value):
    tensor = torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype)
    check_finite({"whole": tensor, "none": None, "numbers": torch.arange(3), "empty": torch.empty(0)}, "w.pth")
    tensor[3, 2] = value
    with pytest.raises(UserError, match=r"^w.pth: tensor b holds values that are not finite; fetch"):
        check_finite({"a": torch.ones(2), "b": tensor.t()}, "w.pth")


def test_a_torchscript_archive_is_called_by_its_name(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "net.pt"))
    message = refused(tmp_path / "net.pt")
    assert "TorchScript" in message and "state_dict" in message and "damaged" not in message
