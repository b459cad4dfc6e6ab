"""Local-λ, the student's self mixer: lambda functions of the whole map and of a 15x15 window."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from moebius_jax.models.config import UNetConfig
from moebius_jax.models.convolutions import pointwise_conv
from moebius_jax.models.initializers import kaiming_uniform, torch_bias
from moebius_jax.models.norms import BatchNorm
from moebius_jax.models.position_lambda import choose_order, position_term


class PositionConv(nnx.Module):
    """Weights of the 1x15x15 position convolution: kernel [p, p, k], bias [k]."""

    def __init__(self, depth: int, window: int, *, param_dtype: Dtype, rngs: nnx.Rngs) -> None:
        fan_in = window * window
        self.kernel = nnx.Param(
            kaiming_uniform(rngs.params(), (window, window, depth), param_dtype, fan_in=fan_in)
        )
        self.bias = nnx.Param(torch_bias(rngs.params(), (depth,), param_dtype, fan_in=fan_in))


class LocalLambda(nnx.Module):
    """Y[h,v,n] = Σ_k q[h,k,n] (λc[k,v] + λp[k,v,n])  (spec "Local-λ").

    λc = Σ_n softmax_n(key)[k,n] val[v,n] sees the whole map, λp the window around n.
    """

    def __init__(
        self, channels: int, config: UNetConfig, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs
    ) -> None:
        depth = channels // config.num_heads
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        project = {"use_bias": False, "rngs": rngs, **dtypes}
        self.to_q = pointwise_conv(channels, channels, **project)
        self.to_k = pointwise_conv(channels, depth, **project)
        self.to_v = pointwise_conv(channels, depth, **project)
        self.norm_q = BatchNorm(channels, **dtypes)
        self.norm_v = BatchNorm(depth, **dtypes)
        self.position = PositionConv(depth, config.window, param_dtype=param_dtype, rngs=rngs)
        self.num_heads = config.num_heads
        self.order = config.position_order
        self.platform = config.platform
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        q, key, val = self.to_q(x), self.to_k(x), self.to_v(x)
        if self.norm_q is not None:
            q, val = self.norm_q(q), self.norm_v(val)
        q = q.reshape(B, H, W, self.num_heads, -1)
        key = jax.nn.softmax(key.astype(jnp.float32), axis=(1, 2)).astype(self.dtype)
        content = jnp.einsum("byxk,byxv->bkv", key, val)
        order = choose_order(W, self.platform) if self.order == "auto" else self.order
        kernel, bias = (
            self.position.kernel[...].astype(self.dtype),
            self.position.bias[...].astype(self.dtype),
        )
        y = jnp.einsum("byxhk,bkv->byxhv", q, content) + position_term(q, val, kernel, bias, order)
        return y.reshape(B, H, W, C)
