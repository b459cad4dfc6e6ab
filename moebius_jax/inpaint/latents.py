"""Pixels to latents and back, compiled; for sampling and for training."""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, UInt8

from moebius_jax.models.vae import VAE, Posterior

Images = UInt8[Array, "B H W 3"]
Holes = Bool[Array, "B H W"]
Latents = Float[Array, "B h w c"]


@struct.dataclass
class Conditions:
    """What an image gives the denoising loop.

    Attributes:
        image_latents: of the whole image, for the start at strength < 1.
        mask: on the latent grid, 1 = hole.
        masked_latents: of the image with its hole grey.
    """

    image_latents: Latents
    mask: Float[Array, "B h w 1"]
    masked_latents: Latents


def posteriors(vae: VAE, images: Images, holes: Holes) -> tuple[Posterior, Posterior, Bool[Array, "B h w"]]:
    """Posteriors of the images and of the images with their holes grey, and the holes on the latent grid.

    Args:
        vae: the autoencoder.
        images: H and W multiples of the VAE's factor.
        holes: True where to repaint.
    """
    factor = vae.config.factor
    scaled = images.astype(jnp.float32) / 127.5 - 1
    visible = scaled * (1 - holes[..., None].astype(jnp.float32))
    return vae.posterior(scaled), vae.posterior(visible), holes[:, ::factor, ::factor]


@jax.jit
def encode(vae: VAE, images: Images, holes: Holes, image_noise: Latents, masked_noise: Latents) -> Conditions:
    """Both latents as samples of their posteriors, from these standard-normal draws (docs/inference.md)."""
    image, masked, hole = posteriors(vae, images, holes)
    return Conditions(
        image_latents=vae.scaled(image.sample(image_noise)),
        mask=hole[..., None].astype(jnp.float32),
        masked_latents=vae.scaled(masked.sample(masked_noise)),
    )


@jax.jit
def encode_moments(
    vae: VAE, images: Images, holes: Holes
) -> tuple[Float[Array, "B h w 2c"], Float[Array, "B h w 2c"], Bool[Array, "B h w"]]:
    """Scaled mean and standard deviation of both posteriors, and the holes on the latent grid."""
    *both, hole = posteriors(vae, images, holes)
    moments = (vae.scaled(jnp.concatenate([p.mean, p.std], axis=-1)) for p in both)
    return *moments, hole


@functools.partial(jax.jit, static_argnames="truncate")
def decode(vae: VAE, latents: Latents, *, truncate: bool = False) -> tuple[Images, Bool[Array, " B"]]:
    """8-bit images of latents, and whether each item's numbers are all finite.

    Args:
        vae: the autoencoder.
        latents: scaled.
        truncate: cut the fraction off a grey level, as the release does, instead of rounding.
    """
    images = vae.decode(latents)
    finite = jnp.isfinite(latents).all((1, 2, 3)) & jnp.isfinite(images).all((1, 2, 3))
    levels = jnp.clip(images / 2 + 0.5, 0, 1) * 255
    return (levels if truncate else jnp.round(levels)).astype(jnp.uint8), finite
