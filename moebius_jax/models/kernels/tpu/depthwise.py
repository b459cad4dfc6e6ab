"""3x3 depthwise convolution on a TPU, and its gradients: every map is read once.

    Y[b,y,x,c] = Σ_ij k[i,j,c] x[b,y+i-1,x+j-1,c] + bias[c]

A program has 128 channels of one whole map and goes down its rows, with the row above and the row itself at
hand in fp32 from the step before. Columns are summed over i first, so that only two sums a row are shifted.
"""

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from moebius_jax.models.kernels.tpu.memory import MOST, SPARE, block_bytes, compiler_params

Map = Float[Array, "B H W C"]
Kernel = Float[Array, "3 3 C"]
Row = Float[Array, "W c"]

CHANNELS = 128  # of a program: the lanes of a register
UNROLLED = 4  # rows; what is carried from row to row is not copied within them
SUMS = 16  # rows of the gradient's sums: nine taps, the bias, and what a tile is filled up with


def depthwise(
    x: Map, kernel: Kernel, bias: Float[Array, " C"], *, dtype: Dtype, interpret: bool = False
) -> Map:
    """The convolution with padding 1, summed in fp32, the result in `dtype`; W a multiple of 8."""
    B, H, W, C = x.shape
    return pl.pallas_call(
        _convolve,
        grid=(B, pl.cdiv(C, CHANNELS)),
        in_specs=[_map_block(x), _block(3, 3), _block(1)],
        out_specs=_map_block(x),
        out_shape=jax.ShapeDtypeStruct((B, H, W, C), dtype),
        compiler_params=_room(x.shape, x.dtype, dtype),
        interpret=interpret,
        name="depthwise",
    )(x, kernel, bias[None])


def depthwise_gradient(
    x: Map, cotangent: Map, kernel: Kernel, *, interpret: bool = False
) -> tuple[Map, Float[Array, "B 16 C"]]:
    """Of x, in its dtype; and sums over each map in fp32: nine of the kernel, the bias', and zeros."""
    B, _, _, C = x.shape
    return pl.pallas_call(
        _differentiate,
        grid=(B, pl.cdiv(C, CHANNELS)),
        in_specs=[_map_block(x), _map_block(x), _block(3, 3)],
        out_specs=[_map_block(x), pl.BlockSpec((1, SUMS, CHANNELS), lambda b, c: (b, 0, c))],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((B, SUMS, C), jnp.float32),
        ],
        compiler_params=_room(x.shape, x.dtype, x.dtype, cotangent.dtype),
        interpret=interpret,
        name="depthwise_gradient",
    )(x, cotangent, kernel)


def fits(shape: tuple[int, ...], dtype: Dtype) -> bool:
    """Whether maps of [B, H, W, C] can be worked on: whole registers to a row, three maps in memory."""
    *_, W, _ = shape
    return W % 8 == 0 and _blocks(shape, dtype, dtype, dtype) + SPARE <= MOST


def _blocks(shape: tuple[int, ...], *dtypes: Dtype) -> int:
    _, H, W, _ = shape
    return sum(block_bytes((H, W, CHANNELS), dtype) for dtype in dtypes)


def _room(shape: tuple[int, ...], *dtypes: Dtype) -> pltpu.CompilerParams:
    return compiler_params(_blocks(shape, *dtypes), dimension_semantics=("parallel", "parallel"))


def _map_block(x: Map) -> pl.BlockSpec:
    _, H, W, _ = x.shape
    return pl.BlockSpec((1, H, W, CHANNELS), lambda b, c: (b, 0, 0, c))


def _block(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((*shape, CHANNELS), lambda _, c: (*(0 for _ in shape), c))


def _from_left(row: Row) -> Row:
    """Each position's neighbour on the left, zero at the edge."""
    return jnp.where(_positions(row) == 0, 0.0, pltpu.roll(row, 1, 0))


def _from_right(row: Row) -> Row:
    last = len(row) - 1
    return jnp.where(_positions(row) == last, 0.0, pltpu.roll(row, last, 0))


def _positions(row: Row) -> Array:
    return lax.broadcasted_iota(jnp.int32, row.shape, 0)


def _load(ref: Array, y: Array | int) -> Row:
    """Row y of a map in fp32, zeros below the last."""
    H = ref.shape[1]
    row = ref[0, jnp.minimum(y, H - 1)].astype(jnp.float32)
    return jnp.where(y < H, row, 0.0)


def _convolve(x_ref: Array, kernel_ref: Array, bias_ref: Array, out_ref: Array) -> None:
    kernel, bias = kernel_ref[...], bias_ref[...]

    def body(y: Array, rows: tuple[Row, Row]) -> tuple[Row, Row]:
        above, here = rows
        below = _load(x_ref, y + 1)
        left, middle, right = (
            above * kernel[0, j] + here * kernel[1, j] + below * kernel[2, j] for j in range(3)
        )
        out_ref[0, y] = (middle + _from_left(left) + _from_right(right) + bias).astype(out_ref.dtype)
        return here, below

    first = _load(x_ref, 0)
    lax.fori_loop(0, x_ref.shape[1], body, (jnp.zeros_like(first), first), unroll=_unrolled(x_ref))


def _differentiate(
    x_ref: Array, cotangent_ref: Array, kernel_ref: Array, x_out_ref: Array, sums_ref: Array
) -> None:
    kernel = kernel_ref[...]
    _, H, _, C = x_ref.shape

    def body(y: Array, carry: tuple[tuple[Row, ...], tuple[Array, ...]]) -> tuple[tuple, tuple]:
        (x_above, x_here, above, here), sums = carry
        x_below, below = (_load(ref, y + 1) for ref in (x_ref, cotangent_ref))
        # dx[y,x] = Σ_ij k[i,j] g[y-i+1, x-j+1]
        right, middle, left = (
            below * kernel[0, j] + here * kernel[1, j] + above * kernel[2, j] for j in range(3)
        )
        gradient = middle + _from_left(left) + _from_right(right)
        x_out_ref[0, y] = gradient.astype(x_out_ref.dtype)
        # dk[i,j] = Σ_yx x[y+i-1, x+j-1] g[y,x], with g moved instead of x
        moved = _from_right(here), here, _from_left(here)
        products = [row * g for row in (x_above, x_here, x_below) for g in moved]
        sums = tuple(total + _over_registers(a) for total, a in zip(sums, (*products, here), strict=True))
        return (x_here, x_below, here, below), sums

    x, g = _load(x_ref, 0), _load(cotangent_ref, 0)
    nothing = jnp.zeros_like(x)
    zeros = tuple(jnp.zeros((8, C), jnp.float32) for _ in range(10))
    _, sums = lax.fori_loop(0, H, body, ((nothing, x, nothing, g), zeros), unroll=_unrolled(x_ref))
    rows = [total.sum(0, keepdims=True) for total in sums]
    sums_ref[0] = jnp.concatenate([*rows, jnp.zeros((SUMS - len(rows), C), jnp.float32)])


def _over_registers(row: Row) -> Float[Array, "8 c"]:
    """The sum over a row's registers of 8 positions."""
    return row.reshape(-1, 8, row.shape[-1]).sum(0)


def _unrolled(x_ref: Array) -> int:
    return UNROLLED if x_ref.shape[1] % UNROLLED == 0 else 1
