"""What a run tells: TensorBoard events through clu, a progress bar, speed, and a trace.

clu's periodic actions are not used. Its `Profile` leaves the trace open where a run ends or fails within it,
and tells nobody where it is; its `ReportProgress` prints nothing and does not know how long a step waited for
data.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from moebius_jax.errors import UserError
from moebius_jax.imaging.picture import write_image


class RunLog:
    """TensorBoard events in the run's folder, written by the first process only.

    Raises:
        UserError: the libraries of the `train` extra are missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_first = jax.process_index() == 0
        self._writer = None
        if self._is_first:
            try:
                from clu import metric_writers
            except ImportError as error:  # clu itself, or TensorFlow, which it needs and does not declare
                raise UserError(f'{error}; install the training extra: pip install -e ".[train]"') from None
            self._writer = metric_writers.AsyncMultiWriter([metric_writers.SummaryWriter(str(folder))])

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self._writer:
            self._writer.write_scalars(step, values)

    def text(self, step: int, name: str, value: str) -> None:
        if self._writer:
            self._writer.write_texts(step, {name: value})

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """An image as an event, and as PNG in `samples/`."""
        if self._writer:
            self._writer.write_images(step, {name: np.asarray(image)[None] / 255.0})
            write_image(
                self._folder / "samples" / f"step_{step:07d}.png", image, overwrite=True, only_ours=False
            )

    def close(self) -> None:
        if self._writer:
            self._writer.flush()
            self._writer.close()


class Progress:
    """A progress bar on a terminal; elsewhere one line per report."""

    def __init__(self, start: int, total: int) -> None:
        from tqdm import tqdm

        self._shown = jax.process_index() == 0
        self._bar: Any = tqdm(
            total=total, initial=start, disable=not (self._shown and sys.stderr.isatty()), unit="step"
        )
        self._total = total

    def step(self) -> None:
        self._bar.update()

    def report(self, step: int, values: dict[str, float]) -> None:
        parts = {k: values[k] for k in ("loss", "loss_task", "images_per_second") if k in values}
        text = "  ".join(f"{k} {v:.4g}" for k, v in parts.items())
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
        elif self._shown:
            print(f"step {step}/{self._total}  {text}", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class Stopwatch:
    """Speed between two reports, from the moments steps are handed to the devices.

    Args:
        batch_size: samples of a step.
        flops: of a step on all devices, if known.
        peak: FLOP/s of all devices, if known.
    """

    def __init__(self, batch_size: int, flops: float | None, peak: float | None) -> None:
        self._batch_size, self._flops, self._peak = batch_size, flops, peak
        self._first: float | None = None
        self._last = 0.0
        self._steps = 0
        self._waiting = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time of the block as spent on data."""
        started = time.perf_counter()
        yield
        self._waiting += time.perf_counter() - started

    def tick(self) -> None:
        """A step is about to begin."""
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last
        else:
            self._steps += 1

    def rates(self) -> dict[str, float]:
        """Images per second, share of the time spent waiting for data, and fraction of the devices' peak;
        nothing if no step was finished since the last report."""
        if not self._steps or self._first is None:
            return {}
        seconds = self._last - self._first
        rates = {
            "images_per_second": self._batch_size * self._steps / seconds,
            "data_wait_share": self._waiting / seconds,
        }
        if self._flops and self._peak:
            rates["fraction_of_peak"] = self._flops * self._steps / seconds / self._peak
        self._waiting, self._steps, self._first = 0.0, 0, self._last
        return rates


class Trace:
    """A profiler's trace of a few steps.

    Args:
        folder: gets it, in `profile/`.
        first: step it begins at; None for no trace.
        say: told where it is.
        known_as: where people will find the folder.
    """

    STEPS = 5

    def __init__(self, folder: Path, first: int | None, say: Callable[[str], None], known_as: Path) -> None:
        self._folder, self._first, self._say = folder / "profile", first, say
        self._known_as = known_as / "profile"
        self._is_running = False

    def at(self, step: int) -> None:
        """A step is about to begin."""
        if self._first is not None and step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._is_running = True
        elif self._first is not None and step == self._first + self.STEPS:
            self.close()

    def close(self) -> None:
        if self._is_running:
            jax.profiler.stop_trace()
            self._is_running = False
            self._say(f"profile: tensorboard --logdir {self._known_as}")
