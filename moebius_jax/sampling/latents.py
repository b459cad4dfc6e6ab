"""Pixels to latents and back, compiled."""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, UInt8

from moebius_jax.models.vae import VAE

Images = UInt8[Array, "B H W 3"]
Latents = Float[Array, "B h w 4"]


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


@jax.jit
def encode(
    vae: VAE, images: Images, holes: Bool[Array, "B H W"], image_noise: Latents, masked_noise: Latents
) -> Conditions:
    """Steps 4 and 5 of the spec's inference: both latents are samples of the posterior.

    Args:
        vae: the autoencoder.
        images: H and W multiples of the VAE's factor.
        holes: True where to repaint.
        image_noise, masked_noise: standard-normal draws for the two posteriors.
    """
    factor = vae.config.factor
    scaled = images.astype(jnp.float32) / 127.5 - 1
    hole = holes[..., None].astype(jnp.float32)
    return Conditions(
        image_latents=vae.encode(scaled, image_noise),
        mask=hole[:, ::factor, ::factor],
        masked_latents=vae.encode(scaled * (1 - hole), masked_noise),
    )


@functools.partial(jax.jit, static_argnames="truncate")
def decode(vae: VAE, latents: Latents, *, truncate: bool) -> tuple[Images, Bool[Array, " B"]]:
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
