"""Softmax attention to the context tokens, the teacher's cross mixer."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moebius_jax.models.linear import Linear
from moebius_jax.models.parts import BlockSizes, Part
from moebius_jax.models.precision import Precision
from moebius_jax.models.released import Table

Tokens = tuple[Float[Array, "B L h d"], Float[Array, "B L h d"]]


class CrossAttention(Part):
    """Multi-head attention, scale (C/h)^-½; only the output projection has a bias."""

    RELEASED: ClassVar[Table] = {"to_out": "to_out.0"}
    READERS: ClassVar[tuple[str, ...]] = ("to_q",)
    LANDMARK: ClassVar[str] = "to_out.0.weight"

    def __init__(self, sizes: BlockSizes, *, precision: Precision, rngs: nnx.Rngs) -> None:
        channels, common = sizes.channels, {"precision": precision, "rngs": rngs}
        self.to_q = Linear(channels, channels, use_bias=False, **common)
        self.to_k = Linear(sizes.context_dim, channels, use_bias=False, **common)
        self.to_v = Linear(sizes.context_dim, channels, use_bias=False, **common)
        self.to_out = Linear(channels, channels, **common)
        self.num_heads = sizes.num_heads
        self.dtype = precision.dtype

    def prepare(self, context: Float[Array, "B L D"]) -> Tokens:
        """Keys and values."""
        key, val = (
            y.astype(self.dtype).reshape(*y.shape[:2], self.num_heads, -1)
            for y in (self.to_k(context), self.to_v(context))
        )
        return key, val

    def __call__(self, x: Float[Array, "B H W C"], tokens: Tokens) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        h, depth = self.num_heads, C // self.num_heads
        key, val = tokens
        q = (self.to_q(x) * depth**-0.5).astype(self.dtype).reshape(B, -1, h, depth)
        logits = jnp.einsum("bnhd,blhd->bhnl", q, key).astype(jnp.float32)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        return self.to_out(jnp.einsum("bhnl,blhd->bnhd", weights, val).reshape(B, H, W, C))
