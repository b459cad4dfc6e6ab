"""The optimiser of a run: Muon or AdamW, schedule, clipping; and the moving average of the weights."""

from collections.abc import Mapping
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int
from pydantic import Field

from moebius_jax.models import UNetConfig
from moebius_jax.schema import Above0, AtLeast0, AtLeastZero, Below1, Share, checked
from moebius_jax.sharding import batch_sharding
from moebius_jax.training.adam import scale_by_uncorrected_adam
from moebius_jax.training.muon import orthogonalize
from moebius_jax.weights.names import Counterpart, counterparts
from moebius_jax.weights.tensors import Tensors

OptimizerName = Literal["muon", "adamw"]
Schedule = Literal["step", "cosine", "constant"]


@checked
class OptimizerConfig:
    """The optimiser (docs/distillation.md, "Optimiser"); the defaults are the paper's.

    Attributes:
        name: "muon" (with AdamW for what is no hidden matrix) or "adamw" for everything.
        learning_rate: peak.
        schedule: "step" multiplies by `decay_factor` at each of `decay_at`; "cosine" goes to zero at the
            end of the run; "constant".
        warmup_steps: linear from zero.
        decay_at: fractions of the run (the paper's 111k and 129k of 138k steps).
        decay_factor: of "step".
        weight_decay: decoupled, for every parameter.
        momentum: Muon's, Nesterov.
        b1, b2, eps: AdamW's; beside Muon eps is added as the release does (`scale_by_uncorrected_adam`).
        clip_norm: gradients are scaled down to this global norm; None does not.
        newton_schulz_dtype: of Muon's iteration.

    Raises:
        ValueError: a field is out of range.
    """

    name: OptimizerName = "muon"
    learning_rate: Annotated[float, Field(gt=0, le=1000)] = 2e-4
    schedule: Schedule = "step"
    warmup_steps: AtLeastZero = 0
    decay_at: tuple[Share, ...] = (111 / 138, 129 / 138)
    decay_factor: Share = 0.1
    weight_decay: AtLeast0 = 0.1
    momentum: Below1 = 0.95
    b1: Below1 = 0.9
    b2: Below1 = 0.95
    eps: Above0 = 1e-8
    clip_norm: Above0 | None = 1.0
    newton_schulz_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        if list(self.decay_at) != sorted(set(self.decay_at)):
            raise ValueError(f"decay_at is {self.decay_at}; expected rising fractions of the run")


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by step, counted from 0."""
    peak = config.learning_rate
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, total_steps - config.warmup_steps))
    else:
        drops = {round(f * total_steps) - config.warmup_steps: config.decay_factor for f in config.decay_at}
        after = optax.piecewise_constant_schedule(peak, drops)
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def build_optimizer(
    config: OptimizerConfig,
    total_steps: int,
    table: Mapping[str, Counterpart],
    spread: NamedSharding | None = None,
) -> optax.GradientTransformation:
    """The transformation of gradients (a dictionary by parameter name) into updates.

    Args:
        config: see there.
        total_steps: of the run, for the schedule.
        table: how the release keeps each parameter: whether Muon takes it, and how it lies.
        spread: how Muon's iteration is shared between devices, see `orthogonalize`.
    """

    def labels(params: Mapping[str, Array]) -> dict[str, str]:
        return {name: "muon" if table[name].muon else "adam" for name in params}

    numbers = (config.b1, config.b2, config.eps)
    muon = optax.chain(
        optax.trace(config.momentum, nesterov=True),
        orthogonalize(
            {name: kept.layout for name, kept in table.items()},
            jnp.dtype(config.newton_schulz_dtype),
            spread,
        ),
    )
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts += [
        optax.partition({"muon": muon, "adam": scale_by_uncorrected_adam(*numbers)}, labels)
        if config.name == "muon"
        else optax.scale_by_adam(*numbers),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
    ]
    return optax.chain(*parts)


def run_optimizer(
    config: OptimizerConfig, student: UNetConfig, total_steps: int, mesh: Mesh
) -> optax.GradientTransformation:
    """`build_optimizer` for a student, Muon's work shared by all devices of a mesh."""
    spread = batch_sharding(mesh) if mesh.size > 1 else None
    return build_optimizer(config, total_steps, counterparts(student), spread)


def ema_decay(updates: Int[Array, ""], limit: float) -> Float[Array, ""]:
    """min(limit, (1 + n) / (10 + n)) for the n-th update, counted from 1."""
    n = updates.astype(jnp.float32)
    return jnp.minimum(limit, (1 + n) / (10 + n))


def ema_update(
    average: Mapping[str, Array], tensors: Mapping[str, Array], updates: Int[Array, ""], limit: float
) -> Tensors:
    """The moving average after its n-th update. BatchNorm statistics are averaged like the weights they
    belong to."""
    decay = ema_decay(updates, limit)
    return jax.tree.map(lambda a, t: decay * a + (1 - decay) * t, dict(average), dict(tensors))
