"""What the networks see of a batch in one step: latents drawn from their posteriors, noised, mask and ids."""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moebius_jax.data.samples import Batch
from moebius_jax.diffusion.denoise import network_input
from moebius_jax.diffusion.draws import Draw, draw_normal, sample_keys
from moebius_jax.diffusion.noising import Noised, noise_batch
from moebius_jax.distillation.gradients import Inputs
from moebius_jax.training.config import TrainConfig


def step_keys(seed: int, step: Int[Array, ""], index: Int[Array, " B"]) -> Key[Array, " B"]:
    """A key for each sample of a step, from its place in the global batch: sharding does not matter."""
    numbers = jnp.stack([jnp.full_like(index, x, jnp.uint32) for x in (seed, step)] + [index], axis=-1)
    return sample_keys(numbers.astype(jnp.uint32))


def loss_keys(keys: Key[Array, " B"], name: str) -> Key[Array, " B"]:
    """Keys of one loss's own."""
    own = zlib.crc32(name.encode())
    return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, Draw.LOSS), own))(keys)


def noised_inputs(config: TrainConfig, keys: Key[Array, " B"], batch: Batch) -> tuple[Noised, Inputs]:
    """Noise, timesteps and everything the networks are called with, of an encoded batch."""
    samples = batch.samples
    latents = _sampled(samples.moments, keys, Draw.IMAGE_POSTERIOR)
    masked = _sampled(samples.masked_moments, keys, Draw.MASKED_POSTERIOR)
    noised = noise_batch(
        keys,
        latents,
        noise_offset=config.noise_offset,
        sampling=config.timestep_sampling,
        prediction_type=config.student.prediction_type,
    )
    hole = samples.hole.astype(jnp.float32)[..., None]
    inputs = Inputs(
        latents=network_input(noised.noisy_latents, hole, masked),
        timesteps=noised.timesteps,
        input_ids=jnp.asarray(config.student.category_ids)[samples.task],
    )
    return noised, inputs


def _sampled(moments: Float[Array, "B h w 2c"], keys: Array, draw: Draw) -> Float[Array, "B h w c"]:
    mean, std = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean + std * draw_normal(keys, draw, mean.shape[1:])
