"""Skip optimiser steps that must not be taken: a loss or gradient that is not finite, a gradient spike.

All ranks agree before a weight moves, without a collective for it: a loss that is not finite makes its gradient NaN,
and every rank decides by the norm of the gradient, which is summed over all of them. DeepSpeed reads that norm back
every step anyway, so no rank waits for its device once more. DeepSpeed itself drops a step whose norm is not finite,
except in fp32 without ZeRO, but takes spikes. Both are refused here, at the one place that every ZeRO stage passes: the
step of the wrapped optimiser.
"""

from __future__ import annotations

import logging
import math
import statistics

import torch
from deepspeed.runtime.utils import clip_grad_norm_

from peco_ds.config import RunSettings
from peco_ds.errors import UserError
from peco_ds.runtime.distributed import World

logger = logging.getLogger("peco_ds")

# The number of last steps that the median and the count of skipped steps are taken over.
WINDOW = 128
# So many steps must be applied before a norm can count as a spike: the first norms of a run vary a lot.
LEAST = 32
# The most sample keys that a rank names.
NAMED = 4


class StepGuard:
    """Skips bad steps on all ranks, counts them, and ends the run when they are too many.

    A skipped step leaves weights, Adam's moments and the moving average unchanged; data and schedule go on. The search
    for a loss scale in fp16 also skips steps, which are not counted.

    Args:
        engine: DeepSpeed engine; its optimiser's step is wrapped, and under ZeRO-0 in fp32 also the clipping, which
            would otherwise forget the norm.
    """

    def __init__(self, engine, run: RunSettings, world: World) -> None:
        self._engine, self._run, self._world = engine, run, world
        # Norms of applied steps, the newest last.
        self._norms: list[float] = []
        # Numbers of skipped steps within the window.
        self._skipped: list[int] = []
        self.total_skipped = 0
        # Whether a step of the run moved the weights.
        self.any_applied = False
        self._passes: list[tuple[torch.Tensor, list[str]]] = []
        # Whether the current step is taken; None until the optimiser asks.
        self._norm: float | None = None
        self._wrap(engine)

    def _wrap(self, engine) -> None:
        inner = engine.basic_optimizer
        take_step = inner.step

        def guarded_step(*args, **options):
            if self._admits():
                return take_step(*args, **options)

        inner.step = guarded_step
        # ZeRO-0 in fp32: DeepSpeed wraps no optimiser of its own around ours, and nothing looks at the norm.
        self._plain = engine.optimizer is inner
        if self._plain:
            limit = engine.gradient_clipping() or math.inf

            def measured_clip():
                engine._global_grad_norm = clip_grad_norm_(
                    parameters=engine.module.parameters(), max_norm=limit, mpu=engine.mpu
                )

            engine.clip_fp32_gradients = measured_clip

    def _admits(self) -> bool:
        """Asked once a parameter group; the norm of the whole gradient is known by then."""
        if self._norm is None:
            if self._plain and not self._engine.gradient_clipping():
                # The limit is infinite, so this only measures the norm.
                self._engine.clip_fp32_gradients()
            norm = (self._engine if self._plain else self._engine.optimizer)._global_grad_norm
            # None: the DeepSpeed JSON switched the norm off.
            self._norm = float(norm) if norm is not None else 0.0
        return math.isfinite(self._norm) and not self._is_spike(self._norm)

    def _is_spike(self, norm: float) -> bool:
        return (
            self._run.spike_factor > 0
            and len(self._norms) >= LEAST
            and norm > self._run.spike_factor * statistics.median(self._norms)
        )

    def watch(self, loss: torch.Tensor, keys: list[str]) -> torch.Tensor:
        """The loss to call backward on: the same, bit for bit, or one whose gradient is NaN if the loss is not finite.

        Args:
            loss: scalar on the device.  keys: of the samples in it, named if the loss is bad.
        """
        self._passes.append((loss.detach(), keys))
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)

    def close_step(self, done: int) -> bool:
        """After the engine's step number `done` (from 1). Collective where the step was skipped.

        Returns: whether the weights moved, the same on every rank.
        Raises: UserError naming step, ranks and samples when more than run.max_skipped_steps of the last 128 were
            skipped.
        """
        passes, norm = self._passes, self._norm
        self._passes, self._norm = [], None
        by_deepspeed = not self._engine.was_step_applied()
        if by_deepspeed:
            self._gather_persistent()
        if not by_deepspeed and (norm is None or (math.isfinite(norm) and not self._is_spike(norm))):
            if norm is not None:
                self._norms = [*self._norms, norm][-WINDOW:]
            self.any_applied = True
            return True
        mine = [(float(loss), keys[:NAMED]) for loss, keys in passes if not math.isfinite(float(loss))]
        ranks = self._world.gather_objects(mine)
        if self._run.precision == "fp16" and by_deepspeed and not any(ranks):
            return False
        self.total_skipped += 1
        self._skipped = [step for step in self._skipped if step > done - WINDOW] + [done]
        reason = "; ".join(
            f"rank {rank}: loss {bad[0][0]}, samples {', '.join(key for _, keys in bad for key in keys)}"
            for rank, bad in enumerate(ranks)
            if bad
        )
        spike = False
        if not reason and norm is not None and math.isfinite(norm):
            spike = True
            reason = (
                f"gradient norm {norm:.4g}, {norm / statistics.median(self._norms):.0f} times the median of "
                f"the last {len(self._norms)}"
            )
        elif not reason:
            reason = "gradient not finite, losses finite"
        if len(self._skipped) > self._run.max_skipped_steps:
            remedy = (
                "raise run.spike_factor (0: take them)" if spike else "run.precision=fp32, or look at these samples"
            )
            raise UserError(
                f"step {done}: {reason}; {len(self._skipped)} of the last {min(done, WINDOW)} steps were "
                f"skipped, run.max_skipped_steps {self._run.max_skipped_steps}; "
                f"the last checkpoint is untouched: continue it with a lower optim.lr, or {remedy}"
            )
        if self._world.is_main:
            logger.warning("step %d is skipped on all ranks (%s)", done, reason)
        return False

    def _gather_persistent(self) -> None:
        """Gather ZeRO-3's small, persistent weights, which it partitions before a step and gathers after it.

        After a step that it drops it does not gather them. A resumed run would then fail at the next forward pass,
        whose fetches are not those it had recorded.
        """
        persistent = getattr(self._engine.optimizer, "persistent_parameters", None)
        if persistent:
            persistent[0].all_gather(persistent)

    def state(self) -> dict:
        """The same on every rank; kept in a checkpoint so that a continued run judges as one that never stopped."""
        return {
            "norms": self._norms,
            "skipped": self._skipped,
            "total_skipped": self.total_skipped,
            "any_applied": self.any_applied,
        }

    def load_state(self, states: list[dict]) -> None:
        if states:
            self._norms, self._skipped = list(states[0]["norms"]), list(states[0]["skipped"])
            self.total_skipped = states[0]["total_skipped"]
            # Older checkpoints do not tell.
            self.any_applied = states[0].get("any_applied", True)
