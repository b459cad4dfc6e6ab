"""Encoding the samples of a configuration into a folder of latents, so that training need not."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moebius_jax.data.config import open_dataset
from moebius_jax.data.latent_cache import CHECKSUMS, FILES, INDEX, CacheInfo, CacheWriter
from moebius_jax.data.loader import Loader
from moebius_jax.data.samples import LatentSample
from moebius_jax.outbox import folder_for
from moebius_jax.sharding import make_mesh
from moebius_jax.training.batches import check_encoder, encoded, encoder_digest, to_devices
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.networks import load_image_codec
from moebius_jax.training.overrides import describe


def cache_latents(
    config: TrainConfig,
    folder: Path,
    *,
    draws: int,
    batch_size: int,
    overwrite: bool,
    warn: Callable[[str], None] = lambda _: None,
    track: Callable[..., Iterable[Any]] = lambda items, **_: items,
) -> CacheInfo:
    """Encodes `draws` samples of every image, as training would draw them.

    Args:
        config: its data, VAE, seed and student's latents count.
        folder: to write, here or in a bucket; it is a cache only when complete.
        draws: samples per image.
        batch_size: encoded at a time, rounded up to a multiple of the devices.
        overwrite: replace an existing cache.
        warn: told of every unreadable image.
        track: wraps the loop, as tqdm does.

    Raises:
        UserError: images or VAE cannot be read or do not fit, or the folder cannot be written.
    """
    mesh = make_mesh()
    vae = load_image_codec(config, mesh)
    dataset = open_dataset(config.data, config.student.latent_shape)
    check_encoder(config, vae, dataset)
    batch_size = -(-batch_size // mesh.size) * mesh.size
    samples = len(dataset.names) * draws
    loader = Loader(dataset, config.data.loader, seed=config.seed, global_batch=batch_size, warn=warn)
    info = CacheInfo(
        samples=samples,
        side=config.student.latent_size,
        vae=encoder_digest(vae),
        made_of={
            "images": len(dataset.names),
            "draws": draws,
            "seed": config.seed,
            **describe(config.data, "data."),
        },
    )
    blank = LatentSample.blank(config.student.latent_shape)
    with folder_for(folder, overwrite=overwrite, ours=(INDEX, CHECKSUMS, *FILES)) as partial:
        writer = CacheWriter(partial, info, blank)
        for first in track(range(0, samples, batch_size), desc="batches"):
            batch = encoded(to_devices(next(loader), mesh), vae)
            count = min(batch_size, samples - first)
            writer.add(jax.tree.map(lambda x, n=count: np.asarray(x)[:n], batch.samples))
        writer.close()
    loader.close()
    return info
