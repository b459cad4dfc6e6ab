"""Matrix products over the channels: Linear layers and 1x1 convolutions, bulk or thin (see `Precision`)."""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from moebius_jax.models.initializers import kaiming_uniform
from moebius_jax.models.precision import Precision


def linear(
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = True,
    thin: bool = False,
    precision: Precision,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A Linear layer, initialised with Xavier-uniform weights and zero bias.

    Args:
        in_features, out_features: sizes.
        use_bias: whether it has a bias.
        thin: compute in `stream_dtype` rather than in `dtype`. The result is `stream_dtype` in either case.
        precision: dtypes.
        rngs: for the initial weights.
    """
    return _product(
        in_features,
        out_features,
        use_bias=use_bias,
        thin=thin,
        precision=precision,
        rngs=rngs,
        kernel_init=nnx.initializers.xavier_uniform(),
    )


def pointwise_conv(
    in_channels: int,
    out_channels: int,
    *,
    use_bias: bool,
    thin: bool = False,
    precision: Precision,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A 1x1 convolution, which in NHWC is a matrix product over the last axis; arguments as for `linear`."""
    init = functools.partial(_torch_conv_init, fan_in=in_channels)
    return _product(
        in_channels,
        out_channels,
        use_bias=use_bias,
        thin=thin,
        precision=precision,
        rngs=rngs,
        kernel_init=init,
        bias_init=init,
    )


def _product(
    in_features: int, out_features: int, *, thin: bool, precision: Precision, rngs: nnx.Rngs, **options
) -> nnx.Linear:
    dtype, multiply = precision.operands(thin)
    return nnx.Linear(
        in_features,
        out_features,
        dtype=dtype,
        param_dtype=precision.param_dtype,
        precision=multiply,
        preferred_element_type=jnp.dtype(precision.stream_dtype),
        rngs=rngs,
        **options,
    )


def _torch_conv_init(key: Array, shape: tuple[int, ...], dtype, *, fan_in: int) -> Array:
    return kaiming_uniform(key, shape, dtype, fan_in=fan_in)
