"""benchmarks.run_gpu on a CPU: that nothing measured is lost, whatever fails or hangs, and that every part runs.

Never how fast anything is.
"""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass

import pytest
import torch
from conftest import REPOSITORY, run_stage

from benchmarks import run_gpu
from benchmarks.gpu import kernels, wheels
from benchmarks.gpu.limits import CutOff, Processes
from benchmarks.gpu.parts import PartPlan
from benchmarks.gpu.resume import counts_of
from benchmarks.gpu.verdicts import verdicts
from peco_ds.errors import UserError

FILES = ["logs.tar.gz", "results.json", "results.md", "summary.txt"]


@dataclass(frozen=True)
class StandIn(PartPlan):
    """A part whose function is given."""

    stand_in: object = None

    def load(self):
        return self.stand_in


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run parts, by name the function: exit code, what was said, results.json."""
    for name in (*run_gpu.OFFLINE, "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        # put back afterwards
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def run(functions, *arguments, budget_s=600.0):
        plans = [StandIn(name, f"Part {name}", 600, "", {}, budget_s, function) for name, function in functions.items()]
        words = ["--small", "--seconds", "600", "--out", str(tmp_path / "out"), *map(str, arguments)]
        code = run_gpu.main(words, plans)
        return code, capfd.readouterr().out, json.loads((tmp_path / "out" / "results.json").read_text())

    run.out = tmp_path / "out"
    return run


def fine(part):
    part.keep("", "a table", value=1)


def raising(error):
    def part(part):
        part.keep("", "found before it failed", value=2)
        # as libraries in C write
        os.write(2, b"the last words\n")
        raise error

    return part


def test_a_part_that_fails_in_any_way_is_one_line_and_the_next_one_follows(run):
    errors = {
        "memory": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        "library": ModuleNotFoundError("No module named 'deepspeed'"),
        "exit": SystemExit(3),
        "fault": ValueError("two\nlines"),
    }
    code, said, found = run({**{name: raising(error) for name, error in errors.items()}, "last": fine})
    assert code == 1 and sorted(os.listdir(run.out)) == FILES
    assert {name: part["state"] for name, part in found["parts"].items()} == dict.fromkeys(errors, "failed") | {
        "last": "done"
    }
    reasons = {name: found["parts"][name]["reason"] for name in errors}
    assert reasons["memory"] == "out of memory" and "'deepspeed'" in reasons["library"]
    assert reasons["fault"] == "ValueError: two"
    assert all(found["parts"][name]["value"] == 2 for name in errors), "what was found before stands"
    summary = (run.out / "summary.txt").read_text()
    assert all(f"{name}: failed" in summary and f"{name}: failed" in said for name in errors)
    with tarfile.open(run.out / "logs.tar.gz") as logs:
        words = logs.extractfile("fault.log").read().decode()
    assert "the last words" in words and "Traceback" in words and "the last words" not in said


def test_a_part_beyond_its_budget_is_cut_off_though_it_swallows_errors_and_keeps_what_it_found(run):
    def endless(part):
        part.keep("", "the first row", rows=[1])
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue

    code, said, found = run({"endless": endless, "last": fine}, budget_s=0.5)
    assert code == 0 and "endless: cut off after" in said and "what it had measured is kept" in said
    assert found["parts"]["endless"]["rows"] == [1] and found["parts"]["last"]["state"] == "done"
    assert "the first row" in (run.out / "results.md").read_text()


HANGS = """
import argparse, signal, subprocess, sys, threading, time
from pathlib import Path
from benchmarks import run_gpu
from benchmarks.gpu.parts import PartPlan
from benchmarks.gpu.report import PartFound

out, work = Path(sys.argv[1]), Path(sys.argv[2])

def hangs(part):
    part.keep("", "the first row", rows=[1])
    child = part.processes.start([sys.executable, "-c", "import time; time.sleep(600)"], part.log)
    (out / ".." / "child").write_text(str(child.pid))
    # not even a signal reaches it
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGTERM])
    threading.Event().wait()

class Hanging(PartPlan):
    def load(self):
        return hangs

run_gpu.RESERVE_S, run_gpu.LEAST_S = 1.0, 0.0
args = argparse.Namespace(small=True, seconds=4.0, out=out, parts=None, wheels=None)
run = run_gpu.GpuRun(args, work, "the command", time.monotonic())
found = run.report.parts["hangs"] = PartFound("hangs", "A part that hangs")
run.measure_part(Hanging("hangs", "", 600, ""), found)
raise AssertionError("it went on")
"""


def test_a_part_that_hangs_is_left_at_the_deadline_with_its_figures_written_and_its_processes_ended(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", HANGS, out, work], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "the time is up" in done.stdout, done.stderr
    found = json.loads((out / "results.json").read_text())
    assert found["parts"]["hangs"]["state"] == "cut off" and found["parts"]["hangs"]["rows"] == [1]
    assert "hangs: cut off" in (out / "summary.txt").read_text() and sorted(os.listdir(out)) == FILES
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)


def test_a_process_that_takes_too_long_is_ended_with_its_children(tmp_path):
    processes, log = Processes(), tmp_path / "log"
    command = ["bash", "-c", "sleep 600 & echo $!; wait"]
    with pytest.raises(CutOff):
        processes.run(command, log, timeout_s=1.0)
    child = int(log.read_text())
    assert state_of(child) in ("gone", "Z")


def state_of(process: int) -> str:
    """Of a process, one letter."""
    try:
        return (REPOSITORY / f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "gone"


def test_nothing_is_begun_when_the_time_is_up(run, monkeypatch):
    monkeypatch.setattr(run_gpu, "LEAST_S", 1e9)
    code, said, found = run({"first": fine, "second": fine})
    assert code == 0 and said.count("not begun: the time is up") == 2
    assert {part["state"] for part in found["parts"].values()} == {"not begun"}


def test_chosen_parts_run_alone_and_an_unknown_one_is_named(run, capfd):
    _, _, found = run({"first": fine, "second": fine}, "--parts", "second")
    assert list(found["parts"]) == ["second"]
    for words, reason in (
        (["--parts", "third"], "--parts third: not one of first"),
        (["--seconds", "nan"], "more than"),
    ):
        with pytest.raises(SystemExit) as ended:
            run({"first": fine}, *words)
        assert ended.value.code == 2 and reason in capfd.readouterr().err


def test_without_a_gpu_full_sizes_are_refused_in_one_line(tmp_path, capfd):
    assert run_gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "--small" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------- wheels


def wheel(folder, name, version, tag="py3", text="value = 1\n"):
    path = folder / f"{name}-{version}-{tag}-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}/__init__.py", text)
        file.writestr(
            f"{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    return path


@pytest.fixture
def path_restored(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))


def test_wheels_fill_what_is_missing_or_too_old_and_nothing_else(tmp_path, path_restored):
    wheel(tmp_path, "peco_toy_absent", "1.0")
    wheel(tmp_path, "peco_toy_other", "1.0", tag="cp27")
    # older than the one that is installed
    wheel(tmp_path, "timm", "0.9.1")
    lines = wheels.add_wheels(tmp_path, tmp_path / "packages")
    assert lines[0] == "from wheels: peco_toy_absent 1.0" and "peco_toy_other" in lines[1] and len(lines) == 2
    command = "import peco_toy_absent, timm; print(peco_toy_absent.value, timm.__version__)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    value, version = done.stdout.split()
    assert value == "1" and version != "0.9.1", "processes that are started find them too"


def test_the_pinned_version_is_taken_from_wheels_whatever_is_installed(monkeypatch):
    monkeypatch.setattr(wheels, "version_of", {"deepspeed": "0.20.0", "pydantic": "2.9.1", "timm": "1.0.5"}.get)
    pinned = wheels.pinned_packages()
    assert wheels.needed("deepspeed", pinned["deepspeed"], pinned) and not wheels.needed("pydantic", "2.9", pinned)
    assert wheels.needed("timm", "1.0.26", pinned) and wheels.needed("hjson", "3.1.0", pinned)
    said = wheels.missing_packages()
    assert any("timm 1.0.5 is installed" in line for line in said) and "webdataset is not installed" in said


def test_a_folder_without_wheels_and_a_file_that_is_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="no wheel in it"):
        wheels.add_wheels(tmp_path, tmp_path / "packages")
    wheel(tmp_path, "peco_toy_absent", "1.0").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match="not a wheel"):
        wheels.add_wheels(tmp_path, tmp_path / "packages")


BARE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "deepspeed", "timm", "webdataset", "yaml", "psutil"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
from benchmarks.run_gpu import main
sys.exit(main(["--small", "--out", sys.argv[1], "--parts", "products,copies,step_l"]))
"""


def test_what_needs_torch_alone_is_measured_though_packages_are_missing(tmp_path):
    done = subprocess.run([sys.executable, "-c", BARE, tmp_path], cwd=REPOSITORY, capture_output=True, text=True)
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert done.returncode == 1 and parts["products"]["rows"] and parts["copies"]["bytes_s"]
    assert parts["step_l"]["state"] == "failed" and "No module named" in parts["step_l"]["reason"]


# -------------------------------------------------------------------------------------------- verdicts


def attention_row(form, error, both_ms):
    return {"shape": "H/14 at 224", "form": form, "dtype": "bf16", "worst_error": error, "tolerance": 0.02} | {
        "both_ms": both_ms
    }


def peer(library, precision, ratio, zero=""):
    return {"library": library, "precision": precision, "compiled": True, "zero": zero, "ratios": [ratio]}


FIGURES = {
    "attention": {"rows": [attention_row("triton", 0.5, 0.2), attention_row("unfused", 0.01, 0.44)]},
    "step_h_zero1": {"rows": [{"images_s": 452.0, "mfu_of_data_sheet": 0.457}]},
    "step_l": {"rows": [{"failure": "out of memory"}]},
    "step_b": {"rows": [{"images_s": 3200.0}]},
    "peers": {
        "rows": [
            *(peer("ours", "bf16", 1.0), peer("ours", "master", 0.9, zero="1")),
            *(peer("timm", "bf16", 0.5), peer("timm", "autocast", 0.5), peer("Hugging Face", "bf16", 0.7)),
        ]
    },
    "resume": {"same_bits": False, "first_step_apart": 7, "largest_difference": 1e-6},
    "tests": {"passed": 3, "failed": 0, "error": 0, "skipped": 1},
}


def test_verdicts_hold_each_figure_against_its_bar_and_name_what_was_not_measured():
    found = {verdict.what: verdict for verdict in verdicts(FIGURES, small=False)}
    met = {what: verdict.met for what, verdict in found.items()}
    assert met == {
        "attention and its gradients against float64": False,
        # the fastest form is wrong
        "attention forward and backward, H/14 at 224": True,
        "ViT-H/14 at 224, ZeRO-1": True,
        "ViT-H/14 at 224, ZeRO-3": None,
        "ViT-L/16 at 224": None,
        "ViT-B/16 at 224": False,
        "ViT-H/14 at 448": None,
        "our compiled step over Hugging Face's": False,
        "our compiled step over timm's": True,
        "stop and resume of peco_vittiny16": False,
        "tests that need a GPU": True,
    }
    lines = {what: verdict.line() for what, verdict in found.items()}
    assert "0.44 ms (unfused)" in lines["attention forward and backward, H/14 at 224"]
    assert lines["ViT-L/16 at 224"] == "not measured: ViT-L/16 at 224: bar 1100 images/s"
    assert "1.80 times (autocast)" in lines["our compiled step over timm's"], "the least of the precisions"
    assert lines["ViT-H/14 at 224, ZeRO-1"].endswith(
        "452 images/s (45.7% of the data sheet), bar 440 images/s, aim 490"
    )


def test_small_sizes_are_held_against_no_bar_of_speed():
    small = {verdict.what: verdict.met for verdict in verdicts(FIGURES, small=True)}
    assert small["ViT-B/16 at 224"] is None and small["our compiled step over timm's"] is None
    assert small["stop and resume of peco_vittiny16"] is False


def test_the_outcome_of_tests_is_read_from_pytests_last_line():
    lines = ["...s", "SKIPPED [1] tests/test_x.py:3: 2 failed before", "3 passed, 1 skipped, 2 errors in 1.20s", ""]
    assert counts_of(lines) == {"passed": 3, "failed": 0, "skipped": 1, "error": 2}
    assert counts_of([]) == {"passed": 0, "failed": 0, "skipped": 0, "error": 0}


# --------------------------------------------------------------------------------------- the real parts


def test_an_attention_that_is_wrong_is_called_wrong(monkeypatch):
    shape = kernels.AttentionShape("tiny", 2, 5, 2, 8, 1)
    device = torch.device("cpu")
    right = kernels.attention_row(shape, "efficient", "fp32", device, 1e-4)
    assert right["worst_error"] < 1e-5 and right["same_twice"] and set(right["errors"]) > {"output", "bias's gradient"}

    def without_bias(qkv, bias):
        return kernels.pytorchs_attention(qkv, bias * 0)

    monkeypatch.setattr(kernels, "attention_of", lambda form: without_bias)
    wrong = kernels.attention_row(shape, "efficient", "fp32", device, 1e-4)
    assert wrong["worst_error"] > 0.1 and "WRONG" in kernels.attention_table([wrong])
    monkeypatch.setattr(kernels, "attention_of", lambda form: 1 / 0)
    failed = kernels.attention_row(shape, "efficient", "fp32", device, 1e-4)
    assert "ZeroDivisionError" in failed["failure"] and "ZeroDivisionError" in kernels.attention_table([failed])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Every part at small size: results.json, results.md."""
    out = tmp_path_factory.mktemp("small")
    words = ["--small", "--seconds", 1500, "--out", out]
    done = run_stage("benchmarks.run_gpu", *words, check=False, timeout_s=1600)
    return done, json.loads((out / "results.json").read_text()), (out / "results.md").read_text()


@pytest.mark.slow
def test_every_part_runs_at_small_size(small):
    done, found, text = small
    assert {name: part["reason"] or part["state"] for name, part in found["parts"].items()} == dict.fromkeys(
        (plan.name for plan in run_gpu.PARTS), "done"
    )
    assert done.returncode == 0 and "torch 2" in found["versions"]
    for words in ("## Verdicts", "matrix products", "times the fastest of the 2 measured peers", "search alone"):
        assert words in text


@pytest.mark.slow
def test_the_small_run_that_was_stopped_ends_in_the_bits_of_the_one_that_was_not(small):
    found = small[1]["parts"]["resume"]
    assert found["same_bits"] and 3 <= found["stopped_at"] < found["steps"] and found["tensors"] > 20
    assert "met: stop and resume of peco_vittiny16" in small[2]
