"""λc of Local-λ on a GPU: a softmax over the whole map and its product with the values, in one pass.

    λc[k,v] = Σ_n softmax_n(key)[k,n] val[v,n]

Programs sum over pieces of the map, each from its own largest key on; then the pieces' sums are joined.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

Key = Float[Array, "B H W k"]
Value = Float[Array, "B H W v"]

BLOCK_K, BLOCK_V = 32, 64
ROWS = 256  # positions at a time
PIECE = 1024  # positions that one program sums over
LOWEST = -1e30  # below every key


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
