"""Local-λ, the student's self mixer: lambda functions of the whole map and of a 15x15 window."""

import functools
import types
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from moebius_jax.models import forms
from moebius_jax.models.initializers import kaiming_uniform
from moebius_jax.models.kernels.common import power_of_two
from moebius_jax.models.kernels.gpu import local_lambda as gpu
from moebius_jax.models.kernels.gpu.content_lambda import content_lambda
from moebius_jax.models.kernels.tpu import local_lambda as tpu
from moebius_jax.models.kernels.wrapped import split_over_batch, with_gradient, with_gradient_of
from moebius_jax.models.linear import Linear, PointwiseConv
from moebius_jax.models.mixers.position_term import packed_kernel, position_term
from moebius_jax.models.norms import BatchNorm
from moebius_jax.models.parts import BlockSizes, Part, PositionOrder
from moebius_jax.models.precision import Precision
from moebius_jax.models.released import Layout, Released, Shapes, Table

Map = Float[Array, "B H W C"]

POSITION_CONV = Layout(order=(2, 0, 1), ones=(1, 2))  # [p, p, k] ↔ [k, u=1, 1, p, p]


class PositionConv(nnx.Module):
    """Weights of the 1x15x15 position convolution: kernel [p, p, k], bias [k]."""

    RELEASED: ClassVar[Table] = {"kernel": Released("weight", POSITION_CONV)}

    def __init__(self, depth: int, window: int, *, param_dtype: Dtype, rngs: nnx.Rngs) -> None:
        fan_in = window * window
        self.kernel = nnx.Param(
            kaiming_uniform(rngs.params(), (window, window, depth), param_dtype, fan_in=fan_in)
        )
        self.bias = nnx.Param(kaiming_uniform(rngs.params(), (depth,), param_dtype, fan_in=fan_in))


class LocalLambda(Part):
    """Y[h,v,n] = Σ_k q[h,k,n] (λc[k,v] + λp[k,v,n])  (paper, Eq 1; docs/model.md, "Local-λ").

    λc = Σ_n softmax_n(key)[k,n] val[v,n] sees the whole map, λp the window around n.
    """

    RELEASED: ClassVar[Table] = {"position": "pos_conv"}
    FOLDS: ClassVar[dict[str, str]] = {"norm_q": "to_q", "norm_v": "to_v"}
    READERS: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v")
    LANDMARK: ClassVar[str] = "pos_conv.weight"

    def __init__(self, sizes: BlockSizes, *, precision: Precision, rngs: nnx.Rngs) -> None:
        channels, depth = sizes.channels, sizes.depth
        project = {"use_bias": False, "thin": True, "precision": precision, "rngs": rngs}
        self.to_q = PointwiseConv(channels, channels, **project)
        self.to_k = PointwiseConv(channels, depth, **project)
        self.to_v = PointwiseConv(channels, depth, **project)
        self.norm_q = BatchNorm(channels, precision=precision)
        self.norm_v = BatchNorm(depth, precision=precision)
        self.position = PositionConv(depth, sizes.window, param_dtype=precision.param_dtype, rngs=rngs)
        self.num_heads = sizes.num_heads
        self.order = sizes.position_order
        self.platform = precision.platform
        self.dtype = precision.dtype
        self.stream_dtype = precision.stream_dtype
        self.map_size = sizes.map_size
        self.packed_window = None  # once frozen, as an order reads it
        self.packed_for = None  # that order and, where it matters, the map's width
        self.to_all = None  # the three projections as one, once frozen

    def onto(self, stream: Map, x: Map) -> Map:
        return self(x, add=stream)

    def __call__(self, x: Map, *, add: Map | None = None) -> Map:
        """`add`: a map added to the result."""
        B, H, W, C = x.shape
        q, key, val = self.to_all(x) if self.to_all else (self.to_q(x), self.to_k(x), self.to_v(x))
        if self.norm_q is not None:
            q, val = self.norm_q(q), self.norm_v(val)
        kernel, bias = self.position.kernel[...], self.position.bias[...]
        q, val, kernel, bias = (a.astype(self.dtype) for a in (q, val, kernel, bias))
        order = self._order(H, W, val.shape[-1])
        if order == "fused":
            return self._fused(q, key, val, kernel, bias, add=add)
        q = q.reshape(B, H, W, self.num_heads, -1)
        y = self._sum(q, key, val, kernel, bias, order=order).reshape(B, H, W, C)
        return y if add is None else add + y

    def _order(self, height: int, width: int, depth: int) -> PositionOrder:
        if self.order != "auto":
            return self.order
        window = self.position.kernel.shape[0]
        return forms.position_order((height, width), self.num_heads, depth, window, self.dtype, self.platform)

    def _sum(
        self, q: Array, key: Array, val: Array, kernel: Array, bias: Array, *, order: PositionOrder
    ) -> Float[Array, "B H W h v"]:
        """Content and position term, one after the other."""
        content = jnp.einsum("byxhk,bkv->byxhv", q, jnp.einsum("byxk,byxv->bkv", self._weights(key), val))
        packed = self._packed_window(order, q.shape[2])
        return content.astype(self.stream_dtype) + position_term(q, val, kernel, bias, order, packed=packed)

    def _packed_window(self, order: PositionOrder, width: int) -> Array | None:
        """The window as this order reads it, where it is there already."""
        return self.packed_window[...] if self.packed_for == _packing(order, width) else None

    def _weights(self, key: Map) -> Map:
        """Softmax over the map."""
        flat = key.reshape(key.shape[0], -1, key.shape[-1])  # ONNX knows a softmax over one axis only
        return jax.nn.softmax(flat.astype(jnp.float32), axis=1).astype(self.dtype).reshape(key.shape)

    def _fused(self, q: Map, key: Array, val: Array, kernel: Array, bias: Array, *, add: Map | None) -> Map:
        """Both in one kernel but for λc, which is small; their gradients in others."""
        kernels = self._kernels()
        window = self._packed_window("fused", q.shape[2])
        if window is None:
            window = kernels.packed_window(kernel)
        others = () if add is None else (add,)
        return fused(
            q,
            val,
            window,
            self._content(key, val, bias),
            *others,
            kernels=kernels,
            heads=self.num_heads,
            side=len(kernel),
            dtype=self.stream_dtype,
            interpret=forms.kernels_interpreted(self.platform),
        )

    def _content(self, key: Array, val: Array, bias: Array) -> Float[Array, "B k v"]:
        """λc + b."""

        def plain(key: Array, val: Array, bias: Array) -> Array:
            content = jnp.einsum(
                "byxk,byxv->bkv", self._weights(key), val, preferred_element_type=jnp.float32
            )
            return (content + bias[:, None]).astype(self.dtype)

        if self._kernels() is tpu:
            return plain(key, val, bias)
        run = functools.partial(content_lambda, interpret=forms.kernels_interpreted(self.platform))
        run = split_over_batch(run, batched=(True, True, False))
        return with_gradient_of(plain, run)(key, val, bias)

    def _kernels(self) -> types.ModuleType:
        """Those of this platform.

        Raises:
            ValueError: it has none, or none for this number of heads.
        """
        if forms.tpu_kernels(self.platform):
            return tpu
        if power_of_two(self.num_heads) != self.num_heads:
            raise ValueError(
                f"position_order 'fused' needs a power of two of heads; num_heads is {self.num_heads}"
            )
        return gpu

    def freeze(self) -> None:
        """For inference: the window as the order reads it, one projection where norms went into it."""
        if self.to_q is not None and self.to_q.norm_eps is not None:
            for layer in (self.to_q, self.to_k, self.to_v):
                layer.freeze()
            self.to_all = nnx.data(Linear.join([self.to_q, self.to_k, self.to_v]))
            self.to_q = self.to_k = self.to_v = None
        self.position.bias = nnx.Param(self.position.bias[...].astype(self.dtype))
        kernel = self.position.kernel[...].astype(self.dtype)
        order = self._order(self.map_size, self.map_size, kernel.shape[-1])
        if order == "conv3d":
            return
        packed = (
            self._kernels().packed_window(kernel)
            if order == "fused"
            else packed_kernel(kernel, order, self.map_size)
        )
        self.packed_window = nnx.data(nnx.Param(packed))
        self.packed_for = _packing(order, self.map_size)

    @classmethod
    def read_sizes(cls, shapes: Shapes, channels: int) -> dict[str, Any]:
        return {"num_heads": channels // shapes["to_k.weight"][0], "window": shapes["pos_conv.weight"][-1]}


def _packing(order: PositionOrder, width: int) -> tuple[PositionOrder, int | None]:
    """What a packed window depends on."""
    return order, width if order in ("toeplitz", "banded") else None


def fused(
    *arguments: Array, kernels: types.ModuleType, heads: int, side: int, dtype: Dtype, interpret: bool
) -> Map:
    """`kernels.local_lambda` of these arguments, differentiable and split over the batch."""
    options = {"heads": heads, "side": side, "interpret": interpret}
    run = functools.partial(kernels.local_lambda, dtype=dtype, **options)
    run = split_over_batch(run, batched=(True, True, False, *(True for _ in arguments[3:])))
    back = functools.partial(kernels.local_lambda_gradient, **options)
    back = split_over_batch(back, batched=(True, True, False, True, True))

    def gradient(q: Array, val: Array, window: Array, content: Array, *rest: Array) -> tuple[Array, ...]:
        *add, cotangent = rest
        q, val, windows, content = back(q, val, window, content, cotangent)
        return q, val, windows.sum(0), content, *(cotangent for _ in add)

    return with_gradient(run, gradient)(*arguments)
