"""Local-λ, the student's self mixer: lambda functions of the whole map and of a 15x15 window."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from moebius_jax.models.config import UNetConfig
from moebius_jax.models.initializers import kaiming_uniform
from moebius_jax.models.linear import pointwise_conv
from moebius_jax.models.norms import BatchNorm
from moebius_jax.models.position_lambda import choose_order, position_term
from moebius_jax.models.precision import Precision


class PositionConv(nnx.Module):
    """Weights of the 1x15x15 position convolution: kernel [p, p, k], bias [k]."""

    def __init__(self, depth: int, window: int, *, param_dtype: Dtype, rngs: nnx.Rngs) -> None:
        fan_in = window * window
        self.kernel = nnx.Param(
            kaiming_uniform(rngs.params(), (window, window, depth), param_dtype, fan_in=fan_in)
        )
        self.bias = nnx.Param(kaiming_uniform(rngs.params(), (depth,), param_dtype, fan_in=fan_in))


class LocalLambda(nnx.Module):
    """Y[h,v,n] = Σ_k q[h,k,n] (λc[k,v] + λp[k,v,n])  (spec "Local-λ").

    λc = Σ_n softmax_n(key)[k,n] val[v,n] sees the whole map, λp the window around n.
    """

    def __init__(self, channels: int, config: UNetConfig, *, precision: Precision, rngs: nnx.Rngs) -> None:
        depth = channels // config.num_heads
        project = {"use_bias": False, "thin": True, "precision": precision, "rngs": rngs}
        self.to_q = pointwise_conv(channels, channels, **project)
        self.to_k = pointwise_conv(channels, depth, **project)
        self.to_v = pointwise_conv(channels, depth, **project)
        self.norm_q = BatchNorm(channels, precision=precision)
        self.norm_v = BatchNorm(depth, precision=precision)
        self.position = PositionConv(depth, config.window, param_dtype=precision.param_dtype, rngs=rngs)
        self.num_heads = config.num_heads
        self.order = config.position_order
        self.platform = config.platform
        self.dtype = precision.dtype
        self.stream_dtype = precision.stream_dtype

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        q, key, val = self.to_q(x), self.to_k(x), self.to_v(x)
        if self.norm_q is not None:
            q, val = self.norm_q(q), self.norm_v(val)
        q = q.reshape(B, H, W, self.num_heads, -1)
        key = jax.nn.softmax(key.astype(jnp.float32), axis=(1, 2))
        kernel, bias = self.position.kernel[...], self.position.bias[...]
        q, key, val, kernel, bias = (a.astype(self.dtype) for a in (q, key, val, kernel, bias))
        order = choose_order(W, self.platform) if self.order == "auto" else self.order
        content = jnp.einsum("byxhk,bkv->byxhv", q, jnp.einsum("byxk,byxv->bkv", key, val))
        y = content.astype(self.stream_dtype) + position_term(q, val, kernel, bias, order)
        return y.reshape(B, H, W, C)
