"""What a training step draws at random, and the noisy latents it makes of it."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from moebius_jax.sampling.denoise import draw_normal
from moebius_jax.sampling.schedulers import TRAIN_STEPS, alphas_cumprod

TimestepSampling = Literal["logit_normal", "uniform"]

# What each draw is folded from its sample's key with.
POSTERIOR, MASKED_POSTERIOR, TIMESTEP, NOISE, NOISE_OFFSET, PERCEPTUAL = range(6)


@struct.dataclass
class Noised:
    """One noised batch (spec "One step").

    Attributes:
        noisy_latents: z_t = √ᾱ_t z + √(1-ᾱ_t) n.
        noise: n.
        timesteps: t.
    """

    noisy_latents: Float[Array, "B H W 4"]
    noise: Float[Array, "B H W 4"]
    timesteps: Int[Array, " B"]


def sample_keys(key: Key[Array, ""], step: Int[Array, ""], index: Int[Array, " B"]) -> Key[Array, " B"]:
    """A key for each sample of a step, from its place in the global batch: sharding does not matter."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, step), i))(index)


def draw_timesteps(keys: Key[Array, " B"], sampling: TimestepSampling) -> Int[Array, " B"]:
    """t in [0, 1000): floor(1000 · sigmoid(N(0, 1))) as the released configuration, or uniform."""
    if sampling == "uniform":
        return jax.vmap(
            lambda key: jax.random.randint(jax.random.fold_in(key, TIMESTEP), (), 0, TRAIN_STEPS)
        )(keys)
    fraction = jax.nn.sigmoid(draw_normal(keys, TIMESTEP, ()))
    return jnp.minimum(jnp.floor(TRAIN_STEPS * fraction), TRAIN_STEPS - 1).astype(jnp.int32)


def add_noise(
    latents: Float[Array, "B H W 4"], noise: Float[Array, "B H W 4"], timesteps: Int[Array, " B"]
) -> Float[Array, "B H W 4"]:
    """z_t = √ᾱ_t z + √(1-ᾱ_t) n."""
    alpha, sigma = _alpha_sigma(timesteps)
    return alpha * latents + sigma * noise


def predicted_latents(
    noisy_latents: Float[Array, "B H W 4"], noise: Float[Array, "B H W 4"], timesteps: Int[Array, " B"]
) -> Float[Array, "B H W 4"]:
    """x̂0 = (z_t - √(1-ᾱ_t)·ε) / √ᾱ_t."""
    alpha, sigma = _alpha_sigma(timesteps)
    return (noisy_latents - sigma * noise) / alpha


def noise_batch(
    keys: Key[Array, " B"],
    latents: Float[Array, "B H W 4"],
    *,
    noise_offset: float,
    sampling: TimestepSampling,
) -> Noised:
    """Draws noise (with `noise_offset` times one normal number per channel) and timesteps, and adds them."""
    shape = latents.shape[1:]
    noise = draw_normal(keys, NOISE, shape) + noise_offset * draw_normal(
        keys, NOISE_OFFSET, (1, 1, shape[-1])
    )
    timesteps = draw_timesteps(keys, sampling)
    return Noised(noisy_latents=add_noise(latents, noise, timesteps), noise=noise, timesteps=timesteps)


def _alpha_sigma(timesteps: Int[Array, " B"]) -> tuple[Float[Array, "B 1 1 1"], Float[Array, "B 1 1 1"]]:
    bars = jnp.asarray(alphas_cumprod(), jnp.float32)[timesteps][:, None, None, None]
    return jnp.sqrt(bars), jnp.sqrt(1 - bars)
