"""The training loop: save, draw the next batch, step; in this order."""

import dataclasses
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from moebius_jax.data.loader import Loader
from moebius_jax.errors import UserError
from moebius_jax.hardware import peak_flops
from moebius_jax.training.checkpointing import RunCheckpoints
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.logs import Progress, RunLog, Stopwatch
from moebius_jax.training.overrides import describe
from moebius_jax.training.preview import SampleGrids
from moebius_jax.training.state import TrainState
from moebius_jax.training.step import LatentBatch, Metrics, first_bad_term

PROFILED_STEPS = 5


@dataclasses.dataclass
class Stop:
    """Whether somebody wants the run to end."""

    asked: bool = False

    @classmethod
    def on(cls, *signals: signal.Signals) -> "Stop":
        """Asked for by any of these signals; a second one of the same kind ends the program at once.

        Among several processes jax listens to SIGTERM itself and has all agree on a step.
        """
        stop = cls()

        def ask(number: int, _: Any) -> None:
            stop.asked = True
            signal.signal(number, signal.SIG_DFL)

        if jax.process_count() == 1:
            for number in signals:
                signal.signal(number, ask)
        return stop


class Loop:
    """Runs a run's steps.

    Args:
        config: of the run.
        mesh: its devices.
        workdir: for events and grids.
        step: compiled; takes the state's memory over.
        batches: of this process.
        prepare: from a loader's batch to the step's.
        checkpoints: of the run.
        grids: maker of sample grids, or None.
        flops: of a step, for the fraction of peak.
        profile_at: step to start a trace at.
        stop: asked to, the run ends after the step under way, and is saved.
        say: for a person.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        *,
        workdir: Path,
        step: Callable[[TrainState, LatentBatch], tuple[TrainState, Metrics]],
        batches: Loader,
        prepare: Callable[[Any], LatentBatch],
        checkpoints: RunCheckpoints,
        grids: SampleGrids | None,
        flops: float | None,
        profile_at: int | None,
        stop: Stop,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._workdir, self._say = config, workdir, say
        self._step, self._batches, self._prepare = step, batches, prepare
        self._checkpoints, self._grids = checkpoints, grids
        self._profile_at = profile_at
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._watch = Stopwatch(config.batch_size, flops, peak * mesh.size if peak else None)
        self.stop = stop
        self._is_profiling = False

    def run(self, state: TrainState) -> TrainState:
        """From the state's step to the last one, or until stopped; the state at the end is saved.

        Raises:
            UserError: a loss is not finite, too much data cannot be read, or something cannot be written.
        """
        config = self._config
        first = done = int(state.step)
        log = RunLog(self._workdir)
        log.text(done, "config", "\n".join(f"    {k} = {v}" for k, v in describe(config).items()))
        progress = Progress(done, config.steps)
        pending: tuple[int, Metrics] | None = None
        try:
            while True:
                # This order must not change. A checkpoint holds the state after `done` steps and the position
                # before the next batch; drawing first would skip that batch on resuming.
                at_end = done >= config.steps or self._must_stop(done)
                if (at_end or done % config.checkpoint.every == 0) and done > first:
                    pending = self._look(pending, log, progress)
                    self._save(state)
                if (
                    self._grids
                    and done > first
                    and (done == config.steps or done % config.log.grid_every == 0)
                ):
                    log.picture(done, "samples", self._grids.draw(state.result))
                if at_end:
                    break
                self._profile(done)
                batch = self._next(state)
                if batch is None:  # the workers were told to stop as well
                    continue
                self._watch.tick()
                state, metrics = self._step(state, batch)
                # Looked at a step late: the devices are then busy with the next one already.
                self._look(pending, log, progress)
                done += 1
                pending = (done, metrics)
                progress.step()
        finally:
            # Also on the way out of an error: a checkpoint that is being written is lost otherwise.
            self._checkpoints.close()
            self._end_profile()
            progress.close()
            log.close()
        return state

    def _next(self, state: TrainState) -> LatentBatch | None:
        """The next batch, or None if workers ended because the run was told to stop.

        Bad data end the run; its state is saved first.
        """
        started = time.perf_counter()
        try:
            batch = next(self._batches)
        except UserError:
            self._save(state)
            raise
        except RuntimeError:
            if not self.stop.asked:
                raise
            return None
        self._watch.waiting += time.perf_counter() - started
        return self._prepare(batch)

    def _save(self, state: TrainState) -> None:
        self._checkpoints.save(state, self._batches.samples, describe(self._config))

    def _look(self, pending: tuple[int, Metrics] | None, log: RunLog, progress: Progress) -> None:
        """Checks a step's figures and writes them down when it is time."""
        if pending is None:
            return
        step, metrics = pending
        metrics = jax.device_get(metrics)
        if bad := first_bad_term(metrics):
            self._checkpoints.wait()
            latest = self._checkpoints.latest
            raise UserError(
                f"step {step}: {bad} is {float(metrics[bad])}; "
                + (f"the last checkpoint before it is {latest}" if latest else "there is no checkpoint yet")
            )
        if step % self._config.log.every == 0 or step == self._config.steps:
            values = {name: float(value) for name, value in metrics.items()} | self._watch.rates()
            log.scalars(step, values)
            progress.report(step, values)

    def _must_stop(self, done: int) -> bool:
        if jax.process_count() > 1:  # all processes have to agree on the step
            from jax.experimental import multihost_utils

            self.stop.asked |= multihost_utils.reached_preemption_sync_point(done)
        return self.stop.asked

    def _profile(self, done: int) -> None:
        if self._profile_at is None:
            return
        if done == self._profile_at:
            jax.profiler.start_trace(str(self._workdir / "profile"))
            self._is_profiling = True
        elif done == self._profile_at + PROFILED_STEPS:
            self._end_profile()

    def _end_profile(self) -> None:
        if self._is_profiling:
            jax.profiler.stop_trace()
            self._is_profiling = False
            self._say(f"profile: tensorboard --logdir {self._workdir / 'profile'}")
