"""Gradient of a 3x3 depthwise convolution's kernel on a GPU: both maps are read once.

    G[i,j,c] = Σ_byx x[b,y+i-1,x+j-1,c] g[b,y,x,c]

XLA makes nine reductions of it, one for each tap, each of which reads both maps.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

Map = Float[Array, "B H W C"]

POSITIONS, CHANNELS = 16, 64  # of a tile, nine of which are summed in registers
TILES = 16  # that a program works through


def depthwise_sums(x: Map, cotangent: Map, *, interpret: bool = False) -> Float[Array, "B p 9 C"]:
    """G in pieces of each image, fp32: it is their sum over the first two axes."""
    B, H, W, C = x.shape
    pieces = pl.cdiv(H * W, POSITIONS * TILES)
    return pl.pallas_call(
        _kernel,
        grid=(pieces, pl.cdiv(C, CHANNELS), B),
        out_shape=jax.ShapeDtypeStruct((B, pieces, 9, C), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="depthwise_sums",
    )(x, cotangent)


def _kernel(x_ref: Array, cotangent_ref: Array, out_ref: Array) -> None:
    _, H, W, C = x_ref.shape
    piece, b = pl.program_id(0), pl.program_id(2)
    channel = pl.program_id(1) * CHANNELS + jnp.arange(CHANNELS)

    def loaded(ref: Array, y: Array, x: Array) -> Array:
        inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
        mask = inside[:, None] & (channel < C)[None]
        at = ref.at[b, y[:, None], x[:, None], channel[None]]
        return triton.load(at, mask=mask, other=0).astype(jnp.float32)

    def body(tile: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        n = (piece * TILES + tile) * POSITIONS + jnp.arange(POSITIONS)
        y, x = n // W, n % W
        cotangent = loaded(cotangent_ref, y, x)
        taps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        return tuple(
            total + loaded(x_ref, y + i, x + j) * cotangent
            for total, (i, j) in zip(totals, taps, strict=True)
        )

    zero = jnp.zeros((POSITIONS, CHANNELS), jnp.float32)
    totals = lax.fori_loop(0, TILES, body, (zero,) * 9)
    for tap, total in enumerate(totals):
        triton.store(out_ref.at[b, piece, tap, channel], total.sum(0), mask=channel < C)
