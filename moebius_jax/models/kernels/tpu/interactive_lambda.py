"""Interactive-λ with its queries' projection and the norm before it, on a TPU: positions lie along the lanes.

    q[k,h,n] = Σ_c w[k,h,c] LN(x)[n,c] + b[k,h]
    s[l,h,n] = Σ_k q[k,h,n] (key[l,k] + E[k,l,n])        Y[n,h,v] = Σ_l s[l,h,n] val[l,v]

A product with ten tokens for each position by itself is one that no matrix unit likes. With a position to a
lane and a head to a sublane, the sum over k is one of registers, in which nothing has to be moved.
Queries and all that does not depend on the position are matrix products.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moebius_jax.models.kernels.common import dot
from moebius_jax.models.kernels.tpu.memory import LANES, SUBLANES, block_bytes, compiler_params

Map = Float[Array, "B N C"]
Tokens = Float[Array, "B L k"]
Table = Float[Array, "k L+ N"]

POSITIONS = 256  # of one program, at most
UNROLL = 4  # turns of the sum over k, which shares its work of moving carried registers


def interactive_lambda(
    x: Map,
    keys: Float[Array, "B lh kh"],
    values: Float[Array, "B lh hv"],
    weight: Float[Array, "kh C"],
    bias: Float[Array, "kh 1"],
    table: Table,
    *,
    heads: int,
    norm_eps: float,
    dtype: Dtype,
    interpret: bool = False,
) -> Float[Array, "B N hv"]:
    """Y.

    Args:
        x: what the queries are made of, before the norm.
        keys, values: what `packed_tokens` makes of the context's; in the dtype of `x`.
        weight, bias: the queries' projection, see `packed_queries`; in the dtype of `x`, in fp32.
        table: what `packed_table` makes of the position table; in the dtype of `x`.
        heads: h, a multiple of 8.
        norm_eps: of the LayerNorm, whose scale and bias are in the projection.
        dtype: of the result; sums are taken in fp32.
        interpret: run the kernel as Python would, on any machine.
    """
    B, N, C = x.shape
    lanes = math.gcd(N, POSITIONS)
    blocks = [
        pl.BlockSpec((1, lanes, C), lambda n, b: (b, n, 0)),
        *[pl.BlockSpec((1, *a.shape[1:]), lambda _, b: (b, 0, 0)) for a in (keys, values)],
        *[pl.BlockSpec(a.shape, lambda *_: (0, 0)) for a in (weight, bias)],
        pl.BlockSpec((*table.shape[:2], lanes), lambda n, _: (0, 0, n)),  # read once for all items
    ]
    arguments = x, keys, values, weight, bias, table
    room = sum(block_bytes(block.block_shape, a.dtype) for a, block in zip(arguments, blocks, strict=True))
    room += block_bytes((lanes, len(weight)), dtype) + block_bytes((len(weight), lanes), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, heads=heads, norm_eps=norm_eps, tokens=keys.shape[1] // heads),
        grid=(N // lanes, B),
        in_specs=blocks,
        out_specs=pl.BlockSpec((1, lanes, len(weight)), lambda n, b: (b, n, 0)),
        out_shape=jax.ShapeDtypeStruct((B, N, len(weight)), dtype),
        scratch_shapes=[pltpu.VMEM((len(weight), lanes), jnp.float32)],
        compiler_params=compiler_params(room, dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="interactive_lambda",
    )(*arguments)


def packed_tokens(
    key: Tokens, val: Tokens, heads: int
) -> tuple[Float[Array, "B lh kh"], Float[Array, "B lh hv"]]:
    """Keys, after their softmax over the tokens, and values, for each head with zeros for the others."""
    B, L, _ = key.shape
    same = jnp.eye(heads, dtype=key.dtype)
    keys = jnp.einsum("blk,hg->blhkg", key, same).reshape(B, L * heads, -1)
    return keys, jnp.einsum("blv,hg->blhgv", val, same).reshape(B, L * heads, -1)


def packed_queries(kernel: Float[Array, "C hk"], heads: int) -> Float[Array, "kh C"]:
    """A projection's kernel, or its bias [1, hk], with the heads of a channel next to each other."""
    rows = kernel.reshape(len(kernel), heads, -1)
    return rows.transpose(2, 1, 0).reshape(-1, len(kernel))


def packed_table(table: Float[Array, "N L k"]) -> Table:
    """The position table with tokens in the sublanes of whole registers, zeros where there are none."""
    tokens = table.shape[1]
    return jnp.pad(table.transpose(2, 1, 0), ((0, 0), (0, -tokens % (2 * SUBLANES)), (0, 0)))


def fits(positions: int, heads: int) -> bool:
    """Whether a map of so many positions fills registers."""
    return positions % LANES == 0 and heads % SUBLANES == 0


def _kernel(
    x_ref: Array,
    keys_ref: Array,
    values_ref: Array,
    weight_ref: Array,
    bias_ref: Array,
    table_ref: Array,
    out_ref: Array,
    q_ref: Array,
    *,
    heads: int,
    norm_eps: float,
    tokens: int,
) -> None:
    dtype = x_ref.dtype
    x = x_ref[0].astype(jnp.float32)
    x -= x.mean(-1, keepdims=True)
    x *= lax.rsqrt((x * x).mean(-1, keepdims=True) + norm_eps)
    q = dot(weight_ref[...], x.astype(dtype), over=(1, 1)) + bias_ref[...]
    q_ref[...] = q.astype(dtype).astype(jnp.float32)
    scores = dot(keys_ref[0], q.astype(dtype), over=(1, 0))

    def body(k: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        q = q_ref[pl.ds(k * heads, heads)]
        table = table_ref[k].astype(jnp.float32)
        return tuple(total + q * table[token : token + 1] for token, total in enumerate(totals))

    start = tuple(scores[token * heads : (token + 1) * heads] for token in range(tokens))
    depth = len(table_ref)
    totals = lax.fori_loop(0, depth, body, start, unroll=math.gcd(depth, UNROLL))
    y = dot(jnp.concatenate(totals).astype(dtype), values_ref[0], over=(0, 0))
    out_ref[0] = y.astype(out_ref.dtype)
