"""What a network costs at 512 px: parameters and multiply-adds by counting, time and memory by running."""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from benchmarks.multiply_adds import MultiplyAdds, count
from moebius_jax import checkpoints
from moebius_jax.models import UNetConfig, inference_copy

NETWORKS: dict[str, UNetConfig] = {
    "student": UNetConfig.student(),
    "teacher": UNetConfig.teacher(),
    **{f"exp{n}": UNetConfig.ablation(n) for n in (1, 2, 3, 4, 5, 6, 8)},
}
# Rows of Table 2 that share an architecture and differ in training.
TABLE_2_ROWS = {"student": "9, 10", "exp1": "1, 11", "exp2": "2, 12", "exp3": "3, 13", "exp4": "4, 14"}
TABLE_2_ROWS |= {"exp5": "5, 15", "exp6": "6, 7", "exp8": "8"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What running a network once or twice takes, in evaluation mode with folded norms.

    Attributes:
        pass_ms: one pass, batch 1, median in milliseconds.
        step_ms: a guided step, both branches in a batch of 2.
        weights_bytes, temporary_bytes: memory XLA plans for one pass.
        xla_flops: floating-point operations of one pass by XLA's own count; None where it gives none.
    """

    pass_ms: float
    step_ms: float
    weights_bytes: int
    temporary_bytes: int
    xla_flops: float | None


def multiply_adds(config: UNetConfig) -> MultiplyAdds:
    """Of one pass, batch 1, with every norm as a layer of its own and the positional lambda as a convolution.

    That is the network as published; sampling folds norms away and picks the fastest of equal forms.
    """
    network = checkpoints.abstract_network(config.replace(position_order="conv3d"))
    network.eval()
    graphdef, weights = nnx.split(network)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weights)
    return count(lambda w, *inputs: nnx.merge(graphdef, w)(*inputs).sample, shapes, *_inputs(config, 1))


def measure(config: UNetConfig, *, dtype: Dtype = jnp.float32, repeats: int = 5) -> Measured:
    """Runs a network with made-up weights on the default device.

    Args:
        config: of the network.
        dtype: compute dtype.
        repeats: timed runs after the first.
    """
    network = checkpoints.abstract_network(config, dtype=dtype)
    checkpoints.fill(network, _weights(config))
    network.eval()
    graphdef, weights = nnx.split(inference_copy(network))
    del network

    def apply(w: nnx.State, latents: Array, timesteps: Array, ids: Array) -> Array:
        return nnx.merge(graphdef, w)(latents, timesteps, ids).sample

    times, programs = [], []
    for batch in (1, 2):
        inputs = [jnp.zeros(a.shape, a.dtype) for a in _inputs(config, batch)]
        program = jax.jit(apply).lower(weights, *inputs).compile()
        program(weights, *inputs).block_until_ready()
        times.append(statistics.median(_seconds(program, weights, inputs) for _ in range(repeats)))
        programs.append(program)
    memory, costs = programs[0].memory_analysis(), programs[0].cost_analysis()
    return Measured(
        pass_ms=1e3 * times[0],
        step_ms=1e3 * times[1],
        weights_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        xla_flops=costs.get("flops") if costs else None,
    )


def _seconds(program: jax.stages.Compiled, weights: nnx.State, inputs: list[Array]) -> float:
    start = time.perf_counter()
    program(weights, *inputs).block_until_ready()
    return time.perf_counter() - start


def _inputs(
    config: UNetConfig, batch: int
) -> tuple[
    Float[jax.ShapeDtypeStruct, "B h w 9"], Int[jax.ShapeDtypeStruct, " B"], Int[jax.ShapeDtypeStruct, "B L"]
]:
    side = config.latent_size
    return (
        jax.ShapeDtypeStruct((batch, side, side, config.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((batch, config.context_length), jnp.int32),
    )


def _weights(config: UNetConfig) -> dict[str, Array]:
    """Small random numbers: zeros could make some devices' arithmetic faster than it is."""
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(".var"):
            return np.ones(shape, np.float32)
        return (rng.random(shape, np.float32) - 0.5) * np.float32(0.05)

    return {n: jnp.asarray(draw(n, a.shape)) for n, a in checkpoints.abstract_tensors(config).items()}
