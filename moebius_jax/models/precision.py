"""Which numbers are computed in which dtype."""

import dataclasses

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax

DTYPES = ("float32", "float16", "bfloat16")  # that networks compute and are kept in
AUTO = {"cpu": jnp.float32, "gpu": jnp.float16, "tpu": jnp.bfloat16}


def auto_dtype(platform: str | None = None) -> Dtype:
    """What a platform samples in unless told otherwise; None is the running one."""
    return AUTO.get(platform or jax.default_backend(), jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtypes of one network.

    Statistics of norms, softmax and every sum are in fp32 whatever the dtypes. In float16 throughout the
    predicted noise is 0.5 % off, in bfloat16 4.7 %: its steps between two powers of two are eight times as
    wide (full student, golden input; benchmarks/RESULTS.md).

    Where that is too much, in training above all, only the *bulk* is in `dtype`: operands of the
    feed-forward, of the residual blocks' and resampling convolutions, of the teacher's mixers and of the
    products with Local-λ's lambdas. What lies between them, and the *thin* products that feed the residual
    stream everywhere (projections in and around the student's mixers, shortcuts, first and last convolution,
    time and context), is in a wider `stream_dtype`. With bfloat16 and fp32 that ends at 1.7 %.

    Attributes:
        dtype: of the bulk's operands; sums are accumulated in fp32.
        stream_dtype: of everything else. Equal to `dtype` it gives the fastest and roughest network.
        param_dtype: what parameters are kept in.
        all_thin: whether this part of the network is thin throughout.
        platform: whose form of a computation is run, see `models.forms`; None is the running platform's.
    """

    dtype: Dtype = jnp.float32
    stream_dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    all_thin: bool = False
    platform: str | None = None

    def operands(self, thin: bool = False) -> tuple[Dtype, lax.Precision | None]:
        """Dtype of a product's operands and how it is multiplied.

        Accelerators multiply fp32 in fewer bits by default, on TPUs in bfloat16's. Thin fp32 products beside
        a half-precision bulk are HIGH: three bfloat16 passes there, tensor-float-32 on GPUs. An all-fp32
        network leaves it to the user's `jax_default_matmul_precision`.
        """
        if not (thin or self.all_thin):
            return self.dtype, None
        is_mixed = jnp.dtype(self.stream_dtype) != jnp.dtype(self.dtype)
        return self.stream_dtype, lax.Precision.HIGH if is_mixed else None

    def thin(self) -> "Precision":
        """The dtypes of a part that is thin throughout."""
        return dataclasses.replace(self, all_thin=True)
