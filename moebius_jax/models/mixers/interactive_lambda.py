"""Interactive-λ, the student's cross mixer: lambda functions of the context tokens."""

import functools
import math
import types
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moebius_jax.models import forms
from moebius_jax.models.kernels.gpu import interactive_lambda as gpu
from moebius_jax.models.kernels.tpu import interactive_lambda as tpu
from moebius_jax.models.kernels.wrapped import split_over_batch
from moebius_jax.models.linear import Linear, PointwiseConv
from moebius_jax.models.norms import BatchNorm, LayerNorm
from moebius_jax.models.parts import BlockSizes, Part
from moebius_jax.models.precision import Precision
from moebius_jax.models.released import Layout, Released, Shapes, Table

Map = Float[Array, "B H W C"]
Tokens = tuple[Float[Array, "B l k"], Float[Array, "B l v"]]  # on a TPU, frozen, as its kernel reads them

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
        self.size = table_shape[:2]
        self.num_heads = sizes.num_heads
        self.stream_dtype = precision.stream_dtype
        self.platform = precision.platform
        self.is_frozen = False
        # Once frozen: to_q and the norm that it has taken over, as a TPU's kernel reads them.
        self.packed_queries = self.packed_bias = self.norm_eps = None
        self.dtype, self.precision = precision.operands(thin=True)

    def prepare(self, context: Float[Array, "B L D"]) -> Tokens:
        """Keys, normalised over the tokens, and values."""
        key, val = self.to_k(context), self.to_v(context)
        if self.norm_v is not None:
            val = self.norm_v(val)
        key = jax.nn.softmax(key.astype(jnp.float32), axis=1).astype(self.dtype)
        if self.packed_queries is None:
            return key, val
        return tpu.packed_tokens(key, val.astype(self.dtype), self.num_heads)

    def onto(self, stream: Map, x: Map, tokens: Tokens) -> Map:
        return self(x, tokens, add=stream)

    def takes_over(self, norm: LayerNorm) -> bool:
        return norm.dtype == self.dtype and self._has_kernel(tpu)

    def freeze(self) -> None:
        """For inference: takes a kernel that has no gradient, and what it reads as it reads it."""
        self.is_frozen = True
        table = self.position_table[...].astype(self.dtype)
        if self.to_q.norm_eps is not None and self._has_kernel(tpu):
            weights = self.to_q.kernel[...].astype(self.dtype), self.to_q.bias[...].astype(jnp.float32)[None]
            packed = (nnx.data(nnx.Param(tpu.packed_queries(a, self.num_heads))) for a in weights)
            self.packed_queries, self.packed_bias = packed
            self.norm_eps, self.to_q = self.to_q.norm_eps, None
            table = tpu.packed_table(table)
        self.position_table = nnx.Param(table)

    def _has_kernel(self, kernels: types.ModuleType) -> bool:
        """Whether it is this platform's, and the one of these that is taken."""
        if not forms.fused_interactive_lambda(self.dtype, self.size[0], self.num_heads, self.platform):
            return False
        return kernels is (tpu if forms.tpu_kernels(self.platform) else gpu)

    def __call__(self, x: Map, tokens: Tokens, *, add: Map | None = None) -> Map:
        """`add`: a map added to the result. ValueError: map or context are not of the trained size."""
        B, H, W, C = x.shape
        L = tokens[0].shape[1] // (1 if self.packed_queries is None else self.num_heads)
        if self.size != (H * W, L):
            raise ValueError(
                f"a {H} x {W} map with {L} context tokens: the position table was trained for "
                f"{self.size[0]} positions and {self.size[1]} tokens"
            )
        if self.packed_queries is not None:
            y = self._fused_on_tpu(x.reshape(B, H * W, C), tokens).reshape(B, H, W, C)
            return y if add is None else add + y
        q = self.to_q(x)
        if self.norm_q is not None:
            q = self.norm_q(q)
        q = q.reshape(B, H * W, self.num_heads, -1)
        table = self.position_table[...].astype(self.dtype)
        if self.is_frozen and self._has_kernel(gpu):
            return self._fused(q, tokens, table, add).reshape(B, H, W, C)
        key, val = tokens
        einsum = functools.partial(jnp.einsum, precision=self.precision)
        scores = einsum("bnhk,blk->bnhl", q, key) + einsum("bnhk,nlk->bnhl", q, table)
        y = einsum("bnhl,blv->bnhv", scores, val).reshape(B, H, W, C)
        return y if add is None else add + y

    def _fused(self, q: Array, tokens: Tokens, table: Array, add: Map | None) -> Float[Array, "B N h v"]:
        run = functools.partial(gpu.interactive_lambda, **self._kernel_options())
        others = [] if add is None else [add.reshape(q.shape)]
        run = split_over_batch(run, batched=(True, True, True, False, *(True for _ in others)))
        return run(q, *_of_every_item(tokens, len(q)), table, *others)

    def _fused_on_tpu(self, x: Float[Array, "B N C"], tokens: Tokens) -> Float[Array, "B N C"]:
        sizes = {"heads": self.num_heads, "norm_eps": self.norm_eps}
        run = functools.partial(tpu.interactive_lambda, **sizes, **self._kernel_options())
        run = split_over_batch(run, batched=(True, True, True, False, False, False))
        weights = (a[...] for a in (self.packed_queries, self.packed_bias, self.position_table))
        return run(x.astype(self.dtype), *_of_every_item(tokens, len(x)), *weights)

    def _kernel_options(self) -> dict[str, Any]:
        return {"dtype": self.stream_dtype, "interpret": forms.kernels_interpreted(self.platform)}

    @classmethod
    def read_sizes(cls, shapes: Shapes, channels: int) -> dict[str, Any]:
        positions, length, depth = shapes["rel_pos_emb"][:3]
        side = math.isqrt(positions)
        if side**2 != positions:
            raise ValueError(f"a position table of {positions} rows is not one of a square map")
        return {"num_heads": channels // depth, "context_length": length, "map_size": side}


def _of_every_item(tokens: Tokens, batch: int) -> list[Array]:
    """Tokens of one context, if they are, for each item of a batch."""
    return [jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in tokens]
