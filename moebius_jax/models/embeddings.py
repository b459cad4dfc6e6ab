"""Timestep embedding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from moebius_jax.models.linear import Linear
from moebius_jax.models.precision import Precision


def sinusoidal_embedding(timesteps: Shaped[Array, " B"], width: int) -> Float[Array, "B width"]:
    """[cos | sin] of t at frequencies exp(-ln 10000 · i/(width/2)), in fp32 (docs/model.md, "Timestep")."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Sinusoid → Linear → SiLU → Linear, from C0 to 4·C0 channels."""

    def __init__(self, channels: int, *, precision: Precision, rngs: nnx.Rngs) -> None:
        options = {"thin": True, "precision": precision, "rngs": rngs}
        self.linear_1 = Linear(channels, 4 * channels, **options)
        self.linear_2 = Linear(4 * channels, 4 * channels, **options)

    def __call__(self, timesteps: Shaped[Array, " B"]) -> Float[Array, "B D"]:
        return self.linear_2(
            jax.nn.silu(self.linear_1(sinusoidal_embedding(timesteps, self.linear_1.in_features)))
        )
