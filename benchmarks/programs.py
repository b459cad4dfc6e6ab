"""The program that sampling's benchmarks run or compile: the denoising loop of the full-size student."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from moebius_jax import UNet, UNetConfig
from moebius_jax.diffusion.solvers import solver_steps
from moebius_jax.models import inference_copy
from moebius_jax.models.initializers import KeyStream
from moebius_jax.models.parts import PositionOrder


def core(
    dtype: str, stream_dtype: str | None, platform: str | None, position_order: PositionOrder = "auto"
) -> tuple[Any, Any]:
    """Graph and shapes of the weights of the folded full-size student."""
    config = UNetConfig.student(position_order=position_order, platform=platform)
    dtypes = {"dtype": jnp.dtype(dtype), "stream_dtype": jnp.dtype(stream_dtype or dtype)}
    return nnx.split(
        nnx.eval_shape(lambda: inference_copy(UNet(config, rngs=KeyStream(jax.random.key(0)), **dtypes)))
    )


def core_inputs(batch: int, steps: int) -> tuple[Any, ...]:
    """What the loop takes after its weights; the first four have an axis of images."""
    key = jax.random.key(0)
    latents, mask = jax.random.normal(key, (batch, 64, 64, 4)), jnp.ones((batch, 64, 64, 1))
    table = solver_steps("ddim", steps, 1.0)
    return latents, mask, latents, jax.random.split(key, batch), table, jnp.float32(2.5), jnp.float32(0.0357)


def placed(tree: Any, place: NamedSharding) -> Any:
    """The shapes of a tree, with this sharding."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)
