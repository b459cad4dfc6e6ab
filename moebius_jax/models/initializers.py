"""The release's initial distributions (spec "Initialisation used for training")."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array


def kaiming_uniform(key: Array, shape: tuple[int, ...], dtype: Dtype, *, fan_in: int) -> Array:
    """torch's default for convolutions, Kaiming-uniform with a = √5: U(±1/√fan_in)."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)


# torch draws a convolution's bias from the same interval as its weight.
torch_bias = kaiming_uniform


def linear(
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = True,
    dtype: Dtype,
    param_dtype: Dtype,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A Linear layer with Xavier-uniform weights and zero bias."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        kernel_init=nnx.initializers.xavier_uniform(),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )
