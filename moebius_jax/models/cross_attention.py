"""Softmax attention to the context tokens, the teacher's cross mixer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moebius_jax.models.config import UNetConfig
from moebius_jax.models.linear import linear
from moebius_jax.models.precision import Precision


class CrossAttention(nnx.Module):
    """Multi-head attention, scale (C/h)^-½; only the output projection has a bias (spec "Teacher parts")."""

    def __init__(self, channels: int, config: UNetConfig, *, precision: Precision, rngs: nnx.Rngs) -> None:
        common = {"precision": precision, "rngs": rngs}
        self.to_q = linear(channels, channels, use_bias=False, **common)
        self.to_k = linear(config.context_dim, channels, use_bias=False, **common)
        self.to_v = linear(config.context_dim, channels, use_bias=False, **common)
        self.to_out = linear(channels, channels, **common)
        self.num_heads = config.num_heads
        self.dtype = precision.dtype

    def __call__(self, x: Float[Array, "B H W C"], context: Float[Array, "B L D"]) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        h, depth = self.num_heads, C // self.num_heads
        q, key, val = (
            y.astype(self.dtype).reshape(B, -1, h, depth)
            for y in (self.to_q(x) * depth**-0.5, self.to_k(context), self.to_v(context))
        )
        logits = jnp.einsum("bnhd,blhd->bhnl", q, key).astype(jnp.float32)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        return self.to_out(jnp.einsum("bhnl,blhd->bnhd", weights, val).reshape(B, H, W, C))
