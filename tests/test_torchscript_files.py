import pickle
import zipfile

import pytest
import torch

from peco_ds.errors import UserError
from peco_ds.models.torchscript_files import is_torchscript, read_torchscript
from peco_ds.models.weight_files import read_tensor_file

# torch.jit is deprecated; archives made with it stay what they are
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean"),
]


class Inner(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(8, 2)
        self.stages = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.GELU(), torch.nn.Linear(4, 8))

    def forward(self, x):
        return self.stages(self.attn(x, x, x, need_weights=False)[0])


class Outer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Inner()
        # neither contiguous nor from the storage's start
        self.turned = torch.nn.Parameter(torch.randn(4, 6).T[1:5, :3])
        self.register_buffer("input_resolution", torch.tensor(224))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("of_half", torch.randn(5).half())
        self.register_buffer("of_bfloat16", torch.randn(5).bfloat16())

    def forward(self, x):
        return self.visual(x) + self.turned.sum()


@pytest.fixture
def archive(tmp_path):
    torch.manual_seed(0)
    with torch.no_grad():
        torch.jit.trace(Outer().eval(), torch.zeros(3, 1, 8)).save(str(tmp_path / "net.pt"))
    return tmp_path / "net.pt"


def test_the_tensors_of_an_archive_are_those_that_torch_itself_reads(archive):
    found, expected = read_torchscript(archive), torch.jit.load(str(archive)).state_dict()
    assert found.keys() == expected.keys()
    assert all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected
    )


def test_an_archive_is_told_from_other_files(archive, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "plain.pt")
    (tmp_path / "text.pt").write_bytes(b"PK\x03\x04 half a zip")
    assert [
        is_torchscript(path) for path in (archive, tmp_path / "plain.pt", tmp_path / "text.pt", tmp_path / "none.pt")
    ] == [True, False, False, False]
    with pytest.raises(UserError):  # why a reader of its own is needed
        read_tensor_file(archive)


def rewritten(archive, changes: dict[str, bytes], compression: int = zipfile.ZIP_STORED):
    """The archive with some members' bytes exchanged."""
    out = archive.with_name("changed.pt")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, next((data for end, data in changes.items() if name.endswith(end)), old.read(name)))
    return out


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


def test_a_pickle_that_would_run_code_is_refused_by_name_and_does_not_run(archive, tmp_path):
    changed = rewritten(archive, {"/data.pkl": pickle.dumps({"x": Payload(str(tmp_path / "ran"))}, protocol=2)})
    with pytest.raises(UserError, match=r"names \w*io\.open, which was not run"):
        read_torchscript(changed)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"/data.pkl": b""}, "not a readable"),
        ({"/data.pkl": b"\x80\x02}."}, "not a readable"),
        ({"/data.pkl": b"\x80\x02c__torch__\nM\n)\x81}(X\x01\x00\x00\x00ah\x00ub."}, "not a readable"),
        ({"/data/1": b"\0" * 7}, "needs more"),
    ],
    ids=["empty", "no module", "memo that is not there", "too few bytes"],
)
def test_a_damaged_archive_is_refused_in_one_line(archive, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        read_torchscript(rewritten(archive, changes))
    assert "\n" not in str(caught.value)


def jit_pickle(storages: dict[str, int], tensors: list[tuple]) -> bytes:
    """A data.pkl that names tensors of float32: (name, storage, offset, size, stride)."""
    stream = b"\x80\x02c__torch__\nM\n)\x81}("

    def text(value: str) -> bytes:
        return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()

    def numbers(values) -> bytes:
        return (
            b"("
            + b"".join(
                number if isinstance(number, bytes) else b"J" + number.to_bytes(4, "little", signed=True)
                for number in values
            )
            + b"t"
        )

    for name, storage, offset, size, stride in tensors:
        where = (
            b"("
            + text("storage")
            + b"ctorch\nFloatStorage\n"
            + text(storage)
            + text("cpu")
            + b"J"
            + storages[storage].to_bytes(4, "little")
            + b"tQ"
        )
        stream += (
            text(name)
            + b"ctorch._utils\n_rebuild_tensor_v2\n("
            + where
            + b"J"
            + offset.to_bytes(4, "little")
            + numbers(size)
            + numbers(stride)
            + b"\x89)tR"
        )
    return stream + b"ub."


def shared_archive(folder, numel: int, tensors: list[tuple]):
    """An archive of one storage "0" that holds 0, 1, 2 ..."""
    path = folder / "shared.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", jit_pickle({"0": numel}, tensors))
        archive.writestr("net/constants.pkl", b"")
        archive.writestr("net/data/0", torch.arange(numel, dtype=torch.float32).numpy().tobytes())
    return path


def test_a_storage_with_a_thousand_names_is_read_once_and_its_tensors_made_once(tmp_path, monkeypatch):
    whole, part = ("0", 0, (40, 50), (50, 1)), ("0", 1000, (20,), (2,))
    path = shared_archive(tmp_path, 2000, [(f"weight{number}", *whole) for number in range(1000)] + [("part", *part)])
    reads, read = [], zipfile.ZipFile.read
    monkeypatch.setattr(
        zipfile.ZipFile, "read", lambda archive, name, *rest: reads.append(name) or read(archive, name, *rest)
    )
    found = read_torchscript(path)
    assert reads.count("net/data/0") == 1 and len(found) == 1001
    assert torch.equal(found["weight999"], torch.arange(2000.0).view(40, 50)) and torch.equal(
        found["part"], 1000 + 2 * torch.arange(20.0)
    )
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 2


def test_tensors_of_one_storage_that_together_need_more_than_the_file_has_are_refused(tmp_path):
    overlapping = [(f"weight{number}", "0", number, (90_000,), (1,)) for number in range(100)]
    path = shared_archive(tmp_path, 100_000, overlapping)
    with pytest.raises(UserError, match="needs more than the file has, 36000000 bytes of"):
        read_torchscript(path)
    assert len(read_torchscript(shared_archive(tmp_path, 100_000, overlapping[:1]))) == 1


@pytest.mark.parametrize("size", [(-1,), (b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",)], ids=["negative", "no number"])
def test_a_size_that_is_none_does_not_lower_the_sum(tmp_path, size):
    with pytest.raises(UserError, match="a tensor without storage, size or place"):
        read_torchscript(shared_archive(tmp_path, 10, [("a", "0", 0, size, (1,)), ("b", "0", 0, (10,), (1,))]))


def test_a_module_that_holds_itself_is_read_to_its_end(archive):
    itself = b"\x80\x02c__torch__\nM\n)\x81q\x00}(X\x04\x00\x00\x00selfh\x00ub."
    assert read_torchscript(rewritten(archive, {"/data.pkl": itself})) == {}


def test_a_shape_larger_than_its_bytes_and_a_compressed_member_take_no_memory(archive):
    with zipfile.ZipFile(archive) as old:
        table = next(name for name in old.namelist() if name.endswith("/data.pkl"))
        data = old.read(table)
    # 24 x 8 with strides 8, 1 -> 65535 x 65535 with 0, 0
    stretched = data.replace(b"K\x18K\x08t(K\x08K\x01t", b"M\xff\xffM\xff\xfft(K\x00K\x00t", 1)
    assert stretched != data
    with pytest.raises(UserError, match="needs more"):
        read_torchscript(rewritten(archive, {"/data.pkl": stretched}))
    with pytest.raises(UserError, match="compressed"):
        read_torchscript(rewritten(archive, {}, zipfile.ZIP_DEFLATED))
