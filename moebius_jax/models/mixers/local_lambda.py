"""Local-λ, the student's self mixer: lambda functions of the whole map and of a 15x15 window."""

import functools
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
from moebius_jax.models.kernels.tpu import local_lambda as tpu
from moebius_jax.models.kernels.wrapped import split_over_batch, with_gradient, with_gradient_of
from moebius_jax.models.linear import Linear, PointwiseConv
from moebius_jax.models.mixers.position_term import banded_kernel, position_term
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
        self.padded_window = self.band = None  # the window as the order reads it, once frozen
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
        if order == "fused" and forms.tpu_kernels(self.platform):
            y = self._fused_on_tpu(q, key, val, kernel, bias)
            return y if add is None else add + y
        q = q.reshape(B, H, W, self.num_heads, -1)
        if order == "fused":
            return self._fused(q, key, val, kernel, bias, add=add)
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
        is_prepared = self.band is not None and self.map_size == q.shape[2]
        band = self.band[...] if is_prepared else None
        return content.astype(self.stream_dtype) + position_term(q, val, kernel, bias, order, band=band)

    def _weights(self, key: Map) -> Map:
        """Softmax over the map."""
        flat = key.reshape(key.shape[0], -1, key.shape[-1])  # ONNX knows a softmax over one axis only
        return jax.nn.softmax(flat.astype(jnp.float32), axis=1).astype(self.dtype).reshape(key.shape)

    def _fused(self, q: Array, key: Array, val: Array, kernel: Array, bias: Array, *, add: Map | None) -> Map:
        """Both in one kernel, differentiated as `_sum` is."""
        B, H, W, h, _ = q.shape
        if power_of_two(h) != h:
            raise ValueError(f"position_order 'fused' needs a power of two of heads; num_heads is {h}")
        others = [] if add is None else [add.reshape(B, H, W, h, -1)]
        run = functools.partial(
            gpu.local_lambda, dtype=self.stream_dtype, interpret=forms.kernels_interpreted(self.platform)
        )
        run = split_over_batch(run, batched=(True, True, True, False, False, *(True for _ in others)))
        if self.padded_window is not None:
            return run(q, key, val, self.padded_window[...], bias, *others).reshape(B, H, W, -1)
        order = forms.unfused_position_order(W, h, val.shape[-1], len(kernel), self.platform)

        def plain(*args: Array) -> Array:
            return sum(args[5:], self._sum(*args[:5], order=order))

        def padded(q: Array, key: Array, val: Array, kernel: Array, bias: Array, *others: Array) -> Array:
            return run(q, key, val, gpu.padded_window(kernel), bias, *others)

        y = with_gradient_of(plain, padded)(q, key, val, kernel, bias, *others)
        return y.reshape(B, H, W, -1)

    def _fused_on_tpu(self, q: Map, key: Array, val: Array, kernel: Array, bias: Array) -> Map:
        """Both in one kernel but for λc, which is small; their gradients in another."""
        options = {
            "heads": self.num_heads,
            "side": len(kernel),
            "interpret": forms.kernels_interpreted(self.platform),
        }
        run = functools.partial(tpu.local_lambda, dtype=self.stream_dtype, **options)
        run = split_over_batch(run, batched=(True, True, False, True))
        back = functools.partial(tpu.local_lambda_gradient, **options)
        back = split_over_batch(back, batched=(True, True, False, True, True))

        def gradient(*args: Array) -> tuple[Array, ...]:
            q, val, windows, content = back(*args)
            return q, val, windows.sum(0), content

        content = jnp.einsum("byxk,byxv->bkv", self._weights(key), val, preferred_element_type=jnp.float32)
        content = (content + bias[:, None]).astype(self.dtype)
        window = tpu.packed_window(kernel) if self.padded_window is None else self.padded_window[...]
        return with_gradient(run, gradient)(q, val, window, content)

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
        if order == "fused":
            padded = tpu.packed_window if forms.tpu_kernels(self.platform) else gpu.padded_window
            self.padded_window = nnx.data(nnx.Param(padded(kernel)))
        elif order != "conv3d":
            self.band = nnx.data(nnx.Param(banded_kernel(kernel, self.map_size)))

    @classmethod
    def read_sizes(cls, shapes: Shapes, channels: int) -> dict[str, Any]:
        return {"num_heads": channels // shapes["to_k.weight"][0], "window": shapes["pos_conv.weight"][-1]}
