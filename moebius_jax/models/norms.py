"""Normalisation layers: statistics and arithmetic in fp32 whatever the dtypes, results in `stream_dtype`."""

import functools
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from moebius_jax.models import forms
from moebius_jax.models.kernels.common import Elementwise
from moebius_jax.models.kernels.gpu.group_norm import group_norm
from moebius_jax.models.kernels.wrapped import split_over_batch
from moebius_jax.models.precision import Precision
from moebius_jax.models.released import Table

GROUPS = 32  # of every GroupNorm of every published network
Average = Callable[[Array], Array]  # of what is normalised together, in a shape that broadcasts with it


def moments(x: Float[Array, "..."], average: Average, *, one_pass: bool) -> tuple[Array, Array]:
    """Mean and biased variance, in fp32, as `average` shapes them.

    Two passes over the map, as torch, or one: mean(x²) - mean(x)². What that loses to cancellation, 2^-24 of
    mean²/variance, is no more than what products of operands of 8 or 11 bits have lost before.
    """
    x = x.astype(jnp.float32)
    mean = average(x)
    if not one_pass:
        return mean, average(jnp.square(x - mean))
    return mean, jnp.maximum(average(jnp.square(x)) - jnp.square(mean), 0)


def normalised(
    x: Float[Array, "..."], average: Average, *, eps: float, scale: Array, bias: Array, one_pass: bool
) -> Float[Array, "..."]:
    """(x - mean) / sqrt(variance + eps) · scale + bias; in fp32."""
    mean, var = moments(x, average, one_pass=one_pass)
    scale, bias = (p.astype(jnp.float32) for p in (scale, bias))
    return (x.astype(jnp.float32) - mean) * (lax.rsqrt(var + eps) * scale) + bias


def _over(*axes: int) -> Average:
    return functools.partial(jnp.mean, axis=axes, keepdims=True)


class GroupNorm(nnx.GroupNorm):
    """GroupNorm, over 32 groups unless told otherwise."""

    RELEASED: ClassVar[Table] = {"scale": "weight"}

    def __init__(
        self, channels: int, *, groups: int = GROUPS, eps: float, precision: Precision, rngs: nnx.Rngs
    ) -> None:
        super().__init__(
            channels,
            groups,
            epsilon=eps,
            dtype=precision.stream_dtype,
            param_dtype=precision.param_dtype,
            rngs=rngs,
        )
        self.platform = precision.platform
        self.one_pass = precision.is_half
        self.is_frozen = False

    def freeze(self) -> None:
        """For inference: takes kernels that have no gradient."""
        self.is_frozen = True

    def __call__(
        self, x: Float[Array, "B *n C"], *, then: Elementwise | None = None
    ) -> Float[Array, "B *n C"]:
        """The norm, then an activation."""
        if self.is_frozen and forms.fused_group_norm(self.dtype, self.platform):
            interpret = forms.kernels_interpreted(self.platform)
            options = {"groups": self.num_groups, "eps": self.epsilon, "then": then, "dtype": self.dtype}
            run = functools.partial(group_norm, **options, interpret=interpret)
            return split_over_batch(run, batched=(True, False, False))(x, self.scale[...], self.bias[...])
        scale, bias = self.scale[...], self.bias[...]
        options = {"eps": self.epsilon, "one_pass": self.one_pass}
        if forms.channels_averaged_first(self.platform):
            y = normalised(x, self._average, scale=scale, bias=bias, **options)
        else:
            grouped, scale, bias = (a.reshape(*a.shape[:-1], self.num_groups, -1) for a in (x, scale, bias))
            average = _over(*range(1, x.ndim - 1), -1)
            y = normalised(grouped, average, scale=scale, bias=bias, **options).reshape(x.shape)
        y = y.astype(self.dtype)
        return y if then is None else then(y)

    def _average(self, x: Float[Array, "B *n C"]) -> Float[Array, "B *ones C"]:
        """Of each group, by way of its channels' own."""
        of_channels = x.mean(range(1, x.ndim - 1), keepdims=True)
        of_groups = of_channels.reshape(*of_channels.shape[:-1], self.num_groups, -1).mean(-1)
        return jnp.repeat(of_groups, x.shape[-1] // self.num_groups, axis=-1)


class LayerNorm(nnx.LayerNorm):
    """LayerNorm with torch's default eps 1e-5."""

    RELEASED: ClassVar[Table] = {"scale": "weight"}

    def __init__(self, channels: int, *, precision: Precision, rngs: nnx.Rngs) -> None:
        super().__init__(
            channels,
            epsilon=1e-5,
            dtype=precision.stream_dtype,
            param_dtype=precision.param_dtype,
            rngs=rngs,
        )
        self.one_pass = precision.is_half and forms.one_pass_rows(precision.platform)

    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        scale, bias = self.scale[...], self.bias[...]
        y = normalised(x, _over(-1), eps=self.epsilon, scale=scale, bias=bias, one_pass=self.one_pass)
        return y.astype(self.dtype)


class RMSNorm(nnx.RMSNorm):
    """RMSNorm, eps 1e-6."""

    RELEASED: ClassVar[Table] = {"scale": "weight"}

    def __init__(self, channels: int, *, precision: Precision, rngs: nnx.Rngs) -> None:
        super().__init__(
            channels,
            epsilon=1e-6,
            dtype=precision.stream_dtype,
            param_dtype=precision.param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        # Not flax's: it rounds to `dtype` first, whose range the sums it is called on may leave.
        x = x.astype(jnp.float32)
        root = lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * (root * self.scale[...].astype(jnp.float32))).astype(self.dtype)


class BatchNorm(nnx.Module):
    """BatchNorm over every axis but the last, as torch keeps it.

    flax's own layer stores the biased variance; torch stores the unbiased one and normalises with the
    biased one, which decides the released running statistics (docs/model.md, "Normalisation").

    In training mode the batch's own statistics are used and the running ones move by 1 - `decay`.
    Under `jax.jit` with a sharded batch they are the statistics of the global batch. `groups` > 1 cuts the
    batch in that many equal parts, each normalised with its own statistics, as data parallelism without
    synchronisation does; the running statistics move to the parts' mean.
    """

    RELEASED: ClassVar[Table] = {"scale": "weight", "mean": "running_mean", "var": "running_var"}

    def __init__(self, channels: int, *, eps: float = 1e-5, decay: float = 0.9, precision: Precision) -> None:
        self.scale = nnx.Param(jnp.ones(channels, precision.param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, precision.param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(channels, jnp.float32))
        self.eps = eps
        self.decay = decay
        self.dtype = precision.stream_dtype
        self.one_pass = precision.is_half
        self.use_running_average = False
        self.groups = 1

    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        if self.groups > 1 and not self.use_running_average:
            return self._per_group(x)
        x = x.astype(jnp.float32)
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var = (moment.ravel() for moment in self._moments(x, _over(*range(x.ndim - 1))))
            count = x.size // x.shape[-1]
            self._track(mean, var * count / max(count - 1, 1))
        scale, bias = self.affine(mean, var)
        return (x * scale + bias).astype(self.dtype)

    def _per_group(self, x: Float[Array, "B *n C"]) -> Float[Array, "B *n C"]:
        if x.shape[0] % self.groups:
            raise ValueError(f"a batch of {x.shape[0]} cannot be cut in {self.groups} equal parts")
        parts = x.astype(jnp.float32).reshape(self.groups, -1, *x.shape[1:])
        mean, var = self._moments(parts, _over(*range(1, parts.ndim - 1)))
        count = parts[0].size // parts.shape[-1]
        self._track(mean.mean(0).ravel(), var.mean(0).ravel() * count / max(count - 1, 1))
        scale, bias = self.affine(mean, var)
        return (parts * scale + bias).reshape(x.shape).astype(self.dtype)

    def _moments(self, x: Float[Array, "..."], average: Average) -> tuple[Array, Array]:
        """As `moments`; beside half precision in one pass, from the running mean on.

        A batch's mean that is 30 standard deviations from the running one costs 1e-3 of a standard deviation.
        """
        if not self.one_pass:
            return moments(x, average, one_pass=False)
        near = lax.stop_gradient(self.mean[...])
        mean, var = moments(x - near, average, one_pass=True)
        return near + mean, var

    def affine(self, mean: Float[Array, "*n C"], var: Float[Array, "*n C"]) -> tuple[Array, Array]:
        """The layer as y = x·scale + bias for given statistics, in fp32."""
        scale = self.scale[...].astype(jnp.float32) * lax.rsqrt(var + self.eps)
        return scale, self.bias[...].astype(jnp.float32) - mean * scale

    def _track(self, mean: Float[Array, " C"], unbiased_var: Float[Array, " C"]) -> None:
        for stat, value in ((self.mean, mean), (self.var, unbiased_var)):
            # Not `stat[...] =`: it asks a tracer for its sharding, the slower the longer the program.
            stat.set_value(self.decay * stat[...] + (1 - self.decay) * lax.stop_gradient(value))
