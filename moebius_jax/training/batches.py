"""Batches on their way from the loader to the step: onto the devices, through the encoder, and as shapes."""

import hashlib

import jax
import numpy as np
from jax.sharding import Mesh

from moebius_jax.data.datasets import DATASETS, Dataset
from moebius_jax.data.samples import Batch, LatentSample, PixelSample
from moebius_jax.errors import UserError
from moebius_jax.inpaint.latents import encode_moments
from moebius_jax.models import VAE
from moebius_jax.sharding import batch_sharding, plain_bools
from moebius_jax.training.config import TrainConfig
from moebius_jax.weights.names import counterparts
from moebius_jax.weights.tensors import network_tensors


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
    """This process's share of a batch as global arrays, cut over all devices."""
    place = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), plain_bools(batch))


def encoded(batch: Batch, vae: VAE | None) -> Batch:
    """A batch of latents: pictures are encoded here.

    Raises:
        ValueError: there are pictures and no VAE.
    """
    if isinstance(batch.samples, LatentSample):
        return batch
    if vae is None:
        raise ValueError("pictures need a VAE")
    image, hole, task = batch.samples
    return batch._replace(samples=LatentSample(*encode_moments(vae, image, hole), task))


def abstract_batch(config: TrainConfig, mesh: Mesh, dataset: Dataset | None = None) -> Batch:
    """Shapes and places of an encoded batch; of latents in half precision where no data are at hand."""
    dtype = np.float32 if DATASETS[config.data.kind].SAMPLE is PixelSample else np.float16
    if dataset is not None and isinstance(dataset.blank, LatentSample):
        dtype = dataset.blank.moments.dtype
    one = Batch(samples=LatentSample.blank(config.student.latent_shape, dtype), index=np.int32(0))
    place = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.batch_size, *x.shape), x.dtype, sharding=place), one
    )


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError unless every device gets the same number of samples of every part of a batch."""
    part, step = config.batch_size // config.accumulation, mesh.size * config.accumulation
    if part % mesh.size:
        below = config.batch_size // step * step
        nearest = " or ".join(str(size) for size in (below, below + step) if size)
        raise UserError(
            f"batch_size / accumulation is {part}; expected a multiple of the {mesh.size} devices: "
            f"batch_size {nearest}"
        )


def encoder_digest(vae: VAE) -> str:
    """What tells latents of different encoders apart. Caches hold it: another form would refuse them all."""
    total = hashlib.sha256()
    tensors, released = network_tensors(vae), counterparts(vae.config)
    for name in sorted(tensors, key=lambda name: released[name].names):
        total.update(np.ascontiguousarray(tensors[name]).tobytes())
    return total.hexdigest()[:16]


def check_encoder(config: TrainConfig, vae: VAE | None, dataset: Dataset) -> None:
    """Raises UserError unless pictures come out of the encoder at the student's size, and cached latents
    come from the encoder the run names."""
    if not isinstance(dataset.blank, PixelSample):
        if vae is not None and dataset.encoder is not None and dataset.encoder != encoder_digest(vae):
            raise UserError(f"{config.data.path}: latents of another encoder than vae={config.vae}")
        return
    if vae is None:
        raise UserError("training on images needs their encoder: pass vae=FOLDER, or cache latents first")
    size, side = dataset.blank.image.shape[0], config.student.latent_size
    if size != side * vae.config.factor:
        what = "pictures of side"
        if size == config.data.augment.image_size:
            what = "data.augment.image_size is"
        raise UserError(
            f"{what} {size}; expected {side * vae.config.factor}: the student is trained at latents of "
            f"{side}, and the VAE makes one of {vae.config.factor} pixels"
        )
    if config.student.out_channels != vae.config.latent_channels:
        raise UserError(
            f"the student's latents have {config.student.out_channels} channels, the VAE's "
            f"{vae.config.latent_channels}; they must be of one kind"
        )
