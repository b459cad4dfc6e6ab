"""The two feed-forward layers: GEGLU (teacher) and Mix-FFN (student)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moebius_jax.models.config import UNetConfig
from moebius_jax.models.convolutions import DepthwiseConv
from moebius_jax.models.linear import linear, pointwise_conv
from moebius_jax.models.precision import Precision

Map = Float[Array, "B H W C"]


class GEGLU(nnx.Module):
    """Linear C→8C, split [x | gate], x·gelu(gate) with the exact (erf) GELU, Linear 4C→C."""

    def __init__(self, channels: int, *, precision: Precision, rngs: nnx.Rngs) -> None:
        common = {"precision": precision, "rngs": rngs}
        self.proj_in = linear(channels, 8 * channels, **common)
        self.proj_out = linear(4 * channels, channels, **common)

    def __call__(self, x: Map) -> Map:
        x, gate = jnp.split(self.proj_in(x), 2, axis=-1)
        return self.proj_out(x * jax.nn.gelu(gate, approximate=False))


class MixFFN(nnx.Module):
    """1x1 C→2·hid, SiLU, depthwise 3x3, split [x | gate], x·SiLU(gate), 1x1 hid→C (spec "Mix-FFN")."""

    def __init__(self, channels: int, config: UNetConfig, *, precision: Precision, rngs: nnx.Rngs) -> None:
        hidden = int(config.ffn_ratio * channels)
        common = {"precision": precision, "rngs": rngs}
        self.inverted_conv = pointwise_conv(channels, 2 * hidden, use_bias=True, **common)
        self.depth_conv = DepthwiseConv(
            2 * hidden, use_bias=True, dtype=precision.dtype, param_dtype=precision.param_dtype, rngs=rngs
        )
        self.dtype = precision.dtype
        self.point_conv = pointwise_conv(hidden, channels, use_bias=False, **common)

    def __call__(self, x: Map) -> Map:
        # The widest maps of the network: what is kept of them is in the bulk's dtype.
        hidden = jax.nn.silu(self.inverted_conv(x)).astype(self.dtype)
        x, gate = jnp.split(self.depth_conv(hidden), 2, axis=-1)
        return self.point_conv(x * jax.nn.silu(gate))
