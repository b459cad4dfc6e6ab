"""Local-λ on a GPU, and its gradients, without λp or the banded map in memory.

    Y[x,h,v] = Σ_k q[x,h,k] (λc[k,v] + b[k]) + Σ_d Σ_s A[x,h,d,s-x] val[y+d,s,v]
    A[x,h,d,e] = Σ_k q[x,h,k] w[d,e,k]

A, the queries on the window's weights, is one matrix product (XLA's) and N·h·p·p numbers. Where other forms
spread it over the columns s of each row first (`position_term`, "banded"), the kernel reads it at the shifted
address. Backwards it writes there,

    dA[x,h,d,e] = Σ_v dY[x,h,v] val[y+d,x+e,v]          dval[y+d,s,v] = Σ_xh A[x,h,d,s-x] dY[x,h,v]

and the other gradients are matrix products of dA, dY and q.
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

Query = Float[Array, "B H W hk"]
Value = Float[Array, "B H W v"]
Window = Float[Array, "lanes k"]
Content = Float[Array, "B k v"]
Output = Float[Array, "B H W hv"]
OnWindow = Float[Array, "B H W h p e"]

COLUMNS = 16  # positions of a row that one program works on
BLOCK_K, BLOCK_V = 32, 64
ROWS = 128  # pairs of a position and a head at a time, of a sum over both


def local_lambda(
    q: Query,
    val: Value,
    window: Window,
    content: Content,
    *add: Output,
    heads: int,
    side: int,
    dtype: Dtype,
    interpret: bool = False,
) -> Output:
    """Y of Local-λ, content and position term.

    Args:
        q, val: queries, all heads of a position in one row, and values.
        window: what `packed_window` makes of the position convolution's kernel; of the dtype of `q`.
        content: λc + b, b added to each of λc's columns; of the dtype of `q`.
        add: maps that are added to the result.
        heads: h, a power of two.
        side: of the window, odd.
        dtype: of the result; sums are taken in fp32.
        interpret: run the kernel as Python would, on any machine.
    """
    B, H, W, channels = q.shape
    k, v = channels // heads, val.shape[-1]
    q, *add = (a.reshape(B, H, W, heads, -1) for a in (q, *add))
    y = pl.pallas_call(
        functools.partial(_apply, shape=(H, W, heads, k, v), p=side),
        grid=(B, H, pl.cdiv(W, COLUMNS), pl.cdiv(v, BLOCK_V)),
        out_shape=jax.ShapeDtypeStruct((B, H, W, heads, v), dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="local_lambda",
    )(_on_window(q, window, side), q, val, content, *add)
    return y.reshape(B, H, W, -1)


def local_lambda_gradient(
    q: Query,
    val: Value,
    window: Window,
    content: Content,
    cotangent: Output,
    *,
    heads: int,
    side: int,
    interpret: bool = False,
) -> tuple[Query, Value, Float[Array, "1 lanes k"], Content]:
    """Gradients of q, val, the window (one sum for all items of the batch) and content; the last two fp32."""
    B, H, W, channels = q.shape
    v = val.shape[-1]
    q, cotangent = (a.reshape(B, H, W, heads, -1) for a in (q, cotangent.astype(q.dtype)))
    on_window = _on_window(q, window, side)
    tiles = pl.cdiv(W, COLUMNS)
    options = {"interpret": interpret, "compiler_params": triton.CompilerParams(num_warps=4, num_stages=3)}
    on_window_gradient = pl.pallas_call(
        functools.partial(_differentiate_on_window, shape=(H, W, heads, v), p=side),
        grid=(B, H, tiles),
        out_shape=jax.ShapeDtypeStruct(on_window.shape, q.dtype),
        name="on_window_gradient",
        **options,
    )(cotangent, val)
    val_gradient = pl.pallas_call(
        functools.partial(_differentiate_val, shape=(H, W, heads, v), p=side),
        grid=(B, H, tiles, pl.cdiv(v, BLOCK_V)),
        out_shape=jax.ShapeDtypeStruct(val.shape, val.dtype),
        name="val_gradient",
        **options,
    )(on_window, cotangent)
    on_window_gradient = on_window_gradient.reshape(B, H, W, heads, -1)
    q_gradient = jnp.einsum("byxhe,ek->byxhk", on_window_gradient, window)
    q_gradient += jnp.einsum("byxhv,bkv->byxhk", cotangent, content)
    summed = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    return (
        q_gradient.reshape(B, H, W, channels),
        val_gradient,
        summed("byxhe,byxhk->ek", on_window_gradient, q)[None],
        summed("byxhk,byxhv->bkv", q, cotangent),
    )


def packed_window(kernel: Float[Array, "p p k"]) -> Window:
    """The kernel's rows of offsets padded, so that those of A are aligned in memory, and below each other."""
    p, _, k = kernel.shape
    return jnp.pad(kernel, ((0, 0), (0, power_of_two(p) - p), (0, 0))).reshape(-1, k)


def _on_window(q: Float[Array, "B H W h k"], window: Window, side: int) -> OnWindow:
    """A."""
    return jnp.einsum("byxhk,ek->byxhe", q, window).reshape(*q.shape[:4], side, -1)


class _Positions:
    """Some positions of one row with all heads, a row of the products each, and the columns they reach.

    Attributes:
        b, y: item and row of this program.
        x, head: of each row of its products; `on_map` says whether there is such a position.
        e: where each column lies in a position's window; `in_window`, whether it does: within `width`.
    """

    def __init__(self, H: int, W: int, heads: int, p: int, *, width: int) -> None:
        self.H, self.p = H, p
        self.b, self.y, tile = (pl.program_id(i) for i in range(3))
        row = jnp.arange(COLUMNS * heads)
        self.x, self.head = tile * COLUMNS + row // heads, row % heads
        self.on_map = self.x < W
        # From p//2 before the tile on.
        reach = jnp.arange(power_of_two(COLUMNS + width - 1))
        self.column = tile * COLUMNS + reach - p // 2
        self.in_row = (self.column >= 0) & (self.column < W)
        self.e = reach[None] - (row // heads)[:, None]
        self.in_window = (self.e >= 0) & (self.e < width) & self.on_map[:, None]

    def on_window(self, d: Array) -> tuple[Array, ...]:
        """The place in A of every position's columns in row d of its window."""
        return self.b, self.y, self.x[:, None], self.head[:, None], d, self.e

    def values(self, val_ref: Array, d: Array, vs: Array) -> Float[Array, "s v"]:
        """Of the columns in row d of the window, zeros beyond the map."""
        line = self.y + d - self.p // 2
        inside = ((line >= 0) & (line < self.H)) & self.in_row[:, None] & (vs < val_ref.shape[-1])[None]
        return triton.load(val_ref.at[self.b, line, self.column[:, None], vs[None]], mask=inside, other=0)


def _apply(
    a_ref: Array,
    q_ref: Array,
    val_ref: Array,
    content_ref: Array,
    *refs: Array,
    shape: tuple[int, ...],
    p: int,
) -> None:
    """Some positions of one row, all heads, a block of v; rows of its products are (position, head)."""
    H, W, h, k, v = shape
    *add_refs, out_ref = refs
    own = _Positions(H, W, h, p, width=p)
    b, y, x, head, on_map = own.b, own.y, own.x, own.head, own.on_map
    vs = pl.program_id(3) * BLOCK_V + jnp.arange(BLOCK_V)
    in_v = vs < v

    total = jnp.zeros((COLUMNS * h, BLOCK_V), jnp.float32)
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
        a = triton.load(a_ref.at[own.on_window(d)], mask=own.in_window, other=0)
        return total + triton.dot(a, own.values(val_ref, d, vs))

    total = lax.fori_loop(0, p, body, total)
    place, inside = (b, y, x[:, None], head[:, None], vs[None]), on_map[:, None] & in_v[None]
    for ref in add_refs:
        total += triton.load(ref.at[place], mask=inside, other=0).astype(jnp.float32)
    triton.store(out_ref.at[place], total.astype(out_ref.dtype), mask=inside)


def _differentiate_on_window(
    cotangent_ref: Array, val_ref: Array, out_ref: Array, *, shape: tuple[int, ...], p: int
) -> None:
    """dA of some positions of one row, all heads; rows of its products are (position, head)."""
    H, W, h, v = shape
    own = _Positions(H, W, h, p, width=power_of_two(p))  # padding too, for which the packed window has zeros
    blocks = [start + jnp.arange(BLOCK_V) for start in range(0, v, BLOCK_V)]
    cotangents = [
        triton.load(
            cotangent_ref.at[own.b, own.y, own.x[:, None], own.head[:, None], vs[None]],
            mask=own.on_map[:, None] & (vs < v)[None],
            other=0,
        )
        for vs in blocks
    ]

    def body(d: Array, _: None) -> None:
        total = jnp.zeros(own.e.shape, jnp.float32)
        for vs, cotangent in zip(blocks, cotangents, strict=True):
            total += triton.dot(cotangent, own.values(val_ref, d, vs), trans_b=True)
        triton.store(out_ref.at[own.on_window(d)], total.astype(out_ref.dtype), mask=own.in_window)

    lax.fori_loop(0, p, body, None)


def _differentiate_val(
    a_ref: Array, cotangent_ref: Array, out_ref: Array, *, shape: tuple[int, ...], p: int
) -> None:
    """dval of some columns of one row, a block of v; rows of its products are (position, head)."""
    H, W, h, v = shape
    b, y, tile = (pl.program_id(i) for i in range(3))
    vs = pl.program_id(3) * BLOCK_V + jnp.arange(BLOCK_V)
    in_v = vs < v
    place = jnp.arange(COLUMNS)
    column = tile * COLUMNS + place
    # Positions whose windows reach any of the columns, and as many heads as there is room for.
    positions = power_of_two(COLUMNS + p - 1)
    at_once = max(1, min(h, ROWS // positions))
    row = jnp.arange(positions * at_once)
    reach, own_head = row // at_once, row % at_once
    parts = h // at_once
    x = tile * COLUMNS + reach - p // 2
    e = place[None] - reach[:, None] + 2 * (p // 2)
    in_map = (x >= 0) & (x < W)
    in_window = (e >= 0) & (e < p) & in_map[:, None]

    def body(step: Array, total: Array) -> Array:
        d = step // parts
        head = (step - d * parts) * at_once + own_head  # Pallas cannot translate % here
        line = y - d + p // 2
        on_map = (line >= 0) & (line < H)
        a = triton.load(a_ref.at[b, line, x[:, None], head[:, None], d, e], mask=on_map & in_window, other=0)
        cotangent = triton.load(
            cotangent_ref.at[b, line, x[:, None], head[:, None], vs[None]],
            mask=on_map & in_map[:, None] & in_v[None],
            other=0,
        )
        return total + triton.dot(a, cotangent, trans_a=True)

    steps = p * parts
    total = lax.fori_loop(0, steps, body, jnp.zeros((COLUMNS, BLOCK_V), jnp.float32))
    inside = (column < W)[:, None] & in_v[None]
    triton.store(out_ref.at[b, y, column[:, None], vs[None]], total.astype(out_ref.dtype), mask=inside)
