"""Which data a run is trained on."""

import dataclasses
from typing import Annotated

from moebius_jax.buckets import location
from moebius_jax.data.augment import AugmentConfig
from moebius_jax.data.datasets import DATASETS, Dataset, Source
from moebius_jax.data.loader import LoaderConfig
from moebius_jax.schema import Location, checked, one_of


@checked
class DataConfig:
    """What is trained on.

    Attributes:
        kind: a key of `DATASETS`: "images" encodes files as it goes; "latents" reads a folder made by
            `cache_latents.py`; "synthetic" makes numbers up, for measuring speed.
        path: of images: a folder, or a JSON-lines file of the release; of latents: the cache.
        root: what relative paths in a JSON-lines file start from; its own folder by default.
        augment: from file to sample.
        loader: workers and prefetching.

    Raises:
        ValueError: `kind` is unknown.
    """

    kind: Annotated[str, one_of(DATASETS)] = "images"
    path: Location | None = None
    root: Location | None = None
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    loader: LoaderConfig = dataclasses.field(default_factory=LoaderConfig)


def open_dataset(config: DataConfig, latent_shape: tuple[int, int, int]) -> Dataset:
    """The data set a configuration names, for a network trained on latents [h, w, c].

    Raises:
        UserError: nothing there, or of another size.
    """
    path, root = (location(p) if p else None for p in (config.path, config.root))
    source = Source(path=path, root=root, augment=config.augment, latent_shape=latent_shape)
    return DATASETS[config.kind](source)
