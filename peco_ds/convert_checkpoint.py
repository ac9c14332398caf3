"""Convert a run's checkpoint into a release that the target library loads with its own loader.

    python -m peco_ds.convert_checkpoint RUN_DIR --to timm --out RELEASE_DIR

Any ZeRO stage, any number of ranks. RUN_DIR is a run folder (its newest whole checkpoint is taken) or one of its checkpoints/step_N folders.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # started by path: the package's parent, not its inside

from peco_ds.command_line import Parser, run
from peco_ds.errors import EXIT_DONE, UserError


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0], epilog="exit codes: 0 done, 2 bad input (one line says what)")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="run folder of pretrain.py, or one checkpoint of it")
    parser.add_argument("--to", choices=["timm"], required=True, help="layout of the release")
    parser.add_argument("--out", type=Path, required=True, metavar="RELEASE_DIR", help="folder to write")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="load the release in a fresh process and compare features (default: on)")
    args = parser.parse_args(argv)
    run_folder, checkpoint = find_checkpoint(args.run)
    return convert(run_folder, checkpoint, args.out, args.verify)


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint folder) of what the user named.

    Raises: UserError if there is no whole checkpoint of a pre-training run.
    """
    from peco_ds.runtime.checkpoint import FOLDER, list_checkpoints, newest_whole, verify
    from peco_ds.runtime.run_folder import read_settings

    run_folder = path.parent.parent if path.parent.name == FOLDER else path
    stage = read_settings(run_folder)["stage"]
    if stage != "pretrain":
        raise UserError(f"{run_folder}: a run of {stage}; this converts runs of pretrain.py (a tokenizer's release lies in its run folder already)")
    if path != run_folder:
        fault = verify(path)
        if fault:
            raise UserError(f"{path}: damaged ({fault}); give an older checkpoint of the run")
        return run_folder, path
    checkpoint = newest_whole(run_folder)
    if checkpoint is None:
        raise UserError(f"{run_folder}: {len(list_checkpoints(run_folder))} checkpoints, none of them whole; let the run reach a checkpoint first")
    return run_folder, checkpoint


def convert(run_folder: Path, checkpoint: Path, out: Path, verify: bool) -> int:
    import torch
    from pydantic import TypeAdapter

    from peco_ds.config import PretrainRecipe
    from peco_ds.convert.release import write_release
    from peco_ds.convert.to_timm import split_weights, timm_config
    from peco_ds.convert.verify import compare_with_timm
    from peco_ds.models.mim import MaskedImageModel
    from peco_ds.runtime.checkpoint import fp32_weights, read_progress
    from peco_ds.runtime.metrics import read_metrics
    from peco_ds.runtime.run_folder import read_provenance, read_settings

    recipe = TypeAdapter(PretrainRecipe).validate_python(read_settings(run_folder)["recipe"])
    weights = fp32_weights(checkpoint)
    backbone, head = split_weights(weights, recipe.model.depth)
    progress = read_progress(checkpoint)
    rows = [row for row in read_metrics(run_folder) if row["step"] <= progress.step]
    write_release(out, backbone, head, timm_config(recipe.model, recipe.name), recipe=recipe, progress=progress, provenance=read_provenance(run_folder), metrics=rows[-1] if rows else {})
    compared = "not verified"
    if verify:
        model = MaskedImageModel(recipe.model, recipe.objective.num_codes)
        model.load_state_dict(weights)
        images = torch.randn(2, 3, recipe.model.image_px, recipe.model.image_px, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            features = model.eval().features(images)
        compared = f"features in timm equal the trained model's to {compare_with_timm(out, images, features):.1e}"
    parameters = sum(tensor.numel() for tensor in backbone.values())
    sys.stdout.write(f"{out}: {checkpoint.name} of {recipe.name}, {parameters / 1e6:.1f} M parameters; {compared}\n")
    return EXIT_DONE


if __name__ == "__main__":
    run(main)
