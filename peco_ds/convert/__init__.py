"""Weights of a run in the layouts of other libraries: one key map a file."""
