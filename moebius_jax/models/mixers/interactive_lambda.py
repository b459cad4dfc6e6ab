"""Interactive-λ, the student's cross mixer: lambda functions of the context tokens."""

import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moebius_jax.models import forms
from moebius_jax.models.kernels.gpu.interactive_lambda import interactive_lambda
from moebius_jax.models.kernels.wrapped import split_over_batch
from moebius_jax.models.linear import Linear, PointwiseConv
from moebius_jax.models.norms import BatchNorm
from moebius_jax.models.parts import BlockSizes, Part
from moebius_jax.models.precision import Precision
from moebius_jax.models.released import Layout, Released, Shapes, Table

Map = Float[Array, "B H W C"]
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
    READERS: ClassVar[tuple[str, ...]] = ("to_q",)
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
        self.stream_dtype = precision.stream_dtype
        self.platform = precision.platform
        self.is_frozen = False
        self.dtype, self.precision = precision.operands(thin=True)

    def prepare(self, context: Float[Array, "B L D"]) -> Tokens:
        """Keys, normalised over the tokens, and values."""
        key, val = self.to_k(context), self.to_v(context)
        if self.norm_v is not None:
            val = self.norm_v(val)
        return jax.nn.softmax(key.astype(jnp.float32), axis=1).astype(self.dtype), val

    def onto(self, stream: Map, x: Map, tokens: Tokens) -> Map:
        return self(x, tokens, add=stream)

    def freeze(self) -> None:
        """For inference: takes a kernel that has no gradient, and the table as it reads it."""
        self.is_frozen = True
        self.position_table = nnx.Param(self.position_table[...].astype(self.dtype))

    def __call__(self, x: Map, tokens: Tokens, *, add: Map | None = None) -> Map:
        """`add`: a map added to the result. ValueError: map or context are not of the trained size."""
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
        if self.is_frozen and forms.fused_interactive_lambda(self.dtype, self.num_heads, self.platform):
            return self._fused(q, key, val, table, add).reshape(B, H, W, C)
        einsum = functools.partial(jnp.einsum, precision=self.precision)
        scores = einsum("bnhk,blk->bnhl", q, key) + einsum("bnhk,nlk->bnhl", q, table)
        y = einsum("bnhl,blv->bnhv", scores, val).reshape(B, H, W, C)
        return y if add is None else add + y

    def _fused(
        self, q: Array, key: Array, val: Array, table: Array, add: Map | None
    ) -> Float[Array, "B N h v"]:
        run = functools.partial(
            interactive_lambda, dtype=self.stream_dtype, interpret=forms.kernels_interpreted(self.platform)
        )
        key, val = (jnp.broadcast_to(a, (len(q), *a.shape[1:])) for a in (key, val))
        others = [] if add is None else [add.reshape(q.shape)]
        batched = (True, True, True, False, *(True for _ in others))
        return split_over_batch(run, batched=batched)(q, key, val, table, *others)

    @classmethod
    def read_sizes(cls, shapes: Shapes, channels: int) -> dict[str, Any]:
        positions, length, depth = shapes["rel_pos_emb"][:3]
        side = math.isqrt(positions)
        if side**2 != positions:
            raise ValueError(f"a position table of {positions} rows is not one of a square map")
        return {"num_heads": channels // depth, "context_length": length, "map_size": side}
