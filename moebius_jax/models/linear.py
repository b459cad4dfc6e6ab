"""Matrix products over the channels: Linear layers and 1x1 convolutions, bulk or thin (see `Precision`)."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from moebius_jax.models import forms
from moebius_jax.models.initializers import kaiming_uniform
from moebius_jax.models.kernels.product import Elementwise, product
from moebius_jax.models.kernels.wrapped import split_over_batch
from moebius_jax.models.precision import Precision
from moebius_jax.models.released import LINEAR, POINTWISE, Released, Table


class Linear(nnx.Linear):
    """A Linear layer, initialised with Xavier-uniform weights and zero bias.

    Args:
        in_features, out_features: sizes.
        use_bias: whether it has a bias.
        thin: compute in `stream_dtype` rather than in `dtype`. The result is `stream_dtype` in either case.
        precision: dtypes.
        rngs: for the initial weights.
        options: initialisers, for subclasses.
    """

    RELEASED: ClassVar[Table] = {"kernel": Released("weight", LINEAR)}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        thin: bool = False,
        precision: Precision,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        dtype, multiply = precision.operands(thin)
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=precision.param_dtype,
            precision=multiply,
            preferred_element_type=jnp.dtype(precision.stream_dtype),
            rngs=rngs,
            **{"kernel_init": nnx.initializers.xavier_uniform(), **options},
        )
        self.platform = precision.platform
        self.is_frozen = False

    def freeze(self) -> None:
        """For inference: takes a kernel that has no gradient."""
        self.is_frozen = True

    def __call__(
        self,
        x: Float[Array, "*m K"],
        *,
        then: Elementwise | None = None,
        add: Sequence[Array] = (),
    ) -> Float[Array, "*m N"]:
        """then(x·W + b), plus maps of the result's shape or rows [B or 1, 1, …, N]."""
        if self.is_frozen and x.ndim > 2 and forms.fused_products(self.dtype, self.platform):
            return self._fused(x, then, add)
        y = super().__call__(x)
        return sum(add, y if then is None else then(y))

    def _fused(
        self, x: Float[Array, "*m K"], then: Elementwise | None, add: Sequence[Array]
    ) -> Float[Array, "*m N"]:
        kernel = self.kernel[...]
        bias = [] if self.bias is None else [self.bias[...]]
        run = functools.partial(
            product,
            has_bias=self.bias is not None,
            then=then,
            dtype=self.preferred_element_type,
            interpret=forms.kernels_interpreted(self.platform),
        )
        batched = (True, False, *(False for _ in bias), *(len(a) == len(x) for a in add))
        return split_over_batch(run, batched=batched)(x.astype(kernel.dtype), kernel, *bias, *add)


class PointwiseConv(Linear):
    """A 1x1 convolution, which in NHWC is a matrix product over the last axis; arguments as for `Linear`."""

    RELEASED: ClassVar[Table] = {"kernel": Released("weight", POINTWISE)}

    def __init__(
        self, in_channels: int, out_channels: int, *, precision: Precision, rngs: nnx.Rngs, **options: Any
    ) -> None:
        init = functools.partial(_torch_conv_init, fan_in=in_channels)
        super().__init__(
            in_channels,
            out_channels,
            precision=precision,
            rngs=rngs,
            kernel_init=init,
            bias_init=init,
            **options,
        )


def _torch_conv_init(key: Array, shape: tuple[int, ...], dtype: Dtype, *, fan_in: int) -> Array:
    return kaiming_uniform(key, shape, dtype, fan_in=fan_in)
