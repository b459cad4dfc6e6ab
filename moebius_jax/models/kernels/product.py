"""A matrix product over the channels that adds a bias, applies an activation and adds another map.

XLA writes the product and reads it again for these: at the student's widths that is as much memory traffic as
the product's own.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

Elementwise = Callable[[Array], Array]

PROCESSORS = 132  # of an H100 or H200; only how the work is cut depends on it


def product(
    x: Float[Array, "*m K"],
    kernel: Float[Array, "K N"],
    *others: Array,
    has_bias: bool = False,
    then: Elementwise | None = None,
    dtype: Dtype,
    interpret: bool = False,
) -> Float[Array, "*m N"]:
    """then(x · kernel + bias) and other maps added to it, all sums in fp32.

    Args:
        x, kernel: of one dtype.
        others: the bias [N] first, if it `has_bias`; then what is added last: maps of the result's shape, or
            rows [B or 1, 1, …, N].
        has_bias: see `others`.
        then: an activation.
        dtype: of the result.
        interpret: run the kernel as Python would, on any machine.
    """
    K, N = kernel.shape
    rows = x.reshape(-1, K)
    M = len(rows)
    m, n, k = _tiles(M, N, K)
    others = [other.reshape(-1, N) for other in others]
    return pl.pallas_call(
        functools.partial(
            _product,
            shape=(M, N, K),
            tiles=(m, n, k),
            shared=tuple(M // len(other) for other in others),
            has_bias=has_bias,
            then=then,
        ),
        grid=(pl.cdiv(N, n), pl.cdiv(M, m)),
        out_shape=jax.ShapeDtypeStruct((M, N), dtype),
        compiler_params=triton.CompilerParams(num_warps=8 if m * n > 64 * 128 else 4, num_stages=4),
        interpret=interpret,
        name="product",
    )(rows, kernel, *others).reshape(*x.shape[:-1], N)


def _tiles(M: int, N: int, K: int) -> tuple[int, int, int]:
    """Rows, columns and depth of a program's tile: large, but with work for every processor."""
    depth = 64 if K >= 64 else max(16, 1 << (K - 1).bit_length())
    for m, n in ((128, 128), (128, 64), (64, 64)):
        if pl.cdiv(M, m) * pl.cdiv(N, n) >= PROCESSORS and (n <= 64 or N % n == 0):
            return m, n, depth
    return 64, 32, depth


def _product(
    x_ref: Array,
    kernel_ref: Array,
    *refs: Array,
    shape: tuple[int, int, int],
    tiles: tuple[int, int, int],
    shared: tuple[int, ...],
    has_bias: bool,
    then: Elementwise | None,
) -> None:
    """One tile of the result. Each row of another operand is `shared` by so many of the result's."""
    (M, N, K), (m, n, k) = shape, tiles
    *other_refs, out_ref = refs
    rows = pl.program_id(1) * m + jnp.arange(m)
    columns = pl.program_id(0) * n + jnp.arange(n)
    in_rows, in_columns = (rows < M)[:, None], (columns < N)[None]

    def body(step: Array, total: Array) -> Array:
        depth = step * k + jnp.arange(k)
        x = triton.load(x_ref.at[rows[:, None], depth[None]], mask=in_rows & (depth < K)[None], other=0)
        kernel = triton.load(
            kernel_ref.at[depth[:, None], columns[None]], mask=(depth < K)[:, None] & in_columns, other=0
        )
        return total + triton.dot(x, kernel)

    total = lax.fori_loop(0, pl.cdiv(K, k), body, jnp.zeros((m, n), jnp.float32))
    inside = in_rows & in_columns

    def other(i: int) -> Array:
        at = other_refs[i].at[(rows // shared[i])[:, None], columns[None]]
        return triton.load(at, mask=inside, other=0).astype(jnp.float32)

    if has_bias:
        total += other(0)
    if then is not None:
        total = then(total)
    for i in range(has_bias, len(other_refs)):
        total += other(i)
    triton.store(out_ref.at[rows[:, None], columns[None]], total.astype(out_ref.dtype), mask=inside)
