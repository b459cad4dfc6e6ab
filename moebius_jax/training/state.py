"""What a run carries from step to step, and how it begins."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh
from jaxtyping import Array, Int

from moebius_jax.models import UNet
from moebius_jax.models.initializers import KeyStream
from moebius_jax.models.norms import BatchNorm
from moebius_jax.sharding import tree_shardings
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.networks import load_initial_tensors
from moebius_jax.training.pieces import read_whole
from moebius_jax.weights.tensors import (
    Bare,
    Tensors,
    abstract_network,
    abstract_tensors,
    split_tensors,
    statistics_of,
)


@struct.dataclass
class TrainState:
    """Everything a step changes. All dictionaries are by dotted tensor name.

    Attributes:
        step: steps done.
        params: trained, fp32.
        statistics: BatchNorm's running ones.
        ema: moving averages of both; empty where none are kept.
        optimizer: its state.
    """

    step: Int[Array, ""]
    params: Tensors
    statistics: Tensors
    ema: Tensors
    optimizer: Any

    @property
    def result(self) -> Tensors:
        """The tensors to use: the averages, or the trained ones where there are none."""
        return self.ema or {**self.params, **self.statistics}


def bare_student(config: TrainConfig, mesh: Mesh) -> Bare[UNet]:
    """The network that is trained, without arrays, in training mode."""
    dtypes = {name: jnp.dtype(getattr(config, name)) for name in ("dtype", "stream_dtype")}
    unet = abstract_network(config.student, **dtypes)
    unet.train()
    is_split = config.batch_norm == "device" and config.loss.balance_over == "global"  # else it is by itself
    for _, module in nnx.iter_modules(unet):
        if isinstance(module, BatchNorm):
            module.groups = mesh.size if is_split else 1
    if config.fsdp > 1 and config.loss.balance_over == "global":  # else every device is handed whole weights
        read_whole(unet)
    return Bare(unet)


def abstract_state(config: TrainConfig, mesh: Mesh, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    statistics = statistics_of(config.student)
    parts = ({}, {})
    for name, shape in abstract_tensors(config.student).items():
        parts[name in statistics][name] = shape
    shapes = jax.eval_shape(lambda *parts: _first(config, optimizer, *parts), *parts)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        tree_shardings(mesh, shapes),
    )


def initial_state(config: TrainConfig, mesh: Mesh, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, born on its devices: from `init`, else drawn as the release draws it.

    Raises:
        UserError: `init` cannot be read, or is of another architecture.
    """
    places = tree_shardings(mesh, abstract_state(config, mesh, optimizer))
    if not config.init:
        return jax.jit(lambda: _drawn(config, optimizer), out_shardings=places)()
    begin = jax.jit(
        lambda params, statistics: _first(config, optimizer, params, statistics), out_shardings=places
    )
    return begin(*load_initial_tensors(config, mesh))


def _drawn(config: TrainConfig, optimizer: optax.GradientTransformation) -> TrainState:
    unet = UNet(config.student, rngs=KeyStream(jax.random.key(config.seed)))
    return _first(config, optimizer, *split_tensors(unet))


def _first(
    config: TrainConfig, optimizer: optax.GradientTransformation, params: Tensors, statistics: Tensors
) -> TrainState:
    return TrainState(
        step=jnp.int32(0),
        params=params,
        statistics=statistics,
        # Copies: a step gives its arguments' memory away, and may not be given the same twice.
        ema=jax.tree.map(jnp.copy, {**params, **statistics}) if config.ema_decay else {},
        optimizer=optimizer.init(params),
    )
