"""Which data a run is trained on."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from moebius_jax.data.loader import LoaderConfig, Source
from moebius_jax.data.samples import AugmentConfig
from moebius_jax.data.sources import ImageSource, LatentSource, SyntheticSource
from moebius_jax.errors import UserError

DataKind = Literal["images", "latents", "synthetic"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on.

    Attributes:
        kind: "images" encodes files as it goes; "latents" reads a folder made by `cache_latents.py`;
            "synthetic" makes numbers up, for measuring speed.
        path: of images: a folder, or a JSON-lines file of the release; of latents: the cache.
        root: what relative paths in a JSON-lines file start from; its own folder by default.
        augment: from file to sample.
        loader: workers and prefetching.

    Raises:
        ValueError: `kind` is unknown.
    """

    kind: DataKind = "images"
    path: str | None = None
    root: str | None = None
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    loader: LoaderConfig = dataclasses.field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        if self.kind not in get_args(DataKind):
            raise ValueError(f"kind is {self.kind!r}; expected one of {', '.join(get_args(DataKind))}")


def open_source(config: DataConfig, latent_size: int) -> Source:
    """The samples a configuration names; `latent_size` is the side of the maps a network is trained at.

    Raises:
        UserError: nothing there, or of another size.
    """
    if config.kind == "synthetic":
        return SyntheticSource(latent_size)
    if config.path is None:
        raise UserError(
            "no data: pass data.path=FOLDER (or a JSON-lines file), or --dataset synthetic to measure speed"
        )
    path, root = Path(config.path), Path(config.root) if config.root else None
    if config.kind == "images":
        return ImageSource(path, root, config.augment)
    source = LatentSource(path)
    if source.info.side != latent_size:
        raise UserError(
            f"{path}: latents of side {source.info.side}; the network is trained at {latent_size}"
        )
    return source
