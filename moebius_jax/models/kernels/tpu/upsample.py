"""Four phases of a doubled map put in their places, on a TPU.

    out[2y+i, 2x+j] = phase[i,j][y, x] + bias

Two neighbours of bfloat16 along a row are one word of 32 bits in a TPU's registers. So even and odd columns
are put together by a shift and an "or", where XLA lays the whole map out anew.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, BFloat16, Float

from moebius_jax.models.kernels.tpu.memory import block_bytes, compiler_params

ROWS = 4  # of each phase, of one program


def interleave(*phases_and_bias: Array, interpret: bool = False) -> BFloat16[Array, "B 2H 2W C"]:
    """Phases of even rows and even, then odd columns, of odd rows likewise; and a bias [C], added in fp32."""
    *phases, bias = phases_and_bias
    B, H, W, C = phases[0].shape
    rows = math.gcd(H, ROWS)
    return pl.pallas_call(
        _interleave,
        grid=(B, H // rows),
        in_specs=[
            *[pl.BlockSpec((1, rows, W, C), lambda b, y: (b, y, 0, 0))] * 4,
            pl.BlockSpec((1, C), lambda *_: (0, 0)),
        ],
        out_specs=pl.BlockSpec((1, 2 * rows, 2 * W, C), lambda b, y: (b, y, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((B, 2 * H, 2 * W, C), jnp.bfloat16),
        compiler_params=compiler_params(
            8 * block_bytes((rows, W, C), jnp.bfloat16), dimension_semantics=("parallel", "parallel")
        ),
        interpret=interpret,
        name="interleave",
    )(*phases, bias[None].astype(jnp.float32))


def _interleave(*refs: Array) -> None:
    *phase_refs, bias_ref, out_ref = refs
    bias = bias_ref[...]

    def body(y: Array, _: None) -> None:
        for i, (even_ref, odd_ref) in enumerate((phase_refs[:2], phase_refs[2:])):
            even, odd = (_upper_bits(ref[0, y], bias) for ref in (even_ref, odd_ref))
            out_ref[0, 2 * y + i] = pltpu.bitcast((even >> 16) | odd, jnp.bfloat16)

    lax.fori_loop(0, phase_refs[0].shape[1], body, None)


def _upper_bits(row: BFloat16[Array, "W C"], bias: Float[Array, "1 C"]) -> Array:
    """The sum, rounded to bfloat16, in the upper half of words that are zero below."""
    total = (row.astype(jnp.float32) + bias).astype(jnp.bfloat16).astype(jnp.float32)
    return lax.bitcast_convert_type(total, jnp.uint32)
