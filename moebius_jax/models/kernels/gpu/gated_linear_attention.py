"""Gated linear attention on a GPU: states of the recurrence stay in registers.

    S_t = diag(α_t) S_{t-1} + k_t v_tᵀ        o_t = q_t S_t

The tokens are cut in segments and these in chunks. A first kernel makes each segment's own state, from
nothing; a second one joins the states before its segment, then goes through it chunk by chunk. Inside a chunk
every pair s ≤ t is weighted by the decay between them, so that no exponent is ever above 0.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from moebius_jax.models.kernels.common import power_of_two

Query = Float[Array, "B N h k"]
Value = Float[Array, "B N h v"]

CHUNK = 16  # tokens whose pairs are weighted one by one
SEGMENT = 256  # tokens that one program goes through: fewer join more states, more leave processors idle
BLOCK_K = 32  # of the pairs' products, which are [CHUNK, CHUNK, BLOCK_K] in registers
BLOCK_V = 64


def gated_linear_attention(
    q: Query, key: Query, val: Value, log_decay: Query, *, interpret: bool = False
) -> Value:
    """o, in fp32: a sum over all tokens, which may leave float16's range before a norm brings it back.

    Args:
        q, key, val: of one dtype, q scaled.
        log_decay: log α, at most 0, in fp32.
        interpret: run the kernels as Python would, on any machine.
    """
    B, N, h, k = q.shape
    v = val.shape[-1]
    segments, blocks = pl.cdiv(N, SEGMENT), pl.cdiv(v, BLOCK_V)
    params = triton.CompilerParams(num_warps=4 if k <= 64 else 8, num_stages=2)  # for the state's registers
    options = {"interpret": interpret, "compiler_params": params}
    states = []
    if segments > 1:
        states = pl.pallas_call(
            functools.partial(_make_states, shape=(N, k, v)),
            grid=(B * h, segments - 1, blocks),  # none comes after the last
            out_shape=[
                jax.ShapeDtypeStruct((B, h, segments - 1, k), jnp.float32),
                jax.ShapeDtypeStruct((B, h, segments - 1, k, v), jnp.float32),
            ],
            name="gla_states",
            **options,
        )(key, val, log_decay)
    return pl.pallas_call(
        functools.partial(_attend, shape=(N, k, v), segments=segments),
        grid=(B * h, segments, blocks),
        out_shape=jax.ShapeDtypeStruct((B, N, h, v), jnp.float32),
        name="gla",
        **options,
    )(q, key, val, log_decay, *states)


class _Program:
    """Which item, head, segment and values this program has, and how it reads them."""

    def __init__(self, heads: int, shape: tuple[int, int, int]) -> None:
        self.N, self.k, self.v = shape
        program = pl.program_id(0)
        self.b = program // heads
        self.head = program - self.b * heads
        self.segment = pl.program_id(1)
        self.vs = pl.program_id(2) * BLOCK_V + jnp.arange(BLOCK_V)
        self.ks = jnp.arange(power_of_two(max(self.k, BLOCK_K)))

    def chunks(self) -> int:
        """How many there are in this segment."""
        return pl.cdiv(min(SEGMENT, self.N), CHUNK)

    def tokens(self, chunk: Array) -> Array:
        return self.segment * SEGMENT + chunk * CHUNK + jnp.arange(CHUNK)

    def load(self, ref: Array, n: Array, channels: Array, width: int) -> Float[Array, "t c"]:
        """Tokens in fp32, where there are none zeros: a key and a log decay that leave the state as it is."""
        mask = (n < self.N)[:, None] & (channels < width)[None]
        at = ref.at[self.b, n[:, None], self.head, channels[None]]
        return triton.load(at, mask=mask, other=0).astype(jnp.float32)

    def nothing(self) -> Float[Array, "k v"]:
        return jnp.zeros((len(self.ks), BLOCK_V), jnp.float32)

    def after(
        self, state: Float[Array, "k v"], key: Array, val: Array, decay: Array, total: Array
    ) -> Float[Array, "k v"]:
        """The state after a chunk; `decay` is from its start through each token, `total` through the last."""
        key = key * jnp.exp(total[None] - decay)
        return jnp.exp(total)[:, None] * state + triton.dot(key, val, trans_a=True)


def _make_states(
    key_ref: Array,
    val_ref: Array,
    decay_ref: Array,
    total_ref: Array,
    state_ref: Array,
    *,
    shape: tuple[int, int, int],
) -> None:
    """A segment's log decay and state."""
    own = _Program(key_ref.shape[2], shape)

    def body(chunk: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, so_far = carry
        n = own.tokens(chunk)
        key, log_decay = (own.load(ref, n, own.ks, own.k) for ref in (key_ref, decay_ref))
        total = log_decay.sum(0)
        val = own.load(val_ref, n, own.vs, own.v)
        return own.after(state, key, val, jnp.cumsum(log_decay, axis=0), total), so_far + total

    start = own.nothing(), jnp.zeros(len(own.ks), jnp.float32)
    state, total = lax.fori_loop(0, own.chunks(), body, start)
    in_k, in_v = own.ks < own.k, own.vs < own.v
    triton.store(total_ref.at[own.b, own.head, own.segment, own.ks], total, mask=in_k)
    place = own.b, own.head, own.segment, own.ks[:, None], own.vs[None]
    triton.store(state_ref.at[place], state, mask=in_k[:, None] & in_v[None])


def _attend(
    q_ref: Array,
    key_ref: Array,
    val_ref: Array,
    decay_ref: Array,
    *refs: Array,
    shape: tuple[int, int, int],
    segments: int,
) -> None:
    """A segment's results."""
    *before, out_ref = refs
    own = _Program(q_ref.shape[2], shape)
    in_k, in_v = own.ks < own.k, own.vs < own.v

    def join(i: Array, state: Array) -> Array:
        total_ref, state_ref = before
        mask = in_k & (i < own.segment)  # another's is log decay 0 and state 0: nothing changes
        total = triton.load(total_ref.at[own.b, own.head, i, own.ks], mask=mask, other=0)
        place = own.b, own.head, i, own.ks[:, None], own.vs[None]
        more = triton.load(state_ref.at[place], mask=mask[:, None] & in_v[None], other=0)
        return jnp.exp(total)[:, None] * state + more

    def pairs(n: Array) -> Float[Array, "t s"]:
        """Σ_k q[t,k] key[s,k] times the decay between, a block of k after the other."""
        token = jnp.arange(CHUNK)
        causal = (token[:, None] >= token[None])[:, :, None]
        scores = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        for start in range(0, own.k, BLOCK_K):
            ks = start + jnp.arange(BLOCK_K)
            q, key, log_decay = (own.load(ref, n, ks, own.k) for ref in (q_ref, key_ref, decay_ref))
            decay = jnp.cumsum(log_decay, axis=0)
            weights = jnp.exp(jnp.where(causal, decay[:, None] - decay[None], -jnp.inf))
            scores += (q[:, None] * key[None] * weights).sum(-1)
        return scores

    def body(chunk: Array, state: Array) -> Array:
        n = own.tokens(chunk)
        q, key, log_decay = (own.load(ref, n, own.ks, own.k) for ref in (q_ref, key_ref, decay_ref))
        val = own.load(val_ref, n, own.vs, own.v)
        decay = jnp.cumsum(log_decay, axis=0)
        out = triton.dot(q * jnp.exp(decay), state) + triton.dot(pairs(n), val)
        place = own.b, n[:, None], own.head, own.vs[None]
        triton.store(out_ref.at[place], out, mask=(n < own.N)[:, None] & in_v[None])
        return own.after(state, key, val, decay, log_decay.sum(0))

    state = lax.fori_loop(0, segments - 1, join, own.nothing()) if before else own.nothing()
    lax.fori_loop(0, own.chunks(), body, state)
