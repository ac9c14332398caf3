"""Initialise a codebook by k-means on the encoder outputs of the run's first images, the same on every rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from peco_ds.config import TokenizerSettings
from peco_ds.errors import UserError
from peco_ds.models.weight_files import is_finite
from peco_ds.runtime.distributed import World

logger = logging.getLogger("peco_ds")


@torch.no_grad()
def init_codebook(
    tokenizer, batches: Iterator[torch.Tensor], settings: TokenizerSettings, seed: int, world: World
) -> None:
    """Gather encoder outputs of all ranks, run k-means on rank 0, broadcast.

    Collective; before the engine partitions anything.

    Args:
        tokenizer: on the device, whole; has `.encode(images_11) -> [B, C, h, w]` and `.codebook`.
        batches: images_11 [B, 3, T, T], equally long on every rank.
    Raises: UserError if an encoder output is not finite.
    Source: BEiT v2's `norm_ema_quantizer.py`, which runs k-means on each rank's own first batch and never compares the
        results; here there is one result.
    """
    logger.info(
        "gathering %d encoder outputs for the k-means start of the codebook (tokenizer.kmeans_vectors)",
        settings.kmeans_vectors,
    )
    tokenizer.eval()
    vectors: list[torch.Tensor] = []
    while sum(map(len, vectors)) < settings.kmeans_vectors:
        features = tokenizer.encode(next(batches))
        # Gathered pass by pass, so that the vectors are in the order of the samples and the start is the same for any
        # number of ranks.
        vectors.append(world.gather(features.float().flatten(2).transpose(1, 2).reshape(-1, features.shape[1])))
    everywhere = torch.cat(vectors)[: settings.kmeans_vectors]
    if not is_finite(everywhere):
        raise UserError(
            "the tokenizer's encoder gives values that are not finite on the first images, so k-means cannot start the "
            "codebook; look at the settings of the network, or set tokenizer.kmeans_iters=0"
        )
    if world.is_main:
        tokenizer.codebook.init_kmeans(
            everywhere, settings.kmeans_iters, torch.Generator(everywhere.device).manual_seed(seed)
        )
        logger.info("codebook started by k-means on %d encoder outputs", len(everywhere))
    for buffer in tokenizer.codebook.buffers():
        world.broadcast(buffer)
    tokenizer.train()
