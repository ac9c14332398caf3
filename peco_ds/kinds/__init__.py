"""Descriptors of the package's own kinds that need more than a line of `peco_ds.registry`: plain Python."""
