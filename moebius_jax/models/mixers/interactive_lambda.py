"""Interactive-λ, the student's cross mixer: lambda functions of the context tokens."""

import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moebius_jax.models.forms import sums_over_depth
from moebius_jax.models.linear import Linear, PointwiseConv
from moebius_jax.models.norms import BatchNorm
from moebius_jax.models.parts import BlockSizes, Part
from moebius_jax.models.precision import Precision
from moebius_jax.models.released import Layout, Released, Shapes, Table

Tokens = tuple[Float[Array, "B L k"], Float[Array, "B L v"]]

POSITION_TABLE = Layout(ones=(3,))  # [N, L, k] ↔ [N, L, k, u=1]


class InteractiveLambda(Part):
    """Y[h,v,n] = Σ_k q[h,k,n] (λc[k,v] + λp[n,k,v])  (docs/model.md, "Interactive-λ").

    Both lambdas are sums over the L context tokens, so q meets the keys and the position table E first:

        Y[h,v,n] = Σ_l (Σ_k q[h,k,n] (softmax_l(key)[l,k] + E[n,l,k])) val[l,v]

    and nothing larger than [N, h, L] is ever made. E ties the layer to the map it was trained on.
    """

    RELEASED: ClassVar[Table] = {"position_table": Released("rel_pos_emb", POSITION_TABLE)}
    FOLDS: ClassVar[dict[str, str]] = {"norm_q": "to_q", "norm_v": "to_v"}
    LANDMARK: ClassVar[str] = "rel_pos_emb"

    def __init__(self, sizes: BlockSizes, *, precision: Precision, rngs: nnx.Rngs) -> None:
        channels, depth = sizes.channels, sizes.depth
        thin = {"use_bias": False, "thin": True, "precision": precision, "rngs": rngs}
        table_shape = (sizes.map_size**2, sizes.context_length, depth)
        self.to_q = PointwiseConv(channels, channels, **thin)
        self.to_k = Linear(sizes.context_dim, depth, **thin)
        self.to_v = Linear(sizes.context_dim, depth, **thin)
        self.norm_q = BatchNorm(channels, precision=precision)
        self.norm_v = BatchNorm(depth, precision=precision)
        self.position_table = nnx.Param(jax.random.normal(rngs.params(), table_shape, precision.param_dtype))
        self.num_heads = sizes.num_heads
        self.platform = precision.platform
        self.dtype, self.precision = precision.operands(thin=True)

    def prepare(self, context: Float[Array, "B L D"]) -> Tokens:
        """Keys, normalised over the tokens, and values."""
        key, val = self.to_k(context), self.to_v(context)
        if self.norm_v is not None:
            val = self.norm_v(val)
        return jax.nn.softmax(key.astype(jnp.float32), axis=1).astype(self.dtype), val

    def __call__(self, x: Float[Array, "B H W C"], tokens: Tokens) -> Float[Array, "B H W C"]:
        """Raises ValueError when the map or the context is not of the trained size."""
        B, H, W, C = x.shape
        key, val = tokens
        L = key.shape[1]
        if self.position_table.shape[:2] != (H * W, L):
            raise ValueError(
                f"a {H} x {W} map with {L} context tokens: the position table was trained for "
                f"{self.position_table.shape[0]} positions and {self.position_table.shape[1]} tokens"
            )
        q = self.to_q(x)
        if self.norm_q is not None:
            q = self.norm_q(q)
        q = q.reshape(B, H * W, self.num_heads, -1)
        table = self.position_table[...].astype(self.dtype)
        einsum = functools.partial(jnp.einsum, precision=self.precision)
        if sums_over_depth(self.platform):
            wide_q, wide_key, wide_table = (a.astype(jnp.float32) for a in (q, key, table))
            keys = (wide_key[:, None] + wide_table)[:, :, None]  # [B, N, 1, L, k]
            scores = jnp.sum(wide_q[..., None, :] * keys, axis=-1).astype(self.dtype)
        else:
            scores = einsum("bnhk,blk->bnhl", q, key) + einsum("bnhk,nlk->bnhl", q, table)
        return einsum("bnhl,blv->bnhv", scores, val).reshape(B, H, W, C)

    @classmethod
    def read_sizes(cls, shapes: Shapes, channels: int) -> dict[str, Any]:
        positions, length, depth = shapes["rel_pos_emb"][:3]
        side = math.isqrt(positions)
        if side**2 != positions:
            raise ValueError(f"a position table of {positions} rows is not one of a square map")
        return {"num_heads": channels // depth, "context_length": length, "map_size": side}
