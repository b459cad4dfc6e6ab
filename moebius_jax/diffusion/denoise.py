"""The sampling core: latents in, latents out, one compiled loop. Pure functions of arrays and keys."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Key

from moebius_jax.diffusion.draws import draw_noise
from moebius_jax.diffusion.prediction import noise_of
from moebius_jax.diffusion.schedule import levels
from moebius_jax.diffusion.solvers import SolverSteps
from moebius_jax.models import UNet

Latents = Float[Array, "B h w c"]
Mask = Float[Array, "B h w 1"]
Inputs = Float[Array, "N h w d"]  # d = 2c + 1
# Noise in the network's input.
Predict = Callable[[Inputs], Float[Array, "N h w c"]]
# A network for a run: given the timesteps of its S steps and the N items' categories (0 background, 1
# foreground), what changes from step to step (a pytree with a first axis of S), and the noise in an input at
# the step whose part of that is given. What depends on neither input nor step is worked out once.
Network = Callable[
    [Int[Array, " S"], Int[Array, " N"]], tuple[Any, Callable[[Inputs, Any], Float[Array, "N h w c"]]]
]

CONDITIONAL, UNCONDITIONAL = 0, 1  # guidance: repaint as background, away from foreground


def network_input(latents: Latents, mask: Mask, masked_latents: Latents) -> Inputs:
    """[noisy latents, mask (1 = hole), masked-image latents] on the last axis, as networks were trained."""
    return jnp.concatenate([latents, mask, masked_latents], axis=-1)


def start_latents(image_latents: Latents, noise: Latents, steps: SolverSteps) -> Latents:
    """Where the loop starts: the image's latents with noise, or noise alone at strength 1."""
    return steps.start_alpha * image_latents + steps.start_sigma * noise


def branch_categories(batch: int, *, guided: bool) -> Int[Array, " N"]:
    """Categories of the network's batch.

    The two branches of an image lie next to each other in one batch of 2B, so a batch that is sharded over
    devices stays where it is.
    """
    branches = jnp.array([UNCONDITIONAL, CONDITIONAL] if guided else [CONDITIONAL])
    return jnp.broadcast_to(branches, (batch, len(branches))).reshape(-1)


def guided_noise(
    predict: Predict,
    latents: Latents,
    mask: Mask,
    masked_latents: Latents,
    guidance_scale: Float[Array, ""],
    *,
    guided: bool,
) -> Latents:
    """ε_uncond + s·(ε_cond - ε_uncond); without guidance one pass gives ε_cond.

    `predict` is called with a batch of `branch_categories`.
    """
    inputs = network_input(latents, mask, masked_latents)
    # Not len(): the batch of an exported program is a symbol.
    B, n = latents.shape[0], 2 if guided else 1
    repeated = jnp.broadcast_to(inputs[:, None], (B, n, *inputs.shape[1:]))
    noise = predict(repeated.reshape(B * n, *inputs.shape[1:])).reshape(B, n, *latents.shape[1:])
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
    network: Network,
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
        network: see `Network`.
        latents: where to start, see `start_latents`.
        mask: 1 = hole.
        masked_latents: scaled latents of the image with its hole grey.
        steps: the solver's table.
        guidance_scale: traced; a new value compiles nothing.
        guided: False leaves the unconditional pass out, for a guidance scale of exactly 1.
    """
    rows, predict = network(steps.timesteps, branch_categories(len(latents), guided=guided))

    def body(
        carry: tuple[Latents, Latents], turn: tuple[SolverSteps, Any]
    ) -> tuple[tuple[Latents, Latents], None]:
        (latents, before), (step, row) = carry, turn
        noise = guided_noise(
            lambda inputs: predict(inputs, row), latents, mask, masked_latents, guidance_scale, guided=guided
        )
        return solver_step(latents, noise, before, step), None

    (latents, _), _ = lax.scan(body, (latents, jnp.zeros_like(latents)), (steps.repeated(), rows))
    return latents


def denoise_once(
    network: Network,
    latents: Latents,
    before: Latents,
    mask: Mask,
    masked_latents: Latents,
    step: SolverSteps,
    guidance_scale: Float[Array, ""],
    *,
    guided: bool,
) -> tuple[Latents, Latents]:
    """One step of the loop by itself; `step` holds scalars. Returns what `solver_step` does."""
    # Not len(): the batch of an exported program is a symbol.
    categories = branch_categories(latents.shape[0], guided=guided)
    rows, predict = network(step.timesteps[None], categories)
    row = jax.tree.map(lambda leaf: leaf[0], rows)
    noise = guided_noise(
        lambda inputs: predict(inputs, row), latents, mask, masked_latents, guidance_scale, guided=guided
    )
    return solver_step(latents, noise, before, step)


def unet_network(unet: UNet) -> Network:
    """A U-Net as a `Network`, whatever it predicts."""
    config = unet.config

    def network(timesteps: Array, categories: Array) -> tuple[Any, Callable[[Inputs, Any], Array]]:
        ids = jnp.asarray(config.category_ids)[categories]
        halves = unet.conditions(timesteps, ids)

        def predict(inputs: Inputs, row: tuple[list[Array], tuple[Array, Array]]) -> Array:
            shifts, level = row
            now = [half.replace(shifts=own[None]) for half, own in zip(halves, shifts, strict=True)]
            output, noisy = unet.predict(inputs, now).sample, inputs[..., : config.out_channels]
            return noise_of(config.prediction_type, output, noisy, *level)

        return ([half.shifts for half in halves], levels(timesteps)), predict

    return network


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
    noise: Latents | None = None,
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
        noise: to start from, instead of drawn.
    """
    if noise is None:
        noise = draw_noise(keys, image_latents.shape[1:], noise_offset)
    return denoise(
        unet_network(nnx.merge(graphdef, params)),
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
    """`denoise_once` compiled, for callers that look at or change latents between steps."""
    network = unet_network(nnx.merge(graphdef, params))
    return denoise_once(network, latents, before, mask, masked_latents, step, guidance_scale, guided=guided)
