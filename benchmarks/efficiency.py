"""What a network costs at 512 px: parameters and multiply-adds by counting, time and memory by running."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from benchmarks.common import median_seconds
from benchmarks.multiply_adds import MultiplyAdds, count
from moebius_jax.models import UNetConfig, inference_copy
from moebius_jax.models.table2 import TABLE_2
from moebius_jax.weights.tensors import abstract_network, abstract_tensors, fill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network of the paper, and what the paper says it costs at 512 px, batch 1.

    Attributes:
        config: of it.
        rows: of Table 2, which may differ in training only.
        parameters: in millions.
        gflops: 10⁹ multiply-adds, which the paper calls FLOPs.
        milliseconds: per step on one NVIDIA L40S (Table 1); None where not given.
    """

    config: UNetConfig
    rows: tuple[int, ...] = ()
    parameters: float
    gflops: float
    milliseconds: float | None = None


def _variant(number: int) -> Network:
    """A row of Table 2, with those of the same architecture."""
    row = TABLE_2[number]
    rows = tuple(n for n, other in TABLE_2.items() if other.switches == row.switches)
    config = UNetConfig.ablation(number)
    return Network(config=config, rows=rows, parameters=row.parameters, gflops=row.gflops)


NETWORKS = {
    "student": dataclasses.replace(_variant(9), milliseconds=26.01),
    "teacher": Network(config=UNetConfig.teacher(), parameters=862, gflops=338, milliseconds=46.89),
    **{f"exp{n}": _variant(n) for n in (1, 2, 3, 4, 5, 6, 8)},
}
STEPS = 20  # of the paper's total times


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
    """Of one pass, batch 1, of the network as published, where ours picks the fastest of equal forms.

    Every norm is a layer of its own, the positional lambda a convolution, and a map is doubled before its 3x3
    convolution.
    """
    # In fp32 and with norms as layers of their own, a TPU's form of everything else is the published one.
    network = abstract_network(config.replace(position_order="conv3d", platform="tpu"))
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
    network = fill(abstract_network(config, dtype=dtype, stream_dtype=dtype), _weights(config))
    network.eval()
    graphdef, weights = nnx.split(inference_copy(network))

    def apply(w: nnx.State, latents: Array, timesteps: Array, ids: Array) -> Array:
        return nnx.merge(graphdef, w)(latents, timesteps, ids).sample

    seconds, programs = [], []
    for batch in (1, 2):
        inputs = [jnp.zeros(a.shape, a.dtype) for a in _inputs(config, batch)]
        programs.append(jax.jit(apply).lower(weights, *inputs).compile())
        seconds.append(median_seconds(lambda: programs[-1](weights, *inputs), repeats))  # noqa: B023
    memory, costs = programs[0].memory_analysis(), programs[0].cost_analysis()
    return Measured(
        pass_ms=1e3 * seconds[0],
        step_ms=1e3 * seconds[1],
        weights_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        xla_flops=costs.get("flops") if costs else None,
    )


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

    return {n: jnp.asarray(draw(n, a.shape)) for n, a in abstract_tensors(config).items()}
