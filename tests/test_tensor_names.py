"""Names of tensors without torch: every format that is met, and nothing of what is no weights file."""

from __future__ import annotations

import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from peco_ds.tensor_names import tensor_names

STATE = {"layer1.0.conv1.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}


def write_safetensors(path):
    save_file(STATE, path, metadata={"format": "pt"})


WRITTEN = {
    "x.safetensors": write_safetensors,
    "x.pth": lambda path: torch.save({"state_dict": STATE, "epoch": 3}, path),
    "x.pth.tar": lambda path: torch.save({"model": STATE}, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_names_of_a_file_of_every_format_are_found(tmp_path, name):
    WRITTEN[name](tmp_path / name)
    assert STATE.keys() <= tensor_names(tmp_path / name)
    assert "__metadata__" not in tensor_names(tmp_path / name)


def test_a_file_that_was_written_anew_is_read_anew(tmp_path):
    for name in ("a", "bb"):
        torch.save({name: torch.zeros(1)}, tmp_path / "x.pth")
        os.utime(tmp_path / "x.pth", ns=(0, len(name)))
        assert name in tensor_names(tmp_path / "x.pth")


class Payload:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(1), "surprise": Payload()}, "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps({"weight": Payload()}))
    for name in ("x.pth", "y.pth"):
        tensor_names(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def zipped(path, compression):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"weight": 1}, protocol=2))


def test_what_is_no_weights_file_has_no_names(tmp_path):
    zipped(tmp_path / "plain.pth", zipfile.ZIP_STORED)
    zipped(tmp_path / "packed.pth", zipfile.ZIP_DEFLATED)
    (tmp_path / "short.safetensors").write_bytes((10**9).to_bytes(8, "little") + b"{")
    for number, content in enumerate((b"", b"no weights", b"PK\x03\x04 half", b"\x80\x02X")):
        (tmp_path / f"{number}.pth").write_bytes(content)
    assert tensor_names(tmp_path / "plain.pth") == {"weight"}
    for path in {*tmp_path.iterdir(), tmp_path, tmp_path / "nowhere.pth"} - {tmp_path / "plain.pth"}:
        assert tensor_names(path) == frozenset(), path
