"""Convolutions on NHWC maps: depthwise, depthwise-separable, and the plain 3x3 they stand in for."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from moebius_jax.models.config import ResidualConv
from moebius_jax.models.initializers import kaiming_uniform, torch_bias
from moebius_jax.models.norms import BatchNorm

Map = Float[Array, "B H W C"]


class DepthwiseConv(nnx.Module):
    """3x3 convolution of each channel by itself, padding 1.

    Nine shifted multiply-adds, summed in fp32: a grouped convolution of the same size took 2.5 times
    as long on CPU, and XLA fuses the sum with what surrounds it.
    """

    def __init__(
        self, channels: int, *, use_bias: bool, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs
    ) -> None:
        self.kernel = nnx.Param(kaiming_uniform(rngs.params(), (3, 3, channels), param_dtype, fan_in=9))
        self.bias = (
            nnx.Param(torch_bias(rngs.params(), (channels,), param_dtype, fan_in=9)) if use_bias else None
        )
        self.dtype = dtype

    def __call__(self, x: Map) -> Map:
        _, H, W, _ = x.shape
        kernel = self.kernel[...].astype(self.dtype).astype(jnp.float32)
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
        y = sum(
            padded[:, i : i + H, j : j + W].astype(jnp.float32) * kernel[i, j]
            for i in range(3)
            for j in range(3)
        )
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(self.dtype)


class DepthwiseSeparableConv(nnx.Module):
    """depthwise 3x3 → BatchNorm → ReLU → pointwise 1x1 → BatchNorm, + x where widths agree.

    Spec "Depthwise-separable conv"; after `fold_batch_norm` the two norms are None and live on as
    weights and biases of the convolutions before them.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs
    ) -> None:
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.depthwise = DepthwiseConv(in_channels, use_bias=False, rngs=rngs, **dtypes)
        self.norm1 = BatchNorm(in_channels, **dtypes)
        self.pointwise = pointwise_conv(in_channels, out_channels, use_bias=False, rngs=rngs, **dtypes)
        self.norm2 = BatchNorm(out_channels, **dtypes)
        self.has_skip = in_channels == out_channels

    def __call__(self, x: Map) -> Map:
        y = self.depthwise(x)
        if self.norm1 is not None:
            y = self.norm1(y)
        y = self.pointwise(jax.nn.relu(y))
        if self.norm2 is not None:
            y = self.norm2(y)
        return x + y if self.has_skip else y


def pointwise_conv(
    in_channels: int, out_channels: int, *, use_bias: bool, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs
) -> nnx.Linear:
    """A 1x1 convolution: in NHWC it is a matrix product over the last axis."""
    return nnx.Linear(
        in_channels,
        out_channels,
        use_bias=use_bias,
        kernel_init=lambda key, shape, dtype: kaiming_uniform(key, shape, dtype, fan_in=in_channels),
        bias_init=lambda key, shape, dtype: torch_bias(key, shape, dtype, fan_in=in_channels),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def conv3x3(
    in_channels: int, out_channels: int, *, stride: int = 1, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs
) -> nnx.Conv:
    """3x3 convolution with bias and padding 1 on every side, also at stride 2 (unlike "SAME")."""
    fan_in = 9 * in_channels
    return nnx.Conv(
        in_channels,
        out_channels,
        (3, 3),
        strides=stride,
        padding=((1, 1), (1, 1)),
        kernel_init=lambda key, shape, dtype: kaiming_uniform(key, shape, dtype, fan_in=fan_in),
        bias_init=lambda key, shape, dtype: torch_bias(key, shape, dtype, fan_in=fan_in),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def residual_conv(
    kind: ResidualConv,
    in_channels: int,
    out_channels: int,
    *,
    dtype: Dtype,
    param_dtype: Dtype,
    rngs: nnx.Rngs,
) -> DepthwiseSeparableConv | nnx.Conv:
    """The convolution the `residual_conv` switch names."""
    build = DepthwiseSeparableConv if kind == "depthwise" else conv3x3
    return build(in_channels, out_channels, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
