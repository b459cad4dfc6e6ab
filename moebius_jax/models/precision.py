"""Which numbers are computed in which dtype."""

import dataclasses

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax

from moebius_jax.models import forms

AUTO = {"gpu": jnp.float16, "tpu": jnp.bfloat16}
AUTO_VAE = {"gpu": jnp.float16}  # bfloat16 is up to 7 grey levels off, float16 one at most


def auto_dtype(platform: str | None = None) -> Dtype:
    """What a platform's U-Nets sample in unless told otherwise; None is the running one."""
    return AUTO.get(platform or jax.default_backend(), jnp.float32)


def auto_vae_dtype(platform: str | None = None) -> Dtype:
    """The same for VAEs."""
    return AUTO_VAE.get(platform or jax.default_backend(), jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtypes of one network.

    Statistics of norms, softmax and every sum are in fp32 whatever the dtypes. In float16 throughout the
    predicted noise is 0.5 % off, in bfloat16 4.7 %: its steps between two powers of two are eight times as
    wide (full student, golden input; benchmarks/RESULTS.md).

    Where that is too much, in training above all, only the *bulk* is in `dtype`: operands of the
    feed-forward, of the residual blocks' and resampling convolutions, of the teacher's mixers and of the
    products with Local-λ's lambdas, and the maps that nothing else reads. What else lies between them, and
    the *thin* products that feed the residual stream everywhere (projections in and around the student's
    mixers, shortcuts, first and last convolution, time and context), is in a wider `stream_dtype`. With
    bfloat16 and fp32 that ends at 1.7 %.

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

    def operands(self, thin: bool = False) -> tuple[Dtype, lax.Precision | lax.DotAlgorithmPreset | None]:
        """Dtype of a product's operands and how it is multiplied.

        Accelerators multiply fp32 in fewer bits by default, on TPUs in bfloat16's: too few beside a
        half-precision bulk. An all-fp32 network leaves it to the user's `jax_default_matmul_precision`.
        """
        if not (thin or self.all_thin):
            return self.dtype, None
        if jnp.dtype(self.stream_dtype) == jnp.dtype(self.dtype):
            return self.stream_dtype, None
        return self.stream_dtype, forms.thin_products(self.platform)

    @property
    def is_half(self) -> bool:
        """Whether the bulk is in half precision."""
        return jnp.dtype(self.dtype).itemsize == 2

    def hidden(self) -> "Precision":
        """The dtypes of a product whose result only the bulk reads: it is kept in the bulk's."""
        return dataclasses.replace(self, stream_dtype=self.operands()[0])

    def thin(self) -> "Precision":
        """The dtypes of a part that is thin throughout."""
        return dataclasses.replace(self, all_thin=True)
