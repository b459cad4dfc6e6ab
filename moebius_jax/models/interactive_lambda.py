"""Interactive-λ, the student's cross mixer: lambda functions of the context tokens."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moebius_jax.models.config import UNetConfig
from moebius_jax.models.linear import linear, pointwise_conv
from moebius_jax.models.norms import BatchNorm
from moebius_jax.models.precision import Precision


class InteractiveLambda(nnx.Module):
    """Y[h,v,n] = Σ_k q[h,k,n] (λc[k,v] + λp[n,k,v])  (spec "Interactive-λ").

    Both lambdas are sums over the L context tokens, so q meets the keys and the position table E first:

        Y[h,v,n] = Σ_l (Σ_k q[h,k,n] (softmax_l(key)[l,k] + E[n,l,k])) val[l,v]

    and nothing larger than [N, h, L] is ever made. E ties the layer to the map it was trained on.
    """

    def __init__(
        self,
        channels: int,
        map_size: int,
        config: UNetConfig,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
    ) -> None:
        depth = channels // config.num_heads
        thin = {"use_bias": False, "thin": True, "precision": precision, "rngs": rngs}
        table_shape = (map_size**2, config.context_length, depth)
        self.to_q = pointwise_conv(channels, channels, **thin)
        self.to_k = linear(config.context_dim, depth, **thin)
        self.to_v = linear(config.context_dim, depth, **thin)
        self.norm_q = BatchNorm(channels, precision=precision)
        self.norm_v = BatchNorm(depth, precision=precision)
        self.position_table = nnx.Param(jax.random.normal(rngs.params(), table_shape, precision.param_dtype))
        self.num_heads = config.num_heads
        self.dtype, self.precision = precision.operands(thin=True)

    def __call__(self, x: Float[Array, "B H W C"], context: Float[Array, "B L D"]) -> Float[Array, "B H W C"]:
        """Raises ValueError when the map or the context is not of the trained size."""
        B, H, W, C = x.shape
        L = context.shape[1]
        if self.position_table.shape[:2] != (H * W, L):
            raise ValueError(
                f"a {H} x {W} map with {L} context tokens: the position table was trained for "
                f"{self.position_table.shape[0]} positions and {self.position_table.shape[1]} tokens"
            )
        q, key, val = self.to_q(x), self.to_k(context), self.to_v(context)
        if self.norm_q is not None:
            q, val = self.norm_q(q), self.norm_v(val)
        q = q.reshape(B, H * W, self.num_heads, -1)
        key = jax.nn.softmax(key.astype(jnp.float32), axis=1).astype(self.dtype)
        table = self.position_table[...].astype(self.dtype)
        einsum = functools.partial(jnp.einsum, precision=self.precision)
        scores = einsum("bnhk,blk->bnhl", q, key) + einsum("bnhk,nlk->bnhl", q, table)
        return einsum("bnhl,blv->bnhv", scores, val).reshape(B, H, W, C)
