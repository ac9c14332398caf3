"""peco_ds: masked image modelling with perceptual codebooks (PeCo and its family) under DeepSpeed."""

__version__ = "0.2.0"
