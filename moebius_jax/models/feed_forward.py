"""The two feed-forward layers: GEGLU (teacher) and Mix-FFN (student)."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from moebius_jax.models.config import UNetConfig
from moebius_jax.models.convolutions import DepthwiseConv, pointwise_conv
from moebius_jax.models.initializers import linear

Map = Float[Array, "B H W C"]


class GEGLU(nnx.Module):
    """Linear C→8C, split [x | gate], x·gelu(gate) with the exact (erf) GELU, Linear 4C→C."""

    def __init__(self, channels: int, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs) -> None:
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.proj_in = linear(channels, 8 * channels, **dtypes)
        self.proj_out = linear(4 * channels, channels, **dtypes)

    def __call__(self, x: Map) -> Map:
        x, gate = jnp.split(self.proj_in(x), 2, axis=-1)
        return self.proj_out(x * jax.nn.gelu(gate, approximate=False))


class MixFFN(nnx.Module):
    """1x1 C→2·hid, SiLU, depthwise 3x3, split [x | gate], x·SiLU(gate), 1x1 hid→C (spec "Mix-FFN")."""

    def __init__(
        self, channels: int, config: UNetConfig, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs
    ) -> None:
        hidden = int(config.ffn_ratio * channels)
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.inverted_conv = pointwise_conv(channels, 2 * hidden, use_bias=True, **dtypes)
        self.depth_conv = DepthwiseConv(2 * hidden, use_bias=True, **dtypes)
        self.point_conv = pointwise_conv(hidden, channels, use_bias=False, **dtypes)

    def __call__(self, x: Map) -> Map:
        x, gate = jnp.split(self.depth_conv(jax.nn.silu(self.inverted_conv(x))), 2, axis=-1)
        return self.point_conv(x * jax.nn.silu(gate))
