"""One training step as a pure function of state, frozen networks and batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moebius_jax.distillation.gradients import (
    Balanced,
    Inputs,
    balanced_gradients,
    mean_square,
    teacher_coarse_index,
)
from moebius_jax.distillation.noising import (
    MASKED_POSTERIOR,
    PERCEPTUAL,
    POSTERIOR,
    Noised,
    noise_batch,
    predicted_latents,
    sample_keys,
)
from moebius_jax.distillation.perceptual import elatentlpips
from moebius_jax.models import ELatentLPIPS, UNet
from moebius_jax.models.functional import Bare, Tensors
from moebius_jax.sampling.denoise import draw_normal
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.optimizer import ema_update, learning_rate_schedule
from moebius_jax.training.sharding import replicated, tree_shardings
from moebius_jax.training.state import TrainState

Metrics = dict[str, Float[Array, ""]]

# The release's names, so that curves compare.
LOSS_NAMES = {
    "task": "loss_task",
    "fine": "loss_outkd",
    "coarse": "loss_featkd",
    "perceptual": "loss_elatentlpips",
    "total": "loss",
}


@struct.dataclass
class LatentBatch:
    """A batch as the step takes it.

    Attributes:
        moments: mean and standard deviation of the image's posterior, scaled.
        masked_moments: those of the image with its hole grey.
        hole: on the latent grid.
        task: 0 background (category ids 0..9), 1 foreground (10..19).
        index: each sample's place in the global batch.
    """

    moments: Float[Array, "B h w 8"]
    masked_moments: Float[Array, "B h w 8"]
    hole: Array
    task: Int[Array, " B"]
    index: Int[Array, " B"]


@struct.dataclass
class Frozen:
    """Tensors of the networks that are not trained, by dotted name; empty where a loss is absent.

    They are arguments of the step: as constants they would be folded for minutes.
    """

    teacher: Tensors
    metric: Tensors


Step = Callable[[TrainState, Frozen, LatentBatch], tuple[TrainState, Metrics]]


def build_step(
    config: TrainConfig,
    *,
    student: Bare[UNet],
    teacher: Bare[UNet] | None,
    metric: Bare[ELatentLPIPS] | None,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Step:
    """The step of a configuration, to be jitted with its state donated."""
    schedule = learning_rate_schedule(config.optimizer, config.steps)

    def part_gradients(
        params: Tensors, statistics: Tensors, frozen: Frozen, batch: LatentBatch, step: Int[Array, ""]
    ) -> tuple[Tensors, Tensors, Balanced]:
        keys = sample_keys(jax.random.key(config.seed), step, batch.index)
        noised, inputs = _inputs(config, keys, batch)
        output_losses = {"task": lambda noise: mean_square(noise, noised.noise)}
        coarse_target = None
        if teacher is not None:
            seen = teacher(frozen.teacher)(inputs.latents, inputs.timesteps, inputs.input_ids)
            coarse_target = seen.features[teacher_coarse_index(teacher.config)]
            output_losses["fine"] = lambda noise: mean_square(noise, seen.sample)
        if metric is not None:
            output_losses["perceptual"] = _perceptual(config, metric(frozen.metric), noised, keys)
        return balanced_gradients(
            student,
            params,
            statistics,
            inputs,
            config.loss,
            output_losses=output_losses,
            coarse_target=coarse_target,
        )

    def step(state: TrainState, frozen: Frozen, batch: LatentBatch) -> tuple[TrainState, Metrics]:
        # Whole weights for the products and cut ones for keeping: the compiler gathers each when it is
        # needed, and adds the devices' gradients up straight into pieces.
        params = lax.with_sharding_constraint(state.params, replicated(mesh))
        frozen = lax.with_sharding_constraint(frozen, replicated(mesh))
        if config.accumulation == 1:
            gradients, statistics, balanced = part_gradients(
                params, state.statistics, frozen, batch, state.step
            )
            metrics = _metrics(balanced)
        else:
            parts = jax.tree.map(lambda x: _parts(x, config.accumulation), batch)

            def body(carry: tuple[Tensors, Tensors], part: LatentBatch):
                total, statistics = carry
                gradients, statistics, balanced = part_gradients(params, statistics, frozen, part, state.step)
                return (jax.tree.map(jnp.add, total, gradients), statistics), _metrics(balanced)

            zeros = jax.tree.map(jnp.zeros_like, params)
            (total, statistics), each = lax.scan(body, (zeros, state.statistics), parts)
            gradients = jax.tree.map(lambda g: g / config.accumulation, total)
            metrics = jax.tree.map(jnp.mean, each)
        gradients = lax.with_sharding_constraint(gradients, tree_shardings(mesh, gradients))
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        new_params = optax.apply_updates(state.params, updates)
        count = state.step + 1
        ema = state.ema
        if config.ema_decay:
            ema = ema_update(ema, {**new_params, **statistics}, count, config.ema_decay)
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "learning_rate": schedule(state.step)}
        new_state = TrainState(
            step=count, params=new_params, statistics=statistics, ema=ema, optimizer=optimizer_state
        )
        return new_state, metrics

    return step


def first_bad_term(metrics: Metrics) -> str | None:
    """Name of the first loss that is not finite, the total last; or of the gradient norm.

    Of metrics on the host: asking the devices would wait for the step they have begun since.
    """
    for name in (*LOSS_NAMES.values(), "gradient_norm"):
        if name in metrics and not np.isfinite(metrics[name]):
            return name
    return None


def _inputs(config: TrainConfig, keys: Array, batch: LatentBatch) -> tuple[Noised, Inputs]:
    latents = _sample(batch.moments, keys, POSTERIOR)
    masked = _sample(batch.masked_moments, keys, MASKED_POSTERIOR)
    noised = noise_batch(keys, latents, noise_offset=config.noise_offset, sampling=config.timestep_sampling)
    hole = batch.hole.astype(jnp.float32)[..., None]
    ids = jnp.arange(config.student.context_length) + config.student.context_length * batch.task[:, None]
    inputs = Inputs(
        latents=jnp.concatenate([noised.noisy_latents, hole, masked], axis=-1),
        timesteps=noised.timesteps,
        input_ids=ids,
    )
    return noised, inputs


def _sample(moments: Float[Array, "B h w 8"], keys: Array, what: int) -> Float[Array, "B h w 4"]:
    mean, std = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean + std * draw_normal(keys, what, mean.shape[1:])


def _perceptual(config: TrainConfig, metric: ELatentLPIPS, noised: Noised, keys: Array):
    """E-LatentLPIPS between the clean latents the student predicts and those its target amounts to."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, PERCEPTUAL))(keys)
    clean = predicted_latents(noised.noisy_latents, noised.noise, noised.timesteps)

    def loss(noise: Float[Array, "B h w 4"]) -> Float[Array, ""]:
        predicted = predicted_latents(noised.noisy_latents, noise, noised.timesteps)
        return elatentlpips(metric, predicted, clean, config.perceptual, keys).mean()

    return loss


def _metrics(balanced: Balanced) -> Metrics:
    metrics = {LOSS_NAMES[term]: value for term, value in balanced.losses.items()}
    short = {term: name.removeprefix("loss_") for term, name in LOSS_NAMES.items()}
    for term, value in balanced.weights.items():
        metrics[f"weight_{short.get(term, term)}"] = value
    for name, value in balanced.norms.items():
        where, term = name.split("/")
        metrics[f"grad_norm_{where}_{short.get(term, term)}"] = value
    return metrics


def _parts(x: Array, count: int) -> Array:
    """[B, …] → [count, B/count, …], every device keeping its own samples."""
    return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)
