"""The closing table of quickstart.sh, and its second picture.   python launchers/quickstart_table.py OUT"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter

from peco_ds.config import PretrainRecipe
from peco_ds.data.image_set import ImageSet
from peco_ds.data.loaders import masked_batches
from peco_ds.data.order import SampleOrder, view_at
from peco_ds.data.token_shards import TokenSet
from peco_ds.data_paths import data_path
from peco_ds.evaluation.masked_prediction import masked_prediction_columns
from peco_ds.evaluation.reconstruction import SHOWN_PX, comparison_grid, save_png
from peco_ds.models.mim import MaskedImageModel
from peco_ds.models.tokenizers import load_tokenizer
from peco_ds.runtime.checkpoint.consolidate import fp32_weights
from peco_ds.runtime.checkpoint.files import newest_whole
from peco_ds.runtime.metrics import read_metrics
from peco_ds.runtime.run_folder import read_settings

COLUMNS = ("image", "masked", "prediction", "true tokens")
out = Path(sys.argv[1])
recipe = TypeAdapter(PretrainRecipe).validate_python(read_settings(out / "pretrain")["recipe"])
tokenizer, card = load_tokenizer(data_path(recipe.data, recipe.data.tokenizer))
model = MaskedImageModel(recipe.model, recipe.objective.num_codes)
model.load_state_dict(fp32_weights(newest_whole(out / "pretrain")))
images = ImageSet(data_path(recipe.data, recipe.data.images))
tokens = TokenSet(
    data_path(recipe.data, recipe.data.tokens),
    images.manifest,
    num_codes=card.num_codes,
    grid=recipe.model.grid,
    views=recipe.views,
)

# One batch of the order's first epoch, every image once, and the true codes of all its patches.
shown = np.arange(min(8, images.num_samples))
batch = next(masked_batches(images, tokens, [shown], recipe, torch.device("cpu")))
order = SampleOrder(images.shards.shard_sizes, recipe.run.seed, recipe.data.shuffle_window_shards)
samples = [order.sample_at(int(position)) for position in shown]
codes = torch.tensor(
    np.stack([tokens.read(s).codes[view_at(recipe.run.seed, 0, s, recipe.views.count)] for s in samples]).astype(
        np.int64
    )
)
columns = masked_prediction_columns(model.eval(), tokenizer, batch, codes)
save_png(out / "masked_prediction.png", comparison_grid(columns, names=COLUMNS, at_least_px=SHOWN_PX))

counts = np.zeros(card.num_codes)
for sample in range(tokens.num_samples):
    counts += np.bincount(tokens.read(sample).codes.ravel(), minlength=card.num_codes)
evaluations = [json.loads(line) for line in (out / "tokenizer_run" / "evaluation.jsonl").read_text().splitlines()]
first, last = evaluations[0], evaluations[-1]
# none where every step since the last row was skipped
rows = [row for row in read_metrics(out / "pretrain") if row["loss"] is not None]
accuracy = np.mean([row["accuracy"] for row in rows[-3:]])
table = [
    ("images", f"{images.num_samples}, {recipe.views.count} views each"),
    ("judge of the tokenizer", card.extra["judge"]),
    ("tokens used", f"{int((counts > 0).sum())} of {card.num_codes}"),
    ("PSNR, held-out images", f"{first['psnr']:.2f} -> {last['psnr']:.2f} dB"),
    ("SSIM, held-out images", f"{first['ssim']:.3f} -> {last['ssim']:.3f}"),
    ("pre-training loss", f"{rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f}"),
    (
        "masked-token accuracy",
        f"{accuracy:.1%}; always the commonest code: {counts.max() / counts.sum():.1%}; blind guess: "
        f"{1 / card.num_codes:.1%}",
    ),
    ("photographs | round trip", out / "reconstructions.png"),
    (" | ".join(COLUMNS), out / "masked_prediction.png"),
    ("release for timm", out / "release"),
    ("curves", f"tensorboard --logdir {out}"),
    ("runs", f"{out / 'tokenizer_run'}, {out / 'pretrain'}"),
]
width = max(len(name) for name, _ in table)
sys.stdout.write("\n".join(f"{name:<{width}}  {value}" for name, value in table) + "\n")
