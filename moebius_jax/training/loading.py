"""The run's loaders: of its training data from any batch on, and of the first few batches of any data."""

import dataclasses
from collections.abc import Callable, Iterator

import jax

from moebius_jax.data.datasets import Dataset
from moebius_jax.data.loader import Loader
from moebius_jax.data.samples import Batch
from moebius_jax.training.config import TrainConfig


def training_loader(
    config: TrainConfig, dataset: Dataset, first_batch: int, warn: Callable[[str], None]
) -> Loader:
    """This process's share of the run's batches, from number `first_batch` on."""
    return Loader(
        dataset,
        config.data.loader,
        seed=config.seed,
        global_batch=config.batch_size,
        process=jax.process_index(),
        processes=jax.process_count(),
        first_batch=first_batch,
        warn=warn,
    )


def first_batches(
    config: TrainConfig, dataset: Dataset, *, seed: int, size: int, count: int, is_shared: bool = True
) -> Iterator[Batch]:
    """The first batches of a data set's order for a seed, without workers.

    Args:
        config: of the run.
        dataset: to draw from.
        seed: of order and augmentation.
        size: of a batch over all processes.
        count: of batches.
        is_shared: this process's share of each; else every process gets all of it.
    """
    loader = Loader(
        dataset,
        dataclasses.replace(config.data.loader, workers=0, threads=1, prefetch=1),
        seed=seed,
        global_batch=size,
        process=jax.process_index() if is_shared else 0,
        processes=jax.process_count() if is_shared else 1,
    )
    for _ in range(count):
        yield next(loader)
    loader.close()
