"""Local-λ on a TPU, and its gradients: nothing larger than q is ever in memory.

    Y[x,h,v] = Σ_k q[x,h,k] (λc[k,v] + b[k]) + Σ_d Σ_s A[x,h,d,s-x] val[y+d,s,v]
    A[x,h,d,e] = Σ_k q[x,h,k] w[d,e,k]

A row of the map is taken in strips of 16 columns, whose windows of 15 reach over less than 32 columns s, so
that four rows d of a strip's A fill the 128 lanes of a register. Rolling the lanes of position x by x moves
offset e to column s: A is what the values are to be multiplied with, at the price of no multiplications.

Backwards, with G[x,h,d,e] = Σ_v dY[x,h,v] val[y+d,x+e,v],

    dq[x,h,k] = Σ_v dY[x,h,v] (λc[k,v] + b[k]) + Σ_de G[x,h,d,e] w[d,e,k]
    dw[d,e,k] = Σ_xh G[x,h,d,e] q[x,h,k]        dval[y+d,s,v] = Σ_xh A[x,h,d,s-x] dY[x,h,v]

Lanes roll one way only. G is therefore taken from values whose columns are in reversed order, lane 31 - s,
which end at 31 - e.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moebius_jax.models.kernels.common import dot, power_of_two
from moebius_jax.models.kernels.tpu.memory import LANES, MOST, block_bytes, compiler_params

Query = Float[Array, "B H W hk"]
Value = Float[Array, "B H W v"]
Window = Float[Array, "k lanes"]
Content = Float[Array, "B k v"]
Output = Float[Array, "B H W hv"]

STRIP = 16  # columns
ROWS = 8  # of the map, of one program


class Packing(NamedTuple):
    """How the offsets [d, e] of a window lie on lanes: products, rows d of each, columns s of a row."""

    products: int
    rows: int
    span: int

    @property
    def lanes(self) -> int:
        """Of one product."""
        return self.rows * self.span


def packing(side: int) -> Packing:
    """Of a window of side x side offsets."""
    span = power_of_two(STRIP + side - 1)
    rows = max(1, LANES // span)
    return Packing(products=-(-side // rows), rows=rows, span=span)


def packed_window(kernel: Float[Array, "p p k"]) -> Window:
    """The position convolution's kernel as the first product's right side, zeros where no offset is."""
    side, _, k = kernel.shape
    pack = packing(side)
    grown = jnp.pad(kernel, ((0, pack.products * pack.rows - side), (0, pack.span - side), (0, 0)))
    return grown.reshape(-1, k).T


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
        heads: h.
        side: of the window, odd.
        dtype: of the result; sums are taken in fp32.
        interpret: run the kernel as Python would, on any machine.
    """
    H, W = q.shape[1:3]
    pack = packing(side)
    q, *add = (_in_strips(a) for a in (q, *add))
    values = _padded_values(val, side)
    blocks = _Blocks(q, values, heads, pack)
    row, whole = blocks.row, blocks.whole
    out = heads * val.shape[-1]
    y = pl.pallas_call(
        functools.partial(_apply, pack=pack, heads=heads),
        grid=blocks.grid,
        in_specs=[
            row(q.shape[-1]),
            whole(values),
            blocks.shared(window),
            whole(content),
            *[row(out) for _ in add],
        ],
        out_specs=row(out),
        out_shape=jax.ShapeDtypeStruct((*q.shape[:3], out), dtype),
        compiler_params=blocks.room,
        interpret=interpret,
        name="local_lambda",
    )(q, values, window, content, *add)
    return y[:, :H, :W]


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
) -> tuple[Query, Value, Float[Array, "B k lanes"], Content]:
    """Gradients of q, val, the window (a sum for each item of the batch) and content; the last three fp32."""
    H, W = q.shape[1:3]
    pack, float32 = packing(side), jnp.float32
    q, cotangent, values = _in_strips(q), _in_strips(cotangent), _padded_values(val, side)
    blocks = _Blocks(q, values, heads, pack)
    row, whole = blocks.row, blocks.whole
    sums = jax.ShapeDtypeStruct(values.shape, float32)
    by_item = jax.ShapeDtypeStruct((len(q), *window.T.shape), float32)
    gradients = pl.pallas_call(
        functools.partial(_differentiate, pack=pack, heads=heads),
        grid=blocks.grid,
        in_specs=[
            row(q.shape[-1]),
            whole(values),
            *[blocks.shared(window)] * 2,
            whole(content),
            row(cotangent.shape[-1]),
        ],
        out_specs=[row(q.shape[-1]), whole(sums), whole(by_item), whole(content)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            sums,
            by_item,
            jax.ShapeDtypeStruct(content.shape, float32),
        ],
        compiler_params=blocks.room,
        interpret=interpret,
        name="local_lambda_gradient",
    )(q, values[:, :, ::-1], window, _flipped(window, pack), content, cotangent)
    q_gradient, value_sums, window_sums, content_gradient = gradients
    before = side // 2
    return (
        q_gradient[:, :H, :W],
        value_sums[:, before : before + H, before : before + W],
        _flipped(jnp.swapaxes(window_sums, 1, 2), pack),
        content_gradient,
    )


def fits(height: int, width: int, heads: int, depth: int, side: int) -> bool:
    """Whether a map of this size has room, its gradient too; the compiler knows no products of depth 1."""
    pack = packing(side)
    values = height + pack.products * pack.rows, width + STRIP + pack.span, depth
    columns = width + -width % STRIP
    return depth > 1 and _bytes(values, 1, columns, heads, depth, pack) <= MOST


def _bytes(values: tuple[int, ...], rows: int, columns: int, heads: int, depth: int, pack: Packing) -> int:
    """What a program takes, at most, in vector memory; backwards there is more at work."""
    whole = block_bytes(values, jnp.bfloat16) + block_bytes(values, jnp.float32)
    # Of the maps q; forwards what is added and the result, which may be in fp32, backwards the cotangent.
    line = rows, columns, heads * depth
    maps = block_bytes(line, jnp.bfloat16) + 2 * block_bytes(line, jnp.float32)
    # Of one row at work: A and G, before and after they are rolled, and sums over the depth.
    work = 2 * block_bytes((columns * heads, pack.lanes), jnp.float32)
    sums = 2 * block_bytes((columns * heads, depth), jnp.float32)
    weights = 4 * block_bytes((depth, pack.products * pack.lanes), jnp.float32)
    return whole + maps + work + sums + weights


def _in_strips(a: Query) -> Query:
    """The map with whole strips to a row."""
    return jnp.pad(a, ((0, 0), (0, 0), (0, -a.shape[2] % STRIP), (0, 0)))


def _padded_values(val: Value, side: int) -> Float[Array, "B Y X v"]:
    """Values with zeros wherever a row's products reach."""
    pack, before = packing(side), side // 2
    below = pack.products * pack.rows - side + before
    right = pack.span - STRIP - before + -val.shape[2] % STRIP
    return jnp.pad(val, ((0, 0), (before, below), (before, right), (0, 0)))


def _flipped(window: Float[Array, "*b k lanes"], pack: Packing) -> Float[Array, "*b k lanes"]:
    """Each row of offsets in reversed order."""
    parts = window.reshape(*window.shape[:-1], -1, pack.span)
    return parts[..., ::-1].reshape(window.shape)


class _Blocks:
    """What one program has of each array: some rows of the maps q is one of, all of the others."""

    def __init__(self, q: Query, values: Array, heads: int, pack: Packing) -> None:
        self.q = q
        B, H, W, channels = q.shape
        depth = channels // heads

        def needed(rows: int) -> int:
            return _bytes(values.shape[1:], rows, W, heads, depth, pack)

        # As many as divide the map, and fewer where it is wide.
        rows = math.gcd(H, ROWS)
        while rows > 1 and needed(rows) > MOST:
            rows //= 2
        self.rows, self.grid = rows, (B, H // rows)
        self.room = compiler_params(needed(rows), dimension_semantics=("parallel", "arbitrary"))

    def row(self, channels: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.rows, self.q.shape[2], channels), lambda b, y: (b, y, 0, 0))

    def whole(self, a: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        rest = len(a.shape) - 1
        return pl.BlockSpec((1, *a.shape[1:]), lambda b, _: (b, *(0 for _ in range(rest))))

    def shared(self, a: Array) -> pl.BlockSpec:
        return pl.BlockSpec(a.shape, lambda *_: (0, 0))


class _Row:
    """One row of the map in strips: products' rows are (strip, head, column)."""

    def __init__(self, width: int, heads: int) -> None:
        self.strips, self.heads = width // STRIP, heads

    def places(self, depth: int) -> Iterator[tuple[slice, slice]]:
        for strip in range(self.strips):
            for head in range(self.heads):
                columns = slice(strip * STRIP, (strip + 1) * STRIP)
                yield columns, slice(head * depth, (head + 1) * depth)

    def split(self, row: Float[Array, "W hk"]) -> Float[Array, "rows k"]:
        depth = row.shape[-1] // self.heads
        return jnp.concatenate([row[place] for place in self.places(depth)])

    def store(self, ref: Array, y: Array, rows: Float[Array, "rows k"]) -> None:
        for i, (columns, channels) in enumerate(self.places(rows.shape[-1])):
            ref[0, y, columns, channels] = rows[i * STRIP : (i + 1) * STRIP].astype(ref.dtype)

    def of_strip(self, rows: Float[Array, "rows n"], strip: int) -> Float[Array, "hx n"]:
        size = self.heads * STRIP
        return rows[strip * size : (strip + 1) * size]

    def rolled(self, rows: Float[Array, "rows lanes"], dtype: Dtype) -> Float[Array, "rows lanes"]:
        """The lanes of column x moved by x."""
        by_column = rows.reshape(-1, STRIP, rows.shape[-1])
        return pltpu.roll(by_column, 0, 2, stride=1, stride_axis=1).reshape(rows.shape).astype(dtype)


def _apply(
    q_ref: Array,
    val_ref: Array,
    window_ref: Array,
    content_ref: Array,
    *refs: Array,
    pack: Packing,
    heads: int,
) -> None:
    *add_refs, out_ref = refs
    rows, W = q_ref.shape[1:3]
    row, v = _Row(W, heads), val_ref.shape[-1]
    first = pl.program_id(1) * rows

    def body(i: Array, _: None) -> None:
        q = row.split(q_ref[0, i])
        y = first + i
        content = dot(q, content_ref[0])
        totals = [row.of_strip(content, strip) for strip in range(row.strips)]
        for product in range(pack.products):
            a = row.rolled(dot(q, window_ref[:, _lanes(pack, product)]), q.dtype)
            for strip in range(row.strips):
                place = 0, _below(y, product, pack), pl.ds(strip * STRIP, pack.span)
                totals[strip] += dot(row.of_strip(a, strip), val_ref[place].reshape(pack.lanes, v))
        added = (row.split(ref[0, i].astype(jnp.float32)) for ref in add_refs)
        row.store(out_ref, i, sum(added, jnp.concatenate(totals)))

    lax.fori_loop(0, rows, body, None)


def _differentiate(
    q_ref: Array,
    reversed_ref: Array,
    window_ref: Array,
    flipped_ref: Array,
    content_ref: Array,
    cotangent_ref: Array,
    q_out_ref: Array,
    val_out_ref: Array,
    window_out_ref: Array,
    content_out_ref: Array,
    *,
    pack: Packing,
    heads: int,
) -> None:
    rows, W = q_ref.shape[1:3]
    row, v = _Row(W, heads), reversed_ref.shape[-1]
    width = reversed_ref.shape[2]
    first = pl.program_id(1) * rows

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for ref in (val_out_ref, window_out_ref, content_out_ref):
            ref[...] = jnp.zeros_like(ref)

    def body(i: Array, _: None) -> None:
        q, cotangent = row.split(q_ref[0, i]), row.split(cotangent_ref[0, i])
        y = first + i
        content_out_ref[0] += dot(q, cotangent, over=(0, 0))
        total = dot(cotangent, content_ref[0], over=(1, 1))
        for product in range(pack.products):
            lanes, below = _lanes(pack, product), _below(y, product, pack)
            a = row.rolled(dot(q, window_ref[:, lanes]), q.dtype)
            g = []
            for strip in range(row.strips):
                ours, left = row.of_strip(cotangent, strip), strip * STRIP
                sums = dot(row.of_strip(a, strip), ours, over=(0, 0))
                val_out_ref[0, below, pl.ds(left, pack.span)] += sums.reshape(pack.rows, pack.span, v)
                val = reversed_ref[0, below, pl.ds(width - pack.span - left, pack.span)]
                g.append(dot(ours, val.reshape(pack.lanes, v), over=(1, 1)))
            g = row.rolled(jnp.concatenate(g), q.dtype)
            total += dot(g, flipped_ref[:, lanes], over=(1, 1))
            window_out_ref[0, lanes] += dot(g, q, over=(0, 0))
        row.store(q_out_ref, i, total)

    lax.fori_loop(0, rows, body, None)


def _lanes(pack: Packing, product: int) -> slice:
    return slice(product * pack.lanes, (product + 1) * pack.lanes)


def _below(y: Array, product: int, pack: Packing) -> pl.Slice:
    """Rows of the padded values that a product of row y reads."""
    return pl.ds(y + product * pack.rows, pack.rows)
