"""Batches of files or cached latents as the step takes them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, UInt8

from moebius_jax.errors import UserError
from moebius_jax.models import VAE
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.sharding import batch_sharding
from moebius_jax.training.step import LatentBatch


def posterior_moments(vae: VAE, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w 8"]:
    """Mean and standard deviation of the scaled latents of images in [-1, 1]."""
    posterior = vae.posterior(images)
    return vae.config.scaling_factor * jnp.concatenate([posterior.mean, posterior.std], axis=-1)


@jax.jit
def encode_batch(
    vae: VAE, images: UInt8[Array, "B H W 3"], holes: Bool[Array, "B H W"]
) -> tuple[Float[Array, "B h w 8"], Float[Array, "B h w 8"], Bool[Array, "B h w"]]:
    """Posterior moments of the images and of the images with their holes grey, and the holes' latent grid."""
    factor = vae.config.factor
    scaled = images.astype(jnp.float32) / 127.5 - 1
    visible = scaled * (1 - holes[..., None].astype(jnp.float32))
    return posterior_moments(vae, scaled), posterior_moments(vae, visible), holes[:, ::factor, ::factor]


def check_images(config: TrainConfig, vae: VAE | None) -> None:
    """Raises UserError unless a run on images has an encoder, and they come out at the student's size."""
    if config.data.kind != "images":
        return
    if vae is None:
        raise UserError("training on images needs their encoder: pass vae=FOLDER, or cache latents first")
    size, side = config.data.augment.image_size, config.student.latent_size
    if size != side * vae.config.factor:
        raise UserError(
            f"data.augment.image_size is {size}; expected {side * vae.config.factor}: the student is trained "
            f"at latents of {side}, and the VAE makes one of {vae.config.factor} pixels"
        )


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of a batch as global arrays, cut over all devices."""
    place = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(place, value) for name, value in batch.items()}


def latent_batch(batch: dict[str, jax.Array], vae: VAE | None) -> LatentBatch:
    """A batch of images (encoded here) or of latents."""
    fields: dict[str, Any] = dict(batch)
    if "image" in fields:
        if vae is None:
            raise ValueError("images need a VAE")
        moments, masked, hole = encode_batch(vae, fields.pop("image"), fields.pop("hole"))
        fields |= {"moments": moments, "masked_moments": masked, "hole": hole}
    return LatentBatch(**fields)
