"""The endless, deterministic order of samples, cut into batches and between processes.

Sample number i of a run is a function of the seed and i alone: which file (a new shuffle every epoch) and
every random choice about it. Batch k of global size G holds numbers kG to (k+1)G - 1; process p of P takes
every P-th. So neither workers nor processes nor a restart change what is trained on, and the iterator's whole
state is k.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import grain
import numpy as np
from pydantic import Field

from moebius_jax.data.datasets import Dataset
from moebius_jax.data.samples import Batch, Sample
from moebius_jax.errors import UserError
from moebius_jax.schema import Probability, checked

_ENDLESS = 2**60  # samples; grain counts in 64 bits, and some of its sums are above what it is told
_LOOK_AFTER_PARENT_S = 2.0
TRIES = 10  # files in a row that may be unreadable before a sample is given up


@checked
class LoaderConfig:
    """How samples are fetched.

    Attributes:
        workers: processes that prepare samples; 0 prepares them in threads of this one.
        threads: that prepare samples where there are no workers; each worker has one.
        prefetch: batches kept ready, by all workers together.
        max_bad_fraction: of the items may be missing or corrupt (one, in a small set; 0 allows none). Each is
            named once, and another one drawn at random takes its place; beyond this share the run stops.

    Raises:
        ValueError: a field is out of range.
    """

    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    threads: Annotated[int, Field(ge=1, le=1024)] = 4
    prefetch: Annotated[int, Field(ge=1, le=4096)] = 4
    max_bad_fraction: Probability = 0.001


class Loader:
    """Batches of this process from batch number `first_batch` on.

    Args:
        dataset: of samples.
        config: see there.
        seed: of order and augmentation.
        global_batch: samples of a batch over all processes.
        process, processes: which share is this process's.
        first_batch: where to start.
        warn: told of every unreadable item once.

    Raises:
        UserError: the batch cannot be cut evenly.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: LoaderConfig,
        *,
        seed: int,
        global_batch: int,
        process: int = 0,
        processes: int = 1,
        first_batch: int = 0,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        if global_batch % processes:
            raise UserError(f"batch_size is {global_batch}; expected a multiple of the {processes} processes")
        self._dataset, self._config, self._warn = dataset, config, warn
        self._bad: set[int] = set()
        epoch = grain.MapDataset.range(len(dataset.names)).seed(seed).shuffle()
        order = epoch.repeat(_ENDLESS // len(dataset.names))
        samples = order.random_map(_Draw(dataset))
        numbered = samples.map_with_index(_Number(global_batch))
        own = numbered[first_batch * global_batch + process :: processes]
        batched = own.batch(global_batch // processes)
        threads = grain.ReadOptions(
            num_threads=1 if config.workers else config.threads,
            prefetch_buffer_size=max(config.prefetch, config.threads),
        )
        iterable = batched.to_iter_dataset(threads)
        if config.workers:
            iterable = _with_workers(iterable, config)
        self._iterator = iter(iterable)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            UserError: too many items cannot be read.
        """
        drawn, index = next(self._iterator)
        self._report(drawn.bad)
        return Batch(samples=drawn.sample, index=index)

    def close(self) -> None:
        """Ends the workers."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()

    def _report(self, bad: np.ndarray) -> None:
        names, fraction = self._dataset.names, self._config.max_bad_fraction
        for item in np.unique(bad[bad >= 0]):
            if int(item) not in self._bad:
                self._bad.add(int(item))
                self._warn(f"{self._reason(int(item))}; another sample takes its place")
        exhausted = bad[bad[:, -1] >= 0]
        if len(exhausted):
            raise UserError(f"{TRIES} items in a row cannot be read; {self._reason(int(exhausted[0, 0]))}")
        allowed = max(1, fraction * len(names)) if fraction else 0
        if len(self._bad) > allowed:
            raise UserError(
                f"{len(self._bad)} of {len(names)} items cannot be read, more than max_bad_fraction = "
                f"{fraction} allows; {self._reason(max(self._bad))}"
            )

    def _reason(self, item: int) -> str:
        """What is wrong with an item, from trying it once more here."""
        try:
            self._dataset.draw(item, np.random.default_rng(0))
        except UserError as error:
            return str(error)
        return f"{self._dataset.names[item]}: could not be read"


class _Drawn(NamedTuple):
    """A sample, and the items that could not be read before one could; -1 for none."""

    sample: Sample
    bad: np.ndarray


class _Draw:
    """Sample of an item, or of another where it cannot be read."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __call__(self, item: int, rng: np.random.Generator) -> _Drawn:
        bad = np.full(TRIES, -1, np.int64)
        for i in range(TRIES):
            try:
                return _Drawn(self._dataset.draw(int(item), rng), bad)
            except UserError:
                bad[i] = item
                item = int(rng.integers(len(self._dataset.names)))
        return _Drawn(self._dataset.blank, bad)  # the loader ends the run on seeing this


class _Number:
    """Adds a sample's place in its global batch, which its noise is drawn from."""

    def __init__(self, global_batch: int) -> None:
        self._global_batch = global_batch

    def __call__(self, number: int, drawn: _Drawn) -> tuple[_Drawn, np.int32]:
        return drawn, np.int32(number % self._global_batch)


def _with_workers(iterable: Any, config: LoaderConfig) -> Any:
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, which a plain program never parses
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(
        num_workers=config.workers, per_worker_buffer_size=max(1, config.prefetch // config.workers)
    )
    return iterable.mp_prefetch(options, worker_init_fn=_live_as_long_as_the_parent)


def _live_as_long_as_the_parent(*_: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the workers too; the parent still needs them while it saves.

    A parent that is killed cannot end them: they look after it themselves.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_AFTER_PARENT_S)
    os._exit(1)
