"""Local-λ's position term: one function, four orders of evaluation.

Every order computes (docs/model.md, "Local-λ"; einsum letters as there)

    λp[k,v,n] = Σ_δ w[δ,k] val[v, n+δ] + b[k]        Y[h,v,n] = Σ_k q[h,k,n] λp[k,v,n]

over a window of p x p offsets δ with zeros outside the map. `conv3d` is the paper's grouped 3-D
convolution. The product is linear in q and in val, so the sums may be taken in any order; what differs
is the size of what lies in memory in between:

    conv3d, toeplitz   λp, N·k·v per image
    banded             q·w on p rows of the map, N·h·p·W
    tiles              q·w on what a tile of t x t positions sees, N·h·(t+p-1)²

Two-dimensional convolutions with v in the batch or as groups, and q·w spread over the whole map, were
measured too and did not pay (benchmarks/RESULTS.md).

Maps are [B, H, W, ...]; N = H·W, n = (y, x).
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moebius_jax.models.parts import PositionOrder

Query = Float[Array, "B H W h k"]
Value = Float[Array, "B H W v"]
Kernel = Float[Array, "p p k"]
Bias = Float[Array, " k"]
Output = Float[Array, "B H W h v"]
Lambdas = Float[Array, "B v H W k"]
Band = Float[Array, "p W W k"]
Table = Float[Array, "t t k S"]

TILE = 4  # t; of 2, 4 and 8 the fastest on CPUs


def position_term(
    q: Query, val: Value, kernel: Kernel, bias: Bias, order: PositionOrder, *, packed: Array | None = None
) -> Output:
    """Y of the position term, by the given order.

    Args:
        q: queries [B, H, W, h, k].
        val: values [B, H, W, v], one for all heads.
        kernel: window weights w [p, p, k], first axis rows; cross-correlation, p odd.
        bias: b [k].
        order: one of the names in the module's docstring (not "auto", see `forms.position_order`, nor
            "fused", which is all of Local-λ: `kernels.gpu.local_lambda`, or `tpu`).
        packed: what `packed_kernel` makes of `kernel`, where it is there already.

    Returns:
        [B, H, W, h, v] in the dtype of `q`.

    Raises:
        ValueError: another order.
    """
    if order == "conv3d":
        return _times(q, conv3d(val, kernel) + bias)
    if packed is None:
        packed = packed_kernel(kernel, order, val.shape[2])
    if order == "toeplitz":
        return _times(q, _toeplitz(val, packed) + bias)
    y = _banded(q, val, packed) if order == "banded" else _in_tiles(q, val, packed)
    # The bias meets every v alike, so it enters as one number per query.
    return y + jnp.einsum("byxhk,k->byxh", q, bias)[..., None]


def packed_kernel(kernel: Kernel, order: PositionOrder, width: int) -> Band | Table:
    """The window's weights as "toeplitz", "banded" or "tiles" reads them, of a map of this width.

    Raises:
        ValueError: another order.
    """
    if order == "tiles":
        return tiled_kernel(kernel)
    if order in ("toeplitz", "banded"):
        return banded_kernel(kernel, width)
    raise ValueError(f"the position term has no order {order!r} of its own")


def _times(q: Query, lambdas: Lambdas) -> Output:
    return jnp.einsum("byxhk,bvyxk->byxhv", q, lambdas)


def conv3d(val: Value, kernel: Kernel) -> Lambdas:
    """The paper's form: val as a one-channel [v, H, W] volume, kernel 1 x p x p."""
    p = kernel.shape[0]
    return lax.conv_general_dilated(
        jnp.moveaxis(val, -1, 1)[..., None],
        kernel[None, :, :, None, :],
        window_strides=(1, 1, 1),
        padding=((0, 0), (p // 2, p // 2), (p // 2, p // 2)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def _toeplitz(val: Value, band: Band) -> Lambdas:
    """Along x a convolution is a product with a banded matrix [p·W, W·k]."""
    return jnp.einsum("bydsv,dxsk->bvyxk", _neighbour_rows(val, len(band)), band)


def _banded(q: Query, val: Value, band: Band) -> Output:
    """q·w first, spread over the p neighbouring rows (d) of each position; then times those rows."""
    rows = _neighbour_rows(val, len(band))
    scores = jnp.einsum("byxhk,dxsk->byhxds", q, band)
    return jnp.einsum("byhxds,bydsv->byxhv", scores, rows)


def _in_tiles(q: Query, val: Value, table: Table) -> Output:
    """q·w first, on the window that a tile's positions share (i, j: its row and column); then times that."""
    t, p = TILE, math.isqrt(table.shape[-1]) - TILE + 1
    B, H, W, h, k = q.shape
    whole = [(0, 0), (0, -H % t), (0, -W % t)]  # beyond the edge there are more tiles, of zeros
    q = jnp.pad(q, [*whole, (0, 0), (0, 0)])
    windows = _tile_windows(jnp.pad(val, [*whole, (0, 0)]), p)
    scores = jnp.einsum("byixjhk,ijks->ijbyxhs", q.reshape(B, q.shape[1] // t, t, -1, t, h, k), table)
    y = jnp.einsum("ijbyxhs,byxsv->byixjhv", scores, windows)
    return y.reshape(*q.shape[:4], -1)[:, :H, :W]


def _tile_windows(val: Value, p: int) -> Float[Array, "B Y X S v"]:
    """What each tile sees: itself and p//2 positions on each side, zeros beyond the edge."""
    size = TILE + p - 1
    padded = jnp.pad(val, ((0, 0), (p // 2, p // 2), (p // 2, p // 2), (0, 0)))
    rows = jnp.stack([padded[:, y : y + size] for y in range(0, val.shape[1], TILE)], axis=1)
    windows = jnp.stack([rows[:, :, :, x : x + size] for x in range(0, val.shape[2], TILE)], axis=2)
    return windows.reshape(*windows.shape[:3], size * size, -1)


def _neighbour_rows(val: Value, p: int) -> Float[Array, "B H p W v"]:
    """For each row y, the p rows around it, zeros beyond the edge."""
    H = val.shape[1]
    padded = jnp.pad(val, ((0, 0), (p // 2, p // 2), (0, 0), (0, 0)))
    return jnp.stack([padded[:, d : d + H] for d in range(p)], axis=2)


def tiled_kernel(kernel: Kernel) -> Table:
    """table[i, j, k, s] = w[δ, k] with δ from position i, j of a tile to s of its window; zero outside."""
    before = range(TILE)
    shifted = [
        jnp.pad(kernel, ((i, TILE - 1 - i), (j, TILE - 1 - j), (0, 0))) for i in before for j in before
    ]
    k = kernel.shape[-1]
    return jnp.moveaxis(jnp.stack(shifted), -1, 1).reshape(TILE, TILE, k, -1)


def banded_kernel(kernel: Kernel, width: int) -> Band:
    """band[d, x, s, k] = w[d, s - x + p//2, k], zero outside the window."""
    p, _, k = kernel.shape
    return _skew(jnp.broadcast_to(kernel[:, None], (p, width, p, k)))


def _skew(windows: Float[Array, "*a n p k"]) -> Float[Array, "*a n n k"]:
    """Moves window i (along p) so that its centre lies on column i of an n-wide row.

    A row padded to n+p and read again n+p-1 wide starts one place further right each time. Pads,
    reshapes and slices only: the gradient needs no scatter.
    """
    *a, n, p, k = windows.shape
    padded = jnp.pad(windows, [(0, 0)] * (len(a) + 1) + [(0, n), (0, 0)])
    flat = padded.reshape(*a, n * (n + p), k)[..., : n * (n + p - 1), :]
    return flat.reshape(*a, n, n + p - 1, k)[..., p // 2 : p // 2 + n, :]
