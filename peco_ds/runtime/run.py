"""What surrounds every training loop: ranks, run folder, log, watchdog, seeds; engine, restore, meter, saves, stop.

A run starts in two phases. `Run.start` joins the ranks and opens the run folder. `attach` wraps the stage's model in
the engine and takes up the newest checkpoint. In between the stage opens what needs the ranks and records where its
data come from. The loop stays in the stage's file:

    with Run.start(args, resolved, "pretrain", images) as run:
        run.record(token_provenance(cfg, found))
        tokens = open_tokens(found, cfg, images, run.world)
        run.seed_weights()
        run.attach(build_mim(...), training_flops=training_flops(cfg), leaf_modules=(TransformerBlock,))
        batches = masked_batches(images, tokens, run.positions(), cfg, run.world.device, run.bad_images)
        for step in run.steps():
            for batch in run.micro_batches(batches):
                outputs = run.engine(batch.images_norm, batch.masked)
                loss, stats = objective(outputs, batch.targets)
                run.backward(loss, stats, batch.keys)
            run.finish_step()
    return run.exit_code

The stop rule, the same for every stage: a run that is asked to stop finishes its step, the last one included, saves,
and leaves the loop; evaluation and release are left to the next start, which makes up for them. It exits with 75.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from peco_ds.command_line import ending
from peco_ds.config import TrainingRecipe
from peco_ds.data import order
from peco_ds.data.image_set import BadImages
from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
from peco_ds.durations import Durations, micro_steps, resolve_durations
from peco_ds.errors import EXIT_DONE, EXIT_REQUEUE, UserError
from peco_ds.planner import mfu
from peco_ds.recipe_checks import recipe_of_ranks
from peco_ds.recipe_files import Resolved
from peco_ds.runtime.attention_choice import settle_attention
from peco_ds.runtime.checkpoint.files import list_checkpoints
from peco_ds.runtime.checkpoint.save_restore import Saver, continues, restore
from peco_ds.runtime.distributed import World, seed_all, start_world
from peco_ds.runtime.ema import WeightEma
from peco_ds.runtime.engine import set_lr, start_engine
from peco_ds.runtime.fp8_choice import settle_fp8
from peco_ds.runtime.metrics import Meter
from peco_ds.runtime.optim import use_layer_norm
from peco_ds.runtime.rank_log import log_to, stacks_path
from peco_ds.runtime.run_folder import open_run_folder, read_provenance, record_provenance
from peco_ds.runtime.set_check import check_shared
from peco_ds.runtime.step_guard import StepGuard
from peco_ds.runtime.timeline import START_UP
from peco_ds.runtime.watchdog import LONG_S, Watchdog

logger = logging.getLogger("peco_ds")


class Run:
    """One training run of any stage, on this rank.

    Attributes after `start`: `cfg` (the recipe, with the micro-batch that these ranks take), `out`, `world`,
    `durations`, `bad_images`, and `resumes`: whether there are checkpoints that this start continues. After `attach`
    also `engine`, `ema` (None where none is kept), `meter`, `first_step`. In the loop `stopping`: whether the run was
    asked to stop.
    """

    def __init__(
        self,
        out: Path,
        cfg: TrainingRecipe,
        ds_config: dict,
        world: World,
        durations: Durations,
        *,
        source: str = "",
        fingerprint: str = "",
        num_samples: int = 1,
        resumes: bool = False,
    ) -> None:
        """What `start` has found out: use that.

        Args:
            ds_config: merged with the recipe, read from `source`.
            fingerprint, num_samples: of the images that an epoch reads.
        """
        self.out, self.world, self.durations, self.resumes = out, world, durations, resumes
        self.cfg = cfg
        self.bad_images = BadImages(self.cfg.data.max_bad_share)
        self.first_step, self.stopping = 0, False
        self._ds_config, self._source = ds_config, source
        self._fingerprint, self._num_samples = fingerprint, num_samples
        self._watchdog = Watchdog(self.cfg.run.hang_timeout_s, stacks_path(out, world.rank), rank=world.rank)
        self._meter_is_open = self._saver_is_open = False
        self._applied: bool | None = None

    # ------------------------------------------------------------------------------------------ first phase

    @classmethod
    def start(
        cls, args, resolved: Resolved[TrainingRecipe], stage: str, images, *measured_on, num_samples: int | None = None
    ) -> Run:
        """Join the ranks, open the run folder, its log and its watchdog. Collective.

        Args:
            args: `out`, `deepspeed_config`.  stage: name that the folder records.
            images: the set that is read; its fingerprint ties checkpoints to it.  measured_on: further sets.
            num_samples: images of an epoch, where a part of the set is held out.
        Raises: UserError if DeepSpeed's JSON, the durations or the run folder do not fit, before any rank joins another
            where no rank is needed to tell; or if a shard of a set is missing or has changed since.
        """
        cfg = resolved.recipe
        ds_config = read_deepspeed_json(args.deepspeed_config)
        use_layer_norm(cfg.run)
        torch.backends.cudnn.deterministic = cfg.run.deterministic
        fingerprint, num_samples = images.manifest.fingerprint(), num_samples or images.num_samples
        durations = resolve_durations(cfg, num_samples)
        START_UP.ends("data")
        world = start_world()
        START_UP.ends("ranks")
        check_shared(world, *(opened.shards for opened in (images, *measured_on)))
        START_UP.ends("data")
        cfg = recipe_of_ranks(cfg, world.size)
        ds_config = merge_deepspeed(ds_config, args.deepspeed_config, cfg.run, cfg.optim, world.size)
        open_run_folder(args.out, stage, resolved, ds_config, world)
        log_to(args.out, world.rank)
        if world.is_main and cfg.run.micro_batch < resolved.recipe.run.micro_batch:
            logger.info("%d images a pass, which divide the part of %d ranks", cfg.run.micro_batch, world.size)
        run = cls(
            args.out,
            cfg,
            ds_config,
            world,
            durations,
            source=args.deepspeed_config,
            fingerprint=fingerprint,
            num_samples=num_samples,
            resumes=_resumes(args.out, cfg.checkpoint, world),
        )
        run.record({"images_fingerprint": fingerprint, "num_samples": num_samples})
        START_UP.ends("records")
        return run

    def record(self, facts: dict) -> None:
        """Add to what the run folder tells of the run's origins; it ends in the card of a release. Collective.

        Raises: UserError if a run that is continued was trained from others.
        """
        record_provenance(self.out, facts, self.world)

    def seed_weights(self) -> None:
        """Initial weights follow from run.seed alone, whatever was drawn while the data were opened."""
        START_UP.ends("data")
        seed_all(self.cfg.run.seed)

    # ----------------------------------------------------------------------------------------- second phase

    def attach(
        self,
        model: nn.Module,
        *,
        training_flops: float,
        leaf_modules: tuple[type[nn.Module], ...] = (),
        lr_scales: dict[str, float] | None = None,
        ema_decay: float = 0.0,
    ) -> None:
        """Wrap the model in the engine and take up the newest checkpoint, or begin at step 0. Collective.

        Args:
            model: the same weights on every rank.  leaf_modules, lr_scales: as `start_engine` takes them.
            training_flops: of one image, forward and backward; for the logged MFU.
            ema_decay: of a moving average of the weights; 0: none is kept.
        Raises: UserError as `start_engine`, `restore` and `WeightEma` do.
        """
        cfg, world = self.cfg, self.world
        START_UP.ends("model")
        recorded = read_provenance(self.out).get("attention")
        settle_fp8(model, cfg.run, world)
        if form := settle_attention(model, cfg, world, resumes=self.resumes, recorded=recorded):
            self.record(form)
        self.engine = start_engine(
            model,
            self._ds_config,
            source=self._source,
            run=cfg.run,
            optim=cfg.optim,
            leaf_modules=leaf_modules,
            lr_scales=lr_scales,
        )
        START_UP.ends("engine")
        self.ema = WeightEma(self.engine, ema_decay) if ema_decay else None
        # Stochastic depth differs between ranks; weights did not.
        seed_all(cfg.run.seed + 1 + world.rank)
        restored = restore(
            self.out, self.engine, cfg.checkpoint, world, fingerprint=self._fingerprint, seed=cfg.run.seed, ema=self.ema
        )
        START_UP.ends("checkpoint")
        self.first_step = restored.progress.step
        self._guard = StepGuard(self.engine, cfg.run, world)
        self.meter = Meter(
            self.out,
            world,
            first_step=self.first_step,
            durations=self.durations,
            run=cfg.run,
            num_samples=self._num_samples,
            training_flops=training_flops,
            peak_flops=peak_flops(world, cfg.run.precision),
            counters={"bad_images": lambda: self.bad_images.count},
        )
        self._meter_is_open = True
        self._saver = Saver(
            self.out,
            self.engine,
            restored,
            settings=cfg.checkpoint,
            durations=self.durations,
            global_batch=cfg.run.global_batch,
            world=world,
            meter=self.meter,
            parts={"bad_images": self.bad_images},
            shared={"guard": self._guard},
            ema=self.ema,
        )
        self._saver_is_open = True

    # --------------------------------------------------------------------------------------------- the loop

    def positions(self, first_step: int | None = None, last_step: int | None = None) -> Iterator:
        """Positions in the run's order of each forward pass of this rank, from the first step of this start to its
        last (`order.rank_positions`).
        """
        return order.rank_positions(
            self.cfg.run,
            self.world.rank,
            self.world.size,
            first_step=self.first_step if first_step is None else first_step,
            last_step=self.durations.stop_step if last_step is None else last_step,
        )

    def steps(self) -> Iterator[int]:
        """Numbers of the optimiser steps that are left, from 0, each with its learning rate set; ends early when the
        run is asked to stop.
        """
        cfg = self.cfg
        for step in range(self.first_step, self.durations.stop_step):
            self._step, self._lr = step, set_lr(self.engine, cfg.optim, cfg.schedule, self.durations, step)
            yield step
            if self.stopping:
                return
        with self._watchdog.during("saving", LONG_S):
            self._saver.finish()

    def micro_batches(self, batches: Iterator) -> Iterator:
        """The batches of one optimiser step of this rank; the time the loop waits for them is counted."""
        for _ in range(micro_steps(self.cfg.run, self.world.size)):
            yield self.meter.next(batches)

    def backward(self, loss: torch.Tensor, stats: dict[str, torch.Tensor], keys: list[str]) -> None:
        """One forward pass's gradient. The engine accumulates, scales, clips, and steps after the last one.

        Args:
            loss: scalar on the device.  stats: name -> scalar on the device, averaged for the log.
            keys: of the samples in the pass, named if its loss is not finite.
        Raises: UserError where fp16's loss scale can be lowered no more.
        """
        self.meter.add(loss, stats)
        self.engine.backward(self._guard.watch(loss, keys))
        try:
            self.engine.step()
        except Exception as error:
            # DeepSpeed has no type of its own for it; all ranks see the same overflow.
            if "loss scale already at minimum" not in str(error):
                raise
            raise UserError(
                f"step {self._step + 1}: gradients overflow fp16 at the lowest loss scale; the last checkpoint is "
                "untouched: continue it with a lower optim.lr, or run.precision=bf16"
            ) from None

    def step_applied(self) -> bool:
        """Whether the step in hand moved the weights, the same on every rank: the guard skips bad ones.

        Raises: UserError when too many were skipped, or all of a run that is at its end.
        """
        if self._applied is None:
            done = self._step + 1
            self._applied = self._guard.close_step(done)
            if done == self.durations.stop_step and not self._guard.any_applied:
                raise UserError(
                    f"none of the {done} steps was taken: each was skipped for a loss or gradient that is not finite; "
                    "the search for fp16's loss scale takes some steps, so make the run longer, lower optim.lr, or set "
                    "run.precision=fp32"
                )
        return self._applied

    def finish_step(self, extra: Callable[[], dict[str, float]] = dict) -> None:
        """End the step: guard, log, save where it is due. Sets `stopping` where the run was asked to stop. Collective.

        Args:
            extra: further numbers for the log, asked for only when the step logs.
        """
        done, applied = self._step + 1, self.step_applied()
        self._applied = None
        self.meter.close_step(done, self.engine, self._lr, extra, applied=applied, skipped=self._guard.total_skipped)
        with self._watchdog.during("saving", LONG_S):
            self.stopping = self._saver.close_step(done)
        self._watchdog.beat(done)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """What happens inside is no training time, and may take long.

        A checkpoint in hand is finished before, so that an image that cannot be read costs no training. Collective.
        """
        with self._watchdog.during("saving", LONG_S):
            self._saver.finish_save()
        with self.meter.paused("evaluation"), self._watchdog.during("evaluation", LONG_S):
            yield

    # ---------------------------------------------------------------------------------------------- the end

    @property
    def is_complete(self) -> bool:
        """Whether the whole schedule is done, not only what this start was to do."""
        return not self.stopping and self.durations.stop_step == self.durations.total_steps

    @property
    def exit_code(self) -> int:
        return EXIT_REQUEUE if self.stopping else EXIT_DONE

    def __enter__(self) -> Run:
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        self._watchdog.close()
        if error is not None:
            if self._meter_is_open:
                self._finish_save_after(error)
                close_after(self.meter, error)
            return
        self.meter.close(self.exit_code)
        if self.world.is_main and not self.stopping:
            done, total = self.durations.stop_step, self.durations.total_steps
            sys.stdout.write(f"{done} of {total} steps done, checkpoints in {self.out / 'checkpoints'}\n")

    def _finish_save_after(self, error: BaseException) -> None:
        """A single rank ends the checkpoint in hand; of several this one may be the only one that fails, and the
        others wait elsewhere.
        """
        if self.world.size > 1 or not self._saver_is_open or not isinstance(error, Exception):
            return
        try:
            self._saver.finish_save()
        except UserError as second:
            logger.warning("%s", second)


def close_after(meter: Meter, error: BaseException) -> None:
    """Record the error that ends the run. The disk that did not take a checkpoint may not take this either: what came
    first is what counts.
    """
    try:
        meter.close(*ending(error))
    except UserError as second:
        logger.warning("%s", second)


def _resumes(out: Path, settings, world: World) -> bool:
    """Whether this start continues checkpoints: what rank 0 sees counts. Collective.

    Raises: UserError where another rank sees something else; its view of a shared file system may lag behind.
    """
    sees = continues(settings) and bool(list_checkpoints(out))
    first_sees = world.gather_objects(sees)[0]
    world.agree(
        ""
        if sees == first_sees
        else f"{out}: rank {world.rank} does not see the checkpoints that rank 0 sees; start again in a minute"
    )
    return first_sees


def peak_flops(world: World, precision: str) -> float:
    """FLOP a second of all ranks' devices by their data sheets; 0 where there is none."""
    if world.device.type != "cuda":
        return 0.0
    return world.size * mfu.peak_flops(torch.cuda.get_device_name(world.device), precision)
