"""Local-λ on a GPU: content and position term without λp or the banded map in memory.

    Y[x,h,v] = Σ_k q[x,h,k] (λc[k,v] + b[k]) + Σ_d Σ_s A[x,h,d,s-x] val[y+d,s,v]
    A[x,h,d,e] = Σ_k q[x,h,k] w[d,e,k]

A, the queries on the window's weights, is one matrix product (XLA's) and N·h·p·p numbers. Where other forms
spread it over the columns s of each row first (`position_term`, "banded"), the kernel reads it at the shifted
address. λc is a softmax over the whole map: partial sums of pieces of it, then their combination.
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

Key = Float[Array, "B H W k"]
Query = Float[Array, "B H W h k"]
Value = Float[Array, "B H W v"]
Window = Float[Array, "p e k"]

COLUMNS = 16  # positions of a row that one program works on
BLOCK_K, BLOCK_V = 32, 64
ROWS = 256  # positions at a time in the content's sums
PIECE = 1024  # positions that one program sums over
LOWEST = -1e30  # below every key


def local_lambda(
    q: Query,
    key: Key,
    val: Value,
    window: Window,
    bias: Float[Array, " k"],
    *add: Float[Array, "B H W h v"],
    dtype: Dtype,
    interpret: bool = False,
) -> Float[Array, "B H W h v"]:
    """Y of Local-λ, content and position term.

    Args:
        q, val: queries, h a power of two, and values.
        key: before its softmax over the map.
        window: what `padded_window` makes of the position convolution's kernel; of the dtype of `q`.
        bias: b, of the position convolution.
        add: maps that are added to the result.
        dtype: of the result; sums are taken in fp32.
        interpret: run the kernels as Python would, on any machine.
    """
    content = content_lambda(key, val, bias, interpret=interpret)
    B, H, W, h, k = q.shape
    p, width, v = *window.shape[:2], val.shape[-1]
    on_window = jnp.einsum("byxhk,ek->byxhe", q, window.reshape(p * width, k))
    columns = min(COLUMNS, power_of_two(W))
    return pl.pallas_call(
        functools.partial(_apply, shape=(H, W, h, k, v), p=p, columns=columns),
        grid=(B, H, pl.cdiv(W, columns), pl.cdiv(v, BLOCK_V)),
        out_shape=jax.ShapeDtypeStruct((B, H, W, h, v), dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="local_lambda",
    )(on_window.reshape(B, H, W, h, p, width), q, val, content, *add)


def padded_window(kernel: Float[Array, "p p k"]) -> Window:
    """The kernel [p, p, k] with its rows of offsets padded, so that those of A are aligned in memory."""
    p = len(kernel)
    return jnp.pad(kernel, ((0, 0), (0, power_of_two(p) - p), (0, 0)))


def content_lambda(
    key: Key, val: Value, bias: Float[Array, " k"], *, interpret: bool = False
) -> Float[Array, "B k v"]:
    """λc[k,v] + b[k], λc = Σ_n softmax_n(key)[k,n] val[v,n]; summed in fp32, in the dtype of `val`."""
    B, k, v = len(key), key.shape[-1], val.shape[-1]
    key, val = key.reshape(B, -1, k), val.reshape(B, -1, v)
    N = key.shape[1]
    pieces = pl.cdiv(N, PIECE)
    blocks = pl.cdiv(k, BLOCK_K), pl.cdiv(v, BLOCK_V)
    options = {
        "compiler_params": triton.CompilerParams(num_warps=4, num_stages=2),
        "interpret": interpret,
    }
    whole = jax.ShapeDtypeStruct((B, k, v), val.dtype)
    sums = jax.ShapeDtypeStruct((B, pieces, k), jnp.float32)
    products = jax.ShapeDtypeStruct((B, pieces, k, v), jnp.float32)
    found = pl.pallas_call(
        functools.partial(_content, shape=(N, k, v)),
        grid=(B, pieces, *blocks),
        out_shape=[whole] if pieces == 1 else [sums, sums, products],
        name="content",
        **options,
    )(key, val, bias)
    if pieces == 1:
        return found[0]
    return pl.pallas_call(
        functools.partial(_joined_content, pieces=pieces, k=k, v=v),
        grid=(B, *blocks),
        out_shape=whole,
        name="content_joined",
        **options,
    )(*found, bias)


Sums = tuple[Array, Array, Array]  # max of the keys, Σ exp(key - max), Σ exp(key - max) val


def _content(
    key_ref: Array, val_ref: Array, bias_ref: Array, *out_refs: Array, shape: tuple[int, int, int]
) -> None:
    """Sums over one piece of the map for a block of λc, or λc + b itself if there is but one piece."""
    N, k, v = shape
    b, piece = pl.program_id(0), pl.program_id(1)
    ks = pl.program_id(2) * BLOCK_K + jnp.arange(BLOCK_K)
    vs = pl.program_id(3) * BLOCK_V + jnp.arange(BLOCK_V)
    in_k, in_v = ks < k, vs < v

    def body(step: Array, sums: Sums) -> Sums:
        n = piece * PIECE + step * ROWS + jnp.arange(ROWS)
        on_map = (n < N)[:, None]
        key = triton.load(key_ref.at[b, n[:, None], ks[None]], mask=on_map & in_k[None], other=-jnp.inf)
        key = key.astype(jnp.float32)
        val = triton.load(val_ref.at[b, n[:, None], vs[None]], mask=on_map & in_v[None], other=0)
        largest = jnp.maximum(key.max(0), LOWEST)  # where there are none: -inf - -inf is no number
        weights = jnp.exp(key - largest[None])
        return _with(
            sums, (largest, weights.sum(0), triton.dot(weights.astype(val.dtype), val, trans_a=True))
        )

    largest, total, weighted = lax.fori_loop(0, pl.cdiv(min(PIECE, N), ROWS), body, _nothing())
    inside = in_k[:, None] & in_v[None]
    if len(out_refs) == 1:
        _store_content(out_refs[0], bias_ref, (b, ks, vs), (in_k, inside), total, weighted)
        return
    largest_ref, total_ref, weighted_ref = out_refs
    triton.store(largest_ref.at[b, piece, ks], largest, mask=in_k)
    triton.store(total_ref.at[b, piece, ks], total, mask=in_k)
    triton.store(weighted_ref.at[b, piece, ks[:, None], vs[None]], weighted, mask=inside)


def _joined_content(
    largest_ref: Array,
    total_ref: Array,
    weighted_ref: Array,
    bias_ref: Array,
    out_ref: Array,
    *,
    pieces: int,
    k: int,
    v: int,
) -> None:
    """All pieces of a block of λc together."""
    b = pl.program_id(0)
    ks = pl.program_id(1) * BLOCK_K + jnp.arange(BLOCK_K)
    vs = pl.program_id(2) * BLOCK_V + jnp.arange(BLOCK_V)
    in_k, inside = ks < k, (ks < k)[:, None] & (vs < v)[None]

    def body(piece: Array, sums: Sums) -> Sums:
        largest, total = (
            triton.load(ref.at[b, piece, ks], mask=in_k, other=0) for ref in (largest_ref, total_ref)
        )
        weighted = triton.load(weighted_ref.at[b, piece, ks[:, None], vs[None]], mask=inside, other=0)
        return _with(sums, (largest, total, weighted))

    _, total, weighted = lax.fori_loop(0, pieces, body, _nothing())
    _store_content(out_ref, bias_ref, (b, ks, vs), (in_k, inside), total, weighted)


def _nothing() -> Sums:
    return (
        jnp.full(BLOCK_K, LOWEST, jnp.float32),
        jnp.zeros(BLOCK_K, jnp.float32),
        jnp.zeros((BLOCK_K, BLOCK_V), jnp.float32),
    )


def _with(sums: Sums, more: Sums) -> Sums:
    """Sums over two parts of the map as sums over both."""
    largest = jnp.maximum(sums[0], more[0])
    scales = jnp.exp(sums[0] - largest), jnp.exp(more[0] - largest)
    total = scales[0] * sums[1] + scales[1] * more[1]
    weighted = scales[0][:, None] * sums[2] + scales[1][:, None] * more[2]
    return largest, total, weighted


def _store_content(
    out_ref: Array,
    bias_ref: Array,
    place: tuple[Array, ...],
    masks: tuple[Array, Array],
    total: Array,
    weighted: Array,
) -> None:
    b, ks, vs = place
    in_k, inside = masks
    bias = triton.load(bias_ref.at[ks], mask=in_k, other=0).astype(jnp.float32)
    out = weighted / jnp.where(in_k, total, 1)[:, None] + bias[:, None]
    triton.store(out_ref.at[b, ks[:, None], vs[None]], out.astype(out_ref.dtype), mask=inside)


def _apply(
    a_ref: Array,
    q_ref: Array,
    val_ref: Array,
    content_ref: Array,
    *refs: Array,
    shape: tuple[int, ...],
    p: int,
    columns: int,
) -> None:
    """`columns` positions of one row, all heads, a block of v; rows of its products are (position, head)."""
    H, W, h, k, v = shape
    *add_refs, out_ref = refs
    b, y, tile = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    vs = pl.program_id(3) * BLOCK_V + jnp.arange(BLOCK_V)
    in_v = vs < v
    row = jnp.arange(columns * h)
    x, head = tile * columns + row // h, row % h
    on_map = x < W
    # Columns that any of the windows reaches: from p//2 before the tile to p//2 behind it.
    reach = jnp.arange(power_of_two(columns + p - 1))
    column = tile * columns + reach - p // 2
    e = reach[None] - (row // h)[:, None]  # where a column lies in a position's window
    in_window = (e >= 0) & (e < p) & on_map[:, None]
    in_map = (column >= 0) & (column < W)

    total = jnp.zeros((columns * h, BLOCK_V), jnp.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + jnp.arange(BLOCK_K)
        q = triton.load(
            q_ref.at[b, y, x[:, None], head[:, None], ks[None]],
            mask=on_map[:, None] & (ks < k)[None],
            other=0,
        )
        content = triton.load(
            content_ref.at[b, ks[:, None], vs[None]], mask=(ks < k)[:, None] & in_v[None], other=0
        )
        total += triton.dot(q, content)

    def body(d: Array, total: Array) -> Array:
        line = y + d - p // 2
        a = triton.load(a_ref.at[b, y, x[:, None], head[:, None], d, e], mask=in_window, other=0)
        val = triton.load(
            val_ref.at[b, line, column[:, None], vs[None]],
            mask=((line >= 0) & (line < H)) & in_map[:, None] & in_v[None],
            other=0,
        )
        return total + triton.dot(a, val)

    total = lax.fori_loop(0, p, body, total)
    place, inside = (b, y, x[:, None], head[:, None], vs[None]), on_map[:, None] & in_v[None]
    for ref in add_refs:
        total += triton.load(ref.at[place], mask=inside, other=0).astype(jnp.float32)
    triton.store(out_ref.at[place], total.astype(out_ref.dtype), mask=inside)
