"""A matrix product over the channels with what comes before and after it: LayerNorm, bias, activation, sums.

XLA writes the product and reads it again for what follows: at the student's widths that is as much memory
traffic as the product's own. A LayerNorm before it goes through the product: with its scale in the kernel's
rows and its bias in the product's,

    LN(x) · W = (x · W - mean Σ_k W) / deviation

and mean and deviation are sums over numbers the product reads anyway.
"""

import functools

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from moebius_jax.models.kernels.common import Elementwise, power_of_two

PROCESSORS = 132  # of an H100 or H200; only how the work is cut depends on it


def product(
    x: Float[Array, "*m K"],
    kernel: Float[Array, "K N"],
    *others: Array,
    has_bias: bool = False,
    norm_eps: float | None = None,
    pairs: int = 0,
    then: Elementwise | None = None,
    widths: tuple[int, ...] | None = None,
    dtype: Dtype,
    interpret: bool = False,
) -> Float[Array, "*m N"] | list[Array]:
    """then(x · kernel + bias) and other maps added to it, all sums in fp32.

    Args:
        x, kernel: of one dtype.
        others: Σ_k of the kernel [N] first, if there is a `norm_eps`; then the bias [N], if it `has_bias`;
            then `pairs` of another map and its kernel, whose products are added; then what is added last:
            maps of the result's shape, or rows [B or 1, 1, …, N].
        has_bias: see `others`.
        pairs: see `others`.
        norm_eps: of a LayerNorm (without scale and bias) before the product.
        then: an activation.
        widths: cuts the result along N into a list of arrays.
        dtype: of the result.
        interpret: run the kernel as Python would, on any machine.
    """
    K, N = kernel.shape
    rows = x.reshape(-1, K)
    M = len(rows)
    m, n, k = _tiles(M, N, K)
    before = has_bias + (norm_eps is not None)
    added = [a.reshape(-1, a.shape[-1]) for a in others[before : before + 2 * pairs]]
    others = [other.reshape(-1, N) for other in others[:before] + others[before + 2 * pairs :]]
    cut = widths or (N,)
    results = pl.pallas_call(
        functools.partial(
            _product,
            shape=(M, K, cut),
            tiles=(m, n, k),
            shared=tuple(M // len(other) for other in others),
            has_bias=has_bias,
            norm_eps=norm_eps,
            depths=tuple(kernel.shape[0] for kernel in added[1::2]),
            then=then,
        ),
        grid=(sum(pl.cdiv(width, n) for width in cut), pl.cdiv(M, m)),
        out_shape=[jax.ShapeDtypeStruct((M, width), dtype) for width in cut],
        compiler_params=triton.CompilerParams(num_warps=8 if m * n > 64 * 128 else 4, num_stages=4),
        interpret=interpret,
        name="product",
    )(rows, kernel, *added, *others)
    results = [result.reshape(*x.shape[:-1], -1) for result in results]
    return results if widths else results[0]


def _tiles(M: int, N: int, K: int) -> tuple[int, int, int]:
    """Rows, columns and depth of a program's tile: large, but with work for every processor."""
    depth = 64 if K >= 64 else max(16, power_of_two(K))
    for m, n in ((128, 128), (128, 64), (64, 64)):
        if pl.cdiv(M, m) * pl.cdiv(N, n) >= PROCESSORS and (n <= 64 or N % n == 0):
            return m, n, depth
    return 64, 32, depth


def _product(
    x_ref: Array,
    kernel_ref: Array,
    *refs: Array,
    shape: tuple[int, int, tuple[int, ...]],
    tiles: tuple[int, int, int],
    shared: tuple[int, ...],
    has_bias: bool,
    norm_eps: float | None,
    depths: tuple[int, ...],
    then: Elementwise | None,
) -> None:
    """One tile of the result. Each row of another operand is `shared` by so many of the result's.

    `depths` are those of the products that are added to the first.
    """
    (M, K, widths), (m, n, k) = shape, tiles
    pair_refs, refs = refs[: 2 * len(depths)], refs[2 * len(depths) :]
    other_refs, out_refs = refs[: len(shared)], refs[len(shared) :]
    has_norm = norm_eps is not None
    rows = pl.program_id(1) * m + jnp.arange(m)
    in_rows = (rows < M)[:, None]
    # Every array of the result has tiles of its own.
    first_tile = first_column = 0
    columns, in_columns, places = jnp.zeros(n, jnp.int32), jnp.zeros(n, bool), []
    for width in widths:
        own = (pl.program_id(0) - first_tile) * n + jnp.arange(n)
        here = (own >= 0) & (own < pl.cdiv(width, n) * n)
        columns = jnp.where(here, first_column + own, columns)
        places.append((own, here & (own < width)))
        in_columns |= places[-1][1]
        first_tile, first_column = first_tile + pl.cdiv(width, n), first_column + width
    in_columns = in_columns[None]

    def multiplied(x_ref: Array, kernel_ref: Array, K: int, start: tuple[Array, ...]) -> tuple[Array, ...]:
        def body(step: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            total, *sums = carry
            depth = step * k + jnp.arange(k)
            x = triton.load(x_ref.at[rows[:, None], depth[None]], mask=in_rows & (depth < K)[None], other=0)
            kernel = triton.load(
                kernel_ref.at[depth[:, None], columns[None]], mask=(depth < K)[:, None] & in_columns, other=0
            )
            total += triton.dot(x, kernel)
            if not sums:
                return (total,)
            x = x.astype(jnp.float32)
            return total, sums[0] + x.sum(1), sums[1] + (x * x).sum(1)

        return lax.fori_loop(0, pl.cdiv(K, k), body, start)

    start = jnp.zeros((m, n), jnp.float32), *(jnp.zeros(m, jnp.float32) for _ in range(2 * has_norm))
    total, *sums = multiplied(x_ref, kernel_ref, K, start)
    inside = in_rows & in_columns

    def other(i: int) -> Array:
        at = other_refs[i].at[(rows // shared[i])[:, None], columns[None]]
        return triton.load(at, mask=inside, other=0).astype(jnp.float32)

    if has_norm:
        mean = sums[0] / K
        variance = jnp.maximum(sums[1] / K - mean * mean, 0)
        total = (total - mean[:, None] * other(0)) * lax.rsqrt(variance + norm_eps)[:, None]
    if has_bias:
        total += other(has_norm)
    if then is not None:
        total = then(total)
    for pair, depth in zip(zip(pair_refs[::2], pair_refs[1::2], strict=True), depths, strict=True):
        (total,) = multiplied(*pair, depth, (total,))
    for i in range(has_norm + has_bias, len(other_refs)):
        total += other(i)
    for ref, (own, here) in zip(out_refs, places, strict=True):
        triton.store(ref.at[rows[:, None], own[None]], total.astype(ref.dtype), mask=in_rows & here[None])
