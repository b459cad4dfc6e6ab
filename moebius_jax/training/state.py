"""What a run carries from step to step, and how it begins."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Int

from moebius_jax.models import UNet, UNetConfig
from moebius_jax.models.functional import Bare, Tensors, split_tensors
from moebius_jax.models.initializers import KeyStream
from moebius_jax.training.sharding import tree_shardings


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


def fresh_state(
    config: UNetConfig, optimizer: optax.GradientTransformation, seed: int, *, has_ema: bool
) -> TrainState:
    """A state with weights drawn as the release draws them. To be jitted, or traced for its shapes."""
    unet = UNet(config, rngs=KeyStream(jax.random.key(seed)))
    return state_of(*split_tensors(unet), optimizer, has_ema=has_ema)


def state_of(
    params: Tensors, statistics: Tensors, optimizer: optax.GradientTransformation, *, has_ema: bool
) -> TrainState:
    """The state before the first step, from given weights."""
    return TrainState(
        step=jnp.int32(0),
        params=params,
        statistics=statistics,
        # Copies: a step gives its arguments' memory away, and may not be given the same twice.
        ema=jax.tree.map(jnp.copy, {**params, **statistics}) if has_ema else {},
        optimizer=optimizer.init(params),
    )


def abstract_state(
    config: UNetConfig, optimizer: optax.GradientTransformation, mesh: Mesh, *, has_ema: bool
) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    shapes = jax.eval_shape(lambda: fresh_state(config, optimizer, 0, has_ema=has_ema))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        tree_shardings(mesh, shapes),
    )


def bare_student(
    config: UNetConfig, *, dtype: str, stream_dtype: str, batch_norm_groups: int = 1
) -> Bare[UNet]:
    """The network that is trained, without arrays, in training mode.

    Args:
        config: architecture.
        dtype, stream_dtype: see `UNet`.
        batch_norm_groups: parts of a batch with BatchNorm statistics of their own.
    """
    from flax import nnx

    from moebius_jax.models.norms import BatchNorm

    unet = nnx.eval_shape(
        lambda: UNet(
            config,
            dtype=jnp.dtype(dtype),
            stream_dtype=jnp.dtype(stream_dtype),
            rngs=KeyStream(jax.random.key(0)),
        )
    )
    unet.train()
    for _, module in nnx.iter_modules(unet):
        if isinstance(module, BatchNorm):
            module.groups = batch_norm_groups
    return Bare(unet)
