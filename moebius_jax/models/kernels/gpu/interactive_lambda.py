"""Interactive-λ on a GPU in one kernel: nothing of size [N, h, L] is written.

    Y[n,h,v] = Σ_l (Σ_k q[n,h,k] (key[l,k] + E[n,l,k])) val[l,v]

L is ten in the release: too few for matrix units, so both sums are taken element by element in fp32.
"""

import functools

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from moebius_jax.models.kernels.common import power_of_two

Heads = Float[Array, "B N h k"]

ELEMENTS = 8192  # of a program's tile, in registers


def interactive_lambda(
    q: Heads,
    key: Float[Array, "B L k"],
    val: Float[Array, "B L k"],
    table: Float[Array, "N L k"],
    *add: Heads,
    dtype: Dtype,
    interpret: bool = False,
) -> Heads:
    """Y, plus maps of its shape.

    Args:
        q: queries, h a power of two.
        key: after their softmax over the tokens.
        val: values, of the depth of the keys.
        table: the position table E.
        add: maps that are added to the result.
        dtype: of the result.
        interpret: run the kernel as Python would, on any machine.
    """
    B, N, h, k = q.shape
    width = power_of_two(k)
    positions = max(1, ELEMENTS // (width * h))
    return pl.pallas_call(
        functools.partial(_kernel, positions=positions, width=width, tokens=key.shape[1]),
        grid=(pl.cdiv(N, positions), B),
        out_shape=jax.ShapeDtypeStruct(q.shape, dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="interactive_lambda",
    )(q, key, val, table, *add)


def _kernel(
    q_ref: Array,
    key_ref: Array,
    val_ref: Array,
    table_ref: Array,
    *refs: Array,
    positions: int,
    width: int,
    tokens: int,
) -> None:
    """All heads of some positions; rows are (position, head)."""
    *add_refs, out_ref = refs
    _, N, h, k = q_ref.shape
    b = pl.program_id(1)
    row, depth = jnp.arange(positions * h), jnp.arange(width)
    n, head = pl.program_id(0) * positions + row // h, row % h
    in_depth = depth < k
    place, inside = (b, n[:, None], head[:, None], depth[None]), (n < N)[:, None] & in_depth[None]

    def loaded(ref: Array, at: tuple[Array, ...], mask: Array) -> Array:
        return triton.load(ref.at[at], mask=mask, other=0).astype(jnp.float32)

    q = loaded(q_ref, place, inside)

    def body(token: Array, total: Array) -> Array:
        key = loaded(key_ref, (b, token, depth), in_depth)
        val = loaded(val_ref, (b, token, depth), in_depth)
        here = loaded(table_ref, (n[:, None], token, depth[None]), inside)
        score = (q * (key[None] + here)).sum(1)
        return total + score[:, None] * val[None]

    total = lax.fori_loop(0, tokens, body, jnp.zeros((positions * h, width), jnp.float32))
    for ref in add_refs:
        total += loaded(ref, place, inside)
    triton.store(out_ref.at[place], total.astype(out_ref.dtype), mask=inside)
