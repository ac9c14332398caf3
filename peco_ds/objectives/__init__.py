"""Objectives of masked pre-training, by the name a recipe gives them.

An objective is a function of tensors: `objective(outputs, targets) -> loss, stats`. Adding one is a file here and a line below.
"""

from peco_ds.objectives.hard_tokens import hard_tokens

OBJECTIVES = {"hard_tokens": hard_tokens}
