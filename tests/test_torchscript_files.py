import pickle
import zipfile

import pytest
import torch

from peco_ds.errors import UserError
from peco_ds.models.torchscript_files import is_torchscript, read_torchscript
from peco_ds.models.weight_files import read_tensor_file

pytestmark = [  # torch.jit is deprecated; archives made with it stay what they are
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
        self.turned = torch.nn.Parameter(torch.randn(4, 6).T[1:5, :3])  # neither contiguous nor from the storage's start
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
    assert all(found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected)


def test_an_archive_is_told_from_other_files(archive, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "plain.pt")
    (tmp_path / "text.pt").write_bytes(b"PK\x03\x04 half a zip")
    assert [is_torchscript(path) for path in (archive, tmp_path / "plain.pt", tmp_path / "text.pt", tmp_path / "none.pt")] == [True, False, False, False]
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


def test_a_module_that_holds_itself_is_read_to_its_end(archive):
    itself = b"\x80\x02c__torch__\nM\n)\x81q\x00}(X\x04\x00\x00\x00selfh\x00ub."
    assert read_torchscript(rewritten(archive, {"/data.pkl": itself})) == {}


def test_a_shape_larger_than_its_bytes_and_a_compressed_member_take_no_memory(archive):
    with zipfile.ZipFile(archive) as old:
        table = next(name for name in old.namelist() if name.endswith("/data.pkl"))
        data = old.read(table)
    stretched = data.replace(b"K\x18K\x08t(K\x08K\x01t", b"M\xff\xffM\xff\xfft(K\x00K\x00t", 1)  # 24 x 8 with strides 8, 1 -> 65535 x 65535 with 0, 0
    assert stretched != data
    with pytest.raises(UserError, match="needs more"):
        read_torchscript(rewritten(archive, {"/data.pkl": stretched}))
    with pytest.raises(UserError, match="compressed"):
        read_torchscript(rewritten(archive, {}, zipfile.ZIP_DEFLATED))
