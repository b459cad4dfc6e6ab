"""Matrix products over the channels: Linear layers and 1x1 convolutions, bulk or thin (see `Precision`)."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float

from moebius_jax.models import forms
from moebius_jax.models.initializers import kaiming_uniform
from moebius_jax.models.kernels.common import Elementwise
from moebius_jax.models.kernels.gpu.product import product
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
            dot_general=_product,
            rngs=rngs,
            **{"kernel_init": nnx.initializers.xavier_uniform(), **options},
        )
        self.platform = precision.platform
        self.is_frozen = False
        self.norm_eps = None  # of a LayerNorm that this layer has taken over
        self.kernel_sums = None
        self.widths = None  # of layers joined to one

    @staticmethod
    def join(layers: "Sequence[Linear]") -> "Linear":
        """Frozen layers as one that reads the map once and returns a list; for fused products only."""
        joined = nnx.clone(layers[0])
        for name in ("kernel", "bias", "kernel_sums"):
            parts = [getattr(layer, name) for layer in layers]
            if parts[0] is not None:
                setattr(joined, name, nnx.Param(jnp.concatenate([part[...] for part in parts], axis=-1)))
        joined.out_features = sum(layer.out_features for layer in layers)
        joined.widths = tuple(layer.out_features for layer in layers)
        return joined

    def freeze(self) -> None:
        """For inference: takes a kernel that has no gradient, in the dtype it is multiplied in."""
        self.is_frozen = True
        self.kernel = nnx.Param(self.kernel[...].astype(self.dtype))
        if self.norm_eps is not None:
            sums = self.kernel[...].astype(jnp.float32).sum(0)  # of the rounded kernel: the mean must cancel
            self.kernel_sums = nnx.data(nnx.Param(sums))
        elif self.bias is not None:
            self.bias = nnx.Param(self.bias[...].astype(self.dtype))

    def can_take_over(self, norm: nnx.LayerNorm) -> bool:
        """Whether the product sees what the norm saw: not a map that has been rounded in between."""
        return norm.dtype == self.dtype and forms.fused_products(self.dtype, self.platform)

    def take_over(self, norm: nnx.LayerNorm) -> None:
        """Does what `norm` before this layer did. For inference, before `freeze`, in kernels only."""
        kernel = self.kernel[...].astype(jnp.float32)
        bias = jnp.matmul(norm.bias[...].astype(jnp.float32), kernel, precision=lax.Precision.HIGHEST)
        if self.bias is not None:
            bias += self.bias[...]
        self.kernel = nnx.Param(norm.scale[...].astype(jnp.float32)[:, None] * kernel)
        self.bias = nnx.data(nnx.Param(bias))
        self.use_bias = True
        self.norm_eps = norm.epsilon

    def __call__(
        self,
        x: Float[Array, "*m K"],
        *,
        then: Elementwise | None = None,
        add: "Sequence[Array | Product]" = (),
    ) -> Any:
        """then(x·W + b), plus maps of the result's shape, rows [B or 1, 1, …, N] and `Product`s."""
        # Not for rows without a map, which are few; but a norm that was taken over is in the kernel only.
        wants_kernel = x.ndim > 2 and forms.fused_products(self.dtype, self.platform)
        if self.norm_eps is not None or (self.is_frozen and wants_kernel):
            return self._fused(x, then, add)
        y = super().__call__(x)
        return summed(y if then is None else then(y), add)

    def _fused(
        self, x: Float[Array, "*m K"], then: Elementwise | None, add: "Sequence[Array | Product]"
    ) -> Any:
        kernel = self.kernel[...]
        rows = [row[...] for row in (self.kernel_sums, self.bias) if row is not None]
        # Thin products beside a narrower bulk are products of their own.
        add = [a.layer(a.map) if isinstance(a, Product) and a.layer.dtype != self.dtype else a for a in add]
        products = [a for a in add if isinstance(a, Product)]
        pairs = [array for p in products for array in (p.map.astype(kernel.dtype), p.layer.kernel[...])]
        add = [a for a in add if not isinstance(a, Product)]
        add += [
            p.layer.bias[...].reshape(*[1] * (x.ndim - 1), -1) for p in products if p.layer.bias is not None
        ]
        run = functools.partial(
            product,
            has_bias=self.bias is not None,
            norm_eps=self.norm_eps,
            pairs=len(products),
            then=then,
            widths=self.widths,
            dtype=self.preferred_element_type,
            interpret=forms.kernels_interpreted(self.platform),
        )
        for a in add:
            if len(a) not in (1, len(x)) or a.shape[1:-1] not in (x.shape[1:-1], (1,) * (x.ndim - 2)):
                raise ValueError(f"cannot add {a.shape} to the product of {x.shape} with {kernel.shape}")
        arguments = [x.astype(kernel.dtype), kernel, *rows, *pairs, *add]
        # Kernels and rows are no one's; of what is added, a row may be of one item or of all.
        of_items = [len(a) == len(x) for a in add]
        batched = [True, False, *[False] * len(rows), *[True, False] * len(products), *of_items]
        return split_over_batch(run, batched=batched)(*arguments)


def _product(
    x: Array,
    kernel: Array,
    dimension_numbers: lax.DotDimensionNumbers,
    *,
    preferred_element_type: Dtype,
    precision: lax.PrecisionLike,
    **_: Any,
) -> Array:
    """x·kernel, as `lax.dot_general` says it."""
    if preferred_element_type != x.dtype:
        return _in_another_dtype(x, kernel, preferred_element_type, precision)
    return lax.dot_general(x, kernel, dimension_numbers, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _in_another_dtype(x: Array, kernel: Array, dtype: Dtype, precision: lax.PrecisionLike) -> Array:
    """x·kernel in another dtype than theirs; its gradients are products in theirs.

    JAX's own would be products of an fp32 cotangent, several times as slow, which round only their results.
    """
    return lax.dot_general(
        x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=precision, preferred_element_type=dtype
    )


def _in_another_dtype_fwd(
    x: Array, kernel: Array, dtype: Dtype, precision: lax.PrecisionLike
) -> tuple[Array, tuple[Array, Array]]:
    return _in_another_dtype(x, kernel, dtype, precision), (x, kernel)


def _in_another_dtype_bwd(
    _: Dtype, precision: lax.PrecisionLike, saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    cotangent = cotangent.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    of_x = lax.dot_general(cotangent, kernel, (((x.ndim - 1,), (1,)), ((), ())), precision=precision)
    return of_x, lax.dot_general(x, cotangent, ((rows, rows), ((), ())), precision=precision)


_in_another_dtype.defvjp(_in_another_dtype_fwd, _in_another_dtype_bwd)


class Product(NamedTuple):
    """A linear layer's result on a map, to be taken where it is added."""

    map: Array
    layer: Linear


def summed(y: Array, add: Sequence[Array | Product]) -> Array:
    """`y` plus all of these."""
    return sum((a.layer(a.map) if isinstance(a, Product) else a for a in add), y)


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
