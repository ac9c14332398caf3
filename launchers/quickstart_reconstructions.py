"""The first picture of quickstart.sh: whole photographs through the codes.

python launchers/quickstart_reconstructions.py OUT

The tokenizer looks at small squares. Here each photograph is cut into such squares without overlap, and what comes back
is put together again. Shown are the photographs that it has not trained on.
"""

import sys
from pathlib import Path

import torch
from pydantic import TypeAdapter

from peco_ds.config import TokenizerRecipe
from peco_ds.data.image_set import ImageSet
from peco_ds.data.loaders import held_out_images
from peco_ds.data_paths import data_path
from peco_ds.evaluation.reconstruction import comparison_grid, round_trip_of, save_png, to_u8
from peco_ds.models.tokenizers import load_tokenizer
from peco_ds.runtime.run_folder import read_settings

SQUARES = 4

out = Path(sys.argv[1])
recipe = TypeAdapter(TokenizerRecipe).validate_python(read_settings(out / "tokenizer_run")["recipe"])
tokenizer, _ = load_tokenizer(out / "tokenizer_run" / "tokenizer")
side = recipe.views.tokenizer_px
images = ImageSet(data_path(recipe.data, recipe.data.images))
photographs = held_out_images(images, recipe.data, recipe.evaluation.grid_images, SQUARES * side).images_u8

# [n, 3, rows, side, columns, side] -> one square a row of the batch, and back.
squares = photographs.unflatten(2, (SQUARES, side)).unflatten(4, (SQUARES, side)).permute(0, 2, 4, 1, 3, 5)
with torch.no_grad():
    restored = round_trip_of(tokenizer)(squares.reshape(-1, 3, side, side).float() / 127.5 - 1).reconstruction
whole = restored.view(squares.shape).permute(0, 3, 1, 4, 2, 5).reshape(photographs.shape)
grid = comparison_grid([photographs, to_u8(whole)], names=["photograph, held out", "round trip through its codes"])
save_png(out / "reconstructions.png", grid)
