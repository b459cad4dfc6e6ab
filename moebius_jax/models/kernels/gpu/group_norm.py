"""GroupNorm and an activation in two kernels: sums of pieces of the map, then the result.

XLA takes four to seven, the small ones between them costing as much as a pass over the map.
"""

import functools

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from moebius_jax.models.kernels.common import Elementwise, power_of_two

ROWS = 64  # positions of a piece
PIECES = 128  # sums of more are added up before the second kernel, each program of which reads them all
COLUMNS = 64  # channels a program works on, at least; whole groups of them


def group_norm(
    x: Float[Array, "B *n C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    groups: int,
    eps: float,
    then: Elementwise | None = None,
    dtype: Dtype,
    interpret: bool = False,
) -> Float[Array, "B *n C"]:
    """then(GroupNorm(x)), all arithmetic in fp32.

    Args:
        x: C a multiple of `groups`.
        scale, bias: of the norm.
        groups, eps: of the norm.
        then: an activation.
        dtype: of the result.
        interpret: run the kernels as Python would, on any machine.
    """
    B, C = len(x), x.shape[-1]
    rows = x.reshape(B, -1, C)
    N, width = rows.shape[1], C // groups
    block = max(COLUMNS, power_of_two(width))
    used = min(groups, block // width) * width  # whole groups
    pieces = pl.cdiv(N, ROWS)
    sizes = {"N": N, "C": C, "width": width, "block": block, "used": used}
    options = {"interpret": interpret, "compiler_params": triton.CompilerParams(num_warps=4, num_stages=2)}
    # Distances from the group's first number, so that no mean, however large, swallows the variance.
    sums = pl.pallas_call(
        functools.partial(_sums, **sizes),
        grid=(B, pieces, pl.cdiv(C, used)),
        out_shape=jax.ShapeDtypeStruct((B, pieces, 2, C), jnp.float32),
        name="group_sums",
        **options,
    )(rows)
    if pieces > PIECES:
        sums = sums.sum(1, keepdims=True)
    return pl.pallas_call(
        functools.partial(_normalise, **sizes, pieces=sums.shape[1], eps=eps, then=then),
        grid=(B, pieces, pl.cdiv(C, used)),
        out_shape=jax.ShapeDtypeStruct((B, N, C), dtype),
        name="group_norm",
        **options,
    )(rows, sums, scale, bias).reshape(x.shape)


def _block(x_ref: Array, *, N: int, C: int, width: int, block: int, used: int) -> tuple[Array, ...]:
    """This program's numbers as distances from the first of their group; and where they are."""
    b, piece = pl.program_id(0), pl.program_id(1)
    column = jnp.arange(block)
    channel = pl.program_id(2) * used + column
    row = piece * ROWS + jnp.arange(ROWS)
    is_channel = (column < used) & (channel < C)
    inside = (row < N)[:, None] & is_channel[None]
    x = triton.load(x_ref.at[b, row[:, None], channel[None]], mask=inside, other=0).astype(jnp.float32)
    first = triton.load(x_ref.at[b, 0, channel // width * width], mask=is_channel, other=0)
    first = first.astype(jnp.float32)
    return jnp.where(inside, x - first[None], 0), row, channel, is_channel, inside


def _sums(x_ref: Array, out_ref: Array, **sizes: int) -> None:
    """Of each channel in one piece of the map: Σ and Σ of squares."""
    b, piece = pl.program_id(0), pl.program_id(1)
    x, _, channel, is_channel, _ = _block(x_ref, **sizes)
    triton.store(out_ref.at[b, piece, 0, channel], x.sum(0), mask=is_channel)
    triton.store(out_ref.at[b, piece, 1, channel], (x * x).sum(0), mask=is_channel)


def _normalise(
    x_ref: Array,
    sums_ref: Array,
    scale_ref: Array,
    bias_ref: Array,
    out_ref: Array,
    *,
    pieces: int,
    eps: float,
    then: Elementwise | None,
    **sizes: int,
) -> None:
    b = pl.program_id(0)
    x, row, channel, is_channel, inside = _block(x_ref, **sizes)
    every = jnp.arange(power_of_two(pieces))
    group = channel // sizes["width"]
    same_group = (group[:, None] == group[None]).astype(jnp.float32)

    def mean(which: int) -> Array:
        mask = (every < pieces)[:, None] & is_channel[None]
        sums = triton.load(sums_ref.at[b, every[:, None], which, channel[None]], mask=mask, other=0)
        of_group = (sums.sum(0)[:, None] * same_group).sum(0)
        return of_group / (sizes["N"] * sizes["width"])

    average = mean(0)
    variance = jnp.maximum(mean(1) - average * average, 0)
    scale = triton.load(scale_ref.at[channel], mask=is_channel, other=0).astype(jnp.float32)
    bias = triton.load(bias_ref.at[channel], mask=is_channel, other=0).astype(jnp.float32)
    y = (x - average[None]) * (jax.lax.rsqrt(variance + eps) * scale)[None] + bias[None]
    if then is not None:
        y = then(y)
    triton.store(out_ref.at[b, row[:, None], channel[None]], y.astype(out_ref.dtype), mask=inside)
