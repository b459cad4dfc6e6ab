"""Convolutions on NHWC maps: depthwise, depthwise-separable, and the plain 3x3 they stand in for."""

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float

from moebius_jax.models import forms, winograd
from moebius_jax.models.initializers import kaiming_uniform
from moebius_jax.models.kernels.gpu.depthwise import depthwise_sums
from moebius_jax.models.kernels.tpu import depthwise
from moebius_jax.models.kernels.wrapped import split_over_batch, with_gradient
from moebius_jax.models.linear import PointwiseConv, Product, summed
from moebius_jax.models.norms import BatchNorm
from moebius_jax.models.precision import Precision
from moebius_jax.models.released import CONV, DEPTHWISE, Released, Shapes, Table

Map = Float[Array, "B H W C"]


class DepthwiseConv(nnx.Module):
    """3x3 convolution of each channel by itself, padding 1.

    Nine shifted multiply-adds in fp32: a grouped convolution of the same size took 2.5 times as long on
    CPU, and XLA fuses the sum with what surrounds it. The result is in the dtype of the products around it.
    """

    RELEASED: ClassVar[Table] = {"kernel": Released("weight", DEPTHWISE)}

    def __init__(self, channels: int, *, use_bias: bool, precision: Precision, rngs: nnx.Rngs) -> None:
        def drawn(*shape: int) -> nnx.Param:
            return nnx.Param(kaiming_uniform(rngs.params(), shape, precision.param_dtype, fan_in=9))

        self.kernel = drawn(3, 3, channels)
        self.bias = drawn(channels) if use_bias else None
        self.dtype, _ = precision.operands()
        self.platform = precision.platform

    def __call__(self, x: Map) -> Map:
        kernel = self.kernel[...].astype(jnp.float32)
        if forms.depthwise_kernel(x.shape, x.dtype, self.dtype, self.platform):
            return self._on_tpu(x, kernel)
        form = forms.depthwise_gradient(self.dtype, self.platform)
        if form == "autodiff":
            y = _taps(x, kernel)
        elif form == "convolution":
            y = _convolved(x, kernel, _convolved_gradient)
        elif form == "scan":
            y = _convolved(x, kernel, functools.partial(_summed_gradient, sums=_sums_by_item))
        else:
            sums = functools.partial(depthwise_sums, interpret=forms.kernels_interpreted(self.platform))
            y = _convolved(x, kernel, functools.partial(_summed_gradient, sums=sums))
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(self.dtype)

    def _on_tpu(self, x: Map, kernel: Array) -> Map:
        bias = jnp.zeros(x.shape[-1]) if self.bias is None else self.bias[...].astype(jnp.float32)
        interpret = forms.kernels_interpreted(self.platform)
        run = functools.partial(depthwise.depthwise, dtype=self.dtype, interpret=interpret)
        back = functools.partial(depthwise.depthwise_gradient, interpret=interpret)

        def gradient(x: Map, kernel: Array, bias: Array, cotangent: Map) -> tuple[Array, ...]:
            del bias
            x_gradient, sums = split_over_batch(back, batched=(True, True, False))(x, cotangent, kernel)
            *taps, ones = sums.sum(0)[:10]
            return x_gradient, jnp.stack(taps).reshape(3, 3, -1), ones

        return with_gradient(split_over_batch(run, batched=(True, False, False)), gradient)(x, kernel, bias)


Kernel = Float[Array, "3 3 C"]


def _taps(x: Map, kernel: Kernel) -> Map:
    """The convolution, in fp32."""
    _, H, W, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        padded[:, i : i + H, j : j + W].astype(jnp.float32) * kernel[i, j] for i in range(3) for j in range(3)
    )


def _convolved_gradient(x: Map, cotangent: Map) -> Kernel:
    """Gradient of the kernel: for each channel a convolution of the map with the cotangent as its window."""
    return lax.conv_general_dilated(
        x,
        cotangent,
        window_strides=(1, 1),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        batch_group_count=x.shape[-1],
        preferred_element_type=jnp.float32,
    )[:, :, 0]


def _summed_gradient(x: Map, cotangent: Map, *, sums: Callable[[Map, Map], Array]) -> Kernel:
    """The same from `sums` [B, …, 9, C] of parts of the batch, each device's its own."""
    parts = split_over_batch(sums, batched=(True, True))(x, cotangent)
    return parts.reshape(-1, 9, parts.shape[-1]).sum(0).reshape(3, 3, -1)


def _sums_by_item(x: Map, cotangent: Map) -> Float[Array, "B 9 C"]:
    """One item after the other: a map stays in the cache."""
    _, H, W, _ = x.shape

    def sums(item: tuple[Array, Array]) -> Float[Array, "9 C"]:
        padded, g = (a.astype(jnp.float32) for a in item)
        return jnp.stack([(padded[i : i + H, j : j + W] * g).sum((0, 1)) for i in range(3) for j in range(3)])

    return lax.map(sums, (jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), cotangent))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolved(x: Map, kernel: Kernel, kernel_gradient: Callable[[Map, Map], Kernel]) -> Map:
    """`_taps`, with another form of its kernel's gradient than differentiation makes."""
    del kernel_gradient
    return _taps(x, kernel)


def _convolved_fwd(
    x: Map, kernel: Kernel, kernel_gradient: Callable[[Map, Map], Kernel]
) -> tuple[Map, tuple[Map, Kernel]]:
    return _convolved(x, kernel, kernel_gradient), (x, kernel)


def _convolved_bwd(
    kernel_gradient: Callable[[Map, Map], Kernel], saved: tuple[Map, Kernel], cotangent: Map
) -> tuple[Map, Kernel]:
    x, kernel = saved
    cotangent = cotangent.astype(x.dtype)
    return _taps(cotangent, kernel[::-1, ::-1]).astype(x.dtype), kernel_gradient(x, cotangent)


_convolved.defvjp(_convolved_fwd, _convolved_bwd)


class DepthwiseSeparableConv(nnx.Module):
    """depthwise 3x3 → BatchNorm → ReLU → pointwise 1x1 → BatchNorm, + x where widths agree.

    See docs/model.md, "One U-Net, four switches". After `fold_batch_norm` the two norms are None and live on
    as weights and biases of the convolutions before them.
    """

    RELEASED: ClassVar[Table] = {
        "depthwise": "conv_dw",
        "norm1": "bn1",
        "pointwise": "conv_pw",
        "norm2": "bn2",
    }
    FOLDS: ClassVar[dict[str, str]] = {"norm1": "depthwise", "norm2": "pointwise"}
    LANDMARK: ClassVar[str] = "conv_dw.weight"
    LAST_WEIGHT: ClassVar[str] = "pointwise.kernel"

    def __init__(self, in_channels: int, out_channels: int, *, precision: Precision, rngs: nnx.Rngs) -> None:
        self.depthwise = DepthwiseConv(in_channels, use_bias=False, precision=precision, rngs=rngs)
        self.norm1 = BatchNorm(in_channels, precision=precision)
        self.pointwise = PointwiseConv(
            in_channels, out_channels, use_bias=False, precision=precision, rngs=rngs
        )
        self.norm2 = BatchNorm(out_channels, precision=precision)
        self.has_skip = in_channels == out_channels

    def __call__(self, x: Map, *, add: Sequence[Array | Product] = ()) -> Map:
        """The convolution, and what is added to it: maps, rows [B or 1, 1, 1, C], `Product`s."""
        if self.has_skip:
            add = (x, *add)
        y = self.depthwise(x)
        if self.norm1 is not None:
            y = self.norm1(y)
        y = jax.nn.relu(y)
        if self.norm2 is None:
            return self.pointwise(y, add=add)
        return summed(self.norm2(self.pointwise(y)), add)

    @staticmethod
    def read_widths(shapes: Shapes) -> tuple[int, int]:
        """(in, out) channels off released shapes, by name below this module's."""
        return shapes["conv_dw.weight"][0], shapes["conv_pw.weight"][0]


Padding = tuple[tuple[int, int], tuple[int, int]]  # before and after, of rows and of columns


class Conv3x3(nnx.Conv):
    """3x3 convolution with bias, unless told otherwise with padding 1 on every side, also at stride 2."""

    RELEASED: ClassVar[Table] = {"kernel": Released("weight", CONV)}
    LANDMARK: ClassVar[str] = "weight"
    LAST_WEIGHT: ClassVar[str] = "kernel"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        padding: Padding = ((1, 1), (1, 1)),
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        init = functools.partial(_init, fan_in=9 * in_channels)
        dtype, multiply = precision.operands()
        if not isinstance(multiply, lax.Precision):
            multiply = None  # convolutions take no algorithm; a GPU's default is the one meant
        super().__init__(
            in_channels,
            out_channels,
            (3, 3),
            strides=stride,
            padding=padding,
            kernel_init=init,
            bias_init=init,
            dtype=dtype,
            param_dtype=precision.param_dtype,
            precision=multiply,
            rngs=rngs,
        )
        self.stream_dtype = precision.stream_dtype
        self.platform = precision.platform
        self.is_frozen = False

    def freeze(self) -> None:
        """For inference: parameters in the dtype they are multiplied in."""
        self.is_frozen = True
        if self.kernel is not None:  # an `Upsample` has taken it
            self.kernel = nnx.Param(self.kernel[...].astype(self.dtype))
        self.bias = nnx.Param(self.bias[...].astype(self.dtype))

    def __call__(self, x: Map, *, add: Sequence[Array | Product] = ()) -> Map:
        """The convolution, and what is added to it: maps, rows [B or 1, 1, 1, C], `Product`s."""
        # Not preferred_element_type: jax cannot differentiate a convolution whose result has another dtype.
        return summed(self._convolved(x).astype(self.stream_dtype), add)

    def _convolved(self, x: Map) -> Map:
        kernel, is_fit = self.kernel[...], self.is_frozen and self.strides == 1
        if is_fit and forms.fewer_multiplications(x.shape, kernel.shape, self.dtype, self.platform):
            return winograd.convolved(x.astype(self.dtype), kernel, self.padding) + self.bias[...]
        return super().__call__(x)

    @staticmethod
    def read_widths(shapes: Shapes) -> tuple[int, int]:
        """(in, out) channels off released shapes, by name below this module's."""
        out, in_channels, *_ = shapes["weight"]
        return in_channels, out


def _init(key: Array, shape: tuple[int, ...], dtype: Dtype, *, fan_in: int) -> Array:
    return kaiming_uniform(key, shape, dtype, fan_in=fan_in)
