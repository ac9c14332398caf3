"""Codebook: nearest code, moving average over ranks and micro-batches, usage.

The codebook learns by counting, not by gradient: its vectors are buffers that follow the encoder's outputs by moving
averages of k-means statistics. The statistics are sums, so the same global batch gives the same codebook whatever the
number of ranks and micro-batches it is cut into, up to the order of float additions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from peco_ds.config import TokenizerSettings
from peco_ds.schema import NO_CODE

# Elements of one [rows, V] block of similarities: 2 ** 25 float32 are 128 MiB, however many patches a batch has.
BLOCK_ELEMENTS = 2**25


@contextmanager
def no_tf32() -> Iterator[None]:
    """Inside, a GPU computes float32 products and convolutions in float32.

    TF32, cuDNN's default, keeps 10 bits of each number: too few to choose among V codes.
    """
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, was in zip(switches, before):
            switch.allow_tf32 = was


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside, nothing is computed with fewer bits than it has: neither autocast nor TF32."""
    with torch.autocast(device.type, enabled=False), no_tf32():
        yield


class Quantized(NamedTuple):
    codes: torch.Tensor  # int64 [B, N], row-major
    # [B, C, H, W] in the input's dtype; its gradient passes straight through to the features.
    quantized: torch.Tensor
    # float32 [B, C, H, W], the vectors of the chosen codes, without gradient.
    nearest: torch.Tensor
    # float32 [], mean squared distance of the features to their codes, with gradient to the features.
    commitment: torch.Tensor


class Codebook(nn.Module):
    """V vectors of C numbers and the moving averages they are computed from.

    Args:
        num_codes: V.  code_dim: C.
        l2_normalized: features and codes live on the unit sphere, nearest means largest cosine.
        decay: of the moving averages, in [0, 1).  count_eps: Laplace smoothing of the counts.
        average: what the moving average of a code is taken over. "sums": the sums of its features, divided by the
            average of their counts, so that every feature weighs alike, and a code without hits loses its past.
            "directions", for unit codes: the unit mean of its features, so that every step with a hit weighs alike,
            and a code without hits keeps its past; a rare code follows the encoder more slowly.
        revive_below: a code whose averaged count (vectors a step) falls below this restarts at an encoder output; 0:
            never.
        seed: of the choice of those outputs.
    Source: VQ-VAE (arXiv 1711.00937), appendix A.1, for the moving average of sums; BEiT v2 (arXiv 2208.06366) for the
        unit sphere, and its released `norm_ema_quantizer.py` for the average of directions; Jukebox (arXiv 2005.00341)
        for restarts.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        l2_normalized: bool = False,
        decay: float = 0.99,
        count_eps: float = 1e-5,
        average: Literal["sums", "directions"] = "sums",
        revive_below: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        assert average == "sums" or l2_normalized, "only unit codes have directions to average"
        self.num_codes, self.code_dim, self.l2_normalized = num_codes, code_dim, l2_normalized
        self.decay, self.count_eps, self.average, self.revive_below = decay, count_eps, average, revive_below
        if l2_normalized:
            codes = F.normalize(torch.randn(num_codes, code_dim), dim=-1)
        else:
            codes = torch.empty(num_codes, code_dim).uniform_(-1 / num_codes, 1 / num_codes)
        self.register_buffer("codes", codes)
        self.register_buffer("ema_count", torch.ones(num_codes))
        self.register_buffer("ema_sum", codes.clone())
        # Tensors, not bool and int: every backend can broadcast them, and only a caller that needs one reads it back.
        self.register_buffer("initialized", torch.zeros(()))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        # The number of vectors that all ranks counted in the last step.
        self.register_buffer("step_rows", torch.tensor(float(num_codes)))
        # Sums of this step, with the count in the last column, so that one collective carries both. With revival a
        # second table of V rows holds candidates for restarts.
        tables = 2 if revive_below > 0 else 1
        self.register_buffer("pending", torch.zeros(tables * num_codes, code_dim + 1), persistent=False)
        salt = torch.randint(-(2**62), 2**62, (code_dim,), generator=torch.Generator().manual_seed(seed))
        self.register_buffer("hash_salt", salt * 2 + 1, persistent=False)

    @classmethod
    def from_settings(cls, settings: TokenizerSettings, *, seed: int = 0) -> Codebook:
        return cls(
            settings.num_codes,
            settings.code_dim,
            l2_normalized=settings.l2_normalized,
            decay=settings.decay,
            count_eps=settings.count_eps,
            average=settings.average,
            revive_below=settings.revive_below,
            seed=seed,
        )

    def _apply(self, fn, recurse: bool = True):
        """Follow a change of device, refuse a change of dtype.

        An engine casts the whole module to 16 bits. In bfloat16 a moving average stands still: its step of 1 % is near
        the rounding error, and counts above 256 can no longer be told apart.
        """
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.to(fn(buffer.new_empty(0)).device)
        return self

    # ------------------------------------------------------------------------------------------ choosing codes

    def forward(self, features: torch.Tensor) -> Quantized:
        """Nearest code of every position; in training mode also adds to the pending statistics of this step.

        It must run once a micro-batch: a forward repeated by activation checkpointing would count twice.

        Args:
            features: [B, C, H, W], any float dtype; compared in float32.
        """
        assert self.codes.dtype == torch.float32, (
            "the codebook must stay float32; build it outside a context that casts tensors"
        )
        batch, dim, height, width = features.shape
        assert dim == self.code_dim, f"features have {dim} channels, the codebook {self.code_dim}"
        with full_float32(features.device):
            rows = self._rows(features)
            codes = self._nearest(rows.detach())
            if self.training:
                self._accumulate(rows.detach(), codes)
            chosen = self.codes[codes]
            commitment = F.mse_loss(rows, chosen)
            # The bracket is exactly zero, so that the value is the code bit for bit; `rows + (chosen - rows).detach()`
            # is not.
            through = chosen + (rows - rows.detach())
        through, chosen = (vectors.view(batch, height, width, dim).permute(0, 3, 1, 2) for vectors in (through, chosen))
        return Quantized(codes.view(batch, height * width), through.to(features.dtype), chosen, commitment)

    @torch.no_grad()
    def nearest(self, features: torch.Tensor) -> torch.Tensor:
        """Nearest code of every position, as `forward` finds it, and nothing else: features [B, C, H, W], any float
        dtype -> int64 [B, N]; NO_CODE where they are not finite.
        """
        with full_float32(features.device):
            rows = self._rows(features)
            return _only_of_finite(self._nearest(rows), rows).view(len(features), -1)

    @torch.no_grad()
    def topk(
        self, features: torch.Tensor, k: int, *, temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Soft codes: the k likeliest of softmax(-squared distance / temperature), or of softmax(cosine / temperature).

        The codebook is searched once.

        Args:
            features: [B, C, H, W].  temperature: > 0.
        Returns: int64 [B, N], the nearest codes, those of `nearest`; int64 [B, N, k], the likeliest first; and their
            probabilities float32 [B, N, k] of the softmax over all V codes, so a row sums to less than 1; what is
            missing is the mass of the codes left out.
        """
        assert 1 <= k <= self.num_codes and temperature > 0
        batch = len(features)
        with full_float32(features.device):
            nearest, codes, probs = [], [], []
            for block in self._rows(features).split(self._block_rows()):
                similarity = self._similarity(block)
                nearest.append(_only_of_finite(similarity.argmax(dim=-1), block))
                # Of -|x - c|^2 = 2 (x c - |c|^2 / 2) - |x|^2 the last term is the same for all codes and leaves the
                # softmax.
                logits = (similarity if self.l2_normalized else 2 * similarity) / temperature
                values, indices = logits.topk(k, dim=-1)
                codes.append(indices)
                probs.append((values - logits.logsumexp(dim=-1, keepdim=True)).exp())
        return (
            torch.cat(nearest).view(batch, -1),
            torch.cat(codes).view(batch, -1, k),
            torch.cat(probs).view(batch, -1, k),
        )

    def lookup(self, codes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Codes int64 [B, N] of a (height, width) grid -> their vectors, float32 [B, C, height, width]."""
        height, width = grid
        assert codes.shape[1] == height * width, f"{codes.shape[1]} codes do not fill a grid of {height} x {width}"
        return self.codes[codes].transpose(1, 2).unflatten(2, (height, width))

    def _rows(self, features: torch.Tensor) -> torch.Tensor:
        rows = features.float().permute(0, 2, 3, 1).reshape(-1, self.code_dim)
        if not self.l2_normalized:
            return rows
        # Where the norm leaves float32, the quotient would be zero, which is as near to every code.
        is_lost = torch.linalg.vector_norm(rows.detach(), dim=-1, keepdim=True).isinf()
        return F.normalize(rows, dim=-1).masked_fill(is_lost, math.nan)

    def _block_rows(self) -> int:
        return max(1, BLOCK_ELEMENTS // self.num_codes)

    def _similarity(self, rows: torch.Tensor) -> torch.Tensor:
        """[S, V]; the largest is the nearest.

        Squared distance in expanded form, without the term that all codes share.
        """
        if self.l2_normalized:
            return rows @ self.codes.T
        return torch.addmm(self.codes.square().sum(dim=-1), rows, self.codes.T, beta=-0.5)

    def _nearest(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._similarity(block).argmax(dim=-1) for block in rows.split(self._block_rows())])

    # ------------------------------------------------------------------------------------------ moving averages

    def _sum_by(self, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[V, C + 1]: sum of the rows of each index and their count; rows of index -1 are left out.

        A product with one-hot rows: `index_add_` adds in the order in which threads arrive on a GPU, and a resumed run
        would no longer equal one that never stopped.
        """
        total = rows.new_zeros(self.num_codes, self.code_dim + 1)
        numbers = torch.arange(self.num_codes, device=rows.device)
        for block, picked in zip(rows.split(self._block_rows()), index.split(self._block_rows())):
            one_hot = (numbers.unsqueeze(1) == picked).to(rows.dtype)
            total[:, :-1] += one_hot @ block
            total[:, -1] += one_hot.sum(dim=1)
        return total

    def _accumulate(self, rows: torch.Tensor, codes: torch.Tensor) -> None:
        self.pending[: self.num_codes] += self._sum_by(codes, rows)
        if self.revive_below > 0:
            self.pending[self.num_codes :] += self._sum_by(self._candidate_slots(rows), rows)

    def _candidate_slots(self, rows: torch.Tensor) -> torch.Tensor:
        """int64 [S]: a pseudo-random slot in [0, V) for a share of the rows, -1 for the others.

        Slot and share follow from (seed, step, the row's own bits), so whether a row is a candidate does not depend on
        its rank and micro-batch. The share keeps about V of the rows of a step, if it has as many as the last one:
        about a third of the slots then hold exactly one row, and only such a row can be recovered from a sum over
        ranks.
        """
        bits = rows.contiguous().view(torch.int32).to(torch.int64)
        # Integer sums wrap and do not depend on their order. The rounds after it are a multiply-xorshift mixer.
        mixed = (bits * self.hash_salt).sum(dim=1) + self.num_updates * 0x1E3779B97F4A7C15
        for shift, factor in ((32, 0x4F6CDD1D3CA5A2B5), (29, 0x2545F4914F6CDD1D)):
            mixed = (mixed ^ ((mixed >> shift) & (2 ** (64 - shift) - 1))) * factor
        slot = ((mixed >> 40) & (2**24 - 1)) % self.num_codes
        lottery = ((mixed >> 8) & (2**24 - 1)).to(torch.float32) / 2**24
        return torch.where(lottery * self.step_rows < self.num_codes, slot, -1)

    @torch.no_grad()
    def update(
        self, all_reduce: Callable[[torch.Tensor], object] = lambda tensor: None, *, applied: bool = True
    ) -> torch.Tensor:
        """End of an optimiser step: move the averages by what all ranks counted since the last call, recompute the
        codes.

        Args:
            all_reduce: sums a float32 tensor over the ranks, in place; nothing on one process.
            applied: False for a step that was skipped, whose features may not be finite: what was counted is forgotten.
        Returns: float32 [V], how often each code was chosen in this step by all ranks. Nothing is read back to the
            host.
        """
        if not applied:
            self.pending.zero_()
            return torch.zeros_like(self.ema_count)
        all_reduce(self.pending)
        statistics, candidates = self.pending[: self.num_codes], self.pending[self.num_codes :]
        counts = statistics[:, -1].clone()
        self.ema_count.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.ema_sum.mul_(self.decay).add_(statistics[:, :-1], alpha=1 - self.decay)
        if self.average == "directions":
            codes = self.decay * self.codes + (1 - self.decay) * F.normalize(statistics[:, :-1], dim=-1)
        else:
            total = self.ema_count.sum()
            smoothed = (self.ema_count + self.count_eps) / (total + self.num_codes * self.count_eps) * total
            codes = self.ema_sum / smoothed.unsqueeze(1)
        if self.l2_normalized:
            # A code that nothing chose keeps its direction. Computed from a sum that shrinks every step, it would be
            # lost in rounding.
            codes = torch.where(counts.unsqueeze(1) > 0, F.normalize(codes, dim=-1), self.codes)
        self.codes.copy_(codes)
        if self.revive_below > 0:
            self._revive(candidates)
        self.num_updates += 1
        self.step_rows.copy_(counts.sum())
        self.pending.zero_()
        return counts

    def _revive(self, candidates: torch.Tensor) -> None:
        """Put the i-th dead code on the i-th slot that holds exactly one encoder output.

        Without a slot it waits a step.
        """
        dead = self.ema_count < self.revive_below
        alone = candidates[:, -1] == 1
        slots = torch.argsort(alone.logical_not().to(torch.int8), stable=True)
        place = dead.cumsum(0) - 1
        revived = (dead & (place < alone.sum())).unsqueeze(1)
        vectors = candidates[slots[place.clamp(min=0)], :-1]
        # The weight of an average code: less, and a code not chosen at once would be dead again; more, and it could not
        # move.
        weight = (self.ema_count.sum() / self.num_codes).clamp(min=self.revive_below)
        self.codes.copy_(torch.where(revived, vectors, self.codes))
        self.ema_sum.copy_(torch.where(revived, vectors * weight, self.ema_sum))
        self.ema_count.copy_(torch.where(revived.squeeze(1), weight, self.ema_count))

    # ------------------------------------------------------------------------------------------ initialisation

    @torch.no_grad()
    def init_kmeans(self, vectors: torch.Tensor, iterations: int, generator: torch.Generator) -> None:
        """Lloyd's algorithm from randomly chosen vectors; the cosine variant with unit codes.

        An empty cluster restarts at a randomly chosen vector before the next iteration. The caller broadcasts the
        buffers.

        Args:
            vectors: [S, C] encoder outputs on the codebook's device; fewer than V are repeated with small noise.
            generator: the only source of randomness; a CPU one draws the same numbers on every machine.
        """
        rows = vectors.to(self.codes).reshape(-1, self.code_dim)
        assert len(rows) > 0 and torch.isfinite(rows).all(), "k-means needs finite vectors, at least one"
        if self.l2_normalized:
            rows = F.normalize(rows, dim=-1)
        self.codes.copy_(self._on_sphere(self._draw(rows, self.num_codes, generator)))
        for _ in range(iterations):
            clusters = self._sum_by(self._nearest(rows), rows)
            count = clusters[:, -1:]
            means = self._on_sphere(clusters[:, :-1] / count.clamp(min=1))
            fresh = self._on_sphere(self._draw(rows, self.num_codes, generator))
            self.codes.copy_(torch.where(count > 0, means, fresh))
        self.start_at(self.codes)

    @torch.no_grad()
    def start_at(self, codes: torch.Tensor) -> None:
        """Begin with these vectors [V, C], as if each had been chosen once a step."""
        self.codes.copy_(codes)
        self.ema_count.fill_(1.0)
        self.ema_sum.copy_(self.codes)
        self.initialized.fill_(1.0)
        self.pending.zero_()

    def _draw(self, rows: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
        """[number, C]: rows without repetition, then, where there are too few, copies moved by 1 % of the spread."""
        order = [
            torch.randperm(len(rows), generator=generator, device=generator.device)
            for _ in range(-(-number // len(rows)))
        ]
        drawn = rows[torch.cat(order)[:number].to(rows.device)]
        noise = torch.randn(number, self.code_dim, generator=generator, device=generator.device).to(rows)
        noise[: len(rows)] = 0
        spread = rows.std(dim=0, correction=0).mean().clamp(min=1e-6)
        return drawn + 0.01 * spread * noise

    def _on_sphere(self, codes: torch.Tensor) -> torch.Tensor:
        return F.normalize(codes, dim=-1) if self.l2_normalized else codes


def _only_of_finite(codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Codes [S] of rows [S, C]; NO_CODE for a row that is not finite."""
    return codes.masked_fill(rows.isfinite().all(dim=-1).logical_not(), NO_CODE)


def usage(counts: torch.Tensor) -> dict[str, float]:
    """How much of the codebook is in use.

    Args:
        counts: [V], how often each code was chosen.
    Returns: codes_used, the number of codes chosen at least once; perplexity, exp of the entropy of the code
        frequencies: V when all are equally frequent, 1 when one takes all. Read back to the host.
    """
    counts = counts.float()
    share = counts / counts.sum().clamp(min=1)
    return {"codes_used": int((counts > 0).sum()), "perplexity": float(torch.special.entr(share).sum().exp())}
