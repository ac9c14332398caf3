"""Checkpoints: saved and restored, whole or absent, on any number of ranks."""
