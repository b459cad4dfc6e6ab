"""The sampling core: latents in, latents out, one compiled loop. Pure functions of arrays and keys."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Key

from moebius_jax.diffusion.draws import draw_noise
from moebius_jax.diffusion.solvers import SolverSteps
from moebius_jax.models import UNet

Latents = Float[Array, "B h w c"]
Mask = Float[Array, "B h w 1"]
Inputs = Float[Array, "N h w d"]  # d = 2c + 1
# Noise in the network's input at these timesteps, of these categories (0 background, 1 foreground).
Predict = Callable[[Inputs, Int[Array, " N"], Int[Array, " N"]], Float[Array, "N h w c"]]

CONDITIONAL, UNCONDITIONAL = 0, 1  # guidance: repaint as background, away from foreground


def network_input(latents: Latents, mask: Mask, masked_latents: Latents) -> Inputs:
    """[noisy latents, mask (1 = hole), masked-image latents] on the last axis, as networks were trained."""
    return jnp.concatenate([latents, mask, masked_latents], axis=-1)


def start_latents(image_latents: Latents, noise: Latents, steps: SolverSteps) -> Latents:
    """Where the loop starts: the image's latents with noise, or noise alone at strength 1."""
    return steps.start_alpha * image_latents + steps.start_sigma * noise


def guided_noise(
    predict: Predict,
    latents: Latents,
    mask: Mask,
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
    inputs = network_input(latents, mask, masked_latents)
    branches = jnp.array([UNCONDITIONAL, CONDITIONAL] if guided else [CONDITIONAL])
    n, B = len(branches), len(latents)
    repeated = jnp.broadcast_to(inputs[:, None], (B, n, *inputs.shape[1:]))
    noise = predict(
        repeated.reshape(B * n, *inputs.shape[1:]), jnp.full(B * n, timestep), jnp.tile(branches, B)
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
    mask: Mask,
    masked_latents: Latents,
    steps: SolverSteps,
    guidance_scale: Float[Array, ""],
    *,
    guided: bool = True,
) -> Latents:
    """Runs all steps as one `lax.scan`.

    Args:
        predict: the network.
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
    return network_predict(nnx.merge(graphdef, params))


def network_predict(unet: UNet) -> Predict:
    """`Predict` of a U-Net."""
    ids = jnp.asarray(unet.config.category_ids)
    return lambda inputs, timesteps, categories: unet(inputs, timesteps, ids[categories]).sample


@functools.partial(jax.jit, static_argnames=("graphdef", "guided"))
def inpaint_latents(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    image_latents: Latents,
    mask: Mask,
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
        keys: one per image, see `sample_keys`.
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
    mask: Mask,
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
