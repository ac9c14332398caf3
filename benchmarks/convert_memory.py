"""How much memory does converting a full-size ViT-H/14 take? A ZeRO-3 checkpoint of four ranks, made without training,
to timm, Hugging Face and unilm.

    python -m benchmarks.convert_memory [--folder SCRATCH] [--limit_gib 16]

The checkpoint has the files and the sizes of a real one (fp32 weights and both Adam moments, 7.6 GB), with drawn
values. Each conversion runs as a user starts it, with verification in a process of its own. Reported is the largest sum
over all its processes at any time: of resident memory, where pages of mapped files count although the system can drop
them, and of anonymous memory alone. Needs Linux, 12 GB of disk, and the memory it measures.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.record import benchmark_parser, markdown_table, parse, publish
from benchmarks.stages import STAGES, call, ended
from peco_ds.command_line import run
from peco_ds.config import PretrainRecipe
from peco_ds.models.mim import MaskedImageModel
from peco_ds.recipe_files import load_recipe
from peco_ds.runtime.checkpoint.files import MANIFEST, PROGRESS, rank_name, tag_of
from peco_ds.runtime.run_folder import PROVENANCE, SETTINGS
from peco_ds.schema import sha256_of_file, write_json

RANKS, STEP = 4, 1000
GIB = 2**30
FIELDS = ("VmRSS", "RssAnon")  # of /proc/PID/status


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser("convert_memory", __doc__)
    folder = "where checkpoint and releases lie while it runs (default: the system's temporary folder)"
    parser.add_argument("--folder", type=Path, help=folder)
    parser.add_argument("--recipe", default="peco_vith14", help="of the model (default: %(default)s)")
    limit = "exit 1 if a conversion takes more (default: %(default)s)"
    parser.add_argument("--limit_gib", type=float, default=16.0, help=limit)
    # in a process of its own, so that its memory is given back
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parse(parser, argv)
    if args.make:
        make_run(args.make, args.recipe)
        return 0
    rows, largest = [], 0.0
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        out, release = Path(name) / "run", Path(name) / "release"
        call([sys.executable, "-m", "benchmarks.convert_memory", "--recipe", args.recipe, "--make", out])
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        for to in ("timm", "hf", "unilm"):
            command = [sys.executable, STAGES / "convert_checkpoint.py", out, "--to", to, "--out", release]
            resident, anonymous, seconds, said = watch([str(word) for word in command])
            shutil.rmtree(release)
            rows.append((to, f"{resident:.2f}", f"{anonymous:.2f}", f"{seconds:.0f}", said))
            sys.stderr.write(f"{to}: {resident:.2f} GiB\n")
            largest = max(largest, resident)
    about = (
        f"A checkpoint of `{args.recipe}` as {RANKS} ZeRO-3 ranks leave it ({size / 1e9:.2f} GB; values drawn, nothing "
        "trained). Peaks are sums over all processes alive at one time, the verifying one included."
    )
    heads = ("`--to`", "resident, GiB", "of which not file pages, GiB", "wall s", "verified")
    text = f"{about}\n\n{markdown_table(heads, rows)}"
    sys.stdout.write(publish(args, f"Memory of converting {args.recipe}", text, "deepspeed", "timm", "transformers"))
    return 0 if largest <= args.limit_gib else 1


def make_run(folder: Path, recipe_name: str) -> None:
    """A run folder whose only checkpoint is ZeRO-3's, in DeepSpeed's file layout."""
    recipe = load_recipe(PretrainRecipe, recipe_name, []).recipe
    checkpoint = folder / "checkpoints" / tag_of(STEP)
    checkpoint.mkdir(parents=True)
    with torch.device("meta"):
        model = MaskedImageModel(recipe.model, recipe.objective.num_codes)
    parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
    # As optim.decay_groups: ZeRO-3 keeps a flat partition for each group.
    groups = [{name: shape for name, shape in parameters.items() if (len(shape) > 1) == many} for many in (True, False)]
    for rank in range(RANKS):
        save_rank(checkpoint, rank, groups)
    cursor = {"fingerprint": "0" * 64, "seed": 0, "samples": STEP * recipe.run.global_batch}
    write_json(checkpoint / PROGRESS, {"step": STEP, "cursor": cursor, "world_size": RANKS, "zero_stage": 3})
    for place in (folder, checkpoint):
        # JSON is YAML
        write_json(place / SETTINGS, {"stage": "pretrain", "recipe": asdict(recipe), "sources": {}})
        write_json(place / PROVENANCE, {"commit": "none", "num_samples": 0})
    files = {path.name: [path.stat().st_size, sha256_of_file(path)] for path in checkpoint.iterdir()}
    write_json(checkpoint / MANIFEST, {"files": files})


def save_rank(checkpoint: Path, rank: int, groups: list[dict[str, torch.Size]]) -> None:
    """The three files of a rank."""
    name = f"zero_pp_rank_{rank}_mp_rank_00"
    states = {
        "module": {},
        "buffer_names": [],
        "param_shapes": groups,
        "shared_params": {},
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "ds_version": "0.19.8",
    }
    torch.save(states, checkpoint / f"{name}_model_states.pt")
    flat = [torch.cat([_part(name, shape, rank) for name, shape in group.items()]) for group in groups]
    step = torch.tensor(float(STEP))
    moments = {
        number: {"step": step, "exp_avg": torch.randn_like(part), "exp_avg_sq": torch.rand_like(part)}
        for number, part in enumerate(flat)
    }
    state = {
        "zero_stage": 3,
        "partition_count": RANKS,
        "fp32_flat_groups": flat,
        "optimizer_state_dict": {"state": moments, "param_groups": []},
    }
    torch.save({"optimizer_state_dict": state}, checkpoint / f"{name}_optim_states.pt")
    torch.save({}, checkpoint / rank_name(rank))


def _part(name: str, shape: torch.Size, rank: int) -> torch.Tensor:
    """This rank's part of a parameter, padded so that all parts are equally long."""
    start = 1.0 if "norm" in name and name.endswith("weight") else 0.1 if "gamma" in name else 0.0
    generator = torch.Generator().manual_seed(hash((len(name), shape.numel(), rank)) % 2**31)
    return start + 0.02 * torch.randn(-(-shape.numel() // RANKS), generator=generator)


def watch(command: list[str]) -> tuple[float, float, float, str]:
    """Run it to its end: the largest resident and anonymous memory of its process tree, GiB; seconds; what it said of
    the verification.
    """
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    resident = anonymous = 0
    while process.poll() is None:
        sums = [sum(values) for values in zip(*map(memory_of, tree(process.pid)))] or [0, 0]
        resident, anonymous = max(resident, sums[0]), max(anonymous, sums[1])
        time.sleep(0.05)
    out, err = process.communicate()
    if process.returncode:
        raise ended(command, process.returncode, out + err)
    return resident / GIB, anonymous / GIB, time.perf_counter() - begun, out.strip().split("; ")[-1]


def tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:  # it ended meanwhile
                continue
    return found


def memory_of(pid: int) -> tuple[int, int]:
    """(resident, anonymous) bytes of a process; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    values = {name: int(kb.split()[0]) * 1024 for name, kb in (line.split(":", 1) for line in lines) if name in FIELDS}
    return values.get("VmRSS", 0), values.get("RssAnon", 0)


if __name__ == "__main__":
    run(main)
