"""E-LatentLPIPS as a loss: input scaling, random transform, network, and the plain difference."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from moebius_jax.distillation.blitting import draw_transform, inverse_map, transform
from moebius_jax.models import ELatentLPIPS

SDXL_SCALE = 0.13025


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """How the metric is used.

    Attributes:
        rescale_inputs: multiply both inputs by 0.13025 first. The release does, although its latents are
            scaled already (`normalize=True`).
        augment: send both inputs through the same random transform.
    """

    rescale_inputs: bool = True
    augment: bool = True


def elatentlpips(
    metric: ELatentLPIPS,
    a: Float[Array, "B S S 4"],
    b: Float[Array, "B S S 4"],
    config: PerceptualConfig,
    keys: Key[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """The distance of each pair of latents (spec "E-LatentLPIPS").

    Args:
        metric: the network with its weights.
        a, b: scaled latents.
        config: see there.
        keys: one per pair, for the transform.

    Raises:
        ValueError: the transform is wanted and there are no keys.
    """
    if config.rescale_inputs:
        a, b = a * SDXL_SCALE, b * SDXL_SCALE
    plain = jnp.abs(a - b).mean((1, 2, 3))
    if config.augment:
        if keys is None:
            raise ValueError("the random transform needs keys")
        inverse = inverse_map(draw_transform(keys), a.shape[1])
        a, b = transform(a, inverse), transform(b, inverse)
    return metric(a, b).sum(0) + plain
