"""Gated linear attention (GLA), the teacher's self mixer, as a chunk-parallel scan, on GPUs as a kernel."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from moebius_jax.models import forms
from moebius_jax.models.kernels.gpu.gated_linear_attention import gated_linear_attention as fused
from moebius_jax.models.kernels.wrapped import split_over_batch, with_gradient_of
from moebius_jax.models.linear import Linear
from moebius_jax.models.norms import RMSNorm
from moebius_jax.models.parts import BlockSizes, Part
from moebius_jax.models.precision import Precision
from moebius_jax.models.released import Shapes, Table

GATE_RANK = 16  # in every release, whatever the width
GATE_TEMPERATURE = 16.0  # log α = logsigmoid(·) / 16
CHUNK = 16


def gated_linear_attention(
    q: Float[Array, "B N h k"],
    key: Float[Array, "B N h k"],
    val: Float[Array, "B N h v"],
    log_decay: Float[Array, "B N h k"],
    chunk: int = CHUNK,
) -> Float[Array, "B N h v"]:
    """o_t = q_t·S_t with S_t = diag(α_t) S_{t-1} + k_t v_tᵀ, S_0 = 0, in fp32.

    The tokens are cut in chunks. Inside a chunk every pair s ≤ t is weighted by the decay between them;
    the states at chunk borders come from one associative scan. Every exponent is a decay from an earlier
    to a later token, never above 0, so no gate is strong enough to overflow.

    Args:
        q, key: [B, N, h, k]; q already scaled.
        val: [B, N, h, v].
        log_decay: log α, at most 0.
        chunk: tokens per chunk; changes speed and memory, not the result.
    """
    N = q.shape[1]
    pad = -N % chunk
    # A padded token (key 0, decay 1) leaves the state as it was.
    q, key, val, log_decay = (
        jnp.pad(a.astype(jnp.float32), ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(
            a.shape[0], -1, chunk, *a.shape[2:]
        )
        for a in (q, key, val, log_decay)
    )
    decay = jnp.cumsum(log_decay, axis=2)  # [B, c, t, h, k], from the chunk's start through token t
    total = decay[:, :, -1]

    states = jnp.einsum("bcshk,bcshv->bchkv", key * jnp.exp(total[:, :, None] - decay), val)
    _, states = lax.associative_scan(_compose, (jnp.exp(total), states), axis=1)
    before = jnp.pad(states, ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))[:, :-1]
    from_before = jnp.einsum("bcthk,bchkv->bcthv", q * jnp.exp(decay), before)

    causal = jnp.tril(jnp.ones((chunk, chunk), bool))[:, :, None, None]
    between = jnp.where(causal, decay[:, :, :, None] - decay[:, :, None], -jnp.inf)  # [B, c, t, s, h, k]
    scores = jnp.sum(q[:, :, :, None] * key[:, :, None] * jnp.exp(between), axis=-1)
    from_chunk = jnp.einsum("bctsh,bcshv->bcthv", scores, val)

    out = from_before + from_chunk
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :N]


def _compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two stretches of tokens as one: decay factors [.., k] and accumulated states [.., k, v]."""
    (decay1, state1), (decay2, state2) = first, second
    return decay1 * decay2, decay2[..., None] * state1 + state2


class GatedLinearAttention(Part):
    """Causal GLA over the row-major tokens of the map (docs/model.md, "Gated linear attention")."""

    RELEASED: ClassVar[Table] = {
        "norm": "g_norm_swish_gate",
        "decay_down": "gk_proj.0",
        "decay_up": "gk_proj.1",
    }
    LANDMARK: ClassVar[str] = "g_norm_swish_gate.weight"

    def __init__(self, sizes: BlockSizes, *, precision: Precision, rngs: nnx.Rngs) -> None:
        channels, common = sizes.channels, {"precision": precision, "rngs": rngs}
        self.q_proj = Linear(channels, channels // 2, use_bias=False, **common)
        self.k_proj = Linear(channels, channels // 2, use_bias=False, **common)
        self.v_proj = Linear(channels, channels, use_bias=False, **common)
        self.g_proj = Linear(channels, channels, use_bias=False, **common)
        self.decay_down = Linear(channels, GATE_RANK, use_bias=False, **common)
        self.decay_up = Linear(GATE_RANK, channels // 2, **common)
        self.norm = RMSNorm(sizes.depth, **common)
        self.o_proj = Linear(channels, channels, use_bias=False, **common)
        self.num_heads = sizes.num_heads
        self.platform = precision.platform
        self.dtype = precision.dtype

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        tokens = x.reshape(B, H * W, C)

        def heads(y: Array) -> Array:
            return y.reshape(B, H * W, self.num_heads, -1)

        q, key, val = heads(self.q_proj(tokens)), heads(self.k_proj(tokens)), heads(self.v_proj(tokens))
        gate = self.decay_up(self.decay_down(tokens)).astype(jnp.float32)
        log_decay = heads(jax.nn.log_sigmoid(gate)) / GATE_TEMPERATURE
        out = self._attend(q * q.shape[-1] ** -0.5, key, val, log_decay)
        out = self.norm(out) * jax.nn.silu(heads(self.g_proj(tokens)))
        return self.o_proj(out.reshape(B, H, W, C))

    def _attend(self, *arguments: Array) -> Float[Array, "B N h v"]:
        if not forms.fused_gated_linear_attention(self.dtype, self.platform):
            return gated_linear_attention(*arguments)
        run = functools.partial(fused, interpret=forms.kernels_interpreted(self.platform))
        return with_gradient_of(gated_linear_attention, split_over_batch(run, batched=(True,) * 4))(
            *arguments
        )

    @classmethod
    def read_sizes(cls, shapes: Shapes, channels: int) -> dict[str, Any]:
        return {"num_heads": channels // shapes["g_norm_swish_gate.weight"][0]}
