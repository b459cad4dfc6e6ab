"""The sampling core: latents in, latents out, one compiled loop. Pure functions of arrays and keys."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt32

from moebius_jax.sampling.schedulers import SolverSteps

Latents = Float[Array, "B h w 4"]
Predict = Callable[[Float[Array, "N h w 9"], Int[Array, " N"], Int[Array, "N 10"]], Float[Array, "N h w 4"]]

# What each of an image's random draws is folded from its key with.
IMAGE_POSTERIOR, MASKED_POSTERIOR, NOISE, NOISE_OFFSET = range(4)


@jax.jit
def image_keys(seeds: UInt32[Array, "B n"]) -> Key[Array, " B"]:
    """One key per image, from numbers of its own only: its place in a batch does not matter.

    Args:
        seeds: the seed, and what is folded into its key after it (image index, window number).
    """

    def key(numbers: UInt32[Array, " n"]) -> Key[Array, ""]:
        key = jax.random.key(numbers[0])
        for number in numbers[1:]:
            key = jax.random.fold_in(key, number)
        return key

    return jax.vmap(key)(seeds)


@functools.partial(jax.jit, static_argnames=("draw", "shape"))
def draw_normal(keys: Key[Array, " B"], draw: int, shape: tuple[int, ...]) -> Float[Array, "B *shape"]:
    """Standard-normal numbers for each image."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, draw), shape))(keys)


def draw_noise(
    keys: Key[Array, " B"], shape: tuple[int, int, int], noise_offset: Float[Array, ""]
) -> Latents:
    """N(0,1) + noise_offset · N(0,1) per image and channel (spec "Inference", step 6)."""
    offset = draw_normal(keys, NOISE_OFFSET, (1, 1, shape[-1]))
    return draw_normal(keys, NOISE, shape) + noise_offset * offset


def start_latents(image_latents: Latents, noise: Latents, steps: SolverSteps) -> Latents:
    """Where the loop starts: the image's latents with noise, or noise alone at strength 1."""
    return steps.start_alpha * image_latents + steps.start_sigma * noise


def guided_noise(
    predict: Predict,
    latents: Latents,
    mask: Float[Array, "B h w 1"],
    masked_latents: Latents,
    timestep: Int[Array, ""],
    guidance_scale: Float[Array, ""],
    *,
    guided: bool,
) -> Latents:
    """ε_uncond + s·(ε_cond - ε_uncond); without guidance one pass gives ε_cond.

    The two branches of an image lie next to each other in one batch of 2B, so a batch that is sharded over
    devices stays where it is.
    """
    model_input = jnp.concatenate([latents, mask, masked_latents], axis=-1)
    condition = jnp.arange(10)
    branches = jnp.stack([condition + 10, condition]) if guided else condition[None]
    n, B = len(branches), len(latents)
    repeated = jnp.broadcast_to(model_input[:, None], (B, n, *model_input.shape[1:]))
    noise = predict(
        repeated.reshape(B * n, *model_input.shape[1:]),
        jnp.full(B * n, timestep),
        jnp.tile(branches, (B, 1)),
    ).reshape(B, n, *latents.shape[1:])
    if not guided:
        return noise[:, 0]
    return noise[:, 0] + guidance_scale * (noise[:, 1] - noise[:, 0])


def solver_step(
    latents: Latents, noise: Latents, before: Latents, step: SolverSteps
) -> tuple[Latents, Latents]:
    """One step of the solver; `step` holds scalars. Returns the new latents and this step's x̂0."""
    clean = (latents - step.sigma * noise) / step.alpha
    mixed = (1 + step.lookback) * clean - step.lookback * before
    return step.keep * latents + step.move * mixed, clean


def denoise(
    predict: Predict,
    latents: Latents,
    mask: Float[Array, "B h w 1"],
    masked_latents: Latents,
    steps: SolverSteps,
    guidance_scale: Float[Array, ""],
    *,
    guided: bool = True,
) -> Latents:
    """Runs all steps as one `lax.scan`.

    Args:
        predict: noise of [noisy latents, mask, masked-image latents], timesteps and category ids.
        latents: where to start, see `start_latents`.
        mask: 1 = hole.
        masked_latents: scaled latents of the image with its hole grey.
        steps: the solver's table.
        guidance_scale: traced; a new value compiles nothing.
        guided: False leaves the unconditional pass out, for a guidance scale of exactly 1.
    """

    def body(carry: tuple[Latents, Latents], step: SolverSteps) -> tuple[tuple[Latents, Latents], None]:
        latents, before = carry
        noise = guided_noise(
            predict, latents, mask, masked_latents, step.timesteps, guidance_scale, guided=guided
        )
        return solver_step(latents, noise, before, step), None

    (latents, _), _ = lax.scan(body, (latents, jnp.zeros_like(latents)), steps.repeated())
    return latents


def unet_predict(graphdef: nnx.GraphDef, params: nnx.State) -> Predict:
    """`Predict` of a split U-Net."""
    unet = nnx.merge(graphdef, params)
    return lambda latents, timesteps, input_ids: unet(latents, timesteps, input_ids).sample


@functools.partial(jax.jit, static_argnames=("graphdef", "guided"))
def inpaint_latents(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    image_latents: Latents,
    mask: Float[Array, "B h w 1"],
    masked_latents: Latents,
    keys: Key[Array, " B"],
    steps: SolverSteps,
    guidance_scale: Float[Array, ""],
    noise_offset: Float[Array, ""],
    *,
    guided: bool,
) -> Latents:
    """The compiled core: draws each image's noise from its key and denoises the batch.

    Recompiles for another batch or map size, number of steps, network or `guided`; not for another
    guidance scale, noise offset, seed or start.

    Args:
        graphdef, params: `nnx.split(unet)`.
        image_latents, mask, masked_latents: [B, h, w, ·]; see `denoise`.
        keys: one per image, see `image_keys`.
        steps, guidance_scale, guided: see `denoise`.
        noise_offset: see `draw_noise`.
    """
    noise = draw_noise(keys, image_latents.shape[1:], noise_offset)
    return denoise(
        unet_predict(graphdef, params),
        start_latents(image_latents, noise, steps),
        mask,
        masked_latents,
        steps,
        guidance_scale,
        guided=guided,
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "guided"))
def single_step(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    latents: Latents,
    before: Latents,
    mask: Float[Array, "B h w 1"],
    masked_latents: Latents,
    step: SolverSteps,
    guidance_scale: Float[Array, ""],
    *,
    guided: bool,
) -> tuple[Latents, Latents]:
    """One step of the loop by itself, for callers that look at or change latents between steps."""
    noise = guided_noise(
        unet_predict(graphdef, params),
        latents,
        mask,
        masked_latents,
        step.timesteps,
        guidance_scale,
        guided=guided,
    )
    return solver_step(latents, noise, before, step)
